//! One call of attention on the CPU: its tensors, its sequences, and the changes to a score.

use std::ops::Range;

use flash_attention::{Alibi, Bias, Problem, Window, problem::Sequence};
use kernels_gpu::{args::DropoutArgs, parts::dropout::draws};

use super::{
    element::Element,
    math::{exp2, tanh},
    matmul::Mat,
};

/// A range in parts of `size`; the last may be shorter.
pub fn parts(of: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    of.clone().step_by(size).map(move |start| start..(start + size).min(of.end))
}

/// A tensor `[B, H, N, D]` seen through strides; a row's D elements are contiguous.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a, T> {
    /// The elements, from the first on.
    pub data: &'a [T],
    /// Elements from one batch entry, head and row to the next.
    pub strides: [usize; 3],
    /// D.
    pub d: usize,
}

impl<'a, T: Element> Rows<'a, T> {
    /// The D elements of a row.
    pub fn row(&self, b: usize, h: usize, n: usize) -> &'a [T] {
        let [stride_b, stride_h, stride_n] = self.strides;
        let first = b * stride_b + h * stride_h + n * stride_n;
        &self.data[first..first + self.d]
    }

    /// Rows of a head as a matrix in f32: where they lie, or widened into `scratch`.
    pub fn block<'b>(
        &self,
        b: usize,
        h: usize,
        rows: Range<usize>,
        scratch: &'b mut Vec<f32>,
    ) -> Mat<'b>
    where
        'a: 'b,
    {
        let [stride_b, stride_h, stride_n] = self.strides;
        let first = b * stride_b + h * stride_h + rows.start * stride_n;
        if let Some(numbers) = T::as_f32(self.data) {
            return Mat::new(&numbers[first.min(numbers.len())..], rows.len(), self.d, stride_n);
        }
        scratch.resize(rows.len() * self.d, 0.0);
        for (n, to) in rows.clone().zip(scratch.chunks_exact_mut(self.d)) {
            T::widen(self.row(b, h, n), to);
        }
        Mat::new(scratch, rows.len(), self.d, self.d)
    }
}

/// The tensors of a call beside Q, K and V; the problem says which exist.
#[derive(Clone, Debug)]
pub struct Beside<'a, T> {
    /// Padding mask `[B, Nk]`, 0 = hidden.
    pub mask: Option<Vec<u8>>,
    /// Slopes of ALiBi, `[H]` or `[B, H]`.
    pub alibi_slopes: Option<Vec<f32>>,
    /// Additive bias `[B, H, Nq, Nk]` as rows of Nk; a repeated dimension has stride 0.
    pub bias: Option<Rows<'a, T>>,
    /// Sinks, `[H]`.
    pub sinks: Option<Vec<f32>>,
}

/// The inputs of a call.
#[derive(Debug)]
pub struct Call<'a, T> {
    /// The problem.
    pub problem: Problem,
    /// Queries.
    pub q: Rows<'a, T>,
    /// Keys.
    pub k: Rows<'a, T>,
    /// Values.
    pub v: Rows<'a, T>,
    /// The other tensors.
    pub beside: Beside<'a, T>,
    /// The sequences, one for each batch entry of the problem.
    pub sequences: Vec<Sequence>,
    /// The pages of keys and values, if they are in pages.
    pub pages: Option<Pages>,
}

/// The pages of keys and values: K and V are `[pages, Hkv, page_size, D]`.
#[derive(Debug)]
pub struct Pages {
    /// The page numbers, sequence after sequence. Up to a sequence's last key they are valid.
    pub numbers: Vec<usize>,
    /// Page numbers of each sequence.
    pub per_sequence: usize,
    /// Keys of a page.
    pub page_size: usize,
}

impl Pages {
    /// Page, and place in it, of a key of a sequence.
    fn place(&self, sequence: usize, key: usize) -> (usize, usize) {
        let of_sequence = &self.numbers[sequence * self.per_sequence..][..self.per_sequence];
        (of_sequence[key / self.page_size], key % self.page_size)
    }
}

