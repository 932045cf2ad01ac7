//! The linear kernels on the emulator, against sums in f64.

mod common;

use common::{Linear, LinearShape, LinearTensors, check_linear, check_sum, run};
use half::{bf16, f16};
use kernels_gpu::linear::{
    linear_bias,
    linear_hopper::{self, TileShape},
    linear_mma, linear_naive, linear_tiled,
};
use simt::{Dim3, scalar::Scalar};

fn naive<T: Scalar>(product: Linear, dtype: &str, shape: LinearShape, bias: bool) {
    let symbol = format!("linear_naive_{dtype}{}", product.end());
    let tile = linear_naive::TILE;
    check_linear::<T>(product, shape, bias, |args| {
        run(&symbol, product.grid(shape, tile), Dim3::new(tile, tile, 1), 0, args);
    });
}

fn tiled<T: Scalar>(product: Linear, dtype: &str, shape: LinearShape, bias: bool) {
    let symbol = format!("linear_tiled_{dtype}{}", product.end());
    let grid = product.grid(shape, linear_tiled::TILE);
    check_linear::<T>(product, shape, bias, |args| {
        run(&symbol, grid, linear_tiled::THREADS.into(), 0, args);
    });
}

fn mma<T: Scalar>(product: Linear, dtype: &str, shape: LinearShape, bias: bool) {
    let symbol = format!("linear_mma_{dtype}{}", product.end());
    let grid = product.grid(shape, linear_mma::TILE);
    check_linear::<T>(product, shape, bias, |args| {
        let shared = linear_mma::SHARED_BYTES;
        let stats = run(&symbol, grid, linear_mma::THREADS.into(), shared, args);
        assert_eq!(stats.bank_conflicts, 0, "{symbol} {shape:?}");
    });
}

fn hopper<T: Scalar>(
    product: Linear,
    dtype: &str,
    columns: u32,
    clusters: u32,
    shape: LinearShape,
    bias: bool,
) {
    let tile = TileShape { columns };
    let [rows, result_columns] = product.result(shape);
    let (row_tiles, column_tiles) = tile.grid(rows, result_columns);
    let blocks = linear_hopper::CLUSTER * clusters.min(row_tiles * column_tiles);
    let symbol = format!("linear_hopper_{dtype}_n{columns}{}", product.end());
    check_linear::<T>(product, shape, bias, |args| {
        let args = product.hopper(args, tile);
        run(&symbol, blocks.into(), linear_hopper::THREADS.into(), tile.shared_bytes(), &args);
    });
}

#[test]
fn hopper_computes_the_projection() {
    use Linear::Y;
    // Whole tiles of one cluster; more slices than stages.
    hopper::<f16>(Y, "f16", 256, 1, (256, 384, 256), true);
    // Tails in every direction, several tiles a cluster, more slices than stages in all.
    hopper::<bf16>(Y, "bf16", 256, 2, (300, 72, 600), true);
    hopper::<f16>(Y, "f16", 128, 2, (257, 136, 264), false);
    hopper::<bf16>(Y, "bf16", 192, 2, (257, 136, 392), true);
    // A cluster whose second block has no rows; fewer slices than stages.
    hopper::<bf16>(Y, "bf16", 128, 3, (65, 8, 136), true);
    // Several bands, the last one narrower.
    hopper::<f16>(Y, "f16", 128, 5, (257, 8, 1304), true);
    hopper::<f16>(Y, "f16", 256, 1, (1, 8, 8), true);
}

#[test]
fn hopper_computes_the_gradient_of_the_input() {
    use Linear::Dx;
    // Whole tiles, more slices than stages; tails in every direction.
    hopper::<f16>(Dx, "f16", 256, 1, (256, 256, 384), true);
    hopper::<bf16>(Dx, "bf16", 256, 2, (300, 600, 72), true);
    hopper::<f16>(Dx, "f16", 128, 2, (257, 264, 136), false);
    hopper::<bf16>(Dx, "bf16", 192, 2, (257, 392, 136), true);
    hopper::<f16>(Dx, "f16", 192, 1, (1, 8, 8), true);
}

#[test]
fn hopper_computes_the_gradient_of_the_weight() {
    use Linear::Dw;
    // Whole tiles, more slices than stages; tails in every direction. Any number of terms: they are
    // rows.
    hopper::<f16>(Dw, "f16", 256, 1, (384, 256, 256), true);
    hopper::<bf16>(Dw, "bf16", 256, 2, (71, 600, 304), true);
    hopper::<f16>(Dw, "f16", 128, 2, (135, 264, 264), false);
    hopper::<bf16>(Dw, "bf16", 192, 2, (33, 392, 72), true);
    hopper::<f16>(Dw, "f16", 192, 1, (1, 8, 8), true);
}

#[test]
fn naive_computes_the_projection() {
    naive::<f32>(Linear::Y, "f32", (17, 33, 20), true);
    naive::<f16>(Linear::Y, "f16", (5, 64, 40), false);
    naive::<bf16>(Linear::Y, "bf16", (1, 1, 1), true);
}

