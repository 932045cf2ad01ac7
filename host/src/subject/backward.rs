//! The gradients of attention: Q, K, V, O, LSE and dO in, dQ, dK and dV out, and the gradients of a
//! bias and of sinks.

use flash_attention::{
    Error, Problem, Tensor,
    raw::Plan,
    registry::{self, BackwardSpec, Target},
    session::{Gradients, Inputs, Outputs, Session, Work},
};

use super::{Effort, Kernel, Kind, Ran, Subject, counted, kernels};
use crate::{
    accuracy::GradientOracle,
    inputs::{Tensors, gradient_of_o},
    results::{Check, Level},
};

/// Multiplications that the oracle may spend on a sequence length: every head of the emulator's
/// defaults, one head of 512 rows on a GPU.
const QUICK: usize = 1 << 27;
/// The same for verification.
const THOROUGH: usize = 1 << 31;

/// The level.
pub struct Backward {
    /// Whether kernels must give the same bits in each run.
    pub deterministic: bool,
}

impl Backward {
    /// With a gradient for everything that has one.
    fn of(&self, problem: &Problem) -> registry::Backward {
        registry::Backward::new(*problem)
            .deterministic(self.deterministic)
            .d_bias(problem.bias().is_some())
            .d_sinks(problem.has_sinks())
    }

    fn plan(
        &self,
        kernel: &str,
        problem: &Problem,
        target: &Target,
    ) -> Result<Plan<registry::Backward>, Error> {
        Ok(BackwardSpec::find(kernel)?.plan(&self.of(problem), target)?)
    }
}

impl Kind for Backward {
    fn level(&self) -> Level {
        Level::Backward
    }

    fn kernels(&self) -> Vec<Kernel> {
        kernels::<registry::Backward>()
    }

    fn deterministic(&self) -> bool {
        self.deterministic
    }

    fn pose(&self, problem: &Problem) -> Result<Problem, Error> {
        Ok(*problem)
    }

    fn flops(&self, problem: &Problem) -> f64 {
        self.of(problem).flops()
    }

    fn compared(&self, problem: &Problem) -> (usize, &'static str) {
        (problem.group() * problem.seq_q() * problem.head_dim(), "heads of K and V")
    }

    fn needed_bytes(&self, kernel: &str, problem: &Problem, target: &Target) -> Result<u64, Error> {
        Ok(self.plan(kernel, problem, target)?.peak_bytes())
    }

    fn draw<'a>(
        &self,
        session: &'a Session,
        problem: Problem,
        seed: u64,
        effort: Effort,
    ) -> Result<Box<dyn Subject + 'a>, Error> {
        let tensors = Tensors::random(&problem, seed);
        let affordable =
            |multiplications| GradientOracle::affordable_rows(&problem, multiplications);
        let rows = effort.rows([QUICK, THOROUGH], affordable);
        let mut d_o = gradient_of_o(&problem, seed);
        let inputs = tensors.inputs();
        let oracle = GradientOracle::new(&problem, &inputs, &mut d_o, rows);
        let forward = registry::best_for(&problem, &session.target())?.kernel;
        let (outputs, _) = session.run(forward, &problem, &inputs)?;
        let kind = Self { deterministic: self.deterministic };
        Ok(Box::new(Drawn { kind, session, problem, tensors, outputs, d_o, oracle }))
    }
}

struct Drawn<'a> {
    kind: Backward,
    session: &'a Session,
    problem: Problem,
    tensors: Tensors,
    /// O and LSE of the best kernel of the forward pass.
    outputs: Outputs,
    d_o: Tensor,
    oracle: GradientOracle,
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
        let Inputs { q, k, v, .. } = self.tensors.inputs();
        vec![q, k, v, &self.d_o]
    }

    fn mask(&self) -> Option<&[u8]> {
        self.tensors.inputs().mask
    }

    fn inputs(&self) -> Option<Inputs<'_>> {
        Some(self.tensors.inputs())
    }

    fn flops(&self) -> f64 {
        // Five products where the forward pass has two.
        2.5 * self.tensors.inputs().flops(&self.problem)
    }

    fn own_bytes(&self) -> u64 {
        let p = &self.problem;
        let elements = p.q_elements() + p.k_elements() + p.v_elements() + p.o_elements();
        let d_sinks = self.kind.of(p).d_sinks_shape().map_or(0, |[heads]| heads * size_of::<f32>());
        let gradients = elements * p.dtype().size() + d_sinks;
        p.input_bytes() + p.output_bytes() + gradients as u64
    }

    fn check_outputs(&self, name: &str, outputs: Vec<Tensor>) -> Vec<Check> {
        let Ok([dq, dk, dv]) = <[Tensor; 3]>::try_from(outputs) else { return Vec::new() };
        let gradients = Gradients { dq, dk, dv, d_bias: None, d_sinks: None };
        self.oracle.checks(name, &self.tensors.inputs(), &gradients, None)
    }

    fn run(
        &self,
        kernel: &str,
        threshold: Option<f64>,
        launch: &dyn Fn(&mut dyn Work) -> Result<(), Error>,
    ) -> Result<Ran<'_>, Error> {
        let plan = self.kind.plan(kernel, &self.problem, &self.session.target())?;
        let inputs = self.tensors.inputs();
        let mut prepared =
            self.session.prepare_backward(plan, &inputs, &self.outputs, &self.d_o)?;
        let counters = counted(&mut prepared, launch)?;
        let memory = prepared.memory();
        Ok(Ran {
            checks: self.oracle.checks(kernel, &inputs, &prepared.gradients()?, threshold),
            peak_bytes: memory.peak,
            forward_peak_bytes: None,
            workspace_bytes: memory.workspace,
            counters,
            work: Box::new(prepared),
        })
    }
}
