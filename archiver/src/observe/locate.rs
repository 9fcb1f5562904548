//! Finds the restore that leads to an instant: the commits around it and the flags of
//! `pitr-restore`. If no restore leads there, finds the reason and the nearest instants that can be
//! restored.
//!
//! The rules are those of the restorer's plan ([`repository::Restorable`]), on the timelines that a
//! restore follows by default. The flags name an LSN or a backup, never a time, so that no clock
//! can change their meaning.
//! Invariant: no flags are returned that a plan refuses.

use repository::{PathPart, Restorable, Stretch, WalIndex, WalRange, default_timelines};
use status::{
    locate::{Chosen, Located, NearCommit, NearInstant},
    report::gone_refusal,
};
use wal_format::{BackupInfo, Branch, Lsn, PgTimestamp, TimelineId, TransactionEnd};

use super::{damage::find_damaged, restorable::Ranges, window::read_ranges};
use crate::{error::Result, pipeline::archive::Archive};

/// Finds the restore that leads to `time`, a time by the server's clock.
pub(crate) fn locate(archive: &Archive, time: PgTimestamp) -> Result<Located> {
    let refused = |refusal: &str| Located {
        time,
        before: None,
        after: None,
        flags: None,
        chosen: None,
        refusal: Some(refusal.to_owned()),
        nearest: Vec::new(),
    };
    let facts = archive.status().facts();
    if facts.repository_gone {
        // The catalog still has what the repository had.
        return Ok(refused(&gone_refusal(facts.repository_error.as_deref())));
    }
    let details = archive.status().details();
    let (of_backups, of_wal) = find_damaged(archive, details.outcomes.iter(), &details.repaired);
    let (timelines, index) = read_ranges(archive, &of_wal)?;
    let mut backups = archive.held_backups()?;
    let defaults = default_timelines(&index, &timelines, &backups)?;
    let lost = archive.lost_backups();
    backups.retain(|backup| !of_backups.contains_key(&backup.id) && !lost.contains(&backup.id));
    let branch = match defaults.as_slice() {
        [] => return Ok(refused("no WAL is archived yet")),
        [branch] => *branch,
        _ => {
            return Ok(refused(
                "the newest timeline number names several histories: choose one of them with `pitr-restore list`",
            ));
        }
    };
    let path = repository::timeline_path(&timelines, branch).unwrap_or_default();
    let size = archive.identity().segment_size.bytes();
    let found = Restorable::along(&index, &path, &backups, size)?;
    let of_number = |known: &&(Branch, _, _)| known.0.timeline == branch.timeline;
    let is_alone = timelines.iter().filter(of_number).count() == 1;
    Search {
        index: &index,
        path: &path,
        backups: &backups,
        found: &found,
        timeline: match is_alone {
            true => branch.timeline.to_string(),
            false => branch.to_string(),
        },
        proven: proven_now(archive),
        time,
    }
    .locate()
}

/// Returns the last time, by the server's clock, at which the repository was seen to hold
/// everything. `None` if it or the clock's offset is not known.
fn proven_now(archive: &Archive) -> Option<PgTimestamp> {
    let offset = archive.status().facts().clock_offset_seconds?;
    let ours = archive.status().caught_up_as_of()?;
    #[expect(clippy::cast_possible_truncation, reason = "a clock that is days off")]
    let micros = (offset * 1e6) as i64;
    Some(PgTimestamp(ours.0.saturating_add(micros)))
}

/// A search for an instant on one timeline path.
struct Search<'a> {
    index: &'a Ranges<'a>,
    path: &'a [PathPart],
    backups: &'a [BackupInfo],
    found: &'a Restorable,
    /// The value of `--target-timeline`.
    timeline: String,
    proven: Option<PgTimestamp>,
    time: PgTimestamp,
}

