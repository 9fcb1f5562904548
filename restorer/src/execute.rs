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
use wal_format::{BackupInfo, BackupSlice, layout::BackupArchive};

use crate::{Error, RestorePlan, Result, inventory::Archive};

mod delta;
mod extract;
mod files;
mod manifest;
mod place;
mod settings;

use delta::Kept;
pub(crate) use files::files;
pub(crate) use manifest::read_manifest;
use place::{Taken, place_tablespaces, take};
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
    /// Keep what an existing data directory has and the backup has too.
    pub delta: bool,
    /// Threads that extract.
    pub jobs: usize,
    /// The settings.
    pub recovery: Recovery,
}

/// What an execution did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Executed {
    /// Files that were there already, as they are in the backup.
    pub kept_files: usize,
    /// Their length.
    pub kept_bytes: u64,
    /// Slices that were fetched.
    pub fetched_slices: usize,
    /// Slices of the backup.
    pub slices: usize,
    /// Whether configuration files were made, because the backup has none.
    pub made_configuration: bool,
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
) -> Result<Executed> {
    let backup = backup_of(archive, plan)?;
    let directory = &destination.directory;
    let jobs = destination.jobs;
    let tablespaces = place_tablespaces(&backup, &destination.tablespaces, directory)?;
    let manifest = archive.manifest(&backup)?;
    let kept = match take(directory, &backup, &tablespaces, destination.delta)? {
        Taken::Empty => Kept::default(),
        Taken::AsItIs => delta::sift(&roots(directory, &tablespaces), &manifest, jobs)?,
    };
    let work = Extraction {
        repository: &archive.repository,
        backup: &backup,
        needed: kept.needs(&backup, &manifest),
        kept: &kept,
        directory,
        tablespaces: &tablespaces,
    };
    let control = work.extract_all(jobs, progress)?;
    link_tablespaces(directory, &tablespaces)?;
    manifest::verify(directory, &manifest, &kept, &control, jobs)?;
    settings::write(archive, plan, destination)?;
    let made_configuration = settings::complete(directory, &control)?;
    for directory in tablespaces.values().chain([directory]) {
        sync_file_system(directory)?;
    }
    // From here on a server could start; everything it needs is on disk.
    durable::replace(&directory.join("global/pg_control"), &control).map_err(Error::local)?;
    durable::remove(&directory.join(MARKER)).map_err(Error::local)?;
    Ok(Executed {
        kept_files: kept.count(),
        kept_bytes: kept.bytes,
        fetched_slices: work.needed.iter().filter(|needed| **needed).count(),
        slices: backup.slices.len(),
        made_configuration,
    })
}

/// The directories of the restore, with what the manifest puts before the names in them.
fn roots(directory: &Path, tablespaces: &BTreeMap<u32, PathBuf>) -> Vec<(String, PathBuf)> {
    let below = |(oid, path): (&u32, &PathBuf)| (format!("pg_tblspc/{oid}/"), path.clone());
    let mut roots: Vec<_> = tablespaces.iter().map(below).collect();
    roots.push((String::new(), directory.to_owned()));
    roots
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

/// What is extracted, and to where.
struct Extraction<'a> {
    repository: &'a Repository,
    backup: &'a BackupInfo,
    /// For each slice, whether it is fetched.
    needed: Vec<bool>,
    kept: &'a Kept,
    directory: &'a Path,
    tablespaces: &'a BTreeMap<u32, PathBuf>,
}

impl Extraction<'_> {
    /// Extracts every slice that is needed; the content of `pg_control` is given back instead of written.
    fn extract_all(&self, jobs: usize, progress: &(dyn Fn(u64) + Sync)) -> Result<Vec<u8>> {
        let next = AtomicUsize::new(0);
        let control = Mutex::new(Vec::new());
        let failure: Mutex<Option<Error>> = Mutex::new(None);
        let work = || {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(slice) = self.backup.slices.get(index) else {
                    return;
                };
                let needed = self.needed.get(index).is_none_or(|needed| *needed);
                let done = if needed {
                    self.extract(slice, &control)
                } else {
                    Ok(())
                };
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
            for _ in 0..jobs.max(1) {
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
                object: format!("backup {}", self.backup.id),
                problem: "it holds no global/pg_control".to_owned(),
            });
        }
        Ok(control)
    }

    fn extract(&self, slice: &BackupSlice, control: &Mutex<Vec<u8>>) -> Result<()> {
        let root = match slice.archive {
            BackupArchive::Base => self.directory.to_owned(),
            BackupArchive::Tablespace(oid) => self
                .tablespaces
                .get(&oid)
                .cloned()
                .unwrap_or_else(|| self.directory.join(format!("pg_tblspc/{oid}"))),
        };
        extract::extract(
            self.repository,
            self.backup,
            slice,
            &root,
            self.kept,
            control,
        )
    }
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
