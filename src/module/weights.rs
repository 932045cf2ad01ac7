//! The parameters of a module on the host, and their file.

#[cfg(feature = "safetensors")]
mod file;
#[cfg(feature = "safetensors")]
mod state_dict;

use crate::{dtype::DType, error::Error, tensor::Tensor};

/// Standard deviation of random biases: the size of a trained module's biases. Zeros would hide a
/// bias that is left out.
#[cfg(feature = "verify")]
const RANDOM_BIAS: f64 = 0.1;

/// A projection with bias: `y = x wᵀ + bias`, PyTorch's `nn.Linear`.
#[derive(Clone, Debug, PartialEq)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Tensor,
    /// `[out]`.
    pub bias: Tensor,
}

/// The four projections of a module, `[hidden, hidden]` each, of one storage type.
#[derive(Clone, Debug, PartialEq)]
pub struct Weights {
    projections: [Linear; 4],
}

impl Weights {
    /// Names of the projections in a `state_dict`, in the order of [`Weights::projections`].
    pub const NAMES: [&str; 4] = ["q_proj", "k_proj", "v_proj", "out_proj"];

    /// The projections of queries, keys, values and output.
    ///
    /// # Errors
    /// An error that names the tensor whose shape or storage type does not fit the weight of the
    /// first projection, which must be square.
    pub fn new(projections: [Linear; 4]) -> Result<Self, Error> {
        let first = &projections[0].weight;
        let dtype = first.dtype();
        let hidden = first.shape().first().copied().unwrap_or(0);
        for (name, linear) in Self::NAMES.iter().zip(&projections) {
            linear.weight.expect(&format!("{name}.weight"), dtype, &[hidden, hidden])?;
            linear.bias.expect(&format!("{name}.bias"), dtype, &[hidden])?;
        }
        if hidden == 0 {
            return Err(Error::InvalidValue {
                what: "hidden",
                given: "0".into(),
                remedy: "it must be at least 1".into(),
            });
        }
        Ok(Self { projections })
    }

    /// Weights from the normal distribution that keep the size of their input (standard deviation
    /// 1/sqrt(hidden)), and small biases.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] for `hidden` = 0.
    #[cfg(feature = "verify")]
    pub fn random(dtype: DType, hidden: usize, seed: u64) -> Result<Self, Error> {
        let draw = |shape: &[usize], stream: u64, size: f64| {
            let seed = seed.wrapping_mul(8).wrapping_add(stream);
            Tensor::random(DType::F32, shape, seed, 0.0).scaled(size).cast(dtype)
        };
        let size = 1.0 / (hidden as f64).sqrt();
        Self::new([0, 1, 2, 3].map(|index| Linear {
            weight: draw(&[hidden, hidden], 2 * index, size),
            bias: draw(&[hidden], 2 * index + 1, RANDOM_BIAS),
        }))
    }

    /// Features of a token.
    #[must_use]
    pub fn hidden(&self) -> usize {
        self.projections[0].bias.len()
    }

    /// Storage type of every tensor.
    #[must_use]
    pub const fn dtype(&self) -> DType {
        self.projections[0].weight.dtype()
    }

    /// The projections of queries, keys, values and output, by reference.
    #[must_use]
    pub const fn projections(&self) -> &[Linear; 4] {
        &self.projections
    }

    /// As [`Weights::projections`], without a copy.
    #[must_use]
    pub fn into_projections(self) -> [Linear; 4] {
        self.projections
    }

    /// The weights rounded to another storage type.
    #[must_use]
    pub fn cast(&self, dtype: DType) -> Self {
        let cast = |linear: &Linear| Linear {
            weight: linear.weight.cast(dtype),
            bias: linear.bias.cast(dtype),
        };
        Self { projections: self.projections.each_ref().map(cast) }
    }
}
