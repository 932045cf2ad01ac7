//! The symbols that cust links to. Each looks its namesake up in the driver library
//! on the first call, and passes the arguments on.
//!
//! The signatures are the ABI only: every pointer and handle is `P`, every enum u32.

#![allow(non_snake_case, reason = "the names are the driver's")]

use std::{
    ffi::{c_char, c_void},
    sync::OnceLock,
};

use cuda_driver::ResultCode;

use crate::codes::{known_to_cust, note_failure};

/// A pointer or a handle.
type P = *mut c_void;

macro_rules! forward {
    ($($name:ident($($arg:ident: $type:ty),*);)*) => {
        $(
            /// # Safety
            /// As the CUDA driver API says of this function.
            #[unsafe(no_mangle)]
            pub(crate) unsafe extern "system" fn $name($($arg: $type),*) -> u32 {
                static ADDRESS: OnceLock<Result<usize, ResultCode>> = OnceLock::new();
                const NAME: &str = stringify!($name);
                let code = match *ADDRESS.get_or_init(|| cuda_driver::address(NAME)) {
                    Ok(address) => {
                        // SAFETY: the driver's function of that name has this signature,
                        // and the library stays open for the life of the process.
                        let function = unsafe {
                            std::mem::transmute::<usize, unsafe extern "system" fn($($type),*) -> u32>(address)
                        };
                        // SAFETY: the caller keeps to the function's contract.
                        ResultCode(unsafe { function($($arg),*) })
                    }
                    Err(code) => code,
                };
                if !code.is_success() {
                    note_failure(NAME, code);
                }
                known_to_cust(code).0
            }
        )*
    };
}

/// The text of a result code. cust's `Display` panics when this fails, so it answers without
/// a driver, too.
///
/// # Safety
/// `text` must be null or valid for a write.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "system" fn cuGetErrorString(code: u32, text: *mut *const c_char) -> u32 {
    if text.is_null() {
        return ResultCode::INVALID_VALUE.0;
    }
    // SAFETY: not null, so valid for a write; the text is 'static.
    unsafe { text.write(ResultCode(code).text().as_ptr()) };
    ResultCode::SUCCESS.0
}

