//! What is measured and verified on one problem: attention alone, or the module around it;
//! with its tensors and the right answer.

use anyhow::Result;
use flash_attention::{
    Error, Layout, Problem, Tensor,
    backend::{Counters, instruments::take_counters},
    error::Unsupported,
    module::{self, MultiHeadAttention, oracle as module_oracle},
    registry::KernelSpec,
    session::{Inputs, Session, Work},
};

use crate::{
    accuracy::{ModuleOracle, Oracle},
    format,
    inputs::{ModuleTensors, Tensors},
    results::{Check, Level, Row, Status},
};

/// How much of the right answer is computed.
#[derive(Clone, Copy, Debug)]
pub enum Effort {
    /// So many rows of O, or tokens of y.
    Rows(usize),
    /// As many as take about so many multiplications.
    Multiplications(usize),
}

/// One level on one problem.
pub struct Subject<'a> {
    session: &'a Session,
    problem: Problem,
    kind: Kind,
}

#[expect(clippy::large_enum_variant, reason = "there is one at a time")]
enum Kind {
    Attention { tensors: Tensors, oracle: Oracle },
    Module { tensors: ModuleTensors, oracle: ModuleOracle, module: MultiHeadAttention },
}

/// A kernel that has run once.
pub struct Ran<'a> {
    /// What ran, to be run again.
    pub work: Box<dyn Work + 'a>,
    /// Its outputs against the right answer.
    pub checks: Vec<Check>,
    /// The most device memory in use at once, in bytes.
    pub peak_bytes: u64,
    /// Device memory beyond parameters, inputs and outputs, in bytes.
    pub workspace_bytes: u64,
    /// What the emulator counted.
    pub counters: Option<Counters>,
}

/// The problem as a level poses it: the module's tensors have the tokens before the heads.
///
/// # Errors
/// None that the problem did not have.
fn problem_of(level: Level, problem: &Problem) -> Result<Problem, Error> {
    match level {
        Level::Attention => Ok(*problem),
        Level::Module => problem.to_builder().layout(Layout::TokensFirst).build(),
    }
}

impl<'a> Subject<'a> {
    /// Draws the tensors and computes the right answer.
    ///
    /// # Errors
    /// When the parameters of the module do not fit the device.
    pub fn new(
        session: &'a Session,
        level: Level,
        problem: &Problem,
        seed: u64,
        effort: Effort,
    ) -> Result<Self, Error> {
        let problem = problem_of(level, problem)?;
        let kind = match level {
            Level::Attention => {
                let tensors = Tensors::random(&problem, seed);
                let rows = match effort {
                    Effort::Rows(rows) => rows,
                    Effort::Multiplications(n) => Oracle::affordable_rows(&problem, n),
                };
                let oracle = Oracle::new(&problem, &tensors.inputs(), rows);
                Kind::Attention { tensors, oracle }
            }
            Level::Module => {
                let tensors = ModuleTensors::random(&problem, seed)?;
                let module = MultiHeadAttention::new(session, &tensors.weights, problem.heads())?;
                let tokens = match effort {
                    Effort::Rows(rows) => module_oracle::sample_tokens(&problem, rows),
                    Effort::Multiplications(n) => {
                        module_oracle::affordable_tokens(&problem, n as u64)
                    }
                };
                let oracle = ModuleOracle::new(&problem, &tensors, tokens);
                Kind::Module { tensors, oracle, module }
            }
        };
        Ok(Self { session, problem, kind })
    }

    /// What is measured.
    #[must_use]
    pub const fn level(&self) -> Level {
        match self.kind {
            Kind::Attention { .. } => Level::Attention,
            Kind::Module { .. } => Level::Module,
        }
    }

