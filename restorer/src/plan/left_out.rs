//! Commits up to the target on a timeline that a plan does not follow.
//!
//! At a time at which a timeline was live that was abandoned later, the default timeline lacks its
//! commits. A transaction number may exist on several timelines. The plan names the timeline and
//! the option that restores it, if a plan with that option is accepted.

use serde::{Deserialize, Serialize};
use wal_format::{Branch, Lsn, PgTimestamp, TransactionEnd};

use super::{PlanError, RestorePlan, Stop, Wishes, path::timeline_option, plan_restore};
use crate::{Error, Result, inventory::Inventory, target::RecoveryTarget};

/// A timeline that a plan does not follow up to its target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// The timeline.
    pub branch: Branch,
    /// The value of `--target-timeline` that follows it.
    pub target_timeline: String,
    /// The number of its commits up to the target that the plan leaves out; for a target
    /// transaction, `None`.
    pub commits: Option<u64>,
    /// The last of these commits; for a target transaction, its end on this timeline.
    pub last: TransactionEnd,
}

/// Returns the timelines that a plan for `target` leaves out although they have the newest commit
/// up to the target time, or the target transaction too. Empty if the operator named a timeline.
///
/// # Errors
/// Errors of reading the inventory.
pub fn left_out(
    inventory: &dyn Inventory,
    target: &RecoveryTarget,
    wishes: &Wishes,
    plan: &RestorePlan,
) -> Result<Vec<LeftOut>> {
    if wishes
        .timeline
        .as_deref()
        .is_some_and(|named| named != "latest")
    {
        return Ok(Vec::new());
    }
    let branches = inventory.branches()?;
    let mut found = Vec::new();
    for (branch, ..) in &branches {
        let path = repository::timeline_path(&branches, *branch).unwrap_or_default();
        let Some(own) = path.last() else { continue };
        // The plan has this timeline's WAL up to the switch to its next one.
        let mut parts = plan.path.iter().chain(&plan.later);
        let followed = parts.find(|part| part.branch == *branch);
        let from = followed.map_or(own.from, |part| part.to);
        let ends = match target {
            RecoveryTarget::Time {
                time, inclusive, ..
            } => {
                let is_kept = |at: PgTimestamp| at < *time || (*inclusive && at == *time);
                let newest = plan.last_kept.as_ref().map(|kept| kept.time);
                commits(inventory, *branch, from, newest, is_kept)?
            }
            RecoveryTarget::Xid { .. } => {
                let ranges = inventory.ranges(*branch, from, Lsn::MAX)?;
                if ranges.iter().all(|range| range.transaction_count == 0) {
                    continue;
                }
                None
            }
            _ => return Ok(Vec::new()),
        };
        let is_xid = matches!(target, RecoveryTarget::Xid { .. });
        if ends.is_none() && !is_xid || from == Lsn::MAX {
            continue;
        }
        let target_timeline = timeline_option(branches.iter().map(|one| one.0), *branch);
        let other = Wishes {
            backup: wishes.backup.clone(),
            timeline: Some(target_timeline.clone()),
        };
        let other = match plan_restore(inventory, target, &other) {
            Ok(other) => other,
            Err(Error::Plan(_) | Error::Usage { .. }) => continue,
            Err(error) => return Err(error),
        };
        let (last, commits) = match ends {
            Some((count, last)) => (last, Some(count)),
            None => {
                let (Stop::Before { lsn } | Stop::After { lsn }) = other.stop else {
                    continue;
                };
                let mut ends = other.last_kept.into_iter().chain(other.first_dropped);
                match ends.find(|end| end.lsn == lsn) {
                    Some(end) => (end, None),
                    None => continue,
                }
            }
        };
        let on_branch = other.path.last().is_some_and(|part| part.branch == *branch);
        if on_branch && last.lsn >= from {
            found.push(LeftOut {
                branch: *branch,
                target_timeline,
                commits,
                last,
            });
        }
    }
    Ok(found)
}

/// Adds to the refusal of a target transaction or a restore point the timelines that have it, with
/// the options that reach it. Other errors stay as they are.
///
/// # Errors
/// Errors of reading the inventory.
pub fn name_elsewhere(
    inventory: &dyn Inventory,
    target: &RecoveryTarget,
    wishes: &Wishes,
    mut error: Error,
) -> Result<Error> {
    let Error::Plan(PlanError::Unknown { elsewhere, .. }) = &mut error else {
        return Ok(error);
    };
    let branches = inventory.branches()?;
    for (branch, ..) in &branches {
        let option = timeline_option(branches.iter().map(|one| one.0), *branch);
        let other = Wishes {
            backup: wishes.backup.clone(),
            timeline: Some(option.clone()),
        };
        let plan = match plan_restore(inventory, target, &other) {
            Ok(plan) => plan,
            Err(Error::Plan(_) | Error::Usage { .. }) => continue,
            Err(error) => return Err(error),
        };
        // A later timeline leads to the same record.
        if plan.path.last().is_some_and(|part| part.branch == *branch) {
            elsewhere.push((*branch, option));
        }
    }
    Ok(error)
}

/// Returns the number of the commits of a timeline at or after `from` for whose time `is_kept` is
/// true, and the last of them; `None` if none is newer than `newest`.
fn commits(
    inventory: &dyn Inventory,
    branch: Branch,
    from: Lsn,
    newest: Option<PgTimestamp>,
    is_kept: impl Fn(PgTimestamp) -> bool,
) -> Result<Option<(u64, TransactionEnd)>> {
    let ranges = inventory.ranges(branch, from, Lsn::MAX)?;
    let is_newer = |at: PgTimestamp| newest.is_none_or(|newest| at > newest);
    // The summaries are read only if a range may contain a newer commit up to the target.
    let may_have = ranges
        .iter()
        .any(|range| range.min_time.is_some_and(&is_kept) && range.max_time.is_some_and(is_newer));
    if !may_have {
        return Ok(None);
    }
    let (mut count, mut last) = (0, None::<TransactionEnd>);
    let mut next = from;
    for range in ranges {
        if range.transaction_count == 0 || !range.min_time.is_some_and(&is_kept) {
            continue;
        }
        for end in inventory.summary(&range)?.transactions {
            // Neighbouring ranges may overlap.
            if end.lsn >= next && end.kind.is_commit() && is_kept(end.time) {
                count += 1;
                next = end.lsn.add(1);
                last = Some(end);
            }
        }
    }
    Ok(last
        .filter(|last| is_newer(last.time))
        .map(|last| (count, last)))
}
