//! What the archiver decides, as a pure state machine: events in, actions out. No I/O, no clock, no thread.
//!
//! The stages in [`crate::pipeline`] are its drivers: they tell it what happened and do what it answers. Because nothing
//! else is in here, the simulation (`core/simulation.rs`) runs this very code against a server, a disk and a store that
//! fail in every order. Invariant: acknowledged <= durable in the class the user chose <= received.

pub mod cursor;
pub mod pace;
pub mod positions;
pub mod sealing;
#[cfg(test)]
mod simulation;

use std::time::Duration;

use repository::config::Acknowledge;
use wal_format::{Branch, Lsn, SegmentNo};

use self::{
    pace::{Pace, PaceSettings},
    positions::{Coverage, Positions, Report},
    sealing::Sealing,
};

/// Something happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The stages start, with nothing under way.
    Started(PaceSettings),
    /// A branch was taken up: its spool is open.
    TakenUp {
        /// The branch.
        branch: Branch,
        /// The end of what is durable here.
        durable_lsn: Lsn,
        /// What the repository holds.
        stored: Coverage,
    },
    /// A stream of the branch begins; what it sends up to the end of what is held is compared first.
    StreamBegun {
        /// Its first byte.
        start_lsn: Lsn,
    },
    /// The connection is gone, or was closed: until another stream has been compared nothing is said.
    StreamEnded,
    /// WAL was compared and written.
    Written {
        /// Where the stream is.
        streamed_lsn: Lsn,
        /// The end of what the files hold.
        written_lsn: Lsn,
        /// The server's flush LSN.
        server_lsn: Lsn,
        /// Bytes that are new.
        bytes: u64,
    },
    /// The open segment's last byte was written; the next one is open.
    Completed,
    /// All that has arrived was written.
    GroupTaken {
        /// Whether the flusher has nothing to do.
        flusher_idle: bool,
    },
    /// A moment in which a tail may be cut.
    Tick {
        /// The monotonic clock.
        now: Duration,
        /// Whether it is time for a tail in any case.
        due: bool,
    },
    /// The open segment was fsynced.
    Synced {
        /// Its start.
        segment_start: Lsn,
        /// Up to here.
        end_lsn: Lsn,
    },
    /// A complete segment is durable under its final name, or was found so at the start.
    Finished {
        /// Its branch.
        branch: Branch,
        /// The segment.
        segment: SegmentNo,
        /// Its end; `None` when it was found.
        end_lsn: Option<Lsn>,
    },
    /// A sealing worker is free.
    SealerFree,
    /// A sealed segment was stored and verified.
    Sealed {
        /// Its branch.
        branch: Branch,
        /// The segment.
        segment: SegmentNo,
        /// Its range.
        range: (Lsn, Lsn),
        /// Where the record begins that is open at its end.
        open_record_in: Option<SegmentNo>,
    },
    /// A segment could not be sealed this time.
    SealFailed {
        /// Its branch.
        branch: Branch,
        /// The segment.
        segment: SegmentNo,
    },
    /// A tail was handed to the store.
    TailCut {
        /// Its branch.
        branch: Branch,
        /// Its range.
        range: (Lsn, Lsn),
        /// The monotonic clock.
        now: Duration,
    },
    /// A tail was stored and verified.
    TailStored {
        /// Its branch.
        branch: Branch,
        /// Its range.
        range: (Lsn, Lsn),
    },
    /// A tail is of no use any more: its segment is sealed.
    TailSuperseded,
}

/// Something is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Hand a tail to the store, if there is one: of a branch that was left before of the open segment.
    CutTail,
    /// Have the open segment fsynced beside the writer.
    HandOver,
    /// Remove a segment's file from the spool.
    Remove(Branch, SegmentNo),
    /// Seal a segment.
    Seal(Branch, SegmentNo),
    /// Fsync the open segment now.
    Sync,
}

/// Mistakes that the simulation has to find.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// What is written is said to be flushed.
    AcknowledgeBeforeFsync,
    /// A branch that was left no longer holds the report back.
    ForgetLeftBranch,
    /// A tail counts when it is sent, not when it was read back.
    ReportUnverified,
    /// A server is told of what is held before it has shown that its WAL is the same.
    SayBeforeCompared,
    /// Some segment is never sealed.
    SkipSegment,
    /// What lies beyond a hole in the store counts.
    TailBeyondHole,
}

/// One cluster's decisions.
#[derive(Clone, Debug)]
pub struct Core {
    positions: Positions,
    sealing: Sealing,
    pace: Pace,
    #[cfg(test)]
    mutation: Option<Mutation>,
}

impl Core {
    /// Nothing has happened yet.
    #[must_use]
    pub fn new(acknowledge: Acknowledge) -> Self {
        Self {
            positions: Positions::new(acknowledge),
            sealing: Sealing::default(),
            pace: Pace::default(),
            #[cfg(test)]
            mutation: None,
        }
    }

