//! Recovery without waiting: fetches, decompresses and checks the plan's segments before PostgreSQL asks for them.
//!
//! A process beside the recovery fills `pg_wal/tidemark_ahead/PLAN/`, bounded in bytes; `wal-fetch` then only renames.
//! Invariant: a file is taken from there only while the process that made it lives, so nothing from before a crash of the
//! host is believed; and only under its own plan's digest, so that no other path's segment of the same name is. Without
//! the process, or with it killed, `wal-fetch` fetches by itself: that costs speed, never correctness.

use std::{
    collections::VecDeque,
    env,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::{fs::OpenOptionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use repository::Repository;
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};
use wal_format::{SegmentName, SegmentSize};

use crate::{Error, RestorePlan, Result, wal_fetch};

/// The folder in `pg_wal`; PostgreSQL passes over names that it does not know.
const FOLDER: &str = "tidemark_ahead";
const LOCK: &str = "lock";
/// Ends the name of a file that is not whole yet.
const UNFINISHED: &str = ".new";
/// What may lie ready or be in the making. Sixteen segments of 16 MiB: more than PostgreSQL replays in the time of one
/// fetch from a far store by several threads.
const WINDOW_BYTES: u64 = 256 << 20;
/// More than this many fetches at once win nothing: the replay is one process.
const THREADS_MAX: u64 = 4;
/// The replay goes first; while it waits, the processor is free.
const NICENESS: i32 = 5;
/// How long nothing was asked for before the process ends. A replay that takes longer over what it has starts it again.
const IDLE_MAX: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(2);
/// How long `wal-fetch` waits for a file in the making: its maker retries a failing store for about this long.
const PATIENCE: Duration = Duration::from_secs(60);

/// Moves `name` to `destination` if it was fetched ahead. False when it was not.
#[must_use]
pub fn take(plan: &[u8], name: &str, destination: &Path) -> bool {
    let folder = folder(plan, destination);
    if name.parse::<SegmentName>().is_err() {
        return false;
    }
    let Ok(lock) = File::open(folder.join(LOCK)) else {
        return false;
    };
    let asked = Instant::now();
    // An exclusive lock that can not be had is held by the living process.
    while flock(&lock, FlockOperation::NonBlockingLockShared).is_err() {
        if moved(&folder.join(name), destination) {
            return true;
        }
        let unfinished = folder.join(format!("{name}{UNFINISHED}"));
        if !unfinished.exists() || asked.elapsed() > PATIENCE {
            // It may have been finished between the two looks.
            return moved(&folder.join(name), destination);
        }
        thread::sleep(POLL);
    }
    false
}

/// Starts the process that fetches what follows `name`, unless one lives or there is little to fetch.
pub fn start(plan: &RestorePlan, content: &[u8], name: &str, destination: &Path) {
    let Ok(asked) = name.parse::<SegmentName>() else {
        return;
    };
    let folder = folder(content, destination);
    if is_held(&folder) || plan.wal_bytes == 0 {
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
    // Its own process group: PostgreSQL signals the group of the process that asked.
    let spawned = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn();
    if let Err(error) = spawned {
        tracing::warn!(%error, "segments after {asked} are not fetched ahead; recovery goes on without");
    }
}

/// The process: fetches the segments of the plan that follow `name`, until all were taken or nobody takes any more.
///
/// # Errors
/// When the folder can not be made; a segment that can not be fetched is left to `wal-fetch`, which says why.
pub fn run(
    repository: &Repository,
    plan: &RestorePlan,
    content: &[u8],
    name: &str,
    destination: &Path,
) -> Result<()> {
    let identity = repository.identity()?.ok_or_else(|| {
        Error::usage(format!(
            "{} holds nothing of cluster {}",
            repository.url(),
            repository.cluster()
        ))
    })?;
    let size = identity.wal_segment_size;
    let folder = folder(content, destination);
    let Some(lock) = hold(&folder)? else {
        return Ok(());
    };
    let from = name
        .parse::<SegmentName>()
        .ok()
        .and_then(|name| name.segment(size));
    let mut names = segments(plan, size);
    if let Some(from) = from {
        names.retain(|name| name.segment(size).is_some_and(|number| number > from));
    }
    let ahead = Ahead {
        repository,
        plan,
        folder: &folder,
        server: folder
            .ancestors()
            .nth(3)
            .map(|data| data.join("postmaster.pid"))
            .filter(|running| running.exists()),
        window: usize::try_from((WINDOW_BYTES / size.bytes()).max(2)).unwrap_or(2),
        state: Mutex::new(State {
            names,
            ready: VecDeque::new(),
            taken: Instant::now(),
        }),
    };
    if let Err(error) = rustix::process::setpriority_process(None, NICENESS) {
        tracing::debug!(%error, "fetching ahead keeps its priority");
    }
    let threads = (WINDOW_BYTES / 2 / size.bytes()).clamp(1, THREADS_MAX);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| ahead.work());
        }
    });
    drop(fs::remove_dir_all(&folder));
    drop(lock);
    // Goes when no other plan's folder is in it.
    if let Some(all) = folder.parent() {
        drop(fs::remove_dir(all));
    }
    Ok(())
}

