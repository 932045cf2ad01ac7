//! A decode that is captured in a graph and replayed with other lengths in device memory: on the fake driver here, and
//! on a GPU by `tests/decode.rs`.

use std::{num::NonZeroU32, ptr, sync::Arc};

use cuda_driver::functions;
use flash_attention::{
    DType, Layout, Problem, Tensor,
    backend::{Device, DeviceTensor, Memory},
    raw::{Args, Context, DecodeArgs, Plan, View},
    registry::{DECODE_KERNELS, Decode, Pages},
    session::{DecodeInputs, Inputs, Outputs, Session},
    verify::verify_decode,
};

use crate::graph::{Graph, OwnStream};

/// Keys that a sequence may have.
const CAPACITY: usize = 700;
/// More parts than there are tiles of `CAPACITY` keys.
const SPLITS: u32 = 9;
/// Of three sequences, one replay after the other: shorter after longer, so that parts of before are left.
const LENGTHS: [[i32; 3]; 5] =
    [[700, 1, 300], [0, 128, 129], [3, 700, 0], [127, 255, 700], [1, 2, 64]];

/// Checks every replay against f64, and bit for bit against a launch of its own.
pub fn follows_lengths<D: Device + 'static>(gpu: &Arc<D>, context: &Context) {
    let memory = Memory::new(gpu.clone());
    // SAFETY: the device keeps its context.
    unsafe { functions::ctx_set_current(context.handle()) }.unwrap();
    let cases = [(0, DType::F16), (48, DType::F16), (0, DType::E4M3), (48, DType::E4M3)];
    for (page_size, stored) in cases {
        let p = Problem::builder(3, 4, 2, 64).kv_heads(2).seq_k(CAPACITY).dtype(DType::F16);
        let p = p.causal(true).layout(Layout::TokensFirst).build().unwrap();
        let max_pages = (CAPACITY as u32).div_ceil(page_size.max(1));
        let pages = Pages { page_size, pages: 3 * max_pages, max_pages };
        let decode = if page_size == 0 { Decode::new(p) } else { Decode::paged(p, pages).unwrap() };
        let decode = decode.cache_dtype(stored).unwrap().splits(NonZeroU32::new(SPLITS));
        let table: Vec<i32> =
            (0..pages.pages).map(|at| ((at * 7 + 3) % pages.pages) as i32).collect();
        let scales = [vec![0.7f32, 1.3], vec![1.9, 0.4]];

        let random = |dtype, shape: [usize; 4], seed| Tensor::random(dtype, &shape, seed, 0.0);
        let host = [
            random(DType::F16, p.q_shape(), 1),
            random(stored, decode.k_shape(), 2),
            random(stored, decode.v_shape(), 3),
        ];
        let [q, k, v] =
            host.each_ref().map(|tensor| DeviceTensor::upload(&memory, tensor).unwrap());
        let mut o = memory.filled(p.o_elements() as u64 * 2, 0xff).unwrap();
        let mut lse = memory.filled(p.rows() as u64 * 4, 0xff).unwrap();
        let mut lengths = memory.upload(&LENGTHS[0]).unwrap();
        let page_table = memory.upload(&table).unwrap();
        let [k_scale, v_scale] = scales.each_ref().map(|scales| memory.upload(scales).unwrap());

        let plan = Plan::new(&decode, &context.target(), &DECODE_KERNELS[0]).unwrap();
        let workspace = memory.filled(plan.workspace_bytes(), 0xff).unwrap();
        let rows = |of: [usize; 4]| of[1];
        let view = |region, heads, rows, columns| {
            View::contiguous(region, Layout::TokensFirst, heads, rows, columns)
        };
        let cached =
            |tensor: &DeviceTensor| view(tensor.region(), 2, rows(decode.k_shape()), p.head_dim());
        let new = |region| view(region, 4, p.seq_q(), p.head_dim());
        let forward = Args::new(new(q.region()), cached(&k), cached(&v), new(o.region()));
        let forward = forward.lse(lse.region()).workspace(workspace.region());
        let mut args = DecodeArgs::new(forward).seqused_k(lengths.region());
        if page_size != 0 {
            args = args.page_table(page_table.region());
        }
        if decode.has_scales() {
            args = args.scales(k_scale.region(), v_scale.region());
        }
        context.prepare(plan.entries()).unwrap();
        gpu.synchronize().unwrap();

        let stream = OwnStream::new();
        let graph = Graph::capture(stream.0, || {
            // SAFETY: the stream is of this context; tensors and workspace outlive the graph, and are its own.
            unsafe { context.enqueue(&plan, &args, stream.0) }.unwrap();
        });
        let graph = graph.unwrap();
        for of_sequences in LENGTHS {
            lengths.write(&of_sequences).unwrap();
            o.fill(0xff).unwrap();
            lse.fill(0xff).unwrap();
            gpu.synchronize().unwrap();
            graph.launch(stream.0).unwrap();
            // SAFETY: the stream lives, and its context is current.
            unsafe { functions::stream_synchronize(stream.0) }.unwrap();
            let mut bytes = vec![0u8; o.bytes() as usize];
            o.read(&mut bytes).unwrap();
            let found = Outputs {
                o: Tensor::from_bytes(DType::F16, &p.o_shape(), &bytes).unwrap(),
                lse: Tensor::from_vec(&p.lse_shape(), lse.to_vec::<f32>().unwrap()).unwrap(),
                weights: None,
            };
            let inputs = DecodeInputs {
                tensors: Inputs::new(&host[0], &host[1], &host[2]),
                seqused_k: Some(&of_sequences),
                page_table: (page_size != 0).then_some(&table),
                scales: decode.has_scales().then(|| scales.each_ref().map(Vec::as_slice)),
            };
            let label = format!("pages of {page_size}, {stored}, {of_sequences:?}");
            let result = verify_decode(&decode, &inputs, &found).unwrap();
            assert!(result.passes(), "{label}: {result}");
            let session = Session::new(gpu.clone());
            let (expected, _) = session.run_decode(&DECODE_KERNELS[0], &decode, &inputs).unwrap();
            assert_eq!((&found.o, &found.lse), (&expected.o, &expected.lse), "{label}");
        }
    }
    // SAFETY: no context.
    unsafe { functions::ctx_set_current(ptr::null_mut()) }.unwrap();
}
