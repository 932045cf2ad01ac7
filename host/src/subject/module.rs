//! The whole forward pass of the multi-head attention module: x in, y out.

use flash_attention::{
    Error, Layout, Problem, Tensor,
    module::{self, MultiHeadAttention},
    registry::{self, Target},
    session::{Session, Work},
};

use super::{Effort, Kernel, Kind, Ran, Subject, counted, kernels};
use crate::{
    accuracy::ModuleOracle,
    inputs::ModuleTensors,
    results::{Check, Level},
};

/// Multiplications that the oracle may spend on a sequence length: it must project all keys before
/// comparing any token.
const QUICK: u64 = 1 << 30;
/// The same for verification: in the lab's experiment about 3.3 * 10^9.
const THOROUGH: u64 = 1 << 32;

/// The level.
pub struct Module;

impl Kind for Module {
    fn level(&self) -> Level {
        Level::Module
    }

    /// The module's tensors have the tokens before the heads.
    fn pose(&self, problem: &Problem) -> Result<Problem, Error> {
        problem.to_builder().layout(Layout::TokensFirst).build()
    }

    fn flops(&self, problem: &Problem) -> f64 {
        module::flops(problem)
    }

    fn compared(&self, problem: &Problem) -> (usize, &'static str) {
        (problem.heads() * problem.head_dim(), "tokens")
    }

    fn kernels(&self) -> Vec<Kernel> {
        kernels::<Problem>()
    }

    fn needed_bytes(&self, kernel: &str, problem: &Problem, target: &Target) -> Result<u64, Error> {
        let plan = registry::find(kernel)?.plan(problem, target)?;
        module::best_linear(problem, target)?;
        Ok(module::parameter_bytes(problem) + module::pass_bytes(&plan))
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
        let oracle = ModuleOracle::new(&problem, &tensors, tokens);
        Ok(Box::new(Drawn { session, problem, tensors, oracle, module }))
    }
}

struct Drawn<'a> {
    session: &'a Session,
    problem: Problem,
    tensors: ModuleTensors,
    oracle: ModuleOracle,
    module: MultiHeadAttention,
}

impl Subject for Drawn<'_> {
    fn kind(&self) -> &dyn Kind {
        &Module
    }

    fn session(&self) -> &Session {
        self.session
    }

    fn problem(&self) -> &Problem {
        &self.problem
    }

    fn tensors(&self) -> Vec<&Tensor> {
        self.tensors.each().collect()
    }

    fn mask(&self) -> Option<&[u8]> {
        self.tensors.mask.as_deref()
    }

    fn own_bytes(&self) -> u64 {
        let p = &self.problem;
        let x = p.q_elements() as u64 * p.dtype().size() as u64;
        let mask = self.mask().map_or(0, <[u8]>::len) as u64;
        module::parameter_bytes(p) + 2 * x + mask
    }

    fn check_outputs(&self, name: &str, outputs: Vec<Tensor>) -> Vec<Check> {
        outputs.iter().map(|y| self.oracle.check(name, y, None)).collect()
    }

    fn run(
        &self,
        kernel: &str,
        threshold: Option<f64>,
        launch: &dyn Fn(&mut dyn Work) -> Result<(), Error>,
    ) -> Result<Ran<'_>, Error> {
        let plan = registry::find(kernel)?.plan(&self.problem, &self.session.target())?;
        let mask = self.mask().unwrap_or_default();
        let mut forward = self.module.prepare_bytes(plan, self.tensors.x.as_bytes(), mask)?;
        let counters = counted(&mut forward, launch)?;
        let memory = forward.memory();
        Ok(Ran {
            checks: vec![self.oracle.check(kernel, &forward.y()?, threshold)],
            peak_bytes: memory.peak,
            forward_peak_bytes: None,
            workspace_bytes: memory.workspace,
            counters,
            work: Box::new(forward),
        })
    }
}
