//! `trace`: the events of a kernel as Perfetto and Chrome read them.

mod common;

use std::collections::BTreeMap;

use common::{host, run};
use flash_attention::registry::{BACKWARD_KERNELS, DECODE_KERNELS, KERNELS};
use serde_json::Value;

/// Traces, and gives what was printed and the events.
fn traced(arguments: &[&str]) -> (String, Vec<Value>) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("trace.json");
    let (code, stdout, stderr) = run(host().arg("trace").args(arguments).arg("--out").arg(&file));
    assert_eq!((code, stderr.as_str()), (0, ""), "{arguments:?}: {stdout}");
    assert!(stdout.contains("An estimate: "), "{stdout}");
    let text = std::fs::read_to_string(&file).unwrap();
    let document: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(document["displayTimeUnit"], "ns");
    assert!(document["otherData"]["time"].as_str().unwrap().starts_with("An estimate"));
    (stdout, document["traceEvents"].as_array().unwrap().clone())
}

fn of_phase<'a>(events: &'a [Value], phase: &str) -> Vec<&'a Value> {
    events.iter().filter(|event| event["ph"] == phase).collect()
}

fn number(event: &Value, field: &str) -> f64 {
    event[field].as_f64().unwrap_or_else(|| panic!("{field} of {event}"))
}

/// Process and thread.
fn track(event: &Value) -> (u64, u64) {
    (event["pid"].as_u64().unwrap(), event["tid"].as_u64().unwrap())
}

/// What the format asks for: tracks have names, slices of a track do not overlap, arrows come in pairs, go
/// forwards and touch a slice at both ends, and what is in flight lands.
fn check(events: &[Value]) {
    let mut tracks: BTreeMap<(u64, u64), Vec<(f64, f64)>> = BTreeMap::new();
    for slice in of_phase(events, "X") {
        let begin = number(slice, "ts");
        assert!(number(slice, "dur") > 0.0, "{slice}");
        tracks.entry(track(slice)).or_default().push((begin, begin + number(slice, "dur")));
        let at = slice["args"]["at"].as_str().unwrap();
        assert!(
            slice["name"].as_str().unwrap().ends_with(at.rsplit('/').next().unwrap()),
            "{slice}"
        );
    }
    let close = 1e-9;
    for (track, slices) in &mut tracks {
        slices.sort_by(|a, b| a.0.total_cmp(&b.0));
        for pair in slices.windows(2) {
            assert!(pair[0].1 <= pair[1].0 + close, "{track:?}: {pair:?}");
        }
        let names = of_phase(events, "M")
            .into_iter()
            .filter(|event| event["name"] == "thread_name" && self::track(event) == *track);
        assert_eq!(names.count(), 1, "{track:?}");
    }
    let mut arrows: BTreeMap<u64, Vec<&Value>> = BTreeMap::new();
    for event in of_phase(events, "s").into_iter().chain(of_phase(events, "f")) {
        arrows.entry(event["id"].as_u64().unwrap()).or_default().push(event);
        let ts = number(event, "ts");
        let touches = tracks[&track(event)].iter().any(|&(a, b)| a - close <= ts && ts < b);
        assert!(touches, "{event}");
    }
    // A viewer turns an arrow round whose second slice began before the first. A wait with nothing
    // after it can be such a slice.
    let slices = of_phase(events, "X");
    let tied = |event: &Value| {
        let is_it = |s: &&&Value| track(s) == track(event) && encloses(s, number(event, "ts"));
        *slices.iter().find(is_it).unwrap_or_else(|| panic!("no slice at {event}"))
    };
    let is_last = |slice: &Value| {
        let end = number(slice, "ts") + number(slice, "dur");
        tracks[&track(slice)].iter().all(|&(begin, _)| begin < end - close)
    };
    for pair in arrows.values() {
        let (from, to) = (tied(pair[0]), tied(pair[1]));
        assert!(number(from, "ts") <= number(to, "ts") || is_last(to), "{from} leads to {to}");
        // Not at the end of its cause, where the next slice begins.
        let is_inside = number(pair[0], "ts") > number(from, "ts") + close;
        assert!(is_inside || number(from, "dur") < 1e-3 + close, "{from} leads to {to}");
        assert_eq!(pair.len(), 2, "{pair:?}");
        assert!(number(pair[0], "ts") <= number(pair[1], "ts") + close, "{pair:?}");
        assert_eq!(
            (&pair[0]["ph"], &pair[1]["ph"], &pair[1]["bp"]),
            (&"s".into(), &"f".into(), &"e".into())
        );
    }
    let mut left: BTreeMap<u64, i64> = BTreeMap::new();
    for counter in of_phase(events, "C") {
        let bytes = counter["args"]["bytes"].as_i64().unwrap();
        assert!(bytes >= 0, "{counter}");
        left.insert(counter["pid"].as_u64().unwrap(), bytes);
    }
    assert!(left.values().all(|&bytes| bytes == 0), "{left:?}");
}

