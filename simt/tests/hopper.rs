//! mbarriers, bulk copies and wgmma under the emulator: what is right gives the right
//! numbers, and each misuse is found.

mod common;

use common::{Map, matrix};
use half::f16;
use simt::{
    barrier::{self, Named},
    emulator::{self, Checks, Fault, FaultKind, Launch, Options, Stats},
    mbarrier::{self, Mbarrier},
    shared::Shared,
    thread, tma, warp, warpgroup,
    wgmma::{
        Accumulator, Descriptor, KMajor, Major, MnMajor, RegisterProduct, SharedProduct,
        SliceProduct, TransposedProduct, WaitGroup,
    },
};

/// Where the tiles lie: A or what is copied first, B, then the barriers.
const A: u32 = 0;
const B: u32 = 32 * 1024;
const BARRIERS: u32 = 96 * 1024;
const SHARED_BYTES: u32 = BARRIERS + 64;

fn try_launch(threads: u32, kernel: impl Fn() + Sync) -> Result<Stats, Fault> {
    try_launch_with(&Options::default(), threads, kernel)
}

fn try_launch_with(
    options: &Options,
    threads: u32,
    kernel: impl Fn() + Sync,
) -> Result<Stats, Fault> {
    let launch =
        Launch { grid: 1.into(), block: threads.into(), cluster: 1, shared_bytes: SHARED_BYTES };
    emulator::launch_with(launch, options, &kernel)
}

/// Seeds under which what is right is run.
const SEEDS: std::ops::Range<u64> = 0..12;

fn fault(threads: u32, kernel: impl Fn() + Sync) -> FaultKind {
    try_launch(threads, kernel).expect_err("the planted fault is found").kind
}

#[derive(Clone, Copy)]
enum Barrier {
    Done = 1,
    Order = 2,
}

impl Named for Barrier {
    fn id(self) -> u32 {
        self as u32
    }
}

fn bar(index: u32) -> Mbarrier {
    // SAFETY: the launch gives eight barriers.
    Mbarrier::at(unsafe { Shared::<u64>::dynamic(BARRIERS, 8) }, index)
}

fn tile(offset: u32) -> Shared<f16> {
    // SAFETY: within what the launch gives; the tests order their accesses, or mean not to.
    unsafe { Shared::dynamic(offset, 16 * 1024) }
}

/// Initialises `count` barriers of `arrivals` arrivals.
fn init(count: u32, arrivals: u32) {
    if thread::thread_idx_x() == 0 {
        (0..count).for_each(|i| bar(i).init(arrivals));
        mbarrier::fence_init();
    }
    // Hazard: barriers are used by threads that did not make them.
    thread::sync_threads();
}

/// Loads all 64-column chunks of a tile of `rows` rows.
fn load(map: &Map, to: u32, rows: u32, columns: u32, barrier: Mbarrier) {
    let chunks = columns.div_ceil(64);
    barrier.arrive_expect_tx(chunks * rows * 128);
    for chunk in 0..chunks {
        let to = to + chunk * rows * 128;
        // SAFETY: the matrix and the map outlive the launch.
        unsafe { tma::load_4d(to, map.address(), [chunk * 64, 0, 0, 0], barrier) };
    }
}

/// Row and column, in a 64-row tile, of value `e` of group `g` of this thread.
fn place(g: usize, e: usize) -> (usize, usize) {
    let t = warpgroup::thread_id() as usize;
    (t / 32 * 16 + t % 32 / 4 + e / 2 * 8, 8 * g + t % 4 * 2 + e % 2)
}

fn dot(a: &[f16], b: impl Fn(usize) -> f16) -> f32 {
    a.iter().enumerate().map(|(k, a)| a.to_f32() * b(k).to_f32()).sum()
}

#[test]
fn shared_product_multiplies_what_copies_brought() {
    // 64 x 96 times 128 x 96 transposed; 96 columns are one chunk and a half.
    let (a, b) = (matrix(64, 96, 1), matrix(128, 96, 2));
    let (map_a, map_b) = (Map::new(&a, 64, 96, 64), Map::new(&b, 128, 96, 128));
    try_launch(128, || {
        init(1, 2);
        if thread::thread_idx_x() == 0 {
            load(&map_a, A, 64, 96, bar(0));
            load(&map_b, B, 128, 96, bar(0));
        }
        // Hazard: the copies may not have landed.
        bar(0).wait(0);
        let mut s = Accumulator::<16>::zero();
        // SAFETY: the whole warpgroup is here, and nothing is overwritten.
        unsafe {
            SharedProduct::<6>::product_shared::<f16, { 64 * 128 }, { 128 * 128 }>(
                &mut s,
                Descriptor::k_major(A),
                Descriptor::k_major(B),
            );
        }
        s.wait_group::<0>();
        for (g, group) in s.values().iter().enumerate() {
            for (e, &value) in group.iter().enumerate() {
                let (row, column) = place(g, e);
                let expected = dot(&a[row * 96..][..96], |k| b[column * 96 + k]);
                assert_eq!(value, expected, "s[{row}, {column}]");
            }
        }
    })
    .unwrap_or_else(|fault| panic!("{fault}"));
}

