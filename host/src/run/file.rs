//! Tensors in a safetensors file, mapped into memory: what is read of them is what is
//! used, and a file larger than memory is no obstacle.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use anyhow::Result;
use flash_attention::{DType, Error, Tensor, error::Shape};
use memmap2::Mmap;
use safetensors::{
    Dtype, SafeTensors,
    tensor::{Metadata, TensorView},
};

use crate::failure::Usage;

/// A file of tensors.
pub struct TensorFile {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    /// Where the first tensor begins.
    data: usize,
}

/// One tensor of a file.
#[derive(Clone, Copy)]
pub struct Stored<'a> {
    file: &'a TensorFile,
    name: &'a str,
    dtype: Dtype,
    /// Extent of each dimension, slowest first.
    pub shape: &'a [usize],
    /// The elements, little-endian, at any alignment.
    pub bytes: &'a [u8],
}

impl TensorFile {
    /// Maps a file and reads its header.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be opened, [`Error::BadFile`] when it is not in the
    /// safetensors format or is cut off.
    pub fn open(path: &Path) -> Result<Self> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        // SAFETY: the map is only read. Whoever shortens the file meanwhile makes reads of
        // it fault, as with any program that maps its input.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let bad = |e| Error::BadFile {
            path: path.to_owned(),
            reason: format!("not a whole safetensors file ({e}): save the tensors again"),
        };
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(bad)?;
        // Eight bytes hold the length of the header.
        Ok(Self { path: path.to_owned(), map, metadata, data: 8 + header })
    }

    /// Where the file is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tensor of that name, where there is one.
    #[must_use]
    pub fn find<'a>(&'a self, name: &'a str) -> Option<Stored<'a>> {
        let info = self.metadata.info(name)?;
        let (start, end) = info.data_offsets;
        Some(Stored {
            file: self,
            name,
            dtype: info.dtype,
            shape: &info.shape,
            bytes: &self.map[self.data + start..self.data + end],
        })
    }

    /// The tensor of that name.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], with the names that there are.
    pub fn get<'a>(&'a self, name: &'a str) -> Result<Stored<'a>> {
        self.find(name).ok_or_else(|| {
            let mut names: Vec<String> = self.metadata.tensors().into_keys().collect();
            names.sort_unstable();
            let has = if names.is_empty() { "no tensors".into() } else { names.join(", ") };
            let context = format!(": {} has {has}", self.path.display());
            Error::MissingTensor { what: name.into(), context }.into()
        })
    }
}

impl Stored<'_> {
    /// What it is and what it must be, as an error.
    #[must_use]
    pub fn must_be(&self, what: &str) -> anyhow::Error {
        let (name, path) = (self.name, self.file.path.display());
        let (dtype, shape) = (format!("{:?}", self.dtype).to_lowercase(), Shape(self.shape.into()));
        Usage(format!("tensor {name} in {path} is {dtype} {shape}: it must be {what}")).into()
    }

    /// Its storage type.
    ///
    /// # Errors
    /// When it is none that kernels compute with.
    pub fn dtype(&self) -> Result<DType> {
        match self.dtype {
            Dtype::F32 => Ok(DType::F32),
            Dtype::F16 => Ok(DType::F16),
            Dtype::BF16 => Ok(DType::BF16),
            _ => Err(self.must_be("f32, f16 or bf16")),
        }
    }

    /// Whether its elements are bytes: u8 or bool.
    #[must_use]
    pub const fn is_bytes(&self) -> bool {
        matches!(self.dtype, Dtype::U8 | Dtype::BOOL)
    }

    /// Checks type and shape.
    ///
    /// # Errors
    /// What it is and what it must be.
    pub fn expect(&self, dtype: DType, shape: &[usize]) -> Result<()> {
        if self.dtype()? == dtype && self.shape == shape {
            return Ok(());
        }
        Err(self.must_be(&format!("{dtype} {}", Shape(shape.into()))))
    }

    /// A copy in this process's memory.
    ///
    /// # Errors
    /// When it is of no type that kernels compute with.
    pub fn to_tensor(&self) -> Result<Tensor> {
        Ok(Tensor::from_bytes(self.dtype()?, self.shape, self.bytes)?)
    }
}

/// The padding mask of a file, where it has one.
///
/// # Errors
/// When it is not bytes of the shape `[batch, keys]`.
pub fn mask_of(file: &TensorFile, batch: usize, keys: usize) -> Result<Option<Stored<'_>>> {
    let mask = file.find("mask");
    if let Some(mask) = mask
        && (!mask.is_bytes() || mask.shape != [batch, keys])
    {
        let shape = Shape(vec![batch, keys]);
        return Err(mask.must_be(&format!("u8 or bool {shape} (batch, keys), 0 = hidden")));
    }
    Ok(mask)
}

/// The file's name for a storage type.
#[must_use]
pub const fn stored_dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
    }
}

/// Writes tensors and notes about them.
///
/// # Errors
/// [`Error::BadFile`] with the reason.
pub fn save(path: &Path, tensors: &[(&str, Tensor)], notes: &[(&str, String)]) -> Result<()> {
    let bad = |e: safetensors::SafeTensorError| Error::BadFile {
        path: path.to_owned(),
        reason: format!("could not be written: {e}"),
    };
    let mut views = Vec::new();
    for (name, tensor) in tensors {
        let (dtype, shape) = (stored_dtype(tensor.dtype()), tensor.shape().to_vec());
        views.push((name, TensorView::new(dtype, shape, tensor.bytes()).map_err(bad)?));
    }
    let notes = notes.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
    Ok(safetensors::serialize_to_file(views, Some(notes), path).map_err(bad)?)
}
