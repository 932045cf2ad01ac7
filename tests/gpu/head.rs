//! One head of attention on a device, a launch that computes it, and the calling thread's
//! context.

use std::{ffi::c_void, sync::Arc};

use cuda_driver::functions;
use flash_attention::{
    Error,
    backend::{Constants, Device, DeviceBuffer, KernelArgs, Launch, Memory},
};
use kernels_gpu::{
    args::{AttentionArgs, Buffer, Scores, Shape, Tensor, Tensors},
    forward::flash_tiled,
};
use simt::{Dim3, emulator};

use crate::Gpu;

pub const ROWS: u32 = 40;
const HEAD_DIM: u64 = 64;
pub const ELEMENTS: usize = ROWS as usize * HEAD_DIM as usize;
pub const SYMBOL: &str = "flash_tiled_f32_d64";

pub fn gpu() -> Arc<Gpu> {
    Arc::new(Gpu::open(0).expect("the fake GPU"))
}

pub fn memory(gpu: &Arc<Gpu>) -> Arc<Memory> {
    Memory::new(gpu.clone())
}

fn values(seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 40) as f32 / (1u32 << 24) as f32 - 0.5
    };
    (0..ELEMENTS).map(|_| next()).collect()
}

fn tensor(address: u64, bytes: u64) -> Tensor {
    let stride = u64::from(ROWS) * HEAD_DIM;
    Tensor {
        buffer: Buffer { address, bytes },
        stride_b: stride,
        stride_h: stride,
        stride_n: HEAD_DIM,
    }
}

/// One head of attention, with its outputs in `o` and `lse`.
fn args(inputs: [(u64, u64); 3], o: (u64, u64), lse: (u64, u64)) -> AttentionArgs {
    let [q, k, v] = inputs.map(|(address, bytes)| tensor(address, bytes));
    AttentionArgs {
        tensors: Tensors {
            q,
            k,
            v,
            o: tensor(o.0, o.1),
            lse: Buffer { address: lse.0, bytes: lse.1 },
        },
        shape: Shape { batch: 1, heads: 1, seq_q: ROWS, seq_k: ROWS, ..Shape::default() },
        scores: Scores { scale_log2: 0.125 * std::f32::consts::LOG2_E, ..Scores::default() },
        ..AttentionArgs::default()
    }
}

pub fn launch_of(symbol: &str, args: &AttentionArgs) -> Launch {
    Launch {
        entry: kernels_gpu::find(symbol).expect("an entry"),
        constants: Constants { causal: 1, ..Constants::default() },
        grid: Dim3::new(ROWS.div_ceil(flash_tiled::BR), 1, 1),
        block: Dim3::new(flash_tiled::THREADS, 1, 1),
        shared_bytes: flash_tiled::shared_bytes(HEAD_DIM as usize),
        args: args.to_launch_bytes(),
    }
}

/// Starts a launch of [`launch_of`].
pub fn start(gpu: &Gpu, launch: &Launch) -> Result<(), Error> {
    // SAFETY: each test keeps the buffers of its launches until it has waited for them; launches
    // that do not fit are refused.
    unsafe { gpu.launch(launch) }
}

/// Inputs and outputs of one head on a device.
pub struct Head {
    inputs: [DeviceBuffer; 3],
    pub o: DeviceBuffer,
    pub lse: DeviceBuffer,
}

impl Head {
    pub fn new(memory: &Arc<Memory>) -> Result<Self, Error> {
        Ok(Self {
            inputs: [
                memory.upload(&values(1))?,
                memory.upload(&values(2))?,
                memory.upload(&values(3))?,
            ],
            o: memory.allocate(ELEMENTS as u64 * 4)?,
            lse: memory.allocate(u64::from(ROWS) * 4)?,
        })
    }

    pub fn args(&self) -> AttentionArgs {
        let at = |buffer: &DeviceBuffer| (buffer.address(), buffer.bytes());
        args(self.inputs.each_ref().map(at), at(&self.o), at(&self.lse))
    }
}

/// What the emulator makes of the same problem without any driver between.
pub fn expected(symbol: &str) -> (Vec<f32>, Vec<f32>) {
    let inputs = [values(1), values(2), values(3)];
    let (mut o, mut lse) = (vec![f32::NAN; ELEMENTS], vec![f32::NAN; ROWS as usize]);
    let at = |data: *const f32, len: usize| (data as u64, len as u64 * 4);
    let args = args(
        inputs.each_ref().map(|data| at(data.as_ptr(), ELEMENTS)),
        at(o.as_mut_ptr(), ELEMENTS),
        at(lse.as_mut_ptr(), ROWS as usize),
    );
    let launch = launch_of(symbol, &args);
    let entry = kernels_gpu::find(symbol).expect("an entry");
    let extent = emulator::Launch {
        grid: launch.grid,
        block: launch.block,
        cluster: entry.cluster,
        shared_bytes: launch.shared_bytes,
    };
    // SAFETY: the arguments are the entry's, and the vectors outlive the launch.
    let run = || unsafe { (entry.run)((&raw const args).cast()) };
    let options = emulator::Options { constants: launch.constants.values(), ..Default::default() };
    emulator::launch_with(extent, &options, &run).expect("no fault");
    (o, lse)
}

/// A launch whose kernel writes beyond the end of O.
pub fn faulty_launch(head: &Head) -> Launch {
    let mut args = head.args();
    args.tensors.o.buffer.bytes /= 2;
    launch_of(SYMBOL, &args)
}

/// The calling thread's context.
pub fn current() -> *mut c_void {
    functions::ctx_current().expect("the fake driver")
}

/// Makes a context the calling thread's.
pub fn set_current(context: *mut c_void) {
    // SAFETY: null, or a context that the test keeps.
    unsafe { functions::ctx_set_current(context) }.expect("a live context");
}

/// Waits for a stream of the calling thread's context.
pub fn synchronize(stream: *mut c_void) -> Result<(), cuda_driver::Failure> {
    // SAFETY: tests pass default streams and streams that live; their context is current.
    unsafe { functions::stream_synchronize(stream) }
}
