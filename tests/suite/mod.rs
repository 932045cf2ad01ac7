//! Cases that every kernel has to get right, and how one is run. Shared by the test
//! programs beside this folder; none of them uses everything.
#![allow(dead_code)]

use std::{
    collections::{BTreeSet, HashMap},
    fmt::Display,
    io::Write,
    sync::{
        Arc, LazyLock, Mutex, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use flash_attention::{
    Alibi, Bias, CpuDevice, DType, Device, Error, GpuDevice, Layout, Problem, Tensor, Window,
    oracle::{self, Rows},
    problem::{Dropout, ProblemBuilder},
    registry::{KERNELS, KernelSpec, Sizes},
    session::{Inputs, Outputs, Session},
    verify::{Credit, Verification},
};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};

/// A bias that all batch entries share.
const PER_HEAD: Bias = Bias { per_batch: false, per_head: true };

/// A problem and how its tensors are drawn.
#[derive(Clone, Debug)]
pub struct Case {
    /// What the case is about.
    pub name: String,
    pub problem: Problem,
    /// Standard deviation of Q and K.
    pub qk_size: f64,
    /// Mean of V.
    pub v_mean: f64,
    /// Where packed sequences begin in Q and in K.
    pub cu_seqlens: Option<[Vec<u32>; 2]>,
}

/// The tensors of one draw.
pub struct Draw {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Option<Vec<u8>>,
    alibi_slopes: Option<Tensor>,
    bias: Option<Tensor>,
    sinks: Option<Tensor>,
    cu_seqlens: Option<[Vec<u32>; 2]>,
}

impl Draw {
    pub fn inputs(&self) -> Inputs<'_> {
        Inputs {
            mask: self.mask.as_deref(),
            alibi_slopes: self.alibi_slopes.as_ref(),
            bias: self.bias.as_ref(),
            sinks: self.sinks.as_ref(),
            cu_seqlens_q: self.cu_seqlens.as_ref().map(|[q, _]| q.as_slice()),
            cu_seqlens_k: self.cu_seqlens.as_ref().map(|[_, k]| k.as_slice()),
            ..Inputs::new(&self.q, &self.k, &self.v)
        }
    }
}

impl Case {
    pub fn new(name: &str, problem: Problem) -> Self {
        Self { name: name.into(), problem, qk_size: 1.0, v_mean: 0.0, cu_seqlens: None }
    }

    /// A case of packed sequences of these lengths of Q and of K: `change` says what else there is.
    pub fn packed(
        name: &str,
        lengths: &[[usize; 2]],
        (heads, head_dim): (usize, usize),
        change: impl FnOnce(ProblemBuilder) -> ProblemBuilder,
    ) -> Self {
        let cu_seqlens = [0, 1].map(|which: usize| {
            let ends = lengths.iter().scan(0, |end, of| {
                *end += of[which] as u32;
                Some(*end)
            });
            std::iter::once(0).chain(ends).collect::<Vec<u32>>()
        });
        let [q, k] = &cu_seqlens;
        let problem = change(Problem::packed(q, k, heads, head_dim).unwrap()).build().unwrap();
        Self { cu_seqlens: Some(cu_seqlens), ..Self::new(name, problem) }
    }

    /// Draw `seed` of the case. The padding mask hides every key of batch entry 1, and
    /// about a third of the others'; the bias hides about one key of a hundred in each row.
    pub fn draw(&self, seed: u64) -> Draw {
        let p = &self.problem;
        let random = |shape: [usize; 4], stream, mean| {
            Tensor::random(p.dtype(), &shape, 10 * seed + stream, mean)
        };
        let mask = p.has_mask().then(|| {
            let noise = Tensor::random(DType::F32, &[p.batch(), p.seq_k()], 10 * seed + 3, 0.0);
            let visible = |(i, x): (usize, f32)| u8::from(i / p.seq_k() != 1 && x < 0.4);
            noise.to_f32().into_iter().enumerate().map(visible).collect()
        });
        let shaped = |dtype, shape: Option<Vec<usize>>, stream, change: fn(f64) -> f64| {
            let shape = shape?;
            let noise = Tensor::random(DType::F32, &shape, 10 * seed + stream, 0.0).to_f64();
            let values: Vec<f64> = noise.into_iter().map(change).collect();
            Some(Tensor::from_f64(dtype, &shape, &values).unwrap())
        };
        let hidden = |x: f64| if x > 2.3 { f64::NEG_INFINITY } else { x };
        Draw {
            alibi_slopes: shaped(DType::F32, p.alibi_shape(), 4, |x| x.abs() / 4.0),
            bias: shaped(p.dtype(), p.bias_shape(), 5, hidden),
            sinks: shaped(DType::F32, p.sinks_shape(), 6, |x| x),
            q: random(p.q_shape(), 0, 0.0).scaled(self.qk_size),
            k: random(p.k_shape(), 1, 0.0).scaled(self.qk_size),
            v: random(p.v_shape(), 2, self.v_mean),
            mask,
            cu_seqlens: self.cu_seqlens.clone(),
        }
    }

