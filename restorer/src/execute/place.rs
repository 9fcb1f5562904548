//! Prepares the directories of a restore: empty ones, or those that an unfinished restore into the
//! same target left.
//!
//! Invariant: a tablespace's directory with files is emptied or compared only if it has the claim
//! of the same restore ([`claims`]). With `--delta` this is also allowed if the target's own link
//! leads there, and either the operator named the directory or the target's server has used it.

use std::{
    collections::BTreeMap,
    fs,
    io::ErrorKind,
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    },
    path::{Component, Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use wal_format::{
    BackupId, BackupInfo, BackupManifest, WalFileName, control_file::CONTROL_FILE_BYTES,
};

use super::{
    Access, CONTROL, MARKER, PLAN_FILE,
    claims::{self, Owner},
    lock::TargetLock,
    owned::{Owned, is_at, plan_owner, was_used_by},
    recovery,
    tree::{Tree, read_small},
};
use crate::{Error, Result, shell, tablespaces::ReplayedTablespace};

/// The maximum length of a marker in bytes.
pub(super) const MARKER_BYTES_MAX: u64 = 16 << 20;
/// The name of the marker while it is written ([`Tree::replace`]).
const MARKER_NEW: &str = "RESTORE_INCOMPLETE.new";

/// The content of the marker of an incomplete restore.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Marker {
    /// An explanation for a person who opens the file.
    note: String,
    backup: BackupId,
    /// True if the restore keeps existing files.
    #[serde(default)]
    pub(super) delta: bool,
    /// The directories of the tablespaces, for information; the claims in them decide.
    tablespaces: Vec<PathBuf>,
    /// The owner of the claims. `None` in a marker of an older version.
    #[serde(default)]
    pub(super) claim: Option<Owner>,
}

/// Maps each OID to the directory of its files: the tablespaces of the backup and those that the
/// replay creates. `mapping` is the operator's; the directories of replayed tablespaces are already
/// chosen.
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
        // An in-place tablespace is a directory inside the data directory and is not mapped.
        .filter(|location| Path::new(location).is_absolute())
        .collect();
    known.sort_unstable();
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
    // A tablespace that is created at the location of a dropped one shares its directory.
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

/// Refuses a tablespace directory that is equal to, inside or above one of `others`. Two
/// tablespaces in one directory would mix their files, and one inside the data directory would be
/// emptied with it.
pub(crate) fn apart<'a>(
    old: &Path,
    new: &Path,
    others: impl Iterator<Item = &'a Path>,
) -> Result<()> {
    let new_place = real(new);
    for other in others {
        let other = real(other);
        if new_place.starts_with(&other) || other.starts_with(&new_place) {
            return Err(Error::usage(format!(
                "the tablespace that was at {} cannot be at {}, because {} is there; give it another place with \
                 --tablespace-mapping {}",
                old.display(),
                new.display(),
                other.display(),
                mapping_of(old)
            )));
        }
    }
    Ok(())
}

/// Returns the value of `--tablespace-mapping` for a directory, quoted for a shell.
pub(crate) fn mapping_of(old: &Path) -> String {
    // The command line (`locations`) reads an equals sign that belongs to a path as `\=`.
    let old = old.display().to_string().replace('=', "\\=");
    shell::quoted(&format!("{old}=NEW"))
}

/// Resolves links and `..` in the part of the path that exists. The rest will be created as plain
/// directories.
pub(super) fn real(path: &Path) -> PathBuf {
    let mut found = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(found.pop()),
            Component::CurDir => {}
            part => {
                found.push(part);
                if let Ok(real) = fs::canonicalize(&found) {
                    found = real;
                }
            }
        }
    }
    found
}

/// The state of the prepared directories.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// They have their content, to be compared.
    AsItIs,
    /// They are empty.
    Empty,
}

/// The directories of a restore, and the options that decide which existing content may be used.
pub(super) struct Wanted<'a> {
    pub(super) directory: &'a Path,
    pub(super) backup: &'a BackupInfo,
    /// The directory of each tablespace, by OID.
    pub(super) tablespaces: &'a BTreeMap<u32, PathBuf>,
    /// The operator's mapping: old directory to new directory.
    pub(super) mapping: &'a BTreeMap<PathBuf, PathBuf>,
    /// True to keep the content of an existing data directory.
    pub(super) delta: bool,
}

