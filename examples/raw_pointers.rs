//! Addresses, strides and a workspace of the caller's: for programs that own device memory
//! already. The launches here run on the emulator, whose memory is the host's; on a GPU the same
//! plan and arguments go to `raw::Context::enqueue`, with a stream of the caller's.
//!
//! ```sh
//! cargo run --example raw_pointers
//! ```

use flash_attention::{
    CpuDevice, DType, Device, Error, Problem,
    half::f16,
    raw::{Args, Plan, Region, View},
    registry::{self, Target},
};

/// Vectors that are aligned as device memory is.
#[repr(align(256))]
#[derive(Clone)]
struct Aligned([f16; TOKENS * 3 * HIDDEN]);

const TOKENS: usize = 40;
const HEADS: usize = 2;
const HEAD_DIM: usize = 64;
const HIDDEN: usize = HEADS * HEAD_DIM;

fn main() -> Result<(), Error> {
    let device = CpuDevice::new();
    let problem =
        Problem::builder(1, HEADS, TOKENS, HEAD_DIM).dtype(DType::F16).causal(true).build()?;
    let target = Target::of(&device);
    let kernel = registry::find("flash_pipelined")?;
    // Planned once; no GPU is needed for it.
    let plan = Plan::new(&problem, &target, kernel)?;

    // Q, K and V side by side, as one projection writes them: [N, 3, H, D].
    let mut qkv = Box::new(Aligned([f16::ZERO; TOKENS * 3 * HIDDEN]));
    for (i, x) in qkv.0.iter_mut().enumerate() {
        *x = f16::from_f32((i as f32 * 0.37).sin());
    }
    let mut o = Box::new(Aligned([f16::NAN; TOKENS * 3 * HIDDEN]));
    let mut workspace = vec![0u128; plan.workspace_bytes().div_ceil(16) as usize];

    let bytes = (TOKENS * 3 * HIDDEN * size_of::<f16>()) as u64;
    let third = |index: usize| {
        let offset = (index * HIDDEN * size_of::<f16>()) as u64;
        let address = qkv.0.as_ptr() as u64 + offset;
        let row = 3 * HIDDEN as u64;
        View::new(Region::new(address, bytes - offset), [0, HEAD_DIM as u64, row])
    };
    let out =
        View::new(Region::new(o.0.as_mut_ptr() as u64, bytes), [0, HEAD_DIM as u64, HIDDEN as u64]);
    let args = Args::new(third(0), third(1), third(2), out)
        .workspace(Region::new(workspace.as_mut_ptr() as u64, 16 * workspace.len() as u64));
    plan.check(&args)?;
    println!(
        "{}: {} launches, a workspace of {} bytes, of which the first {} are zero before a launch",
        kernel.name,
        plan.entries().count(),
        plan.workspace_bytes(),
        plan.zeroed_bytes()
    );
    for launch in plan.launches_for(&device, &args)? {
        // SAFETY: the arguments were checked; the vectors live until the launch has ended, which
        // it has when the emulator returns; nothing else uses them meanwhile.
        unsafe { device.launch(&launch)? };
    }
    device.synchronize()?;
    println!("o[0, 0] = {:.4}, o[N - 1, 0] = {:.4}", o.0[0], o.0[(TOKENS - 1) * HIDDEN]);
    assert!(o.0[..TOKENS * HIDDEN].iter().all(|x| x.is_finite()));
    Ok(())
}
