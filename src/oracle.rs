//! The expected results of attention: a reference in f64, and the plain algorithm in the storage
//! precision, whose error is the yardstick for every kernel (see [`verify`](crate::verify)).
//!
//! Both follow the same rules as the kernels: hidden keys have weight 0, a row that sees no key has
//! O = 0 and LSE = -inf, or its sink; dropout draws by position. The oracle scales a score, caps
//! it, then adds ALiBi and the bias; a bias of -inf hides its key.

use kernels_gpu::{args::DropoutArgs, parts::dropout};
use rayon::prelude::*;

use crate::{
    dtype::DType,
    problem::{Alibi, Problem, Sequence},
    session::{Inputs, Outputs},
    tensor::Tensor,
};

mod backward;
mod decode;

pub use backward::{
    Gradients, absolute_gradients, all_heads, gradients, gradients_of, plain_gradients,
    plain_gradients_with_f32_scores, whole_biases, whole_sinks,
};
pub(crate) use backward::{
    Rounded, absolute_gradients_of, gradients_of_values, plain_gradients_of,
};
pub use decode::Gathered;

/// Keys whose scores are summed side by side, to hide the latency of an addition.
const CHAINS: usize = 8;

/// O and LSE of some rows, widened to f64.
#[derive(Clone, Debug, PartialEq)]
pub struct Rows {
    /// O, `head_dim_v` elements per row.
    pub o: Vec<f64>,
    /// Log-sum-exp of each row.
    pub lse: Vec<f64>,
}

/// Every row of a problem: row `(b * H + h) * Nq + i`; for packed sequences, `h * total_q` plus the
/// row in Q. Here rows beyond the last sequence see no key; kernels leave them unchanged.
#[must_use]
pub fn all_rows(problem: &Problem) -> Vec<usize> {
    (0..problem.rows()).collect()
}

/// At most `count` rows, spread evenly over batch entries, heads and positions; the
/// first and the last are among them.
#[must_use]
pub fn sample_rows(problem: &Problem, count: usize) -> Vec<usize> {
    let rows = problem.rows();
    if count >= rows {
        return all_rows(problem);
    }
    let last = count.saturating_sub(1).max(1) as u128;
    (0..count).map(|i| (i as u128 * (rows as u128 - 1) / last) as usize).collect()
}

/// The rows of a kernel's outputs.
#[must_use]
pub fn rows_of(problem: &Problem, outputs: &Outputs, rows: &[usize]) -> Rows {
    let o = View::new(problem, outputs.o.to_f32(), problem.o_extents());
    let lse = outputs.lse.to_f32();
    let mut result = Rows { o: Vec::new(), lse: Vec::new() };
    for &row in rows {
        let (b, h, i) = place(problem, row);
        result.o.extend(o.row(b, h, i).iter().map(|&x| f64::from(x)));
        result.lse.push(f64::from(lse[row]));
    }
    result
}

/// Attention in f64: the oracle takes the inputs as stored, and rounds only as f64 rounds.
#[must_use]
pub fn reference(problem: &Problem, inputs: &Inputs<'_>, rows: &[usize]) -> Rows {
    let values = [inputs.q, inputs.k, inputs.v].map(Tensor::to_f32);
    reference_of(problem, values, Beside::of(inputs), rows)
}

/// [`reference()`] of q, k and v in no storage type: the projections of a module.
pub(crate) fn reference_of<T: Copy + Into<f64> + Sync>(
    problem: &Problem,
    qkv: [Vec<T>; 3],
    beside: Beside<'_>,
    rows: &[usize],
) -> Rows {
    let case = Case::new(problem, qkv, beside);
    collect(rows, |row| case.reference_row(row))
}

