//! What ranks say of one that dies, stands still, or was called with something else.

use std::{
    thread,
    time::{Duration, Instant},
};

use flash_attention::{DType, Problem, raw::Region};
use flash_attention_distributed::{
    Attention, Error, Grid, Share,
    attention::ForwardTensors,
    communicator::{Communicator, ThreadCommunicator},
    emulated::on_ranks,
    engine::{CpuEngine, Engine},
    peers::Peers,
};

const LIMIT: Duration = Duration::from_secs(30);

fn peers(communicator: &ThreadCommunicator<CpuEngine>) -> &Peers {
    Communicator::<CpuEngine>::peers(communicator)
}

fn problem(n: usize) -> Problem {
    Problem::builder(1, 2, n, 32).dtype(DType::F16).causal(true).build().unwrap()
}

/// Runs forward passes on three ranks that divide the context; `before` is called before each.
fn passes(
    limit: Duration,
    before: impl Fn(&Peers, usize) -> Result<(), Error> + Sync,
) -> Vec<Result<(), Error>> {
    let share = Share::new(problem(48), Grid::of_context(3)).unwrap();
    on_ranks(3, limit, |engine, communicator| {
        let rank = peers(communicator).rank();
        let attention = Attention::new(&share, rank, &engine.target())?;
        let memory = engine.memory();
        let zeros = |bytes| memory.filled(bytes, 0);
        let [n, m] = attention.local_rows().map(|rows| (2 * rows * 32 * 2) as u64);
        let (q, k, v, o) = (zeros(n)?, zeros(m)?, zeros(m)?, zeros(n)?);
        let (lse, workspace) = (zeros(n)?, zeros(attention.workspace_bytes())?);
        let tensors = ForwardTensors {
            q: q.region(),
            k: k.region(),
            v: v.region(),
            o: o.region(),
            lse: lse.region(),
        };
        // SAFETY: the buffers are live until the end, where the device has done its work.
        unsafe {
            attention.prepare(engine, communicator, workspace.region())?;
            for pass in 0..3 {
                before(peers(communicator), pass)?;
                attention.forward(engine, communicator, &tensors, workspace.region())?;
            }
        }
        communicator.finish(engine)
    })
}

#[test]
fn a_rank_that_panics_is_named_at_once() {
    let begin = Instant::now();
    let ended = passes(LIMIT, |peers, pass| {
        assert!((peers.rank(), pass) != (1, 2), "on purpose");
        Ok(())
    });
    for rank in [0, 2] {
        let error = ended[rank].as_ref().unwrap_err().to_string();
        let first = error == "rank 1 is lost: it panicked";
        // The other may have said first why it gave up.
        let other = error.ends_with("gave up: rank 1 is lost: it panicked");
        assert!(first || other, "{error}");
    }
    assert!(begin.elapsed() < LIMIT / 2);
}

#[test]
fn a_rank_that_fails_is_named_with_its_reason() {
    let ended = passes(LIMIT, |peers, pass| {
        if (peers.rank(), pass) == (2, 1) {
            return Err(flash_attention::Error::Stopped.into());
        }
        Ok(())
    });
    for rank in [0, 1] {
        let error = ended[rank].as_ref().unwrap_err().to_string();
        assert!(error.contains("gave up: the launch was stopped on request"), "{error}");
    }
    assert!(matches!(ended[2], Err(Error::Attention(flash_attention::Error::Stopped))));
}

#[test]
fn a_rank_that_stands_still_is_named_after_the_limit() {
    let limit = Duration::from_secs(4);
    let begin = Instant::now();
    let ended = passes(limit, |peers, pass| {
        if (peers.rank(), pass) == (1, 1) {
            // Until another rank has given up, on a busy machine later than the limit.
            while peers.check().is_ok() && begin.elapsed() < LIMIT {
                thread::sleep(limit / 100);
            }
        }
        Ok(())
    });
    let errors: Vec<_> = [0, 2].map(|rank| ended[rank].as_ref().unwrap_err().to_string()).to_vec();
    let named = errors.iter().filter(|e| e.starts_with("rank 1 did not come to exchange")).count();
    assert!(named >= 1, "{errors:?}");
    assert!(errors.iter().all(|e| e.contains("rank 1 did not come to exchange")), "{errors:?}");
    assert!(begin.elapsed() < LIMIT);
}

/// Found before anything is sent, and by every rank.
#[test]
fn other_shapes_are_named() {
    let ended = on_ranks(2, LIMIT, |engine, communicator| {
        let rank = peers(communicator).rank();
        let share = Share::new(problem([64, 66][rank]), Grid::of_context(2))?;
        let attention = Attention::new(&share, rank, &engine.target())?;
        // SAFETY: nothing is written before the ranks agree.
        let done = unsafe { attention.prepare(engine, communicator, Region::default()) };
        assert_eq!(peers(communicator).reached(), 0, "nothing was exchanged");
        done
    });
    let texts: Vec<_> = ended.iter().map(|end| end.as_ref().unwrap_err().to_string()).collect();
    assert_eq!(
        texts,
        [
            "rank 1 was called with rows = 66, this rank with 64: all need the same",
            "rank 0 was called with rows = 64, this rank with 66: all need the same",
        ]
    );
}
