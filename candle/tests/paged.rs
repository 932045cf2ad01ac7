//! Caches in pages beside the same keys one after the other: the bits must agree.

use candle_core::{DType, Device, Result, Tensor, Var};
use flash_attention_candle::{
    Layout, Options, Varlen, Window, attention, attention_with_lse,
    flash_attn_varlen_alibi_windowed_softcap, flash_attn_varlen_paged_windowed,
};

const CPU: Device = Device::Cpu;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const D: usize = 32;

fn random(shape: &[usize]) -> Result<Tensor> {
    Tensor::randn(0f32, 1.0, shape, &CPU)
}

fn assert_same(a: &Tensor, b: &Tensor, what: &str) {
    let numbers = |x: &Tensor| {
        x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    assert_eq!(a.dims(), b.dims(), "{what}");
    for (at, (a, b)) in numbers(a).iter().zip(&numbers(b)).enumerate() {
        assert_eq!(a, b, "{what}, at {at}");
    }
}

/// Keys and values of some sequences, in pages and packed.
struct Pages {
    /// `[pages, size, Hkv, D]`: views of one tensor.
    k: Tensor,
    v: Tensor,
    /// `[B, max_pages]`, i32, with -1 for pages that no sequence has.
    table: Tensor,
    /// `[total, Hkv, D]`.
    packed: [Tensor; 2],
}

/// Every third page is nobody's. Its keys are NaN, and so is the rest of a sequence's last page.
fn in_pages(lengths: &[usize], size: usize, dtype: DType) -> Result<Pages> {
    let total: usize = lengths.iter().sum();
    let packed = [random(&[total, KV_HEADS, D])?, random(&[total, KV_HEADS, D])?];
    let taken: usize = lengths.iter().map(|length| length.div_ceil(size)).sum();
    let most = lengths.iter().map(|length| length.div_ceil(size)).max().unwrap_or(0) + 1;
    let count = taken.div_ceil(2) * 3 + 2;
    // The step has no divisor in common with the number of pages: every page comes once.
    let step = (count / 2..).find(|step| (2..=*step).all(|n| step % n > 0 || count % n > 0));
    let mut order = (0..count).map(|at| (at * step.unwrap() + 1) % count).filter(|at| at % 3 > 0);
    let row = KV_HEADS * D;
    let mut cache = vec![f32::NAN; count * 2 * size * row];
    let mut table = vec![-1; lengths.len() * most];
    let mut first = 0;
    let numbers =
        [0, 1].map(|at: usize| packed[at].flatten_all().unwrap().to_vec1::<f32>().unwrap());
    for (b, &length) in lengths.iter().enumerate() {
        for at in 0..length.div_ceil(size) {
            let page = order.next().unwrap();
            table[b * most + at] = page as i32;
            let keys = size.min(length - at * size) * row;
            for (part, numbers) in numbers.iter().enumerate() {
                let from = &numbers[(first + at * size) * row..][..keys];
                cache[(page * 2 + part) * size * row..][..keys].copy_from_slice(from);
            }
        }
        first += length;
    }
    let cache = Tensor::from_vec(cache, (count, 2, size, KV_HEADS, D), &CPU)?.to_dtype(dtype)?;
    let part = |at| cache.narrow(1, at, 1)?.squeeze(1);
    let [k, v] = packed;
    Ok(Pages {
        k: part(0)?,
        v: part(1)?,
        table: Tensor::from_vec(table, (lengths.len(), most), &CPU)?,
        packed: [k.to_dtype(dtype)?, v.to_dtype(dtype)?],
    })
}

fn starts(lengths: &[usize]) -> Result<Tensor> {
    let mut starts = vec![0u32];
    starts.extend(lengths.iter().scan(0, |end, &length| {
        *end += length as u32;
        Some(*end)
    }));
    Tensor::new(starts, &CPU)
}

/// Pages smaller than a tile of 256 keys, larger, and dividing none; one query a sequence, several, and
/// different numbers of them.
#[test]
fn a_cache_in_pages_is_a_contiguous_one() -> Result<()> {
    let keys = [300, 1, 0, 77, 513];
    for (size, dtype) in
        [(1, DType::F32), (7, DType::F16), (32, DType::F32), (100, DType::BF16), (600, DType::F32)]
    {
        let Pages { k, v, table, packed: [k_packed, v_packed] } = in_pages(&keys, size, dtype)?;
        assert!(!k.is_contiguous());
        let tables = [table.to_dtype(DType::I64)?.to_dtype(DType::U32)?, table];
        for rows in [[1; 5], [3; 5], [40, 1, 2, 0, 9]] {
            let q = random(&[rows.iter().sum(), HEADS, D])?.to_dtype(dtype)?;
            let (cu_q, cu_k) = (starts(&rows)?, starts(&keys)?);
            for (table, window, softcap) in [
                (&tables[0], [None, Some(0)], None),
                (&tables[1], [Some(50), Some(0)], Some(2.0)),
                (&tables[0], [None, None], Some(0.0)),
                (&tables[1], [Some(9), Some(4)], None),
            ] {
                let [left, right] = window;
                let o = flash_attn_varlen_paged_windowed(
                    &q, &k, &v, &cu_q, &cu_k, table, None, 40, 513, 0.2, left, right, size, softcap,
                )?;
                let cap = softcap.unwrap_or(0.0);
                let expected = flash_attn_varlen_alibi_windowed_softcap(
                    &q, &k_packed, &v_packed, None, &cu_q, &cu_k, 40, 513, 0.2, left, right, cap,
                )?;
                assert_same(&o, &expected, &format!("pages of {size}, {rows:?}, {window:?}"));
            }
        }
    }
    Ok(())
}

/// In both layouts, with what else attention can do, and without lengths.
#[test]
fn attention_takes_a_page_table() -> Result<()> {
    let (size, keys) = (24, [100, 24, 5]);
    let Pages { k, v, table, packed } = in_pages(&keys, size, DType::F32)?;
    let (_, most) = table.dims2()?;
    let room = most * size;
    // The same as caches of room for as many keys as the table has.
    let contiguous = |packed: &Tensor| -> Result<Tensor> {
        let mut first = 0;
        let entries = keys.iter().map(|&length| {
            let keys = packed.narrow(0, first, length)?;
            first += length;
            keys.pad_with_zeros(0, 0, room - length)
        });
        Tensor::stack(&entries.collect::<Result<Vec<_>>>()?, 0)
    };
    let (k_whole, v_whole) = (contiguous(&packed[0])?, contiguous(&packed[1])?);
    let q = random(&[3, 6, HEADS, D])?;
    let lengths = Tensor::new(&keys.map(|length| length as u32), &CPU)?;
    let mask: Vec<u8> = (0..3 * room).map(|at| u8::from(at % 5 > 0)).collect();
    let options = Options {
        layout: Layout::TokensFirst,
        window: Window { left: Some(60), right: Some(0) },
        softcap: Some(3.0),
        alibi_slopes: Some(random(&[3, HEADS])?.abs()?),
        sinks: Some(random(&[HEADS])?),
        mask: Some(Tensor::from_vec(mask, (3, room), &CPU)?),
        bias: Some(random(&[3, 1, 6, room])?),
        key_lengths: Some(lengths),
        ..Options::default()
    };
    let (o, lse) = attention_with_lse(&q, &k_whole, &v_whole, &options)?;
    let with = Options { page_table: Some(table.clone()), ..options.clone() };
    let (o_paged, lse_paged) = attention_with_lse(&q, &k, &v, &with)?;
    assert_same(&o_paged, &o, "O");
    assert_same(&lse_paged, &lse, "LSE");
    let heads_first = Options { layout: Layout::HeadsFirst, ..with };
    let turned = |x: &Tensor| x.transpose(1, 2);
    let o_turned = attention(&turned(&q)?, &turned(&k)?, &turned(&v)?, &heads_first)?;
    assert_same(&turned(&o_turned)?, &o, "heads first");

    // Two sequences of the pages 2, 0 and 2, 1: they share the first. Without lengths pages are full.
    let pages = random(&[3, size, KV_HEADS, D])?;
    let table = Tensor::new(&[[2u32, 0], [2, 1]], &CPU)?;
    let whole = Tensor::cat(&[2, 0, 2, 1].map(|page| pages.get(page).unwrap()), 0)?;
    let whole = whole.reshape((2, 2 * size, KV_HEADS, D))?;
    let plain = Options { layout: Layout::TokensFirst, causal: true, ..Options::default() };
    let with = Options { page_table: Some(table), ..plain.clone() };
    let q = random(&[2, 4, HEADS, D])?;
    let o = attention(&q, &pages, &pages, &with)?;
    assert_same(&o, &attention(&q, &whole, &whole, &plain)?, "shared pages");

    let q = Var::from_tensor(&q)?;
    let loss = attention(&q, &pages, &pages, &with)?.sum_all()?;
    let message = loss.backward().unwrap_err().to_string();
    assert!(message.contains("page_table has no gradient"), "{message}");
    Ok(())
}

#[test]
fn mistakes_are_named() -> Result<()> {
    let q = random(&[5, HEADS, D])?;
    let k = random(&[8, 16, KV_HEADS, D])?;
    let starts = |of: [u32; 3]| Tensor::new(&of, &CPU).unwrap();
    let table = Tensor::new(&[[7u32, 0, 3], [1, 2, 9]], &CPU)?;
    let call = |k: &Tensor, v: &Tensor, cu: [[u32; 3]; 2], table: &Tensor, max_k, size| {
        let [cu_q, cu_k] = cu.map(starts);
        let call = flash_attn_varlen_paged_windowed(
            &q, k, v, &cu_q, &cu_k, table, None, 3, max_k, 0.2, None, None, size, None,
        );
        call.map_or_else(|error| error.to_string(), |_| "nothing".into())
    };
    let good = [[0, 3, 5], [0, 40, 60]];
    assert_eq!(call(&k, &k, good, &table, 48, 16), "nothing");
    let says =
        |text: String, what: &str| assert!(text.contains(what), "{text:?} says not {what:?}");
    says(call(&k, &k, good, &table, 48, 32), "page_block_size = 32: k has shape [8, 16, 2, 32]");
    let packed = random(&[60, KV_HEADS, D])?;
    says(
        call(&packed, &packed, good, &table, 48, 2),
        "k has shape [60, 2, 32]: it must be [pages,",
    );
    says(call(&k, &packed, good, &table, 48, 16), "v has shape [60, 2, 32]: it must be [pages,");
    says(call(&k, &k.narrow(0, 0, 7)?, good, &table, 48, 16), "all but D must agree");
    says(call(&k.narrow(3, 0, 16)?, &k, good, &table, 48, 16), "D must agree");
    let turned = k.transpose(1, 3)?.contiguous()?.transpose(1, 3)?;
    says(call(&turned, &k, good, &table, 48, 16), "the last dimension of k must be contiguous");
    let none = Tensor::zeros((0, 16, KV_HEADS, D), DType::F32, &CPU)?;
    says(call(&none, &none, good, &table, 48, 16), "k has 0 pages of 16 keys");
    let of = |dtype| table.to_dtype(dtype);
    says(call(&k, &k, good, &of(DType::F32)?, 48, 16), "page_table is F32: it must be U32 or I32");
    says(
        call(&k, &k, good, &table.t()?, 48, 16),
        "page_table has shape [3, 2]: it must be [2, max",
    );
    says(
        call(&k, &k, good, &table.get(0)?, 48, 16),
        "page_table has shape [3]: it must be [2, max",
    );
    says(
        call(&k, &k, good, &table, 49, 16),
        "max_seqlen_k = 49: page_table [2, 3] has room for 48",
    );
    says(call(&k, &k, good, &table, 30, 16), "max_seqlen_k = 30: a sequence has 40 keys");
    let long = [[0, 3, 5], [0, 40, 73]];
    says(call(&k, &k, long, &table, 48, 16), "page_table[1, 2] = 9: there are 8 pages");
    let negative = Tensor::new(&[[7i32, -1, 3], [1, 2, 9]], &CPU)?;
    says(call(&k, &k, good, &negative, 48, 16), "page_table[0, 1] = -1: there are 8 pages");
    let short = [[0, 3, 4], [0, 40, 60]];
    says(call(&k, &k, short, &table, 48, 16), "cu_seqlens_q ends at 4: q has 5 rows");
    let [cu_q, cu_k] = good.map(starts);
    let ranges = Tensor::zeros((2, 1, 2), DType::I32, &CPU)?;
    let call = flash_attn_varlen_paged_windowed(
        &q,
        &k,
        &k,
        &cu_q,
        &cu_k,
        &table,
        Some(&ranges),
        3,
        48,
        0.2,
        None,
        None,
        16,
        None,
    );
    says(call.unwrap_err().to_string(), "mm_prefix_ranges is given");

    let dense = |lengths: [u32; 2], k: &Tensor| {
        let options = Options {
            layout: Layout::TokensFirst,
            key_lengths: Some(Tensor::new(&lengths, &CPU).unwrap()),
            page_table: Some(table.clone()),
            ..Options::default()
        };
        let q = random(&[2, 1, HEADS, D]).unwrap();
        attention(&q, k, k, &options).unwrap_err().to_string()
    };
    says(dense([49, 1], &k), "key_lengths[0] = 49: there are 48 keys");
    says(dense([1, 33], &k), "page_table[1, 2] = 9: there are 8 pages");
    says(dense([1, 1], &k.narrow(3, 0, 16)?), "D must agree");
    let varlen =
        Varlen { cu_seqlens_q: cu_q, cu_seqlens_k: cu_k, max_seqlen_q: 3, max_seqlen_k: 48 };
    let options = Options {
        varlen: Some(varlen),
        page_table: Some(table.clone()),
        key_lengths: Some(Tensor::new(&[40u32, 20], &CPU)?),
        ..Options::default()
    };
    says(
        attention(&q, &k, &k, &options).unwrap_err().to_string(),
        "packed sequences have no key_lengths",
    );
    Ok(())
}
