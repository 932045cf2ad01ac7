//! The shaping of a score before the softmax: softcap, ALiBi, a bias; and the sink, which joins the
//! sum without a key.
//!
//! ```text
//! s = scale * q · k;  s = cap * tanh(s / cap);  s -= slope * |i + Nk - Nq - j|;  s += bias[i, j]
//! ```
//!
//! Sources: Gemma Team, "Gemma 2", 2024 (softcap); Press et al., "Train Short, Test Long", 2022
//! (ALiBi); Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2024.

use core::f32::consts::LOG2_E;

use simt::{global::Global, math, scalar::Scalar, unroll};

use super::Policy;
use crate::{
    args::Scores,
    constants::Constants,
    parts::{fragment, softmax},
};

/// Calls `$body` for each of a lane's scores: `$fragment` of 16 rows, `$r` of its two rows, `$column`
/// counted from the lane's first key.
macro_rules! for_each_score {
    ($s:ident, |$score:ident, $fragment:ident, $r:ident, $column:ident| $body:block) => {
        unroll!(for FRAGMENT in 0..2 {
            if FRAGMENT < F {
                unroll!(for TILE in 0..16 {
                    if TILE < N {
                        unroll!(for E in 0..4 {
                            let ($fragment, $r, $column) = (FRAGMENT, E / 2, 8 * TILE + E % 2);
                            let $score = &mut $s[FRAGMENT][TILE][E];
                            $body
                        });
                    }
                });
            }
        });
    };
}

impl Policy {
    /// Whether scores are more than `q · k` times the scale.
    #[inline(always)]
    #[must_use]
    pub fn shapes_scores() -> bool {
        Constants::softcap() != 0 || Constants::alibi() != 0 || Self::is_biased()
    }

    /// Whether a bias joins the scores. One of -inf hides its key.
    #[inline(always)]
    #[must_use]
    pub fn is_biased() -> bool {
        Constants::bias() != 0
    }

    /// The factor that turns a score into log2 units, after [`shape_score`](Self::shape_score) or
    /// [`shape_scores`](Self::shape_scores).
    #[inline(always)]
    #[must_use]
    pub fn scale_log2(&self) -> f32 {
        Self::scale_log2_of(&self.scores)
    }

    /// As [`scale_log2`](Self::scale_log2), of any head.
    #[inline(always)]
    #[must_use]
    pub fn scale_log2_of(scores: &Scores) -> f32 {
        if Self::shapes_scores() { LOG2_E } else { scores.scale_log2 }
    }

    /// The score of row `i` and key `j` in natural units, of `s` times `scale`. As it is, if
    /// nothing shapes scores.
    #[inline(always)]
    #[must_use]
    pub fn shape_score<T: Scalar>(&self, s: f32, scale: f32, i: u32, j: u32) -> f32 {
        if !Self::shapes_scores() {
            return s;
        }
        let mut s = self.capped::<T>(s, scale);
        if Constants::alibi() != 0 {
            s = math::fma(self.slope(), self.distance(i, j).abs(), s);
        }
        if Self::is_biased() {
            s += self.bias::<T>(i).read(j);
        }
        s
    }

    /// The derivative of [`shape_score`](Self::shape_score) with the launch's scale, by `s` times that
    /// scale: what a score's gradient is multiplied by. 1 without a cap.
    #[inline(always)]
    #[must_use]
    pub fn score_slope<T: Scalar>(&self, s: f32) -> f32 {
        if Constants::softcap() == 0 {
            return 1.0;
        }
        let tanh = self.tanh::<T>(s, self.scores.scale);
        math::fma(-tanh, tanh, 1.0)
    }

