//! Packed queries against a cache in pages, on a GPU: the decode kernel takes the same number of queries
//! for each sequence.

use candle_core::{DType, Result, Tensor};
use flash_attention::Layout;

use crate::{
    op::attention_with_lse,
    options::{Options, Varlen},
};

/// O `[total_q, H, Dv]` and the LSE `[H, total_q]` of packed queries, checked.
///
/// Each sequence gets `max_seqlen_q` rows, and its own are the last of them: positions count from the end, so
/// padding moves no query. The device computes where rows go, so the host never waits for it. No number in
/// `cu_seqlens` makes a gather read beyond a tensor.
pub fn padded(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &Options,
    varlen: &Varlen,
) -> Result<(Tensor, Tensor)> {
    let (total, heads, d) = q.dims3()?;
    let (batch, rows) = (varlen.cu_seqlens_q.dims1()? - 1, varlen.max_seqlen_q.max(1));
    let starts_k = &varlen.cu_seqlens_k;
    let lengths = (starts_k.narrow(0, 1, batch)? - starts_k.narrow(0, 0, batch)?)?;
    let options = Options {
        layout: Layout::TokensFirst,
        varlen: None,
        key_lengths: Some(lengths),
        ..options.clone()
    };
    let of_heads = |lse: Tensor| -> Result<Tensor> {
        lse.transpose(1, 2)?.reshape((batch * rows, heads))?.t()?.contiguous()
    };
    if rows == 1 && total == batch {
        let (o, lse) = attention_with_lse(&q.unsqueeze(1)?, k, v, &options)?;
        return Ok((o.squeeze(1)?, of_heads(lse)?));
    }
    if total == batch * rows {
        let (o, lse) = attention_with_lse(&q.reshape((batch, rows, heads, d))?, k, v, &options)?;
        return Ok((o.flatten(0, 1)?, of_heads(lse)?));
    }

    let number = |n: usize| Tensor::new(&[[n as u32]], q.device());
    let numbers = |n: usize| Tensor::arange(0, n as u32, q.device());
    // Row i of a sequence is row end + i - rows of Q; where that is negative, any row will do.
    let ends = varlen.cu_seqlens_q.narrow(0, 1, batch)?.unsqueeze(1)?;
    let ends = ends.broadcast_minimum(&number(total)?)?;
    let from = ends.broadcast_add(&numbers(rows)?.unsqueeze(0)?)?;
    let from = from.broadcast_maximum(&number(rows)?)?.broadcast_sub(&number(rows)?)?;
    let padded = q.contiguous()?.index_select(&from.flatten_all()?, 0)?;
    let padded = padded.reshape((batch, rows, heads, d))?;
    let (o, lse) = attention_with_lse(&padded, k, v, &options)?;

    // b sequences end at or before row r of Q: it belongs to sequence b, and is row
    // (b + 1) rows + r - end of the padded rows.
    let row = numbers(total)?.unsqueeze(0)?;
    let b = ends.broadcast_le(&row)?.to_dtype(DType::U32)?.sum_keepdim(0)?;
    let b = b.broadcast_minimum(&number(batch - 1)?)?.flatten_all()?;
    let end = ends.flatten_all()?.index_select(&b, 0)?;
    let first = (b.affine(rows as f64, rows as f64)? + row.squeeze(0)?)?;
    let at = (first.maximum(&end)? - end)?
        .unsqueeze(0)?
        .broadcast_minimum(&number(batch * rows - 1)?)?;
    let at = at.flatten_all()?;
    Ok((o.flatten(0, 1)?.index_select(&at, 0)?, of_heads(lse)?.index_select(&at, 1)?))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use flash_attention::Window;

    use super::*;

    fn random(shape: &[usize]) -> Result<Tensor> {
        Tensor::randn(0f32, 1.0, shape, &Device::Cpu)
    }

    fn far(a: &Tensor, b: &Tensor) -> f32 {
        assert_eq!(a.dims(), b.dims());
        let (a, b) = [a, b].map(|x| x.flatten_all().unwrap().to_vec1::<f32>().unwrap()).into();
        // Rows without keys have an LSE of -inf.
        let of = |(a, b): (&f32, &f32)| if a == b { 0.0 } else { (a - b).abs() };
        a.iter().zip(&b).map(of).fold(0.0, |most, far| if far <= most { most } else { far })
    }

    /// The padded queries of a GPU give the answers of packed queries, which the CPU computes.
    #[test]
    fn padding_moves_no_query() -> Result<()> {
        let device = &Device::Cpu;
        let (k, v) = (random(&[7, 20, 2, 32])?, random(&[7, 20, 2, 32])?);
        let table = Tensor::new(&[[3u32, 0, 6, 9], [5, 9, 9, 9], [9; 4], [1, 4, 2, 5]], device)?;
        let cu_seqlens_k = Tensor::new(&[0u32, 55, 75, 75, 150], device)?;
        for (starts, max_seqlen_q) in [
            ([0u32, 1, 2, 3, 4], 1),
            ([0, 3, 6, 9, 12], 3),
            ([0, 2, 2, 3, 12], 9),
            ([0, 1, 2, 3, 4], 5),
            ([0, 0, 0, 30, 30], 30),
            ([0, 0, 30, 70, 70], 64),
        ] {
            let varlen = Varlen {
                cu_seqlens_q: Tensor::new(&starts, device)?,
                cu_seqlens_k: cu_seqlens_k.clone(),
                max_seqlen_q,
                max_seqlen_k: 75,
            };
            let q = random(&[starts[4] as usize, 4, 32])?;
            for window in [[None, None], [None, Some(0)], [Some(13), Some(2)]] {
                let options = Options {
                    window: Window { left: window[0], right: window[1] },
                    softcap: Some(4.0),
                    alibi_slopes: Some(Tensor::new(&[0.5f32, 0.25, 0.1, 0.0], device)?),
                    sinks: window[0].map(|_| random(&[4])).transpose()?,
                    varlen: Some(varlen.clone()),
                    page_table: Some(table.clone()),
                    ..Options::default()
                };
                let (o, lse) = attention_with_lse(&q, &k, &v, &options)?;
                let (o_padded, lse_padded) = padded(&q, &k, &v, &options, &varlen)?;
                assert!(far(&o, &o_padded) < 2e-6, "{starts:?} {window:?}");
                assert!(far(&lse, &lse_padded) < 2e-6, "{starts:?} {window:?}");
            }
        }
        Ok(())
    }

    /// No numbers of rows make a gather read beyond a tensor.
    #[test]
    fn wrong_numbers_stay_within_the_tensors() -> Result<()> {
        let device = &Device::Cpu;
        let k = random(&[1, 20, 2, 32])?;
        let q = random(&[10, 4, 32])?;
        for starts in [[0u32, 3, 7], [0, 7, 3], [0, 900, 2], [5, u32::MAX, 1]] {
            let varlen = Varlen {
                cu_seqlens_q: Tensor::new(&starts, device)?,
                cu_seqlens_k: Tensor::new(&[0u32, 20, 40], device)?,
                max_seqlen_q: 8,
                max_seqlen_k: 20,
            };
            let options = Options {
                varlen: Some(varlen.clone()),
                page_table: Some(Tensor::zeros((2, 1), DType::U32, device)?),
                ..Options::default()
            };
            let (o, lse) = padded(&q, &k, &k, &options, &varlen)?;
            assert_eq!((o.dims(), lse.dims()), ([10, 4, 32].as_slice(), [4, 10].as_slice()));
        }
        Ok(())
    }
}
