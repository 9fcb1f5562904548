//! [`Catalog`]: the RocksDB index of one cluster's repository. A cache: everything in it is read
//! from the objects, and deleting it loses nothing.
//!
//! | family | key | value |
//! |---|---|---|
//! | `meta` | `identity` | [`ClusterIdentity`] as JSON |
//! | `meta` | `expired` | [`ExpiredSet`] as JSON: what counts as absent |
//! | `segments` | range key (branch, segment, kind, LSNs; `keys.rs`) | [`WalRange`] as JSON |
//! | `commit_times` | range key | the range's summary, as in the object's footer |
//! | `restore_points` | branch, LSN | name and time as JSON |
//! | `timelines` | branch | the history file, empty for timeline 1 |
//! | `backups` | name | `backup.json` |
//!
//! Numbers in keys are big-endian, so that RocksDB sorts keys in numerical order.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use bytes::Bytes;
#[cfg(doc)]
use repository::ExpiredSet;
use repository::{
    ClusterIdentity, Error, LostHistory, Missing, Repository, Result, WalIndex, WalRange,
    WalRangeKind,
};
use rocksdb::{ColumnFamily, DB, Direction, IteratorMode, WriteBatch};
use tempfile::TempDir;
use wal_format::{
    BackupId, BackupInfo, Branch, Lsn, PgTimestamp, SegmentSummary, TimelineHistory,
    TransactionEnd, WalEvent,
};

mod expired;
mod keys;
mod missing;
mod open;
mod refresh;

pub use missing::Guard;
pub use refresh::RefreshReport;

/// The memory that RocksDB is configured to use: the block cache, and the write buffers, of which
/// two may be in use at the same time.
pub const MEMORY_BYTES: usize = open::BLOCK_CACHE_BYTES + 2 * open::WRITE_BUFFER_BYTES;

/// The number of tables, which are files, that a catalog keeps open.
pub const OPEN_TABLES_MAX: u64 = 14;

const META: &str = "meta";
const SEGMENTS: &str = "segments";
const COMMIT_TIMES: &str = "commit_times";
const RESTORE_POINTS: &str = "restore_points";
const TIMELINES: &str = "timelines";
const BACKUPS: &str = "backups";
const FAMILIES: [&str; 6] = [
    META,
    SEGMENTS,
    COMMIT_TIMES,
    RESTORE_POINTS,
    TIMELINES,
    BACKUPS,
];
const IDENTITY: &[u8] = b"identity";
const EXPIRED: &[u8] = b"expired";

/// The index of one cluster's repository.
#[derive(Debug)]
pub struct Catalog {
    db: DB,
    path: PathBuf,
    identity: ClusterIdentity,
    /// Objects that could not be parsed when the catalog was opened for a restore.
    damaged_objects: Vec<(String, String)>,
    /// Timelines whose history file was lost when the catalog was opened for a restore.
    lost_histories: Vec<LostHistory>,
    /// The objects of the older catalog that the repository lacked when the catalog was opened for
    /// a restore.
    missing_objects: Missing,
    /// The directory of a temporary catalog. It is removed when the catalog is dropped.
    _temporary: Option<TempDir>,
}

impl Catalog {
    /// Returns the objects that could not be parsed when the catalog was [opened for a
    /// restore](Self::open_for_restore), with the reason. They count as missing. An object that was
    /// already in an older catalog was not read again.
    #[must_use]
    pub fn damaged_objects(&self) -> &[(String, String)] {
        &self.damaged_objects
    }

    /// Returns the timelines with archived WAL or backups whose history file was lost when the
    /// catalog was [opened for a restore](Self::open_for_restore).
    #[must_use]
    pub fn lost_histories(&self) -> &[LostHistory] {
        &self.lost_histories
    }

    /// Returns the objects of the older catalog that the repository lacked when the catalog was
    /// [opened for a restore](Self::open_for_restore). Accepted losses are included.
    #[must_use]
    pub fn missing_objects(&self) -> &Missing {
        &self.missing_objects
    }

    /// Returns the identity of the catalog's cluster.
    #[must_use]
    pub fn identity(&self) -> &ClusterIdentity {
        &self.identity
    }

