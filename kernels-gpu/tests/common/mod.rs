//! Launches on the emulator, and the references in f64.
#![allow(dead_code, reason = "each test file uses some of these")]

use std::{
    cell::{Cell, RefCell},
    env,
};

use approx::abs_diff_eq;
use kernels_gpu::{
    args::{
        AttentionArgs, Bias, Buffer, DropoutArgs, Keys, LinearArgs, Scores, Scratch, Sequences,
        Shape, Slopes, Tensor, Tensors,
    },
    constants::Constants,
    forward::flash_hopper::{HopperArgs, Tiles},
    linear::{
        self,
        linear_hopper::{LinearHopperArgs, TileShape},
    },
    parts::{dropout, queue::QUEUE_WORDS, ragged},
};
use simt::{
    Dim3,
    emulator::{self, Fault, Launch, Options, Stats},
    scalar::Scalar,
    tma::{Element, TensorMap, TensorMapSpec},
};

mod features;
#[allow(unused_imports, reason = "no test program uses everything")]
pub use features::{Features, feature_cases};

thread_local! {
    static OPTIONS: RefCell<Option<Options>> = const { RefCell::new(None) };
    static CONSTANTS: Cell<Constants> = const { Cell::new(Constants::NONE) };
}

/// Seeds of the tests that go through several; in CI, which sets `SIMT_SEEDS`, more.
pub fn seeds() -> std::ops::Range<u64> {
    0..number("SIMT_SEEDS").unwrap_or(3)
}

/// How this thread's launches run: as [`with_options`] says, or with the seed in `SIMT_SEED`,
/// which repeats what a fault reports; with the constants of [`with_constants`].
pub fn options() -> Options {
    let options = OPTIONS
        .with_borrow(Clone::clone)
        .unwrap_or_else(|| Options::seeded(number("SIMT_SEED").unwrap_or(0)));
    Options { constants: CONSTANTS.get().values(), ..options }
}

/// What this thread's launches are specialised for.
pub fn constants() -> Constants {
    CONSTANTS.get()
}

/// Runs `f` with the launches of this thread specialised for `constants`.
pub fn with_constants<R>(constants: Constants, f: impl FnOnce() -> R) -> R {
    let before = CONSTANTS.replace(constants);
    let result = f();
    CONSTANTS.set(before);
    result
}

fn number(variable: &str) -> Option<u64> {
    let text = env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is {text:?}, not a number")))
}

/// Runs `f` with the launches of this thread as `options` say.
pub fn with_options<R>(options: Options, f: impl FnOnce() -> R) -> R {
    let before = OPTIONS.replace(Some(options));
    let result = f();
    OPTIONS.set(before);
    result
}

/// The memory behind a slice.
pub fn buffer<T>(data: &[T]) -> Buffer {
    Buffer { address: data.as_ptr() as u64, bytes: size_of_val(data) as u64 }
}

/// The memory behind a slice that a kernel writes.
pub fn buffer_mut<T>(data: &mut [T]) -> Buffer {
    buffer(data)
}

/// The blocks of rungs with a block for each tile of `rows` query rows.
pub fn blocks_of(args: &AttentionArgs, rows: u32) -> Dim3 {
    (args.shape.seq_q.div_ceil(rows) * args.shape.heads * args.shape.batch).into()
}

/// The arguments with a queue.
pub fn with_queue(args: &AttentionArgs, queue: &mut [u32]) -> AttentionArgs {
    let queue = buffer_mut(queue);
    AttentionArgs { scratch: Scratch { queue, ..args.scratch }, ..*args }
}

/// Runs an entry; the test fails with the fault's text.
pub fn run<A>(symbol: &str, grid: Dim3, block: Dim3, shared_bytes: u32, args: &A) -> Stats {
    try_run(symbol, grid, block, shared_bytes, args)
        .unwrap_or_else(|fault| panic!("{symbol}: {fault}"))
}

/// Runs an entry.
pub fn try_run<A>(
    symbol: &str,
    grid: Dim3,
    block: Dim3,
    shared_bytes: u32,
    args: &A,
) -> Result<Stats, Fault> {
    let entry = kernels_gpu::find(symbol).unwrap_or_else(|| panic!("no entry {symbol}"));
    assert_eq!(u64::from(entry.threads), block.count(), "{symbol}: threads of a block");
    assert_eq!(entry.args_bytes, size_of::<A>(), "{symbol}: arguments");
    let address = std::ptr::from_ref(args) as usize;
    // SAFETY: the arguments describe buffers that outlive the launch.
    let kernel = || unsafe { (entry.run)(address as *const _) };
    let launch = Launch { grid, block, cluster: entry.cluster, shared_bytes };
    emulator::launch_with(launch, &options(), &kernel)
}

