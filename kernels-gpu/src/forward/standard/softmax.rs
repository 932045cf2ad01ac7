//! The softmax of standard attention: a row is read once, kept in shared memory, and written
//! once, 16 bytes at a time.
//!
//! ```text
//! for each segment of the row:             the whole row, if it fits
//!     load S                               asynchronous copies, all of them at once
//!     hide; m_new = max(m, max(S))
//!     l = l * exp(m - m_new) + sum(exp(S - m_new))
//! LSE = m + log(l)
//! for each segment:
//!     load S and hide, if there are several
//!     P = exp(S - m) / l; drop; store P, and 0 past the keys that are seen
//! ```
//!
//! A short row belongs to a warp, four to a block, and needs no barrier of the block; a long
//! one belongs to a block. Its keys beyond the diagonal are not read.

use core::f32::consts::LOG2_E;

use half::{bf16, f16};
use simt::{
    async_copy,
    global::{Global, GlobalMut},
    math,
    shared::Shared,
    shared_array, thread, unroll, warp,
};

use crate::{
    args::AttentionArgs,
    entries,
    parts::{
        chunk::{Chunk, MAX_ELEMENTS},
        head::Head,
        policy::Policy,
        schedule::divide,
        softmax::{
            STORED_UNIT, checked_sum, log_sum_exp, log_sum_exp_natural, normaliser, safe_max,
        },
    },
};

/// Threads of a block.
pub const THREADS: u32 = 128;
/// The most bytes that a block keeps: six blocks, all that fit by their registers, then fit
/// into the shared memory of a multiprocessor of compute capability 9.0. A row that is longer
/// is read twice.
const BLOCK_BYTES: u32 = 32 * 1024;
/// Warps of a block.
const WARPS: u32 = THREADS / warp::LANES;

/// Keys of a segment of a row of `seq_k` keys, of elements of `element_bytes`: the row itself,
/// in whole chunks, if it fits.
#[inline(always)]
const fn segment_keys(seq_k: u32, element_bytes: u32) -> u32 {
    let most = BLOCK_BYTES / element_bytes;
    if seq_k < most { seq_k.next_multiple_of(16 / element_bytes) } else { most }
}

/// The most keys of a row that has a warp, and of a segment: lengths beside them are edges.
#[must_use]
pub const fn edge_keys(element_bytes: u32) -> [u32; 2] {
    [BLOCK_BYTES / WARPS / element_bytes, BLOCK_BYTES / element_bytes]
}

/// `exp(x)` of a difference of stored scores.
#[inline(always)]
fn exp(x: f32) -> f32 {
    math::exp2(x * const { LOG2_E * STORED_UNIT })
}

/// Dynamic shared memory of a block in bytes, where a row has `row_threads` threads.
#[must_use]
pub const fn shared_bytes(seq_k: u32, element_bytes: u32, row_threads: u32) -> u32 {
    THREADS / row_threads * segment_keys(seq_k, element_bytes) * element_bytes
}

/// Threads of a row of `seq_k` keys: a warp while a block can keep a row for each of its
/// warps, since a warp waits for no other warp; else the block.
#[must_use]
pub const fn row_threads(seq_k: u32, element_bytes: u32) -> u32 {
    if seq_k <= edge_keys(element_bytes)[0] { warp::LANES } else { THREADS }
}

/// A row of scores, and what its threads know of it.
struct Row<T, const ROW_THREADS: u32> {
    policy: Policy,
    scores: Global<T>,
    weights: GlobalMut<T>,
    /// Index of the row's first element.
    first: u64,
    /// The segment at hand.
    segment: Shared<T>,
    /// Whether chunks of the row lie at multiples of 16 bytes.
    aligned: bool,
    /// This thread's place in the row.
    thread: u32,
    /// The row's number.
    i: u32,
    /// The keys that the row may see, by its position.
    begin: u32,
    end: u32,
}

impl<T: Chunk, const ROW_THREADS: u32> Row<T, ROW_THREADS> {
    /// Keys that the row's threads have at once, a chunk each.
    const STRIDE: usize = (ROW_THREADS * T::ELEMENTS) as usize;

