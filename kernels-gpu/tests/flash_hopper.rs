//! flash_hopper on the emulator, against attention computed directly in f64: tails,
//! causal, padding masks, dropout, strides, every head dim.

mod common;

use approx::abs_diff_eq;
use half::{bf16, f16};
use kernels_gpu::{
    args::{AttentionArgs, Buffer, DropoutArgs, Keys, Scores, Shape, Tensor, Tensors},
    constants::Constants,
    forward::flash_hopper::{self, HopperArgs, Tiles},
    parts::{dropout, queue::QUEUE_WORDS},
};
use simt::{
    Dim3,
    emulator::{self, Launch},
    scalar::Scalar,
    tma::{Element, TensorMap, TensorMapSpec},
};

/// A problem; everything else has a default.
#[derive(Clone, Copy)]
struct Case {
    consumers: u32,
    batch: u32,
    heads: u32,
    seq_q: u32,
    seq_k: u32,
    d: u32,
    causal: bool,
    /// Hides every key of this batch entry, and every third of the others.
    hidden_batch: Option<u32>,
    dropout: f32,
    /// `[B, N, H, D]` in memory, and not `[B, H, N, D]`.
    token_major: bool,
    /// Tasks that a block takes, on average, one after the other.
    tasks_per_block: u32,
}

impl Case {
    const fn new(d: u32, seq_q: u32, seq_k: u32) -> Self {
        let (batch, heads, causal, hidden_batch) = (1, 1, false, None);
        Self {
            consumers: 2,
            batch,
            heads,
            seq_q,
            seq_k,
            d,
            causal,
            hidden_batch,
            dropout: 0.0,
            token_major: false,
            tasks_per_block: 3,
        }
    }

    fn tiles(&self) -> Tiles {
        Tiles::of(self.d, self.consumers)
    }

    fn strides(&self, seq: u32) -> (u64, u64, u64) {
        let (h, n, d) = (u64::from(self.heads), u64::from(seq), u64::from(self.d));
        if self.token_major { (n * h * d, d, h * d) } else { (h * n * d, n * d, d) }
    }

    fn tensor<T>(&self, data: &mut [T], seq: u32) -> Tensor {
        let (stride_b, stride_h, stride_n) = self.strides(seq);
        Tensor { buffer: buffer(data), stride_b, stride_h, stride_n }
    }

    fn index(&self, seq: u32, b: u32, h: u32, i: u32) -> usize {
        let (sb, sh, sn) = self.strides(seq);
        (u64::from(b) * sb + u64::from(h) * sh + u64::from(i) * sn) as usize
    }

    fn map(&self, tensor: &Tensor, seq: u32, box_dims: [u32; 4]) -> TensorMap {
        let bytes = |stride: u64| stride * 2;
        let spec = TensorMapSpec {
            address: tensor.buffer.address,
            element: Element::F16, // Or bf16: copies move bits.
            dims: [self.d, seq, self.heads, self.batch].map(u64::from).to_vec(),
            strides_bytes: [tensor.stride_n, tensor.stride_h, tensor.stride_b].map(bytes).to_vec(),
            box_dims: box_dims.to_vec(),
            swizzle_bytes: 128,
        };
        spec.encode().expect("a map that the driver would take")
    }
}

fn buffer<T>(data: &mut [T]) -> Buffer {
    Buffer { address: data.as_mut_ptr() as u64, bytes: size_of_val(data) as u64 }
}

/// Deterministic values in [-1, 1) plus `offset`, rounded to the storage type.
fn values<T: Scalar>(count: usize, seed: u32, offset: f32) -> Vec<T> {
    let mut state = seed;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            T::from_f32(f32::from_bits(state >> 9 | 0x4000_0000) - 3.0 + offset)
        })
        .collect()
}

/// Checks a case with every number of consumers that there is.
fn check<T: Scalar>(dtype: &str, tolerance: f64, case: Case) {
    check_one::<T>(dtype, tolerance, case);
    let plain = case.hidden_batch.is_none() && case.dropout == 0.0;
    if plain && flash_hopper::max_consumers(case.d) == 3 {
        check_one::<T>(dtype, tolerance, Case { consumers: 3, ..case });
    }
}

