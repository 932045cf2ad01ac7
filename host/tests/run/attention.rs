//! Attention of q, k, v and a mask.

use approx::assert_abs_diff_eq;
use flash_attention::{
    Alibi, Bias, DType, Layout, Problem, Tensor, Varlen, Window, oracle,
    session::{Inputs, Outputs},
};
use safetensors::Dtype;

use crate::{Entry, Folder, entry};

const FILES: [&str; 4] = ["--input", "in.safetensors", "--output", "out.safetensors"];

struct Case {
    folder: Folder,
    problem: Problem,
    tensors: [Tensor; 3],
    mask: Vec<u8>,
}

impl Case {
    fn new(dtype: DType, layout: Layout) -> Self {
        let problem = Problem::builder(2, 3, 21, 32).seq_k(37).dtype(dtype).mask(true);
        let problem = problem.layout(layout).build().unwrap();
        let random = |shape: [usize; 4], seed| Tensor::random(dtype, &shape, seed, 0.1);
        let (q, k) = (problem.q_shape(), problem.k_shape());
        let tensors = [random(q, 1), random(k, 2), random(k, 3)];
        let mask = (0..2 * 37).map(|j| u8::from(j % 5 != 0)).collect();
        Self { folder: Folder::new(), problem, tensors, mask }
    }

    fn inputs(&self) -> Inputs<'_> {
        let [q, k, v] = &self.tensors;
        Inputs { mask: Some(&self.mask), ..Inputs::new(q, k, v) }
    }

    fn entries(&self) -> Vec<Entry> {
        let [q, k, v] = &self.tensors;
        let mask = ("mask", Dtype::BOOL, vec![2, 37], self.mask.clone());
        vec![entry("q", q), entry("k", k), entry("v", v), mask]
    }

    /// O and LSE by the plain algorithm, as another program would have saved them.
    fn plain(&self) -> [Tensor; 2] {
        let p = &self.problem;
        let rows = oracle::plain(p, &self.inputs(), &oracle::all_rows(p));
        let heads_first = Layout::HeadsFirst.shape(2, 3, 21, 32);
        let mut o = Tensor::from_f64(p.dtype(), &heads_first, &rows.o).unwrap();
        if p.layout() == Layout::TokensFirst {
            o = o.swap_middle().unwrap();
        }
        [o, Tensor::from_f64(DType::F32, &p.lse_shape(), &rows.lse).unwrap()]
    }
}

#[test]
fn outputs_are_those_of_attention_in_every_type_and_layout() {
    for (dtype, layout, order) in [
        (DType::F32, Layout::HeadsFirst, "bhnd"),
        (DType::F16, Layout::TokensFirst, "bnhd"),
        (DType::BF16, Layout::HeadsFirst, "bhnd"),
    ] {
        let case = Case::new(dtype, layout);
        case.folder.save(&case.entries());
        case.folder.command(&FILES).args(["--layout", order]).assert().success();
        let (o, lse) = (case.folder.load("o", dtype), case.folder.load("lse", DType::F32));
        let p = &case.problem;
        assert_eq!((o.shape(), lse.shape()), (&p.q_shape()[..], &p.lse_shape()[..]));
        let outputs = Outputs { o, lse, weights: None };
        let rows = oracle::all_rows(p);
        let result = flash_attention::verify::verify(p, &case.inputs(), &outputs, &rows);
        assert!(result.passes(), "{dtype}: {result}");
    }
}

