//! `--delta`: equal files stay, all others become the backup's, and only for the same cluster. An
//! interrupted restore neither starts nor looks complete.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use serde_json::Value;
use testbed::{
    cluster::{PORT, conninfo},
    programs::{command, directory, succeed},
};

use crate::{
    scene::{MARKER, SUMS, Scene, owned},
    support::{Chance, long, query, said, wait_until},
};

/// A restored server that is stopped when dropped.
struct Running<'a> {
    scene: &'a Scene,
    root: &'a Path,
}

impl<'a> Running<'a> {
    fn start(scene: &'a Scene, root: &'a Path) -> Self {
        let running = Self { scene, root };
        let log = root.join("log").display().to_string();
        assert!(running.pg_ctl(&["-l", &log, "-w", "start"]), "{log}");
        wait_until("it is promoted", || {
            running.sql("SELECT pg_is_in_recovery()") == "f"
        });
        running
    }

    fn sql(&self, sql: &str) -> String {
        query(&conninfo(self.root, PORT), sql)
    }

    fn pg_ctl(&self, arguments: &[&str]) -> bool {
        let mut pg_ctl = command(&self.scene.bin.join("pg_ctl")).expect("pg_ctl");
        pg_ctl.env("LD_LIBRARY_PATH", self.scene.bin.join("../lib"));
        pg_ctl.arg("-D").arg(self.root.join("data")).args(arguments);
        let status = pg_ctl.stdout(Stdio::null()).stderr(Stdio::null()).status();
        status.is_ok_and(|status| status.success())
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if self.root.join("data/postmaster.pid").exists() {
            self.pg_ctl(&["-m", "fast", "-w", "stop"]);
        }
    }
}

fn refused(command: &mut Command, reason: &str) {
    let output = command.output().expect("it runs");
    let (_, error) = said(&output);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
    assert!(error.contains(reason), "{error}");
}

fn delta(scene: &Scene, root: &Path) -> Command {
    let mut restore = scene.restore(root);
    restore.args(["--delta", "--json"]);
    restore
}

/// Runs the restore to the end. Returns its report.
fn executed(scene: &Scene, root: &Path) -> Value {
    let said = succeed(&mut delta(scene, root)).expect("a delta restore");
    let report: Value = serde_json::from_str(&said).expect("JSON");
    eprintln!("{}", report["executed"]);
    report["executed"].clone()
}

/// The file of the large table.
fn large_file(data: &Path) -> PathBuf {
    let mut largest = (0, PathBuf::new());
    for database in fs::read_dir(data.join("base"))
        .expect("databases")
        .flatten()
    {
        for file in fs::read_dir(database.path()).expect("files").flatten() {
            let length = file.metadata().expect("its length").len();
            largest = largest.max((length, file.path()));
        }
    }
    largest.1
}

#[test]
fn what_is_equal_stays_and_all_else_becomes_the_backups() {
    let Some(scene) = Scene::make() else { return };
    let root = directory().expect("a directory");
    let path = root.path().to_owned();
    // Into an empty directory it is a restore like any other.
    assert_eq!(executed(&scene, &path)["kept_files"], 0);
    let restored = Running::start(&scene, &path);
    assert_eq!(restored.sql(SUMS), scene.sums);
    for sql in [
        "DELETE FROM elsewhere WHERE n % 2 = 0",
        "CREATE TABLE newer AS SELECT generate_series(1, 1000) n",
        "CREATE DATABASE newer",
        "SELECT pg_create_physical_replication_slot('newer', true)",
        "CHECKPOINT",
    ] {
        restored.sql(sql);
    }
    refused(&mut delta(&scene, &path), "a server runs in");
    drop(restored);
    refused(&mut scene.restore(&path), "is complete");
    let data = path.join("data");
    // Changes one bit of a table without a change of size or time.
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(large_file(&data));
    let file = file.expect("the large table");
    let modified = file.metadata().and_then(|metadata| metadata.modified());
    let mut byte = [0];
    file.read_exact_at(&mut byte, 100_000).expect("it is large");
    file.write_all_at(&[byte[0] ^ 4], 100_000)
        .expect("a flipped bit");
    file.set_modified(modified.expect("its time"))
        .expect("its time");
    fs::write(data.join("base/stray"), "not of this backup").expect("a file");
    fs::create_dir(data.join("strays")).expect("a directory");

    let done = executed(&scene, &path);
    let (kept, slices) = (&done["kept_files"], &done["slices"]);
    assert!(kept.as_u64().is_some_and(|kept| kept > 500), "{done}");
    assert!(slices.as_u64() > Some(1), "{done}");
    for stray in ["base/stray", "strays", "pg_replslot/newer", MARKER] {
        assert!(!data.join(stray).exists(), "{stray}");
    }
    scene.prove(root);
}

