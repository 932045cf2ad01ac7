//! Modules: the PTX text is read as far as a driver's decisions need it.

use std::{
    ffi::{CStr, c_char},
    sync::Mutex,
};

use kernels_gpu::constants::Constants;

use crate::{
    P, call, call_in_context, code,
    device::SHARED_BYTES,
    state::{check_context, context, object, register, state, unregister},
    write,
};

/// A module: what its functions are looked up in.
struct Module {
    functions: Vec<Function>,
}

/// An entry of a module.
pub(crate) struct Function {
    pub(crate) entry: &'static kernels_gpu::entry::Entry,
    /// The entry's constants, which a comment in the text names.
    pub(crate) constants: Constants,
    /// Threads that a block may have (`.maxntid`).
    pub(crate) max_threads: u32,
    /// The context that it was loaded into.
    pub(crate) context: usize,
    /// Static shared memory.
    static_shared_bytes: i32,
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
    let constants = constants(text);
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
        functions.push(Function {
            entry,
            constants,
            max_threads,
            context: context(),
            static_shared_bytes: static_shared_bytes(part),
            shared_bytes: Mutex::new(48 << 10),
        });
    }
    Ok(Module { functions })
}

/// The constants that `// constants: causal=1 padding=0` names.
fn constants(text: &str) -> Constants {
    let line = text.lines().find_map(|line| line.strip_prefix("// constants: ")).unwrap_or("");
    Constants::by_name(|name| {
        let mut pairs = line.split(' ').filter_map(|pair| pair.split_once('='));
        pairs.find(|(of, _)| *of == name).map_or(0, |(_, n)| n.parse().unwrap_or(0))
    })
}

/// The arrays in shared memory that an entry's text declares: `.shared .align 16 .b8 name[64];`.
fn static_shared_bytes(text: &str) -> i32 {
    let arrays = text.split(".shared .align").skip(1);
    let bytes = arrays.filter_map(|array| {
        let (_, length) = array.split_once(';')?.0.split_once('[')?;
        length.trim_end_matches(']').parse::<i32>().ok()
    });
    bytes.sum()
}

/// Writes the log where options say, as `cuModuleLoadDataEx` does.
///
/// # Safety
/// `options` and `values` must have `count` entries that fit each other.
unsafe fn write_log(log: &str, count: u32, options: *const u32, values: *const P) {
    // SAFETY: both arrays have `count` entries, as the caller states.
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
        state().forbidden_in_capture()?;
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
        state().give_back();
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
extern "C" fn cuFuncGetAttribute(value: P, attribute: u32, function: *const Function) -> u32 {
    // CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES.
    const STATIC_SHARED: u32 = 1;
    call_in_context(|| {
        if function.is_null() || attribute != STATIC_SHARED {
            return Err(code::INVALID_VALUE);
        }
        // SAFETY: callers pass functions of modules that are loaded.
        write(value, unsafe { (*function).static_shared_bytes })
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
        // SAFETY: callers pass functions of modules that are loaded.
        let function = unsafe { &*function };
        let most = SHARED_BYTES - function.static_shared_bytes;
        if attribute != SHARED || !(0..=most).contains(&value) {
            return Err(code::INVALID_VALUE);
        }
        *function.shared_bytes.lock().unwrap_or_else(std::sync::PoisonError::into_inner) =
            value as u32;
        Ok(())
    })
}
