//! The gradients of attention on the tensors of a file: the inputs of the forward pass, and `do`. A
//! bias and sinks of the file have gradients too.

use anyhow::Result;
use flash_attention::{
    Problem, Tensor,
    backend::instruments::time_ms,
    oracle,
    registry::{self, Backward},
    session::{Gradients, Outputs, Session, Work as _},
    verify::{Differences, GradientCredit},
};

use super::{
    Done, Given, RunArgs,
    attention::{GivenAttention, in_file, stored, stored_outputs},
    check::Comparison,
    file::{Stored, TensorFile},
    plan,
};
use crate::accuracy::{GradientOracle, gradient_index};

/// Multiplications that a check may spend on gradients in f64; one head is compared in any case.
const ORACLE_BUDGET: usize = 1 << 32;
/// The gradients, by their names in files; the last two where the file has `bias` and `sinks`.
pub(super) const NAMES: [&str; 5] = ["dq", "dk", "dv", "dbias", "dsinks"];

/// The tensors of a file and the problem that they define.
pub struct GivenBackward<'a> {
    forward: GivenAttention<'a>,
    d_o: Stored<'a>,
    /// O and LSE, where the file has both.
    outputs: Option<Outputs>,
    /// Gradients to be compared with.
    expected: Option<[Option<Tensor>; 5]>,
}

impl<'a> GivenBackward<'a> {
    /// Looks the tensors up and derives the problem from their shapes.
    ///
    /// # Errors
    /// An error that names the missing or wrong tensor, with its type or shape and the right one.
    pub fn read(file: &'a TensorFile, args: &RunArgs) -> Result<Self> {
        let forward = GivenAttention::read(file, args, false)?;
        let p = forward.problem();
        let d_o = file.get("do")?;
        d_o.expect(p.dtype(), in_file(p, &p.o_shape()))?;
        let outputs = match stored_outputs(file, p)? {
            [Some(o), Some(lse)] => Some(Outputs {
                o: o.reshaped(&p.o_shape())?,
                lse: lse.reshaped(&p.lse_shape())?,
                weights: None,
            }),
            _ => None,
        };
        let qkv = [p.q_shape(), p.k_shape(), p.v_shape()];
        let [q, k, v] = qkv.each_ref().map(|shape| Some(in_file(p, shape)));
        let (bias, sinks) = (p.bias_shape(), p.sinks_shape());
        let shapes = [q, k, v, bias.as_deref(), sinks.as_deref()];
        let mut expected = [const { None }; 5];
        for ((name, shape), expected) in NAMES.into_iter().zip(shapes).zip(&mut expected) {
            *expected = shape.map(|shape| stored(file, name, shape)).transpose()?.flatten();
        }
        if args.check && expected.iter().all(Option::is_none) {
            file.get("dq")?;
        }
        let expected = args.check.then_some(expected);
        Ok(Self { forward, d_o, outputs, expected })
    }

    fn d_o(&self) -> Result<Tensor> {
        Ok(self.d_o.to_tensor()?.reshaped(&self.problem().o_shape())?)
    }
}

