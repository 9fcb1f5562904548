//! The driver of the core in the simulation: performs the work of the pipeline's threads, one step
//! at a time and in any order.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use wal_format::{Branch, Lsn};

use super::{Broken, PAGE, Simulation, world::origins};
use crate::core::{
    Core,
    action::Action,
    cursor::{Cursor, Reached, Step},
    event::Event,
    pace::PaceSettings,
    sealing::Place,
};

/// `MAX_SEND_SIZE` in `walsender.c`.
const MESSAGE_PAGES_MAX: u64 = 16;
const SEAL_WORKERS: usize = 2;

pub(super) struct Connection {
    pub(super) branch: Branch,
    pub(super) next: Lsn,
    /// Positions before this were reported in an earlier stream.
    pub(super) floor: Lsn,
}

pub(super) struct Writer {
    pub(super) branch: Branch,
    pub(super) cursor: Cursor,
}

pub(super) enum Job {
    Finish(Place),
    Sync(Place, Lsn),
}

/// An object being uploaded.
struct Put {
    place: Place,
    range: (Lsn, Lsn),
    is_stored: bool,
}

pub(super) struct Archiver {
    pub(super) core: Core,
    pub(super) connection: Option<Connection>,
    pub(super) writer: Option<Writer>,
    pub(super) left: Vec<Writer>,
    pub(super) jobs: VecDeque<Job>,
    seals: Vec<Put>,
    tail: Option<Put>,
    pub(super) server_end: Lsn,
    is_settled: bool,
    now: Duration,
}

/// The reason why a step ended early.
pub(super) enum Stop {
    /// A guarantee was violated.
    Broken(Broken),
    /// The process died. True if the power failed too.
    Crash(bool),
    /// The connection ended.
    Disconnected,
}

impl From<Broken> for Stop {
    fn from(broken: Broken) -> Self {
        Self::Broken(broken)
    }
}

impl Archiver {
    pub(super) fn disconnect(&mut self) {
        self.connection = None;
        self.core.on(Event::StreamEnded);
    }

    pub(super) fn is_idle(&self) -> bool {
        let is_quiet = self.jobs.is_empty() && self.seals.is_empty() && self.tail.is_none();
        is_quiet && self.is_settled && self.core.unsealed() == 0 && self.left.is_empty()
    }

    pub(super) fn describe(&self) -> String {
        let at = self.connection.as_ref().map(|on| (on.branch, on.next));
        format!(
            "stream {at:?}, {} jobs, {} unsealed, {} left, {:?}",
            self.jobs.len(),
            self.core.unsealed(),
            self.left.len(),
            self.core.positions()
        )
    }
}

impl Simulation {
    /// Starts the process, as `Pipeline::start` does.
    pub(super) fn start(&mut self) -> Result<(), Broken> {
        self.trace("the archiver starts");
        let core = Core::mutated(self.acknowledge, self.mutation);
        self.restart(core)
    }

    pub(super) fn restart(&mut self, mut core: Core) -> Result<(), Broken> {
        core.on(Event::Started(PaceSettings {
            tail_interval: Duration::from_secs(1),
            tail_bytes: 40 * PAGE,
        }));
        self.archiver = Some(Archiver {
            core,
            connection: None,
            writer: None,
            left: Vec::new(),
            jobs: VecDeque::new(),
            seals: Vec::new(),
            tail: None,
            server_end: Lsn::ZERO,
            is_settled: true,
            now: Duration::ZERO,
        });
        self.with(|simulation, archiver| {
            for branch in simulation.disk.branches() {
                if let Some(end) = simulation.disk.end_lsn(branch, simulation.size) {
                    simulation.take_up(archiver, branch, end)?;
                }
            }
            Ok(())
        })
    }

    /// Lets one of the threads do a step.
    pub(super) fn work(&mut self) -> Result<(), Broken> {
        let kind = self.rng.below(10);
        self.with(|simulation, archiver| match kind {
            _ if kind < 4 && archiver.connection.is_none() => simulation.connect(archiver),
            0..3 => simulation.deliver(archiver),
            3 | 4 => simulation.settle(archiver),
            5 => simulation.flush_one(archiver),
            6 => simulation.tail(archiver),
            7 => simulation.seal(archiver),
            8 => {
                archiver.now += Duration::from_millis(300);
                let due = simulation.rng.one_in(3);
                simulation.tick(archiver, due)
            }
            _ => Ok(simulation.say(archiver)?),
        })
    }

