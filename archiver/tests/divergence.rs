//! A server that differs from the archived one: it lost WAL, diverged on the same timeline, or is a
//! new cluster. Nothing is overwritten or mixed, the light is red, and the remedy is named.

use std::{collections::BTreeMap, fs, path::PathBuf, process::Command};

use wal_format::Lsn;

use crate::support::{Archiver, Place, Server, postgres_bin, wait_flushed};

/// Returns every object with its bytes.
fn objects(place: &Place) -> BTreeMap<PathBuf, Vec<u8>> {
    let files = place.files_below("/");
    files
        .into_iter()
        .filter(|path| {
            let path = path.to_string_lossy();
            !path.contains("/tail/") && !path.contains("/.tidemark-tmp/")
        })
        .map(|path| {
            let content = fs::read(&path).expect("an object");
            (path, content)
        })
        .collect()
}

/// Checks that all earlier objects still exist with the same bytes.
fn assert_untouched(place: &Place, before: &BTreeMap<PathBuf, Vec<u8>>) {
    let now = objects(place);
    for (path, content) in before {
        assert!(now.get(path) == Some(content), "{} changed", path.display());
    }
}

fn copy(from: &std::path::Path, to: &std::path::Path) {
    let status = Command::new("cp").arg("-a").arg(from).arg(to).status();
    assert!(status.expect("cp runs").success());
}

/// Returns a server that was set back to an older copy of its data directory, and the archived
/// objects of the time after the copy.
fn set_back() -> Option<(Server, Place, BTreeMap<PathBuf, Vec<u8>>)> {
    let bin = postgres_bin()?;
    let server = Server::start(&bin, "");
    server.write_wal(300);
    server.down("fast");
    let snapshot = server.directory().join("snapshot");
    copy(&server.data(), &snapshot);
    server.up();
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    server.write_wal(2500);
    wait_flushed(&server, server.lsn());
    assert_eq!(archiver.terminate().code(), Some(0));
    let archived = objects(&place);
    server.down("immediate");
    fs::remove_dir_all(server.data()).expect("the data directory goes");
    copy(&snapshot, &server.data());
    server.up();
    Some((server, place, archived))
}

#[test]
fn a_server_set_back_to_a_snapshot_is_refused_behind_and_ahead_of_what_was_archived() {
    let Some((server, place, archived)) = set_back() else {
        return;
    };
    // Behind: it ends before WAL that it once acknowledged.
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("the server lost WAL");
    let status = archiver.get("/api/v1/clusters");
    assert!(status.contains("\"broken\""), "{status}");
    assert!(
        status.contains("restore the server from this archive"),
        "{status}"
    );
    assert_eq!(archiver.terminate().code(), Some(0));
    assert_untouched(&place, &archived);
    assert_eq!(
        server.sql("SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'tidemark_main'"),
        "0",
        "nothing was made on a server that is refused"
    );

    // Ahead again, with other bytes at the same positions.
    server.sql("CREATE TABLE other (filler text)");
    server.sql("INSERT INTO other SELECT repeat('y', 700) FROM generate_series(1, 8000)");
    let mut archiver = place.run(&server.conninfo());
    assert_eq!(archiver.wait().code(), Some(4));
    let log = archiver.log();
    assert!(log.contains("divergence: at"), "{log}");
    assert!(log.contains("nothing was overwritten"), "{log}");
    assert_untouched(&place, &archived);
    place.verify("host=/nonexistent");
}

/// Fills the open segment and waits until the archive ends exactly where the next one begins.
fn archive_to_a_boundary(server: &Server, archiver: &Archiver, mib: u32) -> Lsn {
    archiver.wait_for_log("INFO streaming");
    insert(server, 'a');
    server.sql("SELECT pg_switch_wal()");
    let boundary = Lsn(server.lsn().0.next_multiple_of(u64::from(mib) << 20));
    wait_flushed(server, boundary);
    boundary
}

