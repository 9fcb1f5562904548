//! The space that a restore needs on each file system, and the space that is free there, before a
//! byte is copied.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustix::fs::statvfs;
use serde::{Deserialize, Serialize};
use wal_format::{BackupInfo, layout::BackupArchive};

use crate::{
    Error, PlanError, RestorePlan, Result, execute::place_tablespaces, look_ahead::WINDOW_BYTES,
    tablespaces::Directories,
};

/// The segment that PostgreSQL replays, and the first one of its new timeline.
const OPEN_SEGMENTS: u64 = 2;

/// A file system that a restore writes to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSystem {
    /// The directories of the restore on it: the data directory, and those of tablespaces.
    pub directories: Vec<PathBuf>,
    /// The bytes that the restore needs there: the unpacked files, and for the data directory the
    /// WAL that the recovery holds at once.
    pub needed_bytes: u64,
    /// The bytes that an ordinary user can still write there.
    pub free_bytes: u64,
    /// The bytes of files in these directories, which the restore keeps, replaces or removes.
    pub reused_bytes: u64,
}

impl FileSystem {
    fn is_short(&self) -> bool {
        self.needed_bytes > self.free_bytes.saturating_add(self.reused_bytes)
    }

    /// Returns the directories as text.
    pub(crate) fn names(&self) -> String {
        let names = self.directories.iter().map(|one| one.display().to_string());
        names.collect::<Vec<_>>().join(", ")
    }
}

/// Adds the file systems of the restore to the plan, if a target is given.
///
/// # Errors
/// [`Error::Usage`] for directories that cannot be used together, [`Error::Io`] if the state of a
/// file system cannot be read.
pub(crate) fn settle(
    backup: &BackupInfo,
    segment_bytes: u64,
    plan: &mut RestorePlan,
    wishes: &Directories<'_>,
) -> Result<()> {
    let Some(target) = wishes.target else {
        return Ok(());
    };
    let placed = place_tablespaces(backup, &plan.tablespaces, wishes.mapping, target)?;
    let held = WINDOW_BYTES.saturating_add(OPEN_SEGMENTS.saturating_mul(segment_bytes));
    let mut needs: BTreeMap<&Path, u64> = BTreeMap::new();
    needs.insert(target, plan.replayed_bytes.min(held));
    for directory in placed.values() {
        needs.entry(directory).or_default();
    }
    for slice in &backup.slices {
        let directory = match slice.archive {
            BackupArchive::Base => None,
            BackupArchive::Tablespace(oid) => placed.get(&oid),
        };
        let need = needs.entry(directory.map_or(target, PathBuf::as_path));
        *need.or_default() += slice.raw_bytes;
    }
    let mut systems: BTreeMap<u64, FileSystem> = BTreeMap::new();
    // The data directory first.
    let mut ordered: Vec<(&Path, u64)> = needs.into_iter().collect();
    ordered.sort_by_key(|(directory, _)| *directory != target);
    for (directory, needed) in ordered {
        let (device, free_bytes) = asked(directory)?;
        let system = systems.entry(device).or_insert_with(|| FileSystem {
            directories: Vec::new(),
            needed_bytes: 0,
            free_bytes,
            reused_bytes: 0,
        });
        system.directories.push(directory.to_owned());
        system.needed_bytes = system.needed_bytes.saturating_add(needed);
        let used = used_bytes(directory, device);
        system.reused_bytes = system.reused_bytes.saturating_add(used);
    }
    plan.file_systems = systems.into_values().collect();
    let holds_target = |system: &FileSystem| system.directories.iter().any(|one| one == target);
    plan.file_systems
        .sort_by_key(|system| !holds_target(system));
    Ok(())
}

/// Refuses a plan if a file system has less space than it needs.
///
/// # Errors
/// [`PlanError::NoSpace`] names each such file system.
pub(crate) fn refuse_shortage(plan: &RestorePlan) -> Result<()> {
    let short = plan.file_systems.iter().filter(|system| system.is_short());
    let said = short.map(|system| {
        let reused = match system.reused_bytes {
            0 => String::new(),
            bytes => format!(" and {bytes} are used by what is there now"),
        };
        format!(
            "the file system of {} has {} bytes free{reused}, the restore needs {}",
            system.names(),
            system.free_bytes,
            system.needed_bytes
        )
    });
    let shortages = said.collect::<Vec<_>>().join("; ");
    if shortages.is_empty() {
        return Ok(());
    }
    Err(PlanError::NoSpace { shortages }.into())
}

/// Returns the device and the free bytes of the file system on which `directory` is or will be
/// created.
fn asked(directory: &Path) -> Result<(u64, u64)> {
    for place in directory.ancestors() {
        match fs::metadata(place) {
            Ok(metadata) => {
                let space = statvfs(place)
                    .map_err(|error| Error::io("ask for the free space of", place)(error.into()))?;
                return Ok((
                    metadata.dev(),
                    space.f_bavail.saturating_mul(space.f_frsize),
                ));
            }
            // A file on the way is reported when the directory is created.
            Err(error)
                if [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory]
                    .contains(&error.kind()) => {}
            Err(error) => return Err(Error::io("find", place)(error)),
        }
    }
    let missing = io::ErrorKind::NotFound.into();
    Err(Error::io("find", directory)(missing))
}

/// Returns the bytes that files below `directory` occupy on `device`. Directories and files that
/// cannot be read count as empty.
fn used_bytes(directory: &Path, device: u64) -> u64 {
    const BLOCK: u64 = 512;
    let mut used = 0_u64;
    let mut open = vec![directory.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            // Links are not followed.
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            if metadata.dev() != device {
                continue;
            }
            if metadata.is_dir() {
                open.push(entry.path());
            } else {
                used = used.saturating_add(metadata.blocks().saturating_mul(BLOCK));
            }
        }
    }
    used
}
