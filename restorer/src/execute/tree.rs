//! [`Tree`]: all operations on the directories of a restore.
//!
//! Invariant: nothing is opened, created or removed outside the directories that the plan names. A
//! name has to stay below its directory ([`stays_below`]), and no part of it is followed if it is a
//! symbolic link, regardless of who created the link and when. The kernel resolves each name below
//! an open directory (`openat2` with `RESOLVE_BENEATH`). On a kernel without this call, each part
//! is opened separately with `O_NOFOLLOW`.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read, Write},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::{
    fs::{
        AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, mkdirat, openat, openat2, renameat,
        statat, symlinkat, syncfs, unlinkat,
    },
    io::Errno,
};
use wal_format::relative_path::stays_below;

use crate::{Error, Result};

/// The permissions of directories and of files that a restore writes itself. The umask of the
/// process removes the group's access if the server has none (`Access::apply`).
const DIRECTORY_MODE: Mode = Mode::RWXU.union(Mode::RGRP).union(Mode::XGRP);
const FILE_MODE: Mode = Mode::RUSR.union(Mode::WUSR).union(Mode::RGRP);

/// The open directories of a restore. Names are those of `backup_manifest`: relative to the data
/// directory, with `pg_tblspc/OID/` before the names of a tablespace.
#[derive(Debug)]
pub(super) struct Tree {
    /// The directories. The data directory is the last one, because its prefix matches every name.
    roots: Vec<Root>,
    /// Set when the kernel has no `openat2`.
    no_openat2: AtomicBool,
}

#[derive(Debug)]
pub(super) struct Root {
    /// The prefix of the names in this directory: empty, `pg_wal`, or `pg_tblspc/OID`.
    pub(super) prefix: String,
    /// The path that the operator gave, for messages.
    pub(super) path: PathBuf,
    pub(super) directory: OwnedFd,
}

impl Tree {
    /// Opens the data directory and the directories that the plan gives to tablespaces. A `pg_wal`
    /// that is a link to a directory, as `initdb --waldir` creates it, is opened as a separate
    /// directory.
    pub(super) fn open(directory: &Path, tablespaces: &BTreeMap<u32, PathBuf>) -> Result<Self> {
        let mut roots = Vec::new();
        for (oid, path) in tablespaces {
            roots.push(Root::open(format!("pg_tblspc/{oid}"), path)?);
        }
        let wal = directory.join("pg_wal");
        if wal.is_symlink() && wal.is_dir() {
            roots.push(Root::open("pg_wal".to_owned(), &wal)?);
        }
        roots.push(Root::open(String::new(), directory)?);
        Ok(Self {
            roots,
            no_openat2: AtomicBool::new(false),
        })
    }

    /// Returns every directory, the data directory last.
    pub(super) fn roots(&self) -> &[Root] {
        &self.roots
    }

    /// Returns true if `name` is itself one of the open directories.
    pub(super) fn is_root(&self, name: &str) -> bool {
        self.roots.iter().any(|root| root.prefix == name)
    }

