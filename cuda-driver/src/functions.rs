//! The driver's functions, each looked up in the library on its first call.
//!
//! Handles are plain pointers and numbers, as any other library has them.
//! The first pointer of a driver function to which it writes its result is the return
//! value here.
//!
//! # Safety
//! A call is sound when these facts hold; each function names the facts that concern it, and
//! one that takes no handle and no address is safe:
//!
//! 1. A handle (context, stream, event, module, function) came from the driver and was
//!    not destroyed or released. A stream may also be null, 1 or 2: the default streams.
//! 2. Handles and addresses belong to the context that is current on the calling thread.
//!    Without one, functions that need it fail (code 201).
//! 3. Device memory that a call or a launch uses stays allocated until the stream has
//!    passed it, and no other stream uses it in a conflicting way meanwhile.
//! 4. Host memory that an asynchronous copy uses stays valid until the stream has passed it.

use std::{
    ffi::{CStr, c_char, c_void},
    mem::MaybeUninit,
    ptr,
    sync::OnceLock,
};

use crate::{Failure, ResultCode, library};

/// A context (`CUcontext`); null where there is none.
pub type Context = *mut c_void;
/// A GPU (`CUdevice`).
pub type Device = i32;
/// A stream (`CUstream`): null and 1 are the legacy default stream, 2 the calling thread's.
pub type Stream = *mut c_void;
/// An event (`CUevent`).
pub type Event = *mut c_void;
/// A module (`CUmodule`).
pub type Module = *mut c_void;
/// A kernel of a module (`CUfunction`).
pub type Function = *mut c_void;
/// Work that a stream was captured with (`CUgraph`).
pub type CapturedGraph = *mut c_void;
/// The same, ready for launches (`CUgraphExec`).
pub type ExecutableGraph = *mut c_void;

/// Calls the driver's function of that name.
macro_rules! call {
    ($symbol:ident($($arg:expr => $type:ty),* $(,)?)) => {{
        static ADDRESS: OnceLock<Result<usize, ResultCode>> = OnceLock::new();
        let name = stringify!($symbol);
        let code = match *ADDRESS.get_or_init(|| library::address(name)) {
            Ok(address) => {
                // SAFETY: the driver's function of that name has this signature, and the
                // library stays open for the life of the process.
                let function = unsafe {
                    std::mem::transmute::<usize, unsafe extern "system" fn($($type),*) -> u32>(address)
                };
                // SAFETY: the caller keeps to the list at the top of this file.
                ResultCode(unsafe { function($($arg),*) })
            }
            Err(code) => code,
        };
        if code.is_success() { Ok(()) } else { Err(Failure { function: name, code }) }
    }};
}
pub(crate) use call;

