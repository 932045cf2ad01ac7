//! A module's parameters under the names of a `state_dict`.
//!
//! | projections | weight | bias |
//! |---|---|---|
//! | queries, keys, values, one by one | `q_proj.weight`, `k_proj.weight`, `v_proj.weight`, `[hidden, hidden]` | `q_proj.bias`, …, `[hidden]` |
//! | the three in one, as `torch.nn.MultiheadAttention` has them | `in_proj_weight`, `[3 hidden, hidden]` | `in_proj_bias`, `[3 hidden]` |
//! | output | `out_proj.weight`, `[hidden, hidden]` | `out_proj.bias`, `[hidden]` |
//!
//! All names may begin with the same prefix, such as `layers.0.attn.`. A missing bias is zero:
//! PyTorch omits it from a layer made with `bias=False`.

use std::path::Path;

use safetensors::{Dtype, SafeTensors};

use super::{Linear, Weights};
use crate::{
    dtype::DType,
    error::{Error, Shape, listed},
    tensor::Tensor,
};

const PACKED: &str = "in_proj_weight";
const PACKED_BIAS: &str = "in_proj_bias";
/// Names that mark an unsupported module, with its kind.
const OTHERS: [(&str, &str); 5] = [
    ("q_proj_weight", SIZES),
    ("k_proj_weight", SIZES),
    ("v_proj_weight", SIZES),
    ("bias_k", ADDED),
    ("bias_v", ADDED),
];
const SIZES: &str = "queries, keys and values have sizes of their own (kdim, vdim): make them all \
                     embed_dim wide";
const ADDED: &str = "a key and a value are added to those of the input (add_bias_kv=True): leave \
                     that out";

/// The tensors of one module in a file.
pub(super) struct StateDict<'a> {
    file: &'a SafeTensors<'a>,
    path: &'a Path,
    prefix: &'a str,
}

impl<'a> StateDict<'a> {
    /// Finds the module.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] where there is no module; [`Error::BadFile`] where there are
    /// several, or the module is of another kind.
    pub(super) fn find(file: &'a SafeTensors<'a>, path: &'a Path) -> Result<Self, Error> {
        let [q, ..] = Weights::NAMES;
        let q = format!("{q}.weight");
        let marks = [&q, PACKED].into_iter().chain(OTHERS[..3].iter().map(|other| other.0));
        let prefix_of = |name: &'a str| {
            let prefix = marks.clone().find_map(|mark| name.strip_suffix(mark))?;
            (prefix.is_empty() || prefix.ends_with('.')).then_some(prefix)
        };
        let mut prefixes: Vec<&str> = file.names().into_iter().filter_map(prefix_of).collect();
        prefixes.sort_unstable();
        prefixes.dedup();
        let found = |prefix| Self { file, path, prefix };
        let module = match *prefixes {
            // Without a prefix, whatever else is in the file.
            ["", ..] => found(""),
            [prefix] => found(prefix),
            [] => return Err(found("").missing(&format!("{q} (or {PACKED})"))),
            _ => {
                let modules = listed(prefixes);
                let reason =
                    format!("has several modules: {modules}: save the state_dict of one alone");
                return Err(found("").bad(reason));
            }
        };
        for (name, what) in OTHERS {
            if module.has(name) {
                return Err(module.bad(format!("has {}{name}: {what}", module.prefix)));
            }
        }
        Ok(module)
    }

    /// The projections of queries, keys, values and output.
    ///
    /// # Errors
    /// An error that names a tensor that is missing, has a storage type that kernels do not
    /// support, or has a shape that cannot be divided; other shapes are not checked here.
    pub(super) fn projections(&self) -> Result<[Linear; 4], Error> {
        let [q, k, v, out] = Weights::NAMES;
        if !self.has(PACKED) {
            return Ok([self.linear(q)?, self.linear(k)?, self.linear(v)?, self.linear(out)?]);
        }
        if self.has(&format!("{q}.weight")) {
            let reason = format!("has both {q}.weight and {PACKED}: save one module alone");
            return Err(self.bad(reason));
        }
        let packed = self.get(PACKED)?;
        let hidden = match *packed.shape() {
            [rows, hidden] if hidden.checked_mul(3) == Some(rows) => hidden,
            _ => return Err(self.must_be(PACKED, &packed, "[3 hidden, hidden]")),
        };
        let bias = self.find_one(PACKED_BIAS)?;
        if let Some(bias) = bias.as_ref().filter(|bias| bias.shape() != [3 * hidden]) {
            return Err(self.must_be(PACKED_BIAS, bias, &format!("[{}]", 3 * hidden)));
        }
        let part = |index| -> Result<Linear, Error> {
            let weight = third(&packed, index, &[hidden, hidden])?;
            let bias = bias.as_ref().map(|bias| third(bias, index, &[hidden])).transpose()?;
            Ok(Linear { bias: bias.unwrap_or_else(|| no_bias(&weight)), weight })
        };
        Ok([part(0)?, part(1)?, part(2)?, self.linear(out)?])
    }

    fn linear(&self, name: &str) -> Result<Linear, Error> {
        let weight = self.get(&format!("{name}.weight"))?;
        let bias = self.find_one(&format!("{name}.bias"))?;
        Ok(Linear { bias: bias.unwrap_or_else(|| no_bias(&weight)), weight })
    }

    fn has(&self, name: &str) -> bool {
        self.file.tensor(&format!("{}{name}", self.prefix)).is_ok()
    }

    fn get(&self, name: &str) -> Result<Tensor, Error> {
        self.find_one(name)?.ok_or_else(|| self.missing(&format!("{}{name}", self.prefix)))
    }

    fn find_one(&self, name: &str) -> Result<Option<Tensor>, Error> {
        let name = format!("{}{name}", self.prefix);
        let Ok(view) = self.file.tensor(&name) else { return Ok(None) };
        let dtype = match view.dtype() {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => {
                let other = format!("{other:?}").to_lowercase();
                let shape = Shape::from(view.shape());
                let reason =
                    format!("tensor {name} is {other} {shape}: it must be f32, f16 or bf16");
                return Err(self.bad(reason));
            }
        };
        Tensor::from_bytes(dtype, view.shape(), view.data()).map(Some)
    }

    fn must_be(&self, name: &str, tensor: &Tensor, shape: &str) -> Error {
        let (prefix, given) = (self.prefix, Shape::from(tensor.shape()));
        self.bad(format!("tensor {prefix}{name} has shape {given}: it must be {shape}"))
    }

    fn missing(&self, what: &str) -> Error {
        let context = format!(": {} has {}", self.path.display(), listed(self.file.names()));
        Error::MissingTensor { what: what.into(), context }
    }

    fn bad(&self, reason: String) -> Error {
        Error::BadFile { path: self.path.into(), reason }
    }
}

/// One of three equal parts along the first dimension.
fn third(tensor: &Tensor, index: usize, shape: &[usize]) -> Result<Tensor, Error> {
    let bytes = tensor.as_bytes().len() / 3;
    Tensor::from_bytes(tensor.dtype(), shape, &tensor.as_bytes()[index * bytes..][..bytes])
}

/// Zeros for a square weight; for another weight, the error about its shape comes first.
fn no_bias(weight: &Tensor) -> Tensor {
    let hidden = match *weight.shape() {
        [out, features] if out == features => out,
        _ => 0,
    };
    Tensor::zeros(weight.dtype(), &[hidden])
}
