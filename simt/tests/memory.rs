//! A machine without enough memory to emulate a block.
#![cfg(unix)]

use std::{env, process::Command};

use simt::{
    emulator::{self, FaultKind, Launch, Options},
    thread,
};

/// Set in the process that has little memory.
const CHILD: &str = "SIMT_TEST_LITTLE_MEMORY";

#[test]
fn a_shortage_of_memory_for_lanes_is_an_error() {
    if env::var_os(CHILD).is_some() {
        let launch = |threads: u32, blocks: u32| Launch {
            grid: blocks.into(),
            block: threads.into(),
            cluster: 1,
            shared_bytes: 0,
        };
        for seed in [0, 3] {
            let options = Options::seeded(seed);
            let fault = emulator::launch_with(launch(1024, 8), &options, &thread::sync_threads)
                .expect_err("1024 stacks need 256 MiB");
            assert!(matches!(fault.kind, FaultKind::Memory(_)), "{fault}");
            println!("{fault}");
            // A smaller one still runs.
            emulator::launch_with(launch(32, 1), &options, &thread::sync_threads)
                .unwrap_or_else(|fault| panic!("{fault}"));
        }
        return;
    }
    // 120 MB of address space; what it prints tells a refusal from a test that was not run.
    let this = env::current_exe().expect("the test's own path");
    let output = Command::new("sh")
        .args(["-c", "ulimit -v 120000 && exec \"$0\" --test-threads 1 --nocapture"])
        .arg(this)
        .env(CHILD, "1")
        .output()
        .expect("a shell");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("not enough memory for the stacks of a block of 1024"), "{text}");
}
