//! The parameters of a module on the host, and their file.

use std::{fs, path::Path};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use crate::{
    dtype::DType,
    error::{Error, Shape},
    tensor::Tensor,
};

/// Standard deviation of random biases: of the size of a trained module's, and no zeros,
/// which would hide a bias that is left out.
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
    /// Which tensor is of another shape or storage type than the weight of the first
    /// projection, which must be square, asks for.
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

    /// Weights from the normal distribution that keep the size of what they project
    /// (standard deviation 1/sqrt(hidden)), and small biases.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] for `hidden` = 0.
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

    /// Those of queries, keys, values and output.
    #[must_use]
    pub const fn projections(&self) -> &[Linear; 4] {
        &self.projections
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

    /// Reads the eight tensors `q_proj.weight`, `q_proj.bias`, … `out_proj.bias` of a
    /// safetensors file; others in it are left alone.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::BadFile`]; or which tensor is missing, of a storage type that
    /// kernels do not compute with, or of another shape or type than the others ask for.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let bytes = fs::read(path).map_err(|source| Error::Io { path: path.into(), source })?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| Error::BadFile {
            path: path.into(),
            reason: format!("not a whole safetensors file ({e}): save the tensors again"),
        })?;
        let [q, k, v, out] = Self::NAMES.map(|name| {
            let weight = read(&file, &format!("{name}.weight"), path)?;
            Ok(Linear { weight, bias: read(&file, &format!("{name}.bias"), path)? })
        });
        Self::new([q?, k?, v?, out?])
    }

    /// Writes the tensors as [`Weights::load`] reads them.
    ///
    /// # Errors
    /// [`Error::BadFile`] with the reason.
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        let bad = |e: safetensors::SafeTensorError| Error::BadFile {
            path: path.into(),
            reason: format!("could not be written: {e}"),
        };
        let mut views = Vec::new();
        for (name, Linear { weight, bias }) in Self::NAMES.iter().zip(&self.projections) {
            for (part, tensor) in [("weight", weight), ("bias", bias)] {
                let shape = tensor.shape().to_vec();
                let view = TensorView::new(stored(tensor.dtype()), shape, tensor.as_bytes());
                views.push((format!("{name}.{part}"), view.map_err(bad)?));
            }
        }
        safetensors::serialize_to_file(views, None, path).map_err(bad)
    }
}

fn read(file: &SafeTensors<'_>, name: &str, path: &Path) -> Result<Tensor, Error> {
    let Ok(view) = file.tensor(name) else {
        let mut names = file.names();
        names.sort_unstable();
        let has = if names.is_empty() { "no tensors".into() } else { names.join(", ") };
        let context = format!(": {} has {has}", path.display());
        return Err(Error::MissingTensor { what: name.into(), context });
    };
    let dtype = match view.dtype() {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        other => {
            let (other, shape) = (format!("{other:?}").to_lowercase(), Shape::from(view.shape()));
            let reason = format!("tensor {name} is {other} {shape}: it must be f32, f16 or bf16");
            return Err(Error::BadFile { path: path.into(), reason });
        }
    };
    Tensor::from_bytes(dtype, view.shape(), view.data())
}

const fn stored(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
    }
}
