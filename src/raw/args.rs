//! The tensors of a call, and what can be wrong with them.

use kernels_gpu::args;

use super::ALIGNMENT;
use crate::{
    dtype::DType,
    error::Error,
    problem::{Layout, Problem},
};

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

    /// The region as kernels are given it.
    pub(crate) const fn arg(self) -> args::Buffer {
        args::Buffer { address: self.address, bytes: self.bytes }
    }

    /// The `bytes` bytes at `offset` of this region.
    pub(crate) const fn part(self, offset: u64, bytes: u64) -> Self {
        Self { address: self.address + offset, bytes }
    }

    /// Checks the address and that there are at least `needed` bytes.
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

    /// Checks the view of a tensor with those extents `[B, H, N, D]`.
    fn check(&self, what: &'static str, dtype: DType, extents: [usize; 4]) -> Result<(), Error> {
        let wrong = |given, remedy| Err(Error::InvalidValue { what, given, remedy });
        let size = dtype.size() as u64;
        let [_, _, _, d] = extents.map(|extent| extent as u64);
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

    /// Checks that no two elements of a tensor that is written share memory.
    fn check_distinct(&self, what: &'static str, extents: [usize; 4]) -> Result<(), Error> {
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

/// The tensors of one call of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Args {
    pub(super) q: View,
    pub(super) k: View,
    pub(super) v: View,
    pub(super) o: View,
    pub(super) lse: Option<Region>,
    pub(super) mask: Option<Region>,
    pub(super) workspace: Region,
}

impl Args {
    /// Queries, keys, values and the output; no LSE, no mask, no workspace.
    #[must_use]
    pub const fn new(q: View, k: View, v: View, o: View) -> Self {
        Self { q, k, v, o, lse: None, mask: None, workspace: Region::new(0, 0) }
    }

    /// The log-sum-exp is wanted here: f32 `[B, H, Nq]`, natural log.
    #[must_use]
    pub const fn lse(mut self, lse: Region) -> Self {
        self.lse = Some(lse);
        self
    }

    /// The padding mask: u8 `[B, Nk]`, 0 = hidden.
    #[must_use]
    pub const fn mask(mut self, mask: Region) -> Self {
        self.mask = Some(mask);
        self
    }

    /// The workspace of this call: see [`Plan::workspace_bytes`](super::Plan::workspace_bytes).
    #[must_use]
    pub const fn workspace(mut self, workspace: Region) -> Self {
        self.workspace = workspace;
        self
    }

    /// Compares the tensors with a problem.
    pub(super) fn check(&self, p: &Problem) -> Result<(), Error> {
        let extents = |seq| [p.batch(), p.heads(), seq, p.head_dim()];
        let (q, k) = (extents(p.seq_q()), extents(p.seq_k()));
        for (what, view, extents) in
            [("q", self.q, q), ("k", self.k, k), ("v", self.v, k), ("o", self.o, q)]
        {
            view.check(what, p.dtype(), extents)?;
        }
        self.o.check_distinct("o", q)?;
        if let Some(lse) = self.lse {
            lse.check("lse", p.rows() as u64 * 4, 4)?;
        }
        match self.mask {
            None if p.has_mask() => Err(Error::MissingTensor {
                what: "mask".into(),
                context: ": the problem has a padding mask".into(),
            }),
            Some(_) if !p.has_mask() => Err(Error::UnexpectedTensor { what: "mask".into() }),
            Some(mask) => mask.check("mask", (p.batch() * p.seq_k()) as u64, 1),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem() -> Problem {
        Problem::builder(2, 3, 5, 32).seq_k(7).dtype(DType::F16).build().unwrap()
    }

    fn view(address: u64, seq: usize) -> View {
        let region = Region::new(address, 2 * 3 * seq as u64 * 32 * 2);
        View::contiguous(region, Layout::HeadsFirst, 3, seq, 32)
    }

    fn good() -> Args {
        Args::new(view(0x1000, 5), view(0x2000, 7), view(0x4000, 7), view(0x8000, 5))
    }

    fn message(args: Args) -> String {
        let error = args.check(&problem()).unwrap_err();
        assert!(error.is_usage());
        error.to_string()
    }

    #[test]
    fn what_is_wrong_with_an_argument_is_named() {
        good().check(&problem()).unwrap();
        let with_q = |q| Args { q, ..good() };
        let strides = |strides| View { strides, ..good().q };
        assert!(message(with_q(strides([480, 160, 33]))).contains("q = a row stride of 33"));
        let text = message(with_q(strides([480, 160, 40])));
        assert!(text.contains("the last element ends at byte 1984"), "{text}");
        assert!(message(with_q(strides([u64::MAX / 16 * 16, 160, 32]))).contains("2^64"));
        let at = |address| View { region: Region { address, ..good().q.region }, ..good().q };
        assert!(message(with_q(at(0))).contains("q = address 0x0"));
        assert!(message(with_q(at(0x1008))).contains("a multiple of 16"));
        let short = View { region: Region::new(0x2000, 100), ..good().k };
        assert!(message(Args { k: short, ..good() }).contains("k = 100 bytes"));
        // Inputs may share rows, the output may not.
        let shared = View { strides: [480, 0, 32], ..good().q };
        with_q(shared).check(&problem()).unwrap();
        assert!(message(Args { o: shared, ..good() }).contains("o = strides [480, 0, 32]"));
        let lse = Region::new(0x9000, 2 * 3 * 5 * 4);
        good().lse(lse).check(&problem()).unwrap();
        assert!(message(good().lse(Region { bytes: 119, ..lse })).contains("needs 120 bytes"));
        assert!(message(good().lse(Region { address: 0x9002, ..lse })).contains("a multiple of 4"));
        assert!(message(good().mask(lse)).contains("mask"));
        let masked = problem().to_builder().mask(true).build().unwrap();
        assert!(good().check(&masked).unwrap_err().to_string().contains("mask is missing"));
        let error = good().mask(Region::new(0x9000, 13)).check(&masked).unwrap_err().to_string();
        assert!(error.contains("needs 14 bytes"), "{error}");
    }
}
