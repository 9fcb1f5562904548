//! `--start`: runs PostgreSQL on the restored directory, waits until recovery has ended, and proves
//! that it ended at the planned point (`proof.rs`). A hang (`stall.rs`), a crash loop, a pause, an
//! early end, a signal (`interrupt.rs`) and a wrong stop are different errors.
//!
//! Invariant: a server outlives this program only after its recovery was compared with the plan.

use std::{
    fs::{self, OpenOptions},
    io::{ErrorKind, IsTerminal},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use repository::{Repository, durable};
use rustix::process::{Pid, Signal, kill_process};
use wal_format::{PgVersion, SegmentSize, SystemIdentifier};

use crate::{
    Error, RestorePlan, Result, Stop,
    execute::{Action, recovery},
    isolation, wal_fetch,
};

mod interrupt;
mod log;
mod progress;
mod proof;
mod stall;

pub(crate) use self::{interrupt::Interrupt, progress::SILENCE_MAX};
use self::{
    log::{Events, Log},
    progress::{Progress, waits_for},
    proof::prove,
    stall::{Stall, descendants, processor_time},
};

/// PostgreSQL's log of the recovery.
pub const LOG: &str = "tidemark_recovery.log";
/// The interval at which the log is read.
const POLL: Duration = Duration::from_millis(50);
/// The time in which a server ends after an immediate shutdown, before it is killed.
const STOP_MAX: Duration = Duration::from_secs(30);
/// The number of crashes after which a recovery that restarts each time is given up.
const CRASHES_MAX: u32 = 3;
/// The first version that logs the LSN of a running redo (`log_startup_progress_interval`).
const REPORTS_REDO: u16 = 15;

/// The result of a recovery.
#[derive(Clone, Debug)]
pub struct Recovered {
    /// The place where it stopped, in PostgreSQL's words.
    pub stopped: String,
    /// Its duration.
    pub duration: Duration,
    /// The process ID of the running server; `None` after a shutdown at the target.
    pub process: Option<u32>,
}

/// Finds `postgres` of a major version: in `given`, else in the usual directories.
///
/// # Errors
/// [`Error::Usage`] with the directories that were searched.
pub fn find_postgres(given: Option<&Path>, version: PgVersion) -> Result<PathBuf> {
    let major = version.major();
    let mut places: Vec<PathBuf> = Vec::new();
    match given {
        Some(directory) => places.push(directory.to_owned()),
        None => {
            places.extend(usual_directories(major));
            places.extend(std::env::split_paths(
                &std::env::var_os("PATH").unwrap_or_default(),
            ));
        }
    }
    let mut others: Vec<String> = Vec::new();
    for place in &places {
        let program = place.join("postgres");
        let output = match Command::new(&program).arg("--version").output() {
            Ok(output) => output,
            // A usual directory need not exist, but a directory that the user named must.
            Err(error) => {
                if given.is_some() {
                    others.push(format!("{}: {error}", program.display()));
                }
                continue;
            }
        };
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            let errors = String::from_utf8_lossy(&output.stderr);
            let reason = errors.lines().find(|line| !line.trim().is_empty());
            let program = program.display();
            others.push(match reason {
                Some(reason) => format!("{program} does not start: {}", reason.trim()),
                None => format!("{program} does not start: {}", output.status),
            });
            continue;
        }
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

/// Returns the directories in which packages install the programs of a major version.
pub(crate) fn usual_directories(major: u16) -> [PathBuf; 3] {
    [
        format!("/usr/lib/postgresql/{major}/bin").into(),
        format!("/usr/pgsql-{major}/bin").into(),
        format!("/usr/local/pgsql-{major}/bin").into(),
    ]
}

/// Returns the program `name` of the same installation as the server program `postgres`, if it is
/// there.
///
/// `postgres` may be a link in a directory of the PATH whose other programs are not of its version:
/// Debian's `pg_wrapper` has the names of client programs there.
#[must_use]
pub fn sibling(postgres: &Path, name: &str) -> Option<PathBuf> {
    let program = fs::canonicalize(postgres).ok()?.with_file_name(name);
    let real = fs::canonicalize(&program).ok()?;
    real.ends_with(name).then_some(program)
}

/// A server to start.
#[derive(Clone, Copy)]
pub struct Start<'a> {
    /// The server's program.
    pub postgres: &'a Path,
    /// The server's version.
    pub version: PgVersion,
    /// The restored directory.
    pub directory: &'a Path,
    /// The repository from which the recovery reads WAL.
    pub repository: &'a Repository,
    /// The system identifier of the cluster.
    pub system: SystemIdentifier,
    /// The time without any progress after which the recovery is given up.
    pub timeout: Duration,
    /// The size of the server's WAL segments.
    pub segment_size: SegmentSize,
    /// The plan that the stop is compared with.
    pub plan: &'a RestorePlan,
    /// The action at the target.
    pub action: Action,
    /// The value of `shared_buffers` until the next restart; `None` for the configured one. It has
    /// no influence on the result of recovery, and recovery does not compare it with the primary's
    /// value (`CheckRequiredParameterValues`).
    pub buffers: Option<&'a str>,
    /// Receives each progress report.
    pub tell: &'a dyn Fn(&str),
}

impl std::fmt::Debug for Start<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Start")
            .field("postgres", &self.postgres)
            .field("directory", &self.directory)
            .finish_non_exhaustive()
    }
}

