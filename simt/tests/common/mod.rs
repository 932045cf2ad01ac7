//! Launches for tests.
#![allow(dead_code, reason = "each test file uses some of these")]

use half::f16;
use simt::{
    Dim3,
    emulator::{self, Fault, FaultKind, Launch, Stats},
    global::{Global, GlobalMut},
    memory::Memory,
    tma::{Element, TensorMap, TensorMapSpec},
};

/// Launches blocks of `threads` threads with 4 KiB of dynamic shared memory.
pub fn try_launch(blocks: u32, threads: u32, kernel: impl Fn() + Sync) -> Result<Stats, Fault> {
    emulator::launch(
        Launch { grid: blocks.into(), block: threads.into(), cluster: 1, shared_bytes: 4096 },
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

/// A matrix of small integers, exact in f16 and in sums of a few hundred.
pub fn matrix(rows: usize, columns: usize, seed: usize) -> Vec<f16> {
    (0..rows * columns)
        .map(|i| f16::from_f32(((i * 7 + i / columns * 3 + seed) % 11) as f32 - 5.0))
        .collect()
}

/// A tensor map, aligned as the type itself is.
pub struct Map(pub TensorMap);

impl Map {
    /// Boxes of `box_rows` rows of 64 elements of a `[rows, columns]` matrix.
    pub fn new(data: &[f16], rows: usize, columns: usize, box_rows: u32) -> Self {
        let row = columns as u64 * 2;
        let spec = TensorMapSpec {
            address: data.as_ptr() as u64,
            element: Element::F16,
            dims: vec![columns as u64, rows as u64, 1, 1],
            strides_bytes: vec![row, row * rows as u64, row * rows as u64],
            box_dims: vec![64, box_rows, 1, 1],
            swizzle_bytes: 128,
        };
        Self(spec.encode().expect("a map that the driver would take"))
    }

    pub fn address(&self) -> u64 {
        std::ptr::from_ref(&self.0) as u64
    }
}