/// The plain algorithm in the storage precision: `S = Q Kᵀ * scale` rounded to the storage type, as
/// is every step that follows (quotient, tanh and product of a cap, the sum with ALiBi's term, the
/// sum with the bias), `P = softmax(S)` computed in f32 and rounded, `O = P V` accumulated in f32
/// and rounded. A framework without a fused kernel computes this way. LSE in f32, from the rounded
/// S.
#[must_use]
pub fn plain(problem: &Problem, inputs: &Inputs<'_>, rows: &[usize]) -> Rows {
    let values = [inputs.q, inputs.k, inputs.v].map(Tensor::to_f32);
    plain_of(problem, problem.dtype(), values, Beside::of(inputs), rows)
}

/// [`plain`] with S in f32, for scores that the storage type cannot hold; P and O are rounded to
/// the storage type.
#[must_use]
pub fn plain_with_f32_scores(problem: &Problem, inputs: &Inputs<'_>, rows: &[usize]) -> Rows {
    let values = [inputs.q, inputs.k, inputs.v].map(Tensor::to_f32);
    plain_of(problem, DType::F32, values, Beside::of(inputs), rows)
}

/// [`plain`] of values of the storage type, with S of type `scores`.
pub(crate) fn plain_of(
    problem: &Problem,
    scores: DType,
    qkv: [Vec<f32>; 3],
    beside: Beside<'_>,
    rows: &[usize],
) -> Rows {
    let case = Case::new(problem, qkv, beside);
    collect(rows, |row| case.plain_row(row, scores))
}

/// The absolute terms of each row's scores: `scale * sum over d of |q_d k_jd|`, the mean over the
/// keys `j` with the attention weights. Where products cancel, it is larger than any score. A cap
/// keeps the share of it that gets through, and adds the capped score; ALiBi's term and the bias
/// add their absolute values. `lse`: the LSE of the same rows, from [`reference()`].
#[must_use]
pub fn absolute_scores(
    problem: &Problem,
    inputs: &Inputs<'_>,
    rows: &[usize],
    lse: &[f64],
) -> Vec<f64> {
    let values = [inputs.q, inputs.k, inputs.v].map(Tensor::to_f32);
    let case = Case::new(problem, values, Beside::of(inputs));
    let of_row = |(&row, &lse)| case.absolute_score(row, lse);
    rows.par_iter().zip(lse).map(of_row).collect()
}

fn collect(rows: &[usize], compute: impl Fn(usize) -> (Vec<f64>, f64) + Sync) -> Rows {
    let computed: Vec<_> = rows.par_iter().map(|&row| compute(row)).collect();
    let mut result = Rows { o: Vec::new(), lse: Vec::with_capacity(rows.len()) };
    for (o, lse) in computed {
        result.o.extend(o);
        result.lse.push(lse);
    }
    result
}

/// Batch entry, head and row of Q in memory, where packed sequences are one batch entry.
fn place(problem: &Problem, row: usize) -> (usize, usize, usize) {
    let [_, heads, rows, _] = problem.q_extents();
    let (bh, i) = (row / rows, row % rows);
    (bh / heads, bh % heads, i)
}

/// A row of Q, and its sequence.
#[derive(Clone, Copy)]
struct Row {
    /// Batch entry: the sequence.
    b: usize,
    h: usize,
    /// The row, counted from the sequence's first.
    i: usize,
    of: Sequence,
    /// Batch entry in memory.
    entry: usize,
}

/// A tensor seen as rows, whatever its layout. f32 holds every storage type exactly.
struct View<T> {
    values: Vec<T>,
    strides: [usize; 3],
    head_dim: usize,
}

impl<T> View<T> {
    fn new(problem: &Problem, values: Vec<T>, [_, heads, seq, head_dim]: [usize; 4]) -> Self {
        let strides = problem.layout().strides(heads, seq, head_dim);
        Self { values, strides, head_dim }
    }

    fn row(&self, b: usize, h: usize, n: usize) -> &[T] {
        let start = b * self.strides[0] + h * self.strides[1] + n * self.strides[2];
        &self.values[start..start + self.head_dim]
    }
}

