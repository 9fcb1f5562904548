//! `wal-archiver switchover-check`: tells whether the primary may be stopped, or a standby
//! promoted, with nothing lost. Changes nothing.
//!
//! Invariant: what is not known does not count as safe.

use std::time::{Duration, Instant};

use catalog::Catalog;
use replication::{ConnInfo, ConnectionMode, ReplicationClient};
use repository::{
    ExitKind, Repository,
    config::{ClusterSettings, Settings},
};
use serde::Serialize;
use serde_json::Value;
use wal_format::{
    Branch, CheckpointKind, ClusterName, Lsn, SystemIdentifier, TimelineId, WalEvent,
};

use super::{daemon, output, runtime};
use crate::{
    error::{Error, Result},
    primary::conninfo,
    upkeep::standby_slots::Standby,
};

/// The time limit for the answers of one server.
const SERVER_TIMEOUT: Duration = Duration::from_secs(10);
/// The pause between two attempts of `--wait`.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// The remedy while the daemon does not answer.
const START_DAEMON: &str =
    "start `wal-archiver run`, or name its address with --http, then run this command again";

/// The length of the record of a shutdown checkpoint: the header of 24 bytes, 2 bytes before the
/// data, and the 88 bytes of `CheckPoint`.
const SHUTDOWN_RECORD_BYTES: u64 = 114;
/// The length with the alignment to 8 bytes.
const SHUTDOWN_RECORD_ALIGNED: u64 = 120;
/// The longest page header, that of a segment's first page.
const PAGE_HEADER_MAX: u64 = 40;
const PAGE_BYTES: u64 = 8192;

/// One condition.
#[derive(Clone, Debug, Serialize)]
struct Condition {
    name: &'static str,
    /// `None` if it is not known.
    holds: Option<bool>,
    detail: String,
    /// The remedy, unless the condition holds.
    remedy: Option<String>,
}

impl Condition {
    fn holds(name: &'static str, detail: String) -> Self {
        Self {
            name,
            holds: Some(true),
            detail,
            remedy: None,
        }
    }

    fn fails(name: &'static str, detail: String, remedy: &str) -> Self {
        Self {
            name,
            holds: Some(false),
            detail,
            remedy: Some(remedy.to_owned()),
        }
    }

    fn unknown(name: &'static str, detail: String, remedy: &str) -> Self {
        Self {
            holds: None,
            ..Self::fails(name, detail, remedy)
        }
    }
}

/// The result for one cluster.
#[derive(Clone, Debug, Serialize)]
struct Verdict {
    cluster: ClusterName,
    /// True if every condition holds.
    safe: bool,
    conditions: Vec<Condition>,
    /// True if neither the server nor the repository could be asked.
    #[serde(skip)]
    nobody: bool,
}

pub(super) fn check(settings: &Settings, wait: Duration, json: bool) -> Result<()> {
    let runtime = runtime()?;
    let began = Instant::now();
    let verdicts = loop {
        let verdicts = runtime.block_on(look(settings));
        let left = wait.saturating_sub(began.elapsed());
        if verdicts.iter().all(|verdict| verdict.safe) || left.is_zero() {
            break verdicts;
        }
        std::thread::sleep(RETRY_INTERVAL.min(left));
    };
    if json {
        output::json(&verdicts);
    } else {
        verdicts.iter().for_each(print);
    }
    let unsafe_ones = verdicts.iter().filter(|verdict| !verdict.safe);
    let missing: Vec<String> = unsafe_ones.map(Verdict::missing).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::Switchover {
        problem: missing.join("; "),
        kind: match verdicts.iter().any(|verdict| verdict.nobody) {
            true => ExitKind::Unreachable,
            false => ExitKind::Failed,
        },
    })
}

