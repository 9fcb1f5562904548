//! `pitr-restore drill`: restores into a scratch directory, starts PostgreSQL there without any
//! connection to its parent, checks it, measures, and records the result.
//!
//! plan (`cli/drill.rs`) -> scratch -> copy -> recovery -> checks -> stop -> page checksums ->
//! outcome and report
//!
//! Invariant: a drill passes only if every step was made and every check holds. A check that was
//! not made is recorded as skipped, with the reason. The scratch directory is removed whatever the
//! result is.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use indicatif::ProgressBar;
use jiff::Timestamp;
use repository::{ExitKind, config::ClusterSettings};
use wal_format::{
    CheckVerdict, DrillCheck, DrillRecord, DrillStep, Outcome, OutcomeKind, PgTimestamp,
};

use crate::{
    Error, RestorePlan, Result,
    execute::{self, Destination},
    inventory::{Archive, Inventory},
    start::{self, Interrupt, Start},
    target::RecoveryTarget,
};

mod amcheck;
mod checks;
mod children;
mod loss;
pub(crate) mod pick;
pub(crate) mod report;
pub(crate) mod scratch;
mod server;

use server::Server;

/// A drill whose plan is made.
pub(crate) struct Drill<'a> {
    pub(crate) archive: &'a Arc<Archive>,
    pub(crate) cluster: &'a ClusterSettings,
    pub(crate) target: &'a RecoveryTarget,
    pub(crate) plan: &'a RestorePlan,
    pub(crate) destination: &'a Destination,
    /// The directory that holds the copy.
    pub(crate) directory: &'a Path,
    /// The server's program.
    pub(crate) postgres: &'a Path,
    pub(crate) interrupt: &'a Interrupt,
    pub(crate) bar: &'a ProgressBar,
    pub(crate) tell: &'a dyn Fn(&str),
    pub(crate) options: Options,
}

/// The options of the checks.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// True to run `pg_dump` on every database.
    pub(crate) dump: bool,
    /// The bytes of each database that `pg_amcheck` checks; 0 for none.
    pub(crate) amcheck_limit_bytes: u64,
    /// The time limit of each program.
    pub(crate) check_timeout: Duration,
    /// The time without progress after which the recovery is given up.
    pub(crate) recovery_timeout: Duration,
    /// `shared_buffers` of the server.
    pub(crate) buffers: Option<String>,
}

/// The first failure of a drill.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) kind: ExitKind,
    pub(crate) message: String,
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        Self {
            kind: error.exit_kind(),
            message: error.to_string(),
        }
    }
}

/// The outcome of a drill while it runs.
#[derive(Debug)]
pub(crate) struct Course {
    began: Instant,
    pub(crate) outcome: Outcome,
    pub(crate) record: DrillRecord,
    failures: Vec<Failure>,
}

impl Course {
    /// Begins the outcome of a drill of `cluster`. The RTO counts from `began`.
    pub(crate) fn begin(
        cluster: &ClusterSettings,
        target: String,
        seed: Option<u64>,
        began: Instant,
    ) -> Self {
        let now = Timestamp::now();
        let at = PgTimestamp::from_jiff(now);
        let id = repository::outcome_name(now).expect("BUG: the year has four digits");
        let actor = repository::actor("pitr-restore");
        let host = actor.host.clone();
        let mut outcome = Outcome::new(OutcomeKind::Drill, id, at, at, false, String::new());
        outcome.actor = Some(actor);
        Self {
            began,
            outcome,
            record: DrillRecord {
                target,
                seed,
                host,
                rto_target_seconds: cluster.rto_target.map(|target| target.as_secs_f64()),
                rpo_target_seconds: Some(cluster.rpo_target.as_secs_f64()),
                ..DrillRecord::default()
            },
            failures: Vec::new(),
        }
    }

    /// Records the begin of a step.
    pub(crate) fn step(&mut self, step: impl Into<String>) {
        self.record.steps.push(DrillStep {
            at: PgTimestamp::from_jiff(Timestamp::now()),
            step: step.into(),
        });
    }

    /// Records a check that began at `began`. A failed check fails the drill with `kind`.
    fn check(
        &mut self,
        name: &str,
        began: Instant,
        (verdict, answer): (CheckVerdict, String),
        kind: ExitKind,
    ) {
        if verdict == CheckVerdict::Failed {
            self.fail(Failure {
                kind,
                message: format!("{name}: {answer}"),
            });
        }
        self.record.checks.push(DrillCheck {
            name: name.to_owned(),
            verdict,
            answer,
            seconds: began.elapsed().as_secs_f64(),
        });
    }

    pub(crate) fn fail(&mut self, failure: Failure) {
        self.failures.push(failure);
    }

