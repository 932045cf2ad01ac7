//! What each primitive computes.

mod common;

use common::{launch, view, view_mut};
use half::{bf16, f16};
use simt::{
    Dim3, atomic,
    emulator::{self, Launch},
    math,
    scalar::Scalar,
    shared_array, thread, warp,
};

#[test]
fn indices_cover_the_grid_in_three_dimensions() {
    let (grid, block) = (Dim3::new(3, 2, 2), Dim3::new(4, 3, 2));
    let mut seen = vec![0u32; (grid.count() * block.count()) as usize];
    let out = view_mut(&mut seen);
    emulator::launch(Launch { grid, block, cluster: 1, shared_bytes: 0 }, &|| {
        assert_eq!((thread::grid_dim_x(), thread::grid_dim_y(), thread::grid_dim_z()), (3, 2, 2));
        assert_eq!(
            (thread::block_dim_x(), thread::block_dim_y(), thread::block_dim_z()),
            (4, 3, 2)
        );
        let b = thread::block_idx_x() + 3 * (thread::block_idx_y() + 2 * thread::block_idx_z());
        let t = thread::thread_idx_x() + 4 * (thread::thread_idx_y() + 3 * thread::thread_idx_z());
        assert_eq!(t, thread::index_in_block());
        atomic::add_global_u32(out, u64::from(b * 24 + t), 1);
    })
    .expect("the kernel is right");
    assert!(seen.iter().all(|&n| n == 1));
}

/// Runs one warp; each lane's result.
fn per_lane(f: impl Fn(u32) -> f32 + Sync) -> Vec<f32> {
    let mut results = vec![f32::NAN; 32];
    let out = view_mut(&mut results);
    launch(1, 32, || {
        let lane = warp::lane_id();
        out.write(lane.into(), f(lane));
    });
    results
}

fn expect(results: &[f32], f: impl Fn(usize) -> f32) {
    let expected: Vec<f32> = (0..32).map(f).collect();
    assert_eq!(results, expected);
}

#[test]
fn shuffles_move_values_between_lanes() {
    expect(&per_lane(|l| warp::shuffle_xor_f32(l as f32, 5)), |l| (l ^ 5) as f32);
    expect(&per_lane(|l| warp::shuffle_idx_f32(l as f32, 7)), |_| 7.0);
    expect(
        &per_lane(|l| warp::shuffle_down_f32(l as f32, 3)),
        |l| if l < 29 { l + 3 } else { l } as f32,
    );
    expect(
        &per_lane(|l| warp::shuffle_up_f32(l as f32, 3)),
        |l| if l >= 3 { l - 3 } else { l } as f32,
    );
    expect(&per_lane(|l| warp::shuffle_xor(l * 10, 1) as f32), |l| ((l ^ 1) * 10) as f32);
}

#[test]
fn votes_see_every_lane() {
    expect(&per_lane(|l| (warp::ballot(l % 2 == 0) == 0x5555_5555).into()), |_| 1.0);
    expect(&per_lane(|l| warp::any(l == 31).into()), |_| 1.0);
    expect(&per_lane(|_| warp::any(false).into()), |_| 0.0);
    expect(&per_lane(|l| warp::all(l < 32).into()), |_| 1.0);
    expect(&per_lane(|l| warp::all(l < 31).into()), |_| 0.0);
}

#[test]
fn reductions_stay_in_their_group() {
    expect(&per_lane(|l| warp::reduce_add::<32>(l as f32)), |_| 496.0);
    expect(&per_lane(|l| warp::reduce_max::<32>(-(l as f32))), |_| 0.0);
    expect(&per_lane(|l| warp::reduce_add::<4>(l as f32)), |l| (l / 4 * 16 + 6) as f32);
    expect(&per_lane(|l| warp::reduce_max::<8>(l as f32)), |l| (l / 8 * 8 + 7) as f32);
    expect(&per_lane(|l| warp::reduce_max::<1>(l as f32)), |l| l as f32);
}

/// A reduction must round as the shuffles of a GPU do: by halves, not in sequence.
#[test]
fn reduction_rounds_like_its_shuffles() {
    let value = |l: u32| 1.0 / (l as f32 + 1.0);
    let shuffled = per_lane(|l| {
        let mut v = value(l);
        for distance in [16, 8, 4, 2, 1] {
            v += warp::shuffle_xor_f32(v, distance);
        }
        v
    });
    assert_eq!(per_lane(|l| warp::reduce_add::<32>(value(l))), shuffled);
}

#[test]
fn a_partial_warp_takes_part_with_the_lanes_it_has() {
    let mut results = vec![0.0f32; 40];
    let out = view_mut(&mut results);
    launch(1, 40, || {
        let sum = warp::reduce_add::<32>(1.0);
        out.write(thread::thread_idx_x().into(), sum);
    });
    assert_eq!((results[0], results[39]), (32.0, 8.0));
}

