//! The steps of a kernel's first block on a small problem, with the numbers that it has after each: S, P, the
//! running maximum and sum, O; what lies in shared memory; where the lanes are. The numbers are worked out here in
//! f64 from the same Q, K and V, tile by tile as the kernel goes; the lines are the kernel's.

use anyhow::{Context as _, Result};
use flash_attention::{Problem, Tensor};
use serde::Serialize;

use super::rungs::{Phase, Rung, To};
use crate::microscope::source::{self, Line};

/// Everything that the page shows.
#[derive(Clone, Debug, Serialize)]
pub struct Steps {
    /// Rows of the block's tile.
    pub rows: usize,
    /// Columns of Q, K and V.
    pub columns: usize,
    /// Keys of a tile.
    pub keys: usize,
    /// Warps of the block.
    pub warps: usize,
    /// The numbers after each tile of keys.
    pub tiles: Vec<Tile>,
    /// O of the block's rows, `[rows, columns]`, normalised.
    pub o: Vec<f64>,
    /// Natural log of the sums of the rows' exponentials.
    pub lse: Vec<f64>,
    /// Regions of shared memory: name and bytes.
    pub regions: Vec<(&'static str, usize)>,
    /// The steps.
    pub steps: Vec<Step>,
    /// What is shown of the source.
    pub sources: Vec<Excerpt>,
}

/// Lines of a file.
#[derive(Clone, Debug, Serialize)]
pub struct Excerpt {
    /// The file.
    pub file: &'static str,
    /// Number of the first line.
    pub first: u32,
    /// The lines.
    pub lines: Vec<&'static str>,
}

/// The numbers after a tile of keys.
#[derive(Clone, Debug, Serialize)]
pub struct Tile {
    /// Scores `[rows, keys]`, scaled; none where a key is hidden or there is none.
    pub s: Vec<Option<f64>>,
    /// Weights `[rows, keys]`, relative to the running maximum.
    pub p: Vec<f64>,
    /// The running maximum of each row; none where it has seen no key.
    pub m: Vec<Option<f64>>,
    /// The running sum of each row.
    pub l: Vec<f64>,
    /// What O and l of the tiles before are multiplied by.
    pub alpha: Vec<f64>,
    /// O `[rows, columns]`, not normalised.
    pub o: Vec<f64>,
}

/// What changes in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Nothing: a barrier, a load.
    Before,
    /// S is there.
    Scores,
    /// P, the maxima and sums are there, and O is rescaled.
    Softmax,
    /// O is there.
    Output,
    /// O is normalised.
    Done,
}

/// One step.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    /// What is done.
    pub title: String,
    /// More about it.
    pub note: String,
    /// Number of its excerpt.
    pub source: usize,
    /// Lines of it, first and last.
    pub lines: [u32; 2],
    /// The tile of keys.
    pub tile: usize,
    /// What is there after it.
    pub stage: Stage,
    /// Which lanes wait, and for whom: "block", "warp" or nobody.
    pub barrier: &'static str,
    /// What each region of shared memory holds, and what is done to it: "", "write" or "read".
    pub memory: Vec<(String, &'static str)>,
}

fn digits(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let scale = 10f64.powi(4 - value.abs().log10().floor() as i32);
    (value * scale).round() / scale
}

impl Steps {
    /// Of the first block of a kernel on a problem with Q, K and V, `[B, H, N, D]`.
    ///
    /// # Errors
    /// A kernel that has no steps; a source file that no longer has the lines that they are at.
    pub fn new(kernel: &str, problem: &Problem, [q, k, v]: [&Tensor; 3]) -> Result<Self> {
        let rung = Rung::find(kernel).with_context(|| format!("{kernel} has no steps"))?;
        let d = problem.head_dim();
        let shape = rung.shape(kernel, d)?;
        let mut steps = Self {
            rows: shape.rows.min(problem.seq_q()),
            columns: d,
            keys: shape.keys,
            warps: shape.warps,
            tiles: Vec::new(),
            o: Vec::new(),
            lse: Vec::new(),
            regions: shape.regions,
            steps: Vec::new(),
            sources: rung.excerpts()?,
        };
        steps.compute(problem, [q, k, v]);
        steps.tell(rung, problem)?;
        Ok(steps)
    }

