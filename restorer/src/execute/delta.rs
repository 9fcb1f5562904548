//! `--delta`: keeps the files that an existing data directory already has. A file stays if its size
//! and SHA-256 match the manifest. Every other file is removed, and only slices that may contain a
//! missing file are fetched.
//!
//! No record says which slice contains a file, but the position is bounded. The manifest lists
//! files in the order of the tar streams. The bytes of a stream that are not files (directories,
//! padding at its end) are the stream's length minus the files' length.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    ffi::OsStr,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use rustix::fs::{FileType, Mode};
use wal_format::{
    BackupInfo, BackupManifest, BackupSlice, ManifestFile, layout::BackupArchive, tar::BLOCK_BYTES,
};

use super::{
    Access, MARKER,
    manifest::is_content_of,
    tree::{Tree, entries, kind, open_directory, remove_entry},
};
use crate::{Error, Result};

/// Directories that a server needs and that may be empty, so that the manifest names no file in
/// them.
const NEEDED: [&str; 14] = [
    "pg_commit_ts",
    "pg_dynshmem",
    "pg_logical",
    "pg_logical/mappings",
    "pg_logical/snapshots",
    "pg_notify",
    "pg_replslot",
    "pg_serial",
    "pg_snapshots",
    "pg_stat",
    "pg_stat_tmp",
    "pg_tblspc",
    "pg_twophase",
    "pg_wal",
];

/// The files that stay.
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// The names, as in the manifest.
    names: HashSet<String>,
    /// The total length of the files in bytes.
    pub(super) bytes: u64,
}

impl Kept {
    /// Pretends that every file except `wanted` exists already.
    pub(super) fn all_but(manifest: &BackupManifest, wanted: &BTreeSet<String>) -> Self {
        let names = manifest.files.iter().map(|file| file.path.clone());
        Self {
            names: names.filter(|name| !wanted.contains(name)).collect(),
            bytes: 0,
        }
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    pub(super) fn count(&self) -> usize {
        self.names.len()
    }

    /// Returns for each slice whether it has to be fetched, because it may contain a file that is
    /// not kept.
    pub(super) fn needs(&self, backup: &BackupInfo, manifest: &BackupManifest) -> Vec<bool> {
        if self.names.is_empty() {
            return vec![true; backup.slices.len()];
        }
        let mut needed = vec![false; backup.slices.len()];
        let mut archives: Vec<BackupArchive> =
            backup.slices.iter().map(|slice| slice.archive).collect();
        archives.dedup();
        for archive in archives {
            self.mark(backup, manifest, archive, &mut needed);
        }
        needed
    }

    fn mark(
        &self,
        backup: &BackupInfo,
        manifest: &BackupManifest,
        archive: BackupArchive,
        needed: &mut [bool],
    ) {
        let files: Vec<&ManifestFile> = manifest
            .files
            .iter()
            .filter(|entry| archive_of(backup, &entry.path) == archive)
            .collect();
        let block = BLOCK_BYTES as u64;
        let in_tar = |entry: &ManifestFile| entry.size.div_ceil(block).saturating_add(1) * block;
        let all: u64 = files.iter().map(|entry| in_tar(entry)).sum();
        let slices = || {
            let of_archive = |(_, slice): &(usize, &BackupSlice)| slice.archive == archive;
            backup.slices.iter().enumerate().filter(of_archive)
        };
        let length: u64 = slices().map(|(_, slice)| slice.raw_bytes).sum();
        let Some(others) = length.checked_sub(all) else {
            // The stream is shorter than its files, so the manifest is not in the order of the
            // stream.
            slices().for_each(|(index, _)| needed[index] = true);
            return;
        };
        // The earliest start and the latest end of each missing file in the stream.
        let mut missing = Vec::new();
        let mut from = 0;
        for entry in files {
            let to = from + in_tar(entry);
            if !self.has(&entry.path) {
                missing.push((from, to + others));
            }
            from = to;
        }
        let mut start = 0;
        for (index, slice) in slices() {
            let end = start + slice.raw_bytes;
            // The first slice contains the directory entry of the archive itself.
            needed[index] =
                slice.number == 1 || missing.iter().any(|(from, to)| *from < end && *to > start);
            start = end;
        }
    }
}

fn archive_of(backup: &BackupInfo, name: &str) -> BackupArchive {
    let oid = name
        .strip_prefix("pg_tblspc/")
        .and_then(|rest| rest.split('/').next())
        .and_then(|oid| oid.parse().ok());
    match oid {
        Some(oid) if backup.tablespaces.iter().any(|one| one.oid == oid) => {
            BackupArchive::Tablespace(oid)
        }
        _ => BackupArchive::Base,
    }
}

/// Removes everything from the directories that differs from the backup. Returns the files that
/// stay.
pub(super) fn sift(
    tree: &Tree,
    backup: &BackupInfo,
    manifest: &BackupManifest,
    access: Access,
    jobs: usize,
) -> Result<Kept> {
    let wanted: HashMap<&str, &ManifestFile> = manifest
        .files
        .iter()
        .map(|entry| (entry.path.as_str(), entry))
        .collect();
    let mut parents: HashSet<String> = NEEDED.iter().map(|name| (*name).to_owned()).collect();
    for name in wanted.keys() {
        parents.extend(name.match_indices('/').map(|(at, _)| name[..at].to_owned()));
    }
    let mut sieve = Sieve {
        tree,
        wanted: &wanted,
        parents: &parents,
        version_directory: format!("PG_{}_", backup.postgresql_major),
        directory_mode: access.directory_mode(),
        candidates: Vec::new(),
    };
    for root in tree.roots() {
        sieve.walk(&root.directory, &root.path, &root.prefix)?;
    }
    let candidates = sieve.candidates;
    for name in NEEDED {
        tree.create_directory(name)?;
    }
    compare(tree, &candidates, jobs)
}

struct Sieve<'a> {
    tree: &'a Tree,
    wanted: &'a HashMap<&'a str, &'a ManifestFile>,
    /// The directories of the backup's files, and their parents.
    parents: &'a HashSet<String>,
    /// The beginning of the name of the directory in which this version keeps the files of a
    /// tablespace (`TABLESPACE_VERSION_DIRECTORY` in `relpath.h`).
    version_directory: String,
    /// The mode of directories that stay.
    directory_mode: u32,
    /// Files whose name and size match.
    candidates: Vec<&'a ManifestFile>,
}

