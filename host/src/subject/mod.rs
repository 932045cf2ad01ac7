//! The levels that `compare` measures and `verify` checks, on one problem with its tensors and the
//! right answer. A level joins with one file here: a [`Kind`], which needs no tensors, and the
//! [`Subject`] that it draws.

mod attention;
mod backward;
mod module;
mod module_backward;

use flash_attention::{
    DType, Error, Problem, Tensor,
    backend::{Counters, instruments::take_counters},
    error::Unsupported,
    module::{Passes, PreparedForward, oracle},
    registry::{Operation, Spec, Target},
    session::{Inputs, Prepared, PreparedBackward, Session, Work},
};

use crate::{
    format, machine,
    results::{Check, Level, ProblemRecord, Row, Status},
};

/// The part of the right answer to compute.
#[derive(Clone, Copy, Debug)]
pub enum Effort {
    /// This number of rows of O, or of tokens of y.
    Rows(usize),
    /// As many rows as fit beside the timing of a kernel.
    Quick,
    /// Every row, if that takes seconds.
    Thorough,
}

impl Effort {
    /// The number of rows: the given number, or the number within the multiplications of a quick or
    /// a thorough check.
    pub fn rows(self, [quick, thorough]: [usize; 2], affordable: impl Fn(usize) -> usize) -> usize {
        match self {
            Self::Rows(rows) => rows,
            Self::Quick => affordable(quick),
            Self::Thorough => affordable(thorough),
        }
    }

    /// The tokens of a module to compare, within the multiplications of a quick or a thorough check.
    fn tokens(self, problem: &Problem, [quick, thorough]: [u64; 2]) -> Vec<usize> {
        match self {
            Self::Rows(rows) => oracle::sample_tokens(problem, rows),
            Self::Quick => oracle::affordable_tokens(problem, quick),
            Self::Thorough => oracle::affordable_tokens(problem, thorough),
        }
    }
}

/// A kernel of a level.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    /// Its name.
    pub name: &'static str,
    /// Its storage types.
    pub dtypes: &'static [DType],
}

/// The kernels of an operation, the slowest first.
fn kernels<P: Operation>() -> Vec<Kernel> {
    let kernel = |spec: &'static Spec<P>| Kernel { name: spec.name, dtypes: spec.dtypes };
    P::kernels().iter().map(kernel).collect()
}

/// The part of a level that needs no tensors.
pub trait Kind: Sync {
    /// The level.
    fn level(&self) -> Level;

    /// The kernels, the slowest first.
    fn kernels(&self) -> Vec<Kernel>;

    /// Whether kernels must give the same bits in each run.
    fn deterministic(&self) -> bool {
        false
    }

    /// The level's form of the problem.
    ///
    /// # Errors
    /// The errors of the problem.
    fn pose(&self, problem: &Problem) -> Result<Problem, Error>;

    /// Floating-point operations, by convention; packed sequences count as if all were as long as
    /// the longest. A [`Subject`] knows their lengths.
    fn flops(&self, problem: &Problem) -> f64;

    /// Elements of a compared row, and the name of such rows.
    fn compared(&self, problem: &Problem) -> (usize, &'static str);

    /// Predicted device memory of a kernel's run on a problem in the level's form, everything
    /// included.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the kernel, or another part of the level, does not support the
    /// problem on the device.
    fn needed_bytes(&self, kernel: &str, problem: &Problem, target: &Target) -> Result<u64, Error>;

    /// Draws the tensors of a problem in the level's form and computes the right answer.
    ///
    /// # Errors
    /// When the parameters of a module do not fit the device.
    fn draw<'a>(
        &self,
        session: &'a Session,
        problem: Problem,
        seed: u64,
        effort: Effort,
    ) -> Result<Box<dyn Subject + 'a>, Error>;
}

/// The kind of a level; for the backward pass, with the same bits in each run if `deterministic`.
#[must_use]
pub fn kind(level: Level, deterministic: bool) -> &'static dyn Kind {
    match level {
        Level::Attention => &attention::Attention,
        Level::Module => &module::Module,
        Level::Backward if deterministic => &backward::Backward { deterministic: true },
        Level::Backward => &backward::Backward { deterministic: false },
        Level::ModuleBackward if deterministic => {
            &module_backward::ModuleBackward { deterministic: true }
        }
        Level::ModuleBackward => &module_backward::ModuleBackward { deterministic: false },
    }
}

/// One level on one problem.
pub trait Subject {
    /// The level.
    fn kind(&self) -> &dyn Kind;

    /// The device.
    fn session(&self) -> &Session;

    /// The attention problem.
    fn problem(&self) -> &Problem;

    /// Tensors in another library's order: q, k and v; or x, and weight and bias of each
    /// projection; then the gradient of the output, for levels with gradients.
    fn tensors(&self) -> Vec<&Tensor>;

    /// The padding mask.
    fn mask(&self) -> Option<&[u8]>;

    /// The inputs of attention, at the level of attention alone.
    fn inputs(&self) -> Option<Inputs<'_>> {
        None
    }

    /// Floating-point operations, by convention.
    fn flops(&self) -> f64 {
        self.kind().flops(self.problem())
    }

    /// Bytes of parameters, inputs and outputs.
    fn own_bytes(&self) -> u64;

    /// Compares the outputs of another implementation: o or y, without an LSE; or the gradients of
    /// [`tensors`](Self::tensors) but for the last one, in their order. Any other number of outputs
    /// gives no check.
    fn check_outputs(&self, name: &str, outputs: Vec<Tensor>) -> Vec<Check>;

    /// Runs a kernel once, by `launch`, and compares its outputs.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], or a fault of the kernel.
    fn run(
        &self,
        kernel: &str,
        threshold: Option<f64>,
        launch: &dyn Fn(&mut dyn Work) -> Result<(), Error>,
    ) -> Result<Ran<'_>, Error>;
}

