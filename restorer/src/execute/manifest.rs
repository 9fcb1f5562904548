//! Checks every restored file against PostgreSQL's own `backup_manifest`.

use std::{
    fs::File,
    io::Read,
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use sha2::{Digest, Sha256};
use wal_format::{BackupInfo, BackupManifest, ManifestFile};

use super::{CONTROL, delta::Kept, tree::Tree};
use crate::{Error, Result};

/// Parses the manifest of `backup` after checking that it is the recorded one.
pub(crate) fn read_manifest(content: &[u8], backup: &BackupInfo) -> Result<BackupManifest> {
    let damaged = |problem: String| Error::Damaged {
        object: backup.manifest_key().to_string(),
        problem,
    };
    if hex::encode(Sha256::digest(content)) != backup.manifest_sha256 {
        return Err(damaged(
            "its SHA-256 is not the one that was recorded".to_owned(),
        ));
    }
    let manifest = BackupManifest::parse(content).map_err(|error| damaged(error.to_string()))?;
    let checked = backup.check_manifest(&manifest, content.len() as u64);
    checked.map_err(damaged)?;
    Ok(manifest)
}

/// Returns true if a file matches its entry in the manifest. False if the entry has no SHA-256:
/// other algorithms prove nothing.
pub(super) fn is_content_of(entry: &ManifestFile, tree: &Tree) -> Result<bool> {
    let Some(expected) = entry.sha256() else {
        return Ok(false);
    };
    let mut sum = Sha256::new();
    let shown = tree.shown(&entry.path);
    let size = read(tree.read(&entry.path)?, &shown, entry.size, &mut sum)?;
    Ok(size == entry.size && expected == hex::encode(sum.finalize()))
}

/// Adds a file's content to a sum and returns its length. A file whose length is not `expected` is
/// not read.
fn read(mut file: File, path: &Path, expected: u64, sum: &mut Sha256) -> Result<u64> {
    let length = file.metadata().map_err(Error::io("look at", path))?.len();
    if length != expected {
        return Ok(length);
    }
    let mut buffer = vec![0; 256 << 10];
    let mut size = 0;
    loop {
        let read = file.read(&mut buffer).map_err(Error::io("read", path))?;
        if read == 0 {
            return Ok(size);
        }
        sum.update(&buffer[..read]);
        size += read as u64;
    }
}

/// Compares size and SHA-256 of every file in the manifest, except the kept files, which were
/// compared before. `control` is the content of `pg_control`, which is not written yet.
pub(super) fn verify(
    tree: &Tree,
    manifest: &BackupManifest,
    kept: &Kept,
    control: &[u8],
    jobs: usize,
) -> Result<()> {
    let next = AtomicUsize::new(0);
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    let work = || {
        while let Some(entry) = manifest.files.get(next.fetch_add(1, Ordering::Relaxed)) {
            if kept.has(&entry.path) {
                continue;
            }
            if let Err(error) = check(tree, entry, control) {
                next.store(usize::MAX / 2, Ordering::Relaxed);
                if let Ok(mut failure) = failure.lock() {
                    failure.get_or_insert(error);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(work);
        }
    });
    match failure
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
    {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

fn check(tree: &Tree, entry: &ManifestFile, control: &[u8]) -> Result<()> {
    let name = entry.path.as_str();
    // This file is removed when the links are created from the plan.
    if name == "tablespace_map" {
        return Ok(());
    }
    let path = tree.shown(name);
    let damaged = |problem: String| Error::Damaged {
        object: path.display().to_string(),
        problem,
    };
    let mut sum = Sha256::new();
    let size = if name == CONTROL {
        sum.update(control);
        control.len() as u64
    } else {
        read(tree.read(name)?, &path, entry.size, &mut sum)?
    };
    if size != entry.size {
        return Err(damaged(format!(
            "it has {size} bytes, the manifest says {}",
            entry.size
        )));
    }
    match entry.sha256() {
        Some(expected) if expected != hex::encode(sum.finalize()) => {
            Err(damaged("its SHA-256 is not the manifest's".to_owned()))
        }
        _ => Ok(()),
    }
}
