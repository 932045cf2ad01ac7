//! The rule itself: no verdict may depend on the luck of a draw. Right kernels pass on small
//! problems whatever the seed, and errors of a few units in the last place fail there.

mod suite;

use flash_attention::{
    DType, Layout, Problem, Tensor,
    module::{MultiHeadAttention, Pass, Weights, oracle as module_oracle},
    oracle::{self, all_rows},
    registry::{KERNELS, Target},
    session::{Inputs, Outputs, Session},
    verify::{Credit, Differences, Verification},
};

/// Heads and sequence length.
type Shape = (usize, usize);

/// The tensors that the command line draws.
fn tensors(p: &Problem, seed: u64) -> [Tensor; 3] {
    let draw = |shape: [usize; 4], stream| {
        Tensor::random(p.dtype(), &shape, seed.wrapping_mul(3).wrapping_add(stream), 0.0)
    };
    [draw(p.q_shape(), 0), draw(p.k_shape(), 1), draw(p.k_shape(), 2)]
}

/// Runs every kernel of a type on one draw. How many were compared, and the verdicts against
/// them.
fn verdicts(dtype: DType, (heads, seq): Shape, seed: u64) -> (usize, Vec<String>) {
    let session = Session::new(suite::emulator());
    let p = Problem::builder(1, heads, seq, 64).dtype(dtype).build().unwrap();
    let [q, k, v] = &tensors(&p, seed);
    let (inputs, rows) = (Inputs::new(q, k, v), all_rows(&p));
    let reference = oracle::reference(&p, &inputs, &rows);
    let credit = Credit::of(&p, &inputs, &rows, &reference);
    let mut wrong = Vec::new();
    let target = Target::of(session.device());
    let able: Vec<_> = KERNELS.iter().filter(|k| k.supports(&p, &target).is_ok()).collect();
    for kernel in &able {
        let (outputs, _) = session.run(kernel, &p, &inputs).unwrap();
        let result = Verification::new(&p, &outputs, &rows, &reference, credit);
        if !result.passes() {
            wrong.push(format!(
                "{} {dtype} heads {heads} N {seq} seed {seed}: {result}",
                kernel.name
            ));
        }
    }
    (able.len(), wrong)
}

/// The same of the module around each kernel.
fn module_verdicts(dtype: DType, (heads, seq): Shape, seed: u64) -> (usize, Vec<String>) {
    let session = Session::new(suite::emulator());
    let p = Problem::builder(1, heads, seq, 64).dtype(dtype).layout(Layout::TokensFirst);
    let p = p.build().unwrap();
    let hidden = heads * 64;
    let weights = Weights::random(dtype, hidden, seed).unwrap();
    let x = Tensor::random(dtype, &[1, seq, hidden], !seed.wrapping_mul(3), 0.0);
    let tokens = module_oracle::sample_tokens(&p, usize::MAX);
    let reference = module_oracle::reference(&p, &weights, &x, None, &tokens);
    let credit = module_oracle::credit(&p, &weights, &x, None, &tokens, &reference);
    let module = MultiHeadAttention::new(&session, &weights, heads).unwrap();
    let mut wrong = Vec::new();
    let target = Target::of(session.device());
    let able: Vec<_> = KERNELS.iter().filter(|k| k.supports(&p, &target).is_ok()).collect();
    for kernel in &able {
        let (outputs, _) = module.forward(kernel, &x, None, &Pass::default()).unwrap();
        let d = Differences::new(&outputs.y.to_f64(), &reference);
        if !credit.allows(d.max_abs) {
            let (error, name, credit) = (d.max_abs, kernel.name, credit.error());
            wrong.push(format!(
                "{name} {dtype} module, heads {heads} N {seq} seed {seed}: {error:.2e} for {credit:.2e}"
            ));
        }
    }
    (able.len(), wrong)
}

