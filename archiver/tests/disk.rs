//! A disk that fails an fsync, or stands still: nothing of what failed is believed, nothing is acknowledged too early, the
//! connection lives, and it goes on by itself.

use std::{fs, path::PathBuf, process::Command};

use tempfile::TempDir;
use wal_format::Lsn;

use crate::support::{Place, Server, postgres_bin, wait_flushed};

/// A file system whose disk is an image on a small tmpfs. When that is full the kernel takes writes, can not write them back,
/// says so to one fsync, and forgets: what it shows from then on is not what the disk has.
struct FailingDisk {
    dir: TempDir,
}

impl FailingDisk {
    fn mount(mib: u32) -> Option<Self> {
        let disk = Self {
            dir: tempfile::tempdir().expect("a directory"),
        };
        for place in [disk.backing(), disk.path()] {
            fs::create_dir(place).expect("a directory");
        }
        let image = disk.image();
        let size = format!("size={mib}m");
        let made = run(Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
            .arg(disk.backing()))
            && fs::File::create(&image).is_ok_and(|file| file.set_len(256 << 20).is_ok())
            && run(Command::new("mkfs.ext4")
                .args(["-q", "-O", "^has_journal", "-m", "0"])
                .arg(&image))
            && disk.attach();
        if !made {
            eprintln!("SKIPPED: a disk that fails needs root, loop devices and mkfs.ext4");
        }
        made.then_some(disk)
    }

    fn backing(&self) -> PathBuf {
        self.dir.path().join("backing")
    }

    fn image(&self) -> PathBuf {
        self.backing().join("image")
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    fn attach(&self) -> bool {
        run(Command::new("mount")
            .args(["-o", "loop,errors=continue"])
            .arg(self.image())
            .arg(self.path()))
    }

    /// Lets every write to it hang, or go on.
    fn freeze(&self, freeze: bool) -> bool {
        let how = if freeze { "-f" } else { "-u" };
        run(Command::new("fsfreeze").arg(how).arg(self.path()))
    }

    fn mend(&self) {
        assert!(run(Command::new("mount")
            .args(["-o", "remount,size=250m"])
            .arg(self.backing())));
    }
}

impl Drop for FailingDisk {
    fn drop(&mut self) {
        // A frozen one can not be unmounted.
        self.freeze(false);
        run(Command::new("umount").arg(self.path()));
        run(Command::new("umount").arg(self.backing()));
    }
}

fn run(command: &mut Command) -> bool {
    let quiet = command.stderr(std::process::Stdio::null());
    quiet.status().is_ok_and(|status| status.success())
}

fn acknowledged(server: &Server) -> Lsn {
    let lsn = server.sql("SELECT coalesce(max(confirmed), '0/0') FROM (SELECT restart_lsn AS confirmed FROM pg_replication_slots) s");
    lsn.parse().expect("an LSN")
}

#[test]
fn a_failed_fsync_is_believed_and_what_it_was_about_is_written_anew() {
    let Some(bin) = postgres_bin() else { return };
    let Some(disk) = FailingDisk::mount(8) else {
        return;
    };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let command = || {
        let mut command = place.command_with_spool(&server.conninfo(), &disk.path());
        fs::create_dir_all(place.spool()).expect("a directory");
        command.arg("--catalog").arg(place.spool().join("catalog"));
        command
    };
    let archiver = place.run_with(command());
    archiver.wait_for_log("INFO streaming");
    server.write_wal(100);
    wait_flushed(&server, server.lsn());
    // The store is away, so all that comes stays on this disk.
    let aside = place.repository().with_extension("aside");
    repository::durable::rename(&place.repository(), &aside).expect("the repository goes");
    fs::write(place.repository(), "a file is no folder").expect("in its place");
    server.write_wal(12_000);
    let lsn = server.lsn();
    archiver.wait_for_log("archiving is interrupted");
    let log = archiver.log();
    assert!(log.contains("fdatasync") || log.contains("fsync"), "{log}");
    assert!(
        acknowledged(&server) < lsn,
        "what is not durable was acknowledged"
    );
    disk.mend();
    // The stages start anew by themselves, as soon as the store can be asked what it holds.
    fs::remove_file(place.repository()).expect("the file goes");
    repository::durable::rename(&aside, &place.repository()).expect("the repository is back");
    wait_flushed(&server, lsn);
    // Whatever the kernel said of it, the repository has what the server has.
    let mut archiver = archiver;
    archiver.signal(rustix::process::Signal::TERM);
    assert_eq!(archiver.wait().code(), Some(0), "{}", archiver.log());
    assert!(place.assert_equals_pg_wal(&server.data()) >= lsn);
    let verdict = place.verify(&server.conninfo());
    assert!(verdict.contains("no gap, no damage"), "{verdict}");
}

#[test]
fn a_disk_that_stands_still_does_not_cost_the_connection() {
    let Some(bin) = postgres_bin() else { return };
    let Some(disk) = FailingDisk::mount(200) else {
        return;
    };
    let server = Server::start(&bin, "wal_sender_timeout=1s");
    let place = Place::new();
    fs::create_dir_all(place.spool()).expect("a directory");
    let mut command = place.command_with_spool(&server.conninfo(), &disk.path());
    command.arg("--catalog").arg(place.spool().join("catalog"));
    let archiver = place.run_with(command);
    archiver.wait_for_log("INFO streaming");
    server.write_wal(100);
    wait_flushed(&server, server.lsn());
    let pid = server.sql("SELECT pid FROM pg_stat_replication");
    if !disk.freeze(true) {
        eprintln!("SKIPPED: no fsfreeze");
        return;
    }
    server.write_wal(2000);
    // As two minutes are to PostgreSQL's usual timeout of one.
    std::thread::sleep(std::time::Duration::from_secs(3));
    let replication = "SELECT pid, flush_lsn < pg_current_wal_flush_lsn() FROM pg_stat_replication";
    let meanwhile = server.sql(replication);
    // Before anything can fail: an archiver with a write under way can not even be killed.
    assert!(disk.freeze(false));
    assert_eq!(meanwhile, format!("{pid}|t"));
    let lsn = server.lsn();
    wait_flushed(&server, lsn);
    assert_eq!(server.sql("SELECT pid FROM pg_stat_replication"), pid);
    assert_eq!(archiver.terminate().code(), Some(0));
    assert!(place.assert_equals_pg_wal(&server.data()) >= lsn);
}
