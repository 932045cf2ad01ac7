//! Merging as an operation: a part of attention, or of a gradient, joins the sum of the earlier
//! parts.

use kernels_gpu::{
    args,
    merge::{self, OUT, PART, SUM, WEIGHTED},
};

use super::{
    Call, Draft, HEAD_DIM_STEP, Operation, Spec, Step,
    tensors::{Region, View},
};
use crate::{backend::KernelArgs as _, dtype::DType, error::Error, problem::MAX_SEQ};

/// A merge of tensors `[B, H, N, D]`: the sum is f32, and all others have the storage type.
///
/// O is weighted by its LSE, as in `O = (a O_sum + b O_part) / (a + b)` with
/// `a = exp(LSE_sum - m)`, `b = exp(LSE_part - m)`, `m` the larger LSE. Gradients are added. Empty
/// parts and sums have O = 0 and LSE = -inf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Merge {
    /// Extents `[B, H, N, D]`; D is a multiple of [`HEAD_DIM_STEP`].
    pub extents: [usize; 4],
    /// Storage type.
    pub dtype: DType,
    /// Whether there is a sum already; otherwise it is empty.
    pub sum: bool,
    /// Whether a part joins.
    pub part: bool,
    /// Whether both have an LSE.
    pub weighted: bool,
    /// Whether the result is written in the storage type; otherwise it becomes the sum.
    pub out: bool,
}

impl Merge {
    /// A part that joins a sum, both without LSE.
    #[must_use]
    pub const fn new(extents: [usize; 4], dtype: DType) -> Self {
        Self { extents, dtype, sum: true, part: true, weighted: false, out: false }
    }

    /// With an LSE of sum and part if `weighted`.
    #[must_use]
    pub const fn weighted(mut self, weighted: bool) -> Self {
        self.weighted = weighted;
        self
    }

    /// With an existing sum if `sum`, and a part that joins it if `part`.
    #[must_use]
    pub const fn of(mut self, sum: bool, part: bool) -> Self {
        (self.sum, self.part) = (sum, part);
        self
    }

    /// With the result in the storage type if `out`.
    #[must_use]
    pub const fn out(mut self, out: bool) -> Self {
        self.out = out;
        self
    }

    /// Rows of all heads.
    const fn rows(&self) -> usize {
        let [batch, heads, rows, _] = self.extents;
        batch * heads * rows
    }
}

/// A kernel that merges.
pub type MergeSpec = Spec<Merge>;

/// The tensors of one merge.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MergeArgs {
    /// The part, and its LSE, f32 contiguous `[B, H, N]`.
    pub part: (View, Region),
    /// The sum, f32, and its LSE.
    pub sum: (View, Region),
    /// The result in the storage type, and its LSE.
    pub out: (View, Region),
    /// Elements from one head to the next in the LSE of the sum and of the result, whose batch entries
    /// are H heads apart.
    pub lse_stride: u64,
}

impl Operation for Merge {
    type Args = MergeArgs;
    type Limits = ();

    fn kernels() -> &'static [MergeSpec] {
        MERGE_KERNELS
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn obstacle(&self, _: &()) -> Option<String> {
        let [.., columns] = self.extents;
        if columns == 0 || columns % HEAD_DIM_STEP != 0 {
            return Some(format!(
                "does not support head dim {columns}: it has multiples of {HEAD_DIM_STEP}"
            ));
        }
        let rows = self.rows();
        (rows == 0 || rows > MAX_SEQ)
            .then(|| format!("does not support {rows} rows: it has from 1 to {MAX_SEQ}"))
    }

