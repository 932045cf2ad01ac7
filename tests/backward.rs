//! The kernels of the backward pass against f64: edges, features alone and together, and inputs that
//! random draws miss.

mod suite;

use std::sync::Arc;

use flash_attention::{
    Alibi, Bias, CpuDevice, DType, Device, Dropout, Extras, Layout, Problem, Tensor, Varlen,
    Window,
    backend::{DeviceTensor, Memory, instruments::take_counters},
    oracle,
    problem::ProblemBuilder,
    raw::{Args, BackwardArgs, Plan, Region, View},
    registry::{self, BACKWARD_KERNELS, Backward, BackwardSpec, Sizes, Target},
    session::{Forward, Gradients, Inputs, Outputs, Session, Work},
    verify::verify_gradients,
};
use simt::emulator::{Alteration, Change, Options, Sites, SyncKind};
use suite::{Case, Draws, emulator};

/// O and LSE as a forward pass without errors of its own stores them.
fn outputs(p: &Problem, inputs: &Inputs<'_>) -> Outputs {
    let rows = oracle::reference(p, inputs, &oracle::all_rows(p));
    let [batch, second, third, columns] = p.o_shape();
    let o = match p.layout() {
        Layout::HeadsFirst => Tensor::from_f64(p.dtype(), &p.o_shape(), &rows.o).unwrap(),
        Layout::TokensFirst => {
            let by_heads = [batch, third, second, columns];
            Tensor::from_f64(p.dtype(), &by_heads, &rows.o).unwrap().swap_middle().unwrap()
        }
    };
    let lse = Tensor::from_f64(DType::F32, &p.lse_shape(), &rows.lse).unwrap();
    Outputs { o, lse, weights: None }
}

/// The gradients that a kernel's plan for `target` computes on a device.
fn run_as(
    (target, device): (&Target, &Arc<dyn Device>),
    kernel: &'static BackwardSpec,
    backward: Backward,
    inputs: &Inputs<'_>,
    d_o: &Tensor,
) -> Gradients {
    let outputs = outputs(&backward.problem, inputs);
    let session = Session::new(device.clone());
    let plan = kernel.plan(&backward, target).unwrap();
    let mut prepared = session.prepare_backward(plan, inputs, &outputs, d_o).unwrap();
    prepared.launch().unwrap();
    prepared.gradients().unwrap()
}

fn run_on(
    device: &Arc<dyn Device>,
    kernel: &'static BackwardSpec,
    backward: Backward,
    inputs: &Inputs<'_>,
    d_o: &Tensor,
) -> Gradients {
    run_as((&Target::of(&**device), device), kernel, backward, inputs, d_o)
}

fn run(
    kernel: &'static BackwardSpec,
    backward: Backward,
    inputs: &Inputs<'_>,
    d_o: &Tensor,
) -> Gradients {
    run_on(&emulator(), kernel, backward, inputs, d_o)
}

/// What is wrong with a kernel's gradients of a problem.
fn faults(
    label: &str,
    kernel: &'static BackwardSpec,
    p: &Problem,
    inputs: &Inputs<'_>,
    d_o: &Tensor,
) -> Option<String> {
    faults_on(&emulator(), label, kernel, p, inputs, d_o)
}

fn faults_on(
    device: &Arc<dyn Device>,
    label: &str,
    kernel: &'static BackwardSpec,
    p: &Problem,
    inputs: &Inputs<'_>,
    d_o: &Tensor,
) -> Option<String> {
    faults_as((&Target::of(&**device), device), label, kernel, p, inputs, d_o)
}

fn faults_as(
    place: (&Target, &Arc<dyn Device>),
    label: &str,
    kernel: &'static BackwardSpec,
    p: &Problem,
    inputs: &Inputs<'_>,
    d_o: &Tensor,
) -> Option<String> {
    let backward = Backward::new(*p).d_bias(p.bias().is_some()).d_sinks(p.has_sinks());
    let gradients = run_as(place, kernel, backward, inputs, d_o);
    let result = verify_gradients(p, inputs, d_o, &gradients, &oracle::all_heads(p));
    (!result.passes()).then(|| format!("{} {} {label}: {result}", kernel.name, p.dtype()))
}

/// What is wrong with a kernel's gradients of draw 0 of a case.
fn faults_of(
    device: &Arc<dyn Device>,
    kernel: &'static BackwardSpec,
    case: &Case,
) -> Option<String> {
    let (p, draw) = (&case.problem, case.draw(0));
    faults_on(device, &case.name, kernel, p, &draw.inputs(), &d_o(p))
}

fn d_o(p: &Problem) -> Tensor {
    Tensor::random(p.dtype(), &p.o_shape(), 7, 0.0)
}

fn check_all(failures: Vec<String>) {
    assert!(failures.is_empty(), "{} fail:\n{}", failures.len(), failures.join("\n"));
}

/// Every kernel with every storage type that it has.
fn kernels() -> impl Iterator<Item = (&'static BackwardSpec, DType)> {
    BACKWARD_KERNELS.iter().flat_map(|k| k.dtypes.iter().map(move |&dtype| (k, dtype)))
}

/// Head dims of Q and K and of V for which a kernel has different code: tiles of fewer rows or keys, and in the
/// last rung fewer columns of values, too.
fn head_dims_apart(kernel: &BackwardSpec) -> Vec<(usize, usize)> {
    let first = kernel.limits.head_dims[0];
    let others: &[_] = match kernel.name {
        "backward_mma" => &[(96, 96), (128, 128), (192, 192)],
        "backward_hopper" => &[(192, 192), (192, 128)],
        _ => &[],
    };
    [&[(first, first)], others].concat()
}

