//! [`Error`]: the reason why a restore failed, and the contract's exit code for it.

use std::{
    io,
    path::{Path, PathBuf},
};

use repository::{Damage, ExitKind, access::denial};
use wal_format::Lsn;

use crate::{isolation::parent::Doubt, plan::PlanError};

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

/// The reason why a restore failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Bytes that were read differ from those that were stored.
    #[error("{object}: {problem}; nothing of it was used")]
    Damaged {
        /// The object or file.
        object: String,
        /// The problem with it.
        problem: String,
    },
    /// The primary had a higher value of a setting than the copy has.
    #[error(
        "PostgreSQL cannot recover: {said} The primary was given more after the backup; run the same command again \
         with --set NAME=VALUE of the primary's value"
    )]
    InsufficientParameter {
        /// PostgreSQL's message, with both values.
        said: String,
    },
    /// A signal came before recovery had ended and was compared with the plan.
    #[error(
        "{signal} came before recovery had ended and was compared with the plan: the server was stopped; run the same \
         command again, which restores from the beginning"
    )]
    Interrupted {
        /// The name of the signal.
        signal: &'static str,
    },
    /// A file operation failed.
    #[error("{action} {path}: {source}{remedy}", path = path.display(), remedy = remedy(path, source))]
    Io {
        /// The operation as a verb in the present tense.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// A server answers at an address of the parent.
    #[error(
        "the parent still answers ({address}): two servers would archive and take connections as one; stop it, or say \
         --force if it is another server"
    )]
    ParentAnswers {
        /// A socket, an address, or the setting that names it.
        address: String,
    },
    /// It is not known whether the parent still runs.
    #[error("it is not known whether the parent still runs: {doubt}")]
    ParentUnknown {
        /// The reason, with the remedy.
        doubt: Doubt,
    },
    /// PostgreSQL reports that changes are missing from the WAL.
    #[error(
        "rows are missing from this copy: {said}; do not use it, and restore to a target before that WAL or from a base \
         backup after it (`pitr-restore list`); PostgreSQL's log is {log}",
        log = log.display()
    )]
    MinimalWal {
        /// PostgreSQL's log.
        log: PathBuf,
        /// PostgreSQL's message.
        said: String,
    },
    /// The restored server does not answer.
    #[error("the restored server runs, and it cannot be checked: {said}")]
    NoConnection {
        /// The wait, and its likely reason.
        said: String,
    },
    /// The target cannot be reached.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// PostgreSQL stopped elsewhere than planned.
    #[error("recovery stopped {found}, the plan was {planned}; do not use this copy")]
    PlanMismatch {
        /// The planned stop.
        planned: String,
        /// The actual stop.
        found: String,
    },
    /// A server process crashes repeatedly.
    #[error(
        "recovery ends in a crash loop: PostgreSQL has begun again {crashes} times, first because its {said}; it was \
         stopped; its log is {log}",
        log = log.display()
    )]
    RecoveryCrashes {
        /// PostgreSQL's log.
        log: PathBuf,
        /// The number of restarts after a crash.
        crashes: u32,
        /// The first crash, in PostgreSQL's words.
        said: String,
    },
    /// Recovery paused before the target.
    #[error(
        "recovery has paused before its target{place}: somebody or a setting paused it; the server was stopped; its log \
         is {log}",
        place = replayed.map_or_else(String::new, |lsn| format!(", after {lsn}")),
        log = log.display()
    )]
    RecoveryPaused {
        /// PostgreSQL's log.
        log: PathBuf,
        /// The end of WAL that is known to be replayed.
        replayed: Option<Lsn>,
    },
    /// Recovery makes no progress.
    #[error(
        "recovery hangs: for {seconds} s PostgreSQL wrote nothing to its log and used no processor; it {waits_for}; its \
         last message: {said}; the server was stopped, and nothing of the target was changed by that: wait longer with \
         --recovery-timeout if it is slow for a known reason; its log is {log}",
        log = log.display()
    )]
    RecoveryStalled {
        /// PostgreSQL's log.
        log: PathBuf,
        /// The time without progress.
        seconds: u64,
        /// The state of the recovery, according to its log.
        waits_for: String,
        /// PostgreSQL's last message.
        said: String,
    },
    /// PostgreSQL ended before the recovery did.
    #[error(
        "PostgreSQL ended before recovery did: {said}{remedy}; its log is {log}",
        remedy = library_remedy(said),
        log = log.display()
    )]
    RecoveryFailed {
        /// PostgreSQL's log.
        log: PathBuf,
        /// PostgreSQL's last message.
        said: String,
    },
    /// An error of the repository or the catalog.
    #[error(transparent)]
    Repository(#[from] repository::Error),
    /// WAL that the plan needs cannot be read.
    #[error("WAL at {lsn} cannot be read: {problem}")]
    Wal {
        /// The start of the record or range.
        lsn: Lsn,
        /// The problem with it.
        problem: String,
    },
    /// An option or configuration that cannot be used.
    #[error("{message}")]
    Usage {
        /// The problem and the correct usage.
        message: String,
    },
}

