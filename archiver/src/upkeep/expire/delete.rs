//! `wal-archiver backup delete ID`: deletes one backup by name.
//!
//! No other object expires with the backup.
//! Invariant: without `--force`, no moment that the retention policy keeps is lost.

use std::time::Duration;

use jiff::Timestamp;
use repository::{
    ClusterIdentity, ExitKind, ExpiredSet, Repository,
    config::{ClusterSettings, RepositoryPlace},
    expire::{ExpirePlan, Holding, mark, plan_delete, plan_expire},
};
use status::outcomes::ended;
use wal_format::{BackupId, ExpiredWindow, OutcomeKind, PgTimestamp};

use super::{TRIES_MAX, catalog, name, with_kept};
use crate::{
    error::{Error, Result},
    upkeep::outcomes,
};

/// The reason in the record of the expiry.
const REASON: &str = "wal-archiver backup delete";

/// The decision for one repository that holds the backup.
pub(crate) struct Deletion {
    /// The repository.
    pub(crate) place: RepositoryPlace,
    /// The moments that can no longer be restored afterwards.
    pub(crate) windows: Vec<ExpiredWindow>,
    /// The reason why the deletion needs `--force`. `None` if it does not.
    pub(crate) objection: Option<String>,
}

/// The result of reading one repository.
struct Found {
    repository: Repository,
    identity: ClusterIdentity,
    expired: ExpiredSet,
    plan: ExpirePlan,
    objection: Option<String>,
}

/// Decides about the backup in each repository of the cluster that holds it. Changes nothing.
///
/// # Errors
/// [`Error::Usage`] if no repository holds the backup; [`Error::Repository`].
pub(crate) fn decide(
    settings: &ClusterSettings,
    id: &BackupId,
    now: Timestamp,
) -> Result<Vec<Deletion>> {
    let mut deletions = Vec::new();
    for place in settings.repository.each() {
        if let Some(found) = find(settings, &place, id, now)? {
            deletions.push(Deletion {
                place,
                windows: found.plan.windows,
                objection: found.objection,
            });
        }
    }
    if deletions.is_empty() {
        return Err(Error::Usage {
            message: format!(
                "{} holds no backup {id} of cluster {}; `pitr-restore list` lists the backups",
                settings.repository, settings.name
            ),
        });
    }
    Ok(deletions)
}

/// Marks the backup as expired in one repository. Returns the time from which its objects are
/// removed. `None` if the repository does not hold the backup any more.
///
/// # Errors
/// [`Error::Expire`] if other processes applied retention there during each attempt, or if the
/// deletion now needs `--force` and `force` is false;
/// [`Error::Repository`].
pub(crate) fn delete(
    settings: &ClusterSettings,
    place: &RepositoryPlace,
    id: &BackupId,
    now: Timestamp,
    force: bool,
) -> Result<Option<PgTimestamp>> {
    for tries in 1..=TRIES_MAX {
        // Another process may have deleted it meanwhile.
        let Some(found) = find(settings, place, id, now)? else {
            return Ok(None);
        };
        if let Some(objection) = found.objection.filter(|_| !force) {
            return Err(Error::Expire {
                problem: format!("backup {id} was not deleted in {}: {objection}", place.url),
                kind: ExitKind::Failed,
            });
        }
        let system = found.identity.system_identifier;
        let record = (name()?, PgTimestamp::from_jiff(now), REASON.to_owned());
        let marked = mark(
            &found.repository,
            system,
            &found.plan,
            &found.expired,
            record,
        )?;
        if marked.is_some() {
            let message = format!("{}: backup {id} was deleted by name", place.url);
            if let Some(mut ended) = ended(OutcomeKind::Delete, now, true, &message) {
                ended.backup = Some(id.clone());
                let name = found.repository.put_outcome(system, &ended)?;
                outcomes::tell_the_daemon(settings, &name);
            }
            let from = now.checked_add(settings.expire_grace).ok();
            return Ok(from.map(PgTimestamp::from_jiff));
        }
        let jitter = u64::from(std::process::id()) % 400;
        std::thread::sleep(Duration::from_millis(tries * (100 + jitter)));
    }
    Err(Error::Expire {
        problem: format!(
            "another process applied retention in {} at the same time in each of {TRIES_MAX} attempts; nothing was \
             changed, run the command again",
            place.url
        ),
        kind: ExitKind::Failed,
    })
}

/// Reads the repository and decides about the backup. Returns `None` if the repository does not
/// hold it.
fn find(
    settings: &ClusterSettings,
    place: &RepositoryPlace,
    id: &BackupId,
    now: Timestamp,
) -> Result<Option<Found>> {
    let repository = Repository::open_known_place(settings, place)?;
    let Some(identity) = repository.identity()? else {
        return Ok(None);
    };
    let catalog = catalog(settings, &identity, &repository)?;
    let expired = repository.expired(identity.system_identifier)?;
    let now = PgTimestamp::from_jiff(now);
    let window = place
        .retention
        .as_ref()
        .map_or(Duration::ZERO, |policy| policy.window);
    let window = i64::try_from(window.as_micros()).unwrap_or(i64::MAX);
    let window_start = PgTimestamp(now.0.saturating_sub(window));
    let holding = Holding::read(
        &repository,
        &identity,
        &catalog,
        (window_start, now),
        &expired,
    )?;
    let Some(plan) = plan_delete(&holding, id) else {
        return Ok(None);
    };
    let is_damaged = plan.removed.iter().any(|backup| backup.problem.is_some());
    let notes = repository.backup_notes(identity.system_identifier)?;
    let is_kept = notes.get(id).is_some_and(|notes| notes.kept.is_some());
    let objection = match &place.retention {
        _ if is_kept => Some(format!(
            "`wal-archiver backup keep` keeps it until `wal-archiver backup release {id}`"
        )),
        _ if is_damaged && plan.windows.is_empty() => None,
        None => Some("no retention is configured, so everything is kept".to_owned()),
        Some(policy) => match plan_expire(
            &holding,
            &with_kept(policy, &notes),
            now,
            settings.backup_max_age,
        ) {
            Err(refusal) => Some(refusal.to_string()),
            Ok(of_policy) => {
                let kept = of_policy.kept.iter().find(|kept| kept.backup.id == *id);
                kept.map(|kept| {
                    let reasons: Vec<String> =
                        kept.reasons.iter().map(ToString::to_string).collect();
                    format!("the retention policy keeps it ({})", reasons.join(", "))
                })
            }
        },
    };
    Ok(Some(Found {
        repository,
        identity,
        expired,
        plan,
        objection,
    }))
}
