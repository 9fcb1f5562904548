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
use rocksdb::{DB, IteratorMode};
use tempfile::TempDir;
use wal_format::{
    BackupId, BackupInfo, Branch, Lsn, PgTimestamp, SegmentSummary, TimelineHistory,
    TransactionEnd, WalEvent,
};

mod entries;
mod expired;
mod families;
mod keys;
mod missing;
mod open;
mod refresh;

use entries::starting_at;
use families::{Backups, CommitTimes, Family, META, RestorePoints, Segments, Timelines};
use keys::RangeKey;

pub use missing::Guard;
pub use refresh::RefreshReport;

/// The memory that RocksDB is configured to use: the block cache, and the write buffers, of which
/// two may be in use at the same time.
pub const MEMORY_BYTES: usize = open::BLOCK_CACHE_BYTES + 2 * open::WRITE_BUFFER_BYTES;

/// The number of tables, which are files, that a catalog keeps open.
pub const OPEN_TABLES_MAX: u64 = 14;

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
        let key = RangeKey::new(range);
        let mut batch = self.batch();
        batch.put::<Segments>(&key, range)?;
        batch.put_stored::<CommitTimes>(&key, &summary.encode(range.start_lsn));
        for (lsn, event) in &summary.events {
            if let WalEvent::RestorePoint { time, name } = event {
                let place = (range.branch, *lsn);
                batch.put::<RestorePoints>(&place, &(*time, name.clone()))?;
            }
        }
        batch.write()
    }

    /// Removes a range from the catalog. A restore point stays if another range contains it.
    ///
    /// # Errors
    /// [`Error::Catalog`].
    pub fn remove_range(&self, range: &WalRange) -> Result<()> {
        let key = RangeKey::new(range);
        let mut batch = self.batch();
        for (lsn, event) in self.events(range)? {
            if matches!(event, WalEvent::RestorePoint { .. }) && !self.held_elsewhere(range, lsn)? {
                batch.delete::<RestorePoints>(&(range.branch, lsn));
            }
        }
        batch.delete::<Segments>(&key);
        batch.delete::<CommitTimes>(&key);
        batch.write()
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
        for entry in self.entries::<Segments>(starting_at(&prefix)) {
            let (key, range) = entry?;
            if !key.as_bytes().starts_with(&prefix) {
                break;
            }
            found.push(range);
        }
        Ok(found)
    }

    /// Records a base backup.
    ///
    /// # Errors
    /// [`Error::Catalog`].
    pub fn put_backup(&self, backup: &BackupInfo) -> Result<()> {
        self.put::<Backups>(&backup.id, backup)
    }

    /// Removes a base backup from the catalog.
    ///
    /// # Errors
    /// [`Error::Catalog`].
    pub fn remove_backup(&self, id: &BackupId) -> Result<()> {
        self.delete::<Backups>(id)
    }

    /// Returns the base backups, oldest first.
    ///
    /// # Errors
    /// [`Error::Catalog`].
    pub fn backups(&self) -> Result<Vec<BackupInfo>> {
        self.entries::<Backups>(IteratorMode::Start)
            .map(|entry| Ok(entry?.1))
            .collect()
    }

    /// Records a timeline and its history file. `content` is `None` for timeline 1.
    ///
    /// # Errors
    /// [`Error::Catalog`].
    pub fn put_branch(&self, branch: Branch, content: Option<&[u8]>) -> Result<()> {
        let mut batch = self.batch();
        batch.put_stored::<Timelines>(&branch, content.unwrap_or_default());
        batch.write()
    }

    /// Returns the timelines by number, each with its parsed history and its history file. Timeline
    /// 1 has no history and an empty file.
    ///
    /// # Errors
    /// [`Error::CatalogEntry`] for a history that does not parse.
    pub fn branches(&self) -> Result<Vec<(Branch, Option<TimelineHistory>, Bytes)>> {
        let mut branches = Vec::new();
        for entry in self.entries::<Timelines>(IteratorMode::Start) {
            let (branch, (history, content)) = entry?;
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
        for entry in self.entries::<Segments>(starting_at(&start)) {
            let (key, range) = entry?;
            if !key.as_bytes().starts_with(&keys::branch(branch)) {
                break;
            }
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
        let found = self.get::<CommitTimes>(&RangeKey::new(range))?;
        found.ok_or_else(|| self.damaged(CommitTimes::NAME))
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
        for entry in self.entries::<RestorePoints>(IteratorMode::Start) {
            let ((branch, lsn), (time, name)) = entry?;
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
        for name in families::NAMES.into_iter().filter(|name| *name != META) {
            for (key, value) in self.stored(name)? {
                dump.insert((name.to_owned(), key), value);
            }
        }
        Ok(dump)
    }

    /// Returns the key of every recorded range, in key order.
    fn all_ranges(&self) -> Result<BTreeSet<RangeKey>> {
        self.keys::<Segments>().collect()
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
