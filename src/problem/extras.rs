//! The tensors that a problem may have beside Q, K and V.

use super::Problem;
use crate::{dtype::DType, error::Error};

/// The tensors that a problem may have beside Q, K and V, each present where the problem has it: as
/// bytes, in device memory, or as any `T`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extras<T> {
    /// Padding mask, u8 `[B, Nk]`, 0 = hidden.
    pub mask: Option<T>,
    /// Slopes of ALiBi, f32 `[H]` or `[B, H]`.
    pub alibi_slopes: Option<T>,
    /// Additive bias, `[B or 1, H or 1, Nq, Nk]` in the storage type.
    pub bias: Option<T>,
    /// Sinks, f32 `[H]`.
    pub sinks: Option<T>,
    /// The rows of Q at which packed sequences begin, and the end of the last: u32 `[B + 1]`.
    pub cu_seqlens_q: Option<T>,
    /// The same in K and V.
    pub cu_seqlens_k: Option<T>,
}

impl<T> Default for Extras<T> {
    /// No tensors.
    fn default() -> Self {
        Self {
            mask: None,
            alibi_slopes: None,
            bias: None,
            sinks: None,
            cu_seqlens_q: None,
            cu_seqlens_k: None,
        }
    }
}

impl<T> Extras<T> {
    /// The padding mask, and nothing else.
    #[must_use]
    pub fn mask(mask: Option<T>) -> Self {
        Self { mask, ..Self::default() }
    }

    /// References to the tensors.
    #[must_use]
    pub const fn as_ref(&self) -> Extras<&T> {
        let Self { mask, alibi_slopes, bias, sinks, cu_seqlens_q, cu_seqlens_k } = self;
        Extras {
            mask: mask.as_ref(),
            alibi_slopes: alibi_slopes.as_ref(),
            bias: bias.as_ref(),
            sinks: sinks.as_ref(),
            cu_seqlens_q: cu_seqlens_q.as_ref(),
            cu_seqlens_k: cu_seqlens_k.as_ref(),
        }
    }

    /// Maps each tensor with `make`.
    ///
    /// # Errors
    /// The first error of `make`.
    pub fn try_map<U, E>(self, mut make: impl FnMut(T) -> Result<U, E>) -> Result<Extras<U>, E> {
        let Self { mask, alibi_slopes, bias, sinks, cu_seqlens_q, cu_seqlens_k } = self;
        Ok(Extras {
            mask: mask.map(&mut make).transpose()?,
            alibi_slopes: alibi_slopes.map(&mut make).transpose()?,
            bias: bias.map(&mut make).transpose()?,
            sinks: sinks.map(&mut make).transpose()?,
            cu_seqlens_q: cu_seqlens_q.map(&mut make).transpose()?,
            cu_seqlens_k: cu_seqlens_k.map(&mut make).transpose()?,
        })
    }

    /// Checks that each tensor is present exactly where the problem has it, and checks the present
    /// tensors by `check`: name, bytes of an element, shape.
    pub(crate) fn check(
        &self,
        p: &Problem,
        check: impl Fn(&'static str, usize, &[usize], &T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let f32_size = DType::F32.size();
        for (what, context, given, size, shape) in [
            ("mask", "a padding mask", &self.mask, 1, p.mask_shape()),
            ("alibi_slopes", "ALiBi", &self.alibi_slopes, f32_size, p.alibi_shape()),
            ("bias", "a bias", &self.bias, p.dtype().size(), p.bias_shape()),
            ("sinks", "sinks", &self.sinks, f32_size, p.sinks_shape()),
            ("cu_seqlens_q", "packed sequences", &self.cu_seqlens_q, 4, p.cu_seqlens_shape()),
            ("cu_seqlens_k", "packed sequences", &self.cu_seqlens_k, 4, p.cu_seqlens_shape()),
        ] {
            match (given, shape) {
                (None, Some(_)) => {
                    let context = format!(": the problem has {context}");
                    return Err(Error::MissingTensor { what: what.into(), context });
                }
                (Some(_), None) => return Err(Error::UnexpectedTensor { what: what.into() }),
                (Some(given), Some(shape)) => check(what, size, &shape, given)?,
                (None, None) => {}
            }
        }
        Ok(())
    }
}
