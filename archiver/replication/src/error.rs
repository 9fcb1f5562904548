//! [`Error`]: failures of the connection, and errors that PostgreSQL reports.

use std::{fmt, io};

use super::tls_error::explain;

/// A failure of the connection or of a command.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The server, or the authentication it requests, is not what the connection string permits.
    #[error("PostgreSQL at {place}: {problem}")]
    Auth {
        /// Host and port.
        place: String,
        /// The problem and its remedy.
        problem: String,
    },
    /// The server closed the connection without an error message.
    #[error("PostgreSQL at {place} closed the connection")]
    Closed {
        /// Host and port.
        place: String,
    },
    /// The connection string is invalid.
    #[error("conninfo: {problem}")]
    ConnInfo {
        /// The problem and its remedy.
        problem: String,
    },
    /// The connection could not be opened.
    #[error(
        "connect to PostgreSQL at {place}: {source}; is the server running, and is this its address?"
    )]
    Connect {
        /// Host and port.
        place: String,
        /// The operating system's error.
        source: io::Error,
    },
    /// None of several hosts accepted the connection.
    #[error("none of {} hosts took the connection: {}", .errors.len(), each(.errors))]
    Hosts {
        /// The error of each host, in the order of the connection string.
        errors: Vec<Self>,
    },
    /// The connection broke.
    #[error("connection to PostgreSQL at {place}: {source}")]
    Io {
        /// Host and port.
        place: String,
        /// The operating system's error.
        source: io::Error,
    },
    /// The server does not match `target_session_attrs`.
    #[error(
        "PostgreSQL at {place} is {found}, but target_session_attrs={wanted}; add the host of such a server to conninfo, or \
         change target_session_attrs"
    )]
    OtherSession {
        /// Host and port.
        place: String,
        /// The server's state.
        found: &'static str,
        /// The required state.
        wanted: &'static str,
    },
    /// The server sent an answer that the protocol does not allow.
    #[error("PostgreSQL at {place} answered {what}")]
    Protocol {
        /// Host and port.
        place: String,
        /// The answer.
        what: String,
    },
    /// The server reported an error.
    #[error("PostgreSQL at {place}: {report}{}", remedy(report))]
    Server {
        /// Host and port.
        place: String,
        /// The server's report.
        report: Box<ServerReport>,
    },
    /// The server's version is not supported.
    #[error(
        "PostgreSQL at {place} is version {version}; the oldest that is archived is 13, and 14 the oldest that is tested: \
         upgrade it"
    )]
    ServerTooOld {
        /// Host and port.
        place: String,
        /// The version that the server reports.
        version: String,
    },
    /// The connection could not be encrypted.
    #[error("TLS to PostgreSQL at {place}: {problem}")]
    Tls {
        /// Host and port.
        place: String,
        /// The problem and its remedy.
        problem: String,
    },
}

fn each(errors: &[Error]) -> String {
    let texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
    texts.join("; ")
}

/// The content of an `ErrorResponse`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerReport {
    /// ERROR, FATAL or PANIC.
    pub severity: String,
    /// The SQLSTATE.
    pub code: String,
    /// The message.
    pub message: String,
    /// The detail, or an empty string.
    pub detail: String,
    /// The hint, or an empty string.
    pub hint: String,
    /// The function in PostgreSQL's source that raised the error. Unlike the message it is never
    /// translated.
    pub routine: String,
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

/// Returns the remedy with the statement that the server's administrator runs, or an empty string.
fn remedy(report: &ServerReport) -> String {
    let says = |part: &str| report.message.contains(part);
    // The role's name is the first quoted text. A translated message may use other quotation marks;
    // then an example name is used.
    let quoted = report.message.split('"').nth(1).unwrap_or("replicator");
    let is_role = report.routine == "InitializeSessionUserId" || says("role \"");
    if report.code == "28000" && is_role {
        return if says("not permitted to log in") {
            format!(
                "; run `ALTER ROLE \"{quoted}\" LOGIN REPLICATION`, or name another role as user"
            )
        } else {
            format!(
                "; run `CREATE ROLE \"{quoted}\" LOGIN REPLICATION`, with a PASSWORD if pg_hba.conf asks for one, or name \
                 another role as user"
            )
        };
    }
    fixed_remedy(report, &says).to_owned()
}

fn fixed_remedy(report: &ServerReport, says: &dyn Fn(&str) -> bool) -> &'static str {
    match report.code.as_str() {
        "28P01" => "; check the password (PGPASSWORD, the password file, or conninfo)",
        "28000" if says("client certificate") || says("ertificate authentication") => {
            "; give the certificate and key that pg_hba.conf asks for as sslcert and sslkey"
        }
        "28000" => {
            "; pg_hba.conf needs a line for this role and this host, with database \"replication\" for the stream and \
             \"postgres\" (or dbname) for SQL; then reload the server"
        }
        "3D000" => "; name a database that exists as dbname",
        // A file that the server may not read has the same code.
        "42501" if says("could not ") => {
            "; give the user who runs PostgreSQL access to this file, or remove it from the data directory"
        }
        "42501" => "; give the role the REPLICATION attribute: ALTER ROLE … REPLICATION",
        "42704" if says("replication slot") => {
            "; it was dropped by somebody: the archiver creates it again at its next connection"
        }
        "53300" if report.walsenders_are_off() => {
            "; set max_wal_senders = 10 and wal_level = replica, and restart the server"
        }
        "53300" if says("max_wal_senders") => {
            "; raise max_wal_senders, or end a walsender in pg_stat_replication"
        }
        "53300" => "; raise max_connections, or end sessions that nobody needs",
        "53400" => "; raise max_replication_slots, or drop a slot that nobody needs",
        "55000" if says("wal_level") => "; set wal_level = replica and restart the server",
        "55000" if says("max_replication_slots") => {
            "; set max_replication_slots = 10 and restart the server"
        }
        "55000" if says("logical") => {
            "; the name belongs to a logical slot: name another one as slot in the configuration"
        }
        "55006" => {
            "; one archiver has one slot: stop the other one, name another slot in the configuration, or, if that walsender \
             is dead, end it with pg_terminate_backend"
        }
        "57P03" => "; it is tried again",
        _ => "",
    }
}