forward! {
    cuArray3DCreate_v2(p_handle: P, p_allocate_array: P);
    cuArray3DGetDescriptor_v2(p_array_descriptor: P, h_array: P);
    cuArrayDestroy(h_array: P);
    cuCtxCreate_v2(pctx: P, flags: u32, dev: i32);
    cuCtxDestroy_v2(ctx: P);
    cuCtxGetApiVersion(ctx: P, version: P);
    cuCtxGetCacheConfig(pconfig: P);
    cuCtxGetCurrent(pctx: P);
    cuCtxGetDevice(device: P);
    cuCtxGetFlags(flags: P);
    cuCtxGetLimit(pvalue: P, limit: u32);
    cuCtxGetSharedMemConfig(p_config: P);
    cuCtxGetStreamPriorityRange(least_priority: P, greatest_priority: P);
    cuCtxPopCurrent_v2(pctx: P);
    cuCtxPushCurrent_v2(ctx: P);
    cuCtxSetCacheConfig(config: u32);
    cuCtxSetCurrent(ctx: P);
    cuCtxSetLimit(limit: u32, value: usize);
    cuCtxSetSharedMemConfig(config: u32);
    cuCtxSynchronize();
    cuDestroyExternalMemory(ext_mem: P);
    cuDeviceGet(device: P, ordinal: i32);
    cuDeviceGetAttribute(pi: P, attrib: u32, dev: i32);
    cuDeviceGetCount(count: P);
    cuDeviceGetName(name: P, len: i32, dev: i32);
    cuDevicePrimaryCtxRelease_v2(dev: i32);
    cuDevicePrimaryCtxReset_v2(dev: i32);
    cuDevicePrimaryCtxRetain(pctx: P, dev: i32);
    cuDevicePrimaryCtxSetFlags_v2(dev: i32, flags: u32);
    cuDeviceTotalMem_v2(bytes: P, dev: i32);
    cuDriverGetVersion(driver_version: P);
    cuEventCreate(ph_event: P, flags: u32);
    cuEventDestroy_v2(h_event: P);
    cuEventElapsedTime(p_milliseconds: P, h_start: P, h_end: P);
    cuEventQuery(h_event: P);
    cuEventRecord(h_event: P, h_stream: P);
    cuEventSynchronize(h_event: P);
    cuExternalMemoryGetMappedBuffer(dev_ptr: P, ext_mem: P, buffer_desc: P);
    cuFuncGetAttribute(pi: P, attrib: u32, hfunc: P);
    cuFuncSetAttribute(hfunc: P, attrib: u32, value: i32);
    cuFuncSetCacheConfig(hfunc: P, config: u32);
    cuFuncSetSharedMemConfig(hfunc: P, config: u32);
    cuGraphAddKernelNode(
        ph_graph_node: P, h_graph: P, dependencies: P, num_dependencies: usize, node_params: P
    );
    cuGraphCreate(ph_graph: P, flags: u32);
    cuGraphDebugDotPrint(h_graph: P, path: P, flags: u32);
    cuGraphDestroy(h_graph: P);
    cuGraphGetEdges(h_graph: P, from: P, to: P, num_edges: P);
    cuGraphGetNodes(h_graph: P, nodes: P, num_nodes: P);
    cuGraphKernelNodeGetParams(h_node: P, node_params: P);
    cuGraphNodeGetType(h_node: P, kind: P);
    cuImportExternalMemory(ext_mem_out: P, mem_handle_desc: P);
    cuInit(flags: u32);
    cuLaunchHostFunc(h_stream: P, function: P, user_data: P);
    cuLaunchKernel(
        f: P, grid_dim_x: u32, grid_dim_y: u32, grid_dim_z: u32, block_dim_x: u32,
        block_dim_y: u32, block_dim_z: u32, shared_mem_bytes: u32, h_stream: P, kernel_params: P,
        extra: P
    );
    cuLinkAddData_v2(
        state: P, kind: u32, data: P, size: usize, name: P, num_options: u32, options: P,
        option_values: P
    );
    cuLinkComplete(state: P, cubin_out: P, size_out: P);
    cuLinkCreate_v2(num_options: u32, options: P, option_values: P, state_out: P);
    cuLinkDestroy(state: P);
    cuMemAdvise(dev_ptr: u64, count: usize, advice: u32, device: i32);
    cuMemAllocAsync(dptr: P, bytesize: usize, h_stream: P);
    cuMemAllocHost_v2(pp: P, bytesize: usize);
    cuMemAllocManaged(dptr: P, bytesize: usize, flags: u32);
    cuMemAlloc_v2(dptr: P, bytesize: usize);
    cuMemFreeAsync(dptr: u64, h_stream: P);
    cuMemFreeHost(p: P);
    cuMemFree_v2(dptr: u64);
    cuMemGetInfo_v2(free: P, total: P);
    cuMemPrefetchAsync(dev_ptr: u64, count: usize, dst_device: i32, h_stream: P);
    cuMemcpy2D_v2(p_copy: P);
    cuMemcpyAtoH_v2(dst_host: P, src_array: P, src_offset: usize, byte_count: usize);
    cuMemcpyDtoDAsync_v2(dst_device: u64, src_device: u64, byte_count: usize, h_stream: P);
    cuMemcpyDtoD_v2(dst_device: u64, src_device: u64, byte_count: usize);
    cuMemcpyDtoHAsync_v2(dst_host: P, src_device: u64, byte_count: usize, h_stream: P);
    cuMemcpyDtoH_v2(dst_host: P, src_device: u64, byte_count: usize);
    cuMemcpyHtoA_v2(dst_array: P, dst_offset: usize, src_host: P, byte_count: usize);
    cuMemcpyHtoDAsync_v2(dst_device: u64, src_host: P, byte_count: usize, h_stream: P);
    cuMemcpyHtoD_v2(dst_device: u64, src_host: P, byte_count: usize);
    cuMemsetD16Async(dst_device: u64, us: u16, n: usize, h_stream: P);
    cuMemsetD16_v2(dst_device: u64, us: u16, n: usize);
    cuMemsetD32Async(dst_device: u64, ui: u32, n: usize, h_stream: P);
    cuMemsetD32_v2(dst_device: u64, ui: u32, n: usize);
    cuMemsetD8Async(dst_device: u64, uc: u8, n: usize, h_stream: P);
    cuMemsetD8_v2(dst_device: u64, uc: u8, n: usize);
    cuModuleGetFunction(hfunc: P, hmod: P, name: P);
    cuModuleGetGlobal_v2(dptr: P, bytes: P, hmod: P, name: P);
    cuModuleLoad(module: P, fname: P);
    cuModuleLoadData(module: P, image: P);
    cuModuleLoadDataEx(module: P, image: P, num_options: u32, options: P, option_values: P);
    cuModuleUnload(hmod: P);
    cuOccupancyAvailableDynamicSMemPerBlock(
        dynamic_smem_size: P, func: P, num_blocks: i32, block_size: i32
    );
    cuOccupancyMaxActiveBlocksPerMultiprocessor(
        num_blocks: P, func: P, block_size: i32, dynamic_smem_size: usize
    );
    cuOccupancyMaxPotentialBlockSize(
        min_grid_size: P, block_size: P, func: P, block_size_to_dynamic_smem_size: P,
        dynamic_smem_size: usize, block_size_limit: i32
    );
    cuStreamCreateWithPriority(ph_stream: P, flags: u32, priority: i32);
    cuStreamDestroy_v2(h_stream: P);
    cuStreamGetFlags(h_stream: P, flags: P);
    cuStreamGetPriority(h_stream: P, priority: P);
    cuStreamSynchronize(h_stream: P);
    cuStreamWaitEvent(h_stream: P, h_event: P, flags: u32);
    cuSurfObjectCreate(p_surf_object: P, p_res_desc: P);
    cuSurfObjectDestroy(surf_object: u64);
    cuSurfObjectGetResourceDesc(p_res_desc: P, surf_object: u64);
    cuTexObjectCreate(p_tex_object: P, p_res_desc: P, p_tex_desc: P, p_res_view_desc: P);
    cuTexObjectDestroy(tex_object: u64);
    cuTexObjectGetResourceDesc(p_res_desc: P, tex_object: u64);
    cuTexObjectGetResourceViewDesc(p_res_view_desc: P, tex_object: u64);
}