fn print(verdict: &Verdict) {
    output::line(&format!("cluster {}", verdict.cluster));
    for condition in &verdict.conditions {
        let word = match condition.holds {
            Some(true) => "ok",
            Some(false) => "FAIL",
            None => "unknown",
        };
        let remedy = condition.remedy.as_ref();
        let remedy = remedy.map_or_else(String::new, |remedy| format!("; {remedy}"));
        output::line(&format!(
            "  {word:<7}  {}: {}{remedy}",
            condition.name, condition.detail
        ));
    }
    if verdict.safe {
        output::line("  safe: the primary may be stopped, or a standby promoted");
    }
}

impl Verdict {
    /// Returns the names of the conditions that do not hold.
    fn missing(&self) -> String {
        let missing = self.conditions.iter();
        let missing = missing.filter(|condition| condition.holds != Some(true));
        let names: Vec<&str> = missing.map(|condition| condition.name).collect();
        format!("cluster {}: {}", self.cluster, names.join(", "))
    }
}

async fn look(settings: &Settings) -> Vec<Verdict> {
    // Asks the servers first: the report of the daemon is newer then.
    let mut servers = Vec::new();
    for cluster in &settings.clusters {
        servers.push(limited(server(cluster)).await);
    }
    let reports = tokio::task::block_in_place(|| daemon::reports(settings));
    let mut verdicts = Vec::new();
    for (cluster, server) in settings.clusters.iter().zip(servers) {
        let report = reports
            .iter()
            .find(|report| report["cluster"] == cluster.name.as_str());
        verdicts.push(judge(cluster, server, report).await);
    }
    verdicts
}

/// The answer of the primary.
#[derive(Clone, Copy, Debug)]
struct Server {
    system: SystemIdentifier,
    timeline: TimelineId,
    flush_lsn: Lsn,
    /// `None` if the role may not see it.
    in_recovery: Option<bool>,
}

/// Applies [`SERVER_TIMEOUT`].
async fn limited<T>(answer: impl Future<Output = Result<T>>) -> Result<T> {
    let limited = tokio::time::timeout(SERVER_TIMEOUT, answer).await;
    limited.unwrap_or(Err(Error::Silent {
        seconds: SERVER_TIMEOUT.as_secs(),
    }))
}

async fn server(cluster: &ClusterSettings) -> Result<Server> {
    let conninfo = conninfo::of_cluster(cluster)?;
    let mut client = ReplicationClient::connect(&conninfo, ConnectionMode::Physical).await?;
    let in_recovery = in_recovery(&mut client).await;
    let system = client.identify_system().await?;
    client.close().await;
    Ok(Server {
        system: system.system_identifier,
        timeline: system.timeline,
        flush_lsn: system.flush_lsn,
        in_recovery,
    })
}

async fn in_recovery(client: &mut ReplicationClient) -> Option<bool> {
    // The setting exists since PostgreSQL 14.
    if client.server_version().num >= 140_000 {
        let shown = client.show("in_hot_standby").await.ok()?;
        return Some(shown == "on");
    }
    let sql = ReplicationClient::connect(client.conninfo(), ConnectionMode::Sql);
    let mut sql = Box::pin(sql).await.ok()?;
    let answer = sql.query("SELECT pg_is_in_recovery()::text").await.ok()?;
    sql.close().await;
    let answer = answer.into_iter().flatten().flatten().next()?;
    Some(answer == "true")
}

async fn judge(
    cluster: &ClusterSettings,
    server: Result<Server>,
    report: Option<&Value>,
) -> Verdict {
    let mut conditions = Vec::new();
    let mut nobody = false;
    match &server {
        Ok(server) => {
            conditions.push(primary(server));
            conditions.push(everything_is_stored(server, report));
        }
        Err(error) => {
            let newest = tokio::task::block_in_place(|| newest_record(cluster));
            nobody = newest.is_err();
            conditions.push(stopped(&error.to_string(), &newest, report));
        }
    }
    conditions.push(backup(report));
    conditions.push(repository(report));
    for conninfo in &cluster.standbys {
        let system = server.as_ref().ok().map(|server| server.system);
        conditions.push(standby(conninfo, cluster, system, report).await);
    }
    Verdict {
        cluster: cluster.name.clone(),
        safe: conditions
            .iter()
            .all(|condition| condition.holds == Some(true)),
        conditions,
        nobody,
    }
}

