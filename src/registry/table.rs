//! The entries of the table, in the order of the ladder.

use kernels_gpu::{
    entry::Instances,
    forward::{
        flash_async,
        flash_hopper::{self, Tiles},
        flash_mma, flash_pipelined, flash_swizzled, flash_tf32, flash_tiled, naive, standard,
        weights,
    },
    parts::{fragment, ragged},
};
use simt::{Dim3, warp};

use super::{
    AttentionLimits, Draft, Features, KernelSpec, Map, Section, Sizes, Step, Usage,
    attention::{args, k_map, map},
};
use crate::{backend::Constants, dtype::DType, problem::Problem};

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

/// The features that all first rungs support.
pub(super) const ALL_FEATURES: Features = Features {
    any_head_dim: true,
    causal: true,
    mask: true,
    dropout: true,
    weights: false,
    window: true,
    kv_heads: true,
    softcap: true,
    alibi: true,
    bias: true,
    sinks: true,
    varlen: true,
    tokens_first: true,
};

const NAIVE: KernelSpec = KernelSpec {
    name: "naive",
    summary: "scores, softmax, weighted sum: three kernels, the N x N matrix in memory",
    idea: "attention as the textbook has it",
    dtypes: &DType::ALL,
    capability: (7, 5),
    exact_capability: false,
    limits: AttentionLimits {
        head_dims: &[32, 64, 96, 128],
        features: Features { weights: true, ..ALL_FEATURES },
        sizes: |_, _| Sizes {
            rows: vec![naive::SCORES_TILE, naive::SOFTMAX_ROWS],
            keys: vec![naive::SCORES_TILE, warp::LANES],
        },
    },
    draft: |p, _| {
        let tile = naive::SCORES_TILE;
        let scores = Step {
            grid: Dim3::new(blocks(p, tiles(p.seq_k(), tile)), tiles(p.seq_q(), tile), 1),
            block: Dim3::new(tile, tile, 1),
            ..padded_step(p, naive::SCORES)?
        };
        let softmax = Step { grid: grid(p, naive::SOFTMAX_ROWS), ..step(p, naive::SOFTMAX, 0)? };
        let output = padded_step(p, naive::OUTPUT)?;
        let elements = p.seq_q().saturating_mul(output.entry.size);
        let output =
            Step { grid: blocks(p, tiles(elements, naive::OUTPUT_THREADS)).into(), ..output };
        Ok(Draft { sections: vec![kept_weights(p)], steps: vec![scores, softmax, output] })
    },
};

const STANDARD: KernelSpec = KernelSpec {
    name: "standard",
    summary: "product, softmax, product: tensor cores, rows in shared memory, the N x N matrix in \
              memory",
    idea: "the same three steps, done well: the fair baseline",
    dtypes: &DType::ALL,
    capability: (8, 0),
    exact_capability: false,
    limits: AttentionLimits {
        head_dims: &[32, 64, 96, 128, 160, 192, 224, 256],
        features: Features { weights: true, ..ALL_FEATURES },
        sizes: |dtype, _| {
            let tile = if dtype == DType::F32 { standard::TILED_TILE } else { standard::MMA_TILE };
            // Keys that the softmax gives to a warp, and keeps at a time.
            let [of_warp, segment] = standard::softmax::edge_keys(dtype.size() as u32);
            Sizes { rows: vec![tile], keys: vec![tile, of_warp, segment] }
        },
    },
    draft: |p, _| {
        let [scores, output] = standard_products(p)?;
        let steps = vec![scores, standard_softmax(p)?, output];
        Ok(Draft { sections: vec![kept_weights(p)], steps })
    },
};

/// The two products of `standard`: tensor cores for 16-bit types, scalar tiles for f32.
fn standard_products(p: &Problem) -> Result<[Step<Problem>; 2], String> {
    let (dtype, d_v) = (p.dtype(), p.head_dim_v());
    let scores_grid =
        |tile| Dim3::new(blocks(p, tiles(p.seq_k(), tile)), tiles(p.seq_q(), tile), 1);
    let output_grid =
        |rows, columns| Dim3::new(blocks(p, tiles(p.seq_q(), rows)), tiles(d_v, columns), 1);
    if dtype == DType::F32 {
        let tile = standard::TILED_TILE;
        return Ok([
            Step { grid: scores_grid(tile), ..step(p, standard::TILED_SCORES, 0)? },
            Step { grid: output_grid(tile, tile), ..step(p, standard::TILED_OUTPUT, 0)? },
        ]);
    }
    let (tile, columns) = (standard::MMA_TILE, standard::output_columns(d_v as u32));
    Ok([
        Step {
            grid: scores_grid(tile),
            shared_bytes: standard::SCORES_SHARED_BYTES,
            ..step(p, standard::SCORES, 0)?
        },
        Step {
            grid: output_grid(tile, columns),
            shared_bytes: standard::output_shared_bytes(columns),
            ..step(p, standard::OUTPUT, columns as usize)?
        },
    ])
}

