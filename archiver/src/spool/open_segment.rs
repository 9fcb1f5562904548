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
        sync_directory(spool.directory())?;
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
            match self.file.write_at(bytes, self.length) {
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

    /// Writes the bytes that the file begins with once more, so that the next fsync is about these very pages: an earlier
    /// one may have failed, and said so to nobody who is still alive.
    ///
    /// Not always enough: on ext4 without a journal, blocks that failed were seen to stay as they were on the disk although
    /// this and the fsync after it succeeded. Only the next segment's blocks are new there.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write_again(&self, bytes: &[u8]) -> Result<()> {
        self.file
            .write_all_at(bytes, 0)
            .map_err(Error::io("write", &self.partial))
    }

    /// Cuts the file to `length` bytes.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn truncate(&mut self, length: u64) -> Result<()> {
        self.file
            .set_len(length)
            .map_err(Error::io("truncate", &self.partial))?;
        (self.length, self.allocated) = (length, length);
        Ok(())
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// [`Error::Io`]: fatal, see the invariant above.
    pub fn sync(&self) -> Result<()> {
        self.file
            .sync_data()
            .map_err(Error::io("fdatasync", &self.partial))
    }

    /// Makes the whole segment durable under its final name.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Repository`]: fatal.
    pub fn finish(&self) -> Result<()> {
        self.sync()?;
        repository::durable::rename(&self.partial, &self.path)?;
        Ok(())
    }
}

/// How many bytes of a file lie before the zeros at its end. WAL may end in zeros too, so this is at most what was written;
/// which of it counts is for the decoder to say.
///
/// # Errors
/// The operating system's.
pub(super) fn content_length(file: &File) -> io::Result<u64> {
    let mut end = file.metadata()?.len();
    let mut buffer = vec![0; ZEROS.len()];
    while end > 0 {
        let start = end.saturating_sub(ZEROS.len() as u64);
        let bytes = &mut buffer[..usize::try_from(end - start).unwrap_or(usize::MAX)];
        file.read_exact_at(bytes, start)?;
        if let Some(last) = bytes.iter().rposition(|byte| *byte != 0) {
            return Ok(start + last as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

/// Whether the disk or the quota is full: the only write error worth waiting for.
pub(crate) fn is_no_space(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}