    /// Opens a file for reading.
    pub(super) fn read(&self, name: &str) -> Result<File> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK;
        self.open_file("open", name, flags, Mode::empty())
    }

    /// Like [`Tree::read`], but returns `None` when the file does not exist.
    pub(super) fn read_if_there(&self, name: &str) -> Result<Option<File>> {
        let found = self.read(name);
        match found {
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            found => found.map(Some),
        }
    }

    /// Opens a file for writing without truncating it. Creates it and its directory if necessary.
    /// Other threads may do the same at the same time.
    pub(super) fn create(&self, name: &str, mode: u32) -> Result<File> {
        let flags = OFlags::WRONLY | OFlags::CREATE;
        let mode = Mode::from_raw_mode(mode & 0o750 | 0o600);
        match self.open_file("create", name, flags, mode) {
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                if let Some((parent, _)) = name.rsplit_once('/') {
                    self.create_directory(parent)?;
                }
                self.open_file("create", name, flags, mode)
            }
            opened => opened,
        }
    }

    /// Writes a file and replaces its content if it exists.
    pub(super) fn write(&self, name: &str, content: &[u8]) -> Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC;
        self.open_file("write", name, flags, FILE_MODE)?
            .write_all(content)
            .map_err(Error::io("write", self.shown(name)))
    }

    /// Replaces the content of a file durably. After a crash the file has the old or the new
    /// content.
    pub(super) fn replace(&self, name: &str, content: &[u8]) -> Result<()> {
        let fresh = format!("{name}.new");
        self.remove(&fresh)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        let mut file = self.open_file("write", &fresh, flags, FILE_MODE)?;
        let written = file.write_all(content).and_then(|()| file.sync_all());
        written.map_err(Error::io("write", self.shown(&fresh)))?;
        let (directory, last) = self.parent("rename", name)?;
        let renamed = renameat(&directory, format!("{last}.new"), &directory, last)
            .and_then(|()| rustix::fs::fsync(&directory));
        renamed.map_err(|error| self.failed("rename", name, error))
    }

    /// Removes a file or a link. Succeeds when it does not exist.
    pub(super) fn remove(&self, name: &str) -> Result<()> {
        self.remove_and(name, |_| Ok(()))
    }

    /// Like [`Tree::remove`], but durable: the name is also absent after a crash.
    pub(super) fn remove_durably(&self, name: &str) -> Result<()> {
        self.remove_and(name, |directory| rustix::fs::fsync(directory))
    }

    fn remove_and(
        &self,
        name: &str,
        settle: impl FnOnce(&OwnedFd) -> rustix::io::Result<()>,
    ) -> Result<()> {
        let removed = self.parent("remove", name).and_then(|(directory, last)| {
            unlinkat(&directory, last, AtFlags::empty())
                .and_then(|()| settle(&directory))
                .map_err(|error| self.failed("remove", name, error))
        });
        match removed {
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }

    /// Creates the link `name` to `target`, and replaces an existing link.
    pub(super) fn link(&self, name: &str, target: &Path) -> Result<()> {
        if let Some((parent, _)) = name.rsplit_once('/') {
            self.create_directory(parent)?;
        }
        // All other operations treat the name of a tablespace as a separate directory, so locate
        // the link in the data directory.
        let (directory, last) = self.parent_in(self.data_directory(), "link", name, name)?;
        match unlinkat(&directory, last, AtFlags::empty()) {
            Err(error) if error != Errno::NOENT => {
                return Err(self.failed("replace", name, error));
            }
            _ => {}
        }
        symlinkat(target, &directory, last).map_err(|error| self.failed("link", name, error))
    }

    /// Returns true if the name exists.
    pub(super) fn exists(&self, name: &str) -> Result<bool> {
        let found = self.parent("look at", name).and_then(|(directory, last)| {
            statat(&directory, last, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(|error| self.failed("look at", name, error))
        });
        match found {
            Ok(_) => Ok(true),
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Creates a directory and its missing parents.
    pub(super) fn create_directory(&self, name: &str) -> Result<()> {
        let (root, rest) = self.locate(name)?;
        let mut directory = None;
        for part in rest.split('/').filter(|part| !part.is_empty()) {
            let above = directory.as_ref().unwrap_or(&root.directory);
            match mkdirat(above, part, DIRECTORY_MODE) {
                Err(error) if error != Errno::EXIST => {
                    return Err(self.failed("create directory", name, error));
                }
                _ => {}
            }
            let opened = openat(above, part, DIRECTORY | OFlags::NOFOLLOW, Mode::empty());
            directory = Some(opened.map_err(|error| self.failed("create directory", name, error))?);
        }
        Ok(())
    }

    /// Makes all files and names in every directory durable.
    pub(super) fn sync(&self) -> Result<()> {
        for root in &self.roots {
            syncfs(&root.directory)
                .map_err(|error| Error::io("fsync", &root.path)(error.into()))?;
        }
        Ok(())
    }

    /// Returns the directory to which a name belongs, and the part of the name below it.
    fn locate<'n>(&self, name: &'n str) -> Result<(&Root, &'n str)> {
        if !name.is_empty() && !stays_below(name) {
            return Err(Error::Damaged {
                object: format!("the name \"{}\" in the backup", name.escape_debug()),
                problem: "it leads out of the target directory".to_owned(),
            });
        }
        for root in &self.roots {
            if root.prefix == name {
                return Ok((root, ""));
            }
            let below = name.strip_prefix(&root.prefix);
            if let Some(rest) = below.and_then(|rest| rest.strip_prefix('/')) {
                return Ok((root, rest));
            }
        }
        Ok((self.data_directory(), name))
    }

    fn data_directory(&self) -> &Root {
        self.roots.last().expect("BUG: a tree has a data directory")
    }

    /// Returns the path of a name, for messages.
    pub(super) fn shown(&self, name: &str) -> PathBuf {
        match self.locate(name) {
            Ok((root, rest)) => root.path.join(rest),
            Err(_) => PathBuf::from(name),
        }
    }

    fn failed(&self, action: &'static str, name: &str, error: Errno) -> Error {
        let path = self.shown(name);
        // `LOOP` means a symbolic link on the way, `XDEV` one that leads out of the directory.
        if matches!(error, Errno::LOOP | Errno::XDEV) {
            return Error::usage(format!(
                "{} is or is reached through a symbolic link, which a restore does not follow; remove the link, or give an \
                 empty directory",
                path.display()
            ));
        }
        Error::io(action, path)(error.into())
    }

    fn open_file(
        &self,
        action: &'static str,
        name: &str,
        flags: OFlags,
        mode: Mode,
    ) -> Result<File> {
        let (root, rest) = self.locate(name)?;
        let opened = self.open_below(root, rest, flags | OFlags::CLOEXEC, mode);
        opened
            .map(File::from)
            .map_err(|error| self.failed(action, name, error))
    }

    /// Opens `rest` below `root` without following a link.
    fn open_below(
        &self,
        root: &Root,
        rest: &str,
        flags: OFlags,
        mode: Mode,
    ) -> rustix::io::Result<OwnedFd> {
        if rest.is_empty() {
            return openat(&root.directory, ".", flags, mode);
        }
        if !self.no_openat2.load(Ordering::Relaxed) {
            let resolve =
                ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
            match openat2(&root.directory, rest, flags, mode, resolve) {
                Err(Errno::NOSYS) => self.no_openat2.store(true, Ordering::Relaxed),
                // A sandbox does not know the call, or a part of the name was moved meanwhile.
                Err(Errno::PERM | Errno::AGAIN) => {}
                opened => return opened,
            }
        }
        let (above, last) = match rest.rsplit_once('/') {
            Some((above, last)) => (Some(above), last),
            None => (None, rest),
        };
        let mut directory = None;
        for part in above.into_iter().flat_map(|above| above.split('/')) {
            let from = directory.as_ref().unwrap_or(&root.directory);
            directory = Some(openat(
                from,
                part,
                DIRECTORY | OFlags::NOFOLLOW,
                Mode::empty(),
            )?);
        }
        let from = directory.as_ref().unwrap_or(&root.directory);
        openat(from, last, flags | OFlags::NOFOLLOW, mode)
    }

    /// Returns the open directory that contains `name`, and the last part of the name.
    fn parent<'n>(&self, action: &'static str, name: &'n str) -> Result<(OwnedFd, &'n str)> {
        let (root, rest) = self.locate(name)?;
        self.parent_in(root, action, name, rest)
    }

    fn parent_in<'n>(
        &self,
        root: &Root,
        action: &'static str,
        name: &str,
        rest: &'n str,
    ) -> Result<(OwnedFd, &'n str)> {
        let (above, last) = rest.rsplit_once('/').unwrap_or(("", rest));
        let directory = self
            .open_below(root, above, DIRECTORY, Mode::empty())
            .map_err(|error| self.failed(action, name, error))?;
        Ok((directory, last))
    }
}

