//! Gradients of q, k, v and do.

use flash_attention::{
    Bias, DType, Layout, Problem, Tensor, Window, oracle,
    session::{Gradients, Inputs, Outputs},
    verify::verify_gradients,
};

use crate::{Entry, Folder, entry};

const FILES: [&str; 5] = ["--backward", "--input", "in.safetensors", "--output", "out.safetensors"];
const WINDOW: [&str; 2] = ["--window", "9,4"];

struct Case {
    folder: Folder,
    problem: Problem,
    /// Q, K, V and dO.
    tensors: [Tensor; 4],
}

impl Case {
    fn new() -> Self {
        let window = Window { left: Some(9), right: Some(4) };
        let problem = Problem::builder(1, 4, 21, 32).kv_heads(2).seq_k(25).dtype(DType::F16);
        let problem = problem.window(window).layout(Layout::TokensFirst).build().unwrap();
        let random = |shape: [usize; 4], seed| Tensor::random(DType::F16, &shape, seed, 0.1);
        let (q, k) = (problem.q_shape(), problem.k_shape());
        let tensors = [random(q, 1), random(k, 2), random(k, 3), random(q, 4)];
        Self { folder: Folder::new(), problem, tensors }
    }

    fn inputs(&self) -> Inputs<'_> {
        let [q, k, v, _] = &self.tensors;
        Inputs::new(q, k, v)
    }

    fn entries(&self) -> Vec<Entry> {
        let [q, k, v, d_o] = &self.tensors;
        vec![entry("q", q), entry("k", k), entry("v", v), entry("do", d_o)]
    }

    /// O and LSE of the forward pass.
    fn outputs(&self) -> Outputs {
        let p = &self.problem;
        let rows = oracle::reference(p, &self.inputs(), &oracle::all_rows(p));
        let o = Tensor::from_f64(DType::F16, &[1, 4, 21, 32], &rows.o).unwrap();
        let lse = Tensor::from_f64(DType::F32, &p.lse_shape(), &rows.lse).unwrap();
        Outputs { o: o.swap_middle().unwrap(), lse, weights: None }
    }

    fn written(&self) -> Gradients {
        let [dq, dk, dv] = ["dq", "dk", "dv"].map(|name| self.folder.load(name, DType::F16));
        Gradients { dq, dk, dv, d_bias: None, d_sinks: None }
    }
}

/// With O and LSE of the file, and of a forward pass before it; and what was written passes
/// a check that a moved element fails.
#[test]
fn gradients_are_those_of_attention() {
    let case = Case::new();
    let layout = ["--layout", "bnhd"];
    let Outputs { o, lse, .. } = case.outputs();
    let mut entries = case.entries();
    case.folder.save(&entries);
    let printed = case.folder.printed(&[&FILES[..], &layout, &WINDOW].concat(), 0);
    assert!(printed.contains(", o and lse by flash_hopper"), "{printed}");
    assert!(printed.contains("wrote dq, dk, dv to out.safetensors"), "{printed}");
    let check = |found: &Gradients| {
        let (p, d_o) = (&case.problem, &case.tensors[3]);
        let result = verify_gradients(p, &case.inputs(), d_o, found, &oracle::all_heads(p));
        assert!(result.passes(), "{result}");
    };
    check(&case.written());

    entries.extend([entry("o", &o), entry("lse", &lse)]);
    case.folder.save(&entries);
    let tiled = ["--kernel", "backward_tiled", "--deterministic"];
    let printed = case.folder.printed(&[&FILES[..], &layout, &WINDOW, &tiled].concat(), 0);
    assert!(printed.contains("by backward_tiled on "), "{printed}");
    let Gradients { dq, dk, mut dv, .. } = case.written();
    check(&case.written());

    let checked = ["--backward", "--input", "in.safetensors", "--check"];
    let checked = [&checked[..], &layout, &WINDOW].concat();
    entries.extend([entry("dq", &dq), entry("dk", &dk), entry("dv", &dv)]);
    case.folder.save(&entries);
    let printed = case.folder.printed(&checked, 0);
    assert!(printed.contains("dq passed") && printed.contains("dv passed"), "{printed}");
    // [0, 3, 1, 5]: token 3, head 1.
    dv.as_bytes_mut()[2 * ((3 * 2 + 1) * 32 + 5)] ^= 0x7f;
    dv.as_bytes_mut()[2 * ((3 * 2 + 1) * 32 + 5) + 1] ^= 0x7f;
    entries.retain(|(name, ..)| *name != "dv" && *name != "dk");
    entries.push(entry("dv", &dv));
    case.folder.save(&entries);
    let printed = case.folder.printed(&checked, 1);
    assert!(printed.contains("dq passed") && printed.contains("dv FAILED"), "{printed}");
    assert!(printed.contains("worst [0, 1, 3, 5]") && !printed.contains("dk "), "{printed}");
}

