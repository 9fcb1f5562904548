//! [`OpenSegment`]: the file `SEGMENT.partial`, appended to until it is a whole segment.
//!
//! Behind what was written it may hold zeros, so that an fsync need not make a new length durable: on ext4 that takes
//! the journal, and a commit that waits for us twice as long.
//! Invariant: a file that failed an fsync is never fsynced again as it is: the kernel may have dropped the pages, shows them
//! still, and would report success (the lesson of "fsyncgate"). The caller stops; who opens the file next writes its valid
//! bytes anew before they count as durable.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use repository::{CrashPoint, durable};
use wal_format::SegmentNo;

use super::{BranchSpool, sync_directory};
use crate::error::{Error, Result};

/// How far the zeros go ahead.
const AHEAD_BYTES: u64 = 1 << 20;
/// Pieces of at least this size pay for their own length: in a catch-up zeros would be written for nothing.
const LARGE_BYTES: usize = 64 << 10;
/// What is written at once of them.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// An open segment's file.
#[derive(Clone, Debug)]
pub struct OpenSegment {
    segment: SegmentNo,
    file: Arc<File>,
    partial: PathBuf,
    path: PathBuf,
    length: u64,
    /// The file's own length: zeros from `length` on.
    allocated: u64,
    segment_bytes: u64,
}

impl OpenSegment {
    /// Creates the file, durable in its directory. An empty leftover is taken over.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(spool: &BranchSpool, segment: SegmentNo) -> Result<Self> {
        let open = Self::at(spool, segment, true)?;
        let reached = CrashPoint::SegmentCreated.reach();
        reached.map_err(Error::io("create", &open.partial))?;
        sync_directory(spool.directory())?;
        let reached = CrashPoint::SegmentNamed.reach();
        reached.map_err(Error::io("create", &open.partial))?;
        Ok(open)
    }

    /// Opens the file that a previous run left.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(spool: &BranchSpool, segment: SegmentNo) -> Result<Self> {
        Self::at(spool, segment, false)
    }

    fn at(spool: &BranchSpool, segment: SegmentNo, create: bool) -> Result<Self> {
        let partial = spool.partial_path(segment);
        let file = File::options()
            .read(true)
            .write(true)
            .create(create)
            .truncate(false)
            .open(&partial)
            .map_err(Error::io("open", &partial))?;
        let length = file.metadata().map_err(Error::io("stat", &partial))?.len();
        Ok(Self {
            segment,
            file: Arc::new(file),
            partial,
            path: spool.path(segment),
            length,
            allocated: length,
            segment_bytes: spool.segment_size().bytes(),
        })
    }

    /// Which segment.
    #[must_use]
    pub fn segment(&self) -> SegmentNo {
        self.segment
    }

    /// How many bytes were written; of a file just opened, how long it is.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The file, for a reader beside the writer.
    #[must_use]
    pub fn file(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    /// The path it has while open.
    #[must_use]
    pub fn partial_path(&self) -> &Path {
        &self.partial
    }

    /// Appends as much as the disk takes; the count written, which is less than all only for a full disk.
    ///
    /// # Errors
    /// The operating system's. Bytes written before the error count towards [`OpenSegment::length`].
    pub fn append(&mut self, mut bytes: &[u8]) -> io::Result<usize> {
        let whole = bytes.len();
        while !bytes.is_empty() {
            let written = self.file.write_at(bytes, self.length);
            match written.and_then(|count| CrashPoint::SegmentWritten.reach().map(|()| count)) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    self.length += count as u64;
                    bytes = &bytes[count..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if bytes.len() < whole && is_no_space(&error) => {
                    return Ok(whole - bytes.len());
                }
                Err(error) => return Err(error),
            }
        }
        if self.length > self.allocated {
            self.allocated = self.length;
            if whole < LARGE_BYTES {
                self.go_ahead();
            }
        }
        Ok(whole)
    }

    /// Writes zeros behind the content. A disk that has no room for them costs speed and nothing else.
    fn go_ahead(&mut self) {
        let end = self.segment_bytes.min(self.length + AHEAD_BYTES);
        while self.allocated < end {
            let count = usize::try_from(end - self.allocated).unwrap_or(usize::MAX);
            match self
                .file
                .write_at(&ZEROS[..count.min(ZEROS.len())], self.allocated)
            {
                Ok(count @ 1..) => self.allocated += count as u64,
                Ok(0) | Err(_) => return,
            }
        }
    }

    /// Reads back `bytes.len()` bytes from `offset`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read_at(&self, bytes: &mut [u8], offset: u64) -> Result<()> {
        self.file
            .read_exact_at(bytes, offset)
            .map_err(Error::io("read", &self.partial))
    }

    /// Puts a new, durable file with these bytes, which this one begins with, in its place: an earlier fsync of it may have
    /// failed, and said so to nobody who is still alive. What the kernel shows of such a file need not be on the disk, and
    /// writing the same blocks again does not always bring it there (ext4 leaves an extent unwritten whose first write
    /// failed); blocks that are new do. A disk without room for a copy gets them written in place.
    ///
    /// # Errors
    /// [`Error::Io`]: fatal, see the invariant above.
    pub fn renew(self, spool: &BranchSpool, bytes: &[u8]) -> Result<Self> {
        let mut source = bytes;
        match copy_in_place(&mut source, &self.partial, &self.partial) {
            Ok(()) => Self::at(spool, self.segment, false),
            Err(error) if is_no_space(&error) => {
                tracing::warn!(file = %self.partial.display(), "no room for a copy; written in place");
                // Opened again: if only the directory's fsync failed, the copy has the name by now,
                // and what is written to the old file is lost with it.
                let mut named = Self::at(spool, self.segment, false)?;
                let in_place = named
                    .file
                    .write_all_at(bytes, 0)
                    .and_then(|()| named.file.set_len(bytes.len() as u64))
                    .and_then(|()| named.file.sync_all());
                in_place.map_err(Error::io("write", &named.partial))?;
                sync_directory(spool.directory())?;
                (named.length, named.allocated) = (bytes.len() as u64, bytes.len() as u64);
                Ok(named)
            }
            Err(error) => Err(Error::io("write anew", &self.partial)(error)),
        }
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// [`Error::Io`]: fatal, see the invariant above.
    pub fn sync(&self) -> Result<()> {
        self.file
            .sync_data()
            .and_then(|()| CrashPoint::SegmentSynced.reach())
            .map_err(Error::io("fdatasync", &self.partial))
    }

    /// Makes the whole segment durable under its final name.
    ///
    /// # Errors
    /// [`Error::Io`]: fatal.
    pub fn finish(&self) -> Result<()> {
        self.sync()?;
        let reached = CrashPoint::SegmentCompleted.reach();
        reached.map_err(Error::io("rename", &self.partial))?;
        durable::rename_unsynced(&self.partial, &self.path).map_err(of_the_disk)?;
        let reached = CrashPoint::SegmentRenamed.reach();
        reached.map_err(Error::io("rename", &self.partial))?;
        sync_directory(self.path.parent().unwrap_or(&self.path))?;
        let reached = CrashPoint::SegmentFinished.reach();
        reached.map_err(Error::io("rename", &self.partial))
    }
}