/// Fewer heads of K and V by the shapes of the file, a window and a cap by options, the rest by name.
#[test]
fn what_joins_scores_is_read_from_the_file() {
    let folder = Folder::new();
    let window = Window { left: Some(9), right: Some(4) };
    let p = Problem::builder(2, 4, 21, 32).kv_heads(2).seq_k(37).dtype(DType::F16);
    let p = p.window(window).softcap(Some(3.0)).alibi(Some(Alibi::PerBatchAndHead)).sinks(true);
    let p = p.bias(Some(Bias { per_batch: false, per_head: true })).build().unwrap();
    let random = |shape: &[usize], seed| Tensor::random(DType::F16, shape, seed, 0.0);
    let (q, k, v) = (random(&p.q_shape(), 1), random(&p.k_shape(), 2), random(&p.k_shape(), 3));
    let bias = random(&p.bias_shape().unwrap(), 4);
    let slopes = Tensor::random(DType::F32, &[2, 4], 5, 0.5);
    let sinks = Tensor::random(DType::F32, &[4], 6, 0.0);
    let inputs = Inputs {
        alibi_slopes: Some(&slopes),
        bias: Some(&bias),
        sinks: Some(&sinks),
        ..Inputs::new(&q, &k, &v)
    };
    let mut entries = vec![entry("q", &q), entry("k", &k), entry("v", &v)];
    entries.extend([entry("alibi_slopes", &slopes), entry("bias", &bias), entry("sinks", &sinks)]);
    folder.save(&entries);
    folder.command(&FILES).args(["--window", "9,4", "--softcap", "3"]).assert().success();
    let (o, lse) = (folder.load("o", DType::F16), folder.load("lse", DType::F32));
    let outputs = Outputs { o, lse, weights: None };
    let rows = oracle::all_rows(&p);
    let result = flash_attention::verify::verify(&p, &inputs, &outputs, &rows);
    assert!(result.passes(), "{result}");
    // Without the options it is another problem; -1 is no bound.
    folder.command(&FILES).args(["--window", "-1,4"]).assert().success();
    assert_ne!(folder.load("lse", DType::F32), outputs.lse);

    entries[4] = entry("bias", &random(&[2, 3, 21, 37], 4));
    folder.save(&entries);
    let text =
        String::from_utf8(folder.command(&FILES).assert().code(2).get_output().stderr.clone());
    let text = text.unwrap();
    assert!(text.contains("it must be f16 [2, 1, 21, 37]"), "{text}");
}

/// A misspelled mask hides no key: the run says so. Answers of another program are no mistake.
#[test]
fn tensors_that_a_run_does_not_use_are_named() {
    let case = Case::new(DType::F32, Layout::HeadsFirst);
    let warned = |entries: &[Entry]| {
        case.folder.save(entries);
        let output = case.folder.command(&FILES).assert().success().get_output().stderr.clone();
        String::from_utf8(output).unwrap()
    };
    let mut entries = case.entries();
    let [o, lse] = case.plain();
    entries.extend([entry("o", &o), entry("lse", &lse), entry("do", &o), entry("dq", &o)]);
    assert_eq!(warned(&entries), "");
    entries[3].0 = "maks";
    entries.push(entry("page_tables", &lse));
    assert_eq!(warned(&entries), "this run does not use maks, page_tables of in.safetensors\n");
}

