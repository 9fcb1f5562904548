//! Checks every cluster once a second ([`Monitor`]). Produces the time series, the events, the
//! alerts, the live stream and the notifications.
//!
//! It reads only the status that the stages have written, so it cannot disturb them. Views query
//! the monitor and compute nothing themselves.

pub mod caught_up;
pub mod events;
pub mod queries;
pub mod series;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::{Duration, Instant},
};

use repository::config::ClusterSettings;
use status::{
    alert::{Alert, Severity},
    alerts,
    cluster_status::{CaughtUp, ClusterStatus},
    details::Details,
    light::raise,
    outcomes::RUNS,
    report::{ClusterReport, Counters},
    state::State,
    units,
};
use tokio::{
    sync::{broadcast, watch},
    time::MissedTickBehavior,
};
use wal_format::{Branch, ClusterName, OutcomeKind, PgTimestamp};

use self::{
    events::{Event, Events},
    queries::ArchiveQueries,
    series::{METRICS, Point, Sample, Series},
};
use crate::{
    clock::unix_second,
    notifications::{Mailbox, Notifier},
};

/// The interval at which the clusters are checked.
const INTERVAL: Duration = Duration::from_secs(1);
/// The minimum interval at which the times of [`CaughtUp`] are written to disk. The first RPO after
/// a restart counts from them.
const KEEP_INTERVAL: Duration = Duration::from_secs(2);
/// The number of messages that a slow reader of the live stream may lag before it misses some.
const STREAM_MESSAGES_MAX: usize = 256;
/// The time over which the growth of the spool is measured, in seconds.
const GROWTH_SECONDS: u64 = 1800;

/// The kind of event for a failover that lost commits.
const FAILOVER: &str = "failover";
/// A failover found longer ago than this, by any host, raises no event.
const FAILOVER_NEWS_MICROS: i64 = 86_400 * 1_000_000;

/// A message of the live stream.
#[derive(Clone, Debug)]
pub struct Message {
    /// `status`, `alert` or `event`.
    pub event: &'static str,
    /// The message as one JSON document.
    pub data: Arc<str>,
}

/// A cluster that is monitored.
#[derive(Debug)]
pub struct Watched {
    settings: ClusterSettings,
    status: Arc<ClusterStatus>,
    archive: Arc<dyn ArchiveQueries>,
    recorded: Arc<Recorded>,
}

/// The state that is kept when the cluster's settings change.
#[derive(Debug)]
struct Recorded {
    series: Mutex<Series>,
    events: Mutex<Events>,
    book: Mutex<Book>,
    mailbox: Arc<Mailbox>,
}

/// The state at the previous check.
#[derive(Debug, Default)]
struct Book {
    /// The time since which each alert condition holds.
    holds: BTreeMap<&'static str, PgTimestamp>,
    firing: Vec<Alert>,
    state: Option<State>,
    timeline: Option<u32>,
    backup: Option<String>,
    outcomes: BTreeMap<OutcomeKind, String>,
    /// The number of runs that failed since the start, by kind.
    failed: BTreeMap<OutcomeKind, u64>,
    /// The failovers that were reported, in this run or an earlier one.
    failovers: BTreeSet<(Branch, Branch)>,
    looked: bool,
    /// The number of repairs that were reported as events.
    repaired: usize,
    received: VecDeque<(u64, u64)>,
    /// The time at which [`CaughtUp`] was last written, and its content.
    kept: Option<(Instant, CaughtUp)>,
}

/// The monitor of all clusters.
#[derive(Debug)]
pub struct Monitor {
    clusters: RwLock<BTreeMap<ClusterName, Arc<Watched>>>,
    /// The state of each cluster at the last check.
    states: watch::Sender<Vec<(ClusterName, State)>>,
    stream: broadcast::Sender<Message>,
    notifier: Arc<Notifier>,
    certificate_expiry: Mutex<Option<PgTimestamp>>,
}

impl Monitor {
    /// Creates a monitor without clusters. Passes alerts to `notifier`.
    #[must_use]
    pub fn new(notifier: Arc<Notifier>) -> Arc<Self> {
        Arc::new(Self {
            clusters: RwLock::default(),
            states: watch::Sender::default(),
            stream: broadcast::Sender::new(STREAM_MESSAGES_MAX),
            notifier,
            certificate_expiry: Mutex::default(),
        })
    }

