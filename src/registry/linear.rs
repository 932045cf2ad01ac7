//! The ladder of linear kernels: projections `y = x wᵀ + bias`. As in the table of
//! attention kernels, the best one for a projection is the last that can do it; a kernel
//! joins with one entry here.

use kernels_gpu::{
    args::{Buffer, LinearArgs},
    linear,
    linear_hopper::{self, Tile},
    linear_mma,
};
use simt::Dim3;

use super::{Step, Target, dtype_obstacle, lacking, list, table::tiles, unless};
use crate::{backend::TensorMapSpec, dtype::DType, error::Error};

/// A projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Projection {
    /// Storage type of everything.
    pub dtype: DType,
    /// Rows of `x: [rows, in]` and `y: [rows, out]`.
    pub rows: usize,
    /// Columns of `x` and of `w: [out, in]`.
    pub in_features: usize,
    /// Columns of `y`, rows of `w` and elements of `bias: [out]`.
    pub out_features: usize,
}

/// One linear kernel.
#[derive(Debug)]
pub struct LinearSpec {
    /// Name that tables use.
    pub name: &'static str,
    /// What it is, in one line.
    pub summary: &'static str,
    /// Storage types that it has entries for.
    pub dtypes: &'static [DType],
    /// The least compute capability, `(major, minor)`.
    pub capability: (u32, u32),
    /// Whether it runs on that capability only.
    pub exact_capability: bool,
    /// What else a projection needs; the text says which value is wrong.
    pub limit: fn(&Projection) -> Option<String>,
    /// Its launch for a projection that it supports.
    pub step: fn(&Projection, &Target) -> Step,
    /// Makes the tensor maps that it needs; `None` without TMA.
    pub tensor_maps: Option<LinearMaps>,
}

/// Makes tensor maps of x and w, in the order in which a kernel expects them.
pub type LinearMaps = fn(&Projection, &Target, &LinearArgs) -> [TensorMapSpec; 2];

/// Every linear kernel, the slowest first.
pub static LINEAR_KERNELS: &[LinearSpec] = &[LINEAR_NAIVE, LINEAR_TILED, LINEAR_MMA, LINEAR_HOPPER];

const LINEAR_NAIVE: LinearSpec = LinearSpec {
    name: "linear_naive",
    summary: "a thread per element of y",
    dtypes: &DType::ALL,
    capability: (7, 5),
    exact_capability: false,
    limit: |_| None,
    step: |p, _| Step {
        symbol: format!("linear_naive_{}", p.dtype),
        grid: grid(p, linear::NAIVE_TILE),
        block: Dim3::new(linear::NAIVE_TILE, linear::NAIVE_TILE, 1),
        shared_bytes: 0,
    },
    tensor_maps: None,
};

const LINEAR_TILED: LinearSpec = LinearSpec {
    name: "linear_tiled",
    summary: "tiles in shared memory, pieces in registers, scalar arithmetic",
    dtypes: &DType::ALL,
    capability: (7, 5),
    exact_capability: false,
    limit: |_| None,
    step: |p, _| Step {
        symbol: format!("linear_tiled_{}", p.dtype),
        grid: grid(p, linear::TILE),
        block: linear::TILED_THREADS.into(),
        shared_bytes: 0,
    },
    tensor_maps: None,
};

const LINEAR_MMA: LinearSpec = LinearSpec {
    name: "linear_mma",
    summary: "tensor cores by mma.sync, slices copied while others are multiplied",
    dtypes: &[DType::F16, DType::BF16],
    capability: (8, 0),
    exact_capability: false,
    limit: |_| None,
    step: |p, _| Step {
        symbol: format!("linear_mma_{}", p.dtype),
        grid: grid(p, linear_mma::TILE),
        block: linear_mma::THREADS.into(),
        shared_bytes: linear_mma::SHARED_BYTES,
    },
    tensor_maps: None,
};

const LINEAR_HOPPER: LinearSpec = LinearSpec {
    name: "linear_hopper",
    summary: "Hopper: wgmma, bulk copies into two blocks at once, a producer warpgroup",
    dtypes: &[DType::F16, DType::BF16],
    capability: (9, 0),
    exact_capability: true,
    limit: |p| {
        // The copy engine's coordinates are signed, and it counts rows in units of 16 bytes.
        let sizes = [p.rows, p.in_features, p.out_features];
        if let Some(n) = sizes.into_iter().find(|&n| i32::try_from(n).is_err()) {
            return Some(format!("counts rows and features in 31 bits: {n} is too many"));
        }
        let unit = 16 / p.dtype.size();
        let (what, n) = [("in_features", p.in_features), ("out_features", p.out_features)]
            .into_iter()
            .find(|(_, n)| n % unit != 0)?;
        Some(format!("copies rows in units of 16 bytes: {what} is {n}, no multiple of {unit}"))
    },
    step: |p, target| {
        let tile = hopper_tile(p, target);
        let (row_tiles, column_tiles) = tile.grid(p.rows as u32, p.out_features as u32);
        let clusters = target.multiprocessors / linear_hopper::CLUSTER;
        let clusters = row_tiles.saturating_mul(column_tiles).min(clusters.max(1));
        Step {
            symbol: format!("linear_hopper_{}_n{}", p.dtype, tile.columns),
            // One block a multiprocessor: shared memory and registers leave no room for two.
            grid: (linear_hopper::CLUSTER * clusters).into(),
            block: linear_hopper::THREADS.into(),
            shared_bytes: tile.shared_bytes(),
        }
    },
    tensor_maps: Some(|p, target, args| {
        let [x, w] = hopper_tile(p, target).boxes();
        [
            matrix_map(p.dtype, args.x, [p.in_features, p.rows], x),
            matrix_map(p.dtype, args.w, [p.in_features, p.out_features], w),
        ]
    }),
};

