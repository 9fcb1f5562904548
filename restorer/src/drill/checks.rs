//! The checks of a drill: on the running server, then on its files.

use std::time::Instant;

use repository::{ExitKind, config::SqlCheck, name_losses};
use wal_format::{CheckVerdict, ControlFile, PgTimestamp};

use super::{
    Course, Drill, amcheck,
    children::{self, Ended},
    loss,
    server::{QUERY_MAX, Server, pg_checksums},
};
use crate::{RecoveryTarget, Result};

/// The parameter of a query that stands for the target's time.
const TARGET_TIME: &str = "$target_time";

/// A verdict, and the answer that it is based on.
pub(super) type Answer = (CheckVerdict, String);

pub(super) fn passed(answer: impl Into<String>) -> Answer {
    (CheckVerdict::Passed, answer.into())
}

pub(super) fn failed(answer: impl Into<String>) -> Answer {
    (CheckVerdict::Failed, answer.into())
}

pub(super) fn skipped(answer: impl Into<String>) -> Answer {
    (CheckVerdict::Skipped, answer.into())
}

/// A database that accepts connections, with its size.
#[derive(Clone, Debug)]
pub(super) struct Database {
    pub(super) name: String,
    pub(super) bytes: u64,
}

/// Makes every check that needs the running server.
///
/// # Errors
/// [`crate::Error::Interrupted`], and errors of starting a program.
pub(super) fn on_running(drill: &Drill<'_>, server: &Server, course: &mut Course) -> Result<()> {
    let began = Instant::now();
    // The start has compared the stop, the timeline and the system identifier.
    let stopped = course.record.stopped.clone().unwrap_or_default();
    let as_planned = passed(format!("stopped {stopped}, as planned"));
    course.check(
        "stop, timeline and system identifier",
        began,
        as_planned,
        ExitKind::Integrity,
    );
    base_backup(drill, course);
    objectives(drill, server, course)?;
    course.step("the databases are checked");
    let databases = databases(drill, server, course)?;
    if drill.options.amcheck_limit_bytes > 0 {
        course.step("pg_amcheck checks tables and indexes");
        amcheck::run(drill, server, &databases, course)?;
    }
    if drill.options.dump {
        course.step("pg_dump reads every row");
        dump(drill, server, &databases, course)?;
    }
    if !drill.cluster.drill.checks.is_empty() {
        course.step("the configured queries are made");
    }
    for check in &drill.cluster.drill.checks {
        let began = Instant::now();
        let answer = query(drill, server, check, course)?;
        course.check(
            &format!("query {}", check.name),
            began,
            answer,
            ExitKind::Failed,
        );
    }
    Ok(())
}

/// Fails if a newer base backup was passed over because it cannot be restored, and if this host
/// archived something that the repository lacks.
fn base_backup(drill: &Drill<'_>, course: &mut Course) {
    let passed_over = drill.plan.not_chosen.iter();
    let passed_over: Vec<String> = passed_over
        .map(|one| format!("{}: {}", one.backup, one.reason))
        .collect();
    let missing = &drill.archive.missing.losses;
    let answer = if !missing.is_empty() {
        failed(format!(
            "this host archived {}, which is not in {}",
            name_losses(missing),
            drill.archive.repository.url()
        ))
    } else if passed_over.is_empty() {
        passed(format!("{} ({})", drill.plan.backup, drill.plan.reason))
    } else {
        failed(format!(
            "a newer one cannot be restored: {}",
            passed_over.join("; ")
        ))
    };
    course.check("base backup", Instant::now(), answer, ExitKind::Integrity);
}

