//! Attention of tensors on a GPU: checked against f64, then measured beside candle's own and beside the
//! launch alone.
//!
//! ```sh
//! cargo run --release -p flash-attention-candle --features cuda --example gpu -- check [f32|f16|bf16]
//! cargo run --release -p flash-attention-candle --features cuda --example gpu -- measure
//! cargo run --release -p flash-attention-candle --features cuda --example gpu -- memory
//! ```

#[path = "../tests/cases/mod.rs"]
mod cases;

use std::time::Instant;

use candle_core::{
    CudaDevice, D, DType, Device, Result, Storage, Tensor, Var, bail,
    cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, sys},
};
use cases::{Case, cases, faults};
use flash_attention::{
    Problem,
    raw::{Args, BackwardArgs, Context, Plan, Region, View},
    registry::{Backward, Operation, best_for},
};
use flash_attention_candle::{
    Layout, Options, attention, attention_with_lse, flash_attn_varlen_paged_windowed,
};

fn main() -> Result<()> {
    let gpu = CudaDevice::new_with_stream(0)?;
    let device = Device::Cuda(gpu.clone());
    // The calling thread's default stream, as candle has it unless asked.
    let default = Device::new_cuda(0)?;
    let command = std::env::args().nth(1).unwrap_or_default();
    match command.as_str() {
        "check" => {
            let wrong = [
                check(&default, std::env::args().nth(2))?,
                check_views(&default)?,
                check_lengths(&default)?,
                check_pages(&default)?,
                check_views(&device)?,
            ];
            match wrong.into_iter().sum::<usize>() {
                0 => println!("all right"),
                wrong => bail!("{wrong} checks failed"),
            }
        }
        "measure" => measure(&default)?,
        "memory" => memory(&default)?,
        other => bail!("{other:?} is no command: check, measure or memory"),
    }
    Ok(())
}

/// The cases of the CPU, and larger ones, in every type or in the one that is named.
fn check(device: &Device, only: Option<String>) -> Result<usize> {
    use flash_attention::DType as T;
    let dtypes = match only {
        Some(name) => vec![name.parse::<T>().map_err(candle_core::Error::wrap)?],
        None => vec![T::F32, T::F16, T::BF16],
    };
    let (mut wrong, mut right) = (0, 0);
    for dtype in dtypes {
        let of = |name, builder: flash_attention::ProblemBuilder| {
            let problem = builder.dtype(dtype).build().map_err(candle_core::Error::wrap)?;
            Ok::<_, candle_core::Error>(Case { name, problem, size: 1.0, cu_seqlens: None })
        };
        let larger = [
            of("B 4, H 12, N 1024", Problem::builder(4, 12, 1024, 64))?,
            of(
                "D 128, N 2048, causal",
                Problem::builder(1, 4, 2048, 128).kv_heads(2).causal(true),
            )?,
        ];
        for case in cases(dtype).into_iter().chain(larger) {
            let p = &case.problem;
            match faults(&case, device) {
                Ok(faults) if faults.is_empty() => right += 1,
                Ok(faults) => {
                    wrong += 1;
                    println!("WRONG {p:?}");
                    faults.iter().for_each(|fault| println!("  {fault}"));
                }
                Err(error) => {
                    wrong += 1;
                    println!("ERROR {} {} {p:?}: {error}", p.dtype(), case.name);
                }
            }
        }
    }
    println!("cases: {right} right, {wrong} wrong");
    Ok(wrong)
}

fn random(shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    Tensor::randn(0f32, 1.0, shape, device)?.to_dtype(dtype)
}

