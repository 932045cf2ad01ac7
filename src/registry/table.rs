//! The entries of the table, in the order of the ladder.

use kernels_gpu::{flash_tiled, naive};
use simt::Dim3;

use super::{Features, KernelSpec, Plan, Step};
use crate::{dtype::DType, problem::Problem};

/// Every kernel.
pub static KERNELS: &[KernelSpec] = &[NAIVE, FLASH_TILED];

/// What the first rungs all support.
const ALL_FEATURES: Features =
    Features { causal: true, mask: true, dropout: true, weights: false, tokens_first: true };

const NAIVE: KernelSpec = KernelSpec {
    name: "naive",
    summary: "scores, softmax, weighted sum: three kernels, the N x N matrix in memory",
    idea: "attention as the textbook has it",
    dtypes: &DType::ALL,
    head_dims: &[32, 64, 96, 128],
    capability: (7, 5),
    exact_capability: false,
    tile: |_| (naive::SCORES_TILE as usize, naive::SCORES_TILE as usize),
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
};

const FLASH_TILED: KernelSpec = KernelSpec {
    name: "flash_tiled",
    summary: "tiles in shared memory, online softmax, scalar arithmetic",
    idea: "never write the N x N matrix: a running maximum and sum finish the softmax at the end",
    dtypes: &DType::ALL,
    head_dims: &[32, 64, 96, 128],
    capability: (7, 5),
    exact_capability: false,
    tile: |_| (flash_tiled::BR as usize, flash_tiled::BC as usize),
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
};

/// A plan of one launch without a workspace, as the flash kernels have.
fn one_step(step: Step) -> Plan {
    Plan { workspace_bytes: 0, steps: vec![step] }
}

/// The entry of a kernel for a problem's storage type and head dim.
fn symbol(kernel: &str, p: &Problem) -> String {
    format!("{kernel}_{}_d{}", p.dtype(), p.head_dim())
}

/// How many tiles of `tile` cover `n`; more than a grid can have where it overflows, so
/// that the launch is refused.
fn tiles(n: usize, tile: u32) -> u32 {
    u32::try_from(n.div_ceil(tile as usize)).unwrap_or(u32::MAX)
}

/// Heads of all batch entries.
fn heads(p: &Problem) -> u32 {
    u32::try_from(p.batch() * p.heads()).unwrap_or(u32::MAX)
}
