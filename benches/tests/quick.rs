//! The programs that PostgreSQL starts for every segment have no database in them, which would take several times as long to
//! start as they have to do.

use std::fs;

use benches::programs::{command, directory, ours};

/// How the linker names what belongs to RocksDB.
const OF_ROCKSDB: &[u8] = b"_ZN7rocksdb";

#[test]
fn what_starts_for_every_segment_has_no_database_in_it() {
    for name in ["wal-archiver", "pitr-restore"] {
        let has_one = |suffix: &str| {
            let program = ours(&format!("{name}{suffix}")).expect("it is built");
            let content = fs::read(program).expect("it is readable");
            content
                .windows(OF_ROCKSDB.len())
                .any(|word| word == OF_ROCKSDB)
        };
        assert!(has_one("-full"), "{name}-full");
        assert!(!has_one(""), "{name} starts with RocksDB in it");
    }
}

/// Half an installation is told as that, and never as "archived" or as the end of the archive.
#[test]
fn alone_it_names_what_is_missing() {
    let directory = directory().expect("a directory");
    for (name, asked, code) in [
        ("wal-archiver", ["push", "nothing"].as_slice(), 1),
        (
            "pitr-restore",
            &["wal-fetch", "000000010000000000000001", "x"],
            255,
        ),
    ] {
        let alone = directory.path().join(name);
        fs::copy(ours(name).expect("it is built"), &alone).expect("a copy");
        let output = command(&alone).expect("a command").args(asked).output();
        let output = output.expect("it runs");
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("install both programs"), "{said}");
    }
}
