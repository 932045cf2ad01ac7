//! Matrix products `C = A B`: what the projections and standard attention share.
//!
//! A product is made of three choices, each compile-time:
//!
//! | | choices |
//! |---|---|
//! | arithmetic | [`tiled`]: scalar fma, any type; [`mma`]: tensor cores, 16-bit types |
//! | right operand | [`Transposed`]: `[N, K]`, as in `x wᵀ` and `Q Kᵀ`; [`AsStored`]: `[K, N]`, as in `P V` |
//! | epilogue | an [`Epilogue`]: what happens to a sum before it is stored |
//!
//! Operands are [`Matrix`] views with a stride, so that a head is read from and written to
//! `[B, N, H, D]` or `[B, H, N, D]` where it stands: no transpose is launched.

use simt::{
    global::{Global, GlobalMut},
    layout::{Swizzled, TileLayout},
    matrix,
    memory::Memory,
    scalar::Scalar,
    shared::Shared,
};

use crate::{
    args::{Buffer, LinearArgs},
    parts::fragment,
};

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

    /// Index of an element in the view.
    #[inline(always)]
    const fn index(&self, row: u32, column: u32) -> u64 {
        self.origin + row as u64 * self.stride + column as u64
    }

    #[inline(always)]
    const fn has(&self, row: u32, column: u32) -> bool {
        row < self.rows && column < self.columns
    }
}

impl<T: Scalar> Matrix<T> {
    /// The element, or 0 outside of the matrix: there it adds nothing to a product.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn read_or_zero(&self, row: u32, column: u32) -> T {
        if self.has(row, column) {
            self.view.read(self.index(row, column))
        } else {
            T::from_f32(0.0)
        }
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
        // SAFETY: passed on to the caller.
        Self { place, view: unsafe { buffer.view_mut::<T>() } }
    }

    /// Writes the bits of the 16 bytes from this element on, in a matrix that is aligned.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub(crate) fn write_chunk_if_inside(&self, row: u32, column: u32, chunk: [u32; 4]) {
        if self.place.has(row, column) {
            self.view.write_as(self.place.index(row, column), chunk);
        }
    }

    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn write_if_inside(&self, row: u32, column: u32, value: T) {
        if self.place.has(row, column) {
            self.view.write(self.place.index(row, column), value);
        }
    }
}

/// What happens to a sum before it is rounded and stored.
pub trait Epilogue: Copy {
    /// What is the same for a whole column: a lane asks once for each of its columns.
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

/// How the right operand of a product is stored.
pub trait Right: 'static {
    /// Shared tile of [`mma::DEPTH`] terms and `COLUMNS` columns of B.
    type Tile<const COLUMNS: usize>: TileLayout;

    /// Row and column of the stored matrix at which B has column `column` of term `term`.
    fn place(term: u32, column: u32) -> (u32, u32);

    /// Term and column that a thread loads as its `element` of a tile of `terms` terms and
    /// `columns` columns, so that neighbours read neighbouring elements.
    fn share(element: u32, terms: u32, columns: u32) -> (u32, u32);

    /// Starts to load a tile of B from its term `term` and column `column` on.
    fn load<T: Scalar, const COLUMNS: usize>(
        b: &Matrix<T>,
        term: u32,
        column: u32,
        tile: Shared<T>,
    );

    /// Where this lane's address points for the first fragment at column `column` of a tile.
    fn origin<const COLUMNS: usize>(column: u32) -> u32;

    /// The fragments of two products side by side: `terms` (a constant multiple of 16) below
    /// the origin, `columns` (a constant multiple of 16) to the right of it.
    fn fragments<T: Scalar, const COLUMNS: usize>(
        tile: Shared<T>,
        origin: u32,
        terms: u32,
        columns: u32,
    ) -> [u32; 4];
}

/// B is stored by columns: the matrix is `[N, K]`, `C = A bᵀ`.
#[derive(Clone, Copy, Debug)]
pub struct Transposed;

/// B is stored as it is: the matrix is `[K, N]`, `C = A b`.
#[derive(Clone, Copy, Debug)]
pub struct AsStored;

