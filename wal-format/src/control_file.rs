//! [`ControlFile`]: `global/pg_control`, what a cluster knows of itself before it reads any WAL.
//!
//! The layout is `ControlFileData` in `pg_control.h`: one from 13 to 17, and 18 has one flag more. The version is told by the
//! catalog's version, because the layout's number is the same from 13 to 16.

use crate::{Lsn, PgTimestamp, PgVersion, SystemIdentifier, TimelineId, fields::Fields};

/// `PG_CONTROL_FILE_SIZE`: the file is this long, mostly zeros.
pub const CONTROL_FILE_BYTES: usize = 8192;

/// Where `CheckPoint` lies.
const CHECKPOINT: usize = 40;

/// `CATALOG_VERSION_NO` of each version's releases.
const CATALOG_VERSIONS: [(u32, PgVersion); 6] = [
    (202_007_201, PgVersion::V13),
    (202_107_181, PgVersion::V14),
    (202_209_061, PgVersion::V15),
    (202_307_071, PgVersion::V16),
    (202_406_281, PgVersion::V17),
    (202_506_291, PgVersion::V18),
];

/// What `pg_control` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlFile {
    /// The major version.
    pub version: PgVersion,
    /// The cluster.
    pub system_identifier: SystemIdentifier,
    /// Whether it runs, and how it ended.
    pub state: ClusterState,
    /// When the file was written, cut to seconds.
    pub written: PgTimestamp,
    /// The latest checkpoint's record.
    pub checkpoint_lsn: Lsn,
    /// What that record says.
    pub checkpoint: ControlFileCheckpoint,
    /// Recovery has to reach this before the cluster is consistent (`minRecoveryPoint`); zero when there is nothing to reach.
    pub min_recovery_lsn: Lsn,
    /// The timeline of that; `None` with zero.
    pub min_recovery_timeline: Option<TimelineId>,
    /// Where the backup that is being recovered began; zero without one.
    pub backup_start_lsn: Lsn,
    /// Where the backup of a standby that is being recovered ended; zero without one.
    pub backup_end_lsn: Lsn,
    /// Whether recovery has to see the backup's end record.
    pub backup_end_required: bool,
    /// `wal_level`: 0 minimal, 1 replica, 2 logical.
    pub wal_level: i32,
    /// `wal_log_hints`.
    pub wal_log_hints: bool,
    /// `max_connections`, which a standby has to match; so do the next four.
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
    /// Whether data pages carry checksums.
    pub data_checksums: bool,
}

/// The latest checkpoint (`CheckPoint`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlFileCheckpoint {
    /// Where redo begins.
    pub redo_lsn: Lsn,
    /// The timeline.
    pub timeline: TimelineId,
    /// The timeline before, at the begin of a new one; else the same.
    pub previous_timeline: TimelineId,
    /// `full_page_writes`.
    pub full_page_writes: bool,
    /// The next transaction, with its epoch in the upper half.
    pub next_xid: u64,
    /// When it was made, cut to seconds.
    pub time: PgTimestamp,
}

/// Whether a cluster runs, and how it ended (`DBState`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClusterState {
    /// It starts.
    StartingUp,
    /// It was shut down.
    ShutDown,
    /// It was shut down while it replayed WAL.
    ShutDownInRecovery,
    /// It shuts down.
    ShuttingDown,
    /// It recovers from a crash.
    InCrashRecovery,
    /// It recovers from an archive or follows a primary.
    InArchiveRecovery,
    /// It runs, or was killed while it ran.
    InProduction,
}

impl ClusterState {
    /// In `DBState`'s order.
    const ALL: [Self; 7] = [
        Self::StartingUp,
        Self::ShutDown,
        Self::ShutDownInRecovery,
        Self::ShuttingDown,
        Self::InCrashRecovery,
        Self::InArchiveRecovery,
        Self::InProduction,
    ];

    /// As `pg_controldata` prints it.
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

/// Why bytes are no usable `pg_control`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlFileError {
    /// The sum does not match: the file is damaged, or of a machine with another byte order.
    #[error("pg_control has CRC {found:#010X}, recorded {expected:#010X}")]
    Crc {
        /// What the file says.
        expected: u32,
        /// Of its bytes.
        found: u32,
    },
    /// A field that its version can not hold.
    #[error("pg_control's {field} is invalid")]
    Field {
        /// Its name.
        field: &'static str,
    },
    /// It ends too early.
    #[error("pg_control has only {bytes} bytes")]
    Truncated {
        /// Its length.
        bytes: usize,
    },
    /// It is of a version that this build does not know.
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
    /// Reads `pg_control`.
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
        // The nonce moved by a byte, and the sum to the next multiple of four.
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
