//! Retention plans over generated archives: forks, gaps, damaged backups, clocks that disagree. The
//! restorable moments are counted here piece by piece by PostgreSQL's rule, not with the planner's
//! own arithmetic.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use proptest::prelude::*;
use wal_format::{BackupId, Branch, Lsn, PgTimestamp, SegmentSize, TimelineId};

use super::{holding::Dating, *};
use crate::{PathPart, WalRange, WalRangeKind};

/// Pieces in a segment of 1 MiB.
const PIECES: u64 = 4;
const PIECE: u64 = (1 << 20) / PIECES;
const HOUR: i64 = 3_600_000_000;
const YEARS: Duration = Duration::from_secs(86_400 * 10_000);

#[derive(Clone, Debug)]
struct Timeline {
    /// The parent timeline, and the piece at which this one begins.
    parent: Option<(usize, u64)>,
    end: u64,
    /// The time of its first piece, in hours.
    begun: i64,
}

#[derive(Clone, Debug)]
struct Made {
    timeline: usize,
    start: u64,
    stop: u64,
    finished: i64,
    whole: bool,
}

/// A generated archive.
#[derive(Clone, Debug)]
struct World {
    timelines: Vec<Timeline>,
    /// Stored pieces. A segment is stored completely or, if it is the last of a timeline, up to
    /// some piece.
    held: BTreeSet<(usize, u64)>,
    /// Pieces with a commit, and its time.
    commits: BTreeMap<(usize, u64), i64>,
    backups: Vec<Made>,
    window_start: i64,
    now: i64,
}

fn branch(index: usize) -> Branch {
    let number = u32::try_from(index + 1).expect("few");
    let timeline = TimelineId::new(number).expect("not 0");
    let digest = if index == 0 {
        [0; 4]
    } else {
        [u8::try_from(index).expect("few"); 4]
    };
    Branch { timeline, digest }
}

fn lsn(piece: u64) -> Lsn {
    Lsn(piece * PIECE)
}

fn id(index: usize) -> BackupId {
    format!("20260101T000000Z-{index:04x}")
        .parse()
        .expect("a name")
}

impl World {
    fn path(&self, index: usize) -> Vec<PathPart> {
        let mut path = match self.timelines[index].parent {
            None => Vec::new(),
            Some((parent, fork)) => {
                let mut path = self.path(parent);
                path.last_mut().expect("a part").to = lsn(fork);
                path
            }
        };
        let from = self.timelines[index]
            .parent
            .map_or(Lsn::ZERO, |(_, fork)| lsn(fork));
        path.push(PathPart {
            branch: branch(index),
            from,
            to: Lsn::MAX,
        });
        path
    }

    fn range(&self, index: usize, first: u64, behind: u64) -> WalRange {
        let times: Vec<_> = (first..behind)
            .filter_map(|piece| self.commits.get(&(index, piece)))
            .map(|time| PgTimestamp(time * HOUR))
            .collect();
        WalRange {
            branch: branch(index),
            segment: wal_format::SegmentNo(first / PIECES),
            start_lsn: lsn(first),
            end_lsn: lsn(behind),
            kind: if behind - first == PIECES {
                WalRangeKind::Sealed
            } else {
                WalRangeKind::Tail
            },
            stored_bytes: 1,
            record_count: 1,
            transaction_count: times.len() as u64,
            prepare_count: Some(0),
            tablespace_count: Some(0),
            minimal_count: Some(0),
            first_record_lsn: None,
            last_record_lsn: None,
            last_record_end_lsn: None,
            open_record_lsn: None,
            min_time: times.iter().min().copied(),
            max_time: times.iter().max().copied(),
            proven: None,
        }
    }

