//! `wal-archiver check`: checks every precondition and prints a line for each, with the remedy.
//! Changes nothing.

use dashboard::http::tls_expiry;
use replication::{ConnInfo, ConnectionMode, ReplicationClient};
use repository::{
    ExitKind, Repository,
    config::{ClusterSettings, Settings},
};
use serde_json::Value;
use wal_format::{PgVersion, SystemIdentifier};

use self::report::Report;
use super::{daemon, output, places, runtime};
use crate::{
    error::{Error, Result},
    primary::{
        conninfo,
        synchronous::{self, Membership, Standbys, danger, membership},
    },
    spool,
    upkeep::standby_slots::Standby,
};

mod beside;
mod disk;
mod neighbours;
mod report;

/// Less free space than this in the spool is reported. At 16 MiB of WAL per minute, a store that is
/// down for an hour fills it.
const SPOOL_FREE_MIN: u64 = 1 << 30;

pub(super) fn check(settings: &Settings, is_json: bool) -> Result<()> {
    let runtime = runtime()?;
    let mut report = Report::new(is_json);
    beside::descriptors(settings.clusters.len(), &mut report);
    let reports = daemon::reports(settings);
    let shared_slots = places::shared_slots(settings);
    let mut seen: Vec<(SystemIdentifier, &ClusterSettings)> = Vec::new();
    for cluster in &settings.clusters {
        report.begin(Some(cluster.name.as_str()));
        let system = runtime.block_on(server(cluster, &reports, &mut report));
        let by_address = shared_slots.iter().find(|(of, _)| of.name == cluster.name);
        let same = |(other, with): &&(SystemIdentifier, &ClusterSettings)| {
            Some(*other) == system && with.slot == cluster.slot
        };
        let by_identifier = seen.iter().find(same);
        let by_identifier = by_identifier.map(|(_, other)| places::shared_slot(other, cluster));
        if let Some(problem) = by_identifier.or_else(|| by_address.map(|(_, said)| said.clone())) {
            report.fail("slot", &problem, ExitKind::Usage);
        }
        seen.extend(system.map(|system| (system, cluster)));
        for conninfo in &cluster.standbys {
            runtime.block_on(standby(conninfo, cluster, system, &mut report));
        }
        if let Some(problem) = places::inside_server(cluster).or_else(|| places::nested(cluster)) {
            report.fail("directories", &problem, ExitKind::Usage);
        }
        store(cluster, system, &mut report);
        local(cluster, system, &mut report);
        neighbours::shared(cluster, &mut report);
        neighbours::foreign_files(cluster, &mut report);
        beside::backups(cluster, &mut report);
        beside::retention(cluster, &mut report);
    }
    beside::dashboard(settings, &reports, &mut report);
    report.finish()
}

