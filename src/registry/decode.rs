//! Decoding as an operation: a few queries against a cache of keys and values. The module has the
//! kernels, the tensors of a call, and the number of parts into which a launch splits the keys of a
//! sequence.

use std::num::NonZeroU32;

use kernels_gpu::{
    args::{self, CacheArgs, PartsArgs, ScaleArgs},
    decode::{decode_combine, decode_e4m3, decode_split},
    entry::Instances,
};

use super::{
    Call, Draft, HEAD_DIM_STEP, Operation, Section, Spec, Step, Target, Usage,
    attention::{self, Args, AttentionLimits, Features, Sizes, attention_args},
    plan::Plan,
    table::{ALL_FEATURES, entry_size, padded_constants, tiles},
    tensors::Region,
};
use crate::{
    backend::{Constants, KernelArgs as _},
    dtype::DType,
    error::Error,
    problem::{MAX_ELEMENTS, Problem},
};

/// The maximum number of parts of a sequence's keys.
pub const MAX_SPLITS: u32 = 65_535;
/// The maximum number of rows of the heads of one group together.
const MAX_ROWS: usize = 1 << 20;
/// Codes of e4m3 in 16 bytes.
const CODES_OF_CHUNK: usize = 16;
/// The compute capability of the entries with the conversion of codes.
const HOPPER: (u32, u32) = (9, 0);

/// Keys and values in pages of `page_size` keys, which a table assigns to sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pages {
    /// Keys of a page, from 1 on.
    pub page_size: u32,
    /// Pages of the cache.
    pub pages: u32,
    /// Entries of the page table for each sequence.
    pub max_pages: u32,
}

/// Attention of a few queries against a cache of keys and values.
///
/// The problem's number of keys is the maximum length of a sequence. `seqused_k`, in device memory,
/// gives the length of each sequence: a plan holds for any lengths up to the maximum. Positions are
/// aligned to the bottom right of each sequence: its last query is at its last key.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decode {
    problem: Problem,
    pages: Option<Pages>,
    /// Storage type of the cache, where it differs from the problem's.
    cache: Option<DType>,
    expected_keys: Option<usize>,
    splits: Option<NonZeroU32>,
}

impl Decode {
    /// Queries against a cache `[B, Nk, Hkv, D]`, in the order of the problem's layout.
    #[must_use]
    pub const fn new(problem: Problem) -> Self {
        Self { problem, pages: None, cache: None, expected_keys: None, splits: None }
    }

    /// Queries against a paged cache, `[pages, page_size, Hkv, D]` in the order of the problem's
    /// layout.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] for pages without keys, or too few pages for the longest sequence;
    /// [`Error::TooLarge`] for a cache that cannot be addressed.
    pub fn paged(problem: Problem, pages: Pages) -> Result<Self, Error> {
        let Pages { page_size, pages: count, max_pages } = pages;
        let wrong =
            |what, given: String, remedy: String| Err(Error::InvalidValue { what, given, remedy });
        for (what, value) in [("page size", page_size), ("pages", count)] {
            if value == 0 {
                return wrong(what, "0".into(), "it must be at least 1".into());
            }
        }
        let needed = (problem.seq_k() as u64).div_ceil(page_size.into());
        if u64::from(max_pages) < needed {
            let remedy = format!("{} keys need {needed} pages of {page_size}", problem.seq_k());
            return wrong("pages of a sequence", max_pages.to_string(), remedy);
        }
        let decode = Self { pages: Some(pages), ..Self::new(problem) };
        for shape in [decode.k_shape(), decode.v_shape()] {
            let elements = shape.iter().try_fold(1u64, |n, &extent| n.checked_mul(extent as u64));
            if elements.is_none_or(|elements| elements > MAX_ELEMENTS) {
                let what = "a cache";
                return Err(Error::TooLarge { what, shape: shape.into(), limit: MAX_ELEMENTS });
            }
        }
        Ok(decode)
    }

