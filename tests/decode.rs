//! Decoding against f64: a few queries against caches, contiguous and in pages, split and merged.

#[path = "gpu/graph.rs"]
mod graph;
#[path = "gpu/replay.rs"]
mod replay;
mod suite;

use std::{num::NonZeroU32, sync::Arc};

use flash_attention::{
    Alibi, DType, Device, GpuDevice, Layout, Problem, Tensor, Window,
    problem::ProblemBuilder,
    registry::{DECODE_KERNELS, Decode, Pages, Target},
    session::{DecodeInputs, Inputs, Outputs, Session, Work},
    verify::verify_decode,
};
use suite::{Draws, emulator, on_every_core};

/// A decode and its tensors. What no sequence has is NaN, in the cache and as page numbers.
#[derive(Clone)]
struct Setup {
    decode: Decode,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Option<Tensor>,
    sinks: Option<Tensor>,
    lengths: Vec<i32>,
    table: Option<Vec<i32>>,
    /// Of K and of V, of a cache in e4m3.
    scales: Option<[Vec<f32>; 2]>,
}

impl Setup {
    /// A contiguous cache, of sequences of these lengths.
    fn new(p: ProblemBuilder, lengths: &[usize]) -> Self {
        let p = p.build().unwrap();
        assert_eq!(lengths.len(), p.batch());
        let decode = Decode::new(p);
        let random = |shape: [usize; 4], seed| Tensor::random(p.dtype(), &shape, seed, 0.0);
        let of_heads = |shape: Option<Vec<usize>>, seed, change: fn(f64) -> f64| {
            let shape = shape?;
            let values = Tensor::random(DType::F32, &shape, seed, 0.0).to_f64();
            let values: Vec<f64> = values.into_iter().map(change).collect();
            Some(Tensor::from_f64(DType::F32, &shape, &values).unwrap())
        };
        let mut setup = Self {
            decode,
            q: random(p.q_shape(), 1),
            k: random(decode.k_shape(), 2),
            v: random(decode.v_shape(), 3),
            alibi_slopes: of_heads(p.alibi_shape(), 4, |x| x.abs() / 4.0),
            sinks: of_heads(p.sinks_shape(), 5, |x| x),
            lengths: lengths.iter().map(|&length| length as i32).collect(),
            table: None,
            scales: None,
        };
        for (tensor, columns) in [(&mut setup.k, p.head_dim()), (&mut setup.v, p.head_dim_v())] {
            let from = tensor.clone();
            *tensor = rearranged(&p, &from, [p.batch(), p.seq_k(), columns], |b, key| {
                (key < lengths[b]).then_some((b, key))
            });
        }
        setup
    }

    /// The same, with a cache in e4m3: scales that are no powers of two, and other ones for each head.
    fn in_e4m3(&self) -> Self {
        let p = self.decode.problem();
        let scales = |first: f32| (0..p.kv_heads()).map(|h| first + h as f32 / 3.0).collect();
        let scales = Some([scales(0.7), scales(1.9)]);
        // Values that use codes of every size, subnormal ones included.
        let codes = |tensor: &Tensor| tensor.scaled(0.9).cast(DType::E4M3);
        let (k, v) = (codes(&self.k), codes(&self.v));
        let decode = self.decode.cache_dtype(DType::E4M3).unwrap();
        Self { decode, k, v, scales, ..self.clone() }
    }

