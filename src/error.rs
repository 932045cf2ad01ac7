//! All errors, in one enum. Each message is one line that names the wrong value and the right one.

use std::{fmt, path::PathBuf};

use crate::dtype::DType;

/// The errors of this library.
///
/// [`Error::is_usage`] separates requests that cannot be met (a command line exits with 2) from
/// failed work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A storage type of that name does not exist.
    #[error("unknown dtype '{given}': use f32, f16 or bf16")]
    UnknownDType {
        /// The request.
        given: String,
    },
    /// The registry has no kernel with this name.
    #[error("unknown kernel '{given}': the kernels are {known}")]
    UnknownKernel {
        /// The request.
        given: String,
        /// The existing names, separated by commas.
        known: String,
    },
    /// A value of the problem is outside of the supported range.
    #[error("{what} = {given} is not possible: {remedy}")]
    InvalidValue {
        /// Name of the value.
        what: &'static str,
        /// The value given.
        given: String,
        /// The right value.
        remedy: String,
    },
    /// A tensor would be larger than addresses can express.
    #[error("{what} of shape {shape} has too many elements: keep it below {limit}")]
    TooLarge {
        /// Name of the tensor.
        what: &'static str,
        /// Its shape.
        shape: Shape,
        /// The most elements it may have.
        limit: u64,
    },
    /// The hidden size cannot be split evenly over the heads.
    #[error("hidden = {hidden} is not divisible by heads = {heads}: choose a multiple of {heads}")]
    HiddenNotDivisible {
        /// Hidden size.
        hidden: usize,
        /// Heads.
        heads: usize,
    },
    /// A tensor map cannot describe the tensor to the copy engine.
    #[error("{reason}")]
    TensorMap {
        /// The wrong value, and the right one.
        reason: String,
    },
    /// A kernel does not support this problem, or not on this device.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// A device does not support the request.
    #[error("{device} cannot {what}: {remedy}")]
    DeviceLacks {
        /// Name of the device.
        device: String,
        /// The unsupported request.
        what: String,
        /// The supported alternative.
        remedy: String,
    },
    /// A tensor has another storage type than the problem.
    #[error("tensor {what} is {given}, expected {expected}: convert it or change the dtype")]
    DTypeMismatch {
        /// Name of the tensor.
        what: String,
        /// The problem's value.
        expected: DType,
        /// The tensor's value.
        given: DType,
    },
    /// A tensor has another shape than the problem.
    #[error("tensor {what} has shape {given}, expected {expected}")]
    ShapeMismatch {
        /// Name of the tensor.
        what: String,
        /// The problem's value.
        expected: Shape,
        /// The tensor's value.
        given: Shape,
    },
    /// A required tensor is missing.
    #[error("tensor {what} is missing{context}")]
    MissingTensor {
        /// Name of the tensor.
        what: String,
        /// The place searched, or the reason that the tensor is needed, beginning with a separator.
        context: String,
    },
    /// A tensor was given that the problem does not use.
    #[error(
        "tensor {what} was given but the problem has none: enable it in the problem or leave it out"
    )]
    UnexpectedTensor {
        /// Name of the tensor.
        what: String,
    },
    /// Device memory ran out.
    #[error(
        "out of memory on {device}: {needed} bytes needed, {free} free; use a smaller batch or \
         sequence (the naive and standard kernels also keep N x N weights)"
    )]
    OutOfMemory {
        /// Name of the device.
        device: String,
        /// Bytes asked for.
        needed: u64,
        /// Bytes free at that time.
        free: u64,
    },
    /// There is no GPU to use, or its driver cannot be opened.
    #[error("no GPU: {reason}; {remedy}")]
    NoGpu {
        /// The missing part.
        reason: String,
        /// The remedy.
        remedy: String,
    },
    /// A call into the CUDA driver failed.
    #[error("CUDA driver: {call} failed: {message}")]
    Driver {
        /// The call, or its purpose.
        call: String,
        /// The driver's own words, with a remedy where one is known.
        message: String,
    },
    /// The driver refused to load a PTX module.
    #[error("the driver refused PTX module {module}: {log}")]
    Module {
        /// Name of the module.
        module: String,
        /// The compiler's log.
        log: String,
    },
    /// A launch does not fit its entry.
    #[error("launch of {symbol}: {what} is {given}, expected {expected}")]
    BadLaunch {
        /// Name of the entry.
        symbol: String,
        /// Name of the wrong number.
        what: &'static str,
        /// The given number.
        given: u64,
        /// The right number, or the limit.
        expected: u64,
    },
    /// A device address range is not allocated.
    #[error("device memory at {address:#x}, {bytes} bytes: not inside one allocation")]
    BadAddress {
        /// First byte.
        address: u64,
        /// Length.
        bytes: u64,
    },
    /// A kernel faulted while it ran.
    #[error("kernel {symbol}: {fault}")]
    Kernel {
        /// Name of the entry.
        symbol: String,
        /// The fault, with the place in the kernel source under the emulator.
        fault: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A launch was stopped before its end; its outputs are invalid.
    #[error("the launch was stopped on request")]
    Stopped,
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A file has wrong contents.
    #[error("{}: {reason}", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// The fault in the file.
        reason: String,
    },
}