    /// Checks all clusters once a second. Never returns.
    pub async fn run(self: Arc<Self>) {
        let mut timer = tokio::time::interval(INTERVAL);
        timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            timer.tick().await;
            let monitor = Arc::clone(&self);
            // The records are written to a disk. A disk that hangs must not block the other tasks.
            let looked = tokio::task::spawn_blocking(move || {
                let clusters = monitor.clusters();
                let states = clusters.iter().map(|cluster| monitor.look(cluster));
                monitor.states.send_replace(states.collect());
                let notifier = &monitor.notifier;
                notifier.finished_round(unix_second(), || monitor.reports());
            });
            drop(looked.await);
        }
    }

    /// Starts to monitor a cluster. Records of an earlier run, or of an earlier start in this run,
    /// are continued.
    pub fn watch(
        &self,
        settings: ClusterSettings,
        status: Arc<ClusterStatus>,
        archive: Arc<dyn ArchiveQueries>,
    ) {
        let name = settings.name.clone();
        let known = self.cluster(name.as_str());
        let recorded = known.map_or_else(
            || {
                let directory = settings.spool.join(name.as_str()).join("history");
                // Without the directory, all of these are kept in memory only and log that.
                drop(repository::durable::create_dir_all(&directory));
                let mailbox = self.notifier.open(&name, &directory);
                Arc::new(Recorded {
                    series: Mutex::new(Series::open(&directory.join("series"))),
                    events: Mutex::new(Events::open(&directory.join("events"))),
                    book: Mutex::new(Book {
                        firing: mailbox.standing(),
                        ..Book::default()
                    }),
                    mailbox,
                })
            },
            |known| Arc::clone(&known.recorded),
        );
        let watched = Arc::new(Watched {
            settings,
            status,
            archive,
            recorded,
        });
        let mut clusters = self
            .clusters
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        clusters.insert(name, watched);
    }

    /// Stops monitoring a cluster that was removed from the configuration, and resolves its alerts.
    pub fn forget(&self, name: &ClusterName) {
        let mut clusters = self
            .clusters
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let gone = clusters.remove(name);
        drop(clusters);
        if let Some(cluster) = gone {
            lock(&cluster.recorded.book).firing.clear();
            let system = cluster.status.facts().system_identifier;
            let mailbox = &cluster.recorded.mailbox;
            self.notifier.update(mailbox, system, &[], |_| false);
        }
    }

    fn clusters(&self) -> Vec<Arc<Watched>> {
        let clusters = self.clusters.read().unwrap_or_else(PoisonError::into_inner);
        clusters.values().map(Arc::clone).collect()
    }

    /// Sets the expiry time of the dashboard's certificate.
    pub fn certificate_ends(&self, expiry: Option<PgTimestamp>) {
        *lock(&self.certificate_expiry) = expiry;
    }

    /// Returns the report on every cluster, from memory, with its alerts.
    #[must_use]
    pub fn reports(&self) -> Vec<ClusterReport> {
        self.clusters()
            .iter()
            .map(|cluster| self.report(cluster))
            .collect()
    }

    /// Returns the state of every cluster at the last check. Unlike [`Monitor::reports`], it waits
    /// for no lock that is held while a record is written to a disk.
    #[must_use]
    pub fn states(&self) -> Vec<(ClusterName, State)> {
        self.states.borrow().clone()
    }

    /// Returns the cluster with this name.
    #[must_use]
    pub fn cluster(&self, name: &str) -> Option<Arc<Watched>> {
        self.clusters()
            .into_iter()
            .find(|cluster| cluster.settings.name.as_str() == name)
    }

    /// Subscribes to the live stream.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<Message> {
        self.stream.subscribe()
    }

    /// Sends a test notification to every receiver. Returns false if no receiver is configured.
    #[must_use]
    pub fn notify_test(&self) -> bool {
        self.notifier.send_test()
    }

    /// Returns true if a receiver of notifications is configured.
    #[must_use]
    pub fn has_receivers(&self) -> bool {
        self.notifier.has_receivers()
    }

    fn report(&self, cluster: &Watched) -> ClusterReport {
        let mut report = cluster
            .status
            .report(&cluster.settings, cluster.archive.places());
        report.certificate_expiry = *lock(&self.certificate_expiry);
        let book = lock(&cluster.recorded.book);
        report.alerts = book.firing.clone();
        report.counters.runs_failed = book
            .failed
            .iter()
            .map(|(kind, count)| (*kind, *count))
            .collect();
        drop(book);
        let (now, day) = (unix_second(), 86_400);
        let series = lock(&cluster.recorded.series);
        report.rpo_max_24h_seconds = series.greatest("rpo_remote", now, day).map(f64::from);
        report.wal_bytes_per_second = series.mean("received_bytes_per_second", now, 60);
        let grown = series.query(
            "spool_used_bytes",
            now - GROWTH_SECONDS.min(now),
            now + 1,
            30,
        );
        drop(series);
        report.spool_full_in_seconds =
            full_in_seconds(&report.counters, &grown.unwrap_or_default());
        report.window_missing_seconds = window_missing_seconds(cluster, &report);
        if let (Some(slot), Some(rate)) = (&mut report.slot, report.wal_bytes_per_second) {
            #[expect(clippy::cast_precision_loss, reason = "a length of time to be read")]
            let safe = slot.safe_wal_bytes.map(|safe| safe as f64);
            slot.full_in_seconds = safe.filter(|_| rate >= 1.0).map(|safe| safe / rate);
        }
        // The alerts are those of the last check. One that is over must not decide the state.
        let conditions = alerts::firing(&report);
        let mut standing = std::mem::take(&mut report.alerts);
        standing.retain(|alert| {
            let holds = conditions.iter().any(|(name, _)| *name == alert.name);
            holds || !alerts::is_decided(alert.name, &report)
        });
        report.alerts = standing;
        raise(&mut report.causes, &report.alerts);
        report.settle();
        report
    }

    /// Checks a cluster: records its numbers, events and alerts. Returns its state.
    fn look(&self, cluster: &Watched) -> (ClusterName, State) {
        let report = self.report(cluster);
        let second = unix_second();
        let sample = lock(&cluster.recorded.book).sample(&report);
        keep_caught_up(cluster);
        lock(&cluster.recorded.series).add(second, &sample);
        let mut said: Vec<Event> = Vec::new();
        {
            let mut book = lock(&cluster.recorded.book);
            let mut events = lock(&cluster.recorded.events);
            let details = cluster.status.details();
            for (kind, severity, message) in book.news(&report, &details) {
                said.push(events.add(kind, severity, &message));
            }
            for message in book.repaired(cluster.status.facts().repaired) {
                said.push(events.add("repair", Severity::Critical.name(), &message));
            }
            for summary in book.failovers(&report, &details, &events) {
                said.push(events.add(FAILOVER, Severity::Critical.name(), &summary));
            }
            let (raised, resolved) = book.update(&report);
            for (what, alerts) in [("alert", raised), ("resolved", resolved)] {
                for alert in alerts {
                    let severity = if what == "alert" {
                        alert.severity.name()
                    } else {
                        "info"
                    };
                    // The event of the alert has its text.
                    let text = if what == "alert" {
                        alert.summary.clone()
                    } else {
                        let lasted = units::span(report.as_of, alert.since);
                        format!("over after {}", units::duration(lasted))
                    };
                    let message = format!("{}: {text}", alert.name);
                    said.push(events.add(what, severity, &message));
                    self.send("alert", &serde_json::json!({
                        "cluster": cluster.settings.name, "resolved": what != "alert", "alert": alert,
                    }));
                }
            }
        }
        let book = lock(&cluster.recorded.book);
        let (firing, holds) = (book.firing.clone(), book.holds.clone());
        drop(book);
        let is_inhibited = |name: &str| {
            alerts::rule(name).is_some_and(|rule| {
                let mut causes = rule.inhibited_by.iter();
                causes.any(|cause| {
                    holds.contains_key(cause) || firing.iter().any(|alert| alert.name == *cause)
                })
            })
        };
        let system = report.source.system_identifier;
        let mailbox = &cluster.recorded.mailbox;
        self.notifier.update(mailbox, system, &firing, is_inhibited);
        for event in said {
            self.send(
                "event",
                &serde_json::json!({
                    "cluster": cluster.settings.name, "event": event,
                }),
            );
        }
        if self.stream.receiver_count() > 0 {
            self.send("status", &self.report(cluster));
        }
        (cluster.settings.name.clone(), report.state)
    }

    fn send<T: serde::Serialize>(&self, event: &'static str, data: &T) {
        if self.stream.receiver_count() == 0 {
            return;
        }
        if let Ok(data) = serde_json::to_string(data) {
            let data = Arc::from(data);
            drop(self.stream.send(Message { event, data }));
        }
    }
}

