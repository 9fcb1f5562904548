//! [`Error`]: everything that can stop archiving, as facts with their place, and what to do about each.
//!
//! Invariant: an error that means "WAL is missing or different" ([`Error::is_broken`]) is never retried into silence:
//! the cluster's state turns to broken and stays so until the cause is gone.

use std::{io, path::PathBuf};

use repository::ExitKind;
use rustix::io::Errno;
use wal_format::{Branch, Lsn, SegmentName, SystemIdentifier, TimelineId};

use crate::replication;

/// The archiver's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A base backup came to nothing.
    #[error(transparent)]
    BaseBackup(#[from] crate::base_backup::BaseBackupError),
    /// The server does not hold WAL that the archive still needs.
    #[error(
        "gap: the server no longer has WAL from {from} of timeline {timeline} ({message}). The servers in heal_from are \
         asked for it, segments given to `wal-archiver push` are taken; what nobody has is declared lost, and a base backup \
         is taken behind it"
    )]
    Gap {
        /// The timeline.
        timeline: TimelineId,
        /// The first byte that is missing.
        from: Lsn,
        /// What the server said.
        message: String,
    },
    /// The server sent a history file that PostgreSQL itself would refuse.
    #[error("the server sent a damaged history file: {source}")]
    History {
        /// What is wrong with it.
        source: wal_format::timeline::ParseHistoryError,
    },
    /// HTTP can not be served as wished.
    #[error(transparent)]
    Http(#[from] crate::http::HttpError),
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
    /// The server's history does not contain what the archive has followed.
    #[error(
        "the server is on timeline {server}, whose history does not contain timeline branch {ours} that this archive has \
         followed up to {durable_lsn}; the server was left behind by a promotion or is another one. Point the archiver at \
         the primary that was promoted"
    )]
    LostHistory {
        /// The server's timeline.
        server: TimelineId,
        /// The newest branch of the archive.
        ours: Branch,
        /// Its end in the archive.
        durable_lsn: Lsn,
    },
    /// The connection to PostgreSQL.
    #[error(transparent)]
    Replication(#[from] replication::Error),
    /// The repository or the catalog.
    #[error(transparent)]
    Repository(#[from] repository::Error),
    /// The server has less WAL than it once acknowledged to us.
    #[error(
        "the server's WAL ends at {server_lsn} of timeline {timeline}, before {durable_lsn} which is archived already: \
         the server lost WAL (restored from a snapshot, or its disk failed). Nothing was truncated; restore the server \
         from this archive or point the archiver at the right one"
    )]
    ServerBehind {
        /// The timeline.
        timeline: TimelineId,
        /// The server's flush LSN.
        server_lsn: Lsn,
        /// The end of the archive.
        durable_lsn: Lsn,
    },
    /// The slot was invalidated before anything was archived.
    #[error(
        "replication slot \"{slot}\" has lost its WAL (wal_status lost) and nothing is archived yet; drop it with \
         `SELECT pg_drop_replication_slot('{slot}')` and start again"
    )]
    SlotLost {
        /// The slot.
        slot: String,
    },
    /// There is no room for more WAL, and nobody waits for it any more.
    #[error("the spool is full; WAL that the server still keeps was not taken")]
    SpoolFull,
    /// Files in the spool that do not follow one another.
    #[error(
        "the spool {path} lacks segment {missing} between segments it holds, and the repository does not have it; move \
         the later files away and start again: they are streamed anew",
        path = path.display()
    )]
    SpoolHole {
        /// The branch's directory.
        path: PathBuf,
        /// The first missing segment.
        missing: SegmentName,
    },
    /// Another archiver holds the spool.
    #[error(
        "the spool {path} is in use by another archiver; stop it, or give this one another --spool",
        path = path.display()
    )]
    SpoolLocked {
        /// The lock file.
        path: PathBuf,
    },
    /// WAL arrived that does not follow what came before.
    #[error("the server sent WAL from {found} where {expected} was next")]
    StreamOutOfOrder {
        /// Where the stream was.
        expected: Lsn,
        /// Where the message began.
        found: Lsn,
    },
    /// The spool's content belongs to another cluster.
    #[error(
        "the spool {path} holds WAL of system identifier {found}, the cluster has {expected}; give this cluster another \
         --spool, or move the old one away",
        path = path.display()
    )]
    SpoolSystemMismatch {
        /// The spool.
        path: PathBuf,
        /// The cluster's.
        expected: SystemIdentifier,
        /// The spool's.
        found: String,
    },
    /// The server stopped answering.
    #[error("nothing was heard from the server for {seconds} s although an answer was requested")]
    Silent {
        /// How long.
        seconds: u64,
    },
    /// What `status --nagios` found; its line on standard output says it.
    #[error("not OK")]
    Nagios {
        /// Nagios's exit code.
        code: u8,
    },
    /// Receivers of alerts that were not told.
    #[error("not told: {targets}")]
    NotNotified {
        /// Their names in the configuration.
        targets: String,
    },
    /// The time to drain ran out.
    #[error(
        "stopped with WAL that is only in the spool and not yet in the repository: {what}. It is safe there and is stored \
         at the next start; do not delete the spool"
    )]
    NotDrained {
        /// What is left.
        what: String,
    },
    /// A worker thread ended early.
    #[error("the {name} thread stopped: {reason}")]
    ThreadStopped {
        /// Which.
        name: &'static str,
        /// Why, as far as known.
        reason: String,
    },
    /// A server that we can not archive.
    #[error(transparent)]
    Unsupported(#[from] wal_format::system::UnsupportedVersion),
    /// Retention could not be applied everywhere.
    #[error("{problem}")]
    Expire {
        /// What stood in the way, and where.
        problem: String,
        /// The contract's exit code.
        kind: ExitKind,
    },
    /// `wal-archiver verify` found damage.
    #[error("{problems} integrity violation(s) found")]
    Verify {
        /// How many.
        problems: usize,
    },
    /// WAL that can not be taken as it is.
    #[error(transparent)]
    Wal(intake::Error),
    /// A wish that can not be granted as written.
    #[error("{message}")]
    Usage {
        /// What is wrong and how to write it.
        message: String,
    },
    /// One or more preconditions do not hold.
    #[error("{failed} precondition(s) do not hold")]
    Check {
        /// How many.
        failed: usize,
        /// The contract's code for the worst of them.
        kind: ExitKind,
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

    /// The system did not start a thread of this name.
    pub(crate) fn no_thread(name: &'static str) -> impl FnOnce(io::Error) -> Self {
        Self::io("start the thread", name)
    }

    /// Returns true if the system had no file descriptor or no thread to give. It says nothing
    /// about the archive and passes when something else ends, so it is always retried.
    #[must_use]
    pub fn is_out_of_resources(&self) -> bool {
        match self {
            Self::Io { source, .. } => {
                // A thread that the system does not start is EAGAIN (`pthread_create(3)`); no file
                // of ours is non-blocking.
                repository::is_out_of_descriptors(source)
                    || source.kind() == io::ErrorKind::WouldBlock
            }
            Self::Replication(error) => error.is_out_of_descriptors(),
            Self::Repository(error) => error.is_out_of_descriptors(),
            _ => false,
        }
    }

    /// The contract's exit code.
    #[must_use]
    pub fn exit_kind(&self) -> ExitKind {
        match self {
            Self::BaseBackup(error) => error.exit_kind(),
            Self::Gap { .. }
            | Self::History { .. }
            | Self::LostHistory { .. }
            | Self::ServerBehind { .. }
            | Self::SpoolHole { .. }
            | Self::Verify { .. } => ExitKind::Integrity,
            Self::Check { kind, .. } | Self::Expire { kind, .. } => *kind,
            // Nagios has exit codes of its own, which are the same numbers.
            Self::Nagios { code: 3 } => ExitKind::TargetNotReachable,
            Self::Io { .. }
            | Self::Nagios { code: 0 | 1 | 4.. }
            | Self::ThreadStopped { .. }
            | Self::SlotLost { .. } => ExitKind::Failed,
            Self::Replication(error) => error.exit_kind(),
            Self::Repository(error) => error.exit_kind(),
            Self::Wal(error) => error.exit_kind(),
            Self::Http(_)
            | Self::Nagios { code: 2 }
            | Self::SpoolLocked { .. }
            | Self::SpoolSystemMismatch { .. }
            | Self::Unsupported(_)
            | Self::Usage { .. } => ExitKind::Usage,
            Self::NotDrained { .. }
            | Self::NotNotified { .. }
            | Self::Silent { .. }
            | Self::SpoolFull
            | Self::StreamOutOfOrder { .. } => ExitKind::Unreachable,
        }
    }

    /// Whether WAL is missing or in doubt, so that the cluster's state is broken and not merely disconnected.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        match self {
            Self::Repository(error) => {
                return error.is_mismatch()
                    || error.is_gone()
                    || error.exit_kind() == ExitKind::Integrity;
            }
            Self::Wal(error) => return error.is_broken(),
            _ => {}
        }
        matches!(
            self,
            Self::Gap { .. }
                | Self::History { .. }
                | Self::LostHistory { .. }
                | Self::ServerBehind { .. }
                | Self::SlotLost { .. }
                | Self::SpoolHole { .. }
        )
    }
}

