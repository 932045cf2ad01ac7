//! Assembles the modules with ptxas and reads what it reports.
//!
//! The driver would assemble the same text at load, silently. Here every entry is
//! assembled for each generation that loads its module, and whatever makes a kernel
//! slow without making it wrong (a spill, a stack frame, serialised wgmma) is an error.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, fs, thread};

use anyhow::{Context, Result, anyhow};

use crate::combinations;
use crate::compile::succeed;
use crate::{Module, pack};

/// The report of ptxas on one entry for one architecture.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes spilled, stores and loads together.
    pub spill_bytes: u32,
    /// Bytes of stack frame.
    pub stack_bytes: u32,
    /// Bytes of static shared memory.
    pub shared_bytes: u32,
    /// Hardware barriers.
    pub barriers: u32,
    /// Warnings and performance advice that name the entry.
    pub warnings: Vec<String>,
}

/// The report of ptxas on one module for one architecture.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Assembly {
    /// By entry.
    pub entries: BTreeMap<String, Usage>,
    /// Warnings that name no entry.
    pub warnings: Vec<String>,
}

/// The report over all modules: the assembly for each module, combination of constants and
/// architecture.
pub type Report = BTreeMap<(&'static str, String, &'static str), Assembly>;

/// A text to assemble: a module's entries in one combination of constants.
#[derive(Clone, Debug)]
pub struct Unit {
    /// The module.
    pub module: Module,
    /// The combination, as [`combinations::name`] has it.
    pub combination: String,
    /// The text.
    pub text: String,
}

/// The texts to assemble for a module: its entries in each of their combinations.
#[must_use]
pub fn units(texts: &[pack::Text]) -> Vec<Unit> {
    let mut units: Vec<Unit> = Vec::new();
    for (module, text) in texts {
        let head = pack::head(text);
        let mut by_combination: BTreeMap<String, String> = BTreeMap::new();
        for (name, entry) in pack::entries(text) {
            for combination in combinations::of_entry(name, entry) {
                let of = by_combination.entry(combinations::name(combination));
                let entry = combinations::specialise(name, entry, combination);
                of.or_insert_with(|| head.to_owned()).push_str(&entry);
            }
        }
        units.extend(by_combination.into_iter().map(|(combination, text)| Unit {
            module: *module,
            combination,
            text,
        }));
    }
    units
}

