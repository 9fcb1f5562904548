//! Status facts that the stream does not provide: the server's flush LSN and slot once a second,
//! and the restorable window at a longer interval. Nothing here delays WAL. A fact that cannot be
//! queried stays unknown.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use replication::{ConnInfo, ConnectionMode, ReplicationClient};
use status::{
    cluster_status::ClusterStatus,
    report::{ArchiveCommandReport, BackupProgress, SlotReport},
    rpo::tiers::Seen,
};
use tokio::{
    task::{AbortHandle, JoinHandle},
    time::MissedTickBehavior,
};
use wal_format::{BackupInfo, DeclaredGap, Lsn, ObjectKey, TimelineId};

use super::{
    archive::Archive,
    current::CurrentArchive,
    presence::{self, Presence},
    window::{Marks, Update},
};
use crate::{
    blocking::blocking,
    core::event::Event,
    error::{Error, Result},
    outcomes, synchronous,
};

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
/// The interval at which the catalog is checked.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// The interval at which the file is read that each backup and outcome of this host changes.
const MARK_INTERVAL: Duration = Duration::from_millis(200);
/// The interval at which the repository's folder is checked to be the same one.
const PLACE_INTERVAL: Duration = Duration::from_secs(1);
/// The number of checks between two listings of the repository's backups, which another host may
/// have taken: one hour. A listing is a billed request in a bucket. A backup taken on this host
/// leaves a file in the spool's directory.
const LOOKS_PER_LISTING: u32 = 720;
/// The number of checks between two listings while there is no backup, or none after a loss, and
/// between two checks of a bucket's objects: one minute.
const LOOKS_PER_LISTING_WAITING: u32 = 12;

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

/// Starts the periodic checks of an archive. `current` shows the archive after the first one.
pub(crate) fn start(archive: &Arc<Archive>, current: &Arc<CurrentArchive>) -> Vec<JoinHandle<()>> {
    vec![
        tokio::spawn(look(Arc::clone(archive), Arc::clone(current))),
        tokio::spawn(watch_place(Arc::clone(archive))),
    ]
}

/// Updates the restorable window, the newest backup and the spool's size periodically.
async fn look(archive: Arc<Archive>, current: Arc<CurrentArchive>) {
    let mut timer = tokio::time::interval(LOOK_INTERVAL);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut looks: u32 = 0;
    let mut taken = None;
    let mark = outcomes::mark(archive.settings());
    let marks = Arc::new(Mutex::new(Marks::default()));
    let presence = Arc::new(Mutex::new(Presence::default()));
    loop {
        tokio::select! {
            _ = timer.tick() => {}
            () = changed(&mark, taken.as_deref()) => {}
        }
        let known = std::mem::replace(&mut taken, tokio::fs::read(&mark).await.ok());
        let list = if looks.is_multiple_of(LOOKS_PER_LISTING) || known != taken {
            Listing::Now
        } else if looks.is_multiple_of(LOOKS_PER_LISTING_WAITING) {
            Listing::WhenWaiting
        } else {
            Listing::Never
        };
        looks = looks.wrapping_add(1);
        let (looked, marks) = (Arc::clone(&archive), Arc::clone(&marks));
        let current = Arc::clone(&current);
        let retains = archive.settings().repository.each();
        let retains = retains.iter().any(|place| place.retention.is_some());
        let expires = known != taken || (retains && list == Listing::Now);
        if let Err(error) =
            blocking(move || look_once(&looked, &current, list, expires, &marks)).await
        {
            tracing::debug!(%error, "the window is not known");
        }
        if archive.is_away() {
            continue;
        }
        // [`watch_place`] checks a folder once a second.
        let is_due = archive.costs_requests() && list != Listing::Never;
        let (looked, presence) = (Arc::clone(&archive), Arc::clone(&presence));
        let checked = blocking(move || {
            if is_due {
                presence::look_for_losses(&looked, &presence)
            } else {
                presence::report_losses(&looked);
                Ok(())
            }
        });
        match checked.await {
            Err(Error::Repository(error)) if error.is_gone() || error.is_not_found() => {
                let status = archive.status();
                status.repository_failed("presence", "", &error);
            }
            Err(error) => tracing::debug!(%error, "the presence of the objects is not known"),
            // Only the check of the objects proves that they are back.
            Ok(()) if is_due => archive.status().repository_back("presence"),
            Ok(()) => {}
        }
    }
}

