//! Arithmetic with the same meaning on both targets.
//!
//! Nothing is fused or approximated unless a function here says so: rustc's nvptx
//! backend has no fast-math.

#[cfg(not(target_arch = "nvptx64"))]
use std::panic::Location;

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator::{record, recording};

/// `a * b + c`, rounded once.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    #[cfg(target_arch = "nvptx64")]
    {
        core::intrinsics::fmaf32(a, b, c)
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        if record::is_on() {
            recording::math(2, 0, Location::caller());
        }
        a.mul_add(b, c)
    }
}

/// One instruction of one operand on a GPU, the standard library's function on the host.
macro_rules! unary {
    ($($(#[$doc:meta])* $name:ident, $text:literal, $host:expr;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        #[must_use]
        #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
        pub fn $name(x: f32) -> f32 {
            #[cfg(target_arch = "nvptx64")]
            {
                let result: f32;
                // SAFETY: arithmetic between registers.
                unsafe {
                    core::arch::asm!($text, out(reg32) result, in(reg32) x, options(pure, nomem, nostack));
                }
                result
            }
            #[cfg(not(target_arch = "nvptx64"))]
            {
                if record::is_on() {
                    recording::math(0, 1, Location::caller());
                }
                $host(x)
            }
        }
    )*};
}

unary! {
    /// 2 to the power of `x`; 2 ulp on a GPU, subnormal results become 0.
    exp2, "ex2.approx.ftz.f32 {0}, {1};", f32::exp2;
    /// Logarithm to base 2; absolute error below 2^-22 near 1 on a GPU.
    log2, "lg2.approx.ftz.f32 {0}, {1};", f32::log2;
    /// `1 / x`; 1 ulp on a GPU.
    rcp, "rcp.approx.ftz.f32 {0}, {1};", |x: f32| 1.0 / x;
    /// `1 / sqrt(x)`; 2 ulp on a GPU.
    rsqrt, "rsqrt.approx.ftz.f32 {0}, {1};", |x: f32| 1.0 / x.sqrt();
    /// Hyperbolic tangent; relative error 2^-11 on a GPU, as much as f16 rounds. From sm_75 on.
    tanh_approx, "tanh.approx.f32 {0}, {1};", f32::tanh;
}

/// Hyperbolic tangent with the digits of f32: 3 ulp.
#[inline(always)]
#[must_use]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn tanh(x: f32) -> f32 {
    // tanh(x) = x + x^3 p(x^2): interpolated at the Chebyshev nodes of x^2 in [0, 0.36].
    const P: [f32; 5] = [-0.333_333_3, 0.133_329_15, -0.053_873_95, 0.021_110_96, -0.006_269_12];
    const SMALL: f32 = 0.6;
    let (magnitude, square) = (x.abs(), x * x);
    let p = fma(fma(fma(fma(P[4], square, P[3]), square, P[2]), square, P[1]), square, P[0]);
    let near = fma(x * square, p, x);
    // Where the exponential overflows, 1 is left.
    let e = exp2(magnitude * const { 2.0 * core::f32::consts::LOG2_E });
    let far = fma(-2.0, rcp(e + 1.0), 1.0).copysign(x);
    if magnitude < SMALL { near } else { far }
}

/// The larger of two values; the other one if one is NaN.
#[inline(always)]
#[must_use]
pub fn max(a: f32, b: f32) -> f32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let result: f32;
        // SAFETY: arithmetic between registers.
        unsafe {
            core::arch::asm!("max.f32 {0}, {1}, {2};", out(reg32) result, in(reg32) a, in(reg32) b,
                options(pure, nomem, nostack));
        }
        result
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        a.max(b)
    }
}

/// The high 32 bits of `a * b`, with which Philox mixes.
#[inline(always)]
#[must_use]
pub const fn mul_hi(a: u32, b: u32) -> u32 {
    ((a as u64 * b as u64) >> 32) as u32
}
