//! Invalid input and failures: each leads to one clear line and the documented exit code, and
//! nothing is overwritten.

use std::{fs, os::unix::fs::PermissionsExt, process::Command, thread::sleep, time::Duration};

use rustix::process::Signal;

use crate::support::{Place, Server, postgres_bin, wait_flushed};

/// Runs `run` until it ends. Returns its exit code and log.
fn ends(place: &Place, conninfo: &str) -> (Option<i32>, String) {
    let mut archiver = place.run(conninfo);
    let code = archiver.wait().code();
    (code, archiver.log())
}

#[test]
fn another_clusters_server_is_refused_before_a_byte_moves() {
    let Some(bin) = postgres_bin() else { return };
    let (ours, other) = (Server::start(&bin, ""), Server::start(&bin, ""));
    let place = Place::new();
    let archiver = place.run(&ours.conninfo());
    archiver.wait_for_log("streaming");
    ours.write_wal(100);
    wait_flushed(&ours, ours.lsn());
    assert_eq!(archiver.terminate().code(), Some(0));
    let (code, log) = ends(&place, &other.conninfo());
    assert_eq!(code, Some(2), "{log}");
    fs::remove_dir_all(place.spool()).expect("the spool goes");
    let (code, log) = ends(&place, &other.conninfo());
    assert_eq!(code, Some(2), "{log}");
    place.assert_equals_pg_wal(&ours.data());
}

#[test]
fn a_second_archiver_on_the_same_spool_is_refused() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let first = place.run(&server.conninfo());
    first.wait_for_log("streaming");
    let (code, log) = ends(&place, &server.conninfo());
    assert_eq!(code, Some(2), "{log}");
    assert!(log.contains("in use by another archiver"), "{log}");
    assert_eq!(first.terminate().code(), Some(0));
}

#[test]
fn a_server_put_back_from_a_snapshot_is_a_divergence() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    server.write_wal(10);
    server.down("fast");
    let copy = server.data().with_extension("copy");
    let copied = Command::new("cp")
        .arg("-a")
        .arg(server.data())
        .arg(&copy)
        .status();
    assert!(copied.expect("cp runs").success());
    server.up();
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("streaming");
    server.write_wal(100);
    wait_flushed(&server, server.lsn());
    assert_eq!(archiver.terminate().code(), Some(0));
    let before = place.verify(&server.conninfo());
    server.down("fast");
    fs::remove_dir_all(server.data()).expect("the data directory goes");
    repository::durable::rename(&copy, &server.data()).expect("the snapshot comes");
    server.up();
    server.sql("CREATE TABLE another_past (a int)");
    server.write_wal(800);
    let (code, log) = ends(&place, &server.conninfo());
    assert_eq!(code, Some(4), "{log}");
    assert!(log.contains("divergence: at "), "{log}");
    assert_eq!(place.verify(&server.conninfo()), before);
}

#[test]
fn a_stuck_store_neither_stops_the_acknowledgements_nor_the_connection() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "wal_sender_timeout=2s");
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("streaming");
    server.write_wal(100);
    wait_flushed(&server, server.lsn());
    let pid = server.sql("SELECT pid FROM pg_stat_replication");
    let aside = place.repository().with_extension("aside");
    repository::durable::rename(&place.repository(), &aside).expect("the repository goes");
    fs::write(place.repository(), "a file is no folder").expect("in its place");
    server.write_wal(3000);
    let lsn = server.lsn();
    wait_flushed(&server, lsn);
    sleep(Duration::from_secs(5));
    assert_eq!(server.sql("SELECT pid FROM pg_stat_replication"), pid);
    fs::remove_file(place.repository()).expect("the file goes");
    repository::durable::rename(&aside, &place.repository()).expect("the repository is back");
    assert_eq!(archiver.terminate().code(), Some(0));
    assert!(place.assert_equals_pg_wal(&server.data()) >= lsn);
    place.verify(&server.conninfo());
}

#[test]
fn a_frozen_archiver_comes_back_where_it_was() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "wal_sender_timeout=1s");
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("streaming");
    server.write_wal(100);
    archiver.signal(Signal::STOP);
    server.write_wal(2000);
    sleep(Duration::from_secs(3));
    archiver.signal(Signal::CONT);
    let lsn = server.lsn();
    wait_flushed(&server, lsn);
    assert_eq!(archiver.terminate().code(), Some(0));
    assert!(place.assert_equals_pg_wal(&server.data()) >= lsn);
}

#[test]
fn a_full_spool_waits_and_goes_on_when_there_is_space() {
    let Some(bin) = postgres_bin() else { return };
    let mount = tempfile::tempdir().expect("a directory");
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=6m", "tmpfs"])
        .arg(mount.path())
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: a small file system needs root");
        return;
    }
    let unmount = || Command::new("umount").arg(mount.path()).status();
    let server = Server::start(&bin, "wal_sender_timeout=2s");
    let place = Place::new();
    let ballast = mount.path().join("ballast");
    fs::write(&ballast, vec![1; 3 << 20]).expect("ballast");
    let mut command = place.command_with_spool(&server.conninfo(), mount.path());
    command.arg("--catalog").arg(place.spool().join("catalog"));
    fs::create_dir_all(place.spool()).expect("a directory");
    let archiver = place.run_with(command);
    archiver.wait_for_log("streaming");
    // The store is away, so the spool fills.
    let mode = |bits| fs::Permissions::from_mode(bits);
    let aside = place.repository().with_extension("aside");
    fs::set_permissions(place.repository(), mode(0o755)).expect("chmod");
    repository::durable::rename(&place.repository(), &aside).expect("the repository goes");
    fs::write(place.repository(), "a file is no folder").expect("in its place");
    server.write_wal(8000);
    archiver.wait_for_log("disk is full");
    let pid = server.sql("SELECT pid FROM pg_stat_replication");
    sleep(Duration::from_secs(4));
    assert_eq!(server.sql("SELECT pid FROM pg_stat_replication"), pid);
    fs::remove_file(&ballast).expect("space");
    fs::remove_file(place.repository()).expect("the file goes");
    repository::durable::rename(&aside, &place.repository()).expect("the repository is back");
    let lsn = server.lsn();
    wait_flushed(&server, lsn);
    assert_eq!(archiver.terminate().code(), Some(0));
    assert!(place.assert_equals_pg_wal(&server.data()) >= lsn);
    assert!(unmount().is_ok_and(|status| status.success()));
}
