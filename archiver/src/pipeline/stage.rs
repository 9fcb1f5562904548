//! Writes received WAL to the spool ([`Stage`]), on the stream's own thread or on the spool thread.
//!
//! It reports each event to the core ([`crate::core`]) and performs the returned actions on the
//! files. Invariant: a byte is reported only through the core, after the fsync that the core
//! requested has returned. After an error the branch is abandoned, and the next stream takes it up
//! from the content of the files.

use std::{
    sync::{Arc, atomic::AtomicBool},
    time::Instant,
};

use bytes::Bytes;
use wal_format::{Branch, Lsn};

use super::{
    archive::Archive,
    command::{Command, Received, TakenUp},
    flush::Flusher,
    seal::Backlog,
    tail::TailSlot,
};
use crate::{
    core::{
        action::Action, cursor::take_up_at, event::Event, pace::CATCH_UP_BYTES, positions::Coverage,
    },
    error::{Error, Result},
    spool::{
        before::Before,
        writer::{SpoolWriter, TailCut},
    },
};

/// The writer of the branch that is streamed, and the stages after it.
#[derive(Debug)]
pub(super) struct Stage {
    archive: Arc<Archive>,
    backlog: Arc<Backlog>,
    tails: Arc<TailSlot>,
    flusher: Flusher,
    stop: Arc<AtomicBool>,
    /// `None` before a branch is taken up, and after an error.
    writer: Option<SpoolWriter>,
    /// Abandoned branches whose last tail is not cut yet, because the store was busy.
    left: Vec<SpoolWriter>,
    /// The server's flush LSN.
    server_end: Lsn,
    /// The start of the core's monotonic clock.
    started: Instant,
}

impl Stage {
    /// Creates a stage without a branch.
    pub(super) fn new(
        archive: Arc<Archive>,
        backlog: Arc<Backlog>,
        tails: Arc<TailSlot>,
        flusher: Flusher,
        stop: Arc<AtomicBool>,
    ) -> Self {
        Self {
            archive,
            backlog,
            tails,
            flusher,
            stop,
            writer: None,
            left: Vec::new(),
            server_end: Lsn::ZERO,
            started: Instant::now(),
        }
    }

    /// Closes the writer after an error. No further WAL of this stream is accepted.
    pub(super) fn leave(&mut self) {
        self.writer = None;
    }

