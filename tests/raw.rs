//! Plans on a GPU, in a context and on streams of the test's own: captured in a CUDA graph, on
//! two streams at once, and what an enqueue costs the host. Skipped without a GPU.

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

fn problem(d: usize, causal: bool) -> Problem {
    Problem::builder(2, 3, 300, d).dtype(DType::F16).causal(causal).build().unwrap()
}

/// Waits for every stream of the context.
fn synchronize_all(gpu: &GpuDevice) {
    type Synchronize = unsafe extern "C" fn() -> u32;
    let synchronize = driver("cuCtxSynchronize");
    with_context(gpu, || {
        // SAFETY: the function takes nothing.
        let code = unsafe { std::mem::transmute::<*const c_void, Synchronize>(synchronize)() };
        assert_eq!(code, 0);
    });
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

/// A function of the driver that the library has no use for.
fn driver(name: &str) -> *const c_void {
    let path = &cuda_driver::status().expect("a driver").library;
    // SAFETY: the driver is open already, and stays open.
    let library = unsafe { libloading::Library::new(path) }.unwrap();
    // SAFETY: only the address is taken.
    let address = unsafe { *library.get::<*const c_void>(name).unwrap() };
    std::mem::forget(library);
    address
}

/// Calls a function of the driver that returns a result code.
macro_rules! call {
    ($name:literal($($type:ty),*)($($arg:expr),*)) => {{
        let function = driver($name);
        // SAFETY: the driver's function of that name has this signature; each use below passes
        // live handles and places.
        let code = unsafe {
            std::mem::transmute::<*const c_void, unsafe extern "C" fn($($type),*) -> u32>(function)($($arg),*)
        };
        assert_eq!(code, 0, $name);
    }};
}

/// A thousand replays of a captured launch give the same bits as a plain one.
#[test]
fn a_captured_launch_replays() {
    const REPLAYS: usize = 1000;
    let Some(gpu) = gpu() else { return };
    for kernel in KERNELS {
        for (d, causal) in [(64, true), (128, false)] {
            let Some(call) = Call::new(&gpu, kernel.name, &problem(d, causal), 1) else { continue };
            call.enqueue(&gpu, ptr::null_mut());
            let expected = call.o(&gpu);
            with_context(&gpu, || {
                let stream = functions::stream_create(1).unwrap();
                let (mut graph, mut executable) = (ptr::null_mut(), ptr::null_mut());
                call!("cuStreamBeginCapture_v2"(*mut c_void, u32)(stream, 0));
                call.enqueue(&gpu, stream);
                call!("cuStreamEndCapture"(*mut c_void, *mut *mut c_void)(stream, &raw mut graph));
                call!("cuGraphInstantiateWithFlags"(*mut *mut c_void, *mut c_void, u64)(&raw mut executable, graph, 0));
                for replay in 0..REPLAYS {
                    call!("cuGraphLaunch"(*mut c_void, *mut c_void)(executable, stream));
                    if replay % 100 == 99 {
                        let o = call.o(&gpu);
                        assert!(o == expected, "{} D {d}: replay {replay} differs", kernel.name);
                    }
                }
                call!("cuGraphExecDestroy"(*mut c_void)(executable));
                call!("cuGraphDestroy"(*mut c_void)(graph));
                // SAFETY: made above, and empty.
                unsafe { functions::stream_destroy(stream) }.unwrap();
            });
            println!("{} D {d}: {REPLAYS} replays give the same bits", kernel.name);
        }
    }
}

/// Two streams at once, each with a workspace of its own, give what each gives alone.
#[test]
fn two_streams_at_once_do_not_disturb_each_other() {
    let Some(gpu) = gpu() else { return };
    for kernel in ["flash_pipelined", "flash_hopper", "standard"] {
        let calls = [1, 10].map(|seed| Call::new(&gpu, kernel, &problem(64, true), seed));
        let [Some(a), Some(b)] = calls else { continue };
        let expected = [&a, &b].map(|call| {
            call.enqueue(&gpu, ptr::null_mut());
            call.o(&gpu)
        });
        with_context(&gpu, || {
            let streams = [(); 2].map(|()| functions::stream_create(1).unwrap());
            for _ in 0..200 {
                a.enqueue(&gpu, streams[0]);
                b.enqueue(&gpu, streams[1]);
            }
            assert_eq!([a.o(&gpu), b.o(&gpu)], expected, "{kernel}");
            for stream in streams {
                // SAFETY: made above, and empty.
                unsafe { functions::stream_destroy(stream) }.unwrap();
            }
        });
    }
}

/// Streams 0, 1 and 2 are the default ones.
#[test]
fn default_streams_are_taken() {
    let Some(gpu) = gpu() else { return };
    let Some(call) = Call::new(&gpu, "flash_mma", &problem(64, false), 1) else { return };
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
