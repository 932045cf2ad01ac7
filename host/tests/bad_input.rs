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
    let count = "use a whole number, 1 or more";
    for (arguments, part) in [
        (
            &["--head-dim", "65"][..],
            "head dim = 65 is not possible: kernels have multiples of 8 up to 256",
        ),
        (&["--head-dim", "4"], "head dim = 4 is not possible: kernels have multiples of 8"),
        (&["--head-dim", "300"], "head dim = 300 is not possible: it must be from 1 to 256"),
        (
            &["--head-dim", "160", "--kernels", "naive"],
            "does not support head dim 160: it has multiples of 8 up to 128",
        ),
        (
            &["--head-dim-v", "12", "--level", "attention"],
            "head dim of the values = 12 is not possible: kernels have multiples of 8 up to 256",
        ),
        (&["--head-dim-v", "8"], "--head-dim-v is not for the module: add --level attention"),
        (&["--hidden", "770", "--heads", "12"], "hidden = 770 is not divisible by heads = 12"),
        (
            &["--hidden", "768", "--heads", "0"],
            "'0' for '--heads <H>': use a whole number, 1 or more",
        ),
        (&["--head-dim", "64", "--hidden", "128"], "cannot be used with"),
        (&["--seq", "0"], count),
        (&["--seq", "128,0"], count),
        (&["--seq", "-1"], "invalid value '-1' for '--seq <N,…>': use a whole number"),
        (&["--seq", "1.5"], count),
        (&["--seq", "64,,128"], count),
        (&["--seq", ""], count),
        (&["--seq", "99999999999999999999"], "use a whole number up to 18446744073709551615"),
        (&["--seq", "4294967295"], "must be from 1 to"),
        (&["--seq", "2000000000", "--batch", "2000000000", "--heads", "100"], "too many elements"),
        (&["--seq", "64", "128"], "unexpected argument '128'"),
        (&["--batch", "0"], count),
        (&["--batch", "-1"], "invalid value '-1' for '--batch <B>'"),
        (&["--batch", "1000000000", "--kernels", "naive"], "use a smaller batch"),
        (
            &["--tokens", "100", "--seq", "64"],
            "--tokens 100 is no multiple of the sequence length 64",
        ),
        (&["--dtype", "f8"], "'f8' for '--dtype <TYPE>': use f32, f16 or bf16"),
        (&["--dropout", "1"], "dropout = 1"),
        (
            &["--dropout", "-0.5"],
            "dropout = -0.5 is not possible: it must be at least 0 and below 1",
        ),
        (&["--dropout", "x"], "'x' for '--dropout <P>': use a number, as 0.125"),
        (&["--dropout", "NaN"], "dropout = NaN is not possible"),
        (&["--seed", "-1"], "use a whole number, 0 or more"),
        (
            &["--kernels", "flash_typo"],
            "'flash_typo' for '--kernels <NAME,…>' [possible values: naive, ",
        ),
        (&["--kernels", "naive,"], "[possible values: naive, "),
        (&["--kernels", "naive,naive"], "listed twice"),
        (&["--kernels", "flash_mma", "--dtype", "f32"], "flash_mma does not support f32"),
        (&["--kernels", "flash_hopper,flash_mma", "--dtype", "f32"], "does not support f32"),
        (
            &["--heads", "4", "--kv-heads", "3", "--level", "attention"],
            "heads of K and V = 3 is not possible: the number of heads, 4, must be a multiple of it",
        ),
        (&["--kv-heads", "0"], count),
        (&["--kv-heads", "1"], "--kv-heads is not for the module: add --level attention"),
        (&["--seq-k", "9"], "--seq-k is not for the module"),
        (&["--alibi"], "--alibi is not for the module"),
        (&["--sinks"], "--sinks is not for the module"),
        (&["--varlen"], "--varlen is not for the module"),
        (&["--varlen", "--level", "module-backward"], "--varlen is not for the module"),
        (&["--varlen", "--mask", "--level", "attention"], "cannot be used with"),
        (&["--window", "3"], "'3' for '--window <L,R>': use two whole numbers up to 4294967295"),
        (&["--window", "-2,0"], "'-2,0' for '--window <L,R>'"),
        (&["--window", "-1,x"], "'-1,x' for '--window <L,R>'"),
        (&["--window", "4294967296,0"], "two whole numbers"),
        (&["--softcap", "0"], "softcap = 0 is not possible: it must be above 0"),
        (&["--softcap", "inf"], "softcap = inf is not possible"),
        (&["--level", "tokens"], "'tokens'"),
        (&["--deterministic"], "--deterministic is for gradients: add --level backward"),
        (
            &["--level", "backward", "--kernels", "naive"],
            "naive is no kernel of --level backward: it has backward_naive, ",
        ),
        (
            &["--kernels", "backward_mma"],
            "backward_mma is no kernel of --level attention: it has naive, ",
        ),
        (
            &["--level", "backward", "--kernels", "backward_mma", "--dtype", "f32"],
            "backward_mma does not support f32",
        ),
        (&["--device", "tpu"], "use auto, gpu, gpu:1 or cpu"),
        (&["--device", "gpu:-1"], "use auto, gpu, gpu:1 or cpu"),
        (&["--device", "gpu"], "no GPU: "),
        (&["--device", "gpu", "--memory-limit", "1GiB"], "--device cpu"),
        (&["--memory-limit", "1GB"], "KiB, MiB or GiB"),
        (&["--memory-limit", "-5"], "use a whole number, as in 512MiB"),
        (&["--json", "/no/such/folder/a.json"], "/no/such/folder/a.json cannot be written"),
        (&["--json", "/"], "/ cannot be written: it is a directory"),
        (&["--json", ""], "a value is required for '--json <FILE>'"),
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
        (&["compare", "--iters", "0"][..], "use a whole number, 1 or more"),
        (&["compare", "--iters", "1e3"], "use a whole number, 1 or more"),
        (&["compare", "--warmup", "x"], "use a whole number, 0 or more"),
        (&["compare", "--iters", "18446744073709551615"], "use a whole number up to 1000000"),
        (&["compare", "--warmup", "18446744073709551615"], "use a whole number up to 1000000"),
        (&["decode", "--iters", "18446744073709551615"], "use a whole number up to 1000000"),
        (
            &["verify", "--gpus", "1000000", "--parallel", "context"],
            "--gpus 1000000 is too many: one process has at most 256",
        ),
        (&["compare", "--sustained", "-1"], "use a number of seconds above 0, up to 60"),
        (
            &["compare", "--peers=bogus"],
            "[possible values: math, efficient, flash, cudnn, flex, flash_attn, ",
        ),
        (&["compare", "--peers=cudnn"], "--peers cudnn: the peers here are math, flash"),
        (
            &["compare", "--level", "backward", "--peers=cudnn"],
            "--peers cudnn: the peers here are math, flash",
        ),
        (&["compare", "--timeout", "0"], "use a number of seconds from 0.001"),
        (&["compare", "--csv", "/no/such/folder/a.csv"], "cannot be written"),
        (&["compare", "--report", "/dev/null/folder"], "cannot be written"),
        (&["verify", "--threshold", "0"], "use a number above 0"),
        (&["verify", "--threshold", "-1"], "use a number above 0"),
        (&["verify", "--threshold", "nan"], "use a number above 0"),
        (&["verify", "--rows", "0"], "use a whole number, 1 or more"),
        (
            &["report", "/no/such/file.json", "--out", "/tmp"],
            "/no/such/file.json: No such file or directory",
        ),
        (&["report", "/dev/null", "--out", "/tmp"], "not results of this program"),
        (&["report", "/tmp", "--out", "/tmp"], "/tmp: Is a directory"),
        (&["report"], "<RESULTS.json>"),
        (&["completions", "dash"], "[possible values: bash, "),
        (&["completions"], "<SHELL>"),
        (&["man", "woman"], "unknown command 'woman': the commands are env, compare, "),
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

#[test]
fn no_command_is_answered_with_the_help() {
    let (code, stdout, stderr) = run(&mut host());
    assert_eq!((code, stdout.as_str()), (2, ""));
    assert!(stderr.contains("Usage: flash-attention <COMMAND>"), "{stderr}");
    assert!(stderr.contains("compare"), "{stderr}");
}

#[cfg(unix)]
#[test]
fn names_that_are_no_utf8_are_refused_or_used() {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _};

    let odd = OsStr::from_bytes(b"/no/\xff");
    let line = refused(host().args(["run", "--check", "--input"]).arg(odd));
    assert!(line.contains("No such file or directory"), "{line}");
    let line = refused(host().args(["compare", "--seq"]).arg(odd));
    assert!(line.contains("invalid UTF-8"), "{line}");
    let line = refused(host().arg(odd));
    assert!(line.contains("unrecognized subcommand"), "{line}");
}
