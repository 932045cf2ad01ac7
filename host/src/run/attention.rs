//! Attention on the tensors `q`, `k`, `v` of a file, and of `mask`, `alibi_slopes`, `bias` and `sinks`
//! those that it has.

use anyhow::Result;
use flash_attention::{
    Alibi, Bias, DType, Dropout, Error, Extras, Layout, Problem, Tensor,
    backend::instruments::time_ms,
    oracle,
    raw::Plan,
    session::{Inputs, Outputs, Session, Work},
    verify::{Credit, Differences},
};

use super::{
    Done, Given, RunArgs,
    check::{self, Comparison},
    file::{Stored, TensorFile, mask_of},
};

/// Multiplications that a check may spend on attention in f64.
const ORACLE_BUDGET: usize = 1 << 31;

/// The tensors of a file and the problem that they pose.
pub struct GivenAttention<'a> {
    q: Stored<'a>,
    k: Stored<'a>,
    v: Stored<'a>,
    /// The file's other inputs: mask, slopes, bias and sinks.
    extras: Extras<Stored<'a>>,
    problem: Problem,
    /// Outputs to be compared with.
    expected: Option<Expected>,
}

/// What a file says the outputs should be.
struct Expected {
    o: Option<Tensor>,
    lse: Option<Tensor>,
}

impl<'a> GivenAttention<'a> {
    /// Looks the tensors up and derives the problem from their shapes.
    ///
    /// # Errors
    /// Which tensor is missing or wrong, what it is and what it must be.
    pub fn read(file: &'a TensorFile, args: &RunArgs) -> Result<Self> {
        let (q, k, v) = (file.get("q")?, file.get("k")?, file.get("v")?);
        let dtype = q.dtype()?;
        let layout = args.layout.into();
        let names = match layout {
            Layout::HeadsFirst => "[B, H, N, D]",
            Layout::TokensFirst => "[B, N, H, D]",
        };
        let four = |t: &Stored<'_>| match (layout, t.shape) {
            (Layout::HeadsFirst, &[b, h, n, d]) | (Layout::TokensFirst, &[b, n, h, d]) => {
                Ok([b, h, n, d])
            }
            _ => Err(t.must_be(&format!("of four dimensions, {names}"))),
        };
        let [batch, heads, seq_q, head_dim] = four(&q)?;
        let [_, kv_heads, seq_k, _] = four(&k)?;
        let mask = mask_of(file, batch, seq_k)?;
        let [alibi_slopes, bias, sinks] = ["alibi_slopes", "bias", "sinks"].map(|n| file.find(n));
        let problem = Problem::builder(batch, heads, seq_q, head_dim)
            .kv_heads(kv_heads)
            .seq_k(seq_k)
            .dtype(dtype)
            .causal(args.causal)
            .window(args.window.unwrap_or_default())
            .softcap(args.softcap)
            .alibi(alibi_slopes.map(|slopes| match slopes.shape {
                [_] => Alibi::PerHead,
                _ => Alibi::PerBatchAndHead,
            }))
            .bias(bias.map(|bias| Bias {
                per_batch: bias.shape.first() == Some(&batch),
                per_head: bias.shape.get(1) == Some(&heads),
            }))
            .sinks(sinks.is_some())
            .mask(mask.is_some())
            .dropout(Some(Dropout { p: args.dropout, seed: args.seed }))
            .scale(args.scale)
            .layout(layout)
            .build()?;
        k.expect(dtype, &problem.k_shape())?;
        v.expect(dtype, &problem.k_shape())?;
        for (tensor, dtype, shape) in [
            (alibi_slopes, DType::F32, problem.alibi_shape()),
            (bias, dtype, problem.bias_shape()),
            (sinks, DType::F32, problem.sinks_shape()),
        ] {
            if let (Some(tensor), Some(shape)) = (tensor, shape) {
                tensor.expect(dtype, &shape)?;
            }
        }
        let extras = Extras { mask, alibi_slopes, bias, sinks, ..Extras::default() };
        let expected = if args.check { Some(Expected::read(file, &problem)?) } else { None };
        Ok(Self { q, k, v, extras, problem, expected })
    }
}