    pub(super) fn handle(&mut self, command: Command) -> Result<()> {
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
                // Also answered after a failure, which the caller receives separately.
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
        // If nothing of the branch is held, the stream may begin at another LSN than last time.
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
                let before = self.segment_before(branch, taken_up.resume_lsn);
                if let Some(writer) = &mut self.writer {
                    writer.hold_before(before);
                    taken_up.compare_lsn = writer.compare_lsn();
                }
            }
            return Ok(taken_up);
        }
        self.left.extend(self.writer.take());
        self.tick(true)?;
        self.left.retain(|left| left.branch() != branch);
        let spool = self.archive.branch_spool(branch);
        spool.discard_leftovers()?;
        if let Some(content) = history {
            spool.put_history(&content)?;
        }
        // Waiting segments are sealed concurrently, so the repository's answer may not show them.
        self.archive.progress().on(Event::TakingUp);
        let stored = self.archive.stored(branch)?;
        let held = spool.end_lsn()?;
        let start = take_up_at(held, stored.as_ref().map(Coverage::end), start_lsn);
        let coverage = stored.unwrap_or_else(|| Coverage::up_to(start));
        let coverage = self.archive.without_missing(branch, coverage);
        let size = self.archive.identity().segment_size;
        let open = self.archive.open_segment(&spool, start)?;
        let (tail, tail_end) = if self.archive.is_away() {
            // The tails in the repository were durable here before. WAL that a torn end lost is
            // streamed again.
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
            // If the spool was lost or torn, the repository may hold more of the open segment. That
            // WAL is written to the spool again.
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
            writer.hold_before(self.segment_before(branch, resume_lsn));
        }
        let compare_lsn = writer.compare_lsn();
        // A segment counts only under its final name. After a restart, everything after the first
        // file without its final name is streamed again.
        for segment in completed {
            self.flusher.finish(segment)?;
        }
        self.flusher.settle()?;
        self.archive.progress().on(Event::TakenUp {
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

    /// Returns the archived segment before the one that begins at `start_lsn`. `None` if it cannot
    /// be read. The whole segment is read: after `pg_switch_wal` most of it is padding.
    fn segment_before(&self, branch: Branch, start_lsn: Lsn) -> Option<Before> {
        let size = self.archive.identity().segment_size;
        let before = size.segment_of(start_lsn).previous()?;
        match self.archive.hold_segment(branch, before) {
            Ok(held) => held.filter(|held| held.bytes() == size.bytes()),
            Err(error) => {
                tracing::info!(%error, "the segment before cannot be read; the stream begins without an overlap to compare");
                None
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
        let progress = self.archive.progress();
        progress.on(Event::StreamBegun { start_lsn });
        Ok(())
    }

    pub(super) fn data(&mut self, received: &Received) -> Result<()> {
        let Received {
            start_lsn,
            wal_end,
            send_time,
            ref data,
        } = *received;
        if self.writer.is_some() && self.archive.room().is_at_limit(self.archive.progress()) {
            self.wait_for_room()?;
        }
        // After an error, further messages of that stream may still be queued. They are dropped
        // until the next stream begins.
        let Some(writer) = &mut self.writer else {
            return Ok(());
        };
        let before = writer.written();
        let mut completed = Vec::new();
        let (stop, archive) = (&self.stop, &self.archive);
        let outcome = writer.push(start_lsn, data, "the server", &mut completed, &mut || {
            wait_for_space(stop, archive)
        });
        // Segments that were completed before the error are whole and are processed.
        for segment in completed {
            self.flusher.finish(segment)?;
            self.archive.progress().on(Event::Completed);
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
        let actions = self.archive.progress().on(written);
        self.carry_out(&actions)
    }

    /// Waits until the spool is below its limit. Before that, makes the received WAL durable,
    /// reports it and cuts a tail.
    fn wait_for_room(&mut self) -> Result<()> {
        self.tick(true)?;
        while self.archive.room().is_at_limit(self.archive.progress()) {
            if !wait_for_space(&self.stop, &self.archive) {
                return Err(Error::SpoolFull);
            }
        }
        self.archive.status().note(|facts| facts.spool_full = None);
        Ok(())
    }

    pub(super) fn is_catching_up(&self) -> bool {
        self.writer
            .as_ref()
            .is_some_and(|writer| self.server_end.bytes_since(writer.written()) > CATCH_UP_BYTES)
    }

    /// Reports to the core that all received WAL is written.
    pub(super) fn settle_group(&mut self) -> Result<()> {
        let flusher_idle = self.flusher.is_idle();
        let progress = self.archive.progress();
        let actions = progress.on(Event::GroupTaken { flusher_idle });
        self.carry_out(&actions)
    }

    /// Lets the core cut a tail. With `due`, a tail is due regardless of its size and of the
    /// interval.
    pub(super) fn tick(&mut self, due: bool) -> Result<()> {
        let now = self.started.elapsed();
        let progress = self.archive.progress();
        let actions = progress.on(Event::Tick { now, due });
        self.carry_out(&actions)
    }

    fn carry_out(&mut self, actions: &[Action]) -> Result<()> {
        for action in actions {
            match action {
                Action::Sync => self.sync()?,
                Action::HandOver => self.hand_over()?,
                Action::CutTail => self.cut_tail(),
                // The sealing workers perform these.
                Action::Seal(..) | Action::Remove(..) => {}
            }
        }
        Ok(())
    }

    /// Fsyncs the open segment and reports it to the core.
    fn sync(&mut self) -> Result<()> {
        let Some(writer) = &self.writer else {
            return Ok(());
        };
        if let Some(open) = writer.open_segment() {
            let began = Instant::now();
            open.sync()?;
            self.archive.status().flushed(began.elapsed());
            self.archive.status().note(|facts| facts.spool_full = None);
            self.archive.progress().on(Event::Synced {
                segment_start: writer.resume_lsn(),
                end_lsn: writer.written(),
            });
        }
        Ok(())
    }

    /// Lets the flusher fsync the open segment.
    fn hand_over(&mut self) -> Result<()> {
        if let Some(writer) = &self.writer
            && let Some(open) = writer.open_segment()
        {
            let (start, end) = (writer.resume_lsn(), writer.written());
            self.flusher.sync(open.clone(), start, end)?;
        }
        Ok(())
    }

    /// Hands a tail to the store, if there is one. All written WAL is durable here at this point.
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
        self.archive.progress().on(Event::TailCut {
            branch: tail.branch,
            range: (tail.start_lsn, tail.end_lsn),
            now: self.started.elapsed(),
        });
        self.tails.put(tail);
    }
}

/// Waits a moment for space. A full disk or a spool at its limit stops the stream, not the
/// archiver: the server retains the WAL, the keepalives continue, and the stream continues when
/// there is space. Returns false to give up.
fn wait_for_space(stop: &AtomicBool, archive: &Archive) -> bool {
    archive
        .room()
        .wait(stop, archive.status(), archive.progress())
}
