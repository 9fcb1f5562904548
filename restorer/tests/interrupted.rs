//! A restore with `--start` that ends during the replay: the same command restores again, also into
//! the directories of its tablespaces, unless the copy was open for writing.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use testbed::{
    programs::{command, directory, ours},
    restored::Restored,
};

use crate::{
    scene::owned,
    support::{Archived, oldest_and_newest, query, said, wait_until},
};

/// The sums of a table in each tablespace, the second of which the replay creates.
const SUMS: &str = "SELECT (SELECT sum(n) FROM one) || ' ' || (SELECT sum(n) FROM two)";

struct Scene {
    archived: Archived,
    bin: PathBuf,
    places: TempDir,
    /// The segment after the creation of the second tablespace.
    last: String,
}

impl Scene {
    fn make(bin: &Path) -> Self {
        let places = directory().expect("a directory");
        let mut archived = Archived::start(bin, "");
        let create = |archived: &Archived, name: &str| {
            let place = owned(&places.path().join(name));
            let location = place.display();
            archived.sql(&format!("CREATE TABLESPACE {name} LOCATION '{location}'"));
            let fill = "AS SELECT generate_series(1, 100) AS n";
            archived.sql(&format!("CREATE TABLE {name} TABLESPACE {name} {fill}"));
        };
        create(&archived, "one");
        archived.backup();
        create(&archived, "two");
        archived.sql("SELECT pg_switch_wal()");
        archived.sql("INSERT INTO one VALUES (1000)");
        let last = archived.sql("SELECT pg_walfile_name(pg_current_wal_insert_lsn())");
        archived.finish();
        Self {
            archived,
            bin: bin.to_owned(),
            places,
            last,
        }
    }

    /// Returns the command that restores below `root`. While the file `hang` exists there, its
    /// server waits for the last segment and creates `waits`.
    fn restore(&self, root: &Path) -> Command {
        let program = ours("pitr-restore").expect("built");
        let (root_shown, real) = (root.display(), self.bin.join("postgres"));
        let fetch = format!(
            "#!/bin/sh\n[ $1 = {} ] && echo > {root_shown}/waits && exec sleep 600\n\
             exec {} --repository=file://{}/repository wal-fetch --plan tidemark_plan.json $1 $2\n",
            self.last,
            program.display(),
            self.archived.place.path().display()
        );
        let server = format!(
            "#!/bin/sh\n[ -e {root_shown}/hang ] || exec {real} \"$@\"\n\
             exec {real} \"$@\" -c 'restore_command={root_shown}/fetch %f %p'\n",
            real = real.display()
        );
        let bin = root.join("bin");
        fs::create_dir_all(&bin).expect("a directory");
        for (path, script) in [(root.join("fetch"), fetch), (bin.join("postgres"), server)] {
            fs::write(&path, script).expect("a script");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("executable");
        }
        let mut restore =
            Restored::command::<&str>(&self.archived.place, &bin, root, &[]).expect("built");
        restore.env("LD_LIBRARY_PATH", self.bin.join("../lib"));
        for name in ["one", "two"] {
            let (old, new) = (self.places.path().join(name), root.join(name));
            let mapping = format!("{}={}", old.display(), new.display());
            restore.arg(format!("--tablespace-mapping={mapping}"));
        }
        restore.stdout(Stdio::piped()).stderr(Stdio::piped());
        restore
    }

    /// Restores until the server waits for the last segment.
    fn begin(&self, root: &Path) -> Child {
        fs::write(root.join("hang"), "").expect("a file");
        let waits = root.join("waits");
        if waits.exists() {
            fs::remove_file(&waits).expect("it is removed");
        }
        let restore = self.restore(root).spawn().expect("it runs");
        wait_until("the server waits for WAL", || waits.exists());
        restore
    }

    /// Interrupts a restore during the replay.
    fn interrupt(&self, root: &Path) {
        let restore = self.begin(root);
        // A shell lets a program in the background ignore SIGINT.
        kill_process(Pid::from_child(&restore), Signal::TERM).expect("a signal");
        let output = restore.wait_with_output().expect("it ends");
        refused(&output, 1, &["SIGTERM came", "run the same command again"]);
        assert!(!root.join("data/postmaster.pid").exists());
        fs::remove_file(root.join("hang")).expect("it is removed");
    }
}