    fn holding(&self) -> Holding {
        let backups: Vec<HeldBackup> = self
            .backups
            .iter()
            .enumerate()
            .map(|(index, made)| HeldBackup {
                id: id(index),
                label: String::new(),
                branch: branch(made.timeline),
                start_lsn: lsn(made.start),
                stop_lsn: lsn(made.stop),
                finished: PgTimestamp(made.finished * HOUR),
                stored_bytes: 1,
                problem: (!made.whole).then(|| "a slice is missing".to_owned()),
            })
            .collect();
        let times = (
            PgTimestamp(self.window_start * HOUR),
            PgTimestamp(self.now * HOUR),
        );
        let branches = (0..self.timelines.len()).map(|index| {
            let mut dating = Dating::default();
            for segment in 0..=self.timelines[index].end / PIECES {
                let first = segment * PIECES;
                let behind = (first..first + PIECES)
                    .take_while(|piece| self.held.contains(&(index, *piece)))
                    .last();
                if let Some(last) = behind {
                    dating.add(&self.range(index, first, last + 1), times, &backups);
                }
            }
            dating.branch(branch(index), self.path(index), true)
        });
        let mut holding = Holding {
            segment_size: SegmentSize::new(1 << 20).expect("a size"),
            window_start: times.0,
            branches: branches.collect(),
            backups,
        };
        holding.prove_wal();
        holding
    }

    /// Returns true if recovery from `backup` along the path to `index` gets past `piece`. Walks
    /// piece by piece: each segment is read from the latest timeline that has begun by then.
    fn gets_to(
        &self,
        backup: &Made,
        index: usize,
        piece: u64,
        held: &BTreeSet<(usize, u64)>,
    ) -> bool {
        let mut path = vec![(
            index,
            self.timelines[index].parent.map_or(0, |(_, fork)| fork),
        )];
        let mut left = BTreeMap::new();
        let mut at = index;
        while let Some((parent, fork)) = self.timelines[at].parent {
            left.insert(parent, fork);
            path.push((
                parent,
                self.timelines[parent].parent.map_or(0, |(_, fork)| fork),
            ));
            at = parent;
        }
        let on = path.iter().any(|(on, _)| *on == backup.timeline);
        if !on
            || left
                .get(&backup.timeline)
                .is_some_and(|fork| backup.stop > *fork)
        {
            return false;
        }
        let first = backup.start / PIECES * PIECES;
        piece >= backup.stop.saturating_sub(1)
            && (first..=piece).all(|piece| {
                let segment = piece / PIECES;
                let reads = path.iter().find(|(_, begin)| begin / PIECES <= segment);
                reads.is_some_and(|(on, _)| held.contains(&(*on, piece)))
            })
    }

    /// Returns true if recovery from `backup` gets to its end, along whichever timeline.
    fn is_consistent(&self, backup: &Made, held: &BTreeSet<(usize, u64)>) -> bool {
        let mut timelines = 0..self.timelines.len();
        timelines.any(|index| self.gets_to(backup, index, backup.stop - 1, held))
    }

    /// Returns the restorable pieces of each timeline.
    fn restorable(&self, of: &[usize], held: &BTreeSet<(usize, u64)>) -> BTreeSet<(usize, u64)> {
        let mut all = BTreeSet::new();
        for (index, timeline) in self.timelines.iter().enumerate() {
            let begin = timeline.parent.map_or(0, |(_, fork)| fork);
            for piece in begin..timeline.end {
                let whole = of
                    .iter()
                    .map(|backup| &self.backups[*backup])
                    .filter(|one| one.whole);
                if whole.into_iter().any(|backup| {
                    let from = if backup.timeline == index {
                        backup.stop
                    } else {
                        0
                    };
                    piece >= from && self.gets_to(backup, index, piece, held)
                }) {
                    all.insert((index, piece));
                }
            }
        }
        all
    }
}

