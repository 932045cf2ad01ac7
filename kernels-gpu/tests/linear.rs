//! The linear kernels on the emulator, against sums in f64.

mod common;

use common::{check_linear, run};
use half::{bf16, f16};
use kernels_gpu::linear;
use simt::{Dim3, scalar::Scalar};

fn naive<T: Scalar>(symbol: &str, shape: (u32, u32, u32), bias: bool) {
    let tile = linear::NAIVE_TILE;
    let grid = Dim3::new(shape.0.div_ceil(tile), shape.2.div_ceil(tile), 1);
    check_linear::<T>(shape, bias, |args| {
        run(symbol, grid, Dim3::new(tile, tile, 1), 0, args);
    });
}

fn tiled<T: Scalar>(symbol: &str, shape: (u32, u32, u32), bias: bool) {
    let tile = linear::TILE;
    let grid = Dim3::new(shape.0.div_ceil(tile), shape.2.div_ceil(tile), 1);
    check_linear::<T>(shape, bias, |args| {
        run(symbol, grid, linear::TILED_THREADS.into(), 0, args);
    });
}

#[test]
fn naive_computes_the_projection() {
    naive::<f32>("linear_naive_f32", (17, 33, 20), true);
    naive::<f16>("linear_naive_f16", (5, 64, 40), false);
    naive::<bf16>("linear_naive_bf16", (1, 1, 1), true);
}

#[test]
fn tiled_computes_the_projection() {
    tiled::<f32>("linear_tiled_f32", (65, 33, 127), true);
    tiled::<f16>("linear_tiled_f16", (64, 48, 64), false);
    tiled::<bf16>("linear_tiled_bf16", (1, 1, 1), true);
}