/// The tensors of a problem beside Q, K and V. f32 holds every storage type exactly.
#[derive(Default)]
pub(crate) struct Beside<'a> {
    pub mask: Option<&'a [u8]>,
    pub alibi_slopes: Option<Vec<f32>>,
    pub bias: Option<Vec<f32>>,
    pub sinks: Option<Vec<f32>>,
    /// The start offsets of packed sequences in Q, and in K and V.
    pub cu_seqlens: Option<[&'a [u32]; 2]>,
}

impl<'a> Beside<'a> {
    fn of(inputs: &Inputs<'a>) -> Self {
        let [alibi_slopes, bias, sinks] = [inputs.alibi_slopes, inputs.bias, inputs.sinks]
            .map(|tensor| tensor.map(Tensor::to_f32));
        Self { mask: inputs.mask, alibi_slopes, bias, sinks, cu_seqlens: inputs.cu_seqlens() }
    }
}

/// Sequence `b` of a problem, and its batch entry in memory.
fn sequence(p: &Problem, cu_seqlens: Option<[&[u32]; 2]>, b: usize) -> (Sequence, usize) {
    match cu_seqlens {
        Some([q, k]) => (Sequence::at(q, k, b), 0),
        None => (Sequence { first_q: 0, seq_q: p.seq_q(), first_k: 0, seq_k: p.seq_k() }, b),
    }
}

struct Case<'a, T> {
    problem: &'a Problem,
    beside: Beside<'a>,
    q: View<T>,
    k: View<T>,
    v: View<T>,
    dropout: DropoutArgs,
}

impl<'a, T: Copy + Into<f64>> Case<'a, T> {
    fn new(problem: &'a Problem, [q, k, v]: [Vec<T>; 3], beside: Beside<'a>) -> Self {
        Self {
            problem,
            beside,
            q: View::new(problem, q, problem.q_extents()),
            k: View::new(problem, k, problem.k_extents()),
            v: View::new(problem, v, problem.v_extents()),
            dropout: problem.dropout_args(),
        }
    }

    /// Row `i` of head `h` of sequence `b`.
    fn row_at(&self, b: usize, h: usize, i: usize) -> Row {
        let (of, entry) = sequence(self.problem, self.beside.cu_seqlens, b);
        Row { b, h, i, of, entry }
    }

    /// A row of Q. A row beyond the last packed sequence belongs to an empty sequence.
    fn row(&self, row: usize) -> Row {
        let (entry, h, i) = place(self.problem, row);
        let Some([q, k]) = self.beside.cu_seqlens else { return self.row_at(entry, h, i) };
        let mut all = Sequence::all(q, k).enumerate();
        let has = |of: &Sequence| (of.first_q..of.first_q + of.seq_q).contains(&i);
        match all.find(|(_, of)| has(of)) {
            Some((b, of)) => Row { b, h, i: i - of.first_q, of, entry },
            None => {
                let of = Sequence { first_q: i, seq_q: 1, first_k: 0, seq_k: 0 };
                Row { b: 0, h, i: 0, of, entry }
            }
        }
    }

    /// The keys that a row sees, ascending.
    fn seen(&self, row: Row) -> Vec<usize> {
        let Row { b, i, of, .. } = row;
        let window = self.problem.window();
        let visible = |&j: &usize| {
            window.sees(i, j, of.seq_q, of.seq_k)
                && self.beside.mask.is_none_or(|mask| mask[b * of.seq_k + j] != 0)
                && self.bias(row, j) != f32::NEG_INFINITY
        };
        (0..of.seq_k).filter(visible).collect()
    }

    fn q(&self, row: Row) -> &[T] {
        self.q.row(row.entry, row.h, row.of.first_q + row.i)
    }

    /// Row `j` of K for a row of Q.
    fn k(&self, row: Row, j: usize) -> &[T] {
        self.k.row(row.entry, row.h / self.problem.group(), row.of.first_k + j)
    }

    /// Row `j` of V for a row of Q.
    fn v(&self, row: Row, j: usize) -> &[T] {
        self.v.row(row.entry, row.h / self.problem.group(), row.of.first_k + j)
    }

