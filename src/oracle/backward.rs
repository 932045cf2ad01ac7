//! The expected results of the backward pass: gradients in f64, and the gradients of the plain
//! algorithm in the storage precision.
//!
//! The oracle computes gradients one head of K and V at a time, with all heads of Q that share this
//! head: its dK and dV are sums over every row.

use std::marker::PhantomData;

use rayon::prelude::*;

use super::{Beside, CHAINS, Case, Row, View, round, sequence};
use crate::{
    dtype::DType,
    problem::Problem,
    session::{self, Inputs},
    tensor::Tensor,
};

/// Gradients of some heads of K and V, widened to f64.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gradients {
    /// Gradient of Q: for each head of K, the heads of Q that share it, each `[Nq, D]`.
    pub dq: Vec<f64>,
    /// Gradient of K, `[Nk, D]` per head.
    pub dk: Vec<f64>,
    /// Gradient of V, likewise.
    pub dv: Vec<f64>,
    /// Gradient of the bias: `[Nq, Nk]` for each of its matrices, or for the [`whole_biases`] where not
    /// every head is computed. Empty without a bias.
    pub d_bias: Vec<f64>,
    /// Gradient of the sinks: one number per head of Q, or per one of the [`whole_sinks`] likewise.
    pub d_sinks: Vec<f64>,
}

/// Every head of K and V of a problem: head `b * Hkv + h`.
#[must_use]
pub fn all_heads(problem: &Problem) -> Vec<usize> {
    (0..problem.batch() * problem.kv_heads()).collect()
}

/// The heads of Q whose sinks have their whole gradient from some heads of K and V: those computed in
/// every batch entry.
#[must_use]
pub fn whole_sinks(p: &Problem, heads: &[usize]) -> Vec<usize> {
    let computed = |h_kv: usize| (0..p.batch()).all(|b| heads.contains(&(b * p.kv_heads() + h_kv)));
    (0..p.heads()).filter(|h| computed(h / p.group())).collect()
}

/// The matrices of a bias `[B or 1, H or 1, Nq, Nk]` that have their whole gradient from some heads of
/// K and V: no other head adds them to its scores.
#[must_use]
pub fn whole_biases(p: &Problem, heads: &[usize]) -> Vec<usize> {
    let Some(bias) = p.bias() else { return Vec::new() };
    let own = |is_own, extent| if is_own { extent } else { 1 };
    let (entries, of_entry) = (own(bias.per_batch, p.batch()), own(bias.per_head, p.heads()));
    let sharing = |is_own, index: usize, extent| if is_own { index..index + 1 } else { 0..extent };
    let is_whole = |&matrix: &usize| {
        let (b, h) = (matrix / of_entry, matrix % of_entry);
        sharing(bias.per_batch, b, p.batch()).all(|b| {
            let computed = |h: usize| heads.contains(&(b * p.kv_heads() + h / p.group()));
            sharing(bias.per_head, h, p.heads()).all(computed)
        })
    };
    (0..entries * of_entry).filter(is_whole).collect()
}

/// The named parts of `values`, of `width` values each.
fn parts(values: &[f64], width: usize, which: &[usize]) -> Vec<f64> {
    which.iter().flat_map(|part| values.iter().skip(part * width).take(width)).copied().collect()
}

/// The given heads of a kernel's gradients; for packed sequences, without the rows beyond the last
/// sequence.
#[must_use]
pub fn gradients_of(
    problem: &Problem,
    inputs: &Inputs<'_>,
    gradients: &session::Gradients,
    heads: &[usize],
) -> Gradients {
    let p = problem;
    let dq = View::new(p, gradients.dq.to_f32(), p.q_extents());
    let dk = View::new(p, gradients.dk.to_f32(), p.k_extents());
    let dv = View::new(p, gradients.dv.to_f32(), p.v_extents());
    let [d_bias, d_sinks] = [&gradients.d_bias, &gradients.d_sinks]
        .map(|tensor| tensor.as_ref().map(Tensor::to_f64).unwrap_or_default());
    let d_bias = parts(&d_bias, p.seq_q() * p.seq_k(), &whole_biases(p, heads));
    let d_sinks = parts(&d_sinks, 1, &whole_sinks(p, heads));
    let mut result = Gradients { d_bias, d_sinks, ..Gradients::default() };
    let widened = |row: &[f32]| row.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    for &head in heads {
        let (b, h_kv) = (head / p.kv_heads(), head % p.kv_heads());
        let (of, entry) = sequence(p, inputs.cu_seqlens(), b);
        for h in h_kv * p.group()..(h_kv + 1) * p.group() {
            let rows = (of.first_q..of.first_q + of.seq_q).map(|i| dq.row(entry, h, i));
            rows.for_each(|row| result.dq.extend(widened(row)));
        }
        for (view, to) in [(&dk, &mut result.dk), (&dv, &mut result.dv)] {
            let rows = (of.first_k..of.first_k + of.seq_k).map(|j| view.row(entry, h_kv, j));
            rows.for_each(|row| to.extend(widened(row)));
        }
    }
    result
}