    /// Takes what happened; what is to be done about it, in this order.
    pub fn on(&mut self, event: Event) -> Vec<Action> {
        #[cfg(test)]
        if let Some(actions) = self.on_mutated(&event) {
            return actions;
        }
        match event {
            Event::Started(settings) => {
                self.pace = Pace::new(settings);
                self.sealing = Sealing::default();
            }
            Event::TakenUp {
                branch,
                durable_lsn,
                stored,
            } => {
                self.positions.take_up(branch, durable_lsn, stored);
                self.pace.take_up(durable_lsn);
            }
            Event::StreamBegun { start_lsn } => self.positions.begin_stream(start_lsn),
            Event::StreamEnded => self.positions.end_stream(),
            Event::Written {
                streamed_lsn,
                written_lsn,
                server_lsn,
                bytes,
            } => {
                self.positions.on_written(streamed_lsn, written_lsn);
                return self.pace.on_written(written_lsn, server_lsn, bytes);
            }
            Event::Completed => self.pace.on_completed(),
            Event::GroupTaken { flusher_idle } => return self.pace.on_group(flusher_idle),
            Event::Tick { now, due } => return self.pace.on_tick(now, due),
            Event::Synced {
                segment_start,
                end_lsn,
            } => self.positions.on_synced(segment_start, end_lsn),
            Event::Finished {
                branch,
                segment,
                end_lsn,
            } => {
                // What an earlier run left of another branch is finished before that one is taken up.
                if let Some(end_lsn) = end_lsn
                    && branch == self.positions.branch()
                {
                    self.positions.on_finished(end_lsn);
                }
                self.sealing.push((branch, segment));
            }
            Event::SealerFree => {
                let next = self.sealing.take();
                return next
                    .map(|(branch, segment)| Action::Seal(branch, segment))
                    .into_iter()
                    .collect();
            }
            Event::Sealed {
                branch,
                segment,
                range,
                open_record_in,
            } => {
                self.positions.on_stored(branch, range.0, range.1);
                let removable = self.sealing.sealed((branch, segment), open_record_in);
                return removable
                    .into_iter()
                    .map(|(branch, segment)| Action::Remove(branch, segment))
                    .collect();
            }
            Event::SealFailed { branch, segment } => self.sealing.give_back((branch, segment)),
            Event::TailCut { now, .. } => self.pace.on_tail_cut(now),
            Event::TailStored { branch, range } => {
                self.positions.on_stored(branch, range.0, range.1);
                self.pace.on_tail_done();
            }
            Event::TailSuperseded => self.pace.on_tail_done(),
        }
        Vec::new()
    }

    /// What may be said now.
    pub fn report(&mut self) -> Report {
        let report = self.positions.report();
        #[cfg(test)]
        if self.mutation == Some(Mutation::AcknowledgeBeforeFsync) && report != Report::default() {
            return Report {
                flush: report.write,
                ..report
            };
        }
        report
    }

    /// Which WAL is where.
    #[must_use]
    pub fn positions(&self) -> &Positions {
        &self.positions
    }

    /// Complete segments that are not sealed yet.
    #[must_use]
    pub fn unsealed(&self) -> usize {
        self.sealing.len()
    }

    /// Whether a tail would be taken now.
    #[must_use]
    pub fn is_tail_free(&self) -> bool {
        self.pace.is_tail_free()
    }

    #[cfg(test)]
    fn mutated(acknowledge: Acknowledge, mutation: Option<Mutation>) -> Self {
        let mut core = Self::new(acknowledge);
        core.mutation = mutation;
        core
    }

    /// Does it wrong, where a mutation says so.
    #[cfg(test)]
    fn on_mutated(&mut self, event: &Event) -> Option<Vec<Action>> {
        match (self.mutation?, event) {
            (
                Mutation::SkipSegment,
                Event::Finished {
                    segment,
                    end_lsn: Some(end_lsn),
                    ..
                },
            ) if segment.0 % 4 == 3 => {
                self.positions.on_finished(*end_lsn);
                Some(Vec::new())
            }
            (Mutation::ForgetLeftBranch, Event::TakenUp { branch, .. })
                if *branch != self.positions.branch() =>
            {
                let mut event = event.clone();
                if let Event::TakenUp { branch, .. } = &mut event {
                    self.positions.forget_left(*branch);
                }
                self.mutation = None;
                let actions = self.on(event);
                self.mutation = Some(Mutation::ForgetLeftBranch);
                Some(actions)
            }
            (Mutation::SayBeforeCompared, Event::StreamBegun { .. }) => {
                self.positions.begin_stream(self.positions.written());
                Some(Vec::new())
            }
            (Mutation::ReportUnverified, Event::TailCut { branch, range, now }) => {
                self.positions.on_stored(*branch, range.0, range.1);
                self.pace.on_tail_cut(*now);
                Some(Vec::new())
            }
            (Mutation::TailBeyondHole, Event::Sealed { branch, range, .. })
            | (Mutation::TailBeyondHole, Event::TailStored { branch, range }) => {
                let end = self.positions.stored_on(*branch);
                self.positions.on_stored(*branch, end.min(range.0), range.1);
                None
            }
            _ => None,
        }
    }
}
