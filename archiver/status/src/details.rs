//! The details that the dashboard draws in addition to the numbers ([`Details`]): the window's
//! ranges and gaps, backups, drills, marks.
//!
//! Computed every few seconds from the catalog and the repository's outcomes, and read from memory.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use wal_format::{
    BackupId, Branch, FailoverLoss, Lsn, ObjectKey, Outcome, OutcomeKind, PgTimestamp, TimelineId,
};

use crate::{
    report::{BackupReport, RtoReport},
    units::DRILL_ADVICE,
};

/// Archived WAL without a gap.
#[derive(Clone, Debug, Serialize)]
pub struct HeldRange {
    /// The branch of the timeline.
    pub branch: Branch,
    /// The timeline of the WAL.
    pub timeline: TimelineId,
    /// The first byte of the range.
    pub start_lsn: Lsn,
    /// The first byte after the range.
    pub end_lsn: Lsn,
    /// The time of the first commit in the range. `None` if it contains no commit.
    pub from: Option<PgTimestamp>,
    /// The time of the last commit in the range.
    pub to: Option<PgTimestamp>,
}

/// WAL in which a recovery can stop, according to the restorer's plan.
#[derive(Clone, Debug, Serialize)]
pub struct RestorableRange {
    /// The branch of the timeline.
    pub branch: Branch,
    /// The timeline of the WAL.
    pub timeline: TimelineId,
    /// The first byte after which a recovery can stop.
    pub start_lsn: Lsn,
    /// The first byte after the range.
    pub end_lsn: Lsn,
    /// The oldest base backup that leads here.
    pub backup: BackupId,
    /// The end of the backup, what the WAL proves if that is earlier, or the first commit in the
    /// range. `None` if the WAL says nothing of the time.
    pub from: Option<PgTimestamp>,
    /// The last commit in the range, or `from` if that is later.
    pub to: Option<PgTimestamp>,
    /// True if a restore leads here without `--target-timeline`.
    pub by_default: bool,
}

/// Missing WAL between two ranges.
#[derive(Clone, Debug, Serialize)]
pub struct GapReport {
    /// The branch of the timeline.
    pub branch: Branch,
    /// The first missing byte.
    pub from_lsn: Lsn,
    /// The first byte after the gap.
    pub to_lsn: Lsn,
    /// The last known time before the gap: of the WAL there, or the end of a backup. `None` if
    /// neither is known.
    pub after: Option<PgTimestamp>,
    /// The first known time after the gap. `None` if none is known.
    pub before: Option<PgTimestamp>,
    /// The cause, as text.
    pub cause: String,
}

/// The kind of a mark on the strip.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MarkKind {
    /// A restore point made by `pg_create_restore_point`.
    RestorePoint,
    /// Relation files were removed by a commit: DROP, TRUNCATE, or a rewrite.
    Removal,
    /// The beginning of a timeline.
    Switch,
}

/// An event that an operator may search for, at one point in time.
#[derive(Clone, Debug, Serialize)]
pub struct Mark {
    /// The kind of the event.
    pub kind: MarkKind,
    /// The time of the event, by the server's clock.
    pub time: PgTimestamp,
    /// The LSN of the event.
    pub lsn: Lsn,
    /// The timeline of the event.
    pub timeline: TimelineId,
    /// The event as text.
    pub text: String,
}

/// The details of one cluster.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Details {
    /// The archived WAL, by branch and position.
    pub ranges: Vec<HeldRange>,
    /// The parts of it that can be restored, by branch and position.
    pub restorable: Vec<RestorableRange>,
    /// The server's branch for which `restorable` was computed. `None` while no server was seen.
    #[serde(skip)]
    pub judged: Option<Branch>,
    /// The missing WAL.
    pub gaps: Vec<GapReport>,
    /// Commits that failovers lost.
    pub failover_losses: Vec<FailoverLoss>,
    /// The newest few hundred events to search for, by time.
    pub marks: Vec<Mark>,
    /// Base backups, oldest first.
    pub backups: Vec<BackupReport>,
    /// Outcomes of drills, failed backups, retention runs and verifications, oldest first.
    pub outcomes: Vec<Outcome>,
    /// The kinds of operations whose newest outcome cannot be read, with the reason.
    #[serde(skip)]
    pub unread: BTreeMap<OutcomeKind, String>,
    /// The objects of WAL that the newest verification found damaged and that are intact again.
    #[serde(skip)]
    pub repaired: BTreeSet<ObjectKey>,
    /// Keys of objects that the catalog found damaged.
    pub damaged: Vec<String>,
}

impl Details {
    /// Returns the newest outcome of a kind.
    #[must_use]
    pub fn newest(&self, kind: OutcomeKind) -> Option<&Outcome> {
        self.outcomes
            .iter()
            .filter(|outcome| outcome.kind == kind)
            .max_by_key(|outcome| outcome.finished)
    }

    /// Returns the outcomes of one kind, oldest first.
    pub fn of_kind(&self, kind: OutcomeKind) -> impl DoubleEndedIterator<Item = &Outcome> {
        self.outcomes
            .iter()
            .filter(move |outcome| outcome.kind == kind)
    }

