//! File operations that survive power loss. When they return, the content, the name and the
//! directory are on disk.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Gid, Uid, fchown, fstat},
    process::geteuid,
};

use crate::{CrashPoint, Error, Result};

/// Writes `bytes` to a new file at `path`. Fails if the file exists. A crash leaves either the
/// whole file or no file under that name.
///
/// # Errors
/// [`Error::Store`]; `AlreadyExists` inside when the name is taken.
pub fn write_new(path: &Path, bytes: &[u8]) -> Result<()> {
    let directory = parent(path);
    let temporary = tempfile::Builder::new()
        .prefix(".tidemark-")
        .tempfile_in(directory)
        .map_err(Error::store("create a file in", directory))?;
    File::open(directory)
        .and_then(|directory| keep_owner(temporary.as_file(), directory))
        .map_err(Error::store("change the owner of", path))?;
    temporary
        .as_file()
        .write_all(bytes)
        .map_err(Error::store("write", path))?;
    temporary
        .as_file()
        .sync_all()
        .map_err(Error::store("fsync", path))?;
    // Unlike a rename, a hard link never replaces an existing file. Dropping `temporary` removes
    // the temporary name.
    fs::hard_link(temporary.path(), path).map_err(Error::store("create", path))?;
    drop(temporary);
    sync_dir(directory)
}

/// Gives what root created to the owner of the directory that contains it. Otherwise a command that
/// root runs once would leave files in a repository or spool that its own user cannot read.
///
/// # Errors
/// Those of `fstat` and `fchown`.
pub(crate) fn keep_owner(created: impl AsFd, directory: impl AsFd) -> io::Result<()> {
    if !geteuid().is_root() {
        return Ok(());
    }
    let above = fstat(directory)?;
    if above.st_uid != 0 {
        let (user, group) = (Uid::from_raw(above.st_uid), Gid::from_raw(above.st_gid));
        fchown(created, Some(user), Some(group))?;
    }
    Ok(())
}

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
/// owner may enter them.
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
        match fs::DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => {
                let reached = CrashPoint::DirectoryCreated.reach();
                let synced = reached
                    .and_then(|()| keep_owner(File::open(&path)?, File::open(parent(&path))?))
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
            keep_owner(&file, File::open(parent(path))?)?;
            if let Ok(permissions) = permissions {
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
        write_new(&below.join("new"), b"one").expect("a file");
        replace(&below.join("record"), b"two").expect("a file");
        let store = crate::store::LocalStore::open(directory.path()).expect("a store");
        let put = crate::ObjectStore::put_if_absent(&store, "main/gap/object", b"three");
        put.expect("an object");
        for path in [
            "a",
            "a/b",
            "a/b/new",
            "a/b/record",
            "main",
            "main/gap/object",
        ] {
            let found = fs::metadata(directory.path().join(path)).expect("it is there");
            assert_eq!((found.uid(), found.gid()), (65_534, 65_534), "{path}");
        }
    }

    #[test]
    fn write_new_never_replaces() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("file");
        write_new(&path, b"one").expect("the name is free");
        let error = write_new(&path, b"two").expect_err("the name is taken");
        let Error::Store { source, .. } = error else {
            panic!("{error}")
        };
        assert_eq!(source.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).expect("it is there"), b"one");
        assert_eq!(
            fs::read_dir(directory.path()).expect("it lists").count(),
            1,
            "no leftovers"
        );
        replace(&path, b"three").expect("it replaces");
        assert_eq!(fs::read(&path).expect("it is there"), b"three");
        remove(&path).expect("it goes");
        remove(&path).expect("it is gone, which is fine");
    }
}
