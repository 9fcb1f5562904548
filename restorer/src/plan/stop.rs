//! The record at which PostgreSQL stops, by its own rule.
//!
//! For a target time, recovery stops before the first commit or abort *in the order of the WAL*
//! whose time is later. Times are not in that order, so commits with an earlier time may follow the
//! stop; they are counted and listed.

use std::collections::BTreeMap;

use repository::WalRange;
use wal_format::{BackupInfo, Branch, Lsn, PgTimestamp, TransactionEnd, lsn::PAGE_SIZE};

use super::{
    Coverage, LATE_COMMITS_LISTED, PlanError, Stop, Unproved,
    full_xid::{self, Epochs},
    minimal, print_path,
};
use crate::{Result, inventory::Inventory, target::RecoveryTarget};

/// The stop, and the transactions around it.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) stop: Stop,
    /// The LSN that the backup's stop LSN must not exceed; `None` for consistency.
    pub(super) position: Option<Lsn>,
    pub(super) last_kept: Option<TransactionEnd>,
    pub(super) first_dropped: Option<TransactionEnd>,
    pub(super) late_commit_count: u64,
    pub(super) late_commits: Vec<TransactionEnd>,
    pub(super) unproved: Option<Unproved>,
}

impl Found {
    /// Creates a stop without known transactions around it.
    fn new(stop: Stop, position: Option<Lsn>) -> Self {
        Self {
            stop,
            position,
            last_kept: None,
            first_dropped: None,
            late_commit_count: 0,
            late_commits: Vec::new(),
            unproved: None,
        }
    }
}

/// Returns the stop of a recovery that ends as soon as `backup` is consistent. It is after the
/// record that ends at the backup's stop LSN: this record marks the end of the backup, or is the
/// last one that the backup's files contain.
///
/// # Errors
/// As [`find_stop`].
pub(super) fn immediate_stop(
    inventory: &dyn Inventory,
    coverage: &Coverage,
    backup: &BackupInfo,
) -> Result<Found> {
    let walk = Walk {
        inventory,
        coverage,
    };
    let record = inventory.record_before(&walk.ranges(), backup.stop_lsn)?;
    Ok(match record.filter(|record| *record >= backup.start_lsn) {
        Some(record) => Found {
            position: None,
            ..walk.after(record)?
        },
        None => Found::new(Stop::Consistent, None),
    })
}

pub(super) fn find_stop(
    inventory: &dyn Inventory,
    coverage: &Coverage,
    target: &RecoveryTarget,
) -> Result<Found> {
    let walk = Walk {
        inventory,
        coverage,
    };
    match target {
        // WAL after the gap exists, so the end of the WAL before it is not the latest state. A
        // target LSN restores up to the gap.
        RecoveryTarget::Latest if coverage.gap => Err(walk.gap()),
        RecoveryTarget::Latest => walk.after_the_last_record(),
        RecoveryTarget::Immediate => Ok(Found::new(Stop::Consistent, None)),
        RecoveryTarget::Time {
            time,
            inclusive,
            relative,
        } => walk.time(*time, *inclusive, *relative),
        RecoveryTarget::Lsn { lsn, inclusive } => walk.lsn(*lsn, *inclusive),
        RecoveryTarget::Xid { xid, inclusive } => walk.xid(*xid, *inclusive),
        RecoveryTarget::Name { name, at_lsn } => walk.name(name, *at_lsn),
    }
}

struct Walk<'a> {
    inventory: &'a dyn Inventory,
    coverage: &'a Coverage,
}

