//! Stage 2: compares, decodes, writes and fsyncs what arrives.
//!
//! Natural group commit: all that has arrived is taken, then fsynced once, then reported. While the server is not ahead the
//! stream's own thread does so ([`Intake::take`]); during a catch-up the spool thread does, and the fsyncs run beside it in
//! the flusher. Invariant: one of them at a time, in the order of arrival; nothing is reported before its fsync returned, and after any error nothing more of
//! that stream is taken.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

use bytes::Bytes;
use tokio::sync::{
    mpsc::{
        self,
        error::{SendError, TrySendError},
    },
    oneshot,
};
use wal_format::{Branch, Lsn, PgTimestamp};

use super::{
    archive::Archive, failure::Failure, flush::Flusher, seal::Backlog, stage::Stage, tail::TailSlot,
};
use crate::{
    core::pace::CATCH_UP_BYTES,
    error::{Error, Result},
};

/// Messages between the connection and this thread. One message is at most 128 KiB (`MAX_SEND_SIZE` in `walsender.c`), so
/// this is 8 MiB: enough to keep the socket draining through one fsync of a fast disk.
pub const RECEIVED_MESSAGES_MAX: usize = 64;
/// How much is taken in one group while the server is not ahead: bounds the latency of a commit under load.
const GROUP_BYTES_MAX: u64 = 2 << 20;
/// What the thread is asked to do.
#[derive(Debug)]
pub enum Command {
    /// Take up a branch: open its spool at the end of what we have.
    TakeUp {
        /// The branch.
        branch: Branch,
        /// Its history file.
        history: Option<Bytes>,
        /// Where to begin when the archive has nothing of it.
        start_lsn: Lsn,
        /// Where the stream has to resume, and the end of what we hold.
        reply: oneshot::Sender<Result<TakenUp>>,
    },
    /// A stream of the branch begins.
    Begin {
        /// Its first byte.
        start_lsn: Lsn,
        /// Done.
        reply: oneshot::Sender<Result<()>>,
    },
    /// WAL arrived.
    Data(Received),
    /// The remote flush interval has passed.
    Tick,
    /// Make everything durable here, hand the tail on, and answer.
    Drain {
        /// Done.
        reply: oneshot::Sender<()>,
    },
}

/// WAL that arrived.
#[derive(Debug)]
pub struct Received {
    /// Its first byte.
    pub start_lsn: Lsn,
    /// The server's flush LSN.
    pub wal_end: Lsn,
    /// The server's clock.
    pub send_time: PgTimestamp,
    /// The bytes.
    pub data: Bytes,
}

/// A branch that was taken up.
#[derive(Clone, Copy, Debug)]
pub struct TakenUp {
    /// The start of the open segment: where the stream resumes.
    pub resume_lsn: Lsn,
    /// The end of what we hold.
    pub durable_lsn: Lsn,
    /// Where the stream begins so that something of it can be compared: before `resume_lsn` when the open segment is empty.
    pub compare_lsn: Lsn,
}

/// The thread, as its users see it.
#[derive(Debug)]
pub struct SpoolThread {
    intake: Intake,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Where a stream's WAL goes.
#[derive(Clone, Debug)]
pub struct Intake {
    commands: mpsc::Sender<Command>,
    /// Messages that the spool thread has not taken yet.
    queued: Arc<AtomicUsize>,
    archive: Arc<Archive>,
    stage: Arc<Mutex<Stage>>,
}

impl Intake {
    /// Takes WAL on the calling thread; given back when it belongs to the spool thread, because the server is far ahead or
    /// because what came before is still there.
    ///
    /// # Errors
    /// What stood in the way: nothing more of this stream is taken.
    pub fn take(&self, received: Received) -> Result<Option<Received>> {
        let end = received.start_lsn.add(received.data.len() as u64);
        let is_far = received.wal_end.bytes_since(end) > CATCH_UP_BYTES;
        // Waiting for room is the spool thread's: this one has to say what is safe meanwhile.
        let is_full = || self.archive.room().is_at_limit(self.archive.status());
        if is_far || self.queued.load(Ordering::Acquire) > 0 || is_full() {
            return Ok(Some(received));
        }
        self.work(|stage| stage.data(&received))?;
        Ok(None)
    }

    /// Everything that has arrived was taken: makes it durable and says so.
    ///
    /// # Errors
    /// As [`Intake::take`].
    pub fn settle(&self) -> Result<()> {
        self.work(Stage::settle_group)
    }

    /// Hands a tail on, if it is time for one. What it costs comes after the acknowledgement.
    ///
    /// # Errors
    /// As [`Intake::take`].
    pub fn cut_tail_if_due(&self) -> Result<()> {
        self.work(|stage| stage.tick(false))
    }

    /// Hands WAL to the spool thread.
    ///
    /// # Errors
    /// With the command that has to wait for [`Intake::room`]; when the thread has ended.
    pub fn hand_over(&self, received: Received) -> Result<(), TrySendError<Command>> {
        self.queued.fetch_add(1, Ordering::AcqRel);
        let sent = self.commands.try_send(Command::Data(received));
        if sent.is_err() {
            self.queued.fetch_sub(1, Ordering::AcqRel);
        }
        sent
    }

