//! Packed sequences, problems without keys, and batches beyond what a grid's `y` and `z` count, on every
//! kernel.

mod suite;

use std::sync::Arc;

use flash_attention::{
    Alibi, DType, Device, Layout, Problem, ProblemBuilder, Tensor, Varlen, Window,
    backend::{DeviceTensor, Memory},
    oracle,
    raw::{Args, Plan, Region, View},
    registry::{self, KERNELS, Target},
    session::{Inputs, Outputs, Session},
    verify::verify,
};
use suite::{Case, emulator};

/// Lengths of Q and of K: several tiles, one row, none of either or of both between others.
const LENGTHS: [[usize; 2]; 7] = [[0, 9], [70, 150], [3, 0], [0, 0], [1, 33], [150, 70], [0, 1]];
/// Rows of each tensor beyond the last sequence.
const BEYOND: usize = 5;

/// `rows` rows from `first` on of a tensor `[1, N, H, D]`.
fn rows_of(tensor: &Tensor, first: usize, rows: usize) -> Tensor {
    let &[_, _, heads, d] = tensor.shape() else { panic!("{:?}", tensor.shape()) };
    let row = heads * d * tensor.dtype().size();
    let bytes = &tensor.as_bytes()[first * row..][..rows * row];
    Tensor::from_bytes(tensor.dtype(), &[1, rows, heads, d], bytes).unwrap()
}

/// What a problem has beside its lengths.
type Change = fn(ProblemBuilder) -> ProblemBuilder;

const PLAIN: Change = |p| p;
const CAUSAL: Change = |p| p.causal(true).kv_heads(1);
const SHAPED: Change = |p| {
    let window = Window { left: Some(20), right: Some(3) };
    p.kv_heads(2).window(window).softcap(Some(4.0)).alibi(Some(Alibi::PerHead)).sinks(true)
};

/// Every kernel, with every change: packed sequences have the bits of each alone. NaN beyond the last
/// sequence stays where it is, in inputs and outputs.
#[test]
fn packed_sequences_have_the_bits_of_each_alone() {
    let kernels = suite::kernels().filter(|&(_, dtype)| dtype != DType::BF16);
    suite::on_every_core(kernels, |(kernel, dtype)| {
        let (heads, d) = (4, kernel.limits.head_dims[0]);
        for (index, change) in [PLAIN, CAUSAL, SHAPED].into_iter().enumerate() {
            let Case { problem, cu_seqlens, .. } =
                Case::packed("", &LENGTHS, (heads, d), |p| change(p.dtype(dtype)));
            let [cu_q, cu_k] = cu_seqlens.unwrap();
            let Varlen { total_q, total_k } = problem.varlen().unwrap();
            let more = Varlen { total_q: total_q + BEYOND, total_k: total_k + BEYOND };
            let problem = problem.to_builder().varlen(Some(more)).build().unwrap();
            let random = |shape, seed| suite::with_nan_beyond(dtype, shape, BEYOND, seed);
            let (q, k) = (random(problem.q_shape(), 1), random(problem.k_shape(), 2));
            let v = random(problem.k_shape(), 3);
            let f32_tensor = |shape: Option<Vec<usize>>, seed| {
                shape.map(|shape| Tensor::random(DType::F32, &shape, seed, 0.1))
            };
            let (slopes, sinks) =
                (f32_tensor(problem.alibi_shape(), 4), f32_tensor(problem.sinks_shape(), 5));
            let (alibi_slopes, sinks) = (slopes.as_ref(), sinks.as_ref());
            let inputs = Inputs {
                alibi_slopes,
                sinks,
                cu_seqlens_q: Some(&cu_q),
                cu_seqlens_k: Some(&cu_k),
                ..Inputs::new(&q, &k, &v)
            };
            let session = Session::new(emulator());
            let (packed, _) = session.run(kernel, &problem, &inputs).unwrap();
            let label = format!("{} {dtype} {index}", kernel.name);

            let total_q = total_q + BEYOND;
            let lse = |h: usize, i: usize| packed.lse.get(h * total_q + i).to_bits();
            for (b, [seq_q, seq_k]) in LENGTHS.into_iter().enumerate() {
                if seq_q == 0 {
                    continue;
                }
                let (first_q, first_k) = (cu_q[b] as usize, cu_k[b] as usize);
                let alone = change(Problem::builder(1, heads, seq_q, d).seq_k(seq_k).dtype(dtype));
                let alone = alone.layout(Layout::TokensFirst).build().unwrap();
                let (q, k) = (rows_of(&q, first_q, seq_q), rows_of(&k, first_k, seq_k));
                let v = rows_of(&v, first_k, seq_k);
                let inputs = Inputs { alibi_slopes, sinks, ..Inputs::new(&q, &k, &v) };
                let (expected, _) = session.run(kernel, &alone, &inputs).unwrap();
                assert_eq!(rows_of(&packed.o, first_q, seq_q), expected.o, "{label} sequence {b}");
                for (h, i) in (0..heads).flat_map(|h| (0..seq_q).map(move |i| (h, i))) {
                    let expected = expected.lse.get(h * seq_q + i).to_bits();
                    assert_eq!(lse(h, first_q + i), expected, "{label} sequence {b} {h} {i}");
                }
            }
            // Outputs were filled with NaN of these bits before.
            let beyond = rows_of(&packed.o, total_q - BEYOND, BEYOND);
            assert!(beyond.as_bytes().iter().all(|&byte| byte == 0xff), "{label}");
            for (h, i) in (0..heads).flat_map(|h| (1..=BEYOND).map(move |i| (h, i))) {
                assert!(packed.lse.get(h * total_q + total_q - i).is_nan(), "{label} {h} {i}");
            }
        }
    });
}

