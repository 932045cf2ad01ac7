//! The kernels that can be gone through step by step, and the phases of a tile of keys in their source.

use anyhow::{Context as _, Result};

use super::steps::{Excerpt, Stage, excerpt};
use crate::microscope::source;

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
    /// What.
    pub title: &'static str,
    /// More; the comment above its first line if empty.
    pub note: &'static str,
    /// Number of the excerpt that it stands in.
    pub source: usize,
    /// What its first line contains.
    pub from: &'static str,
    /// Its last line.
    pub to: To,
    /// What is there after it.
    pub stage: Stage,
    /// Which lanes wait: "block", "warp" or none.
    pub barrier: &'static str,
    /// Regions of shared memory that it writes.
    pub writes: &'static [&'static str],
    /// Regions that it reads.
    pub reads: &'static [&'static str],
    /// Once before the tiles (`false`) or after them (`true`); for each tile if none.
    pub once: Option<bool>,
    /// Only where something is hidden.
    pub is_mask: bool,
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
    /// Regions of shared memory: name and bytes.
    pub regions: Vec<(&'static str, usize)>,
}

/// Kernels with the same phases.
#[derive(Clone, Copy, Debug)]
pub struct Rung {
    /// Their names.
    pub kernels: &'static [&'static str],
    /// What they do, in the order of the source.
    pub phases: &'static [Phase],
    /// File, what the first line contains, how the line after the last begins.
    excerpts: &'static [(&'static str, &'static str, &'static str)],
    shape: fn(&str, usize) -> Result<Shape>,
}

const TILED: &str = "kernels-gpu/src/forward/flash_tiled.rs";
const SCALAR_TILE: &str = "kernels-gpu/src/parts/scalar_tile.rs";
const MMA: &str = "kernels-gpu/src/forward/flash_mma.rs";
const ATTEND: &str = "kernels-gpu/src/parts/attend.rs";

const SYNC: &str = "thread::sync_threads();";
const SCORES: &str = "S = Q Kᵀ";
const SOFTMAX: &str = "m grows to the largest score so far; α = exp(m before - m) scales l and O of the tiles before; \
                       P = exp(S - m) takes the place of S, and l takes its row sums.";
const STORE: &str = "O / l goes to global memory, and LSE = m + log(l).";

