//! The checks of everything except the stream: the server's free slots and walsenders, both clocks,
//! base backups, the dashboard. Changes nothing.

use dashboard::http::{self, error::HttpError};
use replication::ReplicationClient;
use repository::{
    ExitKind, Repository,
    config::{ClusterSettings, RepositoryPlace, Settings},
};
use serde_json::Value;
use status::{
    alerts::{CERTIFICATE_SECONDS_MIN, CLOCK_OFFSET_SECONDS_MAX},
    units,
};
use wal_format::{BackupId, ObjectKey, PgTimestamp};

use super::{Report, tls_expiry};
use crate::{
    daemon::descriptors::{Limit, PROCESS, needed, needed_by_cluster},
    error::Result,
};

/// Compares the limit on open files with what the configured clusters need. The daemon's limit may
/// be another one, because systemd and a shell set their own.
pub(super) fn descriptors(clusters: usize, report: &mut Report) {
    let (limit, needed) = (Limit::now(), needed(clusters));
    let subject = match clusters {
        1 => "1 cluster needs".to_owned(),
        clusters => format!("{clusters} clusters need"),
    };
    let found = format!(
        "{subject} about {needed} ({PROCESS} for the daemon, {} for each cluster), the hard limit here is {}",
        needed_by_cluster(),
        limit.hard
    );
    if needed > limit.hard {
        let remedy = "raise LimitNOFILE= of the service, or the hard limit of `ulimit -n`: those that do not fit wait";
        report.fail("open files", &format!("{found}; {remedy}"), ExitKind::Usage);
    } else {
        let raised = if needed > limit.soft {
            format!(
                "; the daemon raises the soft limit of {} at its start",
                limit.soft
            )
        } else {
            String::new()
        };
        report.ok("open files", &format!("{found}{raised}"));
    }
}

/// Checks that a walsender and a slot are available, and compares the server's clock with ours.
pub(super) async fn server(
    sql: &mut ReplicationClient,
    slot: &str,
    report: &mut Report,
) -> Result<()> {
    let quoted = slot.replace('\'', "''");
    let rows = sql
        .query(&format!(
            "SELECT (current_setting('max_wal_senders')::int - (SELECT count(*) FROM pg_catalog.pg_stat_replication))::text, \
             (current_setting('max_replication_slots')::int - (SELECT count(*) FROM pg_catalog.pg_replication_slots))::text, \
             (EXISTS (SELECT FROM pg_catalog.pg_replication_slots WHERE slot_name = '{quoted}'))::text, \
             (extract(epoch FROM clock_timestamp()))::text"
        ))
        .await?;
    let ours = jiff::Timestamp::now().as_duration().as_secs_f64();
    let field = |at: usize| rows.first().and_then(|row| row.get(at)).cloned().flatten();
    let number = |at: usize| field(at).and_then(|text| text.parse::<i64>().ok());
    match number(0) {
        Some(free) if free < 2 => report.note(
            "max_wal_senders",
            &format!("{free} free; the stream and a base backup need one each: raise it and restart the server"),
        ),
        Some(free) => report.ok("max_wal_senders", &format!("{free} free")),
        None => {}
    }
    match (number(1), field(2).as_deref()) {
        (Some(..=0), Some("false")) => report.fail(
            "max_replication_slots",
            "none is free for ours; raise it and restart the server, or drop a slot that nobody uses",
            ExitKind::Usage,
        ),
        (Some(free), _) => report.ok("max_replication_slots", &format!("{free} free")),
        _ => {}
    }
    let offset = field(3)
        .and_then(|text| text.parse::<f64>().ok())
        .map(|clock| clock - ours);
    match offset {
        Some(offset) if offset.abs() > CLOCK_OFFSET_SECONDS_MAX => report.note(
            "clock",
            &format!(
                "the server's differs from this host's by {offset:.1} s; set both by NTP: a restore by time follows the server's"
            ),
        ),
        Some(_) => report.ok("clock", "the server's and this host's agree"),
        None => {}
    }
    Ok(())
}

/// Checks that there is a base backup, and that it is recent enough.
pub(super) fn backups(cluster: &ClusterSettings, report: &mut Report) {
    let what = "base backup";
    let age = match newest(cluster) {
        // An earlier check has reported that the repository cannot be reached.
        Err(_) => return,
        Ok(None) => {
            let remedy = "none yet, so nothing can be restored; run `wal-archiver backup` while `wal-archiver run` runs";
            return report.note(what, remedy);
        }
        Ok(Some(begun)) => units::span(PgTimestamp::from_jiff(jiff::Timestamp::now()), begun),
    };
    let limit = cluster.backup_max_age.as_secs_f64();
    let found = format!("the newest is {} old", units::duration(age));
    if age > limit {
        let remedy = "older than backup_max_age; run `wal-archiver backup`";
        report.note(what, &format!("{found}, {remedy}"));
    } else {
        report.ok(what, &found);
    }
}

