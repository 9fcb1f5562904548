//! Runs an operation by its schedule ([`keep`]): base backups and restore drills.
//!
//! The last run is read from the repository, so a run of another host or of a person counts, and a
//! restart of the daemon neither repeats nor forgets one. A run that failed is retried with doubled
//! pauses. Invariant: [`keep`] returns at a requested stop, after the operation has ended.

pub(crate) mod backup;
pub(crate) mod drill;
mod program;

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use repository::{Repository, config::ClusterSettings, outcome_time, schedule::Schedule};
use status::{cluster_status::Facts, schedule::ScheduleReport};
use wal_format::{ObjectKey, PgTimestamp};

use crate::{blocking::blocking, core::shutdown::Shutdown, error::Result, jitter::jitter};

/// The longest sleep before the clock is read again: it can be set, and the host can be suspended.
const CLOCK_POLL: Duration = Duration::from_secs(10);
/// The interval at which an operation that cannot begin is tried again. It costs no request.
const READY_POLL: Duration = Duration::from_secs(1);
/// The interval at which a run is tried again that could not begin. A try lists the repository.
const BUSY_POLL: Duration = Duration::from_secs(2);
/// The pause after the repository did not tell the last run.
const UNKNOWN_RETRY: Duration = Duration::from_secs(30);
/// A run that is due and cannot begin for this long was missed.
const MISSED_AFTER: SignedDuration = SignedDuration::from_mins(1);
/// A scheduled run begins this much after its time at most, so that many clusters do not begin at
/// the same moment.
const SPREAD_MAX: Duration = Duration::from_secs(5);
/// A run with a later time than this after the present does not count: a wrong clock gave it its
/// name.
const FUTURE_MAX: SignedDuration = SignedDuration::from_hours(24);

/// A periodic operation.
pub(crate) struct Plan {
    /// The times at which it is due.
    pub(crate) schedule: Schedule,
    /// True if a missed run is made up for.
    pub(crate) catch_up: bool,
    /// The first and the longest pause after a failed run.
    pub(crate) retry: (Duration, Duration),
}

/// The last run that the repository knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LastRun {
    /// The time at which it began.
    At(Timestamp),
    /// There was none.
    Never,
}

/// The end of a run.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ran {
    /// It was performed. Its result is in the repository.
    Done,
    /// It could not begin, for this reason.
    NotBegun(String),
    /// It failed with this error, and is retried.
    Failed(String),
}

/// The operation itself.
pub(crate) trait Operation {
    /// Returns the reason why the operation cannot begin now. Performs no I/O.
    fn obstacle(&self) -> Option<String>;
    /// Returns the last run that the repository knows.
    async fn last_run(&mut self) -> Result<LastRun>;
    /// Performs the operation. Ends it at a requested stop.
    async fn run(&mut self, stop: Shutdown) -> Ran;
}

/// Returns the reason why no operation can store its result in the repository.
fn without_repository(facts: &Facts) -> Option<String> {
    if let Some(error) = &facts.repository_error {
        return Some(format!("the repository fails: {error}"));
    }
    facts
        .repository_gone
        .then(|| "the repository is not there".to_owned())
}

/// The present and the due time of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Due {
    /// The time at which the next run begins. Not after the present if a run is due.
    at: Timestamp,
    is_due: bool,
}

impl Plan {
    /// Returns the next run after the last one. `counted_from` is the time before which no run
    /// counts as missed; `None` if every missed run is made up for. `None` if no run is due any
    /// more.
    fn next(&self, last: LastRun, counted_from: Option<Timestamp>, now: Timestamp) -> Option<Due> {
        let counted_from = counted_from.filter(|from| counts(*from, now));
        let at = match (last, counted_from) {
            (LastRun::Never, None) => now,
            (LastRun::Never, Some(from)) => self.schedule.next_after(from)?,
            (LastRun::At(last), from) => {
                let from = from.map_or(last, |from| from.max(last));
                self.schedule.next_after(from)?
            }
        };
        Some(Due {
            at,
            is_due: at <= now,
        })
    }
}

