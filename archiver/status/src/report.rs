//! [`ClusterReport`]: the single report on a cluster, used by the page, the API, the metrics and
//! `status`.
//!
//! The daemon fills it from its memory. Nothing in this module queries the store or PostgreSQL, so
//! a scrape cannot disturb the stream.
//! Invariant: an unknown value is `None`, never 0. [`causes`](super::light::causes) derives the
//! causes of the state from the facts. [`raise`](super::light::raise) adds the alerts that fire,
//! and `alerts::worst_cause` a critical condition whose alert does not fire yet. The worst cause
//! decides the state.

use repository::store::{MemberState, RequestReport};
use serde::Serialize;
use wal_format::{
    BackupId, ClusterName, Lsn, Outcome, OutcomeKind, PgTimestamp, SystemIdentifier, TimelineId,
};

use crate::{
    alert::Alert,
    gap::OpenGap,
    light::{Cause, WELL},
    rpo::Exposure,
    schedule::ScheduleReport,
    standby::StandbyReport,
    state::State,
};

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

/// A base backup that runs on the server, according to `pg_stat_progress_basebackup`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BackupProgress {
    /// The phase, in PostgreSQL's words.
    pub phase: String,
    /// The bytes that were sent so far.
    pub streamed_bytes: Option<u64>,
    /// The estimated bytes of the whole backup. `None` if the server does not estimate them.
    pub total_bytes: Option<u64>,
    /// The rate since the backup was first seen. `None` until bytes were seen for a second.
    pub bytes_per_second: Option<f64>,
}

/// The archiving that the server does itself, according to `pg_stat_archiver`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ArchiveCommandReport {
    /// True if `archive_mode` is on and the last attempt failed.
    pub failing: bool,
    /// The number of failed attempts since the server's statistics were reset.
    pub failed_count: u64,
    /// The file that was not archived in the last failed attempt.
    pub last_failed_wal: Option<String>,
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

impl WindowReport {
    /// Returns the window of a repository that is not there: nothing can be restored from it now.
    pub(crate) fn gone(error: Option<&str>) -> Self {
        Self {
            refusal: Some(gone_refusal(error)),
            ..Self::default()
        }
    }
}

/// Returns the reason why no plan is accepted while the repository is not there.
#[must_use]
pub fn gone_refusal(error: Option<&str>) -> String {
    error.map_or_else(
        || "the repository is not there".to_owned(),
        ToOwned::to_owned,
    )
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
    /// Every cause for a state that is not `ok`, the worst first. The first one decides the state.
    pub causes: Vec<Cause>,
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
    /// The kinds of operations of which it is not known how the newest one ended.
    #[serde(skip)]
    pub unread_outcomes: Vec<OutcomeKind>,
    /// Archived objects that the repository lacks, as texts with object keys and LSN ranges.
    pub lost_objects: Vec<String>,
    /// The age at which the newest base backup is overdue.
    pub backup_max_age_seconds: f64,
    /// The age at which the newest drill is overdue.
    pub drill_max_age_seconds: Option<f64>,
    /// The age at which the newest verification is overdue. `None` if no maximum is configured.
    pub verify_max_age_seconds: Option<f64>,
    /// The base backup that runs on the server. `None` if none runs, and while the server is not
    /// polled.
    pub backup_progress: Option<BackupProgress>,
    /// The base backups that the daemon takes. `None` without `backup_schedule`.
    pub backup_schedule: Option<ScheduleReport>,
    /// The restore drills that the daemon starts. `None` without `drill_schedule`.
    pub drill_schedule: Option<ScheduleReport>,
    /// The server's own archiving by `archive_command`. `None` while the server is not polled.
    pub archive_command: Option<ArchiveCommandReport>,
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
    /// Sets the state and its reason to those of the worst cause.
    pub fn settle(&mut self) {
        let worst = self.causes.first();
        self.state = worst.map_or(State::Ok, |cause| cause.state);
        self.reason = worst.map_or_else(|| WELL.to_owned(), |cause| cause.reason.clone());
    }
}
