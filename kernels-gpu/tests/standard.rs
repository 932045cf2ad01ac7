//! Standard attention on the emulator, against attention computed in f64.

mod common;

use common::{Case, Features, feature_cases, run};
use half::{bf16, f16};
use kernels_gpu::{
    args::AttentionArgs,
    forward::standard::{self, softmax},
};
use simt::{Dim3, emulator::Stats, scalar::Scalar};

/// What each of the three kernels did.
struct Steps {
    scores: Stats,
    softmax: Stats,
    output: Stats,
}

fn launch<T: Scalar>(dtype: &str, args: &AttentionArgs) -> Steps {
    let heads = args.shape.batch * args.shape.heads;
    let (tile, threads, scores_shared, columns, output_shared, of_columns) = if dtype == "f32" {
        let (tile, threads) = (standard::TILED_TILE, standard::TILED_THREADS);
        (tile, threads, 0, tile, 0, String::new())
    } else {
        let columns = standard::output_columns(args.shape.head_dim);
        let shared = standard::output_shared_bytes(columns);
        let scores_shared = standard::SCORES_SHARED_BYTES;
        let (tile, threads) = (standard::MMA_TILE, standard::MMA_THREADS);
        (tile, threads, scores_shared, columns, shared, format!("_x{columns}"))
    };
    let row_threads = softmax::row_threads(args.shape.seq_k, T::BYTES);
    let of_row = if row_threads == softmax::THREADS { "block" } else { "warp" };
    let row_tiles = args.shape.seq_q.div_ceil(tile);
    let scores = run(
        &format!("standard_scores_{dtype}"),
        Dim3::new(args.shape.seq_k.div_ceil(tile) * heads, row_tiles, 1),
        threads.into(),
        scores_shared,
        args,
    );
    let softmax = run(
        &format!("standard_softmax_{dtype}_{of_row}"),
        (args.shape.seq_q.div_ceil(softmax::THREADS / row_threads) * heads).into(),
        softmax::THREADS.into(),
        softmax::shared_bytes(args.shape.seq_k, T::BYTES, row_threads),
        args,
    );
    let output = run(
        &format!("standard_output_{dtype}{of_columns}"),
        Dim3::new(row_tiles * heads, args.shape.head_dim.div_ceil(columns), 1),
        threads.into(),
        output_shared,
        args,
    );
    check_weights::<T>(args);
    Steps { scores, softmax, output }
}

/// Every weight was written, and those past the diagonal are 0. (Of packed sequences, weights past the
/// end of each are nobody's.)
fn check_weights<T: Scalar>(args: &AttentionArgs) {
    if common::constants().varlen != 0 {
        return;
    }
    let causal = common::constants().causal == 1;
    let len = (args.scratch.weights.bytes / u64::from(T::BYTES)) as usize;
    // SAFETY: the buffer is the test's, and the kernels are done.
    let weights =
        unsafe { std::slice::from_raw_parts(args.scratch.weights.address as *const T, len) };
    for (index, weight) in weights.iter().enumerate() {
        let (i, j) =
            (index as u32 / args.shape.seq_k % args.shape.seq_q, index as u32 % args.shape.seq_k);
        let hidden = causal && j + args.shape.seq_q > i + args.shape.seq_k;
        let weight = weight.to_f32();
        assert!(weight.is_finite() && weight >= 0.0, "weight {index} is {weight}");
        assert!(!hidden || weight == 0.0, "row {i} has {weight} for key {j}");
    }
}

fn check<T: Scalar>(dtype: &str, cases: &[Case]) {
    for case in cases {
        let case = Case { scores_stored: true, ..*case };
        case.check::<T>(|args| {
            let Steps { scores, softmax, output } = launch::<T>(dtype, args);
            let conflicts = [scores, softmax, output].map(|stats| stats.bank_conflicts);
            assert_eq!(conflicts, [0; 3], "{case:?}");
            scores
        });
    }
}

