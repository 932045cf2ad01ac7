//! The gradients of attention on the tensors of a file: the inputs of the forward pass, and `do`.

use anyhow::Result;
use flash_attention::{
    Problem, Tensor,
    backend::instruments::time_ms,
    oracle,
    registry::{self, Backward},
    session::{Gradients, Outputs, Session, Work as _},
    verify::{Differences, GradientCredit, Yardstick},
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
/// The gradients, by their names in files.
const NAMES: [&str; 3] = ["dq", "dk", "dv"];

/// The tensors of a file and the problem that they define.
pub struct GivenBackward<'a> {
    forward: GivenAttention<'a>,
    d_o: Stored<'a>,
    /// O and LSE, where the file has both.
    outputs: Option<Outputs>,
    /// Gradients to be compared with.
    expected: Option<[Option<Tensor>; 3]>,
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
        let [dq, dk, dv] = [("dq", p.q_shape()), ("dk", p.k_shape()), ("dv", p.v_shape())]
            .map(|(name, shape)| stored(file, name, in_file(p, &shape)));
        let expected = [dq?, dk?, dv?];
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
        let plan = plan(args, &Backward::new(*p).deterministic(args.deterministic), session)?;
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
        let Gradients { dq, dk, dv, .. } = prepared.gradients()?;
        let dq = dq.reshaped(in_file(p, &p.q_shape()))?;
        let dk = dk.reshaped(in_file(p, &p.k_shape()))?;
        let dv = dv.reshaped(in_file(p, &p.v_shape()))?;
        let tensors = NAMES.into_iter().zip([dq, dk, dv]).collect();
        Ok(Done { tensors, kernel, by, ms, peak_bytes: prepared.memory().peak })
    }

    fn compare(&self, done: &Done) -> Result<Vec<Comparison>> {
        let (Some(expected), [(_, dq), (_, dk), (_, dv)]) = (&self.expected, &done.tensors[..])
        else {
            return Ok(Vec::new());
        };
        let p = self.problem();
        let all = oracle::all_heads(p);
        let of_head = p.group() * p.seq_q();
        let affordable = GradientOracle::affordable_rows(p, ORACLE_BUDGET) / of_head;
        let heads = GradientOracle::spread(&all, affordable.clamp(1, all.len()));
        let tensors = self.forward.tensors()?;
        let (inputs, d_o) = (self.forward.inputs(&tensors), self.d_o()?);
        let exact = oracle::gradients(p, &inputs, &d_o, &heads);
        let GradientCredit { dq: dq_credit, dk: dk_credit, dv: dv_credit, .. } =
            GradientCredit::of(p, &inputs, &d_o, &heads, &exact);
        let values = |[dq, dk, dv]: [&Tensor; 3]| {
            let [dq, dk, dv] = [dq, dk, dv].map(Tensor::clone);
            let gradients = Gradients { dq, dk, dv, d_bias: None, d_sinks: None };
            oracle::gradients_of(p, &inputs, &gradients, &heads)
        };
        let ours = values([dq, dk, dv]);
        // What the file lacks is filled with our own, and not reported.
        let theirs = [(dq, &expected[0]), (dk, &expected[1]), (dv, &expected[2])];
        let theirs = values(theirs.map(|(ours, theirs)| theirs.as_ref().unwrap_or(ours)));
        let one = |name: &'static str, [ours, theirs, exact]: [&[f64]; 3], plain: Yardstick| {
            let (p, heads) = (*p, heads.clone());
            Comparison {
                name,
                differences: Differences::new(ours, theirs),
                plain,
                ours_from_f64: Differences::new(ours, exact).max_abs,
                theirs_from_f64: Differences::new(theirs, exact).max_abs,
                compared: (heads.len(), p.batch() * p.kv_heads()),
                place: Box::new(move |element| gradient_index(&p, &heads, name, element)),
                rows: "heads of k and v",
            }
        };
        let comparisons = [
            one("dq", [&ours.dq, &theirs.dq, &exact.dq], dq_credit),
            one("dk", [&ours.dk, &theirs.dk, &exact.dk], dk_credit),
            one("dv", [&ours.dv, &theirs.dv, &exact.dv], dv_credit),
        ];
        let given = comparisons.into_iter().zip(expected).filter(|(_, given)| given.is_some());
        Ok(given.map(|(comparison, _)| comparison).collect())
    }
}
