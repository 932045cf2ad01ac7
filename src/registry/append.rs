//! Appending to a cache as an operation: new keys and values take their places, rotated on the way.

use kernels_gpu::{
    args::{self, AppendShape},
    decode::decode_append,
};

use super::{
    Call, Draft, Operation, Spec, Step,
    decode::{Decode, scale_args},
    tensors::{Region, View},
};
use crate::{
    backend::{Constants, KernelArgs as _},
    dtype::DType,
    error::Error,
    problem::Problem,
    registry::attention,
};

/// Rotary embedding of keys and queries: it turns pairs of columns by an angle that grows with the
/// position. The caller gives the angles as tables of cosines and sines, f32
/// `[positions, dim / 2]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotary {
    /// Columns to rotate, from the first on: a multiple of 16.
    pub dim: usize,
    /// Positions with angles: at least as many as a sequence may have keys.
    pub positions: usize,
    /// Whether pairs are neighbours, columns `2 c` and `2 c + 1`; otherwise `c` and `c + dim / 2`.
    pub interleaved: bool,
}

impl Rotary {
    /// The usual cosines and sines: pair `c` turns by `position * base^(-2 c / dim)`. `[positions, dim / 2]` each.
    #[must_use]
    pub fn tables(&self, base: f64) -> [Vec<f32>; 2] {
        let half = self.dim / 2;
        let angle = |at: usize| {
            let (position, c) = (at / half, at % half);
            position as f64 * base.powf(-2.0 * c as f64 / self.dim as f64)
        };
        let angles = || (0..self.positions * half).map(angle);
        [angles().map(|a| a.cos() as f32).collect(), angles().map(|a| a.sin() as f32).collect()]
    }
}

/// New tokens for the cache of a [`Decode`]: as many per sequence as the decode's problem has
/// queries. The lengths of a call already count them, so the decode that follows attends to them. A
/// token with a position below 0 is skipped.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Append {
    decode: Decode,
    rotary: Option<Rotary>,
}

impl Append {
    /// Keys and values as they are, or rounded to the codes of a cache in e4m3.
    #[must_use]
    pub const fn new(decode: Decode) -> Self {
        Self { decode, rotary: None }
    }

    /// Keys, and queries where a call gives them, are rotated.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] for a number of columns that is not a multiple of 16 or is too
    /// large, and for fewer positions than a sequence may have keys.
    pub fn rotary(mut self, rotary: Rotary) -> Result<Self, Error> {
        let p = self.decode.problem();
        let Rotary { dim, positions, .. } = rotary;
        if dim == 0 || !dim.is_multiple_of(16) || dim > p.head_dim() {
            return Err(Error::InvalidValue {
                what: "rotated columns",
                given: dim.to_string(),
                remedy: format!("they must be a multiple of 16, from 16 to {}", p.head_dim()),
            });
        }
        if positions < p.seq_k() {
            return Err(Error::InvalidValue {
                what: "positions of a rotary embedding",
                given: positions.to_string(),
                remedy: format!("a sequence may have {}", p.seq_k()),
            });
        }
        self.rotary = Some(rotary);
        Ok(self)
    }

    /// The decode whose cache receives the tokens.
    #[must_use]
    pub const fn decode(&self) -> &Decode {
        &self.decode
    }
}

/// A kernel that appends.
pub type AppendSpec = Spec<Append>;

/// The tensors of one call that appends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AppendArgs {
    new: [View; 2],
    cache: [View; 2],
    seqused_k: Option<Region>,
    page_table: Option<Region>,
    queries: Option<[View; 2]>,
    angles: Option<[Region; 2]>,
    scales: Option<[Region; 2]>,
}

impl AppendArgs {
    /// New keys and values, `[B, Hkv, Nnew, D]` seen through strides, and the cache's.
    #[must_use]
    pub const fn new(new: [View; 2], cache: [View; 2]) -> Self {
        let (seqused_k, page_table, queries, angles, scales) = (None, None, None, None, None);
        Self { new, cache, seqused_k, page_table, queries, angles, scales }
    }

    /// Keys of each sequence, including the new ones: i32 `[B]`. Without it, all sequences have the
    /// problem's number of keys.
    #[must_use]
    pub const fn seqused_k(mut self, lengths: Region) -> Self {
        self.seqused_k = Some(lengths);
        self
    }

    /// The pages of each sequence, i32 `[B, max_pages]`. No two sequences may have the same place for a new key.
    #[must_use]
    pub const fn page_table(mut self, table: Region) -> Self {
        self.page_table = Some(table);
        self
    }

    /// Queries of the new tokens, `[B, H, Nnew, D]`, and the destination of the rotated queries,
    /// which may be the same memory.
    #[must_use]
    pub const fn queries(mut self, q: View, rotated: View) -> Self {
        self.queries = Some([q, rotated]);
        self
    }

    /// Cosines and sines, f32 `[positions, dim / 2]`.
    #[must_use]
    pub const fn angles(mut self, cos: Region, sin: Region) -> Self {
        self.angles = Some([cos, sin]);
        self
    }

    /// Scales of a cache in e4m3, f32 `[Hkv]` each: a code is the one nearest to a value divided by the scale of
    /// its head, ties to even, and at most 448.
    #[must_use]
    pub const fn scales(mut self, k: Region, v: Region) -> Self {
        self.scales = Some([k, v]);
        self
    }
}

