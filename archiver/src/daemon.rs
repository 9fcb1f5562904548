//! [`Daemon`]: runs every configured cluster, and handles signals: SIGTERM drains, a second one
//! ends the process at once, SIGHUP reads the configuration again.
//!
//! Invariant: an event of one cluster affects no other. A configuration is applied only if all of
//! it is valid, and a cluster whose settings are unchanged is not interrupted.

pub(crate) mod descriptors;
pub mod push;
pub mod supervisor;
pub mod systemd;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use dashboard::{
    http::{HttpServer, sources::Sources},
    monitor::Monitor,
    notifications::{Links, Notifier},
};
use replication::ConnInfo;
use repository::config::{ClusterSettings, CommonArgs, Settings};
use status::{cluster_status::ClusterStatus, instruments::Instruments, state::State};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    task::JoinSet,
    time::MissedTickBehavior,
};
use wal_format::{ClusterName, OutcomeKind};

use crate::{
    base_backup,
    core::{
        live_cluster::LiveCluster,
        shutdown::{Shutdown, ShutdownRequest},
    },
    daemon::{descriptors::Descriptors, systemd::Notify},
    error::{Error, Result},
    observe::current::CurrentArchive,
    upkeep::outcomes,
};

/// The interval at which systemd's status line is updated, and the longest interval of the
/// watchdog's keep-alive.
const LOOK: Duration = Duration::from_secs(1);
/// The time without a heartbeat after which a cluster's task hangs. A task that waits still sends
/// heartbeats.
const BEAT_MAX: Duration = Duration::from_secs(20);

/// A cluster that runs, or that has ended but is still reported.
#[derive(Debug)]
struct Kept {
    settings: ClusterSettings,
    status: Arc<ClusterStatus>,
    stop: ShutdownRequest,
    running: bool,
    /// The action after it has ended.
    next: Next,
}

#[derive(Debug)]
enum Next {
    Nothing,
    /// Remove it, because it is no longer configured.
    Forget,
    Restart(Box<ClusterSettings>),
}

type Clusters = Arc<Mutex<BTreeMap<ClusterName, Kept>>>;

/// The daemon.
#[derive(Debug)]
pub struct Daemon {
    args: CommonArgs,
    http: SocketAddr,
    clusters: Clusters,
    tasks: JoinSet<(ClusterName, Result<()>)>,
    instruments: Instruments,
    descriptors: Arc<Descriptors>,
    monitor: Arc<Monitor>,
    notify: Notify,
    line: String,
    stopping: bool,
    /// The error of the first cluster that failed, which gives the exit code.
    outcome: Result<()>,
}

/// Runs until every cluster has ended: after a signal, or when none can continue. `args` are
/// resolved again on SIGHUP.
///
/// # Errors
/// The error of the first cluster that failed; [`Error::NotDrained`] after a second signal.
pub async fn run(args: CommonArgs, settings: Settings, http: Option<SocketAddr>) -> Result<()> {
    let watch = |kind| signal(kind).map_err(Error::io("watch", "the signals"));
    let signals = (
        watch(SignalKind::terminate())?,
        watch(SignalKind::interrupt())?,
        watch(SignalKind::hangup())?,
    );
    validate(&settings)?;
    let descriptors = Arc::new(Descriptors::default());
    descriptors.raise_limit(settings.clusters.len());
    let server = HttpServer::bind(http.unwrap_or(settings.http), &settings.http_access).await?;
    let address = server.address();
    tracing::info!(%address, "serving HTTP");
    let links = Links::new(&settings);
    let mut daemon = Daemon {
        args,
        http: settings.http,
        clusters: Clusters::default(),
        tasks: JoinSet::new(),
        instruments: Instruments::default(),
        descriptors,
        monitor: Monitor::new(Notifier::start(settings.notify, links)),
        notify: Notify::from_environment(),
        line: String::new(),
        stopping: false,
        outcome: Ok(()),
    };
    tokio::spawn(Arc::clone(&daemon.monitor).run());
    tokio::spawn(server.serve(Sources::new(
        Arc::clone(&daemon.monitor),
        daemon.instruments.clone(),
        &settings.http_access,
        address,
        Arc::new(|settings| Box::pin(take_backup(settings))),
    )));
    for cluster in settings.clusters {
        daemon.start(cluster);
    }
    daemon.notify.ready();
    daemon.keep(signals).await
}

