//! [`ClusterReport`]: the single report on a cluster, used by the page, the API, the metrics and
//! `status`.
//!
//! The daemon fills it from its memory. Nothing in this module queries the store or PostgreSQL, so
//! a scrape cannot disturb the stream.
//! Invariant: an unknown value is `None`, never 0. [`judge`] is the only function that derives the
//! state from the facts.

use repository::store::{MemberState, RequestReport};
use serde::Serialize;
use wal_format::{
    BackupId, ClusterName, Lsn, Outcome, OutcomeKind, PgTimestamp, SystemIdentifier, TimelineId,
};

use crate::{alerts::Alert, pipeline::gap::OpenGap, rpo::Exposure, standby_slots::StandbyReport};

mod details;
pub(crate) mod words;

pub use details::{Details, GapReport, HeldRange, Mark, MarkKind, RestorableRange};

/// The overall state of a cluster, decided by the worst fact.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// The stream is up and the repository is within its target.
    Ok,
    /// Nothing would be lost if the primary died now, but a protection against loss is missing.
    Degraded,
    /// More WAL than the target allows would be lost if the primary died now. Without a base backup
    /// that is everything.
    AtRisk,
    /// Archiving has stopped, a part of the WAL is missing, or no base backup leads to the present.
    Broken,
    /// The primary cannot be seen, or the catalog was not read yet. Nothing is known beyond the
    /// last proof.
    Unknown,
}

impl State {
    /// Every state, for the state set of the metrics.
    pub const ALL: [Self; 5] = [
        Self::Ok,
        Self::Degraded,
        Self::AtRisk,
        Self::Broken,
        Self::Unknown,
    ];

    /// The name in metrics and JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Degraded => "degraded",
            Self::AtRisk => "at_risk",
            Self::Broken => "broken",
            Self::Unknown => "unknown",
        }
    }
}

/// The known facts about the primary.
#[derive(Clone, Debug, Default, Serialize)]
pub struct SourceReport {
    /// The server's system identifier. `None` before the first connection.
    pub system_identifier: Option<SystemIdentifier>,
    /// The version, as the server prints it. `None` before the first connection.
    pub server_version: Option<String>,
    /// The server's current timeline. If its path is not known yet, the timeline that is archived.
    pub timeline: Option<TimelineId>,
    /// The greatest flush LSN seen so far. `None` before the server was seen.
    pub flush_lsn: Option<Lsn>,
    /// True if a replication stream is up.
    pub stream_connected: bool,
    /// The time of the server's last message, by our clock.
    pub last_contact: Option<PgTimestamp>,
}

/// The position and the lag of one tier.
#[derive(Clone, Debug, Default, Serialize)]
pub struct TierReport {
    /// The end of the contiguous durable WAL. `None` if there is none.
    pub lsn: Option<Lsn>,
    /// The bytes by which the tier lags the primary's flush LSN. `None` while that is unknown.
    pub lag_bytes: Option<u64>,
    /// The age in seconds of the oldest flushed WAL that the tier does not hold. `None` if nothing
    /// was ever proved.
    pub rpo_seconds: Option<f64>,
}

impl TierReport {
    /// Builds the report from the tier's position and the estimator's answer.
    #[must_use]
    pub fn new(lsn: Option<Lsn>, exposure: Exposure) -> Self {
        Self {
            lsn,
            lag_bytes: exposure.lag_bytes,
            rpo_seconds: exposure.rpo.map(|age| age.as_secs_f64()),
        }
    }
}

/// The state of both tiers.
#[derive(Clone, Debug, Default, Serialize)]
pub struct DurableReport {
    /// WAL that is fsynced in the spool of this host.
    pub local: TierReport,
    /// WAL that is stored in the repository.
    pub remote: TierReport,
}

