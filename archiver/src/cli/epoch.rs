//! `wal-archiver epoch begin`: the operator confirms that the server has a new system identifier on
//! purpose, after `pg_upgrade` or a new `initdb`.
//!
//! Invariant: the old epoch's WAL in the spool is in the repository before the new epoch begins, so
//! both are complete.
//!
//! The command also confirms that a repository does not hold the archive any more (emptied,
//! replaced, a new disk). A new archive with the same system identifier then begins in each such
//! place.

use std::{fs, io, path::Path, sync::Arc};

use repository::{ClusterIdentity, LossRecord, Repository, config::ClusterSettings};
use status::instruments::Instruments;
use wal_format::{OutcomeKind, SystemIdentifier};

use super::{output, runtime};
use crate::{
    core::live_cluster::LiveCluster,
    daemon::supervisor::{CatalogPlace, open_archive},
    error::{Error, Result},
    observe,
    pipeline::Pipeline,
    primary::{Source, conninfo},
    spool::{Spool, record::remove_record},
    upkeep::outcomes,
};

pub(super) fn begin(settings: &ClusterSettings, system: SystemIdentifier) -> Result<()> {
    let began = jiff::Timestamp::now();
    let usage = |message: String| Error::Usage { message };
    let mut gone = Vec::new();
    for place in settings.repository.each() {
        match Repository::open_known_place(settings, &place)?.identity() {
            Err(error) if error.is_gone() => gone.push(place.to_string()),
            other => drop(other?),
        }
    }
    if !gone.is_empty() {
        return begin_again(settings, system, &gone, began);
    }
    let repository = Repository::open_known(settings)?;
    let Some(last) = repository.identity()? else {
        return Err(usage(format!(
            "{} holds nothing of cluster {} yet: `wal-archiver run` begins its first epoch",
            settings.repository, settings.name
        )));
    };
    if last.system_identifier == system {
        output::line(&format!(
            "cluster {}: system identifier {system} is archived already",
            settings.name
        ));
        return Ok(());
    }
    // The lock is held to the end, so that no daemon starts meanwhile.
    let spool = Arc::new(Spool::open(&settings.spool, &settings.name)?);
    let runtime = runtime()?;
    let (found, version) = runtime.block_on(server(settings, system))?;
    if let Some(spooled) = spool.identity()? {
        if spooled.system_identifier != last.system_identifier {
            return Err(Error::SpoolSystemMismatch {
                path: spool.directory().to_path_buf(),
                expected: last.system_identifier,
                found: spooled.system_identifier.to_string(),
            });
        }
        runtime.block_on(drain(settings, &last, &spool))?;
    }
    // The repository holds the content of both, so a crash from here on loses nothing.
    remove(&spool.directory().join("wal"))?;
    remove(&settings.catalog)?;
    LossRecord::of(settings).forget()?;
    let number = repository.begin_epoch(&last, &found)?;
    let said = format!(
        "epoch {number} begins with system identifier {system}, PostgreSQL {version}, after {}",
        last.system_identifier
    );
    outcomes::record(settings, OutcomeKind::Epoch, began, Ok(&said));
    output::line(&format!(
        "cluster {}: epoch {number} begins with system identifier {system}, PostgreSQL {version}",
        settings.name
    ));
    output::line(
        "  next          start `wal-archiver run`, then take a base backup with `wal-archiver backup`: before it nothing \
         of this epoch can be restored",
    );
    output::line(&format!(
        "  the past      pitr-restore --system {} restores PostgreSQL {} as it was",
        last.system_identifier, last.postgresql_major
    ));
    Ok(())
}

/// Begins an archive in each place that does not hold the known one. The next `run` stores the
/// spool's WAL there. WAL that only the old repository held is not copied.
fn begin_again(
    settings: &ClusterSettings,
    system: SystemIdentifier,
    gone: &[String],
    began: jiff::Timestamp,
) -> Result<()> {
    // The lock is held to the end, so that no daemon starts meanwhile.
    let spool = Spool::open(&settings.spool, &settings.name)?;
    let (found, _) = runtime()?.block_on(server(settings, system))?;
    if let Some(spooled) = spool.identity()?
        && spooled.system_identifier != system
    {
        return Err(Error::SpoolSystemMismatch {
            path: spool.directory().to_path_buf(),
            expected: system,
            found: spooled.system_identifier.to_string(),
        });
    }
    // Both describe the previous archive.
    remove(&settings.catalog)?;
    remove_record(spool.directory())?;
    LossRecord::of(settings).forget()?;
    Repository::open_anew(settings)?.claim(&found)?;
    let said = format!(
        "{} holds a new archive of system identifier {system}",
        gone.join(" and ")
    );
    outcomes::record(settings, OutcomeKind::Epoch, began, Ok(&said));
    output::line(&format!(
        "cluster {}: {} holds an archive of system identifier {system} from now on; what was archived before is only where \
         it was",
        settings.name,
        gone.join(" and ")
    ));
    output::line(
        "  next          start `wal-archiver run`, then take a base backup with `wal-archiver backup`",
    );
    Ok(())
}

/// Returns the server's identity and version. Fails if its system identifier is another one.
pub(super) async fn server(
    settings: &ClusterSettings,
    system: SystemIdentifier,
) -> Result<(ClusterIdentity, String)> {
    let conninfo = conninfo::of_cluster(settings)?;
    let (source, version) = Source::connect(&conninfo, &settings.name).await?;
    let found = source.identity().clone();
    if found.system_identifier == system {
        return Ok((found, version));
    }
    Err(Error::Usage {
        message: format!(
            "the server at {} has system identifier {}, not {system}: nothing was changed",
            conninfo.places(),
            found.system_identifier
        ),
    })
}

/// Stores the old epoch's WAL from the spool in the repository.
async fn drain(
    settings: &ClusterSettings,
    last: &ClusterIdentity,
    spool: &Arc<Spool>,
) -> Result<()> {
    let pipeline = start_pipeline(settings, last, spool).await?;
    let drained = pipeline.drain().await;
    let stopped = pipeline.stop().await;
    drained.and(stopped)
}

/// Starts the stages without a stream.
pub(super) async fn start_pipeline(
    settings: &ClusterSettings,
    last: &ClusterIdentity,
    spool: &Arc<Spool>,
) -> Result<Pipeline> {
    let live = LiveCluster::new(settings, Instruments::default());
    let (settings, last, spool) = (settings.clone(), last.clone(), Arc::clone(spool));
    let archive = crate::blocking::blocking(move || {
        open_archive(settings, &last, spool, live, CatalogPlace::Disk)
    })
    .await?;
    Pipeline::start(Arc::new(archive), |archive| {
        observe::start(archive, &Arc::default())
    })
    .await
}

fn remove(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io("remove", directory)(error))
        }
        _ => Ok(()),
    }
}
