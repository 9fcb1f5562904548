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
