//! Applies retention to a cluster: to each repository, by its own policy. The daemon does so
//! periodically.
//!
//! A decision is reported before it is recorded, and recorded before anything is removed
//! (`repository::expire`). Invariant: a repository with a problem loses nothing, and the others do
//! not wait for it.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use catalog::Catalog;
use jiff::Timestamp;
use repository::outcome_name;
use repository::{
    BackupNotes, ClusterIdentity, ExitKind, ExpiredSet, LossRecord, Repository,
    config::{ClusterSettings, RepositoryPlace},
    expire::{ExpirePlan, Holding, RetentionPolicy, Swept, due, mark, plan_expire, sweep},
};
use serde::Serialize;
use status::{cluster_status::ClusterStatus, outcomes::ended};
use wal_format::{
    BackupId, ExpiredWal, ExpiredWindow, ObjectKey, Outcome, OutcomeKind, PgTimestamp,
    SystemIdentifier,
};

use crate::{
    blocking::blocking,
    error::{Error, Result},
    upkeep::outcomes,
};

pub(crate) mod delete;
pub(crate) mod undo;

/// The interval at which the daemon checks whether retention is due.
const LOOK: Duration = Duration::from_secs(60);
/// The pause after a start, in which streaming has priority.
const START_PAUSE: Duration = Duration::from_secs(60);
/// The first and the longest pause after a run that failed. Its cause may pass, and an expiry reads
/// every name in the repository.
const RETRY_MIN: Duration = Duration::from_secs(60);
const RETRY_MAX: Duration = Duration::from_secs(3600);
/// The maximum number of decisions, if another archiver decides at the same time.
const TRIES_MAX: u64 = 5;

/// The result for one repository.
#[derive(Clone, Debug, Serialize)]
pub struct PlaceReport {
    /// The repository's URL.
    pub repository: String,
    /// The retention policy as text. `None` if everything is kept.
    pub policy: Option<String>,
    /// The kept backups, oldest first.
    pub kept: Vec<ReportedBackup>,
    /// The expired backups.
    pub removed: Vec<ReportedBackup>,
    /// The expired WAL.
    pub wal: Vec<ExpiredWal>,
    /// The ranges of time that can no longer be restored.
    pub vanishing: Vec<ExpiredWindow>,
    /// The time from which the data that expires now is removed.
    pub removed_from: Option<PgTimestamp>,
    /// The name of the record in the repository.
    pub marked: Option<BackupId>,
    /// The objects that were removed, or that a run would remove.
    pub swept: Swept,
    /// The records of the audit trail older than `audit_keep` that were removed, or would be.
    pub records: Swept,
    /// The reason why nothing was done.
    pub problem: Option<String>,
    #[serde(skip)]
    kind: Option<ExitKind>,
}

/// A backup, and the reasons why it is kept.
#[derive(Clone, Debug, Serialize)]
pub struct ReportedBackup {
    /// Its name.
    pub id: BackupId,
    /// The operator's label.
    pub label: String,
    /// The time when it was complete.
    pub finished: PgTimestamp,
    /// Its stored length in bytes.
    pub stored_bytes: u64,
    /// The reasons why it is kept.
    pub reasons: Vec<String>,
    /// The reason why it cannot be restored. `None` if it can.
    pub problem: Option<String>,
}

impl PlaceReport {
    fn new(place: &RepositoryPlace) -> Self {
        Self {
            repository: place.to_string(),
            policy: place.retention.as_ref().map(ToString::to_string),
            kept: Vec::new(),
            removed: Vec::new(),
            wal: Vec::new(),
            vanishing: Vec::new(),
            removed_from: None,
            marked: None,
            swept: Swept::default(),
            records: Swept::default(),
            problem: None,
            kind: None,
        }
    }

