//! Launches in a CUDA context of any origin.

use std::{ffi::c_void, fmt, marker::PhantomData};

use cuda_driver::{Failure, ResultCode, TensorMapLayout, TensorMapType, functions};

use super::{
    failure,
    kernels::{Kernels, check_launch},
    maps::Maps,
};
use crate::{
    backend::{Launch, Specialised, TensorMapSpec},
    dtype::DType,
    error::Error,
    registry::Target,
};

/// A CUDA context for launches, with the kernels loaded into it so far.
///
/// The value owns neither the context nor a stream nor memory. The caller owns these, and may have
/// them from any library. A launch leaves the calling thread's current context unchanged.
pub struct Context {
    handle: functions::Context,
    name: String,
    target: Target,
    kernels: Kernels,
    pub(super) maps: Maps,
}

// SAFETY: the handle is a pointer that only the driver follows, and the driver's functions may
// be called with it from any thread; the rest is Send and Sync.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// The context that is current on the calling thread.
    ///
    /// # Errors
    /// [`Error::NoGpu`] when there is no driver, or no context is current; [`Error::Driver`] when
    /// the context does not respond.
    ///
    /// # Safety
    /// As for [`Context::from_handle`].
    pub unsafe fn current() -> Result<Self, Error> {
        driver()?;
        let handle = functions::ctx_current().map_err(asking)?;
        if handle.is_null() {
            return Err(Error::NoGpu {
                reason: "no CUDA context is current on this thread".to_owned(),
                remedy: "make one current (cuCtxSetCurrent), or give its handle to \
                         Context::from_handle"
                    .to_owned(),
            });
        }
        // SAFETY: `handle` is the current context; the other facts are those that `from_handle`
        // asks.
        unsafe { Self::from_handle(handle) }
    }

    /// The context with this handle, a `CUcontext`.
    ///
    /// # Errors
    /// [`Error::NoGpu`] when there is no driver; [`Error::Driver`] when the context does not
    /// respond.
    ///
    /// # Safety
    /// - `handle` is a context of the driver that this process uses.
    /// - The context is destroyed (a primary one: released) only after the value is dropped.
    /// - When the value is dropped, every launch made through it has ended, and no CUDA graph that
    ///   captured one will run again: the drop unloads the kernels.
    pub unsafe fn from_handle(handle: *mut c_void) -> Result<Self, Error> {
        driver()?;
        let _entered = Entered::new(handle).map_err(asking)?;
        let describe = || {
            let device = functions::ctx_device()?;
            Ok((functions::device_name(device)?, target(device)?))
        };
        let (name, target) = describe().map_err(asking)?;
        Ok(Self { handle, name, target, kernels: Kernels::default(), maps: Maps::default() })
    }

    /// The handle.
    #[must_use]
    pub const fn handle(&self) -> *mut c_void {
        self.handle
    }

    /// Name of the GPU.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The GPU's limits, as plans need them.
    #[must_use]
    pub const fn target(&self) -> Target {
        self.target
    }

    /// Compiles the entries that the driver has not yet compiled in this context, so that no launch
    /// has to (up to a second each). A stream under capture must not compile an entry: prepare
    /// before the capture.
    ///
    /// # Errors
    /// An entry that this GPU cannot run; [`Error::Module`] with the compiler's log; another error
    /// of the driver.
    pub fn prepare(&self, entries: impl IntoIterator<Item = Specialised>) -> Result<(), Error> {
        let _entered = self.enter().map_err(|code| self.failed("preparing kernels", code))?;
        entries.into_iter().try_for_each(|entry| self.kernels.get(entry, self).map(drop))
    }

    /// Encodes a tensor map for TMA. If the layout was encoded before, the driver only replaces the
    /// address.
    ///
    /// # Errors
    /// A layout that the copy engine cannot describe.
    pub fn encode_tensor_map(&self, map: &TensorMapSpec) -> Result<[u8; 128], Error> {
        let _entered = self.enter().map_err(|code| self.failed("encoding a tensor map", code))?;
        self.maps.encode(map)
    }

    /// Starts a launch on a stream of this context; does not wait. It allocates, fills and
    /// copies no device memory, and can be captured in a CUDA graph. The first launch of an
    /// entry that was not prepared compiles it.
    ///
    /// `stream` is a `CUstream`: null and 1 are the legacy default stream, 2 the calling
    /// thread's default stream.
    ///
    /// # Errors
    /// A launch that does not fit its entry or the GPU; an error of the driver, possibly from
    /// earlier work.
    ///
    /// # Safety
    /// - `stream` is live and belongs to this context.
    /// - `launch.args` holds the entry's argument struct.
    /// - Every buffer in it is memory that this GPU can access, and stays so until the launch
    ///   has ended.
    /// - From the launch to its end, no other work writes those buffers, and none reads the buffers
    ///   that the kernel writes.
    pub unsafe fn launch(&self, launch: &Launch, stream: *mut c_void) -> Result<(), Error> {
        // SAFETY: the four facts above are what `start` asks.
        unsafe { self.start(launch, stream) }?
            .map_err(|code| self.failed(Description(launch), code))
    }

    /// As [`Context::launch`], for an owner that adds information to the driver's code.
    ///
    /// # Safety
    /// As for [`Context::launch`].
    pub(crate) unsafe fn start(
        &self,
        launch: &Launch,
        stream: functions::Stream,
    ) -> Result<Result<(), ResultCode>, Error> {
        match self.enter() {
            // SAFETY: the context is entered, and the facts that `launch` asks hold.
            Ok(_entered) => unsafe { self.start_entered(launch, stream) },
            Err(code) => Ok(Err(code)),
        }
    }

    /// As [`Context::start`], where the context is current.
    ///
    /// # Safety
    /// As for [`Context::launch`], and this context is current on the calling thread.
    pub(crate) unsafe fn start_entered(
        &self,
        launch: &Launch,
        stream: functions::Stream,
    ) -> Result<Result<(), ResultCode>, Error> {
        let kernel = self.kernels.get(launch.specialised(), self)?;
        check_launch(launch, &self.target)?;
        let Launch { grid, block, shared_bytes, args, .. } = launch;
        // SAFETY: the kernel belongs to this context, which is current, and the arguments
        // have the size of its parameter, as checked. The rest is the caller's.
        let done = unsafe {
            functions::launch(
                kernel.function(),
                [grid.x, grid.y, grid.z],
                [block.x, block.y, block.z],
                *shared_bytes,
                stream,
                args.as_ptr().cast(),
            )
        };
        Ok(done.map_err(|failure| failure.code))
    }

    /// Makes the context current on the calling thread until the value is dropped.
    pub(crate) fn enter(&self) -> Result<Entered, ResultCode> {
        Entered::new(self.handle).map_err(|failure| failure.code)
    }

    /// The error of a call in this context.
    pub(super) fn failed(&self, what: impl fmt::Display, code: ResultCode) -> Error {
        failure::driver(&self.name, &what.to_string(), code)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // A lost context has taken its modules with it.
        if let Ok(_entered) = self.enter() {
            self.kernels.unload();
        }
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { handle, name, target, .. } = self;
        f.debug_struct("Context")
            .field("handle", handle)
            .field("name", name)
            .field("target", target)
            .finish_non_exhaustive()
    }
}