    pub(super) fn with(
        &mut self,
        work: impl FnOnce(&mut Self, &mut Archiver) -> Result<(), Stop>,
    ) -> Result<(), Broken> {
        let mut archiver = self.archiver.take().expect("it runs");
        match work(self, &mut archiver) {
            Ok(()) => {}
            Err(Stop::Broken(broken)) => return Err(broken),
            Err(Stop::Disconnected) => archiver.disconnect(),
            Err(Stop::Crash(power)) => {
                self.crash(power);
                return Ok(());
            }
        }
        // A closed gap has replaced the archiver by a new one.
        self.archiver.get_or_insert(archiver);
        Ok(())
    }

    fn deliver(&mut self, archiver: &mut Archiver) -> Result<(), Stop> {
        let Some(connection) = &mut archiver.connection else {
            return Ok(());
        };
        let branch = connection.branch;
        let after = self.server.after(branch);
        let end = after.map_or(self.server.flush_lsn(), |after| after.0);
        if let Some((switch, next)) = after.filter(|after| after.0 <= connection.next) {
            let floor = connection.floor.max(switch);
            self.settle(archiver)?;
            self.finish_jobs(archiver)?;
            self.tick(archiver, true)?;
            self.say(archiver)?;
            let resume = self.take_up(archiver, next, switch.align_down(self.size.bytes()))?;
            return self.stream(archiver, next, resume, floor);
        }
        let pages = 1 + self.rng.below(MESSAGE_PAGES_MAX);
        let from = connection.next;
        let count = end.bytes_since(from).min(pages * PAGE);
        if count == 0 || self.disk.is_full {
            return Ok(());
        }
        connection.next = from.add(count);
        let Some(writer) = &mut archiver.writer else {
            return Err(Stop::Disconnected);
        };
        let before = writer.cursor.written();
        let mut at = from;
        while at < from.add(count) {
            let left = from.add(count).bytes_since(at);
            let step = writer.cursor.next(at, left);
            let step = step.map_err(|order| format!("{at} comes out of order: {order:?}"))?;
            let (Step::Compare(bytes) | Step::Append(bytes)) = step;
            let to = at.add(bytes);
            let is_ours = self.is_ours(branch, at, to);
            match step {
                Step::Compare(_) if is_ours => writer.cursor.compared(bytes),
                Step::Compare(_) => {
                    self.trace("divergence");
                    return Err(Stop::Crash(false));
                }
                Step::Append(_) if is_ours => {
                    let segment = writer.cursor.segment();
                    let start = segment.start_lsn(self.size);
                    self.disk.append((branch, segment), start, bytes);
                    if writer.cursor.appended(bytes) == Reached::SegmentEnd {
                        archiver.jobs.push_back(Job::Finish((branch, segment)));
                        archiver.core.on(Event::Completed);
                    }
                }
                Step::Append(_) => {
                    return Err(format!("{branch}: other WAL is taken at {at}").into());
                }
            }
            at = to;
        }
        archiver.server_end = end;
        archiver.is_settled = false;
        let actions = archiver.core.on(Event::Written {
            streamed_lsn: writer.cursor.incoming(),
            written_lsn: writer.cursor.written(),
            server_lsn: end,
            bytes: writer.cursor.written().bytes_since(before),
        });
        self.carry_out(archiver, &actions)
    }

    /// Returns true if the server has the same bytes as the archived one.
    pub(super) fn is_ours(&self, branch: Branch, from: Lsn, to: Lsn) -> bool {
        let truth = self.truth.get(&branch).map(|runs| origins(runs, from, to));
        truth == Some(origins(&self.server.runs, from, to))
    }

    pub(super) fn settle(&mut self, archiver: &mut Archiver) -> Result<(), Stop> {
        let flusher_idle = archiver.jobs.is_empty();
        let actions = archiver.core.on(Event::GroupTaken { flusher_idle });
        self.carry_out(archiver, &actions)?;
        if archiver.connection.is_some() {
            self.say(archiver)?;
        }
        archiver.is_settled = true;
        self.tick(archiver, false)
    }

    pub(super) fn tick(&mut self, archiver: &mut Archiver, due: bool) -> Result<(), Stop> {
        let now = archiver.now;
        let actions = archiver.core.on(Event::Tick { now, due });
        self.carry_out(archiver, &actions)
    }

