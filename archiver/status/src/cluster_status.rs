//! The status of one cluster ([`ClusterStatus`]), for the dashboard, the metrics and `status`.
//!
//! The stages write it, and any task may read it. Locks are held for a few assignments only and
//! never across I/O, so a reader cannot delay the stream. An unknown value is `None`, never 0.

mod caught_up;
mod locked_objects;
mod report;
mod server_path;

pub use caught_up::CaughtUp;
use locked_objects::LockedObjects;

use crate::durable::DurablePositions;
pub use server_path::ServerPath;

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use prometheus_client::metrics::histogram::Histogram;
use repository::{
    ExitKind, FoundLoss, Loss,
    store::{Observer, OpenPuts},
};
use wal_format::{Branch, ClusterName, Lsn, ObjectKey, PgTimestamp, SystemIdentifier};

use crate::{
    details::Details,
    gap::OpenGap,
    instruments::Instruments,
    relation_names::RelationNames,
    report::{ArchiveCommandReport, BackupProgress, BackupReport, SlotReport, WindowReport},
    rpo::{
        Exposure,
        tiers::{Seen, Tiers},
    },
    schedule::ScheduleReport,
    standby::StandbyReport,
};

/// The status of one cluster.
#[derive(Debug)]
pub struct ClusterStatus {
    cluster: ClusterName,
    positions: Arc<dyn DurablePositions>,
    started: Instant,
    facts: Mutex<Facts>,
    details: Mutex<Arc<Details>>,
    caught_up: Mutex<CaughtUp>,
    relation_names: Mutex<RelationNames>,
    /// The databases whose tables have to be read again.
    names_asked: Mutex<BTreeSet<u32>>,
    refused_since: Mutex<Option<Instant>>,
    rpo: Mutex<Tiers>,
    /// The number of WAL bytes received, including the overlap after a reconnect.
    pub wal_received_bytes: AtomicU64,
    /// The number of bytes of sealed segments and tails stored in the repository.
    pub wal_stored_bytes: AtomicU64,
    /// The number of segments sealed, stored and verified.
    pub segments_completed: AtomicU64,
    /// The number of superfluous objects that the repository does not allow to be deleted.
    objects_locked: LockedObjects,
    /// The number of fsyncs of the spool.
    pub flushes: AtomicU64,
    /// The time of the task's last signal, in milliseconds since `started`.
    beat: AtomicU64,
    instruments: Instruments,
    flush_duration: Histogram,
    /// The number of failed repository requests, by request and kind of failure.
    repository_errors: Arc<Mutex<BTreeMap<(&'static str, &'static str), u64>>>,
    /// The puts into the repository that it has not answered yet.
    open_puts: Arc<OpenPuts>,
}

/// The estimators' clock at the start of this process: far enough from 0 that the times of earlier
/// runs come after 0.
const CLOCK_AT_START: Duration = Duration::from_secs(1 << 32);

/// Every reason for a reconnect that the supervisor counts.
pub const RECONNECT_REASONS: [&str; 18] = [
    "catalog",
    "catalog_back",
    "connection",
    "damaged_record",
    "disk",
    "gap",
    "gap_closed",
    "gave_up",
    "no_overlap",
    "other",
    "repository",
    "repository_back",
    "resources",
    "server_closed",
    "server_stopped",
    "silent",
    "slot_in_use",
    "spool_full",
];

/// WAL that the repository was found to lack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hole {
    /// The branch of the WAL.
    pub branch: Branch,
    /// The first missing byte.
    pub from_lsn: Lsn,
    /// The first byte after the missing WAL.
    pub to_lsn: Lsn,
    /// The reason for the operator.
    pub reason: String,
}

