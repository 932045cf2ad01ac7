//! The columns of a profile: what is shown of a line's counts.

use flash_attention::backend::cpu::emulator::Counts;

use super::counted::{Counted, CountedLine};
use crate::format;

/// A column.
pub struct Column {
    /// Its heading.
    pub name: &'static str,
    /// The meaning of the heading.
    pub help: &'static str,
    /// The figure that lines are sorted and coloured by; 0 where a line has none.
    pub value: fn(&CountedLine) -> f64,
    /// The printed number.
    pub show: fn(&CountedLine) -> String,
}

fn global(c: &Counts) -> u64 {
    c.global_bytes_read + c.global_bytes_written
}

fn shared(c: &Counts) -> u64 {
    c.shared_bytes_read + c.shared_bytes_written
}

/// A count in few digits: `9999`, `12.3k`, `4.19M`.
#[must_use]
pub fn short(count: u64) -> String {
    let scaled =
        |power: i32, unit| format!("{}{unit}", format::digits(count as f64 / 10f64.powi(power)));
    match count {
        0..10_000 => count.to_string(),
        10_000..1_000_000 => scaled(3, "k"),
        1_000_000..1_000_000_000 => scaled(6, "M"),
        _ => scaled(9, "G"),
    }
}

/// Bytes in few digits, without a blank.
#[must_use]
pub fn bytes(bytes: u64) -> String {
    format::bytes(bytes as f64).replace(' ', "")
}

/// All columns.
const ALL: [Column; 10] = [
    Column {
        name: "warps",
        help: "times that a warp executed a primitive of the line",
        value: |l| l.counts.warps as f64,
        show: |l| short(l.counts.warps),
    },
    Column {
        name: "blocks",
        help: "of these the least and the most in one block, where blocks differ",
        value: |l| (l.spread.most - l.spread.least) as f64,
        show: |l| format!("{}–{}", short(l.spread.least), short(l.spread.most)),
    },
    Column {
        name: "global",
        help: "bytes of global memory that were asked for",
        value: |l| global(&l.counts) as f64,
        show: |l| bytes(global(&l.counts)),
    },
    Column {
        name: "sectors",
        help: "sectors of 32 bytes that a request of a warp to global memory touches, on average",
        value: |l| Counted::sectors_per_request(&l.counts).unwrap_or(0.0),
        show: |l| Counted::sectors_per_request(&l.counts).map_or_else(String::new, format::digits),
    },
    Column {
        name: "shared",
        help: "bytes of shared memory that were asked for",
        value: |l| shared(&l.counts) as f64,
        show: |l| bytes(shared(&l.counts)),
    },
    Column {
        name: "conflicts",
        help: "passes over shared memory that bank conflicts add",
        value: |l| Counted::conflicts(&l.counts) as f64,
        show: |l| short(Counted::conflicts(&l.counts)),
    },
    Column {
        name: "FLOP",
        help: "floating-point operations by functions of math; plain + - * / are not seen",
        value: |l| l.counts.flops as f64,
        show: |l| short(l.counts.flops),
    },
    Column {
        name: "special",
        help: "exponentials, logarithms, reciprocals, hyperbolic tangents",
        value: |l| l.counts.special as f64,
        show: |l| short(l.counts.special),
    },
    Column {
        name: "tensor FLOP",
        help: "floating-point operations on tensor cores",
        value: |l| l.counts.tensor_flops as f64,
        show: |l| short(l.counts.tensor_flops),
    },
    Column {
        name: "waits",
        help: "times that a warp came to a barrier or a wait",
        value: |l| l.counts.waits as f64,
        show: |l| short(l.counts.waits),
    },
];

impl Column {
    /// The columns in which a line of the profile has anything.
    #[must_use]
    pub fn of(counted: &Counted) -> Vec<Self> {
        let has_any = |column: &Self| counted.lines.iter().any(|line| (column.value)(line) > 0.0);
        ALL.into_iter().filter(has_any).collect()
    }

    /// The printed count of a line; empty for 0.
    #[must_use]
    pub fn cell(&self, line: &CountedLine) -> String {
        if (self.value)(line) > 0.0 { (self.show)(line) } else { String::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_have_few_digits() {
        let texts = [0, 9999, 12_345, 4_194_304, 2_000_000_000].map(short);
        assert_eq!(texts, ["0", "9999", "12.3k", "4.19M", "2.00G"]);
        assert_eq!(bytes(65_536), "64.0KiB");
    }
}
