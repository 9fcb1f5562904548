//! The place in the configuration file that an error is about: line, column and the line's text.

use toml::de::{DeTable, DeValue};

/// Parts of a line that may belong to a secret. The value in such a line is not shown.
const SECRET_PARTS: [&str; 10] = [
    "@",
    "conninfo",
    "heal_from",
    "key",
    "pass",
    "secret",
    "standbys",
    "token",
    "url",
    "user",
];
/// The maximum number of characters of a line that are shown.
const SHOWN_MAX: usize = 80;

/// A key of the file.
struct Key<'a> {
    name: &'a str,
    /// The table that contains it: `cluster.main`; empty at the top.
    table: String,
    offset: usize,
}

/// Returns the place that the message is about: the syntax error, or the line of the first key that
/// the message names. `None` if the text has no such key, or has it in several places.
pub(super) fn of(text: &str, message: &str) -> Option<String> {
    match DeTable::parse(text) {
        Err(error) => Some(at(text, error.span()?.start)),
        Ok(table) => {
            let mut keys = Vec::new();
            collect(table.get_ref(), "", &mut keys);
            of_key(text, &keys, message)
        }
    }
}

fn of_key(text: &str, keys: &[Key<'_>], message: &str) -> Option<String> {
    let is_of_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    let named_table = message
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'))
        .map(|(table, _)| table);
    let is_inside = |key: &&Key<'_>| named_table.is_none_or(|table| key.table == table);
    let words = message.split(|c| !is_of_name(c));
    let inside: Vec<&Key<'_>> = keys.iter().filter(is_inside).collect();
    let named = words.filter(|word| !word.is_empty()).find_map(|word| {
        let found: Vec<_> = inside.iter().filter(|key| key.name == word).collect();
        (!found.is_empty()).then_some(found)
    })?;
    // At the top and in a cluster: the message does not say which of them it is.
    let [key] = named.as_slice() else { return None };
    Some(at(text, key.offset))
}

fn collect<'a>(table: &'a DeTable<'_>, path: &str, keys: &mut Vec<Key<'a>>) {
    for (key, value) in table {
        let name: &str = key.get_ref();
        keys.push(Key {
            name,
            table: path.to_owned(),
            offset: key.span().start,
        });
        let below = match path {
            "" => name.to_owned(),
            path => format!("{path}.{name}"),
        };
        match value.get_ref() {
            DeValue::Table(table) => collect(table, &below, keys),
            DeValue::Array(entries) => {
                for entry in entries.iter() {
                    if let DeValue::Table(table) = entry.get_ref() {
                        // Messages name the table of the cluster, not the entry.
                        collect(table, path, keys);
                    }
                }
            }
            _ => {}
        }
    }
}

/// Returns line, column and text of the line at this byte.
fn at(text: &str, offset: usize) -> String {
    let offset = (0..=offset.min(text.len()))
        .rev()
        .find(|at| text.is_char_boundary(*at))
        .unwrap_or(0);
    let before = &text[..offset];
    let line = before.matches('\n').count() + 1;
    let start = before.rfind('\n').map_or(0, |newline| newline + 1);
    let column = text[start..offset].chars().count() + 1;
    let shown = shown(text[start..].lines().next().unwrap_or_default());
    format!("line {line}, column {column}, `{shown}`")
}

/// Returns the text of a line, without what may be secret.
fn shown(line: &str) -> String {
    let line = line.trim();
    let lower = line.to_lowercase();
    let visible = if !SECRET_PARTS.iter().any(|part| lower.contains(part)) {
        line
    } else if let Some((key, _)) = line.split_once('=')
        && !key.contains(['"', '\''])
    {
        return format!("{} = …", key.trim_end());
    } else if line.starts_with('[') && line.ends_with(']') && !line.contains(['"', '\'']) {
        line
    } else {
        return "…".to_owned();
    };
    match visible.char_indices().nth(SHOWN_MAX) {
        Some((end, _)) => format!("{}…", &visible[..end]),
        None => visible.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_located_in_the_file() {
        let text = "repository = \"file:///r\"\n\n[cluster.main]\n  rpo_target = 5\nspoool = \"/s\"\n\
                    [cluster.b]\nrpo_target = \"1s\"\n[notify.a]\ntype = \"sms\"\n";
        for (message, place) in [
            (
                "rpo_target = 5 has no unit in [cluster.main]",
                Some("line 4, column 3, `rpo_target = 5`"),
            ),
            (
                "unknown key \"spoool\" in [cluster.main]; did you mean \"spool\"?",
                Some("line 5, column 1, `spoool = \"/s\"`"),
            ),
            (
                "[notify.a]: type is wrong",
                Some("line 9, column 1, `type = \"sms\"`"),
            ),
            ("rpo_target = 0 is too small", None),
            ("spool = \"x\"", None),
        ] {
            assert_eq!(of(text, message).as_deref(), place, "{message}");
        }
        let unfinished = "http = \"127.0.0.1:1\"\nspool = \"/s\nslot = 'x'\n";
        let place = of(unfinished, "").expect("a place");
        assert!(place.starts_with("line 2, column "), "{place}");
        assert!(place.ends_with("`spool = \"/s`"), "{place}");
    }

    #[test]
    fn no_secret_of_the_line_is_shown() {
        for line in [
            "conninfo = \"host=db password=hunter2\" x",
            "s3_secret_key = hunter2",
            "  \"host=standby password=hunter2\",",
            "standbys = [\"host=a hunter2\"",
            "url = 'https://hooks.example/hunter2",
            "'http_token' = 'hunter2' 5",
            "\u{e4}\u{f6} = \u{20ac} password hunter2",
        ] {
            let place = at(line, line.len());
            assert!(!place.contains("hunter2"), "{place}");
        }
        assert_eq!(at("", 5), "line 1, column 1, ``");
        assert!(at(&"x".repeat(500), 0).len() < 150);
    }
}