    fn decided(&mut self, plan: &ExpirePlan) {
        let report = |backup: &repository::expire::HeldBackup, reasons| ReportedBackup {
            id: backup.id.clone(),
            label: backup.label.clone(),
            finished: backup.finished,
            stored_bytes: backup.stored_bytes,
            reasons,
            problem: backup.problem.clone(),
        };
        self.kept = plan
            .kept
            .iter()
            .map(|kept| {
                let reasons = kept.reasons.iter().map(ToString::to_string);
                report(&kept.backup, reasons.collect())
            })
            .collect();
        let removed = plan.removed.iter();
        self.removed = removed.map(|backup| report(backup, Vec::new())).collect();
        self.wal.clone_from(&plan.wal);
        self.vanishing.clone_from(&plan.windows);
    }

    /// Returns true if anything was marked as expired or removed. Records of the audit trail do not
    /// count: each removal of a record would add another record.
    #[must_use]
    pub fn did_something(&self) -> bool {
        self.marked.is_some() || self.swept.objects > 0
    }
}

/// The options of an expiry.
#[derive(Clone, Copy, Debug)]
pub struct Wish {
    /// The system identifier of an earlier epoch. `None` for the newest epoch.
    pub system: Option<SystemIdentifier>,
    /// The present time.
    pub now: Timestamp,
    /// True if nothing is changed.
    pub dry_run: bool,
}

/// Applies retention. `announce` is called with each repository's decision before it is executed.
#[must_use]
pub fn expire(
    settings: &ClusterSettings,
    wish: Wish,
    announce: &dyn Fn(&PlaceReport),
) -> Vec<PlaceReport> {
    let places = settings.repository.each();
    let apply = |place: &RepositoryPlace| {
        let mut report = PlaceReport::new(place);
        let applied = match &place.retention {
            Some(policy) => apply(settings, place, policy, wish, &mut report, announce),
            None => {
                announce(&report);
                sweep_deleted(settings, place, wish, &mut report)
            }
        };
        if let Err(error) = applied {
            report.kind = Some(error.exit_kind());
            report.problem = Some(error.to_string());
        }
        report
    };
    places.iter().map(apply).collect()
}

/// Checks that retention was applied to every repository.
///
/// # Errors
/// [`Error::Expire`] with the problems.
pub fn outcome(reports: &[PlaceReport]) -> Result<()> {
    let problems = reports.iter().filter_map(|report| {
        let problem = report.problem.as_ref()?;
        Some(format!("{}: {problem}", report.repository))
    });
    let problem: Vec<String> = problems.collect();
    match reports.iter().filter_map(|report| report.kind).max() {
        None => Ok(()),
        Some(kind) => Err(Error::Expire {
            problem: problem.join("; "),
            kind,
        }),
    }
}

fn apply(
    settings: &ClusterSettings,
    place: &RepositoryPlace,
    policy: &RetentionPolicy,
    wish: Wish,
    report: &mut PlaceReport,
    announce: &dyn Fn(&PlaceReport),
) -> Result<()> {
    let mut repository = Repository::open_known_place(settings, place)?;
    if let Some(system) = wish.system {
        repository = repository.of_system(system)?;
    }
    let Some(identity) = repository.identity()? else {
        // A new repository contains nothing that could expire.
        announce(report);
        return Ok(());
    };
    refuse_older_state(settings, &repository, wish)?;
    let system = identity.system_identifier;
    let catalog = catalog(settings, &identity, &repository)?;
    let now = PgTimestamp::from_jiff(wish.now);
    let mut tries = 0;
    let (mut expired, plan) = loop {
        let (expired, plan) = decide(settings, &repository, &identity, &catalog, policy, now)?;
        report.decided(&plan);
        if !plan.is_empty() {
            report.removed_from = wish
                .now
                .checked_add(settings.expire_grace)
                .ok()
                .map(PgTimestamp::from_jiff);
        }
        if tries == 0 {
            announce(report);
        }
        tries += 1;
        if wish.dry_run || plan.is_empty() {
            break (expired, plan);
        }
        let record = (name()?, now, policy.to_string());
        match mark(&repository, system, &plan, &expired, record)? {
            Some(record) => {
                report.marked = Some(record.id);
                break (repository.expired(system)?, plan);
            }
            None if tries < TRIES_MAX => std::thread::sleep(Duration::from_millis(
                tries * (100 + std::process::id() as u64 % 400),
            )),
            None => {
                return Err(Error::Expire {
                    problem: format!(
                        "another process applied retention at the same time in each of {TRIES_MAX} attempts; nothing was changed, \
                         run `wal-archiver expire` again"
                    ),
                    kind: ExitKind::Failed,
                });
            }
        }
    };
    if wish.dry_run && !plan.is_empty() {
        let mut records = expired.records().to_vec();
        records.push(plan.record(name()?, now, policy.to_string()));
        expired = records.into();
    }
    // A dry run reports everything that will be removed, so it ignores the grace period.
    let grace = if wish.dry_run {
        Duration::ZERO
    } else {
        settings.expire_grace
    };
    let due = due(&expired, grace, now);
    report.swept = sweep(
        &repository,
        &identity,
        (&expired, &due),
        (name()?, now),
        wish.dry_run,
    )?;
    report.records =
        repository.expire_outcomes(system, settings.audit_keep, wish.now, wish.dry_run)?;
    Ok(())
}

