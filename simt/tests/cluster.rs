//! Clusters under the emulator: what blocks may do with each other's shared memory, and each
//! way to get it wrong.

mod common;

use std::sync::atomic::{AtomicU32, Ordering};

use common::{Map, matrix, view_mut};
use half::{bf16, f16};
use simt::{
    atomic, cluster,
    emulator::{self, Fault, FaultKind, Launch, Options, Stats},
    mbarrier::{self, Mbarrier},
    memory::Memory,
    shared::Shared,
    shared_array, thread,
    tma::{self, Element, TensorMap, TensorMapSpec},
    warp, warpgroup,
    wgmma::{Accumulator, Descriptor, SharedProduct, WaitGroup},
};

const THREADS: u32 = 128;
/// A tile of 128 rows of 64 elements.
const TILE_BYTES: u32 = 128 * 128;
const BARRIER: u32 = 2 * TILE_BYTES;
const SHARED_BYTES: u32 = BARRIER + 16;

/// Launches clusters of two blocks.
fn try_launch(blocks: u32, kernel: impl Fn() + Sync) -> Result<Stats, Fault> {
    let launch = Launch {
        grid: blocks.into(),
        block: THREADS.into(),
        cluster: 2,
        shared_bytes: SHARED_BYTES,
    };
    emulator::launch(launch, &kernel)
}

fn launch(blocks: u32, kernel: impl Fn() + Sync) -> Stats {
    try_launch(blocks, kernel).unwrap_or_else(|fault| panic!("{fault}"))
}

/// Message of the fault of a cluster.
fn fault(kernel: impl Fn() + Sync) -> FaultKind {
    try_launch(2, kernel).expect_err("the planted fault is found").kind
}

fn assert_starts(kind: &FaultKind, message: &str) {
    assert!(kind.to_string().starts_with(message), "{kind}");
}

fn values<T: Memory>(byte_offset: u32) -> Shared<T> {
    // SAFETY: within what the launch gives; the tests order their accesses, or mean not to.
    unsafe { Shared::dynamic(byte_offset, THREADS) }
}

fn bar(index: u32) -> Mbarrier {
    // SAFETY: the launch gives two barriers.
    Mbarrier::at(unsafe { Shared::<u64>::dynamic(BARRIER, 2) }, index)
}

/// Initialises two barriers in each block, of one and of `arrivals` arrivals.
fn init(arrivals: u32) {
    if thread::thread_idx_x() == 0 {
        bar(0).init(1);
        bar(1).init(arrivals);
        mbarrier::fence_init();
    }
    // Hazard: the other block's barriers are used too.
    cluster::sync();
}

/// Each thread leaves a number in the other block's memory.
fn exchange(first: bool, between: impl Fn(), last: bool) -> u32 {
    let mine = values::<u32>(0);
    let (rank, t) = (cluster::block_rank(), thread::thread_idx_x());
    if first {
        cluster::sync();
    }
    cluster::map_shared_rank(mine, 1 - rank).write(t, 1000 * rank + t);
    between();
    let got = mine.read(t);
    if last {
        cluster::sync();
    }
    got
}

#[test]
fn blocks_write_to_each_others_memory() {
    let mut out = vec![0u32; 4 * THREADS as usize];
    let to = view_mut(&mut out);
    launch(4, || {
        let got = exchange(true, cluster::sync, false);
        assert_eq!(cluster::num_blocks(), 2);
        assert_eq!(cluster::block_rank(), thread::block_idx_x() % 2);
        to.write(u64::from(thread::index_1d()), got);
    });
    // SAFETY: `out` was written through its address; nothing else holds it.
    let out = unsafe { std::slice::from_raw_parts(out.as_ptr(), out.len()) };
    for (i, &got) in out.iter().enumerate() {
        let (block, t) = (i as u32 / THREADS, i as u32 % THREADS);
        assert_eq!(got, 1000 * (1 - block % 2) + t);
    }
}

#[test]
fn blocks_read_each_others_memory_and_keep_their_own_arrays() {
    launch(2, || {
        let array = shared_array!(u32; 4);
        let rank = cluster::block_rank();
        if warp::lane_id() == 0 {
            array.write(warp::warp_id(), 7 + rank);
        }
        cluster::sync();
        let others = cluster::map_shared_rank(array, 1 - rank);
        assert_eq!((others.read(3), array.read(3)), (8 - rank, 7 + rank));
        cluster::sync();
    });
}

