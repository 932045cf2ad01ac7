//! Plans on a GPU, in a context and on streams of the test's own: captured in a CUDA graph, on
//! two streams at once, and what an enqueue costs the host. Skipped without a GPU.

#[path = "gpu/graph.rs"]
#[macro_use]
mod graph;

use std::{
    ffi::c_void,
    io::Write as _,
    ptr,
    sync::Arc,
    time::{Duration, Instant},
};

use cuda_driver::functions;
use flash_attention::{
    DType, Device, GpuDevice, Problem, Tensor,
    backend::{DeviceBuffer, DeviceTensor, Memory},
    raw::{Args, Plan, View},
    registry::{self, KERNELS},
};
use graph::{Graph, OwnStream};

/// The GPU, or a line that says why the test did not run.
fn gpu() -> Option<Arc<GpuDevice>> {
    match GpuDevice::open(0) {
        Ok(gpu) => Some(Arc::new(gpu)),
        Err(error) => {
            // Straight to stderr: the harness keeps what a passing test prints.
            let mut stderr = std::io::stderr();
            writeln!(stderr, "skipped: {error}").unwrap();
            None
        }
    }
}

/// A problem with its tensors and a workspace.
struct Call {
    plan: Plan,
    inputs: [DeviceTensor; 3],
    o: DeviceTensor,
    workspace: DeviceBuffer,
}

impl Call {
    fn new(gpu: &Arc<GpuDevice>, kernel: &str, problem: &Problem, seed: u64) -> Option<Self> {
        let memory = Memory::new(gpu.clone());
        let kernel = registry::find(kernel).unwrap();
        let plan = Plan::new(problem, &gpu.context().target(), kernel).ok()?;
        let tensor = |shape: [usize; 4], seed| {
            let tensor = Tensor::random(problem.dtype(), &shape, seed, 0.0);
            DeviceTensor::upload(&memory, &tensor).unwrap()
        };
        let (q, k) = (problem.q_shape(), problem.k_shape());
        gpu.context().prepare(plan.entries()).unwrap();
        Some(Self {
            inputs: [tensor(q, seed), tensor(k, seed + 1), tensor(k, seed + 2)],
            o: DeviceTensor::filled(&memory, problem.dtype(), &q, 0xff).unwrap(),
            workspace: memory.filled(plan.workspace_bytes(), 0).unwrap(),
            plan,
        })
    }

    fn args(&self) -> Args {
        let p = self.plan.problem();
        let view = |tensor: &DeviceTensor, seq| {
            View::contiguous(tensor.region(), p.layout(), p.heads(), seq, p.head_dim())
        };
        let [q, k, v] = &self.inputs;
        let (nq, nk) = (p.seq_q(), p.seq_k());
        Args::new(view(q, nq), view(k, nk), view(v, nk), view(&self.o, nq))
            .workspace(self.workspace.region())
    }

    fn enqueue(&self, gpu: &GpuDevice, stream: *mut c_void) {
        // SAFETY: the stream is of the GPU's context; the tensors belong to this value, which
        // every test keeps until it has waited; the workspace was zeroed, and is this call's.
        unsafe { gpu.context().enqueue(&self.plan, &self.args(), stream) }.unwrap();
    }

    /// O, after everything on the GPU has ended.
    fn o(&self, gpu: &GpuDevice) -> Tensor {
        synchronize_all(gpu);
        self.o.to_host().unwrap()
    }
}

fn problem(dtype: DType, d: usize, causal: bool) -> Problem {
    Problem::builder(2, 3, 300, d).dtype(dtype).causal(causal).build().unwrap()
}

/// Waits for every stream of the context.
fn synchronize_all(gpu: &GpuDevice) {
    with_context(gpu, functions::ctx_synchronize).unwrap();
}

/// Makes the GPU's context the thread's during `work`.
fn with_context<T>(gpu: &GpuDevice, work: impl FnOnce() -> T) -> T {
    // SAFETY: the context lives as long as the GPU.
    unsafe {
        let before = functions::ctx_current().unwrap();
        functions::ctx_set_current(gpu.context().handle()).unwrap();
        let result = work();
        functions::ctx_set_current(before).unwrap();
        result
    }
}

