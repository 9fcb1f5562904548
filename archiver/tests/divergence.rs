//! A server that is not the one that was archived: it lost WAL, went another way on the same timeline, or is a new cluster.
//! Nothing is overwritten or mixed, the light is red, and the remedy is named.

use std::{collections::BTreeMap, fs, path::PathBuf, process::Command};

use crate::support::{Place, Server, postgres_bin, wait_flushed};

/// Every object with its bytes.
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

/// What was there is there, byte for byte.
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

/// A server that is set back to an older copy of its data directory, and what is archived of the time after the copy.
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
    // Behind: it ends before what it once acknowledged.
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

#[test]
fn a_cluster_made_anew_is_refused_and_begins_an_epoch_only_on_the_operators_word() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    server.write_wal(1500);
    wait_flushed(&server, server.lsn());
    // The daemon lives through the exchange of its server: red, and no end.
    let archived = objects(&place);
    server.down("immediate");
    fs::remove_dir_all(server.data()).expect("the data directory goes");
    server.init("");
    let mut archiver = archiver;
    archiver.wait_for_log("epoch begin --system-identifier");
    let status = archiver.get("/api/v1/clusters");
    assert!(status.contains("\"broken\""), "{status}");
    assert!(archiver.is_running());
    archiver.kill();
    assert_untouched(&place, &archived);

    let system = server.sql("SELECT system_identifier FROM pg_control_system()");
    // What the killed daemon left in the spool reaches the old epoch first.
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
