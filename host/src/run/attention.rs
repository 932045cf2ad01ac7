//! Attention on the tensors `q`, `k`, `v` of a file, and on the file's optional `mask`,
//! `alibi_slopes`, `bias`, `sinks`, and `cu_seqlens_q` with `cu_seqlens_k`.

use anyhow::Result;
use flash_attention::{
    Alibi, Bias, DType, Dropout, Error, Extras, Layout, Problem, Tensor, Varlen,
    backend::instruments::time_ms,
    oracle::{self, Rows},
    session::{Inputs, Outputs, Session, Work},
    verify::{Credit, Differences},
};

use super::{
    Done, Given, RunArgs,
    check::{self, Comparison, Place},
    file::{Stored, TensorFile, mask_of},
    plan,
};
use crate::accuracy::Oracle;

/// Multiplications that a check may spend on attention in f64.
pub(super) const ORACLE_BUDGET: usize = 1 << 31;

/// The tensors of a file and the problem that they define.
pub struct GivenAttention<'a> {
    q: Stored<'a>,
    k: Stored<'a>,
    v: Stored<'a>,
    /// The file's other inputs: mask, slopes, bias and sinks.
    extras: Extras<Stored<'a>>,
    /// The start offsets of packed sequences in q, and in k and v.
    cu_seqlens: Option<[Vec<u32>; 2]>,
    problem: Problem,
    /// Outputs to be compared with.
    expected: Option<Expected>,
}

/// Copies of a file's tensors.
pub struct Tensors {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Option<Tensor>,
    bias: Option<Tensor>,
    sinks: Option<Tensor>,
}

/// The expected outputs in a file.
pub(super) struct Expected {
    o: Option<Tensor>,
    lse: Option<Tensor>,
}

impl<'a> GivenAttention<'a> {
    /// Looks the tensors up and derives the problem from their shapes.
    ///
    /// # Errors
    /// An error that names the missing or wrong tensor, with its type or shape and the right one.
    pub fn read(file: &'a TensorFile, args: &RunArgs, check: bool) -> Result<Self> {
        let (q, k, v) = (file.get("q")?, file.get("k")?, file.get("v")?);
        let dtype = q.dtype()?;
        let layout = args.layout.into();
        let cu_seqlens = cu_seqlens_of(file)?;
        let extents = |t: &Stored<'_>| match (&cu_seqlens, layout, t.shape) {
            (Some(_), _, &[n, h, d]) => Ok([1, h, n, d]),
            (None, Layout::HeadsFirst, &[b, h, n, d])
            | (None, Layout::TokensFirst, &[b, n, h, d]) => Ok([b, h, n, d]),
            (Some(_), ..) => {
                Err(t.must_be("of three dimensions, [total, H, D], beside cu_seqlens"))
            }
            (None, Layout::HeadsFirst, _) => Err(t.must_be("of four dimensions, [B, H, N, D]")),
            (None, Layout::TokensFirst, _) => Err(t.must_be("of four dimensions, [B, N, H, D]")),
        };
        let [batch, heads, seq_q, head_dim] = extents(&q)?;
        let [_, kv_heads, seq_k, _] = extents(&k)?;
        let [.., head_dim_v] = extents(&v)?;
        let (batch, builder) = match &cu_seqlens {
            Some([at_q, at_k]) => {
                let varlen = Varlen { total_q: seq_q, total_k: seq_k };
                let packed = Problem::packed(at_q, at_k, heads, head_dim)?.varlen(Some(varlen));
                (at_q.len().saturating_sub(1), packed)
            }
            None => (batch, Problem::builder(batch, heads, seq_q, head_dim).seq_k(seq_k)),
        };
        let mask = match &cu_seqlens {
            // The problem says that there can be none.
            Some(_) => file.find("mask"),
            None => mask_of(file, batch, seq_k)?,
        };
        let [alibi_slopes, bias, sinks] = ["alibi_slopes", "bias", "sinks"].map(|n| file.find(n));
        let problem = builder
            .kv_heads(kv_heads)
            .head_dim_v(head_dim_v)
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
        for (tensor, shape) in [(&k, problem.k_shape()), (&v, problem.v_shape())] {
            tensor.expect(dtype, in_file(&problem, &shape))?;
        }
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
        let expected = if check { Some(Expected::read(file, &problem)?) } else { None };
        Ok(Self { q, k, v, extras, cu_seqlens, problem, expected })
    }

    /// The tensors in this process's memory.
    ///
    /// # Errors
    /// The errors of reading the file.
    pub fn tensors(&self) -> Result<Tensors> {
        let p = &self.problem;
        let Extras { alibi_slopes, bias, sinks, .. } = self.extras;
        let tensor = |stored: Option<Stored<'_>>| stored.map(|t| t.to_tensor()).transpose();
        Ok(Tensors {
            q: self.q.to_tensor()?.reshaped(&p.q_shape())?,
            k: self.k.to_tensor()?.reshaped(&p.k_shape())?,
            v: self.v.to_tensor()?.reshaped(&p.v_shape())?,
            alibi_slopes: tensor(alibi_slopes)?,
            bias: tensor(bias)?,
            sinks: tensor(sinks)?,
        })
    }

    /// The tensors in the form that a session takes.
    pub fn inputs<'t>(&'t self, tensors: &'t Tensors) -> Inputs<'t> {
        let Tensors { q, k, v, alibi_slopes, bias, sinks } = tensors;
        Inputs {
            mask: self.extras.mask.map(|mask| mask.bytes),
            alibi_slopes: alibi_slopes.as_ref(),
            bias: bias.as_ref(),
            sinks: sinks.as_ref(),
            cu_seqlens_q: self.cu_seqlens.as_ref().map(|[at_q, _]| at_q.as_slice()),
            cu_seqlens_k: self.cu_seqlens.as_ref().map(|[_, at_k]| at_k.as_slice()),
            ..Inputs::new(q, k, v)
        }
    }

    /// At most `count` rows to compare; rows beyond the last packed sequence belong to none.
    fn sample_rows(&self, count: usize) -> Vec<usize> {
        let rows = oracle::sample_rows(&self.problem, count);
        let Some([at_q, _]) = &self.cu_seqlens else { return rows };
        let [_, _, total_q] = self.problem.lse_shape();
        let end = at_q.last().map_or(0, |&end| end as usize);
        rows.into_iter().filter(|row| row % total_q < end).collect()
    }
}

