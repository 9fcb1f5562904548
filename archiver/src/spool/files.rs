//! File operations of the spool's directories.

use std::{
    fs::{self, File},
    io,
    path::Path,
};

use repository::{CrashPoint, durable};

use crate::error::{Error, Result};

pub(super) fn names_in(directory: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("list", directory)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(Error::io("list", directory))?;
        names.extend(entry.file_name().into_string());
    }
    Ok(names)
}

pub(super) fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io("remove", path)(error)),
    }
}

/// Creates a directory and its parents, each durable in its parent. Only the owner may enter them,
/// and the group that the directory above is shared with.
pub(crate) fn create_directory(path: &Path) -> Result<()> {
    let created = durable::create_dir_all_at(path, CrashPoint::SpoolDirectoryCreated);
    created.map_err(of_the_disk)
}

/// Makes the names in a directory durable. A failed fsync is never retried: the kernel may have
/// dropped the pages.
pub(super) fn sync_directory(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(Error::io("fsync directory", path))
}

/// Converts the error of a durable file operation to one of the spool's disk: the repository did
/// not fail.
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
