//! The entries of the table, in the order of the ladder.

use kernels_gpu::{
    args, flash_async,
    flash_hopper::{self, Tiles},
    flash_mma, flash_pipelined, flash_swizzled, flash_tf32, flash_tiled, fragment, naive,
    policy::{Causal, Full, General},
    standard, weights,
};
use simt::{Dim3, warp};

use super::{Features, KernelSpec, Plan, Sizes, Step};
use crate::{backend::TensorMapSpec, dtype::DType, problem::Problem};

/// Every kernel.
pub static KERNELS: &[KernelSpec] = &[
    NAIVE,
    STANDARD,
    FLASH_TILED,
    FLASH_TURING,
    FLASH_MMA,
    FLASH_SWIZZLED,
    FLASH_ASYNC,
    FLASH_PIPELINED,
    FLASH_TF32,
    FLASH_HOPPER,
];

/// What the first rungs all support.
pub(super) const ALL_FEATURES: Features =
    Features { causal: true, mask: true, dropout: true, weights: false, tokens_first: true };

const NAIVE: KernelSpec = KernelSpec {
    name: "naive",
    summary: "scores, softmax, weighted sum: three kernels, the N x N matrix in memory",
    idea: "attention as the textbook has it",
    dtypes: &DType::ALL,
    head_dims: &[32, 64, 96, 128],
    capability: (7, 5),
    exact_capability: false,
    sizes: |_, _| Sizes {
        rows: vec![naive::SCORES_TILE, naive::SOFTMAX_ROWS],
        keys: vec![naive::SCORES_TILE, warp::LANES],
    },
    features: Features { weights: true, ..ALL_FEATURES },
    plan: |p, _| Plan {
        workspace_bytes: p.weights_bytes(),
        steps: vec![
            Step {
                symbol: symbol("naive_scores", p),
                grid: Dim3::new(
                    tiles(p.seq_k(), naive::SCORES_TILE),
                    tiles(p.seq_q(), naive::SCORES_TILE),
                    heads(p),
                ),
                block: Dim3::new(naive::SCORES_TILE, naive::SCORES_TILE, 1),
                shared_bytes: 0,
            },
            Step {
                symbol: format!("naive_softmax_{}", p.dtype()),
                grid: Dim3::new(tiles(p.seq_q(), naive::SOFTMAX_ROWS), 1, heads(p)),
                block: naive::SOFTMAX_THREADS.into(),
                shared_bytes: 0,
            },
            Step {
                symbol: symbol("naive_output", p),
                grid: Dim3::new(
                    tiles(p.seq_q() * p.head_dim(), naive::OUTPUT_THREADS),
                    1,
                    heads(p),
                ),
                block: naive::OUTPUT_THREADS.into(),
                shared_bytes: 0,
            },
        ],
    },
    tensor_maps: None,
    queue: false,
};

const STANDARD: KernelSpec = KernelSpec {
    name: "standard",
    summary: "product, softmax, product: tensor cores, rows in shared memory, the N x N matrix in \
              memory",
    idea: "the same three steps, done well: the fair baseline",
    dtypes: &DType::ALL,
    head_dims: &[32, 64, 96, 128, 160, 192, 224, 256],
    capability: (8, 0),
    exact_capability: false,
    sizes: |dtype, _| {
        let tile = if dtype == DType::F32 { standard::TILED_TILE } else { standard::MMA_TILE };
        // What the softmax gives to a warp, and keeps at a time.
        let [of_warp, segment] = standard::softmax::edge_keys(dtype.size() as u32);
        Sizes { rows: vec![tile], keys: vec![tile, of_warp, segment] }
    },
    features: Features { weights: true, ..ALL_FEATURES },
    plan: |p, _| {
        let softmax = standard_softmax(p);
        let [scores, output] = standard_products(p);
        Plan { workspace_bytes: p.weights_bytes(), steps: vec![scores, softmax, output] }
    },
    tensor_maps: None,
    queue: false,
};

