//! `wal-archiver expire --undo`: undoes the expiries that are younger than `expire_grace`.

use jiff::Timestamp;
use repository::{
    Repository,
    config::{ClusterSettings, RepositoryPlace},
    expire::{Undone, undo},
};
use serde::Serialize;
use status::outcomes::ended;
use wal_format::{BackupId, Expired, OutcomeKind, PgTimestamp, SystemIdentifier};

use crate::{error::Result, upkeep::outcomes};

/// The result for one repository.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct UndoReport {
    /// The repository.
    pub(crate) repository: String,
    /// The backups whose expiry was undone.
    pub(crate) backups: Vec<BackupId>,
    /// The number of ranges of WAL whose expiry was undone.
    pub(crate) wal_ranges: usize,
    /// The times of the expiries that were undone.
    pub(crate) undone: Vec<PgTimestamp>,
    /// The times of the expiries whose objects may already be removed.
    pub(crate) too_late: Vec<PgTimestamp>,
}

/// Undoes the expiries that are younger than `expire_grace` in each repository of a cluster.
///
/// # Errors
/// [`Error::Repository`](crate::error::Error::Repository).
pub(crate) fn undo_all(
    settings: &ClusterSettings,
    system: Option<SystemIdentifier>,
    now: Timestamp,
) -> Result<Vec<UndoReport>> {
    let places = settings.repository.each();
    let one = |place: &RepositoryPlace| undo_here(settings, place, system, now);
    places.iter().map(one).collect()
}

fn undo_here(
    settings: &ClusterSettings,
    place: &RepositoryPlace,
    system: Option<SystemIdentifier>,
    now: Timestamp,
) -> Result<UndoReport> {
    let mut repository = Repository::open_known_place(settings, place)?;
    if let Some(system) = system {
        repository = repository.of_system(system)?;
    }
    let mut undone = Undone::default();
    if let Some(identity) = repository.identity()? {
        let system = identity.system_identifier;
        let expired = repository.expired(system)?;
        let at = PgTimestamp::from_jiff(now);
        undone = undo(&repository, system, &expired, settings.expire_grace, at)?;
        if !undone.withdrawn.is_empty() {
            record(settings, &repository, system, now, undone.withdrawn.len())?;
        }
    }
    let marked = |records: &[Expired]| records.iter().map(|one| one.marked).collect();
    let withdrawn = &undone.withdrawn;
    let backups = withdrawn.iter().flat_map(|one| &one.backups);
    Ok(UndoReport {
        repository: place.to_string(),
        backups: backups.map(|backup| backup.id.clone()).collect(),
        wal_ranges: withdrawn.iter().map(|one| one.wal.len()).sum(),
        undone: marked(withdrawn),
        too_late: marked(&undone.late),
    })
}

/// Records the change for the dashboard. This also makes the daemon read the repository again.
fn record(
    settings: &ClusterSettings,
    repository: &Repository,
    system: SystemIdentifier,
    now: Timestamp,
    count: usize,
) -> Result<()> {
    let message = format!("{}: {count} expiry record(s) undone", repository.url());
    if let Some(ended) = ended(OutcomeKind::Expire, now, true, &message) {
        let name = repository.put_outcome(system, &ended)?;
        outcomes::tell_the_daemon(settings, &name);
    }
    Ok(())
}