/// The replication slot, as PostgreSQL shows it.
#[derive(Clone, Debug, Serialize)]
pub struct SlotReport {
    /// The name of the slot.
    pub name: String,
    /// True if a walsender uses it.
    pub active: bool,
    /// The column `wal_status` of `pg_replication_slots`. `None` while the server is not polled.
    pub wal_status: Option<String>,
    /// WAL that the slot retains on the primary, in bytes. `None` while it is unknown.
    pub retained_bytes: Option<u64>,
    /// WAL in bytes that can be written before the slot is lost. `None` (no limit) without
    /// `max_slot_wal_keep_size`.
    pub safe_wal_bytes: Option<u64>,
    /// Seconds until the slot is lost if WAL is written at the rate of the last minute and is not
    /// archived. `None` without a limit and while no WAL is written.
    pub full_in_seconds: Option<f64>,
}

/// The window in which the cluster can be restored without naming a timeline, according to the
/// restorer's plan.
#[derive(Clone, Debug, Default, Serialize)]
pub struct WindowReport {
    /// The end of the oldest usable base backup, by the server's clock. Never after `latest`.
    /// `None` without a usable backup.
    pub earliest: Option<PgTimestamp>,
    /// The last instant that can be restored, by the server's clock. This is the last commit, or a
    /// later time up to which the repository proves that nothing is missing. `None` if neither is
    /// known.
    pub latest: Option<PgTimestamp>,
    /// The last commit in the repository that can be reached from a base backup. `None` if there is
    /// none.
    pub latest_commit: Option<PgTimestamp>,
    /// The number of interruptions of the WAL within the window. `None` without a backup.
    pub gaps: Option<u64>,
    /// The number of interruptions with no later base backup. Times after them cannot be restored.
    /// `None` without a backup.
    pub open_gaps: Option<u64>,
    /// The reason why a restore to the server's present would be refused. `None` if it would be
    /// accepted, and before the catalog was read.
    pub refusal: Option<String>,
}

/// The duration of a restore: target, measurement and estimate.
#[derive(Clone, Debug, Default, Serialize)]
pub struct RtoReport {
    /// The RTO set by the operator, in seconds. `None` if none is set.
    pub target_seconds: Option<f64>,
    /// The duration of the last passed drill, in seconds. `None` before the first.
    pub measured_seconds: Option<f64>,
    /// The estimated duration of a restore to the newest commit, in seconds. `None` while no drill
    /// has measured the rates.
    pub estimate_seconds: Option<f64>,
    /// The fetch rate of the last drill.
    pub fetch_bytes_per_second: Option<f64>,
    /// The WAL replay rate of the last drill.
    pub replay_bytes_per_second: Option<f64>,
    /// The WAL that a restore would replay, in bytes. `None` without a backup.
    pub wal_since_backup_bytes: Option<u64>,
    /// The method of the estimate, or the reason why there is none.
    pub how: String,
    /// The recommended action. `None` if the estimate is within the target.
    pub advice: Option<String>,
}

/// A complete base backup.
#[derive(Clone, Debug, Serialize)]
pub struct BackupReport {
    /// The name of the backup.
    pub id: BackupId,
    /// The time at which it began.
    pub started: PgTimestamp,
    /// The time at which it became restorable.
    pub finished: PgTimestamp,
    /// The LSN at which redo begins.
    pub start_lsn: Lsn,
    /// The timeline it was taken on.
    pub timeline: TimelineId,
    /// The size in the repository, in bytes.
    pub stored_bytes: u64,
}

/// Counters since the start of the daemon.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Counters {
    /// WAL received in bytes, including the overlap after a reconnect.
    pub wal_received_bytes: u64,
    /// Bytes of sealed segments and tails put into the repository.
    pub wal_stored_bytes: u64,
    /// Segments sealed, stored and verified.
    pub segments_completed: u64,
    /// Superfluous objects that the repository does not delete, because they are locked or deletion
    /// is forbidden.
    pub objects_locked: u64,
    /// The number of reconnects, by reason.
    pub reconnects: Vec<(String, u64)>,
    /// Repository requests that failed, by operation and kind.
    pub repository_errors: Vec<(String, String, u64)>,
    /// The number of bytes in the spool's files.
    pub spool_used_bytes: u64,
    /// The limit of the spool in bytes: its current size plus the free space on its disk, or the
    /// configured limit if that is less.
    pub spool_limit_bytes: Option<u64>,
    /// Bytes that are waiting for the repository.
    pub upload_queue_bytes: u64,
    /// Age in seconds of the oldest WAL that is waiting for the repository. 0 if none is waiting,
    /// and `None` if the age is not known.
    pub upload_queue_age_seconds: Option<f64>,
    /// The number of runs that failed since the start, by kind. A kind without an entry has none.
    pub runs_failed: Vec<(OutcomeKind, u64)>,
}

