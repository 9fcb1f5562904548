//! [`Ahead`]: where the segments of a recovery lie ready before PostgreSQL asks for them.
//!
//! A process beside the recovery (`pitr-restore wal-ahead`, `restorer/src/look_ahead.rs`) fills
//! `pg_wal/tidemark_ahead/KEY-BOOT/`, bounded in bytes; `wal-fetch`, or `mv` in the restored `restore_command`, then only renames.
//! Invariant: a file there is whole, was checked, and belongs to this boot of the host (`BOOT`): what a crash of the host
//! left is never looked at. `KEY` is the plan's digest, so that no other path's segment of the same name is taken; without
//! a plan only sealed segments are fetched ahead, by one timeline's name. Without the process, or with it killed,
//! `wal-fetch` fetches by itself: that costs speed, never correctness.

use std::{
    env,
    ffi::OsString,
    fs::{self, File},
    io,
    os::unix::{ffi::OsStrExt, fs::MetadataExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};
use wal_format::SegmentName;

/// The folder in `pg_wal`; PostgreSQL passes over names that it does not know.
const FOLDER: &str = "tidemark_ahead";
/// Changes with every start of the host.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Held by the process that fills the folder.
pub const LOCK: &str = "lock";
/// Ends the name of a file that is not whole yet.
pub const UNFINISHED: &str = ".new";
/// What PostgreSQL's `%p` ends with for a segment. Who fetches one file by hand wants no others.
const ASKED_BY_POSTGRESQL: &str = "RECOVERYXLOG";
const POLL: Duration = Duration::from_millis(1);
/// How long `wal-fetch` waits for a file in the making: its maker retries a failing store for about this long.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where the segments of one recovery lie ready.
#[derive(Clone, Debug)]
pub struct Ahead {
    folder: PathBuf,
}

impl Ahead {
    /// Of a plan, given as the bytes of its file.
    #[must_use]
    pub fn of_plan(plan: &[u8], destination: &Path) -> Option<Self> {
        Self::beside(&digest_of_plan(plan), destination)
    }

    /// Of a recovery without a plan: the same program, told the same, about the same timeline.
    #[must_use]
    pub fn of_arguments(name: &str, destination: &Path) -> Option<Self> {
        let asked: SegmentName = name.parse().ok()?;
        if destination.file_name()? != ASKED_BY_POSTGRESQL {
            return None;
        }
        let mut digest = Sha256::new();
        digest.update(asked.timeline.get().to_be_bytes());
        let arguments = env::args_os().skip(1);
        for argument in arguments
            .filter(|argument| argument != name && argument != destination.as_os_str())
            .chain(env::var_os("TIDEMARK_CONFIG"))
        {
            digest.update(argument.as_bytes());
            digest.update([0]);
            // A configuration that says something else from now on.
            for file in [Path::new(&argument), Path::new("tidemark.toml")] {
                if let Ok(metadata) = fs::metadata(file) {
                    digest.update(metadata.ino().to_be_bytes());
                    digest.update(metadata.mtime_nsec().to_be_bytes());
                    digest.update(metadata.mtime().to_be_bytes());
                }
            }
        }
        Self::beside(&short(&digest.finalize()), destination)
    }

    /// On the file system of the destination.
    fn beside(key: &str, destination: &Path) -> Option<Self> {
        let boot = fs::read_to_string(BOOT_ID).ok()?;
        let beside = match destination.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let folder = beside.join(FOLDER).join(format!("{key}-{}", boot.trim()));
        Some(Self { folder })
    }

    /// Moves `name` to `destination` if it was fetched ahead. False when it was not.
    #[must_use]
    pub fn take(&self, name: &str, destination: &Path) -> bool {
        if name.parse::<SegmentName>().is_err() {
            return false;
        }
        let Ok(lock) = File::open(self.folder.join(LOCK)) else {
            return false;
        };
        let asked = Instant::now();
        // An exclusive lock that can not be had is held by the living process.
        while flock(&lock, FlockOperation::NonBlockingLockShared).is_err() {
            if moved(&self.folder.join(name), destination) {
                return true;
            }
            let unfinished = self.folder.join(format!("{name}{UNFINISHED}"));
            if !unfinished.exists() || asked.elapsed() > PATIENCE {
                // It may have been finished between the two looks.
                return moved(&self.folder.join(name), destination);
            }
            thread::sleep(POLL);
        }
        false
    }

    /// Starts the process that fetches what follows `name`, unless one lives.
    pub fn start(&self, name: &str) {
        if name.parse::<SegmentName>().is_err() || self.is_held() {
            return;
        }
        let Ok(program) = env::current_exe() else {
            return;
        };
        let arguments = env::args_os().skip(1).map(|argument| {
            if argument == "wal-fetch" {
                "wal-ahead".into()
            } else {
                argument
            }
        });
        let mut folder = OsString::from("--folder=");
        folder.push(&self.folder);
        // Its own process group: PostgreSQL signals the group of the process that asked.
        let spawned = Command::new(program)
            .args(arguments)
            .arg(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn();
        if let Err(error) = spawned {
            tracing::warn!(%error, "segments after {name} are not fetched ahead; recovery goes on without");
        }
    }

    fn is_held(&self) -> bool {
        File::open(self.folder.join(LOCK))
            .is_ok_and(|lock| flock(&lock, FlockOperation::NonBlockingLockShared).is_err())
    }
}

/// The words before our program in a `restore_command` with a plan: what lies ready is moved by the shell, which takes a
/// fraction of the time that a program with a database in it needs to start. A name of the folder that does not exist is no
/// more than a failed `mv`.
#[must_use]
pub fn shell_shortcut(plan: &[u8]) -> String {
    let key = digest_of_plan(plan);
    format!("read -r boot <{BOOT_ID}; mv \"pg_wal/{FOLDER}/{key}-$boot/%f\" %p 2>/dev/null || ")
}

fn digest_of_plan(plan: &[u8]) -> String {
    short(&Sha256::digest(plan))
}

fn short(digest: &[u8]) -> String {
    const DIGEST_BYTES: usize = 8;
    hex::encode(digest.get(..DIGEST_BYTES).unwrap_or_default())
}

#[expect(
    clippy::disallowed_methods,
    reason = "not durable on purpose: after a crash of the host nothing of this is believed"
)]
/// Moves a file that need not survive the host.
///
/// # Errors
/// As the system call.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)
}

fn moved(from: &Path, to: &Path) -> bool {
    rename(from, to).is_ok()
}