impl Daemon {
    async fn keep(mut self, signals: (Signal, Signal, Signal)) -> Result<()> {
        let (mut terminate, mut interrupt, mut hangup) = signals;
        let period = self.notify.watchdog().map_or(LOOK, |max| LOOK.min(max / 3));
        let mut look = tokio::time::interval(period);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let name = tokio::select! {
                ended = self.tasks.join_next() => match ended {
                    Some(ended) => {
                        self.ended(ended);
                        continue;
                    }
                    None => return self.outcome,
                },
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
                _ = hangup.recv() => {
                    self.reload();
                    continue;
                }
                _ = look.tick() => {
                    self.tell_systemd();
                    continue;
                }
            };
            if self.stopping {
                tracing::warn!("{name} again: ending at once");
                return self.outcome.and(Err(Error::NotDrained {
                    what: "a second signal ended the draining".to_owned(),
                }));
            }
            tracing::info!("{name}: draining");
            self.stopping = true;
            self.notify.stopping();
            for kept in lock(&self.clusters).values_mut() {
                kept.next = Next::Nothing;
                kept.stop.request();
            }
        }
    }

    fn start(&mut self, settings: ClusterSettings) {
        let name = settings.name.clone();
        tracing::info!(cluster = %name, repository = %settings.repository, spool = %settings.spool.display(), "archiving");
        let live = LiveCluster::new(&settings, self.instruments.clone());
        let status = Arc::clone(&live.status);
        let archive = Arc::<CurrentArchive>::default();
        let queries = Arc::clone(&archive);
        self.monitor
            .watch(settings.clone(), Arc::clone(&status), queries);
        let (stop, mut shutdown) = Shutdown::new();
        let descriptors = Arc::clone(&self.descriptors);
        let kept = Kept {
            settings: settings.clone(),
            status: Arc::clone(&status),
            stop,
            running: true,
            next: Next::Nothing,
        };
        lock(&self.clusters).insert(name.clone(), kept);
        self.tasks.spawn(async move {
            // A separate task, so that a panic ends this cluster only.
            let task = tokio::spawn(Box::pin(async move {
                let Some(_place) = descriptors.admit(&status, &mut shutdown).await else {
                    return Ok(());
                };
                supervisor::run(settings, live, archive, shutdown).await
            }));
            let outcome = task.await.unwrap_or_else(|error| {
                Err(Error::ThreadStopped {
                    name: "cluster",
                    reason: error.to_string(),
                })
            });
            (name, outcome)
        });
    }

    /// Handles the end of a cluster. The other clusters continue.
    fn ended(&mut self, ended: Result<(ClusterName, Result<()>), tokio::task::JoinError>) {
        let Ok((name, outcome)) = ended else { return };
        let mut clusters = lock(&self.clusters);
        let Some(kept) = clusters.get_mut(&name) else {
            return;
        };
        kept.running = false;
        let next = std::mem::replace(&mut kept.next, Next::Nothing);
        // Without the socket, a push sees at once that no daemon listens.
        let _gone = std::fs::remove_file(quick::push::socket_path(&kept.settings));
        if let Err(error) = outcome {
            tracing::error!(cluster = %name, %error, "archiving of a cluster has ended; SIGHUP starts it again");
            let words = error.to_string();
            kept.status.note(|facts| facts.broken = Some(words));
            if self.outcome.is_ok() && matches!(next, Next::Nothing) {
                self.outcome = Err(error);
            }
        }
        match next {
            Next::Nothing => {}
            Next::Forget => {
                tracing::info!(cluster = %name, "no longer archived");
                clusters.remove(&name);
                self.monitor.forget(&name);
            }
            Next::Restart(settings) => {
                drop(clusters);
                self.start(*settings);
            }
        }
    }

    /// Reads the configuration again. An invalid configuration changes nothing.
    fn reload(&mut self) {
        if self.stopping {
            return;
        }
        self.notify.reloading();
        let began = jiff::Timestamp::now();
        let read = Settings::resolve(&self.args)
            .map_err(Error::from)
            .and_then(|settings| validate(&settings).map(|()| settings));
        let results: Vec<(ClusterSettings, Result<String, String>)> = match read {
            Ok(settings) => {
                let changes = self.apply(settings).into_iter();
                let in_words = |change: &str| format!("the configuration was read again: {change}");
                changes
                    .map(|(cluster, change)| (cluster, Ok(in_words(change))))
                    .collect()
            }
            Err(error) => {
                tracing::error!(%error, "SIGHUP: the configuration is not valid; nothing was changed");
                let problem =
                    format!("the configuration is not valid, nothing was changed: {error}");
                let clusters = lock(&self.clusters);
                let clusters = clusters.values().map(|kept| kept.settings.clone());
                clusters
                    .map(|cluster| (cluster, Err(problem.clone())))
                    .collect()
            }
        };
        for (cluster, result) in results {
            tokio::spawn(async move {
                outcomes::record_later(&cluster, OutcomeKind::Reload, began, result).await;
            });
        }
        self.notify.ready();
    }

    /// Returns each cluster with what changed for it.
    fn apply(&mut self, settings: Settings) -> Vec<(ClusterSettings, &'static str)> {
        if settings.http != self.http {
            tracing::warn!(http = %settings.http, "http is changed by a restart only");
        }
        self.descriptors.raise_limit(settings.clusters.len());
        let mut unchanged = 0_usize;
        let mut start = Vec::new();
        let mut changes = Vec::new();
        {
            let mut clusters = lock(&self.clusters);
            let removed =
                |name: &ClusterName| settings.clusters.iter().all(|one| one.name != *name);
            for (_, kept) in clusters.iter_mut().filter(|(name, _)| removed(name)) {
                tracing::info!(cluster = %kept.settings.name, "SIGHUP: removed; draining");
                kept.next = Next::Forget;
                kept.stop.request();
                changes.push((kept.settings.clone(), "the cluster is no longer archived"));
            }
            clusters.retain(|name, kept| {
                let stays = kept.running || !matches!(kept.next, Next::Forget);
                if !stays {
                    self.monitor.forget(name);
                }
                stays
            });
            for wanted in settings.clusters {
                match clusters.get_mut(&wanted.name) {
                    Some(kept)
                        if kept.running
                            && matches!(kept.next, Next::Nothing)
                            && kept.settings == wanted =>
                    {
                        unchanged += 1;
                        changes.push((wanted, "nothing changed for this cluster"));
                    }
                    Some(kept) if kept.running => {
                        tracing::info!(cluster = %wanted.name, "SIGHUP: changed; draining, then starting again");
                        changes.push((
                            wanted.clone(),
                            "its settings changed, archiving starts again",
                        ));
                        kept.next = Next::Restart(Box::new(wanted));
                        kept.stop.request();
                    }
                    _ => {
                        changes.push((wanted.clone(), "its archiving starts"));
                        start.push(wanted);
                    }
                }
            }
        }
        for wanted in start {
            tracing::info!(cluster = %wanted.name, "SIGHUP: starting");
            self.start(wanted);
        }
        // A cluster that had failed was started again, so its failure no longer counts.
        self.outcome = Ok(());
        tracing::info!(unchanged, "SIGHUP: the configuration is applied");
        changes
    }

    /// Updates the line for `systemctl status`, and sends the watchdog's keep-alive while every
    /// cluster's task works.
    fn tell_systemd(&mut self) {
        // The same states as on the page: with what the alerts make of them. Nothing is known
        // before the first check.
        let states = self.monitor.states();
        let line = describe(&states);
        if !states.is_empty() && line != self.line {
            self.notify.status(&line);
            self.line = line;
        }
        if self.notify.watchdog().is_none() {
            return;
        }
        let hangs = lock(&self.clusters)
            .values()
            .find(|kept| {
                // Draining has its own time limit.
                let works = kept.running && !kept.stop.is_requested();
                works && kept.status.last_beat() > BEAT_MAX
            })
            .map(|kept| kept.settings.name.clone());
        match hangs {
            None => self.notify.alive(),
            Some(name) => {
                tracing::error!(cluster = %name, "its task hangs; systemd's watchdog is left to end this process");
            }
        }
    }
}

