//! The restorable window for the dashboard: its ranges, its gaps, and the instants that an operator
//! may search for.
//!
//! Reads the catalog only. Summaries of ranges are decoded once. [`Marks`] remembers the decoded
//! ones, so the cost of an update depends on the new ranges only, not on all of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use repository::{ExpiredSet, WalRange, damaged_backups, damaged_wal};
use wal_format::{
    BackupId, BackupInfo, Branch, DeclaredGap, Lsn, ObjectKey, Outcome, OutcomeKind, PgTimestamp,
    WalEvent,
};

use super::{
    archive::Archive,
    restorable::{Look, Ranges},
};
use crate::{
    error::Result,
    report::{BackupReport, Details, GapReport, HeldRange, Mark, MarkKind, WindowReport},
};

/// The number of marks kept. More could not be distinguished on the strip.
const MARKS_MAX: usize = 400;
/// The number of ranges and gaps shown.
const RANGES_MAX: usize = 200;

/// WAL that a verification found damaged is checked again after this time.
const CHECK_INTERVAL: Duration = Duration::from_secs(60);
/// The number of damaged objects that are checked; the others count as damaged.
const CHECKS_MAX: usize = 20;

/// The state remembered between two updates.
#[derive(Debug, Default)]
pub(crate) struct Marks {
    seen: BTreeSet<(Branch, Lsn, Lsn)>,
    marks: BTreeMap<(PgTimestamp, Lsn), Mark>,
    outcomes: BTreeMap<(OutcomeKind, BackupId), Outcome>,
    /// The WAL that the newest verification found damaged, without what is intact again.
    damaged: BTreeSet<ObjectKey>,
    /// The verification of `damaged`, and the time of the check.
    checked: Option<(BackupId, Instant)>,
    /// The first missing byte of a gap that the last update found.
    missing: Option<(Branch, Lsn)>,
}

impl Marks {
    /// Reads new outcomes from the repository.
    pub(crate) fn ask(&mut self, archive: &Archive) -> Result<()> {
        let system = archive.identity().system_identifier;
        archive
            .repository()
            .add_outcomes(system, &mut self.outcomes)?;
        self.check_damaged(archive)
    }

    /// Checks the WAL that the newest verification found damaged: it may have been repaired or
    /// replaced since.
    fn check_damaged(&mut self, archive: &Archive) -> Result<()> {
        let verdicts = self.outcomes.values();
        let verdicts = verdicts.filter(|outcome| outcome.kind == OutcomeKind::Verify);
        let Some(verdict) = verdicts.max_by_key(|outcome| outcome.finished) else {
            return Ok(());
        };
        let is_fresh = |(id, at): &(BackupId, Instant)| {
            *id == verdict.id && (self.damaged.is_empty() || at.elapsed() < CHECK_INTERVAL)
        };
        if self.checked.as_ref().is_some_and(is_fresh) {
            return Ok(());
        }
        let wal = *archive.identity();
        let places = archive.repository().place_urls();
        let mut damaged = BTreeSet::new();
        for (number, key) in damaged_wal(verdict, &places).into_keys().enumerate() {
            if number >= CHECKS_MAX || archive.repository().wal_problem(&key, wal)?.is_some() {
                damaged.insert(key);
            }
        }
        self.checked = Some((verdict.id.clone(), Instant::now()));
        self.damaged = damaged;
        Ok(())
    }

