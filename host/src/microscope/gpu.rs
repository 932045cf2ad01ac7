//! Figures of GPUs, as NVIDIA states them, for what counts say of a time.

use clap::builder::{PossibleValuesParser, TypedValueParser};
use flash_attention::DType;

/// A GPU by its data sheet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gpu {
    /// Its name on the command line.
    pub name: &'static str,
    /// Its product name.
    pub title: &'static str,
    /// Compute capability.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Boost clock in Hz.
    pub clock: f64,
    /// FLOP/s of f32 outside of tensor cores.
    pub scalar: f64,
    /// FLOP/s of tensor cores in f16 and bf16 with sums in f32, without sparsity.
    pub tensor: f64,
    /// FLOP/s of tensor cores in tf32, without sparsity.
    pub tensor_tf32: f64,
    /// Bytes a second of its memory.
    pub memory: f64,
    /// Where the figures stand.
    pub source: &'static str,
}

/// Special functions (exponentials and the like) of a multiprocessor in a clock. Source: CUDA C++
/// Programming Guide, "Throughput of Native Arithmetic Instructions", compute capability 8.0 to 9.0.
pub const SPECIAL_A_CLOCK: f64 = 16.0;
/// Passes over shared memory of a multiprocessor in a clock: 32 banks of four bytes. Source: the same
/// guide, "Shared Memory".
pub const PASSES_A_CLOCK: f64 = 1.0;
/// Bytes of a pass.
pub const PASS_BYTES: f64 = 128.0;

/// The GPUs.
pub const GPUS: [Gpu; 4] = [
    Gpu {
        name: "h100",
        title: "H100 SXM 80GB",
        capability: (9, 0),
        multiprocessors: 132,
        clock: 1.98e9,
        scalar: 66.9e12,
        tensor: 989.4e12,
        tensor_tf32: 494.7e12,
        memory: 3.35e12,
        source: "NVIDIA H100 Tensor Core GPU Architecture (white paper), table of H100 SXM5",
    },
    Gpu {
        name: "h200",
        title: "H200 SXM 141GB",
        capability: (9, 0),
        multiprocessors: 132,
        clock: 1.98e9,
        scalar: 66.9e12,
        tensor: 989.4e12,
        tensor_tf32: 494.7e12,
        memory: 4.8e12,
        source: "NVIDIA H200 Tensor Core GPU (data sheet); multiprocessors and clock as H100 SXM5",
    },
    Gpu {
        name: "a100",
        title: "A100 SXM 80GB",
        capability: (8, 0),
        multiprocessors: 108,
        clock: 1.41e9,
        scalar: 19.5e12,
        tensor: 312e12,
        tensor_tf32: 156e12,
        memory: 2.039e12,
        source: "NVIDIA A100 Tensor Core GPU (data sheet), A100 80GB SXM; white paper for its clock",
    },
    Gpu {
        name: "rtx4090",
        title: "GeForce RTX 4090",
        capability: (8, 9),
        multiprocessors: 128,
        clock: 2.52e9,
        scalar: 82.6e12,
        tensor: 165.2e12,
        tensor_tf32: 82.6e12,
        memory: 1.008e12,
        source: "NVIDIA Ada GPU Architecture (white paper), appendix A",
    },
];

impl Gpu {
    /// FLOP/s of tensor cores for tensors of that type; f32 is multiplied in tf32.
    #[must_use]
    pub fn tensor_of(&self, dtype: DType) -> f64 {
        if dtype == DType::F32 { self.tensor_tf32 } else { self.tensor }
    }

    /// Clocks of all multiprocessors in a second.
    #[must_use]
    pub fn clocks(&self) -> f64 {
        f64::from(self.multiprocessors) * self.clock
    }
}

/// A GPU by name.
pub fn parser() -> impl TypedValueParser<Value = Gpu> {
    let names = PossibleValuesParser::new(GPUS.iter().map(|gpu| gpu.name));
    names.try_map(|name| GPUS.into_iter().find(|gpu| gpu.name == name).ok_or("no such GPU"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 128 lanes of a multiprocessor multiply and add in a clock (A100: 64).
    #[test]
    fn figures_agree_with_each_other() {
        for gpu in GPUS {
            let lanes = if gpu.capability == (8, 0) { 64.0 } else { 128.0 };
            let scalar = 2.0 * lanes * gpu.clocks();
            assert!((scalar / gpu.scalar - 1.0).abs() < 0.01, "{}: {scalar:e}", gpu.name);
            assert!((gpu.tensor / gpu.tensor_tf32 - 2.0).abs() < 1e-9, "{}", gpu.name);
        }
    }
}