/// Removes due objects from a repository without retention, in which backups may have been deleted
/// by name.
fn sweep_deleted(
    settings: &ClusterSettings,
    place: &RepositoryPlace,
    wish: Wish,
    report: &mut PlaceReport,
) -> Result<()> {
    let mut repository = Repository::open_known_place(settings, place)?;
    if let Some(system) = wish.system {
        repository = repository.of_system(system)?;
    }
    let Some(identity) = repository.identity()? else {
        return Ok(());
    };
    refuse_older_state(settings, &repository, wish)?;
    let expired = repository.expired(identity.system_identifier)?;
    let now = PgTimestamp::from_jiff(wish.now);
    let due = due(&expired, settings.expire_grace, now);
    if !due.is_empty() {
        let record = (name()?, now);
        report.swept = sweep(
            &repository,
            &identity,
            (&expired, &due),
            record,
            wish.dry_run,
        )?;
    }
    Ok(())
}

/// Refuses a place that lacks the newest segment that this host stored: nothing is removed from an
/// older copy of the repository. One of several places may only be behind.
fn refuse_older_state(
    settings: &ClusterSettings,
    repository: &Repository,
    wish: Wish,
) -> Result<()> {
    if wish.dry_run || settings.repository.each().len() > 1 {
        return Ok(());
    }
    Ok(LossRecord::of(settings).check_newest(repository)?)
}

fn decide(
    settings: &ClusterSettings,
    repository: &Repository,
    identity: &ClusterIdentity,
    catalog: &Catalog,
    policy: &RetentionPolicy,
    now: PgTimestamp,
) -> Result<(ExpiredSet, ExpirePlan)> {
    let expired = repository.expired(identity.system_identifier)?;
    let window = i64::try_from(policy.window.as_micros()).unwrap_or(i64::MAX);
    let window_start = PgTimestamp(now.0.saturating_sub(window));
    let holding = Holding::read(repository, identity, catalog, (window_start, now), &expired)?;
    // An earlier epoch gets no new backups. Its newest backup is not overdue, whatever its age.
    let newest = repository.epochs()?.pop();
    let is_past =
        newest.is_some_and(|(_, newest)| newest.system_identifier != identity.system_identifier);
    let max_age = if is_past {
        Duration::MAX
    } else {
        settings.backup_max_age
    };
    let notes = repository.backup_notes(identity.system_identifier)?;
    let policy = with_kept(policy, &notes);
    let plan = plan_expire(&holding, &policy, now, max_age).map_err(|refusal| Error::Expire {
        problem: refusal.to_string(),
        kind: ExitKind::Failed,
    })?;
    Ok((expired, plan))
}