/// The queries of one sequence that share a head of K and V. They are rows of one matrix: row `r` is
/// query `r / group` of head `kv_head * group + r % group`, so that neighbours see the same keys.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    /// Number of the sequence: the batch entry of the problem.
    pub index: usize,
    /// Its rows and keys.
    pub of: Sequence,
    /// Head of K and V.
    pub kv_head: usize,
    /// Heads of Q that share it.
    pub heads: usize,
}

impl Group {
    /// Rows of the matrix.
    pub const fn rows(&self) -> usize {
        self.of.seq_q * self.heads
    }

    /// Head and query of a row.
    pub const fn place(&self, row: usize) -> (usize, usize) {
        (self.kv_head * self.heads + row % self.heads, row / self.heads)
    }

    /// Keys that a query sees by position.
    pub fn keys_of(&self, window: Window, query: usize) -> Range<usize> {
        let Sequence { seq_q, seq_k, .. } = self.of;
        // The keys at and before its own position; negative before the first key.
        let own = query as i64 + seq_k as i64 - seq_q as i64;
        let within = |at: i64| at.clamp(0, seq_k as i64) as usize;
        let first = window.left.map_or(0, |left| within(own - i64::from(left)));
        let end = window.right.map_or(seq_k, |right| within(own + i64::from(right) + 1));
        first..end.max(first)
    }

    /// Keys that any of these rows sees by position.
    pub fn keys_of_rows(&self, window: Window, rows: Range<usize>) -> Range<usize> {
        let (_, first) = self.place(rows.start);
        let (_, last) = self.place(rows.end - 1);
        let (first, last) = (self.keys_of(window, first), self.keys_of(window, last));
        first.start..last.end.max(first.start)
    }
}