/// Lengths beside a kernel's tiles, and every feature alone, of a head dim and one of the values.
fn edges(kernel: &BackwardSpec, dtype: DType, (d, d_v): (usize, usize)) -> Vec<Case> {
    let Sizes { rows, keys } = (kernel.limits.sizes)(dtype, d);
    let (br, bc) = (rows[0] as usize, keys[0] as usize);
    let shape = |batch, heads, seq_q, seq_k| {
        Problem::builder(batch, heads, seq_q, d).head_dim_v(d_v).seq_k(seq_k).dtype(dtype)
    };
    let dropout = Some(Dropout { p: 0.2, seed: 0x1234_5678_9abc });
    let window = |left, right| Window { left: Some(left), right };
    let per_head = Some(Bias { per_batch: false, per_head: true });
    let everything = |p: ProblemBuilder| {
        p.kv_heads(2)
            .causal(true)
            .window(window(bc as u32 - 2, None))
            .mask(true)
            .dropout(dropout)
            .softcap(Some(3.0))
            .alibi(Some(Alibi::PerHead))
            .bias(Some(Bias { per_batch: true, per_head: false }))
            .sinks(true)
            .layout(Layout::TokensFirst)
    };
    let problems = [
        ("one row, one key", shape(1, 1, 1, 1)),
        ("one row, many keys", shape(1, 2, 1, 2 * bc + 5)),
        ("many rows, one key", shape(1, 1, 2 * br + 5, 1)),
        ("whole tiles", shape(1, 1, 2 * br, 2 * bc)),
        ("one less than tiles", shape(2, 1, br - 1, bc - 1)),
        ("one more than tiles", shape(1, 2, br + 1, bc + 1)),
        ("causal, square", shape(1, 1, br + bc + 3, br + bc + 3).causal(true)),
        ("causal, more keys", shape(1, 1, br - 1, 2 * bc + 1).causal(true)),
        ("causal, hidden rows", shape(1, 1, bc + br + 1, bc - 1).causal(true)),
        ("padding, a hidden batch entry", shape(2, 1, br + 1, bc + 7).mask(true)),
        ("dropout", shape(2, 2, br + 1, bc + 3).dropout(dropout)),
        ("a scale of 0.3", shape(1, 1, br, bc + 1).scale(Some(0.3))),
        ("two heads share K and V", shape(2, 4, br + 1, bc + 1).kv_heads(2)),
        ("all heads share K and V", shape(1, 3, 2, bc + 1).kv_heads(1).causal(true)),
        ("a sliding window", shape(1, 1, bc + 5, bc + 5).causal(true).window(window(7, None))),
        ("a window", shape(1, 1, br + 1, 2 * bc + 1).window(window(bc as u32 / 2, Some(3)))),
        ("a window without keys", shape(1, 1, bc + 9, bc - 1).window(window(0, Some(1)))),
        ("a cap", shape(1, 1, br + 1, bc + 1).softcap(Some(2.0))),
        ("ALiBi", shape(2, 2, 3, bc + 1).alibi(Some(Alibi::PerBatchAndHead))),
        ("a bias", shape(2, 2, 3, bc + 1).bias(per_head)),
        ("sinks", shape(1, 2, br + 1, bc + 1).sinks(true)),
        ("everything", everything(shape(2, 4, 5, bc + 3))),
        ("[B, N, H, D]", shape(2, 3, br + 1, bc + 1).layout(Layout::TokensFirst).causal(true)),
    ];
    let mut cases: Vec<_> =
        problems.into_iter().map(|(name, p)| Case::new(name, p.build().unwrap())).collect();
    let others = kernel.limits.head_dims.iter().filter(|&&other| other != d);
    for &other in others.filter(|_| d == kernel.limits.head_dims[0]) {
        let Sizes { rows, keys } = (kernel.limits.sizes)(dtype, other);
        let p = Problem::builder(1, 1, rows[0] as usize + 1, other);
        let p = p.seq_k(keys[0] as usize + 1).dtype(dtype).causal(true);
        cases.push(Case::new("another head dim", p.build().unwrap()));
    }
    let narrower = [(d - 8, d_v - 8), (d + 8, 16), (24, d + 24), (d, d.div_ceil(24) * 16)];
    for (other, of_values) in narrower {
        let p = Problem::builder(2, 2, 5, other).head_dim_v(of_values);
        let p = p.seq_k(bc + 1).dtype(dtype);
        let name = format!("head dim {other} and {of_values} of the values");
        cases.push(Case::new(&name, p.build().unwrap()));
    }
    // Several tiles, none or one of rows or keys between others.
    let lengths = [[0, 9], [br + 3, bc + 5], [3, 0], [0, 0], [1, 33], [br, bc], [0, 1]];
    let packed = |name, change: fn(ProblemBuilder) -> ProblemBuilder| {
        Case::packed(name, &lengths, (4, d), |p| change(p.head_dim_v(d_v).dtype(dtype)))
    };
    cases.push(packed("packed sequences", |p| p));
    cases.push(packed("packed sequences, causal", |p| p.causal(true).kv_heads(2)));
    cases.push(packed("packed sequences, shaped", |p| {
        let window = Window { left: Some(20), right: Some(3) };
        p.kv_heads(1).window(window).softcap(Some(4.0)).alibi(Some(Alibi::PerHead)).sinks(true)
    }));
    cases
}

#[test]
fn edges_and_features_are_right() {
    let failures = suite::on_every_core(kernels(), |(kernel, dtype)| {
        let edges = head_dims_apart(kernel).into_iter().flat_map(|d| edges(kernel, dtype, d));
        let cases = suite::thinned(dtype, edges.collect());
        cases.iter().filter_map(|case| faults_of(&emulator(), kernel, case)).collect::<Vec<_>>()
    });
    check_all(failures.concat());
}

