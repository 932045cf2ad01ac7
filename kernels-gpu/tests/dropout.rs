//! Known answers of dropout. Kernels and their oracle share `dropout.rs`; here it is held
//! against numbers that were published.

use kernels_gpu::{args::DropoutArgs, parts::dropout};

/// The known answer of Philox 4x32-10 that comes with the paper's Random123 library, for a counter
/// and a key of digits of pi.
const SEED: u64 = 0x299f_31d0_a409_3822;
const J4: u32 = 0x243f_6a88;
const I: u32 = 0x85a3_08d3;
const H: u32 = 0x1319_8a2e;
const B: u32 = 0x0370_7344;
const DRAWS: [u32; 4] = [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1];

fn drops(seed: u64, threshold: u32) -> DropoutArgs {
    DropoutArgs { seed, threshold, rescale: 2.0 }
}

#[test]
fn a_weight_is_kept_by_the_published_draw_of_its_place() {
    assert_eq!(dropout::draws(SEED, B, H, I, J4), DRAWS);
    for (e, draw) in (0..).zip(DRAWS) {
        let j = 4 * J4 + e;
        let keeps = |threshold| dropout::keeps(&drops(SEED, threshold), B, H, I, j);
        assert!(keeps(draw) && !keeps(draw + 1), "key 4 j + {e}");
        let apply = |threshold| dropout::apply(&drops(SEED, threshold), (B, H, I, j), 3.0);
        assert_eq!((apply(draw), apply(draw + 1)), (6.0, 0.0));
    }
}

#[test]
fn each_of_seed_b_h_i_and_j_changes_the_mask() {
    const N: u32 = 64;
    type Place = (u64, u32, u32, u32, u32);
    let mask = |place: fn(u32, u32) -> Place| -> Vec<bool> {
        let places = (0..N).flat_map(|i| (0..N).map(move |j| place(i, j)));
        places.map(|(seed, b, h, i, j)| dropout::keeps(&drops(seed, 1 << 31), b, h, i, j)).collect()
    };
    let masks = [
        ("none", mask(|i, j| (7, 1, 2, i, j))),
        ("the seed's low half", mask(|i, j| (8, 1, 2, i, j))),
        ("the seed's high half", mask(|i, j| (7 + (1 << 40), 1, 2, i, j))),
        ("b", mask(|i, j| (7, 2, 2, i, j))),
        ("h", mask(|i, j| (7, 1, 3, i, j))),
        ("b and h exchanged", mask(|i, j| (7, 2, 1, i, j))),
        ("i", mask(|i, j| (7, 1, 2, i + 1, j))),
        ("j", mask(|i, j| (7, 1, 2, i, j + 1))),
        ("j by four", mask(|i, j| (7, 1, 2, i, j + 4))),
        ("i and j exchanged", mask(|i, j| (7, 1, 2, j, i))),
    ];
    for (index, (what, mask)) in masks.iter().enumerate() {
        for (other, other_mask) in &masks[..index] {
            let differ = mask.iter().zip(other_mask).filter(|(a, b)| a != b).count();
            // Half of 4096 draws, with a standard deviation of 32.
            assert!((1850..2250).contains(&differ), "{other} and {what}: {differ} differ");
        }
    }
}