impl<T: Element> Call<'_, T> {
    /// Every group of the call.
    pub fn groups(&self) -> Vec<Group> {
        let p = &self.problem;
        let of = |(index, &of): (usize, &Sequence)| {
            (0..p.kv_heads()).map(move |kv_head| Group { index, of, kv_head, heads: p.group() })
        };
        self.sequences.iter().enumerate().flat_map(of).collect()
    }

    /// Batch entry of a group's tensors in memory: packed sequences lie in one.
    pub fn batch_of(&self, group: &Group) -> usize {
        if self.problem.varlen().is_some() { 0 } else { group.index }
    }

    /// Rows of a group's Q, or of a tensor of its shape, in f32, one after the other.
    pub fn gather(
        &self,
        tensor: &Rows<'_, T>,
        group: &Group,
        rows: Range<usize>,
        to: &mut Vec<f32>,
    ) {
        to.resize(rows.len() * tensor.d, 0.0);
        for (row, to) in rows.zip(to.chunks_exact_mut(tensor.d)) {
            let (h, i) = group.place(row);
            T::widen(tensor.row(self.batch_of(group), h, group.of.first_q + i), to);
        }
    }

    /// First element of a row of O, or of a tensor of Q's rows that are `d` long, contiguous in the
    /// problem's layout.
    pub fn row_index(&self, group: &Group, row: usize, d: usize) -> usize {
        let [_, _, rows] = self.problem.lse_shape();
        let (h, i) = group.place(row);
        let place = [self.batch_of(group), h, group.of.first_q + i];
        let strides = self.problem.layout().strides(self.problem.heads(), rows, d);
        place.iter().zip(strides).map(|(at, stride)| at * stride).sum()
    }

    /// First element of a row of K or V that is `d` long, contiguous in the problem's layout.
    pub fn key_index(&self, group: &Group, key: usize, d: usize) -> usize {
        let p = &self.problem;
        let rows = p.varlen().map_or(p.seq_k(), |varlen| varlen.total_k);
        let place = [self.batch_of(group), group.kv_head, group.of.first_k + key];
        let strides = p.layout().strides(p.kv_heads(), rows, d);
        place.iter().zip(strides).map(|(at, stride)| at * stride).sum()
    }

    /// First element of a row of a contiguous bias.
    pub fn bias_index(&self, group: &Group, row: usize) -> usize {
        let p = &self.problem;
        let Some(Bias { per_batch, per_head }) = p.bias() else { return 0 };
        let (h, i) = group.place(row);
        let b = if per_batch { group.index } else { 0 };
        let (h, heads) = if per_head { (h, p.heads()) } else { (0, 1) };
        ((b * heads + h) * p.seq_q() + i) * p.seq_k()
    }

    /// Place of a row in the LSE, `[B, H, Nq]` or `[H, total_q]`.
    pub fn lse_index(&self, group: &Group, row: usize) -> usize {
        let [_, heads, rows] = self.problem.lse_shape();
        let (h, i) = group.place(row);
        (self.batch_of(group) * heads + h) * rows + group.of.first_q + i
    }

    /// Block of keys or values of a group.
    pub fn keys<'b>(
        &'b self,
        tensor: &Rows<'b, T>,
        group: &Group,
        keys: Range<usize>,
        scratch: &'b mut Vec<f32>,
    ) -> Mat<'b> {
        if let Some(pages) = &self.pages {
            scratch.resize(keys.len() * tensor.d, 0.0);
            for (key, to) in keys.clone().zip(scratch.chunks_exact_mut(tensor.d)) {
                let (page, at) = pages.place(group.index, key);
                T::widen(tensor.row(page, group.kv_head, at), to);
            }
            return Mat::new(scratch, keys.len(), tensor.d, tensor.d);
        }
        let first = group.of.first_k;
        let keys = first + keys.start..first + keys.end;
        tensor.block(self.batch_of(group), group.kv_head, keys, scratch)
    }

    /// The changes to the scores of one row.
    pub fn row_scores(&self, group: &Group, row: usize) -> RowScores<'_, T> {
        let p = &self.problem;
        let (h, i) = group.place(row);
        let slope = self.beside.alibi_slopes.as_ref().map_or(0.0, |slopes| match p.alibi() {
            Some(Alibi::PerBatchAndHead) => slopes[group.index * p.heads() + h],
            Some(Alibi::PerHead) | None => slopes[h],
        });
        RowScores {
            keys: group.keys_of(p.window(), i),
            own: i as f32 + group.of.seq_k as f32 - group.of.seq_q as f32,
            scale: p.scale(),
            softcap: p.softcap(),
            slope,
            bias: self.beside.bias.as_ref().map(|bias| bias.row(group.index, h, i)),
            mask: self.beside.mask.as_ref().map(|mask| &mask[group.index * p.seq_k()..]),
        }
    }

    /// Dropout of one row's weights.
    pub fn row_dropout(&self, group: &Group, row: usize) -> Option<RowDropout> {
        let (h, i) = group.place(row);
        let at = [group.index, h, i].map(|at| at as u32);
        self.problem.dropout().map(|_| RowDropout { dropout: self.problem.dropout_args(), at })
    }
}

/// The changes to the scores of one row.
#[derive(Debug)]
pub struct RowScores<'a, T> {
    /// Keys that the row sees by position.
    pub keys: Range<usize>,
    /// The key at the row's own position.
    own: f32,
    scale: f32,
    softcap: Option<f32>,
    slope: f32,
    /// The bias of all keys.
    bias: Option<&'a [T]>,
    /// The padding mask of all keys, 0 = hidden.
    mask: Option<&'a [u8]>,
}