/// Gradients of `sum(O ∘ dO)` in f64: the oracle takes inputs and dO as stored, and rounds only as
/// f64 rounds.
#[must_use]
pub fn gradients(
    problem: &Problem,
    inputs: &Inputs<'_>,
    d_o: &Tensor,
    heads: &[usize],
) -> Gradients {
    let (values, d_o) = values_of(inputs, d_o);
    gradients_of_values(problem, values, Beside::of(inputs), d_o, heads)
}

/// Q, K and V; and dO.
fn values_of(inputs: &Inputs<'_>, d_o: &Tensor) -> ([Vec<f32>; 3], Vec<f32>) {
    ([inputs.q, inputs.k, inputs.v].map(Tensor::to_f32), d_o.to_f32())
}

/// [`gradients()`] of values in no storage type: the projections of a module.
pub(crate) fn gradients_of_values<T: Copy + Into<f64> + Sync + 'static>(
    problem: &Problem,
    qkv: [Vec<T>; 3],
    beside: Beside<'_>,
    d_o: Vec<T>,
    heads: &[usize],
) -> Gradients {
    Pass::new(problem, qkv, beside, d_o, Exact(PhantomData)).collect(heads)
}

/// The plain algorithm's gradients: it rounds every tensor that a framework keeps between two steps
/// to the storage type, and computes in f32. Scores and weights come as in
/// [`plain`](super::plain); the softmax's step is `dS = P ∘ (dP - rowsum(P ∘ dP))`.
#[must_use]
pub fn plain_gradients(
    problem: &Problem,
    inputs: &Inputs<'_>,
    d_o: &Tensor,
    heads: &[usize],
) -> Gradients {
    let (values, d_o) = values_of(inputs, d_o);
    let arithmetic = Rounded::new(problem.dtype(), problem.dtype());
    plain_gradients_of(problem, arithmetic, values, Beside::of(inputs), d_o, heads)
}

/// [`plain_gradients`] with S in f32, for scores that the storage type cannot hold.
#[must_use]
pub fn plain_gradients_with_f32_scores(
    problem: &Problem,
    inputs: &Inputs<'_>,
    d_o: &Tensor,
    heads: &[usize],
) -> Gradients {
    let (values, d_o) = values_of(inputs, d_o);
    let arithmetic = Rounded::new(problem.dtype(), DType::F32);
    plain_gradients_of(problem, arithmetic, values, Beside::of(inputs), d_o, heads)
}

/// [`plain_gradients`] of values of the storage type.
pub(crate) fn plain_gradients_of(
    problem: &Problem,
    rounded: Rounded,
    qkv: [Vec<f32>; 3],
    beside: Beside<'_>,
    d_o: Vec<f32>,
    heads: &[usize],
) -> Gradients {
    Pass::new(problem, qkv, beside, d_o, rounded).collect(heads)
}

/// The absolute terms of the gradients: the sum of the absolute values of all products in them,
/// with dP and delta as sums of absolute values too. Where products cancel, this sum is larger than
/// any gradient. A recomputed weight, `exp(s - LSE)`, counts `1 + |LSE| + |s|` times, with `|s|` a
/// sum of absolute values: by this factor a rounding error of the LSE and of the score becomes an
/// error of the weight.
#[must_use]
pub fn absolute_gradients(
    problem: &Problem,
    inputs: &Inputs<'_>,
    d_o: &Tensor,
    heads: &[usize],
) -> Gradients {
    let (values, d_o) = values_of(inputs, d_o);
    absolute_gradients_of(problem, values, Beside::of(inputs), d_o, heads)
}

