//! Checks of the place that a base backup is stored in: it must be the archive in its newest state,
//! before and after the backup.

use catalog::Catalog;
use repository::{
    ClusterIdentity, LossRecord, Repository, config::ClusterSettings, incomplete_part,
};
use wal_format::BackupInfo;

use super::Taking;
use crate::error::Result;

/// Refuses a place that lacks the newest WAL that this host stored: a backup in an older copy of
/// the repository would be missing in the right one.
pub(super) fn refuse_older_state(
    settings: &ClusterSettings,
    identity: &ClusterIdentity,
    repository: &Repository,
) -> Result<()> {
    let record = LossRecord::of(settings);
    record.check_newest(repository)?;
    // A catalog that cannot be read proves nothing.
    if let Ok(catalog) = Catalog::open_read_only(&settings.catalog, identity)
        && let Ok(Some(tail)) = catalog.newest_tail()
    {
        record.check_held(repository, &catalog.loss_of(&tail))?;
    }
    Ok(())
}

impl Taking {
    /// Checks that the place is the right one and holds every object of the backup.
    pub(super) fn check_stored(&self, info: &BackupInfo) -> Result<()> {
        self.repository.confirm()?;
        let prefix = format!("{}/backup/{}/", info.system_identifier, info.id);
        let listed = self.repository.list(&prefix)?.into_iter().collect();
        match incomplete_part(info, &listed) {
            Some(damage) => Err(repository::Error::Damaged {
                key: damage.object,
                url: self.repository.url(),
                problem: format!(
                    "{}, because the place was exchanged during the backup, or has lost it: take the backup again",
                    damage.problem
                ),
            }
            .into()),
            None => Ok(()),
        }
    }
}