    /// ALiBi's term, subtracted from a score: 0 without ALiBi.
    fn alibi(&self, Row { b, h, i, of, .. }: Row, j: usize) -> f64 {
        let Some(slopes) = &self.beside.alibi_slopes else { return 0.0 };
        let p = self.problem;
        let entry = if p.alibi() == Some(Alibi::PerBatchAndHead) { b * p.heads() } else { 0 };
        let distance = (i + of.seq_k).abs_diff(of.seq_q + j);
        f64::from(slopes[entry + h]) * distance as f64
    }

    /// The bias of a score: 0 without a bias.
    fn bias(&self, Row { b, h, i, .. }: Row, j: usize) -> f32 {
        let (Some(values), Some(bias)) = (&self.beside.bias, self.problem.bias()) else {
            return 0.0;
        };
        let p = self.problem;
        let (b, h) = (b * usize::from(bias.per_batch), h * usize::from(bias.per_head));
        let heads = if bias.per_head { p.heads() } else { 1 };
        values[((b * heads + h) * p.seq_q() + i) * p.seq_k() + j]
    }

    /// The sink of a head: -inf without sinks.
    fn sink(&self, h: usize) -> f32 {
        self.beside.sinks.as_ref().map_or(f32::NEG_INFINITY, |sinks| sinks[h])
    }

    /// The score of a scaled product.
    fn score(&self, s: f64, row: Row, j: usize) -> f64 {
        let capped = self.problem.softcap().map_or(s, |cap| {
            let cap = f64::from(cap);
            cap * (s / cap).tanh()
        });
        capped - self.alibi(row, j) + f64::from(self.bias(row, j))
    }

    /// Dropout's factor for the weight of key `j`: 0 or the rescale; 1 without dropout.
    fn kept(&self, Row { b, h, i, .. }: Row, j: usize) -> f32 {
        if self.dropout.threshold == 0 {
            return 1.0;
        }
        let keeps = dropout::keeps(&self.dropout, b as u32, h as u32, i as u32, j as u32);
        if keeps { self.dropout.rescale } else { 0.0 }
    }

    fn reference_row(&self, row: usize) -> (Vec<f64>, f64) {
        let row = self.row(row);
        let mut o = vec![0.0; self.problem.head_dim_v()];
        let (seen, sink) = (self.seen(row), f64::from(self.sink(row.h)));
        if seen.is_empty() {
            return (o, sink);
        }
        let scale = f64::from(self.problem.scale());
        let q: Vec<f64> = self.q(row).iter().map(|&x| x.into()).collect();
        let score = |&j: &usize| self.score(scale * dot_f64(&q, self.k(row, j)), row, j);
        let scores: Vec<f64> = seen.iter().map(score).collect();
        let max = scores.iter().copied().fold(sink, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let sum = weights.iter().sum::<f64>() + (sink - max).exp();
        for (&j, weight) in seen.iter().zip(&weights) {
            let weight = weight / sum * f64::from(self.kept(row, j));
            for (o, &v) in o.iter_mut().zip(self.v(row, j)) {
                *o += weight * v.into();
            }
        }
        (o, max + sum.ln())
    }
}

impl Case<'_, f32> {
    /// One row of [`absolute_scores`].
    fn absolute_score(&self, row: usize, lse: f64) -> f64 {
        let row = self.row(row);
        let scale = f64::from(self.problem.scale());
        let q: Vec<f64> = self.q(row).iter().map(|&x| x.into()).collect();
        let absolute_q: Vec<f64> = q.iter().map(|x| x.abs()).collect();
        let of_key = |j| {
            let k = self.k(row, j);
            let absolute_k: Vec<f32> = k.iter().map(|x| x.abs()).collect();
            let s = scale * dot_f64(&q, k);
            let mut absolute = scale.abs() * dot_f64(&absolute_q, &absolute_k);
            if let Some(cap) = self.problem.softcap().map(f64::from) {
                let tanh = (s / cap).tanh();
                absolute = absolute * (1.0 - tanh * tanh) + cap * tanh.abs();
            }
            absolute += self.alibi(row, j).abs() + f64::from(self.bias(row, j).abs());
            (self.score(s, row, j) - lse).exp() * absolute
        };
        let sink = f64::from(self.sink(row.h));
        let of_sink = if sink.is_finite() { (sink - lse).exp() * sink.abs() } else { 0.0 };
        self.seen(row).into_iter().map(of_key).sum::<f64>() + of_sink
    }

