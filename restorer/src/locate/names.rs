//! The names of relations, from the `pg_class` of a backup and from rows that later WAL adds to it.
//!
//! WAL identifies relations by file numbers only. A relation whose row is in neither source is
//! shown by its numbers; names are never guessed.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use wal_format::{BackupInfo, RelationFile};

use crate::{
    Result, execute,
    heap::{Row, mapped, rows},
    inventory::Archive,
};

/// The OIDs of catalogs, which are the same in all versions.
const PG_CLASS: u32 = 1259;
const PG_DATABASE: u32 = 1262;
const PG_NAMESPACE: &str = "pg_namespace";
/// `DEFAULTTABLESPACE_OID`.
const DEFAULT_TABLESPACE: u32 = 1663;

/// Names of relations.
#[derive(Debug, Default)]
pub(super) struct Names {
    databases: HashMap<u32, String>,
    /// Schema by database and OID.
    schemas: HashMap<(u32, u32), String>,
    /// The schema's OID and the name, by database and file number.
    relations: HashMap<(u32, u32), (u32, String)>,
    /// The schema's OID and the name, by database and OID of the relation.
    oids: HashMap<(u32, u32), (u32, String)>,
    /// The file of `pg_class`, by database.
    classes: HashMap<u32, u32>,
}

impl Names {
    /// Reads the names of the relations of these databases as of the backup.
    pub(super) fn of_backup(
        archive: &Archive,
        backup: &BackupInfo,
        databases: &BTreeSet<u32>,
    ) -> Result<Self> {
        let manifest = archive.manifest(backup)?;
        let read = |names: BTreeSet<String>| {
            execute::files(&archive.repository, backup, &manifest, &names)
        };
        let mut names = Self::default();
        let map = |database: &u32| format!("base/{database}/pg_filenode.map");
        let mut maps: BTreeSet<String> = databases.iter().map(map).collect();
        maps.insert("global/pg_filenode.map".to_owned());
        let maps = read(maps)?;
        let shared = maps
            .get("global/pg_filenode.map")
            .and_then(|content| mapped(content, PG_DATABASE));
        let shared = shared.map(|file| format!("global/{file}"));
        for database in databases {
            let content = maps.get(&map(database));
            if let Some(file) = content.and_then(|content| mapped(content, PG_CLASS)) {
                names.classes.insert(*database, file);
            }
        }
        let path = |(database, file): (&u32, &u32)| format!("base/{database}/{file}");
        let mut wanted: BTreeSet<String> = names.classes.iter().map(path).collect();
        wanted.extend(shared.clone());
        let files = read(wanted)?;
        if let Some(content) = shared.and_then(|name| files.get(&name)) {
            let named = rows(content).filter_map(|row| Some((row.u32(0)?, row.name(4)?)));
            names.databases.extend(named);
        }
        for (database, file) in names.classes.clone() {
            let content = files.get(&path((&database, &file)));
            for row in content.into_iter().flat_map(|content| rows(content)) {
                names.learn(database, row);
            }
        }
        names.read_schemas(&read)?;
        Ok(names)
    }

    fn read_schemas(
        &mut self,
        read: &dyn Fn(BTreeSet<String>) -> Result<BTreeMap<String, Vec<u8>>>,
    ) -> Result<()> {
        let is_schemas = |(_, (_, name)): &(&(u32, u32), &(u32, String))| name == PG_NAMESPACE;
        let files: Vec<(u32, u32)> = self
            .relations
            .iter()
            .filter(is_schemas)
            .map(|(key, _)| *key)
            .collect();
        let path = |(database, file): &(u32, u32)| format!("base/{database}/{file}");
        let contents = read(files.iter().map(path).collect())?;
        for key in files {
            for row in contents
                .get(&path(&key))
                .into_iter()
                .flat_map(|content| rows(content))
            {
                if let (Some(oid), Some(name)) = (row.u32(0), row.name(4)) {
                    self.schemas.insert((key.0, oid), name);
                }
            }
        }
        Ok(())
    }

    /// Returns the database if the file is its `pg_class`.
    pub(super) fn is_class(&self, file: RelationFile) -> Option<u32> {
        let class = self.classes.get(&file.database);
        (file.tablespace == DEFAULT_TABLESPACE && class == Some(&file.relation))
            .then_some(file.database)
    }

    /// Adds a row of `pg_class` (`FormData_pg_class`; its first columns are the same since version
    /// 12).
    pub(super) fn learn(&mut self, database: u32, row: Row<'_>) {
        let columns = (row.name(4), row.u32(68), row.u32(88));
        let (Some(name), Some(schema), Some(file)) = columns else {
            return;
        };
        if let Some(oid) = row.u32(0) {
            self.oids.insert((database, oid), (schema, name.clone()));
        }
        if file != 0 {
            self.relations.insert((database, file), (schema, name));
        }
    }

    pub(super) fn database(&self, oid: u32) -> Option<String> {
        self.databases.get(&oid).cloned()
    }

    /// Returns `schema.name`, or the name alone if the schema is unknown.
    pub(super) fn relation(&self, file: RelationFile) -> Option<String> {
        let found = self.relations.get(&(file.database, file.relation))?;
        self.qualified(file.database, found)
    }

    /// Returns `schema.name` of the relation with this OID, or the name alone if the schema is
    /// unknown.
    pub(super) fn of_oid(&self, database: u32, oid: u32) -> Option<String> {
        self.qualified(database, self.oids.get(&(database, oid))?)
    }

    fn qualified(&self, database: u32, (schema, name): &(u32, String)) -> Option<String> {
        Some(match self.schemas.get(&(database, *schema)) {
            Some(schema) => format!("{schema}.{name}"),
            None => name.clone(),
        })
    }
}