/// The start offsets of a file's packed sequences, if it has any.
fn cu_seqlens_of(file: &TensorFile) -> Result<Option<[Vec<u32>; 2]>> {
    let names = ["cu_seqlens_q", "cu_seqlens_k"];
    if names.iter().all(|name| file.find(name).is_none()) {
        return Ok(None);
    }
    let [q, k] = names.map(|name| file.get(name)?.to_u32());
    Ok(Some([q?, k?]))
}

/// A shape in files' form: packed sequences have no batch dimension.
pub fn in_file<'a>(problem: &Problem, shape: &'a [usize]) -> &'a [usize] {
    if problem.varlen().is_some() { &shape[1..] } else { shape }
}

impl Given for GivenAttention<'_> {
    fn problem(&self) -> &Problem {
        &self.problem
    }

    fn shape(&self) -> &[usize] {
        self.q.shape
    }

    fn run(&self, session: &Session, args: &RunArgs) -> Result<Done> {
        let plan = plan(args, &self.problem, session)?;
        let kernel = plan.kernel().name;
        let inputs = [self.q.bytes, self.k.bytes, self.v.bytes];
        let mut extras = self.extras.try_map(|tensor| Ok::<_, Error>(tensor.bytes))?;
        let at = self.cu_seqlens.as_ref().map(|both| both.each_ref().map(|at| bytes_of(at)));
        if let Some([at_q, at_k]) = &at {
            extras.cu_seqlens_q = Some(at_q);
            extras.cu_seqlens_k = Some(at_k);
        }
        let mut prepared = session.prepare_with(plan, inputs, extras)?;
        let ms = time_ms(session.device(), &mut || prepared.start())?;
        let Outputs { o, lse, .. } = prepared.outputs_without_weights()?;
        let p = &self.problem;
        let o = o.reshaped(in_file(p, &p.o_shape()))?;
        let lse = lse.reshaped(in_file(p, &p.lse_shape()))?;
        let mut tensors = vec![("o", o), ("lse", lse)];
        if args.with_weights {
            tensors.push(("weights", prepared.weights()?));
        }
        Ok(Done { tensors, kernel, by: kernel.into(), ms, peak_bytes: prepared.memory().peak })
    }

    fn compare(&self, done: &Done) -> Result<Vec<Comparison>> {
        let Some(expected) = &self.expected else { return Ok(Vec::new()) };
        let p = &self.problem;
        let rows = self.sample_rows(Oracle::affordable_rows(p, ORACLE_BUDGET));
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let tensors = self.tensors()?;
        let inputs = self.inputs(&tensors);
        let reference = oracle::reference(p, &inputs, &rows);
        let credit = Credit::of(p, &inputs, &rows, &reference);
        let rows_of = |outputs: &Outputs| Ok(oracle::rows_of(p, outputs, &rows));
        let place = |width| check::place(p, &rows, width);
        expected.compare(done, rows_of, (&reference, credit), (p, rows.len()), place)
    }
}

