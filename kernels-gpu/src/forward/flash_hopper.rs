//! flash_hopper: attention on the tensor cores and copy engines of Hopper (sm_90a).
//!
//! The idea: three kinds of hardware work at the same time, and nobody waits for what
//! can be fetched ahead. A producer warpgroup does nothing but start bulk copies; two or
//! three consumer warpgroups multiply with wgmma, which runs beside the threads; and
//! while the tensor cores compute the scores of the next tile and the output of this
//! one, the threads do this one's softmax.
//!
//! ```text
//! producer:   for each task from a queue: Q, then for each tile of BC keys, last to first:
//!             K, V                                     (TMA, rings of stages)
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
//!              keys: BC per tile                row of a consumer: 16 warp + lane / 4 (+ 8)
//!            +-----------------+
//! consumer 0 | S, then P:      |   64 rows      S, P and O stay in registers: a thread has
//! consumer 1 |   64 x BC each  |   64 rows      two rows, and of each every fourth pair
//! (2         |                 |   64 rows)     of columns
//!            +-----------------+
//! ```
//!
//! | D | BR x BC | consumers | shared bytes | registers of O, S, P per thread |
//! |---|---|---|---|---|
//! | 64 | 192 x 128 | 3 | 205,216 | 32, 64, 32 of 160 |
//! | 64 | 128 x 128 | 2 | 180,544 | 32, 64, 32 of 232 |
//! | 80 | 192 x 112 | 3 | 213,200 | 40, 56, 28 of 160 |
//! | 80 | 128 x 128 | 2 | 229,632 | 40, 64, 32 of 232 |
//! | 96 | 192 x 112 | 3 | 213,200 | 48, 56, 28 of 160 |
//! | 96 | 128 x 128 | 2 | 229,632 | 48, 64, 32 of 232 |
//! | 128 | 128 x 128 | 2 | 229,632 | 64, 64, 32 of 232 |
//! | 192, values of 128 | 128 x 128 | 2 | 229,536 | 64, 64, 32 of 232 |
//! | 192 | 128 x 96 | 2 | 229,536 | 96, 48, 24 of 232 |
//! | 256 | 128 x 64 | 2 | 229,536 | 128, 32, 16 of 232 |
//!
//! Where the time goes, by counting: a tile costs 4 BR BC D FLOP and brings 4 BC D bytes
//! from L2, BR FLOP per byte. A multiprocessor's tensor cores do 4096 FLOP per clock, so that
//! at D = 128 a tile of 128 x 128 keeps them busy for 2048 clocks; its 16,384 exponentials
//! take 1024 clocks at 16 per clock, and the other arithmetic of the softmax about 4
//! instructions per element, 512 clocks at 128 per clock. At D = 64 the products take half
//! as long and the softmax the same: there the exponentials alone fill the tensor
//! cores' time; a third consumer gives them more to overlap with ([`Tiles::best`]). At D = 80 and 96 it
//! needs tiles of 112 keys, to leave O its registers, and still takes an eighth less time than two.
//!
//! The threads' part stays small:
//! - the scale and the maximum go into one fma before exp2;
//! - O is rescaled only when some row's maximum has grown by more than 2^8 since the last
//!   time (its weights are then at most 256, which f16 holds as exactly as 1);
//! - only tiles that the diagonal or the last key cuts are masked, and they come first;
//! - dropout's rescaling is part of the last division;
//! - O goes through shared memory, from where the copy engine stores it.
//!
//! The tensor cores stay busy between tiles and tasks:
//! - two consumers start their products in turn, so that one's softmax runs beside the
//!   other's products;
//! - the last product of a task comes with the first of the next; where there is room for one
//!   stage of Q only, each consumer gives its Q back with its last scores, and stores O beside the
//!   first of the next;
//! - blocks stay and take tasks from queues (`queue.rs`, `schedule.rs`), the short ones last;
//!   neighbours share heads; they ask for the next one as late as its copies allow;
//! - a consumer that has no rows in a task, or sees nothing of a tile, lets it pass.
//!
//! Rows past Nq, keys past Nk and columns past D are zeros that the copy engine supplies; such keys
//! are masked, such rows and columns not stored. Results do not depend on timing: bit for bit the same
//! every run.
//!
//! Measured: 0.109 ms at N 2048, D 64 (f16, batch 4, 12 heads), where flash_pipelined took
//! 0.156; at 16k tokens, hidden 2048, N 16,384: 726 TFLOP/s at D 128, 580 at D 64, 810 at D 256
//! (one H100 80GB HBM3); three consumers at N 16,384, D 80: 3.45 ms, two 3.91; back to back
//! 3.86 and 4.38 (one H200). Asking for the next K before P is packed: 2 to 7 % at D 64, up to 1.5 at
//! D 128. Limits: f16 and bf16; a positive scale; strides and addresses in
//! multiples of 16 bytes (TMA's rule); tiles of one head only.
//!
//! Source: Shah et al., "FlashAttention-3", 2024, sections 3.1 (roles, turns of two
//! consumers) and 3.2 (softmax beside products); the rescaling rule as in
//! "FlashAttention-4".

