//! Tensor cores, matrix loads, asynchronous copies, named barriers: what they compute and
//! what the emulator finds when they are used wrongly.

mod common;

use common::{fault, launch, view, view_mut};
use half::{bf16, f16};
use simt::{
    async_copy,
    barrier::{self, Named},
    emulator::FaultKind,
    layout::{Padded, Swizzled, TileLayout},
    matrix,
    mma::{self, Ampere, Multiply, TensorCore, Turing},
    shared::Shared,
    thread, warp,
};

fn smem(len: u32) -> Shared<u16> {
    // SAFETY: tests launch with 4096 bytes; what races is what is tested.
    unsafe { Shared::dynamic(0, len) }
}

/// Small integers, exact in every type.
fn element(seed: usize, row: usize, column: usize) -> f32 {
    ((row * 7 + column * 5 + row * column + seed) % 13) as f32 - 6.0
}

/// `C + A B` of 16 x 16, 16 x 8 and 16 x 8 by `multiply`, from fragments made by hand.
fn check_product(pack: fn(f32, f32) -> u32, multiply: fn(&mut [f32; 4], [u32; 4], [u32; 2])) {
    let mut result = vec![f32::NAN; 16 * 8];
    let out = view_mut(&mut result);
    launch(1, 32, || {
        let lane = warp::lane_id() as usize;
        let (g, t) = (lane / 4, lane % 4);
        let a = |row, column| pack(element(1, row, column), element(1, row, column + 1));
        let b = |row, column| pack(element(2, row, column), element(2, row + 1, column));
        let mut c = [
            element(3, g, 2 * t),
            element(3, g, 2 * t + 1),
            element(3, g + 8, 2 * t),
            element(3, g + 8, 2 * t + 1),
        ];
        multiply(
            &mut c,
            [a(g, 2 * t), a(g + 8, 2 * t), a(g, 2 * t + 8), a(g + 8, 2 * t + 8)],
            [b(2 * t, g), b(2 * t + 8, g)],
        );
        for (i, c) in c.into_iter().enumerate() {
            out.write(((g + i / 2 * 8) * 8 + 2 * t + i % 2) as u64, c);
        }
    });
    for (index, c) in result.into_iter().enumerate() {
        let (row, column) = (index / 8, index % 8);
        let sum: f32 = (0..16).map(|k| element(1, row, k) * element(2, k, column)).sum();
        assert_eq!(c, element(3, row, column) + sum, "row {row}, column {column}");
    }
}

#[test]
fn products_have_the_documented_fragments() {
    check_product(<Ampere as TensorCore<f16>>::pack, <Ampere as Multiply<f16>>::multiply);
    check_product(<Ampere as TensorCore<bf16>>::pack, <Ampere as Multiply<bf16>>::multiply);
    check_product(Turing::pack, Turing::multiply);
}

#[test]
fn tf32_has_one_element_a_register_and_ten_bits_of_fraction() {
    let mut result = vec![f32::NAN; 16 * 8];
    let out = view_mut(&mut result);
    launch(1, 32, || {
        let lane = warp::lane_id() as usize;
        let (g, t) = (lane / 4, lane % 4);
        // The lowest bit is beyond tf32 and must not count.
        let bits = |seed, row, column| element(seed, row, column).to_bits() | 1;
        let mut c = [0.0; 4];
        mma::m16n8k8_tf32(
            &mut c,
            [bits(1, g, t), bits(1, g + 8, t), bits(1, g, t + 4), bits(1, g + 8, t + 4)],
            [bits(2, t, g), bits(2, t + 4, g)],
        );
        for (i, c) in c.into_iter().enumerate() {
            out.write(((g + i / 2 * 8) * 8 + 2 * t + i % 2) as u64, c);
        }
    });
    for (index, c) in result.into_iter().enumerate() {
        let (row, column) = (index / 8, index % 8);
        let sum: f32 = (0..8).map(|k| element(1, row, k) * element(2, k, column)).sum();
        assert_eq!(c, sum, "row {row}, column {column}");
    }
    assert_eq!(f32::from_bits(mma::to_tf32(1.0 + 2f32.powi(-11))), 1.0 + 2f32.powi(-10));
    assert_eq!(f32::from_bits(mma::to_tf32(1.0 + 2f32.powi(-12))), 1.0);
}

