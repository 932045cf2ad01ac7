//! The gradients on the CPU. A task has a part of the keys of one head of K and V; the rows that share the
//! head pass through it in tiles. The weights come back from the LSE (Dao et al., "FlashAttention-2",
//! algorithm 2).
//!
//! ```text
//! for each part of the keys of a head, on any thread:
//!     for each tile of keys of it, for each tile of rows that sees one of them:
//!         S = Q Kᵀ; P = 2^(S - LSE); dP = dO Vᵀ     [ROWS, KEYS]
//!         dV += Pᵀ dO; dS = P (dP - rowsum(dO ∘ O)); dK += dSᵀ Q; dQ += dS K
//! ```
//! Each part sums its own dQ. The parts of a head are added in order, so any number of threads gives the
//! same bits. Each part takes memory for Q, dO and dQ of a head in f32.

use std::{f32::consts::LOG2_E, ops::Range};

use rayon::prelude::*;

use super::{
    call::{Call, Group, Rows, exponentials, parts},
    element::Element,
    matmul::{Mat, matmul},
};

/// Rows of a tile.
const ROWS: usize = 128;
/// Keys of a tile.
const KEYS: usize = 128;
/// The least number of tasks of a call with enough keys: several for each of a few threads.
const TASKS: usize = 8;

/// The outputs of the forward pass, and the gradient of O.
#[derive(Clone, Copy, Debug)]
pub struct Passed<'a, T> {
    /// The output.
    pub o: Rows<'a, T>,
    /// Its log-sum-exp.
    pub lse: &'a [f32],
    /// The gradient of the output.
    pub d_o: Rows<'a, T>,
}

/// The requested gradients.
#[derive(Debug)]
pub struct Gradients<T> {
    /// The gradients of Q, K and V, each contiguous in the problem's layout.
    pub qkv: [Vec<T>; 3],
    /// The gradient of the bias, contiguous.
    pub bias: Option<Vec<T>>,
    /// The gradient of the sinks.
    pub sinks: Option<Vec<f32>>,
}

/// The choice of gradients.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted {
    /// The gradients of Q, K and V.
    pub qkv: bool,
    /// The gradient of the bias.
    pub bias: bool,
    /// The gradient of the sinks.
    pub sinks: bool,
}

/// The gradients of a call.
pub fn backward<T: Element>(
    call: &Call<'_, T>,
    passed: &Passed<'_, T>,
    wanted: Wanted,
) -> Gradients<T> {
    let p = &call.problem;
    let groups = call.groups();
    let of_group = TASKS.div_ceil(groups.len().max(1));
    let tasks: Vec<(Group, Range<usize>)> = groups
        .iter()
        .flat_map(|&group| {
            let part = group.of.seq_k.div_ceil(of_group).next_multiple_of(KEYS).max(1);
            parts(0..group.of.seq_k, part).map(move |keys| (group, keys))
        })
        .collect();
    let done: Vec<Part> = tasks
        .par_iter()
        .map_init(Scratch::default, |scratch, (group, keys)| {
            part(call, passed, group, keys.clone(), wanted, scratch)
        })
        .collect();

    let [d, d_v] = [p.head_dim(), p.head_dim_v()];
    let mut dq = vec![0.0; p.q_elements()];
    let mut dk = vec![T::default(); p.k_elements()];
    let mut dv = vec![T::default(); p.v_elements()];
    let mut d_bias = vec![0.0; p.bias_shape().map_or(0, |shape| shape.iter().product())];
    for ((group, keys), part) in tasks.iter().zip(&done) {
        for (row, from) in part.dq.chunks_exact(d).enumerate() {
            let first = call.row_index(group, row, d);
            dq[first..first + d].iter_mut().zip(from).for_each(|(sum, x)| *sum += x);
        }
        for (to, from, d) in [(&mut dk, &part.dk, d), (&mut dv, &part.dv, d_v)] {
            for (key, from) in keys.clone().zip(from.chunks_exact(d)) {
                let first = call.key_index(group, key, d);
                T::narrow(from, &mut to[first..first + d]);
            }
        }
        for (row, from) in part.d_bias.chunks_exact(keys.len().max(1)).enumerate() {
            let first = call.bias_index(group, row) + keys.start;
            let to = &mut d_bias[first..first + keys.len()];
            to.iter_mut().zip(from).for_each(|(sum, x)| *sum += x);
        }
    }
    let rounded = |numbers: &[f32]| {
        let mut rounded = vec![T::default(); numbers.len()];
        T::narrow(numbers, &mut rounded);
        rounded
    };
    Gradients {
        qkv: [rounded(&dq), dk, dv],
        bias: wanted.bias.then(|| rounded(&d_bias)),
        sinks: call
            .beside
            .sinks
            .as_ref()
            .filter(|_| wanted.sinks)
            .map(|s| of_sinks(call, passed, s)),
    }
}