    /// Records a stored range and its summary.
    ///
    /// # Errors
    /// [`Error::Catalog`].
    pub fn put_range(&self, range: &WalRange, summary: &SegmentSummary) -> Result<()> {
        let key = keys::range(range);
        let mut batch = WriteBatch::default();
        batch.put_cf(self.family(SEGMENTS), key, self.json(SEGMENTS, range)?);
        batch.put_cf(
            self.family(COMMIT_TIMES),
            key,
            summary.encode(range.start_lsn),
        );
        for (lsn, event) in &summary.events {
            if let WalEvent::RestorePoint { time, name } = event {
                let value = self.json(RESTORE_POINTS, &(time, name))?;
                batch.put_cf(
                    self.family(RESTORE_POINTS),
                    keys::position(range.branch, *lsn),
                    value,
                );
            }
        }
        self.db.write(batch).map_err(|error| self.failed(error))
    }

    /// Removes a range from the catalog. A restore point stays if another range contains it.
    ///
    /// # Errors
    /// [`Error::Catalog`].
    pub fn remove_range(&self, range: &WalRange) -> Result<()> {
        let key = keys::range(range);
        let mut batch = WriteBatch::default();
        for (lsn, event) in self.events(range)? {
            if matches!(event, WalEvent::RestorePoint { .. }) && !self.held_elsewhere(range, lsn)? {
                batch.delete_cf(
                    self.family(RESTORE_POINTS),
                    keys::position(range.branch, lsn),
                );
            }
        }
        batch.delete_cf(self.family(SEGMENTS), key);
        batch.delete_cf(self.family(COMMIT_TIMES), key);
        self.db.write(batch).map_err(|error| self.failed(error))
    }

