//! The directory of a branch's segments in the spool, and the written length of an open segment.
//! Used by the spool itself and by a push that compares with it.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use wal_format::{Branch, SystemIdentifier};

/// The number of bytes that are examined at once.
const CHUNK_BYTES: usize = 64 << 10;

/// The directory of a system identifier below `{spool}/{cluster}`.
#[must_use]
pub fn system_directory(cluster_directory: &Path, system: SystemIdentifier) -> PathBuf {
    cluster_directory.join("wal").join(system.to_string())
}

/// The directory of a branch below `{spool}/{cluster}`.
#[must_use]
pub fn branch_directory(
    cluster_directory: &Path,
    system: SystemIdentifier,
    branch: Branch,
) -> PathBuf {
    system_directory(cluster_directory, system).join(branch.to_string())
}

/// Returns the number of bytes before the zeros at the end of a file. WAL may end in zeros too, so
/// more bytes may have been written. The decoder determines which of them are valid.
///
/// # Errors
/// The operating system's error.
pub fn content_length(file: &File) -> io::Result<u64> {
    let mut end = file.metadata()?.len();
    let mut buffer = vec![0; CHUNK_BYTES];
    while end > 0 {
        let start = end.saturating_sub(CHUNK_BYTES as u64);
        let bytes = &mut buffer[..usize::try_from(end - start).unwrap_or(usize::MAX)];
        file.read_exact_at(bytes, start)?;
        if let Some(last) = bytes.iter().rposition(|byte| *byte != 0) {
            return Ok(start + last as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}