fn far(a: &Tensor, b: &Tensor) -> Result<f32> {
    let (a, b) = (a.to_dtype(DType::F32)?, b.to_dtype(DType::F32)?);
    (a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar()
}

/// Views give the same bits as copies.
fn check_views(device: &Device) -> Result<usize> {
    let mut wrong = 0;
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let qkv = random(&[2, 200, 3, 6, 64], dtype, device)?;
        let part = |at: usize| qkv.narrow(2, at, 1)?.squeeze(2)?.transpose(1, 2);
        let views = [part(0)?, part(1)?, part(2)?];
        let options = Options { causal: true, ..Options::default() };
        let of = |[q, k, v]: &[Tensor; 3]| attention_with_lse(q, k, v, &options);
        let copies = [views[0].contiguous()?, views[1].contiguous()?, views[2].contiguous()?];
        let ((o, lse), (expected, expected_lse)) = (of(&views)?, of(&copies)?);
        let tokens_first = Options { layout: Layout::TokensFirst, ..options.clone() };
        let turned = |x: &Tensor| x.transpose(1, 2);
        let o_turned = attention(
            &turned(&views[0])?,
            &turned(&views[1])?,
            &turned(&views[2])?,
            &tokens_first,
        )?;
        for (what, far) in [
            ("O", far(&o, &expected)?),
            ("LSE", far(&lse, &expected_lse)?),
            ("O, tokens first", far(&turned(&o_turned)?, &expected)?),
        ] {
            if far != 0.0 {
                wrong += 1;
                println!("WRONG {dtype:?} views: {what} is {far} from that of copies");
            }
        }
        // Eight elements in f16 are 16 bytes; one is not.
        let odd = random(&[1, 1, 10, 72], dtype, device)?.narrow(3, 1, 64)?;
        match attention(&odd, &odd, &odd, &options) {
            Err(error) if error.to_string().contains("multiple of") => {}
            other => {
                wrong += 1;
                println!("WRONG {dtype:?} a misaligned view: {other:?}");
            }
        }
    }
    println!("views: {wrong} wrong");
    Ok(wrong)
}

/// Caches of which each entry has some keys, beside the CPU.
fn check_lengths(device: &Device) -> Result<usize> {
    let mut wrong = 0;
    for (dtype, limit) in [(DType::F16, 2e-3), (DType::BF16, 2e-2)] {
        for rows in [1, 4] {
            let q = random(&[4, 8, rows, 128], dtype, device)?;
            let k = random(&[4, 2, 3000, 128], dtype, device)?;
            let v = random(&[4, 2, 3000, 128], dtype, device)?;
            let lengths = Tensor::new(&[3000u32, 17, 1, 0], device)?;
            let of = |device: &Device, lengths: Option<&Tensor>| {
                let to = |x: &Tensor| x.to_device(device);
                let key_lengths = lengths.map(to).transpose()?;
                let options = Options { causal: true, key_lengths, ..Options::default() };
                attention(&to(&q)?, &to(&k)?, &to(&v)?, &options)
            };
            for lengths in [None, Some(&lengths)] {
                let far = far(
                    &of(device, lengths)?.to_device(&Device::Cpu)?,
                    &of(&Device::Cpu, lengths)?,
                )?;
                if far.is_nan() || far > limit {
                    wrong += 1;
                    println!("WRONG {dtype:?} cache, {rows} rows: {far} from the CPU's");
                }
            }
        }
    }
    println!("caches: {wrong} wrong");
    Ok(wrong)
}

/// Caches in pages, beside the CPU: a query a sequence, several, and different numbers of them.
fn check_pages(device: &Device) -> Result<usize> {
    let mut wrong = 0;
    let starts_k = Tensor::new(&[0u32, 1500, 1517, 1517, 2500], device)?;
    for (dtype, limit) in [(DType::F16, 2e-3), (DType::BF16, 2e-2)] {
        for (size, max_pages) in [(7, 230), (64, 24), (256, 6)] {
            let cache = random(&[max_pages, 2, size, 2, 128], dtype, device)?;
            let part = |at: usize| cache.narrow(1, at, 1)?.squeeze(1);
            let (k, v) = (part(0)?, part(1)?);
            let page = |at: usize| (at * 5 + 3) as u32 % max_pages as u32;
            let table: Vec<u32> = (0..4 * max_pages).map(page).collect();
            let table = Tensor::from_vec(table, (4, max_pages), device)?;
            for (starts, most) in
                [([0u32, 1, 2, 3, 4], 1), ([0, 3, 6, 9, 12], 3), ([0, 40, 41, 41, 60], 40)]
            {
                let starts_q = Tensor::new(&starts, device)?;
                let q = random(&[starts[4] as usize, 8, 128], dtype, device)?;
                for window in [[None, Some(0)], [Some(100), Some(3)]] {
                    let of = |device: &Device| -> Result<Tensor> {
                        let [q, k, v, starts_q, starts_k, table] =
                            [&q, &k, &v, &starts_q, &starts_k, &table].map(|x| x.to_device(device));
                        flash_attn_varlen_paged_windowed(
                            &q?,
                            &k?,
                            &v?,
                            &starts_q?,
                            &starts_k?,
                            &table?,
                            None,
                            most,
                            1500,
                            0.1,
                            window[0],
                            window[1],
                            size,
                            Some(20.0),
                        )
                    };
                    let far = far(&of(device)?.to_device(&Device::Cpu)?, &of(&Device::Cpu)?)?;
                    if far.is_nan() || far > limit {
                        wrong += 1;
                        println!(
                            "WRONG {dtype:?} pages of {size}, {starts:?}: {far} from the CPU's"
                        );
                    }
                }
            }
        }
    }
    println!("pages: {wrong} wrong");
    Ok(wrong)
}

