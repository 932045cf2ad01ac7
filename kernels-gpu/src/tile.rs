//! Tiles between global and shared memory, 16 bytes a thread at a time.
//!
//! Neighbouring threads take neighbouring chunks of 8 elements: 8 of a row (128 bytes), or
//! 4 where a row is not a multiple of 8 chunks long. Either way the eight threads of a
//! pass write to eight different groups of banks of a swizzled tile.
//!
//! ```text
//! thread t:  chunk t % GROUP of row t / GROUP; then GROUP chunks to the right until the
//!            row ends, then THREADS / GROUP rows below until the tile ends
//! ```

use simt::{async_copy, global::Global, layout::Layout, memory::Memory, shared::Shared};

use crate::args::Tensor;

/// Threads of the blocks that use these tiles.
pub const THREADS: u32 = 128;

/// The rows of one head of a tensor.
pub struct Rows<T> {
    view: Global<T>,
    head: u64,
    stride: u64,
    /// Rows that the head has.
    seq: u32,
}

impl<T> Clone for Rows<T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Rows<T> {}

impl<T: Memory> Rows<T> {
    /// The `seq` rows of head `h` of batch entry `b`.
    ///
    /// # Safety
    /// The tensor must be `[B, H, N, D]` with `N = seq`, its address and strides multiples
    /// of 16 bytes.
    #[inline(always)]
    pub unsafe fn new(tensor: &Tensor, b: u32, h: u32, seq: u32) -> Self {
        // SAFETY: the caller vouches for the buffer.
        let view = unsafe { tensor.buffer.view::<T>() };
        Self { view, head: tensor.head(b, h), stride: tensor.stride_n, seq }
    }

    #[inline(always)]
    fn index(&self, row: u32, column: u32) -> u64 {
        self.head + row as u64 * self.stride + column as u64
    }
}

/// Calls `$body` for each chunk of this thread in a tile of ROWS rows of D elements of
/// layout L: `$index` is where it goes, `$row` and `$column` where it comes from.
macro_rules! for_each_chunk {
    ($L:ident, $D:ident, $ROWS:ident, |$index:ident, $row:ident, $column:ident| $body:block) => {{
        use simt::{layout::CHUNK, thread, unroll};
        use $crate::tile::{group, rows_at_once};
        let tid = thread::thread_idx_x();
        let (first_row, first_chunk) = (tid / const { group($D) }, tid % const { group($D) });
        let first_index = $L::index(first_row, first_chunk * CHUNK);
        unroll!(for PASS in 0..8 {
            if (PASS as u32) < const { $ROWS as u32 / rows_at_once($D) } {
                unroll!(for STEP in 0..8 {
                    if (STEP as u32) < const { $D as u32 / CHUNK / group($D) } {
                        let (below, right) = (
                            PASS as u32 * const { rows_at_once($D) },
                            STEP as u32 * const { group($D) } * CHUNK,
                        );
                        // A whole number of groups to the right the exchange is the same.
                        let $index = $L::down(first_index, below) + right;
                        let ($row, $column) = (first_row + below, first_chunk * CHUNK + right);
                        $body
                    }
                });
            }
        });
    }};
}
pub(crate) use for_each_chunk;

/// Loads rows `first..first + ROWS` into a tile, through registers. Rows past the end are
/// 0, so that what is computed from them and hidden later is finite.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn load<T: Memory, L: Layout, const D: usize, const ROWS: u32>(
    rows: &Rows<T>,
    first: u32,
    tile: Shared<T>,
) {
    const { assert!(ROWS % rows_at_once(D) == 0 && ROWS / rows_at_once(D) <= 8) };
    for_each_chunk!(L, D, ROWS, |index, row, column| {
        let inside = first + row < rows.seq;
        let chunk = if inside {
            rows.view.read_as::<[u32; 4]>(rows.index(first + row, column))
        } else {
            [0; 4]
        };
        tile.write_as(index, chunk);
    });
}

/// As [`load`], but only starts the copies: they run while the thread computes. The
/// caller commits and waits.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn load_async<T: Memory, L: Layout, const D: usize, const ROWS: u32>(
    rows: &Rows<T>,
    first: u32,
    tile: Shared<T>,
) {
    const { assert!(ROWS % rows_at_once(D) == 0 && ROWS / rows_at_once(D) <= 8) };
    for_each_chunk!(L, D, ROWS, |index, row, column| {
        let inside = first + row < rows.seq;
        async_copy::copy_or_zero(tile, index, rows.view, rows.index(first + row, column), inside);
    });
}

/// Threads side by side on a row of `d` elements.
pub(crate) const fn group(d: usize) -> u32 {
    assert!(d % 32 == 0, "a row is a multiple of 4 chunks");
    if d % 64 == 0 { 8 } else { 4 }
}

/// Rows that the block's threads touch at once.
pub(crate) const fn rows_at_once(d: usize) -> u32 {
    THREADS / group(d)
}