#[test]
fn register_product_takes_a_from_an_accumulators_layout() {
    // 64 x 128 in registers times 128 x 96, accumulated twice.
    let (a, b) = (matrix(64, 128, 3), matrix(128, 96, 4));
    let map_b = Map::new(&b, 128, 96, 128);
    try_launch(128, || {
        init(1, 1);
        if thread::thread_idx_x() == 0 {
            load(&map_b, B, 128, 96, bar(0));
        }
        let mut p = [[0u32; 4]; 8];
        for (step, fragment) in p.iter_mut().enumerate() {
            for (r, packed) in fragment.iter_mut().enumerate() {
                let (row, column) = place(2 * step + r / 2, r % 2 * 2);
                let bits = |c: usize| u32::from(a[row * 128 + c].to_bits());
                *packed = bits(column) | bits(column + 1) << 16;
            }
        }
        // Hazard: the copy may not have landed.
        bar(0).wait(0);
        let mut o = Accumulator::<12>::zero();
        for _ in 0..2 {
            // SAFETY: the whole warpgroup is here, and nothing is overwritten.
            unsafe { o.product_registers::<f16>(&p, Descriptor::n_major(B, 128 * 128)) };
            o.wait_group::<0>();
        }
        for (g, group) in o.values().iter().enumerate() {
            for (e, &value) in group.iter().enumerate() {
                let (row, column) = place(g, e);
                let expected = 2.0 * dot(&a[row * 128..][..128], |k| b[k * 96 + column]);
                assert_eq!(value, expected, "o[{row}, {column}]");
            }
        }
    })
    .unwrap_or_else(|fault| panic!("{fault}"));
}

/// A slice of A times one of B, each with rows along the terms or across them, twice: the second is
/// added to the first.
fn slice_product<MA: Major, MB: Major>() {
    // 64 x 64 times 64 x 128, or either of them transposed.
    let rows_of = |is_mn: bool, lines: u32| if is_mn { (64, lines) } else { (lines, 64) };
    let ((a_rows, a_columns), (b_rows, b_columns)) =
        (rows_of(MA::IS_MN, 64), rows_of(MB::IS_MN, 128));
    let new = |rows: u32, columns: u32, seed| matrix(rows as usize, columns as usize, seed);
    let (a, b) = (new(a_rows, a_columns, 7), new(b_rows, b_columns, 8));
    let map_a = Map::new(&a, a_rows as usize, a_columns as usize, a_rows);
    let map_b = Map::new(&b, b_rows as usize, b_columns as usize, b_rows);
    try_launch(128, || {
        init(1, 2);
        if thread::thread_idx_x() == 0 {
            load(&map_a, A, a_rows, a_columns, bar(0));
            load(&map_b, B, b_rows, b_columns, bar(0));
        }
        // Hazard: the copies may not have landed.
        bar(0).wait(0);
        let descriptor = |is_mn, at| match is_mn {
            true => Descriptor::n_major(at, 64 * 128),
            false => Descriptor::k_major(at),
        };
        let mut s = Accumulator::<16>::zero();
        for _ in 0..2 {
            let (a, b) = (descriptor(MA::IS_MN, A), descriptor(MB::IS_MN, B));
            // SAFETY: the whole warpgroup is here, and nothing is overwritten.
            unsafe { s.accumulate_slice::<f16, MA, MB>(a, b) };
            s.wait_group::<0>();
        }
        let at = |values: &[f16], is_mn: bool, columns: u32, line: usize, term: usize| {
            let (row, column) = if is_mn { (term, line) } else { (line, term) };
            values[row * columns as usize + column]
        };
        for (g, group) in s.values().iter().enumerate() {
            for (e, &value) in group.iter().enumerate() {
                let (row, column) = place(g, e);
                let of_row: Vec<f16> =
                    (0..64).map(|k| at(&a, MA::IS_MN, a_columns, row, k)).collect();
                let expected = 2.0 * dot(&of_row, |k| at(&b, MB::IS_MN, b_columns, column, k));
                assert_eq!(value, expected, "s[{row}, {column}]");
            }
        }
    })
    .unwrap_or_else(|fault| panic!("{fault}"));
}

#[test]
fn slice_product_takes_operands_whichever_way_their_rows_run() {
    slice_product::<KMajor, KMajor>();
    slice_product::<KMajor, MnMajor>();
    slice_product::<MnMajor, KMajor>();
    slice_product::<MnMajor, MnMajor>();
}

#[test]
fn transposed_product_sums_over_the_rows_of_both() {
    // 128 x 64 transposed times 128 x 64, twice: the second replaces the first.
    let (a, b) = (matrix(128, 64, 5), matrix(128, 64, 6));
    let (map_a, map_b) = (Map::new(&a, 128, 64, 128), Map::new(&b, 128, 64, 128));
    try_launch(128, || {
        init(1, 2);
        if thread::thread_idx_x() == 0 {
            load(&map_a, A, 128, 64, bar(0));
            load(&map_b, B, 128, 64, bar(0));
        }
        // Hazard: the copies may not have landed.
        bar(0).wait(0);
        let mut s = Accumulator::<8>::zero();
        for _ in 0..2 {
            let (a, b) = (Descriptor::n_major(A, 0), Descriptor::n_major(B, 0));
            // SAFETY: the whole warpgroup is here, and nothing is overwritten.
            unsafe { TransposedProduct::<8>::product_transposed::<f16>(&mut s, a, b) };
            s.wait_group::<0>();
        }
        for (g, group) in s.values().iter().enumerate() {
            for (e, &value) in group.iter().enumerate() {
                let (row, column) = place(g, e);
                let of_row: Vec<f16> = (0..128).map(|k| a[k * 64 + row]).collect();
                let expected = dot(&of_row, |k| b[k * 64 + column]);
                assert_eq!(value, expected, "s[{row}, {column}]");
            }
        }
    })
    .unwrap_or_else(|fault| panic!("{fault}"));
}

