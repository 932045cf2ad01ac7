//! Each fault that the emulator looks for, planted.

mod common;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use common::{fault, launch, view, view_mut};
use simt::{
    Dim3,
    barrier::{self, Named},
    emulator::{self, Alteration, Change, FaultKind, Launch, Options, Site, Sites, SyncKind},
    memory::Memory,
    shared::Shared,
    shared_array, thread, warp,
};

fn smem<T: Memory>(len: u32) -> Shared<T> {
    // SAFETY: tests launch with 4096 bytes; what races is what is tested.
    unsafe { Shared::dynamic(0, len) }
}

fn line_of(site: Site) -> u32 {
    let location = site.location.expect("a site in this file");
    assert!(location.file().ends_with("faults.rs"), "{}", location.file());
    location.line()
}

#[test]
fn write_read_race_is_reported_with_both_lines() {
    let write_line = line!() + 8;
    let kind = fault(64, || {
        let t = thread::thread_idx_x();
        let tile = smem::<f32>(64);
        // So that the second read finds something.
        tile.write(t, 0.0);
        // Hazard: the zeros are read by others.
        thread::sync_threads();
        tile.write(t, t as f32);
        let _ = tile.read(t ^ 32);
    });
    let FaultKind::Race { what, this, other_what, other, .. } = kind else { panic!("{kind}") };
    // Thread 63, the last to come to the barrier, goes on first and has read the word.
    assert_eq!((what, this.lane, other_what, other.lane), ("write", 31, "read", 63));
    assert_eq!((line_of(this), line_of(other)), (write_line, write_line + 1));
}

#[test]
fn a_barrier_orders_write_and_read() {
    launch(2, 64, || {
        let t = thread::thread_idx_x();
        let tile = smem::<f32>(64);
        tile.write(t, t as f32);
        // Hazard: other threads read what this one wrote.
        thread::sync_threads();
        assert_eq!(tile.read(63 - t), (63 - t) as f32);
    });
}

#[test]
fn read_write_race_is_found_when_the_second_barrier_is_missing() {
    let kernel = |second: bool| {
        move || {
            let t = thread::thread_idx_x();
            let tile = smem::<u32>(64);
            for round in 0..3 {
                tile.write(t, round);
                // Hazard: other threads read what this one wrote.
                thread::sync_threads();
                let _ = tile.read(t ^ 32);
                if second {
                    // Hazard: other threads have yet to read what is overwritten next.
                    thread::sync_threads();
                }
            }
        }
    };
    launch(1, 64, kernel(true));
    let kind = fault(64, kernel(false));
    assert!(matches!(kind, FaultKind::Race { .. }), "{kind}");
}

#[test]
fn write_write_race_is_found() {
    let kind = fault(2, || smem::<u32>(1).write(0, thread::thread_idx_x()));
    assert!(matches!(kind, FaultKind::Race { what: "write", other_what: "write", .. }), "{kind}");
}

#[test]
fn a_shuffle_does_not_order_memory_but_a_warp_barrier_does() {
    let kernel = |barrier: bool| {
        move || {
            let t = thread::thread_idx_x();
            let tile = smem::<u32>(32);
            tile.write(t, 0);
            // Hazard: what is read below must have been written.
            thread::sync_threads();
            tile.write(t, t);
            if barrier {
                // Hazard: lanes read what others wrote.
                warp::sync_warp(warp::FULL_MASK);
            } else {
                let _ = warp::shuffle_xor(t, 1);
            }
            let _ = tile.read(t ^ 1);
        }
    };
    launch(1, 32, kernel(true));
    assert!(matches!(fault(32, kernel(false)), FaultKind::Race { .. }));
}

#[test]
fn a_warp_barrier_does_not_order_other_warps() {
    let kind = fault(64, || {
        let t = thread::thread_idx_x();
        let tile = smem::<u32>(64);
        tile.write(t, 0);
        // Hazard: what is read below must have been written.
        thread::sync_threads();
        tile.write(t, t);
        warp::sync_warp(warp::FULL_MASK);
        let _ = tile.read(t ^ 32);
    });
    assert!(matches!(kind, FaultKind::Race { .. }), "{kind}");
}

