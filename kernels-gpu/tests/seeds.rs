//! Kernels whose warps and copies do different things at the same time, under several seeds of the
//! emulator's schedule: the same bits under each.

mod common;

use common::{Case, Hopper, run, seeds, with_constants, with_options, with_queue};
use half::f16;
use kernels_gpu::{args::AttentionArgs, forward::flash_pipelined, parts::queue::QUEUE_WORDS};
use simt::emulator::Options;

/// Runs `launch` on the case under every seed, and compares O and LSE.
fn the_same_under_every_seed(case: &Case, launch: impl Fn(&AttentionArgs)) {
    let mut first: Option<(Vec<f16>, Vec<f32>)> = None;
    for seed in seeds() {
        let mut problem = case.problem::<f16>();
        let args = case.args(&mut problem);
        with_options(Options::seeded(seed), || with_constants(case.constants(), || launch(&args)));
        let outputs = std::hint::black_box((problem.o, problem.lse));
        let first = first.get_or_insert_with(|| outputs.clone());
        // NaN, what nobody has written, is not equal to itself.
        assert!(*first == outputs, "{case:?} under seed {seed}");
    }
}

#[test]
fn flash_hopper() {
    let shape = |heads, q, k, d| Case { heads, ..Case::new(q, k, d) };
    for (consumers, case) in [
        (2, shape(3, 130, 300, 64)),
        (2, shape(3, 130, 200, 192)),
        (2, Case { causal: true, ..shape(4, 140, 300, 64) }),
        (3, Case { causal: true, ..shape(2, 200, 300, 64) }),
        (2, Case { causal: true, padding: true, dropout: 0.2, ..shape(3, 128, 160, 64) }),
    ] {
        for blocks in [1, 2] {
            let hopper = Hopper { consumers, blocks };
            the_same_under_every_seed(&case, |args| {
                hopper
                    .run(&case, args)
                    .unwrap_or_else(|fault| panic!("{consumers} consumers: {fault}"));
            });
        }
    }
}

#[test]
fn flash_pipelined() {
    let shape = flash_pipelined::shape(64);
    let shared = flash_pipelined::shared_bytes(64);
    let plain =
        Case { heads: 3, causal: true, ..Case::new(shape.rows() + 9, 2 * shape.keys + 7, 64) };
    for case in [plain, Case { padding: true, dropout: 0.2, ..plain }] {
        the_same_under_every_seed(&case, |args| {
            let mut queue = [0u32; QUEUE_WORDS as usize];
            let args = with_queue(args, &mut queue);
            run("flash_pipelined_f16_d64", 3.into(), shape.threads().into(), shared, &args);
        });
    }
}
