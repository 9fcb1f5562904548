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

use super::{Course, Drill};
use crate::{
    Error, Result,
    execute::Executed,
    roles::{self, NoLogin},
    sql::Address,
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
                options: roles::session_options(drill.archive.catalog.identity().postgresql_major),
            },
            postgres: drill.postgres.to_owned(),
            directory: drill.directory.to_owned(),
        })
    }

    /// Finds the role to connect with: the configured one, or else a superuser.
    ///
    /// # Errors
    /// [`Error::Usage`] if no known role exists, [`Error::NoConnection`].
    pub(super) fn find_user(&mut self, drill: &Drill<'_>, course: &mut Course) -> Result<()> {
        let configured = drill.cluster.drill.user.clone();
        let candidates = match &configured {
            Some(user) => vec![user.clone()],
            None => {
                let data = &drill.destination.directory;
                roles::candidates(data, &drill.cluster.conninfo)
            }
        };
        let limit = QUERY_MAX.min(drill.options.check_timeout);
        let waiting = (limit, drill.plan.in_doubt.as_slice());
        let found = roles::connect(
            &self.address,
            &candidates,
            waiting,
            drill.interrupt,
            drill.tell,
        );
        match found? {
            Ok(login) => {
                self.address.user = configured.unwrap_or(login.role);
                course.record.server_version = login.server_version;
                Ok(())
            }
            Err(NoLogin::NoAnswer(said)) => Err(Error::NoConnection { said }),
            Err(NoLogin::Refused(said)) => Err(Error::usage(format!(
                "the restored server runs, and no connection to it was possible ({said}); name a superuser of it with \
                 drill_user"
            ))),
        }
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
