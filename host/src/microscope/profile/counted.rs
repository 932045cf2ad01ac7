//! The emulator's counts, line by line of the kernels' source.

use std::collections::BTreeMap;

use flash_attention::backend::cpu::emulator::{Counts, LaunchRecord};

use crate::microscope::source::Line;

/// How often the warps of the blocks that a line belongs to came there.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spread {
    /// In the block that came least often.
    pub least: u64,
    /// In the block that came most often.
    pub most: u64,
    /// Per block.
    pub mean: f64,
}

impl Spread {
    /// Over `blocks` blocks, of which these came at all.
    fn of(times: impl Iterator<Item = u64>, blocks: u64) -> Self {
        let (mut came, mut sum, mut least, mut most) = (0, 0, u64::MAX, 0);
        for times in times {
            (came, sum) = (came + 1, sum + times);
            (least, most) = (least.min(times), most.max(times));
        }
        let least = if came < blocks { 0 } else { least };
        Self { least, most, mean: sum as f64 / blocks.max(1) as f64 }
    }
}

/// A line that a kernel came to.
#[derive(Clone, Debug)]
pub struct CountedLine {
    /// Which.
    pub line: Line,
    /// The counts there, over all launches.
    pub counts: Counts,
    /// Over the blocks (or clusters) of the launch that came most often.
    pub spread: Spread,
}

/// A launch of the kernel.
#[derive(Clone, Debug)]
pub struct CountedLaunch {
    /// Blocks.
    pub blocks: u64,
    /// Threads of a block.
    pub threads: u64,
    /// Blocks of a cluster.
    pub cluster: u32,
    /// Dynamic shared memory of a block in bytes.
    pub shared_bytes: u32,
    /// The entry's symbol.
    pub name: &'static str,
    /// All of it.
    pub total: Counts,
}

/// Everything that was counted.
#[derive(Clone, Debug)]
pub struct Counted {
    /// The launches, in their order.
    pub launches: Vec<CountedLaunch>,
    /// The lines, by file and number.
    pub lines: Vec<CountedLine>,
    /// All of it; what no kernel's line stands for included.
    pub total: Counts,
}

impl Counted {
    /// Puts the places of a line together.
    #[must_use]
    pub fn new(records: &[LaunchRecord]) -> Self {
        let mut lines: BTreeMap<Line, CountedLine> = BTreeMap::new();
        let (mut launches, mut total) = (Vec::new(), Counts::default());
        for record in records {
            let mut of_launch = Counts::default();
            let mut of_line: BTreeMap<Line, (Counts, BTreeMap<u64, u64>)> = BTreeMap::new();
            for place in &record.lines {
                of_launch += place.counts;
                let Some(line) = Line::of(place.file, place.line) else { continue };
                let (counts, clusters) = of_line.entry(line).or_default();
                *counts += place.counts;
                for &(cluster, times) in &place.clusters {
                    *clusters.entry(cluster).or_default() += times;
                }
            }
            let launch = record.launch;
            let blocks = launch.grid.count();
            for (line, (counts, clusters)) in of_line {
                let clusters = clusters.into_values();
                let spread = Spread::of(clusters, blocks / u64::from(launch.cluster));
                let counted = lines.entry(line).or_insert_with(|| CountedLine {
                    line,
                    counts: Counts::default(),
                    spread,
                });
                counted.counts += counts;
                if spread.most > counted.spread.most {
                    counted.spread = spread;
                }
            }
            total += of_launch;
            launches.push(CountedLaunch {
                blocks,
                threads: launch.block.count(),
                cluster: launch.cluster,
                shared_bytes: launch.shared_bytes,
                name: record.name,
                total: of_launch,
            });
        }
        Self { launches, lines: lines.into_values().collect(), total }
    }

    /// The files, the one with the most instructions first, each with its lines.
    #[must_use]
    pub fn files(&self) -> Vec<(&'static str, Vec<&CountedLine>)> {
        let mut files: Vec<(&'static str, Vec<&CountedLine>)> = Vec::new();
        for line in &self.lines {
            match files.last_mut() {
                Some((file, lines)) if *file == line.line.file => lines.push(line),
                _ => files.push((line.line.file, vec![line])),
            }
        }
        let warps = |lines: &[&CountedLine]| lines.iter().map(|l| l.counts.warps).sum::<u64>();
        files.sort_by_key(|(_, lines)| std::cmp::Reverse(warps(lines)));
        files
    }

    /// Sectors of 32 bytes that a request to global memory touches, on average.
    #[must_use]
    pub fn sectors_per_request(counts: &Counts) -> Option<f64> {
        ratio(counts.global_sectors, counts.global_requests)
    }

    /// Passes over shared memory that bank conflicts cost.
    #[must_use]
    pub fn conflicts(counts: &Counts) -> u64 {
        counts.shared_passes - counts.shared_passes_least
    }
}

fn ratio(numerator: u64, denominator: u64) -> Option<f64> {
    (denominator > 0).then(|| numerator as f64 / denominator as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_that_never_came_count() {
        let spread = Spread::of([4, 2].into_iter(), 3);
        assert_eq!(spread, Spread { least: 0, most: 4, mean: 2.0 });
        assert_eq!(Spread::of([3, 3].into_iter(), 2).least, 3);
    }
}
