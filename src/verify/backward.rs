//! Are gradients right? The forward pass's rule applies to each gradient: an error of at most twice
//! the plain algorithm's ([`oracle::plain_gradients`]), both against f64.
//!
//! The plain algorithm is credited with the unavoidable roundings. These are a rounding of the
//! largest gradient to the storage type and three in f32, and one rounding in f32 of each summed
//! product, where products cancel, of the LSE and of the scores ([`oracle::absolute_gradients`]).
//! The forward pass passes on the LSE, and the plain algorithm does not use it. With one key, dS is
//! `dP - delta`, two sums of the same products, which the plain algorithm sums in the same order,
//! without an error.

use super::{Differences, Worst, Yardstick, beside, draws, largest, largest_difference};
use crate::{
    dtype::DType,
    oracle::{self, Gradients},
    problem::Problem,
    session::{self, Inputs},
    tensor::Tensor,
};

/// The plain algorithm's credited errors on gradients: its largest error of each.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GradientCredit {
    /// Of dQ.
    pub dq: Yardstick,
    /// Of dK.
    pub dk: Yardstick,
    /// Of dV.
    pub dv: Yardstick,
    /// Of the gradient of the bias.
    pub d_bias: Yardstick,
    /// Of the gradient of the sinks.
    pub d_sinks: Yardstick,
}

impl GradientCredit {
    /// The plain algorithm's worst errors on some heads of K and V of a problem. `reference`: the
    /// reference for the inputs themselves.
    #[must_use]
    pub fn of(
        p: &Problem,
        inputs: &Inputs<'_>,
        d_o: &Tensor,
        heads: &[usize],
        reference: &Gradients,
    ) -> Self {
        let pairs = heads.len() * p.group() * p.seq_q() * p.seq_k();
        let rows = heads.len() * p.seq_q().min(p.seq_k());
        let absolute = oracle::absolute_gradients(p, inputs, d_o, heads);
        let first = Self::of_draw(p, inputs, d_o, heads, reference);
        let rounding =
            |values: &[f64]| Yardstick::new(0.0, DType::F32.unit_roundoff() * largest(values));
        let first = first.max(Self {
            dq: rounding(&absolute.dq),
            dk: rounding(&absolute.dk),
            dv: rounding(&absolute.dv),
            d_bias: rounding(&absolute.d_bias),
            d_sinks: rounding(&absolute.d_sinks),
        });
        let draws = draws((5 * pairs * p.head_dim()) as u64, rows as u64);
        (1..draws).fold(first, |worst, draw| {
            let [q, k] = [(inputs.q, 0), (inputs.k, 1)].map(|(t, stream)| beside(t, draw, stream));
            let [v, d_o] = [(inputs.v, 2), (d_o, 3)].map(|(t, stream)| beside(t, draw, stream));
            let inputs = Inputs { q: &q, k: &k, v: &v, ..*inputs };
            let reference = oracle::gradients(p, &inputs, &d_o, heads);
            worst.max(Self::of_draw(p, &inputs, &d_o, heads, &reference))
        })
    }

    fn of_draw(
        p: &Problem,
        inputs: &Inputs<'_>,
        d_o: &Tensor,
        heads: &[usize],
        reference: &Gradients,
    ) -> Self {
        let of_plain = |plain: &Gradients| each(plain, reference, largest_difference);
        let mut all = of_plain(&oracle::plain_gradients(p, inputs, d_o, heads));
        if all.iter().flatten().any(|(error, _)| !error.is_finite()) {
            all = of_plain(&oracle::plain_gradients_with_f32_scores(p, inputs, d_o, heads));
        }
        let rounding = p.dtype().unit_roundoff() + 3.0 * DType::F32.unit_roundoff();
        let yardstick = |(error, expected)| Yardstick::new(error, rounding * expected);
        let [dq, dk, dv, d_bias, d_sinks] =
            all.map(|found| found.map_or_else(Yardstick::default, yardstick));
        Self { dq, dk, dv, d_bias, d_sinks }
    }

