//! Takes the directories of a restore: empty ones, or what an unfinished restore of ours left behind.
//!
//! The marker names every directory that the restore may empty. What it does not name is never emptied, whatever the
//! command line says this time.

use std::{
    collections::BTreeMap,
    fs,
    io::ErrorKind,
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use wal_format::{BackupId, BackupInfo, WalFileName, control_file::CONTROL_FILE_BYTES};

use super::{
    Access, CONTROL, MARKER, PLAN_FILE,
    tree::{Tree, read_small},
};
use crate::{Error, Result, tablespaces::ReplayedTablespace};

/// The longest marker that is read.
const MARKER_BYTES_MAX: u64 = 16 << 20;
/// The marker's name while it is written ([`Tree::replace`]).
const MARKER_NEW: &str = "RESTORE_INCOMPLETE.new";

/// What stands in the marker while a restore is not complete.
#[derive(Debug, Serialize, Deserialize)]
struct Marker {
    /// For whoever opens it.
    note: String,
    backup: BackupId,
    /// True if it keeps what is there.
    #[serde(default)]
    delta: bool,
    /// The tablespaces' directories that are the restore's to empty.
    tablespaces: Vec<PathBuf>,
}

/// Maps each OID to the directory that its files go to: of the tablespaces of the backup, and of those that the replay
/// creates. `mapping` is what the operator asked for; the directories of the replay are already chosen.
pub(crate) fn place_tablespaces(
    backup: &BackupInfo,
    replayed: &[ReplayedTablespace],
    mapping: &BTreeMap<PathBuf, PathBuf>,
    directory: &Path,
) -> Result<BTreeMap<u32, PathBuf>> {
    let mut known: Vec<&str> = backup
        .tablespaces
        .iter()
        .map(|one| one.location.as_str())
        .chain(replayed.iter().map(|one| one.location.as_str()))
        .collect();
    known.dedup();
    for old in mapping.keys() {
        if !known.iter().any(|location| Path::new(location) == old) {
            let has = match known.as_slice() {
                [] => "none".to_owned(),
                some => some.join(", "),
            };
            return Err(Error::usage(format!(
                "--tablespace-mapping: the backup has no tablespace at {}, and the replay creates none there; there are: {has}",
                old.display()
            )));
        }
    }
    let mut placed: BTreeMap<u32, PathBuf> = BTreeMap::new();
    for tablespace in &backup.tablespaces {
        let old = PathBuf::from(&tablespace.location);
        // An in-place tablespace lies in the data directory and has no place of its own.
        if old.is_relative() {
            continue;
        }
        let new = mapping.get(&old).cloned().unwrap_or_else(|| old.clone());
        if new.is_relative() {
            return Err(Error::usage(format!(
                "--tablespace-mapping: {} is not absolute",
                new.display()
            )));
        }
        apart(
            &old,
            &new,
            placed.values().map(PathBuf::as_path).chain([directory]),
        )?;
        placed.insert(tablespace.oid, new);
    }
    // What is created in the place of another tablespace that was dropped before has that one's directory.
    for created in replayed {
        let Some(new) = &created.directory else {
            continue;
        };
        if placed.contains_key(&created.oid) || placed.values().any(|placed| placed == new) {
            continue;
        }
        let old = Path::new(&created.location);
        apart(
            old,
            new,
            placed.values().map(PathBuf::as_path).chain([directory]),
        )?;
        placed.insert(created.oid, new.clone());
    }
    Ok(placed)
}

/// Refuses a directory for a tablespace that is in, above or the same as one of `others`: two in one directory would mix their
/// files, and one in the data directory would be emptied with it.
fn apart<'a>(old: &Path, new: &Path, others: impl Iterator<Item = &'a Path>) -> Result<()> {
    let new_place = real(new);
    for other in others {
        let other = real(other);
        if new_place.starts_with(&other) || other.starts_with(&new_place) {
            return Err(Error::usage(format!(
                "the tablespace that was at {} cannot be at {}, because {} is there; give it another place with \
                 --tablespace-mapping {}=DIRECTORY",
                old.display(),
                new.display(),
                other.display(),
                old.display()
            )));
        }
    }
    Ok(())
}

/// The path behind links, as far as it exists.
fn real(path: &Path) -> PathBuf {
    if let Ok(real) = fs::canonicalize(path) {
        return real;
    }
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => real(parent).join(name),
        _ => path.to_owned(),
    }
}

/// How the directories were taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// With their content, to be compared.
    AsItIs,
    /// Empty.
    Empty,
}