    /// The reference of draw 0, and what the plain algorithm is credited with on it.
    /// Kernels share cases: each is computed once.
    fn yardstick(&self) -> Arc<(Rows, Credit)> {
        static KNOWN: Known<(Rows, Credit)> = Known::new();
        let Self { problem, qk_size, v_mean, cu_seqlens, .. } = self;
        let key = format!("{problem:?} {qk_size} {v_mean} {cu_seqlens:?}");
        KNOWN.get(key, || {
            let rows = oracle::all_rows(&self.problem);
            let draw = self.draw(0);
            let reference = oracle::reference(&self.problem, &draw.inputs(), &rows);
            let credit = Credit::of(&self.problem, &draw.inputs(), &rows, &reference);
            (reference, credit)
        })
    }

    /// Runs a kernel on draw 0.
    pub fn run(
        &self,
        device: &Arc<dyn Device>,
        kernel: &'static KernelSpec,
    ) -> Result<Outputs, Error> {
        let draw = self.draw(0);
        let session = Session::new(device.clone());
        Ok(session.run(kernel, &self.problem, &draw.inputs())?.0)
    }

    /// Runs a kernel and compares it with the reference. `Err` says what is wrong;
    /// `Ok(None)`: the kernel says that it cannot do this.
    pub fn check(
        &self,
        device: &Arc<dyn Device>,
        kernel: &'static KernelSpec,
    ) -> Result<Option<Verification>, String> {
        let label = format!("{} {} {}", kernel.name, self.problem.dtype(), self.name);
        let outputs = match self.run(device, kernel) {
            Ok(outputs) => outputs,
            Err(Error::Unsupported { .. }) => return Ok(None),
            Err(error) => return Err(format!("{label}: {error}")),
        };
        let (reference, credit) = &*self.yardstick();
        let rows = oracle::all_rows(&self.problem);
        let result = Verification::new(&self.problem, &outputs, &rows, reference, *credit);
        if !result.passes() {
            return Err(format!("{label}: {result}"));
        }
        Ok(Some(result))
    }
}

/// A value, or the place where it is being computed.
type Cell<T> = Arc<OnceLock<Arc<T>>>;

/// What takes long to compute, once for each name.
pub struct Known<T>(LazyLock<Mutex<HashMap<String, Cell<T>>>>);

impl<T> Known<T> {
    pub const fn new() -> Self {
        Self(LazyLock::new(Mutex::default))
    }

    pub fn get(&self, name: String, compute: impl FnOnce() -> T) -> Arc<T> {
        let cell = self.0.lock().unwrap().entry(name).or_default().clone();
        cell.get_or_init(|| Arc::new(compute())).clone()
    }
}

/// Choices of a generator.
pub struct Draws(ChaCha8Rng);

impl Draws {
    pub fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    pub fn below(&mut self, n: usize) -> usize {
        ((u64::from(self.0.next_u32()) * n as u64) >> 32) as usize
    }

    pub fn of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())]
    }

    pub fn yes(&mut self) -> bool {
        self.below(2) == 0
    }
}

