//! `--peers`: PyTorch's attention and FlashAttention's packages, or a module around them with the
//! same parameters, and their gradients, beside the kernels, on the same tensors and measured the same
//! way, where there is a Python with PyTorch. A Python process ([`peers.py`](peers.py)) runs them; tensors travel
//! both ways through pipes.

use std::{
    env,
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::{Context, Result, bail};
use flash_attention::{DType, Problem, Tensor};
use serde::{Deserialize, Serialize};

use crate::{
    failure::Usage,
    machine::DeviceChoice,
    results::{Level, ProblemRecord, Repeats, Status},
    subject::Subject,
};

/// Names the Python to run; `python3` unless set.
pub const PYTHON: &str = "FLASH_ATTENTION_PYTHON";
const SCRIPT: &str = include_str!("peers.py");
/// The peers on a GPU: backends of PyTorch, and packages, which may be missing.
pub const ON_GPU: [&str; 8] =
    ["math", "efficient", "flash", "cudnn", "flex", PACKAGES[0], PACKAGES[1], PACKAGES[2]];
const PACKAGES: [&str; 3] = ["flash_attn", "flash_attn_interface", "flash_attn.cute"];
const ON_CPU: &[&str] = &["math", "flash"];
/// The peers of a decode on a GPU: backends of PyTorch, FlashAttention's CuTe kernel, and FlashInfer's
/// kernels for pages, of which one is made for tensor cores.
pub const DECODE_ON_GPU: [&str; 5] =
    ["flash", "cudnn", PACKAGES[2], "flashinfer", "flashinfer-tensor-cores"];
/// `--peers` of `compare`, at any level.
pub const ALL: [&str; 10] = [
    ON_GPU[0],
    ON_GPU[1],
    ON_GPU[2],
    ON_GPU[3],
    ON_GPU[4],
    ON_GPU[5],
    ON_GPU[6],
    ON_GPU[7],
    DECODE_ON_GPU[3],
    DECODE_ON_GPU[4],
];

/// Names of the possible rows.
pub fn names() -> impl Iterator<Item = String> {
    ON_GPU.iter().map(|backend| row_name(backend))
}

/// The row of a backend: `torch-math`, say, or the name of a package.
pub fn row_name(backend: &str) -> String {
    let own = PACKAGES.contains(&backend) || DECODE_ON_GPU[2..].contains(&backend);
    if own { backend.into() } else { format!("torch-{backend}") }
}

/// A Python process with PyTorch, waiting for work.
pub struct Peers {
    child: Child,
    link: Link<BufReader<ChildStdout>, ChildStdin>,
    version: String,
    device: String,
    backends: Vec<&'static str>,
}

/// The backends with these names; `None` without names, which means all available backends.
///
/// # Errors
/// An unknown name.
pub fn backends(emulated: bool, names: &[String]) -> Result<Vec<&'static str>> {
    chosen(if emulated { ON_CPU } else { &ON_GPU }, names)
}

/// The peers of a decode with these names; all without names, whether Python has them or not: one
/// that is missing gets a row that says so.
///
/// # Errors
/// An unknown name.
pub fn decode_backends(emulated: bool, names: &[String]) -> Result<Vec<&'static str>> {
    let all = if emulated { ON_CPU } else { &DECODE_ON_GPU };
    if names.is_empty() { Ok(all.to_vec()) } else { chosen(all, names) }
}

/// The backends of these names among `all`.
fn chosen(all: &'static [&'static str], names: &[String]) -> Result<Vec<&'static str>> {
    let find = |name: &String| {
        all.iter().copied().find(|backend| backend == name).ok_or_else(|| {
            Usage(format!("--peers {name}: the peers here are {}", all.join(", "))).into()
        })
    };
    names.iter().map(find).collect()
}

