//! Tiles of each head dim, and where they lie in shared memory.

use simt::{
    mbarrier::Mbarrier,
    warp, warpgroup,
    wgmma::{CHUNK_COLUMNS, CHUNK_ROW_BYTES},
};

use crate::{
    backward::order,
    parts::pipeline::{Ring, Stages},
};

/// Consumer warpgroups.
pub const CONSUMERS: u32 = 2;
/// Keys of a consumer.
pub const CONSUMER_KEYS: u32 = 64;
/// Keys of a warp.
pub(super) const WARP_KEYS: u32 = CONSUMER_KEYS * warp::LANES / warpgroup::THREADS;
/// Stages of Q, and of dO.
pub(super) const STAGES: u32 = 2;
/// Elements of dQ that a consumer computes at a time of a tile: 64 x 64.
pub(super) const DQ_ELEMENTS: u32 = 64 * 64;

/// The tiles of a block, for a head dim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiles {
    /// Head dim of Q and K.
    pub d: u32,
    /// Head dim of V and O.
    pub d_v: u32,
    /// Query rows of a tile.
    pub rows: u32,
    /// Keys of a block.
    pub keys: u32,
}

impl Tiles {
    /// Threads of a block: the producer's warpgroup and the consumers'.
    pub const THREADS: u32 = (1 + CONSUMERS) * warpgroup::THREADS;
    /// Mbarriers: of two rings, of K and of V.
    pub(super) const BARRIERS: u32 = 2 * Ring::<Stages<STAGES>>::BARRIERS + 2;

    /// The tiles of head dim `d`, of V too: as many rows as registers leave room for. Up to 128 dQ of a tile
    /// is 64 x 64 of each consumer, and each has keys of its own; above, consumers share 64 keys.
    #[must_use]
    pub const fn of(d: u32) -> Self {
        Self::with_values(d, d)
    }

    /// The tiles of head dim `d` with values of head dim `d_v`: fewer only where consumers share keys.
    #[must_use]
    pub const fn with_values(d: u32, d_v: u32) -> Self {
        assert!(d == 64 || d == 128 || d == 192 || d == 256, "no tiles for this head dim");
        assert!(d_v == d || d > 128 && d_v == 128, "no tiles for values of this head dim");
        if d > 128 {
            Self { d, d_v, rows: CHUNK_COLUMNS, keys: CONSUMER_KEYS }
        } else {
            Self { d, d_v, rows: CONSUMERS * DQ_ELEMENTS / d, keys: CONSUMERS * CONSUMER_KEYS }
        }
    }

    /// Whether consumers share the block's keys, and dQ is computed by [`queries`](super::queries::queries).
    pub const fn is_wide(&self) -> bool {
        self.keys == CONSUMER_KEYS
    }

    /// Whether dV starts as soon as P is there, before dPᵀ is waited for. With 128 rows P in both forms would
    /// take the registers of what is read early.
    pub(super) const fn starts_dv_early(&self) -> bool {
        self.rows < 128
    }

    /// Bytes of K.
    pub(super) const fn k_bytes(&self) -> u32 {
        self.keys * self.d * 2
    }

    /// Bytes of V.
    pub(super) const fn v_bytes(&self) -> u32 {
        self.keys * self.d_v * 2
    }

    /// Bytes of a stage of Q.
    pub(super) const fn q_bytes(&self) -> u32 {
        self.rows * self.d * 2
    }

    /// Bytes of a stage of dO.
    pub(super) const fn d_o_bytes(&self) -> u32 {
        self.rows * self.d_v * 2
    }

    /// Bytes of a buffer of dS.
    pub(super) const fn ds_bytes(&self) -> u32 {
        self.keys * self.rows * 2
    }

    /// Bytes of a stage of LSE, and of one of delta.
    pub(super) const fn row_bytes(&self) -> u32 {
        self.rows * size_of::<f32>() as u32
    }

    /// Offset of V; K comes first.
    pub(super) const fn v(&self) -> u32 {
        self.k_bytes()
    }

    /// Offset of the stages of Q.
    pub(super) const fn q(&self) -> u32 {
        self.v() + self.v_bytes()
    }

    /// Offset of the stages of dO.
    pub(super) const fn d_o(&self) -> u32 {
        self.q() + STAGES * self.q_bytes()
    }

    /// Offset of the two buffers of dS, where each consumer has keys of its own.
    pub(super) const fn ds(&self) -> u32 {
        self.d_o() + STAGES * self.d_o_bytes()
    }

    /// Offset of P, where consumers share keys: it has the place and size of one buffer of dS.
    pub(super) const fn weights(&self) -> u32 {
        self.ds()
    }

    /// Buffers of dS, or of P.
    pub(super) const fn score_buffers(&self) -> u32 {
        if self.is_wide() { 1 } else { 2 }
    }

    /// Bytes of a consumer's part of dQ.
    pub(super) const DQ_BYTES: u32 = DQ_ELEMENTS * size_of::<f32>() as u32;

    /// Offset of the consumers' parts of dQ, where each has keys of its own.
    pub(super) const fn dq(&self) -> u32 {
        self.ds() + self.score_buffers() * self.ds_bytes()
    }

    /// Offset of the stages of LSE.
    pub(super) const fn lse(&self) -> u32 {
        self.dq() + if self.is_wide() { 0 } else { CONSUMERS * Self::DQ_BYTES }
    }

    /// Offset of the stages of delta.
    pub(super) const fn delta(&self) -> u32 {
        self.lse() + STAGES * self.row_bytes()
    }

    /// Offset of the mbarriers.
    pub(super) const fn barriers(&self) -> u32 {
        self.delta() + STAGES * self.row_bytes()
    }

    /// Where the block's place is kept.
    pub(super) const fn place(&self) -> u32 {
        self.barriers() + Self::BARRIERS * Mbarrier::BYTES
    }

    /// Dynamic shared memory of a block in bytes.
    #[must_use]
    pub const fn shared_bytes(&self) -> u32 {
        self.place() + order::PLACE_BYTES
    }

    /// Bytes from the chunk of K that consumer 0 multiplies for dQ to that of consumer 1: they share
    /// the columns of dQ where there are two chunks.
    pub(super) const fn dq_column_chunk(&self) -> u32 {
        if self.d > CHUNK_COLUMNS { self.keys * CHUNK_ROW_BYTES } else { 0 }
    }

    /// Bytes from the chunk of dS that consumer 0 multiplies for dQ to that of consumer 1: they share
    /// the rows of dQ where there is one chunk of columns.
    pub(super) const fn dq_row_chunk(&self) -> u32 {
        if self.d > CHUNK_COLUMNS { 0 } else { self.keys * CHUNK_ROW_BYTES }
    }

    /// Parts of dQ of a tile, of 64 x 64 elements.
    #[must_use]
    pub const fn dq_parts(&self) -> u32 {
        self.rows * self.d / DQ_ELEMENTS
    }

    /// The first row and column of a part of dQ of a tile.
    pub(super) const fn dq_part(&self, part: u32) -> (u32, u32) {
        if self.d > CHUNK_COLUMNS { (0, part * CHUNK_COLUMNS) } else { (part * CHUNK_COLUMNS, 0) }
    }

    /// Extents of the boxes of the tensor maps of q and d_o, of k and v, and of minus_lse_log2 and delta,
    /// fastest dimension first. Swizzle: 128 bytes; none for the last.
    #[must_use]
    pub const fn boxes(&self) -> [[u32; 4]; 3] {
        [[CHUNK_COLUMNS, self.rows, 1, 1], [CHUNK_COLUMNS, self.keys, 1, 1], [self.rows, 1, 1, 1]]
    }
}
