//! The process that prefetches WAL for a recovery. It ends when PostgreSQL asks for no more
//! segments.
//!
//! Invariant: a file gets its final name when it is complete and checked. The total size of
//! complete and unfinished files is bounded.

use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use quick::ahead::{LOCK, UNFINISHED, rename};
use repository::{ClusterIdentity, Repository};
use rustix::fs::{FlockOperation, flock};
use wal_format::{Lsn, SegmentName, SegmentNo, SegmentSize, TimelineId};

use crate::{
    Error, RestorePlan, Result,
    execute::Access,
    plan::PathPart,
    tablespaces::RECORD_BYTES,
    wal_fetch::{self, Asked},
};

/// The maximum total size of complete and unfinished files. Sixteen segments of 16 MiB are more
/// than PostgreSQL replays while several threads fetch one segment each from a distant store.
pub(crate) const WINDOW_BYTES: u64 = 256 << 20;
/// The maximum number of concurrent fetches. More are useless, because the replay is one process.
const THREADS_MAX: u64 = 4;
/// The number of begun or complete segments below which PostgreSQL is about to wait for one. Then a
/// thread may use the processor that is otherwise left to the replay.
const FEW: usize = 4;
/// Gives the replay a slightly higher priority. On a busy host the replay still waits for these
/// fetches.
const NICENESS: i32 = 1;
/// The time without a request after which the process ends. A replay that takes longer for its
/// segments starts it again.
const IDLE_MAX: Duration = Duration::from_secs(30);
/// The interval of the checks for segments that were taken.
const POLL: Duration = Duration::from_millis(5);

/// Fetches into `folder` the segments that follow `name` in the plan, or without a plan on its
/// timeline. Returns when all were taken, or none was for `IDLE_MAX`.
///
/// # Errors
/// If the folder cannot be created. A segment that cannot be fetched is left to `wal-fetch`, which
/// reports the reason.
pub fn run(
    repository: &Repository,
    plan: Option<&RestorePlan>,
    name: &str,
    folder: &Path,
) -> Result<()> {
    let asked: SegmentName = name
        .parse()
        .map_err(|error| Error::usage(format!("{error}")))?;
    let identity = wal_fetch::identity(repository)?;
    let size = identity.wal_segment_size;
    let Some(from) = asked.segment(size) else {
        return Ok(());
    };
    let Some(lock) = hold(folder)? else {
        return Ok(());
    };
    let names = match plan {
        Some(plan) => {
            let mut names = segments(&plan.path, plan.start_lsn, plan.wal_end_lsn, size);
            names.retain(|name| name.segment(size).is_some_and(|number| number > from));
            Names::Planned(names)
        }
        None => Names::Following(asked.timeline, from.next()),
    };
    let fetcher = Fetcher {
        repository,
        identity,
        plan,
        folder,
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
    let steady = steady_threads(repository);
    let threads = (WINDOW_BYTES / 2 / size.bytes()).clamp(1, THREADS_MAX.min(steady + 1));
    thread::scope(|scope| {
        for number in 0..threads {
            let fetcher = &fetcher;
            let window = if number < steady { fetcher.window } else { FEW };
            scope.spawn(move || fetcher.work(window));
        }
    });
    drop(fs::remove_dir_all(folder));
    drop(lock);
    // Fails, as intended, if the directory contains another recovery's folder.
    if let Some(all) = folder.parent() {
        drop(fs::remove_dir(all));
    }
    Ok(())
}

/// Returns the number of threads that fetch permanently. Reading from a folder uses only
/// processors, and the replay needs one of them.
fn steady_threads(repository: &Repository) -> u64 {
    if !repository.url().starts_with("file:") {
        return THREADS_MAX;
    }
    let processors = thread::available_parallelism().map_or(1, usize::from);
    THREADS_MAX.min(processors.saturating_sub(1).max(1) as u64)
}

struct Fetcher<'a> {
    repository: &'a Repository,
    identity: ClusterIdentity,
    plan: Option<&'a RestorePlan>,
    folder: &'a Path,
    /// The PID file of the server that requests WAL; `None` if no server runs.
    server: Option<PathBuf>,
    /// The maximum number of segments that are complete or unfinished.
    window: usize,
    state: Mutex<State>,
}

struct State {
    names: Names,
    /// The segments whose fetch has begun and which PostgreSQL has not taken yet, in the order in
    /// which they were begun.
    ready: VecDeque<Begun>,
    /// The time at which a segment was last taken.
    taken: Instant,
}

struct Begun {
    path: PathBuf,
    /// The complete file until it is fsynced.
    unsettled: Option<File>,
}

/// The segments whose fetch has not begun.
enum Names {
    /// These segments, in the order of replay.
    Planned(VecDeque<SegmentName>),
    /// All segments from this one on, until one is not sealed yet.
    Following(TimelineId, SegmentNo),
    Ended,
}

