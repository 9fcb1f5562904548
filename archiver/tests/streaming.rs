//! The normal case: the repository has all WAL of the server, and the WAL is acknowledged.

use std::{fs, time::Duration};

use crate::support::{Place, Server, postgres_bin, wait_flushed, wait_until};

#[test]
fn a_live_cluster_is_archived_and_a_stop_leaves_nothing_behind() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("streaming");
    server.write_wal(5000);
    let lsn = server.lsn();
    wait_flushed(&server, lsn);
    assert_eq!(archiver.terminate().code(), Some(0));
    assert!(place.assert_equals_pg_wal(&server.data()) >= lsn);
    assert!(place.sealed() >= 4, "{} segments", place.sealed());
    place.verify(&server.conninfo());
}

#[test]
fn a_commit_waits_for_us_as_synchronous_standby_and_is_released_at_once() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("streaming");
    server.write_wal(10);
    wait_flushed(&server, server.lsn());
    server.sql("ALTER SYSTEM SET synchronous_standby_names = 'tidemark'");
    server.sql("SELECT pg_reload_conf()");
    wait_until("we are the synchronous standby", || {
        server.sql("SELECT sync_state FROM pg_stat_replication") == "sync"
    });
    let began = std::time::Instant::now();
    for _ in 0..20 {
        server.sql("INSERT INTO load VALUES (1, 'x')");
    }
    assert!(
        began.elapsed() < Duration::from_secs(10),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(
        server.sql("SELECT replay_lsn IS NULL FROM pg_stat_replication"),
        "t"
    );
    assert_eq!(archiver.terminate().code(), Some(0));
}

#[test]
fn spool_and_catalog_of_a_stopped_archiver_are_not_needed() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("streaming");
    server.write_wal(2500);
    wait_flushed(&server, server.lsn());
    assert_eq!(archiver.terminate().code(), Some(0));
    fs::remove_dir_all(place.spool()).expect("the spool goes");
    server.write_wal(2500);
    let archiver = place.run(&server.conninfo());
    let lsn = server.lsn();
    wait_flushed(&server, lsn);
    assert_eq!(archiver.terminate().code(), Some(0));
    assert!(place.assert_equals_pg_wal(&server.data()) >= lsn);
    place.verify(&server.conninfo());
}

#[test]
fn a_restarted_server_is_found_again_and_its_shutdown_does_not_hang() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("streaming");
    server.write_wal(500);
    let began = std::time::Instant::now();
    server.down("fast");
    assert!(
        began.elapsed() < Duration::from_secs(20),
        "{:?}",
        began.elapsed()
    );
    server.up();
    server.write_wal(500);
    let lsn = server.lsn();
    wait_flushed(&server, lsn);
    assert_eq!(archiver.terminate().code(), Some(0));
    assert!(place.assert_equals_pg_wal(&server.data()) >= lsn);
}

#[test]
fn settings_that_hang_commits_on_us_are_told() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    // Without a backup, the light would report that first.
    let backup = place.command(&server.conninfo()).arg("backup").status();
    assert!(backup.expect("wal-archiver runs").success());
    let check = || {
        let output = place.command(&server.conninfo()).arg("check").output();
        let output = output.expect("wal-archiver runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.code(), text)
    };
    let absent = "fewer synchronous standbys are connected";
    for (name, value, code, expected) in [
        ("synchronous_standby_names", "*", 2, "by accident"),
        ("synchronous_commit", "remote_apply", 2, "never does"),
        ("synchronous_standby_names", "absent", 1, absent),
    ] {
        server.sql(&format!("ALTER SYSTEM SET {name} = '{value}'"));
        server.sql("SELECT pg_reload_conf()");
        wait_until(expected, || check().1.contains(expected));
        assert_eq!(check().0, Some(code));
        wait_until("the light says it", || {
            archiver.get("/api/v1/clusters").contains(expected)
        });
    }
    server.sql("ALTER SYSTEM RESET ALL");
    server.sql("SELECT pg_reload_conf()");
    wait_until("all is well", || check().0 == Some(0));
    assert_eq!(archiver.terminate().code(), Some(0));
}
