//! Numbers as a reader wants them: few digits, with their unit.

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
    }
}
