//! [`BackupInfo`]: `backup.json`, our description of one base backup. It is written last. Without
//! it the backup does not exist.
//!
//! A backup consists of tar archives, each cut into slices. A slice is a zstd frame of its own, so
//! that stock `zstd -d | tar x` reads the slices in order, and a restore can extract them in
//! parallel (`backup/slice.rs`).
//!
//! Invariant: code that reads a `backup.json` from a repository calls [`BackupInfo::parse_of`]. The
//! result belongs to the key that it was read from, and names no path outside of the data directory
//! and no size that a reader cannot allocate. Every other part of the backup is bound to it by
//! SHA-256 or by [`BackupInfo::check_manifest`] and [`BackupInfo::check_label`].

use serde::{Deserialize, Serialize};

use crate::{
    BackupId, Branch, Lsn, ObjectKey, PgTimestamp, PgVersion, SystemIdentifier, checked_json,
    layout::BackupArchive, relative_path::stays_below,
};

mod binding;
mod slice;

pub use slice::{BackupSlice, ContinuedFile, SLICE_BYTES, SLICE_BYTES_MAX, SliceError, SlicePart};

/// The version of `backup.json` that this build writes, and the newest that it reads.
///
/// Version 2 added the checksums of `backup_label` and `tablespace_map`, and made the checksum of
/// `backup.json` itself mandatory.
pub const BACKUP_FORMAT_VERSION: u32 = 2;
/// The first version with the checksums of `backup_label` and `tablespace_map`.
const FORMAT_VERSION_WITH_LABEL: u32 = 2;

/// The longest location of a tablespace (`MAXPGPATH` in `pg_config_manual.h`).
const LOCATION_BYTES_MAX: usize = 1024;

/// The facts about a base backup that a restore needs before it reads the first slice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupInfo {
    /// [`BACKUP_FORMAT_VERSION`].
    pub format_version: u32,
    /// The backup's name.
    pub id: BackupId,
    /// The operator's label.
    pub label: String,
    /// The kind of backup.
    pub kind: BackupKind,
    /// The cluster's system identifier.
    pub system_identifier: SystemIdentifier,
    /// The cluster's major version.
    pub postgresql_major: PgVersion,
    /// The server's version as the server reports it: `17.5 (Debian 17.5-1)`.
    pub server_version: String,
    /// The timeline on which the backup was taken.
    pub branch: Branch,
    /// START WAL LOCATION: the LSN where redo begins.
    pub start_lsn: Lsn,
    /// CHECKPOINT LOCATION: the LSN of the checkpoint record.
    pub checkpoint_lsn: Lsn,
    /// The LSN up to which WAL must be replayed before the backup is consistent.
    pub stop_lsn: Lsn,
    /// The time when the backup began.
    pub started: PgTimestamp,
    /// The time when its last byte and the WAL up to `stop_lsn` had been stored.
    pub finished: PgTimestamp,
    /// True if the backup was taken from a standby.
    pub from_standby: bool,
    /// Every tablespace except the two in the data directory (`pg_default`, `pg_global`).
    pub tablespaces: Vec<Tablespace>,
    /// The slices, archive by archive, numbered from 1 in each archive. The slices of an archive in
    /// order are its tar stream.
    pub slices: Vec<BackupSlice>,
    /// SHA-256 of `backup_manifest`, in hexadecimal.
    pub manifest_sha256: String,
    /// The length of `backup_manifest`.
    pub manifest_bytes: u64,
    /// SHA-256 of `backup_label`, in hexadecimal. `None` in version 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup_label_sha256: Option<String>,
    /// SHA-256 of `tablespace_map`, in hexadecimal. `None` if the backup has no such file, and in
    /// version 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tablespace_map_sha256: Option<String>,
    /// The total length of the tar streams.
    pub raw_bytes: u64,
    /// The total length of the slices.
    pub stored_bytes: u64,
    /// The server's warnings while the backup was taken.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// The kind of a base backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BackupKind {
    /// A full backup.
    Full,
}

