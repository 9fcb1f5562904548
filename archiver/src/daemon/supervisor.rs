//! Keeps one cluster archived: opens the spool and the repository, connects to the server, and
//! retries with back-off and jitter.
//!
//! Invariant: an error that no retry can repair is not retried. A failed fsync, bytes that differ
//! from the archived ones, and another cluster's repository end the program with their exit code. A
//! gap keeps the cluster in the state broken, with its reason, until the gap is closed.

use std::{
    convert::Infallible,
    sync::Arc,
    time::{Duration, Instant},
};

use dashboard::monitor::caught_up;
use replication::ConnInfo;
use repository::{ClusterIdentity, Error as StoreError, Loss, Repository, config::ClusterSettings};
use status::{
    cluster_status::{ClusterStatus, RECONNECT_REASONS},
    loss::describe_loss,
};
use tokio::task::JoinSet;

use crate::{
    blocking::blocking,
    core::{event::Event, live_cluster::LiveCluster, shutdown::Shutdown},
    daemon::push::{self, PushServer},
    error::{Error, Result},
    jitter::jitter,
    observe::{
        current::CurrentArchive,
        server::{Polled, Polling},
    },
    pipeline::{
        Pipeline,
        follow::Purpose,
        gap::{self, Closed},
        receive::StreamEnd,
    },
    primary::{Source, conninfo},
    upkeep::{expire, locks, schedule, standby_slots},
    walsender::{self, Walsender},
};

mod judgement;
mod known;
mod open_spool;
mod protect;
mod repair;
mod retry;
mod stages;
mod state;

use judgement::note_shortage;
use known::Known;
use open_spool::open_spool;
use protect::endangered;
use retry::{BEAT, RETRY_MAX, RETRY_MIN};
pub(crate) use stages::{CatalogPlace, open_archive};
use stages::{catalog_opens, outdated};
use state::Supervisor;

/// The first and the longest pause while archiving is broken. An administrator who replaces the
/// server waits for the retry. An error that nobody repairs is retried twice a minute.
const BROKEN_RETRY_MIN: Duration = Duration::from_secs(1);
const BROKEN_RETRY_MAX: Duration = Duration::from_secs(30);
/// The pause while the archiver searches for missing WAL. A server that has it may come back at any
/// time.
const GAP_RETRY: Duration = Duration::from_secs(2);
/// The interval at which [`settle`] checks the positions.
const SETTLE_POLL: Duration = Duration::from_millis(100);
/// The maximum time for which the WAL before a gap may be uploaded before the gap is handled.
const SETTLE_MAX: Duration = Duration::from_secs(10);
/// The maximum time for which a scheduled backup or drill may end at a stop.
const SCHEDULES_END_MAX: Duration = Duration::from_secs(20);
/// A stream that lasted this long was healthy, so the next failure starts with the shortest pause.
const HEALTHY_AFTER: Duration = Duration::from_secs(10);

