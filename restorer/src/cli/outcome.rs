//! The output of a restore: a report in JSON, or lines that end with the isolated settings and the
//! command to connect.

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
};

use repository::encryption::KeySource;

use super::output;
use crate::{
    RestorePlan, Result,
    execute::{Action, Executed, Recovery},
    isolation::Isolation,
    start::Recovered,
};

/// A restore that succeeded.
pub(super) struct Outcome<'a> {
    pub(super) plan: &'a RestorePlan,
    pub(super) directory: &'a Path,
    pub(super) executed: &'a Executed,
    pub(super) recovered: Option<&'a Recovered>,
    pub(super) recovery: &'a Recovery,
    /// The program `pg_ctl` of the copy's version, if it was found.
    pub(super) pg_ctl: Option<PathBuf>,
    /// The program `psql` of the copy's version, if it was found.
    pub(super) psql: Option<PathBuf>,
    /// The words before a command that root runs as the owner of the copy; `None` if the owner ran
    /// this command.
    pub(super) prefix: Option<String>,
}

impl Outcome<'_> {
    pub(super) fn print(&self, json: bool) -> Result<()> {
        if json {
            return output::json(&self.report());
        }
        self.lines();
        Ok(())
    }

    fn report(&self) -> serde_json::Value {
        let isolation = &self.executed.isolation;
        serde_json::json!({
            "plan": self.plan,
            "directory": self.directory,
            "executed": self.executed,
            "stopped": self.recovered.map(|one| &one.stopped),
            "recovery_seconds": self.recovered.map(|one| one.duration.as_secs_f64()),
            "process": self.recovered.and_then(|one| one.process),
            "port": isolation.port,
            "socket_directory": isolation.socket_directory,
            "psql": self.psql(),
        })
    }

    fn lines(&self) {
        let executed = self.executed;
        output::line(&format!("restored      {}", self.directory.display()));
        if executed.made_configuration {
            output::line(
                "configuration created with the settings that recovery needs: the backup contains none; compare it with the server's own",
            );
        }
        if executed.kept_files > 0 {
            output::line(&format!(
                "kept          {} files of {} bytes; {} of {} slices were fetched",
                executed.kept_files, executed.kept_bytes, executed.fetched_slices, executed.slices
            ));
        }
        isolated(&executed.isolation, self.recovery.keep_archiving);
        if let Some(recovered) = self.recovered {
            output::line(&format!("stopped       {} (as planned)", recovered.stopped));
            output::line(&format!(
                "recovery took {:.1} s",
                recovered.duration.as_secs_f64()
            ));
            if let Some(process) = recovered.process {
                output::line(&format!("running       PostgreSQL, process {process}"));
            }
        }
        self.next();
    }

    /// Returns the command that connects to the copy, as the owner or root types it. `None` if
    /// nothing can connect.
    fn psql(&self) -> Option<String> {
        let program = match &self.psql {
            Some(psql) if !in_path("psql") => output::shell_word(psql),
            _ => "psql".to_owned(),
        };
        let arguments = self.executed.isolation.psql_arguments()?;
        Some(format!("{}{program} {arguments}", self.prefix()))
    }

    fn prefix(&self) -> &str {
        self.prefix.as_deref().unwrap_or_default()
    }

    /// Prints the user's next step.
    fn next(&self) {
        let running = self.recovered.is_some_and(|one| one.process.is_some());
        let directory = output::shell_word(self.directory);
        if !running {
            let pg_ctl = self.pg_ctl.as_deref().unwrap_or(Path::new("pg_ctl"));
            let pg_ctl = output::shell_word(pg_ctl);
            let prefix = self.prefix();
            output::line(&format!(
                "start it with {prefix}{pg_ctl} -D {directory} start"
            ));
            for place in self.recovery.repository.each() {
                if let Some(KeySource::Environment(name)) = place.encryption {
                    output::line(&format!(
                        "needs         {name} in the server's environment, where restore_command reads the key"
                    ));
                }
            }
        }
        let isolation = &self.executed.isolation;
        output::line(&format!(
            "connect with  {}",
            self.psql().as_deref().unwrap_or(
                "nothing yet: the path of its socket is too long for PostgreSQL and it listens on no address. Restore to \
                 a shorter path or with --port, or start it with `-c listen_addresses=127.0.0.1 -c port=N`"
            )
        ));
        if isolation.role.is_none() {
            output::line(
                "              add user=ROLE: the name of a role of the copy was not found",
            );
        }
        output::line(match (isolation.owner_access, isolation.parent_access) {
            (true, true) => {
                "              as the owner of its files, who may connect as every role; for others its parent's rules count"
            }
            (true, false) => {
                "              as the owner of its files, who may connect as every role. Nobody else may: its parent has its \
                 access rules in another file (hba_file), which is not in the copy"
            }
            (false, true) => {
                "              as its parent's access rules allow it: --set changes its socket or its rules"
            }
            (false, false) => {
                "              as nobody yet: its parent has its access rules in another file (hba_file), which is not in the \
                 copy. Name one with --set hba_file=FILE"
            }
        });
        if self.recovery.action == Action::Pause && !self.recovery.standby {
            output::line(
                "it pauses     at the target, read-only; SELECT pg_wal_replay_resume() opens it for writing",
            );
            self.locks();
        }
        output::line(&format!(
            "release       when it takes its parent's place: {}pitr-restore release {directory}",
            self.prefix()
        ));
    }

    /// Prints the locks that block readers until recovery ends. Its end releases all locks except
    /// those of prepared transactions.
    fn locks(&self) {
        let plan = self.plan;
        if !plan.locks_known {
            output::line(
                "              a query that hangs there waits for the lock of a DROP or ALTER at the target: open it for writing",
            );
        }
        for lock in &plan.locks {
            let relation = match &lock.name {
                Some(name) => name.clone(),
                None => format!("relation {} of database {}", lock.relation, lock.database),
            };
            let prepared = plan.in_doubt.iter().find(|one| one.xid == lock.xid);
            let way_out = match prepared.and_then(|one| one.gid.as_deref()) {
                Some(gid) => format!("open the copy for writing, then ROLLBACK PREPARED '{gid}'"),
                None => "open the copy for writing".to_owned(),
            };
            output::line(&format!(
                "locked        {relation}, by transaction {}, which has not ended: a query of it waits; {way_out}",
                lock.xid
            ));
        }
    }
}

fn isolated(isolation: &Isolation, keep_archiving: bool) {
    let archiving = if keep_archiving {
        "; the archiving settings stay as they were"
    } else {
        ""
    };
    output::line(&format!(
        "isolated      from its parent: no archiving, no foreign commands, no connections to others{archiving}"
    ));
    for one in &isolation.switched_off {
        let value = match &one.value {
            Some(value) => format!("'{value}'"),
            None => "switched off".to_owned(),
        };
        output::line(&format!(
            "              {} = '{}' is now {value}: it would {}",
            one.name, one.parent, one.why
        ));
    }
    for library in &isolation.unknown_libraries {
        output::line(&format!(
            "              shared_preload_libraries loads {library}: if it has background workers of its own, they run"
        ));
    }
    for file in &isolation.outside_files {
        output::line(&format!(
            "              it has a copy of {file}, which is outside of it: a change there does not count"
        ));
    }
}

/// Returns true if a directory of the PATH has this program.
pub(super) fn in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

/// Returns a port of the loopback address on which no process listens now.
pub(super) fn free_port() -> Option<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).ok()?;
    listener.local_addr().ok().map(|address| address.port())
}
