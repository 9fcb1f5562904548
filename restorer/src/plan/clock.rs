//! Checks whether a backup lies before a target *time*, and whether all backups give the same stop.
//!
//! PostgreSQL compares times from the backup's redo LSN on. With a backup that is newer than the
//! target, recovery would stop at the first commit after the backup and keep everything before it,
//! so such a backup must not be chosen. Only times in the WAL show which backup is newer. If the
//! server's clock went back, backups lead to different stops, and only the operator can decide
//! which state is wanted.

use wal_format::{BackupInfo, PgTimestamp, TransactionEnd, WalEvent};

use super::{
    Coverage, PathPart, PlanError,
    path::cover,
    stop::{Found, find_stop},
};
use crate::{Result, inventory::Inventory, target::RecoveryTarget};

/// Commit timestamps in WAL order may go back by milliseconds, because concurrent commits race for
/// their place. A larger step back means that the server's clock was set back.
const RACE_MICROS: i64 = 1_000_000;

/// Returns true if the backup starts before the target time. `found` is the stop of a recovery from
/// this backup.
pub(super) fn is_before(
    inventory: &dyn Inventory,
    coverage: &Coverage,
    backup: &BackupInfo,
    found: &Found,
    stops: impl Fn(PgTimestamp) -> bool,
) -> Result<bool> {
    let kept = first_kept(inventory, coverage, found)?;
    match greatest_before(inventory, coverage)? {
        // A transaction before the backup is later than the target. The backup still lies before
        // the target if the clock was set back between that transaction and the first one that is
        // replayed.
        Some(greatest) if stops(greatest) => {
            Ok(kept.is_some_and(|kept| greatest.micros_since(kept.time) > RACE_MICROS))
        }
        None if kept.is_none() => {
            // No commit is known before the stop. Use the checkpoint's time, which is truncated to
            // seconds.
            let checkpoint = checkpoint_time(inventory, coverage, backup)?;
            Ok(checkpoint.is_none_or(|time| !stops(PgTimestamp(time.0.saturating_add(1_000_000)))))
        }
        _ => Ok(true),
    }
}

/// Returns the first transaction end that recovery from the backup replays; `None` if it replays
/// none.
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

/// Returns the latest time in the last archived range before the backup that contains any
/// transactions. Returns `None` if there is no such range, or if WAL is missing after it, because
/// that WAL may contain a later time.
fn greatest_before(inventory: &dyn Inventory, coverage: &Coverage) -> Result<Option<PgTimestamp>> {
    let start = coverage.start_lsn;
    let mut held_from = start;
    for part in coverage.path.iter().rev().filter(|part| part.from < start) {
        let to = part.to.min(start);
        for range in inventory.ranges(part.branch, part.from, to)?.iter().rev() {
            if range.end_lsn < held_from.min(to) {
                return Ok(None);
            }
            held_from = range.start_lsn;
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

/// Refuses a target for which an older backup gives another stop.
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
