//! [`mark`] records what has expired, and [`sweep`] removes what was marked long enough ago.
//!
//! The order makes it crash-safe: first the record, after which no reader plans with the named
//! objects; then for each backup its `backup.json`, its other objects, and the WAL; finally the
//! record is replaced by one that says that the removal is complete. After an interruption the next
//! sweep starts again with the same records. Objects that the store refuses to delete stay hidden
//! and are counted.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use wal_format::{
    BackupId, EXPIRED_FORMAT_VERSION, Expired, ExpiredWal, ExpiredWindow, ObjectKey, PgTimestamp,
    SegmentNo, SystemIdentifier,
};

use super::{ExpirePlan, ExpiredSet};
use crate::{ClusterIdentity, Error, Repository, Result};

/// The number of concurrent requests. Each one waits for the network.
const REMOVERS: usize = 8;
/// The number of object names in memory at a time, except those of one folder.
const BATCH: usize = 1000;
/// After this number of refusals without any success the rest is not tried: deleting is forbidden
/// here.
const REFUSALS_MAX: usize = 64;

/// The result of a sweep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Swept {
    /// Objects that were removed, or would be.
    pub objects: usize,
    /// Their total size in bytes.
    pub bytes: u64,
    /// Objects that the store refuses to delete. A lower bound where deleting is forbidden.
    pub locked: usize,
}

/// Records what `plan` removes. Returns `None` if another process wrote a record at the same time:
/// then nothing is marked, and the content has to be read again.
///
/// # Errors
/// [`Error::Store`], [`Error::S3`].
pub fn mark(
    place: &Repository,
    system: SystemIdentifier,
    plan: &ExpirePlan,
    known: &ExpiredSet,
    (id, now, policy): (BackupId, PgTimestamp, String),
) -> Result<Option<Expired>> {
    let record = plan.record(id, now, policy);
    place.put_record(&record.key(system), &record)?;
    // Two policies that each leave enough may together leave too little. If another record appeared
    // meanwhile, withdraw ours.
    let overtaken = place.expired(system)?.records().iter().any(|other| {
        let mine = other.id == record.id;
        let seen = known.records().iter().any(|known| known.id == other.id);
        !mine && !seen && !known.names_all_of(other)
    });
    if overtaken {
        match place.delete(&record.key(system)) {
            Ok(()) => return Ok(None),
            // The record is locked and cannot be deleted. Treat it as valid.
            Err(error) if error.is_object_locked() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Some(record))
}

/// Returns what was marked at least `grace` ago and may still have objects.
#[must_use]
pub fn due(expired: &ExpiredSet, grace: Duration, now: PgTimestamp) -> ExpiredSet {
    let done = expired.part(|record| record.swept.is_some());
    let grace = i64::try_from(grace.as_micros()).unwrap_or(i64::MAX);
    expired.part(|record| {
        let ripe = now.micros_since(record.marked) >= grace;
        ripe && record.swept.is_none() && !done.names_all_of(record)
    })
}

/// Removes everything that `due` names; with `dry_run` only counts it. When nothing of it remains,
/// the completed records of `expired` are merged into one, named `id`.
///
/// # Errors
/// [`Error::Store`], [`Error::S3`]. The next sweep continues.
pub fn sweep(
    place: &Repository,
    identity: &ClusterIdentity,
    (expired, due): (&ExpiredSet, &ExpiredSet),
    (id, now): (BackupId, PgTimestamp),
    dry_run: bool,
) -> Result<Swept> {
    let system = identity.system_identifier;
    let size = identity.wal_segment_size;
    let mut sweeper = Sweeper {
        place,
        dry_run,
        swept: Swept::default(),
    };
    for backup in due.backups() {
        sweeper.backup(system, backup)?;
    }
    for (branch, wal) in due.branches() {
        let ours = |key: &ObjectKey| due.hides(key, size);
        for (from, to) in wal.iter() {
            let first = size.segment_of(from).0 / size.per_log();
            let last = SegmentNo(size.segment_of(to).0.saturating_sub(1)).0 / size.per_log();
            for log in first..=last {
                sweeper.folder(&format!("{system}/wal/{branch}/{log:08X}/"), &ours)?;
            }
        }
        sweeper.folder(&format!("{system}/tail/{branch}/"), &ours)?;
    }
    let swept = sweeper.swept;
    if dry_run || swept.locked > 0 {
        return Ok(swept);
    }
    if due.is_empty() {
        tidy(place, system, expired)?;
    } else {
        settle(place, system, (expired, due), (id, now))?;
    }
    Ok(swept)
}

/// Removes records that a later record replaced and a crash left.
fn tidy(place: &Repository, system: SystemIdentifier, expired: &ExpiredSet) -> Result<()> {
    for record in expired.records() {
        let later = expired.part(|other| other.swept.is_some() && other.id > record.id);
        if later.names_all_of(record) && !later.records().is_empty() {
            forget(place, system, record)?;
        }
    }
    Ok(())
}

fn forget(place: &Repository, system: SystemIdentifier, record: &Expired) -> Result<()> {
    match place.delete(&record.key(system)) {
        Err(error) if error.is_object_locked() => Ok(()),
        outcome => outcome,
    }
}

/// Replaces the completed records by one.
fn settle(
    place: &Repository,
    system: SystemIdentifier,
    (expired, due): (&ExpiredSet, &ExpiredSet),
    (id, now): (BackupId, PgTimestamp),
) -> Result<()> {
    let is_due = |record: &Expired| due.records().iter().any(|due| due.id == record.id);
    let done = expired.part(|record| record.swept.is_some() || is_due(record));
    let records = done.records();
    let mut backups: Vec<_> = records.iter().flat_map(|one| one.backups.clone()).collect();
    backups.sort_unstable();
    backups.dedup();
    let wal = done.branches().flat_map(|(branch, wal)| {
        wal.iter().map(move |(from_lsn, to_lsn)| ExpiredWal {
            branch,
            from_lsn,
            to_lsn,
        })
    });
    let one = Expired {
        format_version: EXPIRED_FORMAT_VERSION,
        id,
        marked: records.iter().map(|one| one.marked).max().unwrap_or(now),
        swept: Some(now),
        policy: records
            .last()
            .map(|one| one.policy.clone())
            .unwrap_or_default(),
        backups,
        wal: wal.collect(),
        windows: join(records.iter().flat_map(|one| one.windows.clone()).collect()),
    };
    place.put_record(&one.key(system), &one)?;
    records
        .iter()
        .try_for_each(|record| forget(place, system, record))
}

/// Merges adjacent windows.
fn join(mut windows: Vec<ExpiredWindow>) -> Vec<ExpiredWindow> {
    windows.sort_unstable();
    let mut joined: Vec<ExpiredWindow> = Vec::new();
    for window in windows {
        match joined.last_mut() {
            Some(last) if last.branch == window.branch && window.from_lsn <= last.to_lsn => {
                if window.to_lsn > last.to_lsn {
                    last.to_lsn = window.to_lsn;
                    last.to = window.to;
                }
            }
            _ => joined.push(window),
        }
    }
    joined
}

struct Sweeper<'a> {
    place: &'a Repository,
    dry_run: bool,
    swept: Swept,
}