/// Whether a viewer ties an arrow at `ts` to the slice: at a slice's end it takes the next one.
fn encloses(slice: &Value, ts: f64) -> bool {
    let begin = number(slice, "ts");
    begin <= ts && ts < begin + number(slice, "dur") - 1e-9
}

fn named<'a>(events: &'a [Value], name: &str) -> Vec<&'a Value> {
    let is_it = |event: &&Value| event["name"].as_str().is_some_and(|n| n.starts_with(name));
    of_phase(events, "X").into_iter().filter(is_it).collect()
}

/// 4 warps go over 8 tiles of keys, with two barriers each.
#[test]
fn a_block_has_a_track_for_each_warp() {
    let (stdout, events) = traced(&["--kernel", "flash_tiled"]);
    check(&events);
    assert!(stdout.starts_with("flash_tiled: batch 1, heads 1, N 256"), "{stdout}");
    let barriers = named(&events, "barrier · flash_tiled.rs:");
    assert_eq!(barriers.len(), 4 * 8 * 2);
    let why = barriers[0]["args"]["why"].as_str().unwrap();
    assert!(why.starts_with("Hazard: the tile before may still be read"), "{why}");
    assert_eq!(barriers[0]["args"]["source"], "thread::sync_threads();");
    let names: Vec<&str> = of_phase(&events, "M")
        .into_iter()
        .filter(|event| event["name"] == "thread_name")
        .map(|event| event["args"]["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["warp 0", "warp 1", "warp 2", "warp 3"]);
    // Two blocks, two processes.
    let (_, events) = traced(&["--kernel", "flash_tiled", "--seq", "64", "--blocks", "2"]);
    check(&events);
    let processes = of_phase(&events, "M").into_iter().filter(|e| e["name"] == "process_name");
    let names: Vec<&str> = processes.map(|e| e["args"]["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["flash_tiled_f16_d64, block 0", "flash_tiled_f16_d64, block 1"]);
}

/// Copies land beside the warps, products run on tensor cores, and both end waits.
#[test]
fn agents_have_tracks_and_arrows_to_the_waits_that_they_end() {
    let (_, events) = traced(&["--kernel", "flash_hopper"]);
    check(&events);
    let loads = named(&events, "load ·");
    let products = named(&events, "wgmma ·");
    assert!(!loads.is_empty() && !products.is_empty());
    let tensor: u64 = products.iter().map(|p| p["args"]["tensor FLOP"].as_u64().unwrap()).sum();
    // A block has every task of one head, or half of them.
    let all = 4 * 256 * 256 * 64;
    assert!(tensor == all || tensor == all / 2, "{tensor}");
    let arrows = |from: &[&Value], to: &str| {
        let leaves = of_phase(&events, "s").into_iter().filter(|s| {
            let ts = number(s, "ts");
            from.iter().any(|f| track(f) == track(s) && encloses(f, ts))
        });
        let waits = named(&events, to);
        leaves
            .filter(|s| {
                let end = of_phase(&events, "f").into_iter().find(|f| f["id"] == s["id"]).unwrap();
                waits.iter().any(|w| {
                    track(w) == track(end)
                        && (number(w, "ts") + number(w, "dur") - number(end, "ts")).abs() < 2e-3
                })
            })
            .count()
    };
    assert!(arrows(&loads, "wait for mbarrier") > 0, "from copies to waits");
    assert!(arrows(&products, "wait for wgmma") > 0, "from products to waits");
    let counters: Vec<i64> =
        of_phase(&events, "C").iter().map(|c| c["args"]["bytes"].as_i64().unwrap()).collect();
    // At least Q, and a tile of K.
    assert!(counters.iter().max().unwrap() >= &(2 * 64 * 64 * 2), "{counters:?}");
    let (_, events) = traced(&["--kernel", "flash_async"]);
    check(&events);
    assert!(!named(&events, "cp.async ·").is_empty() && named(&events, "read global").is_empty());
}

#[test]
fn every_kernel_has_a_trace() {
    let names = KERNELS.iter().map(|k| k.name).chain(BACKWARD_KERNELS.iter().map(|k| k.name));
    for kernel in names.chain(DECODE_KERNELS.iter().map(|k| k.name)) {
        let (stdout, events) = traced(&["--kernel", kernel, "--seq", "70"]);
        check(&events);
        assert!(of_phase(&events, "X").len() > 10, "{kernel}: {stdout}");
    }
}

#[test]
fn requests_that_cannot_be_met_are_refused_in_one_line() {
    for (arguments, part) in [
        (&["--kernel", "naive"][..], "required arguments were not provided: --out <FILE>"),
        (&["--kernel", "naive", "--out", "/no/such/folder/a.json"], "cannot be written"),
        (&["--kernel", "naive", "--out", "-", "--blocks", "0"], "use a whole number, 1 or more"),
        (&["--kernel", "naive", "--out", "-", "--head-dim", "12"], "does not support head dim 12"),
        (&["--out", "-"], "required arguments were not provided: --kernel <NAME>"),
    ] {
        let (code, stdout, stderr) = run(host().arg("trace").args(arguments));
        assert_eq!(code, 2, "{arguments:?}\n{stdout}{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{arguments:?}\n{stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains(part), "{arguments:?}\n{stderr}");
        assert_eq!(stdout, "", "{arguments:?}");
    }
}

#[test]
fn the_steps_are_one_page() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("steps.html");
    let arguments = ["trace", "--kernel", "flash_tiled", "--seq", "70", "--head-dim", "32"];
    let (code, stdout, stderr) = run(host().args(arguments).arg("--html").arg(&file));
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    // Q, three tiles of seven steps and the mask of the last, the end.
    assert!(stdout.contains(": 24 steps"), "{stdout}");
    let page = std::fs::read_to_string(&file).unwrap();
    for outside in ["http", " src=", "@import", "url("] {
        assert!(!page.contains(outside), "{outside}");
    }
    let data = page.split("id=\"data\">").nth(1).unwrap().split("</script>").next().unwrap();
    let data: Value = serde_json::from_str(data).unwrap();
    assert_eq!(data["steps"].as_array().unwrap().len(), 24);
    assert_eq!((&data["tiles"], &data["tiles_of"]), (&Value::from(3), &Value::from("keys")));
    let last = &data["matrices"][data["steps"][23]["shown"][0].as_u64().unwrap() as usize];
    assert_eq!((&last["name"], &last["column"][1]), (&Value::from("S"), &Value::from(64)));
    assert_eq!(last["values"][31], Value::Null, "there is no key 95");
    let arguments = ["trace", "--kernel", "flash_swizzled", "--seq", "130", "--causal"];
    let (code, stdout, stderr) = run(host().args(arguments).arg("--html").arg(&file));
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    // Q, a tile of keys with a mask, the end.
    assert!(stdout.contains(": 9 steps"), "{stdout}");
    // The regions are all of the shared memory that the launch gives.
    for kernel in ["flash_tiled", "flash_mma", "flash_swizzled", "flash_turing"] {
        for head_dim in ["64", "40", "104"] {
            let problem =
                ["--kernel", kernel, "--seq", "40", "--heads", "1", "--head-dim", head_dim];
            let (code, _, stderr) = run(host().arg("trace").args(problem).arg("--html").arg(&file));
            assert_eq!(code, 0, "{stderr}");
            let page = std::fs::read_to_string(&file).unwrap();
            let data =
                page.split("id=\"data\">").nth(1).unwrap().split("</script>").next().unwrap();
            let data: Value = serde_json::from_str(data).unwrap();
            let regions = data["regions"].as_array().unwrap();
            let bytes: u64 = regions.iter().map(|region| region[1].as_u64().unwrap()).sum();
            let (_, profile, _) = run(host().arg("profile").args(problem));
            let expected = format!("{} dynamic shared memory", host::format::bytes(bytes as f64));
            assert!(profile.contains(&expected), "{kernel}, {head_dim}: no {expected}: {profile}");
        }
    }
    for (arguments, part) in [
        (&["--kernel", "decode"][..], "backward_mma and backward_hopper, not decode: leave it out"),
        (&["--kernel", "flash_tiled", "--softcap", "5"], "attention without further features"),
    ] {
        let (code, _, stderr) = run(host().arg("trace").args(arguments).arg("--html").arg(&file));
        assert!(code == 2 && stderr.contains(part), "{arguments:?}: {stderr}");
    }
}
