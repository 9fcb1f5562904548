//! Stage 2: one thread that compares, decodes, writes and fsyncs what arrives.
//!
//! Natural group commit: it takes all that has arrived, then fsyncs once, then says so. During a catch-up the fsyncs run
//! beside it in the flusher. Invariant: nothing is reported before its fsync returned, and after any error nothing more of
//! that stream is taken.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Instant,
};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use wal_format::{Branch, Lsn, PgTimestamp};

use super::{
    archive::Archive, failure::Failure, flush::Flusher, positions::Coverage, seal::Backlog,
    tail::TailSlot,
};
use crate::{
    error::{Error, Result},
    spool::{SpoolWriter, TailCut},
};

/// Messages between the connection and this thread. One message is at most 128 KiB (`MAX_SEND_SIZE` in `walsender.c`), so
/// this is 8 MiB: enough to keep the socket draining through one fsync of a fast disk.
pub const RECEIVED_MESSAGES_MAX: usize = 64;
/// How far the server has to be ahead before fsyncs are handed to the flusher instead of waited for.
const CATCH_UP_BYTES: u64 = 4 << 20;
/// How much may be written before an fsync is asked for even though more is at hand.
const UNSYNCED_BYTES_MAX: u64 = 16 << 20;
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
    Data {
        /// Its first byte.
        start_lsn: Lsn,
        /// The server's flush LSN.
        wal_end: Lsn,
        /// The server's clock.
        send_time: PgTimestamp,
        /// The bytes.
        data: Bytes,
    },
    /// The remote flush interval has passed.
    Tick,
    /// Make everything durable here, hand the tail on, and answer.
    Drain {
        /// Done.
        reply: oneshot::Sender<()>,
    },
}

/// A branch that was taken up.
#[derive(Clone, Copy, Debug)]
pub struct TakenUp {
    /// The start of the open segment: where the stream resumes.
    pub resume_lsn: Lsn,
    /// The end of what we hold.
    pub durable_lsn: Lsn,
}

/// The thread, as its users see it.
#[derive(Debug)]
pub struct SpoolThread {
    commands: mpsc::Sender<Command>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl SpoolThread {
    /// Starts it.
    ///
    /// # Errors
    /// [`Error::ThreadStopped`] when the system has no more threads.
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
        let stage = Stage {
            archive,
            backlog,
            tails,
            flusher,
            stop: Arc::clone(&stop),
            writer: None,
            left: Vec::new(),
            unsynced: 0,
            server_end: Lsn::ZERO,
            uncut: 0,
            last_cut: Instant::now(),
        };
        let thread = std::thread::Builder::new()
            .name("spool".to_owned())
            .spawn(move || stage.run(queue, &failure))
            .map_err(|error| Error::ThreadStopped {
                name: "spool",
                reason: error.to_string(),
            })?;
        Ok(Self {
            commands,
            stop,
            thread: Some(thread),
        })
    }

    /// Where commands go.
    #[must_use]
    pub fn commands(&self) -> mpsc::Sender<Command> {
        self.commands.clone()
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
        self.commands
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
        drop(self.commands);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the spool thread panicked");
        }
    }
}

struct Stage {
    archive: Arc<Archive>,
    backlog: Arc<Backlog>,
    tails: Arc<TailSlot>,
    flusher: Flusher,
    stop: Arc<AtomicBool>,
    /// `None` before a branch is taken up, and after an error.
    writer: Option<SpoolWriter>,
    /// Branches that were left with a tail not cut yet, because the store was busy.
    left: Vec<SpoolWriter>,
    /// Bytes in the open segment's file since its last fsync was asked for.
    unsynced: u64,
    server_end: Lsn,
    /// Bytes that came since the last tail was handed over.
    uncut: u64,
    last_cut: Instant,
}

impl Stage {
    fn run(mut self, mut queue: mpsc::Receiver<Command>, failure: &Failure) {
        while let Some(command) = queue.blocking_recv() {
            let mut next = Some(command);
            let mut group = 0;
            while let Some(command) = next {
                if let Command::Data { data, .. } = &command {
                    group += data.len() as u64;
                }
                if let Err(error) = self.handle(command) {
                    self.writer = None;
                    failure.raise(error);
                }
                next = if group < GROUP_BYTES_MAX || self.is_catching_up() {
                    queue.try_recv().ok()
                } else {
                    None
                };
            }
            if let Err(error) = self.settle_group() {
                self.writer = None;
                failure.raise(error);
            }
        }
    }

