//! Decides what a restore can reach: backups, and the WAL that leads on from them along a path of
//! timelines.
//!
//! The restorer's plan and the archiver's window, light and repairing backups are decided by this
//! code, so that nothing is shown as restorable that a plan refuses. Pure except for the queries to
//! the [`WalIndex`].

use wal_format::{
    BackupId, BackupInfo, Branch, Lsn, PgTimestamp, TimelineHistory, TransactionEnd, WalEvent,
};

use crate::{PathPart, WalRange, timeline_path};

/// A known timeline: its history and its history file's content, as [`timeline_path`] takes it.
pub type KnownTimeline<C> = (Branch, Option<TimelineHistory>, C);

/// An index of the archived WAL.
pub trait WalIndex {
    /// The error of reading the index.
    type Error;

    /// The ranges of a branch that reach into `[from, to)`, in order.
    ///
    /// # Errors
    /// The error of reading them.
    fn ranges(&self, branch: Branch, from: Lsn, to: Lsn) -> Result<Vec<WalRange>, Self::Error>;

    /// The transactions that end in a range, in LSN order.
    ///
    /// # Errors
    /// The error of reading them.
    fn transactions(&self, range: &WalRange) -> Result<Vec<TransactionEnd>, Self::Error>;

    /// The other events of a range, in LSN order.
    ///
    /// # Errors
    /// The error of reading them.
    fn events(&self, range: &WalRange) -> Result<Vec<(Lsn, WalEvent)>, Self::Error>;
}

/// The WAL along a path from one LSN on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PathWal {
    /// The ranges in order; neighbours may overlap.
    pub ranges: Vec<WalRange>,
    /// The first byte that cannot be replayed: it is missing, or is the start of the record of
    /// `minimal`, or is the end of the archive.
    pub end_lsn: Lsn,
    /// The branch on which that is; `None` for an empty path.
    pub end_branch: Option<Branch>,
    /// True if WAL exists after `end_lsn`, or a later timeline begins there: then it is a gap and
    /// not the end.
    pub gap: bool,
    /// True if the record at `end_lsn` announces `wal_level = minimal`. Changes may be missing
    /// from the WAL after it: PostgreSQL 13 replays that WAL with a warning and loses the rows,
    /// later versions end there (`CheckRequiredParameterValues` in `xlogrecovery.c`).
    pub minimal: bool,
}

/// Follows the WAL along `path` from `start_lsn` as far as it is held without a gap and a replay
/// is complete.
///
/// # Errors
/// The error of reading the index.
pub fn follow_wal<I: WalIndex + ?Sized>(
    index: &I,
    path: &[PathPart],
    start_lsn: Lsn,
    segment_bytes: u64,
) -> Result<PathWal, I::Error> {
    let mut wal = PathWal {
        ranges: Vec::new(),
        end_lsn: start_lsn,
        end_branch: path.last().map(|part| part.branch),
        gap: false,
        minimal: false,
    };
    for part in path.iter().filter(|part| part.to > start_lsn) {
        // PostgreSQL reads the segment of a switch point from the later timeline, which holds a
        // copy of what is before.
        let from = part.from.align_down(segment_bytes);
        let from = from.max(start_lsn.align_down(segment_bytes));
        if from > wal.end_lsn {
            wal.gap = true;
            break;
        }
        wal.end_branch = Some(part.branch);
        for range in index.ranges(part.branch, from, part.to)? {
            if range.start_lsn > wal.end_lsn {
                wal.gap = true;
                break;
            }
            if let Some(lsn) = first_minimal(index, &range, (start_lsn, part.to))? {
                // No later timeline leads around the record: the path leaves this one after it.
                wal.end_lsn = lsn;
                (wal.gap, wal.minimal) = (true, true);
                wal.ranges.push(range);
                return Ok(wal);
            }
            wal.end_lsn = wal.end_lsn.max(range.end_lsn.min(part.to));
            wal.ranges.push(range);
        }
        if wal.gap && part.to == Lsn::MAX {
            break;
        }
        wal.gap = false;
    }
    Ok(wal)
}

/// The first record of a range in `[from, to)` that announces `wal_level = minimal`.
fn first_minimal<I: WalIndex + ?Sized>(
    index: &I,
    range: &WalRange,
    (from, to): (Lsn, Lsn),
) -> Result<Option<Lsn>, I::Error> {
    if range.minimal_count == Some(0) {
        return Ok(None);
    }
    let events = index.events(range)?.into_iter();
    let mut minimal = events.filter(|(_, event)| event.begins_minimal_wal());
    let found = minimal.find(|(lsn, _)| *lsn >= from && *lsn < to);
    Ok(found.map(|(lsn, _)| lsn))
}

