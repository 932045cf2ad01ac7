//! Caches that own their pages, and the kernel that appends to them.

mod suite;

use flash_attention::{
    DType, E4m3, Extras, Layout, Problem, Tensor,
    backend::{DeviceTensor, Memory},
    dtype::Element as _,
    half::f16,
    raw::{AppendArgs, View},
    registry::{APPEND_KERNELS, Append, DECODE_KERNELS, Decode, Pages, Rotary, Target},
    session::{Angles, DecodeInputs, Inputs, KvCache, KvCacheShape, SequenceId, Session},
    verify::verify_decode,
};
use suite::{Draws, emulator};

const D: usize = 32;
const D_V: usize = 24;
const KV_HEADS: usize = 2;

fn cache(session: &Session, page_size: u32, pages: u32) -> KvCache {
    let shape = KvCacheShape {
        dtype: DType::F16,
        kv_heads: KV_HEADS,
        head_dim: D,
        head_dim_v: D_V,
        page_size,
        pages,
    };
    KvCache::new(session, shape).unwrap()
}

fn random(shape: &[usize], seed: u64) -> Tensor {
    Tensor::random(DType::F16, shape, seed, 0.0)
}

/// The rows of a tensor `[.., columns]`.
fn rows(tensor: &Tensor) -> Vec<Vec<f16>> {
    let columns = *tensor.shape().last().unwrap();
    tensor.as_slice::<f16>().unwrap().chunks(columns).map(<[f16]>::to_vec).collect()
}

/// A row at a position, rotated as the definition says.
fn rotated(row: &[f16], position: usize, rotary: Rotary, [cos, sin]: &[Vec<f32>; 2]) -> Vec<f16> {
    let half = rotary.dim / 2;
    let mut row = row.to_vec();
    for pair in 0..half {
        let (first, second) =
            if rotary.interleaved { (2 * pair, 2 * pair + 1) } else { (pair, pair + half) };
        let (x, y) = (row[first].to_f32(), row[second].to_f32());
        let at = position * half + pair;
        row[first] = f16::from_f32(x.mul_add(cos[at], -(y * sin[at])));
        row[second] = f16::from_f32(y.mul_add(cos[at], x * sin[at]));
    }
    row
}

