//! The positions of WAL: received, written, durable here, stored in the repository. Pure: it is
//! informed of events and answers which positions may be reported.
//!
//! Invariant: [`Positions::report`] never exceeds what is proved in the class the user chose, never
//! decreases on the same branch, and reports nothing before the server has shown that its WAL is
//! the one we hold.

use std::collections::{BTreeMap, BTreeSet};

use repository::{PathPart, config::Acknowledge};
use status::durable::DurableWal;
use wal_format::{Branch, Lsn};

/// A contiguous range that grows from its start, built from ranges that arrive in any order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    end: Lsn,
    /// Ranges after a gap: start to end, disjoint.
    beyond: BTreeMap<Lsn, Lsn>,
}

impl Coverage {
    /// Creates a coverage that contains only what precedes `end`.
    #[must_use]
    pub fn up_to(end: Lsn) -> Self {
        Self {
            end,
            beyond: BTreeMap::new(),
        }
    }

    /// The end of the contiguous range.
    #[must_use]
    pub fn end(&self) -> Lsn {
        self.end
    }

    /// The end of the last range, including those after a gap.
    #[must_use]
    pub fn last_end(&self) -> Lsn {
        let last = self.beyond.last_key_value();
        last.map_or(self.end, |(_, end)| *end)
    }

    /// Removes the range from `start` up to `end`.
    pub fn remove(&mut self, start: Lsn, end: Lsn) {
        let mut rest = std::mem::take(&mut self.beyond);
        if self.end > start {
            rest.insert(start, self.end.max(start));
            self.end = start;
        }
        for (from, to) in rest {
            for (from, to) in [(from, to.min(start)), (from.max(end), to)] {
                if from < to {
                    self.add(from, to);
                }
            }
        }
    }

    /// Bytes of the ranges after a gap.
    fn bytes_beyond(&self) -> u64 {
        let mut known = self.end;
        let mut bytes = 0;
        for (from, to) in &self.beyond {
            bytes += to.bytes_since((*from).max(known));
            known = known.max(*to);
        }
        bytes
    }

    /// Adds the range from `start` up to `end`, which may overlap with known ranges.
    pub fn add(&mut self, start: Lsn, end: Lsn) {
        if start > self.end {
            let known = self.beyond.entry(start).or_insert(end);
            *known = (*known).max(end);
            return;
        }
        self.end = self.end.max(end);
        while let Some(next) = self.beyond.first_entry() {
            if *next.key() > self.end {
                break;
            }
            self.end = self.end.max(next.remove());
        }
    }
}

/// Start LSN of the archived part of a branch: the first stored byte, else the first spooled byte
/// (whose first segments may be the last to be stored), else its fork point if the parent is
/// archived. Ranges declared lost count only if nothing else is known. `None` if nothing is known
/// of the branch.
#[must_use]
pub fn coverage_begin(
    stored: Option<Lsn>,
    spooled: Option<Lsn>,
    forked: Option<Lsn>,
    lost: &[(Lsn, Lsn)],
) -> Option<Lsn> {
    let known = [stored, spooled].into_iter().flatten().min();
    let known = known.or_else(|| lost.iter().map(|lost| lost.1).max())?;
    Some(forked.map_or(known, |forked| forked.min(known)))
}

/// The positions of a status update. `0/0` reports nothing and changes nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Written to the spool's file, possibly not durable.
    pub write: Lsn,
    /// Durable in the chosen class.
    pub flush: Lsn,
}