/// Archives one cluster until a stop is requested.
///
/// # Errors
/// An error that no retry can repair.
pub async fn run(
    settings: ClusterSettings,
    live: LiveCluster,
    archive: Arc<CurrentArchive>,
    mut shutdown: Shutdown,
) -> Result<()> {
    let status = Arc::clone(&live.status);
    let conninfo = conninfo::of_cluster(&settings)?;
    let Some(spool) = open_spool(&settings, &status, &mut shutdown).await? else {
        return Ok(());
    };
    let spool = Arc::new(spool);
    status.resume(caught_up::read(spool.directory()));
    let listening = loop {
        match listen(&settings, &live, &archive).await {
            Err(error) if error.is_out_of_resources() => {
                note_shortage(&status, &error);
                status.beat();
                if !shutdown.sleep(jitter(RETRY_MAX)).await {
                    return Ok(());
                }
            }
            listening => break listening?,
        }
    };
    let (_pushes, _standbys) = listening;
    let mut supervisor = Supervisor {
        settings,
        status,
        live,
        archive,
        polling: Polling::default(),
        conninfo,
        spool,
        pipeline: None,
        connected_once: false,
        retry: RETRY_MIN,
        broken_retry: BROKEN_RETRY_MIN,
        damaged: 0,
        searched_gap: None,
        reported_gap: None,
        gave_up: false,
        without_catalog: false,
    };
    let backups = tokio::spawn(repair::take_repairing_backups(
        supervisor.settings.clone(),
        Arc::clone(&supervisor.status),
    ));
    let expiry = tokio::spawn(expire::keep(
        supervisor.settings.clone(),
        Arc::clone(&supervisor.status),
    ));
    let locks = tokio::spawn(locks::keep(
        supervisor.settings.clone(),
        Arc::clone(&supervisor.status),
    ));
    let standbys = tokio::spawn(standby_slots::keep(
        supervisor.settings.clone(),
        supervisor.live.clone(),
    ));
    let (stop_schedules, of_schedules) = Shutdown::new();
    let mut schedules = JoinSet::new();
    schedules.spawn(schedule::backup::take(
        supervisor.settings.clone(),
        Arc::clone(&supervisor.status),
        of_schedules.clone(),
    ));
    schedules.spawn(schedule::drill::start(
        supervisor.settings.clone(),
        Arc::clone(&supervisor.status),
        of_schedules,
    ));
    let beating = Arc::clone(&supervisor.status);
    let outcome = tokio::select! {
        outcome = supervisor.supervise(&mut shutdown) => outcome,
        never = beat(&beating) => match never {},
    };
    stop_schedules.request();
    backups.abort();
    expiry.abort();
    locks.abort();
    standbys.abort();
    supervisor.polling.stop();
    supervisor.status.note(|facts| {
        facts.connected = false;
        if let Err(error) = &outcome {
            facts.broken = Some(error.to_string());
        }
    });
    // A backup removes what it has stored, and a drill its copy, while the pipeline drains.
    let ended = tokio::time::timeout(SCHEDULES_END_MAX, async {
        while schedules.join_next().await.is_some() {}
    });
    let (ended, stopped) = tokio::join!(ended, stop_pipeline(supervisor.pipeline.take(), outcome));
    if ended.is_err() {
        tracing::warn!(
            event = "schedules_cut_off", cluster = %supervisor.settings.name,
            "a base backup or a drill did not end in time; what it leaves is removed later"
        );
    }
    stopped
}

/// Ends the pipeline. After an error it is not drained.
async fn stop_pipeline(pipeline: Option<Pipeline>, outcome: Result<()>) -> Result<()> {
    let Some(pipeline) = pipeline else {
        return outcome;
    };
    let drained = if outcome.is_ok() {
        pipeline.drain().await
    } else {
        Ok(())
    };
    let stopped = pipeline.stop().await;
    outcome.and(drained).and(stopped)
}

/// Listens for pushes and for standbys. If the socket for pushes cannot be created, each push works
/// on its own.
async fn listen(
    settings: &ClusterSettings,
    live: &LiveCluster,
    archive: &Arc<CurrentArchive>,
) -> Result<(Option<PushServer>, Option<Walsender>)> {
    let pushes = match push::start(settings, Arc::clone(&live.status)) {
        Err(error) if !error.is_out_of_resources() => {
            tracing::warn!(
                event = "pushes_unserved", cluster = %settings.name, %error,
                "pushes are not served until the next start: each works alone"
            );
            None
        }
        started => Some(started?),
    };
    let standbys = walsender::start(settings, live.clone(), Arc::clone(archive)).await?;
    Ok((pushes, standbys))
}

