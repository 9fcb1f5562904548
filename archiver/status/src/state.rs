//! [`State`]: the summary of a cluster in one word.

use serde::Serialize;

/// The overall state of a cluster, decided by the worst fact.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// The stream is up and the repository is within its target.
    Ok,
    /// Nothing would be lost if the primary died now, but a protection against loss is missing or a
    /// warning fires.
    Degraded,
    /// More WAL than the target allows would be lost if the primary died now, or a critical alert
    /// fires. Without a base backup everything would be lost.
    AtRisk,
    /// Archiving has stopped, a part of the WAL is missing, or no base backup leads to the present.
    Broken,
    /// The primary cannot be seen, or the catalog was not read yet. Nothing is known beyond the
    /// last proof.
    Unknown,
}

impl State {
    /// Every state, for the state set of the metrics.
    pub const ALL: [Self; 5] = [
        Self::Ok,
        Self::Degraded,
        Self::AtRisk,
        Self::Broken,
        Self::Unknown,
    ];

    /// Returns the position in the order by severity: 0 is the worst.
    #[must_use]
    pub fn rank(self) -> u8 {
        match self {
            Self::Broken => 0,
            Self::AtRisk => 1,
            Self::Unknown => 2,
            Self::Degraded => 3,
            Self::Ok => 4,
        }
    }

    /// The name in metrics and JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Degraded => "degraded",
            Self::AtRisk => "at_risk",
            Self::Broken => "broken",
            Self::Unknown => "unknown",
        }
    }
}