/// Sequences of 5, no and 9 rows, and two rows of nobody at the end; numbers of every type.
#[test]
fn packed_sequences_are_read_from_the_file() {
    let folder = Folder::new();
    let (at_q, at_k) = ([0u32, 5, 5, 14], [0u32, 20, 23, 23]);
    let p = Problem::packed(&at_q, &at_k, 4, 32).unwrap().kv_heads(2).dtype(DType::F16);
    let p = p.causal(true).varlen(Some(Varlen { total_q: 16, total_k: 23 })).build().unwrap();
    let random = |shape: &[usize], seed| Tensor::random(DType::F16, shape, seed, 0.0);
    let (q, k, v) = (random(&p.q_shape(), 1), random(&p.k_shape(), 2), random(&p.k_shape(), 3));
    let packed = |name, tensor: &Tensor| {
        let (name, dtype, shape, bytes) = entry(name, tensor);
        (name, dtype, shape[1..].to_vec(), bytes)
    };
    let bytes = |at: &[u32]| at.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>();
    let wide =
        |at: &[u32]| at.iter().flat_map(|&n| i64::from(n).to_le_bytes()).collect::<Vec<u8>>();
    let numbers = [
        [(Dtype::I32, bytes(&at_q)), (Dtype::I64, wide(&at_k))],
        [(Dtype::I64, wide(&at_q)), (Dtype::U32, bytes(&at_k))],
    ];
    let entries = |[of_q, of_k]: [(Dtype, Vec<u8>); 2]| {
        let mut entries = vec![packed("q", &q), packed("k", &k), packed("v", &v)];
        entries.push(("cu_seqlens_q", of_q.0, vec![4], of_q.1));
        entries.push(("cu_seqlens_k", of_k.0, vec![4], of_k.1));
        entries
    };
    let inputs =
        Inputs { cu_seqlens_q: Some(&at_q), cu_seqlens_k: Some(&at_k), ..Inputs::new(&q, &k, &v) };
    for numbers in numbers.clone() {
        folder.save(&entries(numbers));
        folder.command(&FILES).arg("--causal").assert().success();
        let (o, lse) = (folder.load("o", DType::F16), folder.load("lse", DType::F32));
        assert_eq!((o.shape(), lse.shape()), (&[16, 4, 32][..], &[4, 16][..]));
        let outputs = Outputs { o, lse, weights: None };
        let rows: Vec<usize> = (0..4 * 16).filter(|row| row % 16 < 14).collect();
        let result = flash_attention::verify::verify(&p, &inputs, &outputs, &rows);
        assert!(result.passes(), "{result}");
        // Its own output passes its check.
        let mut all = entries(numbers_of(&at_q, &at_k));
        all.extend([entry("o", &outputs.o), entry("lse", &outputs.lse)]);
        folder.save(&all);
        let check = ["--input", "in.safetensors", "--causal", "--check"];
        let text = folder.printed(&check, 0);
        assert!(text.contains("o passed") && text.contains("56 of 64 rows"), "{text}");
    }
    std::fs::remove_file(folder.path("out.safetensors")).unwrap();
    let refused = |change: &dyn Fn(&mut Vec<Entry>)| {
        let mut entries = entries(numbers_of(&at_q, &at_k));
        change(&mut entries);
        folder.save(&entries);
        folder.refused(&FILES)
    };
    let text = refused(&|e| drop(e.pop()));
    assert!(text.contains("tensor cu_seqlens_k is missing"), "{text}");
    let text = refused(&|e| e[3].3 = bytes(&[0, 5, 5, 17]));
    assert!(text.contains("cu_seqlens_q = ") && text.contains("there are 16 rows"), "{text}");
    let text = refused(&|e| (e[3].1, e[3].3) = (Dtype::I32, bytes(&[0, 5, u32::MAX, 14])));
    assert!(text.contains("it must be of numbers from 0 to 4294967295, not -1"), "{text}");
    let text = refused(&|e| (e[3].1, e[3].3) = (Dtype::F32, bytes(&at_q)));
    assert!(text.contains("is f32 [4]: it must be i32, u32 or i64 of one dimension"), "{text}");
    let text = refused(&|e| e[1] = entry("k", &k));
    assert!(text.contains("it must be of three dimensions, [total, H, D]"), "{text}");
    let text = refused(&|e| e.push(("mask", Dtype::U8, vec![3, 20], vec![1; 60])));
    assert!(text.contains("padding mask") && text.contains("packed"), "{text}");
}

fn numbers_of(at_q: &[u32], at_k: &[u32]) -> [(Dtype, Vec<u8>); 2] {
    let bytes = |at: &[u32]| at.iter().flat_map(|n| n.to_le_bytes()).collect();
    [(Dtype::U32, bytes(at_q)), (Dtype::U32, bytes(at_k))]
}

#[test]
fn a_check_passes_what_agrees_and_fails_what_does_not() {
    let case = Case::new(DType::F16, Layout::TokensFirst);
    let [o, lse] = case.plain();
    let mut entries = case.entries();
    entries.extend([entry("o", &o), entry("lse", &lse)]);
    case.folder.save(&entries);
    let check = ["--input", "in.safetensors", "--layout", "bnhd", "--check"];
    let text = case.folder.printed(&check, 0);
    assert!(text.contains("o passed") && text.contains("lse passed"), "{text}");

    // One element of batch entry 1, row 4, head 2.
    let mut wrong = o.to_f64();
    wrong[((21 + 4) * 3 + 2) * 32 + 9] += 0.5;
    let wrong = Tensor::from_f64(DType::F16, o.shape(), &wrong).unwrap();
    entries[4] = entry("o", &wrong);
    case.folder.save(&entries);
    let text = case.folder.printed(&check, 1);
    assert!(text.contains("o FAILED") && text.contains("[1, 2, 4, 9]"), "{text}");
}