#[test]
fn a_block_that_may_not_have_started_or_may_have_ended_is_reported() {
    let kind = fault(|| {
        exchange(false, cluster::sync, true);
    });
    assert_starts(&kind, "shared memory of block 1 of the cluster used before");
    // Reads at the end, with nothing after them.
    let kind = fault(|| {
        let mine = values::<u32>(0);
        mine.write(thread::thread_idx_x(), 1);
        cluster::sync();
        _ = cluster::map_shared_rank(mine, 1 - cluster::block_rank()).read(0);
    });
    assert_starts(&kind, "block 0 of the cluster can end before this access");
}

#[test]
fn barriers_of_a_block_do_not_order_the_other_one() {
    let kind = fault(|| {
        exchange(true, thread::sync_threads, true);
    });
    let FaultKind::Race { what: "read", other_what: "write", this, other, .. } = kind else {
        panic!("{kind}")
    };
    assert_eq!((this.lane, other.lane), (THREADS - 1, 2 * THREADS - 1));
}

/// Launches a cluster of two blocks of eight warps.
fn launch_eight_warps(kernel: impl Fn() + Sync) -> Result<Stats, Fault> {
    let launch =
        Launch { grid: 2.into(), block: 256.into(), cluster: 2, shared_bytes: SHARED_BYTES };
    emulator::launch(launch, &kernel)
}

#[test]
fn barriers_of_a_block_order_its_atomics_and_what_several_warps_read() {
    launch_eight_warps(|| {
        let (t, mine) = (thread::thread_idx_x(), values::<u32>(0));
        if t == 0 {
            mine.write(0, 0);
        }
        thread::sync_threads();
        atomic::add_shared_u32(mine, 0, 1);
        thread::sync_threads();
        // Every warp reads it; then one thread writes it.
        assert_eq!(mine.read(0), 256);
        thread::sync_threads();
        if t == 0 {
            mine.write(0, 7);
        }
    })
    .unwrap_or_else(|fault| panic!("{fault}"));
}

#[test]
fn what_another_block_reads_is_not_ordered_by_a_barrier_of_the_own() {
    let kind = launch_eight_warps(|| {
        let (t, mine) = (thread::thread_idx_x(), values::<u32>(0));
        if t == 0 {
            mine.write(0, 0);
        }
        cluster::sync();
        // Warps of both blocks read the memory of block 0, which then writes it.
        _ = cluster::map_shared_rank(mine, 0).read(0);
        thread::sync_threads();
        if thread::index_1d() == 0 {
            mine.write(0, 7);
        }
        cluster::sync();
    })
    .expect_err("the planted fault is found")
    .kind;
    let FaultKind::Race { what: "write", other_what: "read", .. } = kind else { panic!("{kind}") };
}

#[test]
fn copies_do_not_see_what_another_block_wrote() {
    let to = vec![f16::ZERO; 64 * 64];
    let map = Map::new(&to, 64, 64, 1);
    let kind = fault(|| {
        cluster::sync();
        let t = thread::thread_idx_x();
        cluster::map_shared_rank(values::<u32>(0), 1 - cluster::block_rank()).write(t, t);
        mbarrier::fence_proxy_async();
        cluster::sync();
        if t == 0 {
            // SAFETY: the matrix and the map outlive the launch.
            unsafe { tma::store_4d(map.address(), [0; 4], 0) };
            tma::commit_group();
            tma::wait_group_read::<0>();
        }
    });
    assert!(matches!(kind, FaultKind::ProxyFence { .. }), "{kind}");
}

#[test]
fn a_barrier_of_another_block_cannot_be_waited_for() {
    let kind = fault(|| {
        init(1);
        // SAFETY: the launch gives two barriers.
        let barriers = unsafe { Shared::<u64>::dynamic(BARRIER, 2) };
        let others = cluster::map_shared_rank(barriers, 1 - cluster::block_rank());
        // SAFETY: it is not right: that is what is found.
        let others = unsafe { Shared::<u64>::from_raw(others.address_of(0), 1) };
        Mbarrier::at(others, 0).wait(1);
    });
    assert!(kind.to_string().contains("outside of the block's shared memory"), "{kind}");
}

