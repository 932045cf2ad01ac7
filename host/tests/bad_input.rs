//! Each bad request is answered with exit code 2 and one line that says what is wrong.

mod common;

use std::process::Command;

use common::{host, run, with_gpu};

/// Runs a command that must be refused, and gives its line.
fn refused(command: &mut Command) -> String {
    let (code, stdout, stderr) = run(command);
    assert_eq!(code, 2, "{command:?}\n{stdout}{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{command:?}\n{stderr}");
    assert!(stderr.starts_with("error: "), "{command:?}\n{stderr}");
    assert_eq!(stdout, "", "{command:?}");
    stderr
}

#[test]
fn impossible_values_are_named() {
    for (arguments, part) in [
        (&["--head-dim", "65"][..], "head dim 65: it has 32, 64"),
        (&["--hidden", "770", "--heads", "12"], "hidden = 770 is not divisible by heads = 12"),
        (&["--hidden", "768", "--heads", "0"], "heads = 0"),
        (&["--head-dim", "64", "--hidden", "128"], "cannot be used with"),
        (&["--seq", "0"], "= 0 is not possible"),
        (&["--seq", "128,0"], "= 0 is not possible"),
        (&["--seq", "-1"], "'-1'"),
        (&["--seq", "99999999999999999999"], "too large"),
        (&["--seq", "4294967295"], "must be from 1 to"),
        (&["--seq", "2000000000", "--batch", "2000000000", "--heads", "100"], "too many elements"),
        (&["--batch", "0"], "batch = 0"),
        (&["--batch", "100000", "--kernels", "naive"], "use a smaller batch"),
        (&["--dtype", "f8"], "use f32, f16 or bf16"),
        (&["--dropout", "1"], "dropout = 1"),
        (&["--kernels", "flash_typo"], "unknown kernel 'flash_typo': the kernels are naive, "),
        (&["--kernels", "naive,naive"], "listed twice"),
        (&["--kernels", "flash_mma", "--dtype", "f32"], "flash_mma does not support f32"),
        (&["--kernels", "naive,flash_mma", "--dtype", "f32"], "flash_mma does not support f32"),
        (&["--level", "tokens"], "'tokens'"),
        (&["--device", "tpu"], "use auto, gpu, gpu:1 or cpu"),
        (&["--device", "gpu"], "no GPU: "),
        (&["--device", "gpu", "--memory-limit", "1GiB"], "--device cpu"),
        (&["--memory-limit", "1GB"], "KiB, MiB or GiB"),
        (&["--json", "/no/such/folder/a.json"], "/no/such/folder/a.json cannot be written"),
        (&["--json", "/"], "cannot be written"),
        (&["--no-such-option"], "unexpected argument"),
    ] {
        for command in ["compare", "verify"] {
            let line = refused(host().arg(command).args(arguments));
            assert!(line.contains(part), "{command} {arguments:?}: {line}");
        }
    }
}

#[test]
fn values_of_one_command_are_checked_too() {
    for (arguments, part) in [
        (&["compare", "--iters", "0"][..], "'0'"),
        (&["compare", "--csv", "/no/such/folder/a.csv"], "cannot be written"),
        (&["compare", "--report", "/dev/null/folder"], "cannot be written"),
        (&["verify", "--threshold", "0"], "threshold = 0"),
        (&["verify", "--rows", "0"], "'0'"),
        (&["report", "/no/such/file.json", "--out", "/tmp"], "/no/such/file.json"),
        (&["no-such-command"], "unrecognized subcommand"),
    ] {
        let line = refused(host().args(arguments));
        assert!(line.contains(part), "{arguments:?}: {line}");
    }
}

#[test]
fn a_kernel_that_this_gpu_cannot_run_is_refused() {
    let Some(mut turing) = with_gpu("7.5", 1 << 30) else { return };
    let line = refused(turing.args(["compare", "--kernels", "flash_hopper"]));
    assert!(line.contains("needs compute capability 9.0 exactly, this GPU has 7.5"), "{line}");
    let Some(mut second) = with_gpu("9.0", 1 << 30) else { return };
    let line = refused(second.args(["compare", "--device", "gpu:7"]));
    assert!(line.contains("there is no GPU 7"), "{line}");
}