    /// The storage type of the cache: the problem's, or e4m3 with a scale for each head of K and of V.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] for any other type.
    pub fn cache_dtype(mut self, dtype: DType) -> Result<Self, Error> {
        let own = self.problem.dtype();
        if dtype != own && dtype != DType::E4M3 {
            return Err(Error::InvalidValue {
                what: "storage type of the cache",
                given: dtype.to_string(),
                remedy: format!("it must be {own} as Q, or e4m3"),
            });
        }
        self.cache = Some(dtype).filter(|&dtype| dtype != own);
        Ok(self)
    }

    /// Storage type of the cache.
    #[must_use]
    pub fn stored(&self) -> DType {
        self.cache.unwrap_or(self.problem.dtype())
    }

    /// Whether the cache is in e4m3, with scales.
    #[must_use]
    pub fn has_scales(&self) -> bool {
        self.stored() == DType::E4M3
    }

    /// The length for which to choose the splits, where sequences are shorter than the maximum.
    #[must_use]
    pub const fn expected_keys(mut self, keys: usize) -> Self {
        self.expected_keys = Some(keys);
        self
    }

    /// The number of parts of each sequence's keys; by default [`splits`] chooses it.
    #[must_use]
    pub const fn splits(mut self, splits: Option<NonZeroU32>) -> Self {
        self.splits = splits;
        self
    }

    /// The problem, whose number of keys is the maximum length of a sequence.
    #[must_use]
    pub const fn problem(&self) -> &Problem {
        &self.problem
    }

    /// The pages, if the cache is paged.
    #[must_use]
    pub const fn pages(&self) -> Option<Pages> {
        self.pages
    }

    /// Extents `[B, Hkv, N, D]` of K in memory, or `[pages, Hkv, page_size, D]`.
    fn cache_extents(&self, extents: [usize; 4]) -> [usize; 4] {
        let [_, heads, _, columns] = extents;
        self.pages.map_or(extents, |pages| {
            [pages.pages as usize, heads, pages.page_size as usize, columns]
        })
    }

    /// Extents of K, whatever the order of its dimensions.
    pub(crate) fn k_extents(&self) -> [usize; 4] {
        self.cache_extents(self.problem.k_extents())
    }

    /// The same of V.
    pub(crate) fn v_extents(&self) -> [usize; 4] {
        self.cache_extents(self.problem.v_extents())
    }

    /// Shape of K.
    #[must_use]
    pub fn k_shape(&self) -> [usize; 4] {
        let [batch, heads, rows, columns] = self.k_extents();
        self.problem.layout().shape(batch, heads, rows, columns)
    }

    /// Shape of V.
    #[must_use]
    pub fn v_shape(&self) -> [usize; 4] {
        let [batch, heads, rows, columns] = self.v_extents();
        self.problem.layout().shape(batch, heads, rows, columns)
    }

    /// Elements of the page table, i32 `[B, max_pages]`, if there is one.
    #[must_use]
    pub fn page_table_shape(&self) -> Option<[usize; 2]> {
        self.pages.map(|pages| [self.problem.batch(), pages.max_pages as usize])
    }

    /// Compares lengths and pages with the problem.
    pub(super) fn check_numbers(
        &self,
        seqused_k: Option<Region>,
        page_table: Option<Region>,
    ) -> Result<(), Error> {
        if let Some(lengths) = seqused_k {
            lengths.check("seqused_k", self.problem.batch() as u64 * 4, 4)?;
        }
        match (page_table, self.page_table_shape()) {
            (Some(table), Some([batch, max_pages])) => {
                table.check("page_table", (batch * max_pages) as u64 * 4, 4)
            }
            (None, Some(_)) => Err(Error::MissingTensor {
                what: "page_table".into(),
                context: ": the cache is in pages".into(),
            }),
            (Some(_), None) => Err(Error::UnexpectedTensor { what: "page_table".into() }),
            (None, None) => Ok(()),
        }
    }