fn world() -> impl Strategy<Value = World> {
    let timelines = prop::collection::vec(
        (
            any::<prop::sample::Index>(),
            0..40_u64,
            4..48_u64,
            -30..90_i64,
        ),
        1..4,
    );
    let backups = prop::collection::vec(
        (
            any::<prop::sample::Index>(),
            0..48_u64,
            1..6_u64,
            -3..4_i64,
            prop::bool::weighted(0.9),
        ),
        1..8,
    );
    let holes = prop::collection::vec((any::<prop::sample::Index>(), 0..20_u64), 0..3);
    let commits = prop::collection::vec((any::<bool>(), -2..3_i64), 400);
    (timelines, backups, holes, commits, 0..130_i64, 0..5_i64).prop_map(
        |(raw, raw_backups, holes, chance, window, later)| {
            let mut timelines: Vec<Timeline> = Vec::new();
            for (at, fork, length, pause) in raw {
                let parent = (!timelines.is_empty()).then(|| {
                    let parent = at.index(timelines.len());
                    let known: &Timeline = &timelines[parent];
                    let begin = known.parent.map_or(0, |(_, fork)| fork);
                    (parent, (begin + 1 + fork).min(known.end))
                });
                let begin = parent.map_or(0, |(_, fork)| fork);
                let begun = parent.map_or(0, |(parent, fork)| {
                    let known: &Timeline = &timelines[parent];
                    let from = known.parent.map_or(0, |(_, fork)| fork);
                    known.begun + i64::try_from(fork - from).expect("few") + pause.max(0)
                });
                timelines.push(Timeline {
                    parent,
                    end: begin + length,
                    begun,
                });
            }
            let mut chance = chance.into_iter().cycle();
            let (mut held, mut commits) = (BTreeSet::new(), BTreeMap::new());
            let mut now = 0;
            for (index, timeline) in timelines.iter().enumerate() {
                let begin = timeline.parent.map_or(0, |(_, fork)| fork);
                for piece in begin / PIECES * PIECES..timeline.end {
                    held.insert((index, piece));
                    let (has_commit, jitter) = chance.next().expect("a cycle");
                    let time = timeline.begun + i64::try_from(piece).expect("few")
                        - i64::try_from(begin).expect("few");
                    now = now.max(time);
                    if has_commit && piece >= begin {
                        commits.insert((index, piece), time + jitter);
                    }
                }
            }
            for (at, segment) in holes {
                let index = at.index(timelines.len());
                for piece in segment * PIECES..(segment + 1) * PIECES {
                    held.remove(&(index, piece));
                    commits.remove(&(index, piece));
                }
            }
            let made = raw_backups
                .into_iter()
                .map(|(at, start, length, skew, whole)| {
                    let timeline = at.index(timelines.len());
                    let known = &timelines[timeline];
                    let begin = known.parent.map_or(0, |(_, fork)| fork);
                    let start = (begin + start).min(known.end - 1);
                    let stop = (start + length).min(known.end);
                    let age = i64::try_from(stop - begin).expect("few");
                    Made {
                        timeline,
                        start,
                        stop,
                        finished: known.begun + age + skew,
                        whole,
                    }
                });
            let backups: Vec<Made> = made.collect();
            let last = backups.iter().map(|one| one.finished).max().unwrap_or(0);
            let now = now.max(last) + later;
            World {
                timelines,
                held,
                commits,
                backups,
                window_start: now - window,
                now,
            }
        },
    )
}

fn policy() -> impl Strategy<Value = RetentionPolicy> {
    (
        0..3_u32,
        0..2_u32,
        0..2_u32,
        0..3_u32,
        prop::option::of(0..8_usize),
    )
        .prop_map(
            |(daily, weekly, monthly, backups_min, pinned)| RetentionPolicy {
                window: Duration::from_secs(1),
                daily,
                weekly,
                monthly,
                backups_min,
                pinned: pinned.map(id).into_iter().collect(),
            },
        )
}

