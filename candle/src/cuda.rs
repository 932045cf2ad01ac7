//! Attention of tensors on a CUDA device: in candle's context, on its stream, in its memory.
//!
//! Kernels read tensors in place, and outputs come from candle's allocator. A thread plans the launches of
//! a problem once.

use std::{
    cell::RefCell,
    rc::Rc,
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{
    CudaDevice, CudaStorage, Layout, Result, Storage, Tensor,
    backend::BackendStorage,
    bail,
    cuda_backend::{
        CudaDType, CudaStorageSlice,
        cudarc::driver::{
            CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop,
            ValidAsZeroBits,
        },
    },
};
use flash_attention::{
    DType, Problem,
    raw::{Args, BackwardArgs, BiasView, Context, DecodeArgs, Plan, Region, View},
    registry::{self, Backward, Decode, Operation, Pages},
};
use half::{bf16, f16};

use crate::{
    check::wrap,
    cpu::Wanted,
    op::{Call, Gradients, strides},
    options::Options,
};

/// The most rows of heads that share keys for which keys are split between blocks: a tile of the decode
/// kernel.
const DECODE_ROWS: usize = 16;
/// Plans that a thread keeps per operation.
const PLANS: usize = 64;

type Stored<'a> = (&'a CudaStorage, &'a Layout);

/// A storage type, as candle and the driver know it.
trait Number: CudaDType + DeviceRepr + ValidAsZeroBits {}
impl<T: CudaDType + DeviceRepr + ValidAsZeroBits> Number for T {}

/// O and the LSE.
pub fn forward(call: &Call, qkv: [Stored<'_>; 3]) -> Result<(CudaStorage, CudaStorage)> {
    match call.problem.dtype() {
        DType::F32 => forward_of::<f32>(call, qkv),
        DType::F16 => forward_of::<f16>(call, qkv),
        DType::BF16 => forward_of::<bf16>(call, qkv),
        DType::E4M3 => bail!("attention has f32, f16 and bf16"),
    }
}

fn forward_of<T: Number>(
    call: &Call,
    [q, k, v]: [Stored<'_>; 3],
) -> Result<(CudaStorage, CudaStorage)> {
    let (p, device) = (&call.problem, q.0.device().clone());
    let stream = device.cuda_stream();
    let mut o = alloc::<T>(p, &device, p.o_elements())?;
    let mut lse = alloc::<f32>(p, &device, p.rows())?;
    let beside = Beside::of(&call.options)?;
    let held = beside.hold();
    {
        let mut uses = Uses::of(&stream);
        let args = Args::new(
            uses.view(p, q)?,
            uses.view(p, k)?,
            uses.view(p, v)?,
            View::contiguous(
                uses.written(&mut o),
                p.layout(),
                p.heads(),
                rows_q(p),
                p.head_dim_v(),
            ),
        );
        let args = beside.join(args.lse(uses.written(&mut lse)), &held, &mut uses)?;
        let cache = Cache {
            decode: decode(call, k.1)?,
            lengths: uses.beside(held.key_lengths.as_ref())?,
            page_table: uses.beside(held.page_table.as_ref())?,
        };
        launch_forward(&device, args, &cache)?;
    }
    let wrapped = CudaStorage::wrap_cuda_slice(o, device.clone());
    Ok((wrapped, CudaStorage::wrap_cuda_slice(lse, device)))
}

/// Keys and values as a cache.
struct Cache {
    decode: Decode,
    lengths: Option<Region>,
    page_table: Option<Region>,
}

impl Cache {
    fn args(&self, forward: Args) -> DecodeArgs {
        let mut args = DecodeArgs::new(forward);
        if let Some(lengths) = self.lengths {
            args = args.seqused_k(lengths);
        }
        if let Some(table) = self.page_table {
            args = args.page_table(table);
        }
        args
    }
}

/// The call as the decode operation has it.
fn decode(call: &Call, k: &Layout) -> Result<Decode> {
    let p = call.problem;
    let Some(table) = &call.options.page_table else { return Ok(Decode::new(p)) };
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let [pages, page_size] = crate::op::pages(&p, k).map(number);
    let max_pages = number(table.dims2()?.1);
    Decode::paged(p, Pages { page_size, pages, max_pages }).map_err(wrap)
}

/// Launches the decode kernel where few rows see many keys, or where keys have lengths or lie in pages; else
/// the best attention kernel.
fn launch_forward(device: &CudaDevice, args: Args, cache: &Cache) -> Result<()> {
    let p = cache.decode.problem();
    let gpu = context(device)?;
    let is_cache = cache.lengths.is_some() || cache.page_table.is_some();
    let has_few_rows = p.seq_q() * p.group() <= DECODE_ROWS && p.seq_k() > 0;
    if is_cache || has_few_rows {
        match plan(&gpu, cache.decode) {
            Ok(plan) => {
                let args = |workspace| cache.args(args.workspace(workspace));
                return launch(&gpu, device, &plan, args);
            }
            Err(error) if is_cache => return Err(error),
            Err(_) => {}
        }
    }
    let plan = plan(&gpu, *p)?;
    launch(&gpu, device, &plan, |workspace| args.workspace(workspace))
}

/// The requested gradients; `d_o` is contiguous.
pub fn backward(
    call: &Call,
    qkvo: [&Tensor; 4],
    lse: &Tensor,
    d_o: &Tensor,
    wanted: Wanted,
) -> Result<Gradients> {
    match call.problem.dtype() {
        DType::F32 => backward_of::<f32>(call, qkvo, lse, d_o, wanted),
        DType::F16 => backward_of::<f16>(call, qkvo, lse, d_o, wanted),
        DType::BF16 => backward_of::<bf16>(call, qkvo, lse, d_o, wanted),
        DType::E4M3 => bail!("attention has f32, f16 and bf16"),
    }
}

fn backward_of<T: Number>(
    call: &Call,
    [q, k, v, o]: [&Tensor; 4],
    lse: &Tensor,
    d_o: &Tensor,
    wanted: Wanted,
) -> Result<Gradients> {
    let p = &call.problem;
    if p.seq_k() == 0 {
        // No kernel is launched where there are no keys: nothing has a gradient.
        let zeros = |tensor: &Option<Tensor>| tensor.as_ref().map(Tensor::zeros_like).transpose();
        return Ok(Gradients {
            qkv: Some([q.zeros_like()?, k.zeros_like()?, v.zeros_like()?]),
            bias: zeros(&call.options.bias)?,
            sinks: zeros(&call.options.sinks)?,
        });
    }
    let device = match q.device() {
        candle_core::Device::Cuda(device) => device.clone(),
        other => bail!("q lies on {:?}: it must be on a CUDA device", other.location()),
    };
    let stream = device.cuda_stream();
    let count = |shape: Option<Vec<usize>>| shape.map_or(0, |shape| shape.iter().product());
    let mut dq = alloc::<T>(p, &device, p.q_elements())?;
    let mut dk = alloc::<T>(p, &device, p.k_elements())?;
    let mut dv = alloc::<T>(p, &device, p.v_elements())?;
    let mut d_bias = match wanted.bias {
        true => Some(alloc::<T>(p, &device, count(p.bias_shape()))?),
        false => None,
    };
    let mut d_sinks = match wanted.sinks {
        true => Some(alloc::<f32>(p, &device, count(p.sinks_shape()))?),
        false => None,
    };
    let beside = Beside::of(&call.options)?;
    let held = beside.hold();
    let guards = [q, k, v, o, lse, d_o].map(Tensor::storage_and_layout);
    {
        let mut uses = Uses::of(&stream);
        let mut stored = Vec::with_capacity(guards.len());
        for (storage, layout) in &guards {
            stored.push((on_cuda(storage)?, *layout));
        }
        let forward = Args::new(
            uses.view(p, stored[0])?,
            uses.view(p, stored[1])?,
            uses.view(p, stored[2])?,
            uses.view(p, stored[3])?,
        );
        let forward = beside.join(forward.lse(uses.region(stored[4])?), &held, &mut uses)?;
        let d_o = uses.view(p, stored[5])?;
        let contiguous =
            |region, heads, rows, d| View::contiguous(region, p.layout(), heads, rows, d);
        let gradients = [
            contiguous(uses.written(&mut dq), p.heads(), rows_q(p), p.head_dim()),
            contiguous(uses.written(&mut dk), p.kv_heads(), rows_k(p), p.head_dim()),
            contiguous(uses.written(&mut dv), p.kv_heads(), rows_k(p), p.head_dim_v()),
        ];
        let d_bias = d_bias.as_mut().map(|slice| uses.written(slice));
        let d_sinks = d_sinks.as_mut().map(|slice| uses.written(slice));
        let gpu = context(&device)?;
        let plan = plan(&gpu, Backward::new(*p).d_bias(wanted.bias).d_sinks(wanted.sinks))?;
        launch(&gpu, &device, &plan, |workspace| {
            let mut args = BackwardArgs::new(forward.workspace(workspace), d_o, gradients);
            if let Some(region) = d_bias {
                args = args.d_bias(region);
            }
            if let Some(region) = d_sinks {
                args = args.d_sinks(region);
            }
            args
        })?;
    }
    let shaped = |shape: Option<Vec<usize>>| shape.unwrap_or_default();
    let qkv = [
        tensor(dq, &device, q.dims()),
        tensor(dk, &device, k.dims()),
        tensor(dv, &device, v.dims()),
    ];
    Ok(Gradients {
        qkv: Some(qkv),
        bias: d_bias.map(|slice| tensor(slice, &device, &shaped(p.bias_shape()))),
        sinks: d_sinks.map(|slice| tensor(slice, &device, &shaped(p.sinks_shape()))),
    })
}

fn tensor<T: CudaDType>(slice: CudaSlice<T>, device: &CudaDevice, shape: &[usize]) -> Tensor {
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, device.clone()));
    Tensor::from_storage(storage, shape, candle_core::op::BackpropOp::none(), false)
}

fn on_cuda(storage: &Storage) -> Result<&CudaStorage> {
    match storage {
        Storage::Cuda(storage) => Ok(storage),
        _ => bail!("the tensors of a call must be on one device"),
    }
}

/// Rows of Q and O of a batch entry in memory.
fn rows_q(p: &Problem) -> usize {
    p.varlen().map_or(p.seq_q(), |varlen| varlen.total_q)
}

/// Rows of K and V of a batch entry in memory.
fn rows_k(p: &Problem) -> usize {
    p.varlen().map_or(p.seq_k(), |varlen| varlen.total_k)
}

/// Memory for an output.
fn alloc<T: Number>(p: &Problem, device: &CudaDevice, elements: usize) -> Result<CudaSlice<T>> {
    if p.varlen().is_some() {
        // Kernels leave what lies beyond the last sequence as it is.
        return device.alloc_zeros(elements);
    }
    // SAFETY: every element is written by the launch that follows on the same stream, or the memory is
    // given back unread where the call fails.
    unsafe { device.alloc(elements) }
}

/// The tensors beside Q, K and V, contiguous but for the bias.
struct Beside {
    bias: Option<Tensor>,
    mask: Option<Tensor>,
    alibi_slopes: Option<Tensor>,
    sinks: Option<Tensor>,
    key_lengths: Option<Tensor>,
    page_table: Option<Tensor>,
    cu_seqlens: Option<[Tensor; 2]>,
}

/// A tensor whose storage is held for reading.
type Held<'a> = (candle_core::StorageRef<'a>, &'a Layout);

/// The same, held for reading.
struct HeldBeside<'a> {
    bias: Option<Held<'a>>,
    mask: Option<Held<'a>>,
    alibi_slopes: Option<Held<'a>>,
    sinks: Option<Held<'a>>,
    key_lengths: Option<Held<'a>>,
    page_table: Option<Held<'a>>,
    cu_seqlens: Option<[Held<'a>; 2]>,
}

impl Beside {
    fn of(options: &Options) -> Result<Self> {
        let contiguous =
            |tensor: &Option<Tensor>| tensor.as_ref().map(Tensor::contiguous).transpose();
        Ok(Self {
            bias: options.bias.clone(),
            mask: contiguous(&options.mask)?,
            alibi_slopes: contiguous(&options.alibi_slopes)?,
            sinks: contiguous(&options.sinks)?,
            key_lengths: contiguous(&options.key_lengths)?,
            page_table: contiguous(&options.page_table)?,
            cu_seqlens: options
                .varlen
                .as_ref()
                .map(|varlen| [varlen.cu_seqlens_q.clone(), varlen.cu_seqlens_k.clone()]),
        })
    }

    fn hold(&self) -> HeldBeside<'_> {
        fn hold(tensor: &Option<Tensor>) -> Option<Held<'_>> {
            tensor.as_ref().map(Tensor::storage_and_layout)
        }
        HeldBeside {
            bias: hold(&self.bias),
            mask: hold(&self.mask),
            alibi_slopes: hold(&self.alibi_slopes),
            sinks: hold(&self.sinks),
            key_lengths: hold(&self.key_lengths),
            page_table: hold(&self.page_table),
            cu_seqlens: self
                .cu_seqlens
                .as_ref()
                .map(|[q, k]| [q, k].map(Tensor::storage_and_layout)),
        }
    }

    /// The arguments with these tensors.
    fn join<'a>(
        &self,
        mut args: Args,
        held: &'a HeldBeside<'_>,
        uses: &mut Uses<'a>,
    ) -> Result<Args> {
        if let Some(mask) = uses.beside(held.mask.as_ref())? {
            args = args.mask(mask);
        }
        if let Some(slopes) = uses.beside(held.alibi_slopes.as_ref())? {
            args = args.alibi_slopes(slopes);
        }
        if let Some(sinks) = uses.beside(held.sinks.as_ref())? {
            args = args.sinks(sinks);
        }
        if let Some([q, k]) = &held.cu_seqlens
            && let (Some(q), Some(k)) = (uses.beside(Some(q))?, uses.beside(Some(k))?)
        {
            args = args.cu_seqlens(q, k);
        }
        if let (Some(region), Some((_, layout))) = (uses.beside(held.bias.as_ref())?, &held.bias)
            && let &[b, h, i, j] = layout.stride()
        {
            args = args.bias(BiasView::new(region, [b, h, i, j].map(|stride| stride as u64)));
        }
        Ok(args)
    }
}

