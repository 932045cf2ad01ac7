//! The two products of attention on fragments: what a warp does with 16 rows of Q and P.
//!
//! A warp keeps 16 rows. Its scores are `[[f32; 4]; N]`: `N` products of 16 x 8, so 8 N keys; its
//! output is the same over the head's columns. [`simt::mma`] says which lane has what.
//!
//! ```text
//! S = Q Kᵀ   A: rows of Q as they stand           B: rows of K as they stand, since B is
//!                                                 wanted by columns, and K is transposed
//! O += P V   A: S, exponentiated and packed       B: V, transposed as it is loaded
//!               where it is, in registers
//! ```

use simt::{
    layout::{CHUNK, Layout},
    matrix,
    mma::TensorCore,
    scalar::Scalar,
    shared::Shared,
    unroll, warp,
};

/// Rows of a warp's tile.
pub const ROWS: u32 = 16;

/// This lane's first row and column in a fragment of C: rows `g` and `g + 8`, columns
/// `2 t` and `2 t + 1` of every 8.
#[inline(always)]
#[must_use]
pub fn row_and_column() -> (u32, u32) {
    let lane = warp::lane_id();
    (lane / 4, 2 * (lane % 4))
}

/// Where this lane's address points for a 16 x 16 block that begins at `row`, column 0: the
/// order of matrices in A, and in B when it is transposed as it is loaded.
#[inline(always)]
#[must_use]
pub fn a_origin<L: Layout>(row: u32) -> u32 {
    let lane = warp::lane_id();
    L::index(row + lane % 16, lane / 16 * CHUNK)
}

/// As [`a_origin`], for the order of matrices in B: two products side by side.
#[inline(always)]
#[must_use]
pub fn b_origin<L: Layout>(row: u32) -> u32 {
    let lane = warp::lane_id();
    L::index(row + lane % 8 + lane / 16 * 8, lane / 8 % 2 * CHUNK)
}

/// `S += Q Kᵀ` with Q and K in shared memory; `q` from [`a_origin`], `k` from [`b_origin`].
#[inline(always)]
pub fn add_scores<T: Scalar, C: TensorCore<T>, L: Layout, const D: usize, const N: usize>(
    s: &mut [[f32; 4]; N],
    (q_smem, q): (Shared<T>, u32),
    (k_smem, k): (Shared<T>, u32),
) {
    unroll!(for STEP in 0..8 {
        if STEP < D / 16 {
            let a = matrix::load_x4(q_smem, L::right(q, STEP as u32 * 16));
            unroll!(for PAIR in 0..8 {
                if PAIR < N / 2 {
                    let below = L::down(k, PAIR as u32 * 16);
                    let b = matrix::load_x4(k_smem, L::right(below, STEP as u32 * 16));
                    C::multiply(&mut s[2 * PAIR], a, [b[0], b[1]]);
                    C::multiply(&mut s[2 * PAIR + 1], a, [b[2], b[3]]);
                }
            });
        }
    });
}

/// `O += P V` over `d` columns, with V in shared memory; `v` from [`a_origin`].
#[inline(always)]
pub fn add_output<T: Scalar, C: TensorCore<T>, L: Layout, const N: usize, const O: usize>(
    acc_o: &mut [[f32; 4]; O],
    d: usize,
    p: &[[f32; 4]; N],
    (v_smem, v): (Shared<T>, u32),
) {
    unroll!(for STEP in 0..8 {
        if STEP < N / 2 {
            let a = pack_a::<T, C>(p[2 * STEP], p[2 * STEP + 1]);
            unroll!(for PAIR in 0..16 {
                if PAIR < d / 16 {
                    let below = L::down(v, STEP as u32 * 16);
                    let right = L::right(below, PAIR as u32 * 16);
                    let b = matrix::load_x4_transposed(v_smem, right);
                    C::multiply(&mut acc_o[2 * PAIR], a, [b[0], b[1]]);
                    C::multiply(&mut acc_o[2 * PAIR + 1], a, [b[2], b[3]]);
                }
            });
        }
    });
}

/// Two neighbouring C as one A.
#[inline(always)]
#[must_use]
pub fn pack_a<T: Scalar, C: TensorCore<T>>(left: [f32; 4], right: [f32; 4]) -> [u32; 4] {
    [
        C::pack(left[0], left[1]),
        C::pack(left[2], left[3]),
        C::pack(right[0], right[1]),
        C::pack(right[2], right[3]),
    ]
}

/// Multiplies row `g` by `alpha[0]` and row `g + 8` by `alpha[1]`.
#[inline(always)]
pub fn scale_rows<const N: usize>(c: &mut [[f32; 4]; N], alpha: [f32; 2]) {
    unroll!(for TILE in 0..32 {
        if TILE < N {
            c[TILE][0] *= alpha[0];
            c[TILE][1] *= alpha[0];
            c[TILE][2] *= alpha[1];
            c[TILE][3] *= alpha[1];
        }
    });
}
