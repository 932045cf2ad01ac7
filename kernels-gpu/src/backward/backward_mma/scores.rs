//! P and dS of a warp's scores, in registers.

use simt::{
    layout::{Swizzled, TileLayout},
    math,
    mma::{Ampere, TensorCore},
    scalar::Scalar,
    shared::Shared,
    unroll,
};

use crate::{
    args::BackwardArgs,
    parts::{
        fragment::{self, ROWS},
        head::Head,
        policy::Policy,
    },
};

/// A lane's part of Pᵀ: of each fragment of 16 keys and every 8 rows, rows `2 t` and `2 t + 1` at key `g`, and at
/// key `g + 8`.
pub(super) type OfScores<const N: usize, const F: usize> = [[[f32; 4]; N]; F];

/// Runs the body for each of a lane's scores: its fragment, of `$f`, its 8 rows, of `$n` times 8, and its number
/// there.
macro_rules! for_each_score {
    ($n:expr, $f:expr, |$fragment:ident, $tile:ident, $e:ident| $body:block) => {
        unroll!(for $fragment in 0..2 {
            if $fragment < $f {
                unroll!(for $tile in 0..8 {
                    if $tile < $n {
                        unroll!(for $e in 0..4 $body);
                    }
                });
            }
        });
    };
}

/// -LSE and -delta of a lane's rows, two neighbours of every 8. A kernel reads them before the products, which hide
/// the latency of global memory.
pub(super) struct OfRows<const N: usize> {
    minus_lse_log2: [[f32; 2]; N],
    minus_delta: [[f32; 2]; N],
}

impl<const N: usize> OfRows<N> {
    /// # Safety
    /// `delta` and `minus_lse_log2` of `args.steps` must hold `8 N` rows from `first_row` on.
    #[inline(always)]
    pub(super) unsafe fn load(args: &BackwardArgs, head: Head, first_row: u32) -> Self {
        // SAFETY: both hold the rows, as stated above.
        let (delta, minus_lse_log2) =
            unsafe { (args.steps.delta.view::<f32>(), args.steps.minus_lse_log2.view::<f32>()) };
        let (_, column) = fragment::row_and_column();
        let row = head.padded_row(first_row + column);
        let mut of_rows = Self { minus_lse_log2: [[0.0; 2]; N], minus_delta: [[0.0; 2]; N] };
        unroll!(for TILE in 0..8 {
            if TILE < N {
                let at = row + 8 * TILE as u64;
                let minus_lse = minus_lse_log2.read_as::<[u32; 2]>(at);
                of_rows.minus_lse_log2[TILE] = minus_lse.map(f32::from_bits);
                let delta = delta.read_as::<[u32; 2]>(at);
                of_rows.minus_delta[TILE] = delta.map(|delta| -f32::from_bits(delta));
            }
        });
        of_rows
    }

    /// The initial accumulators of dP: -delta, so that the product gives `dP - delta`. With dropout, which scales
    /// dP before delta is subtracted, they are 0.
    #[inline(always)]
    pub(super) fn minus_delta<const F: usize>(&self) -> OfScores<N, F> {
        let mut dp = [[[0.0; 4]; N]; F];
        if !Policy::drops() {
            for_each_score!(N, F, |FRAGMENT, TILE, E| {
                dp[FRAGMENT][TILE][E] = self.minus_delta[TILE][E % 2];
            });
        }
        dp
    }
}

/// P replaces a warp's scores, from row `i` and key `j` on. Returns the slope of the cap at each score, 1 without a
/// cap.
#[inline(always)]
pub(super) fn weigh<T: Scalar, const N: usize, const F: usize>(
    args: &BackwardArgs,
    policy: &Policy,
    (i, j): (u32, u32),
    of_rows: &OfRows<N>,
    s: &mut OfScores<N, F>,
) -> OfScores<N, F> {
    let is_whole =
        policy.whole_from(i + 8 * N as u32) <= j && j + F as u32 * ROWS <= policy.whole_keys(i);
    let (g, column) = fragment::row_and_column();
    let (i, j) = (i + column, j + g);
    let scale = args.forward.scores.scale;
    let mut slopes = [[[1.0; 4]; N]; F];
    for_each_score!(N, F, |FRAGMENT, TILE, E| {
        let raw = s[FRAGMENT][TILE][E];
        let (i, j) = (i + (8 * TILE + E % 2) as u32, j + (16 * FRAGMENT + 8 * (E / 2)) as u32);
        let shaped = policy.shape_score::<T>(raw, scale, i, j);
        let minus_lse = of_rows.minus_lse_log2[TILE][E % 2];
        s[FRAGMENT][TILE][E] = math::fma(shaped, policy.scale_log2(), minus_lse);
        if Policy::caps_scores() {
            slopes[FRAGMENT][TILE][E] = policy.score_slope::<T>(raw);
        }
    });
    if !is_whole {
        let visible = bits::<N, F>(i, j, |i, j| policy.sees(i, j));
        for_each_score!(N, F, |FRAGMENT, TILE, E| {
            if visible[FRAGMENT][E / 2] >> (2 * TILE + E % 2) & 1 == 0 {
                s[FRAGMENT][TILE][E] = f32::NEG_INFINITY;
            }
        });
    }
    for_each_score!(N, F, |FRAGMENT, TILE, E| {
        s[FRAGMENT][TILE][E] = math::exp2(s[FRAGMENT][TILE][E]);
    });
    slopes
}