/// Checks the server's settings and the role's privileges. Returns the server's system identifier,
/// if it answers.
async fn server(
    cluster: &ClusterSettings,
    reports: &[Value],
    report: &mut Report,
) -> Option<SystemIdentifier> {
    let conninfo = match conninfo::of_cluster(cluster) {
        Ok(conninfo) => conninfo,
        Err(error) => {
            report.fail_with("conninfo", &error.into());
            return None;
        }
    };
    let connected = ReplicationClient::connect(&conninfo, ConnectionMode::Physical).await;
    let mut client = match connected {
        Ok(client) => client,
        Err(error) => {
            report.fail_with("replication connection", &error.into());
            return None;
        }
    };
    let version = client.server_version().clone();
    let encryption = client.encryption();
    let encryption =
        encryption.map_or_else(|| "without TLS".to_owned(), |tls| format!("with {tls}"));
    report.ok(
        "replication connection",
        &format!("established {encryption}, the role may replicate"),
    );
    let major = u16::try_from(version.num / 10_000).unwrap_or(u16::MAX);
    match PgVersion::try_from(major) {
        Ok(_) => report.ok("server version", &version.text),
        Err(error) => report.fail("server version", &error.to_string(), ExitKind::Usage),
    }
    if let Err(error) = server_settings(&mut client, report).await {
        report.fail_with("server settings", &error);
    }
    let mut sql = ReplicationClient::connect(client.conninfo(), ConnectionMode::Sql).await;
    if let Err(error) = synchronous(&mut client, sql.as_mut().ok(), report).await {
        report.fail_with("synchronous standby", &error);
    }
    let sees_slots = sql.is_ok() || version.num >= 150_000;
    let mut other_holder = None;
    match sql {
        Ok(mut sql) => {
            report.ok(
                "SQL connection",
                "established: the RPO of an idle server is known too",
            );
            if let Err(error) = beside::configuration(&mut sql, report).await {
                report.fail_with("configuration", &error);
            }
            if let Err(error) = beside::server(&mut sql, &cluster.slot, report).await {
                report.fail_with("server's room", &error);
            }
            if let Err(error) = neighbours::archiver(&mut sql, report).await {
                report.fail_with("server's archiver", &error);
            }
            match neighbours::other_holder(&mut sql, cluster, reports).await {
                Ok(holder) => other_holder = holder,
                Err(error) => report.fail_with("replication slot", &error),
            }
            sql.close().await;
        }
        Err(error) => report.note(
            "SQL connection",
            &format!("refused, so the RPO is known from the stream only ({error})"),
        ),
    }
    match client.slot(&cluster.slot).await {
        Ok(Some(_)) if other_holder.is_some() => report.fail(
            "replication slot",
            &format!(
                "\"{}\" is in use by {}, which is not the daemon of this configuration: only one archiver can stream with \
                 it. Stop the other one, or name another slot as slot in the configuration",
                cluster.slot,
                other_holder.unwrap_or_default()
            ),
            ExitKind::Usage,
        ),
        Ok(None) if !sees_slots => report.note(
            "replication slot",
            "not to be seen without SQL before PostgreSQL 15; `wal-archiver run` creates it when it is missing",
        ),
        Ok(None) => report.note(
            "replication slot",
            &format!(
                "\"{}\" does not exist yet; `wal-archiver run` creates it",
                cluster.slot
            ),
        ),
        Ok(Some(slot)) if !slot.physical => report.fail(
            "replication slot",
            &format!(
                "\"{}\" is a logical slot; name another one as slot in the configuration",
                cluster.slot
            ),
            ExitKind::Usage,
        ),
        Ok(Some(slot)) if slot.wal_status.as_deref() == Some("lost") => report.fail(
            "replication slot",
            &format!(
                "\"{}\" was invalidated; `wal-archiver run` creates it again, WAL may be missing",
                cluster.slot
            ),
            ExitKind::Integrity,
        ),
        Ok(Some(slot)) => {
            let from = slot
                .restart_lsn
                .map_or_else(|| "nothing yet".to_owned(), |lsn| format!("WAL from {lsn}"));
            let active = if slot.active { ", in use" } else { "" };
            report.ok(
                "replication slot",
                &format!("\"{}\" keeps {from}{active}", cluster.slot),
            );
        }
        Err(error) => report.fail_with("replication slot", &error.into()),
    }
    let identified = client.identify_system().await;
    client.close().await;
    match identified {
        Ok(system) => {
            report.ok(
                "server",
                &format!(
                    "system identifier {}, timeline {}, WAL up to {}",
                    system.system_identifier, system.timeline, system.flush_lsn
                ),
            );
            Some(system.system_identifier)
        }
        Err(error) => {
            report.fail_with("server", &error.into());
            None
        }
    }
}