/// One element of C that starts as `c`, after products of 8 equal terms `a * b` from `multiply`.
fn eight_terms(c: f32, a: f32, b: f32, multiply: impl Fn(&mut [f32; 4], f32, f32) + Sync) -> f32 {
    let mut result = vec![f32::NAN];
    let out = view_mut(&mut result);
    launch(1, 32, || {
        let mut sum = [c; 4];
        multiply(&mut sum, a, b);
        if warp::lane_id() == 0 {
            out.write(0, sum[0]);
        }
    });
    result[0]
}

#[test]
fn tf32_sums_are_cut_off_and_not_rounded() {
    let product = |c, a: f32, b: f32| {
        eight_terms(c, a, b, |c, a, b| {
            mma::m16n8k8_tf32(c, [a.to_bits(); 4], [b.to_bits(); 2]);
        })
    };
    let ulp = f32::EPSILON;
    // Each term is half a unit in the last place of C: there is one bit for that.
    assert_eq!(product(1.0, ulp, 0.5), 1.0 + 4.0 * ulp);
    // A quarter each: two units together, but each is cut off before.
    assert_eq!(product(1.0, ulp, 0.25), 1.0);
    assert_eq!(product(-1.0, -ulp, 0.25), -1.0);
    // 2 and 3 ulp, and from 2 on an f32 has every second ulp: rounding would give 4.
    assert_eq!(product(2.0 - ulp, ulp, 0.5), 2.0 + 2.0 * ulp);
    assert_eq!(product(0.0, 1.5, 2.0), 24.0);
    assert!(product(f32::INFINITY, 1.0, 1.0).is_infinite() && product(0.0, f32::NAN, 1.0).is_nan());
}

#[test]
fn three_products_of_tf32_are_as_good_as_f32() {
    let multiply = |c: &mut [f32; 4], a: f32, b: f32| {
        let operand = |x: f32| <Ampere as Multiply<f32>>::operand(x.to_bits());
        <Ampere as Multiply<f32>>::multiply(c, [operand(a); 4], [operand(b); 2]);
    };
    for i in 0..200u32 {
        let (a, b) = ((i as f32 * 0.37).sin() + 1.5, (i as f32 * 0.73).cos() + 1.3);
        let exact = 8.0 * f64::from(a) * f64::from(b);
        // Products of parts are lost up to 2^-22 of the whole, and a few bits are cut off.
        let error = (f64::from(eight_terms(0.0, a, b, multiply)) - exact).abs() / exact;
        assert!(error < 2f64.powi(-21), "8 * {a} * {b} is off by {error:e}");
    }
    assert!(eight_terms(0.0, f32::from_bits(0x7fff_ffff), 1.0, multiply).is_nan());
}

#[test]
fn packing_puts_the_first_value_low_and_rounds_to_even() {
    let bits = |x: f32| u32::from(f16::from_f32(x).to_bits());
    assert_eq!(<Ampere as TensorCore<f16>>::pack(1.5, -2.0), bits(1.5) | bits(-2.0) << 16);
    assert_eq!(Turing::pack(1.0 + 2f32.powi(-11), 0.0), bits(1.0));
    let one = u32::from(bf16::from_f32(1.0).to_bits());
    assert_eq!(<Ampere as TensorCore<bf16>>::pack(0.0, 1.0), one << 16);
}

/// Fills a 32 x 32 tile of layout `L` with `row * 32 + column`, and waits.
fn fill<L: TileLayout>(tile: Shared<u16>) {
    let row = warp::lane_id();
    for column in 0..32 {
        let index = L::index(row, column / 8 * 8) + column % 8;
        tile.write(index, (row * 32 + column) as u16);
    }
    // Hazard: rows are read by lanes that did not write them.
    warp::sync_warp(warp::FULL_MASK);
}

