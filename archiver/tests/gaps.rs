//! WAL that the server removed before it was archived: obtained from other servers, or declared
//! lost with a backup after it. In each case streaming continues automatically.

use std::{fs, process::Command};

use crate::support::{
    Archiver, Place, Server, postgres_bin, store_goes_down, succeed, wait_flushed, wait_until,
};

/// A server that keeps only the WAL that its slots retain.
const KEEPS_NOTHING: &str =
    "wal_keep_size=0\nmax_wal_size=2MB\nmin_wal_size=2MB\nmax_slot_wal_keep_size=1MB";

/// Archives a little, stops, and lets the server invalidate the slot and remove WAL that was never
/// archived.
fn fall_behind(place: &Place, server: &Server, archiver: Archiver) {
    server.write_wal(2300);
    wait_flushed(server, server.lsn());
    assert_eq!(archiver.terminate().code(), Some(0));
    wait_until("the slot is free", || {
        server.sql("SELECT active FROM pg_replication_slots WHERE slot_name = 'tidemark_main'")
            == "f"
    });
    wait_until("the slot is lost", || {
        server.write_wal(2000);
        server.sql("CHECKPOINT");
        server.sql("SELECT wal_status FROM pg_replication_slots WHERE slot_name = 'tidemark_main'")
            == "lost"
    });
    assert!(place.sealed() >= 1);
}

/// Returns `wal-archiver` with these keys in its configuration.
fn configured(place: &Place, server: &Server, keys: &str) -> Command {
    let configuration = place.spool().with_extension("toml");
    fs::write(&configuration, keys).expect("a configuration");
    let mut command = place.command(&server.conninfo());
    command.arg("--config").arg(&configuration);
    command
}

fn backups(place: &Place) -> usize {
    place.files_below("backup.json").len()
}

#[test]
fn what_nobody_has_is_declared_lost_and_a_backup_behind_it_makes_the_archive_whole() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, KEEPS_NOTHING);
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    let backup = place.command(&server.conninfo()).arg("backup").output();
    succeed("backup", &backup.expect("wal-archiver runs"));
    fall_behind(&place, &server, archiver);
    assert_eq!(backups(&place), 1);

    let archiver = place.run_with(configured(&place, &server, "gap_grace = '3s'\n"));
    archiver.wait_for_log("a gap is detected");
    // The archiver searches for the configured time and shows that.
    wait_until("it waits", || {
        archiver.get("/api/v1/clusters").contains("\"waiting\"")
    });
    let status = archiver.get("/api/v1/clusters");
    assert!(status.contains("\"broken\""), "{status}");
    // A single loss is enough here.
    server.sql("ALTER SYSTEM SET max_slot_wal_keep_size = '64MB'");
    server.sql("SELECT pg_reload_conf()");
    archiver.wait_for_log("is lost");
    server.write_wal(1500);
    wait_flushed(&server, server.lsn());
    archiver.wait_for_log("the archive is whole again");
    assert_eq!(backups(&place), 2);
    server.write_wal(1500);
    let lsn = server.lsn();
    wait_flushed(&server, lsn);
    assert_eq!(archiver.terminate().code(), Some(0));
    assert_eq!(place.files_below("/gap/").len(), 1);
    let verdict = place.verify(&server.conninfo());
    assert!(verdict.contains("was declared lost"), "{verdict}");
    assert!(verdict.contains("no other gap"), "{verdict}");

    // The declaration survives a restart and the loss of all local data.
    for wipe in [false, true] {
        if wipe {
            fs::remove_dir_all(place.spool()).expect("the spool goes");
        }
        let archiver = place.run(&server.conninfo());
        server.write_wal(700);
        wait_flushed(&server, server.lsn());
        assert_eq!(archiver.terminate().code(), Some(0));
        assert_eq!(backups(&place), 2, "one backup mends one loss");
    }
    place.verify(&server.conninfo());
}

#[test]
fn a_gap_that_is_found_while_the_store_is_away_is_closed_when_it_is_back() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, KEEPS_NOTHING);
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    fall_behind(&place, &server, archiver);
    let comes_back = store_goes_down(&place);
    let archiver = place.run_with(configured(&place, &server, "gap_grace = '1s'\n"));
    archiver.wait_for_log("archiving is interrupted");
    let status = archiver.get("/api/v1/clusters");
    assert!(status.contains("\"broken\""), "{status}");
    // Only the repository can tell whether this is a gap: nothing is declared, and the archiver
    // does not give up.
    assert!(!archiver.log().contains("is lost"));
    comes_back();
    the_gap_is_declared_and_left_behind(&place, &server, archiver);
}

