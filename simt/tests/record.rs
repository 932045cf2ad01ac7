//! What the recorder counts by line, and the order that it keeps.

mod common;

use std::{panic::Location, sync::Arc};

use common::{Map, matrix, view, view_mut};
use half::f16;
use simt::{
    async_copy, atomic,
    emulator::{
        self, Action, Counts, Launch, LaunchRecord, LineRecord, Options, Recorder, Stats, Visit,
    },
    math, matrix as fragments,
    mbarrier::{self, Mbarrier},
    mma,
    shared::Shared,
    thread, tma, warp,
    wgmma::{Accumulator, Descriptor, SharedProduct, WaitGroup},
};

/// Runs blocks of `threads` threads and records them, with the events of the first block.
fn record(blocks: u32, threads: u32, kernel: impl Fn() + Sync) -> (LaunchRecord, Stats) {
    record_with(0, blocks, threads, kernel)
}

fn record_with(
    seed: u64,
    blocks: u32,
    threads: u32,
    kernel: impl Fn() + Sync,
) -> (LaunchRecord, Stats) {
    let recorder = Arc::new(Recorder::new(1));
    let launch =
        Launch { grid: blocks.into(), block: threads.into(), cluster: 1, shared_bytes: 96 * 1024 };
    let options = Options { recorder: Some(recorder.clone()), ..Options::seeded(seed) };
    let stats = emulator::launch_with(launch, &options, &kernel).expect("the kernel is right");
    let mut launches = recorder.take();
    assert_eq!((launches.len(), recorder.take().len()), (1, 0));
    (launches.remove(0), stats)
}

/// The number of the caller's line.
#[track_caller]
fn here() -> u32 {
    Location::caller().line()
}

fn line(record: &LaunchRecord, number: u32) -> &LineRecord {
    let of_line = |line: &&LineRecord| line.line == number && line.file.ends_with("record.rs");
    let found: Vec<_> = record.lines.iter().filter(of_line).collect();
    assert_eq!(found.len(), 1, "line {number}: {found:?}");
    found[0]
}

const FULL: u32 = warp::FULL_MASK;

fn words(offset: u32, len: u32) -> Shared<f32> {
    // SAFETY: within what the launch gives; the tests order their accesses.
    unsafe { Shared::dynamic(offset, len) }
}

#[test]
fn global_requests_touch_as_many_sectors_as_their_addresses_lie_in() {
    let x = vec![1.0f32; 2048];
    let (x, from_end) = (view(&x), 2047);
    let first = here() + 3;
    let (record, stats) = record(2, 64, || {
        let i = u64::from(thread::thread_idx_x());
        let _ = x.read(i);
        let _ = x.read(i * 32);
        let _ = x.read(from_end - i);
        let _ = x.read(7);
        let _ = x.read_as::<[u32; 4]>(i * 4);
    });
    // Four warps: contiguous, every lane in a sector of its own, the same word, 512 bytes.
    for (at, sectors, bytes) in [(0, 4, 128), (1, 32, 128), (2, 4, 128), (3, 1, 128), (4, 16, 512)]
    {
        let counts = line(&record, first + at).counts;
        let expected = Counts {
            warps: 4,
            threads: 128,
            global_requests: 4,
            global_sectors: 4 * sectors,
            global_bytes_read: 4 * bytes,
            ..Counts::default()
        };
        // An allocation may begin within a sector.
        let spare = if counts.global_sectors > expected.global_sectors { 4 } else { 0 };
        let expected = Counts { global_sectors: expected.global_sectors + spare, ..expected };
        assert_eq!(counts, expected, "line {at}");
        assert_eq!(line(&record, first + at).clusters, [(0, 2), (1, 2)]);
    }
    let read: u64 = record.lines.iter().map(|line| line.counts.global_bytes_read).sum();
    assert_eq!(read, stats.global_bytes_read);
}

