//! The ladder of projections `y = x wᵀ + bias` and of their gradients, one file per rung.
//!
//! | rung | the idea it adds |
//! |---|---|
//! | [`linear_naive`] | a thread per element |
//! | [`linear_tiled`] | tiles in shared memory, pieces in registers |
//! | [`linear_mma`] | tensor cores, slices brought while others are used (sm_80) |
//! | [`linear_hopper`] | two blocks share what one of them fetches (sm_90a) |
//!
//! A rung computes each [`LinearProduct`]: the output, the gradient of the input, or the gradient of
//! the weight. They differ in which tensor is which operand, and in how the operands are stored.
//! The gradient of the bias is no product: [`linear_bias`] sums columns, for every rung.

use simt::scalar::Scalar;

use crate::{
    args::{Buffer, LinearArgs},
    parts::gemm::{Biased, KMajor, Matrix, MatrixMut, MnMajor, Product, Storage},
};

pub mod linear_bias;
pub mod linear_hopper;
pub mod linear_mma;
pub mod linear_naive;
pub mod linear_tiled;

/// One of the three products of a projection, `C = A B`. `x`, `w` and `y` in [`LinearArgs`] are the
/// tensors, or their gradients:
///
/// | | A | B | C |
/// |---|---|---|---|
/// | [`Y`]: `y = x wᵀ + bias` | `x: [rows, in]` | `w: [out, in]` | `y: [rows, out]` |
/// | [`Dx`]: `dx = dy w` | `dy: [rows, out]` | `w: [out, in]` | `dx: [rows, in]` |
/// | [`Dw`]: `dw = dyᵀ x` | `dy: [rows, out]` | `x: [rows, in]` | `dw: [out, in]` |
pub trait LinearProduct: 'static {
    /// How A is stored.
    type A: Storage;
    /// How B is stored.
    type B: Storage;
    /// Whether the bias is added.
    const BIASED: bool;

    /// A, B and C.
    fn buffers(args: &LinearArgs) -> [Buffer; 3];

    /// Rows and columns of C, and the terms of each sum.
    fn extents(args: &LinearArgs) -> [u32; 3];

    /// The product.
    ///
    /// # Safety
    /// The buffers must have the shapes that `args` says.
    #[inline(always)]
    #[must_use]
    unsafe fn product<T: Scalar>(args: &LinearArgs) -> Product<T, Biased<T>> {
        let [a, b, c] = Self::buffers(args);
        let [rows, columns, terms] = Self::extents(args);
        // SAFETY: the buffers have the shapes that `args` says.
        unsafe {
            Product {
                a: contiguous(&a, Self::A::place(rows, terms)),
                b: contiguous(&b, Self::B::place(columns, terms)),
                c: MatrixMut::new(contiguous(&c, (rows, columns)), &c),
                depth: terms,
                epilogue: if Self::BIASED { Biased::new(&args.bias) } else { Biased::NONE },
            }
        }
    }
}

/// A whole buffer as a matrix.
///
/// # Safety
/// The buffer must hold `rows` rows of `columns` elements.
#[inline(always)]
unsafe fn contiguous<T: Scalar>(buffer: &Buffer, (rows, columns): (u32, u32)) -> Matrix<T> {
    // SAFETY: the buffer holds the rows, one after the other, as stated above.
    unsafe { Matrix::new(buffer, 0, columns.into(), rows, columns) }
}

/// The output, `y = x wᵀ + bias`.
#[derive(Clone, Copy, Debug)]
pub struct Y;

/// The gradient of the input, `dx = dy w`.
#[derive(Clone, Copy, Debug)]
pub struct Dx;

/// The gradient of the weight, `dw = dyᵀ x`.
#[derive(Clone, Copy, Debug)]
pub struct Dw;

impl LinearProduct for Y {
    type A = KMajor;
    type B = KMajor;
    const BIASED: bool = true;

    #[inline(always)]
    fn buffers(args: &LinearArgs) -> [Buffer; 3] {
        [args.x, args.w, args.y]
    }
    #[inline(always)]
    fn extents(args: &LinearArgs) -> [u32; 3] {
        [args.rows, args.out_features, args.in_features]
    }
}

impl LinearProduct for Dx {
    type A = KMajor;
    type B = MnMajor;
    const BIASED: bool = false;

    #[inline(always)]
    fn buffers(args: &LinearArgs) -> [Buffer; 3] {
        [args.y, args.w, args.x]
    }
    #[inline(always)]
    fn extents(args: &LinearArgs) -> [u32; 3] {
        [args.rows, args.in_features, args.out_features]
    }
}

impl LinearProduct for Dw {
    type A = MnMajor;
    type B = MnMajor;
    const BIASED: bool = false;

    #[inline(always)]
    fn buffers(args: &LinearArgs) -> [Buffer; 3] {
        [args.y, args.x, args.w]
    }
    #[inline(always)]
    fn extents(args: &LinearArgs) -> [u32; 3] {
        [args.out_features, args.in_features, args.rows]
    }
}
