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
    time::Instant,
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

use super::{archive::Archive, failure::Failure, flush::Flusher, seal::Backlog, tail::TailSlot};
use crate::{
    core::{Action, Event, cursor::take_up_at, pace::CATCH_UP_BYTES, positions::Coverage},
    error::{Error, Result},
    spool::{SpoolWriter, TailCut},
};

/// Messages between the connection and this thread. One message is at most 128 KiB (`MAX_SEND_SIZE` in `walsender.c`), so
/// this is 8 MiB: enough to keep the socket draining through one fsync of a fast disk.
pub const RECEIVED_MESSAGES_MAX: usize = 64;
/// How much is taken in one group while the server is not ahead: bounds the latency of a commit under load.
const GROUP_BYTES_MAX: u64 = 2 << 20;
/// How much of the segment before is compared when a stream resumes between two segments: all of it in the usual size, for
/// after `pg_switch_wal` most of it is padding that says nothing.
const OVERLAP_BYTES: usize = 16 << 20;

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
            stage.writer = None;
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
        stage.writer = None;
        stage
    })
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
        let shared = Arc::clone(&archive);
        let stage = Arc::new(Mutex::new(Stage {
            archive,
            backlog,
            tails,
            flusher,
            stop: Arc::clone(&stop),
            writer: None,
            left: Vec::new(),
            server_end: Lsn::ZERO,
            started: Instant::now(),
        }));
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
            .map_err(|error| Error::ThreadStopped {
                name: "spool",
                reason: error.to_string(),
            })?;
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
                stage.writer = None;
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
            stage.writer = None;
            failure.raise(error);
        }
    }
}

#[derive(Debug)]
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
    /// The server's flush LSN.
    server_end: Lsn,
    /// Where the core's clock begins.
    started: Instant,
}