    /// The same cache in pages of `page_size` keys, shuffled. There are more pages than are used.
    fn in_pages(&self, page_size: usize, seed: u64) -> Self {
        let p = *self.decode.problem();
        let used: Vec<usize> =
            self.lengths.iter().map(|&length| (length as usize).div_ceil(page_size)).collect();
        let count = used.iter().sum::<usize>() + 3;
        let mut order: Vec<usize> = (0..count).collect();
        let mut draws = Draws::new(seed);
        for at in (1..count).rev() {
            order.swap(at, draws.below(at + 1));
        }
        let max_pages = p.seq_k().div_ceil(page_size) + 1;
        let mut table = vec![-7; p.batch() * max_pages];
        let mut of_page = vec![None; count];
        let mut next = order.into_iter();
        for (b, &used) in used.iter().enumerate() {
            for at in 0..used {
                let page = next.next().unwrap();
                table[b * max_pages + at] = page as i32;
                of_page[page] = Some((b, at));
            }
        }
        let pages = [page_size, count, max_pages].map(|n| n as u32);
        let [page_size_u32, pages, max_pages] = pages;
        let pages = Pages { page_size: page_size_u32, pages, max_pages };
        let decode = Decode::paged(p, pages).unwrap();
        let decode = decode.cache_dtype(self.decode.stored()).unwrap();
        let rows = |tensor: &Tensor, columns| {
            rearranged(&p, tensor, [count, page_size, columns], |page, slot| {
                let (b, at): (usize, usize) = of_page[page]?;
                let key = at * page_size + slot;
                (key < self.lengths[b] as usize).then_some((b, key))
            })
        };
        let (k, v) = (rows(&self.k, p.head_dim()), rows(&self.v, p.head_dim_v()));
        Self { decode, k, v, table: Some(table), ..self.clone() }
    }

    fn splits(&self, splits: u32) -> Self {
        Self { decode: self.decode.splits(NonZeroU32::new(splits)), ..self.clone() }
    }

    fn inputs(&self) -> DecodeInputs<'_> {
        DecodeInputs {
            tensors: Inputs {
                alibi_slopes: self.alibi_slopes.as_ref(),
                sinks: self.sinks.as_ref(),
                ..Inputs::new(&self.q, &self.k, &self.v)
            },
            seqused_k: Some(&self.lengths),
            page_table: self.table.as_deref(),
            scales: self.scales.as_ref().map(|scales| scales.each_ref().map(Vec::as_slice)),
        }
    }

    fn run(&self) -> Outputs {
        self.run_on(&emulator())
    }

    fn run_on(&self, device: &Arc<dyn Device>) -> Outputs {
        let session = Session::new(device.clone());
        session.run_decode(&DECODE_KERNELS[0], &self.decode, &self.inputs()).unwrap().0
    }

    /// What is wrong with what the kernel gives.
    fn fault(&self, label: &str) -> Option<String> {
        self.fault_on(&emulator(), label)
    }

    fn fault_on(&self, device: &Arc<dyn Device>, label: &str) -> Option<String> {
        let result = verify_decode(&self.decode, &self.inputs(), &self.run_on(device)).unwrap();
        let p = self.decode.problem();
        let of = format!("{} d {}, cache in {}", p.dtype(), p.head_dim(), self.decode.stored());
        (!result.passes()).then(|| format!("{label} {of}: {result}"))
    }
}

/// A cache of `[entries, rows, columns]` with the rows of `from` that `source` names, of all heads, in
/// the order of the problem's layout; NaN where there are none.
fn rearranged(
    p: &Problem,
    from: &Tensor,
    [entries, rows, columns]: [usize; 3],
    source: impl Fn(usize, usize) -> Option<(usize, usize)>,
) -> Tensor {
    let (heads, dtype) = (p.kv_heads(), from.dtype());
    let size = dtype.size();
    let shape = p.layout().shape(entries, heads, rows, columns);
    let mut to = Tensor::from_f64(dtype, &shape, &vec![f64::NAN; shape.iter().product()]).unwrap();
    let from_rows = match p.layout() {
        Layout::HeadsFirst => from.shape()[2],
        Layout::TokensFirst => from.shape()[1],
    };
    let first = |rows, [entry, h, row]: [usize; 3]| {
        let [stride_b, stride_h, stride_n] = p.layout().strides(heads, rows, columns);
        (entry * stride_b + h * stride_h + row * stride_n) * size
    };
    for (entry, row) in (0..entries).flat_map(|entry| (0..rows).map(move |row| (entry, row))) {
        let Some((from_entry, from_row)) = source(entry, row) else { continue };
        for h in 0..heads {
            let (at, of) =
                (first(rows, [entry, h, row]), first(from_rows, [from_entry, h, from_row]));
            let bytes = columns * size;
            to.as_bytes_mut()[at..at + bytes].copy_from_slice(&from.as_bytes()[of..of + bytes]);
        }
    }
    to
}

