//! The gradients of a module: in f64, and by the plain algorithm in the storage precision.
//!
//! Both take the same steps, each in its own arithmetic. A token whose dy is 0 gives no gradient,
//! and the oracles skip the work that only this token needs. So a comparison of a large problem can
//! use some of its tokens, with dy [thinned](thin) to them.

use rayon::prelude::*;

use super::{
    super::{ModuleGradients, weights::Weights},
    Matrix, Number, SIDE_BY_SIDE, all, exact_attention, plain_attention, tokens_of_entries,
};
use crate::{
    dtype::DType,
    oracle::{
        self, Beside, Rounded, absolute_gradients_of, gradients_of_values, plain_gradients_of,
        round,
    },
    problem::Problem,
    tensor::Tensor,
    verify::{Yardstick, beside, draws, largest_difference},
};

/// The gradients of a module's input and parameters, widened to f64, in the order of
/// [`ModuleGradients::NAMES`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gradients(pub [Vec<f64>; Gradients::COUNT]);

impl Gradients {
    /// The number of tensors.
    pub const COUNT: usize = ModuleGradients::NAMES.len();

    /// Each tensor with its name.
    pub fn each(&self) -> impl Iterator<Item = (&'static str, &[f64])> {
        ModuleGradients::NAMES.into_iter().zip(self.0.iter().map(Vec::as_slice))
    }

    /// The gradients of a module that ran.
    #[must_use]
    pub fn of(gradients: ModuleGradients) -> Self {
        Self(gradients.into_tensors().map(|tensor| tensor.to_f64()))
    }
}

/// Leaves dy of some tokens, and makes it 0 for the others.
pub fn thin(dy: &mut Tensor, tokens: &[usize]) {
    let row_bytes = dy.shape().last().copied().unwrap_or(0) * dy.dtype().size();
    let mut kept = vec![0; dy.as_bytes().len()];
    for &token in tokens {
        let row = token * row_bytes..(token + 1) * row_bytes;
        kept[row.clone()].copy_from_slice(&dy.as_bytes()[row]);
    }
    dy.as_bytes_mut().copy_from_slice(&kept);
}

/// The gradients of `sum(y ∘ dy)` in f64: the oracle takes input, parameters and dy as stored, and
/// rounds only as f64 rounds.
#[must_use]
pub fn gradients(
    problem: &Problem,
    weights: &Weights,
    x: &Tensor,
    mask: Option<&[u8]>,
    dy: &Tensor,
) -> Gradients {
    let case = Case::new(problem, weights, x, dy);
    let (qkv, o) = exact_attention(problem, weights, x, mask, &case.tokens);
    let beside = Beside { mask, ..Beside::default() };
    let attention = |d_o| gradients_of_values(problem, qkv, beside, d_o, &case.heads());
    case.backward(f64::from, |x| x, |x| x, o, attention)
}

/// The plain algorithm's gradients: accumulated in f32, and rounded to the storage type wherever a
/// framework keeps a tensor. dx is one sum over the gradients of q, k and v.
#[must_use]
pub fn plain_gradients(
    problem: &Problem,
    weights: &Weights,
    x: &Tensor,
    mask: Option<&[u8]>,
    dy: &Tensor,
) -> Gradients {
    let arithmetic = Rounded::new(problem.dtype(), problem.dtype());
    plain_with(problem, (problem.dtype(), arithmetic), weights, x, mask, dy)
}

/// [`plain_gradients`] with scores of a type.
fn plain_with(
    problem: &Problem,
    (scores, arithmetic): (DType, Rounded),
    weights: &Weights,
    x: &Tensor,
    mask: Option<&[u8]>,
    dy: &Tensor,
) -> Gradients {
    let case = Case::new(problem, weights, x, dy);
    let (qkv, o) = plain_attention(problem, scores, weights, x, mask, &case.tokens);
    let beside = Beside { mask, ..Beside::default() };
    let attention = |d_o| plain_gradients_of(problem, arithmetic, qkv, beside, d_o, &case.heads());
    case.backward(|x| x, |x| x as f32, |x| round(problem.dtype(), x), o, attention)
}

