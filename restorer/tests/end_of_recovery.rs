//! A recovery that ended is believed only when its end, its timeline and its system identifier are
//! the plan's. A hang, a crash loop and a wrong stop are different answers.
//!
//! Each case gives `pitr-restore` a `postgres` that runs the real one and interferes.

use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, getpgid, kill_process, kill_process_group};
use testbed::{
    cluster::Cluster,
    programs::{directory, ours},
    restored::Restored,
};

use crate::support::{Archived, SETTINGS, oldest_and_newest, query, said, wait_until};

/// An archived cluster on timeline 2, the server programs, and the second of two transactions.
struct Promoted {
    archived: Archived,
    bin: PathBuf,
    xid: String,
}

impl Promoted {
    fn make(bin: &Path) -> Self {
        let cluster = Cluster::start(bin, 1, SETTINGS).expect("a server");
        cluster.stop().expect("it stops");
        fs::write(cluster.data().join("standby.signal"), "").expect("a standby");
        cluster.start_again().expect("it starts");
        cluster.promote().expect("it is promoted");
        let mut archived = Archived::of(cluster);
        archived.sql("CREATE TABLE done (n int)");
        archived.backup();
        archived.sql("INSERT INTO done VALUES (1)");
        let xid = archived.sql("INSERT INTO done VALUES (2) RETURNING pg_current_xact_id()");
        archived.sql("INSERT INTO done VALUES (3)");
        // Some segments more than the backup's.
        archived.sql("INSERT INTO done SELECT generate_series(10, 30000)");
        archived.finish();
        Self {
            archived,
            bin: bin.to_owned(),
            xid,
        }
    }

    /// Restores below `root` with a `postgres` that is the shell script `body`, in which `$real` is
    /// the real one and `$data` the data directory.
    fn restore(&self, root: &Path, body: &str, arguments: &[&str]) -> Output {
        let mut restore = self.command(root, body, arguments);
        restore.output().expect("it runs")
    }

    /// Returns the command that [`Promoted::restore`] runs.
    fn command(&self, root: &Path, body: &str, arguments: &[&str]) -> Command {
        let bin = root.join("bin");
        fs::create_dir(&bin).expect("a directory");
        let real = self.bin.join("postgres");
        let script = format!(
            "#!/bin/sh\nreal={}\ncase \"$1\" in --version) exec $real --version;; esac\ndata=\"$2\"\n{body}\n",
            real.display()
        );
        executable(&bin.join("postgres"), &script);
        let place = &self.archived.place;
        let mut restore = Restored::command(place, &bin, root, arguments).expect("built");
        restore.env("LD_LIBRARY_PATH", self.bin.join("../lib"));
        restore
    }
}

fn executable(path: &Path, script: &str) {
    fs::write(path, script).expect("a script");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("executable");
}

/// Recovers with the real server, ends that, lets `change` change the result, and shows the real
/// log. The `sleep` that stands for the server ends at SIGINT and SIGQUIT, also if the test's
/// parent ignores them.
fn after_recovery(change: &str) -> String {
    format!(
        "$real \"$@\" > \"$data/../real.log\" 2>&1 &\npid=$!\n\
         until grep -q 'ready to accept connections' \"$data/../real.log\"; do\n\
         kill -0 $pid || exit 1; sleep 0.05; done\n\
         kill -QUIT $pid; wait $pid\n{change}\ncat \"$data/../real.log\" >&2\nexec env --default-signal=INT,QUIT sleep 600"
    )
}

#[test]
fn only_the_planned_end_timeline_and_system_are_believed() {
    for (major, bin) in oldest_and_newest() {
        eprintln!("PostgreSQL {major}");
        let promoted = Promoted::make(&bin);
        let foreign = Cluster::start(&bin, 1, "").expect("another server");
        let foreign = foreign.data().join("global/pg_control");
        let copy = promoted.archived.place.path().join("foreign_control");
        fs::copy(foreign, &copy).expect("a copy");
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o644)).expect("chmod");
        let target = ["--target-xid", promoted.xid.as_str()];
        let history = "\"$data/pg_wal/00000003.history\"";
        let foreign = format!("cp {} \"$data/global/pg_control\"", copy.display());
        let edit = |expression: &str| format!("sed -i '{expression}' {history}");
        let cases = [
            (foreign, "in a cluster of system "),
            (
                edit("/^2/d"),
                "recovery stopped on timeline 1, the plan was on timeline 2",
            ),
            (
                edit("s/^2\\t[^\\t]*/2\\tF\\/F0000000/"),
                "with a timeline switch at F/F0000000",
            ),
        ];
        for (change, expected) in cases {
            let root = directory().expect("a directory");
            let output = promoted.restore(root.path(), &after_recovery(&change), &target);
            let (_, error) = said(&output);
            assert_eq!(output.status.code(), Some(4), "{expected}: {error}");
            assert!(error.contains(expected), "{expected}: {error}");
        }
        // The same without a change is believed.
        let root = directory().expect("a directory");
        let output = promoted.restore(root.path(), &after_recovery(":"), &target);
        let (report, error) = said(&output);
        assert_eq!(output.status.code(), Some(0), "{error}");
        let report: serde_json::Value = serde_json::from_str(&report).expect("JSON");
        let process = report["process"]
            .as_i64()
            .and_then(|pid| i32::try_from(pid).ok());
        kill(process.expect("a process"), Signal::KILL);

        // PostgreSQL is led to another place.
        let root = directory().expect("a directory");
        let body = "exec $real \"$@\" -c recovery_target_inclusive=off";
        let output = promoted.restore(root.path(), body, &target);
        let (_, error) = said(&output);
        assert_eq!(output.status.code(), Some(4), "{error}");
        for part in [
            "recovery stopped before WAL location",
            "the plan was after the record at",
        ] {
            assert!(error.contains(part), "{error}");
        }
        assert!(
            !root.path().join("data/postmaster.pid").exists(),
            "it is left running"
        );
    }
}