#[test]
fn accesses_beyond_the_cluster_or_the_block_are_out_of_bounds() {
    let kind = fault(|| {
        _ = cluster::map_shared_rank(values::<u32>(0), 2);
    });
    assert_starts(&kind, "block 2 of a cluster of 2");
    let kind = fault(|| {
        cluster::sync();
        cluster::map_shared_rank(values::<u32>(0), 1).write(THREADS, 0);
    });
    assert_starts(&kind, "shared write out of bounds by thread 255");
    // An address of the other block, used as one's own.
    let kind = fault(|| {
        cluster::sync();
        let others = cluster::map_shared_rank(values::<u32>(0), 1 - cluster::block_rank());
        // SAFETY: it is not: that is what is found.
        unsafe { Shared::<u32>::from_raw(others.address_of(0), 1) }.write(0, 0);
    });
    assert_starts(&kind, "shared write out of bounds by thread 255");
}

/// Block 1 leaves a number in block 0 and arrives at its barrier, where it is waited for.
fn hand_over(arrive: impl Fn(Mbarrier), wait: impl Fn(Mbarrier)) -> impl Fn() {
    move || {
        init(THREADS);
        let mine = values::<u32>(0);
        let t = thread::thread_idx_x();
        if cluster::block_rank() == 1 {
            cluster::map_shared_rank(mine, 0).write(t, t);
            arrive(bar(1));
        } else {
            wait(bar(1));
            assert_eq!(mine.read(THREADS - 1 - t), THREADS - 1 - t);
        }
    }
}

#[test]
fn arrivals_at_another_blocks_barrier_hand_data_over() {
    launch(2, hand_over(|bar| bar.arrive_at(0), |bar| bar.wait_cluster(0)));
    let kind = fault(hand_over(|bar| bar.arrive_at(0), |bar| bar.wait(0)));
    assert_starts(&kind, "threads of another block arrived at the mbarrier");
    let kind = fault(hand_over(|bar| bar.signal_at(0), |bar| bar.wait_cluster(0)));
    assert!(kind.to_string().contains("is read before it was released to the cluster"), "{kind}");
}

#[test]
fn an_arrival_that_nobody_waits_for_may_come_after_the_end() {
    let kind = fault(|| {
        init(THREADS);
        if cluster::block_rank() == 1 {
            bar(1).arrive_at(0);
        }
    });
    assert_starts(&kind, "block 0 of the cluster can end before this access");
}

/// Each block loads half of a tile into both, `turns` times, and multiplies the whole with
/// itself. `release` says whether blocks wait for each other before they load again.
fn multicast(map: &Map, turns: u32, release: bool) -> impl Fn() + Sync + '_ {
    move || {
        init(2);
        let (full, empty) = (bar(0), bar(1));
        // SAFETY: the launch gives the tile.
        let tile = unsafe { Shared::<f16>::dynamic(0, TILE_BYTES / 2) };
        let rank = cluster::block_rank();
        for turn in 0..turns {
            if thread::thread_idx_x() == 0 {
                if release {
                    // Hazard: either block may still read the tile.
                    empty.wait((turn % 2) ^ 1);
                }
                full.arrive_expect_tx(TILE_BYTES);
                let half = tile.address_of(rank * 64 * 64);
                // SAFETY: the matrix and the map outlive the launch.
                unsafe {
                    tma::load_4d_multicast(half, map.address(), [0, rank * 64, 0, 0], full, 0b11);
                }
            }
            // Hazard: the tile may not have landed.
            full.wait(turn % 2);
            let mut s = Accumulator::<16>::zero();
            let a = Descriptor::k_major(tile.address());
            // SAFETY: the whole warpgroup is here, and nothing is overwritten before it arrives.
            unsafe {
                SharedProduct::<4>::product_shared::<f16, { 128 * 128 }, { 128 * 128 }>(
                    &mut s, a, a,
                );
            }
            s.wait_group::<0>();
            // Row and column 0: what the squares of the first row add up to.
            if warpgroup::thread_id() == 0 {
                assert_eq!(s.values()[0][0], 5.0 * 64.0);
            }
            // Hazard: a thread that has not seen the phase would miss it.
            thread::sync_threads();
            if thread::thread_idx_x() < 2 {
                empty.signal_at(thread::thread_idx_x());
            }
        }
        // Hazard: the last arrivals come to a block that must not have ended.
        cluster::sync();
    }
}

