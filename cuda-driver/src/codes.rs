//! The result codes of the driver: names and texts.

use std::{ffi::CStr, fmt};

/// The result of a driver call: 0, or the code of its failure.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ResultCode(pub u32);

impl ResultCode {
    /// The call did its work.
    pub const SUCCESS: Self = Self(0);
    /// An argument is out of range.
    pub const INVALID_VALUE: Self = Self(1);
    /// Not enough device memory.
    pub const OUT_OF_MEMORY: Self = Self(2);
    /// There is no GPU that CUDA can use.
    pub const NO_DEVICE: Self = Self(100);
    /// The module holds no code for this GPU.
    pub const NO_BINARY_FOR_GPU: Self = Self(209);
    /// The PTX could not be compiled.
    pub const INVALID_PTX: Self = Self(218);
    /// The driver is older than the PTX version of a module.
    pub const UNSUPPORTED_PTX_VERSION: Self = Self(222);
    /// The driver library lacks a function.
    pub const SYMBOL_NOT_FOUND: Self = Self(302);
    /// There is no driver library, or it could not be opened.
    pub const LIBRARY_NOT_FOUND: Self = Self(303);
    /// A name is not there (a kernel in a module, for one).
    pub const NOT_FOUND: Self = Self(500);
    /// The stream or the event has not ended yet.
    pub const NOT_READY: Self = Self(600);
    /// A kernel accessed memory that it may not.
    pub const ILLEGAL_ADDRESS: Self = Self(700);
    /// A launch asked for more registers, threads or shared memory than there are.
    pub const LAUNCH_OUT_OF_RESOURCES: Self = Self(701);
    /// A failure that has no code of its own.
    pub const UNKNOWN: Self = Self(999);

    /// Whether the call did its work.
    #[must_use]
    pub const fn is_success(self) -> bool {
        self.0 == 0
    }

    /// The name in CUDA's headers, where it is known here.
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        find(self.0).map(|code| code.name)
    }

    /// Its meaning, in a few words.
    #[must_use]
    pub fn text(self) -> &'static CStr {
        find(self.0).map_or(c"an error that this program has no name for", |code| code.text)
    }

    /// Whether the context is lost: every later call fails with the same code until
    /// the process ends.
    #[must_use]
    pub const fn is_sticky(self) -> bool {
        matches!(self.0, 214 | 220 | 700 | 702 | 709 | 710 | 714..=719)
    }
}

impl fmt::Display for ResultCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.text().to_string_lossy();
        match self.name() {
            Some(name) => write!(f, "{text} (CUDA error {}, {name})", self.0),
            None => write!(f, "{text} (CUDA error {})", self.0),
        }
    }
}

impl fmt::Debug for ResultCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ResultCode({}, {})", self.0, self.name().unwrap_or("?"))
    }
}

/// A row of the table below.
struct Code {
    value: u32,
    name: &'static str,
    text: &'static CStr,
}

fn find(value: u32) -> Option<&'static Code> {
    CODES.binary_search_by_key(&value, |code| code.value).ok().map(|i| &CODES[i])
}

macro_rules! codes {
    ($($value:literal $name:ident $text:literal;)*) => {
        &[$(Code { value: $value, name: concat!("CUDA_", stringify!($name)), text: $text },)*]
    };
}

