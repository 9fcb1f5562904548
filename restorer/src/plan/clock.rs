//! Whether a backup lies before a target *time*, and whether all backups agree about the stop.
//!
//! PostgreSQL looks at times from the backup's redo on. A backup that is newer than the target would stop at the first
//! commit after itself and keep everything before itself, so it must not be chosen: only WAL and the clock that it holds
//! can tell. If that clock went back, backups stop at different records, and only a person can say which state is wanted.

use wal_format::{BackupInfo, PgTimestamp, TransactionEnd, WalEvent};

use super::{
    Coverage, PathPart, PlanError,
    path::cover,
    stop::{Found, find_stop},
};
use crate::{Result, inventory::Inventory, target::RecoveryTarget};

/// Commits race for their place in the WAL by milliseconds; a time that is more behind means that the clock went back.
const RACE_MICROS: i64 = 1_000_000;

/// Returns true if the target's time lies behind the start of the backup. `found` is the stop of a
/// recovery from it.
pub(super) fn is_before(
    inventory: &dyn Inventory,
    coverage: &Coverage,
    backup: &BackupInfo,
    found: &Found,
    stops: impl Fn(PgTimestamp) -> bool,
) -> Result<bool> {
    let kept = first_kept(inventory, coverage, found)?;
    match greatest_before(inventory, coverage)? {
        // Something before the backup is later than the target. Only a clock that went back excuses that.
        Some(greatest) if stops(greatest) => {
            Ok(kept.is_some_and(|kept| greatest.micros_since(kept.time) > RACE_MICROS))
        }
        None if kept.is_none() => {
            // Nothing was committed in sight. The checkpoint is cut to seconds.
            let checkpoint = checkpoint_time(inventory, coverage, backup)?;
            Ok(checkpoint.is_none_or(|time| !stops(PgTimestamp(time.0.saturating_add(1_000_000)))))
        }
        _ => Ok(true),
    }
}

/// The first transaction end that the recovery replays.
fn first_kept(
    inventory: &dyn Inventory,
    coverage: &Coverage,
    found: &Found,
) -> Result<Option<TransactionEnd>> {
    for range in coverage
        .ranges
        .iter()
        .filter(|range| range.transaction_count > 0)
    {
        let transactions = inventory.summary(range)?.transactions;
        let mut on_path = transactions
            .into_iter()
            .filter(|end| coverage.holds(range.branch, end.lsn));
        if let Some(first) = on_path.next() {
            let replayed = found.position.is_some_and(|position| first.lsn < position);
            return Ok(replayed.then_some(first));
        }
    }
    Ok(None)
}

/// The greatest time of the last archived range before the backup that holds any.
fn greatest_before(inventory: &dyn Inventory, coverage: &Coverage) -> Result<Option<PgTimestamp>> {
    let start = coverage.start_lsn;
    for part in coverage.path.iter().rev().filter(|part| part.from < start) {
        let to = part.to.min(start);
        for range in inventory.ranges(part.branch, part.from, to)?.iter().rev() {
            if range.transaction_count == 0 {
                continue;
            }
            let transactions = inventory.summary(range)?.transactions;
            let before = transactions
                .iter()
                .filter(|end| end.lsn < to)
                .map(|end| end.time);
            if let Some(greatest) = before.max() {
                return Ok(Some(greatest));
            }
        }
    }
    Ok(None)
}

fn checkpoint_time(
    inventory: &dyn Inventory,
    coverage: &Coverage,
    backup: &BackupInfo,
) -> Result<Option<PgTimestamp>> {
    for range in &coverage.ranges {
        if range
            .first_record_lsn
            .is_none_or(|first| first > backup.checkpoint_lsn)
        {
            continue;
        }
        for (lsn, event) in inventory.summary(range)?.events {
            if let WalEvent::Checkpoint { time, .. } = event
                && lsn == backup.checkpoint_lsn
            {
                return Ok(Some(time));
            }
        }
        if range
            .last_record_lsn
            .is_some_and(|last| last >= backup.checkpoint_lsn)
        {
            break;
        }
    }
    Ok(None)
}

/// Refuses a target at which older backups would stop elsewhere.
pub(super) fn unambiguous(
    inventory: &dyn Inventory,
    path: &[PathPart],
    older: &[BackupInfo],
    target: &RecoveryTarget,
    chosen: &BackupInfo,
    found: &Found,
) -> Result<()> {
    for backup in older.iter().rev() {
        let coverage = cover(inventory, path, backup.start_lsn)?;
        if coverage.end_lsn < chosen.start_lsn {
            break;
        }
        let other = find_stop(inventory, &coverage, target)?;
        let stops_earlier = other
            .position
            .is_some_and(|position| position >= backup.stop_lsn);
        if other.stop != found.stop && stops_earlier {
            return Err(PlanError::Ambiguous {
                newer: chosen.id.clone(),
                newer_stop: found.stop,
                older: backup.id.clone(),
                older_stop: other.stop,
            }
            .into());
        }
    }
    Ok(())
}
