//! What the book and the READMEs point at is there: links, the headings behind a `#`, files in
//! backticks, and entries in the commands that a reader is told to run.

use std::{
    collections::BTreeMap,
    fs,
    path::{Component, Path, PathBuf},
};

/// What the chapter on adding a kernel adds.
const OF_THE_CHAPTER: [&str; 2] =
    ["kernels-gpu/src/forward/flash_rows.rs", "docs/NN-flash_rows.md"];

/// Every file of the repository below `folder`, by its path from the root.
fn files(root: &Path, folder: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry")) {
        let (path, name) = (entry.path(), entry.file_name());
        if entry.file_type().expect("a type").is_dir() {
            if name != "target" && !name.to_string_lossy().starts_with('.') {
                files(root, &path, found);
            }
        } else {
            let path = path.strip_prefix(root).expect("below the root");
            found.push(path.to_string_lossy().replace('\\', "/"));
        }
    }
}

/// The anchor of a heading.
fn anchor(heading: &str) -> String {
    let heading = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// `folder/../file` as `file`.
fn resolved(path: &Path) -> String {
    let mut parts = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => _ = parts.pop(),
            part => parts.push(part),
        }
    }
    parts.to_string_lossy().replace('\\', "/")
}

/// What stands between `begin` and `end` in a text.
fn between<'a>(text: &'a str, begin: &'a str, end: char) -> impl Iterator<Item = &'a str> {
    text.split(begin).skip(1).filter_map(move |part| part.split_once(end)).map(|(inner, _)| inner)
}

/// What a page points at and is not there.
fn broken(page: &str, pages: &BTreeMap<String, String>, files: &[String]) -> Vec<String> {
    let text = &pages[page];
    let mut broken = Vec::new();
    for link in between(text, "](", ')').filter(|link| !link.contains("://")) {
        let (path, heading) = link.split_once('#').unwrap_or((link, ""));
        let folder = Path::new(page).parent().expect("the root is above");
        let to = if path.is_empty() { page.to_owned() } else { resolved(&folder.join(path)) };
        let is_folder = files.iter().any(|file| Path::new(file).starts_with(&to));
        let has_heading = || {
            let lines = pages.get(&to).map_or("", String::as_str).lines();
            lines.filter(|line| line.starts_with('#')).any(|line| anchor(line) == heading)
        };
        if !is_folder || !heading.is_empty() && !has_heading() {
            broken.push(format!("{page}: ]({link})"));
        }
    }
    for name in text.split('`').filter(|name| name.ends_with(".rs") || name.ends_with(".md")) {
        let is_path = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
        let is_there = |file: &String| Path::new(file).ends_with(name);
        if name.chars().all(is_path)
            && !files.iter().any(is_there)
            && !OF_THE_CHAPTER.contains(&name)
        {
            broken.push(format!("{page}: `{name}`"));
        }
    }
    for entry in between(text, "-- disassemble ", ' ').filter(|entry| *entry != "ENTRY") {
        if kernels_gpu::find(entry).is_none() {
            broken.push(format!("{page}: disassemble {entry}"));
        }
    }
    broken
}

#[test]
fn what_the_book_points_at_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    files(root, root, &mut found);
    let is_page = |file: &&String| file.ends_with(".md") && !file.starts_with("benches/");
    let read = |file: &String| fs::read_to_string(root.join(file)).expect("a page");
    let pages: BTreeMap<String, String> =
        found.iter().filter(is_page).map(|file| (file.clone(), read(file))).collect();
    let broken: Vec<String> = pages.keys().flat_map(|page| broken(page, &pages, &found)).collect();
    assert!(broken.is_empty(), "{broken:#?}");
}

#[test]
fn every_chapter_is_in_the_summary() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let summary = fs::read_to_string(root.join("docs/SUMMARY.md")).expect("the summary");
    let mut found = Vec::new();
    files(root, &root.join("docs"), &mut found);
    let missing: Vec<_> = found
        .iter()
        .filter_map(|file| file.strip_prefix("docs/")?.strip_suffix(".md"))
        .filter(|chapter| *chapter != "SUMMARY" && !summary.contains(&format!("]({chapter}.md)")))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}

/// The links of a page of the built book that lead to no file, or to no heading.
fn broken_in_book(page: &Path, pages: &BTreeMap<PathBuf, String>) -> Vec<String> {
    let folder = page.parent().expect("below the book");
    // Scripts make links of their own as they run.
    let is_text = |part: &&str| !part.starts_with("<script") || part.starts_with("<script src=");
    let text: String = pages[page]
        .split_inclusive("</script>")
        .flat_map(|part| {
            let (before, script) = part.split_at(part.find("<script").unwrap_or(part.len()));
            [before, script]
        })
        .filter(is_text)
        .collect();
    let links = between(&text, " href=\"", '"').chain(between(&text, " src=\"", '"'));
    let is_missing = |link: &&str| {
        let (path, heading) = link.split_once('#').unwrap_or((link, ""));
        let to =
            if path.is_empty() { page.to_owned() } else { resolved(&folder.join(path)).into() };
        let has = |text: &String| text.contains(&format!("id=\"{heading}\""));
        !to.exists() || !heading.is_empty() && !pages.get(&to).is_some_and(has)
    };
    let links = links.filter(|link| !link.contains(':') && !link.starts_with("//"));
    links.filter(is_missing).map(|link| format!("{}: {link}", page.display())).collect()
}

#[test]
#[ignore = "reads the site that docs/build-book makes"]
fn what_the_built_book_points_at_is_there() {
    let book = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/book");
    let mut found = Vec::new();
    files(&book, &book, &mut found);
    // print.html has every chapter on one page, with headings of the same names.
    let pages = found.iter().filter(|file| file.ends_with(".html") && *file != "print.html");
    let pages: BTreeMap<PathBuf, String> = pages
        .map(|file| book.join(file))
        .map(|page| (page.clone(), fs::read_to_string(&page).expect("a page")))
        .collect();
    assert!(pages.len() > 50, "{} pages in {}", pages.len(), book.display());
    let broken: Vec<String> = pages.keys().flat_map(|page| broken_in_book(page, &pages)).collect();
    assert!(broken.is_empty(), "{broken:#?}");
}
