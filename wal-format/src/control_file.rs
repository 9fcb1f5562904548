//! [`ControlFile`]: `global/pg_control`, the state of a cluster that is known before any WAL is
//! read.
//!
//! The layout is `ControlFileData` in `pg_control.h`: the same from 13 to 17, and 18 has one more
//! flag. The version is derived from the catalog version, because the layout number is the same
//! from 13 to 16.

use crate::{Lsn, PgTimestamp, PgVersion, SystemIdentifier, TimelineId, fields::Fields};

/// `PG_CONTROL_FILE_SIZE`: the length of the file, which is mostly zeros.
pub const CONTROL_FILE_BYTES: usize = 8192;

/// The offset of `CheckPoint`.
const CHECKPOINT: usize = 40;

/// `CATALOG_VERSION_NO` of the releases of each version.
const CATALOG_VERSIONS: [(u32, PgVersion); 6] = [
    (202_007_201, PgVersion::V13),
    (202_107_181, PgVersion::V14),
    (202_209_061, PgVersion::V15),
    (202_307_071, PgVersion::V16),
    (202_406_281, PgVersion::V17),
    (202_506_291, PgVersion::V18),
];

/// The content of `pg_control`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlFile {
    /// The major version.
    pub version: PgVersion,
    /// The system identifier.
    pub system_identifier: SystemIdentifier,
    /// The state of the cluster.
    pub state: ClusterState,
    /// The time when the file was written, truncated to seconds.
    pub written: PgTimestamp,
    /// The LSN of the latest checkpoint record.
    pub checkpoint_lsn: Lsn,
    /// The content of that record.
    pub checkpoint: ControlFileCheckpoint,
    /// The LSN that recovery has to reach before the cluster is consistent (`minRecoveryPoint`).
    /// Zero if there is none.
    pub min_recovery_lsn: Lsn,
    /// The timeline of that LSN. `None` with zero.
    pub min_recovery_timeline: Option<TimelineId>,
    /// The start of the backup that is being recovered. Zero without one.
    pub backup_start_lsn: Lsn,
    /// The end of a standby's backup that is being recovered. Zero without one.
    pub backup_end_lsn: Lsn,
    /// True if recovery has to reach the backup's end record.
    pub backup_end_required: bool,
    /// `wal_level`: 0 minimal, 1 replica, 2 logical.
    pub wal_level: i32,
    /// `wal_log_hints`.
    pub wal_log_hints: bool,
    /// `max_connections`, which a standby must match, like the following four settings.
    pub max_connections: i32,
    /// `max_worker_processes`.
    pub max_worker_processes: i32,
    /// `max_wal_senders`.
    pub max_wal_senders: i32,
    /// `max_prepared_transactions`.
    pub max_prepared_transactions: i32,
    /// `max_locks_per_transaction`.
    pub max_locks_per_transaction: i32,
    /// `track_commit_timestamp`.
    pub track_commit_timestamp: bool,
    /// `BLCKSZ`.
    pub block_bytes: u32,
    /// `XLOG_BLCKSZ`.
    pub wal_page_bytes: u32,
    /// `wal_segment_size` in bytes.
    pub segment_bytes: u32,
    /// True if data pages have checksums.
    pub data_checksums: bool,
}

/// The latest checkpoint (`CheckPoint`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlFileCheckpoint {
    /// The LSN where redo begins.
    pub redo_lsn: Lsn,
    /// The timeline.
    pub timeline: TimelineId,
    /// The previous timeline, at the beginning of a new one. Otherwise the same timeline.
    pub previous_timeline: TimelineId,
    /// `full_page_writes`.
    pub full_page_writes: bool,
    /// The next transaction ID, with its epoch in the upper half.
    pub next_xid: u64,
    /// The time of the checkpoint, truncated to seconds.
    pub time: PgTimestamp,
}

/// The state of a cluster (`DBState`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClusterState {
    /// Starting up.
    StartingUp,
    /// Shut down.
    ShutDown,
    /// Shut down during recovery.
    ShutDownInRecovery,
    /// Shutting down.
    ShuttingDown,
    /// In crash recovery.
    InCrashRecovery,
    /// In archive recovery, or following a primary.
    InArchiveRecovery,
    /// Running, or killed while it was running.
    InProduction,
}

impl ClusterState {
    /// In the order of `DBState`.
    const ALL: [Self; 7] = [
        Self::StartingUp,
        Self::ShutDown,
        Self::ShutDownInRecovery,
        Self::ShuttingDown,
        Self::InCrashRecovery,
        Self::InArchiveRecovery,
        Self::InProduction,
    ];

    /// Returns the text that `pg_controldata` prints.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::StartingUp => "starting up",
            Self::ShutDown => "shut down",
            Self::ShutDownInRecovery => "shut down in recovery",
            Self::ShuttingDown => "shutting down",
            Self::InCrashRecovery => "in crash recovery",
            Self::InArchiveRecovery => "in archive recovery",
            Self::InProduction => "in production",
        }
    }
}

