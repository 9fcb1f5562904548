//! Small records that are written once, as JSON with a checksum: WAL that was declared lost, WAL
//! that failovers lost, expired objects.
//!
//! Invariant: a second writer, with any content, finds the first record. Nothing is ever replaced.
//! A record that cannot be read is never fatal to its reader.

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};
use wal_format::{
    DeclaredGap, FailoverLoss, ObjectKey, PgTimestamp, SystemIdentifier, checked_json,
};

use crate::{Damage, Error, PutOutcome, Repository, Result};

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

    /// Reads a small object and parses it. Returns its damage as the inner error. An encrypted
    /// store detects some damage itself.
    pub(crate) fn read_small<T>(
        &self,
        key: &ObjectKey,
        parse: impl FnOnce(&Bytes) -> std::result::Result<T, String>,
    ) -> Result<std::result::Result<T, Damage>> {
        let problem = match self.get(key) {
            Ok(content) => match parse(&content) {
                Ok(found) => return Ok(Ok(found)),
                Err(problem) => problem,
            },
            Err(Error::Damaged { problem, .. }) => problem,
            Err(error) => return Err(error),
        };
        let object = key.to_string();
        Ok(Err(Damage { object, problem }))
    }

    /// Declares a range of WAL lost. An earlier declaration of the range stays as it is.
    ///
    /// # Errors
    /// [`Error::Store`](crate::Error::Store), [`Error::S3`](crate::Error::S3).
    pub fn put_gap(&self, system: SystemIdentifier, gap: &DeclaredGap) -> Result<()> {
        self.put_first_record(&gap.key(system), gap)
    }

    /// Returns every range of WAL that was declared lost, by branch and LSN.
    ///
    /// # Errors
    /// [`Error::Store`](crate::Error::Store), [`Error::S3`](crate::Error::S3).
    pub fn gaps(&self, system: SystemIdentifier) -> Result<Vec<DeclaredGap>> {
        Ok(self.read_gaps(system)?.0)
    }

    /// Returns every range of WAL that was declared lost, and the records that cannot be read. The
    /// range of such a record is known from its name.
    ///
    /// # Errors
    /// As [`Repository::gaps`].
    pub fn read_gaps(&self, system: SystemIdentifier) -> Result<(Vec<DeclaredGap>, Vec<Damage>)> {
        let (mut gaps, mut damaged) = (Vec::new(), Vec::new());
        for (key, _) in self.list(&format!("{system}/gap/"))? {
            let ObjectKey::Gap(_, branch, from_lsn, to_lsn) = key else {
                continue;
            };
            let parse = |json: &Bytes| {
                let gap = checked_json::from_slice::<DeclaredGap>(json);
                gap.map_err(|error| error.to_string())
            };
            match self.read_small(&key, parse)? {
                Ok(gap) => gaps.push(gap),
                Err(damage) => {
                    tracing::error!(event = "record_damaged", %damage, "a declared loss cannot be read");
                    gaps.push(DeclaredGap {
                        branch,
                        from_lsn,
                        to_lsn,
                        declared: PgTimestamp(0),
                        last_commit: None,
                        reason: format!("its record is damaged: {damage}"),
                    });
                    damaged.push(damage);
                }
            }
        }
        Ok((gaps, damaged))
    }

    /// Records what a failover lost. An earlier record stays as it is.
    ///
    /// # Errors
    /// [`Error::Store`](crate::Error::Store), [`Error::S3`](crate::Error::S3).
    pub fn put_failover_loss(&self, system: SystemIdentifier, loss: &FailoverLoss) -> Result<()> {
        self.put_first_record(&loss.key(system), loss)
    }

    /// Returns what failovers lost, by branch. A record that cannot be read is skipped with a
    /// warning: a newer version may have written it, and the WAL itself is kept.
    ///
    /// # Errors
    /// [`Error::Store`](crate::Error::Store), [`Error::S3`](crate::Error::S3).
    pub fn failover_losses(&self, system: SystemIdentifier) -> Result<Vec<FailoverLoss>> {
        let mut losses = Vec::new();
        for (key, _) in self.list(&format!("{system}/failover/"))? {
            let ObjectKey::FailoverLoss(..) = key else {
                continue;
            };
            let parse =
                |json: &Bytes| checked_json::from_slice(json).map_err(|error| error.to_string());
            match self.read_small(&key, parse)? {
                Ok(loss) => losses.push(loss),
                Err(damage) => {
                    tracing::warn!(%damage, "a record of a failover cannot be read");
                }
            }
        }
        Ok(losses)
    }
}
