//! Timelines whose history file is lost: a plan that one of them could change is refused.
//!
//! Without the file the path to the timeline is unknown, and a plan that leaves it out would end
//! earlier than the archive. Invariant: a plan that cannot depend on a lost timeline is not
//! refused.

use repository::LostHistory;
use wal_format::{Branch, TimelineId};

use super::PathPart;
use crate::{Error, Result, inventory::Inventory};

fn refusal(inventory: &dyn Inventory, lost: &LostHistory) -> Error {
    let system = inventory.identity().system_identifier;
    Error::Damaged {
        object: lost.key(system).to_string(),
        problem: format!("{lost}. --target-timeline chooses a timeline that does not need it"),
    }
}

/// Refuses a restore that ends in a promotion if PostgreSQL would ask for a lost history file: to
/// choose the number of the new timeline, it asks for the file of each number above the recovered
/// one until one is absent (`findNewestTimeLine` in `timeline.c`), and ends if it gets no answer.
pub(crate) fn refuse_promotion(inventory: &dyn Inventory, path: &[PathPart]) -> Result<()> {
    let Some(last) = path.last() else {
        return Ok(());
    };
    let branches = inventory.branches()?;
    let is_known = |number| {
        let mut branches = branches.iter();
        branches.any(|(branch, ..)| branch.timeline.get() == number)
    };
    let lost_of = |number| {
        let mut lost = inventory.lost_histories().iter();
        lost.find(|lost| lost.branch.timeline.get() == number)
    };
    let mut number = last.branch.timeline.get();
    loop {
        number = number.saturating_add(1);
        if let Some(lost) = lost_of(number) {
            let system = inventory.identity().system_identifier;
            return Err(Error::Damaged {
                object: lost.key(system).to_string(),
                problem: format!(
                    "{lost}. A promotion asks for it to choose its timeline. A copy with --target-action pause, which is \
                     only read, does not need it"
                ),
            });
        }
        if !is_known(number) {
            return Ok(());
        }
    }
}

fn refuse(inventory: &dyn Inventory, concerns: impl Fn(&LostHistory) -> bool) -> Result<()> {
    let lost = inventory
        .lost_histories()
        .iter()
        .find(|lost| concerns(lost));
    lost.map_or(Ok(()), |lost| Err(refusal(inventory, lost)))
}

/// Refuses a lost timeline that the operator named by its number or its branch.
pub(super) fn refuse_named(inventory: &dyn Inventory, text: &str) -> Result<()> {
    let number: Option<TimelineId> = text.parse().ok().and_then(TimelineId::new);
    refuse(inventory, |lost| {
        Some(lost.branch.timeline) == number || lost.branch.to_string() == text
    })
}

/// Refuses to choose a timeline while the newest backup is on a lost one: the newest timeline is
/// the one that continues it.
pub(super) fn refuse_newest(inventory: &dyn Inventory) -> Result<()> {
    let backups = inventory.backups()?;
    let newest = backups.iter().max_by_key(|backup| backup.started);
    refuse(inventory, |lost| {
        newest.is_some_and(|newest| newest.branch == lost.branch)
    })
}

/// Refuses to take `chosen` for the newest timeline when a lost one may be newer.
pub(super) fn refuse_newer(inventory: &dyn Inventory, chosen: Branch) -> Result<()> {
    refuse(inventory, |lost| lost.branch.timeline >= chosen.timeline)
}

/// Refuses a path that crosses a lost timeline: its WAL is stored under a name that only the
/// history file gives.
pub(super) fn refuse_path(inventory: &dyn Inventory, path: &[PathPart]) -> Result<()> {
    refuse(inventory, |lost| {
        let unknown = Branch::without_history(lost.branch.timeline);
        path.iter()
            .any(|part| part.branch == unknown || part.branch == lost.branch)
    })
}
