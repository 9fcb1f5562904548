//! [`WalRange`]: an entry of the catalog for one stored range of WAL.

use serde::{Deserialize, Serialize};
use wal_format::{
    Branch, Lsn, ObjectKey, PgTimestamp, SealedFooter, SealedHeader, SegmentName, SegmentNo,
    SegmentSummary, WalEvent,
};

use crate::ClusterIdentity;

/// The kind of a stored range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WalRangeKind {
    /// A sealed segment.
    Sealed,
    /// A part of a segment that was open when it was stored.
    Tail,
}

/// One stored range of WAL, without its bytes and without its transactions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalRange {
    /// The timeline.
    pub branch: Branch,
    /// The segment that contains the range.
    pub segment: SegmentNo,
    /// The first byte of the range.
    pub start_lsn: Lsn,
    /// The first byte after the range.
    pub end_lsn: Lsn,
    /// Whole segment or tail.
    pub kind: WalRangeKind,
    /// The object's length.
    pub stored_bytes: u64,
    /// The number of records that end in it.
    pub record_count: u64,
    /// The number of records in it that end a transaction.
    pub transaction_count: u64,
    /// The number of transactions that are prepared in it. `None` in a catalog of a version that
    /// did not count them.
    #[serde(default)]
    pub prepare_count: Option<u64>,
    /// The number of tablespaces that are created or dropped in it. `None` if the version that
    /// wrote its object did not record them, and in a catalog of such a version.
    #[serde(default)]
    pub tablespace_count: Option<u64>,
    /// The number of records in it that announce `wal_level = minimal`. `None` in a catalog of a
    /// version that did not count them.
    #[serde(default)]
    pub minimal_count: Option<u64>,
    /// The start of the first record that ends in it.
    pub first_record_lsn: Option<Lsn>,
    /// The start of the last record that ends in it.
    pub last_record_lsn: Option<Lsn>,
    /// The end of the last record that ends in it.
    pub last_record_end_lsn: Option<Lsn>,
    /// The start of a record that is incomplete at the end of the range.
    pub open_record_lsn: Option<Lsn>,
    /// The earliest `xact_time` in it.
    pub min_time: Option<PgTimestamp>,
    /// The latest `xact_time` in it.
    pub max_time: Option<PgTimestamp>,
    /// The time, by the server's clock, at which all WAL that the server had flushed was before
    /// `end_lsn`.
    pub proven: Option<PgTimestamp>,
}

impl WalRange {
    /// Creates the entry from the header and the summary of an object.
    #[must_use]
    pub fn of_summary(
        header: &SealedHeader,
        kind: WalRangeKind,
        stored_bytes: u64,
        summary: &SegmentSummary,
        proven: Option<PgTimestamp>,
    ) -> Self {
        let times = summary.time_range();
        let is_prepare = |(_, event): &&(Lsn, WalEvent)| matches!(event, WalEvent::Prepare { .. });
        let prepare_count = summary.events.iter().filter(is_prepare).count() as u64;
        let is_tablespace = |(_, event): &&(Lsn, WalEvent)| {
            matches!(
                event,
                WalEvent::TablespaceCreate { .. } | WalEvent::TablespaceDrop { .. }
            )
        };
        let tablespace_count = summary.events.iter().filter(is_tablespace).count() as u64;
        let minimal = summary.events.iter();
        let minimal_count = minimal
            .filter(|(_, event)| event.begins_minimal_wal())
            .count() as u64;
        Self {
            branch: header.branch,
            segment: header.segment(),
            start_lsn: header.start_lsn,
            end_lsn: header.end_lsn,
            kind,
            stored_bytes,
            record_count: summary.record_count,
            transaction_count: summary.transactions.len() as u64,
            prepare_count: Some(prepare_count),
            tablespace_count: Some(tablespace_count),
            minimal_count: Some(minimal_count),
            first_record_lsn: summary.first_record_lsn,
            last_record_lsn: summary.last_record_lsn,
            last_record_end_lsn: summary.last_record_end_lsn,
            open_record_lsn: summary.open_record_lsn,
            min_time: times.map(|(min, _)| min),
            max_time: times.map(|(_, max)| max),
            proven,
        }
    }

    /// As [`WalRange::of_summary`], from the footer of an object, which may have an earlier
    /// version.
    #[must_use]
    pub fn of_footer(footer: &SealedFooter, kind: WalRangeKind, stored_bytes: u64) -> Self {
        let (header, summary) = (footer.header(), footer.summary());
        let mut range = Self::of_summary(header, kind, stored_bytes, summary, footer.proven());
        if !footer.records_tablespaces() {
            range.tablespace_count = None;
        }
        range
    }

    /// Returns the object's key.
    #[must_use]
    pub fn key(&self, identity: &ClusterIdentity) -> ObjectKey {
        let system = identity.system_identifier;
        let size = identity.wal_segment_size;
        let name = SegmentName::new(self.branch.timeline, self.segment, size);
        match self.kind {
            WalRangeKind::Sealed => ObjectKey::Segment(system, self.branch, name),
            WalRangeKind::Tail => {
                ObjectKey::Tail(system, self.branch, name, self.start_lsn, self.end_lsn)
            }
        }
    }
}