/// Checks that a standby retains WAL for us, so that a failover to it needs no new base backup.
async fn standby(
    conninfo: &str,
    cluster: &ClusterSettings,
    system: Option<SystemIdentifier>,
    report: &mut Report,
) {
    let conninfo = match ConnInfo::parse(conninfo) {
        Ok(conninfo) => conninfo,
        Err(error) => return report.fail_with("standbys", &error.into()),
    };
    let what = format!("standby {}", conninfo.places());
    let found = async {
        let mut found = Standby::look(&conninfo, &cluster.slot).await?;
        let (sql, in_recovery) = found.sql().await?;
        sql.close().await;
        Ok::<_, replication::Error>((found, in_recovery))
    };
    let (found, in_recovery) = match found.await {
        Ok(found) => found,
        Err(error) => return report.fail_with(&what, &error.into()),
    };
    let slot = &cluster.slot;
    let of_primary = ConnInfo::parse(&cluster.conninfo).map(|primary| primary.places());
    let is_in_conninfo = of_primary.is_ok_and(|of_primary| {
        let own = conninfo.places();
        of_primary.split(", ").any(|place| place == own)
    });
    let lost = |wal_status: &str| wal_status == "lost";
    match found.slot {
        _ if system.is_some_and(|system| system != found.system_identifier) => report.fail(
            &what,
            &format!(
                "is another cluster (system identifier {}); remove it from standbys",
                found.system_identifier
            ),
            ExitKind::Usage,
        ),
        _ if !in_recovery => report.note(
            &what,
            match is_in_conninfo {
                true => "is a primary at the moment, and conninfo names it: the archiver follows a failover to it",
                false => {
                    "is a primary at the moment; put it into conninfo's list of hosts to follow a failover to it"
                }
            },
        ),
        None => report.note(
            &what,
            &format!("has no slot \"{slot}\" yet; `wal-archiver run` creates it"),
        ),
        Some(found) if !found.physical => report.fail(
            &what,
            &format!("\"{slot}\" is a logical slot there; name another one as slot in the configuration"),
            ExitKind::Usage,
        ),
        Some(found) if found.wal_status.as_deref().is_some_and(lost) => report.fail(
            &what,
            &format!("has invalidated \"{slot}\"; `wal-archiver run` creates it again"),
            ExitKind::Integrity,
        ),
        Some(found) => {
            let from = found
                .restart_lsn
                .map_or_else(|| "nothing yet".to_owned(), |lsn| format!("WAL from {lsn}"));
            report.ok(&what, &format!("\"{slot}\" keeps {from} there"));
        }
    }
}

/// Checks whether commits wait for us, and whether the settings for that are sound.
async fn synchronous(
    client: &mut ReplicationClient,
    sql: Option<&mut ReplicationClient>,
    report: &mut Report,
) -> Result<()> {
    let names = client.show("synchronous_standby_names").await?;
    let remote_apply = client.show("synchronous_commit").await? == "remote_apply";
    let membership = membership(&names, client.conninfo().application_name());
    let what = "synchronous standby";
    let ours = client.conninfo().application_name().to_owned();
    let connected = match sql {
        Some(sql) => synchronous::connected(sql).await?,
        None => None,
    };
    let standbys = connected.as_ref().map(|connected| {
        let count = connected.iter().filter(|one| one.is_waited_for()).count();
        Standbys::new(&names, count)
    });
    // Commits wait for all of the first standbys, or for a number of any of them.
    let is_certain = connected.zip(standbys).map(|(connected, standbys)| {
        let is_all = standbys.required >= standbys.named;
        connected.iter().any(|one| {
            let is_waited_for = one.state == "sync" || (one.state == "quorum" && is_all);
            one.name.eq_ignore_ascii_case(&ours) && is_waited_for
        })
    });
    let danger = danger(&membership, remote_apply);
    if danger.is_none()
        && let Some(waiting) = standbys.and_then(Standbys::waiting)
    {
        report.fail(what, waiting, ExitKind::Failed);
    }
    match (danger, membership) {
        (Some(danger), _) => report.fail(what, danger, ExitKind::Usage),
        (None, Membership::Asynchronous) => report.note(
            what,
            "no: a crash of the server may lose the newest commits; name us in synchronous_standby_names for an RPO of 0",
        ),
        (None, _) => match is_certain {
            Some(true) => report.ok(what, "yes, as named: an acknowledged commit is safe here"),
            Some(false) => report.note(
                what,
                "named, but commits do not wait for this archiver now: it is not connected, or other standbys are enough",
            ),
            None => report.note(
                what,
                "named; this role may not see if commits wait for this archiver: grant it pg_monitor",
            ),
        },
    }
    Ok(())
}