/// The formula in candle's operations.
fn formula(q: &Tensor, k: &Tensor, v: &Tensor, hidden: Option<&Tensor>) -> Result<Tensor> {
    let scale = 1.0 / (q.dim(D::Minus1)? as f64).sqrt();
    let scores = (q.matmul(&k.t()?)? * scale)?;
    let scores = match hidden {
        Some(hidden) => scores.broadcast_add(hidden)?,
        None => scores,
    };
    candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(v)
}

/// The same without gradients, by candle's fused softmax.
fn fused_formula(q: &Tensor, k: &Tensor, v: &Tensor, hidden: Option<&Tensor>) -> Result<Tensor> {
    let scale = 1.0 / (q.dim(D::Minus1)? as f64).sqrt();
    let scores = (q.matmul(&k.t()?)? * scale)?;
    let scores = match hidden {
        Some(hidden) => scores.broadcast_add(hidden)?,
        None => scores,
    };
    candle_nn::ops::softmax_last_dim(&scores)?.matmul(v)
}

/// The cost of a call.
struct Cost {
    /// Microseconds of the device for each of calls that follow one another.
    device: f64,
    /// Microseconds of the host until a call returns.
    host: f64,
    /// MiB that calls take beyond what there was.
    peak: f64,
}

impl std::fmt::Display for Cost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:9.1} us, host {:7.1} us, peak {:8.1} MiB", self.device, self.host, self.peak)
    }
}

/// Runs a call again and again.
fn cost(device: &Device, mut call: impl FnMut() -> Result<()>) -> Result<Cost> {
    let wait = || device.synchronize();
    call()?;
    wait()?;
    let pool = Pool::of(device)?;
    let before = pool.used()?;
    pool.forget_high()?;
    call()?;
    wait()?;
    let peak = (pool.high()?.saturating_sub(before)) as f64 / f64::from(1 << 20);
    // As many as take a third of a second.
    let start = Instant::now();
    call()?;
    wait()?;
    let repeats = (0.3 / start.elapsed().as_secs_f64()).clamp(5.0, 2000.0) as usize;
    let mut of_device: Vec<f64> = Vec::new();
    for _ in 0..5 {
        let start = Instant::now();
        for _ in 0..repeats {
            call()?;
        }
        wait()?;
        of_device.push(start.elapsed().as_secs_f64() * 1e6 / repeats as f64);
    }
    // Few enough that none waits for room in the queue.
    let mut of_host: Vec<f64> = Vec::new();
    for _ in 0..50 {
        wait()?;
        let start = Instant::now();
        for _ in 0..4 {
            call()?;
        }
        of_host.push(start.elapsed().as_secs_f64() * 1e6 / 4.0);
    }
    wait()?;
    let median = |mut numbers: Vec<f64>| {
        numbers.sort_by(f64::total_cmp);
        numbers[numbers.len() / 2]
    };
    Ok(Cost { device: median(of_device), host: median(of_host), peak })
}

/// The pool that candle's memory comes from.
struct Pool(sys::CUmemoryPool);

impl Pool {
    fn of(device: &Device) -> Result<Self> {
        let device = device.as_cuda_device()?;
        device.cuda_stream().context().bind_to_thread().map_err(candle_core::Error::wrap)?;
        let mut pool = std::ptr::null_mut();
        // SAFETY: the pointer is of a pool's handle, and device 0 is there.
        let code = unsafe { sys::cuDeviceGetDefaultMemPool(&mut pool, 0) };
        code.result().map_err(candle_core::Error::wrap)?;
        Ok(Self(pool))
    }