/// The facts in addition to the positions.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// True if a replication stream is up.
    pub connected: bool,
    /// The time of the server's last message.
    pub last_message: Option<PgTimestamp>,
    /// The timelines that lead to the server's current one. `None` before it was seen.
    pub server_path: Option<Arc<ServerPath>>,
    /// The cluster's system identifier. `None` before the first connection.
    pub system_identifier: Option<SystemIdentifier>,
    /// The server's version, as the server prints it.
    pub server_version: Option<String>,
    /// The branch being archived. `None` before one was taken up.
    pub branch: Option<Branch>,
    /// The name of the replication slot in use.
    pub slot: Option<String>,
    /// The stream's last error. Cleared when the stream runs again.
    pub stream_error: Option<String>,
    /// The repository's last error. Cleared by the next success.
    pub repository_error: Option<String>,
    /// Repository errors that an operator has to examine, by request: the place is another one, or
    /// its content is damaged or different. The request is retried nevertheless, and its success
    /// removes the error.
    pub repository_broken: BTreeMap<String, String>,
    /// True if the place was last seen not to hold the archive.
    pub repository_gone: bool,
    /// The error of a place that holds an older state of the archive. `None` if the place was last
    /// seen to hold the archive.
    pub repository_older: Option<String>,
    /// WAL that the repository was found to lack. `None` when it holds the WAL again, or the loss
    /// was accepted.
    pub hole: Option<Hole>,
    /// Archived objects that the repositories that answer lack, while another one is away that may
    /// hold them.
    pub unproved: Vec<Loss>,
    /// Device and inode of the repository's folder when it last held the newest WAL. `None` for
    /// several repositories, for a bucket and before the first check.
    pub folder: Option<(u64, u64)>,
    /// The number of times that the place held the archive again.
    pub repository_returns: u64,
    /// Archived objects that the repository lacks. A loss is listed until the objects are back or
    /// the loss is accepted.
    pub losses: Vec<FoundLoss>,
    /// The reason why the record of lost objects cannot be read.
    pub losses_problem: Option<String>,
    /// The reason why no program can tell whose archive the repository is: an object below `epoch/`
    /// is damaged. Nothing can be restored then.
    pub identity_problem: Option<String>,
    /// The number of times that the stages have started. The look of an earlier archive does not
    /// count.
    pub archive_number: u64,
    /// Messages about what was lost and stored again since the start.
    pub repaired: Vec<String>,
    /// The reason why the catalog on disk is not used. Archiving continues with one in memory.
    pub catalog_error: Option<String>,
    /// The reason why the last attempt to lock what the backups need failed.
    pub lock_error: Option<String>,
    /// The reason why archiving is broken. Only an operator can repair it.
    pub broken: Option<String>,
    /// A description of WAL that was declared lost. Cleared by a later base backup.
    pub lost: Option<String>,
    /// The reason why no base backup leads to the server's present. Cleared by one that does.
    pub unreached: Option<String>,
    /// Files that `archive_command` pushed and whose bytes differ from the archived ones, by name,
    /// with the first difference.
    pub push_differs: BTreeMap<OsString, String>,
    /// A setting of the server that makes commits wait for us in a dangerous way.
    pub danger: Option<&'static str>,
    /// The reason why standbys cannot stream from the archive, although `walsender` is set.
    pub walsender_problem: Option<String>,
    /// The reason why the spool accepts no more WAL, while it waits for space.
    pub spool_full: Option<&'static str>,
    /// The number of bytes in the spool's files.
    pub spool_used_bytes: u64,
    /// The number of bytes that the spool may use: its current size plus the free space on its
    /// disk, or the configured limit if that is less.
    pub spool_limit_bytes: Option<u64>,
    /// Missing WAL that is being searched for, until it is found or declared lost.
    pub gap: Option<OpenGap>,
    /// Our slots on standbys, as last seen.
    pub standbys: Vec<StandbyReport>,
    /// True if the last query of the server found no slot of ours. False while the server cannot be
    /// queried.
    pub slot_missing: bool,
    /// The base backup that runs on the server. `None` if none is known.
    pub backup_progress: Option<BackupProgress>,
    /// The base backups of the daemon. `None` without `backup_schedule`.
    pub backup_schedule: Option<ScheduleReport>,
    /// The restore drills of the daemon. `None` without `drill_schedule`.
    pub drill_schedule: Option<ScheduleReport>,
    /// The server's own archiving. `None` while the server is not polled.
    pub archive_command: Option<ArchiveCommandReport>,
    /// The slot, as the server last reported it.
    pub slot_report: Option<SlotReport>,
    /// The restorable window, from the last check of the catalog.
    pub window: WindowReport,
    /// The newest base backup, from the last check of the catalog.
    pub last_backup: Option<BackupReport>,
    /// The server's clock minus ours, in seconds. `None` while the server is not polled.
    pub clock_offset_seconds: Option<f64>,
    /// True once the catalog was checked since the start.
    pub looked: bool,
    /// The number of reconnects, by reason.
    pub reconnects: BTreeMap<&'static str, u64>,
}

