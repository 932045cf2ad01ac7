//! A cache that owns its pages: sequences grow, end, and share common beginnings.

use std::{collections::BTreeMap, sync::Arc};

use super::{Cached, POISON, Session};
use crate::{
    backend::{DeviceBuffer, DeviceTensor, Memory, memory::expect_device},
    dtype::DType,
    error::Error,
    problem::{Layout, Problem},
    raw::{AppendArgs, View},
    registry::{APPEND_KERNELS, Append, Decode, Pages, Rotary, Target},
};

/// A sequence of a [`KvCache`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(u64);

/// The format of a [`KvCache`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvCacheShape {
    /// Storage type: f16 or bf16, or e4m3 for tokens of either.
    pub dtype: DType,
    /// Heads of K and V.
    pub kv_heads: usize,
    /// Columns of K.
    pub head_dim: usize,
    /// Columns of V.
    pub head_dim_v: usize,
    /// Keys of a page.
    pub page_size: u32,
    /// Pages.
    pub pages: u32,
}

/// Cosines and sines in device memory, f32 `[positions, dim / 2]` each.
#[derive(Clone, Copy, Debug)]
pub struct Angles<'a> {
    /// The columns that they rotate.
    pub rotary: Rotary,
    /// Cosines.
    pub cos: &'a DeviceBuffer,
    /// Sines.
    pub sin: &'a DeviceBuffer,
}

/// Keys and values of sequences, in pages that the cache owns.
///
/// A page may belong to several sequences, after a [`fork`](Self::fork). The first sequence that
/// writes to a shared page gets its own copy.
///
/// ```
/// use std::sync::Arc;
///
/// use flash_attention::{
///     CpuDevice, DType, Error, Extras, Layout, Problem, Tensor,
///     registry::{self, Decode},
///     session::{KvCache, KvCacheShape, Session},
/// };
///
/// fn main() -> Result<(), Error> {
///     let session = Session::new(Arc::new(CpuDevice::new()));
///     let shape = KvCacheShape {
///         dtype: DType::F16,
///         kv_heads: 1,
///         head_dim: 64,
///         head_dim_v: 64,
///         page_size: 16,
///         pages: 8,
///     };
///     let mut cache = KvCache::new(&session, shape)?;
///     let random = |shape: &[usize], seed| session.upload(&Tensor::random(DType::F16, shape, seed, 0.0));
///     // A prompt of 20 tokens, then two ways to go on: three pages, of which the first is shared.
///     let prompt = cache.insert();
///     let (k, v) = (random(&[1, 20, 1, 64], 1)?, random(&[1, 20, 1, 64], 2)?);
///     cache.append(&[prompt], &k, &v, None)?;
///     let other = cache.fork(prompt)?;
///     let (k, v) = (random(&[2, 1, 1, 64], 3)?, random(&[2, 1, 1, 64], 4)?);
///     cache.append(&[prompt, other], &k, &v, None)?;
///     assert_eq!((cache.length(other)?, cache.free_pages()), (21, 5));
///
///     // One query of each against its 21 keys; the plan holds for up to 64.
///     let problem = Problem::builder(2, 4, 1, 64).kv_heads(1).seq_k(64).dtype(DType::F16);
///     let problem = problem.layout(Layout::TokensFirst).build()?;
///     let decode = cache.decode(problem)?;
///     let kernel = registry::best_for(&decode, &session.target())?.kernel;
///     let mut attention = session.decode(kernel, &decode)?;
///     let batch = cache.batch(&decode, &[prompt, other])?;
///     let q = random(&problem.q_shape(), 5)?;
///     attention.run(&q, cache.cached(&batch), Extras::default())?;
///     assert_eq!(attention.o().to_host()?.shape(), [2, 1, 4, 64]);
///     Ok(())
/// }
/// ```
#[derive(Debug)]
pub struct KvCache {
    memory: Arc<Memory>,
    shape: KvCacheShape,
    k: DeviceTensor,
    v: DeviceTensor,
    /// Scales of K and V in e4m3.
    scales: Option<[DeviceBuffer; 2]>,
    /// Free pages; the last is the next to take.
    free: Vec<u32>,
    /// The number of sequences that have each page.
    users: Vec<u32>,
    sequences: BTreeMap<SequenceId, Sequence>,
    next: u64,
}

#[derive(Clone, Debug, Default)]
struct Sequence {
    pages: Vec<u32>,
    length: usize,
}

/// Lengths and pages of some sequences of a [`KvCache`], in device memory.
#[derive(Debug)]
pub struct CacheBatch {
    lengths: DeviceBuffer,
    page_table: DeviceBuffer,
}

