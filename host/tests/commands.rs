//! The commands from end to end, on the emulator and on a GPU behind the driver for tests.

mod common;

use common::{host, run, with_gpu};
use flash_attention::{
    DType, Window,
    module::ModuleGradients,
    problem::Sequence,
    registry::{BACKWARD_KERNELS, KERNELS},
};
use host::{
    inputs, output,
    results::{Level, LevelChoice, Results, SCHEMA, Status},
};

const SMALL: [&str; 6] = ["--seq", "33,64", "--heads", "1", "--iters", "2"];

/// Rows name every feature, and count the operations of packed sequences with their own lengths.
#[test]
fn rows_name_the_features_of_a_problem() {
    let folder = tempfile::tempdir().unwrap();
    let csv = folder.path().join("a.csv");
    let features =
        ["--varlen", "--kv-heads", "1", "--window", "20,-1", "--softcap", "5", "--sinks"];
    let (code, stdout, stderr) = run(host()
        .args(["compare", "--level", "attention", "--seq", "40", "--batch", "3", "--heads", "2"])
        .args(["--head-dim", "64", "--iters", "1", "--kernels", "flash_mma,flash_hopper"])
        .args(features)
        .arg("--csv")
        .arg(&csv));
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    assert!(stdout.contains("packed sequences of random lengths"), "{stdout}");
    let window = Window { left: Some(20), right: None };
    let [q, k] = inputs::cu_seqlens(3, [40, 40], 42);
    let pairs = Sequence::all(&q, &k).map(|of| window.visible_pairs(of.seq_q, of.seq_k));
    let flops = (4 * 2 * 64 * pairs.sum::<u64>()) as f64;
    for row in output::read_csv(&csv).unwrap() {
        assert_eq!((row.status, row.flops), (Status::Ok, flops));
        assert_eq!((row.kv_heads, row.seq_k, row.batch), (Some(1), Some(40), 3));
        assert_eq!((row.window_left, row.window_right, row.softcap), (Some(20), None, Some(5.0)));
        assert!(row.varlen && row.sinks && !row.alibi && !row.bias && !row.mask);
    }
    let (code, stdout, _) = run(host()
        .args(["verify", "--level", "attention", "--seq", "40", "--batch", "3", "--heads", "2"])
        .args(["--dtype", "f16", "--head-dim", "64", "--alibi", "--causal"])
        .args(features));
    assert_eq!(code, 0, "{stdout}");
    assert!(stdout.contains("every kernel that ran is right"), "{stdout}");
}

/// Ranks as threads with an emulator each: every way of sharing is right, and what cannot be shared is
/// refused.
#[test]
fn several_ranks_share_attention() {
    let small = ["--device", "cpu", "--seq", "64", "--heads", "4", "--causal"];
    let (code, stdout, stderr) =
        run(host().args(["verify", "--gpus", "4", "--kv-heads", "4"]).args(small));
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    assert!(stdout.contains("verdict: every way is right"), "{stdout}");
    for (way, grid) in [("heads", "4x1"), ("context", "1x4"), ("both", "2x2")] {
        let rows = stdout.lines().filter(|l| l.contains(way) && l.contains(grid));
        assert_eq!(rows.filter(|l| l.ends_with("yes")).count(), 2, "{way}: {stdout}");
    }
    let (code, stdout, _) = run(host()
        .args(["compare", "--gpus", "2", "--parallel", "context", "--iters", "1"])
        .args(small)
        .arg("--wide"));
    assert_eq!(code, 0, "{stdout}");
    assert!(stdout.contains("Emulated times show nothing of GPUs"), "{stdout}");
    let row = |way| stdout.lines().find(|l| l.contains(way) && l.contains("forward")).unwrap();
    // One GPU sends nothing, so that nothing is hidden; its efficiency is its own.
    assert!(row(" one ").contains(" - ") && row(" one ").contains("100%"), "{stdout}");
    assert!(row(" context ").contains("1x2"), "{stdout}");
    for (wrong, what) in [
        (&["compare", "--gpus", "2", "--dropout", "0.1"][..], "dropout cannot be shared"),
        (
            &["compare", "--gpus", "2", "--parallel", "both"],
            "an even number of GPUs from 4 on, not 2",
        ),
        (&["compare", "--gpus", "2", "--warmup", "1"], "--warmup is not for several GPUs"),
        (&["verify", "--gpus", "2", "--rows", "9"], "--rows is not for several GPUs"),
        (&["verify", "--gpus", "3", "--parallel", "heads"], "heads = 4 is not possible: 3 ranks"),
        (&["verify", "--gpus", "2", "--kernels", "no_such"], "no_such"),
    ] {
        let (code, stdout, stderr) = run(host().args(wrong).args(small));
        assert_eq!((code, stdout.as_str()), (2, ""), "{wrong:?}: {stderr}");
        assert!(stderr.contains(what), "{wrong:?}: {stderr}");
    }
}

