//! The arithmetic of the softmax, shared by the rungs.
//!
//! But for `standard`, maxima are in units of log2(e), `exp(s * scale) = exp2(s * scale_log2)`,
//! so that one fma and one `ex2` give a weight. A row carries its running maximum `m_i` and
//! its running sum `l_i`. Source: Dao et al., "FlashAttention", 2022, algorithm 1;
//! Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.

use simt::math;

/// Natural logarithm of 2: turns a log2 into a natural logarithm.
pub const LN_2: f32 = core::f32::consts::LN_2;

/// Products of a score in f32 that are summed by themselves first. The rounding of each step
/// is as large as the sum so far: of D = 64 products, four short sums leave 0.6 of the error of
/// a long one, for one addition more in 16. Kernels that sum the same way get the same score,
/// which is what weights that are computed again from an LSE ask for.
pub const SPAN: usize = 16;

/// Growth of a row's maximum, in units of log2(e), that is let pass: weights are then at
/// most 2^8, which f16 and bf16 hold with the same relative error as 1.
pub const SLACK: f32 = 8.0;

/// Unit of scores that are kept in the storage type: f16 ends at 65,504, and then at a score of
/// 2^20. A power of two, so that nothing rounds otherwise: only scores below 2^-10 lose digits,
/// at most 2^-21 of a score, where a weight in f16 has 2^-11.
pub const STORED_UNIT: f32 = 16.0;

/// The maximum to subtract: 0 for a row that has seen no key, whose maximum is -inf,
/// so that `-inf - m` stays -inf instead of becoming NaN.
#[inline(always)]
#[must_use]
pub fn safe_max(m_i: f32) -> f32 {
    if m_i == f32::NEG_INFINITY { 0.0 } else { m_i }
}

/// The sum of a row's weights, or NaN where none is left though the row sees a key: its scores
/// are past what f32 or the storage type holds. It must not look like a row without keys.
#[inline(always)]
#[must_use]
pub fn checked_sum(l_i: f32, sees_a_key: impl FnOnce() -> bool) -> f32 {
    if l_i == 0.0 && sees_a_key() { f32::NAN } else { l_i }
}

/// The largest score in units of log2(e), 2^26 in natural ones, that [`checked_fused_sum`] lets
/// pass. One fma takes the scale and the maximum, which is itself rounded, by at most 4 below 2^27:
/// all weights of a row are then larger or smaller by the same factor, at most 2^4, which the
/// division by their sum takes out. From 2^27 on f16 might not hold them.
const MAX_FUSED: f32 = (1 << 27) as f32;

/// [`checked_sum`] where scale and maximum go into one fma: NaN also for a row whose maximum is
/// past 2^26 in natural units.
#[inline(always)]
#[must_use]
pub fn checked_fused_sum(m_i: f32, l_i: f32, sees_a_key: impl FnOnce() -> bool) -> f32 {
    let holds = m_i.abs() < MAX_FUSED || l_i == 0.0;
    checked_sum(if holds { l_i } else { f32::NAN }, sees_a_key)
}

/// `1 / l_i`, and 0 for a row that has seen no key: its output is 0.
#[inline(always)]
#[must_use]
pub fn normaliser(l_i: f32) -> f32 {
    if l_i == 0.0 { 0.0 } else { 1.0 / l_i }
}

/// Log-sum-exp in natural units from a maximum in log2 units; -inf for a row that has
/// seen no key. The logarithm of the sum is small: its roundings are too, and the maximum
/// takes only one.
#[inline(always)]
#[must_use]
pub fn log_sum_exp(m_i: f32, l_i: f32) -> f32 {
    if l_i == 0.0 { f32::NEG_INFINITY } else { math::fma(m_i, LN_2, math::log2(l_i) * LN_2) }
}

/// Log-sum-exp from a maximum in natural units; -inf for a row that has seen no key.
#[inline(always)]
#[must_use]
pub fn log_sum_exp_natural(m_i: f32, l_i: f32) -> f32 {
    if l_i == 0.0 { f32::NEG_INFINITY } else { math::fma(math::log2(l_i), LN_2, m_i) }
}
