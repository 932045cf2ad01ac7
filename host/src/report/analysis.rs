//! The analysis of a run's figures: series by kernel, fitted growth, conclusions. Drawing is
//! elsewhere.

use flash_attention::registry::{BACKWARD_KERNELS, KERNELS};

use crate::{
    format, peers,
    results::{Check, Level, Results, Row, Status},
};

/// The baseline kernel for the other kernels' ratios.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Baseline {
    /// GEMM, softmax, GEMM: preferred where it was run, because it is the fairer baseline.
    Standard,
    /// The textbook's three loops.
    Naive,
}

impl Baseline {
    /// Its name in the registry.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Standard => "standard",
            Self::Naive => "naive",
        }
    }

    /// A row's speed as a multiple of the baseline's.
    #[must_use]
    pub const fn speedup(self, row: &Row) -> Option<f64> {
        match self {
            Self::Standard => row.speedup_standard,
            Self::Naive => row.speedup,
        }
    }

    /// Share of the baseline's peak memory that a row saves.
    #[must_use]
    pub const fn memory_saved(self, row: &Row) -> Option<f64> {
        match self {
            Self::Standard => row.memory_saved_standard,
            Self::Naive => row.memory_saved,
        }
    }
}

/// The rows of one kernel, ascending in N.
#[derive(Clone, Debug)]
pub struct Series<'a> {
    /// Name of the kernel.
    pub kernel: &'a str,
    /// The number of its look ([`style`]).
    pub style: usize,
    /// Whether it is another library's kernel.
    pub peer: bool,
    /// Its rows.
    pub rows: Vec<&'a Row>,
}

impl<'a> Series<'a> {
    /// The measured rows.
    pub fn measured(&self) -> impl Iterator<Item = &'a Row> + '_ {
        self.rows.iter().copied().filter(|r| r.status == Status::Ok)
    }

    /// Whether it is one of our kernels that avoids the N x N matrix.
    #[must_use]
    pub fn is_flash(&self) -> bool {
        !self.peer && self.kernel.starts_with("flash")
    }

    /// Peak memory by N: measured, or predicted where the problem did not fit.
    #[must_use]
    pub fn memory(&self) -> Vec<(f64, f64)> {
        let bytes = |r: &Row| match r.status {
            Status::Ok => r.peak_bytes,
            Status::Oom => r.needed_bytes,
            Status::Unsupported | Status::Failed | Status::Timeout => None,
        };
        self.rows.iter().filter_map(|r| Some((r.seq as f64, bytes(r)? as f64))).collect()
    }

    /// Median time by N.
    #[must_use]
    pub fn times(&self) -> Vec<(f64, f64)> {
        self.measured().filter_map(|r| Some((r.seq as f64, time(r)?))).collect()
    }

    /// Bytes moved by N; only the emulator counts them.
    #[must_use]
    pub fn traffic(&self) -> Vec<(f64, f64)> {
        self.measured().filter_map(|r| Some((r.seq as f64, moved(r)? as f64))).collect()
    }
}

/// The rows of one level.
#[derive(Clone, Debug)]
pub struct View<'a> {
    /// The level.
    pub level: Level,
    /// One series per kernel, in the order of the run.
    pub series: Vec<Series<'a>>,
    /// The baseline, if one of the two baselines was run.
    pub baseline: Option<Baseline>,
}

/// The time of a row: the median, which an interrupted run does not move.
#[must_use]
pub fn time(row: &Row) -> Option<f64> {
    row.median_ms.or(row.mean_ms)
}

/// Bytes that a kernel read from global memory and wrote to it.
#[must_use]
pub fn moved(row: &Row) -> Option<u64> {
    Some(row.global_bytes_read? + row.global_bytes_written?)
}