/// [`absolute_gradients`] of values.
pub(crate) fn absolute_gradients_of(
    problem: &Problem,
    qkv: [Vec<f32>; 3],
    beside: Beside<'_>,
    d_o: Vec<f32>,
    heads: &[usize],
) -> Gradients {
    let absolute = |values: &Vec<f32>| values.iter().map(|x| x.abs()).collect();
    let of_sizes = Beside { cu_seqlens: beside.cu_seqlens, ..Beside::default() };
    let (sizes, d_o_sizes) = (qkv.each_ref().map(absolute), absolute(&d_o));
    let sizes = Pass::new(problem, sizes, of_sizes, d_o_sizes, Absolute);
    sizes.collect_with(heads, &Pass::new(problem, qkv, beside, d_o, Exact(PhantomData)))
}

/// The points at which a computation rounds below f64.
trait Arithmetic: Copy + Sync {
    /// An element as given.
    type Value: Copy + Into<f64> + Sync;
    /// The result of an operation. (One of f32 rounds as this does: f64 has more than twice its
    /// digits.)
    fn computed(self, x: f64) -> f64;
    /// An element of a tensor.
    fn stored(self, x: f64) -> f64;
    /// A score.
    fn score(self, x: f64) -> f64;
    /// `a - b`.
    fn difference(self, a: f64, b: f64) -> f64 {
        self.computed(a - b)
    }
    /// Whether `rowsum(dO ∘ O)`, with the stored O, replaces `rowsum(P ∘ dP)`.
    fn reads_o(self) -> bool {
        false
    }
    /// A weight, whose scaled product is `s`.
    fn weight(self, weight: &Weight, _s: impl FnOnce() -> f64) -> f64 {
        weight.p
    }

    /// `a · b`, in several partial sums.
    fn dot(self, a: &[Self::Value], b: &[Self::Value]) -> f64 {
        let mut sums = [0.0; CHAINS];
        let mut add = |a: &[Self::Value], b: &[Self::Value]| {
            for ((sum, &a), &b) in sums.iter_mut().zip(a).zip(b) {
                *sum += a.into() * b.into();
            }
        };
        let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<CHAINS>(), b.as_chunks::<CHAINS>());
        a.iter().zip(b).for_each(|(a, b)| add(a, b));
        add(a_rest, b_rest);
        sums.iter().sum()
    }

    /// `sum += a * x`.
    fn add(self, sum: &mut [f64], a: f64, x: &[Self::Value]) {
        for (sum, &x) in sum.iter_mut().zip(x) {
            *sum += a * x.into();
        }
    }
}

#[derive(Clone, Copy)]
struct Exact<T>(PhantomData<fn() -> T>);

impl<T: Copy + Into<f64> + Sync + 'static> Arithmetic for Exact<T> {
    type Value = T;
    fn computed(self, x: f64) -> f64 {
        x
    }
    fn stored(self, x: f64) -> f64 {
        x
    }
    fn score(self, x: f64) -> f64 {
        x
    }
}

/// Of sizes: nothing cancels.
#[derive(Clone, Copy)]
struct Absolute;

impl Arithmetic for Absolute {
    type Value = f32;
    fn computed(self, x: f64) -> f64 {
        x
    }
    fn stored(self, x: f64) -> f64 {
        x
    }
    fn score(self, x: f64) -> f64 {
        x
    }
    fn difference(self, a: f64, b: f64) -> f64 {
        a + b
    }
    fn weight(self, weight: &Weight, s: impl FnOnce() -> f64) -> f64 {
        weight.p * (1.0 + weight.lse.abs() + s().max(weight.score.abs()))
    }
}

/// All arithmetic in f32, with every tensor rounded to its type.
#[derive(Clone, Copy)]
pub(crate) struct Rounded {
    dtype: DType,
    scores: DType,
    reads_o: bool,
}

impl Rounded {
    pub(crate) const fn new(dtype: DType, scores: DType) -> Self {
        Self { dtype, scores, reads_o: false }
    }