fn number(backup: &HeldBackup) -> usize {
    let text = backup.id.as_str().rsplit('-').next().expect("digits");
    usize::from_str_radix(text, 16).expect("a number")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn what_stays_is_enough(mut world in world(), policy in policy()) {
        let holding = world.holding();
        // A backup that lacks WAL is not intact either.
        let mut intact = Vec::new();
        for (index, (made, known)) in world.backups.iter().zip(&holding.backups).enumerate() {
            let consistent = made.whole && world.is_consistent(made, &world.held);
            prop_assert_eq!(known.problem.is_none(), consistent, "backup {}", index);
            intact.push(consistent);
        }
        for (made, consistent) in world.backups.iter_mut().zip(intact) {
            made.whole = consistent;
        }
        let all: Vec<usize> = (0..world.backups.len()).collect();
        let newest = holding.backups.iter().max_by_key(|one| one.age_order()).expect("one").clone();
        let now = PgTimestamp(world.now * HOUR);
        let plan = match plan_expire(&holding, &policy, now, YEARS) {
            Ok(plan) => plan,
            Err(Refusal::NewestNotWhole { .. }) => {
                prop_assert!(newest.problem.is_some());
                return Ok(());
            }
            Err(other) => return Err(TestCaseError::fail(other.to_string())),
        };
        prop_assert!(newest.problem.is_none(), "it removes while the newest is not whole");
        let kept: Vec<usize> = plan.kept.iter().map(|kept| number(&kept.backup)).collect();
        prop_assert!(kept.contains(&number(&newest)));
        let gone = |pin: &BackupId| plan.removed.iter().any(|one| one.id == *pin);
        prop_assert!(!policy.pinned.iter().any(gone));
        let whole = |of: &[usize]| of.iter().filter(|one| world.backups[**one].whole).count();
        prop_assert!(whole(&kept) >= whole(&all).min(policy.backups_min as usize));

        let mut rest = world.held.clone();
        for gone in &plan.wal {
            let index = gone.branch.timeline.get() as usize - 1;
            prop_assert_eq!((gone.from_lsn.0 % (1 << 20), gone.to_lsn.0 % (1 << 20)), (0, 0));
            for piece in gone.from_lsn.0 / PIECE..gone.to_lsn.0 / PIECE {
                rest.remove(&(index, piece));
            }
        }
        // Every kept backup can be made consistent.
        for index in &kept {
            let made = &world.backups[*index];
            prop_assert!(!made.whole || world.is_consistent(made, &rest), "backup {index}");
        }
        let before = world.restorable(&all, &world.held);
        let after = world.restorable(&kept, &rest);
        // Every moment of the window that was restorable remains so, and no WAL of the window
        // expires.
        for (place, time) in &world.commits {
            if *time >= world.window_start {
                prop_assert!(!before.contains(place) || after.contains(place), "{place:?} vanished");
                prop_assert!(rest.contains(place), "{place:?} was removed");
            }
        }
        // The same holds for the latest state, from the newest backup.
        let latest = world.restorable(&[number(&newest)], &world.held);
        prop_assert!(latest.is_subset(&after));
        let last = world.timelines.len() - 1;
        let end = |set: &BTreeSet<(usize, u64)>, of: &[usize]| {
            let pieces = set.iter().filter(|one| one.0 == last).map(|one| one.1 + 1);
            let whole = of.iter().map(|one| &world.backups[*one]);
            let whole = whole.filter(|one| one.whole && one.timeline == last);
            pieces.chain(whole.map(|one| one.stop)).max()
        };
        prop_assert_eq!(end(&before, &all), end(&after, &kept), "the end of the last timeline");
        // The vanished moments are named, and no others.
        let mut named = BTreeSet::new();
        for window in &plan.windows {
            let index = window.branch.timeline.get() as usize - 1;
            for piece in window.from_lsn.0 / PIECE..window.to_lsn.0 / PIECE {
                named.insert((index, piece));
            }
        }
        let vanished: BTreeSet<_> = before.difference(&after).copied().collect();
        prop_assert_eq!(named, vanished);
    }
}