/// The result of preparing the directories.
pub(super) struct Prepared {
    pub(super) taken: Taken,
    pub(super) owner: Owner,
    pub(super) lock: TargetLock,
}

/// Checks, without changing anything, that the directories can be used. Returns the marker of an
/// unfinished restore.
///
/// # Errors
/// [`Error::Usage`] names the directory and the remedy.
fn check(wanted: &Wanted<'_>) -> Result<Option<Marker>> {
    let directory = wanted.directory;
    let owned = Owned::of(directory, wanted.delta, wanted.mapping)?;
    let unfinished = unfinished(directory)?;
    let empty_before = is_empty(directory)?;
    let delta = wanted.delta && !empty_before;
    match &unfinished {
        Some(marker) if marker.delta && !delta => {
            return Err(Error::usage(format!(
                "{} holds a --delta restore that was not completed; run it again with --delta, or give another directory",
                directory.display()
            )));
        }
        None if delta => is_of_cluster(directory, wanted.backup)?,
        None if recovery::was_interrupted(directory) => recovery::refuse_running(directory)?,
        None if !empty_before => return Err(occupied(directory)),
        Some(_) | None => {}
    }
    if delta {
        let begun = unfinished.as_ref().and_then(|marker| marker.claim.as_ref());
        only_wal_in_linked_wal(
            directory,
            begun.is_some_and(|owner| is_at(owner, directory)),
        )?;
    }
    for (oid, path) in wanted.tablespaces {
        if owned.has(*oid, path) || claims::is_free(path)? {
            refuse_unwritable(*oid, path)?;
            continue;
        }
        if owned.links_to(*oid, path) {
            return Err(Error::usage(format!(
                "tablespace {oid}: the link {} leads to {}, which may be another server's, because {} may be a copy of that \
                 server's data directory; put the tablespace elsewhere with --tablespace-mapping, or if no other server uses \
                 the directory name it as the new one: OLD={}",
                directory.join(format!("pg_tblspc/{oid}")).display(),
                path.display(),
                directory.display(),
                path.display()
            )));
        }
        return Err(claims::refusal(path));
    }
    Ok(unfinished)
}

/// Returns an error if this user cannot create or write the directory of a tablespace.
fn refuse_unwritable(oid: u32, path: &Path) -> Result<()> {
    let exists = |path: &&Path| fs::symlink_metadata(path).is_ok();
    let Some(nearest) = path.ancestors().find(exists) else {
        return Ok(());
    };
    let (uid, me) = (
        fs::metadata(nearest).map(|metadata| metadata.uid()),
        rustix::process::geteuid(),
    );
    // The restore sets the permissions of an existing directory, which only the directory's owner
    // may do.
    let is_anothers = nearest == path && uid.is_ok_and(|uid| uid != me.as_raw());
    if !is_anothers
        && rustix::fs::access(
            nearest,
            rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK,
        )
        .is_ok()
    {
        return Ok(());
    }
    Err(Error::usage(format!(
        "the directory of tablespace {oid}, {}, cannot be used: user {} may not write {}; create it for that user, give \
         another one with --tablespace-mapping {}, or let root run the restore with --owner and --tablespace-mapping \
         OLD=NEW for it, which creates a new directory for the owner",
        path.display(),
        me.as_raw(),
        nearest.display(),
        mapping_of(path)
    )))
}

