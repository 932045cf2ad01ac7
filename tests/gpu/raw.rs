//! Launches in a context that is somebody else's: what they leave alone, which stream they go
//! to, several threads, and memory that must outlive them.

use std::{ptr, thread};

use cuda_driver::functions;
use flash_attention::{
    Error,
    backend::{Device, Instruments},
    raw::Context,
};

use crate::{
    fake_driver::open,
    graph::{Graph, OwnStream},
    head::{
        Head, SYMBOL, current, expected, faulty_launch, gpu, launch_of, memory, set_current, start,
        synchronize,
    },
};

#[test]
fn the_thread_s_context_is_afterwards_what_it_was_before() {
    let fake = open();
    fake.set_gpus(2);
    let other = functions::primary_retain(1).unwrap();
    for before in [ptr::null_mut(), other] {
        set_current(before);
        {
            let gpu = gpu();
            assert_eq!(current(), before, "opening");
            let memory = memory(&gpu);
            let head = Head::new(&memory).unwrap();
            assert_eq!(current(), before, "allocating and copying");
            start(&gpu, &launch_of(SYMBOL, &head.args())).unwrap();
            assert_eq!(current(), before, "a launch");
            let refused = head.args();
            let mut refused = launch_of(SYMBOL, &refused);
            refused.grid.y = 0;
            start(&gpu, &refused).unwrap_err();
            assert_eq!(current(), before, "a launch that is refused");
            gpu.time_ms(&mut || gpu.flush_l2()).unwrap();
            gpu.synchronize().unwrap();
            assert_eq!(current(), before, "waiting and timing");
            assert_eq!(head.o.to_vec::<f32>().unwrap(), expected(SYMBOL).0);
        }
        assert_eq!(current(), before, "dropping");
    }
    set_current(ptr::null_mut());
    // SAFETY: retained above, and nothing of it is left.
    unsafe { functions::primary_release(1) }.unwrap();
    fake.set_gpus(1);
}

#[test]
fn streams_are_passed_on_as_they_are() {
    let fake = open();
    let gpu = gpu();
    let memory = memory(&gpu);
    let head = Head::new(&memory).unwrap();
    let launch = launch_of(SYMBOL, &head.args());
    set_current(gpu.context().handle());
    let own = OwnStream::new();
    for stream in [0, 1, 2, own.0.expose_provenance()].map(ptr::with_exposed_provenance_mut) {
        // SAFETY: the stream is of this context, and `head` lives until it was waited for.
        unsafe { gpu.context().launch(&launch, stream) }.unwrap();
        assert_eq!(fake.last_stream(), stream as u64);
        synchronize(stream).unwrap();
        assert_eq!(head.o.to_vec::<f32>().unwrap(), expected(SYMBOL).0);
    }
    drop(own);
    set_current(ptr::null_mut());
}

#[test]
fn a_prepared_launch_allocates_fills_copies_and_waits_for_nothing() {
    let fake = open();
    let gpu = gpu();
    let memory = memory(&gpu);
    let head = Head::new(&memory).unwrap();
    let launch = launch_of(SYMBOL, &head.args());
    let objects = fake.live_objects();
    gpu.context().prepare([launch.specialised()]).unwrap();
    assert_eq!(fake.live_objects(), objects + 1, "one module");
    let (operations, launches) = (fake.operations(), fake.launches());
    for _ in 0..3 {
        start(&gpu, &launch).unwrap();
    }
    assert_eq!(fake.operations(), operations, "a launch touched memory, or waited");
    assert_eq!(fake.launches(), launches + 3);
    assert_eq!(fake.live_objects(), objects + 1, "a launch made something");
    gpu.synchronize().unwrap();
    assert!(fake.operations() > operations, "the fake counts what waits");
}

#[test]
fn a_prepared_launch_can_be_captured_and_replayed() {
    let fake = open();
    let gpu = gpu();
    let memory = memory(&gpu);
    let mut head = Head::new(&memory).unwrap();
    let launch = launch_of(SYMBOL, &head.args());
    gpu.context().prepare([launch.specialised()]).unwrap();
    set_current(gpu.context().handle());
    let stream = OwnStream::new();
    let launches = fake.launches();
    let graph = Graph::capture(stream.0, || {
        // SAFETY: the stream is of this context; `head` outlives the graph.
        unsafe { gpu.context().launch(&launch, stream.0) }.unwrap();
    });
    let graph = graph.unwrap();
    assert_eq!(fake.launches(), launches, "captured, not run");
    for _ in 0..3 {
        head.o.fill(0xff).unwrap();
        graph.launch(stream.0).unwrap();
        synchronize(stream.0).unwrap();
        assert_eq!(head.o.to_vec::<f32>().unwrap(), expected(SYMBOL).0);
    }
    assert_eq!(fake.launches(), launches + 3);
    drop((graph, stream));
    set_current(ptr::null_mut());
}

