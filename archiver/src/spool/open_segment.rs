//! [`OpenSegment`]: the file `SEGMENT.partial`, appended to until it is a whole segment.
//!
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

/// An open segment's file.
#[derive(Clone, Debug)]
pub struct OpenSegment {
    segment: SegmentNo,
    file: Arc<File>,
    partial: PathBuf,
    path: PathBuf,
    length: u64,
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
        })
    }

    /// Which segment.
    #[must_use]
    pub fn segment(&self) -> SegmentNo {
        self.segment
    }

    /// How many bytes were written.
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
        Ok(whole)
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
        self.length = length;
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

/// Whether the disk or the quota is full: the only write error worth waiting for.
pub(crate) fn is_no_space(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}
