//! Runs the core in a simulated world: thousands of histories, each from one seed, checked after
//! every step.
//!
//! First faults occur in any order: WAL, crashes, power loss, failing and full disks, a store that
//! fails, loses answers or is slow, promotions before and after our position, lost slots, a primary
//! restored from a snapshot. Then the faults stop, and everything has to be in the store within a
//! bounded number of steps. `TIDEMARK_SEED=N` replays one history and prints its steps. The core is
//! the real one. Its driver here does what `pipeline/write.rs`, `seal.rs`, `tail.rs` and
//! `session.rs` do.

mod archiver;
mod session;
mod world;

use std::{collections::BTreeMap, env};

use repository::config::Acknowledge;
use wal_format::{Branch, Lsn, SegmentSize};

use self::{
    archiver::{Archiver, Begins},
    world::{Disk, Rng, Run, Server, Store, safe_end},
};
use super::action::Mutation;

const CHAOS_STEPS: u64 = 250;
/// Every step makes progress, so this is far more than any history needs.
const CALM_STEPS_MAX: u64 = 40_000;
const PAGE: u64 = 8192;

/// The violated condition, as text.
type Broken = String;

struct Simulation {
    rng: Rng,
    size: SegmentSize,
    server: Server,
    /// The real server, while a copy of its past is in its place.
    right: Option<Server>,
    /// The bytes that the first server of a branch wrote on it.
    truth: BTreeMap<Branch, Vec<Run>>,
    disk: Disk,
    store: Store,
    archiver: Option<Archiver>,
    /// The range acknowledged to the server's clients, per branch: from the first byte that we had
    /// to keep.
    acknowledged: BTreeMap<Branch, (Lsn, Lsn)>,
    /// The start of the archive of each branch.
    begins: Begins,
    acknowledge: Acknowledge,
    mutation: Option<Mutation>,
    is_calm: bool,
    steps: u64,
    is_traced: bool,
}

impl Simulation {
    fn new(seed: u64, mutation: Option<Mutation>) -> Self {
        let mut rng = Rng(seed);
        let acknowledge = if rng.one_in(2) {
            Acknowledge::Remote
        } else {
            Acknowledge::Local
        };
        let start = Lsn((3 << 20) + rng.below(100) * PAGE);
        let server = Server::new(start);
        Self {
            rng,
            size: SegmentSize::new(1 << 20).expect("1 MiB"),
            truth: BTreeMap::from([(Branch::FIRST, server.runs.clone())]),
            server,
            right: None,
            disk: Disk::default(),
            store: Store::default(),
            archiver: None,
            acknowledged: BTreeMap::new(),
            begins: Begins::new(),
            acknowledge,
            mutation,
            is_calm: false,
            steps: 0,
            is_traced: false,
        }
    }

    fn run(mut self) -> Result<(), Broken> {
        let chaos = CHAOS_STEPS / 2 + self.rng.below(CHAOS_STEPS);
        for _ in 0..chaos {
            self.step()?;
        }
        self.is_calm = true;
        self.disk.is_full = false;
        if let Some(right) = self.right.take() {
            self.server = right;
            self.disconnect();
        }
        for _ in 0..CALM_STEPS_MAX {
            if self.is_done() {
                return self.check_whole();
            }
            self.step()?;
        }
        Err(format!(
            "the lag does not reach 0: the server is at {}, {}",
            self.server.flush_lsn(),
            self.archiver
                .as_ref()
                .map_or_else(|| "no archiver runs".to_owned(), Archiver::describe)
        ))
    }

    fn step(&mut self) -> Result<(), Broken> {
        self.steps += 1;
        if self.archiver.is_none() {
            self.start()?;
        } else if !self.is_calm && self.rng.one_in(12) {
            self.misfortune();
        } else {
            if !self.is_calm && self.rng.one_in(4) {
                let bytes = match self.rng.below(20) {
                    0 => 6 << 20,
                    1..4 => (1 + self.rng.below(96)) * PAGE,
                    _ => (1 + self.rng.below(8)) * PAGE,
                };
                self.server_writes(bytes);
            }
            self.work()?;
        }
        self.check()
    }

    fn server_writes(&mut self, bytes: u64) {
        self.server.write(bytes);
        if self.right.is_none() {
            self.truth
                .insert(self.server.branch(), self.server.runs.clone());
        }
    }

