//! Head dims that no entry is made for: every multiple of 8, in the next larger entry, with nothing
//! read or written beyond a row's own columns.

mod suite;

use std::sync::Arc;

use flash_attention::{
    DType, Device, Layout, Problem, Tensor, Window,
    backend::{DeviceTensor, Memory},
    oracle,
    raw::{Args, Plan, Region, View},
    registry::{KernelSpec, Target},
    session::{Inputs, Outputs},
    verify::verify,
};
use suite::Case;

/// Kernels that run on a device, in f32 and f16.
fn kernels(device: &dyn Device) -> impl Iterator<Item = (&'static KernelSpec, DType)> {
    let target = Target::of(device);
    suite::kernels()
        .filter(move |(kernel, dtype)| *dtype != DType::BF16 && kernel.runs_on(&target).is_ok())
}

fn sweep(device: &Arc<dyn Device>) {
    let mut failures = Vec::new();
    for (kernel, dtype) in kernels(&**device) {
        let head_dims = suite::head_dims(kernel);
        let most = *kernel.limits.head_dims.last().unwrap();
        assert!(head_dims.iter().copied().eq((8..=most).step_by(8)), "{}", kernel.name);
        for d in head_dims {
            let causal = d / 8 % 2 == 1;
            let problem = Problem::builder(1, 2, 3, d).seq_k(5).dtype(dtype).causal(causal);
            let case = Case::new(&format!("head dim {d}"), problem.build().unwrap());
            match case.check(device, kernel) {
                Ok(Some(_)) => {}
                Ok(None) => failures.push(format!("{} {dtype} refused {d}", kernel.name)),
                Err(what) => failures.push(what),
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn every_multiple_of_8_is_right_on_the_emulator() {
    sweep(&suite::emulator());
}

#[test]
fn every_multiple_of_8_is_right_on_a_gpu() {
    suite::on_a_gpu(sweep);
}

/// D 192 with values of 128, and rows narrower still, over the edges of the tiles.
fn narrow_values(device: &Arc<dyn Device>) {
    let mut failures = Vec::new();
    for (kernel, dtype) in kernels(&**device) {
        for (d, d_v) in [(192, 128), (168, 104)] {
            if !kernel.limits.has_head_dim(d) {
                continue;
            }
            let shape = |seq_q, seq_k| {
                Problem::builder(1, 2, seq_q, d).head_dim_v(d_v).seq_k(seq_k).dtype(dtype)
            };
            let window = Window { left: Some(100), right: None };
            for problem in [
                shape(130, 257),
                shape(129, 129).causal(true),
                shape(3, 300).kv_heads(1).mask(true).softcap(Some(3.0)),
                shape(70, 290).causal(true).window(window).layout(Layout::TokensFirst),
            ] {
                let problem = problem.build().unwrap();
                let case = Case::new(&format!("{problem:?}"), problem);
                match case.check(device, kernel) {
                    Ok(Some(_)) => {}
                    Ok(None) => failures.push(format!("{} refused {problem:?}", kernel.name)),
                    Err(what) => failures.push(what),
                }
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn values_of_another_head_dim_are_right_on_the_emulator() {
    narrow_values(&suite::emulator());
}

#[test]
fn values_of_another_head_dim_are_right_on_a_gpu() {
    suite::on_a_gpu(narrow_values);
}

/// Heads of the tensors that the one head of a problem stands among.
const HEADS: usize = 3;

/// The middle head of a tensor `[B, N, 3, D]`.
fn middle(tensor: &DeviceTensor, seq: usize, d: usize) -> View {
    let skipped = (d * tensor.dtype().size()) as u64;
    let region = tensor.region();
    let region = Region::new(region.address + skipped, region.bytes - skipped);
    View::new(region, [seq * HEADS * d, d, HEADS * d].map(|stride| stride as u64))
}

/// A tensor `[1, N, 3, D]` of NaN, but for its middle head.
fn among_nan(head: &Tensor) -> Tensor {
    let &[_, seq, _, d] = head.shape() else { panic!("{:?}", head.shape()) };
    let values = head.to_f64();
    let row = |n: usize| {
        let nan = || std::iter::repeat_n(f64::NAN, d);
        nan().chain(values[n * d..][..d].iter().copied()).chain(nan())
    };
    let values: Vec<f64> = (0..seq).flat_map(row).collect();
    Tensor::from_f64(head.dtype(), &[1, seq, HEADS, d], &values).unwrap()
}

/// The heads before and after are NaN in Q, K and V, and in O stay what they were.
fn check_neighbours(
    device: &Arc<dyn Device>,
    kernel: &'static KernelSpec,
    p: &Problem,
) -> Result<(), String> {
    let what = format!("{} {} {} {}", kernel.name, p.dtype(), p.head_dim(), p.head_dim_v());
    let random = |shape: [usize; 4], seed| Tensor::random(p.dtype(), &shape, seed, 0.0);
    let (q, k) = (random(p.q_shape(), 1), random(p.k_shape(), 2));
    let v = random(p.v_shape(), 3);
    let memory = Memory::new(device.clone());
    let [on_q, on_k, on_v] =
        [&q, &k, &v].map(|t| DeviceTensor::upload(&memory, &among_nan(t)).unwrap());
    let [_, seq_q, _, d_v] = p.o_shape();
    let o = DeviceTensor::filled(&memory, p.dtype(), &[1, seq_q, HEADS, d_v], 0xff).unwrap();
    let lse = DeviceTensor::filled(&memory, DType::F32, &p.lse_shape(), 0xff).unwrap();
    let plan = Plan::new(p, &Target::of(&**device), kernel).map_err(|e| e.to_string())?;
    let workspace = memory.filled(plan.workspace_bytes(), 0).unwrap();
    let args = Args::new(
        middle(&on_q, seq_q, p.head_dim()),
        middle(&on_k, p.seq_k(), p.head_dim()),
        middle(&on_v, p.seq_k(), d_v),
        middle(&o, seq_q, d_v),
    );
    let args = args.lse(lse.region()).workspace(workspace.region());
    for launch in plan.launches_for(&**device, &args).map_err(|e| e.to_string())? {
        // SAFETY: every tensor of the plan's arguments lives until the end of the function.
        unsafe { device.launch(&launch).map_err(|e| format!("{what}: {e}"))? };
    }
    device.synchronize().map_err(|e| format!("{what}: {e}"))?;
    let all = o.to_host().unwrap();
    let size = p.dtype().size() * d_v;
    let heads: Vec<&[u8]> = all.as_bytes().chunks(size).collect();
    let (own, others): (Vec<_>, Vec<_>) = heads.iter().enumerate().partition(|(i, _)| i % 3 == 1);
    if others.iter().any(|(_, head)| head.iter().any(|&byte| byte != 0xff)) {
        return Err(format!("{what}: a neighbour's O was written"));
    }
    let own: Vec<u8> = own.into_iter().flat_map(|(_, head)| head.iter().copied()).collect();
    let mut own_o = Tensor::zeros(p.dtype(), &p.o_shape());
    own_o.as_bytes_mut().copy_from_slice(&own);
    let outputs = Outputs { o: own_o, lse: lse.to_host().unwrap(), weights: None };
    let result = verify(p, &Inputs::new(&q, &k, &v), &outputs, &oracle::all_rows(p));
    if result.passes() { Ok(()) } else { Err(format!("{what}: {result}")) }
}

/// Head dims, and head dims of values, in each of the entries; the last ones of D 192 as some models
/// have them.
const NEIGHBOURED: [[usize; 2]; 10] = [
    [8, 8],
    [40, 40],
    [72, 72],
    [80, 80],
    [104, 104],
    [136, 136],
    [200, 200],
    [248, 248],
    [24, 72],
    [192, 128],
];

fn neighbours(device: &Arc<dyn Device>) {
    let mut failures = Vec::new();
    for (kernel, dtype) in kernels(&**device) {
        for [d, d_v] in NEIGHBOURED {
            if d.max(d_v) > *kernel.limits.head_dims.last().unwrap() {
                continue;
            }
            let p = Problem::builder(1, 1, 3, d).head_dim_v(d_v).seq_k(4).dtype(dtype);
            let p = p.layout(Layout::TokensFirst).build().unwrap();
            failures.extend(check_neighbours(device, kernel, &p).err());
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn neighbouring_heads_are_neither_read_nor_written_on_the_emulator() {
    neighbours(&suite::emulator());
}

#[test]
fn neighbouring_heads_are_neither_read_nor_written_on_a_gpu() {
    suite::on_a_gpu(neighbours);
}
