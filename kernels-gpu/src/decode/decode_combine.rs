//! decode_combine: the parts of a row become one. It is the online softmax again, over parts instead of
//! keys: each brings O under its own maximum, that maximum, and the sum of its weights.
//!
//! ```text
//! m = max over parts;  alpha = exp2(m_part - m)
//! O = sum of alpha O_part / sum of alpha l_part;  LSE = m + log(sum of alpha l_part)
//! ```
//!
//! Parts without keys were not written. The number of parts follows from the sequence's length, as in
//! decode_split and decode_e4m3.
//!
//! One block per row. Its threads are D / 4 columns times the parts that there is room for, so
//! neighbours read 16 bytes each, side by side. A row of `S` parts takes `4 S (Dv + 2)` bytes, next to
//! `4 D` for each of its keys.

use half::{bf16, f16};
use simt::{
    math,
    mma::{Ampere, TensorCore},
    scalar::Scalar,
    shared::Shared,
    shared_array, thread, unroll, warp,
};

use crate::{
    args::DecodeArgs,
    constants::Constants,
    decode::{
        decode_e4m3, decode_split,
        rows::{PackedRow, RowTile, parts_with_keys},
    },
    entries,
    parts::{columns::Columns, fragment, head::Head, schedule::divide, softmax},
};

/// Threads of a block.
pub const THREADS: u32 = 256;
/// Parts of which a thread has loads in flight at once.
const AHEAD: u32 = 4;

/// Merges the parts of each row.
///
/// # Layout
/// `o: [B, H, Nq, D]`, `lse: [B, H, Nq]`; parts as [`PartsArgs`](crate::args::PartsArgs) says.
///
/// # Thread mapping
/// One block of [`THREADS`] threads per row `(b H + h) Nq + i`, along `x`.
///
/// # Safety
/// The buffers of `args` must have these shapes, the parts as
/// [`decode_split`](decode_split::decode_split) left them.
#[inline(always)]
pub unsafe fn decode_combine<T: Scalar, const D: usize, const LANES: u32, const GROUPS: u32>(
    args: &DecodeArgs,
) where
    Ampere: TensorCore<T>,
{
    const { assert!(4 * LANES as usize == D && LANES * GROUPS == THREADS) };
    // Who am I.
    let shape = &args.forward.shape;
    let place = thread::block_idx_x();
    let (rest, i) = divide(place, shape.seq_q);
    let (b, h) = divide(rest, shape.heads);
    let (h_kv, member) = (h / Head::group(), h % Head::group());
    let packed = i * Head::group() + member;
    let tile = RowTile::new(args, b, h_kv, packed / fragment::ROWS * fragment::ROWS);
    let PackedRow { policy, i } = tile.row(packed % fragment::ROWS);
    let tiles = if Constants::e4m3() == 0 {
        tile.key_tiles(const { decode_split::keys(D) })
    } else {
        tile.key_tiles(decode_e4m3::KEYS)
    };
    let parts = parts_with_keys(&tiles, args.parts.splits);
    // SAFETY: the parts are as `PartsArgs` says.
    let (o_parts, sums) = unsafe { (args.parts.o.view::<f32>(), args.parts.sums.view::<f32>()) };
    let rows = shape.batch as u64 * shape.heads as u64 * shape.seq_q as u64;
    let sums_of = |part: u32| {
        let pair = sums.read_as::<[u32; 2]>(2 * (part as u64 * rows + place as u64));
        [f32::from_bits(pair[0]), f32::from_bits(pair[1])]
    };

    // The maximum and the sum of all parts: each warp for itself.
    let lane = warp::lane_id();
    let mut m_i = f32::MIN;
    let mut part = lane;
    while part < parts {
        m_i = math::max(m_i, sums_of(part)[0]);
        part += warp::LANES;
    }
    let m_i = warp::reduce_max::<32>(m_i);
    let mut l_i = 0.0;
    let mut part = lane;
    while part < parts {
        let [m_part, l_part] = sums_of(part);
        l_i = math::fma(l_part, math::exp2(m_part - m_i), l_i);
        part += warp::LANES;
    }
    let l_i = warp::reduce_add::<32>(l_i);

    // Four columns of O, of every GROUPS-th part.
    let tid = thread::thread_idx_x();
    let (group, column) = (tid / LANES, tid % LANES * 4);
    let columns = Columns::of_values().of(shape.head_dim_v);
    let mut o = [0.0f32; 4];
    let mut first = group;
    while first < parts && column < columns {
        let mut loaded = [([0; 4], 0.0); AHEAD as usize];
        unroll!(for AT in 0..4 {
            let part = first + AT as u32 * GROUPS;
            if part < parts {
                let index = (part as u64 * rows + place as u64) * columns as u64 + column as u64;
                loaded[AT] = (o_parts.read_as::<[u32; 4]>(index), sums_of(part)[0]);
            }
        });
        unroll!(for AT in 0..4 {
            if first + (AT as u32) * GROUPS < parts {
                let (four, m_part) = loaded[AT];
                let alpha = math::exp2(m_part - m_i);
                unroll!(for E in 0..4 {
                    o[E] = math::fma(f32::from_bits(four[E]), alpha, o[E]);
                });
            }
        });
        first += AHEAD * GROUPS;
    }
    let groups: Shared<f32> = shared_array!(f32; 4 * THREADS as usize);
    groups.write_as(4 * tid, o.map(f32::to_bits));
    // Hazard: threads of the first group read the sums of the other groups.
    thread::sync_threads();
    if group != 0 || column >= columns {
        return;
    }
    unroll!(for E in 0..4 {
        o[E] = 0.0;
    });
    for group in 0..GROUPS {
        let four = groups.read_as::<[u32; 4]>(4 * (group * LANES + tid));
        unroll!(for E in 0..4 {
            o[E] += f32::from_bits(four[E]);
        });
    }

    // Normalise, store O and LSE.
    let (m_i, l_i, factor) = policy.with_sink(m_i, l_i);
    let normaliser = softmax::normaliser(l_i) * factor;
    let head = policy.head;
    // SAFETY: O and the LSE have the shapes stated above.
    let (o_gmem, lse) = unsafe {
        (args.forward.tensors.o.buffer.view_mut::<T>(), args.forward.tensors.lse.view_mut::<f32>())
    };
    let pack = |pair: usize| Ampere::pack(o[2 * pair] * normaliser, o[2 * pair + 1] * normaliser);
    let first = head.query(&args.forward.tensors.o, i) + column as u64;
    o_gmem.write_as(first, [pack(0), pack(1)]);
    if column == 0 {
        lse.write(head.row(i), softmax::log_sum_exp(m_i, l_i));
    }
}

entries! {
    /// Instances of [`decode_combine`].
    pub static ENTRIES: DecodeArgs => "sm_80", threads THREADS, min_blocks 4;
    decode_combine: T in [f16, bf16], d D in [64, 128, 256] = decode_combine::<
        T,
        D,
        { D as u32 / 4 },
        { THREADS / (D as u32 / 4) },
    >;
}
