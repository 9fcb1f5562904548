//! The password file: `hostname:port:database:user:password`. The first matching line applies.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

/// Returns the password for a connection, if there is one. A file that others can read is ignored,
/// as in libpq.
pub(super) fn lookup(
    path: &Path,
    hosts: &[&str],
    port: u16,
    database: &str,
    user: &str,
) -> Option<String> {
    let metadata = fs::metadata(path).ok()?;
    if !metadata.is_file() {
        tracing::warn!(path = %path.display(), "the password file is no plain file; it is not used");
        return None;
    }
    if metadata.mode() & 0o077 != 0 {
        tracing::warn!(
            path = %path.display(),
            "the password file can be read by others; it is not used: chmod 0600 it"
        );
        return None;
    }
    let content = match fs::read_to_string(path) {
        Ok(content) => content,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the password file cannot be read");
            return None;
        }
    };
    let port = port.to_string();
    content.lines().find_map(|line| {
        hosts
            .iter()
            .find_map(|host| matching(line, [host, &port, database, user]))
    })
}

/// Returns the password of a matching line.
fn matching(line: &str, wanted: [&str; 4]) -> Option<String> {
    if line.starts_with('#') {
        return None;
    }
    let mut rest = line;
    for wanted in wanted {
        let (raw, after) = field(rest)?;
        if raw != "*" && unescaped(raw) != wanted {
            return None;
        }
        rest = after;
    }
    Some(unescaped(rest))
}

/// Returns a field, still with its escapes, and the text after its colon.
fn field(text: &str) -> Option<(&str, &str)> {
    let mut escaped = false;
    let end = text.find(|character| {
        let ends = character == ':' && !escaped;
        escaped = character == '\\' && !escaped;
        ends
    })?;
    Some((text.get(..end)?, text.get(end + 1..)?))
}

fn unescaped(text: &str) -> String {
    let mut characters = text.chars();
    let mut plain = String::with_capacity(text.len());
    while let Some(character) = characters.next() {
        match character {
            '\\' => plain.extend(characters.next()),
            other => plain.push(other),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn lines_match_like_libpq() {
        let check = |line, password: Option<&str>| {
            let wanted = ["localhost", "5432", "replication", "me"];
            assert_eq!(matching(line, wanted).as_deref(), password, "{line}");
        };
        check("localhost:5432:replication:me:pw", Some("pw"));
        check(r"*:*:*:me:p\:w:x", Some("p:w:x"));
        check(r"*:*:*:m\e:p\\w", Some(r"p\w"));
        check(r"\*:*:*:me:pw", None);
        check("*:*:*:*:", Some(""));
        check("*:*:*:*", None);
        check("other:*:*:me:pw", None);
        check("*:*:postgres:me:pw", None);
        check("#*:*:*:*:pw", None);
    }

    #[test]
    fn a_file_that_others_can_read_is_not_used() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("pgpass");
        fs::write(&path, "#x\nother:*:*:*:no\n*:5433:replication:me:yes\n").expect("a file");
        let found = |mode| {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("chmod");
            lookup(&path, &["h"], 5433, "replication", "me")
        };
        assert_eq!(found(0o600).as_deref(), Some("yes"));
        assert_eq!(found(0o400).as_deref(), Some("yes"));
        for open in [0o640, 0o604, 0o610, 0o644] {
            assert_eq!(found(open), None, "{open:o}");
        }
        assert_eq!(
            lookup(directory.path(), &["h"], 5433, "replication", "me"),
            None
        );
    }
}
