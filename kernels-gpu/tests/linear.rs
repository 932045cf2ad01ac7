//! The linear kernels on the emulator, against sums in f64.

mod common;

use common::{buffer, buffer_mut, check_linear, run, values};
use half::{bf16, f16};
use kernels_gpu::{
    args::{Buffer, LinearArgs},
    linear::{
        linear_hopper::{self, LinearHopperArgs, TileShape},
        linear_mma, linear_naive, linear_tiled,
    },
};
use simt::{
    Dim3,
    scalar::Scalar,
    tma::{Element, TensorMap, TensorMapSpec},
};

fn naive<T: Scalar>(symbol: &str, shape: (u32, u32, u32), bias: bool) {
    let tile = linear_naive::TILE;
    let grid = Dim3::new(shape.0.div_ceil(tile), shape.2.div_ceil(tile), 1);
    check_linear::<T>(shape, bias, |args| {
        run(symbol, grid, Dim3::new(tile, tile, 1), 0, args);
    });
}

fn tiled<T: Scalar>(symbol: &str, shape: (u32, u32, u32), bias: bool) {
    let tile = linear_tiled::TILE;
    let grid = Dim3::new(shape.0.div_ceil(tile), shape.2.div_ceil(tile), 1);
    check_linear::<T>(shape, bias, |args| {
        run(symbol, grid, linear_tiled::THREADS.into(), 0, args);
    });
}

fn mma<T: Scalar>(symbol: &str, shape: (u32, u32, u32), bias: bool) {
    let tile = linear_mma::TILE;
    let grid = Dim3::new(shape.0.div_ceil(tile), shape.2.div_ceil(tile), 1);
    check_linear::<T>(shape, bias, |args| {
        let shared = linear_mma::SHARED_BYTES;
        let stats = run(symbol, grid, linear_mma::THREADS.into(), shared, args);
        assert_eq!(stats.bank_conflicts, 0, "{symbol} {shape:?}");
    });
}

/// The tensor maps of x and w.
fn maps(args: &LinearArgs, tile: TileShape) -> [TensorMap; 2] {
    let map = |at: Buffer, columns: u32, rows: u32, box_dims: [u32; 4]| {
        let row = u64::from(columns) * 2;
        let spec = TensorMapSpec {
            address: at.address,
            element: Element::F16, // Or bf16: copies move bits.
            dims: vec![columns.into(), rows.into(), 1, 1],
            strides_bytes: vec![row, row * u64::from(rows), row * u64::from(rows)],
            box_dims: box_dims.to_vec(),
            swizzle_bytes: 128,
        };
        spec.encode().expect("a map that the driver would take")
    };
    let [x, w] = tile.boxes();
    [
        map(args.x, args.in_features, args.rows, x),
        map(args.w, args.in_features, args.out_features, w),
    ]
}

fn hopper<T: Scalar>(dtype: &str, columns: u32, clusters: u32, shape: (u32, u32, u32), bias: bool) {
    let tile = TileShape { columns };
    let (row_tiles, column_tiles) = tile.grid(shape.0, shape.2);
    let blocks = linear_hopper::CLUSTER * clusters.min(row_tiles * column_tiles);
    let symbol = format!("linear_hopper_{dtype}_n{columns}");
    check_linear::<T>(shape, bias, |args| {
        let args = LinearHopperArgs { maps: maps(args, tile), args: *args };
        run(&symbol, blocks.into(), linear_hopper::THREADS.into(), tile.shared_bytes(), &args);
    });
}

#[test]
fn hopper_computes_the_projection() {
    // Whole tiles of one cluster; more slices than stages.
    hopper::<f16>("f16", 256, 1, (256, 384, 256), true);
    // Tails in every direction, several tiles a cluster, more slices than stages in all.
    hopper::<bf16>("bf16", 256, 2, (300, 72, 600), true);
    hopper::<f16>("f16", 128, 2, (257, 136, 264), false);
    hopper::<bf16>("bf16", 192, 2, (257, 136, 392), true);
    // A cluster whose second block has no rows; fewer slices than stages.
    hopper::<bf16>("bf16", 128, 3, (65, 8, 136), true);
    // Several bands, the last one narrower.
    hopper::<f16>("f16", 128, 5, (257, 8, 1304), true);
    hopper::<f16>("f16", 256, 1, (1, 8, 8), true);
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

#[test]
fn mma_computes_the_projection() {
    // Whole tiles; more slices than stages.
    mma::<f16>("linear_mma_f16", (128, 160, 128), true);
    // Tails in every direction, rows still multiples of 16 bytes; tiles side by side and
    // below each other.
    mma::<bf16>("linear_mma_bf16", (129, 72, 264), true);
    mma::<f16>("linear_mma_f16", (257, 8, 8), false);
    // Rows that are no multiple of 16 bytes: x and w, or y.
    mma::<f16>("linear_mma_f16", (130, 37, 144), true);
    mma::<bf16>("linear_mma_bf16", (65, 96, 131), true);
    mma::<bf16>("linear_mma_bf16", (1, 1, 1), true);
}

/// Every tile reads its rows of x and w once: no slice twice, none in vain.
#[test]
fn mma_reads_each_slice_once_a_tile() {
    let (rows, features) = (256, 96);
    let (x, w) = (values::<f16>(rows * features, 1), values::<f16>(rows * features, 2));
    let mut y = vec![f16::NAN; (rows * rows) as usize];
    let args = LinearArgs {
        x: buffer(&x),
        w: buffer(&w),
        y: buffer_mut(&mut y),
        rows,
        in_features: features,
        out_features: rows,
        ..LinearArgs::default()
    };
    let grid = Dim3::new(2, 2, 1);
    let threads = linear_mma::THREADS.into();
    let stats = run("linear_mma_f16", grid, threads, linear_mma::SHARED_BYTES, &args);
    let tile_bytes = u64::from(2 * linear_mma::TILE * features * 2);
    assert_eq!(stats.global_bytes_read, 4 * tile_bytes);
    assert_eq!(stats.global_bytes_written, u64::from(rows * rows * 2));
}
