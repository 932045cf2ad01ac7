//! flash_pipelined: what `mma.sync` can do, from sm_80 on.
//!
//! The idea: on the tensor cores' way stands everything that is not a product. So operands
//! are in shared memory before they are needed, serve two products when they come to
//! registers, and what need not be done is not done.
//!
//! ```text
//! start to copy Q, and K, V of the first tile, of the block's first task
//! for each task (head, query tile), while there is one:
//!     for each tile of BC keys:
//!         wait for the copies; barrier            one per tile
//!         start to copy K, V of the next tile     into the other stage
//!         last tile: ask the queue for a task     one thread
//!         S = Q Kᵀ                                32 rows per warp
//!         hide, in tiles that the diagonal, the last key or padding cuts
//!         if some row's maximum has grown a lot: raise m; O, l *= alpha
//!         for each 16 keys: P = exp2(S * scale - m); l += rowsum(P); O += P V
//!     barrier; start to copy Q, and K, V of the first tile, of the next task
//!     O / l, LSE = m + log(l)
//! ```
//!
//! ```text
//!              BC keys
//!            +---------+     A warp has two fragments of 16 rows: K and V that it loads
//!    warp 0  | 16 x BC |     serve both. S, P and O stay in registers; Q does where
//!            | 16 x BC |     there is room, and passes through the stage that is still empty.
//!    warp 1  |   ...   |
//! ```
//!
//! | D | warps x fragments | BC | Q in | registers of Q, S, O per thread | shared bytes |
//! |---|---|---|---|---|---|
//! | 32 | 4 x 2 | 64 | registers | 16, 64, 32 | 16,400 |
//! | 64 | 4 x 2 | 64 | registers | 32, 64, 64 | 32,784 |
//! | 96 | 4 x 2 | 64 | shared memory | -, 64, 96 | 73,744 |
//! | 128 | 4 x 2 | 48 | shared memory | -, 48, 128 | 81,936 |
//! | 160 | 8 x 1 | 64 | registers | 40, 32, 80 | 81,936 |
//! | 192 | 8 x 1 | 64 | registers | 48, 32, 96 | 98,320 |
//! | 224 | 4 x 1 | 32 | shared memory | -, 16, 112 | 86,032 |
//! | 256 | 8 x 1 | 32 | shared memory | -, 16, 128 | 131,088 |
//!
//! Where the time goes, by counting: with two fragments a B of 512 bytes serves four products
//! of 4096 FLOP, 32 FLOP per byte of shared memory, twice what 16 rows give. Q that is loaded
//! again for each tile of keys lowers that: 24 at D = 128. A tile's exponentials, BR BC of
//! them, stand between the two products; the exponentials of the next 16 keys go beside the products of
//! these.
//!
//! Work that is left out: the scale is part of the fma before exp2; maxima are exchanged, and O is
//! rescaled, only when a maximum has grown by more than 2^8 (one vote of the warp decides);
//! tiles that no row of a warp sees are skipped.
//!
//! Blocks stay: as many as the GPU holds at once, and whichever is done takes the next task from
//! a queue. Its copies run while the block stores the outputs of the task before. Causal launches
//! take the longest query tiles first (`schedule.rs`), so that the short ones fill up the end.
//!
//! Measured, with a block for each task: 0.156 ms (H100; f16, batch 4, 12 heads, N 2048, D 64).
//! Limits: f16 and bf16, a positive scale.
//!
//! Source: Dao, "FlashAttention-2", 2023, sections 3.1 to 3.3; the rescaling rule as in
//! "FlashAttention-4".

use half::{bf16, f16};
use simt::{
    async_copy,
    compiler::opaque,
    layout::Swizzled,
    memory::Memory,
    mma::{Ampere, TensorCore},
    scalar::Scalar,
    shared::Shared,
    thread, unroll, warp,
};

use crate::{
    args::AttentionArgs,
    entries,
    parts::{
        columns::Columns,
        fragment::{self, RegisterQueries, SharedQueries},
        head::Head,
        online,
        policy::Policy,
        queue::Queue,
        schedule::{self, Extent, QueryTile},
        tile::{self, KvStages},
        warp_rows::{WarpRows, warp_row},
    },
};

/// How a block works on its tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PipelinedShape {
    /// Warps of a block.
    pub warps: u32,
    /// Fragments of 16 rows that a warp keeps.
    pub fragments: u32,
    /// Keys of a tile.
    pub keys: u32,
    /// Whether Q is held in registers.
    pub q_in_registers: bool,
    /// Stages of K and V. With one, K and V are copied in turns: V of a tile while its scores are
    /// computed, K of the next tile while the values are.
    pub stages: u32,
}

