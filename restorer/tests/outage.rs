//! A store that fails in the middle of a recovery: the recovery waits, does not promote early, and
//! completes.
//!
//! PostgreSQL would take a `restore_command` that gives up with 1 for the end of the archive, and
//! open a database without later commits.

use std::{
    fs,
    process::Stdio,
    thread::sleep,
    time::{Duration, Instant},
};

use testbed::{programs::directory, restored::Restored};

use crate::support::{Archived, long, query, servers, wait_until};

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

    let here = archived.place.path().join("repository");
    let away = here.with_extension("away");
    let root = directory().expect("a directory");
    let arguments = ["--target-action=promote"];
    let mut restore =
        Restored::command(&archived.place, &bin, root.path(), &arguments).expect("built");
    let child = restore
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it runs");
    // The repository goes when the server starts, with the first segments or before them.
    let log = root.path().join("data/tidemark_recovery.log");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !log.exists() {
        assert!(Instant::now() < deadline, "the server does not start");
        sleep(Duration::from_millis(1));
    }
    repository::durable::rename(&here, &away).expect("it goes");
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
    repository::durable::rename(&away, &here).expect("it is back");
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
