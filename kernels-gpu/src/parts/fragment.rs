//! The two products of attention on fragments: the work of a warp on its rows of Q and P.
//!
//! A fragment is 16 rows. Its scores are `[[f32; 4]; N]`: `N` products of 16 x 8, so 8 N keys;
//! its output is the same over the head's columns. [`simt::mma`] says which lane has what.
//! A warp keeps `F` fragments: each loaded fragment of K and V serves all of them.
//!
//! ```text
//! S = Q Kᵀ   A: rows of Q as they stand           B: rows of K as they stand, since B is
//!                                                 wanted by columns, and K is transposed
//! O += P V   A: S, exponentiated and packed       B: V, transposed as it is loaded
//!               where it is, in registers
//! ```
//!
//! Rows count in elements of 16 bits, rows of f32 too: 32 bytes of a row are a step of
//! the product over it. With 4-byte elements a matrix load brings one per register, which is
//! where the product of f32 wants it.
//!
//! What depends on the lane alone (its rows, its addresses) is computed where it is asked
//! for, a few instructions each time: the compiler would keep it in registers of the loop
//! over tiles, which has none to spare.

use core::marker::PhantomData;

use simt::{
    compiler::opaque,
    layout::{CHUNK, TileLayout},
    matrix,
    memory::Memory,
    mma::{Multiply, TensorCore},
    scalar::Scalar,
    shared::Shared,
    unroll, warp,
};

/// Rows of a fragment.
pub const ROWS: u32 = 16;

/// This lane's first row and column in a fragment of C: rows `g` and `g + 8`, columns
/// `2 t` and `2 t + 1` of every 8.
#[inline(always)]
#[must_use]
pub fn row_and_column() -> (u32, u32) {
    let lane = opaque(warp::lane_id());
    (lane / 4, 2 * (lane % 4))
}

/// Where this lane's address points for a 16 x 16 block that begins at `row`, column 0: the
/// order of matrices in A, and in B when it is transposed as it is loaded.
#[inline(always)]
#[must_use]
pub fn a_origin<L: TileLayout>(row: u32) -> u32 {
    let lane = opaque(warp::lane_id());
    L::index(row + lane % 16, lane / 16 * CHUNK)
}

/// As [`a_origin`], for the order of matrices in B: two products side by side. (The same
/// matrices in the order of A would do; but the two registers of a B must be neighbours,
/// and the compiler would move them.)
#[inline(always)]
#[must_use]
pub fn b_origin<L: TileLayout>(row: u32) -> u32 {
    let lane = opaque(warp::lane_id());
    L::index(row + lane % 8 + lane / 16 * 8, lane / 8 % 2 * CHUNK)
}

/// Rows of Q as the operand A.
pub trait Queries<const F: usize>: Copy {
    /// Columns `16 step` to `16 step + 16` of each fragment.
    fn step(&self, step: usize) -> [[u32; 4]; F];
}

/// Q in shared memory, loaded again for each tile of keys.
pub struct SharedQueries<T, L> {
    tile: Shared<T>,
    origin: u32,
    layout: PhantomData<L>,
}

impl<T, L> Clone for SharedQueries<T, L> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}
impl<T, L> Copy for SharedQueries<T, L> {}

impl<T: Memory, L: TileLayout> SharedQueries<T, L> {
    /// The rows of `tile` from `row` on.
    #[inline(always)]
    #[must_use]
    pub fn new(tile: Shared<T>, row: u32) -> Self {
        Self { tile, origin: a_origin::<L>(row), layout: PhantomData }
    }
}

impl<T: Memory, L: TileLayout, const F: usize> Queries<F> for SharedQueries<T, L> {
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn step(&self, step: usize) -> [[u32; 4]; F] {
        let mut a = [[0; 4]; F];
        unroll!(for FRAGMENT in 0..2 {
            if FRAGMENT < F {
                let right = L::right(self.origin, step as u32 * 16);
                a[FRAGMENT] = matrix::load_x4(self.tile, L::down(right, FRAGMENT as u32 * ROWS));
            }
        });
        a
    }
}

/// Q in registers, 4 a fragment for every 16 columns.
#[derive(Clone, Copy, Debug)]
pub struct RegisterQueries<const F: usize, const STEPS: usize>([[[u32; 4]; F]; STEPS]);

impl<const F: usize, const STEPS: usize> RegisterQueries<F, STEPS> {
    /// Loads all of Q's columns.
    #[inline(always)]
    #[must_use]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn load<T: Scalar, L: TileLayout>(shared: SharedQueries<T, L>) -> Self {
        let mut a = [[[0; 4]; F]; STEPS];
        unroll!(for STEP in 0..16 {
            if STEP < STEPS {
                a[STEP] = shared.step(STEP);
            }
        });
        Self(a)
    }

    /// The value in their place where Q stays in shared memory.
    #[inline(always)]
    #[must_use]
    pub const fn none() -> Self {
        Self([[[0; 4]; F]; STEPS])
    }
}