    /// The device.
    #[must_use]
    pub const fn session(&self) -> &'a Session {
        self.session
    }

    /// The attention problem.
    #[must_use]
    pub const fn problem(&self) -> &Problem {
        &self.problem
    }

    /// Tensors in the order in which another library takes them: q, k and v; or x, and weight
    /// and bias of each projection.
    #[must_use]
    pub fn tensors(&self) -> Vec<&Tensor> {
        match &self.kind {
            Kind::Attention { tensors, .. } => {
                let Inputs { q, k, v, .. } = tensors.inputs();
                vec![q, k, v]
            }
            Kind::Module { tensors, .. } => {
                let projections = tensors.weights.projections();
                let parameters = projections.iter().flat_map(|l| [&l.weight, &l.bias]);
                std::iter::once(&tensors.x).chain(parameters).collect()
            }
        }
    }

    /// The padding mask.
    #[must_use]
    pub fn mask(&self) -> Option<&[u8]> {
        match &self.kind {
            Kind::Attention { tensors, .. } => tensors.inputs().mask,
            Kind::Module { tensors, .. } => tensors.mask.as_deref(),
        }
    }

    /// Bytes of parameters, inputs and outputs.
    #[must_use]
    pub const fn own_bytes(&self) -> u64 {
        let p = &self.problem;
        match self.kind {
            Kind::Attention { .. } => p.input_bytes() + p.output_bytes(),
            Kind::Module { .. } => {
                let x = p.q_elements() as u64 * p.dtype().size() as u64;
                let mask = if p.has_mask() { (p.batch() * p.seq_k()) as u64 } else { 0 };
                module::parameter_bytes(p) + 2 * x + mask
            }
        }
    }

    /// Compares the output of another implementation, which gives no LSE.
    #[must_use]
    pub fn check_output(&self, name: &str, output: Tensor) -> Check {
        match &self.kind {
            Kind::Attention { oracle, .. } => oracle.check_o(name, output),
            Kind::Module { oracle, .. } => oracle.check(name, &output, None),
        }
    }

    /// Runs a kernel once, by `launch`, and compares its outputs.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], or what went wrong while it ran.
    pub fn run(
        &self,
        kernel: &'static KernelSpec,
        threshold: Option<f64>,
        launch: &dyn Fn(&mut dyn Work) -> Result<(), Error>,
    ) -> Result<Ran<'_>, Error> {
        let (session, problem) = (self.session, &self.problem);
        let launch = |work: &mut dyn Work| {
            take_counters(session.device());
            launch(work)?;
            Ok::<_, Error>(take_counters(session.device()))
        };
        match &self.kind {
            Kind::Attention { tensors, oracle } => {
                let mut prepared = session.prepare(kernel, problem, &tensors.inputs())?;
                let counters = launch(&mut prepared)?;
                let outputs = prepared.outputs_without_weights()?;
                let memory = prepared.memory();
                Ok(Ran {
                    checks: oracle.checks(kernel.name, &outputs, threshold).into(),
                    peak_bytes: memory.peak,
                    workspace_bytes: memory.workspace,
                    counters,
                    work: Box::new(prepared),
                })
            }
            Kind::Module { tensors, oracle, module } => {
                let mask = tensors.mask.as_deref().unwrap_or_default();
                let plan = kernel.plan(problem, &session.target())?;
                let mut forward = module.prepare_bytes(plan, tensors.x.as_bytes(), mask)?;
                let counters = launch(&mut forward)?;
                let memory = forward.memory();
                Ok(Ran {
                    checks: vec![oracle.check(kernel.name, &forward.y()?, threshold)],
                    peak_bytes: memory.peak,
                    workspace_bytes: memory.workspace,
                    counters,
                    work: Box::new(forward),
                })
            }
        }
    }
}

/// A row with what is known before anything runs.
#[must_use]
pub fn row(session: &Session, level: Level, kernel: &str, problem: &Problem) -> Row {
    let device = session.device();
    Row {
        kernel: kernel.into(),
        level,
        device: device.name(),
        batch: problem.batch(),
        heads: problem.heads(),
        seq: problem.seq_q(),
        head_dim: problem.head_dim(),
        dtype: problem.dtype(),
        causal: problem.causal(),
        emulated: device.is_emulated(),
        flops: match level {
            Level::Attention => problem.flops(),
            Level::Module => module::flops(problem),
        },
        ..Row::default()
    }
}

/// What can be said of a kernel without running it: a row that ends here because the
/// kernel cannot do the problem, or because its memory is not free.
///
/// # Errors
/// When the device does not answer.
pub fn foresee(
    session: &Session,
    level: Level,
    kernel: &'static KernelSpec,
    problem: &Problem,
) -> Result<(Row, bool), Error> {
    let (problem, target) = (problem_of(level, problem)?, session.target());
    let mut row = row(session, level, kernel.name, &problem);
    let planned = kernel.plan(&problem, &target).map_err(Error::from).and_then(|plan| {
        if level == Level::Module {
            module::best_linear(&problem, &target)?;
        }
        Ok(plan)
    });
    let plan = match planned {
        Err(Error::Unsupported(Unsupported { reason, .. })) => {
            row.status = Status::Unsupported;
            row.reason = reason;
            return Ok((row, false));
        }
        other => other?,
    };
    let needed = match level {
        Level::Attention => plan.peak_bytes(),
        Level::Module => module::parameter_bytes(&problem) + module::pass_bytes(&plan),
    };
    row.needed_bytes = Some(needed);
    let free = session.device().memory_info()?.free;
    if needed <= free {
        return Ok((row, true));
    }
    row.status = Status::Oom;
    row.free_bytes = Some(free);
    row.reason = format!(
        "needs {}, {} were free: not tried",
        format::bytes(needed as f64),
        format::bytes(free as f64)
    );
    Ok((row, false))
}