impl KvCache {
    /// A cache without sequences. Its memory is filled with NaN. Scales of a cache in e4m3 are 1.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] for a size of zero; [`Error::OutOfMemory`].
    pub fn new(session: &Session, shape: KvCacheShape) -> Result<Self, Error> {
        let ones = vec![1.0; shape.kv_heads];
        Self::with(session, shape, (shape.dtype == DType::E4M3).then_some([&ones, &ones]))
    }

    /// A cache in e4m3 without sequences, with a scale for each head of K and of V, `[Hkv]`: a code is the one
    /// nearest to a value divided by its head's scale. A scale of a 448th of a head's largest value uses the whole
    /// range; larger values become the largest.
    ///
    /// # Errors
    /// As [`new`](Self::new); [`Error::InvalidValue`] for another storage type, another number of scales, or a
    /// scale that is not positive and finite.
    pub fn with_scales(
        session: &Session,
        shape: KvCacheShape,
        scales: [&[f32]; 2],
    ) -> Result<Self, Error> {
        let wrong =
            |what, given: String, remedy: String| Err(Error::InvalidValue { what, given, remedy });
        if shape.dtype != DType::E4M3 {
            let remedy = "a cache with scales is in e4m3".into();
            return wrong("storage type", shape.dtype.to_string(), remedy);
        }
        for (what, scales) in ["k_scale", "v_scale"].into_iter().zip(scales) {
            if scales.len() != shape.kv_heads {
                let remedy = format!("there are {} heads of K and V", shape.kv_heads);
                return wrong(what, format!("{} scales", scales.len()), remedy);
            }
            if let Some(scale) = scales.iter().find(|scale| !(scale.is_finite() && **scale > 0.0)) {
                return wrong(what, scale.to_string(), "it must be positive and finite".into());
            }
        }
        Self::with(session, shape, Some(scales))
    }

    fn with(
        session: &Session,
        shape: KvCacheShape,
        scales: Option<[&[f32]; 2]>,
    ) -> Result<Self, Error> {
        let KvCacheShape { dtype, kv_heads, head_dim, head_dim_v, page_size, pages } = shape;
        // A problem says what is wrong with a size.
        let p = Problem::builder(1, kv_heads, 1, head_dim).head_dim_v(head_dim_v);
        let of_tokens = if dtype == DType::E4M3 { DType::F16 } else { dtype };
        let p = p.seq_k(page_size as usize).dtype(of_tokens).build()?;
        Decode::paged(p, Pages { page_size, pages, max_pages: 1 })?;
        let memory = session.memory().clone();
        let scales = match scales {
            Some([k, v]) => Some([memory.upload(k)?, memory.upload(v)?]),
            None => None,
        };
        let filled = |columns: usize| {
            let shape = [pages as usize, page_size as usize, kv_heads, columns];
            DeviceTensor::filled(&memory, dtype, &shape, POISON)
        };
        let (k, v) = (filled(head_dim)?, filled(head_dim_v)?);
        Ok(Self {
            memory,
            shape,
            k,
            v,
            scales,
            free: (0..pages).rev().collect(),
            users: vec![0; pages as usize],
            sequences: BTreeMap::new(),
            next: 0,
        })
    }

    /// The format.
    #[must_use]
    pub const fn shape(&self) -> KvCacheShape {
        self.shape
    }

    /// Keys, `[pages, page_size, Hkv, D]`.
    #[must_use]
    pub const fn k(&self) -> &DeviceTensor {
        &self.k
    }

    /// Values, `[pages, page_size, Hkv, Dv]`.
    #[must_use]
    pub const fn v(&self) -> &DeviceTensor {
        &self.v
    }

    /// Pages of no sequence.
    #[must_use]
    pub fn free_pages(&self) -> usize {
        self.free.len()
    }

    /// A new sequence without keys.
    pub fn insert(&mut self) -> SequenceId {
        self.add(Sequence::default())
    }

    fn add(&mut self, sequence: Sequence) -> SequenceId {
        let id = SequenceId(self.next);
        self.next += 1;
        self.sequences.insert(id, sequence);
        id
    }

    /// A new sequence with the keys of another. Pages are shared until one of the two writes to them.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] where there is no such sequence.
    pub fn fork(&mut self, of: SequenceId) -> Result<SequenceId, Error> {
        let sequence = self.sequence(of)?.clone();
        for &page in &sequence.pages {
            self.users[page as usize] += 1;
        }
        Ok(self.add(sequence))
    }

