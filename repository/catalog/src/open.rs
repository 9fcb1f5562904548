//! Opens a catalog: the archiver's own, one in memory, or a temporary copy for a restore.

use std::{
    path::{Path, PathBuf},
    sync::OnceLock,
};

use repository::{ClusterIdentity, Error, Missing, Repository, Result, durable};
use rocksdb::{BlockBasedOptions, Cache, ColumnFamilyDescriptor, DB, Env, IteratorMode, Options};
use tempfile::TempDir;

use super::{
    Catalog, OPEN_TABLES_MAX,
    families::{self, Expired, Identity, META, Single},
};

/// The size of RocksDB's block cache in bytes, for all catalogs of the process together.
pub(super) const BLOCK_CACHE_BYTES: usize = 16 << 20;
/// The size of RocksDB's write buffers in bytes, for all families of a catalog together.
pub(super) const WRITE_BUFFER_BYTES: usize = 8 << 20;

impl Catalog {
    /// Opens or creates the catalog in `directory`. No other process can open it for writing
    /// meanwhile.
    ///
    /// # Errors
    /// [`Error::CatalogLocked`] if another process has it open, [`Error::CatalogMismatch`] if it
    /// belongs to another cluster, [`Error::Catalog`] if it is damaged.
    pub fn open(directory: &Path, identity: &ClusterIdentity) -> Result<Self> {
        durable::create_dir_all(directory).map_err(|error| Error::Catalog {
            path: directory.to_owned(),
            source: error.into(),
        })?;
        let path = directory.to_owned();
        Self::open_at(
            path.clone(),
            &path,
            options(),
            shared_cache(),
            identity,
            None,
        )
    }

    /// Creates a catalog in memory, for use when the disk cannot be written. It begins as a copy of
    /// the catalog in `directory`, or empty if that cannot be read, and is up to date after the
    /// next refresh.
    ///
    /// # Errors
    /// [`Error::Catalog`].
    pub fn open_in_memory(directory: &Path, identity: &ClusterIdentity) -> Result<Self> {
        let memory = Env::mem_env().map_err(|source| opening(directory, source))?;
        let mut options = options();
        options.set_env(&memory);
        // A path in the in-memory file system. Nothing is read or written in the real directory of
        // this name.
        let place = std::env::temp_dir();
        // RocksDB's statistics of a block cache keep the clock of the first database that asked for
        // them, which is freed with this database. So the cache is its own.
        let cache = Cache::new_lru_cache(BLOCK_CACHE_BYTES);
        let path = directory.to_owned();
        let catalog = Self::open_at(path, &place, options, &cache, identity, None)?;
        if directory.join("CURRENT").is_file()
            && let Err(error) = catalog.copy_from(directory)
        {
            tracing::warn!(%error, "the catalog on disk cannot be read; reading the repository instead");
            catalog.clear()?;
        }
        Ok(catalog)
    }

    /// Creates an empty catalog in a temporary directory, which is removed with it.
    fn open_temporary(identity: &ClusterIdentity) -> Result<Self> {
        let temporary = tempfile::Builder::new()
            .prefix("tidemark-catalog-")
            .tempdir()
            .map_err(Error::store("create a directory in", std::env::temp_dir()))?;
        let path = temporary.path().join("catalog");
        let place = path.clone();
        Self::open_at(
            path,
            &place,
            options(),
            shared_cache(),
            identity,
            Some(temporary),
        )
    }