async fn server_settings(client: &mut ReplicationClient, report: &mut Report) -> Result<()> {
    if client.server_version().num >= 180_000 {
        let timeout = client.show("idle_replication_slot_timeout").await?;
        if timeout != "0" {
            report.note(
                "idle_replication_slot_timeout",
                &format!("{timeout}: an archiver that is away for longer loses its slot, and with it WAL; set it to 0"),
            );
        }
    }
    let wal_level = client.show("wal_level").await?;
    if wal_level == "minimal" {
        report.fail(
            "wal_level",
            "minimal; set wal_level = replica and restart the server",
            ExitKind::Usage,
        );
    } else {
        report.ok("wal_level", &wal_level);
    }
    let full_page_writes = client.show("full_page_writes").await?;
    if full_page_writes == "on" {
        report.ok("full_page_writes", "on");
    } else {
        report.note(
            "full_page_writes",
            "off; a backup taken from a standby is refused then",
        );
    }
    let keep = client.show("max_slot_wal_keep_size").await?;
    if keep == "-1" {
        report.note(
            "max_slot_wal_keep_size",
            "-1: the slot keeps WAL without limit while the archiver is away; mind the server's disk",
        );
    } else {
        report.note(
            "max_slot_wal_keep_size",
            &format!("{keep}: an archiver that is further behind loses WAL for ever"),
        );
    }
    Ok(())
}

fn store(cluster: &ClusterSettings, system: Option<SystemIdentifier>, report: &mut Report) {
    let opened = Repository::open_known(cluster).and_then(|repository| {
        repository.ready_to_write()?;
        Ok((repository.lacks_place()?, repository.identity()?))
    });
    let (lacks_place, identity) = match opened {
        Ok(opened) => opened,
        Err(error) => return report.fail_with("repository", &error.into()),
    };
    if lacks_place {
        report.note(
            "repository",
            &format!(
                "{} does not exist; `wal-archiver run` creates it. If it should be there, mount it first",
                cluster.repository
            ),
        );
    } else {
        report.ok(
            "repository",
            &format!("{} can be read and written", cluster.repository),
        );
    }
    match (identity, system) {
        (None, _) => report.note("identity", "the repository holds nothing of this cluster yet"),
        (Some(stored), Some(found)) if stored.system_identifier != found => report.fail(
            "identity",
            &format!(
                "the repository belongs to system identifier {}, the server is {found}; after pg_upgrade begin a new epoch with \
                 `wal-archiver epoch begin --system-identifier {found}`, else use another --cluster name",
                stored.system_identifier
            ),
            ExitKind::Usage,
        ),
        (Some(stored), _) => report.ok(
            "identity",
            &format!("system identifier {}", stored.system_identifier),
        ),
    }
}

fn local(cluster: &ClusterSettings, system: Option<SystemIdentifier>, report: &mut Report) {
    let directory = cluster.spool.join(cluster.name.as_str());
    match spool::writable(&directory) {
        Ok(Some(free)) if free < SPOOL_FREE_MIN => report.note(
            "spool",
            &format!(
                "{} has only {} free; WAL waits there while the repository is away",
                directory.display(),
                output::bytes(free)
            ),
        ),
        Ok(free) => report.ok(
            "spool",
            &format!(
                "{} can be written, {} free",
                directory.display(),
                free.map_or_else(|| "unknown".to_owned(), output::bytes)
            ),
        ),
        Err(error @ Error::SpoolDenied { .. }) => return report.fail_with("spool", &error),
        Err(error) => {
            let remedy = "name another directory with --spool or the key spool";
            return report.fail("spool", &format!("{error}; {remedy}"), error.exit_kind());
        }
    }
    disk::journal(&directory, report);
    disk::memory(&directory, report);
    report.note(
        "when_full",
        &format!("{}: {}", cluster.when_full.name(), cluster.when_full.cost()),
    );
    match spool::stored_identity(&directory) {
        Ok(Some(held)) if system.is_some_and(|system| system != held.system_identifier) => {
            report.fail(
                "spool identity",
                &format!(
                    "it holds WAL of system identifier {}; give this cluster another --spool",
                    held.system_identifier
                ),
                ExitKind::Usage,
            );
        }
        Ok(_) => {}
        Err(error) => report.fail_with("spool identity", &error),
    }
}