#[test]
fn boxes_over_the_edge_are_zero_and_are_not_stored() {
    let from = matrix(5, 72, 1);
    let mut to = vec![f16::from_f32(99.0); 5 * 72];
    let (map_from, map_to) = (Map::new(&from, 5, 72, 8), Map::new(&to, 5, 72, 8));
    let stats = try_launch(32, || {
        init(1, 1);
        if thread::thread_idx_x() == 0 {
            load(&map_from, A, 8, 72, bar(0));
            // Hazard: the copy may not have landed.
            bar(0).wait(0);
            // Row 1, column 70 of the second chunk, through the swizzle; and one past it.
            let unit = |row: u32, column: u32| {
                A / 2 + 8 * 64 + row * 64 + ((column / 8) ^ row) * 8 + column % 8
            };
            assert_eq!(tile(0).read(unit(1, 70 - 64)), from[72 + 70]);
            assert_eq!(tile(0).read(unit(1, 72 - 64)), f16::ZERO);
            assert_eq!(tile(0).read(unit(5, 0)), f16::ZERO);
            for chunk in 0..2 {
                // SAFETY: the map is that of `to`, which outlives the launch.
                unsafe {
                    tma::store_4d(map_to.address(), [chunk * 64, 0, 0, 0], A + chunk * 8 * 128);
                }
            }
            tma::commit_group();
            tma::wait_group_read::<0>();
        }
    })
    .unwrap_or_else(|fault| panic!("{fault}"));
    // What lies outside is neither read nor written.
    assert_eq!((stats.global_bytes_read, stats.global_bytes_written), (720, 720));
    // SAFETY: `to` was written through its address; nothing else holds it.
    let to = unsafe { std::slice::from_raw_parts_mut(to.as_mut_ptr(), to.len()) };
    assert_eq!(to, &from[..]);
}

/// Sequences packed one after the other, of which each has an end of its own: the coordinates lead
/// past 2^64 and back.
#[test]
fn boxes_of_five_dimensions_end_where_a_sequence_does() {
    const ROWS: usize = 12;
    const FIRST: u32 = 3;
    const LENGTH: u32 = 5;
    let from = matrix(ROWS, 64, 1);
    let mut to = vec![f16::from_f32(99.0); ROWS * 64];
    let encode = |data: &[f16]| {
        let spec = tma::TensorMapSpec {
            address: data.as_ptr() as u64,
            element: tma::Element::F16,
            dims: vec![64, 1 << 30, 1, 1 << 31, 1 << 31],
            strides_bytes: vec![128, 16, 128, (1 << 34) - 128],
            box_dims: vec![64, 8, 1, 1, 1],
            swizzle_bytes: 128,
        };
        spec.encode().expect("a map that the driver would take")
    };
    let (map_from, map_to) = (encode(&from), encode(&to));
    let address = |map: &tma::TensorMap| std::ptr::from_ref(map) as u64;
    let (map_from, map_to) = (address(&map_from), address(&map_to));
    let place = [0, (1 << 30) - LENGTH, 0, FIRST + LENGTH, 1 << 30];
    let stats = try_launch(32, || {
        init(1, 1);
        if thread::thread_idx_x() == 0 {
            bar(0).arrive_expect_tx(8 * 128);
            // SAFETY: the matrices and the maps outlive the launch.
            unsafe { tma::load_5d(A, map_from, place, bar(0)) };
            // Hazard: the copy may not have landed.
            bar(0).wait(0);
            assert_eq!(tile(0).read(A / 2), from[FIRST as usize * 64]);
            assert_eq!(tile(0).read(A / 2 + LENGTH * 64), f16::ZERO);
            // SAFETY: as above.
            unsafe { tma::store_5d_if(true, map_to, place, A) };
            tma::commit_group();
            tma::wait_group_read::<0>();
        }
    })
    .unwrap_or_else(|fault| panic!("{fault}"));
    let bytes = u64::from(LENGTH) * 128;
    assert_eq!((stats.global_bytes_read, stats.global_bytes_written), (bytes, bytes));
    // SAFETY: `to` was written through its address; nothing else holds it.
    let to = unsafe { std::slice::from_raw_parts_mut(to.as_mut_ptr(), to.len()) };
    for (index, (&to, &from)) in to.iter().zip(&from).enumerate() {
        let inside = (FIRST..FIRST + LENGTH).contains(&(index as u32 / 64));
        assert_eq!(to, if inside { from } else { f16::from_f32(99.0) }, "{index}");
    }
}

/// When the consumer of a ring gives a stage back.
#[derive(Clone, Copy, PartialEq)]
enum Release {
    AfterProduct,
    BeforeProduct,
    Never,
}