/// The result of one backend.
#[derive(Debug)]
pub struct Measured {
    /// `torch-math`, say.
    pub name: String,
    /// How it ended.
    pub status: Status,
    /// The reason for a failure; empty otherwise.
    pub reason: String,
    /// Milliseconds of each run.
    pub times_ms: Vec<f64>,
    /// Milliseconds per run of many runs back to back.
    pub sustained_ms: Option<f64>,
    /// Milliseconds per run in replays of a graph, of a decode.
    pub replayed_ms: Option<f64>,
    /// Parts that a decode split the keys into, where the peer says so.
    pub splits: Option<u32>,
    /// PyTorch's peak memory, where PyTorch counts it.
    pub peak_bytes: Option<u64>,
    /// Milliseconds of the forward and of the backward pass alone, where a run has both.
    pub passes_ms: [Option<f64>; 2],
    /// PyTorch's peak memory of the forward pass alone, likewise.
    pub forward_peak_bytes: Option<u64>,
    /// O, or a module's y; or the gradients, in the order of their tensors. Empty unless the status is
    /// [`Status::Ok`].
    pub outputs: Vec<Tensor>,
}

impl Peers {
    /// Starts Python.
    ///
    /// Without `backends`, all backends that the device may have and Python can import.
    ///
    /// # Errors
    /// The reason that PyTorch will have no rows: no Python, no PyTorch, or no GPU visible to
    /// PyTorch although the kernels run on one.
    pub fn start(
        emulated: bool,
        choice: DeviceChoice,
        backends: Vec<&'static str>,
    ) -> Result<Self> {
        let python = env::var_os(PYTHON).unwrap_or_else(|| "python3".into());
        let shown = python.display().to_string();
        let mut child = Command::new(&python)
            .args(["-c", SCRIPT])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("{shown} cannot be started"))?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("{shown} has no pipes");
        };
        let mut link = Link { from: BufReader::new(output), to: input };
        let hello = link.hello().with_context(|| format!("{shown} gives no answer"));
        let device = match choice {
            _ if emulated => "cpu".into(),
            DeviceChoice::Gpu(index) => format!("cuda:{index}"),
            _ => "cuda:0".into(),
        };
        let mut peers = Self { child, link, version: String::new(), device, backends };
        match hello? {
            Hello { error: Some(error), .. } => bail!("{shown} has no PyTorch: {error}"),
            Hello { torch, cuda, .. } if !cuda && !emulated => {
                bail!("PyTorch {torch} of {shown} finds no GPU")
            }
            Hello { torch, packages, .. } => {
                peers.version = torch;
                if peers.backends.is_empty() {
                    let all = if emulated { ON_CPU } else { &ON_GPU };
                    let is_there = |name: &&str| {
                        !PACKAGES.contains(name) || packages.iter().any(|p| p == name)
                    };
                    peers.backends = all.iter().copied().filter(is_there).collect();
                }
            }
        }
        Ok(peers)
    }

    /// Version of PyTorch.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The backends to run.
    #[must_use]
    pub fn backends(&self) -> &[&'static str] {
        &self.backends
    }

    /// Runs some backends on one problem.
    ///
    /// # Errors
    /// When the process has ended or sends an invalid answer; it is unusable after that.
    pub fn measure(
        &mut self,
        backends: &[&str],
        subject: &dyn Subject,
        repeats: Repeats,
    ) -> Result<Vec<Measured>> {
        let problem = subject.problem();
        let work = Work { tensors: subject.tensors(), mask: subject.mask() };
        let inputs = subject.inputs();
        let numbers = |tensor: Option<&Tensor>| tensor.map(Tensor::to_f64);
        let job = Job {
            device: &self.device,
            backends,
            level: subject.kind().level(),
            shapes: work.tensors.iter().map(|tensor| tensor.shape()).collect(),
            seq: problem.seq_q(),
            problem: problem.into(),
            scale: problem.scale(),
            seed: problem.dropout().map_or(0, |d| d.seed),
            repeats,
            alibi_slopes: numbers(inputs.and_then(|inputs| inputs.alibi_slopes)),
            sink_scores: numbers(inputs.and_then(|inputs| inputs.sinks)),
            cu_seqlens: inputs.and_then(|inputs| inputs.cu_seqlens()),
            deterministic: subject.kind().deterministic(),
            outputs: match subject.kind().level() {
                Level::Attention => vec![problem.o_shape().to_vec()],
                Level::Module => vec![work.tensors[0].shape().to_vec()],
                // Of every tensor but the last, which is the gradient of the output.
                Level::Backward | Level::ModuleBackward => {
                    let (_, inputs) = work.tensors.split_last().context("no tensors")?;
                    inputs.iter().map(|tensor| tensor.shape().to_vec()).collect()
                }
            },
        };
        self.link.run(&job, backends, &job.outputs, &work).context("PyTorch's process")
    }

    /// Runs the peers that read pages, or those that read contiguous caches, on one decode of `q`, `k`
    /// and `v`.
    ///
    /// # Errors
    /// When the process has ended or sends an invalid answer; it is unusable after that.
    pub fn measure_decode(
        &mut self,
        problem: &Problem,
        tensors: [&Tensor; 3],
        job: &DecodeJob<'_>,
    ) -> Result<Vec<Measured>> {
        let reads = |name: &&str| name.starts_with("flashinfer") == (job.page_size > 0);
        let backends: Vec<&str> = self.backends.iter().copied().filter(reads).collect();
        let header = Decode {
            device: &self.device,
            backends: &backends,
            level: "decode",
            dtype: problem.dtype().to_string(),
            batch: problem.batch(),
            heads: problem.heads(),
            kv_heads: problem.kv_heads(),
            head_dim: problem.head_dim(),
            seq: problem.seq_q(),
            seq_k: problem.seq_k(),
            mask: false,
            seed: 0,
            deterministic: false,
            shapes: tensors.iter().map(|tensor| tensor.shape()).collect(),
            job,
        };
        let work = Work { tensors: tensors.to_vec(), mask: None };
        let outputs = [problem.o_shape().to_vec()];
        let run = self.link.run(&header, &backends, &outputs, &work);
        run.context("the peers' process")
    }
}