    fn handle(&mut self, command: Command) -> Result<()> {
        match command {
            Command::TakeUp {
                branch,
                history,
                start_lsn,
                reply,
            } => {
                let outcome = self.take_up(branch, history, start_lsn);
                if outcome.is_err() {
                    self.writer = None;
                }
                drop(reply.send(outcome));
                Ok(())
            }
            Command::Begin { start_lsn, reply } => {
                drop(reply.send(self.begin(start_lsn)));
                Ok(())
            }
            Command::Data {
                start_lsn,
                wal_end,
                send_time,
                data,
            } => self.data(start_lsn, wal_end, send_time, &data),
            Command::Tick => {
                self.flush()?;
                self.cut_tail();
                Ok(())
            }
            Command::Drain { reply } => {
                let outcome = self.flush().and_then(|()| self.flusher.settle());
                if outcome.is_ok() {
                    self.cut_tail();
                }
                // Answered after a failure too: the failure itself is raised.
                let _gone = reply.send(());
                outcome
            }
        }
    }

    fn take_up(
        &mut self,
        branch: Branch,
        history: Option<Bytes>,
        start_lsn: Lsn,
    ) -> Result<TakenUp> {
        self.flush()?;
        self.flusher.settle()?;
        if let Some(writer) = &self.writer
            && writer.branch() == branch
        {
            return Ok(TakenUp {
                resume_lsn: writer.resume_lsn(),
                durable_lsn: writer.written(),
            });
        }
        self.left.extend(self.writer.take());
        self.cut_tail();
        self.left.retain(|left| left.branch() != branch);
        let spool = self.archive.branch_spool(branch);
        if let Some(content) = history {
            spool.put_history(&content)?;
        }
        let stored = self.archive.stored(branch)?;
        let held = spool.end_lsn()?;
        // The repository may be ahead of a spool that was lost or put back from an older copy.
        let start = match (held, &stored) {
            (None, None) => start_lsn,
            (held, stored) => held
                .max(stored.as_ref().map(Coverage::end))
                .unwrap_or(start_lsn),
        };
        let coverage = stored.unwrap_or_else(|| Coverage::up_to(start));
        let size = self.archive.identity().segment_size;
        let open = self.archive.open_segment(&spool, start)?;
        let tail = self.archive.read_tails(branch, open)?;
        let tail_end = open.start_lsn(size).add(tail.len() as u64);
        let archive = Arc::clone(&self.archive);
        let (mut writer, mut completed) = SpoolWriter::open(
            &spool,
            self.archive.identity(),
            start,
            tail_end,
            |segment| archive.read_segment(branch, segment),
        )?;
        if !tail.is_empty() && writer.resume_lsn() == open.start_lsn(size) {
            // The repository may hold more of the open segment than a lost or torn spool: it is put back.
            let open_start = writer.resume_lsn();
            writer.begin(open_start)?;
            let stop = Arc::clone(&self.stop);
            writer.push(
                open_start,
                &tail,
                "the repository",
                &mut completed,
                &mut || wait_for_space(&stop, &archive),
            )?;
            if let Some(open) = writer.open_segment() {
                open.sync()?;
            }
        }
        for segment in spool.segments()?.complete {
            self.backlog.push(branch, segment, None);
        }
        let durable = writer.written();
        let resume_lsn = writer.resume_lsn();
        self.archive
            .status()
            .progress()
            .update(|positions| positions.take_up(branch, durable, coverage));
        for segment in completed {
            self.flusher.finish(segment)?;
        }
        self.unsynced = 0;
        self.writer = Some(writer);
        self.archive
            .status()
            .note(|facts| facts.branch = Some(branch));
        self.cut_tail();
        Ok(TakenUp {
            resume_lsn,
            durable_lsn: durable,
        })
    }

    fn begin(&mut self, start_lsn: Lsn) -> Result<()> {
        let Some(writer) = &mut self.writer else {
            return Err(Error::ThreadStopped {
                name: "spool",
                reason: "no branch is taken up".to_owned(),
            });
        };
        writer.begin(start_lsn)?;
        let progress = self.archive.status().progress();
        progress.update(|positions| positions.begin_stream(start_lsn));
        Ok(())
    }