/// A thousand replays of a captured launch give the same bits as a plain one.
#[test]
fn a_captured_launch_replays() {
    const REPLAYS: usize = 1000;
    let Some(gpu) = gpu() else { return };
    for kernel in KERNELS {
        for (d, causal) in [(64, true), (128, false)] {
            let dtype = *kernel.dtypes.last().unwrap();
            let problem = problem(dtype, d, causal);
            let Some(call) = Call::new(&gpu, kernel.name, &problem, 1) else { continue };
            call.enqueue(&gpu, ptr::null_mut());
            let expected = call.o(&gpu);
            with_context(&gpu, || {
                let stream = OwnStream::new();
                let graph = Graph::capture(stream.0, || call.enqueue(&gpu, stream.0)).unwrap();
                let o = call.o.region();
                for replay in 0..REPLAYS {
                    // SAFETY: O is used in this stream alone until it is waited for.
                    unsafe { functions::fill(o.address, 0xff, o.bytes as usize, stream.0) }
                        .unwrap();
                    graph.launch(stream.0).unwrap();
                    if replay % 100 == 99 {
                        let o = call.o(&gpu);
                        assert!(
                            o == expected,
                            "{} {dtype} D {d}: replay {replay} differs",
                            kernel.name
                        );
                    }
                }
            });
            println!("{} {dtype} D {d}: {REPLAYS} replays give the same bits", kernel.name);
        }
    }
}

/// Two streams at once, each with a workspace of its own, give what each gives alone.
#[test]
fn two_streams_at_once_do_not_disturb_each_other() {
    let Some(gpu) = gpu() else { return };
    for kernel in ["flash_pipelined", "flash_hopper", "standard"] {
        let calls =
            [1, 10].map(|seed| Call::new(&gpu, kernel, &problem(DType::F16, 64, true), seed));
        let [Some(a), Some(b)] = calls else { continue };
        let expected = [&a, &b].map(|call| {
            call.enqueue(&gpu, ptr::null_mut());
            call.o(&gpu)
        });
        with_context(&gpu, || {
            let streams = [(); 2].map(|()| OwnStream::new());
            for _ in 0..200 {
                a.enqueue(&gpu, streams[0].0);
                b.enqueue(&gpu, streams[1].0);
            }
            assert_eq!([a.o(&gpu), b.o(&gpu)], expected, "{kernel}");
        });
    }
}

/// Streams 0, 1 and 2 are the default ones.
#[test]
fn default_streams_are_taken() {
    let Some(gpu) = gpu() else { return };
    let Some(call) = Call::new(&gpu, "flash_mma", &problem(DType::F16, 64, false), 1) else {
        return;
    };
    call.enqueue(&gpu, ptr::null_mut());
    let expected = call.o(&gpu);
    for stream in [1, 2] {
        call.enqueue(&gpu, ptr::without_provenance_mut(stream));
        assert_eq!(call.o(&gpu), expected, "stream {stream}");
    }
}

/// Prints the host's time for an enqueue of a prepared plan: the median of batches that the
/// launch queue has room for.
#[test]
fn an_enqueue_costs_the_host_little() {
    const BATCH: u32 = 100;
    let Some(gpu) = gpu() else { return };
    for (kernel, d) in
        [("flash_hopper", 64), ("flash_hopper", 128), ("flash_pipelined", 64), ("flash_tiled", 64)]
    {
        let p = Problem::builder(1, 2, 64, d).dtype(DType::F16).build().unwrap();
        let Some(call) = Call::new(&gpu, kernel, &p, 1) else { continue };
        let mut costs: Vec<Duration> = (0..50)
            .map(|_| {
                synchronize_all(&gpu);
                with_context(&gpu, || {
                    let start = Instant::now();
                    for _ in 0..BATCH {
                        call.enqueue(&gpu, ptr::null_mut());
                    }
                    start.elapsed() / BATCH
                })
            })
            .collect();
        costs.sort_unstable();
        let median = costs[costs.len() / 2];
        println!("{kernel} D {d}: {:.2} µs per enqueue", median.as_secs_f64() * 1e6);
        if !gpu.is_emulated() && !cfg!(debug_assertions) {
            assert!(median < Duration::from_micros(20), "{kernel}: {median:?}");
        }
    }
}