/// A decode for the peers, beyond its problem.
#[derive(Clone, Debug, Serialize)]
pub struct DecodeJob<'a> {
    /// Storage type of the cache.
    pub stored: String,
    /// Whether there is a window.
    pub window: bool,
    /// Keys of a page; 0 is a contiguous cache.
    pub page_size: usize,
    /// The page of each sequence's pages, one sequence after the other.
    pub page_table: Option<&'a [i32]>,
    /// Copies of the cache that runs take in turn.
    pub caches: usize,
    /// Runs of a graph.
    pub together: usize,
    /// Replays of the graph.
    pub replays: usize,
    /// Timed runs where there are no graphs.
    pub iters: usize,
}

/// One decode, for every peer.
#[derive(Serialize)]
struct Decode<'a> {
    device: &'a str,
    backends: &'a [&'a str],
    level: &'a str,
    dtype: String,
    batch: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    seq: usize,
    seq_k: usize,
    mask: bool,
    seed: u64,
    deterministic: bool,
    shapes: Vec<&'a [usize]>,
    #[serde(flatten)]
    job: &'a DecodeJob<'a>,
}

impl Drop for Peers {
    fn drop(&mut self) {
        // It holds nothing that anyone would miss; where it has ended already, these fail.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The first line of the process.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Hello {
    torch: String,
    cuda: bool,
    packages: Vec<String>,
    error: Option<String>,
}

/// One problem, for every backend.
#[derive(Serialize)]
struct Job<'a> {
    device: &'a str,
    backends: &'a [&'a str],
    level: Level,
    shapes: Vec<&'a [usize]>,
    seq: usize,
    #[serde(flatten)]
    problem: ProblemRecord,
    scale: f32,
    seed: u64,
    #[serde(flatten)]
    repeats: Repeats,
    alibi_slopes: Option<Vec<f64>>,
    sink_scores: Option<Vec<f64>>,
    /// The start offsets of packed sequences in Q and in K.
    cu_seqlens: Option<[&'a [u32]; 2]>,
    /// Whether gradients must have the same bits in each run.
    deterministic: bool,
    /// Shapes of the outputs, which have the storage type of the first tensor.
    outputs: Vec<Vec<usize>>,
}

