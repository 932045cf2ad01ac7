//! Reports of made-up runs: what is concluded from them, and what is written.

use super::{
    analysis::{Tone, conclusions, exponent, seq_at_memory},
    *,
};
use crate::{
    format,
    results::{
        Check, DeviceInfo, Histogram, Level, Machine, Options, ProblemRecord, Repeats, Row, SCHEMA,
        Spread, Status,
    },
};
use approx::assert_abs_diff_eq;
use flash_attention::DType;

/// Bytes of a made-up GPU.
const MEMORY: u64 = 80 << 30;

/// A run in which a kernel's time is `work * N^2` and its memory `linear * N + square * N^2`.
pub(super) fn run(emulated: bool) -> Results {
    let kernels = [
        ("naive", 4e-6, 512.0 * 1024.0, 96.0, false),
        ("standard", 1.5e-6, 512.0 * 1024.0, 96.0, false),
        ("flash_tiled", 1.8e-6, 512.0 * 1024.0, 0.0, false),
        ("flash_mma", 0.4e-6, 512.0 * 1024.0, 0.0, false),
        ("torch-flash", 0.2e-6, 512.0 * 1024.0, 0.0, true),
    ];
    let seqs = [512usize, 1024, 2048, 65_536];
    let mut rows = Vec::new();
    for seq in seqs {
        let n = seq as f64;
        let bytes = |k: &(&str, f64, f64, f64, bool)| k.2 * n + k.3 * n * n;
        for kernel in &kernels {
            let fits = bytes(kernel) < MEMORY as f64;
            // At the shortest sequence flash_mma is the slower one.
            let extra = if kernel.0 == "flash_mma" { 0.5 } else { 0.0 };
            let ms = kernel.1 * n * n + extra;
            let of = |base: usize| {
                let base = &kernels[base];
                (bytes(base) < MEMORY as f64).then_some(base)
            };
            let speedup = |base: usize| of(base).map(|b| b.1 * n * n / ms);
            let saved = |base: usize| of(base).map(|b| 1.0 - bytes(kernel) / bytes(b));
            let measured = |value: f64| fits.then_some(value);
            rows.push(Row {
                kernel: kernel.0.into(),
                seq,
                batch: 4,
                heads: 12,
                head_dim: 64,
                dtype: DType::F16,
                device: "Made-up GPU".into(),
                status: if fits { Status::Ok } else { Status::Oom },
                mean_ms: measured(ms * 1.02),
                median_ms: measured(ms),
                std_ms: measured(ms * 0.05),
                min_ms: measured(ms * 0.95),
                max_ms: measured(ms * 1.2),
                tflops: measured(48.0 * 256.0 * n * n / ms / 1e9),
                peak_bytes: fits.then_some(bytes(kernel) as u64),
                needed_bytes: Some(bytes(kernel) as u64),
                free_bytes: (!fits).then_some(MEMORY - (1 << 30)),
                speedup: if fits { speedup(0) } else { None },
                speedup_standard: if fits { speedup(1) } else { None },
                memory_saved: if fits { saved(0) } else { None },
                memory_saved_standard: if fits { saved(1) } else { None },
                max_abs_err: Some(2.3e-4),
                global_bytes_read: emulated.then_some((kernel.1 * 1e6 * n * n) as u64 + 1000),
                global_bytes_written: emulated.then_some(1000),
                emulated,
                peer: kernel.4,
                ..Row::default()
            });
        }
        rows.push(Row {
            kernel: "flash_wgmma".into(),
            seq,
            status: Status::Unsupported,
            reason: "kernel flash_wgmma needs compute capability 9.0 exactly, this GPU has 8.0"
                .into(),
            ..Row::default()
        });
    }
    let checks = ["naive", "flash_mma"].map(|kernel| check(kernel, 2.3e-4)).to_vec();
    Results {
        schema: SCHEMA,
        command: "compare".into(),
        created: "2025-01-31T12:00:00Z".into(),
        version: "0.1.0".into(),
        commit: "unknown".into(),
        machine: Machine {
            os: "linux".into(),
            arch: "x86_64".into(),
            threads: 2,
            ..Machine::default()
        },
        device: DeviceInfo {
            name: if emulated { "CPU emulator (2 threads)" } else { "Made-up GPU" }.into(),
            emulated,
            compute_capability: "8.0".into(),
            memory_bytes: Some(MEMORY),
            shared_bytes: 163 * 1024,
            multiprocessors: 108,
        },
        options: Options {
            seq: seqs.to_vec(),
            problem: ProblemRecord {
                batch: 4,
                heads: 12,
                head_dim: 64,
                dtype: DType::F16,
                ..ProblemRecord::default()
            },
            repeats: Repeats { iters: 30, warmup: 5, sustained: None },
            ..Options::default()
        },
        rows,
        checks,
        ..Results::default()
    }
}

