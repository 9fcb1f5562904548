//! PostgreSQL's configuration syntax, as `guc-file.l` reads it: one setting or include directive
//! per line. `text.rs` decodes the text. Every byte above 127 is a letter, as in PostgreSQL.
//!
//! Invariant: parsing succeeds for any bytes. A line that PostgreSQL rejects becomes a
//! [`SyntaxError`], because the server refuses to start with it.

use super::text;

/// A line of a configuration file that sets a value or includes a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// The number of the line, from 1.
    pub(super) line: usize,
    /// The name in lower case: PostgreSQL compares names without regard to ASCII case.
    pub(super) name: String,
    /// The value without quotes and escapes.
    pub(super) value: String,
}

/// A line that PostgreSQL rejects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SyntaxError {
    /// The number of the line, from 1.
    pub(super) line: usize,
}

/// Reads the lines of a file in order.
pub(super) fn parse(text: &str) -> Vec<Result<Entry, SyntaxError>> {
    let lines = text.split('\n').zip(1..);
    lines
        .filter_map(|(content, line)| match parse_line(content) {
            Ok(None) => None,
            Ok(Some((name, value))) => Some(Ok(Entry { line, name, value })),
            Err(()) => Some(Err(SyntaxError { line })),
        })
        .collect()
}

/// Writes a value so that [`parse`] and PostgreSQL read it back.
pub(super) fn quote(value: &str) -> String {
    let escaped = value.replace('\\', "\\\\").replace('\'', "''");
    format!("'{}'", escaped.replace('\n', "\\n"))
}

fn parse_line(line: &str) -> Result<Option<(String, String)>, ()> {
    let mut rest = skip_blanks(line);
    if ends_here(rest) {
        return Ok(None);
    }
    let name = take_name(&mut rest).ok_or(())?;
    rest = skip_blanks(rest);
    if let Some(after) = rest.strip_prefix('=') {
        rest = skip_blanks(after);
    }
    let value = if let Some(quoted) = rest.strip_prefix('\'') {
        let (value, after) = take_string(quoted).ok_or(())?;
        rest = after;
        value
    } else {
        take_unquoted(&mut rest).ok_or(())?
    };
    if ends_here(skip_blanks(rest)) {
        Ok(Some((name.to_ascii_lowercase(), value)))
    } else {
        Err(())
    }
}

fn skip_blanks(text: &str) -> &str {
    text.trim_start_matches([' ', '\t', '\r'])
}

fn ends_here(text: &str) -> bool {
    text.is_empty() || text.starts_with('#')
}

fn is_letter(c: char) -> bool {
    c.is_ascii_alphabetic() || c == '_' || !c.is_ascii()
}

fn is_name_part(c: char) -> bool {
    is_letter(c) || c.is_ascii_digit()
}

/// Splits off the longest prefix of characters that `belongs` accepts.
fn take_while<'a>(rest: &mut &'a str, belongs: impl Fn(char) -> bool) -> &'a str {
    let end = rest.find(|c| !belongs(c)).unwrap_or(rest.len());
    let (taken, after) = rest.split_at(end);
    *rest = after;
    taken
}

/// Splits off an `ID` or `QUALIFIED_ID`.
fn take_name<'a>(rest: &mut &'a str) -> Option<&'a str> {
    let whole = *rest;
    let mut length = take_identifier(rest)?.len();
    if let Some(after) = rest.strip_prefix('.') {
        let mut after = after;
        if let Some(second) = take_identifier(&mut after) {
            length += 1 + second.len();
            *rest = after;
        }
    }
    whole.get(..length)
}

fn take_identifier<'a>(rest: &mut &'a str) -> Option<&'a str> {
    if !rest.starts_with(is_letter) {
        return None;
    }
    Some(take_while(rest, is_name_part))
}

