//! What a launch of an attention kernel fixes before the driver compiles its entry.
//!
//! [`Policy`](crate::parts::policy::Policy) reads these, and nothing else does: a kernel asks the
//! policy. What is off costs nothing, neither an instruction nor a register.

simt::specialisation_constants! {
    /// What a launch asks for beyond plain attention.
    pub struct Constants {
        /// 1: row `i` sees keys `j <= i + Nk - Nq` only. 0: every key.
        causal,
        /// 1: there is a padding mask.
        padding,
        /// 1: weights are dropped.
        dropout,
    }
}

#[cfg(not(target_arch = "nvptx64"))]
impl core::fmt::Display for Constants {
    /// What is on, `full` if nothing.
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let mut separator = "";
        for (name, value) in self.iter().filter(|&(_, value)| value != 0) {
            write!(f, "{separator}{name}")?;
            if value != 1 {
                write!(f, " {value}")?;
            }
            separator = ", ";
        }
        if separator.is_empty() { f.write_str("full") } else { Ok(()) }
    }
}