#[test]
#[ignore = "long: make test-long"]
fn a_gap_that_a_running_archiver_finds_without_its_store_is_closed_when_it_is_back() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, KEEPS_NOTHING);
    let place = Place::new();
    let archiver = place.run_with(configured(&place, &server, "gap_grace = '1s'\n"));
    archiver.wait_for_log("INFO streaming");
    server.write_wal(2300);
    wait_flushed(&server, server.lsn());
    archiver.signal(rustix::process::Signal::STOP);
    // A checkpoint would wait for the walsender of a client that does not read.
    server.down("immediate");
    server.up();
    wait_until("the slot is lost", || {
        server.write_wal(2000);
        server.sql("CHECKPOINT");
        server.sql("SELECT wal_status FROM pg_replication_slots WHERE slot_name = 'tidemark_main'")
            == "lost"
    });
    let comes_back = store_goes_down(&place);
    archiver.signal(rustix::process::Signal::CONT);
    archiver.wait_for_log("a gap: looking for the missing WAL");
    archiver.wait_for_log("the gap cannot be closed while the repository does not answer");
    for _ in 0..20 {
        let status = archiver.get("/api/v1/clusters");
        assert!(status.contains("\"state\":\"broken\""), "{status}");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    comes_back();
    the_gap_is_declared_and_left_behind(&place, &server, archiver);
}

/// When its store is back, the archiver declares the loss once and becomes complete and green
/// automatically.
fn the_gap_is_declared_and_left_behind(place: &Place, server: &Server, archiver: Archiver) {
    archiver.wait_for_log("is lost");
    archiver.wait_for_log("the archive is whole again");
    // Each of these lines is logged at most once, however often the archiver looks for the missing
    // WAL.
    let log = archiver.log();
    for line in [
        "a gap: looking for the missing WAL",
        "the gap is not closed yet",
    ] {
        assert!(log.matches(line).count() <= 1, "{line}: {log}");
    }
    server.write_wal(1500);
    wait_flushed(server, server.lsn());
    wait_until("the light is green", || {
        let status = archiver.get("/api/v1/clusters");
        status.contains("\"state\":\"ok\"") && status.contains("\"gap\":null")
    });
    assert_eq!(archiver.terminate().code(), Some(0));
    assert_eq!(place.files_below("/gap/").len(), 1);
    place.verify(&server.conninfo());
}

#[test]
fn a_standby_that_still_has_it_heals_the_gap() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, KEEPS_NOTHING);
    let standby = Server::standby_of(&server);
    // The standby keeps WAL that the primary does not.
    standby.sql("ALTER SYSTEM SET wal_keep_size = '2GB'");
    standby.sql("SELECT pg_reload_conf()");
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    fall_behind(&place, &server, archiver);
    let lsn = server.lsn();
    wait_until("the standby has it all", || {
        standby.sql(&format!("SELECT pg_last_wal_receive_lsn() >= '{lsn}'")) == "t"
    });
    let keys = format!("heal_from = [\"{}\"]\n", standby.conninfo());
    let command = configured(&place, &server, &keys);
    let archiver = place.run_with(command);
    archiver.wait_for_log("the gap is healed");
    server.write_wal(1500);
    let lsn = server.lsn();
    wait_flushed(&server, lsn);
    assert_eq!(archiver.terminate().code(), Some(0));
    assert_eq!(place.files_below("/gap/").len(), 0);
    let verdict = place.verify(&server.conninfo());
    assert!(verdict.contains("no gap, no damage"), "{verdict}");
    assert!(place.assert_equals_pg_wal(&standby.data()) >= lsn);
}

#[test]
fn what_no_stream_gives_is_read_out_of_pg_wal() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, KEEPS_NOTHING);
    let standby = Server::standby_of(&server);
    standby.sql("ALTER SYSTEM SET wal_keep_size = '2GB'");
    standby.sql("SELECT pg_reload_conf()");
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    fall_behind(&place, &server, archiver);
    let lsn = server.lsn();
    wait_until("the standby has it all", || {
        standby.sql(&format!("SELECT pg_last_wal_receive_lsn() >= '{lsn}'")) == "t"
    });
    // Replication connections are refused there from now on, SQL is not.
    let hba = standby.data().join("pg_hba.conf");
    let rules = fs::read_to_string(&hba).expect("its rules");
    fs::write(&hba, format!("local replication all reject\n{rules}")).expect("it is written");
    standby.sql("SELECT pg_reload_conf()");
    let keys = format!(
        "heal_from = [\"{}\"]\ngap_grace = '1s'\n",
        standby.conninfo()
    );
    let archiver = place.run_with(configured(&place, &server, &keys));
    archiver.wait_for_log("missing WAL was read out of pg_wal");
    archiver.wait_for_log("the gap is healed");
    server.write_wal(1500);
    let lsn = server.lsn();
    wait_flushed(&server, lsn);
    assert_eq!(archiver.terminate().code(), Some(0));
    assert_eq!(place.files_below("/gap/").len(), 0);
    let verdict = place.verify(&server.conninfo());
    assert!(verdict.contains("no gap, no damage"), "{verdict}");
}

