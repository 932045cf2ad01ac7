//! The numbers that a kernel has after each step, worked out in f64 from its inputs, tile by tile as it goes.

use flash_attention::{Problem, Tensor};
use serde::Serialize;

use super::rungs::Order;

/// The numbers that exist after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Nothing new: a barrier, a copy.
    Before,
    /// S.
    Scores,
    /// P. In the forward pass the maxima and sums too, and O is rescaled.
    Softmax,
    /// O.
    Output,
    /// O is normalised; dK has its scale.
    Done,
    /// S and dP, before P.
    Products,
    /// S, P and dP.
    Weighed,
    /// S, P, dP and dS.
    Gradients,
    /// And dV.
    Values,
    /// And dQ, before dK.
    Queries,
    /// And dK, before dQ.
    Keys,
    /// All.
    All,
}

const STAGES: usize = Stage::All as usize + 1;

/// A picture: numbers in rows.
#[derive(Clone, Debug, Serialize)]
pub struct Matrix {
    /// Its title.
    pub title: &'static str,
    /// Its name before a row and a column.
    pub name: &'static str,
    /// Numbers in a row.
    pub width: usize,
    /// Row after row; none where a key is hidden or there is no number.
    pub values: Vec<Option<f64>>,
    /// The name of a row (row or key), and the number of the first.
    pub row: (&'static str, usize),
    /// The name of a column (key, row or column), and the number of the first.
    pub column: (&'static str, usize),
    /// Names of the rows, each of which has colours of its own.
    pub lines: Vec<&'static str>,
}

/// The numbers of a block.
#[derive(Clone, Debug, Serialize)]
pub struct Numbers {
    /// Titles of the pictures.
    pub figures: Vec<&'static str>,
    /// All matrices.
    pub matrices: Vec<Matrix>,
    /// The results: O and the LSE, or dK and dV, and dQ.
    #[serde(skip)]
    pub results: Vec<Vec<f64>>,
    /// Of each tile, entries that are hidden.
    #[serde(skip)]
    pub hidden: Vec<usize>,
    /// Of each tile and stage, the matrix of each figure.
    #[serde(skip)]
    shown: Vec<[Vec<Option<usize>>; STAGES]>,
}

/// Rows and columns of the block's tiles.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// Rows of Q of a tile.
    pub rows: usize,
    /// Keys of a tile.
    pub keys: usize,
}

fn digits(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let scale = 10f64.powi(4 - value.abs().log10().floor() as i32);
    (value * scale).round() / scale
}

/// The first head of a problem in f64.
struct Head<'a> {
    problem: &'a Problem,
    tensors: [&'a Tensor; 3],
    d: usize,
}

impl Head<'_> {
    fn sees(&self, i: usize, j: usize) -> bool {
        let (seq_q, seq_k) = (self.problem.seq_q(), self.problem.seq_k());
        i < seq_q && j < seq_k && (!self.problem.causal() || j + seq_q <= i + seq_k)
    }

    /// The product of a row of one tensor and one of another.
    fn dot(&self, (a, i): (&Tensor, usize), (b, j): (&Tensor, usize)) -> f64 {
        (0..self.d).map(|c| a.get(i * self.d + c) * b.get(j * self.d + c)).sum()
    }

    fn score(&self, i: usize, j: usize) -> Option<f64> {
        let [q, k, _] = self.tensors;
        self.sees(i, j).then(|| self.dot((q, i), (k, j)) * f64::from(self.problem.scale()))
    }
}

