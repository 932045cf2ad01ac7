//! The same work on GPUs without a GPU: on the fake driver and a fake NCCL, whose ranks are threads. Both
//! are strict where the real ones are.

use std::{
    env,
    ffi::c_void,
    path::PathBuf,
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use flash_attention::{DType, GpuDevice, Problem, Tensor, backend::Memory, registry};
use flash_attention_distributed::{
    Attention, Grid,
    attention::Options,
    communicator::{Communicator, NcclCommunicator, ThreadCommunicator},
    emulated,
    engine::{Engine, GpuEngine},
    nccl::Nccl,
    peers::Peers,
    whole::{Rows, Setup, run_rank},
};

const LIMIT: Duration = Duration::from_secs(60);

/// Where cargo puts a library of a dev-dependency: beside this test.
fn library(name: &str) -> PathBuf {
    let test = env::current_exe().unwrap();
    let name = format!("{}{name}{}", env::consts::DLL_PREFIX, env::consts::DLL_SUFFIX);
    let path = test.parent().unwrap().join(name);
    assert!(path.is_file(), "{} is missing: run this test through cargo", path.display());
    path
}

/// The fake driver, for one test at a time.
fn driver() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    static OPEN: LazyLock<()> = LazyLock::new(|| {
        // SAFETY: no other thread of this process reads the environment before the driver is open.
        unsafe { env::set_var("FAKE_CUDA_GPUS", "2") };
        assert!(cuda_driver::use_library(&library("fake_cuda_driver")));
        cuda_driver::status().unwrap();
    });
    LazyLock::force(&OPEN);
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn nccl() -> Arc<Nccl> {
    Arc::new(Nccl::open(library("fake_nccl").as_os_str()).unwrap())
}

fn problem() -> Problem {
    let builder = Problem::builder(1, 4, 70, 32).kv_heads(2).dtype(DType::F16).causal(true);
    builder.build().unwrap()
}

fn setup(grid: Grid) -> Setup {
    let options = Options {
        kernel: registry::find("flash_mma").ok(),
        backward: registry::find_backward("backward_tiled").ok(),
        deterministic: true,
    };
    Setup { options, limit: LIMIT, ..Setup::new(problem(), grid).unwrap() }
}

fn tensors() -> [Tensor; 4] {
    let p = problem();
    [p.q_shape(), p.k_shape(), p.v_shape(), p.o_shape()]
        .map(|shape| Tensor::random(p.dtype(), &shape, shape.iter().sum::<usize>() as u64, 0.2))
}

/// Runs every rank in a thread with what it owns.
fn on_threads<R: Send, T: Send>(ranks: Vec<R>, work: impl Fn(usize, R) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let work = &work;
        let spawn = |(rank, own)| scope.spawn(move || work(rank, own));
        let handles: Vec<_> = ranks.into_iter().enumerate().map(spawn).collect();
        handles.into_iter().map(|handle| handle.join().unwrap()).collect()
    })
}

/// A rank's rows are those that emulators alone compute, bit for bit.
fn check(ranks: &[Rows], setup: &Setup) {
    let [q, k, v, d_o] = &tensors();
    let alone = emulated::on_ranks(ranks.len(), LIMIT, |engine, communicator| {
        run_rank(setup, [q, k, v], Some(d_o), (engine, engine.memory()), communicator)
    });
    for (rank, alone) in ranks.iter().zip(alone) {
        let alone = alone.unwrap();
        assert!(rank.o == alone.o && rank.lse == alone.lse && rank.gradients == alone.gradients);
    }
}

fn memory(gpu: u32) -> Arc<Memory> {
    Memory::new(Arc::new(GpuDevice::open(gpu).unwrap()))
}

/// Ranks as threads on streams of one GPU, which copy inside it.
#[test]
fn ranks_share_one_gpu() {
    let _turn = driver();
    for grid in [Grid::of_context(3), Grid::of_heads(2), Grid { heads: 2, context: 2 }] {
        let setup = setup(grid);
        let [q, k, v, d_o] = &tensors();
        let first = GpuEngine::open(0).unwrap();
        let communicators = ThreadCommunicator::ranks(grid.ranks(), LIMIT);
        let own = communicators.into_iter().map(|c| (c, first.sibling().unwrap())).collect();
        let ranks = on_threads(own, |_, (communicator, engine)| {
            let device = (&engine, &memory(0));
            run_rank(&setup, [q, k, v], Some(d_o), device, &communicator).unwrap()
        });
        check(&ranks, &setup);
    }
}

/// Ranks with a GPU each, through NCCL: by the line between the ranks, and by a file.
#[test]
fn ranks_exchange_through_nccl() {
    let _turn = driver();
    let folder = tempfile::tempdir().unwrap();
    for (number, grid) in [Grid::of_context(2), Grid::of_heads(2)].into_iter().enumerate() {
        let setup = setup(grid);
        let [q, k, v, d_o] = &tensors();
        let file = folder.path().join("id");
        let ranks = on_threads(Peers::of_threads(2, LIMIT), |rank, peers| {
            let engine = GpuEngine::open(rank as u32).unwrap();
            let communicator = match number {
                0 => NcclCommunicator::new(nccl(), peers, &engine),
                _ => NcclCommunicator::by_file(nccl(), peers, &file, &engine),
            };
            let (communicator, device) = (communicator.unwrap(), (&engine, &memory(rank as u32)));
            run_rank(&setup, [q, k, v], Some(d_o), device, &communicator).unwrap()
        });
        check(&ranks, &setup);
        assert!(!file.exists());
    }
}