/// The tile of rows of DEPTH terms, of A and of a transposed B.
type ByTerms = Swizzled<{ mma::DEPTH as usize }>;

impl Right for Transposed {
    type Tile<const COLUMNS: usize> = ByTerms;

    #[inline(always)]
    fn place(term: u32, column: u32) -> (u32, u32) {
        (column, term)
    }
    #[inline(always)]
    fn share(element: u32, terms: u32, _: u32) -> (u32, u32) {
        (element % terms, element / terms)
    }
    #[inline(always)]
    fn load<T: Scalar, const COLUMNS: usize>(
        b: &Matrix<T>,
        term: u32,
        column: u32,
        tile: Shared<T>,
    ) {
        mma::load::<T, ByTerms, { mma::DEPTH as usize }, COLUMNS>(b, column, term, tile);
    }
    #[inline(always)]
    fn origin<const COLUMNS: usize>(column: u32) -> u32 {
        fragment::b_origin::<ByTerms>(column)
    }
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn fragments<T: Scalar, const COLUMNS: usize>(
        tile: Shared<T>,
        origin: u32,
        terms: u32,
        columns: u32,
    ) -> [u32; 4] {
        matrix::load_x4(tile, ByTerms::down(ByTerms::right(origin, terms), columns))
    }
}

impl Right for AsStored {
    type Tile<const COLUMNS: usize> = Swizzled<COLUMNS>;

    #[inline(always)]
    fn place(term: u32, column: u32) -> (u32, u32) {
        (term, column)
    }
    #[inline(always)]
    fn share(element: u32, _: u32, columns: u32) -> (u32, u32) {
        (element / columns, element % columns)
    }
    #[inline(always)]
    fn load<T: Scalar, const COLUMNS: usize>(
        b: &Matrix<T>,
        term: u32,
        column: u32,
        tile: Shared<T>,
    ) {
        mma::load::<T, Swizzled<COLUMNS>, COLUMNS, { mma::DEPTH as usize }>(b, term, column, tile);
    }
    #[inline(always)]
    fn origin<const COLUMNS: usize>(column: u32) -> u32 {
        // Whole spans of a swizzled row to the right the exchange is the same.
        fragment::a_origin::<Swizzled<COLUMNS>>(0) + column
    }
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn fragments<T: Scalar, const COLUMNS: usize>(
        tile: Shared<T>,
        origin: u32,
        terms: u32,
        columns: u32,
    ) -> [u32; 4] {
        let right = Swizzled::<COLUMNS>::right(origin, columns);
        matrix::load_x4_transposed(tile, Swizzled::<COLUMNS>::down(right, terms))
    }
}

/// One product: `c = epilogue(a b)`, over the first `depth` of the terms.
pub struct Product<T, E> {
    /// Left operand, `[M, K]`.
    pub a: Matrix<T>,
    /// Right operand: `[N, K]` or `[K, N]`, as the kernel is made for.
    pub b: Matrix<T>,
    /// Result, `[M, N]`.
    pub c: MatrixMut<T>,
    /// Terms of each sum: K, or less where the rest is known to be 0.
    pub depth: u32,
    /// What happens to a sum before it is stored.
    pub epilogue: E,
}

impl<T: Scalar> Product<T, Biased<T>> {
    /// `y = x wᵀ + bias`, with a [`Transposed`] right operand.
    ///
    /// # Safety
    /// The buffers must have the shapes that `args` says.
    #[inline(always)]
    #[must_use]
    pub unsafe fn linear(args: &LinearArgs) -> Self {
        let LinearArgs { x, w, bias, y, rows, in_features, out_features, .. } = *args;
        let (in_stride, out_stride) = (in_features as u64, out_features as u64);
        // SAFETY: the buffers have the shapes that `args` says.
        unsafe {
            Self {
                a: Matrix::new(&x, 0, in_stride, rows, in_features),
                b: Matrix::new(&w, 0, in_stride, out_features, in_features),
                c: MatrixMut::new(Matrix::new(&y, 0, out_stride, rows, out_features), &y),
                depth: in_features,
                epilogue: Biased::new(&bias),
            }
        }
    }
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
