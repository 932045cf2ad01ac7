//! Products of small matrices on tensor cores: `mma.sync`.
//!
//! A warp computes `C += A B` with its operands spread over the lanes' registers. With
//! `g = lane / 4` and `t = lane % 4`, for 16-bit elements (two per register, the lower index
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
    emulator::{
        Action, Counts,
        collectives::{self, WarpCall},
    },
    hardware::widen_f16,
    warp::FULL_MASK,
};

macro_rules! product {
    ($($(#[$doc:meta])* $name:ident, $k:literal, $a:literal, $b:literal, $elements:ident, $text:expr,
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
            product::<$elements, $k, $a, $b>(stringify!($name), c, a, b, Location::caller());
        }
    )*};
}

product! {
    /// `C += A B`, 16 x 8 with k = 8, f16; from sm_75 on.
    m16n8k8_f16, 8, 2, 1, HalvesF16,
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {{{0}, {1}, {2}, {3}}}, {{{4}, {5}}}, {{{6}}}, {{{0}, {1}, {2}, {3}}};",
        0 1, 0;
    /// `C += A B`, 16 x 8 with k = 16, f16; from sm_80 on.
    m16n8k16_f16, 16, 4, 2, HalvesF16,
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{{0}, {1}, {2}, {3}}}, {{{4}, {5}, {6}, {7}}}, {{{8}, {9}}}, {{{0}, {1}, {2}, {3}}};",
        0 1 2 3, 0 1;
    /// `C += A B`, 16 x 8 with k = 16, bf16; from sm_80 on.
    m16n8k16_bf16, 16, 4, 2, HalvesBf16,
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{{0}, {1}, {2}, {3}}}, {{{4}, {5}, {6}, {7}}}, {{{8}, {9}}}, {{{0}, {1}, {2}, {3}}};",
        0 1 2 3, 0 1;
    /// `C += A B`, 16 x 8 with k = 8, tf32; from sm_80 on. The lowest 13 bits of each
    /// element are ignored.
    m16n8k8_tf32, 8, 4, 2, WholeTf32,
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {{{0}, {1}, {2}, {3}}}, {{{4}, {5}, {6}, {7}}}, {{{8}, {9}}}, {{{0}, {1}, {2}, {3}}};",
        0 1 2 3, 0 1;
}

/// Bits of an f32 that tf32 has no room for.
const TF32_BEYOND: u32 = (1 << 13) - 1;
/// Half a unit in the last place of tf32, as a difference of an f32's bits.
const TF32_HALF: u32 = 1 << 12;

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
        let bits = value.to_bits();
        if value.is_finite() { (bits + TF32_HALF) & !TF32_BEYOND } else { bits }
    }
}

/// A generation of tensor cores that multiplies elements of type `T`.
pub trait Multiply<T: Scalar>: 'static {
    /// The operand of a product, made of a register of A or B.
    type Operand: Copy;

    /// Makes a register of A or B, as it comes from shared memory, an operand.
    fn operand(bits: u32) -> Self::Operand;

    /// `C += A B`, 16 x 8 with 32 bytes of each row of A and column of B: k = 16 for 16-bit
    /// elements, k = 8 for f32.
    fn multiply(c: &mut [f32; 4], a: [Self::Operand; 4], b: [Self::Operand; 2]);
}

/// A generation that multiplies 16-bit elements, two per register.
pub trait TensorCore<T: Scalar>: Multiply<T, Operand = u32> {
    /// Two values rounded to `T` in one register.
    fn pack(low: f32, high: f32) -> u32;
}

/// sm_75: f16, k = 8.
#[derive(Clone, Copy, Debug)]
pub struct Turing;
/// sm_80 and later: f16 and bf16, k = 16; f32 by three products of tf32, k = 8.
#[derive(Clone, Copy, Debug)]
pub struct Ampere;

impl Multiply<f16> for Turing {
    type Operand = u32;

    #[inline(always)]
    fn operand(bits: u32) -> u32 {
        bits
    }
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn multiply(c: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
        m16n8k8_f16(c, [a[0], a[1]], [b[0]]);
        m16n8k8_f16(c, [a[2], a[3]], [b[1]]);
    }
}

impl TensorCore<f16> for Turing {
    #[inline(always)]
    fn pack(low: f32, high: f32) -> u32 {
        let bits = |x| u32::from(<f16 as Scalar>::from_f32(x).to_bits());
        bits(low) | bits(high) << 16
    }
}