/// As above and random problems, every kernel, type and head dim of a GPU.
#[test]
fn edges_and_features_are_right_on_a_gpu() {
    suite::on_a_gpu(|gpu| {
        let target = Target::of(&**gpu);
        let mut cases = Vec::new();
        for (kernel, dtype) in kernels().filter(|(kernel, _)| kernel.runs_on(&target).is_ok()) {
            for d in head_dims_apart(kernel) {
                cases.extend(edges(kernel, dtype, d).into_iter().map(|case| (kernel, case)));
            }
            let mut draws = Draws::new(seed());
            for &head_dim in kernel.limits.head_dims {
                let p = draws.problem(head_dim, dtype);
                cases.push((kernel, Case::new(&format!("{p:?}"), p)));
            }
        }
        // The driver compiles an entry for each combination of constants, for a second or more.
        let cases = suite::of_this_process(cases);
        let faults = suite::on_every_core(cases, |(kernel, case)| faults_of(gpu, kernel, &case));
        check_all(faults.into_iter().flatten().collect());
    });
}

/// A GPU whose blocks have less shared memory than the emulator's gives backward_mma other tiles.
#[test]
fn tiles_for_less_shared_memory_are_right() {
    const D: usize = 64;
    let kernel = registry::find_backward("backward_mma").unwrap();
    let device = emulator();
    let whole = Target::of(&*device);
    let mut less = whole;
    less.max_shared_bytes = 99 << 10;
    let is_tall = |target: &Target| {
        let p = Problem::builder(1, 1, 1, D).dtype(DType::F16).build().unwrap();
        let plan = kernel.plan(&Backward::new(p), target).unwrap();
        plan.entries().any(|step| step.entry.symbol.ends_with("_tall"))
    };
    assert!(is_tall(&whole) && !is_tall(&less));
    // Entries for more columns have no other tiles.
    let fits = |case: &Case| case.problem.head_dim().max(case.problem.head_dim_v()) <= D;
    let cases = edges(kernel, DType::F16, (D, D)).into_iter().filter(fits).collect();
    let cases = suite::thinned(DType::F16, cases);
    check_all(
        suite::on_every_core(cases, |case| {
            let (p, draw) = (&case.problem, case.draw(0));
            faults_as((&less, &device), &case.name, kernel, p, &draw.inputs(), &d_o(p))
        })
        .into_iter()
        .flatten()
        .collect(),
    );
}

/// The seed of random problems.
fn seed() -> u64 {
    suite::number("FLASH_ATTENTION_TEST_SEED", 23)
}

/// NaN in rows beyond the last packed sequence is never read, and gradients are 0 there.
#[test]
fn rows_beyond_the_last_sequence_have_no_gradient() {
    const BEYOND: usize = 150;
    for (kernel, dtype) in kernels() {
        let d = kernel.limits.head_dims[0];
        let Case { problem, cu_seqlens, .. } =
            Case::packed("", &[[3, 9], [5, 2]], (2, d), |p| p.dtype(dtype).kv_heads(1));
        let [cu_q, cu_k] = cu_seqlens.unwrap();
        let of = problem.varlen().unwrap();
        let more = Varlen { total_q: of.total_q + BEYOND, total_k: of.total_k + BEYOND };
        let p = problem.to_builder().varlen(Some(more)).build().unwrap();
        let random = |shape, seed| suite::with_nan_beyond(dtype, shape, BEYOND, seed);
        let (q, d_o) = (random(p.q_shape(), 1), random(p.o_shape(), 2));
        let (k, v) = (random(p.k_shape(), 3), random(p.v_shape(), 4));
        let inputs = Inputs {
            cu_seqlens_q: Some(&cu_q),
            cu_seqlens_k: Some(&cu_k),
            ..Inputs::new(&q, &k, &v)
        };
        let found = run(kernel, Backward::new(p), &inputs, &d_o);
        let result = verify_gradients(&p, &inputs, &d_o, &found, &oracle::all_heads(&p));
        assert!(result.passes(), "{}: {result}", kernel.name);
        for (name, tensor) in [("dq", &found.dq), ("dk", &found.dk), ("dv", &found.dv)] {
            let row = tensor.shape()[2] * tensor.shape()[3];
            let values = tensor.to_f64();
            let beyond = &values[values.len() - BEYOND * row..];
            assert!(beyond.iter().all(|&x| x == 0.0), "{} {name}", kernel.name);
        }
    }
}

/// One key for each row, as the next test has it on a GPU.
#[test]
fn one_key_gives_its_gradients() {
    for kernel in BACKWARD_KERNELS {
        one_key_is_right(&emulator(), kernel, 3);
    }
}

/// More heads than a grid's `y` counts, and sums of dQ beyond 2^31 elements where a GPU has the memory.
#[test]
fn many_heads_have_their_gradients_on_a_gpu() {
    suite::on_a_gpu(|gpu| {
        let target = Target::of(&**gpu);
        let kernels = BACKWARD_KERNELS.iter().filter(|kernel| kernel.runs_on(&target).is_ok());
        for kernel in suite::of_this_process(kernels.collect()) {
            one_key_is_right(gpu, kernel, 8300);
        }
    });
}