#[test]
fn matrix_loads_spread_rows_or_columns() {
    launch(1, 32, || {
        let tile = smem(Padded::<32>::len(32));
        fill::<Padded<32>>(tile);
        let lane = warp::lane_id();
        let (long, short) = (lane / 4, 2 * (lane % 4));
        let pair = |a: u32, b: u32| a | b << 16;
        // Matrices: rows 0-7 and 8-15 of columns 8-15, then of columns 16-23.
        let (row, column) = (lane % 16, 8 + lane / 16 * 8);
        let plain = matrix::load_x4(tile, Padded::<32>::index(row, column));
        let transposed = matrix::load_x4_transposed(tile, Padded::<32>::index(row, column));
        for m in 0..4 {
            let (r, c) = (m % 2 * 8, 8 + m / 2 * 8);
            let at = |row: u32, column: u32| (r + row) * 32 + c + column;
            assert_eq!(plain[m as usize], pair(at(long, short), at(long, short + 1)));
            assert_eq!(transposed[m as usize], pair(at(short, long), at(short + 1, long)));
        }
        // Two matrices: what lanes 16 to 31 give does not matter.
        let index = if lane < 16 { Padded::<32>::index(row, 8) } else { u32::MAX / 4 };
        assert_eq!(matrix::load_x2(tile, index), plain[..2]);
        assert_eq!(matrix::load_x2_transposed(tile, index), transposed[..2]);
    });
}

#[test]
fn matrix_stores_undo_matrix_loads() {
    launch(1, 32, || {
        let tile = smem(Padded::<32>::len(32));
        fill::<Padded<32>>(tile);
        let lane = warp::lane_id();
        let v = matrix::load_x4(tile, Padded::<32>::index(lane % 16, lane / 16 * 8));
        // Hazard: rows are overwritten by lanes that did not read them.
        warp::sync_warp(warp::FULL_MASK);
        matrix::store_x4(tile, Padded::<32>::index(16 + lane % 16, lane / 16 * 8), v);
        // Hazard: rows are read by lanes that did not write them.
        warp::sync_warp(warp::FULL_MASK);
        for column in 0..16 {
            let index = Padded::<32>::index(16 + lane % 16, column / 8 * 8) + column % 8;
            assert_eq!(u32::from(tile.read(index)), lane % 16 * 32 + column);
        }
    });
}

#[test]
fn bank_conflicts_of_matrix_loads_are_counted() {
    fn conflicts<L: TileLayout>() -> u64 {
        launch(1, 32, || {
            let tile = smem(L::len(32));
            fill::<L>(tile);
            let lane = warp::lane_id();
            let _ = matrix::load_x4(tile, L::index(lane % 16, lane / 16 * 8));
        })
        .bank_conflicts
    }
    /// Rows of 32 elements one after another: four chunks of eight rows in two groups.
    struct Plain;
    impl TileLayout for Plain {
        fn len(rows: u32) -> u32 {
            rows * 32
        }
        fn index(row: u32, column: u32) -> u32 {
            row * 32 + column
        }
        fn right(index: u32, columns: u32) -> u32 {
            index + columns
        }
        fn down(index: u32, rows: u32) -> u32 {
            index + rows * 32
        }
    }
    // Four matrices, each in four passes instead of one.
    assert_eq!(conflicts::<Plain>(), 4 * 3);
    assert_eq!(conflicts::<Padded<32>>(), 0);
    assert_eq!(conflicts::<Swizzled<32>>(), 0);
}