fn check_all(failures: impl IntoIterator<Item = Option<String>>) {
    let failures: Vec<String> = failures.into_iter().flatten().collect();
    assert!(failures.is_empty(), "{} fail:\n{}", failures.len(), failures.join("\n"));
}

/// A decode of `[batch, heads, kv_heads]`, `nq` queries, caches of up to `seq_k` keys.
fn shape(
    [batch, heads, kv_heads]: [usize; 3],
    nq: usize,
    seq_k: usize,
    d: usize,
) -> ProblemBuilder {
    let p = Problem::builder(batch, heads, nq, d).kv_heads(kv_heads).seq_k(seq_k);
    p.layout(Layout::TokensFirst).causal(true).dtype(DType::F16)
}

/// Both storage types and every head dim that there is an entry for, one between, and values of another.
const HEAD_DIMS: [(DType, usize, usize); 7] = [
    (DType::F16, 64, 64),
    (DType::BF16, 64, 64),
    (DType::F16, 128, 128),
    (DType::BF16, 128, 128),
    (DType::F16, 256, 256),
    (DType::BF16, 72, 40),
    (DType::F16, 192, 128),
];

/// Keys of a tile of a head dim.
fn tile(d: usize) -> usize {
    (DECODE_KERNELS[0].limits.sizes)(DType::F16, if d <= 64 { 64 } else { 128 }).keys[0] as usize
}

/// Lengths beside a tile, rows beside a tile, and every feature alone and together.
fn edges() -> Vec<(&'static str, Setup)> {
    let window = |left, right| Window { left: Some(left), right };
    let mut cases = Vec::new();
    for (dtype, d, d_v) in HEAD_DIMS {
        let (bc, dims) = (tile(d), |p: ProblemBuilder| p.dtype(dtype).head_dim_v(d_v));
        let long = 2 * bc + 5;
        let mut add = |name, p: ProblemBuilder, lengths: &[usize]| {
            cases.push((name, Setup::new(dims(p), lengths)));
        };
        add("one query", shape([2, 2, 2], 1, long, d), &[long, bc]);
        add("beside a tile", shape([4, 4, 1], 1, long, d), &[bc - 1, bc + 1, 1, 0]);
        add("a group of 16", shape([1, 16, 1], 1, long, d), &[long - 3]);
        add("more rows than a tile", shape([1, 17, 1], 2, bc + 1, d), &[bc + 1]);
        add("speculative", shape([2, 8, 2], 5, long, d), &[long, 3]);
        if (dtype, d) != (DType::F16, 64) && d != 128 {
            continue;
        }
        add("16 queries", shape([1, 2, 2], 16, long, d), &[long]);
        add("not causal", shape([1, 2, 1], 3, long, d).causal(false), &[long]);
        add(
            "a window",
            shape([2, 4, 2], 3, long, d).window(window(bc as u32 + 3, None)),
            &[long, bc],
        );
        add("a short window", shape([1, 2, 1], 4, long, d).window(window(2, None)), &[long]);
        add(
            "a window to both sides",
            shape([1, 2, 1], 4, long, d).causal(false).window(window(9, Some(1))),
            &[long],
        );
        add("a cap", shape([1, 4, 1], 2, long, d).softcap(Some(2.0)), &[long]);
        let slopes = Some(Alibi::PerBatchAndHead);
        add("ALiBi", shape([2, 6, 2], 3, long, d).alibi(slopes), &[long, 70]);
        add("sinks", shape([2, 6, 2], 2, long, d).sinks(true), &[long, 0]);
        let all = shape([2, 6, 2], 7, long, d).window(window(bc as u32, None)).sinks(true);
        let all = all.softcap(Some(3.0)).alibi(Some(Alibi::PerHead)).layout(Layout::HeadsFirst);
        add("everything", all, &[long, bc + 2]);
    }
    cases
}