fn primary(server: &Server) -> Condition {
    let name = "primary";
    let place = format!(
        "timeline {}, WAL up to {}",
        server.timeline, server.flush_lsn
    );
    match server.in_recovery {
        Some(false) => Condition::holds(name, place),
        Some(true) => Condition::fails(
            name,
            "the server is a standby".to_owned(),
            "name the primary in conninfo, or all servers with target_session_attrs=primary",
        ),
        None => Condition::unknown(
            name,
            "the server does not say whether it is a standby".to_owned(),
            "let the role connect to the database too (pg_hba.conf)",
        ),
    }
}

fn lsn(report: &Value, pointer: &str) -> Option<Lsn> {
    report.pointer(pointer)?.as_str()?.parse().ok()
}

fn timeline(report: &Value) -> Option<u64> {
    report.pointer("/source/timeline")?.as_u64()
}

/// The repository holds everything that the primary had flushed when it was asked.
fn everything_is_stored(server: &Server, report: Option<&Value>) -> Condition {
    let name = "WAL";
    let Some(report) = report else {
        return Condition::unknown(name, "the daemon does not answer".to_owned(), START_DAEMON);
    };
    let system = report.pointer("/source/system_identifier");
    if system.and_then(Value::as_str) != Some(server.system.to_string().as_str()) {
        return Condition::unknown(
            name,
            format!(
                "the daemon does not archive the server with system identifier {}",
                server.system
            ),
            "see `wal-archiver status`",
        );
    }
    if timeline(report) != Some(u64::from(server.timeline.get())) {
        return Condition::unknown(
            name,
            format!(
                "the daemon does not follow timeline {}, which the server is on",
                server.timeline
            ),
            "wait until it does (--wait), or see `wal-archiver status`",
        );
    }
    match lsn(report, "/durable/remote/lsn") {
        Some(remote) if remote >= server.flush_lsn => Condition::holds(
            name,
            format!("the repository holds everything up to {remote}"),
        ),
        Some(remote) => Condition::fails(
            name,
            format!(
                "the repository holds the WAL up to {remote}; {} bytes up to {} are missing there",
                server.flush_lsn.bytes_since(remote),
                server.flush_lsn
            ),
            "stop the writers and wait (--wait 1min); `wal-archiver status` shows what delays it",
        ),
        None => Condition::unknown(
            name,
            "the end of the WAL in the repository is not known".to_owned(),
            "see `wal-archiver status`",
        ),
    }
}

/// The end of the WAL in the repository.
#[derive(Clone, Copy, Debug)]
struct NewestWal {
    branch: Branch,
    end_lsn: Lsn,
    /// The start of the last record, if that is a shutdown checkpoint.
    shutdown: Option<Lsn>,
}

/// Reads the end of the WAL in the repository. `None` if no WAL is stored.
fn newest_record(cluster: &ClusterSettings) -> Result<Option<NewestWal>> {
    let repository = Repository::open_known(cluster)?;
    let catalog = Catalog::open_for_restore(Some(&cluster.catalog), &repository)?;
    let mut newest: Option<NewestWal> = None;
    for (branch, ..) in catalog.branches()? {
        let ranges = catalog.ranges(branch, Lsn::ZERO, Lsn::MAX)?;
        let Some(end_lsn) = ranges.iter().map(|range| range.end_lsn).max() else {
            continue;
        };
        let place = |newest: &NewestWal| (newest.branch.timeline, newest.end_lsn);
        if newest
            .as_ref()
            .is_some_and(|known| place(known) > (branch.timeline, end_lsn))
        {
            continue;
        }
        let mut shutdown = None;
        for range in ranges.iter().rev().take(2) {
            let events = catalog.events(range)?.into_iter();
            shutdown = events
                .filter(|(_, event)| is_shutdown(event))
                .map(|(lsn, _)| lsn)
                .filter(|lsn| is_last_record(*lsn, end_lsn))
                .max()
                .or(shutdown);
        }
        newest = Some(NewestWal {
            branch,
            end_lsn,
            shutdown,
        });
    }
    Ok(newest)
}

