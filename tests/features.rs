//! Windows, groups of heads, caps, ALiBi, biases, sinks and packed sequences, alone and together, against f64; and
//! faults that attention kernels are known for.

mod suite;

use flash_attention::{
    Alibi, Bias, DType, Dropout, Layout, Problem, ProblemBuilder, Tensor, Window,
    backend::{DeviceTensor, Memory},
    oracle,
    raw::{Args, Plan, Region, View},
    registry::{self, KernelSpec, Target},
    session::{Inputs, Outputs, Session},
    verify::verify,
};
use suite::{Case, Draws, emulator};

/// Kernels of every kind of rung: scalar, mma.sync, wgmma, and the reference in memory.
const KERNELS: [&str; 4] = ["naive", "flash_tiled", "flash_pipelined", "flash_hopper"];
/// Random problems of a kernel in a run.
const RANDOM: u64 = 40;

/// A kernel with the storage type that it is tried in.
fn kernels() -> impl Iterator<Item = (&'static KernelSpec, DType)> {
    KERNELS.into_iter().map(|name| {
        let kernel = registry::find(name).unwrap();
        (kernel, kernel.dtypes[usize::from(name == "flash_hopper")])
    })
}

impl Draws {
    /// A case for a kernel in a storage type, with any of its head dims.
    fn case(&mut self, kernel: &KernelSpec, dtype: DType) -> Case {
        let head_dims = suite::head_dims(kernel);
        let head_dim = self.of(&head_dims);
        let head_dim_v = if self.below(4) == 0 { self.of(&head_dims) } else { head_dim };
        let (kv_heads, group) = (1 + self.below(2), self.of(&[1, 1, 2, 3]));
        let (seq_q, seq_k) = (1 + self.below(20), self.below(90));
        let bounds = [0, 1, 3, 17, 64, seq_k as u32, u32::MAX];
        let mut bound = || self.yes().then(|| self.of(&bounds));
        let window = Window { left: bound(), right: bound() };
        let alibi = [None, Some(Alibi::PerHead), Some(Alibi::PerBatchAndHead)];
        let bias = Bias { per_batch: self.yes(), per_head: self.yes() };
        let layouts = [Layout::HeadsFirst, Layout::TokensFirst];
        let heads = kv_heads * group;
        let change = |p: ProblemBuilder, draws: &mut Self| {
            p.head_dim_v(head_dim_v)
                .kv_heads(kv_heads)
                .dtype(dtype)
                .causal(draws.below(3) == 0)
                .window(window)
                .dropout((draws.below(3) == 0).then_some(Dropout { p: 0.25, seed: 5 }))
                .softcap(draws.yes().then(|| draws.of(&[0.5, 3.0, 50.0])))
                .alibi(draws.of(&alibi))
                .sinks(draws.yes())
        };
        if self.below(3) == 0 {
            let length = |draws: &mut Self, most| draws.below(4).min(1) * draws.below(most + 1);
            let mut lengths = vec![[seq_q, seq_k]; 1 + self.below(4)];
            for of in &mut lengths[1..] {
                *of = [length(self, seq_q), length(self, seq_k)];
            }
            let first = self.below(lengths.len());
            lengths.swap(0, first);
            let case = Case::packed("", &lengths, (heads, head_dim), |p| change(p, self));
            return Case { name: format!("{lengths:?} of {:?}", case.problem), ..case };
        }
        let builder = Problem::builder(1 + self.below(2), heads, seq_q, head_dim).seq_k(seq_k);
        let problem = change(builder, self)
            .mask(self.below(3) == 0)
            .bias(self.yes().then_some(bias))
            .layout(self.of(&layouts))
            .build()
            .unwrap();
        Case::new(&format!("{problem:?}"), problem)
    }
}

#[test]
fn random_combinations_are_right_on_every_kind_of_rung() {
    let seed = suite::number("FLASH_ATTENTION_TEST_SEED", 17);
    let problems = kernels().flat_map(|(kernel, dtype)| {
        let mut draws = Draws::new(seed);
        (0..RANDOM).map(move |index| (kernel, index, draws.case(kernel, dtype)))
    });
    let failures = suite::on_every_core(problems, |(kernel, index, case)| {
        let case = Case { name: format!("number {index}: {}", case.name), ..case };
        match case.check(&emulator(), kernel) {
            Ok(Some(_)) => None,
            Ok(None) => Some(format!("{}: {} refused", kernel.name, case.name)),
            Err(what) => Some(what),
        }
    });
    let failures: Vec<_> = failures.into_iter().flatten().collect();
    assert!(failures.is_empty(), "seed {seed}:\n{}", failures.join("\n"));
}

