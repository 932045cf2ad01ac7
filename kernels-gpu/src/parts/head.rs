//! Which head of which sequence a block works on, and where its rows lie. Rungs read lengths and
//! head numbers here. (To count tasks, `schedule.rs` and the queue of flash_hopper read extents.)
//!
//! Without `varlen` a batch entry is a sequence, and all have the lengths of the launch. With it
//! sequences are packed one after the other, and `cu_seqlens` says where each begins: a grid has tiles
//! for the longest one, and blocks whose tile lies past the end of their own leave.

use simt::{compiler::opaque, memory::Memory, thread};

use crate::{
    args::{AttentionArgs, Buffer, Tensor},
    backward,
    constants::Constants,
    parts::{gemm::Matrix, schedule, tile::Rows},
};

/// One head of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// Batch entry: the sequence.
    pub b: u32,
    /// Head of Q and O.
    pub h: u32,
    /// Head of K and V.
    pub h_kv: u32,
    /// Query rows.
    pub seq_q: u32,
    /// Key and value rows.
    pub seq_k: u32,
    /// Its first row among the rows of packed sequences in Q and O; else 0.
    pub first_q: u32,
    /// The same in K and V.
    pub first_k: u32,
    /// Heads of Q of a batch entry.
    heads: u32,
    /// Query rows over all packed sequences.
    total_q: u32,
    /// Rows and keys of the weights of a head: lengths of the longest sequence.
    weights: [u32; 2],
}

/// The first row of batch entry `b`, and how many it has: of a packed sequence, or 0 and `rows`.
#[inline(always)]
fn sequence(cu_seqlens: &Buffer, b: u32, rows: u32) -> (u32, u32) {
    // SAFETY: with `varlen` the launch has `[B + 1]` numbers, and `b` is less than B.
    let cu_seqlens = unsafe { cu_seqlens.view::<u32>() };
    let read = |at: u32, otherwise| cu_seqlens.read_if(Head::is_packed(), at as u64, otherwise);
    let (first, end) = (read(b, 0), read(b + 1, rows));
    // Less 0 it is unchanged: the compiler knows that of no other function of both.
    (first, end.wrapping_sub(first))
}

impl Head {
    /// Head `h` of batch entry `b`.
    #[inline(always)]
    #[must_use]
    pub fn new(args: &AttentionArgs, b: u32, h: u32) -> Self {
        let shape = &args.shape;
        let (first_q, seq_q) = sequence(&args.sequences.cu_seqlens_q, b, shape.seq_q);
        let (first_k, seq_k) = sequence(&args.sequences.cu_seqlens_k, b, shape.seq_k);
        Self {
            b,
            h,
            h_kv: h / Self::group(),
            seq_q,
            seq_k,
            first_q,
            first_k,
            heads: shape.heads,
            total_q: shape.total_q,
            weights: [shape.seq_q, shape.seq_k],
        }
    }

    /// Whether sequences are packed one after the other, each with lengths of its own.
    #[inline(always)]
    #[must_use]
    pub fn is_packed() -> bool {
        Constants::varlen() != 0
    }

    /// Whether the sequence has ended before row `i`, which the longest one has: a block without
    /// rows leaves before its first barrier.
    #[inline(always)]
    #[must_use]
    pub fn ends_before(&self, i: u32) -> bool {
        Self::is_packed() && i >= self.seq_q
    }

    /// The head of that number, counted over the batch.
    #[inline(always)]
    #[must_use]
    pub fn at(args: &AttentionArgs, number: u32) -> Self {
        let (b, h) = schedule::divide(number, args.shape.heads);
        Self::new(args, b, h)
    }

    /// The head of this block and its tile, where the grid's `x` counts the `tiles` tiles of a head,
    /// head after head. (`y` and `z` end at 65,535.)
    #[inline(always)]
    #[must_use]
    pub fn of_block(args: &AttentionArgs, tiles: u32) -> (Self, u32) {
        let (number, tile) = schedule::divide(thread::block_idx_x(), tiles);
        (Self::at(args, number), tile)
    }

