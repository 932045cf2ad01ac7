//! Shared memory: views of the block's dynamic shared memory and of static arrays.
//!
//! A view is a 32-bit address in the shared window and a length. The crate that holds
//! the kernels invokes [`declare_dynamic_shared!`](crate::declare_dynamic_shared) once, at
//! its root; [`Shared::dynamic`] then carves views out of the launch's shared memory.

use core::marker::PhantomData;

#[cfg(not(target_arch = "nvptx64"))]
use std::panic::Location;

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator::{FaultKind, block, current};
use crate::memory::Memory;

/// Declares the dynamic shared memory of all kernels of a crate. It is aligned to 1024
/// bytes, as the 128-byte swizzle of TMA and wgmma needs.
#[macro_export]
macro_rules! declare_dynamic_shared {
    () => {
        #[cfg(target_arch = "nvptx64")]
        core::arch::global_asm!(".extern .shared .align 1024 .b8 simt_dynamic_shared[];");
    };
}

/// A static shared array of the block: `shared_array!(f32; 256)` is a
/// [`Shared<f32>`](crate::shared::Shared) of 256 elements. Each place in the source is an
/// array of its own, also when the function around it is generic.
#[macro_export]
macro_rules! shared_array {
    ($type:ty; $len:expr) => {{
        const BYTES: usize = size_of::<$type>() * $len;
        static KEY: u8 = 0;
        #[cfg(target_arch = "nvptx64")]
        let address = {
            let address: u32;
            // SAFETY: declares an array in the entry and takes its address.
            unsafe {
                core::arch::asm!(
                    "{{ .shared .align 16 .b8 simt_array[{bytes}]; mov.u32 {0}, simt_array; }}",
                    out(reg32) address, bytes = const BYTES, options(nomem, nostack)
                );
            }
            address
        };
        #[cfg(not(target_arch = "nvptx64"))]
        let address = $crate::shared::static_array(&raw const KEY, BYTES as u32);
        // SAFETY: the array is this view's own, and lives as long as the block.
        unsafe { $crate::shared::Shared::<$type>::from_raw(address, $len as u32) }
    }};
}

/// The address of a static array; for [`shared_array!`](crate::shared_array).
#[doc(hidden)]
#[cfg(not(target_arch = "nvptx64"))]
#[must_use]
pub fn static_array(key: *const u8, bytes: u32) -> u32 {
    current::with(|b| b.static_shared(key, bytes))
}

/// A view of `len` elements of shared memory.
#[derive(Debug)]
pub struct Shared<T> {
    address: u32,
    len: u32,
    element: PhantomData<T>,
}

impl<T> Clone for Shared<T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<T> {}