impl<T: Element> RowScores<'_, T> {
    /// The part of `tile` that the row sees, from the first key of the tile on.
    pub fn seen(&self, tile: &Range<usize>) -> Range<usize> {
        let at = |key: usize| key.clamp(tile.start, tile.end) - tile.start;
        at(self.keys.start)..at(self.keys.end)
    }

    /// Makes base-2 scores of products `q · k` of the keys from `first` on, in place, and returns the
    /// largest. Where there is a cap, `capped` takes the cap's derivative at each, `1 - tanh²`.
    #[inline(always)]
    pub fn apply(&self, first: usize, s: &mut [f32], capped: Option<&mut [f32]>) -> f32 {
        use std::f32::consts::LOG2_E;
        let is_plain = self.softcap.is_none() && self.bias.is_none() && self.slope == 0.0;
        if is_plain {
            let scale = (f64::from(self.scale) * std::f64::consts::LOG2_E) as f32;
            s.iter_mut().for_each(|s| *s *= scale);
        } else {
            match (self.softcap, capped) {
                (Some(cap), Some(derivatives)) => {
                    let inner = self.scale / cap;
                    for (s, derivative) in s.iter_mut().zip(derivatives) {
                        let t = tanh(*s * inner);
                        (*s, *derivative) = (cap * t, (1.0 - t) * (1.0 + t));
                    }
                }
                (Some(cap), None) => {
                    let inner = self.scale / cap;
                    s.iter_mut().for_each(|s| *s = cap * tanh(*s * inner));
                }
                (None, _) => s.iter_mut().for_each(|s| *s *= self.scale),
            }
            if self.slope != 0.0 {
                let distance = self.own - first as f32;
                for (j, s) in s.iter_mut().enumerate() {
                    *s -= self.slope * (distance - j as f32).abs();
                }
            }
            if let Some(bias) = self.bias {
                let mut numbers = [0.0; 64];
                let bias = &bias[first..first + s.len()];
                for (s, bias) in s.chunks_mut(64).zip(bias.chunks(64)) {
                    T::widen(bias, &mut numbers[..bias.len()]);
                    s.iter_mut().zip(&numbers).for_each(|(s, bias)| *s += bias);
                }
            }
            s.iter_mut().for_each(|s| *s *= LOG2_E);
        }
        if let Some(mask) = self.mask {
            for (s, &mask) in s.iter_mut().zip(&mask[first..]) {
                *s = if mask == 0 { f32::NEG_INFINITY } else { *s };
            }
        }
        max(s)
    }
}

/// Dropout of one row's weights.
#[derive(Clone, Copy, Debug)]
pub struct RowDropout {
    dropout: DropoutArgs,
    /// Batch entry, head and row.
    at: [u32; 3],
}

impl RowDropout {
    /// Drops weights of the keys from `first` on, and scales the others up.
    pub fn apply(&self, first: usize, weights: &mut [f32]) {
        let DropoutArgs { seed, threshold, rescale, .. } = self.dropout;
        let [b, h, i] = self.at;
        let mut four = draws(seed, b, h, i, first as u32 / 4);
        for (j, weight) in (first..).zip(weights) {
            if j % 4 == 0 {
                four = draws(seed, b, h, i, j as u32 / 4);
            }
            *weight = if four[j % 4] >= threshold { *weight * rescale } else { 0.0 };
        }
    }
}

/// Numbers that a loop handles at once, at any width of a vector.
const LANES: usize = 16;

/// The largest number; -inf of none. NaN does not count.
#[inline(always)]
fn max(numbers: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (whole, rest) = numbers.as_chunks::<LANES>();
    for chunk in whole {
        for (lane, &number) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, number);
        }
    }
    lanes.into_iter().chain(rest.iter().copied()).fold(f32::NEG_INFINITY, larger)
}

/// Replaces base-2 scores by `2^(s - m)`, and gives their sum.
#[inline(always)]
pub fn exponentials(s: &mut [f32], m: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (whole, rest) = s.as_chunks_mut::<LANES>();
    for chunk in whole {
        for (lane, s) in lanes.iter_mut().zip(chunk) {
            *s = exp2(*s - m);
            *lane += *s;
        }
    }
    let mut sum = lanes.iter().sum();
    for s in rest {
        *s = exp2(*s - m);
        sum += *s;
    }
    sum
}
