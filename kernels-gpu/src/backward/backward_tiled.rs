//! backward_tiled: P computed again from the LSE, one tile at a time; no N x N matrix.
//!
//! The idea: one tile each of P and dS lives in shared memory, as long as the sums need it. dK and dV of
//! a tile of keys are sums over all rows, dQ of a tile of rows is a sum over all keys: one kernel
//! keeps keys and lets rows pass, another keeps rows and lets keys pass. Each sum belongs to one
//! thread, so the kernel needs no atomics, and each run gives the same bits.
//!
//! ```text
//! keys:    keep K, V                                 queries: keep Q, dO
//!          for each head of the group:                        for each tile of keys:
//!            for each tile of rows that sees a key:             load K, V
//!              load Q, dO                                       S = Q Kᵀ; dP = dO Vᵀ
//!              S = Q Kᵀ; dP = dO Vᵀ                             P = exp2(S - LSE)
//!              P = exp2(S - LSE)                                dS = P ∘ (dP - delta)
//!              dS = P ∘ (dP - delta)                            dQ += dS K
//!              dV += Pᵀ dO; dK += dSᵀ Q
//! ```
//!
//! Change from backward_naive: no matrix in global memory; S and dP are computed twice, so there are
//! seven products instead of five.
//!
//! Memory: four tiles of 32 x D and two of 32 x 32, in f32 with padded rows: 76,800 bytes at
//! D = 128. A row of Q and dO is read once per 32 keys.
//!
//! Measured: not measured yet. Limits: scalar arithmetic; loads and arithmetic take turns.
//!
//! Source: Dao et al., "FlashAttention", 2022, algorithm 4; the split in two kernels is that of
//! Tillet, "Fused Attention" (a tutorial of Triton), 2022.

use half::{bf16, f16};
use simt::{
    scalar::Scalar,
    shared::Shared,
    thread, unroll,
    warp::{self, FULL_MASK},
};

use crate::{
    args::BackwardArgs,
    entries,
    parts::{
        columns::Columns,
        gradient::{self, Row},
        head::Head,
        policy::Policy,
        scalar_tile::{
            self, COLUMN_STEP, COLUMN_THREADS, EMPTY, MAX_GROUPS, OWN_COLUMNS, OWN_ROWS, ROWS,
            THREADS, pitch,
        },
        softmax::SPAN,
    },
};

/// Query rows of a tile.
pub const BR: u32 = ROWS;
/// Keys of a tile.
pub const BC: u32 = ROWS;

const _: () = assert!(super::ROW_PADDING % BR == 0, "rows past the last are padded ones");

/// Dynamic shared memory of a block in bytes: Q, dO, K, V, P and dS.
#[must_use]
pub const fn shared_bytes(d: usize) -> u32 {
    (4 * scalar_tile::len(d) + 2 * scalar_tile::len(BC as usize)) * size_of::<f32>() as u32
}

/// The tiles of a block.
#[derive(Clone, Copy)]
struct Tiles {
    q: Shared<f32>,
    d_o: Shared<f32>,
    k: Shared<f32>,
    v: Shared<f32>,
    /// P, and scores before.
    p: Shared<f32>,
    /// dS, and dP before.
    ds: Shared<f32>,
}

impl Tiles {
    /// # Safety
    /// The launch must give [`shared_bytes`].
    #[inline(always)]
    unsafe fn new<const D: usize>() -> Self {
        let (rows, square) = (scalar_tile::len(D), scalar_tile::len(BC as usize));
        // SAFETY: the launch gives the shared memory, as stated above.
        let all = unsafe { Shared::<f32>::dynamic(0, 4 * rows + 2 * square) };
        Self {
            q: all.slice(0, rows),
            d_o: all.slice(rows, rows),
            k: all.slice(2 * rows, rows),
            v: all.slice(3 * rows, rows),
            p: all.slice(4 * rows, square),
            ds: all.slice(4 * rows + square, square),
        }
    }

    /// Loads a tile of Q and dO.
    ///
    /// # Safety
    /// The tensors of `args` must have the shapes that it says.
    #[inline(always)]
    unsafe fn load_rows<T: Scalar, const D: usize>(
        &self,
        args: &BackwardArgs,
        head: Head,
        first_row: u32,
    ) {
        // Not a loop over the two: an argument whose address varies is copied to local memory.
        let (q, d_o) = (&args.forward.tensors.q, &args.gradients.d_o);
        // SAFETY: Q and dO are `[B, H, Nq, D]`.
        unsafe {
            let (first, seq) = (first_row, head.seq_q);
            scalar_tile::load::<T, D>(q, Columns::of_keys(), head.query(q, 0), first, seq, self.q);
            scalar_tile::load::<T, D>(
                d_o,
                Columns::of_values(),
                head.query(d_o, 0),
                first,
                seq,
                self.d_o,
            );
        }
    }