/// Checks the gradients of rows that see one key, of all of `batch` times 16 heads.
fn one_key_is_right(device: &Arc<dyn Device>, kernel: &'static BackwardSpec, batch: usize) {
    // Where a head lies does not depend on the type.
    let dtype = kernel.dtypes[0];
    let p = Problem::builder(batch, 16, 1, 128).dtype(dtype).build().unwrap();
    let [q, k, v] = [1, 2, 3].map(|seed| Tensor::random(dtype, &p.q_shape(), seed, 0.0));
    let (inputs, d_o) = (Inputs::new(&q, &k, &v), d_o(&p));
    let outputs = Outputs { o: v.clone(), lse: one_key_lse(&p, &q, &k), weights: None };
    let session = Session::new(device.clone());
    let found = session.run_backward(kernel, &Backward::new(p), &inputs, &outputs, &d_o);
    let found = found.unwrap().0;
    // One key has all the weight: dV is dO, to a rounding to the storage type and what the weight
    // `exp(score - LSE)` has of its score's error: of a sum of D products in f32, in any order.
    let per_size = f64::from(p.scale()) * (p.head_dim() + 4) as f64 * DType::F32.unit_roundoff();
    let sizes = score_sizes(&p, &q, &k);
    let (dv, d_o_values) = (found.dv.to_f64(), d_o.to_f64());
    for (index, (dv, d_o)) in dv.into_iter().zip(d_o_values).enumerate() {
        let epsilon = dtype.unit_roundoff() + per_size * sizes[index / p.head_dim()];
        let within = (dv - d_o).abs() <= epsilon * d_o.abs();
        assert!(within, "{} {index}: {dv} for {d_o}", kernel.name);
    }
    let last = batch * 16 - 1;
    let heads: Vec<_> =
        [0, 65_535, 65_536].into_iter().filter(|&head| head < last).chain([last]).collect();
    let result = verify_gradients(&p, &inputs, &d_o, &found, &heads);
    assert!(result.passes(), "{} {dtype}: {result}", kernel.name);
}

/// The LSE of rows that see one key: its score.
fn one_key_lse(p: &Problem, q: &Tensor, k: &Tensor) -> Tensor {
    let lse = row_sums(p, q, k, |q, k| q * k);
    let lse: Vec<f64> = lse.into_iter().map(|sum| f64::from(p.scale()) * sum).collect();
    Tensor::from_f64(DType::F32, &p.lse_shape(), &lse).unwrap()
}

/// The sum of the products' sizes in the scores of rows that see one key: what bounds their rounding errors.
fn score_sizes(p: &Problem, q: &Tensor, k: &Tensor) -> Vec<f64> {
    row_sums(p, q, k, |q, k| (q * k).abs())
}

/// For each row, the sum of `term` over the columns of its query and its key.
fn row_sums(p: &Problem, q: &Tensor, k: &Tensor, term: fn(f64, f64) -> f64) -> Vec<f64> {
    let (q, k) = (q.to_f64(), k.to_f64());
    let rows = q.chunks_exact(p.head_dim()).zip(k.chunks_exact(p.head_dim()));
    rows.map(|(q, k)| q.iter().zip(k).map(|(&q, &k)| term(q, k)).sum()).collect()
}

impl Draws {
    fn problem(&mut self, head_dim: usize, dtype: DType) -> Problem {
        let (kv_heads, group) = (1 + self.below(2), self.of(&[1, 1, 2, 3]));
        let (seq_q, seq_k) = (1 + self.below(40), 1 + self.below(90));
        let bounds = [0, 1, 3, 17, 64, seq_k as u32, u32::MAX];
        let mut bound = || self.yes().then(|| self.of(&bounds));
        let window = Window { left: bound(), right: bound() };
        let alibi = [None, Some(Alibi::PerHead), Some(Alibi::PerBatchAndHead)];
        let bias = Bias { per_batch: self.yes(), per_head: self.yes() };
        Problem::builder(1 + self.below(2), kv_heads * group, seq_q, head_dim)
            .kv_heads(kv_heads)
            .seq_k(seq_k)
            .dtype(dtype)
            .causal(self.below(3) == 0)
            .window(window)
            .mask(self.below(3) == 0)
            .dropout((self.below(3) == 0).then_some(Dropout { p: 0.25, seed: 5 }))
            .softcap(self.yes().then(|| self.of(&[0.5, 3.0, 50.0])))
            .alibi(self.of(&alibi))
            .bias((self.below(3) == 0).then_some(bias))
            .sinks(self.yes())
            .layout(self.of(&[Layout::HeadsFirst, Layout::TokensFirst]))
            .build()
            .unwrap()
    }
}

#[test]
fn random_combinations_are_right() {
    let failures = suite::on_every_core(kernels(), |(kernel, dtype)| {
        let (mut draws, head_dims) = (Draws::new(seed()), kernel.limits.head_dims);
        let fault = |index: usize| {
            let p = draws.problem(head_dims[index % head_dims.len()], dtype);
            faults_of(&emulator(), kernel, &Case::new(&format!("{p:?}"), p))
        };
        suite::thinned(dtype, (0..12).collect()).into_iter().filter_map(fault).collect::<Vec<_>>()
    });
    check_all(failures.concat());
}

/// A tensor of normal numbers times `size`, but for the first of each row.
fn with_first(dtype: DType, shape: [usize; 4], seed: u64, size: f64, first: f64) -> Tensor {
    let mut values = Tensor::random(DType::F32, &shape, seed, 0.0).scaled(size).to_f64();
    values.iter_mut().step_by(shape[3]).for_each(|x| *x = first);
    Tensor::from_f64(dtype, &shape, &values).unwrap()
}

/// Checks every kernel on `n` rows and keys whose scores are all about -120: the LSE is far below the
/// score 0 of rows that only fill a tile, and `exp(0 - LSE)` is infinite.
fn scores_far_below_zero(lengths: &[(usize, usize)]) {
    let failures = suite::on_every_core(kernels(), |(kernel, dtype)| {
        let d = kernel.limits.head_dims[1];
        let fault = |&(seq_q, seq_k): &(usize, usize)| {
            let p = Problem::builder(1, 1, seq_q, d).seq_k(seq_k).dtype(dtype).build().unwrap();
            let q = with_first(dtype, p.q_shape(), 1, 0.1, 1.0);
            let k = with_first(dtype, p.k_shape(), 2, 0.1, -120.0 * (d as f64).sqrt());
            let v = Tensor::random(dtype, &p.k_shape(), 3, 0.0);
            let inputs = Inputs::new(&q, &k, &v);
            let lse = oracle::reference(&p, &inputs, &[0]).lse[0];
            assert!(lse < -88.8, "{lse}");
            faults(&format!("{seq_q} {seq_k}"), kernel, &p, &inputs, &d_o(&p))
        };
        lengths.iter().filter_map(fault).collect::<Vec<_>>()
    });
    check_all(failures.concat());
}

