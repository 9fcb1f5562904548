//! Keeps the catalog's copy of what expired, and removes the ranges and backups that it names.

use repository::{ExpiredSet, Repository, Result, WalRange, expire::Index};
use wal_format::{BackupInfo, ObjectKey};

use super::{
    Catalog,
    families::{Backups, CommitTimes, Expired, RestorePoints, Segments},
    keys, refresh,
};

impl Catalog {
    /// Returns the backups and WAL that readers treat as absent because they expired.
    ///
    /// # Errors
    /// [`Error::Catalog`](repository::Error::Catalog).
    pub fn expired(&self) -> Result<ExpiredSet> {
        Ok(self.get_single::<Expired>()?.unwrap_or_default())
    }

    /// Reads from the repository what expired, and removes it from the catalog. Returns true if
    /// something that had expired is no longer expired, because a record was removed or a mirror
    /// that keeps data longer answers again. A refresh then finds it.
    ///
    /// # Errors
    /// [`Error::Store`](repository::Error::Store), [`Error::Catalog`](repository::Error::Catalog).
    pub fn follow_expired(&self, repository: &Repository) -> Result<bool> {
        let expired = repository.expired(self.identity.system_identifier)?;
        let known = self.expired()?;
        if expired == known {
            return Ok(false);
        }
        let size = self.identity.wal_segment_size;
        let mut batch = self.batch();
        for (branch, wal) in expired.branches() {
            for (from, to) in wal.iter() {
                let first = keys::segment(branch, size.segment_of(from));
                let behind = keys::segment(branch, size.segment_of(to));
                batch.delete_between::<Segments>(&first, &behind);
                batch.delete_between::<CommitTimes>(&first, &behind);
                let (first, behind) = (keys::position(branch, from), keys::position(branch, to));
                batch.delete_between::<RestorePoints>(&first, &behind);
            }
        }
        for id in expired.backups() {
            batch.delete::<Backups>(id);
        }
        batch.put_single::<Expired>(&expired)?;
        batch.write()?;
        Ok(!expired.names_all_in(&known))
    }
}

impl Index for Catalog {
    fn backups(&self) -> Result<Vec<BackupInfo>> {
        self.backups()
    }

    fn range_of(&self, place: &Repository, key: &ObjectKey, size: u64) -> Result<Option<WalRange>> {
        refresh::range_of(self, place, key, size)
    }
}