    /// With `rowsum(dO ∘ O)` for `rowsum(P ∘ dP)`.
    pub(crate) const fn reading_o(self) -> Self {
        Self { reads_o: true, ..self }
    }
}

impl Arithmetic for Rounded {
    type Value = f32;
    fn reads_o(self) -> bool {
        self.reads_o
    }
    fn computed(self, x: f64) -> f64 {
        f64::from(x as f32)
    }
    fn stored(self, x: f64) -> f64 {
        f64::from(round(self.dtype, x as f32))
    }
    fn score(self, x: f64) -> f64 {
        f64::from(round(self.scores, x as f32))
    }
    /// In order, in f32: each step as [`computed`](Arithmetic::computed) rounds it.
    fn dot(self, a: &[f32], b: &[f32]) -> f64 {
        f64::from(a.iter().zip(b).fold(0.0f32, |sum, (a, b)| sum + a * b))
    }
    fn add(self, sum: &mut [f64], a: f64, x: &[f32]) {
        for (sum, &x) in sum.iter_mut().zip(x) {
            *sum = f64::from(*sum as f32 + a as f32 * x);
        }
    }
}

/// A backward pass.
struct Pass<'a, A: Arithmetic> {
    case: Case<'a, A::Value>,
    d_o: View<A::Value>,
    arithmetic: A,
}

/// A weight, and its relation to a score.
struct Weight {
    /// The key.
    j: usize,
    /// The score.
    score: f64,
    /// The log-sum-exp of its row.
    lse: f64,
    /// The weight before dropout.
    p: f64,
    /// The derivative of the score by the scaled product.
    slope: f64,
}

/// In place of a key: the sink.
const SINK: usize = usize::MAX;

impl Weight {
    const NONE: Self = Self { j: 0, score: 0.0, lse: 0.0, p: 0.0, slope: 1.0 };
}

impl<'a, A: Arithmetic> Pass<'a, A> {
    fn new(
        problem: &'a Problem,
        qkv: [Vec<A::Value>; 3],
        beside: Beside<'a>,
        d_o: Vec<A::Value>,
        arithmetic: A,
    ) -> Self {
        let d_o = View::new(problem, d_o, problem.o_extents());
        Self { case: Case::new(problem, qkv, beside), d_o, arithmetic }
    }

    fn collect(&self, heads: &[usize]) -> Gradients {
        self.collect_with(heads, self)
    }

    /// With the weights of another pass.
    fn collect_with<B: Arithmetic>(&self, heads: &[usize], of: &Pass<'_, B>) -> Gradients {
        let (p, a) = (self.case.problem, self.arithmetic);
        let computed: Vec<_> = heads.par_iter().map(|&head| self.head(head, of)).collect();
        let mut result = Gradients {
            d_bias: vec![0.0; p.bias_shape().map_or(0, |shape| shape.iter().product())],
            d_sinks: vec![0.0; p.sinks_shape().map_or(0, |shape| shape[0])],
            ..Gradients::default()
        };
        for (&head, Gradients { dq, dk, dv, d_bias, d_sinks }) in heads.iter().zip(computed) {
            result.dq.extend(dq);
            result.dk.extend(dk);
            result.dv.extend(dv);
            let (b, first) = (head / p.kv_heads(), head % p.kv_heads() * p.group());
            for (member, x) in d_sinks.into_iter().enumerate() {
                let sum = &mut result.d_sinks[first + member];
                *sum = a.computed(*sum + x);
            }
            let Some(bias) = p.bias() else { continue };
            let of_head = p.seq_q() * p.seq_k();
            for (member, of_h) in d_bias.chunks_exact(of_head).enumerate() {
                let h = if bias.per_head { first + member } else { 0 };
                let b = if bias.per_batch { b } else { 0 };
                let heads = if bias.per_head { p.heads() } else { 1 };
                let to = &mut result.d_bias[(b * heads + h) * of_head..][..of_head];
                for (sum, x) in to.iter_mut().zip(of_h) {
                    *sum = a.computed(*sum + x);
                }
            }
        }
        result.d_bias.iter_mut().for_each(|x| *x = a.stored(*x));
        result.d_bias = parts(&result.d_bias, p.seq_q() * p.seq_k(), &whole_biases(p, heads));
        result.d_sinks = parts(&result.d_sinks, 1, &whole_sinks(p, heads));
        result
    }