/// The gradient of the sinks, `-sum_i exp(sink - LSE[i]) dO[i] · O[i]`: a sink has a weight and no value.
fn of_sinks<T: Element>(call: &Call<'_, T>, passed: &Passed<'_, T>, sinks: &[f32]) -> Vec<f32> {
    let mut sums = vec![0.0; sinks.len()];
    let (mut o, mut d_o) = (Vec::new(), Vec::new());
    for group in call.groups() {
        call.gather(&passed.o, &group, 0..group.rows(), &mut o);
        call.gather(&passed.d_o, &group, 0..group.rows(), &mut d_o);
        let d = call.problem.head_dim_v();
        for (row, (o, d_o)) in o.chunks_exact(d).zip(d_o.chunks_exact(d)).enumerate() {
            let (h, lse) = (group.place(row).0, passed.lse[call.lse_index(&group, row)]);
            if lse > f32::NEG_INFINITY {
                sums[h] -= f64::from((sinks[h] - lse).exp()) * f64::from(dot(o, d_o));
            }
        }
    }
    sums.into_iter().map(|sum| sum as f32).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The sums of a task, in f32.
struct Part {
    /// dQ of all rows of the group.
    dq: Vec<f32>,
    /// dK and dV of the keys of the part.
    dk: Vec<f32>,
    dv: Vec<f32>,
    /// The bias's gradient of all rows and the keys of the part; empty unless requested.
    d_bias: Vec<f32>,
}

/// A thread's memory, used for one part after the other.
#[derive(Default)]
struct Scratch {
    /// Rows of the whole group.
    q: Vec<f32>,
    o: Vec<f32>,
    d_o: Vec<f32>,
    /// A tile of keys.
    k: Vec<f32>,
    v: Vec<f32>,
    tiles: Tiles,
}

/// Tiles of weights and of gradients of scores.
#[derive(Default)]
struct Tiles {
    weights: Vec<f32>,
    d_scores: Vec<f32>,
    /// The cap's derivative and the weights before dropout, of one row.
    capped: Vec<f32>,
    before: Vec<f32>,
}

/// The sums of a part of the keys.
fn part<T: Element>(
    call: &Call<'_, T>,
    passed: &Passed<'_, T>,
    group: &Group,
    part: Range<usize>,
    wanted: Wanted,
    Scratch { q, o, d_o, k, v, tiles }: &mut Scratch,
) -> Part {
    let p = &call.problem;
    let [d, d_v] = [p.head_dim(), p.head_dim_v()];
    let rows = group.rows();
    call.gather(&call.q, group, 0..rows, q);
    call.gather(&passed.o, group, 0..rows, o);
    call.gather(&passed.d_o, group, 0..rows, d_o);
    // The LSE in base 2, and rowsum(dO ∘ O).
    let numbers = |row: usize| {
        let of = row * d_v..(row + 1) * d_v;
        let lse = passed.lse[call.lse_index(group, row)];
        (lse * LOG2_E, dot(&o[of.clone()], &d_o[of]))
    };
    let of_rows: Vec<(f32, f32)> = (0..rows).map(numbers).collect();
    let mut sums = Part {
        dq: vec![0.0; rows * d],
        dk: vec![0.0; part.len() * d],
        dv: vec![0.0; part.len() * d_v],
        d_bias: vec![0.0; if wanted.bias { rows * part.len() } else { 0 }],
    };
    tiles.weights.resize(ROWS * KEYS, 0.0);
    tiles.d_scores.resize(ROWS * KEYS, 0.0);
    tiles.capped.resize(KEYS, 0.0);
    tiles.before.resize(KEYS, 0.0);
    let arch = pulp::Arch::new();
    for keys in parts(part.clone(), KEYS) {
        let within = keys.start - part.start;
        let (k, v) = (
            call.keys(&call.k, group, keys.clone(), k),
            call.keys(&call.v, group, keys.clone(), v),
        );
        for of in parts(0..rows, ROWS) {
            let first = of.start;
            let seen = group.keys_of_rows(p.window(), of.clone());
            if seen.start >= keys.end || seen.end <= keys.start {
                continue;
            }
            let q = Mat::new(&q[first * d..], of.len(), d, d);
            let d_o = Mat::new(&d_o[first * d_v..], of.len(), d_v, d_v);
            matmul(&mut tiles.weights, KEYS, false, q, k.t());
            matmul(&mut tiles.d_scores, KEYS, false, d_o, v.t());
            let of_rows = &of_rows[of.clone()];
            let stride = part.len();
            let d_bias = wanted.bias.then(|| &mut sums.d_bias[first * stride + within..]);
            arch.dispatch(|| {
                let d_bias = d_bias.map(|to| (to, stride));
                gradients_of_scores(call, group, of.clone(), &keys, of_rows, tiles, d_bias);
            });
            let weights = Mat::new(&tiles.weights, of.len(), keys.len(), KEYS);
            let d_scores = Mat::new(&tiles.d_scores, of.len(), keys.len(), KEYS);
            if wanted.qkv {
                matmul(&mut sums.dv[within * d_v..], d_v, true, weights.t(), d_o);
                matmul(&mut sums.dk[within * d..], d, true, d_scores.t(), q);
                matmul(&mut sums.dq[first * d..], d, true, d_scores, k);
            }
        }
    }
    let scale = p.scale();
    sums.dq.iter_mut().chain(&mut sums.dk).for_each(|x| *x *= scale);
    sums
}

/// Products `Q Kᵀ` become weights after dropout, products `dO Vᵀ` gradients of scores. `d_bias` takes
/// the gradients before the cap's derivative, from the first row and key on, with the step from row to row.
#[inline(always)]
fn gradients_of_scores<T: Element>(
    call: &Call<'_, T>,
    group: &Group,
    rows: Range<usize>,
    keys: &Range<usize>,
    of_rows: &[(f32, f32)],
    tiles: &mut Tiles,
    mut d_bias: Option<(&mut [f32], usize)>,
) {
    let is_capped = call.problem.softcap().is_some();
    for (at, row) in rows.enumerate() {
        let scores = call.row_scores(group, row);
        let (lse, delta) = of_rows[at];
        let seen = if lse == f32::NEG_INFINITY { 0..0 } else { scores.seen(keys) };
        let weights = &mut tiles.weights[at * KEYS..][..keys.len()];
        let d_scores = &mut tiles.d_scores[at * KEYS..][..keys.len()];
        for tile in [&mut *weights, &mut *d_scores] {
            tile[..seen.start].fill(0.0);
            tile[seen.end..].fill(0.0);
        }
        let first = keys.start + seen.start;
        let (weights, d_scores) = (&mut weights[seen.clone()], &mut d_scores[seen.clone()]);
        let capped = &mut tiles.capped[..seen.len()];
        scores.apply(first, weights, is_capped.then_some(&mut *capped));
        exponentials(weights, lse);
        if let Some(dropout) = call.row_dropout(group, row) {
            // dS = P (keep dP - delta), and keep P is the weight after dropout.
            let before = &mut tiles.before[..seen.len()];
            before.copy_from_slice(weights);
            dropout.apply(first, weights);
            for ((d_s, after), before) in d_scores.iter_mut().zip(&*weights).zip(before) {
                *d_s = after * *d_s - *before * delta;
            }
        } else {
            d_scores.iter_mut().zip(&*weights).for_each(|(d_s, p)| *d_s = p * (*d_s - delta));
        }
        if let Some((to, stride)) = &mut d_bias {
            to[at * *stride + seen.start..][..seen.len()].copy_from_slice(d_scores);
        }
        if is_capped {
            d_scores.iter_mut().zip(&*capped).for_each(|(d_s, capped)| *d_s *= capped);
        }
    }
}
