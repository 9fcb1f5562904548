//! WAL that the server removed before it was archived: asked for elsewhere, or declared lost with a backup behind it.
//! Each ends streaming again without a person.

use std::fs;

use crate::support::{Archiver, Place, Server, postgres_bin, succeed, wait_flushed, wait_until};

/// A server that keeps no more WAL than its slots make it keep.
const KEEPS_NOTHING: &str =
    "wal_keep_size=0\nmax_wal_size=2MB\nmin_wal_size=2MB\nmax_slot_wal_keep_size=1MB";

/// Archives a little, stops, and lets the server invalidate the slot and remove WAL that was never archived.
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

    let archiver = place.run(&server.conninfo());
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

    // The declaration is believed after a restart, and after the loss of everything local.
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
fn a_standby_that_still_has_it_heals_the_gap() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, KEEPS_NOTHING);
    let standby = Server::standby_of(&server);
    // The standby keeps what the primary does not.
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
    let configuration = place.spool().with_extension("toml");
    fs::write(
        &configuration,
        format!("heal_from = [\"{}\"]\n", standby.conninfo()),
    )
    .expect("a configuration");
    let mut command = place.command(&server.conninfo());
    command.arg("--config").arg(&configuration);
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
