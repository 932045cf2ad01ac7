//! NCCL's library, opened on first use: the build does not link it.
//!
//! The system's loader searches for `libnccl.so.2`; `FLASH_ATTENTION_NCCL` names another file
//! (PyTorch's packages have theirs in `site-packages/nvidia/nccl/lib`). The crate needs version
//! 2.20 or later.

use std::{
    error::Error as _,
    ffi::{CStr, OsStr, OsString, c_char, c_int, c_void},
    fmt,
    path::PathBuf,
    sync::{Arc, OnceLock},
};

use libloading::Library;

use crate::error::Error;

/// The environment variable that names NCCL's library.
pub const LIBRARY_VARIABLE: &str = "FLASH_ATTENTION_NCCL";
/// The least version.
pub const LEAST_VERSION: (u32, u32) = (2, 20);

const CANDIDATES: &[&str] = &["libnccl.so.2", "libnccl.so"];

/// A communicator's handle, `ncclComm_t`.
pub type Comm = *mut c_void;

/// The result of NCCL's functions: 0, or the code of a failure.
pub(crate) type Code = c_int;
pub(crate) const SUCCESS: Code = 0;
pub(crate) const IN_PROGRESS: Code = 7;
/// `ncclUint8`.
pub(crate) const BYTES: c_int = 1;

/// The id that one rank makes and all ranks use to find each other.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId(pub [u8; 128]);

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UniqueId")
    }
}

/// The beginning of `ncclConfig_t`, as version 2.14 had it: NCCL fills in what follows.
#[repr(C)]
pub(crate) struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    unused: c_int,
}

impl Config {
    /// Calls return before they have ended, so that a lost rank cannot block the others.
    pub(crate) const NON_BLOCKING: Self = Self {
        size: size_of::<Self>(),
        magic: 0xcafe_beef,
        version: 21_400,
        blocking: 0,
        // `NCCL_CONFIG_UNDEF_INT`.
        unused: c_int::MIN,
    };
}

macro_rules! functions {
    ($($name:ident = $symbol:literal($($type:ty),*);)*) => {
        /// The NCCL functions that this crate calls.
        pub(crate) struct Functions {
            $(pub(crate) $name: unsafe extern "C" fn($($type),*) -> Code,)*
            /// `ncclGetErrorString`.
            text: unsafe extern "C" fn(Code) -> *const c_char,
        }

        impl Functions {
            fn load(library: &Library) -> Result<Self, String> {
                Ok(Self {
                    // SAFETY: NCCL's function of that name has this signature from version 2.14 on.
                    $($name: unsafe { symbol(library, $symbol) }?,)*
                    // SAFETY: as above.
                    text: unsafe { symbol(library, "ncclGetErrorString") }?,
                })
            }
        }
    };
}

functions! {
    unique_id = "ncclGetUniqueId"(*mut UniqueId);
    init_rank = "ncclCommInitRankConfig"(*mut Comm, c_int, UniqueId, c_int, *mut Config);
    count = "ncclCommCount"(Comm, *mut c_int);
    user_rank = "ncclCommUserRank"(Comm, *mut c_int);
    async_error = "ncclCommGetAsyncError"(Comm, *mut Code);
    finalize = "ncclCommFinalize"(Comm);
    destroy = "ncclCommDestroy"(Comm);
    abort = "ncclCommAbort"(Comm);
    group_start = "ncclGroupStart"();
    group_end = "ncclGroupEnd"();
    send = "ncclSend"(*const c_void, usize, c_int, c_int, Comm, *mut c_void);
    receive = "ncclRecv"(*mut c_void, usize, c_int, c_int, Comm, *mut c_void);
}

/// # Safety
/// The library's symbol of that name has the type `F`, a function.
unsafe fn symbol<F: Copy>(library: &Library, name: &str) -> Result<F, String> {
    // SAFETY: the symbol has the type `F`, as stated above.
    let symbol = unsafe { library.get::<F>(name) };
    symbol.map(|function| *function).map_err(|_| format!("it has no function {name}"))
}

/// NCCL's library.
pub struct Nccl {
    pub(crate) functions: Functions,
    path: PathBuf,
    version: (u32, u32, u32),
    /// The functions are gone when it is closed.
    _library: Library,
}

impl fmt::Debug for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, version, .. } = self;
        f.debug_struct("Nccl").field("path", path).field("version", version).finish_non_exhaustive()
    }
}

