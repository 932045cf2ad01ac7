//! Tiles between global and shared memory, 16 bytes per thread at a time.
//!
//! Neighbouring threads take neighbouring chunks of 8 elements: 8 of a row (128 bytes), or
//! 4 where a row is not a multiple of 8 chunks long. Either way the eight threads of a
//! pass write to eight different groups of banks of a swizzled tile.
//!
//! ```text
//! thread t:  chunk t % GROUP of row t / GROUP; then GROUP chunks to the right until the
//!            row ends, then THREADS / GROUP rows below until the tile ends
//! ```

use simt::{
    async_copy,
    compiler::opaque,
    global::Global,
    layout::{Swizzled, TileLayout},
    memory::Memory,
    shared::Shared,
    thread, warp,
};

use crate::{args::Tensor, parts::columns::Columns};

/// Threads of a block of four warps.
pub const FOUR_WARPS: u32 = 4 * warp::LANES;

/// The rows of one head of a tensor: see [`Head::queries`](crate::parts::head::Head::queries).
#[derive(Clone, Copy)]
pub struct Rows<T> {
    /// The head's first row and what follows.
    head: Global<T>,
    stride: u64,
    /// Rows that the head has.
    seq: u32,
    /// Columns that they have.
    columns: Columns,
}

impl<T: Memory> Rows<T> {
    /// The `seq` rows of a head, the first of which is at element `first`.
    ///
    /// # Safety
    /// The tensor must hold them, its address and strides multiples of 16 bytes.
    #[inline(always)]
    pub unsafe fn new(tensor: &Tensor, first: u64, seq: u32) -> Self {
        // SAFETY: the tensor holds the rows, as stated above.
        let view = unsafe { tensor.buffer.view::<T>() };
        Self { head: view.skip(first), stride: tensor.stride_n, seq, columns: Columns::ALL }
    }

    /// `seq` rows, the first of which begins at `head`, a multiple of 16 bytes.
    #[inline(always)]
    pub(crate) const fn at(head: Global<T>, stride: u64, seq: u32) -> Self {
        Self { head, stride, seq, columns: Columns::ALL }
    }

    /// The same rows, which may have fewer columns than a tile: what lies beyond is not read, and 0
    /// in the tile.
    #[inline(always)]
    #[must_use]
    pub const fn of_columns(self, columns: Columns) -> Self {
        Self { columns, ..self }
    }

    /// The same rows, of whose stride the compiler knows nothing: it would keep multiples of it
    /// from one tile to the next.
    #[inline(always)]
    #[must_use]
    pub fn anew(self) -> Self {
        let [low, high] = [self.stride as u32, (self.stride >> 32) as u32];
        Self { stride: opaque(low) as u64 | (opaque(high) as u64) << 32, ..self }
    }

    /// The elements from `column` of `row` on.
    #[inline(always)]
    fn from(&self, row: u32, column: u32) -> Global<T> {
        self.head.skip(row as u64 * self.stride + column as u64)
    }

    /// Whether the head has this row and this column.
    #[inline(always)]
    const fn has(&self, row: u32, column: u32) -> bool {
        row < self.seq && self.columns.has(column)
    }

    /// The elements from `columns` to the right of `row` rows below the first of `chunk`.
    #[inline(always)]
    fn walk(&self, chunk: Global<T>, below: u32, right: u32) -> Global<T> {
        chunk.skip(below as u64 * self.stride).skip(right as u64)
    }
}

/// Calls `$body` for each chunk of thread `$tid`, of THREADS, in a tile of ROWS rows of D
/// elements of layout L. The chunk is the one `$below` rows below and `$right` columns to
/// the right, both constants, of the thread's first, at `$row` and `$column`; `$index` is
/// where it goes.
macro_rules! for_each_chunk {
    ($L:ident, $D:ident, $ROWS:ident, $tid:ident of $THREADS:ident,
        |$index:ident, ($row:ident, $below:ident), ($column:ident, $right:ident)| $body:block) => {{
        use simt::{layout::CHUNK, unroll};
        use $crate::parts::tile::{group, passes, rows_at_once};
        const { assert!(passes($D, $ROWS as u32, $THREADS) <= 8) };
        let ($row, $column) = ($tid / const { group($D) }, $tid % const { group($D) } * CHUNK);
        let first_index = $L::index($row, $column);
        unroll!(for PASS in 0..8 {
            if (PASS as u32) < const { passes($D, $ROWS as u32, $THREADS) } {
                unroll!(for STEP in 0..8 {
                    if (STEP as u32) < const { $D as u32 / CHUNK / group($D) } {
                        let $below = PASS as u32 * const { rows_at_once($D, $THREADS) };
                        // A whole number of groups to the right the exchange is the same.
                        let $right = STEP as u32 * const { group($D) * CHUNK };
                        // Eight rows below the exchange is the same too: a warp alone has four at once.
                        let of_eight = if $below % 8 == 0 {
                            first_index
                        } else {
                            $L::index($row + $below % 8, $column)
                        };
                        let $index = $L::down(of_eight, $below / 8 * 8) + $right;
                        $body
                    }
                });
            }
        });
    }};
}
pub(crate) use for_each_chunk;