/// The memory that a call reads and writes on a stream. While it lives, candle knows of these uses.
struct Uses<'a> {
    stream: &'a CudaStream,
    recorded: Vec<SyncOnDrop<'a>>,
}

impl<'a> Uses<'a> {
    fn of(stream: &'a CudaStream) -> Self {
        Self { stream, recorded: Vec::with_capacity(12) }
    }

    /// The memory of a tensor that is read, from its first element on.
    fn region(&mut self, (storage, layout): Stored<'a>) -> Result<Region> {
        let first = layout.start_offset();
        Ok(match &storage.slice {
            CudaStorageSlice::F32(slice) => self.read(slice, first),
            CudaStorageSlice::F16(slice) => self.read(slice, first),
            CudaStorageSlice::BF16(slice) => self.read(slice, first),
            CudaStorageSlice::U32(slice) => self.read(slice, first),
            CudaStorageSlice::I32(slice) => self.read(slice, first),
            CudaStorageSlice::U8(slice) => self.read(slice, first),
            _ => bail!(
                "a tensor is {:?}: attention takes F32, F16, BF16, U32, I32 and U8",
                storage.dtype()
            ),
        })
    }

    fn read<T>(&mut self, slice: &'a CudaSlice<T>, first: usize) -> Region {
        let (address, recorded) = slice.device_ptr(self.stream);
        self.recorded.push(recorded);
        let bytes = |elements: usize| (elements * size_of::<T>()) as u64;
        Region::new(address + bytes(first), bytes(slice.len().saturating_sub(first)))
    }

