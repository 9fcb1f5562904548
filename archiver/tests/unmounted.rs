//! A repository that is not in its place any more: its disk is unmounted, or its folder was
//! replaced. Nothing is written to the place meanwhile, WAL waits in the spool, the light is red,
//! and archiving continues when the disk is back.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;
use wal_format::Lsn;

use crate::support::{Archiver, Place, Server, postgres_bin, wait_flushed, wait_until};

/// A disk that is mounted as the place's repository. Its content outlives an unmount.
pub(crate) struct Disk {
    content: TempDir,
    mount_point: PathBuf,
}

impl Disk {
    /// Mounts the disk. `None` if this process may not mount.
    fn mount(mount_point: PathBuf) -> Option<Self> {
        let content = tempfile::tempdir().expect("a directory");
        fs::create_dir_all(&mount_point).expect("a directory");
        let disk = Self {
            content,
            mount_point,
        };
        if disk.attach() {
            return Some(disk);
        }
        eprintln!("SKIPPED: to unmount a repository needs root");
        None
    }

    /// Returns another disk with a copy of this one's content. The copy is not mounted yet.
    pub(crate) fn copied(&self) -> Self {
        let content = tempfile::tempdir().expect("a directory");
        let source = self.content.path().join(".");
        assert!(run(Command::new("cp")
            .arg("-a")
            .arg(source)
            .arg(content.path())));
        Self {
            content,
            mount_point: self.mount_point.clone(),
        }
    }

    /// Returns the paths of the sealed segments on the disk, sorted.
    pub(crate) fn sealed(&self) -> Vec<PathBuf> {
        self.files_below("/wal/")
    }

    /// Returns the paths of the files on the disk whose path contains `kind`, sorted.
    pub(crate) fn files_below(&self, kind: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut open = vec![self.content.path().to_owned()];
        while let Some(directory) = open.pop() {
            for entry in fs::read_dir(directory).expect("a directory").flatten() {
                let path = entry.path();
                if path.is_dir() {
                    open.push(path);
                } else if path.to_string_lossy().contains(kind) {
                    found.push(path);
                }
            }
        }
        found.sort();
        found
    }

    pub(crate) fn attach(&self) -> bool {
        run(Command::new("mount")
            .arg("--bind")
            .args([self.content.path(), &self.mount_point]))
    }

    /// Unmounts the disk at the first moment at which it is not in use.
    pub(crate) fn detach(&self) {
        wait_until("nothing keeps the disk from being unmounted", || {
            run(Command::new("umount").arg(&self.mount_point))
        });
    }

    /// Unmounts the disk although it is in use.
    fn detach_lazily(&self) {
        assert!(run(Command::new("umount").arg("-l").arg(&self.mount_point)));
    }

    /// Makes the disk read-only, or writable again.
    fn read_only(&self, read_only: bool) {
        let how = if read_only { "ro" } else { "rw" };
        let how = format!("remount,bind,{how}");
        wait_until("nothing is written at that moment", || {
            run(Command::new("mount")
                .args(["-o", &how])
                .arg(&self.mount_point))
        });
    }

    fn assert_mount_point_is_empty(&self) {
        assert_eq!(names(&self.mount_point), Vec::<String>::new());
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        while run(Command::new("umount").arg("-l").arg(&self.mount_point)) {}
    }
}

