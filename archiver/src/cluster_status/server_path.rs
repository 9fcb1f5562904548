//! [`ServerPath`]: the timelines that lead to the one the server is on.

use bytes::Bytes;
use repository::PathPart;
use wal_format::{Branch, TimelineHistory};

use crate::pipeline::start::ServerBranch;

/// The timelines that lead to the server's present one, as its history files say.
#[derive(Clone, Debug, Default)]
pub(crate) struct ServerPath {
    /// The timelines, oldest first.
    pub(crate) parts: Vec<PathPart>,
    /// Their history files.
    pub(crate) histories: Vec<(Branch, Option<TimelineHistory>, Bytes)>,
}

impl ServerPath {
    /// From the server's path, oldest first.
    pub(crate) fn of(path: &[ServerBranch]) -> Self {
        let mut known = Self::default();
        for branch in path {
            known.add(branch);
        }
        known
    }

    /// The path after the server went on to `next`; the same where it was known before.
    pub(crate) fn extended(&self, next: &ServerBranch) -> Self {
        let mut known = self.clone();
        if self.parts.iter().all(|part| part.branch != next.branch) {
            known.add(next);
        }
        known
    }

    /// The timeline that the server is on.
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