#[test]
fn tiled_computes_the_projection() {
    tiled::<f32>(Linear::Y, "f32", (65, 33, 127), true);
    tiled::<f16>(Linear::Y, "f16", (64, 48, 64), false);
    tiled::<bf16>(Linear::Y, "bf16", (1, 1, 1), true);
}

#[test]
fn scalar_rungs_compute_the_gradients() {
    for product in Linear::GRADIENTS {
        naive::<f32>(product, "f32", (17, 33, 20), true);
        naive::<f16>(product, "f16", (5, 64, 40), false);
        naive::<bf16>(product, "bf16", (1, 1, 1), true);
        tiled::<f32>(product, "f32", (65, 33, 127), true);
        tiled::<f16>(product, "f16", (48, 64, 64), false);
        tiled::<bf16>(product, "bf16", (1, 1, 1), true);
    }
}

#[test]
fn mma_computes_the_projection() {
    use Linear::Y;
    // Whole tiles; more slices than stages.
    mma::<f16>(Y, "f16", (128, 160, 128), true);
    // Tails in every direction, rows still multiples of 16 bytes; tiles side by side and
    // below each other.
    mma::<bf16>(Y, "bf16", (129, 72, 264), true);
    mma::<f16>(Y, "f16", (257, 8, 8), false);
    // Rows that are no multiple of 16 bytes: x and w, or y.
    mma::<f16>(Y, "f16", (130, 37, 144), true);
    mma::<bf16>(Y, "bf16", (65, 96, 131), true);
    mma::<bf16>(Y, "bf16", (1, 1, 1), true);
}

#[test]
fn mma_computes_the_gradients() {
    for product in Linear::GRADIENTS {
        // Whole tiles; more slices than stages.
        mma::<f16>(product, "f16", (160, 128, 160), true);
        // Tails in every direction; tiles side by side and below each other.
        mma::<bf16>(product, "bf16", (129, 264, 136), true);
        // Rows that are no multiple of 16 bytes: x and w, or dy.
        mma::<f16>(product, "f16", (35, 131, 144), true);
        mma::<bf16>(product, "bf16", (65, 136, 37), true);
        mma::<bf16>(product, "bf16", (1, 1, 1), true);
    }
}

fn bias<T: Scalar>(dtype: &str, shape: LinearShape) {
    let (rows, _, out_features) = shape;
    // The product is none of these: dy is as it was drawn, and the bias is NaN.
    let mut tensors = LinearTensors::<T>::new(Linear::Dw, shape, true);
    let args = tensors.args();
    let blocks = out_features.div_ceil(linear_bias::columns(size_of::<T>() as u32));
    let symbol = format!("linear_bias_{dtype}");
    let stats = run(&symbol, blocks.into(), linear_bias::THREADS.into(), 0, &args);
    assert_eq!(stats.global_bytes_read, args.y.bytes, "{symbol} {shape:?}");
    for (column, &found) in tensors.bias.iter().enumerate() {
        let element = |r: u32| tensors.y[(r * out_features) as usize + column].to_f32();
        let terms: Vec<f64> = (0..rows).map(|r| f64::from(element(r))).collect();
        check_sum(&terms, 0.0, found, &format!("{symbol} {shape:?} [{column}]"));
    }
    // Without a bias there is nothing to do.
    let mut tensors = LinearTensors::<T>::new(Linear::Dw, shape, false);
    let args = tensors.args();
    let stats = run(&symbol, blocks.into(), linear_bias::THREADS.into(), 0, &args);
    assert_eq!((stats.global_bytes_read, stats.global_bytes_written), (0, 0));
}

#[test]
fn the_gradient_of_the_bias_is_the_sum_of_each_column() {
    // More rows than a thread reads at once; whole blocks and not; rows that are no multiple of 16
    // bytes.
    bias::<f32>("f32", (1300, 1, 20));
    bias::<f16>("f16", (1100, 1, 40));
    bias::<bf16>("bf16", (300, 1, 16));
    bias::<f32>("f32", (70, 1, 7));
    bias::<f16>("f16", (70, 1, 21));
    bias::<bf16>("bf16", (1, 1, 1));
}

/// Every tile reads its lines of A and B once: no slice twice, none that is not used.
#[test]
fn mma_reads_each_slice_once_a_tile() {
    // Of the result and of its terms; the terms are others for each product.
    let (wide, deep) = (256, 96);
    for (product, shape) in [
        (Linear::Y, (wide, deep, wide)),
        (Linear::Dx, (wide, wide, deep)),
        (Linear::Dw, (deep, wide, wide)),
    ] {
        let mut tensors = LinearTensors::<f16>::new(product, shape, false);
        let symbol = format!("linear_mma_f16{}", product.end());
        let (threads, shared) = (linear_mma::THREADS.into(), linear_mma::SHARED_BYTES);
        let grid = product.grid(shape, linear_mma::TILE);
        let stats = run(&symbol, grid, threads, shared, &tensors.args());
        let tile_bytes = u64::from(2 * linear_mma::TILE * deep * 2);
        assert_eq!(stats.global_bytes_read, 4 * tile_bytes, "{product:?}");
        assert_eq!(stats.global_bytes_written, u64::from(wide * wide * 2), "{product:?}");
    }
}
