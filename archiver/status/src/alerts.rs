//! Decides which alerts a report raises ([`firing`]), for installations without Prometheus. Pure.
//! The conditions are those of `monitoring/tidemark.rules.yml`.
//!
//! Invariant: an unknown value never ends an alert that a known value raised (`is_decided`).

mod protection;
mod table;

pub use table::RULES;

use wal_format::{OutcomeKind, PgTimestamp};

use crate::{
    alert::{Rule, Severity},
    light::{Cause, CauseKind},
    report::ClusterReport,
    state::State,
    units::micros,
};

/// Returns the entry of an alert.
#[must_use]
pub fn rule(name: &str) -> Option<&'static Rule> {
    RULES.iter().find(|rule| rule.name == name)
}

/// The greatest difference between two clocks that are set by NTP, in seconds.
pub const CLOCK_OFFSET_SECONDS_MAX: f64 = 5.0;
/// The remaining lifetime at which a certificate should have been renewed, in seconds.
pub const CERTIFICATE_SECONDS_MIN: f64 = 14.0 * 86_400.0;
/// The used share of the spool from which it counts as nearly full.
const SPOOL_SHARE_MAX: f64 = 0.9;
/// The slot is at risk if less than this share of the WAL that it may retain is left.
const SLOT_SHARE_MIN: f64 = 0.25;

/// Returns the name and the summary of each condition that holds in `report`.
#[must_use]
pub fn firing(report: &ClusterReport) -> Vec<(&'static str, String)> {
    let mut found = Vec::new();
    let mut raise = |name, summary: String| found.push((name, summary));
    let target = report.rpo_target_seconds;
    match report.durable.remote.rpo_seconds {
        Some(rpo) if rpo > target => raise(
            "PitrRpoOverTarget",
            format!("Losing the primary now loses up to {rpo:.1} s; the target is {target:.1} s."),
        ),
        _ => {}
    }
    if !report.source.stream_connected {
        let error = report.stream_error.as_deref().unwrap_or("no stream is up");
        raise("PitrStreamDown", format!("The stream is down: {error}."));
    }
    if let Some(gaps) = report.window.open_gaps.filter(|gaps| *gaps > 0) {
        raise(
            "PitrGap",
            format!(
                "WAL is missing in {gaps} place(s) with no base backup after the gap: later times \
                 cannot be restored."
            ),
        );
    }
    if report.state == State::Broken {
        raise("PitrBroken", format!("{}.", report.reason));
    }
    if let Some(slot) = &report.slot {
        let lost = slot.wal_status.as_deref() == Some("lost");
        if lost {
            raise(
                "PitrSlotLost",
                format!("The replication slot {} is lost.", slot.name),
            );
        } else if slot.wal_status.as_deref() == Some("unreserved") || slot_share(report) {
            raise(
                "PitrSlotAtRisk",
                format!("The replication slot {} is near its loss.", slot.name),
            );
        }
    }
    let counters = &report.counters;
    if let Some(limit) = counters.spool_limit_bytes
        && number(counters.spool_used_bytes) > SPOOL_SHARE_MAX * number(limit)
    {
        raise(
            "PitrSpoolNearFull",
            "The spool has used nine tenths of its room.".to_owned(),
        );
    }
    if let Some(error) = &report.repository_error {
        raise(
            "PitrRepositoryFailing",
            format!("The repository fails: {error}."),
        );
    }
    if let Some(summary) = away(report) {
        raise("PitrRepositoryAway", summary);
    }
    let age = |time: Option<PgTimestamp>| time.map(|time| micros(report.as_of.micros_since(time)));
    match age(report.last_backup.as_ref().map(|backup| backup.finished)) {
        // It is known only after the first check of the catalog whether there is a backup.
        None if report.looked => {
            raise(
                "PitrBackupOverdue",
                "There is no base backup: nothing can be restored.".to_owned(),
            );
        }
        Some(age) if age > report.backup_max_age_seconds => raise(
            "PitrBackupOverdue",
            format!("The newest base backup is {:.1} days old.", age / 86_400.0),
        ),
        _ => {}
    }
    if let Some(failed) = &report.failed_backup {
        raise(
            "PitrBackupFailed",
            format!("The last base backup failed: {}", failed.message),
        );
    }
    // While the repository fails, its own alert says why nothing else works.
    if let Some(failed) = &report.failed_expire
        && report.repository_error.is_none()
    {
        raise(
            "PitrExpireFailed",
            format!("Retention was not applied: {}", failed.message),
        );
    }
    if let Some(limit) = report.drill_max_age_seconds {
        match age(report.last_drill_passed) {
            None if report.looked => {
                raise(
                    "PitrDrillOverdue",
                    "No restore drill has passed yet.".to_owned(),
                );
            }
            Some(age) if age > limit => raise(
                "PitrDrillOverdue",
                format!(
                    "The last restore drill passed {:.1} days ago.",
                    age / 86_400.0
                ),
            ),
            _ => {}
        }
    }
    if let Some(drill) = report.last_drill.as_ref().filter(|drill| !drill.passed) {
        raise(
            "PitrDrillFailed",
            format!("The last restore drill failed: {}", drill.message),
        );
    }
    let drills = report.drill_schedule.as_ref();
    if let Some(error) = drills.and_then(|drills| drills.last_error.as_deref()) {
        raise(
            "PitrDrillWithoutResult",
            format!("The last scheduled restore drill has no result: {error}."),
        );
    }
    if report.corrupt_objects.is_some_and(|objects| objects > 0) {
        let objects = report.corrupt_objects.unwrap_or_default();
        let summary = match report.lost_objects.as_slice() {
            [] => format!("{objects} object(s) of the repository are damaged or missing."),
            lost => format!("The repository has lost {}.", lost.join("; ")),
        };
        raise("PitrCorruptObject", summary);
    }
    if let Some(offset) = report
        .clock_offset_seconds
        .filter(|offset| offset.abs() > CLOCK_OFFSET_SECONDS_MAX)
    {
        raise(
            "PitrClockStep",
            format!("The server's clock differs from this host's by {offset:.1} s."),
        );
    }
    if let Some(left) = report
        .certificate_expiry
        .map(|expiry| micros(expiry.micros_since(report.as_of)))
        .filter(|left| *left < CERTIFICATE_SECONDS_MIN)
    {
        raise(
            "PitrCertificateExpiry",
            format!(
                "The dashboard's certificate ends in {:.1} days.",
                left / 86_400.0
            ),
        );
    }
    protection::firing(report, &mut found);
    found
}

