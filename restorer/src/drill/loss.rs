//! The real loss of a restore: the newest commit up to the target that the archive knows, compared
//! with the last transaction that the copy has replayed.

use wal_format::{Lsn, PgTimestamp};

use crate::{RecoveryTarget, RestorePlan, Result, Stop, inventory::Archive};

/// The newest commit that a restore should contain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Newest {
    pub(super) time: PgTimestamp,
    pub(super) lsn: Lsn,
}

/// Returns the newest commit up to the target on the plan's timelines that the archive knows, also
/// after missing WAL. `None` if there is none.
///
/// # Errors
/// Errors of reading the catalog.
pub(super) fn newest_known(
    archive: &Archive,
    target: &RecoveryTarget,
    plan: &RestorePlan,
) -> Result<Option<Newest>> {
    if *target != RecoveryTarget::Latest {
        // The plan has proved that no earlier WAL is missing.
        return Ok(plan.last_kept.as_ref().map(|kept| Newest {
            time: kept.time,
            lsn: kept.lsn,
        }));
    }
    let mut ranges = Vec::new();
    for part in plan.path.iter().chain(&plan.later) {
        let on_branch = archive.catalog.ranges(part.branch, Lsn::ZERO, part.to)?;
        ranges.extend(on_branch.into_iter().map(|range| (range, part.to)));
    }
    // The latest time of a range may be that of an abort, so the ranges are read from the newest
    // on, until none can contain a later commit.
    ranges.sort_by_key(|(range, _)| std::cmp::Reverse(range.max_time));
    let mut newest: Option<Newest> = None;
    for (range, to) in &ranges {
        if range.max_time.is_none()
            || newest.is_some_and(|newest| Some(newest.time) >= range.max_time)
        {
            break;
        }
        let ends = archive.catalog.transactions(range)?;
        let commits = ends
            .iter()
            .filter(|end| end.kind.is_commit() && end.lsn < *to);
        for commit in commits {
            if newest.is_none_or(|newest| newest.time < commit.time) {
                newest = Some(Newest {
                    time: commit.time,
                    lsn: commit.lsn,
                });
            }
        }
    }
    Ok(newest)
}

/// Returns the time of the transaction whose end is the stop. PostgreSQL replays it, but its
/// `pg_last_xact_replay_timestamp()` does not include it (`recoveryStopsAfter` in
/// `xlogrecovery.c`). The start has proved that recovery stopped there.
pub(super) fn at_stop(plan: &RestorePlan) -> Option<PgTimestamp> {
    let kept = plan.last_kept.as_ref()?;
    (plan.stop == Stop::After { lsn: kept.lsn }).then_some(kept.time)
}

/// Returns the loss in seconds. `replayed` is the time of the last transaction that was replayed.
/// `None` if it cannot be measured.
pub(super) fn seconds(
    newest: Option<Newest>,
    replayed: Option<PgTimestamp>,
    plan: &RestorePlan,
) -> Option<f64> {
    let Some(newest) = newest else {
        // The archive knows no commit, so none is lost.
        return Some(0.0);
    };
    match replayed {
        Some(replayed) => {
            let seconds = newest.time.micros_since(replayed).max(0) as f64 / 1e6;
            Some(seconds)
        }
        // The backup contains the commit.
        None if newest.lsn < plan.start_lsn => Some(0.0),
        None => None,
    }
}
