//! `--start`: runs PostgreSQL on the restored directory, waits until recovery has ended, compares the stop with the plan.

use std::{
    fs::{self, OpenOptions},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use repository::{Repository, durable};
use rustix::process::{Pid, Signal, kill_process};
use wal_format::{Lsn, PgVersion};

use crate::{Error, RestorePlan, Result, Stop, execute::Action, wal_fetch};

/// PostgreSQL's log of the recovery.
pub const LOG: &str = "tidemark_recovery.log";
/// How often the log is looked at.
const POLL: Duration = Duration::from_millis(50);
/// What PostgreSQL 14 and later say before they pause for good.
const INSUFFICIENT: &str = "because of insufficient parameter settings";

/// How the recovery ended.
#[derive(Clone, Debug)]
pub struct Recovered {
    /// Where it stopped, in PostgreSQL's words.
    pub stopped: String,
    /// How long it took.
    pub duration: Duration,
    /// The server that is running; `None` after a shutdown at the target.
    pub process: Option<u32>,
}

/// Finds `postgres` of a major version: in `given`, else in the usual places.
///
/// # Errors
/// [`Error::Usage`] with the places that were looked at.
pub fn find_postgres(given: Option<&Path>, version: PgVersion) -> Result<PathBuf> {
    let major = version.major();
    let mut places: Vec<PathBuf> = Vec::new();
    match given {
        Some(directory) => places.push(directory.to_owned()),
        None => {
            places.push(format!("/usr/lib/postgresql/{major}/bin").into());
            places.push(format!("/usr/pgsql-{major}/bin").into());
            places.push(format!("/usr/local/pgsql-{major}/bin").into());
            places.extend(std::env::split_paths(
                &std::env::var_os("PATH").unwrap_or_default(),
            ));
        }
    }
    let mut others: Vec<String> = Vec::new();
    for place in &places {
        let program = place.join("postgres");
        let said = Command::new(&program).arg("--version").output();
        let Ok(said) = said else { continue };
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        let found = said.split_whitespace().find_map(|word| {
            word.split(['.', 'd', 'b', 'r'])
                .next()
                .and_then(|number| number.parse::<u16>().ok())
        });
        if found == Some(major) {
            return Ok(program);
        }
        if !said.trim().is_empty() {
            others.push(format!("{} is {}", program.display(), said.trim()));
        }
    }
    Err(Error::usage(format!(
        "the backup is of PostgreSQL {major}, and no server program of it was found{}; name its directory with --pg-bin",
        if others.is_empty() {
            String::new()
        } else {
            format!(" ({})", others.join(", "))
        }
    )))
}

/// Starts PostgreSQL and waits for the end of recovery. `buffers` are its `shared_buffers`, for as long as it runs: how many
/// a server has changes nothing of what it recovers, and no primary's setting is held against it
/// (`CheckRequiredParameterValues`).
///
/// It takes no connections meanwhile, unless it is to stay read-only: nobody is shown a moment before the target; replay does
/// not keep the list of running transactions, which is for readers alone (`standbyState` in `xlogutils.h`); and a server with fewer connections than the primary had, which could not show them all, recovers.
///
/// # Errors
/// [`Error::RecoveryFailed`] with the log's end, [`Error::PlanMismatch`].
pub fn start(
    postgres: &Path,
    directory: &Path,
    repository: &Repository,
    plan: &RestorePlan,
    action: Action,
    buffers: Option<&str>,
) -> Result<Recovered> {
    let log = directory.join(LOG);
    durable::remove(&log).map_err(Error::local)?;
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log)
        .map_err(Error::io("create", &log))?;
    let errors = file.try_clone().map_err(Error::io("open", &log))?;
    let readers = match action {
        Action::Pause => "hot_standby=on",
        Action::Promote | Action::Shutdown => "hot_standby=off",
    };
    let began = Instant::now();
    let mut server = Command::new(postgres)
        .arg("-D")
        .arg(directory)
        // The log is read here: in English, and into this file whatever the restored settings say. At "log" it would hold
        // no warnings, which name the settings that recovery can not go on with.
        .args([
            "-c",
            "lc_messages=C",
            "-c",
            "logging_collector=off",
            "-c",
            "log_destination=stderr",
        ])
        .args(["-c", "log_min_messages=warning", "-c", readers])
        .args(
            buffers
                .iter()
                .flat_map(|size| ["-c".to_owned(), format!("shared_buffers={size}")]),
        )
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(errors)
        .spawn()
        .map_err(Error::io("start", postgres))?;
    let outcome = wait(&mut server, &log, action).and_then(|text| compare(&text, plan));
    let stopped = match outcome {
        Ok(stopped) => stopped,
        Err(error) => {
            // A copy that is not what was planned must not go on to take connections.
            stop(&mut server);
            return Err(reason(&log, repository, plan).unwrap_or(error));
        }
    };
    let running = server
        .try_wait()
        .map_err(Error::io("wait for", postgres))?
        .is_none();
    Ok(Recovered {
        stopped,
        duration: began.elapsed(),
        process: running.then(|| server.id()),
    })
}

