//! flash_tiled: tiles in shared memory and the online softmax.
//!
//! The idea: never write the N x N matrix. A block keeps BR query rows and walks over
//! the keys in tiles of BC; scores live in registers, and a running maximum and sum
//! let the softmax be finished at the end. One kernel instead of three.
//!
//! ```text
//! load Q                                   BR x D, once
//! m = -inf, l = 0, acc_o = 0
//! for each tile of BC keys:
//!     load K, V                            BC x D each
//!     S = Q Kᵀ                             BR x BC, in registers
//!     m_new = max(m, rowmax(S)); alpha = exp2(m - m_new)
//!     P = exp2(S - m_new); l = l * alpha + rowsum(P)
//!     acc_o = acc_o * alpha + P V
//! O = acc_o / l; LSE = m + log(l)
//! ```
//!
//! ```text
//!            BC keys                 thread (ty, tx), 16 x 8 of them:
//!         +-----------+              rows  2 ty, 2 ty + 1
//! BR rows | S: 2 x 4  |              keys  tx, tx + 8, tx + 16, tx + 24
//!         | a thread  |              of O  4 columns of every 32, from 4 tx on
//!         +-----------+
//! ```
//!
//! Memory: Q, K and V tiles as f32, rows padded by 4 elements so that 8 rows start in 8
//! different groups of 4 banks; P as f32. D = 64: 30,720 bytes, D = 128: 55,296. A key
//! tile is read once per BR rows, so traffic falls by BR over naive; memory beyond
//! inputs and outputs is nothing at all.
//!
//! Measured: 4.09 ms, before scores were summed in spans (H100; f16, batch 4, 12 heads, N 2048,
//! D 64). Limits: arithmetic is scalar fma, at most a sixteenth of what the tensor cores do;
//! loads and arithmetic take turns.
//!
//! Source: Dao et al., "FlashAttention", 2022, algorithm 1; the loop order (queries
//! outside, keys inside) is that of "FlashAttention-2", 2023, section 3.1.

use half::{bf16, f16};
use simt::{
    math,
    scalar::Scalar,
    shared::Shared,
    thread, unroll,
    warp::{self, FULL_MASK},
};

use crate::{
    args::AttentionArgs,
    entries,
    parts::{
        columns::Columns,
        head::Head,
        policy::Policy,
        scalar_tile::{
            self, COLUMN_STEP, COLUMN_THREADS, MAX_GROUPS, OWN_COLUMNS, OWN_ROWS, VECTOR, pitch,
            read_vector,
        },
        softmax::{self, SPAN},
    },
};

pub use crate::parts::scalar_tile::THREADS;

/// Query rows of a tile.
pub const BR: u32 = scalar_tile::ROWS;
/// Keys of a tile.
pub const BC: u32 = scalar_tile::ROWS;

const _: () = assert!(warp::LANES % COLUMN_THREADS == 0, "a row's threads are in one warp");

/// Dynamic shared memory of a block in bytes: Q, K, V and P.
#[must_use]
pub const fn shared_bytes(d: usize) -> u32 {
    ((BR + 2 * BC) * pitch(d) + BR * pitch(BC as usize)) * size_of::<f32>() as u32
}

