//! The state of the fake GPUs: one for the process, as of a real driver.

use std::{
    cell::Cell,
    collections::{BTreeMap, HashSet},
    sync::{LazyLock, Mutex, MutexGuard, PoisonError},
};

use crate::{Outcome, code, graph::Capture};

/// Everything but the current context, which each thread has its own of.
pub(crate) struct State {
    pub(crate) initialised: bool,
    pub(crate) gpus: i32,
    pub(crate) compute_capability: (i32, i32),
    pub(crate) memory_bytes: u64,
    /// Live allocations: address and length.
    pub(crate) allocations: BTreeMap<u64, u64>,
    /// Live streams, events and modules, by their handles.
    pub(crate) handles: HashSet<usize>,
    /// References to the context of each GPU.
    pub(crate) contexts: BTreeMap<i32, u32>,
    /// A kernel's fault that is not reported yet.
    pub(crate) pending_fault: u32,
    /// The code of every call since a fault was reported.
    pub(crate) fault: u32,
    /// Code of the call after so many more.
    pub(crate) planned: Option<(u32, u32)>,
    /// Launches so far.
    pub(crate) launches: u64,
    /// The stream of the last launch.
    pub(crate) last_stream: u64,
    /// Streams with launches that no call has waited for.
    pub(crate) busy: HashSet<usize>,
    /// The capture that goes on.
    pub(crate) capture: Option<Capture>,
    /// Memory freed and modules unloaded while a stream was busy.
    pub(crate) early: u64,
    /// Allocations, frees, copies, fills and waits so far.
    pub(crate) operations: u64,
    /// Bytes filled by asynchronous fills so far.
    pub(crate) filled_async: u64,
    /// Tensor maps encoded so far.
    pub(crate) maps_encoded: u64,
}

static STATE: LazyLock<Mutex<State>> = LazyLock::new(|| Mutex::new(State::from_environment()));

thread_local! {
    /// The GPU whose context is current, plus one; 0 when there is none.
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

pub(crate) fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn from_environment() -> Self {
        let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
        let capability = std::env::var("FAKE_CUDA_COMPUTE_CAPABILITY").ok().and_then(|text| {
            let (major, minor) = text.split_once('.')?;
            Some((major.parse().ok()?, minor.parse().ok()?))
        });
        Self {
            initialised: false,
            gpus: number("FAKE_CUDA_GPUS").map_or(1, |gpus: u64| gpus as i32),
            compute_capability: capability.unwrap_or((9, 0)),
            memory_bytes: number("FAKE_CUDA_MEMORY_BYTES").unwrap_or(1 << 30),
            allocations: BTreeMap::new(),
            handles: HashSet::new(),
            contexts: BTreeMap::new(),
            pending_fault: 0,
            fault: 0,
            planned: None,
            launches: 0,
            last_stream: 0,
            busy: HashSet::new(),
            capture: None,
            early: 0,
            operations: 0,
            filled_async: 0,
            maps_encoded: 0,
        }
    }

    pub(crate) fn used_bytes(&self) -> u64 {
        self.allocations.values().sum()
    }

    /// Whether a range lies within one live allocation.
    pub(crate) fn is_allocated(&self, address: u64, bytes: u64) -> bool {
        self.allocations
            .range(..=address)
            .next_back()
            .is_some_and(|(start, length)| bytes <= length.saturating_sub(address - start))
    }

    /// The result of waiting for a stream.
    pub(crate) fn wait(&mut self, stream: usize) -> Outcome {
        self.busy.remove(&stream);
        self.follow()
    }

    /// What follows the launches so far finds: a kernel's fault is reported now, and from
    /// now on.
    pub(crate) fn follow(&mut self) -> Outcome {
        self.operations += 1;
        self.forbidden_in_capture()?;
        if self.fault == 0 {
            self.fault = self.pending_fault;
        }
        if self.fault != 0 {
            // Nothing runs in a lost context.
            self.busy.clear();
            return Err(self.fault);
        }
        Ok(())
    }

    /// Fails while a stream is captured, and breaks the capture.
    pub(crate) fn forbidden_in_capture(&mut self) -> Outcome {
        let Some(capture) = &mut self.capture else { return Ok(()) };
        capture.broken = true;
        Err(code::CAPTURE_UNSUPPORTED)
    }

    /// Notes that something is given back, which no launch may use any more.
    pub(crate) fn give_back(&mut self) {
        self.operations += 1;
        self.early += u64::from(!self.busy.is_empty());
    }
}

/// The failure that a test asked for, if it is this call's turn.
pub(crate) fn planned_failure() -> Outcome {
    let mut state = state();
    match &mut state.planned {
        Some((0, code)) => {
            let code = *code;
            state.planned = None;
            Err(code)
        }
        Some((calls, _)) => {
            *calls -= 1;
            Ok(())
        }
        None => Ok(()),
    }
}

pub(crate) fn check_fault() -> Outcome {
    match state().fault {
        0 => Ok(()),
        fault => Err(fault),
    }
}

/// A context as its handle, which is never null.
pub(crate) const fn context_handle(gpu: i32) -> usize {
    gpu as usize + 1
}

pub(crate) fn context() -> usize {
    CURRENT.get()
}

pub(crate) fn set_context(handle: usize) -> Outcome {
    let state = state();
    if handle != 0 && !state.contexts.contains_key(&(handle as i32 - 1)) {
        return Err(code::INVALID_CONTEXT);
    }
    CURRENT.set(handle);
    Ok(())
}

/// The current context must be there, and its GPU's context still be retained.
pub(crate) fn check_context() -> Outcome {
    let handle = CURRENT.get();
    if handle == 0 || !state().contexts.contains_key(&(handle as i32 - 1)) {
        return Err(code::INVALID_CONTEXT);
    }
    Ok(())
}

/// Makes a handle of a boxed object.
pub(crate) fn register<T>(object: T) -> usize {
    let handle = Box::into_raw(Box::new(object)) as usize;
    state().handles.insert(handle);
    handle
}

/// The object behind a live handle.
///
/// # Safety
/// A live handle must have been made of a `T`.
pub(crate) unsafe fn object<T>(handle: usize) -> Result<&'static T, u32> {
    if state().handles.contains(&handle) {
        // SAFETY: live, so not freed, and made of a `T`, as stated above. Tests do
        // not destroy what they still use.
        Ok(unsafe { &*(handle as *const T) })
    } else {
        Err(code::INVALID_HANDLE)
    }
}

/// Destroys the object behind a live handle.
///
/// # Safety
/// As for [`object`].
pub(crate) unsafe fn unregister<T>(handle: usize) -> Outcome {
    if !state().handles.remove(&handle) {
        return Err(code::INVALID_HANDLE);
    }
    // SAFETY: it was live, so this is the first and only time it is freed.
    drop(unsafe { Box::from_raw(handle as *mut T) });
    Ok(())
}
