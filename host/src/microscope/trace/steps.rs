//! The steps of flash_tiled's first block on a small problem, with the numbers that it has after each: S, P, the
//! running maximum and sum, O; what lies in shared memory; where the lanes are. The numbers are worked out here in
//! f64 from the same Q, K and V, tile by tile as the kernel goes; the lines are the kernel's.

use anyhow::{Context as _, Result};
use flash_attention::{Problem, Tensor};
use serde::Serialize;

use crate::microscope::source::{self, Line};

/// The kernel's file, and that of its tiles.
const FILE: &str = "kernels-gpu/src/forward/flash_tiled.rs";
const TILES: &str = "kernels-gpu/src/parts/scalar_tile.rs";
/// Elements that a row of a tile in shared memory is longer by.
const PADDING: usize = 4;

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
    /// The kernel's body: the first line's number, and the lines.
    pub first_line: u32,
    /// The lines.
    pub source: Vec<&'static str>,
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
    /// Lines of the source, first and last.
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

/// The number that a constant of the source has.
fn constant(file: &str, name: &str) -> Result<usize> {
    let begin = format!("pub const {name}: u32 = ");
    let line = source::text(file).lines().find_map(|line| line.trim().strip_prefix(&begin));
    let number = line.and_then(|rest| rest.trim_end_matches(';').parse().ok());
    number.with_context(|| format!("{file} has no number {name}"))
}

/// The first line from `after` on that contains `text`.
fn line_of(text: &str, after: u32) -> Result<u32> {
    let lines = source::text(FILE).lines().enumerate().skip(after as usize);
    let found = lines.map(|(i, line)| (i as u32 + 1, line)).find(|(_, line)| line.contains(text));
    found.map(|(number, _)| number).with_context(|| format!("{FILE} has no line {text:?}"))
}

fn digits(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let scale = 10f64.powi(4 - value.abs().log10().floor() as i32);
    (value * scale).round() / scale
}

impl Steps {
    /// Of the first block of a problem with Q, K and V, `[B, H, N, D]`.
    ///
    /// # Errors
    /// A source file that no longer has the lines that the steps are at.
    pub fn new(problem: &Problem, [q, k, v]: [&Tensor; 3]) -> Result<Self> {
        let tile = constant(TILES, "ROWS")?;
        let threads = constant(TILES, "THREADS")?;
        let d = problem.head_dim();
        let rows = tile.min(problem.seq_q());
        let mut steps = Self {
            rows,
            columns: d,
            keys: tile,
            warps: threads / 32,
            tiles: Vec::new(),
            o: Vec::new(),
            lse: Vec::new(),
            regions: Self::regions(tile, d),
            steps: Vec::new(),
            first_line: 0,
            source: Vec::new(),
        };
        steps.compute(problem, [q, k, v]);
        steps.tell(problem)?;
        Ok(steps)
    }