/// The positions of the branch being archived, and the unfinished parts of previous branches.
#[derive(Clone, Debug)]
pub struct Positions {
    acknowledge: Acknowledge,
    branch: Branch,
    received: Lsn,
    written: Lsn,
    /// The end of the segments that are durable under their final names.
    finished: Lsn,
    /// The open segment: its start, and the end of its fsynced WAL.
    open: (Lsn, Lsn),
    /// For each branch, the ranges that the repository holds.
    stored: BTreeMap<Branch, Coverage>,
    /// The start of the WAL that the repository was found to lack, by branch. Nothing after it
    /// counts as stored until the repository was read again.
    lacking: BTreeMap<Branch, Lsn>,
    /// The branches that were not taken up since the repository was read: what is known of them is
    /// replaced by what was read.
    outdated: BTreeSet<Branch>,
    /// Ranges stored since a branch began to be taken up. `None` while no branch is being taken up.
    stored_since: Option<Vec<(Branch, Lsn, Lsn)>>,
    /// Abandoned branches and the LSN where each ends here. Until they are stored to that LSN, no
    /// later WAL counts as stored.
    left: Vec<(Branch, Lsn)>,
    /// The end of the WAL we held when the stream began. The server has to send the same bytes up
    /// to here.
    verify_to: Lsn,
    streamed: Lsn,
    reported: Lsn,
}

impl Positions {
    /// Returns how far the WAL is durable, and its part on `path`.
    #[must_use]
    pub fn durable(&self, path: &[PathPart]) -> DurableWal {
        DurableWal {
            flushed: self.flushed(),
            flushed_on_path: self.flushed_on(path),
            remote: self.remote(),
            remote_on_path: self.remote_on(path),
            queued_bytes: self.queued_bytes(),
            orphaned_bytes: self.orphaned_bytes(path),
        }
    }

    /// Creates positions without a branch taken up. Nothing is reported yet.
    #[must_use]
    pub fn new(acknowledge: Acknowledge) -> Self {
        Self {
            acknowledge,
            branch: Branch::FIRST,
            received: Lsn::ZERO,
            written: Lsn::ZERO,
            finished: Lsn::ZERO,
            open: (Lsn::ZERO, Lsn::ZERO),
            stored: BTreeMap::new(),
            lacking: BTreeMap::new(),
            outdated: BTreeSet::new(),
            stored_since: None,
            left: Vec::new(),
            verify_to: Lsn::MAX,
            streamed: Lsn::ZERO,
            reported: Lsn::ZERO,
        }
    }

    /// The branch being archived. Timeline 1 before one is taken up.
    #[must_use]
    pub fn branch(&self) -> Branch {
        self.branch
    }

    /// The end of the received WAL.
    #[must_use]
    pub fn received(&self) -> Lsn {
        self.received
    }

    /// The end of the WAL written to the spool.
    #[must_use]
    pub fn written(&self) -> Lsn {
        self.written
    }

    /// The end of the WAL that is durable here.
    #[must_use]
    pub fn flushed(&self) -> Lsn {
        let (start, synced) = self.open;
        if start <= self.finished {
            self.finished.max(synced)
        } else {
            self.finished
        }
    }

    /// The end of the WAL that the repository holds without a gap, including abandoned branches.
    #[must_use]
    pub fn remote(&self) -> Lsn {
        let mut end = self.stored_on(self.branch);
        for (branch, left_at) in &self.left {
            let stored = self.stored_on(*branch);
            if stored < *left_at {
                // WAL after the switch point is not on the new timeline's path; ignore it.
                end = end.min(stored);
            }
        }
        end
    }

    /// Returns true if the repository holds everything that is durable here, of every branch.
    #[must_use]
    pub fn is_stored(&self) -> bool {
        let is_stored = |(branch, end): &(Branch, Lsn)| self.stored_on(*branch) >= *end;
        self.left.iter().all(is_stored) && self.stored_on(self.branch) >= self.flushed()
    }

    /// The end of the WAL of one branch that the repository holds.
    #[must_use]
    pub fn stored_on(&self, branch: Branch) -> Lsn {
        let end = self.stored.get(&branch).map_or(Lsn::ZERO, Coverage::end);
        self.lacking.get(&branch).map_or(end, |from| end.min(*from))
    }

