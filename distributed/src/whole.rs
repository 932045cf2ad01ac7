//! A rank's work from whole tensors on the host to the rows that it holds, on any device: for tests, and
//! for programs that do it once.

use std::{ops::Range, sync::Arc, thread, time::Duration};

use flash_attention::{
    DType, Problem, Tensor,
    backend::{DeviceBuffer, Memory},
    problem::Layout,
};

use crate::{
    Attention, Error, Grid, Share,
    attention::{BackwardTensors, ForwardTensors, Options},
    communicator::Communicator,
    engine::Engine,
    measure::{Pass, Times},
    peers::TIME_LIMIT,
};

/// The work of the ranks.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The problem and its ranks.
    pub share: Share,
    /// The kernels.
    pub options: Options,
    /// The time limit for a rank that keeps the others waiting.
    pub limit: Duration,
    /// The number of timed runs of each pass afterwards; 0 means none.
    pub timed_runs: usize,
}

impl Setup {
    /// A problem over the ranks of a grid, with the best kernels.
    ///
    /// # Errors
    /// As [`Share::new`].
    pub fn new(problem: Problem, grid: Grid) -> Result<Self, Error> {
        Ok(Self::of(Share::new(problem, grid)?))
    }

    /// A problem that is shared already.
    #[must_use]
    pub fn of(share: Share) -> Self {
        Self { share, options: Options::default(), limit: TIME_LIMIT, timed_runs: 0 }
    }
}

/// The rows of one rank after a run.
#[derive(Clone, Debug)]
pub struct Rows {
    /// Output.
    pub o: Tensor,
    /// Log-sum-exp.
    pub lse: Tensor,
    /// Gradients of Q, K and V, where that of O was given.
    pub gradients: Option<[Tensor; 3]>,
    /// The most device memory at once, in bytes.
    pub peak_bytes: u64,
    /// Bytes sent to other ranks, in the forward pass and in the backward pass.
    pub bytes_sent: [u64; 2],
    /// Times of both passes, where they were asked for.
    pub times: [Option<Times>; 2],
}

/// The results.
#[derive(Clone, Debug)]
pub struct Run {
    /// Output, of the whole problem's `o_shape`.
    pub o: Tensor,
    /// Log-sum-exp, of its `lse_shape`.
    pub lse: Tensor,
    /// Gradients of Q, K and V, where that of O was given.
    pub gradients: Option<[Tensor; 3]>,
    /// The most device memory of each rank at once, in bytes.
    pub peak_bytes: Vec<u64>,
    /// Bytes that each rank sent to others, in the forward pass and in the backward pass.
    pub bytes_sent: Vec<[u64; 2]>,
    /// Times of both passes on the slowest rank, where they were asked for.
    pub times: [Option<Times>; 2],
}

impl Run {
    /// The whole results, from all ranks' rows, by rank.
    #[must_use]
    pub fn join(share: &Share, ranks: &[Rows]) -> Self {
        let p = share.problem();
        let mut o = Tensor::zeros(p.dtype(), &p.o_shape());
        let mut lse = Tensor::zeros(DType::F32, &p.lse_shape());
        let zeros = |shape: [usize; 4]| Tensor::zeros(p.dtype(), &shape);
        let has_gradients = ranks.iter().all(|of| of.gradients.is_some());
        let mut gradients =
            has_gradients.then(|| [p.q_shape(), p.k_shape(), p.v_shape()].map(zeros));
        for (rank, of) in ranks.iter().enumerate() {
            let [q_rows, k_rows] = [share.q_rows(rank), share.k_rows(rank)];
            give_rows(&mut o, &of.o, &q_rows, share.tokens_first());
            give_rows(&mut lse, &of.lse, &q_rows, false);
            if let (Some(whole), Some(parts)) = (&mut gradients, &of.gradients) {
                for ((whole, part), rows) in
                    whole.iter_mut().zip(parts).zip([&q_rows, &k_rows, &k_rows])
                {
                    give_rows(whole, part, rows, share.tokens_first());
                }
            }
        }
        let peak_bytes = ranks.iter().map(|of| of.peak_bytes).collect();
        let bytes_sent = ranks.iter().map(|of| of.bytes_sent).collect();
        let times = ranks.first().map_or([None; 2], |of| of.times);
        Self { o, lse, gradients, peak_bytes, bytes_sent, times }
    }
}

