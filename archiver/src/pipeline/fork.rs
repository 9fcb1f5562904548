//! Archived WAL after the LSN at which the server left its branch: commits that a failover lost.
//!
//! The losses are computed at every start of a stream, from the archived WAL and the server's path,
//! so that a crash loses none. The repository's record of a fork is not read again. Invariant: the
//! stream waits for none of this. A record that cannot be written now is written later, when the
//! repository is back.

use std::sync::Arc;

use wal_format::{Branch, FailoverLoss, Lsn, PgTimestamp};

use super::{Pipeline, archive::Archive, losses::Orphan};
use crate::{
    blocking::blocking,
    core::start::{Held, ServerBranch},
    error::Result,
};

/// The maximum number of lost commits of one failover that are logged. Further ones are only
/// counted.
const LOST_COMMITS_LOGGED_MAX: usize = 100;

/// Returns the archived WAL after each fork of the server's path, oldest first.
pub(crate) fn orphans(path: &[ServerBranch], held: &[Held]) -> Vec<Orphan> {
    let forks = path.iter().zip(path.iter().skip(1));
    forks
        .filter_map(|(on, next)| {
            let held = held.iter().find(|held| held.branch == on.branch)?;
            (held.end_lsn > on.switch_lsn).then_some(Orphan {
                branch: on.branch,
                successor: next.branch,
                from: on.switch_lsn,
                to: held.end_lsn,
            })
        })
        .collect()
}

/// Returns the archived WAL of branches that are not on the server's path. The server had it until
/// it was restored to a moment before their fork and promoted to the last branch of the path.
/// `fork` returns the LSN at which a branch begins. What `known` losses contain is left out.
fn abandoned(
    path: &[ServerBranch],
    held: &[Held],
    fork: impl Fn(Branch) -> Result<Option<Lsn>>,
    known: &[FailoverLoss],
) -> Result<Vec<Orphan>> {
    let Some(last) = path.last() else {
        return Ok(Vec::new());
    };
    let mut orphans = Vec::new();
    for held in held {
        if path.iter().any(|on| on.branch == held.branch) {
            continue;
        }
        let Some(from) = fork(held.branch)? else {
            continue;
        };
        let known = known.iter().filter(|loss| loss.branch == held.branch);
        let to = known
            .map(|loss| loss.switch_lsn)
            .fold(held.end_lsn, Lsn::min);
        if to > from {
            orphans.push(Orphan {
                branch: held.branch,
                successor: last.branch,
                from,
                to,
            });
        }
    }
    Ok(orphans)
}

impl Archive {
    /// Examines new losses, logs them, and records them in the repository. Losses for which this
    /// fails are tried again the next time.
    ///
    /// # Errors
    /// [`crate::error::Error::Repository`], [`crate::error::Error::Io`].
    pub(crate) fn record_losses(&self) -> Result<()> {
        if self.is_away() {
            // Only the repository has all of that WAL, and shows whether the loss was recorded.
            return Ok(());
        }
        let losses = self.losses();
        let Ok(_alone) = losses.working.try_lock() else {
            return Ok(());
        };
        let found = losses.lock().found.clone();
        for orphan in found {
            let commits = self.commits(orphan.branch, orphan.from, orphan.to)?;
            let Some(commits) = commits else {
                tracing::debug!(branch = %orphan.branch, from = %orphan.from, "what a failover lost cannot be read now");
                continue;
            };
            let cluster = self.settings().name.as_str();
            tracing::error!(
                cluster,
                branch = %orphan.branch,
                from = %orphan.from,
                to = %orphan.to,
                commits = commits.len(),
                "the new primary never had this WAL: its transactions were lost by the failover. It is kept in the repository"
            );
            for commit in commits.iter().take(LOST_COMMITS_LOGGED_MAX) {
                tracing::error!(cluster, xid = commit.xid, time = %commit.time, lsn = %commit.lsn, "lost by the failover");
            }
            let loss = FailoverLoss::new(
                (orphan.branch, orphan.successor),
                (orphan.from, orphan.to),
                PgTimestamp::from_jiff(jiff::Timestamp::now()),
                commits,
            );
            let mut known = losses.lock();
            known.found.retain(|found| *found != orphan);
            known.unrecorded.push(loss);
        }
        let system = self.identity().system_identifier;
        let unrecorded = losses.lock().unrecorded.clone();
        if !unrecorded.is_empty() {
            self.check_before_put()?;
        }
        for loss in unrecorded {
            self.repository().put_failover_loss(system, &loss)?;
            let mut known = losses.lock();
            known.unrecorded.retain(|one| *one != loss);
            known.recorded.push(loss);
        }
        Ok(())
    }
}

