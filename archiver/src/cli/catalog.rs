//! `wal-archiver catalog rebuild`: rebuilds the catalog, which is a cache, from the repository
//! alone.

use std::{fs, io};

use catalog::Catalog;
use repository::{LossRecord, Repository, config::Settings};

use super::output;
use crate::{
    error::{Error, Result},
    verify::losses,
};

pub(super) fn rebuild(settings: &Settings) -> Result<()> {
    for cluster in &settings.clusters {
        let repository = Repository::open_known(cluster)?;
        let identity = repository.identity()?.ok_or_else(|| Error::Usage {
            message: format!(
                "the repository {} holds nothing of cluster {}; check --repository and --cluster",
                cluster.repository, cluster.name
            ),
        })?;
        // Opened first, so that the catalog of a running daemon, which is locked, is not removed. A
        // damaged one may be removed.
        match Catalog::open(&cluster.catalog, &identity) {
            Err(error) if error.is_locked() => return Err(error.into()),
            _ => {}
        }
        // Done before the old catalog is removed: only that catalog may know what the repository
        // has lost.
        let missing = losses::of(cluster, &identity, &repository, false)?;
        if let Some(error) = missing.older_state(&repository) {
            return Err(error.into());
        }
        LossRecord::of(cluster).add(&missing.losses)?;
        match fs::remove_dir_all(&cluster.catalog) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io("remove", &cluster.catalog)(error));
            }
            _ => {}
        }
        let report = Catalog::open(&cluster.catalog, &identity)?.refresh(&repository)?;
        output::line(&format!(
            "cluster {}: catalog rebuilt from {}: {report:?}",
            cluster.name, cluster.repository
        ));
    }
    Ok(())
}
