//! The lock on the target of a restore. Two concurrent restores into one directory would destroy
//! each other's files.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::Path,
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};

use crate::{Error, Result};

/// A locked target. The kernel releases the lock when the process ends, however it ends.
#[derive(Debug)]
pub struct TargetLock {
    _directory: File,
}

impl TargetLock {
    /// Locks an existing directory.
    pub(super) fn take(directory: &Path) -> Result<Self> {
        let file = File::open(directory).map_err(Error::io("open", directory))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let holder = holder(&file).map_or_else(
                    || "another process".to_owned(),
                    |process| format!("process {process}"),
                );
                return Err(Error::usage(format!(
                    "another restore into {} is under way ({holder} holds the lock); wait until it has ended, or give another \
                     directory",
                    directory.display()
                )));
            }
            // Some network file systems cannot lock directories.
            Err(error) => tracing::warn!(
                error = %io::Error::from(error),
                "{} cannot be locked: do not restore into it twice at once",
                directory.display()
            ),
        }
        Ok(Self { _directory: file })
    }
}

/// Returns the process that holds the lock, according to the kernel's list (`proc_locks(5)`).
pub(crate) fn holder(file: &File) -> Option<u32> {
    let inode = file.metadata().ok()?.ino().to_string();
    let locks = fs::read_to_string("/proc/locks").ok()?;
    locks.lines().find_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let (kind, _, _, process, place) = (
            fields.next()?,
            fields.next()?,
            fields.next()?,
            fields.next()?,
            fields.next()?,
        );
        let of_file = kind == "FLOCK" && place.rsplit(':').next() == Some(inode.as_str());
        of_file.then(|| process.parse().ok()).flatten()
    })
}