/// Runs attention of whole tensors on one rank of several, with its gradients if that of O is given.
///
/// # Errors
/// A tensor of another shape; what went wrong on this rank or another.
pub fn run_rank<E: Engine, C: Communicator<E>>(
    setup: &Setup,
    qkv: [&Tensor; 3],
    d_o: Option<&Tensor>,
    (engine, memory): (&E, &Arc<Memory>),
    communicator: &C,
) -> Result<Rows, Error> {
    let p = setup.share.problem();
    for ((what, tensor), shape) in
        ["q", "k", "v"].into_iter().zip(qkv).zip([p.q_shape(), p.k_shape(), p.v_shape()])
    {
        tensor.expect(what, p.dtype(), &shape)?;
    }
    if let Some(d_o) = d_o {
        d_o.expect("d_o", p.dtype(), &p.o_shape())?;
    }
    let (share, rank) = (&setup.share, communicator.peers().rank());
    let mut attention = Attention::with(share, rank, &engine.target(), setup.options)?;
    if d_o.is_some() {
        attention = attention.with_backward()?;
    }
    let (q_rows, k_rows) = (share.q_rows(rank), share.k_rows(rank));
    let [n, m] = attention.local_rows();
    let upload = |tensor: &Tensor, rows: &[Range<usize>]| {
        memory.upload(&take_rows(tensor, rows, share.tokens_first()))
    };
    let [q, k, v] = qkv;
    let inputs = [upload(q, &q_rows)?, upload(k, &k_rows)?, upload(v, &k_rows)?];
    // All bits set is NaN: an element that nobody wrote shows.
    let poisoned = |bytes: u64| memory.filled(bytes, 0xff);
    let zeros =
        |heads, rows, columns| Tensor::zeros(p.dtype(), &share.local_shape(heads, rows, columns));
    let mut o = zeros(p.heads(), n, p.head_dim_v());
    let mut lse = Tensor::zeros(DType::F32, &[share.batch(), p.heads(), n]);
    let bytes = |tensor: &Tensor| tensor.as_bytes().len() as u64;
    let (o_buffer, lse_buffer) = (poisoned(bytes(&o))?, poisoned(bytes(&lse))?);
    let workspace = poisoned(attention.workspace_bytes())?;
    let region = DeviceBuffer::region;
    let tensors = ForwardTensors {
        q: region(&inputs[0]),
        k: region(&inputs[1]),
        v: region(&inputs[2]),
        o: o_buffer.region(),
        lse: lse_buffer.region(),
    };
    // The engine has streams of its own.
    memory.device().synchronize()?;
    // SAFETY: the buffers are live until the device has done its work or given up; nothing else uses
    // them.
    let done = unsafe {
        attention
            .prepare(engine, communicator, workspace.region())
            .and_then(|()| attention.forward(engine, communicator, &tensors, workspace.region()))
    };
    done_or_given_up(done, engine, communicator)?;
    o_buffer.read(o.as_bytes_mut())?;
    lse_buffer.read(lse.as_bytes_mut())?;
    let mut bytes_sent = [attention.forward_bytes_sent(), 0];
    let (mut gradients, mut times) = (None, [None; 2]);
    if let Some(d_o) = d_o {
        let d_o = upload(d_o, &q_rows)?;
        let mut host = [
            zeros(p.heads(), n, p.head_dim()),
            zeros(p.kv_heads(), m, p.head_dim()),
            zeros(p.kv_heads(), m, p.head_dim_v()),
        ];
        let buffers =
            [poisoned(bytes(&host[0]))?, poisoned(bytes(&host[1]))?, poisoned(bytes(&host[2]))?];
        let tensors = BackwardTensors {
            forward: tensors,
            d_o: d_o.region(),
            dq: buffers[0].region(),
            dk: buffers[1].region(),
            dv: buffers[2].region(),
        };
        memory.device().synchronize()?;
        // SAFETY: as above.
        let done =
            unsafe { attention.backward(engine, communicator, &tensors, workspace.region()) };
        done_or_given_up(done, engine, communicator)?;
        for (host, buffer) in host.iter_mut().zip(&buffers) {
            buffer.read(host.as_bytes_mut())?;
        }
        bytes_sent[1] = attention.backward_bytes_sent();
        gradients = Some(host);
        if setup.timed_runs > 0 {
            let (pass, workspace) = (Pass::Backward(&tensors), workspace.region());
            // SAFETY: as above.
            let done = unsafe {
                pass.times(&attention, engine, communicator, workspace, setup.timed_runs)
            };
            times[1] = Some(done_or_given_up(done, engine, communicator)?);
        }
    }
    if setup.timed_runs > 0 {
        let (pass, workspace) = (Pass::Forward(&tensors), workspace.region());
        // SAFETY: as above.
        let done =
            unsafe { pass.times(&attention, engine, communicator, workspace, setup.timed_runs) };
        times[0] = Some(done_or_given_up(done, engine, communicator)?);
    }
    Ok(Rows { o, lse, gradients, peak_bytes: memory.peak(), bytes_sent, times })
}

