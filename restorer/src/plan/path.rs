//! The path of timelines to the wanted one, and the WAL that covers it.

pub use repository::PathPart;
use repository::WalRange;
use wal_format::{
    BackupInfo, Branch, Lsn, PgTimestamp, TimelineHistory, TimelineId, TransactionEnd,
};

use super::{PlanError, Wishes, lost};
use crate::{Error, Result, inventory::Inventory};

/// Formats a path for people: the timelines, oldest first.
#[must_use]
pub fn print_path(path: &[PathPart]) -> String {
    let names: Vec<String> = path.iter().map(|part| part.branch.to_string()).collect();
    names.join(" → ")
}

type Known = (Branch, Option<TimelineHistory>, Vec<u8>);

/// Returns the path to the wanted timeline, or to the newest one (`newest`) if none is named.
///
/// # Errors
/// [`PlanError::UnknownTimeline`], [`Error::Usage`] if the number names two timelines.
pub fn timeline_path(inventory: &dyn Inventory, wishes: &Wishes) -> Result<Vec<PathPart>> {
    let branches = inventory.branches()?;
    let wanted = match &wishes.timeline {
        Some(text) if text != "latest" => {
            lost::refuse_named(inventory, text)?;
            named(&branches, text)?
        }
        _ => {
            lost::refuse_newest(inventory)?;
            let newest = newest(inventory, &branches)?;
            lost::refuse_newer(inventory, newest)?;
            newest
        }
    };
    let path = path_to(&branches, wanted)?;
    lost::refuse_path(inventory, &path)?;
    Ok(path)
}

fn named(branches: &[Known], text: &str) -> Result<Branch> {
    let by_number: Option<TimelineId> = text.parse().ok().and_then(TimelineId::new);
    let matching: Vec<Branch> = branches
        .iter()
        .map(|(branch, _, _)| *branch)
        .filter(|branch| Some(branch.timeline) == by_number || branch.to_string() == text)
        .collect();
    one_of(text, &matching, branches)
}

fn one_of(text: &str, matching: &[Branch], known: &[Known]) -> Result<Branch> {
    match matching {
        [branch] => Ok(*branch),
        [] => {
            let known: Vec<String> = known
                .iter()
                .map(|(branch, _, _)| branch.to_string())
                .collect();
            Err(PlanError::UnknownTimeline {
                wanted: text.to_owned(),
                known: known.join(", "),
            }
            .into())
        }
        several => {
            let names: Vec<String> = several.iter().map(ToString::to_string).collect();
            let names = names.join(", ");
            Err(Error::usage(format!(
                "timeline {text} names several histories; choose with --target-timeline: {names}"
            )))
        }
    }
}

/// The timeline that a restore without a wish follows: the greatest number among those to which a
/// backup leads and that continue the newest backup's timeline or are newer than that backup.
///
/// A timeline that is older than the newest backup and does not continue its timeline was
/// abandoned, or is a copy that was archived here by mistake. A timeline that is newer is where the
/// cluster went on: after a restore to a moment before a failover, that is no descendant of the
/// timeline that was given up.
fn newest(inventory: &dyn Inventory, branches: &[Known]) -> Result<Branch> {
    let mut backups = inventory.backups()?;
    backups.retain(|backup| branches.iter().any(|(known, _, _)| *known == backup.branch));
    let newest_backup = backups.iter().max_by_key(|backup| backup.started);
    let mut candidates: Vec<Branch> = Vec::new();
    for (branch, _, _) in branches {
        let path = path_to(branches, *branch)?;
        let part_of = |backup: &BackupInfo| path.iter().find(|part| part.branch == backup.branch);
        let follows = match newest_backup {
            None => true,
            Some(newest) if part_of(newest).is_some() => true,
            Some(newest) => {
                let leads_here = |backup: &BackupInfo| {
                    part_of(backup).is_some_and(|part| backup.stop_lsn <= part.to)
                };
                let mut backups = backups.iter();
                backups.any(leads_here)
                    && began(inventory, &path)?.is_some_and(|began| began > newest.finished)
            }
        };
        if follows {
            candidates.push(*branch);
        }
    }
    let Some(greatest) = candidates.iter().map(|branch| branch.timeline).max() else {
        return Err(PlanError::NoWal.into());
    };
    let matching: Vec<Branch> = candidates
        .into_iter()
        .filter(|branch| branch.timeline == greatest)
        .collect();
    one_of(&greatest.to_string(), &matching, branches)
}

