//! Multi-head attention as a module: tokens in, tokens out. The queries, keys and values of
//! every head are projections of the same input, attention runs on each head, and a last
//! projection mixes the heads:
//!
//! ```text
//! q | k | v = x Wᵀ + b                [B, N, 3 hidden], seen as three of [B, N, H, D]
//! o         = attention(q, k, v)      [B, N, H, D], seen as [B, N, hidden]
//! y         = o Woᵀ + bo              [B, N, hidden]
//! ```
//!
//! The first three projections are one launch: their weights are stacked in memory, so a token's q,
//! k and v come out side by side. Strides alone split and join the heads: `[B, N, hidden]` is
//! `[B, N, H, D]` in memory ([`Layout::TokensFirst`]). No launch transposes a tensor.
//!
//! Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.2.2.

mod backward;
mod forward;
#[cfg(feature = "verify")]
pub mod oracle;
mod weights;

use std::sync::Arc;

use crate::{
    backend::{DeviceBuffer, Memory, memory::expect_device},
    dtype::DType,
    error::{Error, Shape},
    problem::{Dropout, Layout, Problem, head_dim_of},
    raw::Plan,
    registry::{self, KernelSpec, LinearProduct, LinearSpec, Projection, Target},
    session::Session,
    tensor::Tensor,
};

pub use backward::{Backward, Kernels, ModuleGradients, Passes, PreparedBackward};
pub use forward::{Forward, ModuleMemory, ModuleOutputs, PreparedForward};
pub use weights::{Linear, Weights};

/// The options of a forward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pass {
    /// Whether token `i` sees tokens up to `i` only.
    pub causal: bool,
    /// Whether attention weights are dropped.
    pub mode: Mode,
    /// Whether the pass also returns the attention weights.
    pub weights: bool,
    /// Whether gradients have the same bits in each run.
    pub deterministic: bool,
}

/// Training or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// No dropout.
    #[default]
    Eval,
    /// Dropout of attention weights with the module's probability.
    Train {
        /// Key of the generator: the same seed drops the same weights with every kernel.
        seed: u64,
    },
}

/// Multi-head self-attention with its parameters in device memory. Each pass chooses its attention
/// kernel; all kernels use the same parameters.
///
/// ```
/// use std::sync::Arc;
///
/// use flash_attention::{
///     CpuDevice, DType, Error, Tensor,
///     module::{MultiHeadAttention, Pass, Weights},
///     registry,
///     session::Session,
/// };
///
/// fn main() -> Result<(), Error> {
///     let session = Session::new(Arc::new(CpuDevice::new()));
///     // Or Weights::load, from a file.
///     let weights = Weights::random(DType::F16, 128, 42)?;
///     let module = MultiHeadAttention::new(&session, &weights, 2)?;
///     // Batch 1, 48 tokens.
///     let x = Tensor::random(DType::F16, &[1, 48, 128], 1, 0.0);
///     let pass = Pass { causal: true, ..Pass::default() };
///     let (flash, memory) = module.forward(registry::find("flash_tiled")?, &x, None, &pass)?;
///     let (naive, more) = module.forward(registry::find("naive")?, &x, None, &pass)?;
///     assert_eq!(flash.y.shape(), [1, 48, 128]);
///     assert!(memory.peak < more.peak);
///     # assert!((flash.y.get(77) - naive.y.get(77)).abs() < 0.01);
///     Ok(())
/// }
/// ```
#[derive(Debug)]
pub struct MultiHeadAttention {
    memory: Arc<Memory>,
    /// Weight `[3 hidden, hidden]` and bias of q, k and v.
    qkv: [DeviceBuffer; 2],
    /// Weight and bias of the output.
    out: [DeviceBuffer; 2],
    dtype: DType,
    heads: usize,
    head_dim: usize,
    dropout: f32,
    linear: Option<&'static LinearSpec>,
}