    /// Waits for the threads of the row.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn sync() {
        if ROW_THREADS == warp::LANES {
            warp::sync_warp(warp::FULL_MASK);
        } else {
            thread::sync_threads();
        }
    }

    /// Combines what the warps of the row have; each has the same in all of its lanes.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn combine(of_warp: f32, combine: impl Fn(f32, f32) -> f32) -> f32 {
        if ROW_THREADS == warp::LANES {
            return of_warp;
        }
        let of_warps = shared_array!(f32; WARPS as usize);
        if warp::lane_id() == 0 {
            of_warps.write(warp::warp_id(), of_warp);
        }
        // Hazard: each warp reads what the others write.
        thread::sync_threads();
        let mut result = of_warps.read(0);
        for warp in 1..WARPS {
            result = combine(result, of_warps.read(warp));
        }
        // Hazard: the next call writes what slower warps still read.
        thread::sync_threads();
        result
    }

    /// Bit `e`: whether the row sees key `key + e`. `key` is a multiple of the chunk.
    #[inline(always)]
    fn visible(&self, key: u32) -> u32 {
        let first_keys = |count: u32| (1 << count.min(T::ELEMENTS)) - 1;
        let by_position = first_keys(self.end - key) & !first_keys(self.begin.saturating_sub(key));
        by_position & self.policy.not_padding(key, T::ELEMENTS)
    }

    /// Loads the segment of `keys` keys from `start` on, hides what the row does not see,
    /// and returns the largest score of this thread, and whether the row sees any of its keys.
    #[inline(always)]
    fn load(&self, start: u32, keys: u32) -> (f32, bool) {
        // Hazard: the segment before may still be read while this one is written.
        Self::sync();
        let first = self.first + start as u64;
        if self.aligned {
            for key in (self.thread * T::ELEMENTS..keys).step_by(Self::STRIDE) {
                async_copy::copy(self.segment, key, self.scores, first + key as u64);
            }
            async_copy::commit();
            async_copy::wait::<0>();
        } else {
            // Neighbouring threads take neighbouring elements, to the end of the last chunk.
            let whole = keys.next_multiple_of(T::ELEMENTS);
            for key in (self.thread..whole).step_by(ROW_THREADS as usize) {
                let inside = key < keys;
                let score =
                    if inside { self.scores.read(first + key as u64) } else { T::from_f32(0.0) };
                self.segment.write(key, score);
            }
        }
        // Hazard: chunks are read by threads that did not write them.
        Self::sync();
        let (mut largest, mut seen) = (f32::NEG_INFINITY, 0);
        for key in (self.thread * T::ELEMENTS..keys).step_by(Self::STRIDE) {
            let mut s = T::unpack(self.segment.read_as(key));
            let visible = self.visible(start + key);
            seen |= visible;
            if Policy::shapes_scores() {
                unroll!(for E in 0..8 {
                    if E < T::ELEMENTS as usize {
                        let j = start + key + E as u32;
                        s[E] = self.policy.shape_score::<T>(s[E], STORED_UNIT, self.i, j)
                            / STORED_UNIT;
                    }
                });
            }
            if Policy::shapes_scores() || visible != const { (1 << T::ELEMENTS) - 1 } {
                unroll!(for E in 0..8 {
                    if visible >> E & 1 == 0 {
                        s[E] = f32::NEG_INFINITY;
                    }
                });
                self.segment.write_as(key, T::pack(s));
            }
            unroll!(for E in 0..8 {
                if E < T::ELEMENTS as usize {
                    largest = math::max(largest, s[E]);
                }
            });
        }
        (largest, seen != 0)
    }

    /// `exp(s - m)` of the chunk at `key` of the segment.
    #[inline(always)]
    fn exponentials(&self, key: u32, m: f32) -> [f32; MAX_ELEMENTS] {
        let s = T::unpack(self.segment.read_as(key));
        s.map(|s| exp(s - m))
    }

    /// Stores the chunk at `key` of the segment that begins at `start`; puts it into the segment
    /// first where the row's chunks do not lie as memory wants them.
    #[inline(always)]
    fn store(&self, start: u32, key: u32, p: [f32; MAX_ELEMENTS]) {
        if self.aligned {
            self.weights.write_as(self.first + (start + key) as u64, T::pack(p));
        } else {
            self.segment.write_as(key, T::pack(p));
        }
    }
}

