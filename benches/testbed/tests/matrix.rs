//! The main job on every installed PostgreSQL, with every segment size, with and without checksums,
//! with every `wal_compression`, and with an archiver that is killed repeatedly.
//!
//! `TIDEMARK_LONG=1` covers every pair of values, and kills a hundred times.

use std::{collections::BTreeSet, path::PathBuf, time::Duration};

use testbed::{
    main_job,
    tools::{MAJORS, servers_or_skip},
};

const SEGMENT_MIB: [u32; 3] = [1, 16, 64];
const WAL_COMPRESSION: [&str; 4] = ["off", "pglz", "lz4", "zstd"];

/// A row of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Row {
    major: u16,
    segment_mib: u32,
    checksums: bool,
    wal_compression: &'static str,
}

const fn row(major: u16, segment_mib: u32, checksums: bool, wal_compression: &'static str) -> Row {
    Row {
        major,
        segment_mib,
        checksums,
        wal_compression,
    }
}

/// Rows that contain each value at least once.
const SHORT: [Row; 6] = [
    row(13, 1, true, "pglz"),
    row(14, 16, false, "off"),
    row(15, 64, true, "lz4"),
    row(16, 1, false, "zstd"),
    row(17, 16, true, "off"),
    row(18, 64, false, "lz4"),
];

/// Returns rows that contain each pair of values at least once. Before version 15 a server has only
/// one compression method, which replaces the others.
fn long() -> Vec<Row> {
    let mut rows = Vec::new();
    for (at, major) in MAJORS.into_iter().enumerate() {
        for (method, wal_compression) in WAL_COMPRESSION.into_iter().enumerate() {
            let wal_compression = match wal_compression {
                "lz4" | "zstd" if major < 15 => "pglz",
                known => known,
            };
            let segment_mib = SEGMENT_MIB[(at + method) % 3];
            rows.push(row(
                major,
                segment_mib,
                (at + method / 2) % 2 == 0,
                wal_compression,
            ));
        }
    }
    rows
}

fn job(bin: PathBuf, segment_mib: u32, kill_archiver: bool) -> main_job::Job {
    main_job::Job {
        bin,
        segment_mib,
        checksums: true,
        wal_compression: "off",
        clients: 4,
        load: Duration::from_secs(3),
        kill_archiver,
        kills: 0,
        standbys: "tidemark",
        synchronous_commit: "on",
        http: "127.0.0.1:0".to_owned(),
    }
}

#[test]
fn nothing_acknowledged_is_lost_on_any_server() {
    let servers = servers_or_skip();
    let rows = if testbed::is_long() {
        long()
    } else {
        SHORT.to_vec()
    };
    let mut compressed = BTreeSet::new();
    for (at, row) in rows.into_iter().enumerate() {
        let Some((_, bin)) = servers.iter().find(|(major, _)| *major == row.major) else {
            continue;
        };
        let job = main_job::Job {
            checksums: row.checksums,
            wal_compression: row.wal_compression,
            ..job(bin.clone(), row.segment_mib, at % 2 == 1)
        };
        let outcome = main_job::run(&job, &|text| eprintln!("{row:?}: {text}"))
            .unwrap_or_else(|error| panic!("{row:?}: {error:?}"));
        assert!(outcome.latest.acknowledged > 50, "{row:?}: {outcome:?}");
        assert!(
            outcome.middle.present < outcome.latest.present,
            "{row:?}: {outcome:?}"
        );
        compressed.insert(outcome.wal_compression);
    }
    // Debian's builds and the installer's builds together support every method.
    if servers.len() == MAJORS.len() {
        assert_eq!(compressed.len(), WAL_COMPRESSION.len(), "{compressed:?}");
    }
}

#[test]
fn the_short_table_has_every_value_and_the_long_one_every_pair() {
    let values = |row: &Row| {
        [
            row.major.to_string(),
            row.segment_mib.to_string(),
            row.checksums.to_string(),
            row.wal_compression.to_owned(),
        ]
    };
    let short: BTreeSet<(usize, String)> = SHORT
        .iter()
        .flat_map(|row| values(row).into_iter().enumerate())
        .collect();
    assert_eq!(short.len(), 6 + 3 + 2 + 4);
    let pairs = |left: usize, right: usize| {
        let met: BTreeSet<_> = long()
            .iter()
            .map(|row| (values(row)[left].clone(), values(row)[right].clone()))
            .collect();
        met.len()
    };
    assert_eq!(pairs(0, 1), 6 * 3);
    assert_eq!(pairs(0, 2), 6 * 2);
    assert_eq!(pairs(0, 3), 4 * 4 + 2 * 2);
    assert_eq!(pairs(1, 2), 3 * 2);
    assert_eq!(pairs(1, 3), 3 * 4);
    assert_eq!(pairs(2, 3), 2 * 4);
}

#[test]
fn killed_again_and_again_the_archiver_loses_nothing_acknowledged() {
    let Some((major, bin)) = servers_or_skip().pop() else {
        return;
    };
    let kills = if testbed::is_long() { 100 } else { 6 };
    // Segments are small, so that kills interrupt every step of completing one.
    let job = main_job::Job {
        kills,
        ..job(bin, 1, true)
    };
    let outcome = main_job::run(&job, &|text| eprintln!("PostgreSQL {major}: {text}"))
        .unwrap_or_else(|error| panic!("PostgreSQL {major}: {error:?}"));
    assert!(outcome.latest.acknowledged > 50, "{outcome:?}");
}

/// A commit that was acknowledged because our copy alone had it is restored, whether we are a
/// member of ANY or of FIRST: the other standby in the list never connects.
#[test]
fn killed_as_a_member_of_any_or_first_it_loses_nothing_acknowledged() {
    let kills = if testbed::is_long() { 30 } else { 2 };
    let servers = servers_or_skip();
    for (at, (standbys, synchronous_commit)) in [
        ("ANY 1 (tidemark, other)", "on"),
        ("FIRST 1 (other, tidemark)", "remote_write"),
    ]
    .into_iter()
    .enumerate()
    {
        // Use the oldest and the newest server.
        let found = if at == 0 {
            servers.first()
        } else {
            servers.last()
        };
        let Some((major, bin)) = found else { return };
        let job = main_job::Job {
            kills,
            standbys,
            synchronous_commit,
            load: Duration::from_secs(2),
            ..job(bin.clone(), 1, true)
        };
        let said = |text: &str| eprintln!("PostgreSQL {major}, {standbys}: {text}");
        let outcome = main_job::run(&job, &said)
            .unwrap_or_else(|error| panic!("PostgreSQL {major}, {standbys}: {error:?}"));
        assert!(outcome.latest.acknowledged > 50, "{outcome:?}");
    }
}
