//! Settings and questions of tests, beyond the driver's own functions.

use crate::state::state;

/// How many GPUs there are from now on.
#[unsafe(no_mangle)]
extern "C" fn fake_cuda_set_gpus(gpus: i32) {
    state().gpus = gpus;
}

/// Compute capability of the GPUs opened from now on.
#[unsafe(no_mangle)]
extern "C" fn fake_cuda_set_compute_capability(major: i32, minor: i32) {
    state().compute_capability = (major, minor);
}

/// Memory of a GPU; what is allocated stays.
#[unsafe(no_mangle)]
extern "C" fn fake_cuda_set_memory_bytes(bytes: u64) {
    state().memory_bytes = bytes;
}

/// After `calls` more calls, the next fails with `code`.
#[unsafe(no_mangle)]
extern "C" fn fake_cuda_fail_after(calls: u32, code: u32) {
    state().planned = Some((calls, code));
}

/// Has the kernels launched so far end with that code, as a fault of theirs would.
#[unsafe(no_mangle)]
extern "C" fn fake_cuda_set_fault(code: u32) {
    state().pending_fault = code;
}

/// Forgets the fault of a kernel, which a real driver does when the process ends.
#[unsafe(no_mangle)]
extern "C" fn fake_cuda_clear_fault() {
    let mut state = state();
    (state.pending_fault, state.fault, state.planned) = (0, 0, None);
    state.busy.clear();
    state.capture = None;
}

/// Bytes allocated now.
#[unsafe(no_mangle)]
extern "C" fn fake_cuda_used_bytes() -> u64 {
    state().used_bytes()
}

/// Streams, events, modules and references to contexts that live now.
#[unsafe(no_mangle)]
extern "C" fn fake_cuda_live_objects() -> u64 {
    let state = state();
    state.handles.len() as u64 + u64::from(state.contexts.values().sum::<u32>())
}

/// Launches so far.
#[unsafe(no_mangle)]
extern "C" fn fake_cuda_launches() -> u64 {
    state().launches
}

/// The stream of the last launch.
#[unsafe(no_mangle)]
extern "C" fn fake_cuda_last_stream() -> u64 {
    state().last_stream
}

/// How often memory was freed or a module unloaded while a stream had launches that no call
/// had waited for.
#[unsafe(no_mangle)]
extern "C" fn fake_cuda_early() -> u64 {
    state().early
}

/// Allocations, frees, copies, fills and waits so far.
#[unsafe(no_mangle)]
extern "C" fn fake_cuda_operations() -> u64 {
    state().operations
}

/// Bytes that asynchronous fills wrote so far.
#[unsafe(no_mangle)]
extern "C" fn fake_cuda_filled_async() -> u64 {
    state().filled_async
}

/// Tensor maps encoded so far; maps that got another address are not counted.
#[unsafe(no_mangle)]
extern "C" fn fake_cuda_maps_encoded() -> u64 {
    state().maps_encoded
}
