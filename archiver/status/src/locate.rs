//! [`Located`]: the restore that leads to an instant, and the commits around it.

use serde::Serialize;
use wal_format::{BackupId, Lsn, PgTimestamp, TimelineId};

/// A commit near an instant.
#[derive(Clone, Debug, Serialize)]
pub struct NearCommit {
    /// The time of the commit, by the server's clock.
    pub time: PgTimestamp,
    /// The LSN of the commit record.
    pub lsn: Lsn,
    /// The number of the transaction.
    pub xid: u32,
    /// The timeline of the commit.
    pub timeline: TimelineId,
}

/// An instant that can be restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NearInstant {
    /// The instant, by the server's clock.
    pub time: PgTimestamp,
    /// The flags of `pitr-restore` that lead there.
    pub flags: String,
}

/// The base backup that the restorer's plan chooses, and the WAL that is replayed after it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Chosen {
    /// The name of the backup.
    pub backup: BackupId,
    /// The size of the backup in the repository.
    pub backup_bytes: u64,
    /// The WAL from the start of the backup to the stop.
    pub wal_bytes: u64,
}

/// The restore to an instant.
#[derive(Clone, Debug, Serialize)]
pub struct Located {
    /// The instant that was searched for, by the server's clock.
    pub time: PgTimestamp,
    /// The last commit that the restore keeps. `None` if it replays none.
    pub before: Option<NearCommit>,
    /// The first commit that the restore drops. `None` if it drops none of the known ones.
    pub after: Option<NearCommit>,
    /// The flags of `pitr-restore`; `None` if no restore leads to the instant.
    pub flags: Option<String>,
    /// The base backup of that restore; `None` if no restore leads to the instant.
    pub chosen: Option<Chosen>,
    /// The reason why no restore leads to the instant. `None` if a restore does.
    pub refusal: Option<String>,
    /// The nearest instants that can be restored instead, the earlier one first. Empty if a restore
    /// leads to the instant.
    pub nearest: Vec<NearInstant>,
}
