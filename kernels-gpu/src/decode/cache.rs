//! Where the keys and values of a sequence are, and how a warp copies them.
//!
//! ```text
//! contiguous   [B, Nk, Hkv, D], in any order    key j: b's first + j * stride
//! pages        [pages, page, Hkv, D]            key j: page table[b][j / page], slot j % page
//! ```
//!
//! The size of a page is a specialisation constant: divisions by it are multiplications. Where it is a
//! multiple of a warp's tile, the tile's rows lie at one stride, as in a contiguous cache. Otherwise each
//! lane looks up the page of one key, and the lanes that copy the key ask that lane.

use half::{bf16, f16};
use simt::{
    async_copy,
    compiler::opaque,
    global::Global,
    layout::{Swizzled, TileLayout},
    memory::Memory,
    shared::Shared,
    unroll, warp,
};

use crate::{
    args::{CacheArgs, DecodeArgs, Tensor},
    constants::Constants,
    decode::sums::WARPS,
    parts::{
        columns::Columns,
        tile::{self, Rows, for_each_chunk},
    },
};

/// Keys of sequence `b`, `most` where the launch does not say.
///
/// # Safety
/// `cache.lengths` must be empty or `[B]`, and `b` less than B.
#[inline(always)]
#[must_use]
pub unsafe fn length(cache: &CacheArgs, b: u32, most: u32) -> u32 {
    // SAFETY: the lengths are empty or `[B]`, as stated above.
    let lengths = unsafe { cache.lengths.view::<u32>() };
    let length = lengths.read_if(cache.lengths.bytes != 0, b as u64, most);
    let length = (length as i32).max(0) as u32;
    length.min(most)
}

/// The page of key `key` of sequence `b`; 0 where keys are not in pages.
///
/// # Safety
/// With the constant `page`, `cache.page_table` must be `[B, max_pages]` with a page for the key, and
/// `cache.pages` not be 0.
#[inline(always)]
#[must_use]
pub unsafe fn page_of(cache: &CacheArgs, b: u32, key: u32) -> u32 {
    // SAFETY: the table has a page for the key, as stated above.
    let table = unsafe { cache.page_table.view::<u32>() };
    let place = b as u64 * cache.max_pages as u64 + (key / page()) as u64;
    let page = table.read_if(is_paged(), place, 0);
    if is_paged() { page.min(cache.pages.wrapping_sub(1)) } else { 0 }
}

/// Index of the row of key `key` of head `h_kv` of sequence `b` in K or V.
#[inline(always)]
#[must_use]
pub fn row(tensor: &Tensor, (b, h_kv): (u32, u32), page: u32, key: u32) -> u64 {
    let side = tensor.head(if is_paged() { 0 } else { b }, h_kv);
    side + offset(tensor.stride_b, tensor.stride_n, page, key)
}

/// Elements from a head's first key to key `key`, which lies in `page`.
#[inline(always)]
fn offset(stride_page: u64, stride_key: u64, in_page: u32, key: u32) -> u64 {
    if is_paged() {
        in_page as u64 * stride_page + (key % page()) as u64 * stride_key
    } else {
        key as u64 * stride_key
    }
}

/// Whether keys are in pages.
#[inline(always)]
fn is_paged() -> bool {
    Constants::page() != 0
}

/// Keys per page. (At least one, so that the compiler sees no division by 0.)
#[inline(always)]
fn page() -> u32 {
    Constants::page().max(1)
}

/// The element of a cache that a warp copies: one number, or a pair of codes.
pub trait Element: Memory {
    /// Numbers of an element.
    const NUMBERS: u64 = 1;

    /// Columns in elements.
    #[inline(always)]
    #[must_use]
    fn columns(numbers: Columns) -> Columns {
        numbers
    }
}

impl Element for f16 {}
impl Element for bf16 {}
/// Two codes of e4m3.
impl Element for u16 {
    const NUMBERS: u64 = 2;

