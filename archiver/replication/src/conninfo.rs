//! [`ConnInfo`]: the server's address and our role, in libpq's terms.
//!
//! Values come from the connection string, then the service file, then PG* environment variables,
//! then libpq's defaults. The password file is read at each connection.
//! Invariant: neither `Debug` nor an error shows a password.

mod environment;
mod given;
mod host;
mod keyword;
mod parse;
mod password_file;
mod require_auth;
mod service_file;
mod tls_settings;

use std::{
    fmt::{self, Write as _},
    path::PathBuf,
    time::Duration,
};

use environment::Environment;
use given::Given;
use keyword::{KEYWORDS, Keyword};
use parse::{Values, problem};

pub(crate) use environment::user_name;
pub use host::Host;
pub(super) use require_auth::{AuthMethod, RequireAuth};
pub(super) use tls_settings::{ClientFiles, RootCertificates, SslMode, TlsSettings, TlsVersion};

use super::Result;

/// The time that a host may take if `connect_timeout` is not set. libpq would wait forever.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

/// The purpose of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionMode {
    /// Replication commands only.
    Physical,
    /// SQL in an ordinary session of the database.
    Sql,
}

/// A connection string completed as libpq completes it.
#[derive(Clone, PartialEq, Eq)]
pub struct ConnInfo {
    values: Values,
    hosts: Vec<Host>,
    user: String,
    passfile: Option<PathBuf>,
    pub(super) connect_timeout: Option<Duration>,
    pub(super) target: TargetSession,
    pub(super) load_balance: bool,
    pub(super) channel_binding: ChannelBindingMode,
    pub(super) require_auth: RequireAuth,
    pub(super) tcp: TcpSettings,
    pub(super) tls: TlsSettings,
}

/// `channel_binding`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ChannelBindingMode {
    Disable,
    Prefer,
    Require,
}

/// `target_session_attrs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TargetSession {
    Any,
    ReadWrite,
    ReadOnly,
    Primary,
    Standby,
    PreferStandby,
}

/// TCP keepalive settings, by which the operating system detects a dead server. `None` keeps its
/// default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TcpSettings {
    pub(super) keepalives: bool,
    pub(super) idle: Option<Duration>,
    pub(super) interval: Option<Duration>,
    pub(super) count: Option<u32>,
    pub(super) user_timeout_ms: Option<u32>,
}

impl ConnInfo {
    /// Parses `host=… user=…` or `postgresql://…`.
    ///
    /// # Errors
    /// [`Error::ConnInfo`](super::Error::ConnInfo).
    pub fn parse(text: &str) -> Result<Self> {
        Self::resolve(text, &Environment::of_process())
    }

    fn resolve(text: &str, environment: &Environment) -> Result<Self> {
        let mut values = parse::parse(text)?;
        let service = values
            .get("service")
            .cloned()
            .or_else(|| environment.variable("PGSERVICE").map(str::to_owned));
        if let Some(service) = service.filter(|service| !service.is_empty()) {
            for (keyword, value) in service_file::lookup(&service, environment)? {
                values.entry(keyword).or_insert(value);
            }
        }
        for keyword in &KEYWORDS {
            let Some(variable) = keyword.variable else {
                continue;
            };
            if values.contains_key(keyword.name) {
                continue;
            }
            if let Some(value) = environment.variable(variable) {
                keyword.check(value, variable)?;
                values.insert(keyword.name, value.to_owned());
            }
        }
        Self::of_values(values, environment)
    }

