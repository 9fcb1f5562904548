//! [`timeline_path`]: the timelines that lead to one, oldest first, from the history files that are archived.

use serde::{Deserialize, Serialize};
use wal_format::{Branch, Lsn, TimelineHistory};

/// A timeline on a path: `[from, to)` of the WAL is replayed from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathPart {
    /// The timeline.
    pub branch: Branch,
    /// Where the path enters it.
    pub from: Lsn,
    /// Where the path leaves it; the greatest LSN for the last.
    pub to: Lsn,
}

/// The path to `wanted`; `None` when it is not among `branches`, each of which comes with the content of its history file.
#[must_use]
pub fn timeline_path<C: AsRef<[u8]>>(
    branches: &[(Branch, Option<TimelineHistory>, C)],
    wanted: Branch,
) -> Option<Vec<PathPart>> {
    let (_, history, content) = branches.iter().find(|(branch, ..)| *branch == wanted)?;
    let mut path = Vec::new();
    let mut from = Lsn::ZERO;
    for ancestor in history.iter().flat_map(|history| &history.ancestors) {
        // A child's history file begins with its parent's, byte for byte: that tells two timelines of one number apart.
        let branch = branches
            .iter()
            .find(|(branch, _, parent)| {
                branch.timeline == ancestor.timeline
                    && content.as_ref().starts_with(parent.as_ref())
            })
            .map_or_else(
                || Branch::without_history(ancestor.timeline),
                |(branch, ..)| *branch,
            );
        path.push(PathPart {
            branch,
            from,
            to: ancestor.switch_lsn,
        });
        from = ancestor.switch_lsn;
    }
    path.push(PathPart {
        branch: wanted,
        from,
        to: Lsn::MAX,
    });
    Some(path)
}