/// Loads rows `first..first + ROWS` into a tile, through registers. Rows and columns past the end
/// are 0, so that their scores, which are hidden later, are finite.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn load<T: Memory, L: TileLayout, const D: usize, const ROWS: u32, const THREADS: u32>(
    rows: &Rows<T>,
    first: u32,
    tile: Shared<T>,
) {
    let tid = thread::thread_idx_x();
    if rows.columns == Columns::ALL {
        // Apart: a row's chunks are then inside or outside together.
        for_each_chunk!(L, D, ROWS, tid of THREADS, |index, (row, below), (column, right)| {
            let from = rows.walk(rows.from(first + row, column), below, right);
            let inside = first + row + below < rows.seq;
            tile.write_as(index, if inside { from.read_as::<[u32; 4]>(0) } else { [0; 4] });
        });
        return;
    }
    for_each_chunk!(L, D, ROWS, tid of THREADS, |index, (row, below), (column, right)| {
        let from = rows.walk(rows.from(first + row, column), below, right);
        let inside = rows.has(first + row + below, column + right);
        tile.write_as(index, if inside { from.read_as::<[u32; 4]>(0) } else { [0; 4] });
    });
}

/// As [`load`], but only starts the copies: they run while the thread computes. The
/// caller commits and waits.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn load_async<T: Memory, L: TileLayout, const D: usize, const ROWS: u32, const THREADS: u32>(
    rows: &Rows<T>,
    first: u32,
    tile: Shared<T>,
) {
    // Computed for each tile anew: the compiler would keep all that follows from it in
    // registers of the loop over tiles.
    let tid = opaque(thread::thread_idx_x());
    load_async_by::<T, L, D, ROWS, THREADS>(rows, first, tile, tid);
}

/// As [`load_async`], by the thread of that number among THREADS: a warp's lanes load a tile of its own.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub(crate) fn load_async_by<
    T: Memory,
    L: TileLayout,
    const D: usize,
    const ROWS: u32,
    const THREADS: u32,
>(
    rows: &Rows<T>,
    first: u32,
    tile: Shared<T>,
    tid: u32,
) {
    for_each_chunk!(L, D, ROWS, tid of THREADS, |index, (row, below), (column, right)| {
        let from = rows.walk(rows.from(first + row, column), below, right);
        let inside = rows.has(first + row + below, column + right);
        async_copy::copy_or_zero(tile, index, from, 0, inside);
    });
}

/// Stages of K and V: copies fill one during the arithmetic on the other.
pub const STAGES: u32 = 2;

/// K and V of a head, and the stages in shared memory that their tiles of BC keys go
/// through: K and V of stage 0, then of stage 1, swizzled. With a single stage, K and V are copied
/// in turns, each during the arithmetic on the other.
#[derive(Clone, Copy)]
pub struct KvStages<T, const D: usize, const BC: u32, const THREADS: u32, const STAGES: u32 = 2> {
    k: Rows<T>,
    v: Rows<T>,
    smem: Shared<T>,
}

impl<T: Memory, const D: usize, const BC: u32, const THREADS: u32, const STAGES: u32>
    KvStages<T, D, BC, THREADS, STAGES>
{
    /// The same, for that number of keys.
    #[inline(always)]
    #[must_use]
    pub fn of_keys(self, seq_k: u32) -> Self {
        Self { k: Rows { seq: seq_k, ..self.k }, v: Rows { seq: seq_k, ..self.v }, ..self }
    }

    /// Elements of a tile.
    pub const TILE: u32 = BC * D as u32;
    /// Bytes of all stages.
    pub const BYTES: u32 = STAGES * 2 * Self::TILE * T::BYTES;

    /// The stages of `k` and `v`, at the beginning of dynamic shared memory.
    ///
    /// # Safety
    /// As for [`Shared::dynamic`].
    #[inline(always)]
    #[must_use]
    pub unsafe fn new(k: Rows<T>, v: Rows<T>) -> Self {
        // SAFETY: the launch gives the stages, as stated above.
        Self { k, v, smem: unsafe { Shared::dynamic(0, STAGES * 2 * Self::TILE) } }
    }

    /// All of a stage.
    #[inline(always)]
    #[must_use]
    pub const fn stage(&self, stage: u32) -> Shared<T> {
        self.smem.slice(2 * stage * Self::TILE, 2 * Self::TILE)
    }

    /// The tiles of K and V of a stage.
    #[inline(always)]
    #[must_use]
    pub const fn tiles(&self, stage: u32) -> (Shared<T>, Shared<T>) {
        let both = self.stage(stage);
        (both.slice(0, Self::TILE), both.slice(Self::TILE, Self::TILE))
    }

    /// Starts to copy a tile of keys and values into a stage; the caller commits and waits.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn start(&self, kv_tile: u32, stage: u32) {
        self.start_keys(kv_tile, stage);
        self.start_values(kv_tile, stage);
    }

    /// Starts to copy a tile of keys into a stage.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn start_keys(&self, kv_tile: u32, stage: u32) {
        let (k_smem, _) = self.tiles(stage);
        load_async::<T, Swizzled<D>, D, BC, THREADS>(&self.k, kv_tile * BC, k_smem);
    }

    /// Starts to copy a tile of values into a stage.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn start_values(&self, kv_tile: u32, stage: u32) {
        let (_, v_smem) = self.tiles(stage);
        load_async::<T, Swizzled<D>, D, BC, THREADS>(&self.v, kv_tile * BC, v_smem);
    }
}

/// Threads side by side on a row of `d` elements.
pub(crate) const fn group(d: usize) -> u32 {
    assert!(d % 32 == 0, "a row is a multiple of 4 chunks");
    if d % 64 == 0 { 8 } else { 4 }
}

/// Rows that the block's threads touch at once.
pub(crate) const fn rows_at_once(d: usize, threads: u32) -> u32 {
    threads / group(d)
}

/// How often the block's threads go over a tile.
pub(crate) const fn passes(d: usize, rows: u32, threads: u32) -> u32 {
    assert!(rows % rows_at_once(d, threads) == 0, "every thread has as many rows");
    rows / rows_at_once(d, threads)
}
