//! Applies a plan: extracts the backup, verifies every file, writes the recovery settings, and only
//! then `pg_control`.
//!
//! Invariant: PostgreSQL cannot start on an incomplete copy. A marker is written first and removed
//! last. `pg_control`, without which no server starts, is written when everything else is on disk.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::DirBuilderExt,
    path::PathBuf,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use repository::Repository;
use wal_format::{BackupInfo, BackupSlice};

use crate::{
    Error, RestorePlan, Result, inventory::Archive, isolation::Isolation,
    tablespaces::ReplayedTablespace,
};

mod access;
mod bound;
mod claims;
mod delta;
mod extract;
mod files;
mod lock;
mod manifest;
mod owned;
mod place;
pub(crate) mod recovery;
mod settings;
mod tree;

pub(crate) use access::Access;
pub(crate) use bound::check_parts;
pub use claims::Owner;
pub(crate) use claims::{in_use, is_free, is_of, plan_in};
use delta::Kept;
use extract::{Control, Listed};
pub(crate) use files::files;
pub use lock::TargetLock;
pub(crate) use lock::holder as lock_holder;
pub(crate) use manifest::read_manifest;
pub(crate) use owned::Owned;
use place::{Prepared, Taken, Wanted, take};
pub(crate) use place::{
    apart, check_directories, mapping_of, notice_of_removal, place_tablespaces,
};
pub use settings::{Action, Recovery};
use tree::Tree;

/// The name of the marker, a file that exists while a restore is incomplete.
pub const MARKER: &str = "RESTORE_INCOMPLETE";
/// The control file. No server starts without it, so it is written last.
pub(crate) const CONTROL: &str = "global/pg_control";
/// The file with the plan, which `wal-fetch` reads.
pub const PLAN_FILE: &str = "tidemark_plan.json";

/// The target of a restore and its settings.
#[derive(Clone, Debug)]
pub struct Destination {
    /// The data directory.
    pub directory: PathBuf,
    /// The mapping of tablespaces: old location to new location.
    pub tablespaces: BTreeMap<PathBuf, PathBuf>,
    /// True if files of an existing data directory that equal those of the backup are kept.
    pub delta: bool,
    /// The number of threads that extract.
    pub jobs: usize,
    /// The recovery settings.
    pub recovery: Recovery,
}

/// The result of an execution.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Executed {
    /// Files that existed already, equal to those of the backup.
    pub kept_files: usize,
    /// The length of these files in bytes.
    pub kept_bytes: u64,
    /// The number of slices that were fetched.
    pub fetched_slices: usize,
    /// The number of slices of the backup.
    pub slices: usize,
    /// True if configuration files were created, because the backup has none.
    pub made_configuration: bool,
    /// The settings of the parent that have no effect in the copy.
    pub isolation: Isolation,
}