fn check(kernel: &str, max: f64) -> Check {
    // A bell over two decades, with some exact elements.
    let bell = |first| Histogram {
        first,
        per_decade: 4,
        counts: vec![16, 229, 482, 721, 940, 772, 519, 271],
        zeros: 50,
    };
    Check {
        kernel: kernel.into(),
        level: Level::Attention,
        seq: 2048,
        dtype: DType::F16,
        tensor: "o".into(),
        compared: 4000,
        elements: 4000,
        abs: Spread { max, mean: max / 9.0, median: max / 12.0 },
        rel: Spread { max: 0.5, mean: 1e-3, median: 4e-4 },
        rel_rms: 2e-3,
        plain_max_abs: 2e-4,
        threshold: None,
        within_threshold: true,
        within_twice: max <= 4e-4,
        worst_index: vec![0, 0, 0, 0],
        worst_got: 0.0,
        worst_expected: max,
        abs_histogram: bell(-6),
        rel_histogram: bell(-5),
    }
}

fn about(results: &Results, topic: &str) -> String {
    let all = conclusions(results);
    let found: Vec<String> = all.into_iter().filter(|c| c.topic == topic).map(|c| c.text).collect();
    found.join("\n")
}

#[test]
fn exponents_and_limits_are_those_of_the_law() {
    let law = |f: fn(f64) -> f64| [100.0, 300.0, 900.0].map(|x| (x, f(x)));
    assert_abs_diff_eq!(exponent(&law(|x| 3.0 * x * x)).unwrap(), 2.0, epsilon = 1e-9);
    assert_abs_diff_eq!(exponent(&law(|x| 7.0 * x.sqrt())).unwrap(), 0.5, epsilon = 1e-9);
    assert_eq!(exponent(&[(5.0, 1.0), (5.0, 2.0)]), None);
    let seq = seq_at_memory(&law(|x| 50.0 * x + 2.0 * x * x), 50.0 * 4e3 + 2.0 * 16e6).unwrap();
    assert_abs_diff_eq!(seq, 4e3, epsilon = 1e-3);
    let seq = seq_at_memory(&law(|x| 50.0 * x), 5e6).unwrap();
    assert_abs_diff_eq!(seq, 1e5, epsilon = 1e-3);
    assert_eq!(seq_at_memory(&[(100.0, 1.0)], 1e9), None);
}

#[test]
fn conclusions_follow_from_the_figures() {
    let results = run(false);
    // No kernel speaks for another: each is named with its figures.
    let speed = about(&results, "Speed");
    assert_eq!(
        speed,
        "at N = 2048 standard takes 6.29 ms. Faster: flash_mma 2.89 times as fast (2.18 ms). \
         Slower: flash_tiled 83 % as fast (7.55 ms). flash_mma is faster from N = 1024 on."
    );
    let memory = about(&results, "Where memory ends");
    // The positive root of 96 N^2 + 512 Ki N = 80 GiB is 27,320.
    assert!(
        memory.contains("standard would fill the 80.0 GiB of Made-up GPU at about N = 27,000"),
        "{memory}"
    );
    // 80 GiB / 512 KiB = 163,840.
    assert!(memory.contains("at about N = 160,000"), "{memory}");
    let growth = about(&results, "Growth of time");
    assert!(growth.contains("N^2.00 (naive, standard, flash_tiled, torch-flash)"), "{growth}");
    let oom = about(&results, "Out of memory");
    assert!(
        oom.contains("naive did not fit at N = 65536: it needs 416 GiB, 79.0 GiB were free"),
        "{oom}"
    );
    let capability = about(&results, "Capability");
    assert!(
        capability.contains(
            "5 kernels could run, not these: flash_wgmma needs compute capability 9.0 exactly"
        ),
        "{capability}"
    );
    let peers = about(&results, "Beside PyTorch");
    assert!(peers.contains("50 % as fast"), "{peers}");
    assert!(about(&results, "Emulated").is_empty());
}

#[test]
fn emulated_runs_say_so() {
    let results = run(true);
    assert!(about(&results, "Emulated").contains("say nothing about a GPU"));
    for topic in ["Speed", "Growth of time", "Beside PyTorch"] {
        assert_eq!(about(&results, topic), "", "{topic}");
    }
    assert!(about(&results, "Bytes moved").contains("times less"));
    assert!(about(&results, "Growth of bytes moved").starts_with("bytes moved grow as N^2.00"));
    let views = super::analysis::views(&results);
    let panels = panel::four(&results, &views[0]);
    let ids: Vec<&str> = panels.iter().map(|p| p.id.as_str()).collect();
    assert_eq!(
        ids,
        ["attention-traffic", "attention-memory", "attention-fewer", "attention-saved"]
    );
    let html = page::page(&results, &conclusions(&results), &[]);
    assert!(html.contains("median ms (emulated)"));
    assert!(!html.contains("TFLOP/s") && !html.contains("<th>× standard"));
}

