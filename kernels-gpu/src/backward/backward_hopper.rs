//! backward_hopper: the gradients on the tensor cores and copy engines of Hopper (sm_90a).
//!
//! The idea: a block keeps one tile of K and V while all tiles of Q and dO pass, so dK and dV stay in
//! registers. Scores are computed transposed, `Sᵀ = K Qᵀ`: a warpgroup then owns 64 keys, and its Pᵀ
//! and dSᵀ already lie in registers as the operands of dV and dK. Only dS passes through shared
//! memory, since dQ sums over the keys of both warpgroups.
//!
//! ```text
//! producer:   K, V; then for each tile of BR rows:  Q and LSE, dO and delta      (TMA, two stages)
//!
//! consumer:   start Sᵀ = K Qᵀ of the first tile
//!             for each tile:
//!                 start dPᵀ = V dOᵀ
//!                 wait for Sᵀ;  Pᵀ = exp2(Sᵀ - LSE)                  dPᵀ still runs
//!                 start dV += Pᵀ dO                                  at D 64 after both have met
//!                 wait for dPᵀ; dSᵀ = Pᵀ (dPᵀ - delta)               dV still runs
//!                 dSᵀ to shared memory; both consumers meet
//!                 start dQ = dS K; wait for dV; start dK += dSᵀ Q
//!                 wait for dQ; hand it over in shared memory         dK still runs
//!                 start Sᵀ of the next tile; wait for dK
//!             dK * scale, dV
//!
//! warps 1, 2: for each tile:  wait for a consumer's part of dQ; add it to memory (bulk reduction)
//! ```
//!
//! ```text
//!                  rows: BR per tile
//!              +------------------+
//! consumer 0   | Sᵀ, then Pᵀ      |   64 keys      dK, dV: 64 x D of each consumer
//! consumer 1   | and dSᵀ          |   64 keys      dQ: 64 x 64 of each, columns or rows
//!              +------------------+
//! ```
//!
//! | D | BR x BC | shared bytes | registers per thread of dK, dV, S, dP, P |
//! |---|---|---|---|
//! | 64 | 128 x 128 | 198,840 | 32, 32, 64, 64, 32 of 240 |
//! | 128 | 64 x 128 | 197,816 | 64, 64, 32, 32, 16 of 240 |
//! | above 128 | 64 x 64 | up to 205,912 | in `wide.rs`: consumers share keys, one has dV, the other dK; `queries.rs` has dQ |
//!
//! Where the time goes, by counting, for a tile at D = 128: five products of 64 x 128 x 128 take
//! 2560 clocks of the tensor cores. Their operands are 256 KB of shared memory, 2048 clocks at 128
//! bytes per clock; dS adds 16 KB, the copies 32 KB, dQ on its way to memory 64 KB. That makes 2944 clocks,
//! and still dQ goes that way: reductions from registers fill the queue of memory instructions, and a
//! consumer spent 21 % of its time behind them. The 8192 exponentials take 512 clocks, the other arithmetic about
//! as long.
//!
//! Whatever reads shared memory waits while products of 64 x 64 read all that it has to give. So LSE is read
//! as Sᵀ starts, delta before dPᵀ is waited for, and a thread keeps its number: to read a special register
//! takes the same queue.
//!
//! Up to D 128 blocks add to dQ in f32 in the order in which they come, so its last bits differ from run to run;
//! [`order`](super::order) fixes the order. The sums lie in memory in the order of registers: 16 bytes of
//! one thread, then 16 bytes of the next, so a warp adds 512 neighbouring bytes.
//! `convert` puts them in order.
//!
//! Measured (f16, 16k tokens, hidden 2048, prepare and convert included, one H200, bursts): at N 4096 605
//! TFLOP/s at D 128, 517 at D 64, causal 533 and 471, where cuDNN took 566, 460, 487 and 384, and
//! FlashAttention's CuTe kernel 642, 554, 559 and 498; at N 512 362 and 312, causal 228 and 199. At N 8192 483
//! at D 192 and 510 at D 256 (8 heads), where cuDNN took 374 and 382.
//!
//! Tried, and not faster: dQ by reductions from the consumers' registers (5 to 8 % slower at D 128); S of a
//! tile before dQ of the one before is handed over (10 % slower); dK behind dP of the next tile, with dSᵀ from
//! shared memory (causal 3 % faster, full 1 to 7 % slower); a quarter of the exponentials as polynomials (1 to 3 %
//! slower); dV after dS at D 128 too (2 % slower), or after dQ (5 %); at D 64 all exponentials before the wait for
//! dP, by a branch (3 to 5 % slower); dQ by a warpgroup of its own, so that consumers do not meet (D 64 full 7 %
//! faster, causal 3 % slower, D 128 5 to 7 %: 208 registers hold S or dP). `wide.rs` and `queries.rs` have their own.
//!
//! Limits: f16 and bf16; head dims up to 256, in tiles of 64, 128, 192 or 256 columns; strides and addresses in
//! multiples of 16 bytes (TMA's rule).
//!
//! Source: Shah et al., "FlashAttention-3", 2024, section 3.4 and appendix B.1 (backward pass with
//! warp specialisation).