impl Given for GivenAttention<'_> {
    fn problem(&self) -> &Problem {
        &self.problem
    }

    fn shape(&self) -> &[usize] {
        self.q.shape
    }

    fn run(&self, session: &Session, plan: Plan, with_weights: bool) -> Result<Done> {
        let by = plan.kernel().name.into();
        let inputs = [self.q.bytes, self.k.bytes, self.v.bytes];
        let extras = self.extras.try_map(|tensor| Ok::<_, Error>(tensor.bytes))?;
        let mut prepared = session.prepare_with(plan, inputs, extras)?;
        let ms = time_ms(session.device(), &mut || prepared.start())?;
        let Outputs { o, lse, .. } = prepared.outputs_without_weights()?;
        let mut tensors = vec![("o", o), ("lse", lse)];
        if with_weights {
            tensors.push(("weights", prepared.weights()?));
        }
        Ok(Done { tensors, by, ms, peak_bytes: prepared.memory().peak })
    }

    fn compare(&self, done: &Done) -> Result<Vec<Comparison>> {
        let Some(expected) = &self.expected else { return Ok(Vec::new()) };
        let [(_, o), (_, lse), ..] = done.tensors.as_slice() else { return Ok(Vec::new()) };
        let p = &self.problem;
        let rows = oracle::sample_rows(p, (ORACLE_BUDGET / (p.seq_k() * p.head_dim())).max(64));
        let (q, k, v) = (self.q.to_tensor()?, self.k.to_tensor()?, self.v.to_tensor()?);
        let Extras { mask, alibi_slopes, bias, sinks, .. } = self.extras;
        let tensor = |stored: Option<Stored<'_>>| stored.map(|t| t.to_tensor()).transpose();
        let (alibi_slopes, bias, sinks) = (tensor(alibi_slopes)?, tensor(bias)?, tensor(sinks)?);
        let inputs = Inputs {
            mask: mask.map(|mask| mask.bytes),
            alibi_slopes: alibi_slopes.as_ref(),
            bias: bias.as_ref(),
            sinks: sinks.as_ref(),
            ..Inputs::new(&q, &k, &v)
        };
        let reference = oracle::reference(p, &inputs, &rows);
        let credit = Credit::of(p, &inputs, &rows, &reference);
        let rows_of = |o: &Tensor, lse: &Tensor| {
            let outputs = Outputs { o: o.clone(), lse: lse.clone(), weights: None };
            oracle::rows_of(p, &outputs, &rows)
        };
        let ours = rows_of(o, lse);
        // What the file lacks is filled with our own, and not reported.
        let theirs =
            rows_of(expected.o.as_ref().unwrap_or(o), expected.lse.as_ref().unwrap_or(lse));
        let one = |name, width, ours: &[f64], theirs: &[f64], exact: &[f64], plain| Comparison {
            name,
            differences: Differences::new(ours, theirs),
            plain,
            ours_from_f64: Differences::new(ours, exact).max_abs,
            theirs_from_f64: Differences::new(theirs, exact).max_abs,
            place: check::place(p, &rows, width),
            compared: (rows.len(), p.rows()),
            rows: "rows",
        };
        let mut all = Vec::new();
        if expected.o.is_some() {
            all.push(one("o", p.head_dim(), &ours.o, &theirs.o, &reference.o, credit.o));
        }
        if expected.lse.is_some() {
            all.push(one("lse", 1, &ours.lse, &theirs.lse, &reference.lse, credit.lse));
        }
        Ok(all)
    }
}

impl Expected {
    /// Looks for o and lse in the file of the inputs.
    ///
    /// # Errors
    /// That it has neither, or what is wrong with them.
    fn read(file: &TensorFile, problem: &Problem) -> Result<Self> {
        let get = |name, shape: &[usize]| -> Result<Option<Tensor>> {
            let Some(stored) = file.find(name) else { return Ok(None) };
            let dtype = stored.dtype()?;
            stored.expect(dtype, shape)?;
            Ok(Some(stored.to_tensor()?))
        };
        let o = get("o", &problem.q_shape())?;
        let lse = get("lse", &problem.lse_shape())?;
        if o.is_none() && lse.is_none() {
            file.get("o")?;
        }
        Ok(Self { o, lse })
    }
}
