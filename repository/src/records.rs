//! Small records that are written once, as JSON with a sum: WAL that was declared lost, what
//! failovers lost, what expired.
//!
//! Invariant: who writes one second, with whatever words, finds the first; nothing is ever
//! replaced.

use serde::{Serialize, de::DeserializeOwned};
use wal_format::{DeclaredGap, FailoverLoss, ObjectKey, SystemIdentifier, checked_json};

use crate::{PutOutcome, Repository, Result};

impl Repository {
    pub(crate) fn put_record(
        &self,
        key: &ObjectKey,
        record: &impl Serialize,
    ) -> Result<PutOutcome> {
        let json =
            checked_json::to_vec(record).map_err(|error| self.damaged(key, error.to_string()))?;
        self.put(key, &json)
    }

    pub(crate) fn record<T: DeserializeOwned>(&self, key: &ObjectKey) -> Result<T> {
        checked_json::from_slice(&self.get(key)?)
            .map_err(|error| self.damaged(key, error.to_string()))
    }

    fn put_first_record(&self, key: &ObjectKey, record: &impl Serialize) -> Result<()> {
        match self.put_record(key, record) {
            Err(error) if error.is_conflict() => Ok(()),
            outcome => outcome.map(drop),
        }
    }

    /// Declares a range of WAL lost. Declared before, by whom and with whatever words: fine.
    ///
    /// # Errors
    /// [`Error::Store`](crate::Error::Store), [`Error::S3`](crate::Error::S3).
    pub fn put_gap(&self, system: SystemIdentifier, gap: &DeclaredGap) -> Result<()> {
        self.put_first_record(&gap.key(system), gap)
    }

    /// Every range of WAL that was declared lost, by branch and LSN.
    ///
    /// # Errors
    /// [`Error::Store`](crate::Error::Store); [`Error::Damaged`](crate::Error::Damaged).
    pub fn gaps(&self, system: SystemIdentifier) -> Result<Vec<DeclaredGap>> {
        let keys = self.list(&format!("{system}/gap/"))?;
        keys.iter().map(|(key, _)| self.record(key)).collect()
    }

    /// Records what a failover lost. Recorded before, by whom and at whatever time: fine.
    ///
    /// # Errors
    /// [`Error::Store`](crate::Error::Store), [`Error::S3`](crate::Error::S3).
    pub fn put_failover_loss(&self, system: SystemIdentifier, loss: &FailoverLoss) -> Result<()> {
        self.put_first_record(&loss.key(system), loss)
    }

    /// WAL that failovers lost, by branch. A record that does not parse is skipped with a warning:
    /// a newer version may have written it, and the WAL itself is kept.
    ///
    /// # Errors
    /// [`Error::Store`](crate::Error::Store), [`Error::S3`](crate::Error::S3).
    pub fn failover_losses(&self, system: SystemIdentifier) -> Result<Vec<FailoverLoss>> {
        let mut losses = Vec::new();
        for (key, _) in self.list(&format!("{system}/failover/"))? {
            let ObjectKey::FailoverLoss(..) = key else {
                continue;
            };
            match checked_json::from_slice(&self.get(&key)?) {
                Ok(loss) => losses.push(loss),
                Err(error) => {
                    tracing::warn!(%key, %error, "a record of a failover that cannot be read");
                }
            }
        }
        Ok(losses)
    }
}
