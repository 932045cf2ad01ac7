//! The steps of a kernel's first block on a small problem: its lines, what lies in shared memory, where the lanes are,
//! and which [numbers](super::numbers) there are after each.

use anyhow::{Context as _, Result};
use flash_attention::{Problem, Tensor};
use serde::Serialize;

use super::{
    numbers::{Extent, Numbers},
    rungs::{Order, Phase, Rung, To},
};
use crate::microscope::source::{self, Line};

/// Everything that the page shows.
#[derive(Clone, Debug, Serialize)]
pub struct Steps {
    /// The elements of a tile: keys, or rows.
    pub tiles_of: &'static str,
    /// How many the block goes through.
    pub tiles: usize,
    /// Warps of the block.
    pub warps: usize,
    /// The first warp that does not copy only.
    pub first_consumer: usize,
    /// Regions of shared memory: name and bytes.
    pub regions: Vec<(&'static str, usize)>,
    /// The steps.
    pub steps: Vec<Step>,
    /// The excerpts of the source.
    pub sources: Vec<Excerpt>,
    /// The pictures.
    #[serde(flatten)]
    pub numbers: Numbers,
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

/// One step.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    /// Its title.
    pub title: String,
    /// More about it.
    pub note: String,
    /// Number of its excerpt.
    pub source: usize,
    /// Lines of it, first and last.
    pub lines: [u32; 2],
    /// Which tile it belongs to.
    pub tile: usize,
    /// The matrix that each picture shows after it.
    pub shown: Vec<Option<usize>>,
    /// Which lanes wait, and for whom: "block", "warp" or nobody.
    pub barrier: &'static str,
    /// The content of each region of shared memory, and the access to it: "", "write" or "read".
    pub memory: Vec<(String, &'static str)>,
}

impl Steps {
    /// Of the first block of a kernel on a problem with Q, K and V, `[B, H, N, D]`, and of a backward pass the
    /// gradient of O.
    ///
    /// # Errors
    /// A kernel that has no steps; a source file that no longer has the lines that they are at.
    pub fn new(
        kernel: &str,
        problem: &Problem,
        inputs: [&Tensor; 3],
        d_o: Option<&Tensor>,
    ) -> Result<Self> {
        let rung = Rung::find(kernel).with_context(|| format!("{kernel} has no steps"))?;
        let shape = rung.shape(kernel, problem)?;
        let (order, tile) = (shape.order, Extent { rows: shape.rows, keys: shape.keys });
        let numbers = match d_o {
            Some(d_o) => Numbers::backward(problem, tile, inputs, d_o),
            None => {
                let last = problem.seq_q().div_ceil(shape.rows) - 1;
                let is_last = order.longest_first && problem.causal();
                let first_row = if is_last { last * shape.rows } else { 0 };
                let rows = shape.rows.min(problem.seq_q() - first_row);
                Numbers::forward(problem, order, first_row, Extent { rows, ..tile }, inputs)
            }
        };
        let mut steps = Self {
            tiles_of: if d_o.is_some() { "rows" } else { "keys" },
            tiles: numbers.tiles(),
            warps: shape.warps,
            first_consumer: if kernel.ends_with("_hopper") { 4 } else { 0 },
            regions: shape.regions,
            steps: Vec::new(),
            sources: rung.excerpts()?,
            numbers,
        };
        steps.tell(rung, problem, order)?;
        Ok(steps)
    }

    /// The steps, with their lines.
    fn tell(&mut self, rung: &Rung, problem: &Problem, order: Order) -> Result<()> {
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
        let in_tiles: &[_] = if self.tiles_of == "rows" { &["Q", "dO"] } else { &["K", "V"] };
        let holds = vec![String::new(); self.regions.len()];
        let mut memory = Memory { holds, order, in_tiles };
        for (phase, lines) in before {
            self.add(phase, lines, 0, problem, &mut memory);
        }
        for tile in usize::from(order.first_is_apart)..self.tiles {
            for (phase, lines) in &each {
                let tile = tile - usize::from(phase.of_before);
                self.add(phase, *lines, tile, problem, &mut memory);
            }
        }
        for (phase, lines) in last {
            self.add(phase, lines, self.tiles.saturating_sub(1), problem, &mut memory);
        }
        Ok(())
    }

    /// The lines of a phase, which come after the lines of the phase before, or else anywhere.
    fn lines_of(&self, phase: &Phase, after: &mut [u32]) -> Result<[u32; 2]> {
        let excerpt = &self.sources[phase.source];
        let find = |text: &str, after: u32| {
            let mut lines = excerpt.lines.iter().zip(excerpt.first..);
            let found = lines.find(|(line, number)| *number > after && line.contains(text));
            found.map(|(_, number)| number).ok_or_else(|| {
                anyhow::anyhow!("{} has no line {text:?} after line {after}", excerpt.file)
            })
        };
        let first = find(phase.from, after[phase.source]).or_else(|_| find(phase.from, 0))?;
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

    /// Adds a step, unless it has nothing to do: no tile, none that follows, nothing that is hidden.
    fn add(
        &mut self,
        phase: &Phase,
        lines: [u32; 2],
        tile: usize,
        problem: &Problem,
        memory: &mut Memory,
    ) {
        let is_last = tile + 1 >= self.tiles;
        if is_last && phase.writes.iter().chain(phase.reads).any(|name| name.starts_with('+')) {
            return;
        }
        let mut note = String::new();
        if phase.is_mask {
            let hidden = self.numbers.hidden.get(tile).copied().unwrap_or_default();
            if hidden == 0 {
                return;
            }
            let what = if problem.causal() { "are later than their row, or" } else { "are" };
            note = format!("{hidden} entries {what} beyond the last key or row: -∞.");
        }
        let memory = memory.after(phase, tile, &self.regions);
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
            shown: self.numbers.shown(tile, phase.stage),
            barrier: phase.barrier,
            memory,
        });
    }
}

/// The content of shared memory.
struct Memory {
    /// The content of each region.
    holds: Vec<String>,
    order: Order,
    /// The elements that come in tiles.
    in_tiles: &'static [&'static str],
}

