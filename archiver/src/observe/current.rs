//! [`CurrentArchive`]: the archive of a cluster while its stages run, for queries that only the
//! catalog can answer.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::pipeline::archive::Archive;

/// The archive of the running stages. It does not keep the archive open.
#[derive(Debug, Default)]
pub struct CurrentArchive(Mutex<Weak<Archive>>);

impl CurrentArchive {
    /// Sets the archive, after its first check.
    pub(crate) fn set(&self, archive: &Arc<Archive>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(archive);
    }

    /// Returns the archive. `None` before its first check, and while no stages run.
    #[must_use]
    pub fn get(&self) -> Option<Arc<Archive>> {
        let archive = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        archive.upgrade()
    }
}
