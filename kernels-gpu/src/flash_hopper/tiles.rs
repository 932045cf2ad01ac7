//! Tiles of each head dim, and where they lie in shared memory.

use simt::{
    mbarrier::Mbarrier,
    warpgroup,
    wgmma::{CHUNK_COLUMNS, CHUNK_ROW_BYTES},
};

use crate::pipeline::Ring;

/// Query rows of a consumer warpgroup.
pub const CONSUMER_ROWS: u32 = 64;
/// Stages of the rings of K and of V.
pub const STAGES: u32 = 2;
/// Query rows of a block.
#[must_use]
pub const fn tile_rows(consumers: u32) -> u32 {
    consumers * CONSUMER_ROWS
}

/// Threads of a block: the producer's warpgroup and the consumers'.
#[must_use]
pub const fn threads(consumers: u32) -> u32 {
    (1 + consumers) * warpgroup::THREADS
}

/// Consumers of a block for head dim `d`. Three leave 160 registers a thread, which is too
/// few for what the general kernel does besides.
#[must_use]
pub const fn consumers(d: u32, general: bool) -> u32 {
    if d <= 64 && !general { 3 } else { 2 }
}

/// Keys of a tile for head dim `d`: what shared memory and registers leave room for.
#[must_use]
pub const fn tile_keys(d: u32) -> u32 {
    match d {
        0..=128 => 128,
        129..=192 => 96,
        _ => 80,
    }
}

/// Bytes of a tile of `rows` rows: whole chunks of 64 columns.
pub(super) const fn tile_bytes(rows: u32, d: u32) -> u32 {
    d.div_ceil(CHUNK_COLUMNS) * rows * CHUNK_ROW_BYTES
}

/// Where things lie in shared memory, in bytes.
pub(super) struct Layout {
    pub k: u32,
    pub v: u32,
    pub barriers: u32,
    pub end: u32,
}

/// Mbarriers: one for Q, then the rings of K and V.
pub(super) const BARRIERS: u32 = 1 + 2 * Ring::<STAGES>::BARRIERS;

impl Layout {
    pub const fn new(d: u32, general: bool) -> Self {
        let kv_bytes = STAGES * tile_bytes(tile_keys(d), d);
        let k = tile_bytes(tile_rows(consumers(d, general)), d);
        let (v, barriers) = (k + kv_bytes, k + 2 * kv_bytes);
        Self { k, v, barriers, end: barriers + BARRIERS * Mbarrier::BYTES }
    }
}

/// Dynamic shared memory of a block in bytes.
#[must_use]
pub const fn shared_bytes(d: u32, general: bool) -> u32 {
    Layout::new(d, general).end
}

/// Extent of the tensor maps' boxes, fastest dimension first, over dimensions
/// `[D, N, H, B]`: `query` for that of Q, otherwise for K and V. Swizzle: 128 bytes.
#[must_use]
pub const fn box_dims(d: u32, general: bool, query: bool) -> [u32; 4] {
    let rows = if query { tile_rows(consumers(d, general)) } else { tile_keys(d) };
    [CHUNK_COLUMNS, rows, 1, 1]
}

const _: () = assert!(shared_bytes(64, false) <= 232_448 && shared_bytes(128, false) <= 232_448);
const _: () = assert!(shared_bytes(192, false) <= 232_448 && shared_bytes(256, false) <= 232_448);