    /// [`Case::score`] with every step rounded, as in a framework.
    fn plain_score(&self, dtype: DType, s: f32, row: Row, j: usize) -> f32 {
        let rounded = |x| round(dtype, x);
        let mut score = s;
        if let Some(cap) = self.problem.softcap() {
            score = rounded(rounded(rounded(s / cap).tanh()) * cap);
        }
        if self.beside.alibi_slopes.is_some() {
            score = rounded(score - self.alibi(row, j) as f32);
        }
        if self.beside.bias.is_some() {
            score = rounded(score + self.bias(row, j));
        }
        score
    }

    fn plain_row(&self, row: usize, score_type: DType) -> (Vec<f64>, f64) {
        let row = self.row(row);
        let mut o = vec![0.0f32; self.problem.head_dim_v()];
        let (seen, sink) = (self.seen(row), self.sink(row.h));
        if seen.is_empty() {
            return (o.iter().map(|&x| f64::from(x)).collect(), f64::from(sink));
        }
        let dtype = self.problem.dtype();
        let scale = self.problem.scale();
        let q = self.q(row);
        let mut scores = Vec::with_capacity(seen.len());
        for keys in seen.chunks(CHAINS) {
            // Keys that are missing in the last chunk are computed and left out.
            let k: [&[f32]; CHAINS] =
                std::array::from_fn(|c| self.k(row, keys[c.min(keys.len() - 1)]));
            let sums = dots_f32(q, k);
            let scaled = sums.iter().map(|s| round(score_type, s * scale));
            let joined = |(s, &j)| self.plain_score(score_type, s, row, j);
            scores.extend(scaled.zip(keys).map(joined));
        }
        let max = scores.iter().copied().fold(sink, f32::max);
        let weights: Vec<f32> = scores.iter().map(|s| (s - max).exp()).collect();
        let sum = weights.iter().sum::<f32>() + (sink - max).exp();
        for (&j, weight) in seen.iter().zip(&weights) {
            let mut p = round(dtype, weight / sum);
            if self.dropout.threshold != 0 {
                p = round(dtype, p * self.kept(row, j));
            }
            for (o, &v) in o.iter_mut().zip(self.v(row, j)) {
                *o += p * v;
            }
        }
        let o = o.iter().map(|&x| f64::from(round(dtype, x))).collect();
        (o, f64::from(max + sum.ln()))
    }
}

/// A dot product in f64, in several partial sums.
fn dot_f64<T: Copy + Into<f64>>(q: &[f64], k: &[T]) -> f64 {
    let mut sums = [0.0; CHAINS];
    let mut add = |q: &[f64], k: &[T]| {
        for ((sum, &q), &k) in sums.iter_mut().zip(q).zip(k) {
            *sum += q * k.into();
        }
    };
    // Whole chunks have a constant length, which vectors have too.
    let ((q, q_rest), (k, k_rest)) = (q.as_chunks::<CHAINS>(), k.as_chunks::<CHAINS>());
    q.iter().zip(k).for_each(|(q, k)| add(q, k));
    add(q_rest, k_rest);
    sums.iter().sum()
}

/// Dot products of one row with several keys, each summed in order, in f32.
fn dots_f32(q: &[f32], k: [&[f32]; CHAINS]) -> [f32; CHAINS] {
    let mut sums = [0.0; CHAINS];
    let k = k.map(|k| &k[..q.len()]);
    for (d, &q) in q.iter().enumerate() {
        for (sum, k) in sums.iter_mut().zip(k) {
            *sum += q * k[d];
        }
    }
    sums
}

