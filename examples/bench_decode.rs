//! Usage: bench_decode check
//!        bench_decode bench B,B.. HEADS/KV,.. D,.. NK,NK.. PAGE,PAGE.. [SPLITS] [f16|bf16] [NQ]
//! PAGE 0: contiguous. Prints µs and GB/s of K and V, back to back (events) and by CUDA graph replay;
//! ROTATE caches are used in turn so that back-to-back times are not of the L2 cache (0: one cache).
use std::{ffi::c_void, num::NonZeroU32, ptr, sync::Arc};

use flash_attention::{
    registry::{Decode, Pages, DECODE_KERNELS},
    session::{Cached, DecodeInputs, Inputs, Session},
    verify::verify_decode,
    *,
};

/// A function of the driver that the library has no use for.
macro_rules! driver {
    ($name:ident($($arg:expr => $type:ty),*)) => {{
        let address = ::cuda_driver::address(stringify!($name)).expect(stringify!($name));
        let code = unsafe {
            let function = std::mem::transmute::<usize, unsafe extern "system" fn($($type),*) -> u32>(address);
            function($($arg),*)
        };
        assert_eq!(code, 0, "{}", stringify!($name));
    }};
}

/// What `work` starts on a stream, as a graph.
fn capture(stream: *mut c_void, work: impl FnOnce()) -> *mut c_void {
    driver!(cuStreamBeginCapture_v2(stream => *mut c_void, 2 => u32));
    work();
    let mut graph = ptr::null_mut();
    driver!(cuStreamEndCapture(stream => *mut c_void, &raw mut graph => *mut *mut c_void));
    let mut executable = ptr::null_mut();
    driver!(cuGraphInstantiateWithFlags(&raw mut executable => *mut *mut c_void, graph => *mut c_void, 0 => u64));
    executable
}

fn list(s: &str) -> Vec<usize> {
    s.split(',').map(|x| x.parse().unwrap()).collect()
}