impl MultiHeadAttention {
    /// Uploads the parameters.
    ///
    /// # Errors
    /// [`Error::HiddenNotDivisible`], [`Error::OutOfMemory`], or an error that the device reports.
    pub fn new(session: &Session, weights: &Weights, heads: usize) -> Result<Self, Error> {
        let head_dim = head_dim_of(weights.hidden(), heads)?;
        let memory = session.memory().clone();
        let upload = |projections: &[Linear]| -> Result<_, Error> {
            let weight: Vec<&[u8]> = projections.iter().map(|l| l.weight.as_bytes()).collect();
            let bias: Vec<&[u8]> = projections.iter().map(|l| l.bias.as_bytes()).collect();
            Ok([memory.upload(&weight.concat())?, memory.upload(&bias.concat())?])
        };
        let (qkv, out) = weights.projections().split_at(3);
        let (qkv, out) = (upload(qkv)?, upload(out)?);
        let dtype = weights.dtype();
        Ok(Self { memory, qkv, out, dtype, heads, head_dim, dropout: 0.0, linear: None })
    }

    /// The module with attention weights dropped with probability `p` in training.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] for a probability outside `[0, 1)`.
    pub fn with_dropout(mut self, p: f32) -> Result<Self, Error> {
        let dropout = Some(Dropout { p, seed: 0 });
        Problem::builder(1, self.heads, 1, self.head_dim).dropout(dropout).build()?;
        self.dropout = p;
        Ok(self)
    }

    /// The module with its projections on a certain kernel, instead of the best kernel that the
    /// device supports.
    #[must_use]
    pub const fn with_linear(mut self, linear: &'static LinearSpec) -> Self {
        self.linear = Some(linear);
        self
    }

    /// Features of a token.
    #[must_use]
    pub const fn hidden(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Heads.
    #[must_use]
    pub const fn heads(&self) -> usize {
        self.heads
    }

    /// Storage type of parameters, input and output.
    #[must_use]
    pub const fn dtype(&self) -> DType {
        self.dtype
    }

    /// The attention problem of a pass over `batch` sequences of `seq` tokens, with or
    /// without a padding mask.
    ///
    /// # Errors
    /// As [`Builder::build`](crate::problem::ProblemBuilder::build).
    pub fn problem(
        &self,
        batch: usize,
        seq: usize,
        mask: bool,
        pass: &Pass,
    ) -> Result<Problem, Error> {
        let dropout = match pass.mode {
            Mode::Eval => None,
            Mode::Train { seed } => Some(Dropout { p: self.dropout, seed }),
        };
        Problem::builder(batch, self.heads, seq, self.head_dim)
            .dtype(self.dtype)
            .causal(pass.causal)
            .mask(mask)
            .dropout(dropout)
            .layout(Layout::TokensFirst)
            .build()
    }

    /// The plans of a problem's projections, on the best kernel that supports them, unless the
    /// caller named a kernel.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the reason.
    pub fn linear(&self, problem: &Problem) -> Result<[Plan<Projection>; 2], Error> {
        let target = Target::of(&**self.memory.device());
        let Some(kernel) = self.linear else { return best_linear(problem, &target) };
        let [first, last] = projections(problem);
        Ok([kernel.plan(&first, &target)?, kernel.plan(&last, &target)?])
    }

    /// Bytes of the parameters.
    #[must_use]
    pub fn parameter_bytes(&self) -> u64 {
        self.qkv.iter().chain(&self.out).map(DeviceBuffer::bytes).sum()
    }

    /// Checks an input and prepares a pass.
    ///
    /// # Errors
    /// An error that names the wrong x, mask or kernel; [`Error::OutOfMemory`] (where predictable,
    /// before any allocation), or an error that the device reports.
    pub fn prepare(
        &self,
        kernel: &'static KernelSpec,
        x: &Tensor,
        mask: Option<&[u8]>,
        pass: &Pass,
    ) -> Result<PreparedForward<'_>, Error> {
        let problem = self.problem_of(x, mask, pass)?;
        let plan = kernel.plan(&problem, &Target::of(&**self.memory.device()))?;
        self.prepare_bytes(plan, x.as_bytes(), mask.unwrap_or_default())
    }

    /// Checks an input and a mask, and returns the problem that they define.
    fn problem_of(&self, x: &Tensor, mask: Option<&[u8]>, pass: &Pass) -> Result<Problem, Error> {
        let &[batch, seq, hidden] = x.shape() else { return Err(self.wrong_shape(x)) };
        if hidden != self.hidden() {
            return Err(self.wrong_shape(x));
        }
        x.expect("x", self.dtype, &[batch, seq, hidden])?;
        if let Some(mask) = mask
            && mask.len() != batch * seq
        {
            return Err(Error::ShapeMismatch {
                what: "mask".into(),
                expected: [batch, seq].into(),
                given: [mask.len()].into(),
            });
        }
        self.problem(batch, seq, mask.is_some(), pass)
    }