pub(crate) fn round(dtype: DType, value: f32) -> f32 {
    match dtype {
        DType::F32 => value,
        DType::F16 => half::f16::from_f32(value).to_f32(),
        DType::BF16 => half::bf16::from_f32(value).to_f32(),
        DType::E4M3 => dtype.round(value.into()) as f32,
    }
}

#[cfg(test)]
mod tests {
    use approx::assert_abs_diff_eq;

    use super::*;
    use crate::problem::{Bias, Dropout, Layout};

    fn tensors(p: &Problem) -> [Tensor; 3] {
        let random = |shape: [usize; 4], seed| Tensor::random(p.dtype(), &shape, seed, 0.0);
        [random(p.q_shape(), 1), random(p.k_shape(), 2), random(p.k_shape(), 3)]
    }

    #[test]
    fn one_key_gives_its_value() {
        let p = Problem::builder(1, 2, 3, 4).seq_k(1).build().unwrap();
        let [q, k, v] = &tensors(&p);
        let rows = reference(&p, &Inputs::new(q, k, v), &all_rows(&p));
        for row in 0..p.rows() {
            for d in 0..4 {
                assert_eq!(rows.o[row * 4 + d], v.get(row / 3 * 4 + d));
            }
        }
    }

    #[test]
    fn absolute_scores_are_of_products_that_cancel() {
        let p =
            Problem::builder(1, 1, 2, 2).seq_k(2).causal(true).scale(Some(0.5)).build().unwrap();
        let tensor =
            |values: [f64; 4]| Tensor::from_f64(DType::F32, &[1, 1, 2, 2], &values).unwrap();
        let (q, k) = (tensor([3.0, 4.0, 3.0, 4.0]), tensor([4.0, -3.0, -8.0, 6.0]));
        let inputs = Inputs::new(&q, &k, &k);
        let rows = [0, 1];
        let lse = reference(&p, &inputs, &rows).lse;
        // The scores are 0: products are 12 and -12, then -24 and 24, which weigh as much.
        assert_abs_diff_eq!(lse.as_slice(), [0.0, 2f64.ln()].as_slice(), epsilon = 1e-12);
        let absolute = absolute_scores(&p, &inputs, &rows, &lse);
        assert_abs_diff_eq!(absolute.as_slice(), [12.0, 18.0].as_slice(), epsilon = 1e-12);
    }

    #[test]
    fn equal_scores_give_the_mean_of_what_is_seen() {
        let p = Problem::builder(1, 1, 4, 8).causal(true).mask(true).build().unwrap();
        let [_, k, v] = &tensors(&p);
        let q = Tensor::zeros(DType::F32, &p.q_shape());
        let inputs = Inputs { mask: Some(&[0, 1, 1, 0]), ..Inputs::new(&q, k, v) };
        for rows in [reference(&p, &inputs, &all_rows(&p)), plain(&p, &inputs, &all_rows(&p))] {
            assert_eq!(rows.lse[0], f64::NEG_INFINITY);
            assert_eq!(&rows.o[..8], &[0.0; 8]);
            assert_eq!(rows.o[8], v.get(8));
            assert_abs_diff_eq!(rows.o[3 * 8], (v.get(8) + v.get(16)) / 2.0, epsilon = 1e-7);
            assert_abs_diff_eq!(rows.lse[3], 2f64.ln(), epsilon = 1e-7);
        }
    }

    #[test]
    fn the_layout_does_not_matter() {
        let p = Problem::builder(2, 3, 5, 4).build().unwrap();
        let [q, k, v] = &tensors(&p);
        let expected = reference(&p, &Inputs::new(q, k, v), &all_rows(&p));
        let p = p.to_builder().layout(Layout::TokensFirst).build().unwrap();
        let [q, k, v] = &[q, k, v].map(|t| t.swap_middle().unwrap());
        let inputs = Inputs::new(q, k, v);
        assert_eq!(reference(&p, &inputs, &all_rows(&p)), expected);
    }