/// `P = softmax(S)` in place, and the log-sum-exp of each row; then dropout.
///
/// # Layout
/// `weights: [B, H, Nq, Nk]`, `lse: [B, H, Nq]`.
///
/// # Thread mapping
/// ROW_THREADS threads per row, a warp or the whole block; `x` counts groups of rows, head after
/// head.
///
/// # Shared memory
/// Dynamic, [`shared_bytes`]: a segment for each row. Static: what the warps of a row exchange.
///
/// # Safety
/// The buffers of `args` must have these shapes; [`scores`](super::scores) must have run.
#[inline(always)]
pub unsafe fn softmax_rows<T: Chunk, const ROW_THREADS: u32>(args: &AttentionArgs) {
    const { assert!(ROW_THREADS == warp::LANES || ROW_THREADS == THREADS) };

    // Who am I.
    let rows = THREADS / ROW_THREADS;
    let (head, group) = Head::of_block(args, args.shape.seq_q.div_ceil(rows));
    let tid = thread::thread_idx_x();
    let row_in_block = tid / ROW_THREADS;
    let i = group * rows + row_in_block;
    if i >= head.seq_q {
        return; // All threads of the row leave: its barriers need all of them.
    }
    let segment = segment_keys(head.seq_k, T::BYTES);
    // SAFETY: the buffers have the shapes stated above, and the launch gives the shared memory.
    let (row, lse) = unsafe {
        let policy = Policy::new(args, head);
        let row = Row::<T, ROW_THREADS> {
            policy,
            scores: args.scratch.weights.view::<T>(),
            weights: args.scratch.weights.view_mut::<T>(),
            first: head.weight(i, 0),
            segment: Shared::dynamic(row_in_block * segment * T::BYTES, segment),
            aligned: head.weight_matrix::<T>(args).is_aligned(),
            thread: tid % ROW_THREADS,
            i,
            begin: policy.begin_of_row(i),
            end: policy.end_of_row(i),
        };
        (row, args.tensors.lse.view_mut::<f32>())
    };

    // Maximum and sum.
    let (mut m_i, mut l_i, mut seen) = (f32::NEG_INFINITY, 0.0, false);
    // The segment of the first key that the row sees.
    let first = if Policy::is_left_bounded() { divide(row.begin, segment).0 * segment } else { 0 };
    let mut start = first;
    while start < row.end {
        let keys = (row.end - start).min(segment);
        let (largest, seen_here) = row.load(start, keys);
        seen |= seen_here;
        let largest = warp::reduce_max::<32>(largest);
        let m_new = math::max(m_i, Row::<T, ROW_THREADS>::combine(largest, math::max));
        let m_used = safe_max(m_new);
        l_i *= exp(m_i - m_used);
        m_i = m_new;
        for key in (row.thread * T::ELEMENTS..keys).step_by(Row::<T, ROW_THREADS>::STRIDE) {
            let p = row.exponentials(key, m_used);
            unroll!(for E in 0..8 {
                if E < T::ELEMENTS as usize {
                    l_i += p[E];
                }
            });
        }
        start += segment;
    }
    let l_i = Row::<T, ROW_THREADS>::combine(warp::reduce_add::<32>(l_i), |a, b| a + b);
    // The same sum in all threads of the row: all of them ask, or none.
    let l_i = checked_sum(l_i, || {
        // A bias may have hidden all.
        let seen = if warp::any(seen && !Policy::is_biased()) { 1.0 } else { 0.0 };
        Row::<T, ROW_THREADS>::combine(seen, math::max) > 0.0
    });

    // Weights, in the place of the scores.
    let m_used = safe_max(m_i);
    let (m_lse, l_lse, factor) = row.policy.with_sink(m_i * const { STORED_UNIT * LOG2_E }, l_i);
    let normaliser = normaliser(l_lse) * factor;
    // The only segment is still there, unless earlier segments were written through its memory.
    let again = row.end > first + segment || first > 0;
    let mut start = 0;
    while start < head.seq_k {
        let visible = first <= start && start < row.end;
        if again && visible {
            let _ = row.load(start, (row.end - start).min(segment));
        }
        let keys = (head.seq_k - start).min(segment);
        for key in (row.thread * T::ELEMENTS..keys).step_by(Row::<T, ROW_THREADS>::STRIDE) {
            let mut p = [0.0; MAX_ELEMENTS];
            if visible && start + key < row.end {
                p = row.exponentials(key, m_used).map(|p| p * normaliser);
                drop_weights::<T>(&row.policy, i, start + key, &mut p);
            }
            row.store(start, key, p);
        }
        if !row.aligned {
            // Hazard: elements are read by threads that did not write them.
            Row::<T, ROW_THREADS>::sync();
            for key in (row.thread..keys).step_by(ROW_THREADS as usize) {
                row.weights.write(row.first + (start + key) as u64, row.segment.read(key));
            }
            // Hazard: a further segment that the row sees nothing of is not loaded, and is
            // written where slower threads still read this one.
            Row::<T, ROW_THREADS>::sync();
        }
        start += segment;
    }
    if row.thread == 0 {
        let value = if Policy::has_sink() {
            log_sum_exp(m_lse, l_lse)
        } else {
            log_sum_exp_natural(m_i * STORED_UNIT, l_i)
        };
        lse.write(head.row(i), value);
    }
}

/// Sets dropped weights to 0 and scales the others up. `key` is a multiple of the chunk.
#[inline(always)]
fn drop_weights<T: Chunk>(policy: &Policy, i: u32, key: u32, p: &mut [f32; MAX_ELEMENTS]) {
    unroll!(for FOUR in 0..2 {
        if FOUR < T::ELEMENTS as usize / 4 {
            let of_four = [0, 1, 2, 3].map(|e: usize| p[4 * FOUR + e]);
            let kept = policy.kept_four(i, key + 4 * FOUR as u32, of_four);
            unroll!(for E in 0..4 {
                p[4 * FOUR + E] = kept[E];
            });
        }
    });
}

entries! {
    /// Instances of [`softmax_rows`] with one warp per row.
    pub static OF_WARP: AttentionArgs => "sm_80", threads THREADS, min_blocks 6;
    standard_softmax: T in [f32, f16, bf16], "_warp" = softmax_rows::<T, { warp::LANES }>;
}
entries! {
    /// Instances of [`softmax_rows`] with one block per row.
    pub static OF_BLOCK: AttentionArgs => "sm_80", threads THREADS, min_blocks 6;
    standard_softmax: T in [f32, f16, bf16], "_block" = softmax_rows::<T, THREADS>;
}
