//! `wal-archiver run`: the daemon.

use std::{net::SocketAddr, sync::Arc};

use repository::config::Settings;
use tokio::task::JoinSet;

use super::runtime;
use crate::{
    cluster_status::ClusterStatus,
    error::{Error, Result},
    http::{HttpServer, Sources},
    instruments::Instruments,
    report::ClusterReport,
    shutdown::Shutdown,
    supervisor,
};

pub(super) fn run(settings: Settings, http: Option<SocketAddr>) -> Result<()> {
    let runtime = runtime()?;
    let outcome = runtime.block_on(serve(settings, http));
    // A request of a store that hangs must not keep a drained daemon alive.
    runtime.shutdown_background();
    outcome
}

async fn serve(settings: Settings, http: Option<SocketAddr>) -> Result<()> {
    let shutdown = Shutdown::on_signals().map_err(Error::io("watch", "the signals"))?;
    let server = HttpServer::bind(http.unwrap_or(settings.http)).await?;
    tracing::info!(address = %server.address(), "serving HTTP");
    let instruments = Instruments::default();
    let mut clusters = JoinSet::new();
    let mut statuses = Vec::new();
    for cluster in settings.clusters {
        let status = Arc::new(ClusterStatus::new(
            cluster.name.clone(),
            cluster.acknowledge,
            instruments.clone(),
        ));
        statuses.push((cluster.clone(), Arc::clone(&status)));
        tracing::info!(cluster = %cluster.name, repository = %cluster.repository, spool = %cluster.spool.display(), "archiving");
        clusters.spawn(Box::pin(supervisor::run(cluster, status, shutdown.clone())));
    }
    let reports = move || -> Vec<ClusterReport> {
        statuses
            .iter()
            .map(|(settings, status)| status.report(settings))
            .collect()
    };
    tokio::spawn(server.serve(Sources {
        reports: Arc::new(reports),
        instruments,
    }));
    // One cluster that can not go on does not stop the others; the exit code tells of the first.
    let mut first = Ok(());
    while let Some(ended) = clusters.join_next().await {
        let outcome = ended.unwrap_or_else(|error| {
            Err(Error::ThreadStopped {
                name: "cluster",
                reason: error.to_string(),
            })
        });
        if let Err(error) = outcome {
            tracing::error!(%error, "archiving of a cluster has ended");
            first = first.and(Err(error));
        }
    }
    first
}
