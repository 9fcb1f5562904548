//! What failovers lost: one small object for each, written once by the archiver that saw the fork.
//!
//! One that does not parse is skipped with a warning: a newer version may have written it, and the WAL itself is kept.

use wal_format::{FailoverLoss, ObjectKey, SystemIdentifier, checked_json};

use crate::{Error, Repository, Result};

impl Repository {
    /// Records what a failover lost. Recorded before, by whom and at whatever time: fine.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`].
    pub fn put_failover_loss(&self, system: SystemIdentifier, loss: &FailoverLoss) -> Result<()> {
        let key = loss.key(system);
        let json = checked_json::to_vec(loss).map_err(|error| Error::Damaged {
            key: key.to_string(),
            url: self.url(),
            problem: error.to_string(),
        })?;
        match self.put(&key, &json) {
            Err(error) if error.is_conflict() => Ok(()),
            outcome => outcome.map(|_| ()),
        }
    }

    /// What failovers lost, by branch.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`].
    pub fn failover_losses(&self, system: SystemIdentifier) -> Result<Vec<FailoverLoss>> {
        let mut losses = Vec::new();
        for (key, _) in self.list(&format!("{system}/failover/"))? {
            let ObjectKey::FailoverLoss(..) = key else {
                continue;
            };
            match checked_json::from_slice(&self.get(&key)?) {
                Ok(loss) => losses.push(loss),
                Err(error) => {
                    tracing::warn!(%key, %error, "a record of a failover that can not be read");
                }
            }
        }
        Ok(losses)
    }
}
