//! The owner of a GPU device's context, stream and memory.

use std::ffi::c_void;

use cuda_driver::{
    Failure, ResultCode,
    functions::{self, STREAM_NON_BLOCKING},
};

use crate::raw::context::Entered;

/// A library that owns a context of a GPU, one stream in it, device memory and events.
/// [`Gpu`](super::Gpu) makes a device of one: it launches in the owner's context and on the
/// owner's stream.
///
/// Every method but `open` and `drop` needs the context current; otherwise the method fails, or
/// uses another context. Errors are the driver's result codes.
///
/// # Safety
/// [`Gpu`](super::Gpu) relies on these facts:
/// - `context` and `stream` live as long as the value, and the stream belongs to the context.
/// - `allocate` returns memory that overlaps no other live allocation.
/// - Copies and fills happen in the stream, in the order of the calls. `download` returns after the
///   bytes have arrived; `upload` has read its source when it returns.
pub unsafe trait Owner: Send + Sync + Sized {
    /// A point in the stream with a time.
    type Event;

    /// Makes a context and a stream on a GPU, by the GPU's number in CUDA's order. The driver is
    /// initialised.
    ///
    /// # Errors
    /// The driver's code.
    fn open(index: u32) -> Result<Self, ResultCode>;
    /// The context, a `CUcontext`.
    fn context(&self) -> *mut c_void;
    /// The stream, a `CUstream`.
    fn stream(&self) -> *mut c_void;
    /// Free and total memory of the GPU in bytes.
    ///
    /// # Errors
    /// The driver's code.
    fn memory(&self) -> Result<(u64, u64), ResultCode>;
    /// Allocates `bytes` bytes, aligned to 256.
    ///
    /// # Errors
    /// [`ResultCode::OUT_OF_MEMORY`], or another code of the driver.
    fn allocate(&self, bytes: u64) -> Result<u64, ResultCode>;
    /// Frees memory.
    ///
    /// # Errors
    /// The driver's code.
    ///
    /// # Safety
    /// `address` is the address of a live allocation, which no work on the GPU uses any more.
    unsafe fn free(&self, address: u64) -> Result<(), ResultCode>;
    /// Copies to device memory.
    ///
    /// # Errors
    /// The driver's code, possibly of earlier work.
    ///
    /// # Safety
    /// `data.len()` bytes at `address` lie in one live allocation, and no other thread uses
    /// them meanwhile.
    unsafe fn upload(&self, address: u64, data: &[u8]) -> Result<(), ResultCode>;
    /// Copies from device memory.
    ///
    /// # Errors
    /// The driver's code, possibly of earlier work.
    ///
    /// # Safety
    /// As for [`Owner::upload`].
    unsafe fn download(&self, address: u64, data: &mut [u8]) -> Result<(), ResultCode>;
    /// Fills device memory with a byte; does not wait.
    ///
    /// # Errors
    /// The driver's code, possibly of earlier work.
    ///
    /// # Safety
    /// As for [`Owner::upload`], until the stream has passed the fill.
    unsafe fn fill(&self, address: u64, bytes: u64, value: u8) -> Result<(), ResultCode>;
    /// Copies device memory to other device memory; does not wait.
    ///
    /// # Errors
    /// The driver's code, possibly of earlier work.
    ///
    /// # Safety
    /// As for [`Owner::upload`], at both addresses, until the stream has passed the copy.
    unsafe fn copy(&self, to: u64, from: u64, bytes: u64) -> Result<(), ResultCode>;
    /// Waits until the stream is empty.
    ///
    /// # Errors
    /// The driver's code, possibly of earlier work.
    fn synchronize(&self) -> Result<(), ResultCode>;
    /// An event at the end of the stream's current work.
    ///
    /// # Errors
    /// The driver's code, possibly of earlier work.
    fn record(&self) -> Result<Self::Event, ResultCode>;
    /// Milliseconds from one event to another; waits for the second event.
    ///
    /// # Errors
    /// The driver's code, possibly of earlier work.
    fn elapsed_ms(&self, start: &Self::Event, end: &Self::Event) -> Result<f32, ResultCode>;
}

/// A reference to a GPU's primary context, which every library of the process shares.
#[derive(Debug)]
pub(super) struct Primary {
    pub(super) context: functions::Context,
    device: functions::Device,
}

impl Primary {
    pub(super) fn retain(device: functions::Device) -> Result<Self, Failure> {
        Ok(Self { context: functions::primary_retain(device)?, device })
    }
}

impl Drop for Primary {
    fn drop(&mut self) {
        // It can fail only while the driver shuts down.
        // SAFETY: retained once by this value, and what it made in the context is gone.
        _ = unsafe { functions::primary_release(self.device) };
    }
}

