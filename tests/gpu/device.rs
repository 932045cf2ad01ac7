//! The GPU backend from end to end, on a driver whose GPU is the emulator: what is
//! launched with which arguments, what is allocated and freed, and what each failure
//! of the driver turns into.

use crate::{
    Gpu,
    fake_driver::{FakeDriver, open},
    head::{ELEMENTS, Head, ROWS, SYMBOL, expected, faulty_launch, gpu, launch_of, memory, start},
};
use cuda_driver::{ResultCode, functions};
use flash_attention::{
    DType, Error,
    backend::{
        Device, Instruments, Launch, TensorMapSpec,
        gpu::{describe_all, why_not},
    },
};
use kernels_gpu::{args::AttentionArgs, constants::Constants};
use simt::Dim3;

#[test]
fn a_kernel_gets_its_arguments_and_its_results_come_back() {
    let fake = open();
    let gpu = gpu();
    let memory = memory(&gpu);
    let head = Head::new(&memory).unwrap();
    let launches = fake.launches();
    start(&gpu, &launch_of(SYMBOL, &head.args())).unwrap();
    gpu.synchronize().unwrap();
    assert_eq!(fake.launches() - launches, 1);
    let (o, lse) = expected(SYMBOL);
    assert_eq!(head.o.to_vec::<f32>().unwrap(), o);
    assert_eq!(head.lse.to_vec::<f32>().unwrap(), lse);
}

#[test]
fn every_thread_may_use_the_device() {
    let _fake = open();
    let gpu = gpu();
    let memory = memory(&gpu);
    let results: Vec<Vec<f32>> = std::thread::scope(|scope| {
        let work = || {
            let head = Head::new(&memory).unwrap();
            start(&gpu, &launch_of(SYMBOL, &head.args())).unwrap();
            head.o.to_vec().unwrap()
        };
        let threads = [scope.spawn(work), scope.spawn(work)];
        threads.map(|thread| thread.join().unwrap()).into()
    });
    let (o, _) = expected(SYMBOL);
    assert!(results.iter().all(|result| *result == o));
}

#[test]
fn memory_is_counted_and_given_back() {
    let fake = open();
    let objects = fake.live_objects();
    {
        let gpu = gpu();
        let memory = memory(&gpu);
        let head = Head::new(&memory).unwrap();
        let bytes = 4 * (4 * ELEMENTS as u64 + u64::from(ROWS));
        assert_eq!((memory.current(), fake.used_bytes()), (bytes, bytes));
        let info = gpu.memory_info().unwrap();
        assert_eq!((info.free, info.total), ((1 << 30) - bytes, 1 << 30));
        start(&gpu, &launch_of(SYMBOL, &head.args())).unwrap();
        gpu.time_ms(&mut || gpu.flush_l2()).unwrap();
    }
    assert_eq!(fake.used_bytes(), 0);
    assert_eq!(fake.live_objects(), objects, "a stream, event, module or context was left");
}

#[test]
fn launches_are_replayed_from_a_graph() {
    let fake = open();
    let objects = fake.live_objects();
    {
        let gpu = gpu();
        let memory = memory(&gpu);
        let head = Head::new(&memory).unwrap();
        let launch = launch_of(SYMBOL, &head.args());
        start(&gpu, &launch).unwrap();
        gpu.synchronize().unwrap();
        let launches = fake.launches();
        let mut twice = || start(&gpu, &launch).and_then(|()| start(&gpu, &launch));
        let ms = gpu.replayed_ms(&mut twice, 3).unwrap();
        assert!(ms.is_some_and(|ms| ms > 0.0), "{ms:?}");
        assert_eq!(fake.launches() - launches, 2 * (1 + 3), "once without a measure");
        // The error of the work, or what broke the capture; after both the stream is as before.
        let stopped = gpu.replayed_ms(&mut || Err(Error::Stopped), 1);
        assert!(matches!(stopped, Err(Error::Stopped)), "{stopped:?}");
        let waits =
            gpu.replayed_ms(&mut || start(&gpu, &launch).and_then(|()| gpu.synchronize()), 1);
        assert!(waits.unwrap_err().to_string().contains("captur"));
        let broken = gpu.replayed_ms(&mut || gpu.synchronize().or(Ok(())), 1).unwrap_err();
        assert!(broken.to_string().contains("capturing launches"), "{broken}");
        start(&gpu, &launch).unwrap();
        gpu.synchronize().unwrap();
        assert!(gpu.l2_bytes().is_some_and(|bytes| bytes > 0));
    }
    assert_eq!(fake.live_objects(), objects, "a graph was left");
}

