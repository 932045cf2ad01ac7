//! cudarc's calls reach the driver library that it links, whatever flash-attention brings.

use std::ffi::c_int;

use cudarc::driver::{result, sys};
use flash_attention::GpuDevice;

unsafe extern "C" {
    /// Driver calls that the stub has answered.
    safe fn stub_calls() -> c_int;
}

fn main() {
    result::init().expect("the stub's cuInit");
    let mut version = 0;
    // SAFETY: the function writes one number.
    let code = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    assert_eq!((code, version), (sys::CUresult::CUDA_SUCCESS, 424_242));
    assert_eq!(result::device::get_count().expect("the stub's count"), 42);
    println!("cudarc: 3 calls, of which the stub answered {}", stub_calls());
    assert_eq!(stub_calls(), 3);

    // The library opens a driver by itself: here one that does not exist, as it says.
    let error = GpuDevice::open(0).expect_err("no such driver library").to_string();
    println!("flash-attention: {error}");
    assert!(error.contains("none/libcuda.so"), "{error}");
    assert_eq!(stub_calls(), 3, "flash-attention called the library that cudarc links");
}