#[test]
fn compare_writes_what_it_prints() {
    let folder = tempfile::tempdir().unwrap();
    let (json, csv) = (folder.path().join("a.json"), folder.path().join("a.csv"));
    let (code, stdout, stderr) = run(host()
        .args(["compare", "--causal", "--mask", "--dropout", "0.1"])
        .args(SMALL)
        .arg("--json")
        .arg(&json)
        .arg("--csv")
        .arg(&csv));
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    assert!(stdout.contains("Emulated times show the algorithm"), "{stdout}");
    for heading in ["N = 33, attention", "N = 33, module", "N = 64, attention", "N = 64, module"] {
        assert!(stdout.contains(heading), "{stdout}");
    }
    assert!(stdout.contains("projections are by linear_hopper"), "{stdout}");

    let results = Results::read_json(&json).unwrap();
    assert_eq!((results.schema, results.command.as_str()), (SCHEMA, "compare"));
    assert_eq!(results.options.seq, [33, 64]);
    assert!(results.options.problem.causal && results.options.problem.mask && !results.interrupted);
    assert!(results.device.emulated && results.driver.is_none() && !results.commit.is_empty());
    assert_eq!(results.options.level, LevelChoice::Both);
    let kernels = results.options.kernels.len();
    assert_eq!(results.rows.len(), 2 * 2 * kernels);
    assert_eq!(output::read_csv(&csv).unwrap(), results.rows);
    for row in &results.rows {
        assert!(stdout.contains(&row.kernel));
        if row.status == Status::Ok {
            assert!(row.emulated && row.min_ms <= row.median_ms && row.median_ms <= row.max_ms);
            assert!(row.global_bytes_read > Some(0) && row.global_bytes_written > Some(0));
            assert!(row.peak_bytes == row.needed_bytes && row.tflops.is_some());
            assert!(row.max_abs_err.is_some() && row.speedup.is_some());
        }
    }
    for naive in [&results.rows[0], &results.rows[kernels]] {
        assert_eq!(
            (naive.kernel.as_str(), naive.speedup, naive.memory_saved),
            ("naive", Some(1.0), Some(0.0))
        );
    }
    let row = |kernel: &str| results.rows.iter().find(|row| row.kernel == kernel).unwrap();
    let standard = row("standard");
    assert_eq!((standard.speedup_standard, standard.memory_saved), (Some(1.0), Some(0.0)));
    let flash = row("flash_tiled");
    assert!(flash.speedup_standard.is_some());
    assert!(flash.memory_saved > Some(0.0) && flash.workspace_bytes == Some(0));
    let module = results.rows.iter().find(|row| row.level == Level::Module).unwrap();
    // Parameters, x and y; q, k, v and O are the module's workspace.
    let (hidden, tokens) = (64, 33);
    let own = 4 * (hidden * hidden + hidden) * 2 + 2 * tokens * hidden * 2 + tokens;
    let workspace = module.workspace_bytes.unwrap();
    assert_eq!(module.peak_bytes, Some(own + workspace));
    assert!(workspace > 4 * tokens * hidden * 2);
    let ok = |level| {
        let rows = results.rows.iter().filter(move |row| row.level == level);
        rows.filter(|row| row.status == Status::Ok).count()
    };
    assert_eq!(results.checks.len(), 2 * ok(Level::Attention) + ok(Level::Module));
    assert!(results.checks.iter().all(|check| check.passed()));
}