    /// A head of K and V, and the heads of Q that share it.
    fn head<B: Arithmetic>(&self, head: usize, of: &Pass<'_, B>) -> Gradients {
        let (p, a) = (self.case.problem, self.arithmetic);
        let (b, h_kv) = (head / p.kv_heads(), head % p.kv_heads());
        let lengths = self.case.row_at(b, 0, 0).of;
        let zeros = |columns| vec![0.0; lengths.seq_k * columns];
        let (d, d_v) = (p.head_dim(), p.head_dim_v());
        let (mut dq, mut dk, mut dv) = (Vec::new(), zeros(d), zeros(d_v));
        let (mut d_bias, mut d_sinks) = (Vec::new(), Vec::new());
        for h in h_kv * p.group()..(h_kv + 1) * p.group() {
            let (mut dk_of_h, mut dv_of_h) = (zeros(d), zeros(d_v));
            let mut d_sink = 0.0;
            for i in 0..lengths.seq_q {
                let row = self.case.row_at(b, h, i);
                let mut d_scores = vec![0.0; if p.bias().is_some() { p.seq_k() } else { 0 }];
                // Without a gradient of its own a row gives none: samples of dO take no longer.
                let d_o = self.d_o.row(row.entry, h, row.of.first_q + i);
                if d_o.iter().all(|&x| x.into() == 0.0) {
                    dq.resize(dq.len() + d, 0.0);
                    d_bias.extend(d_scores);
                    continue;
                }
                let sums: [&mut [f64]; 3] = [&mut dk_of_h, &mut dv_of_h, &mut d_scores];
                let (dq_of_row, of_sink) = self.row(row, of.weights(row), sums);
                dq.extend(dq_of_row);
                d_bias.extend(d_scores);
                d_sink = a.computed(d_sink + of_sink);
            }
            if p.has_sinks() {
                d_sinks.push(d_sink);
            }
            // Each head has its own gradients, which are summed where it shares K and V.
            for (sum, of_h) in [(&mut dk, dk_of_h), (&mut dv, dv_of_h)] {
                for (sum, x) in sum.iter_mut().zip(of_h) {
                    *sum = a.computed(*sum + a.stored(x));
                }
            }
        }
        for x in dk.iter_mut().chain(&mut dv) {
            *x = a.stored(*x);
        }
        Gradients { dq, dk, dv, d_bias, d_sinks }
    }

    /// The row of dQ, and the row's contribution to the gradient of its sink. Adds the row's
    /// contributions to dK and dV, and the gradient of its scores after the cap.
    fn row(
        &self,
        row: Row,
        weights: Vec<Weight>,
        [dk, dv, d_scores]: [&mut [f64]; 3],
    ) -> (Vec<f64>, f64) {
        let (case, p, a) = (&self.case, self.case.problem, self.arithmetic);
        let (d, d_v, scale) = (p.head_dim(), p.head_dim_v(), f64::from(p.scale()));
        let (q, d_o) = (case.q(row), self.d_o.row(row.entry, row.h, row.of.first_q + row.i));
        let mut weights: Vec<Weight> = weights
            .into_iter()
            .map(|weight| {
                let s =
                    || if weight.j == SINK { 0.0 } else { scale * a.dot(q, case.k(row, weight.j)) };
                Weight { p: a.weight(&weight, s), ..weight }
            })
            .collect();
        // It has no value, and so no dP.
        let sink = weights.pop_if(|weight| weight.j == SINK);
        let kept = |j| f64::from(case.kept(row, j));
        let dp_of = |weight: &Weight| {
            a.stored(a.stored(a.dot(d_o, case.v(row, weight.j))) * kept(weight.j))
        };
        let dp: Vec<f64> = weights.iter().map(dp_of).collect();
        let products = weights.iter().zip(&dp).map(|(weight, dp)| a.computed(weight.p * dp));
        let mut mean = products.fold(0.0, |sum, x| a.computed(sum + x));
        if a.reads_o() {
            let mut o = vec![0.0; d_v];
            for Weight { j, p: weight, .. } in &weights {
                a.add(&mut o, a.stored(weight * kept(*j)), case.v(row, *j));
            }
            let products = o.into_iter().zip(d_o).map(|(o, &d_o)| a.stored(o) * d_o.into());
            mean = products.fold(0.0, |sum, x| a.computed(sum + a.computed(x)));
        }
        let mut dq = vec![0.0; d];
        for (Weight { j, p: weight, slope, .. }, dp) in weights.into_iter().zip(dp) {
            let ds = a.stored(weight * a.difference(dp, mean));
            if let Some(of_score) = d_scores.get_mut(j) {
                *of_score = ds;
            }
            let ds = if p.softcap().is_some() { a.stored(ds * slope) } else { ds };
            let ds = a.stored(ds * scale);
            a.add(&mut dq, ds, case.k(row, j));
            a.add(&mut dk[j * d..][..d], ds, q);
            a.add(&mut dv[j * d_v..][..d_v], a.stored(weight * kept(j)), d_o);
        }
        let of_sink = sink.map_or(0.0, |sink| a.computed(sink.p * a.difference(0.0, mean)));
        (dq.into_iter().map(|x| a.stored(x)).collect(), of_sink)
    }

