//! Result codes between the driver, which has more of them, and cust.

use std::cell::Cell;

use cuda_driver::{Failure, ResultCode};
use cust::error::CudaError;

thread_local! {
    static LAST_FAILURE: Cell<Option<Failure>> = const { Cell::new(None) };
}

/// The call through cust that failed last on this thread.
#[must_use]
pub fn last_failure() -> Option<Failure> {
    LAST_FAILURE.get()
}

pub(crate) fn note_failure(function: &'static str, code: ResultCode) {
    LAST_FAILURE.set(Some(Failure { function, code }));
}

/// The code as cust's `CUresult` can hold it: that enum is CUDA 11.4's, and a value outside
/// it would be undefined behaviour.
pub(crate) fn known_to_cust(code: ResultCode) -> ResultCode {
    const NEWER_THAN_CUDA_11_4: [u32; 5] = [46, 225, 226, 810, 912];
    if code.name().is_none() || NEWER_THAN_CUDA_11_4.contains(&code.0) {
        return ResultCode::UNKNOWN;
    }
    code
}

/// The driver's code behind an error of cust, which does not know every code.
pub(crate) fn of(error: CudaError) -> ResultCode {
    match last_failure() {
        // cust calls a code that it does not know 'unknown': the driver's text is better.
        Some(last) if error == CudaError::UnknownError || last.code.0 == error as u32 => last.code,
        _ => ResultCode(error as u32),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_newer_than_cust_become_unknown() {
        assert_eq!(known_to_cust(ResultCode(912)), ResultCode::UNKNOWN);
        assert_eq!(known_to_cust(ResultCode(123_456)), ResultCode::UNKNOWN);
        assert_eq!(known_to_cust(ResultCode::ILLEGAL_ADDRESS), ResultCode::ILLEGAL_ADDRESS);
    }
}
