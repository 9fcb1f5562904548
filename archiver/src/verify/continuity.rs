//! The WAL that restores need, along every path of timelines: from the first backup that leads
//! there to the end.
//!
//! A path enters a timeline in the segment of the fork, of which the later timeline has a copy
//! (`XLogFileReadAnyTLI` in `xlogrecovery.c` reads it there), and needs the earlier one up to that
//! segment. Invariant: a timeline counts whether it has a backup or not: a restore from an older
//! backup crosses it.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use catalog::Catalog;
use repository::{ExpiredSet, PathPart, Restorable, WalRange, timeline_path};
use wal_format::{BackupInfo, Branch, Lsn, SegmentSize, TimelineHistory};

use super::Verifier;
use crate::error::{Error, Result};

/// The archive as continuity sees it.
struct Archived {
    catalog: Catalog,
    branches: Vec<(Branch, Option<TimelineHistory>, Bytes)>,
    backups: Vec<BackupInfo>,
    size: SegmentSize,
}

impl Verifier {
    /// Every byte of WAL that a restore may need has to be there.
    pub(super) fn continuity(&mut self) -> Result<()> {
        // A catalog of its own, made of the repository: the identity may be what is damaged there.
        let folder = tempfile::tempdir().map_err(Error::io("create", "a temporary directory"))?;
        let catalog = Catalog::open(folder.path(), &self.identity)?;
        let report = catalog.refresh(&self.repository)?;
        for lost in report.lost_histories {
            self.problem(&lost.key(self.wal.system_identifier), &lost.to_string());
        }
        let expired = catalog.expired()?;
        let archived = Archived {
            branches: catalog.branches()?,
            backups: catalog.backups()?,
            catalog,
            size: self.wal.segment_size,
        };
        self.backups_are_consistent(&archived)?;
        let mut holes: BTreeMap<Branch, BTreeSet<(Lsn, Lsn)>> = BTreeMap::new();
        for (branch, ..) in &archived.branches {
            for (on, from, to) in archived.holes_on_path(*branch)? {
                holes.entry(on).or_default().insert((from, to));
            }
        }
        for (branch, holes) in holes {
            for (from, to) in joined(holes) {
                self.holes(&archived, &expired, branch, from, to);
            }
        }
        self.minimal_wal(&archived)
    }

    /// Reports WAL that a server wrote with `wal_level = minimal` after a backup: as a problem,
    /// unless a backup was taken after it.
    fn minimal_wal(&mut self, archived: &Archived) -> Result<()> {
        let mut minimal = BTreeSet::new();
        for (branch, ..) in &archived.branches {
            let path = archived.path(*branch);
            let size = archived.size.bytes();
            let found = Restorable::along(&archived.catalog, &path, &archived.backups, size)?;
            minimal.extend(found.minimal);
        }
        for (branch, lsn) in minimal {
            let words = format!(
                "the WAL of timeline branch {branch} was written with wal_level = minimal from {lsn} on: changes may be \
                 missing from it, and no earlier backup leads over it"
            );
            if archived.has_backup_after(branch, lsn) {
                self.losses.push(format!(
                    "{words}; a later backup makes the archive whole again after it"
                ));
            } else {
                self.general(format!("{words}; take one with `wal-archiver backup`"));
            }
        }
        Ok(())
    }

    fn backups_are_consistent(&mut self, archived: &Archived) -> Result<()> {
        for backup in &archived.backups {
            let end = archived
                .catalog
                .contiguous_end(backup.branch, backup.start_lsn)?;
            if end < backup.stop_lsn {
                self.general(format!(
                    "backup {} cannot be restored: WAL {end} to {} of timeline branch {} is missing",
                    backup.id, backup.stop_lsn, backup.branch
                ));
            }
        }
        Ok(())
    }

    /// Reports a hole as far as it did not expire: as a problem, unless it was declared lost and a
    /// backup was taken after it.
    fn holes(
        &mut self,
        archived: &Archived,
        expired: &ExpiredSet,
        branch: Branch,
        from: Lsn,
        to: Lsn,
    ) {
        for (start, end) in expired.not_expired(branch, from, to) {
            let declared = self
                .gaps
                .iter()
                .find(|gap| gap.branch == branch && gap.from_lsn <= start && end <= gap.to_lsn);
            match declared {
                Some(gap) if archived.has_backup_after(branch, end) => self.losses.push(format!(
                    "WAL {start} to {end} of timeline branch {branch} was declared lost {}; a later backup makes the \
                     archive whole again after it",
                    gap.declared
                )),
                _ => self.general(format!(
                    "WAL {start} to {end} of timeline branch {branch} is missing"
                )),
            }
        }
    }
}

