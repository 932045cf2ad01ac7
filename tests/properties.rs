//! Properties that hold for every problem, on random problems.

mod suite;

use flash_attention::{
    DType, Problem, Tensor,
    oracle::{self, all_rows},
    problem::{Dropout, Layout},
    registry::{self, KERNELS, KernelSpec, Target},
    session::{Inputs, Session},
    verify::{Credit, Differences},
};
use proptest::prelude::*;

/// A kernel and a small problem for it.
fn kernel_and_problem() -> impl Strategy<Value = (&'static KernelSpec, Problem)> {
    let kernel = (0..KERNELS.len()).prop_map(|i| &KERNELS[i]);
    let sizes = (1..3usize, 1..3usize, 1..80usize, 1..80usize);
    let options = (any::<bool>(), any::<bool>(), any::<bool>(), 0.05..0.5f32, any::<u64>());
    let choices = (0..60usize, 0..60usize, any::<bool>());
    (kernel, sizes, options, choices).prop_map(|(kernel, sizes, options, choices)| {
        let (batch, heads, seq_q, seq_k) = sizes;
        let (causal, mask, with_dropout, p, seed) = options;
        let dtype = kernel.dtypes[choices.0 % kernel.dtypes.len()];
        let head_dims = suite::head_dims(kernel);
        let head_dim = head_dims[choices.1 % head_dims.len()];
        let tokens_first = choices.2 && kernel.limits.features.tokens_first;
        let problem = Problem::builder(batch, heads, seq_q, head_dim)
            .seq_k(seq_k)
            .dtype(dtype)
            .causal(causal && kernel.limits.features.causal)
            .mask(mask && kernel.limits.features.mask)
            .dropout(
                (with_dropout && kernel.limits.features.dropout).then_some(Dropout { p, seed }),
            )
            .layout(if tokens_first { Layout::TokensFirst } else { Layout::HeadsFirst });
        (kernel, problem.build().unwrap())
    })
}

fn tensors(p: &Problem) -> [Tensor; 3] {
    let random = |shape: [usize; 4], seed| Tensor::random(p.dtype(), &shape, seed, 0.0);
    [random(p.q_shape(), 1), random(p.k_shape(), 2), random(p.k_shape(), 3)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// The 2x rule holds.
    #[test]
    fn kernels_are_as_precise_as_the_plain_algorithm((kernel, problem) in kernel_and_problem()) {
        let case = suite::Case::new("random", problem);
        let checked = case.check(&suite::emulator(), kernel);
        prop_assert!(matches!(checked, Ok(Some(_))), "{problem:?}: {checked:?}");
    }

    /// Keys in another order, with their values, give the same output.
    #[test]
    fn the_order_of_keys_does_not_matter(
        (kernel, problem) in kernel_and_problem(),
        turn in 1..80usize,
    ) {
        let problem = problem.to_builder().causal(false).dropout(None).mask(false);
        let problem = problem.layout(Layout::HeadsFirst).build().unwrap();
        let [q, k, v] = tensors(&problem);
        let rotated = |t: &Tensor| {
            let (n, d) = (problem.seq_k(), problem.head_dim());
            let values = t.to_f64();
            let rows = values.chunks(n * d).flat_map(|head| {
                let mut head = head.to_vec();
                head.rotate_left(turn % n * d);
                head
            });
            Tensor::from_f64(t.dtype(), t.shape(), &rows.collect::<Vec<_>>()).unwrap()
        };
        let (k_turned, v_turned) = (rotated(&k), rotated(&v));
        let session = Session::new(suite::emulator());
        let run = |k, v| {
            session.run(kernel, &problem, &Inputs::new(&q, k, v)).unwrap().0
        };
        let (a, b) = (run(&k, &v), run(&k_turned, &v_turned));
        let inputs = Inputs::new(&q, &k, &v);
        let rows = all_rows(&problem);
        let reference = oracle::reference(&problem, &inputs, &rows);
        let credit = Credit::of(&problem, &inputs, &rows, &reference);
        let difference = Differences::new(&b.o.to_f64(), &a.o.to_f64());
        // Each of the two may have its own error of the full size.
        prop_assert!(credit.o.allows(difference.max_abs / 2.0), "{difference:?}");
    }

    /// Each element of O is between the least and the largest value of its column of V.
    #[test]
    fn outputs_are_averages_of_values((kernel, problem) in kernel_and_problem()) {
        let problem = problem.to_builder().dropout(None).layout(Layout::HeadsFirst).build().unwrap();
        let case = suite::Case::new("random", problem);
        let outputs = case.run(&suite::emulator(), kernel).unwrap();
        let draw = case.draw(0);
        let (o, v) = (outputs.o.to_f64(), draw.inputs().v.to_f64());
        let (n, d) = (problem.seq_k(), problem.head_dim());
        // The weights add up to 1 within their rounding.
        let slack = 4.0 * problem.dtype().unit_roundoff();
        for (index, x) in o.into_iter().enumerate() {
            let head = index / (problem.seq_q() * d);
            let column = || (0..n).map(|j| v[(head * n + j) * d + index % d]);
            let low = column().fold(0.0, f64::min);
            let high = column().fold(0.0, f64::max);
            let margin = slack * high.max(-low);
            prop_assert!((low - margin..=high + margin).contains(&x), "{x} of {low}..{high}");
        }
    }

    /// Nothing that can be asked for makes the library panic; what it cannot do it says.
    #[test]
    fn requests_are_answered(
        sizes in (0..5usize, 0..5usize, 0..5usize, 0..5usize, 0..300usize),
        p in -0.5..1.5f32,
        scale in -1.0..1.0f32,
    ) {
        let (batch, heads, seq_q, seq_k, head_dim) = sizes;
        let built = Problem::builder(batch, heads, seq_q, head_dim)
            .seq_k(seq_k)
            .dtype(DType::F16)
            .scale(Some(scale))
            .dropout(Some(Dropout { p, seed: 0 }))
            .build();
        let target = Target::of(&*suite::emulator());
        match built {
            Err(error) => prop_assert!(error.is_usage()),
            Ok(problem) => for kernel in KERNELS {
                let refused = kernel.supports(&problem, &target).is_err();
                prop_assert!(refused || kernel.limits.has_head_dim(head_dim));
            },
        }
    }
}

/// Scores that are summed in short spans are nearer to f64 than the plain algorithm's, whatever
/// the luck of a draw: one long sum in their place gives a ratio of about 1.
#[test]
fn flash_tiled_is_more_precise_in_f32_than_the_plain_algorithm() {
    const MOST: f64 = 0.85;
    const SEEDS: u64 = 8;
    let problem = Problem::builder(1, 2, 200, 64).dtype(DType::F32).mask(true).build().unwrap();
    let case = suite::Case::new("f32", problem);
    let rows = all_rows(&problem);
    let kernel = registry::find("flash_tiled").unwrap();
    let session = Session::new(suite::emulator());
    let ratios = (0..SEEDS).map(|seed| {
        let draw = case.draw(seed);
        let inputs = draw.inputs();
        let (outputs, _) = session.run(kernel, &problem, &inputs).unwrap();
        let reference = oracle::reference(&problem, &inputs, &rows).o;
        let error = |o: &[f64]| Differences::new(o, &reference).max_abs;
        error(&outputs.o.to_f64()) / error(&oracle::plain(&problem, &inputs, &rows).o)
    });
    let mean = ratios.sum::<f64>() / SEEDS as f64;
    assert!(mean < MOST, "{mean}");
}
