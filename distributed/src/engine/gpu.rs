//! A rank on a GPU: launches by the raw surface on the caller's stream, transfers on a stream of its own.

use std::{ffi::c_void, marker::PhantomData, sync::Arc};

use cuda_driver::{
    Failure, ResultCode,
    functions::{self, EVENT_WITHOUT_TIME, PitchedRows, STREAM_NON_BLOCKING, Stream},
};
use flash_attention::{
    raw::{Context, Plan, Region},
    registry::{Operation, Target},
};

use super::{Engine, Rows};
use crate::error::Error;

/// Transfers go first: they need few multiprocessors, which a kernel that fills the GPU would not leave
/// them.
const PRIORITY: i32 = -5;

/// A rank whose kernels run on a GPU.
#[derive(Debug)]
pub struct GpuEngine {
    compute: Stream,
    communication: Stream,
    /// Dropped after the stream of this value.
    context: Arc<Context>,
    /// Whether the stream of computation is this value's too, and the primary context retained for it.
    owned: Option<Primary>,
}

// SAFETY: the handles are pointers that only the driver follows, and its functions may be called
// with them from any thread.
unsafe impl Send for GpuEngine {}

/// A reference to a GPU's primary context, given back when dropped.
#[derive(Debug)]
struct Primary(functions::Device);

impl Drop for Primary {
    fn drop(&mut self) {
        // It can fail only while the driver shuts down.
        // SAFETY: retained once for this value, after everything that was made in it.
        _ = unsafe { functions::primary_release(self.0) };
    }
}

/// A point in a stream.
#[derive(Debug)]
pub struct Event {
    handle: functions::Event,
    context: functions::Context,
}

// SAFETY: as for `GpuEngine`.
unsafe impl Send for Event {}
// SAFETY: as above; an event is recorded once, before anybody else knows it.
unsafe impl Sync for Event {}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(_entered) = Entered::new(self.context) {
            // It can fail only when the context is lost, and with it the event.
            // SAFETY: made by `record`, and destroyed here alone; its context is current.
            _ = unsafe { functions::event_destroy(self.handle) };
        }
    }
}

/// Memory of a GPU that is there once an event has passed.
#[derive(Clone, Debug)]
pub struct GpuParcel {
    region: Region,
    ready: Arc<Event>,
}

impl GpuEngine {
    /// A rank that launches on a stream of the caller: null and 1 are the legacy default stream, 2 the
    /// calling thread's default stream.
    ///
    /// # Errors
    /// An error of the driver.
    ///
    /// # Safety
    /// `stream` belongs to the context, and is live as long as the value.
    pub unsafe fn new(context: Arc<Context>, stream: *mut c_void) -> Result<Self, Error> {
        let _entered = Entered::new(context.handle()).map_err(failed)?;
        let communication = functions::stream_create_with_priority(STREAM_NON_BLOCKING, PRIORITY)
            .map_err(failed)?;
        Ok(Self { compute: stream, communication, context, owned: None })
    }

    /// A rank in the primary context of a GPU, by its number in CUDA's order, with a stream of its own.
    ///
    /// # Errors
    /// There is no driver, or no such GPU; what the driver reports.
    pub fn open(index: u32) -> Result<Self, Error> {
        // The driver is there and initialised, or the error says what to do.
        cuda_driver::status().map_err(|error| {
            let (reason, remedy) = (error.reason(), error.remedy());
            flash_attention::Error::NoGpu { reason, remedy }
        })?;
        let device = functions::device(index as i32).map_err(failed)?;
        let handle = functions::primary_retain(device).map_err(failed)?;
        let primary = Primary(device);
        // SAFETY: the context was retained, and is released after the value is dropped.
        let context = Arc::new(unsafe { Context::from_handle(handle) }?);
        let compute = {
            let _entered = Entered::new(handle).map_err(failed)?;
            functions::stream_create(STREAM_NON_BLOCKING).map_err(failed)?
        };
        // SAFETY: the stream was made in that context, and is destroyed with the value.
        let mut engine = unsafe { Self::new(context, compute) }?;
        engine.owned = Some(primary);
        Ok(engine)
    }

