//! flash_hopper: attention on the tensor cores and copy engines of Hopper (sm_90a).
//!
//! The idea: three kinds of hardware work at the same time, and nobody waits for what
//! can be fetched ahead. A producer warpgroup does nothing but start bulk copies; two or
//! three consumer warpgroups multiply with wgmma, which runs beside the threads; and
//! while the tensor cores compute the scores of the next tile and the output of this
//! one, the threads do this one's softmax.
//!
//! ```text
//! producer:   for each task from the queue: Q, then for each tile of BC keys, last to
//!             first: K, V                              (TMA, rings of stages)
//!
//! consumer:   S = Q Kᵀ of the first tile; P = softmax(S)
//!             for each further tile:
//!                 start S = Q Kᵀ           of this tile
//!                 start O += P V           of the tile before
//!                 wait for S; m, l, P' = softmax(S)        O += P V still runs
//!                 wait for O; O *= alpha, if m moved; P = P'
//!             O += P V; O / l, LSE = m + log(l)
//! ```
//!
//! ```text
//!              keys: BC a tile                  row of a consumer: 16 warp + lane / 4 (+ 8)
//!            +-----------------+
//! consumer 0 | S, then P:      |   64 rows      S, P and O stay in registers: a thread has
//! consumer 1 |   64 x BC each  |   64 rows      two rows, and of each every fourth pair
//! (2         |                 |   64 rows)     of columns
//!            +-----------------+
//! ```
//!
//! | D | BR x BC | consumers | shared bytes | registers of O, S, P a thread |
//! |---|---|---|---|---|
//! | 64 | 192 x 128 | 3 | 205,056 | 32, 64, 32 of 160 |
//! | 64 | 128 x 128 | 2 | 180,448 | 32, 64, 32 of 232 |
//! | 96 | 128 x 128 | 2 | 229,536 | 48, 64, 32 of 232 |
//! | 128 | 128 x 128 | 2 | 229,536 | 64, 64, 32 of 232 |
//! | 192 | 128 x 96 | 2 | 229,488 | 96, 48, 24 of 232 |
//! | 256 | 128 x 64 | 2 | 229,488 | 128, 32, 16 of 232 |
//!
//! Where the time goes, by counting: a tile costs 4 BR BC D FLOP and brings 4 BC D bytes
//! from L2, BR FLOP a byte. A multiprocessor's tensor cores do 4096 FLOP a clock, so that
//! at D = 128 a tile of 128 x 128 keeps them busy for 2048 clocks; its 16,384 exponentials
//! take 1024 clocks at 16 a clock, and the other arithmetic of the softmax about 4
//! instructions an element, 512 clocks at 128 a clock. At D = 64 the products take half
//! as long and the softmax the same: there the exponentials alone fill the tensor
//! cores' time; a third consumer gives them more to overlap with ([`Tiles::best`]).
//!
//! What keeps the threads' part small:
//! - the scale and the maximum go into one fma before exp2;
//! - O is rescaled only when some row's maximum has grown by more than 2^8 since the last
//!   time (its weights are then at most 256, which f16 holds as exactly as 1);
//! - only tiles that the diagonal or the last key cuts are masked, and they come first;
//! - dropout's rescaling is part of the last division;
//! - O goes through shared memory, from where the copy engine stores it.
//!
//! What keeps the tensor cores busy between tiles and tasks:
//! - two consumers start their products in turn, so that one's softmax runs beside the
//!   other's products; and the last product of a task comes with the first of the next;
//! - blocks stay and take tasks from a queue, the short ones of a section of heads last
//!   (`schedule.rs`); they ask for the next one as late as its copies allow;
//! - a consumer that has no rows in a task, or sees nothing of a tile, lets it pass.
//!
//! Rows past Nq and keys past Nk are zeros that the copy engine supplies; such keys are
//! masked, such rows not stored. Results do not depend on timing: bit for bit the same
//! every run.
//!
//! Measured: 0.109 ms at N 2048, D 64 (f16, batch 4, 12 heads), where flash_pipelined took
//! 0.156; at 16k tokens, hidden 2048, N 16,384: 707 TFLOP/s at D 128, 587 at D 64, 810 at D 256
//! (one H100 80GB HBM3). Limits: f16 and bf16; a positive scale; strides and addresses in
//! multiples of 16 bytes (TMA's rule); tiles of one head only.
//!
//! Source: Shah et al., "FlashAttention-3", 2024, sections 3.1 (roles, turns of two
//! consumers) and 3.2 (softmax beside products); the rescaling rule as in
//! "FlashAttention-4".

