//! Bulk copies of tensor boxes between global and shared memory (TMA), from sm_90 on.
//!
//! One thread starts a copy; the copy engine, beside the warps, moves the box that a
//! [`TensorMap`] describes, and swizzles its rows so that wgmma reads them without bank
//! conflicts. Elements outside of the tensor are loaded as zero and are not stored.
//!
//! Loads are waited for at the mbarrier they are given: the bytes of a whole box count,
//! also where it hangs over the tensor's edge. Stores are waited for in groups, like
//! [`commit_group`] and [`wait_group_read`].

#[cfg(not(target_arch = "nvptx64"))]
use std::panic::Location;

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator::{bulk, global_memory::GlobalAccess};
use crate::global::GlobalMut;
pub use crate::hardware::TensorMap;
use crate::mbarrier::Mbarrier;

#[cfg(not(target_arch = "nvptx64"))]
pub use crate::emulator::tensor_map::{Element, TensorMapError, TensorMapSpec};

/// Starts to fetch the map at `map` into the cache for descriptors.
///
/// # Safety
/// `map` is the address of a [`TensorMap`], aligned to 64, in global memory or in the entry's
/// parameter.
#[inline(always)]
pub unsafe fn prefetch_map(map: u64) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the address is that of a map, as stated above.
    unsafe {
        core::arch::asm!("prefetch.tensormap [{0}];", in(reg64) map, options(nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    let _ = map;
}

/// Starts to copy the box at `coordinates` (in elements, fastest dimension first) of a
/// four-dimensional tensor to the shared address `destination`, aligned to 128 bytes
/// (1024 with the 128-byte swizzle). Its bytes count at `barrier`.
///
/// # Safety
/// - `map` is the address of an encoded [`TensorMap`], aligned to 64, in global memory or in the
///   entry's parameter. Its tensor is allocated until the copy has ended.
/// - `destination` is an address in this block's shared memory, aligned as above, with room for the
///   whole box.
/// - `barrier` is initialised. The block stays until its phase is complete, and until then no thread
///   reads or writes the destination.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub unsafe fn load_4d(destination: u32, map: u64, coordinates: [u32; 4], barrier: Mbarrier) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the list above: a map, room for the box, an initialised barrier, and nobody at the
    // box.
    unsafe {
        core::arch::asm!(
            "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [{0}], [{1}, {{{2}, {3}, {4}, {5}}}], [{6}];",
            in(reg32) destination, in(reg64) map,
            in(reg32) coordinates[0], in(reg32) coordinates[1],
            in(reg32) coordinates[2], in(reg32) coordinates[3],
            in(reg32) barrier.address(), options(nostack)
        );
    }
    #[cfg(not(target_arch = "nvptx64"))]
    bulk::load(destination, map, &coordinates, barrier.address(), Location::caller());
}

/// [`load_4d`] of a five-dimensional tensor.
///
/// # Safety
/// As for [`load_4d`].
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub unsafe fn load_5d(destination: u32, map: u64, coordinates: [u32; 5], barrier: Mbarrier) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the list above: a map, room for the box, an initialised barrier, and nobody at the
    // box.
    unsafe {
        core::arch::asm!(
            "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [{0}], [{1}, {{{2}, {3}, {4}, {5}, {6}}}], [{7}];",
            in(reg32) destination, in(reg64) map,
            in(reg32) coordinates[0], in(reg32) coordinates[1], in(reg32) coordinates[2],
            in(reg32) coordinates[3], in(reg32) coordinates[4],
            in(reg32) barrier.address(), options(nostack)
        );
    }
    #[cfg(not(target_arch = "nvptx64"))]
    bulk::load(destination, map, &coordinates, barrier.address(), Location::caller());
}

/// [`load_4d`] into several blocks of the cluster at once: into those whose bit (of their
/// rank) is set in `blocks`, at `destination` in each, and its bytes count at each one's
/// `barrier`. The box is fetched once.
///
/// # Safety
/// As for [`load_4d`], in each of the blocks; each has started, and none has ended.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub unsafe fn load_4d_multicast(
    destination: u32,
    map: u64,
    coordinates: [u32; 4],
    barrier: Mbarrier,
    blocks: u16,
) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the list above: a map, room for the box, an initialised barrier, and nobody at the
    // box.
    unsafe {
        core::arch::asm!(
            "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [{0}], [{1}, {{{2}, {3}, {4}, {5}}}], [{6}], {7};",
            in(reg32) destination, in(reg64) map,
            in(reg32) coordinates[0], in(reg32) coordinates[1],
            in(reg32) coordinates[2], in(reg32) coordinates[3],
            in(reg32) barrier.address(), in(reg16) blocks, options(nostack)
        );
    }
    #[cfg(not(target_arch = "nvptx64"))]
    bulk::load_multicast(
        destination,
        map,
        &coordinates,
        barrier.address(),
        blocks,
        Location::caller(),
    );
}

/// Starts to copy the shared bytes at `source` to the box at `coordinates` of a
/// four-dimensional tensor. Data of ordinary writes there needs
/// [`fence_proxy_async`](crate::mbarrier::fence_proxy_async) first.
///
/// # Safety
/// - `map` is as for [`load_4d`]. Until the copy has ended no other access touches the box.
/// - `source` is an address in this block's shared memory, aligned as for [`load_4d`], of a whole box.
///   Until [`wait_group_read`] no thread writes it.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub unsafe fn store_4d(map: u64, coordinates: [u32; 4], source: u32) {
    // SAFETY: `store_4d_if` asks what is stated above.
    unsafe { store_4d_if(true, map, coordinates, source) }
}

