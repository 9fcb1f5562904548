//! [`timeline_path`]: the timelines that lead to a timeline, oldest first, from the archived
//! history files.

use serde::{Deserialize, Serialize};
use wal_format::{Branch, Lsn, TimelineHistory};

/// A timeline on a path: `[from, to)` of the WAL is replayed from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathPart {
    /// The timeline.
    pub branch: Branch,
    /// The first LSN that is replayed from it.
    pub from: Lsn,
    /// The first LSN that is no longer replayed from it. [`Lsn::MAX`] for the last timeline.
    pub to: Lsn,
}

/// Returns the path to `wanted`: contiguous, and without timelines of which nothing is replayed
/// ([`TimelineHistory::spans`]). `branches` contains each timeline with its history and the content
/// of its history file. `None` if `wanted` is not among them.
#[must_use]
pub fn timeline_path<C: AsRef<[u8]>>(
    branches: &[(Branch, Option<TimelineHistory>, C)],
    wanted: Branch,
) -> Option<Vec<PathPart>> {
    let (_, history, content) = branches.iter().find(|(branch, ..)| *branch == wanted)?;
    let Some(history) = history else {
        return Some(vec![PathPart {
            branch: wanted,
            from: Lsn::ZERO,
            to: Lsn::MAX,
        }]);
    };
    // A child's history file begins with its parent's, byte for byte. This distinguishes two
    // timelines with the same number.
    let is_ancestor = |parent: &C| content.as_ref().starts_with(parent.as_ref());
    let parts = history.spans().into_iter().map(|span| {
        let branch = if span.timeline == wanted.timeline {
            wanted
        } else {
            branches
                .iter()
                .find(|(branch, _, parent)| branch.timeline == span.timeline && is_ancestor(parent))
                .map_or_else(
                    || Branch::without_history(span.timeline),
                    |(branch, ..)| *branch,
                )
        };
        PathPart {
            branch,
            from: span.from,
            to: span.to,
        }
    });
    Some(parts.collect())
}

#[cfg(test)]
mod tests {
    use wal_format::TimelineId;

    use super::*;

    #[test]
    fn a_path_leaves_out_a_timeline_that_began_after_the_next_one() {
        let timeline = |number| TimelineId::new(number).expect("a timeline");
        let second = "1\t0/70000F8\tno recovery target specified\n";
        let third = format!("{second}\n2\t0/4000090\tbefore LSN 0/4000090\n");
        let fourth = format!("{third}\n3\t0/9000000\tno recovery target specified\n");
        let mut branches = vec![(Branch::FIRST, None, Vec::new())];
        for (number, content) in [(2, second), (3, &third), (4, &fourth)] {
            let content = content.as_bytes().to_vec();
            let history = TimelineHistory::parse(timeline(number), &content).expect("it parses");
            let branch = Branch::of_history(timeline(number), &content);
            branches.push((branch, Some(history), content));
        }
        let path = |index: usize| {
            let path = timeline_path(&branches, branches[index].0).expect("a path");
            let parts = path.into_iter().map(|part| {
                let index = branches
                    .iter()
                    .position(|(known, ..)| *known == part.branch);
                (index.expect("a known branch"), part.from.0, part.to.0)
            });
            parts.collect::<Vec<_>>()
        };
        let end = u64::MAX;
        assert_eq!(path(0), [(0, 0, end)]);
        assert_eq!(path(1), [(0, 0, 0x700_00F8), (1, 0x700_00F8, end)]);
        assert_eq!(path(2), [(0, 0, 0x400_0090), (2, 0x400_0090, end)]);
        assert_eq!(
            path(3),
            [
                (0, 0, 0x400_0090),
                (2, 0x400_0090, 0x900_0000),
                (3, 0x900_0000, end)
            ]
        );
    }
}
