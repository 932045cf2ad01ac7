//! Launches, which the emulator runs before the call returns; their faults wait to be
//! found as on a GPU.

use std::sync::Arc;

use kernels_gpu::entry::ArgsCopy;
use simt::{
    Dim3,
    emulator::{self, FaultKind, Options},
};

use crate::{
    P, call_in_context, code,
    graph::Node,
    module::Function,
    state::{context, state},
    stream,
};

#[unsafe(no_mangle)]
extern "C" fn cuLaunchKernel(
    function: *const Function,
    grid_x: u32,
    grid_y: u32,
    grid_z: u32,
    block_x: u32,
    block_y: u32,
    block_z: u32,
    shared_bytes: u32,
    stream: P,
    params: *const *const u8,
    extra: P,
) -> u32 {
    call_in_context(|| {
        stream::check(stream)?;
        if function.is_null() {
            return Err(code::INVALID_HANDLE);
        }
        // SAFETY: callers pass functions of modules that are loaded.
        let function = unsafe { &*function };
        if function.context != context() {
            return Err(code::INVALID_HANDLE);
        }
        let (grid, block) =
            (Dim3::new(grid_x, grid_y, grid_z), Dim3::new(block_x, block_y, block_z));
        let allowed =
            *function.shared_bytes.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let fits = grid.count() > 0
            && grid_x <= i32::MAX as u32
            && grid_y <= 65_535
            && grid_z <= 65_535
            && (1..=u64::from(function.max_threads)).contains(&block.count())
            && grid_x % function.entry.cluster == 0
            && shared_bytes <= allowed;
        if !fits || params.is_null() || !extra.is_null() {
            return Err(code::INVALID_VALUE);
        }
        // SAFETY: one parameter of the entry's size, copied during the call as the
        // driver does.
        let args = ArgsCopy::new(unsafe {
            std::slice::from_raw_parts(*params, function.entry.args_bytes)
        });
        let entry = function.entry;
        let launch = emulator::Launch { grid, block, cluster: entry.cluster, shared_bytes };
        let constants = function.constants;
        let node = Node { entry, constants, launch, args: Arc::new(args) };
        {
            let mut state = state();
            state.last_stream = stream as u64;
            match &mut state.capture {
                Some(capture) if capture.stream == stream as usize => {
                    capture.nodes.push(node);
                    return Ok(());
                }
                Some(capture) if stream as usize <= 1 => {
                    capture.broken = true;
                    return Err(code::CAPTURE_IMPLICIT);
                }
                _ => _ = state.busy.insert(stream as usize),
            }
        }
        run(&node);
        Ok(())
    })
}

/// Runs a kernel; a fault is kept for the call that waits.
pub(crate) fn run(node: &Node) {
    let Node { entry, constants, launch, args } = node;
    {
        let mut state = state();
        state.launches += 1;
        if state.pending_fault != 0 {
            return;
        }
    }
    // SAFETY: the arguments have the entry's size and alignment, and the memory that
    // they describe lives until the launch ends, which it does here.
    let run = || unsafe { (entry.run)(args.as_ptr()) };
    let options = Options { constants: constants.values(), ..Options::default() };
    let result = emulator::launch_with(*launch, &options, &run);
    if let Err(fault) = result {
        // A GPU does not say; a test's output should.
        eprintln!("fake CUDA driver: kernel {}: {fault}", entry.symbol);
        state().pending_fault = match fault.kind {
            FaultKind::OutOfBounds { .. } => code::ILLEGAL_ADDRESS,
            FaultKind::Misaligned { .. } => code::MISALIGNED_ADDRESS,
            _ => code::LAUNCH_FAILED,
        };
    }
}
