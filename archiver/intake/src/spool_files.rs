//! Where the spool keeps a branch's segments, and how much of an open one was written: for the spool itself, and for a push
//! that compares with it.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use wal_format::{Branch, SystemIdentifier};

/// How much is looked at at once.
const CHUNK_BYTES: usize = 64 << 10;

/// The directory of a cluster's system below `{spool}/{cluster}`.
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

/// How many bytes of a file lie before the zeros at its end. WAL may end in zeros too, so this is at most what was written;
/// which of it counts is for the decoder to say.
///
/// # Errors
/// The operating system's.
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
