//! Problems that attention has to get right on every device, as tensors of candle and of the oracle.
#![allow(dead_code, reason = "no program that shares them uses everything")]

use candle_core::{DType, Device, Result, Tensor, Var};
use flash_attention::{
    Alibi, Bias, Dropout, Layout, Problem, Window,
    half::{bf16, f16},
    oracle::{all_heads, sample_rows},
    problem::ProblemBuilder,
    session::{Gradients, Inputs, Outputs},
    verify::{verify, verify_gradients},
};
use flash_attention_candle::{Options, Varlen, attention_with_lse};

/// A problem and how its tensors are drawn.
pub struct Case {
    pub name: &'static str,
    pub problem: Problem,
    /// What Q and K are multiplied by.
    pub size: f64,
    /// Where packed sequences begin in Q and in K.
    pub cu_seqlens: Option<[Vec<u32>; 2]>,
}

/// The tensors of a draw.
pub struct Draw {
    pub q: flash_attention::Tensor,
    pub k: flash_attention::Tensor,
    pub v: flash_attention::Tensor,
    pub d_o: flash_attention::Tensor,
    mask: Option<Vec<u8>>,
    alibi_slopes: Option<flash_attention::Tensor>,
    bias: Option<flash_attention::Tensor>,
    sinks: Option<flash_attention::Tensor>,
    cu_seqlens: Option<[Vec<u32>; 2]>,
}

/// The tensors of candle, with those that get gradients as variables.
pub struct Variables {
    pub q: Var,
    pub k: Var,
    pub v: Var,
    pub bias: Option<Var>,
    pub sinks: Option<Var>,
    pub d_o: Tensor,
    pub options: Options,
}

impl Case {
    pub fn draw(&self, seed: u64) -> Draw {
        use flash_attention::{DType, Tensor};
        let p = &self.problem;
        let random =
            |shape: &[usize], at: u64| Tensor::random(p.dtype(), shape, 16 * seed + at, 0.0);
        let of = |shape: Option<Vec<usize>>, at: u64| {
            shape.map(|shape| Tensor::random(DType::F32, &shape, 16 * seed + at, 0.0))
        };
        let bias = p.bias_shape().map(|shape| {
            // Some hide their key.
            let mut numbers = random(&shape, 4).to_f64();
            numbers.iter_mut().step_by(7).for_each(|x| *x = f64::NEG_INFINITY);
            Tensor::from_f64(p.dtype(), &shape, &numbers).unwrap()
        });
        // The last entry of several sees nothing.
        let hidden = |b: usize, j: usize| j % 5 == 2 || (b > 0 && b + 1 == p.batch());
        let mask = p.mask_shape().map(|shape| {
            (0..shape[0])
                .flat_map(|b| (0..shape[1]).map(move |j| (b, j)))
                .map(|(b, j)| u8::from(!hidden(b, j)))
                .collect()
        });
        let slopes = of(p.alibi_shape(), 5).map(|slopes| slopes.scaled(0.1));
        Draw {
            q: random(&p.q_shape(), 0).scaled(self.size),
            k: random(&p.k_shape(), 1).scaled(self.size),
            v: random(&p.v_shape(), 2),
            d_o: random(&p.o_shape(), 3),
            mask,
            alibi_slopes: slopes,
            bias,
            sinks: of(p.sinks_shape(), 6),
            cu_seqlens: self.cu_seqlens.clone(),
        }
    }
}

