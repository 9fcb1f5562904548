//! Checks the copies of every epoch's file, and that every system identifier with sealed WAL has an
//! epoch.

use repository::{ClusterIdentity, Epoch, EpochCopy, Error as StoreError, Repository};
use wal_format::{ObjectKey, checked_json};

use super::{Problem, repair};
use crate::error::{Error, Result};

/// The problems of a place's epochs.
///
/// # Errors
/// [`Error::Usage`] when the place is another cluster's than `identity`; what reading it met.
pub(super) fn problems(place: &Repository, identity: &ClusterIdentity) -> Result<Vec<Problem>> {
    let mut problems = Vec::new();
    let epochs = match place.read_epochs() {
        Ok(epochs) => epochs,
        Err(StoreError::Damaged { key, problem, .. }) => {
            problems.push(Problem {
                key: repair::key_of(place, &key),
                what: problem,
            });
            return Ok(problems);
        }
        Err(error) => return Err(error.into()),
    };
    if let Some(newest) = epochs.known.last().map(|newest| &newest.identity)
        && newest.system_identifier != identity.system_identifier
    {
        return Err(Error::Usage {
            message: format!(
                "{} holds system identifier {}, another repository of the cluster {}",
                place.url(),
                newest.system_identifier,
                identity.system_identifier
            ),
        });
    }
    for epoch in &epochs.known {
        for (key, listed) in Epoch::keys(epoch.number).iter().zip(&epoch.copies) {
            if let Some(what) = copy_problem(place, epoch, key, listed)? {
                problems.push(Problem::of(key, what));
            }
        }
    }
    for number in epochs.lost {
        for key in Epoch::keys(number) {
            let what = "it cannot be read, and no sealed object tells what it said";
            problems.push(Problem::of(&key, what));
        }
    }
    for unnamed in epochs.unnamed {
        let system = unnamed.system_identifier;
        problems.push(Problem::general(format!(
            "{system}/: sealed WAL of PostgreSQL {} with this system identifier is here, and no epoch names it: an \
             epoch's file is lost in both copies, or the objects are another cluster's. `pitr-restore --system {system}` \
             restores it; `wal-archiver epoch begin --system-identifier {system}` writes the epoch again",
            unnamed.postgresql_major
        )));
    }
    Ok(problems)
}

/// The problem of one copy, if it has one.
fn copy_problem(
    place: &Repository,
    epoch: &Epoch,
    key: &ObjectKey,
    listed: &EpochCopy,
) -> Result<Option<String>> {
    let lost = |state: &str| {
        let rest = if epoch.is_derived() {
            "neither of its two copies can be used. The identity is derived from sealed objects"
        } else {
            "the other one of its two copies is intact"
        };
        format!("it {state}; {rest}. `wal-archiver verify --repair` writes it again")
    };
    let body = match place.get(key) {
        Ok(body) => body,
        Err(StoreError::NotFound { .. }) if *listed == EpochCopy::Missing => {
            return Ok(Some(lost("is missing")));
        }
        Err(StoreError::NotFound { .. }) => {
            return Ok(Some(lost("is listed, and the store does not have it")));
        }
        Err(StoreError::Damaged { problem, .. }) => {
            return Ok(Some(lost(&format!("is damaged ({problem})"))));
        }
        Err(error) => return Err(error.into()),
    };
    Ok(match checked_json::from_slice::<ClusterIdentity>(&body) {
        Err(error) => Some(lost(&format!("is damaged ({error})"))),
        Ok(found) if found != epoch.identity && !epoch.is_derived() => {
            Some("it says something else than the first copy".to_owned())
        }
        Ok(_) if *listed == EpochCopy::Missing => Some(
            "it can be read, but the store's listing does not show it, so the listing is not complete"
                .to_owned(),
        ),
        Ok(_) => None,
    })
}
