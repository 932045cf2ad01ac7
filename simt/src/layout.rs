//! Tiles of 16-bit elements in shared memory, laid out so that a matrix load meets no bank
//! twice.
//!
//! A matrix load reads one chunk of 8 elements (16 bytes) from each of eight rows. There
//! are eight groups of four banks; in a plain tile with rows of 64 elements all eight
//! chunks lie in the same group, and the load takes eight passes instead of one ([`Plain`]).
//! Two cures:
//!
//! - [`Padded`]: each row is one chunk longer, so that the next one starts in the next
//!   group. Costs memory, and rows are no longer aligned to more than 16 bytes.
//! - [`Swizzled`]: chunk `c` of row `r` is stored at `c ^ (r % 8)`: eight rows spread one
//!   column of chunks over the eight groups. Costs nothing.
//!
//! ```text
//! rows of 8 chunks:   r = 0 | 0 1 2 3 4 5 6 7
//!                     r = 1 | 1 0 3 2 5 4 7 6
//!                     r = 2 | 2 3 0 1 6 7 4 5     where chunk c of a row stands
//! ```
//!
//! An f32 counts as two elements, so that a chunk is 16 bytes for every type.
//!
//! A row of 4 more chunks than a multiple of 8 begins in the other half of the groups than
//! the one before, so that two rows share a value: `c ^ (r / 2 % 4)`.

/// Elements of a chunk, which one lane of a matrix load or of a 16-byte copy touches.
pub const CHUNK: u32 = 8;

/// Where the elements of a tile are.
pub trait TileLayout: 'static {
    /// Elements that `rows` rows take.
    fn len(rows: u32) -> u32;

    /// Index of the chunk that begins at `column` (a multiple of [`CHUNK`]) of `row`.
    fn index(row: u32, column: u32) -> u32;

    /// The index of the chunk `columns` (a constant multiple of 16) to the right of the
    /// one at `index`, which is in the first 16 columns of its row; or in the first 64, and
    /// `columns` is a multiple of 64.
    fn right(index: u32, columns: u32) -> u32;

    /// The index of the chunk `rows` (a constant multiple of 8) below.
    fn down(index: u32, rows: u32) -> u32;
}

/// Rows of `COLUMNS` elements, unchanged: the baseline of the other layouts.
#[derive(Clone, Copy, Debug)]
pub struct Plain<const COLUMNS: usize>;

impl<const COLUMNS: usize> TileLayout for Plain<COLUMNS> {
    #[inline(always)]
    fn len(rows: u32) -> u32 {
        rows * COLUMNS as u32
    }
    #[inline(always)]
    fn index(row: u32, column: u32) -> u32 {
        row * COLUMNS as u32 + column
    }
    #[inline(always)]
    fn right(index: u32, columns: u32) -> u32 {
        index + columns
    }
    #[inline(always)]
    fn down(index: u32, rows: u32) -> u32 {
        index + rows * COLUMNS as u32
    }
}

/// Rows of `COLUMNS` elements and a chunk of padding.
#[derive(Clone, Copy, Debug)]
pub struct Padded<const COLUMNS: usize>;

impl<const COLUMNS: usize> Padded<COLUMNS> {
    /// Elements from one row to the next. An odd number of chunks.
    const PITCH: u32 = {
        assert!(COLUMNS as u32 % (2 * CHUNK) == 0, "a row is an even number of chunks");
        COLUMNS as u32 + CHUNK
    };
}

impl<const COLUMNS: usize> TileLayout for Padded<COLUMNS> {
    #[inline(always)]
    fn len(rows: u32) -> u32 {
        rows * Self::PITCH
    }
    #[inline(always)]
    fn index(row: u32, column: u32) -> u32 {
        row * Self::PITCH + column
    }
    #[inline(always)]
    fn right(index: u32, columns: u32) -> u32 {
        index + columns
    }
    #[inline(always)]
    fn down(index: u32, rows: u32) -> u32 {
        index + rows * Self::PITCH
    }
}

/// Rows of `COLUMNS` elements, a multiple of 32, chunks exchanged by XOR. The tile must
/// begin at a multiple of 128 bytes.
#[derive(Clone, Copy, Debug)]
pub struct Swizzled<const COLUMNS: usize>;

impl<const COLUMNS: usize> Swizzled<COLUMNS> {
    const PITCH: u32 = {
        assert!(COLUMNS as u32 % 32 == 0, "a row is a multiple of 4 chunks");
        COLUMNS as u32
    };
    /// Chunks among which the exchange happens.
    const CHUNKS_EXCHANGED: u32 = if Self::PITCH % 64 == 0 { 8 } else { 4 };
    /// Neighbouring rows that are exchanged alike.
    const ROWS_ALIKE: u32 = 8 / Self::CHUNKS_EXCHANGED;
}

impl<const COLUMNS: usize> TileLayout for Swizzled<COLUMNS> {
    #[inline(always)]
    fn len(rows: u32) -> u32 {
        rows * Self::PITCH
    }
    #[inline(always)]
    fn index(row: u32, column: u32) -> u32 {
        let chunk = (column / CHUNK) ^ (row / Self::ROWS_ALIKE % Self::CHUNKS_EXCHANGED);
        row * Self::PITCH + chunk * CHUNK
    }
    #[inline(always)]
    fn right(index: u32, columns: u32) -> u32 {
        // Adding to a chunk of 0 or 1 an even number sets bits, and so does the XOR; the
        // row's own XOR can be done before or after.
        let span = Self::CHUNKS_EXCHANGED * CHUNK;
        (index ^ (columns % span)) + columns / span * span
    }
    #[inline(always)]
    fn down(index: u32, rows: u32) -> u32 {
        index + rows * Self::PITCH
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<L: TileLayout>(columns: u32) {
        let chunks = columns / CHUNK;
        let mut seen = vec![false; (L::len(32) / CHUNK) as usize];
        for row in 0..32 {
            for chunk in 0..chunks {
                let index = L::index(row, chunk * CHUNK);
                assert!(index % CHUNK == 0);
                let place = &mut seen[(index / CHUNK) as usize];
                assert!(!std::mem::replace(place, true), "two chunks at {index}");
                let origin = L::index(row % 8, chunk % 2 * CHUNK);
                let walked = L::down(L::right(origin, chunk / 2 * 16), row / 8 * 8);
                assert_eq!(walked, index, "row {row}, chunk {chunk} of {chunks}");
            }
        }
        for first_row in [0, 8, 16] {
            for chunk in 0..chunks {
                let groups = (0..8)
                    .fold(0, |g, r| g | 1 << (L::index(first_row + r, chunk * CHUNK) / CHUNK % 8));
                assert_eq!(groups, 0xff, "chunk {chunk} of rows {first_row}.. of {columns}");
            }
        }
    }

    #[test]
    fn every_matrix_load_meets_every_bank_once() {
        check::<Padded<32>>(32);
        check::<Padded<64>>(64);
        check::<Padded<128>>(128);
        check::<Swizzled<32>>(32);
        check::<Swizzled<64>>(64);
        check::<Swizzled<96>>(96);
        check::<Swizzled<128>>(128);
        check::<Swizzled<160>>(160);
        check::<Swizzled<192>>(192);
        check::<Swizzled<224>>(224);
        check::<Swizzled<256>>(256);
    }
}
