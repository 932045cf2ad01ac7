//! Kernels out of the embedded PTX modules. Each is compiled by the driver when it is
//! first launched, by itself: a module holds every instance of every kernel, and
//! compiling them all would take many times longer.

use std::{
    collections::HashMap,
    ffi::CString,
    sync::{Arc, Mutex},
};

use cuda_driver::ResultCode;
use cust::{
    error::CudaResult,
    module::Module,
    sys::{CUfunction, CUfunction_attribute, cuFuncSetAttribute},
};
use kernels_gpu::entry::Entry;

use super::{GpuDescription, failure, lock};
use crate::{backend::Launch, error::Error, ptx};

/// Dynamic shared memory that a block may have without asking, on every GPU.
const SHARED_BYTES_UNASKED: u32 = 48 << 10;

/// Why a GPU of that compute capability cannot run an entry; `None` when it can.
#[must_use]
pub fn why_not(entry: &Entry, compute_capability: (u32, u32)) -> Option<String> {
    let Some(module) = ptx::modules().iter().find(|module| module.name == entry.module) else {
        return Some(format!(
            "this library was built without the PTX module {}; build it again without \
             FLASH_ATTENTION_PTX=emulator-only",
            entry.module
        ));
    };
    if module.loads_on(compute_capability) {
        return None;
    }
    let ((major, minor), given) = (module.compute_capability, compute_capability);
    let or_newer = if module.exact { "and no other" } else { "or newer" };
    Some(format!(
        "it needs compute capability {major}.{minor} {or_newer}, and this GPU has {}.{}",
        given.0, given.1
    ))
}

/// A kernel that can be launched.
pub(super) struct Kernel {
    function: CUfunction,
    /// Dynamic shared memory that its launches may have so far.
    shared_bytes: Mutex<u32>,
    /// What the function belongs to.
    _module: Module,
}

// SAFETY: the handle is a pointer that only the driver follows, and the driver's
// functions may be called with it from any thread.
unsafe impl Send for Kernel {}
// SAFETY: as above; what is changed is behind a lock.
unsafe impl Sync for Kernel {}

impl Kernel {
    pub(super) const fn function(&self) -> CUfunction {
        self.function
    }

    /// Allows launches with that much dynamic shared memory.
    pub(super) fn allow_shared_bytes(&self, bytes: u32) -> CudaResult<()> {
        let mut allowed = lock(&self.shared_bytes);
        if bytes > *allowed {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function's module is loaded.
            let code = unsafe { cuFuncSetAttribute(self.function, attribute, bytes as i32) };
            failure::result(code)?;
            *allowed = bytes;
        }
        Ok(())
    }
}

/// The kernels loaded so far.
#[derive(Default)]
pub(super) struct Kernels(Mutex<HashMap<&'static str, Arc<Kernel>>>);

impl Kernels {
    /// The kernel of that name, which the driver compiles on first use. A context of the
    /// GPU must be current.
    pub(super) fn get(
        &self,
        entry: &'static Entry,
        gpu: &GpuDescription,
    ) -> Result<Arc<Kernel>, Error> {
        let mut kernels = lock(&self.0);
        if let Some(kernel) = kernels.get(entry.symbol) {
            return Ok(kernel.clone());
        }
        if let Some(reason) = why_not(entry, gpu.compute_capability) {
            return Err(Error::DeviceLacks {
                device: gpu.name.clone(),
                what: format!("run {}", entry.symbol),
                remedy: reason,
            });
        }
        let kernel = Arc::new(load(entry, gpu)?);
        kernels.insert(entry.symbol, kernel.clone());
        Ok(kernel)
    }
}

/// Has the driver compile an entry. A refusal carries the compiler's log.
fn load(entry: &'static Entry, gpu: &GpuDescription) -> Result<Kernel, Error> {
    let refused = |log: String| Error::Module { module: entry.module.to_owned(), log };
    let text = ptx::modules()
        .iter()
        .find(|module| module.name == entry.module)
        .and_then(|module| module.with_entry_only(entry.symbol))
        .ok_or_else(|| refused(format!("it has no entry {}", entry.symbol)))?;
    let text = CString::new(text).map_err(|_| refused("it has a NUL in its text".to_owned()))?;
    let call = format!("compiling {} of PTX module {}", entry.symbol, entry.module);
    let module = Module::from_ptx_cstr(&text, &[]).map_err(|error| match failure::code(error) {
        code @ (ResultCode::INVALID_PTX | ResultCode::NO_BINARY_FOR_GPU) => {
            // The log's lines in one.
            let log = cuda_driver::compile_log(&text);
            let lines = log.lines().map(str::trim).filter(|line| !line.is_empty());
            let log = lines.collect::<Vec<_>>().join(" | ");
            refused(format!(
                "{}: {code}{}{log}",
                entry.symbol,
                if log.is_empty() { "" } else { ": " }
            ))
        }
        _ => failure::driver(&gpu.name, &call, error),
    })?;
    let function = module
        .get_function(entry.symbol)
        .map_err(|error| failure::driver(&gpu.name, &format!("finding {}", entry.symbol), error))?
        .to_raw();
    let shared_bytes = Mutex::new(SHARED_BYTES_UNASKED);
    Ok(Kernel { function, shared_bytes, _module: module })
}

/// Compares a launch with its entry and with the limits of the GPU.
pub(super) fn check_launch(launch: &Launch, gpu: &GpuDescription) -> Result<(), Error> {
    let entry = launch.entry;
    // The limits of a grid's second and third dimension, on every GPU so far.
    const MAX_GRID_YZ: u64 = 65_535;
    let bad = |what, given: u64, expected: u64| {
        Err(Error::BadLaunch { symbol: entry.symbol.to_owned(), what, given, expected })
    };
    let (args, shared) = (launch.args.len() as u64, u64::from(launch.shared_bytes));
    let max_shared = u64::from(gpu.max_shared_bytes);
    if args != entry.args_bytes as u64 {
        return bad("the size of the arguments", args, entry.args_bytes as u64);
    }
    if launch.block.count() != u64::from(entry.threads) {
        return bad("the number of threads of a block", launch.block.count(), entry.threads.into());
    }
    if shared > max_shared {
        return bad("the shared memory of a block", shared, max_shared);
    }
    if launch.grid.count() == 0 {
        return bad("the number of blocks", 0, 1);
    }
    if launch.grid.x > i32::MAX as u32 {
        return bad("the grid's x", launch.grid.x.into(), i32::MAX as u64);
    }
    let whole = launch.grid.x.next_multiple_of(entry.cluster);
    if launch.grid.x != whole {
        return bad(
            "the grid's x, which must be whole clusters,",
            launch.grid.x.into(),
            whole.into(),
        );
    }
    for (what, extent) in [("the grid's y", launch.grid.y), ("the grid's z", launch.grid.z)] {
        if u64::from(extent) > MAX_GRID_YZ {
            return bad(what, extent.into(), MAX_GRID_YZ);
        }
    }
    Ok(())
}
