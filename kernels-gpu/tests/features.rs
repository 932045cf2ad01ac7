//! Windows, groups of heads and what shapes scores, on every rung, against attention in f64.

mod common;

use common::{Case, Hopper, blocks_of, feature_cases as cases, run, with_queue};
use half::{bf16, f16};
use kernels_gpu::{
    args::AttentionArgs,
    forward::{
        flash_async, flash_hopper::Tiles, flash_mma, flash_pipelined, flash_swizzled, flash_tf32,
        flash_tiled,
    },
    parts::queue::QUEUE_WORDS,
};
use simt::{emulator::Stats, scalar::Scalar};

fn check<T: Scalar>(cases: &[Case], launch: impl Fn(&Case, &AttentionArgs) -> Stats) {
    for case in cases {
        case.check::<T>(|args| launch(case, args));
    }
}

fn check_grid<T: Scalar>(symbol: &str, d: u32, (br, bc, threads): (u32, u32, u32), shared: u32) {
    check::<T>(&cases(d, br, bc), |_, args| {
        run(symbol, blocks_of(args, br), threads.into(), shared, args)
    });
}

#[test]
fn scalar_rung() {
    let tile = (flash_tiled::BR, flash_tiled::BC, flash_tiled::THREADS);
    check_grid::<f32>("flash_tiled_f32_d32", 32, tile, flash_tiled::shared_bytes(32));
    check_grid::<f16>("flash_tiled_f16_d32", 32, tile, flash_tiled::shared_bytes(32));
}

#[test]
fn tensor_core_rungs() {
    let tile = (flash_mma::BR, flash_mma::BC, flash_mma::THREADS);
    check_grid::<f16>("flash_mma_f16_d64", 64, tile, flash_mma::shared_bytes(64));
    check_grid::<bf16>("flash_swizzled_bf16_d64", 64, tile, flash_swizzled::shared_bytes(64));
    check_grid::<f16>("flash_async_f16_d64", 64, tile, flash_async::shared_bytes(64));
}

#[test]
fn tf32() {
    for d in [32, 128] {
        let shape = flash_tf32::shape(d);
        let rows = shape.rows(d);
        let (symbol, shared) = (format!("flash_tf32_f32_d{d}"), flash_tf32::shared_bytes(d));
        check::<f32>(&cases(d as u32, rows, shape.keys), |_, args| {
            let blocks = args.shape.seq_q.div_ceil(rows) * args.shape.heads * args.shape.batch;
            run(&symbol, blocks.into(), flash_tf32::THREADS.into(), shared, args)
        });
    }
}

#[test]
fn pipelined() {
    for d in [32, 128, 256] {
        let shape = flash_pipelined::shape(d);
        let (symbol, shared) =
            (format!("flash_pipelined_f16_d{d}"), flash_pipelined::shared_bytes(d));
        check::<f16>(&cases(d as u32, shape.rows(), shape.keys), |_, args| {
            let tiles = args.shape.seq_q.div_ceil(shape.rows());
            let tasks = tiles * args.shape.heads * args.shape.batch;
            let mut queue = [0u32; QUEUE_WORDS as usize];
            let args = with_queue(args, &mut queue);
            run(&symbol, tasks.div_ceil(2).into(), shape.threads().into(), shared, &args)
        });
    }
}

#[test]
fn hopper() {
    for d in [64, 128, 256] {
        let tiles = Tiles::of(d, 2);
        check::<f16>(&cases(d, tiles.rows(), tiles.keys), |case, args| {
            let tasks =
                args.shape.seq_q.div_ceil(tiles.rows()) * args.shape.heads * args.shape.batch;
            let hopper = Hopper { consumers: 2, blocks: tasks.div_ceil(2) };
            hopper.run(case, args).unwrap_or_else(|fault| panic!("{case:?}: {fault}"))
        });
    }
}
