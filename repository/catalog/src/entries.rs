//! Typed access to the families of a catalog.

use repository::{Error, Result};
use rocksdb::{ColumnFamily, Direction, IteratorMode, WriteBatch};
use serde::Serialize;

use super::{
    Catalog,
    families::{Family, META, Single},
};

/// Returns the mode that begins at a stored key.
pub(super) fn starting_at(key: &[u8]) -> IteratorMode<'_> {
    IteratorMode::From(key, Direction::Forward)
}

/// Changes that become visible together.
pub(super) struct Batch<'a> {
    catalog: &'a Catalog,
    changes: WriteBatch,
}

impl Batch<'_> {
    /// Stores an entry as JSON.
    pub(super) fn put<F: Family<Value: Serialize>>(
        &mut self,
        key: &F::Key,
        value: &F::Value,
    ) -> Result<()> {
        let value = serde_json::to_vec(value).map_err(|_| self.catalog.damaged(F::NAME))?;
        self.put_stored::<F>(key, &value);
        Ok(())
    }

    /// Stores an entry whose value already has its stored form.
    pub(super) fn put_stored<F: Family>(&mut self, key: &F::Key, value: &[u8]) {
        let family = self.catalog.family(F::NAME);
        self.changes.put_cf(family, F::key(key), value);
    }

    /// Stores a single value.
    pub(super) fn put_single<S: Single>(&mut self, value: &S::Value) -> Result<()> {
        let json = serde_json::to_vec(value).map_err(|_| self.catalog.damaged(META))?;
        let family = self.catalog.family(META);
        self.changes.put_cf(family, S::KEY, json);
        Ok(())
    }

    /// Removes an entry. An entry that does not exist is not an error.
    pub(super) fn delete<F: Family>(&mut self, key: &F::Key) {
        let family = self.catalog.family(F::NAME);
        self.changes.delete_cf(family, F::key(key));
    }

    /// Removes the entries with stored keys in `[first, behind)`.
    pub(super) fn delete_between<F: Family>(&mut self, first: &[u8], behind: &[u8]) {
        let family = self.catalog.family(F::NAME);
        self.changes.delete_range_cf(family, first, behind);
    }

    /// Makes the changes.
    pub(super) fn write(self) -> Result<()> {
        let Self { catalog, changes } = self;
        catalog
            .db
            .write(changes)
            .map_err(|error| catalog.failed(error))
    }
}

impl Catalog {
    /// Returns an empty batch.
    pub(super) fn batch(&self) -> Batch<'_> {
        Batch {
            catalog: self,
            changes: WriteBatch::default(),
        }
    }

    pub(super) fn get<F: Family>(&self, key: &F::Key) -> Result<Option<F::Value>> {
        let stored = self.get_stored(F::NAME, &F::key(key))?;
        stored
            .map(|value| F::parse_value(key, &value).ok_or_else(|| self.damaged(F::NAME)))
            .transpose()
    }

    pub(super) fn put<F: Family<Value: Serialize>>(
        &self,
        key: &F::Key,
        value: &F::Value,
    ) -> Result<()> {
        let mut batch = self.batch();
        batch.put::<F>(key, value)?;
        batch.write()
    }

    pub(super) fn delete<F: Family>(&self, key: &F::Key) -> Result<()> {
        let mut batch = self.batch();
        batch.delete::<F>(key);
        batch.write()
    }

    pub(super) fn get_single<S: Single>(&self) -> Result<Option<S::Value>> {
        let stored = self.get_stored(META, S::KEY)?;
        stored.map(|json| self.parse_single::<S>(&json)).transpose()
    }

    pub(super) fn put_single<S: Single>(&self, value: &S::Value) -> Result<()> {
        let mut batch = self.batch();
        batch.put_single::<S>(value)?;
        batch.write()
    }

    /// Reads the stored form of a single value.
    pub(super) fn parse_single<S: Single>(&self, json: &[u8]) -> Result<S::Value> {
        serde_json::from_slice(json).map_err(|_| self.damaged(META))
    }

    /// Returns the entries of a family in the order of their keys.
    pub(super) fn entries<'a, F: Family>(
        &'a self,
        mode: IteratorMode<'_>,
    ) -> impl Iterator<Item = Result<(F::Key, F::Value)>> + use<'a, F> {
        let entries = self.db.iterator_cf(self.family(F::NAME), mode);
        entries.map(|entry| {
            let (key, value) = entry.map_err(|error| self.failed(error))?;
            let parsed = F::parse_key(&key)
                .and_then(|key| F::parse_value(&key, &value).map(|value| (key, value)));
            parsed.ok_or_else(|| self.damaged(F::NAME))
        })
    }

    /// Returns the keys of a family in their order. No value is parsed.
    pub(super) fn keys<F: Family>(&self) -> impl Iterator<Item = Result<F::Key>> {
        let entries = self
            .db
            .iterator_cf(self.family(F::NAME), IteratorMode::Start);
        entries.map(|entry| {
            let (key, _) = entry.map_err(|error| self.failed(error))?;
            F::parse_key(&key).ok_or_else(|| self.damaged(F::NAME))
        })
    }

    /// Returns the entries of a family in their stored form.
    pub(super) fn stored(&self, name: &'static str) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        self.db
            .iterator_cf(self.family(name), IteratorMode::Start)
            .map(|entry| {
                let (key, value) = entry.map_err(|error| self.failed(error))?;
                Ok((key.into_vec(), value.into_vec()))
            })
            .collect()
    }

    fn get_stored(&self, name: &'static str, key: &[u8]) -> Result<Option<Vec<u8>>> {
        self.db
            .get_cf(self.family(name), key)
            .map_err(|error| self.failed(error))
    }

    /// Returns RocksDB's handle of a family.
    pub(super) fn family(&self, name: &'static str) -> &ColumnFamily {
        self.db
            .cf_handle(name)
            .expect("BUG: every family is created at open")
    }

    pub(super) fn failed(&self, source: rocksdb::Error) -> Error {
        Error::Catalog {
            path: self.path.clone(),
            source: source.into(),
        }
    }

    pub(super) fn damaged(&self, family: &'static str) -> Error {
        Error::CatalogEntry {
            path: self.path.clone(),
            family,
        }
    }
}
