//! [`Entered`]: the folder of a store, held by a directory handle for one operation.
//!
//! A handle that stays open between operations would make every unmount fail with EBUSY. A device
//! number alone proves nothing between two operations, because the next disk or tmpfs may get the
//! same number. So each operation opens the folder, looks for a witness below that handle, works
//! below that handle, and compares the path with the handle at the end.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Read, Write},
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use rustix::{
    fs::{
        AtFlags, Mode, OFlags, RenameFlags, fstat, linkat, open, openat, renameat_with, unlinkat,
    },
    io::Errno,
};

use super::{LocalStore, TEMPORARY};
use crate::{CrashPoint, Error, ObjectStore, Result, access, durable::create_directory};

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);
/// A witness is a small JSON object. This bounds the memory that a foreign object can take.
const WITNESS_BYTES_MAX: u64 = 64 << 10;
/// The number of names that are tried for a temporary file. Not even one collision was ever
/// observed.
const NAMES_MAX: u32 = 16;

/// The number of directories that are remembered as durable. Beyond it, the fsyncs are repeated.
const DURABLE_MAX: usize = 1000;

/// The directories of a folder that this process has made durable. A directory that another process
/// created may not be: that process may have been killed before its fsync.
#[derive(Debug, Default)]
pub(super) struct DurableDirectories {
    /// Device and inode of the folder.
    place: (u64, u64),
    paths: BTreeSet<String>,
}

impl DurableDirectories {
    fn holds(&self, place: (u64, u64), path: &str) -> bool {
        self.place == place && self.paths.contains(path)
    }

    fn add(&mut self, place: (u64, u64), path: &str) {
        if self.place != place || self.paths.len() >= DURABLE_MAX {
            self.paths.clear();
        }
        self.place = place;
        self.paths.insert(path.to_owned());
    }
}

/// A store's folder, open for one operation.
pub(super) struct Entered<'a> {
    store: &'a LocalStore,
    directory: OwnedFd,
    /// Device and inode. No other directory has the same pair while the handle is open.
    place: (u64, u64),
}

impl<'a> Entered<'a> {
    /// Opens the folder. Checks that a pinned folder contains one of its witnesses.
    ///
    /// # Errors
    /// [`Error::Gone`], [`Error::Store`].
    pub(super) fn open(store: &'a LocalStore) -> Result<Self> {
        let directory = open(&store.root, DIRECTORY, Mode::empty())
            .map_err(|error| store.cannot_open(error.into()))?;
        let found = fstat(&directory)
            .map_err(|error| Error::store("look at", &store.root)(error.into()))?;
        let folder = Self {
            store,
            directory,
            place: (found.st_dev, found.st_ino),
        };
        if let Some(pin) = store.pinned() {
            pin.check(&store.url(), |key| folder.read(key))?;
        }
        Ok(folder)
    }

    /// Reads a small object. `None` when it is not in this folder.
    pub(super) fn read(&self, key: &str) -> Result<Option<Bytes>> {
        let opened = openat(
            &self.directory,
            key,
            // A FIFO in the place of the object must not stop us.
            OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK,
            Mode::empty(),
        );
        let failed = |error: io::Error| Error::store("read", self.store.root.join(key))(error);
        match opened {
            Ok(file) => {
                let mut stored = Vec::new();
                File::from(file)
                    .take(WITNESS_BYTES_MAX)
                    .read_to_end(&mut stored)
                    .map_err(failed)?;
                Ok(Some(stored.into()))
            }
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(error) => Err(failed(error.into())),
        }
    }

    /// Opens the directory of a key, and creates it durably if it is missing. Only the owner may
    /// enter it.
    pub(super) fn create_parent(&self, key: &str) -> Result<OwnedFd> {
        let parent = key.rsplit_once('/').map_or(".", |(parent, _)| parent);
        self.create_directory(parent)
            .map_err(|error| Error::store("create directory", self.store.root.join(parent))(error))
    }

    fn create_directory(&self, path: &str) -> io::Result<OwnedFd> {
        let is_durable = self.store.durable().holds(self.place, path);
        if is_durable {
            match openat(&self.directory, path, DIRECTORY, Mode::empty()) {
                Err(Errno::NOENT) => {}
                opened => return Ok(opened?),
            }
        }
        let mut above = openat(&self.directory, ".", DIRECTORY, Mode::empty())?;
        for part in path.split('/').filter(|part| *part != ".") {
            create_directory(&above, Path::new(part), CrashPoint::DirectoryCreated)?;
            above = openat(&above, part, DIRECTORY, Mode::empty())?;
        }
        self.store.durable().add(self.place, path);
        Ok(above)
    }

    /// Checks that a file can be created here and get a name that never replaces another one.
    /// Nothing stays behind.
    pub(super) fn probe(&self) -> io::Result<()> {
        let directory = match openat(&self.directory, TEMPORARY, DIRECTORY, Mode::empty()) {
            // The first write creates it.
            Err(Errno::NOENT) => openat(&self.directory, ".", DIRECTORY, Mode::empty())?,
            opened => opened?,
        };
        let mut probe = self.temporary_in(directory, ".tidemark-probe-")?;
        probe.file().write_all(b"probe")?;
        let name = format!("{}-named", probe.name);
        let linked = probe.link(&self.directory, &name);
        let _removed = unlinkat(&self.directory, &name, AtFlags::empty());
        linked
    }

    /// Creates a file under a name that no reader looks for. The name is removed on drop.
    pub(super) fn temporary(&self) -> Result<Temporary> {
        let place = || self.store.root.join(TEMPORARY);
        let failed = |error: io::Error| Error::store("create a file in", place())(error);
        let directory = self.create_directory(TEMPORARY).map_err(failed)?;
        self.temporary_in(directory, "").map_err(failed)
    }

