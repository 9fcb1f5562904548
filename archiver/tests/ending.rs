//! The ends of commands that cannot finish: nobody archives, a signal, limits that are too low.

use std::{
    fs,
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::{
    preconditions::outcome,
    support::{Place, Server, postgres_bin, wait_until},
};

fn started(command: &mut Command) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(Stdio::piped()).spawn().expect("it starts")
}

/// Sends SIGTERM and returns the exit code and what the command printed.
fn terminated(child: Child) -> (Option<i32>, String) {
    let id = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    kill_process(id.expect("an id"), Signal::TERM).expect("it runs");
    let output = child.wait_with_output().expect("it ends");
    (
        output.status.code(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

#[test]
fn a_backup_that_nobody_archives_or_that_is_stopped_leaves_nothing() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let command = || place.command(&server.conninfo());
    // The objects of backups, without the recorded failures.
    let parts = || {
        let mut found = place.files_below("/backup/");
        found.retain(|path| !path.display().to_string().contains("/outcome/"));
        found
    };
    let began = Instant::now();
    let (code, said) = outcome(command().arg("backup"));
    assert_eq!(code, 1, "{said}");
    assert!(began.elapsed() < Duration::from_secs(20), "{said}");
    assert!(
        said.contains("slot \"tidemark_main\" is not in use, archive_mode is off")
            && said.contains("Start `wal-archiver run`"),
        "{said}"
    );
    assert_eq!(parts(), Vec::<PathBuf>::new());

    // The daemon holds its connection and stores nothing, so the backup waits for its WAL.
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    archiver.signal(Signal::STOP);
    let mut backup = command();
    let backup = started(backup.arg("backup"));
    wait_until("the backup's parts are stored", || {
        let mut parts = parts().into_iter();
        parts.any(|path| path.ends_with("backup_manifest"))
    });
    let (code, said) = terminated(backup);
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("stopping because of SIGTERM")
            && said.contains("it is not listed, and what it had stored was removed"),
        "{said}"
    );
    assert_eq!(parts(), Vec::<PathBuf>::new());
    archiver.signal(Signal::CONT);
    assert_eq!(archiver.terminate().code(), Some(0));
}

/// A store that accepts connections and does not answer.
#[test]
fn a_command_that_is_stopped_says_what_it_leaves() {
    let directory = tempfile::tempdir().expect("a directory");
    let open = fs::Permissions::from_mode(0o755);
    fs::set_permissions(directory.path(), open).expect("chmod");
    let program = testbed::programs::ours("wal-archiver").expect("it is built");
    for (arguments, left) in [
        (["verify", "--deep"], "is not recorded"),
        (["expire", "--json"], "within the grace"),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let (sender, connected) = std::sync::mpsc::channel();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                drop(sender.send(stream));
            }
        });
        let keys = format!(
            "repository = \"s3://bucket/p\"\ns3_endpoint = \"http://{address}\"\ns3_region = \"us-east-1\"\n\
             s3_access_key = \"key\"\ns3_secret_key = \"secret\"\nspool = \"{}\"\n",
            directory.path().join("spool").display()
        );
        let file = directory.path().join("tidemark.toml");
        fs::write(&file, keys).expect("a configuration");
        let mut command = Command::new(&program);
        let child = started(command.arg("--config").arg(&file).args(arguments));
        let _connection = connected.recv().expect("it asks the store");
        let (code, said) = terminated(child);
        assert_eq!(code, Some(1), "{arguments:?}: {said}");
        assert!(
            said.contains("stopped by SIGTERM: ") && said.contains(left),
            "{arguments:?}: {said}"
        );
    }
}

#[test]
fn limits_that_are_too_low_are_named_before_anything_begins() {
    let place = Place::new();
    let program = testbed::programs::ours("wal-archiver").expect("it is built");
    for command in ["run", "verify"] {
        let line = format!(
            "ulimit -v 300000 && exec {} --repository file://{} --spool {} {command}",
            program.display(),
            place.repository().display(),
            place.spool().display()
        );
        let (code, said) = outcome(Command::new("/bin/sh").args(["-c", &line]));
        assert_eq!(code, 2, "{said}");
        assert!(
            said.contains("the limit on address space (`ulimit -v`) is 292 MiB")
                && said.contains("LimitAS=infinity"),
            "{said}"
        );
    }
}