#[test]
fn scores_far_below_zero_make_no_infinities() {
    scores_far_below_zero(&[(1, 128), (64, 64), (70, 50)]);
}

/// As above, for longer sequences.
#[test]
#[ignore = "takes minutes"]
fn scores_far_below_zero_make_no_infinities_in_long_sequences() {
    scores_far_below_zero(&[(192, 192), (704, 704), (1000, 1000)]);
}

/// dS of keys past the last overflows f16 where they are not hidden.
#[test]
fn large_inputs_of_few_keys_are_right() {
    let failures = suite::on_every_core(kernels(), |(kernel, dtype)| {
        let d = kernel.limits.head_dims[1];
        let fault = |n: usize| {
            let p = Problem::builder(1, 1, n, d).dtype(dtype).build().unwrap();
            let random = |seed, size| Tensor::random(dtype, &p.q_shape(), seed, 0.0).scaled(size);
            let (q, k, v) = (random(1, 5.0), random(2, 3.0), random(3, 3.0));
            let inputs = Inputs::new(&q, &k, &v);
            faults(&format!("{n}"), kernel, &p, &inputs, &d_o(&p))
        };
        [1, 2, 5, 17, 128].into_iter().filter_map(fault).collect::<Vec<_>>()
    });
    check_all(failures.concat());
}

/// Rows before the first key see nothing: no gradient comes from them, and none goes to them.
#[test]
fn rows_that_see_nothing_have_no_gradient() {
    for (kernel, dtype) in kernels() {
        let d = kernel.limits.head_dims[0];
        let p = Problem::builder(1, 2, 40, d).seq_k(7).dtype(dtype).causal(true).build().unwrap();
        let draw = Case::new("", p).draw(0);
        let d_o = d_o(&p);
        let found = run(kernel, Backward::new(p), &draw.inputs(), &d_o);
        let blind = |x: usize| x / d % 40 < 33;
        for (index, x) in found.dq.to_f64().into_iter().enumerate() {
            assert!(!blind(index) || x == 0.0, "{} {index}: {x}", kernel.name);
        }
        assert!(found.dq.to_f64().iter().any(|&x| x != 0.0));
        // What they are given does not matter.
        let other: Vec<f64> = d_o
            .to_f64()
            .into_iter()
            .enumerate()
            .map(|(index, x)| if blind(index) { 7.0 } else { x })
            .collect();
        let other = Tensor::from_f64(dtype, &p.q_shape(), &other).unwrap();
        let again = run(kernel, Backward::new(p), &draw.inputs(), &other);
        assert_eq!((again.dk, again.dv), (found.dk, found.dv), "{}", kernel.name);
    }
}

/// The same bits each time, in the mode that promises it.
#[test]
fn deterministic_gradients_repeat() {
    // The order of sums does not depend on the type.
    let kernels = kernels().filter(|&(_, dtype)| dtype != DType::BF16);
    suite::on_every_core(kernels, |(kernel, dtype)| {
        let d = kernel.limits.head_dims[0];
        for seq_k in [50, 150] {
            let p = Problem::builder(1, 4, 150, d).kv_heads(2).seq_k(seq_k).dtype(dtype);
            let p = p.causal(true).build().unwrap();
            let backward = Backward::new(p).deterministic(true);
            let draw = Case::new("", p).draw(0);
            let run = || run(kernel, backward, &draw.inputs(), &d_o(&p));
            let (first, second) = (run(), run());
            assert_eq!((first.dq, first.dk, first.dv), (second.dq, second.dk, second.dv));
        }
    });
}

/// The kernels whose blocks add to dQ in memory, and problems where several of them add to a row.
fn several_key_tiles() -> impl Iterator<Item = (&'static BackwardSpec, Case)> {
    let dtype = DType::F16;
    let sums = |k: &&BackwardSpec| ["backward_mma", "backward_hopper"].contains(&k.name);
    BACKWARD_KERNELS.iter().filter(sums).flat_map(move |kernel| {
        let d = kernel.limits.head_dims[0];
        let keys = |d| (kernel.limits.sizes)(dtype, d).keys[0] as usize;
        let bc = keys(d);
        let shape =
            |heads, seq_q, seq_k| Problem::builder(1, heads, seq_q, d).seq_k(seq_k).dtype(dtype);
        let window = |left, right| Window { left: Some(left), right: Some(right) };
        let other = |d| Problem::builder(1, 1, 70, d).seq_k(3 * keys(d) + 1).dtype(dtype);
        let cases = [
            ("full", shape(1, 70, 3 * bc + 5)),
            ("causal", shape(1, 3 * bc + 1, 3 * bc + 1).causal(true)),
            ("a window", shape(1, 2 * bc, 4 * bc - 3).window(window(bc as u32 + 9, 40))),
            ("shared keys", shape(2, 70, 3 * bc + 1).kv_heads(1).causal(true)),
            ("head dim 192", other(192)),
            ("head dim 192, values of 128", other(192).head_dim_v(128)),
            ("head dim 256, causal", other(256).causal(true)),
        ];
        let cases = cases.map(|(name, p)| Case::new(name, p.build().unwrap()));
        let lengths = [[0, 9], [70, 3 * bc + 5], [3, 0], [5, 2 * bc + 1]];
        let packed = Case::packed("packed sequences", &lengths, (2, d), |p| {
            p.dtype(dtype).causal(true).kv_heads(1)
        });
        cases.into_iter().chain([packed]).map(move |case| (kernel, case))
    })
}

