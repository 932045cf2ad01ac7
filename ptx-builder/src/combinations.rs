//! The combinations of specialisation constants that entries are assembled and checked in.
//!
//! A launch may ask for any combination; the driver then compiles it. Checked ahead are those
//! that a launch names most, and the one with everything on, which needs the most registers.

use std::collections::BTreeSet;

// Not through the crate, which would have the emulator's dependencies.
#[path = "../../simt/src/specialise/text.rs"]
pub mod text;

pub use text::PREFIX;

/// Names and values of constants; what is not named is 0. `ONE_CHUNK_LESS` is another number for
/// each entry.
pub type Combination = &'static [(&'static str, u32)];

const FULL: Combination = &[];
const CAUSAL: Combination = &[("causal", 1)];
const PADDING: Combination = &[("padding", 1)];
const DROPOUT: Combination = &[("dropout", 1)];
/// A sliding window over grouped heads, as most models of today have it.
const WINDOW: Combination = &[("causal", 1), ("left", 1), ("group", 4)];
/// Everything that hides or drops.
const MASKS: Combination = &[("causal", 1), ("padding", 1), ("dropout", 1)];
/// A window with capped scores. (With all that shapes scores, flash_pipelined spills up to 112 bytes.)
const CAPPED: Combination = &[("causal", 1), ("left", 1), ("group", 4), ("softcap", 1)];
/// A head dim 8 below the one that the entry is made for.
const ONE_CHUNK_LESS: u32 = u32::MAX;
/// A head dim that no entry is made for.
const PADDED: Combination =
    &[("causal", 1), ("head_dim", ONE_CHUNK_LESS), ("head_dim_v", ONE_CHUNK_LESS)];
/// A window with ALiBi and sinks. (flash_tf32 spills 8 bytes.)
const ALIBI: Combination = &[("causal", 1), ("left", 1), ("alibi", 1), ("sinks", 1)];
/// Packed sequences, as models are trained on them.
const VARLEN: Combination = &[("causal", 1), ("group", 4), ("varlen", 1)];
/// One query of grouped heads against pages, as decoders have it.
const PAGED: Combination = &[("group", 8), ("page", 16)];
/// Several queries, and pages that are no multiple of a tile.
const ODD_PAGES: Combination = &[("causal", 1), ("group", 4), ("page", 7)];
/// A cache in e4m3, in pages that are multiples of a tile.
const CODES: Combination = &[("causal", 1), ("group", 8), ("page", 64), ("e4m3", 1)];
/// All that a decode may have.
const DECODE_ALL: Combination = &[
    ("causal", 2),
    ("left", 1),
    ("group", 3),
    ("softcap", 1),
    ("alibi", 1),
    ("sinks", 1),
    ("page", 16),
    ("head_dim", ONE_CHUNK_LESS),
    ("head_dim_v", ONE_CHUNK_LESS),
];
/// Everything that goes together. The loads of a bias are many, and ptxas moves them ahead: with one, flash_pipelined,
/// flash_tf32 and flash_hopper spill up to 96 bytes, outside the products.
const ALL: Combination = &[
    ("causal", 2),
    ("left", 1),
    ("padding", 1),
    ("dropout", 1),
    ("group", 3),
    ("softcap", 1),
    ("alibi", 1),
    ("bias", 1),
    ("sinks", 1),
];