/// The tensors of a job, in sending order.
struct Work<'a> {
    tensors: Vec<&'a Tensor>,
    mask: Option<&'a [u8]>,
}

/// The answer of one backend; its outputs follow it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Answer {
    status: Status,
    reason: String,
    times_ms: Vec<f64>,
    sustained_ms: Option<f64>,
    replayed_ms: Option<f64>,
    splits: Option<u32>,
    peak_bytes: Option<u64>,
    forward_ms: Option<f64>,
    backward_ms: Option<f64>,
    forward_peak_bytes: Option<u64>,
    bytes: usize,
}

/// Both directions of the protocol that `peers.py` describes.
struct Link<R, W> {
    from: R,
    to: W,
}

impl<R: BufRead, W: Write> Link<R, W> {
    fn line<T: for<'a> Deserialize<'a>>(&mut self) -> Result<T> {
        let mut line = String::new();
        if self.from.read_line(&mut line)? == 0 {
            bail!("it has ended");
        }
        serde_json::from_str(&line).with_context(|| format!("it says {line:?}"))
    }

    fn hello(&mut self) -> Result<Hello> {
        self.line()
    }

    fn run(
        &mut self,
        job: &impl Serialize,
        backends: &[&str],
        outputs: &[Vec<usize>],
        work: &Work<'_>,
    ) -> Result<Vec<Measured>> {
        serde_json::to_writer(&mut self.to, job)?;
        self.to.write_all(b"\n")?;
        for tensor in &work.tensors {
            self.to.write_all(tensor.as_bytes())?;
        }
        self.to.write_all(work.mask.unwrap_or_default())?;
        self.to.flush()?;
        let dtype = work.tensors[0].dtype();
        backends.iter().map(|backend| self.answer(backend, dtype, outputs)).collect()
    }

    fn answer(&mut self, backend: &str, dtype: DType, shapes: &[Vec<usize>]) -> Result<Measured> {
        let answer: Answer = self.line()?;
        let Answer { status, bytes, .. } = answer;
        let mut outputs = Vec::new();
        if status == Status::Ok {
            let length = |shape: &[usize]| shape.iter().product::<usize>() * dtype.size();
            let expected = shapes.iter().map(|shape| length(shape)).sum::<usize>();
            if bytes != expected {
                bail!("its outputs have {bytes} bytes, expected {expected}");
            }
            for shape in shapes {
                let mut data = vec![0; length(shape)];
                self.from.read_exact(&mut data)?;
                outputs.push(Tensor::from_bytes(dtype, shape, &data)?);
            }
        }
        Ok(Measured {
            name: row_name(backend),
            status,
            reason: answer.reason,
            times_ms: answer.times_ms,
            sustained_ms: answer.sustained_ms,
            replayed_ms: answer.replayed_ms,
            splits: answer.splits,
            peak_bytes: answer.peak_bytes,
            passes_ms: [answer.forward_ms, answer.backward_ms],
            forward_peak_bytes: answer.forward_peak_bytes,
            outputs,
        })
    }
}

#[cfg(test)]
mod tests {
    use flash_attention::session::Inputs;

    use super::*;
    use crate::inputs::Tensors;

