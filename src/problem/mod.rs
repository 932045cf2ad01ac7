//! The attention to compute: shapes, storage type, masks, changes to scores. Every existing
//! [`Problem`] is valid; [`ProblemBuilder::build`] returns an error for a wrong one.

mod builder;
mod extras;
mod layout;
mod scores;
mod varlen;
mod window;

use kernels_gpu::{args, parts::dropout::threshold};

use crate::{dtype::DType, error::Error};

pub use builder::ProblemBuilder;
pub use extras::Extras;
pub use layout::Layout;
pub use scores::{Alibi, Bias, Dropout};
pub use varlen::{Sequence, Varlen};
pub use window::Window;

/// The largest head dim: a row of Q, K, V and O has to fit in the registers of a warp.
pub const MAX_HEAD_DIM: usize = 256;
/// The longest sequence: two lengths and a tile are added in 32 bits.
pub const MAX_SEQ: usize = (1 << 31) - 1 - 4096;
/// The most elements of a tensor or of the weights: sizes in bytes stay below 2^63.
pub const MAX_ELEMENTS: u64 = 1 << 60;

/// The largest score, `q · k * scale`, that every kernel supports (but `naive` and `standard` in
/// f16), 2^26. A row with a larger score may have NaN in O and LSE. `naive` and `standard` keep
/// scores in f16, up to 2^19. f32 rounds a score of 2^26 by 2, so its weights say no more than
/// which key is the first.
pub const MAX_SCORE: f32 = (1 << 26) as f32;
/// The largest softmax scale: elements of Q and K up to 1 have scores up to [`MAX_SCORE`] at
/// [`MAX_HEAD_DIM`].
pub const MAX_SCALE: f32 = MAX_SCORE / MAX_HEAD_DIM as f32;

/// An attention problem that has been checked.
///
/// ```
/// use flash_attention::{DType, Problem};
///
/// let problem = Problem::builder(4, 12, 512, 64).dtype(DType::F16).causal(true).build()?;
/// assert_eq!(problem.q_shape(), [4, 12, 512, 64]);
/// # Ok::<(), flash_attention::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Problem {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    seq_q: usize,
    seq_k: usize,
    head_dim: usize,
    head_dim_v: usize,
    dtype: DType,
    /// A right bound of 0 is a causal mask, whichever method set it.
    window: Window,
    mask: bool,
    dropout: Option<Dropout>,
    scale: Option<f32>,
    softcap: Option<f32>,
    alibi: Option<Alibi>,
    bias: Option<Bias>,
    sinks: bool,
    varlen: Option<Varlen>,
    layout: Layout,
}

impl Problem {
    /// Batch entries.
    #[must_use]
    pub const fn batch(&self) -> usize {
        self.batch
    }

    /// Heads of Q and O.
    #[must_use]
    pub const fn heads(&self) -> usize {
        self.heads
    }

    /// Heads of K and V.
    #[must_use]
    pub const fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Heads of Q that share one head of K and V: head `h` of Q uses head `h / group`.
    #[must_use]
    pub const fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Query rows of a head; for packed sequences, the longest sequence's rows.
    #[must_use]
    pub const fn seq_q(&self) -> usize {
        self.seq_q
    }

    /// Key and value rows of a head; for packed sequences, the longest sequence's rows.
    #[must_use]
    pub const fn seq_k(&self) -> usize {
        self.seq_k
    }

    /// Elements of a row of Q and K, D.
    #[must_use]
    pub const fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Elements of a row of V and O, Dv: D unless given.
    #[must_use]
    pub const fn head_dim_v(&self) -> usize {
        self.head_dim_v
    }

    /// Storage type of Q, K, V and O.
    #[must_use]
    pub const fn dtype(&self) -> DType {
        self.dtype
    }

    /// Whether rows see no key after their own position: a causal mask, or a window whose right
    /// bound is 0.
    #[must_use]
    pub const fn causal(&self) -> bool {
        matches!(self.window.right, Some(0))
    }

    /// The window, with a right bound of 0 for a causal mask.
    #[must_use]
    pub const fn window(&self) -> Window {
        self.window
    }

    /// The window for kernels: without bounds that hide no key at these lengths.
    #[must_use]
    pub const fn bounds(&self) -> Window {
        self.window.without_idle_bounds(self.seq_q, self.seq_k)
    }

    /// Whether there is a padding mask.
    #[must_use]
    pub const fn has_mask(&self) -> bool {
        self.mask
    }

    /// The dropout, or `None` for a probability of 0.
    #[must_use]
    pub fn dropout(&self) -> Option<Dropout> {
        self.dropout.filter(|d| d.p > 0.0)
    }

