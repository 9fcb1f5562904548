//! Checks that the spool's file system keeps fsynced data after a power loss.
//!
//! ext4 without a journal does not. A file's new length, or its name in a directory, may be lost
//! after a power loss although fdatasync and the directory's fsync returned, and `e2fsck` then
//! truncates the file. Acknowledged WAL is only as durable as the file system.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::Report;

/// `TMPFS_MAGIC` and `RAMFS_MAGIC` (`statfs(2)`).
const IN_MEMORY: [i64; 2] = [0x0102_1994, 0x8584_58f6];

/// Reports a spool on ext4 without a journal.
pub(super) fn journal(directory: &Path, report: &mut Report) {
    let Some(existing) = directory.ancestors().find(|path| path.is_dir()) else {
        return;
    };
    let device = fs::metadata(existing).ok().map(|found| found.dev());
    let Some(name) = device.and_then(device_name) else {
        return;
    };
    let Ok(options) = fs::read_to_string(Path::new("/proc/fs/ext4").join(name).join("options"))
    else {
        return;
    };
    let what = "spool's file system";
    if has_journal(&options) {
        report.ok(what, "ext4 with a journal");
    } else {
        report.note(
            what,
            "ext4 without a journal may lose after a power loss what it was told to make durable, and with it commits that \
             were acknowledged; add a journal: unmount the file system and run `tune2fs -O has_journal DEVICE`",
        );
    }
}

/// Reports a spool on a file system in memory, which a power loss or a reboot empties.
pub(super) fn memory(directory: &Path, report: &mut Report) {
    let existing = directory.ancestors().find(|path| path.is_dir());
    let found = existing.and_then(|path| rustix::fs::statfs(path).ok());
    if found.is_some_and(|found| IN_MEMORY.contains(&found.f_type)) {
        report.note(
            "spool's file system",
            "is in memory: a power loss or a reboot loses WAL that was acknowledged and is not in the repository yet; \
             name a directory on a disk with --spool or the key spool",
        );
    }
}

/// Returns the kernel's name of a block device, as used in `/proc/fs/ext4`.
fn device_name(device: u64) -> Option<String> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let link = fs::read_link(PathBuf::from(format!("/sys/dev/block/{major}:{minor}"))).ok()?;
    Some(link.file_name()?.to_str()?.to_owned())
}

/// Returns true if the mount options contain a journal mode, which only a journal has.
fn has_journal(options: &str) -> bool {
    options.lines().any(|option| option.starts_with("data="))
}
