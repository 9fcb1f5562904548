//! Stage 3: uploads complete segments to the repository as sealed objects and removes them from the
//! spool.
//!
//! The worker threads run at low priority, because the receive path has precedence. The queue
//! contains only names. The WAL itself is on disk, so a store that is down for days costs disk
//! space but no memory.
//! Invariant: a spool file is removed only when its object was read back and no unsealed segment
//! still needs the file to find the start of a record.

use std::{
    collections::BTreeMap,
    fs::File,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use intake::stored::{WalSource, seal_range};
use repository::CrashPoint;
use status::cluster_status::ClusterStatus;
use wal_format::{Branch, Lsn, PgTimestamp, SealedHeader, SegmentNo, SegmentSummary, WalIndexer};

use super::{archive::Archive, failure::Failure};
use crate::{
    core::{action::Action, event::Event, progress::Progress},
    error::{Error, Result},
};

/// The maximum size of the summaries in memory for waiting segments. Beyond it, a summary is
/// computed again from the spool. 16 MiB hold a few hundred thousand commits, more than a catch-up
/// of several GB leaves waiting.
const SUMMARY_BYTES_MAX: usize = 16 << 20;
/// The pause after a failed request, doubled up to the maximum. It is long enough not to overload a
/// store that is down, and short enough that the remote RPO recovers within seconds after the
/// store.
const RETRY_MIN: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(10);

type Place = (Branch, SegmentNo);

/// The segments that wait to be sealed, shared by the flush thread, the spool thread and the
/// workers. The core decides which one is next. This struct holds the summaries of the waiting
/// segments and wakes the workers.
#[derive(Debug)]
pub struct Backlog {
    progress: Arc<Progress>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    summaries: BTreeMap<Place, Indexed>,
    summary_bytes: usize,
    stopping: bool,
}

#[derive(Debug)]
struct Indexed {
    summary: SegmentSummary,
    proven: Option<PgTimestamp>,
}

impl Indexed {
    fn bytes(&self) -> usize {
        let transactions = self.summary.transactions.len() * 24;
        transactions + self.summary.events.len() * 128
    }
}

impl Backlog {
    /// Creates an empty backlog.
    #[must_use]
    pub fn new(progress: Arc<Progress>) -> Self {
        Self {
            progress,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Adds a complete, durable segment. `end_lsn` is its end if it became durable now, and `None`
    /// if it was found in the spool. Without a summary, it is indexed from the spool.
    pub fn push(
        &self,
        branch: Branch,
        segment: SegmentNo,
        end_lsn: Option<Lsn>,
        summary: Option<(SegmentSummary, Option<PgTimestamp>)>,
    ) {
        let mut state = self.lock();
        let indexed = summary
            .map(|(summary, proven)| Indexed { summary, proven })
            .filter(|indexed| state.summary_bytes + indexed.bytes() <= SUMMARY_BYTES_MAX);
        if let Some(indexed) = indexed {
            state.summary_bytes += indexed.bytes();
            if let Some(old) = state.summaries.insert((branch, segment), indexed) {
                state.summary_bytes -= old.bytes();
            }
        }
        self.progress.on(Event::Finished {
            branch,
            segment,
            end_lsn,
        });
        drop(state);
        self.changed.notify_all();
    }

    /// The number of segments that wait or are being sealed.
    #[must_use]
    pub fn len(&self) -> usize {
        self.progress.unsealed()
    }

    /// Returns true if no segment waits or is being sealed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Ends the workers after their current segments.
    pub fn stop(&self) {
        self.lock().stopping = true;
        self.changed.notify_all();
    }

    /// Waits for the oldest waiting segment. Returns `None` when stopping.
    fn take(&self) -> Option<(Place, Option<Indexed>)> {
        let mut state = self.lock();
        loop {
            if state.stopping {
                return None;
            }
            let next = self.progress.on(Event::SealerFree);
            if let Some(Action::Seal(branch, segment)) = next.first() {
                let place = (*branch, *segment);
                let indexed = state.summaries.remove(&place);
                state.summary_bytes -= indexed.as_ref().map_or(0, Indexed::bytes);
                return Some((place, indexed));
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits before a retry. Returns false when stopping.
    fn pause(&self, duration: Duration) -> bool {
        let state = self.lock();
        let (state, _) = self
            .changed
            .wait_timeout_while(state, duration, |state| !state.stopping)
            .unwrap_or_else(PoisonError::into_inner);
        !state.stopping
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The loop of one worker. Seals segments until the backlog is stopped.
pub fn work(archive: &Archive, backlog: &Backlog, failure: &Failure) {
    lower_priority();
    let mut retry = RETRY_MIN;
    while let Some(((branch, segment), indexed)) = backlog.take() {
        let name = archive.branch_spool(branch).name(segment).to_string();
        let sealed = seal(archive, branch, segment, indexed)
            .map_err(|error| error.into_answer(|| archive.repository().url()));
        match sealed {
            Ok(open_record_lsn) => {
                retry = RETRY_MIN;
                archive.status().repository_answered("seal", &name);
                ClusterStatus::count(&archive.status().segments_completed, 1);
                let size = archive.identity().segment_size;
                let (start, end) = (segment.start_lsn(size), segment.end_lsn(size));
                let removable = archive.progress().on(Event::Sealed {
                    branch,
                    segment,
                    range: (start, end),
                    open_record_in: open_record_lsn.map(|lsn| size.segment_of(lsn)),
                });
                for action in removable {
                    let Action::Remove(branch, segment) = action else {
                        continue;
                    };
                    match archive.remove_spooled(branch, segment) {
                        Ok(()) => {
                            let removed = Event::Removed { branch, segment };
                            archive.progress().on(removed);
                        }
                        Err(error) => {
                            tracing::warn!(%error, "a stored segment could not be removed from the spool; the next seal tries again");
                        }
                    }
                }
            }
            Err(Ok(answer)) => {
                archive.status().repository_failed("seal", &name, &answer);
                archive.progress().on(Event::SealFailed { branch, segment });
                if !backlog.pause(retry) {
                    return;
                }
                retry = (retry * 2).min(RETRY_MAX);
            }
            // Divergent or damaged WAL, this host's disk, or the catalog: the supervisor decides.
            Err(Err(error)) => {
                archive.progress().on(Event::SealFailed { branch, segment });
                failure.raise(error);
                return;
            }
        }
    }
}

/// Seals one segment. Returns the start of the record that is incomplete at its end.
fn seal(
    archive: &Archive,
    branch: Branch,
    segment: SegmentNo,
    indexed: Option<Indexed>,
) -> Result<Option<Lsn>> {
    let path = archive.branch_spool(branch).path(segment);
    let reached = CrashPoint::SealBegun.reach();
    reached.map_err(Error::io("open", &path))?;
    archive.store_history(branch)?;
    let is_from_earlier_run = indexed.is_none();
    let indexed = match indexed {
        Some(indexed) => indexed,
        None => index(archive, branch, segment)?,
    };
    let file = File::open(&path).map_err(Error::io("open", &path))?;
    let source = WalSource {
        file: &file,
        path: &path,
        offset: 0,
        from: "the spool",
    };
    let identity = archive.identity();
    let header = SealedHeader::of_segment(
        identity.system_identifier,
        identity.version,
        branch,
        identity.segment_size,
        segment,
    );
    let level = archive.settings().compression_level;
    let object = seal_range(level, header, &indexed.summary, indexed.proven, &source)?;
    let reached = CrashPoint::SealPacked.reach();
    reached.map_err(Error::io("read", &path))?;
    archive.store_wal(&header, &object, &indexed.summary, indexed.proven, &source)?;
    archive.note_sealed(branch, segment)?;
    if is_from_earlier_run {
        // The earlier run may have been killed after the segment was stored and before its tails
        // were removed.
        archive.remove_superseded_tails(branch, segment)?;
    }
    let reached = CrashPoint::SealNoted.reach();
    reached.map_err(Error::io("read", &path))?;
    Ok(indexed.summary.open_record_lsn)
}

/// Computes the summary of a segment that a previous run left, or whose summary did not fit in
/// memory.
fn index(archive: &Archive, branch: Branch, segment: SegmentNo) -> Result<Indexed> {
    let earlier = |wanted| archive.read_segment(branch, wanted);
    let mut indexer = WalIndexer::primed(archive.identity(), segment, earlier)?;
    let spool = archive.branch_spool(branch);
    let bytes = spool.read(segment)?.unwrap_or_default();
    indexer
        .push(&bytes)
        .map_err(|source| Error::Wal(intake::Error::Decode { branch, source }))?;
    Ok(Indexed {
        summary: indexer.take_summary(),
        proven: None,
    })
}

/// Lowers the thread's priority, so that sealing uses only the processor time that the receive path
/// leaves. On Linux niceness is per thread.
fn lower_priority() {
    const NICENESS: i32 = 10;
    if let Err(error) = rustix::process::setpriority_process(None, NICENESS) {
        tracing::debug!(%error, "a sealing thread keeps its priority");
    }
}

/// Starts the workers. `threads` contains every started one, even after an error.
///
/// # Errors
/// [`Error::Io`] if the system has no more threads.
pub fn start(
    archive: &Arc<Archive>,
    backlog: &Arc<Backlog>,
    failure: &Arc<Failure>,
    threads: &mut Vec<JoinHandle<()>>,
) -> Result<()> {
    for number in 0..archive.settings().seal_threads.max(1) {
        let (archive, backlog, failure) = (
            Arc::clone(archive),
            Arc::clone(backlog),
            Arc::clone(failure),
        );
        let started = std::thread::Builder::new()
            .name(format!("seal-{number}"))
            .spawn(move || work(&archive, &backlog, &failure));
        threads.push(started.map_err(Error::no_thread("seal"))?);
    }
    Ok(())
}