    fn regions(tile: usize, d: usize) -> Vec<(&'static str, usize)> {
        let bytes = |columns: usize| 4 * tile * (columns + PADDING);
        vec![("Q", bytes(d)), ("K", bytes(d)), ("V", bytes(d)), ("P", bytes(tile))]
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
    fn tell(&mut self, problem: &Problem) -> Result<()> {
        let body = line_of("pub unsafe fn flash_tiled", 0)?;
        let end = line_of("entries! {", body)? - 1;
        let at = |text: &str, after: u32| line_of(text, after);
        let load_q = at("// Load Q.", body)?;
        let start = at("let mut m_i", load_q)?;
        let barrier = at("thread::sync_threads();", start)?;
        let loaded = at("thread::sync_threads();", barrier)?;
        let product = at("scalar_tile::product", loaded)?;
        let mask = at("// Shape and mask.", product)?;
        let softmax = at("// Online softmax", mask)?;
        let dropout = at("if Policy::drops()", softmax)?;
        let warp_barrier = at("warp::sync_warp(FULL_MASK);", dropout)?;
        let output = at("// O += P V.", warp_barrier)?;
        let normalise = at("// Normalise, store", output)?;
        let tile_name = |name: &str, tile: usize| format!("{name}, tile {tile}");
        let why = |line: u32| Line { file: FILE, number: line }.comment().unwrap_or_default();
        let nothing = || (String::new(), "");
        let q = |what| ("Q".to_owned(), what);

        self.first_line = body;
        self.source = source::text(FILE)
            .lines()
            .skip(body as usize - 1)
            .take((end - body) as usize)
            .collect();
        let mut steps = vec![Step {
            title: "Load Q".into(),
            note: format!(
                "All {} threads copy {} rows of Q to shared memory, as f32. m = -∞, l = 0, O = 0.",
                32 * self.warps,
                self.rows
            ),
            lines: [load_q, start + 2],
            tile: 0,
            stage: Stage::Before,
            barrier: "",
            memory: vec![q("write"), nothing(), nothing(), nothing()],
        }];
        for tile in 0..self.tiles.len() {
            let [k, v, p] = ["K", "V", "P"].map(|name| tile_name(name, tile));
            let before = |name: &str| match tile {
                0 => nothing(),
                _ => (tile_name(name, tile - 1), ""),
            };
            let hidden = self.tiles[tile].s.iter().filter(|s| s.is_none()).count();
            let mut step = |title: &str, note: String, lines, stage, barrier, memory| {
                steps.push(Step { title: title.into(), note, lines, tile, stage, barrier, memory });
            };
            step(
                "Barrier of the block",
                why(barrier),
                [barrier, barrier],
                Stage::Before,
                "block",
                vec![q(""), before("K"), before("V"), before("P")],
            );
            step(
                "Load K and V",
                format!(
                    "Keys {} to {} and their values.",
                    tile * self.keys,
                    (tile + 1) * self.keys - 1
                ),
                [barrier + 1, loaded - 2],
                Stage::Before,
                "",
                vec![q(""), (k.clone(), "write"), (v.clone(), "write"), before("P")],
            );
            step(
                "Barrier of the block",
                why(loaded),
                [loaded, loaded],
                Stage::Before,
                "block",
                vec![q(""), (k.clone(), ""), (v.clone(), ""), before("P")],
            );
            step(
                "S = Q Kᵀ",
                "Each thread computes 2 rows and 4 keys of S in its registers.".into(),
                [product - 1, product],
                Stage::Scores,
                "",
                vec![q("read"), (k.clone(), "read"), (v.clone(), ""), before("P")],
            );
            if hidden > 0 {
                let what = if problem.causal() { "are later than their row, or" } else { "are" };
                step(
                    "Mask",
                    format!("{hidden} entries {what} beyond the last key: -∞."),
                    [mask, softmax - 2],
                    Stage::Scores,
                    "",
                    vec![q(""), (k.clone(), ""), (v.clone(), ""), before("P")],
                );
            }
            step(
                "Online softmax",
                "m grows to the largest score so far; α = exp(m before - m) scales l and O of the tiles before; \
                 P = exp(S - m) goes to shared memory, and l takes its row sums."
                    .into(),
                [softmax, dropout - 1],
                Stage::Softmax,
                "",
                vec![q(""), (k.clone(), ""), (v.clone(), ""), (p.clone(), "write")],
            );
            step(
                "Barrier of the warp",
                why(warp_barrier),
                [warp_barrier, warp_barrier],
                Stage::Softmax,
                "warp",
                vec![q(""), (k.clone(), ""), (v.clone(), ""), (p.clone(), "")],
            );
            step(
                "O += P V",
                "Each thread reads its rows of P and all of V.".into(),
                [output, normalise - 3],
                Stage::Output,
                "",
                vec![q(""), (k, ""), (v, "read"), (p, "read")],
            );
        }
        let last = self.tiles.len().saturating_sub(1);
        let memory = steps.last().map_or_else(Vec::new, |step| {
            step.memory.iter().map(|(name, _)| (name.clone(), "")).collect()
        });
        steps.push(Step {
            title: "Normalise and store".into(),
            note: "O / l goes to global memory, and LSE = m + log(l).".into(),
            lines: [normalise, end - 2],
            tile: last,
            stage: Stage::Done,
            barrier: "",
            memory,
        });
        self.steps = steps;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use approx::assert_relative_eq;
    use flash_attention::{DType, oracle};

    use super::*;
    use crate::inputs::Tensors;

    fn steps(seq: usize, causal: bool) -> (Steps, oracle::Rows) {
        let problem = Problem::builder(1, 1, seq, 32).dtype(DType::F16).causal(causal);
        let problem = problem.build().unwrap();
        let tensors = Tensors::random(&problem, 7);
        let inputs = tensors.inputs();
        let steps = Steps::new(&problem, [inputs.q, inputs.k, inputs.v]).unwrap();
        let rows: Vec<usize> = (0..steps.rows).collect();
        let right = oracle::reference(&problem, &inputs, &rows);
        (steps, right)
    }

    #[test]
    fn the_last_step_has_the_right_answer() {
        for (seq, causal, tiles) in [(80, false, 3), (80, true, 1), (20, false, 1)] {
            let (steps, right) = steps(seq, causal);
            assert_eq!((steps.tiles.len(), steps.rows), (tiles, seq.min(32)));
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
        let (steps, _) = steps(96, false);
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
        let (steps, _) = steps(40, true);
        let text = |step: &Step| {
            let [first, last] = step.lines.map(|line| (line - steps.first_line) as usize);
            assert!(first <= last && last < steps.source.len(), "{}", step.title);
            steps.source[first..=last].join("\n")
        };
        for (title, part) in [
            ("Load Q", "scalar_tile::load"),
            ("Barrier of the block", "thread::sync_threads();"),
            ("Load K and V", "v_smem"),
            ("S = Q Kᵀ", "scalar_tile::product"),
            ("Mask", "NEG_INFINITY"),
            ("Online softmax", "math::exp2"),
            ("Barrier of the warp", "warp::sync_warp"),
            ("O += P V", "scalar_tile::add_row"),
            ("Normalise and store", "lse.write"),
        ] {
            let found: Vec<&Step> = steps.steps.iter().filter(|s| s.title == title).collect();
            assert!(!found.is_empty(), "{title}");
            assert!(
                found.iter().all(|step| text(step).contains(part)),
                "{title}: {}",
                text(found[0])
            );
        }
        let barriers = steps.steps.iter().filter(|step| !step.barrier.is_empty());
        assert!(barriers.into_iter().all(|step| step.note.starts_with("Hazard: ")));
    }
}