    /// The memory of an output.
    fn written<T>(&mut self, slice: &'a mut CudaSlice<T>) -> Region {
        let bytes = (slice.len() * size_of::<T>()) as u64;
        let (address, recorded) = slice.device_ptr_mut(self.stream);
        self.recorded.push(recorded);
        Region::new(address, bytes)
    }

    /// A tensor of Q, K, V or O.
    fn view(&mut self, p: &Problem, stored: Stored<'a>) -> Result<View> {
        let region = self.region(stored)?;
        Ok(View::new(region, strides(p, stored.1).map(|stride| stride as u64)))
    }

    /// A tensor beside them.
    fn beside(&mut self, held: Option<&'a Held<'_>>) -> Result<Option<Region>> {
        held.map(|(storage, layout)| self.region((on_cuda(storage)?, layout))).transpose()
    }
}

/// The library's context for one of candle's.
struct Gpu {
    // Dropped before the context that it is of.
    context: Context,
    _of: Arc<CudaContext>,
}

/// The library's context for candle's: made once, and kept, since its kernels stay loaded.
fn context(device: &CudaDevice) -> Result<Arc<Gpu>> {
    static KNOWN: Mutex<Vec<Arc<Gpu>>> = Mutex::new(Vec::new());
    let stream = device.cuda_stream();
    let of = stream.context();
    let handle = of.cu_ctx().cast();
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(gpu) = known.iter().find(|gpu| gpu.context.handle() == handle) {
        return Ok(gpu.clone());
    }
    // SAFETY: the context is candle's, of the driver that both open; it is released only after `context`
    // is dropped, which a static never is, so that its kernels outlive every launch.
    let context = unsafe { Context::from_handle(handle) }.map_err(wrap)?;
    let gpu = Arc::new(Gpu { context, _of: of.clone() });
    known.push(gpu.clone());
    Ok(gpu)
}