impl Search<'_> {
    fn locate(&self) -> Result<Located> {
        for (number, stretch) in self.found.stretches.iter().enumerate().rev() {
            let dropped = self.first(stretch, Lsn::ZERO, |end| end.time > self.time)?;
            let end = dropped.map_or(stretch.to_lsn, |dropped| dropped.lsn);
            // `end` is the first transaction after the instant, so a transaction before `end` shows
            // that the instant is not before the stretch.
            let is_later =
                self.time >= self.begun(stretch) || self.last(stretch, end, |_| true)?.is_some();
            if end < stretch.from_lsn || !is_later {
                continue;
            }
            if dropped.is_none() && self.proven_to(stretch)? < Some(self.time) {
                return self.refuse(Some(number));
            }
            let is_commit = |end: &TransactionEnd| end.kind.is_commit();
            let kept = self.last(stretch, end, is_commit)?;
            let after = self.first(stretch, end, is_commit)?;
            let (flags, stop) = match (&kept, dropped) {
                (Some(kept), _) if kept.lsn >= stretch.from_lsn => {
                    (self.to_lsn(kept.lsn), kept.lsn)
                }
                (_, Some(dropped)) => {
                    let flags = format!("{} --target-exclusive", self.to_lsn(dropped.lsn));
                    (flags, dropped.lsn)
                }
                (_, None) => (self.to_backup(stretch), stretch.from_lsn),
            };
            return Ok(Located {
                time: self.time,
                before: kept.map(|end| self.near(&end)),
                after: after.map(|end| self.near(&end)),
                flags: Some(flags),
                chosen: self.chosen(stretch, stop),
                refusal: None,
                nearest: Vec::new(),
            });
        }
        self.refuse(None)
    }

    /// Returns the backup that a plan to stop at `stop` chooses: the newest that is consistent
    /// before the stop. All WAL from its start on is in the stretch.
    fn chosen(&self, stretch: &Stretch, stop: Lsn) -> Option<Chosen> {
        let first = stretch.ranges.first()?.start_lsn;
        let fitting = self.backups.iter().filter(|backup| {
            repository::leads_to(self.path, backup)
                && backup.start_lsn >= first
                && (stretch.from_lsn..=stop).contains(&backup.stop_lsn)
        });
        let backup = fitting.max_by_key(|backup| backup.start_lsn)?;
        Some(Chosen {
            backup: backup.id.clone(),
            backup_bytes: backup.stored_bytes,
            wal_bytes: stop.bytes_since(backup.start_lsn),
        })
    }

    /// Returns the time at which the stretch's backup began.
    fn begun(&self, stretch: &Stretch) -> PgTimestamp {
        let mut backups = self.backups.iter();
        let backup = backups.find(|backup| backup.id == stretch.backup);
        backup.map_or(stretch.finished, |backup| backup.started)
    }

    /// Returns the last time up to which the stretch is known to contain all WAL that was written.
    fn proven_to(&self, stretch: &Stretch) -> Result<Option<PgTimestamp>> {
        let last = stretch.last_time(self.index, self.path, (Lsn::ZERO, Lsn::MAX))?;
        let is_last = |last: &Stretch| std::ptr::eq(last, stretch);
        let is_end =
            self.found.refusal.is_none() && self.found.stretches.last().is_some_and(is_last);
        Ok(match is_end {
            true => last.max(stretch.proven()).max(self.proven),
            false => last,
        })
    }

    /// Returns the transactions of a range that a recovery along the stretch replays.
    fn ends(&self, stretch: &Stretch, range: &WalRange) -> Result<Vec<TransactionEnd>> {
        let Some(part) = self.path.iter().find(|part| part.branch == range.branch) else {
            return Ok(Vec::new());
        };
        let to = part.to.min(stretch.to_lsn);
        let mut ends = self.index.transactions(range)?;
        ends.retain(|end| end.lsn < to);
        Ok(ends)
    }

    /// Returns the first transaction at `from` or later for which `is_it` is true.
    fn first(
        &self,
        stretch: &Stretch,
        from: Lsn,
        is_it: impl Fn(&TransactionEnd) -> bool,
    ) -> Result<Option<TransactionEnd>> {
        let is_late = |range: &&WalRange| {
            range.end_lsn > from && (from > Lsn::ZERO || range.max_time > Some(self.time))
        };
        for range in stretch.ranges.iter().filter(is_late) {
            let mut ends = self.ends(stretch, range)?.into_iter();
            let found = ends.find(|end| end.lsn >= from && is_it(end));
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    /// Returns the last transaction before `to` for which `is_it` is true.
    fn last(
        &self,
        stretch: &Stretch,
        to: Lsn,
        is_it: impl Fn(&TransactionEnd) -> bool,
    ) -> Result<Option<TransactionEnd>> {
        let is_early = |range: &&WalRange| range.start_lsn < to && range.transaction_count > 0;
        for range in stretch.ranges.iter().rev().filter(is_early) {
            let mut ends = self.ends(stretch, range)?.into_iter().rev();
            let found = ends.find(|end| end.lsn < to && is_it(end));
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    /// Returns the refusal of an instant that is after stretch `number`, or before all stretches.
    fn refuse(&self, number: Option<usize>) -> Result<Located> {
        let stretches = &self.found.stretches;
        let before = number.and_then(|number| stretches.get(number));
        let after = stretches.get(number.map_or(0, |number| number + 1));
        let refusal = match (before, after) {
            (None, None) if self.backups.is_empty() => {
                "no base backup is archived, so nothing can be restored: run `wal-archiver backup`"
                    .to_owned()
            }
            (None, None) => format!("no base backup leads to timeline {}", self.timeline),
            (None, Some(after)) => format!(
                "no base backup ends before this instant; the first one was complete at {}",
                after.finished
            ),
            (Some(before), None) if self.found.refusal.is_none() => {
                let proven = self.proven_to(before)?;
                let proven = proven.map_or_else(|| "no time".to_owned(), |time| time.to_string());
                format!("the archive is proved to be complete up to {proven} only")
            }
            (Some(before), _) => format!(
                "WAL is missing from {} on, so the state at this instant cannot be restored",
                before.to_lsn
            ),
        };
        let mut nearest = Vec::new();
        if let Some(before) = before {
            let last = self.last(before, before.to_lsn, |end| end.kind.is_commit())?;
            nearest.push(match last.filter(|last| last.lsn >= before.from_lsn) {
                Some(last) => NearInstant {
                    time: last.time,
                    flags: self.to_lsn(last.lsn),
                },
                None => self.backup_instant(before),
            });
        }
        nearest.extend(after.map(|after| self.backup_instant(after)));
        Ok(Located {
            time: self.time,
            before: None,
            after: None,
            flags: None,
            chosen: None,
            refusal: Some(refusal),
            nearest,
        })
    }

    fn backup_instant(&self, stretch: &Stretch) -> NearInstant {
        NearInstant {
            time: stretch.finished,
            flags: self.to_backup(stretch),
        }
    }

    fn to_lsn(&self, lsn: Lsn) -> String {
        format!("--target-lsn {lsn} --target-timeline {}", self.timeline)
    }

    fn to_backup(&self, stretch: &Stretch) -> String {
        format!(
            "--backup {} --target-immediate --target-timeline {}",
            stretch.backup, self.timeline
        )
    }

    fn near(&self, end: &TransactionEnd) -> NearCommit {
        let part = self.path.iter().find(|part| end.lsn < part.to);
        let last = self.path.last();
        let timeline = part
            .or(last)
            .map_or(TimelineId::FIRST, |part| part.branch.timeline);
        NearCommit {
            time: end.time,
            lsn: end.lsn,
            xid: end.xid,
            timeline,
        }
    }
}
