//! The merge of a block's warps: each leaves O, maxima and sums of its keys in shared memory, and the threads of
//! the block merge and store them.

use simt::{
    math,
    mma::{Ampere, TensorCore},
    scalar::Scalar,
    shared::Shared,
    unroll, warp,
};

use crate::{
    args::DecodeArgs,
    decode::rows::RowTile,
    parts::{
        columns::Columns,
        fragment::{self, ROWS},
        online::RowState,
        softmax,
    },
};

/// Warps of a block.
pub const WARPS: u32 = 4;

/// O, maxima and sums of a warp's 16 rows in shared memory.
#[derive(Clone, Copy)]
pub struct WarpSums<const D: usize, const PAD: u32>(Shared<f32>);

impl<const D: usize, const PAD: u32> WarpSums<D, PAD> {
    /// Words from one row of O to the next: PAD more than D, so that neighbouring rows lie in other banks.
    const PITCH: u32 = D as u32 + PAD;

    /// Words of all three.
    pub const WORDS: u32 = ROWS * (Self::PITCH + 2);

    /// The sums from `first_byte` of dynamic shared memory on.
    ///
    /// # Safety
    /// The launch must give [`WORDS`](Self::WORDS) words from there on.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[must_use]
    pub unsafe fn new(first_byte: u32) -> Self {
        // SAFETY: the launch gives the words, as stated above.
        Self(unsafe { Shared::dynamic(first_byte, Self::WORDS) })
    }

    /// Writes the sums of this warp: of each 8 columns, the lane has two neighbours.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn write<const O: usize>(&self, acc_o: &[[f32; 4]; O], rows: &RowState) {
        let (g, column) = fragment::row_and_column();
        let l_i = [warp::reduce_add::<4>(rows.l_i[0]), warp::reduce_add::<4>(rows.l_i[1])];
        unroll!(for R in 0..2 {
            let row = g + 8 * R as u32;
            unroll!(for TILE in 0..32 {
                if TILE < O {
                    let pair = [acc_o[TILE][2 * R].to_bits(), acc_o[TILE][2 * R + 1].to_bits()];
                    self.0.write_as(row * Self::PITCH + column + 8 * TILE as u32, pair);
                }
            });
            self.write_sums(row, column, rows.m_i[R], l_i[R]);
        });
    }

    /// As [`write`](Self::write), where of each 16 columns the lane has four neighbours: the even ones in a
    /// product, the odd ones in the next.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn write_interleaved<const O: usize>(&self, acc_o: &[[f32; 4]; O], rows: &RowState) {
        let (g, column) = fragment::row_and_column();
        let l_i = [warp::reduce_add::<4>(rows.l_i[0]), warp::reduce_add::<4>(rows.l_i[1])];
        unroll!(for R in 0..2 {
            let row = g + 8 * R as u32;
            unroll!(for PAIR in 0..16 {
                if PAIR < O / 2 {
                    let (even, odd) = (acc_o[2 * PAIR], acc_o[2 * PAIR + 1]);
                    let four = [even[2 * R], odd[2 * R], even[2 * R + 1], odd[2 * R + 1]];
                    let at = row * Self::PITCH + 2 * column + 16 * PAIR as u32;
                    self.0.write_as(at, four.map(f32::to_bits));
                }
            });
            self.write_sums(row, column, rows.m_i[R], l_i[R]);
        });
    }

    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn write_sums(&self, row: u32, column: u32, m_i: f32, l_i: f32) {
        if column == 0 {
            let pair = [m_i.to_bits(), l_i.to_bits()];
            self.0.write_as(const { ROWS * Self::PITCH } + 2 * row, pair);
        }
    }

    /// Maximum and sum of row `r`.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn sums(&self, r: u32) -> [f32; 2] {
        let pair = self.0.read_as::<[u32; 2]>(const { ROWS * Self::PITCH } + 2 * r);
        [f32::from_bits(pair[0]), f32::from_bits(pair[1])]
    }

    /// Four columns of row `r` of O.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn columns(&self, r: u32, column: u32) -> [u32; 4] {
        self.0.read_as::<[u32; 4]>(r * Self::PITCH + column)
    }
}

/// Eight columns of a row of O under one maximum, that maximum, and the sum of the weights.
#[derive(Clone, Copy, Debug)]
pub struct Merged {
    m_i: f32,
    l_i: f32,
    /// O.
    pub o: [f32; 8],
}

