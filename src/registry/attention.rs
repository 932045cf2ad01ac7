//! Attention as an operation: the limits of its kernels, the tensors of a call, and the kernels'
//! arguments.

use kernels_gpu::{
    args::{
        AttentionArgs, Buffer, Keys, Scores, Scratch, Sequences, Shape, Slopes, Tensor, Tensors,
    },
    parts::ragged,
};

use super::{
    Call, KERNELS, KernelSpec, Operation, Section, Usage, list,
    tensors::{BiasView, Region, View},
};
use crate::{
    backend::{KernelArgs as _, TensorMapSpec},
    dtype::DType,
    error::Error,
    problem::{Alibi, Extras, Layout, Problem, Window},
};

/// Head dims are multiples of this: rows of 16-bit elements are then whole chunks of 16 bytes.
pub const HEAD_DIM_STEP: usize = 8;

/// The features of an attention kernel, and its tile sizes.
#[derive(Clone, Copy, Debug)]
pub struct AttentionLimits {
    /// Head dims with an entry, ascending: see [`Features::any_head_dim`].
    pub head_dims: &'static [usize],
    /// The features beyond plain attention.
    pub features: Features,
    /// The tile sizes for a storage type and one of these head dims.
    pub sizes: fn(DType, head_dim: usize) -> Sizes,
}

/// The sizes at which a kernel's path changes: lengths beside them are edges, which the tests run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Numbers of query rows at which the path changes: first a tile's rows, then the rows of its
    /// parts and of tiles of other shapes.
    pub rows: Vec<u32>,
    /// Numbers of keys, likewise: a tile's keys, a segment's, the limit of a way to treat a row.
    pub keys: Vec<u32>,
}

/// The features of a kernel beyond plain attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Every head dim that is a multiple of [`HEAD_DIM_STEP`], up to the largest entry's, and
    /// values of another head dim: the next larger entry takes it. Otherwise only the head dims of
    /// the entries.
    pub any_head_dim: bool,
    /// Causal masks.
    pub causal: bool,
    /// Padding masks.
    pub mask: bool,
    /// Dropout.
    pub dropout: bool,
    /// The kernel leaves the weights `[B, H, Nq, Nk]` in the storage type in its workspace.
    pub weights: bool,
    /// Windows.
    pub window: bool,
    /// Fewer heads of K and V than of Q.
    pub kv_heads: bool,
    /// Caps of scores.
    pub softcap: bool,
    /// ALiBi.
    pub alibi: bool,
    /// Additive biases.
    pub bias: bool,
    /// Sinks.
    pub sinks: bool,
    /// Packed sequences.
    pub varlen: bool,
    /// `[B, N, H, D]` as well as `[B, H, N, D]`.
    pub tokens_first: bool,
}

impl Operation for Problem {
    type Args = Args;
    type Limits = AttentionLimits;

    fn kernels() -> &'static [KernelSpec] {
        KERNELS
    }

    fn dtype(&self) -> DType {
        self.dtype()
    }

    fn obstacle(&self, limits: &AttentionLimits) -> Option<String> {
        let features = limits.features;
        let (d, d_v) = (self.head_dim(), self.head_dim_v());
        for (d, of) in [(d, ""), (d_v, " of the values")] {
            if !limits.has_head_dim(d) {
                let has = limits.head_dims();
                return Some(format!("does not support head dim {d}{of}: it has {has}"));
            }
        }
        if d != d_v && !features.any_head_dim {
            return Some(format!("does not support head dim {d} with values of {d_v}"));
        }
        let tokens_first = self.layout() == Layout::TokensFirst;
        let Window { left, right } = self.bounds();
        let window = left.is_some() || right.is_some_and(|right| right > 0);
        [
            (self.causal(), features.causal, "causal masks"),
            (window, features.window, "windows"),
            (self.group() > 1, features.kv_heads, "fewer heads of K and V than of Q"),
            (self.softcap().is_some(), features.softcap, "caps of scores"),
            (self.alibi().is_some(), features.alibi, "ALiBi"),
            (self.bias().is_some(), features.bias, "additive biases"),
            (self.has_sinks(), features.sinks, "sinks"),
            (self.varlen().is_some(), features.varlen, "packed sequences"),
            (self.has_mask(), features.mask, "padding masks"),
            (self.dropout().is_some(), features.dropout, "dropout"),
            (tokens_first, features.tokens_first, "the layout [B, N, H, D]"),
        ]
        .into_iter()
        .find(|(wanted, able, _)| *wanted && !able)
        .map(|(.., what)| format!("does not support {what}"))
    }

    fn check(&self, args: &Args) -> Result<(), Error> {
        args.check(self)
    }

    fn check_sizes(&self) -> Result<(), Error> {
        check_head_dim("head dim", self.head_dim())?;
        check_head_dim("head dim of the values", self.head_dim_v())
    }

    fn optional_outputs(&self) -> Vec<Section> {
        vec![Section::new(Usage::Lse, self.rows() as u64 * 4)]
    }

    fn given(args: &Args, usage: Usage) -> Option<Region> {
        args.lse.filter(|_| usage == Usage::Lse)
    }

    fn workspace(args: &Args) -> Region {
        args.workspace
    }
}

