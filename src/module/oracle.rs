//! The expected results of a module: a reference in f64, and the plain algorithm in the storage
//! precision, whose error is the yardstick. Both use the attention references ([`crate::oracle`])
//! between their projections.

mod backward;

use std::ops::{AddAssign, Mul};

use rayon::prelude::*;

use super::weights::{Linear, Weights};
use crate::{
    dtype::DType,
    oracle::{Beside, plain_of, reference_of, round},
    problem::Problem,
    tensor::Tensor,
    verify::{Yardstick, beside, draws, largest_difference},
};

pub use backward::{Gradients, credit_gradients, gradients, plain_gradients, thin};

/// Tokens that are projected together, so that one read of a row of weights serves all of them.
const SIDE_BY_SIDE: usize = 8;

/// At most `count` tokens of a problem, as `b * N + n`, spread evenly over batch entries and
/// positions.
#[must_use]
pub fn sample_tokens(problem: &Problem, count: usize) -> Vec<usize> {
    let all = problem.batch() * problem.seq_q();
    spread(all, count.min(all))
}

/// As many tokens as can be compared with about the given number of multiplications; every token
/// where that is affordable. The comparison covers at least one batch entry, all of whose keys need
/// their projections.
#[must_use]
pub fn affordable_tokens(problem: &Problem, multiplications: u64) -> Vec<usize> {
    let (batch, seq) = (problem.batch(), problem.seq_q());
    let hidden = (problem.heads() * problem.head_dim()) as u64;
    // K and V of an entry; Q, the output projection and attention of a token.
    let (n, pair) = (seq as u64, 2 * hidden * hidden);
    let (entry, token) = (n * pair, pair + 2 * n * hidden);
    let all = (entry + n * token).saturating_mul(batch as u64);
    if all <= multiplications {
        return (0..batch * seq).collect();
    }
    let half = multiplications / 2;
    let entries = usize::try_from(half / entry).unwrap_or(batch).clamp(1, batch);
    let tokens = usize::try_from(half / token).unwrap_or(seq) / entries;
    let tokens = spread(seq, tokens.clamp(SIDE_BY_SIDE.min(seq), seq));
    spread(batch, entries).iter().flat_map(|b| tokens.iter().map(move |n| b * seq + n)).collect()
}

/// `count` of the numbers below `all`, evenly apart, the first and (from two on) the last
/// among them.
fn spread(all: usize, count: usize) -> Vec<usize> {
    let last = count.saturating_sub(1).max(1);
    (0..count).map(|i| (i as u128 * (all as u128 - 1) / last as u128) as usize).collect()
}

/// The module in f64: it takes input and weights as stored, and rounds only as f64 rounds. `hidden`
/// elements for each of `tokens`.
///
/// `problem` comes from [`MultiHeadAttention::problem`](super::MultiHeadAttention::problem).
#[must_use]
pub fn reference(
    problem: &Problem,
    weights: &Weights,
    x: &Tensor,
    mask: Option<&[u8]>,
    tokens: &[usize],
) -> Vec<f64> {
    let out = Matrix::new(&weights.projections()[3], f64::from);
    let (_, o) = exact_attention(problem, weights, x, mask, tokens);
    out.project(&o, &all(tokens), |y| y)
}

/// q, k and v, where there are any, and o of some tokens, in f64.
fn exact_attention(
    problem: &Problem,
    weights: &Weights,
    x: &Tensor,
    mask: Option<&[u8]>,
    tokens: &[usize],
) -> ([Vec<f64>; 3], Vec<f64>) {
    let [q, k, v, _] = weights.projections().each_ref().map(|l| Matrix::new(l, f64::from));
    let x: Vec<f64> = x.to_f64();
    let keys = tokens_of_entries(problem, tokens);
    let qkv = [
        q.project_in_place(&x, tokens, |y| y),
        k.project_in_place(&x, &keys, |y| y),
        v.project_in_place(&x, &keys, |y| y),
    ];
    let beside = Beside { mask, ..Beside::default() };
    let o = reference_of(problem, qkv.clone(), beside, &rows_of(problem, tokens)).o;
    (qkv, o)
}