    /// Bytes written here that the repository does not hold. WAL that it holds after a hole counts
    /// as held.
    #[must_use]
    pub fn waiting_bytes(&self) -> u64 {
        let beyond = self.stored.get(&self.branch).map(Coverage::bytes_beyond);
        let missing = self.written.bytes_since(self.remote());
        missing.saturating_sub(beyond.unwrap_or_default())
    }

    /// The repository was found to lack a range that it held.
    pub fn on_lacking(&mut self, branch: Branch, start: Lsn, end: Lsn) {
        if let Some(stored) = self.stored.get_mut(&branch) {
            stored.remove(start, end);
        }
        let from = self.lacking.entry(branch).or_insert(start);
        *from = start.min(*from);
    }

    /// The repository was read: what is known of each branch is replaced when the branch is taken
    /// up.
    pub fn on_repository_read(&mut self) {
        self.lacking.clear();
        self.outdated = self.stored.keys().copied().collect();
    }

    /// The end of what is durable here without a gap on the server's path of timelines. `None`
    /// when the branch being archived is not on it, so that nothing is known.
    ///
    /// Earlier branches of the path are complete: the next one is taken up only then.
    #[must_use]
    pub fn flushed_on(&self, path: &[PathPart]) -> Option<Lsn> {
        let part = path.iter().find(|part| part.branch == self.branch)?;
        Some(self.flushed().max(part.from).min(part.to))
    }

    /// The end of what the repository holds without a gap on the server's path of timelines.
    /// `None` when the branch being archived is not on it, so that nothing is known.
    #[must_use]
    pub fn remote_on(&self, path: &[PathPart]) -> Option<Lsn> {
        let at = path.iter().position(|part| part.branch == self.branch)?;
        let (part, before) = (path.get(at)?, path.get(..at)?);
        for part in before {
            let left = self.left.iter().find(|(left, _)| *left == part.branch);
            let stored = self.stored_on(part.branch);
            if let Some((_, left_at)) = left
                && stored < part.to.min(*left_at)
            {
                return Some(stored);
            }
        }
        // The path before this branch is stored, so the branch's own copy of that WAL is not
        // needed.
        Some(self.stored_on(self.branch).max(part.from).min(part.to))
    }

    /// Bytes that are durable here and not in the repository, of every branch.
    #[must_use]
    pub fn queued_bytes(&self) -> u64 {
        let present = [(self.branch, self.flushed())];
        let all = self.left.iter().chain(&present);
        all.map(|(branch, end)| end.bytes_since(self.stored_on(*branch)))
            .sum()
    }

    /// The part of [`Positions::queued_bytes`] that is not on the server's path of timelines.
    #[must_use]
    pub fn orphaned_bytes(&self, path: &[PathPart]) -> u64 {
        let present = [(self.branch, self.flushed())];
        let all = self.left.iter().chain(&present);
        all.map(|(branch, end)| {
            let part = path.iter().find(|part| part.branch == *branch);
            let left_at = part.map_or(Lsn::ZERO, |part| part.to);
            end.bytes_since(self.stored_on(*branch).max(left_at))
        })
        .sum()
    }

    /// Records the ranges that are stored from now on: the repository's answer may not show them.
    pub fn note_stored(&mut self) {
        self.stored_since = Some(Vec::new());
    }

    /// Takes up a branch that is durable here up to `durable` and stored in the repository as
    /// `stored` says, together with what was stored since [`Positions::note_stored`].
    pub fn take_up(&mut self, branch: Branch, durable: Lsn, stored: Coverage) {
        if branch != self.branch {
            let flushed = self.flushed();
            if flushed > Lsn::ZERO {
                self.left.push((self.branch, flushed));
            }
            self.left.retain(|(left, _)| *left != branch);
            self.reported = Lsn::ZERO;
        }
        let known = self.stored.entry(branch).or_default();
        // Stored WAL never exceeds what we hold, except for a branch we held nothing of, which
        // restarts at an earlier LSN.
        let is_outdated = self.outdated.remove(&branch);
        if is_outdated || stored.end() > known.end() || known.end() > durable {
            *known = stored;
        }
        for (on, start, end) in self.stored_since.take().into_iter().flatten() {
            if on == branch {
                known.add(start, end);
            }
        }
        self.branch = branch;
        self.received = durable;
        self.written = durable;
        self.finished = durable;
        self.open = (Lsn::ZERO, durable);
        self.verify_to = Lsn::MAX;
    }