/// Work of which parts may be timed alone.
pub trait Timed: Work {
    /// Runs only these passes from now on. `false` where there is only one pass.
    fn take(&mut self, _passes: Passes) -> bool {
        false
    }
}

impl Timed for Prepared {}
impl Timed for PreparedBackward {}
impl Timed for PreparedForward<'_> {}

/// A kernel that has run once.
pub struct Ran<'a> {
    /// The prepared kernel, ready to run again.
    pub work: Box<dyn Timed + 'a>,
    /// Its outputs against the right answer.
    pub checks: Vec<Check>,
    /// The peak of device memory, in bytes.
    pub peak_bytes: u64,
    /// The peak of the forward pass alone, if a backward pass follows.
    pub forward_peak_bytes: Option<u64>,
    /// Device memory beyond parameters, inputs and outputs, in bytes.
    pub workspace_bytes: u64,
    /// The emulator's counts.
    pub counters: Option<Counters>,
}

impl Ran<'_> {
    /// Writes the values that are known before any timing to a row.
    pub fn write_to(&self, row: &mut Row) {
        row.peak_bytes = Some(self.peak_bytes);
        row.forward_peak_bytes = self.forward_peak_bytes;
        row.workspace_bytes = Some(self.workspace_bytes);
        row.global_bytes_read = self.counters.map(|c| c.global_bytes_read);
        row.global_bytes_written = self.counters.map(|c| c.global_bytes_written);
        row.max_abs_err = self.checks.first().map(|o| o.abs.max);
    }
}

/// Runs `work` by `launch` and returns the emulator's counts of that run.
fn counted(
    work: &mut dyn Work,
    launch: &dyn Fn(&mut dyn Work) -> Result<(), Error>,
) -> Result<Option<Counters>, Error> {
    take_counters(work.device());
    launch(work)?;
    Ok(take_counters(work.device()))
}

/// A row with the values that are known before any run.
#[must_use]
pub fn row(session: &Session, kind: &dyn Kind, kernel: &str, problem: &Problem) -> Row {
    let (device, record) = (session.device(), ProblemRecord::from(problem));
    Row {
        kernel: kernel.into(),
        level: kind.level(),
        deterministic: kind.deterministic(),
        device: device.name(),
        batch: problem.batch(),
        heads: problem.heads(),
        seq: problem.seq_q(),
        head_dim: problem.head_dim(),
        dtype: problem.dtype(),
        causal: problem.causal(),
        kv_heads: Some(record.kv_heads.unwrap_or(record.heads)),
        seq_k: Some(problem.seq_k()),
        window_left: record.window[0],
        window_right: record.window[1],
        softcap: record.softcap,
        alibi: record.alibi,
        bias: record.bias,
        sinks: record.sinks,
        mask: record.mask,
        dropout: record.dropout,
        varlen: record.varlen,
        emulated: device.is_emulated(),
        flops: kind.flops(problem),
        ..Row::default()
    }
}

/// Predicts a kernel's row without running the kernel. The status is not [`Status::Ok`] where the
/// kernel does not support the problem or its memory is not free.
///
/// # Errors
/// When the device does not respond.
pub fn foresee(
    session: &Session,
    kind: &dyn Kind,
    kernel: &str,
    problem: &Problem,
) -> Result<Row, Error> {
    let mut row = row(session, kind, kernel, problem);
    let needed = match kind.needed_bytes(kernel, problem, &session.target()) {
        Err(Error::Unsupported(Unsupported { reason, .. })) => {
            row.status = Status::Unsupported;
            row.reason = reason;
            return Ok(row);
        }
        other => other?,
    };
    row.needed_bytes = Some(needed);
    let free = session.device().memory_info()?.free;
    let host = host_bytes(problem, needed, row.emulated);
    let (needed, free, whose) = if needed > free {
        (needed, free, "")
    } else if let Some(free) = machine::available_bytes().filter(|&free| host > free) {
        (host, free, " of this computer's memory")
    } else {
        return Ok(row);
    };
    row.status = Status::Oom;
    row.free_bytes = Some(free);
    row.reason = format!(
        "needs {}{whose}, {} were free: not tried",
        format::bytes(needed as f64),
        format::bytes(free as f64)
    );
    Ok(row)
}

/// About the memory of the host that a run takes at once: the inputs, and either their copies in
/// f32 for the outputs in f64, or the outputs with theirs and, under the emulator, the device's
/// memory, `needed` bytes.
fn host_bytes(problem: &Problem, needed: u64, emulated: bool) -> u64 {
    let (inputs, outputs) = (problem.input_bytes(), problem.output_bytes());
    let in_f32 = |bytes: u64| bytes / problem.dtype().size() as u64 * DType::F32.size() as u64;
    let device = if emulated { needed } else { 0 };
    inputs + in_f32(inputs).max(outputs + in_f32(outputs) + device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_memory_holds_tensors_copies_and_the_emulated_device() {
        // q, k, v: 64 elements each, o too; an LSE of 8.
        let problem = Problem::builder(1, 1, 8, 8).dtype(DType::F16).build().unwrap();
        assert_eq!((problem.input_bytes(), problem.output_bytes()), (384, 160));
        assert_eq!(host_bytes(&problem, 10_000, false), 384 + 768);
        assert_eq!(host_bytes(&problem, 10_000, true), 384 + 160 + 320 + 10_000);
    }
}