/// Returns the remedy if a library of the parent is not installed on this host
/// (`internal_load_library` in `dfmgr.c`), as the end of a sentence.
fn library_remedy(said: &str) -> &'static str {
    let is_missing = said.starts_with("could not load library \"")
        || (said.starts_with("could not access file \"") && said.contains("No such file"));
    if is_missing {
        "; install the library here, or run the same command again with --set shared_preload_libraries=NAMES without it"
    } else {
        ""
    }
}

/// Returns the remedy for the most common errors of files, as the end of a sentence.
fn remedy(path: &Path, source: &io::Error) -> String {
    let remedy = match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            "; make room and run the same command again"
        }
        io::ErrorKind::PermissionDenied => {
            return format!("{}; else give another directory", denial(path, source));
        }
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::NotADirectory => {
            "; give another directory"
        }
        _ => "",
    };
    remedy.to_owned()
}

impl Error {
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

    /// Converts the error of a durable file operation on the target, which does not concern the
    /// repository.
    pub(crate) fn local(error: repository::Error) -> Self {
        match error {
            repository::Error::Store {
                action,
                path,
                source,
            } => Self::Io {
                action,
                path,
                source,
            },
            other => other.into(),
        }
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::Usage {
            message: message.into(),
        }
    }

    /// Returns true if an archived object is damaged.
    pub(crate) fn is_damage(&self) -> bool {
        matches!(
            self,
            Self::Damaged { .. } | Self::Repository(repository::Error::Damaged { .. })
        )
    }

    /// Returns the damage that the error reports; passes any other error on.
    pub(crate) fn into_damage(self) -> Result<Damage> {
        match self {
            Self::Damaged { object, problem } => Ok(Damage { object, problem }),
            Self::Repository(repository::Error::Damaged { key, problem, .. }) => Ok(Damage {
                object: key,
                problem,
            }),
            Self::Repository(repository::Error::NotFound { key, url }) => Ok(Damage {
                object: key,
                problem: format!("it is not in {url}"),
            }),
            error => Err(error),
        }
    }

    /// Returns the contract's exit code.
    #[must_use]
    pub fn exit_kind(&self) -> ExitKind {
        match self {
            Self::Damaged { .. }
            | Self::MinimalWal { .. }
            | Self::PlanMismatch { .. }
            | Self::Wal { .. } => ExitKind::Integrity,
            Self::InsufficientParameter { .. }
            | Self::Interrupted { .. }
            | Self::Io { .. }
            | Self::NoConnection { .. }
            | Self::ParentAnswers { .. }
            | Self::ParentUnknown { .. }
            | Self::RecoveryCrashes { .. }
            | Self::RecoveryFailed { .. }
            | Self::RecoveryPaused { .. }
            | Self::RecoveryStalled { .. } => ExitKind::Failed,
            Self::Plan(_) => ExitKind::TargetNotReachable,
            Self::Repository(error) => error.exit_kind(),
            Self::Usage { .. } => ExitKind::Usage,
        }
    }
}