impl Watched {
    /// The settings of the cluster.
    #[must_use]
    pub fn settings(&self) -> &ClusterSettings {
        &self.settings
    }

    /// The status that the stages have written.
    #[must_use]
    pub fn status(&self) -> &Arc<ClusterStatus> {
        &self.status
    }

    /// The archive of the running stages.
    #[must_use]
    pub fn archive(&self) -> &Arc<dyn ArchiveQueries> {
        &self.archive
    }

    /// The time series.
    pub fn series(&self) -> MutexGuard<'_, Series> {
        lock(&self.recorded.series)
    }

    /// The events.
    pub fn events(&self) -> MutexGuard<'_, Events> {
        lock(&self.recorded.events)
    }
}

impl Book {
    /// Returns the rates since the previous check, and the current levels.
    fn sample(&mut self, report: &ClusterReport) -> Sample {
        let counters = &report.counters;
        self.received
            .push_back((counters.wal_received_bytes, counters.wal_stored_bytes));
        if self.received.len() > 2 {
            self.received.pop_front();
        }
        let rate = |of: fn(&(u64, u64)) -> u64| {
            let before = self.received.front().map_or(0, of);
            let now = self.received.back().map_or(0, of);
            float(Some(now.saturating_sub(before)))
        };
        let seconds = |seconds: Option<f64>| {
            #[expect(clippy::cast_possible_truncation, reason = "a point of a picture")]
            let seconds = seconds.unwrap_or(f64::NAN) as f32;
            seconds
        };
        let mut sample = [f32::NAN; METRICS.len()];
        sample.copy_from_slice(&[
            seconds(report.durable.remote.rpo_seconds),
            seconds(report.durable.local.rpo_seconds),
            float(report.durable.remote.lag_bytes),
            rate(|pair| pair.0),
            rate(|pair| pair.1),
            float(Some(counters.upload_queue_bytes)),
            float(Some(counters.spool_used_bytes)),
            float(report.slot.as_ref().and_then(|slot| slot.retained_bytes)),
        ]);
        sample
    }

