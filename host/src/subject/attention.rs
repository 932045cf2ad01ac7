//! Attention alone: Q, K, V in, O and LSE out.

use flash_attention::{
    Error, Problem, Tensor,
    registry::{self, Target},
    session::{Inputs, Session, Work},
};

use super::{Effort, Kernel, Kind, Ran, Subject, counted, kernels};
use crate::{
    accuracy::Oracle,
    inputs::Tensors,
    results::{Check, Level},
};

/// Multiplications that the oracle may spend on a sequence length; this limit sets the number of
/// sampled rows.
const QUICK: usize = 1 << 25;
/// The same for verification: all of the lab's experiment.
const THOROUGH: usize = 1 << 30;

/// The level.
pub struct Attention;

impl Kind for Attention {
    fn level(&self) -> Level {
        Level::Attention
    }

    fn pose(&self, problem: &Problem) -> Result<Problem, Error> {
        Ok(*problem)
    }

    fn flops(&self, problem: &Problem) -> f64 {
        problem.flops()
    }

    fn compared(&self, problem: &Problem) -> (usize, &'static str) {
        (problem.head_dim_v(), "rows")
    }

    fn kernels(&self) -> Vec<Kernel> {
        kernels::<Problem>()
    }

    fn needed_bytes(&self, kernel: &str, problem: &Problem, target: &Target) -> Result<u64, Error> {
        Ok(registry::find(kernel)?.plan(problem, target)?.peak_bytes())
    }

    fn draw<'a>(
        &self,
        session: &'a Session,
        problem: Problem,
        seed: u64,
        effort: Effort,
    ) -> Result<Box<dyn Subject + 'a>, Error> {
        let tensors = Tensors::random(&problem, seed);
        let affordable = |multiplications| Oracle::affordable_rows(&problem, multiplications);
        let rows = effort.rows([QUICK, THOROUGH], affordable);
        let oracle = Oracle::new(&problem, &tensors.inputs(), rows);
        Ok(Box::new(Drawn { session, problem, tensors, oracle }))
    }
}

struct Drawn<'a> {
    session: &'a Session,
    problem: Problem,
    tensors: Tensors,
    oracle: Oracle,
}

impl Subject for Drawn<'_> {
    fn kind(&self) -> &dyn Kind {
        &Attention
    }

    fn session(&self) -> &Session {
        self.session
    }

    fn problem(&self) -> &Problem {
        &self.problem
    }

    fn tensors(&self) -> Vec<&Tensor> {
        let Inputs { q, k, v, .. } = self.tensors.inputs();
        vec![q, k, v]
    }

    fn mask(&self) -> Option<&[u8]> {
        self.tensors.inputs().mask
    }

    fn inputs(&self) -> Option<Inputs<'_>> {
        Some(self.tensors.inputs())
    }

    fn flops(&self) -> f64 {
        self.tensors.inputs().flops(&self.problem)
    }

    fn own_bytes(&self) -> u64 {
        self.problem.input_bytes() + self.problem.output_bytes()
    }

    fn check_outputs(&self, name: &str, outputs: Vec<Tensor>) -> Vec<Check> {
        outputs.into_iter().map(|o| self.oracle.check_o(name, o)).collect()
    }

    fn run(
        &self,
        kernel: &str,
        threshold: Option<f64>,
        launch: &dyn Fn(&mut dyn Work) -> Result<(), Error>,
    ) -> Result<Ran<'_>, Error> {
        let plan = registry::find(kernel)?.plan(&self.problem, &self.session.target())?;
        let inputs = self.tensors.inputs();
        let qkv = [inputs.q, inputs.k, inputs.v].map(Tensor::as_bytes);
        let mut prepared = self.session.prepare_with(plan, qkv, inputs.extras())?;
        let counters = counted(&mut prepared, launch)?;
        let outputs = prepared.outputs_without_weights()?;
        let memory = prepared.memory();
        Ok(Ran {
            checks: self.oracle.checks(kernel, &outputs, threshold).into(),
            peak_bytes: memory.peak,
            forward_peak_bytes: None,
            workspace_bytes: memory.workspace,
            counters,
            work: Box::new(prepared),
        })
    }
}
