//! [`Access`]: the users that may read the files of a cluster, taken from its server (`initdb
//! --allow-group-access`).

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use rustix::{fs::Mode, process::umask};

/// The users that may read the files of a cluster. PostgreSQL has these two classes
/// (`file_perm.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Only the owner.
    Owner,
    /// The owner and the group.
    Group,
}

impl Access {
    /// Returns the access of a server that gave a file this mode.
    pub(super) fn of_file(mode: u32) -> Self {
        if mode & 0o040 == 0 {
            Self::Owner
        } else {
            Self::Group
        }
    }

    /// Returns the access of the data directory `directory`, or of a directory in it.
    pub(crate) fn of_directory(directory: &Path) -> Self {
        match fs::metadata(directory) {
            Ok(metadata) if metadata.mode() & 0o777 == Self::Group.directory_mode() => Self::Group,
            _ => Self::Owner,
        }
    }

    /// Returns the mode of directories (`pg_dir_create_mode`).
    pub(super) fn directory_mode(self) -> u32 {
        match self {
            Self::Owner => 0o700,
            Self::Group => 0o750,
        }
    }

    /// Returns the mode of files (`pg_file_create_mode`).
    pub(crate) fn file_mode(self) -> u32 {
        self.directory_mode() & 0o640
    }

    /// Sets the umask, so that other users get no access to anything that this process creates
    /// (`pg_mode_mask`).
    pub(super) fn apply(self) {
        umask(Mode::from_raw_mode(0o777 & !self.directory_mode()));
    }
}