impl Numbers {
    fn new(figures: &[&'static str]) -> Self {
        Self {
            figures: figures.to_vec(),
            matrices: Vec::new(),
            results: Vec::new(),
            hidden: Vec::new(),
            shown: Vec::new(),
        }
    }

    /// The tiles that the block goes through.
    #[must_use]
    pub const fn tiles(&self) -> usize {
        self.shown.len()
    }

    /// The matrix of each figure after a stage of a tile.
    #[must_use]
    pub fn shown(&self, tile: usize, stage: Stage) -> Vec<Option<usize>> {
        self.shown.get(tile).map_or_else(Vec::new, |stages| stages[stage as usize].clone())
    }

    fn add(&mut self, matrix: Matrix) -> Option<usize> {
        self.matrices.push(Matrix {
            values: matrix.values.iter().map(|value| value.map(digits)).collect(),
            ..matrix
        });
        Some(self.matrices.len() - 1)
    }

    /// The forward pass of the rows from `first_row` on.
    #[must_use]
    pub fn forward(
        problem: &Problem,
        order: Order,
        first_row: usize,
        extent: Extent,
        tensors: [&Tensor; 3],
    ) -> Self {
        let Extent { rows, keys } = extent;
        let head = Head { problem, tensors, d: problem.head_dim() };
        let (d, [_, _, v]) = (head.d, tensors);
        let (seq_q, seq_k) = (problem.seq_q(), problem.seq_k());
        let last =
            if problem.causal() { (first_row + rows + seq_k).saturating_sub(seq_q) } else { seq_k };
        let mut firsts: Vec<usize> = (0..last.min(seq_k)).step_by(keys).collect();
        if order.descending {
            firsts.reverse();
        }

        let mut all = Self::new(&[
            "S = Q Kᵀ, scaled",
            "P = exp(S - m)",
            "m, l and α, a column for each row",
            "O, not yet divided by l",
        ]);
        let of_scores = |title, name, first: usize, values| Matrix {
            title,
            name,
            width: keys,
            values,
            row: ("row", first_row),
            column: ("key", first),
            lines: Vec::new(),
        };
        let of_rows = |m: &[f64], l: &[f64], alpha: &[f64]| {
            let finite = |&m: &f64| m.is_finite().then_some(m);
            let some = |&x: &f64| Some(x);
            let values = m.iter().map(finite).chain(l.iter().map(some));
            let mut values: Vec<_> = values.chain(alpha.iter().map(some)).collect();
            values.resize(3 * rows, None);
            Matrix {
                title: "m, l and α, a column for each row",
                name: "",
                width: rows,
                values,
                row: ("", 0),
                column: ("row", first_row),
                lines: vec!["m", "l", "α"],
            }
        };
        let of_output = |title, o: &[f64]| Matrix {
            title,
            name: "O",
            width: d,
            values: o.iter().copied().map(Some).collect(),
            row: ("row", first_row),
            column: ("column", 0),
            lines: Vec::new(),
        };
        let unfinished = "O, not yet divided by l";

        let (mut m, mut l) = (vec![f64::NEG_INFINITY; rows], vec![0.0; rows]);
        let mut o = vec![0.0; rows * d];
        let mut before = [None, None, all.add(of_rows(&m, &l, &[])), None];
        before[3] = all.add(of_output(unfinished, &o));
        for first in firsts {
            let (mut s, mut p, mut alphas) = (Vec::new(), Vec::new(), Vec::new());
            for i in 0..rows {
                let of_row: Vec<_> =
                    (first..first + keys).map(|j| head.score(first_row + i, j)).collect();
                let m_new = of_row.iter().flatten().fold(m[i], |a, &b| a.max(b));
                let alpha = if m[i] == f64::NEG_INFINITY { 0.0 } else { (m[i] - m_new).exp() };
                let weight = |s: &Option<f64>| s.map_or(0.0, |s| (s - m_new).exp());
                p.extend(of_row.iter().map(weight));
                l[i] = l[i] * alpha + p[i * keys..].iter().sum::<f64>();
                m[i] = m_new;
                alphas.push(alpha);
                s.extend(of_row);
                o[i * d..][..d].iter_mut().for_each(|o| *o *= alpha);
            }
            all.hidden.push(s.iter().filter(|s| s.is_none()).count());
            let s = all.add(of_scores("S = Q Kᵀ, scaled", "S", first, s));
            let ml = all.add(of_rows(&m, &l, &alphas));
            let scaled = all.add(of_output(unfinished, &o));
            for i in 0..rows {
                for j in (0..keys).filter(|j| p[i * keys + j] > 0.0) {
                    for c in 0..d {
                        o[i * d + c] += p[i * keys + j] * v.get((first + j) * d + c);
                    }
                }
            }
            let p = p.into_iter().map(Some).collect();
            let p = all.add(of_scores("P = exp(S - m)", "P", first, p));
            let sum = all.add(of_output(unfinished, &o));
            let [_, p_before, ml_before, o_before] = before;
            let mut stages = [const { Vec::new() }; STAGES];
            stages[Stage::Before as usize] = vec![None, p_before, ml_before, o_before];
            stages[Stage::Scores as usize] = vec![s, p_before, ml_before, o_before];
            stages[Stage::Softmax as usize] = vec![s, p, ml, scaled];
            stages[Stage::Output as usize] = vec![s, p, ml, sum];
            all.shown.push(stages);
            before = [None, p, ml, sum];
        }
        let normal =
            |(index, &o): (usize, &f64)| if l[index / d] == 0.0 { 0.0 } else { o / l[index / d] };
        let o: Vec<f64> = o.iter().enumerate().map(normal).collect();
        let output = all.add(of_output("O, normalised", &o));
        for stages in &mut all.shown {
            let mut shown = stages[Stage::Output as usize].clone();
            shown[3] = output;
            stages[Stage::Done as usize] = shown;
        }
        all.results = vec![o, m.iter().zip(&l).map(|(m, l)| m + l.ln()).collect()];
        all
    }

    /// The backward pass of the first tile of keys: over the tiles of rows that see it.
    #[must_use]
    pub fn backward(
        problem: &Problem,
        extent: Extent,
        tensors: [&Tensor; 3],
        d_o: &Tensor,
    ) -> Self {
        let Extent { rows, keys } = extent;
        let head = Head { problem, tensors, d: problem.head_dim() };
        let (d, [q, k, v]) = (head.d, tensors);
        let (seq_q, seq_k) = (problem.seq_q(), problem.seq_k());
        // Each row's LSE, and delta = dO · O.
        let of_rows: Vec<(f64, f64)> = (0..seq_q)
            .map(|i| {
                let scores: Vec<_> =
                    (0..seq_k).filter_map(|j| Some((j, head.score(i, j)?))).collect();
                let m = scores.iter().fold(f64::NEG_INFINITY, |m, (_, s)| m.max(*s));
                let lse = m + scores.iter().map(|(_, s)| (s - m).exp()).sum::<f64>().ln();
                let weighed = |(j, s): &(usize, f64)| (s - lse).exp() * head.dot((d_o, i), (v, *j));
                (lse, scores.iter().map(weighed).sum())
            })
            .collect();

        let titles = [
            "S = Q Kᵀ, scaled",
            "P = exp(S - LSE)",
            "dP = dO Vᵀ",
            "dS = P (dP - delta)",
            "dV",
            "dK, not yet scaled",
            "dQ of these rows: this block's part, not yet scaled",
        ];
        let mut all = Self::new(&titles);
        let first_tile = if problem.causal() { seq_q.saturating_sub(seq_k) / rows } else { 0 };
        let (mut dk, mut dv) = (vec![0.0; keys * d], vec![0.0; keys * d]);
        let of_keys = |title, name, values: &[f64]| Matrix {
            title,
            name,
            width: d,
            values: values.iter().copied().map(Some).collect(),
            row: ("key", 0),
            column: ("column", 0),
            lines: Vec::new(),
        };
        let mut sums = [all.add(of_keys("dV", "dV", &dv)), all.add(of_keys(titles[5], "dK", &dk))];
        let mut dq_all = vec![0.0; seq_q * d];
        for tile in first_tile..seq_q.div_ceil(rows) {
            let first_row = tile * rows;
            let of_scores = |index: usize, name, values| Matrix {
                title: titles[index],
                name,
                width: keys,
                values,
                row: ("row", first_row),
                column: ("key", 0),
                lines: Vec::new(),
            };
            let at = |index: usize| (first_row + index / keys, index % keys);
            let over = |of: &dyn Fn(usize, usize) -> Option<f64>| -> Vec<Option<f64>> {
                let of = |index| {
                    let (i, j) = at(index);
                    if head.sees(i, j) { of(i, j) } else { None }
                };
                (0..rows * keys).map(of).collect()
            };
            let s = over(&|i, j| head.score(i, j));
            let p = over(&|i, j| Some((head.score(i, j)? - of_rows[i].0).exp()));
            let dp = over(&|i, j| Some(head.dot((d_o, i), (v, j))));
            let ds: Vec<Option<f64>> = (0..rows * keys)
                .map(|index| Some(p[index]? * (dp[index]? - of_rows[at(index).0].1)))
                .collect();
            let mut dq = vec![0.0; rows * d];
            for index in 0..rows * keys {
                let (Some(p), Some(ds)) = (p[index], ds[index]) else { continue };
                let (i, j) = at(index);
                for c in 0..d {
                    dv[j * d + c] += p * d_o.get(i * d + c);
                    dk[j * d + c] += ds * q.get(i * d + c);
                    dq[(i - first_row) * d + c] += ds * k.get(j * d + c);
                }
            }
            let there = rows.min(seq_q - first_row) * d;
            dq_all[first_row * d..][..there].copy_from_slice(&dq[..there]);
            all.hidden.push(s.iter().filter(|s| s.is_none()).count());
            let s = all.add(of_scores(0, "S", s));
            let p = all.add(of_scores(1, "P", p.iter().map(|p| Some(p.unwrap_or(0.0))).collect()));
            let dp = all.add(of_scores(2, "dP", dp));
            let ds =
                all.add(of_scores(3, "dS", ds.iter().map(|ds| Some(ds.unwrap_or(0.0))).collect()));
            let dq = all.add(Matrix {
                title: titles[6],
                name: "dQ",
                width: d,
                values: dq.into_iter().map(Some).collect(),
                row: ("row", first_row),
                column: ("column", 0),
                lines: Vec::new(),
            });
            let [dv_before, dk_before] = sums;
            sums = [all.add(of_keys("dV", "dV", &dv)), all.add(of_keys(titles[5], "dK", &dk))];
            let [dv, dk] = sums;
            let mut stages = [const { Vec::new() }; STAGES];
            let mut set =
                |stage: Stage, shown: [Option<usize>; 7]| stages[stage as usize] = shown.to_vec();
            set(Stage::Before, [None, None, None, None, dv_before, dk_before, None]);
            set(Stage::Scores, [s, None, None, None, dv_before, dk_before, None]);
            set(Stage::Softmax, [s, p, None, None, dv_before, dk_before, None]);
            set(Stage::Products, [s, None, dp, None, dv_before, dk_before, None]);
            set(Stage::Weighed, [s, p, dp, None, dv_before, dk_before, None]);
            set(Stage::Gradients, [s, p, dp, ds, dv_before, dk_before, None]);
            set(Stage::Values, [s, p, dp, ds, dv, dk_before, None]);
            set(Stage::Queries, [s, p, dp, ds, dv, dk_before, dq]);
            set(Stage::Keys, [s, p, dp, ds, dv, dk, None]);
            set(Stage::All, [s, p, dp, ds, dv, dk, dq]);
            all.shown.push(stages);
        }
        let scale = f64::from(problem.scale());
        dk.iter_mut().chain(&mut dq_all).for_each(|x| *x *= scale);
        let done = all.add(of_keys("dK", "dK", &dk));
        for stages in &mut all.shown {
            let mut shown = stages[Stage::All as usize].clone();
            shown[5] = done;
            stages[Stage::Done as usize] = shown;
        }
        let there = keys.min(seq_k) * d;
        dk.truncate(there);
        dv.truncate(there);
        all.results = vec![dk, dv, dq_all];
        all
    }
}