    /// The softmax scale; `1 / sqrt(D)` by default.
    #[must_use]
    pub fn scale(&self) -> f32 {
        self.scale.unwrap_or_else(|| (1.0 / (self.head_dim as f64).sqrt()) as f32)
    }

    /// The cap of scores, if there is one.
    #[must_use]
    pub const fn softcap(&self) -> Option<f32> {
        self.softcap
    }

    /// The shape of ALiBi's slopes, if there are any.
    #[must_use]
    pub const fn alibi(&self) -> Option<Alibi> {
        self.alibi
    }

    /// The dimensions that the additive bias has, if there is one.
    #[must_use]
    pub const fn bias(&self) -> Option<Bias> {
        self.bias
    }

    /// Whether each head has a sink.
    #[must_use]
    pub const fn has_sinks(&self) -> bool {
        self.sinks
    }

    /// The total rows of packed sequences, if the sequences are packed.
    #[must_use]
    pub const fn varlen(&self) -> Option<Varlen> {
        self.varlen
    }

    /// Order of the dimensions of Q, K, V and O: tokens first where sequences are packed.
    #[must_use]
    pub const fn layout(&self) -> Layout {
        self.layout
    }

    /// Batch entries and rows of Q and O in memory: packed sequences are one entry.
    const fn q_rows(&self) -> [usize; 2] {
        match self.varlen {
            Some(Varlen { total_q, .. }) => [1, total_q],
            None => [self.batch, self.seq_q],
        }
    }

    /// The same of K and V.
    const fn k_rows(&self) -> [usize; 2] {
        match self.varlen {
            Some(Varlen { total_k, .. }) => [1, total_k],
            None => [self.batch, self.seq_k],
        }
    }

    /// Extents `[B, H, N, D]` of Q in memory, whatever their order.
    pub(crate) const fn q_extents(&self) -> [usize; 4] {
        let [batch, rows] = self.q_rows();
        [batch, self.heads, rows, self.head_dim]
    }

    /// The same of K.
    pub(crate) const fn k_extents(&self) -> [usize; 4] {
        let [batch, rows] = self.k_rows();
        [batch, self.kv_heads, rows, self.head_dim]
    }

    /// The same of V, `[B, H, N, Dv]`.
    pub(crate) const fn v_extents(&self) -> [usize; 4] {
        let [batch, rows] = self.k_rows();
        [batch, self.kv_heads, rows, self.head_dim_v]
    }

    /// The same of O.
    pub(crate) const fn o_extents(&self) -> [usize; 4] {
        let [batch, rows] = self.q_rows();
        [batch, self.heads, rows, self.head_dim_v]
    }

    /// Shape of Q; of packed sequences, `[1, total_q, H, D]`.
    #[must_use]
    pub const fn q_shape(&self) -> [usize; 4] {
        let [batch, heads, rows, head_dim] = self.q_extents();
        self.layout.shape(batch, heads, rows, head_dim)
    }

    /// Shape of K; of packed sequences, `[1, total_k, Hkv, D]`.
    #[must_use]
    pub const fn k_shape(&self) -> [usize; 4] {
        let [batch, heads, rows, head_dim] = self.k_extents();
        self.layout.shape(batch, heads, rows, head_dim)
    }

    /// Shape of V; of packed sequences, `[1, total_k, Hkv, Dv]`.
    #[must_use]
    pub const fn v_shape(&self) -> [usize; 4] {
        let [batch, heads, rows, head_dim] = self.v_extents();
        self.layout.shape(batch, heads, rows, head_dim)
    }

    /// Shape of O; of packed sequences, `[1, total_q, H, Dv]`.
    #[must_use]
    pub const fn o_shape(&self) -> [usize; 4] {
        let [batch, heads, rows, head_dim] = self.o_extents();
        self.layout.shape(batch, heads, rows, head_dim)
    }

    /// Shape of the log-sum-exp: `[B, H, Nq]` in every layout; of packed sequences, `[1, H, total_q]`.
    #[must_use]
    pub const fn lse_shape(&self) -> [usize; 3] {
        let [batch, rows] = self.q_rows();
        [batch, self.heads, rows]
    }

    /// Shape of the attention weights: `[B, H, Nq, Nk]` in every layout. For packed sequences, the
    /// elements past a sequence's lengths are unspecified.
    #[must_use]
    pub const fn weights_shape(&self) -> [usize; 4] {
        [self.batch, self.heads, self.seq_q, self.seq_k]
    }

    /// Shape of the padding mask, u8 `[B, Nk]`, if there is one.
    #[must_use]
    pub fn mask_shape(&self) -> Option<Vec<usize>> {
        self.mask.then(|| vec![self.batch, self.seq_k])
    }

