//! The backward pass of attention: the ladder of its kernels, and the tensors of a call. As in the
//! table of attention kernels, the best kernel for a problem is the last one that can do it.

use kernels_gpu::{
    args,
    backward::{
        self, backward_hopper, backward_mma, backward_naive, backward_tiled, convert, prepare,
    },
    entry::Instances,
};
use simt::Dim3;

use super::{
    Call, Draft, Map, Operation, Section, Spec, Step, Usage,
    attention::{self, Args, AttentionLimits, Features, Sizes, attention_args, map},
    plan::Plan,
    table::{ALL_FEATURES, constants, heads, kept_weights, tiles},
    tensors::{Region, View},
};
use crate::{
    backend::{KernelArgs as _, TensorMapSpec},
    dtype::DType,
    error::Error,
    problem::Problem,
};

/// The gradients of Q, K and V for a problem, of the gradient of O. A bias and sinks get none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Backward {
    /// The problem of the forward pass.
    pub problem: Problem,
    /// Whether each call with the same inputs gives the same bits.
    pub deterministic: bool,
}

impl Backward {
    /// The gradients for a problem, by the fastest way.
    #[must_use]
    pub const fn new(problem: Problem) -> Self {
        Self { problem, deterministic: false }
    }

    /// The same gradients, with the same bits each time if `deterministic`.
    #[must_use]
    pub const fn deterministic(mut self, deterministic: bool) -> Self {
        self.deterministic = deterministic;
        self
    }

    /// Floating-point operations by convention: five products where the forward pass has two, 2.5
    /// times its [`flops`](Problem::flops).
    #[must_use]
    pub fn flops(&self) -> f64 {
        2.5 * self.problem.flops()
    }
}

/// A kernel of the backward pass.
pub type BackwardSpec = Spec<Backward>;

/// The tensors of one backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackwardArgs {
    forward: Args,
    d_o: View,
    dq: View,
    dk: View,
    dv: View,
}

impl BackwardArgs {
    /// `forward`: the tensors of the forward pass, whose O and LSE are read, with the workspace of
    /// this call. `d_o` is the gradient of O; those of Q, K and V are written to `dq`, `dk` and
    /// `dv`, each of the shape of its tensor.
    #[must_use]
    pub const fn new(forward: Args, d_o: View, [dq, dk, dv]: [View; 3]) -> Self {
        Self { forward, d_o, dq, dk, dv }
    }
}

impl Operation for Backward {
    type Args = BackwardArgs;
    type Limits = AttentionLimits;

    fn kernels() -> &'static [BackwardSpec] {
        BACKWARD_KERNELS
    }

    fn dtype(&self) -> DType {
        self.problem.dtype()
    }

    fn obstacle(&self, limits: &AttentionLimits) -> Option<String> {
        if self.problem.seq_k() == 0 {
            return Some("does not support problems without keys".into());
        }
        self.problem.obstacle(limits)
    }

    fn check(&self, args: &BackwardArgs) -> Result<(), Error> {
        let p = &self.problem;
        args.forward.check(p)?;
        if args.forward.lse.is_none() {
            let context = ": the backward pass reads the LSE of the forward pass".into();
            return Err(Error::MissingTensor { what: "lse".into(), context });
        }
        let [q, k, ..] = attention::extents(p);
        args.d_o.check("d_o", p.dtype(), q)?;
        for (what, view, extents) in [("dq", args.dq, q), ("dk", args.dk, k), ("dv", args.dv, k)] {
            view.check(what, p.dtype(), extents)?;
            view.check_distinct(what, extents)?;
        }
        Ok(())
    }

    fn check_sizes(&self) -> Result<(), Error> {
        self.problem.check_sizes()
    }

    fn given(args: &BackwardArgs, usage: Usage) -> Option<Region> {
        args.forward.lse.filter(|_| usage == Usage::Lse)
    }

    fn workspace(args: &BackwardArgs) -> Region {
        args.forward.workspace
    }
}

