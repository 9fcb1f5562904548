//! `wal-archiver remove`: ends the archiving of a cluster on its servers. Drops our slot on the
//! primary and on each standby, and prints what remains.
//!
//! Invariant: no slot of another cluster's server is dropped, and none while an archiver uses it.

use std::{path::Path, time::Duration};

use replication::{ConnInfo, ConnectionMode, ReplicationClient};
use repository::{Repository, config::ClusterSettings};
use wal_format::{OutcomeKind, SystemIdentifier};

use super::{output, runtime};
use crate::{
    error::{Error, Result},
    primary::{
        conninfo,
        synchronous::{Membership, membership},
    },
    spool::Spool,
    upkeep::{outcomes, standby_slots::Standby},
};

/// The time limit for one server.
const SERVER_TIMEOUT: Duration = Duration::from_secs(30);

/// Removes the cluster. `file` is the configuration file; `settings.file` is `None` if it does not
/// contain the cluster.
pub(super) fn remove(settings: &ClusterSettings, file: Option<&Path>, dry_run: bool) -> Result<()> {
    let began = jiff::Timestamp::now();
    // The lock is held to the end, so that no daemon starts meanwhile and creates the slots again.
    let directory = settings.spool.join(settings.name.as_str());
    let lock = match directory.is_dir() && !dry_run {
        true => Some(
            Spool::open(&settings.spool, &settings.name)
                .map_err(|error| explain_lock(error, settings))?,
        ),
        false => None,
    };
    // Without the repository, the slot's name alone says that it is ours.
    let system = Repository::open_known(settings).and_then(|repository| repository.identity());
    if settings.file.is_none()
        && file.is_some()
        && !directory.is_dir()
        && matches!(system, Ok(None))
    {
        return Err(Error::Usage {
            message: format!(
                "cluster {} is not in the file, {} holds nothing of it, and there is no spool {}: check --cluster, \
                 --repository and --spool",
                settings.name,
                settings.repository,
                directory.display()
            ),
        });
    }
    let system = system
        .ok()
        .flatten()
        .map(|identity| identity.system_identifier);
    let runtime = runtime()?;
    let servers = std::iter::once(("primary", &settings.conninfo))
        .chain(settings.standbys.iter().map(|standby| ("standby", standby)));
    let mut failed = Vec::new();
    let mut worst = None;
    let mut said = Vec::new();
    for (role, conninfo) in servers {
        let conninfo = conninfo::of_server(conninfo, settings)?;
        let place = format!("{role} {}", conninfo.places());
        let dropped = runtime.block_on(async {
            tokio::time::timeout(
                SERVER_TIMEOUT,
                drop_slot(&conninfo, settings, system, dry_run),
            )
            .await
            .unwrap_or(Err(Error::Silent {
                seconds: SERVER_TIMEOUT.as_secs(),
            }))
        });
        match dropped {
            Ok(text) => {
                said.push(format!("{place}: {text}"));
                output::line(&format!("cluster {}: {place}: {text}", settings.name));
            }
            Err(error) => {
                said.push(format!("{place}: the slot was not dropped: {error}"));
                output::line(&format!(
                    "cluster {}: {place}: the slot was not dropped: {error}",
                    settings.name
                ));
                worst = worst.max(Some(error.exit_kind()));
                failed.push(place);
            }
        }
    }
    if !dry_run {
        let said = said.join("; ");
        let result = worst.map_or(Ok(said.as_str()), |_| Err(said.as_str()));
        outcomes::record(settings, OutcomeKind::Remove, began, result);
    }
    remains(settings, file, &directory);
    drop(lock);
    match worst {
        None => Ok(()),
        Some(kind) => Err(Error::Remove {
            problem: format!(
                "{} may still hold the slot \"{}\", which keeps WAL without limit: run this command again, or `SELECT \
                 pg_drop_replication_slot('{}')` there",
                failed.join(" and "),
                settings.slot,
                settings.slot
            ),
            kind,
        }),
    }
}