    /// Another rank on the same GPU, with streams of its own.
    ///
    /// # Errors
    /// An error of the driver.
    pub fn sibling(&self) -> Result<Self, Error> {
        let device = {
            let _entered = self.enter()?;
            functions::ctx_device().map_err(failed)?
        };
        functions::primary_retain(device).map_err(failed)?;
        let primary = Primary(device);
        let compute = {
            let _entered = self.enter()?;
            functions::stream_create(STREAM_NON_BLOCKING).map_err(failed)?
        };
        // SAFETY: as for `open`.
        let mut engine = unsafe { Self::new(self.context.clone(), compute) }?;
        engine.owned = Some(primary);
        Ok(engine)
    }

    /// The context.
    #[must_use]
    pub const fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// The stream of computation.
    #[must_use]
    pub const fn stream(&self) -> *mut c_void {
        self.compute
    }

    /// The stream of communication.
    #[must_use]
    pub const fn communication(&self) -> *mut c_void {
        self.communication
    }

    fn enter(&self) -> Result<Entered, Error> {
        Entered::new(self.context.handle()).map_err(failed)
    }

    /// Runs driver calls with the context current.
    pub(crate) fn call<T>(&self, call: impl FnOnce() -> Result<T, Failure>) -> Result<T, Error> {
        let _entered = self.enter()?;
        call().map_err(failed)
    }

    /// The time at the end of what the lane of computation has now.
    ///
    /// # Errors
    /// An error of the driver.
    pub fn now(&self) -> Result<Event, Error> {
        self.record_with(self.compute, 0)
    }

    /// Milliseconds between two of [`GpuEngine::now`], which the device has passed.
    ///
    /// # Errors
    /// An error of the driver.
    pub fn elapsed_ms(&self, start: &Event, end: &Event) -> Result<f64, Error> {
        // SAFETY: both events are live and of the current context, as the driver checks.
        self.call(|| unsafe { functions::event_elapsed_ms(start.handle, end.handle) })
            .map(f64::from)
    }

    fn record(&self, stream: Stream) -> Result<Event, Error> {
        self.record_with(stream, EVENT_WITHOUT_TIME)
    }

    fn record_with(&self, stream: Stream, flags: u32) -> Result<Event, Error> {
        self.call(|| {
            let handle = functions::event_create(flags)?;
            let event = Event { handle, context: self.context.handle() };
            // SAFETY: event and stream are live and of the current context.
            unsafe { functions::event_record(event.handle, stream) }?;
            Ok(event)
        })
    }

    fn wait_for(&self, stream: Stream, event: &Event) -> Result<(), Error> {
        // SAFETY: event and stream are live and of the current context.
        self.call(|| unsafe { functions::stream_wait_event(stream, event.handle, 0) })
    }
}

impl Drop for GpuEngine {
    fn drop(&mut self) {
        let Ok(_entered) = self.enter() else { return };
        // They can fail only when the context is lost, and with it the streams.
        // SAFETY: made by this value, and destroyed here alone; the context is current.
        unsafe {
            _ = functions::stream_destroy(self.communication);
            if self.owned.is_some() {
                _ = functions::stream_destroy(self.compute);
            }
        }
    }
}

// SAFETY: a lane is a stream, which keeps its order; fork and join are events.
unsafe impl Engine for GpuEngine {
    type Mark = Event;
    type Parcel = GpuParcel;
    type Receipt = Event;

    fn target(&self) -> Target {
        self.context.target()
    }

    unsafe fn start<P: Operation>(&self, plan: &Plan<P>, args: &P::Args) -> Result<(), Error> {
        // SAFETY: the stream is live; the buffers are live and have no other user, as
        // `Engine::start` asks.
        Ok(unsafe { self.context.enqueue(plan, args, self.compute) }?)
    }