/// Returns whether the same operation may succeed later without a person: the disk failed once, or
/// the disk, the quota, the memory or the table of open files was full.
pub(crate) fn may_pass(error: &io::Error) -> bool {
    let exhausted = matches!(
        error.kind(),
        io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::OutOfMemory
            | io::ErrorKind::Interrupted
            | io::ErrorKind::ResourceBusy
            | io::ErrorKind::TimedOut
            | io::ErrorKind::WouldBlock
    );
    let number = Errno::from_io_error(error);
    exhausted || matches!(number, Some(Errno::IO | Errno::MFILE | Errno::NFILE))
}

impl Error {
    /// Splits off an answer of the store at `url`, which says nothing about its next one: whoever
    /// asked asks again.
    ///
    /// # Errors
    /// Every other error, unchanged.
    pub(crate) fn into_answer(self, url: impl FnOnce() -> String) -> Result<repository::Error> {
        match self {
            Self::Repository(error) if error.is_answer() => Ok(error),
            Self::Wal(intake::Error::Sealed { object, source }) => Ok(repository::Error::Damaged {
                key: object,
                url: url(),
                problem: source.to_string(),
            }),
            error => Err(error),
        }
    }

    /// Returns true if the catalog, which is only a cache, could not be read or written.
    pub(crate) fn is_catalog_failure(&self) -> bool {
        matches!(self, Self::Repository(error) if error.is_catalog_failure())
    }

    /// Returns true if a disk had no room.
    pub(crate) fn is_disk_full(&self) -> bool {
        matches!(self, Self::Io { source, .. } if matches!(
            source.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        ))
    }
}

impl From<intake::Error> for Error {
    /// What can happen on every way is the same on each.
    fn from(error: intake::Error) -> Self {
        match error {
            intake::Error::Io {
                action,
                path,
                source,
            } => Self::Io {
                action,
                path,
                source,
            },
            intake::Error::Repository(error) => Self::Repository(error),
            intake::Error::ThreadStopped { name, reason } => Self::ThreadStopped { name, reason },
            error => Self::Wal(error),
        }
    }
}