/// New keys, values and queries take their places, rotated or not, in a contiguous cache and in pages; nothing else is
/// written, and queries may be rotated in place.
#[test]
fn new_tokens_take_their_places_rotated() {
    let (batch, heads, new, most) = (3, 4, 3, 40);
    let lengths = [3i32, 40, 2];
    let p = Problem::builder(batch, heads, new, D).kv_heads(KV_HEADS).head_dim_v(D_V).seq_k(most);
    let p = p.dtype(DType::F16).layout(Layout::TokensFirst).build().unwrap();
    let pages = Pages { page_size: 7, pages: 20, max_pages: 6 };
    let table: Vec<i32> = (0..18).map(|at| (at * 11 + 3) % 20).collect();
    let rotary = |dim, interleaved| Some(Rotary { dim, positions: most, interleaved });
    for rotary in [None, rotary(32, false), rotary(32, true), rotary(16, false), rotary(16, true)] {
        for decode in [Decode::new(p), Decode::paged(p, pages).unwrap()] {
            let memory = Memory::new(emulator());
            let device = memory.device().clone();
            let upload = |tensor: &Tensor| DeviceTensor::upload(&memory, tensor).unwrap();
            let k_new = random(&[batch, new, KV_HEADS, D], 1);
            let v_new = random(&[batch, new, KV_HEADS, D_V], 2);
            let q = random(&p.q_shape(), 3);
            let [k_old, v_old] = [random(&decode.k_shape(), 4), random(&decode.v_shape(), 5)];
            let tensors = [&k_new, &v_new, &q, &k_old, &v_old].map(upload);
            let [k_device, v_device, q_device, k_cache, v_cache] = &tensors;
            let numbers = [memory.upload(&lengths).unwrap(), memory.upload(&table).unwrap()];
            let angles = rotary.map(|rotary| rotary.tables(100.0));
            let angle_buffers =
                angles.as_ref().map(|angles| angles.each_ref().map(|a| memory.upload(a).unwrap()));

            let view = |tensor: &DeviceTensor, heads, rows, columns| {
                View::contiguous(tensor.region(), Layout::TokensFirst, heads, rows, columns)
            };
            let rows_of_cache = decode.k_shape()[1];
            let args = AppendArgs::new(
                [view(k_device, KV_HEADS, new, D), view(v_device, KV_HEADS, new, D_V)],
                [
                    view(k_cache, KV_HEADS, rows_of_cache, D),
                    view(v_cache, KV_HEADS, rows_of_cache, D_V),
                ],
            );
            let q_view = view(q_device, heads, new, D);
            let mut args = args.seqused_k(numbers[0].region()).queries(q_view, q_view);
            if decode.pages().is_some() {
                args = args.page_table(numbers[1].region());
            }
            if let Some([cos, sin]) = &angle_buffers {
                args = args.angles(cos.region(), sin.region());
            }
            let append = Append::new(decode);
            let append = rotary.map_or(append, |rotary| append.rotary(rotary).unwrap());
            let plan = APPEND_KERNELS[0].plan(&append, &Target::of(&*device)).unwrap();
            for launch in plan.launches_for(&*device, &args).unwrap() {
                // SAFETY: every tensor of the plan's arguments lives until the end of the loop.
                unsafe { device.launch(&launch).unwrap() };
            }

            let turn = |row: &[f16], position| match (rotary, &angles) {
                (Some(rotary), Some(angles)) => rotated(row, position, rotary, angles),
                _ => row.to_vec(),
            };
            let (mut k, mut v, mut q_expected) = (rows(&k_old), rows(&v_old), rows(&q));
            for (b, t) in (0..batch).flat_map(|b| (0..new).map(move |t| (b, t))) {
                // Of three tokens, a sequence of two has the last two.
                let Some(position) = (lengths[b] as usize + t).checked_sub(new) else { continue };
                let place = match decode.pages() {
                    Some(_) => table[b * 6 + position / 7] as usize * 7 + position % 7,
                    None => b * most + position,
                };
                for h in 0..KV_HEADS {
                    let from = (b * new + t) * KV_HEADS + h;
                    k[place * KV_HEADS + h] = turn(&rows(&k_new)[from], position);
                    v[place * KV_HEADS + h] = rows(&v_new)[from].clone();
                }
                for h in 0..heads {
                    let at = (b * new + t) * heads + h;
                    q_expected[at] = turn(&rows(&q)[at], position);
                }
            }
            let label = format!("{rotary:?}, {:?}", decode.pages());
            assert_eq!(rows(&k_cache.to_host().unwrap()), k, "{label}");
            assert_eq!(rows(&v_cache.to_host().unwrap()), v, "{label}");
            assert_eq!(rows(&q_device.to_host().unwrap()), q_expected, "{label}");
        }
    }
}

/// What a sequence should hold: the rows of its keys and values, one per token and head.
#[derive(Clone, Default)]
struct Expected {
    k: Vec<Vec<f16>>,
    v: Vec<Vec<f16>>,
}

impl Expected {
    fn tokens(&self) -> usize {
        self.k.len() / KV_HEADS
    }
}

/// A decode of sequences of a cache against attention of what they should hold.
fn check(session: &Session, cache: &KvCache, sequences: &[(SequenceId, Expected)]) {
    let most = sequences.iter().map(|(_, expected)| expected.tokens()).max().unwrap().max(1);
    let p = Problem::builder(sequences.len(), 4, 2, D).kv_heads(KV_HEADS).head_dim_v(D_V);
    let p =
        p.seq_k(most).causal(true).dtype(DType::F16).layout(Layout::TokensFirst).build().unwrap();
    let ids: Vec<SequenceId> = sequences.iter().map(|(id, _)| *id).collect();
    let decode = cache.decode(p).unwrap();
    let batch = cache.batch(&decode, &ids).unwrap();
    let mut attention = session.decode(&DECODE_KERNELS[0], &decode).unwrap();
    let q = random(&p.q_shape(), 9);
    attention.run(&session.upload(&q).unwrap(), cache.cached(&batch), Extras::default()).unwrap();
    let outputs = attention.outputs().unwrap();

    let contiguous = |columns: usize, of: fn(&Expected) -> &Vec<Vec<f16>>| {
        let mut values = vec![f16::NAN; sequences.len() * most * KV_HEADS * columns];
        for ((_, expected), to) in
            sequences.iter().zip(values.chunks_mut(most * KV_HEADS * columns))
        {
            let flat: Vec<f16> = of(expected).concat();
            to[..flat.len()].copy_from_slice(&flat);
        }
        Tensor::from_vec(&[sequences.len(), most, KV_HEADS, columns], values).unwrap()
    };
    let (k, v) = (contiguous(D, |e| &e.k), contiguous(D_V, |e| &e.v));
    let lengths: Vec<i32> = sequences.iter().map(|(_, e)| e.tokens() as i32).collect();
    let inputs = DecodeInputs {
        tensors: Inputs::new(&q, &k, &v),
        seqused_k: Some(&lengths),
        page_table: None,
        scales: None,
    };
    let result = verify_decode(&Decode::new(p), &inputs, &outputs).unwrap();
    assert!(result.passes(), "{lengths:?}: {result}");
}

