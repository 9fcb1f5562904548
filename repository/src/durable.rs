//! File operations that survive power loss. When they return, the content, the name and the
//! directory are on disk.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use crate::{CrashPoint, Error, Result, access};

/// Renames durably, replacing `to`. Both must be on one file system.
///
/// # Errors
/// [`Error::Store`].
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    rename_unsynced(from, to)?;
    sync_dir(parent(to))?;
    if parent(from) == parent(to) {
        Ok(())
    } else {
        sync_dir(parent(from))
    }
}

/// Renames, replacing `to`. The caller makes the name durable with [`sync_dir`] before it relies on
/// it.
///
/// # Errors
/// [`Error::Store`].
#[expect(
    clippy::disallowed_methods,
    reason = "the durable rename is made of this and the fsync of the directory"
)]
pub fn rename_unsynced(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(Error::store("rename", from))
}

/// Removes a file durably. Succeeds when the file does not exist.
///
/// # Errors
/// [`Error::Store`].
pub fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path).and_then(|()| CrashPoint::FileRemoved.reach()) {
        Ok(()) => sync_dir(parent(path)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::store("remove", path)(error)),
    }
}

/// Makes the entries of `directory` durable.
///
/// # Errors
/// [`Error::Store`].
pub fn sync_dir(directory: &Path) -> Result<()> {
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(Error::store("fsync", directory))
}

/// Creates `directory` and its missing parents. Makes each of them durable in its parent. Only the
/// owner may enter them, and the group that the directory above is shared with.
///
/// # Errors
/// [`Error::Store`].
pub fn create_dir_all(directory: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;

    let mut missing: Vec<PathBuf> = Vec::new();
    let mut above = directory;
    while !above.as_os_str().is_empty() && !above.exists() {
        missing.push(above.to_owned());
        above = parent(above);
    }
    for path in missing.into_iter().rev() {
        let mode = File::open(parent(&path)).and_then(access::directory_mode);
        let mode = mode.map_err(Error::store("look at", parent(&path)))?;
        match fs::DirBuilder::new().mode(mode).create(&path) {
            Ok(()) => {
                let reached = CrashPoint::DirectoryCreated.reach();
                let synced = reached
                    .and_then(|()| access::inherit(File::open(&path)?, File::open(parent(&path))?))
                    .map_err(Error::store("create directory", &path))
                    .and_then(|()| sync_dir(parent(&path)));
                if synced.is_err() {
                    // A directory that exists counts as durable, so a later attempt has to create
                    // it again.
                    drop(fs::remove_dir(&path));
                }
                synced?;
            }
            // Another writer created it first.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(Error::store("create directory", path)(error)),
        }
    }
    Ok(())
}

/// Replaces the content of `path` durably. After a crash the file has the old or the new content,
/// never a mixture. It keeps its permissions; a new file is accessible to its owner only.
///
/// # Errors
/// [`Error::Store`].
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let fresh = path.with_file_name(name);
    let permissions = fs::metadata(path).map(|metadata| metadata.permissions());
    let written = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&fresh)
        .and_then(|mut file| {
            CrashPoint::RecordCreated.reach()?;
            access::inherit(&file, File::open(parent(path))?)?;
            if let Ok(permissions) = permissions
                && file.metadata()?.permissions() != permissions
            {
                file.set_permissions(permissions)?;
            }
            file.write_all(bytes)?;
            CrashPoint::RecordWritten.reach()?;
            file.sync_all()?;
            CrashPoint::RecordSynced.reach()
        });
    written.map_err(Error::store("write", &fresh))?;
    rename_unsynced(&fresh, path)?;
    let reached = CrashPoint::RecordRenamed.reach();
    reached.map_err(Error::store("rename", path))?;
    sync_dir(parent(path))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use rustix::process::geteuid;

    use super::*;

    /// Only root can give files away, so another user's run checks nothing.
    #[test]
    fn what_root_creates_belongs_to_the_owner_of_the_directory() {
        use std::os::unix::fs::{MetadataExt, chown};

        if !geteuid().is_root() {
            return;
        }
        let directory = tempfile::tempdir().expect("a directory");
        chown(directory.path(), Some(65_534), Some(65_534)).expect("root may");
        let below = directory.path().join("a/b");
        create_dir_all(&below).expect("directories");
        replace(&below.join("record"), b"two").expect("a file");
        let store = crate::store::LocalStore::open(directory.path()).expect("a store");
        let put = crate::ObjectStore::put_if_absent(&store, "main/gap/object", b"three");
        put.expect("an object");
        for path in ["a", "a/b", "a/b/record", "main", "main/gap/object"] {
            let found = fs::metadata(directory.path().join(path)).expect("it is there");
            assert_eq!((found.uid(), found.gid()), (65_534, 65_534), "{path}");
        }
    }

    #[test]
    fn a_file_is_replaced_and_removed_without_leftovers() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("file");
        for content in [b"one", b"two"] {
            replace(&path, content).expect("it replaces");
            assert_eq!(fs::read(&path).expect("it is there"), content);
        }
        let entries = fs::read_dir(directory.path()).expect("it lists");
        assert_eq!(entries.count(), 1);
        remove(&path).expect("it goes");
        remove(&path).expect("it is gone, which is fine");
    }
}
