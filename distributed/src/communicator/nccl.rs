//! Ranks with a GPU each, which exchange memory through NCCL.

use std::{
    cell::Cell,
    ffi::{c_int, c_void},
    fmt,
    path::Path,
    ptr,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Communicator, Direction, Transfer};
use crate::{
    engine::GpuEngine,
    error::Error,
    nccl::{BYTES, Code, Comm, Config, IN_PROGRESS, Nccl, SUCCESS, UniqueId},
    peers::Peers,
};

/// Between two looks at a call that goes on.
const LOOK: Duration = Duration::from_micros(20);

/// A rank with a GPU.
pub struct NcclCommunicator {
    nccl: Arc<Nccl>,
    peers: Peers,
    comm: Cell<Comm>,
    /// Whether it was made here.
    owned: bool,
}

// SAFETY: the handle is a pointer that only NCCL follows, which lets one thread at a time use it, whichever.
unsafe impl Send for NcclCommunicator {}

impl fmt::Debug for NcclCommunicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NcclCommunicator")
            .field("nccl", &self.nccl)
            .field("peers", &self.peers)
            .finish_non_exhaustive()
    }
}

impl NcclCommunicator {
    /// Joins the ranks of `peers`, all of which call it, each with the engine of another GPU. The
    /// unique id goes through `peers`.
    ///
    /// # Errors
    /// [`Error::Nccl`] with NCCL's reason; [`Error::Lost`] or [`Error::Late`] names a rank that does not
    /// come.
    pub fn new(nccl: Arc<Nccl>, peers: Peers, engine: &GpuEngine) -> Result<Self, Error> {
        let mut own = Vec::new();
        if peers.rank() == 0 {
            own = unique_id(&nccl)?.0.to_vec();
        }
        let all = peers.gather(&own)?;
        let id = <[u8; 128]>::try_from(&all[0][..]).map_err(|_| Error::Differs {
            rank: 0,
            what: "the length of the unique id".into(),
            theirs: all[0].len().to_string(),
            ours: "128".into(),
        })?;
        Self::of_id(nccl, peers, UniqueId(id), engine)
    }