/// The absolute terms of the gradients, as [`oracle::absolute_gradients`], through the projections
/// too.
fn absolute(
    problem: &Problem,
    weights: &Weights,
    x: &Tensor,
    mask: Option<&[u8]>,
    dy: &Tensor,
) -> Gradients {
    let case = Case::new(problem, weights, x, dy);
    let (qkv, o) = plain_attention(problem, DType::F32, weights, x, mask, &case.tokens);
    let beside = Beside { mask, ..Beside::default() };
    let attention = |d_o: Vec<f64>| {
        let d_o = d_o.into_iter().map(|x| x as f32).collect();
        absolute_gradients_of(problem, qkv, beside, d_o, &case.heads())
    };
    let o = o.into_iter().map(|x| f64::from(x.abs())).collect();
    case.backward(|x| f64::from(x.abs()), |x| x, |x| x, o, attention)
}

/// The error credited to the plain algorithm on each gradient, in the order of [`Gradients::each`],
/// by the rule of [`crate::verify`]. `reference`: the reference for x and dy themselves.
///
/// The O that the forward pass passes on is rounded, like the LSE. The plain algorithm is therefore
/// credited with the larger of its errors with `rowsum(P ∘ dP)` and with `rowsum(dO ∘ O)`. In the
/// gradient of the bias of k all other terms cancel: that gradient is 0.
#[must_use]
pub fn credit_gradients(
    problem: &Problem,
    weights: &Weights,
    x: &Tensor,
    mask: Option<&[u8]>,
    dy: &Tensor,
    reference: &Gradients,
) -> [Yardstick; Gradients::COUNT] {
    let rounding = problem.dtype().unit_roundoff() + 3.0 * DType::F32.unit_roundoff();
    let of_draw = |x: &Tensor, dy: &Tensor, reference: &Gradients| {
        let yardsticks = |with: fn(Rounded) -> Rounded| {
            let differences = |scores| {
                let arithmetic = with(Rounded::new(problem.dtype(), scores));
                let plain = plain_with(problem, (scores, arithmetic), weights, x, mask, dy);
                compared(&plain, reference, largest_difference)
            };
            let mut all = differences(problem.dtype());
            if all.iter().any(|(error, _)| !error.is_finite()) {
                all = differences(DType::F32);
            }
            all.map(|(error, largest)| Yardstick::new(error, rounding * largest))
        };
        larger(yardsticks(|plain| plain), yardsticks(Rounded::reading_o))
    };
    let sizes = absolute(problem, weights, x, mask, dy);
    let of_sizes = compared(&sizes, &sizes, |_, sizes| {
        let largest = sizes.iter().copied().filter(|x| x.is_finite()).fold(0.0, f64::max);
        Yardstick::new(0.0, DType::F32.unit_roundoff() * largest)
    });
    let case = Case::new(problem, weights, x, dy);
    let (tokens, keys) = (case.tokens.len() as u64, case.keys.len() as u64);
    let (hidden, seq) = ((problem.heads() * problem.head_dim()) as u64, problem.seq_k() as u64);
    let multiplications = hidden * (hidden * (8 * keys + 4 * tokens) + 7 * seq * tokens);
    // Every head of a token is a row, and every gradient is summed over all of them.
    let draws = draws(multiplications, tokens * problem.heads() as u64);
    (1..draws).fold(larger(of_sizes, of_draw(x, dy, reference)), |worst, draw| {
        let (x, dy) = (beside(x, draw, 3), beside(dy, draw, 4));
        larger(worst, of_draw(&x, &dy, &gradients(problem, weights, &x, mask, &dy)))
    })
}

