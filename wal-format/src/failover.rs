//! [`FailoverLoss`]: `failover/….json` lists the commits that a failover lost. The archive has WAL
//! of a branch beyond the fork, which the promoted server never had.
//!
//! Written once, when the fork is first seen. The WAL itself stays in the repository and can be
//! restored on its own branch.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Branch, Lsn, ObjectKey, PgTimestamp, SystemIdentifier, TransactionEnd};

/// The version of the object that this build writes, and the newest that it reads.
pub const FAILOVER_LOSS_FORMAT_VERSION: u32 = 1;

/// The number of commits that are listed individually. Further commits are only counted, and their
/// times are included in `first_commit` and `last_commit`.
pub const LOST_COMMITS_LISTED_MAX: usize = 1000;

/// The commits lost by a failover.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailoverLoss {
    /// [`FAILOVER_LOSS_FORMAT_VERSION`].
    pub format_version: u32,
    /// The branch that was abandoned.
    pub branch: Branch,
    /// The branch that continued.
    pub successor: Branch,
    /// The fork: the LSN of the first byte of `branch` that the successor does not have.
    pub switch_lsn: Lsn,
    /// The end of the archived WAL of `branch`.
    pub end_lsn: Lsn,
    /// The time when the archiver detected the fork.
    pub found: PgTimestamp,
    /// The number of transactions that committed between the two LSNs.
    pub commits: u64,
    /// The earliest of their commit times.
    pub first_commit: Option<PgTimestamp>,
    /// The latest of their commit times.
    pub last_commit: Option<PgTimestamp>,
    /// The commits in LSN order, the first [`LOST_COMMITS_LISTED_MAX`] of them.
    pub listed: Vec<TransactionEnd>,
}

impl FailoverLoss {
    /// Creates the record of what `branch` lost in `[switch_lsn, end_lsn)`. `commits` are the
    /// transactions that committed there, in LSN order.
    #[must_use]
    pub fn new(
        (branch, successor): (Branch, Branch),
        (switch_lsn, end_lsn): (Lsn, Lsn),
        found: PgTimestamp,
        mut commits: Vec<TransactionEnd>,
    ) -> Self {
        let times = || commits.iter().map(|commit| commit.time);
        let (first_commit, last_commit) = (times().min(), times().max());
        let count = commits.len() as u64;
        commits.truncate(LOST_COMMITS_LISTED_MAX);
        Self {
            format_version: FAILOVER_LOSS_FORMAT_VERSION,
            branch,
            successor,
            switch_lsn,
            end_lsn,
            found,
            commits: count,
            first_commit,
            last_commit,
            listed: commits,
        }
    }

    /// Returns the object key.
    #[must_use]
    pub fn key(&self, system: SystemIdentifier) -> ObjectKey {
        ObjectKey::FailoverLoss(system, self.branch, self.successor)
    }
}

/// A sentence for logs and reports.
impl fmt::Display for FailoverLoss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Two branches may have one number, so name them in full.
        let (from, to) = (self.branch, self.successor);
        write!(f, "timeline {to} went on at {}; ", self.switch_lsn)?;
        match self.commits {
            0 => write!(
                f,
                "no transaction had committed on timeline {from} beyond it"
            )?,
            1 => write!(f, "it lost 1 commit of timeline {from}")?,
            many => write!(f, "it lost {many} commits of timeline {from}")?,
        }
        if let (Some(first), Some(last)) = (self.first_commit, self.last_commit) {
            write!(f, ", {first} to {last}")?;
        }
        write!(f, ". That WAL is kept, up to {}", self.end_lsn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TransactionEndKind;

    #[test]
    fn thousands_are_counted_and_the_first_are_listed() {
        let many = LOST_COMMITS_LISTED_MAX + 5;
        let commits: Vec<TransactionEnd> = (0..many)
            .map(|at| TransactionEnd {
                lsn: Lsn(at as u64 * 8),
                xid: 700 + at as u32,
                // Commit times are not in LSN order.
                time: PgTimestamp(1_000_000 - at as i64),
                kind: TransactionEndKind::Commit,
            })
            .collect();
        let successor = "00000002-0a0b0c0d".parse().expect("a branch");
        let range = (Lsn(0), Lsn(1 << 20));
        let loss = FailoverLoss::new(
            (Branch::FIRST, successor),
            range,
            PgTimestamp(9),
            commits.clone(),
        );
        assert_eq!(loss.commits, many as u64);
        assert_eq!(loss.listed, commits[..LOST_COMMITS_LISTED_MAX]);
        assert_eq!(loss.last_commit, Some(PgTimestamp(1_000_000)));
        assert_eq!(
            loss.first_commit,
            Some(PgTimestamp(1_000_001 - many as i64)),
            "what is not listed counts too"
        );
        let json = serde_json::to_vec(&loss).expect("JSON");
        assert_eq!(
            serde_json::from_slice::<FailoverLoss>(&json).ok(),
            Some(loss)
        );
    }
}
