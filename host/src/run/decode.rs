//! A few queries against a cache: `q`, `k` and `v` of a file that also gives the number of keys of
//! each sequence (`seqused_k`) or its pages (`page_table`), or the scales of a cache in e4m3 (`k_scale`,
//! `v_scale`).

use anyhow::Result;
use flash_attention::{
    Alibi, Bias, DType, Dropout, Layout, Problem, Tensor,
    backend::instruments::time_ms,
    oracle::{self, Gathered},
    registry::{self, Decode, Pages},
    session::{DecodeInputs, Inputs, Outputs, Session, Work},
    verify::Credit,
};

use safetensors::Dtype;

use super::{
    Done, Given, RunArgs,
    attention::{Expected, ORACLE_BUDGET},
    check::{Comparison, Place},
    file::{Stored, TensorFile},
};
use crate::{accuracy::Oracle, failure::Usage};

/// The tensors of a file and the decode that they define.
pub struct GivenDecode {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Option<Tensor>,
    sinks: Option<Tensor>,
    lengths: Option<Vec<i32>>,
    table: Option<Vec<i32>>,
    /// Of K and of V in e4m3.
    scales: Option<[Vec<f32>; 2]>,
    decode: Decode,
    /// Outputs to be compared with.
    expected: Option<Expected>,
}

impl GivenDecode {
    /// Whether a file has a cache.
    pub fn is_in(file: &TensorFile) -> bool {
        ["seqused_k", "page_table", "k_scale"].iter().any(|name| file.find(name).is_some())
    }

    /// Looks the tensors up and derives the decode from their shapes.
    ///
    /// # Errors
    /// An error that names the missing or wrong tensor, with its type or shape and the right one.
    pub fn read(file: &TensorFile, args: &RunArgs) -> Result<Self> {
        let others = [
            (args.with_weights, "--with-weights"),
            (args.kernel != "best", "--kernel"),
            (args.backward, "--backward"),
        ];
        if let Some((_, option)) = others.into_iter().find(|&(given, _)| given) {
            let reason =
                format!("{option} is not for caches: leave it out, or seqused_k and page_table");
            return Err(Usage(reason).into());
        }
        let layout: Layout = args.layout.into();
        let extents = |t: &Stored<'_>| match (layout, t.shape) {
            (Layout::HeadsFirst, &[b, h, n, d]) | (Layout::TokensFirst, &[b, n, h, d]) => {
                Ok([b, h, n, d])
            }
            (Layout::HeadsFirst, _) => Err(t.must_be("of four dimensions, [B, H, N, D]")),
            (Layout::TokensFirst, _) => Err(t.must_be("of four dimensions, [B, N, H, D]")),
        };
        let (q, k, v) = (file.get("q")?, file.get("k")?, file.get("v")?);
        let [batch, heads, queries, head_dim] = extents(&q)?;
        let [entries, kv_heads, rows, _] = extents(&k)?;
        let [.., head_dim_v] = extents(&v)?;
        let table = file.find("page_table");
        let max_pages = match table.map(|table| (table, table.shape)) {
            None => None,
            Some((_, &[rows, pages])) if rows == batch => Some(pages),
            Some((table, _)) => {
                return Err(table.must_be(&format!("of the shape [{batch}, pages of a sequence]")));
            }
        };
        let [alibi_slopes, bias, sinks] = ["alibi_slopes", "bias", "sinks"].map(|n| file.find(n));
        let problem = Problem::builder(batch, heads, queries, head_dim)
            .head_dim_v(head_dim_v)
            .kv_heads(kv_heads)
            .seq_k(max_pages.map_or(rows, |pages| pages.saturating_mul(rows)))
            .dtype(q.dtype()?)
            .causal(args.causal)
            .window(args.window.unwrap_or_default())
            .softcap(args.softcap)
            .alibi(alibi_slopes.map(|slopes| match slopes.shape {
                [_] => Alibi::PerHead,
                _ => Alibi::PerBatchAndHead,
            }))
            // The decode says that there can be none.
            .bias(bias.map(|_| Bias::default()))
            .mask(file.find("mask").is_some())
            .dropout(Some(Dropout { p: args.dropout, seed: args.seed }))
            .sinks(sinks.is_some())
            .scale(args.scale)
            .layout(layout)
            .build()?;
        let codes = |stored: &Stored<'_>| stored.is(Dtype::F8_E4M3);
        let of_cache = |stored: &Stored<'_>| match codes(stored) {
            true => Ok(Tensor::from_bytes(DType::E4M3, stored.shape, stored.bytes)?),
            false => stored.to_tensor(),
        };
        let scales = |name| match file.find(name) {
            None => Ok(None),
            Some(stored) if stored.is(Dtype::F32) && stored.shape == [kv_heads] => {
                Ok(Some(stored.to_tensor()?.to_f32()))
            }
            Some(stored) => Err(stored.must_be(&format!("f32 [{kv_heads}], one for each head"))),
        };
        let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let decode = match max_pages.map(number) {
            None => Decode::new(problem),
            Some(max_pages) => {
                let (page_size, pages) = (number(rows), number(entries));
                Decode::paged(problem, Pages { page_size, pages, max_pages })?
            }
        };
        let decode = if codes(&k) { decode.cache_dtype(DType::E4M3)? } else { decode };
        let read = |stored: Option<Stored<'_>>| stored.map(|t| t.to_tensor()).transpose();
        let numbers = |name| file.find(name).map(|t| t.to_i32()).transpose();
        Ok(Self {
            q: q.to_tensor()?,
            k: of_cache(&k)?,
            v: of_cache(&v)?,
            alibi_slopes: read(alibi_slopes)?,
            sinks: read(sinks)?,
            lengths: numbers("seqused_k")?,
            table: numbers("page_table")?,
            scales: scales("k_scale")?.zip(scales("v_scale")?).map(<[_; 2]>::from),
            decode,
            expected: if args.check { Some(Expected::read(file, &problem)?) } else { None },
        })
    }

    fn inputs(&self) -> DecodeInputs<'_> {
        DecodeInputs {
            tensors: Inputs {
                alibi_slopes: self.alibi_slopes.as_ref(),
                sinks: self.sinks.as_ref(),
                ..Inputs::new(&self.q, &self.k, &self.v)
            },
            seqused_k: self.lengths.as_deref(),
            page_table: self.table.as_deref(),
            scales: self.scales.as_ref().map(|scales| scales.each_ref().map(Vec::as_slice)),
        }
    }
}