    /// As [`shape_score`](Self::shape_score), with the launch's scale, of a lane's scores: `i` is the
    /// row of the first, `j` its key; the fragments are 16 rows each.
    #[inline(always)]
    pub fn shape_scores<T: Scalar, const N: usize, const F: usize>(
        &self,
        s: &mut [[[f32; 4]; N]; F],
        i: u32,
        j: u32,
    ) {
        if !Self::shapes_scores() {
            return;
        }
        // One question a tile and kind: the text would have a branch for each score otherwise.
        for_each_score!(s, |score, _fragment, _r, _column| {
            *score = self.capped::<T>(*score, self.scores.scale);
        });
        if Constants::alibi() != 0 {
            let slope = self.slope();
            let first = self.distance(i, j);
            for_each_score!(s, |score, fragment, r, column| {
                let below = (fragment as u32 * fragment::ROWS + 8 * r as u32) as f32;
                let distance = first + (below - column as f32);
                *score = math::fma(slope, distance.abs(), *score);
            });
        }
        if Self::is_biased() {
            unroll!(for FRAGMENT in 0..2 {
                if FRAGMENT < F {
                    unroll!(for R in 0..2 {
                        let i = i + FRAGMENT as u32 * fragment::ROWS + 8 * R as u32;
                        let bias = self.bias::<T>(i);
                        unroll!(for TILE in 0..16 {
                            if TILE < N {
                                unroll!(for E in 0..2 {
                                    let column = (8 * TILE + E) as u32;
                                    s[FRAGMENT][TILE][2 * R + E] += bias.read(j + column);
                                });
                            }
                        });
                    });
                }
            });
        }
    }

    /// As [`shape_scores`](Self::shape_scores), of the scores of one of a lane's two rows, `r`: rows of one
    /// fragment may be of several heads. A bias is left out.
    #[inline(always)]
    pub fn shape_row<T: Scalar, const N: usize>(
        &self,
        s: &mut [[f32; 4]; N],
        r: usize,
        i: u32,
        j: u32,
    ) {
        unroll!(for TILE in 0..16 {
            if TILE < N {
                unroll!(for E in 0..2 {
                    s[TILE][2 * r + E] = self.capped::<T>(s[TILE][2 * r + E], self.scores.scale);
                });
            }
        });
        if Constants::alibi() != 0 {
            let slope = self.slope();
            let first = self.distance(i, j);
            unroll!(for TILE in 0..16 {
                if TILE < N {
                    unroll!(for E in 0..2 {
                        let distance = first - (8 * TILE + E) as f32;
                        s[TILE][2 * r + E] = math::fma(slope, distance.abs(), s[TILE][2 * r + E]);
                    });
                }
            });
        }
    }

    /// Whether scores are capped.
    #[inline(always)]
    #[must_use]
    pub fn caps_scores() -> bool {
        Constants::softcap() != 0
    }

    /// As [`shape_scores`](Self::shape_scores), of scores that are transposed: element `[n][e]` is that
    /// of row `i + 8 n + e % 2` and key `j + 8 (e / 2)`.
    #[inline(always)]
    pub fn shape_transposed<T: Scalar, const N: usize>(
        &self,
        s: &mut [[f32; 4]; N],
        i: u32,
        j: u32,
    ) {
        let scale = self.scores.scale;
        if Self::caps_scores() {
            unroll!(for TILE in 0..16 {
                if TILE < N {
                    unroll!(for E in 0..4 {
                        s[TILE][E] = self.capped::<T>(s[TILE][E], scale);
                    });
                }
            });
        } else {
            unroll!(for TILE in 0..16 {
                if TILE < N {
                    unroll!(for E in 0..4 {
                        s[TILE][E] *= scale;
                    });
                }
            });
        }
        if Constants::alibi() != 0 {
            let slope = self.slope();
            let first = self.distance(i, j);
            unroll!(for TILE in 0..16 {
                if TILE < N {
                    unroll!(for E in 0..4 {
                        let further = (8 * TILE + E % 2) as f32 - (E / 2 * 8) as f32;
                        s[TILE][E] = math::fma(slope, (first + further).abs(), s[TILE][E]);
                    });
                }
            });
        }
        if Self::is_biased() {
            unroll!(for TILE in 0..16 {
                if TILE < N {
                    unroll!(for E in 0..2 {
                        let bias = self.bias::<T>(i + (8 * TILE + E) as u32);
                        s[TILE][E] += bias.read(j);
                        s[TILE][2 + E] += bias.read(j + 8);
                    });
                }
            });
        }
    }

