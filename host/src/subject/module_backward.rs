//! A forward and a backward pass of the module: x and dy in; y, dx and the gradients of the parameters
//! out.

use flash_attention::{
    Error, Problem, Tensor,
    module::{self, MultiHeadAttention, Passes, PreparedBackward},
    raw::Plan,
    registry::{self, BackwardSpec, Target},
    session::{Session, Work},
};

use super::{Effort, Kernel, Kind, Ran, Subject, Timed, counted, kernels};
use crate::{
    accuracy::ModuleGradientOracle,
    inputs::{ModuleTensors, gradient_of_y},
    results::{Check, Level},
};

/// Multiplications of a forward pass that the oracle may spend on a sequence length. Gradients take four
/// times as many.
const QUICK: u64 = 1 << 28;
/// The same for verification.
const THOROUGH: u64 = 1 << 30;

/// The level.
pub struct ModuleBackward {
    /// Whether kernels must give the same bits in each run.
    pub deterministic: bool,
}

impl ModuleBackward {
    /// The plans of the best kernel of the forward pass, and of a kernel of the backward pass.
    fn plans(
        &self,
        kernel: &str,
        problem: &Problem,
        target: &Target,
    ) -> Result<(Plan, Plan<registry::Backward>), Error> {
        let backward = registry::Backward::new(*problem).deterministic(self.deterministic);
        let forward = registry::best_for(problem, target)?.plan;
        Ok((forward, BackwardSpec::find(kernel)?.plan(&backward, target)?))
    }
}

impl Kind for ModuleBackward {
    fn level(&self) -> Level {
        Level::ModuleBackward
    }

    fn kernels(&self) -> Vec<Kernel> {
        kernels::<registry::Backward>()
    }

    fn deterministic(&self) -> bool {
        self.deterministic
    }

    fn pose(&self, problem: &Problem) -> Result<Problem, Error> {
        super::module::Module.pose(problem)
    }

    fn flops(&self, problem: &Problem) -> f64 {
        module::flops(problem) + module::backward_flops(problem)
    }

    fn compared(&self, problem: &Problem) -> (usize, &'static str) {
        (problem.heads() * problem.head_dim(), "tokens")
    }

    fn needed_bytes(&self, kernel: &str, problem: &Problem, target: &Target) -> Result<u64, Error> {
        let (forward, backward) = self.plans(kernel, problem, target)?;
        module::best_linear(problem, target)?;
        module::linear_backward(problem, target, None)?;
        Ok(module::parameter_bytes(problem) + module::training_bytes(&forward, &backward))
    }

    fn draw<'a>(
        &self,
        session: &'a Session,
        problem: Problem,
        seed: u64,
        effort: Effort,
    ) -> Result<Box<dyn Subject + 'a>, Error> {
        let tensors = ModuleTensors::random(&problem, seed)?;
        let module = MultiHeadAttention::new(session, &tensors.weights, problem.heads())?;
        let tokens = effort.tokens(&problem, [QUICK, THOROUGH]);
        let mut dy = gradient_of_y(&problem, seed);
        let oracle = ModuleGradientOracle::new(&problem, &tensors, &mut dy, &tokens);
        let kind = Self { deterministic: self.deterministic };
        Ok(Box::new(Drawn { kind, session, problem, tensors, dy, oracle, module }))
    }
}

struct Drawn<'a> {
    kind: ModuleBackward,
    session: &'a Session,
    problem: Problem,
    tensors: ModuleTensors,
    dy: Tensor,
    oracle: ModuleGradientOracle,
    module: MultiHeadAttention,
}

impl Subject for Drawn<'_> {
    fn kind(&self) -> &dyn Kind {
        &self.kind
    }

    fn session(&self) -> &Session {
        self.session
    }

    fn problem(&self) -> &Problem {
        &self.problem
    }

    fn tensors(&self) -> Vec<&Tensor> {
        self.tensors.each().chain([&self.dy]).collect()
    }

    fn mask(&self) -> Option<&[u8]> {
        self.tensors.mask.as_deref()
    }

    fn own_bytes(&self) -> u64 {
        let p = &self.problem;
        let x = p.q_elements() as u64 * p.dtype().size() as u64;
        let mask = self.mask().map_or(0, <[u8]>::len) as u64;
        2 * module::parameter_bytes(p) + 4 * x + mask
    }

    fn check_outputs(&self, name: &str, outputs: Vec<Tensor>) -> Vec<Check> {
        self.oracle.checks_of(name, &outputs, None)
    }

    fn run(
        &self,
        kernel: &str,
        threshold: Option<f64>,
        launch: &dyn Fn(&mut dyn Work) -> Result<(), Error>,
    ) -> Result<Ran<'_>, Error> {
        let plans = self.kind.plans(kernel, &self.problem, &self.session.target())?;
        let forward_bytes = module::parameter_bytes(&self.problem) + module::pass_bytes(&plans.0);
        let (x, dy) = (self.tensors.x.as_bytes(), self.dy.as_bytes());
        let mut passes =
            self.module.prepare_backward(plans, x, dy, self.mask().unwrap_or_default())?;
        let counters = counted(&mut passes, launch)?;
        let memory = passes.memory();
        Ok(Ran {
            checks: self.oracle.checks(kernel, passes.gradients()?, threshold),
            peak_bytes: memory.peak,
            forward_peak_bytes: Some(forward_bytes),
            workspace_bytes: memory.workspace,
            counters,
            work: Box::new(passes),
        })
    }
}

impl Timed for PreparedBackward<'_> {
    fn take(&mut self, passes: Passes) -> bool {
        self.set_passes(passes);
        true
    }
}
