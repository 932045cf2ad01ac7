//! The library for callers of C's conventions: a shared library of four functions. Its header,
//! `examples/flash_attention.h`, is made of this file with its documentation (`c-header`).
//! `examples/torch_raw.py` calls it on PyTorch's tensors.
//!
//! ```sh
//! cargo build --release --no-default-features --features ptx --example c_abi
//! python3 examples/torch_raw.py target/release/examples/libc_abi.so
//! ```

use std::{
    cell::RefCell,
    collections::HashMap,
    ffi::{CStr, CString, c_char, c_void},
    sync::{Arc, LazyLock, Mutex, PoisonError},
};

use flash_attention::{
    DType, Error, Problem, Window,
    raw::{Args, Context, Plan, Region, View},
    registry::best_for,
};

/// The problem of a call.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct FaProblem {
    /// 0: f32, 1: f16, 2: bf16.
    pub dtype: u32,
    /// Batch entries.
    pub batch: u64,
    /// Heads of Q and O.
    pub heads: u64,
    /// Heads of K and V, a divisor of the heads of Q.
    pub kv_heads: u64,
    /// Rows of a head.
    pub seq_q: u64,
    /// Keys of a head.
    pub seq_k: u64,
    /// Elements of a row, a multiple of 8 up to 256.
    pub head_dim: u64,
    /// Keys before its own position that a row sees; -1: all.
    pub window_left: i64,
    /// Keys after its own position that a row sees; 0: a causal mask, -1: all.
    pub window_right: i64,
    /// The factor of the products; 0: 1 / sqrt(head_dim).
    pub scale: f32,
    /// Cap of scaled scores; 0: none.
    pub softcap: f32,
}

/// A tensor in device memory, its rows contiguous.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct FaTensor {
    /// The first element, at a multiple of 16 bytes.
    pub address: *mut c_void,
    /// Bytes from there to the end of the memory.
    pub bytes: u64,
    /// Elements from one batch entry, head and row to the next.
    pub strides: [u64; 3],
}

/// Memory of one call.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct FaTensors {
    /// Queries.
    pub q: FaTensor,
    /// Keys.
    pub k: FaTensor,
    /// Values.
    pub v: FaTensor,
    /// The output.
    pub o: FaTensor,
    /// Log-sum-exp, f32 `[batch, heads, seq_q]`; null: not wanted.
    pub lse: *mut c_void,
    /// Zero before the first call on a stream; each call leaves it as the next one on the stream wants it.
    pub workspace: *mut c_void,
    /// Its bytes, at least as many as `fa_workspace_bytes` says.
    pub workspace_bytes: u64,
}

thread_local!(static LAST: RefCell<CString> = RefCell::default());

/// The error of the last failed call of this thread. The library owns the text, which lasts until
/// the thread's next failed call.
#[unsafe(no_mangle)]
pub extern "C" fn fa_last_error() -> *const c_char {
    LAST.with(|last| last.borrow().as_ptr())
}

/// Keeps what is wrong for [`fa_last_error`].
fn keep(error: &Error) {
    let text = CString::new(error.to_string()).unwrap_or_default();
    LAST.with(|last| *last.borrow_mut() = text);
}

fn wrong<T>(what: &'static str, given: impl ToString, remedy: &str) -> Result<T, Error> {
    Err(Error::InvalidValue { what, given: given.to_string(), remedy: remedy.into() })
}

/// The contexts of calls so far, and the plans in each, by the problem's bytes.
struct Known {
    context: Context,
    plans: Mutex<HashMap<String, Arc<Plan>>>,
}

/// The context that is current on the calling thread.
fn current() -> Result<Arc<Known>, Error> {
    static KNOWN: LazyLock<Mutex<HashMap<usize, Arc<Known>>>> = LazyLock::new(Mutex::default);
    // SAFETY: the header asks the caller to keep the context until the process ends.
    let context = unsafe { Context::current() }?;
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let of = known.entry(context.handle().addr());
    Ok(of.or_insert_with(|| Arc::new(Known { context, plans: Mutex::default() })).clone())
}