/// The reason why bytes are not a usable `pg_control`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlFileError {
    /// The checksum does not match: the file is damaged, or comes from a machine with another byte
    /// order.
    #[error("pg_control has CRC {found:#010X}, recorded {expected:#010X}")]
    Crc {
        /// The checksum in the file.
        expected: u32,
        /// The checksum of the bytes.
        found: u32,
    },
    /// A field has a value that its version does not allow.
    #[error("pg_control's {field} is invalid")]
    Field {
        /// The field's name.
        field: &'static str,
    },
    /// The file is too short.
    #[error("pg_control has only {bytes} bytes")]
    Truncated {
        /// Its length.
        bytes: usize,
    },
    /// The file has a version that this build does not know.
    #[error(
        "pg_control is of layout {layout} and catalog {catalog}; Tidemark reads those of PostgreSQL 13 to 18"
    )]
    Version {
        /// `pg_control_version`.
        layout: u32,
        /// `catalog_version_no`.
        catalog: u32,
    },
}

impl ControlFile {
    /// Parses `pg_control`.
    ///
    /// # Errors
    /// [`ControlFileError`].
    pub fn parse(content: &[u8]) -> Result<Self, ControlFileError> {
        let bytes = content.len();
        let truncated = || ControlFileError::Truncated { bytes };
        let file = Fields(content);
        let at = |offset: usize| file.at(offset).ok_or_else(truncated);
        let u32_at = |offset| at(offset)?.u32().ok_or_else(truncated);
        let i32_at = |offset| at(offset)?.i32().ok_or_else(truncated);
        let lsn_at = |offset| at(offset)?.u64().map(Lsn).ok_or_else(truncated);
        let flag_at = |offset| at(offset)?.u8().map(|flag| flag != 0).ok_or_else(truncated);
        let seconds_at = |offset| {
            let seconds = at(offset)?.i64().ok_or_else(truncated)?;
            Ok(PgTimestamp::from_unix_seconds(seconds))
        };
        let field = |field| ControlFileError::Field { field };

        let (layout, catalog) = (u32_at(8)?, u32_at(12)?);
        // Version 18's flag moves the nonce by one byte and the checksum to the next multiple of
        // four.
        let crc_offset = match layout {
            1300 | 1700 => 288,
            1800 => 292,
            _ => return Err(ControlFileError::Version { layout, catalog }),
        };
        let expected = u32_at(crc_offset)?;
        let found = crc32c::crc32c(content.get(..crc_offset).unwrap_or_default());
        if expected != found {
            return Err(ControlFileError::Crc { expected, found });
        }
        let version = CATALOG_VERSIONS.iter().find(|known| known.0 == catalog);
        let version = version
            .ok_or(ControlFileError::Version { layout, catalog })?
            .1;
        let state = usize::try_from(u32_at(16)?).ok();
        let state = state.and_then(|state| ClusterState::ALL.get(state));
        let timeline_at = |offset: usize, name| {
            let timeline = u32_at(CHECKPOINT.saturating_add(offset))?;
            TimelineId::new(timeline).ok_or(field(name))
        };
        Ok(Self {
            version,
            system_identifier: SystemIdentifier(at(0)?.u64().ok_or_else(truncated)?),
            state: *state.ok_or(field("state"))?,
            written: seconds_at(24)?,
            checkpoint_lsn: lsn_at(32)?,
            checkpoint: ControlFileCheckpoint {
                redo_lsn: lsn_at(CHECKPOINT)?,
                timeline: timeline_at(8, "checkpoint's timeline")?,
                previous_timeline: timeline_at(12, "checkpoint's previous timeline")?,
                full_page_writes: flag_at(56)?,
                next_xid: at(64)?.u64().ok_or_else(truncated)?,
                time: seconds_at(104)?,
            },
            min_recovery_lsn: lsn_at(136)?,
            min_recovery_timeline: TimelineId::new(u32_at(144)?),
            backup_start_lsn: lsn_at(152)?,
            backup_end_lsn: lsn_at(160)?,
            backup_end_required: flag_at(168)?,
            wal_level: i32_at(172)?,
            wal_log_hints: flag_at(176)?,
            max_connections: i32_at(180)?,
            max_worker_processes: i32_at(184)?,
            max_wal_senders: i32_at(188)?,
            max_prepared_transactions: i32_at(192)?,
            max_locks_per_transaction: i32_at(196)?,
            track_commit_timestamp: flag_at(200)?,
            block_bytes: u32_at(216)?,
            wal_page_bytes: u32_at(224)?,
            segment_bytes: u32_at(228)?,
            data_checksums: u32_at(252)? != 0,
        })
    }
}
