//! A machine without a driver: calls say so, and nothing crashes.

use cuda_driver::{ResultCode, functions};

/// A driver of a name that no machine has, so that the test means the same on one
/// with a GPU.
fn without_driver() {
    assert!(cuda_driver::use_library("/nonexistent/libcuda.so.1".as_ref()));
}

#[test]
fn status_names_the_file_and_the_cure() {
    without_driver();
    let message = cuda_driver::status().unwrap_err().to_string();
    assert!(message.contains("/nonexistent/libcuda.so.1"), "{message}");
    assert!(message.contains(cuda_driver::LIBRARY_VARIABLE), "{message}");
}

#[test]
fn calls_fail_with_the_name_of_the_function() {
    without_driver();
    let failure = functions::device_count().unwrap_err();
    assert_eq!(failure.function, "cuDeviceGetCount");
    assert_eq!(failure.code, ResultCode::LIBRARY_NOT_FOUND);
    assert!(failure.to_string().contains("could not be opened"), "{failure}");
    assert_eq!(cuda_driver::address("cuInit"), Err(ResultCode::LIBRARY_NOT_FOUND));
}
