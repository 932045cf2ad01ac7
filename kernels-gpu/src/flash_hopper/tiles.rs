//! Tiles of each head dim, and where they lie in shared memory.

use simt::{
    mbarrier::Mbarrier,
    warpgroup,
    wgmma::{CHUNK_COLUMNS, CHUNK_ROW_BYTES},
};

use super::TASK_WORDS;

/// Query rows of a consumer warpgroup.
pub const CONSUMER_ROWS: u32 = 64;

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

/// Consumers that a block may have for head dim `d`: two, and three where O is narrow
/// enough for 160 registers a thread and nothing is decided at run time.
#[must_use]
pub const fn max_consumers(d: u32, general: bool) -> u32 {
    if d <= 64 && !general { 3 } else { 2 }
}

/// Consumers of a block for `heads` heads of `seq_q` rows on `multiprocessors`, which run
/// one block each at a time: those that are done first. A round of blocks takes as
/// long as a block has rows; more rows a block mean fewer bytes where it is a draw.
#[must_use]
pub fn consumers(d: u32, general: bool, seq_q: u64, heads: u64, multiprocessors: u32) -> u32 {
    let time = |consumers: u32| {
        let rows = u64::from(tile_rows(consumers));
        let blocks = seq_q.div_ceil(rows).saturating_mul(heads);
        blocks.div_ceil(u64::from(multiprocessors.max(1))).saturating_mul(rows)
    };
    if max_consumers(d, general) == 3 && time(3) <= time(2) { 3 } else { 2 }
}

/// Keys of a tile for head dim `d`: what shared memory and registers leave room for; `general`
/// takes registers for what it decides at run time.
#[must_use]
pub const fn tile_keys(d: u32, general: bool) -> u32 {
    match d {
        0..=128 => 128,
        129..=192 => 96,
        _ if general => 64,
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
    pub tasks: u32,
    pub end: u32,
}

/// Stages of the ring of Q for head dim `d`: two where shared memory has room for them, so
/// that the next task's Q is there before this one is done.
#[must_use]
pub const fn q_stages(d: u32) -> u32 {
    if d <= 128 { 2 } else { 1 }
}

/// Stages of the rings of K and of V for head dim `d`: more where tiles are small and soon
/// used up.
#[must_use]
pub const fn kv_stages(d: u32) -> u32 {
    if d <= 64 { 4 } else { 2 }
}

/// Mbarriers: those of the rings of Q, K and V.
pub(super) const fn num_barriers(d: u32) -> u32 {
    2 * (q_stages(d) + 2 * kv_stages(d))
}

impl Layout {
    pub const fn new(d: u32, consumers: u32, general: bool) -> Self {
        let kv_bytes = kv_stages(d) * tile_bytes(tile_keys(d, general), d);
        let k = q_stages(d) * tile_bytes(tile_rows(consumers), d);
        let (v, barriers) = (k + kv_bytes, k + 2 * kv_bytes);
        let tasks = barriers + num_barriers(d) * Mbarrier::BYTES;
        let task_bytes = TASK_WORDS * size_of::<u32>() as u32;
        Self { k, v, barriers, tasks, end: tasks + q_stages(d) * consumers * task_bytes }
    }
}

/// Dynamic shared memory of a block in bytes.
#[must_use]
pub const fn shared_bytes(d: u32, consumers: u32, general: bool) -> u32 {
    Layout::new(d, consumers, general).end
}

/// Extent of the tensor maps' boxes, fastest dimension first, over dimensions
/// `[D, N, H, B]`: `query` for that of Q, otherwise for K and V. Swizzle: 128 bytes.
#[must_use]
pub const fn box_dims(d: u32, query: bool, general: bool) -> [u32; 4] {
    [CHUNK_COLUMNS, if query { CONSUMER_ROWS } else { tile_keys(d, general) }, 1, 1]
}

/// The most shared memory that a block may have on sm_90.
const MAX_SHARED_BYTES: u32 = 232_448;
const _: () = assert!(shared_bytes(64, 3, false) <= MAX_SHARED_BYTES, "fits a multiprocessor");
const _: () = assert!(shared_bytes(128, 2, false) <= MAX_SHARED_BYTES, "fits a multiprocessor");
const _: () = assert!(shared_bytes(192, 2, false) <= MAX_SHARED_BYTES, "fits a multiprocessor");
const _: () = assert!(shared_bytes(256, 2, false) <= MAX_SHARED_BYTES, "fits a multiprocessor");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_as_large_as_their_rounds_allow() {
        // 48 heads of 512 rows on 132 multiprocessors: 144 blocks or 192, two rounds both.
        assert_eq!(consumers(64, false, 512, 48, 132), 2);
        // 528 blocks of 192 rows are four full rounds; 768 of 128 rows are six.
        assert_eq!(consumers(64, false, 2048, 48, 132), 3);
        assert_eq!(consumers(64, true, 2048, 48, 132), 2);
        assert_eq!(consumers(128, false, 2048, 48, 132), 2);
    }
}