impl Sieve<'_> {
    /// Walks through a directory without following links. A link that does not lead to a directory
    /// of the restore is removed.
    fn walk(&mut self, directory: &OwnedFd, shown: &Path, prefix: &str) -> Result<()> {
        entries(directory, shown, &mut |file_name, metadata| {
            if prefix.is_empty() && file_name.to_bytes() == MARKER.as_bytes() {
                return Ok(());
            }
            let path = shown.join(OsStr::from_bytes(file_name.to_bytes()));
            let text = file_name.to_string_lossy();
            let name = if prefix.is_empty() {
                text.into_owned()
            } else {
                format!("{prefix}/{text}")
            };
            // `pg_wal` may be a link to a directory on another disk, as `initdb --waldir` creates
            // it.
            if name == "pg_wal" && self.tree.is_root(&name) {
                return Ok(());
            }
            // Files of another version or of other programs. PostgreSQL would not touch them
            // either.
            let in_tablespace = prefix.starts_with("pg_tblspc/") && self.tree.is_root(prefix);
            let foreign = in_tablespace
                && !file_name
                    .to_bytes()
                    .starts_with(self.version_directory.as_bytes());
            if foreign || name == "pg_wal/lost+found" {
                return Ok(());
            }
            if kind(&metadata) == FileType::Directory {
                let below =
                    open_directory(directory, file_name).map_err(Error::io("open", &path))?;
                self.walk(&below, &path, &name)?;
                if !self.parents.contains(&name) {
                    remove_entry(directory, file_name, true).map_err(Error::io("remove", &path))?;
                } else if metadata.st_mode & 0o7777 != self.directory_mode {
                    rustix::fs::fchmod(&below, Mode::from_raw_mode(self.directory_mode)).map_err(
                        |error| Error::io("set the permissions of", &path)(error.into()),
                    )?;
                }
                return Ok(());
            }
            // A file with a second hard link may also be a file of another cluster (`cp -al`): the
            // server would write into both.
            let is_own = kind(&metadata) == FileType::RegularFile && metadata.st_nlink == 1;
            let size = u64::try_from(metadata.st_size).unwrap_or(u64::MAX);
            let entry = self.wanted.get(name.as_str());
            match entry.filter(|entry| is_own && entry.size == size) {
                Some(entry) if file_name.to_str().is_ok() => self.candidates.push(entry),
                _ => {
                    remove_entry(directory, file_name, false)
                        .map_err(Error::io("remove", &path))?;
                }
            }
            Ok(())
        })
    }
}

/// Keeps the candidates whose SHA-256 matches the manifest, and removes the others.
fn compare(tree: &Tree, candidates: &[&ManifestFile], jobs: usize) -> Result<Kept> {
    let next = AtomicUsize::new(0);
    let outcome: Mutex<Result<Kept>> = Mutex::new(Ok(Kept::default()));
    let work = || {
        while let Some(entry) = candidates.get(next.fetch_add(1, Ordering::Relaxed)) {
            let done = is_content_of(entry, tree).and_then(|equal| {
                if !equal {
                    tree.remove(&entry.path)?;
                }
                Ok(equal)
            });
            let Ok(mut outcome) = outcome.lock() else {
                return;
            };
            match (outcome.as_mut(), done) {
                (Ok(kept), Ok(true)) => {
                    kept.bytes += entry.size;
                    kept.names.insert(entry.path.clone());
                }
                (Ok(_), Err(error)) => *outcome = Err(error),
                _ => {}
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(work);
        }
    });
    outcome
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
