//! Products of small matrices on tensor cores: `mma.sync`.
//!
//! A warp computes `C += A B` with its operands spread over the lanes' registers. With
//! `g = lane / 4` and `t = lane % 4`, for 16-bit elements (two a register, the lower index
//! in the lower half):
//!
//! ```text
//! A  16 x 16   a[0]: (g, 2t..)  a[1]: (g + 8, 2t..)  a[2]: (g, 2t + 8..)  a[3]: (g + 8, 2t + 8..)
//! B  16 x 8    b[0]: (2t.., g)  b[1]: (2t + 8.., g)
//! C  16 x 8    c[0], c[1]: (g, 2t), (g, 2t + 1)    c[2], c[3]: (g + 8, 2t), (g + 8, 2t + 1)
//! ```
//!
//! The m16n8k8 forms have half of A and B (`a[0]`, `a[1]`, `b[0]`); tf32 has one element
//! a register, `t` in place of `2t..` and `t + 4` in place of `2t + 8..`. C is f32
//! everywhere. A C of two neighbouring 16 x 8 products, rounded and packed by
//! [`TensorCore::pack`], is the A of the next product: P of `S = Q Kᵀ` goes into `O += P V`
//! without leaving its registers.
//!
//! All lanes of the warp must take part. Source: PTX ISA, "Matrix Fragments for
//! mma.m16n8k16".

use half::{bf16, f16};

#[cfg(not(target_arch = "nvptx64"))]
use std::panic::Location;

use crate::scalar::Scalar;
#[cfg(not(target_arch = "nvptx64"))]
use crate::{
    emulator::collectives::{self, WarpCall},
    matrix::whole_warp,
    warp::FULL_MASK,
};

macro_rules! product {
    ($($(#[$doc:meta])* $name:ident, $k:literal, $a:literal, $b:literal, $elements:expr, $text:expr,
        $($ai:literal)*, $($bi:literal)*;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
        pub fn $name(c: &mut [f32; 4], a: [u32; $a], b: [u32; $b]) {
            #[cfg(target_arch = "nvptx64")]
            // SAFETY: arithmetic between the warp's registers.
            unsafe {
                core::arch::asm!($text,
                    inout(reg32) c[0], inout(reg32) c[1], inout(reg32) c[2], inout(reg32) c[3],
                    $(in(reg32) a[$ai],)* $(in(reg32) b[$bi],)* options(nomem, nostack));
            }
            #[cfg(not(target_arch = "nvptx64"))]
            product::<$k, $a, $b>(stringify!($name), $elements, c, a, b, Location::caller());
        }
    )*};
}

product! {
    /// `C += A B`, 16 x 8 with k = 8, f16; from sm_75 on.
    m16n8k8_f16, 8, 2, 1, halves_f16,
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {{{0}, {1}, {2}, {3}}}, {{{4}, {5}}}, {{{6}}}, {{{0}, {1}, {2}, {3}}};",
        0 1, 0;
    /// `C += A B`, 16 x 8 with k = 16, f16; from sm_80 on.
    m16n8k16_f16, 16, 4, 2, halves_f16,
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{{0}, {1}, {2}, {3}}}, {{{4}, {5}, {6}, {7}}}, {{{8}, {9}}}, {{{0}, {1}, {2}, {3}}};",
        0 1 2 3, 0 1;
    /// `C += A B`, 16 x 8 with k = 16, bf16; from sm_80 on.
    m16n8k16_bf16, 16, 4, 2, halves_bf16,
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{{0}, {1}, {2}, {3}}}, {{{4}, {5}, {6}, {7}}}, {{{8}, {9}}}, {{{0}, {1}, {2}, {3}}};",
        0 1 2 3, 0 1;
    /// `C += A B`, 16 x 8 with k = 8, tf32; from sm_80 on. The lowest 13 bits of each
    /// element are ignored.
    m16n8k8_tf32, 8, 4, 2, whole_tf32,
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {{{0}, {1}, {2}, {3}}}, {{{4}, {5}, {6}, {7}}}, {{{8}, {9}}}, {{{0}, {1}, {2}, {3}}};",
        0 1 2 3, 0 1;
}

/// The value rounded to tf32: 8 bits of exponent, 10 of fraction; ties away from zero.
#[inline(always)]
#[must_use]
pub fn to_tf32(value: f32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let bits: u32;
        // SAFETY: a conversion between registers.
        unsafe {
            core::arch::asm!("cvt.rna.tf32.f32 {0}, {1};", out(reg32) bits, in(reg32) value,
                options(pure, nomem, nostack));
        }
        bits
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        if value.is_finite() { (value.to_bits() + 0x1000) & !0x1fff } else { value.to_bits() }
    }
}

/// A generation of tensor cores that multiplies elements of type `T`.
pub trait TensorCore<T: Scalar>: 'static {
    /// `C += A B`, 16 x 8 with k = 16.
    fn multiply(c: &mut [f32; 4], a: [u32; 4], b: [u32; 2]);
    /// Two values rounded to `T` in one register.
    fn pack(low: f32, high: f32) -> u32;
}