/// Deterministic values in [-1, 1), rounded to `T`.
pub fn values<T: Scalar>(count: u32, seed: u32) -> Vec<T> {
    let mut state = seed;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            T::from_f32(f32::from_bits(state >> 9 | 0x4000_0000) - 3.0)
        })
        .collect()
}

/// Half a unit in the last place of a storage type, relative.
pub fn epsilon<T: Scalar>() -> f64 {
    let one = 1.0f32;
    let mut step = 0.5f32;
    while T::from_f32(one + step / 2.0).to_f32() > one {
        step /= 2.0;
    }
    f64::from(step) / 2.0
}

/// What is computed of a projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Linear {
    Y,
    Dx,
    Dw,
}

/// Rows, input features, output features.
pub type LinearShape = (u32, u32, u32);

impl Linear {
    pub const GRADIENTS: [Self; 2] = [Self::Dx, Self::Dw];

    /// How the names of its entries end.
    pub fn end(self) -> &'static str {
        match self {
            Self::Y => "",
            Self::Dx => "_dx",
            Self::Dw => "_dw",
        }
    }

    /// Rows and columns of the result.
    pub fn result(self, (rows, in_features, out_features): LinearShape) -> [u32; 2] {
        match self {
            Self::Y => [rows, out_features],
            Self::Dx => [rows, in_features],
            Self::Dw => [out_features, in_features],
        }
    }

    /// The grid of a kernel with a block per tile of `tile` rows and columns.
    pub fn grid(self, shape: LinearShape, tile: u32) -> Dim3 {
        let [rows, columns] = self.result(shape);
        Dim3::new(rows.div_ceil(tile), columns.div_ceil(tile), 1)
    }

    /// The arguments of linear_hopper.
    pub fn hopper(self, args: &LinearArgs, tile: TileShape) -> LinearHopperArgs {
        let LinearArgs { x, w, y, rows, in_features, out_features, .. } = *args;
        let (x, w, y) =
            ((x, rows, in_features), (w, out_features, in_features), (y, rows, out_features));
        let ([a, b], boxes) = match self {
            Self::Y => ([x, w], tile.boxes::<linear::Y>()),
            Self::Dx => ([y, w], tile.boxes::<linear::Dx>()),
            Self::Dw => ([y, x], tile.boxes::<linear::Dw>()),
        };
        let map = |(at, rows, columns): (Buffer, u32, u32), box_dims: [u32; 4]| {
            let (rows, columns) = (u64::from(rows), u64::from(columns));
            let strides = [columns, columns * rows, columns * rows];
            map(at.address, &[columns, rows, 1, 1], &strides, &box_dims)
        };
        LinearHopperArgs { maps: [map(a, boxes[0]), map(b, boxes[1])], args: *args }
    }
}

/// The tensors of a projection: random, but for the result, which is NaN.
pub struct LinearTensors<T> {
    pub x: Vec<T>,
    pub w: Vec<T>,
    pub bias: Vec<T>,
    pub y: Vec<T>,
    pub shape: LinearShape,
    pub product: Linear,
}

impl<T: Scalar> LinearTensors<T> {
    pub fn new(product: Linear, shape: LinearShape, with_bias: bool) -> Self {
        let (rows, in_features, out_features) = shape;
        let mut tensors = Self {
            x: values(rows * in_features, 1),
            w: values(out_features * in_features, 2),
            bias: values(if with_bias { out_features } else { 0 }, 3),
            y: values(rows * out_features, 4),
            shape,
            product,
        };
        let nan = T::from_f32(f32::NAN);
        tensors.result().fill(nan);
        if product != Linear::Y {
            // Nobody reads it.
            tensors.bias.fill(nan);
        }
        tensors
    }

    pub fn result(&mut self) -> &mut [T] {
        match self.product {
            Linear::Y => &mut self.y,
            Linear::Dx => &mut self.x,
            Linear::Dw => &mut self.w,
        }
    }