/// Plans of one operation, in the order of use, each with its context.
type Plans<P> = RefCell<Vec<(usize, P, Rc<Plan<P>>)>>;

/// An operation whose plans are kept.
trait Kept: Operation + PartialEq {
    fn with_plans<R>(then: impl FnOnce(&Plans<Self>) -> R) -> R;

    /// Bytes of the workspace of a call with memory for the LSE.
    fn workspace_bytes(plan: &Plan<Self>) -> u64;
}

macro_rules! kept {
    ($($operation:ty: $workspace_bytes:ident),*) => {$(
        impl Kept for $operation {
            fn workspace_bytes(plan: &Plan<Self>) -> u64 {
                plan.$workspace_bytes()
            }

            fn with_plans<R>(then: impl FnOnce(&Plans<Self>) -> R) -> R {
                thread_local!(static PLANS: Plans<$operation> = const { RefCell::new(Vec::new()) });
                PLANS.with(then)
            }
        }
    )*};
}
kept!(
    Problem: workspace_bytes_beside_lse,
    Decode: workspace_bytes_beside_lse,
    Backward: workspace_bytes
);

/// The plan of the best kernel for a problem.
fn plan<P: Kept>(gpu: &Gpu, problem: P) -> Result<Rc<Plan<P>>> {
    let of = gpu.context.handle().addr();
    P::with_plans(|plans| {
        let mut plans = plans.borrow_mut();
        let known =
            plans.iter().rposition(|(context, known, _)| *context == of && *known == problem);
        if let Some(at) = known {
            // The last is found first.
            let last = plans.len() - 1;
            plans.swap(at, last);
            return Ok(plans[last].2.clone());
        }
        let plan = registry::best_for(&problem, &gpu.context.target()).map_err(wrap)?.plan;
        if plans.len() == PLANS {
            plans.remove(0);
        }
        let plan = Rc::new(plan);
        plans.push((of, problem, plan.clone()));
        Ok(plan)
    })
}

