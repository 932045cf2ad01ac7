//! The online softmax on fragments: the state of a warp's 16 rows, and the epilogue.

use simt::{
    global::GlobalMut, math, memory::Memory, mma::TensorCore, scalar::Scalar, unroll, warp,
};

use crate::{
    args::AttentionArgs,
    parts::{columns::Columns, fragment, policy::Policy, softmax},
};

/// Maximum and sum of the two rows of a lane. The four lanes of a row have the same
/// maximum, and each the sum over its own keys.
#[derive(Clone, Copy, Debug)]
pub struct RowState {
    /// Running maximum, in units of log2(e); where maxima are raised only when they
    /// outgrow it, at most `softmax::SLACK` less.
    pub m_i: [f32; 2],
    /// Running sum of this lane's weights.
    pub l_i: [f32; 2],
}

impl RowState {
    /// Rows that have seen no key. The maximum is below every score but finite, so that
    /// a hidden score, -inf, less the maximum stays -inf instead of becoming NaN.
    pub const EMPTY: Self = Self { m_i: [f32::MIN; 2], l_i: [0.0; 2] };

    /// Turns scores (in units of log2(e)) into weights under the new maximum; what was
    /// summed under the old one is to be multiplied by the result.
    #[inline(always)]
    pub fn update<const N: usize>(&mut self, s: &mut [[f32; 4]; N]) -> [f32; 2] {
        let mut alpha = [0.0; 2];
        unroll!(for R in 0..2 {
            let mut tile_max = self.m_i[R];
            unroll!(for TILE in 0..16 {
                if TILE < N {
                    tile_max = math::max(tile_max, math::max(s[TILE][2 * R], s[TILE][2 * R + 1]));
                }
            });
            let m_new = warp::reduce_max::<4>(tile_max);
            alpha[R] = math::exp2(self.m_i[R] - m_new);
            self.m_i[R] = m_new;
            let mut sum = 0.0;
            unroll!(for TILE in 0..16 {
                if TILE < N {
                    let p = [s[TILE][2 * R], s[TILE][2 * R + 1]].map(|s| math::exp2(s - m_new));
                    (s[TILE][2 * R], s[TILE][2 * R + 1]) = (p[0], p[1]);
                    sum += p[0] + p[1];
                }
            });
            self.l_i[R] = math::fma(self.l_i[R], alpha[R], sum);
        });
        alpha
    }

    /// Whether a tile's maxima are so far above what is subtracted that the sums have to
    /// be rescaled. `maxima` may be the maxima of this lane's columns alone.
    #[inline(always)]
    #[must_use]
    pub fn outgrown(&self, maxima: [f32; 2]) -> bool {
        maxima[0] - self.m_i[0] > softmax::SLACK || maxima[1] - self.m_i[1] > softmax::SLACK
    }

    /// Raises `m_i` to a tile's maxima, of which each lane has the maxima of its own columns.
    /// The caller multiplies the earlier sums by the result, as `l_i` is here.
    #[inline(always)]
    pub fn raise(&mut self, maxima: [f32; 2]) -> [f32; 2] {
        let mut alpha = [0.0; 2];
        unroll!(for R in 0..2 {
            let m_new = math::max(self.m_i[R], warp::reduce_max::<4>(maxima[R]));
            alpha[R] = math::exp2(self.m_i[R] - m_new);
            self.m_i[R] = m_new;
            self.l_i[R] *= alpha[R];
        });
        alpha
    }

    /// The weights of four raw scores, which join the sum: scale and maximum are one fma
    /// before exp2.
    #[inline(always)]
    pub fn weigh(&mut self, s: [f32; 4], scale_log2: f32) -> [f32; 4] {
        let mut p = [0.0; 4];
        unroll!(for E in 0..4 {
            p[E] = math::exp2(math::fma(s[E], scale_log2, -self.m_i[E / 2]));
        });
        self.l_i[0] += p[0] + p[1];
        self.l_i[1] += p[2] + p[3];
        p
    }
}

/// Maxima of this lane's raw scores in its two rows, in units of log2(e). The scale is positive.
#[inline(always)]
#[must_use]
pub fn maxima<const N: usize>(s: &[[f32; 4]; N], scale_log2: f32) -> [f32; 2] {
    // Four chains that do not wait for each other.
    let mut max = s[0];
    unroll!(for TILE in 0..16 {
        if TILE + 1 < N {
            unroll!(for E in 0..4 {
                max[E] = math::max(max[E], s[TILE + 1][E]);
            });
        }
    });
    [math::max(max[0], max[1]) * scale_log2, math::max(max[2], max[3]) * scale_log2]
}

