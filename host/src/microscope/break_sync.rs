//! `break`: the synchronisations of a kernel, what each prevents, and what the emulator says when one
//! of them is left out.

use std::sync::Arc;

use anyhow::Result;
use clap::Args;
use flash_attention::{
    DType, Error,
    backend::cpu::emulator::{Alteration, Change, Options, Sites, SyncKind, SyncSite},
};

use super::{
    source::{self, Line},
    specimen::{Bench, Specimen, SpecimenArgs},
};
use crate::{
    failure::{Outcome, Usage},
    format, interrupt,
    options::Defaults,
    progress::{Progress, print_lines},
    values,
};

/// Several tiles of rows and of keys, so that stages are filled again.
pub const DEFAULTS: Defaults =
    Defaults { seq: &[300], batch: 1, heads: 3, head_dim: 64, dtype: DType::F16 };
/// Seeds of the schedule: in order, backwards, priorities that change, any order.
const SEEDS: [u64; 4] = [0, 1, 3, 2];
/// Steps without progress that kernels of these sizes never need.
const BUDGET: u64 = 1 << 24;

/// Arguments of `break`.
#[derive(Args, Clone, Debug)]
#[command(allow_negative_numbers = true)]
pub struct BreakArgs {
    /// The kernel and its problem.
    #[command(flatten)]
    pub specimen: SpecimenArgs,
    /// Run the kernel without the synchronisation of this number
    #[arg(long, value_name = "NUMBER", value_parser = values::count)]
    pub without: Option<usize>,
    /// Let the wait name the other parity, in place of leaving it out
    #[arg(long, requires = "without", conflicts_with = "one_more_pending")]
    pub other_parity: bool,
    /// Let the wait leave one more group on its way, in place of leaving it out
    #[arg(long, requires = "without")]
    pub one_more_pending: bool,
    /// Leave out each synchronisation in turn
    #[arg(long, conflicts_with = "without")]
    pub all: bool,
    /// Seeds of the order in which warps run and copies land, separated by commas
    #[arg(long, value_name = "SEED,…", value_delimiter = ',', value_parser = values::seed,
          default_values_t = SEEDS)]
    pub schedules: Vec<u64>,
}

/// Runs the command.
///
/// # Errors
/// An invalid request, or a kernel that is faulty without a change.
pub fn run(args: &BreakArgs) -> Result<Outcome> {
    interrupt::listen();
    let bench = Bench::new();
    let specimen = match bench.draw(&args.specimen, &DEFAULTS) {
        Err(_) if interrupt::requested() => return Ok(Outcome::Interrupted),
        drawn => drawn?,
    };
    let sites = match sites(&specimen) {
        Err(_) if interrupt::requested() => return Ok(Outcome::Interrupted),
        sites => sites?,
    };
    let heading =
        format!("{}; {}", specimen.describe(), format::counted(sites.len(), "synchronisation"));
    if let Some(number) = args.without {
        let site = chosen(&sites, number)?;
        let alteration = alteration(args, number, site)?;
        print_lines(&format!("{heading}\n\n{}", entry(number, site)));
        return without(&specimen, &args.schedules, Change { site, alteration });
    }
    print_lines(&heading);
    if args.all {
        return each(&specimen, &args.schedules, &sites);
    }
    for (index, &site) in sites.iter().enumerate() {
        print_lines(&format!("\n{}", entry(index + 1, site)));
    }
    if sites.is_empty() {
        return Ok(Outcome::Good);
    }
    let kernel = specimen.kernel;
    print_lines(&format!(
        "\n--kernel {kernel} --without NUMBER runs it without that one, --all without each in turn."
    ));
    Ok(Outcome::Good)
}

/// The synchronisations that the kernel passes, in the order of the source.
fn sites(specimen: &Specimen<'_>) -> Result<Vec<SyncSite>> {
    let sites = Arc::new(Sites::default());
    let watched = Options { sites: Some(sites.clone()), ..Options::default() };
    if let Some(wrong) = specimen.run(&watched)? {
        anyhow::bail!("{} is wrong as it stands: {wrong}", specimen.kernel);
    }
    Ok(sites.list())
}

fn chosen(sites: &[SyncSite], number: usize) -> Result<SyncSite> {
    let site = number.checked_sub(1).and_then(|index| sites.get(index));
    site.copied().ok_or_else(|| {
        let range = match sites.len() {
            0 => "this kernel has no synchronisation".to_owned(),
            last => format!("this kernel has 1 to {last} with this problem"),
        };
        Usage(format!("--without {number}: {range}")).into()
    })
}

/// The requested change of a synchronisation, if its kind allows the change.
fn alteration(args: &BreakArgs, number: usize, site: SyncSite) -> Result<Alteration> {
    let (alteration, option) = match args {
        BreakArgs { other_parity: true, .. } => (Alteration::OtherParity, "--other-parity"),
        BreakArgs { one_more_pending: true, .. } => {
            (Alteration::OneMorePending, "--one-more-pending")
        }
        _ => return Ok(Alteration::LeaveOut),
    };
    if site.kind.alterations().contains(&alteration) {
        return Ok(alteration);
    }
    let of = match alteration {
        Alteration::OtherParity => "waits for an mbarrier have a parity",
        _ => "waits for groups (of copies, of products) leave some on their way",
    };
    let kind = name(site.kind);
    Err(Usage(format!("{option}: number {number} is a {kind}, and only {of}")).into())
}