    fn check(&self, args: &MergeArgs) -> Result<(), Error> {
        let [batch, heads, rows, _] = self.extents;
        let matrices = (batch * heads) as u64;
        let strided = (matrices - 1) * args.lse_stride + rows as u64;
        let used = [
            ("part", self.part, args.part, self.dtype, matrices * rows as u64),
            ("sum", self.sum || !self.out, args.sum, DType::F32, strided),
            ("out", self.out, args.out, self.dtype, strided),
        ];
        for (what, _, (view, lse), dtype, numbers) in used.into_iter().filter(|(_, used, ..)| *used)
        {
            view.check(what, dtype, self.extents)?;
            if what != "part" {
                view.check_distinct(what, self.extents)?;
            }
            if self.weighted {
                lse.check("lse", 4 * numbers, 4)?;
            }
        }
        if self.weighted && matrices > 1 && args.lse_stride < rows as u64 {
            return Err(Error::InvalidValue {
                what: "lse_stride",
                given: args.lse_stride.to_string(),
                remedy: format!("a head has {rows} rows"),
            });
        }
        Ok(())
    }
}

/// Every kernel that merges.
pub static MERGE_KERNELS: &[MergeSpec] = &[MergeSpec {
    name: "merge",
    summary: "a part of attention, or of a gradient, joins the sum of the parts before it",
    idea: "two parts are joined by their LSE, as the online softmax joins two tiles",
    dtypes: &DType::ALL,
    capability: (8, 0),
    exact_capability: false,
    limits: (),
    draft: |merge, _| {
        let blocks = merge.rows().div_ceil(merge::ROWS as usize) as u32;
        let step = Step::new(merge::ENTRIES, merge.dtype, 0, args)?;
        Ok(Draft::from(Step { grid: blocks.into(), ..step }))
    },
}];

