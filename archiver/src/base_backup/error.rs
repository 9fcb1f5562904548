//! [`BaseBackupError`]: the reasons why a base backup fails.

use repository::ExitKind;
use wal_format::{Lsn, TimelineId};

/// The reason why a base backup failed.
#[derive(Debug, thiserror::Error)]
pub enum BaseBackupError {
    /// The server's data and its manifest differ.
    #[error(
        "the base backup does not match its manifest: {problem}; nothing was listed, take it again"
    )]
    Manifest {
        /// The file, and the difference.
        problem: String,
    },
    /// The server found damaged pages.
    #[error(
        "the server's data is damaged: {pages}. The base backup was not listed; earlier ones stay. Check the server's disk, \
         and bring the relation back from an earlier backup with pitr-restore"
    )]
    DamagedPages {
        /// The pages: file, block, relation.
        pages: String,
    },
    /// A signal stopped the backup.
    #[error(
        "the base backup was stopped by a signal: it is not listed, and what it had stored was removed. Earlier backups \
         stay. Run `wal-archiver backup` to take it again"
    )]
    Interrupted,
    /// Another base backup of the server runs.
    #[error(
        "another base backup of this server runs ({holder}): only one is taken at a time. Wait for its end"
    )]
    AlreadyRuns {
        /// The process that takes it.
        holder: String,
    },
    /// The standby's last restartpoint is on a timeline that it has left.
    #[error(
        "the base backup would begin on timeline {start}, which the standby has left for timeline {current}: it has no \
         restartpoint there yet. Run CHECKPOINT on the primary and take the backup again"
    )]
    OldRestartpoint {
        /// The timeline of the restartpoint.
        start: TimelineId,
        /// The timeline that the standby follows.
        current: TimelineId,
    },
    /// Nobody archives the server's WAL, without which a base backup cannot be restored.
    #[error(
        "nobody archives this server's WAL, without which a base backup cannot be restored: slot \"{slot}\" is not in use, \
         archive_mode is off, and after {seconds} s the repository lacks the WAL up to {lsn}. Nothing was copied. Start \
         `wal-archiver run` with this configuration, and take the backup while it runs"
    )]
    NotArchived {
        /// The slot of the configuration.
        slot: String,
        /// The end of the server's WAL when the backup was requested.
        lsn: Lsn,
        /// The time waited, in seconds.
        seconds: u64,
    },
    /// The server sent data that cannot be parsed.
    #[error("the server sent a base backup that cannot be read: {problem}")]
    Malformed {
        /// The unexpected data.
        problem: String,
    },
    /// The server removed WAL that the backup needs before it was archived.
    #[error(
        "the WAL from {from_lsn} to {to_lsn}, without which the base backup cannot be restored, was declared lost; take it again"
    )]
    WalLost {
        /// The first missing byte.
        from_lsn: Lsn,
        /// The first byte after the missing WAL.
        to_lsn: Lsn,
    },
    /// The required WAL did not arrive.
    #[error(
        "the WAL up to {stop_lsn} did not arrive in the repository within {seconds} s, so the backup was not listed: is \
         `wal-archiver run` running for this cluster?"
    )]
    WalMissing {
        /// The stop LSN, at which the backup is consistent.
        stop_lsn: Lsn,
        /// The time waited, in seconds.
        seconds: u64,
    },
}

impl BaseBackupError {
    /// Returns the documented exit code.
    #[must_use]
    pub fn exit_kind(&self) -> ExitKind {
        match self {
            Self::DamagedPages { .. } | Self::Manifest { .. } | Self::Malformed { .. } => {
                ExitKind::Integrity
            }
            Self::AlreadyRuns { .. }
            | Self::Interrupted
            | Self::NotArchived { .. }
            | Self::OldRestartpoint { .. }
            | Self::WalLost { .. }
            | Self::WalMissing { .. } => ExitKind::Failed,
        }
    }
}

/// Builds the error for data of the server that cannot be parsed.
pub(super) fn malformed(problem: impl Into<String>) -> BaseBackupError {
    BaseBackupError::Malformed {
        problem: problem.into(),
    }
}