    pub fn args(&mut self) -> LinearArgs {
        let (rows, in_features, out_features) = self.shape;
        LinearArgs {
            x: buffer_mut(&mut self.x),
            w: buffer_mut(&mut self.w),
            bias: buffer_mut(&mut self.bias),
            y: buffer_mut(&mut self.y),
            rows,
            in_features,
            out_features,
        }
    }

    /// The terms of an element of the result.
    fn terms(&self, row: usize, column: usize) -> Vec<f64> {
        let (rows, in_features, out_features) = self.shape;
        let [rows, n_in, n_out] = [rows, in_features, out_features].map(|n| n as usize);
        let (x, w, y) = (&self.x, &self.w, &self.y);
        let of = |a: T, b: T| f64::from(a.to_f32()) * f64::from(b.to_f32());
        match self.product {
            Linear::Y => (0..n_in).map(|i| of(x[row * n_in + i], w[column * n_in + i])).collect(),
            Linear::Dx => {
                (0..n_out).map(|o| of(y[row * n_out + o], w[o * n_in + column])).collect()
            }
            Linear::Dw => (0..rows).map(|r| of(y[r * n_out + row], x[r * n_in + column])).collect(),
        }
    }
}

/// Checks a linear kernel on one shape.
pub fn check_linear<T: Scalar>(
    product: Linear,
    shape: LinearShape,
    with_bias: bool,
    launch: impl Fn(&LinearArgs),
) {
    let mut tensors = LinearTensors::<T>::new(product, shape, with_bias);
    launch(&tensors.args());
    let result = tensors.result().to_vec();
    let columns = product.result(shape)[1] as usize;
    for (index, found) in result.iter().enumerate() {
        let (r, c) = (index / columns, index % columns);
        let terms = tensors.terms(r, c);
        let bias = tensors.bias.get(c).filter(|_| product == Linear::Y);
        let bias = bias.map_or(0.0, |b| f64::from(b.to_f32()));
        check_sum(&terms, bias, *found, &format!("{product:?} {shape:?} [{r}, {c}]"));
    }
}

/// Checks a sum in f32 that is rounded once, to the storage type.
pub fn check_sum<T: Scalar>(terms: &[f64], more: f64, found: T, place: &str) {
    let size = terms.iter().copied().map(f64::abs).sum::<f64>() + more.abs();
    let expected = terms.iter().sum::<f64>() + more;
    let bound = size * 2f64.powi(-22) + expected.abs() * epsilon::<T>() * 1.01;
    let found = f64::from(found.to_f32());
    let close = abs_diff_eq!(found, expected, epsilon = bound);
    assert!(close, "{place} is {found}, not {expected} within {bound}");
}

/// The tensors of an attention problem.
pub struct Problem<T> {
    pub q: Vec<T>,
    pub k: Vec<T>,
    pub v: Vec<T>,
    pub o: Vec<T>,
    pub lse: Vec<f32>,
    pub weights: Vec<T>,
    pub mask: Vec<u8>,
    /// Slopes and sinks of the heads, the bias `[H, Nq, Nk]`.
    pub slopes: Vec<f32>,
    pub sinks: Vec<f32>,
    pub bias: Vec<T>,
    pub drops: DropoutArgs,
    /// Where packed sequences begin in q, and in k.
    pub cu_seqlens: [Vec<u32>; 2],
}

/// An attention problem of the tests.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub heads: u32,
    pub seq_q: u32,
    pub seq_k: u32,
    pub d: u32,
    pub causal: bool,
    pub padding: bool,
    pub dropout: f32,
    /// `[B, N, H, D]` in memory, as a projection writes it, instead of `[B, H, N, D]`.
    pub interleaved: bool,
    /// Sequences of several lengths one after the other, the longest of `seq_q` and `seq_k`:
    /// `[H, total, D]` in memory, or interleaved.
    pub packed: bool,
    /// What the inputs are multiplied by: large values make logits of thousands.
    pub size: f32,
    /// Whether scores pass through memory, rounded to the storage type.
    pub scores_stored: bool,
    pub features: Features,
}

impl Case {
    /// Full attention over one head.
    pub const fn new(seq_q: u32, seq_k: u32, d: u32) -> Self {
        Self {
            heads: 1,
            seq_q,
            seq_k,
            d,
            causal: false,
            padding: false,
            dropout: 0.0,
            interleaved: false,
            packed: false,
            size: 1.0,
            scores_stored: false,
            features: Features::NONE,
        }
    }