enum Next {
    /// Fetches into a file that was just created. The file is never opened again: when a file that
    /// was opened with `O_TRUNC` is closed, ext4 starts to write it to disk, even if it was empty
    /// before.
    Fetch(SegmentName, File),
    /// Fsyncs a complete file. PostgreSQL fsyncs each segment that it takes and replays nothing
    /// meanwhile (`durable_rename` in `KeepFileRestoredFromArchive`); this leaves it little to do.
    /// Correctness does not depend on it: after a crash of the host these files are not used.
    Settle(File),
    Wait,
    End,
}

impl Fetcher<'_> {
    /// Fetches while fewer than `window` segments are begun or complete.
    fn work(&self, window: usize) {
        loop {
            match self.next(window.min(self.window)) {
                Next::Fetch(name, file) => self.fetch(name, file),
                Next::Settle(file) => drop(file.sync_data()),
                Next::Wait => thread::sleep(POLL),
                Next::End => return,
            }
        }
    }

    fn next(&self, window: usize) -> Next {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // Segments are taken in this order. A segment that could not be fetched has no file either.
        while let Some(first) = state.ready.front()
            && !first.path.exists()
            && !unfinished(&first.path).exists()
        {
            state.ready.pop_front();
            state.taken = Instant::now();
        }
        // A stopped server requests no more WAL, and its directory may be about to be removed.
        let stopped = self
            .server
            .as_ref()
            .is_some_and(|running| !running.exists());
        let over = stopped || state.taken.elapsed() > IDLE_MAX || !self.folder.exists();
        let all_begun = match &state.names {
            Names::Planned(names) => names.is_empty(),
            Names::Following(..) => false,
            Names::Ended => true,
        };
        if over || (all_begun && state.ready.is_empty()) {
            return Next::End;
        }
        if all_begun || state.ready.len() >= window {
            // While PostgreSQL takes segments as fast as they are fetched, no thread waits for the
            // disk.
            let unhurried = all_begun || state.ready.len() >= self.window;
            let mut ready = state.ready.iter_mut().filter(|_| unhurried);
            let unsettled = ready.find_map(|begun| begun.unsettled.take());
            return unsettled.map_or(Next::Wait, Next::Settle);
        }
        let size = self.identity.wal_segment_size;
        let name = match &mut state.names {
            Names::Planned(names) => names.pop_front(),
            Names::Following(timeline, number) => {
                let name = SegmentName::new(*timeline, *number, size);
                *number = number.next();
                Some(name)
            }
            Names::Ended => None,
        };
        let Some(name) = name else {
            return Next::Wait;
        };
        let path = self.folder.join(name.to_string());
        // Created under the lock, so that the order of fetching is the order of replay.
        let mut options = OpenOptions::new();
        let mode = Access::of_directory(self.folder).file_mode();
        let created = options.write(true).create_new(true).mode(mode);
        let Ok(file) = created.open(unfinished(&path)) else {
            return Next::End;
        };
        state.ready.push_back(Begun {
            path,
            unsettled: None,
        });
        Next::Fetch(name, file)
    }

    fn fetch(&self, name: SegmentName, mut file: File) {
        let path = self.folder.join(name.to_string());
        let new = unfinished(&path);
        let whole = self.write(name, &mut file).unwrap_or(false);
        if whole && rename(&new, &path).is_ok() {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(begun) = state.ready.iter_mut().find(|begun| begun.path == path) {
                begun.unsettled = Some(file);
            }
            return;
        }
        // Without a plan, a failed fetch is the only sign that no segment follows.
        if self.plan.is_none() {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.names = Names::Ended;
        }
        drop(fs::remove_file(&new));
    }

    /// Returns true if a record that creates a tablespace begins or ends in the segment.
    fn creates_tablespace(&self, plan: &RestorePlan, name: SegmentName) -> bool {
        let size = self.identity.wal_segment_size;
        let Some(number) = name.segment(size) else {
            return false;
        };
        let mut created = plan.tablespaces.iter();
        created.any(|one| {
            let last = one.lsn.add(RECORD_BYTES);
            one.directory.is_some()
                && (size.segment_of(one.lsn)..=size.segment_of(last)).contains(&number)
        })
    }

    /// Returns true if the plan changes timelines within the segment.
    fn contains_fork(&self, plan: &RestorePlan, name: SegmentName) -> bool {
        let size = self.identity.wal_segment_size;
        let begins_in = |number: SegmentNo, from: Lsn| {
            number.start_lsn(size) < from && from < number.end_lsn(size)
        };
        let number = name.segment(size);
        number.is_some_and(|number| plan.path.iter().any(|part| begins_in(number, part.from)))
    }

    fn write(&self, name: SegmentName, file: &mut File) -> Result<bool> {
        match self.plan {
            // `wal-fetch` checks the directory of a tablespace just before the replay creates it.
            Some(plan) if self.creates_tablespace(plan, name) => Ok(false),
            // `wal-fetch` also places the WAL of the timelines that end in it.
            Some(plan) if self.contains_fork(plan, name) => Ok(false),
            Some(plan) => {
                let asked = Asked::by(plan);
                wal_fetch::segment(self.repository, &self.identity, asked, name, file)
            }
            // The folder is in `pg_wal`, which is in the data directory.
            None => {
                let data = self.folder.ancestors().nth(3);
                wal_fetch::sealed(self.repository, &self.identity, data, name, file)
            }
        }
    }
}

