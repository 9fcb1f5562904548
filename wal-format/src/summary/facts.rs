//! The facts about a range of WAL, as types.

use serde::{Deserialize, Serialize};

use crate::{Lsn, PgTimestamp, TimelineId};

/// The facts about a range `[start_lsn, end_lsn)` of one branch's WAL that a restore needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SegmentSummary {
    /// The number of records that end in the range.
    pub record_count: u64,
    /// The start of the first record that ends in the range. It may be before the range.
    pub first_record_lsn: Option<Lsn>,
    /// The start of the last record that ends in the range, which is the next record's `xl_prev`.
    pub last_record_lsn: Option<Lsn>,
    /// The end of the last record that ends in the range, aligned to 8: the next record starts
    /// there, before any page header is skipped.
    pub last_record_end_lsn: Option<Lsn>,
    /// The start of a record that is not complete at the end of the range. It may be before the
    /// range.
    pub open_record_lsn: Option<Lsn>,
    /// Every commit and abort, in LSN order.
    pub transactions: Vec<TransactionEnd>,
    /// All other events that a restore needs, in LSN order.
    pub events: Vec<(Lsn, WalEvent)>,
}

impl SegmentSummary {
    /// Appends the summary of the range that follows this one.
    pub fn merge(&mut self, later: Self) {
        self.record_count = self.record_count.saturating_add(later.record_count);
        self.first_record_lsn = self.first_record_lsn.or(later.first_record_lsn);
        self.last_record_lsn = later.last_record_lsn.or(self.last_record_lsn);
        self.last_record_end_lsn = later.last_record_end_lsn.or(self.last_record_end_lsn);
        self.open_record_lsn = later.open_record_lsn;
        self.transactions.extend(later.transactions);
        self.events.extend(later.events);
    }

    /// The earliest and the latest `xact_time` in the range. `None` without a transaction's end.
    #[must_use]
    pub fn time_range(&self) -> Option<(PgTimestamp, PgTimestamp)> {
        let mut times = self.transactions.iter().map(|transaction| transaction.time);
        let first = times.next()?;
        Some(times.fold((first, first), |(min, max), time| {
            (min.min(time), max.max(time))
        }))
    }
}

/// A transaction's end. Only at these records does a recovery to a time or an xid stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransactionEnd {
    /// The start of the record. PostgreSQL logs this position when it stops before the record.
    pub lsn: Lsn,
    /// The transaction. For a prepared transaction this is the xid that was prepared, not the xid
    /// of the record that ended it.
    pub xid: u32,
    /// `xact_time`. It is taken before the record is inserted, so times are not in LSN order.
    pub time: PgTimestamp,
    /// The kind of end.
    pub kind: TransactionEndKind,
}

/// The kind of a transaction's end (`XLOG_XACT_*` in `xact.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TransactionEndKind {
    /// COMMIT.
    Commit,
    /// ABORT.
    Abort,
    /// COMMIT PREPARED.
    CommitPrepared,
    /// ROLLBACK PREPARED.
    AbortPrepared,
}

impl TransactionEndKind {
    /// Returns true if the transaction's work is kept.
    #[must_use]
    pub fn is_commit(self) -> bool {
        matches!(self, Self::Commit | Self::CommitPrepared)
    }
}

/// A relation's file (`RelFileLocator` in `relfilelocator.h`; `RelFileNode` before 16).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RelationFile {
    /// The tablespace's OID.
    pub tablespace: u32,
    /// The database's OID, 0 for a shared relation.
    pub database: u32,
    /// The relation's file number.
    pub relation: u32,
}

/// The kind of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckpointKind {
    /// `XLOG_CHECKPOINT_SHUTDOWN`.
    Shutdown,
    /// `XLOG_CHECKPOINT_ONLINE`.
    Online,
}

/// A record, other than a transaction's end, that a restore, a verification or `locate` needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum WalEvent {
    /// `XLOG_BACKUP_END`: the backup that started at `start_lsn` is consistent from here.
    BackupEnd {
        /// The backup's start.
        start_lsn: Lsn,
    },
    /// A checkpoint.
    Checkpoint {
        /// The kind of checkpoint.
        kind: CheckpointKind,
        /// The LSN at which redo would start.
        redo_lsn: Lsn,
        /// The timeline of the checkpoint.
        timeline: TimelineId,
        /// The time of the server's clock, truncated to seconds.
        time: PgTimestamp,
        /// The next transaction ID, with its epoch in the upper half (`FullTransactionId`).
        next_xid: u64,
    },
    /// Files of dropped or truncated relations, removed by the commit or abort at this LSN.
    DroppedRelations {
        /// The transaction.
        xid: u32,
        /// The files, up to [`DROPPED_RELATIONS_MAX`] of them.
        relations: Vec<RelationFile>,
    },
    /// `XLOG_END_OF_RECOVERY`: a new timeline begins.
    EndOfRecovery {
        /// The time of the server's clock.
        time: PgTimestamp,
        /// The new timeline.
        timeline: TimelineId,
        /// The timeline that the new timeline continues.
        previous_timeline: TimelineId,
    },
    /// `XLOG_FPW_CHANGE`.
    FullPageWrites {
        /// True if full page writes are on from here.
        enabled: bool,
    },
    /// `XLOG_OVERWRITE_CONTRECORD`: a crash left the record at `overwritten_lsn` incomplete
    /// forever.
    OverwrittenContrecord {
        /// The start of the record that never became complete.
        overwritten_lsn: Lsn,
    },
    /// PREPARE TRANSACTION. The outcome is unknown until the transaction's end.
    Prepare {
        /// The transaction.
        xid: u32,
        /// The time when it was prepared.
        time: PgTimestamp,
        /// The identifier that the client gave it.
        gid: String,
    },
    /// `pg_create_restore_point`.
    RestorePoint {
        /// The time when it was created.
        time: PgTimestamp,
        /// Its name.
        name: String,
    },
    /// `XLOG_SWITCH`: the rest of the segment is unused.
    Switch,
    /// `XLOG_TBLSPC_CREATE`: its replay creates the link `pg_tblspc/OID` to `location`.
    TablespaceCreate {
        /// The tablespace's OID.
        oid: u32,
        /// The directory. Empty for an in-place tablespace. Bytes that are not UTF-8 are replaced
        /// by U+FFFD.
        location: String,
    },
    /// `XLOG_TBLSPC_DROP`: its replay removes the directories of the tablespace and its link.
    TablespaceDrop {
        /// The tablespace's OID.
        oid: u32,
    },
    /// `XLOG_PARAMETER_CHANGE`, `XLOG_END_OF_RECOVERY` or a checkpoint announced `wal_level`.
    WalLevel {
        /// 0 minimal, 1 replica, 2 logical (`WalLevel` in `xlog.h`).
        level: i32,
    },
}

impl WalEvent {
    /// Returns true if the server has `wal_level = minimal` from this record on: changes may be
    /// missing from the WAL after it, and PostgreSQL 14 and later do not replay the record.
    #[must_use]
    pub fn begins_minimal_wal(&self) -> bool {
        matches!(self, Self::WalLevel { level: 0 })
    }
}

/// The maximum number of dropped files that one [`WalEvent::DroppedRelations`] names. A DROP SCHEMA
/// can drop far more.
pub const DROPPED_RELATIONS_MAX: usize = 256;