/// Notes archived WAL after the forks of the server's path, and starts to record it without
/// waiting.
///
/// # Errors
/// [`crate::error::Error::Io`], [`crate::error::Error::Repository`] while the archive is read.
pub(super) async fn note(pipeline: &Pipeline, path: &[ServerBranch]) -> Result<()> {
    let held = pipeline.held().await?;
    let mut orphans = orphans(path, &held);
    let archive = Arc::clone(pipeline.archive());
    if archive.losses().knows_all(&orphans) {
        return Ok(());
    }
    // The others are recorded first: once those of the path are, nothing is searched for again.
    let (reader, path) = (Arc::clone(&archive), path.to_vec());
    let others = blocking(move || {
        let fork = |branch| {
            let history = reader.history(branch)?;
            Ok(history
                .and_then(|history| history.parent())
                .map(|parent| parent.to))
        };
        abandoned(&path, &held, fork, &reader.losses().all())
    });
    orphans.splice(0..0, others.await?);
    archive.losses().found(orphans);
    let recorded = blocking(move || archive.record_losses());
    tokio::spawn(async move {
        if let Err(error) = recorded.await {
            tracing::warn!(%error, "what the failover lost is not recorded yet; it is tried again");
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server_branch(text: &str, switch: Lsn) -> ServerBranch {
        ServerBranch {
            branch: text.parse().expect("a branch"),
            history: None,
            switch_lsn: switch,
        }
    }

    #[test]
    fn what_is_held_beyond_any_fork_of_the_path_is_found() {
        let path = [
            server_branch("00000001", Lsn(40)),
            server_branch("00000002-0a0b0c0d", Lsn(60)),
            server_branch("00000005-01010101", Lsn::MAX),
        ];
        let check = |held: &[(usize, u64)], expected: &[(usize, u64, u64)]| {
            let held: Vec<Held> = held
                .iter()
                .map(|(at, end)| Held {
                    branch: path[*at].branch,
                    end_lsn: Lsn(*end),
                })
                .collect();
            let expected: Vec<Orphan> = expected
                .iter()
                .map(|(at, from, to)| Orphan {
                    branch: path[*at].branch,
                    successor: path[at + 1].branch,
                    from: Lsn(*from),
                    to: Lsn(*to),
                })
                .collect();
            assert_eq!(orphans(&path, &held), expected);
        };
        check(&[], &[]);
        check(&[(0, 40), (1, 60), (2, 99)], &[]);
        check(&[(0, 44)], &[(0, 40, 44)]);
        // The next timeline may already be archived: the archiver may have died before it recorded
        // the loss.
        check(&[(0, 44), (1, 61), (2, 99)], &[(0, 40, 44), (1, 60, 61)]);
    }

    #[test]
    fn branches_that_a_restore_left_are_found_once() {
        let branch = |text: &str| text.parse::<Branch>().expect("a branch");
        let (left, successor) = (branch("00000002-0a0b0c0d"), branch("00000003-01010101"));
        let path = [
            server_branch("00000001", Lsn(40)),
            server_branch("00000003-01010101", Lsn::MAX),
        ];
        let held = [("00000001", 60), ("00000002-0a0b0c0d", 90)].map(|(text, end)| Held {
            branch: branch(text),
            end_lsn: Lsn(end),
        });
        let loss = |successor: &str, from, to| {
            FailoverLoss::new(
                (left, branch(successor)),
                (Lsn(from), Lsn(to)),
                PgTimestamp(0),
                Vec::new(),
            )
        };
        let fork = |_| Ok(Some(Lsn(50)));
        let check = |known: &[FailoverLoss], expected: &[(u64, u64)]| {
            let found = abandoned(&path, &held, fork, known).expect("nothing is read");
            let expected: Vec<Orphan> = expected
                .iter()
                .map(|(from, to)| Orphan {
                    branch: left,
                    successor,
                    from: Lsn(*from),
                    to: Lsn(*to),
                })
                .collect();
            assert_eq!(found, expected);
        };
        check(&[], &[(50, 90)]);
        check(&[loss("00000004-02020202", 70, 90)], &[(50, 70)]);
        check(&[loss("00000003-01010101", 50, 90)], &[]);
    }
}
