//! The time on a GPU by the counts: for each unit the time that it would need alone, the
//! longest of which no kernel with these counts can beat.

use flash_attention::{DType, backend::cpu::emulator::Counts};

use crate::microscope::gpu::{Gpu, PASS_BYTES, PASSES_A_CLOCK, SPECIAL_A_CLOCK};

/// A unit of the GPU, what it has to do, and how long that takes it at its peak.
#[derive(Clone, Debug, PartialEq)]
pub struct Bound {
    /// The unit.
    pub unit: &'static str,
    /// Its work.
    pub work: f64,
    /// The unit of the work.
    pub of: &'static str,
    /// Seconds.
    pub seconds: f64,
}

/// The times of all units.
#[derive(Clone, Debug)]
pub struct Roofline {
    /// The units, the busiest first.
    pub bounds: Vec<Bound>,
    /// Bytes that must come from memory and go there: inputs and outputs, once.
    pub least_bytes: f64,
    /// Bytes of the sectors that were asked for: what would move if nothing were cached.
    pub sector_bytes: f64,
    /// Operations counted, scalar and on tensor cores.
    pub flops: f64,
    tensor_flops: f64,
}

impl Roofline {
    /// Of `counts`, with tensors of `dtype` of which `least_bytes` bytes must move.
    #[must_use]
    pub fn new(counts: &Counts, dtype: DType, least_bytes: u64, gpu: &Gpu) -> Self {
        let clocks = gpu.clocks();
        // The reads and writes of wgmma and the copy engine need passes too.
        let by_threads = counts.shared_passes as f64;
        let asked = (counts.shared_bytes_read + counts.shared_bytes_written) as f64;
        let passes = by_threads.max(asked / PASS_BYTES);
        let bound = |unit, work: f64, of, peak: f64| Bound { unit, work, of, seconds: work / peak };
        let mut bounds = vec![
            bound("tensor cores", counts.tensor_flops as f64, "FLOP", gpu.tensor_of(dtype)),
            bound("scalar units", counts.flops as f64, "FLOP", gpu.scalar),
            bound("special functions", counts.special as f64, "calls", SPECIAL_A_CLOCK * clocks),
            bound("shared memory", passes, "passes", PASSES_A_CLOCK * clocks),
            bound("memory", least_bytes as f64, "bytes", gpu.memory),
        ];
        bounds.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        Self {
            bounds,
            least_bytes: least_bytes as f64,
            sector_bytes: 32.0 * counts.global_sectors as f64,
            flops: (counts.flops + counts.tensor_flops) as f64,
            tensor_flops: counts.tensor_flops as f64,
        }
    }

    /// Whether tensor cores do most of the operations.
    #[must_use]
    pub fn uses_tensor_cores(&self) -> bool {
        self.tensor_flops > self.flops / 2.0
    }

    /// The unit that needs longest.
    #[must_use]
    pub fn bound(&self) -> &Bound {
        &self.bounds[0]
    }

    /// Operations for each byte that must move.
    #[must_use]
    pub fn intensity(&self) -> f64 {
        self.flops / self.least_bytes.max(1.0)
    }

    /// Operations for each byte that was asked for.
    #[must_use]
    pub fn intensity_asked(&self) -> f64 {
        self.flops / self.sector_bytes.max(1.0)
    }
}

#[cfg(test)]
mod tests {
    use approx::assert_relative_eq;

    use super::*;
    use crate::microscope::gpu::GPUS;

    #[test]
    fn the_busiest_unit_comes_first() {
        let [h100, ..] = GPUS;
        let counts = Counts {
            tensor_flops: 989_400_000,
            flops: 66_900_000,
            special: 1000,
            shared_bytes_read: 1280,
            shared_passes: 4,
            global_sectors: 10,
            ..Counts::default()
        };
        let roofline = Roofline::new(&counts, DType::F16, 6_700_000, &h100);
        assert_eq!((roofline.bound().unit, roofline.bounds.len()), ("memory", 5));
        assert_relative_eq!(roofline.bound().seconds, 2e-6);
        let of = |unit| roofline.bounds.iter().find(|b| b.unit == unit).unwrap();
        assert_relative_eq!(of("tensor cores").seconds, 1e-6);
        assert_relative_eq!(of("scalar units").seconds, 1e-6);
        assert_relative_eq!(of("shared memory").work, 10.0);
        assert_relative_eq!(roofline.intensity(), 1_056_300_000.0 / 6_700_000.0);
        assert_relative_eq!(roofline.sector_bytes, 320.0);
        // tf32 is half as fast: in f32 tensor cores need as long as memory.
        let f32 = Roofline::new(&counts, DType::F32, 6_700_000, &h100);
        let tensor = f32.bounds.iter().find(|b| b.unit == "tensor cores").unwrap();
        assert_relative_eq!(tensor.seconds, 2e-6);
    }
}