#[test]
fn out_of_memory_says_what_was_needed_and_the_device_survives() {
    let fake = open();
    fake.set_memory_bytes(1 << 20);
    let gpu = gpu();
    let memory = memory(&gpu);
    let head = Head::new(&memory).unwrap();
    let free = gpu.memory_info().unwrap().free;
    match memory.allocate(2 << 20) {
        Err(Error::OutOfMemory { device, needed, free: reported }) => {
            assert_eq!((device.as_str(), needed, reported), ("Fake GPU 0", 2 << 20, free));
        }
        Err(other) => panic!("another error: {other}"),
        Ok(_) => panic!("allocated more than there is"),
    }
    start(&gpu, &launch_of(SYMBOL, &head.args())).unwrap();
    assert_eq!(head.o.to_vec::<f32>().unwrap(), expected(SYMBOL).0);
}

#[test]
fn a_fault_names_its_kernel_and_says_that_the_context_is_lost() {
    let fake = open();
    let gpu = gpu();
    let memory = memory(&gpu);
    let head = Head::new(&memory).unwrap();
    start(&gpu, &faulty_launch(&head)).expect("a fault shows when the GPU is waited for");
    let error = gpu.synchronize().unwrap_err();
    assert!(matches!(&error, Error::Kernel { symbol, .. } if symbol == SYMBOL), "{error}");
    let message = error.to_string();
    assert!(message.contains("CUDA error 700"), "{message}");
    assert!(message.contains("must be started again"), "{message}");
    assert!(message.contains("emulator names the line"), "{message}");
    // It stays: every later call fails, and says so, too.
    let later = gpu.memory_info().unwrap_err().to_string();
    assert!(later.contains("must be started again"), "{later}");
    drop(head);
    fake.clear_fault();
}

#[test]
fn timing_reports_the_fault_of_what_it_timed() {
    let fake = open();
    let gpu = gpu();
    let memory = memory(&gpu);
    let head = Head::new(&memory).unwrap();
    let launch = launch_of(SYMBOL, &head.args());
    let ms = gpu.time_ms(&mut || start(&gpu, &launch)).unwrap();
    assert!(ms > 0.0);
    let faulty = faulty_launch(&head);
    let error = gpu.time_ms(&mut || start(&gpu, &faulty)).unwrap_err();
    assert!(matches!(error, Error::Kernel { .. }), "{error}");
    fake.clear_fault();
}

#[test]
fn hardware_exceptions_keep_their_meaning() {
    let fake = open();
    let gpu = gpu();
    let memory = memory(&gpu);
    let head = Head::new(&memory).unwrap();
    for (code, text) in [(716, "misaligned"), (719, "failed while it ran"), (702, "watchdog")] {
        start(&gpu, &launch_of(SYMBOL, &head.args())).unwrap();
        fake.set_fault(code);
        let message = gpu.synchronize().unwrap_err().to_string();
        assert!(message.contains(text), "{message}");
        fake.clear_fault();
    }
}

#[test]
fn a_code_that_cust_does_not_know_is_reported_all_the_same() {
    let fake = open();
    let gpu = gpu();
    gpu.memory_info().unwrap();
    // The call after the two that make the context current.
    fake.fail_after(2, 912);
    let message = gpu.memory_info().unwrap_err().to_string();
    assert!(message.contains("CUDA error 912"), "{message}");
    gpu.memory_info().expect("not a fault that stays");
}

#[test]
fn launches_that_do_not_fit_their_entry_are_refused() {
    let fake = open();
    let gpu = gpu();
    let memory = memory(&gpu);
    let head = Head::new(&memory).unwrap();
    let good = launch_of(SYMBOL, &head.args());
    let launches = fake.launches();
    let refused = |launch: Launch, what: &str| {
        let message = start(&gpu, &launch).unwrap_err().to_string();
        assert!(message.contains(what), "{message}");
    };
    refused(Launch { args: vec![0; 8], ..good.clone() }, "the size of the arguments is 8");
    refused(Launch { block: Dim3::new(32, 1, 1), ..good.clone() }, "threads of a block is 32");
    refused(Launch { shared_bytes: 300_000, ..good.clone() }, "expected 232448");
    refused(Launch { grid: Dim3::new(1, 0, 1), ..good.clone() }, "the number of blocks is 0");
    refused(Launch { grid: Dim3::new(1, 70_000, 1), ..good.clone() }, "the grid's y is 70000");
    assert_eq!(fake.launches(), launches);
    start(&gpu, &good).unwrap();
    gpu.synchronize().unwrap();
}