fn is_shutdown(event: &WalEvent) -> bool {
    let WalEvent::Checkpoint { kind, .. } = event else {
        return false;
    };
    *kind == CheckpointKind::Shutdown
}

/// Returns true if a shutdown checkpoint at `lsn` is the last record of WAL that ends at `end`.
fn is_last_record(lsn: Lsn, end: Lsn) -> bool {
    let left = end.bytes_since(lsn);
    let header = match lsn.0 / PAGE_BYTES == end.0.saturating_sub(1) / PAGE_BYTES {
        true => 0,
        false => PAGE_HEADER_MAX,
    };
    (SHUTDOWN_RECORD_BYTES..=SHUTDOWN_RECORD_ALIGNED + header).contains(&left)
}

/// The server does not answer. Nothing is missing if the WAL in the repository ends with the
/// checkpoint of a clean shutdown.
fn stopped(error: &str, newest: &Result<Option<NewestWal>>, report: Option<&Value>) -> Condition {
    let name = "WAL";
    let silent = format!("the server does not answer ({error})");
    let newest = match newest {
        Ok(Some(newest)) => newest,
        Ok(None) => {
            let detail = format!("{silent}, and the repository holds no WAL");
            return Condition::fails(name, detail, "start the server and `wal-archiver run`");
        }
        Err(error) => {
            let detail = format!("{silent}, and the repository cannot be read: {error}");
            return Condition::unknown(name, detail, "run this command again when it can be read");
        }
    };
    let seen = report.and_then(|report| lsn(report, "/source/flush_lsn"));
    let on = report.and_then(timeline);
    let is_behind = on.is_some_and(|on| on != u64::from(newest.branch.timeline.get()))
        || seen.is_some_and(|seen| seen > newest.end_lsn);
    match newest.shutdown {
        Some(lsn) if !is_behind => Condition::holds(
            name,
            format!(
                "{silent}; the WAL in the repository ends with its shutdown checkpoint at {lsn} on timeline {}",
                newest.branch.timeline
            ),
        ),
        _ => Condition::fails(
            name,
            format!(
                "{silent}, and the WAL in the repository ends at {} on timeline {} without a shutdown checkpoint",
                newest.end_lsn, newest.branch.timeline
            ),
            "leave `wal-archiver run` running and wait (--wait 1min); if the server has crashed, start it again and stop it \
             cleanly",
        ),
    }
}

/// A base backup leads to the server's present.
fn backup(report: Option<&Value>) -> Condition {
    let name = "backup";
    let Some(report) = report else {
        return Condition::unknown(name, "the daemon does not answer".to_owned(), START_DAEMON);
    };
    if report["looked"] != true {
        return Condition::unknown(
            name,
            "the daemon has not read the repository yet".to_owned(),
            "wait (--wait 1min)",
        );
    }
    let take = "run `wal-archiver backup`";
    if let Some(refusal) = report.pointer("/window/refusal").and_then(Value::as_str) {
        return Condition::fails(name, refusal.to_owned(), take);
    }
    match report.pointer("/last_backup/id").and_then(Value::as_str) {
        Some(id) => Condition::holds(name, format!("{id} leads to the current timeline")),
        None => Condition::fails(name, "there is no base backup".to_owned(), take),
    }
}

