//! [`Error`]: every failure between a program and its repository, with the facts.

use std::{io, path::PathBuf};

use wal_format::{ClusterName, ObjectKey, PgVersion, SystemIdentifier};

use crate::{ExitKind, Loss, access::denial};

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

/// The reason why the repository, the catalog or the configuration could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The catalog's database failed.
    #[error(
        "catalog {path}: {source}; it is only a cache: stop the archiver and run `wal-archiver catalog rebuild`",
        path = path.display()
    )]
    Catalog {
        /// The catalog's directory.
        path: PathBuf,
        /// The database's error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// An entry of the catalog cannot be read.
    #[error(
        "catalog {path}: an entry of {family} is damaged; it is only a cache: stop the archiver and run \
         `wal-archiver catalog rebuild`",
        path = path.display()
    )]
    CatalogEntry {
        /// The catalog's directory.
        path: PathBuf,
        /// The column family.
        family: &'static str,
    },
    /// Another process has the catalog open.
    #[error(
        "catalog {path} is in use by another process; stop the archiver that runs on it",
        path = path.display()
    )]
    CatalogLocked {
        /// The catalog's directory.
        path: PathBuf,
    },
    /// The catalog was made for another cluster or by another version.
    #[error(
        "catalog {path} belongs to {found}, not to {expected}; remove the directory, it is rebuilt from the repository",
        path = path.display()
    )]
    CatalogMismatch {
        /// The catalog's directory.
        path: PathBuf,
        /// The expected identity.
        expected: String,
        /// The identity in the catalog.
        found: String,
    },
    /// The configuration is wrong.
    #[error("{message}")]
    Config {
        /// The problem, its place, and the correct notation.
        message: String,
    },
    /// An object with other bytes has this name already.
    #[error(
        "{key} in {url} exists with other content; nothing was overwritten: two different clusters or histories meet here"
    )]
    Conflict {
        /// The object.
        key: ObjectKey,
        /// The repository.
        url: String,
    },
    /// An object of ours cannot be parsed.
    #[error("{key} in {url} is damaged: {problem}")]
    Damaged {
        /// The object.
        key: String,
        /// The repository.
        url: String,
        /// The problem.
        problem: String,
    },
    /// The place does not hold the archive that this host writes to.
    #[error(
        "{url} is not the repository that this host archives to: {problem}. Nothing is written there. Mount it or bring \
         it back: archiving then continues automatically. Only if that archive cannot be brought back, stop the archiver and run \
         `wal-archiver epoch begin --system-identifier {system}`, which begins a new archive in this place"
    )]
    Gone {
        /// The repository.
        url: String,
        /// The system identifier of the archive that was there, or `N` where it is not known.
        system: String,
        /// The evidence.
        problem: String,
    },
    /// An encryption key is missing, wrong, or given although nothing is encrypted.
    #[error("cluster {cluster} in {url}: {problem}")]
    Key {
        /// The cluster.
        cluster: String,
        /// The repository.
        url: String,
        /// The problem, and the remedy.
        problem: String,
    },
    /// The store refuses to delete an object: it is under a retention lock, or we have no
    /// permission to delete.
    #[error("{key} in {url} is locked and stays: {problem}")]
    Locked {
        /// The object.
        key: String,
        /// The repository.
        url: String,
        /// The store's message.
        problem: String,
    },
    /// The repository is an older state of the archive than the state that this host has archived.
    #[error(
        "{url} holds an older state of the repository, or its newest WAL is lost: this host archived {missing}, which is \
         not there. Nothing is written there, and WAL waits in the spool. Mount the right disk or bring the objects \
         back, and archiving continues automatically. If they are lost for good, `wal-archiver verify --accept-loss` \
         declares this WAL lost; the archiver then continues here and takes a base backup"
    )]
    OlderState {
        /// The URL of the repository.
        url: String,
        /// The missing objects, with keys and LSN ranges.
        missing: String,
        /// The newest sealed segment that was archived.
        newest: Box<Loss>,
    },
    /// The cluster in the repository has another major version.
    #[error(
        "cluster {cluster} in {url} is PostgreSQL {expected}, the server is {found} with the same system identifier, which \
         pg_upgrade never makes: check whether this is the right server, or archive it under another --cluster name"
    )]
    MajorVersionMismatch {
        /// The cluster.
        cluster: ClusterName,
        /// The repository.
        url: String,
        /// The version in the repository.
        expected: PgVersion,
        /// The server's version.
        found: PgVersion,
    },
    /// There is no such object.
    #[error("{key} is not in {url}")]
    NotFound {
        /// The object.
        key: String,
        /// The repository.
        url: String,
    },
    /// The segment size differs.
    #[error(
        "cluster {cluster} in {url} has WAL segments of {expected} bytes, the server has {found}"
    )]
    SegmentSizeMismatch {
        /// The cluster.
        cluster: ClusterName,
        /// The repository.
        url: String,
        /// The size in the repository.
        expected: u64,
        /// The server's segment size.
        found: u64,
    },
    /// An S3 store failed or refused.
    #[error("{action} {key} in {url}: {problem}")]
    S3 {
        /// A verb in the present tense.
        action: &'static str,
        /// The object, or a prefix.
        key: String,
        /// The repository.
        url: String,
        /// The store's message, and the remedy if one is known.
        problem: String,
        /// True if the same request may succeed later without a change.
        transient: bool,
    },
    /// The record by which this host recognises its repository cannot be written to the spool.
    #[error(
        "the repository {url} cannot be remembered in the spool: write {path}: {source}. Nothing is archived, because \
         without this record a new archive would begin in the mount point of an unmounted repository. Name a spool \
         directory that this user can write with `--spool DIR` or the setting `spool`",
        path = path.display()
    )]
    NotRemembered {
        /// The repository.
        url: String,
        /// The record's path.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// The store failed or refused.
    #[error("{action} {path}: {source}{denial}", path = path.display(), denial = denial(path, source))]
    Store {
        /// A verb in the present tense.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// The cluster in the repository is another one.
    #[error(
        "cluster {cluster} in {url} has system identifier {expected}, the server has {found}: this repository belongs to \
         another cluster, and nothing was written. If the server was upgraded by pg_upgrade or created again on purpose, stop the \
         archiver and begin a new epoch with `wal-archiver epoch begin --system-identifier {found}`: the old one stays \
         restorable; else choose another --cluster or --repository"
    )]
    SystemIdentifierMismatch {
        /// The cluster.
        cluster: ClusterName,
        /// The repository.
        url: String,
        /// The identifier in the repository.
        expected: SystemIdentifier,
        /// The server's identifier.
        found: SystemIdentifier,
    },
}