fn run(command: &mut Command) -> bool {
    let quiet = command.stderr(std::process::Stdio::null());
    quiet.status().is_ok_and(|status| status.success())
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("a directory").flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// Waits until the light is red with the reason and the remedy, and the health route fails.
fn wait_until_red(archiver: &Archiver) {
    wait_until_red_for(
        archiver,
        &[
            "is not the repository that this host archives to",
            "epoch begin --system-identifier",
        ],
    );
    wait_until("the page has the remedy once", || {
        let page = archiver.get("/");
        page.matches("epoch begin --system-identifier").count() == 1
    });
}

/// Waits until the light is red with these words in the report, and the health route fails.
pub(crate) fn wait_until_red_for(archiver: &Archiver, words: &[&str]) {
    wait_until("the light is red", || {
        let report = archiver.get("/api/v1/clusters/main");
        report.contains("\"state\":\"broken\"") && words.iter().all(|words| report.contains(words))
    });
    let health = archiver.get("/api/v1/clusters/main/health");
    assert!(health.starts_with("HTTP/1.1 503"), "{health}");
}

pub(crate) fn wait_until_well(archiver: &Archiver) {
    wait_until("the light is no longer red", || {
        !archiver
            .get("/api/v1/clusters/main")
            .contains("\"state\":\"broken\"")
    });
}

/// Returns the LSN at which the WAL in the repository ends.
pub(crate) fn remote(archiver: &Archiver) -> Lsn {
    let answer = archiver.get("/api/v1/clusters/main");
    let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
    let report: serde_json::Value = serde_json::from_str(body).expect("JSON");
    let lsn = report["durable"]["remote"]["lsn"].as_str();
    lsn.and_then(|lsn| lsn.parse().ok()).unwrap_or_default()
}

pub(crate) fn flushed(server: &Server) -> Lsn {
    let told = server.sql(
        "SELECT coalesce(max(flush_lsn), '0/0') FROM pg_stat_replication WHERE application_name = 'tidemark'",
    );
    told.parse().expect("an LSN")
}

pub(crate) fn scene(
    acknowledge: &str,
) -> Option<(Server, Place, Disk, impl Fn(&Place, &Server) -> Command)> {
    let bin = postgres_bin()?;
    let place = Place::new();
    let disk = Disk::mount(place.repository())?;
    let server = Server::start(&bin, "");
    let configuration = place.spool().with_extension("toml");
    fs::write(
        &configuration,
        format!("acknowledge = '{acknowledge}'\nkeep_window = '1d'\n"),
    )
    .expect("a file");
    let command = move |place: &Place, server: &Server| {
        let mut command = place.command(&server.conninfo());
        command.arg("--config").arg(&configuration);
        command
    };
    Some((server, place, disk, command))
}

fn survives(acknowledge: &str) {
    let Some((server, place, disk, command)) = scene(acknowledge) else {
        return;
    };
    let archiver = place.run_with(command(&place, &server));
    archiver.wait_for_log("INFO streaming");
    server.write_wal(1500);
    wait_flushed(&server, server.lsn());
    let load = server.load();
    wait_until("segments are sealed under load", || place.sealed() > 2);

    disk.detach();
    wait_until_red(&archiver);
    // The flush position is that of the repository and does not advance; only the local position
    // does.
    let (told, at) = (flushed(&server), server.lsn());
    wait_until("more WAL than three segments is written", || {
        server.lsn() > at.add(3 << 20)
    });
    if acknowledge == "remote" {
        assert_eq!(
            flushed(&server),
            told,
            "it was acknowledged without a repository"
        );
    } else {
        wait_flushed(&server, at.add(2 << 20));
    }
    disk.assert_mount_point_is_empty();

    archiver.kill();
    let archiver = place.run_with(command(&place, &server));
    archiver.wait_for_log("the repository does not answer");
    wait_until_red(&archiver);
    if acknowledge == "local" {
        wait_flushed(&server, server.lsn());
    }
    disk.assert_mount_point_is_empty();
    assert!(disk.attach());
    archiver.wait_for_log("the repository answers");
    wait_flushed(&server, server.lsn());
    wait_until_well(&archiver);

    // Once more, without a restart and with the disk in use.
    disk.detach_lazily();
    wait_until_red(&archiver);
    let at = server.lsn();
    wait_until("WAL is written", || server.lsn() > at.add(1 << 20));
    disk.assert_mount_point_is_empty();
    assert!(disk.attach());
    archiver.wait_for_log("repository_returned");
    wait_flushed(&server, server.lsn());
    wait_until_well(&archiver);
    drop(load);
    place.assert_whole(&server, archiver);
}

#[test]
fn an_unmounted_repository_takes_nothing_and_misses_nothing_when_it_is_back() {
    survives("local");
}

#[test]
fn an_unmounted_repository_acknowledges_nothing_as_remote() {
    survives("remote");
}

#[test]
fn another_disk_or_a_read_only_one_takes_nothing() {
    let Some((server, place, disk, command)) = scene("remote") else {
        return;
    };
    let archiver = place.run_with(command(&place, &server));
    archiver.wait_for_log("INFO streaming");
    server.write_wal(1500);
    wait_flushed(&server, server.lsn());

    // An idle server stores nothing, but the change is detected nevertheless.
    let other = Disk::mount(place.repository()).expect("root can mount");
    wait_until_red(&archiver);
    server.write_wal(1500);
    assert_eq!(names(other.content.path()), Vec::<String>::new());
    other.detach();
    archiver.wait_for_log("repository_returned");
    wait_flushed(&server, server.lsn());
    assert_eq!(names(other.content.path()), Vec::<String>::new());

    disk.read_only(true);
    let told = flushed(&server);
    server.write_wal(1500);
    archiver.wait_for_log("Read-only file system");
    assert!(flushed(&server) < told.add(1 << 20), "it was acknowledged");
    disk.read_only(false);
    wait_flushed(&server, server.lsn());

    // The folder disappears, and an empty one takes its place.
    let aside = place.repository().with_extension("aside");
    fs::create_dir(&aside).expect("a directory");
    assert!(run(Command::new("mount")
        .arg("--move")
        .args([place.repository(), aside.clone()])));
    wait_until_red(&archiver);
    server.write_wal(300);
    disk.assert_mount_point_is_empty();
    assert!(run(Command::new("mount")
        .arg("--move")
        .args([aside, place.repository()])));
    wait_flushed(&server, server.lsn());
    wait_until_well(&archiver);
    place.assert_whole(&server, archiver);
}

#[test]
fn no_command_begins_an_archive_in_an_empty_mount_point_before_the_operator_says_so() {
    let Some((server, place, disk, command)) = scene("local") else {
        return;
    };
    let run = |arguments: &[&str]| {
        let mut command = command(&place, &server);
        let output = command.args(arguments).output().expect("it runs");
        let said = [output.stdout, output.stderr].concat();
        (
            output.status.code(),
            String::from_utf8_lossy(&said).into_owned(),
        )
    };
    // Without a daemon: the repository of an earlier push is remembered, too.
    server.write_wal(1500);
    let segment = server.sql("SELECT pg_walfile_name(pg_switch_wal())");
    let path = server.data().join("pg_wal").join(segment);
    let push = ["push", path.to_str().expect("UTF-8")];
    assert_eq!(run(&push).0, Some(0));
    assert_eq!(place.sealed(), 1);
    let system = server.sql("SELECT system_identifier FROM pg_control_system()");
    disk.detach();
    for arguments in [
        push.as_slice(),
        &["backup"],
        &["expire"],
        &["verify"],
        &["check"],
        &["status"],
        &["catalog", "rebuild"],
    ] {
        let (code, said) = run(arguments);
        // `verify` takes an empty place as proof that the archive is not complete. The other
        // commands cannot tell.
        let expected = if arguments == ["verify"] { 4 } else { 5 };
        assert_eq!(code, Some(expected), "{arguments:?}: {said}");
        let remedy = format!("`wal-archiver epoch begin --system-identifier {system}`");
        assert!(said.contains(&remedy), "{arguments:?}: {said}");
        disk.assert_mount_point_is_empty();
    }
    assert!(disk.attach());
    assert_eq!(run(&push).0, Some(0), "the same bytes again");

    // A copy without the segment that was pushed last.
    let old = disk.copied();
    for segment in old.sealed() {
        fs::remove_file(segment).expect("it goes");
    }
    let held = old.files_below("/main/");
    assert!(old.attach());
    for arguments in [push.as_slice(), &["backup"]] {
        let (code, said) = run(arguments);
        assert_eq!(code, Some(4), "{arguments:?}: {said}");
        assert!(
            said.contains("holds an older state"),
            "{arguments:?}: {said}"
        );
    }
    assert_eq!(old.files_below("/main/"), held);
    old.detach();

    // The disk is lost, and the operator begins a new archive on another one.
    disk.detach();
    let (code, said) = run(&["epoch", "begin", "--system-identifier", "7"]);
    assert_eq!(code, Some(2), "{said}");
    disk.assert_mount_point_is_empty();
    let (code, said) = run(&["epoch", "begin", "--system-identifier", &system]);
    assert_eq!(code, Some(0), "{said}");
    let archiver = place.run_with(command(&place, &server));
    archiver.wait_for_log("INFO streaming");
    server.write_wal(1500);
    place.assert_whole(&server, archiver);
    // Now the old disk is the wrong one.
    assert!(disk.attach());
    let (code, said) = run(&["verify"]);
    assert_eq!(code, Some(4), "{said}");
    assert!(said.contains("belongs to another archive"), "{said}");
    disk.detach();
    fs::remove_dir_all(place.repository()).expect("what the test made");
    fs::create_dir(place.repository()).expect("the mount point");
}

#[test]
fn without_a_spool_for_the_record_nothing_is_archived_and_nothing_begins() {
    let Some((server, place, disk, _)) = scene("local") else {
        return;
    };
    // A user that cannot create the spool, for example the default spool without `--spool`.
    let closed = tempfile::tempdir().expect("a directory");
    let spool = closed.path().join("spool");
    fs::write(&spool, "").expect("a file in its place");
    let run = |spool: &Path, arguments: &[&str]| {
        let mut command = place.command_with_spool(&server.conninfo(), spool);
        let output = command.args(arguments).output();
        let output = output.expect("it runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), said)
    };
    server.write_wal(1500);
    let segment = server.sql("SELECT pg_walfile_name(pg_switch_wal())");
    let path = server.data().join("pg_wal").join(segment);
    let push = ["push", path.to_str().expect("UTF-8")];
    for is_archived in [false, true] {
        if is_archived {
            assert_eq!(run(&place.spool(), &push).0, Some(0));
        }
        for arguments in [push.as_slice(), &["backup"]] {
            let (code, said) = run(&spool, arguments);
            assert_eq!(code, Some(2), "{arguments:?}: {said}");
            let file = spool.join("main/repository.json").display().to_string();
            for part in [&*file, "Not a directory", "`--spool DIR`"] {
                assert!(said.contains(part), "{arguments:?}: {said}");
            }
        }
        assert_eq!(place.sealed(), usize::from(is_archived));
    }
    disk.detach();
    for arguments in [push.as_slice(), &["backup"]] {
        let (code, said) = run(&spool, arguments);
        assert_eq!(code, Some(2), "{arguments:?}: {said}");
        disk.assert_mount_point_is_empty();
    }
    // The daemon, in contrast, needs its spool at once.
    let (code, said) = run(&spool, &["run"]);
    assert_eq!(code, Some(1), "{said}");
    disk.assert_mount_point_is_empty();
}

#[test]
fn a_lost_identity_that_verify_repairs_needs_no_restart_of_the_daemon() {
    let Some(bin) = postgres_bin() else { return };
    let place = Place::new();
    let server = Server::start(&bin, "");
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    server.write_wal(1500);
    wait_flushed(&server, server.lsn());
    wait_until("a segment is sealed", || place.sealed() > 0);
    for copy in ["epoch", "epoch-copy"] {
        let path = place
            .repository()
            .join(format!("main/{copy}/00000001.json"));
        fs::remove_file(path).expect("it is lost");
    }
    server.write_wal(1500);
    wait_until_red(&archiver);
    let mut repair = place.command(&server.conninfo());
    let output = repair.args(["verify", "--repair"]).output();
    let output = output.expect("it runs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}");
    archiver.wait_for_log("repository_returned");
    wait_until_well(&archiver);
    let sealed = place.sealed();
    server.write_wal(1500);
    wait_until("segments are sealed again", || place.sealed() > sealed);
    place.assert_whole(&server, archiver);
}
