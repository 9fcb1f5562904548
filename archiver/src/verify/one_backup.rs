//! The check of a single backup: its objects, and the WAL that makes it consistent.

use catalog::Catalog;
use wal_format::{BackupId, BackupInfo, ObjectKey};

use super::{Findings, Verifier};
use crate::error::{Error, Result};

impl Verifier {
    /// Checks the objects of the backup, and the WAL from its start LSN to its stop LSN. Returns
    /// `None` if this place does not hold the backup or the backup has expired.
    pub(super) fn only_backup(mut self, id: &BackupId) -> Result<Option<Findings>> {
        let system = self.wal.system_identifier;
        let url = self.repository.url();
        let objects = self.repository.list(&format!("{system}/backup/{id}/"))?;
        let expired = self.repository.expired(system)?;
        let info_key = ObjectKey::BackupInfo(system, id.clone());
        if objects.is_empty() || expired.hides(&info_key, self.wal.segment_size) {
            return Ok(None);
        }
        let mut count = objects.len();
        if objects.iter().any(|(key, _)| *key == info_key) {
            self.backup(id)?;
            let content = self.repository.get(&info_key);
            let info = content
                .ok()
                .and_then(|content| BackupInfo::parse_of(&info_key, &content).ok());
            if let Some(info) = info {
                count += self.wal_of(&info)?;
            }
        } else {
            self.problem(&info_key, "it is missing, so the backup cannot be used");
        }
        Ok(Some(Findings {
            url,
            objects: count,
            problems: self.problems,
            losses: Vec::new(),
            undescribed: Vec::new(),
            unreadable: Vec::new(),
            foreign: Vec::new(),
        }))
    }

    /// Reads each object with WAL between the start LSN and the stop LSN, and checks that nothing
    /// is missing in between. Returns the number of objects.
    fn wal_of(&mut self, info: &BackupInfo) -> Result<usize> {
        let folder = tempfile::tempdir().map_err(Error::io("create", "a temporary directory"))?;
        let catalog = Catalog::open(folder.path(), &self.identity)?;
        catalog.refresh(&self.repository)?;
        let ranges = catalog.ranges(info.branch, info.start_lsn, info.stop_lsn)?;
        for range in &ranges {
            self.wal_object(&range.key(&self.identity))?;
        }
        let end = catalog.contiguous_end(info.branch, info.start_lsn)?;
        if end < info.stop_lsn {
            self.general(format!(
                "backup {} cannot be restored: WAL {end} to {} of timeline branch {} is missing",
                info.id, info.stop_lsn, info.branch
            ));
        }
        Ok(ranges.len())
    }
}