/// Makes the directories ours: empty ones, or those of a restore that was interrupted; with `delta` also a data directory
/// of the same cluster, in which no server runs.
pub(super) fn take(
    directory: &Path,
    backup: &BackupInfo,
    tablespaces: &BTreeMap<u32, PathBuf>,
    delta: bool,
    access: Access,
) -> Result<Taken> {
    let owned = Owned::of(directory, delta)?;
    let unfinished = unfinished(directory)?;
    let empty_before = is_empty(directory)?;
    let delta = delta && !empty_before;
    let mut ours = Vec::new();
    match unfinished {
        Some(marker) if marker.delta && !delta => {
            return Err(Error::usage(format!(
                "{} holds a --delta restore that was not completed; run it again with --delta, or give another directory",
                directory.display()
            )));
        }
        Some(marker) => ours = marker.tablespaces,
        None if delta => {
            is_of_cluster(directory, backup)?;
            ours = linked(directory).into_values().collect();
        }
        None if !empty_before => return Err(occupied(directory)),
        None => {}
    }
    if delta {
        only_wal_in_linked_wal(directory)?;
    }
    for (oid, path) in tablespaces {
        if !owned.has(*oid, path) && !is_empty(path)? {
            return Err(Error::usage(format!(
                "{} is not empty and nothing in it is overwritten; put the tablespace elsewhere with \
                 --tablespace-mapping OLD=NEW",
                path.display()
            )));
        }
    }
    create(directory, access)?;
    ours.extend(tablespaces.values().cloned());
    ours.sort();
    ours.dedup();
    let marker = Marker {
        note:
            "This restore was not completed. Run the same command again, or remove the directory."
                .to_owned(),
        backup: backup.id.clone(),
        delta,
        tablespaces: ours,
    };
    let json = serde_json::to_vec_pretty(&marker)
        .map_err(|error| Error::io("write", directory.join(MARKER))(error.into()))?;
    let tree = Tree::open(directory, &BTreeMap::new())?;
    tree.replace(MARKER, &json)?;
    // Before anything else changes: what is being restored must not start.
    tree.remove_durably(CONTROL)?;
    if !delta {
        empty(directory)?;
    }
    for path in tablespaces.values() {
        create(path, access)?;
        if !delta {
            empty(path)?;
        }
    }
    Ok(if delta { Taken::AsItIs } else { Taken::Empty })
}

/// Refuses what `--delta` must not touch: another cluster's directory, no data directory at all, a running server.
fn is_of_cluster(directory: &Path, backup: &BackupInfo) -> Result<()> {
    let shown = directory.display();
    let Some(control) = Tree::open(directory, &BTreeMap::new())?.read_if_there(CONTROL)? else {
        return Err(Error::usage(format!(
            "{shown} is not empty and not a data directory of PostgreSQL, so --delta does not touch it; give another \
             directory"
        )));
    };
    let control = read_small(control, &directory.join(CONTROL), CONTROL_FILE_BYTES as u64)?;
    // `ControlFileData` begins with the system identifier, in the byte order of the machine.
    let found = control.first_chunk().copied().map(u64::from_ne_bytes);
    if found != Some(backup.system_identifier.0) {
        return Err(Error::usage(format!(
            "{shown} is another cluster's: its system identifier is {}, the archive's is {}; give another directory",
            found.map_or_else(|| "unreadable".to_owned(), |found| found.to_string()),
            backup.system_identifier
        )));
    }
    if directory.join("postmaster.pid").exists() {
        return Err(Error::usage(format!(
            "a server runs in {shown}, or was not shut down; stop it with pg_ctl -D {shown} stop, and if none runs remove its \
             postmaster.pid"
        )));
    }
    Ok(())
}

/// The directories that a restore may empty although something is in them.
#[derive(Debug, Default)]
pub(crate) struct Owned {
    /// Of an existing data directory, for `--delta`: the tablespace that links to each.
    linked: BTreeMap<u32, PathBuf>,
    /// Those that an unfinished restore took while they were empty.
    begun: Vec<PathBuf>,
}

impl Owned {
    /// Those of the data directory `directory`, which may not exist.
    pub(crate) fn of(directory: &Path, delta: bool) -> Result<Self> {
        let begun = unfinished(directory)?.map(|marker| marker.tablespaces);
        let linked = match begun {
            None if delta => linked(directory),
            _ => BTreeMap::new(),
        };
        Ok(Self {
            linked,
            begun: begun.unwrap_or_default(),
        })
    }