/// A bias and sinks in the file have gradients in the output, which a check compares.
#[test]
fn a_bias_and_sinks_have_gradients() {
    let Case { folder, .. } = Case::new();
    let bias = Bias { per_batch: false, per_head: true };
    let p = Problem::builder(2, 2, 9, 32).seq_k(11).bias(Some(bias)).sinks(true).build().unwrap();
    let random = |shape: &[usize], seed| Tensor::random(DType::F32, shape, seed, 0.0);
    let [q, k, v, d_o] = [(p.q_shape(), 1), (p.k_shape(), 2), (p.v_shape(), 3), (p.o_shape(), 4)]
        .map(|(shape, seed)| random(&shape, seed));
    let (bias, sinks) = (random(&[1, 2, 9, 11], 5), random(&[2], 6));
    let inputs = Inputs { bias: Some(&bias), sinks: Some(&sinks), ..Inputs::new(&q, &k, &v) };
    let mut entries = vec![entry("q", &q), entry("k", &k), entry("v", &v), entry("do", &d_o)];
    entries.extend([entry("bias", &bias), entry("sinks", &sinks)]);
    folder.save(&entries);
    let printed = folder.printed(&FILES, 0);
    assert!(printed.contains("wrote dq, dk, dv, dbias, dsinks to out.safetensors"), "{printed}");
    let load = |name| folder.load(name, DType::F32);
    let [dq, dk, dv] = ["dq", "dk", "dv"].map(load);
    let (d_bias, mut d_sinks) = (load("dbias"), load("dsinks"));
    let found =
        Gradients { dq, dk, dv, d_bias: Some(d_bias.clone()), d_sinks: Some(d_sinks.clone()) };
    let result = verify_gradients(&p, &inputs, &d_o, &found, &oracle::all_heads(&p));
    assert!(result.passes() && result.each().count() == 5, "{result}");

    entries.push(entry("dbias", &d_bias));
    folder.save(&[&entries[..], &[entry("dsinks", &d_sinks)]].concat());
    let checked = ["--backward", "--input", "in.safetensors", "--check"];
    let printed = folder.printed(&checked, 0);
    assert!(printed.contains("dbias passed") && printed.contains("dsinks passed"), "{printed}");
    assert!(printed.contains("4 of 4 heads of k and v compared"), "{printed}");
    d_sinks.as_bytes_mut()[7] ^= 0x40;
    folder.save(&[&entries[..], &[entry("dsinks", &d_sinks)]].concat());
    let printed = folder.printed(&checked, 1);
    assert!(printed.contains("dbias passed") && printed.contains("dsinks FAILED"), "{printed}");
    assert!(printed.contains("worst [1]"), "{printed}");
    let wrong = Tensor::zeros(DType::F32, &[3]);
    folder.save(&[&entries[..], &[entry("dsinks", &wrong)]].concat());
    std::fs::remove_file(folder.path("out.safetensors")).unwrap();
    let line = folder.refused(&checked);
    assert!(line.contains("tensor dsinks in in.safetensors is f32 [3]"), "{line}");
}

#[test]
fn wrong_requests_are_named() {
    let case = Case::new();
    let layout = ["--layout", "bnhd"];
    let refused = |entries: &[Entry], more: &[&str]| {
        case.folder.save(entries);
        case.folder.refused(&[&FILES[..], &layout, more].concat())
    };
    let entries = case.entries();
    let line = refused(&entries[..3], &[]);
    assert!(line.contains("tensor do is missing") && line.contains("has k, q, v"), "{line}");
    let short = Tensor::zeros(DType::F16, &[1, 20, 4, 32]);
    let line = refused(&[&entries[..3], &[entry("do", &short)]].concat(), &[]);
    assert!(line.contains("tensor do in in.safetensors is f16 [1, 20, 4, 32]"), "{line}");
    assert!(line.contains("it must be f16 [1, 21, 4, 32]"), "{line}");
    let line = refused(&entries, &["--check"]);
    assert!(line.contains("tensor dq is missing"), "{line}");
    let line = refused(&entries, &["--kernel", "flash_mma"]);
    assert!(line.contains("flash_mma") && line.contains("backward_naive"), "{line}");
    let line = refused(&entries, &["--with-weights"]);
    assert!(line.contains("cannot be used with"), "{line}");
}