    fn carry_out(&mut self, archiver: &mut Archiver, actions: &[Action]) -> Result<(), Stop> {
        for action in actions {
            match action {
                Action::Sync => self.sync(archiver)?,
                Action::HandOver => {
                    if let Some(writer) = &archiver.writer {
                        let place = (writer.branch, writer.cursor.segment());
                        if self.disk.files.contains_key(&place) {
                            let job = Job::Sync(place, writer.cursor.written());
                            archiver.jobs.push_back(job);
                        }
                    }
                }
                Action::CutTail => self.cut_tail(archiver),
                Action::Seal(branch, segment) => {
                    let range = (segment.start_lsn(self.size), segment.end_lsn(self.size));
                    archiver.seals.push(Put {
                        place: (*branch, *segment),
                        range,
                        is_stored: false,
                    });
                }
                Action::Remove(branch, segment) => {
                    let place = (*branch, *segment);
                    if !self.store.sealed.contains(&place) {
                        return Err(format!("{place:?} goes before it is stored").into());
                    }
                    if self.is_calm || !self.rng.one_in(8) {
                        self.disk.files.remove(&place);
                        let (branch, segment) = place;
                        archiver.core.on(Event::Removed { branch, segment });
                    }
                }
            }
        }
        Ok(())
    }

    fn sync(&mut self, archiver: &mut Archiver) -> Result<(), Stop> {
        self.fsync_may_fail()?;
        let Some(writer) = &archiver.writer else {
            return Ok(());
        };
        let place = (writer.branch, writer.cursor.segment());
        if let Some(file) = self.disk.files.get_mut(&place) {
            file.durable = file.written;
            archiver.core.on(Event::Synced {
                segment_start: writer.cursor.resume_lsn(),
                end_lsn: writer.cursor.written(),
            });
        }
        Ok(())
    }

    /// An fsync may fail, after which the archiver stops and the kernel drops unwritten data, or
    /// the power may fail.
    fn fsync_may_fail(&mut self) -> Result<(), Stop> {
        if !self.is_calm && self.rng.one_in(80) {
            self.trace("an fsync fails");
            return Err(Stop::Crash(true));
        }
        Ok(())
    }

    pub(super) fn finish_jobs(&mut self, archiver: &mut Archiver) -> Result<(), Stop> {
        while !archiver.jobs.is_empty() {
            self.flush_one(archiver)?;
        }
        Ok(())
    }

    /// Lets the flusher do one job.
    fn flush_one(&mut self, archiver: &mut Archiver) -> Result<(), Stop> {
        let Some(job) = archiver.jobs.pop_front() else {
            return Ok(());
        };
        self.fsync_may_fail()?;
        let (Job::Finish(place) | Job::Sync(place, _)) = job;
        // Removed by a start that found the segment in the store.
        let Some(file) = self.disk.files.get_mut(&place) else {
            return Ok(());
        };
        match job {
            Job::Sync(_, end_lsn) => {
                file.durable = file.durable.max(end_lsn);
                archiver.core.on(Event::Synced {
                    segment_start: place.1.start_lsn(self.size),
                    end_lsn,
                });
            }
            Job::Finish(_) => {
                file.durable = file.written;
                if !self.is_calm && self.rng.one_in(40) {
                    self.trace("the power goes between fsync and rename");
                    return Err(Stop::Crash(true));
                }
                file.is_complete = true;
                archiver.core.on(Event::Finished {
                    branch: place.0,
                    segment: place.1,
                    end_lsn: Some(place.1.end_lsn(self.size)),
                });
            }
        }
        Ok(())
    }

    fn cut_tail(&mut self, archiver: &mut Archiver) {
        let mut cut = None;
        while let Some(mut left) = archiver.left.pop() {
            cut = left.cursor.cut_tail().map(|range| (left.branch, range));
            if cut.is_some() {
                archiver.left.push(left);
                break;
            }
        }
        if cut.is_none()
            && let Some(writer) = &mut archiver.writer
        {
            cut = writer.cursor.cut_tail().map(|range| (writer.branch, range));
        }
        if let Some((branch, range)) = cut {
            archiver.core.on(Event::TailCut {
                branch,
                range,
                now: archiver.now,
            });
            archiver.tail = Some(Put {
                place: (branch, self.size.segment_of(range.0)),
                range,
                is_stored: false,
            });
        }
    }

