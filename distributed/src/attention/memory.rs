//! Tensors and sections of a workspace.

use std::ops::Range;

use flash_attention::{
    problem::Layout,
    raw::{Region, View},
};

/// Sections are aligned as allocations of the driver are.
const ALIGNMENT: u64 = 256;

/// Places sections one after the other.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Arena(u64);

impl Arena {
    /// One that begins where another ends.
    pub(super) const fn after(end: u64) -> Self {
        Self(end)
    }

    /// The place of a section.
    pub(super) const fn take(&mut self, bytes: u64) -> u64 {
        let at = self.0;
        self.0 = (at + bytes).next_multiple_of(ALIGNMENT);
        at
    }

    pub(super) const fn end(self) -> u64 {
        self.0
    }
}

/// A contiguous tensor `[B, H, N, D]`, or `[B, N, H, D]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub batch: usize,
    pub heads: usize,
    pub rows: usize,
    pub columns: usize,
    /// Bytes of an element.
    pub size: usize,
    pub tokens_first: bool,
}

impl Shape {
    pub(super) const fn bytes(self) -> u64 {
        (self.batch * self.heads * self.rows * self.columns * self.size) as u64
    }

    pub(super) const fn region(self, address: u64) -> Region {
        Region::new(address, self.bytes())
    }

    /// The same with as many rows.
    pub(super) const fn with_rows(self, rows: usize) -> Self {
        Self { rows, ..self }
    }

    /// The same in f32.
    pub(super) const fn in_f32(self) -> Self {
        Self { size: 4, ..self }
    }

    /// Some of its rows.
    pub(super) fn view(self, address: u64, rows: &Range<usize>) -> View {
        let layout = if self.tokens_first { Layout::TokensFirst } else { Layout::HeadsFirst };
        let strides = layout.strides(self.heads, self.rows, self.columns).map(|s| s as u64);
        let skipped = rows.start as u64 * strides[2] * self.size as u64;
        View::new(Region::new(address + skipped, self.bytes() - skipped), strides)
    }

    pub(super) fn whole(self, address: u64) -> View {
        self.view(address, &(0..self.rows))
    }

    /// Extents `[B, H, N, D]` of some rows.
    pub(super) fn extents(self, rows: &Range<usize>) -> [usize; 4] {
        [self.batch, self.heads, rows.len(), self.columns]
    }
}