    #[inline(always)]
    fn columns(numbers: Columns) -> Columns {
        numbers.pairs()
    }
}

/// Keys and values of one head of one sequence.
#[derive(Clone, Copy)]
pub struct Cache<T> {
    k: Side<T>,
    v: Side<T>,
    /// Pages of the sequence.
    table: Global<u32>,
    last_page: u32,
    /// Keys of the sequence: the kernel reads none beyond.
    length: u32,
}

/// Keys, or values.
#[derive(Clone, Copy)]
struct Side<T> {
    first: Global<T>,
    stride_page: u64,
    stride_key: u64,
}

impl<T: Element> Side<T> {
    /// # Safety
    /// The tensor must be as the launch says.
    #[inline(always)]
    unsafe fn new(tensor: &Tensor, b: u32, h_kv: u32) -> Self {
        let b = if is_paged() { 0 } else { b };
        // SAFETY: the tensor is a cache of the shape that `Cache::new` asks.
        let first = unsafe { tensor.buffer.view::<T>() }.skip(tensor.head(b, h_kv) / T::NUMBERS);
        let (stride_page, stride_key) =
            (tensor.stride_b / T::NUMBERS, tensor.stride_n / T::NUMBERS);
        Self { first, stride_page, stride_key }
    }

    /// The row of key `key`, which lies in `page`, from its first column on.
    #[inline(always)]
    fn row(&self, page: u32, key: u32) -> Global<T> {
        self.first.skip(offset(self.stride_page, self.stride_key, page, key))
    }
}

impl<T: Element> Cache<T> {
    /// The cache of head `h_kv` of sequence `b`, which has `length` keys.
    ///
    /// # Safety
    /// `args.forward.tensors.k` and `v` must be `[B, Hkv, Nk, D]`, or `[pages, Hkv, page, D]` with the
    /// constant `page`, with D numbers, their addresses and strides multiples of 16 bytes; then `args.cache.page_table`
    /// must be `[B, max_pages]` with pages for `length` keys, and `args.cache.pages` not be 0.
    #[inline(always)]
    #[must_use]
    pub unsafe fn new(args: &DecodeArgs, b: u32, h_kv: u32, length: u32) -> Self {
        let CacheArgs { page_table, pages, max_pages, .. } = args.cache;
        let tensors = &args.forward.tensors;
        // SAFETY: K and V are caches of the shapes stated above.
        unsafe {
            Self {
                k: Side::new(&tensors.k, b, h_kv),
                v: Side::new(&tensors.v, b, h_kv),
                table: page_table.view::<u32>().skip(b as u64 * max_pages as u64),
                last_page: pages.wrapping_sub(1),
                length,
            }
        }
    }

    /// Whether the `KEYS` keys of a tile lie at one stride.
    #[inline(always)]
    fn is_even<const KEYS: u32>() -> bool {
        Constants::page() % KEYS == 0
    }