/// Caches of both kinds are verified and timed; what is printed is what the JSON has.
#[test]
fn decode_verifies_and_measures_caches() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("a.json");
    let (code, stdout, stderr) = run(host()
        .args(["decode", "--seq-k", "70,300", "--page-size", "0,7", "--queries", "2"])
        .args(["--batch", "2", "--window", "100,-1", "--splits", "3", "--json"])
        .arg(&json));
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    assert!(stdout.contains("batch 2, heads 8/2, head dim 64, f16, 2 queries"), "{stdout}");
    assert!(stdout.contains("verdict: every line is right"), "{stdout}");
    let rows: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    let caches: Vec<_> = rows.as_array().unwrap().iter().collect();
    let of = |name: &str| caches.iter().map(|row| row[name].as_u64().unwrap()).collect::<Vec<_>>();
    assert_eq!((of("seq_k"), of("page_size")), (vec![70, 70, 300, 300], vec![0, 7, 0, 7]));
    assert_eq!(of("splits"), [3; 4]);
    // Two heads of 64 columns, K and V, 2 bytes, in two sequences.
    assert_eq!(of("cache_bytes"), [70, 70, 300, 300].map(|keys| keys * 2 * 2 * 64 * 2 * 2));
    for row in caches {
        assert!(row["passed"].as_bool().unwrap() && row["median_ms"].as_f64().unwrap() > 0.0);
    }
    for (arguments, part) in [
        (&["--dtype", "f32"][..], "does not support f32"),
        (&["--head-dim", "12"], "head dim = 12 is not possible"),
        (&["--heads", "3", "--kv-heads", "2"], "heads of K and V = 2"),
        (&["--splits", "70000"], "use a whole number up to 65535"),
        (&["--splits", "18446744073709551615"], "use a whole number up to 65535"),
        (&["--seq-k", "0"], "use a whole number, 1 or more"),
        (&["--page-size", "5000000000"], "--page-size: 5000000000 is more than 4294967295"),
    ] {
        let (code, stdout, stderr) = run(host().arg("decode").args(arguments));
        assert_eq!((code, stdout.as_str()), (2, ""), "{arguments:?}: {stderr}");
        assert!(stderr.contains(part), "{arguments:?}: {stderr}");
    }
    // The same by the other commands; verify measures no time.
    let caches =
        ["--level", "decode", "--seq-k", "70,130", "--kv-heads", "2", "--page-size", "0,16"];
    let (code, stdout, stderr) = run(host()
        .args(["compare", "--cache-dtype", "e4m3"])
        .args(caches)
        .args(["--json"])
        .arg(&json));
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    assert!(stdout.contains("GB/s of keys and values in e4m3"), "{stdout}");
    let rows: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    // Half the bytes of f16.
    let bytes: Vec<_> =
        rows.as_array().unwrap().iter().map(|row| row["cache_bytes"].as_u64()).collect();
    assert_eq!(bytes, [70, 70, 130, 130].map(|keys| Some(keys * 2 * 2 * 64)));
    let (code, stdout, stderr) = run(host().arg("verify").args(caches).args(["--seq", "2"]));
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    assert!(stdout.contains("2 queries") && !stdout.contains("median"), "{stdout}");
    assert_eq!(stdout.matches(" yes").count(), 4, "{stdout}");
    for (arguments, part) in [
        (&["compare", "--level", "decode", "--softcap", "2"][..], "--softcap is not for --level"),
        (&["compare", "--level", "decode", "--csv", "a.csv"], "--csv is not for --level decode"),
        (&["verify", "--level", "decode", "--threshold", "1"], "--threshold is not for"),
        (&["compare", "--level", "decode", "--seq", "1,2"], "--seq has several numbers"),
        (&["verify", "--level", "attention", "--seq-k", "64,65"], "add --level decode"),
        (&["compare", "--page-size", "16"], "--page-size is for caches: add --level decode"),
        (&["decode", "--cache-dtype", "bf16"], "storage type of the cache = bf16"),
        (&["decode", "--cache-dtype", "e4m3", "--head-dim", "72"], "multiples of 16"),
        (&["verify", "--dtype", "e4m3"], "storage type = e4m3"),
    ] {
        let (code, stdout, stderr) = run(host().args(arguments));
        assert_eq!((code, stdout.as_str()), (2, ""), "{arguments:?}: {stderr}");
        assert!(stderr.contains(part), "{arguments:?}: {stderr}");
    }
    let small = ["decode", "--page-size", "100000000", "--memory-limit", "1MiB"];
    let (code, _, stderr) = run(host().args(small));
    assert!(code == 1 && stderr.contains("51200002088 bytes needed, 1048576 free"), "{stderr}");
}

#[test]
fn what_does_not_fit_is_a_row() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("a.json");
    let limited = ["compare", "--memory-limit", "100KiB", "--seq", "64,256,1000000"];
    let (code, stdout, _) = run(host()
        .args(limited)
        .args(["--heads", "1", "--iters", "1", "--kernels", "naive,flash_tiled"])
        .args(["--level", "attention", "--json"])
        .arg(&json));
    assert_eq!(code, 0, "{stdout}");
    let status: Vec<_> = Results::read_json(&json).unwrap().rows.iter().map(|r| r.status).collect();
    let (ok, oom) = (Status::Ok, Status::Oom);
    assert_eq!(status, [ok, ok, oom, oom, oom, oom], "{stdout}");
    assert!(stdout.contains("100 KiB were free: not tried"), "{stdout}");

    // Both modules need their parameters, 32.5 KiB in f16; one needs the matrix too.
    let module = ["compare", "--level", "module", "--memory-limit", "100KiB", "--heads", "1"];
    let (code, stdout, _) = run(host()
        .args(module)
        .args(["--seq", "64,80", "--iters", "1", "--kernels", "naive,flash_tiled", "--json"])
        .arg(&json));
    assert_eq!(code, 0, "{stdout}");
    let results = Results::read_json(&json).unwrap();
    let status: Vec<_> = results.rows.iter().map(|r| (r.level, r.status)).collect();
    assert!(status.iter().all(|(level, _)| *level == Level::Module));
    let status: Vec<_> = status.into_iter().map(|(_, status)| status).collect();
    assert_eq!(status, [ok, ok, oom, ok], "{stdout}");
}

/// The emulator's limit is no promise that the computer has the memory.
#[cfg(target_os = "linux")]
#[test]
fn tensors_too_large_for_this_computer_are_not_drawn() {
    let large = ["--seq", "700000000", "--head-dim", "128", "--kernels", "flash_mma"];
    for command in ["compare", "verify"] {
        let (code, stdout, stderr) = run(host()
            .args([command, "--level", "attention", "--dtype", "f16"])
            .args(["--memory-limit", "1000000GiB"])
            .args(large));
        assert_eq!(code, 1, "{stdout}{stderr}");
        assert!(stdout.contains(" of this computer's memory, "), "{stdout}");
        assert!(stdout.contains(" were free: not tried"), "{stdout}");
    }
}

/// A kernel that cannot do what is asked is a row with the reason; the others run.
#[test]
fn one_kernel_that_cannot_stops_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("a.json");
    for command in ["compare", "verify"] {
        let (code, stdout, _) = run(host()
            .args([command, "--dtype", "f32", "--kernels", "flash_mma,naive"])
            .args(["--seq", "32", "--heads", "1", "--json"])
            .arg(&json));
        assert_eq!(code, 0, "{stdout}");
        assert!(stdout.contains("flash_mma (unsupported): does not support f32"), "{stdout}");
        let results = Results::read_json(&json).unwrap();
        assert_eq!(results.options.kernels, ["flash_mma", "naive"]);
        let status = |kernel: &str| -> Vec<Status> {
            let rows = results.rows.iter().filter(|row| row.kernel == kernel);
            rows.map(|row| row.status).collect()
        };
        assert_eq!(status("naive"), [Status::Ok; 2]);
        assert_eq!(status("flash_mma"), [Status::Unsupported; 2]);
    }
}

