//! WAL that a server wrote with `wal_level = minimal` between the backup and the target.
//!
//! Such WAL lacks changes, and its records do not show it. PostgreSQL 13 replays it with a warning
//! and loses the rows; later versions stop there (`CheckRequiredParameterValues` in
//! `xlogrecovery.c`). So a plan never crosses the record that announces `minimal`.

use wal_format::{BackupInfo, PgTimestamp, TransactionEnd, WalEvent};

use super::{Coverage, PlanError};
use crate::{Result, inventory::Inventory};

/// Returns the refusal of a target after the end of `coverage`, which is a record that announces
/// `wal_level = minimal`. `last_commit` is the time of the last commit before it.
pub(super) fn refusal(
    inventory: &dyn Inventory,
    coverage: &Coverage,
    last_commit: Option<PgTimestamp>,
) -> Result<PlanError> {
    let lsn = coverage.end_lsn;
    let mut target = format!("--target-lsn {lsn} --target-exclusive");
    if let Some(time) = last_commit {
        target.push_str(&format!(" (last commit {time})"));
    }
    Ok(PlanError::MinimalWal {
        branch: coverage.gap_branch,
        lsn,
        since: last_checkpoint(inventory, coverage)?.max(last_commit),
        nearest: vec![target],
    })
}

/// Adds the first backup after the WAL of `error` to its nearest targets. `backups` are those on
/// the path, in the order of the WAL.
pub(super) fn name_next_backup(error: PlanError, backups: &[BackupInfo]) -> PlanError {
    let PlanError::MinimalWal {
        branch,
        lsn,
        since,
        mut nearest,
    } = error
    else {
        return error;
    };
    let next = backups.iter().find(|backup| backup.start_lsn > lsn);
    nearest.extend(next.map(|backup| {
        let (id, finished) = (&backup.id, backup.finished);
        format!("--backup {id} --target-immediate ({finished})")
    }));
    PlanError::MinimalWal {
        branch,
        lsn,
        since,
        nearest,
    }
}

/// Formats the nearest reachable targets for an error message. If no target after the WAL is
/// reachable, adds the remedy.
pub(super) fn print_nearest(targets: &[String]) -> String {
    match targets {
        [before] => format!(
            "the nearest reachable target is {before}; take a base backup with `wal-archiver backup`, from which later \
             targets are reachable"
        ),
        several => format!(
            "the nearest reachable targets are {}",
            several.join(" and ")
        ),
    }
}

/// Returns the time of the last checkpoint before the end of `coverage`. A server whose `wal_level`
/// changes was shut down or has recovered from a crash, so there is a checkpoint.
pub(super) fn last_checkpoint(
    inventory: &dyn Inventory,
    coverage: &Coverage,
) -> Result<Option<PgTimestamp>> {
    for range in coverage.ranges.iter().rev() {
        let events = inventory.summary(range)?.events.into_iter().rev();
        let mut on_path = events.filter(|(lsn, _)| coverage.holds(range.branch, *lsn));
        let found = on_path.find_map(|(_, event)| match event {
            WalEvent::Checkpoint { time, .. } => Some(time),
            _ => None,
        });
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

/// Returns the first transaction after the end of `coverage` on its path that satisfies `is_it`.
pub(super) fn find_after(
    inventory: &dyn Inventory,
    coverage: &Coverage,
    is_it: impl Fn(&TransactionEnd) -> bool,
) -> Result<Option<TransactionEnd>> {
    for part in &coverage.path {
        let from = part.from.max(coverage.end_lsn);
        if from >= part.to {
            continue;
        }
        for range in inventory.ranges(part.branch, from, part.to)? {
            if range.transaction_count == 0 {
                continue;
            }
            let mut ends = inventory.summary(&range)?.transactions.into_iter();
            let found = ends.find(|end| end.lsn >= from && end.lsn < part.to && is_it(end));
            if found.is_some() {
                return Ok(found);
            }
        }
    }
    Ok(None)
}
