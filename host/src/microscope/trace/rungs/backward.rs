//! The kernels of the backward pass and their phases.

use anyhow::bail;
use kernels_gpu::{
    backward::{backward_hopper, backward_mma},
    parts::scalar_tile,
};

use super::{AHEAD, BARRIER, Order, Phase, Rung, Shape, To, whole};
use crate::microscope::trace::numbers::Stage;

const BACKWARD_NAIVE: &str = "kernels-gpu/src/backward/backward_naive.rs";
const BACKWARD_STANDARD: &str = "kernels-gpu/src/backward/backward_standard.rs";
const BACKWARD_TILED: &str = "kernels-gpu/src/backward/backward_tiled.rs";
const BACKWARD_MMA: &str = "kernels-gpu/src/backward/backward_mma.rs";
const BACKWARD_PRODUCER: &str = "kernels-gpu/src/backward/backward_hopper/producer.rs";
const BACKWARD_CONSUMER: &str = "kernels-gpu/src/backward/backward_hopper/consumer.rs";
const BACKWARD_SUMS: &str = "kernels-gpu/src/backward/backward_hopper/sums.rs";

/// The kernels of the backward pass.
pub(super) static RUNGS: [Rung; 5] = [
    Rung {
        kernels: &["backward_naive"],
        excerpts: &[
            (BACKWARD_NAIVE, "pub unsafe fn scores", "}"),
            (BACKWARD_NAIVE, "pub unsafe fn queries", "}"),
            (BACKWARD_NAIVE, "pub unsafe fn keys", "}"),
        ],
        shape: whole,
        phases: &[
            Phase::new("S = Q Kᵀ and dP = dO Vᵀ", 0, "products::<T>", To::Lines(1), Stage::Products)
                .note("One thread per entry. The pictures show the whole head. delta and the LSE come from a launch before."),
            Phase::new("P and dS", 0, "let (p, ds)", To::Lines(3), Stage::Gradients)
                .note("P = exp(S - LSE), dS = P (dP - delta). Both are matrices in global memory."),
            Phase::new("Next launch: dQ = dS K", 1, "let mut sum", To::Before("let index"), Stage::Gradients)
                .note("One thread per element; the picture comes with the last step."),
            Phase::new("Last launch: dK = dSᵀ Q, dV = Pᵀ dO", 2, "let (mut sum_k", To::End, Stage::Done)
                .note("One thread per key and column, over all rows."),
        ],
    },
    Rung {
        kernels: &["backward_standard"],
        excerpts: &[
            (BACKWARD_STANDARD, "pub unsafe fn scores<", "}"),
            (BACKWARD_STANDARD, "pub unsafe fn queries<", "}"),
            (BACKWARD_STANDARD, "pub unsafe fn keys<", "}"),
        ],
        shape: whole,
        phases: &[
            Phase::new("S = Q Kᵀ", 0, "let of_s", To::Lines(2), Stage::Scores)
                .note("A matrix product in tiles. The pictures show the whole head. delta and the LSE come from a launch before."),
            Phase::new("dP = dO Vᵀ", 0, "let of_dp", To::Lines(2), Stage::Products)
                .note("Through the same shared memory, behind a barrier."),
            Phase::new("P and dS", 0, "let (row, key) = mma::place", To::Before("let [weights"), Stage::Gradients)
                .note("Where the products' threads have them: P = exp(S - LSE), dS = P (dP - delta)."),
            Phase::new("Store both", 0, "let [weights", To::Lines(3), Stage::Gradients)
                .note("Two matrices in global memory."),
            Phase::new("Next launch: dQ = dS K", 1, "let (d_scores, k, depth)", To::Lines(5), Stage::Gradients)
                .note("A matrix product; the picture comes with the last step."),
            Phase::new("Last launches: dK = dSᵀ Q, dV = Pᵀ dO", 2, "for member in", To::Before("}"), Stage::Done)
                .note("Two matrix products whose first operand is transposed, over the heads that share keys."),
        ],
    },
    Rung {
        kernels: &["backward_tiled"],
        excerpts: &[
            (BACKWARD_TILED, "pub unsafe fn keys", "/// dQ of a tile of rows."),
            (BACKWARD_TILED, "    unsafe fn gradients", "}"),
        ],
        shape: |_, problem| {
            let rows = scalar_tile::ROWS as usize;
            let bytes = |columns: usize| 4 * scalar_tile::len(columns) as usize;
            let (d, square) = (bytes(problem.head_dim().next_multiple_of(32)), bytes(rows));
            let regions =
                vec![("Q", d), ("dO", d), ("K", d), ("V", d), ("P", square), ("dS", square)];
            let warps = scalar_tile::THREADS as usize / 32;
            Ok(Shape { rows, keys: rows, warps, regions, order: Order::PLAIN })
        },
        phases: &[
            Phase::new("Load K and V", 0, "tiles.load_keys", To::Lines(1), Stage::Before)
                .note("A block of this launch keeps a tile of keys; rows pass. dQ is the sum of another launch, which keeps rows.")
                .memory(&["K", "V"], &[])
                .once(false),
            BARRIER,
            Phase::new("Load Q and dO", 0, "tiles.load_rows", To::Lines(1), Stage::Before)
                .note("All threads copy the next rows to shared memory, as f32.")
                .memory(&["Q", "dO"], &[]),
            BARRIER,
            Phase::new("S = Q Kᵀ, dP = dO Vᵀ", 1, "let s = scalar_tile::product", To::Lines(2), Stage::Products)
                .note("Each thread computes 2 rows and 4 keys of both in its registers.")
                .memory(&[], &["Q", "K", "dO", "V"]),
            Phase::new("P and dS", 1, "// Not unrolled", To::End, Stage::Gradients)
                .note("P = exp(S - LSE) and dS = P (dP - delta): the LSE and delta of a row are known.")
                .memory(&["P", "dS"], &[]),
            BARRIER.stage(Stage::Gradients),
            Phase::new("dV += Pᵀ dO, dK += dSᵀ Q", 0, "// dV += Pᵀ dO", To::Lines(7), Stage::Keys)
                .note("Each thread owns keys, and reads columns of P and dS.")
                .memory(&[], &["P", "dO", "dS", "Q"]),
            Phase::new("Store dK and dV", 0, "let (scale, seq)", To::End, Stage::Done)
                .note("dK takes its scale once.")
                .once(true),
        ],
    },
    Rung {
        kernels: &["backward_mma"],
        excerpts: &[(BACKWARD_MMA, "    // Load K and V.", "}")],
        shape: |_, problem| {
            let d = problem.head_dim().next_multiple_of(32);
            let (rows, keys) = (backward_mma::rows(d) as usize, backward_mma::keys(d) as usize);
            let regions = vec![
                ("K", 2 * keys * d),
                ("V", 2 * keys * d),
                ("Q 0", 2 * rows * d),
                ("dO 0", 2 * rows * d),
                ("Q 1", 2 * rows * d),
                ("dO 1", 2 * rows * d),
                ("P", 2 * rows * keys),
                ("dS", 2 * rows * keys),
            ];
            let warps = backward_mma::THREADS as usize / 32;
            let order = Order { stages: 2, ..Order::PLAIN };
            Ok(Shape { rows, keys, warps, regions, order })
        },
        phases: &[
            Phase::new("Start the copies of K and V", 0, "tile::load_async", To::Lines(3), Stage::Before)
                .note("A block keeps a tile of keys; rows pass.")
                .memory(&["K", "V"], &[])
                .once(false),
            Phase::new("Start the copies of the first Q and dO", 0, "tiles.start(args, head, row_tiles.start", To::Lines(1), Stage::Before)
                .memory(&["Q", "dO"], &[])
                .note("With several heads that share keys, once for each head.")
                .once(false),
            Phase::new("Wait for the copies", 0, "async_copy::wait::<0>();", To::Lines(1), Stage::Before)
                .note("Each thread waits for its own copies."),
            BARRIER,
            Phase::new("Start the copies of the next rows", 0, "if row_tile + 1", To::Lines(4), Stage::Before)
                .note(AHEAD)
                .memory(&["+Q", "+dO"], &[]),
            Phase::new("Sᵀ = K Qᵀ", 0, "// Sᵀ = K Qᵀ", To::Before("let at = (first_row"), Stage::Scores)
                .note("Transposed: two warps have the same keys, and half of the rows each, so that Pᵀ and dSᵀ are operands as they stand. The pictures have rows as rows.")
                .memory(&[], &["K", "Q"]),
            Phase::new("P = exp(S - LSE)", 0, "let at = (first_row", To::Lines(2), Stage::Softmax)
                .note("The LSE was read before the product. Tiles that a row sees only in part are masked here."),
            Phase::new("dPᵀ = V dOᵀ - delta", 0, "// dPᵀ = V dOᵀ", To::Before("differentiate::<SCORE_TILES"), Stage::Weighed)
                .note("The product begins with -delta. The exponentials may run beside it.")
                .memory(&[], &["V", "dO"]),
            Phase::new("dS = P (dP - delta)", 0, "differentiate::<SCORE_TILES", To::Lines(1), Stage::Gradients),
            Phase::new("P and dS to shared memory", 0, "// Pᵀ and dSᵀ to shared memory", To::Lines(3), Stage::Gradients)
                .note("For the other warp of these keys, and for dQ.")
                .memory(&["P", "dS"], &[]),
            Phase::new("dV += Pᵀ dO, dK += dSᵀ Q over the warp's rows", 0, "// dV += Pᵀ dO", To::Before("// Hazard: P and dS are read"), Stage::Gradients)
                .note("P and dS from registers; half of the columns per warp.")
                .memory(&[], &["dO", "Q"]),
            BARRIER.stage(Stage::Gradients),
            Phase::new("The same over the other warp's rows", 0, "// Then over the other", To::Before("// dQ += dS K"), Stage::Keys)
                .note("P and dS from shared memory.")
                .memory(&[], &["P", "dS", "dO", "Q"]),
            Phase::new("dQ += dS K", 0, "// dQ += dS K", To::Before("let own = Part"), Stage::All)
                .note("The part of these keys: other blocks have the others.")
                .memory(&[], &["dS", "K"]),
            Phase::new("Add dQ in memory", 0, "own.wait(args", To::Lines(4), Stage::All)
                .note("By atomics, in f32. In the entries that are deterministic, a block waits for its turn first."),
            Phase::new("Store dK and dV", 0, "let (scale, first, half)", To::End, Stage::Done)
                .note("dK takes its scale once.")
                .once(true),
        ],
    },
    Rung {
        kernels: &["backward_hopper"],
        excerpts: &[
            (BACKWARD_PRODUCER, "    rings.k.arrive", "}"),
            (BACKWARD_CONSUMER, "    pub unsafe fn work", "    /// This warpgroup's rows"),
            (BACKWARD_CONSUMER, "    unsafe fn start_scores", "    /// Starts dQ"),
            (BACKWARD_CONSUMER, "    unsafe fn tile(", "    /// Gives dSᵀ"),
            (BACKWARD_CONSUMER, "    fn share(", "    /// Stores dK and dV"),
            (BACKWARD_CONSUMER, "    unsafe fn store(&self)", "}"),
            (BACKWARD_CONSUMER, "    fn hand_over(", "    /// Starts dV"),
            (BACKWARD_SUMS, "    while let Some(at)", "}"),
        ],
        shape: |_, problem| {
            let d = if problem.head_dim() <= 64 { 64 } else { 128 };
            if problem.head_dim() > d {
                bail!("the steps of backward_hopper are those of head dims up to 128");
            }
            let tiles = backward_hopper::Tiles::of(d as u32);
            let (rows, keys) = (tiles.rows as usize, tiles.keys as usize);
            let regions = vec![
                ("K", 2 * keys * d),
                ("V", 2 * keys * d),
                ("Q 0", 2 * rows * d),
                ("Q 1", 2 * rows * d),
                ("dO 0", 2 * rows * d),
                ("dO 1", 2 * rows * d),
                ("dS 0", 2 * rows * keys),
                ("dS 1", 2 * rows * keys),
                ("dQ", 4 * rows * d),
            ];
            let warps = backward_hopper::Tiles::THREADS as usize / 32;
            let order = Order { stages: 2, ..Order::PLAIN };
            Ok(Shape { rows, keys, warps, regions, order })
        },
        phases: &[
            Phase::new("Producer: copy K", 0, "rings.k.arrive", To::Lines(2), Stage::Before)
                .note("One thread of warp 0 gives the copy engine (TMA) its orders. Warps 4 to 11 are two consumers of 64 keys each.")
                .memory(&["K"], &[])
                .once(false),
            Phase::new("Producer: copy Q and the LSE", 0, "let full = rings.q.acquire", To::Lines(5), Stage::Before)
                .note("Rows pass through two stages.")
                .memory(&["Q"], &[])
                .once(false),
            Phase::new("Producer: copy V", 0, "rings.v.arrive", To::Lines(2), Stage::Before)
                .note("Behind Q, since S needs Q first.")
                .memory(&["V"], &[])
                .once(false),
            Phase::new("Producer: copy dO and delta", 0, "let full = rings.d_o.acquire", To::Lines(5), Stage::Before)
                .note("Q and dO have rings of their own: each is given back as early as can be.")
                .memory(&["dO"], &[])
                .once(false),
            Phase::new("Consumers: wait for K", 1, "rings.k.wait(0);", To::Lines(1), Stage::Before)
                .barrier("consumers")
                .once(false),
            Phase::new("Start Sᵀ = K Qᵀ", 2, "unsafe fn start_scores", To::End, Stage::Before)
                .note("Transposed: a warpgroup owns 64 keys. wgmma goes on beside the threads.")
                .memory(&[], &["K", "Q"])
                .once(false),
            Phase::new("Start dPᵀ = V dOᵀ", 3, "rings.d_o.wait(stage);", To::Before("// Sᵀ is complete"), Stage::Before)
                .note("It runs beside the computation of P.")
                .memory(&[], &["V", "dO"]),
            Phase::new("Wait for S", 3, "self.s.wait_group::<1>();", To::Lines(1), Stage::Scores)
                .note("dP may still run.")
                .barrier("consumers"),
            Phase::new("Mask", 3, "is_cut::<G>(", To::Lines(3), Stage::Scores).mask(),
            Phase::new("P = exp(S - LSE)", 3, "self.s.weigh", To::Before("let (p, delta)"), Stage::Softmax)
                .note("No maximum is searched for: the forward pass left the LSE, which was read when S started."),
            Phase::new("Start dV += Pᵀ dO", 3, "p = self.s.pack", To::Lines(3), Stage::Softmax)
                .note("From registers. It runs beside the computation of dS; at D 64, where registers are few, it starts after the barrier.")
                .memory(&[], &["dO"]),
            Phase::new("Wait for dP", 3, "self.dp.wait_group::<1>();", To::Lines(1), Stage::Weighed)
                .note("dV may still run.")
                .barrier("consumers"),
            Phase::new("dS = P (dP - delta)", 3, "self.s.differentiate", To::Before("self.share(&ds)"), Stage::Gradients),
            Phase::new("dS to shared memory", 4, "let buffers = self.setting", To::Before("// Hazard: the tensor cores"), Stage::Gradients)
                .note("For dQ, which sums over the keys of both consumers.")
                .memory(&["dS"], &[]),
            Phase::new("Fence, and barrier of the consumers", 4, "mbarrier::fence_proxy_async();", To::Lines(3), Stage::Gradients)
                .note("Tensor cores read what threads have written, and each consumer multiplies what both have written.")
                .barrier("consumers"),
            Phase::new("Producer: the next Q and dO", 0, "let full = rings.q.acquire", To::Before("stage.advance"), Stage::Values)
                .note("As soon as their stages are free.")
                .memory(&["+Q", "+dO"], &[]),
            Phase::new("Start dQ = dS K and dK += dSᵀ Q", 1, "let mut dq = self.start_dq();", To::Before("// dQ is complete"), Stage::Values)
                .note("dK from registers, dQ from shared memory. Between the two the consumer waits for dV and gives dO back.")
                .memory(&[], &["dS", "K", "Q"]),
            Phase::new("Wait for dQ", 1, "dq.wait_group::<1>();", To::Lines(1), Stage::Queries)
                .note("dK may still run.")
                .barrier("consumers"),
            Phase::new("Hand dQ over", 6, "barrier::sync(NamedBarrier::DqEmpty", To::End, Stage::Queries)
                .note("To a warp beside the producer, in the order of the registers: the consumer goes on.")
                .memory(&["dQ"], &[]),
            Phase::new("Add dQ in memory", 7, "while let Some(at)", To::End, Stage::Queries)
                .note("Each consumer has a warp that adds its parts, by one bulk reduction. In the entries that are deterministic, the warp waits for the block's turn first.")
                .memory(&[], &["dQ"]),
            Phase::new("Start Sᵀ of the next tile", 1, "self.stage.advance();", To::Lines(2), Stage::Queries)
                .memory(&[], &["K", "+Q"]),
            Phase::new("Wait for dK", 1, "self.dk.wait_group::<1>();", To::Lines(4), Stage::Queries)
                .note("Sᵀ of the next tile may still run. Q is given back.")
                .barrier("consumers"),
            Phase::new("Wait for the last dK", 1, "self.dk.wait_group::<0>();", To::Lines(1), Stage::All)
                .barrier("consumers")
                .once(true),
            Phase::new("Store dK and dV", 5, "unsafe fn store(&self)", To::End, Stage::Done)
                .note("dK takes its scale once.")
                .once(true),
        ],
    },
];