use half::{bf16, f16};
use simt::{
    atomic,
    compiler::opaque,
    mbarrier::{self, Mbarrier},
    shared::Shared,
    thread, tma, warp, warpgroup,
    wgmma::{
        Accumulator, CHUNK_COLUMNS, CHUNK_ROW_BYTES, Descriptor, Operand, RegisterProduct,
        SharedProduct,
    },
};

use crate::{
    args::AttentionArgs,
    entries,
    pipeline::{Ring, Stage},
    policy::{self, Causal, Full, General, Policy},
    schedule,
};

mod consumer;
mod output;
mod tiles;
mod turn;

use consumer::{Consumer, ROWS};
pub use tiles::{CONSUMER_ROWS, Tiles, max_consumers};
use tiles::{OUTPUT_ROWS, output_bytes, tile_bytes};

/// A tile of query rows of one head: where it is, and what it sees.
#[derive(Clone, Copy)]
struct Task {
    b: u32,
    h: u32,
    first_row: u32,
    num_kv_tiles: u32,
}

impl Task {
    /// How many there are.
    #[inline(always)]
    fn count<const BR: u32>(args: &AttentionArgs) -> u32 {
        // Opaque: computed where it is used, since the producer is short of registers.
        opaque(args.batch) * args.heads * opaque(args.seq_q).div_ceil(BR)
    }

    /// The task at a place in the order of work, if there is one.
    ///
    /// # Safety
    /// `args.mask` must be empty or hold `[B, Nk]` bytes.
    #[inline(always)]
    unsafe fn at<P: Policy, const D: u32, const BR: u32, const BC: u32>(
        args: &AttentionArgs,
        place: u32,
    ) -> Option<Self> {
        if place >= Self::count::<BR>(args) {
            return None;
        }
        let (heads, num_q_tiles) = (args.batch * args.heads, opaque(args.seq_q).div_ceil(BR));
        let causal = P::is_causal(args);
        let work = if causal || !args.seq_q.is_multiple_of(BR) {
            // Tasks of different lengths: the short ones of a section come last.
            let heads_together = schedule::section(num_q_tiles, heads, thread::grid_dim_x());
            schedule::in_sections(place, num_q_tiles, heads, heads_together, causal)
        } else {
            schedule::in_order(place, num_q_tiles)
        };
        let first_row = work.q_tile * BR;
        let (b, h) = schedule::divide(work.head, args.heads);
        // SAFETY: the caller vouches for the mask.
        let policy = unsafe { P::new(args, b, h) };
        let num_kv_tiles = policy::end_of_tile(&policy, first_row + BR, args.seq_q).div_ceil(BC);
        Some(Self { b, h, first_row, num_kv_tiles })
    }
}

/// Flash attention forward by warp specialisation.
///
/// # Layout
/// `q, o: [B, H, Nq, D]`, `k, v: [B, H, Nk, D]`, `lse: [B, H, Nq]`; `tensor_maps`: those of
/// q, k, v and o, over dimensions `[D, N, H, B]`, boxes as [`Tiles::boxes`] says.
///
/// # Thread mapping
/// At most as many blocks along x as there are tasks, `B * H * ceil(Nq / BR)`, which they share;
/// at best one a multiprocessor. [`Tiles::threads`] each. Warpgroup 0 is the producer.
///
/// # Shared memory
/// [`Tiles::shared_bytes`] of it, dynamic: Q, the stages of K, those of V, what O is stored
/// from, the mbarriers, the tasks.
///
/// # Safety
/// The buffers and maps of `args` must have these shapes, and the launch the threads and
/// shared memory stated here.
#[inline(always)]
pub unsafe fn flash_hopper<
    T: Operand,
    P: Policy,
    const D: u32,
    const CONSUMERS: u32,
    const BR: u32,
    const BC: u32,
    const Q_STAGES: u32,
    const STAGES: u32,
    const K_CHUNK: u32,
    const S_GROUPS: usize,
    const O_GROUPS: usize,
    const D_STEPS: usize,
    const KEY_STEPS: usize,
    const TURNS: bool,