/// The edges of a kernel: sizes beside its tiles, and everything that hides or weighs
/// keys.
pub fn edges(kernel: &KernelSpec, dtype: DType) -> Vec<Case> {
    let d =
        *kernel.limits.head_dims.iter().find(|&&d| d >= 64).unwrap_or(&kernel.limits.head_dims[0]);
    let Sizes { rows, keys } = (kernel.limits.sizes)(dtype, d);
    let (br, bc) = (rows[0] as usize, keys[0] as usize);
    let shape = |batch, heads, seq_q, seq_k| {
        Problem::builder(batch, heads, seq_q, d).seq_k(seq_k).dtype(dtype)
    };
    let dropout = Some(Dropout { p: 0.2, seed: 0x1234_5678_9abc });
    let window = |left, right| Window { left: Some(left), right };
    let problems = [
        ("one row, one key", shape(1, 1, 1, 1)),
        ("one row, many keys", shape(1, 2, 1, 2 * bc + 5)),
        ("whole tiles", shape(1, 1, br, 2 * bc)),
        ("one less than tiles", shape(2, 1, br - 1, bc - 1)),
        ("one more than tiles", shape(1, 2, br + 1, bc + 1)),
        ("many rows, few keys", shape(1, 1, 2 * br + 5, 3)),
        ("causal, square", shape(1, 1, br + bc + 3, br + bc + 3).causal(true)),
        ("causal, more keys", shape(1, 1, br - 1, 2 * bc + 1).causal(true)),
        ("causal, hidden rows", shape(1, 1, bc + br + 1, bc - 1).causal(true)),
        ("padding, a hidden batch entry", shape(2, 1, br + 1, bc + 7).mask(true)),
        ("padding and causal", shape(2, 1, bc + 1, bc + 1).mask(true).causal(true)),
        ("dropout", shape(2, 2, br + 1, bc + 3).dropout(dropout)),
        (
            "dropout, padding, causal",
            shape(2, 1, bc + 2, bc + 2).dropout(dropout).mask(true).causal(true),
        ),
        ("a scale of 0.3", shape(1, 1, br, bc + 1).scale(Some(0.3))),
        ("two heads share K and V", shape(2, 4, br + 1, bc + 1).kv_heads(2)),
        ("all heads share K and V", shape(1, 3, 2, bc + 1).kv_heads(1).causal(true)),
        ("a sliding window", shape(1, 1, bc + 5, bc + 5).causal(true).window(window(7, None))),
        ("a window", shape(1, 1, br + 1, 2 * bc + 1).window(window(bc as u32 / 2, Some(3)))),
        ("a window without keys", shape(1, 1, bc + 9, bc - 1).window(window(0, Some(1)))),
        ("a cap", shape(1, 1, br + 1, bc + 1).softcap(Some(2.0))),
        ("ALiBi", shape(2, 2, 3, bc + 1).alibi(Some(Alibi::PerBatchAndHead))),
        ("a bias", shape(2, 2, 3, bc + 1).bias(Some(PER_HEAD))),
        ("sinks", shape(1, 2, br + 1, bc + 1).sinks(true)),
        (
            "everything",
            shape(2, 4, 5, bc + 3)
                .kv_heads(2)
                .causal(true)
                .window(window(bc as u32 - 2, None))
                .mask(true)
                .dropout(dropout)
                .softcap(Some(3.0))
                .alibi(Some(Alibi::PerHead))
                .bias(Some(Bias { per_batch: true, per_head: false }))
                .sinks(true)
                .layout(Layout::TokensFirst),
        ),
        ("no keys", shape(2, 2, br + 1, 0).causal(true).sinks(true)),
        ("[B, N, H, D]", shape(2, 3, br + 1, bc + 1).layout(Layout::TokensFirst).causal(true)),
    ];
    let mut cases: Vec<Case> =
        problems.into_iter().map(|(name, p)| Case::new(name, p.build().unwrap())).collect();
    // Scores are sums of D products times 1 / sqrt(D): with entries of size 55 they have a
    // standard deviation of 3000, and the largest of a thousand is at about 1e4.
    let large =
        |name, p: ProblemBuilder| Case { qk_size: 55.0, ..Case::new(name, p.build().unwrap()) };
    cases.push(large("scores of 1e4", shape(1, 2, br + 1, bc + 1)));
    cases.push(large("scores of 1e4, causal", shape(1, 2, bc + 1, bc + 1).causal(true)));
    let p = shape(1, 2, br + 1, bc + 1).build().unwrap();
    cases.push(Case { v_mean: 5.0, ..Case::new("V of mean 5", p) });
    // Sizes that are not the tile's: few keys for many rows, and few rows for many keys,
    // of which the first rows see none beyond the size.
    let beside = |sizes: &[u32]| {
        let others: BTreeSet<u32> = sizes[1..].iter().copied().filter(|&s| s != sizes[0]).collect();
        others.into_iter().map(|size| size as usize)
    };
    for size in beside(&rows) {
        for seq_q in [size - 1, size + 1] {
            let p = shape(1, 2, seq_q, bc + 1).build().unwrap();
            cases.push(Case::new(&format!("{seq_q} rows"), p));
        }
    }
    for size in beside(&keys) {
        for (seq_q, seq_k) in [(2, size - 1), (5, size + 3)] {
            let p = shape(1, 1, seq_q, seq_k).causal(true).build().unwrap();
            cases.push(Case::new(&format!("{seq_k} keys"), p));
        }
    }
    let lengths = [[3, 5], [0, bc], [br + 1, 2 * bc + 3], [2, 0], [0, 0], [br / 2 + 1, bc + 1]];
    cases.push(Case::packed("packed", &lengths, (2, d), |p| p.dtype(dtype)));
    cases.push(Case::packed("packed, everything", &lengths, (4, d), |p| {
        p.dtype(dtype)
            .kv_heads(2)
            .causal(true)
            .window(window(bc as u32 - 2, None))
            .dropout(dropout)
            .softcap(Some(3.0))
            .alibi(Some(Alibi::PerBatchAndHead))
            .sinks(true)
    }));
    for &other in kernel.limits.head_dims.iter().filter(|&&other| other != d) {
        let Sizes { rows, keys } = (kernel.limits.sizes)(dtype, other);
        let (br, bc) = (rows[0] as usize, keys[0] as usize);
        let p = Problem::builder(1, 1, br + 1, other).seq_k(bc + 1).dtype(dtype);
        cases.push(Case::new(&format!("head dim {other}"), p.causal(true).build().unwrap()));
    }
    cases
}

