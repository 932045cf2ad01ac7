//! Tensor maps of a plan's calls: a layout is encoded once in a context, and gets the addresses of
//! later calls.

use std::{ptr, sync::Arc, thread};

use cuda_driver::{ResultCode, TensorMapLayout, TensorMapType};
use flash_attention::{
    CpuDevice, DType, Layout, Problem,
    backend::{DeviceBuffer, DeviceTensor, Memory, TensorMapSpec},
    raw::{Args, Context, Plan, View},
    registry,
    session::Session,
};

use crate::{
    fake_driver::open,
    head::{gpu, memory, set_current, synchronize},
    session::{inputs, problem, run},
};

fn planned(context: &Context) -> Plan {
    let kernel = registry::find("flash_hopper").unwrap();
    Plan::new(&problem(DType::F16, 64), &context.target(), kernel).unwrap()
}

/// Tensors of a call, in memory of their own.
struct Call {
    tensors: [DeviceTensor; 3],
    o: DeviceTensor,
    workspace: DeviceBuffer,
    layout: Layout,
}

impl Call {
    fn new(memory: &Arc<Memory>, plan: &Plan, layout: Layout) -> Self {
        let p = plan.problem();
        let stored = |tensor: flash_attention::Tensor| match layout {
            Layout::HeadsFirst => tensor,
            _ => tensor.swap_middle().unwrap(),
        };
        let tensors =
            inputs(p).map(|tensor| DeviceTensor::upload(memory, &stored(tensor)).unwrap());
        let o = DeviceTensor::filled(memory, p.dtype(), tensors[0].shape(), 0xff).unwrap();
        let workspace = memory.filled(plan.workspace_bytes(), 0).unwrap();
        Self { tensors, o, workspace, layout }
    }

    fn enqueue(&self, context: &Context, plan: &Plan) {
        let p = plan.problem();
        let view = |tensor: &DeviceTensor, seq| {
            View::contiguous(tensor.region(), self.layout, p.heads(), seq, p.head_dim())
        };
        let ([q, k, v], nq, nk) = (&self.tensors, p.seq_q(), p.seq_k());
        let args = Args::new(view(q, nq), view(k, nk), view(v, nk), view(&self.o, nq))
            .workspace(self.workspace.region());
        // SAFETY: the default stream; the tensors are this value's, which every test keeps until it
        // has waited; the workspace was zeroed.
        unsafe { context.enqueue(plan, &args, ptr::null_mut()) }.unwrap();
    }

    /// O of the call, `[B, H, N, D]`, after it has ended.
    fn o(&self) -> Vec<u8> {
        synchronize(ptr::null_mut()).unwrap();
        let o = self.o.to_host().unwrap();
        match self.layout {
            Layout::HeadsFirst => o.as_bytes().to_vec(),
            _ => o.swap_middle().unwrap().as_bytes().to_vec(),
        }
    }
}

fn expected(p: &Problem) -> Vec<u8> {
    let cpu = Session::new(Arc::new(CpuDevice::new()));
    run(&cpu, "flash_hopper", p).unwrap().0.o.as_bytes().to_vec()
}

#[test]
fn other_addresses_encode_nothing_and_other_strides_do() {
    let fake = open();
    let gpu = gpu();
    let (context, memory) = (gpu.context(), memory(&gpu));
    set_current(context.handle());
    let plan = planned(context);
    let expected = expected(plan.problem());
    let mut calls = Vec::new();
    for (layout, encoded) in [
        // K and V have one layout.
        (Layout::HeadsFirst, 3),
        (Layout::HeadsFirst, 0),
        (Layout::TokensFirst, 3),
        (Layout::TokensFirst, 0),
        (Layout::HeadsFirst, 0),
    ] {
        let call = Call::new(&memory, &plan, layout);
        // Twice: at other addresses than before, and at the same.
        for encoded in [encoded, 0] {
            let before = fake.maps_encoded();
            call.enqueue(context, &plan);
            assert_eq!(fake.maps_encoded() - before, encoded, "{layout:?}, call {}", calls.len());
            assert!(call.o() == expected, "{layout:?}, call {}", calls.len());
        }
        calls.push(call);
    }
    set_current(ptr::null_mut());
}

/// More layouts than a context keeps: each is encoded when it comes, and again when it has been
/// forgotten.
#[test]
fn layouts_are_forgotten_in_time() {
    let fake = open();
    let gpu = gpu();
    let map = |address, rows| TensorMapSpec {
        address,
        dtype: DType::F16,
        dims: vec![64, rows],
        strides_bytes: vec![128],
        box_dims: vec![64, 8],
        swizzle_bytes: 128,
    };
    let before = fake.maps_encoded();
    for rows in (1..=100).chain([100, 1]) {
        let [here, there] = [4096, 8192]
            .map(|address| gpu.context().encode_tensor_map(&map(address, rows)).unwrap());
        assert_ne!(here, there, "{rows} rows: the address is in the map");
    }
    assert_eq!(fake.maps_encoded() - before, 101);
}

#[test]
fn threads_share_a_plan() {
    let _fake = open();
    let gpu = gpu();
    let (context, memory) = (gpu.context(), memory(&gpu));
    let plan = planned(context);
    let expected = expected(plan.problem());
    set_current(context.handle());
    let calls = [Layout::HeadsFirst, Layout::TokensFirst, Layout::HeadsFirst]
        .map(|layout| Call::new(&memory, &plan, layout));
    thread::scope(|scope| {
        for call in &calls {
            let (plan, expected) = (&plan, &expected);
            scope.spawn(move || {
                set_current(context.handle());
                for _ in 0..4 {
                    call.enqueue(context, plan);
                    assert!(call.o() == *expected);
                }
                set_current(ptr::null_mut());
            });
        }
    });
    set_current(ptr::null_mut());
}

#[test]
fn an_address_is_replaced_in_a_context_and_on_16_bytes_alone() {
    let _fake = open();
    let gpu = gpu();
    let layout = TensorMapLayout {
        address: 4096,
        element: TensorMapType::F16,
        dims: &[64, 64],
        strides_bytes: &[128],
        box_dims: &[64, 8],
        swizzle_bytes: 128,
    };
    set_current(gpu.context().handle());
    let mut map = cuda_driver::encode_tensor_map(&layout).unwrap();
    let there =
        cuda_driver::encode_tensor_map(&TensorMapLayout { address: 8192, ..layout }).unwrap();
    assert_eq!(
        cuda_driver::replace_address(&mut map, 8200).unwrap_err().code,
        ResultCode::INVALID_VALUE
    );
    cuda_driver::replace_address(&mut map, 8192).unwrap();
    assert_eq!(map, there);
    set_current(ptr::null_mut());
    let failure = cuda_driver::replace_address(&mut map, 4096).unwrap_err();
    assert_eq!((failure.function, failure.code.0), ("cuTensorMapReplaceAddress", 201));
    assert_eq!(map, there, "a refused address leaves the map as it was");
}
