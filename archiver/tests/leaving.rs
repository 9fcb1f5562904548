//! Keeping, describing and releasing a backup, and leaving: `remove` drops the slots on the primary
//! and its standbys. The same server is used throughout.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Output,
};

use serde_json::Value;

use crate::support::{Place, Server, postgres_bin, succeed, wait_until};

/// Returns the exit code, and standard output followed by standard error.
fn ended(output: Output) -> (Option<i32>, String) {
    let said = [output.stdout, output.stderr].concat();
    (
        output.status.code(),
        String::from_utf8_lossy(&said).into_owned(),
    )
}

/// Returns the files below a directory.
fn files_below(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    paths
        .flat_map(|path| match path.is_dir() {
            true => files_below(&path),
            false => vec![path],
        })
        .collect()
}

fn slots(server: &Server) -> String {
    server.sql("SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'tidemark_main'")
}

#[test]
fn a_backup_is_kept_until_it_is_released_and_remove_drops_every_slot() {
    let Some(bin) = postgres_bin() else { return };
    let primary = Server::start(&bin, "");
    let standby = Server::standby_of(&primary);
    let place = Place::new();
    let configured = |name: &str, keys: &str| {
        let configuration = place.spool().with_extension(name);
        fs::write(&configuration, keys).expect("a configuration");
        let mut command = place.command(&primary.conninfo());
        command.arg("--config").arg(&configuration);
        command
    };
    let keys = format!(
        "standbys = ['{}']\napplication_name = 'tm_one'\n",
        standby.conninfo()
    );
    // The daemon has no retention, so that nothing expires while the test runs.
    let archiver = place.run_with(configured("daemon.toml", &keys));
    let with_retention = format!("{keys}keep_window = '1s'\nkeep_backups_min = 1\n");
    let command = || configured("toml", &with_retention);
    let run = |arguments: &[&str]| ended(command().args(arguments).output().expect("it runs"));
    let said = |arguments: &[&str]| {
        let output = command().args(arguments).output();
        succeed(&arguments.join(" "), &output.expect("it runs"))
    };
    wait_until("it streams under its own name", || {
        primary.sql("SELECT count(*) FROM pg_stat_replication WHERE application_name = 'tm_one'")
            == "1"
    });
    wait_until("the standby has our slot", || slots(&standby) == "1");
    // A second archiver of the same server has a slot and a name of its own.
    let second = Place::new();
    let slot = second.spool().with_extension("toml");
    fs::write(&slot, "slot = 'offsite'\napplication_name = 'offsite'\n").expect("a configuration");
    let mut offsite = second.command(&primary.conninfo());
    offsite.arg("--config").arg(&slot);
    let offsite = second.run_with(offsite);
    wait_until("the second one streams under its name", || {
        primary.sql("SELECT count(*) FROM pg_stat_replication WHERE application_name = 'offsite'")
            == "1"
    });
    assert_eq!(offsite.terminate().code(), Some(0));

    // A named daemon that does not archive this cluster ends the command before the backup.
    let address = archiver.address();
    let (code, text) = run(&["backup", "--http", "127.0.0.1:1"]);
    assert_eq!(code, Some(5), "{text}");
    assert!(
        text.contains("no daemon at 127.0.0.1:1 archives cluster main"),
        "{text}"
    );
    assert_eq!(place.files_below(".tar.zst").len(), 0);
    said(&["backup", "--http", &address, "--label", "first"]);
    said(&["backup"]);
    let status: Value =
        serde_json::from_str(&said(&["status", "--json", "--http", &address])).expect("a document");
    // The command has ended, so the daemon knows the backup.
    let known = status[0]["last_backup"]["id"].clone();
    assert_eq!(status[0]["cluster"], "main");
    assert_eq!(status[0]["source"]["stream_connected"], true, "{status}");

    let list = || -> Value {
        let document: Value =
            serde_json::from_str(&said(&["backup", "list", "--json"])).expect("a document");
        document[0]["backups"].clone()
    };
    let first = list()[0]["id"].as_str().expect("an ID").to_owned();
    assert_eq!(list()[0]["label"], "first");
    assert_eq!(list()[1]["kept"], Value::Null);
    assert_eq!(known, list()[1]["id"], "{status}");
    // No group shares the spool.
    for path in files_below(&place.spool()) {
        let mode = fs::metadata(&path).map_or(0, |found| found.permissions().mode());
        assert_eq!(mode & 0o077, 0, "{}: {mode:o}", path.display());
    }
    // Both backups must be older than the window, so that only the newest is kept.
    wait_until("the first backup may expire", || {
        said(&["expire", "--dry-run"]).contains(&format!("expire  {first}"))
    });
    said(&["backup", "keep", &first, "--reason", "audit of 2026"]);
    said(&["backup", "annotate", &first, "before the migration"]);
    let plan = said(&["expire", "--dry-run"]);
    assert!(plan.contains(&format!("keep    {first}")), "{plan}");
    assert!(!plan.contains(&format!("expire  {first}")), "{plan}");
    let (code, text) = run(&["backup", "delete", &first]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains(&format!("backup release {first}")), "{text}");
    assert_eq!(list()[0]["kept"], "audit of 2026");
    assert_eq!(list()[0]["annotation"], "before the migration");
    let text = said(&["backup", "list"]);
    assert!(
        text.contains("before the migration  KEPT (audit of 2026)"),
        "{text}"
    );
    said(&["backup", "release", &first]);
    assert_eq!(list()[0]["kept"], Value::Null);
    let plan = said(&["expire", "--dry-run"]);
    assert!(plan.contains(&format!("expire  {first}")), "{plan}");
    let (code, text) = run(&["backup", "keep", "20200101T000000Z-0000"]);
    assert_eq!(code, Some(2), "{text}");
    // A running archiver would create the slots again.
    let (code, text) = run(&["remove"]);
    assert_eq!(code, Some(2), "{text}");
    assert_eq!((slots(&primary), slots(&standby)), ("1".into(), "1".into()));
    assert_eq!(archiver.terminate().code(), Some(0));
    wait_until("the slot is free", || {
        primary.sql("SELECT bool_or(active) FROM pg_replication_slots") == "f"
    });
    // The notes are intact objects of the repository.
    said(&["verify"]);
    let text = said(&["remove", "--dry-run"]);
    assert_eq!(
        text.matches("would drop the slot \"tidemark_main\"")
            .count(),
        2,
        "{text}"
    );
    assert_eq!((slots(&primary), slots(&standby)), ("1".into(), "1".into()));

    // A server that is down keeps its slot, and the command says so.
    standby.down("fast");
    let (code, text) = run(&["remove"]);
    assert_eq!(code, Some(5), "{text}");
    assert!(
        text.contains("pg_drop_replication_slot('tidemark_main')"),
        "{text}"
    );
    assert_eq!(slots(&primary), "0");
    standby.up();
    let text = said(&["remove"]);
    assert!(
        text.contains("there is no slot \"tidemark_main\""),
        "{text}"
    );
    assert!(
        text.contains("the slot \"tidemark_main\" is dropped"),
        "{text}"
    );
    assert!(
        text.contains(&place.repository().display().to_string()),
        "{text}"
    );
    assert_eq!(slots(&standby), "0");
}