#[test]
fn shared_requests_take_a_pass_for_each_word_of_the_busiest_bank() {
    let first = here() + 4;
    let (record, stats) = record(1, 32, || {
        let (tile, i) = (words(0, 2048), thread::thread_idx_x());
        let halves = halves();
        tile.write(i, 1.0);
        warp::sync_warp(FULL);
        tile.write(32 * i, 1.0);
        warp::sync_warp(FULL);
        tile.write(33 * i, 1.0);
        warp::sync_warp(FULL);
        tile.write_as::<[u32; 4]>(4 * i, [0; 4]);
        warp::sync_warp(FULL);
        tile.write_as::<[u32; 4]>(32 * i, [0; 4]);
        warp::sync_warp(FULL);
        tile.write_as::<[u32; 2]>(4 * i, [0; 2]);
        warp::sync_warp(FULL);
        halves.write(i, f16::ONE);
    });
    for (at, bytes, passes, least) in [
        (0, 4, 1, 1),
        // Every lane in bank 0; one word further each: no conflict.
        (1, 4, 32, 1),
        (2, 4, 1, 1),
        // 16 bytes: eight lanes a pass, side by side or all in the same four banks.
        (3, 16, 4, 4),
        (4, 16, 32, 4),
        // 8 bytes: sixteen lanes a pass, of which two meet in each bank.
        (5, 8, 4, 2),
        // Two halves share a word.
        (6, 2, 1, 1),
    ] {
        let expected = Counts {
            warps: 1,
            threads: 32,
            shared_requests: 1,
            shared_passes: passes,
            shared_passes_least: least,
            shared_bytes_written: 32 * bytes,
            ..Counts::default()
        };
        assert_eq!(line(&record, first + 2 * at).counts, expected, "access {at}");
    }
    let written: u64 = record.lines.iter().map(|line| line.counts.shared_bytes_written).sum();
    assert_eq!(written, stats.shared_bytes_written);
}

fn halves() -> Shared<f16> {
    // SAFETY: within what the launch gives, apart from the other tile.
    unsafe { Shared::dynamic(16 * 1024, 64) }
}

/// Lanes run one after the other; their n-th times at a place are one instruction of the warp, also
/// where some lanes come less often, and whatever the order.
#[test]
fn lanes_are_put_together_to_their_warp() {
    let x = vec![1.0f32; 64];
    let x = view(&x);
    for seed in [0, 1, 2, 3] {
        let first = here() + 5;
        let (record, _) = record_with(seed, 1, 64, || {
            let i = thread::thread_idx_x();
            let mut sum = 0.0;
            for _ in 0..1 + i % 4 {
                sum = math::fma(x.read(u64::from(i)), 2.0, sum);
            }
            if i < 40 {
                words(0, 64).write(i, math::exp2(sum));
            }
            thread::sync_threads();
            let _ = warp::reduce_add::<32>(sum);
        });
        let on = |number| record.lines.iter().filter(move |l| l.line == number).map(|l| l.counts);
        let mut counts = Counts::default();
        on(first).for_each(|c| counts += c);
        // Each warp comes four times; of 32 lanes 32, 24, 16 and 8.
        assert_eq!((counts.warps, counts.threads), (2 * 2 * 4, 2 * 2 * 80), "seed {seed}");
        assert_eq!((counts.flops, counts.global_requests), (2 * 160, 8));
        let mut counts = Counts::default();
        on(first + 3).for_each(|c| counts += c);
        assert_eq!((counts.special, counts.shared_requests, counts.threads), (40, 2, 80));
        let barrier = line(&record, first + 5).counts;
        assert_eq!((barrier.warps, barrier.waits, barrier.threads), (2, 2, 64));
        let reduced = line(&record, first + 6).counts;
        assert_eq!((reduced.warps, reduced.waits, reduced.threads), (2, 0, 64));
    }
}

