//! A start at the worst moment: the store is away, the previous host was killed, another archiver
//! takes over. Commits are acknowledged again automatically, and no WAL is duplicated or missing.

use std::fs;

use wal_format::Lsn;

use crate::support::{Place, Server, postgres_bin, store_goes_down, wait_flushed, wait_until};

/// Every commit waits for the archiver.
const SYNCHRONOUS: &str = "synchronous_standby_names='tidemark'";

fn commit(server: &Server, number: u32) {
    server.sql(&format!(
        "INSERT INTO load VALUES ({number}, 'acknowledged')"
    ));
}

/// Stops normally and compares all archived WAL with the server's files.
fn assert_whole(place: &Place, server: &Server, from: Lsn) {
    let lsn = server.lsn();
    wait_flushed(server, lsn);
    let archiver = place.verify(&server.conninfo());
    assert!(archiver.contains("no gap, no damage"), "{archiver}");
    assert!(from <= lsn);
}

#[test]
fn killed_while_the_store_is_away_it_goes_on_from_what_the_spool_proves() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    server.write_wal(1500);
    wait_flushed(&server, server.lsn());
    server.configure_more(SYNCHRONOUS);
    server.sql("SELECT pg_reload_conf()");
    let comes_back = store_goes_down(&place);
    commit(&server, 1);
    server.write_wal(2500);
    archiver.kill();
    for round in 2..5 {
        let archiver = place.run(&server.conninfo());
        // Returns when the commit is durable here, since no other standby can acknowledge it.
        commit(&server, round);
        server.write_wal(300);
        archiver.kill();
    }
    let archiver = place.run(&server.conninfo());
    commit(&server, 5);
    let acknowledged = server.lsn();
    let log = archiver.log();
    assert!(log.contains("the repository does not answer"), "{log}");
    // A disconnect meanwhile does not depend on the store.
    server.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_replication");
    commit(&server, 6);
    comes_back();
    archiver.wait_for_log("the repository answers");
    commit(&server, 7);
    wait_flushed(&server, server.lsn());
    assert_eq!(archiver.terminate().code(), Some(0));
    assert!(place.assert_equals_pg_wal(&server.data()) >= acknowledged);
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    assert_whole(&place, &server, acknowledged);
}

/// Returns whether no segment of the spool waits for the repository.
fn holds_no_complete_segment(place: &Place) -> bool {
    let mut directories = vec![place.spool().join("main/wal")];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_none() {
                return false;
            }
        }
    }
    true
}

#[test]
fn an_empty_spool_remembers_where_the_archive_ends() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "wal_keep_size=0\nmax_wal_size=32MB\nmin_wal_size=2MB");
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    server.write_wal(1500);
    server.sql("SELECT pg_switch_wal()");
    let boundary = Lsn(server.lsn().0.next_multiple_of(1 << 20));
    let record = place.spool().join("main/position.json");
    wait_until("the last segment leaves the spool", || {
        // The record is written first: a kill in between leaves both.
        fs::read_to_string(&record).is_ok_and(|record| record.contains(&format!("\"{boundary}\"")))
            && holds_no_complete_segment(&place)
    });
    archiver.kill();
    let comes_back = store_goes_down(&place);
    server.configure_more(SYNCHRONOUS);
    server.sql("SELECT pg_reload_conf()");
    let archiver = place.run(&server.conninfo());
    commit(&server, 1);
    let log = archiver.log();
    assert!(log.contains(&format!("from={boundary}")), "{log}");
    comes_back();
    archiver.wait_for_log("the repository answers");
    commit(&server, 2);
    assert_whole(&place, &server, boundary);
}

#[test]
fn a_clean_end_lets_commits_go_that_wait_for_the_repository_and_leaves_nothing_to_do_again() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let configuration = place.spool().with_extension("toml");
    let settings = "acknowledge = 'remote'\nremote_flush_interval = '1h'\n";
    fs::write(&configuration, settings).expect("a configuration");
    let command = || {
        let mut command = place.command(&server.conninfo());
        command.arg("--config").arg(&configuration);
        command
    };
    let archiver = place.run_with(command());
    archiver.wait_for_log("INFO streaming");
    server.write_wal(1500);
    server.configure_more(SYNCHRONOUS);
    server.sql("SELECT pg_reload_conf()");
    let waiting = std::thread::scope(|scope| {
        let commit = scope.spawn(|| commit(&server, 1));
        wait_until("the commit waits", || {
            server.sql("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'") == "1"
        });
        let waiting = server.lsn();
        assert_eq!(archiver.terminate().code(), Some(0));
        // Only the archiver can have acknowledged it.
        commit.join().expect("the commit is acknowledged");
        waiting
    });
    let slot = "SELECT restart_lsn FROM pg_replication_slots";
    let told: Lsn = server.sql(slot).parse().expect("an LSN");
    assert!(
        told >= waiting,
        "{told} was said at the end, {waiting} is archived"
    );
    let everything = || (place.files_below("/wal/"), place.files_below("/tail/"));
    let archived = everything();

    // The successor compares the open segment again and has nothing to store.
    let successor = place.run_with(command());
    successor.wait_for_log(&format!("held={told}"));
    wait_flushed(&server, told);
    assert_eq!(successor.terminate().code(), Some(0));
    let same = server.lsn() > told || everything() == archived;
    assert!(same, "{:?} is not {archived:?}", everything());
    place.verify(&server.conninfo());
}