impl Known {
    fn plan(&self, problem: &FaProblem) -> Result<Arc<Plan>, Error> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let key = format!("{problem:?}");
        if let Some(plan) = plans.get(&key) {
            return Ok(plan.clone());
        }
        let plan = Arc::new(best_for(&problem.checked()?, &self.context.target())?.plan);
        plans.insert(key, plan.clone());
        Ok(plan)
    }
}

impl FaProblem {
    fn checked(&self) -> Result<Problem, Error> {
        let Self { batch, heads, kv_heads, seq_q, seq_k, head_dim, .. } = *self;
        let [batch, heads, kv_heads, seq_q, seq_k, head_dim] =
            [batch, heads, kv_heads, seq_q, seq_k, head_dim].map(|size| size as usize);
        let dtype = match self.dtype {
            0 => DType::F32,
            1 => DType::F16,
            2 => DType::BF16,
            other => return wrong("dtype", other, "0 is f32, 1 f16, 2 bf16"),
        };
        // No sequence is longer than a bound of 32 bits.
        let bound = |keys: i64| (keys >= 0).then(|| u32::try_from(keys).unwrap_or(u32::MAX));
        let window = Window { left: bound(self.window_left), right: bound(self.window_right) };
        let given = |number: f32| (number != 0.0).then_some(number);
        Problem::builder(batch, heads, seq_q, head_dim)
            .seq_k(seq_k)
            .kv_heads(kv_heads)
            .dtype(dtype)
            .window(window)
            .scale(given(self.scale))
            .softcap(given(self.softcap))
            .build()
    }
}

impl FaTensor {
    fn view(&self) -> View {
        View::new(Region::new(self.address.addr() as u64, self.bytes), self.strides)
    }
}

/// Bytes of the workspace of a problem's calls, in the context that is current; -1 where there is
/// an error.
///
/// # Safety
/// `problem` is null or points to a problem.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fa_workspace_bytes(problem: *const FaProblem) -> i64 {
    let bytes = || {
        // SAFETY: null or a problem, as the caller promises.
        let Some(problem) = (unsafe { problem.as_ref() }) else {
            return wrong("problem", "null", "it must point to an FaProblem");
        };
        Ok(current()?.plan(problem)?.workspace_bytes() as i64)
    };
    bytes().unwrap_or_else(|error| {
        keep(&error);
        -1
    })
}

/// Starts attention on a stream of the context that is current, and does not wait. 0, or -1 where
/// there is an error.
///
/// # Safety
/// - `problem` and `tensors` are null or point to what their types say.
/// - `stream` is a stream of the context that is current; null is its default stream.
/// - The memory of `tensors` is the device's until the stream has come to the end of the call;
///   nothing else uses what is written meanwhile, and nothing writes what is read.
/// - The context stays until the process ends.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fa_forward(
    problem: *const FaProblem,
    tensors: *const FaTensors,
    stream: *mut c_void,
) -> i32 {
    let enqueue = || {
        // SAFETY: null or a problem, and null or tensors, as the caller promises.
        let (problem, tensors) = unsafe { (problem.as_ref(), tensors.as_ref()) };
        let Some(problem) = problem else {
            return wrong("problem", "null", "it must point to an FaProblem");
        };
        let Some(tensors) = tensors else {
            return wrong("tensors", "null", "it must point to FaTensors");
        };
        let known = current()?;
        let plan = known.plan(problem)?;
        let FaTensors { q, k, v, o, lse, workspace, workspace_bytes } = tensors;
        let workspace = Region::new(workspace.addr() as u64, *workspace_bytes);
        let mut args = Args::new(q.view(), k.view(), v.view(), o.view()).workspace(workspace);
        if !lse.is_null() {
            args = args.lse(Region::new(lse.addr() as u64, plan.problem().rows() as u64 * 4));
        }
        // SAFETY: as the caller promises for stream and memory; the arguments are compared with the plan.
        unsafe { known.context.enqueue(&plan, &args, stream) }
    };
    match enqueue() {
        Ok(()) => 0,
        Err(error) => {
            keep(&error);
            -1
        }
    }
}