    fn data(
        &mut self,
        start_lsn: Lsn,
        wal_end: Lsn,
        send_time: PgTimestamp,
        data: &Bytes,
    ) -> Result<()> {
        if self.writer.is_some() && self.archive.room().is_at_limit(self.archive.status()) {
            self.wait_for_room()?;
        }
        // After an error the rest of that stream is on its way still: it is dropped until the next one begins.
        let Some(writer) = &mut self.writer else {
            return Ok(());
        };
        let before = writer.written();
        let mut completed = Vec::new();
        let (stop, archive) = (&self.stop, &self.archive);
        let outcome = writer.push(start_lsn, data, "the server", &mut completed, &mut || {
            wait_for_space(stop, archive)
        });
        // Segments completed before an error are whole: they are kept.
        for segment in completed {
            self.flusher.finish(segment)?;
            self.unsynced = 0;
        }
        outcome?;
        writer.note_server(wal_end, send_time);
        self.server_end = wal_end;
        let fresh = writer.written().bytes_since(before);
        self.unsynced += fresh;
        self.uncut += fresh;
        let (incoming, written) = (writer.incoming(), writer.written());
        self.archive
            .status()
            .progress()
            .update(|positions| positions.on_written(incoming, written));
        if self.unsynced >= UNSYNCED_BYTES_MAX {
            self.hand_over()?;
        }
        Ok(())
    }

    /// The limit is reached: what is here is made durable, said and sent on before it is waited for.
    fn wait_for_room(&mut self) -> Result<()> {
        self.flush()?;
        self.cut_tail();
        while self.archive.room().is_at_limit(self.archive.status()) {
            if !wait_for_space(&self.stop, &self.archive) {
                return Err(Error::SpoolFull);
            }
        }
        self.archive.status().note(|facts| facts.spool_full = None);
        Ok(())
    }

    fn is_catching_up(&self) -> bool {
        self.writer
            .as_ref()
            .is_some_and(|writer| self.server_end.bytes_since(writer.written()) > CATCH_UP_BYTES)
    }

    /// All that has arrived is written.
    fn settle_group(&mut self) -> Result<()> {
        if self.is_catching_up() {
            if self.unsynced > 0 && self.flusher.is_idle() {
                self.hand_over()?;
            }
            return Ok(());
        }
        self.flush()?;
        let settings = self.archive.settings();
        if self.uncut >= settings.remote_flush_bytes
            || self.last_cut.elapsed() >= settings.remote_flush_interval
        {
            self.cut_tail();
        }
        Ok(())
    }

    /// Fsyncs the open segment and says so.
    fn flush(&mut self) -> Result<()> {
        let Some(writer) = &self.writer else {
            return Ok(());
        };
        if self.unsynced == 0 {
            return Ok(());
        }
        if let Some(open) = writer.open_segment() {
            let began = Instant::now();
            open.sync()?;
            self.archive.status().flushed(began.elapsed());
            self.archive.status().note(|facts| facts.spool_full = None);
            let (start, end) = (writer.resume_lsn(), writer.written());
            self.archive
                .status()
                .progress()
                .update(|positions| positions.on_synced(start, end));
        }
        self.unsynced = 0;
        Ok(())
    }

    /// Asks the flusher to fsync the open segment.
    fn hand_over(&mut self) -> Result<()> {
        if let Some(writer) = &self.writer
            && let Some(open) = writer.open_segment()
        {
            let (start, end) = (writer.resume_lsn(), writer.written());
            self.flusher.sync(open.clone(), start, end)?;
        }
        self.unsynced = 0;
        Ok(())
    }

    /// Hands a tail to the store, if there is one and the store is free. Everything written is durable here.
    fn cut_tail(&mut self) {
        if !self.tails.is_free() {
            return;
        }
        while let Some(mut left) = self.left.pop() {
            if let Some(tail) = left.cut_tail() {
                self.left.push(left);
                self.put_tail(tail);
                return;
            }
        }
        if let Some(tail) = self.writer.as_mut().and_then(SpoolWriter::cut_tail) {
            self.put_tail(tail);
        }
    }

    fn put_tail(&mut self, tail: TailCut) {
        self.last_cut = Instant::now();
        self.uncut = 0;
        self.tails.put(tail);
    }
}

/// A full disk stops the stream, not the archiver: the server keeps the WAL, the keepalives go on, and it continues when
/// there is space.
fn wait_for_space(stop: &AtomicBool, archive: &Archive) -> bool {
    archive.room().wait(stop, archive.status())
}
