//! An NCCL library for tests: its ranks are threads of one process, and the GPUs' memory is host memory,
//! as the fake driver's. A group of sends and receives returns "in progress", and ends in a thread of its
//! own, so that callers who do not wait are noticed.
//!
//! | variable | meaning | unset |
//! |---|---|---|
//! | `FAKE_NCCL_VERSION` | what `ncclGetVersion` says | 22800 |

#![allow(non_snake_case, reason = "the names are NCCL's")]

use std::{
    cell::RefCell,
    collections::{HashMap, VecDeque},
    ffi::{c_char, c_int, c_void},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI32, AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

const SUCCESS: c_int = 0;
const INVALID_ARGUMENT: c_int = 4;
const INVALID_USAGE: c_int = 5;
const IN_PROGRESS: c_int = 7;

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId([u8; 128]);

/// One rank.
struct Comm {
    world: usize,
    rank: usize,
    ring: Arc<Ring>,
    /// What `ncclCommGetAsyncError` says.
    state: Arc<AtomicI32>,
}

/// Bytes on their way by `(from, to)`.
type Mail = HashMap<(usize, usize), VecDeque<Vec<u8>>>;

/// What the ranks of one id share: bytes on their way by `(from, to)`, and who was aborted.
#[derive(Default)]
struct Ring {
    mail: Mutex<Mail>,
    came: Condvar,
    joined: AtomicU64,
    aborted: AtomicU64,
}

static RINGS: Mutex<Option<HashMap<u64, Arc<Ring>>>> = Mutex::new(None);
static IDS: AtomicU64 = AtomicU64::new(1);

/// A call of a group: rank, is it a send, address, bytes, peer.
type Call = (&'static Comm, bool, usize, usize, usize);

thread_local! {
    static GROUP: RefCell<(u32, Vec<Call>)> = const { RefCell::new((0, Vec::new())) };
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetVersion(version: *mut c_int) -> c_int {
    let given = std::env::var("FAKE_NCCL_VERSION").ok().and_then(|text| text.parse().ok());
    // SAFETY: callers pass a number to write to.
    unsafe { version.write(given.unwrap_or(22_800)) };
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetErrorString(code: c_int) -> *const c_char {
    match code {
        SUCCESS => c"no error",
        INVALID_ARGUMENT => c"invalid argument",
        INVALID_USAGE => c"invalid usage",
        IN_PROGRESS => c"NCCL operation in progress",
        _ => c"remote process exited or there was a network error",
    }
    .as_ptr()
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetUniqueId(id: *mut UniqueId) -> c_int {
    let mut bytes = [0; 128];
    bytes[..8].copy_from_slice(&IDS.fetch_add(1, SeqCst).to_le_bytes());
    // SAFETY: callers pass an id to write to.
    unsafe { id.write(UniqueId(bytes)) };
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommInitRankConfig(
    comm: *mut *mut c_void,
    world: c_int,
    id: UniqueId,
    rank: c_int,
    config: *const c_void,
) -> c_int {
    // SAFETY: callers pass the beginning of an `ncclConfig_t`: its size, a number, its version, and
    // whether calls block.
    let (size, magic, blocking) = unsafe {
        (
            config.cast::<usize>().read(),
            config.cast::<u32>().add(2).read(),
            config.cast::<c_int>().add(4).read(),
        )
    };
    if size < 20 || magic != 0xcafe_beef || blocking != 0 || rank < 0 || rank >= world {
        return INVALID_ARGUMENT;
    }
    let number = u64::from_le_bytes(id.0[..8].try_into().unwrap_or_default());
    let ring = lock(&RINGS).get_or_insert_default().entry(number).or_default().clone();
    let state = Arc::new(AtomicI32::new(IN_PROGRESS));
    let (world, rank) = (world as usize, rank as usize);
    let own = Box::new(Comm { world, rank, ring: ring.clone(), state: state.clone() });
    // SAFETY: callers pass a handle to write to.
    unsafe { comm.write(Box::into_raw(own).cast()) };
    ring.joined.fetch_add(1, SeqCst);
    thread::spawn(move || {
        while ring.joined.load(SeqCst) < world as u64 {
            thread::sleep(Duration::from_millis(1));
        }
        state.store(SUCCESS, SeqCst);
    });
    IN_PROGRESS
}

/// # Safety
/// The handle is that of a live communicator.
unsafe fn of(comm: *mut c_void) -> &'static Comm {
    // SAFETY: made by `ncclCommInitRankConfig`, and never freed.
    unsafe { &*comm.cast::<Comm>() }
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommCount(comm: *mut c_void, count: *mut c_int) -> c_int {
    // SAFETY: callers pass a live communicator and a number to write to.
    unsafe { count.write(of(comm).world as c_int) };
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommUserRank(comm: *mut c_void, rank: *mut c_int) -> c_int {
    // SAFETY: callers pass a live communicator and a number to write to.
    unsafe { rank.write(of(comm).rank as c_int) };
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommGetAsyncError(comm: *mut c_void, state: *mut c_int) -> c_int {
    // SAFETY: callers pass a live communicator and a number to write to.
    unsafe { state.write(of(comm).state.load(SeqCst)) };
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommFinalize(_comm: *mut c_void) -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommDestroy(_comm: *mut c_void) -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclCommAbort(comm: *mut c_void) -> c_int {
    // SAFETY: callers pass a live communicator.
    let ring = unsafe { &of(comm).ring };
    ring.aborted.fetch_add(1, SeqCst);
    ring.came.notify_all();
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclGroupStart() -> c_int {
    GROUP.with_borrow_mut(|group| group.0 += 1);
    SUCCESS
}

fn join(
    comm: *mut c_void,
    sends: bool,
    address: usize,
    bytes: usize,
    kind: c_int,
    peer: c_int,
) -> c_int {
    // SAFETY: callers pass a live communicator.
    let comm = unsafe { of(comm) };
    if comm.state.load(SeqCst) != SUCCESS {
        return INVALID_USAGE;
    }
    if kind > 1 || peer < 0 || peer as usize >= comm.world || address == 0 {
        return INVALID_ARGUMENT;
    }
    GROUP.with_borrow_mut(|(depth, calls)| {
        if *depth == 0 {
            return INVALID_USAGE;
        }
        calls.push((comm, sends, address, bytes, peer as usize));
        SUCCESS
    })
}

#[unsafe(no_mangle)]
extern "C" fn ncclSend(
    from: *const c_void,
    count: usize,
    kind: c_int,
    peer: c_int,
    comm: *mut c_void,
    _stream: *mut c_void,
) -> c_int {
    join(comm, true, from.expose_provenance(), count, kind, peer)
}

#[unsafe(no_mangle)]
extern "C" fn ncclRecv(
    to: *mut c_void,
    count: usize,
    kind: c_int,
    peer: c_int,
    comm: *mut c_void,
    _stream: *mut c_void,
) -> c_int {
    join(comm, false, to.expose_provenance(), count, kind, peer)
}

#[unsafe(no_mangle)]
extern "C" fn ncclGroupEnd() -> c_int {
    let calls = GROUP.with_borrow_mut(|(depth, calls)| {
        *depth -= 1;
        if *depth == 0 { std::mem::take(calls) } else { Vec::new() }
    });
    let Some((comm, ..)) = calls.first().copied() else { return SUCCESS };
    comm.state.store(IN_PROGRESS, SeqCst);
    // What the streams hold has ended: everything of the fake driver has when its call returns.
    for &(_, _, address, bytes, peer) in calls.iter().filter(|call| call.1) {
        let from = std::ptr::with_exposed_provenance::<u8>(address);
        // SAFETY: callers pass memory of that length.
        let data = unsafe { std::slice::from_raw_parts(from, bytes) }.to_vec();
        lock(&comm.ring.mail).entry((comm.rank, peer)).or_default().push_back(data);
        comm.ring.came.notify_all();
    }
    thread::spawn(move || {
        for (_, _, address, bytes, peer) in calls.into_iter().filter(|call| !call.1) {
            let mut mail = lock(&comm.ring.mail);
            let data = loop {
                if let Some(data) = mail.entry((peer, comm.rank)).or_default().pop_front() {
                    break data;
                }
                if comm.ring.aborted.load(SeqCst) > 0 {
                    comm.state.store(6, SeqCst);
                    return;
                }
                mail = comm
                    .ring
                    .came
                    .wait_timeout(mail, Duration::from_millis(20))
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
            };
            drop(mail);
            let to = std::ptr::with_exposed_provenance_mut::<u8>(address);
            // SAFETY: callers pass memory of that length, live until the group has ended.
            unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to, bytes.min(data.len())) };
        }
        comm.state.store(SUCCESS, SeqCst);
    });
    IN_PROGRESS
}
