//! [`ClusterStatus`]: what the daemon knows of one cluster, for the dashboard, the metrics and `status`.
//!
//! Written by the stages, read by everyone; locks are held for a few assignments only and never
//! across I/O, so a reader cannot delay the stream. What is not known is `None`, never 0.

mod caught_up;
mod report;
mod server_path;

pub(crate) use caught_up::CaughtUp;
pub(crate) use server_path::ServerPath;

use std::{
    collections::BTreeMap,
    ffi::OsString,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use prometheus_client::metrics::histogram::Histogram;
use repository::{ExitKind, config::Acknowledge, store::Observer};
use tokio::task::AbortHandle;
use wal_format::{Branch, ClusterName, Lsn, PgTimestamp, SystemIdentifier};

use crate::{
    instruments::Instruments,
    pipeline::{archive::Archive, gap::OpenGap, progress::Progress},
    report::{BackupReport, Details, SlotReport, WindowReport},
    rpo::{Exposure, Seen, Tiers},
    standby_slots::StandbyReport,
};

/// What is known of one cluster.
#[derive(Debug)]
pub struct ClusterStatus {
    cluster: ClusterName,
    progress: Progress,
    started: Instant,
    facts: Mutex<Facts>,
    details: Mutex<Arc<Details>>,
    archive: Mutex<Weak<Archive>>,
    caught_up: Mutex<CaughtUp>,
    poll: Mutex<Option<AbortHandle>>,
    refused_since: Mutex<Option<Instant>>,
    rpo: Mutex<Tiers>,
    /// WAL bytes received, overlap after a reconnect included.
    pub wal_received_bytes: AtomicU64,
    /// Bytes of sealed segments and tails that were put.
    pub wal_stored_bytes: AtomicU64,
    /// Segments sealed, stored and verified.
    pub segments_completed: AtomicU64,
    /// Objects that were superfluous and that the repository does not let go.
    pub objects_locked: AtomicU64,
    /// Group fsyncs of the spool.
    pub flushes: AtomicU64,
    /// Since `started`, in milliseconds.
    beat: AtomicU64,
    instruments: Instruments,
    flush_duration: Histogram,
}

/// The estimators' clock at the start of this process: far enough from 0 that the times of earlier
/// runs come after 0.
const CLOCK_AT_START: Duration = Duration::from_secs(1 << 32);

/// Facts beside the positions.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// True if a replication stream is up.
    pub connected: bool,
    /// When the server was last heard.
    pub last_message: Option<PgTimestamp>,
    /// The timelines that lead to the one the server is on; `None` before it was seen.
    pub(crate) server_path: Option<Arc<ServerPath>>,
    /// The cluster's system identifier.
    pub system_identifier: Option<SystemIdentifier>,
    /// The server's version as it prints it.
    pub server_version: Option<String>,
    /// The branch being archived.
    pub branch: Option<Branch>,
    /// The replication slot in use.
    pub slot: Option<String>,
    /// The stream's last error; cleared when it is up again.
    pub stream_error: Option<String>,
    /// The repository's last error; cleared by the next success.
    pub repository_error: Option<String>,
    /// What the repository answers that a person has to look at, by what was asked of it: it is
    /// another place, or what it holds is damaged or different. Retried all the same, and cleared
    /// by the same request's success.
    pub repository_broken: BTreeMap<String, String>,
    /// True if the place was last seen not to hold the archive.
    pub repository_gone: bool,
    /// The number of times that the place held the archive again.
    pub repository_returns: u64,
    /// Why the catalog on disk is not used; archiving continues with one in memory.
    pub catalog_error: Option<String>,
    /// Why what the backups need could not be locked at the last look.
    pub lock_error: Option<String>,
    /// Why archiving is broken: only a person can mend it.
    pub broken: Option<String>,
    /// WAL that was declared lost, until a base backup behind it makes the archive whole again.
    pub lost: Option<String>,
    /// Why no base backup leads to the server's present, until one does.
    pub unreached: Option<String>,
    /// Names of files that `archive_command` pushed and whose bytes differ from the archived ones,
    /// and where they differ.
    pub push_differs: BTreeMap<OsString, String>,
    /// A setting of the server that makes commits hang on us.
    pub danger: Option<&'static str>,
    /// Why the spool takes no more WAL, while it waits for room.
    pub spool_full: Option<&'static str>,
    /// Bytes in the spool's files.
    pub spool_used_bytes: u64,
    /// Bytes that the spool may grow to: what it uses and what its disk has left.
    pub spool_limit_bytes: Option<u64>,
    /// Missing WAL that is looked for, until it is healed or declared lost.
    pub gap: Option<OpenGap>,
    /// Our slots on standbys, as last seen.
    pub standbys: Vec<StandbyReport>,
    /// The slot as the server last showed it.
    pub slot_report: Option<SlotReport>,
    /// From when to when the cluster can be restored, as of the last look into the catalog.
    pub window: WindowReport,
    /// The newest base backup, as of the last look into the catalog.
    pub last_backup: Option<BackupReport>,
    /// The server's clock minus ours, in seconds.
    pub clock_offset_seconds: Option<f64>,
    /// True if the catalog was looked at since the start.
    pub looked: bool,
    /// Reconnections by reason.
    pub reconnects: BTreeMap<&'static str, u64>,
    /// Failed repository requests by operation.
    pub repository_errors: BTreeMap<&'static str, u64>,
}

