//! The embedded PTX modules: which runs on a GPU, loading on first use, and the
//! kernels in them.

use std::{
    collections::{HashMap, hash_map},
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
use crate::{error::Error, ptx};

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
    pub(super) entry: &'static Entry,
    function: CUfunction,
    /// Dynamic shared memory that its launches may have so far.
    shared_bytes: Mutex<u32>,
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

/// The modules loaded so far, and the kernels found in them.
#[derive(Default)]
pub(super) struct Modules(Mutex<Loaded>);

#[derive(Default)]
struct Loaded {
    kernels: HashMap<&'static str, Arc<Kernel>>,
    modules: HashMap<&'static str, Module>,
}

impl Modules {
    /// The kernel of that name; its module is compiled by the driver on first use.
    /// A context of the GPU must be current.
    pub(super) fn kernel(&self, symbol: &str, gpu: &GpuDescription) -> Result<Arc<Kernel>, Error> {
        let Loaded { kernels, modules } = &mut *lock(&self.0);
        if let Some(kernel) = kernels.get(symbol) {
            return Ok(kernel.clone());
        }
        let entry = kernels_gpu::find(symbol)
            .ok_or_else(|| Error::UnknownSymbol { symbol: symbol.to_owned() })?;
        if let Some(reason) = why_not(entry, gpu.compute_capability) {
            return Err(Error::DeviceLacks {
                device: gpu.name.clone(),
                what: format!("run {symbol}"),
                remedy: reason,
            });
        }
        let module = match modules.entry(entry.module) {
            hash_map::Entry::Occupied(loaded) => loaded.into_mut(),
            hash_map::Entry::Vacant(vacant) => vacant.insert(load(entry.module, gpu)?),
        };
        let function = module
            .get_function(symbol)
            .map_err(|error| match failure::code(error) {
                ResultCode::NOT_FOUND => Error::Module {
                    module: entry.module.to_owned(),
                    log: format!("it has no entry {symbol}"),
                },
                _ => failure::driver(&gpu.name, &format!("looking up {symbol}"), error),
            })?
            .to_raw();
        let kernel =
            Arc::new(Kernel { entry, function, shared_bytes: Mutex::new(SHARED_BYTES_UNASKED) });
        kernels.insert(entry.symbol, kernel.clone());
        Ok(kernel)
    }
}

/// Has the driver compile a module. A refusal carries the compiler's log.
fn load(name: &str, gpu: &GpuDescription) -> Result<Module, Error> {
    let text = ptx::modules().iter().find(|module| module.name == name).map(|module| module.text);
    let refused = |log: String| Error::Module { module: name.to_owned(), log };
    let text = text.ok_or_else(|| refused("this build does not hold it".to_owned()))?;
    let text = CString::new(text).map_err(|_| refused("it has a NUL in its text".to_owned()))?;
    Module::from_ptx_cstr(&text, &[]).map_err(|error| {
        let code = failure::code(error);
        let call = format!("compiling the PTX module {name}");
        match code {
            ResultCode::INVALID_PTX | ResultCode::NO_BINARY_FOR_GPU => {
                let log = cuda_driver::compile_log(&text);
                // One line: the log's own are joined.
                let log = log.lines().map(str::trim).filter(|line| !line.is_empty());
                let log = log.collect::<Vec<_>>().join(" | ");
                refused(if log.is_empty() { code.to_string() } else { format!("{code}: {log}") })
            }
            _ => failure::driver(&gpu.name, &call, error),
        }
    })
}