struct Ahead<'a> {
    repository: &'a Repository,
    plan: &'a RestorePlan,
    folder: &'a Path,
    /// Says that the server runs which asks; `None` where none does.
    server: Option<PathBuf>,
    /// How many segments may be ready or in the making.
    window: usize,
    state: Mutex<State>,
}

struct State {
    /// What was not begun, in the order of replay.
    names: VecDeque<SegmentName>,
    /// What was begun and not seen taken, in the order in which it was begun.
    ready: VecDeque<PathBuf>,
    /// When something was last taken.
    taken: Instant,
}

enum Next {
    Fetch(SegmentName),
    Wait,
    End,
}

impl Ahead<'_> {
    fn work(&self) {
        loop {
            match self.next() {
                Next::Fetch(name) => self.fetch(name),
                Next::Wait => thread::sleep(POLL),
                Next::End => return,
            }
        }
    }

    fn next(&self) -> Next {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // They are taken in this order; one that could not be fetched is gone too.
        while let Some(first) = state.ready.front()
            && !first.exists()
            && !unfinished(first).exists()
        {
            state.ready.pop_front();
            state.taken = Instant::now();
        }
        // A stopped server asks for nothing more, and its directory may be on its way out.
        let stopped = self
            .server
            .as_ref()
            .is_some_and(|running| !running.exists());
        let over = stopped || state.taken.elapsed() > IDLE_MAX || !self.folder.exists();
        if over || (state.names.is_empty() && state.ready.is_empty()) {
            return Next::End;
        }
        if state.ready.len() >= self.window {
            return Next::Wait;
        }
        let Some(name) = state.names.pop_front() else {
            return Next::Wait;
        };
        let path = self.folder.join(name.to_string());
        // Created under the lock, so that the order of fetching is the order of replay.
        if File::create(unfinished(&path)).is_err() {
            return Next::End;
        }
        state.ready.push_back(path);
        Next::Fetch(name)
    }

    fn fetch(&self, name: SegmentName) {
        let path = self.folder.join(name.to_string());
        let new = unfinished(&path);
        let made = wal_fetch::content(self.repository, Some(self.plan), &name.to_string())
            .ok()
            .flatten()
            .and_then(|wal| write(&new, &wal).ok());
        let done = made.is_some_and(|()| rename(&new, &path).is_ok());
        if !done {
            drop(fs::remove_file(&new));
        }
    }
}

/// The segments of the plan in the order of replay. Where the path changes timelines within a segment, PostgreSQL asks for
/// the newer timeline's file first.
fn segments(plan: &RestorePlan, size: SegmentSize) -> VecDeque<SegmentName> {
    let mut names = VecDeque::new();
    let mut number = size.segment_of(plan.start_lsn);
    while number.start_lsn(size) < plan.wal_end_lsn {
        let holder = plan
            .path
            .iter()
            .rev()
            .find(|part| part.from < number.end_lsn(size));
        if let Some(part) = holder {
            names.push_back(SegmentName::new(part.branch.timeline, number, size));
        }
        number = number.next();
    }
    names
}

/// Where the segments of a plan lie: on the file system of their destination.
fn folder(plan: &[u8], destination: &Path) -> PathBuf {
    const DIGEST_BYTES: usize = 8;
    let digest = hex::encode(Sha256::digest(plan).get(..DIGEST_BYTES).unwrap_or_default());
    let beside = match destination.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    beside.join(FOLDER).join(digest)
}

fn unfinished(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(UNFINISHED);
    name.into()
}

fn is_held(folder: &Path) -> bool {
    File::open(folder.join(LOCK))
        .is_ok_and(|lock| flock(&lock, FlockOperation::NonBlockingLockShared).is_err())
}

/// Takes the folder, emptied of what an earlier process left; `None` when one that lives has it.
fn hold(folder: &Path) -> Result<Option<File>> {
    fs::create_dir_all(folder).map_err(Error::io("create directory", folder))?;
    let path = folder.join(LOCK);
    let mut options = OpenOptions::new();
    let lock = options.write(true).create(true).truncate(false).open(&path);
    let lock = lock.map_err(Error::io("open", &path))?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Ok(None);
    }
    for entry in fs::read_dir(folder)
        .map_err(Error::io("list", folder))?
        .flatten()
    {
        if entry.file_name() != LOCK {
            drop(fs::remove_file(entry.path()));
        }
    }
    Ok(Some(lock))
}

fn write(path: &Path, wal: &[u8]) -> io::Result<()> {
    // No fsync: PostgreSQL does it when it takes the file, and after a crash nothing of this is believed.
    OpenOptions::new()
        .write(true)
        .truncate(true)
        .create(true)
        .mode(0o600)
        .open(path)?
        .write_all(wal)
}

#[expect(
    clippy::disallowed_methods,
    reason = "not durable on purpose: after a crash of the host nothing of this is believed"
)]
fn rename(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)
}

fn moved(from: &Path, to: &Path) -> bool {
    rename(from, to).is_ok()
}