/// Kills a process and waits for its end.
fn kill(process: &str) {
    let working = PathBuf::from(format!("/proc/{process}/cwd"));
    let process = process.parse().ok().and_then(Pid::from_raw);
    // Another process of the server may have ended by itself.
    let _gone = kill_process(process.expect("a process"), Signal::KILL);
    wait_until("the process is gone", || fs::read_link(&working).is_err());
}

fn refused(output: &Output, code: i32, parts: &[&str]) {
    let (_, error) = said(output);
    assert_eq!(output.status.code(), Some(code), "{error}");
    for part in parts {
        assert!(error.contains(part), "no {part:?} in: {error}");
    }
}

#[test]
fn the_same_command_restores_again_after_an_interruption_in_the_replay() {
    let Some((_, bin)) = oldest_and_newest().pop() else {
        return;
    };
    let scene = Scene::make(&bin);
    let root = directory().expect("a directory");
    scene.interrupt(root.path());

    // Killed: its server runs on.
    let mut restore = scene.begin(root.path());
    restore.kill().expect("kill -9");
    restore.wait().expect("it is gone");
    let running = scene.restore(root.path()).output().expect("it runs");
    let lines = fs::read_to_string(root.path().join("data/postmaster.pid")).expect("it runs");
    let process = lines.lines().next().unwrap_or_default().to_owned();
    let named = format!("(process {process}); stop it with pg_ctl");
    refused(&running, 2, &[named.as_str()]);
    // Killed, too: its postmaster.pid stays, and its startup process waits for restore_command.
    kill(&process);
    let killed = scene.restore(root.path()).output().expect("it runs");
    refused(&killed, 2, &["a server that was killed", "kill -9 "]);
    let (_, error) = said(&killed);
    let (_, rest) = error.split_once("kill -9 ").expect("processes");
    let (processes, _) = rest.split_once(',').expect("processes");
    processes.split(' ').for_each(kill);
    fs::remove_file(root.path().join("hang")).expect("it is removed");
    let stray = root.path().join("data/precious.txt");
    fs::write(&stray, "").expect("a file");
    let output = scene.restore(root.path()).output().expect("it runs");
    let (report, error) = said(&output);
    assert!(output.status.success(), "{error}");
    // The restore names the directories before it empties them.
    let (data, one) = (root.path().join("data"), root.path().join("one"));
    let removed = format!("everything in {} and {}", data.display(), one.display());
    for part in ["an earlier restore into", "did not end", &removed] {
        assert!(error.contains(part), "no {part:?} in: {error}");
    }
    assert!(!stray.exists());
    let report = serde_json::from_str(&report).expect("JSON");
    let copy = Restored::adopt(root, &bin, report);
    assert_eq!(query(&copy.conninfo(), SUMS), "6050 5050");
    for name in ["one", "two"] {
        let claim = copy
            .data()
            .join("..")
            .join(name)
            .join("tidemark_claim.json");
        assert!(!claim.exists(), "the claim of {name} is left");
    }

    // A copy that was started by hand and opened for writing is not overwritten.
    let root = directory().expect("a directory");
    scene.interrupt(root.path());
    let mut pg_ctl = command(&bin.join("pg_ctl")).expect("pg_ctl");
    pg_ctl.env("LD_LIBRARY_PATH", bin.join("../lib"));
    pg_ctl.arg("-D").arg(root.path().join("data")).arg("-l");
    pg_ctl.arg(root.path().join("log")).args(["-w", "start"]);
    let status = pg_ctl.stdout(Stdio::null()).status();
    assert!(status.expect("it runs").success());
    let copy = Restored::adopt(root, &bin, serde_json::Value::Null);
    let sql = |sql: &str| query(&copy.conninfo(), sql);
    wait_until("it is promoted", || {
        sql("SELECT pg_is_in_recovery()") == "f"
    });
    sql("CREATE TABLE precious AS SELECT 7 AS n");
    copy.stop().expect("it stops");
    let root = copy.data().join("..");
    let again = scene.restore(&root).output().expect("it runs");
    // The plan refuses it for its tablespaces, which belong to the copy since its recovery ended.
    refused(&again, 3, &["exists here and is not empty"]);
    assert!(copy.data().join("global/pg_control").exists());
    assert!(fs::read_dir(root.join("two")).expect("it stays").count() > 0);
}