/// The oracle's packed sequences are each alone, to the bit.
#[test]
fn the_oracle_takes_each_sequence_by_itself() {
    let case = Case::packed("", &LENGTHS, (2, 8), |p| {
        p.kv_heads(1).causal(true).alibi(Some(Alibi::PerHead)).sinks(true)
    });
    let (p, draw) = (case.problem, case.draw(0));
    let inputs = draw.inputs();
    let rows = oracle::all_rows(&p);
    let packed = [oracle::reference(&p, &inputs, &rows), oracle::plain(&p, &inputs, &rows)];
    let total_q = p.varlen().unwrap().total_q;
    let [cu_q, cu_k] = case.cu_seqlens.as_ref().unwrap();
    for (b, [seq_q, seq_k]) in LENGTHS.into_iter().enumerate().filter(|(_, of)| of[0] > 0) {
        let alone = Problem::builder(1, 2, seq_q, 8).seq_k(seq_k).kv_heads(1).causal(true);
        let alone = alone.alibi(Some(Alibi::PerHead)).sinks(true).layout(Layout::TokensFirst);
        let alone = alone.build().unwrap();
        let (q, k) = (rows_of(inputs.q, cu_q[b] as usize, seq_q), cu_k[b] as usize);
        let (k, v) = (rows_of(inputs.k, k, seq_k), rows_of(inputs.v, k, seq_k));
        let (alibi_slopes, sinks) = (inputs.alibi_slopes, inputs.sinks);
        let one = Inputs { alibi_slopes, sinks, ..Inputs::new(&q, &k, &v) };
        let rows = oracle::all_rows(&alone);
        let expected = [oracle::reference(&alone, &one, &rows), oracle::plain(&alone, &one, &rows)];
        for (packed, expected) in packed.iter().zip(&expected) {
            for (h, i) in (0..2).flat_map(|h| (0..seq_q).map(move |i| (h, i))) {
                let (from, to) = (h * total_q + cu_q[b] as usize + i, h * seq_q + i);
                assert_eq!(packed.lse[from], expected.lse[to], "sequence {b} {h} {i}");
                assert_eq!(packed.o[from * 8..][..8], expected.o[to * 8..][..8]);
            }
        }
    }
}

