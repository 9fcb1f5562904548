//! `wal-archiver run`: the daemon.
//!
//! This module contains only its runtime; everything else is in [`daemon`].

use std::{net::SocketAddr, time::Duration};

use repository::config::{CommonArgs, Settings};

use super::{places, runtime};
use crate::{daemon, error::Result};

/// The time that background work has to end.
const LAST_LOOKS: Duration = Duration::from_secs(3);

pub(super) fn run(args: CommonArgs, settings: Settings, http: Option<SocketAddr>) -> Result<()> {
    places::require_outside(&settings)?;
    places::refuse_root(&settings)?;
    for cluster in &settings.clusters {
        places::prepare_spool(cluster)?;
    }
    let runtime = runtime()?;
    let outcome = runtime.block_on(daemon::run(args, settings, http));
    // A thread that still reads the catalog while RocksDB's statics are destroyed would crash. A
    // request to a store that hangs must not keep a drained daemon running.
    runtime.shutdown_timeout(LAST_LOOKS);
    outcome
}