#[test]
fn atomics_and_copies_are_counted_at_their_line() {
    let (x, mut y) = (vec![1.0f32; 128], vec![0u32; 1]);
    let (x, y) = (view(&x), view_mut(&mut y));
    let first = here() + 3;
    let (record, stats) = record(1, 32, || {
        let i = thread::thread_idx_x();
        async_copy::copy(words(0, 128), 4 * i, x, u64::from(4 * i));
        async_copy::commit();
        async_copy::wait::<0>();
        atomic::add_global_u32(y, 0, 1);
    });
    let copy = line(&record, first).counts;
    assert_eq!((copy.warps, copy.global_requests, copy.shared_requests), (1, 1, 1));
    assert_eq!((copy.global_bytes_read, copy.shared_bytes_written), (512, 512));
    assert_eq!((copy.shared_passes, copy.shared_passes_least), (4, 4));
    assert_eq!(line(&record, first + 1).counts.waits, 0);
    assert_eq!(line(&record, first + 2).counts.waits, 1);
    let sum = line(&record, first + 3).counts;
    assert_eq!((sum.global_requests, sum.global_sectors, sum.global_bytes_written), (1, 1, 128));
    assert_eq!(stats.global_bytes_written, 128);
    let actions: Vec<_> = record.traces[0].warps[0].iter().map(|e| e.action.clone()).collect();
    use Action::{CopyCommit, CopyStart, CopyWait, GlobalAtomic, GlobalRead};
    assert_eq!(actions, [GlobalRead, CopyStart, CopyCommit, CopyWait(0), GlobalAtomic]);
}

/// S = K Kᵀ of 64 rows.
///
/// # Safety
/// As for `product_shared`.
unsafe fn start_product(acc: &mut Accumulator<16>, k: Descriptor) {
    // SAFETY: what `product_shared` asks is stated above.
    unsafe { SharedProduct::<4>::product_shared::<f16, 0, 0>(acc, k, k) } // a product
}

/// The counts of the line that ends with that comment.
fn marked(record: &LaunchRecord, mark: &str) -> Counts {
    let end = format!("// {mark}");
    let number = include_str!("record.rs").lines().position(|line| line.ends_with(&end));
    line(record, number.expect("a mark") as u32 + 1).counts
}

#[test]
fn products_of_tensor_cores_are_counted_once_for_their_warp_or_warpgroup() {
    const ROWS: usize = 128;
    let data = matrix(ROWS, 64, 1);
    let map = Map::new(&data, ROWS, 64, ROWS as u32);
    let (record, stats) = record(1, 128, || {
        // SAFETY: within what the launch gives.
        let barrier = Mbarrier::at(unsafe { Shared::<u64>::dynamic(90 * 1024, 1) }, 0);
        // SAFETY: as above.
        let tile = unsafe { Shared::<f16>::dynamic(0, ROWS as u32 * 64) };
        if thread::thread_idx_x() == 0 {
            barrier.init(1);
            mbarrier::fence_init();
        }
        thread::sync_threads();
        if thread::thread_idx_x() == 0 {
            barrier.arrive_expect_tx(128 * 128);
            let (to, map) = (tile.address(), map.address());
            // SAFETY: the box lies in the tile.
            unsafe { tma::load_4d(to, map, [0; 4], barrier) }; // a bulk load
        }
        barrier.wait(0);
        let tile_of = Descriptor::k_major(tile.address());
        let mut acc = Accumulator::<16>::zero();
        // SAFETY: the tile has landed, and is not written again.
        unsafe { start_product(&mut acc, tile_of) };
        WaitGroup::wait_group::<0>(&mut acc); // a wait
        let v = fragments::load_x4(tile, 64 * (thread::thread_idx_x() % 32)); // fragments
        mma::m16n8k16_f16(&mut [0.0; 4], v, [0; 2]); // a product of a warp
    });
    let load = marked(&record, "a bulk load");
    assert_eq!((load.global_bytes_read, load.shared_bytes_written), (16_384, 16_384));
    assert_eq!((load.warps, load.threads, load.global_requests), (1, 1, 1));
    assert!((512..=513).contains(&load.global_sectors), "{load:?}");
    assert_eq!(load.global_bytes_read, stats.global_bytes_read);
    let wgmma = marked(&record, "a product");
    assert_eq!((wgmma.warps, wgmma.threads, wgmma.tensor_instructions), (4, 128, 4));
    assert_eq!(
        (wgmma.tensor_flops, wgmma.shared_bytes_read),
        (2 * 64 * 128 * 64, 128 * (64 + 128))
    );
    assert_eq!(marked(&record, "a wait").waits, 4);
    let load = marked(&record, "fragments");
    assert_eq!((load.warps, load.threads, load.shared_bytes_read), (4, 128, 4 * 512));
    // Rows of 128 bytes, the same chunk of each: eight rows in the same four banks.
    assert_eq!((load.shared_passes, load.shared_passes_least), (4 * 32, 4 * 4));
    assert_eq!(stats.bank_conflicts, load.shared_passes - load.shared_passes_least);
    let product = marked(&record, "a product of a warp");
    assert_eq!((product.warps, product.tensor_instructions), (4, 4));
    assert_eq!(product.tensor_flops, 4 * 2 * 16 * 8 * 16);

    // Who waits for what: the load counts in phase 0, for which all four warps wait.
    let trace = &record.traces[0];
    assert_eq!((trace.cluster, trace.block_warps, trace.warps.len()), (0, 4, 4));
    let has = |warp: usize, action: &Action| trace.warps[warp].iter().any(|e| e.action == *action);
    let address = trace.warps[0].iter().find_map(|event| match &event.action {
        Action::BulkLoad(phases) => Some(phases[0].0),
        _ => None,
    });
    let address = address.expect("the load");
    assert!(has(0, &Action::MbarrierArrive(address, 0)));
    for warp in 0..4 {
        assert!(has(warp, &Action::Barrier(Visit { slot: 0, opened: 0 })));
        assert!(has(warp, &Action::MbarrierWait(address, Some(0))));
        assert!(has(warp, &Action::WgmmaStart(0)) && has(warp, &Action::WgmmaWait(1)));
    }
}

