//! The attention module with every kernel of the registry, in every storage type, against
//! f64 by the 2x rule: on the emulator, and on a GPU where there is one.

mod suite;

use std::sync::Arc;

use flash_attention::{
    DType, Device, Error, Problem, Tensor,
    module::{Kernels, Mode, ModuleGradients, MultiHeadAttention, Pass, Weights, oracle},
    registry::{
        BACKWARD_KERNELS, KERNELS, KernelSpec, LINEAR_KERNELS, LinearSpec, find, find_backward,
    },
    session::Session,
    verify::{Differences, Yardstick},
};

/// Two heads of 32: the least that tells heads apart, with rows that are still whole chunks. Larger
/// head dims are in `tests/edges.rs`, larger projections in `tests/linear.rs`.
const HEADS: usize = 2;
const HIDDEN: usize = 64;
const DROPOUT: f32 = 0.2;
/// Draws over which the textbook's worst error is taken.
const SEEDS: u64 = 4;

/// A pass over tokens.
#[derive(Clone)]
struct Case {
    name: &'static str,
    batch: usize,
    seq: usize,
    mask: bool,
    pass: Pass,
}

/// The input and parameters of one draw.
struct Draw {
    weights: Weights,
    x: Tensor,
    mask: Option<Vec<u8>>,
}

fn cases() -> [Case; 5] {
    let plain = Pass::default();
    let causal = Pass { causal: true, ..plain };
    let training = Pass { mode: Mode::Train { seed: 0x9abc_def0 }, ..causal };
    let case = |name, batch, seq, mask, pass| Case { name, batch, seq, mask, pass };
    [
        case("one token", 1, 1, false, plain),
        case("two sequences", 2, 71, false, plain),
        case("causal", 1, 130, false, causal),
        case("padding, a hidden sequence", 3, 40, true, plain),
        case("training, causal, padding", 3, 65, true, training),
    ]
}

/// Each with every storage type; on the emulator, of bf16 [some](suite::thinned).
fn dtypes_and(emulated: bool, cases: impl IntoIterator<Item = Case>) -> Vec<(DType, Case)> {
    let cases: Vec<Case> = cases.into_iter().collect();
    let of = |dtype| {
        let cases = cases.clone();
        let some = if emulated { suite::thinned(dtype, cases) } else { cases };
        some.into_iter().map(move |case| (dtype, case))
    };
    DType::ALL.into_iter().flat_map(of).collect()
}

