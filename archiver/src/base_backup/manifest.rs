//! Compares the received files with `backup_manifest` (`backup_manifest.c`), and the manifest with
//! its own checksum.

use std::collections::BTreeMap;

use wal_format::BackupManifest;

use super::{error::BaseBackupError, slicer::ReceivedFile};
use crate::error::{Error, Result};

fn differs(problem: String) -> Error {
    Error::BaseBackup(BaseBackupError::Manifest { problem })
}

/// Compares the size and the SHA-256 of every file.
pub(super) fn check(manifest: &[u8], received: &BTreeMap<String, ReceivedFile>) -> Result<()> {
    let manifest = BackupManifest::parse(manifest).map_err(|error| differs(error.to_string()))?;
    for entry in manifest.files {
        let path = &entry.path;
        let Some(file) = received.get(path) else {
            return Err(differs(format!("{path} did not come")));
        };
        if file.size != entry.size {
            let (expected, found) = (entry.size, file.size);
            return Err(differs(format!(
                "{path} has {found} bytes instead of {expected}"
            )));
        }
        if entry.sha256() != Some(file.sha256.as_str()) {
            return Err(differs(format!("{path} has another SHA-256")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;

    #[test]
    fn every_difference_is_named() {
        let sum = hex::encode(Sha256::digest(b"x"));
        let body = format!(
            "{{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n\"Files\": [\n{{ \"Path\": \"a\", \"Size\": 1, \
             \"Checksum-Algorithm\": \"SHA256\", \"Checksum\": \"{sum}\" }}\n],\n"
        );
        let own = hex::encode(Sha256::digest(body.as_bytes()));
        let manifest = format!("{body}\"Manifest-Checksum\": \"{own}\"}}\n");
        let file = |size, sha256: &str| {
            let file = ReceivedFile {
                size,
                sha256: sha256.to_owned(),
            };
            BTreeMap::from([("a".to_owned(), file)])
        };
        check(manifest.as_bytes(), &file(1, &sum)).expect("it matches");
        for (manifest, files, part) in [
            (manifest.clone(), BTreeMap::new(), "did not come"),
            (manifest.clone(), file(2, &sum), "2 bytes"),
            (manifest.clone(), file(1, "00"), "another SHA-256"),
            (
                manifest.replace("\"Size\": 1", "\"Size\": 3"),
                file(1, &sum),
                "own checksum",
            ),
            ("{".to_owned(), BTreeMap::new(), "cannot be read"),
        ] {
            let error = check(manifest.as_bytes(), &files)
                .expect_err(part)
                .to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
