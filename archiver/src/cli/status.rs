//! `wal-archiver status`: asks the running daemon; where none answers, looks into repository, catalog and spool itself.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use repository::{
    Catalog, Repository,
    config::{ClusterSettings, Settings},
};
use serde::Serialize;
use serde_json::Value;
use wal_format::{BackupId, Branch, ClusterName, Lsn, PgTimestamp, SystemIdentifier, WalIdentity};

use super::output;
use crate::{error::Result, spool};

/// A daemon on this host answers from memory; longer means that nobody is there.
const DAEMON_TIMEOUT: Duration = Duration::from_millis(500);
/// A report of a hundred clusters is far smaller.
const ANSWER_BYTES_MAX: u64 = 4 << 20;

pub(super) fn status(settings: &Settings, json: bool) -> Result<()> {
    let answered = daemon(settings);
    let mut documents = Vec::new();
    for cluster in &settings.clusters {
        let of_daemon = answered
            .iter()
            .find(|report| report["cluster"] == cluster.name.as_str());
        if let Some(report) = of_daemon {
            if !json {
                print_daemon(report);
            }
            documents.push(report.clone());
            continue;
        }
        let stored = Stored::look(cluster)?;
        if !json {
            stored.print(cluster);
        }
        documents.extend(serde_json::to_value(&stored));
    }
    if json {
        output::json(&documents);
    }
    Ok(())
}

/// The reports of a daemon, if one answers. A token of the configuration opens its door; over TLS it is not asked.
pub(super) fn daemon(settings: &Settings) -> Vec<Value> {
    let address: SocketAddr = settings.http;
    let access = &settings.http_access;
    let token = access.read.as_ref().or(access.operate.as_ref());
    let authorization = token.map_or_else(String::new, |token| {
        format!("Authorization: Bearer {}\r\n", token.reveal())
    });
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&address, DAEMON_TIMEOUT)?;
        stream.set_read_timeout(Some(DAEMON_TIMEOUT))?;
        write!(
            stream,
            "GET /api/v1/clusters HTTP/1.1\r\nHost: {address}\r\n{authorization}Connection: close\r\n\r\n"
        )?;
        let mut answer = String::new();
        stream.take(ANSWER_BYTES_MAX).read_to_string(&mut answer)?;
        Ok(answer)
    };
    let Ok(answer) = ask() else {
        return Vec::new();
    };
    let body = answer
        .split_once("\r\n\r\n")
        .filter(|(head, _)| head.starts_with("HTTP/1.1 200"))
        .and_then(|(_, body)| serde_json::from_str::<Value>(body).ok());
    match body {
        Some(Value::Array(reports)) => reports,
        Some(Value::Object(mut document)) => match document.remove("clusters") {
            Some(Value::Array(reports)) => reports,
            _ => Vec::new(),
        },
        _ => Vec::new(),
    }
}

fn print_daemon(report: &Value) {
    let text = |pointer: &str| match report.pointer(pointer) {
        None | Some(Value::Null) => "unknown".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    };
    output::line(&format!("cluster {}", text("/cluster")));
    for (name, value) in [
        ("state", format!("{}: {}", text("/state"), text("/reason"))),
        (
            "server",
            format!(
                "PostgreSQL {}, timeline {}, system identifier {}",
                text("/source/server_version"),
                text("/source/timeline"),
                text("/source/system_identifier")
            ),
        ),
        ("server flush", text("/source/flush_lsn")),
        (
            "local",
            format!(
                "{}, {} s behind",
                text("/durable/local/lsn"),
                text("/durable/local/rpo_seconds")
            ),
        ),
        (
            "remote",
            format!(
                "{}, {} s behind",
                text("/durable/remote/lsn"),
                text("/durable/remote/rpo_seconds")
            ),
        ),
        (
            "lag",
            format!(
                "{} bytes; target {} s, greatest in 24 h {} s",
                text("/durable/remote/lag_bytes"),
                text("/rpo_target_seconds"),
                text("/rpo_max_24h_seconds")
            ),
        ),
        (
            "restorable",
            format!(
                "{} to {}",
                text("/window/earliest"),
                text("/window/latest_commit")
            ),
        ),
        (
            "rto",
            format!(
                "measured {} s, estimated {} s. {}",
                text("/rto/measured_seconds"),
                text("/rto/estimate_seconds"),
                text("/rto/how")
            ),
        ),
        (
            "last drill",
            match report
                .pointer("/last_drill/passed")
                .and_then(Value::as_bool)
            {
                None => "none yet: run `pitr-restore drill`".to_owned(),
                Some(true) => format!("passed {}", text("/last_drill/finished")),
                Some(false) => format!("failed: {}", text("/last_drill/message")),
            },
        ),
        ("last backup", text("/last_backup/id")),
        ("repository", text("/repository")),
        ("requests", requests(report)),
    ] {
        output::line(&format!("  {name:<13} {value}"));
    }
    if let Some(count @ 1..) = report["counters"]["objects_locked"].as_u64() {
        output::line(&format!(
            "  {:<13} {count} superfluous objects stay: the repository lets nothing go",
            "locked"
        ));
    }
    for alert in report["alerts"].as_array().into_iter().flatten() {
        let field = |name: &str| alert[name].as_str().unwrap_or_default();
        output::line(&format!(
            "  {:<13} {} {}",
            field("severity"),
            field("name"),
            field("summary")
        ));
        output::line(&format!("                {}", field("runbook")));
    }
    let standbys = report["standbys"].as_array().into_iter().flatten();
    for standby in standbys {
        let text = |field: &str| standby[field].as_str().unwrap_or("unknown").to_owned();
        let value = match standby["problem"].as_str() {
            Some(problem) => format!("{}: {problem}", text("server")),
            None => format!("{} keeps WAL from {}", text("server"), text("restart_lsn")),
        };
        output::line(&format!("  {:<13} {value}", "standby"));
    }
}

