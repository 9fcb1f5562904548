//! `wal-archiver epoch begin`: the operator's word that the server has a new system identifier on
//! purpose: after `pg_upgrade`, or made anew by `initdb`.
//!
//! Invariant: what the spool still holds of the old epoch is in the repository before the new one
//! begins, so both are whole.
//!
//! It is also the operator's word for a repository that does not hold the archive any more
//! (emptied, exchanged, a new disk): a new archive of the same system identifier begins in each
//! such place.

use std::{fs, io, path::Path, sync::Arc};

use repository::{ClusterIdentity, Repository, config::ClusterSettings};
use wal_format::SystemIdentifier;

use super::{output, runtime};
use crate::{
    cluster_status::ClusterStatus,
    error::{Error, Result},
    instruments::Instruments,
    pipeline::{Pipeline, session::Source},
    replication::ConnInfo,
    spool::Spool,
    spool::remove_record,
    supervisor::{CatalogPlace, open_archive},
};

pub(super) fn begin(settings: &ClusterSettings, system: SystemIdentifier) -> Result<()> {
    let usage = |message: String| Error::Usage { message };
    let mut gone = Vec::new();
    for place in settings.repository.each() {
        match Repository::open_known_place(settings, &place)?.identity() {
            Err(error) if error.is_gone() => gone.push(place.to_string()),
            other => drop(other?),
        }
    }
    if !gone.is_empty() {
        return begin_again(settings, system, &gone);
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
    // Held to the end: no daemon starts meanwhile.
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
    // Both are in the repository; a crash from here on loses nothing.
    remove(&spool.directory().join("wal"))?;
    remove(&settings.catalog)?;
    let number = repository.begin_epoch(&last, &found)?;
    output::line(&format!(
        "cluster {}: epoch {number} begins with system identifier {system}, PostgreSQL {version}",
        settings.name
    ));
    output::line(&format!(
        "  next          start `wal-archiver run`, then take a base backup with `wal-archiver backup`: before it nothing \
         of this epoch can be restored\n  the past      pitr-restore --system {} restores PostgreSQL {} as it was",
        last.system_identifier, last.postgresql_major
    ));
    Ok(())
}

/// Begins an archive in each place that does not hold the known one. What the spool still holds is
/// stored there by the next `run`; what only the old repository held stays there.
fn begin_again(
    settings: &ClusterSettings,
    system: SystemIdentifier,
    gone: &[String],
) -> Result<()> {
    // Held to the end: no daemon starts meanwhile.
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
    // They tell of the archive before.
    remove(&settings.catalog)?;
    remove_record(spool.directory())?;
    Repository::open_anew(settings)?.claim(&found)?;
    output::line(&format!(
        "cluster {}: {} holds an archive of system identifier {system} from now on; what was archived before is only where \
         it was\n  next          start `wal-archiver run`, then take a base backup with `wal-archiver backup`",
        settings.name,
        gone.join(" and ")
    ));
    Ok(())
}

/// The server's identity and version; it has to have this system identifier.
async fn server(
    settings: &ClusterSettings,
    system: SystemIdentifier,
) -> Result<(ClusterIdentity, String)> {
    let conninfo = ConnInfo::parse(&settings.conninfo)?;
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

/// Brings what the spool holds of the old epoch into the repository.
async fn drain(
    settings: &ClusterSettings,
    last: &ClusterIdentity,
    spool: &Arc<Spool>,
) -> Result<()> {
    let status = Arc::new(ClusterStatus::new(
        settings.name.clone(),
        settings.acknowledge,
        Instruments::default(),
    ));
    let (settings, last, spool) = (settings.clone(), last.clone(), Arc::clone(spool));
    let archive = crate::pipeline::blocking(move || {
        open_archive(settings, &last, spool, status, CatalogPlace::Disk)
    })
    .await?;
    let pipeline = Pipeline::start(Arc::new(archive)).await?;
    let drained = pipeline.drain().await;
    let stopped = pipeline.stop().await;
    drained.and(stopped)
}

fn remove(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io("remove", directory)(error))
        }
        _ => Ok(()),
    }
}
