//! Files that hold a secret: tokens, passwords, private keys, credentials.
//!
//! Invariant: a file that every user of the host may access is refused before it is read, as ssh
//! and libpq do with a private key. Access by the file's group is allowed.

use std::{fs, io, os::unix::fs::PermissionsExt, path::Path};

use crate::{Error, Result, access};

/// The permission bits of users who are neither the owner nor in the group.
const OTHERS: u32 = 0o007;

/// Checks that the file exists and that only its owner and its group may access it.
///
/// # Errors
/// The problem and its remedy, without the path at the beginning.
pub fn require_private(path: &Path) -> std::result::Result<(), String> {
    let metadata = fs::metadata(path).map_err(|error| denied(path, &error))?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & OTHERS == 0 {
        return Ok(());
    }
    Err(format!(
        "every user of this host may access it (mode {mode:04o}); run `chmod 0600 {}` (0640 for a group)",
        path.display()
    ))
}

/// Reads the file that the key `key` of the configuration names.
///
/// # Errors
/// [`Error::Config`], which names the key and the file and never shows the content.
pub(super) fn read(key: &str, path: &Path) -> Result<String> {
    let wrong =
        |problem: String| Error::config(format!("{key} = \"{}\": {problem}", path.display()));
    require_private(path).map_err(wrong)?;
    fs::read_to_string(path).map_err(|error| wrong(denied(path, &error)))
}

/// Returns the text of an error about a file that the configuration names, with the remedy if this
/// user may not read the file.
pub(crate) fn denied(path: &Path, error: &io::Error) -> String {
    format!("{error}{}", access::denial_of_setting(path, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_every_user_may_access_is_refused_and_a_group_is_not() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("token");
        fs::write(&path, "S3CRET").expect("a file");
        for (mode, allowed) in [
            (0o600, true),
            (0o400, true),
            (0o640, true),
            (0o660, true),
            (0o644, false),
            (0o604, false),
            (0o602, false),
        ] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("chmod");
            let found = read("http_token_file", &path);
            assert_eq!(found.is_ok(), allowed, "{mode:o}");
            if let Err(error) = found {
                let said = error.to_string();
                let remedy = format!("`chmod 0600 {}`", path.display());
                assert!(said.contains("http_token_file") && said.contains(&remedy));
                assert!(!said.contains("S3CRET"), "{said}");
            }
        }
        let missing = read("http_token_file", &directory.path().join("none"));
        let said = missing.expect_err("it is missing").to_string();
        assert!(said.contains("http_token_file") && said.contains("No such file"));
    }
}