/// Flash attention forward with scalar arithmetic.
///
/// # Layout
/// `q, o: [B, H, Nq, D]`, `k, v: [B, H, Nk, D]`, `lse: [B, H, Nq]`.
///
/// # Thread mapping
/// A block per tile of BR rows, head and batch entry, along `x`; within it as in the file's
/// header.
///
/// # Shared memory
/// [`shared_bytes`] of it, dynamic.
///
/// # Safety
/// The buffers of `args` must have these shapes, and the launch the threads and shared
/// memory stated here.
#[inline(always)]
pub unsafe fn flash_tiled<T: Scalar, const D: usize>(args: &AttentionArgs) {
    const { assert!(D % COLUMN_STEP == 0 && D % SPAN == 0 && D <= COLUMN_STEP * MAX_GROUPS) };

    // Who am I.
    let (ty, tx) = scalar_tile::place();
    let (head, q_tile) = Head::of_block(args, args.shape.seq_q.div_ceil(BR));
    let first_row = q_tile * BR;
    if head.ends_before(first_row) {
        return;
    }
    // SAFETY: the buffers have the shapes stated above, and the launch gives the shared memory.
    let (policy, q_smem, k_smem, v_smem, p_smem) = unsafe {
        let (q_len, kv_len) = (BR * pitch(D), BC * pitch(D));
        let bytes = size_of::<f32>() as u32;
        (
            Policy::new(args, head),
            Shared::<f32>::dynamic(0, q_len),
            Shared::<f32>::dynamic(q_len * bytes, kv_len),
            Shared::<f32>::dynamic((q_len + kv_len) * bytes, kv_len),
            Shared::<f32>::dynamic((q_len + 2 * kv_len) * bytes, BR * pitch(BC as usize)),
        )
    };

    // Load Q.
    // SAFETY: `q` is `[B, H, Nq, D]`.
    unsafe {
        scalar_tile::load::<T, D>(
            &args.tensors.q,
            Columns::of_keys(),
            head.query(&args.tensors.q, 0),
            first_row,
            head.seq_q,
            q_smem,
        )
    };

    let mut m_i = [f32::NEG_INFINITY; OWN_ROWS];
    let mut l_i = [0.0f32; OWN_ROWS];
    let mut acc_o = scalar_tile::EMPTY;

    for tile in policy.key_tiles(first_row, first_row + BR, BC) {
        let first_key = tile * BC;
        // Hazard: the tile before may still be read while this one is written.
        thread::sync_threads();
        // SAFETY: the buffers have the shapes that `args` says.
        unsafe {
            scalar_tile::load::<T, D>(
                &args.tensors.k,
                Columns::of_keys(),
                head.key(&args.tensors.k, 0),
                first_key,
                head.seq_k,
                k_smem,
            );
            scalar_tile::load::<T, D>(
                &args.tensors.v,
                Columns::of_values(),
                head.key(&args.tensors.v, 0),
                first_key,
                head.seq_k,
                v_smem,
            );
        }
        // Hazard: tiles are read by threads that did not write them (Q too, at first).
        thread::sync_threads();

        // S = Q Kᵀ [OWN_ROWS, OWN_COLUMNS] of this thread.
        let mut s = scalar_tile::product::<D>(q_smem, k_smem, (ty, tx));

        // Shape and mask.
        unroll!(for R in 0..2 {
            let i = first_row + ty * OWN_ROWS as u32 + R as u32;
            unroll!(for KEY in 0..4 {
                let j = first_key + tx + KEY as u32 * COLUMN_THREADS;
                s[R][KEY] = if policy.sees(i, j) {
                    policy.shape_score::<T>(s[R][KEY], args.scores.scale, i, j)
                } else {
                    f32::NEG_INFINITY
                };
            });
        });

        // Online softmax: P replaces S, acc_o and l_i are rescaled.
        unroll!(for R in 0..2 {
            let row = ty * OWN_ROWS as u32 + R as u32;
            let tile_max = s[R].iter().fold(f32::NEG_INFINITY, |m, &x| math::max(m, x));
            let tile_max = warp::reduce_max::<COLUMN_THREADS>(tile_max) * policy.scale_log2();
            let m_new = math::max(m_i[R], tile_max);
            let m_used = softmax::safe_max(m_new);
            let alpha = math::exp2(m_i[R] - m_used);
            m_i[R] = m_new;
            let mut row_sum = 0.0;
            unroll!(for KEY in 0..4 {
                let column = tx + KEY as u32 * COLUMN_THREADS;
                // One rounding for the scale and the difference.
                let p = math::exp2(math::fma(s[R][KEY], policy.scale_log2(), -m_used));
                row_sum += p;
                p_smem.write(row * pitch(BC as usize) + column, p);
            });
            l_i[R] = math::fma(l_i[R], alpha, row_sum);
            unroll!(for GROUP in 0..4 {
                acc_o[R][GROUP] = acc_o[R][GROUP].map(|x| x * alpha);
            });
        });
        if Policy::drops() {
            // Each thread goes over the entries of P that it has just written itself.
            for entry in 0..(OWN_ROWS * OWN_COLUMNS) as u32 {
                let row = ty * OWN_ROWS as u32 + entry / OWN_COLUMNS as u32;
                let column = tx + entry % OWN_COLUMNS as u32 * COLUMN_THREADS;
                let index = row * pitch(BC as usize) + column;
                let (i, j) = (first_row + row, first_key + column);
                p_smem.write(index, policy.kept(i, j, p_smem.read(index)));
            }
        }
        // Hazard: a row of P is read by the eight threads that wrote it together. They
        // are in one warp, so that the block need not wait.
        warp::sync_warp(FULL_MASK);

        // O += P V.
        for j in (0..BC).step_by(VECTOR) {
            let p_reg: [[f32; VECTOR]; OWN_ROWS] = core::array::from_fn(|r| {
                read_vector(p_smem, (ty * OWN_ROWS as u32 + r as u32) * pitch(BC as usize) + j)
            });
            unroll!(for JJ in 0..4 {
                let weights = [p_reg[0][JJ], p_reg[1][JJ]];
                scalar_tile::add_row::<D>(&mut acc_o, weights, v_smem, j + JJ as u32, tx);
            });
        }
    }

    // Normalise, store O and LSE.
    // SAFETY: the buffers have the shapes that `args` says.
    let (o, lse) =
        unsafe { (args.tensors.o.buffer.view_mut::<T>(), args.tensors.lse.view_mut::<f32>()) };
    unroll!(for R in 0..2 {
        // Each thread summed its own keys: the row's sum is over its eight threads.
        let l_row = warp::reduce_add::<COLUMN_THREADS>(l_i[R]);
        let i = first_row + ty * OWN_ROWS as u32 + R as u32;
        if i < head.seq_q {
            let l_row = softmax::checked_fused_sum(m_i[R], l_row, || policy.sees_any(i));
            let (m_row, l_row, factor) = policy.with_sink(m_i[R], l_row);
            let normaliser = softmax::normaliser(l_row) * factor;
            let o_row = head.query(&args.tensors.o, i);
            unroll!(for GROUP in 0..4 {
                let column = GROUP as u32 * COLUMN_STEP as u32 + tx * VECTOR as u32;
                if GROUP < D / COLUMN_STEP && Columns::of_values().has(column) {
                    for e in 0..VECTOR {
                        let value = T::from_f32(acc_o[R][GROUP][e] * normaliser);
                        o.write(o_row + (column + e as u32) as u64, value);
                    }
                }
            });
            if tx == 0 {
                lse.write(head.row(i), softmax::log_sum_exp(m_row, l_row));
            }
        }
    });
}

entries! {
    /// Instances of [`flash_tiled`].
    pub static ENTRIES: AttentionArgs => "sm_75", threads THREADS, min_blocks 1;
    flash_tiled: T in [f32, f16, bf16], d D in [32, 64, 96, 128] = flash_tiled::<T, D>;
}