    /// What kernels are compiled for.
    pub fn constants(&self) -> Constants {
        let of_features = self.features.constants();
        Constants {
            causal: if self.causal { 1 } else { of_features.causal },
            padding: self.padding.into(),
            dropout: u32::from(self.dropout > 0.0),
            varlen: self.packed.into(),
            ..of_features
        }
    }

    /// Query rows and keys of each batch entry: two where the padding masks shall differ.
    fn lengths(&self) -> Vec<[u32; 2]> {
        let (q, k) = (self.seq_q, self.seq_k);
        if self.packed {
            vec![[0, k / 2], [q, k], [q.min(2), 0], [0, 0], [q / 2 + 1, k], [q, k / 2 + 1]]
        } else {
            vec![[q, k]; if self.padding { 2 } else { 1 }]
        }
    }

    fn batch(&self) -> u32 {
        self.lengths().len() as u32
    }

    /// Where packed sequences begin, and past the last: of rows, and of keys.
    fn cu_seqlens(&self) -> [Vec<u32>; 2] {
        [0, 1].map(|which: usize| {
            let mut at = vec![0];
            at.extend(self.lengths().iter().scan(0, |end, of| {
                *end += of[which];
                Some(*end)
            }));
            at
        })
    }

    /// Rows of Q, or keys, of a head in memory; of packed sequences all, and some beyond the last.
    fn in_memory(&self, which: usize) -> u32 {
        let packed: u32 = self.lengths().iter().map(|of| of[which]).sum();
        if self.packed { packed + BEYOND } else { [self.seq_q, self.seq_k][which] }
    }

    /// Heads of K and V.
    pub const fn kv_heads(&self) -> u32 {
        self.heads / self.features.group
    }

    /// Of a tensor of `heads` heads with rows of Q (0) or keys (1).
    fn strides(&self, heads: u32, which: usize) -> (u64, u64, u64) {
        let (h, n, d) = (u64::from(heads), u64::from(self.in_memory(which)), u64::from(self.d));
        let b = if self.packed { 0 } else { h * n * d };
        if self.interleaved { (b, d, h * d) } else { (b, n * d, d) }
    }

    fn tensor<T>(&self, data: &[T], heads: u32, which: usize) -> Tensor {
        let (stride_b, stride_h, stride_n) = self.strides(heads, which);
        Tensor { buffer: buffer(data), stride_b, stride_h, stride_n }
    }

    fn elements(&self, heads: u32, which: usize) -> u32 {
        let batch = if self.packed { 1 } else { self.batch() };
        batch * heads * self.in_memory(which) * self.d
    }

    /// Row `i` of head `h`, of `heads`, of batch entry `b`, as f64.
    fn row<T: Scalar>(
        &self,
        data: &[T],
        (heads, which): (u32, usize),
        b: u32,
        h: u32,
        i: u32,
    ) -> Vec<f64> {
        let (sb, sh, sn) = self.strides(heads, which);
        let i = i + if self.packed { self.cu_seqlens()[which][b as usize] } else { 0 };
        let first = (u64::from(b) * sb + u64::from(h) * sh + u64::from(i) * sn) as usize;
        data[first..first + self.d as usize].iter().map(|x| f64::from(x.to_f32())).collect()
    }

    /// Sets the rows beyond the last packed sequence to NaN.
    fn spoil<T: Scalar>(&self, data: &mut [T], heads: u32, which: usize) {
        let (_, sh, sn) = self.strides(heads, which);
        for (h, i) in (0..heads).flat_map(|h| (0..BEYOND).map(move |i| (h, i))) {
            let i = self.in_memory(which) - BEYOND + i;
            let first = (u64::from(h) * sh + u64::from(i) * sn) as usize;
            data[first..first + self.d as usize].fill(T::from_f32(f32::NAN));
        }
    }

    /// The padding mask: entry 0 sees nothing of the last keys, entry 1 nothing at all
    /// but every third key.
    fn padding_mask(&self) -> Vec<u8> {
        if !self.padding {
            return Vec::new();
        }
        let keys = 0..self.seq_k;
        let first = keys.clone().map(|j| u8::from(j < self.seq_k / 2));
        first.chain(keys.map(|j| u8::from(j % 3 == 1))).collect()
    }