/// Makes a function of each line. What follows an `unsafe fn` are the facts of the list above
/// that the caller must see to; the others take no handle and no address.
macro_rules! functions {
    () => {};
    ($(#[$meta:meta])* fn $name:ident = $symbol:ident($($arg:ident: $type:ty),*) -> $out:ty; $($rest:tt)*) => {
        $(#[$meta])*
        #[doc = concat!(" (`", stringify!($symbol), "`)")]
        ///
        /// # Errors
        /// The driver's result code, or that there is no driver.
        pub fn $name($($arg: $type),*) -> Result<$out, Failure> {
            functions!(@result $symbol($($arg: $type),*) -> $out)
        }
        functions! { $($rest)* }
    };
    ($(#[$meta:meta])* unsafe fn $name:ident = $symbol:ident($($arg:ident: $type:ty),*) $(-> $out:ty)?, $facts:literal; $($rest:tt)*) => {
        $(#[$meta])*
        #[doc = concat!(" (`", stringify!($symbol), "`)")]
        ///
        /// # Errors
        /// The driver's result code, or that there is no driver.
        ///
        /// # Safety
        #[doc = concat!("Facts ", $facts, " of the [list](self#safety).")]
        pub unsafe fn $name($($arg: $type),*) -> Result<functions!(@out $($out)?), Failure> {
            functions!(@result $symbol($($arg: $type),*) $(-> $out)?)
        }
        functions! { $($rest)* }
    };
    (@out) => { () };
    (@out $out:ty) => { $out };
    (@result $symbol:ident($($arg:ident: $type:ty),*)) => {
        call!($symbol($($arg => $type),*))
    };
    (@result $symbol:ident($($arg:ident: $type:ty),*) -> $out:ty) => {{
        // Zero is a value of every result: numbers and pointers.
        let mut out = MaybeUninit::<$out>::zeroed();
        call!($symbol(out.as_mut_ptr() => *mut $out, $($arg => $type),*))?;
        // SAFETY: zero, or what the driver wrote.
        Ok(unsafe { out.assume_init() })
    }};
}

functions! {
    /// The newest CUDA version that the driver supports, 1000 · major + 10 · minor
    fn version = cuDriverGetVersion() -> i32;

    /// How many GPUs there are
    fn device_count = cuDeviceGetCount() -> i32;
    /// The GPU of that number
    fn device = cuDeviceGet(index: i32) -> Device;
    /// Memory of a GPU in bytes
    fn device_total_bytes = cuDeviceTotalMem_v2(device: Device) -> usize;
    /// A number of a GPU; see [`attribute`]
    fn device_attribute = cuDeviceGetAttribute(attribute: u32, device: Device) -> i32;

    /// The context that every library of the process shares, made by the first who asks.
    /// Each call needs a [`primary_release`]
    fn primary_retain = cuDevicePrimaryCtxRetain(device: Device) -> Context;
    /// Gives one [`primary_retain`] back; the last destroys the context and what is in it
    unsafe fn primary_release = cuDevicePrimaryCtxRelease_v2(device: Device), "1";
    /// The calling thread's context; null where it has none
    fn ctx_current = cuCtxGetCurrent() -> Context;
    /// Makes a context the calling thread's; null takes it away
    unsafe fn ctx_set_current = cuCtxSetCurrent(context: Context), "1";
    /// The GPU of the calling thread's context
    fn ctx_device = cuCtxGetDevice() -> Device;

    /// Unloads a module, after its last launch has ended
    unsafe fn module_unload = cuModuleUnload(module: Module), "1, 2, 3";
    /// A number of a kernel; see [`attribute`]
    unsafe fn function_attribute = cuFuncGetAttribute(attribute: u32, function: Function) -> i32, "1, 2";
    /// Sets a number of a kernel; see [`attribute`]
    unsafe fn function_set_attribute = cuFuncSetAttribute(function: Function, attribute: u32, value: i32), "1, 2";

    /// Makes a stream; see [`STREAM_NON_BLOCKING`]
    fn stream_create = cuStreamCreate(flags: u32) -> Stream;
    /// Makes a stream whose work goes before that of streams with a larger `priority`; beyond the range
    /// that there is, it is the nearest
    fn stream_create_with_priority = cuStreamCreateWithPriority(flags: u32, priority: i32) -> Stream;
    /// Destroys a stream, whose work goes on to its end
    unsafe fn stream_destroy = cuStreamDestroy_v2(stream: Stream), "1, 2";
    /// Waits until a stream is empty
    unsafe fn stream_synchronize = cuStreamSynchronize(stream: Stream), "1, 2";
    /// Whether a stream is empty: code 600 ([`ResultCode::NOT_READY`]) if not
    unsafe fn stream_query = cuStreamQuery(stream: Stream), "1, 2";
    /// Has what a stream gets from now on wait until another has passed an event; `flags` is 0
    unsafe fn stream_wait_event = cuStreamWaitEvent(stream: Stream, event: Event, flags: u32), "1, 2";

    /// Captures what the calling thread gives to a stream from now on: it does not run. `mode` is
    /// [`CAPTURE_THREAD_LOCAL`]
    unsafe fn stream_begin_capture = cuStreamBeginCapture_v2(stream: Stream, mode: u32), "1, 2";
    /// Makes a graph ready for launches; `flags` is 0
    unsafe fn graph_instantiate = cuGraphInstantiateWithFlags(graph: CapturedGraph, flags: u64) -> ExecutableGraph, "1, 2";
    /// Starts the work of a graph on a stream
    unsafe fn graph_launch = cuGraphLaunch(graph: ExecutableGraph, stream: Stream), "1, 2, 3";
    /// Destroys a graph that was ready for launches; a launch goes on to its end
    unsafe fn executable_graph_destroy = cuGraphExecDestroy(graph: ExecutableGraph), "1";
    /// Destroys a captured graph; what was made ready of it stays
    unsafe fn captured_graph_destroy = cuGraphDestroy(graph: CapturedGraph), "1";

    /// Allocates device memory: its address
    fn mem_alloc = cuMemAlloc_v2(bytes: usize) -> u64;
    /// Frees device memory
    unsafe fn mem_free = cuMemFree_v2(address: u64), "1, 2, 3";
    /// Copies from the host to device memory
    unsafe fn copy_to_device = cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, stream: Stream), "1 to 4";
    /// Copies from device memory to the host
    unsafe fn copy_to_host = cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, stream: Stream), "1 to 4";
    /// Copies from device memory to device memory
    unsafe fn copy = cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: Stream), "1 to 3";
    /// Fills device memory with a byte
    unsafe fn fill = cuMemsetD8Async(address: u64, value: u8, bytes: usize, stream: Stream), "1 to 3";

    /// Makes an event that takes the time; `flags` is 0, or [`EVENT_WITHOUT_TIME`]
    fn event_create = cuEventCreate(flags: u32) -> Event;
    /// Destroys an event
    unsafe fn event_destroy = cuEventDestroy_v2(event: Event), "1, 2";
    /// Records an event in a stream
    unsafe fn event_record = cuEventRecord(event: Event, stream: Stream), "1, 2";
    /// Waits until the stream has passed an event
    unsafe fn event_synchronize = cuEventSynchronize(event: Event), "1, 2";
    /// Milliseconds between two events that the stream has passed
    unsafe fn event_elapsed_ms = cuEventElapsedTime(start: Event, end: Event) -> f32, "1, 2";
}

/// A stream that does not wait for the legacy default stream, nor that for it.
pub const STREAM_NON_BLOCKING: u32 = 1;

/// An event that takes no time, which costs the streams less.
pub const EVENT_WITHOUT_TIME: u32 = 2;

/// A capture in which the capturing thread alone must not allocate, wait or load modules
/// (`CU_STREAM_CAPTURE_MODE_THREAD_LOCAL`).
pub const CAPTURE_THREAD_LOCAL: u32 = 1;

/// Numbers that the driver knows of GPUs and kernels.
pub mod attribute {
    /// A GPU's attribute: the highest clock of the multiprocessors in kHz.
    pub const CLOCK_KHZ: u32 = 13;
    /// A GPU's attribute: multiprocessors.
    pub const MULTIPROCESSORS: u32 = 16;
    /// A GPU's attribute: bytes of L2 cache.
    pub const L2_BYTES: u32 = 38;
    /// A GPU's attribute: the first number of its compute capability.
    pub const CAPABILITY_MAJOR: u32 = 75;
    /// A GPU's attribute: the second number of its compute capability.
    pub const CAPABILITY_MINOR: u32 = 76;
    /// A GPU's attribute: the most shared memory of a block, static and dynamic, in bytes.
    pub const MAX_SHARED_BYTES: u32 = 97;
    /// A kernel's attribute: its static shared memory in bytes.
    pub const STATIC_SHARED_BYTES: u32 = 1;
    /// A kernel's attribute: the most dynamic shared memory that a launch may ask for, in bytes.
    pub const DYNAMIC_SHARED_BYTES: u32 = 8;
}

/// Initialises the driver. (`cuInit`)
///
/// # Errors
/// The driver's result code, or that there is no driver.
pub fn init() -> Result<(), Failure> {
    // No flags are defined.
    call!(cuInit(0 => u32))
}

/// Waits for all streams of the current context. (`cuCtxSynchronize`)
///
/// # Errors
/// The driver's result code, possibly of earlier work, or that there is no driver.
pub fn ctx_synchronize() -> Result<(), Failure> {
    call!(cuCtxSynchronize())
}

/// Name of a GPU. (`cuDeviceGetName`)
///
/// # Errors
/// The driver's result code, or that there is no driver.
pub fn device_name(device: Device) -> Result<String, Failure> {
    let mut name = [0u8; 256];
    call!(cuDeviceGetName(
        name.as_mut_ptr().cast() => *mut c_char,
        name.len() as i32 => i32,
        device => Device,
    ))?;
    let text = CStr::from_bytes_until_nul(&name).unwrap_or_default();
    Ok(text.to_string_lossy().into_owned())
}

/// Ends the capture of a stream: the graph of what it was given. (`cuStreamEndCapture`)
///
/// # Errors
/// The driver's result code, which says what broke the capture, or that there is no driver.
///
/// # Safety
/// Facts 1 and 2 of the [list](self#safety).
pub unsafe fn stream_end_capture(stream: Stream) -> Result<CapturedGraph, Failure> {
    let mut graph: CapturedGraph = ptr::null_mut();
    call!(cuStreamEndCapture(stream => Stream, &raw mut graph => *mut CapturedGraph))?;
    Ok(graph)
}

/// Free and total memory of the current context's GPU in bytes. (`cuMemGetInfo_v2`)
///
/// # Errors
/// The driver's result code, or that there is no driver.
pub fn mem_info() -> Result<(u64, u64), Failure> {
    let (mut free, mut total) = (0usize, 0usize);
    call!(cuMemGetInfo_v2(&raw mut free => *mut usize, &raw mut total => *mut usize))?;
    Ok((free as u64, total as u64))
}

/// A kernel of a module. (`cuModuleGetFunction`)
///
/// # Errors
/// The driver's result code, or that there is no driver.
///
/// # Safety
/// Facts 1 and 2 of the [list](self#safety).
pub unsafe fn module_function(module: Module, name: &CStr) -> Result<Function, Failure> {
    let mut function: Function = ptr::null_mut();
    call!(cuModuleGetFunction(
        &raw mut function => *mut Function,
        module => Module,
        name.as_ptr() => *const c_char,
    ))?;
    Ok(function)
}

/// A module that did not load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadFailure {
    /// The call and its result code.
    pub failure: Failure,
    /// The log of the driver's compiler, on any number of lines; empty if nothing.
    pub log: String,
}