impl Plan<Backward> {
    /// Device memory that a call needs: the forward pass's inputs and outputs, as many gradients
    /// as there are of Q, K, V and O, and the workspace.
    #[must_use]
    pub fn peak_bytes(&self) -> u64 {
        let p = &self.problem().problem;
        let elements = 2 * (p.q_elements() + p.k_elements()) as u64;
        let gradients = elements * p.dtype().size() as u64;
        p.input_bytes() + p.output_bytes() + gradients + self.workspace_bytes()
    }
}

/// The arguments of backward kernels, as bytes.
fn args(call: &Call<'_, Backward>) -> Vec<u8> {
    backward_args(call).to_launch_bytes()
}

fn backward_args(call: &Call<'_, Backward>) -> args::BackwardArgs {
    let BackwardArgs { forward, d_o, dq, dk, dv } = call.args;
    let region = |usage| call.region(usage).arg();
    args::BackwardArgs {
        forward: attention_args(&call.problem.problem, forward, region),
        gradients: args::Gradients { d_o: d_o.arg(), dq: dq.arg(), dk: dk.arg(), dv: dv.arg() },
        steps: args::BackwardScratch {
            delta: region(Usage::Delta),
            lse_log2: region(Usage::LseLog2),
            dq_acc: region(Usage::DqAcc),
            d_scores: region(Usage::DScores),
        },
    }
}

/// Every kernel of the backward pass, the slowest first.
pub static BACKWARD_KERNELS: &[BackwardSpec] =
    &[BACKWARD_NAIVE, BACKWARD_TILED, BACKWARD_MMA, BACKWARD_HOPPER];

const BACKWARD_NAIVE: BackwardSpec = BackwardSpec {
    name: "backward_naive",
    summary: "P and dS in memory, a product for each gradient",
    idea: "the gradients as the formulas have them",
    dtypes: &DType::ALL,
    capability: (7, 5),
    exact_capability: false,
    limits: AttentionLimits {
        head_dims: &[32, 64, 96, 128, 160, 192, 224, 256],
        features: Features { any_head_dim: false, varlen: false, ..ALL_FEATURES },
        sizes: |_, _| Sizes { rows: vec![backward_naive::TILE], keys: vec![backward_naive::TILE] },
    },
    draft: |b, _| {
        let p = &b.problem;
        let (tile, threads) = (backward_naive::TILE, backward_naive::THREADS);
        let scores = Step {
            grid: Dim3::new(tiles(p.seq_k(), tile), tiles(p.seq_q(), tile), heads(p)),
            block: Dim3::new(tile, tile, 1),
            ..step(b, backward_naive::SCORES, 0)?
        };
        let queries = Step {
            grid: Dim3::new(tiles(p.seq_q() * p.head_dim(), threads), 1, heads(p)),
            ..step(b, backward_naive::QUERIES, 0)?
        };
        let keys = Step {
            grid: Dim3::new(tiles(p.seq_k() * p.head_dim(), threads), 1, kv_heads(p)),
            ..step(b, backward_naive::KEYS, 0)?
        };
        let matrices =
            [kept_weights(p), Section::new(Usage::DScores, p.weights_bytes())].into_iter();
        Ok(Draft {
            sections: matrices.chain(row_sections(b)).collect(),
            steps: vec![prepare_step(b)?, scores, queries, keys],
        })
    },
};