fn hopper_tile(p: &Projection, target: &Target) -> Tile {
    Tile::best(p.rows as u32, p.out_features as u32, target.multiprocessors)
}

/// The tensor map of a row-major matrix, with two dimensions of one element beyond columns and
/// rows.
fn matrix_map(
    dtype: DType,
    at: Buffer,
    [columns, rows]: [usize; 2],
    box_dims: [u32; 4],
) -> TensorMapSpec {
    let (columns, rows) = (columns as u64, rows as u64);
    let row = columns * dtype.size() as u64;
    TensorMapSpec {
        address: at.address,
        dtype,
        dims: vec![columns, rows, 1, 1],
        strides_bytes: vec![row, row * rows, row * rows],
        box_dims: box_dims.to_vec(),
        swizzle_bytes: 128,
    }
}

/// A block per tile of `y`: `x` counts tiles of rows, `y` tiles of columns.
fn grid(p: &Projection, tile: u32) -> Dim3 {
    Dim3::new(tiles(p.rows, tile), tiles(p.out_features, tile), 1)
}

impl LinearSpec {
    /// Whether the kernel can do this projection on this device.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the first reason why not.
    pub fn supports(&self, projection: &Projection, target: &Target) -> Result<(), Error> {
        unless(self.name, self.obstacle(projection, target))
    }

    /// Whether the kernel can run on this device at all.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with what the device lacks.
    pub fn runs_on(&self, target: &Target) -> Result<(), Error> {
        unless(self.name, lacking(self.capability, self.exact_capability, target))
    }

    fn obstacle(&self, p: &Projection, target: &Target) -> Option<String> {
        if let Some(reason) = lacking(self.capability, self.exact_capability, target) {
            return Some(reason);
        }
        if let Some(reason) = dtype_obstacle(self.dtypes, p.dtype) {
            return Some(reason);
        }
        // Kernels count rows and features in 32 bits.
        if let Some(n) =
            [p.rows, p.in_features, p.out_features].into_iter().find(|&n| u32::try_from(n).is_err())
        {
            return Some(format!("counts rows and features in 32 bits: {n} is too many"));
        }
        (self.limit)(p).or_else(|| (self.step)(p, target).obstacle(target))
    }
}

/// The linear kernel of that name.
///
/// # Errors
/// [`Error::UnknownKernel`], which lists the names.
pub fn find_linear(name: &str) -> Result<&'static LinearSpec, Error> {
    LINEAR_KERNELS.iter().find(|k| k.name == name).ok_or_else(|| Error::UnknownKernel {
        given: name.into(),
        known: list(&LINEAR_KERNELS.iter().map(|k| k.name).collect::<Vec<_>>()),
    })
}

/// The best linear kernel for a projection on a device.
///
/// # Errors
/// [`Error::Unsupported`] when none can do it, with the reason of the most widely usable
/// one.
pub fn best_linear(projection: &Projection, target: &Target) -> Result<&'static LinearSpec, Error> {
    let able = |kernel: &&LinearSpec| kernel.supports(projection, target).is_ok();
    match LINEAR_KERNELS.iter().rev().find(able) {
        Some(kernel) => Ok(kernel),
        None => LINEAR_KERNELS[0].supports(projection, target).map(|()| &LINEAR_KERNELS[0]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::CpuDevice;

    fn emulator() -> Target {
        Target::of(&CpuDevice::new())
    }

    #[test]
    fn every_step_names_an_entry_with_its_threads() {
        for kernel in LINEAR_KERNELS {
            for &dtype in kernel.dtypes {
                let projection = Projection { dtype, rows: 5, in_features: 8, out_features: 16 };
                kernel.supports(&projection, &emulator()).unwrap();
                let step = (kernel.step)(&projection, &emulator());
                let entry = kernels_gpu::find(&step.symbol)
                    .unwrap_or_else(|| panic!("{} has no entry", step.symbol));
                assert_eq!(u64::from(entry.threads), step.block.count(), "{}", step.symbol);
                assert_eq!(step.grid.x % entry.cluster, 0, "{}", step.symbol);
                let args_bytes = match kernel.tensor_maps {
                    None => size_of::<LinearArgs>(),
                    Some(_) => size_of::<linear_hopper::LinearHopperArgs>(),
                };
                assert_eq!(entry.args_bytes, args_bytes, "{}", step.symbol);
            }
        }
    }

    #[test]
    fn the_best_is_the_last_that_can() {
        let projection = Projection { dtype: DType::F32, rows: 5, in_features: 7, out_features: 9 };
        let best = best_linear(&projection, &emulator()).unwrap();
        assert!(LINEAR_KERNELS[1..].iter().any(|kernel| kernel.name == best.name));
        let old = Target { capability: (6, 1), ..emulator() };
        let message = best_linear(&projection, &old).unwrap_err().to_string();
        assert!(message.contains("linear_naive needs compute capability 7.5"), "{message}");
        let wide = Projection { rows: 1 << 33, ..projection };
        let message = best_linear(&wide, &emulator()).unwrap_err().to_string();
        assert!(message.contains("8589934592 is too many"), "{message}");
        assert!(find_linear("linear_typo").unwrap_err().to_string().contains("linear_naive, "));
    }
}
