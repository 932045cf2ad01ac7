//! Is a kernel right? Its O and LSE are compared with attention in f64
//! ([`oracle::reference`]), and its error may be at most twice
//! that of the plain algorithm in the same storage precision
//! ([`oracle::plain`]), which is compared with f64 too.
//!
//! Why a ratio: how far a correct kernel is from f64 depends on the type, the size of
//! the scores and the number of keys. A fixed tolerance is too wide for one problem and too
//! narrow for another; the plain algorithm has met the same problem. (The rule is that
//! of FlashAttention's own tests.)
//!
//! What the plain algorithm is credited with, beyond its error:
//! - the roundings that nobody can avoid: one of the largest |O| to the storage type,
//!   and two f32 roundings of the largest |LSE| (one of the score, one of the result).
//!   With one key, or when every product is exact, the plain algorithm has no error at
//!   all, and twice nothing would forbid the rounding of a different order of operations;
//! - in suites, its worst error over [`DRAWS`] draws of the same problem. On a few
//!   elements, or with scores so large that one key takes all the weight, an error is a
//!   matter of luck: whether two keys come so close that rounding swaps them.
//!
//! A NaN anywhere fails.

use crate::{
    oracle::{self, Rows},
    problem::Problem,
    session::{Inputs, Outputs},
};

/// Draws of a problem over which suites take the plain algorithm's worst error.
pub const DRAWS: u64 = 8;
/// A kernel's error may be this many times that of the plain algorithm.
pub const FACTOR: f64 = 2.0;
/// Half a unit in the last place of an f32.
const F32_ROUNDOFF: f64 = 1.0 / (1u64 << 24) as f64;

/// How two sets of values differ.
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
    /// Where the largest difference is.
    pub worst: Worst,
    /// Absolute differences by size.
    pub abs_histogram: Histogram,
    /// Relative differences by size.
    pub rel_histogram: Histogram,
}

/// The place of the largest difference, and what stands there.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Worst {
    /// Index into the values compared.
    pub index: usize,
    /// The value there.
    pub actual: f64,
    /// What it should be.
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
            let difference = match (a - e).abs() {
                _ if a == e => 0.0,
                d if d.is_nan() => f64::INFINITY,
                d => d,
            };
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

fn median(values: &mut [f64]) -> f64 {
    if values.is_empty() {
        return 0.0;
    }
    let middle = values.len() / 2;
    *values.select_nth_unstable_by(middle, f64::total_cmp).1
}

/// What the plain algorithm is credited with: largest absolute errors.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Credit {
    /// Of O.
    pub o: f64,
    /// Of LSE.
    pub lse: f64,
}

impl Credit {
    /// The plain algorithm's errors on one draw of a problem, and no less than the
    /// roundings that nobody can avoid.
    #[must_use]
    pub fn of(problem: &Problem, inputs: &Inputs<'_>, rows: &[usize], reference: &Rows) -> Self {
        let plain = oracle::plain(problem, inputs, rows);
        let o = Differences::new(&plain.o, &reference.o);
        let lse = Differences::new(&plain.lse, &reference.lse);
        Self {
            o: o.max_abs.max(problem.dtype().unit_roundoff() * o.max_expected),
            lse: lse.max_abs.max(2.0 * F32_ROUNDOFF * lse.max_expected),
        }
    }

    /// The larger of each.
    #[must_use]
    pub fn worst(self, other: Self) -> Self {
        Self { o: self.o.max(other.o), lse: self.lse.max(other.lse) }
    }
}

/// A kernel's outputs against the reference, with the verdict.
#[derive(Clone, Debug, PartialEq)]
pub struct Verification {
    /// Differences of O.
    pub o: Differences,
    /// Differences of LSE.
    pub lse: Differences,
    /// What the plain algorithm is credited with.
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

    /// The largest error of O that passes.
    #[must_use]
    pub fn o_limit(&self) -> f64 {
        FACTOR * self.credit.o
    }

    /// The largest error of LSE that passes.
    #[must_use]
    pub fn lse_limit(&self) -> f64 {
        FACTOR * self.credit.lse
    }

    /// Whether both errors are within their limits.
    #[must_use]
    pub fn passes(&self) -> bool {
        // A plain algorithm that is itself infinitely wrong (an overflow to infinity in f16)
        // vouches for nothing, so that an infinite error fails all the same.
        let within = |error: f64, limit: f64| error.is_finite() && error <= limit;
        within(self.o.max_abs, self.o_limit()) && within(self.lse.max_abs, self.lse_limit())
    }
}

impl std::fmt::Display for Verification {
    /// One line: both errors with their limits, and the worst values.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (name, d, limit, separator) in
            [("O", &self.o, self.o_limit(), "; "), ("LSE", &self.lse, self.lse_limit(), "")]
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

/// Verifies some rows of a kernel's outputs against one draw, the inputs themselves.
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
    use crate::{dtype::DType, tensor::Tensor};

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
            let inputs = Inputs { q, k, v, mask: None };
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
            wrong[77] += 10.0 * result.o_limit();
            let result = verify(&p, &inputs, &outputs(&wrong), &rows);
            assert!(!result.passes() && result.o.worst.index == 77, "{dtype}: {result}");
            wrong[77] = f64::NAN;
            assert!(!verify(&p, &inputs, &outputs(&wrong), &rows).passes());
        }
    }
}