/// Whether there is a kernel with that head dim.
///
/// # Errors
/// [`Error::InvalidValue`] with the existing head dims.
fn check_head_dim(what: &'static str, head_dim: usize) -> Result<(), Error> {
    let limits = || KERNELS.iter().map(|kernel| &kernel.limits);
    let Some(widest) = limits().max_by_key(|limits| limits.head_dims.last()) else { return Ok(()) };
    if limits().any(|limits| limits.has_head_dim(head_dim)) {
        return Ok(());
    }
    let remedy = format!("kernels have {}", widest.head_dims());
    Err(Error::InvalidValue { what, given: head_dim.to_string(), remedy })
}

impl AttentionLimits {
    /// Whether the kernel supports this head dim.
    #[must_use]
    pub fn has_head_dim(&self, head_dim: usize) -> bool {
        let most = self.head_dims.last().copied().unwrap_or_default();
        if self.features.any_head_dim {
            (HEAD_DIM_STEP..=most).contains(&head_dim) && head_dim.is_multiple_of(HEAD_DIM_STEP)
        } else {
            self.head_dims.contains(&head_dim)
        }
    }

    /// The supported head dims, in words.
    #[must_use]
    pub fn head_dims(&self) -> String {
        match self.head_dims.last() {
            Some(most) if self.features.any_head_dim => {
                format!("multiples of {HEAD_DIM_STEP} up to {most}")
            }
            _ => list(self.head_dims),
        }
    }
}

/// The arguments of attention kernels, as bytes.
pub(super) fn args(call: &Call<'_, Problem>) -> Vec<u8> {
    let region = |usage| call.region(usage).arg();
    attention_args(call.problem, call.args, region).to_launch_bytes()
}

/// A tensor in the kernels' form. Packed sequences lie in one batch entry.
pub(super) fn tensor_arg(p: &Problem, view: View) -> Tensor {
    let [stride_b, stride_h, stride_n] = view.strides;
    let stride_b = if p.varlen().is_some() { 0 } else { stride_b };
    View { strides: [stride_b, stride_h, stride_n], ..view }.arg()
}

/// The arguments of attention kernels; `region` is the memory that a call has for a use.
pub(super) fn attention_args(
    p: &Problem,
    tensors: &Args,
    region: impl Fn(Usage) -> Buffer,
) -> AttentionArgs {
    let (bounds, softcap) = (p.bounds(), p.softcap().unwrap_or_default());
    let view = |view: View| tensor_arg(p, view);
    AttentionArgs {
        tensors: Tensors {
            q: view(tensors.q),
            k: view(tensors.k),
            v: view(tensors.v),
            o: view(tensors.o),
            lse: region(Usage::Lse),
        },
        sequences: Sequences {
            cu_seqlens_q: tensors.cu_seqlens_q.unwrap_or_default().arg(),
            cu_seqlens_k: tensors.cu_seqlens_k.unwrap_or_default().arg(),
        },
        keys: Keys {
            padding: tensors.mask.unwrap_or_default().arg(),
            left: bounds.left.unwrap_or_default(),
            right: bounds.right.unwrap_or_default(),
        },
        scratch: Scratch { weights: region(Usage::Weights), queue: region(Usage::Queue) },
        shape: Shape {
            batch: p.batch() as u32,
            heads: p.heads() as u32,
            seq_q: p.seq_q() as u32,
            seq_k: p.seq_k() as u32,
            total_q: p.varlen().map_or(0, |varlen| varlen.total_q as u32),
            head_dim: p.head_dim() as u32,
            head_dim_v: p.head_dim_v() as u32,
        },
        scores: Scores {
            scale_log2: (f64::from(p.scale()) * std::f64::consts::LOG2_E) as f32,
            dropout: p.dropout_args(),
            scale: p.scale(),
            softcap,
            inverse_softcap: if softcap == 0.0 { 0.0 } else { softcap.recip() },
            alibi: Slopes {
                buffer: tensors.alibi_slopes.unwrap_or_default().arg(),
                stride_b: match p.alibi() {
                    Some(Alibi::PerBatchAndHead) => p.heads() as u64,
                    Some(Alibi::PerHead) | None => 0,
                },
            },
            bias: tensors.bias.unwrap_or_default().within(bias_extents(p)).arg(),
            sinks: tensors.sinks.unwrap_or_default().arg(),
        },
    }
}