const BACKWARD_TILED: BackwardSpec = BackwardSpec {
    name: "backward_tiled",
    summary: "tiles in shared memory, scalar arithmetic: dK and dV by tiles of keys, dQ by tiles of rows",
    idea: "weights come back from the LSE, a tile at a time: no N x N matrix",
    dtypes: &DType::ALL,
    capability: (7, 5),
    exact_capability: false,
    limits: AttentionLimits {
        head_dims: &[32, 64, 96, 128],
        features: Features { any_head_dim: false, varlen: false, ..ALL_FEATURES },
        sizes: |_, _| Sizes { rows: vec![backward_tiled::BR], keys: vec![backward_tiled::BC] },
    },
    draft: |b, _| {
        let p = &b.problem;
        let shared_bytes = backward_tiled::shared_bytes(p.head_dim());
        let keys = Step {
            grid: Dim3::new(tiles(p.seq_k(), backward_tiled::BC), 1, kv_heads(p)),
            shared_bytes,
            ..step(b, backward_tiled::KEYS, p.head_dim())?
        };
        let queries = Step {
            grid: Dim3::new(tiles(p.seq_q(), backward_tiled::BR), 1, heads(p)),
            shared_bytes,
            ..step(b, backward_tiled::QUERIES, p.head_dim())?
        };
        let steps = vec![prepare_step(b)?, keys, queries];
        Ok(Draft { sections: row_sections(b).into(), steps })
    },
};

const BACKWARD_MMA: BackwardSpec = BackwardSpec {
    name: "backward_mma",
    summary: "tensor cores by mma.sync: keys stay, rows pass, dQ is summed in memory by atomics",
    idea: "scores are computed transposed, so that P and dS are the next products' operands where \
           they are",
    dtypes: &[DType::F16, DType::BF16],
    capability: (8, 0),
    exact_capability: false,
    limits: AttentionLimits {
        head_dims: &[32, 64, 96, 128, 160, 192, 224, 256],
        features: Features { any_head_dim: false, varlen: false, ..ALL_FEATURES },
        sizes: |_, d| Sizes { rows: vec![backward_mma::BR], keys: vec![backward_mma::keys(d)] },
    },
    draft: |b, _| {
        let p = &b.problem;
        let (d, keys) = (p.head_dim(), backward_mma::keys(p.head_dim()));
        check_order(b, keys)?;
        let main = Step {
            grid: Dim3::new(tiles(p.seq_k(), keys), 1, kv_heads(p)),
            shared_bytes: backward_mma::shared_bytes(d),
            ..step(b, backward_mma::ENTRIES, d)?
        };
        let convert = Step {
            grid: Dim3::new(tiles(p.seq_q(), prepare::ROWS), 1, heads(p)),
            ..step(b, convert::ENTRIES, 0)?
        };
        let sums = Section::new(Usage::DqAcc, padded_rows(b) * d as u64 * 4);
        let sections = row_sections(b).into_iter().chain([sums]).collect();
        Ok(Draft { sections, steps: vec![prepare_step(b)?, main, convert] })
    },
};

/// Of kernels whose blocks have so many keys each and add to the same rows of dQ: whether the order of
/// the sums may be any.
fn check_order(b: &Backward, keys: u32) -> Result<(), String> {
    if b.deterministic && b.problem.seq_k() > keys as usize {
        return Err(format!(
            "sums dQ in no fixed order where there are more than {keys} keys: backward_tiled gives the \
             same bits each time"
        ));
    }
    Ok(())
}

/// Heads of K and V of all batch entries.
fn kv_heads(p: &Problem) -> u32 {
    u32::try_from(p.batch() * p.kv_heads()).unwrap_or(u32::MAX)
}

