//! Causal attention with every offset of the diagonal over a tile of keys. A mask asked of the
//! wrong row shows only where a tile ends one key past what the first row sees.

mod common;

use common::{Case, Hopper, run, with_queue};
use half::f16;
use kernels_gpu::{
    args::AttentionArgs,
    forward::{
        flash_async, flash_mma, flash_pipelined, flash_swizzled, flash_tf32, flash_tiled, naive,
        standard::{self, softmax},
    },
    parts::queue::QUEUE_WORDS,
};
use simt::{Dim3, emulator::Stats, scalar::Scalar};

/// Rows of two and more warps, the last of one row; from one tile of `keys` keys to two.
fn sweep<T: Scalar>(
    (rows, keys, d): (u32, u32, u32),
    stored: bool,
    launch: impl Fn(&Case, &AttentionArgs) -> Stats,
) {
    for offset in 0..=keys {
        let case = Case::new(rows, rows + offset, d);
        let case = Case { causal: true, scores_stored: stored, ..case };
        case.check::<T>(|args| launch(&case, args));
    }
}

#[test]
fn naive_and_standard() {
    sweep::<f16>((17, naive::SCORES_TILE, 32), true, |_, args| {
        let tile = naive::SCORES_TILE;
        let grid = Dim3::new(args.shape.seq_k.div_ceil(tile), args.shape.seq_q.div_ceil(tile), 1);
        run("naive_scores_f16_d32", grid, Dim3::new(tile, tile, 1), 0, args);
        let rows = args.shape.seq_q.div_ceil(naive::SOFTMAX_ROWS);
        run("naive_softmax_f16", rows.into(), naive::SOFTMAX_THREADS.into(), 0, args);
        let blocks = (args.shape.seq_q * 32).div_ceil(naive::OUTPUT_THREADS);
        run("naive_output_f16_d32", blocks.into(), naive::OUTPUT_THREADS.into(), 0, args)
    });
    sweep::<f16>((33, standard::MMA_TILE, 32), true, |_, args| {
        let (tile, threads) = (standard::MMA_TILE, standard::MMA_THREADS);
        let columns = standard::output_columns(args.shape.head_dim);
        let row_threads = softmax::row_threads(args.shape.seq_k, 2);
        let rows = args.shape.seq_q.div_ceil(tile);
        let grid = Dim3::new(args.shape.seq_k.div_ceil(tile), rows, 1);
        run("standard_scores_f16", grid, threads.into(), standard::SCORES_SHARED_BYTES, args);
        run(
            "standard_softmax_f16_warp",
            args.shape.seq_q.div_ceil(softmax::THREADS / row_threads).into(),
            softmax::THREADS.into(),
            softmax::shared_bytes(args.shape.seq_k, 2, row_threads),
            args,
        );
        let symbol = format!("standard_output_f16_x{columns}");
        let shared = standard::output_shared_bytes(columns);
        run(&symbol, rows.into(), threads.into(), shared, args)
    });
}

#[test]
fn a_block_a_tile() {
    sweep::<f32>((17, flash_tiled::BC, 32), false, |_, args| {
        let grid = args.shape.seq_q.div_ceil(flash_tiled::BR);
        let shared = flash_tiled::shared_bytes(32);
        run("flash_tiled_f32_d32", grid.into(), flash_tiled::THREADS.into(), shared, args)
    });
    type SharedBytes = fn(usize) -> u32;
    let rungs: [(&str, SharedBytes); 4] = [
        ("flash_mma", flash_mma::shared_bytes),
        ("flash_swizzled", flash_swizzled::shared_bytes),
        ("flash_turing", flash_swizzled::shared_bytes),
        ("flash_async", flash_async::shared_bytes),
    ];
    for (rung, shared_bytes) in rungs {
        sweep::<f16>((33, flash_mma::BC, 64), false, |_, args| {
            let grid = args.shape.seq_q.div_ceil(flash_mma::BR);
            let symbol = format!("{rung}_f16_d64");
            run(&symbol, grid.into(), flash_mma::THREADS.into(), shared_bytes(64), args)
        });
    }
    let shape = flash_tf32::shape(64);
    sweep::<f32>((49, shape.keys, 64), false, |_, args| {
        let blocks = args.shape.seq_q.div_ceil(shape.rows(64));
        let shared = flash_tf32::shared_bytes(64);
        run("flash_tf32_f32_d64", blocks.into(), flash_tf32::THREADS.into(), shared, args)
    });
}

#[test]
fn pipelined() {
    let shape = flash_pipelined::shape(64);
    let shared = flash_pipelined::shared_bytes(64);
    sweep::<f16>((49, shape.keys, 64), false, |_, args| {
        let mut queue = [0u32; QUEUE_WORDS as usize];
        let args = with_queue(args, &mut queue);
        let blocks = args.shape.seq_q.div_ceil(shape.rows());
        run("flash_pipelined_f16_d64", blocks.into(), shape.threads().into(), shared, &args)
    });
}

#[test]
fn hopper() {
    for consumers in [2, 3] {
        let hopper = Hopper { consumers, blocks: 1 };
        // The second consumer has one row.
        sweep::<f16>((65, 128, 64), false, |case, args| {
            hopper.run(case, args).unwrap_or_else(|fault| panic!("{consumers} consumers: {fault}"))
        });
    }
}
