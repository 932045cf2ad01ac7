//! Attention of a few queries against a cache of keys and values, ready for any number of runs.

use std::{fmt, sync::Arc};

use super::{Inputs, MemoryReport, Outputs, POISON, Session, Work, runner::Runner, view};
use crate::{
    backend::{Device, DeviceBuffer, DeviceTensor, Memory, memory::expect_device},
    dtype::DType,
    error::Error,
    problem::Extras,
    raw::{Args, DecodeArgs, Plan},
    registry::{Decode, DecodeSpec, decode::missing_scales},
    tensor::Tensor,
};

/// Keys and values in device memory, and each sequence's share of them.
#[derive(Clone, Copy, Debug)]
pub struct Cached<'a> {
    /// Keys, of [`Decode::k_shape`].
    pub k: &'a DeviceTensor,
    /// Values, of [`Decode::v_shape`].
    pub v: &'a DeviceTensor,
    /// Keys of each sequence, i32 `[B]`; without it all have as many as the problem.
    pub seqused_k: Option<&'a DeviceBuffer>,
    /// Pages of each sequence, i32 `[B, max_pages]`, where the cache is paged.
    pub page_table: Option<&'a DeviceBuffer>,
    /// Scales of K and of V, f32 `[Hkv]` each, where the cache is in e4m3.
    pub scales: Option<[&'a DeviceBuffer; 2]>,
}

/// The inputs of a decode, on the host.
#[derive(Clone, Copy, Debug)]
pub struct DecodeInputs<'a> {
    /// Queries, the cache as keys and values ([`Decode::k_shape`], [`Decode::v_shape`]), and the
    /// problem's other tensors.
    pub tensors: Inputs<'a>,
    /// Keys of each sequence, `[B]`; without it all have as many as the problem.
    pub seqused_k: Option<&'a [i32]>,
    /// Pages of each sequence, `[B, max_pages]`, where the cache is paged. Entries beyond a
    /// sequence's length may be any number.
    pub page_table: Option<&'a [i32]>,
    /// Scales of K and of V, `[Hkv]` each, where the cache is in e4m3: a key is its codes times the scale of its
    /// head.
    pub scales: Option<[&'a [f32]; 2]>,
}

impl DecodeInputs<'_> {
    /// Compares tensors, lengths and pages with a decode.
    ///
    /// # Errors
    /// An error that names a tensor or number of a wrong type, shape or value, a missing one, or an
    /// unexpected one.
    pub fn check(&self, decode: &Decode) -> Result<(), Error> {
        let p = decode.problem();
        let Inputs { q, k, v, .. } = self.tensors;
        q.expect("q", p.dtype(), &p.q_shape())?;
        k.expect("k", decode.stored(), &decode.k_shape())?;
        v.expect("v", decode.stored(), &decode.v_shape())?;
        self.tensors.check_beside(p)?;
        let mismatch = |what: &str, expected: &[usize], given: usize| {
            let (expected, given) = (expected.into(), [given].into());
            Err(Error::ShapeMismatch { what: what.into(), expected, given })
        };
        match self.scales {
            Some(scales) if decode.has_scales() => {
                for (what, scales) in ["k_scale", "v_scale"].into_iter().zip(scales) {
                    if scales.len() != p.kv_heads() {
                        return mismatch(what, &[p.kv_heads()], scales.len());
                    }
                }
            }
            Some(_) => return Err(Error::UnexpectedTensor { what: "k_scale".into() }),
            None if decode.has_scales() => return Err(missing_scales()),
            None => {}
        }
        if let Some(lengths) = self.seqused_k {
            if lengths.len() != p.batch() {
                return mismatch("seqused_k", &[p.batch()], lengths.len());
            }
            for (b, &length) in lengths.iter().enumerate() {
                if usize::try_from(length).map_or(true, |length| length > p.seq_k()) {
                    return Err(Error::InvalidValue {
                        what: "seqused_k",
                        given: format!("{length} (sequence {b})"),
                        remedy: format!("it must be from 0 to {}", p.seq_k()),
                    });
                }
            }
        }
        match (self.page_table, decode.page_table_shape()) {
            (None, None) => Ok(()),
            (Some(_), None) => Err(Error::UnexpectedTensor { what: "page_table".into() }),
            (None, Some(_)) => {
                let context = ": the cache is in pages".into();
                Err(Error::MissingTensor { what: "page_table".into(), context })
            }
            (Some(table), Some([batch, max_pages])) if table.len() != batch * max_pages => {
                mismatch("page_table", &[batch, max_pages], table.len())
            }
            (Some(_), Some(_)) => (0..p.batch()).try_for_each(|b| {
                let pages = self.pages_of(decode, b);
                let count = decode.pages().map_or(0, |pages| pages.pages);
                let wrong = pages
                    .iter()
                    .find(|&&page| u32::try_from(page).map_or(true, |page| page >= count));
                wrong.map_or(Ok(()), |page| {
                    Err(Error::InvalidValue {
                        what: "page_table",
                        given: format!("{page} (sequence {b})"),
                        remedy: format!("there are {count} pages, from 0 on"),
                    })
                })
            }),
        }
    }

    /// Keys of sequence `b`.
    #[must_use]
    pub fn length(&self, decode: &Decode, b: usize) -> usize {
        let most = decode.problem().seq_k();
        self.seqused_k.map_or(most, |lengths| usize::try_from(lengths[b]).unwrap_or(0).min(most))
    }

    /// The pages that sequence `b` uses; none where the cache is contiguous.
    #[must_use]
    pub fn pages_of(&self, decode: &Decode, b: usize) -> &[i32] {
        let (Some(table), Some(pages)) = (self.page_table, decode.pages()) else { return &[] };
        let used = self.length(decode, b).div_ceil(pages.page_size as usize);
        &table[b * pages.max_pages as usize..][..used]
    }
}