/// Sequences come, grow, fork and go; each has what it should, and no page is lost.
#[test]
fn sequences_keep_what_they_have() {
    let session = Session::new(emulator());
    for (page_size, seed) in [(1, 1), (3, 2), (16, 3)] {
        let (pages, mut draws) = (600 / page_size, Draws::new(seed));
        let mut cache = cache(&session, page_size, pages);
        let mut sequences: Vec<(SequenceId, Expected)> = Vec::new();
        for step in 0..30 {
            match draws.below(6) {
                0 => sequences.push((cache.insert(), Expected::default())),
                1 if !sequences.is_empty() => {
                    let (of, expected) = sequences[draws.below(sequences.len())].clone();
                    sequences.push((cache.fork(of).unwrap(), expected));
                }
                2 if sequences.len() > 3 => {
                    let (id, _) = sequences.swap_remove(draws.below(sequences.len()));
                    cache.remove(id).unwrap();
                    assert!(cache.length(id).unwrap_err().to_string().contains("removed"));
                }
                _ if !sequences.is_empty() => {
                    // Some of them, the last ones.
                    let first = draws.below(sequences.len());
                    let growing = &mut sequences[first..];
                    let tokens = 1 + draws.below(9);
                    let of =
                        |columns, seed| random(&[growing.len(), tokens, KV_HEADS, columns], seed);
                    let (k, v) = (of(D, 100 + step), of(D_V, 200 + step));
                    let ids: Vec<SequenceId> = growing.iter().map(|(id, _)| *id).collect();
                    let upload = |tensor| session.upload(tensor).unwrap();
                    cache.append(&ids, &upload(&k), &upload(&v), None).unwrap();
                    let both = rows(&k);
                    let both = both.chunks(tokens * KV_HEADS).map(<[_]>::to_vec);
                    let values = rows(&v);
                    let values = values.chunks(tokens * KV_HEADS).map(<[_]>::to_vec);
                    for ((_, expected), (k, v)) in growing.iter_mut().zip(both.zip(values)) {
                        expected.k.extend(k);
                        expected.v.extend(v);
                    }
                }
                _ => {}
            }
            for (id, expected) in &sequences {
                assert_eq!(cache.length(*id).unwrap(), expected.tokens());
            }
            if step % 6 == 5 && !sequences.is_empty() {
                check(&session, &cache, &sequences);
            }
        }
        for (id, _) in sequences {
            cache.remove(id).unwrap();
        }
        assert_eq!(cache.free_pages(), pages as usize);
    }
}

/// A rotated prompt appended at once, or token by token, is the same cache.
#[test]
fn positions_go_on_where_a_sequence_ends() {
    let session = Session::new(emulator());
    let rotary = Rotary { dim: 32, positions: 20, interleaved: false };
    let buffers = rotary.tables(10_000.0).map(|a| session.memory().upload(&a).unwrap());
    let angles = || Some(Angles { rotary, cos: &buffers[0], sin: &buffers[1] });
    let (k, v) = (random(&[1, 11, KV_HEADS, D], 1), random(&[1, 11, KV_HEADS, D_V], 2));
    let part = |tensor: &Tensor, tokens: std::ops::Range<usize>| {
        let row = tensor.len() / 11 * 2;
        let bytes = &tensor.as_bytes()[tokens.start * row..tokens.end * row];
        let shape = [1, tokens.len(), KV_HEADS, tensor.shape()[3]];
        session.upload(&Tensor::from_bytes(DType::F16, &shape, bytes).unwrap()).unwrap()
    };
    let fill = |ends: &[usize]| {
        let mut cache = cache(&session, 4, 3);
        let id = cache.insert();
        let mut start = 0;
        for &end in ends {
            let (k, v) = (part(&k, start..end), part(&v, start..end));
            start = end;
            cache.append(&[id], &k, &v, angles()).unwrap();
        }
        let (k, v) = (cache.k().to_host().unwrap(), cache.v().to_host().unwrap());
        (rows(&k)[..11 * KV_HEADS].to_vec(), rows(&v)[..11 * KV_HEADS].to_vec())
    };
    assert_eq!(fill(&[11]), fill(&[1, 6, 7, 11]));
}