    /// Compares scales, of K and of V, with the problem.
    pub(super) fn check_scales(&self, scales: Option<[Region; 2]>) -> Result<(), Error> {
        match (scales, self.has_scales()) {
            (Some([k, v]), true) => {
                let bytes = self.problem.kv_heads() as u64 * 4;
                k.check("k_scale", bytes, 4)?;
                v.check("v_scale", bytes, 4)
            }
            (None, false) => Ok(()),
            (None, true) => Err(missing_scales()),
            (Some(_), false) => Err(Error::UnexpectedTensor { what: "k_scale".into() }),
        }
    }

    /// Columns of which kernels find no whole chunk of 16 bytes in a row of the cache.
    pub(super) fn odd_columns(&self) -> Option<String> {
        let p = &self.problem;
        let step = match self.has_scales() {
            true => CODES_OF_CHUNK,
            false => HEAD_DIM_STEP,
        };
        let odd = [p.head_dim(), p.head_dim_v()].into_iter().find(|d| d % step != 0)?;
        let of = if self.has_scales() { " of a cache in e4m3" } else { "" };
        Some(format!("does not support head dim {odd}{of}: it has multiples of {step}"))
    }

    /// Lengths and pages of a call in the kernels' form.
    pub(super) fn cache_args(
        &self,
        seqused_k: Option<Region>,
        page_table: Option<Region>,
    ) -> CacheArgs {
        CacheArgs {
            lengths: seqused_k.unwrap_or_default().arg(),
            page_table: page_table.unwrap_or_default().arg(),
            pages: self.pages.map_or(0, |pages| pages.pages),
            max_pages: self.pages.map_or(0, |pages| pages.max_pages),
        }
    }

    /// Keys of a page, as a constant of kernels; 0 where the cache is contiguous.
    pub(super) fn page(&self) -> u32 {
        self.pages.map_or(0, |pages| pages.page_size)
    }

    /// Bytes of the keys and values of sequences with these lengths: the minimum to read.
    #[must_use]
    pub fn cache_bytes(&self, lengths: impl IntoIterator<Item = usize>) -> u64 {
        let p = &self.problem;
        let row = p.kv_heads() * (p.head_dim() + p.head_dim_v()) * self.stored().size();
        lengths.into_iter().map(|keys| (keys * row) as u64).sum()
    }
}

/// A decode kernel.
pub type DecodeSpec = Spec<Decode>;

/// The tensors of one decode call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeArgs {
    forward: Args,
    seqused_k: Option<Region>,
    page_table: Option<Region>,
    scales: Option<[Region; 2]>,
}

impl DecodeArgs {
    /// `forward`: queries, the cache as K and V (for pages, with the strides from page to page,
    /// head to head and key to key), the output, and the workspace of the call. All sequences have
    /// the problem's number of keys.
    #[must_use]
    pub const fn new(forward: Args) -> Self {
        Self { forward, seqused_k: None, page_table: None, scales: None }
    }

    /// Keys of each sequence: i32 `[B]`. The launch reads the lengths and clamps them to the range
    /// 0 to the problem's number of keys.
    #[must_use]
    pub const fn seqused_k(mut self, lengths: Region) -> Self {
        self.seqused_k = Some(lengths);
        self
    }

    /// The pages of each sequence: i32 `[B, max_pages]`. What lies beyond a sequence's length may be anything. A page
    /// number past the end counts as the last page.
    #[must_use]
    pub const fn page_table(mut self, table: Region) -> Self {
        self.page_table = Some(table);
        self
    }

    /// Scales of a cache in e4m3, f32 `[Hkv]` each: a key is its codes times the scale of its head.
    #[must_use]
    pub const fn scales(mut self, k: Region, v: Region) -> Self {
        self.scales = Some([k, v]);
        self
    }
}