impl Merged {
    /// The merged sums of all warps for row `r`.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    #[must_use]
    pub fn of<const D: usize, const PAD: u32>(
        sums_of: impl Fn(u32) -> WarpSums<D, PAD>,
        r: u32,
        column: u32,
    ) -> Self {
        let mut sums = [[0.0; 2]; WARPS as usize];
        let mut m_i = f32::MIN;
        unroll!(for WARP in 0..4 {
            sums[WARP] = sums_of(WARP as u32).sums(r);
            m_i = math::max(m_i, sums[WARP][0]);
        });
        let mut merged = Self { m_i, l_i: 0.0, o: [0.0; 8] };
        unroll!(for WARP in 0..4 {
            let alpha = math::exp2(sums[WARP][0] - m_i);
            merged.l_i = math::fma(sums[WARP][1], alpha, merged.l_i);
            unroll!(for HALF in 0..2 {
                let four = sums_of(WARP as u32).columns(r, column + 4 * HALF as u32);
                unroll!(for E in 0..4 {
                    let o = &mut merged.o[4 * HALF + E];
                    *o = math::fma(f32::from_bits(four[E]), alpha, *o);
                });
            });
        });
        merged
    }
}

/// Stores eight columns of a row: O and the LSE where there is one part, or the part.
///
/// # Safety
/// O, the LSE and the parts must be as [`decode_split`](super::decode_split::decode_split) says.
#[inline(always)]
pub unsafe fn store<T: Scalar>(
    args: &DecodeArgs,
    tile: &RowTile<'_>,
    (part, tiles): (u32, &core::ops::Range<u32>),
    (r, column): (u32, u32),
    Merged { m_i, l_i, mut o }: Merged,
    tile_keys: u32,
) where
    Ampere: TensorCore<T>,
{
    if !tile.has(r) {
        return;
    }
    let row = tile.row(r);
    let (policy, head) = (row.policy, row.policy.head);
    // Of the part's keys.
    let l_i = softmax::checked_fused_sum(m_i, l_i, || {
        let begin = policy.begin_of_row(row.i).max(tiles.start * tile_keys);
        begin < policy.end_of_row(row.i).min(tiles.end.saturating_mul(tile_keys))
    });
    let has_column = Columns::of_values().has(column);
    if args.parts.splits > 1 {
        // SAFETY: the parts are as `decode_split` states.
        let (o_gmem, sums) =
            unsafe { (args.parts.o.view_mut::<f32>(), args.parts.sums.view_mut::<f32>()) };
        let rows = args.forward.shape.batch as u64 * args.forward.shape.heads as u64;
        let rows = rows * args.forward.shape.seq_q as u64;
        let place = part as u64 * rows + head.row(row.i);
        let columns = Columns::of_values().of(args.forward.shape.head_dim_v) as u64;
        if has_column {
            unroll!(for HALF in 0..2 {
                let four = [o[4 * HALF], o[4 * HALF + 1], o[4 * HALF + 2], o[4 * HALF + 3]];
                let first = place * columns + (column + 4 * HALF as u32) as u64;
                o_gmem.write_as(first, four.map(f32::to_bits));
            });
        }
        if column == 0 {
            sums.write_as(2 * place, [m_i.to_bits(), l_i.to_bits()]);
        }
        return;
    }
    // SAFETY: O and the LSE are as `decode_split` states.
    let (o_gmem, lse) = unsafe {
        (args.forward.tensors.o.buffer.view_mut::<T>(), args.forward.tensors.lse.view_mut::<f32>())
    };
    let (m_i, l_i, factor) = policy.with_sink(m_i, l_i);
    let normaliser = softmax::normaliser(l_i) * factor;
    unroll!(for E in 0..8 {
        o[E] *= normaliser;
    });
    if has_column {
        let pack = |pair: usize| Ampere::pack(o[2 * pair], o[2 * pair + 1]);
        let first = head.query(&args.forward.tensors.o, row.i) + column as u64;
        o_gmem.write_as(first, [pack(0), pack(1), pack(2), pack(3)]);
    }
    if column == 0 {
        lse.write(head.row(row.i), softmax::log_sum_exp(m_i, l_i));
    }
}
