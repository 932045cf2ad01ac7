//! The functions as a program calls them: beside candle's own formula and its gradients, with views for
//! tensors, and with mistakes.

use candle_core::{D, DType, Device, Result, Tensor, Var};
use flash_attention_candle::{
    Dropout, Layout, Options, Varlen, Window, attention, attention_with_lse, flash_attn,
    flash_attn_alibi, flash_attn_alibi_windowed, flash_attn_alibi_windowed_softcap,
    flash_attn_varlen, flash_attn_varlen_alibi, flash_attn_varlen_alibi_windowed,
    flash_attn_varlen_alibi_windowed_softcap, flash_attn_varlen_windowed, flash_attn_windowed,
};

fn random(shape: &[usize]) -> Result<Tensor> {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu)
}

/// What is added to the scores `[H, Nq, Nk]`: -inf outside of the window, and ALiBi.
fn added(
    [heads, rows, keys]: [usize; 3],
    [left, right]: [Option<usize>; 2],
    slopes: Option<&[f32]>,
) -> Result<Tensor> {
    let of = |h: usize, i: usize, j: usize| {
        let after = j as i64 - (i as i64 + keys as i64 - rows as i64);
        let hidden = left.is_some_and(|left| after < -(left.min(keys) as i64))
            || right.is_some_and(|right| after > right.min(rows) as i64);
        match (hidden, slopes) {
            (true, _) => f32::NEG_INFINITY,
            (false, Some(slopes)) => -slopes[h] * after.abs() as f32,
            (false, None) => 0.0,
        }
    };
    let mut numbers = Vec::new();
    for h in 0..heads {
        for i in 0..rows {
            numbers.extend((0..keys).map(|j| of(h, i, j)));
        }
    }
    Tensor::from_vec(numbers, (heads, rows, keys), &Device::Cpu)
}

/// Attention of `[B, N, H, D]` in candle's operations.
fn formula(
    [q, k, v]: [&Tensor; 3],
    scale: f32,
    softcap: f32,
    added: impl Fn([usize; 3]) -> Result<Tensor>,
) -> Result<Tensor> {
    let (b, rows, heads, d) = q.dims4()?;
    let (_, keys, kv_heads, _) = k.dims4()?;
    let repeat = |x: &Tensor| {
        let x = x.unsqueeze(3)?.broadcast_as((b, keys, kv_heads, heads / kv_heads, d))?;
        x.reshape((b, keys, heads, d))?.transpose(1, 2)?.contiguous()
    };
    let (q, k, v) = (q.transpose(1, 2)?.contiguous()?, repeat(k)?, repeat(v)?);
    let mut s = (q.matmul(&k.t()?)? * f64::from(scale))?;
    if softcap != 0.0 {
        let cap = f64::from(softcap);
        s = ((s / cap)?.tanh()? * cap)?;
    }
    let s = s.broadcast_add(&added([heads, rows, keys])?)?;
    candle_nn::ops::softmax(&s, D::Minus1)?.matmul(&v)?.transpose(1, 2)
}

