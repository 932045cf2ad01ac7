//! Streams and events. Everything runs at once, so an event is a point in time.

use std::{
    sync::{Mutex, PoisonError},
    time::Instant,
};

use crate::{
    P, call, call_in_context, code,
    state::{object, register, state, unregister},
    write,
};

/// A stream has nothing to remember.
struct Stream;

/// When it was recorded last.
struct Event(Mutex<Option<Instant>>);

impl Event {
    fn time(&self) -> Result<Instant, u32> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).ok_or(code::INVALID_HANDLE)
    }
}

/// Whether a stream is live.
pub(crate) fn check(stream: P) -> Result<(), u32> {
    // SAFETY: callers pass streams.
    unsafe { object::<Stream>(stream as usize) }.map(|_| ())
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamCreateWithPriority(stream: P, _flags: u32, _priority: i32) -> u32 {
    call_in_context(|| write(stream, register(Stream)))
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
        state().wait()
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
        *event.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventSynchronize(event: P) -> u32 {
    call_in_context(|| {
        // SAFETY: callers pass events.
        unsafe { object::<Event>(event as usize) }?;
        state().wait()
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventElapsedTime(milliseconds: P, start: P, end: P) -> u32 {
    call_in_context(|| {
        // SAFETY: callers pass events.
        let (start, end) =
            unsafe { (object::<Event>(start as usize)?, object::<Event>(end as usize)?) };
        write(milliseconds, (end.time()? - start.time()?).as_secs_f32() * 1e3)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventDestroy_v2(event: P) -> u32 {
    // SAFETY: callers pass events.
    call(|| unsafe { unregister::<Event>(event as usize) })
}