impl Error {
    /// Whether the request was wrong (exit code 2), as opposed to failed work.
    #[must_use]
    pub const fn is_usage(&self) -> bool {
        match self {
            Self::UnknownDType { .. }
            | Self::UnknownKernel { .. }
            | Self::InvalidValue { .. }
            | Self::TooLarge { .. }
            | Self::HiddenNotDivisible { .. }
            | Self::Unsupported { .. }
            | Self::DeviceLacks { .. }
            | Self::TensorMap { .. }
            | Self::DTypeMismatch { .. }
            | Self::ShapeMismatch { .. }
            | Self::MissingTensor { .. }
            | Self::UnexpectedTensor { .. }
            | Self::NoGpu { .. }
            | Self::Io { .. }
            | Self::BadFile { .. } => true,
            Self::OutOfMemory { .. }
            | Self::Driver { .. }
            | Self::Module { .. }
            | Self::BadLaunch { .. }
            | Self::BadAddress { .. }
            | Self::Kernel { .. }
            | Self::Stopped => false,
        }
    }

    /// Whether device memory ran out: a row of a table, not the end of a run.
    #[must_use]
    pub const fn is_out_of_memory(&self) -> bool {
        matches!(self, Self::OutOfMemory { .. })
    }
}

/// A request that a kernel does not support, or not on that device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("kernel {kernel} {reason}")]
pub struct Unsupported {
    /// Name of the kernel.
    pub kernel: &'static str,
    /// The reason, and the supported alternative.
    pub reason: String,
}

/// A shape as messages print it: `[2, 12, 512, 64]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape(pub Vec<usize>);

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl From<&[usize]> for Shape {
    fn from(dims: &[usize]) -> Self {
        Self(dims.to_vec())
    }
}

impl<const R: usize> From<[usize; R]> for Shape {
    fn from(dims: [usize; R]) -> Self {
        Self(dims.to_vec())
    }
}

/// Names as messages list them: sorted, and cut to a readable number.
#[must_use]
pub fn listed<T: Into<String>>(names: impl IntoIterator<Item = T>) -> String {
    const MOST: usize = 16;
    let mut names: Vec<String> = names.into_iter().map(Into::into).collect();
    names.sort_unstable();
    let more = names.len().saturating_sub(MOST);
    names.truncate(MOST);
    match (names.is_empty(), more) {
        (true, _) => "no tensors".into(),
        (_, 0) => names.join(", "),
        _ => format!("{} and {more} more", names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_names_end() {
        assert_eq!(listed([""; 0]), "no tensors");
        assert_eq!(listed(["b", "a"]), "a, b");
        let many = listed((10..40).map(|n| n.to_string()));
        assert!(many.starts_with("10, 11,") && many.ends_with(", 25 and 14 more"), "{many}");
    }

    #[test]
    fn messages_are_one_line_with_the_value_and_the_remedy() {
        let error = Error::HiddenNotDivisible { hidden: 770, heads: 12 };
        assert_eq!(
            error.to_string(),
            "hidden = 770 is not divisible by heads = 12: choose a multiple of 12"
        );
        let error = Error::ShapeMismatch {
            what: "k".into(),
            expected: [1, 2, 3, 4].into(),
            given: [1, 2, 3].into(),
        };
        assert_eq!(error.to_string(), "tensor k has shape [1, 2, 3], expected [1, 2, 3, 4]");
        assert!(error.is_usage());
        let error = Error::OutOfMemory { device: "gpu".into(), needed: 9, free: 1 };
        assert!(!error.is_usage() && error.is_out_of_memory());
        assert!(!error.to_string().contains('\n'));
    }
}