/// The lane that comes to a barrier first, before another has done its work, does not decide the order.
#[test]
fn a_barrier_comes_after_what_every_lane_does_before_it() {
    for seed in 0..4 {
        let (record, _) = record_with(seed, 1, 64, || {
            // The last lane to come goes on first.
            warp::sync_warp(FULL);
            if thread::thread_idx_x() == 0 {
                words(0, 1).write(0, 1.0);
            }
            thread::sync_threads();
            let _ = words(0, 1).read(0);
        });
        let actions = |warp: usize| record.traces[0].warps[warp].iter().map(|e| e.action.clone());
        let barrier = Action::Barrier(Visit { slot: 0, opened: 0 });
        let rest = [Action::WarpBarrier, barrier, Action::SharedRead];
        assert!(actions(1).eq(rest.clone()), "seed {seed}: {:?}", record.traces);
        let [first, last @ ..] = rest;
        let zero = [first, Action::SharedWrite].into_iter().chain(last);
        assert!(actions(0).eq(zero), "seed {seed}: {:?}", record.traces);
    }
}

/// A loop is one event for each of its lines, up to a synchronisation.
#[test]
fn loops_fold_between_synchronisations() {
    let first = here() + 3;
    let (record, _) = record(2, 32, || {
        for _ in 0..2 {
            for i in 0..3 {
                words(0, 96).write(thread::thread_idx_x() + 32 * i, 0.0);
                let _ = math::fma(1.0, 2.0, 3.0);
            }
            thread::sync_threads();
        }
    });
    let events = &record.traces[0].warps[0];
    let seen: Vec<_> = events.iter().map(|e| (e.line - first, e.times)).collect();
    assert_eq!(seen, [(1, 3), (2, 3), (4, 1), (1, 3), (2, 3), (4, 1)]);
    assert_eq!(events[0].counts.shared_bytes_written, 3 * 128);
    assert_eq!(events[1].counts.flops, 3 * 2 * 32);
    let visits: Vec<_> = [2, 5].iter().map(|&i| events[i].action.clone()).collect();
    let visit = |opened| Action::Barrier(Visit { slot: 0, opened });
    assert_eq!(visits, [visit(0), visit(1)]);
    assert_eq!(record.traces.len(), 1, "only the block that was asked for");
}
