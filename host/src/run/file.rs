//! Tensors in a safetensors file, mapped into memory. The program reads only the used parts, so a
//! file may be larger than memory. A pipe is read as a whole.

use std::{
    cell::RefCell,
    cmp::Reverse,
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use anyhow::Result;
use flash_attention::{
    DType, Error, Tensor,
    error::{Shape, listed},
};
use memmap2::Mmap;
use safetensors::{
    Dtype, SafeTensors,
    tensor::{Metadata, TensorInfo},
};

use crate::{failure::Usage, output::Output};

/// A file of tensors.
pub struct TensorFile {
    path: PathBuf,
    content: Content,
    metadata: Metadata,
    /// The offset of the first tensor.
    data: usize,
    /// Names that were looked for.
    looked_for: RefCell<BTreeSet<String>>,
}

/// All bytes of a file.
enum Content {
    Mapped(Mmap),
    Read(Vec<u8>),
}

impl Content {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Read(bytes) => bytes,
        }
    }

    fn of(path: &Path) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let kind = file.metadata()?;
        if kind.is_dir() {
            return Err(io::Error::other("it is a directory: name a safetensors file"));
        }
        if kind.is_file() {
            // SAFETY: the map is only read. Whoever shortens the file meanwhile makes reads of
            // it fault, as with any program that maps its input.
            return Ok(Self::Mapped(unsafe { Mmap::map(&file) }?));
        }
        if is_device(&kind) {
            return Err(io::Error::other("it is a device: name a safetensors file"));
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(Self::Read(bytes))
    }
}

/// Whether reading it might never end.
#[cfg(unix)]
fn is_device(kind: &fs::Metadata) -> bool {
    use std::os::unix::fs::FileTypeExt as _;
    kind.file_type().is_char_device() || kind.file_type().is_block_device()
}

#[cfg(not(unix))]
fn is_device(_: &fs::Metadata) -> bool {
    false
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
        let content = Content::of(path).map_err(io)?;
        let bad = |e| Error::BadFile {
            path: path.to_owned(),
            reason: format!("not a whole safetensors file ({e}): save the tensors again"),
        };
        let (header, metadata) = SafeTensors::read_metadata(content.bytes()).map_err(bad)?;
        // Eight bytes hold the length of the header.
        let looked_for = RefCell::default();
        Ok(Self { path: path.to_owned(), content, metadata, data: 8 + header, looked_for })
    }

    /// The tensor of that name, where there is one.
    #[must_use]
    pub fn find<'a>(&'a self, name: &'a str) -> Option<Stored<'a>> {
        self.looked_for.borrow_mut().insert(name.to_owned());
        let info = self.metadata.info(name)?;
        let (start, end) = info.data_offsets;
        Some(Stored {
            file: self,
            name,
            dtype: info.dtype,
            shape: &info.shape,
            bytes: &self.content.bytes()[self.data + start..self.data + end],
        })
    }

    /// The tensors that nobody looked for, without the `known` ones.
    #[must_use]
    pub fn others(&self, known: &[&str]) -> Vec<String> {
        let looked_for = self.looked_for.borrow();
        let is_other =
            |name: &String| !looked_for.contains(name) && !known.contains(&name.as_str());
        self.metadata.tensors().into_keys().filter(is_other).collect()
    }

    /// The tensor of that name.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], with the existing names.
    pub fn get<'a>(&'a self, name: &'a str) -> Result<Stored<'a>> {
        self.find(name).ok_or_else(|| {
            let names = listed(self.metadata.tensors().into_keys());
            let context = format!(": {} has {names}", self.path.display());
            Error::MissingTensor { what: name.into(), context }.into()
        })
    }
}