/// A cache in e4m3: new keys, rotated, and values become the codes that are nearest to them under their head's scale,
/// and stay these when a shared page is copied.
#[test]
fn tokens_become_codes_under_the_scales_of_their_heads() {
    const D_V: usize = 16;
    let session = Session::new(emulator());
    // The smaller scales let some values become the largest code.
    let scales = [[0.005f32, 0.3], [0.9, 0.004]];
    let rotary = Rotary { dim: 16, positions: 20, interleaved: false };
    let tables = rotary.tables(100.0);
    let buffers = tables.each_ref().map(|a| session.memory().upload(a).unwrap());
    let angles = || Some(Angles { rotary, cos: &buffers[0], sin: &buffers[1] });
    for dtype in [DType::F16, DType::BF16] {
        let shape = KvCacheShape {
            dtype: DType::E4M3,
            kv_heads: KV_HEADS,
            head_dim: D,
            head_dim_v: D_V,
            page_size: 5,
            pages: 8,
        };
        let [k_scale, v_scale] = &scales;
        let mut cache = KvCache::with_scales(&session, shape, [k_scale, v_scale]).unwrap();
        let draw = |shape: &[usize], seed| Tensor::random(dtype, shape, seed, 0.0);
        let upload = |tensor: &Tensor| session.upload(tensor).unwrap();
        // 11 tokens, of which the last page has one; then a token each for the two that share them.
        let first = [draw(&[1, 11, KV_HEADS, D], 1), draw(&[1, 11, KV_HEADS, D_V], 2)];
        let then = [draw(&[2, 1, KV_HEADS, D], 3), draw(&[2, 1, KV_HEADS, D_V], 4)];
        let prompt = cache.insert();
        cache.append(&[prompt], &upload(&first[0]), &upload(&first[1]), angles()).unwrap();
        let ids = [prompt, cache.fork(prompt).unwrap()];
        cache.append(&ids, &upload(&then[0]), &upload(&then[1]), angles()).unwrap();
        assert_eq!(cache.free_pages(), 8 - 4);

        let codes = |side: usize, columns: usize| {
            let of_row = |row: &[f32], position: usize, h: usize| {
                let mut row = row.to_vec();
                for pair in 0..if side == 0 { rotary.dim / 2 } else { 0 } {
                    let (x, y, at) = (row[pair], row[pair + 8], position * 8 + pair);
                    let (cos, sin) = (tables[0][at], tables[1][at]);
                    row[pair] = x.mul_add(cos, -(y * sin));
                    row[pair + 8] = y.mul_add(cos, x * sin);
                }
                row.into_iter().map(move |x| E4m3::from_f64((x / scales[side][h]).into()))
            };
            let mut codes = Vec::new();
            for b in 0..2 {
                let tokens = [(&first[side], 0, 11, 0), (&then[side], b, 1, 11)];
                for (tensor, entry, tokens, start) in tokens {
                    let values = tensor.to_f32();
                    for at in 0..tokens * KV_HEADS {
                        let row = &values[(entry * tokens * KV_HEADS + at) * columns..][..columns];
                        codes.extend(of_row(row, start + at / KV_HEADS, at % KV_HEADS));
                    }
                }
            }
            Tensor::from_vec(&[2, 12, KV_HEADS, columns], codes).unwrap()
        };
        let (k, v) = (codes(0, D), codes(1, D_V));
        let largest = |codes: &Tensor| codes.to_f32().iter().filter(|x| x.abs() == 448.0).count();
        assert!(largest(&k) > 10 && largest(&v) > 10);

        let p = Problem::builder(2, 4, 1, D).kv_heads(KV_HEADS).head_dim_v(D_V).seq_k(12);
        let p = p.causal(true).dtype(dtype).layout(Layout::TokensFirst).build().unwrap();
        let decode = cache.decode(p).unwrap();
        let batch = cache.batch(&decode, &ids).unwrap();
        let mut attention = session.decode(&DECODE_KERNELS[0], &decode).unwrap();
        // Small queries: scores of codes under 0.3 are large.
        let q = draw(&p.q_shape(), 9).scaled(1.0 / 16.0);
        attention.run(&upload(&q), cache.cached(&batch), Extras::default()).unwrap();
        let found = attention.outputs().unwrap();
        let contiguous = Decode::new(p).cache_dtype(DType::E4M3).unwrap();
        let inputs = DecodeInputs {
            tensors: Inputs::new(&q, &k, &v),
            seqused_k: None,
            page_table: None,
            scales: Some([k_scale, v_scale]),
        };
        let (expected, _) = session.run_decode(&DECODE_KERNELS[0], &contiguous, &inputs).unwrap();
        assert_eq!((&found.o, &found.lse), (&expected.o, &expected.lse), "{dtype}");
        let result = verify_decode(&contiguous, &inputs, &found).unwrap();
        assert!(result.passes(), "{dtype}: {result}");

        let refused = |scales: [&[f32]; 2], dtype| {
            let shape = KvCacheShape { dtype, ..shape };
            KvCache::with_scales(&session, shape, scales).unwrap_err().to_string()
        };
        assert!(refused([&[1.0], &[1.0; 2]], DType::E4M3).contains("k_scale = 1 scales"));
        assert!(refused([&[1.0; 2], &[1.0, 0.0]], DType::E4M3).contains("v_scale = 0"));
        assert!(refused([&[1.0; 2], &[1.0; 2]], DType::F16).contains("storage type = f16"));
        let wrong = upload(&draw(&[2, 1, KV_HEADS, D], 3).cast(DType::F32));
        let text = cache.append(&ids, &wrong, &upload(&then[1]), None).unwrap_err().to_string();
        assert!(text.contains("k is f32"), "{text}");
    }
}

