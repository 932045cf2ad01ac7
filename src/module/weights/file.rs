//! Reading and writing a module's parameters in a file.

use std::{fs, path::Path};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use super::{Linear, Weights, state_dict::StateDict};
use crate::{dtype::DType, error::Error};

impl Weights {
    /// Reads the parameters from a safetensors file with a `state_dict`: `q_proj`, `k_proj`,
    /// `v_proj` and `out_proj` (`.weight`, and `.bias` unless made with `bias=False`), or
    /// `in_proj_weight` and `in_proj_bias` in place of the first three, as
    /// `torch.nn.MultiheadAttention` has them. All names may begin with the same prefix, such as
    /// `layers.0.attn.`; other tensors are ignored.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::BadFile`] for a file that is incomplete, has several modules, or has
    /// a module with `kdim`, `vdim` or `add_bias_kv`; or an error that names a tensor that is
    /// missing, has a storage type that kernels do not support, or does not fit the shape and type
    /// of the other tensors.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let bytes = fs::read(path).map_err(|source| Error::Io { path: path.into(), source })?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| Error::BadFile {
            path: path.into(),
            reason: format!("not a whole safetensors file ({e}): save the tensors again"),
        })?;
        Self::new(StateDict::find(&file, path)?.projections()?)
    }

    /// Writes the tensors as [`Weights::load`] reads them, to a new file with the usual mode, or
    /// into the existing file.
    ///
    /// # Errors
    /// [`Error::Io`] with the system's reason.
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
        let bytes = safetensors::serialize(views, None).map_err(bad)?;
        fs::write(path, bytes).map_err(|source| Error::Io { path: path.into(), source })
    }
}

const fn stored(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::E4M3 => Dtype::F8_E4M3,
    }
}