/// Q, K and V of a case whose dQ tells one order of its sums from another. Gradients of a row's scores
/// add up to 0. So with the same number in every key, which Q does not see, the sum of a column is far smaller
/// than its parts, and their roundings are not lost in that of the result.
fn ill_conditioned(case: &Case) -> [Tensor; 3] {
    let p = &case.problem;
    let q = with_first(p.dtype(), p.q_shape(), 1, 1.0, 0.0);
    let k = with_first(p.dtype(), p.k_shape(), 2, 1.0, 1000.0);
    [q, k, Tensor::random(p.dtype(), &p.v_shape(), 3, 0.0)]
}

/// Gradients in the mode that promises the same bits, on an emulator with such options.
fn in_order(
    kernel: &'static BackwardSpec,
    p: &Problem,
    inputs: &Inputs<'_>,
    options: Options,
) -> Result<Gradients, flash_attention::Error> {
    let cpu = Arc::new(CpuDevice::new());
    cpu.set_options(options);
    let session = Session::new(cpu as Arc<dyn Device>);
    let backward = Backward::new(*p).deterministic(true);
    let run = session.run_backward(kernel, &backward, inputs, &outputs(p, inputs), &d_o(p));
    Ok(run?.0)
}

/// Whichever block comes first, and however long one takes, the sums have one order.
#[test]
fn sums_in_order_have_the_same_bits_under_every_seed() {
    let failures = suite::on_every_core(several_key_tiles(), |(kernel, case)| {
        let (p, draw, [q, k, v]) = (&case.problem, case.draw(0), ill_conditioned(&case));
        let found = in_order(kernel, p, &draw.inputs(), Options::seeded(5)).unwrap();
        let heads = oracle::all_heads(p);
        let result = verify_gradients(p, &draw.inputs(), &d_o(p), &found, &heads);
        let label = format!("{} {}", kernel.name, case.name);
        let mut failures = Vec::new();
        if !result.passes() {
            failures.push(format!("{label}: {result}"));
        }
        let inputs = Inputs { q: &q, k: &k, v: &v, ..draw.inputs() };
        let first = in_order(kernel, p, &inputs, Options::default()).unwrap();
        for seed in 1..4 {
            let other = in_order(kernel, p, &inputs, Options::seeded(seed)).unwrap();
            if (&other.dq, &other.dk, &other.dv) != (&first.dq, &first.dk, &first.dv) {
                failures.push(format!("{label}: other bits under seed {seed}"));
            }
        }
        failures
    });
    check_all(failures.concat());
}

/// A block that does not wait for its turn changes bits, and a turn that none passes on ends in a report.
#[test]
fn turns_are_needed() {
    let full = several_key_tiles().filter(|(_, case)| case.name == "full");
    suite::on_every_core(full, |(kernel, case)| {
        let (p, draw, [q, k, v]) = (&case.problem, case.draw(0), ill_conditioned(&case));
        let inputs = Inputs { q: &q, k: &k, v: &v, ..draw.inputs() };
        let sites = Arc::new(Sites::default());
        let watched = Options { sites: Some(sites.clone()), ..Options::default() };
        let expected = in_order(kernel, p, &inputs, watched).unwrap();
        let site = |kind| sites.list().into_iter().find(|site| site.kind == kind).unwrap();
        let run = |kind, seed| {
            let change = Some(Change { site: site(kind), alteration: Alteration::LeaveOut });
            in_order(kernel, p, &inputs, Options { change, ..Options::seeded(seed) })
        };
        let is_found = |seed| run(SyncKind::TurnWait, seed).unwrap().dq != expected.dq;
        assert!((1..20).any(is_found), "{}: turns that none awaits", kernel.name);
        for seed in [0, 1] {
            let fault = run(SyncKind::TurnPass, seed).unwrap_err().to_string();
            assert!(fault.contains("of the count at"), "{}: {fault}", kernel.name);
        }
    });
}

/// Leaves out one synchronisation after another of the consumers that share keys and of the step for their dQ: the
/// emulator reports a fault, or numbers change, in all cases but four.
#[test]
fn consumers_that_share_keys_need_their_barriers() {
    let kernel = registry::find_backward("backward_hopper").unwrap();
    // More tiles of rows, and of keys, than a ring has stages.
    let p = Problem::builder(1, 1, 300, 192).seq_k(300).dtype(DType::F16).build().unwrap();
    let draw = Case::new("", p).draw(0);
    let run = |options| in_order(kernel, &p, &draw.inputs(), options);
    let sites = Arc::new(Sites::default());
    let watched = Options { sites: Some(sites.clone()), ..Options::default() };
    let expected = run(watched).unwrap();
    let is_theirs = |file: &str| file.ends_with("wide.rs") || file.ends_with("queries.rs");
    let sites: Vec<_> = sites.list().into_iter().filter(|site| is_theirs(site.file)).collect();
    assert!(sites.len() > 16, "{sites:?}");
    let unnoticed = suite::on_every_core(sites, |site| {
        let passes = |seed| {
            let change = Some(Change { site, alteration: Alteration::LeaveOut });
            let found = run(Options { change, budget: 1 << 24, ..Options::seeded(seed) });
            found.is_ok_and(|found| {
                (&found.dq, &found.dk, &found.dv) == (&expected.dq, &expected.dk, &expected.dv)
            })
        };
        [0, 1, 3, 2].into_iter().all(passes).then_some(site)
    });
    let unnoticed: Vec<_> = unnoticed.into_iter().flatten().collect();
    // The emulator has registers for all. The warps of a consumer meet before a gradient passes through what they
    // have multiplied: the emulator computes the product of a whole warpgroup at once, where the warps of a GPU may
    // be apart. And dK waits for Q, which the other consumer has found there before it gave P.
    let kinds: Vec<_> = unnoticed.iter().map(|site| site.kind).collect();
    let expected =
        [SyncKind::RegistersIncrease, SyncKind::Barrier, SyncKind::Barrier, SyncKind::MbarrierWait];
    assert_eq!(kinds, expected, "{unnoticed:?}");
}