/// Scores of 268,800 and more, which f16 cannot hold: the plain algorithm's error is NaN, and
/// zeros are wrong all the same.
#[test]
fn zeros_do_not_pass_where_the_plain_algorithm_overflows() {
    let case = Case::new(DType::F16, Layout::HeadsFirst);
    let problem = Problem::builder(1, 1, 4, 128).seq_k(64).dtype(DType::F16).build().unwrap();
    let full = |shape: &[usize], x: f64| {
        let values = vec![x; shape.iter().product()];
        Tensor::from_f64(DType::F16, shape, &values).unwrap()
    };
    let (q, k) = (full(&problem.q_shape(), 300.0), full(&problem.k_shape(), 80.0));
    let v = Tensor::random(DType::F16, &problem.k_shape(), 1, 1.0);
    let inputs = Inputs::new(&q, &k, &v);
    let rows = oracle::all_rows(&problem);
    assert!(!oracle::plain(&problem, &inputs, &rows).lse[0].is_finite());
    let right = oracle::reference(&problem, &inputs, &rows).o;
    let right = Tensor::from_f64(DType::F16, &problem.q_shape(), &right).unwrap();
    let zeros = Tensor::zeros(DType::F16, &problem.q_shape());
    for (o, code, verdict) in [(zeros, 1, "o FAILED"), (right, 0, "o passed")] {
        case.folder.save(&[entry("q", &q), entry("k", &k), entry("v", &v), entry("o", &o)]);
        let check = ["--input", "in.safetensors", "--check", "--kernel", "flash_hopper"];
        let text = case.folder.printed(&check, code);
        assert!(text.contains(verdict) && !text.contains("allowed inf"), "{text}");
    }
}

#[test]
fn weights_are_written_by_every_kernel() {
    let case = Case::new(DType::F32, Layout::HeadsFirst);
    case.folder.save(&case.entries());
    for kernel in ["naive", "flash_tiled"] {
        case.folder.command(&FILES).args(["--with-weights", "--kernel", kernel]).assert().success();
        let weights = case.folder.load("weights", DType::F32);
        assert_eq!(weights.shape(), case.problem.weights_shape());
        for row in weights.to_f64().chunks(37) {
            assert_abs_diff_eq!(row.iter().sum::<f64>(), 1.0, epsilon = 1e-5);
        }
    }
}

#[test]
fn wrong_tensors_are_named_with_what_they_must_be() {
    let case = Case::new(DType::F32, Layout::HeadsFirst);
    let save_with = |change: &dyn Fn(&mut Vec<Entry>)| {
        let mut entries = case.entries();
        change(&mut entries);
        case.folder.save(&entries);
        case.folder.refused(&FILES)
    };
    let text = save_with(&|e| drop(e.remove(1)));
    assert!(text.contains("tensor k is missing: in.safetensors has mask, q, v"), "{text}");
    let text = save_with(&|e| e[2].2 = vec![2, 37, 3, 32]);
    let expected = "v in in.safetensors is f32 [2, 37, 3, 32]: it must be f32 [2, 3, 37, 32]";
    assert!(text.contains(expected), "{text}");
    let text = save_with(&|e| e[0].2 = vec![6, 21, 32]);
    assert!(text.contains("q in in.safetensors is f32 [6, 21, 32]: it must be of four"), "{text}");
    let text = save_with(&|e| e[0].1 = Dtype::I32);
    assert!(text.contains("is i32 [2, 3, 21, 32]: it must be f32, f16 or bf16"), "{text}");
    let text = save_with(&|e| e[3].2 = vec![37, 2]);
    assert!(text.contains("is bool [37, 2]: it must be u8 or bool [2, 37]"), "{text}");
    case.folder.save(&case.entries());
    let text = case.folder.refused(&["--input", "in.safetensors", "--check"]);
    assert!(text.contains("tensor o is missing"), "{text}");
}

#[test]
fn wrong_requests_are_answered_in_one_line() {
    let case = Case::new(DType::F32, Layout::HeadsFirst);
    assert!(case.folder.refused(&FILES).contains("in.safetensors: No such file"));
    std::fs::write(case.folder.path("in.safetensors"), "not tensors").unwrap();
    assert!(case.folder.refused(&FILES).contains("not a whole safetensors file"));
    case.folder.save(&case.entries());
    let input = ["--input", "in.safetensors"];
    let refused = |args: &[&str]| case.folder.refused(&[&input[..], args].concat());
    assert!(refused(&["--output", "in.safetensors"]).contains("is the input"));
    assert!(refused(&["--output", "no/out.safetensors"]).contains("cannot be written"));
    let typo = refused(&["--output", "out.safetensors", "--kernel", "fast"]);
    assert!(typo.contains("'fast' for '--kernel <NAME>' [possible values: best, naive"), "{typo}");
    assert!(refused(&[]).contains("--output"));
}
