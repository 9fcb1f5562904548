//! The timelines that lead to the server's current one ([`ServerPath`]).

use bytes::Bytes;
use repository::PathPart;
use wal_format::{Branch, TimelineHistory};

use crate::pipeline::start::ServerBranch;

/// The timelines that lead to the server's current one, according to its history files.
#[derive(Clone, Debug, Default)]
pub(crate) struct ServerPath {
    /// The timelines, oldest first.
    pub(crate) parts: Vec<PathPart>,
    /// The history files of the timelines.
    pub(crate) histories: Vec<(Branch, Option<TimelineHistory>, Bytes)>,
}

impl ServerPath {
    /// Creates the path from the server's branches, oldest first.
    pub(crate) fn of(path: &[ServerBranch]) -> Self {
        let mut known = Self::default();
        for branch in path {
            known.add(branch);
        }
        known
    }

    /// Returns the path after the server continued on `next`. Unchanged if `next` was already on
    /// it.
    pub(crate) fn extended(&self, next: &ServerBranch) -> Self {
        let mut known = self.clone();
        if self.parts.iter().all(|part| part.branch != next.branch) {
            known.add(next);
        }
        known
    }

    /// The server's current timeline. `None` for an empty path.
    pub(crate) fn current(&self) -> Option<Branch> {
        self.parts.last().map(|part| part.branch)
    }

    fn add(&mut self, next: &ServerBranch) {
        let content = next.history.clone().unwrap_or_default();
        let history = TimelineHistory::parse(next.branch.timeline, &content).ok();
        self.histories.push((next.branch, history, content));
        let path = repository::timeline_path(&self.histories, next.branch);
        self.parts = path.unwrap_or_default();
    }
}