    /// Lets a fault occur.
    fn misfortune(&mut self) {
        match self.rng.below(12) {
            0 | 1 => self.crash(false),
            2 => self.crash(true),
            3 => self.disconnect(),
            4 => self.disk.is_full = !self.disk.is_full,
            5 if self.right.is_none() => {
                // A promotion of a standby that was more or less behind.
                let back = self.rng.below(200) * PAGE;
                let end = self.server.flush_lsn();
                let at = Lsn(end.0.saturating_sub(back)).max(self.server.oldest);
                let last_switch = self.server.path.iter().rev().nth(1);
                let at = at.max(last_switch.map_or(Lsn::ZERO, |on| on.switch_lsn));
                let skip = u32::from(self.rng.one_in(3));
                self.trace(&format!("promotion at {at} of {end}"));
                self.server.promote(at, skip, self.steps + 10);
                self.disconnect();
                self.server_writes(PAGE);
            }
            6 | 7 if self.right.is_none() => {
                // The slot is lost, and WAL with it.
                let end = self.server.flush_lsn();
                let keeps = self.rng.below(300) * PAGE;
                let oldest = Lsn(end.0.saturating_sub(keeps)).align_down(self.size.bytes());
                self.server.oldest = self.server.oldest.max(oldest);
                self.server.slot = None;
                self.trace(&format!("WAL before {} is gone", self.server.oldest));
                self.disconnect();
            }
            8 if self.right.is_none() => self.put_back_snapshot(),
            9 if self.right.is_some() => {
                self.trace("the right server is back");
                self.server = self.right.take().expect("it is aside");
                self.disconnect();
            }
            10 if self.acknowledge == Acknowledge::Remote => {
                self.trace("the host is lost");
                self.archiver = None;
                self.disk = Disk::default();
                // WAL that was not acknowledged may be missing from the start of the archive.
                let told = &self.acknowledged;
                self.begins.retain(|branch, _| told.contains_key(branch));
                for branch in self.store.branches() {
                    let path = &self.server.path;
                    if let Some(begin) = self.store.begin(branch, &self.disk, path, self.size) {
                        self.begins.entry(branch).or_insert(begin);
                    }
                }
            }
            _ => {}
        }
    }

    /// The primary is restored from a copy of its past and then diverges.
    fn put_back_snapshot(&mut self) {
        let branch = self.server.branch();
        // Only acknowledged WAL is certainly still available for comparison.
        let Some(held) = self.acknowledged.get(&branch).map(|told| told.1) else {
            return;
        };
        let from = self.truth_begin(branch);
        let back = (1 + self.rng.below(100)) * PAGE;
        let at = Lsn(held.0.saturating_sub(back));
        let is_lost = |gap: &(Branch, Lsn, Lsn)| gap.0 == branch && gap.2 >= at;
        if at <= from.max(self.server.oldest)
            || self.server.slot.is_none()
            || self.store.gaps.iter().any(is_lost)
        {
            return;
        }
        self.trace(&format!("a snapshot of {at} is put back; {held} is held"));
        let mut past = self.server.clone();
        past.cut(at, self.steps + 10);
        self.right = Some(std::mem::replace(&mut self.server, past));
        self.disconnect();
        let bytes = (1 + self.rng.below(150)) * PAGE;
        self.server_writes(bytes);
    }

    fn truth_begin(&self, branch: Branch) -> Lsn {
        let index = self.server.path.iter().position(|on| on.branch == branch);
        index
            .and_then(|index| self.server.path.get(index.checked_sub(1)?))
            .map_or(Lsn::ZERO, |before| before.switch_lsn)
    }

    fn held_end(&self, branch: Branch) -> Option<Lsn> {
        let stored = self
            .store
            .stored(branch, &self.disk, &self.server.path, self.size);
        let spooled = self.disk.end_lsn(branch, self.size);
        spooled.max(stored.map(|coverage| coverage.end()))
    }

    fn crash(&mut self, power: bool) {
        self.trace(if power { "power loss" } else { "kill -9" });
        self.archiver = None;
        if power {
            self.disk.lose_power(&mut self.rng);
        }
    }

    fn disconnect(&mut self) {
        if let Some(archiver) = &mut self.archiver {
            archiver.disconnect();
        }
    }

    fn trace(&self, what: &str) {
        if self.is_traced {
            eprintln!("{:>4} {what}", self.steps);
        }
    }