/// sm_75: f16, k = 8.
#[derive(Clone, Copy, Debug)]
pub struct Turing;
/// sm_80 and later: f16 and bf16, k = 16.
#[derive(Clone, Copy, Debug)]
pub struct Ampere;

impl TensorCore<f16> for Turing {
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn multiply(c: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
        m16n8k8_f16(c, [a[0], a[1]], [b[0]]);
        m16n8k8_f16(c, [a[2], a[3]], [b[1]]);
    }
    #[inline(always)]
    fn pack(low: f32, high: f32) -> u32 {
        let bits = |x| u32::from(<f16 as Scalar>::from_f32(x).to_bits());
        bits(low) | bits(high) << 16
    }
}

macro_rules! ampere {
    ($type:ident, $multiply:ident, $pack:literal) => {
        impl TensorCore<$type> for Ampere {
            #[inline(always)]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            fn multiply(c: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
                $multiply(c, a, b);
            }
            #[inline(always)]
            fn pack(low: f32, high: f32) -> u32 {
                #[cfg(target_arch = "nvptx64")]
                {
                    let bits: u32;
                    // SAFETY: a conversion between registers.
                    unsafe {
                        core::arch::asm!($pack, out(reg32) bits, in(reg32) high, in(reg32) low,
                            options(pure, nomem, nostack));
                    }
                    bits
                }
                #[cfg(not(target_arch = "nvptx64"))]
                {
                    let bits = |x| u32::from($type::from_f32(x).to_bits());
                    bits(low) | bits(high) << 16
                }
            }
        }
    };
}

ampere!(f16, m16n8k16_f16, "cvt.rn.f16x2.f32 {0}, {1}, {2};");
ampere!(bf16, m16n8k16_bf16, "cvt.rn.bf16x2.f32 {0}, {1}, {2};");

/// The elements that a register holds, at most two.
#[cfg(not(target_arch = "nvptx64"))]
struct Elements {
    values: [f32; 2],
    count: usize,
}

#[cfg(not(target_arch = "nvptx64"))]
fn halves_f16(bits: u32) -> Elements {
    let value = |bits: u32| f16::from_bits(bits as u16).to_f32();
    Elements { values: [value(bits), value(bits >> 16)], count: 2 }
}

#[cfg(not(target_arch = "nvptx64"))]
fn halves_bf16(bits: u32) -> Elements {
    Elements { values: [f32::from_bits(bits << 16), f32::from_bits(bits & 0xffff_0000)], count: 2 }
}

#[cfg(not(target_arch = "nvptx64"))]
fn whole_tf32(bits: u32) -> Elements {
    Elements { values: [f32::from_bits(bits & !0x1fff), 0.0], count: 1 }
}

/// `C += A B` as a collective. Products of two such elements are exact in f32; the sums
/// are made in f32 in the order of k, which a GPU does not promise.
#[cfg(not(target_arch = "nvptx64"))]
fn product<const K: usize, const A: usize, const B: usize>(
    name: &'static str,
    elements: fn(u32) -> Elements,
    c: &mut [f32; 4],
    a: [u32; A],
    b: [u32; B],
    at: &'static Location<'static>,
) {
    let mut input = [0; 10];
    input[..4].copy_from_slice(&c.map(f32::to_bits));
    input[4..4 + A].copy_from_slice(&a);
    input[8..8 + B].copy_from_slice(&b);
    let output: [u32; 4] =
        collectives::collective(name, FULL_MASK, input, at, |call: WarpCall<'_>| {
            whole_warp(&call, name, at)?;
            let (mut a, mut b, mut c) = ([[0.0; K]; 16], [[0.0; 8]; K], [[0.0; 8]; 16]);
            for lane in 0..32 {
                let (g, t) = (lane / 4, lane % 4);
                let input = &call.input[lane];
                for (i, &register) in input[4..4 + A].iter().enumerate() {
                    let Elements { values, count } = elements(register);
                    let (row, column) = (g + 8 * (i % 2), count * (t + 4 * (i / 2)));
                    a[row][column..column + count].copy_from_slice(&values[..count]);
                }
                for (i, &register) in input[8..8 + B].iter().enumerate() {
                    let Elements { values, count } = elements(register);
                    for (e, value) in values[..count].iter().enumerate() {
                        b[count * (t + 4 * i) + e][g] = *value;
                    }
                }
                for (i, &register) in input[..4].iter().enumerate() {
                    c[g + 8 * (i / 2)][2 * t + i % 2] = f32::from_bits(register);
                }
            }
            for (c, a) in c.iter_mut().zip(&a) {
                for (a, b) in a.iter().zip(&b) {
                    for (c, b) in c.iter_mut().zip(b) {
                        *c += a * b;
                    }
                }
            }
            for lane in 0..32 {
                let (g, t) = (lane / 4, lane % 4);
                for i in 0..4 {
                    call.output[lane][i] = c[g + 8 * (i / 2)][2 * t + i % 2].to_bits();
                }
            }
            Ok(())
        });
    *c = output.map(f32::from_bits);
}