    fn temporary_in(&self, directory: OwnedFd, prefix: &str) -> io::Result<Temporary> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        for _ in 0..NAMES_MAX {
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            // Another host may write to the same folder with the same process id.
            let chance = rustix::time::clock_gettime(rustix::time::ClockId::Realtime).tv_nsec;
            let name = format!("{prefix}{:x}-{number:x}-{chance:x}", std::process::id());
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            match openat(&directory, &name, flags, Mode::RUSR | Mode::WUSR) {
                Ok(file) => {
                    access::inherit(&file, &directory)?;
                    return Ok(Temporary {
                        directory,
                        name,
                        file: file.into(),
                    });
                }
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    /// Removes an object durably. Succeeds when the object does not exist.
    pub(super) fn remove(&self, key: &str) -> io::Result<()> {
        let (parent, name) = key.rsplit_once('/').unwrap_or((".", key));
        let directory = match openat(&self.directory, parent, DIRECTORY, Mode::empty()) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
            opened => opened?,
        };
        match unlinkat(&directory, name, AtFlags::empty()) {
            Err(Errno::NOENT) => Ok(()),
            removed => {
                removed?;
                CrashPoint::FileRemoved.reach()?;
                sync(&directory)
            }
        }
    }

    /// Ends the operation: checks that the path still leads to this folder.
    ///
    /// # Errors
    /// [`Error::Gone`] when it does not: readers cannot see what was written.
    pub(super) fn leave(self) -> Result<()> {
        let root = &self.store.root;
        let found = fs::metadata(root).map_err(|error| self.store.cannot_open(error))?;
        if (found.dev(), found.ino()) == self.place {
            return Ok(());
        }
        let problem = "another folder took its place while it was written to";
        Err(match self.store.pinned() {
            Some(pin) => pin.gone(&self.store.url(), problem.to_owned()),
            None => Error::store("write to", root)(io::Error::other(problem)),
        })
    }
}

/// A file that does not have the name of its key yet.
pub(super) struct Temporary {
    directory: OwnedFd,
    name: String,
    file: File,
}

impl Temporary {
    pub(super) fn file(&mut self) -> &mut File {
        &mut self.file
    }

    /// Gives the file the name of a key, in the key's directory. Never replaces an existing file.
    pub(super) fn link(&self, directory: &OwnedFd, key: &str) -> io::Result<()> {
        let name = key.rsplit_once('/').map_or(key, |(_, name)| name);
        let linked = linkat(
            &self.directory,
            &self.name,
            directory,
            name,
            AtFlags::empty(),
        );
        match linked {
            Err(error) if without_links(error) => self.rename(directory, name),
            linked => Ok(linked?),
        }
    }

    /// Does the same on a file system without hard links (FAT, some network file systems).
    fn rename(&self, directory: &OwnedFd, name: &str) -> io::Result<()> {
        let renamed = renameat_with(
            &self.directory,
            &self.name,
            directory,
            name,
            RenameFlags::NOREPLACE,
        );
        match renamed {
            Err(error) if without_links(error) => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this file system has neither hard links nor a rename that never replaces a file, so two archivers could \
                 overwrite each other's objects; name a folder on a local Linux file system (ext4, XFS, Btrfs, ZFS), on \
                 NFS, or a bucket",
            )),
            renamed => Ok(renamed?),
        }
    }
}

/// Returns true if the file system does not have the operation: `EPERM` from `link(2)`, `EINVAL`
/// from `renameat2(2)`, `EOPNOTSUPP` and `ENOSYS` from both.
fn without_links(error: Errno) -> bool {
    matches!(
        error,
        Errno::PERM | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS
    )
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Err(error) = unlinkat(&self.directory, &self.name, AtFlags::empty()) {
            tracing::debug!(%error, "a temporary file stays");
        }
    }
}

/// Makes the entries of a directory durable.
pub(super) fn sync(directory: &OwnedFd) -> io::Result<()> {
    Ok(rustix::fs::fsync(directory)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rename_instead_of_a_link_never_replaces_a_file() {
        let directory = tempfile::tempdir().expect("a directory");
        let store = LocalStore::open(directory.path()).expect("a store");
        let folder = Entered::open(&store).expect("it opens");
        let into = folder.create_parent("main/x").expect("a directory");
        for (content, kind) in [
            ("first", None),
            ("second", Some(io::ErrorKind::AlreadyExists)),
        ] {
            let mut temporary = folder.temporary().expect("a file");
            let written = temporary.file().write_all(content.as_bytes());
            written.expect("it is written");
            let renamed = temporary.rename(&into, "x");
            assert_eq!(renamed.err().map(|error| error.kind()), kind);
        }
        let stored = fs::read_to_string(directory.path().join("main/x"));
        assert_eq!(stored.expect("an object"), "first");
        let left = fs::read_dir(directory.path().join(TEMPORARY)).expect("it lists");
        assert_eq!(left.count(), 0);
    }

    #[test]
    fn a_probe_leaves_nothing_behind() {
        let directory = tempfile::tempdir().expect("a directory");
        let store = LocalStore::at(directory.path());
        let folder = Entered::open(&store).expect("it opens");
        folder.probe().expect("links work here");
        let left = fs::read_dir(directory.path()).expect("it lists");
        assert_eq!(left.count(), 0);
        // procfs has neither.
        let store = LocalStore::at(Path::new("/proc"));
        let folder = Entered::open(&store).expect("it opens");
        assert!(folder.probe().is_err());
    }
}