    /// The tensors of this problem, outputs of NaN.
    pub fn problem<T: Scalar>(&self) -> Problem<T> {
        let scaled = |heads, which, seed| -> Vec<T> {
            let values = values::<T>(self.elements(heads, which), seed);
            values.iter().map(|x| T::from_f32(x.to_f32() * self.size)).collect()
        };
        let mut q = scaled(self.heads, 0, 1);
        let mut k = scaled(self.kv_heads(), 1, 2);
        // A mean that is not zero, so that a lost or doubled weight shows.
        let v = values::<T>(self.elements(self.kv_heads(), 1), 3);
        let mut v: Vec<T> = v.iter().map(|x| T::from_f32(x.to_f32() + 0.5)).collect();
        if self.packed {
            self.spoil(&mut q, self.heads, 0);
            self.spoil(&mut k, self.kv_heads(), 1);
            self.spoil(&mut v, self.kv_heads(), 1);
        }
        let lse = self.elements(self.heads, 0) / self.d;
        let weights = (self.batch() * self.heads * self.seq_q * self.seq_k) as usize;
        Problem {
            o: vec![T::from_f32(f32::NAN); q.len()],
            lse: vec![f32::NAN; lse as usize],
            weights: vec![T::from_f32(f32::NAN); weights],
            mask: self.padding_mask(),
            slopes: self.features.slopes(self.heads),
            sinks: self.features.sinks(self.heads),
            bias: self.features.bias(self.heads * self.seq_q * self.seq_k),
            drops: DropoutArgs {
                seed: 0x0123_4567_89ab_cdef,
                threshold: dropout::threshold(self.dropout),
                rescale: 1.0 / (1.0 - self.dropout),
            },
            q,
            k,
            v,
            cu_seqlens: self.cu_seqlens(),
        }
    }

    /// What a kernel is given for this problem.
    pub fn args<T: Scalar>(&self, problem: &mut Problem<T>) -> AttentionArgs {
        AttentionArgs {
            tensors: Tensors {
                q: self.tensor(&problem.q, self.heads, 0),
                k: self.tensor(&problem.k, self.kv_heads(), 1),
                v: self.tensor(&problem.v, self.kv_heads(), 1),
                o: self.tensor(&problem.o, self.heads, 0),
                lse: buffer_mut(&mut problem.lse),
            },
            sequences: Sequences {
                cu_seqlens_q: buffer(&problem.cu_seqlens[0]),
                cu_seqlens_k: buffer(&problem.cu_seqlens[1]),
            },
            keys: Keys { padding: buffer(&problem.mask), ..self.features.keys() },
            scratch: Scratch { weights: buffer_mut(&mut problem.weights), ..Scratch::default() },
            shape: Shape {
                batch: self.batch(),
                heads: self.heads,
                seq_q: self.seq_q,
                seq_k: self.seq_k,
                total_q: if self.packed { self.in_memory(0) } else { 0 },
                head_dim: self.d,
                head_dim_v: self.d,
            },
            scores: Scores {
                scale_log2: std::f32::consts::LOG2_E / (self.d as f32).sqrt(),
                dropout: problem.drops,
                scale: 1.0 / (self.d as f32).sqrt(),
                softcap: self.features.softcap,
                inverse_softcap: 1.0 / self.features.softcap,
                alibi: Slopes { buffer: buffer(&problem.slopes), stride_b: 0 },
                bias: Bias {
                    buffer: buffer(&problem.bias),
                    stride_b: 0,
                    stride_h: u64::from(self.seq_q * self.seq_k),
                    stride_q: self.seq_k.into(),
                    stride_k: 1,
                },
                sinks: buffer(&problem.sinks),
            },
        }
    }