/// The edges of a cache in e4m3: those with head dims that are multiples of 16.
fn edges_in_e4m3() -> Vec<(&'static str, Setup)> {
    let whole = |setup: &Setup| {
        let p = setup.decode.problem();
        p.head_dim() % 16 == 0 && p.head_dim_v() % 16 == 0
    };
    let cases = edges().into_iter().filter(|(_, setup)| whole(setup));
    let mut cases: Vec<_> = cases.map(|(name, setup)| (name, setup.in_e4m3())).collect();
    let odd = shape([2, 4, 2], 1, 150, 80).dtype(DType::BF16).head_dim_v(48);
    cases.push(("odd head dims", Setup::new(odd, &[150, 33]).in_e4m3()));
    cases
}

#[test]
fn edges_and_features_are_right() {
    // Split or not, in turns: both take the same way up to their last step.
    let cases = edges().into_iter().chain(edges_in_e4m3());
    let cases = cases.enumerate().map(|(at, case)| (case, [1, 3][at / 2 % 2]));
    check_all(on_every_core(cases, |((name, setup), splits)| {
        setup.splits(splits).fault(&format!("{name}, {splits} splits"))
    }));
}

/// As above on a GPU, split and not, contiguous and in pages.
#[test]
fn edges_and_features_are_right_on_a_gpu() {
    suite::on_a_gpu(|gpu| {
        check_all(edges().iter().chain(&edges_in_e4m3()).enumerate().flat_map(
            |(at, (name, setup))| {
                [1, 3, 97].into_iter().flat_map(move |splits| {
                    let page_size = [1, 16, 48, 256][at % 4];
                    let (alone, paged) =
                        (setup.splits(splits), setup.in_pages(page_size, 1).splits(splits));
                    let label = format!("{name}, {splits} splits");
                    let in_pages = format!("{label}, pages of {page_size}");
                    [alone.fault_on(gpu, &label), paged.fault_on(gpu, &in_pages)]
                })
            },
        ));
    });
}

/// The pages of a cache are its rows somewhere else: the same bits, whatever their size and order.
#[test]
fn pages_give_the_bits_of_a_contiguous_cache() {
    let mut cases = Vec::new();
    for (dtype, d, layout) in [
        (DType::F16, 64, Layout::TokensFirst),
        (DType::BF16, 128, Layout::TokensFirst),
        (DType::F16, 256, Layout::HeadsFirst),
    ] {
        let bc = tile(d);
        let p = shape([3, 4, 2], 2, 2 * bc + 9, d).dtype(dtype).layout(layout);
        let setup = Setup::new(p, &[2 * bc + 9, 0, bc + 1]);
        cases.extend([1, 7, 16, 48, 64, 256].map(|page_size| (setup.clone(), page_size)));
        cases.extend([1, 16, 96].map(|page_size| (setup.in_e4m3(), page_size)));
    }
    pages_change_no_bit_of(cases, 2);
}

/// A warp looks up the pages of 32 tiles at once, and looks up again where its part has more.
#[test]
fn pages_of_a_long_part_give_the_bits_of_a_contiguous_cache() {
    let length = 70 * tile(128);
    let setup = Setup::new(shape([2, 2, 1], 1, length, 128), &[length - 5, length / 2]);
    let cases = [(setup.clone(), 64), (setup.in_e4m3(), 64), (setup, 48)];
    pages_change_no_bit_of(cases.into(), 1);
}

fn pages_change_no_bit_of(cases: Vec<(Setup, usize)>, splits: u32) {
    check_all(on_every_core(cases, |(setup, page_size)| {
        let expected = setup.splits(splits).run();
        let paged = setup.in_pages(page_size, page_size as u64).splits(splits);
        let found = paged.run();
        let same = (&found.o, &found.lse) == (&expected.o, &expected.lse);
        let d = setup.decode.problem().head_dim();
        (!same).then(|| format!("pages of {page_size}, d {d}")).or_else(|| paged.fault("in pages"))
    }));
}