    /// The tail's thread: puts a tail and later reads it back.
    fn tail(&mut self, archiver: &mut Archiver) -> Result<(), Stop> {
        let Some(tail) = &mut archiver.tail else {
            return Ok(());
        };
        let (branch, (start, end)) = (tail.place.0, tail.range);
        if self.store.sealed.contains(&tail.place) {
            archiver.tail = None;
            archiver.core.on(Event::TailSuperseded);
            return Ok(());
        }
        if !tail.is_stored {
            if !self.is_calm && self.rng.one_in(3) {
                return Ok(());
            }
            let tails = self.store.tails.entry(branch).or_default();
            let known = tails.entry(start).or_insert(end);
            *known = (*known).max(end);
            // The answer may be lost, after which the tail is put again.
            tail.is_stored = self.is_calm || !self.rng.one_in(4);
            return Ok(());
        }
        archiver.tail = None;
        archiver.core.on(Event::TailStored {
            branch,
            range: (start, end),
        });
        Ok(())
    }

    /// A sealing worker: takes a segment, puts it, reads it back.
    fn seal(&mut self, archiver: &mut Archiver) -> Result<(), Stop> {
        if archiver.seals.len() < SEAL_WORKERS && self.rng.one_in(2) {
            let actions = archiver.core.on(Event::SealerFree);
            return self.carry_out(archiver, &actions);
        }
        if archiver.seals.is_empty() {
            return Ok(());
        }
        let worker = self.rng.below(archiver.seals.len() as u64);
        let worker = usize::try_from(worker).expect("small");
        let seal = &mut archiver.seals[worker];
        let place = seal.place;
        if !seal.is_stored {
            if !self.is_calm && self.rng.one_in(3) {
                archiver.seals.remove(worker);
                archiver.core.on(Event::SealFailed {
                    branch: place.0,
                    segment: place.1,
                });
                return Ok(());
            }
            let file = self.disk.files.get(&place);
            if !file.is_some_and(|file| file.is_complete) {
                return Err(format!("{place:?} is to be sealed and is not there").into());
            }
            self.store.sealed.insert(place);
            seal.is_stored = self.is_calm || !self.rng.one_in(4);
            return Ok(());
        }
        let seal = archiver.seals.remove(worker);
        self.store.remove_tails(place, self.size);
        let crosses = place.1.0.is_multiple_of(3);
        let actions = archiver.core.on(Event::Sealed {
            branch: place.0,
            segment: place.1,
            range: seal.range,
            open_record_in: if crosses { place.1.previous() } else { None },
        });
        self.carry_out(archiver, &actions)
    }

    /// Reports positions to the server.
    pub(super) fn say(&mut self, archiver: &mut Archiver) -> Result<(), Broken> {
        let Some(connection) = &archiver.connection else {
            return Ok(());
        };
        let (branch, floor) = (connection.branch, connection.floor);
        let report = archiver.core.report();
        let positions = archiver.core.positions();
        if report.flush > report.write || report.write > positions.written() {
            return Err(format!("{report:?} of {positions:?}"));
        }
        if report.flush == Lsn::ZERO || report.flush < floor {
            return Ok(());
        }
        // Only as far back as a stream is compared. Earlier WAL was compared when it arrived.
        let compared = Lsn(report.flush.0.saturating_sub(PAGE));
        let is_begun = self
            .begins
            .get(&branch)
            .is_some_and(|begin| *begin <= compared);
        if is_begun && !self.is_ours(branch, compared, report.flush) {
            return Err(format!("{report:?} is told to a server that has other WAL"));
        }
        if self.server.slot.is_some_and(|slot| report.flush < slot) {
            return Err(format!(
                "{report:?} moves the slot back from {:?}",
                self.server.slot
            ));
        }
        self.server.slot = Some(report.flush);
        let begin = self.begins.get(&branch).copied().unwrap_or(Lsn::ZERO);
        if report.flush <= begin {
            return Ok(());
        }
        let told = self.acknowledged.entry(branch).or_insert((begin, begin));
        if report.flush > told.1 {
            told.1 = report.flush;
            self.trace(&format!(
                "says {} {} of {branch}",
                report.write, report.flush
            ));
        }
        Ok(())
    }
}

pub(super) type Begins = BTreeMap<Branch, Lsn>;
