//! Decides which alerts a report raises ([`firing`]), for users without Prometheus. Pure. The
//! conditions are those of `monitoring/tidemark.rules.yml`.
//!
//! Invariant: an unknown value never silences an alert that a known value raised. Every alert names
//! the remedy.

use serde::Serialize;
use wal_format::PgTimestamp;

use crate::report::{ClusterReport, State};

/// The severity of an alert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// An operator should act soon.
    Warning,
    /// An operator should act now.
    Critical,
}

impl Severity {
    /// The name in JSON, events and notifications.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Warning => "warning",
            Self::Critical => "critical",
        }
    }
}

/// A condition that requires an operator's action.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Alert {
    /// The name, which is also that of the Prometheus rule.
    pub name: &'static str,
    /// The severity.
    pub severity: Severity,
    /// The problem, as a sentence.
    pub summary: String,
    /// The remedy.
    pub runbook: &'static str,
    /// The time since which the condition holds.
    pub since: PgTimestamp,
}

/// Every alert with its severity and remedy. The page, the notifications, the metric, and the test
/// that compares the Prometheus rules use this list.
pub const RUNBOOK: [(&str, Severity, &str); 16] = [
    (
        "PitrRpoOverTarget",
        Severity::Critical,
        "More would be lost than you allow. Look at the stream and the repository below: whichever fails is named. When both work, the repository is slower than the WAL: raise seal_threads, or give it a faster network.",
    ),
    (
        "PitrStreamDown",
        Severity::Critical,
        "No WAL arrives. Is PostgreSQL up, do host, port, password and pg_hba.conf still fit? `wal-archiver check` names what is refused. The slot keeps WAL on the server meanwhile.",
    ),
    (
        "PitrBroken",
        Severity::Critical,
        "Archiving or restoring needs a person; the reason says what for. It is tried again by itself every 30 s where trying can help.",
    ),
    (
        "PitrGap",
        Severity::Critical,
        "WAL is missing: a time inside the gap can not be restored. Take a base backup now (`wal-archiver backup`), so that everything after it can. If a standby or a copy of pg_wal has the range, name it in heal_from.",
    ),
    (
        "PitrSlotAtRisk",
        Severity::Warning,
        "PostgreSQL will soon remove WAL that the archiver has not got. Make the archiver catch up, or raise max_slot_wal_keep_size.",
    ),
    (
        "PitrSlotLost",
        Severity::Critical,
        "PostgreSQL removed WAL that the archiver had not got. It looks for it elsewhere, else declares it lost and takes a base backup. Raise max_slot_wal_keep_size.",
    ),
    (
        "PitrSpoolNearFull",
        Severity::Warning,
        "The spool's disk is nearly full. Usually the repository does not take WAL: mend that first. Never delete files of the spool: they are the only copy.",
    ),
    (
        "PitrRepositoryFailing",
        Severity::Critical,
        "The repository refuses or does not answer; the error is named. WAL waits in the spool and nothing is lost while it has room. Check credentials, network, quota.",
    ),
    (
        "PitrBackupOverdue",
        Severity::Warning,
        "Run `wal-archiver backup`. The older the backup, the longer a restore replays WAL; without one nothing can be restored.",
    ),
    (
        "PitrBackupFailed",
        Severity::Warning,
        "The last base backup failed; its message says why. Run `wal-archiver backup` after mending it.",
    ),
    (
        "PitrExpireFailed",
        Severity::Warning,
        "Retention was not applied, so nothing is removed and the repository grows; the message says what stands in the way. Run `wal-archiver expire` after mending it.",
    ),
    (
        "PitrDrillOverdue",
        Severity::Warning,
        "No recent restore drill has proved that a restore works. Restore to an empty directory with `pitr-restore --target-dir DIR --start`, and check the rows.",
    ),
    (
        "PitrDrillFailed",
        Severity::Critical,
        "A restore was tried and failed: treat the archive as not restorable until a drill passes. Its message says where it stopped; `wal-archiver verify --deep` finds what is damaged.",
    ),
    (
        "PitrCorruptObject",
        Severity::Critical,
        "Objects in the repository are damaged or missing. `wal-archiver verify` names them. Take a base backup now; restore the objects from a copy of the repository if there is one. What is lost for good is accepted with `wal-archiver verify --accept-loss`.",
    ),
    (
        "PitrClockStep",
        Severity::Warning,
        "The server's clock and this host's differ. Restoring by time follows the server's clock: set both by NTP, and restore by LSN or transaction across the step.",
    ),
    (
        "PitrCertificateExpiry",
        Severity::Warning,
        "The dashboard's certificate ends soon. Replace the file: it is read again by itself.",
    ),
];

/// The greatest difference between two clocks that are set by NTP, in seconds.
pub(crate) const CLOCK_OFFSET_SECONDS_MAX: f64 = 5.0;
/// The remaining lifetime at which a certificate should have been renewed, in seconds.
pub(crate) const CERTIFICATE_SECONDS_MIN: f64 = 14.0 * 86_400.0;
/// The used share of the spool from which it counts as nearly full.
const SPOOL_SHARE_MAX: f64 = 0.9;
/// The slot is at risk if less than this share of the WAL that it may retain is left.
const SLOT_SHARE_MIN: f64 = 0.25;

/// Returns the time, in seconds, for which a condition must hold before it raises an alert.
#[must_use]
pub fn patience_seconds(name: &str) -> f64 {
    match name {
        "PitrStreamDown" | "PitrRepositoryFailing" => 3.0,
        _ => 0.0,
    }
}

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
                "WAL is missing in {gaps} place(s) with no base backup behind: later times can not be restored."
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
    let away = report.repositories.iter().find_map(|place| {
        let error = place.error.as_ref()?;
        Some(format!("The repository {} is away: {error}.", place.url))
    });
    let failing = report
        .repository_error
        .as_ref()
        .map(|error| format!("The repository fails: {error}."));
    if let Some(summary) = failing.or(away) {
        raise("PitrRepositoryFailing", summary);
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
    if let Some(failed) = &report.failed_expire {
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
    found
}

/// Returns the state that the critical conditions of a report require, and its reason, so that the
/// light is never better than the worst alert. `None` without a critical condition.
pub(crate) fn worst_state(report: &ClusterReport) -> Option<(State, String)> {
    let critical = firing(report)
        .into_iter()
        .find(|(name, _)| describe(name).0 == Severity::Critical);
    critical.map(|(name, summary)| {
        let state = match name {
            // Another repository has all WAL, or the stream is being retried.
            "PitrRepositoryFailing" | "PitrStreamDown" => State::Degraded,
            _ => State::AtRisk,
        };
        (state, summary.trim_end_matches('.').to_owned())
    })
}

/// Returns the severity and the remedy of an alert.
#[must_use]
pub fn describe(name: &str) -> (Severity, &'static str) {
    RUNBOOK
        .iter()
        .find(|(known, ..)| *known == name)
        .map_or((Severity::Warning, ""), |(_, severity, text)| {
            (*severity, text)
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

#[expect(
    clippy::cast_precision_loss,
    reason = "an age in seconds needs no more"
)]
fn micros(micros: i64) -> f64 {
    micros as f64 / 1e6
}