/// The plain algorithm in the storage precision: q, k and v are accumulated in f32 and rounded to
/// the storage type, attention is [`crate::oracle::plain`]'s, and the output is accumulated in f32
/// and rounded. A framework without a fused kernel computes this way.
#[must_use]
pub fn plain(
    problem: &Problem,
    weights: &Weights,
    x: &Tensor,
    mask: Option<&[u8]>,
    tokens: &[usize],
) -> Vec<f64> {
    plain_with(problem, problem.dtype(), weights, x, mask, tokens)
}

/// [`plain`] with scores of a type.
fn plain_with(
    problem: &Problem,
    scores: DType,
    weights: &Weights,
    x: &Tensor,
    mask: Option<&[u8]>,
    tokens: &[usize],
) -> Vec<f64> {
    let out = Matrix::new(&weights.projections()[3], |x| x);
    let (_, o) = plain_attention(problem, scores, weights, x, mask, tokens);
    let y = out.project(&o, &all(tokens), |y| round(problem.dtype(), y));
    y.into_iter().map(f64::from).collect()
}

/// q, k and v, where there are any, and o of some tokens, by the plain algorithm with scores of a type.
fn plain_attention(
    problem: &Problem,
    scores: DType,
    weights: &Weights,
    x: &Tensor,
    mask: Option<&[u8]>,
    tokens: &[usize],
) -> ([Vec<f32>; 3], Vec<f32>) {
    let [q, k, v, _] = weights.projections().each_ref().map(|l| Matrix::new(l, |x| x));
    let x = x.to_f32();
    let keys = tokens_of_entries(problem, tokens);
    let rounded = |y| round(problem.dtype(), y);
    let qkv = [
        q.project_in_place(&x, tokens, rounded),
        k.project_in_place(&x, &keys, rounded),
        v.project_in_place(&x, &keys, rounded),
    ];
    let beside = Beside { mask, ..Beside::default() };
    let o = plain_of(problem, scores, qkv.clone(), beside, &rows_of(problem, tokens)).o;
    // They are values of the storage type: f32 holds them exactly.
    (qkv, o.into_iter().map(|x| x as f32).collect())
}

/// The error credited to the plain algorithm, by the rule of [`crate::verify`]: its largest error
/// over draws of x, and no less than one rounding of the largest output to the storage type.
/// `reference`: the reference for x itself.
#[must_use]
pub fn credit(
    problem: &Problem,
    weights: &Weights,
    x: &Tensor,
    mask: Option<&[u8]>,
    tokens: &[usize],
    reference: &[f64],
) -> Yardstick {
    let of_draw = |x: &Tensor, reference: &[f64]| {
        let differences = |scores| {
            let plain = plain_with(problem, scores, weights, x, mask, tokens);
            largest_difference(&plain, reference)
        };
        let (mut error, expected) = differences(problem.dtype());
        if !error.is_finite() {
            (error, _) = differences(DType::F32);
        }
        Yardstick::new(error, problem.dtype().unit_roundoff() * expected)
    };
    let hidden = (problem.heads() * problem.head_dim()) as u64;
    let keys = tokens_of_entries(problem, tokens).len() as u64;
    let (tokens_compared, seq) = (tokens.len() as u64, problem.seq_k() as u64);
    let multiplications = 2 * hidden * (hidden * (keys + tokens_compared) + seq * tokens_compared);
    // Every head of a token is a row, and every output is summed over all of them.
    let rows = tokens_compared * problem.heads() as u64;
    (1..draws(multiplications, rows)).fold(of_draw(x, reference), |worst, draw| {
        let x = beside(x, draw, 3);
        worst.max(of_draw(&x, &self::reference(problem, weights, &x, mask, tokens)))
    })
}

/// Some tokens of an output `[B, N, hidden]`, widened to f64.
#[must_use]
pub fn tokens_of(y: &Tensor, tokens: &[usize]) -> Vec<f64> {
    let hidden = y.shape().last().copied().unwrap_or(0);
    let element = |token: &usize| token * hidden..(token + 1) * hidden;
    tokens.iter().flat_map(element).map(|index| y.get(index)).collect()
}

fn all(tokens: &[usize]) -> Vec<usize> {
    (0..tokens.len()).collect()
}

/// Every token of the batch entries that some tokens belong to.
fn tokens_of_entries(problem: &Problem, tokens: &[usize]) -> Vec<usize> {
    let seq = problem.seq_k();
    let mut entries: Vec<usize> = tokens.iter().map(|token| token / seq).collect();
    entries.dedup();
    entries.into_iter().flat_map(|b| b * seq..(b + 1) * seq).collect()
}

