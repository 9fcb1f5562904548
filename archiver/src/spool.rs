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

mod before;
mod open_segment;
mod record;
mod writer;

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    fs::{self, File, TryLockError},
    io,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use intake::spool_files;
use repository::{CrashPoint, durable};
use wal_format::{
    Branch, Lsn, SegmentName, SegmentNo, SegmentSize, WalFileName, WalIdentity, page::PageHeader,
};

pub use before::Before;
pub use open_segment::OpenSegment;
pub use record::SpoolRecord;
pub(crate) use record::remove_record;
pub use writer::{CompletedSegment, SpoolWriter, TailCut};

use crate::error::{Error, Result};
use open_segment::of_the_disk;

/// The file that the running archiver locks.
const LOCK_FILE: &str = "lock";
/// The branch's history file, stored next to its WAL so that it reaches the repository first.
const HISTORY_FILE: &str = "history";
/// The suffix of a file that is written first and then renamed, `history.new` included.
const COPY_SUFFIX: &str = ".new";

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
                if name == HISTORY_FILE {
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

/// The spool files of one branch.
#[derive(Clone, Debug)]
pub struct BranchSpool {
    directory: PathBuf,
    branch: Branch,
    segment_size: SegmentSize,
}

/// The segments in a branch's directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpooledSegments {
    /// The complete segments, in ascending order.
    pub complete: Vec<SegmentNo>,
    /// The open segment (the first whose file was not renamed) and the length of its content in
    /// bytes.
    pub open: Option<(SegmentNo, u64)>,
    /// Segments after the open one, left by a crash. Segments are renamed in order before anything
    /// after them is reported, so nothing of these was ever acknowledged.
    pub unacknowledged: Vec<SegmentNo>,
}

impl BranchSpool {
    fn new(cluster_directory: &Path, identity: &WalIdentity, branch: Branch) -> Self {
        Self {
            directory: spool_files::branch_directory(
                cluster_directory,
                identity.system_identifier,
                branch,
            ),
            branch,
            segment_size: identity.segment_size,
        }
    }

    /// The branch of these files.
    #[must_use]
    pub fn branch(&self) -> Branch {
        self.branch
    }

    /// The cluster's segment size.
    #[must_use]
    pub fn segment_size(&self) -> SegmentSize {
        self.segment_size
    }