#[test]
fn what_is_wrong_comes_as_a_failure() {
    let mut results = run(false);
    results.checks.push(check("flash_tiled", 1e-2));
    results.interrupted = true;
    results.rows[0].status = Status::Failed;
    results.rows[0].reason = "race on shared memory".into();
    let all = conclusions(&results);
    let failures: Vec<_> = all.iter().filter(|c| c.tone == Tone::Failure).collect();
    assert_eq!(failures.len(), 2, "{failures:?}");
    assert!(failures[0].text.contains("naive at N = 512 (race on shared memory)"));
    assert!(failures[1].text.starts_with("1 of 3 comparisons failed: o of flash_tiled"));
    assert!(all.iter().any(|c| c.topic == "Incomplete"));
}

#[test]
fn a_report_is_written_whole_and_reads_back() {
    let dir = tempfile::tempdir().unwrap();
    let results = run(true);
    let paths = write(&results, &dir.path().join("new/report")).unwrap();
    assert_eq!(Results::read_json(&paths.json).unwrap(), results);
    let csv = std::fs::read_to_string(&paths.csv).unwrap();
    assert_eq!(csv.lines().count(), results.rows.len() + 1);
    assert!(csv.starts_with("kernel,level,device,batch,heads,seq,head_dim,dtype,causal,status,"));
    assert_eq!(paths.pictures.len(), 4);
    let html = std::fs::read_to_string(&paths.html).unwrap();
    assert_eq!(html.matches("role=\"img\"").count(), 6);
    // Self-contained: no address but the SVG name space.
    let elsewhere = html.replace("http://www.w3.org/2000/svg", "");
    assert!(!elsewhere.contains("http") && !elsewhere.contains("src="));
}

/// One thread, one head, one kernel, one comparison: nothing is counted in the plural.
#[test]
fn what_there_is_one_of_is_singular() {
    let mut results = run(false);
    (results.machine.threads, results.options.problem.heads, results.options.tokens) =
        (1, 1, Some(1));
    results.rows.retain(|row| row.kernel == "naive" || row.status == Status::Unsupported);
    results.rows.iter_mut().for_each(|row| row.heads = 1);
    for (refused, error) in [(true, 1e-4), (false, 1e-4), (false, 1e-2)] {
        results.rows.retain(|row| refused || row.status != Status::Unsupported);
        results.checks = vec![check("naive", error)];
        let html = page::page(&results, &conclusions(&results), &[]);
        let text = html.split('<').filter_map(|part| part.split_once('>')).map(|(_, text)| text);
        let text = format!("{} {}", text.collect::<Vec<_>>().join(" "), results.options);
        let words: Vec<_> = text.split_whitespace().collect();
        let plural = |pair: &&[&str]| {
            pair[0] == "1" && pair[1].trim_end_matches(|c: char| !c.is_alphabetic()).ends_with('s')
        };
        let wrong: Vec<_> = words.windows(2).filter(plural).collect();
        assert!(wrong.is_empty(), "{wrong:?}");
    }
}

/// A kernel has one colour and one marker, whatever else a run has, and no two have the same.
#[test]
fn a_kernel_looks_the_same_everywhere() {
    let all = run(false);
    let mut few = all.clone();
    few.rows.retain(|row| row.kernel != "naive" && row.kernel != "standard");
    few.checks.remove(0);
    let looks = |results: &Results| -> std::collections::BTreeMap<String, usize> {
        let views = super::analysis::views(results);
        let panels = views.iter().flat_map(|view| panel::four(results, view));
        let lines = panels.chain(panel::differences(results)).flat_map(|panel| panel.lines);
        let mut looks = std::collections::BTreeMap::new();
        for line in lines {
            let style = *looks.entry(line.name.clone()).or_insert(line.style);
            assert_eq!(style, line.style, "{}", line.name);
        }
        looks
    };
    let (all, few) = (looks(&all), looks(&few));
    assert_eq!((all.len(), few.len()), (5, 3));
    assert!(few.iter().all(|(name, style)| all[name] == *style));
    let different: std::collections::BTreeSet<_> = all.values().collect();
    assert_eq!(different.len(), all.len());
}