/// The kernels.
pub static RUNGS: [Rung; 2] = [
    Rung {
        kernels: &["flash_tiled"],
        excerpts: &[(TILED, "pub unsafe fn flash_tiled", "entries! {")],
        shape: |_, d| {
            let rows = constant(SCALAR_TILE, "ROWS")?;
            // As f32, of the entry's columns, rows 4 elements longer than they are wide.
            let d = d.next_multiple_of(32);
            let bytes = |columns: usize| 4 * rows * (columns + 4);
            let regions = vec![("Q", bytes(d)), ("K", bytes(d)), ("V", bytes(d)), ("P", bytes(rows))];
            let warps = constant(SCALAR_TILE, "THREADS")? / 32;
            Ok(Shape { rows, keys: rows, warps, regions })
        },
        phases: &[
            Phase::new("Load Q", 0, "// Load Q.", To::Before("for tile in"), Stage::Before)
                .note("All threads copy the rows of Q to shared memory, as f32. m = -∞, l = 0, O = 0.")
                .memory(&["Q"], &[])
                .once(false),
            Phase::new("Barrier of the block", 0, SYNC, To::Lines(1), Stage::Before).barrier("block"),
            Phase::new("Load K and V", 0, "// SAFETY", To::Before("// Hazard"), Stage::Before)
                .note("All threads copy the next keys and their values to shared memory, as f32.")
                .memory(&["K", "V"], &[]),
            Phase::new("Barrier of the block", 0, SYNC, To::Lines(1), Stage::Before).barrier("block"),
            Phase::new(SCORES, 0, "// S = Q", To::Before("// Shape and mask"), Stage::Scores)
                .note("Each thread computes 2 rows and 4 keys of S in its registers.")
                .memory(&[], &["Q", "K"]),
            Phase::new("Mask", 0, "// Shape and mask", To::Before("// Online softmax"), Stage::Scores)
                .mask(),
            Phase::new("Online softmax", 0, "// Online softmax", To::Before("if Policy::drops"), Stage::Softmax)
                .note(SOFTMAX)
                .memory(&["P"], &[]),
            Phase::new("Barrier of the warp", 0, "warp::sync_warp", To::Lines(1), Stage::Softmax)
                .barrier("warp"),
            Phase::new("O += P V", 0, "// O += P V", To::Before("    // Normalise"), Stage::Output)
                .note("Each thread reads its rows of P and all of V.")
                .memory(&[], &["V", "P"]),
            Phase::new("Normalise and store", 0, "// Normalise", To::End, Stage::Done)
                .note(STORE)
                .once(true),
        ],
    },
    Rung {
        kernels: &["flash_mma", "flash_swizzled", "flash_turing"],
        excerpts: &[(MMA, "// Who am I.", "entries! {"), (ATTEND, "pub fn attend", "}")],
        shape: |kernel, d| {
            let (rows, keys) = (constant(ATTEND, "BR")?, constant(ATTEND, "BC")?);
            // Of 16 bits, of the entry's columns; flash_mma's rows are a chunk longer.
            let padding = if kernel == "flash_mma" { 8 } else { 0 };
            let row = 2 * (d.next_multiple_of(64) + padding);
            let regions = vec![("Q", rows * row), ("K", keys * row), ("V", keys * row)];
            Ok(Shape { rows, keys, warps: rows / 16, regions })
        },
        phases: &[
            Phase::new("Load Q", 0, "// Load Q.", To::Before("for kv_tile in"), Stage::Before)
                .note("All threads copy the rows of Q to shared memory. m = -∞, l = 0, O = 0.")
                .memory(&["Q"], &[])
                .once(false),
            Phase::new("Barrier of the block", 0, SYNC, To::Lines(1), Stage::Before).barrier("block"),
            Phase::new("Load K and V", 0, "tile::load", To::Lines(2), Stage::Before)
                .note("All threads copy the next keys and their values to shared memory.")
                .memory(&["K", "V"], &[]),
            Phase::new("Barrier of the block", 0, SYNC, To::Lines(1), Stage::Before).barrier("block"),
            Phase::new(SCORES, 1, "// S = Q", To::Before("// Shape, scale"), Stage::Scores)
                .note("Each warp multiplies its 16 rows on tensor cores; S stays in the fragments of C.")
                .memory(&[], &["Q", "K"]),
            Phase::new("Mask", 1, "// Shape, scale", To::Before("// Online softmax"), Stage::Scores)
                .mask(),
            Phase::new("Online softmax", 1, "// Online softmax", To::Before("let kept"), Stage::Softmax)
                .note(SOFTMAX),
            Phase::new("O += P V", 1, "// O += P V", To::Lines(3), Stage::Output)
                .note("P is an operand as it stands: two neighbouring fragments of C are one of A.")
                .memory(&[], &["V"]),
            Phase::new("Normalise and store", 0, "// Normalise", To::End, Stage::Done)
                .note(STORE)
                .once(true),
        ],
    },
];

/// The number that a constant of the source has.
fn constant(file: &str, name: &str) -> Result<usize> {
    let begin = format!("pub const {name}: u32 = ");
    let line = source::text(file).lines().find_map(|line| line.trim().strip_prefix(&begin));
    let number = line.and_then(|rest| rest.trim_end_matches(';').parse().ok());
    number.with_context(|| format!("{file} has no number {name}"))
}

impl Rung {
    /// That of a kernel.
    #[must_use]
    pub fn find(kernel: &str) -> Option<&'static Self> {
        RUNGS.iter().find(|rung| rung.kernels.contains(&kernel))
    }

    /// The kernels that can be gone through.
    #[must_use]
    pub fn kernels() -> Vec<String> {
        RUNGS.iter().flat_map(|rung| rung.kernels).map(ToString::to_string).collect()
    }

    /// Tiles, threads and shared memory of one of the kernels with `d` columns.
    ///
    /// # Errors
    /// A source file without the constants.
    pub fn shape(&self, kernel: &str, d: usize) -> Result<Shape> {
        (self.shape)(kernel, d)
    }

    /// What is shown of the source.
    ///
    /// # Errors
    /// A source file without the lines.
    pub fn excerpts(&self) -> Result<Vec<Excerpt>> {
        self.excerpts.iter().map(|&(file, from, to)| excerpt(file, from, to)).collect()
    }
}