/// Waits until the content of the file at `path` differs from `known`. A backup that has just ended
/// on this host must not be reported as missing until the next check.
async fn changed(path: &Path, known: Option<&[u8]>) {
    loop {
        tokio::time::sleep(MARK_INTERVAL).await;
        if tokio::fs::read(path).await.ok().as_deref() != known {
            return;
        }
    }
}

/// Detects within a second that the repository's folder was replaced or lacks objects, also while
/// nothing is stored. For a bucket, the store requests detect a replacement, and [`look`] checks
/// the objects once a minute, because each request costs money.
async fn watch_place(archive: Arc<Archive>) {
    let mut timer = tokio::time::interval(PLACE_INTERVAL);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let presence = Arc::new(Mutex::new(Presence::default()));
    while !archive.is_away() {
        timer.tick().await;
        let (watched, presence) = (Arc::clone(&archive), Arc::clone(&presence));
        let look = move || {
            watched.repository().confirm_free()?;
            if watched.costs_requests() {
                return Ok(());
            }
            presence::look_for_losses(&watched, &presence)
        };
        let status = archive.status();
        match blocking(look).await {
            Err(Error::Repository(error)) if error.is_gone() || error.is_not_found() => {
                status.repository_failed("look", "", &error);
            }
            // For a bucket, success proves nothing, but then this check reported no failure.
            Ok(()) => status.repository_back("look"),
            Err(_) => {}
        }
    }
}

/// Decides whether a check lists the repository's backups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Listing {
    Now,
    /// Only if a backup is awaited: the first one, or the one after a loss.
    WhenWaiting,
    Never,
}

fn look_once(
    archive: &Arc<Archive>,
    current: &CurrentArchive,
    list: Listing,
    expires: bool,
    marks: &Mutex<Marks>,
) -> Result<()> {
    let mut used = 0;
    for spool in archive.spooled_branches()? {
        let segments = spool.segments()?;
        used += segments.complete.len() as u64 * spool.segment_size().bytes();
        used += segments.open.map_or(0, |(_, length)| length);
    }
    let limit = rustix::fs::statvfs(archive.settings().spool.as_path())
        .ok()
        .map(|disk| used + disk.f_bavail * disk.f_frsize)
        .into_iter()
        .chain(archive.settings().spool_limit_bytes)
        .min();
    archive.status().note(|facts| {
        facts.spool_used_bytes = used;
        facts.spool_limit_bytes = limit;
    });
    if let Err(error) = archive.record_losses() {
        tracing::debug!(%error, "what a failover lost is not recorded yet");
    }
    let flushed = archive.progress().positions().flushed();
    archive.status().note(|facts| {
        // The stream has continued after the gap, so the gap is closed.
        facts.gap.take_if(|gap| flushed > gap.from_lsn);
    });
    let catalog = archive.catalog();
    if expires && catalog.follow_expired(archive.repository())? {
        archive.refresh()?;
    }
    let mut backups = archive.held_backups()?;
    // Listing a folder costs nothing.
    let folder = archive.settings().repository.url.folder().is_some();
    let is_unreached = archive.status().facts().unreached.is_some();
    let waiting = backups.is_empty() || is_unreached || loss(archive, &backups)?.is_some();
    let asks = match list {
        Listing::Now => true,
        Listing::WhenWaiting => folder || waiting,
        Listing::Never => folder && waiting,
    };
    if asks {
        match list_new_backups(archive, backups.len()) {
            Ok(()) => backups = archive.held_backups()?,
            // The catalog's content is evaluated even while the repository is offline.
            Err(error) if !backups.is_empty() => {
                tracing::debug!(%error, "the repository's backups are not known");
            }
            Err(error) => {
                // Without a listing, it is not known that there is no backup.
                archive.status().note(|facts| facts.looked = false);
                return Err(error);
            }
        }
    }
    if let Some(newest) = backups.last() {
        begin_at_backup(archive, newest)?;
    }
    let mut marks = marks.lock().unwrap_or_else(PoisonError::into_inner);
    // A folder is read every time. A bucket, where each listing has a price, is read as often as
    // for backups.
    if (list == Listing::Now || folder || !marks.has_outcomes())
        && let Err(error) = marks.ask(archive)
    {
        tracing::debug!(%error, "the repository's outcomes are not known");
    }
    if list == Listing::Now
        && let Err(error) = archive.remove_leftover_tails()
    {
        tracing::debug!(%error, "tails whose segment is sealed may stay in the repository");
    }
    let Some(Update {
        window,
        unreached,
        details,
    }) = marks.look(archive, &backups)?
    else {
        return Ok(());
    };
    let last_backup = details.backups.last().cloned();
    let lost = loss(archive, &backups)?;
    let mut is_current = true;
    archive.status().note(|facts| {
        is_current = facts.archive_number == archive.number();
        if !is_current {
            return;
        }
        facts.lost = lost;
        facts.unreached = unreached;
        facts.window = window;
        facts.last_backup = last_backup;
    });
    // Published after the facts, so that a reader who sees a backup in the details also sees the
    // facts that were computed with it.
    if is_current {
        archive.status().looked(archive.number(), details);
        current.set(archive);
    }
    Ok(())
}

