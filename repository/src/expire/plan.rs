//! [`plan_expire`]: decides which backups and which WAL stay, each with its reason. Pure: no clock,
//! no I/O.
//!
//! 1. Choose the backups: the newest, a minimum number, daily, weekly and monthly ones, pinned
//!    ones, and on every live timeline those that lead to a moment of the window. A damaged backup
//!    does not count: it stays if it would stay when intact, in addition to the one that replaces
//!    it.
//! 2. Add up the WAL that they need: for each backup from its start to its stop; from the first
//!    backup that leads to the window all later WAL, along every timeline that follows; and all WAL
//!    anywhere that is newer than the beginning of the window.
//! 3. Everything else expires. Moments that can no longer be restored are named.

use std::{collections::BTreeMap, fmt, time::Duration};

use jiff::civil::Date;
use wal_format::{
    BackupId, Branch, EXPIRED_FORMAT_VERSION, Expired, ExpiredBackup, ExpiredWal, ExpiredWindow,
    Lsn, PgTimestamp,
};

use super::{
    HeldBackup, HeldBranch, Holding, Intervals, RetentionPolicy,
    periods::Period,
    reach::{self, Wal},
};

/// A clock that is behind the newest backup by more than this is, or was, wrong.
const CLOCK_BEHIND_MAX: Duration = Duration::from_secs(3600);

/// The reason for keeping a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// It is the newest.
    Newest,
    /// It is one of the minimum number.
    Minimum,
    /// It ended within the window.
    Window,
    /// The first moments of the window are restored from it.
    WindowBegin,
    /// The last of its day.
    Daily(Date),
    /// The last of the week that begins on this Monday.
    Weekly(Date),
    /// The last of the month that begins on this day.
    Monthly(Date),
    /// The configuration names it.
    Pinned,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Newest => f.write_str("newest"),
            Self::Minimum => f.write_str("minimum"),
            Self::Window => f.write_str("window"),
            Self::WindowBegin => f.write_str("begin of the window"),
            Self::Daily(day) => write!(f, "day {day}"),
            Self::Weekly(day) => write!(f, "week of {day}"),
            Self::Monthly(day) => write!(f, "month {}", day.strftime("%Y-%m")),
            Self::Pinned => f.write_str("pinned"),
        }
    }
}

/// A backup that stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptBackup {
    /// The backup.
    pub backup: HeldBackup,
    /// The reasons.
    pub reasons: Vec<Reason>,
}

/// The decision: what stays and what expires.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExpirePlan {
    /// The backups that stay, oldest first.
    pub kept: Vec<KeptBackup>,
    /// The backups that expire, oldest first.
    pub removed: Vec<HeldBackup>,
    /// The WAL that expires, in whole segments.
    pub wal: Vec<ExpiredWal>,
    /// The moments that can no longer be restored.
    pub windows: Vec<ExpiredWindow>,
}

impl ExpirePlan {
    /// Returns true if nothing expires.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.removed.is_empty() && self.wal.is_empty()
    }

    /// Returns the record of what expires.
    #[must_use]
    pub fn record(&self, id: BackupId, marked: PgTimestamp, policy: String) -> Expired {
        let backups = self.removed.iter().map(|backup| ExpiredBackup {
            id: backup.id.clone(),
            finished: backup.finished,
        });
        Expired {
            format_version: EXPIRED_FORMAT_VERSION,
            id,
            marked,
            swept: None,
            policy,
            backups: backups.collect(),
            wal: self.wal.clone(),
            windows: self.windows.clone(),
        }
    }
}