impl Supervisor {
    async fn supervise(&mut self, shutdown: &mut Shutdown) -> Result<()> {
        loop {
            let began = Instant::now();
            let outcome = match self.start_from_what_is_known().await {
                Ok(()) => self.connect_and_stream(shutdown).await,
                Err(error) => Err(error),
            };
            let outcome = outcome.map_err(|error| match &self.pipeline {
                Some(pipeline) => pipeline.first_cause(error),
                None => error,
            });
            self.status.note(|facts| facts.connected = false);
            self.live.progress.on(Event::StreamEnded);
            let outcome = match outcome {
                Err(gap @ Error::Gap { .. }) => self.close_gap(gap, shutdown).await,
                other => other,
            };
            if shutdown.is_requested() {
                return outcome.map_or_else(|error| self.give_up_or_warn(error), |_| Ok(()));
            }
            if began.elapsed() > HEALTHY_AFTER {
                self.retry = RETRY_MIN;
            }
            let reason = match outcome {
                Ok(StreamEnd::Reached) if self.gave_up => "gave_up",
                Ok(StreamEnd::Reached) if self.is_away() || self.is_outdated() => "repository_back",
                Ok(StreamEnd::Reached) if self.without_catalog => "catalog_back",
                Ok(StreamEnd::Reached) => "gap_closed",
                Ok(StreamEnd::NoOverlap) => "no_overlap",
                Ok(StreamEnd::ServerStops) => "server_stopped",
                Ok(_) => {
                    tracing::info!(cluster = %self.settings.name, "the server ended the stream; reconnecting");
                    self.damaged = 0;
                    "server_closed"
                }
                Err(error) => {
                    let reason = self.judge(error)?;
                    match reason {
                        "catalog" => {
                            self.without_catalog = true;
                            self.start_anew().await?;
                        }
                        // A thread that raised an error has ended.
                        _ if matches!(reason, "disk" | "resources") || self.has_lost_a_thread() => {
                            self.start_anew().await?;
                        }
                        _ => {}
                    }
                    reason
                }
            };
            debug_assert!(
                RECONNECT_REASONS.contains(&reason),
                "{reason} has no series"
            );
            self.status
                .note(|facts| *facts.reconnects.entry(reason).or_default() += 1);
            let gave_up = std::mem::take(&mut self.gave_up);
            // A disk or a store may be repaired at any time, and commits may wait for it.
            let mends_itself = gave_up || matches!(reason, "disk" | "repository" | "catalog");
            let facts = self.status.facts();
            let pause = if facts.gap.is_some() || reason == "gap" {
                GAP_RETRY
            } else if facts.broken.is_some() && !mends_itself {
                let pause = self.broken_retry;
                self.broken_retry = (pause * 2).min(BROKEN_RETRY_MAX);
                pause
            } else {
                self.broken_retry = BROKEN_RETRY_MIN;
                self.retry
            };
            self.retry = (self.retry * 2).min(RETRY_MAX);
            let goes_on = tokio::select! {
                goes_on = shutdown.sleep(jitter(pause)) => goes_on,
                // Without the repository, the error may have been a false one. Retry as soon as the
                // repository answers.
                () = known::answers(&self.settings, self.lacking()), if self.is_away() => true,
            };
            if !goes_on {
                return Ok(());
            }
        }
    }

    /// Handles a gap. If it is healed or declared lost, stops the stages, which then start again
    /// and continue. Otherwise returns the gap as an error.
    async fn close_gap(&mut self, gap: Error, shutdown: &mut Shutdown) -> Result<StreamEnd> {
        let Some(pipeline) = &self.pipeline else {
            return Err(gap);
        };
        if pipeline.archive().is_away() || pipeline.archive().is_unproved() {
            // Only the repository can show whether the WAL is really missing.
            return Err(gap);
        }
        let said = gap.to_string();
        let is_new = self.searched_gap.replace(said.clone()).as_ref() != Some(&said);
        if is_new {
            tracing::error!(cluster = %self.settings.name, error = %gap, "a gap: looking for the missing WAL");
        }
        self.status.note(|facts| facts.broken = Some(said.clone()));
        let connect = Source::connect(&self.conninfo, &self.settings.name);
        let Some(connected) = shutdown.until(connect).await else {
            return Ok(StreamEnd::Shutdown);
        };
        settle(pipeline, shutdown).await;
        let closed = match Box::pin(gap::close(connected?.0, pipeline, &said, shutdown)).await {
            // Only the repository can tell if this is a gap. Keep the state broken and retry until
            // it answers.
            Err(Error::Repository(error)) if error.is_transient() => {
                tracing::warn!(cluster = %self.settings.name, %error, "the gap cannot be closed while the repository does not answer");
                return Err(gap);
            }
            closed => closed?,
        };
        match closed {
            Closed::Healed => {
                let gap = self.status.facts().gap;
                let source = gap.and_then(|gap| gap.source);
                let source = source.as_deref().unwrap_or("the repository");
                tracing::info!(cluster = %self.settings.name, source, "the gap is healed");
            }
            Closed::Lost(gaps) => {
                for gap in &gaps {
                    let words = describe_loss(gap);
                    tracing::error!(cluster = %self.settings.name, "{words}");
                    self.status.note(|facts| facts.lost = Some(words));
                }
            }
            Closed::Waiting(reason) => {
                if is_new {
                    tracing::warn!(cluster = %self.settings.name, reason, "the gap is not closed yet");
                }
                return Err(gap);
            }
            Closed::NeedsOperator(reason) => return Err(gap.with_remedy(reason)),
        }
        // The stages know only the archive's state from before.
        if let Some(pipeline) = self.pipeline.take() {
            pipeline.stop().await?;
        }
        self.retry = RETRY_MIN;
        self.status.note(|facts| {
            facts.broken = None;
            facts.gap = None;
        });
        Ok(StreamEnd::Reached)
    }

