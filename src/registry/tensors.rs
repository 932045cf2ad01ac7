//! Memory and tensors of a call, and their checks.

use kernels_gpu::args;

use crate::{dtype::DType, error::Error, problem::Layout};

/// Addresses of tensors, and the strides from row to row, are multiples of this number of bytes:
/// kernels read and write 16 bytes at a time.
pub const ALIGNMENT: u64 = 16;

/// A region of device memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// Device address of the first byte.
    pub address: u64,
    /// Length in bytes.
    pub bytes: u64,
}

impl Region {
    /// `bytes` bytes at `address`.
    #[must_use]
    pub const fn new(address: u64, bytes: u64) -> Self {
        Self { address, bytes }
    }

    /// The region in the kernels' form.
    pub(super) const fn arg(self) -> args::Buffer {
        args::Buffer { address: self.address, bytes: self.bytes }
    }

    /// The `bytes` bytes at `offset` of this region.
    pub(crate) const fn part(self, offset: u64, bytes: u64) -> Self {
        Self { address: self.address + offset, bytes }
    }

    /// Checks the address, and that the region has at least `needed` bytes.
    pub(super) fn check(
        self,
        what: &'static str,
        needed: u64,
        alignment: u64,
    ) -> Result<(), Error> {
        let wrong = |given, remedy| Err(Error::InvalidValue { what, given, remedy });
        if self.bytes < needed {
            let remedy = format!("the problem needs {needed} bytes");
            return wrong(format!("{} bytes", self.bytes), remedy);
        }
        check_address(what, self.address, needed, alignment)
    }
}

/// A tensor in device memory, `[B, H, N, D]` seen through strides; a row's D elements are
/// contiguous.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// The memory, from the first element on.
    pub region: Region,
    /// Elements from one batch entry, head and row to the next.
    pub strides: [u64; 3],
}

impl View {
    /// A view with strides `[batch, head, row]`, in elements.
    #[must_use]
    pub const fn new(region: Region, strides: [u64; 3]) -> Self {
        Self { region, strides }
    }

    /// A contiguous tensor of `seq` rows per head, in the order of the problem's layout.
    #[must_use]
    pub fn contiguous(region: Region, layout: Layout, heads: usize, seq: usize, d: usize) -> Self {
        Self { region, strides: layout.strides(heads, seq, d).map(|stride| stride as u64) }
    }

    pub(super) const fn arg(self) -> args::Tensor {
        let [stride_b, stride_h, stride_n] = self.strides;
        args::Tensor { buffer: self.region.arg(), stride_b, stride_h, stride_n }
    }

    /// Checks the view of a tensor with extents `[B, H, N, D]`.
    pub(super) fn check(
        &self,
        what: &'static str,
        dtype: DType,
        extents: [usize; 4],
    ) -> Result<(), Error> {
        let wrong = |given, remedy| Err(Error::InvalidValue { what, given, remedy });
        let size = dtype.size() as u64;
        let [_, _, _, d] = extents.map(|extent| extent as u64);
        if extents.contains(&0) {
            return Ok(());
        }
        let mut last = Some(d);
        for ((name, stride), extent) in
            ["batch", "head", "row"].iter().zip(self.strides).zip(extents)
        {
            if extent > 1 && stride.wrapping_mul(size) % ALIGNMENT != 0 {
                let unit = ALIGNMENT / size;
                let remedy =
                    format!("kernels need a multiple of {unit} elements from {name} to {name}");
                return wrong(format!("a {name} stride of {stride}"), remedy);
            }
            let far = stride.checked_mul(extent as u64 - 1);
            last = last.zip(far).and_then(|(last, far)| last.checked_add(far));
        }
        match last.and_then(|last| last.checked_mul(size)) {
            Some(needed) if needed <= self.region.bytes => {
                check_address(what, self.region.address, needed, ALIGNMENT)
            }
            needed => wrong(
                format!("{} bytes with strides {:?}", self.region.bytes, self.strides),
                needed.map_or_else(
                    || "the last element lies beyond 2^64 bytes".into(),
                    |needed| format!("the last element ends at byte {needed}"),
                ),
            ),
        }
    }