    /// Ends the drill. Returns its outcome and the first failure.
    pub(crate) fn end(mut self) -> (Outcome, Option<Failure>) {
        let count = |verdict| {
            let checks = self.record.checks.iter();
            checks.filter(|check| check.verdict == verdict).count()
        };
        let (passed, skipped) = (count(CheckVerdict::Passed), count(CheckVerdict::Skipped));
        self.outcome.passed = self.failures.is_empty();
        self.outcome.message = match self.failures.as_slice() {
            [] => {
                let rto = self.outcome.rto_seconds.unwrap_or_default();
                format!(
                    "restored {} in {rto:.1} s; {passed} checks passed, {skipped} skipped",
                    self.record.target
                )
            }
            [only] => only.message.clone(),
            [first, others @ ..] => {
                format!("{} (and {} more failures)", first.message, others.len())
            }
        };
        self.step(if self.outcome.passed {
            "the drill has passed"
        } else {
            "the drill has failed"
        });
        self.outcome.finished = PgTimestamp::from_jiff(Timestamp::now());
        self.outcome.drill = Some(Box::new(self.record));
        (self.outcome, self.failures.into_iter().next())
    }
}

/// Restores, starts the server, checks it and stops it. Failures of checks are recorded in
/// `course`.
///
/// # Errors
/// The error that prevents the rest of the drill, also [`Error::Interrupted`].
pub(crate) fn run(drill: &Drill<'_>, course: &mut Course) -> Result<()> {
    let plan = drill.plan;
    let identity = drill.archive.identity();
    course.outcome.backup = Some(plan.backup.clone());
    course.record.timeline = plan.path.last().map(|part| part.branch.timeline.get());
    course.step(format!(
        "the copy of base backup {} begins: {} bytes to fetch",
        plan.backup, plan.backup_bytes
    ));
    let (copied, executed) = copy(drill)?;
    course.outcome.fetched_bytes = Some(plan.backup_bytes);
    course.outcome.fetch_seconds = Some(copied.as_secs_f64());
    course.step(format!(
        "PostgreSQL starts and replays {} bytes of WAL from {}",
        plan.replayed_bytes, plan.start_lsn
    ));
    let recovered = start::start(&Start {
        postgres: drill.postgres,
        version: identity.postgresql_major,
        directory: &drill.destination.directory,
        repository: &drill.archive.repository,
        system: identity.system_identifier,
        timeout: drill.options.recovery_timeout,
        segment_size: identity.wal_segment_size,
        plan,
        action: drill.destination.recovery.action,
        buffers: drill.options.buffers.as_deref(),
        tell: drill.tell,
    })?;
    let mut server = Server::new(drill, &executed, &recovered)?;
    course.outcome.replayed_bytes = Some(plan.replayed_bytes);
    course.outcome.replay_seconds = Some(recovered.duration.as_secs_f64());
    course.record.stopped = Some(recovered.stopped);
    server.find_user(drill, course)?;
    let rto = course.began.elapsed().as_secs_f64();
    course.outcome.rto_seconds = Some(rto);
    course.step(format!(
        "the first query is answered, {rto:.1} s after the begin"
    ));
    checks::on_running(drill, &server, course)?;
    course.step("PostgreSQL is stopped");
    let stopped = server.stop(drill.interrupt)?;
    checks::on_stopped(drill, stopped, course)?;
    Ok(())
}

/// Copies the backup. Returns the duration. After a signal, the thread that copies is left alone:
/// the scratch directory is removed and the program ends.
fn copy(drill: &Drill<'_>) -> Result<(Duration, execute::Executed)> {
    let began = Instant::now();
    let (archive, plan) = (Arc::clone(drill.archive), drill.plan.clone());
    let (destination, bar) = (drill.destination.clone(), drill.bar.clone());
    let executed = drill.interrupt.run(move || {
        let (executed, _lock) =
            execute::execute(&archive, &plan, &destination, &|bytes| bar.inc(bytes))?;
        Ok(executed)
    })?;
    drill.bar.finish_and_clear();
    Ok((began.elapsed(), executed))
}

/// Writes the access rules of the copy: every role, only from the socket in the scratch directory,
/// which only the drill's user may enter. Returns the settings that name them.
///
/// # Errors
/// [`Error::Io`]; [`Error::Usage`] if the path of the socket would be too long.
pub(crate) fn prepare_access(directory: &Path) -> Result<Vec<(String, String)>> {
    /// The maximum length of a Unix socket's path (`sun_path`).
    const SOCKET_PATH_MAX: usize = 107;
    let sockets = directory.join("socket");
    let longest = sockets.join(".s.PGSQL.65535");
    if longest.as_os_str().len() > SOCKET_PATH_MAX {
        return Err(Error::usage(format!(
            "the path {} is longer than the {SOCKET_PATH_MAX} bytes that a socket may have; give a shorter directory with \
             --scratch or drill_scratch",
            longest.display()
        )));
    }
    std::fs::create_dir(&sockets).map_err(Error::io("create directory", &sockets))?;
    let file = |name: &str, content: &str| -> Result<PathBuf> {
        let path = directory.join(name);
        std::fs::write(&path, content).map_err(Error::io("write", &path))?;
        Ok(path)
    };
    let hba = file("pg_hba.conf", "local all all trust\n")?;
    let ident = file("pg_ident.conf", "")?;
    let setting = |name: &str, path: &Path| (name.to_owned(), path.display().to_string());
    Ok(vec![
        setting("hba_file", &hba),
        setting("ident_file", &ident),
        setting("unix_socket_directories", &sockets),
    ])
}