/// The arguments of a call, as bytes.
fn args(call: &Call<'_, Merge>) -> Vec<u8> {
    let (merge, MergeArgs { part, sum, out, lse_stride }) = (call.problem, *call.args);
    let [_, heads, rows, columns] = merge.extents;
    let flags =
        [(merge.sum, SUM), (merge.part, PART), (merge.weighted, WEIGHTED), (merge.out, OUT)];
    args::MergeArgs {
        part: part.0.arg(),
        sum: sum.0.arg(),
        out: out.0.arg(),
        part_lse: part.1.arg(),
        sum_lse: sum.1.arg(),
        out_lse: out.1.arg(),
        lse_stride,
        heads: heads as u32,
        rows: rows as u32,
        total_rows: merge.rows() as u32,
        columns: columns as u32,
        flags: flags.into_iter().filter(|(set, _)| *set).map(|(_, flag)| flag).sum(),
        padding: 0,
    }
    .to_launch_bytes()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        CpuDevice, Tensor,
        backend::Memory,
        problem::Layout,
        registry::{Target, find},
        session::{Inputs, Session},
    };

    fn contiguous(region: Region, [_, heads, rows, columns]: [usize; 4]) -> View {
        View::contiguous(region, Layout::HeadsFirst, heads, rows, columns)
    }

    /// The largest relative change by rounding to a type.
    const fn rounding(dtype: DType) -> f64 {
        match dtype {
            DType::F32 => f32::EPSILON as f64 / 2.0,
            DType::F16 => 1.0 / 2048.0,
            DType::BF16 => 1.0 / 256.0,
            DType::E4M3 => 1.0 / 16.0,
        }
    }

    fn lse_of(values: &[f64]) -> f64 {
        let m = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if m == f64::NEG_INFINITY {
            return m;
        }
        m + values.iter().map(|v| (v - m).exp()).sum::<f64>().ln()
    }

    /// Parts of every kind, against the formula in f64: with a sum and without, empty on either
    /// side, into a sum and into the storage type; rows in the middle of a longer sum.
    #[test]
    fn parts_join_as_the_formula_says() {
        for dtype in DType::ALL {
            for columns in [8, 72, 128] {
                for (flags, empty) in (0..16).flat_map(|flags| (0..4).map(move |e| (flags, e))) {
                    let bit = |at: usize| flags >> at & 1 == 1;
                    check(dtype, columns, [bit(0), bit(1), bit(2), bit(3)], empty);
                }
            }
        }
    }

    fn check(dtype: DType, columns: usize, [sum, part, weighted, out]: [bool; 4], empty: usize) {
        let (extents, all_rows, first) = ([2, 3, 5, columns], 9, 2);
        let [batch, heads, rows, _] = extents;
        let memory = Memory::new(Arc::new(CpuDevice::new()));
        let random = |dtype, seed, shape: &[usize]| Tensor::random(dtype, shape, seed, 0.5);
        let parts = random(dtype, 1, &extents);
        let sums = random(DType::F32, 2, &[batch, heads, all_rows, columns]);
        let mut part_lse = random(DType::F32, 3, &[batch, heads, rows]).to_f64();
        let mut sum_lse = random(DType::F32, 4, &[batch, heads, all_rows]).to_f64();
        if empty & 1 == 1 {
            part_lse[7] = f64::NEG_INFINITY;
        }
        if empty & 2 == 2 {
            sum_lse[all_rows + first + 2] = f64::NEG_INFINITY;
        }
        let f32s = |values: &[f64]| values.iter().map(|&v| v as f32).collect::<Vec<_>>();
        let upload = |bytes: &[u8]| memory.upload(bytes).unwrap();
        let buffers = [
            upload(parts.as_bytes()),
            upload(bytemuck::cast_slice(&f32s(&part_lse))),
            upload(sums.as_bytes()),
            upload(bytemuck::cast_slice(&f32s(&sum_lse))),
            memory
                .filled((batch * heads * all_rows * columns * dtype.size()) as u64, 0xff)
                .unwrap(),
            memory.filled((batch * heads * all_rows * 4) as u64, 0xff).unwrap(),
        ];
        let region = |at: usize, skip: usize| {
            let whole = buffers[at].region();
            whole.part(skip as u64, whole.bytes - skip as u64)
        };
        let strided = |at: usize, size: usize| {
            let strides = Layout::HeadsFirst.strides(heads, all_rows, columns);
            let strides = strides.map(|stride| stride as u64);
            View::new(region(at, first * columns * size), strides)
        };
        let args = MergeArgs {
            part: (contiguous(region(0, 0), extents), region(1, 0)),
            sum: (strided(2, 4), region(3, 4 * first)),
            out: (strided(4, dtype.size()), region(5, 4 * first)),
            lse_stride: all_rows as u64,
        };
        let merge = Merge::new(extents, dtype).of(sum, part).weighted(weighted).out(out);
        let device = memory.device();
        let plan = MERGE_KERNELS[0].plan(&merge, &Target::of(&**device)).unwrap();
        for launch in plan.launches_for(&**device, &args).unwrap() {
            // SAFETY: the buffers have the lengths that the plan checked.
            unsafe { device.launch(&launch) }.unwrap();
        }
        device.synchronize().unwrap();
        let (of_result, lse_of_result) = if out { (4, 5) } else { (2, 3) };
        let result = if out {
            let mut tensor = Tensor::zeros(dtype, &[batch, heads, all_rows, columns]);
            buffers[of_result].read(tensor.as_bytes_mut()).unwrap();
            tensor.to_f64()
        } else {
            buffers[of_result].to_vec::<f32>().unwrap().into_iter().map(f64::from).collect()
        };
        let lse = buffers[lse_of_result].to_vec::<f32>().unwrap();
        let (parts, sums) = (parts.to_f64(), sums.to_f64());
        for matrix in 0..batch * heads {
            for i in 0..all_rows {
                let at = matrix * all_rows + i;
                let inside = (first..first + rows).contains(&i);
                let place = matrix * rows + if inside { i - first } else { 0 };
                let both = |is: bool, lse: f64| if is { lse } else { f64::NEG_INFINITY };
                let [a, b] = if inside {
                    [both(sum, sum_lse[at]), both(part, part_lse[place])]
                } else {
                    [f64::NEG_INFINITY; 2]
                };
                let joined = lse_of(&[a, b]);
                let weight = |lse: f64, is: bool| match (is, weighted) {
                    (false, _) => 0.0,
                    (true, false) => 1.0,
                    (true, true) if joined == f64::NEG_INFINITY => 0.0,
                    (true, true) => (lse - joined).exp(),
                };
                for c in 0..columns {
                    let given = result[at * columns + c];
                    if !inside {
                        let untouched = if out { f64::NAN } else { sums[at * columns + c] };
                        assert!(given == untouched || given.is_nan() && untouched.is_nan());
                        continue;
                    }
                    let expected = weight(a, sum) * sums[at * columns + c]
                        + weight(b, part) * parts[place * columns + c];
                    let last = rounding(if out { dtype } else { DType::F32 });
                    // Weights of numbers near 1, by exp2 of the GPU's precision.
                    let most = (last + 1e-6) * (1.0 + expected.abs());
                    assert!((given - expected).abs() <= most, "{merge:?}: {given} for {expected}");
                }
                if weighted && inside {
                    let given = f64::from(lse[at]);
                    let near = given == joined || (given - joined).abs() <= 1e-6;
                    assert!(near, "{merge:?}: LSE {given} for {joined}");
                }
            }
        }
    }

    /// Attention of two halves of the keys, merged, is attention of all keys.
    #[test]
    fn two_halves_are_the_whole() {
        let session = Session::new(Arc::new(CpuDevice::new()));
        let problem = crate::Problem::builder(1, 2, 40, 64).dtype(DType::F16).build().unwrap();
        let kernel = find("flash_mma").unwrap();
        let shape = problem.q_shape();
        let [q, k, v] = [1, 2, 3].map(|seed| Tensor::random(DType::F16, &shape, seed, 0.3));
        let (whole, _) = session.run(kernel, &problem, &Inputs::new(&q, &k, &v)).unwrap();
        let half = problem.to_builder().seq_k(20).build().unwrap();
        let memory = session.memory();
        let extents = [1, 2, 40, 64];
        let sum = memory.allocate(4 * 2 * 40 * 64).unwrap();
        let sum_lse = memory.allocate(4 * 2 * 40).unwrap();
        let out = memory.allocate(2 * 2 * 40 * 64).unwrap();
        let out_lse = memory.allocate(4 * 2 * 40).unwrap();
        for (at, last) in [(0, false), (20, true)] {
            let rows = |t: &Tensor| {
                let mut part = Tensor::zeros(DType::F16, &[1, 2, 20, 64]);
                for h in 0..2 {
                    let (from, to) = ((h * 40 + at) * 128, h * 20 * 128);
                    part.as_bytes_mut()[to..to + 20 * 128]
                        .copy_from_slice(&t.as_bytes()[from..from + 20 * 128]);
                }
                part
            };
            let inputs = (rows(&k), rows(&v));
            let inputs = Inputs::new(&q, &inputs.0, &inputs.1);
            let (part, _) = session.run(kernel, &half, &inputs).unwrap();
            let part_o = memory.upload(part.o.as_bytes()).unwrap();
            let part_lse = memory.upload(part.lse.as_bytes()).unwrap();
            let merge = Merge::new(extents, DType::F16).of(last, true).weighted(true).out(last);
            let args = MergeArgs {
                part: (contiguous(part_o.region(), extents), part_lse.region()),
                sum: (contiguous(sum.region(), extents), sum_lse.region()),
                out: (contiguous(out.region(), extents), out_lse.region()),
                lse_stride: 40,
            };
            let plan = MERGE_KERNELS[0].plan(&merge, &session.target()).unwrap();
            for launch in plan.launches_for(session.device(), &args).unwrap() {
                // SAFETY: the buffers have the lengths that the plan checked.
                unsafe { session.device().launch(&launch) }.unwrap();
            }
        }
        let mut o = Tensor::zeros(DType::F16, &shape);
        out.read(o.as_bytes_mut()).unwrap();
        for (a, b) in o.to_f64().into_iter().zip(whole.o.to_f64()) {
            assert!((a - b).abs() < 2e-3, "{a} for {b}");
        }
        for (a, b) in out_lse.to_vec::<f32>().unwrap().into_iter().zip(whole.lse.to_f64()) {
            assert!((f64::from(a) - b).abs() < 1e-5, "{a} for {b}");
        }
    }
}