/// Adds the remedy to the error of a spool that a daemon has locked.
fn explain_lock(error: Error, settings: &ClusterSettings) -> Error {
    let Error::SpoolLocked { .. } = error else {
        return error;
    };
    let name = &settings.name;
    Error::Usage {
        message: format!(
            "an archiver streams cluster {name}. If it archives other clusters too, delete [cluster.{name}] from its \
             file, reload it (SIGHUP), and run `wal-archiver remove --cluster {name} --conninfo …`; else stop it first"
        ),
    }
}

/// Drops our slot on one server. Returns a description of the result.
async fn drop_slot(
    conninfo: &ConnInfo,
    settings: &ClusterSettings,
    system: Option<SystemIdentifier>,
    dry_run: bool,
) -> Result<String> {
    let name = &settings.slot;
    let refused = |message: String| Err(Error::Usage { message });
    let mut server = Standby::look(conninfo, name).await?;
    if system.is_some_and(|system| system != server.system_identifier) {
        return refused(format!(
            "the server is another cluster (system identifier {})",
            server.system_identifier
        ));
    }
    let warning = synchronous_warning(conninfo).await;
    match &server.slot {
        // Before 15, a role without SQL cannot see slots; the server says if there is none.
        None if dry_run => return Ok(format!("no slot \"{name}\" is seen{warning}")),
        Some(slot) if !slot.physical => {
            return refused(format!("\"{name}\" is a logical slot and not ours"));
        }
        Some(slot) if dry_run => {
            let from = slot
                .restart_lsn
                .map_or_else(String::new, |lsn| format!(" and its WAL from {lsn}"));
            let used = match slot.active {
                true => ". An archiver uses it now, and must stop that first",
                false => "",
            };
            return Ok(format!(
                "would drop the slot \"{name}\"{from}{used}{warning}"
            ));
        }
        Some(slot) if slot.active => {
            return refused(format!(
                "an archiver uses the slot \"{name}\": stop `wal-archiver run`, or delete [cluster.{}] from its file, reload it \
                 (SIGHUP), and run this command again with --cluster {} and --conninfo",
                settings.name, settings.name
            ));
        }
        None | Some(_) => {}
    }
    match server.drop_slot(name).await {
        Ok(()) => Ok(format!("the slot \"{name}\" is dropped{warning}")),
        Err(error) if error.is_missing_object() => {
            Ok(format!("there is no slot \"{name}\"{warning}"))
        }
        Err(error) => Err(error.into()),
    }
}

/// Returns a warning if commits on the server wait for this archiver. Empty if not, or if the role
/// may not see it.
async fn synchronous_warning(conninfo: &ConnInfo) -> String {
    let names = async {
        let mut client = ReplicationClient::connect(conninfo, ConnectionMode::Physical).await?;
        let names = client.show("synchronous_standby_names").await?;
        client.close().await;
        Ok::<_, replication::Error>(names)
    };
    let Ok(names) = names.await else {
        return String::new();
    };
    match membership(&names, conninfo.application_name()) {
        Membership::Asynchronous => String::new(),
        _ => format!(
            ". WARNING: synchronous_standby_names = '{names}' names this archiver: commits wait for it; remove it there"
        ),
    }
}

/// Prints what this command leaves in place.
fn remains(settings: &ClusterSettings, file: Option<&Path>, directory: &Path) {
    output::line("what remains, and is yours to remove:");
    output::line(&format!(
        "  {}: the archive of cluster {}, which can be restored as before",
        settings.repository, settings.name
    ));
    if directory.is_dir() {
        output::line(&format!(
            "  {}: the spool and the catalog. After a clean stop the repository holds all of its WAL (`wal-archiver status`)",
            directory.display()
        ));
    }
    match &settings.file {
        Some(file) => output::line(&format!(
            "  {}: the settings of cluster {}",
            file.display(),
            settings.name
        )),
        None if file.is_some() => {}
        None => output::line("  the service or script that starts `wal-archiver run`"),
    }
    output::line(
        "  on the server: the role, its lines in pg_hba.conf, archive_command if it runs `wal-archiver push`",
    );
}