/// The complete report on a cluster at one moment.
#[derive(Clone, Debug, Serialize)]
pub struct ClusterReport {
    /// The version of this document.
    pub schema: &'static str,
    /// The name of the cluster.
    pub cluster: ClusterName,
    /// The time to which the report applies.
    pub as_of: PgTimestamp,
    /// The overall state.
    pub state: State,
    /// The reason for the state, as a sentence.
    pub reason: String,
    /// The facts about the primary.
    pub source: SourceReport,
    /// The position and the lag of both tiers.
    pub durable: DurableReport,
    /// The RPO set by the operator, in seconds.
    pub rpo_target_seconds: f64,
    /// The window that can be restored.
    pub window: WindowReport,
    /// The slot. `None` until the primary was queried.
    pub slot: Option<SlotReport>,
    /// Missing WAL that is being searched for. `None` if none is missing, or if it is already
    /// declared lost.
    pub gap: Option<OpenGap>,
    /// Our slots on the configured standbys.
    pub standbys: Vec<StandbyReport>,
    /// The newest base backup. `None` if there is none yet.
    pub last_backup: Option<BackupReport>,
    /// The counters.
    pub counters: Counters,
    /// The location to which WAL is archived.
    pub repository: String,
    /// The requests that this daemon sent to its buckets. `None` for directories, which cost
    /// nothing.
    pub requests: Option<RequestReport>,
    /// The greatest RPO of the last 24 hours.
    pub rpo_max_24h_seconds: Option<f64>,
    /// The members of the repository if there are several, the nearest first.
    pub repositories: Vec<MemberState>,
    /// The rate at which the primary writes WAL, averaged over the last minute.
    pub wal_bytes_per_second: Option<f64>,
    /// The time at which the repository was last proved to hold everything that the primary had
    /// flushed.
    pub caught_up_as_of: Option<PgTimestamp>,
    /// The duration of a restore.
    pub rto: RtoReport,
    /// The newest restore drill. `None` before the first.
    pub last_drill: Option<Outcome>,
    /// The time at which a drill last passed. `None` before the first.
    pub last_drill_passed: Option<PgTimestamp>,
    /// The newest verification of the repository. `None` before the first.
    pub last_verify: Option<Outcome>,
    /// The newest failed base backup, if none has succeeded since.
    pub failed_backup: Option<Outcome>,
    /// The newest retention run, if it failed.
    pub failed_expire: Option<Outcome>,
    /// The time at which a failover that lost commits was last found.
    pub last_failover_loss: Option<PgTimestamp>,
    /// The newest failover that lost commits, as a sentence. `None` if there is none.
    pub failover_loss: Option<String>,
    /// The number of objects found damaged or missing. `None` while no verification has run and no
    /// damaged or missing object is known.
    pub corrupt_objects: Option<u64>,
    /// Archived objects that the repository lacks, as texts with object keys and LSN ranges.
    pub lost_objects: Vec<String>,
    /// The age at which the newest base backup is overdue.
    pub backup_max_age_seconds: f64,
    /// The age at which the newest drill is overdue.
    pub drill_max_age_seconds: Option<f64>,
    /// The age at which the newest verification is overdue. `None` if no maximum is configured.
    pub verify_max_age_seconds: Option<f64>,
    /// True if the server was queried and has no slot of ours.
    pub slot_missing: bool,
    /// Seconds until the spool is full if it grows as in the last 30 minutes. `None` while it does
    /// not grow or less than 15 minutes of growth are known, and without a limit.
    pub spool_full_in_seconds: Option<f64>,
    /// The part of `keep_window` that could once be restored and no longer can, in seconds. `None`
    /// without `keep_window`, before the catalog was read, and before anything could ever be
    /// restored.
    pub window_missing_seconds: Option<f64>,
    /// The server's clock minus ours, in seconds. `None` while the server is not polled.
    pub clock_offset_seconds: Option<f64>,
    /// The expiry time of the dashboard's certificate. `None` without TLS.
    pub certificate_expiry: Option<PgTimestamp>,
    /// True once the catalog was read since the start.
    pub looked: bool,
    /// The stream's last error while it is down.
    pub stream_error: Option<String>,
    /// The repository's last error while it fails.
    pub repository_error: Option<String>,
    /// The conditions that require an operator's action.
    pub alerts: Vec<Alert>,
}