/// Beginnings and ends of entries' names, and their combinations; the first that fits counts.
const OF_ENTRIES: &[(&str, &str, &[Combination])] = &[
    // Launched for plain and causal attention alone.
    ("flash_hopper", "_x3", &[FULL, CAUSAL]),
    ("flash_hopper", "", &[FULL, CAUSAL, PADDING, DROPOUT, WINDOW, MASKS, CAPPED, ALIBI, VARLEN]),
    // It spills 8 bytes with padding and dropout, 132 with ALiBi and sinks.
    ("flash_pipelined", "_d128", &[FULL, CAUSAL, PADDING, DROPOUT, WINDOW, CAPPED, VARLEN, PADDED]),
    (
        "flash_pipelined",
        "",
        &[FULL, CAUSAL, PADDING, DROPOUT, WINDOW, MASKS, CAPPED, ALIBI, VARLEN, PADDED],
    ),
    // Told that two blocks fit, it spills 8 bytes with a diagonal, masks or a cap.
    ("flash_tf32", "_d128", &[FULL, VARLEN]),
    ("flash_tf32", "", &[FULL, CAUSAL, MASKS, CAPPED, VARLEN, PADDED]),
    // With everything on it spills 108 bytes on sm_90a, 176 on sm_80.
    ("backward_standard_scores", "f16", &[FULL, CAUSAL, MASKS, CAPPED, ALIBI, VARLEN]),
    ("backward_mma", "_ordered", &[FULL, CAUSAL]),
    ("backward_hopper", "_ordered", &[FULL, CAUSAL]),
    // With packed sequences, masks or a cap it spills more.
    ("backward_mma", "", &[FULL, CAUSAL, PADDED]),
    // With dropout it spills up to 320 bytes at head dim 64, 72 at 128; with a cap up to 416. With packed
    // sequences it spills 32 at head dim 64, and ptxas has it wait for dP before the exponentials.
    ("backward_hopper", "_d64", &[FULL, CAUSAL, PADDED, WINDOW]),
    ("backward_hopper", "_d128", &[FULL, CAUSAL, PADDED, WINDOW, VARLEN]),
    ("backward_hopper", "_d192", &[FULL, CAUSAL, PADDED, WINDOW, VARLEN, ALIBI]),
    // Its queries step spills 44 bytes in bf16 with a cap.
    ("backward_hopper", "_d256", &[FULL, CAUSAL, PADDED, WINDOW, VARLEN, ALIBI]),
    ("backward_hopper", "_v128", &[FULL, CAUSAL, PADDED, WINDOW, VARLEN, ALIBI]),
    // The steps before and after it.
    ("backward_hopper", "", &[FULL, CAUSAL]),
    ("decode", "", &[FULL, PAGED, ODD_PAGES, WINDOW, CODES, DECODE_ALL]),
    ("", "", &[FULL, ALL, VARLEN, PADDED]),
];

/// Beginnings and ends of entries' names, and how many bytes they may spill in a combination, stores and loads
/// together; others may spill none.
const SPILLS: &[(&str, &str, Combination, u32)] = &[
    // Addresses that a loop finds once, and reloads.
    ("backward_mma", "_d64_tall", FULL, 100),
    ("backward_mma", "_d64_tall", CAUSAL, 64),
    ("backward_mma", "_d64_tall", PADDED, 64),
    ("backward_mma", "_d64_tall_ordered", FULL, 80),
    ("backward_mma", "_d64_tall_ordered", CAUSAL, 100),
    ("backward_mma", "_d128", FULL, 8),
    ("backward_mma", "_d128_ordered", FULL, 88),
    ("backward_mma", "_d128_ordered", CAUSAL, 32),
    ("backward_mma", "_d224", CAUSAL, 8),
    ("backward_mma", "_d224", PADDED, 8),
    ("backward_mma", "_d256_ordered", FULL, 40),
    ("backward_mma", "_d256_ordered", CAUSAL, 8),
    // The loop reloads a word or two. LSE and delta are read early: to read them late costs more.
    ("backward_hopper", "_d128", WINDOW, 40),
    ("backward_hopper", "_d128", VARLEN, 104),
];

/// Bytes that an entry may spill in the combination of this [`name`], stores and loads together.
#[must_use]
pub fn spills(entry: &str, combination: &str) -> u32 {
    let fits = |&&(start, end, spilling, _): &&(&str, &str, Combination, u32)| {
        entry.starts_with(start) && entry.ends_with(end) && name(spilling) == combination
    };
    SPILLS.iter().find(fits).map_or(0, |&(.., bytes)| bytes)
}