/// The error for a cache in e4m3 without scales.
pub(crate) fn missing_scales() -> Error {
    Error::MissingTensor { what: "k_scale".into(), context: ": the cache is in e4m3".into() }
}

impl Operation for Decode {
    type Args = DecodeArgs;
    type Limits = AttentionLimits;

    fn kernels() -> &'static [DecodeSpec] {
        DECODE_KERNELS
    }

    fn dtype(&self) -> DType {
        self.problem.dtype()
    }

    fn obstacle(&self, limits: &AttentionLimits) -> Option<String> {
        let p = &self.problem;
        if p.seq_k() == 0 {
            return Some("does not support caches without room for a key".into());
        }
        let rows = p.seq_q() * p.group();
        if rows > MAX_ROWS {
            return Some(format!(
                "does not support {rows} rows of heads that share keys: it has at most {MAX_ROWS}"
            ));
        }
        if let Some(splits) = self.splits.filter(|splits| splits.get() > MAX_SPLITS) {
            return Some(format!("does not support {splits} splits: it has at most {MAX_SPLITS}"));
        }
        p.obstacle(limits).or_else(|| self.odd_columns())
    }

    fn check(&self, args: &DecodeArgs) -> Result<(), Error> {
        let p = &self.problem;
        let [q, .., o] = attention::extents(p);
        let extents = [q, self.k_extents(), self.v_extents(), o];
        args.forward.check_extents(p, self.stored(), extents)?;
        self.check_scales(args.scales)?;
        self.check_numbers(args.seqused_k, args.page_table)
    }

    fn check_sizes(&self) -> Result<(), Error> {
        self.problem.check_sizes()
    }

    fn optional_outputs(&self) -> Vec<Section> {
        self.problem.optional_outputs()
    }

    fn given(args: &DecodeArgs, usage: Usage) -> Option<Region> {
        Problem::given(&args.forward, usage)
    }

    fn workspace(args: &DecodeArgs) -> Region {
        Problem::workspace(&args.forward)
    }
}

impl Plan<Decode> {
    /// Parts that the keys of each sequence are split into.
    #[must_use]
    pub fn splits(&self) -> u32 {
        let blocks = |d: &Decode| work(d.problem());
        self.steps().first().map_or(1, |step| step.grid.x / blocks(self.problem()).max(1))
    }

    /// Device memory that a call needs: queries, the whole cache, lengths and pages of the
    /// sequences, the problem's other inputs, outputs and workspace.
    #[must_use]
    pub fn peak_bytes(&self) -> u64 {
        let decode = self.problem();
        let p = decode.problem();
        let (size, stored) = (p.dtype().size() as u64, decode.stored().size() as u64);
        let elements = |shape: [usize; 4]| shape.iter().map(|&n| n as u64).product::<u64>();
        let cache = elements(decode.k_shape()) + elements(decode.v_shape());
        let beside = p.input_bytes() - (p.k_elements() + p.v_elements()) as u64 * size;
        let table = decode.page_table_shape().map_or(0, |[batch, pages]| (batch * pages) as u64);
        let scales = if decode.has_scales() { 2 * p.kv_heads() as u64 } else { 0 };
        let numbers = (p.batch() as u64 + table + scales) * 4;
        beside + cache * stored + numbers + p.output_bytes() + self.workspace_bytes_beside_lse()
    }

    /// Bytes of the workspace of a call that gives memory for the LSE.
    #[must_use]
    pub fn workspace_bytes_beside_lse(&self) -> u64 {
        self.bytes_without(|usage| usage == Usage::Lse)
    }
}

/// The inputs to the choice of splits. The unit of time is a multiprocessor's time for a KV tile of
/// 16-bit elements while all multiprocessors are busy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SplitWork {
    /// Tiles of keys of a sequence.
    pub tiles: u32,
    /// Blocks per part: sequences times heads of K and V times tiles of packed rows.
    pub blocks: u32,
    /// Blocks that run at once.
    pub at_once: u32,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of the keys and values of a tile, and of a tile of 16-bit elements.
    pub tile_bytes: [u32; 2],
}

