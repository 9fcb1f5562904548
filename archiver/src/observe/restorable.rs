//! Computes the WAL that can be restored, by the rules of the restorer's plan
//! ([`repository::Restorable`]): the window, its stretches, and whether a base backup leads to the
//! server's present.
//!
//! Reads the catalog only. Invariant: WAL that is still expected (received later, or in the spool)
//! is never called missing, and nothing is called restorable that a plan refuses.

use std::collections::BTreeMap;

use repository::{
    Damage, ExpiredSet, KnownTimeline, PathPart, Refusal, Restorable, Stretch, WalIndex, WalRange,
    default_timelines,
};
use status::{
    cluster_status::ServerPath,
    details::{GapReport, RestorableRange},
    report::WindowReport,
};
use wal_format::{BackupInfo, Branch, Lsn, PgTimestamp, TransactionEnd, WalEvent};

use crate::{
    error::{Error, Result},
    pipeline::archive::Archive,
};

/// The maximum number of stretches shown.
const STRETCHES_MAX: usize = 200;
/// The refusal while there is no backup.
const NO_BACKUP: &str = "no base backup is archived, so nothing can be restored";

/// The ranges of every branch in the catalog, read at the same time.
pub(super) struct Ranges<'a> {
    pub(super) archive: &'a Archive,
    /// The ranges that can be replayed.
    pub(super) of: BTreeMap<Branch, Vec<WalRange>>,
    /// The ranges that the last verification found damaged. A plan treats their WAL as missing.
    pub(super) damaged: Vec<(WalRange, Damage)>,
}

impl Ranges<'_> {
    /// Returns the damaged range that contains the byte at `lsn`.
    fn damaged_at(&self, branch: Branch, lsn: Lsn) -> Option<&(WalRange, Damage)> {
        let mut damaged = self.damaged.iter();
        damaged.find(|(range, _)| {
            range.branch == branch && range.start_lsn <= lsn && lsn < range.end_lsn
        })
    }
}

impl WalIndex for Ranges<'_> {
    type Error = Error;

    fn ranges(&self, branch: Branch, from: Lsn, to: Lsn) -> Result<Vec<WalRange>> {
        let ranges = self.of.get(&branch).map_or(&[][..], Vec::as_slice);
        let first = ranges.partition_point(|range| range.end_lsn <= from);
        let ranges = ranges.get(first..).unwrap_or_default().iter();
        let inside = ranges.take_while(|range| range.start_lsn < to);
        Ok(inside.cloned().collect())
    }

    fn transactions(&self, range: &WalRange) -> Result<Vec<TransactionEnd>> {
        Ok(self.archive.catalog().transactions(range)?)
    }

    fn events(&self, range: &WalRange) -> Result<Vec<(Lsn, WalEvent)>> {
        Ok(self.archive.catalog().events(range)?)
    }
}

/// The result of a check of the catalog.
#[derive(Debug, Default)]
pub(super) struct Judgement {
    pub(super) window: WindowReport,
    /// The stretches in which a recovery can stop, of every branch.
    pub(super) ranges: Vec<RestorableRange>,
    /// The server's branch that was judged.
    pub(super) judged: Option<Branch>,
    /// The reason why no base backup leads to the server's present.
    pub(super) unreached: Option<String>,
    /// The first missing byte of a gap. It counts only if the next check finds it again.
    pub(super) missing: Option<(Branch, Lsn)>,
    /// Archived WAL that cannot be replayed, because the server had `wal_level = minimal`.
    pub(super) minimal: Vec<GapReport>,
}

/// The input of a check of the catalog.
pub(super) struct Look<'a> {
    pub(super) index: &'a Ranges<'a>,
    pub(super) timelines: &'a [KnownTimeline<bytes::Bytes>],
    pub(super) backups: &'a [BackupInfo],
    /// The backups that the last verification did not find damaged.
    pub(super) whole: &'a [BackupInfo],
    pub(super) expired: &'a ExpiredSet,
    /// The first missing byte of the gap that the previous check found.
    pub(super) missing_before: Option<(Branch, Lsn)>,
}

