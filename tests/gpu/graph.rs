//! CUDA graphs and streams as tests need them.

use std::{ffi::c_void, ptr};

use cuda_driver::{
    Failure,
    functions::{self, STREAM_NON_BLOCKING, Stream},
};

/// A function of the driver that the library has no use for.
macro_rules! driver {
    ($name:ident($($arg:expr => $type:ty),*)) => {{
        let address = ::cuda_driver::address(stringify!($name)).expect(stringify!($name));
        // SAFETY: the driver's function of that name has this signature; its handles live and
        // its pointers are valid, as each use below shows.
        let code = unsafe {
            let function =
                std::mem::transmute::<usize, unsafe extern "system" fn($($type),*) -> u32>(address);
            function($($arg),*)
        };
        match ::cuda_driver::ResultCode(code) {
            ::cuda_driver::ResultCode::SUCCESS => Ok(()),
            code => Err(::cuda_driver::Failure { function: stringify!($name), code }),
        }
    }};
}

/// A stream of the context that is current when it is made.
pub struct OwnStream(pub Stream);

impl OwnStream {
    pub fn new() -> Self {
        Self(functions::stream_create(STREAM_NON_BLOCKING).expect("a stream"))
    }
}

impl Drop for OwnStream {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed here alone.
        _ = unsafe { functions::stream_destroy(self.0) };
    }
}

/// A graph that can be launched.
pub struct Graph {
    graph: *mut c_void,
    executable: *mut c_void,
}

impl Graph {
    /// What `work` starts on a stream.
    pub fn capture(stream: Stream, work: impl FnOnce()) -> Result<Self, Failure> {
        /// `CU_STREAM_CAPTURE_MODE_GLOBAL`: the strictest.
        const GLOBAL: u32 = 0;
        driver!(cuStreamBeginCapture_v2(stream => Stream, GLOBAL => u32))?;
        work();
        let mut graph = ptr::null_mut();
        driver!(cuStreamEndCapture(stream => Stream, &raw mut graph => *mut *mut c_void))?;
        let mut executable = ptr::null_mut();
        driver!(cuGraphInstantiateWithFlags(
            &raw mut executable => *mut *mut c_void,
            graph => *mut c_void,
            0 => u64
        ))?;
        Ok(Self { graph, executable })
    }

    pub fn launch(&self, stream: Stream) -> Result<(), Failure> {
        driver!(cuGraphLaunch(self.executable => *mut c_void, stream => Stream))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        _ = driver!(cuGraphExecDestroy(self.executable => *mut c_void));
        _ = driver!(cuGraphDestroy(self.graph => *mut c_void));
    }
}