impl Archived {
    /// The path to a timeline, or nothing if its history is not archived.
    fn path(&self, branch: Branch) -> Vec<PathPart> {
        timeline_path(&self.branches, branch).unwrap_or_default()
    }

    /// The first byte of WAL that the path needs, with the index of its part: the start of the
    /// oldest backup on it, or, without one, the first WAL.
    fn first_needed(&self, path: &[PathPart]) -> Result<Option<(usize, Lsn)>> {
        for (index, part) in path.iter().enumerate() {
            let on_path =
                |backup: &&BackupInfo| backup.branch == part.branch && backup.stop_lsn <= part.to;
            let backups = self.backups.iter().filter(on_path);
            if let Some(start) = backups.map(|backup| backup.start_lsn).min() {
                return Ok(Some((index, start)));
            }
        }
        for (index, part) in path.iter().enumerate() {
            let ranges = self.catalog.ranges(part.branch, part.from, part.to)?;
            if let Some(first) = ranges.first() {
                return Ok(Some((index, first.start_lsn)));
            }
        }
        Ok(None)
    }

    /// The WAL that is missing on the way to a timeline.
    fn holes_on_path(&self, branch: Branch) -> Result<Vec<(Branch, Lsn, Lsn)>> {
        let path = self.path(branch);
        let has_backup = self.backups.iter().any(|backup| backup.branch == branch);
        // A history file is stored before anything of its timeline is.
        if !has_backup && self.catalog.ranges(branch, Lsn::ZERO, Lsn::MAX)?.is_empty() {
            return Ok(Vec::new());
        }
        let Some((first, start)) = self.first_needed(&path)? else {
            return Ok(Vec::new());
        };
        let mut holes = Vec::new();
        for (index, part) in path.iter().enumerate().skip(first) {
            let begin = if index == first { start } else { part.from };
            let begin = begin.align_down(self.size.bytes());
            let end = match part.to {
                Lsn::MAX => Lsn::MAX,
                to => to.align_down(self.size.bytes()),
            };
            if begin < end {
                let ranges = self.catalog.ranges(part.branch, begin, end)?;
                let missing = gaps(&ranges, begin, end);
                holes.extend(
                    missing
                        .into_iter()
                        .map(|(from, to)| (part.branch, from, to)),
                );
            }
        }
        Ok(holes)
    }

    /// Returns whether a backup on the branch, or on one that continues it, begins at `lsn` or
    /// later.
    fn has_backup_after(&self, branch: Branch, lsn: Lsn) -> bool {
        self.backups.iter().any(|backup| {
            backup.start_lsn >= lsn
                && (backup.branch == branch
                    || self
                        .path(backup.branch)
                        .iter()
                        .any(|part| part.branch == branch))
        })
    }
}

/// The parts of `[from, to)` that no range covers, given ordered ranges; the end of the last one is
/// the end where `to` is [`Lsn::MAX`].
fn gaps(ranges: &[WalRange], from: Lsn, to: Lsn) -> Vec<(Lsn, Lsn)> {
    let mut end = from;
    let mut missing = Vec::new();
    for range in ranges.iter().filter(|range| range.end_lsn > from) {
        if range.start_lsn > end {
            missing.push((end, range.start_lsn));
        }
        end = end.max(range.end_lsn);
    }
    if to != Lsn::MAX && end < to {
        missing.push((end, to));
    }
    missing
}

/// Joins holes that overlap or touch: several paths lead over one timeline.
fn joined(holes: BTreeSet<(Lsn, Lsn)>) -> Vec<(Lsn, Lsn)> {
    let mut joined: Vec<(Lsn, Lsn)> = Vec::new();
    for (from, to) in holes {
        match joined.last_mut() {
            Some(last) if from <= last.1 => last.1 = last.1.max(to),
            _ => joined.push((from, to)),
        }
    }
    joined
}