/// Starts PostgreSQL and waits for the end of recovery.
///
/// Except with [`Action::Pause`], the server accepts no connections during recovery (`hot_standby`
/// is off), for three reasons:
/// 1. No reader sees a state before the target.
/// 2. Replay does not need to maintain the list of running transactions, which only readers need
///    (`standbyState` in `xlogutils.h`).
/// 3. A server with a smaller `max_connections` than the primary's, which could not track all its
///    transactions, can recover.
///
/// The server runs in its own process group, so that a signal to the caller's group does not reach
/// it. Until recovery has ended, a signal to this program stops the server.
///
/// # Errors
/// [`Error::RecoveryFailed`] with PostgreSQL's first error, [`Error::RecoveryStalled`],
/// [`Error::RecoveryCrashes`], [`Error::RecoveryPaused`], [`Error::Interrupted`],
/// [`Error::PlanMismatch`].
pub fn start(wanted: &Start<'_>) -> Result<Recovered> {
    let Start {
        postgres,
        directory,
        ..
    } = *wanted;
    let path = directory.join(LOG);
    durable::remove(&path).map_err(Error::local)?;
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .map_err(Error::io("create", &path))?;
    let errors = file.try_clone().map_err(Error::io("open", &path))?;
    let began = Instant::now();
    let interrupt = Interrupt::catch()?;
    let mut server = Command::new(postgres)
        .arg("-D")
        .arg(directory)
        .args(arguments(wanted))
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(errors)
        .spawn()
        .map_err(Error::io("start", postgres))?;
    let mut log = Log::open(&path, wanted.segment_size).map_err(Error::io("open", &path))?;
    let outcome = wait(&mut server, &mut log, &interrupt, wanted)
        .and_then(|()| {
            let (directory, seen) = (directory.to_owned(), log.seen.clone());
            let (plan, system, action) = (wanted.plan.clone(), wanted.system, wanted.action);
            interrupt.run(move || prove(&directory, &seen, &plan, system, action))
        })
        .and_then(|stopped| {
            // PostgreSQL has run it already, unless the program is no longer at its path.
            isolation::recovery_ended(directory)?;
            interrupt.check()?;
            Ok(stopped)
        });
    let stopped = match outcome {
        Ok(stopped) => stopped,
        Err(error) => {
            // A copy that differs from the plan must not continue and accept connections.
            stop(&mut server, &interrupt, wanted.tell);
            if let Err(error) = recovery::stopped(directory) {
                tracing::warn!(%error, "the same command will refuse this directory");
            }
            let (repository, plan) = (wanted.repository.clone(), wanted.plan.clone());
            let search = interrupt.run(move || Ok(reason(&path, &repository, &plan)));
            return Err(search.ok().flatten().unwrap_or(error));
        }
    };
    forget_arguments(wanted)?;
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

/// Removes our arguments from `postmaster.opts`, from which `pg_ctl restart` takes them. Each is in
/// double quotes there (`CreateOptsFile` in `postmaster.c`).
fn forget_arguments(wanted: &Start<'_>) -> Result<()> {
    let path = wanted.directory.join("postmaster.opts");
    let content = match fs::read_to_string(&path) {
        Ok(content) => content,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("read", path)(error)),
    };
    let ours: String = arguments(wanted)
        .iter()
        .map(|argument| format!(" \"{argument}\""))
        .collect();
    let rest = content.replacen(&ours, "", 1);
    durable::replace(&path, rest.as_bytes()).map_err(Error::local)
}