#[test]
fn a_launch_that_would_compile_its_kernel_fails_in_a_capture() {
    let _fake = open();
    let gpu = gpu();
    let memory = memory(&gpu);
    let head = Head::new(&memory).unwrap();
    let launch = launch_of(SYMBOL, &head.args());
    set_current(gpu.context().handle());
    let stream = OwnStream::new();
    let captured = Graph::capture(stream.0, || {
        // SAFETY: the stream is of this context; `head` outlives the graph.
        let error = unsafe { gpu.context().launch(&launch, stream.0) }.unwrap_err();
        assert!(error.to_string().contains("while a stream is captured"), "{error}");
    });
    assert_eq!(captured.err().map(|failure| failure.code.0), Some(901));
    drop(stream);
    set_current(ptr::null_mut());
    start(&gpu, &launch).expect("nothing of it stays");
    gpu.synchronize().unwrap();
}

#[test]
fn memory_that_may_still_be_in_use_is_not_freed() {
    let fake = open();
    let gpu = gpu();
    let address = gpu.allocate(64).unwrap();
    // After the two calls that make the context current, the wait fails for another reason
    // than a lost context.
    fake.fail_after(2, 999);
    // SAFETY: allocated above, and not used afterwards but to free it.
    unsafe { gpu.free(address, 64) };
    assert_eq!(fake.used_bytes(), 64, "lost, not freed under what may run");
    // SAFETY: as above.
    unsafe { gpu.free(address, 64) };
    assert_eq!(fake.used_bytes(), 0);
}

#[test]
fn threads_launch_through_one_context_on_streams_of_their_own() {
    let fake = open();
    let objects = fake.live_objects();
    {
        let gpu = gpu();
        let memory = memory(&gpu);
        let work = || {
            let head = Head::new(&memory).unwrap();
            let launch = launch_of(SYMBOL, &head.args());
            set_current(gpu.context().handle());
            let stream = OwnStream::new();
            // SAFETY: the stream is of this context, and is waited for before `head` goes.
            unsafe { gpu.context().launch(&launch, stream.0) }.unwrap();
            synchronize(stream.0).unwrap();
            head.o.to_vec::<f32>().unwrap()
        };
        let results: Vec<_> = thread::scope(|scope| {
            let threads = [(); 4].map(|()| scope.spawn(work));
            threads.map(|thread| thread.join().unwrap()).into()
        });
        assert!(results.iter().all(|result| *result == expected(SYMBOL).0));
    }
    assert_eq!(fake.live_objects(), objects, "a module that two threads compiled was left");
}

#[test]
fn memory_is_freed_and_kernels_unloaded_after_the_launches_that_use_them() {
    let fake = open();
    let early = fake.early();
    let gpu = gpu();
    let memory = memory(&gpu);
    let head = Head::new(&memory).unwrap();
    start(&gpu, &launch_of(SYMBOL, &head.args())).unwrap();
    drop(head);
    assert_eq!(fake.early(), early, "memory was freed under a launch");
    // Another device in the same context, whose stream nobody waits for.
    let other = crate::Gpu::open(0).unwrap();
    let head = Head::new(&memory).unwrap();
    start(&other, &launch_of(SYMBOL, &head.args())).unwrap();
    drop(other);
    assert_eq!(fake.early(), early, "a kernel was unloaded while it ran");
}

#[test]
fn what_is_left_after_a_fault_can_be_dropped_in_any_order() {
    let fake = open();
    let (objects, early) = (fake.live_objects(), fake.early());
    let gpu = gpu();
    let memory = memory(&gpu);
    let (head, other) = (Head::new(&memory).unwrap(), Head::new(&memory).unwrap());
    start(&gpu, &faulty_launch(&head)).unwrap();
    drop(head); // Waits, and meets the fault.
    let error = start(&gpu, &launch_of(SYMBOL, &other.args())).unwrap_err();
    assert!(matches!(&error, Error::Kernel { symbol, .. } if symbol == SYMBOL), "{error}");
    assert!(error.to_string().contains("must be started again"), "{error}");
    // Whose fault it was a context alone does not know.
    let launch = launch_of(SYMBOL, &other.args());
    // SAFETY: the default stream; a lost context runs nothing.
    let error = unsafe { gpu.context().launch(&launch, ptr::null_mut()) }.unwrap_err();
    assert!(matches!(&error, Error::Driver { .. }), "{error}");
    assert!(error.to_string().contains("must be started again"), "{error}");
    drop((gpu, memory));
    drop(other);
    assert_eq!(fake.early(), early);
    assert_eq!(fake.used_bytes(), 0);
    fake.clear_fault();
    assert_eq!(fake.live_objects(), objects);
}

#[test]
fn the_current_context_is_taken_as_it_is_and_its_absence_named() {
    let _fake = open();
    set_current(ptr::null_mut());
    // SAFETY: there is none.
    let error = unsafe { Context::current() }.unwrap_err();
    assert!(error.is_usage());
    assert!(error.to_string().contains("no CUDA context is current"), "{error}");
    let gpu = gpu();
    set_current(gpu.context().handle());
    {
        // SAFETY: `gpu` keeps the context, and nothing is launched.
        let context = unsafe { Context::current() }.unwrap();
        assert_eq!(context.handle(), gpu.context().handle());
        assert_eq!(context.name(), "Fake GPU 0");
        assert_eq!(context.target(), gpu.context().target());
        assert!(format!("{context:?}").contains("Fake GPU 0"));
    }
    assert_eq!(current(), gpu.context().handle());
    set_current(ptr::null_mut());
}