impl Facts {
    /// Makes everything unknown that only a look into the catalog shows, because the stages start
    /// again. Returns the number of the new archive.
    pub fn start_anew(&mut self) -> u64 {
        self.looked = false;
        self.window = WindowReport::default();
        self.archive_number += 1;
        self.archive_number
    }

    /// Records the error of a place that holds an older state, and returns its text. A start finds
    /// every missing object; its text replaces the text of a check that names only the newest one.
    fn older_state(&mut self, operation: &str, found: String) -> String {
        let known = self.repository_older.take();
        let text = match &known {
            Some(known) if operation != "start" => known.clone(),
            _ => found,
        };
        let errors = self.repository_broken.values_mut();
        for error in errors.chain(&mut self.repository_error) {
            if known.as_ref() == Some(&*error) {
                error.clone_from(&text);
            }
        }
        self.repository_older = Some(text.clone());
        text
    }
}

impl ClusterStatus {
    /// Creates the status of a cluster without any facts. `positions` knows how far its WAL is
    /// durable.
    #[must_use]
    pub fn new(
        cluster: ClusterName,
        instruments: Instruments,
        positions: Arc<dyn DurablePositions>,
    ) -> Self {
        Self {
            flush_duration: instruments.flush_duration(&cluster),
            instruments,
            cluster,
            positions,
            started: Instant::now(),
            facts: Mutex::default(),
            details: Mutex::default(),
            caught_up: Mutex::default(),
            relation_names: Mutex::default(),
            names_asked: Mutex::default(),
            refused_since: Mutex::default(),
            rpo: Mutex::default(),
            wal_received_bytes: AtomicU64::new(0),
            wal_stored_bytes: AtomicU64::new(0),
            segments_completed: AtomicU64::new(0),
            objects_locked: LockedObjects::default(),
            flushes: AtomicU64::new(0),
            beat: AtomicU64::new(0),
            repository_errors: Arc::default(),
            open_puts: Arc::default(),
        }
    }

    /// Counts an object that the repository does not allow to be deleted. The first one is logged.
    /// An object whose deletion is tried again is counted once.
    pub fn locked(&self, key: &ObjectKey, error: &repository::Error) {
        if self.objects_locked.add(key) {
            tracing::info!(
                %error,
                "deleting is forbidden there: superfluous objects stay, do no harm, and are counted"
            );
        }
    }

    /// Records the duration of an fdatasync of the spool.
    pub fn flushed(&self, duration: Duration) {
        Self::count(&self.flushes, 1);
        self.flush_duration.observe(duration.as_secs_f64());
    }

    /// Records that the cluster's task is alive.
    pub fn beat(&self) {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.beat.store(now, Ordering::Relaxed);
    }

    /// Returns the time since the cluster's task last ran.
    #[must_use]
    pub fn last_beat(&self) -> Duration {
        let beat = Duration::from_millis(self.beat.load(Ordering::Relaxed));
        self.started.elapsed().saturating_sub(beat)
    }

    /// Returns the callback that measures each request to the repository.
    #[must_use]
    pub fn observer(&self) -> Observer {
        let (instruments, cluster) = (self.instruments.clone(), self.cluster.clone());
        let errors = Arc::clone(&self.repository_errors);
        Arc::new(move |op, duration, failure| {
            let outcome = if failure.is_none() { "ok" } else { "error" };
            instruments
                .repository_request(&cluster, op, outcome)
                .observe(duration.as_secs_f64());
            if let Some(kind) = failure {
                count_error(&errors, op, kind);
            }
        })
    }

    /// Returns the puts into the repository that are being executed.
    #[must_use]
    pub fn open_puts(&self) -> Arc<OpenPuts> {
        Arc::clone(&self.open_puts)
    }

    /// Returns the number of failed repository requests since the start, by request and kind of
    /// failure. A request counts once, even if the store retried it.
    #[must_use]
    pub fn repository_errors(&self) -> Vec<(String, String, u64)> {
        let errors = self.repository_errors.lock();
        let errors = errors.unwrap_or_else(PoisonError::into_inner);
        let each = errors.iter();
        each.map(|((op, kind), count)| ((*op).to_owned(), (*kind).to_owned(), *count))
            .collect()
    }

