//! Stage 3b: uploads the durable part of the open segment to the repository as a tail, once per
//! `remote_flush_interval`.
//!
//! One tail is in flight at a time and none is queued: while the store is slow, the next tail
//! grows. An idle database costs no request. A tail is only ever a copy of spooled WAL, and the
//! sealed segment replaces it.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use intake::stored::{WalSource, seal_range};
use repository::CrashPoint;
use wal_format::SealedHeader;

use super::{archive::Archive, failure::Failure};
use crate::{
    core::event::Event,
    error::{Error, Result},
    spool::writer::TailCut,
};

/// Pause after a failed request, doubled up to the maximum. See the constants of the same names in
/// `seal`.
const RETRY_MIN: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(5);

/// The slot for the one tail in flight.
#[derive(Debug, Default)]
pub struct TailSlot {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    next: Option<TailCut>,
    stopping: bool,
}

impl TailSlot {
    /// Returns true if no tail is in flight.
    #[must_use]
    pub fn is_free(&self, archive: &Archive) -> bool {
        self.lock().next.is_none() && archive.progress().is_tail_free()
    }

    /// Hands over a tail. Called only when the core says that the slot is free.
    pub fn put(&self, tail: TailCut) {
        let mut state = self.lock();
        debug_assert!(state.next.is_none(), "BUG: a tail was cut while one waits");
        state.next = Some(tail);
        drop(state);
        self.changed.notify_all();
    }

    /// Ends the thread after the tail that it holds.
    pub fn stop(&self) {
        self.lock().stopping = true;
        self.changed.notify_all();
    }

    fn take(&self) -> Option<TailCut> {
        let mut state = self.lock();
        loop {
            if state.stopping {
                return None;
            }
            if let Some(tail) = state.next.take() {
                return Some(tail);
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

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

fn work(archive: &Archive, slot: &TailSlot, failure: &Failure) {
    while let Some(tail) = slot.take() {
        let progress = archive.progress();
        let mut retry = RETRY_MIN;
        let mut has_failed = false;
        loop {
            if archive.is_sealed(tail.branch, tail.segment) {
                archive.status().repository_no_longer_asked("tail");
                // A request that failed may have stored the tail.
                if has_failed
                    && let Err(error) = archive.remove_superseded_tails(tail.branch, tail.segment)
                {
                    tracing::warn!(%error, "a superfluous tail stays in the repository");
                }
                progress.on(Event::TailSuperseded);
                break;
            }
            let stored = store(archive, &tail)
                .map_err(|error| error.into_answer(|| archive.repository().url()));
            match stored {
                Ok(()) => {
                    archive.status().repository_answered("tail", "");
                    progress.on(Event::TailStored {
                        branch: tail.branch,
                        range: (tail.start_lsn, tail.end_lsn),
                    });
                    break;
                }
                Err(Ok(answer)) => {
                    has_failed = true;
                    archive.status().repository_failed("tail", "", &answer);
                    if !slot.pause(retry) {
                        return;
                    }
                    retry = (retry * 2).min(RETRY_MAX);
                }
                Err(Err(error)) => {
                    failure.raise(error);
                    return;
                }
            }
        }
    }
}

fn store(archive: &Archive, tail: &TailCut) -> Result<()> {
    let path = archive.branch_spool(tail.branch).partial_path(tail.segment);
    let reached = CrashPoint::TailCut.reach();
    reached.map_err(Error::io("read", &path))?;
    archive.store_history(tail.branch)?;
    let identity = archive.identity();
    let header = SealedHeader {
        system_identifier: identity.system_identifier,
        version: identity.version,
        branch: tail.branch,
        segment_size: identity.segment_size,
        start_lsn: tail.start_lsn,
        end_lsn: tail.end_lsn,
    };
    let source = WalSource {
        file: &tail.file,
        path: &path,
        offset: identity.segment_size.offset_of(tail.start_lsn),
        from: "the spool",
    };
    let level = archive.settings().compression_level;
    let object = seal_range(level, header, &tail.summary, tail.proven, &source)?;
    let reached = CrashPoint::TailPacked.reach();
    reached.map_err(Error::io("read", &path))?;
    let range = archive.store_wal(&header, &object, &tail.summary, tail.proven, &source)?;
    archive.note_tail(range)?;
    let reached = CrashPoint::TailNoted.reach();
    reached.map_err(Error::io("read", &path))
}

/// Starts the thread.
///
/// # Errors
/// [`Error::Io`] when the system has no more threads.
pub fn start(
    archive: &Arc<Archive>,
    slot: &Arc<TailSlot>,
    failure: &Arc<Failure>,
) -> Result<JoinHandle<()>> {
    let (archive, slot, failure) = (Arc::clone(archive), Arc::clone(slot), Arc::clone(failure));
    std::thread::Builder::new()
        .name("tail".to_owned())
        .spawn(move || work(&archive, &slot, &failure))
        .map_err(Error::no_thread("tail"))
}