/// As above, every kernel, type and head dim of a GPU, as many problems as
/// `FLASH_ATTENTION_TEST_PROBLEMS` says.
#[test]
fn random_combinations_are_right_on_a_gpu() {
    suite::on_a_gpu(|gpu| {
        let count = suite::number("FLASH_ATTENTION_TEST_PROBLEMS", 60) as usize;
        let target = Target::of(&**gpu);
        let all: Vec<_> =
            suite::kernels().filter(|(kernel, _)| kernel.runs_on(&target).is_ok()).collect();
        let mut draws = Draws::new(suite::number("FLASH_ATTENTION_TEST_SEED", 1));
        let mut failures = Vec::new();
        for index in 0..count {
            let (kernel, dtype) = all[index % all.len()];
            let case = draws.case(kernel, dtype);
            let case = Case { name: format!("number {index}: {}", case.name), ..case };
            match case.check(gpu, kernel) {
                Ok(Some(_)) => {}
                Ok(None) => failures.push(format!("{}: {} refused", kernel.name, case.name)),
                Err(what) => failures.push(what),
            }
        }
        assert!(failures.is_empty(), "{} of {count}:\n{}", failures.len(), failures.join("\n"));
    });
}

/// Runs a kernel on draw 0 of a problem.
fn outputs(kernel: &'static KernelSpec, problem: Problem) -> Outputs {
    Case::new("", problem).run(&emulator(), kernel).unwrap()
}

/// A window that hides nothing is none: the same launch, the same bits.
#[test]
fn a_window_of_the_whole_length_changes_no_bit() {
    for (kernel, dtype) in kernels() {
        for (seq_q, seq_k) in [(9, 70), (70, 9), (33, 33)] {
            let plain = Problem::builder(1, 2, seq_q, kernel.limits.head_dims[0]).seq_k(seq_k);
            let plain = plain.dtype(dtype);
            let window = |left, right| plain.window(Window { left, right });
            let (last_k, last_q) = (seq_k as u32 - 1, seq_q as u32 - 1);
            let whole = [
                window(Some(last_k), Some(last_q)),
                window(Some(u32::MAX), None),
                window(None, Some(u32::MAX)),
            ];
            let expected = outputs(kernel, plain.build().unwrap());
            for window in whole {
                let given = outputs(kernel, window.build().unwrap());
                assert_eq!((given.o, given.lse), (expected.o.clone(), expected.lse.clone()));
            }
            let causal = outputs(kernel, plain.causal(true).build().unwrap());
            for left in [last_k, u32::MAX] {
                let window = Window { left: Some(left), right: Some(u32::MAX) };
                let given = plain.causal(true).window(window).build().unwrap();
                let given = outputs(kernel, given);
                assert_eq!((given.o, given.lse), (causal.o.clone(), causal.lse.clone()));
            }
        }
    }
}

/// Windows larger than either length, of one key, and of rows at no key's position.
#[test]
fn windows_of_every_size_are_right() {
    for (kernel, dtype) in kernels() {
        for (seq_q, seq_k) in [(40, 7), (7, 40), (1, 40)] {
            for (left, right) in [
                (Some(0), Some(0)),
                (Some(u32::MAX), Some(2)),
                (Some(2), Some(u32::MAX)),
                (Some(u32::MAX - 1), Some(u32::MAX)),
                (None, Some(1)),
                (Some(1), None),
            ] {
                let p = Problem::builder(1, 1, seq_q, kernel.limits.head_dims[0]).seq_k(seq_k);
                let p = p.dtype(dtype).window(Window { left, right }).build().unwrap();
                let case = Case::new(&format!("{left:?} {right:?} {seq_q} {seq_k}"), p);
                assert!(case.check(&emulator(), kernel).unwrap().is_some());
            }
        }
    }
}

