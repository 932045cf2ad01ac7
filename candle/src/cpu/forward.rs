//! The forward pass on the CPU. A task has a tile of rows; the keys pass through it in tiles, with an
//! online softmax in between (Dao et al., "FlashAttention", algorithm 1).
//!
//! ```text
//! for each tile of rows, on any thread:
//!     for each tile of keys that a row of it sees:
//!         S = Q Kᵀ                                  [ROWS, KEYS]
//!         m' = max(m, rowmax(S)); P = 2^(S - m'); l = l 2^(m - m') + rowsum(P)
//!         O = O 2^(m - m') + P V
//!     O = O / l; LSE = (m + log2 l) ln 2
//! ```
//! A tile of scores (128 KiB), of K and of V (64 KiB each at D 64) stay in a core's second-level
//! cache. The only further memory is a second O.

use std::{
    f32::consts::{LN_2, LOG2_E},
    ops::Range,
};

use rayon::prelude::*;

use super::{
    call::{Call, Group, exponentials, parts},
    element::Element,
    math::exp2,
    matmul::{Mat, matmul},
};

/// Rows of a tile, and rows of a tile where larger tiles would leave threads idle.
const ROWS: [usize; 2] = [128, 32];
/// The least number of larger tiles: with fewer, the smaller tiles are taken.
const ENOUGH_TILES: usize = 16;
/// Keys of a tile.
const KEYS: usize = 256;

/// O of the problem's `o_shape`, and the LSE of its `lse_shape`.
pub fn forward<T: Element>(call: &Call<'_, T>) -> (Vec<T>, Vec<f32>) {
    let p = &call.problem;
    let groups = call.groups();
    let tiles: usize = groups.iter().map(|group| group.rows().div_ceil(ROWS[0])).sum();
    let rows = if tiles < ENOUGH_TILES { ROWS[1] } else { ROWS[0] };
    let tasks: Vec<(Group, Range<usize>)> = groups
        .iter()
        .flat_map(|&group| parts(0..group.rows(), rows).map(move |rows| (group, rows)))
        .collect();
    let done: Vec<_> = tasks
        .par_iter()
        .map_init(Scratch::default, |scratch, (group, rows)| {
            tile(call, group, rows.clone(), scratch)
        })
        .collect();

    let (mut o, mut lse) = (vec![T::default(); p.o_elements()], vec![f32::NEG_INFINITY; p.rows()]);
    let d = p.head_dim_v();
    for ((group, rows), (tile_o, tile_lse)) in tasks.iter().zip(&done) {
        for (at, row) in rows.clone().enumerate() {
            let first = call.row_index(group, row, d);
            o[first..first + d].copy_from_slice(&tile_o[at * d..(at + 1) * d]);
            lse[call.lse_index(group, row)] = tile_lse[at];
        }
    }
    (o, lse)
}

/// A thread's memory, used for one tile after the other.
#[derive(Default)]
struct Scratch {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    s: Vec<f32>,
}

/// O and LSE of a tile of rows.
fn tile<T: Element>(
    call: &Call<'_, T>,
    group: &Group,
    rows: Range<usize>,
    Scratch { q, k, v, s }: &mut Scratch,
) -> (Vec<T>, Vec<f32>) {
    let p = &call.problem;
    let d = p.head_dim_v();
    call.gather(&call.q, group, rows.clone(), q);
    let q = Mat::new(q, rows.len(), p.head_dim(), p.head_dim());
    s.resize(rows.len() * KEYS, 0.0);
    let mut o = vec![0.0; rows.len() * d];
    // The maximum in base 2, and the sum.
    let mut state = vec![(f32::NEG_INFINITY, 0.0f32); rows.len()];
    let arch = pulp::Arch::new();
    let seen = group.keys_of_rows(p.window(), rows.clone());
    for keys in parts(seen, KEYS) {
        matmul(s, KEYS, false, q, call.keys(&call.k, group, keys.clone(), k).t());
        arch.dispatch(|| softmax(call, group, rows.clone(), &keys, s, &mut state, &mut o));
        let weights = Mat::new(s, rows.len(), keys.len(), KEYS);
        matmul(&mut o, d, true, weights, call.keys(&call.v, group, keys, v));
    }

    let mut lse = Vec::with_capacity(rows.len());
    for (at, row) in rows.clone().enumerate() {
        let (mut m, mut l) = state[at];
        let o = &mut o[at * d..(at + 1) * d];
        if let Some(sinks) = &call.beside.sinks {
            let sink = sinks[group.place(row).0] * LOG2_E;
            let larger = m.max(sink);
            if larger > f32::NEG_INFINITY {
                // Without keys there is nothing to scale.
                let kept = exp2(m - larger);
                l = l * kept + exp2(sink - larger);
                o.iter_mut().for_each(|o| *o *= kept);
                m = larger;
            }
        }
        let sees_nothing = l == 0.0;
        let scale = if sees_nothing { 0.0 } else { 1.0 / l };
        o.iter_mut().for_each(|o| *o *= scale);
        lse.push(if sees_nothing { f32::NEG_INFINITY } else { (m + l.log2()) * LN_2 });
    }
    let mut rounded = vec![T::default(); o.len()];
    T::narrow(&o, &mut rounded);
    (rounded, lse)
}

/// Products become weights; maxima, sums and O follow them.
#[inline(always)]
fn softmax<T: Element>(
    call: &Call<'_, T>,
    group: &Group,
    rows: Range<usize>,
    keys: &Range<usize>,
    s: &mut [f32],
    state: &mut [(f32, f32)],
    o: &mut [f32],
) {
    let d = call.problem.head_dim_v();
    for (at, row) in rows.enumerate() {
        let scores = call.row_scores(group, row);
        let seen = scores.seen(keys);
        let s = &mut s[at * KEYS..][..keys.len()];
        s[..seen.start].fill(0.0);
        s[seen.end..].fill(0.0);
        let first = keys.start + seen.start;
        let s = &mut s[seen];
        let largest = scores.apply(first, s, None);
        let (m, l) = state[at];
        let new = if largest > m { largest } else { m };
        if new == f32::NEG_INFINITY {
            // The row sees no key: all scores are -inf, or NaN, which stays.
            s.iter_mut().for_each(|s| *s = if s.is_nan() { *s } else { 0.0 });
            state[at].1 = s.iter().fold(l, |l, s| l + s);
            continue;
        }
        let kept = exp2(m - new);
        let sum = exponentials(s, new);
        if let Some(dropout) = call.row_dropout(group, row) {
            dropout.apply(first, s);
        }
        if kept != 1.0 {
            o[at * d..(at + 1) * d].iter_mut().for_each(|o| *o *= kept);
        }
        state[at] = (new, l * kept + sum);
    }
}