/// Returns true if `backup` can be made consistent on `path`, as far as its WAL is there.
#[must_use]
pub fn leads_to(path: &[PathPart], backup: &BackupInfo) -> bool {
    path.iter()
        .any(|part| part.branch == backup.branch && backup.stop_lsn <= part.to)
}

/// The timeline that a restore follows when none was chosen: the greatest number among those to
/// which a backup leads and that continue the newest backup's timeline or are newer than that
/// backup. Several when one number names several histories, none without WAL.
///
/// A timeline that is older than the newest backup and does not continue its timeline was
/// abandoned, or is a copy that was archived here by mistake. A timeline that is newer is where the
/// cluster went on.
///
/// # Errors
/// The error of reading the index.
pub fn default_timelines<I: WalIndex + ?Sized, C: AsRef<[u8]>>(
    index: &I,
    timelines: &[KnownTimeline<C>],
    backups: &[BackupInfo],
) -> Result<Vec<Branch>, I::Error> {
    let is_known = |backup: &&BackupInfo| timelines.iter().any(|known| known.0 == backup.branch);
    let backups: Vec<&BackupInfo> = backups.iter().filter(is_known).collect();
    let newest = backups.iter().max_by_key(|backup| backup.started);
    let mut candidates = Vec::new();
    for (branch, ..) in timelines {
        let path = timeline_path(timelines, *branch).unwrap_or_default();
        let crosses = |backup: &BackupInfo| path.iter().any(|part| part.branch == backup.branch);
        let follows = match newest {
            None => true,
            Some(newest) if crosses(newest) => true,
            Some(newest) => {
                backups.iter().any(|backup| leads_to(&path, backup))
                    && began(index, &path)?.is_some_and(|began| began > newest.finished)
            }
        };
        if follows {
            candidates.push(*branch);
        }
    }
    let greatest = candidates.iter().map(|branch| branch.timeline).max();
    candidates.retain(|branch| Some(branch.timeline) == greatest);
    Ok(candidates)
}

/// The first known time on the last timeline of a path; `None` if its WAL says nothing of the time.
fn began<I: WalIndex + ?Sized>(
    index: &I,
    path: &[PathPart],
) -> Result<Option<PgTimestamp>, I::Error> {
    let Some(part) = path.last() else {
        return Ok(None);
    };
    for range in index.ranges(part.branch, part.from, part.to)? {
        let first = if range.start_lsn >= part.from || range.transaction_count == 0 {
            range.min_time
        } else {
            // The segment of the switch begins with WAL of the timeline before.
            let ends = index.transactions(&range)?.into_iter();
            let own = ends.filter(|end| end.lsn >= part.from);
            own.map(|end| end.time).min()
        };
        if let Some(time) = first.or(range.proven) {
            return Ok(Some(time));
        }
    }
    Ok(None)
}

/// WAL in which a recovery can stop: every record of `[from_lsn, to_lsn)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// The end of the first backup that leads here.
    pub from_lsn: Lsn,
    /// The first byte that is missing.
    pub to_lsn: Lsn,
    /// That backup.
    pub backup: BackupId,
    /// When it was complete.
    pub finished: PgTimestamp,
    /// The ranges that are read from the backup's start on; neighbours may overlap.
    pub ranges: Vec<WalRange>,
}

/// Why the newest state on a path cannot be restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// There is no backup at all.
    NoBackup,
    /// There are backups, but none of them leads to the path's last timeline.
    NoBackupOnPath,
    /// WAL is missing on the way.
    Gap {
        /// The branch.
        branch: Branch,
        /// The first missing byte.
        from_lsn: Lsn,
    },
    /// The server had `wal_level = minimal` on the way, and no backup after that leads on.
    MinimalWal {
        /// The branch.
        branch: Branch,
        /// The record from which on changes may be missing.
        from_lsn: Lsn,
    },
}

/// The WAL that can be restored along one path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restorable {
    /// The stretches in which a recovery can stop, in order, with missing WAL between them.
    pub stretches: Vec<Stretch>,
    /// Why a restore of the newest state refuses.
    pub refusal: Option<Refusal>,
    /// The records that announce `wal_level = minimal` and end a stretch, in order.
    pub minimal: Vec<(Branch, Lsn)>,
}

