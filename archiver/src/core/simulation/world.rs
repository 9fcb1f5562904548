//! The world around the core: a server, a disk and a store, with all their faults.
//!
//! WAL consists of positions and the origin of each byte. A promotion or a restored snapshot gives
//! other bytes at the same position.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use wal_format::{Branch, Lsn, SegmentNo, SegmentSize, TimelineId};

use crate::core::{
    positions::{Coverage, coverage_begin},
    sealing::Place,
    start::{ServerBranch, ServerState},
};

/// `SplitMix64`: the same seed gives the same world.
pub(super) struct Rng(pub(super) u64);

impl Rng {
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % limit.max(1)
    }

    pub(super) fn one_in(&mut self, limit: u64) -> bool {
        self.below(limit) == 0
    }
}

/// Bytes up to this LSN have this origin. They begin where the previous run ends.
pub(super) type Run = (Lsn, u64);

/// Returns the origins of a range.
pub(super) fn origins(runs: &[Run], from: Lsn, to: Lsn) -> Vec<Run> {
    let mut found = Vec::new();
    let mut start = Lsn::ZERO;
    for &(end, origin) in runs {
        if start < to && end > from {
            found.push((end.min(to), origin));
        }
        start = end;
    }
    found
}

#[derive(Clone)]
pub(super) struct Server {
    pub(super) path: Vec<ServerBranch>,
    pub(super) runs: Vec<Run>,
    pub(super) oldest: Lsn,
    pub(super) slot: Option<Lsn>,
    origin: u64,
}

impl Server {
    pub(super) fn new(start: Lsn) -> Self {
        Self {
            path: vec![ServerBranch {
                branch: Branch::FIRST,
                history: None,
                switch_lsn: Lsn::MAX,
            }],
            runs: vec![(start, 0)],
            oldest: start.align_down(1 << 20),
            slot: None,
            origin: 1,
        }
    }

    pub(super) fn flush_lsn(&self) -> Lsn {
        self.runs.last().map_or(Lsn::ZERO, |run| run.0)
    }

    pub(super) fn branch(&self) -> Branch {
        self.path.last().expect("a path").branch
    }

    pub(super) fn state(&self) -> ServerState {
        ServerState {
            path: self.path.clone(),
            flush_lsn: self.flush_lsn(),
            slot_restart_lsn: self.slot,
        }
    }

    pub(super) fn write(&mut self, bytes: u64) {
        let end = self.flush_lsn().add(bytes);
        match self.runs.last_mut() {
            Some(last) if last.1 == self.origin => last.0 = end,
            _ => self.runs.push((end, self.origin)),
        }
    }

    /// Truncates the server's WAL here. Bytes that it writes from now on have another origin.
    pub(super) fn cut(&mut self, at: Lsn, origin: u64) {
        self.runs = origins(&self.runs, Lsn::ZERO, at);
        self.origin = origin;
    }

    /// Promotes a standby that had received WAL up to `at`.
    pub(super) fn promote(&mut self, at: Lsn, skip: u32, origin: u64) {
        self.cut(at, origin);
        let timeline = self.branch().timeline.get() + 1 + skip;
        let content = Bytes::from(format!("{timeline} {at} {origin}"));
        let timeline = TimelineId::new(timeline).expect("not 0");
        self.path.last_mut().expect("a path").switch_lsn = at;
        self.path.push(ServerBranch {
            branch: Branch::of_history(timeline, &content),
            history: Some(content),
            switch_lsn: Lsn::MAX,
        });
        self.slot = None;
    }

