//! The recovery settings of a restored cluster: what PostgreSQL is told so that it stops where the
//! plan says.

use std::fs;

use quick::ahead;
use repository::config::RepositoryPlace;
use wal_format::{ControlFile, control_file::ControlFileError, layout::history_file_name};

use super::{Destination, PLAN_FILE, tree::Tree};
use crate::{Error, RestorePlan, Result, Stop, inventory::Archive};

/// What PostgreSQL does when it has reached the target.
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

/// How the restored cluster is to recover.
#[derive(Clone, Debug)]
pub struct Recovery {
    /// At the target.
    pub action: Action,
    /// Follow the archive for good instead of stopping.
    pub standby: bool,
    /// Leave the archiving settings as they were.
    pub keep_archiving: bool,
    /// Further settings, appended last.
    pub set: Vec<(String, String)>,
    /// Where WAL comes from.
    pub repository: RepositoryPlace,
    /// The configuration that says how it is reached, if there is one.
    pub config: Option<std::path::PathBuf>,
    /// This program, for `restore_command`.
    pub program: std::path::PathBuf,
}

/// Writes history files, the plan, `postgresql.auto.conf` and the signal file.
pub(super) fn write(
    archive: &Archive,
    plan: &RestorePlan,
    destination: &Destination,
    tree: &Tree,
) -> Result<()> {
    let directory = &destination.directory;
    let recovery = &destination.recovery;
    tree.create_directory("pg_wal/archive_status")?;
    let system = archive.catalog.identity().system_identifier;
    for part in plan.path.iter().filter(|part| part.branch.digest != [0; 4]) {
        let content = archive.repository.history(system, part.branch)?;
        let name = history_file_name(part.branch.timeline);
        tree.write(&format!("pg_wal/{name}"), &content)?;
    }
    let json = serde_json::to_vec_pretty(plan)
        .map_err(|error| Error::io("write", directory.join(PLAN_FILE))(error.into()))?;
    tree.write(PLAN_FILE, &json)?;
    let lines = lines(archive, plan, &json, destination)?;
    tree.append("postgresql.auto.conf", lines.as_bytes())?;
    let signal = if recovery.standby {
        "standby.signal"
    } else {
        "recovery.signal"
    };
    tree.write(signal, b"")
}

/// Makes the configuration files that the backup does not have, because its server kept them
/// elsewhere, as Debian does: without them no server starts. Returns whether any was made.
pub(super) fn complete(tree: &Tree, control: &[u8]) -> Result<bool> {
    let damaged = |error: ControlFileError| Error::Damaged {
        object: "global/pg_control of the backup".to_owned(),
        problem: error.to_string(),
    };
    let control = ControlFile::parse(control).map_err(damaged)?;
    // Recovery refuses less than the server had (`CheckRequiredParameterValues`).
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

fn lines(
    archive: &Archive,
    plan: &RestorePlan,
    json: &[u8],
    destination: &Destination,
) -> Result<String> {
    let recovery = &destination.recovery;
    // The timeline that holds the stop. A promotion there makes a history without timelines that
    // were not replayed, and a later one that is archived is only asked about, for a free number
    // (`findNewestTimeLine`).
    let timeline = plan
        .path
        .last()
        .map_or(1, |part| part.branch.timeline.get());
    let plan_file = fs::canonicalize(destination.directory.join(PLAN_FILE))
        .map_err(Error::io("find", destination.directory.join(PLAN_FILE)))?;
    let mut command = format!(
        "{} wal-fetch --repository {} --cluster {} --system {}",
        shell_quoted(&recovery.program.display().to_string()),
        shell_quoted(&recovery.repository.to_string()),
        archive.repository.cluster(),
        // A new epoch may begin while this server lives.
        archive.catalog.identity().system_identifier,
    );
    // A folder's URL says everything; how a bucket is reached, what else there is, and with which
    // key, stands in the file.
    let place = &recovery.repository;
    let url_is_all =
        place.url.folder().is_some() && place.encryption.is_none() && place.others.is_empty();
    if let Some(config) = &recovery.config
        && !url_is_all
    {
        command.push_str(" --config ");
        command.push_str(&shell_quoted(&config.display().to_string()));
    }
    if let Some(at) = place.as_of {
        command.push_str(&format!(" --at {at}"));
    }
    if !recovery.standby {
        command.push_str(" --plan ");
        command.push_str(&shell_quoted(&plan_file.display().to_string()));
    }
    // restore_command knows %f, %p and %r; any other percent sign is a literal one and is doubled.
    let mut command = format!("{} %f %p", command.replace('%', "%%"));
    if !recovery.standby {
        command.insert_str(0, &ahead::shell_shortcut(json));
    }
    let mut settings: Vec<(&str, String)> = vec![("restore_command", command)];
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
    if !recovery.keep_archiving {
        // The copy must neither write into its parent's archive nor wait for its parent's standbys.
        settings.push(("archive_mode", "off".to_owned()));
        settings.push(("synchronous_standby_names", String::new()));
        settings.push(("primary_conninfo", String::new()));
        settings.push(("primary_slot_name", String::new()));
    }
    let mut text = format!(
        "\n# Added by pitr-restore: backup {}, stop {}.\n",
        plan.backup, plan.stop
    );
    let own = settings.iter().map(|(name, value)| (*name, value.as_str()));
    let set = recovery
        .set
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()));
    for (name, value) in own.chain(set) {
        text.push_str(&format!(
            "{name} = '{}'\n",
            value.replace('\\', "\\\\").replace('\'', "''")
        ));
    }
    Ok(text)
}

fn shell_quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-:=".contains(c);
    if text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}
