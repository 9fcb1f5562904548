//! The last times at which everything was held ([`CaughtUp`]), kept across restarts.

use serde::{Deserialize, Serialize};
use wal_format::PgTimestamp;

/// The last time at which each tier held everything that the server had flushed, by this host's
/// clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaughtUp {
    /// The spool.
    pub local: Option<PgTimestamp>,
    /// The repository.
    pub remote: Option<PgTimestamp>,
}