    /// The page that this lane finds for a warp's tiles from the one at `first_key` on. Where the rows of a tile lie
    /// at one stride, it is the page of the tile that comes `lane` tiles later, so one read serves 32 tiles;
    /// otherwise the page of one key of the first tile.
    #[inline(always)]
    #[must_use]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn look_up<const KEYS: u32>(&self, first_key: u32) -> u32 {
        if !is_paged() {
            return 0;
        }
        let lane = opaque(warp::lane_id());
        let further = if Self::is_even::<KEYS>() { lane * WARPS * KEYS } else { lane % KEYS };
        let key = first_key + further;
        let page = self.table.read_if(key < self.length, (key / page()) as u64, 0);
        // A wrong table does not lead outside of the cache.
        page.min(self.last_page)
    }

    /// As [`look_up`](Self::look_up) of a warp's first `STAGES` tiles, from `first_key` on.
    #[inline(always)]
    #[must_use]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn look_up_first<const KEYS: u32, const STAGES: u32>(&self, first_key: u32) -> [u32; 3] {
        let mut pages = [0; 3];
        unroll!(for STAGE in 0..3 {
            if Self::has_to_look_up::<KEYS>(STAGE as u32) && (STAGE as u32) < STAGES {
                // Opaque: the compiler would delay the read until it is sure that the page is needed.
                pages[STAGE] =
                    opaque(self.look_up::<KEYS>(first_key + STAGE as u32 * WARPS * KEYS));
            } else if STAGE > 0 {
                pages[STAGE] = pages[STAGE - 1];
            }
        });
        pages
    }

    /// Whether a warp looks up pages for the `n`-th tile of its part: a kernel does so one tile ahead, so no
    /// copy waits for the answer.
    #[inline(always)]
    #[must_use]
    pub fn has_to_look_up<const KEYS: u32>(n: u32) -> bool {
        !Self::is_even::<KEYS>() || n % warp::LANES == 0
    }

    /// The same cache, with `length` keys.
    #[inline(always)]
    #[must_use]
    pub fn with_length(self, length: u32) -> Self {
        Self { length, ..self }
    }

    /// Starts to copy the keys and values, `D` elements each, of the tile from `first_key` on, the `n`-th of
    /// the warp's part, whose pages were looked up. Keys past the last are 0. The caller commits and waits;
    /// all lanes of the warp take part.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn start<const D: usize, const KEYS: u32>(
        &self,
        (first_key, n): (u32, u32),
        looked_up: u32,
        k_smem: Shared<T>,
        v_smem: Shared<T>,
    ) {
        let in_one_page = is_paged() && Self::is_even::<KEYS>();
        let page = if in_one_page { warp::shuffle_idx(looked_up, n) } else { looked_up };
        let tile = WarpTile {
            first_key,
            keys: self.length.saturating_sub(first_key),
            page,
            lane: opaque(warp::lane_id()),
        };
        self.k.start::<Swizzled<D>, D, KEYS, { warp::LANES }>(
            tile,
            T::columns(Columns::of_keys()),
            k_smem,
        );
        self.v.start::<Swizzled<D>, D, KEYS, { warp::LANES }>(
            tile,
            T::columns(Columns::of_values()),
            v_smem,
        );
    }
}

/// A tile of keys as a lane sees it.
#[derive(Clone, Copy)]
struct WarpTile {
    first_key: u32,
    /// Keys of the sequence from the first on.
    keys: u32,
    /// The page of the tile, or of the key that is this lane's.
    page: u32,
    lane: u32,
}

impl<T: Element> Side<T> {
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn start<L: TileLayout, const D: usize, const KEYS: u32, const LANES: u32>(
        &self,
        WarpTile { first_key, keys, page, lane }: WarpTile,
        columns: Columns,
        smem: Shared<T>,
    ) {
        if Cache::<T>::is_even::<KEYS>() {
            let rows = Rows::at(self.row(page, first_key), self.stride_key, keys);
            let rows = rows.of_columns(columns);
            tile::load_async_by::<T, L, D, KEYS, LANES>(&rows, 0, smem, lane);
            return;
        }
        // Each row lies somewhere else.
        let at_once = const { tile::rows_at_once(D, LANES) };
        let first = lane / const { tile::group(D) };
        let mut starts = [self.first; 8];
        unroll!(for PASS in 0..8 {
            if (PASS as u32) < const { tile::passes(D, KEYS, LANES) } {
                let row = first + PASS as u32 * at_once;
                starts[PASS] = self.row(warp::shuffle_idx(page, row), first_key + row);
            }
        });
        for_each_chunk!(L, D, KEYS, lane of LANES, |index, (row, below), (column, right)| {
            let inside = row + below < keys && columns.has(column + right);
            let from = starts[(below / at_once) as usize].skip((column + right) as u64);
            async_copy::copy_or_zero(smem, index, from, 0, inside);
        });
    }
}