/// One timeline of `days`, with a backup at the beginning of each day and a commit per hour.
fn daily(days: u64, window_days: i64) -> World {
    let timelines = vec![Timeline {
        parent: None,
        end: days * 24,
        begun: 0,
    }];
    let pieces = 0..days * 24;
    let hour = |piece: u64| i64::try_from(piece).expect("few");
    let now = hour(days * 24);
    World {
        timelines,
        held: pieces.clone().map(|piece| (0, piece)).collect(),
        commits: pieces.map(|piece| ((0, piece), hour(piece))).collect(),
        backups: (0..days)
            .map(|day| Made {
                timeline: 0,
                start: day * 24 + 1,
                stop: day * 24 + 3,
                finished: hour(day * 24 + 3),
                whole: true,
            })
            .collect(),
        window_start: now - window_days * 24,
        now,
    }
}

const SEVEN: RetentionPolicy = RetentionPolicy {
    window: Duration::from_secs(86_400),
    daily: 7,
    weekly: 4,
    monthly: 12,
    backups_min: 2,
    pinned: Vec::new(),
};

fn plan_of(world: &World, policy: &RetentionPolicy) -> Result<ExpirePlan, Refusal> {
    let week = Duration::from_secs(7 * 86_400);
    plan_expire(
        &world.holding(),
        policy,
        PgTimestamp(world.now * HOUR),
        week,
    )
}

#[test]
fn grandfather_father_and_son_of_two_years() {
    // Day 0 is 2000-01-01, a Saturday. The last one, 729, is 2001-12-30, a Sunday.
    let plan = plan_of(&daily(730, 2), &SEVEN).expect("a plan");
    let days: Vec<usize> = plan.kept.iter().map(|kept| number(&kept.backup)).collect();
    let months = [396, 424, 455, 485, 516, 546, 577, 608, 638, 669, 699];
    let weeks = [708, 715, 722];
    let last = [723, 724, 725, 726, 727, 728, 729];
    assert_eq!(days, [&months[..], &weeks, &last].concat());
    let reasons = &plan.kept.last().expect("the newest").reasons;
    let words: Vec<String> = reasons.iter().map(ToString::to_string).collect();
    assert_eq!(
        words.join(", "),
        "newest, minimum, window, day 2001-12-30, week of 2001-12-24, month 2001-12"
    );
    assert_eq!(plan.removed.len(), 730 - days.len());
    assert!(plan.windows.len() > months.len() + weeks.len());
    let first = &plan.windows[0];
    assert_eq!(first.from, Some(PgTimestamp(3 * HOUR)));
    assert_eq!(first.to, Some(PgTimestamp((396 * 24 + 3) * HOUR)));
}

#[test]
fn a_clock_that_jumped_and_backups_that_stopped_are_refused() {
    let mut world = daily(40, 2);
    plan_of(&world, &SEVEN).expect("a plan");
    world.now += 24 * 365;
    world.window_start += 24 * 365;
    let refused = plan_of(&world, &SEVEN).expect_err("a year later");
    assert!(matches!(refused, Refusal::Overdue { .. }), "{refused}");
    assert!(refused.to_string().contains("wal-archiver backup"));
    world.now = 24 * 20;
    let refused = plan_of(&world, &SEVEN).expect_err("in the past");
    assert!(matches!(refused, Refusal::ClockBehind { .. }), "{refused}");
}

#[test]
fn nothing_goes_while_the_newest_is_not_whole_and_one_that_is_not_counts_for_nothing() {
    let mut world = daily(40, 2);
    world.backups[39].whole = false;
    let refused = plan_of(&world, &SEVEN).expect_err("the newest");
    assert!(
        refused.to_string().contains("a slice is missing"),
        "{refused}"
    );
    world.backups[39].whole = true;
    let whole = plan_of(&world, &SEVEN).expect("a plan");
    world.backups[38].whole = false;
    let plan = plan_of(&world, &SEVEN).expect("a plan");
    let days = |plan: &ExpirePlan| -> Vec<usize> {
        plan.kept.iter().map(|kept| number(&kept.backup)).collect()
    };
    let (with, without) = (days(&plan), days(&whole));
    assert!(
        without.iter().all(|day| with.contains(day)),
        "it stays: {with:?}"
    );
    assert!(
        with.contains(&32) && !without.contains(&32),
        "an older day takes its place: {with:?}"
    );
}