/// Compiles PTX and loads it into the current context. (`cuModuleLoadDataEx`)
///
/// # Errors
/// The driver's result code with the compiler's log, or that there is no driver.
pub fn module_load(ptx: &CStr) -> Result<Module, LoadFailure> {
    // The numbers of CU_JIT_ERROR_LOG_BUFFER and CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES.
    let mut options = [5u32, 6];
    const CAPACITY: usize = 16 << 10;
    let mut log = vec![0u8; CAPACITY];
    // Options that fit a pointer are passed by value in its place.
    let mut values =
        [log.as_mut_ptr().cast::<c_void>(), ptr::without_provenance_mut::<c_void>(CAPACITY)];
    let mut module: Module = ptr::null_mut();
    // The text ends in a NUL, the log has the capacity stated, both arrays have two entries.
    let done = call!(cuModuleLoadDataEx(
        &raw mut module => *mut Module,
        ptx.as_ptr().cast() => *const c_void,
        options.len() as u32 => u32,
        options.as_mut_ptr() => *mut u32,
        values.as_mut_ptr() => *mut *mut c_void,
    ));
    done.map(|()| module).map_err(|failure| {
        let text = CStr::from_bytes_until_nul(&log).unwrap_or_default();
        LoadFailure { failure, log: text.to_string_lossy().trim().to_owned() }
    })
}