/// Checks every case in every type: `of_case` gives the failures, and how many kernels it compared.
fn every_case(
    device: &Arc<dyn Device>,
    of_case: impl Fn((DType, Case)) -> (Vec<String>, usize) + Sync,
) {
    let cases = dtypes_and(device.is_emulated(), cases());
    let (failures, compared): (Vec<_>, Vec<usize>) =
        suite::on_every_core(cases, of_case).into_iter().unzip();
    let failures = failures.concat();
    assert!(compared.iter().all(|&compared| compared > 0), "no kernel could run");
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

impl Case {
    fn problem(&self, dtype: DType) -> Problem {
        let session = Session::new(suite::emulator());
        let weights = Weights::random(dtype, HIDDEN, 0).unwrap();
        let module = MultiHeadAttention::new(&session, &weights, HEADS).unwrap();
        let module = module.with_dropout(DROPOUT).unwrap();
        module.problem(self.batch, self.seq, self.mask, &self.pass).unwrap()
    }

    /// The mask hides sequence 1 altogether and the tail of the others.
    fn draw(&self, dtype: DType, seed: u64) -> Draw {
        let visible = |i| u8::from(i / self.seq != 1 && i % self.seq < self.seq * 2 / 3);
        Draw {
            weights: Weights::random(dtype, HIDDEN, seed).unwrap(),
            x: Tensor::random(dtype, &[self.batch, self.seq, HIDDEN], seed, 0.5),
            mask: self.mask.then(|| (0..self.batch * self.seq).map(visible).collect()),
        }
    }

    /// The reference of draw 0, and what the plain algorithm is credited with on it.
    fn yardstick(&self, dtype: DType) -> (Vec<f64>, Yardstick) {
        let problem = self.problem(dtype);
        let tokens = oracle::sample_tokens(&problem, usize::MAX);
        let Draw { weights, x, mask } = self.draw(dtype, 0);
        let mask = mask.as_deref();
        let reference = oracle::reference(&problem, &weights, &x, mask, &tokens);
        let credit = oracle::credit(&problem, &weights, &x, mask, &tokens, &reference);
        (reference, credit)
    }

    /// Runs a kernel on draw 0; `None` where it cannot.
    fn run(
        &self,
        device: &Arc<dyn Device>,
        kernel: &'static KernelSpec,
        linear: Option<&'static LinearSpec>,
        dtype: DType,
    ) -> Result<Option<Tensor>, Error> {
        let draw = self.draw(dtype, 0);
        let module = draw.module(device, linear)?;
        let Draw { x, mask, .. } = draw;
        match module.forward(kernel, &x, mask.as_deref(), &self.pass) {
            Ok((outputs, _)) => Ok(Some(outputs.y)),
            Err(Error::Unsupported { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The gradient of y in draw 0.
    fn dy(&self, dtype: DType) -> Tensor {
        Tensor::random(dtype, &[self.batch, self.seq, HIDDEN], 9, 0.0)
    }

    /// The gradients of draw 0, and what the plain algorithm is credited with on each.
    fn gradients(&self, dtype: DType) -> (oracle::Gradients, [Yardstick; 9]) {
        let (problem, dy) = (self.problem(dtype), self.dy(dtype));
        let Draw { weights, x, mask } = self.draw(dtype, 0);
        let mask = mask.as_deref();
        let reference = oracle::gradients(&problem, &weights, &x, mask, &dy);
        let credit = oracle::credit_gradients(&problem, &weights, &x, mask, &dy, &reference);
        (reference, credit)
    }

    /// The gradients of draw 0 by kernels; `None` where they cannot.
    fn backward(
        &self,
        device: &Arc<dyn Device>,
        kernels: Kernels,
        linear: Option<&'static LinearSpec>,
        dtype: DType,
    ) -> Result<Option<ModuleGradients>, Error> {
        let draw = self.draw(dtype, 0);
        let module = draw.module(device, linear)?;
        let (dy, mask) = (self.dy(dtype), draw.mask.as_deref());
        match module.backward(kernels, &draw.x, &dy, mask, &self.pass) {
            Ok((gradients, _)) => Ok(Some(gradients)),
            Err(Error::Unsupported { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Draw {
    fn module(
        &self,
        device: &Arc<dyn Device>,
        linear: Option<&'static LinearSpec>,
    ) -> Result<MultiHeadAttention, Error> {
        let session = Session::new(device.clone());
        let mut module = MultiHeadAttention::new(&session, &self.weights, HEADS)?;
        if let Some(linear) = linear {
            module = module.with_linear(linear);
        }
        module.with_dropout(DROPOUT)
    }
}

/// The cases that every linear kernel runs in: one row, and rows beyond whole tiles. What a projection
/// does depends on nothing else of a case; `tests/linear.rs` has its edges.
const OF_LINEAR: [&str; 2] = ["one token", "padding, a hidden sequence"];

/// Every kernel with the best linear kernel, and every linear kernel with `flash_tiled`.
fn run(device: &Arc<dyn Device>) {
    let best = KERNELS.iter().map(|kernel| (kernel, None));
    let tiled = find("flash_tiled").unwrap();
    let pairs: Vec<_> =
        best.chain(LINEAR_KERNELS.iter().map(|linear| (tiled, Some(linear)))).collect();
    let of_case = |(dtype, case): (DType, Case)| {
        let (mut failures, mut compared) = (Vec::new(), 0);
        let (reference, credit) = case.yardstick(dtype);
        let of_linear = OF_LINEAR.contains(&case.name);
        let pairs = pairs.iter().filter(|(_, linear)| of_linear || linear.is_none());
        for &(kernel, linear) in pairs {
            let linear_name = linear.map_or("best linear", |l| l.name);
            let label = format!("{} {dtype} {linear_name}: {}", kernel.name, case.name);
            let y = match case.run(device, kernel, linear, dtype) {
                Ok(Some(y)) => y,
                Ok(None) => continue,
                Err(error) => panic!("{label}: {error}"),
            };
            let d = Differences::new(&y.to_f64(), &reference);
            compared += 1;
            let plain = credit.error();
            println!("{label}: {:.2} times the plain algorithm's error", d.max_abs / plain);
            if !credit.allows(d.max_abs) {
                let error = d.max_abs;
                failures.push(format!("{label}: {error:.2e} for {plain:.2e}, {:?}", d.worst));
            }
        }
        (failures, compared)
    };
    every_case(device, of_case);
}

#[test]
fn every_kernel_in_the_module_on_the_emulator() {
    run(&suite::emulator());
}

#[test]
fn every_kernel_in_the_module_on_a_gpu() {
    suite::on_a_gpu(run);
}

/// Every kernel of the backward pass with the best linear kernel, and every linear kernel with
/// `backward_tiled`. The forward pass is by `flash_tiled`, which has every type.
fn run_backward(device: &Arc<dyn Device>) {
    let forward = find("flash_tiled").unwrap();
    let kernels = |backward| Kernels { forward, backward };
    let best = BACKWARD_KERNELS.iter().map(|kernel| (kernels(kernel), None));
    let tiled = kernels(find_backward("backward_tiled").unwrap());
    let linear = LINEAR_KERNELS.iter().map(|linear| (tiled, Some(linear)));
    let pairs: Vec<_> = best.chain(linear).collect();
    let of_case = |(dtype, case): (DType, Case)| {
        let (mut failures, mut compared) = (Vec::new(), 0);
        let (reference, credit) = case.gradients(dtype);
        let of_linear = OF_LINEAR.contains(&case.name);
        for &(kernels, linear) in pairs.iter().filter(|(_, linear)| of_linear || linear.is_none()) {
            let name = kernels.backward.name;
            let linear_name = linear.map_or("best linear", |l| l.name);
            let label = format!("{name} {dtype} {linear_name}: {}", case.name);
            let found = match case.backward(device, kernels, linear, dtype) {
                Ok(Some(found)) => oracle::Gradients::of(found),
                Ok(None) => continue,
                Err(error) => panic!("{label}: {error}"),
            };
            compared += 1;
            for (((tensor, found), (_, expected)), credit) in
                found.each().zip(reference.each()).zip(credit)
            {
                let d = Differences::new(found, expected);
                let (error, plain) = (d.max_abs, credit.error());
                println!("{label}, {tensor}: {:.2} times the plain algorithm's", error / plain);
                if !credit.allows(error) {
                    failures.push(format!(
                        "{label}, {tensor}: {error:.2e} for {plain:.2e}, {:?}",
                        d.worst
                    ));
                }
            }
        }
        (failures, compared)
    };
    every_case(device, of_case);
}

#[test]
fn gradients_of_the_module_on_the_emulator() {
    run_backward(&suite::emulator());
}

#[test]
fn gradients_of_the_module_on_a_gpu() {
    suite::on_a_gpu(run_backward);
}

/// The module as its formula says, one element after the other: y and the attention weights.
/// In f64, or with sums in f32 and every tensor rounded to the storage type.
fn textbook(case: &Case, draw: &Draw, plain: bool) -> (Vec<f64>, Vec<f64>) {
    let dtype = draw.x.dtype();
    let round = |x: f64| if plain { dtype.round(x) } else { x };
    let f32 = |x: f64| if plain { DType::F32.round(x) } else { x };
    // An f32, as 1 / sqrt(D) is kept.
    let (d, scale) = (HIDDEN / HEADS, f64::from(case.problem(dtype).scale()));
    let tokens = draw.x.len() / HIDDEN;
    let project = |from: &[f64], index: usize| -> Vec<f64> {
        let linear = &draw.weights.projections()[index];
        let w = linear.weight.to_f64();
        let element = |i: usize| {
            let (token, out) = (i / HIDDEN, i % HIDDEN);
            let product = |f| from[token * HIDDEN + f] * w[out * HIDDEN + f];
            let sum = (0..HIDDEN).fold(0.0, |sum, f| f32(sum + product(f)));
            round(sum + linear.bias.get(out))
        };
        (0..tokens * HIDDEN).map(element).collect()
    };
    let x = draw.x.to_f64();
    let (q, k, v) = (project(&x, 0), project(&x, 1), project(&x, 2));
    let (mut o, mut all_weights) = (vec![0.0; tokens * HIDDEN], Vec::new());
    let seq = case.seq;
    for (b, h, i) in
        (0..case.batch).flat_map(|b| (0..HEADS).flat_map(move |h| (0..seq).map(move |i| (b, h, i))))
    {
        let at = |n: usize| (b * seq + n) * HIDDEN + h * d;
        let weight = |j: usize| {
            let hidden = draw.mask.as_ref().is_some_and(|mask| mask[b * seq + j] == 0);
            if hidden || case.pass.causal && j > i {
                return 0.0;
            }
            let s = (0..d).fold(0.0, |sum, e| f32(sum + q[at(i) + e] * k[at(j) + e]));
            f32(round(s * scale).exp())
        };
        let weights: Vec<f64> = (0..seq).map(weight).collect();
        let sum = weights.iter().fold(0.0, |sum, weight| f32(sum + weight));
        for (j, weight) in weights.into_iter().enumerate() {
            let p = if sum == 0.0 { 0.0 } else { round(weight / sum) };
            all_weights.push(p);
            for e in 0..d {
                o[at(i) + e] = f32(o[at(i) + e] + p * v[at(j) + e]);
            }
        }
    }
    o.iter_mut().for_each(|o| *o = round(*o));
    (project(&o, 3), all_weights)
}

/// The cases without dropout, which the textbook does not know.
fn evaluated() -> impl Iterator<Item = Case> {
    cases().into_iter().filter(|case| case.pass.mode == Mode::Eval)
}

#[test]
fn the_oracle_is_the_textbook() {
    for case in evaluated() {
        let draw = case.draw(DType::F16, 3);
        let (y, _) = textbook(&case, &draw, false);
        let problem = case.problem(DType::F16);
        let mask = draw.mask.as_deref();
        for tokens in [u64::MAX, 0].map(|budget| oracle::affordable_tokens(&problem, budget)) {
            let reference = oracle::reference(&problem, &draw.weights, &draw.x, mask, &tokens);
            let expected: Vec<f64> =
                tokens.iter().flat_map(|t| y[t * HIDDEN..(t + 1) * HIDDEN].to_vec()).collect();
            let error = Differences::new(&reference, &expected).max_abs;
            assert!(error < 1e-12, "{}: {error}", case.name);
        }
    }
}

/// Weights come from memory or are computed again: both agree with the textbook, by the 2x
/// rule. A step that computes them again takes a kernel's LSE alone, of which one case of several tiles tells
/// enough: the others run with the kernels that keep weights, and with one that does not.
#[test]
fn weights_are_those_of_the_textbook_with_every_kernel() {
    suite::on_every_core(dtypes_and(true, evaluated()), |(dtype, case)| {
        let draws = (0..SEEDS).map(|seed| {
            let draw = case.draw(dtype, seed);
            let (_, plain) = textbook(&case, &draw, true);
            let (_, expected) = textbook(&case, &draw, false);
            let d = Differences::new(&plain, &expected);
            (expected, Yardstick::new(d.max_abs, dtype.unit_roundoff() * d.max_expected))
        });
        let (expected, credit) = draws.reduce(|a, b| (a.0, a.1.max(b.1))).unwrap();
        let draw = case.draw(dtype, 0);
        let session = Session::new(suite::emulator());
        let module = MultiHeadAttention::new(&session, &draw.weights, HEADS).unwrap();
        let pass = Pass { weights: true, ..case.pass };
        let kept = |k: &&KernelSpec| {
            k.limits.features.weights || k.name == "flash_tiled" || case.name == "causal"
        };
        for kernel in KERNELS.iter().filter(|k| k.dtypes.contains(&dtype)).filter(kept) {
            let mask = draw.mask.as_deref();
            let (outputs, _) = module.forward(kernel, &draw.x, mask, &pass).unwrap();
            let weights = outputs.weights.unwrap();
            assert_eq!(weights.shape(), [case.batch, HEADS, case.seq, case.seq]);
            let error = Differences::new(&weights.to_f64(), &expected).max_abs;
            let label = format!("{} {dtype} {}", kernel.name, case.name);
            println!("{label}: {:.2} times", error / credit.error());
            assert!(credit.allows(error), "{label}: {error} for {credit:?}");
        }
    });
}

/// Training drops something, the same with every kernel and the same every time; another
/// seed drops something else, and evaluation nothing.
#[test]
fn training_drops_weights_by_seed() {
    let weights = Weights::random(DType::F32, HIDDEN, 1).unwrap();
    let x = Tensor::random(DType::F32, &[1, 50, HIDDEN], 2, 0.0);
    let session = Session::new(suite::emulator());
    let module = MultiHeadAttention::new(&session, &weights, HEADS).unwrap();
    let module = module.with_dropout(DROPOUT).unwrap();
    let dropped = |kernel: &str, mode: Mode| -> Vec<bool> {
        let pass = Pass { mode, weights: true, ..Pass::default() };
        let (outputs, _) = module.forward(find(kernel).unwrap(), &x, None, &pass).unwrap();
        outputs.weights.unwrap().to_f64().iter().map(|&w| w == 0.0).collect()
    };
    let (one, two) = (Mode::Train { seed: 1 }, Mode::Train { seed: 2 });
    let naive = dropped("naive", one);
    let count = naive.iter().filter(|&&dropped| dropped).count();
    // 5000 draws: the standard deviation of the count is 28.
    assert!((850..1150).contains(&count), "{count} of 5000");
    assert_eq!(dropped("flash_tiled", one), naive);
    assert_ne!(dropped("flash_tiled", two), naive);
    assert!(!dropped("flash_tiled", Mode::Eval).contains(&true));
}
