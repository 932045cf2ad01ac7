//! Order of a tensor's dimensions in memory.

/// Order of a tensor's dimensions in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Layout {
    /// `[B, H, N, D]`: the rows of a head are neighbours.
    #[default]
    HeadsFirst,
    /// `[B, N, H, D]`, the order in which a projection writes: the heads of a token are neighbours.
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