/// A producer warp and a consumer warpgroup over two stages; `release` says when the consumer
/// gives stages back, `wait` whether it waits for them.
fn ring(release: Release, wait: bool) -> impl Fn() + Sync {
    let b = matrix(128, 64, 2);
    let a = matrix(64, 64, 1);
    move || {
        let (map_a, map_b) = (Map::new(&a, 64, 64, 64), Map::new(&b, 128, 64, 128));
        let (full, empty) = (|i| bar(1 + i), |i| bar(3 + i));
        init(5, 1);
        let stage = |i: u32| B + i * 128 * 128;
        if warpgroup::id() == 1 {
            if warpgroup::thread_id() == 0 {
                load(&map_a, A, 64, 64, bar(0));
                for t in 0..5u32 {
                    if release != Release::Never {
                        // Hazard: the stage may still be read.
                        empty(t % 2).wait((t / 2 % 2) ^ 1);
                    } else if t >= 2 {
                        // Hazard: only that the copy before has landed.
                        full(t % 2).wait((t / 2 % 2) ^ 1);
                    }
                    load(&map_b, stage(t % 2), 128, 64, full(t % 2));
                }
            }
            // The map is on this thread's stack: stay until the copies have landed.
            barrier::sync(Barrier::Done, 256);
            return;
        }
        // Hazard: A may not have landed.
        bar(0).wait(0);
        for t in 0..5u32 {
            if wait {
                // Hazard: the stage may not have landed.
                full(t % 2).wait(t / 2 % 2);
            }
            if release == Release::BeforeProduct {
                // Hazard: all must have seen the phase.
                barrier::sync(Barrier::Order, 128);
                if warpgroup::thread_id() == 0 {
                    empty(t % 2).arrive();
                }
            }
            let mut s = Accumulator::<16>::zero();
            // SAFETY: the whole warpgroup is here.
            unsafe {
                SharedProduct::<4>::product_shared::<f16, { 64 * 128 }, { 128 * 128 }>(
                    &mut s,
                    Descriptor::k_major(A),
                    Descriptor::k_major(stage(t % 2)),
                );
            }
            s.wait_group::<0>();
            let (row, column) = place(3, 1);
            let expected = dot(&a[row * 64..][..64], |k| b[column * 64 + k]);
            assert_eq!(s.values()[3][1], expected);
            if release == Release::AfterProduct && warpgroup::thread_id() == 0 {
                empty(t % 2).arrive();
            }
        }
        barrier::sync(Barrier::Done, 256);
    }
}

#[test]
fn a_ring_of_stages_works() {
    for seed in SEEDS {
        try_launch_with(&Options::seeded(seed), 256, ring(Release::AfterProduct, true))
            .unwrap_or_else(|fault| panic!("{fault}"));
    }
}

#[test]
fn refilling_a_stage_that_is_still_read_is_a_race() {
    let kind = fault(256, ring(Release::BeforeProduct, true));
    let FaultKind::Race { what: "write", this, other_what: "read", other, .. } = kind else {
        panic!("{kind}")
    };
    assert_eq!(this.to_string().split(" at ").next(), Some("a bulk load"));
    assert_eq!(other.to_string().split(" at ").next(), Some("wgmma of warpgroup 0"));
}

#[test]
fn refilling_a_stage_that_was_not_released_may_pass_a_phase_by() {
    let kind = fault(256, ring(Release::Never, true));
    let FaultKind::PhaseMissed { address: 98312, phase: 1, this, arrival, .. } = kind else {
        panic!("{kind}")
    };
    assert!(this.to_string().starts_with("thread 0 at simt/tests/hopper.rs"), "{kind}");
    assert!(arrival.to_string().starts_with("thread 128 at simt/tests/hopper.rs"), "{kind}");
}

/// Two warps wait for phases that a third one announces after one thread of the two has
/// arrived; `gather` says whether the two meet between.
fn two_waiting_warps(gather: bool) -> impl Fn() + Sync {
    move || {
        init(2, 1);
        let (full, empty) = (bar(0), bar(1));
        for t in 0..3 {
            if warp::warp_id() == 2 {
                if warp::lane_id() == 0 {
                    empty.wait((t % 2) ^ 1);
                    full.arrive();
                }
                continue;
            }
            full.wait(t % 2);
            if gather {
                barrier::sync(Barrier::Order, 64);
            }
            if thread::thread_idx_x() == 0 {
                empty.arrive();
            }
        }
    }
}

#[test]
fn a_phase_must_not_pass_a_warp_by() {
    for seed in SEEDS {
        try_launch_with(&Options::seeded(seed), 96, two_waiting_warps(true))
            .unwrap_or_else(|fault| panic!("{fault}"));
    }
    // Each warp sees every phase here. On a GPU the second one may be late.
    let kind = fault(96, two_waiting_warps(false));
    let FaultKind::PhaseMissed { address: 98304, phase: 1, this, arrival, cause: Some(cause) } =
        kind
    else {
        panic!("{kind}")
    };
    // Thread 64 announces the phase when it has been let go by thread 0, which was too early.
    assert_eq!((this.lane, arrival.lane, cause.lane), (1, 64, 0), "{kind}");
}

