//! Numbers for readers: few digits, with their unit.

/// Bytes in the binary unit that leaves one to four digits before the point.
#[must_use]
pub fn bytes(bytes: f64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes;
    let mut unit = 0;
    while value.abs() >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{value:.0} B") } else { format!("{} {}", digits(value), UNITS[unit]) }
}

/// Three significant digits, without an exponent from 0.001 to 10 million.
#[must_use]
pub fn digits(value: f64) -> String {
    let size = value.abs();
    if value == 0.0 {
        return "0".into();
    }
    if !(1e-3..1e7).contains(&size) {
        return format!("{value:.1e}");
    }
    let places = (2 - size.log10().floor() as i32).max(0) as usize;
    format!("{value:.places$}")
}

/// A time in milliseconds.
#[must_use]
pub fn millis(ms: f64) -> String {
    if ms >= 10_000.0 { format!("{} s", digits(ms / 1000.0)) } else { format!("{} ms", digits(ms)) }
}

/// Two significant digits and a power of ten: `3.1e-7`.
#[must_use]
pub fn scientific(value: f64) -> String {
    if value == 0.0 { "0".into() } else { format!("{value:.1e}") }
}

/// A whole number with separated thousands.
#[must_use]
pub fn count(value: i64) -> String {
    let digits = value.unsigned_abs().to_string();
    let mut text = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i) % 3 == 0 {
            text.push(',');
        }
        text.push(c);
    }
    if value < 0 { format!("-{text}") } else { text }
}

/// A count with its noun: `1 thread`, `2 threads`.
#[must_use]
pub fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// Names as a sentence lists them: `a, b and c`.
#[must_use]
pub fn list(names: &[String]) -> String {
    match names {
        [] => String::new(),
        [one] => one.clone(),
        [all @ .., last] => format!("{} and {last}", all.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_three_digits() {
        assert_eq!(bytes(1536.0), "1.50 KiB");
        assert_eq!(bytes(85_899_345_920.0), "80.0 GiB");
        assert_eq!(bytes(12.0), "12 B");
        assert_eq!(digits(0.012_34), "0.0123");
        assert_eq!(digits(1234.5), "1234");
        assert_eq!(digits(9.87e-5), "9.9e-5");
        assert_eq!(millis(0.0123), "0.0123 ms");
        assert_eq!(millis(65_000.0), "65.0 s");
        assert_eq!(count(-1_234_567), "-1,234,567");
        assert_eq!((counted(1, "thread"), counted(0, "run")), ("1 thread".into(), "0 runs".into()));
        assert_eq!(list(&["a".into(), "b".into(), "c".into()]), "a, b and c");
    }
}
