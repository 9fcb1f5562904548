//! [`Progress`]: the core, shared between the stages, and what may be told to PostgreSQL, pushed to who tells it.
//!
//! Invariant: a [`FlushedLsn`] is made here and nowhere else, from what the core says after the spool's fsync or the
//! repository's verified put was reported to it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use repository::config::Acknowledge;
use tokio::sync::watch;
use wal_format::Lsn;

use crate::{
    core::{Action, Core, Event, positions::Positions},
    flushed_lsn::FlushedLsn,
};

/// What a status update says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acknowledgement {
    /// Written here.
    pub write: Lsn,
    /// Durable in the chosen class.
    pub flush: FlushedLsn,
}

/// The shared core.
#[derive(Debug)]
pub struct Progress {
    core: Mutex<Core>,
    acknowledgement: watch::Sender<Acknowledgement>,
}

impl Progress {
    /// Nothing yet.
    #[must_use]
    pub fn new(acknowledge: Acknowledge) -> Self {
        let (acknowledgement, _) = watch::channel(Acknowledgement {
            write: Lsn::ZERO,
            flush: FlushedLsn::proved(Lsn::ZERO),
        });
        Self {
            core: Mutex::new(Core::new(acknowledge)),
            acknowledgement,
        }
    }

    /// Tells the core what happened, and everyone who reports what may be said now; what is to be done.
    pub fn on(&self, event: Event) -> Vec<Action> {
        let mut core = self.lock();
        let actions = core.on(event);
        let report = core.report();
        let now = Acknowledgement {
            write: report.write,
            flush: FlushedLsn::proved(report.flush),
        };
        // Sent under the lock, so that an older report can not overtake a newer one.
        self.acknowledgement
            .send_if_modified(|last| std::mem::replace(last, now) != now);
        actions
    }

    /// A copy of the positions.
    #[must_use]
    pub fn positions(&self) -> Positions {
        self.lock().positions().clone()
    }

    /// Complete segments that are not sealed yet.
    #[must_use]
    pub fn unsealed(&self) -> usize {
        self.lock().unsealed()
    }

    /// Whether no tail is on its way.
    #[must_use]
    pub fn is_tail_free(&self) -> bool {
        self.lock().is_tail_free()
    }

    /// How much was written here that the repository does not hold.
    #[must_use]
    pub fn waiting_bytes(&self) -> u64 {
        let core = self.lock();
        let positions = core.positions();
        positions.written().bytes_since(positions.remote())
    }

    /// Follows what may be told to PostgreSQL.
    #[must_use]
    pub fn acknowledgements(&self) -> watch::Receiver<Acknowledgement> {
        self.acknowledgement.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, Core> {
        // The core is whole between any two events, so a panic elsewhere does not spoil it.
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