/// The reason why nothing may be removed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The newest backup ends in the future.
    #[error(
        "nothing is removed: the newest backup {newest} ended {finished}, and this host's clock says {now}; set the clock by NTP"
    )]
    ClockBehind {
        /// The newest backup.
        newest: BackupId,
        /// Its end.
        finished: PgTimestamp,
        /// The current time.
        now: PgTimestamp,
    },
    /// The newest backup cannot be trusted.
    #[error(
        "nothing is removed: the newest backup {newest} is not proved whole: {problem}; run `wal-archiver verify`, or take a \
         new one with `wal-archiver backup`"
    )]
    NewestNotWhole {
        /// The newest backup.
        newest: BackupId,
        /// The problem with it.
        problem: String,
    },
    /// There has been no backup for too long, or the clock has jumped.
    #[error(
        "nothing is removed: the newest backup {newest} ended {finished}, more than {limit_seconds} s (twice backup_max_age) \
         before {now}; take a backup with `wal-archiver backup`, or, if that is not the time, set this host's clock"
    )]
    Overdue {
        /// The newest backup.
        newest: BackupId,
        /// Its end.
        finished: PgTimestamp,
        /// The current time.
        now: PgTimestamp,
        /// The maximum age.
        limit_seconds: u64,
    },
}

type Chosen = BTreeMap<usize, Vec<Reason>>;

/// Decides what stays of `holding` under `policy` at `now`. `backup_max_age` is the longest
/// expected interval between backups.
///
/// # Errors
/// [`Refusal`] when removing anything could lose data that must be kept.
pub fn plan_expire(
    holding: &Holding,
    policy: &RetentionPolicy,
    now: PgTimestamp,
    backup_max_age: Duration,
) -> Result<ExpirePlan, Refusal> {
    let Some(newest) = holding.backups.iter().max_by_key(|one| one.age_order()) else {
        // Nothing can be restored, so nothing expires.
        return Ok(ExpirePlan::default());
    };
    if let Some(problem) = &newest.problem {
        return Err(Refusal::NewestNotWhole {
            newest: newest.id.clone(),
            problem: problem.clone(),
        });
    }
    let age = now.micros_since(newest.finished);
    if age < -micros(CLOCK_BEHIND_MAX) {
        return Err(Refusal::ClockBehind {
            newest: newest.id.clone(),
            finished: newest.finished,
            now,
        });
    }
    let plan = decide(holding, policy);
    let limit = backup_max_age.saturating_mul(2);
    if age > micros(limit) && !plan.is_empty() {
        return Err(Refusal::Overdue {
            newest: newest.id.clone(),
            finished: newest.finished,
            now,
            limit_seconds: limit.as_secs(),
        });
    }
    Ok(plan)
}

/// Returns the plan that removes one backup and nothing else. The plan contains the times that can
/// no longer be restored afterwards. Returns `None` if the backup does not exist.
#[must_use]
pub fn plan_delete(holding: &Holding, id: &BackupId) -> Option<ExpirePlan> {
    let mut plan = ExpirePlan::default();
    for backup in &holding.backups {
        if backup.id == *id {
            plan.removed.push(backup.clone());
        } else {
            plan.kept.push(KeptBackup {
                backup: backup.clone(),
                reasons: Vec::new(),
            });
        }
    }
    if plan.removed.is_empty() {
        return None;
    }
    plan.windows = vanished(holding, &plan, &reach::held(holding));
    Some(plan)
}

fn decide(holding: &Holding, policy: &RetentionPolicy) -> ExpirePlan {
    let (mut chosen, whole_roots) = choose(holding, policy, &|backup| backup.problem.is_none());
    let (as_if_whole, roots) = choose(holding, policy, &|_| true);
    for (index, reasons) in as_if_whole {
        chosen.entry(index).or_insert(reasons);
    }
    let mut needed = Wal::new();
    for (branch, index) in whole_roots.into_iter().chain(roots) {
        need_all_from(&mut needed, holding, branch, index);
    }
    let held = reach::held(holding);
    for index in chosen.keys() {
        need_consistency(&mut needed, holding, &held, &holding.backups[*index]);
    }
    for branch in &holding.branches {
        let from = match branch.young_from {
            _ if !branch.is_dated => Lsn::ZERO,
            Some(from) => from.align_down(holding.segment()),
            None => continue,
        };
        needed.entry(branch.branch).or_default().add(from, Lsn::MAX);
    }
    let mut plan = ExpirePlan::default();
    for (index, backup) in holding.backups.iter().enumerate() {
        match chosen.remove(&index) {
            Some(mut reasons) => {
                reasons.sort_unstable();
                reasons.dedup();
                plan.kept.push(KeptBackup {
                    backup: backup.clone(),
                    reasons,
                });
            }
            None => plan.removed.push(backup.clone()),
        }
    }
    plan.kept.sort_by_key(|kept| kept.backup.finished);
    plan.removed.sort_by_key(|backup| backup.finished);
    let mut rest = held;
    for branch in &holding.branches {
        let whole = |(from, to): (Lsn, Lsn)| {
            let size = holding.segment();
            (from.align_down(size), to.align_up(size))
        };
        let held: Intervals = branch.wal.iter().map(whole).collect();
        let nothing = Intervals::default();
        let gone = held.without(needed.get(&branch.branch).unwrap_or(&nothing));
        let left = branch.wal.without(&gone);
        rest.insert(branch.branch, left);
        plan.wal
            .extend(gone.iter().map(|(from_lsn, to_lsn)| ExpiredWal {
                branch: branch.branch,
                from_lsn,
                to_lsn,
            }));
    }
    plan.windows = vanished(holding, &plan, &rest);
    plan
}

