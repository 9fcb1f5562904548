//! The segment before the open one, [`Before`]. A stream that resumes at a segment boundary is
//! compared with it.
//!
//! The bytes are in a file, not in memory: a segment may have a gigabyte, and after `pg_switch_wal`
//! only its first bytes have content.
//! Invariant: this module changes no stored WAL.

use std::{
    fs::File,
    io::{self, Write},
    os::unix::fs::FileExt,
    path::Path,
};

/// The WAL of one complete segment.
#[derive(Debug)]
pub struct Before {
    file: File,
    bytes: u64,
}

impl Before {
    /// Uses the segment in this open file, which stays readable when its name is removed.
    ///
    /// # Errors
    /// The operating system's.
    pub fn of_file(file: File) -> io::Result<Self> {
        let bytes = file.metadata()?.len();
        Ok(Self { file, bytes })
    }

    /// Copies a segment, which `write` yields piece by piece, to a file without a name in
    /// `directory`.
    ///
    /// # Errors
    /// Those of `write`; an I/O error, for example on a full disk.
    pub fn of_pieces<E: From<io::Error>>(
        directory: &Path,
        write: impl FnOnce(&mut dyn Write) -> Result<(), E>,
    ) -> Result<Self, E> {
        let mut file = tempfile::tempfile_in(directory)?;
        write(&mut file)?;
        Ok(Self::of_file(file)?)
    }

    /// The segment's length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns at most `count` bytes, beginning `left` bytes before the end of the segment.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn read(&self, left: u64, count: usize) -> io::Result<Vec<u8>> {
        let count = count.min(usize::try_from(left).unwrap_or(usize::MAX));
        let mut bytes = vec![0; count];
        let offset = self.bytes.saturating_sub(left);
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }
}