    /// Ends a sequence. Pages that no other sequence has become free.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] where there is no such sequence.
    pub fn remove(&mut self, id: SequenceId) -> Result<(), Error> {
        let sequence = self.sequences.remove(&id).ok_or_else(|| unknown(id))?;
        sequence.pages.into_iter().for_each(|page| self.release(page));
        Ok(())
    }

    fn release(&mut self, page: u32) {
        let users = &mut self.users[page as usize];
        *users -= 1;
        if *users == 0 {
            self.free.push(page);
        }
    }

    fn sequence(&self, id: SequenceId) -> Result<&Sequence, Error> {
        self.sequences.get(&id).ok_or_else(|| unknown(id))
    }

    /// Keys of a sequence.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] where there is no such sequence.
    pub fn length(&self, id: SequenceId) -> Result<usize, Error> {
        Ok(self.sequence(id)?.length)
    }

    /// The decode of a problem against this cache. The problem's heads of K and V, columns and
    /// storage type are the cache's, but for a cache in e4m3, and the layout is tokens first.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] names the difference.
    pub fn decode(&self, problem: Problem) -> Result<Decode, Error> {
        let KvCacheShape { dtype, kv_heads, head_dim, head_dim_v, page_size, pages } = self.shape;
        let p = &problem;
        let of_queries = if dtype == DType::E4M3 { p.dtype() } else { dtype };
        for (what, given, cache) in [
            ("heads of K and V", p.kv_heads().to_string(), kv_heads.to_string()),
            ("head dim", p.head_dim().to_string(), head_dim.to_string()),
            ("head dim of the values", p.head_dim_v().to_string(), head_dim_v.to_string()),
            ("storage type", p.dtype().to_string(), of_queries.to_string()),
            ("layout", format!("{:?}", p.layout()), format!("{:?}", Layout::TokensFirst)),
        ] {
            if given != cache {
                return Err(Error::InvalidValue {
                    what,
                    given,
                    remedy: format!("the cache has {cache}"),
                });
            }
        }
        let max_pages = u32::try_from(p.seq_k().div_ceil(page_size as usize)).unwrap_or(u32::MAX);
        Decode::paged(problem, Pages { page_size, pages, max_pages })?.cache_dtype(dtype)
    }

    /// The current lengths and pages of some sequences, for runs of a decode.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] for another number of sequences than the decode has, an unknown
    /// sequence, or a sequence that is longer than the decode allows; [`Error::OutOfMemory`].
    pub fn batch(&self, decode: &Decode, ids: &[SequenceId]) -> Result<CacheBatch, Error> {
        let p = decode.problem();
        let wrong =
            |what, given: String, remedy: String| Err(Error::InvalidValue { what, given, remedy });
        if ids.len() != p.batch() {
            return wrong(
                "sequences",
                ids.len().to_string(),
                format!("the decode has {}", p.batch()),
            );
        }
        let max_pages = decode.page_table_shape().map_or(0, |[_, max_pages]| max_pages);
        let mut lengths = Vec::with_capacity(ids.len());
        let mut table = vec![0i32; ids.len() * max_pages];
        for (b, &id) in ids.iter().enumerate() {
            let Sequence { pages, length } = self.sequence(id)?;
            if *length > p.seq_k() {
                return wrong(
                    "keys of a sequence",
                    length.to_string(),
                    format!("the decode has up to {}", p.seq_k()),
                );
            }
            lengths.push(*length as i32);
            let row = &mut table[b * max_pages..][..max_pages];
            row.iter_mut().zip(pages).for_each(|(to, &page)| *to = page as i32);
        }
        Ok(CacheBatch {
            lengths: self.memory.upload(&lengths)?,
            page_table: self.memory.upload(&table)?,
        })
    }

    /// The cache in the form that a run takes.
    #[must_use]
    pub fn cached<'a>(&'a self, batch: &'a CacheBatch) -> Cached<'a> {
        let CacheBatch { lengths, page_table } = batch;
        let scales = self.scales.as_ref().map(|scales| scales.each_ref());
        let (seqused_k, page_table) = (Some(lengths), Some(page_table));
        Cached { k: &self.k, v: &self.v, seqused_k, page_table, scales }
    }