/// The larger value of each pair.
fn larger(
    a: [Yardstick; Gradients::COUNT],
    b: [Yardstick; Gradients::COUNT],
) -> [Yardstick; Gradients::COUNT] {
    std::array::from_fn(|index| a[index].max(b[index]))
}

/// Compares each gradient.
fn compared<T>(
    actual: &Gradients,
    expected: &Gradients,
    compare: impl Fn(&[f64], &[f64]) -> T,
) -> [T; Gradients::COUNT] {
    let (actual, expected): (Vec<_>, Vec<_>) = (actual.each().collect(), expected.each().collect());
    std::array::from_fn(|index| compare(actual[index].1, expected[index].1))
}

/// A backward pass, and the tokens that take part in it.
struct Case<'a> {
    problem: &'a Problem,
    weights: &'a Weights,
    x: &'a Tensor,
    dy: &'a Tensor,
    /// Tokens whose dy is not 0.
    tokens: Vec<usize>,
    /// Every token of their batch entries.
    keys: Vec<usize>,
}

impl<'a> Case<'a> {
    fn new(problem: &'a Problem, weights: &'a Weights, x: &'a Tensor, dy: &'a Tensor) -> Self {
        let rows = dy.to_f32();
        let rows = rows.chunks_exact(weights.hidden()).enumerate();
        let given = rows.filter(|(_, row)| row.iter().any(|&x| x != 0.0));
        let tokens: Vec<usize> = given.map(|(token, _)| token).collect();
        let keys = tokens_of_entries(problem, &tokens);
        Self { problem, weights, x, dy, tokens, keys }
    }

    /// The heads of their batch entries.
    fn heads(&self) -> Vec<usize> {
        let entries =
            self.keys.iter().step_by(self.problem.seq_k()).map(|t| t / self.problem.seq_k());
        entries
            .flat_map(|b| (0..self.problem.heads()).map(move |h| b * self.problem.heads() + h))
            .collect()
    }

    /// Everything after the forward pass, in numbers of type `T`: `widen` converts stored values,
    /// `narrow` the results of attention, and `finish` the sums. `o`: one row per token.
    fn backward<T: Number + Into<f64>>(
        &self,
        widen: impl Fn(f32) -> T + Copy,
        narrow: impl Fn(f64) -> T,
        finish: impl Fn(T) -> T + Sync + Copy,
        o: Vec<T>,
        attention: impl FnOnce(Vec<T>) -> oracle::Gradients,
    ) -> Gradients {
        let (hidden, projections) = (self.weights.hidden(), self.weights.projections());
        let widened = |tensor: &Tensor| tensor.to_f32().into_iter().map(widen).collect::<Vec<T>>();
        let (x, dy) = (widened(self.x), widened(self.dy));
        let (tokens, keys) = (&self.tokens, &self.keys);

        let out = Matrix::of_gradients(&projections[3..], widen);
        let d_o = out.project_in_place(&dy, tokens, finish);
        let of_out = parameters((&dy, hidden, tokens), (&o, hidden, &all(tokens)), finish);

        let d_qkv = self.side_by_side(&attention(d_o), narrow);
        let qkv = Matrix::of_gradients(&projections[..3], widen);
        let dx = qkv.project_in_place(&d_qkv, keys, finish);
        let [weight, bias] = parameters((&d_qkv, 3 * hidden, keys), (&x, hidden, keys), finish);
        let third = |all: &[f64], third: usize| {
            let size = all.len() / 3;
            all[third * size..(third + 1) * size].to_vec()
        };
        let [of_weight, of_bias] = of_out;
        Gradients([
            dx.into_iter().map(Into::into).collect(),
            third(&weight, 0),
            third(&bias, 0),
            third(&weight, 1),
            third(&bias, 1),
            third(&weight, 2),
            third(&bias, 2),
            of_weight,
            of_bias,
        ])
    }

