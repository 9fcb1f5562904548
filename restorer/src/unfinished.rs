//! Transactions that are unfinished at the stop and whose effects are partly replayed: the locks
//! that block readers, and the databases and tablespaces whose files are removed.
//!
//! PostgreSQL writes both into the WAL before the commit of `DROP` (`LogAccessExclusiveLock` in
//! `standby.c`, `dropdb` in `dbcommands.c`). A stop right before that commit therefore leaves a
//! server in recovery on which every query of the table waits, and a database that is in
//! `pg_database` and has no files. Right after the last kept commit the rows are the same and
//! neither effect exists, so the plan stops there if possible. Invariant: a stop is moved only if
//! the committed and the prepared transactions stay the same. Otherwise the plan names the locks
//! and the removed files.

use std::collections::{BTreeMap, BTreeSet};

use repository::WalRange;
use serde::{Deserialize, Serialize};
use wal_format::{
    BackupInfo, DecodeErrorKind, Lsn, PgVersion, RecordHeader, RecordSink, ResourceManager,
    WalDecoder, WalRecord, record::WINDOW_BYTES,
};

use crate::{
    Error, RestorePlan, Result, Stop,
    inventory::{Archive, Inventory},
    locate,
    plan::{Coverage, PathPart, cover, in_doubt},
};

/// Resource managers (`rmgrlist.h`).
const DATABASE: ResourceManager = ResourceManager(4);
const STANDBY: ResourceManager = ResourceManager(8);
/// Kinds of records in `standbydefs.h`.
const STANDBY_LOCK: u8 = 0x00;
const RUNNING_XACTS: u8 = 0x10;
/// `XLOG_DBASE_DROP` before version 15 and since.
const DATABASE_DROP_BEFORE_15: u8 = 0x10;
const DATABASE_DROP: u8 = 0x20;
/// `XLOG_TBLSPC_DROP`.
const TABLESPACE_DROP: u8 = 0x10;
/// `XLOG_CHECKPOINT_SHUTDOWN`.
const SHUTDOWN: u8 = 0x00;
/// Kinds of records in `xact.h`.
const COMMIT: u8 = 0x00;
const PREPARE: u8 = 0x10;
const ABORT: u8 = 0x20;
const COMMIT_PREPARED: u8 = 0x30;
const ABORT_PREPARED: u8 = 0x40;
/// The maximum amount of WAL before a stop that is searched for the server's last list of locks. A
/// server writes one every 15 seconds (`LOG_SNAPSHOT_INTERVAL_MS`) and in every checkpoint.
const SEARCH_MAX_BYTES: u64 = 1 << 30;

/// An `AccessExclusiveLock` that is held at the stop.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct HeldLock {
    /// The transaction that holds it.
    pub xid: u32,
    /// The OID of the database; 0 for a shared relation.
    pub database: u32,
    /// The OID of the relation.
    pub relation: u32,
    /// Its schema and name in the backup; `None` if unknown.
    #[serde(default)]
    pub name: Option<String>,
}

/// A database or a tablespace whose files the replay removes, although its `DROP` does not commit
/// before the stop.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RemovedFiles {
    /// `database` or `tablespace`.
    pub kind: String,
    /// Its OID.
    pub oid: u32,
    /// The transaction of the `DROP`.
    pub xid: u32,
    /// The record that removes the files.
    pub lsn: Lsn,
}

/// The effects of transactions that are unfinished at a stop.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Unfinished {
    locks: BTreeSet<HeldLock>,
    removed: BTreeSet<RemovedFiles>,
}

/// Moves the stop of `plan` back to the last kept commit if transactions that are unfinished at the
/// stop would harm the copy. Effects that cannot be avoided are added to the plan. `readers` is
/// true for a copy that stays in recovery at the stop, where locks block readers.
///
/// WAL that cannot be read is not an error here: the recovery reports it.
///
/// # Errors
/// Errors of reading the catalog.
pub fn settle(archive: &Archive, plan: &mut RestorePlan, readers: bool) -> Result<()> {
    let backups = archive.catalog.backups()?;
    let Some(backup) = backups.iter().find(|backup| backup.id == plan.backup) else {
        return Ok(());
    };
    // The end of the segment that contains a fork may be archived only on the next timeline.
    let path: Vec<PathPart> = plan.path.iter().chain(&plan.later).cloned().collect();
    let coverage = cover(archive, &path, plan.start_lsn)?;
    let search = Search {
        archive,
        coverage: &coverage,
        prepared: plan.in_doubt.iter().map(|one| one.xid).collect(),
    };
    let Some(mut here) = search.at(plan.stop) else {
        return Ok(());
    };
    plan.locks_known = true;
    if !readers {
        here.locks.clear();
    }
    if here == Unfinished::default() {
        return Ok(());
    }
    if let Some(earlier) = same_rows(archive, &coverage, backup, plan)?
        && let Some(mut there) = search.at(earlier)
    {
        if !readers {
            there.locks.clear();
        }
        let harm = |one: &Unfinished| (one.removed.len(), one.locks.len());
        if harm(&there) < harm(&here) {
            plan.moved_from = Some(plan.stop);
            plan.stop = earlier;
            here = there;
        }
    }
    plan.removed = here.removed.into_iter().collect();
    plan.locks = named(archive, backup, here.locks);
    Ok(())
}

