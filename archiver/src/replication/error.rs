//! [`Error`]: what PostgreSQL or the way to it objected to.

use std::{fmt, io};

use repository::ExitKind;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The connection ended without a word.
    #[error("PostgreSQL at {place} closed the connection")]
    Closed {
        /// Host and port.
        place: String,
    },
    /// The connection text can not be used.
    #[error("conninfo: {problem}")]
    ConnInfo {
        /// Why, and what to write.
        problem: String,
    },
    /// No connection.
    #[error(
        "connect to PostgreSQL at {place}: {source}; is the server running, and is this its address?"
    )]
    Connect {
        /// Host and port.
        place: String,
        /// The operating system's word.
        source: io::Error,
    },
    /// The connection broke.
    #[error("connection to PostgreSQL at {place}: {source}")]
    Io {
        /// Host and port.
        place: String,
        /// The operating system's word.
        source: io::Error,
    },
    /// The server answered what no server answers.
    #[error("PostgreSQL at {place} answered {what}")]
    Protocol {
        /// Host and port.
        place: String,
        /// What came.
        what: String,
    },
    /// The server refused.
    #[error("PostgreSQL at {place}: {report}{}", remedy(report))]
    Server {
        /// Host and port.
        place: String,
        /// What it said.
        report: Box<ServerReport>,
    },
}

/// An `ErrorResponse`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerReport {
    /// ERROR, FATAL or PANIC.
    pub severity: String,
    /// The SQLSTATE.
    pub code: String,
    /// The message.
    pub message: String,
    /// The detail, or nothing.
    pub detail: String,
    /// The hint, or nothing.
    pub hint: String,
}

impl fmt::Display for ServerReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ({})", self.severity, self.message, self.code)?;
        for more in [&self.detail, &self.hint] {
            if !more.is_empty() {
                write!(f, "; {more}")?;
            }
        }
        Ok(())
    }
}

fn remedy(report: &ServerReport) -> &'static str {
    match report.code.as_str() {
        "28P01" => "; check the password (PGPASSWORD, the password file, or conninfo)",
        "28000" => {
            "; the role needs REPLICATION and pg_hba.conf a line for database \"replication\", this role and this host"
        }
        "42501" => "; give the role the REPLICATION attribute",
        "53300" => "; raise max_wal_senders (wal_level = minimal allows none: set it to replica)",
        "55000" if report.message.contains("wal_level") => "; set wal_level = replica and restart",
        _ => "",
    }
}

impl Error {
    fn report(&self) -> Option<&ServerReport> {
        match self {
            Self::Server { report, .. } => Some(report),
            _ => None,
        }
    }

    fn has_code(&self, codes: &[&str]) -> bool {
        self.report()
            .is_some_and(|report| codes.contains(&report.code.as_str()))
    }

    /// Whether the role or its password was refused.
    #[must_use]
    pub fn is_auth(&self) -> bool {
        self.has_code(&["28P01", "28000", "42501"])
    }

    /// Whether the WAL that was asked for is gone from the server.
    #[must_use]
    pub fn is_wal_removed(&self) -> bool {
        self.report().is_some_and(|report| {
            report.message.contains("has already been removed")
                || report
                    .message
                    .contains("can no longer get changes from replication slot")
                || report
                    .message
                    .contains("can no longer access replication slot")
        })
    }

    /// Whether another walsender has the slot: for a moment after a crash that is our own old one.
    #[must_use]
    pub fn is_slot_in_use(&self) -> bool {
        self.has_code(&["55006"])
    }

    /// Whether nobody answered.
    #[must_use]
    pub fn is_unreachable(&self) -> bool {
        matches!(
            self,
            Self::Closed { .. } | Self::Connect { .. } | Self::Io { .. }
        )
    }

    /// The contract's exit code.
    #[must_use]
    pub fn exit_kind(&self) -> ExitKind {
        match self {
            Self::ConnInfo { .. } => ExitKind::Usage,
            Self::Server { report, .. } => match report.code.as_str() {
                "28P01" | "28000" | "42501" | "42704" | "42601" | "3D000" => ExitKind::Usage,
                _ => ExitKind::Unreachable,
            },
            Self::Closed { .. }
            | Self::Connect { .. }
            | Self::Io { .. }
            | Self::Protocol { .. } => ExitKind::Unreachable,
        }
    }
}