/// The shape for head dim `d`. The wider O is, the less is left for S, for Q, and for a second
/// fragment.
#[must_use]
pub const fn shape(d: usize) -> PipelinedShape {
    let (warps, fragments, keys, q_in_registers, stages) = match d {
        0..=64 => (4, 2, 64, true, 2),
        65..=96 => (4, 2, 64, false, 2),
        97..=128 => (4, 2, 48, false, 2),
        129..=192 => (8, 1, 64, true, 2),
        193..=224 => (4, 1, 32, false, 2),
        _ => (8, 1, 64, false, 1),
    };
    PipelinedShape { warps, fragments, keys, q_in_registers, stages }
}

impl PipelinedShape {
    /// Threads of a block.
    #[must_use]
    pub const fn threads(&self) -> u32 {
        self.warps * warp::LANES
    }

    /// Blocks that fit on a multiprocessor at once.
    const fn blocks(&self) -> u32 {
        8 / self.warps
    }

    /// Query rows of a block.
    #[must_use]
    pub const fn rows(&self) -> u32 {
        self.warps * self.fragments * fragment::ROWS
    }

    /// Rows of Q that have shared memory of their own.
    const fn shared_q_rows(&self) -> u32 {
        if self.q_in_registers { 0 } else { self.rows() }
    }
}

/// Dynamic shared memory of a block in bytes.
#[must_use]
pub const fn shared_bytes(d: usize) -> u32 {
    tile_bytes(d) + TASK_WORDS * u32::BYTES
}

/// Bytes of the tiles of K, V and Q in shared memory.
const fn tile_bytes(d: usize) -> u32 {
    let shape = shape(d);
    (shape.shared_q_rows() + shape.stages * 2 * shape.keys) * d as u32 * 2
}

/// Flash attention forward, copies ahead of the products.
///
/// # Layout
/// `q, o: [B, H, Nq, D]`, `k, v: [B, H, Nk, D]`, `lse: [B, H, Nq]`.
///
/// # Thread mapping
/// Blocks along x, [`PipelinedShape::threads`] each: no more than the `B * H * ceil(Nq / BR)` tasks that
/// they share, at best as many as the GPU holds at once. A warp has FRAGMENTS fragments of 16
/// rows below each other.
///
/// # Shared memory
/// [`shared_bytes`], dynamic: two stages of K and V, then Q if it is not in registers, then the
/// next task.
///
/// # Safety
/// The buffers of `args` must have these shapes, with addresses and strides that are
/// multiples of 16 bytes, and the launch the threads and shared memory stated here.
#[inline(always)]
pub unsafe fn flash_pipelined<
    T: Scalar,
    const D: usize,
    const D_STEPS: usize,
    const COLUMN_TILES: usize,
    const FRAGMENTS: usize,
    const THREADS: u32,
    const BR: u32,
    const BC: u32,
    const KEY_TILES: usize,
    const STAGES: u32,