/// The daemon reaches the repository, and no WAL is missing.
fn repository(report: Option<&Value>) -> Condition {
    let name = "repository";
    let Some(report) = report else {
        return Condition::unknown(name, "the daemon does not answer".to_owned(), START_DAEMON);
    };
    if let Some(error) = report["repository_error"].as_str() {
        return Condition::fails(name, error.to_owned(), "see `wal-archiver status`");
    }
    if !report["gap"].is_null() {
        return Condition::fails(
            name,
            "WAL is missing and is searched for".to_owned(),
            "see `wal-archiver status`",
        );
    }
    let lost = report["lost_objects"].as_array().map_or(0, Vec::len);
    if lost > 0 {
        return Condition::fails(
            name,
            format!("{lost} archived objects are missing"),
            "run `wal-archiver verify`",
        );
    }
    let place = report["repository"].as_str().unwrap_or_default();
    Condition::holds(name, format!("{place} answers, and no WAL is missing"))
}

/// The standby keeps everything that the repository does not hold yet.
async fn standby(
    conninfo: &str,
    cluster: &ClusterSettings,
    system: Option<SystemIdentifier>,
    report: Option<&Value>,
) -> Condition {
    let name = "standby slot";
    let conninfo = match ConnInfo::parse(conninfo) {
        Ok(conninfo) => conninfo,
        Err(error) => {
            return Condition::unknown(name, error.to_string(), "correct standbys");
        }
    };
    let (place, slot) = (conninfo.places(), &cluster.slot);
    let found = limited(async { Ok(Standby::look(&conninfo, slot).await?) }).await;
    let found = match found {
        Ok(found) => found,
        Err(error) => {
            return Condition::unknown(
                name,
                format!("{place} does not answer ({error})"),
                "start it, or remove it from standbys",
            );
        }
    };
    let create = "`wal-archiver run` creates it while it reaches this server: wait (--wait 1min)";
    let problem = match &found.slot {
        _ if system.is_some_and(|system| system != found.system_identifier) => {
            let detail = format!("{place} is another cluster");
            return Condition::fails(name, detail, "remove it from standbys");
        }
        None => format!("{place} has no slot \"{slot}\", or the role may not see it"),
        Some(found) if !found.physical => {
            let detail = format!("\"{slot}\" is a logical slot on {place}");
            return Condition::fails(
                name,
                detail,
                "name another slot as slot in the configuration",
            );
        }
        Some(found) if found.wal_status.as_deref() == Some("lost") => {
            format!("{place} has invalidated \"{slot}\"")
        }
        Some(found) => match found.restart_lsn {
            None => format!("\"{slot}\" on {place} keeps no WAL yet"),
            Some(kept) => {
                let remote = report.and_then(|report| lsn(report, "/durable/remote/lsn"));
                return keeps(name, kept, remote, &format!("\"{slot}\" on {place}"));
            }
        },
    };
    Condition::fails(name, problem, create)
}