/// Starts a kernel that has one parameter. The driver copies it during the call.
/// (`cuLaunchKernel`)
///
/// # Errors
/// The driver's result code (possibly that of an earlier launch), or that there is no driver.
///
/// # Safety
/// Facts 1 to 3 of the [list](self#safety); `parameter` leads to as many bytes as the
/// kernel's parameter has.
pub unsafe fn launch(
    function: Function,
    grid: [u32; 3],
    block: [u32; 3],
    dynamic_shared_bytes: u32,
    stream: Stream,
    parameter: *const c_void,
) -> Result<(), Failure> {
    let mut parameters = [parameter.cast_mut()];
    call!(cuLaunchKernel(
        function => Function,
        grid[0] => u32, grid[1] => u32, grid[2] => u32,
        block[0] => u32, block[1] => u32, block[2] => u32,
        dynamic_shared_bytes => u32,
        stream => Stream,
        parameters.as_mut_ptr() => *mut *mut c_void,
        ptr::null_mut() => *mut *mut c_void,
    ))
}

/// Rows of equal length in device memory, `pitch` bytes apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PitchedRows {
    /// Address of the first row.
    pub address: u64,
    /// Bytes from one row to the next.
    pub pitch: usize,
}

/// Copies `rows` rows of `bytes` bytes from device memory to device memory. (`cuMemcpy2DAsync_v2`)
///
/// # Errors
/// The driver's result code, or that there is no driver.
///
/// # Safety
/// Facts 1 to 3 of the [list](self#safety).
pub unsafe fn copy_rows(
    to: PitchedRows,
    from: PitchedRows,
    bytes: usize,
    rows: usize,
    stream: Stream,
) -> Result<(), Failure> {
    /// One side of `CUDA_MEMCPY2D`.
    #[repr(C)]
    struct Side {
        x_bytes: usize,
        y: usize,
        memory_type: u32,
        host: *const c_void,
        device: u64,
        array: *const c_void,
        pitch: usize,
    }
    #[repr(C)]
    struct Copy {
        from: Side,
        to: Side,
        width_bytes: usize,
        height: usize,
    }
    /// `CU_MEMORYTYPE_DEVICE`.
    const DEVICE: u32 = 2;
    let side = |rows: PitchedRows| Side {
        x_bytes: 0,
        y: 0,
        memory_type: DEVICE,
        host: ptr::null(),
        device: rows.address,
        array: ptr::null(),
        pitch: rows.pitch,
    };
    let copy = Copy { from: side(from), to: side(to), width_bytes: bytes, height: rows };
    call!(cuMemcpy2DAsync_v2(&raw const copy => *const Copy, stream => Stream))
}