#[test]
fn a_seed_finds_the_warp_that_comes_too_late_without_the_check_and_repeats_it() {
    let checks = Checks { missed_phases: false, ..Checks::default() };
    let run = |seed| {
        let options = Options { seed, checks, ..Options::default() };
        try_launch_with(&options, 96, two_waiting_warps(false))
    };
    // In order, every warp sees every phase.
    assert!(run(0).is_ok());
    let found = (1..200).find_map(|seed| run(seed).err()).expect("some seed lets a warp be late");
    let FaultKind::Divergence(text) = &found.kind else { panic!("{found}") };
    assert!(text.contains("wait for parity"), "{text}");
    assert!(found.to_string().ends_with(&format!("(seed {})", found.seed)), "{found}");
    assert_eq!(run(found.seed).expect_err("the same seed, the same run"), found);
}

/// A consumer that reads only every second tile, and gives back the others with or without
/// waiting for them.
fn every_second_tile(wait: bool) -> impl Fn() + Sync {
    let data = matrix(8, 64, 1);
    move || {
        let map = Map::new(&data, 8, 64, 8);
        init(4, 1);
        let (full, empty) = (|i| bar(i), |i| bar(2 + i));
        if thread::thread_idx_x() == 0 {
            for t in 0..6u32 {
                // Hazard: the stage may still be read.
                empty(t % 2).wait((t / 2 % 2) ^ 1);
                load(&map, t % 2 * 1024, 8, 64, full(t % 2));
            }
        }
        if thread::thread_idx_x() == 32 {
            for t in 0..6u32 {
                if wait || t % 3 == 0 {
                    // Hazard: the tile may not have landed.
                    full(t % 2).wait(t / 2 % 2);
                }
                if t % 3 == 0 {
                    assert_eq!(tile(t % 2 * 1024).read(5), data[5]);
                }
                empty(t % 2).arrive();
            }
        }
        // The map is on the stack of the thread that loads.
        thread::sync_threads();
    }
}

#[test]
fn a_stage_given_back_without_a_wait_is_found_whatever_the_order() {
    for seed in SEEDS {
        let options = Options::seeded(seed);
        try_launch_with(&options, 64, every_second_tile(true))
            .unwrap_or_else(|fault| panic!("{fault}"));
        let kind = try_launch_with(&options, 64, every_second_tile(false))
            .expect_err("the planted fault is found")
            .kind;
        assert!(
            matches!(
                kind,
                FaultKind::Race { .. }
                    | FaultKind::PhaseUnknown { .. }
                    | FaultKind::PhaseMissed { .. }
                    | FaultKind::ArrivalUnknown { .. }
            ),
            "{kind}"
        );
    }
}

#[test]
fn a_wait_must_know_the_phase_before_to_be_complete() {
    let kernel = |wait: bool| {
        move || {
            init(2, 1);
            let t = thread::thread_idx_x();
            if t == 0 {
                bar(0).arrive();
                // Hazard: phase 1 comes after thread 32 has seen phase 0.
                bar(1).wait(0);
                bar(0).arrive();
            } else if t == 32 {
                if wait {
                    bar(0).wait(0);
                }
                bar(1).arrive();
                bar(0).wait(1);
            }
        }
    };
    try_launch(64, kernel(true)).unwrap_or_else(|fault| panic!("{fault}"));
    let kind = fault(64, kernel(false));
    let FaultKind::PhaseUnknown { address: BARRIERS, phase: 1, this } = kind else {
        panic!("{kind}")
    };
    assert_eq!(this.lane, 32, "{kind}");
}

#[test]
fn an_arrival_must_know_the_phase_before_to_be_complete() {
    // Two arrivals a phase; a thread that arrives twice without waiting takes the other's place.
    let kernel = |wait: bool| {
        move || {
            init(1, 2);
            let t = thread::thread_idx_x();
            if t % 32 == 0 {
                bar(0).arrive();
                if wait {
                    bar(0).wait(0);
                }
                bar(0).arrive();
                bar(0).wait(1);
            }
        }
    };
    for seed in SEEDS {
        try_launch_with(&Options::seeded(seed), 64, kernel(true))
            .unwrap_or_else(|fault| panic!("{fault}"));
    }
    // Thread 32 comes after thread 0 has arrived once and waits: its second arrival is in phase 1.
    let kind = fault(64, move || {
        init(2, 2);
        let t = thread::thread_idx_x();
        if t == 0 {
            bar(0).arrive();
        } else if t == 32 {
            bar(0).arrive();
            bar(0).arrive();
        }
    });
    let FaultKind::ArrivalUnknown { address: BARRIERS, phase: 1, this } = kind else {
        panic!("{kind}")
    };
    assert_eq!(this.lane, 32, "{kind}");
    assert!(try_launch(64, kernel(false)).is_err());
}

#[test]
fn reading_a_stage_that_was_not_waited_for_is_a_race() {
    let kind = fault(256, ring(Release::AfterProduct, false));
    assert!(
        matches!(kind, FaultKind::Race { what: "read", .. } | FaultKind::Uninitialised { .. }),
        "{kind}"
    );
    assert!(kind.to_string().contains("wgmma of warpgroup 0"), "{kind}");
}

