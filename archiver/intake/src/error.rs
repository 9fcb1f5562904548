//! [`Error`]: the reason why a WAL file is not archived, with the facts and their place.

use std::{io, path::PathBuf};

use repository::ExitKind;
use wal_format::{Branch, DecodeError, DecodeErrorKind, Lsn};

/// The result of an intake operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The reason why a WAL file is not archived.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A record failed its checks on receipt.
    #[error(
        "WAL of timeline branch {branch} fails its checks on receipt: {source}; it was not acknowledged{}",
        after_reset(source)
    )]
    Decode {
        /// The branch of the streamed or pushed WAL.
        branch: Branch,
        /// The problem and its LSN.
        source: DecodeError,
    },
    /// The pushed file is archived with other bytes.
    #[error("{path}: {problem}", path = path.display())]
    Differs {
        /// The file.
        path: PathBuf,
        /// The place of the difference.
        problem: String,
    },
    /// The WAL differs from the archived WAL of the same range.
    #[error(
        "divergence: at {lsn} of timeline branch {branch} the WAL from {from} differs from the WAL already archived \
         ({ours}); nothing was overwritten. This server is not the one that was archived: restored from a snapshot, or a \
         second primary. Point the archiver at the right server, or archive this one under another --cluster name. If \
         pg_resetwal was run on the server, stop the archiver and run `wal-archiver epoch begin --after-resetwal`"
    )]
    Divergence {
        /// The branch.
        branch: Branch,
        /// The first byte that differs.
        lsn: Lsn,
        /// The source of the new bytes.
        from: &'static str,
        /// The place of the archived bytes.
        ours: String,
    },
    /// A file operation failed.
    #[error(
        "{action} {path}: {source}{denial}",
        path = path.display(), denial = repository::access::denial(path, source)
    )]
    Io {
        /// A verb in the present tense.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// The pushed file cannot be archived.
    #[error("{path}: {problem}", path = path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// The problem with the file.
        problem: String,
    },
    /// The repository failed.
    #[error(transparent)]
    Repository(#[from] repository::Error),
    /// An object that we wrote, or are about to write, is damaged.
    #[error("sealed WAL {object}: {source}")]
    Sealed {
        /// The object.
        object: String,
        /// The problem with the object.
        source: wal_format::sealed::SealedError,
    },
    /// A worker thread ended early.
    #[error("the {name} thread stopped: {reason}")]
    ThreadStopped {
        /// The thread's name.
        name: &'static str,
        /// The reason, as far as known.
        reason: String,
    },
}

/// Returns the remedy for WAL that does not continue the archived WAL, or an empty string.
/// `pg_resetwal` writes its first record without a predecessor (`WriteEmptyXLOG`).
fn after_reset(source: &DecodeError) -> &'static str {
    match source.kind {
        DecodeErrorKind::Previous {
            found: Lsn::ZERO, ..
        } => {
            ". If pg_resetwal was run on the server, stop the archiver and run `wal-archiver epoch begin --after-resetwal`"
        }
        _ => "",
    }
}

impl Error {
    /// Returns a function that creates an [`Error::Io`].
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

    /// Returns the exit code (the table in `cli.rs`).
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

    /// Returns true if the WAL itself is in doubt, false if only its transfer or storage failed.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        matches!(
            self,
            Self::Decode { .. } | Self::Divergence { .. } | Self::Sealed { .. }
        )
    }
}
