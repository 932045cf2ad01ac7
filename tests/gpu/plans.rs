//! Plans of every kernel, enqueued on a stream of the test's own while it is captured.

use std::{ptr, sync::Arc};

use cuda_driver::functions;
use flash_attention::{
    CpuDevice,
    backend::DeviceTensor,
    raw::{Args, Plan, View},
    registry::KERNELS,
    session::Session,
};

use crate::{
    fake_driver::open,
    graph::{Graph, OwnStream},
    head::{gpu, memory, set_current, synchronize},
    replay,
    session::{inputs, problem, run},
};

#[test]
fn a_captured_decode_is_replayed_with_other_lengths() {
    let _fake = open();
    let gpu = gpu();
    replay::follows_lengths(&gpu, gpu.context());
}

#[test]
fn an_enqueue_of_every_kernel_touches_no_memory_and_can_be_captured() {
    let fake = open();
    let cpu = Session::new(Arc::new(CpuDevice::new()));
    let gpu = gpu();
    let (context, memory) = (gpu.context(), memory(&gpu));
    set_current(context.handle());
    for kernel in KERNELS {
        let p = problem(*kernel.dtypes.last().unwrap(), kernel.limits.head_dims[0]);
        let plan = Plan::new(&p, &context.target(), kernel).expect(kernel.name);
        let [q, k, v] = inputs(&p).map(|tensor| DeviceTensor::upload(&memory, &tensor).unwrap());
        let o = DeviceTensor::filled(&memory, p.dtype(), &p.q_shape(), 0xff).unwrap();
        let workspace = memory.filled(plan.workspace_bytes(), 0).unwrap();
        let view = |tensor: &DeviceTensor, seq| {
            View::contiguous(tensor.region(), p.layout(), p.heads(), seq, p.head_dim())
        };
        let (nq, nk) = (p.seq_q(), p.seq_k());
        let args = Args::new(view(&q, nq), view(&k, nk), view(&v, nk), view(&o, nq))
            .workspace(workspace.region());
        context.prepare(plan.entries()).unwrap();

        let stream = OwnStream::new();
        let (operations, launches) = (fake.operations(), fake.launches());
        let graph = Graph::capture(stream.0, || {
            // SAFETY: the stream is of this context; tensors and workspace outlive the graph;
            // the workspace is zero, and is this call's.
            unsafe { context.enqueue(&plan, &args, stream.0) }.unwrap();
        });
        let graph = graph.expect(kernel.name);
        assert_eq!(fake.operations(), operations, "{} touched memory, or waited", kernel.name);
        assert_eq!(fake.launches(), launches, "{}: captured, not run", kernel.name);

        let (expected, _) = run(&cpu, kernel.name, &p).expect(kernel.name);
        for replay in 0..2 {
            let region = o.region();
            // SAFETY: O is used in this stream alone until it is waited for.
            unsafe { functions::fill(region.address, 0xff, region.bytes as usize, stream.0) }
                .unwrap();
            graph.launch(stream.0).unwrap();
            synchronize(stream.0).unwrap();
            assert_eq!(o.to_host().unwrap(), expected.o, "{}: replay {replay}", kernel.name);
        }
    }
    set_current(ptr::null_mut());
}
