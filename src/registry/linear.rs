//! The ladder of linear kernels: projections `y = x wᵀ + bias`, and their gradients. As in the
//! table of attention kernels, the best kernel for a projection is the last one that supports it. A
//! kernel joins with one entry here.

use kernels_gpu::{
    args,
    entry::Instances,
    linear::{
        Dw, Dx, Y, linear_bias,
        linear_hopper::{self, TileShape},
        linear_mma, linear_naive, linear_tiled,
    },
};
use simt::Dim3;

use super::{
    Call, Draft, LinearSpec, Map, Operation, Step,
    table::tiles,
    tensors::{ALIGNMENT, Region},
};
use crate::{
    backend::{KernelArgs as _, TensorMapSpec},
    dtype::DType,
    error::Error,
};

/// The product of a projection to compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LinearProduct {
    /// The output, `y = x wᵀ + bias`.
    #[default]
    Y,
    /// The gradient of the input, `dx = dy w`.
    Dx,
    /// The gradients of the weight and the bias, `dw = dyᵀ x` and the column sums of `dy`.
    Dw,
}

/// A projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Projection {
    /// Storage type of all tensors.
    pub dtype: DType,
    /// Rows of `x: [rows, in]` and `y: [rows, out]`.
    pub rows: usize,
    /// Columns of `x` and of `w: [out, in]`.
    pub in_features: usize,
    /// Columns of `y`, rows of `w` and elements of `bias: [out]`.
    pub out_features: usize,
    /// The product to compute.
    pub product: LinearProduct,
}

impl Projection {
    /// Rows and columns of the result, without the bias.
    #[must_use]
    pub const fn result_shape(&self) -> [usize; 2] {
        match self.product {
            LinearProduct::Y => [self.rows, self.out_features],
            LinearProduct::Dx => [self.rows, self.in_features],
            LinearProduct::Dw => [self.out_features, self.in_features],
        }
    }
}

/// The tensors of one projection, contiguous. Where the [`LinearProduct`] has the gradient of a
/// tensor, the field is the gradient.
///
/// | product | reads | writes |
/// |---|---|---|
/// | [`Y`](LinearProduct::Y) | `x`, `w`, `bias` | `y` |
/// | [`Dx`](LinearProduct::Dx) | `w`; dy from `y` | dx to `x` |
/// | [`Dw`](LinearProduct::Dw) | `x`; dy from `y` | dw to `w`; db to `bias`, if there is a bias |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearArgs {
    /// Input or its gradient, `[rows, in]`.
    pub x: Region,
    /// Weight or its gradient, `[out, in]`.
    pub w: Region,
    /// Bias or its gradient, `[out]`.
    pub bias: Option<Region>,
    /// Output or its gradient, `[rows, out]`.
    pub y: Region,
}

impl Operation for Projection {
    type Args = LinearArgs;
    type Limits = ();

    fn kernels() -> &'static [LinearSpec] {
        LINEAR_KERNELS
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn obstacle(&self, (): &()) -> Option<String> {
        let sizes = [self.rows, self.in_features, self.out_features];
        let wide = sizes.into_iter().find(|&n| u32::try_from(n).is_err())?;
        Some(format!("counts rows and features in 32 bits: {wide} is too many"))
    }

    fn check(&self, args: &LinearArgs) -> Result<(), Error> {
        let bytes = |elements: usize| (elements * self.dtype.size()) as u64;
        args.x.check("x", bytes(self.rows * self.in_features), ALIGNMENT)?;
        args.w.check("w", bytes(self.out_features * self.in_features), ALIGNMENT)?;
        args.y.check("y", bytes(self.rows * self.out_features), ALIGNMENT)?;
        args.bias.map_or(Ok(()), |bias| bias.check("bias", bytes(self.out_features), ALIGNMENT))
    }
}