/// The tensor map of K or V, from [`map`]. Without keys no copy uses it, so it is the map of Q,
/// since a map needs an address.
pub(super) fn k_map(
    call: &Call<'_, Problem>,
    view: &View,
    extents: [usize; 4],
    box_dims: [u32; 4],
) -> TensorMapSpec {
    let p = call.problem;
    if p.k_elements() == 0 {
        return map(p, &call.args.q, p.q_extents(), box_dims);
    }
    map(p, view, extents, box_dims)
}

/// The tensor map of a tensor with extents `[B, H, N, D]`: `[D, N, H, B]`, fastest first; of packed
/// sequences as [`ragged::map`] has it. A load fills columns of a box beyond D with 0, and a store
/// skips them.
pub(super) fn map(
    p: &Problem,
    view: &View,
    [batch, heads, rows, head_dim]: [usize; 4],
    box_dims: [u32; 4],
) -> TensorMapSpec {
    let bytes = |stride: u64| stride * p.dtype().size() as u64;
    let [stride_b, stride_h, stride_n] = view.strides;
    let (dims, strides_bytes, box_dims) = if p.varlen().is_some() {
        let strides = [stride_h, stride_n].map(bytes);
        let (dims, strides) = ragged::map(head_dim as u64, heads as u64, strides[0], strides[1]);
        (dims.to_vec(), strides.to_vec(), [&box_dims[..], &[1]].concat())
    } else {
        let dims = [head_dim, rows, heads, batch].map(|n| n as u64);
        let strides = [stride_n, stride_h, stride_b].map(bytes);
        (dims.to_vec(), strides.to_vec(), box_dims.to_vec())
    };
    let (address, dtype) = (view.region.address, p.dtype());
    TensorMapSpec { address, dtype, dims, strides_bytes, box_dims, swizzle_bytes: 128 }
}

/// The tensors of one call of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Args {
    pub(super) q: View,
    pub(super) k: View,
    pub(super) v: View,
    pub(super) o: View,
    pub(super) lse: Option<Region>,
    pub(super) mask: Option<Region>,
    pub(super) alibi_slopes: Option<Region>,
    pub(super) bias: Option<BiasView>,
    pub(super) sinks: Option<Region>,
    pub(super) cu_seqlens_q: Option<Region>,
    pub(super) cu_seqlens_k: Option<Region>,
    pub(super) workspace: Region,
}

impl Args {
    /// Queries, keys, values and the output, without other tensors or a workspace.
    #[must_use]
    pub const fn new(q: View, k: View, v: View, o: View) -> Self {
        Self {
            q,
            k,
            v,
            o,
            lse: None,
            mask: None,
            alibi_slopes: None,
            bias: None,
            sinks: None,
            cu_seqlens_q: None,
            cu_seqlens_k: None,
            workspace: Region::new(0, 0),
        }
    }

    /// Writes the log-sum-exp here: f32 `[B, H, Nq]`, natural log.
    #[must_use]
    pub const fn lse(mut self, lse: Region) -> Self {
        self.lse = Some(lse);
        self
    }

    /// The padding mask: u8 `[B, Nk]`, 0 = hidden.
    #[must_use]
    pub const fn mask(mut self, mask: Region) -> Self {
        self.mask = Some(mask);
        self
    }

    /// The slopes of ALiBi: f32 `[H]` or `[B, H]`, as the problem has it.
    #[must_use]
    pub const fn alibi_slopes(mut self, slopes: Region) -> Self {
        self.alibi_slopes = Some(slopes);
        self
    }

    /// The additive bias: `[B, H, Nq, Nk]` in the storage type, with strides. The strides of batch
    /// entries and heads that the problem's bias repeats over count as 0.
    #[must_use]
    pub const fn bias(mut self, bias: BiasView) -> Self {
        self.bias = Some(bias);
        self
    }

    /// The sinks: f32 `[H]`; -inf means no sink.
    #[must_use]
    pub const fn sinks(mut self, sinks: Region) -> Self {
        self.sinks = Some(sinks);
        self
    }

