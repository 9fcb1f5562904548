//! One base backup of a server at a time: of this host, of another host or of another user.
//!
//! An advisory lock on the server is held by a connection of its own, so that it ends with this
//! process or with its host. A role that may only replicate cannot take it; then only the backups
//! of this process exclude each other.

use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError},
};

use replication::{ConnInfo, ConnectionMode, ReplicationClient};
use wal_format::ClusterName;

/// The number of the lock, `tidemark` in ASCII.
const LOCK: i64 = 0x7469_6465_6D61_726B;
/// The settings of the session that holds the lock: the server may not end it while it is idle,
/// and notices the loss of this host within a minute.
const SETTINGS: &str = "SELECT pg_catalog.set_config(wanted.name, wanted.value, false) \
    FROM (VALUES ('idle_session_timeout', '0'), ('statement_timeout', '0'), ('tcp_keepalives_idle', '30'), \
    ('tcp_keepalives_interval', '10'), ('tcp_keepalives_count', '3')) wanted(name, value) \
    JOIN pg_catalog.pg_settings known ON known.name = wanted.name";

/// The clusters of which this process takes a base backup.
static TAKING: Mutex<BTreeSet<ClusterName>> = Mutex::new(BTreeSet::new());

/// The right to take a base backup, until it is dropped.
#[derive(Debug)]
pub(super) struct Exclusive {
    _local: Local,
    session: Option<ReplicationClient>,
}

/// The right within this process.
#[derive(Debug)]
struct Local(ClusterName);

impl Local {
    fn take(cluster: &ClusterName) -> Option<Self> {
        let mut taking = TAKING.lock().unwrap_or_else(PoisonError::into_inner);
        let is_free = taking.insert(cluster.clone());
        is_free.then(|| Self(cluster.clone()))
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        let mut taking = TAKING.lock().unwrap_or_else(PoisonError::into_inner);
        taking.remove(&self.0);
    }
}

impl Exclusive {
    /// Takes the right, or returns who has it.
    pub(super) async fn take(conninfo: &ConnInfo, cluster: &ClusterName) -> Result<Self, String> {
        let Some(local) = Local::take(cluster) else {
            return Err("in this process".to_owned());
        };
        let session = match lock(conninfo).await {
            Ok(Ok(session)) => Some(session),
            Ok(Err(holder)) => return Err(holder),
            Err(error) => {
                tracing::debug!(%error, "base backups of other processes are not excluded");
                None
            }
        };
        Ok(Self {
            _local: local,
            session,
        })
    }

    /// Releases the right before the next step of the caller.
    pub(super) async fn release(self) {
        if let Some(session) = self.session {
            session.close().await;
        }
    }
}

/// Takes the lock on the server, or returns the session that holds it.
async fn lock(conninfo: &ConnInfo) -> replication::Result<Result<ReplicationClient, String>> {
    let mut session = ReplicationClient::connect(conninfo, ConnectionMode::Sql).await?;
    session.query(SETTINGS).await?;
    let first = |rows: Vec<Vec<Option<String>>>| rows.into_iter().flatten().next().flatten();
    let sql = format!("SELECT pg_catalog.pg_try_advisory_lock({LOCK})::text");
    if first(session.query(&sql).await?).as_deref() == Some("true") {
        return Ok(Ok(session));
    }
    let sql = format!(
        "SELECT pg_catalog.concat('process ', a.pid, ' of the server, application ', a.application_name, ', since ', \
         a.backend_start) FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_stat_activity a USING (pid) \
         WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1 AND l.classid = {} AND l.objid = {}",
        LOCK >> 32,
        LOCK & 0xFFFF_FFFF
    );
    let holder = first(session.query(&sql).await?);
    session.close().await;
    Ok(Err(holder.unwrap_or_else(|| "it has just ended".to_owned())))
}