#[test]
fn a_matrix_load_needs_a_barrier_bounds_and_a_whole_warp() {
    let kind = fault(64, || {
        let tile = smem(64 * 8);
        tile.write_as::<[u32; 4]>(thread::thread_idx_x() * 8, [0; 4]);
        // Rows of the other warp, which may not have written yet.
        let row = (thread::thread_idx_x() + 32) % 64;
        let _ = matrix::load_x4(tile, row * 8);
    });
    assert!(matches!(kind, FaultKind::Race { .. } | FaultKind::Uninitialised { .. }), "{kind}");
    let kind = fault(32, || {
        let _ = matrix::load_x4(smem(31 * 8), warp::lane_id() * 8);
    });
    assert!(matches!(kind, FaultKind::OutOfBounds { index: 248, len: 248, .. }), "{kind}");
    let kind = fault(32, || {
        let _ = matrix::load_x4(smem(40 * 8), warp::lane_id() * 8 + 4);
    });
    assert!(matches!(kind, FaultKind::Misaligned { bytes: 16, .. }), "{kind}");
    let kind = fault(16, || {
        let mut c = [0.0; 4];
        mma::m16n8k16_f16(&mut c, [0; 4], [0; 2]);
    });
    let FaultKind::Misuse { message, .. } = &kind else { panic!("{kind}") };
    assert!(message.contains("16 lanes: it needs all 32"), "{message}");
}

/// One copy of 16 bytes a thread; thread `t` waits if `wait`, and reads what thread
/// `t ^ xor` copied, after a barrier if `barrier`.
fn copy_kernel(source: &[u16], wait: bool, barrier: bool, xor: u32) -> impl Fn() + Sync + '_ {
    move || {
        let t = thread::thread_idx_x();
        let tile = smem(64 * 8);
        async_copy::copy(tile, t * 8, view(source), u64::from(t) * 8);
        async_copy::commit();
        if wait {
            async_copy::wait::<0>();
        }
        if barrier {
            // Hazard: what other threads copied is read below.
            thread::sync_threads();
        }
        let from = t ^ xor;
        for e in 0..8 {
            assert_eq!(tile.read(from * 8 + e), (from * 8 + e) as u16);
        }
    }
}

#[test]
fn copies_land_at_the_wait_and_not_before() {
    let source: Vec<u16> = (0..512).collect();
    launch(3, 64, copy_kernel(&source, true, false, 0));
    launch(3, 64, copy_kernel(&source, true, true, 33));
    // Forgotten wait.
    let kind = fault(64, copy_kernel(&source, false, false, 0));
    let FaultKind::Pending { what: "read", this, copy, .. } = &kind else { panic!("{kind}") };
    assert_eq!((this.lane, copy.lane), (0, 0));
    assert!(kind.to_string().contains("must be waited for"), "{kind}");
    // A barrier does not make up for it.
    let kind = fault(64, copy_kernel(&source, false, true, 33));
    assert!(matches!(kind, FaultKind::Pending { .. }), "{kind}");
    // Forgotten barrier: the wait is for the thread's own copies only.
    let kind = fault(64, copy_kernel(&source, true, false, 1));
    assert!(matches!(kind, FaultKind::Pending { .. } | FaultKind::Uninitialised { .. }), "{kind}");
    let kind = fault(64, copy_kernel(&source, true, false, 32));
    assert!(matches!(kind, FaultKind::Uninitialised { .. } | FaultKind::Race { .. }), "{kind}");
    // What a fault left on its way does not disturb the next launch.
    launch(3, 64, copy_kernel(&source, true, true, 33));
}

#[test]
fn groups_land_in_order() {
    let source: Vec<u16> = (0..512).collect();
    let kernel = |read_second: bool| {
        let source = &source;
        move || {
            let tile = smem(16);
            async_copy::copy(tile, 0, view(source), 0);
            async_copy::commit();
            async_copy::copy(tile, 8, view(source), 8);
            async_copy::commit();
            async_copy::wait::<1>();
            assert_eq!(tile.read(7), 7);
            if read_second {
                let _ = tile.read(8);
            }
            async_copy::wait::<0>();
            assert_eq!(tile.read(8), 8);
        }
    };
    launch(1, 1, kernel(false));
    assert!(matches!(fault(1, kernel(true)), FaultKind::Pending { .. }));
}