/// Splits off an `ID`, `UNQUOTED_STRING`, `INTEGER` or `REAL`.
fn take_unquoted(rest: &mut &str) -> Option<String> {
    let word = |c: char| is_name_part(c) || "-._:/".contains(c);
    let number = |c: char| c.is_ascii_alphanumeric() || ".+-".contains(c);
    let begins_number = |c: char| c.is_ascii_digit() || ".+-".contains(c);
    let taken = if rest.starts_with(is_letter) {
        take_while(rest, word)
    } else if rest.starts_with(begins_number) {
        take_while(rest, number)
    } else {
        return None;
    };
    Some(taken.to_owned())
}

/// Returns the content of a quoted string after its opening quote, by the rules of
/// `DeescapeQuotedString`, and the rest.
fn take_string(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices().peekable();
    while let Some((at, c)) = characters.next() {
        match c {
            '\'' => match characters.peek() {
                Some((_, '\'')) => {
                    characters.next();
                    value.push('\'');
                }
                _ => return Some((value, text.get(at + 1..)?)),
            },
            '\\' => match characters.next()?.1 {
                'b' => value.push('\u{8}'),
                'f' => value.push('\u{c}'),
                'n' => value.push('\n'),
                'r' => value.push('\r'),
                't' => value.push('\t'),
                first @ '0'..='7' => {
                    let mut code = first.to_digit(8)?;
                    for _ in 0..2 {
                        let Some(digit) = characters.peek().and_then(|(_, c)| c.to_digit(8)) else {
                            break;
                        };
                        code = code * 8 + digit;
                        characters.next();
                    }
                    value.push(text::character(u8::try_from(code & 0xff).ok()?));
                }
                other => value.push(other),
            },
            _ => value.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[track_caller]
    fn check(line: &str, expected: Option<(&str, &str)>) {
        let found = parse(line);
        let found: Vec<(&str, &str)> = found
            .iter()
            .map(|one| {
                let entry = one.as_ref().expect("valid syntax");
                (entry.name.as_str(), entry.value.as_str())
            })
            .collect();
        assert_eq!(found, expected.into_iter().collect::<Vec<_>>(), "{line}");
    }

    #[test]
    fn lines_are_read_as_postgresql_reads_them() {
        check("", None);
        check("  # only = a comment", None);
        check("port = 5433", Some(("port", "5433")));
        check("PORT 5433 # no sign", Some(("port", "5433")));
        check("\tport=5433\r", Some(("port", "5433")));
        check("work_mem = 4MB", Some(("work_mem", "4MB")));
        check("x.factor = -1.5e-3", Some(("x.factor", "-1.5e-3")));
        check("wal_level = replica", Some(("wal_level", "replica")));
    }

    #[test]
    fn strings_have_quotes_and_escapes() {
        check("a = ''", Some(("a", "")));
        check("a = 'it''s' # x", Some(("a", "it's")));
        check(r"a = 'it\'s'", Some(("a", "it's")));
        check(r#"a = 'cp "%p" \\x'"#, Some(("a", r#"cp "%p" \x"#)));
        check(r"a = '\101\n\t\q'", Some(("a", "A\n\tq")));
        check(
            "Cron.Database_Name = 'a#b'",
            Some(("cron.database_name", "a#b")),
        );
        check("include_dir 'conf.d'", Some(("include_dir", "conf.d")));
    }

    #[test]
    fn what_postgresql_rejects_is_a_syntax_error_of_its_line() {
        for wrong in [
            "a",
            "a =",
            "= 1",
            "a = 'open",
            "a = 1 2",
            "a = /no/quotes",
            "1a = 2",
            "a = 'x' y",
        ] {
            let text = format!("b = 1\n{wrong}\nc = 2");
            let found = parse(&text);
            assert_eq!(found.len(), 3, "{wrong}");
            assert_eq!(found[1], Err(SyntaxError { line: 2 }), "{wrong}");
            assert!(found[2].is_ok(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn a_quoted_value_is_read_back(value in "[^\u{0}\r]*") {
            let text = format!("name = {}", quote(&value));
            let found = parse(&text);
            prop_assert_eq!(found.len(), 1);
            let entry = found[0].as_ref().expect("valid syntax");
            prop_assert_eq!(&entry.value, &value);
        }

        #[test]
        fn no_text_panics(text in ".*") {
            parse(&text);
        }
    }
}
