//! Whole runs on the GPU backend: every kernel of the registry, on a driver whose GPU
//! is the emulator, gives bit for bit what the CPU backend gives.

use std::sync::Arc;

use crate::{Gpu, fake_driver::open};
use flash_attention::{
    CpuDevice, DType, Error, Problem, Tensor,
    module::{MultiHeadAttention, Pass, Weights},
    registry::{self, KERNELS},
    session::{Inputs, MemoryReport, Outputs, Session},
};

fn gpu() -> Session {
    Session::new(Arc::new(Gpu::open(0).expect("the fake GPU")))
}

pub fn problem(dtype: DType, head_dim: usize) -> Problem {
    Problem::builder(2, 2, 33, head_dim).seq_k(70).dtype(dtype).causal(true).build().unwrap()
}

/// Q, K and V.
pub fn inputs(problem: &Problem) -> [Tensor; 3] {
    [
        Tensor::random(problem.dtype(), &problem.q_shape(), 1, 0.0),
        Tensor::random(problem.dtype(), &problem.k_shape(), 2, 0.0),
        Tensor::random(problem.dtype(), &problem.k_shape(), 3, 1.0),
    ]
}

pub fn run(
    session: &Session,
    kernel: &str,
    problem: &Problem,
) -> Result<(Outputs, MemoryReport), Error> {
    let [q, k, v] = &inputs(problem);
    session.run(registry::find(kernel)?, problem, &Inputs::new(q, k, v))
}

#[test]
fn every_kernel_gives_on_the_gpu_backend_what_it_gives_on_the_cpu() {
    let fake = open();
    let cpu = Session::new(Arc::new(CpuDevice::new()));
    let gpu = gpu();
    for kernel in KERNELS {
        for &dtype in kernel.dtypes {
            let problem = problem(dtype, kernel.limits.head_dims[0]);
            if kernel.supports(&problem, &cpu.target()).is_err() {
                continue;
            }
            let context = format!("{} {dtype}", kernel.name);
            let (expected, _) = run(&cpu, kernel.name, &problem).expect(&context);
            let (outputs, report) = run(&gpu, kernel.name, &problem).expect(&context);
            assert_eq!(outputs.o.as_bytes(), expected.o.as_bytes(), "{context}: O");
            assert_eq!(outputs.lse.as_bytes(), expected.lse.as_bytes(), "{context}: LSE");
            let plan = kernel.plan(&problem, &gpu.target()).expect(&context);
            assert_eq!(report.peak, plan.peak_bytes(), "{context}");
            assert_eq!(fake.used_bytes(), 0, "{context}: memory was left");
        }
    }
}

#[test]
fn the_module_gives_on_the_gpu_backend_what_it_gives_on_the_cpu() {
    let fake = open();
    for kernel in ["naive", "flash_tiled"] {
        let run = |session: &Session| {
            let weights = Weights::random(DType::F16, 128, 1).unwrap();
            let module = MultiHeadAttention::new(session, &weights, 2).unwrap();
            let x = Tensor::random(DType::F16, &[1, 40, 128], 2, 0.0);
            let pass = Pass { causal: true, weights: true, ..Pass::default() };
            module.forward(registry::find(kernel).unwrap(), &x, None, &pass).unwrap()
        };
        let (expected, memory) = run(&Session::new(Arc::new(CpuDevice::new())));
        let (outputs, on_gpu) = run(&gpu());
        assert_eq!(outputs.y, expected.y, "{kernel}");
        assert_eq!(outputs.weights, expected.weights, "{kernel}");
        assert_eq!(on_gpu, memory, "{kernel}");
        assert_eq!(fake.used_bytes(), 0, "{kernel}: memory was left");
    }
}

#[test]
fn a_problem_that_does_not_fit_is_out_of_memory_and_the_next_one_runs() {
    let fake = open();
    let gpu = gpu();
    let problem = problem(DType::F32, 64);
    let peak = |kernel| {
        registry::find(kernel).unwrap().plan(&problem, &gpu.target()).unwrap().peak_bytes()
    };
    let (flash, naive) = (peak("flash_tiled"), peak("naive"));
    assert!(flash < naive);
    fake.set_memory_bytes(naive - 1);
    match run(&gpu, "naive", &problem) {
        Err(Error::OutOfMemory { needed, free, .. }) => {
            assert_eq!((needed, free), (naive, naive - 1));
        }
        Err(other) => panic!("another error: {other}"),
        Ok(_) => panic!("ran in less memory than it needs"),
    }
    run(&gpu, "flash_tiled", &problem).expect("flash_tiled fits");
}

/// What the memory is taken by in between cannot be foreseen: the allocation fails.
#[test]
fn memory_that_is_gone_in_spite_of_the_forecast_is_out_of_memory_too() {
    let fake = open();
    let gpu = gpu();
    let problem = problem(DType::F32, 64);
    let kernel = registry::find("flash_tiled").unwrap();
    // Calls until the first allocation: four for the forecast, two for the context.
    fake.fail_after(6, 2);
    let error = run(&gpu, kernel.name, &problem).unwrap_err();
    assert!(error.is_out_of_memory(), "{error}");
    assert_eq!(fake.used_bytes(), 0);
    run(&gpu, kernel.name, &problem).expect("the device survives");
}

#[test]
fn a_gpu_before_turing_can_run_nothing_and_each_kernel_says_why() {
    let fake = open();
    fake.set_compute_capability(6, 1);
    let gpu = gpu();
    for kernel in KERNELS {
        let error = kernel.runs_on(&gpu.target()).unwrap_err();
        assert!(error.to_string().contains("6.1"), "{error}");
    }
    assert!(!gpu.device().is_emulated());
}