    /// Appends keys and values, `[B, Nnew, Hkv, D]` each, to `B` sequences, and rotates the keys to
    /// their positions where there are angles. A cache in e4m3 takes f16 or bf16, and rounds them to codes. Does
    /// not wait. On an error the cache is unchanged.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] for a sequence that is unknown or named twice, for too few free
    /// pages, or for fewer positions than a sequence needs; a tensor of another shape or type; an
    /// error that the device reports.
    pub fn append(
        &mut self,
        ids: &[SequenceId],
        k: &DeviceTensor,
        v: &DeviceTensor,
        angles: Option<Angles<'_>>,
    ) -> Result<(), Error> {
        let KvCacheShape { dtype, kv_heads, head_dim, head_dim_v, .. } = self.shape;
        let dtype = match (dtype, k.dtype()) {
            (DType::E4M3, DType::BF16) => DType::BF16,
            (DType::E4M3, _) => DType::F16,
            (dtype, _) => dtype,
        };
        let tokens = k.shape().get(1).copied().unwrap_or_default();
        k.expect("k", &self.memory, dtype, &[ids.len(), tokens, kv_heads, head_dim])?;
        v.expect("v", &self.memory, dtype, &[ids.len(), tokens, kv_heads, head_dim_v])?;
        if let Some(Angles { cos, sin, .. }) = angles {
            expect_device("cos", cos, &self.memory)?;
            expect_device("sin", sin, &self.memory)?;
        }
        if tokens == 0 || ids.is_empty() {
            return Ok(());
        }
        let growth = self.growth(ids, tokens)?;
        let longest = growth.iter().map(|(_, growth)| growth.length).max().unwrap_or_default();
        let problem =
            Problem::builder(ids.len(), kv_heads, tokens, head_dim).head_dim_v(head_dim_v);
        let problem = problem.seq_k(longest).dtype(dtype).layout(Layout::TokensFirst).build()?;
        let decode = self.decode(problem)?;
        let append =
            angles.map_or(Ok(Append::new(decode)), |a| Append::new(decode).rotary(a.rotary))?;

        // From here on only the device can fail.
        let before = (self.free.clone(), self.users.clone());
        let done = self.grow(&append, growth, [k, v], angles);
        if done.is_err() {
            (self.free, self.users) = before;
        }
        done
    }

    /// The future state of each sequence, with pages to allocate as `None`. The first of these
    /// replaces the last page where another sequence shares that page.
    fn growth(
        &self,
        ids: &[SequenceId],
        tokens: usize,
    ) -> Result<Vec<(SequenceId, Growth)>, Error> {
        let page_size = self.shape.page_size as usize;
        let mut growth: Vec<(SequenceId, Growth)> = Vec::with_capacity(ids.len());
        for &id in ids {
            if growth.iter().any(|(other, _)| *other == id) {
                return Err(Error::InvalidValue {
                    what: "sequences",
                    given: format!("{id:?} twice"),
                    remedy: "each is appended to once".into(),
                });
            }
            let Sequence { pages, length } = self.sequence(id)?;
            let partly = length % page_size;
            let copied =
                pages.last().copied().filter(|&page| partly > 0 && self.users[page as usize] > 1);
            let length = length + tokens;
            let new_pages =
                length.div_ceil(page_size) - pages.len() + usize::from(copied.is_some());
            growth.push((id, Growth { length, new_pages, copied, partly }));
        }
        let needed: usize = growth.iter().map(|(_, growth)| growth.new_pages).sum();
        if needed > self.free.len() {
            return Err(Error::InvalidValue {
                what: "free pages",
                given: self.free.len().to_string(),
                remedy: format!("{needed} are needed: remove sequences, or make the cache larger"),
            });
        }
        Ok(growth)
    }

    /// Takes the pages, and starts the copies.
    fn grow(
        &mut self,
        append: &Append,
        growth: Vec<(SequenceId, Growth)>,
        [k, v]: [&DeviceTensor; 2],
        angles: Option<Angles<'_>>,
    ) -> Result<(), Error> {
        let before: Vec<_> = growth.iter().map(|(id, _)| self.sequences.get(id).cloned()).collect();
        let ids: Vec<SequenceId> = growth.iter().map(|(id, _)| *id).collect();
        let done = growth.into_iter().try_for_each(|(id, growth)| self.take_pages(id, growth));
        let done = done.and_then(|()| self.start_append(append, &ids, [k, v], angles));
        if done.is_err() {
            for (id, before) in ids.iter().zip(before) {
                before.and_then(|before| self.sequences.insert(*id, before));
            }
        }
        done
    }

    fn take_pages(&mut self, id: SequenceId, growth: Growth) -> Result<(), Error> {
        let Growth { length, new_pages, copied, partly } = growth;
        let at = self.free.len().saturating_sub(new_pages);
        let taken: Vec<u32> = self.free.drain(at..).rev().collect();
        for &page in &taken {
            self.users[page as usize] = 1;
        }
        if let (Some(from), Some(&to)) = (copied, taken.first()) {
            self.copy_page(from, to, partly)?;
            self.release(from);
        }
        let sequence = self.sequences.entry(id).or_default();
        if copied.is_some() {
            sequence.pages.pop();
        }
        sequence.pages.extend(taken);
        sequence.length = length;
        Ok(())
    }