#[test]
fn shared_memory_beyond_48_kib_is_asked_for() {
    let _fake = open();
    let gpu = gpu();
    let memory = memory(&gpu);
    let head = Head::new(&memory).unwrap();
    // More than the kernel needs is harmless; the fake refuses what was not asked for.
    let launch = Launch { shared_bytes: 100 << 10, ..launch_of(SYMBOL, &head.args()) };
    start(&gpu, &launch).unwrap();
    start(&gpu, &launch).unwrap();
    gpu.synchronize().unwrap();
}

#[test]
fn a_gpu_too_old_for_a_kernel_is_told_what_the_kernel_needs() {
    let fake = open();
    fake.set_compute_capability(7, 0);
    let gpu = gpu();
    assert_eq!(gpu.compute_capability(), (7, 0));
    let launch = launch_of(SYMBOL, &AttentionArgs::default());
    let error = start(&gpu, &launch).unwrap_err();
    assert!(error.is_usage());
    assert_eq!(
        error.to_string(),
        format!(
            "Fake GPU 0 cannot run {SYMBOL}: it needs compute capability 7.5 or newer, and this \
             GPU has 7.0"
        )
    );
}

#[test]
fn a_kernel_that_the_driver_refuses_comes_with_the_reason() {
    let fake = open();
    let gpu = gpu();
    let memory = memory(&gpu);
    let head = Head::new(&memory).unwrap();
    // The call after the two that make the context current compiles.
    fake.fail_after(2, 218);
    let error = start(&gpu, &launch_of(SYMBOL, &head.args())).unwrap_err();
    assert!(matches!(&error, Error::Module { module, .. } if module == "sm_75"), "{error}");
    assert!(error.to_string().contains("CUDA_ERROR_INVALID_PTX"), "{error}");
    fake.fail_after(2, 222);
    let error = start(&gpu, &launch_of(SYMBOL, &head.args())).unwrap_err();
    assert!(error.to_string().contains("install a newer NVIDIA driver"), "{error}");
    start(&gpu, &launch_of(SYMBOL, &head.args())).expect("neither stays");
}

#[test]
fn the_compiler_s_log_is_read() {
    let fake = open();
    let gpu = gpu();
    let objects = fake.live_objects();
    // SAFETY: the context is live; it is current while PTX is loaded, and afterwards none is.
    let load = |ptx| unsafe {
        functions::ctx_set_current(gpu.context().handle()).unwrap();
        let loaded = functions::module_load(ptx).map(|module| functions::module_unload(module));
        functions::ctx_set_current(std::ptr::null_mut()).unwrap();
        loaded
    };
    let refusal = load(c".version 8.8\n.target sm_100\n").unwrap_err();
    assert_eq!(refusal.log, "code for sm_100 does not run on sm_90");
    assert_eq!(refusal.failure.code, ResultCode::INVALID_PTX);
    load(c".version 8.8\n.target sm_75\n").unwrap().unwrap();
    assert_eq!(fake.live_objects(), objects, "a module was left");
}

#[test]
fn every_entry_runs_on_hopper_and_is_in_the_module_it_names() {
    let _fake = open();
    let gpu = gpu();
    for entry in kernels_gpu::entries() {
        assert_eq!(why_not(entry, (9, 0)), None);
        // Refused for its arguments, so its module was loaded and has it.
        let launch = Launch {
            entry,
            constants: Constants::default(),
            grid: Dim3::new(1, 1, 1),
            block: Dim3::new(entry.threads, 1, 1),
            shared_bytes: 0,
            args: Vec::new(),
        };
        let error = start(&gpu, &launch).unwrap_err();
        assert!(matches!(error, Error::BadLaunch { .. }), "{error}");
    }
}

