//! `wal-archiver expire`: prints what is kept and why, what is removed, and which times can no
//! longer be restored, before anything is changed.

use jiff::Timestamp;
use repository::config::Settings;
use serde::Serialize;
use wal_format::{ClusterName, SystemIdentifier};

use super::output;
use crate::{
    error::Result,
    expire::{self, PlaceReport, Wish},
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
    ended
}

/// Prints the plan before anything is changed.
fn announce(cluster: &ClusterName, report: &PlaceReport, dry_run: bool) {
    let place = format!("cluster {cluster}: {}", report.repository);
    let Some(policy) = &report.policy else {
        return output::line(&format!("{place}: everything is kept for ever"));
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
        output::line(&format!(
            "  {verb}: every moment from {} to {} (WAL {} to {} of timeline {})",
            expire::time(window.from),
            expire::time(window.to),
            window.from_lsn,
            window.to_lsn,
            window.branch
        ));
    }
}

/// Prints the result.
fn told(cluster: &ClusterName, report: &PlaceReport, dry_run: bool) {
    let place = format!("cluster {cluster}: {}", report.repository);
    if report.policy.is_none() || report.problem.is_some() {
        return;
    }
    let swept = report.swept;
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