impl Given for GivenDecode {
    fn problem(&self) -> &Problem {
        self.decode.problem()
    }

    fn shape(&self) -> &[usize] {
        self.q.shape()
    }

    fn run(&self, session: &Session, _: &RunArgs) -> Result<Done> {
        let plan = registry::best_for(&self.decode, &session.target())?.plan;
        let kernel = plan.kernel().name;
        let by = match plan.splits() {
            1 => kernel.into(),
            splits => format!("{kernel} in {splits} parts"),
        };
        let mut prepared = session.prepare_decode(plan, &self.inputs())?;
        let ms = time_ms(session.device(), &mut || prepared.start())?;
        let Outputs { o, lse, .. } = prepared.outputs()?;
        let tensors = vec![("o", o), ("lse", lse)];
        Ok(Done { tensors, kernel, by, ms, peak_bytes: prepared.memory().peak })
    }

    fn compare(&self, done: &Done) -> Result<Vec<Comparison>> {
        let Some(expected) = &self.expected else { return Ok(Vec::new()) };
        let gathered = Gathered::new(&self.decode, &self.inputs())?;
        let (p, inputs) = (&gathered.problem, gathered.inputs());
        let rows = oracle::sample_rows(p, Oracle::affordable_rows(p, ORACLE_BUDGET));
        let reference = oracle::reference(p, &inputs, &rows);
        let credit = Credit::of(p, &inputs, &rows, &reference);
        let of_file = self.decode.problem();
        let rows_of =
            |outputs: &Outputs| Ok(oracle::rows_of(p, &gathered.outputs(of_file, outputs)?, &rows));
        let place = |width: usize| {
            // Gathered sequences are packed ones: rows count heads, in them sequences, in them queries.
            let (rows, batch, queries) = (rows.clone(), of_file.batch(), of_file.seq_q());
            let place: Place = Box::new(move |element| {
                let (row, d) = (rows[element / width], element % width);
                let mut index = vec![row / queries % batch, row / queries / batch, row % queries];
                if width > 1 {
                    index.push(d);
                }
                index
            });
            place
        };
        expected.compare(done, rows_of, (&reference, credit), (p, rows.len()), place)
    }
}
