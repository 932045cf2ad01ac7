//! The kernels that can be gone through step by step, and the phases of a tile of keys in their source.

mod backward;
mod forward;

use anyhow::Result;
use flash_attention::Problem;

use super::{
    numbers::Stage,
    steps::{Excerpt, excerpt},
};

/// Where the lines of a phase end.
#[derive(Clone, Copy, Debug)]
pub enum To {
    /// After that many lines.
    Lines(u32),
    /// Before the line that contains this.
    Before(&'static str),
    /// With the excerpt.
    End,
}

/// Something that the kernel does for a tile of keys, or once.
#[derive(Clone, Copy, Debug)]
pub struct Phase {
    /// Its name.
    pub title: &'static str,
    /// More; the comment above its first line if empty.
    pub note: &'static str,
    /// Number of the excerpt that it stands in.
    pub source: usize,
    /// A part of its first line.
    pub from: &'static str,
    /// Its last line.
    pub to: To,
    /// The stage of the numbers after it.
    pub stage: Stage,
    /// Which lanes wait: "block", "warp", "consumers" or none.
    pub barrier: &'static str,
    /// Regions of shared memory that it writes. A `+` stands for the next tile: the last tile has no such phase.
    pub writes: &'static [&'static str],
    /// Regions that it reads.
    pub reads: &'static [&'static str],
    /// Once before the tiles (`false`) or after them (`true`); for each tile if none.
    pub once: Option<bool>,
    /// Only where something is hidden.
    pub is_mask: bool,
    /// It belongs to the tile before.
    pub of_before: bool,
}

impl Phase {
    const fn new(
        title: &'static str,
        source: usize,
        from: &'static str,
        to: To,
        stage: Stage,
    ) -> Self {
        Self {
            title,
            note: "",
            source,
            from,
            to,
            stage,
            barrier: "",
            writes: &[],
            reads: &[],
            once: None,
            is_mask: false,
            of_before: false,
        }
    }

    const fn note(mut self, note: &'static str) -> Self {
        self.note = note;
        self
    }

    const fn memory(
        mut self,
        writes: &'static [&'static str],
        reads: &'static [&'static str],
    ) -> Self {
        (self.writes, self.reads) = (writes, reads);
        self
    }

    const fn once(mut self, after: bool) -> Self {
        self.once = Some(after);
        self
    }

    const fn barrier(self, of: &'static str) -> Self {
        Self { barrier: of, ..self }
    }

    const fn mask(self) -> Self {
        Self { is_mask: true, ..self }
    }

    const fn stage(self, stage: Stage) -> Self {
        Self { stage, ..self }
    }

    const fn of_before(self) -> Self {
        Self { of_before: true, ..self }
    }
}

/// Tiles, threads and shared memory of a block.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Rows of Q.
    pub rows: usize,
    /// Keys of a tile.
    pub keys: usize,
    /// Warps.
    pub warps: usize,
    /// Regions of shared memory: name and bytes. With several stages, the regions of K and of V have a
    /// number behind their name.
    pub regions: Vec<(&'static str, usize)>,
    /// How blocks and tiles follow each other.
    pub order: Order,
}

/// How blocks and tiles follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    /// Stages of K and of V, which tiles take in turns.
    pub stages: usize,
    /// With a diagonal the first block has the last rows, which see most.
    pub longest_first: bool,
    /// The last keys come first.
    pub descending: bool,
    /// The phases that come once, before, include the phases of the first tile.
    pub first_is_apart: bool,
}

impl Order {
    const PLAIN: Self =
        Self { stages: 1, longest_first: false, descending: false, first_is_apart: false };
}

/// Kernels with the same phases.
#[derive(Clone, Copy, Debug)]
pub struct Rung {
    /// Their names.
    pub kernels: &'static [&'static str],
    /// Their phases, in the order of the source.
    pub phases: &'static [Phase],
    /// File, what the first line contains, how the line after the last begins.
    excerpts: &'static [(&'static str, &'static str, &'static str)],
    shape: fn(&str, &Problem) -> Result<Shape>,
}

const SYNC: &str = "thread::sync_threads();";
/// The barrier of a block.
const BARRIER: Phase =
    Phase::new("Barrier of the block", 0, SYNC, To::Lines(1), Stage::Before).barrier("block");
const AHEAD: &str = "The next tile is copied while this one is computed with.";

/// The shape of a rung that is shown as a whole, since its scores are a matrix in memory.
fn whole(_: &str, problem: &Problem) -> Result<Shape> {
    let (rows, keys) = (problem.seq_q(), problem.seq_k());
    Ok(Shape { rows, keys, warps: 8, regions: Vec::new(), order: Order::PLAIN })
}

impl Rung {
    /// Every one.
    fn all() -> impl Iterator<Item = &'static Self> {
        forward::RUNGS.iter().chain(&backward::RUNGS)
    }

    /// That of a kernel.
    #[must_use]
    pub fn find(kernel: &str) -> Option<&'static Self> {
        Self::all().find(|rung| rung.kernels.contains(&kernel))
    }

    /// The kernels that can be gone through.
    #[must_use]
    pub fn kernels() -> Vec<String> {
        Self::all().flat_map(|rung| rung.kernels).map(ToString::to_string).collect()
    }

    /// Tiles, threads and shared memory of one of the kernels for a problem.
    ///
    /// # Errors
    /// A source file without the constants.
    pub fn shape(&self, kernel: &str, problem: &Problem) -> Result<Shape> {
        (self.shape)(kernel, problem)
    }

    /// The excerpts of the source.
    ///
    /// # Errors
    /// A source file without the lines.
    pub fn excerpts(&self) -> Result<Vec<Excerpt>> {
        self.excerpts.iter().map(|&(file, from, to)| excerpt(file, from, to)).collect()
    }
}
