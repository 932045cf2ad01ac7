//! The constants in an entry's text. The PTX builder compiles this file too, so that it
//! checks the text that a loader makes.

/// How the symbol of a constant begins; its name follows.
pub const PREFIX: &str = "simt_constant_";

/// The text of an entry with numbers in place of the constants' symbols.
///
/// # Errors
/// The name of a constant that `value` has no number for.
pub fn replace(text: &str, value: impl Fn(&str) -> Option<u32>) -> Result<String, String> {
    let mut parts = text.split(PREFIX);
    let mut out = parts.next().unwrap_or("").to_owned();
    for part in parts {
        let (name, rest) = split_name(part);
        out.push_str(&value(name).ok_or_else(|| name.to_owned())?.to_string());
        out.push_str(rest);
    }
    Ok(out)
}

/// The names of the constants that an entry's text reads, each as often as it stands there.
pub fn names(text: &str) -> impl Iterator<Item = &str> {
    text.split(PREFIX).skip(1).map(|part| split_name(part).0)
}

/// The name that a text begins with, and the rest.
fn split_name(text: &str) -> (&str, &str) {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.split_at(text.find(|c| !is_name(c)).unwrap_or(text.len()))
}

#[cfg(test)]
mod tests {
    use super::{names, replace};

    #[test]
    fn whole_names_are_replaced_wherever_they_stand() {
        let text = "mov.b32 %r1, simt_constant_a;\nadd.s32 %r2, simt_constant_a_b, simt_constant_a";
        let value = |name: &str| match name {
            "a" => Some(7),
            "a_b" => Some(u32::MAX),
            _ => None,
        };
        let replaced = "mov.b32 %r1, 7;\nadd.s32 %r2, 4294967295, 7";
        assert_eq!(replace(text, value).as_deref(), Ok(replaced));
        assert_eq!(names(text).collect::<Vec<_>>(), ["a", "a_b", "a"]);
        assert_eq!(replace("simt_constant_typo", value), Err("typo".into()));
        assert_eq!(replace("ret;", value).as_deref(), Ok("ret;"));
    }
}