    /// Returns the changes since the previous check: kind, severity, and a message for users.
    fn news(
        &mut self,
        report: &ClusterReport,
        details: &Details,
    ) -> Vec<(&'static str, &'static str, String)> {
        let mut news = Vec::new();
        if self.state != Some(report.state) {
            let severity = match report.state {
                State::Ok => "info",
                State::Degraded | State::Unknown => "warning",
                State::AtRisk | State::Broken => "critical",
            };
            let name = report.state.name().replace('_', " ");
            news.push(("state", severity, format!("{name}: {}", report.reason)));
            self.state = Some(report.state);
        }
        if let Some(timeline) = report.source.timeline.map(|timeline| timeline.get()) {
            if self.timeline.is_some_and(|known| known != timeline) {
                news.push((
                    "timeline",
                    "warning",
                    format!("the server is on timeline {timeline}"),
                ));
            }
            self.timeline = Some(timeline);
        }
        if !report.looked {
            return news;
        }
        let newest = details.backups.last().map(|backup| backup.id.to_string());
        if newest != self.backup {
            if let (true, Some(id)) = (self.looked, &newest) {
                news.push(("backup", "info", format!("base backup {id} is complete")));
            }
            self.backup = newest;
        }
        for kind in RUNS {
            let Some(outcome) = details.newest(kind) else {
                continue;
            };
            let id = outcome.id.to_string();
            if self.outcomes.get(&kind) != Some(&id) {
                // The news of a complete backup comes from the list of backups.
                let is_told = kind == OutcomeKind::Backup && outcome.passed;
                if self.looked && !is_told {
                    let (severity, how) = if outcome.passed {
                        ("info", "passed")
                    } else {
                        *self.failed.entry(kind).or_default() += 1;
                        ("critical", "failed")
                    };
                    news.push((
                        kind.name(),
                        severity,
                        format!("{kind} {how}: {}", outcome.message),
                    ));
                }
                self.outcomes.insert(kind, id);
            }
        }
        self.looked = true;
        news
    }

    /// Returns the messages about repairs that were added since the last check.
    fn repaired(&mut self, repaired: Vec<String>) -> Vec<String> {
        let known = std::mem::replace(&mut self.repaired, repaired.len());
        repaired.into_iter().skip(known).collect()
    }

    /// Returns messages about failovers of the last day that lost commits and were not reported
    /// yet.
    fn failovers(
        &mut self,
        report: &ClusterReport,
        details: &Details,
        events: &Events,
    ) -> Vec<String> {
        let mut news = Vec::new();
        for loss in &details.failover_losses {
            let is_recent = report.as_of.micros_since(loss.found) < FAILOVER_NEWS_MICROS;
            if loss.commits == 0 || !self.failovers.insert((loss.branch, loss.successor)) {
                continue;
            }
            let message = loss.to_string();
            let told = |event: &Event| event.kind == FAILOVER && event.message == message;
            if is_recent && !events.after(0).iter().any(told) {
                news.push(message);
            }
        }
        news
    }

