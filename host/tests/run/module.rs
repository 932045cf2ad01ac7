//! The module's output: `run --weights`.

use approx::abs_diff_eq;
use flash_attention::{
    DType, Layout, Problem, Tensor,
    module::{Weights, oracle},
};
use safetensors::Dtype;

use crate::{Folder, entry};

const HEADS: usize = 2;
const HIDDEN: usize = 64;
const SHAPE: [usize; 3] = [2, 21, HIDDEN];
const FILES: [&str; 8] = [
    "--input",
    "in.safetensors",
    "--weights",
    "w.safetensors",
    "--heads",
    "2",
    "--output",
    "out.safetensors",
];

struct Case {
    folder: Folder,
    problem: Problem,
    weights: Weights,
    x: Tensor,
    mask: Vec<u8>,
}

impl Case {
    /// A causal module with a padding mask; its weights are saved, its input not yet.
    fn new(dtype: DType) -> Self {
        let [batch, seq, hidden] = SHAPE;
        let problem = Problem::builder(batch, HEADS, seq, hidden / HEADS).dtype(dtype);
        let problem = problem.mask(true).causal(true).layout(Layout::TokensFirst).build().unwrap();
        let case = Self {
            folder: Folder::new(),
            problem,
            weights: Weights::random(dtype, HIDDEN, 5).unwrap(),
            x: Tensor::random(dtype, &SHAPE, 6, 0.1),
            mask: (0..batch * seq).map(|j| u8::from(j % 5 != 0)).collect(),
        };
        case.weights.save(&case.folder.path("w.safetensors")).unwrap();
        case
    }

    fn save(&self, x: &Tensor, y: Option<&Tensor>) {
        let mask = ("mask", Dtype::BOOL, SHAPE[..2].to_vec(), self.mask.clone());
        let mut entries = vec![entry("x", x), mask];
        entries.extend(y.map(|y| entry("y", y)));
        self.folder.save(&entries);
    }

    /// y by the plain algorithm, as another program would have saved it.
    fn plain(&self) -> Vec<f64> {
        let Self { problem, weights, x, mask, .. } = self;
        let tokens = oracle::sample_tokens(problem, usize::MAX);
        oracle::plain(problem, weights, x, Some(mask), &tokens)
    }

    fn tensor(&self, y: &[f64]) -> Tensor {
        Tensor::from_f64(self.problem.dtype(), &SHAPE, y).unwrap()
    }
}

#[test]
fn a_module_gives_what_another_program_saved() {
    for dtype in DType::ALL {
        let case = Case::new(dtype);
        let plain = case.plain();
        case.save(&case.x, Some(&case.tensor(&plain)));
        for kernel in ["naive", "flash_tiled", "best"] {
            let more = ["--causal", "--check", "--with-weights", "--kernel", kernel];
            let text = case.folder.printed(&[&FILES[..], &more].concat(), 0);
            assert!(text.contains("y passed") && text.contains("42 of 42 tokens"), "{text}");
            assert_eq!(case.folder.load("y", dtype).shape(), SHAPE);
            let weights = case.folder.load("weights", dtype);
            assert_eq!(weights.shape(), case.problem.weights_shape());
            // Causal: the first token of a sequence sees itself alone. A flash kernel's weight
            // is exp(s - LSE) with s summed again: in another order than a tensor core's, and
            // both sums and the difference are rounded.
            let row = weights.to_f64()[2 * 21 * 21..][..21].to_vec();
            let slack = 4.0 * dtype.unit_roundoff();
            assert!(abs_diff_eq!(row[0], 1.0, epsilon = slack), "{kernel} {dtype}: {}", row[0]);
            assert!(row[1..].iter().all(|&w| w == 0.0), "{kernel} {dtype}");
        }
        // Not causal, it is another function.
        let text = case.folder.printed(&[&FILES[..6], &["--check"]].concat(), 1);
        assert!(text.contains("y FAILED"), "{text}");
    }
}

#[test]
fn a_wrong_element_is_named() {
    let case = Case::new(DType::F16);
    let mut plain = case.plain();
    // Token 4 of batch entry 1, feature 9.
    plain[(21 + 4) * HIDDEN + 9] += 0.5;
    case.save(&case.x, Some(&case.tensor(&plain)));
    let text = case.folder.printed(&[&FILES[..6], &["--causal", "--check"]].concat(), 1);
    assert!(text.contains("y FAILED") && text.contains("[1, 4, 9]"), "{text}");
}

#[test]
fn dropout_is_by_seed() {
    let case = Case::new(DType::F32);
    case.save(&case.x, None);
    let y = |args: &[&str]| {
        case.folder.command(&FILES).args(args).assert().success();
        case.folder.load("y", DType::F32)
    };
    let kept = y(&[]);
    let dropped = y(&["--dropout", "0.3", "--seed", "1"]);
    assert_ne!(dropped, kept);
    assert_eq!(y(&["--dropout", "0.3", "--seed", "1"]), dropped);
    assert_ne!(y(&["--dropout", "0.3", "--seed", "2"]), dropped);
}

#[test]
fn wrong_files_and_requests_are_named() {
    let case = Case::new(DType::F32);
    case.save(&case.x, None);
    let with = |args: &[&str]| case.folder.refused(&[&FILES[..4], args].concat());
    assert!(with(&[]).contains("--heads"));
    let output = ["--output", "out.safetensors", "--heads"];
    let heads = |n| with(&[&output[..], &[n]].concat());
    assert!(heads("3").contains("hidden = 64 is not divisible by heads = 3"));
    assert!(heads("0").contains("'0' for '--heads <H>': use a whole number, 1 or more"));
    assert!(heads("16").contains("head dim = 4 is not possible: kernels have multiples of 8"));
    assert!(with(&["--heads", "2", "--output", "w.safetensors"]).contains("is the weights' file"));
    let text = with(&["--heads", "2", "--check"]);
    assert!(text.contains("tensor y is missing: in.safetensors has mask, x"), "{text}");
    let text = with(&["--heads", "2", "--output", "o", "--layout", "bnhd"]);
    assert!(text.contains("cannot be used with"), "{text}");
    let text = case.folder.refused(&["--input", "in.safetensors", "--heads", "2", "--output", "o"]);
    assert!(text.contains("--weights"), "{text}");

    case.save(&Tensor::zeros(DType::F32, &[2, 21, 60]), None);
    let text = case.folder.refused(&FILES);
    assert!(
        text.contains("x in in.safetensors is f32 [2, 21, 60]: it must be f32 [batch, tokens, 64]"),
        "{text}"
    );
    case.save(&case.x.cast(DType::F16), None);
    assert!(case.folder.refused(&FILES).contains("is f16 [2, 21, 64]: it must be f32"));
    std::fs::remove_file(case.folder.path("w.safetensors")).unwrap();
    assert!(case.folder.refused(&FILES).contains("w.safetensors: No such file"));
}