>(
    args: &AttentionArgs,
) where
    Accumulator<S_GROUPS>: SharedProduct<D_STEPS>,
    Accumulator<O_GROUPS>: RegisterProduct<KEY_STEPS>,
{
    let tiles = const { Tiles::of(D, CONSUMERS) };
    const {
        let tiles = Tiles::of(D, CONSUMERS);
        assert!(2 <= CONSUMERS && CONSUMERS <= max_consumers::<P>(D), "registers suffice");
        assert!(BR == tiles.rows() && BC == tiles.keys && K_CHUNK == BC * CHUNK_ROW_BYTES);
        assert!(Q_STAGES == tiles.q_stages && STAGES == tiles.kv_stages);
        assert!(S_GROUPS as u32 * 8 == BC && O_GROUPS as u32 * 8 == D);
        assert!(D_STEPS as u32 * 16 == D && KEY_STEPS as u32 * 16 == BC);
    }

    // Who am I.
    let warpgroup = warpgroup::id();
    // SAFETY: the caller gives the shared memory.
    let (smem, barriers, slots) = unsafe {
        let barriers = Shared::<u64>::dynamic(tiles.barriers(), tiles.num_barriers());
        let slots = Shared::<u32>::dynamic(tiles.tasks(), tiles.task_words());
        (Shared::<u8>::dynamic(0, 0).address(), barriers, slots)
    };
    let rings = Rings::<Q_STAGES, STAGES> {
        q: Ring::new(barriers, 0),
        k: Ring::new(barriers, Ring::<Q_STAGES>::BARRIERS),
        v: Ring::new(barriers, Ring::<Q_STAGES>::BARRIERS + Ring::<STAGES>::BARRIERS),
        tasks: slots,
    };
    if thread::thread_idx_x() == 0 {
        rings.q.init(CONSUMERS * const { warpgroup::THREADS / warp::LANES });
        rings.k.init(CONSUMERS);
        rings.v.init(CONSUMERS);
        mbarrier::fence_init();
    }
    // Hazard: the barriers are used by threads, and by copies, that did not make them.
    thread::sync_threads();

    if warpgroup == 0 {
        if CONSUMERS == 3 {
            warpgroup::decrease_registers::<32>();
        } else {
            warpgroup::decrease_registers::<40>();
        }
        if thread::thread_idx_x() == 0 {
            // SAFETY: the caller vouches for the tensor maps and the queue.
            unsafe { produce::<P, D, CONSUMERS, BR, BC, Q_STAGES, STAGES>(args, smem, rings) };
        }
        return;
    }

    if CONSUMERS == 3 {
        warpgroup::increase_registers::<160>();
    } else {
        warpgroup::increase_registers::<232>();
    }
    let own_rows = (warpgroup - 1) * CONSUMER_ROWS;
    let warp_rows = own_rows + warpgroup::thread_id() / warp::LANES * OUTPUT_ROWS;
    let first_task = (warpgroup - 1) * const { Q_STAGES * TASK_WORDS };
    let mut consumer =
        Consumer::<T, P, Q_STAGES, STAGES, S_GROUPS, O_GROUPS, KEY_STEPS, K_CHUNK, TURNS> {
            args,
            own_rows,
            own_row: warp_rows + warp::lane_id() / 4,
            column: warp::lane_id() % 4 * 2,
            elected: warpgroup::thread_id() == 0,
            // SAFETY: the caller gives the shared memory.
            output: unsafe {
                let bytes = const { output_bytes(D) };
                let first = tiles.outputs() + warp_rows / OUTPUT_ROWS * bytes;
                Shared::dynamic(first, bytes / T::BYTES)
            },
            q: Descriptor::k_major(smem + (warpgroup - 1) * const { tile_bytes(CONSUMER_ROWS, D) }),
            k: Descriptor::k_major(smem + tiles.k()),
            v: Descriptor::n_major(smem + tiles.v(), K_CHUNK),
            q_bytes: const { tile_bytes(BR, D) },
            tile_bytes: const { tile_bytes(BC, D) },
            rings: Rings { tasks: rings.tasks.slice(first_task, Q_STAGES * TASK_WORDS), ..rings },
            q_stage: Stage::FIRST,
            k_stage: Stage::FIRST,
            v_stage: Stage::FIRST,
            m_i: [f32::NEG_INFINITY; ROWS],
            l_i: [0.0; ROWS],
            s: Accumulator::zero(),
            p: [[0; 4]; KEY_STEPS],
            acc_o: Accumulator::zero(),
            types: core::marker::PhantomData,
        };
    // SAFETY: the whole warpgroup is here, the rings bring what is multiplied, and the caller
    // vouches for the buffers.
    unsafe { consumer.work::<D_STEPS>() };
}