/// A tile whose rows' squares add up to 5 an element.
fn ones_and_threes() -> Vec<f16> {
    (0..128 * 64).map(|i| f16::from_f32(if i % 2 == 0 { 1.0 } else { 3.0 })).collect()
}

#[test]
fn multicast_brings_a_box_to_every_block_and_reads_it_once() {
    let data = ones_and_threes();
    let map = Map::new(&data, 128, 64, 64);
    let stats = launch(4, multicast(&map, 3, true));
    assert_eq!(stats.global_bytes_read, 2 * 3 * u64::from(TILE_BYTES));
}

#[test]
fn multicast_over_what_another_block_still_reads_is_a_race() {
    let data = ones_and_threes();
    let map = Map::new(&data, 128, 64, 64);
    let kind = fault(multicast(&map, 2, false));
    // It does not know that the copy before has landed there, nor that its reader is done.
    let FaultKind::Race { what: "write", this, other, .. } = kind else { panic!("{kind}") };
    assert!(this.to_string().starts_with("a bulk load"), "{this}");
    assert!(other.to_string().starts_with("a bulk load"), "{other}");
}

/// Each block multicasts a box to both; the fence after the barriers' initialisation comes before
/// the cluster's barrier, or, in one block, after it.
fn fenced_late(map: &Map, late: Option<u32>) -> impl Fn() + Sync + '_ {
    move || {
        let (t, rank) = (thread::thread_idx_x(), cluster::block_rank());
        if t == 0 {
            bar(0).init(1);
            if late != Some(rank) {
                mbarrier::fence_init();
            }
        }
        // Hazard: the other block's barrier is used too.
        cluster::sync();
        if t == 0 {
            if late == Some(rank) {
                mbarrier::fence_init();
            }
            bar(0).arrive_expect_tx(TILE_BYTES);
            let to = values::<u8>(0).address_of(rank * (TILE_BYTES / 2));
            // SAFETY: the matrix and the map outlive the launch.
            unsafe {
                tma::load_4d_multicast(to, map.address(), [0, rank * 64, 0, 0], bar(0), 0b11);
            }
            bar(0).wait(0);
        }
        cluster::sync();
    }
}

#[test]
fn a_fence_must_be_known_to_whoever_relies_on_it() {
    let data = ones_and_threes();
    let map = Map::new(&data, 128, 64, 64);
    for seed in 0..8 {
        let run = |late| {
            let launch = Launch {
                grid: 2.into(),
                block: THREADS.into(),
                cluster: 2,
                shared_bytes: SHARED_BYTES,
            };
            emulator::launch_with(launch, &Options::seeded(seed), &fenced_late(&map, late))
        };
        run(None).unwrap_or_else(|fault| panic!("{fault}"));
        for late in [0, 1] {
            // The other block's thread starts a copy to a barrier whose fence it knows nothing of,
            // whether that has come by then or not.
            let fault = run(Some(late)).expect_err("the planted fault is found").to_string();
            assert!(fault.contains("did not call fence_init"), "{fault}");
        }
    }
}

#[test]
fn a_load_that_is_still_on_its_way_at_the_end_is_reported() {
    let data = matrix(128, 64, 1);
    let map = Map::new(&data, 128, 64, 64);
    let kind = fault(|| {
        init(1);
        if thread::index_1d() == 0 {
            bar(0).arrive_expect_tx(TILE_BYTES / 2);
            // SAFETY: the matrix and the map outlive the launch.
            unsafe { tma::load_4d(0, map.address(), [0; 4], bar(0)) };
        }
    });
    assert_starts(&kind, "the kernel ended before this bulk load was waited for");
}