    /// The number of this block's head of Q, or of K, counted over the batch, where the grid's `y` and
    /// `z` count heads: `z` goes on where `y` ends. Needs no division and no register. The last few may
    /// be of no head.
    #[inline(always)]
    #[must_use]
    pub fn number_of_block() -> u32 {
        thread::block_idx_z() * thread::grid_dim_y() + thread::block_idx_y()
    }

    /// The head of Q of this block, where the grid's `y` and `z` count heads of Q.
    #[inline(always)]
    #[must_use]
    pub fn of_block_yz(args: &AttentionArgs) -> Option<Self> {
        let number = Self::number_of_block();
        (number < args.shape.batch * args.shape.heads).then(|| Self::at(args, number))
    }

    /// The first of the heads of Q that share this block's head of K, where the grid's `y` and `z` count
    /// heads of K.
    #[inline(always)]
    #[must_use]
    pub fn of_kv_block_yz(args: &AttentionArgs) -> Option<Self> {
        Self::of_kv_number(args, Self::number_of_block())
    }

    /// The first of the heads of Q that share head `number` of K, counted over the batch, if there is
    /// one.
    #[inline(always)]
    #[must_use]
    pub fn of_kv_number(args: &AttentionArgs, number: u32) -> Option<Self> {
        let kv_heads = args.shape.batch * schedule::divide(args.shape.heads, Self::group()).0;
        (number < kv_heads).then(|| Self::of_group(args, number, 0))
    }

    /// Heads of Q that share one of K and V.
    #[inline(always)]
    #[must_use]
    pub fn group() -> u32 {
        Constants::group().max(1)
    }

    /// Head `member` of the heads that share head `number` of K and V, counted over the batch.
    #[inline(always)]
    #[must_use]
    pub fn of_group(args: &AttentionArgs, number: u32, member: u32) -> Self {
        let kv_heads = schedule::divide(args.shape.heads, Self::group()).0;
        let (b, h_kv) = schedule::divide(number, kv_heads);
        Self::new(args, b, h_kv * Self::group() + member)
    }

    /// Whether the sequence has ended before key `j`, which the longest one has.
    #[inline(always)]
    #[must_use]
    pub fn keys_end_before(&self, j: u32) -> bool {
        Self::is_packed() && j >= self.seq_k
    }

    /// Index of row `i` of what has [`padded`](crate::backward::padded) rows per head.
    #[inline(always)]
    #[must_use]
    pub const fn padded_row(&self, i: u32) -> u64 {
        let head = self.b as u64 * self.heads as u64 + self.h as u64;
        head * backward::padded(self.weights[0]) as u64 + i as u64
    }

    /// Index of `lse[i]` of this head.
    #[inline(always)]
    #[must_use]
    pub fn row(&self, i: u32) -> u64 {
        let (b, h) = (self.b as u64, self.h as u64);
        let first = if Self::is_packed() {
            h * self.total_q as u64 + self.first_q as u64
        } else {
            (b * self.heads as u64 + h) * self.seq_q as u64
        };
        first + i as u64
    }

    /// Index of `weights[i, j]` of this head.
    #[inline(always)]
    #[must_use]
    pub const fn weight(&self, i: u32, j: u32) -> u64 {
        let [rows, keys] = self.weights;
        let head = self.b as u64 * self.heads as u64 + self.h as u64;
        (head * rows as u64 + i as u64) * keys as u64 + j as u64
    }

    /// Index of row `i` of Q or O.
    #[inline(always)]
    #[must_use]
    pub const fn query(&self, tensor: &Tensor, i: u32) -> u64 {
        let first = self.first_q as u64 * tensor.stride_n;
        tensor.head(self.b, self.h) + first + i as u64 * tensor.stride_n
    }

    /// Index of row `j` of K or V.
    #[inline(always)]
    #[must_use]
    pub const fn key(&self, tensor: &Tensor, j: u32) -> u64 {
        let first = self.first_k as u64 * tensor.stride_n;
        tensor.head(self.b, self.h_kv) + first + j as u64 * tensor.stride_n
    }

