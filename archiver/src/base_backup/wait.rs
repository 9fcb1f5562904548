//! Waits until the WAL that makes a backup consistent is in the repository.

use std::time::{Duration, Instant};

use repository::{ClusterIdentity, Repository};
use wal_format::{Branch, Lsn, ObjectKey, SegmentName};

use super::{Progress, WAL_PATIENCE, error::BaseBackupError};
use crate::{
    blocking::blocking,
    core::shutdown::Shutdown,
    error::{Error, Result},
};

const POLL: Duration = Duration::from_millis(300);
/// The time in which a running archiver stores the WAL of a backup. After it, the wait is reported
/// to the user.
const LATE_AFTER: Duration = Duration::from_secs(10);

/// Waits until every byte of `[start_lsn, stop_lsn)` is stored. Fails if one of them was declared
/// lost, or after [`WAL_PATIENCE`].
pub(super) async fn for_wal(
    repository: &Repository,
    identity: &ClusterIdentity,
    branch: Branch,
    start_lsn: Lsn,
    stop_lsn: Lsn,
    progress: &(dyn Fn(Progress) + Sync),
    stop: &mut Shutdown,
) -> Result<()> {
    let began = Instant::now();
    let mut is_late = false;
    loop {
        let (repository, identity) = (repository.clone(), identity.clone());
        let look = move || {
            if is_stored(&repository, &identity, branch, start_lsn, stop_lsn)? {
                return Ok(true);
            }
            for gap in repository.gaps(identity.system_identifier)? {
                if gap.branch == branch && gap.from_lsn < stop_lsn && start_lsn < gap.to_lsn {
                    return Err(Error::BaseBackup(BaseBackupError::WalLost {
                        from_lsn: gap.from_lsn,
                        to_lsn: gap.to_lsn,
                    }));
                }
            }
            Ok(false)
        };
        if blocking(look).await? {
            return Ok(());
        }
        if began.elapsed() > WAL_PATIENCE {
            let seconds = WAL_PATIENCE.as_secs();
            return Err(Error::BaseBackup(BaseBackupError::WalMissing {
                stop_lsn,
                seconds,
            }));
        }
        if !is_late && began.elapsed() > LATE_AFTER {
            is_late = true;
            progress(Progress::WalIsLate {
                stop_lsn,
                seconds_max: WAL_PATIENCE.as_secs(),
            });
        }
        if !stop.sleep(POLL).await {
            return Err(BaseBackupError::Interrupted.into());
        }
    }
}

/// Returns true if sealed segments and tails cover the range.
pub(super) fn is_stored(
    repository: &Repository,
    identity: &ClusterIdentity,
    branch: Branch,
    start_lsn: Lsn,
    stop_lsn: Lsn,
) -> Result<bool> {
    let size = identity.wal_segment_size;
    let system = identity.system_identifier;
    let mut at = start_lsn;
    while at < stop_lsn {
        let segment = size.segment_of(at);
        let name = SegmentName::new(branch.timeline, segment, size);
        if repository
            .head(&ObjectKey::Segment(system, branch, name))?
            .is_some()
        {
            at = segment.end_lsn(size);
            continue;
        }
        let mut tails = Vec::new();
        for (key, _) in repository.list(&format!("{system}/tail/{branch}/{name}/"))? {
            if let ObjectKey::Tail(_, _, _, start, end) = key {
                tails.push((start, end));
            }
        }
        tails.sort_unstable();
        let before = at;
        for (start, end) in tails {
            if start <= at {
                at = at.max(end);
            }
        }
        if at == before {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use wal_format::{DeclaredGap, PgTimestamp, PgVersion, SegmentSize, SystemIdentifier};

    use super::*;

    #[tokio::test]
    async fn wal_that_was_declared_lost_is_not_waited_for() {
        let folder = tempfile::tempdir().expect("a folder");
        let url = repository::config::RepositoryUrl::Folder(folder.path().to_owned());
        let cluster: wal_format::ClusterName = "main".parse().expect("a name");
        let repository = Repository::open(&url.into(), &cluster).expect("it opens");
        let system = SystemIdentifier(7);
        let identity = ClusterIdentity {
            format_version: 1,
            cluster,
            system_identifier: system,
            postgresql_major: PgVersion::try_from(17).expect("a version"),
            wal_segment_size: SegmentSize::new(1 << 20).expect("a size"),
            created: PgTimestamp(0),
        };
        let gap = DeclaredGap {
            branch: Branch::FIRST,
            from_lsn: Lsn(0xD6_0000),
            to_lsn: Lsn(0xF0_0000),
            declared: PgTimestamp(0),
            last_commit: None,
            reason: "removed".to_owned(),
        };
        repository.put_gap(system, &gap).expect("it is declared");
        let (start, stop) = (Lsn(0xE0_00D8), Lsn(0xF0_0028));
        let mut never = Shutdown::never();
        let waited = for_wal(
            &repository,
            &identity,
            Branch::FIRST,
            start,
            stop,
            &|_| {},
            &mut never,
        )
        .await;
        let error = waited.expect_err("it never comes").to_string();
        assert!(error.contains("0/D60000 to 0/F00000"), "{error}");
        // WAL after the loss may still arrive.
        let behind = for_wal(
            &repository,
            &identity,
            Branch::FIRST,
            gap.to_lsn,
            stop,
            &|_| {},
            &mut never,
        );
        let waits = tokio::time::timeout(POLL * 3, behind).await;
        assert!(waits.is_err(), "it is waited for");
    }
}