/// Returns the arguments after the data directory.
fn arguments(wanted: &Start<'_>) -> Vec<String> {
    // This process reads the log, so it has to be in English and in this file, whatever the
    // restored settings say. At the level "log" it would lack the warnings, which name the settings
    // with which recovery cannot continue.
    let mut settings = vec![
        "lc_messages=C".to_owned(),
        "logging_collector=off".to_owned(),
        "log_destination=stderr".to_owned(),
        "log_min_messages=warning".to_owned(),
    ];
    settings.push(match wanted.action {
        Action::Pause => "hot_standby=on".to_owned(),
        Action::Promote | Action::Shutdown => "hot_standby=off".to_owned(),
    });
    if wanted.version.major() >= REPORTS_REDO {
        settings.push("log_startup_progress_interval=1s".to_owned());
    }
    if let Some(size) = wanted.buffers {
        settings.push(format!("shared_buffers={size}"));
    }
    let pair = |setting: String| ["-c".to_owned(), setting];
    settings.into_iter().flat_map(pair).collect()
}

/// Returns the reason why the recovery got no WAL, if it failed because of that: fetches the file
/// that PostgreSQL names once more.
fn reason(log: &Path, repository: &Repository, plan: &RestorePlan) -> Option<Error> {
    let text = fs::read(log).ok()?;
    let text = String::from_utf8_lossy(&text);
    let (_, rest) = text.split_once("FATAL:  could not restore file \"")?;
    let (name, _) = rest.split_once('"')?;
    wal_fetch::probe(repository, plan, name).err()
}

/// Stops the server with an immediate shutdown. Nothing in the copy has to be preserved, and it can
/// be recovered again. A signal during this time kills the server.
fn stop(server: &mut Child, interrupt: &Interrupt, tell: &dyn Fn(&str)) {
    let pid = Pid::from_child(server);
    if let Err(error) = kill_process(pid, Signal::QUIT) {
        tracing::debug!(%error, "the server had ended already");
    }
    let (began, signals) = (Instant::now(), interrupt.count());
    loop {
        match server.try_wait() {
            Ok(Some(_)) => return,
            Ok(None) if interrupt.count() > signals => {
                tell("another signal came: the server is killed");
                break;
            }
            Ok(None) if began.elapsed() < STOP_MAX => thread::sleep(POLL),
            Ok(None) => break,
            Err(error) => {
                tracing::warn!(%error, "the end of the server could not be waited for");
                return;
            }
        }
    }
    // The copy is not believed, so nothing of it is lost. A server's processes end without it, but
    // its restore_command would not.
    let left = descendants(server.id());
    if let Err(error) = server.kill().and_then(|()| server.wait()) {
        tracing::warn!(%error, "the server did not stop");
    }
    let left = left.into_iter().filter_map(|pid| i32::try_from(pid).ok());
    for pid in left.filter_map(Pid::from_raw) {
        if let Err(error) = kill_process(pid, Signal::KILL) {
            tracing::debug!(%error, "a process of the server had ended already");
        }
    }
}