impl Walk<'_> {
    /// Returns the transactions of a range that are on the path and come after `last`.
    fn transactions(&self, range: &WalRange, last: Option<Lsn>) -> Result<Vec<TransactionEnd>> {
        if range.transaction_count == 0 {
            return Ok(Vec::new());
        }
        let mut transactions = self.inventory.summary(range)?.transactions;
        transactions.retain(|end| {
            self.coverage.holds(range.branch, end.lsn) && last.is_none_or(|last| end.lsn > last)
        });
        Ok(transactions)
    }

    /// Returns the ranges, each with the end of its replayed part: WAL after the switch point of a
    /// timeline that the path leaves is not replayed.
    fn ranges(&self) -> Vec<(WalRange, Lsn)> {
        let ranges = self.coverage.ranges.iter();
        ranges
            .map(|range| (range.clone(), self.coverage.end_of(range)))
            .collect()
    }

    /// Returns the first transaction for which `stops` is true. Ranges for which `skip` is true
    /// contain no such transaction.
    fn first(
        &self,
        skip: impl Fn(&WalRange) -> bool,
        stops: impl Fn(&TransactionEnd) -> bool,
    ) -> Result<Option<TransactionEnd>> {
        for range in self.coverage.ranges.iter().filter(|range| !skip(range)) {
            let transactions = self.transactions(range, None)?;
            if let Some(found) = transactions.into_iter().find(|end| stops(end)) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// Returns the last commit that starts before `lsn`, or at `lsn` with `inclusive`.
    fn last_commit(&self, lsn: Lsn, inclusive: bool) -> Result<Option<TransactionEnd>> {
        let kept = |end: &TransactionEnd| {
            end.kind.is_commit() && (end.lsn < lsn || (inclusive && end.lsn == lsn))
        };
        let reaching = |range: &&WalRange| range.first_record_lsn.is_some_and(|first| first <= lsn);
        for range in self.coverage.ranges.iter().rev().filter(reaching) {
            let found = self.transactions(range, None)?.into_iter().rev().find(kept);
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    fn before(&self, dropped: TransactionEnd) -> Result<Found> {
        Ok(Found {
            last_kept: self.last_commit(dropped.lsn, false)?,
            first_dropped: Some(dropped),
            ..Found::new(Stop::Before { lsn: dropped.lsn }, Some(dropped.lsn))
        })
    }

    fn after(&self, lsn: Lsn) -> Result<Found> {
        let behind = |range: &WalRange| range.last_record_lsn.is_none_or(|last| last <= lsn);
        Ok(Found {
            last_kept: self.last_commit(lsn, true)?,
            first_dropped: self.first(behind, |end| end.lsn > lsn)?,
            ..Found::new(Stop::After { lsn }, Some(lsn.add(1)))
        })
    }

    /// Returns the start of the last record that is complete in the archive.
    fn last_record(&self) -> Option<Lsn> {
        let on_path = |range: &WalRange| {
            range
                .last_record_lsn
                .filter(|lsn| self.coverage.holds(range.branch, *lsn))
        };
        self.coverage.ranges.iter().filter_map(on_path).max()
    }

    fn after_the_last_record(&self) -> Result<Found> {
        match self.last_record() {
            Some(lsn) => self.after(lsn),
            None => Err(self.unknown("any complete record".to_owned())),
        }
    }

    fn gap(&self) -> crate::Error {
        if self.coverage.minimal {
            let last = self.last_commit(Lsn::MAX, true);
            let time = |last: Option<TransactionEnd>| last.map(|end| end.time);
            let refusal =
                last.and_then(|last| minimal::refusal(self.inventory, self.coverage, time(last)));
            return refusal.map_or_else(|error| error, Into::into);
        }
        let gap = PlanError::Gap {
            branch: self.coverage.gap_branch,
            from: self.coverage.end_lsn,
            last: self.last_record(),
        };
        gap.into()
    }

    fn unknown(&self, what: String) -> crate::Error {
        // The target may be in the gap or after it.
        if self.coverage.gap && !self.coverage.minimal {
            return self.gap();
        }
        let (from, to) = (self.coverage.start_lsn, self.coverage.end_lsn);
        let path = print_path(&self.coverage.path);
        let unknown = PlanError::Unknown {
            what,
            path,
            from,
            to,
            elsewhere: Vec::new(),
        };
        unknown.into()
    }

    /// Returns the refusal for a target after the end of the archived WAL.
    fn beyond(&self, target: String) -> Result<crate::Error> {
        if self.coverage.gap {
            return Ok(self.gap());
        }
        let last = self.last_commit(Lsn::MAX, true)?;
        let proven = self.proven().max(self.last_time()?);
        let unknown = || "nothing".to_owned();
        Ok(PlanError::BeyondArchive {
            target,
            proven: proven.map_or_else(unknown, |time| time.to_string()),
            last_commit: last.map_or_else(
                || "none since the backup began".to_owned(),
                |end| end.time.to_string(),
            ),
            end_lsn: self.coverage.end_lsn,
        }
        .into())
    }

    fn proven(&self) -> Option<PgTimestamp> {
        self.coverage
            .ranges
            .iter()
            .filter_map(|range| range.proven)
            .max()
    }

    /// Returns the greatest time of a replayed transaction.
    fn last_time(&self) -> Result<Option<PgTimestamp>> {
        let mut last = None;
        for range in &self.coverage.ranges {
            if range.max_time > last {
                let ends = self.transactions(range, None)?.into_iter();
                last = last.max(ends.map(|end| end.time).max());
            }
        }
        Ok(last)
    }

    /// Returns the stop before WAL that was written with `wal_level = minimal`, if the target time
    /// lies before the first transaction in that WAL. With `is_reached`, a transaction before that
    /// WAL is not earlier than the target.
    fn time_before_minimal(
        &self,
        target: PgTimestamp,
        is_reached: bool,
        stops: impl Fn(PgTimestamp) -> bool,
    ) -> Result<Found> {
        let dropped = self.after_minimal(|_| true)?;
        let is_before = match dropped {
            _ if is_reached => true,
            Some(end) => stops(end.time),
            None => {
                // A server that was shut down commits nothing until it is started again.
                let shutdown = minimal::last_checkpoint(self.inventory, self.coverage)?;
                shutdown.is_some_and(|time| time >= target)
            }
        };
        if !is_before {
            return Err(self.gap());
        }
        let found = self.lsn(self.coverage.end_lsn, false)?;
        Ok(Found {
            first_dropped: dropped,
            ..found
        })
    }

    fn time(&self, target: PgTimestamp, inclusive: bool, relative: bool) -> Result<Found> {
        let stops = |time: PgTimestamp| time > target || (!inclusive && time == target);
        let skip = |range: &WalRange| !range.max_time.is_some_and(stops);
        let Some(dropped) = self.first(skip, |end| stops(end.time))? else {
            // No later commit is archived. It must be proved that no later commit exists.
            // A transaction proves the archive up to its own time. Before missing WAL, it is the
            // only proof.
            let last_time = self.last_time()?;
            let is_reached = last_time.is_some_and(|last| last >= target);
            if self.coverage.minimal {
                return self.time_before_minimal(target, is_reached, stops);
            }
            let proved = self.proven().max(last_time);
            let is_proved = proved.is_some_and(|proved| proved >= target);
            if (self.coverage.gap && !is_reached) || (!is_proved && !relative) {
                return Err(self.beyond(target.to_string())?);
            }
            let mut found = self.after_the_last_record()?;
            if !is_proved {
                found.unproved = Some(Unproved { proved, target });
            }
            return Ok(found);
        };
        let mut found = self.before(dropped)?;
        let mut last = dropped.lsn;
        for range in &self.coverage.ranges {
            let late = range.min_time.is_some_and(|time| !stops(time))
                && range.last_record_lsn.is_some_and(|lsn| lsn > last);
            if !late {
                continue;
            }
            for end in self.transactions(range, Some(last))? {
                last = end.lsn;
                if end.kind.is_commit() && !stops(end.time) {
                    found.late_commit_count = found.late_commit_count.saturating_add(1);
                    if found.late_commits.len() < LATE_COMMITS_LISTED {
                        found.late_commits.push(end);
                    }
                }
            }
        }
        Ok(found)
    }

    fn lsn(&self, lsn: Lsn, inclusive: bool) -> Result<Found> {
        let ranges = self.ranges();
        // Recovery can stop before the record that announces `wal_level = minimal`, never after it.
        let minimal_lsn = self.coverage.minimal.then_some(self.coverage.end_lsn);
        let is_inside = lsn < self.coverage.end_lsn || (Some(lsn) == minimal_lsn && !inclusive);
        let record = if is_inside && lsn >= self.coverage.start_lsn {
            let record = self.inventory.record_at_or_after(&ranges, lsn)?;
            record.filter(|record| !inclusive || *record < self.coverage.end_lsn)
        } else {
            None
        };
        if let Some(record) = record.filter(|_| !inclusive)
            && self.coverage.path.iter().any(|part| part.from == record)
            && let Some(last) = self.inventory.record_before(&ranges, record)?
        {
            // A stop before the first record of a timeline replays nothing of that timeline, so
            // stop after the last record of the previous timeline.
            return self.after(last);
        }
        match record {
            None if lsn < self.coverage.start_lsn => {
                Ok(Found::new(Stop::Before { lsn }, Some(lsn)))
            }
            None if lsn == self.coverage.end_lsn && !self.coverage.minimal => {
                // A page begins with its header, so no record starts there.
                if !inclusive || lsn.align_down(PAGE_SIZE) == lsn {
                    return self.after_the_last_record();
                }
                Err(self.beyond(format!(
                    "{lsn}, whose record is not archived (--target-lsn {lsn} --target-exclusive ends right before it),"
                ))?)
            }
            None => Err(self.beyond(lsn.to_string())?),
            Some(record) if inclusive => self.after(record),
            Some(record) => {
                let behind =
                    |range: &WalRange| range.last_record_lsn.is_none_or(|last| last < record);
                Ok(Found {
                    last_kept: self.last_commit(record, false)?,
                    first_dropped: self.first(behind, |end| end.lsn >= record)?,
                    ..Found::new(Stop::Before { lsn: record }, Some(record))
                })
            }
        }
    }

    /// Returns the first transaction after WAL that was written with `wal_level = minimal`.
    fn after_minimal(
        &self,
        is_it: impl Fn(&TransactionEnd) -> bool,
    ) -> Result<Option<TransactionEnd>> {
        if !self.coverage.minimal {
            return Ok(None);
        }
        minimal::find_after(self.inventory, self.coverage, is_it)
    }

    fn xid(&self, xid: u64, inclusive: bool) -> Result<Found> {
        let mut end = self.first(|_| false, |end| full_xid::may_be(end, xid))?;
        if end.is_some() && full_xid::names_epoch(xid) {
            let mut epochs = Epochs::default();
            let mut ends = Vec::new();
            for range in &self.coverage.ranges {
                let on_path = |lsn: Lsn| self.coverage.holds(range.branch, lsn);
                epochs.add(&self.inventory.summary(range)?, on_path);
                ends.extend(self.transactions(range, None)?);
            }
            end = ends.into_iter().find(|end| epochs.is(end, xid));
        }
        match end {
            None if self
                .after_minimal(|end| full_xid::may_be(end, xid))?
                .is_some() =>
            {
                Err(self.gap())
            }
            None => Err(self.unknown(format!("the end of transaction {xid}"))),
            Some(end) if inclusive => self.after(end.lsn),
            Some(end) => self.before(end),
        }
    }

    /// Returns the stop after the restore point of this name. Searches the whole path, even where
    /// this backup does not lead, so that an ambiguous name is refused with every backup.
    fn name(&self, name: &str, at_lsn: Option<Lsn>) -> Result<Found> {
        let on_path = |branch: Branch, lsn: Lsn| {
            let mut parts = self.coverage.path.iter();
            parts.any(|part| part.branch == branch && lsn < part.to)
        };
        let points = self.inventory.restore_points()?.into_iter();
        // Collect by LSN: a timeline's first segment begins with a copy of the WAL before the
        // switch, so a point may be listed twice.
        let points: BTreeMap<Lsn, PgTimestamp> = points
            .filter(|(branch, lsn, _, found)| found == name && on_path(*branch, *lsn))
            .filter(|(_, lsn, ..)| at_lsn.is_none_or(|at| is_restore_point_at(*lsn, at)))
            .map(|(_, lsn, time, _)| (lsn, time))
            .collect();
        let mut lsns = points.keys();
        match (lsns.next(), lsns.next()) {
            (Some(lsn), None) if (self.coverage.start_lsn..self.coverage.end_lsn).contains(lsn) => {
                self.after(*lsn)
            }
            (Some(_), Some(_)) => {
                let words = points.iter().map(|(lsn, time)| format!("{lsn} ({time})"));
                Err(PlanError::AmbiguousName {
                    name: name.to_owned(),
                    points: words.collect::<Vec<_>>().join(", "),
                }
                .into())
            }
            _ if self.coverage.minimal
                && points.keys().any(|lsn| *lsn >= self.coverage.end_lsn) =>
            {
                Err(self.gap())
            }
            _ => {
                let at = at_lsn.map_or_else(String::new, |at| format!(" at {at}"));
                Err(self.unknown(format!("restore point \"{name}\"{at}")))
            }
        }
    }
}

/// Returns true if `lsn` identifies the restore point's record at `start`: either its start, which
/// `list` prints, or its end, which `pg_create_restore_point()` returns.
fn is_restore_point_at(start: Lsn, lsn: Lsn) -> bool {
    /// The length of the record: header and `xl_restore_point`, which has a fixed length
    /// (`xlog_internal.h`), aligned.
    const RECORD_BYTES: u64 = 104;
    /// The longest page header that can interrupt the record.
    const PAGE_HEADER_BYTES: u64 = 40;
    let end = start.add(RECORD_BYTES);
    lsn == start || (end..=end.add(PAGE_HEADER_BYTES)).contains(&lsn)
}
