//! `break`: the synchronisations of kernels, and what the emulator says without them.

mod common;

use common::{host, run};
use flash_attention::registry::{BACKWARD_KERNELS, DECODE_KERNELS, KERNELS};

fn breaking(arguments: &[&str]) -> (i32, String, String) {
    run(host().arg("break").args(arguments))
}

#[test]
fn barriers_are_listed_with_their_line_and_hazard() {
    let (code, stdout, stderr) = breaking(&["--kernel", "flash_tiled"]);
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    assert!(stdout.starts_with(
        "flash_tiled: batch 1, heads 3, N 300, head dim 64, f16; 3 synchronisations\n"
    ));
    let entry = |number: usize, hazard: &str, text: &str| {
        let begin = format!("\n{number:>3}  barrier of the ");
        let entry = stdout.split(&begin).nth(1).unwrap_or_else(|| panic!("no {number}: {stdout}"));
        let lines: Vec<&str> = entry.lines().take(3).map(str::trim).collect();
        assert!(lines[0].contains("kernels-gpu/src/forward/flash_tiled.rs:"), "{entry}");
        assert!(lines[1].starts_with(hazard) && lines[2] == text, "{entry}");
    };
    entry(1, "Hazard: the tile before may still be read", "> thread::sync_threads();");
    entry(2, "Hazard: tiles are read by threads", "> thread::sync_threads();");
    entry(3, "Hazard: a row of P is read by", "> warp::sync_warp(FULL_MASK);");
}

/// A race names the line that writes and the line that reads, each with its text.
#[test]
fn a_barrier_that_is_left_out_is_a_race_with_both_its_lines() {
    let arguments = ["--kernel", "flash_tiled", "--without", "1", "--schedules", "0,3"];
    let (code, stdout, stderr) = breaking(&arguments);
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    assert_eq!(stdout.matches("race on shared memory").count(), 2, "{stdout}");
    for schedule in [0, 3] {
        assert!(stdout.contains(&format!("Left out, schedule {schedule}: fault")), "{stdout}");
    }
    assert!(stdout.contains("> tile.write(row * pitch(D) + column, value);"), "{stdout}");
    assert!(stdout.contains("> tile.read_as::<[u32; VECTOR]>(index)"), "{stdout}");
}

/// The number of the first entry of that kind whose text says so.
fn number_of(kernel: &str, kind: &str, text: &str) -> String {
    let (code, stdout, _) = breaking(&["--kernel", kernel]);
    assert_eq!(code, 0, "{stdout}");
    let entry = stdout.split("\n\n").find(|entry| entry.contains(kind) && entry.contains(text));
    let entry = entry.unwrap_or_else(|| panic!("no {kind} with {text}: {stdout}"));
    entry.split_whitespace().next().unwrap().to_owned()
}

#[test]
fn waits_can_be_changed_in_the_ways_that_their_kind_has() {
    let wait = number_of("flash_async", "wait for groups of cp.async copies", "async_copy::wait");
    let (code, stdout, _) =
        breaking(&["--kernel", "flash_async", "--without", &wait, "--one-more-pending"]);
    assert_eq!(code, 0, "{stdout}");
    assert!(stdout.contains("With one more group on its way, schedule 0: fault"), "{stdout}");
    assert!(stdout.contains("has not landed there"), "{stdout}");
    let wait = number_of("flash_hopper", "wait for an mbarrier", "self.k_ring.wait(self.k_stage)");
    let hopper = ["--kernel", "flash_hopper", "--schedules", "0", "--without", &wait];
    let (code, stdout, _) = breaking(&[&hopper[..], &["--other-parity"]].concat());
    assert_eq!(code, 0, "{stdout}");
    assert!(stdout.contains("With the other parity, schedule 0: fault"), "{stdout}");
    let (code, _, stderr) = breaking(&[&hopper[..], &["--one-more-pending"]].concat());
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains(&format!("number {wait} is a wait for an mbarrier")), "{stderr}");
}

/// Numbers that are wrong without a fault are told by attention in f64; and what changes nothing is
/// said to change nothing.
#[test]
fn each_synchronisation_of_two_rungs_is_noticed() {
    for (kernel, count) in [("flash_tiled", 3), ("flash_swizzled", 2)] {
        let (code, stdout, stderr) = breaking(&["--kernel", kernel, "--all"]);
        assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
        assert_eq!(stdout.matches("without it: ").count(), count, "{stdout}");
        assert!(!stdout.contains("nothing noticed"), "{stdout}");
    }
    // One tile of keys: nothing is written twice.
    let one = ["--kernel", "flash_tiled", "--seq", "32", "--without", "1"];
    let (code, stdout, _) = breaking(&one);
    assert_eq!(code, 0, "{stdout}");
    assert_eq!(stdout.matches(": nothing noticed").count(), 4, "{stdout}");
    assert!(stdout.contains("docs/emulator.md"), "{stdout}");
}

/// Every kernel of the library is listed, and every entry says why it is there.
#[test]
fn every_kernel_has_a_list_and_every_entry_a_reason() {
    let names = KERNELS.iter().map(|k| k.name).chain(BACKWARD_KERNELS.iter().map(|k| k.name));
    for kernel in names.chain(DECODE_KERNELS.iter().map(|k| k.name)) {
        let (code, stdout, stderr) = breaking(&["--kernel", kernel]);
        assert_eq!((code, stderr.as_str()), (0, ""), "{kernel}: {stdout}");
        let entries: Vec<&str> = stdout.split("\n\n").skip(1).collect();
        assert_eq!(entries.is_empty(), kernel.ends_with("naive"), "{kernel}: {stdout}");
        // The last is the hint.
        for entry in &entries[..entries.len().saturating_sub(1)] {
            assert_eq!(entry.lines().count(), 3, "{kernel}: {entry}");
        }
    }
}

#[test]
fn requests_that_cannot_be_met_are_refused_in_one_line() {
    for (arguments, part) in [
        (&["--kernel", "flash_typo"][..], "[possible values: naive, "),
        (&[], "required arguments were not provided: --kernel <NAME>"),
        (&["--kernel", "naive", "--without", "0"], "use a whole number, 1 or more"),
        (&["--kernel", "flash_tiled", "--without", "4"], "--without 4: this kernel has 1 to 3"),
        (&["--kernel", "flash_tiled", "--other-parity"], "--without <NUMBER>"),
        (
            &["--kernel", "flash_tiled", "--without", "1", "--other-parity"],
            "--other-parity: number 1 is a barrier of the block, and only waits for an mbarrier",
        ),
        (&["--kernel", "flash_tiled", "--without", "1", "--all"], "cannot be used with"),
        (&["--kernel", "flash_tiled", "--seq", "32,64"], "--seq has several lengths"),
        (&["--kernel", "flash_tiled", "--head-dim", "12"], "does not support head dim 12"),
        (&["--kernel", "flash_mma", "--dtype", "f32"], "flash_mma does not support f32"),
        (&["--kernel", "decode", "--dropout", "0.1"], "dropout"),
        (&["--kernel", "flash_tiled", "--deterministic"], "--deterministic is for gradients"),
        (&["--kernel", "naive", "--schedules", "x"], "use a whole number, 0 or more"),
    ] {
        let (code, stdout, stderr) = breaking(arguments);
        assert_eq!(code, 2, "{arguments:?}\n{stdout}{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{arguments:?}\n{stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains(part), "{arguments:?}\n{stderr}");
        assert_eq!(stdout, "", "{arguments:?}");
    }
}
