//! [`Outcome`]: `outcome/….json`, the record of an operation and its result.
//!
//! Every host stores its records in the repository. Together they are the audit trail, and the
//! archiver's dashboard reads them. Written once.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{BackupId, Branch, DrillRecord, ObjectKey, PgTimestamp, SystemIdentifier};

/// The version of an outcome that this build writes, and the newest that it reads.
pub const OUTCOME_FORMAT_VERSION: u32 = 1;

/// The kind of operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutcomeKind {
    /// A base backup. Builds before the audit trail recorded only those that failed.
    Backup,
    /// The deletion of one backup by name. Earlier builds recorded it as [`OutcomeKind::Expire`].
    Delete,
    /// A restore into a scratch directory that was started and checked.
    Drill,
    /// The begin of an epoch, or of an archive after `pg_resetwal`.
    Epoch,
    /// An application of the retention policy that removed something or failed, or its undoing.
    Expire,
    /// The first WAL of a timeline to which the server was promoted.
    Failover,
    /// A change of the keys: the encryption of a plain archive, or new wrapped keys.
    Key,
    /// A change of what the operator says about a backup.
    Note,
    /// The daemon has read its configuration again.
    Reload,
    /// The end of archiving on the servers.
    Remove,
    /// A restore.
    Restore,
    /// A verification of the repository.
    Verify,
}

impl OutcomeKind {
    /// All kinds, in the order of their names.
    pub const ALL: [Self; 12] = [
        Self::Backup,
        Self::Delete,
        Self::Drill,
        Self::Epoch,
        Self::Expire,
        Self::Failover,
        Self::Key,
        Self::Note,
        Self::Reload,
        Self::Remove,
        Self::Restore,
        Self::Verify,
    ];

    /// The name in keys and JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Backup => "backup",
            Self::Delete => "delete",
            Self::Drill => "drill",
            Self::Epoch => "epoch",
            Self::Expire => "expire",
            Self::Failover => "failover",
            Self::Key => "key",
            Self::Note => "note",
            Self::Reload => "reload",
            Self::Remove => "remove",
            Self::Restore => "restore",
            Self::Verify => "verify",
        }
    }
}

impl fmt::Display for OutcomeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Text that does not name a kind of outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no kind of outcome")]
pub struct InvalidOutcomeKind;

impl FromStr for OutcomeKind {
    type Err = InvalidOutcomeKind;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == text)
            .ok_or(InvalidOutcomeKind)
    }
}

/// The user and the program that performed an operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Actor {
    /// The name of the user that the program ran as.
    pub user: String,
    /// The user who started the program with `sudo`, as the environment says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sudo_user: Option<String>,
    /// The name of the host.
    pub host: String,
    /// `wal-archiver` or `pitr-restore`.
    pub program: String,
    /// The version of the program.
    pub version: String,
}

/// The details of a restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreRecord {
    /// The target, as it was asked for.
    pub target: String,
    /// The directory that it was restored into.
    pub directory: String,
    /// The end of the replayed WAL according to the plan, or PostgreSQL's words on where recovery
    /// stopped.
    pub stop: String,
    /// True if PostgreSQL was started and the stop was compared with the plan.
    pub started: bool,
    /// The exit code of the program.
    pub exit_code: u8,
}

/// The result of an operation. A value that does not apply or was not measured is `None`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// [`OUTCOME_FORMAT_VERSION`].
    pub format_version: u32,
    /// The kind of operation.
    pub kind: OutcomeKind,
    /// The name, in the form of a backup ID, from the time when it began.
    pub id: BackupId,
    /// The time when it began.
    pub started: PgTimestamp,
    /// The time when it ended.
    pub finished: PgTimestamp,
    /// True if it succeeded.
    pub passed: bool,
    /// The result in a sentence.
    pub message: String,
    /// The base backup that was used.
    #[serde(default)]
    pub backup: Option<BackupId>,
    /// Seconds until PostgreSQL answered a query.
    #[serde(default)]
    pub rto_seconds: Option<f64>,
    /// Bytes of the base backup that were fetched.
    #[serde(default)]
    pub fetched_bytes: Option<u64>,
    /// The duration of that fetch in seconds.
    #[serde(default)]
    pub fetch_seconds: Option<f64>,
    /// Bytes of WAL that were replayed.
    #[serde(default)]
    pub replayed_bytes: Option<u64>,
    /// The duration of the replay in seconds.
    #[serde(default)]
    pub replay_seconds: Option<f64>,
    /// The loss against the newest known commit in seconds.
    #[serde(default)]
    pub loss_seconds: Option<f64>,
    /// Keys of the damaged or missing objects.
    #[serde(default)]
    pub damaged: Vec<String>,
    /// The details of a drill; `None` for another kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drill: Option<Box<DrillRecord>>,
    /// The user and the program. `None` in records of builds before the audit trail.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub actor: Option<Actor>,
    /// The details of a restore; `None` for another kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore: Option<Box<RestoreRecord>>,
    /// The branch that a failover led to; `None` for another kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<Branch>,
}

impl Outcome {
    /// Returns the outcome of an operation without measurements.
    #[must_use]
    pub fn new(
        kind: OutcomeKind,
        id: BackupId,
        started: PgTimestamp,
        finished: PgTimestamp,
        passed: bool,
        message: String,
    ) -> Self {
        Self {
            format_version: OUTCOME_FORMAT_VERSION,
            kind,
            id,
            started,
            finished,
            passed,
            message,
            backup: None,
            rto_seconds: None,
            fetched_bytes: None,
            fetch_seconds: None,
            replayed_bytes: None,
            replay_seconds: None,
            loss_seconds: None,
            damaged: Vec::new(),
            drill: None,
            actor: None,
            restore: None,
            branch: None,
        }
    }

    /// Returns the object key.
    #[must_use]
    pub fn key(&self, system: SystemIdentifier) -> ObjectKey {
        ObjectKey::Outcome(system, self.kind, self.id.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_parses_back_and_the_list_is_sorted() {
        for kind in OutcomeKind::ALL {
            assert_eq!(kind.name().parse(), Ok(kind));
            let json = serde_json::to_value(kind).expect("JSON");
            assert_eq!(json, kind.name());
        }
        assert!(OutcomeKind::ALL.is_sorted_by_key(|kind| kind.name()));
        assert!("".parse::<OutcomeKind>().is_err());
    }

    /// As a build before the audit trail wrote it, and as a later build may write it.
    #[test]
    fn records_of_other_builds_are_read() {
        let old = r#"{"format_version":1,"kind":"verify","id":"20261121T101500Z-9f3c",
            "started":"2026-11-21T10:15:00Z","finished":"2026-11-21T10:15:01Z","passed":true,
            "message":"no damage","backup":null,"unknown":{"a":1}}"#;
        let read: Outcome = serde_json::from_str(old).expect("an outcome");
        assert_eq!((read.kind, read.actor), (OutcomeKind::Verify, None));
    }
}
