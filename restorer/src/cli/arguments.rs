//! Checks of single arguments.

use std::{ffi::OsString, time::Duration};

use repository::config::parse_duration;

use crate::{Error, Result};

/// The maximum length of an argument in bytes: more than any path, setting or connection string
/// has, and far less than the kernel accepts.
const ARGUMENT_BYTES_MAX: usize = 16 << 10;

/// Refuses an argument that is too long, without repeating it in the message.
pub(super) fn refuse_long(arguments: &[OsString]) -> Result<()> {
    let mut before = String::new();
    for argument in arguments {
        let text = argument.to_string_lossy();
        let flag = text.split_once('=').map_or(&*text, |(flag, _)| flag);
        let is_flag = flag.starts_with("--") && flag.len() < 100;
        if argument.len() > ARGUMENT_BYTES_MAX {
            let name = match (is_flag, before.is_empty()) {
                (true, _) => format!("the argument {flag}"),
                (false, false) => format!("the argument after {before}"),
                (false, true) => "an argument".to_owned(),
            };
            return Err(Error::usage(format!(
                "{name} has {} bytes; {ARGUMENT_BYTES_MAX} are the most, write a shorter one",
                argument.len()
            )));
        }
        before = if is_flag {
            flag.to_owned()
        } else {
            String::new()
        };
    }
    Ok(())
}

/// Refuses settings that PostgreSQL's configuration file cannot represent.
pub(super) fn check_settings(set: &[(String, String)]) -> Result<()> {
    for (name, value) in set {
        let shown: String = name.chars().take(100).collect();
        let shown = shown.escape_debug();
        if !name.split('.').all(is_name) {
            return Err(Error::usage(format!(
                "--set {shown}: this is not a name of a setting; write NAME=VALUE, for example work_mem=64MB"
            )));
        }
        if value.chars().any(|c| c.is_control() && c != '\t') {
            return Err(Error::usage(format!(
                "--set {shown}: the value contains a line break or another control character, which no setting has; set each \
                 setting with a --set of its own"
            )));
        }
    }
    Ok(())
}

/// Returns true for an identifier of a configuration file (`ID` in `guc-file.l`).
fn is_name(part: &str) -> bool {
    let letter = |c: char| c.is_ascii_alphabetic() || c == '_' || !c.is_ascii();
    let mut rest = part.chars();
    rest.next().is_some_and(letter) && rest.all(|c| letter(c) || c.is_ascii_digit() || c == '$')
}

/// Checks a size with one of PostgreSQL's units. A number without a unit would mean pages.
pub(super) fn buffers(text: &str) -> std::result::Result<String, String> {
    let number = ["kB", "MB", "GB", "TB"]
        .iter()
        .find_map(|unit| text.strip_suffix(unit));
    match number.map(str::parse::<u32>) {
        Some(Ok(1..)) => Ok(text.to_owned()),
        _ => Err("write a size with its unit, for example 4GB".to_owned()),
    }
}

/// Parses a number of bytes, with a unit of 1024, or 0.
pub(super) fn bytes(text: &str) -> std::result::Result<u64, String> {
    let units = [("kB", 10), ("MB", 20), ("GB", 30), ("TB", 40)];
    let unit = units
        .iter()
        .find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, *shift)));
    let (number, shift) = unit.unwrap_or((text, 0));
    number
        .trim()
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| "write a size with its unit, for example 4GB, or 0".to_owned())
}

pub(super) fn duration(text: &str) -> std::result::Result<Duration, String> {
    parse_duration("the duration", text).map_err(|error| error.to_string())
}

pub(super) fn pair(text: &str) -> std::result::Result<(String, String), String> {
    text.split_once('=')
        .filter(|(left, _)| !left.is_empty())
        .map(|(left, right)| (left.to_owned(), right.to_owned()))
        .ok_or_else(|| "write it with an equals sign between".to_owned())
}

/// Parses two paths. An equals sign that belongs to one of them is written `\=`, as for
/// `pg_basebackup`.
pub(super) fn locations(text: &str) -> std::result::Result<(String, String), String> {
    let escaped = text.replace("\\=", "\0");
    let (old, new) = pair(&escaped)?;
    if new.contains('=') {
        return Err("write an equals sign that belongs to a path as \\=".to_owned());
    }
    Ok((old.replace('\0', "="), new.replace('\0', "=")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_argument_is_named_and_not_repeated() {
        let long = "a".repeat(100_000);
        let refused = |arguments: &[&str]| {
            let arguments: Vec<OsString> = arguments.iter().map(OsString::from).collect();
            let error = refuse_long(&arguments).expect_err("it is too long");
            error.to_string()
        };
        let joined = format!("--set=work_mem={long}");
        for (arguments, part) in [
            (vec!["x", "--set", &long], "after --set has 100000 bytes"),
            (vec!["x", &joined], "argument --set has 100015 bytes"),
            (vec!["x", &long], "an argument has"),
        ] {
            let said = refused(&arguments);
            assert!(said.contains(part) && said.len() < 200, "{said}");
        }
        refuse_long(&[OsString::from("a".repeat(4096))]).expect("a path");
    }

    #[test]
    fn an_equals_sign_in_a_mapped_path_is_escaped() {
        let pair = |old: &str, new: &str| Ok((old.to_owned(), new.to_owned()));
        assert_eq!(locations("/a=/b"), pair("/a", "/b"));
        assert_eq!(locations(r"/a\=1=/b\=2"), pair("/a=1", "/b=2"));
        locations("/a=/b=2").expect_err("it has two signs");
    }

    #[test]
    fn settings_are_names_and_values_of_one_line() {
        let check =
            |name: &str, value: &str| check_settings(&[(name.to_owned(), value.to_owned())]);
        for name in ["work_mem", "pg_stat_statements.max", "_x$1"] {
            check(name, "a 'value' = 1").expect(name);
        }
        for name in ["work mem", "a\nb", "", ".a", "a.", "1a", "a#"] {
            check(name, "1").expect_err(name);
        }
        for value in ["1\n", "4MB\narchive_mode=on", "a\rb", "a\u{0}"] {
            check("work_mem", value).expect_err("a control character");
        }
    }
}
