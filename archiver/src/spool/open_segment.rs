//! [`OpenSegment`]: the file `SEGMENT.partial`, appended to until it is a whole segment.
//!
//! After the written bytes the file may contain zeros, so that an fsync need not make a new length
//! durable. On ext4 a new length takes a journal commit, and a synchronous commit that waits for us
//! takes twice as long.
//! Invariant: after a failed fsync, the same file is never fsynced again as it is. The kernel may
//! have dropped the dirty pages, still show them to readers, and report success the second time
//! ("fsyncgate"). The caller stops. The next process that opens the file rewrites its valid bytes
//! before they count as durable.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use repository::{CrashPoint, access, durable};
use wal_format::SegmentNo;

use super::{
    branch::BranchSpool,
    files::{of_the_disk, sync_directory},
};
use crate::error::{Error, Result};

/// The number of zero bytes written after the content.
const AHEAD_BYTES: u64 = 1 << 20;
/// Appends of at least this size extend the file without zeros, which a catch-up would overwrite at
/// once.
const LARGE_BYTES: usize = 64 << 10;
/// The block in which zeros are written.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// The file of an open segment.
#[derive(Clone, Debug)]
pub struct OpenSegment {
    segment: SegmentNo,
    file: Arc<File>,
    partial: PathBuf,
    path: PathBuf,
    length: u64,
    /// The file's length, with zeros from `length` on.
    allocated: u64,
    segment_bytes: u64,
}

impl OpenSegment {
    /// Creates the file, durable in its directory. An empty leftover file is reused.
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
            .mode(0o600)
            .open(&partial)
            .map_err(Error::io("open", &partial))?;
        if create {
            File::open(spool.directory())
                .and_then(|directory| access::inherit(&file, directory))
                .map_err(Error::io("set the permissions of", &partial))?;
        }
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

    /// The number of the segment.
    #[must_use]
    pub fn segment(&self) -> SegmentNo {
        self.segment
    }

    /// The number of bytes written. Directly after opening, the length of the file.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The file, for reads that are concurrent with the writer.
    #[must_use]
    pub fn file(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    /// The path of the file while the segment is open.
    #[must_use]
    pub fn partial_path(&self) -> &Path {
        &self.partial
    }

    /// Appends bytes and returns the number written. It is less than `bytes.len()` only if the disk
    /// became full after a part was written.
    ///
    /// # Errors
    /// The operating system's. Bytes written before the error count towards
    /// [`OpenSegment::length`].
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

    /// Writes zeros after the content. Without space for them, only the next fsyncs are slower.
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

    /// Replaces the file by a new, durable one with `bytes`, which are the valid beginning of this
    /// file.
    ///
    /// An earlier fsync of the file may have failed in a process that has since died. What the
    /// kernel shows of such a file need not be on disk. Rewriting the same blocks does not always
    /// repair that: ext4 leaves an extent unwritten if its first write failed. New blocks do. On a
    /// disk without space for a copy, the bytes are rewritten in place.
    ///
    /// # Errors
    /// [`Error::Io`]: fatal, see the invariant above.
    pub fn renew(self, spool: &BranchSpool, bytes: &[u8]) -> Result<Self> {
        let mut source = bytes;
        match copy_in_place(&mut source, &self.partial, &self.partial) {
            Ok(()) => Self::at(spool, self.segment, false),
            Err(error) if is_no_space(&error) => {
                tracing::warn!(file = %self.partial.display(), "the disk has no space for a new copy of the segment; rewriting it in place");
                // The file is opened again: if only the directory's fsync failed, the copy already
                // has the name, and what is written to the old file would be lost with it.
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
            Err(error) => Err(Error::io("rewrite", &self.partial)(error)),
        }
    }

    /// Makes the written bytes durable.
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

/// Replaces a complete segment by a copy of it. Its content was fsynced before the rename, but the
/// fsync of the directory that makes the name durable may have failed. Renaming the copy writes the
/// directory again.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn renew_complete(spool: &BranchSpool, segment: SegmentNo) -> Result<()> {
    let path = spool.path(segment);
    let copied = File::open(&path)
        .and_then(|mut file| copy_in_place(&mut file, &path, &spool.partial_path(segment)));
    match copied {
        Err(error) if is_no_space(&error) => {
            tracing::warn!(
                file = %path.display(),
                "the disk has no space for a new copy of the complete segment; syncing its directory again"
            );
            sync_directory(spool.directory())
        }
        // The segment was sealed and removed meanwhile, so it is no longer needed.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome.map_err(Error::io("rewrite", &path)),
    }
}

/// Writes `source` durably to a new file and renames that to `path`, also durably. A crash leaves
/// either the old or the new file at `path`.
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
        let mut options = File::options();
        let mut file = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&fresh)?;
        access::inherit(&file, File::open(path.parent().unwrap_or(path))?)?;
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
        // An error here is harmless: the next attempt removes the leftover file first.
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