    /// Returns true if `path` is the directory of this tablespace and no other's.
    pub(crate) fn has(&self, oid: u32, path: &Path) -> bool {
        self.linked.get(&oid).is_some_and(|linked| linked == path)
            || self.begun.iter().any(|begun| begun == path)
    }
}

/// The tablespaces of an existing data directory: OID and directory.
fn linked(directory: &Path) -> BTreeMap<u32, PathBuf> {
    let links = fs::read_dir(directory.join("pg_tblspc"));
    let links = links.into_iter().flatten().flatten();
    links
        .filter_map(|link| {
            let oid = link.file_name().to_str()?.parse().ok()?;
            Some((oid, fs::read_link(link.path()).ok()?))
        })
        .collect()
}

/// Refuses a `pg_wal` that is a link to a directory with anything else than WAL in it: a restore empties that directory.
fn only_wal_in_linked_wal(directory: &Path) -> Result<()> {
    let wal = directory.join("pg_wal");
    if !wal.is_symlink() {
        return Ok(());
    }
    let is_wal = |name: &str| {
        const OTHERS: [&str; 6] = [
            "archive_status",
            "lost+found",
            "summaries",
            "tidemark_ahead",
            "RECOVERYHISTORY",
            "RECOVERYXLOG",
        ];
        OTHERS.contains(&name)
            || name.starts_with("xlogtemp.")
            || name.starts_with(".tidemark-")
            || name.parse::<WalFileName>().is_ok()
    };
    for entry in fs::read_dir(&wal).map_err(Error::io("list", &wal))? {
        let name = entry.map_err(Error::io("list", &wal))?.file_name();
        if !name.to_str().is_some_and(is_wal) {
            return Err(Error::usage(format!(
                "{} is a link to a directory that holds {}, which is not WAL, so --delta does not touch it; remove the link, \
                 or move that file away",
                wal.display(),
                name.display()
            )));
        }
    }
    Ok(())
}

/// Why a directory that is not empty is not taken.
fn occupied(directory: &Path) -> Error {
    let shown = directory.display();
    Error::usage(if directory.join(PLAN_FILE).exists() {
        format!(
            "{shown} holds a restore that is complete, and nothing in it is overwritten; start it with pg_ctl -D {shown} start, \
             or give an empty or new directory"
        )
    } else {
        format!(
            "{shown} is not empty and nothing in it is overwritten; give an empty or new directory"
        )
    })
}

/// The marker of a restore that was interrupted.
fn unfinished(directory: &Path) -> Result<Option<Marker>> {
    let path = directory.join(MARKER);
    // Nothing there, or not a directory at all: creating it says so better.
    if !directory.is_dir() {
        return Ok(None);
    }
    let Some(file) = Tree::open(directory, &BTreeMap::new())?.read_if_there(MARKER)? else {
        return Ok(None);
    };
    let json = read_small(file, &path, MARKER_BYTES_MAX)?;
    serde_json::from_slice(&json).map(Some).map_err(|error| {
        Error::usage(format!(
            "{} is not a marker of this version ({error}); remove the directory, or give another one",
            path.display()
        ))
    })
}

fn create(directory: &Path, access: Access) -> Result<()> {
    let mode = access.directory_mode();
    fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(directory)
        .map_err(Error::io("create directory", directory))?;
    // PostgreSQL refuses a data directory that others can read, and reads from its mode whether the
    // group may (`checkDataDir`).
    fs::set_permissions(directory, fs::Permissions::from_mode(mode))
        .map_err(Error::io("set the permissions of", directory))
}

pub(crate) fn is_empty(directory: &Path) -> Result<bool> {
    match fs::read_dir(directory) {
        // A marker whose writing was interrupted is nothing either.
        Ok(mut entries) => Ok(entries.all(|entry| {
            entry.is_ok_and(|entry| entry.file_name().as_bytes() == MARKER_NEW.as_bytes())
        })),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(true),
        Err(error) => Err(Error::io("list", directory)(error)),
    }
}

/// Removes everything but the marker.
fn empty(directory: &Path) -> Result<()> {
    for entry in fs::read_dir(directory).map_err(Error::io("list", directory))? {
        let entry = entry.map_err(Error::io("list", directory))?;
        let path = entry.path();
        if entry.file_name() == MARKER {
            continue;
        }
        let kind = entry.file_type().map_err(Error::io("look at", &path))?;
        let removed = if kind.is_dir() {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        removed.map_err(Error::io("remove", &path))?;
    }
    Ok(())
}
