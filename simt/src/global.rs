//! Views of global memory. Indices count elements; the emulator checks bounds and
//! alignment, and counts the bytes.

use core::marker::PhantomData;

#[cfg(not(target_arch = "nvptx64"))]
use std::panic::Location;

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator::{FaultKind, current, global_memory::GlobalAccess};
use crate::memory::Memory;

/// A view of `len` elements of global memory, for reading.
#[derive(Debug)]
pub struct Global<T> {
    address: u64,
    len: u64,
    element: PhantomData<T>,
}

/// A view of `len` elements of global memory, for reading and writing. Two threads that nothing
/// orders may not write the same element, not even the same value.
#[derive(Debug)]
pub struct GlobalMut<T>(Global<T>);

impl<T> Clone for Global<T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Global<T> {}
impl<T> Clone for GlobalMut<T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for GlobalMut<T> {}

impl<T: Memory> Global<T> {
    /// A view of `len` elements at `address`.
    ///
    /// # Safety
    /// - `len` elements at `address` are allocated while the kernel runs, and aligned for `T`.
    /// - Every index used later is below `len`. A vector ([`read_as`](Self::read_as)) is inside as a
    ///   whole, and aligned as a whole.
    /// - Something orders two accesses to an element of which one writes.
    #[inline(always)]
    #[must_use]
    pub const unsafe fn new(address: u64, len: u64) -> Self {
        Self { address, len, element: PhantomData }
    }

    /// Elements of the view.
    #[inline(always)]
    #[must_use]
    pub const fn len(self) -> u64 {
        self.len
    }

    /// Whether the view has no element.
    #[inline(always)]
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The view without its first `count` elements; empty if it has no more.
    #[inline(always)]
    #[must_use]
    pub const fn skip(self, count: u64) -> Self {
        Self {
            address: self.address_of(count),
            len: self.len.saturating_sub(count),
            element: PhantomData,
        }
    }

    /// Address of element `index`, for instructions that take one.
    #[inline(always)]
    #[must_use]
    pub const fn address_of(self, index: u64) -> u64 {
        self.address + index.wrapping_mul(T::BYTES as u64)
    }

    /// Reads element `index`.
    #[inline(always)]
    #[must_use]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn read(self, index: u64) -> T {
        self.read_as::<T>(index)
    }

    /// Reads a `V` (a vector, or the bits of several elements) at element `index`.
    #[inline(always)]
    #[must_use]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn read_as<V: Memory>(self, index: u64) -> V {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: `new` asks that every index is in bounds.
        unsafe {
            V::ld_global(self.address_of(index))
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            let from = self.check::<V>(index, GlobalAccess::Read, Location::caller()) as *const V;
            // SAFETY: bounds and alignment are checked, and the memory is allocated, as `new` asks.
            unsafe { from.read() }
        }
    }

    /// Checks an access of a `V` at `index`, counts it, and returns its address.
    #[cfg(not(target_arch = "nvptx64"))]
    #[inline(always)]
    pub(crate) fn check<V: Memory>(
        self,
        index: u64,
        kind: GlobalAccess,
        at: &'static Location<'static>,
    ) -> u64 {
        let address = self.check_place(index, u64::from(V::BYTES), V::BYTES, kind, at);
        current::checked(|b| b.access_global(kind, address, u64::from(V::BYTES), at));
        address
    }

    /// Checks that `bytes` bytes from `index` on are in bounds and begin at a multiple of `alignment`;
    /// returns their address.
    #[cfg(not(target_arch = "nvptx64"))]
    #[inline(always)]
    pub(crate) fn check_place(
        self,
        index: u64,
        bytes: u64,
        alignment: u32,
        kind: GlobalAccess,
        at: &'static Location<'static>,
    ) -> u64 {
        let address = self.address_of(index);
        // In units of the access, so that nothing can overflow.
        if index >= self.len || (self.len - index) * u64::from(T::BYTES) < bytes {
            let this = current::with(|b| b.site(at));
            let (space, what, len) = ("global", kind.name(), self.len);
            current::fail(FaultKind::OutOfBounds { space, what, index, len, this });
        }
        if address % u64::from(alignment) != 0 {
            let this = current::with(|b| b.site(at));
            let (space, what) = ("global", kind.name());
            let bytes = alignment;
            current::fail(FaultKind::Misaligned { space, what, address, bytes, this });
        }
        address
    }
}

impl Global<u32> {
    /// Element `index` where `condition` holds, else `otherwise`: without a branch, so that a condition
    /// that is constant leaves only the chosen side.
    #[inline(always)]
    #[must_use]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn read_if(self, condition: bool, index: u64, otherwise: u32) -> u32 {
        #[cfg(target_arch = "nvptx64")]
        {
            let value;
            // SAFETY: `new` asks that every index is in bounds.
            unsafe {
                core::arch::asm!(
                    "{{ .reg .pred chosen; setp.ne.u32 chosen, {3}, 0;",
                    "mov.b32 {0}, {2}; @chosen ld.global.b32 {0}, [{1}]; }}",
                    out(reg32) value, in(reg64) self.address_of(index), in(reg32) otherwise,
                    in(reg32) u32::from(condition), options(pure, readonly, nostack)
                );
            }
            value
        }
        #[cfg(not(target_arch = "nvptx64"))]
        if condition { self.read(index) } else { otherwise }
    }
}

impl<T: Memory> GlobalMut<T> {
    /// A view of `len` elements at `address`.
    ///
    /// # Safety
    /// As for [`Global::new`], and the memory must be writable.
    #[inline(always)]
    #[must_use]
    pub const unsafe fn new(address: u64, len: u64) -> Self {
        // SAFETY: the memory is as `Global::new` asks, as stated above.
        Self(unsafe { Global::new(address, len) })
    }

    /// The same memory, for reading.
    #[inline(always)]
    #[must_use]
    pub const fn as_global(self) -> Global<T> {
        self.0
    }

    /// Elements of the view.
    #[inline(always)]
    #[must_use]
    pub const fn len(self) -> u64 {
        self.0.len
    }

    /// Whether the view has no element.
    #[inline(always)]
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0.len == 0
    }

    /// Address of element `index`, for instructions that take one.
    #[inline(always)]
    #[must_use]
    pub const fn address_of(self, index: u64) -> u64 {
        self.0.address_of(index)
    }

    /// Reads element `index`.
    #[inline(always)]
    #[must_use]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn read(self, index: u64) -> T {
        self.0.read_as::<T>(index)
    }

    /// Writes element `index`.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn write(self, index: u64, value: T) {
        self.write_as::<T>(index, value);
    }

    /// Writes a `V` (a vector, or the bits of several elements) at element `index`.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn write_as<V: Memory>(self, index: u64, value: V) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: `new` asks that every index is in bounds.
        unsafe {
            V::st_global(self.address_of(index), value);
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            let to = self.0.check::<V>(index, GlobalAccess::Write, Location::caller()) as *mut V;
            // SAFETY: bounds and alignment are checked, and the memory is allocated, as `new` asks.
            unsafe { to.write(value) };
        }
    }
}