/// Q, K and V of packed sequences in one tensor `[total, H + 2 Hkv, D]`, as a projection writes it, and
/// numbers of sequences in the caller's memory.
#[test]
fn views_of_packed_sequences_are_right() {
    for name in ["flash_tiled", "flash_pipelined", "flash_hopper"] {
        let kernel = registry::find(name).unwrap();
        let (dtype, d) = (*kernel.dtypes.last().unwrap(), kernel.limits.head_dims[0]);
        let (heads, kv_heads, lengths) = (4, 2, [[9, 9], [0, 0], [40, 40], [1, 1]]);
        let case = Case::packed("", &lengths, (heads, d), |p| {
            p.dtype(dtype).kv_heads(kv_heads).causal(true)
        });
        let (p, [cu_q, cu_k]) = (case.problem, case.cu_seqlens.clone().unwrap());
        let (total, all) = (50, heads + 2 * kv_heads);
        let projected = Tensor::random(dtype, &[1, total, all, d], 4, 0.0);
        let memory = Memory::new(emulator());
        let device = memory.device();
        let on_device = DeviceTensor::upload(&memory, &projected).unwrap();
        let o = DeviceTensor::filled(&memory, dtype, &p.q_shape(), 0xff).unwrap();
        let lse = DeviceTensor::filled(&memory, DType::F32, &p.lse_shape(), 0xff).unwrap();
        let [at_q, at_k] = [&cu_q, &cu_k].map(|at| memory.upload(at).unwrap());
        let plan = Plan::new(&p, &Target::of(&**device), kernel).unwrap();
        let workspace = memory.filled(plan.workspace_bytes(), 0).unwrap();
        let view = |first: usize| {
            let (region, skipped) = (on_device.region(), (first * d * dtype.size()) as u64);
            let region = Region::new(region.address + skipped, region.bytes - skipped);
            // No stride leads from one sequence to the next.
            View::new(region, [u64::MAX, d as u64, (all * d) as u64])
        };
        let [q, k, v] = [0, heads, heads + kv_heads].map(view);
        let o_view = View::contiguous(o.region(), Layout::TokensFirst, heads, total, d);
        let args = Args::new(q, k, v, o_view).lse(lse.region()).workspace(workspace.region());
        let missing = plan.launches_for(&**device, &args).unwrap_err().to_string();
        assert!(missing.contains("cu_seqlens_q is missing"), "{missing}");
        let args = args.cu_seqlens(at_q.region(), at_k.region());
        for launch in plan.launches_for(&**device, &args).unwrap() {
            // SAFETY: every tensor of the plan's arguments lives until the end of the loop.
            unsafe { device.launch(&launch).unwrap() };
        }
        device.synchronize().unwrap();
        let outputs =
            Outputs { o: o.to_host().unwrap(), lse: lse.to_host().unwrap(), weights: None };
        let values = projected.to_f64();
        let part = |first: usize, count: usize| {
            let heads = values.chunks(all * d).flat_map(|token| &token[first * d..][..count * d]);
            let part: Vec<f64> = heads.copied().collect();
            Tensor::from_f64(dtype, &[1, total, count, d], &part).unwrap()
        };
        let (q, k) = (part(0, heads), part(heads, kv_heads));
        let v = part(heads + kv_heads, kv_heads);
        let inputs = Inputs {
            cu_seqlens_q: Some(&cu_q),
            cu_seqlens_k: Some(&cu_k),
            ..Inputs::new(&q, &k, &v)
        };
        let result = verify(&p, &inputs, &outputs, &oracle::all_rows(&p));
        assert!(result.passes(), "{name}: {result}");
    }
}

