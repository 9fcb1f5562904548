//! A catalog in memory and catalogs on disk in one process.

use super::*;

/// Makes RocksDB walk through the block cache, as its periodic statistics do.
fn walk_cache(catalog: &Catalog) {
    let family = catalog.family(Segments::NAME);
    let statistics = catalog
        .db
        .property_value_cf(family, "rocksdb.block-cache-entry-stats")
        .expect("RocksDB answers");
    assert!(statistics.is_some(), "the property exists");
}

/// The collector of these statistics lives in the block cache and keeps the clock of the first
/// database that asked for them. If that database was in memory, its clock is gone with it.
#[test]
fn a_catalog_on_disk_does_not_use_the_clock_of_one_that_was_in_memory() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("catalog");
    let memory = Catalog::open_in_memory(&path, &identity()).expect("a catalog in memory");
    walk_cache(&memory);
    drop(memory);
    let disk = Catalog::open(&path, &identity()).expect("a catalog on disk");
    walk_cache(&disk);
}
