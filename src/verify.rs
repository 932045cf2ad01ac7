//! Is a kernel right? This module compares its O and LSE with attention in f64
//! ([`oracle::reference`]). The error may be at most twice the error of the plain algorithm in the
//! same storage precision ([`oracle::plain`]), also against f64.
//!
//! Why a ratio: the distance of a correct kernel from f64 depends on the type, the size of the
//! scores and the number of keys. A fixed tolerance is too wide for one problem and too narrow for
//! another; the plain algorithm solves the same problem. (FlashAttention's own tests use the same
//! rule.)
//!
//! On a few elements the plain algorithm's error is a matter of luck. So it is where scores are so
//! large that one row decides: two keys may come so close that rounding swaps them. The yardstick
//! is therefore the worst error over several draws. Each draw is an input beside the given one
//! (every element moved by one unit in its last place, or left): the same problem with other
//! roundings. [`draws`] gives the number of draws: one where there are enough rows.
//!
//! The plain algorithm is also credited with the unavoidable roundings. For the largest |O| these
//! are one to the storage type, and three in f32 (of the weight, of its product with V, of the
//! division by the sum of weights). For the LSE these are two in f32, of the result and of the
//! score, whose products are rounded before they cancel. In any order of summation a dot product of
//! length n errs by at most `n u / (1 - n u) * sum |q_d k_d|` (Higham, "Accuracy and Stability of
//! Numerical Algorithms", section 3.1), `u` the unit roundoff. The credit is one `u` of this bound,
//! one rounding per product, at the weighted mean of those sums ([`oracle::absolute_scores`]). With
//! one key, or when every product is exact, the plain algorithm has no error at all, and twice
//! nothing would forbid the rounding of a different order of operations.
//!
//! Where scores overflow the storage type, the plain algorithm gives NaN or worse. It then runs
//! with its scores in f32, and every other tensor in the storage type. A [`Yardstick`] is always
//! finite: an infinite error, or a NaN, fails.

mod backward;
mod decode;

pub use backward::{GradientCredit, GradientVerification, verify_gradients};
pub use decode::{verify_decode, verify_decode_rows};

use crate::{
    dtype::DType,
    oracle::{self, Rows},
    problem::Problem,
    session::{Inputs, Outputs},
    tensor::Tensor,
};

/// A kernel's error may be this many times the plain algorithm's error.
pub const FACTOR: f64 = 2.0;
/// Multiplications that draws after the first may take.
const DRAWS_BUDGET: u64 = 1 << 23;
/// The number of rows from which the largest error must come: among this many independent errors
/// one is large. (The largest of 64 from a normal distribution is below half of a new one's size
/// once in 10^5.)
const LEAST_ROWS: u64 = 64;

/// The differences between two sets of values.
#[derive(Clone, Debug, PartialEq)]
pub struct Differences {
    /// Values compared.
    pub count: usize,
    /// Largest |actual - expected|; infinite where a NaN or a wrong infinity stands.
    pub max_abs: f64,
    /// Mean of |actual - expected|.
    pub mean_abs: f64,
    /// Median of |actual - expected|.
    pub median_abs: f64,
    /// Largest |actual - expected| / |expected|, over expected values that are not 0.
    pub max_rel: f64,
    /// Mean of the same.
    pub mean_rel: f64,
    /// Median of the same.
    pub median_rel: f64,
    /// sqrt(sum of squared differences / sum of squared expected values).
    pub rel_rms: f64,
    /// Largest finite |expected|.
    pub max_expected: f64,
    /// The place of the largest difference.
    pub worst: Worst,
    /// Absolute differences by size.
    pub abs_histogram: Histogram,
    /// Relative differences by size.
    pub rel_histogram: Histogram,
}

/// The place of the largest difference, and the values there.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Worst {
    /// Index into the values compared.
    pub index: usize,
    /// The value there.
    pub actual: f64,
    /// The expected value.
    pub expected: f64,
}

/// Counts of values by order of magnitude.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram {
    /// Counts; bin `i` holds the values from [`Histogram::lower_edge`]`(i)` on, the first
    /// and last also those beyond.
    pub bins: Vec<u64>,
    /// Values that are exactly 0.
    pub zeros: u64,
}

