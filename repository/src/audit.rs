//! The audit trail: every outcome in the repository is the record of an action, with its result and
//! the user who performed it.

use std::{
    fs,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use wal_format::{Actor, BackupId, ObjectKey, Outcome, OutcomeKind, PgTimestamp, SystemIdentifier};

use crate::{
    Damage, Error, Repository, Result, access::this_user, expire::Swept, outcome_name,
    outcomes::parse,
};

/// The number of concurrent requests that read records. Each one waits for the network.
const READERS: usize = 8;
/// The number of the newest records of each kind that never expire. The newest verification says
/// which objects are damaged, and the newest drill gives the estimate of the next restore.
const RECORDS_MIN: usize = 10;
/// The number of names that are tried for a record. Another action of the same kind may have begun
/// in the same 15 microseconds.
const NAMES_MAX: u64 = 8;

/// Returns the user of this process, on this host, as the actor of an operation of `program`.
#[must_use]
pub fn actor(program: &str) -> Actor {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    Actor {
        user: this_user(),
        sudo_user: std::env::var("SUDO_USER").ok(),
        host: host.trim().to_owned(),
        program: program.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

/// The records of a cluster, oldest first.
#[derive(Clone, Debug, Default)]
pub struct AuditTrail {
    /// The records that can be read, with the system identifier of their epoch.
    pub records: Vec<(SystemIdentifier, Outcome)>,
    /// The records that cannot be read.
    pub unreadable: Vec<Damage>,
}

impl Repository {
    /// Records the result of an operation. The same outcome again changes nothing. Returns its
    /// name, which differs if another operation of the kind began at the same time.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`]; [`Error::Conflict`] if other outcomes have this name and
    /// the following ones.
    pub fn put_outcome(&self, system: SystemIdentifier, outcome: &Outcome) -> Result<BackupId> {
        let mut outcome = outcome.clone();
        for number in 1..=NAMES_MAX {
            let key = outcome.key(system);
            let json = serde_json::to_vec_pretty(&outcome)
                .map_err(|error| self.damaged(&key, error.to_string()))?;
            match self.put(&key, &json) {
                Ok(_) => break,
                Err(error) if error.is_conflict() && number < NAMES_MAX => {
                    outcome.id = following(&outcome.id).ok_or(error)?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(outcome.id)
    }

    /// Returns the records of the operations that began at `since` or later, of one kind or all, of
    /// every epoch of the cluster. Reads no other record.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`].
    pub fn audit_trail(
        &self,
        since: Option<PgTimestamp>,
        kind: Option<OutcomeKind>,
    ) -> Result<AuditTrail> {
        let since = since.and_then(PgTimestamp::to_jiff).and_then(outcome_name);
        let mut keys = Vec::new();
        for (_, epoch) in self.epochs()? {
            let system = epoch.system_identifier;
            let prefix = match kind {
                Some(kind) => format!("{system}/outcome/{kind}/"),
                None => format!("{system}/outcome/"),
            };
            for (key, _) in self.list(&prefix)? {
                if let ObjectKey::Outcome(_, _, id) = &key
                    && since.as_ref().is_none_or(|since| id >= since)
                {
                    keys.push(key);
                }
            }
        }
        let next = AtomicUsize::new(0);
        let found: Mutex<(AuditTrail, Option<Error>)> = Mutex::default();
        let read = || {
            while let Some(key) = keys.get(next.fetch_add(1, Ordering::Relaxed)) {
                let read = self.read_small(key, parse);
                let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
                let (trail, failed) = &mut *found;
                match (read, key) {
                    (Ok(Ok(outcome)), ObjectKey::Outcome(system, ..)) => {
                        trail.records.push((*system, outcome));
                    }
                    (Ok(Err(damage)), _) => trail.unreadable.push(damage),
                    // Retention removed it after the listing.
                    (Err(error), _) if error.is_not_found() => {}
                    (Err(error), _) => {
                        failed.get_or_insert(error);
                        return;
                    }
                    _ => {}
                }
            }
        };
        thread::scope(|scope| {
            for _ in 0..READERS.min(keys.len()) {
                scope.spawn(read);
            }
        });
        let (mut trail, failed) = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = failed {
            return Err(error);
        }
        trail
            .records
            .sort_by(|(_, one), (_, other)| (&one.id, one.kind).cmp(&(&other.id, other.kind)));
        trail
            .unreadable
            .sort_by(|one, other| one.object.cmp(&other.object));
        Ok(trail)
    }

    /// Removes the records of operations that began more than `keep` ago. The newest records of
    /// each kind stay. With `dry_run` only counts them.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`]. The next call continues.
    pub fn expire_outcomes(
        &self,
        system: SystemIdentifier,
        keep: Duration,
        now: jiff::Timestamp,
        dry_run: bool,
    ) -> Result<Swept> {
        let mut swept = Swept::default();
        let Some(oldest) = now.checked_sub(keep).ok().and_then(outcome_name) else {
            return Ok(swept);
        };
        for kind in OutcomeKind::ALL {
            let listed = self.list(&format!("{system}/outcome/{kind}/"))?;
            let old = listed.len().saturating_sub(RECORDS_MIN);
            for (key, size) in &listed[..old] {
                if !matches!(key, ObjectKey::Outcome(_, _, id) if *id < oldest) {
                    break;
                }
                match if dry_run { Ok(()) } else { self.delete(key) } {
                    Ok(()) => {
                        swept.objects += 1;
                        swept.bytes += size;
                    }
                    Err(error) if error.is_object_locked() => swept.locked += 1,
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(swept)
    }
}

/// Returns the name after `id` in the same second. `None` after the last one.
fn following(id: &BackupId) -> Option<BackupId> {
    let (second, part) = id.as_str().split_once('-')?;
    let part = u16::from_str_radix(part, 16).ok()?.checked_add(1)?;
    format!("{second}-{part:04x}").parse().ok()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use jiff::{SignedDuration, Timestamp};

    use super::*;
    use crate::store::LocalStore;

    const SYSTEM: SystemIdentifier = SystemIdentifier(7);

    fn repository(directory: &tempfile::TempDir) -> Repository {
        let store = Arc::new(LocalStore::open(directory.path()).expect("a folder"));
        Repository::with_store(store, "main".parse().expect("a name"))
    }

    fn outcome(kind: OutcomeKind, began: Timestamp, message: &str) -> Outcome {
        let time = PgTimestamp::from_jiff(began);
        let id = outcome_name(began).expect("a name");
        Outcome::new(kind, id, time, time, true, message.to_owned())
    }

    #[test]
    fn a_repeated_put_is_one_record_and_a_second_action_another() {
        let directory = tempfile::tempdir().expect("a directory");
        let repository = repository(&directory);
        let now = Timestamp::now();
        let one = outcome(OutcomeKind::Reload, now, "one");
        let put = |outcome| repository.put_outcome(SYSTEM, outcome).expect("a put");
        assert_eq!(put(&one), one.id);
        assert_eq!(put(&one), one.id);
        let other = outcome(OutcomeKind::Reload, now, "another");
        let name = put(&other);
        assert_eq!(Some(&name), following(&one.id).as_ref());
        assert_eq!(put(&other), name, "the second action again");
        let listed = repository.list("7/outcome/").expect("a list");
        assert_eq!(listed.len(), 2);
        assert!(following(&"20261121T101500Z-ffff".parse().expect("a name")).is_none());
    }

    #[test]
    fn what_is_older_than_audit_keep_expires_except_the_newest_of_each_kind() {
        let directory = tempfile::tempdir().expect("a directory");
        let repository = repository(&directory);
        let now = Timestamp::now();
        let days = |days: i64| SignedDuration::from_hours(24 * days);
        let keep = Duration::from_secs(400 * 86_400);
        let put = |kind, age: i64| {
            let record = outcome(kind, now - days(age), "");
            repository.put_outcome(SYSTEM, &record).expect("a put");
        };
        // Each verification is old, and the newest ones stay.
        (0..12).for_each(|day| put(OutcomeKind::Verify, 500 + day));
        // Some restores are old, and enough new ones exist.
        (0..12).for_each(|day| put(OutcomeKind::Restore, day));
        for age in [399, 401, 402] {
            put(OutcomeKind::Restore, age);
        }
        let expire = |dry_run| {
            let swept = repository.expire_outcomes(SYSTEM, keep, now, dry_run);
            swept.expect("it expires").objects
        };
        assert_eq!((expire(true), expire(false), expire(false)), (4, 4, 0));
        let left = |kind| {
            repository
                .list(&format!("7/outcome/{kind}/"))
                .map(|all| all.len())
        };
        assert_eq!(left(OutcomeKind::Verify).expect("a list"), RECORDS_MIN);
        assert_eq!(left(OutcomeKind::Restore).expect("a list"), 13);
    }
}
