//! The variable that names the driver library, in processes of their own.

use std::{
    path::Path,
    process::{Command, Output},
};

use crate::fake_driver::path;

/// Runs [`child`] with the variable and others set.
fn describe(library: &Path, variables: &[(&str, &str)]) -> Output {
    let test = std::env::current_exe().expect("the path of this test");
    Command::new(test)
        .args(["--exact", "environment::child", "--ignored", "--nocapture"])
        .env(cuda_driver::LIBRARY_VARIABLE, library)
        .envs(variables.iter().copied())
        .output()
        .expect("the child")
}

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
#[ignore = "is what the other tests of this file run in a process of its own"]
fn child() {
    match flash_attention::backend::gpu::describe_all() {
        Ok(gpus) => println!("{gpus:?}"),
        Err(error) => println!("usage {}: {error}", error.is_usage()),
    }
}

#[test]
fn the_variable_names_the_library() {
    let variables = [
        ("FAKE_CUDA_GPUS", "3"),
        ("FAKE_CUDA_MEMORY_BYTES", "4096"),
        ("FAKE_CUDA_COMPUTE_CAPABILITY", "8.6"),
    ];
    let text = text(&describe(&path(), &variables));
    assert_eq!(text.matches("Fake GPU").count(), 3, "{text}");
    assert!(text.contains("total_bytes: 4096") && text.contains("(8, 6)"), "{text}");
}

#[test]
fn a_library_that_is_not_there_is_named_with_the_variable() {
    let text = text(&describe("/nonexistent/libcuda.so.1".as_ref(), &[]));
    assert!(text.contains("usage true: no GPU: the CUDA driver library"), "{text}");
    assert!(text.contains("/nonexistent/libcuda.so.1"), "{text}");
    assert!(text.contains("correct or unset FLASH_ATTENTION_CUDA_DRIVER"), "{text}");
}

#[test]
fn a_driver_without_gpus_is_not_a_missing_driver() {
    let text = text(&describe(&path(), &[("FAKE_CUDA_GPUS", "0")]));
    assert!(text.contains("finds no GPU; check that nvidia-smi lists one"), "{text}");
}