/// What goes between producer and consumers: a ring of Q with the task that it belongs to,
/// and rings of tiles of K and V.
#[derive(Clone, Copy)]
struct Rings<const Q_STAGES: u32, const STAGES: u32> {
    q: Ring<Q_STAGES>,
    k: Ring<STAGES>,
    v: Ring<STAGES>,
    /// [`TASK_WORDS`] for each stage of Q, announced with it; the producer sees those of every
    /// consumer, one after the other.
    tasks: Shared<u32>,
}

/// A task in shared memory: its fields in their order.
const TASK_WORDS: u32 = 4;
/// In place of `num_kv_tiles`: there is no further task.
const END: u32 = u32::MAX;

impl<const Q_STAGES: u32, const STAGES: u32> Rings<Q_STAGES, STAGES> {
    /// Producer: waits for a free stage of Q, and announces a task (or that there is none) and
    /// so many bytes of Q. Returns the barrier that they count at.
    #[inline(always)]
    fn announce<const CONSUMERS: u32>(
        &self,
        stage: Stage<Q_STAGES>,
        task: Option<Task>,
        bytes: u32,
    ) -> Mbarrier {
        self.q.wait_empty(stage);
        let end = Task { b: 0, h: 0, first_row: 0, num_kv_tiles: END };
        let Task { b, h, first_row, num_kv_tiles } = task.unwrap_or(end);
        for consumer in 0..CONSUMERS {
            let first = (consumer * Q_STAGES + stage.index()) * TASK_WORDS;
            self.tasks.write(first, b);
            self.tasks.write(first + 1, h);
            self.tasks.write(first + 2, first_row);
            self.tasks.write(first + 3, num_kv_tiles);
        }
        // Hazard: consumers read the task; announcing comes after the writes.
        self.q.announce(stage, bytes)
    }

    /// Consumer: waits for Q and its task; `None` when there is no further one.
    #[inline(always)]
    fn receive(&self, stage: Stage<Q_STAGES>) -> Option<Task> {
        self.q.wait(stage);
        let first = stage.index() * TASK_WORDS;
        let word = |index: u32| warp::uniform(self.tasks.read(first + index));
        let task = Task { b: word(0), h: word(1), first_row: word(2), num_kv_tiles: word(3) };
        (task.num_kv_tiles != END).then_some(task)
    }
}

/// The producer: one thread that takes tasks and starts every copy of the block, as far ahead
/// as the rings have room.
///
/// # Safety
/// As for [`flash_hopper`].
#[inline(always)]
unsafe fn produce<
    P: Policy,
    const D: u32,
    const CONSUMERS: u32,
    const BR: u32,
    const BC: u32,
    const Q_STAGES: u32,
    const STAGES: u32,