    /// The gradients of q, k and v of each token side by side, `[B, N, 3 hidden]`.
    fn side_by_side<T: Number>(&self, g: &oracle::Gradients, narrow: impl Fn(f64) -> T) -> Vec<T> {
        let (p, hidden) = (self.problem, self.weights.hidden());
        let (heads, seq, d) = (p.heads(), p.seq_k(), p.head_dim());
        let mut all = vec![T::default(); p.batch() * seq * 3 * hidden];
        let of_heads = self.heads().into_iter().enumerate();
        for (place, head) in of_heads {
            let (b, h) = (head / heads, head % heads);
            for n in 0..seq {
                let from = (place * seq + n) * d;
                for (third, values) in [&g.dq, &g.dk, &g.dv].into_iter().enumerate() {
                    let to = ((b * seq + n) * 3 + third) * hidden + h * d;
                    for (to, &x) in all[to..to + d].iter_mut().zip(&values[from..from + d]) {
                        *to = narrow(x);
                    }
                }
            }
        }
        all
    }
}

/// The gradients of a weight `[out, hidden]` and a bias `[out]`: sums over some rows of `dy`, `out`
/// long, and as many rows of `x`, in their order.
fn parameters<T: Number + Into<f64>>(
    (dy, out_features, rows): (&[T], usize, &[usize]),
    (x, hidden, x_rows): (&[T], usize, &[usize]),
    finish: impl Fn(T) -> T + Sync,
) -> [Vec<f64>; 2] {
    // A row of x is read once for them.
    let few = |outs: &[usize]| {
        let mut weight = vec![T::default(); outs.len() * hidden];
        for (&row, &x_row) in rows.iter().zip(x_rows) {
            let x = &x[x_row * hidden..(x_row + 1) * hidden];
            for (&out, sums) in outs.iter().zip(weight.chunks_exact_mut(hidden)) {
                let dy = dy[row * out_features + out];
                for (sum, &x) in sums.iter_mut().zip(x) {
                    *sum += dy * x;
                }
            }
        }
        weight.into_iter().map(&finish).map(Into::into).collect::<Vec<_>>()
    };
    let weight =
        (0..out_features).collect::<Vec<_>>().par_chunks(SIDE_BY_SIDE).flat_map_iter(few).collect();
    let column = |out: usize| {
        let mut sum = T::default();
        rows.iter().for_each(|row| sum += dy[row * out_features + out]);
        finish(sum).into()
    };
    [weight, (0..out_features).map(column).collect()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        module::oracle::reference,
        problem::{Dropout, Layout},
    };

    struct Drawn {
        problem: Problem,
        weights: Weights,
        x: Tensor,
        dy: Tensor,
        mask: Option<Vec<u8>>,
    }

    impl Drawn {
        fn gradients(&self) -> Gradients {
            gradients(&self.problem, &self.weights, &self.x, self.mask.as_deref(), &self.dy)
        }

        /// `sum(y ∘ dy)`.
        fn loss(&self) -> f64 {
            let tokens: Vec<usize> = (0..self.problem.batch() * self.problem.seq_q()).collect();
            let mask = self.mask.as_deref();
            let y = reference(&self.problem, &self.weights, &self.x, mask, &tokens);
            y.iter().zip(self.dy.to_f64()).map(|(y, dy)| y * dy).sum()
        }

        /// The input, or weight or bias of a projection: the tensors in the order of
        /// [`Gradients::each`].
        fn with(&self, which: usize, tensor: Tensor) -> Self {
            let Self { problem, weights, x, dy, mask } = self;
            let mut projections = weights.projections().clone();
            let mut new_x = x.clone();
            match which.checked_sub(1) {
                None => new_x = tensor,
                Some(i) if i % 2 == 0 => projections[i / 2].weight = tensor,
                Some(i) => projections[i / 2].bias = tensor,
            }
            let weights = Weights::new(projections).unwrap();
            Self { problem: *problem, weights, x: new_x, dy: dy.clone(), mask: mask.clone() }
        }

        fn tensor(&self, which: usize) -> &Tensor {
            let Some(i) = which.checked_sub(1) else { return &self.x };
            let linear = &self.weights.projections()[i / 2];
            if i % 2 == 0 { &linear.weight } else { &linear.bias }
        }
    }

    fn drawn() -> [Drawn; 2] {
        let plain = Problem::builder(2, 2, 5, 2).layout(Layout::TokensFirst);
        let training = plain.causal(true).mask(true);
        let training = training.dropout(Some(Dropout { p: 0.3, seed: 9 }));
        [plain, training].map(|builder| {
            let problem = builder.build().unwrap();
            let random = |seed| Tensor::random(DType::F32, &[2, 5, 4], seed, 0.0);
            let mask = problem.has_mask().then(|| (0..10).map(|j| u8::from(j % 4 != 1)).collect());
            let weights = Weights::random(DType::F32, 4, 3).unwrap();
            Drawn { problem, weights, x: random(1), dy: random(2), mask }
        })
    }

    /// The gradient is the slope of `sum(y ∘ dy)`, by the f64 oracle of the forward pass itself.
    #[test]
    fn gradients_are_finite_differences_of_the_forward_pass() {
        for drawn in drawn() {
            let found = drawn.gradients();
            for (which, (name, gradient)) in found.each().enumerate() {
                let tensor = drawn.tensor(which);
                // A power of two that f32 adds without rounding to what is about 1.
                let step = 2f64.powi(-11);
                for index in 0..tensor.len() {
                    let moved = |by: f64| {
                        let mut values = tensor.to_f64();
                        values[index] += by;
                        let moved = Tensor::from_f64(DType::F32, tensor.shape(), &values).unwrap();
                        let exact = moved.get(index) - tensor.get(index);
                        (drawn.with(which, moved).loss(), exact)
                    };
                    let ((above, up), (below, down)) = (moved(step), moved(-step));
                    let slope = (above - below) / (up - down);
                    // The difference errs by step² times the third derivative.
                    let error = (slope - gradient[index]).abs();
                    assert!(error < 3e-5, "{name} {index}: {slope}, {}", gradient[index]);
                }
                // A bias of keys moves all scores of a row alike.
                let largest = gradient.iter().fold(0.0, |largest, x| x.abs().max(largest));
                assert_eq!(largest > 0.01, name != "k_proj.bias", "{name}: {largest}");
            }
            let Drawn { problem, weights, x, dy, mask } = &drawn;
            let plain = plain_gradients(problem, weights, x, mask.as_deref(), dy);
            for ((name, plain), (_, exact)) in plain.each().zip(found.each()) {
                assert!(plain.iter().zip(exact).all(|(x, y)| (x - y).abs() < 1e-5), "{name}");
            }
        }
    }

    /// Gradients are linear in dy: tokens that are left out add nothing.
    #[test]
    fn gradients_of_some_tokens_are_their_share() {
        for drawn in drawn() {
            let share = |tokens: &[usize]| {
                let mut dy = drawn.dy.clone();
                thin(&mut dy, tokens);
                let Drawn { problem, weights, x, mask, .. } = &drawn;
                gradients(problem, weights, x, mask.as_deref(), &dy)
            };
            let (whole, first, rest) =
                (drawn.gradients(), share(&[1, 2]), share(&[0, 3, 4, 5, 6, 7, 8, 9]));
            for (((name, whole), (_, a)), (_, b)) in whole.each().zip(first.each()).zip(rest.each())
            {
                let both = a.iter().zip(b).map(|(a, b)| a + b);
                assert!(whole.iter().zip(both).all(|(x, y)| (x - y).abs() < 1e-12), "{name}");
                assert!(a.iter().any(|&x| x != 0.0), "{name}");
            }
        }
    }
}