/// Waits until the log shows that recovery has ended as the action requires.
fn wait(
    server: &mut Child,
    log: &mut Log,
    interrupt: &Interrupt,
    wanted: &Start<'_>,
) -> Result<()> {
    let path = &wanted.directory.join(LOG);
    let to = match wanted.plan.stop {
        Stop::Before { lsn } | Stop::After { lsn } => Some(lsn),
        Stop::Consistent => None,
    };
    let server_id = server.id();
    let terminal = std::io::stderr().is_terminal();
    let from = wanted.plan.start_lsn;
    let began = Instant::now();
    let mut progress = Progress::new(from, to, terminal, wanted.tell, began);
    let processor = || processor_time(server_id);
    let mut stall = Stall::new(wanted.timeout, processor(), began);
    loop {
        // Check for the end before reading the log, so that the log of a server that has ended is
        // read completely.
        let ended = server.try_wait().map_err(Error::io("wait for", path))?;
        log.read().map_err(Error::io("read", path))?;
        let outcome = judge(&log.seen, ended.is_some(), path, wanted.action);
        if let Some(outcome) = outcome {
            progress.end();
            return outcome;
        }
        if let Err(interrupted) = interrupt.check() {
            progress.end();
            return Err(interrupted);
        }
        let now = Instant::now();
        if let Some(silence) = stall.observe(log.bytes, processor, now) {
            progress.end();
            return Err(Error::RecoveryStalled {
                log: path.to_owned(),
                seconds: silence.as_secs(),
                waits_for: waits_for(&log.seen),
                said: log.seen.last.clone().unwrap_or_else(nothing),
            });
        }
        progress.observe(&log.seen, now);
        thread::sleep(POLL);
    }
}

/// Returns the outcome of the recovery, if the log shows one.
fn judge(seen: &Events, ended: bool, log: &Path, action: Action) -> Option<Result<()>> {
    // PostgreSQL 13 only warns and continues without the missing changes.
    if let Some(said) = seen.minimal.clone() {
        let log = log.to_owned();
        return Some(Err(Error::MinimalWal { log, said }));
    }
    let done = match action {
        Action::Pause => seen.paused_at_end,
        Action::Promote => seen.complete && seen.ready,
        Action::Shutdown => ended && seen.shutdown_at_target,
    };
    if done {
        return Some(Ok(()));
    }
    // A setting of the primary was increased after the backup (`CheckRequiredParameterValues`).
    // PostgreSQL would wait here until a user shuts it down.
    if let Some(said) = seen.lower_setting.clone().filter(|_| seen.insufficient) {
        return Some(Err(Error::InsufficientParameter { said }));
    }
    let failed = |said: String| {
        Some(Err(Error::RecoveryFailed {
            log: log.to_owned(),
            said,
        }))
    };
    if seen.crashes >= CRASHES_MAX {
        return Some(Err(Error::RecoveryCrashes {
            log: log.to_owned(),
            crashes: seen.crashes,
            said: seen.crash.clone().unwrap_or_else(nothing),
        }));
    }
    if seen.paused {
        return Some(Err(Error::RecoveryPaused {
            log: log.to_owned(),
            replayed: seen.replayed,
        }));
    }
    if ended {
        let said = seen.first_error.clone().or_else(|| seen.last.clone());
        return failed(said.unwrap_or_else(nothing));
    }
    None
}

/// Returns the text that replaces PostgreSQL's message if there is none.
fn nothing() -> String {
    "it wrote nothing to its log".to_owned()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// As on Debian: `postgres` on the PATH is a link to a version, and the names next to it lead
    /// to a wrapper.
    #[test]
    fn programs_are_taken_from_the_directory_of_the_server() {
        let root = tempfile::tempdir().expect("a directory");
        let at = |name: &str| root.path().join(name);
        for folder in ["17", "path"] {
            fs::create_dir(at(folder)).expect("a directory");
        }
        for program in ["17/postgres", "17/pg_ctl", "wrapper"] {
            fs::write(at(program), "").expect("written");
        }
        symlink(at("17/postgres"), at("path/postgres")).expect("a link");
        for name in ["path/pg_ctl", "path/pg_isready", "17/pg_isready"] {
            symlink(at("wrapper"), at(name)).expect("a link");
        }
        let real = fs::canonicalize(at("17")).expect("it exists");
        for postgres in ["path/postgres", "17/postgres"] {
            let found = sibling(&at(postgres), "pg_ctl");
            assert_eq!(found, Some(real.join("pg_ctl")), "{postgres}");
            assert_eq!(sibling(&at(postgres), "pg_isready"), None, "{postgres}");
        }
    }
}