    /// The name of the cluster.
    #[must_use]
    pub fn cluster(&self) -> &ClusterName {
        &self.cluster
    }

    /// Returns a copy of the facts.
    #[must_use]
    pub fn facts(&self) -> Facts {
        self.lock().clone()
    }

    /// Changes the facts.
    pub fn note(&self, change: impl FnOnce(&mut Facts)) {
        change(&mut self.lock());
    }

    /// Adds to a counter.
    pub fn count(counter: &AtomicU64, add: u64) {
        counter.fetch_add(add, Ordering::Relaxed);
    }

    /// Records a message of the server. `seen` is the server's flush LSN, if the message contains
    /// it.
    pub fn heard(&self, seen: Option<Seen>) {
        self.note(|facts| {
            facts.last_message = Some(PgTimestamp::from_jiff(jiff::Timestamp::now()));
        });
        if let Some(seen) = seen {
            self.rpo().see(self.clock(), seen);
        }
    }

    /// Records the server's path of timelines.
    pub fn follow(&self, path: ServerPath) {
        self.rpo().follow(&path.parts);
        self.note(|facts| facts.server_path = Some(Arc::new(path)));
    }

    /// Returns the distances of the spool and of the repository from the server.
    #[must_use]
    pub fn exposure(&self) -> (Exposure, Exposure) {
        let now = self.clock();
        let mut rpo = self.rpo();
        // Read under the lock, so that an older result cannot replace a newer one.
        let durable = self.positions.durable(rpo.path());
        let (local, remote) = rpo.exposure(now, &durable);
        drop(rpo);
        let is_caught_up = |tier: Exposure| tier.source_known && tier.rpo == Some(Duration::ZERO);
        let proved = self.lock().last_message;
        let mut caught_up = self.caught_up();
        if is_caught_up(local) {
            caught_up.local = proved;
        }
        if is_caught_up(remote) {
            caught_up.remote = proved;
        } else if let Some(age) = remote.proved {
            // WAL that was lost after it had been held is older than the last proof.
            let micros = i64::try_from(age.as_micros()).unwrap_or(i64::MAX);
            let now = PgTimestamp::from_jiff(jiff::Timestamp::now());
            let since = PgTimestamp(now.0.saturating_sub(micros));
            caught_up.remote = caught_up.remote.map(|known| known.min(since));
        }
        (local, remote)
    }

    /// The server's flush LSN as last seen.
    pub fn source_lsn(&self) -> Option<Lsn> {
        self.rpo().source_lsn()
    }

    /// The last time at which the repository was proved to hold everything that the server had
    /// flushed. `None` if it never was.
    #[must_use]
    pub fn caught_up_as_of(&self) -> Option<PgTimestamp> {
        self.caught_up().remote
    }

    /// The last such times of both tiers, to be stored for the next run.
    pub fn were_caught_up(&self) -> CaughtUp {
        *self.caught_up()
    }

    /// Sets the times that an earlier run stored.
    pub fn resume(&self, kept: CaughtUp) {
        let now = PgTimestamp::from_jiff(jiff::Timestamp::now());
        // A time in the future was written before this host's clock was set back. It counts as now.
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

    /// The names of the server's tables.
    pub fn relation_names(&self) -> MutexGuard<'_, RelationNames> {
        let names = self.relation_names.lock();
        names.unwrap_or_else(PoisonError::into_inner)
    }