    fn job(problem: &Problem) -> Job<'_> {
        Job {
            device: "cpu",
            backends: &["math", "flash"],
            level: Level::Attention,
            shapes: Vec::new(),
            seq: problem.seq_q(),
            problem: problem.into(),
            scale: problem.scale(),
            seed: 0,
            repeats: Repeats { iters: 2, warmup: 1, sustained: None },
            alibi_slopes: None,
            sink_scores: None,
            cu_seqlens: None,
            deterministic: false,
            outputs: vec![problem.o_shape().to_vec()],
        }
    }

    fn run(
        link: &mut Link<&[u8], Vec<u8>>,
        job: &Job<'_>,
        work: &Work<'_>,
    ) -> Result<Vec<Measured>> {
        link.run(job, job.backends, &job.outputs, work)
    }

    #[test]
    fn tensors_go_out_and_outputs_come_back() {
        let problem = Problem::builder(1, 1, 3, 32).mask(true).build().unwrap();
        let tensors = Tensors::random(&problem, 1);
        let inputs = tensors.inputs();
        let work = Work { tensors: vec![inputs.q, inputs.k, inputs.v], mask: inputs.mask };
        let mut answers =
            br#"{"status": "ok", "times_ms": [1.5, 2.5], "peak_bytes": 7, "bytes": 384}"#.to_vec();
        answers.push(b'\n');
        answers.extend_from_slice(inputs.v.as_bytes());
        answers.extend_from_slice(b"{\"status\": \"unsupported\", \"reason\": \"no mask\"}\n");
        let mut link = Link { from: answers.as_slice(), to: Vec::new() };
        let [math, flash] =
            <[_; 2]>::try_from(run(&mut link, &job(&problem), &work).unwrap()).unwrap();
        assert_eq!(
            (math.name.as_str(), math.status, math.peak_bytes),
            ("torch-math", Status::Ok, Some(7))
        );
        assert_eq!(math.times_ms, [1.5, 2.5]);
        assert_eq!(math.outputs, std::slice::from_ref(inputs.v));
        assert_eq!((flash.status, flash.reason.as_str()), (Status::Unsupported, "no mask"));
        let sent = link.to;
        let end = sent.iter().position(|&b| b == b'\n').unwrap();
        let header: serde_json::Value = serde_json::from_slice(&sent[..end]).unwrap();
        assert_eq!((&header["seq"], &header["mask"]), (&3.into(), &true.into()));
        assert_eq!(sent.len() - end - 1, 3 * 384 + 3);
        assert!(link.from.is_empty());
    }

    #[test]
    fn gradients_come_one_after_the_other() {
        let problem = Problem::builder(1, 1, 3, 32).seq_k(5).build().unwrap();
        let tensors = Tensors::random(&problem, 1);
        let Inputs { q, k, v, .. } = tensors.inputs();
        let answers = [
            &br#"{"status": "ok", "times_ms": [1.5], "backward_ms": 0.5, "bytes": 1664}"#[..],
            b"\n",
            q.as_bytes(),
            k.as_bytes(),
            v.as_bytes(),
        ];
        let answers = answers.concat();
        let mut link = Link { from: answers.as_slice(), to: Vec::new() };
        let outputs = [q, k, v].map(|tensor| tensor.shape().to_vec()).to_vec();
        let job = Job { level: Level::Backward, backends: &["flash"], outputs, ..job(&problem) };
        let work = Work { tensors: vec![q, k, v, q], mask: None };
        let [flash] = <[_; 1]>::try_from(run(&mut link, &job, &work).unwrap()).unwrap();
        assert_eq!((flash.name.as_str(), flash.passes_ms), ("torch-flash", [None, Some(0.5)]));
        assert_eq!(flash.outputs, [q, k, v].map(Tensor::clone));
        assert!(link.from.is_empty());
    }

    #[test]
    fn a_process_that_ends_or_babbles_is_an_error() {
        let problem = Problem::builder(1, 1, 3, 32).build().unwrap();
        let tensors = Tensors::random(&problem, 1);
        let work = Work { tensors: vec![tensors.inputs().q], mask: None };
        for (answers, part) in [
            (&b""[..], "ended"),
            (b"Killed\n", "it says \"Killed"),
            (b"{\"status\": \"ok\", \"bytes\": 4}\n", "expected 384"),
        ] {
            let mut link = Link { from: answers, to: Vec::new() };
            let error = run(&mut link, &job(&problem), &work).unwrap_err();
            assert!(format!("{error:#}").contains(part), "{error:#}");
        }
    }
}
