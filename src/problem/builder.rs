//! Collects the values of a problem, and checks them.

use super::{
    Alibi, Bias, Dropout, Layout, MAX_ELEMENTS, MAX_HEAD_DIM, MAX_SCALE, MAX_SCORE, MAX_SEQ,
    Problem, Varlen, Window,
};
use crate::{dtype::DType, error::Error};

/// Collects the values of a [`Problem`].
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct ProblemBuilder {
    problem: Problem,
    causal: bool,
}

impl Problem {
    /// Starts a problem with as many keys as queries, in f32, without masks or dropout.
    pub const fn builder(
        batch: usize,
        heads: usize,
        seq: usize,
        head_dim: usize,
    ) -> ProblemBuilder {
        let problem = Self {
            batch,
            heads,
            kv_heads: heads,
            seq_q: seq,
            seq_k: seq,
            head_dim,
            head_dim_v: head_dim,
            dtype: DType::F32,
            window: Window { left: None, right: None },
            mask: false,
            dropout: None,
            scale: None,
            softcap: None,
            alibi: None,
            bias: None,
            sinks: false,
            varlen: None,
            layout: Layout::HeadsFirst,
        };
        ProblemBuilder { problem, causal: false }
    }

    /// Returns to the builder, to make a problem that differs in some values.
    pub const fn to_builder(self) -> ProblemBuilder {
        let causal = self.causal();
        let mut problem = self;
        if causal {
            // The builder keeps it apart, so that it can be taken back.
            problem.window.right = None;
        }
        ProblemBuilder { problem, causal }
    }
}

impl ProblemBuilder {
    /// Keys per head, where their number differs from the number of queries.
    pub const fn seq_k(mut self, seq_k: usize) -> Self {
        self.problem.seq_k = seq_k;
        self
    }

    /// Heads of K and V, where there are fewer than heads of Q: the number of heads of Q is a
    /// multiple of this number.
    pub const fn kv_heads(mut self, kv_heads: usize) -> Self {
        self.problem.kv_heads = kv_heads;
        self
    }

    /// Elements of a row of V and O, where their number differs from Q's and K's.
    pub const fn head_dim_v(mut self, head_dim_v: usize) -> Self {
        self.problem.head_dim_v = head_dim_v;
        self
    }

    /// Storage type of Q, K, V and O; f32 unless given.
    pub const fn dtype(mut self, dtype: DType) -> Self {
        self.problem.dtype = dtype;
        self
    }

    /// Whether row `i` sees only the keys `j <= i + Nk - Nq`: a right bound of 0, whatever the
    /// window's right bound.
    pub const fn causal(mut self, causal: bool) -> Self {
        self.causal = causal;
        self
    }

    /// The window: how far before and after its own position a row sees keys.
    pub const fn window(mut self, window: Window) -> Self {
        self.problem.window = window;
        self
    }

    /// Whether there is a padding mask, u8 `[B, Nk]`, 0 = hidden.
    pub const fn mask(mut self, mask: bool) -> Self {
        self.problem.mask = mask;
        self
    }

    /// Dropout of weights; a probability of 0 is the same as none.
    pub const fn dropout(mut self, dropout: Option<Dropout>) -> Self {
        self.problem.dropout = dropout;
        self
    }

    /// Softmax scale, where it is not `1 / sqrt(D)`: above 0, at most [`MAX_SCALE`]. A scale that
    /// is subnormal in f32 gives all keys equal scores.
    pub const fn scale(mut self, scale: Option<f32>) -> Self {
        self.problem.scale = scale;
        self
    }

    /// The cap `c` of scores: `c * tanh(s / c)` replaces `s`, before ALiBi, bias and masks. Above
    /// 0, at most [`MAX_SCORE`].
    pub const fn softcap(mut self, softcap: Option<f32>) -> Self {
        self.problem.softcap = softcap;
        self
    }

    /// ALiBi: `-slope * |i + Nk - Nq - j|` joins the scaled and capped score.
    pub const fn alibi(mut self, alibi: Option<Alibi>) -> Self {
        self.problem.alibi = alibi;
        self
    }

    /// A matrix that joins the scaled and capped scores.
    pub const fn bias(mut self, bias: Option<Bias>) -> Self {
        self.problem.bias = bias;
        self
    }

    /// Whether each head has a sink, f32 `[H]`: a score that joins the sum of exponentials and the
    /// LSE of every row, and has no value; -inf means no sink. A row that sees no key has O = 0 and
    /// the sink as its LSE.
    pub const fn sinks(mut self, sinks: bool) -> Self {
        self.problem.sinks = sinks;
        self
    }

    /// Packs sequences of different lengths. The problem's lengths are the longest sequence's
    /// lengths, and the layout is tokens first. [`Problem::packed`] sets all of these.
    pub const fn varlen(mut self, varlen: Option<Varlen>) -> Self {
        self.problem.varlen = varlen;
        self
    }

    /// Order of the dimensions of Q, K, V and O.
    pub const fn layout(mut self, layout: Layout) -> Self {
        self.problem.layout = layout;
        self
    }