/// Returns the backups that stay, among those for which `counts` is true, and the backups from
/// which all WAL is needed on a timeline.
fn choose(
    holding: &Holding,
    policy: &RetentionPolicy,
    counts: &dyn Fn(&HeldBackup) -> bool,
) -> (Chosen, Vec<(usize, usize)>) {
    let backups = &holding.backups;
    let mut newest_first: Vec<usize> = (0..backups.len())
        .filter(|index| counts(&backups[*index]))
        .collect();
    newest_first.sort_by_key(|index| std::cmp::Reverse(backups[*index].age_order()));
    let mut chosen = Chosen::new();
    let mut keep = |index: usize, reason| chosen.entry(index).or_default().push(reason);
    let Some(newest) = newest_first.first().copied() else {
        return (chosen, Vec::new());
    };
    keep(newest, Reason::Newest);
    let fewest = usize::try_from(policy.backups_min).unwrap_or(usize::MAX);
    for index in newest_first.iter().take(fewest) {
        keep(*index, Reason::Minimum);
    }
    let times: Vec<PgTimestamp> = newest_first
        .iter()
        .map(|at| backups[*at].finished)
        .collect();
    type Named = fn(Date) -> Reason;
    let periods: [(Period, u32, Named); 3] = [
        (Period::Day, policy.daily, Reason::Daily),
        (Period::Week, policy.weekly, Reason::Weekly),
        (Period::Month, policy.monthly, Reason::Monthly),
    ];
    for (period, count, reason) in periods {
        for (at, date) in period.choose(&times, count) {
            keep(newest_first[at], reason(date));
        }
    }
    for index in &newest_first {
        if policy.pinned.contains(&backups[*index].id) {
            keep(*index, Reason::Pinned);
        }
    }
    // Backups from which whole timelines are needed: the newest, on every timeline that it leads
    // to, and those that lead to moments of the window.
    let mut roots = Vec::new();
    let last = holding.branches.iter().map(|one| one.branch.timeline).max();
    for (at, branch) in holding.branches.iter().enumerate() {
        if reach::is_on(branch, &backups[newest]) {
            roots.push((at, newest));
        }
        let alive = branch.young_from.is_some() || Some(branch.branch.timeline) == last;
        if !alive {
            continue;
        }
        let begins = begins_window(holding, branch, &newest_first);
        let on_path = newest_first
            .iter()
            .filter(|index| reach::is_on(branch, &backups[**index]));
        let from = begins.map_or(Lsn::ZERO, |index| backups[index].start_lsn);
        for index in on_path.filter(|index| backups[**index].start_lsn >= from) {
            let reason = if Some(*index) == begins {
                Reason::WindowBegin
            } else {
                Reason::Window
            };
            keep(*index, reason);
            roots.push((at, *index));
        }
    }
    (chosen, roots)
}

