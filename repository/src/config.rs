//! The configuration that both programs share: [`CommonArgs`] and a TOML file, resolved to
//! [`Settings`].
//!
//! There are separate types for the file as typed and for the resolved settings. Keys at the top of
//! the file are defaults for every cluster. A table `[cluster.NAME]` overrides them, and flags
//! override both.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use wal_format::ClusterName;

use crate::{Error, Result};

mod access;
mod cluster;
mod drill;
mod file;
mod http;
pub mod keys;
mod lock;
mod notify;
mod position;
mod repositories;
mod retention;
mod s3;
mod schedules;
mod secret_file;
mod url;
mod walsender;

pub use cluster::{Acknowledge, ClusterSettings, Required, WhenFull};
pub use drill::{DrillSettings, Expect, SqlCheck};
use file::{ClusterTable, ConfigFile};
pub use http::HttpAccess;
pub use lock::{LOCK_DAYS_MAX, LockSettings};
pub use notify::{NotifyKind, NotifyTarget, SmtpTls};
pub use s3::{S3Credentials, S3Settings, Secret};
pub use schedules::ScheduleSettings;
pub(crate) use secret_file::denied;
pub use secret_file::require_private;
pub use url::{RepositoryPlace, RepositoryUrl};
pub use walsender::WalsenderSettings;

/// The flags that every command of both programs takes, before or after it.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct CommonArgs {
    /// The configuration. Default: `$TIDEMARK_CONFIG`, `./tidemark.toml`,
    /// `/etc/tidemark/tidemark.toml`.
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        help_heading = "Common options"
    )]
    pub config: Option<PathBuf>,
    /// The cluster. Default: the only one in the file, or main if the file has none.
    #[arg(
        long,
        global = true,
        value_name = "NAME",
        help_heading = "Common options"
    )]
    pub cluster: Option<ClusterName>,
    /// The place of the archived objects: `file:///dir` or `s3://bucket/prefix`.
    #[arg(
        long,
        global = true,
        value_name = "URL",
        help_heading = "Common options"
    )]
    pub repository: Option<RepositoryUrl>,
    /// The connection to PostgreSQL, in libpq's syntax; PG* variables, password and service files
    /// are honoured.
    #[arg(
        long,
        global = true,
        value_name = "CONNINFO",
        help_heading = "Common options"
    )]
    pub conninfo: Option<String>,
    /// The archiver's local WAL that is not sealed yet.
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        help_heading = "Common options"
    )]
    pub spool: Option<PathBuf>,
    /// The index of the repository; a cache. Default: inside the spool.
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        help_heading = "Common options"
    )]
    pub catalog: Option<PathBuf>,
}

/// The resolved configuration.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The clusters: the one that `--cluster` names, or all clusters of the file.
    pub clusters: Vec<ClusterSettings>,
    /// The address of the HTTP server. Default: `127.0.0.1:8432`.
    pub http: SocketAddr,
    /// The access to the HTTP server.
    pub http_access: HttpAccess,
    /// The URL of the runbook of the alerts. Default: the page's own `/runbook`.
    pub runbook_url: Option<String>,
    /// The receivers of alerts.
    pub notify: Vec<NotifyTarget>,
    /// The file that was read. `None` if there is none.
    pub file: Option<PathBuf>,
}

impl Settings {
    /// Reads the file, if there is one, and applies the flags.
    ///
    /// # Errors
    /// [`Error::Config`] that names the file, the key and the remedy.
    pub fn resolve(args: &CommonArgs) -> Result<Self> {
        let path = find(args)?;
        let file = match &path {
            Some(path) => ConfigFile::read(path)?,
            None => ConfigFile::default(),
        };
        Self::of(args, path, &file)
    }

    /// Resolves the settings of a program that PostgreSQL starts, or that only reads the
    /// repository. Omits the tokens of HTTP, the walsender and the receivers of alerts, because
    /// only the daemon's user may be able to read their files.
    ///
    /// # Errors
    /// Those of [`Settings::resolve`].
    pub fn resolve_for_storage(args: &CommonArgs) -> Result<Self> {
        let path = find(args)?;
        let mut file = match &path {
            Some(path) => ConfigFile::read(path)?,
            None => ConfigFile::default(),
        };
        file.forget_daemon();
        Self::of(args, path, &file)
    }

    /// Resolves the settings for ending the archiving of a cluster. The cluster that `--cluster`
    /// names may be missing from the file: then the flags and the file's defaults describe it.
    ///
    /// # Errors
    /// Those of [`Settings::resolve`]; [`Error::Config`] if nothing names the server of a cluster
    /// that is missing from the file.
    pub fn resolve_for_removal(args: &CommonArgs) -> Result<Self> {
        let path = find(args)?;
        let mut file = match &path {
            Some(path) => ConfigFile::read(path)?,
            None => ConfigFile::default(),
        };
        let deleted = args
            .cluster
            .as_ref()
            .filter(|name| !file.clusters.is_empty() && !file.clusters.contains_key(name.as_str()));
        if let Some(name) = deleted {
            if args.conninfo.is_none() && file.defaults.conninfo.is_none() {
                let known: Vec<&str> = file.clusters.keys().map(String::as_str).collect();
                return Err(Error::config(format!(
                    "cluster {name} is not in the file, which has {}. To remove a cluster whose table was deleted, name \
                     its server with --conninfo, and what its table had of --repository, --spool and --slot",
                    known.join(", ")
                )));
            }
            file.clusters
                .insert(name.to_string(), ClusterTable::default());
        }
        let is_deleted = deleted.is_some();
        let mut settings = Self::of(args, path, &file)?;
        if is_deleted {
            for cluster in &mut settings.clusters {
                cluster.file = None;
            }
        }
        Ok(settings)
    }