/// Does the work of every item, as many at once as there are cores. Answers come in the order of the
/// items. The tests' cases are too small to use the cores by themselves.
pub fn on_every_core<T: Send, R: Send>(
    items: impl IntoIterator<Item = T>,
    work: impl Fn(T) -> R + Sync,
) -> Vec<R> {
    let items: Vec<Mutex<Option<T>>> = items.into_iter().map(|x| Mutex::new(Some(x))).collect();
    let answers: Vec<Mutex<Option<R>>> = items.iter().map(|_| Mutex::new(None)).collect();
    let next = AtomicUsize::new(0);
    // Not rayon's threads: one that waits in a launch would take up another item meanwhile.
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(at) else { break };
                    let item = item.lock().unwrap().take().expect("each index is drawn once");
                    let answer = work(item);
                    *answers[at].lock().unwrap() = Some(answer);
                }
            });
        }
    });
    let done =
        |answer: Mutex<Option<R>>| answer.into_inner().unwrap().expect("every item was done");
    answers.into_iter().map(done).collect()
}

/// Every head dim that a kernel has, ascending.
pub fn head_dims(kernel: &KernelSpec) -> Vec<usize> {
    let most = *kernel.limits.head_dims.last().unwrap();
    (1..=most).filter(|&d| kernel.limits.has_head_dim(d)).collect()
}

/// Every kernel of the registry with every storage type that it has.
pub fn kernels() -> impl Iterator<Item = (&'static KernelSpec, DType)> {
    KERNELS.iter().flat_map(|kernel| kernel.dtypes.iter().map(move |&dtype| (kernel, dtype)))
}

/// The emulator.
pub fn emulator() -> Arc<dyn Device> {
    Arc::new(CpuDevice::new())
}

/// Runs a test on the first GPU, or says why there is none.
pub fn on_a_gpu(test: impl FnOnce(&Arc<dyn Device>)) {
    match GpuDevice::open(0) {
        Ok(gpu) => test(&(Arc::new(gpu) as Arc<dyn Device>)),
        Err(error) => skipped(&error),
    }
}

/// Says why a test does nothing: straight to standard error, since the harness keeps what a passing test
/// prints.
pub fn skipped(reason: &dyn Display) {
    let mut stderr = std::io::stderr();
    writeln!(stderr, "skipped: {reason}").unwrap();
}

/// The number in an environment variable.
pub fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().expect(variable))
}

/// Cases that the emulator runs: of bf16 every third, unless `FLASH_ATTENTION_TEST_ALL` is 1. All but
/// the conversion is the code of f16, which runs every case.
pub fn thinned<T>(dtype: DType, cases: Vec<T>) -> Vec<T> {
    let every = match (dtype, number("FLASH_ATTENTION_TEST_ALL", 0)) {
        (DType::BF16, 0) => 3,
        _ => 1,
    };
    cases.into_iter().step_by(every).collect()
}

/// The cases of this process: all, or with `FLASH_ATTENTION_TEST_PART` set to `2/8` every eighth from number 2 on.
/// A GPU's driver compiles kernels for a process one after another, but for several processes at once.
pub fn of_this_process<T>(cases: Vec<T>) -> Vec<T> {
    let Ok(text) = std::env::var("FLASH_ATTENTION_TEST_PART") else { return cases };
    let (part, of) = text.split_once('/').expect("a part like 2/8");
    let [part, of] = [part, of].map(|number| number.parse().expect("a part like 2/8"));
    assert!(part < of, "a part below {of}");
    cases.into_iter().skip(part).step_by(of).collect()
}

/// A tensor `[1, N, H, D]` of random numbers, with NaN in its last `beyond` rows.
pub fn with_nan_beyond(dtype: DType, shape: [usize; 4], beyond: usize, seed: u64) -> Tensor {
    let mut tensor = Tensor::random(dtype, &shape, seed, 0.5);
    let bytes = beyond * shape[2] * shape[3] * dtype.size();
    let len = tensor.as_bytes().len();
    tensor.as_bytes_mut()[len - bytes..].fill(0xff);
    tensor
}