/// The first known time on the last timeline of a path; `None` if its archived WAL says nothing of
/// the time.
fn began(inventory: &dyn Inventory, path: &[PathPart]) -> Result<Option<PgTimestamp>> {
    let Some(part) = path.last() else {
        return Ok(None);
    };
    for range in inventory.ranges(part.branch, part.from, part.to)? {
        let own = |end: &TransactionEnd| end.lsn >= part.from;
        let first = if range.start_lsn >= part.from || range.transaction_count == 0 {
            range.min_time
        } else {
            // The segment of the switch begins with WAL of the timeline before.
            let ends = inventory.summary(&range)?.transactions;
            ends.iter().filter(|end| own(end)).map(|end| end.time).min()
        };
        if let Some(time) = first.or(range.proven) {
            return Ok(Some(time));
        }
    }
    Ok(None)
}

fn path_to(branches: &[Known], wanted: Branch) -> Result<Vec<PathPart>> {
    repository::timeline_path(branches, wanted)
        .ok_or_else(|| Error::usage(format!("timeline branch {wanted} is not archived")))
}

/// The WAL along a path from one LSN on.
#[derive(Clone, Debug)]
pub(crate) struct Coverage {
    pub(crate) start_lsn: Lsn,
    /// The ranges in order; neighbours may overlap.
    pub(crate) ranges: Vec<WalRange>,
    /// The first byte that is missing, or the end of the archive.
    pub(crate) end_lsn: Lsn,
    /// The timeline of `end_lsn`.
    pub(crate) gap_branch: Branch,
    /// True if WAL exists after the first missing byte: it is a gap and not the end.
    pub(crate) gap: bool,
    /// The path, whose switch points decide which records of a range count.
    pub(crate) path: Vec<PathPart>,
}

impl Coverage {
    /// Returns true if a record of `branch` at `lsn` is on the path. The segment that holds a
    /// switch point is archived on both timelines, with equal bytes before it.
    pub(crate) fn holds(&self, branch: Branch, lsn: Lsn) -> bool {
        let part = self.path.iter().find(|part| part.branch == branch);
        lsn >= self.start_lsn && lsn < self.end_lsn && part.is_some_and(|part| lsn < part.to)
    }

    /// The end of what counts of a range: where the range ends, or where the path leaves its
    /// timeline before.
    pub(crate) fn end_of(&self, range: &WalRange) -> Lsn {
        let mut parts = self.path.iter();
        let part = parts.find(|part| part.branch == range.branch);
        part.map_or(range.end_lsn, |part| range.end_lsn.min(part.to))
    }
}

/// Walks the path from `start_lsn` to the first gap in the archived WAL, or to its end.
pub(crate) fn cover(
    inventory: &dyn Inventory,
    path: &[PathPart],
    start_lsn: Lsn,
) -> Result<Coverage> {
    let size = inventory.identity().wal_segment_size.bytes();
    let mut ranges = Vec::new();
    let mut end_lsn = start_lsn;
    let (mut gap, mut gap_branch) = (false, path.last().map_or(Branch::FIRST, |part| part.branch));
    for part in path.iter().filter(|part| part.to > start_lsn) {
        // PostgreSQL reads the segment of a switch point from the later timeline, which holds a
        // copy of the WAL before it.
        let from = part.from.align_down(size).max(start_lsn.align_down(size));
        if from > end_lsn {
            gap = true;
            break;
        }
        gap_branch = part.branch;
        for range in inventory.ranges(part.branch, from, part.to)? {
            if range.start_lsn > end_lsn {
                gap = true;
                break;
            }
            end_lsn = end_lsn.max(range.end_lsn.min(part.to));
            ranges.push(range);
        }
        if gap && part.to == Lsn::MAX {
            break;
        }
        gap = false;
    }
    Ok(Coverage {
        start_lsn,
        ranges,
        end_lsn,
        gap_branch,
        gap,
        path: path.to_vec(),
    })
}