impl Sweeper<'_> {
    /// Removes the description first: without it the backup does not exist for any reader. If the
    /// description cannot be deleted, its files stay.
    fn backup(&mut self, system: SystemIdentifier, id: &BackupId) -> Result<()> {
        let mut objects = self.place.list(&format!("{system}/backup/{id}/"))?;
        let is_info = |(key, _): &(ObjectKey, u64)| matches!(key, ObjectKey::BackupInfo(..));
        if let Some(at) = objects.iter().position(is_info) {
            let info = objects.remove(at);
            let before = self.swept.locked;
            self.remove(&[info])?;
            if self.swept.locked > before {
                self.swept.locked += objects.len();
                return Ok(());
            }
        }
        objects
            .chunks(BATCH)
            .try_for_each(|batch| self.remove(batch))
    }

    /// Removes the objects of a folder that `ours` selects, in batches.
    fn folder(&mut self, prefix: &str, ours: &dyn Fn(&ObjectKey) -> bool) -> Result<()> {
        let mut batch = Vec::new();
        let place = self.place.clone();
        place.visit(prefix, &mut |key, size| {
            if ours(&key) {
                batch.push((key, size));
            }
            if batch.len() >= BATCH {
                self.remove(&std::mem::take(&mut batch))?;
            }
            Ok(())
        })?;
        self.remove(&batch)
    }

    fn remove(&mut self, batch: &[(ObjectKey, u64)]) -> Result<()> {
        if self.dry_run {
            self.swept.objects += batch.len();
            self.swept.bytes += batch.iter().map(|(_, size)| size).sum::<u64>();
            return Ok(());
        }
        let refused_before = self.swept.locked;
        let freed_before = self.swept.objects;
        let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        let outcome: Mutex<(Swept, Option<Error>)> = Mutex::default();
        let work = || {
            while !stop.load(Ordering::Relaxed) {
                let Some((key, size)) = batch.get(next.fetch_add(1, Ordering::Relaxed)) else {
                    return;
                };
                let removed = self.place.delete(key);
                let mut outcome = outcome.lock().unwrap_or_else(PoisonError::into_inner);
                let (swept, failed) = &mut *outcome;
                match removed {
                    Ok(()) => {
                        swept.objects += 1;
                        swept.bytes += size;
                    }
                    Err(error) if error.is_object_locked() => {
                        swept.locked += 1;
                        let refused = refused_before + swept.locked;
                        if refused >= REFUSALS_MAX && freed_before + swept.objects == 0 {
                            stop.store(true, Ordering::Relaxed);
                        }
                    }
                    Err(error) => {
                        failed.get_or_insert(error);
                        stop.store(true, Ordering::Relaxed);
                    }
                }
            }
        };
        thread::scope(|scope| {
            for _ in 0..REMOVERS.min(batch.len()) {
                scope.spawn(work);
            }
        });
        let (swept, failed) = outcome.into_inner().unwrap_or_else(PoisonError::into_inner);
        self.swept.objects += swept.objects;
        self.swept.bytes += swept.bytes;
        self.swept.locked += swept.locked;
        failed.map_or(Ok(()), Err)
    }
}