/// A synchronisation as the list has it: what it is, its line, the comment that says why.
fn entry(number: usize, site: SyncSite) -> String {
    let mut text = format!("{number:>3}  {} at ", name(site.kind));
    let Some(line) = Line::of(site.file, site.line) else {
        return text + &format!("{}:{}", site.file, site.line);
    };
    text += &line.to_string();
    if let Some(comment) = line.comment() {
        text += &format!("\n     {comment}");
    }
    text + &format!("\n     > {}", line.text())
}

/// The kind of a synchronisation, as a reader knows it.
fn name(kind: SyncKind) -> &'static str {
    match kind {
        SyncKind::Barrier => "barrier of the block",
        SyncKind::BarrierArrive => "arrival at a named barrier",
        SyncKind::ClusterBarrier => "barrier of the cluster",
        SyncKind::WarpBarrier => "barrier of the warp",
        SyncKind::MbarrierWait => "wait for an mbarrier",
        SyncKind::MbarrierArrive => "arrival at an mbarrier",
        SyncKind::MbarrierExpect => "arrival at an mbarrier that announces bytes",
        SyncKind::FenceInit => "fence after the initialisation of mbarriers",
        SyncKind::FenceProxyAsync => "fence between ordinary writes and the copy engine or wgmma",
        SyncKind::CopyCommit => "commit of a group of cp.async copies",
        SyncKind::CopyWait => "wait for groups of cp.async copies",
        SyncKind::BulkCommit => "commit of a group of bulk stores",
        SyncKind::BulkWait => "wait for groups of bulk stores",
        SyncKind::WgmmaWait => "wait for wgmma products",
        SyncKind::TurnWait => "wait for a turn among blocks",
        SyncKind::TurnPass => "passing of a turn to the next block",
        SyncKind::RegistersDecrease => "release of registers",
        SyncKind::RegistersIncrease => "request for registers",
    }
}

/// The consequence of a change.
enum Found {
    /// The emulator's fault, as text.
    Fault(String),
    /// Numbers that are wrong, and which.
    Wrong(String),
    Nothing,
}

/// Runs with a change.
///
/// # Errors
/// [`Error::Stopped`], or out of memory.
fn try_out(specimen: &Specimen<'_>, change: Change, seed: u64) -> Result<Found, Error> {
    let options = Options { change: Some(change), budget: BUDGET, ..Options::seeded(seed) };
    match specimen.run(&options) {
        Ok(None) => Ok(Found::Nothing),
        Ok(Some(wrong)) => Ok(Found::Wrong(wrong)),
        Err(Error::Kernel { fault, symbol }) => Ok(Found::Fault(format!("{symbol}: {fault}"))),
        Err(error) => Err(error),
    }
}

const UNNOTICED: &str = "\
Nothing noticed: every run ended, with the right numbers. For this problem something else may order the \
same accesses, or this code has nothing to wait for; docs/emulator.md lists what the emulator does not find.";

/// Runs with one change under each seed.
fn without(specimen: &Specimen<'_>, seeds: &[u64], change: Change) -> Result<Outcome> {
    let what = match change.alteration {
        Alteration::LeaveOut => "Left out",
        Alteration::OtherParity => "With the other parity",
        Alteration::OneMorePending => "With one more group on its way",
    };
    let mut noticed = false;
    for &seed in seeds {
        let found = match try_out(specimen, change, seed) {
            Err(Error::Stopped) => return Ok(Outcome::Interrupted),
            found => found?,
        };
        let mut text = format!("\n{what}, schedule {seed}: ");
        match found {
            Found::Nothing => text += "nothing noticed",
            Found::Wrong(wrong) => {
                noticed = true;
                text += &format!("no fault, but {wrong}");
            }
            Found::Fault(fault) => {
                noticed = true;
                text += &format!("fault\n     {fault}");
                for line in source::named_in(&fault) {
                    text += &format!("\n     {line}\n       > {}", line.text());
                }
            }
        }
        print_lines(&text);
    }
    if !noticed {
        print_lines(&format!("\n{UNNOTICED}"));
    }
    Ok(Outcome::Good)
}

/// Runs without each synchronisation in turn, until one seed shows something.
fn each(specimen: &Specimen<'_>, seeds: &[u64], sites: &[SyncSite]) -> Result<Outcome> {
    let progress = Progress::new(sites.len());
    let mut unnoticed = 0;
    for (index, &site) in sites.iter().enumerate() {
        progress.doing(site.to_string());
        let change = Change { site, alteration: Alteration::LeaveOut };
        let mut text = format!("\n{}\n     ", entry(index + 1, site));
        let mut noticed = false;
        for &seed in seeds {
            match try_out(specimen, change, seed) {
                Err(Error::Stopped) => return Ok(Outcome::Interrupted),
                Err(error) => return Err(error.into()),
                Ok(Found::Nothing) => continue,
                Ok(Found::Fault(found)) => text += &format!("without it: {found}"),
                Ok(Found::Wrong(wrong)) => text += &format!("without it: {wrong} (seed {seed})"),
            }
            noticed = true;
            break;
        }
        if !noticed {
            unnoticed += 1;
            text += "without it: nothing noticed";
        }
        progress.print(&text);
        progress.step();
    }
    drop(progress);
    if unnoticed > 0 {
        print_lines(&format!("\n{unnoticed} of {} unnoticed. {UNNOTICED}", sites.len()));
    }
    Ok(Outcome::Good)
}