#[test]
fn a_lost_spool_whose_wal_was_acknowledged_is_a_gap_with_its_range() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, KEEPS_NOTHING);
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    server.write_wal(3300);
    wait_flushed(&server, server.lsn());
    wait_until("something before them is stored", || place.sealed() >= 3);
    archiver.kill();
    // The newest two segments never reached the repository, and the host with the spool is gone.
    let mut newest = place.files_below("/wal/");
    let gone = newest.split_off(newest.len() - 2);
    let first = gone[0].file_stem().expect("a name").to_string_lossy();
    for path in &gone {
        fs::remove_file(path).expect("it goes");
    }
    for path in place.files_below("/tail/") {
        fs::remove_file(path).expect("it goes");
    }
    fs::remove_dir_all(place.spool()).expect("the spool goes");
    wait_until("the server has removed it", || {
        server.write_wal(1000);
        server.sql("CHECKPOINT");
        server.sql(&format!(
            "SELECT count(*) FROM pg_ls_waldir() WHERE name = '{first}'"
        )) == "0"
    });
    let archiver = place.run_with(configured(&place, &server, "gap_grace = '1s'\n"));
    archiver.wait_for_log("is lost");
    archiver.wait_for_log("the archive is whole again");
    server.write_wal(1500);
    let lsn = server.lsn();
    wait_flushed(&server, lsn);
    assert_eq!(archiver.terminate().code(), Some(0));
    assert_eq!(place.files_below("/gap/").len(), 1);
    let verdict = place.verify(&server.conninfo());
    // Nothing can be restored from before the new backup, so the proof begins there.
    assert!(verdict.contains("no gap"), "{verdict}");
}

#[test]
fn a_slot_that_was_idle_too_long_is_made_anew_without_a_gap() {
    let servers = testbed::tools::servers_or_skip();
    let Some((_, bin)) = servers.iter().find(|(major, _)| *major >= 18) else {
        return;
    };
    let server = Server::start(bin, "idle_replication_slot_timeout = '1s'");
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    server.write_wal(700);
    wait_flushed(&server, server.lsn());
    assert_eq!(archiver.terminate().code(), Some(0));
    wait_until("the slot is lost", || {
        server.sql("CHECKPOINT");
        server.sql("SELECT invalidation_reason FROM pg_replication_slots WHERE slot_name = 'tidemark_main'")
            == "idle_timeout"
    });
    let check = place.command(&server.conninfo()).arg("check").output();
    let check = String::from_utf8_lossy(&check.expect("it runs").stdout).into_owned();
    assert!(check.contains("loses its slot"), "{check}");
    assert!(check.contains("was invalidated"), "{check}");
    server.write_wal(700);
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("created again");
    let lsn = server.lsn();
    wait_flushed(&server, lsn);
    assert_eq!(archiver.terminate().code(), Some(0));
    assert!(place.assert_equals_pg_wal(&server.data()) >= lsn);
    let verdict = place.verify(&server.conninfo());
    assert!(verdict.contains("no gap"), "{verdict}");
}

#[test]
fn a_hole_that_a_start_finds_holds_up_no_commit_after_the_backup_behind_it() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let run = || place.run_with(configured(&place, &server, "acknowledge = 'remote'\n"));
    let archiver = run();
    archiver.wait_for_log("INFO streaming");
    let backup = place.command(&server.conninfo()).arg("backup").output();
    succeed("backup", &backup.expect("wal-archiver runs"));
    server.write_wal(3500);
    wait_flushed(&server, server.lsn());
    assert_eq!(archiver.terminate().code(), Some(0));
    let sealed = place.files_below("/wal/");
    let lost = sealed.get(sealed.len() - 2).expect("some segments");
    fs::remove_file(lost).expect("it is lost");

    let archiver = run();
    archiver.wait_for_log("the archive is whole again");
    server.write_wal(1500);
    // The server receives the acknowledgement without a restart, and its slot advances.
    let lsn = server.lsn();
    wait_flushed(&server, lsn);
    wait_until("the slot is past the hole", || {
        let slot = "slot_name = 'tidemark_main'";
        let sql = format!("SELECT restart_lsn >= '{lsn}' FROM pg_replication_slots WHERE {slot}");
        server.write_wal(1);
        server.sql(&sql) == "t"
    });
    assert_eq!(archiver.terminate().code(), Some(0));
    assert_eq!(backups(&place), 2);
}
