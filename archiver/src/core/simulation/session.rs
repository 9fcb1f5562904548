//! The driver's connections: performs the work of `pipeline/follow.rs`, `gap.rs` and the start of
//! `write.rs`.

use wal_format::{Branch, Lsn, SegmentNo};

use super::{
    Broken, PAGE, Simulation,
    archiver::{Archiver, Connection, Job, Stop, Writer},
};
use crate::{
    core::{
        cursor::{self, Cursor, Reached, Step, is_still_open, take_up_at},
        event::Event,
        positions::Coverage,
        start::{Held, plan_start},
    },
    pipeline::gap::plan_loss,
};

impl Simulation {
    /// As `Source::stream`, up to the first message.
    pub(super) fn connect(&mut self, archiver: &mut Archiver) -> Result<(), Stop> {
        let held = self.held();
        if held.is_empty() {
            // Nothing was ever stored, so the archive starts from scratch.
            self.begins.clear();
        }
        let is_refused = |simulation: &Self| {
            let server = simulation.server.state();
            plan_start(&server, &held, simulation.size).is_err()
        };
        if !held.is_empty() && is_refused(self) {
            self.trace("the server is refused");
            return Ok(());
        }
        if self.server.slot.is_none() {
            let kept = self.server.flush_lsn().bytes_since(self.server.oldest);
            let redo = self.rng.below(kept + 1) / PAGE * PAGE;
            self.server.slot = Some(self.server.oldest.add(redo));
        }
        let state = self.server.state();
        let Ok(plan) = plan_start(&state, &held, self.size) else {
            return Ok(());
        };
        let branch = plan.branch.branch;
        let resume = self.take_up(archiver, branch, plan.start_lsn)?;
        let floor = self.server.slot.unwrap_or(Lsn::ZERO);
        self.stream(archiver, branch, resume, floor)
    }

    /// Returns what the archive holds, branch by branch, as `Archive::held` does.
    fn held(&self) -> Vec<Held> {
        let mut branches = self.store.branches();
        branches.extend(self.disk.branches());
        let held = |branch| {
            let end_lsn = self.held_end(branch)?;
            Some(Held { branch, end_lsn })
        };
        branches.into_iter().filter_map(held).collect()
    }

    /// `START_REPLICATION`.
    pub(super) fn stream(
        &mut self,
        archiver: &mut Archiver,
        branch: Branch,
        resume: Lsn,
        floor: Lsn,
    ) -> Result<(), Stop> {
        if resume < self.server.oldest {
            return self.close_gap(archiver);
        }
        let until = self.server.after(branch).map(|after| after.0);
        if resume > until.unwrap_or(self.server.flush_lsn()) {
            return Err(Stop::Disconnected);
        }
        let before = Lsn(resume.0 - PAGE);
        let begin = self.begins.get(&branch).copied().unwrap_or(resume);
        let is_ours = before < begin || self.is_ours(branch, before, resume);
        let writer = archiver.writer.as_mut().expect("it was taken up");
        let mut from = resume;
        if before >= begin && before >= self.server.oldest && writer.cursor.written() == resume {
            // The stream resumes between two segments, so the end of the previous one is compared.
            writer.cursor.hold_before(PAGE);
            from = writer.cursor.compare_lsn();
        } else if !is_ours {
            // The decoder detects this by `xl_prev`.
            self.trace("divergence");
            return Err(Stop::Crash(false));
        }
        let begun = writer.cursor.begin(from);
        begun.map_err(|order| format!("the stream begins at {from}, not at {order:?}"))?;
        archiver.core.on(Event::StreamBegun { start_lsn: from });
        archiver.server_end = resume;
        self.trace(&format!("streams {branch} from {from}"));
        archiver.connection = Some(Connection {
            branch,
            next: from,
            floor,
        });
        Ok(())
    }

    /// As `gap::close`, when no other server has the WAL.
    fn close_gap(&mut self, archiver: &mut Archiver) -> Result<(), Stop> {
        archiver.disconnect();
        let held = self.held();
        let server = self.server.state();
        let (Some(goes_on), Ok(plan)) = (
            server.slot_restart_lsn,
            plan_start(&server, &held, self.size),
        ) else {
            return Ok(());
        };
        let branch = plan.branch.branch;
        let ours = held.iter().find(|held| held.branch == branch);
        let from = ours.map_or(plan.start_lsn, |held| held.end_lsn);
        let lost = plan_loss(&server.path, branch, from, goes_on, &held, self.size);
        if lost.is_empty() || !archiver.core.positions().is_stored() {
            return Ok(());
        }
        for range in lost {
            self.trace(&format!("declared lost: {range:?}"));
            let told = self.acknowledged.get(&range.branch);
            if let Some(told) = told.filter(|told| told.1 > range.from_lsn) {
                return Err(format!("{range:?} is declared lost, acknowledged to {told:?}").into());
            }
            self.begins.entry(range.branch).or_insert(range.from_lsn);
            self.store
                .gaps
                .push((range.branch, range.from_lsn, range.to_lsn));
        }
        self.finish_jobs(archiver)?;
        let core = archiver.core.clone();
        Ok(self.restart(core)?)
    }