impl ServerReport {
    /// Returns true if `max_wal_senders` is 0, as `wal_level = minimal` requires. The message may
    /// be translated, but the setting's name and the number stay.
    fn walsenders_are_off(&self) -> bool {
        self.message.contains("max_wal_senders") && self.message.contains(" 0)")
    }
}

impl Error {
    /// Converts an error of the operating system or of rustls. The end of the connection gives the
    /// same error from both.
    pub(super) fn of_io(place: &str, source: io::Error) -> Self {
        let place = place.to_owned();
        if let Some(problem) = explain(&source) {
            return Self::Tls { place, problem };
        }
        if source.kind() == io::ErrorKind::UnexpectedEof {
            return Self::Closed { place };
        }
        Self::Io { place, source }
    }

    /// Combines the errors of several hosts.
    pub(super) fn of_hosts(mut errors: Vec<Self>) -> Self {
        match errors.pop() {
            Some(only) if errors.is_empty() => only,
            last => {
                errors.extend(last);
                Self::Hosts { errors }
            }
        }
    }

    /// Returns true if another host or address may succeed.
    pub(super) fn concerns_one_host(&self) -> bool {
        self.is_unreachable()
            || matches!(self, Self::OtherSession { .. })
            // The server is starting up, shutting down or not accepting connections (57P03).
            || self.has_code(&["57P03"])
    }

    /// Returns true if the same host may succeed with, or without, TLS, which `pg_hba.conf`
    /// distinguishes.
    pub(super) fn may_go_the_other_way(&self) -> bool {
        matches!(self, Self::Tls { .. }) || self.has_code(&["28000"])
    }

    /// Returns true if the server closes the connection after this error.
    #[must_use]
    pub fn is_final(&self) -> bool {
        self.report()
            .is_none_or(|report| report.severity != "ERROR")
    }

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

    /// Returns true if the role or its password was refused.
    #[must_use]
    pub fn is_auth(&self) -> bool {
        matches!(self, Self::Auth { .. }) || self.has_code(&["28P01", "28000", "42501", "3D000"])
    }

    /// Returns true if the server no longer has the requested WAL.
    #[must_use]
    pub fn is_wal_removed(&self) -> bool {
        self.report().is_some_and(|report| {
            // The messages may be translated, the function's name is not.
            matches!(
                report.routine.as_str(),
                "WalSndSegmentOpen" | "RaiseSlotInvalidationError"
            ) || report.message.contains("has already been removed")
                || report
                    .message
                    .contains("can no longer get changes from replication slot")
                || report
                    .message
                    .contains("can no longer access replication slot")
        })
    }

    /// Returns true if the server takes no connections now (57P03): it shuts down, or is not up
    /// yet.
    #[must_use]
    pub fn is_not_accepting(&self) -> bool {
        match self {
            Self::Hosts { errors } => errors.iter().any(Self::is_not_accepting),
            error => error.has_code(&["57P03"]),
        }
    }

    /// Returns true if the named object, such as a slot, does not exist.
    #[must_use]
    pub fn is_missing_object(&self) -> bool {
        self.has_code(&["42704"])
    }

    /// Returns the server's report if the server found damaged data (`ERRCODE_DATA_CORRUPTED`).
    pub fn data_corrupted(&self) -> Option<&ServerReport> {
        self.report().filter(|report| report.code == "XX001")
    }

    /// Returns true if another walsender uses the slot. Shortly after a crash this may be our own
    /// previous one.
    #[must_use]
    pub fn is_slot_in_use(&self) -> bool {
        self.has_code(&["55006"])
    }

    /// Returns true if `test` holds for an operating system's error in this one.
    pub fn has_io(&self, test: fn(&io::Error) -> bool) -> bool {
        match self {
            Self::Connect { source, .. } | Self::Io { source, .. } => test(source),
            Self::Hosts { errors } => errors.iter().any(|error| error.has_io(test)),
            _ => false,
        }
    }

    /// Returns true if no server answered.
    #[must_use]
    pub fn is_unreachable(&self) -> bool {
        matches!(
            self,
            Self::Closed { .. } | Self::Connect { .. } | Self::Hosts { .. } | Self::Io { .. }
        )
    }

    /// Returns true if only a person can mend the cause: the connection string, the access rules
    /// or a setting of the server. False if a later attempt may succeed.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Auth { .. }
            | Self::ConnInfo { .. }
            | Self::ServerTooOld { .. }
            | Self::Tls { .. } => true,
            Self::Server { report, .. } => match report.code.as_str() {
                "28P01" | "28000" | "42501" | "42704" | "42601" | "3D000" => true,
                "53300" => report.walsenders_are_off(),
                "55000" => !remedy(report).is_empty(),
                _ => false,
            },
            Self::Closed { .. }
            | Self::Connect { .. }
            | Self::Hosts { .. }
            | Self::Io { .. }
            | Self::OtherSession { .. }
            | Self::Protocol { .. } => false,
        }
    }
}
