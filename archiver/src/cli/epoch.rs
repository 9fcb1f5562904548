//! `wal-archiver epoch begin`: the operator's word that the server has a new system identifier on purpose: after
//! `pg_upgrade`, or made anew by `initdb`.
//!
//! Invariant: what the spool still holds of the old epoch is in the repository before the new one begins, so both are whole.

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
    supervisor::open_archive,
};

pub(super) fn begin(settings: &ClusterSettings, system: SystemIdentifier) -> Result<()> {
    let repository = Repository::open(&settings.repository, &settings.name)?;
    let usage = |message: String| Error::Usage { message };
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
    let conninfo = ConnInfo::parse(&settings.conninfo)?;
    let (source, version) = runtime.block_on(Source::connect(&conninfo, &settings.name))?;
    let found = source.identity().clone();
    if found.system_identifier != system {
        return Err(usage(format!(
            "the server at {} has system identifier {}, not {system}: nothing was changed",
            conninfo.places(),
            found.system_identifier
        )));
    }
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
    let archive =
        crate::pipeline::blocking(move || open_archive(settings, &last, spool, status)).await?;
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
