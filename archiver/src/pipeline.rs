//! START HERE: receive -> write -> flush -> seal / tail -> acknowledge
//!
//! Moves the WAL of one cluster from PostgreSQL to the repository. The connection's thread
//! ([`receive`]) compares, decodes, writes and fsyncs the WAL (`stage`). During a catch-up it hands
//! the messages to the spool thread ([`write`](mod@write)) instead. With local acknowledgement,
//! durable WAL is acknowledged at once. Worker threads seal complete segments ([`seal`]), and the
//! open segment is uploaded as tails ([`tail`]).
//!
//! A full channel blocks the stage before it. A slow store therefore leads to more files in the
//! spool, and a slow disk to back pressure on the connection, but neither to more memory. No stage
//! delays the status updates to the server.
//! Invariant: stages process WAL in LSN order without gaps. Only [`crate::core`] decides what may
//! be reported: the stages report events to it and perform the actions that it returns.

pub mod archive;
mod command;
mod failover;
pub mod failure;
pub mod flush;
pub mod follow;
mod fork;
pub mod gap;
mod histories;
mod holes;
mod losses;
pub(crate) mod presence;
mod reads;
pub mod receive;
pub mod room;
pub mod seal;
pub(crate) mod server_shutdown;
mod stage;
mod superseded;
pub mod tail;
pub mod voice;
pub mod write;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::{sync::mpsc::Sender, task, time::MissedTickBehavior};
use wal_format::{Branch, Lsn, TimelineHistory, TimelineId};

use self::{
    archive::Archive, command::Command, failure::Failure, receive::StreamEnd, seal::Backlog,
    tail::TailSlot, write::SpoolThread,
};
use crate::{
    blocking::blocking,
    core::{event::Event, pace::PaceSettings, start::Held},
    error::{Error, Result},
};

/// The time for which a stop waits for the repository. Beyond it the WAL stays in the spool, which
/// says so.
const DRAIN_MAX: Duration = Duration::from_secs(60);
/// The time for which a stop waits for readers of the catalog.
const RELEASE_MAX: Duration = Duration::from_secs(5);
/// The interval at which a drain checks its progress.
const DRAIN_POLL: Duration = Duration::from_millis(20);

/// The running stages of one cluster. Connections come and go.
#[derive(Debug)]
pub struct Pipeline {
    archive: Arc<Archive>,
    backlog: Arc<Backlog>,
    tails: Arc<TailSlot>,
    failure: Arc<Failure>,
    spool: SpoolThread,
    /// The LSN at which a stream may resume without an overlap, because the server has removed the
    /// WAL before it. 0 if there is none.
    forgone: AtomicU64,
    threads: Vec<JoinHandle<()>>,
    /// The periodic tasks: ticks and checks. They end with the pipeline.
    timers: Vec<task::JoinHandle<()>>,
}