/// Any number of splits gives the same within rounding, those without a tile included: the plan's own too.
#[test]
fn splits_change_nothing_but_rounding() {
    let mut cases = Vec::new();
    for d in [64, 128] {
        let setup =
            Setup::new(shape([2, 4, 1], 2, 6 * tile(d), d).sinks(true), &[6 * tile(d) - 3, 50]);
        cases.extend([1, 2, 3, 5, 17, 97].map(|splits| (setup.splits(splits), splits)));
        cases.extend([3, 97].map(|splits| (setup.in_e4m3().splits(splits), splits)));
        cases.push((setup, 0));
    }
    check_all(on_every_core(cases, |(setup, splits)| setup.fault(&format!("{splits} splits"))));
}

/// A sequence that has no key: O is 0 and the LSE -inf, or the sink.
#[test]
fn sequences_without_keys_give_nothing() {
    for (splits, sinks) in [(1, false), (3, false), (1, true), (3, true)] {
        let p = shape([2, 4, 2], 2, 300, 64).sinks(sinks);
        let setup = Setup::new(p, &[0, 1]).splits(splits);
        let outputs = setup.run();
        let half = outputs.o.len() / 2;
        assert!(outputs.o.to_f32()[..half].iter().all(|&x| x == 0.0));
        let lse = outputs.lse.to_f32();
        for h in 0..4 {
            let expected =
                setup.sinks.as_ref().map_or(f32::NEG_INFINITY, |sinks| sinks.to_f32()[h]);
            let found = lse[2 * h];
            assert!((found - expected).abs() < 1e-6 || found == expected, "{found} for {expected}");
            // Of two queries and one key, the first sees nothing.
            assert_eq!(lse[8 + 2 * h] == f32::NEG_INFINITY, !sinks);
        }
        assert_eq!(setup.fault("no keys"), None);
    }
}

/// One plan and its launches, as a CUDA graph has them: other lengths in device memory.
#[test]
fn launches_are_repeated_with_other_lengths() {
    let most = 700;
    for page_size in [0, 16] {
        let setup = Setup::new(shape([3, 4, 2], 2, most, 64), &[most; 3]);
        let setup = if page_size == 0 { setup } else { setup.in_pages(page_size, 3) };
        let mut setup = setup.splits(5);
        let session = Session::new(emulator());
        let plan = DECODE_KERNELS[0].plan(&setup.decode, &session.target()).unwrap();
        let mut prepared = session.prepare_decode(plan, &setup.inputs()).unwrap();
        for lengths in [[700, 1, 300], [0, 128, 129], [3, 700, 0], [127, 255, 700]] {
            prepared.set_lengths(&lengths).unwrap();
            prepared.launch().unwrap();
            setup.lengths = lengths.to_vec();
            let outputs = prepared.outputs().unwrap();
            let result = verify_decode(&setup.decode, &setup.inputs(), &outputs).unwrap();
            assert!(result.passes(), "{lengths:?}: {result}");
        }
        assert!(prepared.set_lengths(&[1]).is_err());
    }
}

/// A decode from a cache in e4m3 is one from the same numbers in f16, where scales are powers of two and D does not
/// change the order of sums: within rounding, and on GPUs without the conversion of codes too.
#[test]
fn codes_are_the_numbers_that_they_stand_for() {
    codes_are_numbers_on(&emulator());
}

/// Both ways on a GPU that has the conversion: the others' way is not launched there otherwise.
#[test]
fn codes_are_the_numbers_that_they_stand_for_on_a_gpu() {
    suite::on_a_gpu(|gpu| {
        if gpu.compute_capability() == (9, 0) {
            codes_are_numbers_on(gpu);
        }
    });
}

