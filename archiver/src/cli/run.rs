//! `wal-archiver run`: the daemon.
//!
//! Only its runtime; everything else is in [`daemon`].

use std::{net::SocketAddr, time::Duration};

use repository::config::{CommonArgs, Settings};

use super::runtime;
use crate::{daemon, error::Result};

/// The time for which what was begun beside the clusters may take to end.
const LAST_LOOKS: Duration = Duration::from_secs(3);

pub(super) fn run(args: CommonArgs, settings: Settings, http: Option<SocketAddr>) -> Result<()> {
    let runtime = runtime()?;
    let outcome = runtime.block_on(daemon::run(args, settings, http));
    // Whoever still looks at the catalog would do so while RocksDB's own statics are taken down, and crash; a request of a
    // store that hangs must not keep a drained daemon alive.
    runtime.shutdown_timeout(LAST_LOOKS);
    outcome
}
