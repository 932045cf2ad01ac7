//! Exponential and hyperbolic tangent without branches and calls: loops over them become vector
//! instructions.

use std::f32::consts::LOG2_E;

/// Added to a number below 2^22, it leaves the nearest integer in the low bits: 1.5 * 2^23.
const TO_INTEGER: f32 = 12_582_912.0;
/// `ln 2` in 9 bits, whose product with a small integer is exact, and the rest.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = (std::f64::consts::LN_2 - LN_2_HIGH as f64) as f32;

/// `(ln 2)^k / k!`: the Taylor series of `2^f`. At `|f| <= 1/2` the first term left out is 5e-9.
const EXP2: [f32; 8] = {
    let mut terms = [1.0; 8];
    let (mut k, mut term) = (1, 1.0);
    while k < 8 {
        term *= std::f64::consts::LN_2 / k as f64;
        terms[k] = term as f32;
        k += 1;
    }
    terms
};
/// `1 / k!` for `k` from 1 on: the Taylor series of `(e^r - 1) / r`.
const EXPM1: [f32; 7] = {
    let mut terms = [1.0; 7];
    let (mut k, mut term) = (1, 1.0);
    while k < 7 {
        term /= (k + 1) as f64;
        terms[k] = term as f32;
        k += 1;
    }
    terms
};

#[inline(always)]
fn polynomial<const N: usize>(terms: [f32; N], x: f32) -> f32 {
    let mut sum = terms[N - 1];
    let mut k = N - 1;
    while k > 0 {
        k -= 1;
        sum = sum * x + terms[k];
    }
    sum
}

/// `2^x` for `x` up to 127, within 2 units in the last place; 0 below `2^-125`. NaN stays.
#[inline(always)]
pub fn exp2(x: f32) -> f32 {
    let shifted = x + TO_INTEGER;
    let fraction = x - (shifted - TO_INTEGER);
    // The integer joins the exponent.
    let bits = polynomial(EXP2, fraction).to_bits().wrapping_add(shifted.to_bits() << 23);
    // `x * 0` is NaN where x is.
    let y = f32::from_bits(bits) + x * 0.0;
    if x < -125.0 { 0.0 } else { y }
}

/// `tanh x`, within a few units in the last place. NaN stays.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    // tanh 10 rounds to 1.
    let a = if x.abs() > 10.0 { 10.0 } else { x.abs() };
    // e^2a - 1 = 2^n (e^r - 1) + (2^n - 1), and tanh a = (e^2a - 1) / (e^2a + 1).
    let shifted = 2.0 * a * LOG2_E + TO_INTEGER;
    let n = shifted - TO_INTEGER;
    let r = (2.0 * a - n * LN_2_HIGH) - n * LN_2_LOW;
    let power = f32::from_bits((127u32 << 23).wrapping_add(shifted.to_bits() << 23));
    let e = power * (r * polynomial(EXPM1, r)) + (power - 1.0);
    if x.is_nan() { x } else { (e / (e + 2.0)).copysign(x) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Units in the last place of the right value.
    fn ulps(actual: f32, expected: f64) -> f64 {
        let unit = f64::from(f32::EPSILON) * expected.abs().max(f64::from(f32::MIN_POSITIVE));
        (f64::from(actual) - expected).abs() / unit
    }

    #[test]
    fn exp2_is_right_within_two_units() {
        let steps = (-1250..=1270).map(|i| i as f32 * 0.1);
        let worst = steps.map(|x| ulps(exp2(x), f64::from(x).exp2())).fold(0.0, f64::max);
        assert!(worst < 2.0, "{worst}");
        assert_eq!((exp2(0.0), exp2(1.0), exp2(-126.0)), (1.0, 2.0, 0.0));
        assert_eq!(exp2(f32::NEG_INFINITY), 0.0);
        assert!(exp2(f32::NAN).is_nan() && exp2(f32::from_bits(0x7fc0_1234)).is_nan());
    }

    #[test]
    fn tanh_is_right_within_four_units() {
        let steps = (-12_000..=12_000).map(|i| i as f32 * 1e-3);
        let tiny = (1..40).map(|i| (-i as f32).exp2());
        let worst =
            steps.chain(tiny).map(|x| ulps(tanh(x), f64::from(x).tanh())).fold(0.0, f64::max);
        assert!(worst < 4.0, "{worst}");
        assert_eq!((tanh(0.0), tanh(1e6), tanh(f32::NEG_INFINITY)), (0.0, 1.0, -1.0));
        assert!(tanh(f32::NAN).is_nan());
    }
}