impl ClusterReport {
    /// Returns true if the repository, or one of its members, refuses requests or does not answer.
    #[must_use]
    pub fn repository_fails(&self) -> bool {
        self.repository_error.is_some()
            || self.repositories.iter().any(|place| place.error.is_some())
    }
}

/// The facts that decide the state.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// An error that only an operator can repair, for example a gap.
    pub broken: Option<&'a str>,
    /// The last error of the stream or the repository that is being retried.
    pub failing: Option<&'a str>,
    /// True if the primary was seen recently.
    pub source_known: bool,
    /// False if the primary is not queried, because the repository does not answer.
    pub source_asked: bool,
    /// True if a stream is up.
    pub stream_connected: bool,
    /// The lag of the repository in seconds. It is an upper bound while the primary is not seen.
    pub remote_rpo_seconds: Option<f64>,
    /// The part of that lag that is proved ([`Exposure::proved`]).
    pub proved_rpo_seconds: Option<f64>,
    /// The target, in seconds.
    pub rpo_target_seconds: f64,
    /// A setting of the server that makes commits wait for us.
    pub danger: Option<&'a str>,
    /// A standby on which our slot is not maintained.
    pub standby: Option<&'a str>,
    /// True if a base backup is listed. `None` before the catalog was read.
    pub has_backup: Option<bool>,
    /// The reason why no base backup leads to the server's present.
    pub unreached: Option<&'a str>,
    /// The column `wal_status` of the slot.
    pub slot_wal_status: Option<&'a str>,
    /// A defect of the archive found by a drill or a verification.
    pub not_restorable: Option<&'a str>,
}

