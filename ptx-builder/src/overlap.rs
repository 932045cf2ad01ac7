//! Whether the threads' work runs beside products, in the machine code.
//!
//! A wgmma kernel starts two products, waits for the first (all but one of its groups), works on its
//! result, and waits for the second. The work is the softmax's exponentials; in the backward pass also
//! the packing of dS, and dQ's way to memory. ptxas may move a wait up to the beginning of its basic
//! block, before the work: right, but slower, and it says nothing. So the work between such a pair of
//! waits is counted.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::compile::succeed;
use crate::ptxas::find_tool;

/// Instructions of which the work between two waits has at least one.
const WORK: [&str; 4] = ["MUFU.EX2", "F2FP", "REDG", "STS.128"];

/// Pairs of waits without work between them in the machine code of `cubin`, as
/// complaints.
///
/// # Errors
/// When nvdisasm is missing or cannot read the file.
pub fn complaints(cubin: &Path) -> Result<Vec<String>> {
    let output = succeed(Command::new(find_tool("nvdisasm")?).arg("-c").arg(cubin))
        .with_context(|| format!("cannot disassemble {}", cubin.display()))?;
    Ok(bare_waits(&String::from_utf8_lossy(&output.stdout)))
}

/// The same, of machine code as nvdisasm prints it.
fn bare_waits(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut entry = "";
    // Instructions of the work since the last wait for all but one group.
    let mut work = None;
    for line in code.lines() {
        if let Some(name) = line.strip_prefix(".text.").and_then(|l| l.strip_suffix(':')) {
            (entry, work) = (name, None);
        } else if line.contains("    BRA ") {
            // What follows comes from elsewhere.
            work = None;
        } else if line.contains("WARPGROUP.DEPBAR.LE gsb0, 0x1") {
            work = Some(0);
        } else if WORK.iter().any(|name| line.contains(name)) {
            work = work.map(|count: u32| count + 1);
        } else if line.contains("WARPGROUP.DEPBAR.LE gsb0, 0x0") && work.take() == Some(0) {
            found.push(format!("{entry}: waits for all products before the work beside them"));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::bare_waits;

    const FIRST: &str = "        /*0010*/   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;\n";
    const ALL: &str = "        /*0030*/   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n";
    const EXPONENTIAL: &str = "        /*0020*/   MUFU.EX2 R1, R2 ;\n";

    #[test]
    fn a_wait_that_comes_too_early_is_found() {
        let good = format!(".text.good:\n{FIRST}{EXPONENTIAL}{ALL}{ALL}");
        let elsewhere = format!("{FIRST}        /*0020*/                   BRA `(.L_x_1) ;\n{ALL}");
        let good = good + &elsewhere;
        let bad = format!(".text.bad:\n{FIRST}{ALL}{EXPONENTIAL}");
        assert_eq!(bare_waits(&good), [""; 0]);
        let found = bare_waits(&(good + &bad));
        assert!(found.len() == 1 && found[0].starts_with("bad: "), "{found:?}");
    }
}