impl Look<'_> {
    pub(super) fn judge(&self) -> Result<Judgement> {
        let defaults = default_timelines(self.index, self.timelines, self.backups)?;
        let path = match defaults.as_slice() {
            [branch] => repository::timeline_path(self.timelines, *branch),
            _ => None,
        };
        let path = path.unwrap_or_default();
        let found = self.along(&path)?;
        let mut judgement = Judgement::default();
        let server = self.index.archive.status().facts().server_path;
        let server = server.filter(|server| !server.parts.is_empty());
        judgement.judged = server.as_ref().and_then(|server| server.current());
        (judgement.unreached, judgement.missing) = match &server {
            Some(server) => self.unreached(server, &defaults)?,
            None => self.refusal_of(&path, &found, "the newest timeline")?,
        };
        judgement.window = self.window(&path, &found, judgement.unreached.as_deref())?;
        for (branch, ..) in self.timelines {
            self.add_ranges(*branch, &path, &mut judgement)?;
        }
        let surplus = judgement.ranges.len().saturating_sub(STRETCHES_MAX);
        judgement.ranges.drain(..surplus);
        Ok(judgement)
    }

    fn along(&self, path: &[PathPart]) -> Result<Restorable> {
        let size = self.index.archive.identity().segment_size.bytes();
        let mut found = Restorable::along(self.index, path, self.whole, size)?;
        if self.whole.is_empty() && !self.backups.is_empty() {
            // There are backups, and each is damaged.
            found.refusal = Some(Refusal::NoBackupOnPath);
        }
        Ok(found)
    }

    /// Returns the reason why no base backup leads to the server's present, and the first missing
    /// byte.
    fn unreached(
        &self,
        server: &ServerPath,
        defaults: &[Branch],
    ) -> Result<(Option<String>, Option<(Branch, Lsn)>)> {
        let Some(current) = server.current() else {
            return Ok((None, None));
        };
        let name = format!("timeline {current}, which the server is on");
        let found = self.along(&server.parts)?;
        let (refusal, missing) = self.refusal_of(&server.parts, &found, &name)?;
        let is_archived = self.index.of.get(&current).is_some_and(|of| !of.is_empty());
        let is_default = defaults == [current];
        if refusal.is_some() || self.backups.is_empty() || !is_archived || is_default {
            return Ok((refusal, missing));
        }
        let others: Vec<String> = defaults.iter().map(ToString::to_string).collect();
        let refusal = format!(
            "a restore does not lead to {name}: without --target-timeline it follows {}. The archiver takes a base backup \
             there now",
            others.join(" or ")
        );
        Ok((Some(refusal), missing))
    }

    /// Returns the reason why a restore of the newest state on `path` is refused, as text, and the
    /// first missing byte.
    fn refusal_of(
        &self,
        path: &[PathPart],
        found: &Restorable,
        name: &str,
    ) -> Result<(Option<String>, Option<(Branch, Lsn)>)> {
        let remedy =
            "The archiver takes a base backup now; if that fails, run `wal-archiver backup`";
        Ok(match &found.refusal {
            None | Some(Refusal::NoBackup) => (None, None),
            Some(Refusal::NoBackupOnPath) => {
                let words = format!(
                    "no base backup leads to {name}, so a restore of its present is refused. {remedy}"
                );
                (Some(words), None)
            }
            Some(Refusal::Gap { branch, from_lsn })
                if self.index.damaged_at(*branch, *from_lsn).is_some() =>
            {
                let damaged = self.index.damaged_at(*branch, *from_lsn);
                let damaged = damaged.map_or_else(String::new, |(range, damage)| {
                    let (from, to) = (range.start_lsn, range.end_lsn);
                    format!("WAL {from} to {to} on timeline {branch} is damaged: {damage}")
                });
                let words = format!(
                    "{damaged}. No base backup after it leads to {name}, so a restore of its present is refused. {remedy}"
                );
                (Some(words), None)
            }
            Some(Refusal::Gap { branch, from_lsn }) => {
                if self.is_pending(path, *branch, *from_lsn)? {
                    return Ok((None, None));
                }
                let missing = (*branch, *from_lsn);
                let words = format!(
                    "WAL is missing from {from_lsn} on timeline {branch}, and no base backup after it leads to {name}, so \
                     a restore of its present is refused. {remedy}"
                );
                let is_known = self.missing_before == Some(missing);
                (is_known.then_some(words), Some(missing))
            }
            Some(Refusal::MinimalWal { branch, from_lsn }) => {
                let words = format!(
                    "the server wrote WAL with wal_level = minimal from {from_lsn} on timeline {branch}: changes may be \
                     missing after it, and no base backup after it leads to {name}, so a restore of its present is refused. \
                     {remedy}"
                );
                (Some(words), None)
            }
        })
    }

    /// Returns true if the byte at `lsn` of `branch` may still arrive in the repository: the
    /// archiver requests it from other servers, it is in the spool, or it comes later in the
    /// stream.
    fn is_pending(&self, path: &[PathPart], branch: Branch, lsn: Lsn) -> Result<bool> {
        let archive = self.index.archive;
        if archive.status().facts().gap.is_some() {
            return Ok(true);
        }
        let positions = archive.progress().positions();
        let place = |branch: Branch| path.iter().position(|part| part.branch == branch);
        let is_past = match (place(positions.branch()), place(branch)) {
            (Some(stream), Some(hole)) if stream == hole => positions.flushed() > lsn,
            (Some(stream), Some(hole)) => stream > hole,
            _ => false,
        };
        if !is_past {
            return Ok(true);
        }
        let segment = archive.identity().segment_size.segment_of(lsn);
        let spooled = archive.branch_spool(branch).segments()?;
        let is_open = spooled.open.is_some_and(|(open, _)| open == segment);
        // Query the catalog again: a segment may have left the spool since `index` was read.
        Ok(is_open
            || spooled.complete.contains(&segment)
            || archive.catalog().contiguous_end(branch, lsn)? > lsn)
    }

    /// Returns the window of a restore without a chosen timeline.
    fn window(
        &self,
        path: &[PathPart],
        found: &Restorable,
        unreached: Option<&str>,
    ) -> Result<WindowReport> {
        let no_backup = self.backups.is_empty().then_some(NO_BACKUP);
        let refusal = unreached.or(no_backup).map(str::to_owned);
        let mut window = WindowReport {
            refusal,
            ..WindowReport::default()
        };
        let mut gaps = 0;
        let mut before: Option<&Stretch> = None;
        for stretch in &found.stretches {
            let hole = before.map(|before| (before.to_lsn, begin_of(stretch)));
            match hole {
                Some(hole) if self.is_missing(path, hole) => gaps += 1,
                // A hole whose WAL expired does not count as a gap. A backup before it can be
                // restored to its own end only.
                _ => {
                    gaps = 0;
                    window.earliest = Some(stretch.finished);
                }
            }
            before = Some(stretch);
        }
        if before.is_some() {
            let open = match found.refusal {
                Some(Refusal::Gap { .. } | Refusal::MinimalWal { .. }) if unreached.is_some() => 1,
                _ => 0,
            };
            window.gaps = Some(gaps + open);
            window.open_gaps = Some(open);
            window.latest_commit = found.last_commit(self.index, path)?;
            // Before a gap, only a commit proves how far the WAL reaches.
            let last = found.stretches.last().filter(|_| found.refusal.is_none());
            let proven = last.and_then(Stretch::proven);
            window.latest = window.latest_commit.max(proven);
            // A backup ends after its stop LSN, when its objects are stored, so its end may be
            // later than `latest`.
            window.earliest = window.earliest.min(window.latest.or(window.earliest));
        }
        Ok(window)
    }

    /// Returns true if any WAL of a hole has not expired.
    fn is_missing(&self, path: &[PathPart], (from, to): (Lsn, Lsn)) -> bool {
        path.iter().any(|part| {
            let (from, to) = (from.max(part.from), to.min(part.to));
            from < to && !self.expired.not_expired(part.branch, from, to).is_empty()
        })
    }

    /// Adds the stretches of a branch's own WAL, cut where the default path leaves it, and the WAL
    /// between them that was written with `wal_level = minimal`.
    fn add_ranges(
        &self,
        branch: Branch,
        default: &[PathPart],
        judgement: &mut Judgement,
    ) -> Result<()> {
        let path = repository::timeline_path(self.timelines, branch).unwrap_or_default();
        let Some(own) = path.last() else {
            return Ok(());
        };
        let left_at = default.iter().find(|part| part.branch == branch);
        let left_at = left_at.map_or(own.from, |part| part.to);
        let found = self.along(&path)?;
        for (_, from_lsn) in found.minimal.iter().filter(|(on, _)| *on == branch) {
            judgement
                .minimal
                .push(self.minimal(&found, branch, *from_lsn));
        }
        for stretch in &found.stretches {
            for (from, to, by_default) in [(own.from, left_at, true), (left_at, Lsn::MAX, false)] {
                let start_lsn = stretch.from_lsn.max(from);
                let end_lsn = stretch.to_lsn.min(to);
                if start_lsn >= end_lsn {
                    continue;
                }
                let last = stretch.last_time(self.index, &path, (start_lsn, end_lsn))?;
                let first = if start_lsn == stretch.from_lsn {
                    found.first_time(stretch, last)
                } else {
                    self.first_time(stretch, branch, start_lsn)
                };
                judgement.ranges.push(RestorableRange {
                    branch,
                    timeline: branch.timeline,
                    start_lsn,
                    end_lsn,
                    backup: stretch.backup.clone(),
                    from: first,
                    to: last.max(first),
                    by_default,
                });
            }
        }
        Ok(())
    }

    /// Returns the WAL from a record that announces `wal_level = minimal` to the next stretch, or
    /// to the end of the branch's WAL.
    fn minimal(&self, found: &Restorable, branch: Branch, from_lsn: Lsn) -> GapReport {
        let next = found.stretches.iter().find(|next| next.from_lsn > from_lsn);
        let held = self.index.of.get(&branch).and_then(|of| of.last());
        let end = next
            .map(|next| next.from_lsn)
            .or(held.map(|last| last.end_lsn));
        GapReport {
            branch,
            from_lsn,
            to_lsn: end.unwrap_or(from_lsn),
            after: None,
            before: next.map(|next| next.finished),
            cause:
                "wal_level = minimal: changes may be missing from this WAL, so nothing after it \
                    can be restored from an earlier base backup"
                    .to_owned(),
        }
    }

    /// Returns the earliest known commit or abort time in a branch's WAL from `lsn` on.
    fn first_time(&self, stretch: &Stretch, branch: Branch, lsn: Lsn) -> Option<PgTimestamp> {
        let of_branch = |range: &&WalRange| range.branch == branch && range.end_lsn > lsn;
        let ranges = stretch.ranges.iter().filter(of_branch);
        for range in ranges.filter(|range| range.transaction_count > 0) {
            let ends = self.index.transactions(range).ok()?.into_iter();
            let first = ends.filter(|end| end.lsn >= lsn).map(|end| end.time).min();
            if first.is_some() {
                return first;
            }
        }
        None
    }
}

/// Returns the LSN from which the stretch's backup needs WAL.
fn begin_of(stretch: &Stretch) -> Lsn {
    let first = stretch.ranges.first();
    first.map_or(stretch.from_lsn, |range| {
        range.start_lsn.min(stretch.from_lsn)
    })
}