impl Stored<'_> {
    /// An error with the given type or shape and the right one.
    #[must_use]
    pub fn must_be(&self, what: &str) -> anyhow::Error {
        let (name, path) = (self.name, self.file.path.display());
        let (dtype, shape) = (format!("{:?}", self.dtype).to_lowercase(), Shape(self.shape.into()));
        Usage(format!("tensor {name} in {path} is {dtype} {shape}: it must be {what}")).into()
    }

    /// Whether it has this type in the file.
    #[must_use]
    pub fn is(&self, dtype: Dtype) -> bool {
        self.dtype == dtype
    }

    /// Its storage type.
    ///
    /// # Errors
    /// When kernels do not support it.
    pub fn dtype(&self) -> Result<DType> {
        match self.dtype {
            Dtype::F32 => Ok(DType::F32),
            Dtype::F16 => Ok(DType::F16),
            Dtype::BF16 => Ok(DType::BF16),
            _ => Err(self.must_be("f32, f16 or bf16")),
        }
    }

    /// The elements as unsigned 32-bit integers.
    ///
    /// # Errors
    /// When it is not i32, u32 or i64 of one dimension, or a number does not fit.
    pub fn to_u32(&self) -> Result<Vec<u32>> {
        let numbers = self.whole_numbers().filter(|_| self.shape.len() == 1);
        let Some(numbers) = numbers else {
            return Err(self.must_be("i32, u32 or i64 of one dimension"));
        };
        let fits = |n: i64| {
            let wrong = || self.must_be(&format!("of numbers from 0 to {}, not {n}", u32::MAX));
            u32::try_from(n).map_err(|_| wrong())
        };
        numbers.into_iter().map(fits).collect()
    }

    /// The elements of all dimensions as signed 32-bit integers.
    ///
    /// # Errors
    /// When it is not i32, u32 or i64, or a number does not fit.
    pub fn to_i32(&self) -> Result<Vec<i32>> {
        let Some(numbers) = self.whole_numbers() else {
            return Err(self.must_be("i32, u32 or i64"));
        };
        let fits = |n: i64| {
            let wrong = || self.must_be(&format!("of numbers up to {}, not {n}", i32::MAX));
            i32::try_from(n).map_err(|_| wrong())
        };
        numbers.into_iter().map(fits).collect()
    }

    /// The elements, if they are integers.
    fn whole_numbers(&self) -> Option<Vec<i64>> {
        let read = |size: usize, widen: fn(&[u8]) -> Option<i64>| {
            self.bytes.chunks_exact(size).map(widen).collect::<Option<Vec<i64>>>()
        };
        match self.dtype {
            Dtype::I32 => read(4, |b| Some(i32::from_le_bytes(b.try_into().ok()?).into())),
            Dtype::U32 => read(4, |b| Some(u32::from_le_bytes(b.try_into().ok()?).into())),
            Dtype::I64 => read(8, |b| Some(i64::from_le_bytes(b.try_into().ok()?))),
            _ => None,
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
    /// An error with the given type or shape and the right one.
    pub fn expect(&self, dtype: DType, shape: &[usize]) -> Result<()> {
        if self.dtype()? == dtype && self.shape == shape {
            return Ok(());
        }
        Err(self.must_be(&format!("{dtype} {}", Shape(shape.into()))))
    }

    /// A copy in this process's memory.
    ///
    /// # Errors
    /// When kernels do not support its type.
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

/// The safetensors name of a storage type.
#[must_use]
pub const fn stored_dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::E4M3 => Dtype::F8_E4M3,
    }
}

/// Writes tensors and notes about them, without a second copy in memory.
///
/// # Errors
/// The system's reason.
pub fn save(output: &Output, tensors: &[(&str, Tensor)], notes: &[(&str, String)]) -> Result<()> {
    // Wider types first, so that each element is aligned.
    let mut sorted: Vec<&(&str, Tensor)> = tensors.iter().collect();
    sorted.sort_by_key(|(name, tensor)| (Reverse(tensor.dtype().size()), *name));
    let mut end = 0;
    let describe = |(name, tensor): &&(&str, Tensor)| {
        let start = end;
        end += tensor.as_bytes().len();
        let (dtype, shape) = (stored_dtype(tensor.dtype()), tensor.shape().to_vec());
        ((*name).to_owned(), TensorInfo { dtype, shape, data_offsets: (start, end) })
    };
    let infos = sorted.iter().map(describe).collect();
    let notes = notes.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
    let mut header = serde_json::to_string(&Metadata::new(Some(notes), infos)?)?;
    header += &" ".repeat(header.len().next_multiple_of(8) - header.len());
    output.write(|to| {
        to.write_all(&(header.len() as u64).to_le_bytes())?;
        to.write_all(header.as_bytes())?;
        sorted.iter().try_for_each(|(_, tensor)| to.write_all(tensor.as_bytes()))?;
        Ok(())
    })
}