impl ClusterStatus {
    /// A cluster of which nothing is known yet.
    #[must_use]
    pub fn new(cluster: ClusterName, acknowledge: Acknowledge, instruments: Instruments) -> Self {
        Self {
            flush_duration: instruments.flush_duration(&cluster),
            instruments,
            cluster,
            progress: Progress::new(acknowledge),
            started: Instant::now(),
            facts: Mutex::default(),
            details: Mutex::default(),
            archive: Mutex::default(),
            caught_up: Mutex::default(),
            poll: Mutex::default(),
            refused_since: Mutex::default(),
            rpo: Mutex::default(),
            wal_received_bytes: AtomicU64::new(0),
            wal_stored_bytes: AtomicU64::new(0),
            segments_completed: AtomicU64::new(0),
            objects_locked: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
            beat: AtomicU64::new(0),
        }
    }

    /// An object stays because the repository lets nothing go: said once, and counted.
    pub(crate) fn locked(&self, error: &repository::Error) {
        if self.objects_locked.fetch_add(1, Ordering::Relaxed) == 0 {
            tracing::info!(
                %error,
                "deleting is forbidden there: superfluous objects stay, do no harm, and are counted"
            );
        }
    }

    /// An fdatasync of the spool took so long.
    pub fn flushed(&self, duration: Duration) {
        Self::count(&self.flushes, 1);
        self.flush_duration.observe(duration.as_secs_f64());
    }

    /// The cluster's task lives.
    pub(crate) fn beat(&self) {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.beat.store(now, Ordering::Relaxed);
    }

    /// How long ago the cluster's task last ran.
    #[must_use]
    pub fn last_beat(&self) -> Duration {
        let beat = Duration::from_millis(self.beat.load(Ordering::Relaxed));
        self.started.elapsed().saturating_sub(beat)
    }

    /// Told of each request of the repository.
    #[must_use]
    pub fn observer(&self) -> Observer {
        let (instruments, cluster) = (self.instruments.clone(), self.cluster.clone());
        Arc::new(move |op, duration, answered| {
            let outcome = if answered { "ok" } else { "error" };
            instruments
                .repository_request(&cluster, op, outcome)
                .observe(duration.as_secs_f64());
        })
    }

    /// The cluster.
    #[must_use]
    pub fn cluster(&self) -> &ClusterName {
        &self.cluster
    }

    /// The positions.
    #[must_use]
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// A copy of the facts.
    #[must_use]
    pub fn facts(&self) -> Facts {
        self.lock().clone()
    }

    /// Changes the facts.
    pub fn note(&self, change: impl FnOnce(&mut Facts)) {
        change(&mut self.lock());
    }

    /// Adds to a counter.
    pub(crate) fn count(counter: &AtomicU64, add: u64) {
        counter.fetch_add(add, Ordering::Relaxed);
    }

    /// Takes a message of the server; `seen` is its flush LSN where the message proves it.
    pub(crate) fn heard(&self, seen: Option<Seen>) {
        self.note(|facts| {
            facts.last_message = Some(PgTimestamp::from_jiff(jiff::Timestamp::now()));
        });
        if let Some(seen) = seen {
            self.rpo().see(self.clock(), seen);
        }
    }

    /// Takes the path of timelines on which the server is.
    pub(crate) fn follow(&self, path: ServerPath) {
        self.rpo().follow(&path.parts);
        self.note(|facts| facts.server_path = Some(Arc::new(path)));
    }

    /// The distances of the spool and of the repository from the server.
    #[must_use]
    pub fn exposure(&self) -> (Exposure, Exposure) {
        let now = self.clock();
        let mut rpo = self.rpo();
        // Read under the lock, so that an older answer does not take the place of a newer one.
        let positions = self.progress.positions();
        let (local, remote) = rpo.exposure(now, &positions);
        drop(rpo);
        let is_caught_up = |tier: Exposure| tier.source_known && tier.rpo == Some(Duration::ZERO);
        let proved = self.lock().last_message;
        let mut caught_up = self.caught_up();
        if is_caught_up(local) {
            caught_up.local = proved;
        }
        if is_caught_up(remote) {
            caught_up.remote = proved;
        }
        (local, remote)
    }