impl<T: Memory> Shared<T> {
    /// A view of `len` elements that begins `byte_offset` bytes into dynamic shared memory.
    ///
    /// # Safety
    /// - The launch gives dynamic shared memory up to the end of the view.
    /// - The offset is aligned for `T`.
    /// - Every index used later is below `len`. A vector ([`read_as`](Self::read_as)) is inside as a
    ///   whole, and aligned as a whole.
    /// - Barriers order two accesses of different lanes to an element of which one writes.
    #[inline(always)]
    #[must_use]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub unsafe fn dynamic(byte_offset: u32, len: u32) -> Self {
        #[cfg(target_arch = "nvptx64")]
        let base = {
            let base: u32;
            // SAFETY: takes the address of what `declare_dynamic_shared!` declares.
            unsafe {
                core::arch::asm!("mov.u32 {0}, simt_dynamic_shared;", out(reg32) base,
                    options(pure, nomem, nostack));
            }
            base
        };
        #[cfg(not(target_arch = "nvptx64"))]
        let base = {
            let at = Location::caller();
            current::checked(|b| {
                let end = u64::from(byte_offset) + u64::from(len) * u64::from(T::BYTES);
                let given = b.dynamic_shared_bytes();
                if end > given.into() {
                    return Err(FaultKind::Misuse {
                        message: format!(
                            "a view of dynamic shared memory up to byte {end}, where the launch gives {given}"
                        ),
                        this: b.site(at),
                    });
                }
                Ok(b.shared_window())
            })
        };
        Self { address: base + byte_offset, len, element: PhantomData }
    }

    /// A view of `len` elements at a shared address.
    ///
    /// # Safety
    /// - `len` elements at `address` are shared memory of the block, and aligned for `T`.
    /// - Indices and accesses are as [`dynamic`](Self::dynamic) asks.
    #[inline(always)]
    #[must_use]
    pub const unsafe fn from_raw(address: u32, len: u32) -> Self {
        Self { address, len, element: PhantomData }
    }

    /// Address of the first element in the shared window.
    #[inline(always)]
    #[must_use]
    pub const fn address(self) -> u32 {
        self.address
    }

    /// Elements of the view.
    #[inline(always)]
    #[must_use]
    pub const fn len(self) -> u32 {
        self.len
    }

    /// Whether the view has no element.
    #[inline(always)]
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The view of `len` elements from element `start` on.
    #[inline(always)]
    #[must_use]
    pub const fn slice(self, start: u32, len: u32) -> Self {
        Self { address: self.address + start * T::BYTES, len, element: PhantomData }
    }

    /// Address of element `index`, for instructions that take one.
    #[inline(always)]
    #[must_use]
    pub const fn address_of(self, index: u32) -> u32 {
        self.address + index * T::BYTES
    }

    /// Reads element `index`.
    #[inline(always)]
    #[must_use]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn read(self, index: u32) -> T {
        self.read_as::<T>(index)
    }

    /// Writes element `index`.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn write(self, index: u32, value: T) {
        self.write_as::<T>(index, value);
    }

    /// Reads a `V` (a vector, or the bits of several elements) at element `index`.
    #[inline(always)]
    #[must_use]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn read_as<V: Memory>(self, index: u32) -> V {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: `dynamic` and `from_raw` ask that every index is in bounds.
        unsafe {
            V::ld_shared(self.address_of(index))
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            let at = Location::caller();
            current::checked(|b| {
                self.check::<V>(b, index, "read", at)?;
                let from = b.shared_read(self.address_of(index), V::BYTES, at)?;
                // SAFETY: `shared_read` checked bounds and alignment.
                Ok(unsafe { from.cast::<V>().read() })
            })
        }
    }

    /// Writes a `V` (a vector, or the bits of several elements) at element `index`.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn write_as<V: Memory>(self, index: u32, value: V) {
        #[cfg(target_arch = "nvptx64")]
        // SAFETY: `dynamic` and `from_raw` ask that every index is in bounds.
        unsafe {
            V::st_shared(self.address_of(index), value);
        }
        #[cfg(not(target_arch = "nvptx64"))]
        {
            let at = Location::caller();
            current::checked(|b| {
                self.check::<V>(b, index, "write", at)?;
                let to = b.shared_write(self.address_of(index), V::BYTES, at)?;
                // SAFETY: `shared_write` checked bounds and alignment.
                unsafe { to.cast::<V>().write(value) };
                Ok(())
            });
        }
    }

    #[cfg(not(target_arch = "nvptx64"))]
    #[inline]
    pub(crate) fn check<V: Memory>(
        self,
        b: &block::Block,
        index: u32,
        what: &'static str,
        at: &'static Location<'static>,
    ) -> Result<(), FaultKind> {
        let end = u64::from(index) * u64::from(T::BYTES) + u64::from(V::BYTES);
        if end > u64::from(self.len) * u64::from(T::BYTES) {
            return Err(FaultKind::OutOfBounds {
                space: "shared",
                what,
                index: index.into(),
                len: self.len.into(),
                this: b.site(at),
            });
        }
        Ok(())
    }
}
