//! [`Outcome`]: `outcome/….json`, the result of a restore drill, a base backup, an expiry or a
//! verification.
//!
//! Every host stores its results in the repository, where the archiver's dashboard reads them.
//! Written once.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{BackupId, DrillRecord, ObjectKey, PgTimestamp, SystemIdentifier};

/// The version of an outcome that this build writes, and the newest that it reads.
pub const OUTCOME_FORMAT_VERSION: u32 = 1;

/// The kind of operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutcomeKind {
    /// A base backup that failed. A successful one is its own proof.
    Backup,
    /// A restore into a scratch directory that was started and checked.
    Drill,
    /// An application of the retention policy that removed something or failed.
    Expire,
    /// A verification of the repository.
    Verify,
}

impl OutcomeKind {
    /// The name in keys and JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Backup => "backup",
            Self::Drill => "drill",
            Self::Expire => "expire",
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
        [Self::Backup, Self::Drill, Self::Expire, Self::Verify]
            .into_iter()
            .find(|kind| kind.name() == text)
            .ok_or(InvalidOutcomeKind)
    }
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
        }
    }

    /// Returns the object key.
    #[must_use]
    pub fn key(&self, system: SystemIdentifier) -> ObjectKey {
        ObjectKey::Outcome(system, self.kind, self.id.clone())
    }
}
