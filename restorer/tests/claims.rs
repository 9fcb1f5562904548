//! The directories of a restore belong to one restore: its target is locked, and the directories of
//! its tablespaces are claimed until their server uses them. Parent and copies are on one host.

use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
    thread::sleep,
    time::Duration,
};

use rustix::fs::{FlockOperation, flock};
use serde_json::Value;
use testbed::{
    programs::{command, directory, ours, succeed},
    restored::Restored,
};

use crate::{
    scene::{MARKER, Scene, owned},
    support::{Archived, contents_below, files_below, query, said, servers, wait_until},
};

const CLAIM: &str = "tidemark_claim.json";

fn refused(done: &Output, code: i32, parts: &[&str]) {
    let (_, error) = said(done);
    assert_eq!(done.status.code(), Some(code), "{error}");
    for part in parts {
        assert!(error.contains(part), "no {part:?} in: {error}");
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// Timeline 1's copy of the segment of a promotion was never archived. Only timeline 2's copy,
/// which `wal-fetch` delivers, contains the creation of a tablespace and a lock that is held at the
/// stop.
#[test]
fn a_creation_that_only_the_next_timeline_holds_is_in_the_plan() {
    let Some((_, bin)) = servers().pop() else {
        return;
    };
    let mut archived = Archived::start(&bin, "");
    let places = directory().expect("a directory");
    let place = owned(&places.path().join("of_the_parent"));
    archived.sql("CREATE TABLE keep (n int)");
    archived.sql("CREATE TABLE busy (n int)");
    archived.backup();
    archived.sql("SELECT pg_switch_wal()");
    archived.sql("INSERT INTO keep VALUES (0)");
    let before = archived.sql("SELECT pg_current_wal_insert_lsn()");
    archived.sql("INSERT INTO keep VALUES (1)");
    archived.sql(&format!(
        "CREATE TABLESPACE ts LOCATION '{}'",
        place.display()
    ));
    let mut holder = archived.cluster.connect().expect("a client");
    holder
        .batch_execute("BEGIN; LOCK TABLE busy; INSERT INTO busy VALUES (1)")
        .expect("a lock");
    archived.sql("CREATE TABLE t TABLESPACE ts AS SELECT generate_series(1, 300) n");
    let after = archived.sql("SELECT pg_current_wal_insert_lsn()");
    archived.sql("INSERT INTO keep VALUES (2)");
    holder.batch_execute("COMMIT").expect("it commits");
    drop(holder);
    let segment = archived.sql("SELECT pg_walfile_name(pg_current_wal_insert_lsn())");
    archived.finish();
    archived.cluster.stop().expect("it stops");
    let signal = archived.cluster.data().join("standby.signal");
    fs::write(&signal, "").expect("a file");
    let owner = fs::metadata(archived.cluster.data()).expect("its owner");
    std::os::unix::fs::chown(
        &signal,
        Some(std::os::unix::fs::MetadataExt::uid(&owner)),
        Some(std::os::unix::fs::MetadataExt::gid(&owner)),
    )
    .expect("chown");
    archived.cluster.start_again().expect("it starts");
    archived.cluster.promote().expect("a promotion");
    archived.sql("CHECKPOINT");
    let fork = archived.sql("SELECT pg_walfile_name(pg_current_wal_insert_lsn())");
    assert_eq!(fork[8..], segment[8..], "the fork is in the same segment");
    let conninfo = archived.cluster.conninfo();
    archived.follow(&conninfo);
    archived.sql("SELECT pg_switch_wal()");
    archived.sql("INSERT INTO keep VALUES (3)");
    archived.finish();
    assert_eq!(archived.sql("SELECT count(*) FROM t"), "300");
    archived.sql("CHECKPOINT");
    let repository = archived.place.path().join("repository");
    for object in files_below(&repository) {
        if text(&object).contains(&segment) {
            fs::remove_file(&object).expect("it is removed");
        }
    }
    let parents = contents_below(places.path());

    let run = |arguments: &[&str]| {
        let mut restore = command(&ours("pitr-restore").expect("it is built")).expect("a user");
        restore.arg(format!("--repository=file://{}", repository.display()));
        restore.arg("--catalog=/nonexistent/catalog");
        restore.env("LD_LIBRARY_PATH", bin.join("../lib"));
        restore.args(arguments).output().expect("it runs")
    };
    let target = format!("--target-lsn={after}");
    let parts = [text(&place), "exists here and is not empty"];
    refused(&run(&[&target, "--dry-run"]), 3, &parts);

    // `wal-fetch` does not believe a plan that does not name the creation.
    let root = directory().expect("a directory");
    let new = root.path().join("ts");
    let map = format!("--tablespace-mapping={}={}", place.display(), new.display());
    let planned = run(&[&target, &map, "--dry-run", "--json"]);
    let (json, error) = said(&planned);
    assert!(planned.status.success(), "{error}");
    let mut plan: Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(plan["tablespaces"][0]["location"], text(&place));
    assert_eq!(plan["locks_known"], true, "{plan}");
    assert_eq!(plan["locks"][0]["name"], "public.busy", "{plan}");
    plan["tablespaces"] = Value::Array(Vec::new());
    plan["wal_changes"] = Value::Array(Vec::new());
    let fetch = |plan: &str| {
        let (file, wal) = (root.path().join("plan"), root.path().join("wal"));
        fs::write(&file, plan).expect("a plan");
        let plan = format!("--plan={}", file.display());
        (run(&["wal-fetch", &segment, text(&wal), &plan]), wal)
    };
    let (done, wal) = fetch(&plan.to_string());
    refused(&done, 255, &[text(&place), "does not name it"]);
    assert!(!wal.exists());
    // A creation after the stop is the end of the WAL.
    let early = run(&[&format!("--target-lsn={before}"), "--dry-run", "--json"]);
    let (done, wal) = fetch(&said(&early).0);
    assert!(done.status.success(), "{}", said(&done).1);
    let wal = fs::read(wal).expect("the WAL");
    assert_eq!(wal.len(), 1 << 20);
    let location = text(&place).as_bytes();
    assert!(!wal.windows(location.len()).any(|part| part == location));

    let data = root.path().join("data");
    let socket = format!("--set=unix_socket_directories={}", root.path().display());
    let done = run(&[
        &target,
        &map,
        "--start",
        "--json",
        &socket,
        "--pg-bin",
        text(&bin),
        "--target-dir",
        text(&data),
    ]);
    let (report, error) = said(&done);
    assert!(done.status.success(), "{error}");
    let restored = Restored::adopt(root, &bin, serde_json::from_str(&report).expect("JSON"));
    let copy = restored.conninfo();
    assert_eq!(query(&copy, "SELECT count(*) FROM t"), "300");
    assert!(!new.join(CLAIM).exists(), "recovery has ended");
    for sql in ["TRUNCATE t", "CHECKPOINT"] {
        query(&copy, sql);
    }
    restored.stop().expect("it stops");
    assert_eq!(contents_below(places.path()), parents);
}

/// The directory of a tablespace that the replay creates is empty when the restore is planned.
/// Until the copy starts, another restore or the parent may want it.
#[test]
fn a_directory_that_the_replay_will_use_is_claimed() {
    let Some((_, bin)) = servers().pop() else {
        return;
    };
    let mut archived = Archived::start(&bin, "");
    let places = directory().expect("a directory");
    let place = owned(&places.path().join("place"));
    archived.sql("CREATE TABLE keep (n int)");
    archived.backup();
    let create = format!("CREATE TABLESPACE ts LOCATION '{}'", place.display());
    archived.sql(&create);
    archived.sql("CREATE TABLE t TABLESPACE ts AS SELECT generate_series(1, 100) n");
    let target = format!(
        "--target-lsn={}",
        archived.sql("SELECT pg_current_wal_insert_lsn()")
    );
    for sql in [
        "INSERT INTO keep VALUES (1)",
        "SELECT pg_switch_wal()",
        "DROP TABLE t",
        "CHECKPOINT",
    ] {
        archived.sql(sql);
    }
    archived.sql("DROP TABLESPACE ts");
    archived.finish();
    assert!(files_below(&place).is_empty());

    let restore = |root: &Path, more: &[&str]| {
        let mut restore = archived.pitr_restore();
        restore.arg("--target-dir").arg(root.join("data"));
        restore.args([&target, "--target-action=promote", "--set=fsync=off"]);
        restore.arg(format!("--set=unix_socket_directories={}", root.display()));
        restore.args(more).output().expect("it runs")
    };
    // A claim whose restore is gone is no obstacle.
    let gone = directory().expect("a directory");
    let done = restore(gone.path(), &[]);
    assert!(done.status.success(), "{}", said(&done).1);
    drop(gone);
    assert!(place.join(CLAIM).exists());

    let root = directory().expect("a directory");
    let done = restore(root.path(), &[]);
    assert!(done.status.success(), "{}", said(&done).1);
    let second = directory().expect("a directory");
    let parts = [
        text(&place),
        "is claimed by the restore into",
        text(root.path()),
    ];
    refused(&restore(second.path(), &["--dry-run"]), 3, &parts);
    refused(&restore(second.path(), &[]), 3, &parts);

    // The parent is not kept from its place; the copy does not touch it then.
    archived.sql(&create);
    archived.sql("CREATE TABLE u TABLESPACE ts AS SELECT generate_series(1, 500) n");
    assert_eq!(archived.sql("SELECT count(*) FROM u"), "500");
    archived.sql("CHECKPOINT");
    let parents = contents_below(&place);
    let start = || {
        let mut pg_ctl = command(&bin.join("pg_ctl")).expect("pg_ctl");
        pg_ctl.env("LD_LIBRARY_PATH", bin.join("../lib"));
        pg_ctl.arg("-D").arg(root.path().join("data"));
        pg_ctl.arg("-l").arg(root.path().join("log"));
        pg_ctl.args(["-w", "start"]);
        let status = pg_ctl.stdout(Stdio::null()).stderr(Stdio::null()).status();
        status.expect("it runs").success()
    };
    start();
    let log = || fs::read_to_string(root.path().join("log")).unwrap_or_default();
    wait_until("the recovery ends", || {
        log().contains("database system is shut down")
    });
    assert!(log().contains("since the restore was planned"), "{}", log());
    assert_eq!(contents_below(&place), parents);
    for sql in ["DROP TABLE u", "CHECKPOINT", "DROP TABLESPACE ts"] {
        archived.sql(sql);
    }
    assert!(start(), "{}", log());
    let restored = Restored::adopt(root, &bin, Value::Null);
    wait_until("the copy is promoted", || {
        query(&restored.conninfo(), "SELECT pg_is_in_recovery()") == "f"
    });
    assert_eq!(query(&restored.conninfo(), "SELECT count(*) FROM t"), "100");
    wait_until("the claim is removed", || !place.join(CLAIM).exists());
}

#[test]
fn a_restore_takes_no_directory_of_another_one() {
    let Some(scene) = Scene::make() else { return };
    let parents = scene.places.path().join("tablespace");
    scene.archived.sql("CHECKPOINT");
    let before = contents_below(&parents);
    let plain = |data: &Path| {
        let mut restore = scene.archived.pitr_restore();
        restore.arg("--target-dir").arg(data);
        restore
    };
    let output = |command: &mut Command| command.output().expect("it runs");
    let root = directory().expect("a directory");
    let data = root.path().join("data");

    // What the restore refuses, its plan refuses too.
    for more in [&["--dry-run"][..], &[]] {
        let done = output(plain(&data).args(more));
        refused(&done, 2, &[text(&parents), "is not empty"]);
    }
    let around = root.path().join("x/../data/ts");
    let done = output(plain(&data).arg(scene.mapping(&around)).arg("--dry-run"));
    refused(&done, 2, &["is there; give it another place"]);

    // A copy of the parent's data directory has links to the parent's tablespaces.
    let mut copy = command(Path::new("/bin/cp")).expect("cp");
    succeed(copy.arg("-a").arg(scene.archived.cluster.data()).arg(&data)).expect("a copy");
    fs::remove_file(data.join("postmaster.pid")).expect("it is removed");
    for more in [&["--delta", "--dry-run"][..], &["--delta"]] {
        let done = output(plain(&data).args(more));
        refused(&done, 2, &[text(&parents), "may be another server's"]);
    }
    assert_eq!(contents_below(&parents), before);
    let mut delta = scene.restore(root.path());
    succeed(delta.arg("--delta")).expect("with a directory of its own it is done");
    assert_eq!(contents_below(&parents), before);
    scene.prove(root);

    // One restore at a time.
    let root = directory().expect("a directory");
    let data = owned(&root.path().join("data"));
    let lock = fs::File::open(&data).expect("the directory");
    flock(&lock, FlockOperation::NonBlockingLockExclusive).expect("a lock");
    let holder = format!("process {}", std::process::id());
    let done = output(&mut scene.restore(root.path()));
    refused(&done, 2, &["is under way", &holder]);
    assert_eq!(fs::read_dir(&data).expect("it lists").count(), 0);
    drop(lock);

    // Killed; another restore has the directory of its tablespace when it runs again.
    let shared = root.path().join("tablespace");
    let mut child = scene
        .restore(root.path())
        .stdout(Stdio::null())
        .spawn()
        .expect("it runs");
    while !(data.join(MARKER).exists() && shared.join(CLAIM).exists()) {
        assert!(matches!(child.try_wait(), Ok(None)), "it ended too early");
        sleep(Duration::from_micros(100));
    }
    child.kill().expect("kill -9");
    child.wait().expect("it is gone");
    assert!(data.join(MARKER).exists(), "it was killed too late");
    fs::remove_dir_all(&shared).expect("it is removed");
    let second = directory().expect("a directory");
    let second_data = second.path().join("data");
    let socket = format!("--set=unix_socket_directories={}", second.path().display());
    succeed(plain(&second_data).args([
        &scene.mapping(&shared),
        "--target-action=promote",
        &socket,
    ]))
    .expect("the second restore");
    let taken = contents_below(&shared);
    assert!(taken.len() > 1, "{} files", taken.len());
    let done = output(&mut scene.restore(root.path()));
    refused(&done, 2, &[text(&shared), "is not empty"]);
    assert_eq!(contents_below(&shared), taken);
    scene.prove(second);
}