/// Every block adds a tile of 1.5 to a matrix of 2 with five columns, of boxes that hang over
/// its edge.
fn reduce<T: Memory + Copy>(element: Element, of: impl Fn(f32) -> T + Sync) -> Vec<T> {
    let (rows, columns, row) = (6u64, 5u64, 32u64);
    let mut sums = vec![of(2.0); (rows * row / u64::from(T::BYTES)) as usize];
    let spec = TensorMapSpec {
        address: sums.as_mut_ptr() as u64,
        element,
        dims: vec![columns, rows, 1, 1],
        strides_bytes: vec![row, row * rows, row * rows],
        box_dims: vec![16 / T::BYTES, 8, 1, 1],
        swizzle_bytes: 0,
    };
    #[repr(align(64))]
    struct Aligned(TensorMap);
    let map = Aligned(spec.encode().expect("a map that the driver would take"));
    let map = std::ptr::from_ref(&map.0) as u64;
    launch(4, || {
        let tile = values::<T>(0);
        tile.write(thread::thread_idx_x(), of(1.5));
        mbarrier::fence_proxy_async();
        // Hazard: the copy reads what other threads wrote.
        thread::sync_threads();
        if thread::thread_idx_x() == 0 {
            for column in [0, 16 / T::BYTES] {
                // SAFETY: the map and the matrix outlive the launch.
                unsafe { tma::reduce_add_4d(map, [column, 0, 0, 0], tile.address()) };
            }
            tma::commit_group();
            tma::wait_group_read::<0>();
        }
    });
    // SAFETY: the elements were written through their address; nothing else holds them.
    unsafe { std::slice::from_raw_parts(sums.as_ptr(), sums.len()) }.to_vec()
}

#[test]
fn reductions_add_what_lies_within_the_tensor() {
    let f32s = reduce(Element::F32, |x| x);
    let f16s = reduce(Element::F16, f16::from_f32);
    let bf16s = reduce(Element::Bf16, bf16::from_f32);
    for row in 0..6 {
        for column in 0..8 {
            let expected = if column < 5 { 2.0 + 4.0 * 1.5 } else { 2.0 };
            assert_eq!(f32s[row * 8 + column], expected);
            assert_eq!(f16s[row * 16 + column].to_f32(), expected);
            assert_eq!(bf16s[row * 16 + column].to_f32(), expected);
        }
    }
}

#[test]
fn a_reduction_without_a_map_adds_when_it_is_waited_for() {
    // To wait for the read frees the shared memory; only the other wait promises the sum.
    for (performed, expected) in [(false, 2.0), (true, 3.5)] {
        let mut sums = vec![2.0f32; THREADS as usize];
        let to = view_mut(&mut sums);
        let seen = AtomicU32::new(0);
        launch(2, || {
            let tile = values::<f32>(0);
            tile.write(thread::thread_idx_x(), 1.5);
            mbarrier::fence_proxy_async();
            // Hazard: the copy reads what other threads wrote.
            thread::sync_threads();
            if thread::block_idx_x() == 0 && thread::thread_idx_x() == 0 {
                // SAFETY: the sums outlive the launch.
                unsafe { tma::reduce_add_f32(to, 0, tile.address(), THREADS) };
                tma::commit_group();
                tma::wait_group_read::<0>();
                if performed {
                    tma::wait_group::<0>();
                }
                let old = atomic::add_global_f32(to, 0, 0.0);
                seen.store(old.to_bits(), Ordering::Relaxed);
            }
        });
        assert_eq!(f32::from_bits(seen.into_inner()), expected);
        assert!(sums.iter().all(|&sum| sum == 3.5));
    }
}

#[test]
fn launches_with_clusters_that_do_not_fit_are_refused() {
    let refused = |blocks: u32, threads: u32, cluster: u32, what: &str| {
        let launch =
            Launch { grid: blocks.into(), block: threads.into(), cluster, shared_bytes: 0 };
        let fault = emulator::launch(launch, &|| ()).expect_err(what).to_string();
        assert!(fault.contains(what), "{fault}");
    };
    refused(3, 128, 2, "clusters of 2 blocks in a grid of 3 along x");
    refused(16, 128, 16, "a cluster has 1 to 8 blocks");
    refused(2, 96, 2, "whole warpgroups");
    refused(4, 512, 4, "up to 1024 threads a cluster");
}