fn check_one<T: Scalar>(dtype: &str, tolerance: f64, case: Case) {
    let Case { batch, heads, seq_q, seq_k, d, .. } = case;
    let rows = (batch * heads) as usize * d as usize;
    let mut q: Vec<T> = values(rows * seq_q as usize, 1, 0.0);
    let mut k: Vec<T> = values(rows * seq_k as usize, 2, 0.0);
    // A mean that is not zero: what is summed wrongly then shows.
    let mut v: Vec<T> = values(rows * seq_k as usize, 3, 0.5);
    let mut o = vec![T::from_f32(f32::NAN); q.len()];
    let mut lse = vec![f32::NAN; (batch * heads * seq_q) as usize];
    let hidden =
        |b: u32, j: u32| case.hidden_batch.is_some_and(|all| all == b || j.is_multiple_of(3));
    let mut mask: Vec<u8> = Vec::new();
    if case.hidden_batch.is_some() {
        mask = (0..batch)
            .flat_map(|b| (0..seq_k).map(move |j| (b, j)))
            .map(|(b, j)| u8::from(!hidden(b, j)))
            .collect();
    }
    let dropout = DropoutArgs {
        seed: 7,
        threshold: dropout::threshold(case.dropout),
        rescale: 1.0 / (1.0 - case.dropout),
    };
    let mut args = AttentionArgs {
        tensors: Tensors {
            q: case.tensor(&mut q, seq_q),
            k: case.tensor(&mut k, seq_k),
            v: case.tensor(&mut v, seq_k),
            o: case.tensor(&mut o, seq_q),
            lse: buffer(&mut lse),
        },
        keys: Keys { padding: buffer(&mut mask), ..Keys::default() },
        shape: Shape { batch, heads, seq_q, seq_k, ..Shape::default() },
        scores: Scores {
            scale_log2: std::f32::consts::LOG2_E / (d as f32).sqrt(),
            dropout,
            ..Scores::default()
        },
        ..AttentionArgs::default()
    };
    let [q_box, k_box, v_box, o_box] = case.tiles().boxes();
    let maps = [
        case.map(&args.tensors.q, seq_q, q_box),
        case.map(&args.tensors.k, seq_k, k_box),
        case.map(&args.tensors.v, seq_k, v_box),
        case.map(&args.tensors.o, seq_q, o_box),
    ];
    let mut queue = [0u32; QUEUE_WORDS as usize];
    args.scratch.queue = buffer(&mut queue);

    let tiles = case.tiles();
    let size = if case.consumers == 3 { "_x3" } else { "" };
    let symbol = format!("flash_hopper_{dtype}_d{d}{size}");
    let entry = kernels_gpu::find(&symbol).expect("an entry of that name");
    let tasks = seq_q.div_ceil(tiles.rows()) * batch * heads;
    let launch = Launch {
        grid: Dim3::new(tasks.div_ceil(case.tasks_per_block), 1, 1),
        block: entry.threads.into(),
        cluster: entry.cluster,
        shared_bytes: tiles.shared_bytes(),
    };
    let args = HopperArgs { maps, args };
    let address = std::ptr::from_ref(&args) as usize;
    // SAFETY: the arguments describe buffers that outlive the launch.
    let kernel = || unsafe { (entry.run)(address as *const _) };
    let constants = Constants {
        causal: case.causal.into(),
        padding: case.hidden_batch.is_some().into(),
        dropout: u32::from(case.dropout > 0.0),
        ..Constants::NONE
    };
    let options = common::with_constants(constants, common::options);
    emulator::launch_with(launch, &options, &kernel)
        .unwrap_or_else(|fault| panic!("{symbol}: {fault}"));
    assert_eq!(queue, [0; QUEUE_WORDS as usize], "{symbol} leaves the queues as they were");

    let (mut worst_o, mut worst_lse) = (0.0f64, 0.0f64);
    for b in 0..batch {
        for h in 0..heads {
            for i in 0..seq_q {
                let at = |data: &[T], seq, row, e| {
                    f64::from(data[case.index(seq, b, h, row) + e as usize].to_f32())
                };
                let scores: Vec<f64> = (0..seq_k)
                    .map(|j| {
                        if (case.causal && j + seq_q > i + seq_k) || hidden(b, j) {
                            return f64::NEG_INFINITY;
                        }
                        let dot: f64 =
                            (0..d).map(|e| at(&q, seq_q, i, e) * at(&k, seq_k, j, e)).sum();
                        dot / f64::from(d).sqrt()
                    })
                    .collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let got_lse = lse[((b * heads + h) * seq_q + i) as usize];
                if max == f64::NEG_INFINITY {
                    assert_eq!(
                        got_lse,
                        f32::NEG_INFINITY,
                        "{symbol}: lse of row {i}, which sees no key"
                    );
                    assert!((0..d).all(|e| at(&o, seq_q, i, e) == 0.0), "{symbol}: o of row {i}");
                    continue;
                }
                let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                let (got, expected) = (f64::from(got_lse), max + sum.ln());
                assert!(
                    abs_diff_eq!(got, expected, epsilon = 2e-5),
                    "{symbol}: lse of row {i} is {got}, not {expected}"
                );
                worst_lse = worst_lse.max((got - expected).abs());
                let weights: Vec<f64> = scores
                    .iter()
                    .zip(0..)
                    .map(|(s, j)| match dropout::keeps(&dropout, b, h, i, j) {
                        true => (s - max).exp() / sum * f64::from(dropout.rescale),
                        false => 0.0,
                    })
                    .collect();
                for e in 0..d {
                    let expected: f64 =
                        weights.iter().zip(0..).map(|(w, j)| w * at(&v, seq_k, j, e)).sum();
                    let got = at(&o, seq_q, i, e);
                    assert!(
                        abs_diff_eq!(got, expected, epsilon = tolerance),
                        "{symbol}: o[{b}, {h}, {i}, {e}] is {got}, not {expected}"
                    );
                    worst_o = worst_o.max((got - expected).abs());
                }
            }
        }
    }
    println!("{symbol} Nq {seq_q} Nk {seq_k}: o off by {worst_o:.1e}, lse by {worst_lse:.1e}");
}

