//! `run`: a kernel on the user's own tensors, from a safetensors file to another.

mod attention;
mod backward;
mod check;
mod decode;
pub mod file;
mod module;
mod module_backward;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, ValueEnum};
use flash_attention::{
    Layout, Problem, Tensor, Window,
    error::{Shape, listed},
    module::ModuleGradients,
    raw::Plan,
    registry::{self, Operation, Spec},
    session::Session,
};

use crate::{
    failure::{Outcome, Usage},
    format, interrupt,
    machine::{self, DeviceChoice},
    output::{self, Output},
    progress::{print_lines, warn},
    values,
};
use attention::GivenAttention;
use backward::GivenBackward;
use check::Comparison;
use decode::GivenDecode;
use file::TensorFile;
use module::GivenModule;
use module_backward::GivenModuleBackward;

/// Arguments of `run`.
#[derive(Args, Clone, Debug)]
#[command(allow_negative_numbers = true)]
pub struct RunArgs {
    /// Tensors to compute with: q, k and v, or with --weights x (batch by tokens by features);
    /// and, if some keys are hidden, mask (u8 or bool, batch by keys, 0 = hidden). With q, k and v
    /// also alibi_slopes (f32, heads or batch by heads), bias (batch or 1, heads or 1, queries,
    /// keys) and sinks (f32, heads). Where k and v have fewer heads, heads of q share them. With
    /// cu_seqlens_q and cu_seqlens_k (i32, u32 or i64, from 0 on, one more than sequences) q, k and v
    /// are packed: tokens, heads, features. With seqused_k (i32, keys of each sequence) k and v are a
    /// cache; with page_table (i32, batch by pages) they are its pages; with k_scale and v_scale (f32,
    /// heads of k) they are in e4m3. With --backward do, of the shape of o, and o and lse, which are
    /// computed where one of them is missing; with --weights dy, of the shape of x
    #[arg(long, value_name = "FILE")]
    pub input: PathBuf,
    /// Run the multi-head attention module whose state_dict is in this file: q_proj, k_proj,
    /// v_proj and out_proj (.weight, and .bias unless made with bias=False), or in_proj_weight and
    /// in_proj_bias in place of the first three (torch.nn.MultiheadAttention)
    #[arg(long, value_name = "FILE", requires = "heads", conflicts_with_all = ["layout", "scale"])]
    pub weights: Option<PathBuf>,
    /// Heads of the module
    #[arg(long, value_name = "H", value_parser = values::count, requires = "weights")]
    pub heads: Option<usize>,
    /// Compute the gradients dq, dk and dv for the gradient do of o, and dbias and dsinks where the file
    /// has bias and sinks; with --weights dx, and the gradients of the weights and biases under their names,
    /// for the gradient dy of y
    #[arg(long, conflicts_with = "with_weights")]
    pub backward: bool,
    /// Ask for gradients with the same bits each time
    #[arg(long, requires = "backward")]
    pub deterministic: bool,
    /// Where to write o and lse, the module's y, or gradients; - is standard output, and text
    /// goes to standard error
    #[arg(long, value_name = "FILE", required_unless_present = "check")]
    pub output: Option<PathBuf>,
    /// Kernel by name; best is the fastest kernel that supports the problem here
    #[arg(long, value_name = "NAME", default_value = "best", value_parser = values::kernel_or_best())]
    pub kernel: String,
    /// Order of the dimensions of q, k, v and o: batch, heads, tokens, features or batch,
    /// tokens, heads, features
    #[arg(long, value_name = "ORDER", default_value = "bhnd")]
    pub layout: Order,
    /// Let row i see only keys up to i + Nk - Nq
    #[arg(long)]
    pub causal: bool,
    /// Let row i see only keys from i + Nk - Nq - L to i + Nk - Nq + R; -1 means no bound
    #[arg(long, value_name = "L,R", allow_hyphen_values = true, value_parser = values::window, conflicts_with = "weights")]
    pub window: Option<Window>,
    /// Cap scores: C tanh(s / C) replaces s
    #[arg(long, value_name = "C", value_parser = values::number, conflicts_with = "weights")]
    pub softcap: Option<f32>,
    /// Softmax scale; 1/sqrt(D) unless given
    #[arg(long, value_name = "SCALE", value_parser = values::number)]
    pub scale: Option<f32>,
    /// Drop attention weights with this probability
    #[arg(long, value_name = "P", default_value_t = 0.0, value_parser = values::number)]
    pub dropout: f32,
    /// Seed of dropout
    #[arg(long, default_value_t = 42, value_parser = values::seed)]
    pub seed: u64,
    /// Also write the attention weights: kept by the kernel, or computed again from Q and K
    #[arg(long)]
    pub with_weights: bool,
    /// Compare with o and lse, y, or gradients of the input file, by the 2x rule
    #[arg(long)]
    pub check: bool,
    /// Where to run: auto (a GPU if there is one), gpu, gpu:1 (a certain one) or cpu
    #[arg(long, value_name = "WHERE", default_value = "auto")]
    pub device: DeviceChoice,
    /// Memory of the emulator, such as 512MiB or 2GiB; half of the free memory unless given
    #[arg(long, value_name = "SIZE", value_parser = values::bytes)]
    pub memory_limit: Option<u64>,
}