macro_rules! ampere {
    ($type:ident, $multiply:ident, $pack:literal) => {
        impl Multiply<$type> for Ampere {
            type Operand = u32;

            #[inline(always)]
            fn operand(bits: u32) -> u32 {
                bits
            }
            #[inline(always)]
            #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
            fn multiply(c: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
                $multiply(c, a, b);
            }
        }

        impl TensorCore<$type> for Ampere {
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

/// An f32 as the sum of two tf32: 11 bits of the value, and 11 of the 12 that are left
/// besides a sign. The lost part is at most 2^-23 of the value.
#[derive(Clone, Copy, Debug)]
pub struct Split {
    high: u32,
    /// Not rounded: a product ignores what is beyond tf32. Of 12 bits one is lost, and
    /// rounding that up is as far off as leaving it out.
    low: u32,
}

/// f32 by three products: `A B = low high + high low + high high`, smallest first. The
/// product of the low parts, 2^-24 of the whole at most, is left out.
///
/// A tensor core adds in f32 but cuts off the bits that it cannot hold, each time towards 0; over
/// a long sum that is an error of its own. So the three products are summed from 0, and
/// an addition that rounds takes their sum into C. Source: Ootomo and Yokota, "Recovering
/// single precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak
/// performance", 2022, section 3.
impl Multiply<f32> for Ampere {
    type Operand = Split;

    #[inline(always)]
    fn operand(bits: u32) -> Split {
        // `to_tf32` in two instructions, for which ptxas would write four to keep a NaN one:
        // here `low` is NaN then, and the sum with it.
        let high = bits.wrapping_add(TF32_HALF) & !TF32_BEYOND;
        Split { high, low: (f32::from_bits(bits) - f32::from_bits(high)).to_bits() }
    }
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn multiply(c: &mut [f32; 4], a: [Split; 4], b: [Split; 2]) {
        let a_high = [a[0].high, a[1].high, a[2].high, a[3].high];
        let a_low = [a[0].low, a[1].low, a[2].low, a[3].low];
        let (b_high, b_low) = ([b[0].high, b[1].high], [b[0].low, b[1].low]);
        let mut sum = [0.0; 4];
        m16n8k8_tf32(&mut sum, a_low, b_high);
        m16n8k8_tf32(&mut sum, a_high, b_low);
        m16n8k8_tf32(&mut sum, a_high, b_high);
        add_here(&mut c[0], sum[0]);
        add_here(&mut c[1], sum[1]);
        add_here(&mut c[2], sum[2]);
        add_here(&mut c[3], sum[3]);
    }
}

/// `c += x`, where it stands: LLVM would put off the additions of many products to the end
/// and keep all their terms in registers until then.
#[inline(always)]
fn add_here(c: &mut f32, x: f32) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: arithmetic between registers. Not `pure`, so that it stays behind its product.
    unsafe {
        core::arch::asm!("add.rn.f32 {0}, {0}, {1};", inout(reg32) *c, in(reg32) x,
            options(nomem, nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        *c += x;
    }
}

/// The contents of the registers of A and B, and how a tensor core sums their products.
#[cfg(not(target_arch = "nvptx64"))]
trait Elements {
    /// Elements of a register.
    const COUNT: usize;

    /// The elements of a register, the first [`COUNT`](Self::COUNT) of these.
    fn widen(bits: u32) -> [f32; 2];

    /// `C += A B`, all in f32, where products of two elements are exact.
    fn add<const K: usize>(c: &mut [[f32; 8]; 16], a: &[[f32; K]; 16], b: &[[f32; 8]; K]);
}

#[cfg(not(target_arch = "nvptx64"))]
struct HalvesF16;
#[cfg(not(target_arch = "nvptx64"))]
impl Elements for HalvesF16 {
    const COUNT: usize = 2;

    #[inline(always)]
    fn widen(bits: u32) -> [f32; 2] {
        [bits as u16, (bits >> 16) as u16].map(widen_f16)
    }
    #[inline(always)]
    fn add<const K: usize>(c: &mut [[f32; 8]; 16], a: &[[f32; K]; 16], b: &[[f32; 8]; K]) {
        add_in_order(c, a, b);
    }
}

#[cfg(not(target_arch = "nvptx64"))]
struct HalvesBf16;
#[cfg(not(target_arch = "nvptx64"))]
impl Elements for HalvesBf16 {
    const COUNT: usize = 2;

    #[inline(always)]
    fn widen(bits: u32) -> [f32; 2] {
        [f32::from_bits(bits << 16), f32::from_bits(bits & 0xffff_0000)]
    }
    #[inline(always)]
    fn add<const K: usize>(c: &mut [[f32; 8]; 16], a: &[[f32; K]; 16], b: &[[f32; 8]; K]) {
        add_in_order(c, a, b);
    }
}

#[cfg(not(target_arch = "nvptx64"))]
struct WholeTf32;
#[cfg(not(target_arch = "nvptx64"))]
impl Elements for WholeTf32 {
    const COUNT: usize = 1;

    #[inline(always)]
    fn widen(bits: u32) -> [f32; 2] {
        [f32::from_bits(bits & !TF32_BEYOND), 0.0]
    }
    #[inline(always)]
    fn add<const K: usize>(c: &mut [[f32; 8]; 16], a: &[[f32; K]; 16], b: &[[f32; 8]; K]) {
        add_cut(c, a, b);
    }
}

/// `C += A B` in f32, in the order of k. A GPU promises no order; next to what rounding a
/// factor to 16 bits does that is little.
#[cfg(not(target_arch = "nvptx64"))]
fn add_in_order<const K: usize>(c: &mut [[f32; 8]; 16], a: &[[f32; K]; 16], b: &[[f32; 8]; K]) {
    for (c, a) in c.iter_mut().zip(a) {
        for (a, b) in a.iter().zip(b) {
            for (c, b) in c.iter_mut().zip(b) {
                *c += a * b;
            }
        }
    }
}

/// `C += A B` as a tensor core does it: all terms of an element are brought under the
/// exponent of the largest, cut off one bit below an f32's last, and their sum is cut to an
/// f32. Nothing is rounded, so that errors add up, towards 0. Source: Fasi, Higham, Mikaitis
/// and Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021, section 4.
#[cfg(not(target_arch = "nvptx64"))]
fn add_cut<const K: usize>(c: &mut [[f32; 8]; 16], a: &[[f32; K]; 16], b: &[[f32; 8]; K]) {
    for (c, a) in c.iter_mut().zip(a) {
        for (n, c) in c.iter_mut().enumerate() {
            *c = sum_cut(*c, &std::array::from_fn::<_, K, _>(|k| a[k] * b[k][n]));
        }
    }
}

/// `c` and the terms, added as [`add_cut`] says.
#[cfg(not(target_arch = "nvptx64"))]
fn sum_cut(c: f32, terms: &[f32]) -> f32 {
    let plain = terms.iter().fold(c, |sum, t| sum + t);
    let largest = terms.iter().fold(c.abs(), |most, t| most.max(t.abs()));
    if largest == 0.0 || !plain.is_finite() {
        return plain;
    }
    let exponent = u64::from(largest.to_bits() >> 23);
    // An f32's last bit is worth 2^(exponent - 127 - 23), the last that is kept half of that. No term
    // has more than 25 bits above it.
    let power_of_two = |power: u64| f64::from_bits(power << 52);
    let unit = power_of_two(1023 - 127 - 24 + exponent);
    let units = power_of_two(1023 + 127 + 24 - exponent);
    let cut = |term: f32| (f64::from(term) * units) as i32;
    let sum = f64::from(terms.iter().fold(cut(c), |sum, &t| sum + cut(t))) * unit;
    let rounded = sum as f32;
    let is_too_large = f64::from(rounded).abs() > sum.abs();
    if is_too_large { f32::from_bits(rounded.to_bits() - 1) } else { rounded }
}

/// `C += A B` as a collective.
#[cfg(not(target_arch = "nvptx64"))]
fn product<E: Elements, const K: usize, const A: usize, const B: usize>(
    name: &'static str,
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
            call.whole_warp(name, at)?;
            let (mut a, mut b, mut c) = ([[0.0; K]; 16], [[0.0; 8]; K], [[0.0; 8]; 16]);
            for lane in 0..32 {
                let (g, t) = (lane / 4, lane % 4);
                let input = &call.input[lane];
                for (i, &register) in input[4..4 + A].iter().enumerate() {
                    let (row, column) = (g + 8 * (i % 2), E::COUNT * (t + 4 * (i / 2)));
                    for (e, value) in E::widen(register)[..E::COUNT].iter().enumerate() {
                        a[row][column + e] = *value;
                    }
                }
                for (i, &register) in input[8..8 + B].iter().enumerate() {
                    for (e, value) in E::widen(register)[..E::COUNT].iter().enumerate() {
                        b[E::COUNT * (t + 4 * i) + e][g] = *value;
                    }
                }
                for (i, &register) in input[..4].iter().enumerate() {
                    c[g + 8 * (i / 2)][2 * t + i % 2] = f32::from_bits(register);
                }
            }
            E::add(&mut c, &a, &b);
            let counts = Counts {
                // 16 x 8 elements of C, each of K products and additions.
                tensor_flops: 2 * 16 * 8 * K as u64,
                tensor_instructions: 1,
                ..Counts::default()
            };
            call.block.record_together((call.warp, call.mask), Action::Mma, counts, at);
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
