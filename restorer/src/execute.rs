//! Applies a plan: extracts the backup, verifies every file, writes the recovery settings, and only then `pg_control`.
//!
//! Invariant: PostgreSQL can not start on a half-made copy. A marker is written first and removed last, and `pg_control`,
//! without which no server starts, is written when everything else is on disk.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use repository::{Repository, durable};
use wal_format::{BackupInfo, layout::BackupArchive};

use crate::{Error, RestorePlan, Result, inventory::Archive};

mod extract;
mod manifest;
mod place;
mod settings;

pub(crate) use manifest::Manifest;
use place::{place_tablespaces, take};
pub use settings::{Action, Recovery};

/// Present while a restore is not complete.
pub const MARKER: &str = "RESTORE_INCOMPLETE";
/// The plan, for `wal-fetch`.
pub const PLAN_FILE: &str = "tidemark_plan.json";

/// Where and how.
#[derive(Clone, Debug)]
pub struct Destination {
    /// The data directory.
    pub directory: PathBuf,
    /// Old tablespace location to new one.
    pub tablespaces: BTreeMap<PathBuf, PathBuf>,
    /// Threads that extract.
    pub jobs: usize,
    /// The settings.
    pub recovery: Recovery,
}

/// Restores into `destination` by `plan`. `progress` is told of each slice's raw bytes.
///
/// # Errors
/// [`Error::Usage`] for a destination that is not empty; [`Error::Damaged`] names what is not what was stored.
pub fn execute(
    archive: &Archive,
    plan: &RestorePlan,
    destination: &Destination,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<()> {
    let backup = backup_of(archive, plan)?;
    let directory = &destination.directory;
    let tablespaces = place_tablespaces(&backup, &destination.tablespaces, directory)?;
    take(directory, &backup, &tablespaces)?;
    let control = extract_all(
        &archive.repository,
        &backup,
        destination,
        &tablespaces,
        progress,
    )?;
    link_tablespaces(directory, &tablespaces)?;
    let key = backup.manifest_key();
    let manifest = archive.repository.get(&key)?;
    manifest::verify(directory, &manifest, &backup, &control, destination.jobs)?;
    settings::write(archive, plan, destination)?;
    for directory in tablespaces.values().chain([directory]) {
        sync_file_system(directory)?;
    }
    // From here on a server could start; everything it needs is on disk.
    durable::replace(&directory.join("global/pg_control"), &control).map_err(Error::local)?;
    durable::remove(&directory.join(MARKER)).map_err(Error::local)?;
    Ok(())
}

fn backup_of(archive: &Archive, plan: &RestorePlan) -> Result<BackupInfo> {
    let backups = archive.catalog.backups()?;
    backups
        .into_iter()
        .find(|backup| backup.id == plan.backup)
        .ok_or_else(|| {
            Error::usage(format!(
                "backup {} is no longer archived; plan again",
                plan.backup
            ))
        })
}

/// Extracts every slice; the content of `pg_control` is given back instead of written.
fn extract_all(
    repository: &Repository,
    backup: &BackupInfo,
    destination: &Destination,
    tablespaces: &BTreeMap<u32, PathBuf>,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Vec<u8>> {
    let next = AtomicUsize::new(0);
    let control = Mutex::new(Vec::new());
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    let work = || {
        while let Some(slice) = backup.slices.get(next.fetch_add(1, Ordering::Relaxed)) {
            let root = match slice.archive {
                BackupArchive::Base => destination.directory.clone(),
                BackupArchive::Tablespace(oid) => tablespaces
                    .get(&oid)
                    .cloned()
                    .unwrap_or_else(|| destination.directory.join(format!("pg_tblspc/{oid}"))),
            };
            let done = extract::extract(repository, backup, slice, &root, &control);
            match done {
                Ok(()) => progress(slice.raw_bytes),
                Err(error) => {
                    next.store(usize::MAX / 2, Ordering::Relaxed);
                    if let Ok(mut failure) = failure.lock() {
                        failure.get_or_insert(error);
                    }
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..destination.jobs.max(1) {
            scope.spawn(work);
        }
    });
    if let Some(error) = failure
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
    {
        return Err(error);
    }
    let control = control
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    if control.is_empty() {
        return Err(Error::Damaged {
            object: format!("backup {}", backup.id),
            problem: "it holds no global/pg_control".to_owned(),
        });
    }
    Ok(control)
}

fn link_tablespaces(directory: &Path, tablespaces: &BTreeMap<u32, PathBuf>) -> Result<()> {
    for (oid, location) in tablespaces {
        let link = directory.join(format!("pg_tblspc/{oid}"));
        match fs::remove_file(&link) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("replace", &link)(error));
            }
            _ => {}
        }
        std::os::unix::fs::symlink(location, &link).map_err(Error::io("link", &link))?;
    }
    // With it the server would make the links of the origin again (`read_tablespace_map` in `xlogrecovery.c`).
    match fs::remove_file(directory.join("tablespace_map")) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io("remove", directory.join("tablespace_map"))(error))
        }
        _ => Ok(()),
    }
}

fn sync_file_system(directory: &Path) -> Result<()> {
    let file = fs::File::open(directory).map_err(Error::io("open", directory))?;
    rustix::fs::syncfs(&file).map_err(|error| Error::io("fsync", directory)(error.into()))
}