// Fitted to times of 1 to 132 splits of 4,096 to 131,072 keys in f16 on an H200
// (benches/record/2026-11-29-decode.md). A cache in e4m3 takes the same numbers by its bytes: derived,
// not measured.

/// The time until a block's first tile arrives: two dependent reads, and the copy.
const START: f64 = 0.75;
/// The launch that merges parts.
const MERGE: f64 = 1.25;
/// The cost of one more part to merge.
const PART: f64 = 0.04;
/// The time of a tile for a block that shares the memory with few others: the latency of its
/// copies.
const LATENCY: f64 = 0.8;
/// The time of a tile for a block that is alone on its multiprocessor, and copies nothing while it
/// merges its warps.
const ALONE: f64 = 1.05;

impl SplitWork {
    /// The cost of `splits` parts: waves of blocks, each with the tiles of the longest part, and
    /// the merging.
    #[must_use]
    pub fn cost(self, splits: u32) -> f64 {
        let part = f64::from(self.tiles.div_ceil(splits.max(1)));
        let wave = |blocks: f64| part * self.pace(blocks) + START;
        let blocks = u64::from(self.blocks) * u64::from(splits);
        let at_once = u64::from(self.at_once.max(1));
        let (whole, rest) = (blocks / at_once, blocks % at_once);
        let last = if rest > 0 { wave(rest as f64) } else { 0.0 };
        let merging = if splits > 1 { MERGE + PART * f64::from(splits) } else { 0.0 };
        whole as f64 * wave(at_once as f64) + last + merging
    }

    /// The time of a tile for each of `blocks` blocks that run at once and share the memory: that of
    /// its bytes, and at least the latency, which fewer bytes do not shorten.
    fn pace(self, blocks: f64) -> f64 {
        let share = blocks / f64::from(self.multiprocessors.max(1));
        let [bytes, fitted] = self.tile_bytes.map(|bytes| f64::from(bytes.max(1)));
        let busy = share.min(1.0) * ALONE + (share - 1.0).max(0.0) * (2.0 - ALONE);
        LATENCY.max(busy * bytes / fitted)
    }
}

/// The best number of parts for a sequence's keys: the smallest number with the least cost. It is
/// at most the number of tiles, and at most the number of blocks that run at once.
#[must_use]
pub fn splits(work: SplitWork) -> u32 {
    let most = work.tiles.min(work.at_once).clamp(1, MAX_SPLITS);
    let better = |best: u32, next: u32| if work.cost(next) < work.cost(best) { next } else { best };
    (1..=most).fold(1, better)
}

/// Blocks for each part.
fn work(p: &Problem) -> u32 {
    let row_tiles = tiles(p.seq_q() * p.group(), decode_split::ROWS);
    let kv_heads = u32::try_from(p.batch() * p.kv_heads()).unwrap_or(u32::MAX);
    kv_heads.saturating_mul(row_tiles)
}

/// Every decode kernel, the slowest first.
pub static DECODE_KERNELS: &[DecodeSpec] = &[DECODE];