/// The version of the library.
#[unsafe(no_mangle)]
pub extern "C" fn fa_version() -> *const c_char {
    const VERSION: &CStr =
        match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
            Ok(version) => version,
            Err(_) => c"",
        };
    VERSION.as_ptr()
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, mem::offset_of, process::Command};

    use super::*;

    fn problem() -> FaProblem {
        FaProblem {
            dtype: 1,
            batch: 1,
            heads: 2,
            kv_heads: 2,
            seq_q: 8,
            seq_k: 8,
            head_dim: 64,
            window_left: -1,
            window_right: 0,
            scale: 0.0,
            softcap: 0.0,
        }
    }

    fn last_error() -> String {
        // SAFETY: the text is this thread's, and no call comes between.
        unsafe { CStr::from_ptr(fa_last_error()) }.to_string_lossy().into_owned()
    }

    #[test]
    fn mistakes_are_named() {
        // SAFETY: null is an error.
        let code = unsafe { fa_forward(std::ptr::null(), std::ptr::null(), std::ptr::null_mut()) };
        assert_eq!((code, last_error().contains("problem = null")), (-1, true), "{}", last_error());
        // SAFETY: as above.
        let code = unsafe { fa_forward(&problem(), std::ptr::null(), std::ptr::null_mut()) };
        assert_eq!((code, last_error().contains("tensors = null")), (-1, true), "{}", last_error());
        for (wrong, says) in [
            (FaProblem { dtype: 3, ..problem() }, "dtype = 3"),
            (FaProblem { heads: 3, ..problem() }, "heads of K and V = 2"),
            (FaProblem { scale: -1.0, ..problem() }, "scale = -1"),
        ] {
            let text = wrong.checked().unwrap_err().to_string();
            assert!(text.contains(says), "{text}");
        }
        let checked = problem().checked().unwrap();
        assert!(checked.causal() && checked.softcap().is_none());
        // SAFETY: it points to a problem. No context is current on a thread that has made none.
        assert_eq!(unsafe { fa_workspace_bytes(&problem()) }, -1);
        assert!(!last_error().is_empty());
    }

    /// A C compiler lays the header's types out as these are.
    #[test]
    fn the_header_is_of_these_types() {
        let mut source = String::from("#include <stddef.h>\n#include \"flash_attention.h\"\n");
        let mut says = |what: &str, number: usize| {
            source += &format!("_Static_assert({what} == {number}, \"{what}\");\n");
        };
        /// Every field of a type.
        macro_rules! layout {
            ($type:ident: $($field:ident),*) => {
                says(concat!("sizeof(", stringify!($type), ")"), size_of::<$type>());
                $(says(
                    concat!("offsetof(", stringify!($type), ", ", stringify!($field), ")"),
                    offset_of!($type, $field),
                );)*
            };
        }
        layout!(FaProblem: dtype, batch, heads, kv_heads, seq_q, seq_k, head_dim, window_left, window_right, scale, softcap);
        layout!(FaTensor: address, bytes, strides);
        layout!(FaTensors: q, k, v, o, lse, workspace, workspace_bytes);
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("layout.c");
        std::fs::write(&file, source).unwrap();
        let include = concat!(env!("CARGO_MANIFEST_DIR"), "/examples");
        let cc = Command::new("cc")
            .args(["-std=c11", "-fsyntax-only", "-I", include])
            .arg(&file)
            .output();
        match cc {
            Ok(output) => {
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr))
            }
            // Straight to stderr: the harness keeps what a passing test prints.
            Err(error) => writeln!(std::io::stderr(), "skipped: no C compiler: {error}").unwrap(),
        }
    }
}
