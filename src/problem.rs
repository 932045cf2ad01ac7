//! What is to be computed: shapes, storage type, masks, dropout, scale. A [`Problem`] is
//! valid once it exists; [`ProblemBuilder::build`] says what is wrong otherwise.

use kernels_gpu::{args, parts::dropout::threshold};

use crate::{dtype::DType, error::Error};

/// The largest head dim: a row of Q, K, V and O has to fit in the registers of a warp.
pub const MAX_HEAD_DIM: usize = 256;
/// The longest sequence: two lengths and a tile are added in 32 bits.
pub const MAX_SEQ: usize = (1 << 31) - 1 - 4096;
/// The most elements of a tensor or of the weights: sizes in bytes stay below 2^63.
pub const MAX_ELEMENTS: u64 = 1 << 60;

/// The largest score, `q · k * scale`, that every kernel but `naive` and `standard` in f16 computes
/// with, 2^26: a row with a larger one may be NaN, O and LSE. Those two keep scores in f16, up to
/// 2^19. f32 rounds a score of 2^26 by 2: to weights it says no more than which key is the first.
pub const MAX_SCORE: f32 = (1 << 26) as f32;
/// The largest softmax scale: elements of Q and K up to 1 have scores up to [`MAX_SCORE`] at
/// [`MAX_HEAD_DIM`].
pub const MAX_SCALE: f32 = MAX_SCORE / MAX_HEAD_DIM as f32;

/// Order of a tensor's dimensions in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Layout {
    /// `[B, H, N, D]`: the rows of a head are neighbours.
    #[default]
    HeadsFirst,
    /// `[B, N, H, D]`: as a projection writes it, the heads of a token are neighbours.
    TokensFirst,
}

impl Layout {
    /// The dimensions of a tensor of this layout.
    #[must_use]
    pub const fn shape(
        self,
        batch: usize,
        heads: usize,
        seq: usize,
        head_dim: usize,
    ) -> [usize; 4] {
        match self {
            Self::HeadsFirst => [batch, heads, seq, head_dim],
            Self::TokensFirst => [batch, seq, heads, head_dim],
        }
    }

    /// Elements from one batch entry, head and row to the next.
    #[must_use]
    pub const fn strides(self, heads: usize, seq: usize, head_dim: usize) -> [usize; 3] {
        match self {
            Self::HeadsFirst => [heads * seq * head_dim, seq * head_dim, head_dim],
            Self::TokensFirst => [seq * heads * head_dim, head_dim, heads * head_dim],
        }
    }
}

/// Dropout of attention weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability that a weight is dropped, in `[0, 1)`.
    pub p: f32,
    /// Key of the generator: the same seed drops the same weights in every kernel.
    pub seed: u64,
}

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
    seq_q: usize,
    seq_k: usize,
    head_dim: usize,
    dtype: DType,
    causal: bool,
    mask: bool,
    dropout: Option<Dropout>,
    scale: Option<f32>,
    layout: Layout,
}

/// Collects what a [`Problem`] is made of.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct ProblemBuilder(Problem);

impl ProblemBuilder {
    /// Keys per head, where it is not the number of queries.
    pub const fn seq_k(mut self, seq_k: usize) -> Self {
        self.0.seq_k = seq_k;
        self
    }

    /// Storage type of Q, K, V and O; f32 unless given.
    pub const fn dtype(mut self, dtype: DType) -> Self {
        self.0.dtype = dtype;
        self
    }

    /// Whether row `i` sees the keys `j <= i + Nk - Nq` only.
    pub const fn causal(mut self, causal: bool) -> Self {
        self.0.causal = causal;
        self
    }

    /// Whether there is a padding mask, u8 `[B, Nk]`, 0 = hidden.
    pub const fn mask(mut self, mask: bool) -> Self {
        self.0.mask = mask;
        self
    }

    /// Dropout of weights; a probability of 0 is the same as none.
    pub const fn dropout(mut self, dropout: Option<Dropout>) -> Self {
        self.0.dropout = dropout;
        self
    }

