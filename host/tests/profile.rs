//! `profile`: what the emulator counts at each line, and what follows.

mod common;

use common::{host, run};
use flash_attention::registry::{BACKWARD_KERNELS, DECODE_KERNELS, KERNELS};

fn profile(arguments: &[&str]) -> (i32, String, String) {
    run(host().arg("profile").args(arguments))
}

/// What a profile says, of a run that ended well.
fn good(arguments: &[&str]) -> String {
    let (code, stdout, stderr) = profile(arguments);
    assert_eq!((code, stderr.as_str()), (0, ""), "{arguments:?}: {stdout}");
    stdout
}

/// The value of a line of the totals.
fn total<'a>(text: &'a str, name: &str) -> &'a str {
    let totals = text.split("\ntotals\n").nth(1).unwrap();
    let line = totals.lines().find_map(|line| line.trim().strip_prefix(name));
    line.unwrap_or_else(|| panic!("no {name}: {totals}")).trim()
}

/// The figures of a line of the source, whose text is `code`, under a file's headings.
fn figures(text: &str, file: &str, code: &str) -> Vec<(String, String)> {
    let section = text.split("\n\n").find(|section| section.trim_start().starts_with(file));
    let section = section.unwrap_or_else(|| panic!("no {file}: {text}"));
    let mut lines = section.lines().skip_while(|line| !line.trim_start().starts_with("line "));
    let headings = lines.next().unwrap();
    let line = lines.find(|line| {
        let (cells, source) = line.split_once('│').unwrap_or_default();
        source.trim() == code && cells.split_whitespace().count() > 1
    });
    let line = line.unwrap_or_else(|| panic!("no {code}: {section}"));
    // Columns end below the ends of their headings.
    let ends: Vec<(usize, &str)> = headings
        .split_whitespace()
        .take_while(|word| *word != "│")
        .map(|word| (headings.find(word).unwrap() + word.len(), word))
        .collect();
    let mut begin = 0;
    let mut figures = Vec::new();
    for (end, name) in ends {
        let cell: String = line.chars().skip(begin).take(end - begin).collect();
        figures.push((name.to_owned(), cell.trim().to_owned()));
        begin = end;
    }
    figures
}

fn figure(figures: &[(String, String)], name: &str) -> String {
    figures.iter().find(|(n, _)| n == name).map_or_else(String::new, |(_, value)| value.clone())
}

/// 16 blocks of 4 warps, each of which goes over 8 tiles of 32 keys.
#[test]
fn lines_are_counted_for_each_warp() {
    let text = good(&["--kernel", "flash_tiled"]);
    let file = "kernels-gpu/src/forward/flash_tiled.rs";
    let barrier = figures(&text, file, "thread::sync_threads();");
    assert_eq!(
        (figure(&barrier, "warps"), figure(&barrier, "waits")),
        ("512".into(), "512".into())
    );
    // Two products of 2 heads, 256 x 256 scores and 64 columns, and the softmax.
    assert_eq!(total(&text, "scalar FLOP counted"), "33.9M");
    assert_eq!(total(&text, "FLOP by convention"), "33.6M");
    let exponential = figures(
        &text,
        file,
        "let p = math::exp2(math::fma(s[R][KEY], policy.scale_log2(), -m_used));",
    );
    // Two heads of 256 x 256 weights.
    assert_eq!(
        (figure(&exponential, "special"), figure(&exponential, "FLOP")),
        ("131k".into(), "262k".into())
    );
    assert_eq!(total(&text, "of these by bank conflicts"), "0 (0% more)");
    assert!(text.contains("bound: shared memory: at the figures of H100 SXM 80GB"), "{text}");
    assert!(text.contains("Plain + - * / of f32 and integers are not seen"), "{text}");
    // O is written two bytes at a time, eight bytes apart: 8 sectors for 64 bytes of a request.
    let store = figures(&text, file, "o.write(o_row + (column + e as u32) as u64, value);");
    assert_eq!(
        (figure(&store, "global"), figure(&store, "sectors")),
        ("64.0KiB".into(), "8.00".into())
    );
}

#[test]
fn products_on_tensor_cores_are_those_of_the_convention() {
    for (kernel, instructions) in [("flash_mma", "8192"), ("flash_swizzled", "8192")] {
        let text = good(&["--kernel", kernel]);
        assert_eq!(total(&text, "FLOP on tensor cores"), "33.6M", "{kernel}");
        assert_eq!(total(&text, "instructions of tensor cores"), instructions, "{kernel}");
    }
    let hopper = good(&["--kernel", "flash_hopper"]);
    assert_eq!(total(&hopper, "FLOP on tensor cores"), "33.6M");
    // Tiles that no row sees are left out.
    let causal = good(&["--kernel", "flash_mma", "--causal"]);
    assert_eq!(total(&causal, "FLOP on tensor cores"), "21.0M");
    assert_eq!(total(&causal, "FLOP by convention"), "16.8M");
}

