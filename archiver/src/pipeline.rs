//! START HERE: receive -> write -> flush -> seal / tail -> acknowledge
//!
//! One cluster's WAL on its way from PostgreSQL into the repository. The connection's task ([`receive`]) hands messages to
//! the spool thread ([`write`](mod@write)), which compares, decodes, writes and fsyncs them (`stage`); what is durable here is acknowledged at
//! once. Complete segments are sealed by worker threads ([`seal`]), the open one follows as tails ([`tail`]).
//! A full channel stops the stage before it, so a slow store ends as files in the spool and a slow disk as back pressure on
//! the connection, never as memory; the status to the server waits for no stage.
//! Invariant: stages see WAL in LSN order without gaps, and [`crate::core`] alone says what is safe:
//! the stages tell it what happened and do what it answers.

pub mod archive;
pub mod failure;
pub mod flush;
mod fork;
pub mod gap;
mod histories;
pub mod line;
pub(crate) mod observe;
pub mod progress;
mod reads;
pub mod receive;
mod restorable;
pub mod room;
pub mod seal;
pub(crate) mod server_shutdown;
pub mod session;
mod stage;
pub mod start;
mod superseded;
pub mod tail;
pub mod voice;
pub(crate) mod window;
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
    archive::Archive,
    failure::Failure,
    receive::StreamEnd,
    seal::Backlog,
    start::Held,
    tail::TailSlot,
    write::{Command, SpoolThread},
};
use crate::{
    core::{Event, pace::PaceSettings},
    error::{Error, Result},
};

/// The time for which a stop waits for the repository. Beyond it the WAL stays in the spool, which
/// says so.
const DRAIN_MAX: Duration = Duration::from_secs(60);
/// The time for which a stop waits for who still reads the catalog.
const RELEASE_MAX: Duration = Duration::from_secs(5);
/// The interval at which a drain looks.
const DRAIN_POLL: Duration = Duration::from_millis(20);

/// The stages of one cluster, running; connections come and go.
#[derive(Debug)]
pub struct Pipeline {
    archive: Arc<Archive>,
    backlog: Arc<Backlog>,
    tails: Arc<TailSlot>,
    failure: Arc<Failure>,
    spool: SpoolThread,
    /// Where a stream resumes without an overlap, because the server has removed it; 0 for nowhere.
    forgone: AtomicU64,
    threads: Vec<JoinHandle<()>>,
    /// Ticks and looks; they end with the pipeline.
    timers: [task::JoinHandle<()>; 3],
}

impl Pipeline {
    /// Starts the stages, and sends everything that a previous run left in the spool on its way to the repository.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Repository`], [`intake::Error::Divergence`] from what the spool holds.
    pub async fn start(archive: Arc<Archive>) -> Result<Self> {
        let settings = archive.settings();
        archive.status().progress().on(Event::Started(PaceSettings {
            tail_interval: settings.remote_flush_interval,
            tail_bytes: settings.remote_flush_bytes,
        }));
        let backlog = Arc::new(Backlog::new(Arc::clone(archive.status())));
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
                // The threads that were started hold the catalog, which the next attempt opens.
                backlog.stop();
                tails.stop();
                join(threads)?;
                return Err(error);
            }
        };
        let interval = archive.settings().remote_flush_interval;
        let timers = [
            tokio::spawn(tick(spool.commands(), interval)),
            tokio::spawn(observe::look(Arc::clone(&archive))),
            tokio::spawn(observe::watch_place(Arc::clone(&archive))),
        ];
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
                // Its threads hold the catalog.
                pipeline.stop().await?;
                Err(error)
            }
        }
    }

    /// Sends everything that a previous run left in the spool on its way.
    async fn take_up_spooled(&self) -> Result<()> {
        let archive = Arc::clone(&self.archive);
        for branch in blocking(move || archive.spooled_branches()).await? {
            if let Some(end) = branch.end_lsn()? {
                self.spool.take_up(branch.branch(), None, end).await?;
            }
        }
        Ok(())
    }

    /// What the stages share.
    #[must_use]
    pub fn archive(&self) -> &Arc<Archive> {
        &self.archive
    }

    /// The spool thread.
    #[must_use]
    pub fn spool(&self) -> &SpoolThread {
        &self.spool
    }

    /// The place at which the next stream may resume without an overlap.
    fn forgone_overlap(&self) -> Option<Lsn> {
        let lsn = Lsn(self.forgone.load(Ordering::Relaxed));
        (lsn > Lsn::ZERO).then_some(lsn)
    }

    /// The server does not have what was to be compared before `resume_lsn`: the next stream begins there.
    fn forgo_overlap(&self, resume_lsn: Lsn) -> StreamEnd {
        tracing::info!(%resume_lsn, "the server has removed the WAL before; the stream begins without an overlap to compare");
        self.forgone.store(resume_lsn.0, Ordering::Relaxed);
        StreamEnd::NoOverlap
    }

    /// What a thread raised.
    #[must_use]
    pub fn failure(&self) -> &Arc<Failure> {
        &self.failure
    }

    /// A stream of the branch that was taken up begins.
    ///
    /// # Errors
    /// [`Error::StreamOutOfOrder`].
    pub async fn begin(&self, start_lsn: Lsn) -> Result<()> {
        self.spool
            .ask(|reply| Command::Begin { start_lsn, reply })
            .await?
    }

    /// What the archive holds, branch by branch: the repository and the spool together.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Repository`].
    pub async fn held(&self) -> Result<Vec<Held>> {
        let archive = Arc::clone(&self.archive);
        blocking(move || archive.held()).await
    }

    /// A history file that we have of a timeline and that agrees with a descendant's.
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
    /// [`Error::NotDrained`] when that takes longer than a minute; what a thread raised.
    pub async fn drain(&self) -> Result<()> {
        self.spool.give_up_waiting();
        let deadline = Instant::now() + DRAIN_MAX;
        loop {
            self.spool.drain().await?;
            match self.failure.take() {
                // What there is no room for was never acknowledged: the server keeps it.
                None | Some(Error::SpoolFull) => {}
                Some(error) => return Err(error),
            }
            let positions = self.archive.status().progress().positions();
            let behind = positions.flushed().bytes_since(positions.remote());
            let is_idle = self.backlog.is_empty() && self.tails.is_free(&self.archive);
            if behind == 0 && is_idle {
                return Ok(());
            }
            if is_idle && positions.is_stored_after_a_hole() {
                // The missing WAL is not in the spool either: no wait brings it.
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

    /// Ends every thread; what they hold stays in the spool.
    ///
    /// # Errors
    /// [`Error::ThreadStopped`] when one panicked.
    pub async fn stop(self) -> Result<()> {
        for timer in &self.timers {
            timer.abort();
        }
        let archive = Arc::downgrade(&self.archive);
        // The closure takes the other fields only; this one would live on until we return, and be waited for.
        drop(self.archive);
        let stopped = blocking(move || {
            self.spool.stop();
            self.backlog.stop();
            self.tails.stop();
            join(self.threads)
        })
        .await;
        // A look at the catalog that was under way ends by itself; only then the catalog can be opened again.
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

    /// Returns whether a thread has ended although nobody asked it to: it raised an error or
    /// panicked.
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

/// Lets a tail be cut although nothing arrives any more. A full queue means that WAL arrives, so no tick is missed then.
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

/// Runs blocking work beside the connection's task.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(Error::ThreadStopped {
            name: "blocking",
            reason: error.to_string(),
        })
    })
}