/// The rows of attention of each token's heads, which side by side are a row of `[B, N, H, D]`.
fn rows_of(problem: &Problem, tokens: &[usize]) -> Vec<usize> {
    let (heads, seq) = (problem.heads(), problem.seq_q());
    let rows =
        |&token: &usize| (0..heads).map(move |h| (token / seq * heads + h) * seq + token % seq);
    tokens.iter().flat_map(rows).collect()
}

/// A number to sum.
trait Number: Copy + Default + AddAssign + Mul<Output = Self> + Send + Sync {}
impl<T: Copy + Default + AddAssign + Mul<Output = T> + Send + Sync> Number for T {}

/// A projection with its weight transposed, so that neighbouring outputs are neighbours.
struct Matrix<T> {
    /// `[in, out]`.
    weight: Vec<T>,
    bias: Vec<T>,
}

impl<T: Number> Matrix<T> {
    fn new(linear: &Linear, widen: impl Fn(f32) -> T) -> Self {
        let (w, hidden) = (linear.weight.to_f32(), linear.bias.len());
        let transposed = (0..hidden * hidden).map(|i| w[i % hidden * hidden + i / hidden]);
        Self {
            weight: transposed.map(&widen).collect(),
            bias: linear.bias.to_f32().into_iter().map(widen).collect(),
        }
    }

    /// The matrix that takes the gradient of a projection's output to the gradient of its input:
    /// the stacked weights `[out, in]`, as they are.
    fn of_gradients(linears: &[Linear], widen: impl Fn(f32) -> T) -> Self {
        let weights = linears.iter().flat_map(|linear| linear.weight.to_f32());
        let bias = vec![T::default(); linears.first().map_or(0, |linear| linear.bias.len())];
        Self { weight: weights.map(widen).collect(), bias }
    }

    /// Some rows of `x: [rows, in]` projected: the products summed in their order, then the
    /// bias; `finish` sees each sum.
    fn project(&self, x: &[T], rows: &[usize], finish: impl Fn(T) -> T + Sync) -> Vec<T> {
        let out_features = self.bias.len();
        let in_features = self.weight.len() / out_features;
        let few = |rows: &[usize]| {
            let mut y = vec![T::default(); rows.len() * out_features];
            for (i, w) in self.weight.chunks_exact(out_features).enumerate() {
                for (&row, y) in rows.iter().zip(y.chunks_exact_mut(out_features)) {
                    let x = x[row * in_features + i];
                    for (y, &w) in y.iter_mut().zip(w) {
                        *y += x * w;
                    }
                }
            }
            for (y, &bias) in y.iter_mut().zip(self.bias.iter().cycle()) {
                *y += bias;
                *y = finish(*y);
            }
            y
        };
        rows.par_chunks(SIDE_BY_SIDE).flat_map_iter(few).collect()
    }

    /// As [`Matrix::project`], with each row of the result at the place of its row of `x`, and
    /// zeros between the rows: untouched memory, which costs nothing.
    fn project_in_place(&self, x: &[T], rows: &[usize], finish: impl Fn(T) -> T + Sync) -> Vec<T> {
        let hidden = self.bias.len();
        let in_features = self.weight.len() / hidden;
        let mut y = vec![T::default(); x.len() / in_features * hidden];
        for (&row, values) in rows.iter().zip(self.project(x, rows, finish).chunks_exact(hidden)) {
            y[row * hidden..(row + 1) * hidden].copy_from_slice(values);
        }
        y
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_all_or_spread() {
        let problem = Problem::builder(3, 2, 50, 32).build().unwrap();
        assert_eq!(affordable_tokens(&problem, u64::MAX), (0..150).collect::<Vec<_>>());
        let some = affordable_tokens(&problem, 2_000_000);
        assert!(some.len() < 150 && some.contains(&0) && some.contains(&149), "{some:?}");
        let few = affordable_tokens(&problem, 0);
        assert_eq!((few.len(), few[0], few[7]), (8, 0, 49));
        assert_eq!(sample_tokens(&problem, 3), [0, 74, 149]);
        assert_eq!(sample_tokens(&problem, 500).len(), 150);
        assert_eq!(affordable_tokens(&Problem::builder(2, 2, 1, 32).build().unwrap(), 0), [0]);
    }
}