    /// The server's flush LSN as last seen.
    pub(crate) fn source_lsn(&self) -> Option<Lsn> {
        self.rpo().source_lsn()
    }

    /// The time at which the repository was last proved to hold everything that the server had
    /// flushed.
    #[must_use]
    pub fn caught_up_as_of(&self) -> Option<PgTimestamp> {
        self.caught_up().remote
    }

    /// Both tiers' times of that kind, to be kept for the next run.
    pub(crate) fn were_caught_up(&self) -> CaughtUp {
        *self.caught_up()
    }

    /// Takes the times that an earlier run kept.
    pub(crate) fn resume(&self, kept: CaughtUp) {
        let now = PgTimestamp::from_jiff(jiff::Timestamp::now());
        // A time in the future was written before this host's clock was set back.
        let before = |time: PgTimestamp| {
            let ago = u64::try_from(now.micros_since(time)).unwrap_or(0);
            self.clock().saturating_sub(Duration::from_micros(ago))
        };
        self.rpo()
            .were_caught_up(kept.local.map(before), kept.remote.map(before));
        *self.caught_up() = kept;
    }

    fn clock(&self) -> Duration {
        CLOCK_AT_START + self.started.elapsed()
    }

    fn rpo(&self) -> MutexGuard<'_, Tiers> {
        self.rpo.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn caught_up(&self) -> MutexGuard<'_, CaughtUp> {
        let caught_up = self.caught_up.lock();
        caught_up.unwrap_or_else(PoisonError::into_inner)
    }

    /// What the dashboard draws beside the numbers.
    #[must_use]
    pub fn details(&self) -> Arc<Details> {
        Arc::clone(&self.details.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The catalog was looked at.
    pub(crate) fn looked(&self, archive: &Arc<Archive>, details: Details) {
        *self.details.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(details);
        *self.archive.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(archive);
        self.note(|facts| facts.looked = true);
    }

    /// The archive, while its pipeline runs: for questions that only the catalog answers.
    #[must_use]
    pub fn archive(&self) -> Option<Arc<Archive>> {
        let archive = self.archive.lock().unwrap_or_else(PoisonError::into_inner);
        archive.upgrade()
    }

    /// From now on `task` asks the server over SQL, and whoever did before ends.
    pub(crate) fn polled_by(&self, task: Option<AbortHandle>) {
        let mut poll = self.poll.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(before) = std::mem::replace(&mut *poll, task) {
            before.abort();
        }
    }

    /// Records if the server refuses new connections because it shuts down or is not up yet
    /// (57P03).
    pub(crate) fn refuses(&self, refuses: bool) {
        let mut since = self
            .refused_since
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *since = refuses.then(|| since.unwrap_or_else(Instant::now));
    }

    /// The moment since which the server has refused new connections because it shuts down; `None`
    /// while it takes them.
    pub(crate) fn refused_since(&self) -> Option<Instant> {
        *self
            .refused_since
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// How long the daemon has run.
    #[must_use]
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// A repository request failed, for `object`; it is retried.
    pub(crate) fn repository_failed(
        &self,
        operation: &'static str,
        object: &str,
        error: &repository::Error,
    ) {
        self.note(|facts| {
            *facts.repository_errors.entry(operation).or_default() += 1;
            let message = error.to_string();
            facts.repository_gone |= error.is_gone();
            if error.is_gone() || error.exit_kind() == ExitKind::Integrity {
                let asked = format!("{operation} {object}");
                facts.repository_broken.insert(asked, message.clone());
            }
            if facts.repository_error.as_ref() != Some(&message) {
                tracing::warn!(cluster = %self.cluster, operation, error = %message, "repository request failed; retrying");
                facts.repository_error = Some(message);
            }
        });
    }

    /// A failed attempt is of no further use.
    pub(crate) fn repository_no_longer_asked(&self, operation: &'static str) {
        self.note(|facts| {
            let begins = format!("{operation} ");
            facts
                .repository_broken
                .retain(|asked, _| !asked.starts_with(&begins));
        });
    }

    /// A repository request succeeded, for `object`.
    pub(crate) fn repository_answered(&self, operation: &'static str, object: &str) {
        self.note(|facts| {
            if facts.repository_gone {
                // It is the right place: what was said of the wrong one is over.
                facts.repository_gone = false;
                facts.repository_returns += 1;
                facts.repository_broken.clear();
            }
            if !facts.repository_broken.is_empty() {
                facts
                    .repository_broken
                    .remove(&format!("{operation} {object}"));
            }
            if facts.repository_error.take().is_some() {
                tracing::info!(cluster = %self.cluster, "the repository answers again");
            }
        });
    }

    fn lock(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
