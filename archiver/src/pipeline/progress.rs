//! [`Progress`]: the positions, shared between the stages, and what may be told to PostgreSQL, pushed to who tells it.
//!
//! Invariant: a [`FlushedLsn`] is made here and nowhere else, from what the spool's fsync or the repository's verified
//! put has reported.

use std::sync::{Mutex, MutexGuard, PoisonError};

use repository::config::Acknowledge;
use tokio::sync::watch;
use wal_format::Lsn;

use super::positions::Positions;
use crate::flushed_lsn::FlushedLsn;

/// What a status update says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acknowledgement {
    /// Written here.
    pub write: Lsn,
    /// Durable in the chosen class.
    pub flush: FlushedLsn,
}

/// Shared positions.
#[derive(Debug)]
pub struct Progress {
    positions: Mutex<Positions>,
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
            positions: Mutex::new(Positions::new(acknowledge)),
            acknowledgement,
        }
    }

    /// Tells the positions what happened, and everyone who reports what may be said now.
    pub fn update(&self, happened: impl FnOnce(&mut Positions)) {
        let mut positions = self.lock();
        happened(&mut positions);
        let report = positions.report();
        let now = Acknowledgement {
            write: report.write,
            flush: FlushedLsn::proved(report.flush),
        };
        // Sent under the lock, so that an older report can not overtake a newer one.
        self.acknowledgement
            .send_if_modified(|last| std::mem::replace(last, now) != now);
    }

    /// A copy of the positions.
    #[must_use]
    pub fn positions(&self) -> Positions {
        self.lock().clone()
    }

    /// How much was written here that the repository does not hold.
    #[must_use]
    pub fn waiting_bytes(&self) -> u64 {
        let positions = self.lock();
        positions.written().bytes_since(positions.remote())
    }

    /// Follows what may be told to PostgreSQL.
    #[must_use]
    pub fn acknowledgements(&self) -> watch::Receiver<Acknowledgement> {
        self.acknowledgement.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, Positions> {
        // The positions are whole between any two statements, so a panic elsewhere does not spoil them.
        self.positions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
