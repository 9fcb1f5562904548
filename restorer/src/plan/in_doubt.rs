//! The prepared transactions that are in doubt at the stop: PREPARE TRANSACTION is replayed, but no
//! COMMIT PREPARED or ROLLBACK PREPARED.
//!
//! A transaction that was prepared before the backup is in the backup as a file of `pg_twophase`.
//! The file's name gives the transaction ID but not the identifier, so the identifier is searched
//! in the WAL before the backup, if that is archived.

use std::collections::BTreeMap;

use repository::WalRange;
use serde::{Deserialize, Serialize};
use wal_format::{BackupInfo, Lsn, PgTimestamp, SegmentSummary, TransactionEndKind, WalEvent};

use super::{Coverage, Stop};
use crate::{Result, inventory::Inventory};

/// A prepared transaction in doubt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreparedTransaction {
    /// The transaction ID.
    pub xid: u32,
    /// The identifier that the client chose; `None` when the WAL of its PREPARE is not archived.
    pub gid: Option<String>,
    /// The time when it was prepared; `None` when that WAL is not archived.
    pub time: Option<PgTimestamp>,
}

impl PreparedTransaction {
    /// Returns its identifier and transaction ID for people.
    pub(crate) fn named(&self) -> String {
        let gid = self.gid.as_ref().map_or_else(
            || "a name that lies before the archive".to_owned(),
            |gid| format!("'{gid}'"),
        );
        format!("{gid} (transaction {})", self.xid)
    }
}

pub(crate) fn in_doubt(
    inventory: &dyn Inventory,
    coverage: &Coverage,
    backup: &BackupInfo,
    stop: Stop,
) -> Result<Vec<PreparedTransaction>> {
    let replayed = |lsn: Lsn| match stop {
        Stop::Before { lsn: stop } => lsn < stop,
        Stop::After { lsn: stop } => lsn <= stop,
        Stop::Consistent => lsn < backup.stop_lsn,
    };
    let mut open: BTreeMap<u32, PreparedTransaction> = BTreeMap::new();
    for xid in inventory.prepared_in(backup)? {
        let unnamed = PreparedTransaction {
            xid,
            gid: None,
            time: None,
        };
        open.insert(xid, unnamed);
    }
    for range in &coverage.ranges {
        if !range.first_record_lsn.is_some_and(replayed)
            || (range.prepare_count == Some(0) && open.is_empty())
        {
            continue;
        }
        let on_path = |lsn: Lsn| coverage.holds(range.branch, lsn) && replayed(lsn);
        let summary = inventory.summary(range)?;
        for (_, prepared) in prepares(&summary, on_path) {
            open.insert(prepared.xid, prepared);
        }
        for end in summary.transactions.iter().filter(|end| on_path(end.lsn)) {
            let ended = [
                TransactionEndKind::CommitPrepared,
                TransactionEndKind::AbortPrepared,
            ];
            if ended.contains(&end.kind) {
                open.remove(&end.xid);
            }
        }
    }
    name_older(inventory, coverage, &mut open)?;
    Ok(open.into_values().collect())
}

fn prepares(
    summary: &SegmentSummary,
    counts: impl Fn(Lsn) -> bool,
) -> impl DoubleEndedIterator<Item = (Lsn, PreparedTransaction)> {
    summary.events.iter().filter_map(move |(lsn, event)| {
        let WalEvent::Prepare { xid, time, gid } = event else {
            return None;
        };
        let prepared = PreparedTransaction {
            xid: *xid,
            gid: Some(gid.clone()),
            time: Some(*time),
        };
        counts(*lsn).then_some((*lsn, prepared))
    })
}

/// Searches the WAL before the backup, newest first, for the identifiers of the transactions that
/// the backup contains.
fn name_older(
    inventory: &dyn Inventory,
    coverage: &Coverage,
    open: &mut BTreeMap<u32, PreparedTransaction>,
) -> Result<()> {
    let unnamed = |open: &BTreeMap<u32, PreparedTransaction>| {
        open.values().any(|prepared| prepared.gid.is_none())
    };
    for part in coverage.path.iter().rev() {
        let to = part.to.min(coverage.start_lsn);
        if part.from >= to {
            continue;
        }
        let ranges: Vec<WalRange> = inventory.ranges(part.branch, part.from, to)?;
        for range in ranges
            .iter()
            .rev()
            .filter(|range| range.prepare_count != Some(0))
        {
            if !unnamed(open) {
                return Ok(());
            }
            let summary = inventory.summary(range)?;
            for (_, prepared) in prepares(&summary, |lsn| lsn < to).rev() {
                if let Some(found) = open.get_mut(&prepared.xid)
                    && found.gid.is_none()
                {
                    *found = prepared;
                }
            }
        }
    }
    Ok(())
}
