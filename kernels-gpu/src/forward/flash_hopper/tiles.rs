//! Tiles of each head dim, and where they lie in shared memory.

use simt::{
    mbarrier::Mbarrier,
    warp, warpgroup,
    wgmma::{CHUNK_COLUMNS, CHUNK_ROW_BYTES},
};

use super::TASK_WORDS;
use crate::constants::Constants;

/// Query rows of a consumer warpgroup.
pub const CONSUMER_ROWS: u32 = 64;

/// The tiles of a block, for a head dim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiles {
    /// Head dim of Q and K.
    pub d: u32,
    /// Head dim of V and O.
    pub d_v: u32,
    /// Consumer warpgroups.
    pub consumers: u32,
    /// Keys of a tile.
    pub keys: u32,
    /// Stages of the ring of Q: two where shared memory has room for them, so that the next
    /// task's Q is there before this one is done.
    pub q_stages: u32,
    /// Stages of the rings of K and of V: more where tiles are small and soon used up.
    pub kv_stages: u32,
    /// Chunks of 64 columns of O that a warp fills and stores together: two where shared memory has
    /// room for them.
    pub output_chunks: u32,
}

impl Tiles {
    /// The tiles of head dim `d` and a number of consumers: what shared memory and registers leave
    /// room for.
    #[must_use]
    pub const fn of(d: u32, consumers: u32) -> Self {
        Self::with_values(d, d, consumers)
    }

    /// The same, where values have head dim `d_v`.
    #[must_use]
    pub const fn with_values(d: u32, d_v: u32, consumers: u32) -> Self {
        let keys = match (d, d_v, consumers) {
            // O is wider than at 64, and S must make room for it.
            (65..=96, _, 3) => 112,
            (0..=192, 0..=128, _) => 128,
            (0..=192, ..) => 96,
            _ => 64,
        };
        let kv_stages = if keys * d <= 128 * 64 { 4 } else { 2 };
        let mut tiles = Self { d, d_v, consumers, keys, q_stages: 2, kv_stages, output_chunks: 2 };
        if tiles.shared_bytes() > MAX_SHARED_BYTES {
            tiles.q_stages = 1;
        }
        if tiles.shared_bytes() > MAX_SHARED_BYTES {
            tiles.output_chunks = 1;
        }
        assert!(tiles.shared_bytes() <= MAX_SHARED_BYTES, "fits a multiprocessor");
        tiles
    }

    /// Query rows of a block.
    #[must_use]
    pub const fn rows(&self) -> u32 {
        self.consumers * CONSUMER_ROWS
    }

    /// Threads of a block: the producer's warpgroup and the consumers'.
    #[must_use]
    pub const fn threads(&self) -> u32 {
        (1 + self.consumers) * warpgroup::THREADS
    }

    /// Bytes of a stage of Q.
    pub(super) const fn q_bytes(&self) -> u32 {
        tile_bytes(self.rows(), self.d)
    }

    /// Bytes of a stage of K.
    pub(super) const fn k_bytes(&self) -> u32 {
        tile_bytes(self.keys, self.d)
    }

    /// Bytes of a stage of V.
    pub(super) const fn v_bytes(&self) -> u32 {
        tile_bytes(self.keys, self.d_v)
    }

    /// Offset of K in shared memory; Q comes first.
    pub(super) const fn k(&self) -> u32 {
        self.q_stages * self.q_bytes()
    }

    /// Offset of V.
    pub(super) const fn v(&self) -> u32 {
        self.k() + self.kv_stages * self.k_bytes()
    }

    /// Offset of the buffers from which O is stored, [`output_bytes`](Self::output_bytes) for each
    /// warp.
    pub(super) const fn outputs(&self) -> u32 {
        self.v() + self.kv_stages * self.v_bytes()
    }

    /// Bytes of a warp's buffers for O: as many chunks as are filled together, or as O has.
    pub(super) const fn output_bytes(&self) -> u32 {
        let together = self.output_chunks * CHUNK_COLUMNS;
        tile_bytes(OUTPUT_ROWS, if self.d_v < together { self.d_v } else { together })
    }

    /// Offset of the mbarriers of the rings of K, V and each consumer's Q.
    pub(super) const fn barriers(&self) -> u32 {
        let warps = self.rows() / OUTPUT_ROWS;
        self.outputs() + warps * self.output_bytes()
    }

    pub(super) const fn num_barriers(&self) -> u32 {
        2 * (self.consumers * self.q_stages + 2 * self.kv_stages)
    }

    /// Offset of the tasks, [`TASK_WORDS`] for each stage of Q and consumer.
    pub(super) const fn tasks(&self) -> u32 {
        self.barriers() + self.num_barriers() * Mbarrier::BYTES
    }

    pub(super) const fn task_words(&self) -> u32 {
        self.q_stages * self.consumers * TASK_WORDS
    }

    /// Dynamic shared memory of a block in bytes.
    #[must_use]
    pub const fn shared_bytes(&self) -> u32 {
        self.tasks() + self.task_words() * size_of::<u32>() as u32
    }

