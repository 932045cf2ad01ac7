//! Every entry of the checked-in PTX contains the instructions its rung is about.
//!
//! A compiler that scalarises a vector load or a kernel that silently takes a slower
//! path still computes the right result; this is where it is noticed.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use ptx_builder::manifest::Manifest;
use ptx_builder::pack::{self, entries};
use ptx_builder::{Workspace, ptxas};

// Whole mnemonics, with what they are given where it is a number. `DTYPE` is the entry's.
const EX2: &str = "ex2.approx.ftz.f32 ";
const MMA: &str = "mma.sync.aligned.m16n8k16.row.col.f32.DTYPE.DTYPE.f32 {";
const MMA_F16: &str = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {";
const LDMATRIX: &str = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {";
const LDMATRIX_TRANS: &str = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {";
const CP_ASYNC: &str = "cp.async.cg.shared.global.L2::128B [";
const BAR: &str = "bar.sync 0;";
const STORE: &str = "st.global.v4.b32 [";
const WGMMA: &str = "k16.f32.DTYPE.DTYPE {";
const BULK_LOAD: &str =
    "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [";
const FENCE_INIT: &str = "fence.mbarrier_init.release.cluster; fence.proxy.async;";
const TRY_WAIT: &str = "mbarrier.try_wait.parity.shared::cta.b64 ";
const EXPECT_TX: &str = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [";

/// Rung (a prefix of the entry's name; the longest that fits counts) and what its
/// entries must contain. A rung that is not named here passes the general checks only.
const REQUIRED: &[(&str, &[&str])] = &[
    ("naive_softmax", &[EX2]),
    ("standard_scores", &[MMA, LDMATRIX, CP_ASYNC, BAR, STORE]),
    ("standard_output", &[MMA, LDMATRIX, CP_ASYNC, BAR, STORE]),
    ("standard_scores_f32", &["ld.shared", BAR, "fma.rn.f32"]),
    ("standard_output_f32", &["ld.shared", BAR, "fma.rn.f32"]),
    ("standard_softmax", &[EX2, CP_ASYNC, "ld.shared.v4.b32 {", STORE]),
    ("flash_", &[EX2, "ld.shared", BAR]),
    ("flash_tiled", &[EX2, "ld.shared", BAR, "fma.rn.f32"]),
    ("flash_mma", &[EX2, BAR, MMA, LDMATRIX]),
    ("flash_turing", &[EX2, BAR, "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {", LDMATRIX]),
    ("flash_swizzled", &[EX2, BAR, MMA, LDMATRIX]),
    ("flash_async", &[EX2, BAR, MMA, LDMATRIX, CP_ASYNC]),
    ("flash_pipelined", &[EX2, BAR, MMA, LDMATRIX, CP_ASYNC]),
    (
        "flash_tf32",
        &[
            EX2,
            BAR,
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
            LDMATRIX,
            "ld.shared.v4.b32 {",
            CP_ASYNC,
            STORE,
        ],
    ),
    (
        "flash_hopper",
        &[
            EX2,
            WGMMA,
            "wgmma.fence.sync.aligned;",
            "wgmma.commit_group.sync.aligned;",
            "wgmma.wait_group.sync.aligned 0;",
            "wgmma.wait_group.sync.aligned 1;",
            BULK_LOAD,
            "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [",
            "cp.async.bulk.commit_group;",
            "cp.async.bulk.wait_group.read 0;",
            "fence.proxy.async.shared::cta;",
            FENCE_INIT,
            "setmaxnreg.inc.sync.aligned.u32 ",
            "setmaxnreg.dec.sync.aligned.u32 ",
            TRY_WAIT,
            EXPECT_TX,
            "stmatrix.sync.aligned.m8n8.x4.shared.b16 [",
        ],
    ),
    ("backward_naive_scores", &[EX2]),
    ("backward_standard", &[MMA, LDMATRIX_TRANS, CP_ASYNC, BAR, STORE]),
    ("backward_standard_scores", &[EX2, MMA, LDMATRIX, CP_ASYNC, BAR, STORE]),
    ("backward_standard_queries", &[MMA, LDMATRIX, LDMATRIX_TRANS, CP_ASYNC, BAR, STORE]),
    ("backward_standard_scores_f32", &[EX2, "ld.shared", BAR, "fma.rn.f32"]),
    ("backward_standard_queries_f32", &["ld.shared", BAR, "fma.rn.f32"]),
    ("backward_standard_keys_f32", &["ld.shared", BAR, "fma.rn.f32"]),
    ("backward_standard_values_f32", &["ld.shared", BAR, "fma.rn.f32"]),
    ("backward_tiled", &[EX2, "ld.shared.v4.b32 {", BAR, "fma.rn.f32"]),
    ("backward_mma", &[EX2, BAR, MMA, LDMATRIX, CP_ASYNC, "atom.global.add.f32 "]),
    ("decode_split", &[EX2, BAR, MMA, LDMATRIX, CP_ASYNC, STORE, "bar.warp.sync "]),
    (
        "decode_e4m3",
        &[EX2, BAR, MMA_F16, LDMATRIX, LDMATRIX_TRANS, CP_ASYNC, STORE, "bar.warp.sync "],
    ),
    (
        "decode_e4m3_hopper",
        &[EX2, BAR, MMA_F16, LDMATRIX, LDMATRIX_TRANS, CP_ASYNC, STORE, "cvt.rn.f16x2.e4m3x2 "],
    ),
    ("decode_combine", &[EX2, BAR, "ld.global.v4.b32 {"]),
    ("linear_tiled", &["ld.shared", BAR, "fma.rn.f32"]),
    ("linear_mma", &[MMA, LDMATRIX, CP_ASYNC, BAR, STORE]),
    ("linear_mma_f16_dx", &[MMA, LDMATRIX, LDMATRIX_TRANS, CP_ASYNC, BAR, STORE]),
    ("linear_mma_bf16_dx", &[MMA, LDMATRIX, LDMATRIX_TRANS, CP_ASYNC, BAR, STORE]),
    ("linear_mma_f16_dw", &[MMA, LDMATRIX_TRANS, CP_ASYNC, BAR, STORE]),
    ("linear_mma_bf16_dw", &[MMA, LDMATRIX_TRANS, CP_ASYNC, BAR, STORE]),
    ("linear_bias", &["ld.global.v4.b32 {", BAR, "shfl.sync.bfly.b32 "]),
    (
        "linear_hopper",
        &[
            ".reqnctapercluster",
            WGMMA,
            "wgmma.fence.sync.aligned;",
            "wgmma.commit_group.sync.aligned;",
            "wgmma.wait_group.sync.aligned 0;",
            BULK_LOAD,
            "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [",
            FENCE_INIT,
            "barrier.cluster.arrive.release.aligned;",
            "barrier.cluster.wait.acquire.aligned;",
            "mapa.shared::cluster.u32 ",
            "mbarrier.arrive.shared::cluster.b64 _, [",
            TRY_WAIT,
            EXPECT_TX,
            "setmaxnreg.inc.sync.aligned.u32 232;",
            "setmaxnreg.dec.sync.aligned.u32 40;",
            STORE,
        ],
    ),
    (
        "cluster_probe_f32",
        &[
            ".reqnctapercluster",
            "barrier.cluster.arrive.release.aligned;",
            "barrier.cluster.wait.acquire.aligned;",
            "ld.shared::cluster.b32 ",
            "st.shared::cluster.b32 [",
            FENCE_INIT,
            "fence.proxy.async.shared::cta;",
            "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [",
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 ",
            "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group [",
            "cp.async.bulk.commit_group;",
            "cp.async.bulk.wait_group.read 0;",
        ],
    ),
];

/// Instructions that belong to a later architecture than the module's.
const FORBIDDEN: &[(&str, &[&str])] =
    &[("sm_75", &["cp.async", "wgmma", "setmaxnreg", ".bf16x2"]), ("sm_80", &["wgmma", "bulk"])];

fn required(entry: &str) -> &'static [&'static str] {
    REQUIRED
        .iter()
        .filter(|(rung, _)| entry.starts_with(rung))
        .max_by_key(|(rung, _)| rung.len())
        .map_or(&[], |(_, instructions)| instructions)
}

/// Beginnings of the instructions that order, wait and hand over; what they are given, where that is
/// a number, counts as part of them.
const SYNCHRONISATION: &[&str] = &[
    "bar.",
    "barrier.",
    "fence.",
    "mbarrier.",
    "setmaxnreg.",
    "cp.async.commit_group",
    "cp.async.wait_group",
    "cp.async.bulk.commit_group",
    "cp.async.bulk.wait_group",
    "wgmma.fence",
    "wgmma.commit_group",
    "wgmma.wait_group",
];

/// How often an entry has each instruction that synchronises.
fn synchronisation(text: &str) -> BTreeMap<String, u32> {
    let mut counts = BTreeMap::new();
    // Inline assembly has several instructions a line, some in braces, some under a predicate.
    for instruction in text.split(['\n', ';', '{', '}']).map(str::trim) {
        let predicate = instruction.starts_with('@');
        let rest = instruction.split_once(' ').filter(|_| predicate);
        let instruction = rest.map_or(instruction, |(_, rest)| rest.trim());
        let found = SYNCHRONISATION.iter().any(|start| instruction.starts_with(start));
        let mut words = instruction.split_whitespace();
        let Some(mnemonic) = words.next().filter(|_| found) else { continue };
        let number = words.next().filter(|word| word.bytes().all(|b| b.is_ascii_digit()));
        let name = number.map_or(mnemonic.to_owned(), |n| format!("{mnemonic} {n}"));
        *counts.entry(name).or_default() += 1;
    }
    counts
}

/// The synchronisation of all entries, a line each.
fn all_synchronisation(module: &str, text: &str) -> String {
    let mut lines = String::new();
    for (name, text) in entries(text) {
        let counts = synchronisation(text);
        if counts.is_empty() {
            continue;
        }
        let counts: Vec<_> = counts.iter().map(|(name, count)| format!("{count} {name}")).collect();
        lines += &format!("{module} {name}: {}\n", counts.join(", "));
    }
    lines
}

/// A fence or a wait that the compiler loses, or a kernel, changes nothing that a machine without
/// a GPU can see: their numbers are held against a list that is read when it changes.
#[test]
fn entries_synchronise_as_often_as_was_reviewed() {
    let folder = Workspace::of_this_crate().checked_in();
    let Some(manifest) = Manifest::read(&folder).unwrap() else { return };
    let texts = manifest.texts(&folder).unwrap();
    let found: String =
        texts.iter().map(|(module, text)| all_synchronisation(module.name, text)).collect();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/synchronisation.txt");
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        fs::write(&file, &found).unwrap();
    }
    let expected = fs::read_to_string(&file).unwrap();
    let differ: Vec<_> = found.lines().filter(|line| !expected.contains(line)).collect();
    assert!(
        differ.is_empty() && found.lines().count() == expected.lines().count(),
        "not as in tests/synchronisation.txt (UPDATE_EXPECT=1 writes it anew):\n{}",
        differ.join("\n")
    );
}

#[test]
fn synchronisation_is_counted_with_its_numbers() {
    let text = "bar.sync\t0;\n\tcp.async.wait_group 1;\n{ mbarrier.try_wait.parity p, [%r1], %r2; \
                cp.async.wait_group 1; } @p fence.proxy.async;\nadd.s32 %r1, 0;";
    let counts = synchronisation(text);
    let expected = [("bar.sync 0", 1), ("cp.async.wait_group 1", 2), ("fence.proxy.async", 1)];
    for (name, count) in expected {
        assert_eq!(counts.get(name), Some(&count), "{counts:?}");
    }
    assert!(!counts.keys().any(|name| name.starts_with("add")), "{counts:?}");
}

/// What is wrong with one entry.
fn faults(module: &str, name: &str, text: &str) -> Vec<String> {
    let dtype = if name.contains("_bf16") { "bf16" } else { "f16" };
    let required = required(name).iter().map(|instruction| instruction.replace("DTYPE", dtype));
    let missing = required.filter(|instruction| !text.contains(instruction.as_str()));
    let mut faults: Vec<_> = missing.map(|i| format!("{module}: {name} has no {i}")).collect();
    if !text.contains(".maxntid ") {
        faults.push(format!("{module}: {name} has no launch bounds"));
    }
    let forbidden = FORBIDDEN.iter().filter(|(of, _)| *of == module).flat_map(|(_, list)| *list);
    let found = forbidden.filter(|instruction| text.contains(**instruction));
    faults.extend(found.map(|i| format!("{module}: {name} has {i}, which needs a later module")));
    faults
}

#[test]
fn entries_contain_what_their_rung_is_about() {
    let folder = Workspace::of_this_crate().checked_in();
    let manifest = Manifest::read(&folder).unwrap().expect("a manifest is checked in");
    let texts = manifest.texts(&folder).unwrap();
    let mut found = ptxas::local_memory(&texts);
    for (record, (module, text)) in manifest.modules.iter().zip(&texts) {
        assert_eq!(entries(text).count(), record.entries, "{}", module.name);
        found.extend(entries(text).flat_map(|(name, text)| faults(module.name, name, text)));
    }
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

#[test]
fn a_missing_a_foreign_and_an_unbounded_instruction_are_named() {
    let text = ".visible .entry flash_mma_f16_d64(\n)\n{\n\tbar.sync 0;\n\tcp.async;\n}\n";
    let found: Vec<_> =
        entries(text).flat_map(|(name, text)| faults("sm_75", name, text)).collect();
    let about = |what: &str| found.iter().any(|fault| fault.contains(what));
    assert!(
        about("has no ldmatrix") && about("f32.f16.f16.f32") && !about("has no bar.sync"),
        "{found:?}"
    );
    assert!(about("has no launch bounds"), "{found:?}");
    assert!(about("has cp.async, which needs a later module"), "{found:?}");
}

#[test]
fn the_longest_prefix_decides() {
    assert!(required("flash_hopper_f16_d128").contains(&WGMMA));
    assert_eq!(required("flash_other_f16_d64"), [EX2, "ld.shared", BAR]);
    assert!(required("something_new").is_empty());
}

#[test]
fn checked_in_modules_stay_within_what_drivers_accept() {
    for (module, text) in pack::read(&Workspace::of_this_crate().checked_in()).unwrap() {
        let version = text.lines().find_map(|line| line.strip_prefix(".version ")).unwrap();
        let (major, minor) = version.split_once('.').unwrap();
        let version: (u32, u32) = (major.parse().unwrap(), minor.parse().unwrap());
        // 8.8 is what the drivers of CUDA 13.0 and of 12.9 read.
        assert!(version <= (8, 8), "{}: .version {version:?}", module.name);
        assert!(text.contains(&format!(".target {}", module.name)), "{}", module.name);
    }
}