    /// Stops the stages. After a failed write or fsync, none of their state is used again: the next
    /// stages read the content of the files, and everything after that is streamed again.
    async fn start_anew(&mut self) -> Result<()> {
        if let Some(pipeline) = self.pipeline.take() {
            pipeline.stop().await?;
        }
        Ok(())
    }

    /// Starts the stages as soon as the repository or the spool shows the identity of the WAL. WAL
    /// in the spool then reaches the repository without a server, and a server's WAL reaches the
    /// spool without the repository.
    async fn start_from_what_is_known(&mut self) -> Result<()> {
        let is_away = self.is_away();
        if let Some(pipeline) = &self.pipeline {
            let lacking = pipeline.archive().lacking();
            if !pipeline.has_lost_a_thread() && known::lacks(&self.settings, lacking).await {
                return Ok(());
            }
            if pipeline.has_lost_a_thread() {
                let error = pipeline.failure().take();
                self.start_anew().await?;
                return Err(error.unwrap_or_else(panicked));
            }
            if !is_away && !self.is_outdated() {
                return Ok(());
            }
        }
        match known::ask(&self.settings, &self.spool).await? {
            Known::Away(..) if is_away => Ok(()),
            Known::Away(identity, away, error) => {
                tracing::warn!(
                    cluster = %self.settings.name,
                    %error,
                    "the repository does not answer; archiving goes on in the spool, from what that holds"
                );
                self.status.repository_failed("start", "", &error);
                self.start(&identity, Some(*away)).await
            }
            Known::Here(identity) => {
                self.start_anew().await?;
                if !self.status.facts().repository_gone {
                    self.status.repository_answered("start", "");
                }
                match self.start(&identity, None).await {
                    Err(Error::Repository(error @ StoreError::OlderState { .. })) => {
                        self.start_without(&identity, error).await
                    }
                    started => started,
                }
            }
            Known::Nothing => self.start_anew().await,
        }
    }

    fn has_lost_a_thread(&self) -> bool {
        let pipeline = self.pipeline.as_ref();
        pipeline.is_some_and(Pipeline::has_lost_a_thread)
    }

    fn lacking(&self) -> Option<&Loss> {
        self.pipeline.as_ref()?.archive().lacking()
    }

    fn is_away(&self) -> bool {
        let pipeline = self.pipeline.as_ref();
        pipeline.is_some_and(|pipeline| pipeline.archive().is_away())
    }

