//! Polls the server: its flush LSN and the slot once a second, and its settings. Nothing here
//! delays WAL. A fact that cannot be queried stays unknown.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use replication::{ConnInfo, ConnectionMode, ReplicationClient};
use status::{
    cluster_status::ClusterStatus,
    report::{ArchiveCommandReport, BackupProgress, SlotReport},
    rpo::tiers::Seen,
};
use tokio::{task::AbortHandle, time::MissedTickBehavior};
use wal_format::{Lsn, SystemIdentifier, TimelineId};

use super::names;
use crate::primary::synchronous::{self, Standbys};

/// The interval at which the server is polled. It is the resolution of the RPO while no WAL
/// arrives.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// The number of polls between two queries of settings, which only an administrator changes.
const POLLS_PER_SETTINGS: u32 = 10;
/// The pause after a failed poll. A role that may only replicate is refused every time.
const POLL_RETRY: Duration = Duration::from_secs(10);
/// The pause after a failed poll while the spool is full. Then only a poll can show that the server
/// shuts down.
const POLL_RETRY_FULL: Duration = Duration::from_secs(3);
/// Lifetime of one SQL session. A smart shutdown of the server waits for it at most this long.
const SESSION_MAX: Duration = Duration::from_secs(30);

/// The tasks that poll the server of the last stream. They outlive the stream: while no stream
/// runs, the slot and the WAL that accumulates for it matter most.
#[derive(Debug, Default)]
pub(crate) struct Polling(Vec<AbortHandle>);

/// The server that is polled.
#[derive(Debug)]
pub(crate) struct Polled<'a> {
    /// The name of the slot.
    pub(crate) slot: &'a str,
    /// The server's system identifier.
    pub(crate) system: SystemIdentifier,
    /// The cluster's directory in the spool.
    pub(crate) directory: &'a Path,
}

impl Polling {
    /// Polls this server from now on, and no longer the previous one.
    pub(crate) fn start(
        &mut self,
        conninfo: &ConnInfo,
        server: &Polled<'_>,
        status: &Arc<ClusterStatus>,
    ) {
        self.stop();
        let polling = poll(conninfo.clone(), server.slot.to_owned(), Arc::clone(status));
        let directory = server.directory.to_owned();
        let names = names::follow(
            conninfo.clone(),
            server.system,
            directory,
            Arc::clone(status),
        );
        self.0 = vec![
            tokio::spawn(Box::pin(polling)).abort_handle(),
            tokio::spawn(Box::pin(names)).abort_handle(),
        ];
    }

    /// Ends the polling.
    pub(crate) fn stop(&mut self) {
        for polling in self.0.drain(..) {
            polling.abort();
        }
    }
}

/// Polls the server over SQL, also while no stream is up, until the next stream begins, possibly of
/// another server. Detects that the server refuses connections, which proves that it shuts down if
/// one of its streams is open.
async fn poll(conninfo: ConnInfo, slot: String, status: Arc<ClusterStatus>) {
    loop {
        let connected = ReplicationClient::connect(&conninfo, ConnectionMode::Sql).await;
        match &connected {
            Err(error) if error.is_not_accepting() => status.refuses(true),
            // The server was not reached, so nothing is known about a shutdown.
            Err(error) if error.is_unreachable() => {}
            _ => status.refuses(false),
        }
        let was_connected = connected.is_ok();
        let outcome = match connected {
            Ok(client) => poll_once_connected(client, &conninfo, &slot, &status).await,
            Err(error) => Err(error),
        };
        let mut session_ended = false;
        if let Err(error) = outcome {
            tracing::debug!(%error, "the server's flush LSN is not known beyond the stream");
            session_ended = was_connected && error.is_final();
        }
        status.note(|facts| {
            facts.slot_report = None;
            facts.slot_missing = false;
            facts.archive_command = None;
            facts.backup_progress = None;
        });
        // A shutdown begins with the end of the session, so poll again soon.
        let pause = if session_ended || status.refused_since().is_some() {
            POLL_INTERVAL
        } else if status.facts().spool_full.is_some() {
            POLL_RETRY_FULL
        } else {
            POLL_RETRY
        };
        tokio::time::sleep(pause).await;
    }
}