/// A decode kernel that is ready for one problem: the outputs and its workspace stay in device
/// memory, and every run reuses them.
///
/// ```
/// use std::sync::Arc;
///
/// use flash_attention::{
///     CpuDevice, DType, Error, Extras, Layout, Problem, Tensor,
///     registry::{self, Decode},
///     session::{Cached, Session},
/// };
///
/// fn main() -> Result<(), Error> {
///     let session = Session::new(Arc::new(CpuDevice::new()));
///     // Two sequences of up to 200 keys, 4 heads of Q that share one of K and V.
///     let problem = Problem::builder(2, 4, 1, 64).kv_heads(1).seq_k(200).dtype(DType::F16);
///     let problem = problem.layout(Layout::TokensFirst).build()?;
///     let decode = Decode::new(problem);
///     let random = |shape: [usize; 4], seed| Tensor::random(DType::F16, &shape, seed, 0.0);
///     let q = session.upload(&random(problem.q_shape(), 1))?;
///     let (k, v) = (random(decode.k_shape(), 2), random(decode.v_shape(), 3));
///     let (k, v) = (session.upload(&k)?, session.upload(&v)?);
///     // The second sequence has 7 keys so far.
///     let mut lengths = session.memory().upload(&[200i32, 7])?;
///     let kernel = registry::best_for(&decode, &session.target())?.kernel;
///     let mut attention = session.decode(kernel, &decode)?;
///     let cached = Cached { k: &k, v: &v, seqused_k: Some(&lengths), page_table: None, scales: None };
///     attention.run(&q, cached, Extras::default())?;
///     assert_eq!(attention.o().to_host()?.shape(), [2, 1, 4, 64]);
///     // The same plan, one key later.
///     lengths.write(&[200i32, 8])?;
///     let cached = Cached { k: &k, v: &v, seqused_k: Some(&lengths), page_table: None, scales: None };
///     attention.run(&q, cached, Extras::default())?;
///     Ok(())
/// }
/// ```
pub struct AttentionDecode {
    runner: Runner<Decode>,
    o: DeviceTensor,
    lse: DeviceTensor,
}

impl fmt::Debug for AttentionDecode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AttentionDecode")
            .field("kernel", &self.plan().kernel().name)
            .field("decode", self.plan().problem())
            .finish_non_exhaustive()
    }
}

impl Session {
    /// Allocates outputs and workspace of a decode kernel, filled with NaN, so that an element that
    /// no kernel wrote shows.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the kernel cannot do the problem; [`Error::OutOfMemory`].
    pub fn decode(
        &self,
        kernel: &'static DecodeSpec,
        decode: &Decode,
    ) -> Result<AttentionDecode, Error> {
        AttentionDecode::new(self.memory(), kernel.plan(decode, &self.target())?)
    }