    /// The weights of the keys that a row sees; the sink's weight comes last, if there is a sink.
    fn weights(&self, row: Row) -> Vec<Weight> {
        let (case, p, a) = (&self.case, self.case.problem, self.arithmetic);
        let (scale, sink) = (f64::from(p.scale()), f64::from(case.sink(row.h)));
        let q = case.q(row);
        let score = |j: usize| {
            let s = a.score(scale * a.dot(q, case.k(row, j)));
            let (mut s, mut slope) = (s, 1.0);
            if let Some(cap) = p.softcap().map(f64::from) {
                let tanh = a.score(a.score(s / cap).tanh());
                (s, slope) = (a.score(tanh * cap), a.stored(1.0 - tanh * tanh));
            }
            if case.beside.alibi_slopes.is_some() {
                s = a.score(s - case.alibi(row, j));
            }
            if case.beside.bias.is_some() {
                s = a.score(s + f64::from(case.bias(row, j)));
            }
            Weight { j, score: s, slope, ..Weight::NONE }
        };
        let scores: Vec<_> = case.seen(row).into_iter().map(score).collect();
        let max = scores.iter().map(|weight| weight.score).fold(sink, f64::max);
        let exp = |s: f64| if s == f64::NEG_INFINITY { 0.0 } else { a.computed((s - max).exp()) };
        let sum = scores.iter().fold(exp(sink), |sum, w| a.computed(sum + exp(w.score)));
        let lse = max + sum.ln();
        let of_score = |w: Weight| Weight { lse, p: a.stored(exp(w.score) / sum), ..w };
        let of_sink = p.has_sinks().then_some(Weight { j: SINK, score: sink, ..Weight::NONE });
        scores.into_iter().chain(of_sink).map(of_score).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sink_and_a_bias_are_whole_with_all_heads_that_share_them() {
        let p = Problem::builder(2, 4, 5, 8).kv_heads(2).sinks(true);
        let bias =
            |per_batch, per_head| p.bias(Some(Bias { per_batch, per_head })).build().unwrap();
        let own = bias(true, true);
        // Head 1 of K in both entries, and head 0 in the second.
        assert_eq!(whole_sinks(&own, &[1, 2, 3]), [2, 3]);
        assert_eq!(whole_sinks(&own, &[0, 3]), [0; 0]);
        assert_eq!(whole_biases(&own, &[1, 2]), [2, 3, 4, 5]);
        assert_eq!(whole_biases(&bias(false, true), &[1, 2, 3]), [2, 3]);
        assert_eq!(whole_biases(&bias(true, false), &[1, 2, 3]), [1]);
        assert_eq!(whole_biases(&bias(false, false), &[1, 2, 3]), [0; 0]);
        assert_eq!(whole_biases(&bias(false, false), &all_heads(&own)), [0]);
        assert_eq!(parts(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2, &[0, 2]), [1.0, 2.0, 5.0, 6.0]);
    }
    use crate::{
        oracle::{all_rows, reference},
        problem::{Alibi, Bias, Dropout, ProblemBuilder, Window},
    };

    fn everything(p: ProblemBuilder) -> ProblemBuilder {
        p.kv_heads(2)
            .window(Window { left: Some(3), right: Some(1) })
            .mask(true)
            .dropout(Some(Dropout { p: 0.3, seed: 9 }))
            .softcap(Some(1.5))
            .alibi(Some(Alibi::PerHead))
            .bias(Some(Bias { per_batch: true, per_head: false }))
            .sinks(true)
    }

    /// The gradient is the slope of `sum(O ∘ dO)`, by the f64 oracle of the forward pass itself.
    #[test]
    fn gradients_are_finite_differences_of_the_forward_pass() {
        let plain = Problem::builder(2, 4, 5, 4).seq_k(6);
        let problems = [
            plain,
            plain.causal(true),
            plain.kv_heads(2),
            plain.softcap(Some(0.7)),
            everything(plain),
        ];
        for p in problems {
            let p = p.build().unwrap();
            let random = |shape: &[usize], seed| Tensor::random(DType::F32, shape, seed, 0.0);
            let [q, k, v] =
                [p.q_shape(), p.k_shape(), p.k_shape()].map(|s| random(&s, s[2] as u64));
            let v = v.scaled(-0.5);
            let d_o = random(&p.q_shape(), 3);
            let mask: Option<Vec<u8>> = p
                .mask_shape()
                .map(|_| (0..p.batch() * p.seq_k()).map(|j| u8::from(j % 5 != 1)).collect());
            let [slopes, bias, sinks] = [p.alibi_shape(), p.bias_shape(), p.sinks_shape()]
                .map(|shape| shape.map(|shape| random(&shape, 4)));
            let inputs = Inputs {
                mask: mask.as_deref(),
                alibi_slopes: slopes.as_ref(),
                bias: bias.as_ref(),
                sinks: sinks.as_ref(),
                ..Inputs::new(&q, &k, &v)
            };
            let loss = |inputs: &Inputs<'_>| -> f64 {
                let o = reference(&p, inputs, &all_rows(&p)).o;
                o.iter().zip(d_o.to_f64()).map(|(o, d_o)| o * d_o).sum()
            };
            let found = gradients(&p, &inputs, &d_o, &all_heads(&p));
            let of_inputs = [
                (0, Some(&q), &found.dq),
                (1, Some(&k), &found.dk),
                (2, Some(&v), &found.dv),
                (3, bias.as_ref(), &found.d_bias),
                (4, sinks.as_ref(), &found.d_sinks),
            ];
            for (which, tensor, gradient) in of_inputs {
                let Some(tensor) = tensor else { continue };
                // A power of two that f32 adds without rounding to what is about 1.
                let step = 2f64.powi(-11);
                for index in 0..tensor.to_f64().len() {
                    let moved = |by: f64| {
                        let mut values = tensor.to_f64();
                        values[index] += by;
                        let moved = Tensor::from_f64(DType::F32, tensor.shape(), &values).unwrap();
                        let exact = moved.get(index) - tensor.get(index);
                        let inputs = match which {
                            0 => Inputs { q: &moved, ..inputs },
                            1 => Inputs { k: &moved, ..inputs },
                            2 => Inputs { v: &moved, ..inputs },
                            3 => Inputs { bias: Some(&moved), ..inputs },
                            _ => Inputs { sinks: Some(&moved), ..inputs },
                        };
                        (loss(&inputs), exact)
                    };
                    let ((above, up), (below, down)) = (moved(step), moved(-step));
                    let slope = (above - below) / (up - down);
                    // The difference errs by step² times the third derivative.
                    let error = (slope - gradient[index]).abs();
                    assert!(error < 3e-5, "{which} {index}: {slope}, {} {p:?}", gradient[index]);
                }
            }
            let plain = plain_gradients(&p, &inputs, &d_o, &all_heads(&p));
            for (plain, exact) in
                [(&plain.dq, &found.dq), (&plain.dk, &found.dk), (&plain.dv, &found.dv)]
            {
                assert!(plain.iter().zip(exact).all(|(x, y)| (x - y).abs() < 1e-5));
                assert!(exact.iter().any(|x| x.abs() > 0.1));
            }
        }
    }
}