/// Rows before the first key see nothing: O = 0 and LSE = -inf; with sinks, LSE is the sink.
#[test]
fn rows_of_a_window_that_see_nothing_are_zero() {
    for (kernel, dtype) in kernels() {
        let d = kernel.limits.head_dims[0];
        let window = Window { left: Some(3), right: Some(1) };
        let p = Problem::builder(1, 2, 70, d).seq_k(5).dtype(dtype).window(window);
        for sinks in [false, true] {
            let p = p.sinks(sinks).build().unwrap();
            let case = Case::new("", p);
            let draw = case.draw(0);
            let given = case.run(&emulator(), kernel).unwrap();
            let (o, lse) = (given.o.to_f64(), given.lse.to_f64());
            for h in 0..2 {
                let sink = draw.inputs().sinks.map_or(f64::NEG_INFINITY, |sinks| sinks.get(h));
                // Row 63 is at key -2, and sees up to key -1.
                for i in 0..64 {
                    let row = h * 70 + i;
                    assert_eq!(lse[row], sink, "{} row {row}", kernel.name);
                    assert!(o[row * d..][..d].iter().all(|&x| x == 0.0), "{}", kernel.name);
                }
                assert_ne!(lse[h * 70 + 64], sink, "{}", kernel.name);
            }
        }
    }
}

/// One query, 64 keys, every score below -5e4: no sentinel may stand in for a score.
#[test]
fn scores_below_every_sentinel_are_scores() {
    for (kernel, dtype) in kernels() {
        // `naive` in f16 keeps scores in f16.
        let dtype = if kernel.name == "naive" { DType::F32 } else { dtype };
        let d = kernel.limits.head_dims[0];
        let p = Problem::builder(1, 1, 1, d).seq_k(64).dtype(dtype).scale(Some(1.0));
        for causal in [false, true] {
            let p = p.causal(causal).build().unwrap();
            let full = |shape: [usize; 4], value: &dyn Fn(usize) -> f64| {
                let values: Vec<f64> = (0..shape.iter().product()).map(value).collect();
                Tensor::from_f64(dtype, &shape, &values).unwrap()
            };
            let q = full(p.q_shape(), &|_| 64.0);
            // One key in eight is ahead of the others by 64 in one element.
            let k = full(p.k_shape(), &|x| {
                let first = x % d == 0 && x / d % 8 == 3;
                if first { -27.0 } else { -28.0 }
            });
            let v = Tensor::random(dtype, &p.k_shape(), 3, 1.0);
            let inputs = Inputs::new(&q, &k, &v);
            let reference = oracle::reference(&p, &inputs, &[0]);
            assert!(reference.lse[0] < -5e4, "{}", reference.lse[0]);
            let session = Session::new(emulator());
            let outputs = session.run(kernel, &p, &inputs).unwrap().0;
            let result = verify(&p, &inputs, &outputs, &[0]);
            assert!(result.passes(), "{}: {result}", kernel.name);
        }
    }
}

/// A row whose only visible key a bias of -inf hides sees nothing.
#[test]
fn rows_that_a_bias_hides_are_zero() {
    for (kernel, dtype) in kernels() {
        let d = kernel.limits.head_dims[0];
        let window = Window { left: Some(0), right: Some(0) };
        let p = Problem::builder(1, 1, 3, d).seq_k(3).dtype(dtype).window(window);
        let p = p.bias(Some(Bias::default())).build().unwrap();
        let [q, k, v] = [1, 2, 3].map(|seed| Tensor::random(dtype, &p.q_shape(), seed, 0.0));
        let bias = [0.0, 0.0, 0.0, 0.0, f64::NEG_INFINITY, 0.0, 0.0, 0.0, 0.0];
        let bias = Tensor::from_f64(dtype, &[1, 1, 3, 3], &bias).unwrap();
        let inputs = Inputs { bias: Some(&bias), ..Inputs::new(&q, &k, &v) };
        let outputs = Session::new(emulator()).run(kernel, &p, &inputs).unwrap().0;
        let (o, lse) = (outputs.o.to_f64(), outputs.lse.to_f64());
        assert!(o[d..2 * d].iter().all(|&x| x == 0.0), "{}: {:?}", kernel.name, &o[d..2 * d]);
        assert_eq!(lse[1], f64::NEG_INFINITY, "{}", kernel.name);
        assert!(lse[0].is_finite() && lse[2].is_finite(), "{}", kernel.name);
    }
}

