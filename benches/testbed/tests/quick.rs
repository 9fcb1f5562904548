//! The programs that PostgreSQL starts for every segment do not contain the database: loading it
//! would take several times as long as their work.

use std::fs;

use testbed::{
    cluster::Cluster,
    programs::{command, directory, ours},
    tools::servers_or_skip,
};

/// The prefix that the linker gives to RocksDB's symbols.
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

/// An incomplete installation is reported as such, and never as "archived" or as the end of the
/// archive.
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

/// Without a daemon and without the full binary, the small binary only stores a segment in a
/// folder. Everything that it refuses is left to the full binary, which reports the reason.
#[test]
fn alone_it_archives_a_segment_in_a_folder() {
    let Some((_, bin)) = servers_or_skip().pop() else {
        return;
    };
    let cluster = Cluster::start(&bin, 1, "").expect("a server");
    let mut sql = cluster.connect().expect("a connection");
    let switch = "CREATE TABLE t AS SELECT 1; SELECT pg_walfile_name(pg_switch_wal())";
    let name = sql.simple_query(switch).expect("it switches");
    let name = name
        .iter()
        .find_map(|message| match message {
            postgres::SimpleQueryMessage::Row(row) => row.get(0),
            _ => None,
        })
        .expect("a name");
    let segment = cluster.data().join("pg_wal").join(name);

    let directory = directory().expect("a directory");
    let alone = directory.path().join("wal-archiver");
    fs::copy(ours("wal-archiver").expect("it is built"), &alone).expect("a copy");
    let push = |path: &std::path::Path| {
        let mut push = command(&alone).expect("a command");
        let root = directory.path().display();
        push.arg(format!("--repository=file://{root}/repository"));
        push.arg(format!("--spool={root}/spool"));
        let output = push.arg("push").arg(path).output().expect("it runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), said)
    };
    for _ in 0..2 {
        assert_eq!(push(&segment), (Some(0), String::new()));
    }
    let root = directory.path().join("repository/main");
    let archived = fs::read_dir(&root)
        .expect("a cluster's folder")
        .flatten()
        .find(|entry| !entry.file_name().to_string_lossy().starts_with("epoch"))
        .expect("a system's folder");
    let object = format!("wal/00000001/00000000/{name}.zst");
    let object = archived.path().join(object);
    let wal = fs::read(&segment).expect("a segment");
    let stored = fs::read(&object).expect("an object");
    let held = wal_format::SealedReader::open(&stored).expect("it is sound");
    let mut read = Vec::new();
    held.read_all(&mut read).expect("it is sound");
    assert!(read == wal, "other bytes are archived");

    let edited = directory.path().join(name);
    let mut other = wal;
    // Damages the address in the header of the third page.
    other[2 * 8192 + 8] ^= 1;
    fs::write(&edited, &other).expect("a file");
    fs::remove_file(&object).expect("it goes");
    let (code, said) = push(&edited);
    assert!(said.contains("install both programs"), "{said}");
    assert_eq!(code, Some(1));
    assert!(!object.exists(), "a damaged segment is archived");
}