/// A tablespace outside of the data directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tablespace {
    /// Its OID, which names its archive and its link in `pg_tblspc`.
    pub oid: u32,
    /// Its directory on the server.
    pub location: String,
}

impl Tablespace {
    /// Returns true for an absolute path without `..`, as `CREATE TABLESPACE` stores it, and for
    /// the directory of an in-place tablespace.
    fn has_sound_location(&self) -> bool {
        if self.location.len() >= LOCATION_BYTES_MAX {
            return false;
        }
        match self.location.strip_prefix('/') {
            Some(rest) => stays_below(rest),
            None => self.location == format!("pg_tblspc/{}", self.oid),
        }
    }
}

/// The reason why a `backup.json` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BackupInfoError {
    /// It is stored under the key of another backup than it describes.
    #[error(
        "it describes backup {id} of system {system}; it was copied from there or renamed, so that the backup's own \
         description is lost"
    )]
    Elsewhere {
        /// The backup that it describes.
        id: BackupId,
        /// That backup's cluster.
        system: SystemIdentifier,
    },
    /// It contradicts itself.
    #[error("backup.json of {id} is malformed: {problem}")]
    Malformed {
        /// The backup.
        id: BackupId,
        /// The contradiction.
        problem: &'static str,
    },
    /// It is not JSON of this shape.
    #[error("backup.json is malformed: {0}")]
    Json(#[from] serde_json::Error),
    /// A newer Tidemark wrote it.
    #[error(
        "backup.json of format version {found}; this build reads up to version {BACKUP_FORMAT_VERSION}, use the Tidemark that wrote it or a newer one"
    )]
    UnsupportedFormat {
        /// The version found.
        found: u32,
    },
}

/// The one field that every version of `backup.json` has.
#[derive(Deserialize)]
struct Version {
    format_version: u32,
}

impl BackupInfo {
    /// Parses and checks a `backup.json`.
    ///
    /// # Errors
    /// [`BackupInfoError`] when it has a newer version, does not have this structure, or
    /// contradicts itself.
    pub fn parse(json: &[u8]) -> Result<Self, BackupInfoError> {
        // The version is read first, because a newer structure would only give a confusing error.
        let Version { format_version } = serde_json::from_slice(json)?;
        if format_version == 0 || format_version > BACKUP_FORMAT_VERSION {
            return Err(BackupInfoError::UnsupportedFormat {
                found: format_version,
            });
        }
        let info: Self = if format_version < FORMAT_VERSION_WITH_LABEL {
            checked_json::from_slice(json)?
        } else {
            checked_json::from_summed_slice(json)?
        };
        info.check()?;
        Ok(info)
    }

    /// As [`BackupInfo::parse`], for an object that was read from `key`.
    ///
    /// # Errors
    /// As [`BackupInfo::parse`]; [`BackupInfoError::Elsewhere`] when it describes another backup.
    pub fn parse_of(key: &ObjectKey, json: &[u8]) -> Result<Self, BackupInfoError> {
        let info = Self::parse(json)?;
        if info.key() != *key {
            return Err(BackupInfoError::Elsewhere {
                id: info.id,
                system: info.system_identifier,
            });
        }
        Ok(info)
    }

    /// Serializes `backup.json`, with a newline at its end.
    ///
    /// # Errors
    /// [`BackupInfoError`] when it contradicts itself, so that no reader would accept it.
    pub fn to_json(&self) -> Result<Vec<u8>, BackupInfoError> {
        self.check()?;
        let mut json = checked_json::to_vec(self)?;
        json.push(b'\n');
        Ok(json)
    }

    /// Refuses a description that contradicts itself.
    ///
    /// # Errors
    /// [`BackupInfoError::Malformed`] with the contradiction.
    pub fn check(&self) -> Result<(), BackupInfoError> {
        match self.contradiction() {
            None => Ok(()),
            Some(problem) => Err(BackupInfoError::Malformed {
                id: self.id.clone(),
                problem,
            }),
        }
    }