    /// Uploads the inputs and prepares the launches.
    ///
    /// # Errors
    /// A wrong value of the request; [`Error::OutOfMemory`], where predictable before any
    /// allocation; or an error that the device reports.
    pub fn prepare_decode(
        &self,
        plan: Plan<Decode>,
        inputs: &DecodeInputs<'_>,
    ) -> Result<PreparedDecode, Error> {
        inputs.check(plan.problem())?;
        self.check_free(plan.peak_bytes())?;
        let memory = self.memory().part();
        let Inputs { q, k, v, .. } = inputs.tensors;
        let upload = |tensor: &Tensor| DeviceTensor::upload(&memory, tensor);
        let tensors = [upload(q)?, upload(k)?, upload(v)?];
        let numbers = |numbers: Option<&[i32]>| numbers.map(|x| memory.upload(x)).transpose();
        let [seqused_k, page_table] = [numbers(inputs.seqused_k)?, numbers(inputs.page_table)?];
        let scales = match inputs.scales {
            Some([k, v]) => Some([memory.upload(k)?, memory.upload(v)?]),
            None => None,
        };
        let extras = inputs.tensors.extras().try_map(|bytes| memory.upload(bytes))?;
        let input_bytes = memory.current();
        let decode = AttentionDecode::new(&memory, plan)?;
        let workspace = decode.runner.workspace.bytes();
        let memory = MemoryReport::of(&memory, input_bytes, workspace);
        Ok(PreparedDecode { decode, tensors, seqused_k, page_table, scales, extras, memory })
    }

    /// Runs a decode kernel once.
    ///
    /// # Errors
    /// As [`Session::prepare_decode`], or the fault of the kernel.
    pub fn run_decode(
        &self,
        kernel: &'static DecodeSpec,
        decode: &Decode,
        inputs: &DecodeInputs<'_>,
    ) -> Result<(Outputs, MemoryReport), Error> {
        let mut prepared = self.prepare_decode(kernel.plan(decode, &self.target())?, inputs)?;
        prepared.launch()?;
        Ok((prepared.outputs()?, prepared.memory()))
    }
}

impl AttentionDecode {
    pub(crate) fn new(memory: &Arc<Memory>, plan: Plan<Decode>) -> Result<Self, Error> {
        let p = *plan.problem().problem();
        let filled = |dtype, shape: &[usize]| DeviceTensor::filled(memory, dtype, shape, POISON);
        Ok(Self {
            o: filled(p.dtype(), &p.o_shape())?,
            lse: filled(DType::F32, &p.lse_shape())?,
            runner: {
                let bytes = plan.workspace_bytes_beside_lse();
                Runner::new(memory, plan, bytes)?
            },
        })
    }

    /// The plan.
    #[must_use]
    pub const fn plan(&self) -> &Plan<Decode> {
        &self.runner.plan
    }

    /// The output of the last run.
    #[must_use]
    pub const fn o(&self) -> &DeviceTensor {
        &self.o
    }

    /// The log-sum-exp of the last run: f32 `[B, H, Nq]`, natural log.
    #[must_use]
    pub const fn lse(&self) -> &DeviceTensor {
        &self.lse
    }

    /// Starts the kernel; does not wait. The launch reads lengths and pages: a number that is out
    /// of range makes it read another part of the cache, and no memory outside of the cache.
    ///
    /// # Errors
    /// A tensor of another shape, storage type or device; an error that the device reports.
    pub fn run(
        &mut self,
        q: &DeviceTensor,
        cache: Cached<'_>,
        extras: Extras<&DeviceBuffer>,
    ) -> Result<(), Error> {
        let args = self.args(q, cache, extras)?;
        // SAFETY: `args` checked that the inputs are tensors of this device, and freeing one waits for the
        // launches before; outputs and workspace belong to this value. Lengths and pages lead nowhere else:
        // the kernels bound them.
        unsafe { self.runner.run(args) }
    }