    /// The rows of Q or O.
    ///
    /// # Safety
    /// As for [`Rows::new`].
    #[inline(always)]
    #[must_use]
    pub unsafe fn queries<T: Memory>(&self, tensor: &Tensor) -> Rows<T> {
        // SAFETY: the tensor holds this head's rows of Q, as stated above.
        unsafe { Rows::new(tensor, self.query(tensor, 0), self.seq_q) }
    }

    /// The rows of K or V.
    ///
    /// # Safety
    /// As for [`Rows::new`].
    #[inline(always)]
    #[must_use]
    pub unsafe fn keys<T: Memory>(&self, tensor: &Tensor) -> Rows<T> {
        // SAFETY: the tensor holds this head's keys, as stated above.
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
        // SAFETY: the tensor holds this head's rows, as stated above.
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
        // SAFETY: the tensor holds this head's rows, as stated above.
        unsafe { Matrix::new(&tensor.buffer, first, tensor.stride_n, rows, columns) }
    }

    /// The weights as a matrix `[Nq, Nk]`.
    ///
    /// # Safety
    /// `args.scratch.weights` must be `[B, H, Nq, Nk]`.
    #[inline(always)]
    #[must_use]
    pub unsafe fn weight_matrix<T: Memory>(&self, args: &AttentionArgs) -> Matrix<T> {
        // SAFETY: `weights` is `[B, H, Nq, Nk]`.
        unsafe { self.score_matrix(&args.scratch.weights) }
    }

    /// A tensor with one element per row and key, as a matrix `[Nq, Nk]`.
    ///
    /// # Safety
    /// The buffer must be `[B, H, Nq, Nk]`.
    #[inline(always)]
    #[must_use]
    pub unsafe fn score_matrix<T: Memory>(&self, buffer: &Buffer) -> Matrix<T> {
        let (first, stride) = (self.weight(0, 0), self.weights[1] as u64);
        // SAFETY: the buffer is `[B, H, Nq, Nk]`.
        unsafe { Matrix::new(buffer, first, stride, self.seq_q, self.seq_k) }
    }

    /// Index of key 0 of the padding mask, `[B, Nk]`. Opaque: computed where it is asked for.
    #[inline(always)]
    #[must_use]
    pub fn padding_row(&self) -> u64 {
        opaque(self.b) as u64 * self.seq_k as u64
    }
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use simt::{
        emulator::{self, Launch, Options},
        global::GlobalMut,
    };

    use super::*;
    use crate::args::Shape;

    /// Heads beyond what a grid's `y` and `z` count, over batch entries and over heads.
    #[test]
    fn blocks_find_their_heads_beyond_65535() {
        const TILES: u32 = 2;
        for (batch, heads) in [(70_000, 1), (1, 70_000), (300, 300)] {
            let shape = Shape { batch, heads, ..Shape::default() };
            let args = AttentionArgs { shape, ..AttentionArgs::default() };
            let blocks = batch * heads * TILES;
            let mut found = vec![[u32::MAX; 4]; blocks as usize];
            // SAFETY: each block writes its own element, and the vector outlives the launch.
            let out: GlobalMut<[u32; 4]> =
                unsafe { GlobalMut::new(found.as_mut_ptr() as u64, blocks.into()) };
            let launch =
                Launch { grid: blocks.into(), block: 1.into(), cluster: 1, shared_bytes: 0 };
            let kernel = || {
                let (head, tile) = Head::of_block(&args, TILES);
                out.write(thread::block_idx_x().into(), [head.b, head.h, tile, 0]);
            };
            emulator::launch_with(launch, &Options::default(), &kernel)
                .unwrap_or_else(|fault| panic!("{fault}"));
            let heads = (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h)));
            let expected = heads.flat_map(|(b, h)| (0..TILES).map(move |tile| [b, h, tile, 0]));
            assert!(std::hint::black_box(&found).iter().copied().eq(expected), "{batch}");
        }
    }
}
