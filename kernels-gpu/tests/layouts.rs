//! Bank conflicts of the three layouts, counted on the same kernel.

mod common;

use std::ptr;

use common::{Case, blocks_of};
use half::f16;
use kernels_gpu::{
    args::AttentionArgs,
    forward::flash_mma::{self, BC, BR, THREADS},
};
use simt::{
    emulator::{self, Launch, Stats},
    layout::{CHUNK, Padded, Plain, Swizzled, TileLayout},
    mma::Ampere,
};

/// Runs flash_mma on tiles of layout L; the outputs are checked as well.
fn run<L: TileLayout, const D: usize, const COLUMN_TILES: usize>(case: Case) -> Stats {
    case.check::<f16>(|args| {
        let address = ptr::from_ref(args) as usize;
        // SAFETY: the arguments describe buffers that outlive the launch.
        let kernel = || unsafe {
            flash_mma::flash_mma::<f16, Ampere, L, D, COLUMN_TILES>(
                &*(address as *const AttentionArgs),
            );
        };
        let launch = Launch {
            grid: blocks_of(args, BR),
            block: THREADS.into(),
            cluster: 1,
            shared_bytes: L::len(BR + 2 * BC) * 2,
        };
        emulator::launch(launch, &kernel).unwrap_or_else(|fault| panic!("{fault}"))
    })
}

/// Matrices of 8 x 8 that a launch loads: of Q and K for S, of V for O, for each
/// warp and tile of keys.
const fn matrices(d: u64, seq_q: u64, seq_k: u64) -> u64 {
    let (warps, tiles) = (seq_q / 16, seq_k / BC as u64);
    let (q, k_or_v) = (16 * d / 64, BC as u64 * d / 64);
    warps * tiles * (q + 2 * k_or_v)
}

#[test]
fn plain_rows_take_eight_passes_and_the_others_one() {
    let (seq_q, seq_k) = (2 * BR, 3 * BC);
    let case = Case::new(seq_q, seq_k, 64);
    let all = matrices(64, seq_q.into(), seq_k.into());
    // A row of 64 elements is as wide as the banks: all eight rows begin in the same group.
    assert_eq!(run::<Plain<64>, 64, 8>(case).bank_conflicts, all * u64::from(CHUNK - 1));
    assert_eq!(run::<Padded<64>, 64, 8>(case).bank_conflicts, 0);
    assert_eq!(run::<Swizzled<64>, 64, 8>(case).bank_conflicts, 0);
    // A row of 32 is half as wide: two groups, four rows in each.
    let case = Case::new(seq_q, seq_k, 32);
    let all = matrices(32, seq_q.into(), seq_k.into());
    assert_eq!(run::<Plain<32>, 32, 4>(case).bank_conflicts, all * 3);
    assert_eq!(run::<Swizzled<32>, 32, 4>(case).bank_conflicts, 0);
}