/// The flags with which directories are opened.
const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);

impl Root {
    fn open(prefix: String, path: &Path) -> Result<Self> {
        let directory = openat(CWD, path, DIRECTORY, Mode::empty())
            .map_err(|error| Error::io("open", path)(error.into()))?;
        Ok(Self {
            prefix,
            path: path.to_owned(),
            directory,
        })
    }
}

/// Calls `each` with the name and the metadata of every entry of `directory`, without following
/// links.
pub(super) fn entries(
    directory: &OwnedFd,
    shown: &Path,
    each: &mut dyn FnMut(&std::ffi::CStr, rustix::fs::Stat) -> Result<()>,
) -> Result<()> {
    let list = |error: Errno| Error::io("list", shown)(error.into());
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(directory).map_err(list)? {
        let entry = entry.map_err(list)?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    // Collect the names first, because `each` may remove an entry.
    for name in names {
        match statat(directory, &*name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(metadata) => each(&name, metadata)?,
            Err(Errno::NOENT) => {}
            Err(error) => return Err(list(error)),
        }
    }
    Ok(())
}

/// Opens the directory `name` in `directory`, unless it is a link.
pub(super) fn open_directory(directory: &OwnedFd, name: &std::ffi::CStr) -> io::Result<OwnedFd> {
    Ok(openat(
        directory,
        name,
        DIRECTORY | OFlags::NOFOLLOW,
        Mode::empty(),
    )?)
}

/// Removes `name` from `directory`: an empty directory with `is_directory`, otherwise a file or a
/// link.
pub(super) fn remove_entry(
    directory: &OwnedFd,
    name: &std::ffi::CStr,
    is_directory: bool,
) -> io::Result<()> {
    let flags = if is_directory {
        AtFlags::REMOVEDIR
    } else {
        AtFlags::empty()
    };
    Ok(unlinkat(directory, name, flags)?)
}

/// Returns the file type in `metadata`.
pub(super) fn kind(metadata: &rustix::fs::Stat) -> FileType {
    FileType::from_raw_mode(metadata.st_mode)
}

/// Reads a small file completely. A file longer than `bytes_max` is an error.
pub(super) fn read_small(mut file: File, shown: &Path, bytes_max: u64) -> Result<Vec<u8>> {
    let mut content = Vec::new();
    let read = (&mut file)
        .take(bytes_max.saturating_add(1))
        .read_to_end(&mut content);
    read.map_err(Error::io("read", shown))?;
    if content.len() as u64 > bytes_max {
        let source = io::Error::new(io::ErrorKind::InvalidData, "it is too long");
        return Err(Error::io("read", shown)(source));
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    /// Creates a data directory with links that lead out of it, and the targets of the links.
    fn scene() -> (tempfile::TempDir, PathBuf) {
        let root = tempfile::tempdir().expect("a directory");
        let data = root.path().join("data");
        fs::create_dir_all(data.join("base/1")).expect("a directory");
        fs::create_dir(root.path().join("outside")).expect("a directory");
        fs::write(root.path().join("outside/file"), "theirs").expect("a file");
        symlink(root.path().join("outside"), data.join("out")).expect("a link");
        symlink("../outside/file", data.join("file")).expect("a link");
        symlink("base", data.join("inside")).expect("a link");
        (root, data)
    }

    /// Returns trees with both ways to resolve a name: by the kernel, and part by part.
    fn trees(data: &Path) -> [Tree; 2] {
        let with = Tree::open(data, &BTreeMap::new()).expect("it opens");
        let without = Tree::open(data, &BTreeMap::new()).expect("it opens");
        without.no_openat2.store(true, Ordering::Relaxed);
        [with, without]
    }

    #[test]
    fn no_operation_follows_a_link_or_leaves_the_directory() {
        let (root, data) = scene();
        for tree in trees(&data) {
            let outcomes = |name: &str| {
                vec![
                    tree.read(name).map(drop),
                    tree.create(name, 0o600).map(drop),
                    tree.write(name, b"ours"),
                ]
            };
            for name in ["out/file", "out/new", "file", "inside/1/new"] {
                for outcome in outcomes(name) {
                    let error = outcome.expect_err(name).to_string();
                    assert!(
                        error.contains("symbolic link") || error.contains("Not a dir"),
                        "{error}"
                    );
                }
            }
            for name in [
                "/etc/passwd",
                "../outside/file",
                "base/../../outside/file",
                "a\0b",
            ] {
                for outcome in outcomes(name) {
                    let error = outcome.expect_err(name).to_string();
                    assert!(error.contains("leads out of the target"), "{error}");
                }
                assert!(tree.remove(name).is_err() && tree.create_directory(name).is_err());
                assert!(tree.replace(name, b"ours").is_err() && tree.exists(name).is_err());
            }
            assert!(tree.remove("out/file").is_err());
            assert!(tree.create_directory("out/directory").is_err());
            assert!(tree.replace("out/file", b"ours").is_err());
        }
        let theirs = fs::read_to_string(root.path().join("outside/file"));
        assert_eq!(theirs.expect("it is there"), "theirs");
        let count = fs::read_dir(root.path().join("outside"))
            .expect("it lists")
            .count();
        assert_eq!(count, 1, "something was made outside");
    }

    #[test]
    fn names_below_the_directory_work() {
        let (_root, data) = scene();
        for tree in trees(&data) {
            let mut file = tree.create("base/5/16384", 0o640).expect("it is created");
            file.write_all(b"one").expect("it is written");
            let file = tree.read("base/5/16384").expect("it opens");
            let content = read_small(file, &data, 100).expect("it is read");
            assert_eq!(content, b"one");
            tree.replace("base/5/16384", b"three")
                .expect("it is replaced");
            assert!(tree.exists("base/5/16384").expect("it is looked at"));
            assert!(!tree.exists("base/5/16384.new").expect("it is looked at"));
            // The link itself may be removed and replaced.
            tree.replace("file", b"a file now")
                .expect("the link is replaced");
            tree.remove("base/5/16384").expect("it goes");
            tree.remove("base/5/16384").expect("it is gone");
            tree.link("pg_tblspc/1", Path::new("/srv")).expect("a link");
            tree.link("pg_tblspc/1", Path::new("/srv/x"))
                .expect("another link");
            let target = fs::read_link(data.join("pg_tblspc/1")).expect("it is a link");
            assert_eq!(target, Path::new("/srv/x"));
        }
    }

    #[test]
    fn a_tablespace_is_a_directory_of_its_own() {
        let (root, data) = scene();
        let place = root.path().join("outside");
        symlink(root.path().join("nowhere"), data.join("pg_tblspc")).expect("a link");
        let tablespaces = BTreeMap::from([(16_400, place.clone())]);
        let tree = Tree::open(&data, &tablespaces).expect("it opens");
        tree.write("pg_tblspc/16400/PG_VERSION", b"17")
            .expect("it is written");
        assert_eq!(
            fs::read(place.join("PG_VERSION")).expect("it is there"),
            b"17"
        );
        // Any other OID is a name in the data directory.
        assert!(tree.write("pg_tblspc/16401/x", b"17").is_err());
    }
}