    /// Shape of ALiBi's slopes, f32 `[H]` or `[B, H]`, if there are any.
    #[must_use]
    pub fn alibi_shape(&self) -> Option<Vec<usize>> {
        self.alibi.map(|alibi| match alibi {
            Alibi::PerHead => vec![self.heads],
            Alibi::PerBatchAndHead => vec![self.batch, self.heads],
        })
    }

    /// Shape of the additive bias, `[B or 1, H or 1, Nq, Nk]` in the storage type, if there is one.
    #[must_use]
    pub fn bias_shape(&self) -> Option<Vec<usize>> {
        self.bias.map(|bias| {
            let batch = if bias.per_batch { self.batch } else { 1 };
            let heads = if bias.per_head { self.heads } else { 1 };
            vec![batch, heads, self.seq_q, self.seq_k]
        })
    }

    /// Shape of the sinks, f32 `[H]`, if there are any.
    #[must_use]
    pub fn sinks_shape(&self) -> Option<Vec<usize>> {
        self.sinks.then(|| vec![self.heads])
    }

    /// Elements of Q.
    #[must_use]
    pub const fn q_elements(&self) -> usize {
        let [batch, heads, rows, head_dim] = self.q_extents();
        batch * heads * rows * head_dim
    }

    /// Elements of K.
    #[must_use]
    pub const fn k_elements(&self) -> usize {
        let [batch, heads, rows, head_dim] = self.k_extents();
        batch * heads * rows * head_dim
    }

    /// Elements of V.
    #[must_use]
    pub const fn v_elements(&self) -> usize {
        let [batch, heads, rows, head_dim] = self.v_extents();
        batch * heads * rows * head_dim
    }

    /// Elements of O.
    #[must_use]
    pub const fn o_elements(&self) -> usize {
        self.rows() * self.head_dim_v
    }

    /// Query rows over all heads: elements of the log-sum-exp.
    #[must_use]
    pub const fn rows(&self) -> usize {
        let [batch, heads, rows, _] = self.q_extents();
        batch * heads * rows
    }

    /// Floating-point operations, as attention kernels are rated by convention:
    /// `2 * B * H * Nq * Nk * (D + Dv)` (a multiplication and an addition for each product of
    /// `Q Kᵀ` and of `P V`; the softmax is not counted), and half of that when causal, since half
    /// of a square matrix is hidden. The half is kept for `Nq != Nk` too. With any other window
    /// that hides something: `2 * (D + Dv)` for each row and key that it sees, counted exactly. The
    /// padding mask and -inf in a bias are not considered. Packed sequences count as if all were as
    /// long as the longest; [`flops_of`](Self::flops_of) takes their lengths.
    #[must_use]
    pub fn flops(&self) -> f64 {
        let pairs = self.pairs(self.seq_q, self.seq_k);
        self.flops_of_pairs((self.batch * self.heads) as f64 * pairs)
    }

    fn flops_of_pairs(&self, pairs: f64) -> f64 {
        2.0 * pairs * (self.head_dim + self.head_dim_v) as f64
    }

    /// Pairs of row and key of a head for which operations count.
    fn pairs(&self, seq_q: usize, seq_k: usize) -> f64 {
        let bounds = self.window.without_idle_bounds(seq_q, seq_k);
        match (bounds.left, self.causal()) {
            (None, true) => seq_q as f64 * seq_k as f64 / 2.0,
            _ => bounds.visible_pairs(seq_q, seq_k) as f64,
        }
    }

    /// Bytes of Q, K, V and the other inputs: padding mask, slopes, bias, sinks, and the start offsets of
    /// packed sequences.
    #[must_use]
    pub fn input_bytes(&self) -> u64 {
        let bytes = |shape: Option<Vec<usize>>, size: usize| {
            shape.map_or(0, |shape| shape.iter().product::<usize>() as u64 * size as u64)
        };
        let elements = (self.q_elements() + self.k_elements() + self.v_elements()) as u64;
        let f32_size = DType::F32.size();
        elements * self.dtype.size() as u64
            + bytes(self.mask_shape(), 1)
            + bytes(self.alibi_shape(), f32_size)
            + bytes(self.bias_shape(), self.dtype.size())
            + bytes(self.sinks_shape(), f32_size)
            + 2 * bytes(self.cu_seqlens_shape(), size_of::<u32>())
    }

    /// Bytes of O and the log-sum-exp.
    #[must_use]
    pub const fn output_bytes(&self) -> u64 {
        self.o_elements() as u64 * self.dtype.size() as u64 + self.rows() as u64 * 4
    }

    /// Bytes of the attention weights in the storage type, which the flash kernels save.
    #[must_use]
    pub const fn weights_bytes(&self) -> u64 {
        let [batch, heads, seq_q, seq_k] = self.weights_shape();
        (batch * heads * seq_q) as u64 * seq_k as u64 * self.dtype.size() as u64
    }

