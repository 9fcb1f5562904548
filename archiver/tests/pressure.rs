//! Back pressure: the store is offline for long, the spool is at its limit, and the operator has
//! chosen what to protect.

use std::{fs, path::PathBuf, process::Command};

use crate::support::{
    Archiver, Place, Server, postgres_bin, store_goes_down, succeed, wait_flushed, wait_until,
};

/// The smallest allowed limit of a spool.
const LIMIT: &str = "spool_limit_bytes = 4194304\n";
/// The memory limit of a daemon: its own part and RocksDB's caches and buffers.
const MEMORY_MAX_KIB: u64 = (128 + 64) << 10;

/// Returns `wal-archiver` with further settings in a file.
fn configured(place: &Place, conninfo: &str, settings: &str) -> Command {
    let file = place.spool().with_extension("toml");
    fs::write(&file, settings).expect("a configuration");
    let mut command = place.command(conninfo);
    command.arg("--config").arg(file);
    command
}

fn says(archiver: &Archiver, text: &str) {
    wait_until(&format!("the status says \"{text}\""), || {
        archiver.get("/api/v1/clusters").contains(text)
    });
}

fn slots(server: &Server) -> String {
    server.sql("SELECT count(*) FROM pg_replication_slots")
}

#[test]
fn at_its_limit_the_spool_holds_the_stream_and_nothing_is_lost() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "wal_sender_timeout=2s");
    let place = Place::new();
    let archiver = place.run_with(configured(&place, &server.conninfo(), LIMIT));
    archiver.wait_for_log("INFO streaming");
    server.write_wal(100);
    wait_flushed(&server, server.lsn());
    let comes_back = store_goes_down(&place);
    let pid = server.sql("SELECT pid FROM pg_stat_replication");
    // Below the limit: the WAL is accepted, and a warning comes in time.
    server.write_wal(3000);
    wait_flushed(&server, server.lsn());
    says(&archiver, "% full");
    let load = server.load();
    server.write_wal(40_000);
    archiver.wait_for_log("spool is at its limit");
    says(&archiver, "spool_limit_bytes");
    // Three times wal_sender_timeout: keepalives continue and report true positions.
    std::thread::sleep(std::time::Duration::from_secs(6));
    let replication = "SELECT pid, flush_lsn < pg_current_wal_flush_lsn() FROM pg_stat_replication";
    assert_eq!(server.sql(replication), format!("{pid}|t"));
    assert!(archiver.get("/readyz").starts_with("HTTP/1.1 200"));
    let spooled: u64 = walk(&place.spool()).iter().map(|(_, bytes)| bytes).sum();
    assert!(spooled < 8 << 20, "{spooled} bytes for a limit of 4 MiB");
    drop(load);
    let kib = archiver.peak_memory_kib();
    assert!(kib < MEMORY_MAX_KIB, "{kib} KiB");
    comes_back();
    place.assert_whole(&server, archiver);
}

#[test]
fn wal_that_waits_for_the_store_costs_disk_and_not_memory() {
    let Some(bin) = postgres_bin() else { return };
    let mib = if testbed::is_long() { 2000 } else { 100 };
    // The server keeps all of it, so that it can be compared.
    let settings = "wal_sender_timeout=2s\nwal_keep_size=3GB";
    let server = Server::start(&bin, settings);
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    server.write_wal(100);
    wait_flushed(&server, server.lsn());
    let before = archiver.peak_memory_kib();
    let comes_back = store_goes_down(&place);
    server.write_wal(mib << 10);
    wait_flushed(&server, server.lsn());
    let after = archiver.peak_memory_kib();
    eprintln!("{mib} MiB wait for the store: at most {after} KiB of memory, {before} KiB before");
    assert!(after < MEMORY_MAX_KIB, "{after} KiB");
    comes_back();
    let lsn = server.lsn();
    assert_eq!(archiver.terminate().code(), Some(0));
    assert!(place.assert_equals_pg_wal(&server.data()) >= lsn);
}

#[test]
fn a_full_spool_does_not_keep_the_archiver_from_ending() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let archiver = place.run_with(configured(&place, &server.conninfo(), LIMIT));
    archiver.wait_for_log("INFO streaming");
    let comes_back = store_goes_down(&place);
    server.write_wal(9000);
    archiver.wait_for_log("spool is at its limit");
    archiver.signal(rustix::process::Signal::TERM);
    archiver.wait_for_log("SIGTERM");
    comes_back();
    let mut archiver = archiver;
    assert_eq!(archiver.wait().code(), Some(0));
    let archiver = place.run(&server.conninfo());
    let lsn = server.lsn();
    wait_flushed(&server, lsn);
    assert_eq!(archiver.terminate().code(), Some(0));
    assert!(place.assert_equals_pg_wal(&server.data()) >= lsn);
}

#[test]
fn a_protected_primary_drops_the_slot_and_the_archive_is_whole_again_by_itself() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "wal_keep_size=0\nmax_wal_size=2MB\nmin_wal_size=2MB");
    let place = Place::new();
    let settings =
        format!("{LIMIT}when_full = 'protect-primary'\nprimary_wal_max_bytes = 8388608\n");
    let archiver = place.run_with(configured(&place, &server.conninfo(), &settings));
    archiver.wait_for_log("INFO streaming");
    let backup = place.command(&server.conninfo()).arg("backup").output();
    succeed("backup", &backup.expect("wal-archiver runs"));
    server.write_wal(2300);
    wait_flushed(&server, server.lsn());
    let comes_back = store_goes_down(&place);
    server.write_wal(6000);
    archiver.wait_for_log("spool is at its limit");
    assert_eq!(slots(&server), "1", "the slot keeps less than it may");
    server.write_wal(12_000);
    archiver.wait_for_log("the slot is dropped");
    assert_eq!(slots(&server), "0");
    says(&archiver, "\"state\":\"broken\"");
    // The primary removes everything that it may remove.
    server.sql("CHECKPOINT");
    server.write_wal(3000);
    server.sql("CHECKPOINT");
    comes_back();
    archiver.wait_for_log("there is room again");
    archiver.wait_for_log("the archive is whole again");
    server.write_wal(1500);
    let lsn = server.lsn();
    wait_flushed(&server, lsn);
    assert_eq!(archiver.terminate().code(), Some(0));
    assert_eq!(place.files_below("/gap/").len(), 1);
    let verdict = place.verify(&server.conninfo());
    assert!(verdict.contains("was declared lost"), "{verdict}");
    assert!(verdict.contains("no other gap"), "{verdict}");
}

/// Returns the WAL files of a spool and their lengths.
fn walk(spool: &std::path::Path) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    let mut open = vec![spool.join("main/wal")];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(data) if data.is_dir() => open.push(entry.path()),
                Ok(data) => found.push((entry.path(), data.len())),
                Err(_) => {}
            }
        }
    }
    found
}
