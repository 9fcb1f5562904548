//! The path of timelines to the wanted one, and the WAL that covers it.

pub use repository::PathPart;
use repository::WalRange;
use wal_format::{Branch, Lsn, TimelineHistory, TimelineId};

use super::{PlanError, Wishes};
use crate::{Error, Result, inventory::Inventory};

/// The path as a person reads it.
#[must_use]
pub fn print_path(path: &[PathPart]) -> String {
    let names: Vec<String> = path.iter().map(|part| part.branch.to_string()).collect();
    names.join(" → ")
}

type Known = (Branch, Option<TimelineHistory>, Vec<u8>);

/// The path to the wanted timeline; without a wish, to the newest that descends from the newest backup's.
///
/// # Errors
/// [`PlanError::UnknownTimeline`], [`Error::Usage`] when the number names two timelines.
pub fn timeline_path(inventory: &dyn Inventory, wishes: &Wishes) -> Result<Vec<PathPart>> {
    let branches = inventory.branches()?;
    let wanted = match &wishes.timeline {
        Some(text) if text != "latest" => named(&branches, text)?,
        _ => newest(inventory, &branches)?,
    };
    path_to(&branches, wanted)
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

fn newest(inventory: &dyn Inventory, branches: &[Known]) -> Result<Branch> {
    let backups = inventory.backups()?;
    let from = backups
        .iter()
        .filter(|backup| wishes_none(backup.branch, branches))
        .max_by_key(|backup| backup.started)
        .map(|backup| backup.branch);
    // Timelines that do not descend from a backup's lead nowhere.
    let reachable = |branch: &Branch| {
        let Some(from) = from else { return true };
        path_to(branches, *branch).is_ok_and(|path| path.iter().any(|part| part.branch == from))
    };
    let candidates: Vec<Branch> = branches
        .iter()
        .map(|(branch, _, _)| *branch)
        .filter(reachable)
        .collect();
    let Some(greatest) = candidates.iter().map(|branch| branch.timeline).max() else {
        return Err(PlanError::NoWal.into());
    };
    let matching: Vec<Branch> = candidates
        .into_iter()
        .filter(|branch| branch.timeline == greatest)
        .collect();
    one_of(&greatest.to_string(), &matching, branches)
}

fn wishes_none(branch: Branch, branches: &[Known]) -> bool {
    branches.iter().any(|(known, _, _)| *known == branch)
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
    /// Where that is.
    pub(crate) gap_branch: Branch,
    /// Whether WAL exists behind the first missing byte: then it is a gap and not the end.
    pub(crate) gap: bool,
    /// The path's switch points: which records of a range count is decided by them.
    pub(crate) path: Vec<PathPart>,
}

impl Coverage {
    /// Whether a record of `branch` at `lsn` is on the path. The segment that holds a switch point is archived on both
    /// timelines, with equal bytes before it.
    pub(crate) fn holds(&self, branch: Branch, lsn: Lsn) -> bool {
        let part = self.path.iter().find(|part| part.branch == branch);
        lsn >= self.start_lsn && lsn < self.end_lsn && part.is_some_and(|part| lsn < part.to)
    }
}

/// Walks the path from `start_lsn` as far as WAL is held without a gap.
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
        // PostgreSQL reads the segment of a switch point from the later timeline, which holds a copy of what is before.
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
