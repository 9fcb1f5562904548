//! Starts the stages of a cluster, with the repository or from the spool alone, and with the
//! catalog on disk or in memory.
//!
//! Invariant: a catalog that cannot be opened or written, for example on a full disk, never
//! prevents WAL from reaching the repository. A catalog in memory replaces it until the one on disk
//! can be opened, which is tried when the spool is drained.

use std::{sync::Arc, time::Duration};

use catalog::Catalog;
use repository::{ClusterIdentity, Error as StoreError, Repository, config::ClusterSettings};

use super::{known, retry::BEAT, state::Supervisor};
use crate::{
    blocking::blocking,
    core::live_cluster::LiveCluster,
    error::Result,
    observe,
    pipeline::{
        Pipeline,
        archive::{Archive, Away},
    },
    spool::Spool,
};

/// The interval at which the archiver checks whether it can open the catalog on disk again, and the
/// pause after a failed attempt.
const CATALOG_POLL: Duration = Duration::from_secs(1);
const CATALOG_RETRY: Duration = Duration::from_secs(30);
/// The time for which the stages wait for the list of what an older state of the repository lacks.
const MISSING_MAX: Duration = Duration::from_secs(30);

impl Supervisor {
    pub(super) fn is_outdated(&self) -> bool {
        let pipeline = self.pipeline.as_ref();
        pipeline.is_some_and(|pipeline| pipeline.archive().is_outdated())
    }

    pub(super) async fn start(
        &mut self,
        identity: &ClusterIdentity,
        away: Option<Away>,
    ) -> Result<()> {
        let archive = match self.open(identity, away.clone()).await {
            Err(error) if error.is_catalog_failure() && !self.without_catalog => {
                tracing::warn!(
                    event = "catalog_in_memory", cluster = %self.settings.name, %error,
                    "the catalog cannot be opened; archiving continues with one in memory, made from the repository"
                );
                self.status
                    .note(|facts| facts.catalog_error = Some(error.to_string()));
                self.without_catalog = true;
                self.open(identity, away).await?
            }
            archive => archive?,
        };
        if !self.without_catalog {
            self.status.note(|facts| facts.catalog_error = None);
        }
        self.pipeline = Some(
            Pipeline::start(Arc::new(archive), |archive| {
                observe::start(archive, &self.archive)
            })
            .await?,
        );
        Ok(())
    }

    /// Starts the stages without the repository, because it lacks the newest archived segment.
    pub(super) async fn start_without(
        &mut self,
        identity: &ClusterIdentity,
        error: StoreError,
    ) -> Result<()> {
        tracing::error!(event = "repository_older", cluster = %self.settings.name, "{error}");
        self.status.repository_failed("start", "", &error);
        let spool = Arc::clone(&self.spool);
        let record = blocking(move || spool.record()).await?;
        let system = identity.system_identifier;
        let record = record.filter(|record| record.cluster.system_identifier == system);
        let StoreError::OlderState { newest, .. } = error else {
            return Err(error.into());
        };
        let lacking = Some(*newest);
        let (settings, cluster) = (self.settings.clone(), identity.clone());
        let missing = blocking(move || {
            let repository = Repository::open_known(&settings)?;
            Ok(Catalog::missing(&settings.catalog, &cluster, &repository)?.losses)
        });
        let missing = match tokio::time::timeout(MISSING_MAX, missing).await {
            Ok(Ok(missing)) => missing,
            found => {
                let error = match found {
                    Ok(Err(error)) => error.to_string(),
                    _ => format!("no answer within {} s", MISSING_MAX.as_secs()),
                };
                tracing::warn!(event = "losses_unknown", %error, "the window is not cut to what the repository holds");
                lacking.iter().cloned().collect()
            }
        };
        let away = Away {
            record,
            lacking,
            missing,
        };
        self.start(identity, Some(away)).await
    }

    async fn open(&self, identity: &ClusterIdentity, away: Option<Away>) -> Result<Archive> {
        let (settings, spool) = (self.settings.clone(), Arc::clone(&self.spool));
        let (live, identity) = (self.live.clone(), identity.clone());
        let place = if self.without_catalog {
            CatalogPlace::Memory
        } else {
            CatalogPlace::Disk
        };
        blocking(move || match away {
            None => open_archive(settings, &identity, spool, live, place),
            Some(away) => {
                let repository = known::absent_repository(&settings);
                let catalog = place.open(&settings, &identity)?;
                let away = Some(away);
                Archive::open(settings, identity, spool, repository, catalog, live, away)
            }
        })
        .await
    }
}

/// Waits until the repository was replaced by another place and is back.
pub(super) async fn outdated(pipeline: &Pipeline) {
    while !pipeline.archive().is_outdated() {
        tokio::time::sleep(BEAT).await;
    }
}

/// Waits until the catalog on disk can be opened. This is tried only while no segment waits in the
/// spool: then the disk has as much free space as the archiver can provide.
pub(super) async fn catalog_opens(settings: &ClusterSettings, pipeline: &Pipeline) {
    loop {
        tokio::time::sleep(CATALOG_POLL).await;
        let archive = pipeline.archive();
        if archive.is_away() || archive.progress().unsealed() > 0 {
            continue;
        }
        let (directory, identity) = (settings.catalog.clone(), archive.cluster.clone());
        match blocking(move || Ok(Catalog::open(&directory, &identity).map(drop)?)).await {
            Ok(()) => return,
            Err(error) => {
                archive
                    .status()
                    .note(|facts| facts.catalog_error = Some(error.to_string()));
                tokio::time::sleep(CATALOG_RETRY).await;
            }
        }
    }
}

/// The location of the catalog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CatalogPlace {
    /// The configured directory.
    Disk,
    /// Memory, initialized from the catalog on disk as far as that can be read. Nothing is written
    /// to disk.
    Memory,
}

impl CatalogPlace {
    fn open(
        self,
        settings: &ClusterSettings,
        identity: &ClusterIdentity,
    ) -> repository::Result<Catalog> {
        match self {
            Self::Disk => Catalog::open(&settings.catalog, identity),
            Self::Memory => Catalog::open_in_memory(&settings.catalog, identity),
        }
    }
}

/// Opens the repository, claims it for this cluster, and opens the catalog.
pub(crate) fn open_archive(
    settings: ClusterSettings,
    identity: &ClusterIdentity,
    spool: Arc<Spool>,
    live: LiveCluster,
    place: CatalogPlace,
) -> Result<Archive> {
    let repository = Repository::open_known(&settings)?;
    let repository = repository.observed(live.status.observer(), live.status.open_puts());
    let identity = repository.claim(identity)?;
    repository.keep_in_step();
    let catalog = place.open(&settings, &identity)?;
    Archive::open(settings, identity, spool, repository, catalog, live, None)
}