    unsafe fn copy_rows(&self, to: Rows, from: Rows, rows: u64, bytes: u64) -> Result<(), Error> {
        if rows == 0 || bytes == 0 {
            return Ok(());
        }
        let side = |rows: Rows| PitchedRows { address: rows.address, pitch: rows.pitch as usize };
        let (bytes, count) = (bytes as usize, rows as usize);
        self.call(|| {
            if count == 1 {
                // SAFETY: both sides are live and do not overlap, as `Engine::copy_rows` asks.
                return unsafe { functions::copy(to.address, from.address, bytes, self.compute) };
            }
            // SAFETY: both sides are live and do not overlap, as `Engine::copy_rows` asks.
            unsafe { functions::copy_rows(side(to), side(from), bytes, count, self.compute) }
        })
    }

    unsafe fn fill(&self, region: Region, value: u8) -> Result<(), Error> {
        if region.bytes == 0 {
            return Ok(());
        }
        let (address, bytes) = (region.address, region.bytes as usize);
        // SAFETY: the region is live until the fill has ended, as `Engine::fill` asks.
        self.call(|| unsafe { functions::fill(address, value, bytes, self.compute) })
    }

    unsafe fn upload(&self, address: u64, bytes: &[u8]) -> Result<(), Error> {
        self.call(|| {
            let (from, length) = (bytes.as_ptr().cast(), bytes.len());
            // SAFETY: `bytes` is borrowed until the copy has ended; the bytes at `address` are live
            // and unused, as `Engine::upload` asks.
            unsafe {
                functions::copy_to_device(address, from, length, self.compute)?;
                functions::stream_synchronize(self.compute)
            }
        })
    }

    fn fork(&self) -> Result<(), Error> {
        let event = self.record(self.compute)?;
        self.wait_for(self.communication, &event)
    }

    fn mark(&self) -> Result<Event, Error> {
        self.record(self.communication)
    }

    fn join(&self, mark: &Event) -> Result<(), Error> {
        self.wait_for(self.compute, mark)
    }

    fn is_idle(&self) -> Result<bool, Error> {
        for stream in [self.communication, self.compute] {
            let _entered = self.enter()?;
            // SAFETY: the stream is live and of the current context.
            match unsafe { functions::stream_query(stream) } {
                Ok(()) => {}
                Err(Failure { code: ResultCode::NOT_READY, .. }) => return Ok(false),
                Err(failure) => return Err(failed(failure)),
            }
        }
        Ok(true)
    }

    unsafe fn offer(&self, region: Region) -> Result<GpuParcel, Error> {
        Ok(GpuParcel { region, ready: Arc::new(self.record(self.communication)?) })
    }

    unsafe fn accept(&self, parcel: &GpuParcel, to: Region) -> Result<Event, Error> {
        self.wait_for(self.communication, &parcel.ready)?;
        let (from, bytes) = (parcel.region.address, to.bytes as usize);
        self.call(|| {
            // SAFETY: the parcel is live until its receipt is settled; the region is live and as
            // long, as `Engine::accept` asks.
            unsafe { functions::copy(to.address, from, bytes, self.communication) }
        })?;
        self.record(self.communication)
    }

    fn settle(&self, receipt: Event) -> Result<(), Error> {
        self.wait_for(self.communication, &receipt)
    }
}

/// While it lives, a context is the calling thread's; then the one before is again.
struct Entered {
    before: Option<functions::Context>,
    /// Belongs to the thread that made it.
    _thread: PhantomData<*const ()>,
}

impl Entered {
    fn new(context: functions::Context) -> Result<Self, Failure> {
        let before = functions::ctx_current()?;
        if before == context {
            return Ok(Self { before: None, _thread: PhantomData });
        }
        // SAFETY: the engine's context is live.
        unsafe { functions::ctx_set_current(context) }?;
        Ok(Self { before: Some(before), _thread: PhantomData })
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            // It can fail only if that context was destroyed meanwhile: nothing to go back to.
            // SAFETY: the handle was current on this thread.
            _ = unsafe { functions::ctx_set_current(before) };
        }
    }
}

fn failed(failure: Failure) -> Error {
    let (call, message) = (failure.function.to_owned(), failure.code.to_string());
    Error::Attention(flash_attention::Error::Driver { call, message })
}