/// Returns the segments of the plan in the order of replay. If the path changes timelines within a
/// segment, PostgreSQL asks for the newer timeline's file first.
fn segments(path: &[PathPart], start: Lsn, end: Lsn, size: SegmentSize) -> VecDeque<SegmentName> {
    let mut names = VecDeque::new();
    let mut number = size.segment_of(start);
    while number.start_lsn(size) < end {
        let holder = path
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

fn unfinished(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(UNFINISHED);
    name.into()
}

/// Locks the folder and removes the files of an earlier process. Returns `None` if a running
/// process has the lock.
fn hold(folder: &Path) -> Result<Option<File>> {
    // If the folder or its parent is a link, the files would be written to another directory.
    if folder.is_symlink() || folder.parent().is_some_and(Path::is_symlink) {
        return Ok(None);
    }
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
    remove_older(folder);
    Ok(Some(lock))
}

/// Removes the folders of the same recovery from before a restart of the host, because they are not
/// used.
fn remove_older(folder: &Path) {
    let Some(key) = folder
        .file_name()
        .and_then(|name| name.to_str()?.split_once('-'))
        .map(|(key, _)| format!("{key}-"))
    else {
        return;
    };
    let entries = folder.parent().and_then(|all| fs::read_dir(all).ok());
    for entry in entries.into_iter().flatten().flatten() {
        let name = entry.file_name();
        let is_ours = name.to_str().is_some_and(|name| name.starts_with(&key));
        if is_ours && entry.path() != folder {
            drop(fs::remove_dir_all(entry.path()));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use repository::timeline_path;
    use wal_format::{Branch, TimelineHistory};

    use super::*;

    proptest! {
        /// `XLogFileReadAnyTLI` in `xlogrecovery.c` asks for a segment on the newest timeline that
        /// does not begin in a later segment, whatever the order of the switches in the history
        /// file.
        #[test]
        fn names_are_those_that_postgresql_asks_for_first(
            switches in prop::collection::vec(1_u64..40, 1..6),
        ) {
            let size = SegmentSize::new(1 << 20).expect("a size");
            let timeline = |number: usize| {
                TimelineId::new(u32::try_from(number).expect("small")).expect("a timeline")
            };
            // Eight switch points in a segment.
            let lsn = |switch: u64| Lsn(switch * (1 << 17));
            let lines = switches.iter().enumerate();
            let lines = lines.map(|(line, switch)| format!("{}\t{}\tx\n", line + 1, lsn(*switch)));
            let content = lines.collect::<String>().into_bytes();
            let last = timeline(switches.len() + 1);
            let history = TimelineHistory::parse(last, &content).expect("it parses");
            let branch = Branch::of_history(last, &content);
            let path = timeline_path(&[(branch, Some(history), content)], branch).expect("a path");
            let names: Vec<SegmentName> = segments(&path, Lsn(0), Lsn(6 << 20), size).into();
            let expected = (0..6_u64).map(|number| {
                // Newest first: a timeline begins where the line before its own says.
                let begins = switches.iter().map(|switch| lsn(*switch).0 >> 20).enumerate().rev();
                let asked = begins.filter(|(_, begins)| *begins <= number).map(|(line, _)| line + 2);
                let asked = timeline(asked.into_iter().next().unwrap_or(1));
                SegmentName::new(asked, size.segment_of(Lsn(number << 20)), size)
            });
            prop_assert_eq!(names, expected.collect::<Vec<_>>());
        }
    }

    /// The file names at switches. In the middle of a segment PostgreSQL asks for the newer
    /// timeline's file, which begins with the older one's bytes. At the edge of a segment each
    /// timeline has its own.
    #[test]
    fn names_follow_the_path_over_switches() {
        let size = SegmentSize::new(1 << 20).expect("a size");
        let part = |timeline, from, to| PathPart {
            branch: Branch::without_history(TimelineId::new(timeline).expect("a timeline")),
            from: Lsn(from),
            to: Lsn(to),
        };
        let names = |path: &[PathPart], start, end| {
            let names = segments(path, Lsn(start), Lsn(end), size);
            let names: Vec<String> = names.iter().map(ToString::to_string).collect();
            names
        };
        let path = [
            part(1, 0, 0x50_0800),
            part(3, 0x50_0800, 0x70_0000),
            part(4, 0x70_0000, u64::MAX),
        ];
        assert_eq!(
            names(&path, 0x30_0028, 0x80_0001),
            [
                "000000010000000000000003",
                "000000010000000000000004",
                "000000030000000000000005",
                "000000030000000000000006",
                "000000040000000000000007",
                "000000040000000000000008",
            ]
        );
        // Two switches within one segment: the newest timeline has all of it.
        let path = [
            part(1, 0, 0x50_0800),
            part(2, 0x50_0800, 0x50_0900),
            part(3, 0x50_0900, u64::MAX),
        ];
        assert_eq!(
            names(&path, 0x50_0028, 0x60_0000),
            ["000000030000000000000005"]
        );
    }
}
