//! Columns of a tile that a tensor has: an entry made for one head dim serves smaller ones too. The
//! columns beyond are 0 in shared memory and registers, and in global memory they are not there.

use crate::constants::Constants;

/// How many columns of a tile a tensor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Columns(u32);

impl Columns {
    /// As many as the tile.
    pub const ALL: Self = Self(0);

    /// The columns of Q and K.
    #[inline(always)]
    #[must_use]
    pub fn of_keys() -> Self {
        Self(Constants::head_dim())
    }

    /// The columns of V and O.
    #[inline(always)]
    #[must_use]
    pub fn of_values() -> Self {
        Self(Constants::head_dim_v())
    }

    /// The same columns in elements half as long: an f32 as two of 16 bits.
    #[inline(always)]
    #[must_use]
    pub const fn halves(self) -> Self {
        Self(2 * self.0)
    }

    /// The same columns in elements twice as long: codes of 8 bits as pairs.
    #[inline(always)]
    #[must_use]
    pub const fn pairs(self) -> Self {
        Self(self.0 / 2)
    }

    /// Whether there is a column. Head dims are multiples of 8: of a chunk of 16 bytes all elements
    /// are there or none.
    #[inline(always)]
    #[must_use]
    pub const fn has(self, column: u32) -> bool {
        self.0 == 0 || column < self.0
    }

    /// How many there are in a tile of `all`.
    #[inline(always)]
    #[must_use]
    pub const fn of(self, all: u32) -> u32 {
        if self.0 == 0 { all } else { self.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_end_where_the_head_dim_does() {
        assert!(Columns::ALL.has(255) && Columns::ALL.of(64) == 64);
        let few = Columns(40);
        assert!(few.has(39) && !few.has(40) && few.of(64) == 40);
        assert!(few.halves().has(79) && !few.halves().has(80));
        assert!(few.pairs().has(19) && !few.pairs().has(20));
    }
}
