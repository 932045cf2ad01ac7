//! The registers of a warp of flash_pipelined and flash_tf32, and how the warp takes in a tile of
//! keys: up to 32 rows, scores hidden only where something cuts the tile, O rescaled only where a
//! maximum has moved far.

use core::marker::PhantomData;

use simt::{
    compiler::opaque,
    layout::TileLayout,
    mma::{Ampere, Multiply, TensorCore},
    scalar::Scalar,
    shared::Shared,
    thread, unroll, warp,
};

use crate::parts::{
    fragment::{self, Queries},
    online::{self, RowState},
    policy::Policy,
};

/// This warp's first row, counted from the block's; the same for the whole warp.
#[inline(always)]
pub fn warp_row<const FRAGMENTS: usize>() -> u32 {
    warp::uniform(opaque(thread::thread_idx_x()) / warp::LANES)
        * const { FRAGMENTS as u32 * fragment::ROWS }
}

/// The registers of a warp: N tiles of 8 keys, O tiles of 8 columns, F fragments of
/// 16 rows.
pub struct WarpRows<T, const N: usize, const O: usize, const F: usize> {
    policy: Policy,
    /// The warp's first row.
    pub first_row: u32,
    /// Maxima and sums.
    pub rows: [RowState; F],
    /// O, not normalised yet.
    pub acc_o: [[[f32; 4]; O]; F],
    element: PhantomData<T>,
}

impl<T: Scalar, const N: usize, const O: usize, const F: usize> WarpRows<T, N, O, F>
where
    Ampere: Multiply<T>,
{
    /// The rows from `first_row` on, before any key.
    #[inline(always)]
    pub fn new(policy: Policy, first_row: u32) -> Self {
        Self {
            policy,
            first_row,
            rows: [RowState::EMPTY; F],
            acc_o: [[[0.0; 4]; O]; F],
            element: PhantomData,
        }
    }

    const LAST_ROW: u32 = F as u32 * fragment::ROWS - 1;
    const KEYS: u32 = 8 * N as u32;

    /// Whether no row sees any key of the tile from this one on.
    #[inline(always)]
    pub fn sees_nothing(&self, first_key: u32) -> bool {
        // Opaque: computed for each tile, and not kept.
        let first_row = opaque(self.first_row);
        let end = self.policy.end_of_row(first_row + Self::LAST_ROW);
        first_key >= end
            || Policy::is_left_bounded()
                && first_key + Self::KEYS <= self.policy.begin_of_row(first_row)
    }

    /// Shapes the scores of a tile of keys, and sets hidden ones to -inf.
    #[inline(always)]
    pub fn shape_and_hide(&self, s: &mut [[[f32; 4]; N]; F], first_key: u32) {
        if Policy::shapes_scores() {
            let (row, column) = fragment::row_and_column();
            let (i, j) = (self.first_row + row, first_key + column);
            self.policy.shape_scores::<T, N, F>(s, i, j);
        }
        let (from, end) = (
            self.policy.whole_from(self.first_row + Self::LAST_ROW),
            self.policy.whole_keys(self.first_row),
        );
        if first_key + Self::KEYS > end || Policy::is_left_bounded() && first_key < from {
            let (row, column) = fragment::row_and_column();
            self.policy.hide(s, self.first_row + row, first_key + column);
        }
    }

    /// Online softmax: O and the sums are rescaled only where a maximum has moved far.
    #[inline(always)]
    pub fn raise(&mut self, s: &[[[f32; 4]; N]; F]) {
        let mut maxima = [[0.0; 2]; F];
        let mut outgrown = false;
        unroll!(for FRAGMENT in 0..2 {
            if FRAGMENT < F {
                maxima[FRAGMENT] = online::maxima(&s[FRAGMENT], self.policy.scale_log2());
                outgrown |= self.rows[FRAGMENT].outgrown(maxima[FRAGMENT]);
            }
        });
        if warp::any(outgrown) {
            unroll!(for FRAGMENT in 0..2 {
                if FRAGMENT < F {
                    let alpha = self.rows[FRAGMENT].raise(maxima[FRAGMENT]);
                    fragment::scale_rows(&mut self.acc_o[FRAGMENT], alpha);
                }
            });
        }
    }

    /// The weights of this lane in a tile that dropout keeps.
    #[inline(always)]
    pub fn kept_weights(&self, first_key: u32) -> [[u32; 2]; F] {
        let (row, column) = fragment::row_and_column();
        let mut kept = [[0; 2]; F];
        unroll!(for FRAGMENT in 0..2 {
            if FRAGMENT < F {
                let i = self.first_row + row + FRAGMENT as u32 * fragment::ROWS;
                let j = first_key + column;
                kept[FRAGMENT] = self.policy.kept_weights::<N>(i, j);
            }
        });
        kept
    }

    /// The weights of the scores `s` of a fragment for the `tile`-th 8 keys; they join the
    /// sum, and the dropped weights are 0 after that.
    #[inline(always)]
    pub fn weigh(&mut self, fragment: usize, s: [f32; 4], kept: [u32; 2], tile: usize) -> [f32; 4] {
        let mut p = self.rows[fragment].weigh(s, self.policy.scale_log2());
        Policy::drop_weights(&mut p, kept, tile);
        p
    }
}

impl<T: Scalar, const N: usize, const O: usize, const F: usize> WarpRows<T, N, O, F>
where
    Ampere: TensorCore<T>,
{
    /// Takes in a tile of keys. `keys_are_read` is called once, when K is done with and V is not
    /// begun: a barrier there is for all warps.
    #[inline(always)]
    pub fn attend<L: TileLayout, const D: usize>(
        &mut self,
        queries: impl Queries<F>,
        (k_smem, v_smem): (Shared<T>, Shared<T>),
        first_key: u32,
        keys_are_read: impl FnOnce(),
    ) {
        if self.sees_nothing(first_key) {
            keys_are_read();
            return;
        }
        // S = Q Kᵀ.
        let mut s = [[[0.0f32; 4]; N]; F];
        let k = (k_smem, fragment::b_origin::<L>(0));
        fragment::add_scores::<T, Ampere, L, D, N, F>(&mut s, queries, k);
        keys_are_read();
        // Opaque: where the rows end is computed for each tile, and not kept.
        self.first_row = opaque(self.first_row);
        self.shape_and_hide(&mut s, first_key);
        self.raise(&s);
        let v = (v_smem, fragment::a_origin::<L>(0));
        let kept = self.kept_weights(first_key);

        // P, and O += P V, 16 keys at a time: exponentials of the next keys go beside the
        // products of these.
        unroll!(for STEP in 0..8 {
            if STEP < N / 2 {
                let mut p = [[0; 4]; F];
                unroll!(for FRAGMENT in 0..2 {
                    if FRAGMENT < F {
                        let mut weigh = |tile: usize| {
                            self.weigh(FRAGMENT, s[FRAGMENT][tile], kept[FRAGMENT], tile)
                        };
                        let (left, right) = (weigh(2 * STEP), weigh(2 * STEP + 1));
                        p[FRAGMENT] = fragment::pack_a::<T, Ampere>(left, right);
                    }
                });
                let key = 16 * STEP as u32;
                fragment::add_output_step::<T, Ampere, L, O, F, 1>(&mut self.acc_o, p, v, key);
            }
        });
    }
}