    fn of_values(values: Values, environment: &Environment) -> Result<Self> {
        let given = Given(&values);
        let user = match given.text("user") {
            Some(user) => user.to_owned(),
            None => environment.user().ok_or_else(|| {
                problem("the operating system does not know our user; write user=".to_owned())
            })?,
        };
        let passfile = match given.text("passfile") {
            Some(path) => Some(PathBuf::from(path)),
            None => environment.in_home(".pgpass"),
        };
        let connect_timeout = match given.number("connect_timeout")? {
            None => Some(CONNECT_TIMEOUT),
            Some(0) => None,
            Some(seconds) => Some(Duration::from_secs(seconds.into())),
        };
        Ok(Self {
            hosts: Host::list(&values)?,
            user,
            passfile,
            connect_timeout,
            target: given.choice(
                "target_session_attrs",
                TargetSession::Any,
                &[
                    ("any", TargetSession::Any),
                    ("read-write", TargetSession::ReadWrite),
                    ("read-only", TargetSession::ReadOnly),
                    ("primary", TargetSession::Primary),
                    ("standby", TargetSession::Standby),
                    ("prefer-standby", TargetSession::PreferStandby),
                ],
            )?,
            load_balance: given.choice(
                "load_balance_hosts",
                false,
                &[("disable", false), ("random", true)],
            )?,
            channel_binding: given.choice(
                "channel_binding",
                ChannelBindingMode::Prefer,
                &[
                    ("disable", ChannelBindingMode::Disable),
                    ("prefer", ChannelBindingMode::Prefer),
                    ("require", ChannelBindingMode::Require),
                ],
            )?,
            require_auth: given
                .text("require_auth")
                .map_or_else(|| Ok(RequireAuth::default()), RequireAuth::parse)?,
            tcp: TcpSettings {
                keepalives: given.number("keepalives")? != Some(0),
                idle: given.seconds("keepalives_idle")?,
                interval: given.seconds("keepalives_interval")?,
                count: given.number("keepalives_count")?.filter(|count| *count > 0),
                user_timeout_ms: given.number("tcp_user_timeout")?.filter(|ms| *ms > 0),
            },
            tls: TlsSettings::of_values(&given, environment)?,
            values,
        })
    }

    /// Returns a keyword's value, unless it is empty.
    #[must_use]
    pub fn value(&self, keyword: &str) -> Option<&str> {
        Given(&self.values).text(keyword)
    }

    /// The hosts to try, in order. At least one.
    #[must_use]
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// The hosts as text, without secrets.
    #[must_use]
    pub fn places(&self) -> String {
        let places: Vec<String> = self.hosts.iter().map(Host::to_string).collect();
        places.join(", ")
    }

    /// Returns the same settings for a single host: a second connection must go to the same server
    /// as the first.
    pub(super) fn pinned_to(&self, host: Host) -> Self {
        Self {
            hosts: vec![host],
            target: TargetSession::Any,
            ..self.clone()
        }
    }

    /// The role. Default: the name of the operating system's user.
    #[must_use]
    pub fn user(&self) -> &str {
        &self.user
    }

    /// The database, for SQL.
    #[must_use]
    pub fn dbname(&self) -> &str {
        self.value("dbname").unwrap_or("postgres")
    }

    /// The name in `pg_stat_replication` and `synchronous_standby_names`.
    #[must_use]
    pub fn application_name(&self) -> &str {
        self.value("application_name")
            .or_else(|| self.value("fallback_application_name"))
            .unwrap_or("tidemark")
    }

    /// Sets the name in `pg_stat_replication` for settings that name none themselves.
    #[must_use]
    pub fn with_application_name(mut self, name: &str) -> Self {
        let given = self.values.get("fallback_application_name");
        if given.is_none_or(String::is_empty) {
            self.values
                .insert("fallback_application_name", name.to_owned());
        }
        self
    }

    /// Returns the same settings for another database.
    #[must_use]
    pub fn with_database(mut self, name: &str) -> Self {
        self.values.insert("dbname", name.to_owned());
        self
    }

    /// Returns the password for a host, from the connection settings or the password file.
    pub(super) fn password(&self, host: &Host, mode: ConnectionMode) -> Option<String> {
        if let Some(password) = self.value("password") {
            return Some(password.to_owned());
        }
        let database = match mode {
            ConnectionMode::Physical => "replication",
            ConnectionMode::Sql => self.dbname(),
        };
        let names = host.password_names();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        password_file::lookup(
            self.passfile.as_deref()?,
            &names,
            host.port,
            database,
            &self.user,
        )
    }
}

impl fmt::Debug for ConnInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (name, value) in &self.values {
            let secret = Keyword::find(name).is_none_or(Keyword::is_secret);
            let shown = if secret { "…" } else { value };
            write!(f, "{separator}{name}=")?;
            // A URI can contain a line feed.
            for character in shown.chars() {
                f.write_char(if character.is_control() {
                    ' '
                } else {
                    character
                })?;
            }
            separator = " ";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