/// Rows of gradients have the columns of the forward pass, and checks of dQ, dK, dV and the sinks' gradient:
/// with every feature, and on a sample.
#[test]
fn gradients_are_measured_and_verified() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("a.json");
    let small = ["--level", "backward", "--seq", "40", "--batch", "1", "--heads", "4"];
    let features =
        ["--kv-heads", "2", "--causal", "--softcap", "5", "--sinks", "--alibi", "--deterministic"];
    let (code, stdout, stderr) = run(host()
        .arg("compare")
        .args(small)
        .args(features)
        .args(["--head-dim", "64", "--iters", "1", "--seq-k", "50", "--json"])
        .arg(&json));
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    assert!(stdout.contains("N = 40, backward") && stdout.contains("deterministic"), "{stdout}");
    let results = Results::read_json(&json).unwrap();
    let names: Vec<_> = results.rows.iter().map(|row| row.kernel.as_str()).collect();
    assert_eq!(names, BACKWARD_KERNELS.iter().map(|k| k.name).collect::<Vec<_>>());
    // Causal: half of all, by convention.
    let pairs = 40 * 50 / 2;
    for row in &results.rows {
        assert_eq!((row.status, row.level), (Status::Ok, Level::Backward), "{row:?}");
        assert_eq!(row.flops, 2.5 * (4 * 4 * 64 * pairs) as f64);
        assert!(row.deterministic && row.peak_bytes == row.needed_bytes && row.tflops.is_some());
        assert!(row.max_abs_err.is_some() && row.speedup.is_some());
    }
    assert_eq!(results.rows[0].speedup, Some(1.0));
    let tensors: Vec<_> = results.checks.iter().map(|check| check.tensor.as_str()).collect();
    assert_eq!(tensors, ["dq", "dk", "dv", "dsinks"].repeat(BACKWARD_KERNELS.len()));
    assert!(results.checks.iter().all(|c| c.passed() && c.compared == c.elements));

    // Half a head: dO is 0 in its other rows.
    let (code, stdout, _) =
        run(host().arg("verify").args(small).args(["--rows", "20", "--mask", "--dropout", "0.1"]));
    assert_eq!(code, 0, "{stdout}");
    assert!(stdout.contains("1 of 4 heads of K and V compared"), "{stdout}");
    assert!(stdout.contains("every kernel that ran is right"), "{stdout}");

    // A sink has its gradient from every batch entry: so has the head that is compared.
    let sample = ["--batch", "3", "--sinks", "--rows", "30", "--kernels", "backward_tiled"];
    let (code, stdout, _) =
        run(host().args(["verify", "--level", "backward"]).args(&small[2..4]).args(sample));
    assert_eq!(code, 0, "{stdout}");
    assert!(stdout.contains("3 of 6 heads of K and V compared"), "{stdout}");
    assert!(stdout.contains(" dsinks "), "{stdout}");
}

/// Where memory suffices for nothing, nothing is right or wrong, and nothing was done.
#[test]
fn nothing_that_ran_is_no_success_and_no_verdict() {
    let nothing = ["--memory-limit", "1KiB", "--seq", "64", "--heads", "1"];
    let (code, stdout, _) = run(host().arg("compare").args(nothing));
    assert_eq!(code, 1, "{stdout}");
    assert!(stdout.contains("no kernel was measured: the reasons are above"), "{stdout}");
    let (code, stdout, _) = run(host().arg("verify").args(nothing));
    assert_eq!(code, 1, "{stdout}");
    assert!(stdout.contains("verdict: none: nothing ran"), "{stdout}");
    assert!(!stdout.contains("WRONG"), "{stdout}");
}

/// Without `--dtype` no kernel is left out for want of a type.
#[test]
fn verify_runs_every_kernel_in_a_type_that_it_has() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("v.json");
    let (code, stdout, stderr) = run(host()
        .args(["verify", "--seq", "32", "--heads", "1", "--level", "attention", "--json"])
        .arg(&json));
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    assert!(stdout.contains("in f16, for want of f32: flash_turing, flash_mma"), "{stdout}");
    let results = Results::read_json(&json).unwrap();
    assert_eq!(results.rows.len(), KERNELS.len());
    for kernel in KERNELS {
        let row = results.rows.iter().find(|row| row.kernel == kernel.name).unwrap();
        let own = if kernel.dtypes.contains(&DType::F32) { DType::F32 } else { DType::F16 };
        assert_eq!((row.status, row.dtype), (Status::Ok, own), "{}", kernel.name);
        let checks = results.checks.iter().filter(|check| check.kernel == kernel.name);
        assert_eq!(checks.clone().count(), 2);
        assert!(checks.clone().all(|check| check.dtype == own && check.passed()));
    }
}