/// The number of a kernel's look, the same in every picture of every run. Unknown kernels come
/// after the known ones, by name.
#[must_use]
pub fn style(results: &Results, kernel: &str) -> usize {
    let known = || {
        let ours = KERNELS.iter().map(|k| k.name.to_owned());
        let gradients = BACKWARD_KERNELS.iter().map(|k| k.name.to_owned());
        ours.chain(peers::names()).chain(gradients)
    };
    known().position(|name| name == kernel).unwrap_or_else(|| {
        let mut others = kernels(results);
        others.retain(|other| !known().any(|name| name == *other));
        others.sort_unstable();
        known().count() + others.iter().position(|other| *other == kernel).unwrap_or(0)
    })
}

/// Every kernel of a run, in the order of its rows and checks.
#[must_use]
pub fn kernels(results: &Results) -> Vec<&str> {
    let names = results.rows.iter().map(|r| r.kernel.as_str());
    let mut kernels = Vec::new();
    for name in names.chain(results.checks.iter().map(|c| c.kernel.as_str())) {
        if !kernels.contains(&name) {
            kernels.push(name);
        }
    }
    kernels
}

/// One view per level that has rows.
#[must_use]
pub fn views(results: &Results) -> Vec<View<'_>> {
    let kernels = kernels(results);
    let view = |level: Level| {
        let rows = || results.rows.iter().filter(move |r| r.level == level);
        let series: Vec<Series<'_>> = kernels
            .iter()
            .map(|&kernel| {
                let style = style(results, kernel);
                let mut rows: Vec<&Row> = rows().filter(|r| r.kernel == kernel).collect();
                rows.sort_by_key(|r| r.seq);
                Series { kernel, style, peer: rows.iter().any(|r| r.peer), rows }
            })
            .filter(|s| !s.rows.is_empty())
            .collect();
        let baseline = [Baseline::Standard, Baseline::Naive].into_iter().find(|baseline| {
            series.iter().any(|s| s.kernel == baseline.name() && s.measured().next().is_some())
        });
        (!series.is_empty()).then_some(View { level, series, baseline })
    };
    Level::ALL.into_iter().filter_map(view).collect()
}

/// The exponent `p` of the power law `y = c x^p` nearest to the points (least squares of
/// the logarithms), from two points with different `x` on.
#[must_use]
pub fn exponent(points: &[(f64, f64)]) -> Option<f64> {
    let logs: Vec<(f64, f64)> =
        points.iter().filter(|p| p.0 > 0.0 && p.1 > 0.0).map(|p| (p.0.ln(), p.1.ln())).collect();
    let n = logs.len() as f64;
    let (mx, my) = logs.iter().fold((0.0, 0.0), |m, p| (m.0 + p.0 / n, m.1 + p.1 / n));
    let (mut xx, mut xy) = (0.0, 0.0);
    for (x, y) in &logs {
        xx += (x - mx) * (x - mx);
        xy += (x - mx) * (y - my);
    }
    (logs.len() >= 2 && xx > 1e-9).then(|| xy / xx)
}

/// The N at which memory reaches `limit`, if memory continues as `a N + b N^2` through the points
/// (least squares relative to the values). `None` for more than 2^40 rows, or with fewer than two
/// points.
#[must_use]
pub fn seq_at_memory(points: &[(f64, f64)], limit: f64) -> Option<f64> {
    // Divided by y: minimise the sum of (a u + b v - 1)^2 with u = x / y, v = x^2 / y.
    let (mut uu, mut uv, mut vv, mut u1, mut v1) = (0.0, 0.0, 0.0, 0.0, 0.0);
    for &(x, y) in points {
        let (u, v) = (x / y, x * x / y);
        (uu, uv, vv, u1, v1) = (uu + u * u, uv + u * v, vv + v * v, u1 + u, v1 + v);
    }
    let determinant = uu * vv - uv * uv;
    if points.len() < 2 || determinant <= 1e-12 * uu * vv {
        return None;
    }
    let a = ((u1 * vv - v1 * uv) / determinant).max(0.0);
    let b = (v1 * uu - u1 * uv) / determinant;
    // The quadratic part of a linear law is rounding: a share below 1e-6 at the last point.
    let last = points.iter().copied().fold((0.0, 0.0), |m, p| if p.0 > m.0 { p } else { m });
    let seq = if b * last.0 * last.0 < 1e-6 * last.1 {
        limit / a
    } else {
        (-a + (a * a + 4.0 * b * limit).sqrt()) / (2.0 * b)
    };
    (seq.is_finite() && seq < (1u64 << 40) as f64).then_some(seq)
}