#[test]
fn a_phase_that_is_asked_for_is_acquired_if_the_answer_is_yes() {
    let data = matrix(8, 64, 1);
    // Warp 0 asks; warp 1 copies, and then lets it go on.
    let kernel = |heed: bool| {
        let data = data.clone();
        move || {
            let map = Map::new(&data, 8, 64, 8);
            init(1, 1);
            if thread::thread_idx_x() == 32 {
                load(&map, A, 8, 64, bar(0));
            }
            if thread::thread_idx_x() == 0 {
                let is_there = bar(0).is_complete(0);
                if heed && !is_there {
                    // Hazard: the copy has not landed yet.
                    bar(0).wait(0);
                }
                assert_eq!(tile(0).read(0), data[0]);
            }
            barrier::sync(Barrier::Done, 64);
        }
    };
    for seed in 0..16 {
        try_launch_with(&Options::seeded(seed), 64, kernel(true))
            .unwrap_or_else(|fault| panic!("seed {seed}: {fault}"));
    }
    assert!(
        (0..16).any(|seed| try_launch_with(&Options::seeded(seed), 64, kernel(false)).is_err())
    );
}

/// One copy of 8 rows with the announced bytes and the parity given.
fn one_copy(bytes: u32, parity: u32, fence: bool) -> impl Fn() + Sync {
    let data = matrix(8, 64, 1);
    move || {
        let map = Map::new(&data, 8, 64, 8);
        if thread::thread_idx_x() == 0 {
            bar(0).init(1);
            if fence {
                mbarrier::fence_init();
            }
            bar(0).arrive_expect_tx(bytes);
            // SAFETY: map and matrix live until the copy was waited for.
            unsafe { tma::load_4d(A, map.address(), [0; 4], bar(0)) };
            bar(0).wait(parity);
            assert_eq!(tile(0).read(0), data[0]);
        }
    }
}

#[test]
fn wrong_byte_counts_never_complete() {
    try_launch(32, one_copy(1024, 0, true)).unwrap_or_else(|fault| panic!("{fault}"));
    let kind = fault(32, one_copy(1040, 0, true));
    let FaultKind::Divergence(text) = &kind else { panic!("{kind}") };
    assert!(text.contains("wait for parity 0") && text.contains("hopper.rs"), "{text}");
    assert!(text.contains("phase 0 lacks 0 of 1 arrivals and 16 bytes"), "{text}");
}

#[test]
fn the_wrong_parity_does_not_wait() {
    let kind = fault(32, one_copy(1024, 1, true));
    let FaultKind::PhaseMissed { address: 98304, phase: 0, this, .. } = kind else {
        panic!("{kind}")
    };
    assert!(this.to_string().starts_with("thread 0 at simt/tests/hopper.rs"), "{kind}");
}

#[test]
fn a_barrier_without_its_fence_is_not_for_copies() {
    let kind = fault(32, one_copy(1024, 0, false));
    assert!(kind.to_string().contains("fence_init"), "{kind}");
}

#[test]
fn a_barrier_must_be_initialised_before_others_use_it() {
    let kind = fault(64, || {
        if thread::thread_idx_x() == 0 {
            bar(0).init(1);
        }
        if thread::thread_idx_x() == 40 {
            bar(0).arrive();
        }
    });
    assert!(kind.to_string().contains("initialised by thread 0, with no barrier"), "{kind}");
    let kind = fault(32, || bar(0).wait(0));
    assert!(kind.to_string().contains("no mbarrier was initialised"), "{kind}");
    let kind = fault(32, || bar(0).init(33));
    assert!(kind.to_string().contains("33 arrivals"), "{kind}");
}

#[test]
fn too_many_arrivals_go_on_to_the_next_phase_and_missing_ones_are_reported() {
    let kind = fault(64, || {
        init(1, 3);
        if thread::thread_idx_x() % 32 == 0 {
            bar(0).arrive();
        }
        // Hazard: none; this is the deadlock.
        bar(0).wait(0);
    });
    assert!(kind.to_string().contains("phase 0 lacks 1 of 3 arrivals and 0 bytes"), "{kind}");
}

#[test]
fn an_arrival_releases_what_its_thread_wrote() {
    let kernel = |waits: bool| {
        move || {
            init(1, 1);
            let t = thread::thread_idx_x();
            if t == 0 {
                tile(0).write(5, f16::ONE);
                bar(0).arrive();
            } else if t == 32 {
                if waits {
                    // Hazard: thread 0 may not have written.
                    bar(0).wait(0);
                }
                let _ = tile(0).read(5);
            }
        }
    };
    try_launch(64, kernel(true)).unwrap_or_else(|fault| panic!("{fault}"));
    let kind = fault(64, kernel(false));
    assert!(matches!(kind, FaultKind::Race { what: "read", .. }), "{kind}");
}

/// A warpgroup writes A and B itself, multiplies and looks at the result.
fn own_operands(fence: bool, wait: bool, overwrite: bool) -> impl Fn() + Sync {
    move || {
        let t = thread::thread_idx_x();
        for i in 0..64 {
            tile(A).write(t * 64 + i, f16::ONE);
            tile(B).write(t * 64 + i, f16::ONE);
        }
        if fence {
            mbarrier::fence_proxy_async();
        }
        // Hazard: all threads' writes are multiplied.
        thread::sync_threads();
        let mut s = Accumulator::<16>::zero();
        // SAFETY: the whole warpgroup is here; what is overwritten is what is tested.
        unsafe {
            SharedProduct::<4>::product_shared::<f16, { 64 * 128 }, { 128 * 128 }>(
                &mut s,
                Descriptor::k_major(A),
                Descriptor::k_major(B),
            );
        }
        if overwrite {
            // Hazard: none but the planted one.
            barrier::sync(Barrier::Order, 128);
            tile(B).write(t, f16::ZERO);
        }
        if wait {
            s.wait_group::<0>();
        }
        assert_eq!(s.values()[0][0], 64.0);
        s.wait_group::<0>();
    }
}

