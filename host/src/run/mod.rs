//! `run`: a kernel on the user's own tensors, from a safetensors file to another.

mod attention;
mod check;
pub mod file;

use std::{fs, path::PathBuf};

use anyhow::Result;
use clap::{Args, ValueEnum};
use flash_attention::{Layout, session::Session};

use crate::{
    failure::{Outcome, Usage},
    format, machine,
    options::{DeviceChoice, parse_bytes},
    output,
    progress::print_lines,
};
use attention::Given;
use file::TensorFile;

/// Arguments of `run`.
#[derive(Args, Clone, Debug)]
pub struct RunArgs {
    /// Tensors to compute with: q, k, v and, if some keys are hidden, mask (u8 or bool,
    /// batch by keys, 0 = hidden)
    #[arg(long, value_name = "FILE")]
    pub input: PathBuf,
    /// Where to write o and lse
    #[arg(long, value_name = "FILE", required_unless_present = "check")]
    pub output: Option<PathBuf>,
    /// Kernel by name; best is the fastest that can do it here
    #[arg(long, value_name = "NAME", default_value = "best")]
    pub kernel: String,
    /// Order of the dimensions of q, k, v and o: batch, heads, tokens, features or batch,
    /// tokens, heads, features
    #[arg(long, value_name = "ORDER", default_value = "bhnd")]
    pub layout: Order,
    /// Let row i see keys up to i + Nk - Nq only
    #[arg(long)]
    pub causal: bool,
    /// Softmax scale; 1/sqrt(D) unless given
    #[arg(long, value_name = "SCALE")]
    pub scale: Option<f32>,
    /// Drop attention weights with this probability
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    pub dropout: f32,
    /// Seed of dropout
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
    /// Write the attention weights too: those that the kernel kept, or computed again from LSE
    #[arg(long)]
    pub with_weights: bool,
    /// Compare with o and lse of the input file, by the 2x rule
    #[arg(long)]
    pub check: bool,
    /// Where to run: auto (a GPU if there is one), gpu, gpu:1 (a certain one) or cpu
    #[arg(long, value_name = "WHERE", default_value = "auto")]
    pub device: DeviceChoice,
    /// Memory that the emulator has, as 512MiB or 2GiB; half of what is free unless given
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
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

/// Runs the command.
///
/// # Errors
/// What is wrong with the request, the file or a tensor; or what failed.
pub fn run(args: &RunArgs) -> Result<Outcome> {
    let input = TensorFile::open(&args.input)?;
    if let Some(path) = &args.output {
        refuse_same_file(args, path)?;
        output::check_file(path)?;
    }
    let given = Given::read(&input, args)?;
    let expected = args.check.then(|| given.expected()).transpose()?;
    let opened = machine::open(args.device, args.memory_limit)?;
    let session = Session::new(opened.device.clone());
    let kernel = given.kernel(args, &session)?;
    let done = given.run(&session, kernel, args.with_weights)?;

    let p = &given.problem;
    print_lines(&format!(
        "{} {} by {} on {}: {}{}, peak memory {}",
        p.dtype(),
        flash_attention::error::Shape(p.q_shape().to_vec()),
        kernel.name,
        opened.info.name,
        format::digits(done.ms) + " ms",
        if opened.info.emulated { " (emulated: not GPU speed)" } else { "" },
        format::bytes(done.peak_bytes as f64),
    ));
    if let Some(path) = &args.output {
        let mut tensors = vec![("o", &done.outputs.o), ("lse", &done.outputs.lse)];
        tensors.extend(done.outputs.weights.as_ref().map(|weights| ("weights", weights)));
        let notes = [("kernel", kernel.name.to_owned()), ("device", opened.info.name.clone())];
        file::save(path, &tensors, &notes)?;
        let names: Vec<&str> = tensors.iter().map(|(name, _)| *name).collect();
        print_lines(&format!("wrote {} to {}", names.join(", "), path.display()));
    }
    let Some(expected) = expected else { return Ok(Outcome::Good) };
    let comparisons = given.compare(&done.outputs, &expected)?;
    for comparison in &comparisons {
        print_lines(&comparison.lines());
    }
    let good = comparisons.iter().all(check::Comparison::passes);
    Ok(if good { Outcome::Good } else { Outcome::Bad })
}

/// Writing to the file that is read from would destroy the tensors while they are used.
fn refuse_same_file(args: &RunArgs, output: &std::path::Path) -> Result<()> {
    let same = fs::canonicalize(&args.input).ok().zip(fs::canonicalize(output).ok());
    if same.is_some_and(|(input, output)| input == output) {
        let path = output.display();
        return Err(Usage(format!("--output {path} is the input: write to another file")).into());
    }
    Ok(())
}
