//! cust links, runs and prints its errors on a machine without a driver.

use cust::error::CudaError;
use device_cust::last_failure;

/// A driver of a name that no machine has, so that the test means the same on one
/// with a GPU.
fn without_driver() {
    assert!(cuda_driver::use_library("/nonexistent/libcuda.so.1".as_ref()));
}

#[test]
fn cust_reports_the_missing_driver() {
    without_driver();
    assert_eq!(cust::init(cust::CudaFlags::empty()), Err(CudaError::SharedObjectInitFailed));
    let failure = last_failure().unwrap();
    assert_eq!(failure.function, "cuInit");
    assert_eq!(failure.code, cuda_driver::ResultCode::LIBRARY_NOT_FOUND);
}

#[test]
fn errors_of_cust_can_be_printed_without_a_driver() {
    without_driver();
    for error in [CudaError::OutOfMemory, CudaError::IllegalAddress, CudaError::UnknownError] {
        assert!(!error.to_string().is_empty());
    }
    assert!(CudaError::OutOfMemory.to_string().contains("not enough device memory"));
}

#[test]
fn a_library_cannot_be_exchanged_once_opened() {
    without_driver();
    assert!(!cuda_driver::use_library("/elsewhere/libcuda.so.1".as_ref()));
}

/// Refers to every part of cust that has driver calls of its own, so that a symbol
/// this crate forgot fails the link.
#[test]
fn every_part_of_cust_links() {
    without_driver();
    assert!(cust::module::Module::from_ptx("", &[]).is_err());
    assert!(cust::stream::Stream::new(cust::stream::StreamFlags::DEFAULT, None).is_err());
    assert!(cust::event::Event::new(cust::event::EventFlags::DEFAULT).is_err());
    assert!(cust::link::Linker::new().is_err());
    assert!(cust::memory::mem_get_info().is_err());
    assert!(cust::memory::DeviceBuffer::<u8>::zeroed(16).is_err());
    assert!(cust::memory::LockedBuffer::new(&0u8, 16).is_err());
    assert!(cust::device::Device::get_device(0).is_err());
}
