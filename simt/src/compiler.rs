//! Hints for the compiler, which are no instructions of the GPU.

/// The same value, of which the compiler knows nothing: the computation from it stays in
/// its place. LLVM moves whatever does not change in a loop in front of it, also what
/// only a rare branch needs, and a kernel that is short of registers pays for that with
/// spills. Costs no instruction.
#[inline(always)]
#[must_use]
pub fn opaque(value: u32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let same: u32;
        // SAFETY: a move between registers. Not `pure`, so that it is not moved itself.
        unsafe {
            core::arch::asm!("mov.b32 {0}, {1};", out(reg32) same, in(reg32) value,
                options(nomem, nostack));
        }
        same
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        value
    }
}