    fn open_at(
        path: PathBuf,
        place: &Path,
        mut options: Options,
        cache: &Cache,
        identity: &ClusterIdentity,
        temporary: Option<TempDir>,
    ) -> Result<Self> {
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        let families =
            families::NAMES.map(|name| ColumnFamilyDescriptor::new(name, family_options(cache)));
        let db = DB::open_cf_descriptors(&options, place, families)
            .map_err(|source| opening(&path, source))?;
        let catalog = Self {
            db,
            path,
            identity: identity.clone(),
            damaged_objects: Vec::new(),
            lost_histories: Vec::new(),
            missing_objects: Missing::default(),
            _temporary: temporary,
        };
        match catalog.get_single::<Identity>()? {
            None => catalog.put_single::<Identity>(identity)?,
            Some(found) => {
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

    /// Opens a temporary catalog for reading that is equal to the repository as it is now. It is
    /// copied from the catalog in `directory`, even that of a running archiver. Without a catalog,
    /// or if it is damaged, everything is read from the repository.
    ///
    /// # Errors
    /// [`Error::Config`] when the repository contains nothing of the cluster, [`Error::Store`] when
    /// it cannot be read.
    pub fn open_for_restore(directory: Option<&Path>, repository: &Repository) -> Result<Self> {
        let Some(identity) = repository.identity_to_restore()? else {
            return Err(Error::config(format!(
                "{} holds nothing of cluster {}; check --repository and --cluster",
                repository.url(),
                repository.cluster()
            )));
        };
        let mut catalog = Self::open_temporary(&identity)?;
        if let Some(directory) = directory.filter(|directory| directory.join("CURRENT").is_file())
            && let Err(error) = catalog.copy_from(directory)
        {
            // Programs that report damaged objects themselves silence this crate. The separate
            // target keeps this warning visible.
            tracing::warn!(
                target: "catalog_unusable", event = "catalog_unusable", %error,
                "the catalog cannot be used; reading the repository instead"
            );
            catalog.clear()?;
        }
        let (report, missing) = catalog.refresh_and_compare(repository)?;
        catalog.missing_objects = missing;
        catalog.damaged_objects = report.damaged;
        for lost in &report.lost_histories {
            let key = lost.key(identity.system_identifier).to_string();
            catalog.damaged_objects.push((key, lost.to_string()));
        }
        catalog.lost_histories = report.lost_histories;
        Ok(catalog)
    }

    /// Opens the catalog of a running archiver for reading, in its present state and without its
    /// lock.
    ///
    /// # Errors
    /// [`Error::Catalog`] when there is none, [`Error::CatalogMismatch`] if it belongs to another
    /// cluster.
    pub fn open_read_only(directory: &Path, identity: &ClusterIdentity) -> Result<Self> {
        let db = DB::open_cf_for_read_only(&options(), directory, families::NAMES, false)
            .map_err(|source| opening(directory, source))?;
        let catalog = Self {
            db,
            path: directory.to_owned(),
            identity: identity.clone(),
            damaged_objects: Vec::new(),
            lost_histories: Vec::new(),
            missing_objects: Missing::default(),
            _temporary: None,
        };
        match catalog.get_single::<Identity>()? {
            Some(found) if found.system_identifier == identity.system_identifier => Ok(catalog),
            found => Err(Error::CatalogMismatch {
                path: catalog.path,
                expected: identity.system_identifier.to_string(),
                found: found.map_or_else(String::new, |one| one.system_identifier.to_string()),
            }),
        }
    }

    /// Creates a temporary copy of the catalog in `directory`, which may be in use.
    pub(super) fn copy_of(directory: &Path, identity: &ClusterIdentity) -> Result<Self> {
        let copy = Self::open_temporary(identity)?;
        copy.copy_from(directory)?;
        Ok(copy)
    }

    /// Copies another catalog, which may be in use, into this empty one.
    fn copy_from(&self, directory: &Path) -> Result<()> {
        let failed = |source| opening(directory, source);
        let other = DB::open_cf_for_read_only(&options(), directory, families::NAMES, false)
            .map_err(failed)?;
        for name in families::NAMES {
            let Some(family) = other.cf_handle(name) else {
                continue;
            };
            for entry in other.iterator_cf(family, IteratorMode::Start) {
                let (key, value) = entry.map_err(failed)?;
                if name == META {
                    self.check_meta(&key, &value, directory)?;
                }
                self.db
                    .put_cf(self.family(name), key, value)
                    .map_err(|error| self.failed(error))?;
            }
        }
        Ok(())
    }

    /// Checks an entry of `meta` from the catalog in `directory`. Fails if the entry cannot be used
    /// here.
    fn check_meta(&self, key: &[u8], value: &[u8], directory: &Path) -> Result<()> {
        match key {
            Identity::KEY => {
                let found = self.parse_single::<Identity>(value)?;
                if found.system_identifier != self.identity.system_identifier {
                    return Err(Error::CatalogMismatch {
                        path: directory.to_owned(),
                        expected: self.identity.system_identifier.to_string(),
                        found: found.system_identifier.to_string(),
                    });
                }
                Ok(())
            }
            Expired::KEY => self.parse_single::<Expired>(value).map(drop),
            _ => Err(self.damaged(META)),
        }
    }

    /// Removes every entry except the identity.
    fn clear(&self) -> Result<()> {
        for name in families::NAMES {
            for (key, _) in self.stored(name)? {
                if name == META && key == Identity::KEY {
                    continue;
                }
                self.db
                    .delete_cf(self.family(name), key)
                    .map_err(|e| self.failed(e))?;
            }
        }
        Ok(())
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
    // RocksDB reserves ten files for other purposes than tables.
    options.set_max_open_files(i32::try_from(OPEN_TABLES_MAX + 10).unwrap_or(i32::MAX));
    options.set_keep_log_file_num(2);
    options.set_db_write_buffer_size(WRITE_BUFFER_BYTES);
    options.set_max_background_jobs(2);
    options
}

/// The block cache of every catalog on disk.
fn shared_cache() -> &'static Cache {
    static CACHE: OnceLock<Cache> = OnceLock::new();
    CACHE.get_or_init(|| Cache::new_lru_cache(BLOCK_CACHE_BYTES))
}

fn family_options(cache: &Cache) -> Options {
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_cache(cache);
    blocks.set_cache_index_and_filter_blocks(true);
    let mut options = Options::default();
    options.set_block_based_table_factory(&blocks);
    options.set_write_buffer_size(WRITE_BUFFER_BYTES / 2);
    options.set_compression_type(rocksdb::DBCompressionType::Zstd);
    options
}
