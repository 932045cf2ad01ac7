//! Device memory: host memory under a limit.

use std::alloc::{Layout, alloc, dealloc};

use crate::{
    P, call, call_in_context, code,
    state::{check_context, check_fault, state},
    stream, write,
};

/// The least alignment of a GPU's allocations.
const ALIGNMENT: usize = 256;
/// The content of fresh memory: NaN in every float type.
const POISON: u8 = 0xFF;

fn layout(bytes: u64) -> Result<Layout, u32> {
    Layout::from_size_align(bytes as usize, ALIGNMENT).map_err(|_| code::OUT_OF_MEMORY)
}

#[unsafe(no_mangle)]
extern "C" fn cuMemGetInfo_v2(free: P, total: P) -> u32 {
    call_in_context(|| {
        let state = state();
        write(free, state.memory_bytes.saturating_sub(state.used_bytes()) as usize)?;
        write(total, state.memory_bytes as usize)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemAlloc_v2(address: P, bytes: usize) -> u32 {
    call_in_context(|| {
        let mut state = state();
        state.operations += 1;
        state.forbidden_in_capture()?;
        let bytes = bytes as u64;
        if bytes == 0 {
            return Err(code::INVALID_VALUE);
        }
        if bytes > state.memory_bytes.saturating_sub(state.used_bytes()) {
            return Err(code::OUT_OF_MEMORY);
        }
        // SAFETY: the layout is not empty.
        let memory = unsafe { alloc(layout(bytes)?) };
        if memory.is_null() {
            return Err(code::OUT_OF_MEMORY);
        }
        // SAFETY: just allocated, with that length.
        unsafe { memory.write_bytes(POISON, bytes as usize) };
        let start = memory.expose_provenance() as u64;
        state.allocations.insert(start, bytes);
        write(address, start)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFree_v2(address: u64) -> u32 {
    call(|| {
        check_context()?;
        state().forbidden_in_capture()?;
        let bytes = state().allocations.remove(&address).ok_or(code::INVALID_VALUE)?;
        state().give_back();
        let memory = std::ptr::with_exposed_provenance_mut(address as usize);
        // SAFETY: allocated above with this layout, and removed from the list just now.
        unsafe { dealloc(memory, layout(bytes)?) };
        // Freed all the same, so that nothing is left behind for the next test.
        check_fault()
    })
}

/// Checks a range of device memory for an operation after what is in a stream.
fn range(address: u64, bytes: usize, stream: P) -> Result<*mut u8, u32> {
    stream::check(stream)?;
    let mut state = state();
    state.follow()?;
    if state.is_allocated(address, bytes as u64) {
        Ok(std::ptr::with_exposed_provenance_mut(address as usize))
    } else {
        Err(code::INVALID_VALUE)
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyHtoDAsync_v2(to: u64, from: *const u8, bytes: usize, stream: P) -> u32 {
    call_in_context(|| {
        let to = range(to, bytes, stream)?;
        // SAFETY: the range was checked; the caller keeps the host's side valid.
        unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoHAsync_v2(to: *mut u8, from: u64, bytes: usize, stream: P) -> u32 {
    call_in_context(|| {
        let from = range(from, bytes, stream)?;
        // SAFETY: the range was checked; the caller keeps the host's side valid.
        unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemsetD8Async(address: u64, value: u8, count: usize, stream: P) -> u32 {
    call_in_context(|| {
        let memory = range(address, count, stream)?;
        // SAFETY: the range was checked.
        unsafe { memory.write_bytes(value, count) };
        state().filled_async += count as u64;
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: P) -> u32 {
    call_in_context(|| {
        let (to, from) = (range(to, bytes, stream)?, range(from, bytes, stream)?);
        // SAFETY: the ranges were checked.
        unsafe { std::ptr::copy(from, to, bytes) };
        Ok(())
    })
}

/// `CUDA_MEMCPY2D`, without arrays.
#[repr(C)]
struct Side {
    x_bytes: usize,
    y: usize,
    memory_type: u32,
    host: P,
    device: u64,
    array: P,
    pitch: usize,
}

#[repr(C)]
struct Copy2d {
    from: Side,
    to: Side,
    width: usize,
    height: usize,
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpy2DAsync_v2(copy: P, stream: P) -> u32 {
    call_in_context(|| {
        // SAFETY: the driver API's contract.
        let Copy2d { from, to, width, height } = unsafe { &*copy.cast::<Copy2d>() };
        let of_device = |side: &Side| {
            side.memory_type == 2 && side.x_bytes == 0 && side.y == 0 && side.pitch >= *width
        };
        if !of_device(from) || !of_device(to) {
            return Err(code::INVALID_VALUE);
        }
        for row in 0..*height {
            let row_of =
                |side: &Side| range(side.device + (row * side.pitch) as u64, *width, stream);
            let (to, from) = (row_of(to)?, row_of(from)?);
            // SAFETY: the ranges were checked.
            unsafe { std::ptr::copy(from, to, *width) };
        }
        Ok(())
    })
}