/// Context, stream and memory by the driver's own functions.
#[derive(Debug)]
pub struct DriverOwner {
    stream: functions::Stream,
    primary: Primary,
}

// SAFETY: the handles are pointers that only the driver follows, and the driver's functions may
// be called with them from any thread.
unsafe impl Send for DriverOwner {}
// SAFETY: as above.
unsafe impl Sync for DriverOwner {}

/// Time at one point of the stream.
#[derive(Debug)]
pub struct DriverEvent(functions::Event);

impl Drop for DriverEvent {
    fn drop(&mut self) {
        // It can fail only when the context is lost, and with it the event.
        // SAFETY: made by `record`, and destroyed here alone.
        _ = unsafe { functions::event_destroy(self.0) };
    }
}

// SAFETY: the primary context is retained and the stream destroyed with the value; the driver's
// allocations are disjoint; every copy and fill goes to the stream, and copies wait for it.
unsafe impl Owner for DriverOwner {
    type Event = DriverEvent;

    fn open(index: u32) -> Result<Self, ResultCode> {
        let open = || {
            let primary = Primary::retain(functions::device(index as i32)?)?;
            let _entered = Entered::new(primary.context)?;
            let stream = functions::stream_create(STREAM_NON_BLOCKING)?;
            Ok(Self { stream, primary })
        };
        open().map_err(code)
    }

    fn context(&self) -> *mut c_void {
        self.primary.context
    }

    fn stream(&self) -> *mut c_void {
        self.stream
    }

    fn memory(&self) -> Result<(u64, u64), ResultCode> {
        functions::mem_info().map_err(code)
    }

    fn allocate(&self, bytes: u64) -> Result<u64, ResultCode> {
        functions::mem_alloc(bytes as usize).map_err(code)
    }

    unsafe fn free(&self, address: u64) -> Result<(), ResultCode> {
        // SAFETY: the context is current; no work uses the live allocation any more, as `free`
        // asks.
        unsafe { functions::mem_free(address) }.map_err(code)
    }

    unsafe fn upload(&self, address: u64, data: &[u8]) -> Result<(), ResultCode> {
        let (from, bytes) = (data.as_ptr().cast(), data.len());
        // SAFETY: the context is current, and `data` is borrowed until the copy has ended; the
        // rest is the caller's.
        unsafe { functions::copy_to_device(address, from, bytes, self.stream) }.map_err(code)?;
        self.synchronize()
    }

    unsafe fn download(&self, address: u64, data: &mut [u8]) -> Result<(), ResultCode> {
        let (to, bytes) = (data.as_mut_ptr().cast(), data.len());
        // SAFETY: as for `upload`.
        unsafe { functions::copy_to_host(to, address, bytes, self.stream) }.map_err(code)?;
        self.synchronize()
    }

    unsafe fn fill(&self, address: u64, bytes: u64, value: u8) -> Result<(), ResultCode> {
        // SAFETY: the context is current; the bytes lie in one live allocation until the stream has
        // passed the fill, as `fill` asks.
        unsafe { functions::fill(address, value, bytes as usize, self.stream) }.map_err(code)
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: u64) -> Result<(), ResultCode> {
        // SAFETY: the context is current; both ranges lie in live allocations until the stream has
        // passed the copy, as `copy` asks.
        unsafe { functions::copy(to, from, bytes as usize, self.stream) }.map_err(code)
    }

    fn synchronize(&self) -> Result<(), ResultCode> {
        // SAFETY: the stream is live.
        unsafe { functions::stream_synchronize(self.stream) }.map_err(code)
    }

    fn record(&self) -> Result<DriverEvent, ResultCode> {
        let event = DriverEvent(functions::event_create(0).map_err(code)?);
        // SAFETY: event and stream are live; the driver refuses an event of another context.
        unsafe { functions::event_record(event.0, self.stream) }.map_err(code)?;
        Ok(event)
    }

    fn elapsed_ms(&self, start: &DriverEvent, end: &DriverEvent) -> Result<f32, ResultCode> {
        // SAFETY: both events are live.
        unsafe { functions::event_synchronize(end.0) }
            // SAFETY: as above.
            .and_then(|()| unsafe { functions::event_elapsed_ms(start.0, end.0) })
            .map_err(code)
    }
}

impl Drop for DriverOwner {
    fn drop(&mut self) {
        // It can fail only when the context is lost, and with it the stream.
        // SAFETY: made by `open`, and destroyed here alone.
        _ = unsafe { functions::stream_destroy(self.stream) };
    }
}

fn code(failure: Failure) -> ResultCode {
    failure.code
}