    fn contradiction(&self) -> Option<&'static str> {
        let sum = |field: fn(&BackupSlice) -> u64| {
            self.slices
                .iter()
                .map(field)
                .fold(0_u64, u64::saturating_add)
        };
        let sha256 = |text: &str| {
            text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        };
        if self.start_lsn > self.checkpoint_lsn || self.checkpoint_lsn > self.stop_lsn {
            return Some("start, checkpoint and stop are not in order");
        }
        let optional = [&self.backup_label_sha256, &self.tablespace_map_sha256];
        if !sha256(&self.manifest_sha256)
            || !self.slices.iter().all(|slice| sha256(&slice.sha256))
            || !optional.into_iter().flatten().all(|text| sha256(text))
        {
            return Some("a SHA-256 is not 64 lower case hexadecimal digits");
        }
        if self.format_version >= FORMAT_VERSION_WITH_LABEL && self.backup_label_sha256.is_none() {
            return Some("the SHA-256 of backup_label is missing");
        }
        if !self.slices.iter().all(BackupSlice::is_of_allowed_size) {
            return Some("a slice announces more bytes than any writer puts into one");
        }
        if sum(|slice| slice.raw_bytes) != self.raw_bytes
            || sum(|slice| slice.stored_bytes) != self.stored_bytes
        {
            return Some("the slices do not add up to the totals");
        }
        let mut oids: Vec<u32> = self.tablespaces.iter().map(|space| space.oid).collect();
        oids.sort_unstable();
        oids.dedup();
        if oids.len() != self.tablespaces.len() {
            return Some("a tablespace is named twice");
        }
        if !self.tablespaces.iter().all(Tablespace::has_sound_location) {
            return Some("a tablespace's location is not one of PostgreSQL's");
        }
        self.slices_contradiction()
    }

    fn slices_contradiction(&self) -> Option<&'static str> {
        let mut seen: Vec<BackupArchive> = Vec::new();
        let mut number = 0_u32;
        for slice in &self.slices {
            if seen.last() != Some(&slice.archive) {
                let known = match slice.archive {
                    BackupArchive::Base => true,
                    BackupArchive::Tablespace(oid) => {
                        self.tablespaces.iter().any(|space| space.oid == oid)
                    }
                };
                if !known {
                    return Some("a slice is of a tablespace that is not listed");
                }
                if seen.contains(&slice.archive) {
                    return Some("an archive's slices are not together");
                }
                seen.push(slice.archive);
                number = 0;
            }
            number = number.saturating_add(1);
            if slice.number != number {
                return Some("an archive's slices are not numbered from 1");
            }
            if let Some(file) = &slice.continues {
                let sound = number > 1
                    && file.offset > 0
                    && file.offset < file.size
                    && file.offset % 512 == 0;
                if !sound {
                    return Some("a slice continues a file where it cannot");
                }
                if !stays_below(&file.path) {
                    return Some("a slice continues a file outside of its archive");
                }
            }
        }
        let every = self
            .tablespaces
            .iter()
            .map(|space| BackupArchive::Tablespace(space.oid))
            .chain([BackupArchive::Base]);
        if every.into_iter().any(|archive| !seen.contains(&archive)) {
            return Some("an archive has no slice");
        }
        None
    }

    /// Returns the key of a slice in the repository.
    #[must_use]
    pub fn slice_key(&self, slice: &BackupSlice) -> ObjectKey {
        let id = self.id.clone();
        ObjectKey::BackupSlice(self.system_identifier, id, slice.archive, slice.number)
    }

    /// Returns the key of this description in the repository.
    #[must_use]
    pub fn key(&self) -> ObjectKey {
        ObjectKey::BackupInfo(self.system_identifier, self.id.clone())
    }

    /// Returns the key of the manifest in the repository.
    #[must_use]
    pub fn manifest_key(&self) -> ObjectKey {
        ObjectKey::BackupManifest(self.system_identifier, self.id.clone())
    }
}

#[cfg(test)]
mod tests;
