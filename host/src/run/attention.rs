//! Attention on the tensors `q`, `k`, `v` and, where it is given, `mask` of a file.

use anyhow::Result;
use flash_attention::{
    Dropout, Layout, Problem, Tensor,
    error::Shape,
    oracle,
    registry::{self, KernelSpec},
    session::{Attention, DeviceInputs, Inputs, Outputs, Session},
    verify::{Credit, Differences},
};

use super::{
    RunArgs,
    check::{self, Comparison},
    file::{Stored, TensorFile},
};

/// Multiplications that a check may spend on attention in f64.
const ORACLE_BUDGET: usize = 1 << 31;

/// The tensors of a file and the problem that they pose.
pub struct Given<'a> {
    file: &'a TensorFile,
    q: Stored<'a>,
    k: Stored<'a>,
    v: Stored<'a>,
    mask: Option<Stored<'a>>,
    /// The problem.
    pub problem: Problem,
}

/// What a kernel made of them.
pub struct Done {
    /// O and LSE, and the weights where they were asked for.
    pub outputs: Outputs,
    /// Milliseconds that the device was busy.
    pub ms: f64,
    /// The most device memory in use at once, in bytes.
    pub peak_bytes: u64,
}

impl<'a> Given<'a> {
    /// Looks the tensors up and derives the problem from their shapes.
    ///
    /// # Errors
    /// Which tensor is missing or wrong, what it is and what it must be.
    pub fn read(file: &'a TensorFile, args: &RunArgs) -> Result<Self> {
        let (q, k, v) = (file.get("q")?, file.get("k")?, file.get("v")?);
        let mask = file.find("mask");
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
        let seq_k = four(&k)?[2];
        let problem = Problem::builder(batch, heads, seq_q, head_dim)
            .seq_k(seq_k)
            .dtype(dtype)
            .causal(args.causal)
            .mask(mask.is_some())
            .dropout(Some(Dropout { p: args.dropout, seed: args.seed }))
            .scale(args.scale)
            .layout(layout)
            .build()?;
        k.expect(dtype, &problem.k_shape())?;
        v.expect(dtype, &problem.k_shape())?;
        if let Some(mask) = mask
            && (!mask.is_bytes() || mask.shape != [batch, seq_k])
        {
            let shape = Shape(vec![batch, seq_k]);
            return Err(mask.must_be(&format!("u8 or bool {shape} (batch, keys), 0 = hidden")));
        }
        Ok(Self { file, q, k, v, mask, problem })
    }

    /// The kernel that was asked for, or the best one that can do what is asked.
    ///
    /// # Errors
    /// Why the kernel cannot, or that none can.
    pub fn kernel(&self, args: &RunArgs, session: &Session) -> Result<&'static KernelSpec> {
        let target = session.target();
        if args.kernel == "best" {
            return Ok(registry::best_for(&self.problem, &target)?.kernel);
        }
        let kernel = registry::find(&args.kernel)?;
        kernel.supports(&self.problem, &target)?;
        Ok(kernel)
    }

    /// Runs a kernel on the tensors, which go to the device straight from the file.
    ///
    /// # Errors
    /// [`flash_attention::Error::OutOfMemory`], before anything is allocated where that can be foreseen; or
    /// what went wrong while the kernel ran.
    pub fn run(
        &self,
        session: &Session,
        kernel: &'static KernelSpec,
        weights: bool,
    ) -> Result<Done> {
        let p = &self.problem;
        session.check_fits(kernel, p)?;
        let memory = session.memory();
        memory.reset_peak();
        let (q, k) = (memory.upload(self.q.bytes)?, memory.upload(self.k.bytes)?);
        let v = memory.upload(self.v.bytes)?;
        let mask = memory.upload(self.mask.map_or(&[][..], |mask| mask.bytes))?;
        let inputs = DeviceInputs {
            q: p.q_arg(q.as_arg()),
            k: p.k_arg(k.as_arg()),
            v: p.k_arg(v.as_arg()),
            mask: mask.as_arg(),
        };
        let attention = Attention::new(memory, kernel, p, &inputs)?;
        let ms = session.device().time_ms(&mut || attention.start())?;
        let mut outputs = attention.outputs_without_weights()?;
        if weights {
            outputs.weights = Some(attention.weights()?);
        }
        Ok(Done { outputs, ms, peak_bytes: memory.peak() })
    }

    /// Checks that the file has something to compare with, of the right shape.
    ///
    /// # Errors
    /// That it has neither `o` nor `lse`, or what is wrong with them.
    pub fn expected(&self) -> Result<Expected> {
        let get = |name, shape: &[usize]| -> Result<Option<Tensor>> {
            let Some(stored) = self.file.find(name) else { return Ok(None) };
            let dtype = stored.dtype()?;
            stored.expect(dtype, shape)?;
            Ok(Some(stored.to_tensor()?))
        };
        let o = get("o", &self.problem.q_shape())?;
        let lse = get("lse", &self.problem.lse_shape())?;
        if o.is_none() && lse.is_none() {
            self.file.get("o")?;
        }
        Ok(Expected { o, lse })
    }

    /// Compares outputs with those of the file by the 2x rule: they may differ by twice the
    /// error that the plain algorithm makes on the same input, against f64.
    ///
    /// # Errors
    /// When the inputs cannot be read.
    pub fn compare(&self, outputs: &Outputs, expected: &Expected) -> Result<Vec<Comparison>> {
        let p = &self.problem;
        let rows = oracle::sample_rows(p, (ORACLE_BUDGET / (p.seq_k() * p.head_dim())).max(64));
        let (q, k, v) = (self.q.to_tensor()?, self.k.to_tensor()?, self.v.to_tensor()?);
        let inputs = Inputs { q: &q, k: &k, v: &v, mask: self.mask.map(|mask| mask.bytes) };
        let reference = oracle::reference(p, &inputs, &rows);
        let credit = Credit::of(p, &inputs, &rows, &reference);
        let ours = oracle::rows_of(p, outputs, &rows);
        // What the file lacks is filled with our own, and not reported.
        let theirs = Outputs {
            o: expected.o.clone().unwrap_or_else(|| outputs.o.clone()),
            lse: expected.lse.clone().unwrap_or_else(|| outputs.lse.clone()),
            weights: None,
        };
        let theirs = oracle::rows_of(p, &theirs, &rows);
        let one = |name, width, ours: &[f64], theirs: &[f64], exact: &[f64], plain| Comparison {
            name,
            differences: Differences::new(ours, theirs),
            plain,
            ours_from_f64: Differences::new(ours, exact).max_abs,
            theirs_from_f64: Differences::new(theirs, exact).max_abs,
            place: check::place(p, &rows, width),
            compared: (rows.len(), p.rows()),
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

/// What a file says the outputs should be.
pub struct Expected {
    o: Option<Tensor>,
    lse: Option<Tensor>,
}