/// Rows of a module's training have the times of both passes together and alone and the memory of both,
/// and checks of every gradient.
#[test]
fn gradients_of_the_module_are_measured_and_verified() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("a.json");
    let small = ["--level", "module-backward", "--seq", "40", "--batch", "2", "--heads", "2"];
    let (code, stdout, stderr) = run(host()
        .arg("compare")
        .args(small)
        .args(["--causal", "--mask", "--dropout", "0.1", "--iters", "1", "--wide", "--json"])
        .arg(&json));
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    assert!(stdout.contains("N = 40, module-backward"), "{stdout}");
    assert!(stdout.contains("by linear_hopper, and its forward pass by flash_hopper."), "{stdout}");
    assert!(stdout.contains(" forward_ms ") && stdout.contains(" forward_peak "), "{stdout}");
    let results = Results::read_json(&json).unwrap();
    let names: Vec<_> = results.rows.iter().map(|row| row.kernel.as_str()).collect();
    assert_eq!(names, BACKWARD_KERNELS.iter().map(|k| k.name).collect::<Vec<_>>());
    let (tokens, hidden) = (2.0 * 40.0, 128.0);
    let attention = 4.0 * (2 * 2 * 64 * 40 * 40 / 2) as f64;
    for row in &results.rows {
        assert_eq!((row.status, row.level), (Status::Ok, Level::ModuleBackward), "{row:?}");
        assert_eq!(row.flops, 3.5 * attention + 3.0 * 8.0 * tokens * hidden * hidden);
        assert_eq!(row.peak_bytes, row.needed_bytes);
        assert!(row.forward_peak_bytes.unwrap() < row.peak_bytes.unwrap());
        assert!(row.forward_ms.is_some() && row.backward_ms.is_some() && row.speedup.is_some());
    }
    let tensors: Vec<_> = results.checks.iter().map(|check| check.tensor.as_str()).collect();
    assert_eq!(tensors, ModuleGradients::NAMES.repeat(BACKWARD_KERNELS.len()));
    assert!(results.checks.iter().all(|c| c.passed() && c.compared == c.elements));
    let report = folder.path().join("report");
    let (code, stdout, _) = run(host().arg("report").arg(&json).arg("--out").arg(&report));
    assert_eq!(code, 0, "{stdout}");

    // Of a sample of tokens, in f32.
    let only = ["--kernels", "backward_tiled", "--rows", "3", "--deterministic", "--json"];
    let (code, stdout, stderr) = run(host().arg("verify").args(small).args(only).arg(&json));
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    let results = Results::read_json(&json).unwrap();
    assert_eq!(results.checks.len(), ModuleGradients::NAMES.len());
    let dx = &results.checks[0];
    assert_eq!((dx.tensor.as_str(), dx.worst_index.len()), ("dx", 3));
    assert_eq!((dx.compared, dx.elements), (2 * 40 * 128, 2 * 40 * 128));
}

/// A launch that takes too long is a row, and what came before it is kept.
#[test]
fn a_launch_that_takes_too_long_ends_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("a.json");
    let long = [
        "--seq",
        "8,65536",
        "--batch",
        "1",
        "--heads",
        "1",
        "--kernels",
        "flash_hopper,flash_tiled",
    ];
    let rest = ["--iters", "1", "--warmup", "0", "--level", "attention", "--json"];
    let on_gpu = with_gpu("9.0", 1 << 30);
    for mut program in [Some(host()), on_gpu].into_iter().flatten() {
        // Seconds for a launch that takes milliseconds, and for one that takes minutes.
        program.args(["compare", "--timeout", "3"]).args(long).args(rest).arg(&json);
        let (code, stdout, _) = run(&mut program);
        assert_eq!(code, 1, "{stdout}");
        let text = "(timeout): a launch took longer than 3 s (--timeout)";
        assert!(stdout.contains(text) && stdout.contains("N = 8"), "{stdout}");
        let results = Results::read_json(&json).unwrap();
        let (last, before) = results.rows.split_last().unwrap();
        assert!(results.interrupted && last.status == Status::Timeout && last.seq == 65_536);
        assert!(before.len() == 2 && before.iter().all(|row| row.status == Status::Ok));
    }
}

#[test]
fn tables_fit_80_columns_unless_they_are_asked_to_be_wide() {
    let small = ["--seq", "32", "--heads", "1", "--level", "attention"];
    for command in ["compare", "verify"] {
        let table = |more: &[&str]| -> Vec<String> {
            let (_, stdout, _) = run(host().arg(command).args(small).args(more));
            let lines = stdout.lines().skip_while(|line| !line.starts_with(" kernel"));
            lines.take_while(|line| line.starts_with(' ')).map(str::to_owned).collect()
        };
        let (narrow, wide) = (table(&[]), table(&["--wide"]));
        assert!(narrow.len() > 4, "{narrow:?}");
        assert!(narrow.iter().all(|line| line.chars().count() <= 80), "{narrow:#?}");
        let names = |table: &[String]| table[0].split_whitespace().count();
        assert!(names(&wide) > names(&narrow), "{wide:#?}");
    }
}