    /// Returns the alerts that begin and the alerts that end.
    fn update(&mut self, report: &ClusterReport) -> (Vec<Alert>, Vec<Alert>) {
        let conditions = alerts::firing(report);
        self.holds
            .retain(|name, _| conditions.iter().any(|(holds, _)| holds == name));
        let mut firing = Vec::new();
        for (name, summary) in conditions {
            let Some(rule) = alerts::rule(name) else {
                continue;
            };
            // An alert that already fires, perhaps since an earlier run, keeps its start time.
            let known = self.firing.iter().find(|alert| alert.name == name);
            let known = known.map(|alert| alert.since);
            let since = *self
                .holds
                .entry(name)
                .or_insert(known.unwrap_or(report.as_of));
            let held = report.as_of.micros_since(since);
            if known.is_some() || held >= i64::from(rule.patience_seconds) * 1_000_000 {
                firing.push(Alert {
                    name,
                    severity: rule.severity,
                    summary,
                    runbook: rule.runbook,
                    since,
                });
            }
        }
        for alert in &self.firing {
            let is_over =
                self.holds.contains_key(alert.name) || alerts::is_decided(alert.name, report);
            if !is_over {
                firing.push(alert.clone());
            }
        }
        firing.sort_by_key(|alert| std::cmp::Reverse(alert.severity));
        let missing =
            |alert: &Alert, among: &[Alert]| !among.iter().any(|one| one.name == alert.name);
        let raised = firing
            .iter()
            .filter(|alert| missing(alert, &self.firing))
            .cloned()
            .collect();
        let resolved = self
            .firing
            .iter()
            .filter(|alert| missing(alert, &firing))
            .cloned()
            .collect();
        self.firing = firing;
        (raised, resolved)
    }
}

/// Writes the last times at which everything was held, for the next run.
fn keep_caught_up(cluster: &Watched) {
    let caught_up = cluster.status.were_caught_up();
    let mut book = lock(&cluster.recorded.book);
    let is_due = match book.kept {
        Some((when, kept)) => kept != caught_up && when.elapsed() >= KEEP_INTERVAL,
        None => caught_up != CaughtUp::default(),
    };
    if is_due {
        let directory = cluster.settings.spool.join(cluster.settings.name.as_str());
        if let Err(error) = caught_up::write(&caught_up, &directory) {
            tracing::debug!(%error, "the last times of being caught up are not kept");
        }
        book.kept = Some((Instant::now(), caught_up));
    }
}

/// Returns the seconds until the spool is full, if it grows as it did over `points`.
fn full_in_seconds(counters: &Counters, points: &[Point]) -> Option<f64> {
    let mut known = points
        .iter()
        .filter_map(|point| Some((point.time, f64::from(point.max?))));
    let (from, before) = known.next()?;
    let (to, now) = known.next_back()?;
    // A short time of growth does not predict the next hours.
    if to.saturating_sub(from) < GROWTH_SECONDS / 2 {
        return None;
    }
    #[expect(clippy::cast_precision_loss, reason = "a forecast")]
    let (seconds, limit) = ((to - from) as f64, counters.spool_limit_bytes? as f64);
    let rate = (now - before) / seconds;
    (rate >= 1.0).then(|| (limit - now).max(0.0) / rate)
}

/// Returns the part of `keep_window` that could once be restored and no longer can, in seconds.
/// `None` if that is not known, and without `keep_window`.
fn window_missing_seconds(cluster: &Watched, report: &ClusterReport) -> Option<f64> {
    let policy = cluster.settings.repository.retention.as_ref()?;
    let earliest = report.window.earliest;
    let system = report.source.system_identifier?;
    let archive = format!("{} {system}", report.repository);
    let ever = cluster.recorded.mailbox.earliest(&archive, earliest)?;
    if policy.window.is_zero() || !report.looked {
        return None;
    }
    let window = i64::try_from(policy.window.as_micros()).unwrap_or(i64::MAX);
    // The window must begin at this time, or at the archive's earliest start if that is later.
    let begin = PgTimestamp(report.as_of.0.saturating_sub(window)).max(ever);
    let missing = earliest.unwrap_or(report.as_of).micros_since(begin).max(0);
    #[expect(clippy::cast_precision_loss, reason = "seconds")]
    let seconds = missing as f64 / 1e6;
    Some(seconds)
}

fn float(value: Option<u64>) -> f32 {
    #[expect(clippy::cast_precision_loss, reason = "a point of a picture")]
    let value = value.map_or(f32::NAN, |value| value as f32);
    value
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
