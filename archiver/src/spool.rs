//! The spool: received WAL on this host's disk, fsynced, until the repository holds it.
//!
//! `{spool}/{cluster}/wal/{system identifier}/{branch}/` contains:
//! - `SEGMENT`: a complete segment that waits to be sealed.
//! - `SEGMENT.partial`, at most one: the open segment, written WAL followed by zeros.
//! - `history`: the branch's history file, except on timeline 1.
//! - `SEGMENT.new`: a copy of a segment that is being written.
//!
//! Invariant: the LSN at which streaming resumes is derived from these files' content alone. A
//! crash at any instant leaves a readable spool.

pub mod before;
pub mod branch;
pub(crate) mod files;
pub mod open_segment;
pub mod record;
pub mod writer;

#[cfg(test)]
mod tests;

use std::{
    fs::{self, File, TryLockError},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use intake::spool_files;
use wal_format::{Branch, WalIdentity, page::PageHeader};

use self::{
    branch::BranchSpool,
    files::{create_directory, names_in},
};
use crate::error::{Error, Result};

/// The file that the running archiver locks.
pub(crate) const LOCK_FILE: &str = "lock";

/// A cluster's spool, locked by this process.
#[derive(Debug)]
pub struct Spool {
    directory: PathBuf,
    /// The lock is released when this is dropped, and by the kernel when the process dies.
    _lock: File,
}

impl Spool {
    /// Opens or creates `{spool}/{cluster}` and locks it.
    ///
    /// # Errors
    /// [`Error::SpoolLocked`] if another archiver holds the lock; [`Error::Io`].
    pub fn open(spool: &Path, cluster: &wal_format::ClusterName) -> Result<Self> {
        let directory = spool.join(cluster.as_str());
        create_directory(&directory).map_err(|error| match error {
            Error::Io { source, .. } if is_denied(&source) => Error::SpoolDenied {
                path: directory.clone(),
                source,
            },
            error => error,
        })?;
        let path = directory.join(LOCK_FILE);
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(Error::io("open", &path))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self {
                directory,
                _lock: lock,
            }),
            Err(TryLockError::WouldBlock) => Err(Error::SpoolLocked { path }),
            Err(TryLockError::Error(source)) => Err(Error::io("lock", path)(source)),
        }
    }

    /// The path `{spool}/{cluster}`.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Returns the identity of the WAL in the spool, read from the first page of a segment. `None`
    /// for an empty spool.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::SpoolSystemMismatch`] if the spool holds WAL of two clusters.
    pub fn identity(&self) -> Result<Option<WalIdentity>> {
        stored_identity(&self.directory)
    }

    /// Returns the part of the spool for one branch. Creates nothing on disk.
    #[must_use]
    pub fn branch(&self, identity: &WalIdentity, branch: Branch) -> BranchSpool {
        BranchSpool::new(&self.directory, identity, branch)
    }

    /// Returns the branches that have a directory in the spool, oldest timeline first.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn branches(&self, identity: &WalIdentity) -> Result<Vec<BranchSpool>> {
        branches(&self.directory, identity)
    }
}

/// Checks that this user may write `{spool}/{cluster}`, or create it. Creates only a file without a
/// name, for a moment. Returns the free bytes of its file system. `None` if the system does not
/// report them.
///
/// # Errors
/// [`Error::SpoolDenied`], [`Error::Io`].
pub fn writable(cluster_directory: &Path) -> Result<Option<u64>> {
    let existing = cluster_directory
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or(cluster_directory);
    if let Err(source) = tempfile::tempfile_in(existing) {
        return Err(match is_denied(&source) {
            true => Error::SpoolDenied {
                path: cluster_directory.to_path_buf(),
                source,
            },
            false => Error::io("create a file in", existing)(source),
        });
    }
    Ok(rustix::fs::statvfs(existing)
        .ok()
        .map(|space| space.f_bavail.saturating_mul(space.f_frsize)))
}

/// Returns true if an archiver on this host holds the lock of `{spool}/{cluster}`. Reads the table
/// of the kernel: to try the lock could make an archiver fail that starts at this moment.
pub(crate) fn is_locked(cluster_directory: &Path) -> bool {
    let Ok(found) = fs::metadata(cluster_directory.join(LOCK_FILE)) else {
        return false;
    };
    // `1: FLOCK  ADVISORY  WRITE 4711 fd:01:131089 0 EOF` (`proc_locks(5)`). Btrfs shows another
    // device than `stat`, so only the inode counts.
    let inode = format!(":{}", found.ino());
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    let mut locks = locks.lines();
    locks.any(|line| {
        line.contains(" FLOCK ") && line.split_whitespace().any(|word| word.ends_with(&inode))
    })
}

fn is_denied(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::PermissionDenied
}

/// Returns the branches below `{spool}/{cluster}`. Does not take the lock, so that `status` can
/// call it.
///
/// # Errors
/// [`Error::Io`].
pub fn branches(cluster_directory: &Path, identity: &WalIdentity) -> Result<Vec<BranchSpool>> {
    let directory = spool_files::system_directory(cluster_directory, identity.system_identifier);
    let mut branches: Vec<Branch> = names_in(&directory)?
        .iter()
        .filter_map(|name| name.parse().ok())
        .collect();
    branches.sort_unstable();
    Ok(branches
        .into_iter()
        .map(|branch| BranchSpool::new(cluster_directory, identity, branch))
        .collect())
}

/// Returns the identity of the WAL in `{spool}/{cluster}`: see [`Spool::identity`].
///
/// # Errors
/// As [`Spool::identity`].
pub fn stored_identity(cluster_directory: &Path) -> Result<Option<WalIdentity>> {
    let wal = cluster_directory.join("wal");
    let mut found: Option<WalIdentity> = None;
    for system in names_in(&wal)? {
        for branch in names_in(&wal.join(&system))? {
            let directory = wal.join(&system).join(&branch);
            for name in names_in(&directory)? {
                if name == branch::HISTORY_FILE {
                    continue;
                }
                let Some(identity) = first_page_identity(&directory.join(name))? else {
                    continue;
                };
                if let Some(other) = found
                    && other.system_identifier != identity.system_identifier
                {
                    return Err(Error::SpoolSystemMismatch {
                        path: cluster_directory.to_path_buf(),
                        expected: other.system_identifier,
                        found: identity.system_identifier.to_string(),
                    });
                }
                found = Some(identity);
            }
        }
    }
    Ok(found)
}

/// Reads the identity from a file's `XLogLongPageHeaderData` (`xlog_internal.h`): the short header
/// of 24 bytes, then the system identifier, the segment size and the page size.
fn first_page_identity(path: &Path) -> Result<Option<WalIdentity>> {
    use std::io::Read;
    let mut header = [0; 40];
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("open", path)(error)),
    };
    match file.read_exact(&mut header) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(Error::io("read", path)(error)),
    }
    Ok(PageHeader::parse(&header).and_then(|header| header.identity()))
}
