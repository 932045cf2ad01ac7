//! Both rungs on the emulator, against attention computed directly in f64. The suites of
//! the library go over every kernel and edge; this one needs nothing but this crate.

use approx::assert_abs_diff_eq;
use kernels_gpu::{
    args::{AttentionArgs, Buffer, Scores, Scratch, Shape, Tensor, Tensors},
    constants::Constants,
    forward::{flash_tiled, naive},
};
use simt::{
    Dim3,
    emulator::{self, Launch, Options},
};

const BATCH: u32 = 2;
const HEADS: u32 = 2;
const SEQ_Q: u32 = 37;
const SEQ_K: u32 = 45;
const D: u32 = 64;

fn buffer<T>(data: &mut [T]) -> Buffer {
    Buffer { address: data.as_mut_ptr() as u64, bytes: size_of_val(data) as u64 }
}

fn tensor(data: &mut [f32], seq: u32) -> Tensor {
    let (n, d) = (u64::from(seq), u64::from(D));
    Tensor {
        buffer: buffer(data),
        stride_b: u64::from(HEADS) * n * d,
        stride_h: n * d,
        stride_n: d,
    }
}

fn run(
    symbol: &str,
    causal: bool,
    grid: Dim3,
    block: Dim3,
    shared_bytes: u32,
    args: &AttentionArgs,
) {
    let entry = kernels_gpu::find(symbol).expect("an entry of that name");
    let address = std::ptr::from_ref(args) as usize;
    // SAFETY: the arguments describe buffers that outlive the launch.
    let kernel = || unsafe { (entry.run)(address as *const _) };
    let constants = Constants { causal: causal.into(), ..Constants::default() };
    let options = Options { constants: constants.values(), ..Options::default() };
    let launch = Launch { grid, block, cluster: 1, shared_bytes };
    let stats = emulator::launch_with(launch, &options, &kernel);
    stats.unwrap_or_else(|fault| panic!("{symbol}: {fault}"));
}

/// Deterministic values in [-1, 1).
fn values(count: u32, seed: u32) -> Vec<f32> {
    let mut state = seed;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f32::from_bits(state >> 9 | 0x4000_0000) - 3.0
        })
        .collect()
}

/// O and LSE of one row, in f64.
fn reference(q: &[f32], k: &[f32], v: &[f32], i: u32, causal: bool) -> (Vec<f64>, f64) {
    let d = D as usize;
    let keys = if causal { (i + 1 + SEQ_K - SEQ_Q) as usize } else { SEQ_K as usize };
    let scores: Vec<f64> = (0..keys)
        .map(|j| {
            let dot: f64 = (0..d).map(|e| f64::from(q[e]) * f64::from(k[j * d + e])).sum();
            dot / f64::from(D).sqrt()
        })
        .collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
    let output = (0..d)
        .map(|e| (0..keys).map(|j| (scores[j] - max).exp() / sum * f64::from(v[j * d + e])).sum())
        .collect();
    (output, max + sum.ln())
}

fn check(causal: bool, launch: impl Fn(&AttentionArgs)) {
    let (mut q, mut k, mut v) = (
        values(BATCH * HEADS * SEQ_Q * D, 1),
        values(BATCH * HEADS * SEQ_K * D, 2),
        values(BATCH * HEADS * SEQ_K * D, 3),
    );
    let mut o = vec![f32::NAN; q.len()];
    let mut lse = vec![f32::NAN; (BATCH * HEADS * SEQ_Q) as usize];
    let mut weights = vec![f32::NAN; (BATCH * HEADS * SEQ_Q * SEQ_K) as usize];
    launch(&AttentionArgs {
        tensors: Tensors {
            q: tensor(&mut q, SEQ_Q),
            k: tensor(&mut k, SEQ_K),
            v: tensor(&mut v, SEQ_K),
            o: tensor(&mut o, SEQ_Q),
            lse: buffer(&mut lse),
        },
        scratch: Scratch { weights: buffer(&mut weights), ..Scratch::default() },
        shape: Shape { batch: BATCH, heads: HEADS, seq_q: SEQ_Q, seq_k: SEQ_K, ..Shape::default() },
        scores: Scores {
            scale_log2: std::f32::consts::LOG2_E / (D as f32).sqrt(),
            ..Scores::default()
        },
        ..AttentionArgs::default()
    });
    for bh in 0..(BATCH * HEADS) as usize {
        for i in 0..SEQ_Q {
            let row = bh * SEQ_Q as usize + i as usize;
            let (n, d) = (SEQ_K as usize, D as usize);
            let (output, expected_lse) = reference(
                &q[row * d..][..d],
                &k[bh * n * d..][..n * d],
                &v[bh * n * d..][..n * d],
                i,
                causal,
            );
            // f32 sums of 45 to 64 products of size 1: a few times 2^-24 each.
            assert_abs_diff_eq!(f64::from(lse[row]), expected_lse, epsilon = 3e-6);
            for e in 0..d {
                assert_abs_diff_eq!(f64::from(o[row * d + e]), output[e], epsilon = 3e-6);
            }
        }
    }
}

#[test]
fn naive_computes_attention() {
    for causal in [false, true] {
        check(causal, |args| {
            let tile = naive::SCORES_TILE;
            let heads = BATCH * HEADS;
            run(
                "naive_scores_f32_d64",
                causal,
                Dim3::new(SEQ_K.div_ceil(tile) * heads, SEQ_Q.div_ceil(tile), 1),
                Dim3::new(tile, tile, 1),
                0,
                args,
            );
            let rows = SEQ_Q.div_ceil(naive::SOFTMAX_ROWS);
            run(
                "naive_softmax_f32",
                causal,
                (rows * heads).into(),
                naive::SOFTMAX_THREADS.into(),
                0,
                args,
            );
            let blocks = (SEQ_Q * D).div_ceil(naive::OUTPUT_THREADS);
            run(
                "naive_output_f32_d64",
                causal,
                (blocks * heads).into(),
                naive::OUTPUT_THREADS.into(),
                0,
                args,
            );
        });
    }
}

#[test]
fn flash_tiled_computes_attention() {
    for causal in [false, true] {
        check(causal, |args| {
            let grid = (SEQ_Q.div_ceil(flash_tiled::BR) * HEADS * BATCH).into();
            let shared = flash_tiled::shared_bytes(D as usize);
            run("flash_tiled_f32_d64", causal, grid, flash_tiled::THREADS.into(), shared, args);
        });
    }
}