/// Returns the policy with the backups that `backup keep` keeps in this repository.
fn with_kept(policy: &RetentionPolicy, notes: &BTreeMap<BackupId, BackupNotes>) -> RetentionPolicy {
    let mut policy = policy.clone();
    for (id, notes) in notes {
        if notes.kept.is_some() && !policy.pinned.contains(id) {
            policy.pinned.push(id.clone());
        }
    }
    policy
}

/// Returns the daemon's catalog, which saves a request for each segment. If there is none, creates
/// a temporary one.
fn catalog(
    settings: &ClusterSettings,
    identity: &ClusterIdentity,
    repository: &Repository,
) -> Result<Catalog> {
    if settings.catalog.join("CURRENT").is_file()
        && let Ok(catalog) = Catalog::open_read_only(&settings.catalog, identity)
    {
        return Ok(catalog);
    }
    Ok(Catalog::open_for_restore(None, repository)?)
}

fn name() -> Result<BackupId> {
    outcome_name(Timestamp::now()).ok_or_else(|| Error::Expire {
        problem: "the clock gives no year of four digits".to_owned(),
        kind: ExitKind::Failed,
    })
}

/// Records the result in the repository for the dashboard: every run that changed something, and a
/// failure only once.
pub(crate) fn record(settings: &ClusterSettings, began: Timestamp, reports: &[PlaceReport]) {
    let failed = outcome(reports).err().map(|error| error.to_string());
    let done = reports.iter().filter(|report| report.did_something());
    let words = |report: &PlaceReport| {
        format!(
            "{}: {} backup(s) and WAL in {} place(s) marked; {} object(s) removed, {} locked",
            report.repository,
            report.marked.as_ref().map_or(0, |_| report.removed.len()),
            report.marked.as_ref().map_or(0, |_| report.wal.len()),
            report.swept.objects,
            report.swept.locked
        )
    };
    let done: Vec<String> = done.map(words).collect();
    let message = failed.clone().unwrap_or_else(|| match done.is_empty() {
        true => "nothing to do".to_owned(),
        false => done.join("; "),
    });
    let written = (|| -> Result<Option<BackupId>> {
        let repository = Repository::open_known(settings)?;
        let Some(identity) = repository.identity()? else {
            return Ok(None);
        };
        let system = identity.system_identifier;
        let last = newest_outcome(&repository, system)?;
        let failed_before = last.as_ref().is_some_and(|last| !last.passed);
        let news = match &failed {
            Some(message) => !failed_before || last.is_some_and(|last| last.message != *message),
            None => failed_before || !done.is_empty(),
        };
        let ended = ended(OutcomeKind::Expire, began, failed.is_none(), &message);
        match ended.filter(|_| news) {
            Some(ended) => {
                LossRecord::of(settings).check_newest(&repository)?;
                Ok(Some(repository.put_outcome(system, &ended)?))
            }
            None => Ok(None),
        }
    })();
    match written {
        Ok(Some(id)) => outcomes::tell_the_daemon(settings, &id),
        Ok(None) => {}
        Err(error) => {
            tracing::warn!(%error, "the result of applying retention could not be recorded in the repository");
        }
    }
}

fn newest_outcome(repository: &Repository, system: SystemIdentifier) -> Result<Option<Outcome>> {
    let prefix = format!("{system}/outcome/{}/", OutcomeKind::Expire);
    match repository.list(&prefix)?.pop() {
        Some((key @ ObjectKey::Outcome(..), _)) => {
            Ok(serde_json::from_slice(&repository.get(&key)?).ok())
        }
        _ => Ok(None),
    }
}