    /// The start offsets of packed sequences in Q, and in K and V: u32 `[B + 1]` each, from 0 on,
    /// ascending. No sequence may be longer than the problem's lengths, or end past the tensor:
    /// only the device sees the numbers. The strides of batch entries are ignored.
    #[must_use]
    pub const fn cu_seqlens(mut self, q: Region, k: Region) -> Self {
        self.cu_seqlens_q = Some(q);
        self.cu_seqlens_k = Some(k);
        self
    }

    /// Everything beside Q, K and V; a bias is contiguous.
    pub(crate) fn extras(self, p: &Problem, extras: Extras<Region>) -> Self {
        let Extras { mask, alibi_slopes, bias, sinks, cu_seqlens_q, cu_seqlens_k } = extras;
        let bias = bias.map(|region| BiasView::contiguous(region, bias_extents(p)));
        Self { mask, alibi_slopes, bias, sinks, cu_seqlens_q, cu_seqlens_k, ..self }
    }

    /// The workspace of this call: see [`Plan::workspace_bytes`](super::plan::Plan::workspace_bytes).
    #[must_use]
    pub const fn workspace(mut self, workspace: Region) -> Self {
        self.workspace = workspace;
        self
    }

    /// Compares the tensors with a problem.
    pub(super) fn check(&self, p: &Problem) -> Result<(), Error> {
        self.check_extents(p, p.dtype(), extents(p))
    }

    /// As [`check`](Self::check), with other extents of Q, K, V and O, and another storage type of K and V.
    pub(super) fn check_extents(
        &self,
        p: &Problem,
        of_keys: DType,
        [q, k, v, o]: [[usize; 4]; 4],
    ) -> Result<(), Error> {
        let own = p.dtype();
        for (what, view, dtype, extents) in [
            ("q", self.q, own, q),
            ("k", self.k, of_keys, k),
            ("v", self.v, of_keys, v),
            ("o", self.o, own, o),
        ] {
            view.check(what, dtype, extents)?;
        }
        self.o.check_distinct("o", o)?;
        if let Some(lse) = self.lse {
            lse.check("lse", p.rows() as u64 * 4, 4)?;
        }
        let Self { mask, alibi_slopes, bias, sinks, cu_seqlens_q, cu_seqlens_k, .. } = *self;
        let bias_region = bias.map(|b| b.region);
        let extras =
            Extras { mask, alibi_slopes, bias: bias_region, sinks, cu_seqlens_q, cu_seqlens_k };
        extras.check(p, |what, size, shape, region| match bias {
            Some(bias) if what == "bias" => bias.check(p.dtype(), bias_extents(p)),
            _ => region.check(what, (size * shape.iter().product::<usize>()) as u64, size as u64),
        })
    }
}

/// Extents `[B, H, N, D]` of Q, K, V and O.
pub(super) fn extents(p: &Problem) -> [[usize; 4]; 4] {
    [p.q_extents(), p.k_extents(), p.v_extents(), p.o_extents()]
}