    /// Softmax scale, where it is not `1 / sqrt(D)`: above 0, at most [`MAX_SCALE`]. One that is
    /// subnormal in f32 makes all keys equal.
    pub const fn scale(mut self, scale: Option<f32>) -> Self {
        self.0.scale = scale;
        self
    }

    /// Order of the dimensions of Q, K, V and O.
    pub const fn layout(mut self, layout: Layout) -> Self {
        self.0.layout = layout;
        self
    }

    /// Checks everything.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] for a size of zero, a head dim beyond [`MAX_HEAD_DIM`], a
    /// probability outside `[0, 1)` or a scale outside `(0, `[`MAX_SCALE`]`]`;
    /// [`Error::TooLarge`] for tensors that cannot be addressed.
    pub fn build(self) -> Result<Problem, Error> {
        let p = self.0;
        for (what, value) in [
            ("batch", p.batch),
            ("heads", p.heads),
            ("sequence length of the queries", p.seq_q),
            ("sequence length of the keys", p.seq_k),
            ("head dim", p.head_dim),
        ] {
            let most = if what == "head dim" { MAX_HEAD_DIM } else { MAX_SEQ };
            if value == 0 || value > most {
                return Err(Error::InvalidValue {
                    what,
                    given: value.to_string(),
                    remedy: format!("it must be from 1 to {most}"),
                });
            }
        }
        if let Some(Dropout { p: probability, .. }) = p.dropout
            && !(0.0..1.0).contains(&probability)
        {
            return Err(Error::InvalidValue {
                what: "dropout",
                given: probability.to_string(),
                remedy: "it must be at least 0 and below 1".into(),
            });
        }
        if let Some(scale) = p.scale
            && !(scale > 0.0 && scale <= MAX_SCALE)
        {
            return Err(Error::InvalidValue {
                what: "scale",
                given: scale.to_string(),
                remedy: format!(
                    "it must be above 0 and at most {MAX_SCALE}; 1/sqrt(head dim) is usual"
                ),
            });
        }
        for (what, shape) in [
            ("q", p.q_shape().to_vec()),
            ("k", p.k_shape().to_vec()),
            ("the attention weights", vec![p.batch, p.heads, p.seq_q, p.seq_k]),
        ] {
            let elements = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64));
            if elements.is_none_or(|n| n > MAX_ELEMENTS) {
                return Err(Error::TooLarge {
                    what,
                    shape: shape.as_slice().into(),
                    limit: MAX_ELEMENTS,
                });
            }
        }
        Ok(p)
    }
}

impl Problem {
    /// Starts a problem with as many keys as queries, in f32, without masks or dropout.
    pub const fn builder(
        batch: usize,
        heads: usize,
        seq: usize,
        head_dim: usize,
    ) -> ProblemBuilder {
        ProblemBuilder(Self {
            batch,
            heads,
            seq_q: seq,
            seq_k: seq,
            head_dim,
            dtype: DType::F32,
            causal: false,
            mask: false,
            dropout: None,
            scale: None,
            layout: Layout::HeadsFirst,
        })
    }

    /// Goes back to the builder, to make a problem that differs in some values.
    pub const fn to_builder(self) -> ProblemBuilder {
        ProblemBuilder(self)
    }

    /// Batch entries.
    #[must_use]
    pub const fn batch(&self) -> usize {
        self.batch
    }

    /// Heads.
    #[must_use]
    pub const fn heads(&self) -> usize {
        self.heads
    }

    /// Query rows of a head.
    #[must_use]
    pub const fn seq_q(&self) -> usize {
        self.seq_q
    }

    /// Key and value rows of a head.
    #[must_use]
    pub const fn seq_k(&self) -> usize {
        self.seq_k
    }

    /// Elements of a row.
    #[must_use]
    pub const fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Storage type of Q, K, V and O.
    #[must_use]
    pub const fn dtype(&self) -> DType {
        self.dtype
    }