async fn poll_once_connected(
    mut client: ReplicationClient,
    conninfo: &ConnInfo,
    slot: &str,
    status: &ClusterStatus,
) -> replication::Result<()> {
    let quoted = slot.replace('\'', "''");
    // The first eight digits of a WAL file's name are the timeline on which it would be written. A
    // server in recovery names the timeline that its walreceiver streams.
    let sql = format!(
        "SELECT (CASE WHEN r THEN greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()) \
         ELSE pg_current_wal_flush_lsn() END)::text, \
         s.active::text, s.wal_status, s.safe_wal_size::text, s.restart_lsn::text, \
         (extract(epoch FROM clock_timestamp()))::text, \
         CASE WHEN r THEN (SELECT lpad(to_hex(received_tli), 8, '0') FROM pg_catalog.pg_stat_wal_receiver) \
         ELSE left(pg_walfile_name(pg_current_wal_flush_lsn()), 8) END, \
         (current_setting('archive_mode') <> 'off' \
         AND a.last_failed_time > coalesce(a.last_archived_time, '-infinity'))::text, \
         a.failed_count::text, a.last_failed_wal, \
         b.phase, b.backup_streamed::text, b.backup_total::text, b.pid::text \
         FROM (SELECT pg_is_in_recovery() AS r OFFSET 0) one \
         CROSS JOIN pg_catalog.pg_stat_archiver a \
         LEFT JOIN (SELECT * FROM pg_catalog.pg_stat_progress_basebackup \
         ORDER BY backup_streamed DESC NULLS LAST LIMIT 1) b ON true \
         LEFT JOIN pg_catalog.pg_replication_slots s ON s.slot_name = '{quoted}'"
    );
    let mut timer = tokio::time::interval(POLL_INTERVAL);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut rate = BackupRate::default();
    // The number of successive queries in which commits waited for a missing standby.
    let mut waits = 0_u32;
    let mut polls = 0_u32;
    let mut began = Instant::now();
    loop {
        timer.tick().await;
        if began.elapsed() >= SESSION_MAX {
            began = Instant::now();
            renew(&mut client, conninfo, status).await?;
        }
        if polls.is_multiple_of(POLLS_PER_SETTINGS) || waits == 1 {
            let found = synchronous_danger(&mut client, conninfo.application_name()).await?;
            let (danger, waiting) = found;
            // A standby that has just connected, such as this archiver, needs a moment.
            waits = waiting.map_or(0, |_| waits.saturating_add(1));
            let lasting = waiting.filter(|_| waits >= 2);
            status.note(|facts| facts.danger = danger.or(lasting));
        }
        polls = polls.wrapping_add(1);
        let asked = jiff::Timestamp::now();
        let rows = client.query(&sql).await?;
        let answered = jiff::Timestamp::now();
        let field = |at: usize| rows.first().and_then(|row| row.get(at)).cloned().flatten();
        let lsn = |at: usize| field(at).and_then(|text| text.parse::<Lsn>().ok());
        let flush_lsn = lsn(0);
        let timeline = field(6).and_then(|digits| u32::from_str_radix(&digits, 16).ok());
        status.heard(flush_lsn.map(|flush_lsn| Seen::Polled {
            timeline: timeline.and_then(TimelineId::new),
            flush_lsn,
        }));
        let retained = flush_lsn
            .zip(lsn(4))
            .map(|(end, from)| end.bytes_since(from));
        let report = field(1).map(|active| SlotReport {
            name: slot.to_owned(),
            active: active == "true",
            wal_status: field(2),
            retained_bytes: retained,
            safe_wal_bytes: field(3).and_then(|bytes| bytes.parse().ok()),
            full_in_seconds: None,
        });
        // The server read its clock between the two. The middle is wrong by at most half the round
        // trip.
        let ours = (asked.as_duration() + answered.as_duration()).as_secs_f64() / 2.0;
        let clock = field(5).and_then(|text| text.parse::<f64>().ok());
        let archive_command = rows.first().map(|_| ArchiveCommandReport {
            failing: field(7).as_deref() == Some("true"),
            failed_count: field(8).and_then(|count| count.parse().ok()).unwrap_or(0),
            last_failed_wal: field(9),
        });
        let number = |at: usize| field(at).and_then(|bytes| bytes.parse().ok());
        let streamed_bytes = number(11);
        let backup_progress = field(10).map(|phase| BackupProgress {
            phase,
            streamed_bytes,
            total_bytes: number(12),
            bytes_per_second: rate.follow(answered, field(13), streamed_bytes),
        });
        status.note(|facts| {
            facts.archive_command = archive_command;
            facts.backup_progress = backup_progress;
            facts.slot_missing = report.is_none() && flush_lsn.is_some();
            facts.slot_report = report;
            facts.clock_offset_seconds = clock.map(|clock| clock - ours);
        });
    }
}