#[test]
fn ordinary_writes_need_the_proxy_fence_before_wgmma() {
    try_launch(128, own_operands(true, true, false)).unwrap_or_else(|fault| panic!("{fault}"));
    let kind = fault(128, own_operands(false, true, false));
    let FaultKind::ProxyFence { this, writer, .. } = kind else { panic!("{kind}") };
    assert!(this.to_string().starts_with("wgmma of warpgroup 0 at"), "{this}");
    assert!(writer.to_string().starts_with("thread 0 at"), "{writer}");
}

#[test]
fn an_accumulator_in_flight_may_not_be_looked_at() {
    let line = line!();
    let kind = fault(128, own_operands(true, false, false));
    let FaultKind::AccumulatorInFlight { this } = kind else { panic!("{kind}") };
    let at = this.location.expect("a site in this file");
    assert!(at.file().ends_with("hopper.rs") && at.line() < line, "{this}");
}

#[test]
fn overwriting_an_operand_in_flight_is_a_race() {
    let kind = fault(128, own_operands(true, true, true));
    let FaultKind::Race { what: "write", other_what: "read", other, .. } = kind else {
        panic!("{kind}")
    };
    assert!(other.to_string().starts_with("wgmma of warpgroup 0"), "{other}");
}

#[test]
fn wgmma_needs_its_whole_warpgroup() {
    let product = || {
        let mut o = Accumulator::<8>::zero();
        // SAFETY: nothing is read before the fault.
        unsafe { o.product_registers::<f16>(&[[0; 4]; 8], Descriptor::n_major(B, 0)) };
        o.wait_group::<0>();
    };
    let kind = fault(64, product);
    assert!(kind.to_string().contains("warpgroup of 64 threads"), "{kind}");
    let kind = fault(128, move || {
        if thread::thread_idx_x() < 96 {
            product();
        }
    });
    assert!(kind.to_string().contains("not all of their warpgroup asked for"), "{kind}");
}

#[test]
fn a_proxy_fence_after_the_barrier_is_too_late() {
    let out = matrix(8, 64, 1);
    let kernel = |early: bool| {
        let out = &out;
        move || {
            let map = Map::new(out, 8, 64, 8);
            let t = thread::thread_idx_x();
            tile(A).write(2 * t, f16::ONE);
            tile(A).write(2 * t + 1, f16::ONE);
            if early {
                mbarrier::fence_proxy_async();
            }
            // Hazard: the copy reads what all threads have written.
            thread::sync_threads();
            if !early {
                mbarrier::fence_proxy_async();
            }
            // Thread 0 comes last, so that every fence has been called by then.
            warp::sync_warp(warp::FULL_MASK);
            if t == 0 {
                // SAFETY: the matrix outlives the launch.
                unsafe { tma::store_4d(map.address(), [0; 4], A) };
                tma::commit_group();
                tma::wait_group_read::<0>();
            }
        }
    };
    try_launch(256, kernel(true)).unwrap_or_else(|fault| panic!("{fault}"));
    let kind = fault(256, kernel(false));
    let FaultKind::ProxyFence { writer, .. } = kind else { panic!("{kind}") };
    assert!(writer.lane >= 32, "{kind}");
}

#[test]
#[expect(clippy::if_same_then_else, reason = "the waits differ by their place")]
fn the_lanes_of_a_warp_wait_for_products_together() {
    let kernel = |by_lane: bool| {
        move || {
            let t = thread::thread_idx_x();
            let mut o = Accumulator::<8>::zero();
            for i in 0..128 {
                tile(B).write(t * 128 + i, f16::ONE);
            }
            mbarrier::fence_proxy_async();
            // Hazard: all threads' writes are multiplied.
            thread::sync_threads();
            // SAFETY: the whole warpgroup is here, and nothing is overwritten.
            unsafe { o.product_registers::<f16>(&[[0; 4]; 8], Descriptor::n_major(B, 0)) };
            // Warps may take different arms, lanes of one may not.
            if (if by_lane { t } else { t / 32 }) % 2 == 0 {
                o.wait_group::<0>();
            } else {
                o.wait_group::<0>();
            }
        }
    };
    try_launch(128, kernel(false)).unwrap_or_else(|fault| panic!("{fault}"));
    let kind = fault(128, kernel(true));
    let FaultKind::Divergence(text) = &kind else { panic!("{kind}") };
    assert!(text.contains("wait_group"), "{text}");
}

/// Warpgroup 0 gives registers back, the others take them.
#[expect(clippy::if_same_then_else, reason = "the calls differ by their place")]
fn registers(gives: bool, by_warp: bool) -> impl Fn() + Sync {
    move || {
        if warpgroup::id() == 0 {
            if gives {
                if by_warp && warp::warp_id() == 1 {
                    warpgroup::decrease_registers::<40>();
                } else {
                    warpgroup::decrease_registers::<40>();
                }
            }
        } else {
            warpgroup::increase_registers::<232>();
        }
    }
}

