//! The restorable window for the dashboard: its ranges, its gaps, and the instants that an operator
//! may search for.
//!
//! Reads the catalog only. Summaries of ranges are decoded once. [`Marks`] remembers the decoded
//! ones, so the cost of an update depends on the new ranges only, not on all of them.

use std::collections::{BTreeMap, BTreeSet};

use repository::{
    Damage, DamagedWal, ExpiredSet, KnownTimeline, Loss, Outcomes, WalIndex, WalRange,
};
use status::{
    details::{Details, GapReport, HeldRange, Mark, MarkKind},
    outcomes::RUNS,
    report::{BackupReport, WindowReport},
};
use wal_format::{BackupInfo, Branch, DeclaredGap, Lsn, OutcomeKind, PgTimestamp, WalEvent};

use super::{
    damage::{Repaired, find_damaged},
    removals::Removals,
    restorable::{Look, Ranges},
};
use crate::{error::Result, pipeline::archive::Archive};

/// The number of marks kept. More could not be distinguished on the strip.
const MARKS_MAX: usize = 400;
/// The number of ranges and gaps shown.
const RANGES_MAX: usize = 200;

/// The state remembered between two updates.
#[derive(Debug, Default)]
pub(crate) struct Marks {
    seen: BTreeSet<(Branch, Lsn, Lsn)>,
    marks: BTreeMap<(PgTimestamp, Lsn), Mark>,
    /// The removals among the marks.
    removals: Removals,
    outcomes: Outcomes,
    /// The error of the last attempt to read the outcomes.
    outcomes_error: Option<String>,
    repaired: Repaired,
    /// The first missing byte of a gap that the last update found.
    missing: Option<(Branch, Lsn)>,
    /// True once an update was returned.
    is_known: bool,
}

/// The result of an update.
#[derive(Debug)]
pub(crate) struct Update {
    /// The restorable window.
    pub(crate) window: WindowReport,
    /// The reason why the server's present is not restorable.
    pub(crate) unreached: Option<String>,
    /// The data of the page's drawings and tables.
    pub(crate) details: Details,
}

/// Returns the timelines of the catalog and their ranges, without damaged ranges.
pub(super) fn read_ranges<'a>(
    archive: &'a Archive,
    damaged: &DamagedWal,
) -> Result<(Vec<KnownTimeline<bytes::Bytes>>, Ranges<'a>)> {
    let timelines = archive.catalog().branches()?;
    let mut index = Ranges {
        archive,
        of: BTreeMap::new(),
        damaged: Vec::new(),
    };
    for (branch, ..) in &timelines {
        let mut ranges = archive.catalog().ranges(*branch, Lsn::ZERO, Lsn::MAX)?;
        let missing = archive.missing().iter().filter_map(Loss::wal);
        let missing: Vec<(Lsn, Lsn)> = missing
            .filter(|(on, ..)| on == branch)
            .map(|(_, from_lsn, to_lsn)| (from_lsn, to_lsn))
            .collect();
        ranges.retain(|range| {
            let is_in = |(from, to): &(Lsn, Lsn)| *from <= range.start_lsn && range.end_lsn <= *to;
            !missing.iter().any(is_in)
        });
        if !damaged.is_empty() {
            ranges.retain(|range| {
                let damage = damaged.get(&range.key(archive.catalog().identity()));
                let damage = damage.map(|damage| (range.clone(), damage.clone()));
                index.damaged.extend(damage.clone());
                damage.is_none()
            });
        }
        index.of.insert(*branch, ranges);
    }
    Ok((timelines, index))
}

impl Marks {
    /// Reads new outcomes from the repository.
    pub(crate) fn ask(&mut self, archive: &Archive) -> Result<()> {
        let system = archive.identity().system_identifier;
        let read = archive
            .repository()
            .add_outcomes(system, &mut self.outcomes);
        self.outcomes_error = read.as_ref().err().map(ToString::to_string);
        read?;
        self.repaired.check(archive, self.outcomes.iter())
    }