fn far(a: &Tensor, b: &Tensor) -> Result<f32> {
    assert_eq!(a.dims(), b.dims());
    (a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar()
}

fn assert_near(a: &Tensor, b: &Tensor) {
    let far = far(a, b).unwrap();
    assert!(far < 2e-6, "{far}");
}

/// A function of candle-flash-attn, what it takes beside Q, K and V, and the formula's answer.
#[test]
fn every_function_is_candles_own_formula() -> Result<()> {
    let (q, k, v) = (random(&[2, 40, 4, 32])?, random(&[2, 50, 2, 32])?, random(&[2, 50, 2, 32])?);
    let slopes = [0.5f32, 0.25, 0.1, 0.0];
    let alibi = Tensor::new(&slopes, &Device::Cpu)?;
    let of = |window, slopes: Option<&[f32]>, softcap| {
        formula([&q, &k, &v], 0.2, softcap, |sizes| added(sizes, window, slopes))
    };
    let (none, some) = (None, Some(&slopes[..]));
    let (left, right) = (Some(7), Some(3));
    assert_near(&flash_attn(&q, &k, &v, 0.2, false)?, &of([None; 2], none, 0.0)?);
    assert_near(&flash_attn(&q, &k, &v, 0.2, true)?, &of([None, Some(0)], none, 0.0)?);
    for window in [[left, right], [left, None], [None, right], [Some(usize::MAX), Some(0)]] {
        let o = flash_attn_windowed(&q, &k, &v, 0.2, window[0], window[1])?;
        assert_near(&o, &of(window, none, 0.0)?);
    }
    let o = flash_attn_alibi(&q, &k, &v, &alibi, 0.2, true)?;
    assert_near(&o, &of([None, Some(0)], some, 0.0)?);
    let o = flash_attn_alibi_windowed(&q, &k, &v, &alibi, 0.2, left, right)?;
    assert_near(&o, &of([left, right], some, 0.0)?);
    for (slopes, tensor) in [(some, Some(&alibi)), (none, None)] {
        let o = flash_attn_alibi_windowed_softcap(&q, &k, &v, tensor, 0.2, left, right, 1.5)?;
        assert_near(&o, &of([left, right], slopes, 1.5)?);
    }
    Ok(())
}

#[test]
fn every_function_of_packed_sequences_is_the_same_for_each() -> Result<()> {
    let (q, k, v) = (random(&[60, 4, 32])?, random(&[75, 2, 32])?, random(&[75, 2, 32])?);
    let (starts_q, starts_k) = ([0u32, 20, 20, 60], [0u32, 35, 40, 75]);
    let cu = [&starts_q, &starts_k].map(|starts| Tensor::new(starts, &Device::Cpu).unwrap());
    let alibi = Tensor::new(&[0.5f32, 0.25, 0.1, 0.0], &Device::Cpu)?;
    // Of each sequence by itself.
    let each = |of: &dyn Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>| {
        let sequence = |b: usize| -> Result<Option<Tensor>> {
            let part = |x: &Tensor, starts: &[u32]| {
                let [first, end] = [starts[b], starts[b + 1]].map(|at| at as usize);
                x.narrow(0, first, end - first)?.unsqueeze(0)
            };
            if starts_q[b] == starts_q[b + 1] {
                return Ok(None);
            }
            let o = of(&part(&q, &starts_q)?, &part(&k, &starts_k)?, &part(&v, &starts_k)?)?;
            o.squeeze(0).map(Some)
        };
        let parts: Vec<Option<Tensor>> = (0..3).map(sequence).collect::<Result<_>>()?;
        Tensor::cat(&parts.into_iter().flatten().collect::<Vec<_>>(), 0)
    };
    let [cq, ck] = &cu;
    let (left, right) = (Some(9), Some(2));
    for causal in [false, true] {
        let o = flash_attn_varlen(&q, &k, &v, cq, ck, 40, 35, 0.2, causal)?;
        assert_near(&o, &each(&|q, k, v| flash_attn(q, k, v, 0.2, causal))?);
        let o = flash_attn_varlen_alibi(&q, &k, &v, &alibi, cq, ck, 40, 35, 0.2, causal)?;
        assert_near(&o, &each(&|q, k, v| flash_attn_alibi(q, k, v, &alibi, 0.2, causal))?);
    }
    let o = flash_attn_varlen_windowed(&q, &k, &v, cq, ck, 40, 50, 0.2, left, right)?;
    assert_near(&o, &each(&|q, k, v| flash_attn_windowed(q, k, v, 0.2, left, right))?);
    let o = flash_attn_varlen_alibi_windowed(&q, &k, &v, &alibi, cq, ck, 40, 35, 0.2, left, right)?;
    let expected = each(&|q, k, v| flash_attn_alibi_windowed(q, k, v, &alibi, 0.2, left, right))?;
    assert_near(&o, &expected);
    let o = flash_attn_varlen_alibi_windowed_softcap(
        &q, &k, &v, None, cq, ck, 40, 35, 0.2, left, right, 1.5,
    )?;
    let expected =
        each(&|q, k, v| flash_attn_alibi_windowed_softcap(q, k, v, None, 0.2, left, right, 1.5))?;
    assert_near(&o, &expected);
    Ok(())
}

/// Of a loss that passes through attention twice, as in a model.
#[test]
fn gradients_are_those_of_candles_own_formula() -> Result<()> {
    let var = |shape: &[usize]| Var::from_tensor(&random(shape)?);
    let (q, k, v) = (var(&[2, 30, 4, 32])?, var(&[2, 30, 2, 32])?, var(&[2, 30, 2, 32])?);
    let weights = random(&[2, 30, 4, 32])?;
    let window = [Some(11), Some(0)];
    let loss = |of: &dyn Fn(&Tensor) -> Result<Tensor>| -> Result<Vec<Tensor>> {
        let o = of(&of(&q)?)?;
        let store = (o * &weights)?.sqr()?.sum_all()?.backward()?;
        Ok([&q, &k, &v].map(|var| store.get(var).unwrap().clone()).to_vec())
    };
    let ours = loss(&|q| {
        flash_attn_alibi_windowed_softcap(q, &k, &v, None, 0.2, window[0], window[1], 3.0)
    })?;
    let own = loss(&|q| formula([q, &k, &v], 0.2, 3.0, |sizes| added(sizes, window, None)))?;
    for (ours, own) in ours.iter().zip(&own) {
        let size = own.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
        assert!(far(ours, own)? < 2e-6 * size, "{} of {size}", far(ours, own)?);
    }
    Ok(())
}

/// Views are read where they lie, and give the same bits as copies.
#[test]
fn views_are_as_good_as_copies() -> Result<()> {
    // Q, K and V side by side, as one projection writes them.
    let qkv = random(&[2, 3, 50, 6, 32])?.transpose(1, 2)?;
    let part = |at: usize| qkv.narrow(2, at, 1)?.squeeze(2);
    let (q, k, v) = (part(0)?, part(1)?, part(2)?);
    assert!(!q.is_contiguous());
    let expected = flash_attn(&q.contiguous()?, &k.contiguous()?, &v.contiguous()?, 0.2, true)?
        .transpose(1, 2)?;
    let heads_first = |x: &Tensor| x.transpose(1, 2);
    let options = Options { causal: true, scale: Some(0.2), ..Options::default() };
    let o = attention(&heads_first(&q)?, &heads_first(&k)?, &heads_first(&v)?, &options)?;
    assert!(o.is_contiguous());
    assert_eq!(far(&o, &expected)?, 0.0);
    let o = flash_attn(&q, &k, &v, 0.2, true)?;
    assert_eq!(far(&o.transpose(1, 2)?, &expected)?, 0.0);
    // A bias that all heads share, transposed, and one that is repeated without a copy.
    let bias = random(&[1, 1, 50, 50])?;
    let with = |bias: Tensor| {
        let options =
            Options { layout: Layout::TokensFirst, bias: Some(bias), ..Options::default() };
        attention(&q, &k, &v, &options)
    };
    let expected = with(bias.t()?.contiguous()?)?;
    assert_eq!(far(&with(bias.t()?)?, &expected)?, 0.0);
    assert_eq!(far(&with(bias.t()?.broadcast_as((2, 6, 50, 50))?)?, &expected)?, 0.0);
    Ok(())
}

/// A cache of room for 64 keys, of which each entry has some; the rest is NaN.
#[test]
fn keys_end_where_the_lengths_say() -> Result<()> {
    let lengths = [64u32, 17, 1, 0];
    let q = random(&[4, 6, 2, 32])?;
    let cache = || -> Result<Tensor> {
        let entries = lengths.iter().map(|&length| {
            let (length, rest) = (length as usize, 64 - length as usize);
            let nan = Tensor::full(f32::NAN, (1, 3, rest, 32), &Device::Cpu)?;
            Tensor::cat(&[random(&[1, 3, length, 32])?, nan], 2)
        });
        Tensor::cat(&entries.collect::<Result<Vec<_>>>()?, 0)
    };
    let (k, v) = (cache()?, cache()?);
    let options = Options { causal: true, ..Options::default() };
    let with =
        Options { key_lengths: Some(Tensor::new(&lengths, &Device::Cpu)?), ..options.clone() };
    let (o, lse) = attention_with_lse(&q, &k, &v, &with)?;
    for (b, &length) in lengths.iter().enumerate() {
        let part = |x: &Tensor| x.narrow(0, b, 1)?.narrow(2, 0, length as usize);
        let expected = attention(&q.narrow(0, b, 1)?, &part(&k)?, &part(&v)?, &options)?;
        assert_eq!(far(&o.narrow(0, b, 1)?, &expected)?, 0.0, "{length}");
    }
    let empty = lse.narrow(0, 3, 1)?.flatten_all()?.to_vec1::<f32>()?;
    assert!(empty.iter().all(|&lse| lse == f32::NEG_INFINITY));
    let q = Var::from_tensor(&q)?;
    let message = attention(&q, &k, &v, &with)?.sum_all()?.backward().unwrap_err().to_string();
    assert!(message.contains("key_lengths has no gradient"), "{message}");
    Ok(())
}

/// What is not a number stays one, and only where it belongs.
#[test]
fn nan_stays_in_its_row() -> Result<()> {
    let (k, v) = (random(&[1, 1, 300, 32])?, random(&[1, 1, 300, 32])?);
    let mut rows = random(&[1, 1, 3, 32])?.flatten_all()?.to_vec1::<f32>()?;
    rows[32 + 5] = f32::NAN;
    let q = Tensor::from_vec(rows, (1, 1, 3, 32), &Device::Cpu)?;
    let (o, lse) = attention_with_lse(&q, &k, &v, &Options::default())?;
    let is_nan: Vec<bool> =
        lse.flatten_all()?.to_vec1::<f32>()?.iter().map(|x| x.is_nan()).collect();
    assert_eq!(is_nan, [false, true, false]);
    for (row, nan) in o.squeeze(0)?.squeeze(0)?.to_vec2::<f32>()?.iter().zip(is_nan) {
        assert!(row.iter().all(|x| x.is_nan() == nan));
    }
    Ok(())
}

#[test]
fn mistakes_are_named() -> Result<()> {
    let (q, k) = (random(&[2, 4, 10, 32])?, random(&[2, 2, 12, 32])?);
    let message = |q: &Tensor, k: &Tensor, v: &Tensor, options: &Options| {
        attention(q, k, v, options).unwrap_err().to_string()
    };
    let plain = Options::default();
    let says =
        |text: String, what: &str| assert!(text.contains(what), "{text:?} says not {what:?}");
    says(
        message(&q.squeeze(0)?.narrow(0, 0, 1)?.squeeze(0)?, &k, &k, &plain),
        "it must be [B, H, N, D]",
    );
    says(message(&q.to_dtype(DType::F64)?, &k, &k, &plain), "k is F32, and q F64");
    let of = DType::F64;
    says(
        message(&q.to_dtype(of)?, &k.to_dtype(of)?, &k.to_dtype(of)?, &plain),
        "q is F64: attention has",
    );
    says(message(&q, &k.t()?, &k, &plain), "the last dimension of k must be contiguous");
    says(message(&q, &k.narrow(0, 0, 1)?, &k, &plain), "B and D must agree");
    says(message(&q, &k, &k.narrow(2, 0, 5)?, &plain), "all but D must agree");
    says(
        message(&q, &random(&[2, 3, 12, 32])?, &random(&[2, 3, 12, 32])?, &plain),
        "heads of K and V = 3",
    );
    let wide = random(&[1, 1, 4, 264])?;
    says(message(&wide, &wide, &wide, &plain), "head dim = 264");
    let with = |change: fn(&mut Options, Tensor), tensor: Tensor| {
        let mut options = Options::default();
        change(&mut options, tensor);
        message(&q, &k, &k, &options)
    };
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu);
    let (f32, u8) = (DType::F32, DType::U8);
    says(
        with(|o, t| o.alibi_slopes = Some(t), zeros(&[3], f32)?),
        "alibi_slopes has shape [3]: it must be [4]",
    );
    says(
        with(|o, t| o.alibi_slopes = Some(t), zeros(&[4], u8)?),
        "alibi_slopes is U8: it must be F32",
    );
    says(with(|o, t| o.sinks = Some(t), zeros(&[2], f32)?), "sinks has shape [2]: it must be [4]");
    says(with(|o, t| o.bias = Some(t), zeros(&[3, 4, 10, 12], f32)?), "it must be [2, 4, 10, 12]");
    says(
        with(|o, t| o.bias = Some(t), zeros(&[2, 4, 10, 12], DType::F16)?),
        "bias is F16: it must be F32",
    );
    says(
        with(|o, t| o.mask = Some(t), zeros(&[2, 10], u8)?),
        "mask has shape [2, 10]: it must be [2, 12]",
    );
    says(
        with(|o, t| o.key_lengths = Some(t), zeros(&[3], DType::U32)?),
        "key_lengths has shape [3]",
    );
    let long = Tensor::new(&[3u32, 13], &Device::Cpu)?;
    says(with(|o, t| o.key_lengths = Some(t), long), "key_lengths[1] = 13: there are 12 keys");
    says(message(&q, &k, &k, &Options { scale: Some(0.0), ..plain.clone() }), "scale = 0");
    says(message(&q, &k, &k, &Options { softcap: Some(-1.0), ..plain.clone() }), "softcap = -1");
    let dropout = Some(Dropout { p: 1.0, seed: 0 });
    says(message(&q, &k, &k, &Options { dropout, ..plain.clone() }), "dropout = 1");

    let (q, k) = (random(&[10, 4, 32])?, random(&[12, 2, 32])?);
    let packed = |cu_q: &[u32], cu_k: &[u32], max: [usize; 2]| {
        let of = |starts: &[u32]| Tensor::new(starts, &Device::Cpu).unwrap();
        let varlen = Varlen {
            cu_seqlens_q: of(cu_q),
            cu_seqlens_k: of(cu_k),
            max_seqlen_q: max[0],
            max_seqlen_k: max[1],
        };
        message(&q, &k, &k, &Options { varlen: Some(varlen), ..plain.clone() })
    };
    says(packed(&[0], &[0], [1, 1]), "cu_seqlens_q has 1 numbers");
    says(packed(&[0, 10], &[0, 6, 12], [10, 12]), "cu_seqlens_k has shape [3]: it must be [2]");
    says(packed(&[0, 7, 3], &[0, 6, 12], [10, 12]), "they must ascend");
    says(packed(&[0, 7, 10], &[0, 6, 12], [6, 12]), "max_seqlen_q = 6: a sequence has 7 rows");
    says(packed(&[0, 7, 10], &[0, 6, 13], [10, 12]), "cu_seqlens_k ends at 13: there are 12 rows");
    let window = Window { left: Some(2), right: None };
    assert!(
        attention(
            &random(&[1, 1, 4, 8])?,
            &random(&[1, 1, 4, 8])?,
            &random(&[1, 1, 4, 8])?,
            &Options { window, ..plain }
        )
        .is_ok()
    );
    Ok(())
}