impl Histogram {
    /// Exponent of ten at which the bins start.
    pub const FIRST_DECADE: i32 = -12;
    /// Exponent of ten at which the bins end.
    pub const LAST_DECADE: i32 = 4;
    /// Bins of a decade.
    pub const BINS_PER_DECADE: i32 = 4;

    /// Counts magnitudes.
    #[must_use]
    pub fn new(values: &[f64]) -> Self {
        let len = (Self::LAST_DECADE - Self::FIRST_DECADE) * Self::BINS_PER_DECADE;
        let mut result = Self { bins: vec![0; len as usize], zeros: 0 };
        for &value in values {
            if value == 0.0 {
                result.zeros += 1;
                continue;
            }
            let decades = value.log10() - f64::from(Self::FIRST_DECADE);
            // NaN goes to the first bin by this cast; a NaN is reported by `max_abs`.
            let bin = (decades * f64::from(Self::BINS_PER_DECADE)).floor().max(0.0) as usize;
            result.bins[bin.min(len as usize - 1)] += 1;
        }
        result
    }

    /// The least value of bin `i`.
    #[must_use]
    pub fn lower_edge(i: usize) -> f64 {
        let decade = i as f64 / f64::from(Self::BINS_PER_DECADE) + f64::from(Self::FIRST_DECADE);
        10f64.powf(decade)
    }
}

impl Differences {
    /// Compares values. Equal infinities do not differ; a NaN differs infinitely from
    /// everything.
    ///
    /// # Panics
    /// When there are not as many of one as of the other, or none.
    #[must_use]
    pub fn new(actual: &[f64], expected: &[f64]) -> Self {
        assert_eq!(actual.len(), expected.len(), "values compared must be as many");
        assert!(!actual.is_empty(), "there must be values to compare");
        let (mut abs, mut rel) = (Vec::with_capacity(actual.len()), Vec::new());
        let (mut squares, mut expected_squares, mut max_expected) = (0.0, 0.0, 0f64);
        let mut worst = 0;
        for (index, (&a, &e)) in actual.iter().zip(expected).enumerate() {
            let difference = difference(a, e);
            abs.push(difference);
            if difference > abs[worst] {
                worst = index;
            }
            squares += difference * difference;
            if e.is_finite() {
                expected_squares += e * e;
                max_expected = max_expected.max(e.abs());
            }
            if e != 0.0 {
                rel.push(if difference == 0.0 { 0.0 } else { difference / e.abs() });
            }
        }
        let rel_rms = if squares == 0.0 { 0.0 } else { (squares / expected_squares).sqrt() };
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
        Self {
            count: actual.len(),
            max_abs: abs[worst],
            mean_abs: mean(&abs),
            max_rel: rel.iter().copied().fold(0.0, f64::max),
            mean_rel: mean(&rel),
            rel_rms,
            max_expected,
            worst: Worst { index: worst, actual: actual[worst], expected: expected[worst] },
            abs_histogram: Histogram::new(&abs),
            rel_histogram: Histogram::new(&rel),
            median_abs: median(&mut abs),
            median_rel: median(&mut rel),
        }
    }
}

/// |actual - expected|; infinite where a NaN or a wrong infinity stands.
fn difference(actual: f64, expected: f64) -> f64 {
    match (actual - expected).abs() {
        _ if actual == expected => 0.0,
        d if d.is_nan() => f64::INFINITY,
        d => d,
    }
}

/// The largest [`difference`], and the largest finite |expected|: all of [`Differences`] that a
/// [`Yardstick`] needs.
pub(crate) fn largest_difference(actual: &[f64], expected: &[f64]) -> (f64, f64) {
    assert_eq!(actual.len(), expected.len(), "values compared must be as many");
    let both = actual.iter().zip(expected);
    (both.map(|(&a, &e)| difference(a, e)).fold(0.0, f64::max), largest(expected))
}

/// The largest finite size.
fn largest(values: &[f64]) -> f64 {
    values.iter().map(|x| x.abs()).filter(|x| x.is_finite()).fold(0.0, f64::max)
}

fn median(values: &mut [f64]) -> f64 {
    if values.is_empty() {
        return 0.0;
    }
    let middle = values.len() / 2;
    *values.select_nth_unstable_by(middle, f64::total_cmp).1
}

/// The measure of an error: the plain algorithm's error. Always finite.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd)]
pub struct Yardstick(f64);

