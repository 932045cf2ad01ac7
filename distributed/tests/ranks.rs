//! Attention over 1 to 8 ranks, threads with an emulator each: against f64 by the 2x rule, as for one
//! GPU, and bit for bit from run to run.

use flash_attention::{
    DType, Problem, Tensor, Window, oracle,
    problem::Layout,
    registry,
    session::{Gradients, Inputs, Outputs},
    verify::{verify, verify_gradients},
};
use flash_attention_distributed::{
    Grid, Order, Share,
    attention::Options,
    emulated::run,
    whole::{Run, Setup},
};

const GRIDS: [Grid; 9] = [
    grid(1, 1),
    grid(2, 1),
    grid(4, 1),
    grid(1, 2),
    grid(1, 3),
    grid(1, 8),
    grid(2, 2),
    grid(2, 4),
    grid(4, 2),
];

const fn grid(heads: usize, context: usize) -> Grid {
    Grid { heads, context }
}

struct Tensors {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_o: Tensor,
}

impl Tensors {
    fn of(p: &Problem) -> Self {
        // The mean of V is not zero: rounding the parts of O shows.
        let random = |shape: [usize; 4], seed, mean| Tensor::random(p.dtype(), &shape, seed, mean);
        Self {
            q: random(p.q_shape(), 1, 0.0),
            k: random(p.k_shape(), 2, 0.0),
            v: random(p.v_shape(), 3, 0.5),
            d_o: random(p.o_shape(), 4, 0.0),
        }
    }

    fn run(&self, setup: &Setup, backward: bool) -> Run {
        run(setup, [&self.q, &self.k, &self.v], backward.then_some(&self.d_o)).unwrap()
    }

    /// A run is right by the 2x rule, forward and backward.
    fn check(&self, run: &Run, p: &Problem, cu_seqlens: Option<[&[u32]; 2]>, what: &str) {
        let [cu_seqlens_q, cu_seqlens_k] = cu_seqlens.map_or([None; 2], |lists| lists.map(Some));
        let inputs =
            Inputs { cu_seqlens_q, cu_seqlens_k, ..Inputs::new(&self.q, &self.k, &self.v) };
        let outputs = Outputs { o: run.o.clone(), lse: run.lse.clone(), weights: None };
        let verdict = verify(p, &inputs, &outputs, &oracle::all_rows(p));
        assert!(verdict.passes(), "{what}: {verdict}");
        let Some([dq, dk, dv]) = run.gradients.clone() else { return };
        let gradients = Gradients { dq, dk, dv, d_bias: None, d_sinks: None };
        let heads: Vec<_> = (0..p.batch() * p.kv_heads()).collect();
        let verdict = verify_gradients(p, &inputs, &self.d_o, &gradients, &heads);
        assert!(verdict.passes(), "{what}: {verdict}");
    }
}

fn setup(share: Share) -> Setup {
    let options = Options {
        kernel: Some(registry::find("flash_mma").unwrap()),
        backward: Some(registry::find_backward("backward_mma").unwrap()),
        deterministic: false,
    };
    Setup { options, ..Setup::of(share) }
}

/// Every grid, causal, with heads that share keys and a length that no grid divides evenly; full where heads, the
/// context or both are shared.
#[test]
fn every_grid_is_right_forward_and_backward() {
    for (causal, n) in [(true, 150), (false, 64)] {
        let builder = Problem::builder(1, 8, n, 32).kv_heads(4).dtype(DType::F16).causal(causal);
        let problem = builder.build().unwrap();
        let tensors = Tensors::of(&problem);
        let some = [grid(2, 1), grid(1, 3), grid(2, 2)];
        for grid in if causal { &GRIDS[..] } else { &some } {
            let share = Share::new(problem, *grid).unwrap();
            let run = tensors.run(&setup(share), true);
            tensors.check(&run, &problem, None, &format!("{grid:?} causal {causal}"));
        }
    }
}

/// Windows, more keys than rows and fewer, either order of rows where the context is shared, tokens first, two
/// batch entries, f32.
#[test]
fn other_problems_are_right() {
    let base = || Problem::builder(2, 2, 70, 32).dtype(DType::BF16);
    let window = |left, right| base().window(Window { left, right });
    let problems = [
        window(Some(20), Some(0)),
        window(Some(9), Some(30)),
        base().seq_k(130).causal(true),
        base().seq_k(40).causal(true),
        base().layout(Layout::TokensFirst).causal(true).softcap(Some(8.0)),
        base().seq_k(33).scale(Some(0.3)),
    ];
    for problem in problems {
        let problem = problem.build().unwrap();
        let tensors = Tensors::of(&problem);
        let (contiguous, zigzag) = (Order::Contiguous, Order::Zigzag);
        // Heads alone have no order.
        for (grid, order) in [
            (grid(2, 1), contiguous),
            (grid(1, 3), contiguous),
            (grid(1, 3), zigzag),
            (grid(2, 2), zigzag),
        ] {
            let share = Share::new(problem, grid).unwrap().order(order);
            let run = tensors.run(&setup(share), true);
            tensors.check(&run, &problem, None, &format!("{problem:?} {grid:?} {order:?}"));
        }
    }
    let problem = Problem::builder(1, 2, 50, 64).causal(true).build().unwrap();
    let tensors = Tensors::of(&problem);
    let options = Options { kernel: registry::find("flash_tiled").ok(), ..Options::default() };
    let setup = Setup { options, ..Setup::new(problem, grid(2, 2)).unwrap() };
    tensors.check(&tensors.run(&setup, true), &problem, None, "f32");
}

