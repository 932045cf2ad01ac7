//! The attention module on the tensors `x` and, if present, `mask` of a file, with the parameters
//! from another file.

use std::path::Path;

use anyhow::Result;
use flash_attention::{
    Dropout, Layout, Problem, Tensor,
    backend::instruments::time_ms,
    module::{MultiHeadAttention, Weights, oracle},
    problem::head_dim_of,
    session::{Session, Work},
    verify::Differences,
};

use super::{
    Done, Given, RunArgs,
    check::Comparison,
    file::{Stored, TensorFile, mask_of},
    plan,
};

/// Multiplications that a check may spend on the module in f64.
const ORACLE_BUDGET: u64 = 1 << 33;

/// The tensors of the files and the problem that they define.
pub struct GivenModule<'a> {
    pub x: Stored<'a>,
    mask: Option<Stored<'a>>,
    pub weights: Weights,
    pub problem: Problem,
    /// The expected y.
    expected: Option<Tensor>,
}

impl<'a> GivenModule<'a> {
    /// Looks up the tensors, including y for a comparison, and derives the problem from their
    /// shapes.
    ///
    /// # Errors
    /// An error that names the missing or wrong tensor, with its type or shape and the right one.
    pub fn read(
        file: &'a TensorFile,
        weights: &Path,
        heads: usize,
        (args, check): (&RunArgs, bool),
    ) -> Result<Self> {
        let x = file.get("x")?;
        let path = weights.display();
        let weights = Weights::load(weights)?;
        let (dtype, hidden) = (weights.dtype(), weights.hidden());
        let head_dim = head_dim_of(hidden, heads)?;
        let must_be = || {
            x.must_be(&format!("{dtype} [batch, tokens, {hidden}], as the weights of {path} are"))
        };
        let &[batch, seq, features] = x.shape else { return Err(must_be()) };
        if features != hidden || x.dtype()? != dtype {
            return Err(must_be());
        }
        let mask = mask_of(file, batch, seq)?;
        let problem = Problem::builder(batch, heads, seq, head_dim)
            .dtype(dtype)
            .causal(args.causal)
            .mask(mask.is_some())
            .dropout(Some(Dropout { p: args.dropout, seed: args.seed }))
            .layout(Layout::TokensFirst)
            .build()?;
        let expected = if check {
            let y = file.get("y")?;
            y.expect(dtype, x.shape)?;
            Some(y.to_tensor()?)
        } else {
            None
        };
        Ok(Self { x, mask, weights, problem, expected })
    }

    pub fn mask_bytes(&self) -> Option<&'a [u8]> {
        self.mask.map(|mask| mask.bytes)
    }
}

impl Given for GivenModule<'_> {
    fn problem(&self) -> &Problem {
        &self.problem
    }

    fn shape(&self) -> &[usize] {
        self.x.shape
    }

    fn run(&self, session: &Session, args: &RunArgs) -> Result<Done> {
        let plan = plan(args, &self.problem, session)?;
        let kernel = plan.kernel().name;
        let module = MultiHeadAttention::new(session, &self.weights, self.problem.heads())?;
        let mask = self.mask_bytes().unwrap_or_default();
        let mut forward = module.prepare_bytes(plan, self.x.bytes, mask)?;
        let ms = time_ms(session.device(), &mut || forward.start())?;
        let mut tensors = vec![("y", forward.y()?)];
        if args.with_weights {
            tensors.push(("weights", forward.weights()?));
        }
        let [linear, _] = forward.forward().linear();
        let by = format!("{kernel}, projections by {}", linear.kernel().name);
        Ok(Done { tensors, kernel, by, ms, peak_bytes: forward.memory().peak })
    }

    fn compare(&self, done: &Done) -> Result<Vec<Comparison>> {
        let (Some(theirs), Some((_, ours))) = (&self.expected, done.tensors.first()) else {
            return Ok(Vec::new());
        };
        let (p, mask) = (&self.problem, self.mask_bytes());
        let x = self.x.to_tensor()?;
        let tokens = oracle::affordable_tokens(p, ORACLE_BUDGET);
        let exact = oracle::reference(p, &self.weights, &x, mask, &tokens);
        let plain = oracle::credit(p, &self.weights, &x, mask, &tokens, &exact);
        let [ours, theirs] = [ours, theirs].map(|y| oracle::tokens_of(y, &tokens));
        let (compared, all) = (tokens.len(), p.batch() * p.seq_q());
        let (seq, hidden) = (p.seq_q(), self.weights.hidden());
        Ok(vec![Comparison {
            name: "y",
            differences: Differences::new(&ours, &theirs),
            plain,
            ours_from_f64: Differences::new(&ours, &exact).max_abs,
            theirs_from_f64: Differences::new(&theirs, &exact).max_abs,
            place: Box::new(move |element| {
                let token = tokens[element / hidden];
                vec![token / seq, token % seq, element % hidden]
            }),
            compared: (compared, all),
            rows: "tokens",
        }])
    }
}
