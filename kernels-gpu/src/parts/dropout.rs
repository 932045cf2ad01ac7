//! Dropout of attention weights by Philox 4x32-10.
//!
//! The draw for a weight depends on its position alone: (seed, b, h, i, j). So every
//! kernel drops the same weights, whatever its tiles, and a backward pass can draw them
//! again. Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as
//! 1, 2, 3" (SC 2011), section 4.3 and table 2.

use simt::math::mul_hi;

use crate::args::DropoutArgs;

/// Multipliers of Philox 4x32.
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// The increments of the key per round: the golden ratio and sqrt(3) - 1.
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
/// Rounds that pass the statistical tests with a margin.
const ROUNDS: u32 = 10;

/// Four 32-bit draws for one counter and key.
#[inline(always)]
#[must_use]
pub const fn philox4x32(key: u64, counter: [u32; 4]) -> [u32; 4] {
    let (mut k0, mut k1) = (key as u32, (key >> 32) as u32);
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let mut round = 0;
    while round < ROUNDS {
        let (high0, low0) = (mul_hi(MULTIPLIERS[0], c0), MULTIPLIERS[0].wrapping_mul(c0));
        let (high1, low1) = (mul_hi(MULTIPLIERS[1], c2), MULTIPLIERS[1].wrapping_mul(c2));
        (c0, c1, c2, c3) = (high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0);
        k0 = k0.wrapping_add(WEYL[0]);
        k1 = k1.wrapping_add(WEYL[1]);
        round += 1;
    }
    [c0, c1, c2, c3]
}

/// The draws for the weights `(b, h, i, j)` with `j` = `4 * j4 .. 4 * j4 + 4`.
#[inline(always)]
#[must_use]
pub const fn draws(seed: u64, b: u32, h: u32, i: u32, j4: u32) -> [u32; 4] {
    philox4x32(seed, [j4, i, h, b])
}

/// Whether weight `(b, h, i, j)` is kept.
#[inline(always)]
#[must_use]
pub const fn keeps(dropout: &DropoutArgs, b: u32, h: u32, i: u32, j: u32) -> bool {
    let draws = draws(dropout.seed, b, h, i, j / 4);
    // A choice by comparison, not by index: an index at run time would put the
    // draws into local memory.
    let low = if j % 2 == 0 { draws[0] } else { draws[1] };
    let high = if j % 2 == 0 { draws[2] } else { draws[3] };
    (if j % 4 < 2 { low } else { high }) >= dropout.threshold
}

/// Weight `p` of `(b, h, i, j)` after dropout: 0, or scaled up.
#[inline(always)]
#[must_use]
pub const fn apply(dropout: &DropoutArgs, (b, h, i, j): (u32, u32, u32, u32), p: f32) -> f32 {
    if dropout.threshold == 0 {
        return p;
    }
    if keeps(dropout, b, h, i, j) { p * dropout.rescale } else { 0.0 }
}

/// The threshold below which a draw drops its weight, for a probability in [0, 1).
#[must_use]
pub fn threshold(probability: f32) -> u32 {
    // 2^32 draws; f64 holds the product exactly enough, and it stays below 2^32.
    (f64::from(probability) * 4_294_967_296.0) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that come with the paper's Random123 library.
    #[test]
    fn philox_gives_the_published_answers() {
        assert_eq!(philox4x32(0, [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox4x32(u64::MAX, [u32::MAX; 4]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32(0x299f_31d0_a409_3822, [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn as_many_are_dropped_as_asked_for() {
        let dropout = DropoutArgs { seed: 42, threshold: threshold(0.1), rescale: 1.0 / 0.9 };
        let dropped = (0..100).flat_map(|i| (0..1000).map(move |j| (i, j)));
        let dropped = dropped.filter(|&(i, j)| !keeps(&dropout, 1, 2, i, j)).count();
        // 100,000 draws: the standard deviation of the count is 95.
        assert!((9_500..10_500).contains(&dropped), "{dropped} of 100000");
    }
}