    /// As [`MultiHeadAttention::prepare`], with an existing plan for a problem of this module. The
    /// elements of `x: [B, N, hidden]` come as bytes, with a mask that is empty where the problem
    /// has no mask, so the contents of a mapped file go to the device without a copy.
    ///
    /// # Errors
    /// As [`MultiHeadAttention::prepare`]; [`Error::ShapeMismatch`] when there are more or
    /// fewer bytes than the problem has.
    pub fn prepare_bytes(
        &self,
        plan: Plan,
        x: &[u8],
        mask: &[u8],
    ) -> Result<PreparedForward<'_>, Error> {
        let problem = *plan.problem();
        let linear = self.linear(&problem)?;
        let mask = self.expect_inputs(&problem, x, mask, pass_bytes(&plan))?;
        PreparedForward::new(self, plan, linear, x, mask)
    }

    /// Checks the bytes of x and of a mask, and that the pass's memory is free. Returns the mask,
    /// if the problem has one.
    fn expect_inputs<'a>(
        &self,
        problem: &Problem,
        x: &[u8],
        mask: &'a [u8],
        needed: u64,
    ) -> Result<Option<&'a [u8]>, Error> {
        let tokens = problem.batch() * problem.seq_q();
        let mask_bytes = if problem.has_mask() { tokens } else { 0 };
        expect_bytes("x", problem.q_elements() * self.dtype.size(), x.len())?;
        expect_bytes("the mask", mask_bytes, mask.len())?;
        let device = &**self.memory.device();
        let free = device.memory_info()?.free;
        if needed > free {
            return Err(Error::OutOfMemory { device: device.name(), needed, free });
        }
        Ok(problem.has_mask().then_some(mask))
    }

    /// The buffers of forward passes over a problem of this module
    /// ([`MultiHeadAttention::problem`]), filled with NaN.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the reason; [`Error::OutOfMemory`].
    pub fn forward_buffers(
        &self,
        kernel: &'static KernelSpec,
        problem: &Problem,
    ) -> Result<Forward, Error> {
        self.expect(&self.memory, problem)?;
        let plan = kernel.plan(problem, &Target::of(&**self.memory.device()))?;
        Forward::new(&self.memory.part(), plan, self.linear(problem)?)
    }

    /// Checks that a problem has the heads and the storage type of this module, which is on the
    /// device of `memory`.
    fn expect(&self, memory: &Memory, problem: &Problem) -> Result<(), Error> {
        expect_device("the module", &self.qkv[0], memory)?;
        for (what, expected, given) in [
            ("heads", self.heads, problem.heads()),
            ("head dim", self.head_dim, problem.head_dim()),
        ] {
            if expected != given {
                return Err(Error::InvalidValue {
                    what,
                    given: given.to_string(),
                    remedy: format!("the module has {expected}"),
                });
            }
        }
        if problem.dtype() != self.dtype {
            return Err(Error::DTypeMismatch {
                what: "x".into(),
                expected: self.dtype,
                given: problem.dtype(),
            });
        }
        for (given, what) in [
            (problem.kv_heads() != problem.heads(), "fewer heads of K and V"),
            (problem.alibi().is_some(), "ALiBi"),
            (problem.bias().is_some(), "a bias"),
            (problem.has_sinks(), "sinks"),
        ] {
            if given {
                return Err(Error::InvalidValue {
                    what: "problem of the module",
                    given: what.into(),
                    remedy: "the module has none: use the module's `problem`".into(),
                });
            }
        }
        if problem.layout() != Layout::TokensFirst || problem.seq_q() != problem.seq_k() {
            return Err(Error::InvalidValue {
                what: "layout",
                given: format!("{:?}", problem.layout()),
                remedy: "use the module's `problem`: tokens before heads, as many keys as queries"
                    .into(),
            });
        }
        Ok(())
    }

    /// Weight and bias of q, k and v together, and of the output.
    const fn parameters(&self) -> [&[DeviceBuffer; 2]; 2] {
        [&self.qkv, &self.out]
    }

    fn wrong_shape(&self, x: &Tensor) -> Error {
        Error::InvalidValue {
            what: "shape of x",
            given: Shape::from(x.shape()).to_string(),
            remedy: format!("it must be [batch, tokens, {}]", self.hidden()),
        }
    }
}