    /// The larger value of each pair.
    #[must_use]
    pub const fn max(self, other: Self) -> Self {
        Self {
            dq: self.dq.max(other.dq),
            dk: self.dk.max(other.dk),
            dv: self.dv.max(other.dv),
            d_bias: self.d_bias.max(other.d_bias),
            d_sinks: self.d_sinks.max(other.d_sinks),
        }
    }
}

/// Compares each existing gradient.
fn each<T>(
    actual: &Gradients,
    expected: &Gradients,
    compare: impl Fn(&[f64], &[f64]) -> T,
) -> [Option<T>; 5] {
    let of = |actual: &[f64], expected: &[f64]| {
        (!expected.is_empty()).then(|| compare(actual, expected))
    };
    [
        of(&actual.dq, &expected.dq),
        of(&actual.dk, &expected.dk),
        of(&actual.dv, &expected.dv),
        of(&actual.d_bias, &expected.d_bias),
        of(&actual.d_sinks, &expected.d_sinks),
    ]
}

/// A kernel's gradients against the reference, with the verdict.
#[derive(Clone, Debug, PartialEq)]
pub struct GradientVerification {
    /// Differences of dQ, dK, dV, and of the gradients of the bias and of the sinks, where these
    /// exist.
    pub differences: [Option<Differences>; 5],
    /// The plain algorithm's credited errors.
    pub credit: GradientCredit,
}

impl GradientVerification {
    /// Compares some heads of K and V of a kernel's gradients with the reference for those heads.
    #[must_use]
    pub fn new(
        p: &Problem,
        inputs: &Inputs<'_>,
        gradients: &session::Gradients,
        heads: &[usize],
        reference: &Gradients,
        credit: GradientCredit,
    ) -> Self {
        let actual = oracle::gradients_of(p, inputs, gradients, heads);
        let mut reference = reference.clone();
        // One that the kernel was not asked for is compared with nothing.
        if gradients.d_bias.is_none() {
            reference.d_bias.clear();
        }
        if gradients.d_sinks.is_none() {
            reference.d_sinks.clear();
        }
        Self { differences: each(&actual, &reference, Differences::new), credit }
    }

    /// Each gradient by its name, with its yardstick.
    pub fn each(&self) -> impl Iterator<Item = (&'static str, &Differences, Yardstick)> {
        let GradientCredit { dq, dk, dv, d_bias, d_sinks } = self.credit;
        let of = [("dQ", dq), ("dK", dk), ("dV", dv), ("dB", d_bias), ("dsinks", d_sinks)];
        let all = self.differences.iter().zip(of);
        all.filter_map(|(d, (name, yardstick))| d.as_ref().map(|d| (name, d, yardstick)))
    }

    /// Whether all errors are within their limits.
    #[must_use]
    pub fn passes(&self) -> bool {
        self.each().all(|(_, d, yardstick)| yardstick.allows(d.max_abs))
    }
}

impl std::fmt::Display for GradientVerification {
    /// One line: the errors with their limits, and the worst values.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut separator = "";
        for (name, d, yardstick) in self.each() {
            let (Worst { index, actual, expected }, limit) = (d.worst, yardstick.limit());
            write!(
                f,
                "{separator}{name} error {:.2e} (limit {limit:.2e}) at {index}: {actual} for {expected}",
                d.max_abs
            )?;
            separator = "; ";
        }
        Ok(())
    }
}

/// Verifies some heads of K and V of a kernel's gradients.
#[must_use]
pub fn verify_gradients(
    problem: &Problem,
    inputs: &Inputs<'_>,
    d_o: &Tensor,
    gradients: &session::Gradients,
    heads: &[usize],
) -> GradientVerification {
    let reference = oracle::gradients(problem, inputs, d_o, heads);
    let credit = GradientCredit::of(problem, inputs, d_o, heads, &reference);
    GradientVerification::new(problem, inputs, gradients, heads, &reference, credit)
}
