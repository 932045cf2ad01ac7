//! Attention in cudarc's context, on its stream, of its memory: no copy, no second context. What the
//! library gives is checked against the formula on the host.
//!
//! ```sh
//! cargo run --example cudarc
//! ```

use std::{error::Error, sync::Arc};

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, sys};
use flash_attention::{
    DType, Layout, Problem,
    half::f16,
    raw::{Args, Context, Region, View},
    registry::best_for,
};

const BATCH: usize = 2;
const HEADS: usize = 4;
const TOKENS: usize = 300;
const HEAD_DIM: usize = 64;

/// The bytes of a slice that a launch reads. cudarc knows the read once what is returned beside is dropped.
fn read<'a>(slice: &'a CudaSlice<f16>, stream: &'a CudaStream) -> (Region, impl Drop + use<'a>) {
    let (address, recorded) = slice.device_ptr(stream);
    (Region::new(address, slice.num_bytes() as u64), recorded)
}

fn attend(
    stream: &Arc<CudaStream>,
    [q, k, v]: [&CudaSlice<f16>; 3],
) -> Result<CudaSlice<f16>, Box<dyn Error>> {
    // SAFETY: the context is cudarc's; `stream` keeps it until the end, when all launches have ended, since
    // the caller's copy to the host waits for them.
    let context = unsafe { Context::from_handle(stream.context().cu_ctx().cast()) }?;
    let problem = Problem::builder(BATCH, HEADS, TOKENS, HEAD_DIM)
        .dtype(DType::F16)
        .layout(Layout::TokensFirst)
        .causal(true)
        .build()?;
    // Planned once, by a program that calls again.
    let choice = best_for(&problem, &context.target())?;
    println!("{} on {}", choice.kernel.name, context.name());
    let plan = choice.plan;

    // SAFETY: attention writes every element before the copy to the host reads one.
    let mut o = unsafe { stream.alloc::<f16>(q.len()) }?;
    // Zeroed, as the queue of a workspace must be.
    let mut workspace = stream.alloc_zeros::<u8>(plan.workspace_bytes().max(1) as usize)?;
    {
        let ((q, _q), (k, _k), (v, _v)) = (read(q, stream), read(k, stream), read(v, stream));
        let bytes = o.num_bytes() as u64;
        let (o, _o) = o.device_ptr_mut(stream);
        let of = |region| View::contiguous(region, problem.layout(), HEADS, TOKENS, HEAD_DIM);
        let bytes_of_workspace = workspace.num_bytes() as u64;
        let (address, _workspace) = workspace.device_ptr_mut(stream);
        let args = Args::new(of(q), of(k), of(v), of(Region::new(o, bytes)))
            .workspace(Region::new(address, bytes_of_workspace));
        // SAFETY: the stream is of the context. The slices live until after the wait, nothing else uses them,
        // and no two of what is written are the same. The workspace is zero.
        unsafe { context.enqueue(&plan, &args, stream.cu_stream().cast()) }?;
    }
    // The kernels go with the context.
    stream.synchronize()?;
    Ok(o)
}

fn main() -> Result<(), Box<dyn Error>> {
    // SAFETY: the driver's library is looked for, and nothing of it is called.
    if !unsafe { sys::is_culib_present() } {
        println!("no CUDA driver: nothing to show");
        return Ok(());
    }
    let stream = CudaContext::new(0)?.new_stream()?;
    let numbers = |seed: usize| -> Vec<f16> {
        let of = |i: usize| f16::from_f32(((i * 7 + seed * 1001) as f32 * 0.618).sin());
        (0..BATCH * TOKENS * HEADS * HEAD_DIM).map(of).collect()
    };
    let host = [numbers(1), numbers(2), numbers(3)];
    let [q, k, v] = [&host[0], &host[1], &host[2]].map(|numbers| stream.clone_htod(numbers));
    let o = attend(&stream, [&q?, &k?, &v?])?;
    let o = stream.clone_dtoh(&o)?;
    let far = farthest(&host, &o);
    println!("at most {far:.1e} from the formula in f64");
    if far < 2e-3 { Ok(()) } else { Err("that is too far".into()) }
}

/// The largest difference of the last token's rows, which see all keys, from the formula.
fn farthest([q, k, v]: &[Vec<f16>; 3], o: &[f16]) -> f64 {
    let row = |x: &[f16], b: usize, h: usize, n: usize| -> Vec<f64> {
        let first = ((b * TOKENS + n) * HEADS + h) * HEAD_DIM;
        x[first..first + HEAD_DIM].iter().map(|&x| f64::from(x)).collect()
    };
    let mut farthest = 0f64;
    for (b, h) in (0..BATCH).flat_map(|b| (0..HEADS).map(move |h| (b, h))) {
        let of_q = row(q, b, h, TOKENS - 1);
        let score = |n| -> f64 {
            let of_k = row(k, b, h, n);
            of_q.iter().zip(of_k).map(|(q, k)| q * k).sum::<f64>() / (HEAD_DIM as f64).sqrt()
        };
        let weights: Vec<f64> = (0..TOKENS).map(|n| score(n).exp()).collect();
        let sum: f64 = weights.iter().sum();
        for (d, o) in row(o, b, h, TOKENS - 1).into_iter().enumerate() {
            let weighted = |n: usize| weights[n] * row(v, b, h, n)[d];
            let expected = (0..TOKENS).map(weighted).sum::<f64>() / sum;
            farthest = farthest.max((o - expected).abs());
        }
    }
    farthest
}