/// dS replaces `dp`, which began with [`OfRows::minus_delta`]; P loses what dropout drops, and is not scaled up. From
/// row `i` and key `j` on.
#[inline(always)]
pub(super) fn differentiate<const N: usize, const F: usize>(
    policy: &Policy,
    (i, j): (u32, u32),
    of_rows: &OfRows<N>,
    slopes: &OfScores<N, F>,
    p: &mut OfScores<N, F>,
    dp: &mut OfScores<N, F>,
) {
    let (g, column) = fragment::row_and_column();
    let (i, j) = (i + column, j + g);
    if Policy::drops() {
        let kept = bits::<N, F>(i, j, |i, j| policy.kept(i, j, 1.0) != 0.0);
        for_each_score!(N, F, |FRAGMENT, TILE, E| {
            let is_kept = kept[FRAGMENT][E / 2] >> (2 * TILE + E % 2) & 1 != 0;
            let gradient = if is_kept { dp[FRAGMENT][TILE][E] * policy.rescale() } else { 0.0 };
            let weight = p[FRAGMENT][TILE][E];
            dp[FRAGMENT][TILE][E] = weight * (gradient + of_rows.minus_delta[TILE][E % 2]);
            p[FRAGMENT][TILE][E] = if is_kept { weight } else { 0.0 };
        });
    } else {
        for_each_score!(N, F, |FRAGMENT, TILE, E| {
            dp[FRAGMENT][TILE][E] *= p[FRAGMENT][TILE][E];
        });
    }
    if Policy::caps_scores() {
        for_each_score!(N, F, |FRAGMENT, TILE, E| {
            dp[FRAGMENT][TILE][E] *= slopes[FRAGMENT][TILE][E];
        });
    }
}

/// The scores of a lane for whose row and key `holds`: of each fragment, bit `2 n + e` of the first is row
/// `i + 8 n + e` at key `j`, of the second at `j + 8`.
#[inline(always)]
fn bits<const N: usize, const F: usize>(
    i: u32,
    j: u32,
    holds: impl Fn(u32, u32) -> bool,
) -> [[u32; 2]; F] {
    let mut bits = [[0; 2]; F];
    unroll!(for FRAGMENT in 0..2 {
        if FRAGMENT < F {
            let j = j + FRAGMENT as u32 * ROWS;
            // Not unrolled: `holds` may be long.
            for n in 0..2 * N as u32 {
                let row = i + 8 * (n / 2) + n % 2;
                bits[FRAGMENT][0] |= u32::from(holds(row, j)) << n;
                bits[FRAGMENT][1] |= u32::from(holds(row, j + 8)) << n;
            }
        }
    });
    bits
}

/// Writes a warp's Pᵀ or dSᵀ to shared memory, from key `key` and row `row` on.
#[inline(always)]
pub(super) fn store_scores<T: Scalar, const COLUMNS: usize, const N: usize, const F: usize>(
    tile: Shared<T>,
    (key, row): (u32, u32),
    values: &[[[f32; 4]; N]; F],
) where
    Ampere: TensorCore<T>,
{
    let (g, column) = fragment::row_and_column();
    unroll!(for FRAGMENT in 0..2 {
        if FRAGMENT < F {
            let key = key + g + FRAGMENT as u32 * ROWS;
            unroll!(for TILE in 0..8 {
                if TILE < N {
                    let index = Swizzled::<COLUMNS>::index(key, row + 8 * TILE as u32) + column;
                    let [a, b, c, d] = values[FRAGMENT][TILE];
                    tile.write_as::<u32>(index, Ampere::pack(a, b));
                    let below = Swizzled::<COLUMNS>::down(index, 8);
                    tile.write_as::<u32>(below, Ampere::pack(c, d));
                }
            });
        }
    });
}