/// The kind of a conclusion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tone {
    /// A finding.
    Finding,
    /// A fact that the reader must know before using the figures.
    Caution,
    /// A fault.
    Failure,
}

/// One sentence drawn from the run's own figures.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conclusion {
    /// Its kind.
    pub tone: Tone,
    /// Its subject, in a word or two.
    pub topic: &'static str,
    /// The sentence.
    pub text: String,
}

/// All conclusions from the run's figures.
#[must_use]
pub fn conclusions(results: &Results) -> Vec<Conclusion> {
    let mut found = Found { results, all: Vec::new() };
    found.cautions();
    for view in views(results) {
        found.speed(&view);
        found.traffic(&view);
        found.growth(&view);
        found.capacity(&view);
        found.peers(&view);
    }
    found.capability();
    found.precision();
    found.all
}

struct Found<'a> {
    results: &'a Results,
    all: Vec<Conclusion>,
}

impl Found<'_> {
    fn add(&mut self, tone: Tone, topic: &'static str, text: String) {
        self.all.push(Conclusion { tone, topic, text });
    }

    /// "module: " where the run has both levels.
    fn prefix(&self, level: Level) -> String {
        let both = self.results.rows.iter().any(|r| r.level != level);
        if both { format!("{level}: ") } else { String::new() }
    }

    fn cautions(&mut self) {
        if self.results.device.emulated {
            self.add(
                Tone::Caution,
                "Emulated",
                format!(
                    "kernels ran on {}, whose times say nothing about a GPU: nothing is concluded from \
                     them. Memory, bytes moved and differences are those of the kernels themselves.",
                    self.results.device.name
                ),
            );
        }
        if self.results.interrupted {
            let text = "the run was stopped before everything was measured.";
            self.add(Tone::Caution, "Incomplete", text.into());
        }
        let failed: Vec<String> = self
            .results
            .rows
            .iter()
            .filter(|r| matches!(r.status, Status::Failed | Status::Timeout))
            .map(|r| format!("{} at N = {} ({})", r.kernel, r.seq, r.reason))
            .collect();
        if !failed.is_empty() {
            self.add(Tone::Failure, "Failed", format!("{}.", format::list(&failed)));
        }
    }

    /// Each flash kernel against the baseline, at the longest sequence that both ran.
    fn speed(&mut self, view: &View<'_>) {
        let Some(baseline) = view.baseline.filter(|_| !self.results.device.emulated) else {
            return;
        };
        let flash = || view.series.iter().filter(|s| s.is_flash());
        let compared = |s: &Series<'_>| -> Vec<(usize, f64, f64)> {
            let figures = |r: &Row| Some((r.seq, baseline.speedup(r)?, time(r)?));
            s.measured().filter_map(figures).collect()
        };
        let Some(longest) = flash().flat_map(&compared).map(|c| c.0).max() else { return };
        let base = view.series.iter().find(|s| s.kernel == baseline.name());
        let base = base.and_then(|s| s.measured().find(|r| r.seq == longest)).and_then(time);
        let mut there: Vec<(&str, f64, f64)> = Vec::new();
        let mut crossings = String::new();
        for s in flash() {
            let all = compared(s);
            if let Some(&(_, speedup, ms)) = all.iter().find(|c| c.0 == longest) {
                there.push((s.kernel, speedup, ms));
            }
            // Where it overtakes, if it does so between two of the lengths.
            let slower = all.iter().rposition(|c| c.1 <= 1.0);
            if let Some((seq, ..)) = slower.and_then(|index| all.get(index + 1)) {
                crossings += &format!(" {} is faster from N = {seq} on.", s.kernel);
            }
        }
        there.sort_by(|a, b| b.1.total_cmp(&a.1));
        let listed = |word: &str, faster: bool| {
            let those = there.iter().filter(|t| (t.1 > 1.0) == faster);
            let names: Vec<String> = those
                .map(|&(kernel, speedup, ms)| {
                    format!("{kernel} {} as fast ({})", ratio(speedup), format::millis(ms))
                })
                .collect();
            let empty = names.is_empty();
            if empty { String::new() } else { format!(" {word}: {}.", format::list(&names)) }
        };
        let name = baseline.name();
        let base = base.map_or_else(|| "–".into(), format::millis);
        let text = format!(
            "{}at N = {longest} {name} takes {base}.{}{}{crossings}",
            self.prefix(view.level),
            listed("Faster", true),
            listed("Slower", false)
        );
        self.add(Tone::Finding, "Speed", text);
    }

    /// Bytes moved to and from global memory; only the emulator counts them.
    fn traffic(&mut self, view: &View<'_>) {
        let Some(baseline) = view.baseline else { return };
        let Some(plain) = view.series.iter().find(|s| s.kernel == baseline.name()) else { return };
        let Some((row, plain_bytes)) =
            plain.measured().filter_map(|r| Some((r, moved(r)?))).max_by_key(|(r, _)| r.seq)
        else {
            return;
        };
        let flash = view.series.iter().filter(|s| s.is_flash()).flat_map(Series::measured);
        let Some((kernel, bytes)) = flash
            .filter(|r| r.seq == row.seq)
            .filter_map(|r| Some((&r.kernel, moved(r)?)))
            .min_by_key(|(_, bytes)| *bytes)
        else {
            return;
        };
        let text = format!(
            "{}at N = {} {kernel} asks global memory for {} where {} asks for {}: {} less, as \
             counted, before any cache.",
            self.prefix(view.level),
            row.seq,
            format::bytes(bytes as f64),
            baseline.name(),
            format::bytes(plain_bytes as f64),
            ratio(plain_bytes as f64 / bytes as f64),
        );
        self.add(Tone::Finding, "Bytes moved", text);
    }

    fn growth(&mut self, view: &View<'_>) {
        // Kernels that grow alike, in one phrase.
        let fits = |points: fn(&Series<'_>) -> Vec<(f64, f64)>| -> Vec<String> {
            let mut groups: Vec<(String, Vec<&str>)> = Vec::new();
            for s in &view.series {
                let Some(p) = exponent(&points(s)) else { continue };
                let p = format!("N^{p:.2}");
                match groups.iter_mut().find(|g| g.0 == p) {
                    Some(group) => group.1.push(s.kernel),
                    None => groups.push((p, vec![s.kernel])),
                }
            }
            groups.into_iter().map(|(p, names)| format!("{p} ({})", names.join(", "))).collect()
        };
        let emulated = self.results.device.emulated;
        let times = if emulated { Vec::new() } else { fits(|s| s.times()) };
        let (moved, memory) = (fits(|s| s.traffic()), fits(|s| s.memory()));
        let prefix = self.prefix(view.level);
        let range = |points: fn(&Series<'_>) -> Vec<(f64, f64)>| {
            let all = || view.series.iter().flat_map(points).map(|p| p.0);
            let (low, high) = (all().fold(f64::MAX, f64::min), all().fold(0.0, f64::max));
            format!("fitted over N = {low} to {high}")
        };
        if !times.is_empty() {
            let text = format!(
                "{prefix}time grows as {}, {}.",
                format::list(&times),
                range(|s| s.times())
            );
            self.add(Tone::Finding, "Growth of time", text);
        }
        if !moved.is_empty() {
            let text = format!(
                "{prefix}bytes moved grow as {}, {}.",
                format::list(&moved),
                range(|s| s.traffic())
            );
            self.add(Tone::Finding, "Growth of bytes moved", text);
        }
        if !memory.is_empty() {
            let within = match view.level {
                Level::Attention => "inputs and output, which grow as N, are in it",
                Level::Backward => "inputs, outputs and gradients, which grow as N, are in it",
                Level::ModuleBackward => {
                    "inputs, outputs and what the backward pass reads, which grow as N, and the \
                     parameters and their gradients, which do not grow, are in it"
                }
                Level::Module => {
                    "input and output, which grow as N, and the parameters, which do not grow, are \
                     in it"
                }
            };
            let text = format!(
                "{prefix}peak memory grows as {}, {}; {within}.",
                format::list(&memory),
                range(|s| s.memory())
            );
            self.add(Tone::Finding, "Growth of memory", text);
        }
    }

    fn capacity(&mut self, view: &View<'_>) {
        let device = &self.results.device;
        let (limit, whose) = match (device.memory_bytes, self.results.machine.memory_bytes) {
            (Some(bytes), _) if device.emulated => (bytes as f64, "the emulator's limit".into()),
            (Some(bytes), _) => (bytes as f64, device.name.clone()),
            (None, Some(bytes)) => {
                (bytes as f64, "this computer (the emulator itself has no limit)".into())
            }
            (None, None) => return,
        };
        let prefix = self.prefix(view.level);
        // The parameters of a module do not grow with N.
        let fixed = view.series[0].rows[0].parameter_bytes() as f64;
        let at = |s: &Series<'_>| {
            let growing: Vec<_> = s.memory().into_iter().map(|(n, y)| (n, y - fixed)).collect();
            let seq = seq_at_memory(&growing, limit - fixed)?;
            Some((s.kernel.to_owned(), seq))
        };
        let plain = view.baseline.and_then(|baseline| {
            view.series.iter().find(|s| s.kernel == baseline.name()).and_then(at)
        });
        let flash = view.series.iter().filter(|s| s.is_flash()).filter_map(at);
        let flash = flash.max_by(|a, b| a.1.total_cmp(&b.1));
        let batch_heads = view.series[0].rows[0];
        let Some((kernel, seq)) = plain else { return };
        let mut text = format!(
            "{prefix}at batch {} and {} {kernel} would fill the {} of {whose} at about N = {}",
            batch_heads.batch,
            format::counted(batch_heads.heads, "head"),
            format::bytes(limit),
            about(seq)
        );
        if let Some((kernel, seq)) = flash {
            text += &format!(", {kernel} at about N = {}", about(seq));
        }
        self.add(Tone::Finding, "Where memory ends", format!("{text}."));

        for s in &view.series {
            let Some(row) = s.rows.iter().find(|r| r.status == Status::Oom) else { continue };
            let Some(needed) = row.needed_bytes else { continue };
            let free = row.free_bytes.map_or_else(String::new, |free| {
                format!(", {} were free", format::bytes(free as f64))
            });
            let text = format!(
                "{prefix}{} did not fit at N = {}: it needs {}{free}.",
                s.kernel,
                row.seq,
                format::bytes(needed as f64)
            );
            self.add(Tone::Finding, "Out of memory", text);
        }
    }

    fn peers(&mut self, view: &View<'_>) {
        if self.results.device.emulated {
            return;
        }
        let fastest = |seq: usize, peer: bool| {
            let rows = view.series.iter().filter(|s| s.peer == peer).flat_map(Series::measured);
            rows.filter(|r| r.seq == seq)
                .filter_map(|r| Some((r.kernel.clone(), time(r)?)))
                .min_by(|a, b| a.1.total_cmp(&b.1))
        };
        let seqs = view.series.iter().filter(|s| s.peer).flat_map(Series::measured).map(|r| r.seq);
        let both = seqs.filter_map(|n| Some((n, fastest(n, false)?, fastest(n, true)?)));
        if let Some((seq, (ours, our_ms), (peer, peer_ms))) = both.max_by_key(|b| b.0) {
            let text = format!(
                "{}at N = {seq} {ours} takes {}, {peer} {}: {} as fast.",
                self.prefix(view.level),
                format::millis(our_ms),
                format::millis(peer_ms),
                ratio(peer_ms / our_ms)
            );
            self.add(Tone::Finding, "Beside PyTorch", text);
        }
    }

    fn capability(&mut self) {
        let mut refused: Vec<(&str, &str)> = Vec::new();
        for row in self.results.rows.iter().filter(|r| r.status == Status::Unsupported) {
            if !refused.iter().any(|(kernel, _)| *kernel == row.kernel) {
                refused.push((&row.kernel, &row.reason));
            }
        }
        let ran = kernels(self.results).len() - refused.len();
        let device = &self.results.device;
        let mut text = if device.emulated {
            format!(
                "the emulator offers the instructions of compute capability {}",
                device.compute_capability
            )
        } else {
            format!("{} has compute capability {}", device.name, device.compute_capability)
        };
        text += &match refused.as_slice() {
            [] => ": every kernel that was asked for could run.".into(),
            _ => {
                let why: Vec<String> =
                    refused.iter().map(|(kernel, reason)| because(kernel, reason)).collect();
                let ran = format::counted(ran, "kernel");
                format!("; {ran} could run, not these: {}.", why.join("; "))
            }
        };
        self.add(Tone::Finding, "Capability", text);
    }

    fn precision(&mut self) {
        let checks = &self.results.checks;
        if checks.is_empty() {
            return;
        }
        let failed: Vec<&Check> = checks.iter().filter(|c| !c.passed()).collect();
        if failed.is_empty() {
            let worst = checks.iter().max_by(|a, b| a.abs.max.total_cmp(&b.abs.max));
            let worst = worst.map_or_else(String::new, |c| {
                format!(
                    " The largest difference is {} ({} of {} at N = {}).",
                    format::scientific(c.abs.max),
                    c.tensor,
                    c.kernel,
                    c.seq
                )
            });
            let text = format!(
                "every comparison with the f64 oracle passes ({} of {}): a kernel errs by at most \
                 twice what the plain algorithm errs by in the same precision.{worst}",
                checks.len(),
                checks.len()
            );
            self.add(Tone::Finding, "Precision", text);
        } else {
            let names: Vec<String> = failed
                .iter()
                .map(|c| {
                    format!(
                        "{} of {} at N = {} (off by {}, the plain algorithm by {})",
                        c.tensor,
                        c.kernel,
                        c.seq,
                        format::scientific(c.abs.max),
                        format::scientific(c.plain_max_abs)
                    )
                })
                .collect();
            let text = format!(
                "{} of {} failed: ",
                failed.len(),
                format::counted(checks.len(), "comparison")
            );
            self.add(Tone::Failure, "Precision", format!("{text}{}.", format::list(&names)));
        }
    }
}

/// "kernel X needs …" without saying X twice.
fn because(kernel: &str, reason: &str) -> String {
    let reason = reason.trim_end_matches('.');
    let reason = reason.strip_prefix(&format!("kernel {kernel} ")).unwrap_or(reason);
    format!("{kernel} {reason}")
}

/// `3.2 times`, or a share below 1.
fn ratio(value: f64) -> String {
    if value >= 1.0 {
        format!("{} times", format::digits(value))
    } else {
        format!("{:.0} %", value * 100.0)
    }
}

/// Two significant digits, as whole number.
fn about(value: f64) -> String {
    let unit = 10f64.powi((value.log10().floor() as i32 - 1).max(0));
    format::count(((value / unit).round() * unit) as i64)
}