/// Compares the measured RTO and loss with their targets.
fn objectives(drill: &Drill<'_>, server: &Server, course: &mut Course) -> Result<()> {
    let began = Instant::now();
    let rto = course.outcome.rto_seconds.unwrap_or_default();
    let answer = match course.record.rto_target_seconds {
        Some(target) if rto > target => failed(format!(
            "{rto:.1} s until the first answer, the target is {target:.1} s: take base backups more often, or restore \
             with more --jobs or from a nearer repository"
        )),
        Some(target) => passed(format!(
            "{rto:.1} s until the first answer, the target is {target:.1} s"
        )),
        None => skipped(format!(
            "{rto:.1} s until the first answer; rto_target is not set"
        )),
    };
    course.check("RTO", began, answer, ExitKind::Failed);

    let began = Instant::now();
    let newest = loss::newest_known(drill.archive, drill.target, drill.plan)?;
    // In microseconds since 2000, as `PgTimestamp`.
    let sql = "SELECT (extract(epoch FROM pg_last_xact_replay_timestamp() - '2000-01-01 00:00:00+00') * 1000000)::bigint";
    let asked = server
        .address
        .query("template1", sql, QUERY_MAX, drill.interrupt)?;
    let answer = match asked {
        Err(refused) => failed(format!(
            "the last replayed transaction is unknown: {}",
            refused.message
        )),
        Ok(rows) => {
            let replayed = rows.into_iter().flatten().next();
            let replayed = replayed
                .and_then(|micros| micros.parse().ok())
                .map(PgTimestamp)
                .max(loss::at_stop(drill.plan));
            course.record.newest_commit = newest.map(|newest| newest.time);
            course.record.replayed_commit = replayed;
            course.outcome.loss_seconds = loss::seconds(newest, replayed, drill.plan);
            judge_loss(course)
        }
    };
    course.check("data loss", began, answer, ExitKind::Failed);
    Ok(())
}

fn judge_loss(course: &Course) -> Answer {
    let time = |time: Option<PgTimestamp>, none: &str| {
        time.map_or_else(|| none.to_owned(), |time| time.to_string())
    };
    let newest = time(course.record.newest_commit, "none");
    let replayed = time(course.record.replayed_commit, "none");
    let found =
        format!("newest commit up to the target in the archive {newest}, last replayed {replayed}");
    match (
        course.outcome.loss_seconds,
        course.record.rpo_target_seconds,
    ) {
        (Some(loss), Some(target)) if loss > target => failed(format!(
            "{loss:.1} s of commits are lost, the target is {target:.1} s: {found}; `pitr-restore list` shows missing WAL"
        )),
        (Some(loss), Some(target)) => {
            passed(format!("{loss:.1} s, the target is {target:.1} s: {found}"))
        }
        (Some(loss), None) => passed(format!("{loss:.1} s: {found}")),
        (None, _) => failed(format!(
            "the archive has commits after the backup, and none was replayed: {found}"
        )),
    }
}

/// Connects to every database. Returns those that accept connections.
fn databases(drill: &Drill<'_>, server: &Server, course: &mut Course) -> Result<Vec<Database>> {
    let began = Instant::now();
    // A database whose removal was interrupted has the limit -2 and accepts no connection.
    let sql = "SELECT pg_database_size(oid)::text || ' ' || datname FROM pg_catalog.pg_database \
               WHERE datallowconn AND datconnlimit <> -2 ORDER BY datname";
    let asked = server
        .address
        .query("template1", sql, QUERY_MAX, drill.interrupt)?;
    let rows = match asked {
        Ok(rows) => rows,
        Err(refused) => {
            course.check(
                "databases",
                began,
                failed(refused.message),
                ExitKind::Integrity,
            );
            return Ok(Vec::new());
        }
    };
    let found: Vec<Database> = rows
        .into_iter()
        .flatten()
        .filter_map(|row| {
            let (bytes, name) = row.split_once(' ')?;
            let bytes = bytes.parse().ok()?;
            let name = name.to_owned();
            Some(Database { name, bytes })
        })
        .collect();
    if found.is_empty() {
        let none = failed("the restored server has no database that accepts connections");
        course.check("databases", began, none, ExitKind::Integrity);
    }
    let mut open = Vec::new();
    for database in found {
        let began = Instant::now();
        let sql = "SELECT count(*) FROM pg_catalog.pg_class WHERE relkind = 'r'";
        let asked = server
            .address
            .query(&database.name, sql, QUERY_MAX, drill.interrupt)?;
        let is_open = asked.is_ok();
        let answer = match asked {
            Ok(rows) => {
                let tables = rows.into_iter().flatten().next().unwrap_or_default();
                passed(format!("{tables} tables, {} bytes", database.bytes))
            }
            Err(refused) => failed(refused.message),
        };
        let name = format!("connection to {}", database.name);
        course.check(&name, began, answer, ExitKind::Integrity);
        if is_open {
            open.push(database);
        }
    }
    Ok(open)
}

