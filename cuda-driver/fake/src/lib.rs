//! A CUDA driver library for tests: its GPUs are host memory and the emulator.
//!
//! It exports the `cu*` functions that the GPU backend calls, so that everything above
//! the driver is tested without a GPU: arguments, grids, the choice of modules, events,
//! accounting of memory, and what errors turn into. Launches run the kernel of that
//! name under the emulator. Only a test that names this library opens it.
//!
//! It is strict where a real driver is: a context must be current on the calling
//! thread, handles must be live, launches beyond the limits fail, a fault shows at the
//! next call that waits and then at every call. Fresh memory is filled with 0xFF, which
//! is NaN in every float type.
//!
//! Settings come from the environment when the library is loaded (a child process), or
//! from the `fake_cuda_*` functions (the process that opened it):
//!
//! | variable | meaning | unset |
//! |---|---|---|
//! | `FAKE_CUDA_GPUS` | how many GPUs there are | 1 |
//! | `FAKE_CUDA_COMPUTE_CAPABILITY` | `9.0`, say | 9.0 |
//! | `FAKE_CUDA_MEMORY_BYTES` | memory of each | 1 GiB |

#![allow(non_snake_case, reason = "the names are the driver's")]

mod control;
mod device;
mod graph;
mod launch;
mod memory;
mod module;
mod state;
mod stream;
mod tensor_map;

/// Result codes, by the names of CUDA's headers.
pub(crate) mod code {
    pub(crate) const SUCCESS: u32 = 0;
    pub(crate) const INVALID_VALUE: u32 = 1;
    pub(crate) const OUT_OF_MEMORY: u32 = 2;
    pub(crate) const NOT_INITIALIZED: u32 = 3;
    pub(crate) const NO_DEVICE: u32 = 100;
    pub(crate) const INVALID_DEVICE: u32 = 101;
    pub(crate) const INVALID_CONTEXT: u32 = 201;
    pub(crate) const INVALID_PTX: u32 = 218;
    pub(crate) const INVALID_HANDLE: u32 = 400;
    pub(crate) const NOT_FOUND: u32 = 500;
    pub(crate) const ILLEGAL_ADDRESS: u32 = 700;
    pub(crate) const MISALIGNED_ADDRESS: u32 = 716;
    pub(crate) const LAUNCH_FAILED: u32 = 719;
    pub(crate) const CAPTURE_UNSUPPORTED: u32 = 900;
    pub(crate) const CAPTURE_INVALIDATED: u32 = 901;
    pub(crate) const CAPTURE_IMPLICIT: u32 = 906;
}

/// A pointer or handle.
type P = *mut std::ffi::c_void;

/// A call that ends with a result code.
type Outcome = Result<(), u32>;

/// Runs a call's body, unless a fault has made every call fail; a panic becomes an
/// unknown error, since it must not cross into the caller.
fn call(body: impl FnOnce() -> Outcome) -> u32 {
    let body = || {
        state::planned_failure()?;
        body()
    };
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)) {
        Ok(Ok(())) => code::SUCCESS,
        Ok(Err(code)) => code,
        Err(_) => 999,
    }
}

/// As [`call`], for functions that need a current context and see a fault.
fn call_in_context(body: impl FnOnce() -> Outcome) -> u32 {
    call(|| {
        state::check_context()?;
        state::check_fault()?;
        body()
    })
}

/// Writes a result through a pointer that the caller passed.
fn write<T>(to: P, value: T) -> Outcome {
    if to.is_null() {
        return Err(code::INVALID_VALUE);
    }
    // SAFETY: the driver API's contract: not null means valid for a write of this type.
    unsafe { to.cast::<T>().write(value) };
    Ok(())
}