/// The rate of the base backup that runs on the server.
#[derive(Debug, Default)]
struct BackupRate {
    /// The backup's server process, and the time and the bytes when its bytes were first seen.
    begun: Option<(String, jiff::Timestamp, u64)>,
}

impl BackupRate {
    /// Returns the rate since the bytes of this server process's backup were first seen. `None`
    /// within the first second.
    fn follow(
        &mut self,
        now: jiff::Timestamp,
        pid: Option<String>,
        streamed: Option<u64>,
    ) -> Option<f64> {
        let (pid, streamed) = pid.zip(streamed.filter(|bytes| *bytes > 0))?;
        match &self.begun {
            Some((known, since, before)) if *known == pid && streamed >= *before => {
                let seconds = now.duration_since(*since).as_secs_f64();
                #[expect(clippy::cast_precision_loss, reason = "a rate for users")]
                let bytes = (streamed - before) as f64;
                (seconds >= 1.0).then(|| bytes / seconds)
            }
            _ => {
                self.begun = Some((pid, now, streamed));
                None
            }
        }
    }
}

/// Replaces the session by a new one. A smart shutdown waits for every session, and only the
/// refusal of a new one shows it. If there is no room for a second session, the first one stays in
/// use.
async fn renew(
    client: &mut ReplicationClient,
    conninfo: &ConnInfo,
    status: &ClusterStatus,
) -> replication::Result<()> {
    match ReplicationClient::connect(conninfo, ConnectionMode::Sql).await {
        Ok(next) => std::mem::replace(client, next).close().await,
        Err(error) if error.is_not_accepting() => {
            status.refuses(true);
            return Err(error);
        }
        Err(error) => tracing::debug!(%error, "the SQL session could not be renewed"),
    }
    Ok(())
}

/// Returns a warning if the server's settings make commits wait for us in a dangerous way, and one
/// if commits wait for a standby that is not connected.
async fn synchronous_danger(
    client: &mut ReplicationClient,
    application_name: &str,
) -> replication::Result<(Option<&'static str>, Option<&'static str>)> {
    let rows = client
        .query(
            "SELECT current_setting('synchronous_standby_names'), (current_setting('synchronous_commit') = 'remote_apply' \
             OR EXISTS (SELECT FROM pg_catalog.pg_db_role_setting, unnest(setconfig) setting \
             WHERE setting = 'synchronous_commit=remote_apply'))::text",
        )
        .await?;
    let field = |at: usize| rows.first().and_then(|row| row.get(at)).cloned().flatten();
    let names = field(0).unwrap_or_default();
    let remote_apply = field(1).as_deref() == Some("true");
    let membership = synchronous::membership(&names, application_name);
    let danger = synchronous::danger(&membership, remote_apply);
    if names.is_empty() {
        return Ok((danger, None));
    }
    let connected = synchronous::connected(client).await?;
    let waiting = connected.and_then(|connected| {
        let count = connected.iter().filter(|one| one.is_waited_for()).count();
        Standbys::new(&names, count).waiting()
    });
    Ok((danger, waiting))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_of_a_backup_begins_anew_with_the_next_backup() {
        let mut rate = BackupRate::default();
        let mut follow = |second: i64, pid: &str, streamed: Option<u64>| {
            let now = jiff::Timestamp::from_second(second).expect("a time");
            rate.follow(now, Some(pid.to_owned()), streamed)
        };
        // The bytes are not known before the first ones, so they are not a rate of 0.
        assert_eq!(follow(10, "1", None), None);
        assert_eq!(follow(11, "1", Some(0)), None);
        assert_eq!(follow(12, "1", Some(1000)), None);
        assert_eq!(follow(14, "1", Some(3000)), Some(1000.0));
        assert_eq!(follow(16, "1", Some(3000)), Some(500.0));
        // The second backup of the same process begins at fewer bytes.
        assert_eq!(follow(17, "1", Some(10)), None);
        assert_eq!(follow(18, "1", Some(20)), Some(10.0));
        assert_eq!(follow(19, "2", Some(5000)), None);
        assert_eq!(follow(20, "2", Some(5000)), Some(0.0));
    }
}