    /// As the spool thread does: finds the end of the stored WAL from its content, and restores the
    /// open segment.
    pub(super) fn take_up(
        &mut self,
        archiver: &mut Archiver,
        branch: Branch,
        start_lsn: Lsn,
    ) -> Result<Lsn, Stop> {
        let size = self.size;
        self.finish_jobs(archiver)?;
        self.tick(archiver, true)?;
        if let Some(writer) = archiver
            .writer
            .as_ref()
            .filter(|on| on.branch == branch)
            .filter(|on| {
                let cursor = &on.cursor;
                (cursor.resume_lsn()..=cursor.written()).contains(&start_lsn)
            })
        {
            let resume = writer.cursor.resume_lsn();
            self.begins.entry(branch).or_insert(resume);
            return Ok(resume);
        }
        archiver.left.extend(archiver.writer.take());
        self.tick(archiver, true)?;
        archiver.left.retain(|left| left.branch != branch);
        let stored = self
            .store
            .stored(branch, &self.disk, &self.server.path, size);
        let spooled = self.disk.end_lsn(branch, size);
        let is_empty = spooled.is_none() && stored.is_none();
        let start = take_up_at(spooled, stored.as_ref().map(Coverage::end), start_lsn);
        let stored = stored.unwrap_or_else(|| Coverage::up_to(start));
        let wanted = self.open_segment(branch, start)?;
        let tail_end = self.store.tails_of((branch, wanted), size);
        let (complete, open, behind) = self.disk.segments(branch);
        for segment in behind {
            self.disk.files.remove(&(branch, segment));
        }
        let segment = cursor::open_segment(
            complete.last().copied(),
            open.map(|open| open.0),
            size.segment_of(start),
        )
        .map_err(|missing| format!("{branch}: a hole in the spool at {missing:?}"))?;
        let mut writer = Writer {
            branch,
            cursor: Cursor::new(size, segment, tail_end),
        };
        let mut completed = Vec::new();
        if let Some((_, end)) = open {
            let file = self.disk.files.get_mut(&(branch, segment));
            let file = file.expect("the open segment");
            file.durable = file.written;
            while writer.cursor.written() < end {
                let left = end.bytes_since(writer.cursor.written());
                let count = writer.cursor.room().min(left);
                if writer.cursor.appended(count) == Reached::SegmentEnd {
                    completed.push((branch, segment));
                }
            }
        }
        let open_start = wanted.start_lsn(size);
        if tail_end > open_start && writer.cursor.resume_lsn() == open_start {
            let begun = writer.cursor.begin(open_start);
            begun.map_err(|order| format!("tails do not fit: {order:?}"))?;
            let mut at = open_start;
            while at < tail_end {
                let step = writer.cursor.next(at, tail_end.bytes_since(at));
                match step.map_err(|order| format!("tails do not follow: {order:?}"))? {
                    Step::Compare(count) => {
                        writer.cursor.compared(count);
                        at = at.add(count);
                    }
                    Step::Append(count) => {
                        self.disk.append((branch, wanted), open_start, count);
                        if writer.cursor.appended(count) == Reached::SegmentEnd {
                            completed.push((branch, wanted));
                        }
                        at = at.add(count);
                    }
                }
            }
            if let Some(file) = self.disk.files.get_mut(&(branch, wanted)) {
                file.durable = file.written;
            }
        }
        for segment in complete {
            archiver.core.on(Event::Finished {
                branch,
                segment,
                end_lsn: None,
            });
        }
        let durable_lsn = writer.cursor.written();
        let resume = writer.cursor.resume_lsn();
        self.trace(&format!(
            "takes up {branch}: {durable_lsn} is held, the store has {}",
            stored.end()
        ));
        if is_empty {
            self.begins.insert(branch, resume);
        }
        archiver.writer = Some(writer);
        let places = completed.iter().copied().map(Job::Finish);
        archiver.jobs.extend(places);
        self.finish_jobs(archiver)?;
        archiver.core.on(Event::TakenUp {
            branch,
            durable_lsn,
            stored,
        });
        self.tick(archiver, true)?;
        Ok(resume)
    }

    /// As `Archive::open_segment`: an older open file is removed when the repository has the whole
    /// segment.
    fn open_segment(&mut self, branch: Branch, end: Lsn) -> Result<SegmentNo, Broken> {
        let open = self.size.segment_of(end);
        let Some((partial, length)) = self.disk.segments(branch).1 else {
            return Ok(open);
        };
        if is_still_open(partial, length, end, self.size) {
            return Ok(partial);
        }
        let place = (branch, partial);
        let is_sealed = self.store.sealed.contains(&place);
        if !is_sealed && self.store.tails_of(place, self.size) < length {
            return Err(format!("{place:?} is neither open nor in the repository"));
        }
        self.disk.files.remove(&place);
        Ok(open)
    }
}
