//! Limits the number of connections. Idle connections never keep a new one out: the oldest idle one
//! is closed for it.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use tokio::task::AbortHandle;

/// The maximum number of connections. Each one uses a few KiB.
const CONNECTIONS_MAX: usize = 512;

/// The number of a connection's requests that are being answered.
#[derive(Clone, Debug, Default)]
pub(super) struct Busy(Arc<AtomicUsize>);

/// Counts a request until it is dropped.
#[derive(Debug)]
pub(super) struct BusyGuard(Arc<AtomicUsize>);

impl Busy {
    pub(super) fn begin(&self) -> BusyGuard {
        self.0.fetch_add(1, Ordering::Relaxed);
        BusyGuard(Arc::clone(&self.0))
    }
}

impl Drop for BusyGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct Open {
    number: u64,
    busy: Busy,
    task: AbortHandle,
}

/// The open connections, oldest first.
#[derive(Debug, Default)]
pub(super) struct Connections {
    open: Mutex<VecDeque<Open>>,
    next: AtomicU64,
}

impl Connections {
    /// Closes the oldest idle connection if the maximum is reached. Returns whether another
    /// connection is possible.
    pub(super) fn make_room(&self) -> bool {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.len() < CONNECTIONS_MAX {
            return true;
        }
        let idle = open
            .iter()
            .position(|one| one.busy.0.load(Ordering::Relaxed) == 0);
        match idle.and_then(|at| open.remove(at)) {
            Some(oldest) => {
                oldest.task.abort();
                true
            }
            None => false,
        }
    }

    /// Returns the number of a new connection.
    pub(super) fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// Adds a connection that `task` serves.
    pub(super) fn opened(&self, number: u64, busy: Busy, task: AbortHandle) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        // The task may already have ended.
        if !task.is_finished() {
            open.push_back(Open { number, busy, task });
        }
    }

    /// Removes a connection that has ended.
    pub(super) fn closed(&self, number: u64) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|one| one.number != number && !one.task.is_finished());
    }
}