impl Operation for Append {
    type Args = AppendArgs;
    type Limits = ();

    fn kernels() -> &'static [AppendSpec] {
        APPEND_KERNELS
    }

    fn dtype(&self) -> DType {
        self.decode.problem().dtype()
    }

    fn obstacle(&self, _: &()) -> Option<String> {
        self.decode.odd_columns()
    }

    fn check(&self, args: &AppendArgs) -> Result<(), Error> {
        let (p, decode) = (self.decode.problem(), &self.decode);
        let [q, k, v, _] = attention::extents(p);
        let new = |[batch, heads, _, columns]: [usize; 4]| [batch, heads, p.seq_q(), columns];
        let AppendArgs { new: [k_new, v_new], cache, seqused_k, page_table, .. } = args;
        let AppendArgs { queries, angles, scales, .. } = args;
        k_new.check("k_new", p.dtype(), new(k))?;
        v_new.check("v_new", p.dtype(), new(v))?;
        for (what, view, extents) in
            [("k", cache[0], decode.k_extents()), ("v", cache[1], decode.v_extents())]
        {
            view.check(what, decode.stored(), extents)?;
            view.check_distinct(what, extents)?;
        }
        decode.check_scales(*scales)?;
        if let Some([from, to]) = queries {
            from.check("q", p.dtype(), q)?;
            to.check("q_rotated", p.dtype(), q)?;
            to.check_distinct("q_rotated", q)?;
        }
        decode.check_numbers(*seqused_k, *page_table)?;
        match (self.rotary, angles) {
            (Some(Rotary { dim, positions, .. }), Some([cos, sin])) => {
                let bytes = (positions * dim / 2 * 4) as u64;
                cos.check("cos", bytes, 4)?;
                sin.check("sin", bytes, 4)
            }
            (Some(_), None) => Err(Error::MissingTensor {
                what: "cos".into(),
                context: ": keys are rotated".into(),
            }),
            (None, Some(_)) => Err(Error::UnexpectedTensor { what: "cos".into() }),
            (None, None) => Ok(()),
        }
    }
}

/// Every kernel that appends.
pub static APPEND_KERNELS: &[AppendSpec] = &[AppendSpec {
    name: "append",
    summary: "new keys and values take their places in a cache, rotated on the way",
    idea: "one block per token",
    dtypes: &[DType::F16, DType::BF16],
    capability: (8, 0),
    exact_capability: false,
    limits: (),
    draft: |append, _| {
        let p = append.decode.problem();
        let tokens = u32::try_from(p.batch() * p.seq_q()).unwrap_or(u32::MAX);
        let codes = append.decode.has_scales();
        let entries = if codes { decode_append::E4M3 } else { decode_append::ENTRIES };
        let step = Step {
            constants: Constants { page: append.decode.page(), ..Constants::default() },
            grid: tokens.into(),
            ..Step::new(entries, p.dtype(), 0, args)?
        };
        Ok(Draft::from(step))
    },
}];

/// The arguments of a call, as bytes.
fn args(call: &Call<'_, Append>) -> Vec<u8> {
    let &AppendArgs { new, cache, seqused_k, page_table, queries, angles, scales } = call.args;
    let Append { decode, rotary } = call.problem;
    let p: &Problem = decode.problem();
    let [q, q_rotated] = queries.unwrap_or_default();
    let [cos, sin] = angles.unwrap_or_default();
    args::AppendArgs {
        k_new: new[0].arg(),
        v_new: new[1].arg(),
        q: q.arg(),
        q_rotated: q_rotated.arg(),
        k: cache[0].arg(),
        v: cache[1].arg(),
        cache: decode.cache_args(seqused_k, page_table),
        cos: cos.arg(),
        sin: sin.arg(),
        shape: AppendShape {
            seq_new: p.seq_q() as u32,
            seq_k: p.seq_k() as u32,
            heads: if queries.is_some() { p.heads() as u32 } else { 0 },
            kv_heads: p.kv_heads() as u32,
            head_dim: p.head_dim() as u32,
            head_dim_v: p.head_dim_v() as u32,
            rotary_dim: rotary.map_or(0, |rotary| rotary.dim as u32),
            positions: rotary.map_or(0, |rotary| rotary.positions as u32),
            interleaved: rotary.is_some_and(|rotary| rotary.interleaved).into(),
            padding: 0,
        },
        scales: scale_args(scales),
    }
    .to_launch_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_rotations_are_named() {
        let p = Problem::builder(1, 2, 1, 64).seq_k(100).dtype(DType::F16).build().unwrap();
        let append = Append::new(Decode::new(p));
        let text = |dim, positions| {
            append.rotary(Rotary { dim, positions, interleaved: false }).unwrap_err().to_string()
        };
        assert!(text(24, 100).contains("rotated columns = 24"));
        assert!(text(80, 100).contains("from 16 to 64"));
        assert!(text(64, 99).contains("a sequence may have 100"));
    }

    #[test]
    fn angles_are_those_of_the_definition() {
        let [cos, sin] = Rotary { dim: 16, positions: 3, interleaved: false }.tables(10_000.0);
        assert_eq!((cos.len(), cos[0], sin[0]), (24, 1.0, 0.0));
        let angle = 2.0 * 10_000f64.powf(-6.0 / 16.0);
        assert_eq!((cos[16 + 3], sin[16 + 3]), (angle.cos() as f32, angle.sin() as f32));
    }
}