fn codes_are_numbers_on(device: &Arc<dyn Device>) {
    for (dtype, d) in [(DType::F16, 64), (DType::BF16, 128), (DType::F16, 256)] {
        let setup = Setup::new(shape([2, 4, 2], 2, 300, d).dtype(dtype), &[300, 77]).in_e4m3();
        let session = Session::new(device.clone());
        let run = |target: Target| {
            let plan = DECODE_KERNELS[0].plan(&setup.decode, &target).unwrap();
            let symbol = plan.entries().next().unwrap().entry.symbol;
            let mut prepared = session.prepare_decode(plan, &setup.inputs()).unwrap();
            prepared.launch().unwrap();
            (symbol, prepared.outputs().unwrap())
        };
        let hopper = session.target();
        let (with_conversion, expected) = run(hopper);
        let mut ampere = hopper;
        ampere.capability = (8, 0);
        let (without, found) = run(ampere);
        assert!(with_conversion.contains("hopper") && !without.contains("hopper"));
        // Factors of 2^8 alone differ, but where f32 rounds them.
        let result = verify_decode(&setup.decode, &setup.inputs(), &found).unwrap();
        assert!(result.passes(), "{without}: {result}");
        assert_eq!(found.o, expected.o, "{without}");
    }
}

/// A key or a value that is NaN is NaN in what sees it, and a large query in bf16 is finite in f16.
#[test]
fn codes_without_a_number_are_not_taken_for_one() {
    no_numbers_are_numbers_on(&emulator());
}

#[test]
fn codes_without_a_number_are_not_taken_for_one_on_a_gpu() {
    suite::on_a_gpu(no_numbers_are_numbers_on);
}

fn no_numbers_are_numbers_on(device: &Arc<dyn Device>) {
    for dtype in [DType::F16, DType::BF16] {
        let p = shape([1, 2, 1], 1, 40, 64).dtype(dtype);
        let setup = Setup::new(p, &[40]).in_e4m3();
        for (of_keys, code) in [(true, 0x7f), (false, 0xff)] {
            let mut wrong = setup.clone();
            let side = if of_keys { &mut wrong.k } else { &mut wrong.v };
            side.as_bytes_mut()[64 * 33 + 7] = code;
            let o = wrong.run_on(device).o.to_f32();
            let expected = |column: usize| of_keys || column % 64 == 7;
            for (at, x) in o.iter().enumerate() {
                assert_eq!(x.is_nan(), expected(at), "{dtype} {at}: {x}");
            }
        }
    }
    let large = Setup::new(shape([1, 2, 1], 2, 200, 64).dtype(DType::BF16), &[200]).in_e4m3();
    for factor in [1e30, 1e-5] {
        let p = large.decode.problem().to_builder().scale(Some((0.125 / factor) as f32));
        let decode = Decode::new(p.build().unwrap()).cache_dtype(DType::E4M3).unwrap();
        let setup = Setup { decode, q: large.q.scaled(factor), ..large.clone() };
        assert_eq!(setup.fault_on(device, "queries of another magnitude"), None);
    }
}

/// What does not fit a cache in e4m3 is named.
#[test]
fn wrong_scales_are_named() {
    let setup = Setup::new(shape([1, 4, 2], 1, 40, 64), &[40]).in_e4m3();
    let session = Session::new(emulator());
    let refused = |setup: &Setup| {
        let result = session.run_decode(&DECODE_KERNELS[0], &setup.decode, &setup.inputs());
        result.unwrap_err().to_string()
    };
    let text = refused(&Setup { scales: None, ..setup.clone() });
    assert!(text.contains("k_scale is missing: the cache is in e4m3"), "{text}");
    let text = refused(&Setup { scales: Some([vec![1.0; 2], vec![1.0; 4]]), ..setup.clone() });
    assert!(text.contains("v_scale"), "{text}");
    let text = refused(&Setup { k: setup.k.cast(DType::F16), ..setup.clone() });
    assert!(text.contains("k is f16, expected e4m3"), "{text}");
    let plain = Setup::new(shape([1, 4, 2], 1, 40, 64), &[40]);
    let text = refused(&Setup { scales: setup.scales.clone(), ..plain });
    assert!(text.contains("k_scale was given"), "{text}");
    let text = shape([1, 1, 1], 1, 1, 64).dtype(DType::E4M3).build().unwrap_err().to_string();
    assert!(text.contains("storage type = e4m3"), "{text}");
}