/// What the daemon asked of its buckets, as the store's operator bills it.
fn requests(report: &Value) -> String {
    let Some(requests) = report.get("requests").filter(|value| value.is_object()) else {
        return "a folder costs none".to_owned();
    };
    let counts = |which: &str| {
        let names = ["put", "get", "head", "list", "delete"];
        let count = |name: &str| format!("{} {name}", requests[which][name]);
        names.map(count).join(", ")
    };
    let minutes = requests["seconds"].as_u64().unwrap_or_default() / 60;
    let hour = match minutes {
        60.. => "last hour".to_owned(),
        _ => format!("last {} min", minutes + 1),
    };
    format!(
        "{hour}: {}; since the start: {}",
        counts("last_hour"),
        counts("total")
    )
}

/// What is found without a daemon.
#[derive(Debug, Serialize)]
struct Stored {
    cluster: ClusterName,
    daemon: Option<bool>,
    repository: String,
    system_identifier: Option<SystemIdentifier>,
    postgresql_major: Option<u16>,
    branches: Vec<StoredBranch>,
    backups: Vec<StoredBackup>,
}

#[derive(Debug, Serialize)]
struct StoredBranch {
    branch: Branch,
    first_lsn: Option<Lsn>,
    remote_lsn: Option<Lsn>,
    local_lsn: Option<Lsn>,
}

#[derive(Debug, Serialize)]
struct StoredBackup {
    id: BackupId,
    start_lsn: Lsn,
    stop_lsn: Lsn,
    finished: PgTimestamp,
    stored_bytes: u64,
}

impl Stored {
    fn look(settings: &ClusterSettings) -> Result<Self> {
        let repository = Repository::open(&settings.repository, &settings.name)?;
        let mut stored = Self {
            cluster: settings.name.clone(),
            daemon: Some(false),
            repository: settings.repository.to_string(),
            system_identifier: None,
            postgresql_major: None,
            branches: Vec::new(),
            backups: Vec::new(),
        };
        let Some(identity) = repository.identity()? else {
            return Ok(stored);
        };
        stored.system_identifier = Some(identity.system_identifier);
        stored.postgresql_major = Some(identity.postgresql_major.major());
        let catalog = Catalog::open_for_restore(Some(&settings.catalog), &repository)?;
        for (branch, _, _) in catalog.branches()? {
            let ranges = catalog.ranges(branch, Lsn::ZERO, Lsn::MAX)?;
            stored.branches.push(StoredBranch {
                branch,
                first_lsn: ranges.first().map(|range| range.start_lsn),
                remote_lsn: ranges.iter().map(|range| range.end_lsn).max(),
                local_lsn: None,
            });
        }
        let wal = WalIdentity {
            version: identity.postgresql_major,
            system_identifier: identity.system_identifier,
            segment_size: identity.wal_segment_size,
        };
        let directory = settings.spool.join(settings.name.as_str());
        for spool in spool::branches(&directory, &wal)? {
            let local_lsn = spool.end_lsn()?;
            let known = stored
                .branches
                .iter_mut()
                .find(|known| known.branch == spool.branch());
            match known {
                Some(known) => known.local_lsn = local_lsn,
                None => stored.branches.push(StoredBranch {
                    branch: spool.branch(),
                    first_lsn: None,
                    remote_lsn: None,
                    local_lsn,
                }),
            }
        }
        stored.backups = catalog
            .backups()?
            .into_iter()
            .map(|backup| StoredBackup {
                id: backup.id,
                start_lsn: backup.start_lsn,
                stop_lsn: backup.stop_lsn,
                finished: backup.finished,
                stored_bytes: backup.stored_bytes,
            })
            .collect();
        Ok(stored)
    }

    fn print(&self, settings: &ClusterSettings) {
        output::line(&format!("cluster {}", self.cluster));
        output::line("  state         no daemon answers; this is what repository and spool hold");
        output::line(&format!("  repository    {}", self.repository));
        output::line(&format!("  spool         {}", settings.spool.display()));
        let Some(system) = self.system_identifier else {
            output::line("  archived      nothing yet: start `wal-archiver run`");
            return;
        };
        output::line(&format!("  system        {system}"));
        let show =
            |lsn: Option<Lsn>| lsn.map_or_else(|| "nothing".to_owned(), |lsn| lsn.to_string());
        for branch in &self.branches {
            output::line(&format!(
                "  timeline {}: repository {} to {}, spool to {}",
                branch.branch,
                show(branch.first_lsn),
                show(branch.remote_lsn),
                show(branch.local_lsn)
            ));
        }
        if self.backups.is_empty() {
            output::line(
                "  backups       none: run `wal-archiver backup`, without one nothing can be restored",
            );
        }
        for backup in &self.backups {
            output::line(&format!(
                "  backup {} finished {} ({})",
                backup.id,
                backup.finished,
                output::bytes(backup.stored_bytes)
            ));
        }
    }
}