/// Lines that lie on each other stay lines of their own.
#[test]
fn kernels_that_are_alike_are_all_drawn() {
    let results = run(false);
    let views = super::analysis::views(&results);
    let memory = panel::four(&results, &views[0]).remove(1);
    let stacked: Vec<_> = memory.lines.iter().map(|l| (l.name.as_str(), l.stacked)).collect();
    assert_eq!(stacked[..2], [("naive", (0, 2)), ("standard", (1, 2))]);
    assert_eq!(stacked[2..4], [("flash_tiled", (0, 3)), ("flash_mma", (1, 3))]);
    assert!(memory.note.contains("Alike: naive and standard."), "{}", memory.note);
}

#[test]
fn the_page_leads_everywhere() {
    let dir = tempfile::tempdir().unwrap();
    let mut results = run(true);
    results.checks.push(Check { level: Level::Module, ..check("naive", 1e-4) });
    let paths = write(&results, dir.path()).unwrap();
    let html = std::fs::read_to_string(&paths.html).unwrap();
    let links: Vec<&str> =
        html.split("href=\"").skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
    assert!(links.len() > 8, "{links:?}");
    for link in &links {
        match link.strip_prefix('#') {
            Some(id) => assert_eq!(html.matches(&format!("id=\"{id}\"")).count(), 1, "{link}"),
            None => assert!(dir.path().join(link).is_file(), "{link}"),
        }
    }
    for name in ["attention-panels.svg", "differences.png", "results.json", "results.csv"] {
        assert!(links.contains(&name), "{name}");
    }
    // Whatever scrolls is reached with the keyboard, and has a name.
    let scrolled = html.matches("<div class=\"table\"").count();
    let reached = "<div class=\"table\" tabindex=\"0\" role=\"region\" aria-label=\"";
    assert!(scrolled >= 2 && html.matches(reached).count() == scrolled);
    // The verdict stands beside what it is about.
    assert!(html.contains("<th>tensor</th><th>verdict</th>"));
}

#[test]
fn differences_have_panels_of_their_own_at_each_level() {
    let mut results = run(false);
    let one = panel::differences(&results);
    assert_eq!(one.len(), 2);
    let module = Check { level: Level::Module, tensor: "y".into(), ..check("flash_mma", 1e-4) };
    results.checks.push(module);
    let both = panel::differences(&results);
    let titles: Vec<_> = both.iter().map(|p| p.title.as_str()).collect();
    assert_eq!(titles.len(), 4);
    assert!(titles[0].ends_with(", attention") && titles[2].ends_with(", module"), "{titles:?}");
    assert_eq!((both[2].lines.len(), both[2].lines[0].name.as_str()), (1, "flash_mma"));
    // Each has its own bound, and its own place on the page.
    assert!(both[2].marks.len() == 1 && both[0].id != both[2].id);
}

/// Memory that does not grow with N is no part of the law by which memory is extrapolated.
#[test]
fn a_module_fills_memory_where_its_law_says() {
    let mut results = run(false);
    results.rows.retain(|row| row.kernel == "naive" && row.status == Status::Ok);
    assert!(results.rows.len() > 1);
    for row in &mut results.rows {
        row.level = Level::Module;
        let n = row.seq as u64;
        row.peak_bytes = Some(row.parameter_bytes() + 1000 * n + 100 * n * n);
    }
    let fixed = results.rows[0].parameter_bytes() as f64;
    assert!(fixed > 0.0);
    let n = (-1000.0 + (1e6 + 400.0 * (MEMORY as f64 - fixed)).sqrt()) / 200.0;
    let two_digits = 10f64.powf(n.log10().floor() - 1.0);
    let expected = format::count(((n / two_digits).round() * two_digits) as i64);
    let all = conclusions(&results);
    let text = &all.iter().find(|c| c.topic == "Where memory ends").unwrap().text;
    assert!(text.contains(&format!("at about N = {expected}")), "{text} {expected}");
}

#[test]
fn runs_with_little_in_them_are_reported_too() {
    let dir = tempfile::tempdir().unwrap();
    write(&Results::default(), dir.path()).unwrap();
    let mut one = run(false);
    one.rows.truncate(1);
    one.checks.clear();
    let paths = write(&one, dir.path()).unwrap();
    assert_eq!(paths.pictures.len(), 2);
    one.rows[0].status = Status::Oom;
    write(&one, dir.path()).unwrap();
}

#[test]
fn outputs_that_are_not_finite_are_reported_too() {
    let mut results = run(false);
    let mut nan = check("flash_tiled", f64::INFINITY);
    nan.plain_max_abs = f64::INFINITY;
    nan.within_twice = false;
    nan.abs_histogram = Histogram::default();
    results.checks = vec![nan];
    let dir = tempfile::tempdir().unwrap();
    let paths = write(&results, dir.path()).unwrap();
    let html = std::fs::read_to_string(&paths.html).unwrap();
    assert!(html.contains("off by inf") && !html.contains("\"NaN\""));
    assert_eq!(Results::read_json(&paths.json).unwrap(), results);
}