impl Yardstick {
    /// The larger of the plain algorithm's largest error and an unavoidable rounding. An error that
    /// is not finite is no measure; then the rounding remains.
    #[must_use]
    pub fn new(plain_error: f64, rounding: f64) -> Self {
        let finite = |x: f64| if x.is_finite() { x } else { 0.0 };
        Self(finite(plain_error).max(finite(rounding)))
    }

    /// The plain algorithm's error.
    #[must_use]
    pub const fn error(self) -> f64 {
        self.0
    }

    /// The largest error that passes.
    #[must_use]
    pub fn limit(self) -> f64 {
        FACTOR * self.0
    }

    /// Whether an error passes; NaN and infinity do not.
    #[must_use]
    pub fn allows(self, error: f64) -> bool {
        error.is_finite() && error <= self.limit()
    }

    /// The larger of two.
    #[must_use]
    pub const fn max(self, other: Self) -> Self {
        Self(self.0.max(other.0))
    }
}

/// The number of draws for the plain algorithm's error, given the multiplications and the compared
/// rows of one draw: as many draws as take negligible time, and enough to see 64 rows.
#[must_use]
pub fn draws(multiplications: u64, rows: u64) -> u64 {
    let affordable = DRAWS_BUDGET / multiplications.max(1);
    affordable.max(LEAST_ROWS.div_ceil(rows.max(1))).clamp(1, LEAST_ROWS)
}

/// The tensor, or for draws after the first a neighbour of it: every element moved by at most one
/// unit in its last place.
pub(crate) fn beside(tensor: &Tensor, draw: u64, stream: u64) -> Tensor {
    if draw == 0 {
        return tensor.clone();
    }
    tensor.beside(16 * draw + stream)
}

/// The plain algorithm's credited errors.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Credit {
    /// The largest error of O.
    pub o: Yardstick,
    /// The largest error of LSE.
    pub lse: Yardstick,
}

impl Credit {
    /// The plain algorithm's worst errors on a problem. `reference`: the reference for the inputs
    /// themselves.
    #[must_use]
    pub fn of(problem: &Problem, inputs: &Inputs<'_>, rows: &[usize], reference: &Rows) -> Self {
        let of_key = problem.head_dim().max(problem.head_dim_v());
        let multiplications = (rows.len() * problem.seq_k() * of_key) as u64;
        let first = Self::of_draw(problem, inputs, rows, reference);
        let first =
            Self { lse: first.lse.max(lse_rounding(problem, inputs, rows, reference)), ..first };
        (1..draws(multiplications, rows.len() as u64)).fold(first, |worst, draw| {
            let (q, k) = (beside(inputs.q, draw, 0), beside(inputs.k, draw, 1));
            let v = beside(inputs.v, draw, 2);
            let inputs = Inputs { q: &q, k: &k, v: &v, ..*inputs };
            let reference = oracle::reference(problem, &inputs, rows);
            let Self { o, lse } = Self::of_draw(problem, &inputs, rows, &reference);
            Self { o: worst.o.max(o), lse: worst.lse.max(lse) }
        })
    }

    fn of_draw(problem: &Problem, inputs: &Inputs<'_>, rows: &[usize], reference: &Rows) -> Self {
        let differences = |plain: &Rows| {
            [(&plain.o, &reference.o), (&plain.lse, &reference.lse)]
                .map(|(actual, expected)| largest_difference(actual, expected))
        };
        let mut both = differences(&oracle::plain(problem, inputs, rows));
        if both.iter().any(|(error, _)| !error.is_finite()) {
            both = differences(&oracle::plain_with_f32_scores(problem, inputs, rows));
        }
        let [(o_error, o_largest), (lse_error, _)] = both;
        let in_f32 = DType::F32.unit_roundoff();
        let rounding = (problem.dtype().unit_roundoff() + 3.0 * in_f32) * o_largest;
        Self { o: Yardstick::new(o_error, rounding), lse: Yardstick::new(lse_error, 0.0) }
    }
}

/// The unavoidable roundings of the LSE: of the result, and of the score's products.
fn lse_rounding(
    problem: &Problem,
    inputs: &Inputs<'_>,
    rows: &[usize],
    reference: &Rows,
) -> Yardstick {
    let lse = largest(&reference.lse);
    let products = largest(&oracle::absolute_scores(problem, inputs, rows, &reference.lse));
    Yardstick::new(0.0, DType::F32.unit_roundoff() * (lse + lse.max(products)))
}