/// A cap is applied to scores, not to what hides keys: `cap * tanh(-inf / cap)` is `-cap`, a weight.
#[test]
fn hidden_keys_stay_hidden_under_a_cap() {
    for (kernel, dtype) in kernels() {
        let d = kernel.limits.head_dims[0];
        let p = Problem::builder(2, 1, 5, d).seq_k(9).dtype(dtype).causal(true).mask(true);
        let p = p.bias(Some(Bias::default())).softcap(Some(1.0)).build().unwrap();
        // Only key 3 is in no way hidden; its value is 1, the others' are far away.
        let v: Vec<f64> =
            (0..p.k_elements()).map(|x| if x / d % 9 == 3 { 1.0 } else { 1e3 }).collect();
        let v = Tensor::from_f64(dtype, &p.k_shape(), &v).unwrap();
        let bias = |x: usize| if x % 9 == 1 { f64::NEG_INFINITY } else { 0.25 };
        let bias: Vec<f64> = (0..5 * 9).map(bias).collect();
        let bias = Tensor::from_f64(dtype, &[1, 1, 5, 9], &bias).unwrap();
        let mask: Vec<u8> =
            (0..18).map(|j| u8::from(j % 9 == 1 || j % 9 == 3 || j % 9 == 8)).collect();
        let q = Tensor::random(dtype, &p.q_shape(), 1, 0.0);
        let k = Tensor::random(dtype, &p.k_shape(), 2, 0.0);
        let inputs = Inputs { mask: Some(&mask), bias: Some(&bias), ..Inputs::new(&q, &k, &v) };
        let outputs = Session::new(emulator()).run(kernel, &p, &inputs).unwrap().0;
        // The last row sees key 8 too.
        for (index, o) in outputs.o.to_f64().into_iter().enumerate() {
            assert_eq!(o == 1.0, index / d % 5 != 4, "{} {index}: {o}", kernel.name);
        }
    }
}

/// Q, K and V as one projection writes them, `[B, N, H + 2 Hkv, D]`: views into one tensor.
#[test]
fn views_of_an_interleaved_projection_are_right() {
    for (kernel, dtype) in kernels() {
        let d = kernel.limits.head_dims[0];
        let (batch, heads, kv_heads, seq) = (2, 4, 2, 19);
        let window = Window { left: Some(6), right: None };
        let p = Problem::builder(batch, heads, seq, d).kv_heads(kv_heads).dtype(dtype);
        let p = p.causal(true).window(window).layout(Layout::TokensFirst).build().unwrap();
        let all = heads + 2 * kv_heads;
        let packed = Tensor::random(dtype, &[batch, seq, all, d], 4, 0.0);
        let memory = Memory::new(emulator());
        let device = memory.device();
        let on_device = DeviceTensor::upload(&memory, &packed).unwrap();
        let o = DeviceTensor::filled(&memory, dtype, &p.q_shape(), 0xff).unwrap();
        let lse = DeviceTensor::filled(&memory, DType::F32, &p.lse_shape(), 0xff).unwrap();
        let plan = Plan::new(&p, &Target::of(&**device), kernel).unwrap();
        let workspace = memory.filled(plan.workspace_bytes(), 0).unwrap();
        let view = |first: usize| {
            let (region, skipped) = (on_device.region(), (first * d * dtype.size()) as u64);
            let region = Region::new(region.address + skipped, region.bytes - skipped);
            View::new(region, [seq * all * d, d, all * d].map(|stride| stride as u64))
        };
        let [q, k, v] = [0, heads, heads + kv_heads].map(view);
        let o_view = View::contiguous(o.region(), Layout::TokensFirst, heads, seq, d);
        let args = Args::new(q, k, v, o_view).lse(lse.region()).workspace(workspace.region());
        for launch in plan.launches_for(&**device, &args).unwrap() {
            // SAFETY: every tensor of the plan's arguments lives until the end of the loop.
            unsafe { device.launch(&launch).unwrap() };
        }
        device.synchronize().unwrap();
        let outputs =
            Outputs { o: o.to_host().unwrap(), lse: lse.to_host().unwrap(), weights: None };
        let values = packed.to_f64();
        let part = |first: usize, count: usize| {
            let heads = values.chunks(all * d).flat_map(|token| &token[first * d..][..count * d]);
            let part: Vec<f64> = heads.copied().collect();
            Tensor::from_f64(dtype, &[batch, seq, count, d], &part).unwrap()
        };
        let (q, k) = (part(0, heads), part(heads, kv_heads));
        let v = part(heads + kv_heads, kv_heads);
        let result = verify(&p, &Inputs::new(&q, &k, &v), &outputs, &oracle::all_rows(&p));
        assert!(result.passes(), "{}: {result}", kernel.name);
    }
}