/// Returns the newest backup from which the first moment of a timeline's window is restored, or
/// `None` if none ends before it.
fn begins_window(holding: &Holding, branch: &HeldBranch, among: &[usize]) -> Option<usize> {
    let before = branch.young_from.unwrap_or(Lsn::MAX);
    let on_path = among.iter().copied().filter(|index| {
        let backup = &holding.backups[*index];
        // Uses the more careful of two times: that of the WAL, from the server's clock, and that of
        // the archiver's clock.
        reach::is_on(branch, backup)
            && backup.stop_lsn <= before
            && backup.finished <= holding.window_start
    });
    on_path.max_by_key(|index| holding.backups[*index].start_lsn)
}

/// Adds all WAL along the path to a timeline, starting at a backup.
fn need_all_from(needed: &mut Wal, holding: &Holding, branch: usize, backup: usize) {
    let (size, start) = (holding.segment(), holding.backups[backup].start_lsn);
    for part in holding.branches[branch].path.iter() {
        let from = part.from.max(start).align_down(size);
        let to = if part.to == Lsn::MAX {
            Lsn::MAX
        } else {
            part.to.align_up(size)
        };
        needed.entry(part.branch).or_default().add(from, to);
    }
}

/// Adds the WAL that makes a backup consistent.
fn need_consistency(needed: &mut Wal, holding: &Holding, held: &Wal, backup: &HeldBackup) {
    let size = holding.segment();
    let known = holding
        .branches
        .iter()
        .find(|branch| branch.branch == backup.branch);
    let mut add = |branch: Branch, from: Lsn, to: Lsn| {
        if from < to {
            let needed = needed.entry(branch).or_default();
            needed.add(from.align_down(size), to.align_up(size));
        }
    };
    for part in known.iter().flat_map(|branch| &branch.path) {
        let (from, to) = (
            part.from.max(backup.start_lsn),
            part.to.min(backup.stop_lsn),
        );
        add(part.branch, from, to);
    }
    add(backup.branch, backup.start_lsn, backup.stop_lsn);
    let is_reached = |branch: &&HeldBranch| {
        reach::is_on(branch, backup)
            && reach::end_along(branch, backup, held, size) >= backup.stop_lsn
    };
    if known.is_some_and(|own| is_reached(&own)) {
        return;
    }
    // The end of its WAL is held only as the copy with which a later timeline begins.
    for part in holding
        .branches
        .iter()
        .filter(is_reached)
        .flat_map(|one| &one.path)
    {
        let from = part.from.align_down(size).max(backup.start_lsn);
        add(part.branch, from, part.to.min(backup.stop_lsn));
    }
}

/// Returns the moments that can be restored now but not afterwards.
fn vanished(holding: &Holding, plan: &ExpirePlan, rest: &Wal) -> Vec<ExpiredWindow> {
    let size = holding.segment();
    let held = reach::held(holding);
    let whole = |backup: &&HeldBackup| backup.problem.is_none();
    let mut windows = Vec::new();
    for branch in &holding.branches {
        let all = holding.backups.iter().filter(whole);
        let kept = plan.kept.iter().map(|kept| &kept.backup).filter(whole);
        let before = reach::restorable(branch, all, &held, size);
        let after = reach::restorable(branch, kept, rest, size);
        for (from_lsn, to_lsn) in before.without(&after).iter() {
            let (from, to) = times(holding, branch, from_lsn, to_lsn);
            windows.push(ExpiredWindow {
                branch: branch.branch,
                from_lsn,
                to_lsn,
                from,
                to,
            });
        }
    }
    windows
}

/// Returns the approximate times of a range of WAL: between the ends of the surrounding backups.
fn times(
    holding: &Holding,
    branch: &HeldBranch,
    from: Lsn,
    to: Lsn,
) -> (Option<PgTimestamp>, Option<PgTimestamp>) {
    let on_path = || {
        let on = |backup: &&HeldBackup| reach::is_on(branch, backup);
        holding.backups.iter().filter(on)
    };
    let before = on_path().filter(|backup| backup.stop_lsn <= from);
    let begin = before.map(|backup| backup.finished).max();
    let behind = on_path().filter(|backup| backup.stop_lsn >= to && backup.branch == branch.branch);
    let end = behind.map(|backup| backup.finished).min();
    let last = branch.ends.iter().find(|(end, _)| *end >= to);
    (begin, end.or(last.and_then(|(_, time)| *time)))
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}
