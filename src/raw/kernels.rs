//! Kernels from the embedded PTX modules. The driver compiles each kernel separately on its first
//! launch: a module holds every instance of every kernel, and compiling all of them would take many
//! times longer.

use std::{
    collections::HashMap,
    ffi::CString,
    ptr,
    sync::{Arc, PoisonError, RwLock},
};

use cuda_driver::{ResultCode, functions};
use kernels_gpu::entry::Entry;

use super::Context;
use crate::{
    backend::{Constants, Launch, Specialised},
    error::Error,
    ptx,
    registry::Target,
};

/// The reason that a GPU of this compute capability cannot run an entry; `None` when it can.
#[must_use]
pub fn why_not(entry: &Entry, compute_capability: (u32, u32)) -> Option<String> {
    let Some(module) = ptx::modules().iter().find(|module| module.name == entry.module) else {
        return Some(format!(
            "this library was built without the PTX module {}; build it again with the \
             feature `ptx` of flash-attention, which is on by default",
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

/// A kernel ready for launches.
pub(super) struct Kernel {
    function: functions::Function,
    /// The module of the function.
    module: functions::Module,
}

// SAFETY: the handles are pointers that only the driver follows, and the driver's
// functions may be called with them from any thread.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

impl Kernel {
    pub(super) const fn function(&self) -> functions::Function {
        self.function
    }

    /// The kernel's context must be current, and its launches must have ended.
    fn unload(&self) {
        // It can fail only when the context is lost, and with it the module.
        // SAFETY: the module was loaded by `load`; its context is current, and no launch runs.
        _ = unsafe { functions::module_unload(self.module) };
    }
}

/// The kernels loaded so far, by the address of their entry and its constants.
#[derive(Default)]
pub(super) struct Kernels(RwLock<HashMap<(usize, Constants), Arc<Kernel>>>);

impl Kernels {
    /// The kernel of an entry, which the driver compiles on first use. The context must be
    /// current.
    pub(super) fn get(
        &self,
        specialised: Specialised,
        context: &Context,
    ) -> Result<Arc<Kernel>, Error> {
        let Specialised { entry, constants } = specialised;
        let key = (ptr::from_ref(entry).addr(), constants);
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
        if let Some(kernel) = known {
            return Ok(kernel);
        }
        if let Some(reason) = why_not(entry, context.target().capability) {
            return Err(Error::DeviceLacks {
                device: context.name().to_owned(),
                what: format!("run {}", entry.symbol),
                remedy: reason,
            });
        }
        // Compiled without the lock, so that other kernels can be launched meanwhile. Of two
        // threads that compile the same, the first is heeded.
        let loaded = load(specialised, context)?;
        let mut kernels = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = kernels.get(&key) {
            loaded.unload();
            return Ok(kernel.clone());
        }
        let loaded = Arc::new(loaded);
        kernels.insert(key, loaded.clone());
        Ok(loaded)
    }

    /// Unloads every kernel. The context must be current, and no launch may be running.
    pub(super) fn unload(&mut self) {
        let kernels = self.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        kernels.drain().for_each(|(_, kernel)| kernel.unload());
    }
}

/// Compiles an entry with the driver. A refusal carries the compiler's log.
fn load(specialised: Specialised, context: &Context) -> Result<Kernel, Error> {
    let Specialised { entry, constants } = specialised;
    let refused = |log: String| Error::Module { module: entry.module.to_owned(), log };
    let text = ptx::modules()
        .iter()
        .find(|module| module.name == entry.module)
        .and_then(|module| module.specialised(entry.symbol, &constants))
        .ok_or_else(|| refused(format!("it has no entry {}", entry.symbol)))?;
    let nul = |_| refused("it has a NUL in its text".to_owned());
    let (text, name) = (CString::new(text).map_err(nul)?, CString::new(entry.symbol).map_err(nul)?);
    let module = functions::module_load(&text).map_err(|refusal| {
        match refusal.failure.code {
            code @ (ResultCode::INVALID_PTX | ResultCode::NO_BINARY_FOR_GPU) => {
                // The log's lines in one.
                let lines = refusal.log.lines().map(str::trim).filter(|line| !line.is_empty());
                let log = lines.collect::<Vec<_>>().join(" | ");
                let colon = if log.is_empty() { "" } else { ": " };
                refused(format!("{}: {code}{colon}{log}", entry.symbol))
            }
            code => {
                let call =
                    format_args!("compiling {} of PTX module {}", entry.symbol, entry.module);
                context.failed(call, code)
            }
        }
    })?;
    let prepare = || {
        use functions::attribute::{DYNAMIC_SHARED_BYTES, STATIC_SHARED_BYTES};
        // SAFETY: the module was loaded just now into the current context.
        unsafe {
            let function = functions::module_function(module, &name)?;
            let statically = functions::function_attribute(STATIC_SHARED_BYTES, function)?;
            // All that the GPU has: a block has 48 KiB without asking.
            let dynamically = context.target().max_shared_bytes as i32 - statically;
            functions::function_set_attribute(function, DYNAMIC_SHARED_BYTES, dynamically)?;
            Ok(function)
        }
    };
    match prepare() {
        Ok(function) => Ok(Kernel { function, module }),
        Err(cuda_driver::Failure { code, .. }) => {
            // SAFETY: nothing knows the module yet.
            _ = unsafe { functions::module_unload(module) };
            Err(context.failed(format_args!("preparing {}", entry.symbol), code))
        }
    }
}

/// Compares a launch with its entry and with the limits of the GPU.
pub(super) fn check_launch(launch: &Launch, target: &Target) -> Result<(), Error> {
    let entry = launch.entry;
    // The limits of a grid's second and third dimension, on every GPU so far.
    const MAX_GRID_YZ: u64 = 65_535;
    let bad = |what, given: u64, expected: u64| {
        Err(Error::BadLaunch { symbol: entry.symbol.to_owned(), what, given, expected })
    };
    let (args, shared) = (launch.args.len() as u64, u64::from(launch.shared_bytes));
    let max_shared = u64::from(target.max_shared_bytes);
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