#[test]
fn a_hang_and_a_crash_loop_are_told_apart() {
    for (major, bin) in oldest_and_newest().into_iter().rev().take(1) {
        eprintln!("PostgreSQL {major}");
        let promoted = Promoted::make(&bin);
        let root = directory().expect("a directory");
        let began = Instant::now();
        let body = "exec $real \"$@\" -c 'restore_command=sleep 600'";
        let output = promoted.restore(root.path(), body, &["--recovery-timeout=2s"]);
        let (_, error) = said(&output);
        assert_eq!(output.status.code(), Some(1), "{error}");
        for part in [
            "recovery hangs",
            "waits for restore_command",
            "--recovery-timeout",
        ] {
            assert!(error.contains(part), "{error}");
        }
        assert!(
            began.elapsed() < Duration::from_secs(40),
            "{:?}",
            began.elapsed()
        );
        assert!(
            !root.path().join("data/postmaster.pid").exists(),
            "it is left running"
        );

        a_signal_ends_the_server_of_an_unfinished_recovery(&promoted);

        // A process that crashes each time the server begins again, while WAL is waited for.
        let listing = promoted.archived.listing();
        let start = listing["backups"][0]["start_lsn"].as_str().expect("an LSN");
        let start: wal_format::Lsn = start.parse().expect("an LSN");
        let root = directory().expect("a directory");
        let fetch = root.path().join("fetch");
        let program = ours("pitr-restore").expect("built");
        let script = format!(
            "#!/bin/sh\ncase $1 in *.history) exit 1;; 00000002*{:02X}) ;; *) sleep 600;; esac\n\
             exec {} --repository=file://{}/repository wal-fetch \"$1\" \"$2\"\n",
            start.0 >> 20,
            program.display(),
            promoted.archived.place.path().display()
        );
        executable(&fetch, &script);
        let body = format!(
            "exec $real \"$@\" -c 'restore_command={} %f %p'",
            fetch.display()
        );
        let done = AtomicBool::new(false);
        let data = root.path().join("data");
        let output = thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    kill_checkpointer(&data);
                    thread::sleep(Duration::from_millis(50));
                }
            });
            let output = promoted.restore(root.path(), &body, &["--recovery-timeout=60s"]);
            done.store(true, Ordering::Relaxed);
            output
        });
        let (_, error) = said(&output);
        assert_eq!(output.status.code(), Some(1), "{error}");
        for part in [
            "crash loop",
            "checkpointer process",
            "terminated by signal 9",
        ] {
            assert!(error.contains(part), "{error}");
        }
        assert!(!data.join("postmaster.pid").exists(), "it is left running");
    }
}

/// The server that a restore starts is in its own process group. A signal before recovery has ended
/// ends the restore and its server. A signal to the restore's group after recovery does not reach
/// the server.
fn a_signal_ends_the_server_of_an_unfinished_recovery(promoted: &Promoted) {
    let root = directory().expect("a directory");
    let body = "exec $real \"$@\" -c 'restore_command=sleep 600'";
    let mut restore = promoted.command(root.path(), body, &[]);
    restore.stdout(Stdio::piped()).stderr(Stdio::piped());
    let restore = restore.process_group(0).spawn().expect("it runs");
    let pid_file = root.path().join("data/postmaster.pid");
    let mut server = None;
    wait_until("a server recovers", || {
        let lines = fs::read_to_string(&pid_file).unwrap_or_default();
        server = lines.lines().next().and_then(|pid| pid.trim().parse().ok());
        server.is_some()
    });
    let server = Pid::from_raw(server.expect("a process")).expect("a process");
    assert_eq!(getpgid(Some(server)).expect("it runs"), server);
    // A shell lets a program in the background ignore SIGINT, and nobody changes that for SIGTERM.
    kill_process_group(Pid::from_child(&restore), Signal::TERM).expect("a signal");
    let output = restore.wait_with_output().expect("it ends");
    let (_, error) = said(&output);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(
        error.contains("SIGTERM came before recovery had ended"),
        "{error}"
    );
    assert!(!pid_file.exists(), "it is left running");

    a_signal_ends_the_proof(promoted);
    a_second_signal_kills_the_server(promoted);

    let root = directory().expect("a directory");
    let mut restore = promoted.command(root.path(), "exec $real \"$@\"", &[]);
    restore.stdout(Stdio::piped()).stderr(Stdio::piped());
    let restore = restore.process_group(0).spawn().expect("it runs");
    let group = Pid::from_child(&restore);
    let output = restore.wait_with_output().expect("it ends");
    let (report, error) = said(&output);
    assert!(output.status.success(), "{error}");
    // No process of that group is left.
    kill_process_group(group, Signal::INT).expect_err("the server is in it");
    let report = serde_json::from_str(&report).expect("JSON");
    let copy = Restored::adopt(root, &promoted.bin, report);
    assert_eq!(query(&copy.conninfo(), "SELECT min(n) FROM done"), "1");
}

