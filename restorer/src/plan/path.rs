//! The path of timelines to the wanted one, and the contiguous WAL along it.

pub use repository::PathPart;
use repository::{WalIndex, WalRange};
use wal_format::{Branch, Lsn, TimelineHistory, TimelineId, TransactionEnd, WalEvent};

use super::{PlanError, Wishes, lost};
use crate::{Error, Result, inventory::Inventory};

/// Formats a path for people: the timelines, oldest first.
#[must_use]
pub fn print_path(path: &[PathPart]) -> String {
    let names: Vec<String> = path.iter().map(|part| part.branch.to_string()).collect();
    names.join(" → ")
}

/// Returns the value of `--target-timeline` that names `branch`: its number, or all of its name if
/// another of the archived `timelines` has the same number.
pub(crate) fn timeline_option(
    mut timelines: impl Iterator<Item = Branch>,
    branch: Branch,
) -> String {
    if timelines.any(|other| other.timeline == branch.timeline && other != branch) {
        branch.to_string()
    } else {
        branch.timeline.to_string()
    }
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

/// Returns the timeline that a restore follows by default ([`repository::default_timelines`]).
fn newest(inventory: &dyn Inventory, branches: &[Known]) -> Result<Branch> {
    let backups = inventory.backups()?;
    let matching = repository::default_timelines(&Index(inventory), branches, &backups)?;
    match matching.first() {
        None => Err(PlanError::NoWal.into()),
        Some(first) => one_of(&first.timeline.to_string(), &matching, branches),
    }
}

/// The inventory's WAL, for functions that the restorer shares with the archiver.
pub(crate) struct Index<'a>(pub(crate) &'a dyn Inventory);

impl WalIndex for Index<'_> {
    type Error = Error;

    fn ranges(&self, branch: Branch, from: Lsn, to: Lsn) -> Result<Vec<WalRange>> {
        self.0.ranges(branch, from, to)
    }

    fn transactions(&self, range: &WalRange) -> Result<Vec<TransactionEnd>> {
        Ok(self.0.summary(range)?.transactions)
    }

    fn events(&self, range: &WalRange) -> Result<Vec<(Lsn, WalEvent)>> {
        Ok(self.0.summary(range)?.events)
    }
}

fn path_to(branches: &[Known], wanted: Branch) -> Result<Vec<PathPart>> {
    repository::timeline_path(branches, wanted)
        .ok_or_else(|| Error::usage(format!("timeline branch {wanted} is not archived")))
}

/// The contiguous WAL along a path, starting at an LSN.
#[derive(Clone, Debug)]
pub(crate) struct Coverage {
    pub(crate) start_lsn: Lsn,
    /// The ranges in order; neighbours may overlap.
    pub(crate) ranges: Vec<WalRange>,
    /// The first byte that cannot be replayed. WAL is missing there, or the archive ends there, or
    /// the record there announces `wal_level = minimal`.
    pub(crate) end_lsn: Lsn,
    /// The timeline of `end_lsn`.
    pub(crate) gap_branch: Branch,
    /// True if WAL exists after `end_lsn`: it is a gap and not the end.
    pub(crate) gap: bool,
    /// True if the record at `end_lsn` announces `wal_level = minimal`.
    pub(crate) minimal: bool,
    /// The path, whose switch points decide which records of a range count.
    pub(crate) path: Vec<PathPart>,
}

impl Coverage {
    /// Returns true if a record of `branch` at `lsn` is on the path. The segment that contains a
    /// switch point is archived on both timelines, with equal bytes before it.
    pub(crate) fn holds(&self, branch: Branch, lsn: Lsn) -> bool {
        let part = self.path.iter().find(|part| part.branch == branch);
        lsn >= self.start_lsn && lsn < self.end_lsn && part.is_some_and(|part| lsn < part.to)
    }

    /// Returns the end of the part of a range that counts: the end of the range, or the switch
    /// point if the path leaves its timeline earlier.
    pub(crate) fn end_of(&self, range: &WalRange) -> Lsn {
        let mut parts = self.path.iter();
        let part = parts.find(|part| part.branch == range.branch);
        part.map_or(range.end_lsn, |part| range.end_lsn.min(part.to))
    }
}

/// Follows the path from `start_lsn` until the first gap ([`repository::follow_wal`]).
pub(crate) fn cover(
    inventory: &dyn Inventory,
    path: &[PathPart],
    start_lsn: Lsn,
) -> Result<Coverage> {
    let size = inventory.identity().wal_segment_size.bytes();
    let wal = repository::follow_wal(&Index(inventory), path, start_lsn, size)?;
    // Damaged WAL is a gap: the archive contained WAL beyond it, so it is not the end of the
    // archive.
    let is_damaged = |branch| inventory.damaged_wal_at(branch, wal.end_lsn).is_some();
    let gap = wal.gap || wal.end_branch.is_some_and(is_damaged);
    Ok(Coverage {
        start_lsn,
        ranges: wal.ranges,
        end_lsn: wal.end_lsn,
        gap_branch: wal.end_branch.unwrap_or(Branch::FIRST),
        gap,
        minimal: wal.minimal,
        path: path.to_vec(),
    })
}