    /// The branch's directory. It may not exist yet.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Creates the directory durably.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(&self) -> Result<()> {
        create_directory(&self.directory)
    }

    /// Returns a segment's file name without a suffix.
    #[must_use]
    pub fn name(&self, segment: SegmentNo) -> SegmentName {
        SegmentName::new(self.branch.timeline, segment, self.segment_size)
    }

    /// Returns the path of a complete segment.
    #[must_use]
    pub fn path(&self, segment: SegmentNo) -> PathBuf {
        self.directory.join(self.name(segment).to_string())
    }

    /// Returns the path of an open segment.
    #[must_use]
    pub fn partial_path(&self, segment: SegmentNo) -> PathBuf {
        self.directory
            .join(WalFileName::Partial(self.name(segment)).to_string())
    }

    /// Lists the segments in the directory. A missing directory counts as empty.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn segments(&self) -> Result<SpooledSegments> {
        let mut found = SpooledSegments::default();
        let mut open = BTreeMap::new();
        for name in names_in(&self.directory)? {
            match name.parse() {
                Ok(WalFileName::Segment(name)) => {
                    found.complete.extend(name.segment(self.segment_size));
                }
                Ok(WalFileName::Partial(segment)) => {
                    let path = self.directory.join(&name);
                    let length = File::open(&path)
                        .and_then(|file| spool_files::content_length(&file))
                        .map_err(Error::io("read", &path))?;
                    open.extend(segment.segment(self.segment_size).map(|s| (s, length)));
                }
                _ => {}
            }
        }
        found.complete.sort_unstable();
        found.open = open.pop_first();
        found.unacknowledged = open.into_keys().collect();
        Ok(found)
    }

    /// Returns the bytes of a complete segment, or those of the open segment before its trailing
    /// zeros. `None` if the spool does not have the segment.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read(&self, segment: SegmentNo) -> Result<Option<Vec<u8>>> {
        let complete = self.path(segment);
        match fs::read(&complete) {
            Ok(bytes) => return Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io("read", complete)(error)),
        }
        let partial = self.partial_path(segment);
        let read = File::open(&partial).and_then(|file| {
            let mut bytes =
                vec![0; usize::try_from(spool_files::content_length(&file)?).unwrap_or(usize::MAX)];
            file.read_exact_at(&mut bytes, 0)?;
            Ok(bytes)
        });
        match read {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("read", partial)(error)),
        }
    }

    /// Removes a complete segment. Succeeds if it is already gone.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn remove(&self, segment: SegmentNo) -> Result<()> {
        remove_file(&self.path(segment))
    }

    /// Removes an open segment of an abandoned branch. Succeeds if it is already gone.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn remove_partial(&self, segment: SegmentNo) -> Result<()> {
        remove_file(&self.partial_path(segment))
    }

    /// Returns the content of the branch's history file. `None` for timeline 1.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn history(&self) -> Result<Option<Vec<u8>>> {
        let path = self.directory.join(HISTORY_FILE);
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("read", path)(error)),
        }
    }

    /// Stores the branch's history file durably, before any of the branch's WAL is written.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn put_history(&self, content: &[u8]) -> Result<()> {
        self.create()?;
        // An existing file is replaced too: if the disk failed while it was written, it may exist
        // in memory only.
        let path = self.directory.join(HISTORY_FILE);
        durable::replace(&path, content).map_err(of_the_disk)
    }

    /// Returns the LSN after the last byte in the branch's files. `None` if they contain no WAL.
    ///
    /// # Errors
    /// As [`BranchSpool::segments`].
    pub fn end_lsn(&self) -> Result<Option<Lsn>> {
        let segments = self.segments()?;
        let size = self.segment_size;
        let complete = segments.complete.last().map(|last| last.end_lsn(size));
        // A file without content says nothing about where the archive ends.
        let open = segments.open.filter(|(_, length)| *length > 0);
        let open = open.map(|(segment, length)| segment.start_lsn(size).add(length));
        Ok(complete.max(open))
    }

    /// Removes the files that a crash or an error left without WAL: copies that were not renamed,
    /// and an open segment without content. The segments after such an open one go too: nothing of
    /// them was acknowledged, because segments are renamed in order before anything after them is
    /// reported.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn discard_leftovers(&self) -> Result<()> {
        for name in names_in(&self.directory)? {
            if name.ends_with(COPY_SUFFIX) {
                remove_file(&self.directory.join(name))?;
            }
        }
        let segments = self.segments()?;
        let Some((open, 0)) = segments.open else {
            return Ok(());
        };
        for later in segments.unacknowledged.iter().rev() {
            self.remove_partial(*later)?;
        }
        if !segments.unacknowledged.is_empty() {
            // The first file that was not renamed is the open segment, so it must not disappear
            // before the later ones.
            sync_directory(&self.directory)?;
        }
        tracing::info!(segment = %self.name(open), "removing an open segment without content");
        self.remove_partial(open)
    }
}

fn names_in(directory: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("list", directory)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(Error::io("list", directory))?;
        names.extend(entry.file_name().into_string());
    }
    Ok(names)
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io("remove", path)(error)),
    }
}

/// Creates a directory and its parents, each durable in its parent. Only the owner may enter them,
/// and the group that the directory above is shared with.
pub(crate) fn create_directory(path: &Path) -> Result<()> {
    let created = durable::create_dir_all_at(path, CrashPoint::SpoolDirectoryCreated);
    created.map_err(of_the_disk)
}

/// Makes the names in a directory durable. A failed fsync is never retried: the kernel may have
/// dropped the pages.
fn sync_directory(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(Error::io("fsync directory", path))
}