/// Finds a tool of the CUDA toolkit: `$PTXAS` (or the tool's name in capitals), the
/// path, then the Python packages that carry it.
///
/// # Errors
/// When it is nowhere; the message says how to get it.
pub fn find_tool(name: &str) -> Result<PathBuf> {
    if let Some(given) = env::var_os(name.to_uppercase()) {
        return Ok(given.into());
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = env::split_paths(&path).collect();
    folders.extend(python_folders());
    folders.into_iter().map(|folder| folder.join(name)).find(|file| file.is_file()).with_context(
        || {
            format!(
                "{name} is neither on the path nor in a Python package; \
                 get it with: pip install nvidia-cuda-nvcc nvidia-cuda-nvdisasm, \
                 or set {} to its path",
                name.to_uppercase()
            )
        },
    )
}

/// Where `nvidia-cuda-nvcc` of CUDA 13 and of CUDA 12 keeps its programs.
fn python_folders() -> Vec<PathBuf> {
    let print = "import site, sysconfig; \
                 print(*{sysconfig.get_path('purelib'), *site.getsitepackages(), \
                 site.getusersitepackages()}, sep='\\n')";
    let Ok(output) = succeed(Command::new("python3").args(["-c", print])) else {
        return Vec::new();
    };
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .flat_map(|site| ["cu13", "cuda_nvcc"].map(|p| Path::new(site).join("nvidia").join(p)))
        .map(|package| package.join("bin"))
        .collect()
}

/// Assembles every text for every architecture that loads its module, into [`cubin`]s in the
/// folder `cubins`, where it also leaves the text.
///
/// # Errors
/// When ptxas is missing or rejects a text.
pub fn assemble(units: &[Unit], cubins: &Path) -> Result<Report> {
    let ptxas = find_tool("ptxas")?;
    fs::create_dir_all(cubins).with_context(|| format!("cannot make {}", cubins.display()))?;
    let mut jobs: Vec<(&Unit, &'static str, PathBuf)> = Vec::new();
    for unit in units {
        let file = cubins.join(format!("{}.{}.ptx", unit.module.name, unit.combination));
        fs::write(&file, &unit.text).with_context(|| format!("cannot write {}", file.display()))?;
        jobs.extend(unit.module.assemble_for.iter().map(|arch| (unit, *arch, file.clone())));
    }
    let workers = thread::available_parallelism().map_or(1, usize::from).min(jobs.len());
    let jobs = Mutex::new(jobs.into_iter());
    let next = || jobs.lock().ok().and_then(|mut jobs| jobs.next());
    let reports: Result<Vec<Report>> = thread::scope(|scope| {
        let work = || -> Result<Report> {
            let mut report = Report::new();
            while let Some((unit, arch, file)) = next() {
                report.insert(
                    (unit.module.name, unit.combination.clone(), arch),
                    assemble_one(&ptxas, arch, &file, &cubin(cubins, unit, arch))?,
                );
            }
            Ok(report)
        };
        let handles: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        handles
            .into_iter()
            .map(|handle| handle.join().map_err(|_| anyhow!("a ptxas thread panicked"))?)
            .collect()
    });
    Ok(reports?.into_iter().flatten().collect())
}

/// Where [`assemble`] leaves a text's machine code for an architecture.
#[must_use]
pub fn cubin(cubins: &Path, unit: &Unit, arch: &str) -> PathBuf {
    cubins.join(format!("{}.{}.{arch}.cubin", unit.module.name, unit.combination))
}

fn assemble_one(ptxas: &Path, arch: &str, file: &Path, cubin: &Path) -> Result<Assembly> {
    let mut command = Command::new(ptxas);
    command.arg(format!("-arch={arch}")).args(["-v", "-o"]);
    command.arg(cubin).arg(file);
    let output = succeed(&mut command).with_context(|| format!("{} for {arch}", file.display()))?;
    let said = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
    Ok(parse(&said))
}

/// Reads what `ptxas -v` says.
#[must_use]
pub fn parse(said: &str) -> Assembly {
    let mut assembly = Assembly::default();
    let mut entry = String::new();
    for line in said.lines() {
        if let Some(name) = quoted(line, "Compiling entry function '") {
            entry = name.to_owned();
            assembly.entries.entry(entry.clone()).or_default();
        } else if let Some(name) = line.split_once("Function properties for ") {
            entry = name.1.trim().to_owned();
        } else if line.contains("(C75") || line.contains("warning") || line.contains("error") {
            let message = line.split_once(": ").map_or(line, |(_, message)| message).trim();
            let named = ["function '", "entry function '", "Function '"]
                .iter()
                .find_map(|before| quoted(line, before))
                .and_then(|name| assembly.entries.get_mut(name));
            named.map_or(&mut assembly.warnings, |usage| &mut usage.warnings).push(message.into());
        } else if let Some(usage) = assembly.entries.get_mut(&entry) {
            for part in line.rsplit(": ").next().unwrap_or("").split(',') {
                usage.take(part.trim().trim_start_matches("Used "));
            }
        }
    }
    assembly
}

fn quoted<'a>(line: &'a str, before: &str) -> Option<&'a str> {
    line.split_once(before)?.1.split('\'').next()
}

impl Usage {
    /// Takes one part of a line: `168 registers`, `0 bytes spill stores`, …
    fn take(&mut self, part: &str) {
        let Some((number, what)) = part.split_once(' ') else { return };
        let Ok(number) = number.parse::<u32>() else {
            // `used 1 barriers` carries a word in front.
            if number == "used" {
                self.take(what);
            }
            return;
        };
        match what {
            "registers" => self.registers = number,
            "barriers" => self.barriers = number,
            "bytes smem" => self.shared_bytes = number,
            "bytes stack frame" | "bytes cumulative stack size" => {
                self.stack_bytes = self.stack_bytes.max(number);
            }
            "bytes spill stores" | "bytes spill loads" => self.spill_bytes += number,
            _ => {}
        }
    }

    /// The faults of an entry that may spill `spills` bytes.
    fn complaints(&self, spills: u32) -> Vec<String> {
        let mut complaints = self.warnings.clone();
        if self.spill_bytes > spills {
            complaints.push(format!("{} bytes spilled", self.spill_bytes));
        }
        if self.stack_bytes > spills {
            complaints.push(format!("{} bytes of stack", self.stack_bytes));
        }
        complaints
    }
}

/// Everything in a report that must not be: empty when all is well.
#[must_use]
pub fn complaints(report: &Report) -> Vec<String> {
    let mut found = Vec::new();
    for ((module, combination, arch), assembly) in report {
        let place = format!("module {module}, {combination}, for {arch}");
        found.extend(assembly.warnings.iter().map(|warning| format!("{place}: {warning}")));
        for (entry, usage) in &assembly.entries {
            let complaints = usage.complaints(combinations::spills(entry, combination));
            found.extend(complaints.iter().map(|what| format!("{place}: {entry}: {what}")));
        }
    }
    found
}

