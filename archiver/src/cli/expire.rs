//! `wal-archiver expire`: prints what is kept and why, what is removed, and which times can no
//! longer be restored, before anything is changed.

use jiff::Timestamp;
use repository::{ExitKind, config::Settings, expire::Swept};
use serde::Serialize;
use wal_format::{ClusterName, SystemIdentifier};

use super::{output, places};
use crate::{
    error::{Error, Result},
    upkeep::expire::{
        self, PlaceReport, Wish,
        undo::{UndoReport, undo_all},
    },
};

/// The JSON output for one cluster.
#[derive(Serialize)]
struct Document<'a> {
    cluster: &'a ClusterName,
    dry_run: bool,
    repositories: Vec<PlaceReport>,
}

pub(super) fn expire(
    settings: &Settings,
    system: Option<SystemIdentifier>,
    dry_run: bool,
    json: bool,
) -> Result<()> {
    let mut documents = Vec::new();
    let mut ended = Ok(());
    for cluster in &settings.clusters {
        places::require_known(cluster)?;
        let now = Timestamp::now();
        let wish = Wish {
            system,
            now,
            dry_run,
        };
        let reports = expire::expire(cluster, wish, &|report| {
            if !json {
                announce(&cluster.name, report, dry_run);
            }
        });
        if !dry_run {
            expire::record(cluster, now, &reports);
        }
        if !json {
            reports
                .iter()
                .for_each(|report| told(&cluster.name, report, dry_run));
        }
        ended = ended.and(expire::outcome(&reports));
        documents.push(Document {
            cluster: &cluster.name,
            dry_run,
            repositories: reports,
        });
    }
    if json {
        output::json(&documents);
    }
    ended?;
    let mut places = documents.iter().flat_map(|one| &one.repositories);
    if places.all(|place| place.policy.is_none() && place.swept == Swept::default()) {
        return Err(Error::Usage {
            message: "nothing expires, because no retention is configured: set keep_window, for example keep_window = \
                      \"14d\""
                .to_owned(),
        });
    }
    Ok(())
}

/// Undoes the expiries that are younger than `expire_grace`.
pub(super) fn undo(
    settings: &Settings,
    system: Option<SystemIdentifier>,
    json: bool,
) -> Result<()> {
    let now = Timestamp::now();
    let (mut is_undone, mut is_late) = (false, false);
    let mut documents = Vec::new();
    for cluster in &settings.clusters {
        let reports = undo_all(cluster, system, now)?;
        for report in &reports {
            is_undone |= !report.undone.is_empty();
            is_late |= !report.too_late.is_empty();
            if !json {
                print_undone(&cluster.name, report);
            }
        }
        documents.push(serde_json::json!({ "cluster": cluster.name, "repositories": reports }));
    }
    if json {
        output::json(&documents);
    }
    if is_undone {
        if !json {
            output::line(
                "The next expiry decides by the policy again. To keep this data, change keep_window, keep_backups_min or \
                 keep_backups now, and let the daemon read the file again (SIGHUP)",
            );
        }
        return Ok(());
    }
    let problem = match is_late {
        true => "nothing was undone: the grace of every expiry is over, or ends within a minute",
        false => "nothing was undone: nothing has expired since the last removal",
    };
    Err(Error::Expire {
        problem: problem.to_owned(),
        kind: ExitKind::Failed,
    })
}

fn print_undone(cluster: &ClusterName, report: &UndoReport) {
    let place = format!("cluster {cluster}: {}", report.repository);
    for marked in &report.undone {
        output::line(&format!("{place}: the expiry of {marked} is undone"));
    }
    for backup in &report.backups {
        output::line(&format!("  counts again  {backup}"));
    }
    if report.wal_ranges > 0 {
        output::line(&format!(
            "  counts again  WAL in {} range(s)",
            report.wal_ranges
        ));
    }
    for marked in &report.too_late {
        output::line(&format!(
            "{place}: the expiry of {marked} cannot be undone, its grace is over or ends within a minute"
        ));
    }
}

/// Prints the decision before it is carried out.
fn announce(cluster: &ClusterName, report: &PlaceReport, dry_run: bool) {
    let place = format!("cluster {cluster}: {}", report.repository);
    let Some(policy) = &report.policy else {
        return output::line(&format!("{place}: everything is kept forever"));
    };
    output::line(&format!("{place}: keeps {policy}"));
    for backup in &report.kept {
        let problem = backup.problem.as_ref();
        let problem = problem.map_or_else(String::new, |problem| format!("  NOT WHOLE: {problem}"));
        output::line(&format!(
            "  keep    {}  {}  {}  {}{problem}",
            backup.id,
            backup.finished,
            output::bytes(backup.stored_bytes),
            backup.reasons.join(", ")
        ));
    }
    for backup in &report.removed {
        output::line(&format!(
            "  expire  {}  {}  {}  {}",
            backup.id,
            backup.finished,
            output::bytes(backup.stored_bytes),
            backup.label
        ));
    }
    for range in &report.wal {
        output::line(&format!(
            "  expire  WAL {} to {} of timeline {}",
            range.from_lsn, range.to_lsn, range.branch
        ));
    }
    for window in &report.vanishing {
        let verb = if dry_run { "would vanish" } else { "vanishes" };
        output::line(&format!("  {verb}: {}", output::window(window, "")));
    }
}

/// Prints the result.
fn told(cluster: &ClusterName, report: &PlaceReport, dry_run: bool) {
    let place = format!("cluster {cluster}: {}", report.repository);
    let swept = report.swept;
    let is_idle = report.policy.is_none() && swept == Swept::default();
    if is_idle || report.problem.is_some() {
        return;
    }
    if report.records.objects > 0 {
        let verb = if dry_run { "would go" } else { "removed" };
        output::line(&format!(
            "{place}: {} records of the audit trail are older than audit_keep, {verb}",
            report.records.objects
        ));
    }
    let bytes = output::bytes(swept.bytes);
    if dry_run {
        return output::line(&format!(
            "{place}: {} objects, {bytes}, would go; nothing was changed",
            swept.objects
        ));
    }
    if let (Some(_), Some(from)) = (&report.marked, report.removed_from) {
        output::line(&format!(
            "{place}: what expires counts as absent from now on, and is removed from {from} on"
        ));
    }
    if swept.objects > 0 || swept.locked > 0 {
        output::line(&format!(
            "{place}: {} objects, {bytes}, removed",
            swept.objects
        ));
    } else if report.marked.is_none() {
        output::line(&format!("{place}: nothing expires"));
    }
    if swept.locked > 0 {
        output::line(&format!(
            "{place}: at least {} objects are locked and stay; they do no harm, and are tried again",
            swept.locked
        ));
    }
}