    /// Loads a tile of K and V.
    ///
    /// # Safety
    /// The tensors of `args` must have the shapes that it says.
    #[inline(always)]
    unsafe fn load_keys<T: Scalar, const D: usize>(
        &self,
        args: &BackwardArgs,
        head: Head,
        first_key: u32,
    ) {
        let (k, v) = (&args.forward.tensors.k, &args.forward.tensors.v);
        // SAFETY: K and V are `[B, Hkv, Nk, D]`.
        unsafe {
            let (first, seq) = (first_key, head.seq_k);
            scalar_tile::load::<T, D>(k, Columns::of_keys(), head.key(k, 0), first, seq, self.k);
            scalar_tile::load::<T, D>(v, Columns::of_values(), head.key(v, 0), first, seq, self.v);
        }
    }

    /// P after dropout and dS of the tile of these rows and keys, each thread its own.
    ///
    /// # Safety
    /// As for [`keys`].
    #[inline(always)]
    unsafe fn gradients<T: Scalar, const D: usize>(
        &self,
        args: &BackwardArgs,
        head: Head,
        (first_row, first_key): (u32, u32),
    ) {
        let (ty, tx) = scalar_tile::place();
        let s = scalar_tile::product::<D>(self.q, self.k, (ty, tx));
        let dp = scalar_tile::product::<D>(self.d_o, self.v, (ty, tx));
        let index = |r: usize, column: usize| {
            let row = ty * OWN_ROWS as u32 + r as u32;
            row * pitch(BC as usize) + tx + column as u32 * COLUMN_THREADS
        };
        unroll!(for R in 0..2 {
            unroll!(for COLUMN in 0..4 {
                self.p.write(index(R, COLUMN), s[R][COLUMN]);
                self.ds.write(index(R, COLUMN), dp[R][COLUMN]);
            });
        });
        // SAFETY: the buffers have the shapes that `args` says.
        let policy = unsafe { Policy::new(&args.forward, head) };
        // Not unrolled, over the entries that this thread has just written: each may take ten rounds
        // of Philox.
        for entry in 0..OWN_ROWS * OWN_COLUMNS {
            let (r, column) = (entry / OWN_COLUMNS, entry % OWN_COLUMNS);
            let i = first_row + ty * OWN_ROWS as u32 + r as u32;
            let j = first_key + tx + column as u32 * COLUMN_THREADS;
            // SAFETY: the row is a padded one: tiles divide the padding.
            let row = unsafe { Row::read(args, head, i) };
            let at = index(r, column);
            let products = (self.p.read(at), self.ds.read(at));
            let scale = args.forward.scores.scale;
            // Rows past the last see keys by their position: their weights are 0 by their LSE.
            let (p, ds) = gradient::of_score::<T>(&policy, scale, row, (i, j), products);
            self.p.write(at, p);
            self.ds.write(at, ds);
        }
    }
}

/// dK and dV of a tile of keys.
///
/// # Layout
/// `q, d_o: [B, H, Nq, D]`, `k, v, dk, dv: [B, Hkv, Nk, D]`.
///
/// # Thread mapping
/// One block per tile of BC keys (`x`) and head of K over the batch (`y`, `z`); its threads as in
/// [`scalar_tile`].
///
/// # Shared memory
/// [`shared_bytes`], dynamic.
///
/// # Safety
/// The buffers of `args` must have these shapes, the launch the threads and shared memory stated here,
/// and [`prepare`](super::prepare) must have run.
#[inline(always)]
pub unsafe fn keys<T: Scalar, const D: usize>(args: &BackwardArgs) {
    const { assert!(D % COLUMN_STEP == 0 && D % SPAN == 0 && D <= COLUMN_STEP * MAX_GROUPS) };
    let Some(of_keys) = Head::of_kv_block_yz(&args.forward) else { return };
    let number = Head::number_of_block();
    let first_key = thread::block_idx_x() * BC;
    if of_keys.keys_end_before(first_key) {
        return;
    }
    let (ty, tx) = scalar_tile::place();
    // SAFETY: the launch gives the shared memory.
    let tiles = unsafe { Tiles::new::<D>() };
    // SAFETY: the buffers have the shapes stated above.
    unsafe { tiles.load_keys::<T, D>(args, of_keys, first_key) };

    let (mut dk, mut dv) = (EMPTY, EMPTY);
    for member in 0..Head::group() {
        let head = Head::of_group(&args.forward, number, member);
        // SAFETY: the buffers have the shapes stated above.
        let policy = unsafe { Policy::new(&args.forward, head) };
        for tile in policy.query_tiles(first_key, first_key + BC, BR) {
            let first_row = tile * BR;
            // Hazard: the tile before may still be read while this one is written.
            thread::sync_threads();
            // SAFETY: the buffers have the shapes stated above.
            unsafe { tiles.load_rows::<T, D>(args, head, first_row) };
            // Hazard: tiles are read by threads that did not write them (K and V too, at first).
            thread::sync_threads();
            // SAFETY: the buffers have the shapes stated for `keys`, and the barrier above has made
            // the tiles there.
            unsafe { tiles.gradients::<T, D>(args, head, (first_row, first_key)) };
            // Hazard: columns of P and dS are read by threads that did not write them.
            thread::sync_threads();

            // dV += Pᵀ dO; dK += dSᵀ Q.
            for i in 0..BR {
                let own = i * pitch(BC as usize) + ty * OWN_ROWS as u32;
                let p = tiles.p.read_as::<[u32; OWN_ROWS]>(own).map(f32::from_bits);
                let ds = tiles.ds.read_as::<[u32; OWN_ROWS]>(own).map(f32::from_bits);
                scalar_tile::add_row::<D>(&mut dv, p, tiles.d_o, i, tx);
                scalar_tile::add_row::<D>(&mut dk, ds, tiles.q, i, tx);
            }
        }
    }

    let (scale, seq) = (args.forward.scores.scale, of_keys.seq_k);
    let (to_k, to_v) = (&args.gradients.dk, &args.gradients.dv);
    // SAFETY: dK and dV are `[B, Hkv, Nk, D]`; this block alone has these rows.
    unsafe {
        let rows = (of_keys.key(to_k, 0), first_key, seq);
        scalar_tile::store::<T, D>(&dk, scale, to_k, Columns::of_keys(), rows);
        let rows = (of_keys.key(to_v, 0), first_key, seq);
        scalar_tile::store::<T, D>(&dv, 1.0, to_v, Columns::of_values(), rows);
    }
}

