//! Values of options. A refusal names the right value.

use std::num::IntErrorKind;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use flash_attention::{
    DType, Window,
    registry::{BACKWARD_KERNELS, DECODE_KERNELS, KERNELS, MAX_SPLITS},
};

/// A count of at least one.
pub fn count(text: &str) -> Result<usize, String> {
    whole(text, 1)
}

/// A count that may be zero.
pub fn count_or_none(text: &str) -> Result<usize, String> {
    whole(text, 0)
}

/// A seed.
pub fn seed(text: &str) -> Result<u64, String> {
    whole(text, 0)
}

/// The most repetitions: 8 bytes are kept for each.
const MOST_RUNS: usize = 1_000_000;

/// A count of timed runs, at least one.
pub fn runs(text: &str) -> Result<usize, String> {
    count(text).and_then(|count| at_most(count, MOST_RUNS))
}

/// A count of untimed runs, which may be zero.
pub fn runs_or_none(text: &str) -> Result<usize, String> {
    count_or_none(text).and_then(|count| at_most(count, MOST_RUNS))
}

/// A number of parts of a sequence's keys.
pub fn splits(text: &str) -> Result<u32, String> {
    count(text).and_then(|count| at_most(count, MAX_SPLITS as usize)).map(|count| count as u32)
}

fn at_most(count: usize, most: usize) -> Result<usize, String> {
    (count <= most).then_some(count).ok_or_else(|| format!("use a whole number up to {most}"))
}

fn whole<T: TryFrom<u64>>(text: &str, least: u64) -> Result<T, String> {
    let given = text.parse::<u64>();
    if given.as_ref().is_err_and(|e| *e.kind() == IntErrorKind::PosOverflow) {
        return Err(format!("use a whole number up to {}", u64::MAX));
    }
    let given = given.ok().filter(|&n| n >= least).and_then(|n| T::try_from(n).ok());
    given.ok_or_else(|| format!("use a whole number, {least} or more"))
}

/// A number whose range the problem checks.
pub fn number(text: &str) -> Result<f32, String> {
    text.parse().map_err(|_| "use a number, as 0.125".to_owned())
}

/// A window, as 1023,0: keys before and after a row's own position that it sees; -1 is no bound.
pub fn window(text: &str) -> Result<Window, String> {
    let wrong = || format!("use two whole numbers up to {}, as 1023,0; -1 is no bound", u32::MAX);
    let bound = |text: &str| match text {
        "-1" => Ok(None),
        _ => text.parse().map(Some).map_err(|_| wrong()),
    };
    let (left, right) = text.split_once(',').ok_or_else(wrong)?;
    Ok(Window { left: bound(left)?, right: bound(right)? })
}

/// The largest difference that passes.
pub fn threshold(text: &str) -> Result<f64, String> {
    above_zero(text).ok_or_else(|| "use a number above 0, as 1e-3".to_owned())
}

/// A duration for repeated runs.
pub fn seconds(text: &str) -> Result<f64, String> {
    let seconds = above_zero(text).filter(|&seconds| seconds <= 60.0);
    seconds.ok_or_else(|| "use a number of seconds above 0, up to 60".to_owned())
}

/// A time limit for one launch.
pub fn timeout(text: &str) -> Result<f64, String> {
    let seconds = above_zero(text).filter(|seconds| (1e-3..=1e6).contains(seconds));
    seconds.ok_or_else(|| "use a number of seconds from 0.001 to 1000000".to_owned())
}

fn above_zero(text: &str) -> Option<f64> {
    text.parse().ok().filter(|number: &f64| number.is_finite() && *number > 0.0)
}

/// Bytes, with a binary unit or none.
pub fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        unit => return Err(format!("unknown unit {unit}: use KiB, MiB or GiB")),
    };
    let count: u64 = digits.parse().map_err(|_| "use a whole number, as in 512MiB".to_owned())?;
    count.checked_mul(1 << shift).ok_or_else(|| "more than an address can span".to_owned())
}

/// A storage type by name.
pub fn dtype(text: &str) -> Result<DType, String> {
    text.parse().map_err(|_| "use f32, f16 or bf16".to_owned())
}

fn kernels() -> impl Iterator<Item = &'static str> {
    KERNELS.iter().map(|k| k.name).chain(BACKWARD_KERNELS.iter().map(|k| k.name))
}

/// A kernel by name.
pub fn kernel() -> impl TypedValueParser<Value = String> {
    PossibleValuesParser::new(kernels())
}

/// A kernel by name, including decode kernels.
pub fn any_kernel() -> impl TypedValueParser<Value = String> {
    PossibleValuesParser::new(kernels().chain(DECODE_KERNELS.iter().map(|k| k.name)))
}

/// A kernel by name, or `best`.
pub fn kernel_or_best() -> impl TypedValueParser<Value = String> {
    PossibleValuesParser::new(["best"].into_iter().chain(kernels()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_what_they_must_be() {
        assert_eq!((count("1"), count_or_none("0"), seed("7")), (Ok(1), Ok(0), Ok(7)));
        for text in ["0", "-1", "1.5", "1e3", "", "abc", " 1"] {
            assert_eq!(count(text).unwrap_err(), "use a whole number, 1 or more", "{text}");
        }
        assert!(seed("99999999999999999999").unwrap_err().contains("up to 18446744073709551615"));
        assert_eq!((runs("1000000"), runs_or_none("0")), (Ok(1_000_000), Ok(0)));
        for text in ["1000001", "18446744073709551615"] {
            let reason = "use a whole number up to 1000000";
            assert_eq!(runs(text).unwrap_err(), reason);
            assert_eq!(runs_or_none(text).unwrap_err(), reason);
        }
        assert!(runs("0").is_err());
        assert_eq!(number("-1"), Ok(-1.0));
        assert!(number("x").is_err() && threshold("0").is_err() && threshold("inf").is_err());
        assert_eq!((seconds("0.5"), threshold("1e-3")), (Ok(0.5), Ok(1e-3)));
        assert_eq!(timeout("120"), Ok(120.0));
        assert!(timeout("0").is_err() && timeout("inf").is_err() && timeout("1e-9").is_err());
        assert!(seconds("0").is_err() && seconds("NaN").is_err() && seconds("61").is_err());
    }

    #[test]
    fn windows_have_two_bounds() {
        let parsed = |text| window(text).map(|Window { left, right }| (left, right));
        assert_eq!(parsed("128,0"), Ok((Some(128), Some(0))));
        assert_eq!(parsed("-1,4294967295"), Ok((None, Some(u32::MAX))));
        for text in ["", "3", "3,", ",3", "1,2,3", "-2,0", "1, 2", "4294967296,0", "a,b", "1.5,0"] {
            assert!(parsed(text).unwrap_err().contains("two whole numbers"), "{text}");
        }
        let window = Window { left: Some(7), right: None };
        assert_eq!(parsed(&window.to_string()), Ok((Some(7), None)));
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!((bytes("2GiB"), bytes("70")), (Ok(2 << 30), Ok(70)));
        assert!(bytes("2GB").is_err() && bytes("99999999999GiB").is_err() && bytes("").is_err());
    }
}