/// Dumps every database to nowhere.
fn dump(
    drill: &Drill<'_>,
    server: &Server,
    databases: &[Database],
    course: &mut Course,
) -> Result<()> {
    for database in databases {
        let began = Instant::now();
        let name = format!("pg_dump of {}", database.name);
        let answer = match server.program("pg_dump") {
            None => {
                failed("pg_dump of the server's version is not installed, and --dump asks for it")
            }
            Some(mut command) => {
                command.env("PGDATABASE", &database.name).args([
                    "--no-password",
                    "--file",
                    "/dev/null",
                ]);
                let limit = drill.options.check_timeout;
                let ended = children::run(&mut command, limit, drill.interrupt)?;
                answer_of(&ended, limit, "every row was read")
            }
        };
        course.check(&name, began, answer, ExitKind::Integrity);
    }
    Ok(())
}

/// Returns the answer of a program whose exit code is its verdict.
pub(super) fn answer_of(ended: &Ended, limit: std::time::Duration, success: &str) -> Answer {
    if ended.succeeded() {
        passed(success)
    } else {
        failed(ended.reason(limit))
    }
}

/// Makes a configured check.
fn query(drill: &Drill<'_>, server: &Server, check: &SqlCheck, course: &Course) -> Result<Answer> {
    let mut sql = check.query.clone();
    if sql.contains(TARGET_TIME) {
        let time = match drill.target {
            RecoveryTarget::Time { time, .. } => Some(*time),
            _ => course
                .record
                .newest_commit
                .or(course.record.replayed_commit),
        };
        let Some(time) = time else {
            return Ok(failed(format!(
                "{TARGET_TIME} has no value: the archive has no commit; drill again after one, or with --target-time"
            )));
        };
        sql = sql.replace(TARGET_TIME, &format!("'{time}'::timestamptz"));
    }
    let mut address = server.address.clone();
    if let Some(user) = &check.user {
        address.user.clone_from(user);
    }
    let asked = address.query(&check.database, &sql, check.timeout, drill.interrupt)?;
    Ok(match asked {
        Err(refused) => failed(refused.message),
        Ok(rows) => {
            let is_empty = rows.is_empty();
            let first = rows.into_iter().next().flatten();
            let shown = match &first {
                Some(answer) => format!("\"{answer}\""),
                None if is_empty => "no row".to_owned(),
                None => "NULL".to_owned(),
            };
            let found = format!("answered {shown}, expected is {}", check.expect);
            if check.expect.accepts(first.as_deref()) {
                passed(found)
            } else {
                failed(found)
            }
        }
    })
}

/// Checks the pages of the stopped server. `stopped` is false if it did not end in time.
///
/// # Errors
/// [`crate::Error::Interrupted`], and errors of starting a program.
pub(super) fn on_stopped(drill: &Drill<'_>, stopped: bool, course: &mut Course) -> Result<()> {
    let began = Instant::now();
    let data = &drill.destination.directory;
    let control = std::fs::read(data.join("global/pg_control")).ok();
    let control = control.and_then(|content| ControlFile::parse(&content).ok());
    let answer = match control {
        _ if !stopped => failed("PostgreSQL did not shut down, so its files cannot be checked"),
        None => failed("pg_control cannot be read after the shutdown"),
        Some(control) if !control.data_checksums => {
            skipped("the cluster has no page checksums; `pg_checksums --enable` adds them")
        }
        Some(_) => {
            course.step("pg_checksums reads every page");
            match pg_checksums(drill.postgres, data) {
                None => skipped("pg_checksums of the server's version is not installed"),
                Some(mut command) => {
                    let limit = drill.options.check_timeout;
                    let ended = children::run(&mut command, limit, drill.interrupt)?;
                    answer_of(&ended, limit, "every page has its checksum")
                }
            }
        }
    };
    course.check("pg_checksums", began, answer, ExitKind::Integrity);
    Ok(())
}