>(
    args: &AttentionArgs,
) where
    Ampere: TensorCore<T>,
{
    const {
        let shape = shape(D);
        assert!(D == 8 * COLUMN_TILES && D == 16 * D_STEPS, "whole products over D");
        assert!(THREADS == shape.threads() && BR == shape.rows());
        assert!(FRAGMENTS as u32 == shape.fragments);
        assert!(BC == shape.keys && BC as usize == 8 * KEY_TILES);
        assert!(STAGES == shape.stages);
        assert!(
            !shape.q_in_registers || BR <= 2 * BC && STAGES == 2,
            "Q fits a stage of K and V that is still empty"
        );
    }
    let q_in_registers = const { shape(D).q_in_registers };
    let in_turns = STAGES == 1;

    // Who am I.
    let row_bytes = 2 * D as u64 * T::BYTES as u64;
    let mut task = schedule::query_tile(args, opaque(thread::block_idx_x()), BR, row_bytes);
    // SAFETY: the launch gives the shared memory stated above.
    let next_task = unsafe { NextTask::new(const { tile_bytes(D) }) };
    // The task, or the next one in the queue that has rows.
    let with_rows = |mut task: Option<QueryTile>| {
        while let Some(tile) = task
            && tile.is_empty(args)
        {
            // SAFETY: the queue holds zeros before the launch, as `args.scratch.queue` says.
            let queue = unsafe { queue::<BR>(args) };
            let place = queue.place(queue.ask());
            task = place.map(|place| schedule::query_tile(args, place, BR, row_bytes));
        }
        task
    };
    if Head::is_packed() {
        if opaque(thread::thread_idx_x()) == 0 {
            next_task.write(with_rows(Some(task)));
        }
        // Hazard: the task is read by threads that did not write it.
        thread::sync_threads();
        match next_task.read() {
            Some(first) => task = first,
            None => return,
        }
    }
    // Load Q, and the first tile of K and V.
    let start = |task: QueryTile| {
        let head = task.head(args);
        // SAFETY: the buffers have the shapes stated above, and the launch gives the shared memory.
        let (q, kv, q_smem) = unsafe {
            let kv = KvStages::<T, D, BC, THREADS, STAGES>::new(
                head.keys(&args.tensors.k).of_columns(Columns::of_keys()),
                head.keys(&args.tensors.v).of_columns(Columns::of_values()),
            );
            let q_smem = if q_in_registers {
                // Where the second tile of keys will go.
                kv.stage(1)
            } else {
                Shared::dynamic(
                    KvStages::<T, D, BC, THREADS, STAGES>::BYTES,
                    const { BR * D as u32 },
                )
            };
            let q = head.queries::<T>(&args.tensors.q).of_columns(Columns::of_keys());
            (q.anew(), kv, q_smem)
        };
        tile::load_async::<T, Swizzled<D>, D, BR, THREADS>(&q, task.first_row, q_smem);
        // SAFETY: the mask is empty or `[B, Nk]`.
        let policy = unsafe { Policy::new(args, head) };
        let first = policy.key_tiles(task.first_row, task.first_row + BR, BC).start;
        if in_turns {
            kv.start_keys(first, 0);
        } else {
            kv.start(first, 0);
        }
        async_copy::commit();
        (kv, q_smem)
    };
    let (mut kv, q_smem) = start(task);
    let shared = || SharedQueries::<T, Swizzled<D>>::new(q_smem, warp_row::<FRAGMENTS>());

    loop {
        let head = task.head(args);
        // SAFETY: the mask is empty or `[B, Nk]`.
        let policy = unsafe { Policy::new(args, head) };
        // Not kept from one task to the next, which takes registers.
        kv = kv.of_keys(head.seq_k);
        let mut state = WarpRows::<T, KEY_TILES, COLUMN_TILES, FRAGMENTS>::new(
            policy,
            task.first_row + warp_row::<FRAGMENTS>(),
        );
        // At least one, though no row may see it: the last one asks for the next task.
        let kv_tiles = policy.key_tiles(task.first_row, task.first_row + BR, BC);
        let kv_tiles = kv_tiles.start..kv_tiles.end.max(kv_tiles.start + 1);
        let queries = if q_in_registers {
            // Hazard: this thread's copies of Q may not have landed.
            async_copy::wait::<0>();
            // Hazard: Q is read by threads that did not copy it.
            thread::sync_threads();
            RegisterQueries::<FRAGMENTS, D_STEPS>::load(shared())
        } else {
            RegisterQueries::none()
        };

        let mut stage = 0;
        for kv_tile in kv_tiles.clone() {
            // Hazard: this thread's copies of the tile may not have landed.
            async_copy::wait::<0>();
            // Hazards: K and V (and Q) are read by threads that did not copy them; and the
            // other stage (in turns, V), which is overwritten next, may still be read for the
            // tile before (or Q in it).
            thread::sync_threads();
            let mut taken = NOT_ASKED;
            let is_last = kv_tile + 1 == kv_tiles.end;
            if in_turns {
                kv.start_values(kv_tile, 0);
            } else if !is_last {
                kv.start(kv_tile + 1, stage ^ 1);
            }
            if is_last && opaque(thread::thread_idx_x()) == 0 {
                // Asked for late: a block that asks early may keep a task that another block has
                // time for. The answer comes during the arithmetic on this tile.
                // SAFETY: the queue holds zeros before the launch, as `args.scratch.queue` says.
                taken = unsafe { queue::<BR>(args) }.ask();
            }
            async_copy::commit();
            // Opaque: the compiler would make two of all that follows, asked and not asked.
            let taken = opaque(taken);
            let (tiles, first_key) = (kv.tiles(stage), kv_tile * BC);
            let keys_are_read = || {
                if in_turns {
                    async_copy::wait::<0>();
                    // Hazards: V is read by threads that did not copy it; and K, which is
                    // overwritten next, may still be read for this tile.
                    thread::sync_threads();
                    if !is_last {
                        kv.start_keys(kv_tile + 1, 0);
                    }
                    async_copy::commit();
                }
            };
            if q_in_registers {
                state.attend::<Swizzled<D>, D>(queries, tiles, first_key, keys_are_read);
            } else {
                state.attend::<Swizzled<D>, D>(shared(), tiles, first_key, keys_are_read);
            }
            if taken != NOT_ASKED {
                // SAFETY: the queue holds zeros before the launch, as `args.scratch.queue` says.
                let place = unsafe { queue::<BR>(args) }.place(taken);
                let next = place.map(|place| schedule::query_tile(args, place, BR, row_bytes));
                // A barrier since this task began: all threads have read the overwritten words.
                next_task.write(with_rows(next));
            }
            stage ^= const { STAGES - 1 };
        }
        // Hazards: the next task is read by threads that did not write it; and Q and the last
        // tile, where its Q, K and V go, may still be read.
        thread::sync_threads();
        if let Some(next) = next_task.read() {
            (kv, _) = start(next);
        }

        // Normalise, store O and LSE.
        unroll!(for FRAGMENT in 0..2 {
            if FRAGMENT < FRAGMENTS {
                let first_row = state.first_row + FRAGMENT as u32 * fragment::ROWS;
                let (acc_o, rows) = (state.acc_o[FRAGMENT], &state.rows[FRAGMENT]);
                // SAFETY: the buffers have the shapes that `args` says.
                unsafe {
                    online::store::<T, Ampere, COLUMN_TILES>(args, &policy, first_row, acc_o, rows);
                }
            }
        });
        // Read again: kept, it would take registers, and the compiler make two of all above.
        match next_task.read() {
            Some(next) => task = next,
            None => break,
        }
    }
}