/// Shapes beside the tiles, and everything that hides or weighs keys. Rows of Nk = 136 and
/// 264 keys are multiples of 16 bytes, the others are not.
fn cases(d: u32) -> Vec<Case> {
    let plain = |q, k| Case::new(q, k, d);
    vec![
        plain(1, 1),
        plain(129, 136),
        plain(70, 127),
        Case { causal: true, ..plain(264, 264) },
        Case { causal: true, ..plain(131, 131) },
        // More rows than keys: the first rows see nothing, nor does their tile.
        Case { causal: true, ..plain(150, 9) },
        Case { padding: true, causal: true, heads: 2, interleaved: true, ..plain(40, 136) },
        Case { padding: true, ..plain(9, 45) },
        Case { dropout: 0.3, heads: 2, ..plain(21, 72) },
        Case { dropout: 0.3, padding: true, ..plain(6, 51) },
    ]
}

#[test]
fn standard_computes_attention() {
    check::<f32>("f32", &cases(64));
    // bf16 takes the same ways through memory; the library's `tests/edges.rs` has it on every edge.
    check::<f16>("f16", &cases(64));
}

#[test]
fn standard_has_the_features_of_models() {
    check::<f32>("f32", &feature_cases(32, 64, 64));
    check::<f16>("f16", &feature_cases(32, 128, 128));
    // Windows that begin beyond the first segment of a long row; aligned and not.
    for keys in [16_400, 16_407, 33_000] {
        let features = Features { left: Some(40), right: Some(1), ..Features::NONE };
        check::<f16>("f16", &[Case { features, ..Case::new(3, keys, 32) }]);
    }
}

#[test]
fn every_width_of_output_tiles_is_right() {
    for d in [32, 96, 128, 160, 256] {
        let cases = [
            Case { causal: true, heads: 2, interleaved: true, ..Case::new(130, 136, d) },
            Case::new(5, 131, d),
        ];
        check::<f16>("f16", &cases);
        check::<bf16>("bf16", &cases[..1]);
        check::<f32>("f32", &cases[1..]);
    }
}

/// The longest row of a warp; rows of a block, one segment and more; aligned and not.
#[test]
fn long_rows_are_right() {
    for keys in [4096, 4104, 4107, 16_400, 16_407] {
        let case = Case { causal: true, padding: keys % 8 == 0, ..Case::new(3, keys, 32) };
        check::<f16>("f16", &[case]);
    }
    let case = Case { dropout: 0.2, ..Case::new(2, 16_386, 32) };
    check::<bf16>("bf16", &[case]);
    check::<f32>("f32", &[Case::new(2, 9000, 32)]);
}

/// The rows of the softmax are read once and written once; hidden tiles are not computed, and
/// what lies past the diagonal is not read again.
#[test]
fn each_element_moves_once() {
    const N: u64 = 256;
    const TILE: u64 = standard::MMA_TILE as u64;
    let (d, bytes) = (64, 2);
    for causal in [false, true] {
        let case = Case { causal, scores_stored: true, ..Case::new(N as u32, N as u32, d) };
        case.check::<f16>(|args| {
            let Steps { scores, softmax, output } = launch::<f16>("f16", args);
            let tiles = if causal { 3 } else { 4 };
            let operands = 2 * TILE * u64::from(d) * bytes;
            assert_eq!(scores.global_bytes_read, tiles * operands);
            assert_eq!(scores.global_bytes_written, tiles * TILE * TILE * bytes);
            // Row i reads its i + 1 keys in chunks of 8.
            let chunks: u64 = (0..N).map(|i| if causal { i / 8 + 1 } else { N / 8 }).sum();
            assert_eq!(softmax.global_bytes_read, chunks * 16);
            assert_eq!(softmax.global_bytes_written, N * N * bytes + 4 * N);
            let value_tile = TILE * u64::from(d) * bytes;
            assert_eq!(output.global_bytes_read, tiles * (TILE * TILE * bytes + value_tile));
            scores
        });
    }
}