const DECODE: DecodeSpec = DecodeSpec {
    name: "decode",
    summary: "mma.sync, heads that share keys in one tile, keys split between blocks and warps, then merged",
    idea: "a cache is read once, by all of the GPU: the queries of a group are rows of one tile",
    dtypes: &[DType::F16, DType::BF16],
    capability: (8, 0),
    exact_capability: false,
    limits: AttentionLimits {
        head_dims: &[64, 128, 256],
        features: Features {
            mask: false,
            dropout: false,
            bias: false,
            varlen: false,
            ..ALL_FEATURES
        },
        sizes: |_, d| Sizes { rows: vec![decode_split::ROWS], keys: vec![decode_split::keys(d)] },
    },
    draft: |d, target| {
        let p = &d.problem;
        let split = split_step(d, target)?;
        let parts = d.splits.map_or_else(|| chosen(d, &split, target), NonZeroU32::get);
        let split = Step { grid: work(p).saturating_mul(parts).into(), ..split };
        if parts == 1 {
            return Ok(split.into());
        }
        let rows = u64::from(parts) * p.rows() as u64;
        let sections = vec![
            Section::new(Usage::Parts, rows * p.head_dim_v() as u64 * 4),
            Section::new(Usage::PartSums, rows * 8),
        ];
        let rows = u32::try_from(p.rows()).unwrap_or(u32::MAX);
        let combine = Step { grid: rows.into(), ..step(d, decode_combine::ENTRIES)? };
        Ok(Draft { sections, steps: vec![split, combine] })
    },
};

/// The launch that reads the cache, but for its grid.
fn split_step(d: &Decode, target: &Target) -> Result<Step<Decode>, String> {
    let (entries, shared_bytes): (_, fn(usize) -> u32) = match d.has_scales() {
        false => (decode_split::ENTRIES, decode_split::shared_bytes),
        // The conversion of codes is in the module of this architecture alone.
        true if target.capability == HOPPER => (decode_e4m3::HOPPER, decode_e4m3::shared_bytes),
        true => (decode_e4m3::ENTRIES, decode_e4m3::shared_bytes),
    };
    let step = step(d, entries)?;
    Ok(Step { shared_bytes: shared_bytes(step.entry.size), ..step })
}

/// The number of splits for a decode on a device.
fn chosen(d: &Decode, split: &Step<Decode>, target: &Target) -> u32 {
    let keys = d.expected_keys.unwrap_or(usize::MAX).min(d.problem.seq_k());
    let at_once = target.blocks_at_once(split.entry, split.shared_bytes);
    let blocks = work(&d.problem);
    let size = split.entry.size;
    let fitted = decode_split::keys(size);
    let of_tile = if d.has_scales() { decode_e4m3::KEYS } else { fitted };
    // K and V.
    let bytes = |keys: u32, of_number: usize| 2 * keys * (size * of_number) as u32;
    let multiprocessors = target.multiprocessors;
    let tile_bytes = [bytes(of_tile, d.stored().size()), bytes(fitted, d.problem.dtype().size())];
    let tiles = tiles(keys, of_tile);
    splits(SplitWork { tiles, blocks, at_once, multiprocessors, tile_bytes })
}

/// A launch of the smallest entry that has the columns of the problem.
fn step(d: &Decode, entries: Instances) -> Result<Step<Decode>, String> {
    let size = entry_size(&d.problem, entries)?;
    let e4m3 = d.has_scales().into();
    let constants = Constants { page: d.page(), e4m3, ..padded_constants(&d.problem, size) };
    Ok(Step { constants, ..Step::new(entries, d.dtype(), size, args)? })
}

/// Scales in the kernels' form.
pub(super) fn scale_args(scales: Option<[Region; 2]>) -> ScaleArgs {
    let [k, v] = scales.unwrap_or_default().map(Region::arg);
    ScaleArgs { k, v }
}

