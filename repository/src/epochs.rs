//! Epochs: the system identifiers that a cluster's name has had, one after the other (`epoch/{n}.json`).
//!
//! `pg_upgrade` and `initdb` give a server a new system identifier. Nothing of it is archived under the name before the
//! operator has begun a new epoch; then the newest epoch is the one that is archived, and every older one stays listed and
//! restorable, since all of its objects lie below its own system identifier. Invariant: an epoch is never changed or removed.

use wal_format::{ObjectKey, SystemIdentifier};

use crate::{ClusterIdentity, Error, PutOutcome, Repository, Result};

impl Repository {
    /// Every epoch with its number, oldest first; of a repository made with [`Repository::of_system`] only its own.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::Damaged`].
    pub fn epochs(&self) -> Result<Vec<(u32, ClusterIdentity)>> {
        let mut epochs = Vec::new();
        for (key, _) in self.list("epoch/")? {
            if let ObjectKey::Epoch(number) = key {
                epochs.push((number, self.epoch(&key)?));
            }
        }
        epochs.sort_by_key(|(number, _)| *number);
        if let Some(system) = self.system() {
            epochs.retain(|(_, identity)| identity.system_identifier == system);
        }
        Ok(epochs)
    }

    /// The same repository, as it was while its cluster had this system identifier.
    ///
    /// # Errors
    /// [`Error::Config`] with those that it had, when this is none of them.
    pub fn of_system(&self, system: SystemIdentifier) -> Result<Self> {
        // Says so when keys are missing.
        self.identity()?;
        let epochs = self.epochs()?;
        if !epochs
            .iter()
            .any(|(_, identity)| identity.system_identifier == system)
        {
            let known: Vec<String> = epochs
                .iter()
                .map(|(_, identity)| identity.system_identifier.to_string())
                .collect();
            return Err(Error::config(format!(
                "{} holds nothing of system identifier {system} under cluster {}; it has {}",
                self.url(),
                self.cluster(),
                known.join(", ")
            )));
        }
        Ok(self.with_system(system))
    }

    /// Makes `found` the identity that the cluster's name stands for from now on, after `last`, which it was until now.
    /// Two that begin the same epoch at once agree.
    ///
    /// # Errors
    /// [`Error::SystemIdentifierMismatch`] when another one was begun meanwhile.
    pub fn begin_epoch(&self, last: &ClusterIdentity, found: &ClusterIdentity) -> Result<u32> {
        let newest = self.epochs()?.pop();
        let number = match newest {
            Some((number, newest)) if newest == *last => number.saturating_add(1),
            Some((number, newest)) if newest.system_identifier == found.system_identifier => {
                return Ok(number);
            }
            newest => return Err(self.overtaken(last, newest.map(|(_, newest)| newest))),
        };
        let key = ObjectKey::Epoch(number);
        match self.create(&key, found)? {
            PutOutcome::Created => Ok(number),
            PutOutcome::AlreadyExists => match self.epoch(&key)? {
                other if other.system_identifier == found.system_identifier => Ok(number),
                other => Err(self.overtaken(found, Some(other))),
            },
        }
    }

    fn overtaken(&self, wanted: &ClusterIdentity, found: Option<ClusterIdentity>) -> Error {
        Error::SystemIdentifierMismatch {
            cluster: self.cluster().clone(),
            url: self.url(),
            expected: found.map_or(wanted.system_identifier, |found| found.system_identifier),
            found: wanted.system_identifier,
        }
    }
}

#[cfg(test)]
mod tests {
    use wal_format::{ClusterName, PgTimestamp, PgVersion, SegmentSize};

    use super::*;
    use crate::store::LocalStore;

    fn identity(system: u64, major: u16) -> ClusterIdentity {
        ClusterIdentity {
            format_version: 1,
            cluster: "main".parse::<ClusterName>().expect("a name"),
            system_identifier: SystemIdentifier(system),
            postgresql_major: PgVersion::try_from(major).expect("a version"),
            wal_segment_size: SegmentSize::DEFAULT,
            created: PgTimestamp(0),
        }
    }

    #[test]
    fn a_new_epoch_takes_the_name_and_the_old_one_stays_readable() {
        let directory = tempfile::tempdir().expect("a directory");
        let store = LocalStore::open(directory.path()).expect("a store");
        let repository =
            Repository::with_store(std::sync::Arc::new(store), "main".parse().expect("a name"));
        let (old, new) = (identity(1, 14), identity(2, 17));
        assert_eq!(repository.claim(&old).expect("the first"), old);
        let error = repository.claim(&new).expect_err("another cluster");
        assert!(error.to_string().contains("epoch begin"), "{error}");
        assert_eq!(repository.begin_epoch(&old, &new).expect("begun"), 2);
        assert_eq!(repository.begin_epoch(&old, &new).expect("again"), 2);
        assert_eq!(repository.claim(&new).expect("the newest"), new);
        repository.claim(&old).expect_err("it had its time");
        let error = repository.begin_epoch(&old, &identity(3, 17));
        error.expect_err("somebody was faster");
        let past = repository.of_system(SystemIdentifier(1)).expect("known");
        assert_eq!(past.identity().expect("readable"), Some(old));
        let error = repository.of_system(SystemIdentifier(9)).expect_err("none");
        assert!(error.to_string().contains("it has 1, 2"), "{error}");
    }
}