/// The combinations of an entry, by its name and text: one if it reads no constant.
#[must_use]
pub fn of_entry(name: &str, text: &str) -> &'static [Combination] {
    if text::names(text).next().is_none() {
        return &[FULL];
    }
    OF_ENTRIES
        .iter()
        .find(|(start, end, _)| name.starts_with(start) && name.ends_with(end))
        .map_or(&[], |(_, _, combinations)| *combinations)
}

/// The text of an entry with a combination's numbers in place of the constants' symbols.
#[must_use]
pub fn specialise(entry: &str, text: &str, combination: &[(&str, u32)]) -> String {
    let value = |name: &str| {
        let value = combination.iter().find(|(of, _)| *of == name).map_or(0, |(_, value)| *value);
        Some(if value == ONE_CHUNK_LESS { head_dim(entry).saturating_sub(8) } else { value })
    };
    text::replace(text, value).expect("every name has a number")
}

/// The head dim that an entry is made for, by its name; 0 where it has none.
fn head_dim(entry: &str) -> u32 {
    let number = |part: &str| part.strip_prefix('d').and_then(|digits| digits.parse().ok());
    entry.split('_').find_map(number).unwrap_or(0)
}

/// The combination of that [`name`] for an entry with that text: `full`, `causal+padding`.
///
/// # Errors
/// When the entry reads no constant of a name; the message says which it reads.
pub fn parse<'a>(combination: &'a str, text: &str) -> Result<Vec<(&'a str, u32)>, String> {
    let read: BTreeSet<&str> = text::names(text).collect();
    let names = combination.split('+').filter(|name| *name != "full");
    names
        .map(|name| match read.contains(name) {
            true if name.starts_with("head_dim") => Ok((name, ONE_CHUNK_LESS)),
            true => Ok((name, 1)),
            false if read.is_empty() => Err(format!("the entry reads no constant, not {name}")),
            false => {
                let read: Vec<&str> = read.iter().copied().collect();
                Err(format!("the entry reads {}, not {name}", read.join(", ")))
            }
        })
        .collect()
}

/// A combination in words, as file names and tables have it.
#[must_use]
pub fn name(combination: Combination) -> String {
    let names: Vec<&str> = combination.iter().map(|(name, _)| *name).collect();
    if names.is_empty() { "full".to_owned() } else { names.join("+") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_that_are_not_named_are_off() {
        let text = "mov.b32 %r1, simt_constant_causal; mov.b32 %r2, simt_constant_padding;";
        let causal = specialise("flash_hopper_f16_d64", text, CAUSAL);
        assert_eq!(causal, "mov.b32 %r1, 1; mov.b32 %r2, 0;");
        let padded = |entry| specialise(entry, "mov.b32 %r1, simt_constant_head_dim_v;", PADDED);
        assert_eq!(padded("flash_mma_f16_d128"), "mov.b32 %r1, 120;");
        assert_eq!(padded("standard_softmax_f16"), "mov.b32 %r1, 0;");
        assert_eq!(of_entry("flash_hopper_f16_d64_x3", text), [FULL, CAUSAL]);
        assert_eq!(of_entry("flash_hopper_f16_d64", text).len(), 9);
        assert_eq!(of_entry("linear_naive_f16", "ret;"), [FULL]);
        assert_eq!((name(FULL), name(WINDOW)), ("full".into(), "causal+left+group".into()));
    }

    #[test]
    fn a_combination_is_had_by_its_name() {
        let text = "mov.b32 %r1, simt_constant_causal; mov.b32 %r2, simt_constant_padding;";
        assert_eq!(parse("full", text), Ok(vec![]));
        assert_eq!(parse("causal+padding", text), Ok(vec![("causal", 1), ("padding", 1)]));
        assert_eq!(
            parse("casual", text),
            Err("the entry reads causal, padding, not casual".into())
        );
        assert_eq!(parse("causal", "ret;"), Err("the entry reads no constant, not causal".into()));
    }
}