/// The softmax of `standard`: one warp per row, or one block for a long row.
fn standard_softmax(p: &Problem) -> Result<Step<Problem>, String> {
    let (seq_k, bytes) = (p.seq_k() as u32, p.dtype().size() as u32);
    let row_threads = standard::softmax::row_threads(seq_k, bytes);
    let entries = match row_threads {
        standard::softmax::THREADS => standard::softmax::OF_BLOCK,
        _ => standard::softmax::OF_WARP,
    };
    let rows = standard::softmax::THREADS / row_threads;
    Ok(Step {
        grid: grid(p, rows),
        shared_bytes: standard::softmax::shared_bytes(seq_k, bytes, row_threads),
        ..step(p, entries, 0)?
    })
}

const FLASH_TILED: KernelSpec = KernelSpec {
    name: "flash_tiled",
    summary: "tiles in shared memory, online softmax, scalar arithmetic",
    idea: "never write the N x N matrix: a running maximum and sum finish the softmax at the end",
    dtypes: &DType::ALL,
    capability: (7, 5),
    exact_capability: false,
    limits: AttentionLimits {
        head_dims: &[32, 64, 96, 128],
        features: ALL_FEATURES,
        sizes: |_, _| Sizes { rows: vec![flash_tiled::BR], keys: vec![flash_tiled::BC] },
    },
    draft: |p, _| {
        let step = padded_step(p, flash_tiled::ENTRIES)?;
        let shared_bytes = flash_tiled::shared_bytes(step.entry.size);
        Ok(Step { grid: grid(p, flash_tiled::BR), shared_bytes, ..step }.into())
    },
};

const FLASH_MMA: KernelSpec = KernelSpec {
    name: "flash_mma",
    summary: "both products on tensor cores by mma.sync, weights stay in registers",
    idea: "a warp keeps 16 rows: scores turn into weights and into the next product's operand \
           where they are",
    dtypes: &[DType::F16, DType::BF16],
    capability: (8, 0),
    exact_capability: false,
    limits: AttentionLimits {
        head_dims: &[64, 128],
        features: ALL_FEATURES,
        sizes: |_, _| Sizes {
            rows: vec![flash_mma::BR, fragment::ROWS],
            keys: vec![flash_mma::BC],
        },
    },
    draft: |p, _| mma_draft(flash_mma::ENTRIES, flash_mma::shared_bytes, p),
};

const FLASH_SWIZZLED: KernelSpec = KernelSpec {
    name: "flash_swizzled",
    summary: "flash_mma on swizzled tiles: no bank conflicts, no padding",
    idea: "exchange the chunks of each row by its number, and eight rows below each other are \
           in eight groups of banks",
    draft: |p, _| mma_draft(flash_swizzled::ENTRIES, flash_swizzled::shared_bytes, p),
    ..FLASH_MMA
};

const FLASH_TURING: KernelSpec = KernelSpec {
    name: "flash_turing",
    summary: "flash_swizzled with the tensor core instruction of Turing",
    idea: "the same source for GPUs before Ampere: half of the instruction's depth, f16 only",
    dtypes: &[DType::F16],
    capability: (7, 5),
    draft: |p, _| mma_draft(flash_swizzled::TURING, flash_swizzled::shared_bytes, p),
    ..FLASH_SWIZZLED
};

const FLASH_ASYNC: KernelSpec = KernelSpec {
    name: "flash_async",
    summary: "flash_swizzled with asynchronous copies into two stages",
    idea: "the next tile arrives during the arithmetic on this one",
    draft: |p, _| mma_draft(flash_async::ENTRIES, flash_async::shared_bytes, p),
    ..FLASH_SWIZZLED
};

/// The launch of the rungs that share the tile of flash_mma.
fn mma_draft(
    entries: Instances,
    shared_bytes: fn(usize) -> u32,
    p: &Problem,
) -> Result<Draft<Problem>, String> {
    let step = padded_step(p, entries)?;
    let shared_bytes = shared_bytes(step.entry.size);
    Ok(Step { grid: grid(p, flash_mma::BR), shared_bytes, ..step }.into())
}

