//! [`StandbyReport`]: our slot on a standby.

use serde::Serialize;
use wal_format::Lsn;

/// Our slot on one standby, as last seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StandbyReport {
    /// The address of the standby.
    pub server: String,
    /// The LSN from which our slot retains WAL there. `None` while it is unknown.
    pub restart_lsn: Option<Lsn>,
    /// The reason why a failover to the standby may need a new base backup. `None` while the slot
    /// is maintained.
    pub problem: Option<String>,
}