#[test]
fn flushing_writes_twice_the_cache() {
    let fake = open();
    let gpu = gpu();
    let before = fake.filled_async();
    gpu.flush_l2().unwrap();
    gpu.flush_l2().unwrap();
    let bytes = 2 * u64::from(gpu.description().l2_bytes);
    assert_eq!(fake.filled_async() - before, 2 * bytes);
    assert_eq!(fake.used_bytes(), bytes, "one buffer serves every flush");
}

#[test]
fn the_copy_rate_is_measured_and_its_memory_given_back() {
    let fake = open();
    let gpu = gpu();
    fake.set_memory_bytes(1 << 22);
    let rate = gpu.copy_rate().unwrap().expect("there is memory for it");
    assert!(rate > 0.0 && rate.is_finite(), "{rate}");
    assert_eq!(fake.used_bytes(), 0);
    fake.set_memory_bytes(1000);
    assert_eq!(gpu.copy_rate().unwrap(), None);
}

#[test]
fn flushing_makes_do_with_the_memory_there_is() {
    let fake = open();
    let gpu = gpu();
    let bytes = 2 * u64::from(gpu.description().l2_bytes);
    for (memory, buffer) in [(bytes - 1, bytes / 2), (1000, 0), (bytes, bytes)] {
        fake.set_memory_bytes(memory);
        gpu.flush_l2().expect("not an error");
        assert_eq!(fake.used_bytes(), buffer);
    }
}

#[test]
fn the_flush_buffer_makes_way_for_an_allocation() {
    let fake = open();
    let gpu = gpu();
    let bytes = 4 * u64::from(gpu.description().l2_bytes);
    fake.set_memory_bytes(bytes);
    gpu.flush_l2().unwrap();
    assert_eq!(gpu.memory_info().unwrap().free, bytes);
    let address = gpu.allocate(bytes).expect("all of the memory");
    assert_eq!(fake.used_bytes(), bytes);
    // SAFETY: allocated just now.
    unsafe { gpu.free(address, bytes) };
}

#[test]
fn gpus_are_described() {
    let fake = open();
    fake.set_gpus(2);
    let gpus = describe_all().unwrap();
    fake.set_gpus(1);
    assert_eq!(gpus.len(), 2);
    let gpu = &gpus[1];
    assert_eq!((gpu.index, gpu.name.as_str()), (1, "Fake GPU 1"));
    assert_eq!((gpu.total_bytes, gpu.free_bytes), (1 << 30, Some(1 << 30)));
    assert_eq!((gpu.compute_capability, gpu.multiprocessors), ((9, 0), 4));
    assert_eq!((gpu.max_shared_bytes, gpu.l2_bytes, gpu.clock_mhz), (232_448, 1 << 20, 1980));
    assert_eq!(gpu.cuda_version, (13, 0));
}

#[test]
fn a_gpu_number_that_is_not_there_is_refused() {
    let _fake = open();
    let error = Gpu::open(1).expect_err("there is one GPU");
    assert!(error.is_usage());
    assert!(error.to_string().contains("no GPU 1, the driver lists 1"), "{error}");
}

#[test]
fn copies_beyond_an_allocation_are_refused_by_the_driver() {
    let _fake: FakeDriver = open();
    let gpu = gpu();
    let address = gpu.allocate(64).unwrap();
    let mut data = [0; 64];
    // SAFETY: the allocation has 64 bytes; the fake driver refuses what goes beyond it.
    unsafe {
        let error = gpu.upload(address, &[0; 65]).unwrap_err();
        assert!(error.to_string().contains("copying 65 bytes"), "{error}");
        gpu.fill(address, 64, 7).unwrap();
        gpu.download(address, &mut data).unwrap();
        gpu.free(address, 64);
    }
    assert_eq!(data, [7; 64]);
}

#[test]
fn tensor_maps_are_refused_with_the_layout() {
    let _fake = open();
    let map = TensorMapSpec {
        address: 0,
        dtype: DType::F16,
        dims: vec![64, 64],
        strides_bytes: vec![128],
        box_dims: vec![64, 64],
        swizzle_bytes: 48,
    };
    let error = gpu().encode_tensor_map(&map).unwrap_err().to_string();
    assert!(error.contains("cuTensorMapEncodeTiled") && error.contains("48"), "{error}");
}
