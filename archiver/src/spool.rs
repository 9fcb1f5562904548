//! The spool: received WAL on this host's disk, fsynced, until the repository holds it.
//!
//! `{spool}/{cluster}/wal/{system identifier}/{branch}/` holds `SEGMENT` (complete, waiting to be sealed) and at most one
//! `SEGMENT.partial` (open: what was written, then zeros) and, but for timeline 1, `history`. `SEGMENT.new` is a copy that is
//! being made of either.
//! Invariant: where to resume is derived from these files' content alone; a crash at any instant leaves a readable spool.

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
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use intake::spool_files;
use repository::CrashPoint;
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

/// The file that one archiver locks.
const LOCK_FILE: &str = "lock";
/// The content of a branch's history file, kept beside its WAL so that it reaches the repository first.
const HISTORY_FILE: &str = "history";
/// The end of the name of a file that is written to be renamed. `history.new` is one, too.
const COPY_SUFFIX: &str = ".new";

/// A cluster's spool, locked by this process.
#[derive(Debug)]
pub struct Spool {
    directory: PathBuf,
    /// Unlocked when dropped, and by the kernel when the process dies.
    _lock: File,
}

impl Spool {
    /// Opens or creates `{spool}/{cluster}` and locks it.
    ///
    /// # Errors
    /// [`Error::SpoolLocked`] when another archiver has it; [`Error::Io`].
    pub fn open(spool: &Path, cluster: &wal_format::ClusterName) -> Result<Self> {
        let directory = spool.join(cluster.as_str());
        create_directory(&directory)?;
        let path = directory.join(LOCK_FILE);
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
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

    /// `{spool}/{cluster}`.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whose WAL the spool holds, read from the first page of a segment in it; `None` for an empty spool.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::SpoolSystemMismatch`] when it holds WAL of two clusters.
    pub fn identity(&self) -> Result<Option<WalIdentity>> {
        stored_identity(&self.directory)
    }

    /// The part of the spool for one branch; nothing is created yet.
    #[must_use]
    pub fn branch(&self, identity: &WalIdentity, branch: Branch) -> BranchSpool {
        BranchSpool::new(&self.directory, identity, branch)
    }

    /// The branches it holds WAL of, oldest timeline first.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn branches(&self, identity: &WalIdentity) -> Result<Vec<BranchSpool>> {
        branches(&self.directory, identity)
    }
}

/// The branches below `{spool}/{cluster}`, without taking the lock: for `status`.
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

/// Whose WAL `{spool}/{cluster}` holds: see [`Spool::identity`].
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

/// `XLogLongPageHeaderData` in `xlog_internal.h`: 24 bytes of short header, then sysid, segment and page size.
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

/// The files of one branch.
#[derive(Clone, Debug)]
pub struct BranchSpool {
    directory: PathBuf,
    branch: Branch,
    segment_size: SegmentSize,
}

/// What a branch's directory holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpooledSegments {
    /// Complete segments, by number.
    pub complete: Vec<SegmentNo>,
    /// The open segment, the first whose file was not renamed, and the length of its content.
    pub open: Option<(SegmentNo, u64)>,
    /// Segments behind the open one that a crash left. They are renamed in order before anything behind them is
    /// reported, so nothing of these was ever acknowledged.
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

    /// The branch.
    #[must_use]
    pub fn branch(&self) -> Branch {
        self.branch
    }

    /// The segment size.
    #[must_use]
    pub fn segment_size(&self) -> SegmentSize {
        self.segment_size
    }

    /// The directory.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Makes the directory, durably.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(&self) -> Result<()> {
        create_directory(&self.directory)
    }

    /// The segment's name.
    #[must_use]
    pub fn name(&self, segment: SegmentNo) -> SegmentName {
        SegmentName::new(self.branch.timeline, segment, self.segment_size)
    }

    /// The complete segment's path.
    #[must_use]
    pub fn path(&self, segment: SegmentNo) -> PathBuf {
        self.directory.join(self.name(segment).to_string())
    }

    /// The open segment's path.
    #[must_use]
    pub fn partial_path(&self, segment: SegmentNo) -> PathBuf {
        self.directory
            .join(WalFileName::Partial(self.name(segment)).to_string())
    }

    /// What it holds; nothing when the directory does not exist.
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

    /// The bytes of a segment, complete or what the open one holds before zeros; `None` when the spool has it not.
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

    /// Removes a complete segment; fine when it is gone already.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn remove(&self, segment: SegmentNo) -> Result<()> {
        remove_file(&self.path(segment))
    }

    /// Removes an open segment of a branch that was left; fine when it is gone already.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn remove_partial(&self, segment: SegmentNo) -> Result<()> {
        remove_file(&self.partial_path(segment))
    }

    /// The branch's history file, byte for byte; `None` for timeline 1.
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

    /// Keeps the branch's history file, durably, before any of the branch's WAL.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn put_history(&self, content: &[u8]) -> Result<()> {
        self.create()?;
        // One that is there already may be so in memory only, when the disk failed while it was written.
        let path = self.directory.join(HISTORY_FILE);
        repository::durable::replace(&path, content).map_err(of_the_disk)
    }

    /// The LSN after the last byte that the branch's files hold; `None` when they hold none.
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
            // The first file that was not renamed is the open segment: it must not vanish before
            // the later ones.
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

/// Makes a directory and its parents, each durable in its parent.
fn create_directory(path: &Path) -> Result<()> {
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let existed = path.is_dir();
    if !existed {
        if let Some(parent) = parent {
            create_directory(parent)?;
        }
        match fs::create_dir(path).and_then(|()| CrashPoint::SpoolDirectoryCreated.reach()) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(Error::io("create directory", path)(error)),
        }
    }
    // One that is there may have been made by a process that died before this; not when its parent is closed to us.
    match parent.map_or(Ok(()), sync_directory) {
        Err(Error::Io { source, .. })
            if existed && source.kind() == io::ErrorKind::PermissionDenied =>
        {
            Ok(())
        }
        outcome => outcome,
    }
}

/// Makes names in a directory durable. Never retried: after a failed fsync the kernel may have dropped the pages.
fn sync_directory(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(Error::io("fsync directory", path))
}