/// The two products of `standard`: tensor cores for 16-bit types, scalar tiles for f32.
fn standard_products(p: &Problem) -> [Step; 2] {
    let (dtype, d) = (p.dtype(), p.head_dim() as u32);
    let columns = standard::output_columns(d);
    let step = |symbol, grid, [block, shared_bytes]: [u32; 2]| Step {
        symbol,
        grid,
        block: block.into(),
        shared_bytes,
    };
    let scores_grid = |tile| Dim3::new(tiles(p.seq_k(), tile), tiles(p.seq_q(), tile), heads(p));
    let output_grid =
        |rows, columns| Dim3::new(tiles(p.seq_q(), rows), tiles(p.head_dim(), columns), heads(p));
    let (scores, output) = (format!("standard_scores_{dtype}"), format!("standard_output_{dtype}"));
    if dtype == DType::F32 {
        let (tile, launch) = (standard::TILED_TILE, [standard::TILED_THREADS, 0]);
        return [
            step(scores, scores_grid(tile), launch),
            step(output, output_grid(tile, tile), launch),
        ];
    }
    let (tile, threads) = (standard::MMA_TILE, standard::MMA_THREADS);
    [
        step(scores, scores_grid(tile), [threads, standard::SCORES_SHARED_BYTES]),
        step(
            format!("{output}_x{columns}"),
            output_grid(tile, columns),
            [threads, standard::output_shared_bytes(columns)],
        ),
    ]
}

/// The softmax of `standard`: one warp per row, or one block for a long row.
fn standard_softmax(p: &Problem) -> Step {
    let (seq_k, bytes) = (p.seq_k() as u32, p.dtype().size() as u32);
    let row_threads = standard::softmax::row_threads(seq_k, bytes);
    let of_row = if row_threads == standard::softmax::THREADS { "block" } else { "warp" };
    Step {
        symbol: format!("standard_softmax_{}_{of_row}", p.dtype()),
        grid: Dim3::new(tiles(p.seq_q(), standard::softmax::THREADS / row_threads), 1, heads(p)),
        block: standard::softmax::THREADS.into(),
        shared_bytes: standard::softmax::shared_bytes(seq_k, bytes, row_threads),
    }
}

const FLASH_TILED: KernelSpec = KernelSpec {
    name: "flash_tiled",
    summary: "tiles in shared memory, online softmax, scalar arithmetic",
    idea: "never write the N x N matrix: a running maximum and sum finish the softmax at the end",
    dtypes: &DType::ALL,
    head_dims: &[32, 64, 96, 128],
    capability: (7, 5),
    exact_capability: false,
    sizes: |_, _| Sizes { rows: vec![flash_tiled::BR], keys: vec![flash_tiled::BC] },
    features: ALL_FEATURES,
    plan: |p, _| {
        one_step(Step {
            symbol: symbol("flash_tiled", p),
            grid: Dim3::new(
                tiles(p.seq_q(), flash_tiled::BR),
                tiles(p.heads(), 1),
                tiles(p.batch(), 1),
            ),
            block: flash_tiled::THREADS.into(),
            shared_bytes: flash_tiled::shared_bytes(p.head_dim()),
        })
    },
    tensor_maps: None,
    queue: false,
};

const FLASH_MMA: KernelSpec = KernelSpec {
    name: "flash_mma",
    summary: "both products on tensor cores by mma.sync, weights stay in registers",
    idea: "a warp keeps 16 rows: scores turn into weights and into the next product's operand \
           where they are",
    dtypes: &[DType::F16, DType::BF16],
    head_dims: &[64, 128],
    capability: (8, 0),
    exact_capability: false,
    sizes: |_, _| Sizes { rows: vec![flash_mma::BR, fragment::ROWS], keys: vec![flash_mma::BC] },
    features: ALL_FEATURES,
    plan: |p, _| mma_step("flash_mma", flash_mma::shared_bytes, p),
    tensor_maps: None,
    queue: false,
};

const FLASH_SWIZZLED: KernelSpec = KernelSpec {
    name: "flash_swizzled",
    summary: "flash_mma on swizzled tiles: no bank conflicts, no padding",
    idea: "exchange the chunks of each row by its number, and eight rows below each other are \
           in eight groups of banks",
    plan: |p, _| mma_step("flash_swizzled", flash_swizzled::shared_bytes, p),
    ..FLASH_MMA
};

const FLASH_TURING: KernelSpec = KernelSpec {
    name: "flash_turing",
    summary: "flash_swizzled with the tensor core instruction of Turing",
    idea: "the same source for GPUs before Ampere: half of the instruction's depth, f16 only",
    dtypes: &[DType::F16],
    capability: (7, 5),
    plan: |p, _| mma_step("flash_turing", flash_swizzled::shared_bytes, p),
    ..FLASH_SWIZZLED
};

