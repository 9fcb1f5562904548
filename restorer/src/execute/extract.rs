//! Extracts one slice of a backup. A slice may begin inside a file; it says in which and where.

use std::{
    fs,
    io::Read,
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::Path,
    sync::Mutex,
};

use bytes::Bytes;
use repository::Repository;
use sha2::{Digest, Sha256};
use wal_format::{
    BackupInfo, BackupSlice,
    layout::BackupArchive,
    tar::{BLOCK_BYTES, TarError, TarHeader, TarKind},
};

use super::delta::Kept;
use crate::{Error, Result};

/// Without it no server starts; it is written last.
const CONTROL: &str = "global/pg_control";

/// How much is written at once. Linux keeps in its page cache what one `write` brought as one folio, and ext4 walks the
/// buffers of a whole folio at every later write into it (`ext4_block_write_begin`; seen with 6.18): where a slice was
/// written at once, each page of 8 KiB that PostgreSQL wrote during the recovery took as long as a hundred, and the slice
/// itself took five times as long.
const WRITE_BYTES: usize = 32 << 10;

/// What a slice holds, in its order.
pub(super) enum Part<'a> {
    Directory(String),
    /// A file, or from `offset` on as much of it as the slice has.
    File {
        path: String,
        offset: u64,
        mode: u32,
        content: &'a [u8],
    },
}

/// Fetches, checks and extracts `slice` below `root`, but for what is kept; `pg_control`'s content goes to `control`.
pub(super) fn extract(
    repository: &Repository,
    backup: &BackupInfo,
    slice: &BackupSlice,
    root: &Path,
    kept: &Kept,
    control: &Mutex<Vec<u8>>,
) -> Result<()> {
    let raw = fetch(repository, backup, slice)?;
    parts(backup, slice, &raw, &mut |part| match part {
        Part::Directory(path) => make_directory(&root.join(path)),
        Part::File { path, content, .. }
            if slice.archive == BackupArchive::Base && path == CONTROL =>
        {
            if let Ok(mut control) = control.lock() {
                control.extend_from_slice(content);
            }
            Ok(())
        }
        Part::File { path, .. } if kept.has(&manifest_name(slice, &path)) => Ok(()),
        Part::File {
            path,
            offset,
            mode,
            content,
        } => write_at(root, &path, content, offset, mode),
    })
}

/// How `backup_manifest` names a file of the slice's archive.
pub(super) fn manifest_name(slice: &BackupSlice, path: &str) -> String {
    match slice.archive {
        BackupArchive::Base => path.to_owned(),
        BackupArchive::Tablespace(oid) => format!("pg_tblspc/{oid}/{path}"),
    }
}

/// The tar stream of a slice, if it is what was stored.
pub(super) fn fetch(
    repository: &Repository,
    backup: &BackupInfo,
    slice: &BackupSlice,
) -> Result<Vec<u8>> {
    let damaged = |problem: String| damaged(backup, slice, problem);
    let sound = |stored: &Bytes| hex::encode(Sha256::digest(stored)) == slice.sha256;
    let stored = repository.get_sound(&backup.slice_key(slice), &sound)?;
    if !sound(&stored) {
        return Err(damaged(
            "its SHA-256 is not the one that was recorded".to_owned(),
        ));
    }
    let length = usize::try_from(slice.raw_bytes).unwrap_or(usize::MAX);
    let mut raw = Vec::with_capacity(length.min(64 << 20));
    // One byte more than announced would show that it is not what was stored.
    zstd::Decoder::new(&stored[..])
        .and_then(|decoder| {
            decoder
                .take(slice.raw_bytes.saturating_add(1))
                .read_to_end(&mut raw)
        })
        .map_err(|error| damaged(error.to_string()))?;
    if raw.len() != length {
        return Err(damaged(format!(
            "it holds {} bytes instead of {length}",
            raw.len()
        )));
    }
    Ok(raw)
}

/// Tells `each` of everything in a slice.
pub(super) fn parts(
    backup: &BackupInfo,
    slice: &BackupSlice,
    raw: &[u8],
    each: &mut dyn FnMut(Part<'_>) -> Result<()>,
) -> Result<()> {
    let mut rest = raw;
    if let Some(file) = &slice.continues {
        let left = file.size.saturating_sub(file.offset);
        each(Part::File {
            path: file.path.clone(),
            offset: file.offset,
            mode: 0o600,
            content: take(&mut rest, left, true),
        })?;
    }
    let tar = |error: TarError| damaged(backup, slice, error.to_string());
    while let Some((block, after)) = rest.split_first_chunk::<BLOCK_BYTES>() {
        rest = after;
        let Some(entry) = TarHeader::parse(block).map_err(tar)? else {
            continue;
        };
        match entry.kind {
            TarKind::Directory => each(Part::Directory(entry.path))?,
            // A link leads to where a tablespace was; where it shall be is decided by the plan.
            TarKind::Symlink(_) => {}
            TarKind::File => each(Part::File {
                path: entry.path,
                offset: 0,
                mode: entry.mode,
                content: take(&mut rest, entry.size, true),
            })?,
        }
    }
    Ok(())
}

fn damaged(backup: &BackupInfo, slice: &BackupSlice, problem: String) -> Error {
    Error::Damaged {
        object: backup.slice_key(slice).to_string(),
        problem,
    }
}

/// As much of `length` bytes as the slice has, and skips the padding behind them.
fn take<'a>(rest: &mut &'a [u8], length: u64, padded: bool) -> &'a [u8] {
    let wanted = usize::try_from(length).unwrap_or(usize::MAX);
    let (content, after) = rest.split_at(wanted.min(rest.len()));
    let padding = if padded {
        wanted.next_multiple_of(BLOCK_BYTES) - wanted
    } else {
        0
    };
    *rest = after.get(padding..).unwrap_or_default();
    content
}

fn make_directory(path: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(Error::io("create directory", path))
}

/// Writes a part of a file. Other parts may be written by other threads at the same time.
fn write_at(root: &Path, name: &str, content: &[u8], offset: u64, mode: u32) -> Result<()> {
    let path = root.join(name);
    if let Some(parent) = path.parent() {
        make_directory(parent)?;
    }
    let file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(mode & 0o700 | 0o600)
        .open(&path)
        .map_err(Error::io("create", &path))?;
    let pieces = content.chunks(WRITE_BYTES);
    for (piece, at) in pieces.zip((offset..).step_by(WRITE_BYTES)) {
        file.write_all_at(piece, at)
            .map_err(Error::io("write", &path))?;
    }
    Ok(())
}