fn insert(server: &Server, letter: char) {
    server.sql(&format!(
        "INSERT INTO load SELECT n, repeat('{letter}', 700) FROM generate_series(1, 300) n"
    ));
}

#[test]
fn another_history_that_meets_the_archive_exactly_between_two_segments_is_refused() {
    meet_between_two_segments(1);
}

#[test]
fn also_where_nothing_but_the_first_bytes_of_a_large_segment_tells_them_apart() {
    meet_between_two_segments(64);
}

fn meet_between_two_segments(mib: u32) {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start_with_segments(&bin, mib, "autovacuum=off");
    server.write_wal(300);
    server.down("fast");
    let snapshot = server.directory().join("snapshot");
    copy(&server.data(), &snapshot);
    server.up();
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    let boundary = archive_to_a_boundary(&server, &archiver, mib);
    server.down("immediate");
    assert_eq!(archiver.terminate().code(), Some(0));
    let archived = objects(&place);
    fs::remove_dir_all(server.data()).expect("the data directory goes");
    copy(&snapshot, &server.data());
    server.up();
    // Records of the same lengths: not even `xl_prev` distinguishes them.
    insert(&server, 'b');
    server.sql("SELECT pg_switch_wal()");
    insert(&server, 'b');
    assert!(server.lsn() > boundary);
    let mut archiver = place.run(&server.conninfo());
    assert_eq!(archiver.wait().code(), Some(4));
    let log = archiver.log();
    let at = log.split("divergence: at ").nth(1).expect(&log);
    let at: Lsn = at
        .split_whitespace()
        .next()
        .expect("an LSN")
        .parse()
        .expect(&log);
    assert!(at < boundary, "{log}");
    assert_untouched(&place, &archived);
}

#[test]
fn an_overlap_that_the_server_has_removed_is_done_without() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "wal_keep_size=0\nmin_wal_size=2MB\nautovacuum=off");
    server.write_wal(100);
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    let boundary = archive_to_a_boundary(&server, &archiver, 1);
    assert_eq!(archiver.terminate().code(), Some(0));
    for _ in 0..2 {
        server.sql("CHECKPOINT");
        server.sql("SELECT pg_switch_wal()");
    }
    server.sql("CHECKPOINT");
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log(&format!("from={boundary}"));
    let log = archiver.log();
    assert!(log.contains("begins without an overlap"), "{log}");
    insert(&server, 'c');
    let lsn = server.lsn();
    wait_flushed(&server, lsn);
    assert_eq!(archiver.terminate().code(), Some(0));
    let verdict = place.verify(&server.conninfo());
    assert!(verdict.contains("no gap, no damage"), "{verdict}");
}

#[test]
fn a_cluster_made_anew_is_refused_and_begins_an_epoch_only_on_the_operators_word() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    server.write_wal(1500);
    wait_flushed(&server, server.lsn());
    // The daemon survives the replacement of its server: red, but running.
    let archived = objects(&place);
    server.down("immediate");
    fs::remove_dir_all(server.data()).expect("the data directory goes");
    server.init(1, "");
    let mut archiver = archiver;
    archiver.wait_for_log("epoch begin --system-identifier");
    let status = archiver.get("/api/v1/clusters");
    assert!(status.contains("\"broken\""), "{status}");
    assert!(archiver.is_running());
    archiver.kill();
    assert_untouched(&place, &archived);

    let system = server.sql("SELECT system_identifier FROM pg_control_system()");
    // WAL that the killed daemon left in the spool is stored in the old epoch first.
    let mut begin = place.command(&server.conninfo());
    begin.args(["epoch", "begin", "--system-identifier", &system]);
    let output = begin.output().expect("it runs");
    crate::support::succeed("epoch begin", &output);
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    server.write_wal(1500);
    wait_flushed(&server, server.lsn());
    assert_eq!(archiver.terminate().code(), Some(0));
    assert_untouched(&place, &archived);
    place.verify(&server.conninfo());
}
