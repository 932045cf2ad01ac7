//! Caches of a file: `seqused_k` and `page_table`.

use flash_attention::{
    DType, Layout, Problem, Tensor,
    oracle::{self, Gathered},
    registry::{Decode, Pages},
    session::{DecodeInputs, Inputs, Outputs},
    verify::verify_decode,
};
use safetensors::Dtype;

use crate::{Entry, Folder, entry};

const FILES: [&str; 6] =
    ["--input", "in.safetensors", "--output", "out.safetensors", "--layout", "bnhd"];

fn numbers(name: &'static str, shape: &[usize], numbers: &[i32]) -> Entry {
    let bytes = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    (name, Dtype::I32, shape.to_vec(), bytes)
}

struct Case {
    decode: Decode,
    tensors: [Tensor; 3],
    sinks: Tensor,
    /// Of K and of V in e4m3.
    scales: Option<[Tensor; 2]>,
}

const LENGTHS: [i32; 2] = [17, 5];
const TABLE: [i32; 6] = [4, 0, 2, 3, -1, -1];

impl Case {
    /// Two sequences of up to 24 keys, in pages of 8 or contiguous.
    fn new(paged: bool) -> Self {
        let p = Problem::builder(2, 4, 2, 32).kv_heads(2).seq_k(24).causal(true).sinks(true);
        let p = p.dtype(DType::F16).layout(Layout::TokensFirst).build().unwrap();
        let pages = Pages { page_size: 8, pages: 5, max_pages: 3 };
        let decode = if paged { Decode::paged(p, pages).unwrap() } else { Decode::new(p) };
        let random = |shape: [usize; 4], seed| Tensor::random(DType::F16, &shape, seed, 0.0);
        let (k, v) = (random(decode.k_shape(), 2), random(decode.v_shape(), 3));
        let sinks = Tensor::random(DType::F32, &[4], 4, 0.0);
        Self { decode, tensors: [random(p.q_shape(), 1), k, v], sinks, scales: None }
    }

    /// The same with a cache in e4m3.
    fn in_e4m3(self) -> Self {
        let [q, k, v] = &self.tensors;
        let tensors = [q.clone(), k.cast(DType::E4M3), v.cast(DType::E4M3)];
        let scales = |of| Tensor::from_f32(DType::F32, &[2], of).unwrap();
        let scales = Some([scales(&[0.7, 1.3]), scales(&[1.9, 0.4])]);
        let decode = self.decode.cache_dtype(DType::E4M3).unwrap();
        Self { decode, tensors, scales, ..self }
    }

    fn inputs(&self) -> DecodeInputs<'_> {
        let [q, k, v] = &self.tensors;
        DecodeInputs {
            tensors: Inputs { sinks: Some(&self.sinks), ..Inputs::new(q, k, v) },
            seqused_k: Some(&LENGTHS),
            page_table: self.decode.pages().map(|_| &TABLE[..]),
            scales: self
                .scales
                .as_ref()
                .map(|scales| scales.each_ref().map(|scales| scales.as_slice().unwrap())),
        }
    }

    fn entries(&self) -> Vec<Entry> {
        let [q, k, v] = &self.tensors;
        let mut entries = vec![entry("q", q), entry("k", k), entry("v", v)];
        entries.push(entry("sinks", &self.sinks));
        entries.push(numbers("seqused_k", &[2], &LENGTHS));
        if self.decode.pages().is_some() {
            entries.push(numbers("page_table", &[2, 3], &TABLE));
        }
        if let Some([k, v]) = &self.scales {
            entries.extend([entry("k_scale", k), entry("v_scale", v)]);
        }
        entries
    }
}

#[test]
fn caches_of_both_kinds_are_read_from_the_file() {
    for (paged, codes) in [(false, false), (true, false), (true, true)] {
        let (case, folder) = (Case::new(paged), Folder::new());
        let case = if codes { case.in_e4m3() } else { case };
        folder.save(&case.entries());
        folder.command(&FILES).arg("--causal").assert().success();
        let (o, lse) = (folder.load("o", DType::F16), folder.load("lse", DType::F32));
        let outputs = Outputs { o, lse, weights: None };
        let result = verify_decode(&case.decode, &case.inputs(), &outputs).unwrap();
        assert!(result.passes(), "{paged}: {result}");

        // What another program saved is compared by the same rule; one element that is off fails.
        let gathered = Gathered::new(&case.decode, &case.inputs()).unwrap();
        let exact = oracle::reference(
            &gathered.problem,
            &gathered.inputs(),
            &oracle::all_rows(&gathered.problem),
        );
        // [H, B Nq, D] to [B, Nq, H, D].
        let o = Tensor::from_f64(DType::F16, &[1, 4, 4, 32], &exact.o).unwrap();
        let o = o.swap_middle().unwrap().reshaped(&[2, 2, 4, 32]).unwrap();
        let check = ["--input", "in.safetensors", "--layout", "bnhd", "--causal", "--check"];
        let mut with_o = case.entries();
        with_o.push(entry("o", &o));
        folder.save(&with_o);
        assert!(folder.printed(&check, 0).contains("o passed"));
        let mut values = o.to_f64();
        // Sequence 1, query 0, head 3, column 7.
        values[(2 * 4 + 3) * 32 + 7] += 1.0;
        with_o.pop();
        with_o.push(entry("o", &Tensor::from_f64(DType::F16, o.shape(), &values).unwrap()));
        folder.save(&with_o);
        let printed = folder.printed(&check, 1);
        assert!(printed.contains("o FAILED") && printed.contains("[1, 3, 0, 7]"), "{printed}");
    }
}

#[test]
fn what_is_wrong_with_a_cache_is_one_line() {
    let case = Case::new(true);
    for (change, part) in [
        (numbers("seqused_k", &[2], &[25, 1]), "seqused_k = 25 (sequence 0)"),
        (numbers("seqused_k", &[3], &[1, 1, 1]), "seqused_k"),
        (numbers("page_table", &[2, 3], &[4, 0, 5, 0, 0, 0]), "page_table = 5 (sequence 0)"),
        (numbers("page_table", &[6], &TABLE), "[2, pages of a sequence]"),
    ] {
        let folder = Folder::new();
        let mut entries = case.entries();
        entries.retain(|(name, ..)| *name != change.0);
        entries.push(change);
        folder.save(&entries);
        let line = folder.refused(&FILES);
        assert!(line.contains(part), "{line}");
    }
    let codes = Case::new(true).in_e4m3();
    for (change, part) in [
        (None, "k_scale is missing: the cache is in e4m3"),
        (Some(numbers("k_scale", &[2], &[1, 1])), "it must be f32 [2], one for each head"),
    ] {
        let folder = Folder::new();
        let mut entries = codes.entries();
        entries.retain(|(name, ..)| *name != "k_scale");
        entries.extend(change);
        folder.save(&entries);
        let line = folder.refused(&FILES);
        assert!(line.contains(part), "{line}");
    }
    let folder = Folder::new();
    folder.save(&case.entries());
    let line = folder.refused(&[&FILES[..], &["--kernel", "flash_mma"]].concat());
    assert!(line.contains("--kernel is not for caches"), "{line}");
    let line = folder.refused(&[&FILES[..], &["--dropout", "0.1"]].concat());
    assert!(line.contains("does not support dropout"), "{line}");
}
