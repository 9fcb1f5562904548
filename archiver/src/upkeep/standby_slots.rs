//! Maintains our slot on the standbys in the setting `standbys`, so that a standby that is promoted
//! still has the WAL that we need.
//!
//! Physical slots are not copied to standbys. Without our slot, a promoted standby may have removed
//! WAL that was never archived. Each slot is created as soon as the standby is reached. It is
//! advanced to the acknowledged LSN at once and then every minute. Invariant: a slot never passes
//! the end of the WAL that is durable in the chosen class, and is advanced only on the timeline
//! that is archived.

use std::time::Duration;

use replication::{ConnInfo, ConnectionMode, ReplicationClient, Result, SlotInfo};
use repository::config::ClusterSettings;
use status::{cluster_status::ClusterStatus, standby::StandbyReport};
use wal_format::{Branch, Lsn, SystemIdentifier, TimelineId};

use crate::core::{live_cluster::LiveCluster, progress::Progress};

/// The interval at which the slots are advanced. Each standby retains about one more minute of WAL
/// than needed.
const KEEP_INTERVAL: Duration = Duration::from_secs(60);
/// The interval at which the standbys are tried again while one has a problem, or while nothing was
/// acknowledged yet.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);
/// The time limit for one standby, so that a standby that hangs does not block the others.
const STANDBY_TIMEOUT: Duration = Duration::from_secs(30);

/// The state of a standby, found without changing anything.
#[derive(Debug)]
pub(crate) struct Standby {
    client: ReplicationClient,
    /// The system identifier of its cluster.
    pub(crate) system_identifier: SystemIdentifier,
    /// The timeline that it follows.
    pub(crate) timeline: TimelineId,
    /// Our slot on it. `None` if there is none.
    pub(crate) slot: Option<SlotInfo>,
}

impl Standby {
    /// Connects to the standby and reads its state.
    pub(crate) async fn look(conninfo: &ConnInfo, slot: &str) -> Result<Self> {
        let mut client = ReplicationClient::connect(conninfo, ConnectionMode::Physical).await?;
        let system = client.identify_system().await?;
        let slot = client.slot(slot).await?;
        Ok(Self {
            client,
            system_identifier: system.system_identifier,
            timeline: system.timeline,
            slot,
        })
    }

    /// Drops a slot.
    pub(crate) async fn drop_slot(&mut self, slot: &str) -> Result<()> {
        self.client.drop_slot(slot).await
    }

    /// Returns an SQL connection for further queries, and whether the server is in recovery.
    pub(crate) async fn sql(&mut self) -> Result<(ReplicationClient, bool)> {
        let place = self.client.conninfo();
        let mut sql = Box::pin(ReplicationClient::connect(place, ConnectionMode::Sql)).await?;
        let answer = sql.query("SELECT pg_is_in_recovery()::text").await?;
        let standby = answer.into_iter().flatten().flatten().next();
        Ok((sql, standby.as_deref() == Some("true")))
    }
}

/// Maintains the slots until the task is aborted.
pub(crate) async fn keep(settings: ClusterSettings, live: LiveCluster) {
    let status = &live.status;
    if settings.standbys.is_empty() {
        return;
    }
    loop {
        let mut reports = Vec::with_capacity(settings.standbys.len());
        let moved_to = acknowledged(&live.progress);
        for conninfo in &settings.standbys {
            reports.push(keep_one(conninfo, &settings, &live).await);
        }
        tell(&settings, status, &reports);
        let settled = moved_to.is_some() && reports.iter().all(|report| report.problem.is_none());
        status.note(|facts| facts.standbys = reports);
        tokio::time::sleep(if settled {
            KEEP_INTERVAL
        } else {
            RETRY_INTERVAL
        })
        .await;
    }
}

/// Logs each change once.
fn tell(settings: &ClusterSettings, status: &ClusterStatus, reports: &[StandbyReport]) {
    let before = status.facts().standbys;
    for report in reports {
        let known = before.iter().find(|known| known.server == report.server);
        let known_problem = known.and_then(|known| known.problem.as_ref());
        let (cluster, server) = (&settings.name, &report.server);
        match &report.problem {
            Some(problem) if known_problem != Some(problem) => {
                tracing::warn!(%cluster, %server, %problem, "the slot on a standby cannot be maintained");
            }
            None if known.is_none_or(|known| known.problem.is_some()) => {
                tracing::info!(%cluster, %server, slot = settings.slot, "the slot on a standby is maintained");
            }
            _ => {}
        }
    }
}

