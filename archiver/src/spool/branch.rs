//! [`BranchSpool`]: the spool's files of one branch.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use intake::spool_files;
use wal_format::{Branch, Lsn, SegmentName, SegmentNo, SegmentSize, WalFileName, WalIdentity};

use super::files::{create_directory, names_in, of_the_disk, remove_file, sync_directory};
use crate::error::{Error, Result};

/// The branch's history file, stored next to its WAL so that it reaches the repository first.
pub(super) const HISTORY_FILE: &str = "history";
/// The suffix of a file that is written first and then renamed, `history.new` included.
const COPY_SUFFIX: &str = ".new";

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
    pub(super) fn new(cluster_directory: &Path, identity: &WalIdentity, branch: Branch) -> Self {
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
        repository::durable::replace(&path, content).map_err(of_the_disk)
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
