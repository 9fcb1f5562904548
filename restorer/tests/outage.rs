//! A store that fails in the middle of a recovery: the recovery waits, does not promote early, and
//! completes.
//!
//! PostgreSQL would take a `restore_command` that gives up with 1 for the end of the archive, and
//! open a database without later commits.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Stdio,
    thread::sleep,
    time::Duration,
};

use testbed::{programs::directory, restored::Restored};

use crate::support::{Archived, long, query, servers, wait_until};

/// Returns the sealed segments, oldest first.
fn sealed(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(sealed(&path));
        } else if path.to_string_lossy().contains("/wal/") {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn mode(paths: &[PathBuf], mode: u32) {
    for path in paths {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("permissions");
    }
}

#[test]
fn a_store_that_fails_in_the_middle_is_waited_for() {
    let outage = Duration::from_secs(if long() { 60 } else { 3 });
    let Some((_, bin)) = servers().pop() else {
        return;
    };
    let mut archived = Archived::start(&bin, "");
    archived.sql("CREATE TABLE done (n int, filler text)");
    archived.backup();
    archived.sql("INSERT INTO done SELECT n, repeat('x', 700) FROM generate_series(1, 8000) n");
    archived.finish();

    let segments = sealed(&archived.place.path().join("repository"));
    assert!(segments.len() > 6, "{segments:?}");
    let away = &segments[segments.len() / 2..];
    // Owned by the user who restores, readable by nobody.
    mode(away, 0o000);
    let root = directory().expect("a directory");
    let arguments = ["--target-action=promote"];
    let mut restore =
        Restored::command(&archived.place, &bin, root.path(), &arguments).expect("built");
    let child = restore
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it runs");
    let log = root.path().join("data/tidemark_recovery.log");
    wait_until("it waits for the store", || {
        fs::read_to_string(&log).is_ok_and(|log| log.contains("is tried again"))
    });
    sleep(outage);
    // The server accepts no connections yet. PostgreSQL removes the file when it ends the recovery.
    let said = fs::read_to_string(&log).expect("the log");
    let recovers = root.path().join("data/recovery.signal").exists();
    assert!(
        recovers && !said.contains("selected new timeline"),
        "it promoted early:\n{said}"
    );
    mode(away, 0o600);
    let output = child.wait_with_output().expect("it ends");
    let report = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let restored = Restored::adopt(root, &bin, serde_json::from_str(&report).expect("JSON"));
    assert_eq!(
        query(
            &restored.conninfo(),
            "SELECT count(*), pg_is_in_recovery() FROM done"
        ),
        "8000"
    );
}