    /// Starts to copy the first `keys` keys of a page to another.
    fn copy_page(&self, from: u32, to: u32, keys: usize) -> Result<(), Error> {
        let KvCacheShape { dtype, kv_heads, page_size, pages, .. } = self.shape;
        let KvCacheShape { head_dim, head_dim_v, .. } = self.shape;
        // Codes are copied as they are, two as 16 bits.
        let (dtype, [head_dim, head_dim_v]) = match dtype {
            DType::E4M3 => (DType::F16, [head_dim / 2, head_dim_v / 2]),
            dtype => (dtype, [head_dim, head_dim_v]),
        };
        let problem = Problem::builder(1, kv_heads, keys, head_dim).head_dim_v(head_dim_v);
        let problem = problem.seq_k(keys).dtype(dtype).layout(Layout::TokensFirst).build()?;
        let append = Append::new(Decode::paged(problem, Pages { page_size, pages, max_pages: 1 })?);
        let page = |tensor: &DeviceTensor, columns: usize| {
            let bytes = (page_size as usize * kv_heads * columns * dtype.size()) as u64;
            let region = tensor.region().part(u64::from(from) * bytes, bytes);
            View::contiguous(region, Layout::TokensFirst, kv_heads, page_size as usize, columns)
        };
        let new = [page(&self.k, head_dim), page(&self.v, head_dim_v)];
        let lengths = self.memory.upload(&[keys as i32])?;
        let table = self.memory.upload(&[to as i32])?;
        let cache = self.views([head_dim, head_dim_v]);
        let args = AppendArgs::new(new, cache).seqused_k(lengths.region());
        self.launch(&append, args.page_table(table.region()))
    }

    fn start_append(
        &self,
        append: &Append,
        ids: &[SequenceId],
        [k, v]: [&DeviceTensor; 2],
        angles: Option<Angles<'_>>,
    ) -> Result<(), Error> {
        let p = append.decode().problem();
        let batch = self.batch(append.decode(), ids)?;
        let view = |tensor: &DeviceTensor, columns| {
            View::contiguous(tensor.region(), Layout::TokensFirst, p.kv_heads(), p.seq_q(), columns)
        };
        let new = [view(k, p.head_dim()), view(v, p.head_dim_v())];
        let cache = self.views([p.head_dim(), p.head_dim_v()]);
        let args = AppendArgs::new(new, cache).seqused_k(batch.lengths.region());
        let mut args = args.page_table(batch.page_table.region());
        if let Some([k, v]) = &self.scales {
            args = args.scales(k.region(), v.region());
        }
        if let Some(Angles { cos, sin, .. }) = angles {
            args = args.angles(cos.region(), sin.region());
        }
        self.launch(append, args)
    }

    fn views(&self, [head_dim, head_dim_v]: [usize; 2]) -> [View; 2] {
        let KvCacheShape { kv_heads, page_size, .. } = self.shape;
        let view = |tensor: &DeviceTensor, columns| {
            View::contiguous(
                tensor.region(),
                Layout::TokensFirst,
                kv_heads,
                page_size as usize,
                columns,
            )
        };
        [view(&self.k, head_dim), view(&self.v, head_dim_v)]
    }

    fn launch(&self, append: &Append, args: AppendArgs) -> Result<(), Error> {
        let device = &**self.memory.device();
        let plan = APPEND_KERNELS[0].plan(append, &Target::of(device))?;
        for launch in plan.launches_for(device, &args)? {
            // SAFETY: the plan checked the arguments against live tensors of this device, and freeing one waits for
            // the launches before; nobody else can write to the cache, and the sequences' new places differ.
            unsafe { device.launch(&launch)? };
        }
        Ok(())
    }
}

/// The additions to a sequence.
#[derive(Clone, Copy, Debug)]
struct Growth {
    length: usize,
    new_pages: usize,
    /// The last page, where it is partly used and another sequence shares it: the first new page
    /// replaces it.
    copied: Option<u32>,
    /// Keys in it.
    partly: usize,
}

fn unknown(id: SequenceId) -> Error {
    Error::InvalidValue {
        what: "sequence",
        given: format!("{id:?}"),
        remedy: "it was removed, or is of another cache".into(),
    }
}