#[test]
fn halves_of_a_word_are_told_apart() {
    launch(1, 32, || {
        let t = thread::thread_idx_x();
        smem::<u16>(32).write(t, t as u16);
    });
}

#[test]
fn uninitialised_read_is_found_also_after_another_block_wrote_there() {
    let line = line!() + 4;
    let kind = common::try_launch(4, 1, || {
        let tile = smem::<f32>(4);
        if thread::block_idx_x() == 3 {
            // Blocks 0 to 2 wrote here, but that was their shared memory.
            let _ = tile.read(2);
        }
        for i in 0..4 {
            tile.write(i, 1.0);
        }
    })
    .expect_err("the planted fault is found")
    .kind;
    let FaultKind::Uninitialised { offset: 8, this } = kind else { panic!("{kind}") };
    assert_eq!(line_of(this), line + 1);
}

#[test]
fn shared_and_global_bounds_are_checked() {
    let kind = fault(1, || smem::<f32>(8).write(8, 0.0));
    assert!(
        matches!(kind, FaultKind::OutOfBounds { space: "shared", index: 8, len: 8, .. }),
        "{kind}"
    );
    let data = [0u32; 4];
    let kind = fault(1, || {
        let _ = view(&data).read(4);
    });
    assert!(
        matches!(
            kind,
            FaultKind::OutOfBounds { space: "global", what: "read", index: 4, len: 4, .. }
        ),
        "{kind}"
    );
    let mut data = [0u32; 4];
    let out = view_mut(&mut data);
    let kind = fault(1, || out.write_as::<[u32; 4]>(1, [0; 4]));
    assert!(matches!(kind, FaultKind::OutOfBounds { what: "write", .. }), "{kind}");
}

#[test]
fn misaligned_vectors_are_found() {
    let kind = fault(1, || {
        let tile = smem::<u32>(8);
        tile.write_as::<[u32; 4]>(1, [0; 4]);
    });
    assert!(matches!(kind, FaultKind::Misaligned { space: "shared", bytes: 16, .. }), "{kind}");
    let data = [0u64; 4];
    // SAFETY: the view covers the slice; the misalignment is what is tested.
    let odd = unsafe { simt::global::Global::<u16>::new(data.as_ptr() as u64 + 2, 15) };
    let kind = fault(1, || {
        let _ = odd.read_as::<u32>(0);
    });
    assert!(matches!(kind, FaultKind::Misaligned { space: "global", bytes: 4, .. }), "{kind}");
}

#[test]
fn a_barrier_that_some_threads_skip_is_divergence() {
    let kind = fault(64, || {
        if thread::thread_idx_x() < 40 {
            thread::sync_threads();
        }
    });
    let FaultKind::Divergence(text) = &kind else { panic!("{kind}") };
    assert!(text.contains("40 thread(s) (0 to 39) wait at barrier 0"), "{text}");
    assert!(text.contains("24 thread(s) (40 to 63) done"), "{text}");
}

#[test]
#[expect(clippy::if_same_then_else, reason = "the two barriers differ by their place")]
fn a_warp_that_comes_to_a_barrier_at_two_places_is_divergence() {
    let kind = fault(32, || {
        if thread::thread_idx_x() < 16 {
            thread::sync_threads();
        } else {
            thread::sync_threads();
        }
    });
    assert!(matches!(kind, FaultKind::Divergence(_)), "{kind}");
}

#[derive(Clone, Copy)]
struct Pair;

impl Named for Pair {
    fn id(self) -> u32 {
        1
    }
}

#[test]
fn a_named_barrier_is_for_whole_warps() {
    // Halves of two warps make as many threads as a warp has.
    let kind = fault(64, || {
        if thread::thread_idx_x() % 32 < 16 {
            barrier::sync(Pair, 32);
        }
    });
    let FaultKind::Divergence(text) = &kind else { panic!("{kind}") };
    assert!(text.contains("lanes 0x0000ffff of warp 0 came to barrier 1"), "{text}");
    let kind = fault(64, || barrier::sync(Pair, 48));
    assert!(kind.to_string().contains("a named barrier of 48 threads"), "{kind}");
    let kind = fault(64, || barrier::arrive(Pair, 48));
    assert!(kind.to_string().contains("a named barrier of 48 threads"), "{kind}");
}

