//! The RPO of both tiers, on the positions of the real core.

use std::time::Duration;

use proptest::prelude::*;
use repository::{PathPart, config::Acknowledge};
use status::rpo::tiers::{Seen, Tiers};
use wal_format::{Branch, Lsn, TimelineId};

use crate::core::positions::{Coverage, Positions};

/// The segment size in the model, in bytes of WAL.
const SEGMENT: u64 = 16;

fn at(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

fn branch(number: u32) -> Branch {
    let timeline = TimelineId::new(number).expect("a timeline");
    let mut branch = Branch::without_history(timeline);
    if number > 1 {
        branch.digest = [1; 4];
    }
    branch
}

/// Returns a server's path: timeline 1 up to the first fork, and so on.
fn path(forks: &[u64]) -> Vec<PathPart> {
    let mut from = Lsn::ZERO;
    let ends = forks.iter().copied().chain([u64::MAX]);
    (1..)
        .zip(ends)
        .map(|(number, to)| {
            let part = PathPart {
                branch: branch(number),
                from,
                to: Lsn(to),
            };
            from = Lsn(to);
            part
        })
        .collect()
}

fn polled(number: u32, lsn: u64) -> Seen {
    Seen::Polled {
        timeline: TimelineId::new(number),
        flush_lsn: Lsn(lsn),
    }
}

#[test]
fn a_lagging_standby_that_is_promoted_starts_the_comparison_again() {
    let mut positions = Positions::new(Acknowledge::Local);
    let mut tiers = Tiers::default();
    positions.take_up(branch(1), Lsn(0), Coverage::up_to(Lsn(0)));
    tiers.follow(&path(&[]));
    tiers.see(at(0), polled(1, 900));
    positions.on_written(Lsn(900), Lsn(900));
    positions.on_synced(Lsn(0), Lsn(900));
    positions.on_stored(branch(1), Lsn(0), Lsn(900));
    let (_, remote) = tiers.exposure(at(0), &positions.durable(tiers.path()));
    assert_eq!((remote.rpo, remote.lag_bytes), (Some(at(0)), Some(0)));
    // The standby had 500 of 900, and writes 100 while the repository takes nothing.
    tiers.follow(&path(&[500]));
    positions.take_up(branch(2), Lsn(496), Coverage::up_to(Lsn(496)));
    tiers.see(at(1000), polled(2, 600));
    positions.on_written(Lsn(600), Lsn(600));
    positions.on_synced(Lsn(496), Lsn(600));
    let (local, remote) = tiers.exposure(at(3000), &positions.durable(tiers.path()));
    assert_eq!((local.rpo, local.lag_bytes), (Some(at(0)), Some(0)));
    assert_eq!((remote.rpo, remote.lag_bytes), (Some(at(2000)), Some(104)));
    positions.on_stored(branch(2), Lsn(496), Lsn(600));
    let (_, remote) = tiers.exposure(at(3000), &positions.durable(tiers.path()));
    assert_eq!((remote.rpo, remote.lag_bytes), (Some(at(0)), Some(0)));
}

#[test]
fn a_timeline_whose_history_is_not_known_is_held_nowhere() {
    let mut positions = Positions::new(Acknowledge::Local);
    let mut tiers = Tiers::default();
    positions.take_up(branch(1), Lsn(900), Coverage::up_to(Lsn(900)));
    tiers.follow(&path(&[]));
    tiers.see(at(0), polled(1, 900));
    tiers.see(at(1000), polled(2, 600));
    let (local, remote) = tiers.exposure(at(2000), &positions.durable(tiers.path()));
    for tier in [local, remote] {
        assert_eq!((tier.rpo, tier.lag_bytes), (Some(at(1000)), None));
    }
    assert_eq!(tiers.source_lsn(), Some(Lsn(600)));
    // An answer from a server on an older timeline proves nothing.
    tiers.follow(&path(&[500]));
    tiers.see(at(9000), polled(1, 900));
    let (_, remote) = tiers.exposure(at(9000), &positions.durable(tiers.path()));
    assert!(!remote.source_known);
    assert_eq!(remote.rpo, Some(at(8000)));
}

#[test]
fn an_earlier_run_proves_up_to_when_everything_was_held() {
    let mut positions = Positions::new(Acknowledge::Local);
    let mut tiers = Tiers::default();
    tiers.were_caught_up(Some(at(10_000)), Some(at(4000)));
    let (local, remote) = tiers.exposure(at(35_000), &positions.durable(tiers.path()));
    assert_eq!(
        (local.rpo, remote.rpo),
        (Some(at(25_000)), Some(at(31_000)))
    );
    assert_eq!((remote.lag_bytes, remote.source_known), (None, false));
    positions.take_up(branch(1), Lsn(100), Coverage::up_to(Lsn(100)));
    tiers.follow(&path(&[]));
    tiers.see(at(35_000), polled(1, 300));
    let (local, remote) = tiers.exposure(at(36_000), &positions.durable(tiers.path()));
    assert_eq!(
        (local.rpo, remote.rpo),
        (Some(at(26_000)), Some(at(32_000)))
    );
    // Only the WAL found at that contact has this age. Later WAL has its own.
    tiers.see(at(36_000), polled(1, 400));
    positions.on_stored(branch(1), Lsn(100), Lsn(300));
    let (_, remote) = tiers.exposure(at(38_000), &positions.durable(tiers.path()));
    assert_eq!((remote.rpo, remote.lag_bytes), (Some(at(2000)), Some(100)));
}

/// Returns the number of the timeline at this position of the server's path.
fn timeline(place: usize) -> u32 {
    u32::try_from(place).expect("few") + 1
}

/// An event in the model.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// The server writes this many bytes.
    Write(u64),
    /// The archiver polls the flush LSN.
    Poll,
    /// The archiver receives WAL of the branch that it streams. At the branch's end it continues
    /// with the next one.
    Receive(u64),
    /// The repository stores a part of the waiting WAL, of the oldest timeline first.
    Store(u64),
    /// A standby is promoted that lacks this many bytes of the server's WAL.
    Promote(u64),
    /// This many milliseconds pass.
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1u64..60).prop_map(Step::Write),
        4 => Just(Step::Poll),
        5 => (1u64..90).prop_map(Step::Receive),
        3 => (1u64..120).prop_map(Step::Store),
        1 => (0u64..100).prop_map(Step::Promote),
        2 => (1u64..4000).prop_map(Step::Wait),
    ]
}