/// What a durable file operation says of the spool's disk: it is not the repository that failed.
pub(super) fn of_the_disk(error: repository::Error) -> Error {
    match error {
        repository::Error::Store {
            action,
            path,
            source,
        } => Error::Io {
            action,
            path,
            source,
        },
        other => other.into(),
    }
}

/// Puts a copy of a complete segment in its place. Its content was fsynced before it got its name, but the directory's fsync
/// that would have made the name durable may have failed; a rename writes the directory again.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn renew_complete(spool: &BranchSpool, segment: SegmentNo) -> Result<()> {
    let path = spool.path(segment);
    let copied = File::open(&path)
        .and_then(|mut file| copy_in_place(&mut file, &path, &spool.partial_path(segment)));
    match copied {
        Err(error) if is_no_space(&error) => {
            tracing::warn!(file = %path.display(), "no room for a copy; its name is made durable as it is");
            sync_directory(spool.directory())
        }
        // Sealed meanwhile, and no longer needed.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome.map_err(Error::io("write anew", &path)),
    }
}

/// Writes `source` to a new file, durably, and renames that to `path`, durably. A crash leaves one or the other.
#[expect(
    clippy::disallowed_methods,
    reason = "the new file is synced before and the directory after it"
)]
fn copy_in_place(source: &mut dyn io::Read, path: &Path, beside: &Path) -> io::Result<()> {
    let fresh = beside.with_extension("new");
    let copied = (|| {
        match std::fs::remove_file(&fresh) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = File::options().write(true).create_new(true).open(&fresh)?;
        CrashPoint::CopyCreated.reach()?;
        io::copy(source, &mut file)?;
        CrashPoint::CopyWritten.reach()?;
        file.sync_all()?;
        CrashPoint::CopySynced.reach()?;
        std::fs::rename(&fresh, path)?;
        CrashPoint::CopyRenamed.reach()?;
        File::open(path.parent().unwrap_or(path))?.sync_all()
    })();
    if copied.is_err() {
        // What is left of it is removed before the next attempt, too.
        drop(std::fs::remove_file(&fresh));
    }
    copied
}

/// Returns true if the disk or the quota is full: the only write error worth waiting for.
pub(crate) fn is_no_space(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}