/// Moves the start of the positions to the newest backup if the repository's contiguous WAL ends
/// before it. The WAL between the two is missing, and from the backup on nothing needs it. WAL that
/// waits in the spool still counts as expected.
fn begin_at_backup(archive: &Archive, newest: &BackupInfo) -> Result<()> {
    let progress = archive.progress();
    let (branch, known) = {
        let positions = progress.positions();
        (positions.branch(), positions.stored_on(positions.branch()))
    };
    if archive.is_away()
        || newest.branch != branch
        || known == Lsn::ZERO
        || known >= newest.start_lsn
    {
        return Ok(());
    }
    let Some(stored) = archive
        .stored(branch)?
        .filter(|stored| stored.end() > known)
    else {
        return Ok(());
    };
    tracing::warn!(
        event = "hole_left_behind", cluster = %archive.settings().name, backup = %newest.id,
        "the repository lacks WAL from {known} on that base backup {} does not need; the positions begin at that backup",
        newest.id
    );
    progress.on(Event::BackupListed { branch, stored });
    Ok(())
}

/// Refreshes the catalog if the number of backups in the repository is not `known`.
fn list_new_backups(archive: &Archive, known: usize) -> Result<()> {
    let catalog = archive.catalog();
    let system = archive.identity().system_identifier;
    let stored = archive.repository().list(&format!("{system}/backup/"))?;
    let expired = catalog.expired()?;
    let is_info = |key: &ObjectKey| match key {
        ObjectKey::BackupInfo(_, id) => !expired.backups().contains(id),
        _ => false,
    };
    if stored.iter().filter(|(key, _)| is_info(key)).count() != known {
        archive.refresh()?;
    }
    Ok(())
}

/// Returns a description of the first declared loss after which there is no base backup. `None` if
/// there is none.
fn loss(archive: &Archive, backups: &[BackupInfo]) -> Result<Option<String>> {
    let catalog = archive.catalog();
    for gap in archive.gaps() {
        let behind = |backup: &BackupInfo| {
            let later = backup.branch.timeline > gap.branch.timeline;
            later || (backup.branch == gap.branch && backup.start_lsn >= gap.to_lsn)
        };
        let given = catalog.contiguous_end(gap.branch, gap.from_lsn)? >= gap.to_lsn;
        if !given && !backups.iter().any(behind) {
            return Ok(Some(describe_loss(gap)));
        }
    }
    Ok(None)
}

/// The reason of a gap that the operator declared after `pg_resetwal`.
pub(crate) const RESETWAL: &str =
    "pg_resetwal was run on the server, so its WAL does not continue the archived WAL";

/// Describes a loss for users: the range, the last commit before it, and the remedy.
pub(crate) fn describe_loss(gap: &DeclaredGap) -> String {
    let since = gap
        .last_commit
        .map_or_else(String::new, |time| format!(", after {time}"));
    format!(
        "WAL {} to {} of timeline branch {} is lost{since}: {}. A restore to a later time needs a base backup taken after \
         it, which the archiver takes now",
        gap.from_lsn, gap.to_lsn, gap.branch, gap.reason
    )
}