/// A producer of two values and a consumer, in shared memory.
fn handed_on() {
    let t = thread::thread_idx_x();
    let tile = smem::<u32>(64);
    tile.write(t, t);
    // Hazard: other threads read what this one wrote.
    thread::sync_threads();
    let other = tile.read(t ^ 32);
    // Hazard: what has yet to be read is overwritten.
    thread::sync_threads();
    tile.write(t, other);
    // Not needed: a warp reads what it wrote itself.
    thread::sync_threads();
    let _ = tile.read(t);
}

#[test]
fn a_launch_leaves_out_a_synchronisation_of_choice() {
    let launch = Launch { grid: 1.into(), block: 64.into(), cluster: 1, shared_bytes: 4096 };
    let sites = Arc::new(Sites::default());
    let options = Options { sites: Some(sites.clone()), ..Options::default() };
    emulator::launch_with(launch, &options, &handed_on).expect("the kernel is right");
    let sites = sites.list();
    assert!(sites.iter().all(|s| s.kind == SyncKind::Barrier && s.file.ends_with("faults.rs")));
    let found: Vec<bool> = sites
        .into_iter()
        .map(|site| {
            let change = Some(Change { site, alteration: Alteration::LeaveOut });
            let options = Options { change, ..Options::default() };
            emulator::launch_with(launch, &options, &handed_on).is_err()
        })
        .collect();
    assert_eq!(found, [true, true, false]);
}

#[test]
fn races_name_who_was_on_the_other_side() {
    let other = |readers: [u32; 2]| {
        let launch = Launch { grid: 1.into(), block: 256.into(), cluster: 1, shared_bytes: 4096 };
        let kernel = || {
            let t = thread::thread_idx_x();
            let word = smem::<u32>(1);
            if t == 0 {
                word.write(0, 1);
            }
            // Hazard: what is read below must have been written.
            thread::sync_threads();
            if readers.contains(&(t / 32)) {
                let _ = word.read(0);
            }
            if t == 32 {
                word.write(0, 2);
            }
        };
        // Backwards: warp 1 comes after those that read.
        let fault = emulator::launch_with(launch, &Options::seeded(1), &kernel)
            .expect_err("the planted fault is found");
        let FaultKind::Race { what: "write", this, other_what: "read", other, .. } = fault.kind
        else {
            panic!("{fault}")
        };
        assert_eq!(this.lane, 32);
        other.to_string().split(" at ").next().unwrap_or_default().to_owned()
    };
    assert_eq!(other([2, 2]), "threads of warp 2");
    // Both have the same place in the record.
    assert_eq!(other([2, 5]), "threads of several warps");
}

#[test]
fn a_collective_in_divergent_code_is_divergence() {
    let kind = fault(32, || {
        if thread::thread_idx_x() < 16 {
            let _ = warp::ballot(true);
        } else {
            warp::sync_warp(warp::FULL_MASK);
        }
    });
    let FaultKind::Divergence(text) = &kind else { panic!("{kind}") };
    assert!(text.contains("ballot") && text.contains("sync_warp"), "{text}");
}

#[test]
fn a_mask_must_name_the_lane_itself() {
    let kind = fault(32, || warp::sync_warp(0xffff));
    assert!(matches!(kind, FaultKind::Misuse { .. }), "{kind}");
}

#[test]
fn a_view_beyond_the_launch_is_misuse() {
    let kind = fault(1, || {
        // SAFETY: nothing is accessed.
        let _ = unsafe { Shared::<f32>::dynamic(4092, 2) };
    });
    let FaultKind::Misuse { message, .. } = &kind else { panic!("{kind}") };
    assert!(message.contains("4100") && message.contains("4096"), "{message}");
}

#[test]
fn panics_are_faults_with_their_line() {
    let line = line!() + 2;
    let kind = fault(64, || {
        if thread::thread_idx_x() == 33 {
            panic!("{} is not wanted", 33);
        }
        thread::sync_threads();
    });
    let FaultKind::Panic { message, this } = kind else { panic!("{kind}") };
    assert_eq!(message, "33 is not wanted");
    assert_eq!((this.lane, line_of(this)), (33, line + 1));
    // The lanes that the panic left suspended do not disturb what comes next.
    launch(4, 64, thread::sync_threads);
}