    /// Checks that no two elements of an output tensor share memory.
    pub(super) fn check_distinct(
        &self,
        what: &'static str,
        extents: [usize; 4],
    ) -> Result<(), Error> {
        let [b, h, n, d] = extents.map(|extent| extent as u64);
        let mut steps: Vec<_> =
            self.strides.into_iter().zip([b, h, n]).filter(|&(_, extent)| extent > 1).collect();
        steps.sort_unstable();
        // Elements from the first to past the last of what the smaller strides lead to.
        let mut span = d;
        for (stride, extent) in steps {
            if stride < span {
                return Err(Error::InvalidValue {
                    what,
                    given: format!("strides {:?}", self.strides),
                    remedy: format!(
                        "rows overlap: a stride of {stride} steps over {span} elements"
                    ),
                });
            }
            span += stride * (extent - 1);
        }
        Ok(())
    }
}

/// A bias in device memory, `[B, H, Nq, Nk]` seen through strides; a stride of 0 repeats the
/// elements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BiasView {
    /// The memory, from the first element on.
    pub region: Region,
    /// Elements from one batch entry, head, row and key to the next.
    pub strides: [u64; 4],
}

impl BiasView {
    /// A view with strides `[batch, head, row, key]`, in elements.
    #[must_use]
    pub const fn new(region: Region, strides: [u64; 4]) -> Self {
        Self { region, strides }
    }

    /// A contiguous tensor `[B or 1, H or 1, Nq, Nk]`.
    #[must_use]
    pub fn contiguous(region: Region, shape: [usize; 4]) -> Self {
        let [_, heads, rows, keys] = shape.map(|extent| extent as u64);
        Self { region, strides: [heads * rows * keys, rows * keys, keys, 1] }
    }

    /// The view with stride 0 over the dimensions of which the extents `[B, H, Nq, Nk]` have one.
    pub(super) fn within(self, extents: [usize; 4]) -> Self {
        let step = |d: usize| if extents[d] > 1 { self.strides[d] } else { 0 };
        Self { strides: std::array::from_fn(step), ..self }
    }

    pub(super) const fn arg(self) -> args::Bias {
        let [stride_b, stride_h, stride_q, stride_k] = self.strides;
        args::Bias { buffer: self.region.arg(), stride_b, stride_h, stride_q, stride_k }
    }

    /// Checks the view of a bias with extents `[B, H, Nq, Nk]`.
    pub(super) fn check(&self, dtype: DType, extents: [usize; 4]) -> Result<(), Error> {
        if extents.contains(&0) {
            return Ok(());
        }
        let last = self.strides.iter().zip(extents).try_fold(0u64, |last, (&stride, extent)| {
            stride.checked_mul(extent as u64 - 1)?.checked_add(last)
        });
        let size = dtype.size() as u64;
        let Some(needed) = last.and_then(|last| last.checked_add(1)?.checked_mul(size)) else {
            return Err(Error::InvalidValue {
                what: "bias",
                given: format!("strides {:?}", self.strides),
                remedy: "the last element lies beyond 2^64 bytes".into(),
            });
        };
        self.region.check("bias", needed, size)
    }
}

fn check_address(
    what: &'static str,
    address: u64,
    bytes: u64,
    alignment: u64,
) -> Result<(), Error> {
    let wrong =
        |remedy| Err(Error::InvalidValue { what, given: format!("address {address:#x}"), remedy });
    if bytes == 0 {
        return Ok(());
    }
    if address == 0 {
        return wrong("it must be the device address of the tensor".into());
    }
    if !address.is_multiple_of(alignment) {
        return wrong(format!("it must be a multiple of {alignment}"));
    }
    if address.checked_add(bytes).is_none() {
        return wrong("the tensor would end beyond 2^64".into());
    }
    Ok(())
}