/// The arguments of decode kernels, as bytes.
fn args(call: &Call<'_, Decode>) -> Vec<u8> {
    let &DecodeArgs { ref forward, seqused_k, page_table, scales } = call.args;
    let region = |usage| call.region(usage).arg();
    let parts = call.region(Usage::PartSums).bytes / (call.problem.problem.rows() as u64 * 8);
    args::DecodeArgs {
        cache: call.problem.cache_args(seqused_k, page_table),
        parts: PartsArgs {
            o: region(Usage::Parts),
            sums: region(Usage::PartSums),
            // No section: one part.
            splits: u32::try_from(parts).unwrap_or(u32::MAX).max(1),
            padding: 0,
        },
        scales: scale_args(scales),
        forward: attention_args(&call.problem.problem, forward, region),
    }
    .to_launch_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    const H200: Target = Target::new((9, 0), 232_448, 132);

    fn plan(batch: usize, heads: [usize; 2], keys: usize, d: usize) -> Plan<Decode> {
        let [heads, kv_heads] = heads;
        let p = Problem::builder(batch, heads, 1, d).kv_heads(kv_heads).seq_k(keys);
        let p = p.dtype(DType::F16).build().unwrap();
        DECODE_KERNELS[0].plan(&Decode::new(p), &H200).unwrap()
    }

    #[test]
    fn splits_fill_the_gpu_once() {
        // 264 blocks at once: 4 heads leave each of 66 parts a block; 2048 tiles are 32 for each of 64.
        assert_eq!(plan(1, [32, 4], 131_072, 128).splits(), 64);
        // No more parts than tiles.
        assert_eq!(plan(1, [32, 4], 64, 128).splits(), 1);
        // 64 tiles: measured, 22 to 32 parts of 2 or 3 tiles beat 64 of one by 15 %.
        assert!((20..=33).contains(&plan(1, [32, 4], 4096, 128).splits()));
        // 512 heads are two waves, nearly whole ones: a split would only cost.
        let whole = plan(64, [64, 8], 4096, 128);
        assert_eq!((whole.splits(), whole.entries().count()), (1, 1));
        // One block a multiprocessor: most of them have one.
        assert!((100..=132).contains(&plan(1, [4, 1], 131_072, 256).splits()));
    }

    #[test]
    fn a_part_more_must_gain_what_it_costs() {
        let work = SplitWork {
            tiles: 1000,
            blocks: 10,
            at_once: 100,
            multiprocessors: 50,
            tile_bytes: [1, 1],
        };
        assert_eq!(splits(work), 10);
        assert!(work.cost(10) < work.cost(9) && work.cost(10) < work.cost(11));
        assert_eq!(splits(SplitWork { blocks: 100, ..work }), 1);
        // Two tiles: half of the time, and the merging costs more.
        assert_eq!(splits(SplitWork { tiles: 2, ..work }), 1);
        assert_eq!(splits(SplitWork { tiles: 0, ..work }), 1);
    }

    /// A cache in e4m3 costs what 16-bit elements of the same number of bytes cost.
    #[test]
    fn bytes_decide_not_keys() {
        let splits = |heads: [usize; 2], keys, d, stored| {
            let [heads, kv_heads] = heads;
            let p = Problem::builder(1, heads, 1, d).kv_heads(kv_heads).seq_k(keys);
            let decode = Decode::new(p.dtype(DType::F16).build().unwrap());
            DECODE_KERNELS[0].plan(&decode.cache_dtype(stored).unwrap(), &H200).unwrap().splits()
        };
        for heads in [[32, 4], [64, 8], [4, 1]] {
            // A tile has as many bytes, and as many blocks run at once.
            for d in [128, 256] {
                for keys in [512, 4096, 32_768, 131_072] {
                    let codes = splits(heads, 2 * keys, d, DType::E4M3);
                    assert_eq!(codes, splits(heads, keys, d, DType::F16), "{keys} keys, D {d}");
                }
            }
        }
        // At D = 64 a tile has half the bytes: where bytes count half the time, else the latency.
        let halves = SplitWork {
            tiles: 256,
            blocks: 4,
            at_once: 528,
            multiprocessors: 132,
            tile_bytes: [1 << 14, 1 << 15],
        };
        let whole = SplitWork { tile_bytes: [1 << 15; 2], ..halves };
        let [busy, latency] = [528.0, 60.0];
        assert!((whole.pace(busy) - 2.0 * halves.pace(busy)).abs() < 1e-12);
        assert_eq!((whole.pace(latency), halves.pace(latency)), (LATENCY, LATENCY));
        // The latency is what a tile takes for up to twice the blocks, so that more parts pay.
        assert!(super::splits(halves) > super::splits(whole), "{halves:?}");
        assert_eq!(splits([32, 4], 32_768, 64, DType::E4M3), super::splits(halves));
    }

    #[test]
    fn expected_lengths_decide_and_an_override_decides_for_sure() {
        let p = Problem::builder(1, 8, 1, 128).kv_heads(1).seq_k(1 << 20).dtype(DType::F16);
        let decode = Decode::new(p.build().unwrap());
        let splits = |decode: &Decode| DECODE_KERNELS[0].plan(decode, &H200).unwrap().splits();
        assert!(splits(&decode) > splits(&decode.expected_keys(1024)));
        assert_eq!(splits(&decode.splits(NonZeroU32::new(97))), 97);
        let text = DECODE_KERNELS[0].plan(&decode.splits(NonZeroU32::new(1 << 20)), &H200);
        assert!(text.unwrap_err().to_string().contains("at most 65535"));
    }

    #[test]
    fn a_cache_in_e4m3_is_half_the_bytes_and_needs_whole_chunks() {
        let p = |d| Problem::builder(1, 8, 1, d).kv_heads(2).seq_k(4096).dtype(DType::F16);
        let decode = |d| Decode::new(p(d).build().unwrap());
        let codes = |d| decode(d).cache_dtype(DType::E4M3).unwrap();
        assert_eq!(codes(128).cache_bytes([4096]) * 2, decode(128).cache_bytes([4096]));
        let peak = |decode: &Decode| {
            DECODE_KERNELS[0].plan(&decode.splits(NonZeroU32::new(4)), &H200).unwrap().peak_bytes()
        };
        let (cache, scales) = (decode(128).cache_bytes([4096]) / 2, 2 * 2 * 4);
        assert_eq!(peak(&codes(128)) + cache, peak(&decode(128)) + scales);
        let symbols = |target| {
            let plan = DECODE_KERNELS[0].plan(&codes(96), &target).unwrap();
            plan.entries().map(|entry| entry.entry.symbol).collect::<Vec<_>>()
        };
        assert_eq!(symbols(H200)[0], "decode_e4m3_hopper_f16_d128");
        assert_eq!(symbols(Target { capability: (8, 0), ..H200 })[0], "decode_e4m3_f16_d128");
        assert_eq!(symbols(Target { capability: (10, 0), ..H200 })[0], "decode_e4m3_f16_d128");
        let text = DECODE_KERNELS[0].plan(&codes(72), &H200).unwrap_err().to_string();
        assert!(text.contains("72 of a cache in e4m3: it has multiples of 16"), "{text}");
        DECODE_KERNELS[0].plan(&decode(72), &H200).unwrap();
        let text = decode(64).cache_dtype(DType::BF16).unwrap_err().to_string();
        assert!(text.contains("storage type of the cache = bf16"), "{text}");
        let own = decode(64).cache_dtype(DType::F16).unwrap();
        assert_eq!((own, own.has_scales()), (decode(64), false));
    }

    #[test]
    fn wrong_pages_are_named() {
        let p = Problem::builder(2, 4, 1, 64).seq_k(100).dtype(DType::F16).build().unwrap();
        let text = |page_size, pages, max_pages| {
            Decode::paged(p, Pages { page_size, pages, max_pages }).unwrap_err().to_string()
        };
        assert!(text(0, 1, 1).contains("page size = 0"));
        assert!(text(16, 0, 7).contains("pages = 0"));
        assert!(text(16, 1, 6).contains("100 keys need 7 pages of 16"));
        assert!(text(u32::MAX, u32::MAX, 1).contains("a cache"));
        assert_eq!(
            Decode::paged(p, Pages { page_size: 16, pages: 9, max_pages: 7 }).unwrap().k_shape(),
            [9, 4, 16, 64]
        );
    }
}
