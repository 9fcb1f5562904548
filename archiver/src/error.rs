//! [`Error`]: everything that can stop archiving, as facts with their location and the remedy for
//! each.
//!
//! Invariant: an error that means "WAL is missing or different" ([`Error::is_broken`]) is never
//! hidden by retries. The cluster's state becomes broken and stays so until the cause is gone.

use std::{io, net::SocketAddr, path::PathBuf};

use repository::ExitKind;
use rustix::io::Errno;
use wal_format::{Branch, ClusterName, Lsn, SegmentName, SystemIdentifier, TimelineId};

/// The archiver's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The cause for which an operation stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Records of the audit trail that cannot be read.
    #[error(
        "records of the audit trail cannot be read: {problem}. A newer version may have written them; otherwise restore \
         these objects from a copy of the repository"
    )]
    Audit {
        /// The names of the records, with the problems.
        problem: String,
    },
    /// A base backup failed.
    #[error(transparent)]
    BaseBackup(#[from] crate::base_backup::error::BaseBackupError),
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
        /// The server's message.
        message: String,
    },
    /// The server sent a history file that PostgreSQL itself would refuse.
    #[error("the server sent a damaged history file: {source}")]
    History {
        /// The defect in the file.
        source: wal_format::timeline::ParseHistoryError,
    },
    /// HTTP cannot be served as configured.
    #[error(transparent)]
    Http(#[from] dashboard::http::error::HttpError),
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
    /// The server's history does not contain the branch that the archive has followed.
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
         from this archive or point the archiver at the right one. If pg_resetwal was run on the server, stop the archiver \
         and run `wal-archiver epoch begin --after-resetwal`"
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
    /// There is no space for more WAL, and no thread waits for it any longer.
    #[error("the spool is full; WAL that the server still keeps was not taken")]
    SpoolFull,
    /// The spool's files are not consecutive.
    #[error(
        "the spool {path} lacks segment {missing} between segments it holds, and the repository does not have it; move \
         the later files away and start again: they are streamed again",
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
        "the spool {path} is in use by another archiver; stop it first",
        path = path.display()
    )]
    SpoolLocked {
        /// The lock file.
        path: PathBuf,
    },
    /// This user has no permission to write the spool.
    #[error(
        "the spool {path} cannot be written by user {user}: {source}{denial}; else name a directory of this user with \
         --spool or the key spool",
        path = path.display(), user = repository::access::this_user(),
        denial = repository::access::denial(path, source)
    )]
    SpoolDenied {
        /// The directory `{spool}/{cluster}`.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// WAL arrived that does not follow the previous WAL.
    #[error("the server sent WAL from {found} where {expected} was next")]
    StreamOutOfOrder {
        /// The position of the stream.
        expected: Lsn,
        /// The start of the message.
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
        /// The cluster's system identifier.
        expected: SystemIdentifier,
        /// The system identifier in the spool.
        found: String,
    },
    /// The server stopped answering.
    #[error("nothing was heard from the server for {seconds} s although an answer was requested")]
    Silent {
        /// The time without an answer.
        seconds: u64,
    },
    /// The daemon that `--http` names does not archive the cluster.
    #[error(
        "no daemon at {address} archives cluster {cluster} to this repository: start `wal-archiver run`, or name its \
         address with --http"
    )]
    NoDaemon {
        /// The cluster.
        cluster: ClusterName,
        /// The address that was asked.
        address: SocketAddr,
    },
    /// The result of `status --nagios`. Its line on standard output describes it.
    #[error("not OK")]
    Nagios {
        /// The exit code by Nagios's convention.
        code: u8,
    },
    /// Plain objects that could not be encrypted yet.
    #[error("{problem}")]
    StillPlain {
        /// The number of objects, the reason and the remedy.
        problem: String,
    },
    /// Alert receivers that could not be notified.
    #[error("not told: {targets}")]
    NotNotified {
        /// The names of the receivers in the configuration.
        targets: String,
    },
    /// The time to drain ran out.
    #[error(
        "stopped with WAL that is only in the spool and not yet in the repository: {what}. It is safe there and is stored \
         at the next start; do not delete the spool"
    )]
    NotDrained {
        /// The remaining work.
        what: String,
    },
    /// A worker thread ended early.
    #[error("the {name} thread stopped: {reason}")]
    ThreadStopped {
        /// The thread's name.
        name: &'static str,
        /// The reason, as far as known.
        reason: String,
    },
    /// We cannot archive a server of this version.
    #[error(transparent)]
    Unsupported(#[from] wal_format::system::UnsupportedVersion),
    /// Retention could not be applied everywhere.
    #[error("{problem}")]
    Expire {
        /// The problems, with their repositories.
        problem: String,
        /// The exit code.
        kind: ExitKind,
    },
    /// `wal-archiver remove` could not drop every slot.
    #[error("{problem}")]
    Remove {
        /// The servers, and the remedy.
        problem: String,
        /// The exit code of the most severe failure.
        kind: ExitKind,
    },
    /// `wal-archiver switchover-check` found a condition that does not hold.
    #[error("not safe: {problem}")]
    Switchover {
        /// The conditions, by cluster.
        problem: String,
        /// The exit code.
        kind: ExitKind,
    },
    /// `wal-archiver verify` found damage.
    #[error("{problems} integrity violation(s) found")]
    Verify {
        /// The number of violations.
        problems: usize,
    },
    /// WAL was refused.
    #[error(transparent)]
    Wal(intake::Error),
    /// The command cannot be executed as given.
    #[error("{message}")]
    Usage {
        /// The problem, and the correct notation.
        message: String,
    },
    /// One or more preconditions do not hold.
    #[error("{failed} precondition(s) do not hold")]
    Check {
        /// The number of preconditions that do not hold.
        failed: usize,
        /// The exit code of the most severe of them.
        kind: ExitKind,
    },
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

    /// Adds a remedy to the message of an [`Error::Gap`].
    pub(crate) fn with_remedy(mut self, remedy: &str) -> Self {
        if let Self::Gap { message, .. } = &mut self {
            *message = format!("{message}; {remedy}");
        }
        self
    }

    /// Builds the error for a thread of this name that the system did not start.
    pub(crate) fn no_thread(name: &'static str) -> impl FnOnce(io::Error) -> Self {
        Self::io("start the thread", name)
    }

    /// Returns true if the system had no file descriptor or no thread to give. The error says
    /// nothing about the archive and passes when something else ends, so it is always retried.
    #[must_use]
    pub fn is_out_of_resources(&self) -> bool {
        match self {
            Self::Io { source, .. } => {
                // A thread that the system does not start is EAGAIN (`pthread_create(3)`). None of
                // our files is non-blocking, so EAGAIN has no other meaning.
                repository::is_out_of_descriptors(source)
                    || source.kind() == io::ErrorKind::WouldBlock
            }
            Self::Replication(error) => error.has_io(repository::is_out_of_descriptors),
            Self::Repository(error) => error.is_out_of_descriptors(),
            _ => false,
        }
    }

    /// Returns the exit code of the contract.
    #[must_use]
    pub fn exit_kind(&self) -> ExitKind {
        match self {
            Self::BaseBackup(error) => error.exit_kind(),
            Self::Gap { .. }
            | Self::History { .. }
            | Self::LostHistory { .. }
            | Self::ServerBehind { .. }
            | Self::SpoolHole { .. }
            | Self::Audit { .. }
            | Self::Verify { .. } => ExitKind::Integrity,
            Self::Check { kind, .. }
            | Self::Expire { kind, .. }
            | Self::Remove { kind, .. }
            | Self::Switchover { kind, .. } => *kind,
            // Nagios defines exit codes of its own, which are the same numbers.
            Self::Nagios { code: 3 } => ExitKind::TargetNotReachable,
            Self::Io { .. }
            | Self::Nagios { code: 0 | 1 | 4.. }
            | Self::ThreadStopped { .. }
            | Self::SlotLost { .. }
            | Self::SpoolDenied { .. }
            | Self::StillPlain { .. } => ExitKind::Failed,
            Self::Replication(error) if error.is_usage() => ExitKind::Usage,
            Self::Repository(error) => error.exit_kind(),
            Self::Wal(error) => error.exit_kind(),
            Self::Http(_)
            | Self::Nagios { code: 2 }
            | Self::SpoolLocked { .. }
            | Self::SpoolSystemMismatch { .. }
            | Self::Unsupported(_)
            | Self::Usage { .. } => ExitKind::Usage,
            Self::NoDaemon { .. }
            | Self::NotDrained { .. }
            | Self::NotNotified { .. }
            | Self::Replication(_)
            | Self::Silent { .. }
            | Self::SpoolFull
            | Self::StreamOutOfOrder { .. } => ExitKind::Unreachable,
        }
    }

    /// Returns true if WAL is missing or in doubt, so that the cluster's state is broken and not
    /// merely disconnected.
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
    /// Extracts a response of the store at `url`. Such an error says nothing about the next
    /// response, so the caller retries.
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

    /// Returns true if a disk had no free space.
    pub(crate) fn is_disk_full(&self) -> bool {
        matches!(self, Self::Io { source, .. } if matches!(
            source.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        ))
    }
}

impl From<intake::Error> for Error {
    /// Errors that can occur on every intake path are mapped to the same variant here.
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