/// Packed sequences, empty ones and one shorter than the ring among them.
#[test]
fn packed_sequences_are_right() {
    let (cu, other) = ([0u32, 40, 40, 43, 110], [0u32, 25, 50, 50, 100]);
    let builder = |k| Problem::packed(&cu, k, 4, 32).unwrap().kv_heads(2).dtype(DType::F16);
    let causal = builder(&cu).causal(true).build().unwrap();
    let window = builder(&other).window(Window { left: Some(30), right: Some(2) }).build().unwrap();
    let full = builder(&other).build().unwrap();
    for (problem, keys, grids) in [
        (causal, cu, vec![grid(2, 1), grid(1, 2), grid(1, 4), grid(2, 2)]),
        (full, other, vec![grid(2, 1), grid(1, 2), grid(2, 3)]),
        (window, other, vec![grid(2, 1)]),
    ] {
        let tensors = Tensors::of(&problem);
        for grid in grids {
            let share = Share::packed(problem, grid, [&cu, &keys]).unwrap();
            let run = tensors.run(&setup(share), true);
            tensors.check(&run, &problem, Some([&cu, &keys]), &format!("{problem:?} {grid:?}"));
        }
    }
}

/// The best kernels for the emulator's device: Hopper's.
#[test]
fn hopper_kernels_are_right() {
    let builder = Problem::builder(1, 2, 300, 64).dtype(DType::F16).causal(true);
    let problem = builder.build().unwrap();
    let tensors = Tensors::of(&problem);
    let run = tensors.run(&Setup::new(problem, grid(1, 2)).unwrap(), true);
    tensors.check(&run, &problem, None, "hopper");
}

/// O and the LSE have the same bits in every run, and on one rank the bits of one device; gradients have where
/// that is asked for.
#[test]
fn runs_repeat_bit_for_bit() {
    let builder = Problem::builder(1, 4, 130, 32).kv_heads(2).dtype(DType::F16).causal(true);
    let problem = builder.build().unwrap();
    let tensors = Tensors::of(&problem);
    let bits = |run: &Run| {
        let gradients = run.gradients.clone().into_iter().flatten();
        let all = [run.o.clone(), run.lse.clone()].into_iter().chain(gradients);
        all.map(|tensor| tensor.as_bytes().to_vec()).collect::<Vec<_>>()
    };
    for grid in [grid(1, 1), grid(2, 1), grid(1, 3), grid(2, 2)] {
        let mut setup = setup(Share::new(problem, grid).unwrap());
        setup.options.deterministic = true;
        setup.options.backward = None;
        let first = bits(&tensors.run(&setup, true));
        assert!(first == bits(&tensors.run(&setup, true)), "{grid:?}");
        if grid.context == 1 {
            // Heads alone are the same launches' work.
            let session = flash_attention::session::Session::new(std::sync::Arc::new(
                flash_attention::CpuDevice::new(),
            ));
            let inputs = Inputs::new(&tensors.q, &tensors.k, &tensors.v);
            let kernel = setup.options.kernel.unwrap();
            let (outputs, _) = session.run(kernel, &problem, &inputs).unwrap();
            assert!(first[0] == outputs.o.as_bytes() && first[1] == outputs.lse.as_bytes());
        }
    }
}

/// What each rank sends, by hand: the all-to-all leaves its own share, the ring passes blocks on.
#[test]
fn bytes_are_counted() {
    let problem = Problem::builder(1, 8, 64, 32).kv_heads(4).dtype(DType::F16).build().unwrap();
    let tensors = Tensors::of(&problem);
    // A rank of four holds 16 rows: of all heads of Q and O 8 KiB, of K and V 4 KiB each.
    let sent = |grid, backward| {
        let run = tensors.run(&setup(Share::new(problem, grid).unwrap()), backward);
        assert!(run.bytes_sent.iter().all(|&bytes| bytes == run.bytes_sent[0]));
        run.bytes_sent[0].iter().sum::<u64>()
    };
    let kib = 1 << 10;
    let lse = 16 * 8 * 4;
    assert_eq!(sent(grid(4, 1), false), 3 * (8 + 4 + 4 + 8) * kib / 4 + 3 * lse / 4);
    assert_eq!(sent(grid(1, 4), false), 3 * 8 * kib);
    // Blocks again, and the sums of dK and dV in f32, which go once more, home.
    assert_eq!(sent(grid(1, 4), true), 2 * 3 * 8 * kib + 4 * 16 * kib);
}
