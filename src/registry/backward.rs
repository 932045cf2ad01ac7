//! The backward pass of attention: the ladder of its kernels, and the tensors of a call. As in the
//! table of attention kernels, the best kernel for a problem is the last one that supports it.

use kernels_gpu::{
    args,
    backward::{
        self,
        backward_hopper::{self, queries},
        backward_mma, backward_naive, backward_standard, backward_tiled, bias, convert, order,
        prepare, sinks,
    },
    entry::Instances,
};
use simt::Dim3;

use super::{
    Call, Draft, Map, Operation, Section, Spec, Step, Usage,
    attention::{Args, AttentionLimits, Sizes, attention_args, map, tensor_arg},
    plan::Plan,
    table::{
        self, ALL_FEATURES, constants, entry_size, has_narrow_values, heads, kept_weights,
        padded_constants, tiles,
    },
    tensors::{BiasView, Region, View},
};
use crate::{
    backend::{KernelArgs as _, TensorMapSpec},
    dtype::DType,
    error::Error,
    problem::Problem,
};

/// The gradients of Q, K and V for a problem, given the gradient of O; on request also the
/// gradients of the bias and the sinks.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Backward {
    /// The problem of the forward pass.
    pub problem: Problem,
    /// Whether calls with the same inputs give the same bits.
    pub deterministic: bool,
    /// Whether the bias gets a gradient, by a step of scalar arithmetic, far slower than the other
    /// steps.
    pub d_bias: bool,
    /// Whether the sinks get a gradient.
    pub d_sinks: bool,
}

impl Backward {
    /// The gradients for a problem, by the fastest kernel.
    #[must_use]
    pub const fn new(problem: Problem) -> Self {
        Self { problem, deterministic: false, d_bias: false, d_sinks: false }
    }

    /// The same gradients, with the same bits each time if `deterministic`.
    #[must_use]
    pub const fn deterministic(mut self, deterministic: bool) -> Self {
        self.deterministic = deterministic;
        self
    }

    /// With the gradient of the bias if `wanted`.
    #[must_use]
    pub const fn d_bias(mut self, wanted: bool) -> Self {
        self.d_bias = wanted;
        self
    }

    /// With the gradient of the sinks if `wanted`.
    #[must_use]
    pub const fn d_sinks(mut self, wanted: bool) -> Self {
        self.d_sinks = wanted;
        self
    }

    /// Shape of the gradient of the bias, `[B or 1, H or 1, Nq, Nk]`, if requested.
    #[must_use]
    pub fn d_bias_shape(&self) -> Option<[usize; 4]> {
        let shape = self.problem.bias_shape().filter(|_| self.d_bias)?;
        shape.try_into().ok()
    }

    /// Shape of the gradient of the sinks, `[H]`, if requested.
    #[must_use]
    pub fn d_sinks_shape(&self) -> Option<[usize; 1]> {
        (self.d_sinks && self.problem.has_sinks()).then(|| [self.problem.heads()])
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
    d_bias: Option<Region>,
    d_sinks: Option<Region>,
}

impl BackwardArgs {
    /// `forward`: the tensors of the forward pass, whose O and LSE are read, with the workspace of
    /// this call. `d_o` is the gradient of O. The kernels write the gradients of Q, K and V to
    /// `dq`, `dk` and `dv`, each in the shape of its tensor.
    #[must_use]
    pub const fn new(forward: Args, d_o: View, [dq, dk, dv]: [View; 3]) -> Self {
        Self { forward, d_o, dq, dk, dv, d_bias: None, d_sinks: None }
    }

    /// With memory for the gradient of the bias, contiguous `[B or 1, H or 1, Nq, Nk]` in the storage
    /// type.
    #[must_use]
    pub const fn d_bias(mut self, d_bias: Region) -> Self {
        self.d_bias = Some(d_bias);
        self
    }

