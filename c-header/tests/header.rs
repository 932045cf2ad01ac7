//! The header in `examples` is that of its source, and C and C++ read it.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

const UPDATE: &str = "UPDATE_EXPECT";

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples")
}

#[test]
fn the_header_is_that_of_the_source() {
    let made = c_header::header_of(&examples().join("c_abi.rs")).unwrap();
    let file = examples().join("flash_attention.h");
    if std::env::var_os(UPDATE).is_some() {
        fs::write(&file, made).unwrap();
        return;
    }
    let found = fs::read_to_string(&file).unwrap();
    assert!(
        found == made,
        "examples/flash_attention.h is not that of examples/c_abi.rs: {UPDATE}=1 writes it anew.\n{made}"
    );
}

/// Every function of the library is declared, and a C caller may name the types with or without `struct`.
#[test]
fn c_and_cpp_read_the_header() {
    let source = "\
#include \"flash_attention.h\"
#include \"flash_attention.h\"
int call(const FaProblem *problem, const struct FaTensors *tensors, void *stream);
int call(const FaProblem *problem, const struct FaTensors *tensors, void *stream) {
  FaTensor q = tensors->q;
  (void)q.strides[2];
  if (fa_workspace_bytes(problem) < 0 || fa_forward(problem, tensors, stream) != 0)
    return fa_last_error()[0];
  return fa_version()[0];
}
";
    let folder = tempfile::tempdir().unwrap();
    for (compiler, name, standard) in
        [("cc", "call.c", "-std=c99"), ("c++", "call.cpp", "-std=c++11")]
    {
        let file = folder.path().join(name);
        fs::write(&file, source).unwrap();
        let strict = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", "-I"];
        let ran =
            Command::new(compiler).arg(standard).args(strict).arg(examples()).arg(&file).output();
        match ran {
            Ok(output) => {
                let says = String::from_utf8_lossy(&output.stderr);
                assert!(output.status.success(), "{compiler}: {says}");
            }
            // Straight to stderr: the harness keeps what a passing test prints.
            Err(error) => {
                writeln!(std::io::stderr(), "skipped: no {compiler}: {error}").unwrap();
            }
        }
    }
}