const FLASH_PIPELINED: KernelSpec = KernelSpec {
    name: "flash_pipelined",
    summary: "mma.sync at its best: copies ahead, 32 rows per warp, masks only where they cut",
    idea: "every operand is there before it is needed, serves two products when it comes, and \
           what need not be done is not done",
    dtypes: &[DType::F16, DType::BF16],
    capability: (8, 0),
    exact_capability: false,
    limits: AttentionLimits {
        head_dims: &[32, 64, 96, 128, 160, 192, 224, 256],
        features: ALL_FEATURES,
        sizes: |_, d| {
            let shape = flash_pipelined::shape(d);
            Sizes { rows: vec![shape.rows()], keys: vec![shape.keys] }
        },
    },
    draft: |p, target| {
        let step = padded_step(p, flash_pipelined::ENTRIES)?;
        let d = step.entry.size;
        let tasks = blocks(p, tiles(p.seq_q(), flash_pipelined::shape(d).rows()));
        let shared_bytes = flash_pipelined::shared_bytes(d);
        let blocks = target.blocks_at_once(step.entry, shared_bytes);
        let step = Step { grid: tasks.min(blocks).into(), shared_bytes, ..step };
        Ok(Draft { sections: vec![Section::QUEUE], ..step.into() })
    },
};

const FLASH_TF32: KernelSpec = KernelSpec {
    name: "flash_tf32",
    summary: "f32 on tensor cores: each product is three of tf32",
    idea: "a value is the sum of two that the tensor core can multiply, and three of the four \
           products of such sums are as good as f32",
    dtypes: &[DType::F32],
    capability: (8, 0),
    exact_capability: false,
    limits: AttentionLimits {
        head_dims: &[32, 64, 96, 128, 160, 192, 224, 256],
        features: ALL_FEATURES,
        sizes: |_, d| {
            let shape = flash_tf32::shape(d);
            Sizes { rows: vec![shape.rows(d), fragment::ROWS], keys: vec![shape.keys] }
        },
    },
    draft: |p, _| {
        let step = padded_step(p, flash_tf32::ENTRIES)?;
        let d = step.entry.size;
        let grid = grid(p, flash_tf32::shape(d).rows(d));
        Ok(Step { grid, shared_bytes: flash_tf32::shared_bytes(d), ..step }.into())
    },
};

const FLASH_HOPPER: KernelSpec = KernelSpec {
    name: "flash_hopper",
    summary: "wgmma, bulk copies, producer and consumer warpgroups",
    idea: "copies, products and softmax at the same time: a warpgroup that only copies, and \
           products that run beside the softmax of the tile before",
    dtypes: &[DType::F16, DType::BF16],
    capability: (9, 0),
    exact_capability: true,
    limits: AttentionLimits {
        head_dims: &[64, 80, 96, 128, 192, 256],
        features: ALL_FEATURES,
        sizes: |_, d| {
            let consumers = [flash_hopper::max_consumers(d as u32), 2];
            let [most, least] = consumers.map(|consumers| Tiles::of(d as u32, consumers));
            Sizes {
                rows: vec![most.rows(), least.rows(), flash_hopper::CONSUMER_ROWS],
                keys: vec![most.keys, least.keys],
            }
        },
    },
    draft: |p, target| {
        let most = ragged::MAX_ROWS as usize;
        if p.varlen().is_some() && p.seq_q().max(p.seq_k()) > most {
            return Err(format!("has packed sequences of at most {most} rows"));
        }
        // Columns beyond the problem's: the tensor maps end before them.
        let size = entry_size(p, flash_hopper::TWO_CONSUMERS)?;
        let (d, seq) = (size as u32, [p.seq_q(), p.seq_k()].map(|n| n as u64));
        let multiprocessors = target.multiprocessors;
        let best = Tiles::best(d, constants(p), seq, heads(p).into(), multiprocessors);
        let (hopper, entries) = match best.consumers {
            _ if has_narrow_values(p, size) => {
                (Tiles::with_values(192, 128, 2), flash_hopper::VALUES_OF_128)
            }
            3 => (best, flash_hopper::THREE_CONSUMERS),
            _ => (best, flash_hopper::TWO_CONSUMERS),
        };
        let tasks = blocks(p, tiles(p.seq_q(), hopper.rows()));
        let [q, k, v, o] = hopper.boxes();
        let step = Step {
            // One block a multiprocessor: shared memory and registers leave no room for two.
            grid: tasks.min(multiprocessors).into(),
            shared_bytes: hopper.shared_bytes(),
            maps: vec![
                Map {
                    box_dims: q,
                    spec: |c, b| map(c.problem, &c.args.q, c.problem.q_extents(), b),
                },
                Map { box_dims: k, spec: |c, b| k_map(c, &c.args.k, c.problem.k_extents(), b) },
                Map { box_dims: v, spec: |c, b| k_map(c, &c.args.v, c.problem.v_extents(), b) },
                Map {
                    box_dims: o,
                    spec: |c, b| map(c.problem, &c.args.o, c.problem.o_extents(), b),
                },
            ],
            ..step(p, entries, size)?
        };
        Ok(Draft { sections: vec![Section::QUEUE], ..step.into() })
    },
};

