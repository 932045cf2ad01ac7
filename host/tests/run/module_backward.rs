//! The gradients of a module: `run --backward --weights`.

use approx::abs_diff_eq;
use flash_attention::{
    DType, Layout, Problem, Tensor,
    module::{ModuleGradients, Weights, oracle},
};
use safetensors::Dtype;

use crate::{Entry, Folder, entry};

const HIDDEN: usize = 64;
const SHAPE: [usize; 3] = [2, 21, HIDDEN];
const WEIGHTS: [&str; 5] = ["--backward", "--weights", "w.safetensors", "--heads", "2"];
const FILES: [&str; 4] = ["--input", "in.safetensors", "--output", "out.safetensors"];

struct Case {
    folder: Folder,
    problem: Problem,
    weights: Weights,
    x: Tensor,
    dy: Tensor,
    mask: Vec<u8>,
}

impl Case {
    /// A causal module with a padding mask; its weights are saved.
    fn new(dtype: DType) -> Self {
        let [batch, seq, hidden] = SHAPE;
        let problem = Problem::builder(batch, 2, seq, hidden / 2).dtype(dtype);
        let problem = problem.mask(true).causal(true).layout(Layout::TokensFirst).build().unwrap();
        let case = Self {
            folder: Folder::new(),
            problem,
            weights: Weights::random(dtype, HIDDEN, 5).unwrap(),
            x: Tensor::random(dtype, &SHAPE, 6, 0.1),
            dy: Tensor::random(dtype, &SHAPE, 7, 0.0),
            mask: (0..batch * seq).map(|j| u8::from(j % 5 != 0)).collect(),
        };
        case.weights.save(&case.folder.path("w.safetensors")).unwrap();
        case
    }

    fn entries(&self) -> Vec<Entry> {
        let mask = ("mask", Dtype::BOOL, SHAPE[..2].to_vec(), self.mask.clone());
        vec![entry("x", &self.x), entry("dy", &self.dy), mask]
    }

    fn shape(name: &str) -> &'static [usize] {
        match name {
            "dx" => &SHAPE,
            bias if bias.ends_with("bias") => &[HIDDEN],
            _ => &[HIDDEN, HIDDEN],
        }
    }
}

/// What is written are the gradients; those that another program saved pass a check, and a moved element
/// fails it.
#[test]
fn gradients_are_those_of_the_module() {
    for dtype in DType::ALL {
        let case = Case::new(dtype);
        let Case { folder, problem, weights, x, dy, mask } = &case;
        let mut entries = case.entries();
        folder.save(&entries);
        let more = ["--causal", "--deterministic", "--kernel", "backward_tiled"];
        let printed = folder.printed(&[&WEIGHTS[..], &FILES, &more].concat(), 0);
        assert!(printed.contains("by backward_tiled, forward pass by flash_"), "{printed}");
        assert!(printed.contains(", projections by linear_"), "{printed}");
        assert!(printed.contains("wrote dx, q_proj.weight, q_proj.bias, k_proj"), "{printed}");
        let exact = oracle::gradients(problem, weights, x, Some(mask), dy);
        let credit = oracle::credit_gradients(problem, weights, x, Some(mask), dy, &exact);
        for ((name, exact), credit) in exact.each().zip(credit) {
            let found = folder.load(name, dtype);
            assert_eq!(found.shape(), Case::shape(name));
            let limit = credit.limit();
            let close = |(a, b): (f64, &f64)| abs_diff_eq!(a, *b, epsilon = limit);
            assert!(found.to_f64().into_iter().zip(exact).all(close), "{dtype} {name}");
        }

        let plain = oracle::plain_gradients(problem, weights, x, Some(mask), dy);
        let saved = plain.each().map(|(name, values)| {
            entry(name, &Tensor::from_f64(dtype, Case::shape(name), values).unwrap())
        });
        entries.extend(saved);
        folder.save(&entries);
        let check = [&WEIGHTS[..], &FILES[..2], &["--causal", "--check"]].concat();
        let printed = folder.printed(&check, 0);
        for name in ModuleGradients::NAMES {
            assert!(printed.contains(&format!("{name} passed: ")), "{printed}");
        }
        // Of a file that has two of them, one of them wrong: out, and in.
        let mut values = plain.0[7].clone();
        values[3 * HIDDEN + 5] += 1.0;
        let wrong = Tensor::from_f64(dtype, &[HIDDEN, HIDDEN], &values).unwrap();
        entries.retain(|(name, ..)| ["x", "dy", "mask", "dx"].contains(name));
        entries.push(entry("out_proj.weight", &wrong));
        folder.save(&entries);
        let printed = folder.printed(&check, 1);
        assert!(printed.contains("dx passed: ") && !printed.contains("q_proj"), "{printed}");
        assert!(printed.contains("out_proj.weight FAILED: "), "{printed}");
        assert!(printed.contains("worst [3, 5]: "), "{printed}");
    }
}

#[test]
fn wrong_requests_are_named() {
    let case = Case::new(DType::F16);
    let refused = |entries: &[Entry], more: &[&str]| {
        case.folder.save(entries);
        case.folder.refused(&[&WEIGHTS[..], &FILES, more].concat())
    };
    let entries = case.entries();
    let line = refused(&entries[..1], &[]);
    assert!(line.contains("tensor dy is missing") && line.contains("has x"), "{line}");
    let short = entry("dy", &Tensor::zeros(DType::F16, &[2, 20, HIDDEN]));
    let line = refused(&[entries[0].clone(), short], &[]);
    assert!(line.contains("tensor dy in in.safetensors is f16 [2, 20, 64]"), "{line}");
    assert!(line.contains("it must be f16 [2, 21, 64]"), "{line}");
    let line = refused(&entries, &["--check"]);
    assert!(line.contains("tensor dx is missing"), "{line}");
    let bias = entry("q_proj.bias", &Tensor::zeros(DType::F16, &[HIDDEN, 1]));
    let line = refused(&[entries.clone(), vec![bias]].concat(), &["--check"]);
    assert!(line.contains("q_proj.bias") && line.contains("it must be f16 [64]"), "{line}");
    let line = refused(&entries, &["--kernel", "flash_mma"]);
    assert!(line.contains("flash_mma") && line.contains("backward_naive"), "{line}");
    let line = refused(&entries, &["--with-weights"]);
    assert!(line.contains("cannot be used with"), "{line}");
}
