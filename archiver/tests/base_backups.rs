//! Base backups of servers in a difficult state: a damaged page, a file that the server skips, a
//! standby right after a promotion.

use std::{
    fs,
    os::unix::fs::FileExt,
    process::{Command, Stdio},
};

use serde_json::Value;

use crate::support::{Place, Server, postgres_bin, succeed, wait_until};

/// The size of a page.
const PAGE: u64 = 8192;

#[test]
fn a_damaged_page_is_named_and_warnings_of_the_server_are_kept() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    server.write_wal(100);
    let path = server.sql("SELECT pg_relation_filepath('load')");
    server.down("fast");
    let mut checksums = server.command("pg_checksums");
    checksums.args(["--enable", "-D"]).arg(server.data());
    succeed("pg_checksums", &checksums.output().expect("it runs"));
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(server.data().join(&path))
        .expect("the relation");
    // The last byte of block 3 belongs to a row.
    let at = 4 * PAGE - 1;
    let mut intact = [0];
    file.read_exact_at(&mut intact, at).expect("a byte");
    file.write_all_at(&[intact[0] ^ 1], at).expect("damage");
    server.up();
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    let backup = |options: &[&str]| {
        let mut command = place.command(&server.conninfo());
        let output = command.arg("backup").args(options).output();
        output.expect("wal-archiver runs")
    };
    let refused = backup(&[]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(4), "{said}");
    let page = format!("file {path}, block 3 (relation load of database postgres)");
    assert!(said.contains(&page), "{said}");
    assert!(place.files_below("backup.json").is_empty());

    file.write_all_at(&intact, at).expect("it is repaired");
    let fifo = server.data().join("fifo");
    let made = Command::new("mkfifo").arg(&fifo).status();
    assert!(made.expect("mkfifo runs").success());
    let taken: Value =
        serde_json::from_str(&succeed("backup", &backup(&["--json"]))).expect("a document");
    let warnings = taken["warnings"].as_array().expect("a list").clone();
    // The server warns once while it adds up the sizes, and once while it sends the files.
    let mut texts = warnings.iter().filter_map(Value::as_str);
    assert!(
        texts.any(|text| text.contains("skipping special file")),
        "{warnings:?}"
    );
    let list = place
        .command(&server.conninfo())
        .args(["backup", "list", "--json"])
        .output();
    let list: Value =
        serde_json::from_str(&succeed("list", &list.expect("it runs"))).expect("a document");
    assert_eq!(list[0]["backups"][0]["warnings"], Value::Array(warnings));
}

#[test]
#[ignore = "long: make test-long"]
fn a_backup_of_a_standby_waits_for_its_first_restartpoint_after_a_promotion() {
    let Some(bin) = postgres_bin() else { return };
    let primary = Server::start(&bin, "");
    let promoted = Server::standby_of(&primary);
    let standby = Server::standby_of(&promoted);
    // The checkpoint after the promotion is spread over many dirty pages, so that it takes long.
    primary.write_wal(4000);
    let lsn = primary.lsn();
    for server in [&promoted, &standby] {
        wait_until("it is replayed", || {
            server.sql(&format!("SELECT pg_last_wal_replay_lsn() >= '{lsn}'")) == "t"
        });
    }
    primary.down("immediate");
    promoted.promote();
    wait_until("the standby follows", || {
        standby.sql("SELECT received_tli FROM pg_stat_wal_receiver") == "2"
    });
    let place = Place::new();
    let archiver = place.run(&promoted.conninfo());
    archiver.wait_for_log("INFO streaming");
    let mut backup = place.command(&standby.conninfo());
    let log = place.spool().with_extension("backup.log");
    let file = fs::File::create(&log).expect("a log");
    let backup = backup
        .args(["backup", "--json"])
        .stdout(Stdio::piped())
        .stderr(file);
    let mut backup = backup.spawn().expect("wal-archiver runs");
    // Without the wait, the command ends here with an error.
    wait_until("it waits for the restartpoint", || {
        backup.try_wait().expect("a child").is_some()
            || fs::read_to_string(&log).is_ok_and(|log| log.contains("restartpoint_awaited"))
    });
    promoted.sql("CHECKPOINT");
    let output = backup.wait_with_output().expect("it ends");
    let said = fs::read_to_string(&log).expect("a log");
    assert!(output.status.success(), "{said}");
    let taken: Value = serde_json::from_slice(&output.stdout).expect("a document");
    let branch = taken["branch"].as_str().expect("a branch");
    assert!(branch.starts_with("00000002-"), "{branch}");
}
