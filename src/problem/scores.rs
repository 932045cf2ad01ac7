//! Changes to scores and weights between the two products.

/// Dropout of attention weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability that a weight is dropped, in `[0, 1)`.
    pub p: f32,
    /// Key of the generator: the same seed drops the same weights in every kernel.
    pub seed: u64,
}

/// The slopes of ALiBi: `slope * |i + Nk - Nq - j|` is taken from a score.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Alibi {
    /// f32 `[H]`: every batch entry has the same.
    PerHead,
    /// f32 `[B, H]`.
    PerBatchAndHead,
}

impl Alibi {
    /// The usual slopes of `heads` heads, `2^(-8 (h + 1) / H)` for head `h` (Press et al., "Train
    /// Short, Test Long", section 3).
    #[must_use]
    pub fn usual_slopes(heads: usize) -> Vec<f32> {
        let slope = |h: usize| (-8.0 * (h + 1) as f64 / heads as f64).exp2() as f32;
        (0..heads).map(slope).collect()
    }
}

/// The matrix added to the scores, `[B or 1, H or 1, Nq, Nk]` in the storage type. An element of
/// -inf hides its key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Bias {
    /// Whether each batch entry has its own matrix; otherwise all share one.
    pub per_batch: bool,
    /// Whether each head has its own matrix; otherwise all share one.
    pub per_head: bool,
}