    /// The least bytes that can move between the GPU and its memory: every input read
    /// once, every output written once.
    #[must_use]
    pub fn ideal_io_bytes(&self) -> u64 {
        self.input_bytes() + self.output_bytes()
    }

    /// Whether row `i` sees key `j` by position; the padding mask is not considered.
    #[must_use]
    pub const fn sees(&self, i: usize, j: usize) -> bool {
        self.window.sees(i, j, self.seq_q, self.seq_k)
    }

    /// Dropout in the kernels' form; all zeros drop nothing.
    #[must_use]
    pub fn dropout_args(&self) -> args::DropoutArgs {
        self.dropout().map_or_else(args::DropoutArgs::default, |d| args::DropoutArgs {
            seed: d.seed,
            threshold: threshold(d.p),
            rescale: 1.0 / (1.0 - d.p),
        })
    }
}

/// The head dim of `heads` heads over `hidden` features.
///
/// # Errors
/// [`Error::HiddenNotDivisible`], or [`Error::InvalidValue`] for no heads.
pub fn head_dim_of(hidden: usize, heads: usize) -> Result<usize, Error> {
    if heads == 0 || hidden == 0 {
        let what = if heads == 0 { "heads" } else { "hidden" };
        return Err(Error::InvalidValue {
            what,
            given: "0".into(),
            remedy: "it must be at least 1".into(),
        });
    }
    if !hidden.is_multiple_of(heads) {
        return Err(Error::HiddenNotDivisible { hidden, heads });
    }
    Ok(hidden / heads)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_tensors() {
        let p = Problem::builder(2, 6, 5, 32).seq_k(7).dtype(DType::F16).mask(true);
        let p = p.causal(true).build().unwrap();
        assert_eq!(p.input_bytes(), 2 * 6 * (5 + 7 + 7) * 32 * 2 + 2 * 7);
        assert_eq!(p.output_bytes(), 2 * 6 * 5 * (32 * 2 + 4));
        assert_eq!(p.weights_bytes(), 2 * 6 * 5 * 7 * 2);
        assert_eq!(p.flops(), 2.0 * 2.0 * 6.0 * 5.0 * 7.0 * 32.0);
        assert!(p.sees(0, 2) && !p.sees(0, 3) && p.sees(4, 6));
        let p = p.to_builder().kv_heads(3).alibi(Some(Alibi::PerBatchAndHead)).sinks(true);
        let bias = Bias { per_batch: false, per_head: true };
        let p = p.bias(Some(bias)).window(Window { left: Some(1), right: None }).build().unwrap();
        assert_eq!((p.group(), p.q_shape()[1], p.k_shape()[1]), (2, 6, 3));
        assert_eq!(p.bias_shape().unwrap(), [1, 6, 5, 7]);
        let beside = 2 * 7 + 2 * 6 * 4 + 6 * 5 * 7 * 2 + 6 * 4;
        assert_eq!(p.input_bytes(), (2 * 6 * 5 + 2 * 3 * (7 + 7)) * 32 * 2 + beside);
        // Rows at keys 2 to 6 see two keys each.
        assert_eq!(p.flops(), 4.0 * 2.0 * 6.0 * 10.0 * 32.0);
        let p = p.to_builder().head_dim_v(8).build().unwrap();
        assert_eq!((p.q_shape()[3], p.k_shape()[3]), (32, 32));
        assert_eq!((p.v_shape(), p.o_shape()), ([2, 3, 7, 8], [2, 6, 5, 8]));
        assert_eq!(p.input_bytes(), ((2 * 6 * 5 + 2 * 3 * 7) * 32 + 2 * 3 * 7 * 8) * 2 + beside);
        assert_eq!(p.output_bytes(), 2 * 6 * 5 * (8 * 2 + 4));
        assert_eq!(p.flops(), 2.0 * 2.0 * 6.0 * 10.0 * (32.0 + 8.0));
    }

    #[test]
    fn a_window_that_hides_nothing_counts_as_none() {
        let p = Problem::builder(1, 1, 5, 32).seq_k(7);
        let full = p.build().unwrap();
        let idle = Window { left: Some(6), right: Some(4) };
        let p = p.window(idle).build().unwrap();
        assert_eq!((p.bounds(), p.window()), (Window::default(), idle));
        assert_eq!(p.flops(), full.flops());
        let causal = full.to_builder().causal(true).build().unwrap();
        let with_left = causal.to_builder().window(Window { left: Some(6), right: None });
        assert_eq!(with_left.build().unwrap().flops(), causal.flops());
    }
}
