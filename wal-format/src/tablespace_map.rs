//! `tablespace_map`: the target of each link in `pg_tblspc` when a base backup was taken.
//!
//! One line for each link, `OID path`. A backslash escapes a newline, a carriage return or, from 14
//! on, a backslash in the path (`do_pg_backup_start` in `xlog.c`, `read_tablespace_map` in
//! `xlogrecovery.c`).

use crate::{PgVersion, Tablespace};

/// The reason why a `tablespace_map` cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("tablespace_map, line {line}: {problem}")]
pub struct TablespaceMapError {
    /// The line number, from 1.
    pub line: usize,
    /// The problem.
    pub problem: &'static str,
}

/// Parses a `tablespace_map` that a server of `version` wrote.
///
/// # Errors
/// [`TablespaceMapError`] names the first line that differs from the format that PostgreSQL writes.
pub fn parse(version: PgVersion, content: &[u8]) -> Result<Vec<Tablespace>, TablespaceMapError> {
    let mut tablespaces: Vec<Tablespace> = Vec::new();
    let mut line = Vec::new();
    let mut number = 1_usize;
    let mut escaped = false;
    for byte in content {
        let ends_line = matches!(byte, b'\n' | b'\r');
        if escaped && version < PgVersion::V14 && !ends_line {
            // Before version 14 this backslash was not an escape.
            line.push(b'\\');
            escaped = false;
        }
        match byte {
            b'\\' if !escaped => {
                escaped = true;
                continue;
            }
            _ if ends_line && !escaped => {
                if !line.is_empty() {
                    let fail = |problem| TablespaceMapError {
                        line: number,
                        problem,
                    };
                    let tablespace = parse_line(&line).map_err(fail)?;
                    if tablespaces.iter().any(|known| known.oid == tablespace.oid) {
                        return Err(fail("this tablespace has a line already"));
                    }
                    tablespaces.push(tablespace);
                    line.clear();
                }
                number = number.saturating_add(1);
            }
            _ => line.push(*byte),
        }
        escaped = false;
    }
    if escaped || !line.is_empty() {
        let problem = "it is cut off";
        return Err(TablespaceMapError {
            line: number,
            problem,
        });
    }
    Ok(tablespaces)
}

fn parse_line(line: &[u8]) -> Result<Tablespace, &'static str> {
    let text = std::str::from_utf8(line).map_err(|_| "its path is not UTF-8")?;
    let (oid, location) = text.split_once(' ').ok_or("it has no path")?;
    let digits = !oid.is_empty() && oid.bytes().all(|byte| byte.is_ascii_digit());
    let oid = oid.parse().ok().filter(|oid| digits && *oid != 0);
    let oid = oid.ok_or("it begins with no OID")?;
    if location.is_empty() {
        return Err("it has no path");
    }
    let location = location.to_owned();
    Ok(Tablespace { oid, location })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(content: &[u8], expected: &[(u32, &str)]) {
        check_of(PgVersion::V18, content, expected);
    }

    fn check_of(version: PgVersion, content: &[u8], expected: &[(u32, &str)]) {
        let found = parse(version, content).expect("it parses");
        let found: Vec<_> = found.iter().map(|t| (t.oid, t.location.as_str())).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn a_map_of_postgresql_parses() {
        check(b"", &[]);
        check(
            b"16385 /srv/fast\n16390 /srv/with space\n",
            &[(16385, "/srv/fast"), (16390, "/srv/with space")],
        );
        check(b"1 /a\\\nb\\\\c\\\rd\n", &[(1, "/a\nb\\c\rd")]);
        check_of(
            PgVersion::V13,
            b"1 /a\\\nb\\\\c\\d\n",
            &[(1, "/a\nb\\\\c\\d")],
        );
        check(b"1 /a\r\n2 /b\r\n", &[(1, "/a"), (2, "/b")]);
    }

    #[test]
    fn a_map_that_is_none_is_refused_with_its_line() {
        for (content, line, part) in [
            (&b"x /a\n"[..], 1, "no OID"),
            (b"0 /a\n", 1, "no OID"),
            (b"+5 /a\n", 1, "no OID"),
            (b"1 /a\n2\n", 2, "no path"),
            (b"1 /a\n2 \n", 2, "no path"),
            (b"1 /a\n1 /b\n", 2, "already"),
            (b"1 /a", 1, "cut off"),
            (b"1 /a\n\\", 2, "cut off"),
            (b"1 /\xFF\n", 1, "UTF-8"),
        ] {
            let error = parse(PgVersion::V14, content).expect_err(part);
            assert_eq!(error.line, line);
            assert!(error.to_string().contains(part), "{error}");
        }
    }
}