impl Restorable {
    /// Computes the restorable spans along `path` from the `backups`, in any order, and the WAL of
    /// `index`.
    ///
    /// # Errors
    /// The error of reading the index.
    pub fn along<I: WalIndex + ?Sized>(
        index: &I,
        path: &[PathPart],
        backups: &[BackupInfo],
        segment_bytes: u64,
    ) -> Result<Self, I::Error> {
        let mut leading: Vec<&BackupInfo> = backups.iter().collect();
        leading.retain(|backup| leads_to(path, backup));
        leading.sort_by_key(|backup| backup.start_lsn);
        let mut restorable = Self {
            stretches: Vec::new(),
            refusal: Some(if backups.is_empty() {
                Refusal::NoBackup
            } else {
                Refusal::NoBackupOnPath
            }),
            minimal: Vec::new(),
        };
        let mut covered: Option<PathWal> = None;
        for backup in leading {
            // WAL that leads past the start of a later backup leads to its end as well.
            let known = covered.take();
            let wal = match known.filter(|wal| wal.end_lsn > backup.start_lsn) {
                Some(wal) => wal,
                None => follow_wal(index, path, backup.start_lsn, segment_bytes)?,
            };
            let is_whole = wal.end_lsn >= backup.stop_lsn;
            match restorable.stretches.last_mut() {
                _ if !is_whole => {}
                Some(last) if last.to_lsn >= backup.stop_lsn => {
                    // Of two that began together, the later one may end first.
                    if backup.stop_lsn < last.from_lsn {
                        last.from_lsn = backup.stop_lsn;
                        last.backup = backup.id.clone();
                        last.finished = backup.finished;
                    }
                }
                _ => restorable.stretches.push(Stretch {
                    from_lsn: backup.stop_lsn,
                    to_lsn: wal.end_lsn,
                    backup: backup.id.clone(),
                    finished: backup.finished,
                    ranges: wal.ranges.clone(),
                }),
            }
            let last = path.last().map_or(Branch::FIRST, |part| part.branch);
            let (branch, from_lsn) = (wal.end_branch.unwrap_or(last), wal.end_lsn);
            if wal.minimal && !restorable.minimal.contains(&(branch, from_lsn)) {
                restorable.minimal.push((branch, from_lsn));
            }
            let missing = || match wal.minimal {
                true => Refusal::MinimalWal { branch, from_lsn },
                false => Refusal::Gap { branch, from_lsn },
            };
            // The plan takes the newest backup from which the way is whole.
            restorable.refusal = match restorable.refusal {
                None => None,
                Some(_) if is_whole && !wal.gap => None,
                Some(_) => Some(missing()),
            };
            covered = Some(wal);
        }
        Ok(restorable)
    }

    /// The earliest time from `stretch`'s backup on that a plan accepts as a target; `None` if its
    /// WAL proves no such time. `last` is the greatest time of a transaction in the stretch.
    ///
    /// A backup ends when its objects are stored, so its end may be later than all that its WAL
    /// proves. Before missing WAL, only a transaction proves anything.
    #[must_use]
    pub fn first_time(&self, stretch: &Stretch, last: Option<PgTimestamp>) -> Option<PgTimestamp> {
        let is_last = self.stretches.last() == Some(stretch);
        let proven = match self.refusal {
            None if is_last => last.max(stretch.proven()),
            _ => last,
        };
        let is_proved = proven.is_some_and(|proven| proven >= stretch.finished);
        if is_proved {
            Some(stretch.finished)
        } else {
            last
        }
    }

    /// The time of the last commit that can be restored; `None` where nothing can be, or no commit
    /// was archived.
    ///
    /// # Errors
    /// The error of reading the index.
    pub fn last_commit<I: WalIndex + ?Sized>(
        &self,
        index: &I,
        path: &[PathPart],
    ) -> Result<Option<PgTimestamp>, I::Error> {
        let Some(last) = self.stretches.last() else {
            return Ok(None);
        };
        last.last_time(index, path, (Lsn::ZERO, Lsn::MAX))
    }
}

impl Stretch {
    /// The latest time, by the server's clock, up to which the stretch is proved to contain all WAL
    /// that the server had flushed. A plan accepts a target time up to this time even if no later
    /// commit is archived.
    #[must_use]
    pub fn proven(&self) -> Option<PgTimestamp> {
        self.ranges.iter().filter_map(|range| range.proven).max()
    }

    /// The greatest time of a transaction on `path` in the part of the stretch's WAL that lies in
    /// `[from, to)`.
    ///
    /// # Errors
    /// The error of reading the index.
    pub fn last_time<I: WalIndex + ?Sized>(
        &self,
        index: &I,
        path: &[PathPart],
        (from, to): (Lsn, Lsn),
    ) -> Result<Option<PgTimestamp>, I::Error> {
        let mut last = None;
        for range in &self.ranges {
            let Some(part) = path.iter().find(|part| part.branch == range.branch) else {
                continue;
            };
            let (from, to) = (from.max(part.from), to.min(part.to).min(self.to_lsn));
            if range.max_time <= last || range.end_lsn <= from || range.start_lsn >= to {
                continue;
            }
            let time = if range.start_lsn >= from && range.end_lsn <= to {
                range.max_time
            } else {
                let ends = index.transactions(range)?.into_iter();
                let inside = ends.filter(|end| end.lsn >= from && end.lsn < to);
                inside.map(|end| end.time).max()
            };
            last = last.max(time);
        }
        Ok(last)
    }
}

#[cfg(test)]
mod tests;
