//! [`BackupManifest`]: PostgreSQL's `backup_manifest`, which lists every file of a base backup with
//! its size and checksum.
//!
//! Versions 13 to 16 write format version 1. Version 2 (17 and later) also contains the system
//! identifier (`backup_manifest.c`, `parse_manifest.c`).

use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::{Lsn, SystemIdentifier, TimelineId, relative_path::stays_below};

/// The newest version that this build reads.
const VERSION_MAX: u64 = 2;
/// The start of the last line, which is not part of the manifest's own checksum.
const LAST_LINE: &[u8] = b"\n\"Manifest-Checksum\":";

/// A manifest whose own checksum is correct.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupManifest {
    /// The system identifier (17 and later).
    pub system_identifier: Option<SystemIdentifier>,
    /// Every file except those in `pg_wal` and the manifest itself.
    pub files: Vec<ManifestFile>,
    /// The WAL that makes the backup consistent, one range per timeline.
    pub wal_ranges: Vec<ManifestWalRange>,
}

/// A file of the backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestFile {
    /// Its path below the data directory: relative, without `.` and `..`. Bytes that are not UTF-8
    /// are replaced by U+FFFD.
    pub path: String,
    /// Its length in bytes.
    pub size: u64,
    /// Its checksum, if the backup was taken with checksums.
    pub checksum: Option<ManifestChecksum>,
}

/// The checksum of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestChecksum {
    /// `SHA256`, `CRC32C` or another of `MANIFEST_CHECKSUMS`.
    pub algorithm: String,
    /// The sum, in hexadecimal.
    pub hexadecimal: String,
}

impl ManifestFile {
    /// Returns the SHA-256 in lower-case hexadecimal, if that is the algorithm.
    #[must_use]
    pub fn sha256(&self) -> Option<&str> {
        self.checksum
            .as_ref()
            .filter(|checksum| checksum.algorithm == "SHA256")
            .map(|checksum| checksum.hexadecimal.as_str())
    }
}

/// WAL that the backup needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ManifestWalRange {
    /// The timeline.
    pub timeline: TimelineId,
    /// The start LSN.
    pub start_lsn: Lsn,
    /// The end LSN.
    pub end_lsn: Lsn,
}

/// The reason why a `backup_manifest` cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BackupManifestError {
    /// Its own checksum is wrong.
    #[error("backup_manifest's own checksum is wrong")]
    Checksum,
    /// It is not JSON, or a field is missing.
    #[error("backup_manifest cannot be read: {problem}")]
    Json {
        /// The JSON parser's message, with line and column.
        problem: String,
    },
    /// A file has no path, or a path that leaves the data directory.
    #[error("backup_manifest names the file \"{path}\", which is no path below a data directory")]
    Path {
        /// The path in the manifest.
        path: String,
    },
    /// The manifest of a later PostgreSQL version.
    #[error("backup_manifest has version {found}; Tidemark reads 1 and 2")]
    Version {
        /// Its version.
        found: u64,
    },
    /// An invalid range of WAL.
    #[error("backup_manifest names the WAL from {start} to {end} on timeline {timeline}")]
    WalRange {
        /// `Timeline`.
        timeline: u32,
        /// `Start-LSN`.
        start: String,
        /// `End-LSN`.
        end: String,
    },
}

#[derive(Deserialize)]
struct Stored {
    #[serde(rename = "PostgreSQL-Backup-Manifest-Version")]
    version: u64,
    #[serde(rename = "System-Identifier")]
    system_identifier: Option<u64>,
    #[serde(rename = "Files")]
    files: Vec<StoredFile>,
    #[serde(rename = "WAL-Ranges", default)]
    wal_ranges: Vec<StoredRange>,
    #[serde(rename = "Manifest-Checksum")]
    checksum: String,
}

#[derive(Deserialize)]
struct StoredFile {
    #[serde(rename = "Path")]
    path: Option<String>,
    #[serde(rename = "Encoded-Path")]
    encoded_path: Option<String>,
    #[serde(rename = "Size")]
    size: u64,
    #[serde(rename = "Checksum-Algorithm")]
    algorithm: Option<String>,
    #[serde(rename = "Checksum")]
    checksum: Option<String>,
}

#[derive(Deserialize)]
struct StoredRange {
    #[serde(rename = "Timeline")]
    timeline: u32,
    #[serde(rename = "Start-LSN")]
    start: String,
    #[serde(rename = "End-LSN")]
    end: String,
}

impl BackupManifest {
    /// Parses a manifest and checks its own checksum.
    ///
    /// # Errors
    /// [`BackupManifestError`].
    pub fn parse(content: &[u8]) -> Result<Self, BackupManifestError> {
        let stored: Stored = serde_json::from_slice(content).map_err(|error| {
            let problem = error.to_string();
            BackupManifestError::Json { problem }
        })?;
        if stored.version == 0 || stored.version > VERSION_MAX {
            let found = stored.version;
            return Err(BackupManifestError::Version { found });
        }
        // The checksum covers everything before the line that contains it, including the preceding
        // newline.
        let last_line = content
            .windows(LAST_LINE.len())
            .rposition(|window| window == LAST_LINE)
            .map_or(0, |at| at.saturating_add(1));
        let summed = content.get(..last_line).unwrap_or_default();
        if hex::encode(Sha256::digest(summed)) != stored.checksum {
            return Err(BackupManifestError::Checksum);
        }
        Ok(Self {
            system_identifier: stored.system_identifier.map(SystemIdentifier),
            files: stored
                .files
                .into_iter()
                .map(file)
                .collect::<Result<_, _>>()?,
            wal_ranges: stored
                .wal_ranges
                .iter()
                .map(wal_range)
                .collect::<Result<_, _>>()?,
        })
    }
}

