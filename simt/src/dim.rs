//! Extents of grids and blocks.

/// A three-dimensional extent or index; x is fastest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Dim3 {
    /// First, fastest dimension.
    pub x: u32,
    /// Second dimension.
    pub y: u32,
    /// Third, slowest dimension.
    pub z: u32,
}

impl Dim3 {
    /// An extent of `x` by `y` by `z`.
    #[must_use]
    pub const fn new(x: u32, y: u32, z: u32) -> Self {
        Self { x, y, z }
    }

    /// How many indices it spans.
    #[must_use]
    pub const fn count(self) -> u64 {
        self.x as u64 * self.y as u64 * self.z as u64
    }

    /// The index of the `i`-th element, x fastest.
    #[must_use]
    pub const fn unravel(self, i: u64) -> Self {
        let (x, y) = (self.x as u64, self.y as u64);
        Self { x: (i % x) as u32, y: (i / x % y) as u32, z: (i / x / y) as u32 }
    }
}

impl From<u32> for Dim3 {
    fn from(x: u32) -> Self {
        Self::new(x, 1, 1)
    }
}