    /// Returns true if the repository holds the end of what is durable here, of every branch, after
    /// a hole in the branch being archived.
    #[must_use]
    pub fn is_stored_after_a_hole(&self) -> bool {
        let is_stored = |(branch, end): &(Branch, Lsn)| self.stored_on(*branch) >= *end;
        let stored = self.stored.get(&self.branch);
        self.left.iter().all(is_stored)
            && stored.is_some_and(|stored| stored.last_end() >= self.flushed())
    }

    /// Replaces what the repository is known to hold of a branch by `stored`, which begins at a
    /// newer base backup: nothing before it is needed any more. The ranges after a gap stay,
    /// because the repository's answer may not show the last of them.
    pub fn begin_at_backup(&mut self, branch: Branch, mut stored: Coverage) {
        let known = self.stored.entry(branch).or_default();
        if stored.end() <= known.end() {
            return;
        }
        for (start, end) in &known.beyond {
            stored.add(*start, *end);
        }
        *known = stored;
    }

    /// Forgets an abandoned branch.
    #[cfg(test)]
    pub(super) fn forget_left(&mut self, next: Branch) {
        self.branch = next;
        self.left.clear();
        self.reported = Lsn::ZERO;
    }

    /// A stream begins at `start`. WAL that it sends up to the end of the written WAL is compared
    /// before anything is reported.
    pub fn begin_stream(&mut self, start: Lsn) {
        self.streamed = start;
        self.verify_to = self.written;
        self.reported = Lsn::ZERO;
    }

    /// The stream has ended, so nothing is reported.
    pub fn end_stream(&mut self) {
        self.streamed = Lsn::ZERO;
        self.verify_to = Lsn::MAX;
    }

    /// The stream was compared and written up to `streamed`. The files end at `written`.
    pub fn on_written(&mut self, streamed: Lsn, written: Lsn) {
        self.streamed = streamed;
        self.written = self.written.max(written);
        self.received = self.received.max(self.written);
    }

    /// The open segment, which starts at `start`, was fsynced up to `end`.
    pub fn on_synced(&mut self, start: Lsn, end: Lsn) {
        if start > self.open.0 {
            self.open = (start, end);
        } else if start == self.open.0 {
            self.open.1 = self.open.1.max(end);
        }
    }

    /// Segments are durable under their final names up to `end`. Called in LSN order.
    pub fn on_finished(&mut self, end: Lsn) {
        self.finished = self.finished.max(end);
    }

    /// The repository holds a range of a branch.
    pub fn on_stored(&mut self, branch: Branch, start: Lsn, end: Lsn) {
        self.stored
            .entry(branch)
            .or_insert_with(|| Coverage::up_to(start))
            .add(start, end);
        if let Some(since) = &mut self.stored_since {
            // Consecutive ranges are merged, so the list does not grow if the branch is never taken
            // up.
            match since.last_mut() {
                Some(last) if last.0 == branch && (last.1..=last.2).contains(&start) => {
                    last.2 = last.2.max(end);
                }
                _ => since.push((branch, start, end)),
            }
        }
        let stored = &self.stored;
        self.left
            .retain(|(left, end)| stored.get(left).map_or(Lsn::ZERO, Coverage::end) < *end);
    }