use half::{bf16, f16};
use simt::{
    barrier, mbarrier,
    shared::Shared,
    thread, warp, warpgroup,
    wgmma::{CHUNK_ROW_BYTES, Operand},
};

use crate::{
    args::{BackwardArgs, Maps, WithMaps},
    entries,
    parts::{
        head::Head,
        pipeline::{Ring, Stages},
    },
};

mod consumer;
pub mod convert;
mod geometry;
mod producer;
pub mod queries;
mod rows;
mod sums;
mod tile;
mod tiles;
mod wide;

use consumer::Setting;
pub use geometry::{Geometry, Hopper};
use producer::produce;
use sums::add_parts;
use tiles::{CONSUMER_KEYS, STAGES, WARP_KEYS};
pub use tiles::{CONSUMERS, Tiles};

/// The tensor maps of q, k, v, d_o, minus_lse_log2 and delta, and the arguments of every backward kernel.
pub type HopperArgs = WithMaps<BackwardArgs, 6>;
type HopperMaps = Maps<6>;

/// Registers per thread of each warpgroup, the producer first.
const REGISTERS: [u32; 1 + CONSUMERS as usize] = [24, 240, 240];
const _: () = assert!(
    warpgroup::registers_suffice(&REGISTERS),
    "consumers would wait for registers that nobody gives back"
);

/// The named barriers of a block; 0 is the barrier of the whole block.
#[derive(Clone, Copy)]
enum NamedBarrier {
    /// dS is written.
    Consumers,
    /// P is written, where consumers share keys.
    WeightsFull,
    /// P has been read.
    WeightsEmpty,
    /// A consumer's part of dQ is written.
    DqFull(u32),
    /// A consumer's part of dQ has been read.
    DqEmpty(u32),
    /// The warps of a consumer have done with what its gradients pass through.
    Store(u32),
}

impl barrier::Named for NamedBarrier {
    #[inline(always)]
    fn id(self) -> u32 {
        match self {
            Self::Consumers => 1,
            Self::WeightsFull => 2,
            Self::WeightsEmpty => 3,
            Self::DqFull(consumer) => 4 + consumer,
            Self::DqEmpty(consumer) => 4 + CONSUMERS + consumer,
            Self::Store(consumer) => 4 + 2 * CONSUMERS + consumer,
        }
    }
}

/// The rings of a block, and the mbarriers of K and V.
#[derive(Clone, Copy)]
struct Rings {
    /// Q and LSE.
    q: Ring<Stages<STAGES>>,
    /// dO and delta.
    d_o: Ring<Stages<STAGES>>,
    /// K, copied once.
    k: mbarrier::Mbarrier,
    /// V, likewise.
    v: mbarrier::Mbarrier,
}