/// The specialisation constants of a problem's entries.
pub(super) fn constants(p: &Problem) -> Constants {
    let bounds = p.bounds();
    Constants {
        causal: match bounds.right {
            None => 0,
            Some(0) => 1,
            Some(_) => 2,
        },
        left: bounds.left.is_some().into(),
        padding: p.has_mask().into(),
        dropout: p.dropout().is_some().into(),
        group: if p.group() > 1 { p.group() as u32 } else { 0 },
        softcap: p.softcap().is_some().into(),
        alibi: p.alibi().is_some().into(),
        bias: p.bias().is_some().into(),
        sinks: p.has_sinks().into(),
        varlen: p.varlen().is_some().into(),
        head_dim: 0,
        head_dim_v: 0,
        page: 0,
        ordered: 0,
        e4m3: 0,
    }
}

/// Recomputes the weights of a call from Q and K, for callers that want the weights when the kernel
/// did not keep them. It is no rung: it writes neither O nor the LSE.
pub(crate) static WEIGHTS: KernelSpec = KernelSpec {
    name: "weights",
    summary: "the attention weights, computed again from Q and K",
    idea: "two passes over the keys: the maximum and the sum, then the weights",
    dtypes: &DType::ALL,
    limits: AttentionLimits {
        head_dims: &[32, 64, 96, 128, 160, 192, 224, 256],
        features: Features { weights: true, ..ALL_FEATURES },
        sizes: |_, _| Sizes { rows: vec![weights::TILE], keys: vec![weights::TILE] },
    },
    capability: (7, 5),
    exact_capability: false,
    draft: |p, _| {
        let step = Step {
            grid: grid(p, weights::TILE),
            block: Dim3::new(weights::TILE, weights::TILE, 1),
            ..padded_step(p, weights::ENTRIES)?
        };
        Ok(Draft { sections: vec![kept_weights(p)], ..step.into() })
    },
};

/// The section of kernels that keep the weights.
pub(super) fn kept_weights(p: &Problem) -> Section {
    Section::new(Usage::Weights, p.weights_bytes())
}

/// A launch of a kernel's entry with this size for a problem, with the arguments of attention.
pub(super) fn step(p: &Problem, entries: Instances, size: usize) -> Result<Step<Problem>, String> {
    Ok(Step { constants: constants(p), ..Step::new(entries, p.dtype(), size, args)? })
}

/// A launch of the smallest entry of a kernel whose tiles have at least the problem's columns.
pub(super) fn padded_step(p: &Problem, entries: Instances) -> Result<Step<Problem>, String> {
    let size = entry_size(p, entries)?;
    Ok(Step { constants: padded_constants(p, size), ..step(p, entries, size)? })
}

/// The specialisation constants of a problem's entries with `size` columns.
pub(super) fn padded_constants(p: &Problem, size: usize) -> Constants {
    let fewer = |d: usize| if d == size { 0 } else { d as u32 };
    Constants { head_dim: fewer(p.head_dim()), head_dim_v: fewer(p.head_dim_v()), ..constants(p) }
}

/// Whether a problem with tiles of `size` columns takes the entries with values of 128 columns.
pub(super) fn has_narrow_values(p: &Problem, size: usize) -> bool {
    size == 192 && p.head_dim_v() <= 128
}

/// The smallest head dim of the entries whose tiles have at least the problem's columns.
pub(super) fn entry_size(p: &Problem, entries: Instances) -> Result<usize, String> {
    let columns = p.head_dim().max(p.head_dim_v());
    let sizes = entries.iter().map(|entry| entry.size);
    let holds = sizes.filter(|&size| size >= columns).min();
    holds.ok_or_else(|| format!("has no entry for head dim {columns}"))
}

/// One block per tile of `rows` query rows, head after head.
pub(super) fn grid(p: &Problem, rows: u32) -> Dim3 {
    blocks(p, tiles(p.seq_q(), rows)).into()
}

/// Blocks of a grid with the given number per head, or one block if there is no work: along `x`,
/// since `y` and `z` end at 65,535. On overflow the number exceeds a grid's limit, so the launch is
/// refused.
fn blocks(p: &Problem, of_head: u32) -> u32 {
    of_head.max(1).saturating_mul(heads(p))
}

/// The number of tiles of `tile` that cover `n`. On overflow the number exceeds a grid's limit, so
/// the launch is refused.
pub(super) fn tiles(n: usize, tile: u32) -> u32 {
    u32::try_from(n.div_ceil(tile as usize)).unwrap_or(u32::MAX)
}

/// Heads of all batch entries.
pub(super) fn heads(p: &Problem) -> u32 {
    u32::try_from(p.batch() * p.heads()).unwrap_or(u32::MAX)
}
