//! The CUDA driver, opened when a program first needs it.
//!
//! [`functions`] are what it takes to launch kernels in somebody's context, and to own
//! context, stream, memory and events. Nothing is linked and no symbol is exported: a
//! program builds without a CUDA toolkit, starts on a machine without a driver, and says
//! what is missing when it wants a GPU ([`status`]). It gets in the way of no other library
//! that uses CUDA.
//!
//! | what goes wrong | what happens |
//! |---|---|
//! | no driver library | calls fail with code 303, [`status`] says how to get one |
//! | the driver lacks a function | that call fails with code 302 |
//!
//! # Which library
//! `libcuda.so.1` (`nvcuda.dll` on Windows), searched for by the system's loader, then
//! in the place where WSL keeps it. The environment variable
//! `FLASH_ATTENTION_CUDA_DRIVER` names another file instead, for a driver in an unusual
//! place and for tests; [`use_library`] does the same from code.

#![warn(missing_debug_implementations)]

mod codes;
pub mod functions;
mod graph;
mod library;
mod management;
mod tensor_map;

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::OnceLock,
};

pub use codes::ResultCode;
pub use graph::Graph;
pub use management::driver_version;
pub use tensor_map::{TensorMapLayout, TensorMapType, encode_tensor_map, replace_address};

/// The environment variable that names the driver library to open.
pub const LIBRARY_VARIABLE: &str = "FLASH_ATTENTION_CUDA_DRIVER";

/// A driver that answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Driver {
    /// The opened file: a name that the loader found, or a path.
    pub library: PathBuf,
    /// The newest CUDA version that the driver supports, `(major, minor)`.
    pub cuda_version: (u32, u32),
}

/// Why there is no driver to work with. The message is one line: [`DriverError::reason`],
/// then [`DriverError::remedy`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}; {}", self.reason(), self.remedy())]
pub enum DriverError {
    /// There is no driver library on this machine.
    LibraryMissing {
        /// The name searched for.
        name: &'static str,
        /// The loader's message.
        detail: String,
    },
    /// The library that was named could not be opened.
    LibraryUnusable {
        /// The file named.
        path: PathBuf,
        /// The loader's message.
        detail: String,
    },
    /// The driver is there and finds no GPU.
    NoDevice {
        /// The library opened.
        library: PathBuf,
    },
    /// The driver is there and does not start.
    NotStarted {
        /// The library opened.
        library: PathBuf,
        /// The code of `cuInit` or `cuDriverGetVersion`.
        code: ResultCode,
    },
}

impl DriverError {
    /// The missing or wrong part.
    #[must_use]
    pub fn reason(&self) -> String {
        match self {
            Self::LibraryMissing { name, detail } => {
                format!("the CUDA driver library {name} was not found ({detail})")
            }
            Self::LibraryUnusable { path, detail } => {
                format!("the CUDA driver library {} cannot be opened ({detail})", path.display())
            }
            Self::NoDevice { library } => {
                format!("the CUDA driver {} finds no GPU", library.display())
            }
            Self::NotStarted { library, code } => {
                format!("the CUDA driver {} does not start: {code}", library.display())
            }
        }
    }

    /// The remedy.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::LibraryMissing { .. } => format!(
                "install NVIDIA's driver, start a container with its GPUs (docker run --gpus \
                 all), or set {LIBRARY_VARIABLE} to the library's path"
            ),
            Self::LibraryUnusable { .. } => format!("correct or unset {LIBRARY_VARIABLE}"),
            Self::NoDevice { .. } => {
                "check that nvidia-smi lists one and that CUDA_VISIBLE_DEVICES does not hide it"
                    .to_owned()
            }
            Self::NotStarted { .. } => "check that nvidia-smi works".to_owned(),
        }
    }
}

/// The driver, opened and initialised by the first call; later calls repeat its answer.
///
/// # Errors
/// There is no driver, or it does not start: the message names the cure.
pub fn status() -> Result<&'static Driver, &'static DriverError> {
    static STATUS: OnceLock<Result<Driver, DriverError>> = OnceLock::new();
    STATUS.get_or_init(start).as_ref()
}

fn start() -> Result<Driver, DriverError> {
    let library = library::open().map_err(Clone::clone)?.path.clone();
    let version = functions::init().and_then(|()| functions::version()).map_err(|failure| {
        match failure.code {
            ResultCode::NO_DEVICE => DriverError::NoDevice { library: library.clone() },
            code => DriverError::NotStarted { library: library.clone(), code },
        }
    })?;
    let version = version.unsigned_abs();
    Ok(Driver { library, cuda_version: (version / 1000, version % 1000 / 10) })
}

/// Opens the driver library at `path` in place of the one that would be found.
///
/// Must come before anything else opens the driver. Returns whether `path` is what
/// the process uses from now on; [`status`] says whether it works.
#[must_use]
pub fn use_library(path: &Path) -> bool {
    library::choose(path)
}

/// A driver call that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The function.
    pub function: &'static str,
    /// The code that it returned.
    pub code: ResultCode,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.function, self.code)
    }
}

impl std::error::Error for Failure {}

/// Address of a function of the driver by its name in the library, `cuMemAlloc_v2` say: for
/// what [`functions`] does not have. Opens the library if nothing has yet.
///
/// # Errors
/// [`ResultCode::LIBRARY_NOT_FOUND`] or [`ResultCode::SYMBOL_NOT_FOUND`].
pub fn address(name: &str) -> Result<usize, ResultCode> {
    library::address(name)
}