fn check(session: &Session) {
    let (mut ok, mut bad) = (0, 0);
    for dtype in [DType::F16, DType::BF16] {
        for (d, d_v) in [(64, 64), (128, 128), (256, 256), (192, 128), (80, 80)] {
            for (batch, heads, kv, nq, seq_k) in [
                (1, 32, 4, 1, 5000), (3, 8, 8, 1, 700), (2, 16, 1, 4, 1500), (1, 64, 8, 16, 3000), (5, 4, 2, 2, 100), (1, 8, 1, 1, 20000),
            ] {
                for page in [0usize, 1, 16, 48, 64, 256] {
                    for splits in [0u32, 1, 7] {
                        for feature in 0..4 {
                            let p = Problem::builder(batch, heads, nq, d).head_dim_v(d_v).kv_heads(kv).seq_k(seq_k).dtype(dtype).causal(true).layout(Layout::TokensFirst);
                            let p = match feature {
                                1 => p.window(Window { left: Some(200), right: None }).softcap(Some(3.0)),
                                2 => p.alibi(Some(Alibi::PerHead)),
                                3 => p.sinks(true),
                                _ => p,
                            };
                            // All features with one page size and split alone: the references take long.
                            if feature > 0 && (page != 16 || splits == 7) || seq_k > 6000 && (page == 1 || page == 48) { continue }
                            let p = p.build().unwrap();
                            let t = |shape: &[usize], s| Tensor::random(dtype, shape, s, 0.0);
                            let f = |shape: Option<Vec<usize>>, s| shape.map(|x| Tensor::random(DType::F32, &x, s, 0.0));
                            let (al, si) = (f(p.alibi_shape(), 5).map(|t| Tensor::from_f64(DType::F32, t.shape(), &t.to_f64().iter().map(|x| x.abs() / 8.0).collect::<Vec<_>>()).unwrap()), f(p.sinks_shape(), 6));
                            let lengths: Vec<i32> = (0..batch).map(|b| if b == 1 { (seq_k / 3) as i32 } else if b == 4 { 0 } else { seq_k as i32 - b as i32 }).collect();
                            let (decode, table) = if page == 0 { (Decode::new(p), None) } else {
                                let max_pages = seq_k.div_ceil(page);
                                let pages = batch * max_pages + 5;
                                let order: Vec<i32> = (0..pages).map(|i| (i * 7919 % pages) as i32).collect();
                                let order = if pages % 7919 == 0 { (0..pages as i32).rev().collect() } else { order };
                                (Decode::paged(p, Pages { page_size: page as u32, pages: pages as u32, max_pages: max_pages as u32 }).unwrap(), Some(order[..batch * max_pages].to_vec()))
                            };
                            let decode = decode.splits(NonZeroU32::new(splits));
                            let (q, k, v) = (t(&p.q_shape(), 1), t(&decode.k_shape(), 2), t(&decode.v_shape(), 3));
                            let inputs = DecodeInputs { tensors: Inputs { alibi_slopes: al.as_ref(), sinks: si.as_ref(), ..Inputs::new(&q, &k, &v) }, seqused_k: Some(&lengths), page_table: table.as_deref() };
                            let label = format!("{dtype} d {d}/{d_v} B {batch} {heads}/{kv} Nq {nq} Nk {seq_k} page {page} splits {splits} feature {feature}");
                            match session.run_decode(&DECODE_KERNELS[0], &decode, &inputs) {
                                Err(e) => { bad += 1; println!("{label}: {e}") }
                                Ok((outputs, _)) => {
                                    let r = verify_decode(&decode, &inputs, &outputs).unwrap();
                                    if r.passes() { ok += 1 } else { bad += 1; println!("{label}: {r}") }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
    println!("check: {ok} pass, {bad} fail");
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let device = Arc::new(GpuDevice::open(0).unwrap());
    driver!(cuCtxSetCurrent(device.context().handle() => *mut c_void));
    let gpu: Arc<dyn Device> = device.clone();
    let session = Session::new(gpu.clone());
    if args[1] == "check" {
        return check(&session);
    }
    let splits: u32 = args.get(7).map_or(0, |x| x.parse().unwrap());
    let dtype = if args.get(8).is_some_and(|x| x == "bf16") { DType::BF16 } else { DType::F16 };
    let nq: usize = args.get(9).map_or(1, |x| x.parse().unwrap());
    let rotate: usize = std::env::var("ROTATE").map_or(0, |x| x.parse().unwrap());
    for d in list(&args[4]) { for heads in args[3].split(',') { for batch in list(&args[2]) { for nk in list(&args[5]) { for page in list(&args[6]) {
        let (h, kv) = heads.split_once('/').unwrap();
        let (h, kv): (usize, usize) = (h.parse().unwrap(), kv.parse().unwrap());
        let p = Problem::builder(batch, h, nq, d).kv_heads(kv).seq_k(nk).dtype(dtype).causal(true).layout(Layout::TokensFirst).build().unwrap();
        let (decode, table) = if page == 0 { (Decode::new(p), None) } else {
            let max_pages = nk.div_ceil(page);
            let pages = batch * max_pages;
            // A fixed shuffle: a linear congruence of a power of two, cut to the range.
            let mut order: Vec<i32> = (0..pages as i32).collect();
            let mut state = 12345u64;
            for at in (1..pages).rev() { state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407); order.swap(at, (state >> 33) as usize % (at + 1)); }
            (Decode::paged(p, Pages { page_size: page as u32, pages: pages as u32, max_pages: max_pages as u32 }).unwrap(), Some(order))
        };
        let decode = decode.splits(NonZeroU32::new(splits));
        let bytes = decode.cache_bytes(std::iter::repeat_n(nk, batch)) as f64;
        let caches = if rotate == 0 { 1 } else { rotate };
        let up = |shape: [usize; 4], s| session.upload(&Tensor::random(dtype, &shape, s, 0.0)).unwrap();
        let q = up(p.q_shape(), 1);
        let kvs: Vec<_> = (0..caches).map(|c| (up(decode.k_shape(), 2 + c as u64), up(decode.v_shape(), 77 + c as u64))).collect();
        let lengths = session.memory().upload(&vec![nk as i32; batch]).unwrap();
        let table = table.map(|t| session.memory().upload(&t).unwrap());
        let mut runs: Vec<_> = (0..caches).map(|_| session.decode(&DECODE_KERNELS[0], &decode).unwrap()).collect();
        let ins = gpu.instruments().unwrap();
        let mut n = 0usize;
        let mut launch = || {
            let (k, v) = &kvs[n % caches];
            let cache = Cached { k, v, seqused_k: Some(&lengths), page_table: table.as_ref() };
            let done = runs[n % caches].run(&q, cache, Extras::default());
            n += 1;
            done
        };
        for _ in 0..2 * caches { launch().unwrap() }
        gpu.synchronize().unwrap();
        let one = ins.time_ms(&mut || (0..20).try_for_each(|_| launch())).unwrap() / 20.0;
        let count = ((150.0 / one) as usize).clamp(20, 5000);
        let mut times: Vec<f64> = (0..5).map(|_| ins.time_ms(&mut || (0..count).try_for_each(|_| launch())).unwrap() / count as f64).collect();
        times.sort_by(f64::total_cmp);
        // A graph of as many launches as there are caches, or 20, replayed.
        let captured = 20usize.next_multiple_of(caches);
        let stream = device.stream();
        let graph = capture(stream, || (0..captured).for_each(|_| launch().unwrap()));
        let replay = || { driver!(cuGraphLaunch(graph => *mut c_void, stream => *mut c_void)); Ok(()) };
        let replays = count.div_ceil(captured);
        let mut graphs: Vec<f64> = (0..5).map(|_| ins.time_ms(&mut || (0..replays).try_for_each(|_| replay())).unwrap() / (replays * captured) as f64).collect();
        graphs.sort_by(f64::total_cmp);
        driver!(cuGraphExecDestroy(graph => *mut c_void));
        let parts = decode_splits(&session, &decode);
        println!("{dtype} B {batch} {h}/{kv} D {d} Nq {nq} Nk {nk} page {page} splits {parts} caches {caches}: {:.2} us, {:.0} GB/s (median {:.2}); graph {:.2} us, {:.0} GB/s (median {:.2})", times[0] * 1e3, bytes / times[0] / 1e6, times[2] * 1e3, graphs[0] * 1e3, bytes / graphs[0] / 1e6, graphs[2] * 1e3);
    } } } } }
}

fn decode_splits(session: &Session, decode: &Decode) -> u32 {
    DECODE_KERNELS[0].plan(decode, &session.target()).unwrap().splits()
}
