//! `profile`: a kernel's source with what the emulator counted at each line, what follows for the time
//! on a GPU, and the time that was measured, where a record has it.

mod columns;
mod counted;
mod page;
mod roofline;
mod terminal;

use std::{io::IsTerminal as _, path::PathBuf, sync::Arc};

use anyhow::Result;
use clap::Args;
use flash_attention::{DType, Problem, backend::cpu::emulator::Recorder};

use super::{
    gpu::{self, Gpu},
    specimen::{Bench, SpecimenArgs},
};
use crate::{
    failure::Outcome,
    interrupt,
    options::Defaults,
    output,
    progress::print_lines,
    results::{Level, ProblemRecord, Row, Status},
    table,
};
use counted::Counted;
use roofline::Roofline;

/// The problem that `compare` measures on the emulator.
pub const DEFAULTS: Defaults =
    Defaults { seq: &[256], batch: 1, heads: 2, head_dim: 64, dtype: DType::F16 };

/// The record that measured times are looked up in, and its table.
const RECORD: (&str, &str) = (
    "benches/record/2026-11-25-h100.md",
    include_str!("../../../../benches/record/2026-11-25-lab.csv"),
);

/// Arguments of `profile`.
#[derive(Args, Clone, Debug)]
#[command(allow_negative_numbers = true)]
pub struct ProfileArgs {
    /// The kernel and its problem.
    #[command(flatten)]
    pub specimen: SpecimenArgs,
    /// The GPU whose figures say what bounds the kernel
    #[arg(long, value_name = "NAME", default_value = "h100", value_parser = gpu::parser())]
    pub gpu: Gpu,
    /// Write one page with everything: the source with heat, tables to sort, the roofline
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Print whole lines of source, however wide the terminal is
    #[arg(long)]
    pub wide: bool,
}

/// A kernel that has been counted.
struct Profile {
    kernel: &'static str,
    /// Kernel and problem in one line.
    title: String,
    dtype: DType,
    counted: Counted,
    roofline: Roofline,
    gpu: Gpu,
    /// Operations by convention.
    flops: f64,
    /// A time that was measured, and on what.
    measured: Option<(f64, String)>,
    /// Why the GPU does not run the kernel.
    obstacle: Option<String>,
}

/// Runs the command.
///
/// # Errors
/// An invalid request, a faulty kernel, or an unwritable file.
pub fn run(args: &ProfileArgs) -> Result<Outcome> {
    let [html] = output::open_all([("--html", args.html.as_deref())])?;
    interrupt::listen();
    let bench = Bench::new();
    let recorder = Arc::new(Recorder::default());
    let Some(specimen) = bench.record(&args.specimen, &DEFAULTS, &recorder)? else {
        return Ok(Outcome::Interrupted);
    };
    let counted = Counted::new(&recorder.take());
    let dtype = specimen.problem.dtype();
    let profile = Profile {
        kernel: specimen.kernel,
        title: specimen.describe(),
        dtype,
        roofline: Roofline::new(&counted.total, dtype, specimen.own_bytes(), &args.gpu),
        counted,
        gpu: args.gpu,
        flops: specimen.flops(),
        measured: measured(specimen.kernel, &specimen.problem, &args.gpu),
        obstacle: specimen.obstacle_on(args.gpu.capability),
    };
    // Output to a file or another program is not cut off.
    let width = table::width(args.wide).filter(|_| std::io::stdout().is_terminal());
    print_lines(&terminal::text(&profile, width));
    if let Some(html) = html {
        html.write(|to| Ok(to.write_all(page::page(&profile).as_bytes())?))?;
        print_lines(&format!("wrote {}", html.path().display()));
    }
    Ok(Outcome::Good)
}

/// The median of the record's row for that kernel, problem and GPU, in milliseconds.
fn measured(kernel: &str, problem: &Problem, gpu: &Gpu) -> Option<(f64, String)> {
    let (file, table) = RECORD;
    let p = ProblemRecord::from(problem);
    let plain = ["", ", causal"].contains(&p.features().to_string().as_str());
    let mut rows = csv::Reader::from_reader(table.as_bytes());
    let row = rows.deserialize().flatten().find(|row: &Row| {
        let of_problem = (row.batch, row.heads, row.seq, row.head_dim, row.dtype, row.causal)
            == (p.batch, p.heads, problem.seq_q(), p.head_dim, p.dtype, p.causal);
        let of_kernel = row.kernel == kernel && row.level == Level::Attention;
        let on_gpu = row.device.to_lowercase().contains(gpu.name);
        of_problem && of_kernel && on_gpu && row.status == Status::Ok
    })?;
    let ms = row.median_ms.filter(|_| plain)?;
    Some((ms, format!("{}, median from a cold L2 cache, {file}", row.device)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measured_times_are_those_of_the_same_problem() {
        let [h100, h200, ..] = gpu::GPUS;
        let lab = |n: usize| Problem::builder(4, 12, n, 64).dtype(DType::F16);
        let problem = lab(2048).build().unwrap();
        let (ms, of) = measured("flash_tiled", &problem, &h100).unwrap();
        assert!(
            (4.0..4.2).contains(&ms) && of.contains("H100") && of.contains(RECORD.0),
            "{ms} {of}"
        );
        assert_eq!(measured("flash_tiled", &problem, &h200), None);
        assert_eq!(measured("backward_mma", &problem, &h100), None);
        for other in [lab(2047), lab(2048).dtype(DType::F32), lab(2048).softcap(Some(5.0))] {
            assert_eq!(measured("flash_tiled", &other.build().unwrap(), &h100), None);
        }
    }
}