#[test]
fn static_arrays_of_one_place_are_one_and_of_two_places_two() {
    launch(2, 32, || {
        let t = thread::thread_idx_x();
        let (a, b) = (shared_array!(f32; 32), shared_array!(f16; 32));
        assert!(a.address() + 128 <= b.address() || b.address() + 64 <= a.address());
        a.write(t, 1.0);
        b.write(t, f16::ONE);
        // Hazard: lanes read what others wrote.
        thread::sync_threads();
        assert_eq!((a.read(31 - t), b.read(31 - t)), (1.0, f16::ONE));
    });
}

#[test]
fn shared_vectors_and_slices_address_the_same_elements() {
    launch(1, 1, || {
        let tile = shared_array!(f32; 16);
        for i in 0..16 {
            tile.write(i, i as f32);
        }
        let v = tile.slice(8, 8).read_as::<[u32; 4]>(4).map(f32::from_bits);
        assert_eq!(v, [12.0, 13.0, 14.0, 15.0]);
        tile.write_as::<[u32; 2]>(2, [100.0f32.to_bits(), 200.0f32.to_bits()]);
        assert_eq!((tile.read(2), tile.read(3)), (100.0, 200.0));
    });
}

#[test]
fn global_accesses_are_counted_in_bytes() {
    let input = [1.0f32; 64];
    let mut output = [f16::ZERO; 64];
    let (x, y) = (view(&input), view_mut(&mut output));
    let stats = launch(2, 32, || {
        let i = thread::index_1d().into();
        y.write(i, f16::from_f32(x.read(i)));
    });
    assert_eq!((stats.global_bytes_read, stats.global_bytes_written), (256, 128));
    assert!(output.iter().all(|&v| v == f16::ONE));
}

#[test]
fn atomics_on_global_memory_work_across_blocks() {
    let (mut sum, mut float, mut max, mut min) = ([0u32], [0.0f32], [0u32], [u32::MAX]);
    let (s, f, hi, lo) =
        (view_mut(&mut sum), view_mut(&mut float), view_mut(&mut max), view_mut(&mut min));
    launch(16, 64, || {
        let i = thread::index_1d();
        atomic::add_global_u32(s, 0, i);
        atomic::add_global_f32(f, 0, 0.5);
        atomic::max_global_u32(hi, 0, i);
        atomic::min_global_u32(lo, 0, i + 3);
    });
    assert_eq!((sum[0], float[0], max[0], min[0]), (1023 * 1024 / 2, 512.0, 1023, 3));
}

#[test]
fn increments_wrap_at_their_bound() {
    let (mut count, mut last) = ([0u32], [0u32]);
    let (c, l) = (view_mut(&mut count), view_mut(&mut last));
    // 1024 increments of a count from 0 to 99: ten times round, and 24.
    launch(16, 64, || {
        let old = atomic::increment_global_u32(c, 0, 99);
        atomic::max_global_u32(l, 0, old);
    });
    assert_eq!((count[0], last[0]), (24, 99));
}

#[test]
fn math_is_what_it_says() {
    assert_eq!(math::fma(3.0, 4.0, 5.0), 17.0);
    // Rounded once: the product alone would round to 1.
    let e = f32::EPSILON;
    assert_eq!(math::fma(1.0 + e, 1.0 - e, -1.0), -e * e);
    assert_eq!(math::exp2(f32::NEG_INFINITY), 0.0);
    assert_eq!(
        (math::exp2(3.0), math::log2(8.0), math::rcp(4.0), math::rsqrt(4.0)),
        (8.0, 3.0, 0.25, 0.5)
    );
    assert_eq!((math::max(1.0, f32::NAN), math::max(f32::NEG_INFINITY, -1.0)), (1.0, -1.0));
    assert_eq!(math::mul_hi(0x8000_0000, 6), 3);
}

#[test]
fn storage_types_round_to_nearest_even() {
    assert_eq!(<f16 as Scalar>::from_f32(1.0 + 1.0 / 2048.0).to_bits(), f16::ONE.to_bits());
    assert_eq!(<bf16 as Scalar>::from_f32(1.0 + 1.0 / 256.0).to_bits(), bf16::ONE.to_bits());
    assert_eq!(<bf16 as Scalar>::from_f32(1.0 + 3.0 / 256.0).to_bits(), bf16::ONE.to_bits() + 2);
    assert_eq!(Scalar::to_f32(bf16::from_bits(0x3fc0)), 1.5);
    assert!(Scalar::to_f32(<bf16 as Scalar>::from_f32(f32::NAN)).is_nan());
}