/// What cannot be appended changes nothing, and says why.
#[test]
fn a_refused_append_changes_nothing() {
    let session = Session::new(emulator());
    let mut cache = cache(&session, 4, 3);
    let id = cache.insert();
    let tokens = |batch, tokens| {
        let (k, v) =
            (random(&[batch, tokens, KV_HEADS, D], 1), random(&[batch, tokens, KV_HEADS, D_V], 2));
        (session.upload(&k).unwrap(), session.upload(&v).unwrap())
    };
    let (k, v) = tokens(1, 9);
    cache.append(&[id], &k, &v, None).unwrap();
    assert_eq!((cache.free_pages(), cache.length(id).unwrap()), (0, 9));
    let mut refused = |ids: &[SequenceId], (k, v): (DeviceTensor, DeviceTensor), angles| {
        let text = cache.append(ids, &k, &v, angles).unwrap_err().to_string();
        assert_eq!((cache.free_pages(), cache.length(id).unwrap()), (0, 9), "{text}");
        text
    };
    assert!(refused(&[id], tokens(1, 4), None).contains("free pages = 0"));
    assert!(refused(&[id, id], tokens(2, 1), None).contains("twice"));
    assert!(refused(&[id], tokens(2, 1), None).contains("k"));
    let rotary = Rotary { dim: 32, positions: 9, interleaved: false };
    let buffers = rotary.tables(10_000.0).map(|a| session.memory().upload(&a).unwrap());
    let angles = Some(Angles { rotary, cos: &buffers[0], sin: &buffers[1] });
    assert!(refused(&[id], tokens(1, 1), angles).contains("a sequence may have 10"));
    let short = session.memory().upload(&[0f32]).unwrap();
    let rotary = Rotary { positions: 10, ..rotary };
    let angles = Some(Angles { rotary, cos: &short, sin: &short });
    assert!(refused(&[id], tokens(1, 1), angles).contains("cos"));

    let p = Problem::builder(1, 4, 1, D).kv_heads(KV_HEADS).head_dim_v(D_V).seq_k(8);
    let p = p.dtype(DType::F16).layout(Layout::TokensFirst);
    let decode = cache.decode(p.build().unwrap()).unwrap();
    assert!(cache.batch(&decode, &[id]).unwrap_err().to_string().contains("up to 8"));
    assert!(cache.batch(&decode, &[]).unwrap_err().to_string().contains("the decode has 1"));
    let other = cache.decode(p.layout(Layout::HeadsFirst).build().unwrap()).unwrap_err();
    assert!(other.to_string().contains("layout = HeadsFirst"), "{other}");
}
