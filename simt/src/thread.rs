//! Who am I: indices of the lane in its block and of the block in its grid, and the
//! barrier of the block. Names as in `cuda_std::thread`.

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator::{barriers, current};

macro_rules! index {
    ($($(#[$doc:meta])* $name:ident, $intrinsic:ident, $host:expr;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        #[must_use]
        pub fn $name() -> u32 {
            #[cfg(target_arch = "nvptx64")]
            {
                // SAFETY: reads a special register.
                unsafe { core::arch::nvptx::$intrinsic() as u32 }
            }
            #[cfg(not(target_arch = "nvptx64"))]
            {
                current::with($host)
            }
        }
    )*};
}

index! {
    /// Index of this thread in its block, x (fastest).
    thread_idx_x, _thread_idx_x, |b| b.thread_idx().x;
    /// Index of this thread in its block, y.
    thread_idx_y, _thread_idx_y, |b| b.thread_idx().y;
    /// Index of this thread in its block, z (slowest).
    thread_idx_z, _thread_idx_z, |b| b.thread_idx().z;
    /// Index of this block in the grid, x (fastest).
    block_idx_x, _block_idx_x, |b| b.block_idx().x;
    /// Index of this block in the grid, y.
    block_idx_y, _block_idx_y, |b| b.block_idx().y;
    /// Index of this block in the grid, z (slowest).
    block_idx_z, _block_idx_z, |b| b.block_idx().z;
    /// Threads of a block, x.
    block_dim_x, _block_dim_x, |b| b.block_dim.x;
    /// Threads of a block, y.
    block_dim_y, _block_dim_y, |b| b.block_dim.y;
    /// Threads of a block, z.
    block_dim_z, _block_dim_z, |b| b.block_dim.z;
    /// Blocks of the grid, x.
    grid_dim_x, _grid_dim_x, |b| b.grid_dim.x;
    /// Blocks of the grid, y.
    grid_dim_y, _grid_dim_y, |b| b.grid_dim.y;
    /// Blocks of the grid, z.
    grid_dim_z, _grid_dim_z, |b| b.grid_dim.z;
}

/// Index of this thread in its block, counted over all three dimensions.
#[inline(always)]
#[must_use]
pub fn index_in_block() -> u32 {
    thread_idx_x() + block_dim_x() * (thread_idx_y() + block_dim_y() * thread_idx_z())
}

/// Index of this thread in the whole grid along x: `cuda_std::thread::index_1d`.
#[inline(always)]
#[must_use]
pub fn index_1d() -> u32 {
    block_idx_x() * block_dim_x() + thread_idx_x()
}

/// Waits until every thread of the block is here; orders their memory accesses.
///
/// Every thread of the block must reach it, and the threads of one warp at the same
/// place; the emulator reports barrier divergence otherwise.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn sync_threads() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: a barrier has no precondition but that all threads reach it.
    unsafe {
        core::arch::asm!("bar.sync 0;", options(nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    barriers::sync_threads(core::panic::Location::caller());
}
