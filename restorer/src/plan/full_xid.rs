//! Transactions by a number of 64 bits (`FullTransactionId`), whose upper half is the epoch.
//!
//! WAL contains the lower half only. The epoch of a transaction's end follows from the nearest
//! checkpoint, which contains the next transaction's whole number: transactions of one time are
//! less than 2^31 apart. A number without an epoch means the first transaction with this lower
//! half.

use std::collections::BTreeMap;

use wal_format::{Lsn, SegmentSummary, TransactionEnd, WalEvent};

/// Returns true if the number has an epoch, which a number in WAL does not have.
pub(crate) fn names_epoch(xid: u64) -> bool {
    xid > u64::from(u32::MAX)
}

/// Returns true if `end` has the lower half of `xid`.
pub(crate) fn may_be(end: &TransactionEnd, xid: u64) -> bool {
    u64::from(end.xid) == xid & u64::from(u32::MAX)
}

/// The next transaction's number at each checkpoint.
#[derive(Debug, Default)]
pub(crate) struct Epochs(BTreeMap<Lsn, u64>);

impl Epochs {
    /// Adds the checkpoints of a range for which `counts` is true.
    pub(crate) fn add(&mut self, summary: &SegmentSummary, counts: impl Fn(Lsn) -> bool) {
        let checkpoints = summary
            .events
            .iter()
            .filter_map(|(lsn, event)| match event {
                WalEvent::Checkpoint { next_xid, .. } if counts(*lsn) => Some((*lsn, *next_xid)),
                _ => None,
            });
        self.0.extend(checkpoints);
    }

    /// Returns true if `end` is the end of the transaction `xid`.
    pub(crate) fn is(&self, end: &TransactionEnd, xid: u64) -> bool {
        let before = self.0.range(..=end.lsn).next_back();
        let near = before.or_else(|| self.0.range(end.lsn..).next());
        near.is_some_and(|(_, next_xid)| full(end.xid, *next_xid) == xid)
    }
}

/// Returns the whole number of a transaction that ran when `next_xid` was the next one, or near
/// that time (`FullTransactionIdFromAllowableAt`).
fn full(xid: u32, next_xid: u64) -> u64 {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the lower half is compared"
    )]
    let distance = xid.wrapping_sub(next_xid as u32).cast_signed();
    next_xid.wrapping_add_signed(i64::from(distance))
}

#[cfg(test)]
mod tests {
    use super::full;

    #[test]
    fn the_epoch_is_that_of_the_nearest_transaction() {
        assert_eq!(full(738, 740), 738);
        assert_eq!(full(738, 3 << 32 | 740), 3 << 32 | 738);
        // Around the wraparound: the last of an epoch, seen from the next one, and the reverse.
        assert_eq!(full(u32::MAX, 4 << 32 | 3), 3 << 32 | 0xFFFF_FFFF);
        assert_eq!(full(3, 3 << 32 | 0xFFFF_FFFF), 4 << 32 | 3);
    }
}