    /// Checks everything.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] for a size of zero (keys may be none), a head dim beyond [`MAX_HEAD_DIM`], heads that
    /// are no multiple of the heads of K and V, a probability outside `[0, 1)`, a scale outside
    /// `(0, `[`MAX_SCALE`]`]` or a cap outside `(0, `[`MAX_SCORE`]`]`; for packed sequences with a padding
    /// mask or a bias;
    /// [`Error::TooLarge`] for tensors that cannot be addressed.
    pub fn build(self) -> Result<Problem, Error> {
        let mut p = self.problem;
        if self.causal {
            p.window.right = Some(0);
        }
        if p.dtype == DType::E4M3 {
            return Err(Error::InvalidValue {
                what: "storage type",
                given: p.dtype.to_string(),
                remedy: "it must be f32, f16 or bf16; the cache of a decode may be in e4m3".into(),
            });
        }
        if let Some(varlen) = p.varlen {
            p.layout = Layout::TokensFirst;
            check_packed(&p, varlen)?;
        }
        for (what, value) in [
            ("batch", p.batch),
            ("heads", p.heads),
            ("heads of K and V", p.kv_heads),
            ("sequence length of the queries", p.seq_q),
            ("sequence length of the keys", p.seq_k),
            ("head dim", p.head_dim),
            ("head dim of the values", p.head_dim_v),
        ] {
            let most = if what.starts_with("head dim") { MAX_HEAD_DIM } else { MAX_SEQ };
            let least = usize::from(what != "sequence length of the keys");
            if value < least || value > most {
                return Err(Error::InvalidValue {
                    what,
                    given: value.to_string(),
                    remedy: format!("it must be from {least} to {most}"),
                });
            }
        }
        if !p.heads.is_multiple_of(p.kv_heads) {
            return Err(Error::InvalidValue {
                what: "heads of K and V",
                given: p.kv_heads.to_string(),
                remedy: format!("the number of heads, {}, must be a multiple of it", p.heads),
            });
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
        if let Some(softcap) = p.softcap
            && !(softcap.is_normal() && softcap > 0.0 && softcap <= MAX_SCORE)
        {
            return Err(Error::InvalidValue {
                what: "softcap",
                given: softcap.to_string(),
                remedy: format!(
                    "it must be above 0 and at most {MAX_SCORE}, which no score exceeds"
                ),
            });
        }
        for (what, shape) in [
            ("q", p.q_shape().to_vec()),
            ("k", p.k_shape().to_vec()),
            ("v", p.v_shape().to_vec()),
            ("o", p.o_shape().to_vec()),
            ("the attention weights", p.weights_shape().to_vec()),
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

/// The features that packed sequences cannot have.
fn check_packed(p: &Problem, Varlen { total_q, total_k }: Varlen) -> Result<(), Error> {
    for (what, value, least) in
        [("rows of packed q", total_q, 1), ("rows of packed k and v", total_k, 0)]
    {
        if value < least || value > MAX_SEQ {
            let remedy = format!("it must be from {least} to {MAX_SEQ}");
            return Err(Error::InvalidValue { what, given: value.to_string(), remedy });
        }
    }
    for (what, given) in [("padding mask", p.mask), ("bias", p.bias.is_some())] {
        if given {
            let remedy = "packed sequences have none: leave it out, or do not pack them".into();
            return Err(Error::InvalidValue { what, given: "given".into(), remedy });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{super::head_dim_of, *};

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
        assert!(message(good.seq_k(MAX_SEQ + 1)).contains("it must be from 0 to"));
        assert!(message(Problem::builder(2, 3, 8, 257)).contains("head dim = 257"));
        assert!(message(good.head_dim_v(0)).contains("head dim of the values = 0"));
        assert!(message(good.head_dim_v(257)).contains("values = 257 is not possible: it must be"));
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
        assert!(message(good.kv_heads(0)).contains("heads of K and V = 0"));
        for kv_heads in [2, 4, 6] {
            let message = message(good.kv_heads(kv_heads));
            assert!(message.contains("the number of heads, 3, must be a multiple"), "{message}");
        }
        for bad in [0.0, -1.0, 1e-40, 1e9, f32::NAN, f32::INFINITY] {
            let message = message(good.softcap(Some(bad)));
            assert!(message.contains("softcap = "), "{message}");
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
    fn the_smaller_right_bound_wins_and_can_be_taken_back() {
        let window = |left, right| Window { left, right };
        let sliding = Problem::builder(1, 1, 9, 64).causal(true).window(window(Some(3), Some(5)));
        let sliding = sliding.build().unwrap();
        assert_eq!((sliding.causal(), sliding.window()), (true, window(Some(3), Some(0))));
        let same = Problem::builder(1, 1, 9, 64).window(window(Some(3), Some(0))).build().unwrap();
        assert_eq!(same, sliding);
        assert_eq!(sliding.to_builder().build().unwrap(), sliding);
        let wide = sliding.to_builder().causal(false).build().unwrap();
        assert_eq!((wide.causal(), wide.window()), (false, window(Some(3), None)));
    }
}