/// The arguments of linear kernels, as bytes.
fn args(call: &Call<'_, Projection>) -> Vec<u8> {
    let (p, tensors) = (call.problem, call.args);
    args::LinearArgs {
        x: tensors.x.arg(),
        w: tensors.w.arg(),
        bias: tensors.bias.unwrap_or_default().arg(),
        y: tensors.y.arg(),
        rows: p.rows as u32,
        in_features: p.in_features as u32,
        out_features: p.out_features as u32,
    }
    .to_launch_bytes()
}

/// Every linear kernel, the slowest first.
pub static LINEAR_KERNELS: &[LinearSpec] = &[LINEAR_NAIVE, LINEAR_TILED, LINEAR_MMA, LINEAR_HOPPER];

const LINEAR_NAIVE: LinearSpec = LinearSpec {
    name: "linear_naive",
    summary: "one thread per element of the result",
    idea: "a projection as the textbook has it",
    dtypes: &DType::ALL,
    capability: (7, 5),
    exact_capability: false,
    limits: (),
    draft: |p, _| {
        let step = Step {
            grid: grid(p, linear_naive::TILE),
            block: Dim3::new(linear_naive::TILE, linear_naive::TILE, 1),
            ..step(p, [linear_naive::ENTRIES, linear_naive::DX, linear_naive::DW], 0)?
        };
        draft(p, step)
    },
};

const LINEAR_TILED: LinearSpec = LinearSpec {
    name: "linear_tiled",
    summary: "tiles in shared memory, pieces in registers, scalar arithmetic",
    idea: "each element read from memory serves a whole tile",
    dtypes: &DType::ALL,
    capability: (7, 5),
    exact_capability: false,
    limits: (),
    draft: |p, _| {
        let step = Step {
            grid: grid(p, linear_tiled::TILE),
            ..step(p, [linear_tiled::ENTRIES, linear_tiled::DX, linear_tiled::DW], 0)?
        };
        draft(p, step)
    },
};

const LINEAR_MMA: LinearSpec = LinearSpec {
    name: "linear_mma",
    summary: "tensor cores by mma.sync, slices copied while others are multiplied",
    idea: "tensor cores, and copies that run beside them",
    dtypes: &[DType::F16, DType::BF16],
    capability: (8, 0),
    exact_capability: false,
    limits: (),
    draft: |p, _| {
        let step = Step {
            grid: grid(p, linear_mma::TILE),
            shared_bytes: linear_mma::SHARED_BYTES,
            ..step(p, [linear_mma::ENTRIES, linear_mma::DX, linear_mma::DW], 0)?
        };
        draft(p, step)
    },
};

const LINEAR_HOPPER: LinearSpec = LinearSpec {
    name: "linear_hopper",
    summary: "Hopper: wgmma, bulk copies into two blocks at once, a producer warpgroup",
    idea: "a warpgroup that only copies, into both blocks of a cluster at once",
    dtypes: &[DType::F16, DType::BF16],
    capability: (9, 0),
    exact_capability: true,
    limits: (),
    draft: |p, target| {
        copied_in_units(p)?;
        let [rows, columns] = p.result_shape().map(|extent| extent as u32);
        let tile = TileShape::best(rows, columns, target.multiprocessors);
        let (row_tiles, column_tiles) = tile.grid(rows, columns);
        let clusters = target.multiprocessors / linear_hopper::CLUSTER;
        let clusters = row_tiles.saturating_mul(column_tiles).min(clusters.max(1));
        let [a, b] = match p.product {
            LinearProduct::Y => tile.boxes::<Y>(),
            LinearProduct::Dx => tile.boxes::<Dx>(),
            LinearProduct::Dw => tile.boxes::<Dw>(),
        };
        let tables = [linear_hopper::ENTRIES, linear_hopper::DX, linear_hopper::DW];
        let step = Step {
            // One block a multiprocessor: shared memory and registers leave no room for two.
            grid: (linear_hopper::CLUSTER * clusters).into(),
            shared_bytes: tile.shared_bytes(),
            maps: vec![
                Map { box_dims: a, spec: |c, box_dims| operands(c, box_dims)[0].clone() },
                Map { box_dims: b, spec: |c, box_dims| operands(c, box_dims)[1].clone() },
            ],
            ..step(p, tables, tile.columns as usize)?
        };
        draft(p, step)
    },
};