/// Applies retention every `expire_interval`, counted from the last successful run on this host,
/// across restarts. A run that failed is retried after [`RETRY_MIN`], then at doubled intervals. No
/// run begins while the repository is known to fail: it could only repeat that.
pub(crate) async fn keep(settings: ClusterSettings, status: Arc<ClusterStatus>) {
    let retains = settings.repository.each();
    if retains.iter().all(|place| place.retention.is_none()) {
        return;
    }
    let interval = settings.expire_interval;
    tokio::time::sleep(START_PAUSE.min(interval)).await;
    let mut failures = 0;
    loop {
        let mut pause = LOOK.min(interval);
        if is_due(&settings) && status.facts().repository_error.is_none() {
            let settings = settings.clone();
            let applied = blocking(move || Ok(apply_now(&settings))).await;
            let is_applied = applied.unwrap_or_else(|error| {
                tracing::error!(%error, "retention was not applied");
                false
            });
            failures = if is_applied { 0 } else { failures + 1 };
            if !is_applied {
                pause = retry_pause(failures, interval);
            }
        }
        tokio::time::sleep(pause).await;
    }
}

/// Returns the pause after this many failed runs in a row: at most `interval`.
fn retry_pause(failures: u32, interval: Duration) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    let pause = RETRY_MIN.saturating_mul(1 << doublings);
    pause.min(RETRY_MAX).min(interval)
}

/// Returns the path of the file with the time of the last successful run on this host.
fn last_done(settings: &ClusterSettings) -> PathBuf {
    let directory = settings.spool.join(settings.name.as_str());
    directory.join("last-expire")
}

fn is_due(settings: &ClusterSettings) -> bool {
    let Ok(text) = std::fs::read_to_string(last_done(settings)) else {
        return true;
    };
    let Ok(last) = text.trim().parse::<Timestamp>() else {
        return true;
    };
    let passed = Timestamp::now().duration_since(last);
    // After the clock was set back, do not postpone the run until it catches up.
    passed.is_negative() || passed.unsigned_abs() >= settings.expire_interval
}

/// Applies retention and records the result. Returns whether it was applied to every repository.
fn apply_now(settings: &ClusterSettings) -> bool {
    let now = Timestamp::now();
    let wish = Wish {
        system: None,
        now,
        dry_run: false,
    };
    let reports = expire(settings, wish, &|report| {
        for window in &report.vanishing {
            tracing::info!(
                cluster = %settings.name, repository = %report.repository, timeline = %window.branch,
                from = %time(window.from), to = %time(window.to),
                "these moments expire"
            );
        }
    });
    for report in &reports {
        if let Some(problem) = &report.problem {
            tracing::error!(cluster = %settings.name, repository = %report.repository, problem, "nothing expires");
        } else if report.did_something() {
            tracing::info!(
                cluster = %settings.name, repository = %report.repository, backups = report.removed.len(),
                objects = report.swept.objects, bytes = report.swept.bytes, locked = report.swept.locked,
                "retention was applied"
            );
        }
    }
    record(settings, now, &reports);
    let is_applied = outcome(&reports).is_ok();
    if is_applied && let Err(error) = std::fs::write(last_done(settings), now.to_string()) {
        tracing::warn!(%error, "the time of this run cannot be recorded; retention is applied again in a minute");
    }
    is_applied
}

/// Formats a time of a window for messages.
pub(crate) fn time(time: Option<PgTimestamp>) -> String {
    time.map_or_else(|| "an unknown time".to_owned(), |time| time.to_string())
}

#[cfg(test)]
mod tests {
    use crate::upkeep::expire::*;

    #[test]
    fn a_failed_run_is_retried_long_before_the_next_interval() {
        let day = Duration::from_secs(86_400);
        let pauses =
            |interval| [1, 2, 3, 6, 7, 1000].map(|failures| retry_pause(failures, interval));
        let seconds = |pauses: [Duration; 6]| pauses.map(|pause| pause.as_secs());
        assert_eq!(seconds(pauses(day)), [60, 120, 240, 1920, 3600, 3600]);
        assert_eq!(
            seconds(pauses(Duration::from_secs(100))),
            [60, 100, 100, 100, 100, 100]
        );
    }
}
