//! `--delta`: keeps what an existing data directory already has. A file whose size and SHA-256 are the manifest's stays;
//! every other file goes, and only slices that may hold something missing are fetched.
//!
//! Which slice holds a file is not recorded, but bounded: the manifest lists files in the order of the tar streams, and
//! what a stream holds beside files (directories, padding at its end) is its length less theirs.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use wal_format::{
    BackupInfo, BackupManifest, BackupSlice, ManifestFile, layout::BackupArchive, tar::BLOCK_BYTES,
};

use super::{MARKER, manifest::is_content_of};
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

    /// Whether a slice has to be fetched: it may hold a file that is not kept.
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

/// Removes from the directories what the backup does not have as it is; what stays is told.
pub(super) fn sift(
    roots: &[(String, PathBuf)],
    manifest: &BackupManifest,
    jobs: usize,
) -> Result<Kept> {
    let wanted: HashMap<String, &ManifestFile> = manifest
        .files
        .iter()
        .map(|entry| (entry.path.clone(), entry))
        .collect();
    let mut parents: HashSet<String> = NEEDED.iter().map(|name| (*name).to_owned()).collect();
    for name in wanted.keys() {
        parents.extend(name.match_indices('/').map(|(at, _)| name[..at].to_owned()));
    }
    let mut sieve = Sieve {
        wanted: &wanted,
        parents: &parents,
        candidates: Vec::new(),
    };
    for (prefix, root) in roots {
        sieve.walk(root, prefix)?;
    }
    for name in NEEDED {
        for (_, root) in roots.iter().filter(|(prefix, _)| prefix.is_empty()) {
            let path = root.join(name);
            fs::create_dir_all(&path).map_err(Error::io("create directory", path))?;
        }
    }
    compare(&sieve.candidates, &wanted, jobs)
}

struct Sieve<'a> {
    wanted: &'a HashMap<String, &'a ManifestFile>,
    /// Directories that something of the backup lies in.
    parents: &'a HashSet<String>,
    /// Files of the right name and size.
    candidates: Vec<(String, PathBuf)>,
}

impl Sieve<'_> {
    fn walk(&mut self, directory: &Path, prefix: &str) -> Result<()> {
        for entry in fs::read_dir(directory).map_err(Error::io("list", directory))? {
            let entry = entry.map_err(Error::io("list", directory))?;
            let (path, file_name) = (entry.path(), entry.file_name());
            if prefix.is_empty() && file_name == MARKER {
                continue;
            }
            let name = format!("{prefix}{}", file_name.to_string_lossy());
            let metadata = fs::symlink_metadata(&path).map_err(Error::io("look at", &path))?;
            // The WAL's directory may lie on another disk behind a link, as `initdb --waldir` makes it.
            let wal_elsewhere = name == "pg_wal" && path.is_dir();
            if metadata.is_dir() || wal_elsewhere {
                self.walk(&path, &format!("{name}/"))?;
                if !self.parents.contains(&name) && !metadata.is_symlink() {
                    fs::remove_dir(&path).map_err(Error::io("remove", &path))?;
                }
                continue;
            }
            let same_size =
                |entry: &&ManifestFile| metadata.is_file() && entry.size == metadata.len();
            if self.wanted.get(&name).is_some_and(same_size) {
                self.candidates.push((name, path));
            } else {
                fs::remove_file(&path).map_err(Error::io("remove", &path))?;
            }
        }
        Ok(())
    }
}

/// Keeps the candidates whose SHA-256 is the manifest's, and removes the others.
fn compare(
    candidates: &[(String, PathBuf)],
    wanted: &HashMap<String, &ManifestFile>,
    jobs: usize,
) -> Result<Kept> {
    let next = AtomicUsize::new(0);
    let outcome: Mutex<Result<Kept>> = Mutex::new(Ok(Kept::default()));
    let work = || {
        while let Some((name, path)) = candidates.get(next.fetch_add(1, Ordering::Relaxed)) {
            let entry = wanted.get(name);
            let equal = entry.map_or(Ok(false), |entry| is_content_of(entry, path));
            let done = equal.and_then(|equal| {
                if !equal {
                    fs::remove_file(path).map_err(Error::io("remove", path))?;
                }
                Ok(equal)
            });
            let Ok(mut outcome) = outcome.lock() else {
                return;
            };
            match (outcome.as_mut(), done) {
                (Ok(kept), Ok(true)) => {
                    kept.bytes += entry.map_or(0, |entry| entry.size);
                    kept.names.insert(name.clone());
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
