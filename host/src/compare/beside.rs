//! PyTorch's rows beside the kernels' rows.

use super::{
    measure::Bench,
    stats::{Times, write_sustained},
};
use crate::{
    accuracy::complaint,
    format,
    machine::{DeviceChoice, Opened},
    peers::{Measured, PYTHON, Peers},
    progress::{Progress, print_lines},
    results::{Check, Results, Row, Status},
    subject::row,
};

/// Starts PyTorch with the given backends, or says in one line why PyTorch will have no rows.
pub fn start(opened: &Opened, choice: DeviceChoice, backends: Vec<&'static str>) -> Option<Peers> {
    match Peers::start(opened.info.emulated, choice, backends) {
        Ok(peers) => {
            let version = peers.version();
            let place = if opened.info.emulated {
                "on the CPU, whose times are no measure for the emulator's"
            } else {
                "on the same GPU and tensors"
            };
            let backends = peers.backends().join(", ");
            print_lines(&format!("peers: {backends}, with PyTorch {version}, {place}"));
            Some(peers)
        }
        Err(error) => {
            print_lines(&format!(
                "no rows of PyTorch: {error:#}; {PYTHON} names a Python that has it"
            ));
            None
        }
    }
}

/// Adds PyTorch's rows for one problem. If the process has ended, one message says so, and its rows
/// are missing from then on.
pub fn measure(
    peers: &mut Option<Peers>,
    bench: &Bench<'_>,
    results: &mut Results,
    progress: &Progress,
) {
    let Some(process) = peers else { return };
    let subject = bench.subject;
    progress.doing(format!("N {}, {}: PyTorch", subject.problem().seq_q(), subject.kind().level()));
    let mut backends = process.backends().to_vec();
    if let Some(row) = too_large_for_the_cpu(bench) {
        backends.retain(|&backend| backend != "math");
        results.rows.push(row);
    }
    match process.measure(&backends, subject, bench.repeats) {
        Ok(all) => {
            for measured in all {
                let (row, checks) = finish(bench, measured);
                results.rows.push(row);
                results.checks.extend(checks);
            }
        }
        Err(error) => {
            progress.print(&format!("no further rows of PyTorch: {error:#}"));
            *peers = None;
        }
    }
}

/// The row of the backend that keeps the N x N matrix, where the matrix would not fit this
/// computer's memory: Linux would end the process, and perhaps this one too.
fn too_large_for_the_cpu(bench: &Bench<'_>) -> Option<Row> {
    let subject = bench.subject;
    let (device, problem) = (subject.session().device(), subject.problem());
    let (rows, keys) = (problem.rows() as u64, problem.seq_k() as u64);
    // Scores and weights, each once in f32 and once in the storage type; and their gradients.
    let both = if subject.kind().level().is_backward() { 2 } else { 1 };
    let needed = both * 2 * rows * keys * (4 + problem.dtype().size() as u64);
    let free = device.memory_info().ok()?.free;
    (device.is_emulated() && needed > free).then(|| Row {
        status: Status::Oom,
        reason: format!(
            "needs {}, {} were free: not tried",
            format::bytes(needed as f64),
            format::bytes(free as f64)
        ),
        needed_bytes: Some(needed),
        free_bytes: Some(free),
        ..peer_row(bench, "torch-math")
    })
}

fn peer_row(bench: &Bench<'_>, name: &str) -> Row {
    let subject = bench.subject;
    let mut row = row(subject.session(), subject.kind(), name, subject.problem());
    if row.emulated {
        row.device = "CPU".into();
        row.emulated = false;
    }
    row.flops = subject.flops();
    row.peer = true;
    row
}

fn finish(bench: &Bench<'_>, measured: Measured) -> (Row, Vec<Check>) {
    let subject = bench.subject;
    let mut row = peer_row(bench, &measured.name);
    row.status = measured.status;
    row.reason = measured.reason;
    row.peak_bytes = measured.peak_bytes;
    let own = subject.own_bytes();
    row.workspace_bytes = measured.peak_bytes.map(|peak| peak.saturating_sub(own));
    if let Some(times) = Times::of(&measured.times_ms) {
        times.write_to(&mut row);
        if let Some(ms) = measured.sustained_ms {
            write_sustained(&mut row, ms);
        }
    }
    [row.forward_ms, row.backward_ms] = measured.passes_ms;
    row.forward_peak_bytes = measured.forward_peak_bytes;
    // Another generator drops other weights.
    if subject.problem().dropout().is_some() || measured.outputs.is_empty() {
        return (row, Vec::new());
    }
    let checks = subject.check_outputs(&row.kernel, measured.outputs);
    row.max_abs_err = checks.first().map(|check| check.abs.max);
    if let Some(bad) = checks.iter().find(|check| !check.passed()) {
        row.status = Status::Failed;
        row.reason = complaint(bad);
    }
    (row, checks)
}
