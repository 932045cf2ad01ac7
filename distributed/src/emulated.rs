//! Ranks as threads on the CPU, each with an emulator: whole tensors in, whole tensors out.

use std::time::Duration;

use flash_attention::{CpuDevice, Tensor};

use crate::{
    Error,
    communicator::{Communicator, ThreadCommunicator},
    engine::CpuEngine,
    whole::{Run, Setup, all, on_threads, run_rank},
};

/// Runs attention once, with its gradients if that of O is given.
///
/// # Errors
/// A tensor of another shape; what went wrong on a rank.
pub fn run(setup: &Setup, qkv: [&Tensor; 3], d_o: Option<&Tensor>) -> Result<Run, Error> {
    let share = &setup.share;
    let ranks = on_ranks(share.grid().ranks(), setup.limit, |engine, communicator| {
        run_rank(setup, qkv, d_o, (engine, engine.memory()), communicator)
    });
    let ranks = all(ranks)?;
    Ok(Run::join(share, &ranks))
}

/// Runs something on every rank, each a thread with an emulator; what each returned, by rank. A rank that
/// fails tells the others.
pub fn on_ranks<T: Send>(
    ranks: usize,
    limit: Duration,
    work: impl Fn(&CpuEngine, &ThreadCommunicator<CpuEngine>) -> Result<T, Error> + Sync,
) -> Vec<Result<T, Error>> {
    on_threads(ThreadCommunicator::ranks(ranks, limit), |communicator| {
        let engine = CpuEngine::new(CpuDevice::new());
        work(&engine, &communicator).inspect_err(|error| {
            Communicator::<CpuEngine>::peers(&communicator).give_up(&error.to_string());
        })
    })
}