impl Draw {
    pub fn inputs(&self) -> Inputs<'_> {
        Inputs {
            mask: self.mask.as_deref(),
            alibi_slopes: self.alibi_slopes.as_ref(),
            bias: self.bias.as_ref(),
            sinks: self.sinks.as_ref(),
            cu_seqlens_q: self.cu_seqlens.as_ref().map(|[q, _]| q.as_slice()),
            cu_seqlens_k: self.cu_seqlens.as_ref().map(|[_, k]| k.as_slice()),
            ..Inputs::new(&self.q, &self.k, &self.v)
        }
    }

    /// The same tensors in candle. Those of a tokens-first problem lie heads first where `transposed`,
    /// and the other way round.
    pub fn variables(&self, p: &Problem, device: &Device) -> Result<Variables> {
        let packed = p.varlen().is_some();
        let of = |tensor: &flash_attention::Tensor| -> Result<Tensor> {
            let tensor = candle(tensor, device)?;
            // Packed tensors of the oracle have a batch of one.
            if packed { tensor.squeeze(0) } else { Ok(tensor) }
        };
        let beside = |tensor: &Option<flash_attention::Tensor>| {
            tensor.as_ref().map(|tensor| candle(tensor, device)).transpose()
        };
        let variable = |tensor: Option<Tensor>| tensor.map(|t| Var::from_tensor(&t)).transpose();
        let (bias, sinks) = (variable(beside(&self.bias)?)?, variable(beside(&self.sinks)?)?);
        let as_tensor = |var: &Option<Var>| var.as_ref().map(|var| var.as_tensor().clone());
        let mask =
            self.mask.as_ref().map(|mask| Tensor::from_slice(mask, (p.batch(), p.seq_k()), device));
        let varlen = self.cu_seqlens.as_ref().map(|[q, k]| -> Result<Varlen> {
            Ok(Varlen {
                cu_seqlens_q: Tensor::new(q.as_slice(), device)?,
                cu_seqlens_k: Tensor::new(k.as_slice(), device)?,
                max_seqlen_q: p.seq_q(),
                max_seqlen_k: p.seq_k(),
            })
        });
        let options = Options {
            layout: p.layout(),
            scale: Some(p.scale()),
            causal: p.causal(),
            window: p.window(),
            softcap: p.softcap(),
            alibi_slopes: beside(&self.alibi_slopes)?,
            bias: as_tensor(&bias),
            sinks: as_tensor(&sinks),
            mask: mask.transpose()?,
            key_lengths: None,
            page_table: None,
            dropout: p.dropout(),
            varlen: varlen.transpose()?,
        };
        let [q, k, v, d_o] = [of(&self.q)?, of(&self.k)?, of(&self.v)?, of(&self.d_o)?];
        let [q, k, v] = [Var::from_tensor(&q)?, Var::from_tensor(&k)?, Var::from_tensor(&v)?];
        Ok(Variables { q, k, v, bias, sinks, d_o, options })
    }
}

/// A tensor of the oracle as one of candle.
pub fn candle(tensor: &flash_attention::Tensor, device: &Device) -> Result<Tensor> {
    match tensor.dtype() {
        flash_attention::DType::F32 => {
            Tensor::from_slice(tensor.as_slice::<f32>().unwrap(), tensor.shape(), device)
        }
        flash_attention::DType::F16 => {
            Tensor::from_slice(tensor.as_slice::<f16>().unwrap(), tensor.shape(), device)
        }
        flash_attention::DType::BF16 => {
            Tensor::from_slice(tensor.as_slice::<bf16>().unwrap(), tensor.shape(), device)
        }
        flash_attention::DType::E4M3 => unreachable!("a problem has no tensors in e4m3"),
    }
}

/// A tensor of candle as one of the oracle, in this shape.
pub fn oracle(tensor: &Tensor, shape: &[usize]) -> Result<flash_attention::Tensor> {
    let dtype = match tensor.dtype() {
        DType::F16 => flash_attention::DType::F16,
        DType::BF16 => flash_attention::DType::BF16,
        _ => flash_attention::DType::F32,
    };
    let numbers = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    Ok(flash_attention::Tensor::from_f32(dtype, shape, &numbers).unwrap())
}

/// What is wrong with O, the LSE and the gradients of a case on a device.
pub fn faults(case: &Case, device: &Device) -> Result<Vec<String>> {
    let p = &case.problem;
    let draw = case.draw(1);
    let variables = draw.variables(p, device)?;
    let Variables { q, k, v, bias, sinks, d_o, options } = &variables;
    let (o, lse) = attention_with_lse(q, k, v, options)?;
    let outputs =
        Outputs { o: oracle(&o, &p.o_shape())?, lse: oracle(&lse, &p.lse_shape())?, weights: None };
    let mut faults = Vec::new();
    let rows = sample_rows(p, ROWS);
    let verdict = verify(p, &draw.inputs(), &outputs, &rows);
    if !verdict.passes() {
        faults.push(format!("{} {}: {verdict}", p.dtype(), case.name));
    }
    let store = (o * d_o)?.sum_all()?.backward()?;
    let of = |tensor: &Tensor, shape: &[usize]| -> Result<flash_attention::Tensor> {
        oracle(store.get(tensor).expect("it is a variable"), shape)
    };
    let of_var = |var: &Option<Var>| var.as_ref().map(|var| of(var, var.dims())).transpose();
    let gradients = Gradients {
        dq: of(q, &p.q_shape())?,
        dk: of(k, &p.k_shape())?,
        dv: of(v, &p.v_shape())?,
        d_bias: of_var(bias)?,
        d_sinks: of_var(sinks)?,
    };
    let heads = if rows.len() < p.rows() { vec![0] } else { all_heads(p) };
    let verdict = verify_gradients(p, &draw.inputs(), &draw.d_o, &gradients, &heads);
    if !verdict.passes() {
        faults.push(format!("{} gradients of {}: {verdict}", p.dtype(), case.name));
    }
    Ok(faults)
}

/// Rows that are compared of larger problems; of smaller ones all, and the gradients of every head.
const ROWS: usize = 1 << 12;

