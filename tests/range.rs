//! Scores at the ends of what the types hold: a row that sees keys has a right answer or NaN, and
//! never that of a row that sees none. And the weights of large scores, which sum to 1.

mod suite;

use flash_attention::{
    DType, Problem, Tensor,
    problem::{MAX_SCALE, MAX_SCORE},
    registry::KernelSpec,
    session::{Inputs, Outputs, Session},
};

/// Rows and keys: tails of every tile, and causal rows that see no key.
const SEQ_Q: usize = 70;
const SEQ_K: usize = 66;
/// A score that `naive` and `standard` still keep in f16.
const MOST_STORED: f64 = 7e5;

/// Every element of Q is `q`, every element of K `k`: all scores are `q k D scale`. V is 0 for one
/// half of the visible keys and 2 for the other half: O is 1.
fn constant(problem: &Problem, q: f64, k: f64, hidden: &dyn Fn(usize, usize) -> bool) -> Case {
    let fill = |shape: [usize; 4], value: f64| {
        let values = vec![value; shape.iter().product()];
        Tensor::from_f64(problem.dtype(), &shape, &values).unwrap()
    };
    let mask: Vec<u8> = (0..problem.batch() * problem.seq_k())
        .map(|at| u8::from(!hidden(at / problem.seq_k(), at % problem.seq_k())))
        .collect();
    // Among the first 2 n visible keys, n have the value 0: rows see an even number of keys.
    let mut v = Vec::new();
    for b in 0..problem.batch() {
        for _ in 0..problem.heads() {
            let mut visible = 0;
            for j in 0..problem.seq_k() {
                visible += usize::from(!hidden(b, j));
                v.extend(vec![(visible % 2 * 2) as f64; problem.head_dim()]);
            }
        }
    }
    Case {
        q: fill(problem.q_shape(), q),
        k: fill(problem.k_shape(), k),
        v: Tensor::from_f64(problem.dtype(), &problem.k_shape(), &v).unwrap(),
        mask: problem.has_mask().then_some(mask),
        score: q * k * problem.head_dim() as f64 * f64::from(problem.scale()),
    }
}

struct Case {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Option<Vec<u8>>,
    score: f64,
}

impl Case {
    fn run(&self, kernel: &'static KernelSpec, problem: &Problem) -> Outputs {
        let inputs =
            Inputs { mask: self.mask.as_deref(), ..Inputs::new(&self.q, &self.k, &self.v) };
        Session::new(suite::emulator()).run(kernel, problem, &inputs).unwrap().0
    }
}

/// What a row that sees keys may answer.
#[derive(Clone, Copy, PartialEq)]
enum Allowed {
    /// The right answer.
    Right,
    /// NaN.
    Nan,
    /// Either.
    RightOrNan,
}

/// Runs `constant` full, and causal with padding, and looks at every row.
fn check(
    kernel: &'static KernelSpec,
    (dtype, d): (DType, usize),
    (q, k): (f64, f64),
    scale: Option<f32>,
    allowed: Allowed,
) {
    for (causal, padding) in [(false, false), (true, true)] {
        let batch = 1 + usize::from(padding);
        let problem = Problem::builder(batch, 1, SEQ_Q, d).seq_k(SEQ_K).dtype(dtype).scale(scale);
        let problem = problem.causal(causal).mask(padding).build().unwrap();
        // Batch entry 1 sees no key, batch entry 0 not the first three.
        let hidden = move |b: usize, j: usize| padding && (b == 1 || j < 3);
        let case = constant(&problem, q, k, &hidden);
        let outputs = case.run(kernel, &problem);
        let (o, lse) = (outputs.o.to_f64(), outputs.lse.to_f64());
        for row in 0..problem.rows() {
            let (b, i) = (row / SEQ_Q, row % SEQ_Q);
            let seen = (0..SEQ_K).filter(|&j| problem.sees(i, j) && !hidden(b, j)).count();
            let what = format!(
                "{} {dtype} q {q} k {k} scale {scale:?} causal {causal} padding {padding} row {row}",
                kernel.name
            );
            let o = &o[row * d..(row + 1) * d];
            if seen == 0 {
                assert!(o.iter().all(|&o| o == 0.0) && lse[row] == f64::NEG_INFINITY, "{what}");
                continue;
            }
            if allowed != Allowed::Right && lse[row].is_nan() {
                assert!(o.iter().all(|o| o.is_nan()), "{what}: O {o:?}");
                continue;
            }
            assert!(allowed != Allowed::Nan, "{what}: LSE {} O {}", lse[row], o[0]);
            // One half of the keys, of an odd number one more, has the value 2.
            let expected = 2.0 * seen.div_ceil(2) as f64 / seen as f64;
            // Weights are rounded, and so is O; LSE is as exact as a stored score.
            let u = dtype.unit_roundoff();
            let right = o.iter().all(|o| (o - expected).abs() <= 3.0 * u * expected + 1e-6);
            let expected = case.score + (seen as f64).ln();
            let close = (lse[row] - expected).abs() <= 4.0 * u * expected.abs() + 1e-5;
            assert!(right && close, "{what}: LSE {} for {expected}, O {}", lse[row], o[0]);
        }
    }
}

