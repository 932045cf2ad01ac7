//! Projections by themselves: every linear kernel on shapes with and without tails, on the
//! emulator and on a GPU, by the 2x rule. And the probe of what clusters offer.

mod suite;

use std::sync::Arc;

use flash_attention::{
    DType, Device, Tensor,
    backend::{Constants, KernelArgs, Launch, Memory, TensorMapSpec},
    raw::LinearArgs,
    registry::{LINEAR_KERNELS, LinearProduct, LinearSpec, Projection, Target},
    verify::{Differences, Yardstick},
};
use kernels_gpu::probe::{self, ProbeArgs};
use simt::tma::TensorMap;

/// Rows, input features, output features.
type Shape = (usize, usize, usize);

/// Whole tiles, tails in every direction, several tiles a block, rows that are no multiple of
/// 16 bytes, and next to nothing.
const SHAPES: [Shape; 5] =
    [(256, 128, 256), (300, 72, 600), (129, 136, 1304), (70, 37, 131), (1, 8, 8)];
/// The same for the kernels with a scalar sum a thread: tiles of 16 and 64, none of which waits for
/// another, one tile a block.
const SCALAR_SHAPES: [Shape; 4] = [(128, 64, 128), (70, 72, 200), (70, 37, 131), (1, 8, 8)];
/// Nothing depends on a shape where there is no bias: these have whole tiles and tails.
const WITHOUT_BIAS: [Shape; 2] = [(300, 72, 600), (70, 72, 200)];

fn shapes(kernel: &LinearSpec) -> &'static [Shape] {
    let is_scalar = ["linear_naive", "linear_tiled"].contains(&kernel.name);
    if is_scalar { &SCALAR_SHAPES } else { &SHAPES }
}

/// The terms of each element of what a product computes, and what is added to their sum.
type Sums<'a> = Box<dyn Fn(usize, usize) -> (Vec<f64>, f64) + 'a>;

/// The worst error of a kernel against sums in f64, and its measure: the error of sums in f32, one after
/// the other, rounded to the storage type. Of each result: a weight's gradient comes with the bias's.
fn worst(
    memory: &Arc<Memory>,
    kernel: &'static LinearSpec,
    p: &Projection,
    with_bias: bool,
) -> Result<Vec<(f64, Yardstick)>, flash_attention::Error> {
    let device = &**memory.device();
    let plan = kernel.plan(p, &Target::of(device))?;
    let Projection { rows, in_features, out_features, .. } = *p;
    let random = |shape: &[usize], seed| Tensor::random(p.dtype, shape, seed, 0.0);
    let x = random(&[rows, in_features], 1);
    let w = random(&[out_features, in_features], 2);
    let bias = random(&[if with_bias { out_features } else { 0 }], 3);
    let y = random(&[rows, out_features], 4);
    let tensors = [&x, &w, &bias, &y];
    let results: &[usize] = match p.product {
        LinearProduct::Y => &[3],
        LinearProduct::Dx => &[0],
        LinearProduct::Dw if with_bias => &[1, 2],
        LinearProduct::Dw => &[1],
    };
    let mut buffers = Vec::new();
    for (index, tensor) in tensors.iter().enumerate() {
        buffers.push(if results.contains(&index) {
            memory.filled(tensor.as_bytes().len() as u64, 0xff)?
        } else {
            memory.upload(tensor.as_bytes())?
        });
    }
    let [bx, bw, bbias, by] = [0, 1, 2, 3].map(|index| buffers[index].region());
    let args = LinearArgs { x: bx, w: bw, bias: with_bias.then_some(bbias), y: by };
    for launch in plan.launches_for(device, &args)? {
        // SAFETY: the arguments are the buffers above, which live until the end.
        unsafe { device.launch(&launch)? };
    }
    device.synchronize()?;

    let [x, w, bias, y] = tensors.map(Tensor::to_f64);
    let of = |result: usize| -> Result<_, flash_attention::Error> {
        let mut found = tensors[result].clone();
        buffers[result].read(found.as_bytes_mut())?;
        let [x, w, bias, y] = [&x, &w, &bias, &y];
        let (sums, columns): (Sums<'_>, usize) = match result {
            3 => (
                Box::new(move |r, o| {
                    let term = |i| x[r * in_features + i] * w[o * in_features + i];
                    let bias = bias.get(o).copied().unwrap_or(0.0);
                    ((0..in_features).map(term).collect(), bias)
                }),
                out_features,
            ),
            0 => (
                Box::new(move |r, i| {
                    let term = |o| y[r * out_features + o] * w[o * in_features + i];
                    ((0..out_features).map(term).collect(), 0.0)
                }),
                in_features,
            ),
            1 => (
                Box::new(move |o, i| {
                    let term = |r| y[r * out_features + o] * x[r * in_features + i];
                    ((0..rows).map(term).collect(), 0.0)
                }),
                in_features,
            ),
            _ => {
                let column =
                    move |_, o| ((0..rows).map(|r| y[r * out_features + o]).collect(), 0.0);
                (Box::new(column), out_features)
            }
        };
        Ok(compared(p.dtype, &found.to_f64(), columns, &sums))
    };
    results.iter().map(|&result| of(result)).collect()
}