impl Nccl {
    /// The library of this machine, opened by the first call.
    ///
    /// # Errors
    /// [`Error::NoNccl`] if it is missing or too old, with the remedy.
    pub fn get() -> Result<Arc<Self>, Error> {
        static OPEN: OnceLock<Arc<Nccl>> = OnceLock::new();
        if let Some(nccl) = OPEN.get() {
            return Ok(nccl.clone());
        }
        let named = std::env::var_os(LIBRARY_VARIABLE).filter(|path| !path.is_empty());
        let nccl = match named {
            Some(path) => Self::open(&path)?,
            None => Self::open_first()?,
        };
        Ok(OPEN.get_or_init(|| Arc::new(nccl)).clone())
    }

    fn open_first() -> Result<Self, Error> {
        let mut first = None;
        for name in CANDIDATES {
            match open(&OsString::from(name)) {
                Ok(library) => return Self::of(library, name.into()),
                Err(detail) => _ = first.get_or_insert(detail),
            }
        }
        Err(Error::NoNccl {
            reason: format!(
                "the library {} was not found ({})",
                CANDIDATES[0],
                first.unwrap_or_default()
            ),
            remedy: format!(
                "install NCCL {}, or set {LIBRARY_VARIABLE} to the library's path: PyTorch's packages \
                 have it in site-packages/nvidia/nccl/lib",
                least()
            ),
        })
    }

    /// The library in that file.
    ///
    /// # Errors
    /// As [`Nccl::get`].
    pub fn open(path: &OsStr) -> Result<Self, Error> {
        let file = PathBuf::from(path);
        let library = open(path).map_err(|detail| Error::NoNccl {
            reason: format!("the library {} cannot be opened ({detail})", file.display()),
            remedy: format!("correct or unset {LIBRARY_VARIABLE}"),
        })?;
        Self::of(library, file)
    }

    fn of(library: Library, path: PathBuf) -> Result<Self, Error> {
        let refused = |reason: String| Error::NoNccl {
            reason: format!("{}: {reason}", path.display()),
            remedy: format!("install NCCL {}", least()),
        };
        let mut code = 0;
        // SAFETY: NCCL's function of that name has this signature in every version.
        let get = unsafe {
            symbol::<unsafe extern "C" fn(*mut c_int) -> Code>(&library, "ncclGetVersion")
        };
        // SAFETY: the pointer leads to a number of that type.
        if unsafe { get.map_err(refused)?(&raw mut code) } != SUCCESS {
            return Err(refused("it does not say its version".into()));
        }
        let version = version(code.unsigned_abs());
        if (version.0, version.1) < LEAST_VERSION {
            let (major, minor, patch) = version;
            return Err(refused(format!("it has version {major}.{minor}.{patch}")));
        }
        let functions = Functions::load(&library).map_err(refused)?;
        Ok(Self { functions, path, version, _library: library })
    }

    /// The opened file.
    #[must_use]
    pub const fn path(&self) -> &PathBuf {
        &self.path
    }

    /// Its version.
    #[must_use]
    pub const fn version(&self) -> (u32, u32, u32) {
        self.version
    }

    /// The meaning of a code.
    pub(crate) fn text(&self, code: Code) -> String {
        // SAFETY: every number has a text, which lives as long as the library.
        let text = unsafe { (self.functions.text)(code) };
        if text.is_null() {
            return format!("code {code}");
        }
        // SAFETY: as above, and it ends with a NUL.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }
}

fn open(path: &OsStr) -> Result<Library, String> {
    // SAFETY: the initialisers of NCCL's library (or of what the user named in its place) are
    // trusted, as they are for a program that links to it.
    match unsafe { Library::new(path) } {
        Ok(library) => Ok(library),
        Err(error) => Err(error.source().map_or_else(|| error.to_string(), ToString::to_string)),
    }
}

fn least() -> String {
    let (major, minor) = LEAST_VERSION;
    format!("{major}.{minor} or later")
}

/// A version from its number: 1000 · major + 100 · minor + patch up to 2.8, then 10,000 · major.
const fn version(code: u32) -> (u32, u32, u32) {
    let major = if code < 10_000 { code / 1000 } else { code / 10_000 };
    let rest = if code < 10_000 { code % 1000 } else { code % 10_000 };
    (major, rest / 100, rest % 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_nccl_writes_them() {
        assert_eq!(version(2_708), (2, 7, 8));
        assert_eq!(version(21_400), (2, 14, 0));
        assert_eq!(version(22_803), (2, 28, 3));
    }
}