impl<const F: usize, const STEPS: usize> Queries<F> for RegisterQueries<F, STEPS> {
    #[inline(always)]
    fn step(&self, step: usize) -> [[u32; 4]; F] {
        self.0[step]
    }
}

/// `S += Q Kᵀ` over D columns with K in shared memory; `k` from [`b_origin`].
#[inline(always)]
pub fn add_scores<T, C, L, const D: usize, const N: usize, const F: usize>(
    s: &mut [[[f32; 4]; N]; F],
    queries: impl Queries<F>,
    (k_smem, k): (Shared<T>, u32),
) where
    T: Scalar,
    C: Multiply<T>,
    L: TileLayout,
{
    unroll!(for STEP in 0..16 {
        if STEP < D / 16 {
            let right = L::right(k, STEP as u32 * 16);
            add_scores_step::<T, C, L, N, F>(s, queries.step(STEP), (k_smem, right));
        }
    });
}

/// `S += Q Kᵀ` over 16 columns of Q and K.
#[inline(always)]
pub fn add_scores_step<T, C, L, const N: usize, const F: usize>(
    s: &mut [[[f32; 4]; N]; F],
    q: [[u32; 4]; F],
    (k_smem, k): (Shared<impl Memory>, u32),
) where
    T: Scalar,
    C: Multiply<T>,
    L: TileLayout,
{
    let mut a = [operands::<T, C>([0; 4]); F];
    unroll!(for FRAGMENT in 0..2 {
        if FRAGMENT < F {
            a[FRAGMENT] = operands::<T, C>(q[FRAGMENT]);
        }
    });
    unroll!(for PAIR in 0..8 {
        if PAIR < N / 2 {
            let b = operands::<T, C>(matrix::load_x4(k_smem, L::down(k, PAIR as u32 * 16)));
            unroll!(for FRAGMENT in 0..2 {
                if FRAGMENT < F {
                    let s = &mut s[FRAGMENT];
                    C::multiply(&mut s[2 * PAIR], a[FRAGMENT], [b[0], b[1]]);
                    C::multiply(&mut s[2 * PAIR + 1], a[FRAGMENT], [b[2], b[3]]);
                }
            });
        }
    });
}

/// Four registers as operands. (`map` would be a loop.)
#[inline(always)]
pub fn operands<T: Scalar, C: Multiply<T>>(v: [u32; 4]) -> [C::Operand; 4] {
    [C::operand(v[0]), C::operand(v[1]), C::operand(v[2]), C::operand(v[3])]
}

/// `O += P V` over 8 O columns, with V in shared memory; `v` from [`a_origin`].
#[inline(always)]
pub fn add_output<T: Scalar, C: TensorCore<T>, L: TileLayout, const N: usize, const O: usize>(
    acc_o: &mut [[f32; 4]; O],
    p: &[[f32; 4]; N],
    (v_smem, v): (Shared<T>, u32),
) {
    unroll!(for STEP in 0..8 {
        if STEP < N / 2 {
            let a = pack_a::<T, C>(p[2 * STEP], p[2 * STEP + 1]);
            let acc_o = core::array::from_mut(acc_o);
            add_output_step::<T, C, L, O, 1, 1>(acc_o, [a], (v_smem, v), 16 * STEP as u32);
        }
    });
}

/// `O += P V` for the 16 keys from `key` of the tile on, with their weights `p`, packed. `PARTS` warps divide the
/// columns of V: each has 16 of every `16 PARTS`, and `v` lies 16 columns further to the right for each.
#[inline(always)]
pub fn add_output_step<T, C, L, const O: usize, const F: usize, const PARTS: u32>(
    acc_o: &mut [[[f32; 4]; O]; F],
    p: [[u32; 4]; F],
    (v_smem, v): (Shared<T>, u32),
    key: u32,
) where
    T: Scalar,
    C: TensorCore<T>,
    L: TileLayout,
{
    unroll!(for PAIR in 0..16 {
        if PAIR < O / 2 {
            let right = L::right(v, PAIR as u32 * 16 * PARTS);
            let b = matrix::load_x4_transposed(v_smem, L::down(right, key));
            unroll!(for FRAGMENT in 0..2 {
                if FRAGMENT < F {
                    let acc_o = &mut acc_o[FRAGMENT];
                    C::multiply(&mut acc_o[2 * PAIR], p[FRAGMENT], [b[0], b[1]]);
                    C::multiply(&mut acc_o[2 * PAIR + 1], p[FRAGMENT], [b[2], b[3]]);
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
