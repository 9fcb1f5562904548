//! `--start` where the backup's settings are not enough: a primary whose limits were raised later,
//! a cluster whose configuration is outside of its data directory, as on Debian, and a recovery
//! with more memory.

use std::{fs, process::Stdio};

use testbed::{programs::directory, restored::Restored};

use crate::support::{Archived, query, said, servers, wait_until};

#[test]
fn missing_settings_are_named_and_missing_files_are_made() {
    let Some((_, bin)) = servers().pop() else {
        return;
    };
    let mut archived = Archived::start(&bin, "max_connections = 40\n");
    archived.sql("CREATE TABLE done (n int)");
    archived.backup();
    archived.sql("ALTER SYSTEM SET max_connections = 80");
    let data = archived.cluster.data();
    let mut restart = archived.cluster.program("pg_ctl").expect("pg_ctl");
    restart
        .arg("-D")
        .arg(&data)
        .arg("-l")
        .arg(data.join("restart.log"));
    let status = restart
        .args(["-w", "restart"])
        .stdout(Stdio::null())
        .status();
    assert!(status.expect("it runs").success());
    archived.sql("INSERT INTO done VALUES (1)");
    // The archiver reconnects automatically.
    wait_until("the archiver is back", || {
        archived.sql("SELECT count(*) FROM pg_stat_replication") == "1"
    });
    let now = "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US+00')";
    let behind = archived.sql(now);
    // An archived commit after that time proves it.
    archived.end_lsn();

    let root = directory().expect("a directory");
    let place = &archived.place;
    let restore = |root: &std::path::Path, arguments: &[&str]| {
        let mut restore = Restored::command(place, &bin, root, arguments).expect("built");
        restore.output().expect("it runs")
    };
    wait_until("the new setting is archived", || {
        let mut plan = place.program("pitr-restore").expect("built");
        let plan = plan.args(["--dry-run", "--target-time", &behind]).output();
        plan.is_ok_and(|plan| plan.status.success())
    });
    let output = restore(root.path(), &["--target-action=pause"]);
    let (_, error) = said(&output);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
    for part in ["max_connections = 40", "80", "--set NAME=VALUE"] {
        assert!(error.contains(part), "{error}");
    }
    assert!(
        !root.path().join("data/postmaster.pid").exists(),
        "it is left running"
    );
    // There are no readers during recovery, so fewer connections are enough.
    let restored = Restored::start::<&str>(place, &bin, &[]).expect("it is promoted");
    let shown =
        "SELECT current_setting('max_connections') || '|' || current_setting('hot_standby')";
    assert_eq!(query(&restored.conninfo(), shown), "40|off");
    assert_eq!(query(&restored.conninfo(), "SELECT n FROM done"), "1");
    drop(restored);
    let root = directory().expect("a directory");
    let arguments = [
        "--target-action=pause",
        "--set=max_connections=80",
        "--recovery-buffers=48MB",
    ];
    let output = restore(root.path(), &arguments);
    let (report, error) = said(&output);
    assert!(output.status.success(), "{error}");
    let settings = root.path().join("data/postgresql.auto.conf");
    let settings = fs::read_to_string(settings).expect("settings");
    assert!(settings.contains("shared_buffers = '16MB'"), "{settings}");
    assert!(!settings.contains("48MB"), "{settings}");
    let restored = Restored::adopt(root, &bin, serde_json::from_str(&report).expect("JSON"));
    assert_eq!(query(&restored.conninfo(), "SELECT n FROM done"), "1");
    let buffers = query(&restored.conninfo(), "SHOW shared_buffers");
    assert_eq!(buffers, "48MB");

    // The running server has read its files, and a backup no longer finds them.
    for name in ["postgresql.conf", "pg_hba.conf", "pg_ident.conf"] {
        fs::remove_file(data.join(name)).expect("it goes");
    }
    archived.backup();
    archived.finish();
    let restored = Restored::start(
        &archived.place,
        &bin,
        &["--target-immediate", "--set", "listen_addresses="],
    );
    let restored = restored.expect("it starts without the server's own files");
    assert_eq!(restored.report["executed"]["made_configuration"], true);
    let made = fs::read_to_string(restored.data().join("postgresql.conf")).expect("it was made");
    assert!(made.contains("max_prepared_transactions = 64"), "{made}");
    assert!(restored.data().join("postmaster.pid").exists());
}