    /// Extents of the boxes of the tensor maps of q, k, v and o, fastest dimension first, over
    /// dimensions `[D, N, H, B]`. Swizzle: 128 bytes.
    #[must_use]
    pub const fn boxes(&self) -> [[u32; 4]; 4] {
        let (keys, columns) = (self.keys, CHUNK_COLUMNS);
        [
            [columns, CONSUMER_ROWS, 1, 1],
            [columns, keys, 1, 1],
            [columns, keys, 1, 1],
            [columns, OUTPUT_ROWS, 1, 1],
        ]
    }
}

/// Consumers that a block may have for head dim `d`: two, and three where O is narrow
/// enough for 160 registers per thread. These leave none for padding and dropout.
#[must_use]
pub const fn max_consumers(d: u32) -> u32 {
    if d <= 96 { 3 } else { 2 }
}

impl Tiles {
    /// The tiles that are done first with `heads` heads of `seq_q` rows and `seq_k` keys on
    /// `multiprocessors`, which run one block each.
    ///
    /// Three consumers take less time a row, by an eighth or more, but tasks of 192 rows leave
    /// more of a short launch's last round idle (measured on an H100 at D = 64: two were
    /// ahead with 1.5 tasks per multiprocessor, level with 3, behind with 6), and more rows and keys
    /// past the end (measured on an H200 at D = 80, in time of three by time of two: 1.05 at N 1024,
    /// where their tiles cover a fifth more, 0.94 at 2048, 0.90 at 4096, 0.88 at 16,384; with a
    /// diagonal 1.03 at 768, 1.00 at 1536, 0.99 at 2048, 0.90 at 16,384).
    #[must_use]
    pub fn best(
        d: u32,
        constants: Constants,
        [seq_q, seq_k]: [u64; 2],
        heads: u64,
        multiprocessors: u32,
    ) -> Self {
        /// Tasks a multiprocessor from which three are worth it.
        const MANY: u64 = 4;
        /// Keys from which a diagonal through tiles of 192 rows costs less than three gain.
        const MANY_KEYS: u64 = 2048;
        let two = Self::of(d, 2);
        let tasks = seq_q.div_ceil(two.rows().into()).saturating_mul(heads);
        let plain = Constants { causal: 0, group: 0, ..constants } == Constants::NONE
            && constants.causal < 2;
        let short = constants.causal == 1 && d > 64 && seq_k < MANY_KEYS;
        if max_consumers(d) == 3 && plain && !short && tasks >= MANY * u64::from(multiprocessors) {
            let three = Self::of(d, 3);
            // An eighth more at most.
            if 8 * three.covered(seq_q, seq_k) <= 9 * two.covered(seq_q, seq_k) {
                return three;
            }
        }
        two
    }

    /// Scores of the tiles of a head.
    fn covered(&self, seq_q: u64, seq_k: u64) -> u128 {
        let up = |n: u64, tile: u32| n.div_ceil(tile.into()) as u128 * u128::from(tile);
        up(seq_q, self.rows()) * up(seq_k, self.keys)
    }
}

/// Bytes of a tile of `rows` rows: whole chunks of 64 columns.
pub(super) const fn tile_bytes(rows: u32, d: u32) -> u32 {
    d.div_ceil(CHUNK_COLUMNS) * rows * CHUNK_ROW_BYTES
}

/// Rows of O that are stored at a time: the rows of a warp.
pub(super) const OUTPUT_ROWS: u32 = CONSUMER_ROWS * warp::LANES / warpgroup::THREADS;
/// Elements of a chunk of O: 64 columns of a warp's rows.
pub(super) const OUTPUT_CHUNK: u32 = OUTPUT_ROWS * CHUNK_COLUMNS;

/// The most shared memory that a block may have on sm_90.
const MAX_SHARED_BYTES: u32 = 232_448;

#[cfg(test)]
mod tests {
    use super::*;
    #[test]
    fn three_consumers_where_there_are_many_tasks() {
        let full = Constants::default();
        let consumers = |d, constants, n| Tiles::best(d, constants, [n, n], 48, 132).consumers;
        assert_eq!((consumers(64, full, 1024), consumers(64, full, 2048)), (2, 3));
        assert_eq!((consumers(128, full, 2048), consumers(256, full, 2048)), (2, 2));
        assert_eq!((consumers(80, full, 2048), consumers(96, full, 2048)), (3, 3));
        assert_eq!(consumers(64, Constants { causal: 1, ..full }, 2048), 3);
        assert_eq!(consumers(64, Constants { dropout: 1, ..full }, 2048), 2);
    }

    #[test]
    fn three_consumers_where_their_tiles_cover_little_beyond_the_end() {
        let consumers = |d, n| Tiles::best(d, Constants::default(), [n, n], 1024, 132).consumers;
        // 192 rows per task; 128 keys per tile at 64, 112 above.
        let of_80 = [512, 768, 1024, 2048, 16_384].map(|n| consumers(80, n));
        assert_eq!(of_80, [2, 3, 2, 3, 3]);
        assert_eq!([512, 640, 1024].map(|n| consumers(64, n)), [3, 2, 3]);
        let causal =
            |n| Tiles::best(96, Constants { causal: 1, ..Constants::NONE }, [n, n], 1024, 132);
        assert_eq!([1536, 2048].map(|n| causal(n).consumers), [2, 3]);
        // No size overflows.
        let largest = [u64::from(u32::MAX); 2];
        assert_eq!(Tiles::best(80, Constants::default(), largest, u64::MAX, 132).consumers, 3);
    }
}
