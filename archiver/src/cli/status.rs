//! `wal-archiver status`: queries the running daemon. If none answers, reads the repository, the
//! catalog and the spool.

use catalog::Catalog;
use repository::{
    Repository,
    config::{ClusterSettings, Settings},
};
use serde::Serialize;
use wal_format::{BackupId, Branch, ClusterName, Lsn, PgTimestamp, SystemIdentifier, WalIdentity};

use super::{daemon, facts, output};
use crate::{error::Result, spool};

pub(super) fn status(settings: &Settings, json: bool) -> Result<()> {
    let answered = daemon::reports(settings);
    let mut documents = Vec::new();
    for cluster in &settings.clusters {
        let of_daemon = answered
            .iter()
            .find(|report| report["cluster"] == cluster.name.as_str());
        if let Some(report) = of_daemon {
            if !json {
                for line in facts::lines(report) {
                    output::line(&line);
                }
            }
            documents.push(report.clone());
            continue;
        }
        let stored = Stored::look(cluster)?;
        if !json {
            stored.print(cluster);
        }
        documents.extend(serde_json::to_value(&stored));
    }
    if json {
        output::json(&documents);
    }
    Ok(())
}

/// The state found without a daemon.
#[derive(Debug, Serialize)]
struct Stored {
    cluster: ClusterName,
    daemon: Option<bool>,
    repository: String,
    system_identifier: Option<SystemIdentifier>,
    postgresql_major: Option<u16>,
    branches: Vec<StoredBranch>,
    backups: Vec<StoredBackup>,
}

#[derive(Debug, Serialize)]
struct StoredBranch {
    branch: Branch,
    first_lsn: Option<Lsn>,
    remote_lsn: Option<Lsn>,
    local_lsn: Option<Lsn>,
}

#[derive(Debug, Serialize)]
struct StoredBackup {
    id: BackupId,
    start_lsn: Lsn,
    stop_lsn: Lsn,
    finished: PgTimestamp,
    stored_bytes: u64,
}

impl Stored {
    fn look(settings: &ClusterSettings) -> Result<Self> {
        let repository = Repository::open_known(settings)?;
        let mut stored = Self {
            cluster: settings.name.clone(),
            daemon: Some(false),
            repository: settings.repository.to_string(),
            system_identifier: None,
            postgresql_major: None,
            branches: Vec::new(),
            backups: Vec::new(),
        };
        let Some(identity) = repository.identity()? else {
            return Ok(stored);
        };
        stored.system_identifier = Some(identity.system_identifier);
        stored.postgresql_major = Some(identity.postgresql_major.major());
        let catalog = Catalog::open_for_restore(Some(&settings.catalog), &repository)?;
        for (branch, _, _) in catalog.branches()? {
            let ranges = catalog.ranges(branch, Lsn::ZERO, Lsn::MAX)?;
            stored.branches.push(StoredBranch {
                branch,
                first_lsn: ranges.first().map(|range| range.start_lsn),
                remote_lsn: ranges.iter().map(|range| range.end_lsn).max(),
                local_lsn: None,
            });
        }
        let wal = WalIdentity {
            version: identity.postgresql_major,
            system_identifier: identity.system_identifier,
            segment_size: identity.wal_segment_size,
        };
        let directory = settings.spool.join(settings.name.as_str());
        for spool in spool::branches(&directory, &wal)? {
            let local_lsn = spool.end_lsn()?;
            let known = stored
                .branches
                .iter_mut()
                .find(|known| known.branch == spool.branch());
            match known {
                Some(known) => known.local_lsn = local_lsn,
                None => stored.branches.push(StoredBranch {
                    branch: spool.branch(),
                    first_lsn: None,
                    remote_lsn: None,
                    local_lsn,
                }),
            }
        }
        stored.backups = catalog
            .backups()?
            .into_iter()
            .map(|backup| StoredBackup {
                id: backup.id,
                start_lsn: backup.start_lsn,
                stop_lsn: backup.stop_lsn,
                finished: backup.finished,
                stored_bytes: backup.stored_bytes,
            })
            .collect();
        Ok(stored)
    }

    fn print(&self, settings: &ClusterSettings) {
        output::line(&format!("cluster {}", self.cluster));
        output::line("  state         no daemon answers; this is what repository and spool hold");
        output::line(&format!("  repository    {}", self.repository));
        output::line(&format!("  spool         {}", settings.spool.display()));
        let Some(system) = self.system_identifier else {
            output::line("  archived      nothing yet: start `wal-archiver run`");
            return;
        };
        output::line(&format!("  system        {system}"));
        let show =
            |lsn: Option<Lsn>| lsn.map_or_else(|| "nothing".to_owned(), |lsn| lsn.to_string());
        for branch in &self.branches {
            output::line(&format!(
                "  timeline {}: repository {} to {}, {}",
                branch.branch,
                show(branch.first_lsn),
                show(branch.remote_lsn),
                // WAL that the repository holds too may still be in the spool.
                match branch
                    .local_lsn
                    .filter(|local| Some(*local) > branch.remote_lsn)
                {
                    Some(local) => format!("spool to {local}"),
                    None => "the spool has no more".to_owned(),
                }
            ));
        }
        if self.backups.is_empty() {
            output::line(
                "  backups       none: run `wal-archiver backup`, without one nothing can be restored",
            );
        }
        for backup in &self.backups {
            output::line(&format!(
                "  backup {} finished {} ({})",
                backup.id,
                backup.finished,
                output::bytes(backup.stored_bytes)
            ));
        }
    }
}