/// Numbers as bytes of this machine.
fn bytes_of(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|n| n.to_ne_bytes()).collect()
}

impl Expected {
    /// Looks for o and lse in the file of the inputs.
    ///
    /// # Errors
    /// An error if the file has neither, or if one of them is wrong.
    pub(super) fn read(file: &TensorFile, problem: &Problem) -> Result<Self> {
        let [o, lse] = stored_outputs(file, problem)?;
        if o.is_none() && lse.is_none() {
            file.get("o")?;
        }
        Ok(Self { o, lse })
    }

    /// Compares O and the LSE of a run with the file's O and LSE, on the rows of the f64 reference
    /// and of the plain algorithm's credit. `rows_of` picks these rows; `place` gives the index of
    /// an element in rows of the given width.
    pub(super) fn compare(
        &self,
        done: &Done,
        rows_of: impl Fn(&Outputs) -> Result<Rows>,
        (exact, credit): (&Rows, Credit),
        (p, compared): (&Problem, usize),
        place: impl Fn(usize) -> Place,
    ) -> Result<Vec<Comparison>> {
        let [(_, o), (_, lse), ..] = done.tensors.as_slice() else { return Ok(Vec::new()) };
        let rows_of = |o: &Tensor, lse: &Tensor| {
            rows_of(&Outputs { o: o.clone(), lse: lse.clone(), weights: None })
        };
        let ours = rows_of(o, lse)?;
        // Our own output fills a gap of the file, and is not reported.
        let theirs = rows_of(self.o.as_ref().unwrap_or(o), self.lse.as_ref().unwrap_or(lse))?;
        let one = |name, width, ours: &[f64], theirs: &[f64], exact: &[f64], plain| Comparison {
            name,
            differences: Differences::new(ours, theirs),
            plain,
            ours_from_f64: Differences::new(ours, exact).max_abs,
            theirs_from_f64: Differences::new(theirs, exact).max_abs,
            place: place(width),
            compared: (compared, p.rows()),
            rows: "rows",
        };
        let mut all = Vec::new();
        if self.o.is_some() {
            all.push(one("o", p.head_dim_v(), &ours.o, &theirs.o, &exact.o, credit.o));
        }
        if self.lse.is_some() {
            all.push(one("lse", 1, &ours.lse, &theirs.lse, &exact.lse, credit.lse));
        }
        Ok(all)
    }
}

/// O and the LSE of a file, where it has them.
///
/// # Errors
/// One of another shape: the message names both shapes.
pub fn stored_outputs(file: &TensorFile, p: &Problem) -> Result<[Option<Tensor>; 2]> {
    let o = stored(file, "o", in_file(p, &p.o_shape()))?;
    Ok([o, stored(file, "lse", in_file(p, &p.lse_shape()))?])
}

/// The tensor of that name, of whichever storage type, where the file has one.
///
/// # Errors
/// One of another shape: the message names both shapes.
pub fn stored(file: &TensorFile, name: &str, shape: &[usize]) -> Result<Option<Tensor>> {
    let Some(stored) = file.find(name) else { return Ok(None) };
    stored.expect(stored.dtype()?, shape)?;
    Ok(Some(stored.to_tensor()?))
}
