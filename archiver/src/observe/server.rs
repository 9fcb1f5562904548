//! Polls the server: its flush LSN and the slot once a second, and its settings. Nothing here
//! delays WAL. A fact that cannot be queried stays unknown.

use std::{
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
use wal_format::{Lsn, TimelineId};

use crate::primary::synchronous;

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

/// The task that polls the server of the last stream. It outlives the stream: while no stream runs,
/// the slot and the WAL that accumulates for it matter most.
#[derive(Debug, Default)]
pub(crate) struct Polling(Option<AbortHandle>);

impl Polling {
    /// Polls this server from now on, and no longer the previous one.
    pub(crate) fn start(&mut self, conninfo: &ConnInfo, slot: &str, status: &Arc<ClusterStatus>) {
        self.stop();
        let polling = poll(conninfo.clone(), slot.to_owned(), Arc::clone(status));
        self.0 = Some(tokio::spawn(Box::pin(polling)).abort_handle());
    }

    /// Ends the polling.
    pub(crate) fn stop(&mut self) {
        if let Some(polling) = self.0.take() {
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
         b.phase, b.backup_streamed::text, b.backup_total::text \
         FROM (SELECT pg_is_in_recovery() AS r OFFSET 0) one \
         CROSS JOIN pg_catalog.pg_stat_archiver a \
         LEFT JOIN (SELECT * FROM pg_catalog.pg_stat_progress_basebackup \
         ORDER BY backup_streamed DESC NULLS LAST LIMIT 1) b ON true \
         LEFT JOIN pg_catalog.pg_replication_slots s ON s.slot_name = '{quoted}'"
    );
    let mut timer = tokio::time::interval(POLL_INTERVAL);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut polls = 0_u32;
    let mut began = Instant::now();
    loop {
        timer.tick().await;
        if began.elapsed() >= SESSION_MAX {
            began = Instant::now();
            renew(&mut client, conninfo, status).await?;
        }
        if polls.is_multiple_of(POLLS_PER_SETTINGS) {
            let danger = synchronous_danger(&mut client, conninfo.application_name()).await?;
            status.note(|facts| facts.danger = danger);
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
        let backup_progress = field(10).map(|phase| BackupProgress {
            phase,
            streamed_bytes: number(11),
            total_bytes: number(12),
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

/// Returns a warning if the server's settings make commits wait for us in a dangerous way.
async fn synchronous_danger(
    client: &mut ReplicationClient,
    application_name: &str,
) -> replication::Result<Option<&'static str>> {
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
    Ok(synchronous::danger(&membership, remote_apply))
}