    /// Returns the restorable window, the reason why the server's present is not restorable, and
    /// the details.
    pub(crate) fn look(
        &mut self,
        archive: &Archive,
        backups: &[BackupInfo],
    ) -> Result<(WindowReport, Option<String>, Details)> {
        let mut details = Details {
            backups: backups.iter().map(backup_report).collect(),
            outcomes: self.outcomes.values().cloned().collect(),
            ..Details::default()
        };
        details.outcomes.sort_by_key(|outcome| outcome.finished);
        let expired = archive.catalog().expired()?;
        let mut all = BTreeSet::new();
        let timelines = archive.catalog().branches()?;
        let mut index = Ranges {
            archive,
            of: BTreeMap::new(),
        };
        for (branch, history, _) in &timelines {
            let branch = *branch;
            let ranges = archive.catalog().ranges(branch, Lsn::ZERO, Lsn::MAX)?;
            let is_whole = |range: &WalRange| {
                !self
                    .damaged
                    .contains(&range.key(archive.catalog().identity()))
            };
            let (ranges, damaged): (Vec<_>, Vec<_>) = ranges.into_iter().partition(is_whole);
            for range in &ranges {
                let key = (branch, range.start_lsn, range.end_lsn);
                if self.seen.insert(key) {
                    self.remember(archive, range)?;
                }
                all.insert(key);
            }
            if let Some(switch) = history
                .as_ref()
                .and_then(|history| history.ancestors.last())
                && let Some(time) = ranges.iter().filter_map(|range| range.min_time).min()
            {
                let mark = Mark {
                    kind: MarkKind::Switch,
                    time,
                    lsn: switch.switch_lsn,
                    timeline: branch.timeline,
                    text: format!(
                        "timeline {} begins at {}",
                        branch.timeline, switch.switch_lsn
                    ),
                };
                self.marks.insert((time, mark.lsn), mark);
            }
            join(&mut details, (&ranges, &damaged), archive.gaps(), &expired);
            index.of.insert(branch, ranges);
        }
        self.seen.retain(|key| all.contains(key));
        while self.marks.len() > MARKS_MAX {
            self.marks.pop_first();
        }
        details.failover_losses = archive.losses().all();
        details.marks = self.marks.values().cloned().collect();
        let verdict = details.newest(OutcomeKind::Verify);
        let places = archive.repository().place_urls();
        let damaged = verdict.map(|verdict| damaged_backups(verdict, &places));
        let damaged = damaged.unwrap_or_default();
        let is_whole = |backup: &&BackupInfo| !damaged.contains_key(&backup.id);
        let whole: Vec<BackupInfo> = backups.iter().filter(is_whole).cloned().collect();
        let look = Look {
            index: &index,
            timelines: &timelines,
            backups,
            whole: &whole,
            expired: &expired,
            missing_before: self.missing,
        };
        let judgement = look.judge()?;
        self.missing = judgement.missing;
        details.restorable = judgement.ranges;
        details.gaps.extend(judgement.minimal);
        details.judged = judgement.judged;
        let surplus = details.ranges.len().saturating_sub(RANGES_MAX);
        details.ranges.drain(..surplus);
        Ok((judgement.window, judgement.unreached, details))
    }

    fn remember(&mut self, archive: &Archive, range: &WalRange) -> Result<()> {
        // The sealed segment repeats the events of its tails under the same key.
        let summary = archive.catalog().summary(range)?;
        let timeline = range.branch.timeline;
        for (lsn, event) in &summary.events {
            let (kind, time, text) = match event {
                WalEvent::RestorePoint { time, name } => (
                    MarkKind::RestorePoint,
                    *time,
                    format!("restore point {name}"),
                ),
                WalEvent::DroppedRelations { xid, relations } => {
                    let ended = |end: &&wal_format::TransactionEnd| end.lsn == *lsn;
                    let Some(end) = summary.transactions.iter().find(ended) else {
                        continue;
                    };
                    if !end.kind.is_commit() {
                        continue;
                    }
                    let text = format!(
                        "transaction {xid} removed {} relation file(s): DROP, TRUNCATE or a rewrite",
                        relations.len()
                    );
                    (MarkKind::Removal, end.time, text)
                }
                _ => continue,
            };
            let mark = Mark {
                kind,
                time,
                lsn: *lsn,
                timeline,
                text,
            };
            self.marks.insert((time, *lsn), mark);
        }
        Ok(())
    }
}

fn backup_report(backup: &BackupInfo) -> BackupReport {
    BackupReport {
        id: backup.id.clone(),
        started: backup.started,
        finished: backup.finished,
        start_lsn: backup.start_lsn,
        timeline: backup.branch.timeline,
        stored_bytes: backup.stored_bytes,
    }
}