    /// Returns the estimated duration of a restore. It is unknown until a drill has measured both
    /// rates.
    #[must_use]
    pub fn rto(&self, remote: Option<Lsn>, target_seconds: Option<f64>) -> RtoReport {
        let passed = || {
            self.of_kind(OutcomeKind::Drill)
                .rev()
                .filter(|drill| drill.passed)
        };
        let measured_seconds = passed().find_map(|drill| drill.rto_seconds);
        let rate = |bytes: Option<u64>, seconds: Option<f64>| {
            let rate = number(bytes?) / seconds.filter(|seconds| *seconds > 0.0)?;
            (rate > 0.0).then_some(rate)
        };
        let measured = passed().find_map(|drill| {
            let fetch = rate(drill.fetched_bytes, drill.fetch_seconds)?;
            let replay = rate(drill.replayed_bytes, drill.replay_seconds)?;
            // The rest of the time: starting PostgreSQL and the first query.
            let rest = drill.rto_seconds? - drill.fetch_seconds? - drill.replay_seconds?;
            Some((fetch, replay, rest.max(0.0)))
        });
        let backup = self.backups.last();
        let wal = backup.zip(remote).and_then(|(backup, remote)| {
            (remote >= backup.start_lsn).then(|| remote.bytes_since(backup.start_lsn))
        });
        let estimate =
            measured
                .zip(backup)
                .zip(wal)
                .map(|(((fetch, replay, rest), backup), wal)| {
                    let base = number(backup.stored_bytes) / fetch + rest;
                    (base, base + number(wal) / replay)
                });
        let how = match (measured, backup) {
            (None, _) => {
                format!(
                    "Unknown: no restore drill has measured how fast this repository is fetched \
                     and its WAL replayed. {DRILL_ADVICE}"
                )
            }
            (Some(_), None) => {
                "Unknown: there is no base backup. Run `wal-archiver backup`.".to_owned()
            }
            (Some(_), Some(_)) => "The newest base backup at the fetch rate of the last drill, \
                 plus the WAL since it at that drill's replay rate, plus the drill's remaining time."
                .to_owned(),
        };
        let advice = target_seconds.zip(estimate).and_then(|(target, (base, all))| {
            (all > target).then_some({
                if base <= target {
                    "Take a backup now: the WAL since the last one has made a restore slower than your RTO target. Run \
                     `wal-archiver backup`."
                } else {
                    "The base backup alone takes longer to fetch than your RTO target allows: a nearer repository, or a \
                     greater target, is needed."
                }
            })
        });
        RtoReport {
            target_seconds,
            measured_seconds,
            estimate_seconds: estimate.map(|(_, all)| all),
            fetch_bytes_per_second: measured.map(|(fetch, ..)| fetch),
            replay_bytes_per_second: measured.map(|(_, replay, _)| replay),
            wal_since_backup_bytes: wal,
            how,
            advice: advice.map(str::to_owned),
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "an estimate needs no more")]
fn number(bytes: u64) -> f64 {
    bytes as f64
}

#[cfg(test)]
mod tests {
    use crate::details::*;

    fn details(drill: bool) -> Details {
        let at = PgTimestamp(845_000_000_000_000);
        let backup = BackupReport {
            id: "20261121T101500Z-9f3c".parse().expect("an id"),
            started: at,
            finished: at,
            start_lsn: Lsn(1 << 20),
            timeline: TimelineId::FIRST,
            stored_bytes: 1000,
        };
        let outcome = Outcome {
            format_version: 1,
            kind: OutcomeKind::Drill,
            id: backup.id.clone(),
            started: at,
            finished: at,
            passed: true,
            message: String::new(),
            backup: None,
            rto_seconds: Some(9.0),
            fetched_bytes: Some(500),
            fetch_seconds: Some(5.0),
            replayed_bytes: Some(200),
            replay_seconds: Some(2.0),
            loss_seconds: None,
            damaged: Vec::new(),
            drill: None,
            actor: None,
            restore: None,
            branch: None,
        };
        Details {
            backups: vec![backup],
            outcomes: if drill { vec![outcome] } else { Vec::new() },
            ..Details::default()
        }
    }

    #[test]
    fn an_rto_is_not_guessed() {
        let rto = details(false).rto(Some(Lsn(2 << 20)), Some(60.0));
        assert_eq!((rto.estimate_seconds, rto.measured_seconds), (None, None));
        assert!(rto.how.contains(DRILL_ADVICE), "{}", rto.how);
    }

    #[test]
    fn wal_since_the_backup_makes_it_grow_until_a_backup_is_advised() {
        let end = Lsn((1 << 20) + 400);
        // 1000 bytes at 100/s, 400 at 100/s, and 2 s for the rest.
        let rto = details(true).rto(Some(end), Some(15.0));
        assert_eq!(rto.estimate_seconds, Some(16.0));
        assert_eq!(rto.measured_seconds, Some(9.0));
        let advice = rto.advice.expect("16 s are more than 15 s");
        assert!(advice.contains("wal-archiver backup"), "{advice}");
        let rto = details(true).rto(Some(end), Some(16.0));
        assert_eq!(rto.advice, None);
    }
}
