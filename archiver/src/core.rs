//! The archiver's decisions as a pure state machine: events in, actions out. No I/O, no clock, no
//! threads. [`start`] decides where a stream begins; [`progress`] shares the state machine between
//! the stages.
//!
//! The stages in [`crate::pipeline`] drive it: they report events and perform the returned actions.
//! The simulation (`core/simulation.rs`) therefore runs this very code against a server, a disk and
//! a store that fail in every order.
//! Invariant: acknowledged <= durable in the class the user chose <= received.

pub mod action;
pub mod cursor;
pub mod event;
pub mod live_cluster;
pub mod pace;
pub mod positions;
pub mod progress;
pub mod sealing;
pub mod shutdown;
#[cfg(test)]
mod simulation;
pub mod start;

use repository::config::Acknowledge;

#[cfg(test)]
use self::action::Mutation;
use self::{
    action::Action,
    event::Event,
    pace::Pace,
    positions::{Positions, Report},
    sealing::Sealing,
};

/// The decisions for one cluster.
#[derive(Clone, Debug)]
pub struct Core {
    positions: Positions,
    sealing: Sealing,
    pace: Pace,
    #[cfg(test)]
    mutation: Option<Mutation>,
}

impl Core {
    /// Creates a core without a branch.
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

    /// Processes an event. Returns the actions to perform, in order.
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
            Event::RepositoryRead => self.positions.on_repository_read(),
            Event::Lacking { branch, range } => {
                self.positions.on_lacking(branch, range.0, range.1);
            }
            Event::TakingUp => self.positions.note_stored(),
            Event::TakenUp {
                branch,
                durable_lsn,
                stored,
            } => {
                self.positions.take_up(branch, durable_lsn, stored);
                self.pace.take_up(durable_lsn);
            }
            Event::BackupListed { branch, stored } => {
                self.positions.begin_at_backup(branch, stored);
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
                // A segment of another branch comes from an earlier run. It is finished before its
                // branch is taken up, so it does not concern the current positions.
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
            Event::Removed { branch, segment } => self.sealing.removed((branch, segment)),
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

    /// Returns the positions that may be reported now.
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

    /// The positions of WAL.
    #[must_use]
    pub fn positions(&self) -> &Positions {
        &self.positions
    }

    /// The number of complete segments that are not sealed yet.
    #[must_use]
    pub fn unsealed(&self) -> usize {
        self.sealing.len()
    }

    /// Returns true if a tail would be cut now.
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

    /// Applies the deliberate mistake to an event. Returns `None` if the event is then processed as
    /// usual.
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