/// Returns the stop right after the last kept commit, if the same transactions are committed and
/// prepared there and the backup is consistent.
fn same_rows(
    archive: &Archive,
    coverage: &Coverage,
    backup: &BackupInfo,
    plan: &RestorePlan,
) -> Result<Option<Stop>> {
    let (Some(kept), Some(last)) = (plan.last_kept, plan.path.last()) else {
        return Ok(None);
    };
    let earlier = Stop::After { lsn: kept.lsn };
    // The stop must not move to an earlier timeline, where the copy would continue another branch.
    if earlier == plan.stop || kept.lsn < backup.stop_lsn || kept.lsn < last.from {
        return Ok(None);
    }
    let prepared = in_doubt(archive, coverage, backup, earlier)?;
    Ok((prepared == plan.in_doubt).then_some(earlier))
}

/// Returns the locks of relations that queries can name, with their names as far as the backup has
/// them.
fn named(archive: &Archive, backup: &BackupInfo, locks: BTreeSet<HeldLock>) -> Vec<HeldLock> {
    if locks.is_empty() {
        return Vec::new();
    }
    let relations = locks.iter().map(|lock| (lock.database, lock.relation));
    let names = match locate::names_of(archive, backup, &relations.collect()) {
        Ok(names) => names,
        Err(error) => {
            tracing::debug!(%error, event = "lock_names_unread", "the names of locked tables are unknown");
            BTreeMap::new()
        }
    };
    let named = locks.into_iter().map(|lock| HeldLock {
        name: names.get(&(lock.database, lock.relation)).cloned(),
        ..lock
    });
    named
        .filter(|lock| {
            let name = lock.name.as_deref();
            name.is_none_or(|name| !name.starts_with("pg_toast."))
        })
        .collect()
}

struct Search<'a> {
    archive: &'a Archive,
    coverage: &'a Coverage,
    /// The transactions that are prepared at the stop.
    prepared: BTreeSet<u32>,
}

impl Search<'_> {
    /// Returns the unfinished effects at a stop; `None` if they cannot be determined.
    fn at(&self, stop: Stop) -> Option<Unfinished> {
        let until = match stop {
            Stop::Before { lsn } => lsn,
            Stop::After { lsn } => lsn.add(1),
            Stop::Consistent => return None,
        };
        // The locks are unknown if WAL before the stop is missing.
        if self.coverage.end_lsn < until {
            return None;
        }
        match self.before(until) {
            Ok(found) => found,
            Err(error) => {
                tracing::debug!(%error, event = "locks_unread", "locks at the stop are unknown");
                None
            }
        }
    }

    /// Decodes an increasing number of segments before `until`, until the server's last list of
    /// locks is included.
    fn before(&self, until: Lsn) -> Result<Option<Unfinished>> {
        let size = self.archive.identity().wal_segment_size;
        let ranges: Vec<&WalRange> = self
            .coverage
            .ranges
            .iter()
            .filter(|range| range.start_lsn < until)
            .collect();
        let mut segments: Vec<_> = ranges.iter().map(|range| range.segment).collect();
        segments.sort_unstable();
        segments.dedup();
        let mut count = 2;
        loop {
            let first = segments.len().saturating_sub(count);
            let Some(from) = segments.get(first) else {
                return Ok(None);
            };
            let wanted: Vec<&WalRange> = ranges
                .iter()
                .copied()
                .filter(|range| range.segment >= *from)
                .collect();
            let mut seen = Seen::new(self, until);
            self.decode(&wanted, &mut seen)?;
            // The record with the locks precedes the record with the running transactions, so it
            // may be in the previous segment.
            let complete = from.next().start_lsn(size);
            if first == 0 || seen.listed.is_some_and(|listed| listed >= complete) {
                return Ok(Some(seen.unfinished()));
            }
            count *= 4;
            if (count as u64).saturating_mul(size.bytes()) > SEARCH_MAX_BYTES {
                return Ok(None);
            }
        }
    }

    fn decode(&self, ranges: &[&WalRange], seen: &mut Seen<'_>) -> Result<()> {
        let mut decoder: Option<WalDecoder> = None;
        for range in ranges {
            let mut wal = self.archive.wal(range)?;
            let end = self.coverage.end_of(range);
            let counts = usize::try_from(end.bytes_since(range.start_lsn)).unwrap_or(usize::MAX);
            wal.truncate(counts);
            let decoder = decoder.get_or_insert_with(|| {
                WalDecoder::new(self.archive.wal_identity(), range.start_lsn, None)
            });
            let known = decoder.position().bytes_since(range.start_lsn);
            let known = usize::try_from(known).unwrap_or(usize::MAX);
            if let Some(fresh) = wal.get(known..) {
                decoder.push(fresh, seen).map_err(|error| Error::Wal {
                    lsn: error.lsn,
                    problem: error.to_string(),
                })?;
            }
        }
        Ok(())
    }
}

