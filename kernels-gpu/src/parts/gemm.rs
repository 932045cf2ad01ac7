//! Matrix products `C = A B`, which the projections and standard attention share.
//!
//! A product is made of three choices, each compile-time:
//!
//! | | choices |
//! |---|---|
//! | arithmetic | [`tiled`]: scalar fma, any type; [`mma`]: tensor cores, 16-bit types |
//! | operands | [`KMajor`]: `[M, K]` and `[N, K]`, as in `x wᵀ` and `Q Kᵀ`; [`MnMajor`]: `[K, M]` and `[K, N]`, as `V` in `P V` |
//! | epilogue | an [`Epilogue`]: what happens to a sum before it is stored |
//!
//! Operands are [`Matrix`] views with a stride, so that a head is read from and written to
//! `[B, N, H, D]` or `[B, H, N, D]` where it stands: no transpose is launched.

use core::ops::Range;

use simt::{
    global::{Global, GlobalMut},
    layout::{Swizzled, TileLayout},
    matrix,
    memory::Memory,
    scalar::Scalar,
    shared::Shared,
    wgmma::Major,
};

pub use simt::wgmma::{KMajor, MnMajor};

use crate::{args::Buffer, parts::fragment};

pub mod mma;
pub mod tiled;

/// Bytes of the largest access to memory.
const VECTOR_BYTES: u64 = 16;

/// A matrix in global memory: rows a stride apart, columns next to each other.
#[derive(Clone, Copy)]
pub struct Matrix<T> {
    view: Global<T>,
    origin: u64,
    stride: u64,
    /// Rows.
    pub rows: u32,
    /// Columns.
    pub columns: u32,
}

impl<T: Memory> Matrix<T> {
    /// The matrix of `rows` rows and `columns` columns whose first element is element
    /// `origin` of the buffer, rows `stride` elements apart.
    ///
    /// # Safety
    /// The buffer must hold it.
    #[inline(always)]
    #[must_use]
    pub unsafe fn new(buffer: &Buffer, origin: u64, stride: u64, rows: u32, columns: u32) -> Self {
        // SAFETY: the buffer holds the matrix.
        Self { view: unsafe { buffer.view::<T>() }, origin, stride, rows, columns }
    }

    /// Whether vectors of 16 bytes lie either inside or outside of the matrix, and where
    /// memory wants them: rows begin at multiples of 16 bytes and are as long.
    #[inline(always)]
    #[must_use]
    pub const fn is_aligned(&self) -> bool {
        let row_bytes = (self.stride | self.columns as u64) * T::BYTES as u64;
        (self.view.address_of(self.origin) | row_bytes) % VECTOR_BYTES == 0
    }

    /// Some of its rows and columns.
    #[inline(always)]
    #[must_use]
    pub fn part(self, rows: Range<u32>, columns: Range<u32>) -> Self {
        let origin = self.index(rows.start, columns.start);
        let (rows, columns) = (rows.end - rows.start, columns.end - columns.start);
        Self { origin, rows, columns, ..self }
    }

    /// Index of an element in the view.
    #[inline(always)]
    const fn index(&self, row: u32, column: u32) -> u64 {
        self.origin + row as u64 * self.stride + column as u64
    }

    /// Whether the element is inside.
    #[inline(always)]
    #[must_use]
    pub const fn has(&self, row: u32, column: u32) -> bool {
        row < self.rows && column < self.columns
    }

    /// The bits of the 16 bytes from this element on, of a matrix that is aligned; 0 outside.
    #[inline(always)]
    #[must_use]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn chunk_or_zero(&self, row: u32, column: u32) -> [u32; 4] {
        if self.has(row, column) { self.view.read_as(self.index(row, column)) } else { [0; 4] }
    }
}

impl<T: Scalar> Matrix<T> {
    /// The element, which is inside.
    #[inline(always)]
    #[must_use]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn read(&self, row: u32, column: u32) -> T {
        self.view.read(self.index(row, column))
    }

    /// The element, or 0 outside of the matrix: there it adds nothing to a product.
    #[inline(always)]
    #[must_use]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn read_or_zero(&self, row: u32, column: u32) -> T {
        if self.has(row, column) { self.read(row, column) } else { T::from_f32(0.0) }
    }
}

/// A matrix to be written.
#[derive(Clone, Copy)]
pub struct MatrixMut<T> {
    place: Matrix<T>,
    view: GlobalMut<T>,
}

