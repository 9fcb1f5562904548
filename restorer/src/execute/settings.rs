//! The recovery settings of a restored cluster, with which PostgreSQL stops at the planned point,
//! and its signal file.
//!
//! Invariant: exactly one signal file exists. A backup of a standby contains `standby.signal`,
//! which would take precedence over ours.

use std::{fs, path::Path};

use quick::ahead;
use repository::config::RepositoryPlace;
use wal_format::{ControlFile, control_file::ControlFileError, layout::history_file_name};

use super::{Destination, PLAN_FILE, tree::Tree};
use crate::{
    Error, RestorePlan, Result, Stop,
    inventory::Archive,
    isolation::{self, Isolation, Wanted},
    shell,
};

/// The files that make PostgreSQL start archive recovery.
const SIGNALS: [&str; 2] = ["standby.signal", "recovery.signal"];
/// The first version of which every minor version has `allow_in_place_tablespaces`.
const CHECKS_TABLESPACES: u16 = 15;

/// PostgreSQL's action when it has reached the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Action {
    /// Stays read-only until `pg_wal_replay_resume()`.
    Pause,
    /// Opens for writing on a new timeline.
    Promote,
    /// Stops.
    Shutdown,
}

impl Action {
    fn name(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Promote => "promote",
            Self::Shutdown => "shutdown",
        }
    }
}

/// The recovery settings of a restored cluster.
#[derive(Clone, Debug)]
pub struct Recovery {
    /// The action at the target.
    pub action: Action,
    /// True to follow the archive permanently instead of stopping.
    pub standby: bool,
    /// True if the caller starts the server and compares the end of recovery with the plan.
    pub start: bool,
    /// True to leave the archiving settings unchanged.
    pub keep_archiving: bool,
    /// The port on the loopback address. `None` for a socket inside the data directory only.
    pub port: Option<u16>,
    /// Further settings by the operator, appended last.
    pub set: Vec<(String, String)>,
    /// The source of WAL.
    pub repository: RepositoryPlace,
    /// The configuration file with the settings of the repository, if there is one.
    pub config: Option<std::path::PathBuf>,
    /// The path of this program, for `restore_command`.
    pub program: std::path::PathBuf,
}

/// Writes history files, the plan, `postgresql.auto.conf` and the signal file. The configuration
/// files exist already.
pub(super) fn write(
    archive: &Archive,
    plan: &RestorePlan,
    destination: &Destination,
    tree: &Tree,
) -> Result<Isolation> {
    let directory = &destination.directory;
    let recovery = &destination.recovery;
    tree.create_directory("pg_wal/archive_status")?;
    let identity = archive.catalog.identity();
    let system = identity.system_identifier;
    for part in plan.path.iter().filter(|part| part.branch.digest != [0; 4]) {
        let content = archive.repository.history(system, part.branch)?;
        let name = history_file_name(part.branch.timeline);
        tree.write(&format!("pg_wal/{name}"), &content)?;
    }
    let json = serde_json::to_vec_pretty(plan)
        .map_err(|error| Error::io("write", directory.join(PLAN_FILE))(error.into()))?;
    tree.write(PLAN_FILE, &json)?;
    let major = identity.postgresql_major.major();
    let mut settings = recovery_settings(archive, plan, &json, recovery);
    if major >= CHECKS_TABLESPACES && has_in_place_tablespace(directory) {
        // Without this setting, a server panics when it becomes consistent
        // (`CheckTablespaceDirectory`).
        settings.push(("allow_in_place_tablespaces", "on".to_owned()));
    }
    let isolation = isolation::isolate(
        directory,
        &Wanted {
            system,
            major,
            keep_archiving: recovery.keep_archiving,
            port: recovery.port,
            recovery: settings,
            set: &recovery.set,
            heading: format!("backup {}, stop {}", plan.backup, plan.stop),
        },
    )?;
    for signal in SIGNALS {
        let path = directory.join(signal);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("remove", path)(error));
            }
            _ => {}
        }
    }
    let [standby, recover] = SIGNALS;
    let signal = if recovery.standby { standby } else { recover };
    tree.write(signal, b"")?;
    Ok(isolation)
}