    /// One key with the product 6: every step by hand.
    #[test]
    fn a_score_is_scaled_capped_and_joined_in_that_order() {
        let p = Problem::builder(2, 4, 3, 2).kv_heads(2).seq_k(1).scale(Some(0.5));
        let p = p.softcap(Some(2.0)).alibi(Some(Alibi::PerBatchAndHead)).sinks(true);
        let p = p.bias(Some(Bias { per_batch: true, per_head: false })).build().unwrap();
        let tensor = |shape: &[usize], value: fn(usize) -> f64| {
            let values: Vec<f64> = (0..shape.iter().product()).map(value).collect();
            Tensor::from_f64(DType::F32, shape, &values).unwrap()
        };
        let q = tensor(&p.q_shape(), |_| 3.0);
        let k = tensor(&p.k_shape(), |_| 1.0);
        let v = tensor(&p.k_shape(), |x| (1 + x / 2) as f64);
        let slopes = tensor(&[2, 4], |x| x as f64 / 4.0);
        let bias = tensor(&[2, 1, 3, 1], |x| if x == 4 { f64::NEG_INFINITY } else { x as f64 });
        let sinks = tensor(&[4], |h| if h == 3 { f64::NEG_INFINITY } else { h as f64 / 2.0 });
        let inputs = Inputs {
            alibi_slopes: Some(&slopes),
            bias: Some(&bias),
            sinks: Some(&sinks),
            ..Inputs::new(&q, &k, &v)
        };
        for rows in [reference(&p, &inputs, &all_rows(&p)), plain(&p, &inputs, &all_rows(&p))] {
            for row in 0..2 * 4 * 3 {
                let (b, h, i) = (row / 12, row / 3 % 4, row % 3);
                let distance = (2 - i) as f64;
                let score =
                    2.0 * 1.5f64.tanh() - (b * 4 + h) as f64 / 4.0 * distance + bias.get(b * 3 + i);
                let sum = score.exp() + sinks.get(h).exp();
                // Heads 0 and 1 use the first head of V, 2 and 3 the second.
                let value = (1 + b * 2 + h / 2) as f64;
                if sum == 0.0 {
                    assert_eq!(rows.lse[row], f64::NEG_INFINITY);
                } else {
                    assert_abs_diff_eq!(rows.lse[row], sum.ln(), epsilon = 1e-5);
                }
                let o = if sum == 0.0 { 0.0 } else { score.exp() / sum * value };
                assert_abs_diff_eq!(rows.o[row * 2], o, epsilon = 1e-5);
            }
        }
    }

    #[test]
    fn dropout_keeps_the_mean() {
        let p = Problem::builder(1, 1, 1, 4).seq_k(4000);
        let p = p.dropout(Some(Dropout { p: 0.5, seed: 7 })).build().unwrap();
        let q = Tensor::zeros(DType::F32, &p.q_shape());
        let v = Tensor::from_f64(DType::F32, &p.k_shape(), &vec![1.0; 16_000]).unwrap();
        let inputs = Inputs::new(&q, &v, &v);
        let o = reference(&p, &inputs, &[0]).o[0];
        // A sum of 4000 draws of 0 or 2, each with weight 1/4000: standard deviation 0.016.
        assert_abs_diff_eq!(o, 1.0, epsilon = 0.08);
        assert_ne!(o, 1.0);
    }

    #[test]
    fn rows_are_spread_evenly() {
        let p = Problem::builder(2, 3, 100, 4).build().unwrap();
        let rows = sample_rows(&p, 7);
        assert_eq!((rows.len(), rows[0], rows[6]), (7, 0, 599));
        assert_eq!(sample_rows(&p, 600), all_rows(&p));
        assert_eq!(sample_rows(&p, 1), [0]);
    }
}
