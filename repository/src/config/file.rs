//! The TOML file as typed. An unknown key is an error that names the nearest known key: if a
//! mistyped key were ignored, its setting would silently have no effect.

use std::{collections::BTreeMap, fs, path::Path, path::PathBuf};

use serde::Deserialize;

use super::{
    Acknowledge, RepositoryUrl, Required, WhenFull,
    access::AccessTable,
    drill::DrillTable,
    http::HttpTable,
    keys::{self, Place},
    lock::LockTable,
    position,
    repositories::{self, EncryptionTable, RepositoryTable},
    retention::KeepTable,
    s3::S3Table,
    schedules::ScheduleTable,
    secret_file::denied,
    walsender::WalsenderTable,
};
use crate::{Error, Result};

/// The tables of the top level, and the table of the checks of drills in a cluster.
const TABLES: [&str; 2] = ["cluster", "notify"];
const DRILL: &str = "drill";

#[derive(Clone, Debug, Default)]
pub(super) struct ConfigFile {
    pub(super) http: Option<String>,
    pub(super) runbook_url: Option<String>,
    pub(super) http_access: HttpTable,
    pub(super) notify: BTreeMap<String, toml::Value>,
    pub(super) defaults: ClusterTable,
    pub(super) clusters: BTreeMap<String, ClusterTable>,
    /// The text of the file; empty if there is none.
    text: String,
}

/// A table of a cluster, or the defaults.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct ClusterTable {
    pub(super) acknowledge: Option<Acknowledge>,
    pub(super) application_name: Option<String>,
    pub(super) audit_keep: Option<String>,
    pub(super) backup_max_age: Option<String>,
    pub(super) backup_rate_limit: Option<u64>,
    pub(super) catalog: Option<PathBuf>,
    pub(super) compression_level: Option<i32>,
    pub(super) conninfo: Option<String>,
    pub(super) gap_grace: Option<String>,
    pub(super) drill_max_age: Option<String>,
    pub(super) verify_max_age: Option<String>,
    pub(super) expire_grace: Option<String>,
    pub(super) expire_interval: Option<String>,
    pub(super) heal_from: Option<Vec<String>>,
    pub(super) primary_wal_max_bytes: Option<u64>,
    pub(super) remote_flush_bytes: Option<u64>,
    pub(super) remote_flush_interval: Option<String>,
    pub(super) repositories: Option<Vec<RepositoryTable>>,
    pub(super) repositories_required: Option<Required>,
    pub(super) repository: Option<RepositoryUrl>,
    pub(super) rpo_target: Option<String>,
    pub(super) rto_target: Option<String>,
    pub(super) seal_threads: Option<usize>,
    pub(super) slot: Option<String>,
    pub(super) spool: Option<PathBuf>,
    pub(super) standbys: Option<Vec<String>>,
    pub(super) spool_limit_bytes: Option<u64>,
    pub(super) when_full: Option<WhenFull>,
    #[serde(flatten)]
    pub(super) access: AccessTable,
    #[serde(flatten)]
    pub(super) drill: DrillTable,
    #[serde(flatten)]
    pub(super) schedules: ScheduleTable,
    #[serde(flatten)]
    pub(super) s3: S3Table,
    #[serde(flatten)]
    pub(super) encryption: EncryptionTable,
    #[serde(flatten)]
    pub(super) keep: KeepTable,
    #[serde(flatten)]
    pub(super) lock: LockTable,
    #[serde(flatten)]
    pub(super) walsender: WalsenderTable,
}