/// In ascending order.
#[rustfmt::skip]
const CODES: &[Code] = codes! {
    0 SUCCESS c"success";
    1 ERROR_INVALID_VALUE c"an argument is out of range";
    2 ERROR_OUT_OF_MEMORY c"not enough device memory";
    3 ERROR_NOT_INITIALIZED c"the driver is not initialised";
    4 ERROR_DEINITIALIZED c"the driver is shutting down";
    5 ERROR_PROFILER_DISABLED c"the profiler is disabled";
    6 ERROR_PROFILER_NOT_INITIALIZED c"the profiler is not initialised";
    7 ERROR_PROFILER_ALREADY_STARTED c"the profiler is already started";
    8 ERROR_PROFILER_ALREADY_STOPPED c"the profiler is already stopped";
    34 ERROR_STUB_LIBRARY c"the driver library is a stub made for linking";
    46 ERROR_DEVICE_UNAVAILABLE c"the GPU is in use by another process in exclusive mode";
    100 ERROR_NO_DEVICE c"no GPU that CUDA can use";
    101 ERROR_INVALID_DEVICE c"no GPU of that number";
    102 ERROR_DEVICE_NOT_LICENSED c"the GPU has no licence";
    200 ERROR_INVALID_IMAGE c"the module is not valid";
    201 ERROR_INVALID_CONTEXT c"no context is current on this thread, or it is not valid";
    202 ERROR_CONTEXT_ALREADY_CURRENT c"the context is already current";
    205 ERROR_MAP_FAILED c"mapping failed";
    206 ERROR_UNMAP_FAILED c"unmapping failed";
    207 ERROR_ARRAY_IS_MAPPED c"the array is mapped";
    208 ERROR_ALREADY_MAPPED c"the resource is already mapped";
    209 ERROR_NO_BINARY_FOR_GPU c"the module holds no code for this GPU";
    210 ERROR_ALREADY_ACQUIRED c"the resource is already acquired";
    211 ERROR_NOT_MAPPED c"the resource is not mapped";
    212 ERROR_NOT_MAPPED_AS_ARRAY c"the resource is not mapped as an array";
    213 ERROR_NOT_MAPPED_AS_POINTER c"the resource is not mapped as a pointer";
    214 ERROR_ECC_UNCORRECTABLE c"the GPU's memory had an error that ECC could not correct";
    215 ERROR_UNSUPPORTED_LIMIT c"the GPU does not have that limit";
    216 ERROR_CONTEXT_ALREADY_IN_USE c"the context is in use by another thread";
    217 ERROR_PEER_ACCESS_UNSUPPORTED c"the GPUs cannot access each other's memory";
    218 ERROR_INVALID_PTX c"the PTX could not be compiled";
    219 ERROR_INVALID_GRAPHICS_CONTEXT c"the graphics context is not valid";
    220 ERROR_NVLINK_UNCORRECTABLE c"NVLink had an error that could not be corrected";
    221 ERROR_JIT_COMPILER_NOT_FOUND c"the driver's PTX compiler library is missing";
    222 ERROR_UNSUPPORTED_PTX_VERSION c"the driver is older than the PTX version of the module";
    223 ERROR_JIT_COMPILATION_DISABLED c"compiling PTX is disabled (CUDA_DISABLE_PTX_JIT)";
    224 ERROR_UNSUPPORTED_EXEC_AFFINITY c"the GPU does not have that execution affinity";
    225 ERROR_UNSUPPORTED_DEVSIDE_SYNC c"the PTX synchronises on the device, which is not supported";
    226 ERROR_CONTAINED c"the GPU had an error that it contained";
    300 ERROR_INVALID_SOURCE c"the source of the kernel is not valid";
    301 ERROR_FILE_NOT_FOUND c"file not found";
    302 ERROR_SHARED_OBJECT_SYMBOL_NOT_FOUND c"the driver library lacks this function: it is too old";
    303 ERROR_SHARED_OBJECT_INIT_FAILED c"the driver library could not be opened";
    304 ERROR_OPERATING_SYSTEM c"a call to the operating system failed";
    400 ERROR_INVALID_HANDLE c"a handle is not valid";
    401 ERROR_ILLEGAL_STATE c"a resource is not in a state that allows this";
    500 ERROR_NOT_FOUND c"the name was not found";
    600 ERROR_NOT_READY c"not finished yet";
    700 ERROR_ILLEGAL_ADDRESS c"a kernel accessed memory that it may not";
    701 ERROR_LAUNCH_OUT_OF_RESOURCES c"the launch needs more registers, threads or shared memory than there are";
    702 ERROR_LAUNCH_TIMEOUT c"a kernel ran longer than the display's watchdog allows";
    703 ERROR_LAUNCH_INCOMPATIBLE_TEXTURING c"the launch uses an incompatible texturing mode";
    704 ERROR_PEER_ACCESS_ALREADY_ENABLED c"peer access is already enabled";
    705 ERROR_PEER_ACCESS_NOT_ENABLED c"peer access is not enabled";
    708 ERROR_PRIMARY_CONTEXT_ACTIVE c"the primary context is already active";
    709 ERROR_CONTEXT_IS_DESTROYED c"the context was destroyed";
    710 ERROR_ASSERT c"a kernel's assertion failed";
    711 ERROR_TOO_MANY_PEERS c"too many peers";
    712 ERROR_HOST_MEMORY_ALREADY_REGISTERED c"the host memory is already registered";
    713 ERROR_HOST_MEMORY_NOT_REGISTERED c"the host memory is not registered";
    714 ERROR_HARDWARE_STACK_ERROR c"a kernel broke its call stack";
    715 ERROR_ILLEGAL_INSTRUCTION c"a kernel met an instruction that is not valid";
    716 ERROR_MISALIGNED_ADDRESS c"a kernel accessed memory at a misaligned address";
    717 ERROR_INVALID_ADDRESS_SPACE c"a kernel used an address of the wrong memory space";
    718 ERROR_INVALID_PC c"a kernel jumped to an address that is not valid";
    719 ERROR_LAUNCH_FAILED c"a kernel failed while it ran";
    720 ERROR_COOPERATIVE_LAUNCH_TOO_LARGE c"a cooperative launch has more blocks than fit at once";
    800 ERROR_NOT_PERMITTED c"not permitted";
    801 ERROR_NOT_SUPPORTED c"not supported on this system";
    802 ERROR_SYSTEM_NOT_READY c"the system is not ready: NVIDIA's services (fabric manager) may not be running";
    803 ERROR_SYSTEM_DRIVER_MISMATCH c"the kernel module and the driver library differ in version: reboot, or reinstall the driver";
    804 ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE c"the forward compatibility package does not support this GPU";
    805 ERROR_MPS_CONNECTION_FAILED c"no connection to the MPS daemon";
    806 ERROR_MPS_RPC_FAILURE c"a call to the MPS daemon failed";
    807 ERROR_MPS_SERVER_NOT_READY c"the MPS server is not ready";
    808 ERROR_MPS_MAX_CLIENTS_REACHED c"the MPS server has no room for another client";
    809 ERROR_MPS_MAX_CONNECTIONS_REACHED c"the MPS server has no room for another connection";
    810 ERROR_MPS_CLIENT_TERMINATED c"the MPS client was terminated";
    900 ERROR_STREAM_CAPTURE_UNSUPPORTED c"not allowed while a stream is captured";
    901 ERROR_STREAM_CAPTURE_INVALIDATED c"the capture of the stream failed earlier";
    902 ERROR_STREAM_CAPTURE_MERGE c"two captures would merge";
    903 ERROR_STREAM_CAPTURE_UNMATCHED c"the capture was not begun on this stream";
    904 ERROR_STREAM_CAPTURE_UNJOINED c"the capture has forks that were not joined";
    905 ERROR_STREAM_CAPTURE_ISOLATION c"the capture would depend on work outside of it";
    906 ERROR_STREAM_CAPTURE_IMPLICIT c"the capture would depend on the default stream";
    907 ERROR_CAPTURED_EVENT c"the event belongs to a capture";
    908 ERROR_STREAM_CAPTURE_WRONG_THREAD c"the capture was begun by another thread";
    909 ERROR_TIMEOUT c"timed out";
    910 ERROR_GRAPH_EXEC_UPDATE_FAILURE c"the graph could not be updated";
    911 ERROR_EXTERNAL_DEVICE c"a device outside of CUDA's control failed";
    912 ERROR_INVALID_CLUSTER_SIZE c"the cluster is larger than the GPU allows";
    999 ERROR_UNKNOWN c"an unknown error";
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_sorted_so_that_binary_search_finds_every_row() {
        assert!(CODES.windows(2).all(|pair| pair[0].value < pair[1].value));
    }

    #[test]
    fn every_code_has_a_text() {
        assert_eq!(
            ResultCode(700).to_string(),
            "a kernel accessed memory that it may not (CUDA error 700, CUDA_ERROR_ILLEGAL_ADDRESS)"
        );
        assert!(ResultCode(5000).to_string().contains("CUDA error 5000"));
    }
}
