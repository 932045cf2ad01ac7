//! One entry for each primitive of `simt`, for the GPU: what each of them becomes is held against
//! `expected.ptx`. Not part of any module that is checked in.
#![no_std]
#![feature(abi_ptx, asm_experimental_arch, stdarch_nvptx)]
#![allow(missing_docs)]

use half::{bf16, f16};
use simt::{
    async_copy, atomic, barrier,
    cluster, compiler,
    global::{Global, GlobalMut},
    math, matrix,
    mbarrier::{self, Mbarrier},
    memory::Memory,
    mma,
    scalar::Scalar,
    shared::Shared,
    shared_array, thread, tma, turn, warp, warpgroup,
    wgmma::{
        Accumulator, Descriptor, KMajor, MnMajor, RegisterProduct, SharedProduct, SliceProduct,
        TransposedProduct, WaitGroup,
    },
};

simt::declare_dynamic_shared!();

simt::specialisation_constants! {
    pub struct Constants {
        chosen,
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // SAFETY: stops the launch with an error.
    unsafe { core::arch::nvptx::trap() }
}

#[derive(Clone, Copy)]
struct Third;

impl barrier::Named for Third {
    #[inline(always)]
    fn id(self) -> u32 {
        3
    }
}

macro_rules! entries {
    ($($name:ident($($arg:ident: $type:ty),* $(,)?) $body:block)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "ptx-kernel" fn $name($($arg: $type),*) {
            simt::launch_bounds!(128, 1);
            #[allow(unused_unsafe)]
            // SAFETY: nobody launches it.
            unsafe { $body }
        }
    )*};
}

/// A view of one element.
fn one<T: Memory>(address: u64) -> GlobalMut<T> {
    // SAFETY: nobody launches it.
    unsafe { GlobalMut::new(address, 1) }
}

fn tile<T: Memory>() -> Shared<T> {
    // SAFETY: nobody launches it.
    unsafe { Shared::dynamic(0, 4096) }
}

fn bar() -> Mbarrier {
    Mbarrier::at(tile::<u64>(), 2)
}

