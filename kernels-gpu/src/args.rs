//! The arguments of the kernels: plain `#[repr(C)]` structs, passed by value.
//!
//! One struct serves every attention kernel of the forward ladder ([`AttentionArgs`]), so that a
//! backend launches any of them the same way, another every kernel of the backward ladder ([`BackwardArgs`]),
//! and one serves every linear (projection) kernel ([`LinearArgs`]); kernels that copy through TMA are given tensor maps in front of it
//! ([`WithMaps`]). Addresses
//! are device addresses on a GPU and host addresses under the emulator; lengths
//! are carried along so that the emulator can check every access.

use simt::{
    global::{Global, GlobalMut},
    memory::Memory,
    parameter,
    tma::{self, TensorMap},
};

pub use attention::{
    AttentionArgs, Bias, DropoutArgs, Keys, Scores, Scratch, Sequences, Shape, Slopes, Tensors,
};
pub use backward::{BackwardArgs, BackwardScratch, Gradients};
pub use decode::{AppendArgs, AppendShape, CacheArgs, DecodeArgs, PartsArgs, ScaleArgs};
pub use linear::LinearArgs;
pub use merge::MergeArgs;

mod attention;
mod backward;
mod decode;
mod linear;
mod merge;

/// A region of global memory: address and length in bytes. Empty when unused.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Buffer {
    /// Address of the first byte.
    pub address: u64,
    /// Length in bytes.
    pub bytes: u64,
}

impl Buffer {
    /// Whether there is no region at all (an optional argument not given).
    #[inline(always)]
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// A typed view for reading, `bytes / size_of::<T>()` elements long.
    ///
    /// # Safety
    /// The region must be allocated, aligned for `T`, and not written by anyone
    /// while the kernel runs, unless a barrier of the kernel orders the accesses.
    #[inline(always)]
    #[must_use]
    pub unsafe fn view<T: Memory>(&self) -> Global<T> {
        // SAFETY: the region is allocated and aligned, and its accesses are ordered, as stated
        // above.
        unsafe { Global::new(self.address, self.bytes / size_of::<T>() as u64) }
    }

    /// A typed view for writing, `bytes / size_of::<T>()` elements long.
    ///
    /// # Safety
    /// As for [`Buffer::view`], and the region must be writable.
    #[inline(always)]
    #[must_use]
    pub unsafe fn view_mut<T: Memory>(&self) -> GlobalMut<T> {
        // SAFETY: the region is allocated, aligned and writable, and its accesses are ordered, as
        // stated above.
        unsafe { GlobalMut::new(self.address, self.bytes / size_of::<T>() as u64) }
    }
}

/// A `[B, H, N, D]` tensor in global memory, seen through strides.
///
/// `[B, H, N, D]` row-major has strides `(H*N*D, N*D, D)`; the `[B, N, H, D]` that a
/// projection writes has `(N*H*D, D, H*D)`, and needs no copy. The last dimension
/// is always contiguous.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tensor {
    /// The memory behind the tensor.
    pub buffer: Buffer,
    /// Elements from one batch entry to the next.
    pub stride_b: u64,
    /// Elements from one head to the next.
    pub stride_h: u64,
    /// Elements from one row (token) to the next.
    pub stride_n: u64,
}

impl Tensor {
    /// Index of the first element of head `h` of batch entry `b`.
    #[inline(always)]
    #[must_use]
    pub const fn head(&self, b: u32, h: u32) -> u64 {
        b as u64 * self.stride_b + h as u64 * self.stride_h
    }

    /// The same memory in elements half as long: an f32 as two of 16 bits.
    #[inline(always)]
    #[must_use]
    pub const fn halves(&self) -> Self {
        Self {
            buffer: self.buffer,
            stride_b: 2 * self.stride_b,
            stride_h: 2 * self.stride_h,
            stride_n: 2 * self.stride_n,
        }
    }
}

/// The parameter of a kernel that copies through TMA: `N` tensor maps and its other arguments.
///
/// The maps are part of the parameter, so that a launch with other pointers copies nothing to
/// the device first, and a captured launch carries its own. They come first: the address of
/// the parameter is the address of the first map. On the host the struct is aligned as a
/// [`TensorMap`] is; in PTX the parameter is.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct WithMaps<A, const N: usize> {
    /// The maps, in the order that the kernel states.
    pub maps: [TensorMap; N],
    /// Everything else.
    pub args: A,
}

impl<A, const N: usize> WithMaps<A, N> {
    /// The maps and the other arguments.
    ///
    /// # Safety
    /// `self` must be the parameter of the entry that runs: on a GPU the maps' address is taken
    /// from there, not from the reference.
    #[inline(always)]
    #[must_use]
    pub unsafe fn split(&self) -> (Maps<N>, &A) {
        // SAFETY: `self` is the parameter of the entry that runs, as stated above.
        (Maps(unsafe { parameter::address(self) }), &self.args)
    }
}

/// Where a kernel's tensor maps are.
#[derive(Clone, Copy, Debug)]
pub struct Maps<const N: usize>(u64);

impl<const N: usize> Maps<N> {
    /// Address of map `INDEX`, for [`tma`].
    #[inline(always)]
    #[must_use]
    pub const fn address<const INDEX: usize>(self) -> u64 {
        const { assert!(INDEX < N, "there are that many maps") };
        self.0 + (INDEX * TensorMap::BYTES) as u64
    }

    /// Starts to fetch every map into the cache for descriptors.
    #[inline(always)]
    pub fn prefetch(self) {
        for index in 0..N {
            // SAFETY: the parameter holds `N` maps.
            unsafe { tma::prefetch_map(self.0 + (index * TensorMap::BYTES) as u64) };
        }
    }
}