#[test]
fn verify_gives_both_verdicts() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("v.json");
    let small = ["verify", "--dtype", "f32", "--seq", "70", "--heads", "2", "--json"];
    let (code, stdout, stderr) = run(host().args(small).arg(&json));
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    assert!(stdout.contains("verdict: every kernel that ran is right"), "{stdout}");
    let results = Results::read_json(&json).unwrap();
    assert!(results.checks.iter().all(|c| c.threshold == Some(1e-3) && c.abs.max < 1e-5));
    assert!(results.checks.iter().all(|c| c.compared == c.elements));
    let modules = results.checks.iter().filter(|c| c.level == Level::Module);
    assert!(modules.clone().all(|c| c.tensor == "y" && c.worst_index.len() == 3));
    assert!(modules.count() >= 2 && stdout.contains("flash_tiled, y: share of differences"));

    let strict = ["--threshold", "1e-12", "--rows", "8"];
    let (code, stdout, _) = run(host().args(&small[..7]).args(strict));
    assert_eq!(code, 1, "{stdout}");
    assert!(stdout.contains("8 of 140 rows compared"), "{stdout}");
    assert!(stdout.contains("8 of 70 tokens compared"), "{stdout}");
    assert!(
        stdout.contains("verdict: WRONG") && stdout.contains("beyond the threshold"),
        "{stdout}"
    );

    let (code, stdout, _) =
        run(host().args(["verify", "--seq", "70", "--heads", "2", "--dtype", "bf16", "--causal"]));
    assert_eq!(code, 0, "{stdout}");
}

#[test]
fn env_says_what_is_missing_and_what_is_there() {
    let (code, stdout, stderr) = run(host().arg("env"));
    assert_eq!((code, stderr.as_str()), (0, ""));
    assert!(stdout.contains("no GPU: ") && stdout.contains("emulator: runs"), "{stdout}");

    let Some(mut turing) = with_gpu("7.5", 1 << 30) else { return };
    let (code, stdout, stderr) = run(turing.arg("env"));
    assert_eq!((code, stderr.as_str()), (0, ""));
    assert!(stdout.contains("compute capability 7.5"), "{stdout}");
    assert!(stdout.contains("yes, from sm_75"), "{stdout}");
    assert!(stdout.contains("no: needs compute capability 9.0 exactly"), "{stdout}");
}

#[test]
fn a_gpu_is_preferred_and_its_memory_counts() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("gpu.json");
    let Some(mut gpu) = with_gpu("9.0", 4 << 20) else { return };
    let arguments = ["--batch", "1", "--heads", "1", "--seq", "64,2048", "--iters", "1"];
    let only =
        ["--warmup", "0", "--kernels", "naive,flash_hopper", "--level", "attention", "--json"];
    let (code, stdout, stderr) = run(gpu.arg("compare").args(arguments).args(only).arg(&json));
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    let results = Results::read_json(&json).unwrap();
    assert!(!results.device.emulated && results.driver.is_some());
    let status: Vec<_> = results.rows.iter().map(|row| row.status).collect();
    assert_eq!(status, [Status::Ok, Status::Ok, Status::Oom, Status::Ok], "{stdout}");
    assert!(results.rows.iter().all(|row| row.global_bytes_read.is_none()));
}

#[test]
fn peers_are_rows_or_one_line() {
    // Peers come beside whichever kernels there are.
    let compare = ["compare", "--peers", "--kernels", "naive"];
    let mut absent = host();
    absent.args(compare).args(SMALL).env("FLASH_ATTENTION_PYTHON", "/no/python");
    let (code, stdout, stderr) = run(&mut absent);
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    assert!(stdout.contains("no rows of PyTorch: /no/python cannot be started"), "{stdout}");

    // Whatever Python this computer has: with PyTorch, it agrees.
    let (code, stdout, stderr) = run(host().args(compare).args(["--causal", "--mask"]).args(SMALL));
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    let absent = stdout.matches("no rows of PyTorch: ").count();
    let rows = stdout.lines().filter(|line| line.starts_with(" torch-math")).count();
    assert_eq!(4 * absent + rows, 4, "{stdout}");
    assert!(!stdout.contains("is wrong"), "{stdout}");

    // Their gradients too, every one of them compared.
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("peers.json");
    for (level, tensors) in [("backward", 3), ("module-backward", 9)] {
        let gradients = ["--level", level, "--kernels", "backward_tiled", "--causal", "--json"];
        let (code, stdout, stderr) =
            run(host().args(["compare", "--peers"]).args(gradients).arg(&json).args(SMALL));
        assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
        let absent = stdout.contains("no rows of PyTorch: ");
        let results = Results::read_json(&json).unwrap();
        let peers: Vec<_> = results.rows.iter().filter(|row| row.peer).collect();
        assert_eq!(peers.len(), if absent { 0 } else { 4 }, "{stdout}");
        for row in peers.iter().filter(|row| row.status == Status::Ok) {
            assert!(row.median_ms.is_some() && row.max_abs_err.is_some(), "{row:?}");
            assert_eq!(row.forward_ms.is_some() && row.backward_ms.is_some(), tensors == 9);
            let own = |check: &&host::results::Check| {
                (&check.kernel, check.seq) == (&row.kernel, row.seq) && check.passed()
            };
            assert_eq!(results.checks.iter().filter(own).count(), tensors, "{row:?}");
        }
    }
}

