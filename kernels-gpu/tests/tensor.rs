//! The tensor core rungs on the emulator, against attention computed in f64.

mod common;

use common::{Case, blocks_of, run, with_queue};
use half::{bf16, f16};
use kernels_gpu::{
    forward::{flash_async, flash_mma, flash_pipelined, flash_swizzled, flash_tf32},
    parts::queue::QUEUE_WORDS,
};
use simt::{emulator::Stats, scalar::Scalar};

/// Shapes and features that every rung must get right, for a tile of `br` rows and `bc`
/// keys.
fn cases(d: u32, br: u32, bc: u32) -> Vec<Case> {
    let plain = |q, k| Case::new(q, k, d);
    vec![
        plain(1, 1),
        plain(br + 1, bc - 1),
        plain(br - 1, 2 * bc + 1),
        Case { causal: true, ..plain(br + 5, br + 5) },
        Case { causal: true, ..plain(7, 2 * bc + 3) },
        // More rows than keys: the first rows see nothing.
        Case { causal: true, ..plain(bc + 9, 9) },
        Case { padding: true, causal: true, heads: 2, interleaved: true, ..plain(19, bc + 11) },
        Case { dropout: 0.3, heads: 2, ..plain(21, bc + 6) },
        // Logits of tens: maxima grow from tile to tile by what a rung may let pass and more.
        Case { size: 8.0, ..plain(40, 3 * bc) },
        // Logits of thousands: one key takes all the weight.
        Case { size: 60.0, ..plain(10, bc + 20) },
    ]
}

fn check<T: Scalar>(
    symbol: &str,
    (br, bc, threads): (u32, u32, u32),
    shared: u32,
    d: u32,
    cases: &[Case],
) -> Stats {
    let mut total = Stats::default();
    for case in cases {
        total +=
            case.check::<T>(|args| run(symbol, blocks_of(args, br), threads.into(), shared, args));
    }
    assert_eq!(total.bank_conflicts, 0, "{symbol} {bc} {d}");
    total
}

/// The rungs that share the tile of flash_mma, in f16: bf16 takes the same ways through memory, and
/// the library's `tests/edges.rs` has it on every edge.
fn check_rung(rung: &str, shared_bytes: fn(usize) -> u32) {
    let tile = (flash_mma::BR, flash_mma::BC, flash_mma::THREADS);
    for d in [64, 128] {
        let symbol = format!("{rung}_f16_d{d}");
        check::<f16>(&symbol, tile, shared_bytes(d as usize), d, &cases(d, tile.0, tile.1));
    }
}

#[test]
fn flash_mma_computes_attention() {
    check_rung("flash_mma", flash_mma::shared_bytes);
}

#[test]
fn flash_swizzled_computes_attention() {
    check_rung("flash_swizzled", flash_swizzled::shared_bytes);
}

#[test]
fn flash_swizzled_computes_attention_on_turing() {
    check_rung("flash_turing", flash_swizzled::shared_bytes);
}

#[test]
fn flash_async_computes_attention() {
    check_rung("flash_async", flash_async::shared_bytes);
}

/// Runs a case in blocks that take `tasks_per_block` tasks each, on average.
fn run_pipelined<T: Scalar>(case: &Case, dtype: &str, tasks_per_block: u32) {
    let d = case.d as usize;
    let symbol = format!("flash_pipelined_{dtype}_d{d}");
    let shape = flash_pipelined::shape(d);
    let shared = flash_pipelined::shared_bytes(d);
    let stats = case.check::<T>(|args| {
        let mut queue = [0u32; QUEUE_WORDS as usize];
        let args = with_queue(args, &mut queue);
        let tasks = args.shape.seq_q.div_ceil(shape.rows()) * args.shape.heads * args.shape.batch;
        let blocks = tasks.div_ceil(tasks_per_block);
        let stats = run(&symbol, blocks.into(), shape.threads().into(), shared, &args);
        assert_eq!(queue, [0; QUEUE_WORDS as usize], "{symbol} leaves the queues as they were");
        stats
    });
    assert_eq!(stats.bank_conflicts, 0, "{symbol}");
}

#[test]
fn flash_tf32_computes_attention() {
    for d in (32..=256).step_by(32) {
        let (symbol, shape) = (format!("flash_tf32_f32_d{d}"), flash_tf32::shape(d as usize));
        let rows = shape.rows(d as usize);
        for case in cases(d, rows, shape.keys) {
            let stats = case.check::<f32>(|args| {
                let blocks = args.shape.seq_q.div_ceil(rows) * args.shape.heads * args.shape.batch;
                let shared = flash_tf32::shared_bytes(d as usize);
                run(&symbol, blocks.into(), flash_tf32::THREADS.into(), shared, args)
            });
            assert_eq!(stats.bank_conflicts, 0, "{symbol}");
        }
    }
}

#[test]
fn flash_pipelined_computes_attention() {
    for d in (32..=256).step_by(32) {
        let shape = flash_pipelined::shape(d as usize);
        for case in cases(d, shape.rows(), shape.keys) {
            run_pipelined::<f16>(&case, "f16", 1);
        }
    }
}

#[test]
fn a_block_of_flash_pipelined_does_task_after_task() {
    // Q in registers and in shared memory, one fragment a warp and two.
    for d in [32, 64, 128, 160, 256] {
        let shape = flash_pipelined::shape(d as usize);
        let (br, bc) = (shape.rows(), shape.keys);
        let case = |q, k| Case { heads: 3, ..Case::new(q, k, d) };
        // Tasks of one tile and of several, with tails; the last has first rows that see
        // nothing: tasks that have nothing to do come between.
        for (seq_q, seq_k) in [(br + 3, bc - 1), (2 * br + 1, 2 * bc + 5), (2 * br + 7, bc + 9)] {
            for causal in [false, true] {
                let case = Case { causal, ..case(seq_q, seq_k) };
                for tasks_per_block in [3, 100] {
                    run_pipelined::<f16>(&case, "f16", tasks_per_block);
                }
            }
        }
        let case = Case { padding: true, dropout: 0.2, causal: true, ..case(br + 1, 2 * bc + 1) };
        run_pipelined::<bf16>(&case, "bf16", 4);
    }
}