    /// Goes over the tiles of keys that the rows see.
    fn compute(&mut self, problem: &Problem, [q, k, v]: [&Tensor; 3]) {
        let (rows, d, keys) = (self.rows, self.columns, self.keys);
        let (seq_q, seq_k) = (problem.seq_q() as i64, problem.seq_k() as i64);
        let last =
            if problem.causal() { (rows as i64 + seq_k - seq_q).clamp(0, seq_k) } else { seq_k };
        let sees = |i: usize, j: usize| {
            (j as i64) < seq_k && (!problem.causal() || j as i64 <= i as i64 + seq_k - seq_q)
        };
        let scale = f64::from(problem.scale());
        let (mut m, mut l) = (vec![f64::NEG_INFINITY; rows], vec![0.0; rows]);
        let mut o = vec![0.0; rows * d];
        for first in (0..last as usize).step_by(keys) {
            let mut tile = Tile {
                s: Vec::new(),
                p: Vec::new(),
                m: Vec::new(),
                l: Vec::new(),
                alpha: Vec::new(),
                o: Vec::new(),
            };
            for i in 0..rows {
                let product =
                    |j: usize| -> f64 { (0..d).map(|c| q.get(i * d + c) * k.get(j * d + c)).sum() };
                let score = |j: usize| sees(i, j).then(|| product(j) * scale);
                let s: Vec<Option<f64>> = (first..first + keys).map(score).collect();
                let m_new = s.iter().flatten().fold(m[i], |a, &b| a.max(b));
                let alpha = if m[i] == f64::NEG_INFINITY { 0.0 } else { (m[i] - m_new).exp() };
                let p: Vec<f64> = s.iter().map(|s| s.map_or(0.0, |s| (s - m_new).exp())).collect();
                l[i] = l[i] * alpha + p.iter().sum::<f64>();
                for c in 0..d {
                    let sum: f64 = (0..keys)
                        .filter(|j| p[*j] > 0.0)
                        .map(|j| p[j] * v.get((first + j) * d + c))
                        .sum();
                    o[i * d + c] = o[i * d + c] * alpha + sum;
                }
                m[i] = m_new;
                tile.s.extend(s.iter().map(|s| s.map(digits)));
                tile.p.extend(p.iter().map(|&p| digits(p)));
                tile.m.push(m_new.is_finite().then(|| digits(m_new)));
                tile.alpha.push(digits(alpha));
            }
            tile.l = l.iter().map(|&l| digits(l)).collect();
            tile.o = o.iter().map(|&o| digits(o)).collect();
            self.tiles.push(tile);
        }
        let normal = |(index, &o): (usize, &f64)| match l[index / d] {
            0.0 => 0.0,
            l => digits(o / l),
        };
        self.o = o.iter().enumerate().map(normal).collect();
        self.lse = (0..rows).map(|i| digits(m[i] + l[i].ln())).collect();
    }

    /// The steps, with their lines.
    fn tell(&mut self, rung: &Rung, problem: &Problem) -> Result<()> {
        let mut holds = vec![String::new(); self.regions.len()];
        let mut after = vec![0; self.sources.len()];
        let mut places = Vec::new();
        for phase in rung.phases {
            places.push(self.lines_of(phase, &mut after)?);
        }
        let all = rung.phases.iter().zip(places);
        let (before, rest): (Vec<_>, Vec<_>) =
            all.partition(|(phase, _)| phase.once == Some(false));
        let (last, each): (Vec<_>, Vec<_>) =
            rest.into_iter().partition(|(phase, _)| phase.once == Some(true));
        for (phase, lines) in before {
            self.add(phase, lines, 0, String::new(), &mut holds);
        }
        for tile in 0..self.tiles.len() {
            let hidden = self.tiles[tile].s.iter().filter(|s| s.is_none()).count();
            for (phase, lines) in &each {
                let mut note = String::new();
                if phase.is_mask {
                    if hidden == 0 {
                        continue;
                    }
                    let what =
                        if problem.causal() { "are later than their row, or" } else { "are" };
                    note = format!("{hidden} entries {what} beyond the last key: -∞.");
                }
                self.add(phase, *lines, tile, note, &mut holds);
            }
        }
        for (phase, lines) in last {
            self.add(phase, lines, self.tiles.len().saturating_sub(1), String::new(), &mut holds);
        }
        Ok(())
    }

