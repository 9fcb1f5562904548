//! [`DrillRecord`]: the part of a drill's outcome that only drills have: target, stop, objectives,
//! steps and checks.

use serde::{Deserialize, Serialize};

use crate::PgTimestamp;

/// The details of a restore drill. A value that was not measured is `None`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DrillRecord {
    /// The target, as it was asked for or chosen.
    pub target: String,
    /// The seed of a random target.
    pub seed: Option<u64>,
    /// The host on which the drill ran.
    pub host: String,
    /// The version of the server that was started, as it reports it.
    pub server_version: Option<String>,
    /// The place where recovery stopped, in PostgreSQL's words.
    pub stopped: Option<String>,
    /// The timeline of the stop.
    pub timeline: Option<u32>,
    /// The time of the newest commit up to the target that the archive knows.
    pub newest_commit: Option<PgTimestamp>,
    /// The time of the last transaction that the copy has replayed.
    pub replayed_commit: Option<PgTimestamp>,
    /// `rto_target` in seconds.
    pub rto_target_seconds: Option<f64>,
    /// `rpo_target` in seconds.
    pub rpo_target_seconds: Option<f64>,
    /// The steps, in order.
    pub steps: Vec<DrillStep>,
    /// The checks, in order.
    pub checks: Vec<DrillCheck>,
}

/// A step of a drill.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DrillStep {
    /// The time when it began.
    pub at: PgTimestamp,
    /// The step, in words.
    pub step: String,
}

/// The result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckVerdict {
    /// The check holds.
    Passed,
    /// The check does not hold, or could not be completed.
    Failed,
    /// The check was not made; its answer says why.
    Skipped,
}

impl CheckVerdict {
    /// Returns the word in reports.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Failed => "FAILED",
            Self::Skipped => "skipped",
        }
    }
}

/// A check of a drill.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DrillCheck {
    /// The name of the check.
    pub name: String,
    /// The result.
    pub verdict: CheckVerdict,
    /// The answer of the program or the server, or the reason why there is none.
    pub answer: String,
    /// The duration in seconds.
    pub seconds: f64,
}