/// Numbers that would lead a kernel astray reach no device, nor does a run without any.
#[test]
fn wrong_sequences_are_refused() {
    let kernel = registry::find("flash_tiled").unwrap();
    let session = Session::new(emulator());
    let p = Problem::packed(&[0, 3, 5], &[0, 4, 6], 1, 32).unwrap().build().unwrap();
    let (q, k) = (Tensor::zeros(DType::F32, &p.q_shape()), Tensor::zeros(DType::F32, &p.k_shape()));
    let mut attention = session.attention(kernel, &p).unwrap();
    let [on_q, on_k] = [&q, &k].map(|t| session.upload(t).unwrap());
    let message = attention.run(&on_q, &on_k, &on_k, None).unwrap_err().to_string();
    assert!(message.contains("cu_seqlens_q is missing: the problem has packed"), "{message}");
    for (at_q, at_k, what) in [
        (
            &[0, 3, 6][..],
            &[0, 4, 6][..],
            "cu_seqlens_q = 3 before 6 (sequence 1) is not possible: there are 5",
        ),
        (
            &[0, 3, 5],
            &[0, 5, 6],
            "cu_seqlens_k = 0 before 5 (sequence 0) is not possible: the longest",
        ),
        (&[0, 3, 2], &[0, 4, 6], "they must ascend"),
        (&[0, 5], &[0, 4, 6], "2 sequences have 3 of them"),
    ] {
        let message = attention.set_sequences(at_q, at_k).unwrap_err().to_string();
        assert!(message.contains(what), "{message}");
        let inputs = Inputs {
            cu_seqlens_q: Some(at_q),
            cu_seqlens_k: Some(at_k),
            ..Inputs::new(&q, &k, &k)
        };
        assert!(session.run(kernel, &p, &inputs).is_err(), "{what}");
    }
    attention.set_sequences(&[0, 3, 5], &[0, 4, 6]).unwrap();
    attention.run(&on_q, &on_k, &on_k, None).unwrap();
    attention.synchronize().unwrap();
    let plain = Problem::builder(2, 1, 3, 32).build().unwrap();
    let mut attention = session.attention(kernel, &plain).unwrap();
    let message = attention.set_sequences(&[0, 3, 5], &[0, 4, 6]).unwrap_err().to_string();
    assert!(message.contains("tensor cu_seqlens_q was given"), "{message}");
}

/// Without a key O is 0, and LSE -inf or the sink.
#[test]
fn no_keys_give_nothing() {
    for (kernel, dtype) in suite::kernels() {
        for sinks in [false, true] {
            let p = Problem::builder(2, 2, 70, kernel.limits.head_dims[0]).seq_k(0).dtype(dtype);
            let case = Case::new("", p.sinks(sinks).build().unwrap());
            let draw = case.draw(0);
            let given = case.run(&emulator(), kernel).unwrap();
            assert!(given.o.to_f64().iter().all(|&x| x == 0.0), "{} {dtype}", kernel.name);
            for (row, lse) in given.lse.to_f64().into_iter().enumerate() {
                let sink = draw.inputs().sinks.map_or(f64::NEG_INFINITY, |s| s.get(row / 70 % 2));
                assert_eq!(lse, sink, "{} {dtype} row {row}", kernel.name);
            }
        }
    }
}

/// More batch entries, and heads, than a grid's `y` and `z` count.
const MANY: usize = 70_000;

#[test]
fn every_kernel_has_a_grid_for_many_heads() {
    let target = Target::of(&*emulator());
    for kernel in KERNELS {
        let (dtype, d) = (kernel.dtypes[0], kernel.limits.head_dims[0]);
        for (batch, heads) in [(MANY, 1), (1, MANY), (300, 300)] {
            let p = Problem::builder(batch, heads, 1, d).dtype(dtype).build().unwrap();
            kernel.supports(&p, &target).unwrap();
        }
    }
}

/// One row and one key for each entry: O is V, or what three products of tf32 keep of it, 21 bits.
fn many(device: &Arc<dyn Device>) {
    let target = Target::of(&**device);
    for kernel in KERNELS.iter().filter(|kernel| kernel.runs_on(&target).is_ok()) {
        let (dtype, d) = (kernel.dtypes[0], kernel.limits.head_dims[0]);
        for (batch, heads) in [(MANY, 1), (1, MANY)] {
            let p = Problem::builder(batch, heads, 1, d).dtype(dtype).build().unwrap();
            let [q, k, v] = [1, 2, 3].map(|seed| Tensor::random(dtype, &p.q_shape(), seed, 0.0));
            let session = Session::new(device.clone());
            let (outputs, _) = session.run(kernel, &p, &Inputs::new(&q, &k, &v)).unwrap();
            let is_tf32 = kernel.name == "flash_tf32";
            let epsilon = if is_tf32 { f64::from(2f32.powi(-21)) } else { 0.0 };
            for (o, v) in outputs.o.to_f64().into_iter().zip(v.to_f64()) {
                let what = format!("{} {batch} {heads}: {o} for {v}", kernel.name);
                assert!((o - v).abs() <= epsilon * v.abs(), "{what}");
            }
        }
    }
}

#[test]
#[ignore = "minutes on the emulator"]
fn many_heads_are_right_on_the_emulator() {
    many(&emulator());
}

#[test]
fn many_heads_are_right_on_a_gpu() {
    suite::on_a_gpu(many);
}
