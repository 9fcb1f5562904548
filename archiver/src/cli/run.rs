//! `wal-archiver run`: the daemon.
//!
//! This module contains its runtime and the refusal of a wrong user; everything else is in
//! [`daemon`].

use std::{net::SocketAddr, os::unix::fs::MetadataExt, path::Path, time::Duration};

use repository::config::{CommonArgs, Settings};

use super::runtime;
use crate::{
    daemon,
    error::{Error, Result},
    spool,
};

/// The time that background work has to end.
const LAST_LOOKS: Duration = Duration::from_secs(3);

/// Refuses to run as root in directories of another user, who could not use them afterwards: the
/// spool's files and the catalog would belong to root.
fn refuse_root(settings: &Settings) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    for cluster in &settings.clusters {
        let own = cluster.spool.join(cluster.name.as_str());
        let folder = cluster.repository.url.folder().map(Path::to_owned);
        for path in [own, cluster.spool.clone()].into_iter().chain(folder) {
            let owner = std::fs::metadata(&path).map_or(0, |found| found.uid());
            if owner != 0 {
                let name = spool::user_name(owner);
                return Err(Error::Usage {
                    message: format!(
                        "{} belongs to user {name}, and root would leave files there that {name} cannot use: run the \
                         archiver as that user (`su -s /bin/sh {name} -c 'wal-archiver run'`)",
                        path.display()
                    ),
                });
            }
        }
    }
    Ok(())
}

pub(super) fn run(args: CommonArgs, settings: Settings, http: Option<SocketAddr>) -> Result<()> {
    refuse_root(&settings)?;
    let runtime = runtime()?;
    let outcome = runtime.block_on(daemon::run(args, settings, http));
    // A thread that still reads the catalog while RocksDB's statics are destroyed would crash. A
    // request to a store that hangs must not keep a drained daemon running.
    runtime.shutdown_timeout(LAST_LOOKS);
    outcome
}