    /// Returns the LSN where it left a branch, and the next branch.
    pub(super) fn after(&self, branch: Branch) -> Option<(Lsn, Branch)> {
        let index = self.path.iter().position(|on| on.branch == branch)?;
        let next = self.path.get(index + 1)?;
        Some((self.path[index].switch_lsn, next.branch))
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct File {
    pub(super) written: Lsn,
    pub(super) durable: Lsn,
    pub(super) is_complete: bool,
}

/// The files of the spool.
#[derive(Default)]
pub(super) struct Disk {
    pub(super) files: BTreeMap<Place, File>,
    pub(super) is_full: bool,
}

impl Disk {
    pub(super) fn append(&mut self, place: Place, start: Lsn, bytes: u64) {
        let file = self.files.entry(place).or_insert(File {
            written: start,
            durable: start,
            is_complete: false,
        });
        assert!(!file.is_complete, "a complete segment is written to");
        file.written = file.written.add(bytes);
    }

    /// Bytes that were written and not fsynced survive only in part.
    pub(super) fn lose_power(&mut self, rng: &mut Rng) {
        for file in self.files.values_mut() {
            let unsynced = file.written.bytes_since(file.durable);
            file.written = file.durable.add(rng.below(unsynced + 1) / 8192 * 8192);
        }
    }

    pub(super) fn branches(&self) -> BTreeSet<Branch> {
        self.files.keys().map(|place| place.0).collect()
    }

    /// As `BranchSpool::segments`: complete ones, the open one with its end, and later ones.
    pub(super) fn segments(
        &self,
        branch: Branch,
    ) -> (Vec<SegmentNo>, Option<(SegmentNo, Lsn)>, Vec<SegmentNo>) {
        let of_branch = |place: &Place| place.0 == branch;
        let mut complete = Vec::new();
        let mut open = None;
        let mut behind = Vec::new();
        for (place, file) in self.files.iter().filter(|(place, _)| of_branch(place)) {
            match open {
                _ if file.is_complete => complete.push(place.1),
                None => open = Some((place.1, file.written)),
                Some(_) => behind.push(place.1),
            }
        }
        (complete, open, behind)
    }

    /// As `BranchSpool::end_lsn`.
    pub(super) fn end_lsn(&self, branch: Branch, size: SegmentSize) -> Option<Lsn> {
        let (complete, open, _) = self.segments(branch);
        let complete = complete.last().map(|last| last.end_lsn(size));
        complete.max(open.map(|open| open.1))
    }
}

/// The repository.
#[derive(Default)]
pub(super) struct Store {
    pub(super) sealed: BTreeSet<Place>,
    pub(super) tails: BTreeMap<Branch, BTreeMap<Lsn, Lsn>>,
    pub(super) gaps: Vec<(Branch, Lsn, Lsn)>,
}

impl Store {
    fn ranges(&self, branch: Branch, size: SegmentSize) -> Vec<(Lsn, Lsn)> {
        let of_branch = |place: &&Place| place.0 == branch;
        let sealed = self.sealed.iter().filter(of_branch);
        let mut ranges: Vec<(Lsn, Lsn)> = sealed
            .map(|place| (place.1.start_lsn(size), place.1.end_lsn(size)))
            .collect();
        ranges.extend(
            self.tails
                .get(&branch)
                .into_iter()
                .flatten()
                .map(|(start, end)| (*start, *end)),
        );
        ranges.sort_unstable();
        ranges
    }

    /// As `Archive::stored`.
    pub(super) fn stored(
        &self,
        branch: Branch,
        disk: &Disk,
        path: &[ServerBranch],
        size: SegmentSize,
    ) -> Option<Coverage> {
        let begin = self.begin(branch, disk, path, size)?;
        let mut coverage = Coverage::up_to(begin);
        for range in self.ranges(branch, size) {
            coverage.add(range.0, range.1);
        }
        for gap in self.gaps.iter().filter(|gap| gap.0 == branch) {
            coverage.add(gap.1, gap.2);
        }
        Some(coverage)
    }

    /// Returns the start of the archive of a branch.
    pub(super) fn begin(
        &self,
        branch: Branch,
        disk: &Disk,
        path: &[ServerBranch],
        size: SegmentSize,
    ) -> Option<Lsn> {
        let gaps = self.gaps.iter().filter(|gap| gap.0 == branch);
        let gaps: Vec<(Lsn, Lsn)> = gaps.map(|gap| (gap.1, gap.2)).collect();
        let spooled = disk.files.keys().find(|place| place.0 == branch);
        let spooled = spooled.map(|place| place.1.start_lsn(size));
        let index = path.iter().position(|on| on.branch == branch).unwrap_or(0);
        let before = path.get(..index).unwrap_or_default();
        let is_held = |on: &ServerBranch| {
            self.branches().contains(&on.branch)
                || disk.files.keys().any(|place| place.0 == on.branch)
        };
        let forked = before.last().filter(|_| before.iter().any(is_held));
        let forked = forked.map(|on| on.switch_lsn.align_down(size.bytes()));
        let stored = self.ranges(branch, size).first().map(|range| range.0);
        coverage_begin(stored, spooled, forked, &gaps)
    }

    pub(super) fn branches(&self) -> BTreeSet<Branch> {
        let sealed = self.sealed.iter().map(|place| place.0);
        let gaps = self.gaps.iter().map(|gap| gap.0);
        let tails = self.tails.iter().filter(|(_, tails)| !tails.is_empty());
        sealed
            .chain(gaps)
            .chain(tails.map(|(branch, _)| *branch))
            .collect()
    }

    /// Returns the end of the tails that cover a segment from its start.
    pub(super) fn tails_of(&self, place: Place, size: SegmentSize) -> Lsn {
        let mut at = place.1.start_lsn(size);
        for (start, end) in self.tails.get(&place.0).into_iter().flatten() {
            if *start <= at && *end > at && *end <= place.1.end_lsn(size) {
                at = *end;
            }
        }
        at
    }

    pub(super) fn remove_tails(&mut self, place: Place, size: SegmentSize) {
        let (start, end) = (place.1.start_lsn(size), place.1.end_lsn(size));
        if let Some(tails) = self.tails.get_mut(&place.0) {
            tails.retain(|from, _| *from < start || *from >= end);
        }
    }
}

/// Returns how far WAL of a branch is safe from `at` on without a hole: stored, declared lost, or
/// (if `disk` counts) here in a state that survives a power loss.
pub(super) fn safe_end(
    disk: Option<&Disk>,
    store: &Store,
    branch: Branch,
    mut at: Lsn,
    size: SegmentSize,
) -> Lsn {
    let mut disk = disk;
    loop {
        let segment = size.segment_of(at);
        let mut end = at;
        if store.sealed.contains(&(branch, segment)) {
            end = segment.end_lsn(size);
        }
        let tails = store.tails.get(&branch).into_iter();
        let tails = tails.flat_map(|tails| tails.range(..=at));
        end = end.max(tails.map(|tail| *tail.1).max().unwrap_or(at));
        for gap in &store.gaps {
            if gap.0 == branch && gap.1 <= at {
                end = end.max(gap.2);
            }
        }
        if let Some(file) = disk.and_then(|disk| disk.files.get(&(branch, segment)))
            && file.durable > end
        {
            end = file.durable;
            if !file.is_complete {
                // A start streams everything after the first file without its final name again.
                disk = None;
            }
        }
        if end <= at {
            return at;
        }
        at = end;
    }
}