/// Joins ranges that follow each other without a gap, and lists the missing parts between them.
fn join(
    details: &mut Details,
    (ranges, damaged): (&[WalRange], &[WalRange]),
    declared: &[DeclaredGap],
    expired: &ExpiredSet,
) {
    let mut open: Option<HeldRange> = None;
    for range in ranges {
        match &mut open {
            Some(held) if range.start_lsn <= held.end_lsn => {
                held.end_lsn = held.end_lsn.max(range.end_lsn);
                held.from = earliest(held.from, range.min_time);
                held.to = held.to.max(range.max_time);
            }
            _ => {
                if let Some(before) = open.take() {
                    let (from, to) = (before.end_lsn, range.start_lsn);
                    let lacks = !expired.not_expired(range.branch, from, to).is_empty();
                    if lacks && details.gaps.len() < RANGES_MAX {
                        details.gaps.push(gap(&before, range, declared, damaged));
                    }
                    details.ranges.push(before);
                }
                open = Some(HeldRange {
                    branch: range.branch,
                    timeline: range.branch.timeline,
                    start_lsn: range.start_lsn,
                    end_lsn: range.end_lsn,
                    from: range.min_time,
                    to: range.max_time,
                });
            }
        }
    }
    details.ranges.extend(open);
}

fn gap(
    before: &HeldRange,
    next: &WalRange,
    declared: &[DeclaredGap],
    damaged: &[WalRange],
) -> GapReport {
    let known = declared.iter().find(|gap| {
        gap.branch == next.branch && gap.to_lsn > before.end_lsn && gap.from_lsn < next.start_lsn
    });
    let is_here =
        |range: &WalRange| range.end_lsn > before.end_lsn && range.start_lsn < next.start_lsn;
    let cause = match known {
        Some(gap) => format!("declared lost: {}", gap.reason),
        None if damaged.iter().any(is_here) => {
            "objects are damaged in the repository; run `wal-archiver verify`".to_owned()
        }
        None => "objects are missing in the repository; run `wal-archiver verify`".to_owned(),
    };
    GapReport {
        branch: next.branch,
        from_lsn: before.end_lsn,
        to_lsn: next.start_lsn,
        after: before.to,
        before: next.min_time,
        cause,
    }
}

fn earliest(one: Option<PgTimestamp>, other: Option<PgTimestamp>) -> Option<PgTimestamp> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}

/// A commit near an instant.
#[derive(Clone, Debug, serde::Serialize)]
pub(crate) struct NearCommit {
    pub(crate) time: PgTimestamp,
    pub(crate) lsn: Lsn,
    pub(crate) xid: u32,
    pub(crate) timeline: wal_format::TimelineId,
    /// Flags of `pitr-restore` that keep this commit as the last one.
    pub(crate) flags: String,
}

/// The nearest commits around an instant.
#[derive(Clone, Debug, serde::Serialize)]
pub(crate) struct Located {
    pub(crate) time: PgTimestamp,
    pub(crate) before: Option<NearCommit>,
    pub(crate) after: Option<NearCommit>,
}

/// Returns the last commit at or before `time` and the first one after it. Aborted transactions are
/// ignored because they are not restore targets.
pub(crate) fn locate(archive: &Archive, time: PgTimestamp) -> Result<Located> {
    let mut found = Located {
        time,
        before: None,
        after: None,
    };
    for (branch, history, _) in archive.catalog().branches()? {
        // The segment of a switch begins with a copy of the parent's WAL. Commits in that copy
        // belong to the parent.
        let timeline_at = |lsn: Lsn| {
            let history = history.as_ref();
            history.map_or(branch.timeline, |history| history.timeline_at(lsn))
        };
        for range in archive.catalog().ranges(branch, Lsn::ZERO, Lsn::MAX)? {
            let (Some(min), Some(max)) = (range.min_time, range.max_time) else {
                continue;
            };
            let better_before = min <= time
                && found
                    .before
                    .as_ref()
                    .is_none_or(|known| max.min(time) >= known.time);
            let better_after =
                max > time && found.after.as_ref().is_none_or(|known| min < known.time);
            if !better_before && !better_after {
                continue;
            }
            for end in archive.catalog().transactions(&range)? {
                if !end.kind.is_commit() {
                    continue;
                }
                let near = || NearCommit {
                    time: end.time,
                    lsn: end.lsn,
                    xid: end.xid,
                    timeline: timeline_at(end.lsn),
                    flags: format!(
                        "--target-lsn {} --target-timeline {}",
                        end.lsn,
                        timeline_at(end.lsn)
                    ),
                };
                if end.time <= time {
                    if found
                        .before
                        .as_ref()
                        .is_none_or(|known| end.time >= known.time)
                    {
                        found.before = Some(near());
                    }
                } else if found
                    .after
                    .as_ref()
                    .is_none_or(|known| end.time < known.time)
                {
                    found.after = Some(near());
                }
            }
        }
    }
    Ok(found)
}