/// Returns a notice if a restore into `directory` begins again, because an earlier one did not end
/// and is not continued with `--delta`: which directories lose their content.
pub(crate) fn notice_of_removal(directory: &Path, delta: bool) -> Option<String> {
    let marker = unfinished(directory).ok().flatten();
    if delta || !(marker.is_some() || recovery::was_interrupted(directory)) {
        return None;
    }
    let links = fs::read_dir(directory.join("pg_tblspc"));
    let links = links.into_iter().flatten().flatten();
    let linked = links.filter_map(|link| fs::read_link(link.path()).ok());
    let mut tablespaces: Vec<PathBuf> = marker.map(|marker| marker.tablespaces).unwrap_or_default();
    tablespaces.extend(linked);
    tablespaces.sort();
    tablespaces.dedup();
    let of_tablespaces = tablespaces
        .iter()
        .map(|one| format!(" and {}", one.display()));
    let of_tablespaces: String = of_tablespaces.collect();
    Some(format!(
        "an earlier restore into {0} did not end: everything in {0}{of_tablespaces} is removed, and the restore begins again",
        directory.display()
    ))
}

/// Makes the checks of [`take`] without changing the directories.
pub(crate) fn check_directories(
    directory: &Path,
    backup: &BackupInfo,
    tablespaces: &BTreeMap<u32, PathBuf>,
    mapping: &BTreeMap<PathBuf, PathBuf>,
    delta: bool,
) -> Result<()> {
    let wanted = Wanted {
        directory,
        backup,
        tablespaces,
        mapping,
        delta,
    };
    check(&wanted).map(drop)
}

/// Prepares the directories. They have to be empty or belong to a restore that was interrupted.
/// With `delta`, a data directory of the same cluster, in which no server runs, is also accepted.
pub(super) fn take(
    wanted: &Wanted<'_>,
    manifest: &BackupManifest,
    access: Access,
) -> Result<Prepared> {
    let directory = wanted.directory;
    // Check before the directory is created, so that a refused restore leaves nothing behind.
    check(wanted)?;
    create(directory, access)?;
    let lock = TargetLock::take(directory)?;
    // Check again under the lock: another restore may have started in between.
    let unfinished = check(wanted)?;
    let delta = wanted.delta && !is_empty(directory)?;
    let mut ours: Vec<PathBuf> = wanted.tablespaces.values().cloned().collect();
    ours.extend(
        unfinished
            .iter()
            .flat_map(|marker| marker.tablespaces.clone()),
    );
    ours.sort();
    ours.dedup();
    // The claims of an earlier restore into this target remain valid.
    let owner = match unfinished {
        Some(marker) => marker.claim,
        None => plan_owner(directory),
    };
    let owner = owner
        .filter(|owner| is_at(owner, directory))
        .unwrap_or_else(|| Owner::new(directory));
    let marker = Marker {
        note:
            "This restore was not completed. Run the same command again, or remove the directory."
                .to_owned(),
        backup: wanted.backup.id.clone(),
        delta,
        tablespaces: ours,
        claim: Some(owner.clone()),
    };
    let json = serde_json::to_vec_pretty(&marker)
        .map_err(|error| Error::io("write", directory.join(MARKER))(error.into()))?;
    let tree = Tree::open(directory, &BTreeMap::new())?;
    tree.replace(MARKER, &json)?;
    // Remove this before anything else changes: the server must not start while it is being
    // restored.
    tree.remove_durably(CONTROL)?;
    // Empty the data directory last: its links show which tablespaces are its own.
    for (oid, path) in wanted.tablespaces {
        create(path, access)?;
        let in_backup = wanted.backup.tablespaces.iter().any(|one| one.oid == *oid);
        let keeps = delta && claims::holds_more(path)?;
        claims::claim(path, &owner, in_backup || keeps)?;
        if !delta {
            empty(path)?;
        }
        if in_backup && let Some(version) = version_directory(manifest, *oid) {
            make_version_directory(&path.join(version), delta, || {
                claims::claim(path, &owner, false)
            })?;
        }
    }
    if !delta {
        empty(directory)?;
    }
    let taken = if delta { Taken::AsItIs } else { Taken::Empty };
    Ok(Prepared { taken, owner, lock })
}

/// Returns the name of the directory of a server's version in a tablespace's directory; `None` if
/// the backup has no file there.
fn version_directory(manifest: &BackupManifest, oid: u32) -> Option<&str> {
    let prefix = format!("pg_tblspc/{oid}/");
    let mut files = manifest.files.iter();
    files
        .find_map(|file| file.path.strip_prefix(&prefix)?.split_once('/'))
        .map(|(version, _)| version)
        .filter(|version| version.starts_with("PG_"))
}

