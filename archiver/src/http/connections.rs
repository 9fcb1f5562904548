//! At most so many connections at once, and a newcomer is never kept out by idle ones: the oldest idle one goes for it.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use tokio::task::AbortHandle;

/// Connections at once; each costs a few KiB.
const CONNECTIONS_MAX: usize = 512;

/// How many requests of a connection are being answered.
#[derive(Clone, Debug, Default)]
pub(super) struct Busy(Arc<AtomicUsize>);

/// Held while a request is answered.
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
    /// Makes room for one more; whether there is room.
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

    /// Numbers a connection.
    pub(super) fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// A connection is served by `task`.
    pub(super) fn opened(&self, number: u64, busy: Busy, task: AbortHandle) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        // It may have ended before it could be entered.
        if !task.is_finished() {
            open.push_back(Open { number, busy, task });
        }
    }

    /// A connection has ended.
    pub(super) fn closed(&self, number: u64) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|one| one.number != number && !one.task.is_finished());
    }
}