    /// The databases whose names have to be read again.
    pub fn names_asked(&self) -> MutexGuard<'_, BTreeSet<u32>> {
        let asked = self.names_asked.lock();
        asked.unwrap_or_else(PoisonError::into_inner)
    }

    /// The details that the dashboard draws in addition to the numbers.
    #[must_use]
    pub fn details(&self) -> Arc<Details> {
        Arc::clone(&self.details.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Records the result of a check of the catalog, which belongs to the archive with this number.
    pub fn looked(&self, archive_number: u64, details: Details) {
        *self.details.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(details);
        self.note(|facts| facts.looked |= facts.archive_number == archive_number);
    }

    /// Records whether the server refuses new connections because it shuts down or is not up yet
    /// (57P03).
    pub fn refuses(&self, refuses: bool) {
        let mut since = self
            .refused_since
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *since = refuses.then(|| since.unwrap_or_else(Instant::now));
    }

    /// The time since which the server refuses new connections because it shuts down. `None` while
    /// it accepts them.
    pub fn refused_since(&self) -> Option<Instant> {
        *self
            .refused_since
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that a repository request for `object` failed. It is retried.
    pub fn repository_failed(
        &self,
        operation: &'static str,
        object: &str,
        error: &repository::Error,
    ) {
        if operation == "start" {
            // The observer measures the requests of an open archive. It does not count a failure to
            // open the archive.
            let kind = error.failure_kind().unwrap_or("other");
            count_error(&self.repository_errors, "open", kind);
        }
        self.note(|facts| {
            let mut message = error.to_string();
            facts.repository_gone |= error.is_gone();
            if matches!(error, repository::Error::OlderState { .. }) {
                message = facts.older_state(operation, message);
            }
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

    /// Records that requests of this operation are not retried any more, and removes their errors.
    pub fn repository_no_longer_asked(&self, operation: &'static str) {
        self.note(|facts| {
            let begins = format!("{operation} ");
            facts
                .repository_broken
                .retain(|asked, _| !asked.starts_with(&begins));
        });
    }

    /// Records that a repository request for `object` succeeded.
    pub fn repository_answered(&self, operation: &'static str, object: &str) {
        self.note(|facts| {
            if facts.repository_older.is_some() && operation != "start" {
                // The request may have begun before the place was exchanged. Only a start reads
                // everything that the place holds.
                facts
                    .repository_broken
                    .remove(&format!("{operation} {object}"));
                return;
            }
            if facts.repository_gone {
                // This is the right place again, so errors of the wrong place are over.
                facts.repository_gone = false;
                facts.repository_older = None;
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

    /// Clears the failure that a check of the place reported, and no other one.
    pub fn repository_back(&self, check: &'static str) {
        let failed = format!("{check} ");
        let is_failed = self.lock().repository_broken.contains_key(&failed);
        if is_failed {
            self.repository_answered(check, "");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn count_error(
    errors: &Mutex<BTreeMap<(&'static str, &'static str), u64>>,
    op: &'static str,
    kind: &'static str,
) {
    let mut errors = errors.lock().unwrap_or_else(PoisonError::into_inner);
    *errors.entry((op, kind)).or_default() += 1;
}

#[cfg(test)]
mod tests {
    use repository::{Error, Loss, PathPart};
    use wal_format::SegmentSize;

    use super::*;
    use crate::durable::DurableWal;

    #[derive(Debug)]
    struct NoPositions;

    impl DurablePositions for NoPositions {
        fn durable(&self, _: &[PathPart]) -> DurableWal {
            unreachable!("no report is made")
        }
    }

    #[test]
    fn only_a_start_ends_the_error_of_an_older_state() {
        let name = "main".parse().expect("a name");
        let status = ClusterStatus::new(name, Instruments::default(), Arc::new(NoPositions));
        let newest = Loss::Wal {
            system: SystemIdentifier(7),
            segment_size: SegmentSize::DEFAULT,
            branch: Branch::FIRST,
            from_lsn: Lsn(1 << 24),
            to_lsn: Lsn(2 << 24),
        };
        let older = Error::OlderState {
            url: "s3://b".to_owned(),
            missing: newest.to_string(),
            newest: Box::new(newest),
        };
        status.repository_failed("tail", "", &older);
        // These requests began before the bucket was exchanged.
        status.repository_no_longer_asked("tail");
        status.repository_answered("seal", "000000010000000000000001");
        status.repository_back("presence");
        let facts = status.facts();
        assert_eq!(facts.repository_older, Some(older.to_string()));
        assert_eq!(facts.repository_error, facts.repository_older);
        assert_eq!(facts.repository_returns, 0);
        status.repository_answered("start", "");
        let facts = status.facts();
        assert!(!facts.repository_gone && facts.repository_returns == 1);
        assert_eq!(
            (facts.repository_older, facts.repository_error),
            (None, None)
        );
    }
}
