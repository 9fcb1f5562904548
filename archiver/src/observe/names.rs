//! Reads the names of the server's tables, for the removals that the WAL reports by file numbers
//! only. Nothing here delays WAL.
//!
//! A database is read when the stream begins, at most once a minute if rows were inserted there
//! since (a new table inserts rows into the catalogs), and soon after a removal.
//! `{spool}/{cluster}/relations.json` keeps the names for the next run. It is replaced without an
//! fsync: if a power loss removes it, the names of tables that are gone are unknown.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use replication::{ConnInfo, ConnectionMode, ReplicationClient};
use status::{
    cluster_status::ClusterStatus,
    relation_names::{FILES_MAX, NamedFile, ReadDatabase, RelationNames},
};
use wal_format::{Lsn, SystemIdentifier, TimelineId};

use crate::blocking::blocking;

/// The interval at which the databases are checked for changes.
const CHECK_INTERVAL: Duration = Duration::from_secs(60);
/// The interval at which databases with a removal are read again. The removals themselves are found
/// every few seconds.
const ASKED_INTERVAL: Duration = Duration::from_secs(2);
/// The pause before a database is read again that refused it. Each attempt leaves a line in the
/// server's log.
const REFUSED_PAUSE: Duration = Duration::from_secs(86_400);
/// The maximum number of databases that are read.
const DATABASES_MAX: usize = 64;
/// The file of the names.
const FILE: &str = "relations.json";

/// The tables of a database and the files of their indexes and TOAST tables. Temporary tables are
/// not in the WAL.
const TABLES: &str = "WITH heap AS (SELECT c.oid, c.oid AS top FROM pg_catalog.pg_class c \
     WHERE c.relkind IN ('r', 'm') AND c.relpersistence <> 't' AND c.oid >= 16384 \
     UNION ALL SELECT c.reltoastrelid, c.oid FROM pg_catalog.pg_class c \
     WHERE c.reltoastrelid <> 0 AND c.relpersistence <> 't' AND c.oid >= 16384), \
     part AS (SELECT oid, top FROM heap UNION ALL SELECT i.indexrelid, h.top \
     FROM heap h JOIN pg_catalog.pg_index i ON i.indrelid = h.oid) \
     SELECT f.relfilenode::text, t.oid::text, n.nspname, t.relname, (f.oid = t.oid)::text \
     FROM part p JOIN pg_catalog.pg_class f ON f.oid = p.oid \
     JOIN pg_catalog.pg_class t ON t.oid = p.top \
     JOIN pg_catalog.pg_namespace n ON n.oid = t.relnamespace \
     WHERE f.relfilenode <> 0 ORDER BY f.relfilenode::bigint DESC";
/// The server's position and timeline. A server in recovery names the timeline that its walreceiver
/// streams.
const POSITION: &str = "SELECT (CASE WHEN r THEN pg_last_wal_replay_lsn() \
     ELSE pg_current_wal_insert_lsn() END)::text, \
     CASE WHEN r THEN (SELECT lpad(to_hex(received_tli), 8, '0') FROM pg_catalog.pg_stat_wal_receiver) \
     ELSE left(pg_walfile_name(pg_current_wal_flush_lsn()), 8) END \
     FROM (SELECT pg_is_in_recovery() AS r OFFSET 0) one";

/// The name and the number of inserted rows of each database that accepts connections.
type Databases = BTreeMap<u32, (String, Option<u64>)>;

/// The state of the databases when they were last read.
#[derive(Debug, Default)]
struct Known {
    inserted: BTreeMap<u32, u64>,
    refused: BTreeMap<u32, Instant>,
}

/// Keeps the names current until the task is aborted.
pub(super) async fn follow(
    conninfo: ConnInfo,
    system: SystemIdentifier,
    directory: PathBuf,
    status: Arc<ClusterStatus>,
) {
    begin(system, &directory, &status).await;
    let mut known = Known::default();
    let mut checked: Option<Instant> = None;
    loop {
        let is_due = checked.is_none_or(|when| when.elapsed() >= CHECK_INTERVAL);
        let asked = std::mem::take(&mut *status.names_asked());
        if is_due || !asked.is_empty() {
            if is_due {
                checked = Some(Instant::now());
            }
            let asked = (is_due, &asked);
            match check(&conninfo, asked, &status, &mut known).await {
                Ok(true) => keep(&directory, &status).await,
                Ok(false) => {}
                Err(error) => tracing::debug!(%error, "the names of the tables are not known"),
            }
        }
        tokio::time::sleep(ASKED_INTERVAL).await;
    }
}

/// Begins with the names of an earlier run, unless they are known from an earlier stream.
async fn begin(system: SystemIdentifier, directory: &Path, status: &ClusterStatus) {
    if status.relation_names().is_of(system) {
        return;
    }
    let path = directory.join(FILE);
    let stored = blocking(move || Ok(fs::read(path).unwrap_or_default())).await;
    let stored = serde_json::from_slice(&stored.unwrap_or_default()).unwrap_or_default();
    *status.relation_names() = RelationNames::of_system(stored, system);
}

