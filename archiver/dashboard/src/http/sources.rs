//! [`Sources`]: what the answers are made from.

use std::{net::SocketAddr, pin::Pin, sync::Arc};

use repository::config::{ClusterSettings, HttpAccess};
use status::{instruments::Instruments, report::ClusterReport};
use tokio::sync::Semaphore;

use super::access::Access;
use crate::monitor::Monitor;

/// Takes a base backup of a cluster and logs its outcome.
pub type TakeBackup =
    Arc<dyn Fn(ClusterSettings) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

/// The sources of the answers.
#[derive(Clone)]
pub struct Sources {
    /// Returns all reports, from memory.
    pub reports: Arc<dyn Fn() -> Vec<ClusterReport> + Send + Sync>,
    /// Time series, events, the live stream.
    pub monitor: Arc<Monitor>,
    /// The measurements of this process.
    pub instruments: Instruments,
    /// Takes a base backup of a cluster.
    pub(super) take_backup: TakeBackup,
    pub(super) access: Arc<Access>,
    /// Limits base backups requested over HTTP to one at a time.
    pub(super) backups: Arc<Semaphore>,
}

impl std::fmt::Debug for Sources {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sources").finish_non_exhaustive()
    }
}

impl Sources {
    /// Creates the sources of a server that is bound to `address`. They answer from `monitor`, for
    /// clients that `access` admits, and let `take_backup` take the base backups that are
    /// requested.
    #[must_use]
    pub fn new(
        monitor: Arc<Monitor>,
        instruments: Instruments,
        access: &HttpAccess,
        address: SocketAddr,
        take_backup: TakeBackup,
    ) -> Self {
        let of = Arc::clone(&monitor);
        Self {
            reports: Arc::new(move || of.reports()),
            monitor,
            instruments,
            take_backup,
            access: Arc::new(Access::new(access, address)),
            backups: Arc::new(Semaphore::new(1)),
        }
    }
}