/// Restores into `destination` according to `plan`. Calls `progress` with the raw bytes of each
/// slice. The target stays locked until the lock is dropped.
///
/// # Errors
/// [`Error::Usage`] for a destination that is not empty, or into which another process restores;
/// [`Error::Damaged`] names the object that differs from what was stored.
pub fn execute(
    archive: &Archive,
    plan: &RestorePlan,
    destination: &Destination,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<(Executed, TargetLock)> {
    let backup = backup_of(archive, plan)?;
    let directory = &destination.directory;
    let jobs = destination.jobs;
    let (mapping, replayed) = (&destination.tablespaces, plan.tablespaces.as_slice());
    let tablespaces = place_tablespaces(&backup, replayed, mapping, directory)?;
    // Before anything is written, check that every part belongs to this backup.
    let manifest = archive.manifest(&backup)?;
    let access = bound::check_label(&archive.repository, &backup)?;
    access.apply();
    let wanted = Wanted {
        directory,
        backup: &backup,
        tablespaces: &tablespaces,
        mapping,
        delta: destination.delta,
    };
    let Prepared { taken, owner, lock } = take(&wanted, &manifest, access)?;
    let plan = &RestorePlan {
        claim: Some(owner.clone()),
        ..plan.clone()
    };
    let tree = Tree::open(directory, &tablespaces)?;
    let kept = match taken {
        Taken::Empty => Kept::default(),
        Taken::AsItIs => delta::sift(&tree, &backup, &manifest, access, jobs)?,
    };
    let work = Extraction {
        repository: &archive.repository,
        backup: &backup,
        needed: kept.needs(&backup, &manifest),
        kept: &kept,
        listed: Listed::of(&manifest),
        tree: &tree,
    };
    let control = work.extract_all(jobs, progress)?;
    manifest::verify(&tree, &manifest, &kept, &control, jobs)?;
    bound::check_control(&backup, &control)?;
    let linked = link_tablespaces(&tree, &backup, &control, &tablespaces, replayed, &owner)?;
    let made_configuration = settings::complete(&tree, &control)?;
    let isolation = settings::write(archive, plan, destination, &tree)?;
    tree.sync()?;
    if destination.recovery.start {
        recovery::begin(&tree)?;
    }
    // From here on a server could start; everything that it needs is on disk.
    tree.replace(CONTROL, &control)?;
    tree.remove_durably(MARKER)?;
    // The linked directories now contain files of this server, so their claims are released, unless
    // an interrupted recovery would need them. The other directories stay claimed until the replay
    // uses them.
    for directory in linked.iter().filter(|_| !destination.recovery.start) {
        claims::release(directory, &owner.token);
    }
    let executed = Executed {
        kept_files: kept.count(),
        kept_bytes: kept.bytes,
        fetched_slices: work.needed.iter().filter(|needed| **needed).count(),
        slices: backup.slices.len(),
        made_configuration,
        isolation,
    };
    Ok((executed, lock))
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

/// The source and the target of an extraction.
struct Extraction<'a> {
    repository: &'a Repository,
    backup: &'a BackupInfo,
    /// For each slice, true if it is fetched.
    needed: Vec<bool>,
    kept: &'a Kept,
    listed: Listed<'a>,
    tree: &'a Tree,
}

impl Extraction<'_> {
    /// Extracts every slice that is needed. Returns the content of `pg_control` instead of writing
    /// it.
    fn extract_all(&self, jobs: usize, progress: &(dyn Fn(u64) + Sync)) -> Result<Vec<u8>> {
        let next = AtomicUsize::new(0);
        let control = Control::default();
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
        if let Some(error) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        let control = control.into_content();
        if control.is_empty() {
            return Err(Error::Damaged {
                object: format!("backup {}", self.backup.id),
                problem: "it holds no global/pg_control".to_owned(),
            });
        }
        Ok(control)
    }

    fn extract(&self, slice: &BackupSlice, control: &Control) -> Result<()> {
        let into = (self.tree, self.kept, &self.listed);
        extract::extract(self.repository, self.backup, slice, into, control)
    }
}

/// Creates the links of the backup's tablespaces, and of those whose creation record the replay
/// skips. Returns the directories of the links.
fn link_tablespaces(
    tree: &Tree,
    backup: &BackupInfo,
    control: &[u8],
    tablespaces: &BTreeMap<u32, PathBuf>,
    replayed: &[ReplayedTablespace],
    owner: &Owner,
) -> Result<Vec<PathBuf>> {
    let mut linked = Vec::new();
    for tablespace in &backup.tablespaces {
        if let Some(location) = tablespaces.get(&tablespace.oid) {
            tree.link(&format!("pg_tblspc/{}", tablespace.oid), location)?;
            linked.push(location.clone());
        }
    }
    let in_backup = |oid: u32| backup.tablespaces.iter().any(|one| one.oid == oid);
    for created in replayed
        .iter()
        .filter(|one| one.passed_over && !in_backup(one.oid))
    {
        if let Some(location) = &created.directory {
            // The replay of the creation would have created this directory. Claim it first, so that
            // a restore that is interrupted here empties it when it runs again.
            claims::claim(location, owner, true)?;
            let version = location.join(version_directory(backup, control)?);
            fs::DirBuilder::new()
                .recursive(true)
                .mode(Access::Group.directory_mode())
                .create(&version)
                .map_err(Error::io("create directory", &version))?;
            tree.link(&format!("pg_tblspc/{}", created.oid), location)?;
            linked.push(location.clone());
        }
    }
    // With this file the server would create the links of the original server
    // (`read_tablespace_map` in `xlogrecovery.c`).
    tree.remove("tablespace_map")?;
    Ok(linked)
}

/// Returns the name of the directory in which a server keeps the files of a tablespace
/// (`TABLESPACE_VERSION_DIRECTORY` in `relpath.h`).
fn version_directory(backup: &BackupInfo, control: &[u8]) -> Result<String> {
    // `catalog_version_no` follows the system identifier and the version of the layout in
    // `ControlFileData`.
    let version = control.get(12..16).and_then(|bytes| bytes.try_into().ok());
    let version = version
        .map(u32::from_ne_bytes)
        .ok_or_else(|| Error::Damaged {
            object: format!("{CONTROL} of the backup"),
            problem: "it is cut off".to_owned(),
        })?;
    Ok(format!("PG_{}_{version}", backup.postgresql_major))
}