/// The error of a result, and its measure.
fn compared(dtype: DType, found: &[f64], columns: usize, sums: &Sums<'_>) -> (f64, Yardstick) {
    let (mut expected, mut plain) = (Vec::new(), Vec::new());
    for index in 0..found.len() {
        let (terms, more) = sums(index / columns, index % columns);
        let sum = terms.iter().fold(0.0f32, |sum, term| (f64::from(sum) + term) as f32);
        expected.push(terms.iter().sum::<f64>() + more);
        plain.push(dtype.round(f64::from(sum) + more));
    }
    // NaN, which results were filled with, is an infinite error.
    let error = Differences::new(found, &expected).max_abs;
    let plain = Differences::new(&plain, &expected);
    // The plain sum of a few terms may be exact by luck.
    let rounding = dtype.unit_roundoff() * plain.max_expected;
    (error, Yardstick::new(plain.max_abs, rounding))
}

fn every_kernel(device: Arc<dyn Device>) {
    const PRODUCTS: [LinearProduct; 3] = [LinearProduct::Y, LinearProduct::Dx, LinearProduct::Dw];
    let memory = Memory::new(device);
    let target = Target::of(&**memory.device());
    let problems = LINEAR_KERNELS.iter().flat_map(|kernel| {
        let of_type = move |&dtype| {
            shapes(kernel).iter().flat_map(move |&(rows, in_features, out_features)| {
                PRODUCTS.map(|product| {
                    (kernel, Projection { dtype, rows, in_features, out_features, product })
                })
            })
        };
        kernel.dtypes.iter().flat_map(of_type)
    });
    let with_bias = problems.clone().map(|(kernel, p)| (kernel, p, true));
    let without = |&(_, p): &(&LinearSpec, Projection)| {
        WITHOUT_BIAS.contains(&(p.rows, p.in_features, p.out_features))
    };
    let without = problems.filter(without).map(|(kernel, p)| (kernel, p, false));
    let results = suite::on_every_core(with_bias.chain(without), |(kernel, p, bias)| {
        let failure = match worst(&memory, kernel, &p, bias) {
            Ok(results) => results.into_iter().find(|(error, plain)| !plain.allows(*error)).map(
                |(error, plain)| {
                    format!("{} {p:?} {bias}: {error} > {}", kernel.name, plain.limit())
                },
            ),
            Err(error) if error.is_usage() => {
                println!("skipped: {error}");
                return None;
            }
            Err(error) => panic!("{} {p:?}: {error}", kernel.name),
        };
        Some((kernel.name, failure))
    });
    for kernel in LINEAR_KERNELS {
        let ran = results.iter().flatten().any(|(name, _)| *name == kernel.name);
        assert!(ran || kernel.runs_on(&target).is_err(), "{} ran nothing", kernel.name);
    }
    let failures: Vec<String> = results.into_iter().flatten().filter_map(|(_, f)| f).collect();
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn every_linear_kernel_on_the_emulator() {
    every_kernel(suite::emulator());
}

#[test]
fn every_linear_kernel_on_a_gpu() {
    suite::on_a_gpu(|gpu| every_kernel(gpu.clone()));
}

/// What [`probe::probe`] says that it adds, by several clusters.
fn run_probe(device: Arc<dyn Device>) {
    const CLUSTERS: u32 = 5;
    let memory = Memory::new(device);
    let device = memory.device();
    let elements = probe::THREADS as usize;
    let start = vec![0.5f32; elements];
    let sums = memory.upload(&start).unwrap();
    let row = u64::from(probe::THREADS) * 4;
    let map = TensorMapSpec {
        address: sums.address(),
        dtype: DType::F32,
        dims: vec![probe::THREADS.into(), 1, 1, 1],
        strides_bytes: vec![row; 3],
        box_dims: probe::BOX.to_vec(),
        swizzle_bytes: 0,
    };
    let map = TensorMap(device.encode_tensor_map(&map).unwrap());
    let args = ProbeArgs { maps: [map], args: () };
    let launch = |blocks: u32| Launch {
        entry: kernels_gpu::find("cluster_probe_f32").unwrap(),
        constants: Constants::default(),
        grid: blocks.into(),
        block: probe::THREADS.into(),
        shared_bytes: probe::SHARED_BYTES,
        args: args.to_launch_bytes(),
    };
    // SAFETY: the sums and their map live until the end.
    unsafe { device.launch(&launch(probe::CLUSTER * CLUSTERS)) }.unwrap();
    device.synchronize().unwrap();
    let mut found = vec![0f32; elements];
    sums.read(&mut found).unwrap();
    // Every block's numbers arrive at the other block of its cluster, twice.
    let blocks = (0..probe::CLUSTER * CLUSTERS).map(|block| 2000 * block).sum::<u32>();
    for (t, found) in found.into_iter().enumerate() {
        let expected = 0.5 + (blocks + 2 * probe::CLUSTER * CLUSTERS * t as u32) as f32;
        assert_eq!(found, expected, "element {t}");
    }
    // A grid that clusters do not divide is refused.
    // SAFETY: as above.
    let refused = unsafe { device.launch(&launch(3)) }.unwrap_err().to_string();
    assert!(refused.contains("cluster") && refused.contains('3'), "{refused}");
}

#[test]
fn clusters_on_the_emulator() {
    run_probe(suite::emulator());
}

#[test]
fn clusters_on_a_gpu() {
    suite::on_a_gpu(|gpu| {
        if gpu.compute_capability() == (9, 0) {
            run_probe(gpu.clone());
        } else {
            suite::skipped(&format!("{} has no clusters", gpu.name()));
        }
    });
}