impl Stage {
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
            Command::Data(received) => self.data(&received),
            Command::Tick => self.tick(true),
            Command::Drain { reply } => {
                let outcome = self.flusher.settle().and_then(|()| self.tick(true));
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
        self.flusher.settle()?;
        self.tick(true)?;
        // While nothing of the branch is held the stream may begin elsewhere than last time.
        if let Some(writer) = &self.writer
            && writer.branch() == branch
            && (writer.resume_lsn()..=writer.written()).contains(&start_lsn)
        {
            let mut taken_up = TakenUp {
                resume_lsn: writer.resume_lsn(),
                durable_lsn: writer.written(),
                compare_lsn: writer.compare_lsn(),
            };
            if writer.lacks_overlap() {
                let before = self.end_of_segment_before(branch, taken_up.resume_lsn);
                if let Some(writer) = &mut self.writer {
                    writer.hold_before(&before);
                    taken_up.compare_lsn = writer.compare_lsn();
                }
            }
            return Ok(taken_up);
        }
        self.left.extend(self.writer.take());
        self.tick(true)?;
        self.left.retain(|left| left.branch() != branch);
        let spool = self.archive.branch_spool(branch);
        if let Some(content) = history {
            spool.put_history(&content)?;
        }
        let stored = self.archive.stored(branch)?;
        let held = spool.end_lsn()?;
        let start = take_up_at(held, stored.as_ref().map(Coverage::end), start_lsn);
        let coverage = stored.unwrap_or_else(|| Coverage::up_to(start));
        let size = self.archive.identity().segment_size;
        let open = self.archive.open_segment(&spool, start)?;
        let (tail, tail_end) = if self.archive.is_away() {
            // What the repository has of it was durable here before, and what a torn end lost is streamed again.
            (Vec::new(), self.archive.tail_end(branch, open))
        } else {
            let tail = self.archive.read_tails(branch, open)?;
            let tail_end = open.start_lsn(size).add(tail.len() as u64);
            (tail, tail_end)
        };
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
            self.backlog.push(branch, segment, None, None);
        }
        let durable = writer.written();
        let resume_lsn = writer.resume_lsn();
        if writer.lacks_overlap() {
            writer.hold_before(&self.end_of_segment_before(branch, resume_lsn));
        }
        let compare_lsn = writer.compare_lsn();
        // A segment counts when it has its final name: a start streams again what lies behind the first that has not.
        for segment in completed {
            self.flusher.finish(segment)?;
        }
        self.flusher.settle()?;
        self.archive.status().progress().on(Event::TakenUp {
            branch,
            durable_lsn: durable,
            stored: coverage,
        });
        self.writer = Some(writer);
        self.archive
            .status()
            .note(|facts| facts.branch = Some(branch));
        self.tick(true)?;
        Ok(TakenUp {
            resume_lsn,
            durable_lsn: durable,
            compare_lsn,
        })
    }

    /// The end of what the archive has of a branch before a segment that begins here; nothing where it can not be read.
    fn end_of_segment_before(&self, branch: Branch, start_lsn: Lsn) -> Vec<u8> {
        let size = self.archive.identity().segment_size;
        let Some(before) = size.segment_of(start_lsn).previous() else {
            return Vec::new();
        };
        match self.archive.read_on(branch, before) {
            Ok(Some(bytes)) if bytes.len() == size.len() => {
                bytes[bytes.len().saturating_sub(OVERLAP_BYTES)..].to_vec()
            }
            Ok(_) => Vec::new(),
            Err(error) => {
                tracing::info!(%error, "the segment before can not be read; the stream begins without an overlap to compare");
                Vec::new()
            }
        }
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
        progress.on(Event::StreamBegun { start_lsn });
        Ok(())
    }

    fn data(&mut self, received: &Received) -> Result<()> {
        let Received {
            start_lsn,
            wal_end,
            send_time,
            ref data,
        } = *received;
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
            self.archive.status().progress().on(Event::Completed);
        }
        outcome?;
        writer.note_server(wal_end, send_time);
        self.server_end = wal_end;
        let written = Event::Written {
            streamed_lsn: writer.incoming(),
            written_lsn: writer.written(),
            server_lsn: wal_end,
            bytes: writer.written().bytes_since(before),
        };
        let actions = self.archive.status().progress().on(written);
        self.carry_out(&actions)
    }

    /// The limit is reached: what is here is made durable, said and sent on before it is waited for.
    fn wait_for_room(&mut self) -> Result<()> {
        self.tick(true)?;
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
        let flusher_idle = self.flusher.is_idle();
        let progress = self.archive.status().progress();
        let actions = progress.on(Event::GroupTaken { flusher_idle });
        self.carry_out(&actions)
    }

    /// A moment for a tail; `due` in any case.
    fn tick(&mut self, due: bool) -> Result<()> {
        let now = self.started.elapsed();
        let progress = self.archive.status().progress();
        let actions = progress.on(Event::Tick { now, due });
        self.carry_out(&actions)
    }

    fn carry_out(&mut self, actions: &[Action]) -> Result<()> {
        for action in actions {
            match action {
                Action::Sync => self.sync()?,
                Action::HandOver => self.hand_over()?,
                Action::CutTail => self.cut_tail(),
                // The workers' actions.
                Action::Seal(..) | Action::Remove(..) => {}
            }
        }
        Ok(())
    }

    /// Fsyncs the open segment and says so.
    fn sync(&mut self) -> Result<()> {
        let Some(writer) = &self.writer else {
            return Ok(());
        };
        if let Some(open) = writer.open_segment() {
            let began = Instant::now();
            open.sync()?;
            self.archive.status().flushed(began.elapsed());
            self.archive.status().note(|facts| facts.spool_full = None);
            self.archive.status().progress().on(Event::Synced {
                segment_start: writer.resume_lsn(),
                end_lsn: writer.written(),
            });
        }
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
        Ok(())
    }

    /// Hands a tail to the store, if there is one. Everything written is durable here.
    fn cut_tail(&mut self) {
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
        self.archive.status().progress().on(Event::TailCut {
            branch: tail.branch,
            range: (tail.start_lsn, tail.end_lsn),
            now: self.started.elapsed(),
        });
        self.tails.put(tail);
    }
}

/// A full disk stops the stream, not the archiver: the server keeps the WAL, the keepalives go on, and it continues when
/// there is space.
fn wait_for_space(stop: &AtomicBool, archive: &Archive) -> bool {
    archive.room().wait(stop, archive.status())
}
