//! `trace`: the events of a kernel's first blocks on a line of time, for Perfetto or Chrome.

pub mod chrome;
pub mod costs;
pub mod numbers;
mod page;
pub mod rungs;
pub mod steps;
pub mod timeline;

use std::{collections::HashSet, path::PathBuf, sync::Arc};

use anyhow::Result;
use clap::Args;
use flash_attention::{
    DType,
    backend::cpu::emulator::{Action, ClusterTrace, LaunchRecord, Recorder},
};

use super::specimen::{Bench, SpecimenArgs};
use crate::{
    failure::{Outcome, Usage},
    format, interrupt,
    options::Defaults,
    output,
    progress::print_lines,
    values,
};
use chrome::{Cluster, Document};
use rungs::Rung;
use steps::Steps;
use timeline::Timeline;

/// A block with several tiles of keys.
pub const DEFAULTS: Defaults =
    Defaults { seq: &[256], batch: 1, heads: 1, head_dim: 64, dtype: DType::F16 };
/// Clocks between the launches of a kernel.
const BETWEEN_LAUNCHES: f64 = 1000.0;
/// Slices beyond which no viewer is pleasant.
const MOST_SLICES: usize = 2_000_000;

/// Arguments of `trace`.
#[derive(Args, Clone, Debug)]
#[command(allow_negative_numbers = true)]
pub struct TraceArgs {
    /// The kernel and its problem.
    #[command(flatten)]
    pub specimen: SpecimenArgs,
    /// Write the trace here, to be opened in ui.perfetto.dev or chrome://tracing; - is standard output,
    /// and text goes to standard error
    #[arg(long, value_name = "FILE", required_unless_present = "html")]
    pub out: Option<PathBuf>,
    /// Write a page that goes through the first block step by step, with the numbers that it has: S, P, m, l and O, or
    /// S, P, dP, dS, dV, dK and dQ
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Trace this many blocks of each launch (clusters, where there are any), from the first on
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = values::count)]
    pub blocks: usize,
}

/// Runs the command.
///
/// # Errors
/// An invalid request, a faulty kernel, or an unwritable file.
pub fn run(args: &TraceArgs) -> Result<Outcome> {
    if args.html.is_some() && Rung::find(&args.specimen.kernel).is_none() {
        let (kernel, known) = (&args.specimen.kernel, format::list(&Rung::kernels()));
        return Err(
            Usage(format!("--html goes through {known}, not {kernel}: leave it out")).into()
        );
    }
    let [out, html] =
        output::open_all([("--out", args.out.as_deref()), ("--html", args.html.as_deref())])?;
    interrupt::listen();
    let bench = Bench::new();
    let recorder = Arc::new(Recorder::new(args.blocks as u64));
    let Some(specimen) = bench.record(&args.specimen, &DEFAULTS, &recorder)? else {
        return Ok(Outcome::Interrupted);
    };
    let traced = Traced::new(&specimen.describe(), &recorder.take())?;
    if let Some(out) = out {
        out.write(|to| Ok(serde_json::to_writer(to, &traced.document)?))?;
        print_lines(&traced.summary(&specimen.describe()));
        print_lines(&format!("wrote {}", out.path().display()));
    }
    if let Some(html) = html {
        let Some(inputs) = specimen.plain_inputs() else {
            let reason = "--html goes through attention without further features, causal or not: leave them out";
            return Err(Usage(reason.into()).into());
        };
        let tensors = [inputs.q, inputs.k, inputs.v];
        let steps = Steps::new(specimen.kernel, &specimen.problem, tensors, specimen.d_o())?;
        let page = page::page(&specimen.describe(), &steps)?;
        html.write(|to| Ok(to.write_all(page.as_bytes())?))?;
        print_lines(&format!("wrote {}: {} steps", html.path().display(), steps.steps.len()));
    }
    Ok(Outcome::Good)
}

/// A document and what it holds.
struct Traced {
    document: Document,
    launches: usize,
    blocks: usize,
    slices: usize,
    arrows: usize,
    clocks: f64,
}

impl Traced {
    fn new(title: &str, records: &[LaunchRecord]) -> Result<Self> {
        let mut traced = Self {
            document: Document::new(title),
            launches: records.len(),
            blocks: 0,
            slices: 0,
            arrows: 0,
            clocks: 0.0,
        };
        for (launch, record) in records.iter().enumerate() {
            let begin = traced.clocks + if launch > 0 { BETWEEN_LAUNCHES } else { 0.0 };
            for trace in &record.traces {
                let timeline = Timeline::new(&without_async_reads(trace));
                let blocks = trace.warps.len() / trace.block_warps.max(1);
                let cluster = Cluster {
                    name: record.name,
                    first_block: trace.cluster * u64::from(record.launch.cluster),
                    first_process: traced.blocks + 1,
                    block_warps: trace.block_warps.max(1),
                };
                traced.document.add(&timeline, &cluster, begin);
                traced.blocks += blocks;
                traced.slices += timeline.slices.len();
                traced.arrows += timeline.arrows.len();
                traced.clocks = traced.clocks.max(begin + timeline.clocks());
                if traced.slices > MOST_SLICES {
                    let reason = format!(
                        "the trace has more than {MOST_SLICES} slices: use a smaller problem or fewer --blocks"
                    );
                    return Err(Usage(reason).into());
                }
            }
        }
        Ok(traced)
    }

    fn summary(&self, title: &str) -> String {
        let counted = |count: usize, what: &str| {
            let number = format::count(count as i64);
            format!("{number} {what}{}", if count == 1 { "" } else { "s" })
        };
        format!(
            "{title}\n{} of {}: {}, {}; about {} clocks\n\
             An estimate: the emulator's order of events with stated costs. 1 ns in the trace stands for 1 clock. \
             The costs: {}\n\
             Open it at ui.perfetto.dev (it stays on your computer) or chrome://tracing.",
            counted(self.blocks, "block"),
            counted(self.launches, "launch").replace("launchs", "launches"),
            counted(self.slices, "slice"),
            counted(self.arrows, "arrow"),
            format::count(self.clocks as i64),
            costs::STATED
        )
    }
}

/// The trace without the reads of global memory that `cp.async` makes: a thread does not wait for them.
fn without_async_reads(trace: &ClusterTrace) -> ClusterTrace {
    let events = || trace.warps.iter().flatten();
    let copies = events().filter(|event| event.action == Action::CopyStart);
    let copies: HashSet<(&str, u32)> = copies.map(|event| (event.file, event.line)).collect();
    let mut trace = trace.clone();
    for events in &mut trace.warps {
        events.retain(|event| {
            event.action != Action::GlobalRead || !copies.contains(&(event.file, event.line))
        });
    }
    trace
}