    /// Returns true once the outcomes were read.
    pub(crate) fn has_outcomes(&self) -> bool {
        self.outcomes.is_read()
    }

    /// Returns the kinds of operations of which nobody knows how the newest one ended, with the
    /// reason. Without the repository, only the operations of earlier looks are known, and the
    /// state says so.
    fn unread(&self, archive: &Archive) -> BTreeMap<OutcomeKind, String> {
        if self.outcomes.is_read() || archive.is_away() {
            return self.outcomes.unreadable_newest();
        }
        let error = self.outcomes_error.as_deref().unwrap_or("not read yet");
        RUNS.into_iter()
            .map(|kind| (kind, error.to_owned()))
            .collect()
    }

    /// Judges the restorable window from the catalog. Returns `None` before the first update if WAL
    /// seems to be missing: the next call confirms it, and until then nothing is known.
    pub(crate) fn look(
        &mut self,
        archive: &Archive,
        backups: &[BackupInfo],
    ) -> Result<Option<Update>> {
        let mut details = Details {
            backups: backups.iter().map(backup_report).collect(),
            outcomes: self.outcomes.iter().cloned().collect(),
            unread: self.unread(archive),
            ..Details::default()
        };
        let damaged = archive.damaged_records.iter().map(ToString::to_string);
        details.damaged = damaged.collect();
        details.outcomes.sort_by_key(|outcome| outcome.finished);
        let expired = archive.catalog().expired()?;
        details.repaired = self.repaired.keys().clone();
        let (of_backups, of_wal) = find_damaged(archive, self.outcomes.iter(), &details.repaired);
        let mut all = BTreeSet::new();
        let (timelines, index) = read_ranges(archive, &of_wal)?;
        for (branch, history, _) in &timelines {
            let branch = *branch;
            let ranges = index.of.get(&branch).map_or(&[][..], Vec::as_slice);
            for range in ranges {
                let key = (branch, range.start_lsn, range.end_lsn);
                if self.seen.insert(key) {
                    self.remember(archive, range)?;
                }
                all.insert(key);
            }
            if let Some(switch) = history
                .as_ref()
                .and_then(|history| history.ancestors.last())
                && let Some(time) = first_commit(&index, ranges, switch.switch_lsn)?
            {
                // The mark of an earlier update is replaced: a segment that was missing then may
                // have an earlier commit.
                self.marks.retain(|_, mark| {
                    mark.kind != MarkKind::Switch
                        || mark.timeline != branch.timeline
                        || mark.lsn != switch.switch_lsn
                });
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
            let holes = Holes {
                branch,
                declared: archive.gaps(),
                damaged: &index.damaged,
                expired: &expired,
                backups,
            };
            holes.join(&mut details, ranges);
        }
        self.seen.retain(|key| all.contains(key));
        while self.marks.len() > MARKS_MAX {
            self.marks.pop_first();
        }
        self.removals.describe(&mut self.marks, archive.status());
        details.failover_losses = archive.losses().all();
        details.marks = self.marks.values().cloned().collect();
        let lost = archive.lost_backups();
        let is_whole = |backup: &&BackupInfo| {
            !of_backups.contains_key(&backup.id) && !lost.contains(&backup.id)
        };
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
        self.is_known |= judgement.missing.is_none() || judgement.unreached.is_some();
        details.restorable = judgement.ranges;
        details.gaps.extend(judgement.minimal);
        details.judged = judgement.judged;
        let surplus = details.ranges.len().saturating_sub(RANGES_MAX);
        details.ranges.drain(..surplus);
        Ok(self.is_known.then_some(Update {
            window: judgement.window,
            unreached: judgement.unreached,
            details,
        }))
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
                    self.removals.add((end.time, *lsn), *xid, relations);
                    (MarkKind::Removal, end.time, String::new())
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

/// Returns the time of the first transaction at `from` or later. The segment in which the timeline
/// begins starts with a copy of the parent's WAL, which does not count.
fn first_commit(index: &Ranges<'_>, ranges: &[WalRange], from: Lsn) -> Result<Option<PgTimestamp>> {
    for range in ranges.iter().filter(|range| range.transaction_count > 0) {
        if range.start_lsn >= from {
            return Ok(range.min_time);
        }
        let ends = index.transactions(range)?.into_iter();
        let own = ends.filter(|end| end.lsn >= from).map(|end| end.time).min();
        if own.is_some() {
            return Ok(own);
        }
    }
    Ok(None)
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

/// The causes of missing WAL on a branch, and the backups that tell the times around it.
struct Holes<'a> {
    branch: Branch,
    declared: &'a [DeclaredGap],
    damaged: &'a [(WalRange, Damage)],
    expired: &'a ExpiredSet,
    backups: &'a [BackupInfo],
}

impl Holes<'_> {
    /// Joins ranges that follow each other without a gap, and lists the missing parts between them.
    fn join(&self, details: &mut Details, ranges: &[WalRange]) {
        let mut open: Option<HeldRange> = None;
        for (number, range) in ranges.iter().enumerate() {
            match &mut open {
                Some(held) if range.start_lsn <= held.end_lsn => {
                    held.end_lsn = held.end_lsn.max(range.end_lsn);
                    held.from = earliest(held.from, range.min_time);
                    held.to = held.to.max(range.max_time);
                }
                _ => {
                    if let Some(before) = open.take() {
                        let (from, to) = (before.end_lsn, range.start_lsn);
                        let lacks = !self.expired.not_expired(self.branch, from, to).is_empty();
                        if lacks && details.gaps.len() < RANGES_MAX {
                            details
                                .gaps
                                .push(self.gap((from, to), ranges.split_at(number)));
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
        // Damage before all held WAL, or after it.
        for (range, _) in self.damaged {
            let is_listed = details.gaps.iter().any(|gap| {
                gap.branch == range.branch
                    && gap.from_lsn <= range.start_lsn
                    && range.end_lsn <= gap.to_lsn
            });
            if range.branch == self.branch && !is_listed {
                let hole = (range.start_lsn, range.end_lsn);
                let place = ranges.partition_point(|held| held.start_lsn < range.start_lsn);
                details.gaps.push(self.gap(hole, ranges.split_at(place)));
            }
        }
    }

    /// Returns the gap between the ranges `sides.0` before it and `sides.1` after it.
    fn gap(&self, (from, to): (Lsn, Lsn), sides: (&[WalRange], &[WalRange])) -> GapReport {
        let overlaps = |start: Lsn, end: Lsn| start < to && end > from;
        let is_damaged = |(range, _): &&(WalRange, Damage)| {
            range.branch == self.branch && overlaps(range.start_lsn, range.end_lsn)
        };
        let is_declared =
            |gap: &&DeclaredGap| gap.branch == self.branch && overlaps(gap.from_lsn, gap.to_lsn);
        let damaged = self.damaged.iter().find(is_damaged);
        let cause = match (damaged, self.declared.iter().find(is_declared)) {
            (Some((_, damage)), _) => format!("damaged: {damage}"),
            (None, Some(gap)) => format!("declared lost: {}", gap.reason),
            (None, None) => {
                "objects are missing in the repository; run `wal-archiver verify`".to_owned()
            }
        };
        let of_branch = self.backups.iter().filter(|one| one.branch == self.branch);
        let backups_before = of_branch.clone().filter(|backup| backup.stop_lsn <= from);
        let backups_after = of_branch.filter(|backup| backup.start_lsn >= to);
        let last = sides.0.iter().map(|range| range.max_time.max(range.proven));
        let first = sides.1.iter().map(|range| range.min_time.or(range.proven));
        GapReport {
            branch: self.branch,
            from_lsn: from,
            to_lsn: to,
            after: last
                .max()
                .flatten()
                .or(backups_before.map(|backup| backup.finished).max()),
            before: first
                .flatten()
                .chain(backups_after.map(|backup| backup.finished))
                .min(),
            cause,
        }
    }
}

fn earliest(one: Option<PgTimestamp>, other: Option<PgTimestamp>) -> Option<PgTimestamp> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}
