//! [`Supervisor`]: what the supervisor of a cluster knows between two attempts.

use std::{sync::Arc, time::Duration};

use replication::ConnInfo;
use repository::config::ClusterSettings;
use status::cluster_status::ClusterStatus;

use crate::{
    core::live_cluster::LiveCluster,
    observe::{current::CurrentArchive, server::Polling},
    pipeline::Pipeline,
    spool::Spool,
};

/// The supervisor of one cluster.
pub(super) struct Supervisor {
    pub(super) settings: ClusterSettings,
    pub(super) status: Arc<ClusterStatus>,
    /// The same status, with the positions of the WAL.
    pub(super) live: LiveCluster,
    /// The archive of the running stages, for standbys and the dashboard.
    pub(super) archive: Arc<CurrentArchive>,
    /// The task that polls the server.
    pub(super) polling: Polling,
    pub(super) conninfo: ConnInfo,
    pub(super) spool: Arc<Spool>,
    /// Runs as soon as the identity of the WAL is known, with or without a server.
    pub(super) pipeline: Option<Pipeline>,
    pub(super) connected_once: bool,
    pub(super) retry: Duration,
    /// The next pause while archiving is broken.
    pub(super) broken_retry: Duration,
    pub(super) damaged: u32,
    /// The gap whose search was logged last. Each attempt to close the gap finds the same gap,
    /// which is not logged again.
    pub(super) searched_gap: Option<String>,
    /// The gap that was last logged as an interruption.
    pub(super) reported_gap: Option<String>,
    /// True if the stream was ended because the primary had to be protected.
    pub(super) gave_up: bool,
    /// True if the catalog is in memory, because the one on disk is not usable.
    pub(super) without_catalog: bool,
}
