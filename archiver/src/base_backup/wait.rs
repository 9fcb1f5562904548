//! Waits until the WAL that makes a backup consistent is in the repository.

use std::time::{Duration, Instant};

use repository::{ClusterIdentity, Repository};
use wal_format::{Branch, Lsn, ObjectKey, SegmentName};

use super::{BaseBackupError, WAL_PATIENCE, blocking};
use crate::error::{Error, Result};

const POLL: Duration = Duration::from_millis(300);

/// Returns when every byte of `[start_lsn, stop_lsn)` is stored.
pub(super) async fn for_wal(
    repository: &Repository,
    identity: &ClusterIdentity,
    branch: Branch,
    start_lsn: Lsn,
    stop_lsn: Lsn,
) -> Result<()> {
    let began = Instant::now();
    loop {
        let (repository, identity) = (repository.clone(), identity.clone());
        let stored =
            blocking(move || is_stored(&repository, &identity, branch, start_lsn, stop_lsn))
                .await?;
        if stored {
            return Ok(());
        }
        if began.elapsed() > WAL_PATIENCE {
            let seconds = WAL_PATIENCE.as_secs();
            return Err(Error::BaseBackup(BaseBackupError::WalMissing {
                stop_lsn,
                seconds,
            }));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Whether sealed segments and tails cover the range.
fn is_stored(
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
