//! [`Ahead`]: the directory of segments that were fetched before PostgreSQL asked for them.
//!
//! A separate process (`pitr-restore wal-ahead`, `restorer/src/look_ahead.rs`) fills
//! `pg_wal/tidemark_ahead/KEY-BOOT/`, up to a limit in bytes. `wal-fetch`, or `mv` in the restored
//! `restore_command`, then only renames a file.
//! Invariant: a file in this directory is complete, was checked, and was written since the last
//! boot of the host (`BOOT`). Files that a crash of the host left are never used.
//!
//! `KEY` is the plan's digest, so a segment of another path with the same name is not used. Without
//! a plan only sealed segments are prefetched, for one timeline number. If the process does not run
//! or was killed, `wal-fetch` fetches segments itself; this is slower but correct.

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

/// The directory in `pg_wal`. PostgreSQL ignores names that it does not know.
const FOLDER: &str = "tidemark_ahead";
/// Changes at every boot of the host.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// The lock file, held by the process that fills the directory.
pub const LOCK: &str = "lock";
/// The suffix of an incomplete file.
pub const UNFINISHED: &str = ".new";
/// The file name that PostgreSQL passes as `%p` for a segment. Prefetching would be useless for a
/// single file that is fetched by hand.
const ASKED_BY_POSTGRESQL: &str = "RECOVERYXLOG";
const POLL: Duration = Duration::from_millis(1);
/// The time for which `wal-fetch` waits for a file that is being fetched. The fetching process
/// retries a failing store for about as long.
const PATIENCE: Duration = Duration::from_secs(60);

/// The prefetch directory of one recovery.
#[derive(Clone, Debug)]
pub struct Ahead {
    folder: PathBuf,
}

impl Ahead {
    /// The directory for a plan, given as the bytes of the plan file. `None` if the boot ID cannot
    /// be read.
    #[must_use]
    pub fn of_plan(plan: &[u8], destination: &Path) -> Option<Self> {
        Self::beside(&digest_of_plan(plan), destination)
    }

    /// The directory for a recovery without a plan, identified by the program's arguments and the
    /// timeline. `None` if PostgreSQL did not request a segment.
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
            // A changed configuration file gives another key.
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

    /// The directory next to the destination, and so on the same file system.
    fn beside(key: &str, destination: &Path) -> Option<Self> {
        let boot = fs::read_to_string(BOOT_ID).ok()?;
        let beside = match destination.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let folder = beside.join(FOLDER).join(format!("{key}-{}", boot.trim()));
        Some(Self { folder })
    }

    /// Moves `name` to `destination` if it was prefetched. Returns whether it was.
    #[must_use]
    pub fn take(&self, name: &str, destination: &Path) -> bool {
        if name.parse::<SegmentName>().is_err() {
            return false;
        }
        let Ok(lock) = File::open(self.folder.join(LOCK)) else {
            return false;
        };
        let asked = Instant::now();
        // While the exclusive lock is held, the filling process is alive.
        while flock(&lock, FlockOperation::NonBlockingLockShared).is_err() {
            if moved(&self.folder.join(name), destination) {
                return true;
            }
            let unfinished = self.folder.join(format!("{name}{UNFINISHED}"));
            if !unfinished.exists() || asked.elapsed() > PATIENCE {
                // The file may have been completed between the two checks.
                return moved(&self.folder.join(name), destination);
            }
            thread::sleep(POLL);
        }
        false
    }

    /// Starts the process that fetches the segments after `name`, unless it runs already.
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
        // A separate process group, because PostgreSQL signals the group of the process that it
        // started.
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

/// Returns the start of a `restore_command` with a plan: the shell moves a prefetched file, which
/// takes a fraction of the time that our program needs to start. If the directory does not exist,
/// `mv` fails and our program runs.
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
/// Moves a file that need not survive a crash of the host.
///
/// # Errors
/// The error of the system call.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)
}

fn moved(from: &Path, to: &Path) -> bool {
    rename(from, to).is_ok()
}
