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

use serde::Deserialize;
use sha2::{Digest, Sha256};
use wal_format::BackupInfo;

use super::delta::Kept;
use crate::{Error, Result};

/// A `backup_manifest`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Manifest {
    /// In the order of the tar streams.
    pub(super) files: Vec<Entry>,
}

impl Manifest {
    /// Reads the manifest of `backup`, if it is the one that was recorded.
    pub(crate) fn parse(json: &[u8], backup: &BackupInfo) -> Result<Self> {
        let damaged = |problem: String| Error::Damaged {
            object: backup.manifest_key().to_string(),
            problem,
        };
        if hex::encode(Sha256::digest(json)) != backup.manifest_sha256 {
            return Err(damaged(
                "its SHA-256 is not the one that was recorded".to_owned(),
            ));
        }
        serde_json::from_slice(json).map_err(|error| damaged(error.to_string()))
    }

    /// The paths of all files.
    pub(crate) fn into_names(self) -> Vec<String> {
        self.files.iter().map(Entry::name).collect()
    }
}

/// A file of a `backup_manifest`.
#[derive(Deserialize)]
pub(crate) struct Entry {
    #[serde(rename = "Path")]
    path: Option<String>,
    #[serde(rename = "Encoded-Path")]
    encoded_path: Option<String>,
    #[serde(rename = "Size")]
    pub(super) size: u64,
    #[serde(rename = "Checksum-Algorithm")]
    algorithm: Option<String>,
    #[serde(rename = "Checksum")]
    checksum: Option<String>,
}

impl Entry {
    /// Its path in the data directory.
    pub(super) fn name(&self) -> String {
        match (&self.path, &self.encoded_path) {
            (Some(path), _) => path.clone(),
            (None, Some(hexadecimal)) => hex::decode(hexadecimal)
                .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
                .unwrap_or_default(),
            (None, None) => String::new(),
        }
    }

    /// Whether a file is what the manifest says. Another algorithm than SHA-256 proves nothing.
    pub(super) fn is_content_of(&self, path: &Path) -> Result<bool> {
        let (Some("SHA256"), Some(expected)) = (self.algorithm.as_deref(), &self.checksum) else {
            return Ok(false);
        };
        let mut sum = Sha256::new();
        let size = read(path, &mut sum)?;
        Ok(size == self.size && *expected == hex::encode(sum.finalize()))
    }
}

/// Adds a file's content to a sum; its length.
fn read(path: &Path, sum: &mut Sha256) -> Result<u64> {
    let mut file = File::open(path).map_err(Error::io("open", path))?;
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

/// Compares size and SHA-256 of every file that the manifest names, but for those that were compared to be kept.
/// `control` stands for `pg_control`, which is not written yet.
pub(super) fn verify(
    directory: &Path,
    manifest: &Manifest,
    kept: &Kept,
    control: &[u8],
    jobs: usize,
) -> Result<()> {
    let next = AtomicUsize::new(0);
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    let work = || {
        while let Some(entry) = manifest.files.get(next.fetch_add(1, Ordering::Relaxed)) {
            if kept.has(&entry.name()) {
                continue;
            }
            if let Err(error) = check(directory, entry, control) {
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

fn check(directory: &Path, entry: &Entry, control: &[u8]) -> Result<()> {
    let name = entry.name();
    // It is consumed when the links are made from the plan instead.
    if name == "tablespace_map" {
        return Ok(());
    }
    let path = directory.join(&name);
    let damaged = |problem: String| Error::Damaged {
        object: path.display().to_string(),
        problem,
    };
    let mut sum = Sha256::new();
    let size = if name == "global/pg_control" {
        sum.update(control);
        control.len() as u64
    } else {
        read(&path, &mut sum)?
    };
    if size != entry.size {
        return Err(damaged(format!(
            "it has {size} bytes, the manifest says {}",
            entry.size
        )));
    }
    match (entry.algorithm.as_deref(), &entry.checksum) {
        (Some("SHA256"), Some(expected)) if *expected != hex::encode(sum.finalize()) => {
            Err(damaged("its SHA-256 is not the manifest's".to_owned()))
        }
        _ => Ok(()),
    }
}