impl Memory {
    /// The content of the regions after a phase of a tile, and the phase's access to them.
    fn after(
        &mut self,
        phase: &Phase,
        tile: usize,
        regions: &[(&str, usize)],
    ) -> Vec<(String, &'static str)> {
        let Order { stages, .. } = self.order;
        // The tile whose part of a region this is, if the phase names it.
        let of = |names: &[&str], region: &str| {
            names.iter().find_map(|name| {
                let (name, tile) = match name.strip_prefix('+') {
                    Some(name) => (name, tile + 1),
                    None => (*name, tile),
                };
                let in_stages = format!("{name} {}", tile % stages);
                (region == name || region == in_stages).then_some((name.to_owned(), tile))
            })
        };
        let mut memory = Vec::new();
        for ((region, _), holds) in regions.iter().zip(&mut self.holds) {
            let mut does = "";
            if let Some((name, tile)) = of(phase.writes, region) {
                *holds = if phase.once == Some(false) && !self.in_tiles.contains(&&*name) {
                    name
                } else {
                    format!("{name}, tile {}", tile + 1)
                };
                does = "write";
            } else if of(phase.reads, region).is_some() {
                does = "read";
            }
            memory.push((holds.clone(), does));
        }
        memory
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

    fn steps_of(kernel: &str, seq: usize, causal: bool) -> (Steps, Problem, Tensors, Tensor) {
        let dtype = if kernel == "flash_tf32" { DType::F32 } else { DType::F16 };
        let problem = Problem::builder(1, 1, seq, 64).dtype(dtype).causal(causal);
        let problem = problem.build().unwrap();
        let tensors = Tensors::random(&problem, 7);
        let d_o = Tensor::random(dtype, &problem.o_shape(), 8, 0.0);
        let inputs = tensors.inputs();
        let of_backward = kernel.starts_with("backward").then_some(&d_o);
        let steps = Steps::new(kernel, &problem, [inputs.q, inputs.k, inputs.v], of_backward);
        (steps.unwrap(), problem, tensors, d_o)
    }

    fn steps(kernel: &str, seq: usize, causal: bool) -> Steps {
        steps_of(kernel, seq, causal).0
    }

    fn are_close(found: &[f64], right: &[f64]) {
        assert_eq!(found.len(), right.len());
        for (found, right) in found.iter().zip(right) {
            assert_relative_eq!(*found, *right, max_relative = 1e-9, epsilon = 1e-9);
        }
    }

    #[test]
    fn the_last_step_has_the_right_answer() {
        for (kernel, first_row, rows, seq, causal, tiles) in [
            ("naive", 0, 40, 40, true, 1),
            ("standard", 0, 40, 40, false, 1),
            ("flash_tiled", 0, 32, 80, false, 3),
            ("flash_tiled", 0, 32, 80, true, 1),
            ("flash_tiled", 0, 20, 20, false, 1),
            ("flash_mma", 0, 64, 130, false, 3),
            ("flash_swizzled", 0, 64, 70, true, 1),
            ("flash_async", 0, 64, 150, false, 3),
            ("flash_pipelined", 0, 128, 200, false, 4),
            // The last rows, which see most.
            ("flash_pipelined", 128, 72, 200, true, 4),
            ("flash_tf32", 0, 128, 140, false, 5),
            ("flash_tf32", 128, 12, 140, true, 5),
            ("flash_hopper", 0, 128, 300, false, 3),
            ("flash_hopper", 256, 44, 300, true, 3),
        ] {
            let (steps, problem, tensors, _) = steps_of(kernel, seq, causal);
            assert_eq!(steps.tiles, tiles, "{kernel}");
            let rows: Vec<usize> = (first_row..first_row + rows).collect();
            let right = oracle::reference(&problem, &tensors.inputs(), &rows);
            let [o, lse] = &steps.numbers.results[..] else { panic!("O and LSE") };
            are_close(o, &right.o);
            are_close(lse, &right.lse);
            let last = steps.steps.last().unwrap().shown[3].unwrap();
            assert_eq!(steps.numbers.matrices[last].title, "O, normalised", "{kernel}");
        }
    }

    /// dK and dV of the first keys; dQ where all keys are in one tile.
    #[test]
    fn the_last_step_has_the_right_gradients() {
        for (kernel, keys, seq, causal, tiles) in [
            ("backward_naive", 40, 40, true, 1),
            ("backward_tiled", 32, 80, true, 3),
            ("backward_mma", 128, 150, false, 2),
            ("backward_mma", 60, 60, true, 1),
            ("backward_hopper", 128, 300, true, 3),
            ("backward_hopper", 100, 100, false, 1),
        ] {
            let (steps, problem, tensors, d_o) = steps_of(kernel, seq, causal);
            assert_eq!(steps.tiles, tiles, "{kernel}");
            let right = oracle::gradients(&problem, &tensors.inputs(), &d_o, &[0]);
            let [dk, dv, dq] = &steps.numbers.results[..] else { panic!("dK, dV, dQ") };
            are_close(dk, &right.dk[..keys.min(seq) * 64]);
            are_close(dv, &right.dv[..keys.min(seq) * 64]);
            if keys >= seq {
                are_close(dq, &right.dq);
            }
        }
    }

    /// O of a tile is O of the tile before, scaled, and P V: as long as m does not change, α is 1.
    #[test]
    fn maxima_grow_and_scale_what_was_there() {
        let steps = steps("flash_tiled", 96, false);
        let of_tile = |tile: usize| {
            let shown = steps.numbers.shown(tile, super::super::numbers::Stage::Output);
            &steps.numbers.matrices[shown[2].unwrap()]
        };
        for tile in 1..steps.tiles {
            let (before, after) = (of_tile(tile - 1), of_tile(tile));
            for row in 0..after.width {
                let [before, m] = [before, after].map(|matrix| matrix.values[row].unwrap());
                let alpha = after.values[2 * after.width + row].unwrap();
                assert!(m >= before);
                assert_relative_eq!(alpha, (before - m).exp(), max_relative = 1e-3);
            }
        }
    }

    /// Every kernel of both passes can be gone through.
    #[test]
    fn every_rung_has_steps() {
        use flash_attention::registry::{BACKWARD_KERNELS, KERNELS};
        let names = KERNELS.iter().map(|k| k.name).chain(BACKWARD_KERNELS.iter().map(|k| k.name));
        for name in names {
            let steps = steps(name, 130, false);
            assert!(steps.steps.len() >= 4, "{name}");
            let pictures = steps.steps.iter().filter(|step| step.shown.iter().any(Option::is_some));
            assert!(pictures.count() >= 3, "{name}");
        }
    }

    /// Tiles take the stages in turns, and what is read lies there.
    #[test]
    fn what_is_read_has_been_written() {
        for kernel in Rung::kernels() {
            // More tiles than flash_hopper has stages; where there is no tile, N² numbers.
            let seq = if kernel == "flash_hopper" { 600 } else { 150 };
            let steps = steps(&kernel, seq, false);
            let mut read = 0;
            for step in &steps.steps {
                for ((name, _), (holds, does)) in steps.regions.iter().zip(&step.memory) {
                    if *does != "read" {
                        continue;
                    }
                    read += 1;
                    // The next tile is begun with what was copied for it: K, or of a backward pass Q.
                    let begun = if kernel.starts_with("backward") { "Q" } else { "K" };
                    let of_next = ["Start S of the next", "Start Sᵀ of the next"]
                        .iter()
                        .any(|title| step.title.starts_with(title));
                    let (name, _) = name.split_once(' ').unwrap_or((name, ""));
                    let tile = step.tile + if of_next && name == begun { 2 } else { 1 };
                    let stays = if kernel.starts_with("backward") { ["K", "V"] } else { ["Q", ""] };
                    let right = if stays.contains(&name) {
                        name.to_owned()
                    } else {
                        format!("{name}, tile {tile}")
                    };
                    assert_eq!(*holds, right, "{kernel}, {name}: {}", step.title);
                }
            }
            assert!(read >= 2 * steps.tiles || steps.regions.is_empty(), "{kernel}");
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
        let of_async = [
            ("Start the copies of Q and of the first tile", "tile::load_async"),
            ("Wait for the copies", "async_copy::wait::<0>"),
            ("Start the copies of the next tile", "kv.start(kv_tile + 1, stage ^ 1)"),
            ("S = Q Kᵀ", "fragment::add_scores"),
            ("Normalise and store", "online::store"),
        ];
        let of_pipelined = [
            ("Start the copies of Q and of the first tile", "tile::load_async"),
            ("Q to registers, where it is kept there", "RegisterQueries"),
            ("Ask for the next task", ".ask()"),
            ("P, and O += P V", "add_output_step"),
            ("Take the answer", "next_task.write"),
            ("Normalise and store", "online::store"),
        ];
        let of_tf32 = [
            ("Start the copies of the next tile", "kv.start(kv_tile + 1, stage ^ 1)"),
            ("S = Q Kᵀ", "add_scores_step"),
            ("Mask", "shape_and_hide"),
            ("P, and O += P V", "add_output::<Ampere"),
            ("Normalise and store", "store::<HALVES"),
        ];
        let of_backward_tiled = [
            ("Load K and V", "load_keys"),
            ("Load Q and dO", "load_rows"),
            ("S = Q Kᵀ, dP = dO Vᵀ", "scalar_tile::product::<D>(self.d_o"),
            ("P and dS", "gradient::of_score"),
            ("dV += Pᵀ dO, dK += dSᵀ Q", "&mut dk, ds"),
            ("Store dK and dV", "scalar_tile::store"),
        ];
        let of_backward_mma = [
            ("Start the copies of K and V", "tiles.v)"),
            ("Sᵀ = K Qᵀ", "tiles.k, place.key"),
            ("P = exp(S - LSE)", "weigh::<T"),
            ("dPᵀ = V dOᵀ - delta", "tiles.v, place.key"),
            ("dS = P (dP - delta)", "differentiate::<SCORE_TILES"),
            ("P and dS to shared memory", "store_scores::<T"),
            ("dV += Pᵀ dO, dK += dSᵀ Q over the warp's rows", "add_own::<T"),
            ("The same over the other warp's rows", "add_other::<T"),
            ("dQ += dS K", "add_output_step::<T"),
            ("Add dQ in memory", "add_to_memory"),
            ("Store dK and dV", "store::<T"),
        ];
        let of_backward_hopper = [
            ("Producer: copy V", "tiles.v()"),
            ("Start Sᵀ = K Qᵀ", "&mut self.s"),
            ("Start dPᵀ = V dOᵀ", "&mut self.dp"),
            ("P = exp(S - LSE)", "self.s.weigh"),
            ("Start dV += Pᵀ dO", "self.start_dv"),
            ("dS = P (dP - delta)", "self.s.differentiate"),
            ("dS to shared memory", "share_scores::<T>"),
            ("Start dQ = dS K and dK += dSᵀ Q", "self.start_dk"),
            ("Wait for dQ", "dq.wait_group::<1>"),
            ("Hand dQ over", "barrier::sync(NamedBarrier::DqEmpty"),
            ("Add dQ in memory", "tma::reduce_add_f32"),
            ("Store dK and dV", "store_keys::<G>"),
        ];
        let of_hopper = [
            ("Producer: copy Q", "copy_q"),
            ("Producer: K of the next tile, V of this one", "copy_v(stage.before(), task, tile)"),
            ("Start S = Q Kᵀ", "G::start_scores"),
            ("Wait for S", "self.s.wait_group"),
            ("Mask", "self.mask"),
            ("The first softmax", "self.s.weigh"),
            ("Online softmax", "self.softmax(CUT)"),
            ("Wait for O, and scale it", "self.acc_o.scale_rows"),
            ("Give V back, ask for K", "self.look_for_k"),
            ("Start the last O += P V", "self.start_output"),
            ("Normalise and store", "tma::commit_group"),
        ];
        for (kernel, phases) in [
            ("flash_tiled", &of_tiled[..]),
            ("flash_mma", &of_mma),
            ("flash_turing", &of_mma),
            ("flash_async", &of_async),
            ("flash_pipelined", &of_pipelined),
            ("flash_tf32", &of_tf32),
            ("flash_hopper", &of_hopper),
            ("backward_tiled", &of_backward_tiled),
            ("backward_mma", &of_backward_mma),
            ("backward_hopper", &of_backward_hopper),
        ] {
            // With a diagonal the first block of flash_async has one tile, which no other follows.
            let seq = if kernel.ends_with("_hopper") { 300 } else { 70 };
            let steps = steps(kernel, seq, kernel != "flash_async");
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
            let barriers =
                steps.steps.iter().filter(|step| ["block", "warp"].contains(&step.barrier));
            assert!(barriers.into_iter().all(|step| step.note.starts_with("Hazard")));
        }
    }
}
