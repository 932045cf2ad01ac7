//! Every entry of the checked-in PTX contains the instructions its rung is about.
//!
//! A compiler that scalarises a vector load or a kernel that silently takes a slower
//! path still computes the right result; this is where it is noticed.

use ptx_builder::manifest::Manifest;
use ptx_builder::pack::{self, entries};
use ptx_builder::{Workspace, ptxas};

/// Rung (a prefix of the entry's name; the longest that fits counts) and what its
/// entries must contain. A rung that is not named here passes the general checks only.
const REQUIRED: &[(&str, &[&str])] = &[
    ("naive_softmax", &["ex2.approx"]),
    ("standard_scores", &["mma.sync", "ldmatrix", "cp.async", "bar.sync", "st.global.v4"]),
    ("standard_output", &["mma.sync", "ldmatrix", "cp.async", "bar.sync", "st.global.v4"]),
    ("standard_scores_f32", &["ld.shared", "bar.sync", "fma.rn"]),
    ("standard_output_f32", &["ld.shared", "bar.sync", "fma.rn"]),
    ("standard_softmax", &["ex2.approx", "cp.async", "ld.shared.v4", "st.global.v4"]),
    ("flash_", &["ex2.approx", "ld.shared", "bar.sync"]),
    ("flash_tiled", &["ex2.approx", "ld.shared", "bar.sync", "fma.rn"]),
    ("flash_mma", &["ex2.approx", "bar.sync", "mma.sync", "ldmatrix"]),
    ("flash_turing", &["ex2.approx", "bar.sync", "mma.sync.aligned.m16n8k8", "ldmatrix"]),
    ("flash_swizzled", &["ex2.approx", "bar.sync", "mma.sync", "ldmatrix"]),
    ("flash_async", &["ex2.approx", "bar.sync", "mma.sync", "ldmatrix", "cp.async"]),
    ("flash_pipelined", &["ex2.approx", "bar.sync", "mma.sync", "ldmatrix", "cp.async"]),
    (
        "flash_tf32",
        &[
            "ex2.approx",
            "bar.sync",
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
            "ldmatrix",
            "ld.shared.v4",
            "cp.async",
            "st.global.v4",
        ],
    ),
    (
        "flash_hopper",
        &[
            "ex2.approx",
            "wgmma.mma_async",
            "wgmma.fence",
            "cp.async.bulk.tensor",
            "setmaxnreg.inc",
            "setmaxnreg.dec",
            "mbarrier.try_wait",
        ],
    ),
    ("linear_tiled", &["ld.shared", "bar.sync", "fma.rn"]),
    ("linear_mma", &["mma.sync", "ldmatrix", "cp.async", "bar.sync", "st.global.v4"]),
    (
        "linear_hopper",
        &[
            ".reqnctapercluster",
            "wgmma.mma_async",
            "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast",
            "mapa.shared::cluster",
            "setmaxnreg.inc",
            "st.global.v4",
        ],
    ),
    (
        "cluster_probe",
        &[
            ".reqnctapercluster",
            "barrier.cluster.wait",
            "ld.shared::cluster",
            "st.shared::cluster",
            "mbarrier.arrive.release.cluster",
            "mbarrier.try_wait.parity.acquire.cluster",
            "cp.reduce.async.bulk.tensor",
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

/// What is wrong with one entry.
fn faults(module: &str, name: &str, text: &str) -> Vec<String> {
    let missing = required(name).iter().filter(|instruction| !text.contains(**instruction));
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
    let text = ".visible .entry flash_mma_f16_d64(\n)\n{\n\tmma.sync;\n\tcp.async;\n}\n";
    let found: Vec<_> =
        entries(text).flat_map(|(name, text)| faults("sm_75", name, text)).collect();
    let about = |what: &str| found.iter().any(|fault| fault.contains(what));
    assert!(about("has no ldmatrix") && !about("has no mma.sync"), "{found:?}");
    assert!(about("has no launch bounds"), "{found:?}");
    assert!(about("has cp.async, which needs a later module"), "{found:?}");
}

#[test]
fn the_longest_prefix_decides() {
    assert!(required("flash_hopper_f16_d128").contains(&"wgmma.mma_async"));
    assert_eq!(required("flash_other_f16_d64"), ["ex2.approx", "ld.shared", "bar.sync"]);
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