    /// As [`NcclCommunicator::new`], with the unique id in a file: rank 0 writes it, the others wait for
    /// it. The file must not be there before; rank 0 removes it when all have joined.
    ///
    /// # Errors
    /// [`Error::Connection`] for a file that cannot be written or is there already; as
    /// [`NcclCommunicator::new`].
    pub fn by_file(
        nccl: Arc<Nccl>,
        peers: Peers,
        path: &Path,
        engine: &GpuEngine,
    ) -> Result<Self, Error> {
        let failed = |source| Error::Connection { what: path.display().to_string(), source };
        let is_first = peers.rank() == 0;
        let id = if is_first {
            let id = unique_id(&nccl)?;
            // Others must not read half of it.
            let part = path.with_extension("part");
            std::fs::write(&part, id.0).map_err(failed)?;
            std::fs::hard_link(&part, path).map_err(failed)?;
            std::fs::remove_file(&part).map_err(failed)?;
            id
        } else {
            let begin = Instant::now();
            loop {
                if let Ok(bytes) = std::fs::read(path)
                    && let Ok(id) = <[u8; 128]>::try_from(&bytes[..])
                {
                    break UniqueId(id);
                }
                peers.check_rank(0)?;
                if begin.elapsed() > peers.limit() {
                    let at = path.display().to_string();
                    return Err(Error::Late { ranks: vec![0], at, limit: peers.limit() });
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        let joined = Self::of_id(nccl, peers, id, engine);
        if is_first {
            std::fs::remove_file(path).map_err(failed)?;
        }
        joined
    }

    fn of_id(
        nccl: Arc<Nccl>,
        peers: Peers,
        id: UniqueId,
        engine: &GpuEngine,
    ) -> Result<Self, Error> {
        let this = Self { nccl, peers, comm: Cell::new(ptr::null_mut()), owned: true };
        let (world, rank) = (this.peers.world() as c_int, this.peers.rank() as c_int);
        let mut comm: Comm = ptr::null_mut();
        let mut config = Config::NON_BLOCKING;
        let code = engine.call(|| {
            // SAFETY: the pointers lead to values of these types; the context is current.
            Ok(unsafe {
                (this.nccl.functions.init_rank)(&raw mut comm, world, id, rank, &raw mut config)
            })
        })?;
        this.comm.set(comm);
        this.settled("ncclCommInitRankConfig", code)?;
        Ok(this)
    }

    /// The ranks of a caller's communicator, an `ncclComm_t`; `peers` has the same ranks.
    ///
    /// # Errors
    /// [`Error::Invalid`] when NCCL says that it has another rank or number of ranks.
    ///
    /// # Safety
    /// `comm` is a communicator of the library `nccl`, which nobody else uses while this value does,
    /// and lives as long.
    pub unsafe fn of_existing(nccl: Arc<Nccl>, peers: Peers, comm: Comm) -> Result<Self, Error> {
        let this = Self { nccl, peers, comm: Cell::new(comm), owned: false };
        let (mut world, mut rank) = (0, 0);
        // SAFETY: the communicator is live; the pointers lead to numbers.
        unsafe {
            let code = (this.nccl.functions.count)(comm, &raw mut world);
            this.settled("ncclCommCount", code)?;
            let code = (this.nccl.functions.user_rank)(comm, &raw mut rank);
            this.settled("ncclCommUserRank", code)?;
        }
        for (what, given, theirs) in [
            ("ranks of the communicator", world, this.peers.world()),
            ("rank of the communicator", rank, this.peers.rank()),
        ] {
            if given as usize != theirs {
                let remedy = format!("the line to the other ranks has {theirs}");
                return Err(Error::Invalid { what, given: given.to_string(), remedy });
            }
        }
        Ok(this)
    }

    /// Waits until a call has ended, which it need not have when it returns.
    fn settled(&self, call: &'static str, mut code: Code) -> Result<(), Error> {
        let begin = Instant::now();
        while code == IN_PROGRESS {
            self.peers.check()?;
            if begin.elapsed() > self.peers.limit() {
                return Err(self.peers.late());
            }
            std::thread::sleep(LOOK);
            code = self.state()?;
        }
        self.succeeded(call, code)
    }

    /// How the communicator is.
    fn state(&self) -> Result<Code, Error> {
        if self.comm.get().is_null() {
            let reason = "gave up before: its communicator was aborted".into();
            return Err(Error::Lost { rank: self.peers.rank(), reason });
        }
        let mut state = SUCCESS;
        // SAFETY: the communicator is live; the pointer leads to a number.
        let code = unsafe { (self.nccl.functions.async_error)(self.comm.get(), &raw mut state) };
        self.succeeded("ncclCommGetAsyncError", code)?;
        Ok(state)
    }

    fn succeeded(&self, call: &'static str, code: Code) -> Result<(), Error> {
        if code == SUCCESS {
            return Ok(());
        }
        // A rank that is lost says more than NCCL's "remote error".
        self.peers.check()?;
        Err(Error::Nccl { call, message: self.nccl.text(code) })
    }
}

impl Communicator<GpuEngine> for NcclCommunicator {
    fn peers(&self) -> &Peers {
        &self.peers
    }

    unsafe fn exchange(&self, engine: &GpuEngine, transfers: &[Transfer]) -> Result<(), Error> {
        self.peers.reach();
        if transfers.is_empty() {
            return Ok(());
        }
        // It must have passed what came before.
        let before = self.state()?;
        self.settled("ncclGroupEnd", before)?;
        let (functions, comm, stream) =
            (&self.nccl.functions, self.comm.get(), engine.communication());
        let group = || {
            // SAFETY: the communicator and the stream are live, the context is current, and the regions
            // are the caller's.
            unsafe {
                let mut first = ("ncclGroupStart", (functions.group_start)());
                for &Transfer { peer, region, direction } in transfers {
                    let (bytes, peer) = (region.bytes as usize, peer as c_int);
                    let address =
                        ptr::with_exposed_provenance_mut::<c_void>(region.address as usize);
                    let code = match direction {
                        Direction::Send => {
                            let send = functions.send;
                            ("ncclSend", send(address, bytes, BYTES, peer, comm, stream))
                        }
                        Direction::Receive => {
                            let receive = functions.receive;
                            ("ncclRecv", receive(address, bytes, BYTES, peer, comm, stream))
                        }
                    };
                    if matches!(first.1, SUCCESS | IN_PROGRESS) {
                        first = code;
                    }
                }
                // Ended in any case: NCCL counts the beginnings.
                let end = ("ncclGroupEnd", (functions.group_end)());
                if matches!(first.1, SUCCESS | IN_PROGRESS) { end } else { first }
            }
        };
        let (call, code) = engine.call(|| Ok(group()))?;
        self.settled(call, code)
    }

    fn check(&self) -> Result<(), Error> {
        self.peers.check()?;
        match self.state()? {
            IN_PROGRESS => Ok(()),
            code => self.succeeded("a transfer", code),
        }
    }

    fn check_done(&self) -> Result<(), Error> {
        self.check()
    }

    fn abort(&self) {
        let comm = self.comm.replace(ptr::null_mut());
        if !comm.is_null() {
            // SAFETY: the communicator is live, and nothing knows it any more.
            _ = unsafe { (self.nccl.functions.abort)(comm) };
        }
    }
}

impl Drop for NcclCommunicator {
    fn drop(&mut self) {
        let comm = self.comm.get();
        if comm.is_null() || !self.owned {
            return;
        }
        // SAFETY: the communicator is live.
        let code = unsafe { (self.nccl.functions.finalize)(comm) };
        if self.settled("ncclCommFinalize", code).is_ok() {
            self.comm.set(ptr::null_mut());
            // SAFETY: as above, and nothing knows it any more.
            _ = unsafe { (self.nccl.functions.destroy)(comm) };
        } else {
            self.abort();
        }
    }
}

fn unique_id(nccl: &Nccl) -> Result<UniqueId, Error> {
    let mut id = UniqueId([0; 128]);
    // SAFETY: the pointer leads to a value of that type.
    let code = unsafe { (nccl.functions.unique_id)(&raw mut id) };
    if code == SUCCESS {
        return Ok(id);
    }
    Err(Error::Nccl { call: "ncclGetUniqueId", message: nccl.text(code) })
}