#[test]
fn a_row_that_sees_keys_is_never_taken_for_one_that_sees_none() {
    suite::on_every_core(suite::kernels(), |(kernel, dtype)| {
        let most = *kernel.limits.head_dims.iter().filter(|&&d| d <= 128).max().unwrap();
        // 60 x -70 at D 128 is -47,518: past f16 in units of log2(e).
        for (q, k) in [(60.0, -70.0), (60.0, 70.0), (240.0, -240.0), (-2.0, 2.0)] {
            assert!(240.0 * 240.0 * (most as f64).sqrt() < MOST_STORED);
            check(kernel, (dtype, most), (q, k), None, Allowed::Right);
        }
        let d = kernel.limits.head_dims[0];
        // Up to 2^26, but past what f16 keeps of a score.
        let keeps = kernel.limits.features.weights && dtype == DType::F16;
        let allowed = if keeps { Allowed::RightOrNan } else { Allowed::Right };
        for (q, k) in [(2400.0, -2400.0), (2400.0, 2400.0)] {
            assert!(q * q * (d as f64).sqrt() < f64::from(MAX_SCORE));
            check(kernel, (dtype, d), (q, k), None, allowed);
        }
        // Past that, but not past f32.
        for (q, k) in [(57_344.0, -57_344.0), (57_344.0, 57_344.0)] {
            check(kernel, (dtype, d), (q, k), None, Allowed::RightOrNan);
        }
        // Past f32.
        if dtype != DType::F16 {
            for (q, k) in [(1e20, -1e20), (1e20, 1e20)] {
                check(kernel, (dtype, d), (q, k), None, Allowed::Nan);
            }
        }
    });
}

#[test]
fn scales_at_both_ends_lose_no_key() {
    suite::on_every_core(suite::kernels(), |(kernel, dtype)| {
        let d = kernel.limits.head_dims[0];
        for scale in [1e-40, f32::MIN_POSITIVE] {
            check(kernel, (dtype, d), (1.0, -2.0), Some(scale), Allowed::Right);
        }
        // 2^-10, which every storage type holds.
        const SMALL: f64 = 1.0 / 1024.0;
        let keeps = kernel.limits.features.weights && dtype == DType::F16;
        let allowed = if keeps { Allowed::RightOrNan } else { Allowed::Right };
        check(kernel, (dtype, d), (SMALL, -SMALL), Some(MAX_SCALE), Allowed::Right);
        for (q, k) in [(1.0, -1.0), (1.0, 1.0)] {
            check(kernel, (dtype, d), (q, k), Some(MAX_SCALE), allowed);
        }
        for (q, k) in [(1000.0, -1000.0), (1000.0, 1000.0)] {
            check(kernel, (dtype, d), (q, k), Some(MAX_SCALE), Allowed::RightOrNan);
        }
    });
}

/// Of every kernel: those that keep the weights, and the kernel that computes them again.
#[test]
fn weights_of_large_scores_sum_to_one() {
    for (kernel, dtype) in suite::kernels() {
        let d = kernel.limits.head_dims[0];
        for causal in [false, true] {
            let problem = Problem::builder(2, 2, 37, d).seq_k(41).dtype(dtype).causal(causal);
            let problem = problem.mask(true).build().unwrap();
            // Scores with a standard deviation of 3000: the largest are at 1e4.
            let case = suite::Case { qk_size: 55.0, ..suite::Case::new("large scores", problem) };
            let draw = case.draw(0);
            let session = Session::new(suite::emulator());
            let mut prepared = session.prepare(kernel, &problem, &draw.inputs()).unwrap();
            flash_attention::session::Work::launch(&mut prepared).unwrap();
            let weights = prepared.weights().unwrap().to_f64();
            let lse = prepared.outputs_without_weights().unwrap().lse.to_f64();
            for (row, weights) in weights.chunks(problem.seq_k()).enumerate() {
                let sum: f64 = weights.iter().sum();
                let expected = if lse[row] == f64::NEG_INFINITY { 0.0 } else { 1.0 };
                let u = dtype.unit_roundoff();
                assert!(
                    (sum - expected).abs() <= expected * (u + 1e-6),
                    "{} {dtype} causal {causal} row {row}: {sum}",
                    kernel.name
                );
            }
        }
    }
}
