//! [`Catalog`]: the RocksDB index of one cluster's repository. A cache: everything in it is read from the objects, and
//! deleting it loses nothing.
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
//! Numbers in keys are big-endian, so that RocksDB's order is theirs.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::OnceLock,
};

use bytes::Bytes;
#[cfg(doc)]
use repository::ExpiredSet;
use repository::{
    ClusterIdentity, Error, LostHistory, Repository, Result, WalIndex, WalRange, WalRangeKind,
    durable,
};
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, Direction, Env,
    IteratorMode, Options, WriteBatch,
};
use tempfile::TempDir;
use wal_format::{
    BackupId, BackupInfo, Branch, Lsn, PgTimestamp, SegmentSummary, TimelineHistory,
    TransactionEnd, WalEvent,
};

mod expired;
mod keys;
mod refresh;

pub use refresh::RefreshReport;

/// Bytes of blocks read that RocksDB may keep, for all catalogs of the process together.
const BLOCK_CACHE_BYTES: usize = 16 << 20;
/// What RocksDB collects of writes before it makes a file, for all families together.
const WRITE_BUFFER_BYTES: usize = 8 << 20;
/// The memory that RocksDB is configured to use: the block cache, and write buffers, of which two may be in flight.
pub const MEMORY_BYTES: usize = BLOCK_CACHE_BYTES + 2 * WRITE_BUFFER_BYTES;

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
    /// Objects that could not be understood when it was opened for a restore.
    damaged_objects: Vec<(String, String)>,
    /// Timelines whose history file was lost when it was opened for a restore.
    lost_histories: Vec<LostHistory>,
    /// Holds the directory of a catalog that lives only as long as this.
    _temporary: Option<TempDir>,
}

impl Catalog {
    /// Opens or creates the catalog in `directory`; no other process can while it is open.
    ///
    /// # Errors
    /// [`Error::CatalogLocked`], [`Error::CatalogMismatch`] for another cluster's, [`Error::Catalog`] for a damaged one.
    pub fn open(directory: &Path, identity: &ClusterIdentity) -> Result<Self> {
        durable::create_dir_all(directory).map_err(|error| Error::Catalog {
            path: directory.to_owned(),
            source: error.into(),
        })?;
        let path = directory.to_owned();
        Self::open_at(path.clone(), &path, options(), identity, None)
    }

    /// A catalog that lives in memory, for a disk that takes nothing: with what can be read of the
    /// one in `directory`, and up to date after the next refresh.
    ///
    /// # Errors
    /// [`Error::Catalog`].
    pub fn open_in_memory(directory: &Path, identity: &ClusterIdentity) -> Result<Self> {
        let memory = Env::mem_env().map_err(|source| opening(directory, source))?;
        let mut options = options();
        options.set_env(&memory);
        // A place in that memory; nothing is read or written below the directory of this name.
        let place = std::env::temp_dir();
        let catalog = Self::open_at(directory.to_owned(), &place, options, identity, None)?;
        if directory.join("CURRENT").is_file()
            && let Err(error) = catalog.copy_from(directory)
        {
            tracing::warn!(%error, "the catalog on disk cannot be read; reading the repository instead");
            catalog.clear()?;
        }
        Ok(catalog)
    }

    fn open_at(
        path: PathBuf,
        place: &Path,
        mut options: Options,
        identity: &ClusterIdentity,
        temporary: Option<TempDir>,
    ) -> Result<Self> {
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        let families = FAMILIES.map(|name| ColumnFamilyDescriptor::new(name, family_options()));
        let db = DB::open_cf_descriptors(&options, place, families)
            .map_err(|source| opening(&path, source))?;
        let catalog = Self {
            db,
            path,
            identity: identity.clone(),
            damaged_objects: Vec::new(),
            lost_histories: Vec::new(),
            _temporary: temporary,
        };
        match catalog.get(META, IDENTITY)? {
            None => {
                let json = catalog.json(META, identity)?;
                catalog.put(META, IDENTITY, &json)?;
            }
            Some(json) => {
                let found: ClusterIdentity = catalog.parse(META, &json)?;
                if found.system_identifier != identity.system_identifier
                    || found.wal_segment_size != identity.wal_segment_size
                {
                    let expected = format!("system identifier {}", identity.system_identifier);
                    let found = format!("system identifier {}", found.system_identifier);
                    return Err(Error::CatalogMismatch {
                        path: catalog.path,
                        expected,
                        found,
                    });
                }
            }
        }
        Ok(catalog)
    }

