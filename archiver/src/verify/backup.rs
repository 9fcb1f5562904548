//! The part of `verify` that looks into a backup: each object is the recorded one, and belongs to
//! this backup.

use std::collections::HashMap;

use sha2::{Digest, Sha256};
use wal_format::{
    BackupInfo, BackupManifest, BackupSlice, ObjectKey, SliceError, SlicePart,
    layout::BackupArchive,
};

use super::repair;

/// The check of one backup, object by object.
pub(super) struct BackupCheck<'a> {
    info: &'a BackupInfo,
    /// The size of each file that the manifest lists; `None` while the manifest cannot be read.
    listed: Option<HashMap<String, u64>>,
    label: Vec<u8>,
    map: Option<Vec<u8>>,
}

/// The reason why the walk through a slice ended: its own damage, or a part that does not belong
/// there.
struct Unfit(String);

impl From<SliceError> for Unfit {
    fn from(error: SliceError) -> Self {
        Self(error.to_string())
    }
}

impl<'a> BackupCheck<'a> {
    pub(super) fn new(info: &'a BackupInfo) -> Self {
        Self {
            info,
            listed: None,
            label: Vec::new(),
            map: None,
        }
    }

    /// The objects of the backup with their SHA-256, in the order in which [`BackupCheck::problem`]
    /// has to see them.
    pub(super) fn parts(&self) -> Vec<(ObjectKey, String)> {
        let mut parts = repair::parts(self.info);
        // The manifest, which is last, says what the slices may hold.
        parts.rotate_right(1);
        parts
    }

    /// Returns the problem with the object `key`, whose bytes are `body`.
    pub(super) fn problem(&mut self, key: &ObjectKey, sha256: &str, body: &[u8]) -> Option<String> {
        let found = hex::encode(Sha256::digest(body));
        if found != sha256 {
            return Some(format!("it is damaged: SHA-256 {found}, recorded {sha256}"));
        }
        let outcome = match key {
            ObjectKey::BackupManifest(..) => self.manifest(body),
            ObjectKey::BackupSlice(_, _, archive, number) => {
                let mut slices = self.info.slices.iter();
                let slice = slices.find(|one| one.archive == *archive && one.number == *number);
                slice.map_or(Ok(()), |slice| self.slice(slice, body))
            }
            _ => Ok(()),
        };
        outcome.err()
    }

    fn manifest(&mut self, body: &[u8]) -> Result<(), String> {
        let manifest = BackupManifest::parse(body).map_err(|error| error.to_string())?;
        self.info.check_manifest(&manifest, body.len() as u64)?;
        let files = manifest.files.into_iter();
        self.listed = Some(files.map(|file| (file.path, file.size)).collect());
        Ok(())
    }

    fn slice(&mut self, slice: &BackupSlice, body: &[u8]) -> Result<(), String> {
        let raw = slice.open(body).map_err(|error| error.to_string())?;
        let in_base = slice.archive == BackupArchive::Base;
        let mut label_ended = false;
        let walk = slice.for_each_part(&raw, &mut |part| {
            let SlicePart::File {
                path,
                size,
                content,
                ..
            } = part
            else {
                return Ok(());
            };
            match path.as_str() {
                "backup_label" if in_base => self.label.extend_from_slice(content),
                "tablespace_map" if in_base => {
                    self.map.get_or_insert_default().extend_from_slice(content);
                }
                _ => label_ended = true,
            }
            let name = slice.manifest_name(&path);
            let listed = self.listed.as_ref().map(|listed| listed.get(&name));
            match listed {
                Some(Some(listed)) if *listed != size => Err(Unfit(format!(
                    "it holds {name} of {size} bytes, backup_manifest lists {listed}"
                ))),
                Some(None) => Err(Unfit(format!(
                    "it holds a file {name:?} that backup_manifest does not list"
                ))),
                _ => Ok(()),
            }
        });
        walk.map_err(|Unfit(problem)| problem)?;
        if in_base && slice.number == 1 && label_ended {
            self.info.check_label(&self.label, self.map.as_deref())?;
        }
        Ok(())
    }
}