/// Why the recovery got no WAL, if that is why it failed: the file that PostgreSQL names is asked for once more.
fn reason(log: &Path, repository: &Repository, plan: &RestorePlan) -> Option<Error> {
    let text = fs::read(log).ok()?;
    let text = String::from_utf8_lossy(&text);
    let (_, rest) = text.split_once("FATAL:  could not restore file \"")?;
    let (name, _) = rest.split_once('"')?;
    wal_fetch::probe(repository, plan, name).err()
}

/// Asks for an immediate shutdown: nothing in the copy is worth keeping, and it can be recovered anew.
fn stop(server: &mut Child) {
    let pid = Pid::from_child(server);
    if let Err(error) = kill_process(pid, Signal::QUIT) {
        tracing::debug!(%error, "the server had ended already");
    }
    if let Err(error) = server.wait() {
        tracing::warn!(%error, "the end of the server could not be waited for");
    }
}

/// Waits until the log says that recovery has ended as `action` wants.
fn wait(server: &mut Child, log: &Path, action: Action) -> Result<String> {
    loop {
        let ended = server.try_wait().map_err(Error::io("wait for", log))?;
        let text = fs::read(log).map_err(Error::io("read", log))?;
        let text = String::from_utf8_lossy(&text).into_owned();
        let done = match action {
            Action::Pause => text.contains("pausing at the end of recovery"),
            Action::Promote => {
                text.contains("archive recovery complete")
                    && text.contains("database system is ready to accept connections")
            }
            Action::Shutdown => ended.is_some() && text.contains("shutdown at recovery target"),
        };
        if done {
            return Ok(text);
        }
        // The primary was given more of something after the backup (`CheckRequiredParameterValues`): PostgreSQL would
        // wait here for somebody to shut it down.
        let small = text
            .lines()
            .find(|line| line.contains("is a lower setting than on the primary server"));
        if let Some(line) = small.filter(|_| text.contains(INSUFFICIENT)) {
            let said = line.split_once("DETAIL:").map_or(line, |(_, said)| said);
            return Err(Error::InsufficientParameter {
                said: said.trim().to_owned(),
            });
        }
        if text.contains("recovery has paused") {
            return Err(Error::RecoveryFailed {
                log: log.to_owned(),
                said: "recovery has paused before its target".to_owned(),
            });
        }
        if ended.is_some() {
            return Err(Error::RecoveryFailed {
                log: log.to_owned(),
                said: last_words(&text),
            });
        }
        thread::sleep(POLL);
    }
}

/// The message with which a server ended: its last FATAL or PANIC, with the hint that follows it.
fn last_words(text: &str) -> String {
    let fatal = |line: &&str| line.contains("FATAL:") || line.contains("PANIC:");
    let lines: Vec<&str> = text.lines().collect();
    let Some(at) = lines.iter().rposition(fatal) else {
        return lines.last().copied().unwrap_or("nothing").to_owned();
    };
    let message = |line: &str| {
        let after = ["FATAL:", "PANIC:", "HINT:", "DETAIL:"]
            .iter()
            .find_map(|word| line.split_once(word).map(|(_, after)| after));
        after.unwrap_or(line).trim().to_owned()
    };
    let follows = lines[at..].iter().skip(1).take(3);
    let more = follows.filter(|line| line.contains("HINT:") || line.contains("DETAIL:"));
    let said: Vec<String> = [lines[at]]
        .iter()
        .chain(more)
        .map(|line| message(line))
        .collect();
    said.join("; ")
}

/// PostgreSQL's own word on where it stopped, held against the plan.
fn compare(text: &str, plan: &RestorePlan) -> Result<String> {
    let line = text.lines().find(|line| line.contains("recovery stopping"));
    let found = line
        .and_then(|line| line.split_once("recovery stopping"))
        .map_or("nowhere", |(_, rest)| rest.trim())
        .to_owned();
    let position = |prefix: &str| -> Option<Lsn> {
        found.strip_prefix(prefix)?.split('"').nth(1)?.parse().ok()
    };
    let agrees = match plan.stop {
        Stop::Before { lsn } => position("before WAL location (LSN)") == Some(lsn),
        Stop::After { lsn } => position("after WAL location (LSN)") == Some(lsn),
        Stop::Consistent => found.starts_with("after reaching consistency"),
    };
    if agrees {
        return Ok(found);
    }
    Err(Error::PlanMismatch {
        planned: plan.stop.to_string(),
        found,
    })
}