/// Returns the archived branch and its acknowledged LSN. No WAL before it is needed from any
/// server.
fn acknowledged(progress: &Progress) -> Option<(Branch, Lsn)> {
    let flush = progress.acknowledgements().borrow().flush.lsn();
    (flush > Lsn::ZERO).then(|| (progress.positions().branch(), flush))
}

async fn keep_one(conninfo: &str, settings: &ClusterSettings, live: &LiveCluster) -> StandbyReport {
    let (server, outcome) = match ConnInfo::parse(conninfo) {
        Ok(conninfo) => {
            let kept = tokio::time::timeout(STANDBY_TIMEOUT, keep_at(&conninfo, settings, live));
            let seconds = STANDBY_TIMEOUT.as_secs();
            let outcome = kept
                .await
                .map_err(|_| format!("it did not answer within {seconds} s"))
                .and_then(|kept| kept.map_err(|error| error.to_string()));
            (conninfo.places(), outcome)
        }
        Err(error) => ("standbys".to_owned(), Err(error.to_string())),
    };
    let (restart_lsn, problem) = match outcome {
        Ok(Kept::At(lsn)) => (lsn, None),
        Ok(Kept::Not(problem)) | Err(problem) => (None, Some(problem)),
    };
    StandbyReport {
        server,
        restart_lsn,
        problem,
    }
}

/// The outcome for one standby.
enum Kept {
    /// The slot exists. Contains the LSN from which it retains WAL.
    At(Option<Lsn>),
    /// The slot is not usable, for this reason.
    Not(String),
}

async fn keep_at(
    conninfo: &ConnInfo,
    settings: &ClusterSettings,
    live: &LiveCluster,
) -> Result<Kept> {
    let mut standby = Standby::look(conninfo, &settings.slot).await?;
    let ours = live.status.facts().system_identifier;
    if ours.is_some_and(|ours| ours != standby.system_identifier) {
        return Ok(Kept::Not(format!(
            "it is another cluster (system identifier {}); remove it from standbys",
            standby.system_identifier
        )));
    }
    let lost = |slot: &SlotInfo| slot.wal_status.as_deref() == Some("lost");
    if standby.slot.as_ref().is_some_and(lost) {
        tracing::warn!(cluster = %settings.name, server = %conninfo.places(), slot = settings.slot, "a standby has invalidated our slot; it is created again");
        standby.client.drop_slot(&settings.slot).await?;
        standby.slot = None;
    }
    if standby.slot.is_none() {
        standby.client.create_slot(&settings.slot, true).await?;
        standby.slot = standby.client.slot(&settings.slot).await?;
    }
    let Some(slot) = standby.slot.take() else {
        return Ok(Kept::Not(
            "the slot cannot be seen: let the role connect to the database too (pg_hba.conf)"
                .to_owned(),
        ));
    };
    if !slot.physical {
        let problem = format!(
            "\"{}\" is a logical slot there; name another one as slot",
            settings.slot
        );
        return Ok(Kept::Not(problem));
    }
    // The stream itself advances the slot that it uses.
    if slot.active {
        return Ok(Kept::At(slot.restart_lsn));
    }
    let (mut sql, in_recovery) = standby.sql().await?;
    if !in_recovery {
        return Ok(Kept::Not(
            "it is a primary and not a standby; after a failover to it, put it into conninfo"
                .to_owned(),
        ));
    }
    let Some((branch, target)) = acknowledged(&live.progress) else {
        return Ok(Kept::At(slot.restart_lsn));
    };
    if branch.timeline != standby.timeline {
        return Ok(Kept::Not(format!(
            "it follows timeline {}, the archive timeline {}: its slot stays where it is",
            standby.timeline, branch.timeline
        )));
    }
    if slot.restart_lsn.is_some_and(|kept| kept >= target) {
        return Ok(Kept::At(slot.restart_lsn));
    }
    let name = settings.slot.replace('\'', "''");
    // The slot is not advanced further than the standby has replayed.
    let moved = format!(
        "SELECT end_lsn::text FROM pg_catalog.pg_replication_slot_advance('{name}', '{target}')"
    );
    let rows = sql.query(&moved).await?;
    sql.close().await;
    standby.client.close().await;
    let end = rows.into_iter().flatten().flatten().next();
    Ok(Kept::At(end.and_then(|lsn| lsn.parse().ok())))
}