    /// The lines of a phase, which come after those of the phase before.
    fn lines_of(&self, phase: &Phase, after: &mut [u32]) -> Result<[u32; 2]> {
        let excerpt = &self.sources[phase.source];
        let find = |text: &str, after: u32| {
            let mut lines = excerpt.lines.iter().zip(excerpt.first..);
            let found = lines.find(|(line, number)| *number > after && line.contains(text));
            found.map(|(_, number)| number).ok_or_else(|| {
                anyhow::anyhow!("{} has no line {text:?} after line {after}", excerpt.file)
            })
        };
        let first = find(phase.from, after[phase.source])?;
        let last = match phase.to {
            To::Lines(count) => first + count - 1,
            To::Before(text) => find(text, first)? - 1,
            To::End => excerpt.first + excerpt.lines.len() as u32 - 1,
        };
        // Without the blank lines at the end.
        let is_blank =
            |number: u32| excerpt.lines[(number - excerpt.first) as usize].trim().is_empty();
        let last = (first..=last).rev().find(|&number| !is_blank(number)).unwrap_or(first);
        after[phase.source] = last;
        Ok([first, last])
    }

    fn add(
        &mut self,
        phase: &Phase,
        lines: [u32; 2],
        tile: usize,
        note: String,
        holds: &mut [String],
    ) {
        let mut memory = Vec::new();
        for ((name, _), holds) in self.regions.iter().zip(holds) {
            let mut does = "";
            if phase.writes.contains(name) {
                *holds = if *name == "Q" { "Q".to_owned() } else { format!("{name}, tile {tile}") };
                does = "write";
            } else if phase.reads.contains(name) {
                does = "read";
            }
            memory.push((holds.clone(), does));
        }
        let file = self.sources[phase.source].file;
        let comment = || Line { file, number: lines[0] }.comment().unwrap_or_default();
        let note = match (note.is_empty(), phase.note) {
            (false, _) => note,
            (true, "") => comment(),
            (true, text) => text.to_owned(),
        };
        self.steps.push(Step {
            title: phase.title.into(),
            note,
            source: phase.source,
            lines,
            tile,
            stage: phase.stage,
            barrier: phase.barrier,
            memory,
        });
    }
}

/// The lines of a file from the one that contains `from` up to the one before `to`.
///
/// # Errors
/// A file without such lines.
pub fn excerpt(file: &'static str, from: &str, to: &str) -> Result<Excerpt> {
    let lines: Vec<&'static str> = source::text(file).lines().collect();
    let first = lines.iter().position(|line| line.contains(from));
    let first = first.ok_or_else(|| anyhow::anyhow!("{file} has no line {from:?}"))?;
    let end = lines[first..].iter().position(|line| line.starts_with(to));
    let end = end.map_or(lines.len(), |end| first + end);
    Ok(Excerpt { file, first: first as u32 + 1, lines: lines[first..end].to_vec() })
}

#[cfg(test)]
mod tests {
    use approx::assert_relative_eq;
    use flash_attention::{DType, oracle};

    use super::*;
    use crate::inputs::Tensors;

    fn steps(kernel: &str, seq: usize, causal: bool) -> (Steps, oracle::Rows) {
        let problem = Problem::builder(1, 1, seq, 64).dtype(DType::F16).causal(causal);
        let problem = problem.build().unwrap();
        let tensors = Tensors::random(&problem, 7);
        let inputs = tensors.inputs();
        let steps = Steps::new(kernel, &problem, [inputs.q, inputs.k, inputs.v]).unwrap();
        let rows: Vec<usize> = (0..steps.rows).collect();
        let right = oracle::reference(&problem, &inputs, &rows);
        (steps, right)
    }