    /// Runs `launch` on this problem and compares with attention computed in f64.
    pub fn check<T: Scalar>(&self, launch: impl Fn(&AttentionArgs) -> Stats) -> Stats {
        let mut problem = self.problem::<T>();
        let args = self.args(&mut problem);
        let stats = with_constants(self.constants(), || launch(&args));
        let Problem { q, k, v, o, lse, mask, drops, slopes, sinks, bias, .. } = &mut problem;
        // `o` is read again only now that the kernel has written it.
        let o = std::hint::black_box(o);
        let total_q = self.in_memory(0);
        if self.packed {
            for (h, i) in
                (0..self.heads).flat_map(|h| (total_q - BEYOND..total_q).map(move |i| (h, i)))
            {
                // Entry 0 begins at row 0.
                let o = self.row(o, (self.heads, 0), 0, h, i);
                let untouched =
                    o.iter().all(|x| x.is_nan()) && lse[(h * total_q + i) as usize].is_nan();
                assert!(untouched, "{self:?} head {h} row {i} beyond the last sequence");
            }
        }
        for (b, [seq_q, seq_k]) in (0..).zip(self.lengths()) {
            for h in 0..self.heads {
                for i in 0..seq_q {
                    let (of_q, of_k) = ((self.heads, 0), (self.kv_heads(), 1));
                    let h_kv = h / self.features.group;
                    let q_row = self.row(q, of_q, b, h, i);
                    let o_row = self.row(o, of_q, b, h, i);
                    let row = if self.packed {
                        h * total_q + self.cu_seqlens()[0][b as usize] + i
                    } else {
                        (b * self.heads + h) * seq_q + i
                    };
                    let lse = lse[row as usize];
                    let sees = |j: u32| {
                        (!self.causal || j + seq_q <= i + seq_k)
                            && self.features.window_sees(i + seq_k, j + seq_q)
                            && (!self.padding || mask[(b * seq_k + j) as usize] != 0)
                    };
                    self.check_row::<T>(
                        &q_row,
                        seq_k,
                        |j| self.row(k, of_k, b, h_kv, j),
                        |j| self.row(v, of_k, b, h_kv, j),
                        sees,
                        |s, j| {
                            let distance = i64::from(i + seq_k) - i64::from(j + seq_q);
                            let place = (h * seq_q + i) * seq_k + j;
                            let bias = bias.get(place as usize).map_or(0.0, |b| b.to_f32().into());
                            let slope = slopes.get(h as usize).map_or(0.0, |&s| f64::from(s));
                            self.features.capped(s) - slope * distance.abs() as f64 + bias
                        },
                        sinks.get(h as usize).map_or(f64::NEG_INFINITY, |&s| s.into()),
                        |j| drops.threshold == 0 || dropout::keeps(drops, b, h, i, j),
                        &o_row,
                        f64::from(lse),
                        &format!("{self:?} b {b} h {h} row {i}"),
                    );
                }
            }
        }
        stats
    }

    #[expect(clippy::too_many_arguments, reason = "all that one row depends on")]
    fn check_row<T: Scalar>(
        &self,
        q: &[f64],
        seq_k: u32,
        k: impl Fn(u32) -> Vec<f64>,
        v: impl Fn(u32) -> Vec<f64>,
        sees: impl Fn(u32) -> bool,
        shaped: impl Fn(f64, u32) -> f64,
        sink: f64,
        keeps: impl Fn(u32) -> bool,
        o: &[f64],
        lse: f64,
        what: &str,
    ) {
        let keys: Vec<u32> = (0..seq_k).filter(|&j| sees(j)).collect();
        if keys.is_empty() {
            assert!(o.iter().all(|&x| x == 0.0), "{what}: O of a hidden row is {o:?}");
            assert_eq!(lse as f32, sink as f32, "{what}: LSE of a hidden row");
            return;
        }
        let scale = 1.0 / f64::from(self.d).sqrt();
        let dot = |k: &[f64]| q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>() * scale;
        let magnitude = |k: &[f64]| q.iter().zip(k).map(|(a, b)| (a * b).abs()).sum::<f64>();
        let scores: Vec<f64> = keys.iter().map(|&j| shaped(dot(&k(j)), j)).collect();
        // Scores are sums in f32: their error grows with the terms.
        let largest = keys.iter().map(|&j| magnitude(&k(j)) * scale).fold(0.0, f64::max);
        let max = scores.iter().copied().fold(sink, f64::max);
        let sum = scores.iter().map(|s| (s - max).exp()).sum::<f64>() + (sink - max).exp();
        // Stored: the products, and what they are shaped to where that has weight.
        let products = keys.iter().map(|&j| dot(&k(j)).abs()).fold(0.0, f64::max);
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weighty = scores.iter().filter(|&s| s - top > -7.0);
        let shaped_size = weighty.map(|s| s.abs()).fold(0.0, f64::max);
        let stored_size = if self.scores_stored { products + shaped_size } else { 0.0 };
        let score_error = (largest + 1.0) * 2f64.powi(-20) + stored_size * epsilon::<T>();
        let expected_lse = max + sum.ln();
        let close = abs_diff_eq!(lse, expected_lse, epsilon = score_error);
        assert!(close, "{what}: LSE is {lse}, not {expected_lse} within {score_error}");
        let rescale = f64::from(1.0 / (1.0 - self.dropout));
        let (mut expected, mut size) = (vec![0.0; q.len()], vec![0.0; q.len()]);
        // The weights themselves are stored: the least of f16 is lost in each.
        let mut lost = vec![0.0; q.len()];
        for (&j, score) in keys.iter().zip(&scores) {
            let p = (score - max).exp() / sum * rescale;
            let columns = expected.iter_mut().zip(&mut size).zip(&mut lost);
            for (((e, s), lost), v) in columns.zip(v(j)) {
                *lost += if self.scores_stored { v.abs() } else { 0.0 };
                *s += p * v.abs();
                *e += if keeps(j) { p * v } else { 0.0 };
            }
        }
        for (d, (((&o, &e), &s), &lost)) in
            o.iter().zip(&expected).zip(&size).zip(&lost).enumerate()
        {
            // P rounded to the storage type, its error from the scores, O rounded.
            // The last term is half of the least f16: below it is nothing.
            let bound = s * (epsilon::<T>() * 1.5 + 2.0 * score_error)
                + e.abs() * epsilon::<T>()
                + 2f64.powi(-25) * (1.0 + lost);
            let close = abs_diff_eq!(o, e, epsilon = bound);
            assert!(close, "{what}: O[{d}] is {o}, not {e} within {bound}");
        }
    }
}