/// Creates the configuration files that the backup lacks, because its server kept them elsewhere,
/// as Debian does. No server starts without them. Returns whether any was created.
pub(super) fn complete(tree: &Tree, control: &[u8]) -> Result<bool> {
    let damaged = |error: ControlFileError| Error::Damaged {
        object: "global/pg_control of the backup".to_owned(),
        problem: error.to_string(),
    };
    let control = ControlFile::parse(control).map_err(damaged)?;
    // Recovery refuses lower values than the server had (`CheckRequiredParameterValues`).
    let postgresql = format!(
        "# Made by pitr-restore: the backup holds none, because the server kept it outside of its data directory.\n\
         max_connections = {}\nmax_worker_processes = {}\nmax_wal_senders = {}\nmax_prepared_transactions = {}\n\
         max_locks_per_transaction = {}\n",
        control.max_connections,
        control.max_worker_processes,
        control.max_wal_senders,
        control.max_prepared_transactions,
        control.max_locks_per_transaction
    );
    let hba = "# Made by pitr-restore: the backup holds none.\nlocal all all peer\n";
    let mut made = false;
    for (name, content) in [
        ("postgresql.conf", postgresql.as_str()),
        ("pg_hba.conf", hba),
        ("pg_ident.conf", ""),
    ] {
        if !tree.exists(name)? {
            tree.write(name, content.as_bytes())?;
            made = true;
        }
    }
    Ok(made)
}

/// Returns the settings that only the recovery needs. The server runs their commands in its data
/// directory, so paths of files there are relative: the directory may be moved before its first
/// start.
fn recovery_settings(
    archive: &Archive,
    plan: &RestorePlan,
    json: &[u8],
    recovery: &Recovery,
) -> Vec<(&'static str, String)> {
    // Use the timeline that contains the stop. After a promotion there, the new history has no
    // timeline that was not replayed. PostgreSQL asks for archived later timelines only to find a
    // free number (`findNewestTimeLine`).
    let timeline = plan
        .path
        .last()
        .map_or(1, |part| part.branch.timeline.get());
    let program = shell::quoted(&recovery.program.display().to_string());
    let mut command = format!(
        "{program} wal-fetch --repository {} --cluster {} --system {}",
        shell::quoted(&recovery.repository.to_string()),
        archive.repository.cluster(),
        // Name the system identifier, because a new epoch may begin while this server exists.
        archive.catalog.identity().system_identifier,
    );
    // A folder needs only its URL. For a bucket, several repositories or encryption, the settings
    // are in the file.
    let place = &recovery.repository;
    let url_is_all =
        place.url.folder().is_some() && place.encryption.is_none() && place.others.is_empty();
    if let Some(config) = &recovery.config
        && !url_is_all
    {
        command.push_str(" --config ");
        command.push_str(&shell::quoted(&config.display().to_string()));
    }
    if let Some(at) = place.as_of {
        command.push_str(&format!(" --at {at}"));
    }
    if !recovery.standby {
        command.push_str(" --plan ");
        command.push_str(PLAN_FILE);
    }
    // `restore_command` replaces %f, %p and %r; any other percent sign has to be doubled.
    let mut command = format!("{} %f %p", command.replace('%', "%%"));
    if !recovery.standby {
        command.insert_str(0, &ahead::shell_shortcut(json));
    }
    // An exit code above 125 would stop the server (`ExecuteRecoveryCommand`). If the program no
    // longer exists, code 1 only causes a warning.
    let ended = format!("{} recovery-ended || exit 1", program.replace('%', "%%"));
    let mut settings: Vec<(&str, String)> = vec![
        ("restore_command", command),
        ("recovery_end_command", ended),
    ];
    for name in [
        "recovery_target",
        "recovery_target_time",
        "recovery_target_xid",
        "recovery_target_name",
        "recovery_target_lsn",
    ] {
        settings.push((name, String::new()));
    }
    if recovery.standby {
        settings.push(("recovery_target_timeline", "latest".to_owned()));
    } else {
        settings.push(("recovery_target_timeline", timeline.to_string()));
        settings.push(("recovery_target_action", recovery.action.name().to_owned()));
        if recovery.action == Action::Pause {
            // Without hot standby, a server shuts down instead of pausing
            // (`recovery_target_action`).
            settings.push(("hot_standby", "on".to_owned()));
        }
        match plan.stop {
            Stop::Before { lsn } => {
                settings.push(("recovery_target_lsn", lsn.to_string()));
                settings.push(("recovery_target_inclusive", "off".to_owned()));
            }
            Stop::After { lsn } => {
                settings.push(("recovery_target_lsn", lsn.to_string()));
                settings.push(("recovery_target_inclusive", "on".to_owned()));
            }
            Stop::Consistent => settings.push(("recovery_target", "immediate".to_owned())),
        }
    }
    // PostgreSQL uses the last value of a name; write one line for each name.
    let mut lines: Vec<(&str, String)> = Vec::new();
    for (name, value) in settings {
        lines.retain(|(known, _)| *known != name);
        lines.push((name, value));
    }
    lines
}

/// Returns true if `pg_tblspc` contains a directory, an in-place tablespace, and not only links.
fn has_in_place_tablespace(directory: &Path) -> bool {
    let entries = fs::read_dir(directory.join("pg_tblspc"));
    let mut entries = entries.into_iter().flatten().flatten();
    entries.any(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
}