/// Reports the retention of each repository. Without one, everything is kept for ever, and the disk
/// becomes full.
pub(super) fn retention(cluster: &ClusterSettings, report: &mut Report) {
    for place in cluster.repository.each() {
        let what = match cluster.repository.others.is_empty() {
            true => "retention".to_owned(),
            false => format!("retention in {place}"),
        };
        match &place.retention {
            Some(policy) => match unknown_backup(cluster, &place, &policy.pinned) {
                Some(id) => report.fail(
                    &what,
                    &format!(
                        "keep_backups names {id}, and no such backup is in {place}: correct or remove the name; \
                         `wal-archiver backup list` shows the backups"
                    ),
                    ExitKind::Usage,
                ),
                None => report.ok(&what, &policy.to_string()),
            },
            None => report.note(
                &what,
                "everything is kept forever; set keep_window to limit it",
            ),
        }
    }
}

/// Returns the first of `pinned` that is not a backup in the place. `None` too if the place cannot
/// be listed, which an earlier check has reported.
fn unknown_backup<'a>(
    cluster: &ClusterSettings,
    place: &RepositoryPlace,
    pinned: &'a [BackupId],
) -> Option<&'a BackupId> {
    if pinned.is_empty() {
        return None;
    }
    let repository = Repository::open_known_place(cluster, place).ok()?;
    let known = match repository.identity().ok()? {
        Some(identity) => repository
            .list(&format!("{}/backup/", identity.system_identifier))
            .ok()?,
        None => Vec::new(),
    };
    let is_known = |id: &BackupId| {
        let mut known = known.iter();
        known.any(|(key, _)| matches!(key, ObjectKey::BackupInfo(_, found) if found == id))
    };
    pinned.iter().find(|id| !is_known(id))
}

/// Returns the time at which the newest backup began, from its name.
fn newest(cluster: &ClusterSettings) -> repository::Result<Option<PgTimestamp>> {
    let repository = Repository::open_known(cluster)?;
    let Some(identity) = repository.identity()? else {
        return Ok(None);
    };
    let listed = repository.list(&format!("{}/backup/", identity.system_identifier))?;
    let begun = listed.iter().filter_map(|(key, _)| {
        let ObjectKey::BackupInfo(_, id) = key else {
            return None;
        };
        let time = format!("{}+0000", id.as_str().get(..15)?);
        let time = jiff::Timestamp::strptime("%Y%m%dT%H%M%S%z", time).ok()?;
        Some(PgTimestamp::from_jiff(time))
    });
    Ok(begun.max())
}

/// Reports the state of a cluster as the daemon sees it. `broken` is a failure: archiving or
/// restoring needs an operator, so not all preconditions hold.
fn state(of_daemon: &Value, report: &mut Report) {
    let text = |key: &str| of_daemon[key].as_str().unwrap_or("unknown");
    let (state, reason) = (text("state"), text("reason"));
    let what = format!("state of {}", text("cluster"));
    match state {
        "broken" => {
            let shown: Vec<&str> = report.failures.iter().map(String::as_str).collect();
            let reason = units::shorten(reason, &shown);
            report.fail(&what, &format!("broken: {reason}"), ExitKind::Failed);
        }
        "ok" => report.ok(&what, reason),
        _ => report.note(&what, &format!("{state}: {}", units::brief(reason))),
    }
}

/// Checks that the daemon answers, which state it reports for each cluster, and how long its
/// certificate remains valid.
pub(super) fn dashboard(settings: &Settings, reports: &[Value], report: &mut Report) {
    report.begin(None);
    let address = settings.http;
    if reports.is_empty() {
        let remedy = "start `wal-archiver run`, or name its address as http";
        report.note("daemon", &format!("none answers at {address}; {remedy}"));
    } else {
        report.ok("daemon", &format!("answers at {address}"));
    }
    for of_daemon in reports {
        state(of_daemon, report);
    }
    if let Err(error @ HttpError::Public { .. }) = http::check(address, &settings.http_access) {
        report.fail_with("dashboard", &error.into());
    }
    let Some((certificate, key)) = &settings.http_access.tls else {
        return;
    };
    let what = "dashboard's certificate";
    match tls_expiry(certificate, key) {
        Ok(None) => report.ok(what, "can be used"),
        Ok(Some(end)) => {
            let now = PgTimestamp::from_jiff(jiff::Timestamp::now());
            let left = units::span(end, now);
            let found = format!("lasts for {}", units::duration(left));
            if left < CERTIFICATE_SECONDS_MIN {
                let remedy = "replace the file; the daemon reads it again automatically";
                report.note(what, &format!("{found}; {remedy}"));
            } else {
                report.ok(what, &found);
            }
        }
        Err(problem) => report.fail(
            what,
            &format!("{problem}; mend http_tls_certificate and http_tls_key"),
            ExitKind::Usage,
        ),
    }
}

/// Reports configuration files outside of the data directory, which no base backup contains. Their
/// paths are unknown to a role that may not read all settings.
pub(super) async fn configuration(
    client: &mut ReplicationClient,
    report: &mut Report,
) -> Result<()> {
    let outside = "SELECT f.setting FROM pg_catalog.pg_settings f, pg_catalog.pg_settings d \
                   WHERE d.name = 'data_directory' AND f.name IN ('config_file', 'hba_file', 'ident_file') \
                   AND NOT starts_with(f.setting, d.setting || '/') ORDER BY 1";
    let files: Vec<String> = client
        .query(outside)
        .await?
        .into_iter()
        .flatten()
        .flatten()
        .collect();
    if !files.is_empty() {
        report.note(
            "configuration",
            &format!(
                "no base backup contains {}: outside of the data directory; keep a copy of it elsewhere",
                files.join(", ")
            ),
        );
    }
    Ok(())
}
