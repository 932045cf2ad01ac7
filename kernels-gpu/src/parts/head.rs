//! Which head of which sequence a block works on, and where its rows lie. Rungs read lengths and
//! head numbers here. (To count tasks, `schedule.rs` and the queue of flash_hopper read extents.)

use simt::{compiler::opaque, memory::Memory, thread};

use crate::{
    args::{AttentionArgs, Tensor},
    backward,
    constants::Constants,
    parts::{gemm::Matrix, schedule, tile::Rows},
};

/// One head of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// Batch entry.
    pub b: u32,
    /// Head of Q and O.
    pub h: u32,
    /// Head of K and V.
    pub h_kv: u32,
    /// Query rows.
    pub seq_q: u32,
    /// Key and value rows.
    pub seq_k: u32,
    /// Heads of Q of a batch entry.
    heads: u32,
}

impl Head {
    /// Head `h` of batch entry `b`.
    #[inline(always)]
    #[must_use]
    pub fn new(args: &AttentionArgs, b: u32, h: u32) -> Self {
        Self {
            b,
            h,
            h_kv: h / Self::group(),
            seq_q: args.shape.seq_q,
            seq_k: args.shape.seq_k,
            heads: args.shape.heads,
        }
    }

    /// The head of that number, counted over the batch.
    #[inline(always)]
    #[must_use]
    pub fn at(args: &AttentionArgs, number: u32) -> Self {
        let (b, h) = schedule::divide(number, args.shape.heads);
        Self::new(args, b, h)
    }

    /// The head of this block, where the grid's `y` counts heads and `z` batch entries.
    #[inline(always)]
    #[must_use]
    pub fn of_block(args: &AttentionArgs) -> Self {
        Self::new(args, thread::block_idx_z(), thread::block_idx_y())
    }

    /// The head of this block, where the grid's `z` counts heads over the batch.
    #[inline(always)]
    #[must_use]
    pub fn of_block_z(args: &AttentionArgs) -> Self {
        Self::at(args, thread::block_idx_z())
    }

    /// Heads of Q that share one of K and V.
    #[inline(always)]
    #[must_use]
    pub fn group() -> u32 {
        Constants::group().max(1)
    }

    /// Head `member` of those that share head `number` of K and V, counted over the batch.
    #[inline(always)]
    #[must_use]
    pub fn of_group(args: &AttentionArgs, number: u32, member: u32) -> Self {
        let kv_heads = schedule::divide(args.shape.heads, Self::group()).0;
        let (b, h_kv) = schedule::divide(number, kv_heads);
        Self::new(args, b, h_kv * Self::group() + member)
    }

    /// Index of row `i` of what has [`padded`](crate::backward::padded) rows a head.
    #[inline(always)]
    #[must_use]
    pub const fn padded_row(&self, i: u32) -> u64 {
        let head = self.b as u64 * self.heads as u64 + self.h as u64;
        head * backward::padded(self.seq_q) as u64 + i as u64
    }

    /// Index of `lse[i]` of this head.
    #[inline(always)]
    #[must_use]
    pub const fn row(&self, i: u32) -> u64 {
        (self.b as u64 * self.heads as u64 + self.h as u64) * self.seq_q as u64 + i as u64
    }

    /// Index of `weights[i, j]` of this head.
    #[inline(always)]
    #[must_use]
    pub const fn weight(&self, i: u32, j: u32) -> u64 {
        self.row(i) * self.seq_k as u64 + j as u64
    }

    /// Index of row `i` of Q or O.
    #[inline(always)]
    #[must_use]
    pub const fn query(&self, tensor: &Tensor, i: u32) -> u64 {
        tensor.head(self.b, self.h) + i as u64 * tensor.stride_n
    }

    /// Index of row `j` of K or V.
    #[inline(always)]
    #[must_use]
    pub const fn key(&self, tensor: &Tensor, j: u32) -> u64 {
        tensor.head(self.b, self.h_kv) + j as u64 * tensor.stride_n
    }

    /// The rows of Q or O.
    ///
    /// # Safety
    /// As for [`Rows::new`].
    #[inline(always)]
    #[must_use]
    pub unsafe fn queries<T: Memory>(&self, tensor: &Tensor) -> Rows<T> {
        // SAFETY: passed on to the caller.
        unsafe { Rows::new(tensor, self.query(tensor, 0), self.seq_q) }
    }

    /// The rows of K or V.
    ///
    /// # Safety
    /// As for [`Rows::new`].
    #[inline(always)]
    #[must_use]
    pub unsafe fn keys<T: Memory>(&self, tensor: &Tensor) -> Rows<T> {
        // SAFETY: passed on to the caller.
        unsafe { Rows::new(tensor, self.key(tensor, 0), self.seq_k) }
    }

    /// Q or O as a matrix `[Nq, columns]`.
    ///
    /// # Safety
    /// As for [`Matrix::new`].
    #[inline(always)]
    #[must_use]
    pub unsafe fn query_matrix<T: Memory>(&self, tensor: &Tensor, columns: u32) -> Matrix<T> {
        let (first, rows) = (self.query(tensor, 0), self.seq_q);
        // SAFETY: passed on to the caller.
        unsafe { Matrix::new(&tensor.buffer, first, tensor.stride_n, rows, columns) }
    }

    /// K or V as a matrix `[Nk, columns]`.
    ///
    /// # Safety
    /// As for [`Matrix::new`].
    #[inline(always)]
    #[must_use]
    pub unsafe fn key_matrix<T: Memory>(&self, tensor: &Tensor, columns: u32) -> Matrix<T> {
        let (first, rows) = (self.key(tensor, 0), self.seq_k);
        // SAFETY: passed on to the caller.
        unsafe { Matrix::new(&tensor.buffer, first, tensor.stride_n, rows, columns) }
    }

    /// The weights as a matrix `[Nq, Nk]`.
    ///
    /// # Safety
    /// `args.scratch.weights` must be `[B, H, Nq, Nk]`.
    #[inline(always)]
    #[must_use]
    pub unsafe fn weight_matrix<T: Memory>(&self, args: &AttentionArgs) -> Matrix<T> {
        let (first, keys) = (self.weight(0, 0), self.seq_k);
        // SAFETY: `weights` is `[B, H, Nq, Nk]`.
        unsafe { Matrix::new(&args.scratch.weights, first, keys as u64, self.seq_q, keys) }
    }

    /// Index of key 0 of the padding mask, `[B, Nk]`. Opaque: computed where it is asked for.
    #[inline(always)]
    #[must_use]
    pub fn padding_row(&self) -> u64 {
        opaque(self.b) as u64 * self.seq_k as u64
    }
}
