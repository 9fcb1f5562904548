//! The timelines that lead to the server's current one ([`ServerPath`]).

use bytes::Bytes;
use repository::PathPart;
use wal_format::{Branch, TimelineHistory};

/// The timelines that lead to the server's current one, according to its history files.
#[derive(Clone, Debug, Default)]
pub struct ServerPath {
    /// The timelines, oldest first.
    pub parts: Vec<PathPart>,
    /// The history files of the timelines.
    pub histories: Vec<(Branch, Option<TimelineHistory>, Bytes)>,
}

impl ServerPath {
    /// Creates the path from the server's branches and their history files, oldest first. Timeline
    /// 1 has no file.
    pub fn of(path: impl IntoIterator<Item = (Branch, Option<Bytes>)>) -> Self {
        let mut known = Self::default();
        for (branch, history) in path {
            known.add(branch, history);
        }
        known
    }

    /// Returns the path after the server continued on `next`. Unchanged if `next` was already on
    /// it.
    pub fn extended(&self, next: Branch, history: Option<Bytes>) -> Self {
        let mut known = self.clone();
        if self.parts.iter().all(|part| part.branch != next) {
            known.add(next, history);
        }
        known
    }

    /// The server's current timeline. `None` for an empty path.
    pub fn current(&self) -> Option<Branch> {
        self.parts.last().map(|part| part.branch)
    }

    fn add(&mut self, next: Branch, history: Option<Bytes>) {
        let content = history.unwrap_or_default();
        let history = TimelineHistory::parse(next.timeline, &content).ok();
        self.histories.push((next, history, content));
        let path = repository::timeline_path(&self.histories, next);
        self.parts = path.unwrap_or_default();
    }
}