/// Performs an operation by its schedule until a stop is requested. `note` receives each change of
/// the report.
pub(crate) async fn keep(
    plan: &Plan,
    operation: &mut impl Operation,
    note: &(dyn Fn(&ScheduleReport) + Send + Sync),
    mut stop: Shutdown,
) {
    let schedule = &plan.schedule;
    let zone = schedule.zone_name().to_owned();
    let mut report = ScheduleReport::new(schedule.text().to_owned(), zone);
    let mut counted_from = (!plan.catch_up).then(Timestamp::now);
    let mut pause = plan.retry.0;
    note(&report);
    loop {
        let last = match stop.until(operation.last_run()).await {
            None => return,
            Some(Ok(last)) => last,
            Some(Err(error)) => {
                report.waits_for = Some(format!("the last run is not known: {error}"));
                note(&report);
                if !stop.sleep(jitter(UNKNOWN_RETRY)).await {
                    return;
                }
                continue;
            }
        };
        let now = Timestamp::now();
        let Some(due) = plan.next(last, counted_from, now) else {
            report.next_run = None;
            note(&report);
            stop.requested().await;
            return;
        };
        report.next_run = Some(PgTimestamp::from_jiff(due.at));
        report.waits_for = None;
        if !due.is_due {
            // Another host or a person has performed what failed here.
            report.last_error = None;
            report.last_error_at = None;
            pause = plan.retry.0;
            note(&report);
            if !sleep_until(due.at, &mut stop).await || !stop.sleep(spread()).await {
                return;
            }
            continue;
        }
        let mut is_missed = false;
        while let Some(obstacle) = operation.obstacle()
            && !is_missed
        {
            report.waits_for = Some(obstacle);
            note(&report);
            is_missed = !plan.catch_up && is_over(due.at);
            if !stop.sleep(READY_POLL).await {
                return;
            }
        }
        // Another host may have performed the run meanwhile.
        if report.waits_for.is_some() {
            if is_missed {
                tracing::warn!(
                    event = "scheduled_run_missed",
                    due = %due.at, reason = report.waits_for,
                    "a scheduled run was missed and is not made up for"
                );
                counted_from = Some(Timestamp::now());
            }
            continue;
        }
        let began = Timestamp::now();
        report.running_since = Some(PgTimestamp::from_jiff(began));
        report.next_run = schedule.next_after(began).map(PgTimestamp::from_jiff);
        note(&report);
        let ran = operation.run(stop.clone()).await;
        report.running_since = None;
        if stop.is_requested() {
            note(&report);
            return;
        }
        let wait = match ran {
            Ran::Done => {
                report.last_error = None;
                report.last_error_at = None;
                pause = plan.retry.0;
                // The repository names the run, but its place may answer with an older listing.
                counted_from = Some(began);
                note(&report);
                continue;
            }
            Ran::NotBegun(reason) => {
                report.next_run = Some(PgTimestamp::from_jiff(due.at));
                report.waits_for = Some(reason);
                jitter(BUSY_POLL)
            }
            Ran::Failed(error) => {
                let wait = jitter(pause);
                pause = (pause * 2).min(plan.retry.1);
                let now = Timestamp::now();
                report.last_error = Some(error);
                report.last_error_at = Some(PgTimestamp::from_jiff(now));
                report.next_run = now.checked_add(wait).ok().map(PgTimestamp::from_jiff);
                wait
            }
        };
        note(&report);
        if !stop.sleep(wait).await {
            return;
        }
    }
}

fn is_over(due: Timestamp) -> bool {
    Timestamp::now().duration_since(due) > MISSED_AFTER
}

/// Sleeps until a time of the clock. Returns false at a requested stop.
async fn sleep_until(time: Timestamp, stop: &mut Shutdown) -> bool {
    loop {
        let left = time.duration_since(Timestamp::now());
        if left <= SignedDuration::ZERO {
            return true;
        }
        if !stop.sleep(left.unsigned_abs().min(CLOCK_POLL)).await {
            return false;
        }
    }
}

/// Returns a random pause of at most [`SPREAD_MAX`].
fn spread() -> Duration {
    let center = SPREAD_MAX * 2;
    (jitter(center).saturating_sub(center * 3 / 4)).min(SPREAD_MAX)
}

/// Returns the begin of the oldest and of the newest run that has an object in `folder`. `began`
/// returns the begin of the run to which an object belongs, and `None` for other objects.
async fn recorded(
    settings: &ClusterSettings,
    folder: &'static str,
    began: fn(&ObjectKey) -> Option<Timestamp>,
) -> Result<Option<(Timestamp, Timestamp)>> {
    let settings = settings.clone();
    blocking(move || {
        let repository = Repository::open_known(&settings)?;
        let Some(identity) = repository.identity()? else {
            return Ok(None);
        };
        let system = identity.system_identifier;
        let now = Timestamp::now();
        let listed = repository.list(&format!("{system}/{folder}/"))?;
        let times = listed.iter().filter_map(|(key, _)| began(key));
        let times: Vec<Timestamp> = times.filter(|time| counts(*time, now)).collect();
        let ends = times.iter().min().zip(times.iter().max());
        Ok(ends.map(|(oldest, newest)| (*oldest, *newest)))
    })
    .await
}

/// Returns false for the time of a run that a wrong clock has put into the future. It would hide
/// the runs that are due.
fn counts(time: Timestamp, now: Timestamp) -> bool {
    time.duration_since(now) <= FUTURE_MAX
}

/// Returns the begin of a complete base backup.
fn of_backup(key: &ObjectKey) -> Option<Timestamp> {
    match key {
        ObjectKey::BackupInfo(_, id) => outcome_time(id),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