>(
    args: &AttentionArgs,
    smem: u32,
    rings: Rings<Q_STAGES, STAGES>,
) {
    let tiles = const { Tiles::of(D, CONSUMERS) };
    // SAFETY: the caller vouches for the queue.
    let queue = unsafe { args.queue.view_mut::<u32>() };
    for index in 0..4 {
        // SAFETY: the caller vouches for the maps.
        unsafe { tma::prefetch_map(args.tensor_map(index)) };
    }
    // All chunks of a tile: rows from `row` on.
    let copy = |task: Task, destination: u32, map: u64, rows: u32, row: u32, full: Mbarrier| {
        for chunk in 0..D.div_ceil(CHUNK_COLUMNS) {
            let to = destination + chunk * rows * CHUNK_ROW_BYTES;
            let from = [chunk * CHUNK_COLUMNS, row, task.h, task.b];
            // SAFETY: the caller vouches for the maps; the ring keeps readers away.
            unsafe { tma::load_4d(to, map, from, full) };
        }
    };
    let copy_q = |stage: Stage<Q_STAGES>, task: Task| {
        // Consumers past the last row have no Q, and none has without keys.
        let rows = if task.num_kv_tiles > 0 { args.seq_q - task.first_row } else { 0 };
        let consumers = rows.div_ceil(CONSUMER_ROWS).min(CONSUMERS);
        let q_bytes = consumers * const { tile_bytes(CONSUMER_ROWS, D) };
        let full = rings.announce::<CONSUMERS>(stage, Some(task), q_bytes);
        for consumer in 0..consumers {
            let to = smem
                + stage.index() * const { tile_bytes(BR, D) }
                + consumer * const { tile_bytes(CONSUMER_ROWS, D) };
            let row = task.first_row + consumer * CONSUMER_ROWS;
            copy(task, to, args.tensor_map(0), CONSUMER_ROWS, row, full);
        }
    };
    let copy_keys = |ring: Ring<STAGES>, to: u32, map: u64, stage: Stage<STAGES>, task, tile| {
        let to = to + stage.index() * const { tile_bytes(BC, D) };
        let full = ring.acquire(stage, const { tile_bytes(BC, D) });
        copy(task, smem + to, map, BC, tile * BC, full);
    };
    let copy_k =
        |stage, task, tile| copy_keys(rings.k, tiles.k(), args.tensor_map(1), stage, task, tile);
    let copy_v =
        |stage, task, tile| copy_keys(rings.v, tiles.v(), args.tensor_map(2), stage, task, tile);
    // Stages of Q, and of K; V, which is needed and has its stage free a tile later, is one
    // behind.
    let (mut q_stage, mut stage) = (Stage::FIRST, Stage::FIRST);
    // The task before, whose last V is still to come.
    let mut before: Option<Task> = None;
    // A block's first task is that of its number; the others are for whoever is free.
    let mut place = thread::block_idx_x();
    // SAFETY: the caller vouches for the mask.
    while let Some(task) = unsafe { Task::at::<P, D, BR, BC>(args, place) } {
        // Asked for late: whoever asks early may keep a task that another block has time for.
        // Before the last tile, so that the answer is there after it.
        // Each task asks once: at the last one the queue is at 0 again.
        let next = || {
            let last_place = Task::count::<BR>(args) - 1;
            thread::grid_dim_x() + atomic::increment_global_u32(queue, 0, last_place)
        };
        if task.num_kv_tiles <= 1 {
            place = next();
        }
        // One stage of Q is free only when all else of the task before is under way.
        if Q_STAGES > 1 && task.num_kv_tiles > 0 {
            copy_q(q_stage, task);
        }
        if task.num_kv_tiles > 0 {
            copy_k(stage, task, task.num_kv_tiles - 1);
        }
        if let Some(before) = before.take() {
            copy_v(stage.before(), before, 0);
        }
        if Q_STAGES == 1 || task.num_kv_tiles == 0 {
            copy_q(q_stage, task);
        }
        q_stage.advance();
        if task.num_kv_tiles > 0 {
            stage.advance();
            for tile in (1..task.num_kv_tiles).rev() {
                if tile == 1 {
                    place = next();
                }
                copy_k(stage, task, tile - 1);
                copy_v(stage.before(), task, tile);
                stage.advance();
            }
            before = Some(task);
        }
    }
    if let Some(before) = before {
        copy_v(stage.before(), before, 0);
    }
    rings.announce::<CONSUMERS>(q_stage, None, 0);
}

