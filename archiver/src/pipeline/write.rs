//! Stage 2: compares, decodes, writes and fsyncs received WAL.
//!
//! Natural group commit: everything that has arrived is written, then fsynced once, then reported.
//! Unless the server is far ahead, the stream's own thread does so ([`Intake::take`]). During a
//! catch-up the spool thread does, and the flusher's fsyncs run concurrently.
//! Invariant: only one of the two threads works at a time, in the order of arrival. Nothing is
//! reported before its fsync has returned. After any error no further WAL of that stream is
//! accepted.

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
use wal_format::{Branch, Lsn};

use super::{
    archive::Archive,
    command::{Command, Received, TakenUp},
    failure::Failure,
    flush::Flusher,
    seal::Backlog,
    stage::Stage,
    tail::TailSlot,
};
use crate::{
    core::pace::CATCH_UP_BYTES,
    error::{Error, Result},
};

/// The number of messages between the connection and the spool thread. One message is at most 128
/// KiB (`MAX_SEND_SIZE` in `walsender.c`), so this is 8 MiB: enough to keep the socket draining
/// during one fsync of a fast disk.
pub const RECEIVED_MESSAGES_MAX: usize = 64;
/// The maximum size of one group while the server is not ahead. It bounds the latency of a commit
/// under load.
const GROUP_BYTES_MAX: u64 = 2 << 20;
/// The handle of the spool thread.
#[derive(Debug)]
pub struct SpoolThread {
    intake: Intake,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// The entry point for a stream's WAL.
#[derive(Clone, Debug)]
pub struct Intake {
    commands: mpsc::Sender<Command>,
    /// The number of messages that the spool thread has not processed yet.
    queued: Arc<AtomicUsize>,
    archive: Arc<Archive>,
    stage: Arc<Mutex<Stage>>,
}

impl Intake {
    /// Processes WAL on the calling thread. Returns the WAL if the spool thread has to process it,
    /// because the server is far ahead, earlier messages are still queued, or the spool is at its
    /// limit.
    ///
    /// # Errors
    /// The error of the failed operation. No further WAL of this stream is accepted.
    pub fn take(&self, received: Received) -> Result<Option<Received>> {
        let end = received.start_lsn.add(received.data.len() as u64);
        let is_far = received.wal_end.bytes_since(end) > CATCH_UP_BYTES;
        // Only the spool thread waits for space. This thread has to send status updates meanwhile.
        let is_full = || self.archive.room().is_at_limit(self.archive.progress());
        if is_far || self.queued.load(Ordering::Acquire) > 0 || is_full() {
            return Ok(Some(received));
        }
        self.work(|stage| stage.data(&received))?;
        Ok(None)
    }

    /// Makes all WAL that was taken durable and reports it to the core.
    ///
    /// # Errors
    /// As [`Intake::take`].
    pub fn settle(&self) -> Result<()> {
        self.work(Stage::settle_group)
    }

    /// Cuts a tail if one is due. Call it after the acknowledgement, so that no commit waits for
    /// it.
    ///
    /// # Errors
    /// As [`Intake::take`].
    pub fn cut_tail_if_due(&self) -> Result<()> {
        self.work(|stage| stage.tick(false))
    }

    /// Hands WAL to the spool thread.
    ///
    /// # Errors
    /// `Full` with the command, which has to wait for [`Intake::room`]; `Closed` if the thread has
    /// ended.
    pub fn hand_over(&self, received: Received) -> Result<(), TrySendError<Command>> {
        self.queued.fetch_add(1, Ordering::AcqRel);
        let sent = self.commands.try_send(Command::Data(received));
        if sent.is_err() {
            self.queued.fetch_sub(1, Ordering::AcqRel);
        }
        sent
    }

    /// Hands over a command that had to wait, using the permit from [`Intake::room`].
    pub fn hand_over_late(&self, room: mpsc::Permit<'_, Command>, command: Command) {
        self.queued.fetch_add(1, Ordering::AcqRel);
        room.send(command);
    }

    /// Waits until the spool thread's queue has room for a command.
    ///
    /// # Errors
    /// Fails if the thread has ended.
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
        // A panic may have left the state half changed, so it is not used: the next stream opens
        // the spool again.
        let mut stage = PoisonError::into_inner(poisoned);
        stage.leave();
        stage
    })
}

impl SpoolThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// [`Error::Io`] if the system has no more threads.
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

    /// The sending side of the thread's queue.
    #[must_use]
    pub fn commands(&self) -> mpsc::Sender<Command> {
        self.intake.commands.clone()
    }

    /// The entry point for a stream's WAL.
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

    /// Takes up a branch: see `Command::TakeUp`.
    ///
    /// # Errors
    /// [`Error::ThreadStopped`]; the error of the failed operation.
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

    /// Makes all received WAL durable here and cuts a tail.
    ///
    /// # Errors
    /// [`Error::ThreadStopped`].
    pub async fn drain(&self) -> Result<()> {
        self.ask(|reply| Command::Drain { reply }).await
    }

    /// Makes all waits for disk space fail from now on.
    pub fn give_up_waiting(&self) {
        self.stop.store(true, Ordering::Release);
    }

    /// Ends the thread after it has processed its queue.
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
/// Processes the queue until it is closed.
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
