//! Not a rung: what clusters offer and no kernel here needs yet, in one launch, so that tests
//! run it on a GPU as well as on the emulator.
//!
//! The two blocks of a cluster write numbers into each other's shared memory and hand them over
//! by an mbarrier, read each other's after the cluster's barrier, and add what they have to a
//! tensor by the copy engine.

use simt::{
    cluster,
    mbarrier::{self, Mbarrier},
    shared::Shared,
    thread, tma,
};

use crate::{args::WithMaps, entries};

/// Blocks of a cluster.
pub const CLUSTER: u32 = 2;
/// Threads of a block, and elements of its tile.
pub const THREADS: u32 = 128;
/// Dynamic shared memory of a block in bytes: two tiles and a barrier.
pub const SHARED_BYTES: u32 = BARRIER + Mbarrier::BYTES;
const BARRIER: u32 = 2 * THREADS * size_of::<f32>() as u32;
/// Extents of the box of the tensor map: the whole tile.
pub const BOX: [u32; 4] = [THREADS, 1, 1, 1];

/// The tensor map of the sums, and nothing else.
pub type ProbeArgs = WithMaps<(), 1>;

/// Adds to element `t` of `sums` what each block's thread `t` was given by the other block's
/// thread `t`, `1000 * block + t`, twice: once written there, once read from there.
///
/// # Layout
/// `sums: [THREADS]`, f32, a map over `[THREADS, 1, 1, 1]` with boxes of [`BOX`], no swizzle.
///
/// # Thread mapping
/// Any number of clusters of two blocks along x, [`THREADS`] each.
///
/// # Safety
/// `args` must be the parameter of the running entry, its map the map of such a tensor, and the
/// launch as stated here.
#[inline(always)]
pub unsafe fn probe(args: &ProbeArgs) {
    let (t, other) = (thread::thread_idx_x(), 1 - cluster::block_rank());
    // SAFETY: the launch gives the shared memory.
    let (given, own, bar) = unsafe {
        let barrier = Mbarrier::at(Shared::<u64>::dynamic(BARRIER, 1), 0);
        (Shared::<f32>::dynamic(0, THREADS), Shared::<f32>::dynamic(BARRIER / 2, THREADS), barrier)
    };
    if t == 0 {
        bar.init(THREADS);
        mbarrier::fence_init();
    }
    let number = (1000 * thread::block_idx_x() + t) as f32;
    own.write(t, number);
    // Hazard: the other block may not have started, or not have written yet.
    cluster::sync();

    cluster::map_shared_rank(given, other).write(t, number);
    bar.arrive_at(other);
    // Hazard: the other block's numbers may not be here.
    bar.wait_cluster(0);
    let sum = given.read(t) + cluster::map_shared_rank(own, other).read(t);
    // Hazard: the other block may still read the overwritten numbers, and must not end before this
    // one has read.
    cluster::sync();

    own.write(t, sum);
    mbarrier::fence_proxy_async();
    // Hazard: the copy engine reads numbers that all threads have written.
    thread::sync_threads();
    if t == 0 {
        // SAFETY: the caller passes the entry's parameter, which holds the map.
        unsafe {
            let (maps, ()) = args.split();
            tma::reduce_add_4d(maps.address::<0>(), [0; 4], own.address());
        }
        tma::commit_group();
        // Hazard: shared memory is given up when the block ends.
        tma::wait_group_read::<0>();
    }
}

entries! {
    /// [`probe`].
    pub static ENTRIES: ProbeArgs => "sm_90a", threads THREADS, min_blocks 1, cluster CLUSTER;
    cluster_probe: T in [f32] = probe;
}
