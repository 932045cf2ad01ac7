//! Which keys a query row sees: tails, the causal triangle, the padding mask.

use simt::global::Global;

use crate::args::AttentionArgs;

/// What hides keys from the rows of one head.
#[derive(Clone, Copy)]
pub struct Mask {
    seq_q: u32,
    seq_k: u32,
    causal: bool,
    padding: Option<Global<u8>>,
    padding_row: u64,
}

impl Mask {
    /// The mask of batch entry `b`.
    ///
    /// # Safety
    /// `args.mask` must be empty or hold `[B, Nk]` bytes.
    #[inline(always)]
    #[must_use]
    pub unsafe fn new(args: &AttentionArgs, b: u32) -> Self {
        // SAFETY: the mask holds `[B, Nk]` bytes.
        let padding = (!args.mask.is_empty()).then(|| unsafe { args.mask.view::<u8>() });
        Self {
            seq_q: args.seq_q,
            seq_k: args.seq_k,
            causal: args.causal != 0,
            padding,
            padding_row: b as u64 * args.seq_k as u64,
        }
    }

    /// Whether row `i` sees key `j`. Causal is aligned to the bottom right: the last
    /// row sees the last key, whatever the two lengths.
    #[inline(always)]
    #[must_use]
    pub fn sees(&self, i: u32, j: u32) -> bool {
        if j >= self.seq_k || (self.causal && j + self.seq_q > i + self.seq_k) {
            return false;
        }
        match self.padding {
            Some(padding) => padding.read(self.padding_row + j as u64) != 0,
            None => true,
        }
    }

    /// Whether row `i` sees any key.
    #[inline(always)]
    #[must_use]
    pub fn sees_any(&self, i: u32) -> bool {
        (0..self.end_of_keys(i + 1)).any(|j| self.sees(i, j))
    }

    /// The first key that no row below `end_i` sees, by position alone: tiles of keys
    /// from there on need not be visited.
    #[inline(always)]
    #[must_use]
    pub fn end_of_keys(&self, end_i: u32) -> u32 {
        if !self.causal {
            return self.seq_k;
        }
        // The last row, end_i - 1, sees j <= end_i - 1 + seq_k - seq_q.
        let last = if end_i < self.seq_q { end_i } else { self.seq_q };
        (last + self.seq_k).saturating_sub(self.seq_q).min(self.seq_k)
    }
}