/// Describes the first of several repositories that is away, or that held an older state of the
/// archive, and whether another one answers.
fn away(report: &ClusterReport) -> Option<String> {
    let places = &report.repositories;
    let Some((url, error)) = places
        .iter()
        .find_map(|place| Some((&place.url, place.error.as_ref()?)))
    else {
        let place = places.iter().find(|place| place.older.is_some())?;
        let (url, older) = (&place.url, place.older.as_deref()?);
        return Some(format!("The repository {url} was incomplete: {older}."));
    };
    let others = places.iter().filter(|place| place.url != *url);
    let (answering, failing): (Vec<_>, Vec<_>) = others.partition(|place| place.error.is_none());
    let rest = match (answering.first(), failing.is_empty()) {
        (Some(other), true) => format!("WAL is stored in {} meanwhile", other.url),
        (Some(other), false) => format!(
            "{} more are away, and WAL is stored in {} meanwhile",
            failing.len(),
            other.url
        ),
        (None, _) => "no other repository answers".to_owned(),
    };
    Some(format!("The repository {url} is away, {rest}: {error}."))
}

/// Returns true if `report` knows the facts that decide an alert. An alert that fires continues to
/// fire while they are unknown: after a restart, and while the primary cannot be reached.
pub fn is_decided(name: &str, report: &ClusterReport) -> bool {
    match name {
        "PitrRpoOverTarget" => report.durable.remote.rpo_seconds.is_some(),
        "PitrBroken" => report.state != State::Unknown,
        "PitrGap" => report.window.open_gaps.is_some(),
        "PitrSlotAtRisk" | "PitrSlotLost" | "PitrSlotInactive" | "PitrSlotMissing" => {
            let slot = report.slot.as_ref();
            report.slot_missing || slot.is_some_and(|slot| slot.wal_status.is_some())
        }
        "PitrSpoolNearFull" => report.counters.spool_limit_bytes.is_some(),
        "PitrSpoolFilling"
        | "PitrOffsiteBehind"
        | "PitrRepositoryAway"
        | "PitrRepositoryFailing" => report.looked && report.source.stream_connected,
        // After a restart it is known only when the drill was tried again.
        "PitrDrillWithoutResult" => report.drill_schedule.as_ref().is_none_or(|drills| {
            let is_later = drills.next_run.is_some_and(|next| next > report.as_of);
            is_later && drills.running_since.is_none()
        }),
        "PitrClockStep" => report.clock_offset_seconds.is_some(),
        "PitrPushFailing" => report.archive_command.is_some(),
        "PitrStreamDown" | "PitrCertificateExpiry" => true,
        _ => {
            report.looked
                && !report
                    .unread_outcomes
                    .iter()
                    .any(|kind| decides(*kind, name))
        }
    }
}

/// Returns true if an alert depends on the newest outcome of this kind.
fn decides(kind: OutcomeKind, name: &str) -> bool {
    match kind {
        OutcomeKind::Backup => name == "PitrBackupFailed",
        OutcomeKind::Drill => matches!(name, "PitrDrillFailed" | "PitrDrillOverdue"),
        OutcomeKind::Expire => name == "PitrExpireFailed",
        OutcomeKind::Verify => matches!(name, "PitrCorruptObject" | "PitrVerifyOverdue"),
        _ => false,
    }
}

/// Returns the cause of the first critical condition of a report, before its alert has fired.
/// `None` without a critical condition.
pub fn worst_cause(report: &ClusterReport) -> Option<Cause> {
    let critical = firing(report)
        .into_iter()
        .find(|(name, _)| rule(name).is_some_and(|rule| rule.severity == Severity::Critical));
    critical.map(|(name, summary)| Cause {
        state: match name {
            // A short interruption is not a risk. If it lasts, the alert fires and makes it one.
            "PitrRepositoryFailing" | "PitrStreamDown" => State::Degraded,
            _ => State::AtRisk,
        },
        reason: summary.trim_end_matches('.').to_owned(),
        kind: CauseKind::Other,
    })
}

fn slot_share(report: &ClusterReport) -> bool {
    let Some(slot) = &report.slot else {
        return false;
    };
    match (slot.safe_wal_bytes, slot.retained_bytes) {
        (Some(safe), Some(retained)) => {
            let limit = number(safe) + number(retained);
            limit > 0.0 && number(safe) < SLOT_SHARE_MIN * limit
        }
        _ => false,
    }
}

#[expect(clippy::cast_precision_loss, reason = "a threshold needs no more")]
fn number(bytes: u64) -> f64 {
    bytes as f64
}

#[cfg(test)]
mod tests;