const FLASH_ASYNC: KernelSpec = KernelSpec {
    name: "flash_async",
    summary: "flash_swizzled with asynchronous copies into two stages",
    idea: "the next tile arrives while this one is computed with",
    plan: |p, _| mma_step("flash_async", flash_async::shared_bytes, p),
    ..FLASH_SWIZZLED
};

/// The launch of the rungs that share the tile of flash_mma.
fn mma_step(kernel: &str, shared_bytes: fn(usize) -> u32, p: &Problem) -> Plan {
    one_step(Step {
        symbol: symbol(kernel, p),
        grid: Dim3::new(tiles(p.seq_q(), flash_mma::BR), tiles(p.heads(), 1), tiles(p.batch(), 1)),
        block: flash_mma::THREADS.into(),
        shared_bytes: shared_bytes(p.head_dim()),
    })
}

const FLASH_PIPELINED: KernelSpec = KernelSpec {
    name: "flash_pipelined",
    summary: "mma.sync at its best: copies ahead, 32 rows a warp, masks only where they cut",
    idea: "every operand is there before it is needed, serves two products when it comes, and \
           what need not be done is not done",
    dtypes: &[DType::F16, DType::BF16],
    head_dims: &[32, 64, 96, 128, 160, 192, 224, 256],
    capability: (8, 0),
    exact_capability: false,
    sizes: |_, d| {
        let specialised = flash_pipelined::shape(d, !flash_pipelined::is_specialised(d));
        let shapes = [specialised, flash_pipelined::shape(d, true)];
        Sizes {
            rows: shapes.map(|shape| shape.rows()).to_vec(),
            keys: shapes.map(|shape| shape.keys).to_vec(),
        }
    },
    features: ALL_FEATURES,
    plan: |p, target| {
        let (policy, general) = match policy(p) {
            (_, false) if !flash_pipelined::is_specialised(p.head_dim()) => ("general", true),
            policy => policy,
        };
        let shape = flash_pipelined::shape(p.head_dim(), general);
        let symbol = format!("{}_{policy}", symbol("flash_pipelined", p));
        let shared_bytes = flash_pipelined::shared_bytes(p.head_dim(), general);
        let tasks = tiles(p.seq_q(), shape.rows()).saturating_mul(heads(p));
        // A head dim without an entry is refused before it is planned.
        let blocks = kernels_gpu::find(&symbol)
            .map_or(tasks, |entry| target.blocks_at_once(entry, shared_bytes));
        one_step(Step {
            symbol,
            grid: tasks.min(blocks).into(),
            block: shape.threads().into(),
            shared_bytes,
        })
    },
    tensor_maps: None,
    queue: true,
};

const FLASH_TF32: KernelSpec = KernelSpec {
    name: "flash_tf32",
    summary: "f32 on tensor cores: each product is three of tf32",
    idea: "a value is the sum of two that the tensor core can multiply, and three of the four \
           products of such sums are as good as f32",
    dtypes: &[DType::F32],
    head_dims: &[32, 64, 96, 128, 160, 192, 224, 256],
    capability: (8, 0),
    exact_capability: false,
    sizes: |_, d| {
        let shape = flash_tf32::shape(d);
        Sizes { rows: vec![shape.rows(d), fragment::ROWS], keys: vec![shape.keys] }
    },
    features: ALL_FEATURES,
    plan: |p, _| {
        let rows = flash_tf32::shape(p.head_dim()).rows(p.head_dim());
        one_step(Step {
            symbol: symbol("flash_tf32", p),
            // Too many blocks for a grid: the launch is refused.
            grid: tiles(p.seq_q(), rows).saturating_mul(heads(p)).into(),
            block: flash_tf32::THREADS.into(),
            shared_bytes: flash_tf32::shared_bytes(p.head_dim()),
        })
    },
    tensor_maps: None,
    queue: false,
};