/// The kernel for a type, policy, head dim and number of consumers.
macro_rules! kernel {
    ($type:ty, $policy:ty, $d:literal, $consumers:literal) => {
        flash_hopper::<
            $type,
            $policy,
            $d,
            $consumers,
            { Tiles::of($d, $consumers).rows() },
            { Tiles::of($d, $consumers).keys },
            { Tiles::of($d, $consumers).q_stages },
            { Tiles::of($d, $consumers).kv_stages },
            { Tiles::of($d, $consumers).keys * CHUNK_ROW_BYTES },
            { Tiles::of($d, $consumers).keys as usize / 8 },
            { $d / 8 },
            { $d / 16 },
            { Tiles::of($d, $consumers).keys as usize / 16 },
            { $consumers == 2 && !<$policy>::GENERAL },
        >
    };
}

entries! {
    /// Instances of [`flash_hopper`] with three consumers.
    pub static THREE_CONSUMERS: AttentionArgs => "sm_90a", threads Tiles::of(64, 3).threads(), min_blocks 1;
    flash_hopper_f16_d64_full_x3 = kernel!(f16, Full, 64, 3);
    flash_hopper_f16_d64_causal_x3 = kernel!(f16, Causal, 64, 3);
    flash_hopper_bf16_d64_full_x3 = kernel!(bf16, Full, 64, 3);
    flash_hopper_bf16_d64_causal_x3 = kernel!(bf16, Causal, 64, 3);
}
entries! {
    /// Instances of [`flash_hopper`] with two consumers.
    pub static TWO_CONSUMERS: AttentionArgs => "sm_90a", threads Tiles::of(64, 2).threads(), min_blocks 1;
    flash_hopper_f16_d64_full = kernel!(f16, Full, 64, 2);
    flash_hopper_f16_d64_causal = kernel!(f16, Causal, 64, 2);
    flash_hopper_f16_d64_general = kernel!(f16, General, 64, 2);
    flash_hopper_f16_d96_full = kernel!(f16, Full, 96, 2);
    flash_hopper_f16_d96_causal = kernel!(f16, Causal, 96, 2);
    flash_hopper_f16_d96_general = kernel!(f16, General, 96, 2);
    flash_hopper_f16_d128_full = kernel!(f16, Full, 128, 2);
    flash_hopper_f16_d128_causal = kernel!(f16, Causal, 128, 2);
    flash_hopper_f16_d128_general = kernel!(f16, General, 128, 2);
    flash_hopper_f16_d192_full = kernel!(f16, Full, 192, 2);
    flash_hopper_f16_d192_causal = kernel!(f16, Causal, 192, 2);
    flash_hopper_f16_d192_general = kernel!(f16, General, 192, 2);
    flash_hopper_f16_d256_full = kernel!(f16, Full, 256, 2);
    flash_hopper_f16_d256_causal = kernel!(f16, Causal, 256, 2);
    flash_hopper_f16_d256_general = kernel!(f16, General, 256, 2);
    flash_hopper_bf16_d64_full = kernel!(bf16, Full, 64, 2);
    flash_hopper_bf16_d64_causal = kernel!(bf16, Causal, 64, 2);
    flash_hopper_bf16_d64_general = kernel!(bf16, General, 64, 2);
    flash_hopper_bf16_d96_full = kernel!(bf16, Full, 96, 2);
    flash_hopper_bf16_d96_causal = kernel!(bf16, Causal, 96, 2);
    flash_hopper_bf16_d96_general = kernel!(bf16, General, 96, 2);
    flash_hopper_bf16_d128_full = kernel!(bf16, Full, 128, 2);
    flash_hopper_bf16_d128_causal = kernel!(bf16, Causal, 128, 2);
    flash_hopper_bf16_d128_general = kernel!(bf16, General, 128, 2);
    flash_hopper_bf16_d192_full = kernel!(bf16, Full, 192, 2);
    flash_hopper_bf16_d192_causal = kernel!(bf16, Causal, 192, 2);
    flash_hopper_bf16_d192_general = kernel!(bf16, General, 192, 2);
    flash_hopper_bf16_d256_full = kernel!(bf16, Full, 256, 2);
    flash_hopper_bf16_d256_causal = kernel!(bf16, Causal, 256, 2);
    flash_hopper_bf16_d256_general = kernel!(bf16, General, 256, 2);
}