/// dQ of a tile of rows.
///
/// # Layout
/// `q, d_o, dq: [B, H, Nq, D]`, `k, v: [B, Hkv, Nk, D]`.
///
/// # Thread mapping
/// One block per tile of BR rows (`x`) and head over the batch (`y`, `z`); its threads as in [`scalar_tile`].
///
/// # Shared memory
/// [`shared_bytes`], dynamic.
///
/// # Safety
/// As for [`keys`].
#[inline(always)]
pub unsafe fn queries<T: Scalar, const D: usize>(args: &BackwardArgs) {
    const { assert!(D % COLUMN_STEP == 0 && D % SPAN == 0 && D <= COLUMN_STEP * MAX_GROUPS) };
    let Some(head) = Head::of_block_yz(&args.forward) else { return };
    let first_row = thread::block_idx_x() * BR;
    if head.ends_before(first_row) {
        return;
    }
    let (ty, tx) = scalar_tile::place();
    // SAFETY: the launch gives the shared memory; the buffers have the shapes stated above.
    let (tiles, policy) = unsafe { (Tiles::new::<D>(), Policy::new(&args.forward, head)) };
    // SAFETY: the buffers have the shapes stated above.
    unsafe { tiles.load_rows::<T, D>(args, head, first_row) };

    let mut dq = EMPTY;
    for tile in policy.key_tiles(first_row, first_row + BR, BC) {
        let first_key = tile * BC;
        // Hazard: the tile before may still be read while this one is written.
        thread::sync_threads();
        // SAFETY: the buffers have the shapes stated above.
        unsafe { tiles.load_keys::<T, D>(args, head, first_key) };
        // Hazard: tiles are read by threads that did not write them (Q and dO too, at first).
        thread::sync_threads();
        // SAFETY: the buffers have the shapes stated for `keys`, and the barrier above has made the
        // tiles there.
        unsafe { tiles.gradients::<T, D>(args, head, (first_row, first_key)) };
        // Hazard: a row of dS is read by the eight threads that wrote it together. They are in one
        // warp, so that the block need not wait.
        warp::sync_warp(FULL_MASK);

        // dQ += dS K.
        for j in 0..BC {
            let own = |r: u32| tiles.ds.read((ty * OWN_ROWS as u32 + r) * pitch(BC as usize) + j);
            scalar_tile::add_row::<D>(&mut dq, [own(0), own(1)], tiles.k, j, tx);
        }
    }

    let (scale, tensor) = (args.forward.scores.scale, &args.gradients.dq);
    let rows = (head.query(tensor, 0), first_row, head.seq_q);
    // SAFETY: dQ is `[B, H, Nq, D]`; this block alone has these rows.
    unsafe { scalar_tile::store::<T, D>(&dq, scale, tensor, Columns::of_keys(), rows) };
}

entries! {
    /// Instances of [`keys`].
    pub static KEYS: BackwardArgs => "sm_75", threads THREADS, min_blocks 1;
    backward_tiled_keys: T in [f32, f16, bf16], d D in [32, 64, 96, 128] = keys::<T, D>;
}
entries! {
    /// Instances of [`queries`].
    pub static QUERIES: BackwardArgs => "sm_75", threads THREADS, min_blocks 1;
    backward_tiled_queries: T in [f32, f16, bf16], d D in [32, 64, 96, 128] = queries::<T, D>;
}
