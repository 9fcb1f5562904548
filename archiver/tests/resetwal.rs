//! `pg_resetwal` on an archived server: its WAL does not continue the archive. The archiver names
//! the remedy, `epoch begin --after-resetwal` declares the gap, and both sides of it are
//! restorable.

use std::{fs, process::Command};

use wal_format::Lsn;

use crate::support::{Place, Server, postgres_bin, succeed, wait_flushed, wait_until};

/// Runs `pg_resetwal` on the stopped server.
fn reset_wal(server: &Server, options: &[&str]) {
    let mut reset = server.command("pg_resetwal");
    reset.arg("-D").arg(server.data()).args(options);
    succeed("pg_resetwal", &reset.output().expect("pg_resetwal runs"));
}

/// Runs `epoch begin --after-resetwal`. Returns its exit code, and its output.
fn begin(place: &Place, server: &Server) -> (Option<i32>, String) {
    let mut command = place.command(&server.conninfo());
    let output = command
        .args(["epoch", "begin", "--after-resetwal"])
        .output();
    let output = output.expect("wal-archiver runs");
    let said = [output.stdout, output.stderr].concat();
    (
        output.status.code(),
        String::from_utf8_lossy(&said).into_owned(),
    )
}

/// Plans a restore to an LSN, or to the end of the archive.
fn plan(place: &Place, target: Option<Lsn>) {
    let program = testbed::programs::ours("pitr-restore").expect("it is built");
    let url = format!("file://{}", place.repository().display());
    let mut command = Command::new(program);
    command.args(["--repository", &url, "--dry-run"]);
    if let Some(target) = target {
        command.args(["--target-lsn", &target.to_string()]);
    }
    succeed("plan", &command.output().expect("pitr-restore runs"));
}

fn gaps(place: &Place) -> usize {
    place.files_below("/gap/").len()
}

/// Archives the server until a base backup behind the declared gap is listed, and some WAL after
/// it.
fn go_on(place: &Place, server: &Server, backups: usize) {
    let archiver = place.run(&server.conninfo());
    wait_until("a base backup is behind the gap", || {
        place.files_below("backup.json").len() >= backups
    });
    // More than a segment after the checkpoint of that backup.
    server.write_wal(2300);
    wait_flushed(server, server.lsn());
    assert_eq!(archiver.terminate().code(), Some(0));
    let verdict = place.verify(&server.conninfo());
    assert!(verdict.contains("no other gap"), "{verdict}");
    plan(place, None);
}

#[test]
fn after_pg_resetwal_the_archive_continues_on_the_operators_word() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "autovacuum=off");
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    let backup = place.command(&server.conninfo()).arg("backup").output();
    succeed("backup", &backup.expect("wal-archiver runs"));
    server.write_wal(1200);
    let past = server.lsn();
    server.sql("CHECKPOINT");
    wait_flushed(&server, server.lsn());
    assert_eq!(archiver.terminate().code(), Some(0));

    // While the server's WAL continues the archive, nothing is declared lost.
    let (code, said) = begin(&place, &server);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("continues the archive"), "{said}");
    assert_eq!(gaps(&place), 0);

    // The new WAL begins after the archived WAL.
    server.down("immediate");
    reset_wal(&server, &["-f"]);
    server.up();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("epoch begin --after-resetwal");
    wait_until("it is red", || {
        archiver
            .get("/api/v1/clusters")
            .contains("\"state\":\"broken\"")
    });
    assert_eq!(archiver.terminate().code(), Some(0));
    let (code, said) = begin(&place, &server);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("is declared lost"), "{said}");
    assert_eq!(gaps(&place), 1);
    go_on(&place, &server, 2);
    plan(&place, Some(past));

    // The server lost its WAL, and the new WAL has the LSNs of archived WAL.
    server.down("immediate");
    for segment in fs::read_dir(server.data().join("pg_wal"))
        .expect("pg_wal")
        .flatten()
    {
        if segment.path().is_file() {
            fs::remove_file(segment.path()).expect("it goes");
        }
    }
    reset_wal(&server, &["-f"]);
    server.up();
    let (code, said) = begin(&place, &server);
    assert_eq!(code, Some(2), "{said}");
    assert_eq!(gaps(&place), 1, "{said}");
    // The message names the segment with which the LSNs are new.
    let name = said.split("pg_resetwal -l ").nth(1).expect("the remedy");
    let name = name.split_whitespace().next().expect("a segment");
    server.down("fast");
    reset_wal(&server, &["-l", name]);
    server.up();
    let (code, said) = begin(&place, &server);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(gaps(&place), 2);
    go_on(&place, &server, 3);
    plan(&place, Some(past));
}
