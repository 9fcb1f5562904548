//! Computes what can be restored: how far WAL leads from a backup along a path of timelines.
//!
//! The rule is the restorer's (`plan/path.rs`): the segment that contains a switch is read from the
//! later timeline.

use std::collections::BTreeMap;

use wal_format::{Branch, Lsn};

use super::{HeldBackup, HeldBranch, Holding, Intervals};

/// Stored WAL by branch.
pub(super) type Wal = BTreeMap<Branch, Intervals>;

/// Returns all WAL of a holding.
pub(super) fn held(holding: &Holding) -> Wal {
    let spans = |branch: &HeldBranch| (branch.branch, branch.wal.clone());
    holding.branches.iter().map(spans).collect()
}

/// Returns true if a backup can be made consistent on this path.
pub(super) fn is_on(branch: &HeldBranch, backup: &HeldBackup) -> bool {
    let mut parts = branch.path.iter();
    parts.any(|part| part.branch == backup.branch && backup.stop_lsn <= part.to)
}

/// Returns the end of the WAL that leads from `backup` along the path to `branch` without a gap.
pub(super) fn end_along(branch: &HeldBranch, backup: &HeldBackup, wal: &Wal, segment: u64) -> Lsn {
    let start = backup.start_lsn;
    let mut end = start;
    for part in branch.path.iter().filter(|part| part.to > start) {
        let from = part.from.max(start).align_down(segment);
        if from > end {
            break;
        }
        if let Some(held) = wal.get(&part.branch) {
            end = end.max(held.end_from(from).min(part.to));
        }
    }
    end
}

/// Returns the end of the WAL of `branch` itself that is reached from `backup` without a gap, or
/// `None` if it is not reached.
pub(super) fn end_on(
    branch: &HeldBranch,
    backup: &HeldBackup,
    wal: &Wal,
    segment: u64,
) -> Option<Lsn> {
    let mut at = backup.start_lsn.align_down(segment);
    for part in branch.path.iter().filter(|part| part.to > backup.start_lsn) {
        let from = part.from.align_down(segment).max(at);
        let end = |wal: &Wal| {
            wal.get(&part.branch)
                .map_or(from, |held| held.end_from(from))
        };
        if part.branch == branch.branch {
            return Some(end(wal)).filter(|end| *end > from);
        }
        let until = part.to.align_down(segment);
        if from < until && end(wal) < until {
            return None;
        }
        at = at.max(until);
    }
    None
}

/// Returns the WAL of `branch` itself at which recovery can stop, starting from these backups.
pub(super) fn restorable<'a>(
    branch: &HeldBranch,
    backups: impl Iterator<Item = &'a HeldBackup>,
    wal: &Wal,
    segment: u64,
) -> Intervals {
    let begin = branch.path.last().map_or(Lsn::ZERO, |part| part.from);
    let mut all = Intervals::default();
    for backup in backups.filter(|backup| is_on(branch, backup)) {
        let Some(end) = end_on(branch, backup, wal, segment) else {
            continue;
        };
        let from = if backup.branch == branch.branch {
            backup.stop_lsn
        } else {
            begin
        };
        all.add(from, end);
    }
    all
}