/// A launch in words, made only when it failed.
pub(crate) struct Description<'a>(pub(crate) &'a Launch);

impl fmt::Display for Description<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Launch { entry, constants, grid, block, shared_bytes, .. } = self.0;
        write!(
            f,
            "launching {} ({constants}) on {}x{}x{} blocks of {} threads with {shared_bytes} bytes of shared memory",
            entry.symbol,
            grid.x,
            grid.y,
            grid.z,
            block.count(),
        )
    }
}

/// Encodes a tensor map for TMA. A context must be current on the calling thread: the driver
/// refuses otherwise.
pub(super) fn encode_tensor_map(map: &TensorMapSpec) -> Result<[u8; 128], Error> {
    let layout = TensorMapLayout {
        address: map.address,
        element: match map.dtype {
            DType::F32 => TensorMapType::F32,
            DType::F16 => TensorMapType::F16,
            DType::BF16 => TensorMapType::Bf16,
            DType::E4M3 => {
                let reason = "no kernel copies e4m3 through one".into();
                return Err(Error::TensorMap { reason });
            }
        },
        dims: &map.dims,
        strides_bytes: &map.strides_bytes,
        box_dims: &map.box_dims,
        swizzle_bytes: map.swizzle_bytes,
    };
    cuda_driver::encode_tensor_map(&layout).map_err(|failure| refused(failure, map))
}

/// An encoded map with the address of `map`, which has the same layout. A context must be current,
/// as for [`encode_tensor_map`].
pub(super) fn replace_address(
    mut encoded: [u8; 128],
    map: &TensorMapSpec,
) -> Result<[u8; 128], Error> {
    cuda_driver::replace_address(&mut encoded, map.address)
        .map_err(|failure| refused(failure, map))?;
    Ok(encoded)
}

fn refused(failure: Failure, map: &TensorMapSpec) -> Error {
    Error::Driver {
        call: failure.function.to_owned(),
        message: format!("{} for {map:?}", failure.code),
    }
}

/// While the value lives, a context is current on the calling thread; its drop restores the
/// previous context.
pub(crate) struct Entered {
    /// The previous context, if it was another.
    before: Option<functions::Context>,
    /// The value belongs to the thread that made it.
    _thread: PhantomData<*const ()>,
}

impl Entered {
    /// Makes a context current. It must be live.
    pub(crate) fn new(context: functions::Context) -> Result<Self, Failure> {
        let mut entered = Self::as_it_is()?;
        if entered.before == Some(context) {
            entered.before = None;
            return Ok(entered);
        }
        // SAFETY: the caller's context is live.
        unsafe { functions::ctx_set_current(context) }?;
        Ok(entered)
    }

    /// Keeps the current context, and restores it at the end.
    pub(crate) fn as_it_is() -> Result<Self, Failure> {
        Ok(Self { before: Some(functions::ctx_current()?), _thread: PhantomData })
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

/// Checks that the driver exists and is initialised.
pub(crate) fn driver() -> Result<&'static cuda_driver::Driver, Error> {
    cuda_driver::status()
        .map_err(|error| Error::NoGpu { reason: error.reason(), remedy: error.remedy() })
}

/// A GPU's limits, as plans need them.
pub(crate) fn target(device: functions::Device) -> Result<Target, Failure> {
    use functions::attribute as a;
    let get = |attribute| functions::device_attribute(attribute, device).map(i32::unsigned_abs);
    Ok(Target {
        capability: (get(a::CAPABILITY_MAJOR)?, get(a::CAPABILITY_MINOR)?),
        max_shared_bytes: get(a::MAX_SHARED_BYTES)?,
        multiprocessors: get(a::MULTIPROCESSORS)?,
    })
}

fn asking(failure: Failure) -> Error {
    failure::driver("the CUDA context", "asking for the GPU", failure.code)
}
