//! [`ClusterReport`]: everything that is said of a cluster, once, for the page, the API, the metrics and `status`.
//!
//! The daemon fills it from what it holds in memory; nothing here asks the store or PostgreSQL, so a scrape can not
//! disturb the stream. Invariant: what is not known is `None`, never 0, and [`judge`] is the only place where facts
//! become a light.

use repository::store::{MemberState, RequestReport};
use serde::Serialize;
use wal_format::{BackupId, ClusterName, Lsn, Outcome, PgTimestamp, SystemIdentifier, TimelineId};

use crate::{alerts::Alert, pipeline::gap::OpenGap, rpo::Exposure, standby_slots::StandbyReport};

mod details;
pub(crate) mod words;

pub use details::{Details, GapReport, HeldRange, Mark, MarkKind, RestorableRange};

/// The one light of a cluster; the worst fact decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Streaming, the repository is within its target.
    Ok,
    /// Nothing is lost if the primary dies now, but something that protects against it is missing.
    Degraded,
    /// More than the target would be lost if the primary died now: everything, without a base backup.
    AtRisk,
    /// Archiving has stopped, a part of the WAL is missing, or no base backup leads to the present.
    Broken,
    /// The primary cannot be seen, or the catalog was not read yet: nothing is known beyond the last
    /// proof.
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

/// What is known of the primary.
#[derive(Clone, Debug, Default, Serialize)]
pub struct SourceReport {
    /// Its system identifier.
    pub system_identifier: Option<SystemIdentifier>,
    /// Its version as it prints it.
    pub server_version: Option<String>,
    /// The timeline being streamed.
    pub timeline: Option<TimelineId>,
    /// The greatest flush LSN seen.
    pub flush_lsn: Option<Lsn>,
    /// Whether a replication stream is up.
    pub stream_connected: bool,
    /// When it was last heard, by our clock.
    pub last_contact: Option<PgTimestamp>,
}

/// What one tier holds and what it is behind.
#[derive(Clone, Debug, Default, Serialize)]
pub struct TierReport {
    /// The end of the contiguous durable WAL.
    pub lsn: Option<Lsn>,
    /// Bytes behind the primary's flush LSN.
    pub lag_bytes: Option<u64>,
    /// Age of the oldest flushed WAL that the tier does not hold, in seconds.
    pub rpo_seconds: Option<f64>,
}

impl TierReport {
    /// From the tier's position and the estimator's answer.
    #[must_use]
    pub fn new(lsn: Option<Lsn>, exposure: Exposure) -> Self {
        Self {
            lsn,
            lag_bytes: exposure.lag_bytes,
            rpo_seconds: exposure.rpo.map(|age| age.as_secs_f64()),
        }
    }
}

/// Both tiers.
#[derive(Clone, Debug, Default, Serialize)]
pub struct DurableReport {
    /// Fsynced in the spool of this host.
    pub local: TierReport,
    /// Stored in the repository.
    pub remote: TierReport,
}

/// The replication slot, as PostgreSQL shows it.
#[derive(Clone, Debug, Serialize)]
pub struct SlotReport {
    /// Its name.
    pub name: String,
    /// Whether a walsender uses it.
    pub active: bool,
    /// `wal_status` of `pg_replication_slots`.
    pub wal_status: Option<String>,
    /// WAL that the slot keeps on the primary, in bytes.
    pub retained_bytes: Option<u64>,
    /// WAL that can be written before the slot is lost, in bytes; unknown (no limit) without
    /// `max_slot_wal_keep_size`.
    pub safe_wal_bytes: Option<u64>,
    /// How long until it is lost if WAL goes on being written as in the last minute and is not archived; unknown without a
    /// limit, and while nothing is written.
    pub full_in_seconds: Option<f64>,
}