const FLASH_HOPPER: KernelSpec = KernelSpec {
    name: "flash_hopper",
    summary: "wgmma, bulk copies, producer and consumer warpgroups",
    idea: "copies, products and softmax at the same time: a warpgroup that only copies, and \
           products that run beside the softmax of the tile before",
    dtypes: &[DType::F16, DType::BF16],
    head_dims: &[64, 96, 128, 192, 256],
    capability: (9, 0),
    exact_capability: true,
    sizes: |_, d| {
        let consumers = [flash_hopper::max_consumers::<Full>(d as u32), 2];
        let [most, least] = consumers.map(|consumers| Tiles::of(d as u32, consumers));
        Sizes {
            rows: vec![most.rows(), least.rows(), flash_hopper::CONSUMER_ROWS],
            keys: vec![most.keys, least.keys],
        }
    },
    features: ALL_FEATURES,
    plan: |p, target| {
        let hopper = hopper_tiles(p, target.multiprocessors);
        let size = if hopper.consumers == 3 { "_x3" } else { "" };
        let tasks = tiles(p.seq_q(), hopper.rows()).saturating_mul(heads(p));
        one_step(Step {
            symbol: format!("{}_{}{size}", symbol("flash_hopper", p), policy(p).0),
            // One block a multiprocessor: shared memory and registers leave no room for two.
            grid: tasks.min(target.multiprocessors).into(),
            block: hopper.threads().into(),
            shared_bytes: hopper.shared_bytes(),
        })
    },
    tensor_maps: Some(|p, tensors| {
        // The same for any number of consumers.
        let boxes = Tiles::of(p.head_dim() as u32, 2).boxes();
        let seqs = [p.seq_q(), p.seq_k(), p.seq_k(), p.seq_q()];
        [0, 1, 2, 3].map(|i| hopper_map(p, &tensors[i], seqs[i], boxes[i]))
    }),
    queue: true,
};

/// The policy that a kernel has for a problem, as its entries name it, and whether it is
/// the one that decides at run time.
fn policy(p: &Problem) -> (&'static str, bool) {
    match (p.has_mask() || p.dropout().is_some(), p.causal()) {
        (true, _) => ("general", true),
        (false, true) => ("causal", false),
        (false, false) => ("full", false),
    }
}

/// Tiles of flash_hopper for a problem.
fn hopper_tiles(p: &Problem, multiprocessors: u32) -> Tiles {
    let best = match policy(p).0 {
        "general" => Tiles::best::<General>,
        "causal" => Tiles::best::<Causal>,
        _ => Tiles::best::<Full>,
    };
    best(p.head_dim() as u32, p.seq_q() as u64, heads(p).into(), multiprocessors)
}

/// The tensor map of Q, K, V or O, `seq` rows a head: `[D, N, H, B]`, fastest first.
fn hopper_map(p: &Problem, tensor: &args::Tensor, seq: usize, box_dims: [u32; 4]) -> TensorMapSpec {
    let strides = [tensor.stride_n, tensor.stride_h, tensor.stride_b];
    TensorMapSpec {
        address: tensor.buffer.address,
        dtype: p.dtype(),
        dims: [p.head_dim(), seq, p.heads(), p.batch()].map(|n| n as u64).to_vec(),
        strides_bytes: strides.map(|s| s * p.dtype().size() as u64).to_vec(),
        box_dims: box_dims.to_vec(),
        swizzle_bytes: 128,
    }
}

/// The launch that computes the weights again.
pub(super) fn weights(p: &Problem) -> Step {
    Step {
        symbol: symbol("weights", p),
        grid: Dim3::new(tiles(p.seq_q(), weights::TILE), 1, heads(p)),
        block: Dim3::new(weights::TILE, weights::TILE, 1),
        shared_bytes: 0,
    }
}

/// A plan of one launch without a workspace, as the flash kernels have.
pub(super) fn one_step(step: Step) -> Plan {
    Plan { workspace_bytes: 0, steps: vec![step] }
}

/// The entry of a kernel for a problem's storage type and head dim.
pub(super) fn symbol(kernel: &str, p: &Problem) -> String {
    format!("{kernel}_{}_d{}", p.dtype(), p.head_dim())
}

/// How many tiles of `tile` cover `n`; more than a grid can have where it overflows, so
/// that the launch is refused.
pub(super) fn tiles(n: usize, tile: u32) -> u32 {
    u32::try_from(n.div_ceil(tile as usize)).unwrap_or(u32::MAX)
}

/// Heads of all batch entries.
fn heads(p: &Problem) -> u32 {
    u32::try_from(p.batch() * p.heads()).unwrap_or(u32::MAX)
}
