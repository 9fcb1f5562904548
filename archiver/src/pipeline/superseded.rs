//! Tails that stayed in the repository although their segment is sealed: a run was killed, or a
//! request failed, after the segment was stored and before they were removed.
//!
//! Invariant: a tail is removed only when its segment is sealed and verified: no file of that
//! segment is in the spool any more, or the caller has just sealed it.

use repository::CrashPoint;
use wal_format::{Branch, ObjectKey, SegmentNo};

use super::archive::Archive;
use crate::error::Result;

impl Archive {
    /// Removes the tails of a segment that is sealed and verified.
    ///
    /// # Errors
    /// [`crate::error::Error::Repository`].
    pub fn remove_superseded_tails(&self, branch: Branch, segment: SegmentNo) -> Result<()> {
        let name = self.branch_spool(branch).name(segment);
        let system = self.identity().system_identifier;
        for (key, _) in self
            .repository()
            .list(&format!("{system}/tail/{branch}/{name}/"))?
        {
            self.remove_tail(&key)?;
        }
        Ok(())
    }

    /// Removes the tails of every segment that is sealed and has left the spool. Costs one listing.
    ///
    /// # Errors
    /// [`crate::error::Error::Repository`], [`crate::error::Error::Io`].
    pub fn remove_leftover_tails(&self) -> Result<()> {
        let size = self.identity().segment_size;
        let system = self.identity().system_identifier;
        for (key, _) in self.repository().list(&format!("{system}/tail/"))? {
            let ObjectKey::Tail(_, branch, name, ..) = &key else {
                continue;
            };
            let Some(segment) = name.segment(size) else {
                continue;
            };
            let spool = self.branch_spool(*branch);
            let is_spooled = spool.path(segment).exists() || spool.partial_path(segment).exists();
            if !is_spooled && self.sealed_range(*branch, segment)?.is_some() {
                tracing::info!(%key, "removing a tail whose segment is sealed");
                self.remove_tail(&key)?;
            }
        }
        Ok(())
    }

    /// Removes a tail from the repository and from the catalog. A tail that a lock keeps stays in
    /// both. This does no harm, because no reader uses the tails of a sealed segment.
    ///
    /// # Errors
    /// [`crate::error::Error::Repository`].
    pub(super) fn remove_tail(&self, key: &ObjectKey) -> Result<()> {
        match self.repository().delete(key) {
            Err(error) if error.is_object_locked() => {
                self.status().locked(key, &error);
                return Ok(());
            }
            outcome => outcome?,
        }
        let reached = CrashPoint::TailRemoved.reach();
        reached.map_err(repository::Error::store("remove", self.spool_directory()))?;
        Ok(self.catalog().forget(key)?)
    }
}