impl<T: Memory> MatrixMut<T> {
    /// The matrix at `place`.
    ///
    /// # Safety
    /// `buffer` must be the place's buffer, writable.
    #[inline(always)]
    #[must_use]
    pub unsafe fn new(place: Matrix<T>, buffer: &Buffer) -> Self {
        // SAFETY: the buffer is the place's, and writable, as stated above.
        Self { place, view: unsafe { buffer.view_mut::<T>() } }
    }

    /// Where it is.
    #[inline(always)]
    #[must_use]
    pub const fn place(&self) -> Matrix<T> {
        self.place
    }

    /// Writes the bits of the 16 bytes from this element on, in a matrix that is aligned.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub(crate) fn write_chunk_if_inside(&self, row: u32, column: u32, chunk: [u32; 4]) {
        if self.place.has(row, column) {
            self.view.write_as(self.place.index(row, column), chunk);
        }
    }

    /// Writes the element, if it is inside.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn write_if_inside(&self, row: u32, column: u32, value: T) {
        if self.place.has(row, column) {
            self.view.write(self.place.index(row, column), value);
        }
    }
}

/// The epilogue: the change of a sum before it is rounded and stored.
pub trait Epilogue: Copy {
    /// The value for a whole column: a lane asks once for each of its columns.
    fn column(&self, column: u32) -> f32;
    /// The value to store. `of_column` is what [`Epilogue::column`] gave.
    fn apply(&self, sum: f32, of_column: f32) -> f32;
}

/// The sum as it is.
#[derive(Clone, Copy, Debug)]
pub struct Plain;

impl Epilogue for Plain {
    #[inline(always)]
    fn column(&self, _: u32) -> f32 {
        0.0
    }
    #[inline(always)]
    fn apply(&self, sum: f32, _: f32) -> f32 {
        sum
    }
}

/// The sum times a factor.
#[derive(Clone, Copy, Debug)]
pub struct Scaled(pub f32);

impl Epilogue for Scaled {
    #[inline(always)]
    fn column(&self, _: u32) -> f32 {
        self.0
    }
    #[inline(always)]
    fn apply(&self, sum: f32, factor: f32) -> f32 {
        sum * factor
    }
}

/// The sum plus the element of a bias `[columns]`, where there is one.
#[derive(Clone, Copy)]
pub struct Biased<T> {
    bias: Option<Global<T>>,
}

impl<T: Scalar> Biased<T> {
    /// Without a bias.
    pub const NONE: Self = Self { bias: None };

    /// With the bias in `buffer`; an empty one means none.
    ///
    /// # Safety
    /// The buffer must be empty or as long as the product has columns.
    #[inline(always)]
    #[must_use]
    pub unsafe fn new(buffer: &Buffer) -> Self {
        // SAFETY: the buffer is empty or holds an element per column.
        Self { bias: (!buffer.is_empty()).then(|| unsafe { buffer.view::<T>() }) }
    }
}

impl<T: Scalar> Epilogue for Biased<T> {
    #[inline(always)]
    fn column(&self, column: u32) -> f32 {
        match self.bias {
            // Columns past the end are asked for too, and never stored.
            Some(bias) if u64::from(column) < bias.len() => bias.read(column.into()).to_f32(),
            _ => 0.0,
        }
    }
    #[inline(always)]
    fn apply(&self, sum: f32, of_column: f32) -> f32 {
        sum + of_column
    }
}

/// How an operand of a product is stored. Its *lines* are the rows of A, or the columns of B.
pub trait Storage: Major {
    /// Row and column of the stored matrix at which term `term` of line `line` is.
    fn place(line: u32, term: u32) -> (u32, u32);

    /// Line and term that a thread loads as its `element` of a tile of `lines` lines and `terms`
    /// terms, so that neighbours read neighbouring elements.
    fn share(element: u32, lines: u32, terms: u32) -> (u32, u32);

    /// Starts to load a tile of [`mma::DEPTH`] terms of LINES lines, from `line` and `term` on.
    fn load<T: Scalar, const LINES: usize>(
        matrix: &Matrix<T>,
        line: u32,
        term: u32,
        tile: Shared<T>,
    );

    /// Where this lane's address points for the first fragment of A at line `line` of a tile, a
    /// multiple of the lines of a warp, which are a power of two; of 16 where lines are rows.
    fn a_origin<const LINES: usize>(line: u32) -> u32;

    /// As [`a_origin`](Self::a_origin), for B; `line` is a multiple of 64 (of 16 where lines are rows).
    fn b_origin<const LINES: usize>(line: u32) -> u32;