const BACKWARD_HOPPER: BackwardSpec = BackwardSpec {
    name: "backward_hopper",
    summary: "wgmma, bulk copies, transposed scores, dK and dV in registers",
    idea: "copies, products and softmax at the same time: a tile of keys stays and the rows pass; P \
           and dS are multiplied from registers, and only dS passes through shared memory",
    dtypes: &[DType::F16, DType::BF16],
    capability: (9, 0),
    exact_capability: true,
    limits: AttentionLimits {
        head_dims: &[64, 128],
        features: Features { any_head_dim: false, varlen: false, ..ALL_FEATURES },
        sizes: |_, d| Sizes {
            rows: vec![backward_hopper::Tiles::of(d as u32).rows],
            keys: vec![backward_hopper::Tiles::KEYS],
        },
    },
    draft: |b, _| {
        let p = &b.problem;
        let hopper = backward_hopper::Tiles::of(p.head_dim() as u32);
        check_order(b, backward_hopper::Tiles::KEYS)?;
        let [rows, keys, numbers] = hopper.boxes();
        let main = Step {
            grid: Dim3::new(tiles(p.seq_k(), backward_hopper::Tiles::KEYS), 1, kv_heads(p)),
            shared_bytes: hopper.shared_bytes(),
            maps: vec![
                Map { box_dims: rows, spec: |c, b| rows_map(c, &c.args.forward.q, b) },
                Map { box_dims: keys, spec: |c, b| keys_map(c, &c.args.forward.k, b) },
                Map { box_dims: keys, spec: |c, b| keys_map(c, &c.args.forward.v, b) },
                Map { box_dims: rows, spec: |c, b| rows_map(c, &c.args.d_o, b) },
                Map { box_dims: numbers, spec: |c, b| numbers_map(c, Usage::LseLog2, b) },
                Map { box_dims: numbers, spec: |c, b| numbers_map(c, Usage::Delta, b) },
            ],
            ..step(b, backward_hopper::ENTRIES, p.head_dim())?
        };
        let parts = backward_hopper::CONSUMERS * tiles(p.seq_q(), hopper.rows);
        let convert = Step {
            grid: Dim3::new(parts, 1, heads(p)),
            ..step(b, backward_hopper::convert::ENTRIES, p.head_dim())?
        };
        let [delta, lse] = row_sections(b);
        let sums = Section::new(Usage::DqAcc, padded_rows(b) * 4 * p.head_dim() as u64);
        Ok(Draft { sections: vec![delta, lse, sums], steps: vec![prepare_step(b)?, main, convert] })
    },
};

/// The tensor map of Q or dO.
fn rows_map(call: &Call<'_, Backward>, view: &View, box_dims: [u32; 4]) -> TensorMapSpec {
    map(&call.problem.problem, view, call.problem.problem.q_extents(), box_dims)
}

/// The tensor map of K or V.
fn keys_map(call: &Call<'_, Backward>, view: &View, box_dims: [u32; 4]) -> TensorMapSpec {
    map(&call.problem.problem, view, call.problem.problem.k_extents(), box_dims)
}

/// The tensor map of a number for each padded row: `[Nq', B H]`, fastest first.
fn numbers_map(call: &Call<'_, Backward>, usage: Usage, box_dims: [u32; 4]) -> TensorMapSpec {
    let p = &call.problem.problem;
    let rows = u64::from(backward::padded(p.seq_q() as u32));
    let heads = (p.batch() * p.heads()) as u64;
    TensorMapSpec {
        address: call.region(usage).address,
        dtype: DType::F32,
        dims: vec![rows, heads, 1, 1],
        strides_bytes: vec![4 * rows, 4 * rows * heads, 4 * rows * heads],
        box_dims: box_dims.to_vec(),
        swizzle_bytes: 0,
    }
}

/// What [`prepare`](kernels_gpu::backward::prepare) leaves of each row.
fn row_sections(b: &Backward) -> [Section; 2] {
    let bytes = padded_rows(b) * 4;
    [Section::new(Usage::Delta, bytes), Section::new(Usage::LseLog2, bytes)]
}

/// Padded rows over all heads.
fn padded_rows(b: &Backward) -> u64 {
    let p = &b.problem;
    (p.batch() * p.heads()) as u64 * u64::from(backward::padded(p.seq_q() as u32))
}

/// The first step of a backward pass.
fn prepare_step(b: &Backward) -> Result<Step<Backward>, String> {
    let p = &b.problem;
    let grid = Dim3::new(backward::padded(p.seq_q() as u32) / prepare::ROWS, 1, heads(p));
    Ok(Step { grid, ..step(b, prepare::ENTRIES, 0)? })
}

/// A launch of a kernel's entry of that size, with the arguments of the backward pass.
fn step(b: &Backward, entries: Instances, size: usize) -> Result<Step<Backward>, String> {
    let p = &b.problem;
    Ok(Step { constants: constants(p), ..Step::new(entries, p.dtype(), size, args)? })
}