/// Both count the same run of the emulator.
#[test]
fn global_memory_is_as_compare_counts_it() {
    let (code, json, stderr) = run(host()
        .args([
            "compare",
            "--level",
            "attention",
            "--seq",
            "256",
            "--kernels",
            "flash_pipelined,standard",
        ])
        .args(["--iters", "1", "--json", "-"]));
    assert_eq!(code, 0, "{stderr}");
    let results: serde_json::Value = serde_json::from_str(&json).unwrap();
    for row in results["rows"].as_array().unwrap() {
        let text = good(&["--kernel", row["kernel"].as_str().unwrap()]);
        for (name, field) in [
            ("global memory read", "global_bytes_read"),
            ("global memory written", "global_bytes_written"),
        ] {
            let bytes = host::format::bytes(row[field].as_f64().unwrap()).replace(' ', "");
            assert_eq!(total(&text, name), bytes, "{}", row["kernel"]);
        }
    }
}

#[test]
fn gpus_have_figures_and_limits() {
    let a100 = good(&["--kernel", "flash_hopper", "--seq", "64", "--gpu", "a100"]);
    assert!(a100.contains("roofline, A100 SXM 80GB"), "{a100}");
    assert!(
        a100.contains("flash_hopper needs compute capability exactly 9.0, this GPU has 8.0"),
        "{a100}"
    );
    let ada = good(&["--kernel", "flash_mma", "--seq", "64", "--gpu", "rtx4090"]);
    assert!(ada.contains("figures: NVIDIA Ada GPU Architecture") && !ada.contains("needs compute"));
}

#[test]
fn the_page_has_everything_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("profile.html");
    let text = good(&["--kernel", "decode", "--html", file.to_str().unwrap()]);
    assert!(text.ends_with(&format!("wrote {}\n", file.display())), "{text}");
    let page = std::fs::read_to_string(&file).unwrap();
    assert!(page.starts_with("<!DOCTYPE html>") && page.ends_with("</html>"));
    for part in ["<svg", "aria-sort", "prefers-color-scheme: dark", "@media print", "id=\"heat\""] {
        assert!(page.contains(part), "{part}");
    }
    // Nothing is fetched.
    for outside in ["http", " src=", "@import", "url("] {
        assert!(!page.contains(outside), "{outside}");
    }
    // Every line of the source, the counted ones with their heat and a link from the table.
    let source = std::fs::read_to_string("../kernels-gpu/src/decode/decode_split.rs").unwrap();
    let rows = page.split("<h3>kernels-gpu/src/decode/decode_split.rs</h3>").nth(1).unwrap();
    let rows = rows.split("</table>").next().unwrap();
    assert_eq!(rows.matches("<tr").count(), source.lines().count() + 1);
    let counted = rows.matches("<tr class=\"counted\"").count();
    assert!(counted > 10, "{counted}");
    let links = page.matches("href=\"#decode-decode_split-rs-").count();
    assert_eq!(links, counted);
    assert!(rows.contains("&lt;") && !rows.contains("Shared::<"), "source is escaped");
}

#[test]
fn every_kernel_has_a_profile() {
    let names = KERNELS.iter().map(|k| k.name).chain(BACKWARD_KERNELS.iter().map(|k| k.name));
    for kernel in names.chain(DECODE_KERNELS.iter().map(|k| k.name)) {
        let text = good(&["--kernel", kernel, "--seq", "70", "--heads", "1"]);
        assert!(text.contains("\nlaunches\n  1  ") && text.contains("_f"), "{kernel}: {text}");
        assert_ne!(total(&text, "global memory read"), "0B", "{kernel}");
    }
}

#[test]
fn requests_that_cannot_be_met_are_refused_in_one_line() {
    for (arguments, part) in [
        (
            &["--kernel", "naive", "--gpu", "v100"][..],
            "[possible values: h100, h200, a100, rtx4090]",
        ),
        (&["--kernel", "naive", "--seq", "1,2"], "--seq has several lengths"),
        (&["--kernel", "naive", "--html", "/no/such/folder/a.html"], "cannot be written"),
        (&["--kernel", "flash_hopper", "--dtype", "f32"], "does not support f32"),
        (&[], "required arguments were not provided: --kernel <NAME>"),
    ] {
        let (code, stdout, stderr) = profile(arguments);
        assert_eq!(code, 2, "{arguments:?}\n{stdout}{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{arguments:?}\n{stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains(part), "{arguments:?}\n{stderr}");
        assert_eq!(stdout, "", "{arguments:?}");
    }
}
