//! `wal-archiver run`: the daemon.
//!
//! Only its runtime; everything else is in [`daemon`].

use std::net::SocketAddr;

use repository::config::{CommonArgs, Settings};

use super::runtime;
use crate::{daemon, error::Result};

pub(super) fn run(args: CommonArgs, settings: Settings, http: Option<SocketAddr>) -> Result<()> {
    let runtime = runtime()?;
    let outcome = runtime.block_on(daemon::run(args, settings, http));
    // A request of a store that hangs must not keep a drained daemon alive.
    runtime.shutdown_background();
    outcome
}
