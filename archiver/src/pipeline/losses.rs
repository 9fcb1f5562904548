//! [`Losses`]: the WAL that failovers lost, as far as this archiver knows it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use wal_format::{Branch, FailoverLoss, Lsn};

/// Archived WAL that the server never had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Orphan {
    /// The branch of the WAL.
    pub(crate) branch: Branch,
    /// The branch on which the server continued.
    pub(crate) successor: Branch,
    /// The LSN at which the server's history left the branch.
    pub(crate) from: Lsn,
    /// The end of the archived WAL.
    pub(crate) to: Lsn,
}

/// The failover losses known to this archiver.
#[derive(Debug, Default)]
pub(crate) struct Losses {
    known: Mutex<Known>,
    /// Locked while losses are examined and recorded.
    pub(super) working: Mutex<()>,
}

#[derive(Debug, Default)]
pub(super) struct Known {
    /// Found, but not examined yet.
    pub(super) found: Vec<Orphan>,
    /// Examined, but not stored in the repository yet.
    pub(super) unrecorded: Vec<FailoverLoss>,
    /// Stored in the repository.
    pub(super) recorded: Vec<FailoverLoss>,
}

impl Known {
    pub(super) fn has(&self, orphan: &Orphan) -> bool {
        let mut losses = self.recorded.iter().chain(&self.unrecorded);
        losses.any(|loss| (loss.branch, loss.successor) == (orphan.branch, orphan.successor))
            || self.found.contains(orphan)
    }
}

impl Losses {
    /// Creates the list from the losses in the repository.
    pub(super) fn of(recorded: Vec<FailoverLoss>) -> Self {
        Self {
            known: Mutex::new(Known {
                recorded,
                ..Known::default()
            }),
            working: Mutex::default(),
        }
    }

    /// Returns all losses that were examined.
    pub(crate) fn all(&self) -> Vec<FailoverLoss> {
        let known = self.lock();
        known
            .recorded
            .iter()
            .chain(&known.unrecorded)
            .cloned()
            .collect()
    }

    pub(super) fn knows_all(&self, orphans: &[Orphan]) -> bool {
        let known = self.lock();
        orphans.iter().all(|orphan| known.has(orphan))
    }

    pub(super) fn found(&self, orphans: Vec<Orphan>) {
        let mut known = self.lock();
        for orphan in orphans {
            if !known.has(&orphan) {
                tracing::warn!(
                    branch = %orphan.branch, from = %orphan.from, to = %orphan.to,
                    "the archive holds WAL of the old timeline after the point where the promoted server left it; it \
                     is kept and searched for commits"
                );
                known.found.push(orphan);
            }
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