/// A graph replays what was launched, over copies of the cache; the emulator has no graphs.
#[test]
fn decodes_are_replayed_on_a_gpu() {
    let Some(mut gpu) = with_gpu("9.0", 64 << 20) else { return };
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("gpu.json");
    let caches = ["--seq-k", "100", "--page-size", "0,16", "--head-dim", "64", "--iters", "1"];
    let (code, stdout, stderr) = run(gpu.arg("decode").args(caches).arg("--json").arg(&json));
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    assert!(stdout.contains("replayed_µs"), "{stdout}");
    let rows: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    for row in rows.as_array().unwrap() {
        assert_eq!((&row["kernel"], &row["peer"]), (&"decode".into(), &false.into()));
        assert!(row["replayed_ms"].as_f64().unwrap() > 0.0, "{row}");
        assert!(row["replayed_share_of_copy"].as_f64().unwrap() > 0.0, "{row}");
        assert!(row["caches"].as_u64().unwrap() >= 2, "{row}");
    }
    // The results document describes these fields, and no others.
    let page = include_str!("../../docs/json.md");
    let section = page.split("\n## A row of `decode`").nth(1).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let described = section.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    let fields = rows[0].as_object().unwrap().keys().map(String::as_str);
    let sorted = |mut names: Vec<&str>| {
        names.sort_unstable();
        names.join(" ")
    };
    assert_eq!(sorted(described.collect()), sorted(fields.collect()));
    let (_, stdout, _) = run(host().arg("decode").args(caches).arg("--json").arg(&json));
    assert!(!stdout.contains("replayed"), "{stdout}");
    let rows: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert!(rows[0]["replayed_ms"].is_null() && rows[0]["caches"] == 1, "{rows}");
}

/// A program in place of Python, which speaks the protocol: it answers with the sums of nothing.
#[cfg(unix)]
const FAKE_PYTHON: &str = r#"#!/usr/bin/env python3
import json, os, sys
out = sys.stdout.buffer
def send(message, payload=b""):
    out.write(json.dumps(message).encode() + b"\n" + payload)
    out.flush()
send({"torch": "0.0", "cuda": True, "packages": []})
while line := sys.stdin.buffer.readline():
    job = json.loads(line)
    sizes = {"f16": 2, "e4m3": 1}
    types = [job["dtype"], job["stored"], job["stored"]]
    for shape, of in zip(job["shapes"], types):
        count = sizes[of]
        for extent in shape:
            count *= extent
        assert len(sys.stdin.buffer.read(count)) == count
    assert job["level"] == "decode" and job["together"] % job["caches"] == 0, job
    assert (job["page_table"] is None) == (job["page_size"] == 0)
    for name in job["backends"]:
        if name == "flashinfer":
            send({"status": "unsupported", "reason": "No module named 'flashinfer'"})
        elif name == "cudnn" and os.environ.get("FAKE_PEERS_END"):
            sys.exit(0)
        else:
            bytes = 2 * job["batch"] * job["seq"] * job["heads"] * job["head_dim"]
            answer = {"status": "ok", "replayed_ms": 0.5, "splits": 16, "bytes": bytes}
            send(answer, b"\0" * bytes)
"#;

#[cfg(unix)]
#[test]
fn peers_of_a_decode_are_rows_whatever_becomes_of_them() {
    use std::os::unix::fs::PermissionsExt;

    let folder = tempfile::tempdir().unwrap();
    let (python, json) = (folder.path().join("python"), folder.path().join("a.json"));
    std::fs::write(&python, FAKE_PYTHON).unwrap();
    std::fs::set_permissions(&python, PermissionsExt::from_mode(0o755)).unwrap();
    if std::process::Command::new("python3").arg("--version").output().is_err() {
        println!("skipped: no python3");
        return;
    }
    let caches = ["--seq-k", "70", "--page-size", "0,16", "--head-dim", "64", "--iters", "1"];
    let compare = ["compare", "--level", "decode", "--kv-heads", "2", "--heads", "4", "--peers"];
    let measure = |ends: bool| {
        let mut gpu = with_gpu("9.0", 64 << 20)?;
        gpu.args(compare).args(caches).arg("--json").arg(&json);
        gpu.env("FLASH_ATTENTION_PYTHON", &python);
        if ends {
            gpu.env("FAKE_PEERS_END", "1");
        }
        let (code, stdout, stderr) = run(&mut gpu);
        // A peer that is wrong is no fault of ours.
        assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
        let rows: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
        Some((stdout, rows.as_array().unwrap().clone()))
    };
    let Some((stdout, rows)) = measure(false) else { return };
    // FlashInfer reads pages, the others contiguous caches.
    let contiguous = ["decode", "torch-flash", "torch-cudnn", "flash_attn.cute"];
    let pages = ["decode", "flashinfer", "flashinfer-tensor-cores"];
    let found: Vec<_> = rows.iter().map(|row| row["kernel"].as_str().unwrap()).collect();
    assert_eq!(found, [&contiguous[..], &pages[..]].concat(), "{stdout}");
    for row in rows.iter().filter(|row| row["peer"] == true) {
        if row["kernel"] == "flashinfer" {
            assert_eq!((&row["status"], &row["replayed_ms"]), (&"unsupported".into(), &().into()));
            assert!(row["max_abs_err"].is_null(), "{row}");
            continue;
        }
        // Zeros are no attention.
        assert_eq!((&row["status"], &row["passed"]), (&"failed".into(), &false.into()), "{row}");
        assert_eq!((&row["replayed_ms"], &row["splits"]), (&0.5.into(), &16.into()));
        assert!(
            row["replayed_share_of_copy"].as_f64().unwrap() > 0.0 && row["median_ms"].is_null()
        );
    }
    assert!(
        stdout.contains("flashinfer, Nk 70, pages of 16 (unsupported): No module named"),
        "{stdout}"
    );
    assert!(stdout.contains("torch-flash, Nk 70 (failed): O is wrong"), "{stdout}");
    assert!(stdout.contains("verdict: every line of decode is right"), "{stdout}");

    // A process that ends takes its rows with it, and nothing else.
    let (stdout, rows) = measure(true).unwrap();
    assert_eq!(rows.len(), 2, "{stdout}");
    assert!(
        stdout.contains("no further rows of peers: the peers' process: it has ended"),
        "{stdout}"
    );
    // None at all is a line; an unknown one an error.
    let mut absent = host();
    absent.args(["decode", "--peers"]).args(caches).env("FLASH_ATTENTION_PYTHON", "/no/python");
    let (code, stdout, _) = run(&mut absent);
    assert_eq!(code, 0, "{stdout}");
    assert!(stdout.contains("no rows of peers: /no/python cannot be started"), "{stdout}");
    let (code, _, stderr) = run(host().args(["decode", "--peers=cudnn"]));
    assert!(code == 2 && stderr.contains("the peers here are math, flash"), "{stderr}");
    let (code, _, stderr) = run(host().args(["compare", "--peers=flashinfer"]));
    assert!(code == 2 && stderr.contains("--peers flashinfer"), "{stderr}");
}