fn expect_bytes(what: &str, expected: usize, given: usize) -> Result<(), Error> {
    if expected == given {
        return Ok(());
    }
    let (what, expected, given) = (format!("bytes of {what}"), [expected].into(), [given].into());
    Err(Error::ShapeMismatch { what, expected, given })
}

/// Floating-point operations of a forward pass: the attention's operations by convention
/// ([`Problem::flops`]), and a multiplication and an addition for each product of the four
/// projections.
#[must_use]
pub fn flops(problem: &Problem) -> f64 {
    let hidden = (problem.heads() * problem.head_dim()) as f64;
    problem.flops() + 8.0 * problem.q_elements() as f64 * hidden
}

/// Floating-point operations of a backward pass: 2.5 times the attention's operations by
/// convention, and two products for each product of the projections.
#[must_use]
pub fn backward_flops(problem: &Problem) -> f64 {
    let attention = problem.flops();
    2.5 * attention + 2.0 * (flops(problem) - attention)
}

/// The projections around a problem: one for q, k and v together, and one for the output.
#[must_use]
pub const fn projections(problem: &Problem) -> [Projection; 2] {
    let hidden = problem.heads() * problem.head_dim();
    let last = Projection {
        dtype: problem.dtype(),
        rows: problem.batch() * problem.seq_q(),
        in_features: hidden,
        out_features: hidden,
        product: LinearProduct::Y,
    };
    [Projection { out_features: 3 * hidden, ..last }, last]
}

/// The plans of the projections around a problem, on the best kernel for them on a device.
///
/// # Errors
/// As [`registry::best_for`].
pub fn best_linear(problem: &Problem, target: &Target) -> Result<[Plan<Projection>; 2], Error> {
    let [first, last] = projections(problem);
    let first = registry::best_for(&first, target)?.plan;
    let last = first.kernel().plan(&last, target)?;
    Ok([first, last])
}

/// The plans of the gradients of the projections around a problem, on a given kernel or on the
/// device's best kernel for them: see [`Backward::linear`].
///
/// # Errors
/// As [`registry::best_for`].
pub fn linear_backward(
    problem: &Problem,
    target: &Target,
    kernel: Option<&'static LinearSpec>,
) -> Result<[[Plan<Projection>; 2]; 2], Error> {
    let gradients = [LinearProduct::Dx, LinearProduct::Dw];
    let [first, last] =
        projections(problem).map(|p| gradients.map(|product| Projection { product, ..p }));
    let kernel = match kernel {
        Some(kernel) => kernel,
        None => registry::best_for(&first[0], target)?.kernel,
    };
    let plans = |[of_input, of_parameters]: [Projection; 2]| -> Result<_, Error> {
        Ok([kernel.plan(&of_input, target)?, kernel.plan(&of_parameters, target)?])
    };
    Ok([plans(first)?, plans(last)?])
}

/// Bytes of the parameters of a module for such problems.
#[must_use]
pub const fn parameter_bytes(problem: &Problem) -> u64 {
    let hidden = (problem.heads() * problem.head_dim()) as u64;
    4 * (hidden * hidden + hidden) * problem.dtype().size() as u64
}

/// Device memory of a pass beyond the parameters, by the plan of its attention. Attention weights
/// that the caller asks for, and that the kernel does not keep, come on top.
#[must_use]
pub fn pass_bytes(plan: &Plan) -> u64 {
    // Attention, and x and y, which are as large as O each.
    let x = plan.problem().q_elements() as u64 * plan.problem().dtype().size() as u64;
    plan.peak_bytes() + 2 * x
}

/// Device memory of a forward and a backward pass beyond the parameters, by the plans of their
/// attention.
#[must_use]
pub fn training_bytes(forward: &Plan, backward: &Plan<registry::Backward>) -> u64 {
    let problem = forward.problem();
    let x = problem.q_elements() as u64 * problem.dtype().size() as u64;
    // dy, dx and the gradients of q, k, v and o; the parameters' gradients.
    let gradients = 6 * x + parameter_bytes(problem);
    pass_bytes(forward) + gradients + backward.workspace_bytes()
}

#[cfg(test)]
mod tests;
