//! Draws TFLOP/s over sequence length from the rows of a run, for the README:
//!
//! ```sh
//! cargo run -p host --example speed_picture -- benches/record/2026-11-27-h100.csv 128 causal docs/img/speed.svg
//! ```

use std::{env, fs};

use anyhow::{Context as _, Result, bail};
use host::report::speed::{Shown, picture};

fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [record, head_dim, mask @ ("full" | "causal"), to] =
        &arguments.iter().map(String::as_str).collect::<Vec<_>>()[..]
    else {
        bail!("usage: speed RECORD.csv HEAD_DIM full|causal PICTURE.svg");
    };
    let csv = fs::read_to_string(record).with_context(|| format!("cannot read {record}"))?;
    let shown = Shown { head_dim: head_dim.parse()?, causal: *mask == "causal" };
    fs::write(to, picture(&csv, shown)?).with_context(|| format!("cannot write {to}"))
}
