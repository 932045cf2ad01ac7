//! Opens the fake CUDA driver (`cuda-driver/fake`), whose GPU is the emulator.

use std::{
    env,
    path::PathBuf,
    sync::{LazyLock, Mutex, MutexGuard, PoisonError},
};

use libloading::Library;

/// Where cargo puts the library: beside this test. It is a dev-dependency, so cargo
/// has built it by the time a test runs.
pub fn path() -> PathBuf {
    let test = env::current_exe().expect("the path of this test");
    let name = format!("{}fake_cuda_driver{}", env::consts::DLL_PREFIX, env::consts::DLL_SUFFIX);
    let path = test.parent().expect("the folder of this test").join(name);
    assert!(
        path.is_file(),
        "{} is missing: run this test through cargo, which builds it",
        path.display()
    );
    path
}

/// The fake driver in this process, for one test at a time.
pub struct FakeDriver {
    library: &'static Library,
    _turn: MutexGuard<'static, ()>,
}

/// Makes the process use the fake driver, with its settings as they are at first.
pub fn open() -> FakeDriver {
    static TURN: Mutex<()> = Mutex::new(());
    static LIBRARY: LazyLock<Library> = LazyLock::new(|| {
        assert!(cuda_driver::use_library(&path()), "another driver was opened before");
        // SAFETY: our own library, which does nothing when it is loaded.
        unsafe { Library::new(path()) }.expect("the fake driver")
    });
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let fake = FakeDriver { library: &LIBRARY, _turn: turn };
    fake.clear_fault();
    fake.set_compute_capability(9, 0);
    fake.set_memory_bytes(1 << 30);
    fake
}

/// Passes methods on to the functions `fake_cuda_*` of the library.
macro_rules! controls {
    ($($(#[$meta:meta])* $name:ident = $symbol:literal ($($arg:ident: $type:ty),*) $(-> $result:ty)?;)*) => {
        impl FakeDriver {
            $(
                $(#[$meta])*
                pub fn $name(&self, $($arg: $type),*) $(-> $result)? {
                    // SAFETY: the function of that name has this signature.
                    unsafe {
                        let function = self
                            .library
                            .get::<unsafe extern "C" fn($($type),*) $(-> $result)?>($symbol)
                            .expect($symbol);
                        function($($arg),*)
                    }
                }
            )*
        }
    };
}

controls! {
    set_gpus = "fake_cuda_set_gpus"(gpus: i32);
    set_compute_capability = "fake_cuda_set_compute_capability"(major: i32, minor: i32);
    set_memory_bytes = "fake_cuda_set_memory_bytes"(bytes: u64);
    fail_after = "fake_cuda_fail_after"(calls: u32, code: u32);
    set_fault = "fake_cuda_set_fault"(code: u32);
    clear_fault = "fake_cuda_clear_fault"();
    used_bytes = "fake_cuda_used_bytes"() -> u64;
    live_objects = "fake_cuda_live_objects"() -> u64;
    launches = "fake_cuda_launches"() -> u64;
    last_stream = "fake_cuda_last_stream"() -> u64;
    early = "fake_cuda_early"() -> u64;
    operations = "fake_cuda_operations"() -> u64;
    filled_async = "fake_cuda_filled_async"() -> u64;
    maps_encoded = "fake_cuda_maps_encoded"() -> u64;
}