    /// Returns true if a range other than `but` has an event at `lsn`.
    fn held_elsewhere(&self, but: &WalRange, lsn: Lsn) -> Result<bool> {
        for range in self.of_segment(but)? {
            if range != *but && self.events(&range)?.iter().any(|(at, _)| *at == lsn) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Returns every range of the segment of `like`: tails as well as the sealed segment.
    fn of_segment(&self, like: &WalRange) -> Result<Vec<WalRange>> {
        let prefix = keys::segment(like.branch, like.segment);
        let mut found = Vec::new();
        for entry in self.from(SEGMENTS, &prefix) {
            let (key, value) = entry.map_err(|error| self.failed(error))?;
            if !key.starts_with(&prefix) {
                break;
            }
            found.push(self.parse(SEGMENTS, &value)?);
        }
        Ok(found)
    }

    /// Records a base backup.
    ///
    /// # Errors
    /// [`Error::Catalog`].
    pub fn put_backup(&self, backup: &BackupInfo) -> Result<()> {
        let json = self.json(BACKUPS, backup)?;
        self.put(BACKUPS, backup.id.as_str().as_bytes(), &json)
    }

    /// Removes a base backup from the catalog.
    ///
    /// # Errors
    /// [`Error::Catalog`].
    pub fn remove_backup(&self, id: &BackupId) -> Result<()> {
        let deleted = self.db.delete_cf(self.family(BACKUPS), id.as_str());
        deleted.map_err(|error| self.failed(error))
    }

    /// Returns the base backups, oldest first.
    ///
    /// # Errors
    /// [`Error::Catalog`].
    pub fn backups(&self) -> Result<Vec<BackupInfo>> {
        self.all(BACKUPS)?
            .iter()
            .map(|(_, json)| self.parse(BACKUPS, json))
            .collect()
    }

    /// Records a timeline and its history file. `content` is `None` for timeline 1.
    ///
    /// # Errors
    /// [`Error::Catalog`].
    pub fn put_branch(&self, branch: Branch, content: Option<&[u8]>) -> Result<()> {
        self.put(
            TIMELINES,
            &keys::branch(branch),
            content.unwrap_or_default(),
        )
    }

    /// Returns the timelines by number, each with its parsed history and its history file. Timeline
    /// 1 has no history and an empty file.
    ///
    /// # Errors
    /// [`Error::CatalogEntry`] for a history that does not parse.
    pub fn branches(&self) -> Result<Vec<(Branch, Option<TimelineHistory>, Bytes)>> {
        let damaged = || self.damaged(TIMELINES);
        let mut branches = Vec::new();
        for (key, content) in self.all(TIMELINES)? {
            let branch = keys::parse_branch(&key).ok_or_else(damaged)?;
            let history = if content.is_empty() {
                None
            } else {
                Some(TimelineHistory::parse(branch.timeline, &content).map_err(|_| damaged())?)
            };
            branches.push((branch, history, Bytes::from(content)));
        }
        Ok(branches)
    }

    /// Returns the ranges of `branch` that overlap `[from, to)`, in order: sealed segments, and
    /// tails only for segments that are not sealed. Tails of two archivers may overlap, but none is
    /// completely inside a preceding one.
    ///
    /// # Errors
    /// [`Error::Catalog`].
    pub fn ranges(&self, branch: Branch, from: Lsn, to: Lsn) -> Result<Vec<WalRange>> {
        let size = self.identity.wal_segment_size;
        let start = keys::segment(branch, size.segment_of(from));
        let mut chosen: Vec<WalRange> = Vec::new();
        let mut tails: Vec<WalRange> = Vec::new();
        for entry in self.from(SEGMENTS, &start) {
            let (key, value) = entry.map_err(|error| self.failed(error))?;
            if !key.starts_with(&keys::branch(branch)) {
                break;
            }
            let range: WalRange = self.parse(SEGMENTS, &value)?;
            if range.start_lsn >= to {
                break;
            }
            if tails
                .last()
                .is_some_and(|tail| tail.segment != range.segment)
            {
                choose_tails(&mut chosen, std::mem::take(&mut tails));
            }
            // A sealed segment sorts before the tails of the same segment.
            let sealed = chosen
                .last()
                .is_some_and(|last| last.segment == range.segment);
            match range.kind {
                WalRangeKind::Sealed => chosen.push(range),
                WalRangeKind::Tail if !sealed => tails.push(range),
                WalRangeKind::Tail => {}
            }
        }
        choose_tails(&mut chosen, tails);
        chosen.retain(|range| range.end_lsn > from);
        Ok(chosen)
    }

    /// Returns the end of the WAL that is archived without a gap from `from` on, or `from` if there
    /// is none.
    ///
    /// # Errors
    /// [`Error::Catalog`].
    pub fn contiguous_end(&self, branch: Branch, from: Lsn) -> Result<Lsn> {
        let mut end = from;
        for range in self.ranges(branch, from, Lsn::MAX)? {
            if range.start_lsn > end {
                break;
            }
            end = end.max(range.end_lsn);
        }
        Ok(end)
    }

    /// Returns the summary from the footer of a range's object.
    ///
    /// # Errors
    /// [`Error::CatalogEntry`].
    pub fn summary(&self, range: &WalRange) -> Result<SegmentSummary> {
        let value = self.get(COMMIT_TIMES, &keys::range(range))?;
        let value = value.ok_or_else(|| self.damaged(COMMIT_TIMES))?;
        SegmentSummary::decode(range.start_lsn, &value).map_err(|_| self.damaged(COMMIT_TIMES))
    }

    /// Returns the transactions that end in a range, in LSN order.
    ///
    /// # Errors
    /// As [`Catalog::summary`].
    pub fn transactions(&self, range: &WalRange) -> Result<Vec<TransactionEnd>> {
        Ok(self.summary(range)?.transactions)
    }

    /// Returns the other events of a range, in LSN order.
    ///
    /// # Errors
    /// As [`Catalog::summary`].
    pub fn events(&self, range: &WalRange) -> Result<Vec<(Lsn, WalEvent)>> {
        Ok(self.summary(range)?.events)
    }

    /// Returns every restore point with its LSN, its time and its name.
    ///
    /// # Errors
    /// [`Error::CatalogEntry`].
    pub fn restore_points(&self) -> Result<Vec<(Branch, Lsn, PgTimestamp, String)>> {
        let mut points = Vec::new();
        for (key, value) in self.all(RESTORE_POINTS)? {
            let position = keys::parse_position(&key);
            let (branch, lsn) = position.ok_or_else(|| self.damaged(RESTORE_POINTS))?;
            let (time, name) = self.parse(RESTORE_POINTS, &value)?;
            points.push((branch, lsn, time, name));
        }
        Ok(points)
    }

    /// Makes the catalog equal to the repository: adds entries of new objects, and removes entries
    /// of objects that no longer exist. Reads the ends of objects, never their bodies.
    ///
    /// # Errors
    /// [`Error::Store`] when the repository cannot be listed or read. A damaged object is not an
    /// error: the report names it, and it counts as missing.
    pub fn refresh(&self, repository: &Repository) -> Result<RefreshReport> {
        self.refresh_guarded(repository, &Guard::NONE)
    }

    /// Refreshes the catalog as [`Catalog::refresh`] does, but passes missing objects to the guard
    /// before it removes their entries.
    ///
    /// # Errors
    /// Those of [`Catalog::refresh`], and the error of the guard.
    pub fn refresh_guarded(
        &self,
        repository: &Repository,
        guard: &Guard<'_>,
    ) -> Result<RefreshReport> {
        refresh::refresh(self, repository, guard)
    }

    /// Returns every entry of every family except `meta`, for comparisons.
    ///
    /// # Errors
    /// [`Error::Catalog`].
    pub fn dump(&self) -> Result<BTreeMap<(String, Vec<u8>), Vec<u8>>> {
        let mut dump = BTreeMap::new();
        for name in FAMILIES.into_iter().filter(|name| *name != META) {
            for (key, value) in self.all(name)? {
                dump.insert((name.to_owned(), key), value);
            }
        }
        Ok(dump)
    }

    /// Returns the key of every recorded range, in key order.
    fn all_ranges(&self) -> Result<BTreeSet<Vec<u8>>> {
        Ok(self
            .all(SEGMENTS)?
            .into_iter()
            .map(|(key, _)| key)
            .collect())
    }

    fn family(&self, name: &'static str) -> &ColumnFamily {
        self.db
            .cf_handle(name)
            .expect("BUG: every family is created at open")
    }

    fn from<'a>(
        &'a self,
        name: &'static str,
        key: &[u8],
    ) -> impl Iterator<Item = std::result::Result<(Box<[u8]>, Box<[u8]>), rocksdb::Error>> + 'a
    {
        self.db.iterator_cf(
            self.family(name),
            IteratorMode::From(key, Direction::Forward),
        )
    }

    fn all(&self, name: &'static str) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        self.db
            .iterator_cf(self.family(name), IteratorMode::Start)
            .map(|entry| {
                let (key, value) = entry.map_err(|error| self.failed(error))?;
                Ok((key.into_vec(), value.into_vec()))
            })
            .collect()
    }

    fn get(&self, name: &'static str, key: &[u8]) -> Result<Option<Vec<u8>>> {
        self.db
            .get_cf(self.family(name), key)
            .map_err(|error| self.failed(error))
    }

    fn put(&self, name: &'static str, key: &[u8], value: &[u8]) -> Result<()> {
        self.db
            .put_cf(self.family(name), key, value)
            .map_err(|error| self.failed(error))
    }

    fn json<T: serde::Serialize>(&self, name: &'static str, value: &T) -> Result<Vec<u8>> {
        serde_json::to_vec(value).map_err(|_| self.damaged(name))
    }

    fn parse<T: serde::de::DeserializeOwned>(&self, name: &'static str, json: &[u8]) -> Result<T> {
        serde_json::from_slice(json).map_err(|_| self.damaged(name))
    }

    fn failed(&self, source: rocksdb::Error) -> Error {
        Error::Catalog {
            path: self.path.clone(),
            source: source.into(),
        }
    }

    fn damaged(&self, family: &'static str) -> Error {
        Error::CatalogEntry {
            path: self.path.clone(),
            family,
        }
    }
}

impl WalIndex for Catalog {
    type Error = Error;

    fn ranges(&self, branch: Branch, from: Lsn, to: Lsn) -> Result<Vec<WalRange>> {
        Self::ranges(self, branch, from, to)
    }

    fn transactions(&self, range: &WalRange) -> Result<Vec<TransactionEnd>> {
        Self::transactions(self, range)
    }

    fn events(&self, range: &WalRange) -> Result<Vec<(Lsn, WalEvent)>> {
        Self::events(self, range)
    }
}

/// Adds those tails of one segment to `chosen` that extend the covered range. Of tails with the
/// same start, the longest comes first.
fn choose_tails(chosen: &mut Vec<WalRange>, mut tails: Vec<WalRange>) {
    tails.sort_by_key(|tail| (tail.start_lsn, std::cmp::Reverse(tail.end_lsn)));
    let mut end = Lsn::ZERO;
    for tail in tails {
        if tail.end_lsn > end {
            end = tail.end_lsn;
            chosen.push(tail);
        }
    }
}

#[cfg(test)]
mod tests;