/// The effects of the records up to a stop.
struct Seen<'a> {
    until: Lsn,
    prepared: &'a BTreeSet<u32>,
    /// The transactions whose PREPARE is in the decoded WAL.
    prepared_here: BTreeSet<u32>,
    /// The locked relations by transaction: database and OID.
    locks: BTreeMap<u32, BTreeSet<(u32, u32)>>,
    removed: BTreeMap<u32, BTreeSet<RemovedFiles>>,
    /// The LSN of the last list of running transactions.
    listed: Option<Lsn>,
}

impl<'a> Seen<'a> {
    fn new(search: &'a Search<'_>, until: Lsn) -> Self {
        Self {
            until,
            prepared: &search.prepared,
            prepared_here: BTreeSet::new(),
            locks: BTreeMap::new(),
            removed: BTreeMap::new(),
            listed: None,
        }
    }

    fn unfinished(self) -> Unfinished {
        let locks = self.locks.into_iter().flat_map(|(xid, relations)| {
            relations
                .into_iter()
                .map(move |(database, relation)| HeldLock {
                    xid,
                    database,
                    relation,
                    name: None,
                })
        });
        Unfinished {
            locks: locks.collect(),
            removed: self.removed.into_values().flatten().collect(),
        }
    }

    /// Handles the end of a transaction and its subtransactions (`xl_xact_parsed_commit` in
    /// `xact.h`).
    fn ended(&mut self, record: &WalRecord<'_>) -> Option<()> {
        const HAS_INFO: u8 = 0x80;
        const HAS_DATABASE: u32 = 1;
        const HAS_SUBTRANSACTIONS: u32 = 1 << 1;
        const HAS_FILES: u32 = 1 << 2;
        const HAS_INVALIDATIONS: u32 = 1 << 3;
        const IS_PREPARED: u32 = 1 << 4;
        const HAS_STATISTICS: u32 = 1 << 8;
        let (info, data) = (record.header.info, record.main_data());
        self.forget(record.header.xid);
        if info & HAS_INFO == 0 {
            return None;
        }
        let mut rest = data.get(8..)?;
        let xinfo = take(&mut rest)?;
        if xinfo & HAS_DATABASE != 0 {
            skip(&mut rest, 2, 4)?;
        }
        if xinfo & HAS_SUBTRANSACTIONS != 0 {
            for _ in 0..take(&mut rest)? {
                let xid = take(&mut rest)?;
                self.forget(xid);
            }
        }
        if xinfo & HAS_FILES != 0 {
            let count = take(&mut rest)?;
            skip(&mut rest, count, 12)?;
        }
        if xinfo & HAS_STATISTICS != 0 && record.version >= PgVersion::V15 {
            let count = take(&mut rest)?;
            skip(&mut rest, count, statistics_bytes(record.version))?;
        }
        if xinfo & HAS_INVALIDATIONS != 0 && matches!(info & 0x70, COMMIT | COMMIT_PREPARED) {
            let count = take(&mut rest)?;
            skip(&mut rest, count, 16)?;
        }
        if xinfo & IS_PREPARED != 0 {
            let xid = take(&mut rest)?;
            self.forget(xid);
        }
        Some(())
    }

