//! Finding and opening the driver library, once.

use std::{
    error::Error,
    ffi::OsString,
    path::{Path, PathBuf},
    sync::{Mutex, OnceLock, PoisonError},
};

use libloading::Library;

use crate::{DriverError, LIBRARY_VARIABLE, codes::ResultCode};

/// The places of the driver library, in the order tried. A bare name is searched for
/// by the system's loader.
#[cfg(windows)]
const CANDIDATES: &[&str] = &["nvcuda.dll"];
#[cfg(target_os = "macos")]
const CANDIDATES: &[&str] = &["libcuda.dylib", "/usr/local/cuda/lib/libcuda.dylib"];
#[cfg(not(any(windows, target_os = "macos")))]
const CANDIDATES: &[&str] = &["libcuda.so.1", "libcuda.so", "/usr/lib/wsl/lib/libcuda.so.1"];

/// An open driver library.
pub(crate) struct Open {
    library: Library,
    /// The name or path that was opened.
    pub(crate) path: PathBuf,
}

static OPEN: OnceLock<Result<Open, DriverError>> = OnceLock::new();
static CHOSEN: Mutex<Option<PathBuf>> = Mutex::new(None);

/// The library, opened by the first call.
pub(crate) fn open() -> Result<&'static Open, &'static DriverError> {
    OPEN.get_or_init(|| {
        let chosen = CHOSEN.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let named =
            chosen.map(PathBuf::into_os_string).or_else(|| std::env::var_os(LIBRARY_VARIABLE));
        match named.filter(|path| !path.is_empty()) {
            Some(path) => open_one(&path)
                .map_err(|detail| DriverError::LibraryUnusable { path: path.into(), detail }),
            None => open_first(),
        }
    })
    .as_ref()
}

/// Names the library to open; `false` when one was already opened or tried.
pub(crate) fn choose(path: &Path) -> bool {
    *CHOSEN.lock().unwrap_or_else(PoisonError::into_inner) = Some(path.to_owned());
    match open() {
        Ok(open) => open.path == path,
        Err(DriverError::LibraryUnusable { path: tried, .. }) => tried == path,
        Err(_) => false,
    }
}

fn open_first() -> Result<Open, DriverError> {
    let mut first_failure = None;
    for name in CANDIDATES {
        match open_one(&OsString::from(name)) {
            Ok(open) => return Ok(open),
            Err(detail) => _ = first_failure.get_or_insert(detail),
        }
    }
    Err(DriverError::LibraryMissing {
        name: CANDIDATES[0],
        detail: first_failure.unwrap_or_default(),
    })
}

fn open_one(path: &std::ffi::OsStr) -> Result<Open, String> {
    // SAFETY: the initialisers of the driver library (or of what the user named in
    // its place) are trusted, as they are for a program that links to it.
    match unsafe { Library::new(path) } {
        Ok(library) => Ok(Open { library, path: path.into() }),
        // The loader's own words, which name the file and the reason.
        Err(error) => Err(error.source().map_or_else(|| error.to_string(), ToString::to_string)),
    }
}

/// Address of a function of the driver, or the code that says why there is none.
pub(crate) fn address(name: &str) -> Result<usize, ResultCode> {
    let open = open().map_err(|_| ResultCode::LIBRARY_NOT_FOUND)?;
    // SAFETY: only the address is taken; a caller of the function states its signature.
    let symbol = unsafe { open.library.get::<unsafe extern "C" fn()>(name) };
    match symbol {
        Ok(function) => Ok(*function as usize),
        Err(_) => Err(ResultCode::SYMBOL_NOT_FOUND),
    }
}