/// The true state of the model, kept separate from the tested code.
#[derive(Debug, Default)]
struct Model {
    now: u64,
    /// The LSNs at which the server left its timelines.
    forks: Vec<u64>,
    flush: u64,
    /// The observed flush LSNs: time, timeline, LSN.
    seen: Vec<(u64, usize, u64)>,
    /// For each timeline, the end of its WAL here and in the repository, and its start.
    local: Vec<u64>,
    stored: Vec<u64>,
    begin: Vec<u64>,
}

impl Model {
    /// Returns the LSN that can be restored from the repository along the server's path.
    fn leads_to(&self) -> u64 {
        let mut reached = 0;
        for (number, stored) in self.stored.iter().enumerate() {
            match self.forks.get(number) {
                Some(fork) if stored >= fork => reached = *fork,
                // The segment of the switch begins with a copy of the previous timeline's WAL.
                _ => return reached.max(*stored),
            }
        }
        reached
    }

    /// Returns the age of the oldest observed WAL of the server that cannot be restored.
    fn exposed(&self) -> u64 {
        let leads_to = self.leads_to();
        let on_path = |(_, number, lsn): &(u64, usize, u64)| {
            self.forks.get(*number).is_none_or(|fork| lsn <= fork)
                && self.forks.iter().skip(*number).all(|fork| lsn <= fork)
        };
        let lost = self.seen.iter().filter(|seen| on_path(seen));
        let lost = lost.filter(|(_, _, lsn)| *lsn > leads_to);
        let oldest = lost.map(|(when, ..)| *when).min();
        oldest.map_or(0, |when| self.now - when)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    /// Compares the estimator with what can be restored, over histories with promotions at, before
    /// and after the archiver's position.
    #[test]
    fn what_is_shown_is_never_less_than_what_is_lost(
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let mut model = Model {
            local: vec![0],
            stored: vec![0],
            begin: vec![0],
            ..Model::default()
        };
        let mut positions = Positions::new(Acknowledge::Local);
        let mut tiers = Tiers::default();
        positions.take_up(branch(1), Lsn(0), Coverage::up_to(Lsn(0)));
        tiers.follow(&path(&[]));
        for step in steps {
            model.now += 1;
            match step {
                Step::Wait(passed) => model.now += passed,
                Step::Write(bytes) => model.flush += bytes,
                Step::Poll => {
                    let number = model.forks.len();
                    tiers.see(at(model.now), polled(timeline(number), model.flush));
                    model.seen.push((model.now, number, model.flush));
                }
                Step::Promote(behind) => {
                    let least = model.forks.last().copied().unwrap_or(0);
                    model.flush = model.flush.saturating_sub(behind).max(least);
                    model.forks.push(model.flush);
                    // A promotion writes an end-of-recovery record at once.
                    model.flush += 1;
                }
                Step::Receive(bytes) => {
                    let number = model.local.len() - 1;
                    let fork = model.forks.get(number).copied();
                    let end = fork.unwrap_or(model.flush);
                    let held = model.local[number];
                    if held < end {
                        let reached = end.min(held + bytes);
                        model.local[number] = reached;
                        let open = Lsn(held / SEGMENT * SEGMENT);
                        let seen = Seen::Streamed { branch: positions.branch(), flush_lsn: Lsn(end) };
                        tiers.see(at(model.now), seen);
                        if fork.is_none() {
                            model.seen.push((model.now, number, end));
                        }
                        positions.on_written(Lsn(reached), Lsn(reached));
                        positions.on_finished(open);
                        positions.on_synced(open, Lsn(reached));
                    } else if let Some(fork) = fork {
                        // The path to its present end is known as soon as the stream begins.
                        tiers.follow(&path(&model.forks));
                        let begin = fork / SEGMENT * SEGMENT;
                        model.local.push(begin);
                        model.stored.push(begin);
                        model.begin.push(begin);
                        let next = branch(timeline(number + 1));
                        positions.take_up(next, Lsn(begin), Coverage::up_to(Lsn(begin)));
                    }
                }
                Step::Store(bytes) => {
                    let waits = |number: &usize| model.stored[*number] < model.local[*number];
                    let number = (0..model.local.len()).find(waits);
                    if let Some(number) = number {
                        let (from, end) = (model.stored[number], model.local[number]);
                        let to = end.min(from + bytes);
                        model.stored[number] = to;
                        positions.on_stored(branch(timeline(number)), Lsn(from), Lsn(to));
                    }
                }
            }
            let (_, remote) = tiers.exposure(at(model.now), &positions.durable(tiers.path()));
            let queued: u64 = model.local.iter().zip(&model.stored).map(|(held, stored)| held - stored).sum();
            prop_assert_eq!(positions.queued_bytes(), queued);
            let exposed = model.exposed();
            if let Some(rpo) = remote.rpo {
                prop_assert!(rpo >= at(exposed), "{:?} shown, {} exposed", rpo, exposed);
            } else {
                prop_assert!(model.seen.is_empty());
            }
            if remote.source_known && queued > 0 {
                prop_assert!(remote.lag_bytes != Some(0), "{} wait", queued);
            }
            if !remote.source_known {
                prop_assert_eq!(remote.lag_bytes, None);
            }
            let newest = model.seen.last();
            if let (Some((_, number, lsn)), Some(lag)) = (newest, remote.lag_bytes)
                && *number == model.forks.len()
            {
                prop_assert!(lag >= lsn.saturating_sub(model.leads_to()), "{} shown", lag);
            }
        }
    }
}