/// Creates the directory of a server's version. Because it exists, PostgreSQL refuses the location
/// to every other server (`create_tablespace_directories` in `tablespace.c`). Calls `undo` if
/// another server has just created it.
fn make_version_directory(
    path: &Path,
    delta: bool,
    undo: impl FnOnce() -> Result<()>,
) -> Result<()> {
    match fs::DirBuilder::new()
        .mode(Access::Group.directory_mode())
        .create(path)
    {
        Err(error) if error.kind() == ErrorKind::AlreadyExists && delta => Ok(()),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            undo()?;
            Err(claims::refusal(path))
        }
        made => made.map_err(Error::io("create directory", path)),
    }
}

/// Refuses directories that `--delta` must not change: one of another cluster, one that is not a
/// data directory, one with a running server.
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

/// Refuses a `pg_wal` that is a link to a directory that may belong to another server or that
/// contains anything except WAL, because a restore empties that directory. With `begun`, an
/// unfinished restore of this target has already emptied it.
fn only_wal_in_linked_wal(directory: &Path, begun: bool) -> Result<()> {
    let wal = directory.join("pg_wal");
    if !wal.is_symlink() {
        return Ok(());
    }
    if !begun && !was_used_by(directory) {
        return Err(Error::usage(format!(
            "{} is a link to a directory that may be another server's, because {} may be a copy of that server's data \
             directory; remove the link",
            wal.display(),
            directory.display()
        )));
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

/// Returns the error for a data directory that is not empty.
fn occupied(directory: &Path) -> Error {
    let shown = directory.display();
    Error::usage(if recovery::is_unproved(directory) {
        format!(
            "{shown} holds a copy that was not compared with its plan and has ended its recovery, and nothing in it is \
             overwritten; remove it if nobody uses it, or give an empty or new directory"
        )
    } else if directory.join(PLAN_FILE).exists() {
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

/// Returns the marker of a restore that was interrupted.
pub(super) fn unfinished(directory: &Path) -> Result<Option<Marker>> {
    let path = directory.join(MARKER);
    // If there is no directory, the attempt to create it gives the better error.
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
    // PostgreSQL refuses a data directory that others can read, and derives the group's access from
    // its mode (`checkDataDir`).
    fs::set_permissions(directory, fs::Permissions::from_mode(mode))
        .map_err(Error::io("set the permissions of", directory))
}

pub(crate) fn is_empty(directory: &Path) -> Result<bool> {
    match fs::read_dir(directory) {
        // A marker whose writing was interrupted also counts as nothing.
        Ok(mut entries) => Ok(entries.all(|entry| {
            entry.is_ok_and(|entry| entry.file_name().as_bytes() == MARKER_NEW.as_bytes())
        })),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(true),
        Err(error) => Err(Error::io("list", directory)(error)),
    }
}

/// Removes everything except the marker and the claim.
fn empty(directory: &Path) -> Result<()> {
    for entry in fs::read_dir(directory).map_err(Error::io("list", directory))? {
        let entry = entry.map_err(Error::io("list", directory))?;
        let path = entry.path();
        let name = entry.file_name();
        if name == MARKER || claims::is_claim(name.as_bytes()) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_around_a_missing_directory_is_resolved() {
        let root = tempfile::tempdir().expect("a directory");
        let root = fs::canonicalize(root.path()).expect("it exists");
        std::os::unix::fs::symlink(&root, root.join("link")).expect("a link");
        assert_eq!(real(&root.join("missing/../data/./x")), root.join("data/x"));
        assert_eq!(real(&root.join("link/data")), root.join("data"));
    }

    #[test]
    fn an_equals_sign_in_a_path_is_escaped_in_the_advice() {
        assert_eq!(mapping_of(Path::new("/srv/a")), "/srv/a=NEW");
        assert_eq!(mapping_of(Path::new("/srv/a=b")), "'/srv/a\\=b=NEW'");
    }
}