/// The signal comes while the restore reads the history file of the promoted server, a FIFO that
/// never has an end.
fn a_signal_ends_the_proof(promoted: &Promoted) {
    let root = directory().expect("a directory");
    let change = "restore=$PPID; rm \"$data/pg_wal/00000003.history\"; mkfifo \"$data/pg_wal/00000003.history\"\n\
        (exec 3> \"$data/pg_wal/00000003.history\"; kill -TERM $restore; exec sleep 600) &\n\
        echo $! > \"$data/../writer\"";
    let body = format!(
        "[ -e \"$data/../again\" ] && exec $real \"$@\"\n{}",
        after_recovery(change)
    );
    let mut restore = promoted.command(root.path(), &body, &[]);
    let output = restore.output().expect("it runs");
    let (_, error) = said(&output);
    kill(process_in(&root.path().join("writer")), Signal::KILL);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(
        error.contains("SIGTERM came before recovery had ended"),
        "{error}"
    );
    // Recovery has ended, and nobody has started the copy since: the same command restores again.
    fs::write(root.path().join("again"), "").expect("a file");
    let output = restore.output().expect("it runs");
    let (report, error) = said(&output);
    assert!(output.status.success(), "{error}");
    let report = serde_json::from_str(&report).expect("JSON");
    let copy = Restored::adopt(root, &promoted.bin, report);
    assert_eq!(query(&copy.conninfo(), "SELECT min(n) FROM done"), "1");
}

/// The server does not stop at the first signal.
fn a_second_signal_kills_the_server(promoted: &Promoted) {
    let root = directory().expect("a directory");
    let body = "trap 'echo > \"$data/../asked\"' QUIT\nsleep 600 > /dev/null 2>&1 &\n\
        echo $! > \"$data/../child\"\nwhile :; do sleep 0.05; done";
    let mut restore = promoted.command(root.path(), body, &[]);
    restore.stdout(Stdio::piped()).stderr(Stdio::piped());
    let restore = restore.spawn().expect("it runs");
    let child = root.path().join("child");
    let has_line = |path: &Path| fs::read_to_string(path).is_ok_and(|text| text.ends_with('\n'));
    wait_until("the server runs", || has_line(&child));
    kill_process(Pid::from_child(&restore), Signal::TERM).expect("a signal");
    wait_until("it is asked to stop", || {
        has_line(&root.path().join("asked"))
    });
    kill_process(Pid::from_child(&restore), Signal::TERM).expect("a signal");
    let output = restore.wait_with_output().expect("it ends");
    let (_, error) = said(&output);
    assert_eq!(output.status.code(), Some(1), "{error}");
    for part in [
        "another signal came",
        "SIGTERM came before recovery had ended",
    ] {
        assert!(error.contains(part), "{error}");
    }
    let child = process_in(&child);
    wait_until("its processes are gone", || {
        // A process that was not waited for has no command line.
        fs::read(format!("/proc/{child}/cmdline")).map_or(true, |line| line.is_empty())
    });
}

/// Returns the process ID in a file.
fn process_in(file: &Path) -> i32 {
    let text = fs::read_to_string(file).expect("a file");
    text.trim().parse().expect("a process ID")
}

/// Kills the checkpointer of the server in `data`, if there is one.
fn kill_checkpointer(data: &Path) {
    let Ok(lines) = fs::read_to_string(data.join("postmaster.pid")) else {
        return;
    };
    let pid = lines.lines().next().unwrap_or_default().trim().to_owned();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    for child in children.unwrap_or_default().split_whitespace() {
        let title = fs::read_to_string(format!("/proc/{child}/cmdline")).unwrap_or_default();
        if title.contains("checkpointer")
            && let Ok(child) = child.parse()
        {
            kill(child, Signal::KILL);
        }
    }
}

fn kill(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid) {
        // It may have ended by itself.
        let _gone = kill_process(pid, signal);
    }
}
