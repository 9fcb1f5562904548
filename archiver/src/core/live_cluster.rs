//! [`LiveCluster`]: what the parts of a running cluster share.

use std::sync::Arc;

use repository::config::ClusterSettings;
use status::{cluster_status::ClusterStatus, instruments::Instruments};

use super::progress::Progress;

/// The shared state of one cluster: what is reported about it, and the positions of its WAL.
#[derive(Clone, Debug)]
pub struct LiveCluster {
    /// The facts that views show.
    pub status: Arc<ClusterStatus>,
    /// The core, which decides what may be acknowledged.
    pub progress: Arc<Progress>,
}

impl LiveCluster {
    /// Creates the state of a cluster of which nothing is known yet.
    #[must_use]
    pub fn new(settings: &ClusterSettings, instruments: Instruments) -> Self {
        let progress = Arc::new(Progress::new(settings.acknowledge));
        let positions = Arc::clone(&progress);
        let status = ClusterStatus::new(settings.name.clone(), instruments, positions);
        Self {
            status: Arc::new(status),
            progress,
        }
    }
}
