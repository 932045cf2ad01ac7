//! A GPU device on [cust](https://docs.rs/cust): cust owns the context, the stream, the memory
//! and the events, and flash-attention launches its kernels with their handles.
//!
//! cust links to about a hundred functions of the CUDA driver. This crate defines symbols of
//! those names (`forward.rs`), each of which opens the driver on first use and passes the call
//! on: a program with cust builds without a CUDA toolkit, and starts without a driver.
//!
//! The symbols are the program's: they would catch the calls of another library that links to
//! the driver, and cust's build script needs the `[patch]` of this workspace. So this crate is
//! for programs of this workspace; others open a [`GpuDevice`](flash_attention::GpuDevice).
//!
//! | what goes wrong | what happens |
//! |---|---|
//! | no driver library | calls of cust fail with code 303 |
//! | the driver lacks a function | that call fails with code 302 |
//! | the driver returns a code that cust does not know | cust sees 999; [`last_failure`] has the code |

#![warn(missing_debug_implementations)]

mod codes;
mod forward;

use std::ffi::c_void;

use cust::{
    context::Context,
    device::Device,
    error::CudaResult,
    event::{Event, EventFlags},
    memory::{AsyncCopyDestination, DevicePointer, DeviceSlice},
    stream::{Stream, StreamFlags},
};
use flash_attention::backend::gpu::{Gpu, Owner, ResultCode};

pub use codes::last_failure;

/// A GPU whose context, stream and memory are cust's.
pub type CustDevice = Gpu<CustOwner>;

/// A context and a stream of cust.
#[derive(Debug)]
pub struct CustOwner {
    // The order is that in which they are dropped.
    stream: Stream,
    context: Context,
}

// SAFETY: context and stream are dropped with the value; the driver's allocations are disjoint;
// every copy and fill goes to the stream, and copies wait for it.
unsafe impl Owner for CustOwner {
    type Event = Event;

    fn open(index: u32) -> Result<Self, ResultCode> {
        let open = || -> CudaResult<_> {
            let context = Context::new(Device::get_device(index)?)?;
            Ok(Self { stream: Stream::new(StreamFlags::DEFAULT, None)?, context })
        };
        open().map_err(codes::of)
    }

    fn context(&self) -> *mut c_void {
        self.context.as_raw().cast()
    }

    fn stream(&self) -> *mut c_void {
        self.stream.as_inner().cast()
    }

    fn memory(&self) -> Result<(u64, u64), ResultCode> {
        let (free, total) = cust::memory::mem_get_info().map_err(codes::of)?;
        Ok((free as u64, total as u64))
    }

    fn allocate(&self, bytes: u64) -> Result<u64, ResultCode> {
        // SAFETY: `free` alone frees the memory; readers of it write it first.
        let pointer = unsafe { cust::memory::cuda_malloc::<u8>(bytes as usize) };
        pointer.map(|pointer| pointer.as_raw()).map_err(codes::of)
    }

    unsafe fn free(&self, address: u64) -> Result<(), ResultCode> {
        // SAFETY: the allocation is live and no work uses it any more, as `Owner::free` asks.
        unsafe { cust::memory::cuda_free(DevicePointer::<u8>::from_raw(address)) }
            .map_err(codes::of)
    }

    unsafe fn upload(&self, address: u64, data: &[u8]) -> Result<(), ResultCode> {
        // SAFETY: `Owner::upload` asks that the bytes lie in one live allocation without another
        // user; `data` is borrowed until the copy has ended.
        unsafe { slice(address, data.len()).async_copy_from(data, &self.stream) }
            .and_then(|()| self.stream.synchronize())
            .map_err(codes::of)
    }

    unsafe fn download(&self, address: u64, data: &mut [u8]) -> Result<(), ResultCode> {
        // SAFETY: as for `upload`.
        unsafe { slice(address, data.len()).async_copy_to(data, &self.stream) }
            .and_then(|()| self.stream.synchronize())
            .map_err(codes::of)
    }

    unsafe fn fill(&self, address: u64, bytes: u64, value: u8) -> Result<(), ResultCode> {
        // SAFETY: `Owner::fill` asks that the bytes lie in one live allocation without another
        // user.
        unsafe { slice(address, bytes as usize).set_8_async(value, &self.stream) }
            .map_err(codes::of)
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: u64) -> Result<(), ResultCode> {
        // SAFETY: `Owner::copy` asks that both ranges lie in live allocations without another user.
        let [mut to, from] = unsafe { [to, from].map(|address| slice(address, bytes as usize)) };
        // SAFETY: the ranges stay live until the stream has passed the copy, as `Owner::copy` asks.
        unsafe { to.async_copy_from(&from, &self.stream) }.map_err(codes::of)
    }

    fn synchronize(&self) -> Result<(), ResultCode> {
        self.stream.synchronize().map_err(codes::of)
    }

    fn record(&self) -> Result<Event, ResultCode> {
        let record = || -> CudaResult<_> {
            let event = Event::new(EventFlags::DEFAULT)?;
            event.record(&self.stream)?;
            Ok(event)
        };
        record().map_err(codes::of)
    }

    fn elapsed_ms(&self, start: &Event, end: &Event) -> Result<f32, ResultCode> {
        end.synchronize().and_then(|()| end.elapsed_time_f32(start)).map_err(codes::of)
    }
}

/// Device memory as cust sees it.
///
/// # Safety
/// `bytes` bytes at `address` lie in one live allocation, and nothing else uses them while the
/// slice does.
unsafe fn slice(address: u64, bytes: usize) -> DeviceSlice<u8> {
    // SAFETY: the bytes are live and have no other user, as stated above; `u8` needs no alignment.
    unsafe { DeviceSlice::from_raw_parts_mut(DevicePointer::from_raw(address), bytes) }
}