/// Many runs on a GPU, where blocks race, have the same bits.
#[test]
fn gradients_in_order_repeat_on_a_gpu() {
    let sums = |k: &&BackwardSpec| ["backward_mma", "backward_hopper"].contains(&k.name);
    suite::on_a_gpu(|gpu| {
        let (target, session) = (Target::of(&**gpu), Session::new(gpu.clone()));
        let repeats = suite::number("FLASH_ATTENTION_TEST_REPEATS", 100);
        for (d, d_v, causal) in [
            (64, 64, false),
            (64, 64, true),
            (128, 128, false),
            (128, 128, true),
            (192, 192, false),
            (192, 128, true),
            (256, 256, true),
        ] {
            let p = Problem::builder(2, 8, 1500, d).head_dim_v(d_v).kv_heads(4);
            let p = p.dtype(DType::F16).causal(causal).build().unwrap();
            let tensors = ill_conditioned(&Case::new("", p));
            let [q, k, v] = tensors.each_ref().map(|tensor| session.upload(tensor).unwrap());
            let d_o = session.upload(&d_o(&p)).unwrap();
            let kernel = registry::find("flash_pipelined").unwrap();
            let mut attention = session.attention(kernel, &p).unwrap();
            attention.run(&q, &k, &v, None).unwrap();
            let (o, lse) = (attention.o(), attention.lse());
            let forward = Forward { q: &q, k: &k, v: &v, extras: Extras::default(), o, lse };
            for kernel in
                BACKWARD_KERNELS.iter().filter(sums).filter(|k| k.runs_on(&target).is_ok())
            {
                let backward = Backward::new(p).deterministic(true);
                let mut backward = session.backward(kernel, &backward).unwrap();
                let mut run = || {
                    backward.run(forward, &d_o).unwrap();
                    let Gradients { dq, dk, dv, .. } = backward.gradients().unwrap();
                    (dq, dk, dv)
                };
                let first = run();
                for repeat in 0..repeats {
                    assert!(run() == first, "{} d {d} causal {causal}: {repeat}", kernel.name);
                }
            }
        }
    });
}

/// dO as a view: every second row of a longer tensor, heads innermost.
#[test]
fn a_strided_gradient_of_o_is_right() {
    for (kernel, dtype) in kernels() {
        let (heads, seq, d) = (2, 37, kernel.limits.head_dims[1]);
        let p = Problem::builder(1, heads, seq, d).dtype(dtype).causal(true).build().unwrap();
        let draw = Case::new("", p).draw(0);
        let inputs = draw.inputs();
        let long = Tensor::random(dtype, &[2 * seq, heads, d], 9, 0.0);
        let values = long.to_f64();
        let part: Vec<f64> = (0..heads * seq * d)
            .map(|x| values[(x / d % seq * 2 * heads + x / d / seq) * d + x % d])
            .collect();
        let d_o = Tensor::from_f64(dtype, &p.q_shape(), &part).unwrap();

        let memory = Memory::new(emulator());
        let device = memory.device();
        let outputs = outputs(&p, &inputs);
        let upload = |tensor: &Tensor| DeviceTensor::upload(&memory, tensor).unwrap();
        let [q, k, v] = [inputs.q, inputs.k, inputs.v].map(upload);
        let [o, lse, long] = [&outputs.o, &outputs.lse, &long].map(upload);
        let gradients =
            [(); 3].map(|()| DeviceTensor::filled(&memory, dtype, &p.q_shape(), 0xff).unwrap());
        let plan = Plan::new(&Backward::new(p), &Target::of(&**device), kernel).unwrap();
        let workspace = memory.filled(plan.workspace_bytes(), 0xff).unwrap();
        let view = |t: &DeviceTensor| View::contiguous(t.region(), p.layout(), heads, seq, d);
        let forward = Args::new(view(&q), view(&k), view(&v), view(&o)).lse(lse.region());
        let [rows, head] = [2 * heads * d, d].map(|stride| stride as u64);
        let d_o_view = View::new(long.region(), [0, head, rows]);
        let args = BackwardArgs::new(
            forward.workspace(workspace.region()),
            d_o_view,
            [&gradients[0], &gradients[1], &gradients[2]].map(view),
        );
        for launch in plan.launches_for(&**device, &args).unwrap() {
            // SAFETY: every tensor of the plan's arguments lives until the end of the loop.
            unsafe { device.launch(&launch).unwrap() };
        }
        let [dq, dk, dv] = gradients.map(|t| t.to_host().unwrap());
        let found = Gradients { dq, dk, dv, d_bias: None, d_sinks: None };
        let result = verify_gradients(&p, &inputs, &d_o, &found, &oracle::all_heads(&p));
        assert!(result.passes(), "{}: {result}", kernel.name);
    }
}

/// The forward pass's own O and LSE, on the device, and memory as predicted.
#[test]
fn gradients_follow_a_forward_pass_on_the_device() {
    let session = Session::new(emulator());
    for (kernel, dtype) in kernels() {
        let p = Problem::builder(2, 2, 45, 64).dtype(dtype).causal(true).build().unwrap();
        let draw = Case::new("", p).draw(0);
        let (inputs, d_o) = (draw.inputs(), d_o(&p));
        let upload = |tensor: &Tensor| session.upload(tensor).unwrap();
        let [q, k, v] = [inputs.q, inputs.k, inputs.v].map(upload);
        let d_o_on_device = upload(&d_o);
        let forward = registry::find("flash_tiled").unwrap();
        let mut attention = session.attention(forward, &p).unwrap();
        attention.run(&q, &k, &v, None).unwrap();
        let (o, lse) = (attention.o(), attention.lse());
        let forward = Forward { q: &q, k: &k, v: &v, extras: Extras::default(), o, lse };
        let mut backward = session.backward(kernel, &Backward::new(p)).unwrap();
        // Twice: nothing of the first run is left in the second.
        for _ in 0..2 {
            backward.run(forward, &d_o_on_device).unwrap();
            let found = backward.gradients().unwrap();
            let result = verify_gradients(&p, &inputs, &d_o, &found, &oracle::all_heads(&p));
            assert!(result.passes(), "{}: {result}", kernel.name);
        }
        let outputs = attention.outputs_without_weights().unwrap();
        let (_, memory) =
            session.run_backward(kernel, &Backward::new(p), &inputs, &outputs, &d_o).unwrap();
        assert_eq!(memory.peak, backward.plan().peak_bytes(), "{}", kernel.name);
        assert_eq!(memory.peak, memory.inputs + memory.outputs + memory.workspace);
    }
}