    /// A catalog for reading, true to the repository as it is now. The one in `directory` is used
    /// when it can be; a running archiver's is copied; without one, or with a damaged one,
    /// everything is read from the repository.
    ///
    /// # Errors
    /// [`Error::Config`] when the repository holds nothing of the cluster, [`Error::Store`] when it
    /// cannot be read.
    pub fn open_for_restore(directory: Option<&Path>, repository: &Repository) -> Result<Self> {
        let Some(identity) = repository.identity_to_restore()? else {
            return Err(Error::config(format!(
                "{} holds nothing of cluster {}; check --repository and --cluster",
                repository.url(),
                repository.cluster()
            )));
        };
        let temporary = tempfile::Builder::new()
            .prefix("tidemark-catalog-")
            .tempdir()
            .map_err(Error::store("create a directory in", std::env::temp_dir()))?;
        let path = temporary.path().join("catalog");
        let place = path.clone();
        let mut catalog = Self::open_at(path, &place, options(), &identity, Some(temporary))?;
        if let Some(directory) = directory.filter(|directory| directory.join("CURRENT").is_file())
            && let Err(error) = catalog.copy_from(directory)
        {
            tracing::warn!(%error, "the catalog can not be used; reading the repository instead");
            catalog.clear()?;
        }
        let report = catalog.refresh(repository)?;
        catalog.damaged_objects = report.damaged;
        for lost in &report.lost_histories {
            let key = lost.key(identity.system_identifier).to_string();
            catalog.damaged_objects.push((key, lost.to_string()));
        }
        catalog.lost_histories = report.lost_histories;
        Ok(catalog)
    }

    /// The catalog of a running archiver, for looking things up: as it is now, and without its lock.
    ///
    /// # Errors
    /// [`Error::Catalog`] when there is none, [`Error::CatalogMismatch`] for another cluster's.
    pub fn open_read_only(directory: &Path, identity: &ClusterIdentity) -> Result<Self> {
        let db = DB::open_cf_for_read_only(&options(), directory, FAMILIES, false)
            .map_err(|source| opening(directory, source))?;
        let catalog = Self {
            db,
            path: directory.to_owned(),
            identity: identity.clone(),
            damaged_objects: Vec::new(),
            lost_histories: Vec::new(),
            _temporary: None,
        };
        let found = catalog.get(META, IDENTITY)?;
        let found = found.map(|json| catalog.parse::<ClusterIdentity>(META, &json));
        match found.transpose()? {
            Some(found) if found.system_identifier == identity.system_identifier => Ok(catalog),
            found => Err(Error::CatalogMismatch {
                path: catalog.path,
                expected: identity.system_identifier.to_string(),
                found: found.map_or_else(String::new, |one| one.system_identifier.to_string()),
            }),
        }
    }

    /// Copies another catalog, which may be in use, into this empty one.
    fn copy_from(&self, directory: &Path) -> Result<()> {
        let failed = |source| opening(directory, source);
        let other =
            DB::open_cf_for_read_only(&options(), directory, FAMILIES, false).map_err(failed)?;
        for name in FAMILIES {
            let Some(family) = other.cf_handle(name) else {
                continue;
            };
            for entry in other.iterator_cf(family, IteratorMode::Start) {
                let (key, value) = entry.map_err(failed)?;
                if name == META {
                    let found: ClusterIdentity = self.parse(META, &value)?;
                    if found.system_identifier != self.identity.system_identifier {
                        return Err(Error::CatalogMismatch {
                            path: directory.to_owned(),
                            expected: self.identity.system_identifier.to_string(),
                            found: found.system_identifier.to_string(),
                        });
                    }
                }
                self.put(name, &key, &value)?;
            }
        }
        Ok(())
    }

    fn clear(&self) -> Result<()> {
        for name in FAMILIES.into_iter().filter(|name| *name != META) {
            for (key, _) in self.all(name)? {
                self.db
                    .delete_cf(self.family(name), key)
                    .map_err(|e| self.failed(e))?;
            }
        }
        Ok(())
    }

    /// Objects that could not be understood when it was [opened for a restore](Self::open_for_restore), with the
    /// reason. They count as missing; one that an older catalog knows already was not read again.
    #[must_use]
    pub fn damaged_objects(&self) -> &[(String, String)] {
        &self.damaged_objects
    }

    /// Timelines of which something is archived and whose history file was lost when the catalog was
    /// [opened for a restore](Self::open_for_restore).
    #[must_use]
    pub fn lost_histories(&self) -> &[LostHistory] {
        &self.lost_histories
    }

