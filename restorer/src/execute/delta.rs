//! `--delta`: keeps what an existing data directory already has. A file whose size and SHA-256 are the manifest's stays;
//! every other file goes, and only slices that may hold something missing are fetched.
//!
//! Which slice holds a file is not recorded, but bounded: the manifest lists files in the order of the tar streams, and
//! what a stream holds beside files (directories, padding at its end) is its length less theirs.

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

/// Directories that a server needs and that may be empty, so that no file of the manifest names them.
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

/// What stays.
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// Names as in the manifest.
    names: HashSet<String>,
    /// Their length.
    pub(super) bytes: u64,
}

impl Kept {
    /// As if everything but `wanted` were there already.
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

    /// Returns true if a slice has to be fetched: it may hold a file that is not kept.
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
            // The stream is shorter than its files: the manifest is not in its order.
            slices().for_each(|(index, _)| needed[index] = true);
            return;
        };
        // Where each missing file lies at the earliest, and where it ends at the latest.
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
            // The first holds the archive's own directory.
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

/// Removes from the directories what the backup does not have as it is. Returns what stays.
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
    /// Directories that something of the backup lies in.
    parents: &'a HashSet<String>,
    /// How the directory begins in which this version keeps the files of a tablespace
    /// (`TABLESPACE_VERSION_DIRECTORY` in `relpath.h`).
    version_directory: String,
    /// The permissions of directories that stay.
    directory_mode: u32,
    /// Files of the right name and size.
    candidates: Vec<&'a ManifestFile>,
}

impl Sieve<'_> {
    /// Walks through a directory. No link is followed: one that is not a directory of the restore goes.
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
            // The WAL's directory may be on another disk, behind a link, as `initdb --waldir` makes it.
            if name == "pg_wal" && self.tree.is_root(&name) {
                return Ok(());
            }
            // Another version's files, or somebody else's: PostgreSQL would not touch them either.
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
            // A file with a second name may be another cluster's too (`cp -al`): the server would write into both.
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

/// Keeps the candidates whose SHA-256 is the manifest's, and removes the others.
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