impl Error {
    /// Returns a function that creates an [`Error::Store`].
    pub fn store(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Store {
            action,
            path,
            source,
        }
    }

    /// Creates an [`Error::Config`].
    #[must_use]
    pub fn config(message: impl Into<String>) -> Self {
        Self::Config {
            message: message.into(),
        }
    }

    /// Returns true if the object is proved absent, not just unreadable.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    /// Returns true if the same request may succeed later without a change: the store is
    /// unavailable or busy, but does not refuse it.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::S3 { transient, .. } => *transient,
            Self::Gone { .. } | Self::OlderState { .. } | Self::Store { .. } => true,
            _ => false,
        }
    }

    /// Returns true if the operating system denied access to a file. Only an operator can change
    /// that.
    #[must_use]
    pub fn is_denied(&self) -> bool {
        matches!(self, Self::Store { source, .. } if source.kind() == io::ErrorKind::PermissionDenied)
    }

    /// Returns true if the place does not contain the archive that this host writes to, or contains
    /// an older state of it.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Gone { .. } | Self::OlderState { .. })
    }

    /// Returns true if the error is an answer of a store, or the lack of one: a later answer may
    /// differ.
    #[must_use]
    pub fn is_answer(&self) -> bool {
        matches!(
            self,
            Self::Conflict { .. }
                | Self::Damaged { .. }
                | Self::Gone { .. }
                | Self::Locked { .. }
                | Self::NotFound { .. }
                | Self::OlderState { .. }
                | Self::S3 { .. }
                | Self::Store { .. }
        )
    }

    /// Returns true if the catalog, which is only a cache, could not be read or written.
    #[must_use]
    pub fn is_catalog_failure(&self) -> bool {
        matches!(self, Self::Catalog { .. } | Self::CatalogEntry { .. })
    }

    /// Returns true if this process had no file descriptor left.
    #[must_use]
    pub fn is_out_of_descriptors(&self) -> bool {
        match self {
            Self::NotRemembered { source, .. } | Self::Store { source, .. } => {
                is_out_of_descriptors(source)
            }
            _ => self.is_catalog_starved(),
        }
    }

    /// Returns true if the catalog's database had no file descriptor left. It may take no writes
    /// until it is opened again.
    #[must_use]
    pub fn is_catalog_starved(&self) -> bool {
        // RocksDB only passes on the text of `strerror`.
        matches!(self, Self::Catalog { source, .. } if source.to_string().contains("Too many open files"))
    }

    /// Returns true if an object with this name and other content exists.
    #[must_use]
    pub fn is_conflict(&self) -> bool {
        matches!(self, Self::Conflict { .. })
    }

    /// Returns true if the server is not the cluster that the repository contains under its name.
    #[must_use]
    pub fn is_mismatch(&self) -> bool {
        matches!(
            self,
            Self::SystemIdentifierMismatch { .. }
                | Self::MajorVersionMismatch { .. }
                | Self::SegmentSizeMismatch { .. }
        )
    }

    /// Returns the kind of this failure of a request, one of [`FAILURE_KINDS`]. Returns `None` for
    /// an answer that is expected in normal operation: an object that is absent, or that cannot be
    /// deleted because it is locked.
    #[must_use]
    pub fn failure_kind(&self) -> Option<&'static str> {
        match self {
            Self::NotFound { .. } | Self::Locked { .. } => None,
            Self::Gone { .. } => Some("gone"),
            Self::Conflict { .. } | Self::Damaged { .. } => Some("integrity"),
            Self::S3 {
                transient: false, ..
            } => Some("refused"),
            Self::S3 { .. } | Self::Store { .. } => Some("unreachable"),
            _ => Some("other"),
        }
    }

    /// Returns true if the store keeps an object that was to be removed. This is not a failure if
    /// deletions are denied on purpose.
    #[must_use]
    pub fn is_object_locked(&self) -> bool {
        matches!(self, Self::Locked { .. })
    }

    /// Returns true if the repository's record could not be written because the spool's disk is
    /// full.
    #[must_use]
    pub fn is_spool_full(&self) -> bool {
        matches!(self, Self::NotRemembered { source, .. } if matches!(
            source.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        ))
    }

    /// Returns true if another process has the catalog open.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        matches!(self, Self::CatalogLocked { .. })
    }

    /// Returns the exit code (the table in `cli.rs`).
    #[must_use]
    pub fn exit_kind(&self) -> ExitKind {
        match self {
            Self::Catalog { .. }
            | Self::CatalogEntry { .. }
            | Self::CatalogLocked { .. }
            | Self::Locked { .. } => ExitKind::Failed,
            Self::CatalogMismatch { .. }
            | Self::Config { .. }
            | Self::Key { .. }
            | Self::MajorVersionMismatch { .. }
            | Self::NotRemembered { .. }
            | Self::SegmentSizeMismatch { .. }
            | Self::SystemIdentifierMismatch { .. } => ExitKind::Usage,
            Self::Conflict { .. }
            | Self::Damaged { .. }
            | Self::NotFound { .. }
            | Self::OlderState { .. } => ExitKind::Integrity,
            Self::Gone { .. } | Self::S3 { .. } | Self::Store { .. } => ExitKind::Unreachable,
        }
    }
}

/// The values that [`Error::failure_kind`] can return, for labels that exist before the first
/// failure.
pub const FAILURE_KINDS: [&str; 5] = ["gone", "integrity", "other", "refused", "unreachable"];

/// Returns true if an operation failed because this process (`EMFILE`) or the whole system
/// (`ENFILE`) had no file descriptor left.
#[must_use]
pub fn is_out_of_descriptors(error: &io::Error) -> bool {
    let short = [rustix::io::Errno::MFILE, rustix::io::Errno::NFILE];
    error
        .raw_os_error()
        .is_some_and(|code| short.iter().any(|short| short.raw_os_error() == code))
}