/// A launch of a kernel's entry for the product, from the kernel's table for that product.
fn step(p: &Projection, tables: [Instances; 3], size: usize) -> Result<Step<Projection>, String> {
    let [y, dx, dw] = tables;
    let entries = match p.product {
        LinearProduct::Y => y,
        LinearProduct::Dx => dx,
        LinearProduct::Dw => dw,
    };
    Step::new(entries, p.dtype, size, args)
}

/// A rung's own step, and the step that all rungs add to the gradient of the weight.
fn draft(p: &Projection, own: Step<Projection>) -> Result<Draft<Projection>, String> {
    let mut draft = Draft::from(own);
    if p.product == LinearProduct::Dw {
        let columns = linear_bias::columns(p.dtype.size() as u32);
        draft.steps.push(Step {
            grid: tiles(p.out_features, columns).into(),
            ..Step::new(linear_bias::ENTRIES, p.dtype, 0, args)?
        });
    }
    Ok(draft)
}

/// The copy engine's coordinates are signed, and it counts rows in units of 16 bytes.
fn copied_in_units(p: &Projection) -> Result<(), String> {
    let sizes = [p.rows, p.in_features, p.out_features];
    if let Some(n) = sizes.into_iter().find(|&n| i32::try_from(n).is_err()) {
        return Err(format!("counts rows and features in 31 bits: {n} is too many"));
    }
    let unit = 16 / p.dtype.size();
    match [("in_features", p.in_features), ("out_features", p.out_features)]
        .into_iter()
        .find(|(_, n)| n % unit != 0)
    {
        None => Ok(()),
        Some((what, n)) => {
            Err(format!("copies rows in units of 16 bytes: {what} is {n}, no multiple of {unit}"))
        }
    }
}

/// The tensor maps of the operands A and B, as they are stored.
fn operands(call: &Call<'_, Projection>, box_dims: [u32; 4]) -> [TensorMapSpec; 2] {
    let (p, args) = (call.problem, call.args);
    let x = map(p.dtype, args.x, p.rows, p.in_features, box_dims);
    let w = map(p.dtype, args.w, p.out_features, p.in_features, box_dims);
    let y = map(p.dtype, args.y, p.rows, p.out_features, box_dims);
    match p.product {
        LinearProduct::Y => [x, w],
        LinearProduct::Dx => [y, w],
        LinearProduct::Dw => [y, x],
    }
}

/// The tensor map of a matrix, row-major, with two dimensions of one element beyond columns and rows.
fn map(dtype: DType, at: Region, rows: usize, columns: usize, box_dims: [u32; 4]) -> TensorMapSpec {
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

/// One block per tile of the result: `x` counts tiles of rows, `y` tiles of columns.
fn grid(p: &Projection, tile: u32) -> Dim3 {
    let [rows, columns] = p.result_shape();
    Dim3::new(tiles(rows, tile), tiles(columns, tile), 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        backend::CpuDevice,
        registry::{Target, best_for, find_linear},
    };

    fn emulator() -> Target {
        Target::of(&CpuDevice::new())
    }

    #[test]
    fn the_best_is_the_last_that_can() {
        let projection = Projection {
            dtype: DType::F32,
            rows: 5,
            in_features: 7,
            out_features: 9,
            product: LinearProduct::Y,
        };
        let best = best_for(&projection, &emulator()).unwrap().kernel;
        assert!(LINEAR_KERNELS[1..].iter().any(|kernel| kernel.name == best.name));
        let old = Target { capability: (6, 1), ..emulator() };
        let message = best_for(&projection, &old).unwrap_err().to_string();
        assert!(message.contains("linear_naive needs compute capability 7.5"), "{message}");
        let wide = Projection { rows: 1 << 33, ..projection };
        let message = best_for(&wide, &emulator()).unwrap_err().to_string();
        assert!(message.contains("8589934592 is too many"), "{message}");
        assert!(find_linear("linear_typo").unwrap_err().to_string().contains("linear_naive, "));
    }
}