fn file(stored: StoredFile) -> Result<ManifestFile, BackupManifestError> {
    let refused = |path: &str| BackupManifestError::Path {
        path: path.to_owned(),
    };
    let path = match (stored.path, stored.encoded_path) {
        (Some(path), None) => path,
        (None, Some(encoded)) => {
            let bytes = hex::decode(&encoded).map_err(|_| refused(&encoded))?;
            String::from_utf8_lossy(&bytes).into_owned()
        }
        (path, _) => return Err(refused(&path.unwrap_or_default())),
    };
    if !stays_below(&path) {
        return Err(refused(&path));
    }
    let checksum = stored.algorithm.zip(stored.checksum);
    Ok(ManifestFile {
        path,
        size: stored.size,
        checksum: checksum.map(|(algorithm, hexadecimal)| ManifestChecksum {
            algorithm,
            hexadecimal,
        }),
    })
}

fn wal_range(stored: &StoredRange) -> Result<ManifestWalRange, BackupManifestError> {
    let range = || {
        let range = ManifestWalRange {
            timeline: TimelineId::new(stored.timeline)?,
            start_lsn: stored.start.parse().ok()?,
            end_lsn: stored.end.parse().ok()?,
        };
        (range.start_lsn <= range.end_lsn).then_some(range)
    };
    range().ok_or_else(|| BackupManifestError::WalRange {
        timeline: stored.timeline,
        start: stored.start.clone(),
        end: stored.end.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a manifest with these fields and a correct checksum.
    fn manifest(fields: &str) -> String {
        let body = format!("{{ {fields},\n");
        let own = hex::encode(Sha256::digest(body.as_bytes()));
        format!("{body}\"Manifest-Checksum\": \"{own}\"}}\n")
    }

    const FILE: &str = "\"Files\": [\n{ \"Path\": \"base/1/2\", \"Size\": 7, \"Checksum-Algorithm\": \"SHA256\", \
                        \"Checksum\": \"abcd\" },\n{ \"Encoded-Path\": \"61ff\", \"Size\": 0 }\n]";
    const RANGE: &str = "\"WAL-Ranges\": [{ \"Timeline\": 1, \"Start-LSN\": \"0/2000028\", \"End-LSN\": \"0/2000100\" }]";

    #[test]
    fn both_versions_parse() {
        for (version, system_identifier) in [("1", None), ("2, \"System-Identifier\": 7", Some(7))]
        {
            let text = manifest(&format!(
                "\"PostgreSQL-Backup-Manifest-Version\": {version},\n{FILE},\n{RANGE}"
            ));
            let manifest = BackupManifest::parse(text.as_bytes()).expect("it parses");
            assert_eq!(
                manifest.system_identifier,
                system_identifier.map(SystemIdentifier)
            );
            assert_eq!(manifest.files.len(), 2);
            assert_eq!(manifest.files[0].path, "base/1/2");
            assert_eq!(
                (manifest.files[0].size, manifest.files[0].sha256()),
                (7, Some("abcd"))
            );
            assert_eq!(manifest.files[1].path, "a\u{FFFD}");
            assert_eq!(manifest.files[1].checksum, None);
            assert_eq!(manifest.wal_ranges[0].end_lsn, Lsn(0x200_0100));
        }
    }

    #[test]
    fn a_manifest_that_can_not_be_trusted_is_refused() {
        let sound = manifest(&format!(
            "\"PostgreSQL-Backup-Manifest-Version\": 1,\n{FILE},\n{RANGE}"
        ));
        let check = |text: &str, part: &str| {
            let error = BackupManifest::parse(text.as_bytes())
                .expect_err(part)
                .to_string();
            assert!(error.contains(part), "{error}");
        };
        check("", "cannot be read");
        check("{}", "cannot be read");
        check(&sound.replace("\"Size\": 7", "\"Size\": 8"), "own checksum");
        let again = |from: &str, to: &str| {
            let (body, _) = sound
                .split_once("\n\"Manifest-Checksum\"")
                .expect("it is there");
            let body = body.trim_start_matches("{ ").trim_end_matches(',');
            assert!(body.contains(from));
            manifest(&body.replace(from, to))
        };
        check(&again("Version\": 1", "Version\": 3"), "version 3");
        check(&again("base/1/2", "../etc/passwd"), "../etc/passwd");
        check(&again("base/1/2", "/etc/passwd"), "/etc/passwd");
        check(&again("61ff", "6"), "\"6\"");
        check(&again("\"Path\": \"base/1/2\", ", ""), "names the file");
        check(&again("0/2000100", "0/2000000"), "from 0/2000028");
        check(
            &again("\"Timeline\": 1", "\"Timeline\": 0"),
            "on timeline 0",
        );
    }
}