#[test]
fn registers_that_nobody_gives_back_are_waited_for_in_vain() {
    assert_eq!(warpgroup::registers_at_launch(384), 168);
    assert!(warpgroup::registers_suffice(&[40, 232, 232]));
    assert!(!warpgroup::registers_suffice(&[168, 232, 232]));
    assert!(!warpgroup::registers_suffice(&[32, 160, 160, 168]));
    for seed in SEEDS {
        let options = Options::seeded(seed);
        try_launch_with(&options, 384, registers(true, false))
            .unwrap_or_else(|fault| panic!("{fault}"));
        let kind = try_launch_with(&options, 384, registers(false, false))
            .expect_err("the planted fault is found")
            .kind;
        let FaultKind::Divergence(text) = &kind else { panic!("{kind}") };
        assert!(text.contains("for 2048 registers a warp, where block 0 has 0 left"), "{text}");
    }
}

#[test]
fn a_change_of_registers_is_the_whole_warpgroups() {
    let kind = fault(384, registers(true, true));
    assert!(matches!(kind, FaultKind::Divergence(_)), "{kind}");
    let kind = fault(384, || {
        if thread::thread_idx_x() < 64 {
            warpgroup::decrease_registers::<40>();
        }
    });
    assert!(kind.to_string().contains("not all warps of the warpgroup"), "{kind}");
    let kind = fault(384, warpgroup::increase_registers::<40>);
    assert!(
        kind.to_string().contains("increase_registers to 40, where each thread has 168"),
        "{kind}"
    );
    let kind = fault(384, warpgroup::decrease_registers::<232>);
    assert!(kind.to_string().contains("decrease_registers to 232"), "{kind}");
}

#[test]
fn stores_read_fenced_data_and_must_be_waited_for() {
    let kernel = |fence: bool, wait: bool, overwrite: bool| {
        let out = matrix(8, 64, 1);
        move || {
            let map = Map::new(&out, 8, 64, 8);
            if thread::thread_idx_x() == 0 {
                (0..512).for_each(|i| tile(A).write(i, f16::ONE));
                if fence {
                    mbarrier::fence_proxy_async();
                }
                // SAFETY: the matrix outlives the launch.
                unsafe { tma::store_4d(map.address(), [0; 4], A) };
                tma::commit_group();
                if overwrite {
                    tile(A).write(7, f16::ZERO);
                }
                if wait {
                    tma::wait_group_read::<0>();
                }
                tile(A).write(7, f16::ZERO);
            }
        }
    };
    try_launch(32, kernel(true, true, false)).unwrap_or_else(|fault| panic!("{fault}"));
    assert!(matches!(fault(32, kernel(false, true, false)), FaultKind::ProxyFence { .. }));
    let kind = fault(32, kernel(true, true, true));
    assert!(kind.to_string().contains("a bulk store of warpgroup 0"), "{kind}");
}

#[test]
fn copies_check_their_map_and_their_destination() {
    let data = matrix(8, 64, 1);
    let map = Map::new(&data, 8, 64, 8);
    let kernel = |to: u32, map: u64| {
        move || {
            init(1, 1);
            if thread::thread_idx_x() == 0 {
                // SAFETY: the map is readable memory; the rest is what is tested.
                unsafe { tma::load_4d(to, map, [0; 4], bar(0)) };
            }
        }
    };
    let kind = fault(32, kernel(A + 128, map.address()));
    assert!(matches!(kind, FaultKind::Misaligned { bytes: 1024, .. }), "{kind}");
    let kind = fault(32, kernel(SHARED_BYTES.next_multiple_of(1024), map.address()));
    assert!(matches!(kind, FaultKind::OutOfBounds { .. }), "{kind}");
    let none = Map(tma::TensorMap([0; 128]));
    let kind = fault(32, kernel(A, none.address()));
    assert!(kind.to_string().contains("not an encoded tensor map"), "{kind}");
}

#[test]
fn named_barriers_order_the_warps_that_use_them() {
    let kernel = |synchronised: bool| {
        move || {
            let t = thread::thread_idx_x();
            if t < 32 {
                tile(0).write(t, f16::ONE);
                barrier::arrive(Barrier::Order, 64);
            } else if t < 64 {
                if synchronised {
                    // Hazard: the first warp may not have written.
                    barrier::sync(Barrier::Order, 64);
                }
                let _ = tile(0).read(t - 32);
            }
        }
    };
    try_launch(96, kernel(true)).unwrap_or_else(|fault| panic!("{fault}"));
    let kind = fault(96, kernel(false));
    assert!(matches!(kind, FaultKind::Race { .. }), "{kind}");
}

#[test]
fn an_arrival_orders_nothing_that_comes_after_it() {
    let kernel = |late: bool| {
        move || {
            let t = thread::thread_idx_x();
            if t < 32 {
                if late {
                    barrier::arrive(Barrier::Order, 64);
                }
                tile(0).write(t, f16::ONE);
                if !late {
                    barrier::arrive(Barrier::Order, 64);
                }
            } else {
                // Hazard: the first warp may not have written.
                barrier::sync(Barrier::Order, 64);
                let _ = tile(0).read(t - 32);
            }
        }
    };
    try_launch(64, kernel(false)).unwrap_or_else(|fault| panic!("{fault}"));
    let kind = fault(64, kernel(true));
    assert!(matches!(kind, FaultKind::Race { .. }), "{kind}");
}