/// The queue of all blocks: each begins with a task.
///
/// # Safety
/// `args.scratch.queue` must hold zeros before the launch.
#[inline(always)]
unsafe fn queue<const BR: u32>(args: &AttentionArgs) -> Queue {
    let (tasks, blocks) = (Extent::anew(args, BR).tasks(), thread::grid_dim_x());
    // SAFETY: the queue holds zeros before the launch, as stated above.
    let words = unsafe { args.scratch.queue.view_mut() };
    Queue { words, index: 0, tasks, given: blocks, blocks }
}

/// The task that a block does next, in shared memory: thread 0 writes it, all threads read it.
#[derive(Clone, Copy)]
struct NextTask(Shared<u32>);

/// Words of a task: its fields in their order, padded to 16 bytes.
const TASK_WORDS: u32 = 4;
/// In place of `first_row`: there is no further task.
const END: u32 = u32::MAX;
/// In place of the queue's answer.
const NOT_ASKED: u32 = u32::MAX;

impl NextTask {
    /// That `byte_offset` bytes into dynamic shared memory.
    ///
    /// # Safety
    /// As for [`Shared::dynamic`].
    #[inline(always)]
    unsafe fn new(byte_offset: u32) -> Self {
        // SAFETY: the launch gives the words of a task, as stated above.
        Self(unsafe { Shared::dynamic(byte_offset, TASK_WORDS) })
    }

    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn write(&self, task: Option<QueryTile>) {
        let end = QueryTile { b: 0, h: 0, first_row: END };
        let QueryTile { b, h, first_row } = task.unwrap_or(end);
        self.0.write_as(0, [b, h, first_row, 0]);
    }

    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn read(&self) -> Option<QueryTile> {
        let words = self.0.read_as::<[u32; 4]>(0);
        let [b, h, first_row] = [words[0], words[1], words[2]].map(warp::uniform);
        (first_row != END).then_some(QueryTile { b, h, first_row })
    }
}

entries! {
    /// Instances of [`flash_pipelined`].
    pub static ENTRIES: AttentionArgs => "sm_80", threads shape(D).threads(), min_blocks shape(D).blocks();
    flash_pipelined: T in [f16, bf16], d D in [32, 64, 96, 128, 160, 192, 224, 256] = flash_pipelined::<
        T,
        D,
        { D / 16 },
        { D / 8 },
        { shape(D).fragments as usize },
        { shape(D).threads() },
        { shape(D).rows() },
        { shape(D).keys },
        { shape(D).keys as usize / 8 },
        { shape(D).stages },
    >;
}
