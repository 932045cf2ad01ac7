//! From times to a row's figures, and from rows to ratios.

use crate::results::{Row, Status};

/// Summary of the times of one kernel in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Times {
    mean: f64,
    std: f64,
    min: f64,
    max: f64,
    median: f64,
}

impl Times {
    /// Summarises times; `None` if there are none.
    #[must_use]
    pub fn of(times: &[f64]) -> Option<Self> {
        let mut sorted = times.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        let count = sorted.len();
        let mean = sorted.iter().sum::<f64>() / count as f64;
        let squares: f64 = sorted.iter().map(|t| (t - mean).powi(2)).sum();
        // One run has no spread.
        let std = if count > 1 { (squares / (count - 1) as f64).sqrt() } else { 0.0 };
        let median = f64::midpoint(sorted[(count - 1) / 2], sorted[count / 2]);
        Some(Self { mean, std, min, max, median })
    }

    /// The median in milliseconds.
    #[must_use]
    pub const fn median(&self) -> f64 {
        self.median
    }

    /// Fills in the times and the rate.
    pub fn write_to(&self, row: &mut Row) {
        row.mean_ms = Some(self.mean);
        row.std_ms = Some(self.std);
        row.min_ms = Some(self.min);
        row.max_ms = Some(self.max);
        row.median_ms = Some(self.median);
        // FLOP per millisecond are 1e-9 TFLOP per second.
        row.tflops = (self.median > 0.0).then(|| row.flops / self.median * 1e-9);
    }
}

/// Fills in the time per run of many runs back to back.
pub fn write_sustained(row: &mut Row, ms: f64) {
    row.sustained_ms = Some(ms);
    row.sustained_tflops = (ms > 0.0).then(|| row.flops / ms * 1e-9);
}

/// The number of runs that take about the given seconds, by the median time of one run, with a
/// lower bound for slow runs and an upper bound for very fast ones.
pub fn runs_in(seconds: f64, row: &Row) -> usize {
    let ms = row.median_ms.unwrap_or_default().max(1e-3);
    ((1e3 * seconds / ms) as usize).clamp(3, 100_000)
}

/// Fills in the ratios of the rows of one sequence length and level: against `naive` (for gradients
/// `backward_naive`), and against `standard` where there is such a row.
pub fn fill_ratios(rows: &mut [Row]) {
    for index in 0..rows.len() {
        let row = &rows[index];
        // Times of the emulator and times of another library on real hardware do not
        // divide into anything meaningful.
        let against = |name: &str| {
            let base = rows.iter().find(|base| {
                base.kernel.strip_prefix("backward_").unwrap_or(&base.kernel) == name
                    && base.status == Status::Ok
                    && base.level == row.level
                    && base.seq == row.seq
                    && base.emulated == row.emulated
            });
            let speedup = base.and_then(|b| Some(b.median_ms? / row.median_ms?));
            let saved = base.and_then(|b| {
                let (base, own) = (b.peak_bytes?, row.peak_bytes?);
                Some(1.0 - own as f64 / base as f64)
            });
            (speedup.filter(|s| s.is_finite()), saved.filter(|s| s.is_finite()))
        };
        let ((naive, naive_saved), (standard, standard_saved)) =
            (against("naive"), against("standard"));
        let row = &mut rows[index];
        (row.speedup, row.memory_saved) = (naive, naive_saved);
        (row.speedup_standard, row.memory_saved_standard) = (standard, standard_saved);
    }
}

#[cfg(test)]
mod tests {
    use approx::assert_relative_eq;

    use super::*;

    #[test]
    fn times_are_summarised() {
        let times = Times::of(&[3.0, 1.0, 2.0, 6.0]).unwrap();
        assert_eq!((times.mean, times.min, times.max, times.median), (3.0, 1.0, 6.0, 2.5));
        assert_relative_eq!(times.std, (14.0f64 / 3.0).sqrt());
        assert_eq!(Times::of(&[2.0]).unwrap().std, 0.0);
        assert_eq!(Times::of(&[]), None);
        let mut row = Row { flops: 5e9, ..Row::default() };
        times.write_to(&mut row);
        assert_eq!(row.tflops, Some(2.0));
    }

    #[test]
    fn ratios_are_against_the_baseline_of_the_same_sequence() {
        let row = |kernel: &str, seq, ms, peak| Row {
            kernel: kernel.into(),
            seq,
            median_ms: Some(ms),
            peak_bytes: Some(peak),
            ..Row::default()
        };
        let mut rows = vec![
            row("naive", 1, 8.0, 100),
            row("flash", 1, 2.0, 25),
            row("flash", 2, 2.0, 25),
            Row { emulated: true, ..row("other", 1, 1.0, 1) },
        ];
        fill_ratios(&mut rows);
        assert_eq!((rows[0].speedup, rows[0].memory_saved), (Some(1.0), Some(0.0)));
        assert_eq!((rows[1].speedup, rows[1].memory_saved), (Some(4.0), Some(0.75)));
        assert_eq!(
            (rows[1].speedup_standard, rows[2].speedup, rows[3].speedup),
            (None, None, None)
        );
        rows[0].status = Status::Oom;
        fill_ratios(&mut rows);
        assert_eq!(rows[1].speedup, None);
    }
}