    /// With memory for the gradient of the sinks, f32 `[H]`.
    #[must_use]
    pub const fn d_sinks(mut self, d_sinks: Region) -> Self {
        self.d_sinks = Some(d_sinks);
        self
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
        let [q, k, v, o] = [p.q_extents(), p.k_extents(), p.v_extents(), p.o_extents()];
        args.d_o.check("d_o", p.dtype(), o)?;
        for (what, view, extents) in [("dq", args.dq, q), ("dk", args.dk, k), ("dv", args.dv, v)] {
            view.check(what, p.dtype(), extents)?;
            view.check_distinct(what, extents)?;
        }
        let missing = |what: &str| {
            let context = ": its gradient was asked for".into();
            Error::MissingTensor { what: what.into(), context }
        };
        if let Some(shape) = self.d_bias_shape() {
            let region = args.d_bias.ok_or_else(|| missing("d_bias"))?;
            let (elements, size) = (shape.iter().product::<usize>(), p.dtype().size());
            region.check("d_bias", (elements * size) as u64, size as u64)?;
        }
        if let Some([heads]) = self.d_sinks_shape() {
            let region = args.d_sinks.ok_or_else(|| missing("d_sinks"))?;
            region.check("d_sinks", 4 * heads as u64, 4)?;
        }
        Ok(())
    }

