//! A decode as attention of packed sequences, the input of the other references.

use crate::{
    dtype::DType,
    error::Error,
    problem::{Layout, Problem, Varlen},
    registry::Decode,
    session::{DecodeInputs, Inputs, Outputs},
    tensor::Tensor,
};

/// The queries of a decode and its sequences' keys and values, gathered from the cache, as
/// attention of packed sequences.
#[derive(Clone, Debug)]
pub struct Gathered<'a> {
    /// Attention of the sequences.
    pub problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: [Vec<u32>; 2],
    beside: Inputs<'a>,
}

impl<'a> Gathered<'a> {
    /// Gathers the data that a decode reads.
    ///
    /// # Errors
    /// As [`DecodeInputs::check`].
    pub fn new(decode: &Decode, inputs: &DecodeInputs<'a>) -> Result<Self, Error> {
        inputs.check(decode)?;
        let p = decode.problem();
        let lengths: Vec<usize> = (0..p.batch()).map(|b| inputs.length(decode, b)).collect();
        let starts = |lengths: &mut dyn Iterator<Item = usize>| {
            let ends = lengths.scan(0, |end, length| {
                *end += length as u32;
                Some(*end)
            });
            std::iter::once(0).chain(ends).collect::<Vec<u32>>()
        };
        let cu_seqlens = [
            starts(&mut std::iter::repeat_n(p.seq_q(), p.batch())),
            starts(&mut lengths.iter().copied()),
        ];
        let total_k = lengths.iter().sum();
        let longest = lengths.iter().copied().max().unwrap_or_default();
        let varlen = Varlen { total_q: p.batch() * p.seq_q(), total_k };
        let problem = p.to_builder().seq_k(longest).varlen(Some(varlen)).build()?;
        let gather = |tensor: &Tensor, extents, shape: [usize; 4], side: usize| {
            let gathered = gather(decode, inputs, tensor, extents, &shape)?;
            match inputs.scales {
                Some(scales) => scaled(&gathered, scales[side]),
                None => Ok(gathered),
            }
        };
        let k = gather(inputs.tensors.k, decode.k_extents(), problem.k_shape(), 0)?;
        let v = gather(inputs.tensors.v, decode.v_extents(), problem.v_shape(), 1)?;
        let q = tokens_first(p, inputs.tensors.q)?.reshaped(&problem.q_shape())?;
        Ok(Self { problem, q, k, v, cu_seqlens, beside: inputs.tensors })
    }

    /// The inputs of [`problem`](Self::problem).
    #[must_use]
    pub fn inputs(&self) -> Inputs<'_> {
        let [q, k] = &self.cu_seqlens;
        Inputs {
            q: &self.q,
            k: &self.k,
            v: &self.v,
            cu_seqlens_q: Some(q),
            cu_seqlens_k: Some(k),
            ..self.beside
        }
    }

    /// The outputs of a decode as the outputs of [`problem`](Self::problem).
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] where their shapes are not the shapes of `p`.
    pub fn outputs(&self, p: &Problem, outputs: &Outputs) -> Result<Outputs, Error> {
        let o = tokens_first(p, &outputs.o)?.reshaped(&self.problem.o_shape())?;
        // [B, H, Nq] to [H, B, Nq].
        let lse = outputs.lse.clone().reshaped(&[1, p.batch(), p.heads(), p.seq_q()])?;
        let lse = lse.swap_middle()?.reshaped(&self.problem.lse_shape())?;
        Ok(Outputs { o, lse, weights: None })
    }
}

/// A tensor of queries or outputs as `[B, N, H, D]`.
fn tokens_first(p: &Problem, tensor: &Tensor) -> Result<Tensor, Error> {
    match p.layout() {
        Layout::TokensFirst => Ok(tensor.clone()),
        Layout::HeadsFirst => tensor.swap_middle(),
    }
}

/// The sequences' rows of a cache, one sequence after the other: `[1, total_k, Hkv, D]`.
fn gather(
    decode: &Decode,
    inputs: &DecodeInputs<'_>,
    tensor: &Tensor,
    [_, heads, rows, columns]: [usize; 4],
    shape: &[usize],
) -> Result<Tensor, Error> {
    let p = decode.problem();
    let [stride_b, stride_h, stride_n] = p.layout().strides(heads, rows, columns);
    let size = decode.stored().size();
    let row_bytes = columns * size;
    let mut bytes = Vec::new();
    for b in 0..p.batch() {
        let table = inputs.pages_of(decode, b);
        for key in 0..inputs.length(decode, b) {
            let (entry, row) = match decode.pages() {
                Some(pages) => {
                    let page_size = pages.page_size as usize;
                    (table[key / page_size] as usize, key % page_size)
                }
                None => (b, key),
            };
            for h in 0..heads {
                let first = entry * stride_b + h * stride_h + row * stride_n;
                let first = first * size;
                bytes.extend_from_slice(&tensor.as_bytes()[first..first + row_bytes]);
            }
        }
    }
    Tensor::from_bytes(decode.stored(), shape, &bytes)
}

/// Codes `[1, total_k, Hkv, D]` times the scale of their head, in f32.
fn scaled(codes: &Tensor, scales: &[f32]) -> Result<Tensor, Error> {
    let columns = codes.shape().last().copied().unwrap_or(1).max(1);
    let of_head = scales.iter().flat_map(|&scale| std::iter::repeat_n(f64::from(scale), columns));
    let values: Vec<f64> =
        codes.to_f64().into_iter().zip(of_head.cycle()).map(|(code, scale)| code * scale).collect();
    Tensor::from_f64(DType::F32, codes.shape(), &values)
}