    /// The inputs, checked, and the outputs.
    fn args(
        &self,
        q: &DeviceTensor,
        cache: Cached<'_>,
        extras: Extras<&DeviceBuffer>,
    ) -> Result<DecodeArgs, Error> {
        let (decode, memory) = (self.plan().problem(), &self.runner.memory);
        let p = decode.problem();
        let Cached { k, v, seqused_k, page_table, scales } = cache;
        q.expect("q", memory, p.dtype(), &p.q_shape())?;
        k.expect("k", memory, decode.stored(), &decode.k_shape())?;
        v.expect("v", memory, decode.stored(), &decode.v_shape())?;
        let [k_scale, v_scale] = scales.map_or([None; 2], |scales| scales.map(Some));
        let numbers = [("seqused_k", seqused_k), ("page_table", page_table)];
        for (what, buffer) in
            numbers.into_iter().chain([("k_scale", k_scale), ("v_scale", v_scale)])
        {
            buffer.map_or(Ok(()), |buffer| expect_device(what, buffer, memory))?;
        }
        extras.check(p, |what, _, _, buffer| expect_device(what, buffer, memory))?;
        let extras = extras.try_map(|buffer| Ok::<_, Error>(buffer.region()))?;
        let [k, v] = [view(p, k, decode.k_extents()), view(p, v, decode.v_extents())];
        let [q, o] = [view(p, q, p.q_extents()), view(p, &self.o, p.o_extents())];
        let forward = Args::new(q, k, v, o).lse(self.lse.region()).extras(p, extras);
        let mut args = DecodeArgs::new(forward.workspace(self.runner.region()));
        if let Some(lengths) = seqused_k {
            args = args.seqused_k(lengths.region());
        }
        if let Some(table) = page_table {
            args = args.page_table(table.region());
        }
        if let Some([k, v]) = scales {
            args = args.scales(k.region(), v.region());
        }
        Ok(args)
    }

    /// Waits and downloads O and LSE.
    ///
    /// # Errors
    /// The fault of the kernel, if it had one.
    pub fn outputs(&mut self) -> Result<Outputs, Error> {
        self.runner.synchronize()?;
        Ok(Outputs { o: self.o.to_host()?, lse: self.lse.to_host()?, weights: None })
    }
}

/// A decode kernel with its inputs on the device, ready for any number of launches.
#[derive(Debug)]
pub struct PreparedDecode {
    decode: AttentionDecode,
    /// Q, K and V.
    tensors: [DeviceTensor; 3],
    seqused_k: Option<DeviceBuffer>,
    page_table: Option<DeviceBuffer>,
    scales: Option<[DeviceBuffer; 2]>,
    extras: Extras<DeviceBuffer>,
    memory: MemoryReport,
}

impl PreparedDecode {
    /// The plan.
    #[must_use]
    pub const fn plan(&self) -> &Plan<Decode> {
        self.decode.plan()
    }

    /// Device memory of this run.
    #[must_use]
    pub const fn memory(&self) -> MemoryReport {
        self.memory
    }

    /// Sets the lengths of the sequences for the runs from now on.
    ///
    /// # Errors
    /// [`Error::UnexpectedTensor`] where there were no lengths, or another number of them; an error
    /// that the device reports.
    pub fn set_lengths(&mut self, lengths: &[i32]) -> Result<(), Error> {
        match &mut self.seqused_k {
            Some(buffer) if buffer.bytes() == size_of_val(lengths) as u64 => buffer.write(lengths),
            _ => Err(Error::UnexpectedTensor { what: "seqused_k".into() }),
        }
    }

    /// Waits and downloads O and LSE.
    ///
    /// # Errors
    /// The fault of the kernel, if it had one.
    pub fn outputs(&mut self) -> Result<Outputs, Error> {
        self.decode.outputs()
    }
}

impl Work for PreparedDecode {
    fn device(&self) -> &dyn Device {
        &**self.tensors[0].memory().device()
    }

    fn start(&mut self) -> Result<(), Error> {
        let [q, k, v] = &self.tensors;
        let (seqused_k, page_table) = (self.seqused_k.as_ref(), self.page_table.as_ref());
        let scales = self.scales.as_ref().map(|scales| scales.each_ref());
        let cached = Cached { k, v, seqused_k, page_table, scales };
        self.decode.run(q, cached, self.extras.as_ref())
    }
}