/// Draws on which a single run of the plain algorithm errs by next to nothing.
#[test]
fn a_lucky_draw_calls_no_kernel_wrong() {
    let lucky = [
        (DType::F16, (1, 16), 42),
        (DType::BF16, (1, 128), 2),
        (DType::BF16, (2, 128), 2),
        (DType::F32, (1, 1), 4),
        (DType::F32, (2, 1), 4),
        // Scores near 0, of products that cancel.
        (DType::F32, (1, 1), 21),
        (DType::F32, (1, 1), 68),
        (DType::F32, (1, 1), 685),
    ];
    let both = |(dtype, shape, seed)| {
        [verdicts, module_verdicts].map(|verdicts| verdicts(dtype, shape, seed))
    };
    let both = suite::on_every_core(lucky, both).into_iter().flatten();
    let (compared, wrong): (Vec<_>, Vec<_>) = both.unzip();
    assert!(compared.iter().all(|&n| n > 3), "{compared:?}");
    let wrong = wrong.concat();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The rule is no looser than it must be: the right answer with one element of O, or of the LSE, a few
/// units in the last place away is wrong, in every type on every small problem.
#[test]
fn a_few_units_in_the_last_place_are_wrong() {
    let problems = DType::ALL.into_iter().flat_map(|dtype| {
        [(1, 1), (1, 2), (1, 5), (1, 16), (2, 33)].map(|(heads, seq)| (dtype, heads, seq))
    });
    suite::on_every_core(problems, |(dtype, heads, seq)| {
        let p = Problem::builder(1, heads, seq, 64).dtype(dtype).build().unwrap();
        let rows = all_rows(&p);
        // The plain algorithm's scores are sums in f32: in that type they err by several units.
        let units = if dtype == DType::F32 { 16.0 } else { 4.0 };
        for seed in 0..20 {
            let [q, k, v] = &tensors(&p, seed);
            let inputs = Inputs::new(q, k, v);
            let reference = oracle::reference(&p, &inputs, &rows);
            let credit = Credit::of(&p, &inputs, &rows, &reference);
            let (at, largest) = reference.o.iter().enumerate().fold((0, 0f64), |best, (i, &x)| {
                if x.abs() > best.1 { (i, x.abs()) } else { best }
            });
            let unit = 2.0 * dtype.unit_roundoff() * largest;
            let mut planted = reference.o.clone();
            planted[at] += units * unit;
            let outputs = Outputs {
                o: Tensor::from_f64(dtype, &p.q_shape(), &planted).unwrap(),
                lse: Tensor::from_f64(DType::F32, &p.lse_shape(), &reference.lse).unwrap(),
                weights: None,
            };
            let result = Verification::new(&p, &outputs, &rows, &reference, credit);
            assert!(!result.passes(), "{dtype} heads {heads} N {seq} seed {seed}: {result}");
            // Without it the outputs are right.
            let outputs = Outputs {
                o: Tensor::from_f64(dtype, &p.q_shape(), &reference.o).unwrap(),
                ..outputs
            };
            assert!(Verification::new(&p, &outputs, &rows, &reference, credit).passes());
            // Units of the largest LSE; of 1, the size of the scores, where products cancel.
            let size = reference.lse.iter().map(|x| x.abs()).fold(1.0, f64::max);
            let mut planted = reference.lse.clone();
            planted[rows.len() / 2] += units * 2.0 * dtype.unit_roundoff() * size;
            let lse = Tensor::from_f64(DType::F32, &p.lse_shape(), &planted).unwrap();
            let result =
                Verification::new(&p, &Outputs { lse, ..outputs }, &rows, &reference, credit);
            assert!(!result.passes(), "{dtype} heads {heads} N {seq} seed {seed}: {result}");
        }
    });
}

/// The same on 200 seeds; minutes.
#[test]
#[ignore = "takes minutes: a survey, run after a change of the rule"]
fn no_kernel_is_wrong_on_any_seed() {
    const SEEDS: u64 = 200;
    let mut all = Vec::new();
    for dtype in DType::ALL {
        for shape in [(1, 1), (1, 2), (1, 5), (1, 16), (1, 33), (2, 64), (1, 128)] {
            let (mut compared, mut wrong) = (0, Vec::new());
            for seed in 0..SEEDS {
                for verdicts in [verdicts, module_verdicts] {
                    let (n, w) = verdicts(dtype, shape, seed);
                    compared += n;
                    wrong.extend(w);
                }
            }
            println!("{dtype} {shape:?}: {} of {compared} called wrong", wrong.len());
            all.extend(wrong);
        }
    }
    assert!(all.is_empty(), "{} verdicts:\n{}", all.len(), all.join("\n"));
}
