//! [`Progress`]: the core, shared between the stages. It publishes the positions that may be
//! reported to PostgreSQL to the status reporters.
//!
//! Invariant: a [`FlushedLsn`] is made only here, from what the core returns after the spool's
//! fsync or the repository's verified put was reported to it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use replication::FlushedLsn;
use repository::{PathPart, config::Acknowledge};
use status::durable::{DurablePositions, DurableWal};
use tokio::sync::watch;
use wal_format::Lsn;

use crate::core::{Core, action::Action, event::Event, positions::Positions};

/// The content of a status update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acknowledgement {
    /// The end of the WAL written here.
    pub write: Lsn,
    /// The end of the WAL that is durable in the chosen class.
    pub flush: FlushedLsn,
}

/// The shared core.
#[derive(Debug)]
pub struct Progress {
    core: Mutex<Core>,
    acknowledgement: watch::Sender<Acknowledgement>,
}

impl DurablePositions for Progress {
    fn durable(&self, path: &[PathPart]) -> DurableWal {
        self.lock().positions().durable(path)
    }
}

impl Progress {
    /// Creates it without any position.
    #[must_use]
    pub fn new(acknowledge: Acknowledge) -> Self {
        let (acknowledgement, _) = watch::channel(Acknowledgement {
            write: Lsn::ZERO,
            flush: FlushedLsn::NONE,
        });
        Self {
            core: Mutex::new(Core::new(acknowledge)),
            acknowledgement,
        }
    }

    /// Reports an event to the core and publishes the positions that may now be reported. Returns
    /// the actions to perform.
    pub fn on(&self, event: Event) -> Vec<Action> {
        let mut core = self.lock();
        let actions = core.on(event);
        let report = core.report();
        #[expect(
            clippy::disallowed_methods,
            reason = "the core counts only WAL that the spool or the repository has made durable"
        )]
        let flush = FlushedLsn::proved(report.flush);
        let now = Acknowledgement {
            write: report.write,
            flush,
        };
        // Sent under the lock, so that an older report cannot overtake a newer one.
        self.acknowledgement
            .send_if_modified(|last| std::mem::replace(last, now) != now);
        actions
    }

    /// Returns a copy of the positions.
    #[must_use]
    pub fn positions(&self) -> Positions {
        self.lock().positions().clone()
    }

    /// Returns the number of complete segments that are not sealed yet.
    #[must_use]
    pub fn unsealed(&self) -> usize {
        self.lock().unsealed()
    }

    /// Returns true if no tail is in flight.
    #[must_use]
    pub fn is_tail_free(&self) -> bool {
        self.lock().is_tail_free()
    }

    /// Returns the number of bytes written here that the repository does not hold.
    #[must_use]
    pub fn waiting_bytes(&self) -> u64 {
        self.lock().positions().waiting_bytes()
    }

    /// Subscribes to the positions that may be reported to PostgreSQL.
    #[must_use]
    pub fn acknowledgements(&self) -> watch::Receiver<Acknowledgement> {
        self.acknowledgement.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, Core> {
        // The core is consistent between any two events, so a panic elsewhere does not corrupt it.
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
