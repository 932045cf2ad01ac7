//! Streams and events. Everything runs at once, so an event is a point in time.

use std::{
    sync::{Mutex, PoisonError},
    time::Instant,
};

use crate::{
    P, call, call_in_context, code,
    state::{context, object, register, state, unregister},
    write,
};

/// A stream, by the context that it belongs to.
struct Stream {
    context: usize,
}

/// When and in which stream it was recorded last.
struct Event(Mutex<Option<(Instant, usize)>>);

impl Event {
    fn recorded(&self) -> Result<(Instant, usize), u32> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).ok_or(code::INVALID_HANDLE)
    }
}

/// Whether a stream is live and of the current context; the default streams always are.
pub(crate) fn check(stream: P) -> Result<(), u32> {
    /// `CU_STREAM_PER_THREAD`, after null and `CU_STREAM_LEGACY`.
    const PER_THREAD: usize = 2;
    if stream as usize <= PER_THREAD {
        return Ok(());
    }
    // SAFETY: callers pass streams.
    let stream = unsafe { object::<Stream>(stream as usize) }?;
    if stream.context == context() { Ok(()) } else { Err(code::INVALID_HANDLE) }
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamCreateWithPriority(stream: P, _flags: u32, _priority: i32) -> u32 {
    call_in_context(|| write(stream, register(Stream { context: context() })))
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamCreate(stream: P, flags: u32) -> u32 {
    cuStreamCreateWithPriority(stream, flags, 0)
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamDestroy_v2(stream: P) -> u32 {
    // SAFETY: callers pass streams.
    call(|| unsafe { unregister::<Stream>(stream as usize) })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamSynchronize(stream: P) -> u32 {
    call_in_context(|| {
        check(stream)?;
        state().wait(stream as usize)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventCreate(event: P, _flags: u32) -> u32 {
    call_in_context(|| write(event, register(Event(Mutex::new(None)))))
}

#[unsafe(no_mangle)]
extern "C" fn cuEventRecord(event: P, stream: P) -> u32 {
    call_in_context(|| {
        check(stream)?;
        // SAFETY: callers pass events.
        let event = unsafe { object::<Event>(event as usize) }?;
        *event.0.lock().unwrap_or_else(PoisonError::into_inner) =
            Some((Instant::now(), stream as usize));
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventSynchronize(event: P) -> u32 {
    call_in_context(|| {
        // SAFETY: callers pass events.
        let (_, stream) = unsafe { object::<Event>(event as usize) }?.recorded()?;
        state().wait(stream)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventElapsedTime(milliseconds: P, start: P, end: P) -> u32 {
    call_in_context(|| {
        // SAFETY: callers pass events.
        let (start, end) =
            unsafe { (object::<Event>(start as usize)?, object::<Event>(end as usize)?) };
        write(milliseconds, (end.recorded()?.0 - start.recorded()?.0).as_secs_f32() * 1e3)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventDestroy_v2(event: P) -> u32 {
    // SAFETY: callers pass events.
    call(|| unsafe { unregister::<Event>(event as usize) })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamQuery(stream: P) -> u32 {
    call_in_context(|| {
        check(stream)?;
        // Everything has ended: as after a wait.
        state().wait(stream as usize)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamWaitEvent(stream: P, event: P, _flags: u32) -> u32 {
    call_in_context(|| {
        check(stream)?;
        // SAFETY: callers pass events.
        unsafe { object::<Event>(event as usize) }?.recorded().map(drop)
    })
}