/// Takes a base backup that was requested over HTTP.
async fn take_backup(settings: ClusterSettings) {
    match base_backup::take(&settings, "asked for over HTTP", &|_| {}, Shutdown::never()).await {
        Ok(backup) => {
            tracing::info!(cluster = %settings.name, backup = %backup.id, "base backup complete");
        }
        Err(error) => {
            tracing::error!(cluster = %settings.name, %error, "the base backup failed");
        }
    }
}

/// Checks the values that are not checked when the settings are resolved.
fn validate(settings: &Settings) -> Result<()> {
    for cluster in &settings.clusters {
        ConnInfo::parse(&cluster.conninfo)?;
        for other in cluster.heal_from.iter().chain(&cluster.standbys) {
            ConnInfo::parse(other)?;
        }
    }
    Ok(())
}

/// Returns `2 clusters: ok; b is at_risk: …`. Clusters that are not ok are named, the others are
/// only counted.
fn describe(states: &[(ClusterName, State)]) -> String {
    let mut line = match states.len() {
        1 => "1 cluster".to_owned(),
        count => format!("{count} clusters"),
    };
    let mut separator = ": ";
    for (cluster, state) in states.iter().filter(|(_, state)| *state != State::Ok) {
        line += &format!("{separator}{cluster} is {}", state.name());
        separator = ", ";
    }
    if separator == ": " {
        line += ": ok";
    }
    line
}

fn lock(clusters: &Clusters) -> MutexGuard<'_, BTreeMap<ClusterName, Kept>> {
    clusters.lock().unwrap_or_else(PoisonError::into_inner)
}