    /// A score times the scale, capped.
    #[inline(always)]
    fn capped<T: Scalar>(&self, s: f32, scale: f32) -> f32 {
        if Constants::softcap() == 0 {
            return s * scale;
        }
        self.tanh::<T>(s, scale) * self.scores.softcap
    }

    /// The tangent of a score's cap.
    #[inline(always)]
    fn tanh<T: Scalar>(&self, s: f32, scale: f32) -> f32 {
        // One product by both the scale and 1 / cap.
        let s = s * (scale * self.scores.inverse_softcap);
        // 11 bits are what 16-bit scores had.
        if T::BYTES < 4 { math::tanh_approx(s) } else { math::tanh(s) }
    }

    /// The factor of the distance: less than 0 for a slope above 0.
    #[inline(always)]
    fn slope(&self) -> f32 {
        let slopes = self.scores.alibi;
        // SAFETY: `Policy::new` asks that the slopes, if there are any, have their shape.
        let of_heads: Global<f32> = unsafe { slopes.buffer.view() };
        -of_heads.read(self.head.b as u64 * slopes.stride_b + self.head.h as u64)
    }

    /// `i + Nk - Nq - j`.
    #[inline(always)]
    fn distance(&self, i: u32, j: u32) -> f32 {
        // Between -2^31 and 2^31: the sum may wrap, the difference is right.
        let ahead = i.wrapping_add(self.head.seq_k).wrapping_sub(self.head.seq_q).wrapping_sub(j);
        ahead as i32 as f32
    }

    /// The bias of row `i`, or of the last row.
    #[inline(always)]
    fn bias<T: Scalar>(&self, i: u32) -> BiasRow<T> {
        let (bias, head) = (self.scores.bias, self.head);
        let of_head = head.b as u64 * bias.stride_b + head.h as u64 * bias.stride_h;
        let i = i.min(self.head.seq_q - 1);
        let first = of_head + i as u64 * bias.stride_q;
        // SAFETY: `Policy::new` asks that the bias, if there is one, has its shape.
        let first = unsafe { bias.buffer.view::<T>() }.skip(first);
        BiasRow { first, stride: bias.stride_k, last: self.head.seq_k.saturating_sub(1) }
    }

    /// Whether each head has a sink.
    #[inline(always)]
    #[must_use]
    pub fn has_sink() -> bool {
        Constants::sinks() != 0
    }

    /// Lets the head's sink join a row: its maximum in log2 units, its sum, and what its weights are
    /// to be multiplied by, since the maximum may be another.
    #[inline(always)]
    #[must_use]
    pub fn with_sink(&self, m_i: f32, l_i: f32) -> (f32, f32, f32) {
        if !Self::has_sink() {
            return (m_i, l_i, 1.0);
        }
        // SAFETY: `Policy::new` asks that the sinks, if there are any, have their shape.
        let sinks: Global<f32> = unsafe { self.scores.sinks.view() };
        let sink = sinks.read(self.head.h as u64) * LOG2_E;
        let m_new = math::max(m_i, sink);
        let used = softmax::safe_max(m_new);
        let factor = math::exp2(m_i - used);
        (m_new, math::fma(l_i, factor, math::exp2(sink - used)), factor)
    }
}

/// The bias of a row.
#[derive(Clone, Copy)]
struct BiasRow<T> {
    first: Global<T>,
    stride: u64,
    /// The last key.
    last: u32,
}

impl<T: Scalar> BiasRow<T> {
    /// The bias of key `j`, or of the last one.
    #[inline(always)]
    fn read(self, j: u32) -> f32 {
        self.first.read(j.min(self.last) as u64 * self.stride).to_f32()
    }
}
