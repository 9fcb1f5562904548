//! The RPO estimators of both tiers on the primary's path of timelines ([`Tiers`]).

use std::time::Duration;

use repository::PathPart;
use wal_format::{Branch, Lsn, TimelineId};

use super::{Exposure, RpoEstimator};
use crate::durable::DurableWal;

/// An observation of the primary's flush LSN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Made by the stream of a branch.
    Streamed {
        /// The branch that is streamed.
        branch: Branch,
        /// The flush LSN, or the LSN at which the server left the branch.
        flush_lsn: Lsn,
    },
    /// Made by the SQL poll.
    Polled {
        /// The server's timeline. `None` if a standby does not show which timeline it receives.
        timeline: Option<TimelineId>,
        /// The server's flush LSN.
        flush_lsn: Lsn,
    },
}

/// The estimators of the local and the remote tier.
#[derive(Debug, Default)]
pub struct Tiers {
    local: RpoEstimator,
    remote: RpoEstimator,
    /// The timelines that lead to the server's current one, oldest first. Empty before the server
    /// was seen.
    path: Vec<PathPart>,
}

impl Tiers {
    /// Records the times at which an earlier run knew that everything was held.
    pub fn were_caught_up(&mut self, local: Option<Duration>, remote: Option<Duration>) {
        for (tier, when) in [(&mut self.local, local), (&mut self.remote, remote)] {
            if let Some(when) = when {
                tier.was_caught_up(when);
            }
        }
    }

    /// The server's path of timelines, oldest first.
    #[must_use]
    pub fn path(&self) -> &[PathPart] {
        &self.path
    }

    /// Records the server's path of timelines.
    pub fn follow(&mut self, path: &[PathPart]) {
        if self.path == path {
            return;
        }
        if let Some(fork) = fork(&self.path, path) {
            let end_of = |timeline| {
                let mut parts = path.iter();
                let part = parts.find(|part| part.branch.timeline == timeline);
                part.map(|part| part.to)
            };
            self.local.forked(fork, end_of);
            self.remote.forked(fork, end_of);
        }
        self.path = path.to_vec();
    }

    /// Records an observation of the primary. A server on an older timeline than the known one is
    /// not the primary and is ignored.
    pub fn see(&mut self, now: Duration, seen: Seen) {
        let Some(last) = self.path.last() else { return };
        let current = last.branch.timeline;
        match seen {
            Seen::Streamed { branch, flush_lsn } => {
                if let Some(part) = self.path.iter().find(|part| part.branch == branch) {
                    let flush_lsn = flush_lsn.min(part.to);
                    self.local.source_seen(now, flush_lsn);
                    self.remote.source_seen(now, flush_lsn);
                }
            }
            Seen::Polled {
                timeline,
                flush_lsn,
            } => match timeline {
                Some(timeline) if timeline < current => {}
                Some(timeline) if timeline > current => {
                    self.local.source_elsewhere(now, timeline, flush_lsn);
                    self.remote.source_elsewhere(now, timeline, flush_lsn);
                }
                _ => {
                    self.local.source_seen(now, flush_lsn);
                    self.remote.source_seen(now, flush_lsn);
                }
            },
        }
    }

    /// The primary's flush LSN as last seen.
    #[must_use]
    pub fn source_lsn(&self) -> Option<Lsn> {
        self.remote.source_lsn()
    }

    /// Returns the distances of the local and the remote tier from the primary. `durable` is the
    /// durable WAL on [`Tiers::path`].
    pub fn exposure(&mut self, now: Duration, durable: &DurableWal) -> (Exposure, Exposure) {
        let flushed = durable.flushed_on_path;
        if let Some(flushed) = flushed {
            // Called before `held`, so that the WAL counts as not stored until it is.
            self.remote.flushed_here(now, flushed);
        }
        let remote = durable.remote_on_path;
        for (tier, held) in [(&mut self.local, flushed), (&mut self.remote, remote)] {
            match held {
                Some(held) => tier.held(held),
                None => tier.nothing_held(),
            }
        }
        let (queued, orphaned) = (durable.queued_bytes, durable.orphaned_bytes);
        self.remote.waits(now, queued, orphaned);
        (self.local.exposure(now), self.remote.exposure(now))
    }
}

/// Returns the LSN at which `new` leaves `old`. `None` if it does not leave it.
fn fork(old: &[PathPart], new: &[PathPart]) -> Option<Lsn> {
    for (old, new) in old.iter().zip(new) {
        if old.branch != new.branch {
            return Some(old.from.min(new.from));
        }
        if old.to != new.to {
            return Some(old.to.min(new.to));
        }
    }
    None
}
