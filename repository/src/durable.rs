//! File operations that survive power loss. When they return, the content, the name and the
//! directory are on disk.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
};

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, Stat, fsync, mkdirat, openat, statat, unlinkat},
    io::Errno,
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
    create_dir_all_at(directory, CrashPoint::DirectoryCreated)
}

/// Like [`create_dir_all`], with the crash point that each new directory reaches.
///
/// # Errors
/// [`Error::Store`].
pub fn create_dir_all_at(directory: &Path, created: CrashPoint) -> Result<()> {
    let Some(name) = directory.file_name() else {
        return Ok(());
    };
    let above = parent(directory);
    let existed = directory.is_dir();
    if !existed {
        create_dir_all_at(above, created)?;
    }
    let made =
        File::open(above).and_then(|above| create_directory(&above, Path::new(name), created));
    match made {
        // Then the directory was not created by a process of this user, or it is a mount point in
        // a file system that nobody can write to and that may have no fsync.
        Err(error)
            if existed
                && matches!(
                    error.kind(),
                    io::ErrorKind::PermissionDenied
                        | io::ErrorKind::InvalidInput
                        | io::ErrorKind::ReadOnlyFilesystem
                ) =>
        {
            Ok(())
        }
        made => made.map_err(Error::store("create directory", directory)),
    }
}

/// Creates the directory `name` in `above`, durably, if it is missing.
///
/// The fsync of `above` is repeated for an existing directory: the process that created it may have
/// been killed before its fsync. A directory of which this process cannot prove that it is durable
/// is removed again.
///
/// # Errors
/// Those of the system calls, and of the crash point.
pub(crate) fn create_directory(
    above: impl AsFd,
    name: &Path,
    created: CrashPoint,
) -> io::Result<()> {
    create_and_sync(above, name, created, |above| Ok(fsync(above)?))
}

fn create_and_sync(
    above: impl AsFd,
    name: &Path,
    created: CrashPoint,
    sync: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>,
) -> io::Result<()> {
    let above = above.as_fd();
    let mode = Mode::from_raw_mode(access::directory_mode(above)?);
    let is_directory = |found: Stat| FileType::from_raw_mode(found.st_mode).is_dir();
    if statat(above, name, AtFlags::empty()).is_ok_and(is_directory) {
        return sync(above);
    }
    match mkdirat(above, name, mode) {
        Ok(()) => {}
        // Another writer created it first.
        Err(Errno::EXIST) => return sync(above),
        Err(error) => return Err(error.into()),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let durable = created
        .reach()
        .and_then(|()| access::inherit(openat(above, name, flags, Mode::empty())?, above))
        .and_then(|()| sync(above));
    if durable.is_err() {
        // A later attempt has to create it again.
        let _removed = unlinkat(above, name, AtFlags::REMOVEDIR);
    }
    durable
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
    fn a_directory_is_made_durable_even_if_another_process_created_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let above = File::open(directory.path()).expect("it opens");
        let name = Path::new("a");
        let path = directory.path().join(name);
        let fail = || {
            let point = CrashPoint::DirectoryCreated;
            create_and_sync(&above, name, point, |_| Err(Errno::IO.into()))
        };
        fail().expect_err("the fsync fails");
        assert!(!path.exists(), "nobody proved that it is durable");
        fs::create_dir(&path).expect("another process creates it, and is killed");
        fail().expect_err("the fsync is repeated");
        assert!(path.is_dir(), "it may contain something");
        create_dir_all(&path.join("b/c")).expect("it exists");
        create_dir_all(&path.join("b/c")).expect("it exists");
        assert!(path.join("b/c").is_dir());
        fs::write(path.join("file"), "").expect("a file");
        create_dir_all(&path.join("file/d")).expect_err("a file is not a directory");
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