/// A kernel's outputs against the reference, with the verdict.
#[derive(Clone, Debug, PartialEq)]
pub struct Verification {
    /// Differences of O.
    pub o: Differences,
    /// Differences of LSE.
    pub lse: Differences,
    /// The plain algorithm's credited errors.
    pub credit: Credit,
}

impl Verification {
    /// Compares some rows of a kernel's outputs with the reference for those rows.
    #[must_use]
    pub fn new(
        problem: &Problem,
        outputs: &Outputs,
        rows: &[usize],
        reference: &Rows,
        credit: Credit,
    ) -> Self {
        let actual = oracle::rows_of(problem, outputs, rows);
        Self {
            o: Differences::new(&actual.o, &reference.o),
            lse: Differences::new(&actual.lse, &reference.lse),
            credit,
        }
    }

    /// Whether both errors are within their limits.
    #[must_use]
    pub fn passes(&self) -> bool {
        self.credit.o.allows(self.o.max_abs) && self.credit.lse.allows(self.lse.max_abs)
    }
}

impl std::fmt::Display for Verification {
    /// One line: both errors with their limits, and the worst values.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { o, lse, credit } = self;
        for (name, d, limit, separator) in
            [("O", o, credit.o.limit(), "; "), ("LSE", lse, credit.lse.limit(), "")]
        {
            let Worst { index, actual, expected } = d.worst;
            write!(
                f,
                "{name} error {:.2e} (limit {limit:.2e}) at {index}: {actual} for {expected}{separator}",
                d.max_abs
            )?;
        }
        Ok(())
    }
}