/// O is rounded to 11 bits and lies within ±1.5; P is rounded too.
const F16: f64 = 1.5e-3;
/// As [`F16`] with 8 bits.
const BF16: f64 = 1.2e-2;

#[test]
fn full_attention_with_tails_at_every_head_dim() {
    for d in [64, 96, 128, 192, 256] {
        check::<f16>("f16", F16, Case::new(d, 70, 300));
    }
}

#[test]
fn bf16_differs_by_its_rounding_only() {
    check::<bf16>("bf16", BF16, Case::new(64, 65, 257));
    check::<bf16>("bf16", BF16, Case { causal: true, ..Case::new(128, 129, 129) });
}

#[test]
fn tiles_that_fit_exactly_and_single_rows() {
    for (seq_q, seq_k) in [(1, 1), (192, 128), (193, 129), (191, 127), (1, 256)] {
        check::<f16>("f16", F16, Case::new(64, seq_q, seq_k));
    }
    for (seq_q, seq_k) in [(128, 128), (127, 129), (129, 1)] {
        check::<f16>("f16", F16, Case::new(128, seq_q, seq_k));
    }
}

#[test]
fn causal_is_aligned_to_the_bottom_right() {
    // Longer keys, longer queries (the first rows see nothing), and equal lengths.
    for (seq_q, seq_k) in [(200, 200), (70, 333), (333, 70), (130, 515)] {
        for d in [64, 128] {
            let case = Case { causal: true, ..Case::new(d, seq_q, seq_k) };
            check::<f16>("f16", F16, case);
        }
    }
    for d in [96, 192, 256] {
        check::<f16>("f16", F16, Case { causal: true, ..Case::new(d, 150, 170) });
    }
}

#[test]
fn a_block_does_task_after_task() {
    for d in [64, 96, 128, 192, 256] {
        let case = Case { batch: 2, heads: 2, ..Case::new(d, 140, 140) };
        check::<f16>("f16", F16, case);
        // The first rows of each head see no key: tasks that have nothing to do come between.
        let case = Case { causal: true, seq_q: 400, seq_k: 100, ..case };
        check::<f16>("f16", F16, case);
    }
    let case = Case { batch: 3, heads: 2, hidden_batch: Some(1), ..Case::new(64, 150, 70) };
    check::<f16>("f16", F16, case);
    check::<f16>("f16", F16, Case { causal: true, ..case });
}

#[test]
fn no_order_of_tasks_stops_a_block() {
    // Tasks of no tile, of one and of several; consumers without rows, or that see less than
    // others: producer and consumers wait for each other in another order in each mix. One
    // stage of Q (D = 192) and two.
    for (seq_q, seq_k) in [(65, 1), (193, 130), (400, 100), (330, 300)] {
        for tasks_per_block in [2, 100] {
            for d in [64, 192] {
                let case = Case { heads: 2, tasks_per_block, ..Case::new(d, seq_q, seq_k) };
                check::<f16>("f16", F16, case);
                check::<f16>("f16", F16, Case { causal: true, ..case });
            }
        }
    }
}

#[test]
fn groups_of_blocks_share_heads() {
    // Ten heads of two tiles on ten blocks: two groups of four blocks with four heads each, two
    // blocks in no group, two heads for all. Then six blocks: one group.
    for (heads, tasks_per_block) in [(10, 2), (6, 2), (9, 4)] {
        let case = Case { heads, tasks_per_block, causal: true, ..Case::new(64, 140, 140) };
        check_one::<f16>("f16", F16, case);
        check_one::<f16>("f16", F16, Case { d: 192, ..case });
    }
}

#[test]
fn padding_dropout_and_both() {
    for d in [64, 96, 128, 192, 256] {
        let case = Case { batch: 2, hidden_batch: Some(1), dropout: 0.25, ..Case::new(d, 66, 150) };
        // Kept weights are a third larger, and so are the errors.
        check::<f16>("f16", 2.0 * F16, case);
    }
    let case = Case { batch: 2, hidden_batch: Some(0), ..Case::new(64, 40, 200) };
    check::<f16>("f16", F16, Case { causal: true, ..case });
    check::<bf16>("bf16", BF16, Case { causal: true, dropout: 0.1, ..case });
    check::<f16>("f16", F16, Case::new(128, 30, 140));
}

#[test]
fn token_major_tensors_need_no_copy() {
    let case = Case { batch: 2, heads: 3, token_major: true, ..Case::new(64, 50, 140) };
    check::<f16>("f16", F16, case);
    check::<f16>("f16", F16, Case { causal: true, ..case });
}
