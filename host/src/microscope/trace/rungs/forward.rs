//! The kernels of the forward pass and their phases.

use anyhow::{Context as _, bail};
use kernels_gpu::{
    forward::{flash_hopper, flash_pipelined, flash_tf32},
    parts::{attend, scalar_tile},
};

use super::{AHEAD, BARRIER, Order, Phase, Rung, Shape, To, whole};
use crate::microscope::trace::numbers::Stage;

const NAIVE: &str = "kernels-gpu/src/forward/naive.rs";
const STANDARD: &str = "kernels-gpu/src/forward/standard.rs";
const STANDARD_SOFTMAX: &str = "kernels-gpu/src/forward/standard/softmax.rs";
const TILED: &str = "kernels-gpu/src/forward/flash_tiled.rs";
const MMA: &str = "kernels-gpu/src/forward/flash_mma.rs";
const ATTEND: &str = "kernels-gpu/src/parts/attend.rs";
const ASYNC: &str = "kernels-gpu/src/forward/flash_async.rs";
const PIPELINED: &str = "kernels-gpu/src/forward/flash_pipelined.rs";
const WARP_ROWS: &str = "kernels-gpu/src/parts/warp_rows.rs";
const TF32: &str = "kernels-gpu/src/forward/flash_tf32.rs";
const PRODUCER: &str = "kernels-gpu/src/forward/flash_hopper/producer.rs";
const CONSUMER: &str = "kernels-gpu/src/forward/flash_hopper/consumer.rs";
const PRODUCTS: &str = "kernels-gpu/src/forward/flash_hopper/products.rs";
const ONLINE: &str = "kernels-gpu/src/forward/flash_hopper/online.rs";
const OUTPUT: &str = "kernels-gpu/src/forward/flash_hopper/output.rs";

const SCORES: &str = "S = Q Kᵀ";
const SOFTMAX: &str = "m grows to the largest score so far; α = exp(m before - m) scales l and O of the tiles before; \
                       P = exp(S - m) takes the place of S, and l takes its row sums.";
const RAISE: &str = "m grows only where some score is far above it; then α = exp(m before - m) scales l and O. The \
                     picture grows m each time: O / l is the same.";
const STORE: &str = "O / l goes to global memory, and LSE = m + log(l).";

/// Of kernels that copy ahead.
const COPIES_LANDED: Phase = Phase::new(
    "Wait for the copies",
    0,
    "// Hazard: this thread's copies of the tile",
    To::Lines(2),
    Stage::Before,
)
.note("Each thread waits for its own copies.");
/// The phases of `attend`.
const ATTEND_SCORES: Phase =
    Phase::new(SCORES, 1, "// S = Q", To::Before("// Shape, scale"), Stage::Scores)
        .note("Each warp multiplies its 16 rows on tensor cores; S stays in the fragments of C.")
        .memory(&[], &["Q", "K"]);
const ATTEND_MASK: Phase =
    Phase::new("Mask", 1, "// Shape, scale", To::Before("// Online softmax"), Stage::Scores).mask();
const ATTEND_SOFTMAX: Phase =
    Phase::new("Online softmax", 1, "// Online softmax", To::Before("let kept"), Stage::Softmax)
        .note(SOFTMAX);
const ATTEND_VALUES: Phase = Phase::new("O += P V", 1, "// O += P V", To::Lines(3), Stage::Output)
    .note("P is an operand as it stands: two neighbouring fragments of C are one of A.")
    .memory(&[], &["V"]);
const NORMALISE: Phase = Phase::new("Normalise and store", 0, "// Normalise", To::End, Stage::Done)
    .note(STORE)
    .once(true);