fn keeps(name: &'static str, kept: Lsn, remote: Option<Lsn>, slot: &str) -> Condition {
    match remote {
        Some(remote) if kept <= remote => {
            Condition::holds(name, format!("{slot} keeps the WAL from {kept}"))
        }
        Some(remote) => Condition::fails(
            name,
            format!("{slot} keeps the WAL from {kept}, and the repository ends at {remote}"),
            "wait until the repository has caught up (--wait 1min)",
        ),
        None => Condition::unknown(
            name,
            "the end of the WAL in the repository is not known".to_owned(),
            START_DAEMON,
        ),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn server() -> Server {
        Server {
            system: SystemIdentifier(7),
            timeline: TimelineId::FIRST,
            flush_lsn: Lsn(0x100_0060),
            in_recovery: Some(false),
        }
    }

    fn report() -> Value {
        json!({
            "cluster": "main", "looked": true, "repository": "file:///r",
            "source": { "system_identifier": "7", "timeline": 1, "flush_lsn": "0/1000060" },
            "durable": { "remote": { "lsn": "0/1000060" } },
            "window": { "refusal": null }, "last_backup": { "id": "x" },
            "repository_error": null, "gap": null, "lost_objects": [],
        })
    }

    /// Checks the three conditions on a report that `change` has changed.
    #[track_caller]
    fn check(change: impl Fn(&mut Value), expected: [Option<bool>; 3]) {
        let mut report = report();
        change(&mut report);
        let report = Some(&report);
        let conditions = [
            everything_is_stored(&server(), report),
            backup(report),
            repository(report),
        ];
        assert_eq!(
            conditions.clone().map(|one| one.holds),
            expected,
            "{conditions:?}"
        );
        for condition in conditions {
            assert_eq!(condition.remedy.is_none(), condition.holds == Some(true));
        }
    }

    #[test]
    fn what_is_missing_or_unknown_is_not_safe() {
        const YES: Option<bool> = Some(true);
        const NO: Option<bool> = Some(false);
        check(|_| {}, [YES, YES, YES]);
        let remote =
            |lsn: Value| move |report: &mut Value| report["durable"]["remote"]["lsn"] = lsn.clone();
        check(remote(json!("0/1000058")), [NO, YES, YES]);
        check(remote(json!("0/1000068")), [YES, YES, YES]);
        check(remote(Value::Null), [None, YES, YES]);
        check(
            |report| report["source"]["timeline"] = json!(2),
            [None, YES, YES],
        );
        check(
            |report| report["source"]["system_identifier"] = json!("8"),
            [None, YES, YES],
        );
        check(|report| report["looked"] = json!(false), [YES, None, YES]);
        check(|report| report["last_backup"] = Value::Null, [YES, NO, YES]);
        check(
            |report| report["window"]["refusal"] = json!("a gap"),
            [YES, NO, YES],
        );
        check(
            |report| report["repository_error"] = json!("away"),
            [YES, YES, NO],
        );
        check(
            |report| report["lost_objects"] = json!(["a"]),
            [YES, YES, NO],
        );
        for condition in [
            everything_is_stored(&server(), None),
            backup(None),
            repository(None),
        ] {
            assert_eq!(condition.holds, None);
        }
        let recovery = |in_recovery| {
            primary(&Server {
                in_recovery,
                ..server()
            })
            .holds
        };
        assert_eq!(
            [Some(false), Some(true), None].map(recovery),
            [YES, NO, None]
        );
        let kept = |kept, remote| keeps("", Lsn(kept), remote, "").holds;
        assert_eq!(kept(9, Some(Lsn(9))), YES);
        assert_eq!(kept(10, Some(Lsn(9))), NO);
        assert_eq!(kept(9, None), None);
    }

    #[test]
    fn after_a_shutdown_the_archive_must_end_with_its_checkpoint() {
        let newest = |shutdown| {
            Ok(Some(NewestWal {
                branch: Branch::FIRST,
                end_lsn: Lsn(0x100_0078),
                shutdown,
            }))
        };
        let holds = |newest: &Result<Option<NewestWal>>, report: Option<&Value>| {
            stopped("refused", newest, report).holds
        };
        let whole = newest(Some(Lsn(0x100_0000)));
        assert_eq!(holds(&whole, None), Some(true));
        assert_eq!(holds(&whole, Some(&report())), Some(true));
        let mut ahead = report();
        ahead["source"]["flush_lsn"] = json!("0/1000080");
        assert_eq!(holds(&whole, Some(&ahead)), Some(false));
        assert_eq!(holds(&newest(None), None), Some(false));
        assert_eq!(holds(&Ok(None), None), Some(false));
        let unread = Err(Error::Silent { seconds: 1 });
        assert_eq!(holds(&unread, None), None);

        let last = |lsn, end| is_last_record(Lsn(lsn), Lsn(end));
        assert!(last(0x28, 0x28 + 114) && last(0x28, 0x28 + 120));
        assert!(!last(0x28, 0x28 + 112) && !last(0x28, 0x28 + 121));
        // Over a page boundary, with the header of a page or of a segment.
        assert!(last(0x1fd0, 0x1fd0 + 144) && last(0x1fd0, 0x1fd0 + 160));
        assert!(!last(0x1fd0, 0x1fd0 + 168));
    }
}