entries! {
    thread_sync_threads() { thread::sync_threads() }
    barrier_sync() { barrier::sync(Third, 64) }
    barrier_arrive() { barrier::arrive(Third, 64) }
    warp_sync(mask: u32) { warp::sync_warp(mask) }
    warp_lane_id(out: u64) { one(out).write(0, warp::lane_id()) }
    warp_shuffle_xor(out: u64, value: u32, b: u32) { one(out).write(0, warp::shuffle_xor(value, b)) }
    warp_shuffle_idx(out: u64, value: u32, b: u32) { one(out).write(0, warp::shuffle_idx(value, b)) }
    warp_shuffle_down(out: u64, value: u32, b: u32) { one(out).write(0, warp::shuffle_down(value, b)) }
    warp_shuffle_up(out: u64, value: u32, b: u32) { one(out).write(0, warp::shuffle_up(value, b)) }
    warp_ballot(out: u64, value: u32) { one(out).write(0, warp::ballot(value > 3)) }
    warp_any(out: u64, value: u32) { one(out).write(0, u32::from(warp::any(value > 3))) }
    warp_all(out: u64, value: u32) { one(out).write(0, u32::from(warp::all(value > 3))) }
    warp_reduce_add(out: u64, value: f32) { one(out).write(0, warp::reduce_add::<4>(value)) }
    warp_reduce_max(out: u64, value: f32) { one(out).write(0, warp::reduce_max::<2>(value)) }
    warpgroup_decrease() { warpgroup::decrease_registers::<40>() }
    warpgroup_increase() { warpgroup::increase_registers::<232>() }
    cluster_block_rank(out: u64) { one(out).write(0, cluster::block_rank()) }
    cluster_num_blocks(out: u64) { one(out).write(0, cluster::num_blocks()) }
    cluster_sync() { cluster::sync() }
    cluster_read(out: u64, rank: u32) { one(out).write(0, cluster::map_shared_rank(tile::<u32>(), rank).read(5)) }
    cluster_write(rank: u32, value: u32) { cluster::map_shared_rank(tile::<u32>(), rank).write(5, value) }
    global_read_if(out: u64, from: u64, chosen: u32, value: u32) {
        one(out).write(0, one::<u32>(from).as_global().read_if(chosen == 7, 3, value))
    }
    compiler_opaque(out: u64, value: u32) { one(out).write(0, compiler::opaque(value)) }
    async_copy_copy(from: u64) { async_copy::copy(tile::<f16>(), 8, Global::<f16>::new(from, 64), 16) }
    async_copy_copy_or_zero(from: u64, inside: u32) {
        async_copy::copy_or_zero(tile::<f16>(), 8, Global::<f16>::new(from, 64), 16, inside != 0)
    }
    async_copy_commit() { async_copy::commit() }
    async_copy_wait_all() { async_copy::wait::<0>() }
    async_copy_wait_one() { async_copy::wait::<1>() }
    mbarrier_init(count: u32) { bar().init(count) }
    mbarrier_arrive() { bar().arrive() }
    mbarrier_arrive_at(rank: u32) { bar().arrive_at(rank) }
    mbarrier_signal_at(rank: u32) { bar().signal_at(rank) }
    mbarrier_arrive_expect_tx(bytes: u32) { bar().arrive_expect_tx(bytes) }
    mbarrier_wait(parity: u32) { bar().wait(parity) }
    mbarrier_is_complete(out: u64, parity: u32) { one(out).write(0, u32::from(bar().is_complete(parity))) }
    mbarrier_wait_cluster(parity: u32) { bar().wait_cluster(parity) }
    mbarrier_fence_init() { mbarrier::fence_init() }
    mbarrier_fence_proxy_async() { mbarrier::fence_proxy_async() }
    tma_prefetch_map(map: u64) { tma::prefetch_map(map) }
    tma_load_4d(map: u64, x: u32, y: u32, z: u32, w: u32) {
        tma::load_4d(tile::<u8>().address_of(1024), map, [x, y, z, w], bar())
    }
    tma_load_5d(map: u64, x: u32, y: u32, z: u32, w: u32, v: u32) {
        tma::load_5d(tile::<u8>().address_of(1024), map, [x, y, z, w, v], bar())
    }
    tma_load_4d_multicast(map: u64, x: u32, y: u32, z: u32, w: u32) {
        tma::load_4d_multicast(tile::<u8>().address_of(1024), map, [x, y, z, w], bar(), 3)
    }
    tma_store_4d(map: u64, x: u32, y: u32, z: u32, w: u32) {
        tma::store_4d(map, [x, y, z, w], tile::<u8>().address_of(1024))
    }
    tma_store_4d_if(chosen: u32, map: u64, x: u32, y: u32, z: u32, w: u32) {
        tma::store_4d_if(chosen == 7, map, [x, y, z, w], tile::<u8>().address_of(1024))
    }
    tma_store_5d_if(chosen: u32, map: u64, x: u32, y: u32, z: u32, w: u32, v: u32) {
        tma::store_5d_if(chosen == 7, map, [x, y, z, w, v], tile::<u8>().address_of(1024))
    }
    tma_reduce_add_4d(map: u64, x: u32, y: u32, z: u32, w: u32) {
        tma::reduce_add_4d(map, [x, y, z, w], tile::<u8>().address_of(1024))
    }
    tma_reduce_add_f32(to: u64, index: u64) {
        tma::reduce_add_f32(one(to), index, tile::<u8>().address_of(1024), 4096)
    }
    tma_commit_group() { tma::commit_group() }
    tma_wait_group_all() { tma::wait_group::<0>() }
    tma_wait_group_read_all() { tma::wait_group_read::<0>() }
    tma_wait_group_read_one() { tma::wait_group_read::<1>() }
    matrix_load_x2(out: u64) { one(out).write(0, matrix::load_x2(tile::<f16>(), 8)) }
    matrix_load_x4(out: u64) { one(out).write(0, matrix::load_x4(tile::<f16>(), 8)) }
    matrix_load_x2_transposed(out: u64) { one(out).write(0, matrix::load_x2_transposed(tile::<f16>(), 8)) }
    matrix_load_x4_transposed(out: u64) { one(out).write(0, matrix::load_x4_transposed(tile::<f16>(), 8)) }
    matrix_load_chunk(out: u64) { one(out).write(0, matrix::load_chunk(tile::<f16>(), 8)) }
    matrix_store_x4(a: u32, b: u32, c: u32, d: u32) { matrix::store_x4(tile::<f16>(), 8, [a, b, c, d]) }
    mma_m16n8k8_f16(out: u64, a: u32, b: u32, c: u32) {
        let mut sum = [1.0; 4];
        mma::m16n8k8_f16(&mut sum, [a, b], [c]);
        one(out).write(0, sum.map(f32::to_bits))
    }
    mma_m16n8k16_f16(out: u64, a: u32, b: u32, c: u32, d: u32, e: u32, f: u32) {
        let mut sum = [1.0; 4];
        mma::m16n8k16_f16(&mut sum, [a, b, c, d], [e, f]);
        one(out).write(0, sum.map(f32::to_bits))
    }
    mma_m16n8k16_bf16(out: u64, a: u32, b: u32, c: u32, d: u32, e: u32, f: u32) {
        let mut sum = [1.0; 4];
        mma::m16n8k16_bf16(&mut sum, [a, b, c, d], [e, f]);
        one(out).write(0, sum.map(f32::to_bits))
    }
    mma_m16n8k8_tf32(out: u64, a: u32, b: u32, c: u32, d: u32, e: u32, f: u32) {
        let mut sum = [1.0; 4];
        mma::m16n8k8_tf32(&mut sum, [a, b, c, d], [e, f]);
        one(out).write(0, sum.map(f32::to_bits))
    }
    mma_to_tf32(out: u64, value: f32) { one(out).write(0, mma::to_tf32(value)) }
    wgmma_shared_start(out: u64, a: u32, b: u32) {
        let mut s = Accumulator::<16>::zero();
        SharedProduct::<4>::product_shared::<f16, 8192, 16384>(&mut s, Descriptor::k_major(a), Descriptor::k_major(b));
        s.wait_group::<0>();
        one(out).write(0, s.values()[3][1]);
    }
    wgmma_slice_y(out: u64, a: u32, b: u32) {
        let mut s = Accumulator::<16>::zero();
        s.accumulate_slice::<bf16, KMajor, KMajor>(Descriptor::k_major(a), Descriptor::k_major(b));
        s.wait_group::<1>();
        one(out).write(0, s.values()[3][1]);
    }
    wgmma_slice_dx(out: u64, a: u32, b: u32) {
        let mut s = Accumulator::<16>::zero();
        s.accumulate_slice::<f16, KMajor, MnMajor>(Descriptor::k_major(a), Descriptor::n_major(b, 8192));
        s.wait_group::<1>();
        one(out).write(0, s.values()[3][1]);
    }
    wgmma_slice_dw(out: u64, a: u32, b: u32) {
        let mut s = Accumulator::<16>::zero();
        s.accumulate_slice::<f16, MnMajor, MnMajor>(Descriptor::n_major(a, 8192), Descriptor::n_major(b, 8192));
        s.wait_group::<1>();
        one(out).write(0, s.values()[3][1]);
    }
    wgmma_registers(out: u64, a: u32, b: u32) {
        let mut s = Accumulator::<8>::zero();
        RegisterProduct::<8>::product_registers::<f16>(&mut s, &[[a, a + 1, a + 2, a + 3]; 8], Descriptor::n_major(b, 1024));
        s.wait_group_in::<0, 2>();
        one(out).write(0, s.values()[3][1]);
    }
    wgmma_transposed(out: u64, a: u32, b: u32) {
        let mut s = Accumulator::<8>::zero();
        TransposedProduct::<8>::product_transposed::<bf16>(&mut s, Descriptor::n_major(a, 0), Descriptor::n_major(b, 0));
        s.wait_group::<0>();
        one(out).write(0, s.values()[3][1]);
    }
    specialise_constant(out: u64) { one(out).write(0, Constants::chosen()) }
    shared_dynamic(value: u32) { tile::<u32>().write(3, value) }
    shared_static(out: u64, value: u32) {
        let array = shared_array!(u32; 8);
        array.write(3, value);
        one(out).write(0, array.read(4))
    }
    memory_u8(out: u64) { one(out).write(0, tile::<u8>().read(1)) }
    memory_f16(out: u64) { one(out).write(0, tile::<f16>().read(1)) }
    memory_u64(out: u64) { one(out).write(0, tile::<u64>().read(1)) }
    memory_v2(out: u64, from: u64) { one(out).write(0, one::<[u32; 2]>(from).read(0)) }
    memory_v4(from: u64) { tile::<[u32; 4]>().write(1, one::<[u32; 4]>(from).read(0)) }
    scalar_f16(out: u64, value: f32) { one(out).write(0, <f16 as Scalar>::from_f32(value)) }
    scalar_f16_to(out: u64, from: u64) { one(out).write(0, Scalar::to_f32(one::<f16>(from).read(0))) }
    scalar_bf16(out: u64, value: f32) { one(out).write(0, <bf16 as Scalar>::from_f32(value)) }
    math_exp2(out: u64, value: f32) { one(out).write(0, math::exp2(value)) }
    math_tanh_approx(out: u64, value: f32) { one(out).write(0, math::tanh_approx(value)) }
    math_log2(out: u64, value: f32) { one(out).write(0, math::log2(value)) }
    math_fma(out: u64, a: f32, b: f32, c: f32) { one(out).write(0, math::fma(a, b, c)) }
    math_max(out: u64, a: f32, b: f32) { one(out).write(0, math::max(a, b)) }
    math_mul_hi(out: u64, a: u32, b: u32) { one(out).write(0, math::mul_hi(a, b)) }
    atomic_add_global_u32(out: u64, to: u64, value: u32) { one(out).write(0, atomic::add_global_u32(one(to), 0, value)) }
    atomic_add_shared_f32(out: u64, value: f32) { one(out).write(0, atomic::add_shared_f32(tile(), 1, value)) }
    atomic_reduce_add_x4_global(to: u64, a: f32, b: f32) { atomic::reduce_add_x4_global(one(to), 0, [a, b, b, a]) }
    atomic_max_global_u32(out: u64, to: u64, value: u32) { one(out).write(0, atomic::max_global_u32(one(to), 0, value)) }
    atomic_min_shared_u32(out: u64, value: u32) { one(out).write(0, atomic::min_shared_u32(tile(), 1, value)) }
    atomic_increment_global_u32(out: u64, to: u64, value: u32) { one(out).write(0, atomic::increment_global_u32(one(to), 0, value)) }
    turn_wait(counts: u64, number: u32) { turn::wait(one(counts), 0, number) }
    turn_pass(counts: u64) { turn::pass(one(counts), 0) }
    atomic_exchange_shared_u32(out: u64, value: u32) { one(out).write(0, atomic::exchange_shared_u32(tile(), 1, value)) }
}