    /// Whose catalog it is.
    #[must_use]
    pub fn identity(&self) -> &ClusterIdentity {
        &self.identity
    }

    /// Records a stored range and what it holds.
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

    /// Forgets a range. Its restore points stay while another range holds them.
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

    /// Returns true if a range other than `but` tells of the record at `lsn`.
    fn held_elsewhere(&self, but: &WalRange, lsn: Lsn) -> Result<bool> {
        for range in self.of_segment(but)? {
            if range != *but && self.events(&range)?.iter().any(|(at, _)| *at == lsn) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Every range, tails beside sealed segments, of the segment that `like` belongs to.
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

    /// Forgets a base backup.
    ///
    /// # Errors
    /// [`Error::Catalog`].
    pub fn remove_backup(&self, id: &BackupId) -> Result<()> {
        let deleted = self.db.delete_cf(self.family(BACKUPS), id.as_str());
        deleted.map_err(|error| self.failed(error))
    }

    /// The base backups, oldest first.
    ///
    /// # Errors
    /// [`Error::Catalog`].
    pub fn backups(&self) -> Result<Vec<BackupInfo>> {
        self.all(BACKUPS)?
            .iter()
            .map(|(_, json)| self.parse(BACKUPS, json))
            .collect()
    }

    /// Records a timeline and its history file; `None` for timeline 1.
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

    /// The timelines in order of their numbers, with their history.
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

    /// The ranges of `branch` that reach into `[from, to)`, in order: sealed segments, and tails only where there is no
    /// sealed one. Tails of two archivers may overlap; none lies wholly inside of what comes before it.
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

    /// The end of the WAL that is held without a gap from `from` on; `from` itself where nothing is.
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

    /// Everything that the footer of a range's object says.
    ///
    /// # Errors
    /// [`Error::CatalogEntry`].
    pub fn summary(&self, range: &WalRange) -> Result<SegmentSummary> {
        let value = self.get(COMMIT_TIMES, &keys::range(range))?;
        let value = value.ok_or_else(|| self.damaged(COMMIT_TIMES))?;
        SegmentSummary::decode(range.start_lsn, &value).map_err(|_| self.damaged(COMMIT_TIMES))
    }

    /// The transactions that end in a range, in LSN order.
    ///
    /// # Errors
    /// As [`Catalog::summary`].
    pub fn transactions(&self, range: &WalRange) -> Result<Vec<TransactionEnd>> {
        Ok(self.summary(range)?.transactions)
    }

    /// The other events of a range, in LSN order.
    ///
    /// # Errors
    /// As [`Catalog::summary`].
    pub fn events(&self, range: &WalRange) -> Result<Vec<(Lsn, WalEvent)>> {
        Ok(self.summary(range)?.events)
    }

    /// Every restore point: where, when, and its name.
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

    /// Makes the catalog equal to the repository: adds what only the repository has, forgets what
    /// it has no more. Reads the ends of objects, never their bodies.
    ///
    /// # Errors
    /// [`Error::Store`] when the repository cannot be listed or read. A damaged object is no error:
    /// it is named in the report and counts as missing.
    pub fn refresh(&self, repository: &Repository) -> Result<RefreshReport> {
        refresh::refresh(self, repository)
    }

    /// Every entry of every family but `meta`, for comparisons.
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

    /// Every range that is recorded, in key order.
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
}

/// Of the tails of one segment: those that carry the coverage forward, the longest first where several begin in it.
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

fn opening(path: &Path, source: rocksdb::Error) -> Error {
    let path = path.to_owned();
    let text = source.to_string();
    if text.contains("lock file") || text.contains("While lock") || text.contains("lock hold") {
        return Error::CatalogLocked { path };
    }
    Error::Catalog {
        path,
        source: source.into(),
    }
}

fn options() -> Options {
    let mut options = Options::default();
    options.set_max_open_files(256);
    options.set_keep_log_file_num(2);
    options.set_db_write_buffer_size(WRITE_BUFFER_BYTES);
    options.set_max_background_jobs(2);
    options
}

fn family_options() -> Options {
    static CACHE: OnceLock<Cache> = OnceLock::new();
    let cache = CACHE.get_or_init(|| Cache::new_lru_cache(BLOCK_CACHE_BYTES));
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_cache(cache);
    blocks.set_cache_index_and_filter_blocks(true);
    let mut options = Options::default();
    options.set_block_based_table_factory(&blocks);
    options.set_write_buffer_size(WRITE_BUFFER_BYTES / 2);
    options.set_compression_type(rocksdb::DBCompressionType::Zstd);
    options
}

#[cfg(test)]
mod tests;