impl Given for GivenBackward<'_> {
    fn problem(&self) -> &Problem {
        self.forward.problem()
    }

    fn shape(&self) -> &[usize] {
        self.forward.shape()
    }

    fn run(&self, session: &Session, args: &RunArgs) -> Result<Done> {
        let p = self.problem();
        let backward = Backward::new(*p).deterministic(args.deterministic);
        let backward = backward.d_bias(p.bias().is_some()).d_sinks(p.has_sinks());
        let plan = plan(args, &backward, session)?;
        let kernel = plan.kernel().name;
        let tensors = self.forward.tensors()?;
        let inputs = self.forward.inputs(&tensors);
        let computed;
        let (outputs, by) = match &self.outputs {
            Some(outputs) => (outputs, kernel.to_owned()),
            None => {
                let forward = registry::best_for(p, &session.target())?.kernel;
                computed = session.run(forward, p, &inputs)?.0;
                (&computed, format!("{kernel}, o and lse by {}", forward.name))
            }
        };
        let mut prepared = session.prepare_backward(plan, &inputs, outputs, &self.d_o()?)?;
        let ms = time_ms(session.device(), &mut || prepared.start())?;
        let Gradients { dq, dk, dv, d_bias, d_sinks } = prepared.gradients()?;
        let dq = dq.reshaped(in_file(p, &p.q_shape()))?;
        let dk = dk.reshaped(in_file(p, &p.k_shape()))?;
        let dv = dv.reshaped(in_file(p, &p.v_shape()))?;
        let all = NAMES.into_iter().zip([Some(dq), Some(dk), Some(dv), d_bias, d_sinks]);
        let tensors = all.filter_map(|(name, tensor)| Some((name, tensor?))).collect();
        Ok(Done { tensors, kernel, by, ms, peak_bytes: prepared.memory().peak })
    }

    fn compare(&self, done: &Done) -> Result<Vec<Comparison>> {
        let Some(expected) = &self.expected else { return Ok(Vec::new()) };
        let p = self.problem();
        let of_head = p.group() * p.seq_q();
        let affordable = GradientOracle::affordable_rows(p, ORACLE_BUDGET) / of_head.max(1);
        let [.., d_bias, d_sinks] = expected;
        let wanted = [d_bias.is_some(), d_sinks.is_some()];
        let heads = GradientOracle::compared(p, affordable, wanted);
        let tensors = self.forward.tensors()?;
        let (inputs, d_o) = (self.forward.inputs(&tensors), self.d_o()?);
        let exact = oracle::gradients(p, &inputs, &d_o, &heads);
        let credit = GradientCredit::of(p, &inputs, &d_o, &heads, &exact);
        let GradientCredit { dq, dk, dv, d_bias, d_sinks } = credit;
        let credit = [dq, dk, dv, d_bias, d_sinks];
        let ours = |name| done.tensors.iter().find(|(n, _)| *n == name).map(|(_, tensor)| tensor);
        // Our own gradient fills a gap of the file, and is not reported.
        let ours = NAMES.map(ours);
        let theirs: [_; 5] = std::array::from_fn(|i| expected[i].as_ref().or(ours[i]));
        let values = |[dq, dk, dv, d_bias, d_sinks]: [Option<&Tensor>; 5]| {
            let (dq, dk, dv) = (dq?.clone(), dk?.clone(), dv?.clone());
            let (d_bias, d_sinks) = (d_bias.cloned(), d_sinks.cloned());
            let gradients = Gradients { dq, dk, dv, d_bias, d_sinks };
            Some(each(oracle::gradients_of(p, &inputs, &gradients, &heads)))
        };
        let (Some(ours), Some(theirs)) = (values(ours), values(theirs)) else {
            return Ok(Vec::new());
        };
        let exact = each(exact);
        let given = (0..NAMES.len()).filter(|&i| expected[i].is_some());
        let comparison = |i: usize| {
            let (p, heads, name) = (*p, heads.clone(), NAMES[i]);
            let [ours, theirs, exact] = [&ours[i], &theirs[i], &exact[i]];
            Comparison {
                name,
                differences: Differences::new(ours, theirs),
                plain: credit[i],
                ours_from_f64: Differences::new(ours, exact).max_abs,
                theirs_from_f64: Differences::new(theirs, exact).max_abs,
                compared: (heads.len(), p.batch() * p.kv_heads()),
                place: Box::new(move |element| gradient_index(&p, &heads, name, element)),
                rows: "heads of k and v",
            }
        };
        Ok(given.map(comparison).collect())
    }
}

/// The values in the order of [`NAMES`].
fn each(gradients: oracle::Gradients) -> [Vec<f64>; 5] {
    let oracle::Gradients { dq, dk, dv, d_bias, d_sinks } = gradients;
    [dq, dk, dv, d_bias, d_sinks]
}