/// Starts a plan's launches on candle's stream, with a workspace.
fn launch<P: Kept>(
    gpu: &Gpu,
    device: &CudaDevice,
    plan: &Plan<P>,
    args: impl FnOnce(Region) -> P::Args,
) -> Result<()> {
    let stream = device.cuda_stream();
    let (bytes, zeroed) = (P::workspace_bytes(plan) as usize, plan.zeroed_bytes() as usize);
    let enqueue = |workspace: Region| {
        // SAFETY: the stream is candle's, of this context. Every region is memory of a tensor that is
        // borrowed until this returns, or of a workspace; it is freed in the stream's order, after the
        // launches. Outputs and workspace were allocated for this call, or belong to this thread and
        // stream, whose launches follow one another; a kept workspace was zeroed, and each launch leaves
        // it zero. The kernels clamp key_lengths and page numbers to the cache; cu_seqlens are as
        // the functions of this crate ask.
        unsafe { gpu.context.enqueue(plan, &args(workspace), stream.cu_stream().cast()) }
            .map_err(wrap)
    };
    if bytes > 0 && bytes == zeroed && bytes <= KEPT_BYTES {
        return with_kept_workspace(device, enqueue);
    }
    if bytes == 0 {
        return enqueue(Region::default());
    }
    // SAFETY: kernels write each byte before they read it; the next lines zero the other bytes.
    let mut workspace = unsafe { device.alloc::<u8>(bytes)? };
    if zeroed > 0 {
        stream
            .memset_zeros(&mut workspace.slice_mut(..zeroed))
            .map_err(candle_core::Error::wrap)?;
    }
    let (address, _recorded) = workspace.device_ptr_mut(&stream);
    enqueue(Region::new(address, bytes as u64))
}

/// The largest kept workspace: queues, which are zero before and after a launch.
const KEPT_BYTES: usize = 1 << 16;

/// Calls with a zeroed workspace of this thread and stream.
fn with_kept_workspace(device: &CudaDevice, then: impl FnOnce(Region) -> Result<()>) -> Result<()> {
    thread_local!(
        static KEPT: RefCell<Vec<CudaSlice<u8>>> = const { RefCell::new(Vec::new()) };
    );
    let stream = device.cuda_stream();
    KEPT.with(|kept| {
        let mut kept = kept.borrow_mut();
        let is_of = |slice: &CudaSlice<u8>| {
            let of = slice.stream();
            of.cu_stream() == stream.cu_stream()
                && of.context().cu_ctx() == stream.context().cu_ctx()
        };
        let at = match kept.iter().position(is_of) {
            Some(at) => at,
            None => {
                kept.push(device.alloc_zeros(KEPT_BYTES)?);
                kept.len() - 1
            }
        };
        let (address, _recorded) = kept[at].device_ptr_mut(&stream);
        then(Region::new(address, KEPT_BYTES as u64))
    })
}