/// Order of dimensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Order {
    /// Batch, heads, tokens, features.
    Bhnd,
    /// Batch, tokens, heads, features.
    Bnhd,
}

impl From<Order> for Layout {
    fn from(order: Order) -> Self {
        match order {
            Order::Bhnd => Self::HeadsFirst,
            Order::Bnhd => Self::TokensFirst,
        }
    }
}

/// Tensors of files and the problem that they define.
trait Given {
    /// The problem.
    fn problem(&self) -> &Problem;

    /// Shape of the first tensor.
    fn shape(&self) -> &[usize];

    /// Runs a kernel on the tensors, which go straight from the file to the device.
    ///
    /// # Errors
    /// The reason that the kernel does not support the problem;
    /// [`flash_attention::Error::OutOfMemory`], where predictable before any allocation; or a fault
    /// of the kernel.
    fn run(&self, session: &Session, args: &RunArgs) -> Result<Done>;

    /// Compares outputs with the file's outputs by the 2x rule: they may differ by twice the error
    /// that the plain algorithm makes on the same input, against f64.
    ///
    /// # Errors
    /// When the inputs cannot be read.
    fn compare(&self, done: &Done) -> Result<Vec<Comparison>>;
}

/// The results of a kernel.
struct Done {
    /// Outputs by name, the main one first.
    tensors: Vec<(&'static str, Tensor)>,
    /// The kernel.
    kernel: &'static str,
    /// Kernels that ran, in words.
    by: String,
    /// Milliseconds that the device was busy.
    ms: f64,
    /// The peak of device memory, in bytes.
    peak_bytes: u64,
}

/// Names of answers, and of their gradients: a file may hold them beside the inputs of a run.
const ANSWERS: [&[&str]; 3] =
    [&["o", "lse", "weights", "y", "do", "dy"], &backward::NAMES, &ModuleGradients::NAMES];

/// Runs the command.
///
/// # Errors
/// An error of the request, the file, a tensor, or the run.
pub fn run(args: &RunArgs) -> Result<Outcome> {
    let input = TensorFile::open(&args.input)?;
    let [output] = output::open_all([("--output", args.output.as_deref())])?;
    output.as_ref().map_or(Ok(()), |output| refuse_same_file(args, output))?;
    let given: Box<dyn Given> = match (&args.weights, args.heads) {
        (Some(weights), Some(heads)) if args.backward => {
            Box::new(GivenModuleBackward::read(&input, weights, heads, args)?)
        }
        (Some(weights), Some(heads)) => {
            Box::new(GivenModule::read(&input, weights, heads, (args, args.check))?)
        }
        _ if GivenDecode::is_in(&input) => Box::new(GivenDecode::read(&input, args)?),
        _ if args.backward => Box::new(GivenBackward::read(&input, args)?),
        _ => Box::new(GivenAttention::read(&input, args, args.check)?),
    };
    let others = input.others(&ANSWERS.concat());
    if !others.is_empty() {
        let (path, others) = (args.input.display(), listed(others));
        warn(&format!("this run does not use {others} of {path}"));
    }
    let opened = machine::open(args.device, args.memory_limit)?;
    let session = Session::new(opened.device.clone());
    let done = given.run(&session, args)?;

    print_lines(&format!(
        "{} {} by {} on {}: {}{}, peak memory {}",
        given.problem().dtype(),
        Shape(given.shape().to_vec()),
        done.by,
        opened.info.name,
        format::digits(done.ms) + " ms",
        if opened.info.emulated { " (emulated: not GPU speed)" } else { "" },
        format::bytes(done.peak_bytes as f64),
    ));
    // Until now nothing was lost by a signal.
    interrupt::listen();
    if let (Some(output), Some(path)) = (output, &args.output) {
        let notes = [("kernel", done.kernel.to_owned()), ("device", opened.info.name.clone())];
        file::save(&output, &done.tensors, &notes)?;
        let names: Vec<&str> = done.tensors.iter().map(|(name, _)| *name).collect();
        print_lines(&format!("wrote {} to {}", names.join(", "), path.display()));
    }
    if interrupt::requested() {
        return Ok(Outcome::Interrupted);
    }
    let comparisons = given.compare(&done)?;
    for comparison in &comparisons {
        print_lines(&comparison.lines());
    }
    let good = comparisons.iter().all(Comparison::passes);
    Ok(if good { Outcome::Good } else { Outcome::Bad })
}

/// The plan of the kernel that `--kernel` names, or of the best kernel that supports the problem.
fn plan<P: Operation>(args: &RunArgs, problem: &P, session: &Session) -> Result<Plan<P>> {
    let target = session.target();
    if args.kernel == "best" {
        return Ok(registry::best_for(problem, &target)?.plan);
    }
    Ok(Spec::<P>::find(&args.kernel)?.plan(problem, &target)?)
}

/// Refuses an output that is also an input file: writing it would destroy the tensors in use.
fn refuse_same_file(args: &RunArgs, output: &Output) -> Result<()> {
    let files = [(Some(&args.input), "the input"), (args.weights.as_ref(), "the weights' file")];
    for (file, what) in files {
        if file.is_some_and(|file| output.is_file(file)) {
            let path = output.path().display();
            return Err(Usage(format!("--output {path} is {what}: write to another file")).into());
        }
    }
    Ok(())
}