    fn of(args: &CommonArgs, path: Option<PathBuf>, file: &ConfigFile) -> Result<Self> {
        if path.is_none() && args.repository.is_none() {
            let here = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("."));
            return Err(Error::config(format!(
                "no repository: give --repository file:///directory or s3://bucket/prefix, or write `repository` in a \
                 configuration file. None was found: {} and /etc/tidemark/tidemark.toml do not exist, and neither \
                 --config nor TIDEMARK_CONFIG names another",
                here.join("tidemark.toml").display()
            )));
        }
        let settings = Self::from_file(args, file);
        let mut settings = settings.map_err(|error| match &path {
            Some(path) => file.locate(path, error),
            None => error,
        })?;
        let absolute = path
            .as_ref()
            .and_then(|path| std::path::absolute(path).ok());
        for cluster in &mut settings.clusters {
            cluster.file.clone_from(&absolute);
        }
        settings.file = path;
        Ok(settings)
    }

    fn from_file(args: &CommonArgs, file: &ConfigFile) -> Result<Self> {
        let names: Vec<ClusterName> = match &args.cluster {
            Some(name) if file.clusters.is_empty() || file.clusters.contains_key(name.as_str()) => {
                vec![name.clone()]
            }
            Some(name) => {
                let known: Vec<&str> = file.clusters.keys().map(String::as_str).collect();
                let message = format!(
                    "cluster {name} is not in the file, which has {}",
                    known.join(", ")
                );
                return Err(Error::config(message));
            }
            None if file.clusters.is_empty() => vec![name("main")?],
            None => file
                .clusters
                .keys()
                .map(|key| name(key))
                .collect::<Result<_>>()?,
        };
        let nothing = ClusterTable::default();
        let clusters = names
            .into_iter()
            .map(|name| {
                let table = file.clusters.get(name.as_str()).unwrap_or(&nothing);
                cluster::resolve(args, name, table, &file.defaults)
            })
            .collect::<Result<Vec<_>>>()?;
        let http = match &file.http {
            Some(text) => text.parse().map_err(|_| {
                Error::config(format!(
                    "http = \"{text}\" is no address; write \"127.0.0.1:8432\""
                ))
            })?,
            None => SocketAddr::from(([127, 0, 0, 1], 8432)),
        };
        Ok(Self {
            clusters,
            http,
            http_access: HttpAccess::resolve(&file.http_access)?,
            runbook_url: file
                .runbook_url
                .as_deref()
                .map(|url| http::link("runbook_url", url))
                .transpose()?,
            notify: notify::resolve(file.notify.clone())?,
            file: None,
        })
    }

    /// Returns the only cluster.
    ///
    /// # Errors
    /// [`Error::Config`] when there are several.
    pub fn cluster(&self) -> Result<&ClusterSettings> {
        match self.clusters.as_slice() {
            [cluster] => Ok(cluster),
            clusters => {
                let names: Vec<&str> = clusters.iter().map(|one| one.name.as_str()).collect();
                let message = format!(
                    "several clusters are configured; choose with --cluster: {}",
                    names.join(", ")
                );
                Err(Error::config(message))
            }
        }
    }
}

fn name(text: &str) -> Result<ClusterName> {
    text.parse()
        .map_err(|error| Error::config(format!("{error}")))
}

/// Returns the file to read. A file that was named is returned even if it does not exist. `None` if
/// no file was named and there is none in the usual places.
fn find(args: &CommonArgs) -> Result<Option<PathBuf>> {
    let named = args
        .config
        .clone()
        .or_else(|| std::env::var_os("TIDEMARK_CONFIG").map(PathBuf::from));
    if let Some(path) = named {
        return Ok(Some(path));
    }
    let usual = [
        PathBuf::from("./tidemark.toml"),
        PathBuf::from("/etc/tidemark/tidemark.toml"),
    ];
    Ok(usual.into_iter().find(|path| path.is_file()))
}

/// Parses `500ms`, `1s`, `5min`, `1h` or `7d`, the value of `key`.
///
/// # Errors
/// [`Error::Config`] for another text, and for zero.
pub fn parse_duration(key: &str, text: &str) -> Result<Duration> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let millis = match unit.trim() {
        "ms" => Some(1),
        "s" => Some(1000),
        "min" => Some(60_000),
        "h" => Some(3_600_000),
        "d" => Some(86_400_000),
        _ => None,
    };
    number
        .parse::<u64>()
        .ok()
        .zip(millis)
        .and_then(|(number, millis)| number.checked_mul(millis))
        .filter(|millis| *millis > 0)
        .map(Duration::from_millis)
        .ok_or_else(|| {
            Error::config(format!(
                "{key} = \"{text}\" is not a duration; write 500ms, 1s, 5min, 1h or 7d"
            ))
        })
}

#[cfg(test)]
mod tests;
