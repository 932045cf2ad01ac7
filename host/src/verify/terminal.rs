//! Histograms in the terminal: one line per decade, absolute and relative differences side by side.

use crate::results::{Check, Histogram};

/// Blocks of the longest bar.
const BAR: usize = 24;

/// The spread of one tensor's differences.
#[must_use]
pub fn histograms(check: &Check) -> String {
    let (abs, rel) = (decades(&check.abs_histogram), decades(&check.rel_histogram));
    let width = BAR + 7;
    let mut text = format!(
        "{}, {}: share of differences by size\n  from     {:width$}  relative",
        check.kernel, check.tensor, "absolute"
    );
    let (abs_zeros, rel_zeros) = (check.abs_histogram.zeros, check.rel_histogram.zeros);
    if abs_zeros + rel_zeros > 0 {
        text += &line("0", abs_zeros, &abs, rel_zeros, &rel);
    }
    let first = |d: &Decades| d.counts.first().map(|_| d.first);
    let end = |d: &Decades| d.first + d.counts.len() as i32;
    let low = [&abs, &rel].into_iter().filter_map(first).min();
    let high = [&abs, &rel].into_iter().filter(|d| !d.counts.is_empty()).map(end).max();
    for decade in low.unwrap_or(0)..high.unwrap_or(0) {
        let label = format!("1e{decade}");
        text += &line(&label, abs.at(decade), &abs, rel.at(decade), &rel);
    }
    text
}

fn line(label: &str, abs: u64, of_abs: &Decades, rel: u64, of_rel: &Decades) -> String {
    let (abs, rel) = (of_abs.bar(abs), of_rel.bar(rel));
    format!("\n  {label:<7}  {}", format!("{abs}  {rel}").trim_end())
}

/// Counts by decade.
struct Decades {
    first: i32,
    counts: Vec<u64>,
    total: u64,
    largest: u64,
}

fn decades(histogram: &Histogram) -> Decades {
    let per_decade = histogram.per_decade.max(1) as usize;
    let counts: Vec<u64> =
        histogram.counts.chunks(per_decade).map(|bins| bins.iter().sum()).collect();
    let largest = counts.iter().copied().max().unwrap_or(0).max(histogram.zeros);
    let total = counts.iter().sum::<u64>() + histogram.zeros;
    Decades { first: histogram.first, counts, total, largest }
}

impl Decades {
    fn at(&self, decade: i32) -> u64 {
        let index = usize::try_from(decade - self.first).ok();
        index.and_then(|i| self.counts.get(i)).copied().unwrap_or(0)
    }

    /// A bar whose length is the count relative to the largest count, and the share of all.
    fn bar(&self, count: u64) -> String {
        if count == 0 {
            return " ".repeat(BAR + 7);
        }
        let length = (count as f64 / self.largest as f64 * BAR as f64).ceil() as usize;
        let percent = 100.0 * count as f64 / self.total as f64;
        let share = if percent < 0.1 { "<0.1%".into() } else { format!("{percent:.1}%") };
        format!("{:BAR$} {share:>6}", "█".repeat(length))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decades_line_up() {
        let histogram = |first, counts: &[u64], zeros| Histogram {
            first,
            per_decade: 2,
            counts: counts.to_vec(),
            zeros,
        };
        let (abs, rel) = (histogram(-3, &[1, 1, 6, 0], 2), histogram(-2, &[5, 5], 0));
        let decades = decades(&abs);
        assert_eq!((decades.at(-3), decades.at(-2), decades.at(0)), (2, 6, 0));
        assert_eq!(decades.bar(6).trim_end(), format!("{}  60.0%", "█".repeat(BAR)));
        let mut text = line("0", 2, &decades, 0, &super::decades(&rel));
        assert!(text.ends_with("20.0%"), "{text:?}");
        text = line("1e-2", 0, &decades, 10, &super::decades(&rel));
        assert!(text.ends_with("100.0%"), "{text:?}");
    }
}