    /// Whether rows see the keys up to their own position only.
    #[must_use]
    pub const fn causal(&self) -> bool {
        self.causal
    }

    /// Whether there is a padding mask.
    #[must_use]
    pub const fn has_mask(&self) -> bool {
        self.mask
    }

    /// Dropout that drops something: none for a probability of 0.
    #[must_use]
    pub fn dropout(&self) -> Option<Dropout> {
        self.dropout.filter(|d| d.p > 0.0)
    }

    /// The softmax scale: `1 / sqrt(D)` unless another was given.
    #[must_use]
    pub fn scale(&self) -> f32 {
        self.scale.unwrap_or_else(|| (1.0 / (self.head_dim as f64).sqrt()) as f32)
    }

    /// Order of the dimensions of Q, K, V and O.
    #[must_use]
    pub const fn layout(&self) -> Layout {
        self.layout
    }

    /// Shape of Q and O.
    #[must_use]
    pub const fn q_shape(&self) -> [usize; 4] {
        self.layout.shape(self.batch, self.heads, self.seq_q, self.head_dim)
    }

    /// Shape of K and V.
    #[must_use]
    pub const fn k_shape(&self) -> [usize; 4] {
        self.layout.shape(self.batch, self.heads, self.seq_k, self.head_dim)
    }

    /// Shape of the log-sum-exp: `[B, H, Nq]` in every layout.
    #[must_use]
    pub const fn lse_shape(&self) -> [usize; 3] {
        [self.batch, self.heads, self.seq_q]
    }

    /// Shape of the attention weights: `[B, H, Nq, Nk]` in every layout.
    #[must_use]
    pub const fn weights_shape(&self) -> [usize; 4] {
        [self.batch, self.heads, self.seq_q, self.seq_k]
    }

    /// Elements of Q or O.
    #[must_use]
    pub const fn q_elements(&self) -> usize {
        self.batch * self.heads * self.seq_q * self.head_dim
    }

    /// Elements of K or V.
    #[must_use]
    pub const fn k_elements(&self) -> usize {
        self.batch * self.heads * self.seq_k * self.head_dim
    }

