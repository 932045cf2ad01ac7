//! The gradients of the attention module on the tensors `x`, `dy` and, if present, `mask` of a
//! file, with the parameters from another file.

use std::path::Path;

use anyhow::Result;
use flash_attention::{
    Problem, Tensor,
    backend::instruments::time_ms,
    module::{ModuleGradients, MultiHeadAttention, oracle},
    registry::{self, Backward},
    session::{Session, Work as _},
    verify::Differences,
};

use super::{
    Done, Given, RunArgs,
    check::Comparison,
    file::{Stored, TensorFile},
    module::GivenModule,
    plan,
};
use crate::accuracy::module_gradient_index;

/// The tensors of the files and the problem that they define.
pub struct GivenModuleBackward<'a> {
    forward: GivenModule<'a>,
    dy: Stored<'a>,
    /// Gradients to be compared with.
    expected: Option<[Option<Tensor>; 9]>,
}

impl<'a> GivenModuleBackward<'a> {
    /// Looks the tensors up and derives the problem from their shapes.
    ///
    /// # Errors
    /// An error that names the missing or wrong tensor, with its type or shape and the right one.
    pub fn read(
        file: &'a TensorFile,
        weights: &Path,
        heads: usize,
        args: &RunArgs,
    ) -> Result<Self> {
        let forward = GivenModule::read(file, weights, heads, (args, false))?;
        let dy = file.get("dy")?;
        dy.expect(forward.problem.dtype(), forward.x.shape)?;
        let expected = args.check.then(|| expected(file, &forward)).transpose()?;
        Ok(Self { forward, dy, expected })
    }
}

/// The file's gradients; there must be at least one.
fn expected(file: &TensorFile, forward: &GivenModule<'_>) -> Result<[Option<Tensor>; 9]> {
    let mut found = [const { None }; 9];
    let hidden = forward.weights.hidden();
    for (name, found) in ModuleGradients::NAMES.into_iter().zip(&mut found) {
        let shape: &[usize] = match name {
            "dx" => forward.x.shape,
            bias if bias.ends_with("bias") => &[hidden],
            _ => &[hidden, hidden],
        };
        if let Some(tensor) = file.find(name) {
            tensor.expect(forward.problem.dtype(), shape)?;
            *found = Some(tensor.to_tensor()?);
        }
    }
    if found.iter().all(Option::is_none) {
        file.get("dx")?;
    }
    Ok(found)
}

impl Given for GivenModuleBackward<'_> {
    fn problem(&self) -> &Problem {
        &self.forward.problem
    }

    fn shape(&self) -> &[usize] {
        self.forward.shape()
    }

    fn run(&self, session: &Session, args: &RunArgs) -> Result<Done> {
        let GivenModule { x, weights, problem: p, .. } = &self.forward;
        let plan = plan(args, &Backward::new(*p).deterministic(args.deterministic), session)?;
        let kernel = plan.kernel().name;
        let forward = registry::best_for(p, &session.target())?.plan;
        let by_forward = forward.kernel().name;
        let module = MultiHeadAttention::new(session, weights, p.heads())?;
        let mask = self.forward.mask_bytes().unwrap_or_default();
        let mut passes = module.prepare_backward((forward, plan), x.bytes, self.dy.bytes, mask)?;
        let ms = time_ms(session.device(), &mut || passes.start())?;
        let gradients = passes.gradients()?.into_tensors();
        let tensors = ModuleGradients::NAMES.into_iter().zip(gradients).collect();
        let [linear, _] = passes.forward().linear();
        let linear = linear.kernel().name;
        let by = format!("{kernel}, forward pass by {by_forward}, projections by {linear}");
        Ok(Done { tensors, kernel, by, ms, peak_bytes: passes.memory().peak })
    }

    fn compare(&self, done: &Done) -> Result<Vec<Comparison>> {
        let Some(expected) = &self.expected else { return Ok(Vec::new()) };
        let (p, weights) = (&self.forward.problem, &self.forward.weights);
        let (x, dy) = (self.forward.x.to_tensor()?, self.dy.to_tensor()?);
        let mask = self.forward.mask_bytes();
        let exact = oracle::gradients(p, weights, &x, mask, &dy);
        let credit = oracle::credit_gradients(p, weights, &x, mask, &dy, &exact);
        let mut comparisons = Vec::new();
        for (index, ((name, ours), theirs)) in done.tensors.iter().zip(expected).enumerate() {
            let Some(theirs) = theirs else { continue };
            let (ours, theirs, exact) = (ours.to_f64(), theirs.to_f64(), &exact.0[index]);
            let (name, p) = (*name, *p);
            comparisons.push(Comparison {
                name,
                differences: Differences::new(&ours, &theirs),
                plain: credit[index],
                ours_from_f64: Differences::new(&ours, exact).max_abs,
                theirs_from_f64: Differences::new(&theirs, exact).max_abs,
                compared: (ours.len(), ours.len()),
                place: Box::new(move |element| module_gradient_index(&p, name, element)),
                rows: "elements",
            });
        }
        Ok(comparisons)
    }
}