/// The cases in a storage type.
pub fn cases(dtype: flash_attention::DType) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |name, builder: ProblemBuilder| {
        let problem = builder.dtype(dtype).build().unwrap();
        cases.push(Case { name, problem, size: 1.0, cu_seqlens: None });
    };
    let of = Problem::builder;
    let window = |left, right| Window { left, right };
    for n in [1, 2, 31, 32, 33, 127, 129, 257] {
        add("length", of(2, 2, n, 64));
        add("causal length", of(1, 2, n, 64).causal(true));
    }
    for (seq_q, seq_k) in [(1, 300), (40, 7), (7, 40), (130, 520), (300, 1)] {
        add("lengths", of(2, 2, seq_q, 32).seq_k(seq_k));
        add("causal lengths", of(1, 2, seq_q, 32).seq_k(seq_k).causal(true));
    }
    for d in [8, 40, 96, 128, 192, 256] {
        add("head dim", of(1, 2, 50, d).causal(true));
    }
    add("other values", of(1, 2, 50, 64).head_dim_v(128));
    add("other values", of(1, 2, 50, 128).head_dim_v(64));
    for layout in [Layout::HeadsFirst, Layout::TokensFirst] {
        add("layout", of(2, 3, 45, 64).seq_k(70).layout(layout));
        add("grouped heads", of(2, 6, 45, 64).kv_heads(2).seq_k(70).layout(layout).causal(true));
    }
    add("one head of keys", of(1, 8, 100, 64).kv_heads(1));
    for (left, right) in [(Some(5), None), (None, Some(9)), (Some(20), Some(0)), (Some(0), Some(0))]
    {
        add("window", of(1, 2, 150, 64).seq_k(170).window(window(left, right)));
        add("window", of(1, 4, 170, 64).kv_heads(2).seq_k(150).window(window(left, right)));
    }
    add("scale", of(1, 2, 60, 64).scale(Some(0.3)));
    add("softcap", of(1, 4, 140, 64).kv_heads(2).softcap(Some(2.0)).causal(true));
    add("wide softcap", of(1, 2, 60, 64).softcap(Some(50.0)));
    add("ALiBi", of(2, 4, 140, 64).alibi(Some(Alibi::PerHead)));
    add("ALiBi of batch entries", of(2, 4, 60, 64).seq_k(90).alibi(Some(Alibi::PerBatchAndHead)));
    for (per_batch, per_head) in [(true, true), (false, true), (true, false), (false, false)] {
        let bias = Some(Bias { per_batch, per_head });
        add("bias", of(2, 4, 70, 64).kv_heads(2).seq_k(130).bias(bias));
    }
    add("sinks", of(2, 4, 70, 64).sinks(true));
    add("sinks and no key", of(2, 4, 70, 64).seq_k(30).causal(true).sinks(true));
    add("mask", of(3, 2, 70, 64).seq_k(130).mask(true));
    add("dropout", of(2, 4, 70, 64).seq_k(133).dropout(Some(Dropout { p: 0.3, seed: 11 })));
    add(
        "all together",
        of(2, 6, 150, 64)
            .kv_heads(3)
            .seq_k(170)
            .layout(Layout::TokensFirst)
            .window(window(Some(60), Some(4)))
            .softcap(Some(5.0))
            .alibi(Some(Alibi::PerHead))
            .bias(Some(Bias { per_batch: true, per_head: false }))
            .sinks(true)
            .mask(true)
            .dropout(Some(Dropout { p: 0.2, seed: 3 })),
    );
    let mut add_packed =
        |name, lengths: &[[u32; 2]], change: fn(ProblemBuilder) -> ProblemBuilder| {
            let starts = |at: usize| {
                let ends = lengths.iter().scan(0, |end, of| {
                    *end += of[at];
                    Some(*end)
                });
                std::iter::once(0).chain(ends).collect::<Vec<u32>>()
            };
            let [q, k] = [starts(0), starts(1)];
            let builder = change(Problem::packed(&q, &k, 4, 64).unwrap().dtype(dtype));
            let problem = builder.build().unwrap();
            cases.push(Case { name, problem, size: 1.0, cu_seqlens: Some([q, k]) });
        };
    let lengths = [[40, 40], [1, 200], [0, 10], [130, 130], [9, 0], [64, 20]];
    add_packed("packed", &lengths, |p| p);
    add_packed("packed causal", &lengths, |p| p.causal(true).kv_heads(2));
    add_packed("packed with all", &lengths, |p| {
        let window = Window { left: Some(30), right: Some(3) };
        let p = p.kv_heads(1).window(window).softcap(Some(4.0)).alibi(Some(Alibi::PerBatchAndHead));
        p.sinks(true).dropout(Some(Dropout { p: 0.1, seed: 5 }))
    });
    // Scores of ±1e4 and more: one key takes all.
    let problem = of(1, 2, 60, 64).dtype(dtype).causal(true).build().unwrap();
    cases.push(Case { name: "large scores", problem, size: 100.0, cu_seqlens: None });
    cases
}