    /// Checks everything that must hold at any time.
    fn check(&self) -> Result<(), Broken> {
        let disk = (self.acknowledge == Acknowledge::Local).then_some(&self.disk);
        for (branch, (from, to)) in &self.acknowledged {
            let safe = safe_end(disk, &self.store, *branch, *from, self.size);
            if safe < *to {
                return Err(format!(
                    "{branch}: {to} was acknowledged, only {from} to {safe} is safe"
                ));
            }
            self.check_path(*branch, *to, disk)?;
        }
        let Some(archiver) = &self.archiver else {
            return Ok(());
        };
        let positions = archiver.core.positions();
        if positions.flushed() > positions.written() || positions.written() > positions.received() {
            return Err(format!("positions out of order: {positions:?}"));
        }
        Ok(())
    }

    /// Acknowledged WAL of a branch is useless without the preceding branches.
    fn check_path(&self, branch: Branch, to: Lsn, disk: Option<&Disk>) -> Result<(), Broken> {
        let server = self.right.as_ref().unwrap_or(&self.server);
        for on in server.path.iter().take_while(|on| on.branch != branch) {
            let Some(begin) = self.begins.get(&on.branch) else {
                continue;
            };
            // The next branch contains the segment of the switch too.
            let needed = on.switch_lsn.align_down(self.size.bytes()).min(to);
            let safe = safe_end(disk, &self.store, on.branch, *begin, self.size);
            if safe < needed {
                return Err(format!(
                    "{branch}: {to} was acknowledged, but {} is safe up to {safe} only",
                    on.branch
                ));
            }
        }
        Ok(())
    }

    fn is_done(&self) -> bool {
        let Some(archiver) = &self.archiver else {
            return false;
        };
        let end = self.server.flush_lsn();
        let positions = archiver.core.positions();
        let told = self.acknowledged.get(&self.server.branch());
        archiver.is_idle()
            && positions.branch() == self.server.branch()
            && positions.flushed() == end
            && positions.remote() == end
            && told.is_some_and(|told| told.1 == end)
    }

    /// At the end: the store has the whole path of the server since the archive began, or declares
    /// parts of it lost.
    fn check_whole(&self) -> Result<(), Broken> {
        for on in &self.server.path {
            let Some(begin) = self.begins.get(&on.branch) else {
                continue;
            };
            let is_last = on.switch_lsn == Lsn::MAX;
            let needed = if is_last {
                self.server.flush_lsn()
            } else {
                on.switch_lsn.align_down(self.size.bytes())
            };
            let safe = safe_end(None, &self.store, on.branch, *begin, self.size);
            if safe < needed {
                return Err(format!(
                    "{} is stored from {begin} to {safe}, not to {needed}: a gap that is on no record",
                    on.branch
                ));
            }
        }
        Ok(())
    }
}

fn seeds() -> std::ops::Range<u64> {
    if let Some(seed) = env::var("TIDEMARK_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
    {
        return seed..seed + 1;
    }
    if testbed::is_long() {
        0..200_000
    } else {
        0..2_000
    }
}

#[test]
fn nothing_acknowledged_is_lost_in_any_history() {
    let seeds = seeds();
    let is_traced = seeds.end - seeds.start == 1;
    for seed in seeds {
        let mut simulation = Simulation::new(seed, None);
        simulation.is_traced = is_traced;
        if let Err(broken) = simulation.run() {
            panic!("seed {seed}: {broken}\nreplay it with TIDEMARK_SEED={seed}");
        }
    }
}

/// Some seed of the short tier must detect each mistake.
#[test]
fn each_mutation_of_the_core_is_caught() {
    for mutation in [
        Mutation::AcknowledgeBeforeFsync,
        Mutation::ForgetLeftBranch,
        Mutation::ReportUnverified,
        Mutation::SayBeforeCompared,
        Mutation::SkipSegment,
        Mutation::TailBeyondHole,
    ] {
        let caught = (0..2_000).find_map(|seed| {
            let outcome = std::panic::catch_unwind(|| Simulation::new(seed, Some(mutation)).run());
            match outcome {
                Ok(Ok(())) => None,
                Ok(Err(broken)) => Some((seed, broken)),
                Err(_) => Some((seed, "an assertion".to_owned())),
            }
        });
        let (seed, broken) = caught.unwrap_or_else(|| panic!("{mutation:?} is not caught"));
        eprintln!("{mutation:?}: seed {seed}: {broken}");
    }
}