    async fn connect_and_stream(&mut self, shutdown: &mut Shutdown) -> Result<StreamEnd> {
        let connect = Source::connect_to_stream(&self.conninfo, &self.settings.name);
        let Some(connected) = shutdown.until(connect).await else {
            return Ok(StreamEnd::Shutdown);
        };
        let (source, version) = connected?;
        self.check_identity(source.identity().clone()).await?;
        let system = source.identity().system_identifier;
        self.status.note(|facts| {
            facts.system_identifier = Some(system);
            facts.server_version = Some(version);
        });
        if self.pipeline.is_none() {
            self.start(source.identity(), None).await?;
        }
        let pipeline = self
            .pipeline
            .as_ref()
            .expect("BUG: the pipeline was started above");
        self.connected_once = true;
        let mut stop = shutdown.clone();
        let (polling, status) = (&mut self.polling, &self.status);
        let polled = Polled {
            slot: &self.settings.slot,
            system,
            directory: self.spool.directory(),
        };
        let followed = |conninfo: &ConnInfo| polling.start(conninfo, &polled, status);
        let mut stream = Box::pin(source.stream(pipeline, Purpose::Follow, followed, shutdown));
        let endangered = tokio::select! {
            end = &mut stream => return end,
            () = stop.requested() => {
                // A spool without space must not prevent the archiver from ending.
                pipeline.spool().give_up_waiting();
                return stream.await;
            }
            endangered = endangered(&self.settings, &self.status) => endangered,
            () = known::answers(&self.settings, pipeline.archive().lacking()), if pipeline.archive().is_away() => {
                tracing::info!(cluster = %self.settings.name, "the repository answers; the stages start again with what it knows");
                drop(stream);
                pipeline.spool().drain().await?;
                self.retry = RETRY_MIN;
                return Ok(StreamEnd::Reached);
            }
            () = outdated(pipeline) => {
                if pipeline.archive().is_doubted() {
                    tracing::warn!(
                        event = "repository_doubted", cluster = %self.settings.name,
                        "the repository lacks what was archived, or a loss was accepted; the stages start again with what it holds"
                    );
                } else {
                    tracing::info!(
                        event = "repository_returned", cluster = %self.settings.name,
                        "the place holds the repository again; the stages start again with what it knows"
                    );
                }
                drop(stream);
                pipeline.spool().drain().await?;
                self.retry = RETRY_MIN;
                return Ok(StreamEnd::Reached);
            }
            () = catalog_opens(&self.settings, pipeline), if self.without_catalog => {
                tracing::info!(
                    event = "catalog_opens", cluster = %self.settings.name,
                    "the catalog on disk can be opened again; the stages start again with it"
                );
                drop(stream);
                pipeline.spool().drain().await?;
                self.start_anew().await?;
                self.without_catalog = false;
                self.retry = RETRY_MIN;
                return Ok(StreamEnd::Reached);
            }
            () = thread_lost(pipeline) => {
                return Err(pipeline.failure().take().unwrap_or_else(panicked));
            }
        };
        drop(stream);
        self.protect_primary(&endangered, shutdown).await
    }

    /// Refuses the server or the repository of another cluster before any byte is transferred.
    async fn check_identity(&self, identity: ClusterIdentity) -> Result<()> {
        if let Some(pipeline) = &self.pipeline {
            let ours = pipeline.archive().identity();
            // The repository has confirmed this identity before, or it is offline. A connection
            // during an outage does not wait for it.
            if ours.system_identifier == identity.system_identifier
                && ours.version == identity.postgresql_major
                && ours.segment_size == identity.wal_segment_size
            {
                return Ok(());
            }
        }
        let (settings, spool) = (self.settings.clone(), Arc::clone(&self.spool));
        blocking(move || {
            // Check the repository first: its error message explains what to do about a new system
            // identifier.
            Repository::open_known(&settings)?.claim(&identity)?;
            if let Some(spooled) = spool.identity()?
                && spooled.system_identifier != identity.system_identifier
            {
                return Err(Error::SpoolSystemMismatch {
                    path: spool.directory().to_path_buf(),
                    expected: identity.system_identifier,
                    found: spooled.system_identifier.to_string(),
                });
            }
            Ok(())
        })
        .await
    }
}

/// Signals that the supervisor's task is alive. The same task polls this and the work, so work that
/// blocks the task is detected.
async fn beat(status: &ClusterStatus) -> Infallible {
    loop {
        status.beat();
        tokio::time::sleep(BEAT).await;
    }
}

/// Waits until a thread of the stages has ended. The stream would continue, but its WAL would no
/// longer be stored.
async fn thread_lost(pipeline: &Pipeline) {
    while !pipeline.has_lost_a_thread() {
        tokio::time::sleep(BEAT).await;
    }
}

fn panicked() -> Error {
    Error::ThreadStopped {
        name: "store",
        reason: "it panicked".to_owned(),
    }
}

/// Waits for at most [`SETTLE_MAX`] until the repository holds everything in the spool.
async fn settle(pipeline: &Pipeline, shutdown: &mut Shutdown) {
    let deadline = Instant::now() + SETTLE_MAX;
    loop {
        let positions = pipeline.archive().progress().positions();
        if positions.remote() >= positions.flushed()
            || Instant::now() > deadline
            || !shutdown.sleep(SETTLE_POLL).await
        {
            return;
        }
    }
}
