//! Running the program as a user does, without a GPU or with the driver for tests.
// Each test file uses a part.
#![allow(dead_code)]

use std::{
    env,
    path::PathBuf,
    process::{Command, Output},
};

/// The program, on a computer without a GPU.
pub fn host() -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("flash-attention"));
    command.env("FLASH_ATTENTION_CUDA_DRIVER", "/no/driver/here");
    command
}

/// The program with a GPU of that compute capability and memory, which is the emulator
/// behind a driver for tests. `None`, said aloud, where this build holds no PTX.
pub fn with_gpu(capability: &str, memory_bytes: u64) -> Option<Command> {
    if flash_attention::ptx::modules().is_empty() {
        println!("skipped: this build holds no PTX");
        return None;
    }
    let test = env::current_exe().unwrap();
    let name = format!("{}fake_cuda_driver{}", env::consts::DLL_PREFIX, env::consts::DLL_SUFFIX);
    // Cargo puts the library, which is a dev-dependency, beside the test.
    let library: PathBuf = test.parent().unwrap().join(name);
    assert!(library.is_file(), "{} is missing: run this test through cargo", library.display());
    let mut command = host();
    command
        .env("FLASH_ATTENTION_CUDA_DRIVER", library)
        .env("FAKE_CUDA_COMPUTE_CAPABILITY", capability)
        .env("FAKE_CUDA_MEMORY_BYTES", memory_bytes.to_string());
    Some(command)
}

/// Runs, and gives the exit code, standard output and standard error.
pub fn run(command: &mut Command) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}
