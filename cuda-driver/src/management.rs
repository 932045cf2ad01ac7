//! The version number of NVIDIA's driver, which CUDA does not tell: the management
//! library (NVML) does.

use std::ffi::{CStr, c_char, c_int, c_uint};

use libloading::Library;

#[cfg(windows)]
const NAME: &str = "nvml.dll";
#[cfg(not(windows))]
const NAME: &str = "libnvidia-ml.so.1";

/// Version of the installed driver as nvidia-smi prints it (`580.159.04`), or `None`
/// where the management library is not there.
#[must_use]
pub fn driver_version() -> Option<String> {
    // SAFETY: the initialisers of NVIDIA's library are trusted.
    let library = unsafe { Library::new(NAME) }.ok()?;
    // SAFETY: the functions of these names have these signatures.
    let (init, version, shutdown) = unsafe {
        (
            library.get::<unsafe extern "C" fn() -> c_int>("nvmlInit_v2").ok()?,
            library
                .get::<unsafe extern "C" fn(*mut c_char, c_uint) -> c_int>(
                    "nvmlSystemGetDriverVersion",
                )
                .ok()?,
            library.get::<unsafe extern "C" fn() -> c_int>("nvmlShutdown").ok()?,
        )
    };
    // SAFETY: takes nothing.
    if unsafe { init() } != 0 {
        return None;
    }
    let mut text = [0u8; 96];
    // SAFETY: the buffer has the length stated.
    let code = unsafe { version(text.as_mut_ptr().cast(), text.len() as c_uint) };
    // SAFETY: initialised above.
    unsafe { shutdown() };
    let text = CStr::from_bytes_until_nul(&text).ok()?.to_str().ok()?;
    (code == 0).then(|| text.to_owned())
}