#[test]
fn slices_of_which_everything_is_kept_are_not_fetched() {
    let Some(scene) = Scene::make() else { return };
    let root = directory().expect("a directory");
    executed(&scene, root.path());
    // Only files that a restore adds or consumes differ from the backup.
    let done = executed(&scene, root.path());
    assert!(
        done["fetched_slices"].as_u64() < done["slices"].as_u64(),
        "{done}"
    );
    scene.prove(root);
}

#[test]
fn nothing_but_a_stopped_data_directory_of_the_same_cluster_is_taken() {
    let Some(scene) = Scene::make() else { return };
    let root = directory().expect("a directory");
    let data = owned(&root.path().join("data"));
    fs::write(data.join("precious"), "somebody's").expect("a file");
    refused(
        &mut delta(&scene, root.path()),
        "not a data directory of PostgreSQL",
    );
    let control = owned(&data.join("global")).join("pg_control");
    let mut other = vec![0_u8; 8192];
    other[..8].copy_from_slice(&7_000_000_000_000_000_001_u64.to_ne_bytes());
    fs::write(&control, &other).expect("a file");
    refused(&mut delta(&scene, root.path()), "is another cluster's");
    assert!(data.join("precious").exists() && control.exists() && !data.join(MARKER).exists());

    // A non-empty directory for a tablespace that this data directory never had.
    let root = directory().expect("a directory");
    executed(&scene, root.path());
    let foreign = scene.places.path().join("foreign");
    fs::create_dir(&foreign).expect("a directory");
    fs::write(foreign.join("precious"), "somebody's").expect("a file");
    let mut restore = scene.archived.pitr_restore();
    restore
        .arg("--target-dir")
        .arg(root.path().join("data"))
        .arg("--delta");
    refused(restore.arg(scene.mapping(&foreign)), "is not empty");
    assert!(foreign.join("precious").exists());
}

#[test]
fn killed_at_any_moment_it_does_not_start_and_is_finished_by_the_same_command() {
    let Some(scene) = Scene::make() else { return };
    let mut chance = Chance::new();
    let (mut unfinished, kills) = (0, if long() { 30 } else { 6 });
    let mut root = directory().expect("a directory");
    let began = Instant::now();
    executed(&scene, root.path());
    let whole = began.elapsed();
    for kill in 0..kills {
        let path = root.path().to_owned();
        let data = path.join("data");
        // Gives the restore work to do: the large table differs from the backup.
        if !data.join(MARKER).exists() {
            fs::write(large_file(&data), "not of this backup").expect("a file");
        }
        let mut child = delta(&scene, &path)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("it runs");
        // Planning takes longer than the rest, so two of three kills come after the copy has begun.
        let begun = kill % 3 != 2;
        while begun && !data.join(MARKER).exists() && matches!(child.try_wait(), Ok(None)) {
            sleep(Duration::from_millis(1));
        }
        let part = f64::from(u32::try_from(chance.below(1000)).expect("small"));
        sleep(whole.mul_f64(part / if begun { 5000.0 } else { 1000.0 }));
        child.kill().expect("kill -9");
        child.wait().expect("it is gone");
        if data.join(MARKER).exists() && !data.join("global/pg_control").exists() {
            unfinished += 1;
            scene.assert_unfinished(&data);
            refused(&mut scene.restore(&path), "--delta");
        }
        if kill % 3 == 2 || kill + 1 == kills {
            executed(&scene, &path);
            let next = directory().expect("a directory");
            scene.prove(std::mem::replace(&mut root, next));
            if kill + 1 < kills {
                executed(&scene, root.path());
            }
        }
    }
    eprintln!("{kills} kills: {unfinished} left it unfinished");
    assert!(unfinished > 0, "no kill came while it was under way");
}
