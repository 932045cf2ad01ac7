//! Launches for tests.
#![allow(dead_code, reason = "each test file uses some of these")]

use simt::{
    Dim3,
    emulator::{self, Fault, FaultKind, Launch, Stats},
    global::{Global, GlobalMut},
    memory::Memory,
};

/// Launches blocks of `threads` threads with 4 KiB of dynamic shared memory.
pub fn try_launch(blocks: u32, threads: u32, kernel: impl Fn() + Sync) -> Result<Stats, Fault> {
    emulator::launch(
        Launch { grid: blocks.into(), block: threads.into(), shared_bytes: 4096 },
        &kernel,
    )
}

/// As [`try_launch`], for kernels that are right.
pub fn launch(blocks: u32, threads: u32, kernel: impl Fn() + Sync) -> Stats {
    try_launch(blocks, threads, kernel).expect("the kernel is right")
}

/// As [`try_launch`] of one block, for kernels that are wrong.
pub fn fault(threads: u32, kernel: impl Fn() + Sync) -> FaultKind {
    let fault = try_launch(1, threads, kernel).expect_err("the planted fault is found");
    if !matches!(fault.kind, FaultKind::Launch(_)) {
        assert_eq!(fault.block, Some(Dim3::new(0, 0, 0)));
    }
    fault.kind
}

/// A view of a slice for a kernel to write.
pub fn view_mut<T: Memory>(data: &mut [T]) -> GlobalMut<T> {
    // SAFETY: the slice outlives the launch in every test here.
    unsafe { GlobalMut::new(data.as_mut_ptr() as u64, data.len() as u64) }
}

/// A view of a slice for a kernel to read.
pub fn view<T: Memory>(data: &[T]) -> Global<T> {
    // SAFETY: the slice outlives the launch in every test here.
    unsafe { Global::new(data.as_ptr() as u64, data.len() as u64) }
}
