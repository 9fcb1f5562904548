//! Extracts one slice of a backup. A slice may begin inside a file; its description names the file
//! and the offset.

use std::{
    collections::{BTreeMap, HashMap},
    os::unix::fs::FileExt,
    sync::{Mutex, PoisonError},
};

use bytes::Bytes;
use repository::Repository;
use wal_format::{
    BackupInfo, BackupManifest, BackupSlice, SliceError, SlicePart,
    control_file::CONTROL_FILE_BYTES, layout::BackupArchive,
};

use super::{CONTROL, delta::Kept, tree::Tree};
use crate::{Error, Result};

/// The number of bytes of one `write`. Linux keeps the pages of one `write` in its page cache as
/// one folio, and ext4 walks the buffers of the whole folio at every later write into it
/// (`ext4_block_write_begin`; seen with 6.18). When a slice was written in one call, each page of 8
/// KiB that PostgreSQL wrote during recovery took as long as a hundred pages, and writing the slice
/// took five times as long.
const WRITE_BYTES: usize = 32 << 10;

/// The size of each file that `backup_manifest` lists. A restore writes no other file and no byte
/// beyond such a size.
pub(super) struct Listed<'a>(HashMap<&'a str, u64>);

impl<'a> Listed<'a> {
    pub(super) fn of(manifest: &'a BackupManifest) -> Self {
        let files = manifest.files.iter();
        Self(files.map(|file| (file.path.as_str(), file.size)).collect())
    }

    /// Refuses a part that the manifest does not allow.
    fn check(&self, name: &str, size: u64, end: u64) -> std::result::Result<(), String> {
        match self.0.get(name) {
            Some(listed) if *listed == size && end <= size => Ok(()),
            Some(listed) => Err(format!(
                "it holds {name} of {size} bytes up to byte {end}; backup_manifest lists {listed} bytes"
            )),
            None => Err(format!(
                "it holds a file {name:?} that backup_manifest does not list"
            )),
        }
    }
}

/// Fetches, checks and extracts `slice`, except the kept files. Passes the content of `pg_control`
/// to `control`.
pub(super) fn extract(
    repository: &Repository,
    backup: &BackupInfo,
    slice: &BackupSlice,
    (tree, kept, listed): (&Tree, &Kept, &Listed<'_>),
    control: &Control,
) -> Result<()> {
    let raw = fetch(repository, backup, slice)?;
    for_each_part(backup, slice, &raw, &mut |part| match part {
        // This is the root of an archive. An in-place tablespace needs it as a directory.
        SlicePart::Directory(path) if path.is_empty() => match slice.archive {
            BackupArchive::Base => Ok(()),
            BackupArchive::Tablespace(oid) => tree.create_directory(&format!("pg_tblspc/{oid}")),
        },
        SlicePart::Directory(path) => tree.create_directory(&slice.manifest_name(&path)),
        // The link leads to the tablespace's old location. The plan decides on the new one.
        SlicePart::Link(_) => Ok(()),
        SlicePart::File {
            path,
            offset,
            size,
            mode,
            content,
        } => {
            let name = slice.manifest_name(&path);
            let end = offset.saturating_add(content.len() as u64);
            listed
                .check(&name, size, end)
                .map_err(|problem| damaged(backup, slice, problem))?;
            if slice.archive == BackupArchive::Base && path == CONTROL {
                return control
                    .keep(offset, content)
                    .map_err(|problem| damaged(backup, slice, problem));
            }
            if kept.has(&name) {
                return Ok(());
            }
            write_at(tree, &name, content, offset, mode)
        }
    })
}

/// The content of `pg_control`, which is written last. Two threads may deliver its parts, from two
/// slices.
#[derive(Debug, Default)]
pub(super) struct Control(Mutex<BTreeMap<u64, Vec<u8>>>);

impl Control {
    fn keep(&self, offset: u64, content: &[u8]) -> std::result::Result<(), String> {
        let end = offset.saturating_add(content.len() as u64);
        if end > CONTROL_FILE_BYTES as u64 {
            return Err(format!(
                "{CONTROL} is longer than {CONTROL_FILE_BYTES} bytes"
            ));
        }
        let mut parts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        parts.insert(offset, content.to_owned());
        Ok(())
    }

    /// Returns the whole file; empty if no part was delivered.
    pub(super) fn into_content(self) -> Vec<u8> {
        let parts = self.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        parts.into_values().flatten().collect()
    }
}

/// Returns the tar stream of a slice after checking that it equals what was stored.
pub(super) fn fetch(
    repository: &Repository,
    backup: &BackupInfo,
    slice: &BackupSlice,
) -> Result<Vec<u8>> {
    let sound = |stored: &Bytes| slice.is_stored_as(stored);
    let stored = repository.get_sound(&backup.slice_key(slice), &sound)?;
    slice
        .open(&stored)
        .map_err(|error| damaged(backup, slice, error.to_string()))
}

/// Calls `each` with every part of a slice.
pub(super) fn for_each_part(
    backup: &BackupInfo,
    slice: &BackupSlice,
    raw: &[u8],
    each: &mut dyn FnMut(SlicePart<'_>) -> Result<()>,
) -> Result<()> {
    let outcome = slice.for_each_part(raw, &mut |part| each(part).map_err(Failure::Other));
    outcome.map_err(|failure| match failure {
        Failure::Slice(error) => damaged(backup, slice, error.to_string()),
        Failure::Other(error) => error,
    })
}

/// The reason why the walk through a slice ended.
enum Failure {
    Slice(SliceError),
    Other(Error),
}

impl From<SliceError> for Failure {
    fn from(error: SliceError) -> Self {
        Self::Slice(error)
    }
}

pub(super) fn damaged(backup: &BackupInfo, slice: &BackupSlice, problem: String) -> Error {
    Error::Damaged {
        object: backup.slice_key(slice).to_string(),
        problem,
    }
}

/// Writes a part of a file. Other threads may write other parts at the same time.
fn write_at(tree: &Tree, name: &str, content: &[u8], offset: u64, mode: u32) -> Result<()> {
    let file = tree.create(name, mode)?;
    let pieces = content.chunks(WRITE_BYTES);
    for (piece, at) in pieces.zip((offset..).step_by(WRITE_BYTES)) {
        file.write_all_at(piece, at)
            .map_err(Error::io("write", tree.shown(name)))?;
    }
    Ok(())
}