/// Functions with local memory in the PTX, as complaints.
#[must_use]
pub fn local_memory(texts: &[pack::Text]) -> Vec<String> {
    let mut found = Vec::new();
    for (module, text) in texts {
        let mut inside = "";
        for line in text.lines() {
            if let Some((_, name)) = line.split_once(".entry ") {
                inside = name.split('(').next().unwrap_or(name);
            }
            if line.contains(".local ") && line.contains("__local_depot") {
                found.push(format!("module {}: {inside}: local memory: {line}", module.name));
            }
        }
    }
    found
}

/// The report as a table: a row for an entry in a combination, registers on each architecture.
#[must_use]
pub fn table(report: &Report) -> String {
    /// Module, entry and combination; architectures with what they use.
    type Rows<'a> = BTreeMap<[&'a str; 3], Vec<(&'a str, &'a Usage)>>;
    let mut rows = Rows::new();
    for ((module, combination, arch), assembly) in report {
        for (entry, usage) in &assembly.entries {
            rows.entry([module, entry, combination]).or_default().push((arch, usage));
        }
    }
    let width = rows.keys().map(|[_, entry, _]| entry.len()).max().unwrap_or(0).max(5);
    let mut out = format!(
        "{:<8} {:<width$} {:<22} {:>6} {:>6} {:>7} {:>8} {:>8}  registers\n",
        "module", "entry", "constants", "spill", "stack", "shared", "barriers", "warnings"
    );
    for ([module, entry, combination], mut usages) in rows {
        // sm_90 before sm_100.
        usages.sort_by_key(|(arch, _)| (arch.len(), *arch));
        let most = |field: fn(&Usage) -> u32| usages.iter().map(|(_, u)| field(u)).max();
        let cell = |field| most(field).unwrap_or(0);
        let warnings: usize = usages.iter().map(|(_, usage)| usage.warnings.len()).sum();
        let registers: Vec<String> =
            usages.iter().map(|(arch, usage)| format!("{arch} {:>3}", usage.registers)).collect();
        out.push_str(&format!(
            "{module:<8} {entry:<width$} {combination:<22} {:>6} {:>6} {:>7} {:>8} {warnings:>8}  {}\n",
            cell(|usage| usage.spill_bytes),
            cell(|usage| usage.stack_bytes),
            cell(|usage| usage.shared_bytes),
            cell(|usage| usage.barriers),
            registers.join(", ")
        ));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'kern' for 'sm_80'
ptxas info    : Function properties for kern
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 1 barriers, 4096 bytes smem, 464 bytes cmem[0]
ptxas info    : Compile time = 1.0 ms
ptxas info    : Compiling entry function 'big' for 'sm_80'
ptxas warning : Registers are spilled to local memory in function 'big', 8 bytes spill stores
ptxas info    : Function properties for big
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 464 bytes cmem[0]
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized in function 'big'
";

    fn report() -> Report {
        BTreeMap::from([(("sm_80", "causal".to_owned(), "sm_90"), parse(SAID))])
    }

    #[test]
    fn what_ptxas_says_is_read_by_entry() {
        let assembly = parse(SAID);
        let kern = Usage { registers: 12, barriers: 1, shared_bytes: 4096, ..Usage::default() };
        assert_eq!(assembly.entries["kern"], kern);
        let big = &assembly.entries["big"];
        assert_eq!((big.registers, big.spill_bytes, big.stack_bytes), (255, 20, 16));
        assert_eq!(big.warnings.len(), 2, "{:?}", big.warnings);
        assert!(assembly.warnings.is_empty());
    }

    #[test]
    fn spills_stacks_and_advice_are_complaints() {
        let complaints = complaints(&report());
        assert_eq!(complaints.len(), 4, "{complaints:#?}");
        assert!(
            complaints.iter().all(|line| line.contains("module sm_80, causal, for sm_90: big: "))
        );
        assert!(complaints.iter().any(|line| line.ends_with("20 bytes spilled")));
        assert!(complaints.iter().any(|line| line.contains("(C7510)")));
    }

    #[test]
    fn advice_that_names_no_entry_is_kept() {
        let assembly = parse("ptxas info    : (C7508) setmaxnreg ignored; no register count\n");
        assert_eq!(assembly.warnings, ["(C7508) setmaxnreg ignored; no register count"]);
    }

    #[test]
    fn the_table_has_a_row_an_entry() {
        let table = table(&report());
        assert_eq!(table.lines().count(), 3, "{table}");
        assert!(table.contains("sm_90  12"), "{table}");
    }
}