impl Pipeline {
    /// Starts the stages. WAL that a previous run left in the spool is processed first. The tasks
    /// that `watch` starts end with the stages.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Repository`]; [`intake::Error::Divergence`] if the spool's WAL
    /// differs from the archived WAL.
    pub async fn start(
        archive: Arc<Archive>,
        watch: impl FnOnce(&Arc<Archive>) -> Vec<task::JoinHandle<()>>,
    ) -> Result<Self> {
        let settings = archive.settings();
        if !archive.is_away() {
            archive.progress().on(Event::RepositoryRead);
        }
        archive.progress().on(Event::Started(PaceSettings {
            tail_interval: settings.remote_flush_interval,
            tail_bytes: settings.remote_flush_bytes,
        }));
        let backlog = Arc::new(Backlog::new(Arc::clone(archive.progress())));
        let tails = Arc::new(TailSlot::default());
        let failure = Arc::new(Failure::default());
        let mut threads = Vec::new();
        let started = seal::start(&archive, &backlog, &failure, &mut threads)
            .and_then(|()| tail::start(&archive, &tails, &failure))
            .and_then(|tail| {
                threads.push(tail);
                SpoolThread::start(
                    Arc::clone(&archive),
                    Arc::clone(&backlog),
                    Arc::clone(&tails),
                    Arc::clone(&failure),
                )
            });
        let spool = match started {
            Ok(spool) => spool,
            Err(error) => {
                // The started threads hold the catalog open. They must end before the next attempt
                // opens it.
                backlog.stop();
                tails.stop();
                join(threads)?;
                return Err(error);
            }
        };
        let interval = archive.settings().remote_flush_interval;
        let mut timers = watch(&archive);
        timers.push(tokio::spawn(tick(spool.commands(), interval)));
        let pipeline = Self {
            archive,
            backlog,
            tails,
            failure,
            spool,
            forgone: AtomicU64::new(0),
            threads,
            timers,
        };
        match pipeline.take_up_spooled().await {
            Ok(()) => Ok(pipeline),
            Err(error) => {
                let error = pipeline.first_cause(error);
                // Its threads hold the catalog open.
                pipeline.stop().await?;
                Err(error)
            }
        }
    }

    /// Takes up every branch that a previous run left in the spool.
    async fn take_up_spooled(&self) -> Result<()> {
        let archive = Arc::clone(&self.archive);
        for branch in blocking(move || archive.spooled_branches()).await? {
            if let Some(end) = branch.end_lsn()? {
                self.spool.take_up(branch.branch(), None, end).await?;
            }
        }
        Ok(())
    }

    /// The state that the stages share.
    #[must_use]
    pub fn archive(&self) -> &Arc<Archive> {
        &self.archive
    }

    /// The handle of the spool thread.
    #[must_use]
    pub fn spool(&self) -> &SpoolThread {
        &self.spool
    }

    /// The LSN at which the next stream may resume without an overlap.
    fn forgone_overlap(&self) -> Option<Lsn> {
        let lsn = Lsn(self.forgone.load(Ordering::Relaxed));
        (lsn > Lsn::ZERO).then_some(lsn)
    }

    /// Lets the next stream begin at `resume_lsn`: the server has removed the WAL before it that
    /// was to be compared.
    fn forgo_overlap(&self, resume_lsn: Lsn) -> StreamEnd {
        tracing::info!(%resume_lsn, "the server has removed the WAL before; the stream begins without an overlap to compare");
        self.forgone.store(resume_lsn.0, Ordering::Relaxed);
        StreamEnd::NoOverlap
    }

    /// The errors that the stages' threads raise.
    #[must_use]
    pub fn failure(&self) -> &Arc<Failure> {
        &self.failure
    }

    /// Begins a stream of the branch that was taken up.
    ///
    /// # Errors
    /// [`Error::StreamOutOfOrder`].
    pub async fn begin(&self, start_lsn: Lsn) -> Result<()> {
        self.spool
            .ask(|reply| Command::Begin { start_lsn, reply })
            .await?
    }

    /// Returns the end of each branch in the archive, from the repository and the spool together.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Repository`].
    pub async fn held(&self) -> Result<Vec<Held>> {
        let archive = Arc::clone(&self.archive);
        blocking(move || archive.held()).await
    }

    /// Returns the archived history file of a timeline if it agrees with the history file of a
    /// descendant.
    ///
    /// # Errors
    /// [`Error::Repository`].
    pub async fn known_history(
        &self,
        timeline: TimelineId,
        descendant: &Bytes,
    ) -> Result<Option<(Branch, Bytes)>> {
        let archive = Arc::clone(&self.archive);
        let descendant = String::from_utf8_lossy(descendant).into_owned();
        blocking(move || {
            Ok(archive
                .catalog()
                .branches()?
                .into_iter()
                .find(|(branch, history, content)| {
                    let agrees = |history: &TimelineHistory| {
                        !history.ancestors.is_empty()
                            && descendant.starts_with(&*String::from_utf8_lossy(content))
                    };
                    branch.timeline == timeline && history.as_ref().is_some_and(agrees)
                })
                .map(|(branch, _, content)| (branch, content)))
        })
        .await
    }

