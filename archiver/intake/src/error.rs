//! [`Error`]: why a file of WAL is not archived, as facts with their place.

use std::{io, path::PathBuf};

use repository::ExitKind;
use wal_format::{Branch, Lsn};

/// The result of taking WAL in.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What stands in the way.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A record failed its checks on receipt.
    #[error(
        "WAL of timeline branch {branch} fails its checks on receipt: {source}; it was not acknowledged"
    )]
    Decode {
        /// The branch that is streamed or pushed.
        branch: Branch,
        /// What is wrong, and where.
        source: wal_format::DecodeError,
    },
    /// A push of a file that is archived with other bytes.
    #[error("{path}: {problem}", path = path.display())]
    Differs {
        /// The file.
        path: PathBuf,
        /// Where they differ.
        problem: String,
    },
    /// Other bytes came than the archive holds for the same place.
    #[error(
        "divergence: at {lsn} of timeline branch {branch} the WAL from {from} differs from the WAL already archived \
         ({ours}); nothing was overwritten. This server is not the one that was archived: restored from a snapshot, or a \
         second primary. Point the archiver at the right server, or archive this one under another --cluster name"
    )]
    Divergence {
        /// The branch.
        branch: Branch,
        /// The first byte that differs.
        lsn: Lsn,
        /// Where the new bytes came from.
        from: &'static str,
        /// Where the archived bytes are.
        ours: String,
    },
    /// A file operation failed.
    #[error("{action} {path}: {source}", path = path.display())]
    Io {
        /// A verb in the present tense.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The operating system's word.
        source: io::Error,
    },
    /// A push of a file that cannot be archived.
    #[error("{path}: {problem}", path = path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The repository.
    #[error(transparent)]
    Repository(#[from] repository::Error),
    /// An object that we wrote, or are about to write, is not sound.
    #[error("sealed WAL {object}: {source}")]
    Sealed {
        /// Which object.
        object: String,
        /// What is wrong.
        source: wal_format::sealed::SealedError,
    },
    /// A worker thread ended early.
    #[error("the {name} thread stopped: {reason}")]
    ThreadStopped {
        /// Which.
        name: &'static str,
        /// Why, as far as known.
        reason: String,
    },
}

impl Error {
    /// An [`Error::Io`].
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }

    /// The contract's exit code.
    #[must_use]
    pub fn exit_kind(&self) -> ExitKind {
        match self {
            Self::Decode { .. } | Self::Divergence { .. } | Self::Sealed { .. } => {
                ExitKind::Integrity
            }
            Self::Differs { .. }
            | Self::Io { .. }
            | Self::Refused { .. }
            | Self::ThreadStopped { .. } => ExitKind::Failed,
            Self::Repository(error) => error.exit_kind(),
        }
    }

    /// Returns true if WAL is in doubt, rather than its way here interrupted.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        matches!(
            self,
            Self::Decode { .. } | Self::Divergence { .. } | Self::Sealed { .. }
        )
    }
}