/// Beginnings of packed sequences, which a kernel would follow anywhere, are checked before they reach it.
#[test]
fn wrong_sequences_are_refused() {
    let session = Session::new(emulator());
    let p = Problem::packed(&[0, 3, 5], &[0, 4, 6], 1, 32).unwrap().build().unwrap();
    let upload = |shape: &[usize]| session.upload(&Tensor::zeros(DType::F32, shape)).unwrap();
    let (q, k, lse) = (upload(&p.q_shape()), upload(&p.k_shape()), upload(&p.lse_shape()));
    let kernel = &BACKWARD_KERNELS[0];
    let mut backward = session.backward(kernel, &Backward::new(p)).unwrap();
    let forward = |extras| Forward { q: &q, k: &k, v: &k, extras, o: &q, lse: &lse };
    let message = backward.run(forward(Extras::default()), &q).unwrap_err().to_string();
    assert!(message.contains("cu_seqlens_q is missing"), "{message}");
    let [at_q, at_k] =
        [[0u32, 300, 500], [0, 4, 6]].map(|at| session.memory().upload(&at).unwrap());
    let own = Extras { cu_seqlens_q: Some(&at_q), cu_seqlens_k: Some(&at_k), ..Extras::default() };
    let message = backward.run(forward(own), &q).unwrap_err().to_string();
    assert!(message.contains("tensor cu_seqlens_q was given"), "{message}");
    let message = backward.set_sequences(&[0, 3, 6], &[0, 4, 6]).unwrap_err().to_string();
    assert!(message.contains("cu_seqlens_q = 3 before 6"), "{message}");
    backward.set_sequences(&[0, 3, 5], &[0, 4, 6]).unwrap();
    backward.run(forward(Extras::default()), &q).unwrap();
    assert_eq!(backward.gradients().unwrap().dq.shape(), p.q_shape());
}

/// Tiles that no row sees are in neither matrix of backward_standard and read by no product; and its tiles
/// meet no bank twice.
#[test]
fn hidden_tiles_of_backward_standard_are_not_there() {
    let kernel = registry::find_backward("backward_standard").unwrap();
    for (dtype, tile) in [(DType::F16, 128), (DType::F32, 64)] {
        let [full, causal] = [false, true].map(|causal| {
            let p = Problem::builder(1, 1, 3 * tile, 64).dtype(dtype).causal(causal);
            let p = p.build().unwrap();
            let (device, draw) = (emulator(), Case::new("", p).draw(0));
            take_counters(&*device);
            run_on(&device, kernel, Backward::new(p), &draw.inputs(), &d_o(&p));
            take_counters(&*device).unwrap()
        });
        // Of nine tiles three are hidden: P and dS are written there, P is read once and dS twice.
        let hidden = (3 * tile * tile * dtype.size()) as u64;
        assert_eq!(full.global_bytes_written - causal.global_bytes_written, 2 * hidden);
        assert!(full.global_bytes_read - causal.global_bytes_read > 3 * hidden);
        if dtype == DType::F16 {
            assert_eq!((full.bank_conflicts, causal.bank_conflicts), (0, 0));
        }
    }
}

#[test]
fn what_is_wrong_is_named() {
    let p = Problem::builder(1, 1, 8, 32).build().unwrap();
    let draw = Case::new("", p).draw(0);
    let (inputs, kernel) = (draw.inputs(), &BACKWARD_KERNELS[0]);
    let outputs = outputs(&p, &inputs);
    let session = Session::new(emulator());
    let short = Tensor::zeros(DType::F32, &[1, 1, 7, 32]);
    let message = |outputs: &Outputs, d_o: &Tensor| {
        let run = session.run_backward(kernel, &Backward::new(p), &inputs, outputs, d_o);
        run.unwrap_err().to_string()
    };
    assert!(message(&outputs, &short).contains("d_o has shape [1, 1, 7, 32]"));
    let wrong = Outputs { lse: short, ..outputs.clone() };
    assert!(message(&wrong, &d_o(&p)).contains("lse has shape"));
    let region = Region::new(1 << 20, 1 << 20);
    let view = View::contiguous(region, p.layout(), 1, 8, 32);
    let plan = Plan::new(&Backward::new(p), &Target::of(&*emulator()), kernel).unwrap();
    let forward = Args::new(view, view, view, view).workspace(region);
    let message = |forward, d_o, gradients| {
        plan.check(&BackwardArgs::new(forward, d_o, gradients)).unwrap_err().to_string()
    };
    assert!(message(forward, view, [view; 3]).contains("tensor lse is missing"));
    let forward = forward.lse(region);
    let odd = View::new(region, [0, 0, 33]);
    assert!(message(forward, odd, [view; 3]).contains("d_o = a row stride of 33"));
    let same = View::new(region, [0, 0, 0]);
    assert!(message(forward, view, [view, same, view]).contains("dk = strides [0, 0, 0]"));
    let small = forward.workspace(Region::new(1 << 20, 16));
    assert!(message(small, view, [view; 3]).contains("workspace = 16 bytes"));
}