#[test]
fn help_and_version_are_no_errors() {
    for argument in ["--help", "--version"] {
        let (code, stdout, stderr) = run(host().arg(argument));
        assert!(code == 0 && !stdout.is_empty() && stderr.is_empty());
    }
    let (_, stdout, _) = run(host().arg("--version"));
    assert!(stdout.starts_with("flash-attention "), "{stdout}");
}

#[test]
fn help_has_examples_and_the_defaults_of_both_devices() {
    for (command, parts) in [
        (
            "compare",
            &["Usage: flash-attention compare", "--warmup 5 --iters 30", "--seq 64,128,256"][..],
        ),
        ("verify", &["--seq 512 --batch 2 --heads 12", "--batch 1 --heads 2"]),
        ("decode", &["--seq-k 4096,32768,131072", "--seq-k 256,1000", "--splits 3"]),
        ("run", &["[default: best]", "[default: bhnd]", "--check --kernel flash_mma"]),
        ("break", &["--kernel flash_tiled --without 1", "--schedules"]),
        ("profile", &["--kernel flash_tiled", "[default: h100]", "--html profile.html"]),
        ("trace", &["--kernel flash_hopper", "[default: 1]", "--out trace.json"]),
        ("report", &["report results.json --out report"]),
    ] {
        let (code, stdout, _) = run(host().args([command, "--help"]));
        assert!(code == 0 && stdout.contains("Example"), "{stdout}");
        for part in parts {
            assert!(stdout.contains(part), "{command} {part}: {stdout}");
        }
        // As wide as a terminal that is not there, but for examples, which can be copied.
        let wide = |line: &&str| line.chars().count() > 100 && !line.contains("flash-attention ");
        assert_eq!(stdout.lines().find(wide), None);
    }
    // The examples are arguments that there are.
    let (_, all, _) = run(host().arg("--help"));
    let texts = [
        "compare",
        "verify",
        "decode",
        "run",
        "break",
        "profile",
        "trace",
        "report",
        "completions",
        "man",
    ]
    .map(|command| run(host().args([command, "--help"])).1);
    let examples = texts.iter().chain([&all]).flat_map(|text| text.lines());
    let examples = examples.filter_map(|line| line.strip_prefix("  flash-attention "));
    let mut count = 0;
    for example in examples {
        let words: Vec<&str> =
            example.split(' ').take_while(|word| !["|", ">"].contains(word)).collect();
        use clap::Parser as _;
        let cli = host::cli::Cli::try_parse_from([&["flash-attention"], &words[..]].concat());
        assert!(cli.is_ok(), "{example}: {:?}", cli.err());
        count += 1;
    }
    assert!(count > 12, "{count}");
}

#[test]
fn completions_and_manual_pages_are_printed() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let (code, stdout, stderr) = run(host().args(["completions", shell]));
        assert_eq!((code, stderr.as_str()), (0, ""));
        assert!(stdout.contains("flash-attention") && stdout.contains("with-weights"), "{shell}");
    }
    for (arguments, part) in [
        (&["man"][..], ".TH flash-attention 1"),
        (&["man", "compare"], ".TH flash-attention-compare 1"),
        (&["man", "run"], "with\\-weights"),
    ] {
        let (code, stdout, stderr) = run(host().args(arguments));
        assert_eq!((code, stderr.as_str()), (0, ""));
        assert!(stdout.contains(part), "{arguments:?}: {stdout}");
    }
}

#[test]
fn one_thread_is_singular() {
    let mut command = host();
    command.env("RAYON_NUM_THREADS", "1").args(["compare", "--seq", "8", "--heads", "1"]);
    command.args(["--iters", "1", "--kernels", "naive", "--level", "attention"]);
    let (code, stdout, stderr) = run(&mut command);
    assert!(code == 0 && stdout.starts_with("CPU emulator (1 thread)"), "{stdout}{stderr}");
}