/// The kernels of the forward pass.
pub(super) static RUNGS: [Rung; 8] = [
    Rung {
        kernels: &["naive"],
        excerpts: &[
            (NAIVE, "pub unsafe fn scores", "}"),
            (NAIVE, "pub unsafe fn softmax_rows", "}"),
            (NAIVE, "pub unsafe fn output", "}"),
        ],
        shape: whole,
        phases: &[
            Phase::new("First launch: S = Q Kᵀ", 0, "let s = unsafe { dot", To::Before("weights.write"), Stage::Scores)
                .note("One thread per entry. The pictures show the whole head: S is a matrix in global memory."),
            Phase::new("Second launch: maximum of each row", 1, "let mut m_i", To::Before("let mut l_i"), Stage::Scores)
                .note("One warp per row reads S a first time."),
            Phase::new("Sum of its exponentials", 1, "let mut l_i", To::Before("let (m_lse"), Stage::Scores)
                .note("A second time."),
            Phase::new("P takes the place of S", 1, "let normaliser", To::Before("if lane == 0"), Stage::Softmax)
                .note("A third time, and P is written. Here P is normalised already: the picture's P is exp(S - m), without 1 / l."),
            Phase::new("Third launch: O = P V", 2, "let mut acc", To::Before("o.write"), Stage::Done)
                .note("One thread per element of O reads a row of P and a column of V."),
        ],
    },
    Rung {
        kernels: &["standard"],
        excerpts: &[
            (STANDARD, "pub unsafe fn scores<", "}"),
            (STANDARD_SOFTMAX, "pub unsafe fn softmax_rows", "}"),
            (STANDARD, "pub unsafe fn output<", "}"),
        ],
        shape: whole,
        phases: &[
            Phase::new("First launch: S = Q Kᵀ", 0, "mma::tile", To::Lines(3), Stage::Scores)
                .note("A matrix product in tiles of 128 x 128. The pictures show the whole head: S is a matrix in global memory."),
            Phase::new("Second launch: maximum and sum of each row", 1, "// Maximum and sum.", To::Before("// Weights, in the place"), Stage::Scores)
                .note("A row stays in shared memory where it fits, and S is read once."),
            Phase::new("P takes the place of S", 1, "// Weights, in the place", To::End, Stage::Softmax)
                .note("P is normalised already: the picture's P is exp(S - m), without 1 / l."),
            Phase::new("Third launch: O = P V", 2, "mma::tile", To::Lines(3), Stage::Done)
                .note("A matrix product again."),
        ],
    },
    Rung {
        kernels: &["flash_tiled"],
        excerpts: &[(TILED, "pub unsafe fn flash_tiled", "entries! {")],
        shape: |_, problem| {
            let rows = scalar_tile::ROWS as usize;
            // As f32, of the entry's columns.
            let bytes = |columns: usize| 4 * scalar_tile::len(columns) as usize;
            let d = bytes(problem.head_dim().next_multiple_of(32));
            let regions = vec![("Q", d), ("K", d), ("V", d), ("P", bytes(rows))];
            let warps = scalar_tile::THREADS as usize / 32;
            Ok(Shape { rows, keys: rows, warps, regions, order: Order::PLAIN })
        },
        phases: &[
            Phase::new("Load Q", 0, "// Load Q.", To::Before("for tile in"), Stage::Before)
                .note("All threads copy the rows of Q to shared memory, as f32. m = -∞, l = 0, O = 0.")
                .memory(&["Q"], &[])
                .once(false),
            BARRIER,
            Phase::new("Load K and V", 0, "// SAFETY", To::Before("// Hazard"), Stage::Before)
                .note("All threads copy the next keys and their values to shared memory, as f32.")
                .memory(&["K", "V"], &[]),
            BARRIER,
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
            NORMALISE,
        ],
    },
    Rung {
        kernels: &["flash_mma", "flash_swizzled", "flash_turing"],
        excerpts: &[(MMA, "// Who am I.", "entries! {"), (ATTEND, "pub fn attend", "}")],
        shape: |kernel, problem| {
            let (rows, keys) = (attend::BR as usize, attend::BC as usize);
            // Of 16 bits, of the entry's columns; flash_mma's rows are a chunk longer.
            let padding = if kernel == "flash_mma" { 8 } else { 0 };
            let row = 2 * (problem.head_dim().next_multiple_of(64) + padding);
            let regions = vec![("Q", rows * row), ("K", keys * row), ("V", keys * row)];
            Ok(Shape { rows, keys, warps: rows / 16, regions, order: Order::PLAIN })
        },
        phases: &[
            Phase::new("Load Q", 0, "// Load Q.", To::Before("for kv_tile in"), Stage::Before)
                .note("All threads copy the rows of Q to shared memory. m = -∞, l = 0, O = 0.")
                .memory(&["Q"], &[])
                .once(false),
            BARRIER,
            Phase::new("Load K and V", 0, "tile::load", To::Lines(2), Stage::Before)
                .note("All threads copy the next keys and their values to shared memory.")
                .memory(&["K", "V"], &[]),
            BARRIER,
            ATTEND_SCORES,
            ATTEND_MASK,
            ATTEND_SOFTMAX,
            ATTEND_VALUES,
            NORMALISE,
        ],
    },
    Rung {
        kernels: &["flash_async"],
        excerpts: &[(ASYNC, "let mut warp = FragmentRows", "entries! {"), (ATTEND, "pub fn attend", "}")],
        shape: |_, problem| {
            let (rows, keys) = (attend::BR as usize, attend::BC as usize);
            let row = 2 * problem.head_dim().next_multiple_of(64);
            let regions = stages(2, keys * row, keys * row, ("Q", rows * row));
            let order = Order { stages: 2, ..Order::PLAIN };
            Ok(Shape { rows, keys, warps: rows / 16, regions, order })
        },
        phases: &[
            Phase::new("Start the copies of Q and of the first tile", 0, "tile::load_async", To::Lines(3), Stage::Before)
                .note("cp.async: the threads ask for copies and go on. m = -∞, l = 0, O = 0.")
                .memory(&["Q", "K", "V"], &[])
                .once(false),
            COPIES_LANDED,
            BARRIER,
            Phase::new("Start the copies of the next tile", 0, "kv.start(kv_tile + 1", To::Lines(2), Stage::Before)
                .note(AHEAD)
                .memory(&["+K", "+V"], &[]),
            ATTEND_SCORES,
            ATTEND_MASK,
            ATTEND_SOFTMAX,
            ATTEND_VALUES,
            NORMALISE,
        ],
    },
    Rung {
        kernels: &["flash_pipelined"],
        excerpts: &[
            (PIPELINED, "// Load Q, and the first tile of K and V.", "/// The queue of all blocks"),
            (WARP_ROWS, "pub fn attend", "}"),
        ],
        shape: |_, problem| {
            let d = problem.head_dim().next_multiple_of(32);
            let shape = flash_pipelined::shape(d);
            if shape.stages != 2 {
                bail!("the steps of flash_pipelined are those of two stages: up to head dim 224");
            }
            let (rows, keys) = (shape.rows() as usize, shape.keys as usize);
            // Q in registers came through the second stage.
            let q = if shape.q_in_registers { 0 } else { 2 * rows * d };
            let regions = stages(2, 2 * keys * d, 2 * keys * d, ("Q", q));
            let order = Order { stages: 2, longest_first: true, ..Order::PLAIN };
            Ok(Shape { rows, keys, warps: shape.warps as usize, regions, order })
        },
        phases: &[
            Phase::new("Start the copies of Q and of the first tile", 0, "tile::load_async", To::Before("async_copy::commit"), Stage::Before)
                .note("Up to head dim 64 and from 129 to 192, Q goes where the second tile will, and from there to registers.")
                .memory(&["Q", "K", "V"], &[])
                .once(false),
            Phase::new("Q to registers, where it is kept there", 0, "let queries = if q_in_registers", To::Before("let mut stage"), Stage::Before)
                .note("After a wait and a barrier of its own.")
                .memory(&[], &["Q"])
                .once(false),
            COPIES_LANDED,
            BARRIER,
            Phase::new("Start the copies of the next tile", 0, "} else if !is_last {", To::Lines(3), Stage::Before)
                .note(AHEAD)
                .memory(&["+K", "+V"], &[]),
            Phase::new("Ask for the next task", 0, "if is_last && opaque", To::Lines(6), Stage::Before)
                .note("In the last tile only: one thread asks the queue, and the answer comes while the tile is computed with."),
            Phase::new(SCORES, 1, "// S = Q", To::Before("keys_are_read();"), Stage::Scores)
                .note("Each warp multiplies its fragments of 16 rows on tensor cores.")
                .memory(&[], &["K"]),
            Phase::new("Mask", 1, "self.shape_and_hide", To::Lines(1), Stage::Scores).mask(),
            Phase::new("Raise the maximum", 1, "self.raise(&s)", To::Lines(1), Stage::Scores).note(RAISE),
            Phase::new("P, and O += P V", 1, "// P, and O += P V", To::End, Stage::Output)
                .note("16 keys at a time: exponentials of the next keys go beside the products of these.")
                .memory(&[], &["V"]),
            Phase::new("Take the answer", 0, "if taken != NOT_ASKED", To::Lines(7), Stage::Output)
                .note("The thread that asked writes the next task to shared memory.")
                .once(true),
            BARRIER.stage(Stage::Output).once(true),
            Phase::new("Start the next task's copies", 0, "if let Some(next) = next_task.read()", To::Lines(3), Stage::Output)
                .note("Where there is one: they are on their way while O is stored.")
                .once(true),
            Phase::new("Normalise and store", 0, "// Normalise", To::Before("// Read again"), Stage::Done)
                .note(STORE)
                .once(true),
        ],
    },
    Rung {
        kernels: &["flash_tf32"],
        excerpts: &[(TF32, "let mut state =", "/// Where a warp's rows are"), (TF32, "fn attend", "}")],
        shape: |_, problem| {
            let d = problem.head_dim().next_multiple_of(32);
            let shape = flash_tf32::shape(d);
            let (rows, keys) = (shape.rows(d) as usize, shape.keys as usize);
            let regions = stages(2, 4 * keys * d, 4 * keys * d, ("Q", 4 * rows * d));
            let order = Order { stages: 2, longest_first: true, ..Order::PLAIN };
            Ok(Shape { rows, keys, warps: flash_tf32::THREADS as usize / 32, regions, order })
        },
        phases: &[
            Phase::new("Start the copies of Q and of the first tile", 0, "// Load Q, and", To::Lines(4), Stage::Before)
                .note("cp.async: the threads ask for copies and go on. m = -∞, l = 0, O = 0.")
                .memory(&["Q", "K", "V"], &[])
                .once(false),
            COPIES_LANDED,
            BARRIER,
            Phase::new("Start the copies of the next tile", 0, "if kv_tile + 1", To::Lines(4), Stage::Before)
                .note(AHEAD)
                .memory(&["+K", "+V"], &[]),
            Phase::new(SCORES, 1, "// S = Q", To::Before("state.shape_and_hide"), Stage::Scores)
                .note("Q and K are split into high and low parts of tf32; three products are one of f32.")
                .memory(&[], &["Q", "K"]),
            Phase::new("Mask", 1, "state.shape_and_hide", To::Lines(1), Stage::Scores).mask(),
            Phase::new("Raise the maximum", 1, "state.raise(&s)", To::Lines(1), Stage::Scores).note(RAISE),
            Phase::new("P, and O += P V", 1, "// P, and O += P V", To::End, Stage::Output)
                .note("8 keys at a time; P is split into two parts as it is made.")
                .memory(&[], &["V"]),
            NORMALISE,
        ],
    },
    Rung {
        kernels: &["flash_hopper"],
        excerpts: &[
            (PRODUCER, "let copy_q", "}"),
            (CONSUMER, "pub unsafe fn work", "    /// Lets tiles pass"),
            (PRODUCTS, "    /// Asks for the next K", "    /// Starts products when"),
            (ONLINE, "    /// P of the first tile", "    /// Row and key of"),
            (CONSUMER, "    fn first_softmax", "    /// The first tile of the next task"),
            (OUTPUT, "    pub(super) unsafe fn store_output", "    /// "),
        ],
        shape: |_, problem| {
            const OF: [usize; 6] = [64, 80, 96, 128, 192, 256];
            let entry = OF.into_iter().find(|&of| of >= problem.head_dim());
            let d = entry.context("a head dim up to 256")?;
            // A short launch has two consumers.
            let tiles = flash_hopper::Tiles::of(d as u32, 2);
            let (rows, keys) = (tiles.rows() as usize, tiles.keys as usize);
            let columns = 2 * d.next_multiple_of(64);
            let stages_of = tiles.kv_stages as usize;
            let regions = stages(stages_of, keys * columns, keys * columns, ("Q", rows * columns));
            let order = Order {
                stages: stages_of,
                longest_first: true,
                descending: true,
                first_is_apart: true,
            };
            Ok(Shape { rows, keys, warps: tiles.threads() as usize / 32, regions, order })
        },
        phases: &[
            Phase::new("Producer: copy Q", 0, "copy_q(q_stage, task);", To::Lines(1), Stage::Before)
                .note("One thread of warp 0 gives the copy engine (TMA) its orders. Warps 4 to 11 are two consumers of 64 rows each.")
                .memory(&["Q"], &[])
                .once(false),
            Phase::new("Producer: copy K of the last tile", 0, "copy_k(stage, task, task.end_tile - 1);", To::Lines(1), Stage::Before)
                .note("The last tile comes first. K and V have stages; the producer is ahead by as many tiles as there are stages, and \
                       shown here when its copy is needed.")
                .memory(&["K"], &[])
                .once(false),
            Phase::new("Consumers: wait for the task and Q", 1, "let mut next = self.inbox.receive", To::Lines(1), Stage::Before)
                .note("An mbarrier completes its phase when all bytes have landed.")
                .barrier("consumers")
                .once(false),
            Phase::new("Start S = Q Kᵀ", 2, "pub(super) unsafe fn start_scores", To::Before("/// Starts O"), Stage::Before)
                .note("wgmma reads both operands from shared memory and goes on beside the threads. Two consumers start in turn.")
                .memory(&[], &["Q", "K"])
                .once(false),
            Phase::new("Wait for S", 4, "self.s.wait_group::<0>();", To::Lines(2), Stage::Scores)
                .note("Then K is given back to the producer.")
                .barrier("consumers")
                .once(false),
            Phase::new("Mask", 3, "if self.is_cut(task, tile)", To::Lines(3), Stage::Scores).mask().once(false),
            Phase::new("The first softmax", 3, "// Nothing came before", To::Lines(4), Stage::Softmax)
                .note("There is no O to scale.")
                .once(false),
            Phase::new("P in the storage type", 4, "self.pack(task, task.end_tile - 1);", To::Lines(1), Stage::Softmax)
                .note("P stays in registers, in the order of an operand of wgmma.")
                .once(false),
            Phase::new("Producer: K of the next tile, V of this one", 0, "copy_k(stage, task, tile - 1);", To::Lines(2), Stage::Softmax)
                .note("As soon as a stage is free.")
                .memory(&["+K", "V"], &[])
                .of_before(),
            Phase::new("Start S of the next tile, and O += P V of this one", 2, "pub(super) unsafe fn start_products", To::End, Stage::Softmax)
                .note("Both run beside the next softmax: of this consumer and of the other one.")
                .memory(&[], &["Q", "+K", "V"])
                .of_before(),
            Phase::new("Wait for S", 3, "self.s.wait_group::<1>();", To::Lines(2), Stage::Scores)
                .note("O += P V of the tile before may still run; the picture shows it done.")
                .barrier("consumers"),
            Phase::new("Mask", 3, "if CUT &&", To::Lines(3), Stage::Scores).mask(),
            Phase::new("Online softmax", 3, "let (growth, sums)", To::Lines(1), Stage::Scores).note(RAISE),
            Phase::new("Wait for O, and scale it", 3, "// The exponentials first", To::Before("self.release_v"), Stage::Softmax)
                .note("α scales O and l where the maximum has grown.")
                .barrier("consumers"),
            Phase::new("Give V back, ask for K", 3, "self.release_v();", To::Lines(2), Stage::Softmax)
                .note("The answer comes while P is packed."),
            Phase::new("P in the storage type", 3, "self.pack(task, tile);", To::Lines(1), Stage::Softmax)
                .note("P stays in registers, in the order of an operand of wgmma."),
            Phase::new("Producer: the last V", 0, "copy_v(stage.before(), before, before.first_tile);", To::Lines(1), Stage::Softmax)
                .note("Behind the first K of the next task, if there is one.")
                .memory(&["V"], &[])
                .once(true),
            Phase::new("Start the last O += P V", 1, "self.start_output();", To::Lines(1), Stage::Softmax)
                .note("With the first S of the next task, if there is one.")
                .memory(&[], &["V"])
                .once(true),
            Phase::new("Wait for O", 1, "self.acc_o.wait_group::<0>();", To::Lines(2), Stage::Output)
                .note("LSE was stored meanwhile. Then V is given back.")
                .barrier("consumers")
                .once(true),
            Phase::new("Normalise and store", 5, "pub(super) unsafe fn store_output", To::End, Stage::Done)
                .note("O / l goes through shared memory to global memory: each warp stores its 16 rows by the copy engine.")
                .once(true),
        ],
    },
];

/// Regions of K and V with several stages, and another one.
fn stages(
    count: usize,
    k: usize,
    v: usize,
    other: (&'static str, usize),
) -> Vec<(&'static str, usize)> {
    const NAMES: [[&str; 2]; 4] = [["K 0", "V 0"], ["K 1", "V 1"], ["K 2", "V 2"], ["K 3", "V 3"]];
    let of_stages = NAMES[..count].iter().flat_map(|[k_name, v_name]| [(*k_name, k), (*v_name, v)]);
    Some(other).into_iter().filter(|(_, bytes)| *bytes > 0).chain(of_stages).collect()
}