/// A communicator that the caller made, which must have the ranks of the line between them.
#[test]
fn a_communicator_of_the_caller_is_taken() {
    type Init = unsafe extern "C" fn(*mut *mut c_void, i32, [u64; 16], i32, *const [u32; 6]) -> i32;
    let _turn = driver();
    let setup = setup(Grid::of_context(2));
    let [q, k, v, d_o] = &tensors();
    let made = |rank: usize, id: u64| {
        // SAFETY: our own library, whose function has this signature: an id is 128 bytes.
        unsafe {
            let library = libloading::Library::new(library("fake_nccl")).unwrap();
            let init = *library.get::<Init>("ncclCommInitRankConfig").unwrap();
            std::mem::forget(library);
            let mut id_bytes = [0; 16];
            id_bytes[0] = id;
            let (mut comm, config) = (std::ptr::null_mut(), [24, 0, 0xcafe_beef, 21_400, 0, 0]);
            init(&raw mut comm, 2, id_bytes, rank as i32, &raw const config);
            comm.expose_provenance()
        }
    };
    let ranks = on_threads(Peers::of_threads(2, LIMIT), |rank, peers| {
        let engine = GpuEngine::open(rank as u32).unwrap();
        let comm = std::ptr::with_exposed_provenance_mut(made(rank, 1 << 40));
        // SAFETY: made above, and used by this value alone.
        let communicator = unsafe { NcclCommunicator::of_existing(nccl(), peers, comm) }.unwrap();
        let device = (&engine, &memory(rank as u32));
        run_rank(&setup, [q, k, v], Some(d_o), device, &communicator).unwrap()
    });
    check(&ranks, &setup);
    let other = std::ptr::with_exposed_provenance_mut(made(1, 1 << 41));
    let first = Peers::of_threads(2, LIMIT).remove(0);
    // SAFETY: as above.
    let error = unsafe { NcclCommunicator::of_existing(nccl(), first, other) }.unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("rank of the communicator = 1 is not possible"), "{text}");
}

/// A rank that ends in the middle does not hold the other in a transfer.
#[test]
fn a_rank_that_ends_is_named_through_nccl() {
    let _turn = driver();
    let begin = Instant::now();
    let setup = setup(Grid::of_context(2));
    let [q, k, v, _] = &tensors();
    let ended = on_threads(Peers::of_threads(2, LIMIT), |rank, peers| {
        let engine = GpuEngine::open(rank as u32).unwrap();
        let communicator = NcclCommunicator::new(nccl(), peers, &engine).unwrap();
        if rank == 1 {
            // As far as the others wait for nothing but a transfer.
            let share = &setup.share;
            let attention = Attention::new(share, 1, &engine.target()).unwrap();
            let workspace = memory(1).filled(attention.workspace_bytes(), 0).unwrap();
            // SAFETY: the workspace is live.
            unsafe { attention.prepare(&engine, &communicator, workspace.region()) }.unwrap();
            communicator.peers().give_up("it is a test");
            return Ok(());
        }
        let device = (&engine, &memory(0));
        run_rank(&setup, [q, k, v], None, device, &communicator).map(drop)
    });
    let error = ended[0].as_ref().unwrap_err().to_string();
    assert_eq!(error, "rank 1 is lost: it gave up: it is a test");
    assert!(begin.elapsed() < LIMIT / 2);
}

/// A library that is missing, none, or too old is refused with what to do.
#[test]
fn nccl_is_refused_where_it_is_missing_or_too_old() {
    let _turn = driver();
    let missing = Nccl::open("/nowhere/libnccl.so.2".as_ref()).unwrap_err().to_string();
    assert!(
        missing.starts_with("no NCCL: the library /nowhere/libnccl.so.2 cannot be opened"),
        "{missing}"
    );
    assert!(missing.ends_with("correct or unset FLASH_ATTENTION_NCCL"), "{missing}");
    let other = Nccl::open(library("fake_cuda_driver").as_os_str()).unwrap_err().to_string();
    assert!(
        other.contains("it has no function ncclGetVersion; install NCCL 2.20 or later"),
        "{other}"
    );
    let old = || Nccl::open(library("fake_nccl").as_os_str());
    // SAFETY: no other thread reads the environment meanwhile: tests take turns.
    unsafe { env::set_var("FAKE_NCCL_VERSION", "21903") };
    let text = old().unwrap_err().to_string();
    // SAFETY: as above.
    unsafe { env::remove_var("FAKE_NCCL_VERSION") };
    assert!(text.contains("it has version 2.19.3; install NCCL 2.20 or later"), "{text}");
    assert_eq!(old().unwrap().version(), (2, 28, 0));
}