/// Normalises the 16 rows from `first_row` on and stores them, with their LSE. Lanes of a row exchange what they
/// have, so that each stores 16 bytes and the four 64 bytes side by side.
///
/// # Safety
/// `args.tensors.o` must be `[B, H, Nq, D]` with D = 8 O or the columns that the launch is specialised
/// for, its address and strides multiples of 16 bytes, `args.tensors.lse` `[B, H, Nq]`.
#[inline(always)]
pub unsafe fn store<T: Scalar, C: TensorCore<T>, const O: usize>(
    args: &AttentionArgs,
    policy: &Policy,
    first_row: u32,
    mut acc_o: [[f32; 4]; O],
    rows: &RowState,
) {
    let head = policy.head;
    // SAFETY: `o` is `[B, H, Nq, D]` of this type, `lse` f32 `[B, H, Nq]`.
    let (o, lse) =
        unsafe { (args.tensors.o.buffer.view_mut::<T>(), args.tensors.lse.view_mut::<f32>()) };
    let (g, column) = fragment::row_and_column();
    let (m_i, l_i) = normalise(&mut acc_o, rows, policy, first_row + g);
    unroll!(for R in 0..2 {
        let i = first_row + g + 8 * R as u32;
        let inside = i < head.seq_q;
        let o_row = head.query(&args.tensors.o, i);
        // 32 columns at a time: 8 of them to each of the row's four lanes.
        unroll!(for QUAD in 0..8 {
            if QUAD < O / 4 {
                let pack = |tile: usize| {
                    let c = acc_o[4 * QUAD + tile];
                    C::pack(c[2 * R], c[2 * R + 1])
                };
                let chunk = transpose_quad([pack(0), pack(1), pack(2), pack(3)]);
                let first = 32 * QUAD as u32 + column * 4;
                if inside && Columns::of_values().has(first) {
                    store_chunk(o, o_row + first as u64, chunk);
                }
            }
        });
        if inside && column == 0 {
            let value = softmax::log_sum_exp(m_i[R], l_i[R]);
            lse.write(head.row(i), value);
        }
    });
}

/// Divides O by the sums of its rows; returns maxima and sums, of which each lane had its own part.
/// `i` is the lane's first row; all lanes of the warp ask.
#[inline(always)]
pub fn normalise<const O: usize>(
    acc_o: &mut [[f32; 4]; O],
    rows: &RowState,
    policy: &Policy,
    i: u32,
) -> ([f32; 2], [f32; 2]) {
    let l_i = [warp::reduce_add::<4>(rows.l_i[0]), warp::reduce_add::<4>(rows.l_i[1])];
    let l_i = policy.checked_sums(i, rows.m_i, l_i);
    let (m_0, l_0, factor_0) = policy.with_sink(rows.m_i[0], l_i[0]);
    let (m_1, l_1, factor_1) = policy.with_sink(rows.m_i[1], l_i[1]);
    // Kept weights are scaled up here, all at once.
    let of_row = |l, factor| softmax::normaliser(l) * (factor * policy.rescale());
    fragment::scale_rows(acc_o, [of_row(l_0, factor_0), of_row(l_1, factor_1)]);
    ([m_0, m_1], [l_0, l_1])
}

#[inline(always)]
fn store_chunk<T: Memory>(o: GlobalMut<T>, index: u64, chunk: [u32; 4]) {
    o.write_as::<[u32; 4]>(index, chunk);
}

/// Transposes 4 x 4 registers over four neighbouring lanes: lane `t` gets register `t` of
/// each of them. Two steps: 2 x 2 blocks are exchanged, then what is in them.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn transpose_quad(v: [u32; 4]) -> [u32; 4] {
    let lane = warp::lane_id();
    let (odd, upper) = (lane & 1 != 0, lane & 2 != 0);
    let exchange = |keep_high: bool, low: u32, high: u32, distance: u32| {
        let (kept, given) = if keep_high { (high, low) } else { (low, high) };
        let received = warp::shuffle_xor(given, distance);
        if keep_high { (received, kept) } else { (kept, received) }
    };
    let (a0, a2) = exchange(upper, v[0], v[2], 2);
    let (a1, a3) = exchange(upper, v[1], v[3], 2);
    let (b0, b1) = exchange(odd, a0, a1, 1);
    let (b2, b3) = exchange(odd, a2, a3, 1);
    [b0, b1, b2, b3]
}
