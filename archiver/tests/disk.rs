//! A disk that fails an fsync, or hangs: data of a failed fsync is not trusted, nothing is
//! acknowledged too early, the connection stays open, and archiving continues automatically.
//! Acknowledged WAL is on the disk after a power loss at any moment.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use rustix::process::Signal;
use tempfile::TempDir;
use wal_format::{Lsn, SegmentSize, WalFileName};

use crate::support::{
    Archiver, Place, Server, postgres_bin, store_goes_down, wait_flushed, wait_until,
};

/// A file system whose disk is an image on a small tmpfs. When the tmpfs is full, the kernel
/// accepts writes, cannot write them back, reports that to one fsync, and drops the data. From then
/// on reads return data that the disk does not have.
pub(crate) struct FailingDisk {
    dir: TempDir,
    has_journal: bool,
}

impl FailingDisk {
    pub(crate) fn mount(mib: u32, has_journal: bool) -> Option<Self> {
        let disk = Self {
            dir: tempfile::tempdir().expect("a directory"),
            has_journal,
        };
        for place in [disk.backing(), disk.path()] {
            fs::create_dir(place).expect("a directory");
        }
        let image = disk.image();
        let size = format!("size={mib}m");
        let made = run(Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
            .arg(disk.backing()))
            && fs::File::create(&image).is_ok_and(|file| file.set_len(64 << 20).is_ok())
            && run(Command::new("mkfs.ext4")
                .args(["-q", "-m", "0", "-b", "4096", "-N", "256"])
                .args(if has_journal {
                    ["-J", "size=4", "-E", "packed_meta_blocks=1"].as_slice()
                } else {
                    ["-O", "^has_journal"].as_slice()
                })
                .arg(&image))
            // The file system's own blocks never fail, only data blocks.
            && (!has_journal || run(Command::new("fallocate").args(["-l", "6M"]).arg(&image)))
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

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    fn attach(&self) -> bool {
        let mounted = run(Command::new("mount")
            .args(["-o", "loop,errors=continue"])
            .arg(self.image())
            .arg(self.path()));
        // A loop device reports a write that a full disk cut short as a success. Therefore one page
        // is written or fails as a whole.
        let source = Command::new("findmnt")
            .args(["-n", "-o", "SOURCE"])
            .arg(self.path())
            .output();
        let device = source.map(|source| String::from_utf8_lossy(&source.stdout).trim().to_owned());
        let name = device.unwrap_or_default().replace("/dev/", "");
        mounted && fs::write(format!("/sys/block/{name}/queue/max_sectors_kb"), "4").is_ok()
    }

    /// Makes every write to the disk hang, or lets writes continue.
    pub(crate) fn freeze(&self, freeze: bool) -> bool {
        let how = if freeze { "-f" } else { "-u" };
        run(Command::new("fsfreeze").arg(how).arg(self.path()))
    }

    /// Simulates a power loss at this moment: the current content of the disk, checked and mounted
    /// elsewhere. Compares the spool on it with the server's files: every acknowledged byte is
    /// there.
    fn assert_survives_power_loss(&self, server: &Server, archiver: &Archiver, acknowledged: Lsn) {
        if !self.has_journal {
            // Without a journal fdatasync does not persist the size of a file (Linux before 7.0);
            // only an unmount does.
            return;
        }
        // A copy takes time and has to be of a single moment.
        archiver.signal(Signal::STOP);
        std::thread::sleep(std::time::Duration::from_millis(200));
        let aside = tempfile::tempdir().expect("a directory");
        let (image, path) = (aside.path().join("image"), aside.path().join("disk"));
        fs::create_dir(&path).expect("a directory");
        assert!(run(Command::new("cp")
            .arg("--sparse=always")
            .args([&self.image(), &image])));
        archiver.signal(Signal::CONT);
        // 1 and 2: errors were found and corrected, which a crash without a journal always leaves.
        let checked = Command::new("e2fsck").arg("-fy").arg(&image).output();
        let checked = checked.expect("e2fsck runs");
        assert!(matches!(checked.status.code(), Some(0..=2)), "{checked:?}");
        let mounted = run(Command::new("mount")
            .args(["-o", "loop"])
            .args([&image, &path]));
        assert!(mounted);
        let spooled = std::panic::catch_unwind(|| spool_equals_pg_wal(&path, server));
        assert!(run(Command::new("umount").arg(&path)));
        let (start, end) = spooled.expect("the spool is the server's WAL");
        assert!(
            start <= acknowledged && end >= acknowledged,
            "{acknowledged} was acknowledged, the disk has {start} to {end}"
        );
    }

    fn mend(&self) {
        assert!(run(Command::new("mount")
            .args(["-o", "remount,size=250m"])
            .arg(self.backing())));
    }
}

impl Drop for FailingDisk {
    fn drop(&mut self) {
        // A frozen file system cannot be unmounted.
        self.freeze(false);
        run(Command::new("umount").arg(self.path()));
        run(Command::new("umount").arg(self.backing()));
    }
}

/// Compares the spool's files in a directory with the server's. Returns the range that they cover
/// without a hole.
fn spool_equals_pg_wal(spool: &Path, server: &Server) -> (Lsn, Lsn) {
    let size = SegmentSize::new(1 << 20).expect("1 MiB");
    let branches = spool.join("main/wal");
    let system = fs::read_dir(branches).expect("the spool").next();
    let branch = system.expect("a cluster").expect("an entry").path();
    let mut files: Vec<PathBuf> = fs::read_dir(branch.join("00000001"))
        .expect("the branch")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    let mut found: Option<(Lsn, Lsn)> = None;
    for path in files {
        let name = path.file_name().expect("a name").to_string_lossy();
        let (stem, is_partial) = name
            .strip_suffix(".partial")
            .map_or((&*name, false), |stem| (stem, true));
        let Ok(WalFileName::Segment(segment)) = stem.parse() else {
            continue;
        };
        let ours = fs::read(&path).expect("a file of the spool");
        let theirs = fs::read(server.data().join("pg_wal").join(stem)).expect("the server's");
        let equal = ours.iter().zip(&theirs).take_while(|(a, b)| a == b).count();
        let start = segment.segment(size).expect("a segment").start_lsn(size);
        // A torn end counts up to the last byte that equals the server's.
        assert!(is_partial || equal == size.len(), "{name}: {equal} bytes");
        let end = start.add(equal as u64);
        found = match found {
            Some((first, before)) if before == start => Some((first, end)),
            None => Some((start, end)),
            Some(range) => Some(range),
        };
    }
    found.expect("files of WAL")
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
    fail_an_fsync(FailingDisk::mount(8, false));
}

#[test]
fn a_failed_fsync_and_then_a_power_loss_take_nothing_that_was_acknowledged() {
    fail_an_fsync(FailingDisk::mount(14, true));
}

fn fail_an_fsync(disk: Option<FailingDisk>) {
    let (Some(bin), Some(disk)) = (postgres_bin(), disk) else {
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
    // The store is away, so all WAL stays on this disk.
    let comes_back = store_goes_down(&place);
    server.write_wal(12_000);
    let lsn = server.lsn();
    archiver.wait_for_log("archiving is interrupted");
    let log = archiver.log();
    assert!(
        ["fdatasync", "fsync", "rewrite"]
            .iter()
            .any(|word| log.contains(word)),
        "{log}"
    );
    let told = acknowledged(&server);
    assert!(told < lsn, "what is not durable was acknowledged");
    disk.assert_survives_power_loss(&server, &archiver, told);
    disk.mend();
    // The stages restart automatically, from the disk's content and the WAL that the server still
    // has, without the store.
    wait_flushed(&server, lsn);
    disk.assert_survives_power_loss(&server, &archiver, lsn);
    server.write_wal(1000);
    let lsn = server.lsn();
    wait_flushed(&server, lsn);
    disk.assert_survives_power_loss(&server, &archiver, lsn);
    // The same after a reboot, when the kernel's cached data is gone.
    archiver.kill();
    assert!(run(Command::new("umount").arg(disk.path())) && disk.attach());
    let (_, end) = spool_equals_pg_wal(&disk.path(), &server);
    assert!(end >= lsn, "{end} is left of {lsn}");
    comes_back();
    let archiver = place.run_with(command());
    server.write_wal(100);
    let lsn = server.lsn();
    wait_flushed(&server, lsn);
    assert_eq!(archiver.terminate().code(), Some(0));
    assert!(place.assert_equals_pg_wal(&server.data()) >= lsn);
    let verdict = place.verify(&server.conninfo());
    assert!(verdict.contains("no gap, no damage"), "{verdict}");
}

#[test]
fn a_disk_that_stands_still_does_not_cost_the_connection() {
    let Some(bin) = postgres_bin() else { return };
    let Some(disk) = FailingDisk::mount(200, false) else {
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
    // Compares to two minutes with PostgreSQL's default timeout of one minute.
    std::thread::sleep(std::time::Duration::from_secs(3));
    let replication = "SELECT pid, flush_lsn < pg_current_wal_flush_lsn() FROM pg_stat_replication";
    let meanwhile = server.sql(replication);
    // Before anything can fail: an archiver with a pending write cannot even be killed.
    assert!(disk.freeze(false));
    assert_eq!(meanwhile, format!("{pid}|t"));
    let lsn = server.lsn();
    wait_flushed(&server, lsn);
    assert_eq!(server.sql("SELECT pid FROM pg_stat_replication"), pid);
    assert_eq!(archiver.terminate().code(), Some(0));
    assert!(place.assert_equals_pg_wal(&server.data()) >= lsn);
}

#[test]
fn without_room_for_a_copy_what_was_acknowledged_survives_a_power_loss_too() {
    let (Some(bin), Some(disk)) = (postgres_bin(), FailingDisk::mount(100, true)) else {
        return;
    };
    let server = Server::start(&bin, "");
    let place = Place::new();
    fs::create_dir_all(place.spool()).expect("a directory");
    let command = || {
        let mut command = place.command_with_spool(&server.conninfo(), &disk.path());
        command.arg("--catalog").arg(place.spool().join("catalog"));
        command
    };
    let archiver = place.run_with(command());
    archiver.wait_for_log("INFO streaming");
    let comes_back = store_goes_down(&place);
    server.write_wal(2500);
    wait_flushed(&server, server.lsn());
    archiver.kill();
    let told = acknowledged(&server);
    // Fills the disk to the last block.
    let mut filler = fs::File::create(disk.path().join("filler")).expect("a file");
    let zeros = vec![1; 4096];
    while std::io::Write::write_all(&mut filler, &zeros).is_ok() {}
    drop(filler.sync_all());
    drop(filler);

    let archiver = place.run_with(command());
    archiver.wait_for_log("rewriting it in place");
    archiver.wait_for_log("syncing its directory again");
    disk.assert_survives_power_loss(&server, &archiver, told);
    server.write_wal(1500);
    archiver.wait_for_log("INFO streaming");
    let told = acknowledged(&server).max(told);
    disk.assert_survives_power_loss(&server, &archiver, told);

    fs::remove_file(disk.path().join("filler")).expect("there is room again");
    let lsn = server.lsn();
    wait_flushed(&server, lsn);
    disk.assert_survives_power_loss(&server, &archiver, lsn);
    comes_back();
    archiver.wait_for_log("the repository answers");
    server.write_wal(100);
    place.assert_whole(&server, archiver);
}

#[test]
fn a_disk_without_room_for_the_catalog_does_not_keep_the_spool_from_the_repository() {
    let Some(bin) = postgres_bin() else { return };
    let disk = tempfile::tempdir().expect("a directory");
    if !run(Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=16m", "tmpfs"])
        .arg(disk.path()))
    {
        eprintln!("SKIPPED: a small file system needs root");
        return;
    }
    let server = Server::start(&bin, "");
    let place = Place::new();
    // Spool and catalog on the same disk, as by default.
    let command = || place.command_with_spool(&server.conninfo(), disk.path());
    let archiver = place.run_with(command());
    archiver.wait_for_log("INFO streaming");
    server.write_wal(1500);
    wait_flushed(&server, server.lsn());
    let comes_back = store_goes_down(&place);
    server.write_wal(12_000);
    archiver.wait_for_log("disk is full");
    let told = acknowledged(&server);
    archiver.kill();
    // Fills the disk to the last block.
    let mut filler = fs::File::create(disk.path().join("filler")).expect("a file");
    while std::io::Write::write_all(&mut filler, &[1; 4096]).is_ok() {}
    drop(filler);
    comes_back();

    let archiver = place.run_with(command());
    archiver.wait_for_log("catalog_in_memory");
    wait_until("the spool reaches the repository", || {
        archiver
            .get("/api/v1/clusters/main")
            .contains("\"lag_bytes\":0")
    });
    // The drained spool has made room for the catalog.
    archiver.wait_for_log("catalog_opens");
    server.write_wal(3000);
    wait_flushed(&server, server.lsn());
    let report = archiver.get("/api/v1/clusters/main");
    assert!(!report.contains("without the catalog"), "{report}");
    assert!(server.lsn() > told);
    place.assert_whole(&server, archiver);
    assert!(run(Command::new("umount").arg("-l").arg(disk.path())));
}
