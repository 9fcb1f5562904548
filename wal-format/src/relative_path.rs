//! The rule for every path that comes from a repository: it is relative, and it never leaves the
//! directory that it is relative to.

/// Returns true if `path` stays below the directory that it is relative to: it has no leading
/// slash, no empty part, no `.`, no `..` and no zero byte.
#[must_use]
pub fn stays_below(path: &str) -> bool {
    !path.contains('\0') && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_below_the_directory_pass() {
        for path in ["a", "base/1/2", "...", "a b", "..a/b..", "pg_wal"] {
            assert!(stays_below(path), "{path}");
        }
        for path in [
            "",
            "/",
            "/etc/passwd",
            "..",
            "../x",
            "a/..",
            "a/../b",
            ".",
            "a/./b",
            "a//b",
            "a/",
            "a\0b",
        ] {
            assert!(!stays_below(path), "{path:?}");
        }
    }
}
