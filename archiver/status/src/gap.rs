//! [`OpenGap`]: missing WAL that is being searched for.

use serde::Serialize;
use wal_format::{Branch, Lsn, PgTimestamp};

/// The current step of handling a gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum GapState {
    /// The gap was just found.
    Detected,
    /// A server is being queried for the WAL.
    Healing,
    /// No queried server has the WAL. The servers are queried again until it is declared lost.
    Waiting,
}

/// Missing WAL that is not declared lost yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OpenGap {
    /// The current step.
    pub state: GapState,
    /// The branch on which it begins.
    pub branch: Branch,
    /// The first missing byte.
    pub from_lsn: Lsn,
    /// The LSN at which the server's WAL continues.
    pub to_lsn: Lsn,
    /// The time at which it was found, by our clock.
    pub detected: PgTimestamp,
    /// The time at which it is declared lost if no source has it by then, by our clock.
    pub declared_after: PgTimestamp,
    /// The server that is queried.
    pub source: Option<String>,
}