    /// Returns the positions that may be reported now.
    pub fn report(&mut self) -> Report {
        if self.streamed < self.verify_to {
            return Report::default();
        }
        let proved = match self.acknowledge {
            Acknowledge::Local => self.flushed(),
            Acknowledge::Remote => self.remote().min(self.flushed()),
        };
        self.reported = self.reported.max(proved);
        Report {
            write: self.written,
            flush: self.reported,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn branch(text: &str) -> Branch {
        text.parse().expect("a branch")
    }

    #[test]
    fn a_backup_after_a_hole_ends_the_wait_for_the_wal_before_it() {
        let mut positions = Positions::new(Acknowledge::Remote);
        let branch = Branch::FIRST;
        positions.take_up(branch, Lsn(100), Coverage::up_to(Lsn(20)));
        positions.begin_stream(Lsn(100));
        positions.on_stored(branch, Lsn(30), Lsn(100));
        assert_eq!(
            (positions.remote(), positions.is_stored_after_a_hole()),
            (Lsn(20), true)
        );
        // The repository's answer does not show this segment yet.
        positions.on_synced(Lsn(100), Lsn(120));
        positions.on_finished(Lsn(120));
        positions.on_stored(branch, Lsn(100), Lsn(120));
        // The answer begins with a segment that still waits in the spool. It counts only when it is
        // stored.
        positions.begin_at_backup(branch, Coverage::up_to(Lsn(25)));
        assert_eq!(positions.remote(), Lsn(25));
        let mut stored = Coverage::up_to(Lsn(40));
        stored.add(Lsn(40), Lsn(90));
        positions.begin_at_backup(branch, stored.clone());
        assert_eq!(positions.remote(), Lsn(120));
        positions.begin_at_backup(branch, stored);
        assert_eq!(positions.remote(), Lsn(120), "nothing is taken back");
    }

    #[test]
    fn coverage_grows_only_without_gaps() {
        let mut coverage = Coverage::up_to(Lsn(10));
        coverage.add(Lsn(30), Lsn(40));
        coverage.add(Lsn(20), Lsn(25));
        assert_eq!(coverage.end(), Lsn(10));
        coverage.add(Lsn(10), Lsn(20));
        assert_eq!(coverage.end(), Lsn(25));
        coverage.add(Lsn(22), Lsn(30));
        assert_eq!(coverage.end(), Lsn(40));
        coverage.add(Lsn(0), Lsn(5));
        assert_eq!(coverage.end(), Lsn(40));
    }

    #[test]
    fn an_open_segment_counts_only_when_the_ones_before_are_finished() {
        let mut positions = Positions::new(Acknowledge::Local);
        positions.take_up(Branch::FIRST, Lsn(100), Coverage::default());
        positions.begin_stream(Lsn(100));
        positions.on_written(Lsn(250), Lsn(250));
        positions.on_synced(Lsn(200), Lsn(250));
        assert_eq!(positions.report().flush, Lsn(100));
        positions.on_finished(Lsn(200));
        assert_eq!(
            positions.report(),
            Report {
                write: Lsn(250),
                flush: Lsn(250)
            }
        );
    }

    #[test]
    fn nothing_is_said_before_the_overlap_was_compared() {
        let mut positions = Positions::new(Acknowledge::Local);
        positions.take_up(Branch::FIRST, Lsn(150), Coverage::default());
        assert_eq!(positions.report(), Report::default());
        positions.begin_stream(Lsn(100));
        positions.on_written(Lsn(149), Lsn(150));
        assert_eq!(positions.report(), Report::default());
        positions.on_written(Lsn(150), Lsn(150));
        assert_eq!(positions.report().flush, Lsn(150));
        positions.begin_stream(Lsn(100));
        assert_eq!(positions.report(), Report::default());
        positions.on_written(Lsn(150), Lsn(150));
        assert_eq!(positions.report().flush, Lsn(150));
        positions.end_stream();
        assert_eq!(positions.report(), Report::default());
    }

    #[test]
    fn remote_reports_what_the_repository_holds_and_never_goes_back() {
        let mut positions = Positions::new(Acknowledge::Remote);
        positions.take_up(Branch::FIRST, Lsn(100), Coverage::up_to(Lsn(100)));
        positions.begin_stream(Lsn(100));
        positions.on_written(Lsn(300), Lsn(300));
        positions.on_synced(Lsn(100), Lsn(300));
        assert_eq!(positions.report().flush, Lsn(100));
        positions.on_stored(Branch::FIRST, Lsn(200), Lsn(300));
        assert_eq!(positions.report().flush, Lsn(100));
        positions.on_stored(Branch::FIRST, Lsn(100), Lsn(200));
        assert_eq!(positions.report().flush, Lsn(300));
    }

    #[test]
    fn nothing_after_missing_wal_counts_until_it_is_stored_again() {
        let mut positions = Positions::new(Acknowledge::Remote);
        let branch = Branch::FIRST;
        positions.take_up(branch, Lsn(100), Coverage::up_to(Lsn(100)));
        positions.begin_stream(Lsn(100));
        positions.on_written(Lsn(500), Lsn(500));
        positions.on_synced(Lsn(100), Lsn(500));
        positions.on_stored(branch, Lsn(100), Lsn(300));
        assert_eq!(positions.report().flush, Lsn(300));
        positions.on_lacking(branch, Lsn(150), Lsn(200));
        positions.on_stored(branch, Lsn(300), Lsn(400));
        // The place may lack more than was found.
        positions.on_stored(branch, Lsn(150), Lsn(200));
        assert_eq!(
            (positions.remote(), positions.report().flush),
            (Lsn(150), Lsn(300))
        );

        let mut read = Coverage::up_to(Lsn(120));
        read.add(Lsn(200), Lsn(400));
        positions.on_repository_read();
        positions.note_stored();
        positions.take_up(branch, Lsn(500), read);
        assert_eq!(
            (positions.remote(), positions.waiting_bytes()),
            (Lsn(120), 180)
        );
        positions.begin_stream(Lsn(500));
        positions.on_stored(branch, Lsn(400), Lsn(500));
        assert_eq!(positions.report().flush, Lsn(120));
        positions.on_stored(branch, Lsn(120), Lsn(200));
        assert_eq!(positions.report().flush, Lsn(500));
    }

    #[test]
    fn what_is_stored_while_a_branch_is_taken_up_counts() {
        let mut positions = Positions::new(Acknowledge::Local);
        positions.take_up(Branch::FIRST, Lsn(500), Coverage::up_to(Lsn(100)));
        positions.note_stored();
        let asked = Coverage::up_to(Lsn(100));
        for start in [200, 100, 300] {
            positions.on_stored(Branch::FIRST, Lsn(start), Lsn(start + 100));
        }
        // A torn end was cut, so the spool holds less than the repository.
        positions.take_up(Branch::FIRST, Lsn(350), asked);
        assert_eq!(positions.remote(), Lsn(400));
    }

    #[test]
    fn a_branch_that_was_left_holds_the_report_back_until_it_is_stored() {
        let second = branch("00000002-01020304");
        let mut positions = Positions::new(Acknowledge::Remote);
        positions.take_up(Branch::FIRST, Lsn(100), Coverage::up_to(Lsn(100)));
        positions.begin_stream(Lsn(100));
        positions.on_written(Lsn(150), Lsn(150));
        positions.on_synced(Lsn(100), Lsn(150));
        positions.take_up(second, Lsn(100), Coverage::up_to(Lsn(100)));
        positions.begin_stream(Lsn(100));
        positions.on_written(Lsn(200), Lsn(200));
        positions.on_synced(Lsn(100), Lsn(200));
        positions.on_stored(second, Lsn(100), Lsn(200));
        assert_eq!(positions.report().flush, Lsn(100));
        positions.on_stored(Branch::FIRST, Lsn(100), Lsn(150));
        assert_eq!(positions.report().flush, Lsn(200));
    }
}