/// The same by a CUDA graph.
#[test]
fn a_graph_is_replayed_with_other_lengths_on_a_gpu() {
    match GpuDevice::open(0) {
        Ok(gpu) => {
            let gpu = Arc::new(gpu);
            replay::follows_lengths(&gpu, gpu.context());
        }
        Err(error) => suite::skipped(&error),
    }
}

/// Sequences with the same beginning share its pages.
#[test]
fn a_prefix_is_shared_by_sequences() {
    let (page_size, prefix) = (16, 64);
    let mut setup =
        Setup::new(shape([3, 4, 2], 1, 200, 64), &[200, 150, prefix]).in_pages(page_size, 1);
    let max_pages = setup.decode.pages().unwrap().max_pages as usize;
    let table = setup.table.as_mut().unwrap();
    for b in 1..3 {
        table.copy_within(..prefix / page_size, b * max_pages);
    }
    for splits in [1, 2] {
        assert_eq!(setup.splits(splits).fault("a prefix"), None);
    }
}

/// Lengths and pages in device memory that are out of range lead to nothing outside of the cache.
#[test]
fn numbers_out_of_range_stay_within_the_cache() {
    let setup = Setup::new(shape([4, 2, 1], 1, 100, 64), &[100; 4]).in_pages(16, 5).splits(2);
    let session = Session::new(emulator());
    let kernel = &DECODE_KERNELS[0];
    let mut decode = session.decode(kernel, &setup.decode).unwrap();
    let upload = |tensor: &Tensor| session.upload(tensor).unwrap();
    let (q, k, v) = (upload(&setup.q), upload(&setup.k), upload(&setup.v));
    let mut run = |lengths: &[i32], table: &[i32]| {
        let numbers = |numbers: &[i32]| session.memory().upload(numbers).unwrap();
        let (lengths, table) = (numbers(lengths), numbers(table));
        let cache = flash_attention::session::Cached {
            k: &k,
            v: &v,
            seqused_k: Some(&lengths),
            page_table: Some(&table),
            scales: None,
        };
        decode.run(&q, cache, flash_attention::Extras::default()).unwrap();
        let outputs = decode.outputs().unwrap();
        (outputs.o, outputs.lse)
    };
    let table = setup.table.clone().unwrap();
    let expected = run(&[100, 0, 100, 0], &table);
    assert_eq!(run(&[i32::MAX, -1, 101, i32::MIN], &table), expected);
    let max_pages = setup.decode.pages().unwrap().max_pages as usize;
    // Entries beyond a length are read, but no key comes from there.
    let expected = run(&[33, 0, 64, 100], &table);
    let mut beyond = table.clone();
    for (pages, used) in beyond.chunks_mut(max_pages).zip([3, 0, 4, 7]) {
        pages[used..].fill(i32::MAX);
    }
    assert_eq!(run(&[33, 0, 64, 100], &beyond), expected);
    for page in [-1, i32::MIN, i32::MAX, setup.decode.pages().unwrap().pages as i32] {
        run(&[100; 4], &vec![page; 4 * max_pages]);
    }
    // On the host they are named.
    let refused = |setup: &Setup| {
        let session = Session::new(emulator());
        session.run_decode(kernel, &setup.decode, &setup.inputs()).unwrap_err().to_string()
    };
    let long = Setup { lengths: vec![100, 101, 0, 0], ..setup.clone() };
    assert!(refused(&long).contains("101 (sequence 1)"), "{}", refused(&long));
    let mut wrong = setup.clone();
    wrong.table.as_mut().unwrap()[max_pages] = -1;
    assert!(refused(&wrong).contains("page_table = -1 (sequence 1)"), "{}", refused(&wrong));
    wrong.table = None;
    assert!(refused(&wrong).contains("page_table"), "{}", refused(&wrong));
}

/// More sequences than a grid's `y` and `z` would count in a few more heads.
#[test]
fn many_sequences_are_right() {
    let lengths: Vec<usize> = (0..8300).map(|b| b % 3).collect();
    let setup = Setup::new(shape([8300, 1, 1], 1, 2, 64), &lengths);
    assert_eq!(setup.splits(1).fault("8300 sequences"), None);
}