    /// Hands over what had to wait, into the room that [`Intake::room`] found.
    pub fn hand_over_late(&self, room: mpsc::Permit<'_, Command>, command: Command) {
        self.queued.fetch_add(1, Ordering::AcqRel);
        room.send(command);
    }

    /// Waits for room at the spool thread.
    ///
    /// # Errors
    /// When the thread has ended.
    pub async fn room(&self) -> Result<mpsc::Permit<'_, Command>, SendError<()>> {
        self.commands.reserve().await
    }

    fn work(&self, work: impl FnOnce(&mut Stage) -> Result<()>) -> Result<()> {
        let mut stage = self.lock();
        let outcome = work(&mut stage);
        if outcome.is_err() {
            stage.leave();
        }
        outcome
    }

    fn lock(&self) -> MutexGuard<'_, Stage> {
        lock(&self.stage)
    }
}

fn lock(stage: &Mutex<Stage>) -> MutexGuard<'_, Stage> {
    stage.lock().unwrap_or_else(|poisoned| {
        // What a panic left half done is not gone on with: the next stream opens the spool anew.
        let mut stage = PoisonError::into_inner(poisoned);
        stage.leave();
        stage
    })
}

impl SpoolThread {
    /// Starts it.
    ///
    /// # Errors
    /// [`Error::Io`] when the system has no more threads.
    pub fn start(
        archive: Arc<Archive>,
        backlog: Arc<Backlog>,
        tails: Arc<TailSlot>,
        failure: Arc<Failure>,
    ) -> Result<Self> {
        let (commands, queue) = mpsc::channel(RECEIVED_MESSAGES_MAX);
        let stop = Arc::new(AtomicBool::new(false));
        let flusher = Flusher::start(
            Arc::clone(&archive),
            Arc::clone(&backlog),
            Arc::clone(&failure),
        )?;
        let shared = Arc::clone(&archive);
        let stage = Stage::new(archive, backlog, tails, flusher, Arc::clone(&stop));
        let stage = Arc::new(Mutex::new(stage));
        let intake = Intake {
            commands,
            queued: Arc::default(),
            archive: shared,
            stage: Arc::clone(&stage),
        };
        let queued = Arc::clone(&intake.queued);
        let thread = std::thread::Builder::new()
            .name("spool".to_owned())
            .spawn(move || run(&stage, queue, &queued, &failure))
            .map_err(Error::no_thread("spool"))?;
        Ok(Self {
            intake,
            stop,
            thread: Some(thread),
        })
    }

    /// Where commands go.
    #[must_use]
    pub fn commands(&self) -> mpsc::Sender<Command> {
        self.intake.commands.clone()
    }

    /// Where a stream's WAL goes.
    #[must_use]
    pub fn intake(&self) -> Intake {
        self.intake.clone()
    }

    /// Sends a command and waits for its answer.
    ///
    /// # Errors
    /// [`Error::ThreadStopped`].
    pub async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        let stopped = || Error::ThreadStopped {
            name: "spool",
            reason: "see the error before".to_owned(),
        };
        self.intake
            .commands
            .send(command(reply))
            .await
            .map_err(|_| stopped())?;
        answer.await.map_err(|_| stopped())
    }

    /// Takes up a branch: see [`Command::TakeUp`].
    ///
    /// # Errors
    /// What stood in the way.
    pub async fn take_up(
        &self,
        branch: Branch,
        history: Option<Bytes>,
        start_lsn: Lsn,
    ) -> Result<TakenUp> {
        self.ask(|reply| Command::TakeUp {
            branch,
            history,
            start_lsn,
            reply,
        })
        .await?
    }

    /// Makes everything durable here and hands the tail on.
    ///
    /// # Errors
    /// [`Error::ThreadStopped`].
    pub async fn drain(&self) -> Result<()> {
        self.ask(|reply| Command::Drain { reply }).await
    }

    /// No longer waits for disk space.
    pub fn give_up_waiting(&self) {
        self.stop.store(true, Ordering::Release);
    }

    /// Ends the thread after what it was sent.
    pub fn stop(mut self) {
        self.give_up_waiting();
        drop(self.intake);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the spool thread panicked");
        }
    }
}
/// Works off the queue.
fn run(
    stage: &Mutex<Stage>,
    mut queue: mpsc::Receiver<Command>,
    queued: &AtomicUsize,
    failure: &Failure,
) {
    while let Some(command) = queue.blocking_recv() {
        let mut stage = lock(stage);
        let mut next = Some(command);
        let mut group = 0;
        while let Some(command) = next {
            let length = match &command {
                Command::Data(received) => Some(received.data.len() as u64),
                _ => None,
            };
            if let Err(error) = stage.handle(command) {
                stage.leave();
                failure.raise(error);
            }
            if let Some(length) = length {
                group += length;
                queued.fetch_sub(1, Ordering::AcqRel);
            }
            next = if group < GROUP_BYTES_MAX || stage.is_catching_up() {
                queue.try_recv().ok()
            } else {
                None
            };
        }
        if let Err(error) = stage.settle_group().and_then(|()| stage.tick(false)) {
            stage.leave();
            failure.raise(error);
        }
    }
}
