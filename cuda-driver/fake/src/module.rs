//! Modules: the PTX text is read as far as a driver's decisions need it.

use std::{
    ffi::{CStr, c_char},
    sync::Mutex,
};

use crate::{
    P, call, call_in_context, code,
    state::{check_context, object, register, state, unregister},
    write,
};

/// A module: what its functions are looked up in.
struct Module {
    functions: Vec<Function>,
}

/// An entry of a module.
pub(crate) struct Function {
    pub(crate) entry: &'static kernels_gpu::entry::Entry,
    /// Threads that a block may have (`.maxntid`).
    pub(crate) max_threads: u32,
    /// Dynamic shared memory that a launch may have.
    pub(crate) shared_bytes: Mutex<u32>,
}

/// Reads PTX, or says why a compiler would refuse it.
fn compile(text: &str, capability: (i32, i32)) -> Result<Module, String> {
    let directive =
        |name: &str| text.lines().find_map(|line| line.trim().strip_prefix(name)).map(str::trim);
    directive(".version").ok_or("the text has no .version directive")?;
    let target = directive(".target").ok_or("the text has no .target directive")?;
    let target = target.split(',').next().unwrap_or_default().trim();
    let digits = target.trim_start_matches("sm_");
    let exact = digits.ends_with('a');
    let number: i32 =
        digits.trim_end_matches('a').parse().map_err(|_| format!("unknown target {target}"))?;
    let given = capability.0 * 10 + capability.1;
    if if exact { given != number } else { given < number } {
        return Err(format!("code for {target} does not run on sm_{given}"));
    }
    let mut functions = Vec::new();
    for part in text.split(".entry").skip(1) {
        let name = part.trim_start();
        let end = name.find(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != '$');
        let name = &name[..end.unwrap_or(name.len())];
        let header = &part[..part.find('{').unwrap_or(part.len())];
        let max_threads = header.split_once(".maxntid").map_or(1024, |(_, rest)| {
            let digits = rest.trim_start().split(|c: char| !c.is_ascii_digit()).next();
            digits.and_then(|digits| digits.parse().ok()).unwrap_or(0)
        });
        let entry = kernels_gpu::find(name).ok_or(format!("no such kernel: {name}"))?;
        functions.push(Function { entry, max_threads, shared_bytes: Mutex::new(48 << 10) });
    }
    Ok(Module { functions })
}

/// Writes the log where options say, as `cuModuleLoadDataEx` does.
///
/// # Safety
/// `options` and `values` must have `count` entries that fit each other.
unsafe fn write_log(log: &str, count: u32, options: *const u32, values: *const P) {
    // SAFETY: the caller vouches for the arrays.
    let pairs = (0..count as usize).map(|i| unsafe { (*options.add(i), *values.add(i)) });
    let find = |wanted| pairs.clone().find(|(option, _)| *option == wanted).map(|(_, value)| value);
    if let (Some(buffer), Some(capacity)) = (find(5), find(6)) {
        let length = log.len().min((capacity as usize).saturating_sub(1));
        // SAFETY: the buffer has that capacity; its last byte stays for the NUL.
        unsafe {
            std::ptr::copy_nonoverlapping(log.as_ptr(), buffer.cast(), length);
            buffer.cast::<u8>().add(length).write(0);
        }
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleLoadDataEx(
    module: P,
    image: *const c_char,
    count: u32,
    options: *const u32,
    values: *const P,
) -> u32 {
    call_in_context(|| {
        // SAFETY: PTX ends in a NUL.
        let text = unsafe { CStr::from_ptr(image) }.to_string_lossy();
        let capability = state().compute_capability;
        match compile(&text, capability) {
            Ok(compiled) => write(module, register(compiled)),
            Err(log) => {
                // SAFETY: the caller passed arrays of that length.
                unsafe { write_log(&log, count, options, values) };
                Err(code::INVALID_PTX)
            }
        }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleUnload(module: P) -> u32 {
    call(|| {
        check_context()?;
        // SAFETY: callers pass modules.
        unsafe { unregister::<Module>(module as usize) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleGetFunction(function: P, module: P, name: *const c_char) -> u32 {
    call_in_context(|| {
        // SAFETY: callers pass modules, and names that end in a NUL.
        let (module, name) = unsafe { (object::<Module>(module as usize)?, CStr::from_ptr(name)) };
        let found = module
            .functions
            .iter()
            .find(|function| Ok(function.entry.symbol) == name.to_str())
            .ok_or(code::NOT_FOUND)?;
        write(function, std::ptr::from_ref::<Function>(found))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuFuncSetAttribute(function: *const Function, attribute: u32, value: i32) -> u32 {
    // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES.
    const SHARED: u32 = 8;
    call_in_context(|| {
        if function.is_null() {
            return Err(code::INVALID_HANDLE);
        }
        if attribute != SHARED || !(0..=232_448).contains(&value) {
            return Err(code::INVALID_VALUE);
        }
        // SAFETY: callers pass functions of modules that are loaded.
        let shared = unsafe { &(*function).shared_bytes };
        *shared.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = value as u32;
        Ok(())
    })
}
