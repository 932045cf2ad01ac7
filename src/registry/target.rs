//! A device's limits for kernels.

use kernels_gpu::entry::Entry;
use simt::Dim3;

use crate::backend::Device;

/// The maximum number of blocks of a grid in its dimensions y and z (x: 2^31 - 1).
const MAX_GRID_YZ: u32 = 65_535;
const MAX_GRID_X: u32 = (1 << 31) - 1;
/// Shared memory that each block takes beyond its own, from compute capability 8.0 on.
const RESERVED_SHARED_BYTES: u32 = 1024;

/// A device's limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Target {
    /// Compute capability, `(major, minor)`.
    pub capability: (u32, u32),
    /// The most dynamic shared memory of a block in bytes.
    pub max_shared_bytes: u32,
    /// Multiprocessors.
    pub multiprocessors: u32,
}

impl Target {
    /// A device with the given compute capability `(major, minor)`, dynamic shared memory of a
    /// block in bytes, and number of multiprocessors.
    #[must_use]
    pub const fn new(capability: (u32, u32), max_shared_bytes: u32, multiprocessors: u32) -> Self {
        Self { capability, max_shared_bytes, multiprocessors }
    }

    /// The target of a device.
    #[must_use]
    pub fn of(device: &dyn Device) -> Self {
        Self {
            capability: device.compute_capability(),
            max_shared_bytes: device.max_shared_bytes(),
            multiprocessors: device.multiprocessors(),
        }
    }

    /// Blocks of an entry that the device holds at once. An entry's launch bounds limit its
    /// registers so that a multiprocessor has room for `min_blocks`; shared memory may leave room
    /// for fewer.
    pub(super) fn blocks_at_once(&self, entry: &Entry, shared_bytes: u32) -> u32 {
        // One block may have all of a multiprocessor's shared memory but what is reserved.
        let by_shared_memory = (self.max_shared_bytes + RESERVED_SHARED_BYTES)
            / (shared_bytes + RESERVED_SHARED_BYTES);
        self.multiprocessors * entry.min_blocks.min(by_shared_memory).max(1)
    }

    /// The feature that the device lacks to run a kernel with this compute capability.
    pub(super) fn lacks(&self, capability: (u32, u32), exact: bool) -> Option<String> {
        let ((major, minor), (has_major, has_minor)) = (capability, self.capability);
        let has = format!("this GPU has {has_major}.{has_minor}");
        if exact && self.capability != capability {
            return Some(format!("needs compute capability {major}.{minor} exactly, {has}"));
        }
        if self.capability < capability {
            return Some(format!("needs compute capability {major}.{minor} or later, {has}"));
        }
        None
    }

    /// The reason that the device cannot launch blocks with this much shared memory in this grid.
    pub(super) fn refuses(&self, grid: Dim3, shared_bytes: u32) -> Option<String> {
        if shared_bytes > self.max_shared_bytes {
            return Some(format!(
                "needs {shared_bytes} bytes of shared memory for a block, this GPU has {}",
                self.max_shared_bytes
            ));
        }
        let Dim3 { x, y, z } = grid;
        (x > MAX_GRID_X || y > MAX_GRID_YZ || z > MAX_GRID_YZ).then(|| {
            format!(
                "needs a grid of {x} x {y} x {z} blocks, a GPU has {MAX_GRID_X} x {MAX_GRID_YZ} x \
                 {MAX_GRID_YZ}: use a smaller batch or sequence"
            )
        })
    }
}
