//! [`Before`]: the segment before the open one, at hand to be compared with what a stream sends that resumes between two.
//!
//! It lies in a file, whatever the segment's size: a segment may have a gigabyte, and after `pg_switch_wal` only its first
//! bytes say anything. Invariant: nothing is changed here.

use std::{
    fs::File,
    io::{self, Write},
    os::unix::fs::FileExt,
    path::Path,
};

/// A whole segment's WAL.
#[derive(Debug)]
pub struct Before {
    file: File,
    bytes: u64,
}

impl Before {
    /// The segment in this file, which stays readable when its name goes.
    ///
    /// # Errors
    /// The operating system's.
    pub fn of_file(file: File) -> io::Result<Self> {
        let bytes = file.metadata()?.len();
        Ok(Self { file, bytes })
    }

    /// A segment that `write` yields piece by piece, kept in a file without a name in `directory`.
    ///
    /// # Errors
    /// Those of `write`, and of a disk that has no room for it.
    pub fn of_pieces<E: From<io::Error>>(
        directory: &Path,
        write: impl FnOnce(&mut dyn Write) -> Result<(), E>,
    ) -> Result<Self, E> {
        let mut file = tempfile::tempfile_in(directory)?;
        write(&mut file)?;
        Ok(Self::of_file(file)?)
    }

    /// How many bytes there are.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The bytes that lie `left` before its end, at most `count`.
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