    /// Waits until the repository holds everything that is in the spool.
    ///
    /// # Errors
    /// [`Error::NotDrained`] after one minute; the error that a thread raised.
    pub async fn drain(&self) -> Result<()> {
        self.spool.give_up_waiting();
        let deadline = Instant::now() + DRAIN_MAX;
        loop {
            self.spool.drain().await?;
            match self.failure.take() {
                // WAL for which there was no space was never acknowledged, so the server retains
                // it.
                None | Some(Error::SpoolFull) => {}
                Some(error) => return Err(error),
            }
            let positions = self.archive.progress().positions();
            let behind = positions.flushed().bytes_since(positions.remote());
            let is_idle = self.backlog.is_empty() && self.tails.is_free(&self.archive);
            if behind == 0 && is_idle {
                return Ok(());
            }
            if is_idle && positions.is_stored_after_a_hole() {
                // The missing WAL is not in the spool either, so waiting does not help.
                tracing::warn!(
                    event = "hole_remains", cluster = %self.archive.settings().name,
                    "everything in the spool is stored; the repository lacks WAL from {} on that the spool does not hold, \
                     see `wal-archiver verify`",
                    positions.remote()
                );
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Error::NotDrained {
                    what: format!(
                        "{} up to {} ({behind} bytes, {} complete segments)",
                        positions.remote(),
                        positions.flushed(),
                        self.backlog.len(),
                    ),
                });
            }
            tokio::time::sleep(DRAIN_POLL).await;
        }
    }

    /// Ends every thread. WAL that is not stored yet stays in the spool.
    ///
    /// # Errors
    /// [`Error::ThreadStopped`] if a thread panicked.
    pub async fn stop(self) -> Result<()> {
        for timer in &self.timers {
            timer.abort();
        }
        let archive = Arc::downgrade(&self.archive);
        // The closure below captures only the other fields. This reference would otherwise live
        // until the end of this function, and the loop below would wait for it.
        drop(self.archive);
        let stopped = blocking(move || {
            self.spool.stop();
            self.backlog.stop();
            self.tails.stop();
            join(self.threads)
        })
        .await;
        // A catalog query in progress ends on its own. The catalog can be opened again only after
        // that.
        let deadline = Instant::now() + RELEASE_MAX;
        while archive.strong_count() > 0 && Instant::now() < deadline {
            tokio::time::sleep(DRAIN_POLL).await;
        }
        stopped
    }

    /// The error that a thread of the stages raised, if `error` only says that a thread has
    /// stopped.
    #[must_use]
    pub fn first_cause(&self, error: Error) -> Error {
        match error {
            Error::ThreadStopped { .. } => self.failure.take().unwrap_or(error),
            error => error,
        }
    }

    /// Returns true if a thread has ended unexpectedly, because it raised an error or panicked.
    #[must_use]
    pub fn has_lost_a_thread(&self) -> bool {
        self.spool.commands().is_closed() || self.threads.iter().any(JoinHandle::is_finished)
    }
}

fn join(threads: Vec<JoinHandle<()>>) -> Result<()> {
    for thread in threads {
        thread.join().map_err(|_| Error::ThreadStopped {
            name: "store",
            reason: "it panicked".to_owned(),
        })?;
    }
    Ok(())
}

/// Sends ticks, so that a tail can be cut when no more WAL arrives. If the queue is full, WAL is
/// arriving, and the tick is not needed.
async fn tick(commands: Sender<Command>, interval: Duration) {
    let mut timer = tokio::time::interval(interval);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        timer.tick().await;
        if commands.is_closed() {
            return;
        }
        drop(commands.try_send(Command::Tick));
    }
}