    /// Query rows over all heads: elements of the log-sum-exp.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.batch * self.heads * self.seq_q
    }

    /// Floating-point operations, as attention kernels are rated by convention:
    /// `4 * B * H * Nq * Nk * D` (a multiplication and an addition for each product of
    /// `Q Kᵀ` and of `P V`; the softmax is not counted), and half of that when causal,
    /// since half of a square matrix is hidden. The half is kept for `Nq != Nk` too.
    #[must_use]
    pub fn flops(&self) -> f64 {
        let full = 4.0 * self.rows() as f64 * self.seq_k as f64 * self.head_dim as f64;
        if self.causal { full / 2.0 } else { full }
    }

    /// Bytes of Q, K, V and the padding mask.
    #[must_use]
    pub const fn input_bytes(&self) -> u64 {
        let elements = self.q_elements() as u64 + 2 * self.k_elements() as u64;
        let mask = if self.mask { self.batch as u64 * self.seq_k as u64 } else { 0 };
        elements * self.dtype.size() as u64 + mask
    }

    /// Bytes of O and the log-sum-exp.
    #[must_use]
    pub const fn output_bytes(&self) -> u64 {
        self.q_elements() as u64 * self.dtype.size() as u64 + self.rows() as u64 * 4
    }

    /// Bytes of the attention weights in the storage type: what the flash kernels do
    /// without.
    #[must_use]
    pub const fn weights_bytes(&self) -> u64 {
        self.rows() as u64 * self.seq_k as u64 * self.dtype.size() as u64
    }

    /// The least bytes that can move between the GPU and its memory: every input read
    /// once, every output written once.
    #[must_use]
    pub const fn ideal_io_bytes(&self) -> u64 {
        self.input_bytes() + self.output_bytes()
    }

    /// Whether row `i` sees key `j` by position; the padding mask is not considered.
    #[must_use]
    pub const fn sees(&self, i: usize, j: usize) -> bool {
        !self.causal || j + self.seq_q <= i + self.seq_k
    }

    /// Dropout as kernels are given it; all zeros drop nothing.
    #[must_use]
    pub fn dropout_args(&self) -> args::DropoutArgs {
        self.dropout().map_or_else(args::DropoutArgs::default, |d| args::DropoutArgs {
            seed: d.seed,
            threshold: threshold(d.p),
            rescale: 1.0 / (1.0 - d.p),
        })
    }

    /// Q or O in device memory, as kernels are given it.
    #[must_use]
    pub const fn q_arg(&self, buffer: args::Buffer) -> args::Tensor {
        self.tensor_arg(buffer, self.seq_q)
    }

    /// K or V in device memory, as kernels are given it.
    #[must_use]
    pub const fn k_arg(&self, buffer: args::Buffer) -> args::Tensor {
        self.tensor_arg(buffer, self.seq_k)
    }

    const fn tensor_arg(&self, buffer: args::Buffer, seq: usize) -> args::Tensor {
        let [b, h, n] = self.layout.strides(self.heads, seq, self.head_dim);
        args::Tensor { buffer, stride_b: b as u64, stride_h: h as u64, stride_n: n as u64 }
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

    fn message(builder: ProblemBuilder) -> String {
        let error = builder.build().unwrap_err();
        assert!(error.is_usage());
        error.to_string()
    }

    #[test]
    fn impossible_values_are_named() {
        let good = Problem::builder(2, 3, 128, 64);
        assert!(good.build().is_ok());
        assert!(message(Problem::builder(2, 3, 0, 64)).contains("queries = 0"));
        assert!(message(good.seq_k(0)).contains("keys = 0"));
        assert!(message(Problem::builder(2, 3, 8, 257)).contains("head dim = 257"));
        let dropout = |p| good.dropout(Some(Dropout { p, seed: 1 }));
        assert!(message(dropout(1.0)).contains("dropout = 1"));
        assert!(message(dropout(-0.1)).contains("dropout = -0.1"));
        assert!(message(dropout(f32::NAN)).contains("dropout = NaN"));
        let above = f32::from_bits(MAX_SCALE.to_bits() + 1);
        for bad in [0.0, -0.125, -1e-40, f32::NAN, f32::INFINITY, 1e38, above] {
            let message = message(good.scale(Some(bad)));
            assert!(
                message.contains("scale = ") && message.contains("at most 262144"),
                "{message}"
            );
        }
        for scale in [MAX_SCALE, 1.0, f32::MIN_POSITIVE, 1e-40] {
            assert_eq!(good.scale(Some(scale)).build().unwrap().scale(), scale);
        }
        let huge = Problem::builder(1 << 30, 1 << 30, 1 << 30, 64);
        assert!(message(huge).contains("too many elements"));
        assert!(message(Problem::builder(1, 8, 1 << 30, 64).seq_k(1 << 30)).contains("weights"));
        assert!(matches!(
            head_dim_of(770, 12),
            Err(Error::HiddenNotDivisible { hidden: 770, heads: 12 })
        ));
        assert!(head_dim_of(768, 0).is_err());
    }

    #[test]
    fn sizes_are_those_of_the_tensors() {
        let p = Problem::builder(2, 3, 5, 32).seq_k(7).dtype(DType::F16).mask(true);
        let p = p.causal(true).build().unwrap();
        assert_eq!(p.input_bytes(), 2 * 3 * (5 + 7 + 7) * 32 * 2 + 2 * 7);
        assert_eq!(p.output_bytes(), 2 * 3 * 5 * (32 * 2 + 4));
        assert_eq!(p.weights_bytes(), 2 * 3 * 5 * 7 * 2);
        assert_eq!(p.flops(), 2.0 * 2.0 * 3.0 * 5.0 * 7.0 * 32.0);
        assert!(p.sees(0, 2) && !p.sees(0, 3) && p.sees(4, 6));
    }
}