use half::{bf16, f16};
use simt::{
    mbarrier,
    shared::Shared,
    thread, warp, warpgroup,
    wgmma::{CHUNK_ROW_BYTES, Descriptor, Operand},
};

use crate::{
    args::{AttentionArgs, Maps, WithMaps},
    entries,
    parts::pipeline::{Ring, Stage},
};

mod consumer;
mod geometry;
mod online;
mod output;
mod producer;
mod products;
mod queue;
mod score_tile;
mod task;
mod tiles;
mod turn;

use consumer::Consumer;
use geometry::OutputTile;
pub use geometry::{Geometry, Hopper};
use producer::produce;
use score_tile::{ROWS, ScoreTile};
use task::{Inbox, Rings, TASK_WORDS, Task};
pub use tiles::{CONSUMER_ROWS, Tiles, max_consumers};
use tiles::{OUTPUT_ROWS, tile_bytes};

/// The tensor maps of q, k, v and o, and what every attention kernel is given.
pub type HopperArgs = WithMaps<AttentionArgs, 4>;
type HopperMaps = Maps<4>;

/// Registers of a thread of each warpgroup, the producer's first: with two consumers, and with
/// three.
const OF_TWO: [u32; 3] = [40, 232, 232];
const OF_THREE: [u32; 4] = [32, 160, 160, 160];
const _: () = assert!(
    warpgroup::registers_suffice(&OF_TWO) && warpgroup::registers_suffice(&OF_THREE),
    "consumers would wait for registers that nobody gives back"
);