/// From when to when the cluster can be restored without naming a timeline, as the restorer's plan
/// sees it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct WindowReport {
    /// The end of the oldest usable base backup.
    pub earliest: Option<PgTimestamp>,
    /// The last commit in the repository that a base backup leads to.
    pub latest_commit: Option<PgTimestamp>,
    /// Interruptions of the WAL within the window; unknown without a backup.
    pub gaps: Option<u64>,
    /// Those with no base backup behind them: later times can not be restored.
    pub open_gaps: Option<u64>,
    /// Why a restore of the server's present would be refused; `None` where it would be accepted,
    /// and before the catalog was read.
    pub refusal: Option<String>,
}

/// What a restore would take.
#[derive(Clone, Debug, Default, Serialize)]
pub struct RtoReport {
    /// The RTO the operator set.
    pub target_seconds: Option<f64>,
    /// What the last drill took.
    pub measured_seconds: Option<f64>,
    /// What a restore to the newest commit is estimated to take now.
    pub estimate_seconds: Option<f64>,
    /// How fast the last drill fetched.
    pub fetch_bytes_per_second: Option<f64>,
    /// How fast it replayed WAL.
    pub replay_bytes_per_second: Option<f64>,
    /// WAL that would be replayed.
    pub wal_since_backup_bytes: Option<u64>,
    /// How the estimate is made, or why there is none.
    pub how: String,
    /// What to do about it.
    pub advice: Option<String>,
}

/// A base backup.
#[derive(Clone, Debug, Serialize)]
pub struct BackupReport {
    /// Its name.
    pub id: BackupId,
    /// When it began.
    pub started: PgTimestamp,
    /// When it became restorable.
    pub finished: PgTimestamp,
    /// Where redo begins.
    pub start_lsn: Lsn,
    /// The timeline it was taken on.
    pub timeline: TimelineId,
    /// Bytes in the repository.
    pub stored_bytes: u64,
}

/// What was counted since the daemon started.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Counters {
    /// WAL received, overlap after a reconnect included, in bytes.
    pub wal_received_bytes: u64,
    /// Bytes of sealed segments and tails put in the repository.
    pub wal_stored_bytes: u64,
    /// Segments sealed, stored and verified.
    pub segments_completed: u64,
    /// Superfluous objects that the repository does not let go: locked, or deleting is forbidden.
    pub objects_locked: u64,
    /// Reconnections, by reason.
    pub reconnects: Vec<(String, u64)>,
    /// Repository requests that failed, by operation and kind.
    pub repository_errors: Vec<(String, String, u64)>,
    /// Bytes in the spool.
    pub spool_used_bytes: u64,
    /// Bytes that the spool may grow to: what it uses and what its disk has left.
    pub spool_limit_bytes: Option<u64>,
    /// Bytes that wait for the repository.
    pub upload_queue_bytes: u64,
}