    fn get(&self, attribute: sys::CUmemPool_attribute) -> Result<u64> {
        let mut bytes = 0u64;
        // SAFETY: the pool is the device's own, and the attribute a number of 64 bits.
        let code = unsafe {
            sys::cuMemPoolGetAttribute(self.0, attribute, std::ptr::from_mut(&mut bytes).cast())
        };
        code.result().map_err(candle_core::Error::wrap)?;
        Ok(bytes)
    }

    fn used(&self) -> Result<u64> {
        self.get(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)
    }

    fn high(&self) -> Result<u64> {
        self.get(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)
    }

    fn forget_high(&self) -> Result<()> {
        let mut zero = 0u64;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        // SAFETY: as above; this attribute may be set to 0.
        let code = unsafe {
            sys::cuMemPoolSetAttribute(self.0, attribute, std::ptr::from_mut(&mut zero).cast())
        };
        code.result().map_err(candle_core::Error::wrap)
    }
}

/// Address of a tensor that starts at its storage's first element.
fn region(tensor: &Tensor) -> Result<Region> {
    let (storage, _) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { bail!("not on a GPU") };
    let stream = storage.device.cuda_stream();
    let bytes = (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64;
    let address = match tensor.dtype() {
        DType::F16 => storage.as_cuda_slice::<half::f16>()?.device_ptr(&stream).0,
        _ => storage.as_cuda_slice::<f32>()?.device_ptr(&stream).0,
    };
    Ok(Region::new(address, bytes))
}

/// The launches alone, in memory that is there already.
struct Raw<P: Operation> {
    context: Context,
    plan: Plan<P>,
    args: P::Args,
    device: CudaDevice,
    _tensors: Vec<Tensor>,
    _workspace: CudaSlice<u8>,
}

impl<P: Operation> Raw<P> {
    fn new(
        device: &Device,
        operation: P,
        tensors: Vec<Tensor>,
        args: impl FnOnce(Region) -> Result<P::Args>,
    ) -> Result<Self> {
        let device = device.as_cuda_device()?.clone();
        let handle = device.cuda_stream().context().cu_ctx();
        // SAFETY: the context is candle's, whose device this value keeps.
        let context =
            unsafe { Context::from_handle(handle.cast()) }.map_err(candle_core::Error::wrap)?;
        let plan = best_for(&operation, &context.target()).map_err(candle_core::Error::wrap)?.plan;
        context.prepare(plan.entries()).map_err(candle_core::Error::wrap)?;
        let workspace = device.alloc_zeros::<u8>(plan.workspace_bytes().max(16) as usize)?;
        let address = workspace.device_ptr(&device.cuda_stream()).0;
        let args = args(Region::new(address, workspace.len() as u64))?;
        Ok(Self { context, plan, args, device, _tensors: tensors, _workspace: workspace })
    }

    fn enqueue(&self) -> Result<()> {
        let stream = self.device.cuda_stream().cu_stream().cast();
        // SAFETY: tensors and workspace are this value's, which outlives the wait for the stream; the
        // workspace was zero; nothing else uses them.
        unsafe { self.context.enqueue(&self.plan, &self.args, stream) }
            .map_err(candle_core::Error::wrap)
    }
}

fn measure(device: &Device) -> Result<()> {
    println!("f16; medians; forward, then forward and backward");
    for ([b, h, n, d], causal) in [
        ([4, 12, 512, 64], false),
        ([4, 12, 1024, 64], false),
        ([4, 12, 2048, 64], false),
        ([4, 12, 2048, 64], true),
        ([1, 16, 4096, 128], true),
        ([4, 16, 4096, 128], true),
        ([1, 1, 16, 64], false),
    ] {
        println!("B {b}, H {h}, N {n}, D {d}{}", if causal { ", causal" } else { "" });
        let tensor = || random(&[b, h, n, d], DType::F16, device);
        let (q, k, v, o, d_o) = (tensor()?, tensor()?, tensor()?, tensor()?, tensor()?);
        let gradients = [tensor()?, tensor()?, tensor()?];
        let hidden = if causal { Some(hidden(n, device)?) } else { None };
        let options = Options { causal, ..Options::default() };
        let print = |what: &str, cost: Result<Cost>| match cost {
            Ok(cost) => println!("  {what:34} {cost}"),
            Err(error) => println!("  {what:34} {}", first_line(&error)),
        };
        let own = || fused_formula(&q, &k, &v, hidden.as_ref()).map(drop);
        print("candle's own, forward", cost(device, own));
        let ours = || attention(&q, &k, &v, &options).map(drop);
        print("ours, forward", cost(device, ours));
        let problem =
            Problem::builder(b, h, n, d).dtype(flash_attention::DType::F16).causal(causal);
        let problem = problem.build().map_err(candle_core::Error::wrap)?;
        let view = |tensor: &Tensor| -> Result<View> {
            Ok(View::contiguous(region(tensor)?, problem.layout(), h, n, d))
        };
        let lse = Tensor::zeros((b, h, n), DType::F32, device)?;
        let args = Args::new(view(&q)?, view(&k)?, view(&v)?, view(&o)?).lse(region(&lse)?);
        let kept = vec![q.clone(), k.clone(), v.clone(), o.clone(), lse.clone()];
        let forward = Raw::new(device, problem, kept, |workspace| Ok(args.workspace(workspace)))?;
        print("the launch alone, forward", cost(device, || forward.enqueue()));
        let backward = Raw::new(device, Backward::new(problem), gradients.to_vec(), |workspace| {
            let [dq, dk, dv] = [view(&gradients[0])?, view(&gradients[1])?, view(&gradients[2])?];
            Ok(BackwardArgs::new(args.workspace(workspace), view(&d_o)?, [dq, dk, dv]))
        })?;
        let [q, k, v] = [Var::from_tensor(&q)?, Var::from_tensor(&k)?, Var::from_tensor(&v)?];
        let loss = |o: Tensor| (o * &d_o)?.sum_all()?.backward().map(drop);
        print(
            "candle's own, with gradients",
            cost(device, || loss(formula(&q, &k, &v, hidden.as_ref())?)),
        );
        print("ours, with gradients", cost(device, || loss(attention(&q, &k, &v, &options)?)));
        print("the graph around it, with gradients", cost(device, || loss((&*q + &*k)?)));
        print(
            "the launches alone, both passes",
            cost(device, || {
                forward.enqueue()?;
                backward.enqueue()
            }),
        );
    }
    Ok(())
}

/// Time and memory of long sequences.
fn memory(device: &Device) -> Result<()> {
    println!("B 1, H 12, D 64, f16, causal");
    // Candle's own last: from 2^31 weights on its kernels leave their buffers (0.11.1), after which nothing of the
    // context runs.
    for is_own in [false, true] {
        for n in [8192, 16_384, 32_768, 65_536] {
            let tensor = || random(&[1, 12, n, 64], DType::F16, device);
            let (q, k, v) = (tensor()?, tensor()?, tensor()?);
            let options = Options { causal: true, ..Options::default() };
            if !is_own {
                let cost = cost(device, || attention(&q, &k, &v, &options).map(drop))?;
                println!("  N {n}: ours                          {cost}");
                continue;
            }
            let own = hidden(n, device).and_then(|hidden| {
                cost(device, || fused_formula(&q, &k, &v, Some(&hidden)).map(drop))
            });
            match own {
                Ok(cost) => println!("  N {n}: candle's own                  {cost}"),
                Err(error) => {
                    println!("  N {n}: candle's own: {}", first_line(&error));
                    // The values that are left could not even be freed.
                    std::process::exit(0);
                }
            }
        }
    }
    Ok(())
}

fn first_line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

/// `-inf` after a row's own position, `[N, N]` in f16.
fn hidden(n: usize, device: &Device) -> Result<Tensor> {
    let rows = Tensor::arange(0u32, n as u32, device)?;
    let after =
        rows.unsqueeze(0)?.broadcast_as((n, n))?.gt(&rows.unsqueeze(1)?.broadcast_as((n, n))?)?;
    let minus = Tensor::full(f32::NEG_INFINITY, (1, 1), device)?.to_dtype(DType::F16)?;
    let zero = Tensor::zeros((1, 1), DType::F16, device)?;
    after.where_cond(&minus.broadcast_as((n, n))?, &zero.broadcast_as((n, n))?)
}