    fn forget(&mut self, xid: u32) {
        self.locks.remove(&xid);
        self.removed.remove(&xid);
        self.prepared_here.remove(&xid);
    }

    /// Adds the locks of `xl_standby_locks`.
    fn locked(&mut self, data: &[u8]) {
        let (locks, _) = data.get(4..).unwrap_or_default().as_chunks::<12>();
        for lock in locks {
            let field = |at: usize| u32_at(lock, at).unwrap_or_default();
            let relations = self.locks.entry(field(0)).or_default();
            relations.insert((field(4), field(8)));
        }
    }

    /// Handles `xl_running_xacts`: all transactions before the oldest one in it have ended, perhaps
    /// by a crash of the server (`StandbyReleaseOldLocks`).
    fn running(&mut self, data: &[u8]) {
        if let Some(oldest) = u32_at(data, 16) {
            let is_over = |xid: u32| xid.wrapping_sub(oldest).cast_signed() < 0;
            self.end_where(is_over);
        }
    }

    fn end_where(&mut self, is_over: impl Fn(u32) -> bool) {
        let prepared = |xid: u32| self.prepared.contains(&xid) || self.prepared_here.contains(&xid);
        self.locks.retain(|xid, _| prepared(*xid) || !is_over(*xid));
        // `removed` stays: a DROP DATABASE that a crash interrupts remains half done.
    }
}

/// `sizeof(xl_xact_stats_item)`.
fn statistics_bytes(version: PgVersion) -> usize {
    if version.major() >= 18 { 16 } else { 12 }
}

/// Splits a number off the front of `rest`.
fn take(rest: &mut &[u8]) -> Option<u32> {
    let (bytes, after) = rest.split_first_chunk()?;
    *rest = after;
    Some(u32::from_le_bytes(*bytes))
}

/// Skips `count` items of `bytes` bytes each.
fn skip(rest: &mut &[u8], count: u32, bytes: usize) -> Option<()> {
    let length = (count as usize).checked_mul(bytes)?;
    *rest = rest.get(length..)?;
    Some(())
}

fn u32_at(data: &[u8], at: usize) -> Option<u32> {
    let bytes = data.get(at..)?.first_chunk()?;
    Some(u32::from_le_bytes(*bytes))
}

impl RecordSink for Seen<'_> {
    fn window(&mut self, header: &RecordHeader) -> usize {
        match header.resource_manager {
            ResourceManager::TRANSACTION | ResourceManager::TABLESPACE | DATABASE | STANDBY => {
                WINDOW_BYTES
            }
            _ => 0,
        }
    }

    fn record(&mut self, record: &WalRecord<'_>) -> std::result::Result<(), DecodeErrorKind> {
        if record.lsn >= self.until {
            return Ok(());
        }
        let (xid, data) = (record.header.xid, record.main_data());
        let kind = record.header.info & 0xF0;
        let removes = |kind: &str, oid: u32| RemovedFiles {
            kind: kind.to_owned(),
            oid,
            xid,
            lsn: record.lsn,
        };
        let drop_of_database = if record.version >= PgVersion::V15 {
            DATABASE_DROP
        } else {
            DATABASE_DROP_BEFORE_15
        };
        match record.header.resource_manager {
            ResourceManager::TRANSACTION => match record.header.info & 0x70 {
                COMMIT | ABORT | COMMIT_PREPARED | ABORT_PREPARED => {
                    self.ended(record);
                }
                PREPARE => {
                    self.prepared_here.insert(xid);
                }
                _ => {}
            },
            STANDBY if kind == STANDBY_LOCK => self.locked(data),
            STANDBY if kind == RUNNING_XACTS => {
                self.running(data);
                self.listed = Some(record.lsn);
            }
            ResourceManager::XLOG if kind == SHUTDOWN => self.end_where(|_| true),
            // A record without a transaction belongs to the old location of a database that was
            // moved (`movedb`).
            DATABASE if kind == drop_of_database && xid != 0 => {
                let oid = u32_at(data, 0).unwrap_or_default();
                let removed = self.removed.entry(xid).or_default();
                // Before version 14 there is a record for each tablespace of the database.
                if removed.iter().all(|one| one.oid != oid) {
                    removed.insert(removes("database", oid));
                }
            }
            ResourceManager::TABLESPACE if kind == TABLESPACE_DROP => {
                let oid = u32_at(data, 0).unwrap_or_default();
                let removed = self.removed.entry(xid).or_default();
                removed.insert(removes("tablespace", oid));
            }
            _ => {}
        }
        Ok(())
    }
}