/// Runs `work` on every rank, each a thread; the results by rank. A thread that panics is a lost rank.
pub fn on_threads<R: Send, T: Send>(
    ranks: impl IntoIterator<Item = R>,
    work: impl Fn(R) -> Result<T, Error> + Sync,
) -> Vec<Result<T, Error>> {
    let work = &work;
    thread::scope(|scope| {
        let handles: Vec<_> =
            ranks.into_iter().map(|rank| scope.spawn(move || work(rank))).collect();
        let ended = |(rank, handle): (usize, thread::ScopedJoinHandle<'_, _>)| {
            let lost = |_| Err(Error::Lost { rank, reason: "panicked".into() });
            handle.join().unwrap_or_else(lost)
        };
        handles.into_iter().enumerate().map(ended).collect()
    })
}

/// The results of all ranks, or the error that came first: not one that says that another rank is lost, if any
/// else says more.
///
/// # Errors
/// That error.
pub fn all<T>(ranks: Vec<Result<T, Error>>) -> Result<Vec<T>, Error> {
    let (mut values, mut first): (Vec<T>, Option<Error>) = (Vec::new(), None);
    for rank in ranks {
        match rank {
            Ok(value) => values.push(value),
            Err(error) => {
                let says_more = !matches!(error, Error::Lost { .. });
                if first.is_none() || says_more && matches!(first, Some(Error::Lost { .. })) {
                    first = Some(error);
                }
            }
        }
    }
    first.map_or(Ok(values), Err)
}

/// Waits for started work; after an error, aborts it.
fn done_or_given_up<E: Engine, C: Communicator<E>, T>(
    done: Result<T, Error>,
    engine: &E,
    communicator: &C,
) -> Result<T, Error> {
    match done {
        Ok(value) => communicator.finish(engine).map(|()| value),
        Err(error) => {
            communicator.peers().give_up(&error.to_string());
            communicator.abort();
            // Transfers have ended; kernels do so by themselves.
            while matches!(engine.is_idle(), Ok(false)) {
                thread::sleep(Duration::from_millis(1));
            }
            Err(error)
        }
    }
}

/// Where runs of rows of a tensor lie, `(in the tensor, in the rows that were taken)`, in bytes.
fn places(
    shape: &[usize],
    size: usize,
    rows: &[Range<usize>],
    tokens_first: bool,
) -> Vec<(Range<usize>, usize)> {
    let columns = shape.get(3).copied().unwrap_or(1);
    let layout = if tokens_first { Layout::TokensFirst } else { Layout::HeadsFirst };
    // Tokens are dimension 1 or 2; what follows them is a row.
    let [outer, n, row] = match layout {
        Layout::TokensFirst => [shape[0], shape[1], shape[2] * columns],
        Layout::HeadsFirst => [shape[0] * shape[1], shape[2], columns],
    };
    let (row, own) = (row * size, rows.iter().map(Range::len).sum::<usize>());
    let mut places = Vec::new();
    for matrix in 0..outer {
        let mut at = matrix * own;
        for run in rows {
            let whole = (matrix * n + run.start) * row..(matrix * n + run.end) * row;
            places.push((whole, at * row));
            at += run.len();
        }
    }
    places
}

pub(crate) fn take_rows(tensor: &Tensor, rows: &[Range<usize>], tokens_first: bool) -> Vec<u8> {
    let places = places(tensor.shape(), tensor.dtype().size(), rows, tokens_first);
    places.into_iter().flat_map(|(whole, _)| tensor.as_bytes()[whole].iter().copied()).collect()
}

pub(crate) fn give_rows(
    whole: &mut Tensor,
    part: &Tensor,
    rows: &[Range<usize>],
    tokens_first: bool,
) {
    for (to, from) in places(whole.shape(), whole.dtype().size(), rows, tokens_first) {
        let from = from..from + to.len();
        whole.as_bytes_mut()[to].copy_from_slice(&part.as_bytes()[from]);
    }
}