/// Rows of each tensor beyond the last packed sequence.
const BEYOND: u32 = 3;

/// The tensor map of 16-bit elements, with the swizzle of 128 bytes; strides in elements.
pub fn map(address: u64, dims: &[u64], strides: &[u64], box_dims: &[u32]) -> TensorMap {
    let spec = TensorMapSpec {
        address,
        element: Element::F16, // Or bf16: copies move bits.
        dims: dims.to_vec(),
        strides_bytes: strides.iter().map(|stride| 2 * stride).collect(),
        box_dims: box_dims.to_vec(),
        swizzle_bytes: 128,
    };
    spec.encode().expect("a map that the driver would take")
}

/// A launch of flash_hopper for f16: its consumers, and its blocks.
#[derive(Clone, Copy, Debug)]
pub struct Hopper {
    pub consumers: u32,
    pub blocks: u32,
}

impl Hopper {
    /// Runs it with the arguments of `case`.
    pub fn run(&self, case: &Case, args: &AttentionArgs) -> Result<Stats, Fault> {
        let tiles = Tiles::of(case.d, self.consumers);
        let [q, k, v, o] = tiles.boxes();
        let of = |tensor: &Tensor, heads: u32, seq: u32, box_dims: [u32; 4]| {
            let Tensor { buffer, stride_b, stride_h, stride_n } = *tensor;
            if case.packed {
                let (d, heads) = (case.d.into(), heads.into());
                let (dims, strides) = ragged::map(d, heads, 2 * stride_h, 2 * stride_n);
                let [columns, rows, ..] = box_dims;
                let strides = strides.map(|bytes| bytes / 2);
                return map(buffer.address, &dims, &strides, &[columns, rows, 1, 1, 1]);
            }
            let dims = [case.d, seq, heads, args.shape.batch].map(u64::from);
            map(buffer.address, &dims, &[stride_n, stride_h, stride_b], &box_dims)
        };
        let maps = [
            of(&args.tensors.q, case.heads, args.shape.seq_q, q),
            of(&args.tensors.k, case.kv_heads(), args.shape.seq_k, k),
            of(&args.tensors.v, case.kv_heads(), args.shape.seq_k, v),
            of(&args.tensors.o, case.heads, args.shape.seq_q, o),
        ];
        let mut queue = [0u32; QUEUE_WORDS as usize];
        let args = with_queue(args, &mut queue);
        let args = HopperArgs { maps, args };
        let size = if self.consumers == 3 { "_x3" } else { "" };
        let symbol = format!("flash_hopper_f16_d{}{size}", case.d);
        let (threads, shared) = (tiles.threads(), tiles.shared_bytes());
        try_run(&symbol, self.blocks.into(), threads.into(), shared, &args)
    }
}