/// Extents of a problem's bias, `[B or 1, H or 1, Nq, Nk]`; all 0 without one.
fn bias_extents(p: &Problem) -> [usize; 4] {
    p.bias_shape().and_then(|shape| shape.try_into().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::Bias;

    fn problem() -> Problem {
        Problem::builder(2, 3, 5, 32).seq_k(7).dtype(DType::F16).build().unwrap()
    }

    fn view(address: u64, seq: usize) -> View {
        let region = Region::new(address, 2 * 3 * seq as u64 * 32 * 2);
        View::contiguous(region, Layout::HeadsFirst, 3, seq, 32)
    }

    fn good() -> Args {
        Args::new(view(0x1000, 5), view(0x2000, 7), view(0x4000, 7), view(0x8000, 5))
    }

    fn message(args: Args) -> String {
        let error = args.check(&problem()).unwrap_err();
        assert!(error.is_usage());
        error.to_string()
    }

    #[test]
    fn what_joins_scores_is_checked_and_passed_on() {
        let p = Problem::builder(2, 4, 5, 32).kv_heads(2).seq_k(7).dtype(DType::F16);
        let p = p.window(Window { left: Some(3), right: Some(u32::MAX) }).softcap(Some(50.0));
        let p = p.alibi(Some(Alibi::PerBatchAndHead)).sinks(true);
        let bias = Bias { per_batch: false, per_head: true };
        let p = p.bias(Some(bias)).build().unwrap();
        let view = |address, heads, seq: usize| {
            let region = Region::new(address, (2 * heads * seq * 32 * 2) as u64);
            View::contiguous(region, Layout::HeadsFirst, heads, seq, 32)
        };
        let kv = view(0x4000, 2, 7);
        let slopes = Region::new(0x8000, 2 * 4 * 4);
        let sinks = Region::new(0x8100, 4 * 4);
        // Each head has one row of biases, seen by every query; keys lie two apart.
        let strides = [9, 14, 0, 2];
        let bias = BiasView::new(Region::new(0x8202, (3 * 14 + 6 * 2 + 1) * 2), strides);
        let args = Args::new(view(0x1000, 4, 5), kv, kv, view(0x2000, 4, 5));
        let good = args.alibi_slopes(slopes).bias(bias).sinks(sinks);
        good.check(&p).unwrap();
        let AttentionArgs { keys, scores, .. } =
            attention_args(&p, &good, |_| Region::default().arg());
        // No key lies further behind the first row than a bound of 2^32 - 1: it is none.
        assert_eq!((keys.left, keys.right), (3, 0));
        assert_eq!((scores.softcap, scores.inverse_softcap), (50.0, 0.02));
        assert_eq!((scores.alibi.stride_b, scores.alibi.buffer), (4, slopes.arg()));
        assert_eq!((scores.bias.stride_b, scores.bias.stride_h), (0, 14));
        assert_eq!((scores.bias.stride_q, scores.bias.stride_k), (0, 2));
        assert_eq!(scores.sinks, sinks.arg());
        let message = |args: Args| args.check(&p).unwrap_err().to_string();
        assert!(message(args).contains("tensor alibi_slopes is missing: the problem has ALiBi"));
        assert!(message(Args { bias: None, ..good }).contains("tensor bias is missing"));
        assert!(message(Args { sinks: None, ..good }).contains("tensor sinks is missing"));
        let short = |region: Region| Region { bytes: region.bytes - 1, ..region };
        assert!(message(good.alibi_slopes(short(slopes))).contains("needs 32 bytes"));
        assert!(message(good.sinks(short(sinks))).contains("needs 16 bytes"));
        let text = message(good.bias(BiasView { region: short(bias.region), ..bias }));
        assert!(text.contains("needs 110 bytes"), "{text}");
        let odd = Region { address: 0x8201, ..bias.region };
        assert!(message(good.bias(BiasView { region: odd, ..bias })).contains("multiple of 2"));
        let far = [0, 1 << 62, 0, 1 << 62];
        assert!(message(good.bias(BiasView { strides: far, ..bias })).contains("2^64"));
        // Strides beyond 2^31 elements: the check alone needs no memory.
        let far = BiasView::new(Region::new(0x8202, 1 << 36), [0, 1 << 33, 0, 1]);
        good.bias(far).check(&p).unwrap();
        let plain = p.to_builder().sinks(false).build().unwrap();
        let text = good.check(&plain).unwrap_err().to_string();
        assert!(text.contains("tensor sinks was given"), "{text}");
    }

    #[test]
    fn what_is_wrong_with_an_argument_is_named() {
        good().check(&problem()).unwrap();
        let with_q = |q| Args { q, ..good() };
        let strides = |strides| View { strides, ..good().q };
        assert!(message(with_q(strides([480, 160, 33]))).contains("q = a row stride of 33"));
        let text = message(with_q(strides([480, 160, 40])));
        assert!(text.contains("the last element ends at byte 1984"), "{text}");
        assert!(message(with_q(strides([u64::MAX / 16 * 16, 160, 32]))).contains("2^64"));
        let at = |address| View { region: Region { address, ..good().q.region }, ..good().q };
        assert!(message(with_q(at(0))).contains("q = address 0x0"));
        assert!(message(with_q(at(0x1008))).contains("a multiple of 16"));
        let short = View { region: Region::new(0x2000, 100), ..good().k };
        assert!(message(Args { k: short, ..good() }).contains("k = 100 bytes"));
        // Inputs may share rows, the output may not.
        let shared = View { strides: [480, 0, 32], ..good().q };
        with_q(shared).check(&problem()).unwrap();
        assert!(message(Args { o: shared, ..good() }).contains("o = strides [480, 0, 32]"));
        let lse = Region::new(0x9000, 2 * 3 * 5 * 4);
        good().lse(lse).check(&problem()).unwrap();
        assert!(message(good().lse(Region { bytes: 119, ..lse })).contains("needs 120 bytes"));
        assert!(message(good().lse(Region { address: 0x9002, ..lse })).contains("a multiple of 4"));
        assert!(message(good().mask(lse)).contains("mask"));
        let masked = problem().to_builder().mask(true).build().unwrap();
        assert!(good().check(&masked).unwrap_err().to_string().contains("mask is missing"));
        let error = good().mask(Region::new(0x9000, 13)).check(&masked).unwrap_err().to_string();
        assert!(error.contains("needs 14 bytes"), "{error}");
    }
}
