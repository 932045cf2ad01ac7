//! The kernels of the backward pass against f64: edges, features alone and together, and inputs that
//! random draws miss.

mod suite;

use flash_attention::{
    Alibi, Bias, DType, Dropout, Layout, Problem, Tensor, Window, oracle,
    problem::ProblemBuilder,
    registry::{BACKWARD_KERNELS, Backward, BackwardSpec, Sizes},
    session::{Gradients, Inputs, Outputs, Session},
    verify::verify_gradients,
};
use suite::{Case, emulator};

/// O and LSE as a forward pass without errors of its own stores them.
fn outputs(p: &Problem, inputs: &Inputs<'_>) -> Outputs {
    let rows = oracle::reference(p, inputs, &oracle::all_rows(p));
    let by_heads = [p.batch(), p.heads(), p.seq_q(), p.head_dim()];
    let o = Tensor::from_f64(p.dtype(), &by_heads, &rows.o).unwrap();
    let o = match p.layout() {
        Layout::HeadsFirst => o,
        Layout::TokensFirst => o.swap_middle().unwrap(),
    };
    let lse = Tensor::from_f64(DType::F32, &p.lse_shape(), &rows.lse).unwrap();
    Outputs { o, lse, weights: None }
}

fn run(
    kernel: &'static BackwardSpec,
    backward: Backward,
    inputs: &Inputs<'_>,
    d_o: &Tensor,
) -> Gradients {
    let outputs = outputs(&backward.problem, inputs);
    let session = Session::new(emulator());
    session.run_backward(kernel, &backward, inputs, &outputs, d_o).unwrap().0
}

/// What is wrong with a kernel's gradients of a problem.
fn faults(
    label: &str,
    kernel: &'static BackwardSpec,
    p: &Problem,
    inputs: &Inputs<'_>,
    d_o: &Tensor,
) -> Option<String> {
    let gradients = run(kernel, Backward::new(*p), inputs, d_o);
    let result = verify_gradients(p, inputs, d_o, &gradients, &oracle::all_heads(p));
    (!result.passes()).then(|| format!("{} {} {label}: {result}", kernel.name, p.dtype()))
}

fn d_o(p: &Problem) -> Tensor {
    Tensor::random(p.dtype(), &p.q_shape(), 7, 0.0)
}

fn check_all(failures: Vec<String>) {
    assert!(failures.is_empty(), "{} fail:\n{}", failures.len(), failures.join("\n"));
}

/// Every kernel with every storage type that it has.
fn kernels() -> impl Iterator<Item = (&'static BackwardSpec, DType)> {
    BACKWARD_KERNELS.iter().flat_map(|k| k.dtypes.iter().map(move |&dtype| (k, dtype)))
}

/// Lengths beside a kernel's tiles, and every feature alone.
fn edges(kernel: &BackwardSpec, dtype: DType) -> Vec<(&'static str, Problem)> {
    let d = kernel.limits.head_dims[0];
    let Sizes { rows, keys } = (kernel.limits.sizes)(dtype, d);
    let (br, bc) = (rows[0] as usize, keys[0] as usize);
    let shape = |batch, heads, seq_q, seq_k| {
        Problem::builder(batch, heads, seq_q, d).seq_k(seq_k).dtype(dtype)
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
    let mut problems: Vec<_> =
        problems.into_iter().map(|(name, p)| (name, p.build().unwrap())).collect();
    for &other in &kernel.limits.head_dims[1..] {
        let Sizes { rows, keys } = (kernel.limits.sizes)(dtype, other);
        let p = Problem::builder(1, 1, rows[0] as usize + 1, other);
        let p = p.seq_k(keys[0] as usize + 1).dtype(dtype).causal(true);
        problems.push(("another head dim", p.build().unwrap()));
    }
    problems
}

#[test]
fn edges_and_features_are_right() {
    let mut failures = Vec::new();
    for (kernel, dtype) in kernels() {
        for (name, p) in edges(kernel, dtype) {
            let draw = Case::new(name, p).draw(0);
            failures.extend(faults(name, kernel, &p, &draw.inputs(), &d_o(&p)));
        }
    }
    check_all(failures);
}
