//! The numbers that a launch of an attention kernel fixes before the driver compiles its entry.
//!
//! [`Policy`](crate::parts::policy::Policy) reads these, and [`Head`](crate::parts::head::Head) the
//! group and `varlen`: a kernel asks them. A feature that is off costs neither an instruction nor a
//! register.

simt::specialisation_constants! {
    /// The features of a launch beyond plain attention.
    pub struct Constants {
        /// Row `i` sees keys `j <= i + Nk - Nq` if 1, and `args.keys.right` more if 2. 0: every key.
        causal,
        /// 1: row `i` sees keys `j >= i + Nk - Nq - args.keys.left` only.
        left,
        /// 1: there is a padding mask.
        padding,
        /// 1: weights are dropped.
        dropout,
        /// Heads of Q that share one of K and V, if more than one.
        group,
        /// 1: scores are capped.
        softcap,
        /// 1: scores fall with the distance of row and key.
        alibi,
        /// 1: a matrix joins the scores.
        bias,
        /// 1: each head has a score without a key.
        sinks,
        /// 1: batch entries are sequences of lengths of their own, packed one after the other.
        varlen,
        /// Columns of Q and K, a multiple of 8, if fewer than the D that the entry is made for. The
        /// tensors then have this number of columns where a kernel says D.
        head_dim,
        /// Columns of V and O, likewise.
        head_dim_v,
        /// Keys of a page, where a decode kernel's cache is in pages.
        page,
        /// 1: the first step of a backward pass clears what gives the sums of dQ an order.
        ordered,
        /// 1: the cache of a decode is in e4m3, whose tiles have other numbers of keys.
        e4m3,
    }
}

#[cfg(not(target_arch = "nvptx64"))]
impl core::fmt::Display for Constants {
    /// The features that are on; `full` if none is.
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
