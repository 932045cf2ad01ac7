//! The kernels' source text, which is part of the program.

use std::fmt;

/// Every source file of the kernels: its name below the root, and its text.
const FILES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/kernel_sources.rs"));

/// Lines above a synchronisation that its comment may be away from it.
const REACH: usize = 12;

/// A line of a kernel's source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Line {
    /// The file's name below the root, as `kernels-gpu/src/forward/naive.rs`.
    pub file: &'static str,
    /// Number of the line, from 1 on.
    pub number: u32,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.number)
    }
}

impl Line {
    /// The line of that number of the file that the compiler calls `file`: below the root, or from
    /// the root of another machine on.
    #[must_use]
    pub fn of(file: &str, number: u32) -> Option<Self> {
        let file = file.replace('\\', "/");
        let known = FILES.iter().find(|(name, _)| {
            file.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('/'))
        });
        known.map(|&(file, _)| Self { file, number })
    }

    fn lines(self) -> Vec<&'static str> {
        text(self.file).lines().collect()
    }

    /// The text of the line, without the blanks at both ends.
    #[must_use]
    pub fn text(self) -> &'static str {
        let index = (self.number as usize).saturating_sub(1);
        text(self.file).lines().nth(index).unwrap_or_default().trim()
    }

    /// The comment that says why the line is there: the nearest one above it in its paragraph, or
    /// the name and the documentation of its function.
    #[must_use]
    pub fn comment(self) -> Option<String> {
        let lines = self.lines();
        let index = (self.number as usize).checked_sub(1).filter(|&index| index < lines.len())?;
        let of_paragraph = lines[..index].iter().rev().take(REACH).map_while(|line| {
            // A comment before a blank line, or in an earlier block, is about something else.
            let line = line.trim();
            (!line.is_empty() && !line.starts_with('}')).then_some(line)
        });
        let above = of_paragraph.take_while(|line| !is_comment(line)).count();
        if let Some(comment) = comment_up_to(&lines[..index - above]) {
            return Some(comment);
        }
        let signature = lines[..index].iter().rposition(|line| line.contains("fn "))?;
        let name = lines[signature].split("fn ").nth(1)?.split(['(', '<']).next()?;
        let attributes = |line: &&&str| line.trim().starts_with("#[");
        let attributes = lines[..signature].iter().rev().take_while(attributes).count();
        let comment = comment_up_to(&lines[..signature - attributes]);
        Some(comment.map_or(format!("In `{name}`."), |text| format!("In `{name}`: {text}")))
    }
}

fn is_comment(line: &str) -> bool {
    line.trim().starts_with("//")
}

/// The text of the comment that the last of these lines ends, without sections of documentation such
/// as `# Safety`, and without why `unsafe` is sound.
fn comment_up_to(lines: &[&str]) -> Option<String> {
    let block: Vec<&str> = lines.iter().rev().copied().take_while(|l| is_comment(l)).collect();
    let words = |line: &&str| line.trim().trim_start_matches('/').trim().to_owned();
    let text = block
        .iter()
        .rev()
        .map(words)
        .take_while(|line| !line.starts_with('#') && !line.starts_with("SAFETY"));
    let text = text.collect::<Vec<_>>().join(" ");
    (!text.trim().is_empty()).then(|| text.trim().to_owned())
}

/// The text of a file; empty for one that is none of the kernels'.
#[must_use]
pub fn text(file: &str) -> &'static str {
    FILES.iter().find(|(name, _)| *name == file).map_or("", |(_, text)| text)
}

/// The lines of kernels that a message names, as `…/flash_tiled.rs:135`, each once.
#[must_use]
pub fn named_in(message: &str) -> Vec<Line> {
    let mut lines = Vec::new();
    for (at, _) in message.match_indices(".rs:") {
        let (before, after) = message.split_at(at + 3);
        let file = before.rsplit(char::is_whitespace).next().unwrap_or_default();
        let digits: String = after[1..].chars().take_while(char::is_ascii_digit).collect();
        let line = digits.parse().ok().and_then(|number| Line::of(file, number));
        lines.extend(line.filter(|line| !lines.contains(line)));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_is_there() {
        let naive = text("kernels-gpu/src/forward/naive.rs");
        assert!(naive.contains("pub unsafe fn"), "{} files", FILES.len());
        assert_eq!(text("kernels-gpu/src/none.rs"), "");
    }

    #[test]
    fn lines_are_found_wherever_the_program_was_built() {
        let name = "kernels-gpu/src/forward/naive.rs";
        for file in [name.to_owned(), format!("/a/b/{name}"), name.replace('/', "\\")] {
            assert_eq!(Line::of(&file, 3), Some(Line { file: name, number: 3 }), "{file}");
        }
        assert_eq!(Line::of("other-kernels-gpu/src/forward/naive.rs", 3), None);
        assert_eq!(Line { file: name, number: 9999 }.text(), "");
        assert_eq!(Line { file: name, number: 9999 }.comment(), None);
    }

    #[test]
    fn comments_belong_to_their_paragraph() {
        let file = "kernels-gpu/src/forward/flash_tiled.rs";
        let lines = text(file).lines().enumerate();
        let of = |what| lines.clone().filter(move |(_, line)| line.trim() == what);
        let comments: Vec<String> = of("thread::sync_threads();")
            .filter_map(|(index, _)| Line { file, number: index as u32 + 1 }.comment())
            .collect();
        assert_eq!(
            comments,
            [
                "Hazard: the tile before may still be read while this one is written.",
                "Hazard: tiles are read by threads that did not write them (Q too, at first).",
            ]
        );
        let wait = of("warp::sync_warp(FULL_MASK);").next().unwrap().0 as u32 + 1;
        let comment = Line { file, number: wait }.comment().unwrap();
        assert!(comment.starts_with("Hazard: a row of P") && comment.ends_with("need not wait."));
        // In the first paragraph of the function, whose documentation has sections after this.
        let first = of("let (ty, tx) = scalar_tile::place();").next().unwrap().0 as u32 + 2;
        let comment = Line { file, number: first }.comment().unwrap();
        assert_eq!(comment, "Who am I.");
        let tile = of("let first_key = tile * BC;").next().unwrap().0 as u32 + 1;
        let comment = Line { file, number: tile }.comment().unwrap();
        assert_eq!(comment, "In `flash_tiled`: Flash attention forward with scalar arithmetic.");
    }

    #[test]
    fn messages_name_lines() {
        let message = "write by thread 3 at /x/kernels-gpu/src/forward/naive.rs:12, and read by thread 4 at \
                       kernels-gpu/src/forward/naive.rs:12; simt/src/warp.rs:4 and kernels-gpu/src/lib.rs:7.";
        let lines: Vec<String> = named_in(message).iter().map(ToString::to_string).collect();
        assert_eq!(lines, ["kernels-gpu/src/forward/naive.rs:12", "kernels-gpu/src/lib.rs:7"]);
    }
}
