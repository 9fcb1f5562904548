//! The restored server while a drill checks it.
//!
//! Invariant: it is stopped when the drill ends, whatever the result is.

use std::{
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use wal_format::PgVersion;

use super::{Course, Drill, sql::Address};
use crate::{
    Error, Result,
    execute::Executed,
    start::{self, Interrupt, Recovered},
};

/// The interval at which the end of the server is polled.
const POLL: Duration = Duration::from_millis(20);
/// The time in which the server writes its last checkpoint and ends.
const STOP_MAX: Duration = Duration::from_secs(600);
/// The time in which it ends without a checkpoint, before it is killed.
const QUIT_MAX: Duration = Duration::from_secs(30);
/// The time limit of the drill's own queries.
pub(super) const QUERY_MAX: Duration = Duration::from_secs(60);
/// `invalid_authorization_specification`: the role does not exist or may not log in.
const NO_ROLE: &str = "28000";
/// Databases that exist on almost every server.
const DATABASES: [&str; 2] = ["postgres", "template1"];

/// Returns the settings of the drill's sessions in the notation of `PGOPTIONS`. A time limit, a
/// read-only default or a login event trigger of the parent must not decide a drill, and the
/// trigger's function must not run.
fn session_options(version: PgVersion) -> String {
    let mut settings = vec![
        "statement_timeout=0",
        "lock_timeout=0",
        "idle_in_transaction_session_timeout=0",
        "default_transaction_read_only=off",
    ];
    if version >= PgVersion::V17 {
        settings.push("event_triggers=off");
    }
    let options: Vec<String> = settings.iter().map(|one| format!("-c {one}")).collect();
    options.join(" ")
}

/// A running server, a child of this process.
#[derive(Debug)]
pub(super) struct Server {
    process: Option<Pid>,
    pub(super) address: Address,
    postgres: PathBuf,
    directory: PathBuf,
}

impl Server {
    /// Takes over the server that was started.
    pub(super) fn new(
        drill: &Drill<'_>,
        executed: &Executed,
        recovered: &Recovered,
    ) -> Result<Self> {
        let process = recovered.process.and_then(|id| i32::try_from(id).ok());
        let process = process.and_then(Pid::from_raw);
        if process.is_none() {
            return Err(Error::RecoveryFailed {
                log: drill.destination.directory.join(start::LOG),
                said: "the server ended after its recovery".to_owned(),
            });
        }
        Ok(Self {
            process,
            address: Address {
                sockets: drill.directory.join("socket"),
                port: executed.isolation.port,
                user: String::new(),
                options: session_options(drill.archive.catalog.identity().postgresql_major),
            },
            postgres: drill.postgres.to_owned(),
            directory: drill.directory.to_owned(),
        })
    }

    /// Finds the role to connect with: the configured one, or else a superuser.
    ///
    /// # Errors
    /// [`Error::Usage`] if no known role exists.
    pub(super) fn find_user(&mut self, drill: &Drill<'_>, course: &mut Course) -> Result<()> {
        let configured = drill.cluster.drill.user.clone();
        let system = std::env::var("USER").ok();
        let candidates = match &configured {
            Some(user) => vec![user.clone()],
            None => ["postgres".to_owned()]
                .into_iter()
                .chain(system)
                .chain(conninfo_user(&drill.cluster.conninfo))
                .collect(),
        };
        let facts = "SELECT coalesce((SELECT rolname FROM pg_catalog.pg_roles WHERE oid = 10 AND rolcanlogin), current_user) \
                     UNION ALL SELECT current_setting('server_version')";
        let mut said = Vec::new();
        for user in &candidates {
            self.address.user.clone_from(user);
            for database in DATABASES {
                let asked = self
                    .address
                    .query(database, facts, QUERY_MAX, drill.interrupt)?;
                match asked {
                    Ok(rows) => {
                        let mut rows = rows.into_iter().flatten();
                        let superuser = rows.next();
                        if let Some(superuser) = superuser.filter(|_| configured.is_none()) {
                            self.address.user = superuser;
                        }
                        course.record.server_version = rows.next();
                        return Ok(());
                    }
                    Err(refused) => {
                        let has_no_role = refused.code.as_deref() == Some(NO_ROLE);
                        said.push(format!("{user} in {database}: {}", refused.message));
                        if has_no_role {
                            break;
                        }
                    }
                }
            }
        }
        Err(Error::usage(format!(
            "the restored server runs, and no connection to it was possible ({}); name a superuser of it with drill_user",
            said.join("; ")
        )))
    }

    /// Returns a client program of the server's version; `None` if it is not installed.
    pub(super) fn program(&self, name: &str) -> Option<Command> {
        let mut command = Command::new(start::sibling(&self.postgres, name)?);
        for (variable, _) in std::env::vars_os() {
            if variable.to_string_lossy().starts_with("PG") {
                command.env_remove(variable);
            }
        }
        command
            .env("PGHOST", &self.address.sockets)
            .env("PGPORT", self.address.port.to_string())
            .env("PGUSER", &self.address.user)
            .env("PGOPTIONS", &self.address.options)
            .current_dir(&self.directory);
        Some(command)
    }

    /// Stops the server with a last checkpoint. Returns whether it ended in time.
    ///
    /// # Errors
    /// [`Error::Interrupted`].
    pub(super) fn stop(&mut self, interrupt: &Interrupt) -> Result<bool> {
        let Some(process) = self.process else {
            return Ok(true);
        };
        send(process, Signal::INT);
        let began = Instant::now();
        while !has_ended(process) {
            interrupt.check()?;
            if began.elapsed() > STOP_MAX {
                return Ok(false);
            }
            thread::sleep(POLL);
        }
        self.process = None;
        Ok(true)
    }
}

impl Drop for Server {
    /// Stops the server at once. Nothing of the copy is kept.
    fn drop(&mut self) {
        let Some(process) = self.process.take() else {
            return;
        };
        send(process, Signal::QUIT);
        let began = Instant::now();
        while !has_ended(process) {
            if began.elapsed() > QUIT_MAX {
                send(process, Signal::KILL);
                let _is_reaped = waitpid(Some(process), WaitOptions::empty());
                return;
            }
            thread::sleep(POLL);
        }
    }
}

fn send(process: Pid, signal: Signal) {
    if let Err(error) = kill_process(process, signal) {
        tracing::debug!(%error, "the server had ended already");
    }
}

/// Returns true if the child has ended, and reaps it.
fn has_ended(process: Pid) -> bool {
    !matches!(waitpid(Some(process), WaitOptions::NOHANG), Ok(None))
}

/// Returns `pg_checksums` of the server's version for a stopped server; `None` if it is not
/// installed.
pub(super) fn pg_checksums(postgres: &Path, data: &Path) -> Option<Command> {
    let mut command = Command::new(start::sibling(postgres, "pg_checksums")?);
    command.arg("--check").arg("-D").arg(data).current_dir(data);
    Some(command)
}

/// Returns the user of a connection string, if it names one without quotation marks.
fn conninfo_user(conninfo: &str) -> Option<String> {
    let user = match conninfo.split_once("://") {
        Some((_, rest)) => rest.split_once('@')?.0.split(':').next()?,
        None => conninfo
            .split_whitespace()
            .find_map(|word| word.strip_prefix("user="))?,
    };
    Some(user.to_owned()).filter(|user| !user.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_of_a_connection_string_is_found() {
        for (conninfo, user) in [
            ("host=/run user=tide port=1", Some("tide")),
            ("postgresql://tide:secret@h/db", Some("tide")),
            ("postgresql://h/db", None),
            ("host=h", None),
        ] {
            assert_eq!(conninfo_user(conninfo).as_deref(), user, "{conninfo}");
        }
    }
}
