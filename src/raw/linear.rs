//! Projections `y = x wᵀ + bias` on memory of the caller.

use kernels_gpu::{args, entry::Entry};

use super::{ALIGNMENT, Encode, Region, context::encode_tensor_map, plan::PlannedStep};
use crate::{
    backend::{self, Device, KernelArgs, Launch},
    error::Error,
    registry::{LinearSpec, Projection, Target},
};

/// The launch of a linear kernel for a projection.
#[derive(Clone, Debug)]
pub struct LinearPlan {
    kernel: &'static LinearSpec,
    projection: Projection,
    target: Target,
    step: PlannedStep,
}

/// The tensors of one projection, contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearArgs {
    /// Input, `[rows, in]`.
    pub x: Region,
    /// Weight, `[out, in]`.
    pub w: Region,
    /// Bias, `[out]`.
    pub bias: Option<Region>,
    /// Output, `[rows, out]`.
    pub y: Region,
}

impl LinearPlan {
    /// Plans a projection on a device.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the kernel cannot do the projection there.
    pub fn new(
        projection: &Projection,
        target: &Target,
        kernel: &'static LinearSpec,
    ) -> Result<Self, Error> {
        kernel.supports(projection, target)?;
        let step = PlannedStep::new((kernel.step)(projection, target))?;
        Ok(Self { kernel, projection: *projection, target: *target, step })
    }

    /// The kernel.
    #[must_use]
    pub const fn kernel(&self) -> &'static LinearSpec {
        self.kernel
    }

    /// The entry that a call launches.
    #[must_use]
    pub const fn entry(&self) -> &'static Entry {
        self.step.entry()
    }

    /// Compares the arguments of a call with the projection.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] names the tensor, the value, and what would be right.
    pub fn check(&self, args: &LinearArgs) -> Result<(), Error> {
        let p = &self.projection;
        let bytes = |elements: usize| (elements * p.dtype.size()) as u64;
        args.x.check("x", bytes(p.rows * p.in_features), ALIGNMENT)?;
        args.w.check("w", bytes(p.out_features * p.in_features), ALIGNMENT)?;
        args.y.check("y", bytes(p.rows * p.out_features), ALIGNMENT)?;
        args.bias.map_or(Ok(()), |bias| bias.check("bias", bytes(p.out_features), ALIGNMENT))
    }

    /// The launch of a call on a GPU.
    ///
    /// # Errors
    /// As [`LinearPlan::check`]; the driver's refusal to encode tensor maps, for which a
    /// context must be current on the calling thread.
    pub fn launch(&self, args: &LinearArgs) -> Result<Launch, Error> {
        self.launch_with(args, &encode_tensor_map)
    }

    /// As [`LinearPlan::launch`], on any device: the emulator encodes tensor maps in its own way.
    ///
    /// # Errors
    /// As [`LinearPlan::check`]; a tensor map that the device cannot encode.
    pub fn launch_for(&self, device: &dyn Device, args: &LinearArgs) -> Result<Launch, Error> {
        self.launch_with(args, &|map| device.encode_tensor_map(map))
    }

    pub(super) fn launch_with(
        &self,
        args: &LinearArgs,
        encode: Encode<'_>,
    ) -> Result<Launch, Error> {
        self.check(args)?;
        // A kernel that supports the projection counts in 32 bits.
        let plain = args::LinearArgs {
            x: args.x.arg(),
            w: args.w.arg(),
            bias: args.bias.unwrap_or_default().arg(),
            y: args.y.arg(),
            rows: self.projection.rows as u32,
            in_features: self.projection.in_features as u32,
            out_features: self.projection.out_features as u32,
        };
        Ok(self.step.launch(match self.kernel.tensor_maps {
            None => plain.to_launch_bytes(),
            Some(maps) => {
                let maps = maps(&self.projection, &self.target, &plain);
                backend::with_maps(encode, &maps, plain)?.to_launch_bytes()
            }
        }))
    }
}