#[test]
fn overwriting_a_copy_or_what_others_still_read_is_found() {
    let source: Vec<u16> = (0..512).collect();
    let kind = fault(1, || {
        let tile = smem(8);
        async_copy::copy(tile, 0, view(&source), 0);
        async_copy::commit();
        tile.write(3, 1);
        async_copy::wait::<0>();
    });
    assert!(matches!(kind, FaultKind::Pending { what: "write", .. }), "{kind}");
    let kind = fault(64, || {
        let t = thread::thread_idx_x();
        let tile = smem(64 * 8);
        tile.write_as::<[u32; 4]>(t * 8, [0; 4]);
        // Hazard: what other threads wrote is read below.
        thread::sync_threads();
        let _ = tile.read((t ^ 32) * 8);
        async_copy::copy(tile, t * 8, view(&source), 0);
        async_copy::commit();
        async_copy::wait::<0>();
    });
    assert!(matches!(kind, FaultKind::Race { .. } | FaultKind::Pending { .. }), "{kind}");
    let kind = fault(1, || {
        async_copy::copy(smem(8), 0, view(&source), 0);
        async_copy::commit();
    });
    let FaultKind::Misuse { message, .. } = &kind else { panic!("{kind}") };
    assert!(message.contains("on its way"), "{message}");
}

#[test]
fn copies_outside_of_the_source_are_zeros() {
    let source: Vec<u16> = (1..=8).collect();
    launch(1, 2, || {
        let t = thread::thread_idx_x();
        let tile = smem(16);
        async_copy::copy_or_zero(tile, t * 8, view(&source), u64::from(t) * 800, t == 0);
        async_copy::commit();
        async_copy::wait::<0>();
        assert_eq!(tile.read(t * 8 + 2), if t == 0 { 3 } else { 0 });
    });
    let kind = fault(1, || async_copy::copy(smem(8), 0, view(&source), 8));
    assert!(matches!(kind, FaultKind::OutOfBounds { space: "global", .. }), "{kind}");
}

#[test]
fn bank_conflicts_of_copies_are_counted() {
    let source: Vec<u16> = (0..2048).collect();
    let conflicts = |pitch: u32| {
        launch(1, 32, || {
            let lane = warp::lane_id();
            async_copy::copy(smem(2048), lane * pitch, view(&source), u64::from(lane) * 8);
            async_copy::commit();
            async_copy::wait::<0>();
        })
        .bank_conflicts
    };
    assert_eq!(conflicts(8), 0);
    // Chunks 128 bytes apart: four times eight passes instead of one.
    assert_eq!(conflicts(64), 4 * 7);
}

#[derive(Clone, Copy)]
enum Barrier {
    Full = 1,
    Empty = 2,
}

impl Named for Barrier {
    fn id(self) -> u32 {
        self as u32
    }
}

#[test]
fn named_barriers_hand_a_buffer_to_and_fro() {
    let kernel = |wait_empty: bool| {
        move || {
            let (lane, producer) = (warp::lane_id(), warp::warp_id() == 0);
            let tile = smem(32);
            for round in 0..3 {
                if producer {
                    if round > 0 && wait_empty {
                        // Hazard: the consumer may still read the round before.
                        barrier::sync(Barrier::Empty, 64);
                    }
                    tile.write(lane, round);
                    barrier::arrive(Barrier::Full, 64);
                } else {
                    // Hazard: the producer wrote what is read here.
                    barrier::sync(Barrier::Full, 64);
                    assert_eq!(tile.read(31 - lane), round);
                    if round < 2 && wait_empty {
                        barrier::arrive(Barrier::Empty, 64);
                    }
                }
            }
        }
    };
    launch(2, 64, kernel(true));
    // Without the way back the producer overwrites, or comes twice before anyone waits.
    let _ = fault(64, kernel(false));
}