/// Stores the names for the next run.
async fn keep(directory: &Path, status: &ClusterStatus) {
    let content = serde_json::to_vec(&*status.relation_names()).unwrap_or_default();
    let directory = directory.to_owned();
    let written = blocking(move || Ok(write(&directory, &content))).await;
    if let Ok(Err(error)) = written {
        tracing::debug!(%error, "the names of the tables are not kept");
    }
}

fn write(directory: &Path, content: &[u8]) -> io::Result<()> {
    let new = directory.join(format!("{FILE}.new"));
    fs::write(&new, content)?;
    rustix::fs::rename(&new, directory.join(FILE))?;
    Ok(())
}

/// Reads the databases that were asked for, and those that may have changed if a check `is_due`.
/// Returns whether a name changed.
async fn check(
    conninfo: &ConnInfo,
    (is_due, asked): (bool, &BTreeSet<u32>),
    status: &ClusterStatus,
    known: &mut Known,
) -> replication::Result<bool> {
    let databases = list(conninfo).await?;
    known.inserted.retain(|oid, _| databases.contains_key(oid));
    known
        .refused
        .retain(|oid, since| databases.contains_key(oid) && since.elapsed() < REFUSED_PAUSE);
    let existing: BTreeSet<u32> = databases.keys().copied().collect();
    let mut is_changed = status.relation_names().retain(&existing);
    let due = databases.into_iter().filter(|(oid, (_, inserted))| {
        let is_same = inserted.is_some() && known.inserted.get(oid) == inserted.as_ref();
        (asked.contains(oid) || (is_due && !is_same)) && !known.refused.contains_key(oid)
    });
    for (oid, (name, inserted)) in due.take(DATABASES_MAX).collect::<Vec<_>>() {
        match read(&conninfo.clone().with_database(&name), name).await {
            Ok(Some(read)) => {
                is_changed |= status.relation_names().learn(oid, read);
                known.inserted.extend(inserted.map(|count| (oid, count)));
            }
            Ok(None) => {}
            Err(error) if error.is_usage() || error.is_auth() => {
                tracing::debug!(%error, "the names of the tables of a database are not known");
                known.refused.insert(oid, Instant::now());
            }
            Err(error) => return Err(error),
        }
    }
    Ok(is_changed)
}

/// Lists the databases of the server.
async fn list(conninfo: &ConnInfo) -> replication::Result<Databases> {
    let sql = format!(
        "SELECT d.oid::text, d.datname, s.tup_inserted::text FROM pg_catalog.pg_database d \
         LEFT JOIN pg_catalog.pg_stat_database s ON s.datid = d.oid \
         WHERE d.datallowconn AND NOT d.datistemplate ORDER BY d.oid LIMIT {DATABASES_MAX}"
    );
    let mut client = ReplicationClient::connect(conninfo, ConnectionMode::Sql).await?;
    let rows = client.query(&sql).await?;
    client.close().await;
    let database = |row: Vec<Option<String>>| {
        let mut fields = row.into_iter();
        let oid = fields.next()??.parse().ok()?;
        let name = fields.next()??;
        let inserted = fields.next().flatten();
        Some((oid, (name, inserted.and_then(|count| count.parse().ok()))))
    };
    Ok(rows.into_iter().filter_map(database).collect())
}

/// Reads the tables of one database. Returns `None` if the server's timeline is not known.
async fn read(conninfo: &ConnInfo, name: String) -> replication::Result<Option<ReadDatabase>> {
    let mut client = ReplicationClient::connect(conninfo, ConnectionMode::Sql).await?;
    // The position comes first: what is committed up to it may be visible, never the reverse.
    let position = client.query(POSITION).await?;
    let rows = client
        .query(&format!("{TABLES} LIMIT {}", FILES_MAX + 1))
        .await?;
    client.close().await;
    let field = |at: usize| position.first()?.get(at)?.clone();
    let timeline = field(1).and_then(|digits| u32::from_str_radix(&digits, 16).ok());
    let lsn = field(0).and_then(|text| text.parse::<Lsn>().ok());
    let Some((timeline, lsn)) = timeline.and_then(TimelineId::new).zip(lsn) else {
        return Ok(None);
    };
    let is_complete = rows.len() <= FILES_MAX;
    let file = |row: Vec<Option<String>>| {
        let [number, table, schema, name, is_table] = <[_; 5]>::try_from(row).ok()?;
        let file = NamedFile {
            table: table?.parse().ok()?,
            name: format!("{}.{}", schema?, name?),
            is_table: is_table? == "true",
        };
        Some((number?.parse().ok()?, file))
    };
    Ok(Some(ReadDatabase {
        name,
        timeline,
        lsn,
        files: rows.into_iter().filter_map(file).collect(),
        is_complete,
    }))
}
