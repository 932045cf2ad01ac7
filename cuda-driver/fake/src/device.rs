//! The driver's version, the GPUs and their contexts.

use std::ffi::c_char;

use crate::{
    P, call, call_in_context, code,
    state::{check_context, context, context_handle, set_context, state},
    write,
};

/// CUDA 13.0.
const VERSION: i32 = 13_000;
/// The H100's limit of shared memory for a block that asks.
pub(crate) const SHARED_BYTES: i32 = 232_448;
/// Small, so that tests which flush it are fast.
const L2_BYTES: i32 = 1 << 20;

#[unsafe(no_mangle)]
extern "C" fn cuInit(flags: u32) -> u32 {
    call(|| {
        let mut state = state();
        if flags != 0 {
            return Err(code::INVALID_VALUE);
        }
        if state.gpus == 0 {
            return Err(code::NO_DEVICE);
        }
        state.initialised = true;
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDriverGetVersion(version: P) -> u32 {
    call(|| write(version, VERSION))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetCount(count: P) -> u32 {
    call(|| {
        let state = state();
        if !state.initialised {
            return Err(code::NOT_INITIALIZED);
        }
        write(count, state.gpus)
    })
}

fn check(gpu: i32) -> Result<(), u32> {
    if (0..state().gpus).contains(&gpu) { Ok(()) } else { Err(code::INVALID_DEVICE) }
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGet(device: P, ordinal: i32) -> u32 {
    call(|| {
        check(ordinal)?;
        write(device, ordinal)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetName(name: *mut c_char, length: i32, device: i32) -> u32 {
    call(|| {
        check(device)?;
        let text = format!("Fake GPU {device}\0");
        if name.is_null() || (length as usize) < text.len() {
            return Err(code::INVALID_VALUE);
        }
        // SAFETY: the caller's buffer has `length` bytes, which suffice.
        unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), name.cast(), text.len()) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceTotalMem_v2(bytes: P, device: i32) -> u32 {
    call(|| {
        check(device)?;
        write(bytes, state().memory_bytes as usize)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetAttribute(value: P, attribute: u32, device: i32) -> u32 {
    call(|| {
        check(device)?;
        // The numbers of CUdevice_attribute.
        let answer = match attribute {
            8 => 48 << 10,
            13 => 1_980_000,
            16 => 4,
            38 => L2_BYTES,
            75 => state().compute_capability.0,
            76 => state().compute_capability.1,
            97 => SHARED_BYTES,
            _ => return Err(code::INVALID_VALUE),
        };
        write(value, answer)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRetain(context: P, device: i32) -> u32 {
    call(|| {
        check(device)?;
        *state().contexts.entry(device).or_insert(0) += 1;
        write(context, context_handle(device))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRelease_v2(device: i32) -> u32 {
    call(|| {
        let mut state = state();
        match state.contexts.get_mut(&device) {
            Some(references) if *references > 1 => *references -= 1,
            Some(_) => _ = state.contexts.remove(&device),
            None => return Err(code::INVALID_CONTEXT),
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetCurrent(current: P) -> u32 {
    call(|| write(current, context()))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetDevice(device: P) -> u32 {
    call(|| {
        check_context()?;
        write(device, context() as i32 - 1)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSynchronize() -> u32 {
    call_in_context(|| {
        let mut state = state();
        state.follow()?;
        state.busy.clear();
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCurrent(context: P) -> u32 {
    call(|| set_context(context as usize))
}