    #[test]
    fn the_last_step_has_the_right_answer() {
        for (kernel, rows, seq, causal, tiles) in [
            ("flash_tiled", 32, 80, false, 3),
            ("flash_tiled", 32, 80, true, 1),
            ("flash_tiled", 20, 20, false, 1),
            ("flash_mma", 64, 130, false, 3),
            ("flash_swizzled", 64, 70, true, 1),
        ] {
            let (steps, right) = steps(kernel, seq, causal);
            assert_eq!((steps.tiles.len(), steps.rows), (tiles, rows), "{kernel}");
            assert_eq!(steps.o.len(), right.o.len());
            for (step, right) in steps.o.iter().zip(&right.o) {
                assert_relative_eq!(*step, *right, max_relative = 1e-3, epsilon = 1e-4);
            }
            for (step, right) in steps.lse.iter().zip(&right.lse) {
                assert_relative_eq!(*step, *right, max_relative = 1e-3);
            }
        }
    }

    /// O of a tile is O of the tile before, scaled, and P V: as long as m does not change, α is 1.
    #[test]
    fn maxima_grow_and_scale_what_was_there() {
        let (steps, _) = steps("flash_tiled", 96, false);
        for pair in steps.tiles.windows(2) {
            for row in 0..steps.rows {
                let [before, after] = [&pair[0], &pair[1]].map(|tile| tile.m[row].unwrap());
                assert!(after >= before);
                let alpha = (before - after).exp();
                assert_relative_eq!(pair[1].alpha[row], alpha, max_relative = 1e-3);
            }
        }
    }

    /// Every step is at lines of the kernel that say so.
    #[test]
    fn steps_are_at_their_lines() {
        let of_tiled = [
            ("Load Q", "scalar_tile::load"),
            ("Barrier of the block", "thread::sync_threads();"),
            ("Load K and V", "v_smem"),
            ("S = Q Kᵀ", "scalar_tile::product"),
            ("Mask", "NEG_INFINITY"),
            ("Online softmax", "math::exp2"),
            ("Barrier of the warp", "warp::sync_warp"),
            ("O += P V", "scalar_tile::add_row"),
            ("Normalise and store", "lse.write"),
        ];
        let of_mma = [
            ("Load Q", "tile::load"),
            ("Barrier of the block", "thread::sync_threads();"),
            ("Load K and V", "v_smem"),
            ("S = Q Kᵀ", "fragment::add_scores"),
            ("Mask", "policy.hide"),
            ("Online softmax", "self.rows.update"),
            ("O += P V", "fragment::add_output"),
            ("Normalise and store", "online::store"),
        ];
        for (kernel, phases) in
            [("flash_tiled", &of_tiled[..]), ("flash_mma", &of_mma), ("flash_turing", &of_mma)]
        {
            let (steps, _) = steps(kernel, 70, true);
            let text = |step: &Step| {
                let Excerpt { first, lines, .. } = &steps.sources[step.source];
                let [from, to] = step.lines.map(|line| (line - first) as usize);
                assert!(from <= to && to < lines.len(), "{}", step.title);
                lines[from..=to].join("\n")
            };
            for (title, part) in phases {
                let found: Vec<&Step> = steps.steps.iter().filter(|s| s.title == *title).collect();
                assert!(!found.is_empty(), "{kernel}: {title}");
                let at_its_lines = |step: &&Step| text(step).contains(part);
                assert!(found.iter().all(at_its_lines), "{kernel}, {title}: {}", text(found[0]));
            }
            let barriers = steps.steps.iter().filter(|step| !step.barrier.is_empty());
            assert!(barriers.into_iter().all(|step| step.note.starts_with("Hazard: ")));
        }
    }
}
