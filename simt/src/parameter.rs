//! The parameter of an entry as memory: where the copy engine reads tensor maps from.

/// Address of the parameter of the entry that runs.
///
/// On a GPU it is the parameter's own address in constant memory. The address of a reference
/// would not do: the compiler would copy the parameter to local memory, to have one. PTX names
/// a parameter after its entry, which inlined code does not know, so that a marker stands for
/// the name and the PTX builder puts the name in. Under the emulator it is the address of
/// `parameter`.
///
/// # Safety
/// `parameter` must be the only parameter of the entry that runs.
#[inline(always)]
#[must_use]
pub unsafe fn address<T>(parameter: &T) -> u64 {
    #[cfg(target_arch = "nvptx64")]
    {
        let _ = parameter;
        let address;
        // SAFETY: the caller states that the entry has this parameter; nothing is accessed.
        unsafe {
            core::arch::asm!(
                "mov.b64 {0}, simt_parameter; cvta.param.u64 {0}, {0};",
                out(reg64) address,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        address
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        core::ptr::from_ref(parameter).expose_provenance() as u64
    }
}