/// Returns the state and its reason. The worst fact wins, in this order: broken, at risk, unknown,
/// degraded.
#[must_use]
pub fn judge(facts: Facts<'_>) -> (State, String) {
    let because = facts
        .failing
        .map(|error| format!(": {error}"))
        .unwrap_or_default();
    if let Some(error) = facts.broken {
        return (State::Broken, error.to_owned());
    }
    if facts.slot_wal_status == Some("lost") {
        return (
            State::Broken,
            "the replication slot is lost: PostgreSQL removed WAL".to_owned(),
        );
    }
    if let Some(problem) = facts.not_restorable {
        return (State::Broken, problem.to_owned());
    }
    if let Some(refusal) = facts.unreached {
        return (State::Broken, refusal.to_owned());
    }
    if facts.has_backup == Some(false) {
        let reason = "there is no base backup, so losing the primary now loses everything: run `wal-archiver backup`";
        return (State::AtRisk, reason.to_owned());
    }
    let target = facts.rpo_target_seconds;
    if facts.proved_rpo_seconds.is_some_and(|rpo| rpo > target) {
        let bound = if facts.source_known { "" } else { "up to " };
        let rpo = facts.remote_rpo_seconds.unwrap_or_default();
        return (
            State::AtRisk,
            format!(
                "losing the primary now loses {bound}{rpo:.1} s, the target is {target:.1} s{because}"
            ),
        );
    }
    if !facts.source_known || facts.remote_rpo_seconds.is_none() {
        let what = match facts.source_asked {
            true => "the primary cannot be seen",
            false => "the repository does not answer, so the primary is not asked",
        };
        return (State::Unknown, format!("{what}{because}"));
    }
    if facts.has_backup.is_none() {
        return (
            State::Unknown,
            format!("what can be restored is not known yet{because}"),
        );
    }
    if !facts.stream_connected {
        return (State::Degraded, format!("the stream is down{because}"));
    }
    if let Some(error) = facts.failing {
        return (State::Degraded, error.to_owned());
    }
    if facts.slot_wal_status == Some("unreserved") {
        return (
            State::Degraded,
            "the replication slot is about to be lost".to_owned(),
        );
    }
    if let Some(danger) = facts.danger {
        return (State::Degraded, danger.to_owned());
    }
    if let Some(standby) = facts.standby {
        return (State::Degraded, standby.to_owned());
    }
    (
        State::Ok,
        "streaming; the repository is within its target".to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: Facts<'static> = Facts {
        broken: None,
        failing: None,
        source_known: true,
        source_asked: true,
        stream_connected: true,
        remote_rpo_seconds: Some(0.4),
        proved_rpo_seconds: Some(0.4),
        rpo_target_seconds: 5.0,
        danger: None,
        standby: None,
        has_backup: Some(true),
        unreached: None,
        slot_wal_status: Some("reserved"),
        not_restorable: None,
    };

    #[test]
    fn the_worst_fact_decides_the_light() {
        let check = |facts, expected| assert_eq!(judge(facts).0, expected, "{facts:?}");
        check(GOOD, State::Ok);
        check(
            Facts {
                has_backup: Some(false),
                ..GOOD
            },
            State::AtRisk,
        );
        check(
            Facts {
                has_backup: None,
                ..GOOD
            },
            State::Unknown,
        );
        check(
            Facts {
                unreached: Some("no base backup leads there"),
                has_backup: None,
                source_known: false,
                ..GOOD
            },
            State::Broken,
        );
        check(
            Facts {
                slot_wal_status: Some("unreserved"),
                ..GOOD
            },
            State::Degraded,
        );
        check(
            Facts {
                danger: Some("remote_apply"),
                ..GOOD
            },
            State::Degraded,
        );
        check(
            Facts {
                standby: Some("its slot is gone"),
                ..GOOD
            },
            State::Degraded,
        );
        check(
            Facts {
                failing: Some("store down"),
                ..GOOD
            },
            State::Degraded,
        );
        check(
            Facts {
                stream_connected: false,
                ..GOOD
            },
            State::Degraded,
        );
        check(
            Facts {
                source_known: false,
                ..GOOD
            },
            State::Unknown,
        );
        check(
            Facts {
                remote_rpo_seconds: None,
                ..GOOD
            },
            State::Unknown,
        );
        check(
            Facts {
                remote_rpo_seconds: Some(5.1),
                proved_rpo_seconds: Some(5.1),
                ..GOOD
            },
            State::AtRisk,
        );
        // The lag counts up from the last proof, and no WAL is known to be missing.
        let dead = Facts {
            remote_rpo_seconds: Some(60.0),
            source_known: false,
            ..GOOD
        };
        check(dead, State::Unknown);
        check(
            Facts {
                proved_rpo_seconds: Some(60.0),
                ..dead
            },
            State::AtRisk,
        );
        check(
            Facts {
                slot_wal_status: Some("lost"),
                ..dead
            },
            State::Broken,
        );
        check(
            Facts {
                broken: Some("gap"),
                ..dead
            },
            State::Broken,
        );
    }

    #[test]
    fn a_repository_that_is_away_is_not_taken_for_the_primary() {
        let (state, reason) = judge(Facts {
            source_known: false,
            source_asked: false,
            stream_connected: false,
            failing: Some("no route to the bucket"),
            ..GOOD
        });
        assert_eq!(state, State::Unknown);
        assert_eq!(
            reason,
            "the repository does not answer, so the primary is not asked: no route to the bucket"
        );
    }

    #[test]
    fn the_reason_names_what_is_being_retried() {
        let (_, reason) = judge(Facts {
            stream_connected: false,
            failing: Some("refused"),
            ..GOOD
        });
        assert_eq!(reason, "the stream is down: refused");
    }
}