    fn check_sizes(&self) -> Result<(), Error> {
        let asked = [
            ("d_bias", self.d_bias && self.problem.bias().is_none(), "bias"),
            ("d_sinks", self.d_sinks && !self.problem.has_sinks(), "sinks"),
        ];
        for (what, is_wrong, of) in asked {
            if is_wrong {
                let remedy = format!("the problem has no {of}");
                return Err(Error::InvalidValue { what, given: "true".into(), remedy });
            }
        }
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
    /// Device memory that a call needs: the forward pass's inputs and outputs, one gradient for
    /// each of Q, K, V and O, and the workspace.
    #[must_use]
    pub fn peak_bytes(&self) -> u64 {
        let p = &self.problem().problem;
        let elements = p.q_elements() + p.k_elements() + p.v_elements() + p.o_elements();
        let gradients = (elements * p.dtype().size()) as u64;
        let backward = self.problem();
        let d_bias = backward.d_bias_shape().map_or(0, |shape| shape.iter().product());
        let d_bias = (d_bias * p.dtype().size()) as u64;
        let d_sinks = backward.d_sinks_shape().map_or(0, |[heads]| 4 * heads as u64);
        let gradients = gradients + d_bias + d_sinks;
        p.input_bytes() + p.output_bytes() + gradients + self.workspace_bytes()
    }
}

/// The arguments of backward kernels, as bytes.
fn args(call: &Call<'_, Backward>) -> Vec<u8> {
    backward_args(call).to_launch_bytes()
}

fn backward_args(call: &Call<'_, Backward>) -> args::BackwardArgs {
    let BackwardArgs { forward, d_o, dq, dk, dv, d_bias, d_sinks } = call.args;
    let region = |usage| call.region(usage).arg();
    let view = |view: &View| tensor_arg(&call.problem.problem, *view);
    // As many as its kernel made room for.
    let dq_bytes_of_column = 4 * padded_rows(call.problem);
    let dq_columns = (call.region(Usage::DqAcc).bytes / dq_bytes_of_column) as u32;
    args::BackwardArgs {
        forward: attention_args(&call.problem.problem, forward, |usage| {
            // Of the forward pass's scratch memory the queue is what counts here, too.
            region(if usage == Usage::Queue { Usage::Turns } else { usage })
        }),
        gradients: args::Gradients {
            d_o: view(d_o),
            dq: view(dq),
            dk: view(dk),
            dv: view(dv),
            d_bias: call.problem.d_bias_shape().map_or_else(Default::default, |shape| {
                BiasView::contiguous(d_bias.unwrap_or_default(), shape).within(shape).arg()
            }),
            d_sinks: d_sinks.unwrap_or_default().arg(),
        },
        steps: args::BackwardScratch {
            delta: region(Usage::Delta),
            minus_lse_log2: region(Usage::MinusLseLog2),
            dq_acc: region(Usage::DqAcc),
            d_scores: region(Usage::DScores),
            dq_columns,
            total_k: call.problem.problem.varlen().map_or(0, |varlen| varlen.total_k as u32),
        },
    }
}

/// Every kernel of the backward pass, the slowest first.
pub static BACKWARD_KERNELS: &[BackwardSpec] =
    &[BACKWARD_NAIVE, BACKWARD_STANDARD, BACKWARD_TILED, BACKWARD_MMA, BACKWARD_HOPPER];

const BACKWARD_NAIVE: BackwardSpec = BackwardSpec {
    name: "backward_naive",
    summary: "P and dS in memory, a product for each gradient",
    idea: "the gradients as the formulas have them",
    dtypes: &DType::ALL,
    capability: (7, 5),
    exact_capability: false,
    limits: AttentionLimits {
        head_dims: &[32, 64, 96, 128, 160, 192, 224, 256],
        features: ALL_FEATURES,
        sizes: |_, _| Sizes { rows: vec![backward_naive::TILE], keys: vec![backward_naive::TILE] },
    },
    draft: |b, _| {
        let p = &b.problem;
        let threads = backward_naive::THREADS;
        let scores = scores_step(b, backward_naive::SCORES, heads(p))?;
        let queries = Step {
            grid: grid(tiles(p.seq_q() * p.head_dim(), threads), heads(p)),
            ..step(b, backward_naive::QUERIES)?
        };
        let columns = p.head_dim().max(p.head_dim_v());
        let keys = Step {
            grid: grid(tiles(p.seq_k() * columns, threads), kv_heads(p)),
            ..step(b, backward_naive::KEYS)?
        };
        Ok(Draft { sections: matrix_sections(b), steps: steps(b, [scores, queries, keys])? })
    },
};

const BACKWARD_STANDARD: BackwardSpec = BackwardSpec {
    name: "backward_standard",
    summary: "five products on tensor cores, P and dS in memory, transposed as they are read",
    idea: "the same products, done well: the fair baseline",
    dtypes: &DType::ALL,
    capability: (8, 0),
    exact_capability: false,
    limits: AttentionLimits {
        head_dims: &[32, 64, 96, 128, 160, 192, 224, 256],
        features: ALL_FEATURES,
        sizes: |dtype, _| {
            let is_scalar = dtype == DType::F32;
            let rows =
                if is_scalar { backward_standard::TILED_TILE } else { backward_standard::MMA_TILE };
            let of_scores = if is_scalar { rows } else { backward_standard::SCORES_KEYS };
            Sizes { rows: vec![rows], keys: vec![rows, of_scores] }
        },
    },
    draft: |b, _| {
        let steps = steps(b, standard_products(b)?)?;
        Ok(Draft { sections: matrix_sections(b), steps })
    },
};

/// The products of `backward_standard`, S and dP together: tensor cores for 16-bit types, scalar tiles for
/// f32.
fn standard_products(b: &Backward) -> Result<[Step<Backward>; 4], String> {
    use backward_standard::{
        KEYS, MMA_TILE, QUERIES, SCORES, SCORES_KEYS, SCORES_SHARED_BYTES, TILED_KEYS,
        TILED_QUERIES, TILED_SCORES, TILED_TILE, TILED_VALUES, VALUES, output_columns,
        output_shared_bytes,
    };

    let p = &b.problem;
    let is_scalar = p.dtype() == DType::F32;
    let tile = if is_scalar { TILED_TILE } else { MMA_TILE };
    let [rows, keys] = [p.seq_q(), p.seq_k()].map(|n| tiles(n, tile));
    let (of_scores, shared_bytes, scores) = match is_scalar {
        true => (TILED_TILE, 0, TILED_SCORES),
        false => (SCORES_KEYS, SCORES_SHARED_BYTES, SCORES),
    };
    let blocks = rows.saturating_mul(tiles(p.seq_k(), of_scores));
    let scores = Step { grid: grid(blocks, heads(p)), shared_bytes, ..step(b, scores)? };
    // A gradient of `d` columns: its tiles along the sequence, its heads, its two kernels.
    let product = |d: usize, along: u32, heads: u32, scalar: Instances, mma: Instances| {
        let columns = if is_scalar { TILED_TILE } else { output_columns(d as u32) };
        let (entries, size, shared_bytes) = match is_scalar {
            true => (scalar, 0, 0),
            false => (mma, columns as usize, output_shared_bytes(columns)),
        };
        let grid = grid(along.saturating_mul(tiles(d, columns)), heads);
        let step = Step::new(entries, p.dtype(), size, args)?;
        Ok::<_, String>(Step { grid, shared_bytes, constants: constants(p), ..step })
    };
    let (d, d_v) = (p.head_dim(), p.head_dim_v());
    Ok([
        scores,
        product(d, rows, heads(p), TILED_QUERIES, QUERIES)?,
        product(d, keys, kv_heads(p), TILED_KEYS, KEYS)?,
        product(d_v, keys, kv_heads(p), TILED_VALUES, VALUES)?,
    ])
}

/// Sections of the rungs that keep P and dS.
fn matrix_sections(b: &Backward) -> Vec<Section> {
    let p = &b.problem;
    let matrices = [kept_weights(p), Section::new(Usage::DScores, p.weights_bytes())];
    matrices.into_iter().chain(row_sections(b)).collect()
}

const BACKWARD_TILED: BackwardSpec = BackwardSpec {
    name: "backward_tiled",
    summary: "tiles in shared memory, scalar arithmetic: dK and dV by tiles of keys, dQ by tiles of rows",
    idea: "weights come back from the LSE, one tile at a time: no N x N matrix",
    dtypes: &DType::ALL,
    capability: (7, 5),
    exact_capability: false,
    limits: AttentionLimits {
        head_dims: &[32, 64, 96, 128],
        features: ALL_FEATURES,
        sizes: |_, _| Sizes { rows: vec![backward_tiled::BR], keys: vec![backward_tiled::BC] },
    },
    draft: |b, _| {
        let p = &b.problem;
        let d = entry_size(p, backward_tiled::KEYS)?;
        let shared_bytes = backward_tiled::shared_bytes(d);
        let keys = Step {
            grid: grid(tiles(p.seq_k(), backward_tiled::BC), kv_heads(p)),
            shared_bytes,
            ..padded_step(b, backward_tiled::KEYS, d)?
        };
        let queries = Step {
            grid: grid(tiles(p.seq_q(), backward_tiled::BR), heads(p)),
            shared_bytes,
            ..padded_step(b, backward_tiled::QUERIES, d)?
        };
        Ok(Draft { sections: row_sections(b).into(), steps: steps(b, [keys, queries])? })
    },
};

const BACKWARD_MMA: BackwardSpec = BackwardSpec {
    name: "backward_mma",
    summary: "tensor cores by mma.sync: keys stay, rows pass, dQ is summed in memory",
    idea: "scores are computed transposed, so that P and dS are the next products' operands where \
           they are",
    dtypes: &[DType::F16, DType::BF16],
    capability: (8, 0),
    exact_capability: false,
    limits: AttentionLimits {
        head_dims: &[32, 64, 96, 128, 160, 192, 224, 256],
        features: ALL_FEATURES,
        sizes: |_, d| Sizes {
            rows: vec![backward_mma::rows(d)],
            keys: vec![backward_mma::keys(d)],
        },
    },
    draft: |b, target| {
        let p = &b.problem;
        let d = entry_size(p, backward_mma::ENTRIES)?;
        let keys = backward_mma::keys(d);
        let rows = match backward_mma::rows(d) {
            rows if backward_mma::shared_bytes(d, rows) <= target.max_shared_bytes => rows,
            _ => backward_mma::BR,
        };
        let instances = match (rows, in_order(b, keys)) {
            (backward_mma::TALL_BR, false) => backward_mma::TALL_ENTRIES,
            (backward_mma::TALL_BR, true) => backward_mma::TALL_ORDERED_ENTRIES,
            (_, false) => backward_mma::ENTRIES,
            (_, true) => backward_mma::ORDERED_ENTRIES,
        };
        let main = Step {
            grid: grid(tiles(p.seq_k(), keys), kv_heads(p)),
            shared_bytes: backward_mma::shared_bytes(d, rows),
            ..padded_step(b, instances, d)?
        };
        let convert = Step {
            grid: grid(tiles(p.seq_q(), prepare::ROWS), heads(p)),
            ..step(b, convert::ENTRIES)?
        };
        sums_in_memory(b, d, keys, [main, convert])
    },
};

/// Whether blocks of `keys` keys are to add to dQ in a fixed order. Of two numbers, added to 0, the
/// order does not matter.
fn in_order(b: &Backward, keys: u32) -> bool {
    b.deterministic && b.problem.seq_k() > 2 * keys as usize
}

/// The plan of a kernel whose blocks, of `keys` keys, add to dQ in memory, in tiles of `d` columns.
fn sums_in_memory(
    b: &Backward,
    d: usize,
    keys: u32,
    own: [Step<Backward>; 2],
) -> Result<Draft<Backward>, String> {
    let sums = Section::new(Usage::DqAcc, padded_rows(b) * 4 * d as u64);
    let mut sections: Vec<_> = row_sections(b).into_iter().chain([sums]).collect();
    let mut steps = steps(b, own)?;
    if in_order(b, keys) {
        sections.push(Section::new(Usage::Turns, 4 * order::words(padded_rows(b))));
        steps[0].constants.ordered = 1;
    }
    Ok(Draft { sections, steps })
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
        head_dims: &[64, 128, 192, 256],
        features: ALL_FEATURES,
        sizes: |_, d| {
            let tiles = backward_hopper::Tiles::of(d as u32);
            Sizes { rows: vec![tiles.rows], keys: vec![tiles.keys] }
        },
    },
    draft: |b, _| {
        let p = &b.problem;
        let d = entry_size(p, backward_hopper::ENTRIES)?;
        let is_narrow = has_narrow_values(p, d);
        let d_v = if is_narrow { 128 } else { d };
        let hopper = backward_hopper::Tiles::with_values(d as u32, d_v as u32);
        let is_ordered = !hopper.is_wide() && in_order(b, hopper.keys);
        let instances = match (is_narrow, is_ordered) {
            (true, _) => backward_hopper::VALUES_OF_128,
            (false, false) => backward_hopper::ENTRIES,
            (false, true) => backward_hopper::ORDERED_ENTRIES,
        };
        let [rows, keys, numbers] = hopper.boxes();
        let mut maps = operand_maps(rows, keys);
        maps.extend([
            Map { box_dims: numbers, spec: |c, b| numbers_map(c, Usage::MinusLseLog2, b) },
            Map { box_dims: numbers, spec: |c, b| numbers_map(c, Usage::Delta, b) },
        ]);
        let main = Step {
            grid: grid(tiles(p.seq_k(), hopper.keys), kv_heads(p)),
            shared_bytes: hopper.shared_bytes(),
            maps,
            ..padded_step(b, instances, d)?
        };
        if hopper.is_wide() {
            let instances = if is_narrow { queries::VALUES_OF_128 } else { queries::ENTRIES };
            let queries = Step {
                grid: table::grid(p, queries::ROWS),
                shared_bytes: queries::shared_bytes(hopper),
                maps: operand_maps(rows, keys),
                ..padded_step(b, instances, d)?
            };
            return Ok(Draft {
                sections: row_sections(b).into(),
                steps: steps(b, [main, queries])?,
            });
        }
        let parts = hopper.dq_parts() * tiles(p.seq_q(), hopper.rows);
        let convert = Step {
            grid: grid(parts, heads(p)),
            ..padded_step(b, backward_hopper::convert::ENTRIES, d)?
        };
        sums_in_memory(b, d, hopper.keys, [main, convert])
    },
};

/// The tensor maps of Q, K, V and dO, by boxes of rows and of keys.
fn operand_maps(rows: [u32; 4], keys: [u32; 4]) -> Vec<Map<Backward>> {
    vec![
        Map {
            box_dims: rows,
            spec: |c, b| tensor_map(c, &c.args.forward.q, Problem::q_extents, b),
        },
        Map {
            box_dims: keys,
            spec: |c, b| tensor_map(c, &c.args.forward.k, Problem::k_extents, b),
        },
        Map {
            box_dims: keys,
            spec: |c, b| tensor_map(c, &c.args.forward.v, Problem::v_extents, b),
        },
        Map { box_dims: rows, spec: |c, b| tensor_map(c, &c.args.d_o, Problem::o_extents, b) },
    ]
}

/// The tensor map of Q, K, V or dO.
fn tensor_map(
    call: &Call<'_, Backward>,
    view: &View,
    extents: fn(&Problem) -> [usize; 4],
    box_dims: [u32; 4],
) -> TensorMapSpec {
    let p = &call.problem.problem;
    map(p, view, extents(p), box_dims)
}

/// The tensor map of one number per padded row: `[Nq', B H]`, fastest first.
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

/// The values that [`prepare`](kernels_gpu::backward::prepare) stores for each row.
fn row_sections(b: &Backward) -> [Section; 2] {
    let bytes = padded_rows(b) * 4;
    [Section::new(Usage::Delta, bytes), Section::new(Usage::MinusLseLog2, bytes)]
}

/// Padded rows over all heads.
fn padded_rows(b: &Backward) -> u64 {
    let p = &b.problem;
    (p.batch() * p.heads()) as u64 * u64::from(backward::padded(p.seq_q() as u32))
}

/// A rung's own steps between the common steps: the per-row values before, and the gradients of
/// bias and sinks after.
fn steps<const N: usize>(
    b: &Backward,
    own: [Step<Backward>; N],
) -> Result<Vec<Step<Backward>>, String> {
    let p = &b.problem;
    let mut steps = vec![prepare_step(b)?];
    steps.extend(own);
    if let Some([entries, heads, ..]) = b.d_bias_shape() {
        let matrices = u32::try_from(entries * heads).unwrap_or(u32::MAX);
        steps.push(scores_step(b, bias::ENTRIES, matrices)?);
    }
    if let Some([heads]) = b.d_sinks_shape() {
        steps.push(Step {
            grid: u32::try_from(heads).unwrap_or(u32::MAX).into(),
            shared_bytes: sinks::SHARED_BYTES,
            constants: constants(p),
            ..Step::new(sinks::ENTRIES, DType::F32, 0, args)?
        });
    }
    Ok(steps)
}

/// A launch with one thread per pair of row and key of each of `matrices` matrices.
fn scores_step(b: &Backward, entries: Instances, matrices: u32) -> Result<Step<Backward>, String> {
    let (p, tile) = (&b.problem, backward_naive::TILE);
    let of_matrix = tiles(p.seq_k(), tile).saturating_mul(tiles(p.seq_q(), tile));
    let (grid, block) = (grid(of_matrix, matrices), Dim3::new(tile, tile, 1));
    Ok(Step { grid, block, ..step(b, entries)? })
}

/// The first step of a backward pass.
fn prepare_step(b: &Backward) -> Result<Step<Backward>, String> {
    let p = &b.problem;
    let grid = grid(backward::padded(p.seq_q() as u32) / prepare::ROWS, heads(p));
    Ok(Step { grid, ..step(b, prepare::ENTRIES)? })
}

/// `of_head` blocks for each of `heads` heads: `z` continues where `y` ends, at 65,535. The last
/// few blocks may have no head.
fn grid(of_head: u32, heads: u32) -> Dim3 {
    const MOST: u32 = 65_535;
    let z = heads.div_ceil(MOST);
    Dim3::new(of_head, heads.div_ceil(z), z)
}

/// A launch of a kernel's entry for any head dim, with the arguments of the backward pass.
fn step(b: &Backward, entries: Instances) -> Result<Step<Backward>, String> {
    let p = &b.problem;
    Ok(Step { constants: constants(p), ..Step::new(entries, p.dtype(), 0, args)? })
}

/// A launch of a kernel's entry for head dim `d`, which may be larger than the problem's.
fn padded_step(b: &Backward, entries: Instances, d: usize) -> Result<Step<Backward>, String> {
    let p = &b.problem;
    Ok(Step { constants: padded_constants(p, d), ..Step::new(entries, p.dtype(), d, args)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{backend::CpuDevice, registry::Target};

    #[test]
    fn values_of_few_columns_have_entries_of_their_own() {
        let symbol = |d, d_v, deterministic| {
            let p = Problem::builder(1, 1, 70, d).head_dim_v(d_v).seq_k(300).dtype(DType::F16);
            let backward = Backward::new(p.build().unwrap()).deterministic(deterministic);
            let kernel = BACKWARD_KERNELS.last().unwrap();
            let plan = kernel.plan(&backward, &Target::of(&CpuDevice::new())).unwrap();
            plan.entries().nth(1).unwrap().entry.symbol
        };
        assert_eq!(symbol(192, 128, false), "backward_hopper_f16_d192_v128");
        assert_eq!(symbol(168, 104, true), "backward_hopper_f16_d192_v128");
        assert_eq!(symbol(192, 136, false), "backward_hopper_f16_d192");
        assert_eq!(symbol(128, 64, true), "backward_hopper_f16_d128_ordered");
        assert_eq!(symbol(256, 128, false), "backward_hopper_f16_d256");
    }
}
