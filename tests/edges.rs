//! Every kernel of the registry, in every storage type, on every edge, against f64 by
//! the 2x rule: on the emulator, and on a GPU where there is one.

mod suite;

use std::sync::Arc;

use flash_attention::{DType, Device, Problem, Tensor, problem::Dropout, session::Inputs};
use flash_attention::{session::Session, verify::FACTOR};
use kernels_gpu::parts::dropout;

/// Runs the suite; prints a line for each kernel and type.
fn run(device: &Arc<dyn Device>) {
    let target = flash_attention::registry::Target::of(&**device);
    let failures = suite::on_every_core(suite::kernels(), |(kernel, dtype)| {
        if let Err(reason) = kernel.runs_on(&target) {
            println!("skipped: {reason}");
            return Vec::new();
        }
        let (mut passed, mut unsupported, mut worst) = (0, 0, 0f64);
        let mut failures = Vec::new();
        let mut cases = suite::edges(kernel, dtype);
        if device.is_emulated() {
            cases = suite::thinned(dtype, cases);
        }
        for case in cases {
            match case.check(device, kernel) {
                Ok(Some(result)) => {
                    passed += 1;
                    worst = worst.max(result.o.max_abs / result.credit.o.error());
                }
                Ok(None) => unsupported += 1,
                Err(what) => failures.push(what),
            }
        }
        println!(
            "{} {dtype}: {passed} pass, {unsupported} not supported; largest error of O is \
             {worst:.2} times the plain algorithm's (allowed {FACTOR})",
            kernel.name
        );
        failures
    });
    let failures = failures.concat();
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn every_kernel_on_every_edge_on_the_emulator() {
    run(&suite::emulator());
}

#[test]
fn every_kernel_on_every_edge_on_a_gpu() {
    suite::on_a_gpu(run);
}

/// Which weights are dropped is the same in every kernel, to the bit: with V the identity
/// matrix, O is the matrix of weights.
#[test]
fn every_kernel_drops_the_same_weights() {
    const N: usize = 64;
    for (kernel, dtype) in suite::kernels() {
        let problem = Problem::builder(2, 2, N, N).dtype(dtype);
        let problem = problem.dropout(Some(Dropout { p: 0.3, seed: 99 })).build().unwrap();
        if !kernel.limits.features.dropout || !kernel.limits.head_dims.contains(&N) {
            continue;
        }
        let identity = |i: usize| f64::from(u8::from(i / N % N == i % N));
        let v: Vec<f64> = (0..problem.k_elements()).map(identity).collect();
        let v = Tensor::from_f64(dtype, &problem.k_shape(), &v).unwrap();
        let q = Tensor::random(dtype, &problem.q_shape(), 1, 0.0);
        let k = Tensor::random(dtype, &problem.k_shape(), 2, 0.0);
        let inputs = Inputs::new(&q, &k, &v);
        let session = Session::new(suite::emulator());
        let (outputs, _) = session.run(kernel, &problem, &inputs).unwrap();
        let args = problem.dropout_args();
        for (index, weight) in outputs.o.to_f64().into_iter().enumerate() {
            let (b, h) = (index / (2 * N * N), index / (N * N) % 2);
            let (i, j) = (index / N % N, index % N);
            let keeps = dropout::keeps(&args, b as u32, h as u32, i as u32, j as u32);
            assert_eq!(weight != 0.0, keeps, "{} {dtype} b {b} h {h} i {i} j {j}", kernel.name);
        }
        if let Some(weights) = outputs.weights {
            assert_eq!(weights.to_f64(), outputs.o.to_f64(), "{} {dtype}", kernel.name);
        }
    }
}

/// The same inputs give the same bits, however blocks are scheduled.
#[test]
fn results_are_the_same_every_time() {
    for (kernel, dtype) in suite::kernels().filter(|&(_, dtype)| dtype != DType::BF16) {
        let problem = Problem::builder(2, 2, 65, kernel.limits.head_dims[0]).dtype(dtype);
        let case = suite::Case::new("repeat", problem.build().unwrap());
        let run = || case.run(&suite::emulator(), kernel).unwrap();
        let (first, second) = (run(), run());
        assert_eq!((first.o, first.lse), (second.o, second.lse), "{} {dtype}", kernel.name);
    }
}