/// [`store_4d`] where `condition` holds: one instruction without a branch around it.
///
/// # Safety
/// As for [`store_4d`].
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub unsafe fn store_4d_if(condition: bool, map: u64, coordinates: [u32; 4], source: u32) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the list above: a map, and a whole box that nobody writes.
    unsafe {
        core::arch::asm!(
            "{{ .reg .pred chosen; setp.ne.u32 chosen, {6}, 0;",
            "@chosen cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [{0}, {{{1}, {2}, {3}, {4}}}], [{5}]; }}",
            in(reg64) map,
            in(reg32) coordinates[0], in(reg32) coordinates[1],
            in(reg32) coordinates[2], in(reg32) coordinates[3],
            in(reg32) source, in(reg32) u32::from(condition), options(nostack)
        );
    }
    #[cfg(not(target_arch = "nvptx64"))]
    if condition {
        bulk::store(map, &coordinates, source, Location::caller());
    }
}

/// [`store_4d_if`] to a five-dimensional tensor.
///
/// # Safety
/// As for [`store_4d`].
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub unsafe fn store_5d_if(condition: bool, map: u64, coordinates: [u32; 5], source: u32) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the list above: a map, and a whole box that nobody writes.
    unsafe {
        core::arch::asm!(
            "{{ .reg .pred chosen; setp.ne.u32 chosen, {7}, 0;",
            "@chosen cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [{0}, {{{1}, {2}, {3}, {4}, {5}}}], [{6}]; }}",
            in(reg64) map,
            in(reg32) coordinates[0], in(reg32) coordinates[1], in(reg32) coordinates[2],
            in(reg32) coordinates[3], in(reg32) coordinates[4],
            in(reg32) source, in(reg32) u32::from(condition), options(nostack)
        );
    }
    #[cfg(not(target_arch = "nvptx64"))]
    if condition {
        bulk::store(map, &coordinates, source, Location::caller());
    }
}

/// Starts to add the shared elements at `source` to the box at `coordinates` of a
/// four-dimensional tensor, each as by an atomic operation: in no order between blocks, so
/// that sums of rounded numbers differ from run to run. Otherwise as [`store_4d`].
///
/// # Safety
/// As for [`store_4d`].
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub unsafe fn reduce_add_4d(map: u64, coordinates: [u32; 4], source: u32) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the list above: a map, and a whole box that nobody writes.
    unsafe {
        core::arch::asm!(
            "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group [{0}, {{{1}, {2}, {3}, {4}}}], [{5}];",
            in(reg64) map,
            in(reg32) coordinates[0], in(reg32) coordinates[1],
            in(reg32) coordinates[2], in(reg32) coordinates[3],
            in(reg32) source, options(nostack)
        );
    }
    #[cfg(not(target_arch = "nvptx64"))]
    bulk::reduce_add(map, &coordinates, source, Location::caller());
}

/// Starts to add a row of `elements` f32 in shared memory to a row in global memory, which begins at element
/// `index` of `to`. `source` is a shared address, aligned to 128 bytes; `index` and `elements` are
/// multiples of four. Each addition is atomic, and blocks add in no order: sums of rounded numbers differ from
/// run to run. Needs no map.
///
/// # Safety
/// - The memory of `to` stays allocated until the reduction has ended.
/// - `source` is an address in this block's shared memory, aligned as above, with that many elements.
/// - From here until the group was waited for, no thread writes the source.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub unsafe fn reduce_add_f32(to: GlobalMut<f32>, index: u64, source: u32, elements: u32) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the list above; indices are in bounds, as the function that made the view asks.
    unsafe {
        core::arch::asm!(
            "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [{0}], [{1}], {2};",
            in(reg64) to.address_of(index), in(reg32) source, in(reg32) elements * 4,
            options(nostack)
        );
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        let at = Location::caller();
        let bytes = u64::from(elements) * 4;
        let address = to.as_global().check_place(index, bytes, 16, GlobalAccess::Atomic, at);
        bulk::reduce_add_flat(address, elements, source, at);
    }
}

/// Closes a group: the stores and reductions that this thread started since the last one.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn commit_group() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: no precondition.
    unsafe {
        core::arch::asm!("cp.async.bulk.commit_group;", options(nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    bulk::commit_group(Location::caller());
}

/// Waits until the stores of all but the last `PENDING` groups of this thread have read
/// their shared memory, which may then be written again or given up.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn wait_group_read<const PENDING: u32>() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: no precondition.
    unsafe {
        core::arch::asm!("cp.async.bulk.wait_group.read {n};", n = const PENDING, options(nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    bulk::wait_group_read(PENDING, Location::caller());
}

/// Waits until the stores and reductions of all but the last `PENDING` groups of this thread have been
/// performed: what this thread does next comes after them.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn wait_group<const PENDING: u32>() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: no precondition.
    unsafe {
        core::arch::asm!("cp.async.bulk.wait_group {n};", n = const PENDING, options(nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    bulk::wait_group(PENDING, Location::caller());
}