impl ConfigFile {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(|error| {
            Error::config(format!(
                "read the configuration {}: {}; it is the first of --config FILE, $TIDEMARK_CONFIG, \
                 ./tidemark.toml and /etc/tidemark/tidemark.toml",
                path.display(),
                denied(path, &error)
            ))
        })?;
        let mut file = Self::parse(&text).map_err(|error| located(path, &text, &error))?;
        file.text = text;
        Ok(file)
    }

    /// Adds the file's name and the place in it to an error about a value.
    pub(super) fn locate(&self, path: &Path, error: Error) -> Error {
        match &error {
            Error::Config { .. } => located(path, &self.text, &error),
            _ => error,
        }
    }

    /// Removes the keys that only the daemon needs.
    pub(super) fn forget_daemon(&mut self) {
        self.http_access = HttpTable::default();
        self.notify.clear();
        for table in self.clusters.values_mut().chain([&mut self.defaults]) {
            table.walsender = WalsenderTable::default();
            table.schedules = ScheduleTable::default();
        }
    }

    pub(super) fn parse(text: &str) -> Result<Self> {
        let mut table: toml::Table = text
            .parse()
            .map_err(|error: toml::de::Error| Error::config(error.message()))?;
        let http = take_text(&mut table, "http")?;
        let runbook_url = take_text(&mut table, "runbook_url")?;
        let mut of_http = toml::Table::new();
        for key in keys::names(Place::Top) {
            if let Some(value) = table.remove(key) {
                of_http.insert(key.to_owned(), value);
            }
        }
        let http_access = of_http
            .try_into()
            .map_err(|error: toml::de::Error| Error::config(error.message()))?;
        let notify = match table.remove("notify") {
            None => BTreeMap::new(),
            Some(toml::Value::Table(tables)) => tables.into_iter().collect(),
            Some(_) => {
                return Err(Error::config("\"notify\" is a table: write [notify.NAME]"));
            }
        };
        let clusters = match table.remove("cluster") {
            None => toml::Table::new(),
            Some(toml::Value::Table(clusters)) => clusters,
            Some(_) => {
                return Err(Error::config(
                    "\"cluster\" is a table: write [cluster.NAME]",
                ));
            }
        };
        let mut of_cluster = keys::names(Place::Cluster);
        of_cluster.push(DRILL);
        let mut known = of_cluster.clone();
        known.extend(keys::names(Place::Top));
        known.extend(TABLES);
        let defaults = read_table(&table, "", &of_cluster, &known)?;
        let mut tables = BTreeMap::new();
        for (name, value) in clusters {
            let toml::Value::Table(table) = value else {
                return Err(Error::config(format!(
                    "\"cluster.{name}\" is a table: write [cluster.{name}]"
                )));
            };
            let place = format!(" in [cluster.{name}]");
            tables.insert(name, read_table(&table, &place, &of_cluster, &of_cluster)?);
        }
        Ok(Self {
            http,
            runbook_url,
            http_access,
            notify,
            defaults,
            clusters: tables,
            text: String::new(),
        })
    }
}

fn located(path: &Path, text: &str, error: &Error) -> Error {
    let message = error.to_string();
    let place = position::of(text, &message).map_or_else(String::new, |place| format!(", {place}"));
    Error::config(format!(
        "configuration {}{place}: {message}",
        path.display()
    ))
}

fn take_text(table: &mut toml::Table, key: &str) -> Result<Option<String>> {
    match table.remove(key) {
        None => Ok(None),
        Some(toml::Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(Error::config(format!(
            "\"{key}\" is a text: write it in quotes"
        ))),
    }
}

fn read_table(
    table: &toml::Table,
    place: &str,
    taken: &[&str],
    known: &[&str],
) -> Result<ClusterTable> {
    for key in table.keys() {
        if !taken.contains(&key.as_str()) {
            return Err(unknown(key, place, known));
        }
    }
    repositories::check_keys(table, place)?;
    table.clone().try_into().map_err(|error: toml::de::Error| {
        let refused = table.iter().find_map(|(key, value)| refused(key, value));
        let problem = refused.unwrap_or_else(|| error.message().to_owned());
        Error::config(format!("{problem}{place}"))
    })
}

/// Returns the problem of a value that its key does not accept; `None` if the key accepts it.
fn refused(key: &str, value: &toml::Value) -> Option<String> {
    let mut alone = toml::Table::new();
    alone.insert(key.to_owned(), value.clone());
    let error = alone.try_into::<ClusterTable>().err()?;
    if keys::is_duration(key)
        && let toml::Value::Integer(number) = value
    {
        return Some(format!(
            "{key} = {number} has no unit; write {key} = \"{number}s\", or with ms, min, h or d"
        ));
    }
    Some(format!("{key}: {}", error.message()))
}

pub(super) fn unknown(key: &str, place: &str, known: &[&str]) -> Error {
    let nearest = known
        .iter()
        .min_by_key(|name| strsim::damerau_levenshtein(name, key));
    let nearest = nearest.copied().unwrap_or_default();
    Error::config(format!(
        "unknown key \"{key}\"{place}; did you mean \"{nearest}\"?"
    ))
}