/// Everything that is said of a cluster at one moment.
#[derive(Clone, Debug, Serialize)]
pub struct ClusterReport {
    /// Version of this document.
    pub schema: &'static str,
    /// The cluster.
    pub cluster: ClusterName,
    /// When this was true.
    pub as_of: PgTimestamp,
    /// The light.
    pub state: State,
    /// Why it shows that, in a sentence.
    pub reason: String,
    /// The primary.
    pub source: SourceReport,
    /// What we hold.
    pub durable: DurableReport,
    /// The RPO the operator set, in seconds.
    pub rpo_target_seconds: f64,
    /// What can be restored.
    pub window: WindowReport,
    /// The slot; unknown until the primary was asked.
    pub slot: Option<SlotReport>,
    /// Missing WAL that is looked for; `None` where nothing is, or it is declared lost already.
    pub gap: Option<OpenGap>,
    /// Our slots on the standbys that were named.
    pub standbys: Vec<StandbyReport>,
    /// The newest base backup; `None` where there is none yet.
    pub last_backup: Option<BackupReport>,
    /// What was counted.
    pub counters: Counters,
    /// Where the WAL goes.
    pub repository: String,
    /// What this daemon asked of its buckets; `None` for folders, which cost nothing.
    pub requests: Option<RequestReport>,
    /// The greatest RPO of the last 24 hours.
    pub rpo_max_24h_seconds: Option<f64>,
    /// The places of the repository, where there are several; the nearest first.
    pub repositories: Vec<MemberState>,
    /// WAL that the primary writes, the mean of the last minute.
    pub wal_bytes_per_second: Option<f64>,
    /// When the repository was last proved to hold everything that the primary had flushed.
    pub caught_up_as_of: Option<PgTimestamp>,
    /// What a restore would take.
    pub rto: RtoReport,
    /// The newest restore drill.
    pub last_drill: Option<Outcome>,
    /// When a drill last passed.
    pub last_drill_passed: Option<PgTimestamp>,
    /// The newest base backup, if it failed.
    pub failed_backup: Option<Outcome>,
    /// The newest application of retention, if it failed.
    pub failed_expire: Option<Outcome>,
    /// When a failover that lost commits was last found.
    pub last_failover_loss: Option<PgTimestamp>,
    /// Objects that were found damaged or missing; unknown before the first verification.
    pub corrupt_objects: Option<u64>,
    /// The age at which the newest base backup is overdue.
    pub backup_max_age_seconds: f64,
    /// The age at which the newest drill is overdue.
    pub drill_max_age_seconds: Option<f64>,
    /// The server's clock minus ours.
    pub clock_offset_seconds: Option<f64>,
    /// When the dashboard's certificate ends.
    pub certificate_expiry: Option<PgTimestamp>,
    /// Whether the catalog was looked at since the start.
    pub looked: bool,
    /// The stream's last error while it is down.
    pub stream_error: Option<String>,
    /// The repository's last error while it fails.
    pub repository_error: Option<String>,
    /// What a person should act on.
    pub alerts: Vec<Alert>,
}

impl ClusterReport {
    /// Whether the repository, or one of its places, refuses or does not answer.
    #[must_use]
    pub fn repository_fails(&self) -> bool {
        self.repository_error.is_some()
            || self.repositories.iter().any(|place| place.error.is_some())
    }
}

/// The facts that decide the light.
#[derive(Clone, Copy, Debug)]
pub struct Facts<'a> {
    /// An error that only a person can mend, for example a gap.
    pub broken: Option<&'a str>,
    /// The last error of the stream or the repository that is being retried.
    pub failing: Option<&'a str>,
    /// Whether the primary was seen recently.
    pub source_known: bool,
    /// Whether a stream is up.
    pub stream_connected: bool,
    /// What the repository is behind, in seconds: a bound while the primary is not seen.
    pub remote_rpo_seconds: Option<f64>,
    /// The part of it that is proved ([`Exposure::proved`]).
    pub proved_rpo_seconds: Option<f64>,
    /// The target, in seconds.
    pub rpo_target_seconds: f64,
    /// A setting of the server that makes commits hang on us.
    pub danger: Option<&'a str>,
    /// A standby on which our slot is not kept.
    pub standby: Option<&'a str>,
    /// Whether a base backup is listed; `None` before the catalog was read.
    pub has_backup: Option<bool>,
    /// Why no base backup leads to the server's present.
    pub unreached: Option<&'a str>,
    /// `wal_status` of the slot.
    pub slot_wal_status: Option<&'a str>,
    /// What a drill or a verification found wrong with the archive.
    pub not_restorable: Option<&'a str>,
}

/// The light and its reason. The worst fact wins: broken, then at risk, then unknown, then degraded.
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
        return (
            State::Unknown,
            format!("the primary cannot be seen{because}"),
        );
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
        // It counts up from the last proof, and nothing is known to be missing.
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
    fn the_reason_names_what_is_being_retried() {
        let (_, reason) = judge(Facts {
            stream_connected: false,
            failing: Some("refused"),
            ..GOOD
        });
        assert_eq!(reason, "the stream is down: refused");
    }
}