/// Verifies some rows of a kernel's outputs.
#[must_use]
pub fn verify(
    problem: &Problem,
    inputs: &Inputs<'_>,
    outputs: &Outputs,
    rows: &[usize],
) -> Verification {
    let reference = oracle::reference(problem, inputs, rows);
    let credit = Credit::of(problem, inputs, rows, &reference);
    Verification::new(problem, outputs, rows, &reference, credit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_those_of_the_definition() {
        let d = Differences::new(&[1.0, 2.5, -3.0, 0.0], &[1.0, 2.0, -4.0, 0.0]);
        assert_eq!((d.max_abs, d.mean_abs, d.median_abs), (1.0, 0.375, 0.5));
        assert_eq!((d.max_rel, d.mean_rel, d.median_rel), (0.25, 0.5 / 3.0, 0.25));
        assert_eq!(d.worst, Worst { index: 2, actual: -3.0, expected: -4.0 });
        assert!((d.rel_rms - (1.25f64 / 21.0).sqrt()).abs() < 1e-12);
        assert_eq!((d.abs_histogram.zeros, d.rel_histogram.zeros), (2, 1));
        assert_eq!(d.abs_histogram.bins.iter().sum::<u64>(), 2);
    }

    #[test]
    fn bins_start_at_their_edges() {
        let h = Histogram::new(&[1e-30, 1.0001e-12, 1.0001, 0.9999, 1e9]);
        let one = (-Histogram::FIRST_DECADE * Histogram::BINS_PER_DECADE) as usize;
        assert_eq!((h.bins[0], h.bins[one], h.bins[one - 1]), (2, 1, 1));
        assert_eq!(h.bins.last(), Some(&1));
        assert!((Histogram::lower_edge(one) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn nan_and_wrong_infinities_fail() {
        let inf = f64::INFINITY;
        assert_eq!(Differences::new(&[-inf, 1.0], &[-inf, 1.0]).max_abs, 0.0);
        for actual in [f64::NAN, inf, 0.0] {
            let d = Differences::new(&[1.0, actual], &[1.0, -inf]);
            assert_eq!((d.max_abs, d.worst.index), (inf, 1));
        }
        assert_eq!(Differences::new(&[f64::NAN], &[0.0]).max_abs, inf);
    }

    #[test]
    fn the_rule_tells_right_from_wrong() {
        for dtype in DType::ALL {
            let p = Problem::builder(1, 2, 40, 32).dtype(dtype).build().unwrap();
            let random = |seed| Tensor::random(dtype, &p.q_shape(), seed, 0.0);
            let [q, k, v] = &[random(1), random(2), random(3)];
            let inputs = Inputs::new(q, k, v);
            let rows = oracle::all_rows(&p);
            let plain = oracle::plain(&p, &inputs, &rows);
            let outputs = |o: &[f64]| Outputs {
                o: Tensor::from_f64(dtype, &p.q_shape(), o).unwrap(),
                lse: Tensor::from_f64(DType::F32, &p.lse_shape(), &plain.lse).unwrap(),
                weights: None,
            };
            let result = verify(&p, &inputs, &outputs(&plain.o), &rows);
            assert!(result.passes(), "{dtype}: {result}");
            let mut wrong = plain.o.clone();
            wrong[77] += 10.0 * result.credit.o.limit();
            let result = verify(&p, &inputs, &outputs(&wrong), &rows);
            assert!(!result.passes() && result.o.worst.index == 77, "{dtype}: {result}");
            wrong[77] = f64::NAN;
            assert!(!verify(&p, &inputs, &outputs(&wrong), &rows).passes());
        }
    }

    #[test]
    fn nothing_is_within_an_infinite_limit() {
        let inf = f64::INFINITY;
        for plain in [inf, -inf, f64::NAN] {
            let yardstick = Yardstick::new(plain, 0.5);
            assert_eq!((yardstick.error(), yardstick.limit()), (0.5, 1.0));
            assert!(yardstick.allows(1.0) && !yardstick.allows(1.1));
            assert!(!Yardstick::new(plain, plain).allows(f64::MIN_POSITIVE));
        }
        for error in [inf, -inf, f64::NAN] {
            assert!(!Yardstick::new(f64::MAX, 0.0).allows(error));
        }
    }

    /// Scores past the largest f16, which the plain algorithm cannot hold: O of zeros fails, and the
    /// rounded answer passes.
    #[test]
    fn zeros_fail_where_the_plain_algorithm_overflows() {
        let p = Problem::builder(1, 1, 4, 128).seq_k(64).dtype(DType::F16).build().unwrap();
        let full = |shape: &[usize], x| {
            let values = vec![x; shape.iter().product()];
            Tensor::from_f64(DType::F16, shape, &values).unwrap()
        };
        let (q, v) = (full(&p.q_shape(), 120.0), Tensor::random(DType::F16, &p.k_shape(), 1, 1.0));
        for k in [full(&p.k_shape(), 70.0), full(&p.k_shape(), -70.0)] {
            let inputs = Inputs::new(&q, &k, &v);
            let rows = oracle::all_rows(&p);
            let plain = oracle::plain(&p, &inputs, &rows);
            assert!(plain.lse.iter().all(|lse| !lse.is_finite()));
            let exact = oracle::reference(&p, &inputs, &rows);
            let passes = |o: Tensor| {
                let lse = Tensor::from_f64(DType::F32, &p.lse_shape(), &exact.lse).unwrap();
                verify(&p, &inputs, &Outputs { o, lse, weights: None }, &rows).passes()
            };
            let right = Tensor::from_f64(DType::F16, &p.q_shape(), &exact.o).unwrap();
            assert!(passes(right) && !passes(Tensor::zeros(DType::F16, &p.q_shape())));
        }
    }

    #[test]
    fn draws_are_the_same_problem_rounded_otherwise() {
        for dtype in DType::ALL {
            let t = Tensor::random(dtype, &[1000], 1, 0.0);
            assert_eq!(beside(&t, 0, 0), t);
            let moved = beside(&t, 1, 0);
            assert!(moved != beside(&t, 2, 0) && moved != beside(&t, 1, 1));
            let pairs = || t.to_f64().into_iter().zip(moved.to_f64());
            let same = pairs().filter(|(a, b)| a == b).count();
            assert!((200..500).contains(&same), "{same}");
            let unit = 2.0 * dtype.unit_roundoff();
            assert!(pairs().all(|(a, b)| (a - b).abs() <= 1.5 * unit * a.abs()));
        }
        let largest = Tensor::from_f64(DType::F16, &[100], &[65_504.0; 100]).unwrap();
        assert!(beside(&largest, 1, 0).to_f64().iter().all(|x| x.is_finite()));
    }

    #[test]
    fn draws_see_rows_enough_and_take_no_time() {
        assert_eq!((draws(1, 1), draws(u64::MAX, 1), draws(u64::MAX, 64)), (64, 64, 1));
        assert_eq!((draws(1 << 20, 1000), draws(u64::MAX, 63)), (8, 2));
    }
}
