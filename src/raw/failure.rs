//! Turns the driver's result codes into errors that name the fault and the remedy.

use cuda_driver::ResultCode;

use crate::error::Error;

/// The end of each error message after which the process can no longer use the GPU.
const LOST: &str = "the GPU's context is lost: this process must be started again to use it";

/// Whether a kernel caused the error, rather than the call that reported it.
pub(crate) const fn is_fault_of_a_kernel(code: ResultCode) -> bool {
    // Illegal address, watchdog, assertion, and the exceptions of the hardware.
    matches!(code.0, 700 | 702 | 710 | 714..=719)
}

/// A driver call that failed.
pub(crate) fn driver(device: &str, call: &str, code: ResultCode) -> Error {
    let mut message = code.to_string();
    match code {
        ResultCode::UNSUPPORTED_PTX_VERSION => message += "; install a newer NVIDIA driver",
        ResultCode::SYMBOL_NOT_FOUND => message += "; install a newer NVIDIA driver",
        ResultCode(46) => message += "; wait for the other process or choose another GPU",
        code if code.is_sticky() => {
            message += "; ";
            message += LOST;
        }
        _ => {}
    }
    Error::Driver { call: format!("{call} on {device}"), message }
}

/// A kernel that faulted while it ran.
pub(crate) fn kernel(symbol: &str, code: ResultCode) -> Error {
    let help = match code {
        ResultCode::ILLEGAL_ADDRESS | ResultCode(716) => {
            "; run it on the CPU, where the emulator names the line"
        }
        _ => "",
    };
    Error::Kernel { symbol: symbol.to_owned(), fault: format!("{code}; {LOST}{help}").into() }
}