    /// A fragment of A, or the fragments of two products side by side of B: `lines` and `terms` (constant
    /// multiples of 16) from the origin.
    fn fragments<T: Scalar, const LINES: usize>(
        tile: Shared<T>,
        origin: u32,
        lines: u32,
        terms: u32,
    ) -> [u32; 4];
}

/// The tile of rows of DEPTH terms.
type ByTerms = Swizzled<{ mma::DEPTH as usize }>;

impl Storage for KMajor {
    #[inline(always)]
    fn place(line: u32, term: u32) -> (u32, u32) {
        (line, term)
    }
    #[inline(always)]
    fn share(element: u32, _: u32, terms: u32) -> (u32, u32) {
        (element / terms, element % terms)
    }
    #[inline(always)]
    fn load<T: Scalar, const LINES: usize>(
        matrix: &Matrix<T>,
        line: u32,
        term: u32,
        tile: Shared<T>,
    ) {
        mma::load::<T, ByTerms, { mma::DEPTH as usize }, LINES>(matrix, line, term, tile);
    }
    #[inline(always)]
    fn a_origin<const LINES: usize>(line: u32) -> u32 {
        fragment::a_origin::<ByTerms>(line)
    }
    #[inline(always)]
    fn b_origin<const LINES: usize>(line: u32) -> u32 {
        fragment::b_origin::<ByTerms>(line)
    }
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn fragments<T: Scalar, const LINES: usize>(
        tile: Shared<T>,
        origin: u32,
        lines: u32,
        terms: u32,
    ) -> [u32; 4] {
        matrix::load_x4(tile, ByTerms::down(ByTerms::right(origin, terms), lines))
    }
}

/// Matrices are transposed as they are loaded. That takes the matrices of A in the order that B has
/// otherwise, and the reverse.
impl Storage for MnMajor {
    #[inline(always)]
    fn place(line: u32, term: u32) -> (u32, u32) {
        (term, line)
    }
    #[inline(always)]
    fn share(element: u32, lines: u32, _: u32) -> (u32, u32) {
        (element % lines, element / lines)
    }
    #[inline(always)]
    fn load<T: Scalar, const LINES: usize>(
        matrix: &Matrix<T>,
        line: u32,
        term: u32,
        tile: Shared<T>,
    ) {
        mma::load::<T, Swizzled<LINES>, LINES, { mma::DEPTH as usize }>(matrix, term, line, tile);
    }
    #[inline(always)]
    fn a_origin<const LINES: usize>(line: u32) -> u32 {
        // The lines of its fragments set other bits than `line`, so that the exchange is by both.
        Swizzled::<LINES>::right(fragment::b_origin::<Swizzled<LINES>>(0), line)
    }
    #[inline(always)]
    fn b_origin<const LINES: usize>(line: u32) -> u32 {
        // Whole spans of a swizzled row to the right the exchange is the same.
        fragment::a_origin::<Swizzled<LINES>>(0) + line
    }
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn fragments<T: Scalar, const LINES: usize>(
        tile: Shared<T>,
        origin: u32,
        lines: u32,
        terms: u32,
    ) -> [u32; 4] {
        let right = Swizzled::<LINES>::right(origin, lines);
        matrix::load_x4_transposed(tile, Swizzled::<LINES>::down(right, terms))
    }
}

/// One product: `c = epilogue(a b)`, over the first `depth` of the terms.
pub struct Product<T, E> {
    /// Left operand: `[M, K]` or `[K, M]`, as the kernel is made for.
    pub a: Matrix<T>,
    /// Right operand: `[N, K]` or `[K, N]`, likewise.
    pub b: Matrix<T>,
    /// Result, `[M, N]`.
    pub c: MatrixMut<T>,
    /// Terms of each sum: K, or less where the rest is known to be 0.
    pub depth: u32,
    /// The change of a sum before it is stored.
    pub epilogue: E,
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    #[test]
    fn vectors_need_rows_that_begin_and_end_at_multiples_of_16_bytes() {
        let aligned = |address, origin, stride, columns| {
            let buffer = Buffer { address, bytes: 1 << 20 };
            // SAFETY: nothing is read.
            unsafe { Matrix::<f16>::new(&buffer, origin, stride, 4, columns) }.is_aligned()
        };
        assert!(aligned(256, 0, 64, 64) && aligned(256, 8, 64, 40));
        assert!(!aligned(258, 0, 64, 64), "the address");
        assert!(!aligned(256, 4, 64, 64), "the first element");
        assert!(!aligned(256, 0, 60, 56), "the stride");
        assert!(!aligned(256, 0, 64, 60), "the columns: a vector would reach past them");
    }
}
