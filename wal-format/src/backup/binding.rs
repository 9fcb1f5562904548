//! Binds the parts of a backup to its `backup.json`, so that a part of another backup is detected.

use std::collections::BTreeSet;

use sha2::{Digest, Sha256};

use super::{BackupInfo, BackupSlice, FORMAT_VERSION_WITH_LABEL};
use crate::{BackupLabel, BackupManifest, layout::BackupArchive, tablespace_map};

impl BackupInfo {
    /// Returns the slices of the data directory, in order. PostgreSQL puts `backup_label` and
    /// `tablespace_map` first, so they are in the first slice unless that is full before they end.
    pub fn label_slices(&self) -> impl Iterator<Item = &BackupSlice> {
        let base = self.slices.iter();
        base.filter(|slice| slice.archive == BackupArchive::Base)
    }

    /// Compares the manifest, and its `length` in bytes, with this description: length, system
    /// identifier, WAL, and the files that slices continue.
    ///
    /// # Errors
    /// The contradiction, as a clause about the manifest.
    pub fn check_manifest(&self, manifest: &BackupManifest, length: u64) -> Result<(), String> {
        if self.manifest_bytes != length {
            return Err(format!(
                "it has {length} bytes instead of {}",
                self.manifest_bytes
            ));
        }
        if let Some(system) = manifest.system_identifier
            && system != self.system_identifier
        {
            return Err(format!(
                "it is of system {system}, the backup of system {}",
                self.system_identifier
            ));
        }
        let ranges = &manifest.wal_ranges;
        let start = ranges.iter().map(|range| range.start_lsn).min();
        let end = ranges.iter().map(|range| range.end_lsn).max();
        if let (Some(start), Some(end)) = (start, end)
            && (start, end) != (self.start_lsn, self.stop_lsn)
        {
            return Err(format!(
                "it needs the WAL from {start} to {end}, the backup was taken from {} to {}",
                self.start_lsn, self.stop_lsn
            ));
        }
        let continued = self.slices.iter().filter_map(|slice| {
            let file = slice.continues.as_ref()?;
            Some((slice.manifest_name(&file.path), file.size))
        });
        let mut unlisted: BTreeSet<(String, u64)> = continued.collect();
        for entry in &manifest.files {
            unlisted.remove(&(entry.path.clone(), entry.size));
        }
        match unlisted.first() {
            Some((name, size)) => Err(format!(
                "it has no file {name} of {size} bytes, which a slice continues"
            )),
            None => Ok(()),
        }
    }

    /// Compares the `backup_label` and the `tablespace_map` of the slices with this description.
    ///
    /// # Errors
    /// The contradiction, as a sentence that names the file.
    pub fn check_label(&self, label: &[u8], map: Option<&[u8]>) -> Result<(), String> {
        let parsed = BackupLabel::parse(label).map_err(|error| error.to_string())?;
        if (parsed.start_lsn, parsed.checkpoint_lsn) != (self.start_lsn, self.checkpoint_lsn) {
            return Err(format!(
                "backup_label starts at {} with the checkpoint at {}, the backup at {} with {}",
                parsed.start_lsn, parsed.checkpoint_lsn, self.start_lsn, self.checkpoint_lsn
            ));
        }
        if self.format_version < FORMAT_VERSION_WITH_LABEL {
            return Ok(());
        }
        let sum = |content: &[u8]| hex::encode(Sha256::digest(content));
        if self.backup_label_sha256 != Some(sum(label)) {
            return Err("the SHA-256 of backup_label is not the one that was recorded".to_owned());
        }
        if self.tablespace_map_sha256 != map.map(sum) {
            return Err(
                "the SHA-256 of tablespace_map is not the one that was recorded".to_owned(),
            );
        }
        let mapped = tablespace_map::parse(self.postgresql_major, map.unwrap_or_default());
        let mapped = mapped.map_err(|error| error.to_string())?;
        let outside = |location: &str| location.starts_with('/');
        let missing = self
            .tablespaces
            .iter()
            .find(|tablespace| outside(&tablespace.location) && !mapped.contains(tablespace));
        match missing {
            Some(tablespace) => Err(format!(
                "tablespace_map does not name tablespace {} at {}",
                tablespace.oid, tablespace.location
            )),
            None => Ok(()),
        }
    }
}