/// dK, dV, and dQ before it is scaled.
///
/// # Layout
/// `q, d_o: [B, H, Nq, D]`, `k, v, dk, dv: [B, Hkv, Nk, D]`, `minus_lse_log2, delta: [B, H, Nq']`,
/// `dq_acc: [B, H, Nq', dq_columns]`, each head in the order that [`convert`](convert::convert) reads. Maps of q, k,
/// v and d_o over dimensions `[D, N, H, B]` (of packed sequences as [`ragged`](crate::parts::ragged)
/// says), of minus_lse_log2 and delta over `[Nq', B H]`, boxes as [`Tiles::boxes`] says.
///
/// # Thread mapping
/// One block of [`Tiles::THREADS`] per tile of keys along x, and per head of K along y and z.
/// Warpgroup 0 is the producer.
///
/// # Shared memory
/// [`Tiles::shared_bytes`] of it, dynamic: K, V, the stages of Q and of dO, two buffers of dS, the
/// stages of LSE and of delta, the mbarriers, the block's place.
///
/// # Safety
/// `args` must be the parameter of the running entry, its buffers and maps must have these shapes,
/// the launch the threads and shared memory stated here, and [`prepare`](super::prepare) must have run.
#[inline(always)]
pub unsafe fn backward_hopper<T: Operand, G: Geometry>(args: &HopperArgs) {
    let tiles = const { G::TILES };
    // SAFETY: `args` is the parameter of the running entry, as stated above.
    let (maps, args) = unsafe { args.split() };

    // Who am I.
    let place = G::place();
    // SAFETY: the caller gives the shared memory, and the queue has its words.
    unsafe { place.draw(args) };
    if Head::of_kv_number(&args.forward, place.number()).is_none() {
        return;
    }
    let warpgroup = warpgroup::id();
    // SAFETY: the launch gives the shared memory stated above.
    let (smem, barriers) = unsafe {
        let barriers = Shared::<u64>::dynamic(tiles.barriers(), Tiles::BARRIERS);
        (Shared::<u8>::dynamic(0, 0).address(), barriers)
    };
    let of_ring = Ring::<Stages<STAGES>>::BARRIERS;
    let rings = Rings {
        q: Ring::new(barriers, 0),
        d_o: Ring::new(barriers, of_ring),
        k: mbarrier::Mbarrier::at(barriers, 2 * of_ring),
        v: mbarrier::Mbarrier::at(barriers, 2 * of_ring + 1),
    };
    if thread::thread_idx_x() == 0 {
        rings.q.init(CONSUMERS);
        rings.d_o.init(CONSUMERS);
        rings.k.init(1);
        rings.v.init(1);
        mbarrier::fence_init();
    }
    // Hazard: threads and copies that did not make the barriers use them.
    thread::sync_threads();

    if warpgroup == 0 {
        warpgroup::decrease_registers::<{ REGISTERS[0] }>();
        if thread::thread_idx_x() == 0 {
            // SAFETY: the maps and the buffers have the shapes stated above.
            unsafe { produce::<G>(args, maps, smem, rings) };
        }
        let warp = thread::thread_idx_x() / warp::LANES;
        if const { !G::TILES.is_wide() } && (1..=CONSUMERS).contains(&warp) {
            // SAFETY: the buffers have the shapes stated above, and the whole warp is here.
            unsafe { add_parts::<G>(args, smem, warp - 1) };
        }
        return;
    }

    warpgroup::increase_registers::<{ REGISTERS[1] }>();
    let own = warpgroup - 1;
    let own_keys = if const { G::TILES.is_wide() } { 0 } else { own * CONSUMER_KEYS };
    // From a shuffle, since ptxas would read a special register again at each use, and a consumer waits
    // for each such read.
    let thread = warp::shuffle_xor(thread::thread_idx_x(), 0);
    let warp_keys = own_keys + thread % warpgroup::THREADS / warp::LANES * WARP_KEYS;
    let setting = Setting::<T> {
        args,
        place,
        own,
        own_key: warp_keys + thread % warp::LANES / 4,
        thread,
        elected: thread % warpgroup::THREADS == 0,
        smem,
        // SAFETY: the launch gives the shared memory stated above.
        ds_buffers: unsafe {
            let first = tiles.ds() + warp_keys * CHUNK_ROW_BYTES;
            let bytes = tiles.score_buffers() * tiles.ds_bytes() - warp_keys * CHUNK_ROW_BYTES;
            Shared::dynamic(first, bytes / T::BYTES)
        },
        // SAFETY: the launch gives the shared memory stated above.
        minus_lse: unsafe { Shared::dynamic(tiles.lse(), STAGES * tiles.rows) },
        // SAFETY: the launch gives the shared memory stated above.
        delta: unsafe { Shared::dynamic(tiles.delta(), STAGES * tiles.rows) },
        rings,
    };
    // SAFETY: the whole warpgroup is here, the rings bring what is multiplied, and the buffers have
    // the shapes stated above.
    unsafe { G::consume(setting) };
}

entries! {
    /// Instances of [`backward_hopper()`] that add to dQ in the order in which blocks come.
    pub static ENTRIES: HopperArgs => "sm_90a", threads Tiles::THREADS, min_blocks 1;
    backward_hopper: T in [f16, bf16], d D in [64, 128, 192, 256] =
        backward_hopper::<T, Hopper<{ D as u32 }, { D as u32 }, false>>;
}

entries! {
    /// Instances of [`backward_hopper()`] that sum dQ in a fixed order.
    pub static ORDERED_ENTRIES: HopperArgs => "sm_90a", threads Tiles::THREADS, min_blocks 1;
    backward_hopper: T in [f16, bf16], d D in [64, 128], "_ordered" =
        backward_hopper::<T, Hopper<{ D as u32 }, { D as u32 }, true>>;
}

entries! {
    /// Instances of [`backward_hopper()`] for values of head dim 128.
    pub static VALUES_OF_128: HopperArgs => "sm_90a", threads Tiles::THREADS, min_blocks 1;
    backward_hopper: T in [f16, bf16], d D in [192], "_v128" =
        backward_hopper::<T, Hopper<{ D as u32 }, 128, false>>;
}