/// Flash attention forward by warp specialisation.
///
/// # Layout
/// `q: [B, H, Nq, D]`, `k: [B, H, Nk, D]`, `v: [B, H, Nk, Dv]`, `o: [B, H, Nq, Dv]`,
/// `lse: [B, H, Nq]`; maps of q, k, v and o, in this order, over dimensions `[D, N, H, B]` or
/// `[Dv, N, H, B]`, boxes as [`Tiles::boxes`] says. D and Dv are at most the tiles' head dims.
/// Of packed sequences as [`ragged::map`](crate::parts::ragged::map) says, boxes with a further extent of 1.
///
/// # Thread mapping
/// At most as many blocks along x as there are tasks, `B * H * ceil(Nq / BR)`, which they share;
/// at best one per multiprocessor. [`Tiles::threads`] each. Warpgroup 0 is the producer.
///
/// # Shared memory
/// [`Tiles::shared_bytes`] of it, dynamic: Q, the stages of K, the stages of V, what O is stored
/// from, the mbarriers, the tasks.
///
/// # Safety
/// `args` must be the parameter of the running entry, its buffers and maps must have these
/// shapes, and the launch the threads and shared memory stated here.
#[inline(always)]
pub unsafe fn flash_hopper<T: Operand, G: Geometry>(args: &HopperArgs) {
    let tiles = const { G::TILES };
    const {
        let most = max_consumers(G::TILES.d);
        assert!(2 <= G::CONSUMERS && G::CONSUMERS <= most, "registers suffice");
    }

    // SAFETY: `args` is the parameter of the running entry, as stated above.
    let (maps, args) = unsafe { args.split() };

    // Who am I.
    let warpgroup = warpgroup::id();
    // SAFETY: the launch gives the shared memory stated above.
    let (smem, barriers, slots) = unsafe {
        let barriers = Shared::<u64>::dynamic(tiles.barriers(), tiles.num_barriers());
        let slots = Shared::<u32>::dynamic(tiles.tasks(), tiles.task_words());
        (Shared::<u8>::dynamic(0, 0).address(), barriers, slots)
    };
    let rings = Rings::<G> {
        k: Ring::new(barriers, 0),
        v: Ring::new(barriers, Ring::<G::KvStages>::BARRIERS),
        q: barriers
            .slice(2 * Ring::<G::KvStages>::BARRIERS, G::CONSUMERS * Ring::<G::QStages>::BARRIERS),
        tasks: slots,
    };
    if thread::thread_idx_x() == 0 {
        rings.k.init(G::CONSUMERS);
        rings.v.init(G::CONSUMERS);
        for consumer in 0..G::CONSUMERS {
            rings.of(consumer).ring.init(const { warpgroup::THREADS / warp::LANES });
        }
        mbarrier::fence_init();
    }
    // Hazard: the barriers are used by threads, and by copies, that did not make them.
    thread::sync_threads();

    if warpgroup == 0 {
        if G::CONSUMERS == 3 {
            warpgroup::decrease_registers::<{ OF_THREE[0] }>();
        } else {
            warpgroup::decrease_registers::<{ OF_TWO[0] }>();
        }
        if thread::thread_idx_x() == 0 {
            // SAFETY: the maps and the buffers have the shapes stated above.
            unsafe { produce(args, maps, smem, rings) };
        }
        return;
    }

    if G::CONSUMERS == 3 {
        warpgroup::increase_registers::<{ OF_THREE[1] }>();
    } else {
        warpgroup::increase_registers::<{ OF_TWO[1] }>();
    }
    let own_rows = (warpgroup - 1) * CONSUMER_ROWS;
    let warp_rows = own_rows + warpgroup::thread_id() / warp::LANES * OUTPUT_ROWS;
    let mut consumer = Consumer::<T, G> {
        args,
        maps,
        own_rows,
        own_row: warp_rows + warp::lane_id() / 4,
        column: warp::lane_id() % 4 * 2,
        elected: warpgroup::thread_id() == 0,
        // SAFETY: the launch gives the shared memory stated above.
        output: unsafe {
            let bytes = const { G::TILES.output_bytes() };
            let first = tiles.outputs() + warp_rows / OUTPUT_ROWS * bytes;
            Shared::dynamic(first, bytes / T::BYTES)
        },
        q: Descriptor::k_major(
            smem + (warpgroup - 1) * const { tile_bytes(CONSUMER_ROWS, G::TILES.d) },
        ),
        k: Descriptor::k_major(smem + tiles.k()),
        v: Descriptor::n_major(smem + tiles.v(), tiles.keys * CHUNK_ROW_BYTES),
        inbox: rings.of(warpgroup - 1),
        k_ring: rings.k,
        v_ring: rings.v,
        q_stage: Stage::FIRST,
        k_stage: Stage::FIRST,
        k_is_there: false,
        v_stage: Stage::FIRST,
        m_i: [f32::NEG_INFINITY; ROWS],
        l_i: [0.0; ROWS],
        s: ScoreTile::zero(),
        p: G::NO_WEIGHTS,
        acc_o: OutputTile::zero(),
        element: core::marker::PhantomData,
    };
    // SAFETY: the whole warpgroup is here, the rings bring what is multiplied, and the buffers
    // have the shapes stated above.
    unsafe { consumer.work() };
}

entries! {
    /// Instances of [`flash_hopper`] with three consumers, for launches without padding and dropout.
    pub static THREE_CONSUMERS: HopperArgs => "sm_90a", threads Tiles::of(64, 3).threads(), min_blocks 1;
    flash_hopper: T in [f16, bf16], d D in [64, 80, 96], "_x3" = flash_hopper::<T, Hopper<{ D as u32 }, { D as u32 }, 3>>;
}
entries! {
    /// Instances of [`flash_hopper`] with two consumers.
    pub static TWO_CONSUMERS: HopperArgs => "sm_90a", threads Tiles::of(64, 2).threads(), min_blocks 1;
    flash_hopper: T in [f16, bf16], d D in [64, 80, 96, 128, 192, 256] =
        flash_hopper::<T, Hopper<{ D as u32 }, { D as u32 }, 2>>;
}
entries! {
    /// Instances of [`flash_hopper`] for values of head dim 128, with two consumers.
    pub static VALUES_OF_128: HopperArgs => "sm_90a", threads Tiles::of(64, 2).threads(), min_blocks 1;
    flash_hopper: T in [f16, bf16], d D in [192], "_v128" =
        flash_hopper::<T, Hopper<{ D as u32 }, 128, 2>>;
}