#[test]
fn the_first_block_with_a_fault_is_reported() {
    let fault = common::try_launch(64, 1, || {
        assert!(thread::block_idx_x() < 5, "block {}", thread::block_idx_x());
    })
    .expect_err("the planted fault is found");
    assert_eq!(fault.block, Some(Dim3::new(5, 0, 0)));
}

#[test]
fn launches_that_no_gpu_accepts_are_refused() {
    for (block, shared_bytes) in
        [(Dim3::new(1025, 1, 1), 0), (Dim3::new(0, 1, 1), 0), (32.into(), 232_449)]
    {
        let launch = Launch { grid: 1.into(), block, cluster: 1, shared_bytes };
        let fault = emulator::launch(launch, &|| {}).expect_err("the launch is refused");
        assert!(matches!(fault.kind, FaultKind::Launch(_)), "{fault}");
    }
}

#[test]
fn atomics_do_not_race_with_each_other_but_with_plain_accesses() {
    use simt::atomic;
    let kernel = |barrier: bool| {
        move || {
            let t = thread::thread_idx_x();
            let counter = shared_array!(u32; 1);
            if t == 0 {
                counter.write(0, 0);
            }
            // Hazard: the counter is updated by threads that did not clear it.
            thread::sync_threads();
            atomic::add_shared_u32(counter, 0, t);
            if barrier {
                // Hazard: other threads have yet to add.
                thread::sync_threads();
            }
            let sum = counter.read(0);
            assert!(!barrier || sum == 63 * 64 / 2);
        }
    };
    launch(3, 64, kernel(true));
    let kind = fault(64, kernel(false));
    assert!(matches!(kind, FaultKind::Race { .. }), "{kind}");
}

/// Readers in two warpgroups, and a writer that has met the warps of one, or of both. Warps that read
/// nothing need not come.
#[test]
fn a_writer_needs_to_know_the_warpgroups_that_read_and_no_others() {
    #[derive(Clone, Copy)]
    struct Readers;
    impl barrier::Named for Readers {
        fn id(self) -> u32 {
            1
        }
    }
    let kernel = |meets_both: bool| {
        move || {
            let warp = thread::thread_idx_x() / 32;
            let shared = shared_array!(u32; 1);
            if thread::thread_idx_x() == 0 {
                shared.write(0, 7);
            }
            // Hazard: one thread wrote what others read.
            thread::sync_threads();
            if warp >= 4 {
                assert_eq!(shared.read(0), 7);
            }
            let meets = warp == 0 || if meets_both { warp >= 4 } else { (4..8).contains(&warp) };
            if meets {
                // Hazard: they may not have read.
                barrier::sync(Readers, if meets_both { 32 + 256 } else { 32 + 128 });
            }
            if thread::thread_idx_x() == 0 {
                shared.write(0, 8);
            }
        }
    };
    launch(1, 384, kernel(true));
    let kind = fault(384, kernel(false));
    assert!(matches!(kind, FaultKind::Race { .. }), "{kind}");
}

#[test]
fn a_launch_ends_soon_after_it_is_asked_to() {
    let run = |blocks: u32, seed, barriers: u32| {
        let stop = Arc::new(AtomicBool::new(false));
        let options = Options { seed, stop: Some(stop.clone()), ..Options::default() };
        let launch = Launch { grid: blocks.into(), block: 64.into(), cluster: 1, shared_bytes: 0 };
        let ended = AtomicU32::new(0);
        let asked = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            stop.store(true, Ordering::Relaxed);
        });
        let fault = emulator::launch_with(launch, &options, &|| {
            for _ in 0..barriers {
                // For no hazard: a place where the launch can end.
                thread::sync_threads();
            }
            ended.fetch_add(1, Ordering::Relaxed);
        });
        asked.join().unwrap();
        assert_eq!(fault.unwrap_err().kind, FaultKind::Stopped);
        ended.into_inner()
    };
    for seed in [0, 1] {
        // One block without an end, and as many short ones as never end either.
        assert_eq!(run(1, seed, u32::MAX), 0);
        assert!(run(1 << 20, seed, 100) < 64 << 20);
    }
    // What has been stopped leaves nothing behind.
    launch(2, 64, || thread::sync_threads());
}
