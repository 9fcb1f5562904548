//! The isolation of a restored copy: until `pitr-restore release`, it reaches neither its parent
//! nor any other server.
//!
//! A restore copies configuration files and access rules outside of the copy into it (`imports.rs`)
//! and reads the copy's configuration as PostgreSQL does. It overrides every setting of
//! [`table::SETTINGS`] in `postgresql.auto.conf` (`lines.rs`), a second time in a file that
//! `postgresql.conf` includes (`fallback.rs`), and records each line that it wrote
//! in [`STATE_FILE`]. The recovery settings are recorded with them: [`recovery_ended`], which
//! PostgreSQL runs as `recovery_end_command`, removes the lines that only the recovery needed.
//!
//! Invariant: a line counts as ours only while its name and its value are those that we wrote. A
//! line that a user changed since, with `ALTER SYSTEM` or an editor, belongs to the user and stays.

use std::{
    fs,
    io::ErrorKind,
    path::{Component, Path, PathBuf},
};

use repository::durable;
use serde::{Deserialize, Serialize};
use wal_format::SystemIdentifier;

use crate::{Error, Result, shell};

mod configuration;
mod fallback;
mod guc_file;
mod imports;
mod lines;
mod owner;
pub mod parent;
pub mod release;
pub mod table;
mod text;

use configuration::{AUTO, Configuration, MAIN};
use imports::Cluster;
pub(crate) use lines::write_private;
use lines::{append, comment_out, rewrite};
use table::{Group, How, LIBRARIES, SETTINGS, SOCKET_DIRECTORY, When, Worker};

/// The record of the changes that a restore made to the configuration of its copy.
pub const STATE_FILE: &str = "tidemark_isolation.json";
/// The port of a server whose configuration sets none.
const PORT_DEFAULT: u16 = 5432;
/// The maximum length of a Unix socket's path that clients can use (`sun_path`).
const SOCKET_PATH_MAX: usize = 107;
/// The prefix of lines that we made comments.
const COMMENT: &str = "# pitr-restore isolates: ";
/// The prefix of the comments above the lines that we append.
const HEADING: &str = "# pitr-restore: ";

/// The requirements of a restore on the isolation.
#[derive(Clone, Debug)]
pub(crate) struct Wanted<'a> {
    /// The system identifier of the backup.
    pub(crate) system: SystemIdentifier,
    /// The major version of the backup.
    pub(crate) major: u16,
    /// True to leave the archiving settings unchanged.
    pub(crate) keep_archiving: bool,
    /// The port on the loopback address. `None` for the private socket only.
    pub(crate) port: Option<u16>,
    /// Settings that only the recovery needs.
    pub(crate) recovery: Vec<(&'static str, String)>,
    /// The user's settings, which override all others.
    pub(crate) set: &'a [(String, String)],
    /// The text of the comment above the lines.
    pub(crate) heading: String,
}

impl Wanted<'_> {
    /// Returns true if the user sets `name`. Then we write no line for it, so that no line of the
    /// user counts as ours.
    fn sets(&self, name: &str) -> bool {
        self.set
            .iter()
            .any(|(set, _)| set.eq_ignore_ascii_case(name))
    }
}

/// A line that we wrote to `postgresql.auto.conf`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Line {
    name: String,
    value: String,
    /// The value after the end of recovery; `None` removes the line.
    after_recovery: Option<String>,
    /// The effective value before the restore; `None` for PostgreSQL's default.
    parent: Option<String>,
    /// True if the line stays until recovery has ended, even if the copy is released earlier.
    recovery: bool,
}

/// A line that we changed or appended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Edit {
    /// The path relative to the data directory, decoded (`text.rs`).
    file: String,
    name: String,
    /// The original line; `None` if the line was appended.
    old: Option<String>,
    new: String,
    /// The parent's value; for an include directive, the path in it.
    parent: String,
}

/// The content of [`STATE_FILE`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    note: String,
    lines: Vec<Line>,
    edits: Vec<Edit>,
    /// The parent's addresses, for the check whether it still answers.
    parent: parent::Addresses,
}

/// A setting of the parent that has no effect in the copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SwitchedOff {
    /// The name of the setting.
    pub name: String,
    /// The parent's value. A connection string is not shown.
    pub parent: String,
    /// The copy's value; `None` if its lines are comments.
    pub value: Option<String>,
    /// The reason, which completes the phrase "would otherwise".
    pub why: String,
}

/// The isolated settings, and how to connect to the copy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Isolation {
    /// Settings of the parent that would have reached outside the copy.
    pub switched_off: Vec<SwitchedOff>,
    /// Libraries of `shared_preload_libraries` that are loaded and that [`table::LIBRARIES`] does
    /// not list.
    pub unknown_libraries: Vec<String>,
    /// The configuration files outside of the copy that were copied into it.
    pub outside_files: Vec<String>,
    /// The reasons why PostgreSQL does not start with this configuration, one sentence each.
    pub problems: Vec<String>,
    /// The port of the copy.
    pub port: u16,
    /// The directory of its socket; `None` if it has none.
    pub socket_directory: Option<PathBuf>,
    /// The addresses on which it listens.
    pub listen_addresses: String,
    /// True if the owner of the data directory may connect as every role over the socket.
    pub owner_access: bool,
    /// True if the parent's access rules count for others. False if they are in a file that is not
    /// in the copy: then nobody else is let in.
    pub parent_access: bool,
    /// A role of the copy, a superuser if one is known; `None` if no role is known.
    pub role: Option<String>,
    /// A database to connect to; `None` is `postgres`.
    pub database: Option<String>,
}

impl Isolation {
    /// Returns the argument of `psql` that connects to the copy on this host. `None` if the path of
    /// its socket is too long and it listens on no address: the port alone would lead to another
    /// server.
    #[must_use]
    pub fn psql_arguments(&self) -> Option<String> {
        let socket = self.socket_directory.as_ref().filter(|directory| {
            let path = directory.join(format!(".s.PGSQL.{}", self.port));
            path.as_os_str().len() <= SOCKET_PATH_MAX
        });
        let host = match socket {
            Some(directory) => directory.display().to_string(),
            None if self.listen_addresses.trim().is_empty() => return None,
            None => "127.0.0.1".to_owned(),
        };
        let database = self.database.as_deref().unwrap_or("postgres");
        let mut conninfo = format!(
            "host={} port={} dbname={}",
            conninfo_value(&host),
            self.port,
            conninfo_value(database)
        );
        if let Some(role) = &self.role {
            conninfo.push_str(&format!(" user={}", conninfo_value(role)));
        }
        Some(match conninfo.contains(['"', '$', '`', '\\', '!']) {
            true => shell::quoted(&conninfo),
            false => format!("\"{conninfo}\""),
        })
    }
}

/// Returns a value as `conninfo_parse` in `fe-connect.c` reads it.
fn conninfo_value(value: &str) -> String {
    if value.is_empty() || value.contains([' ', '\'', '\\']) {
        format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
    } else {
        value.to_owned()
    }
}

/// Isolates the copy in `directory` and writes the recovery settings. The copy is not complete yet:
/// the caller makes all files durable.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn isolate(directory: &Path, wanted: &Wanted<'_>) -> Result<Isolation> {
    let sockets = directory.join(SOCKET_DIRECTORY);
    if !sockets.exists() {
        fs::create_dir(&sockets).map_err(Error::io("create directory", &sockets))?;
    }
    let before = Configuration::read(directory);
    let parent = before.value("data_directory").map(text::path);
    let cluster = Cluster {
        directory,
        system: wanted.system,
        major: wanted.major,
        parent: parent.as_deref().filter(|parent| parent.is_absolute()),
    };
    let mut edits = Vec::new();
    let mut imported = imports::import(cluster, &mut edits)?;
    let has_unread = !imported.problems.is_empty();
    let configuration = Configuration::read(directory);
    for file in imports::access_files(directory, &configuration) {
        imported = imports::import_access(cluster, &file, &mut edits, imported)?;
    }
    let access = owner::let_in(directory, wanted, &configuration, &mut edits)?;
    let mut state = State {
        note: "Written by pitr-restore; `pitr-restore release` needs it.".to_owned(),
        parent: parent::Addresses::of(&configuration),
        edits,
        ..State::default()
    };
    state.lines.extend(recovery_lines(&configuration, wanted));
    let mut switched_off = Vec::new();
    for row in SETTINGS.iter().filter(|row| row.majors.has(wanted.major)) {
        let kept = wanted.keep_archiving && row.group == Group::Archiving;
        if kept || wanted.sets(row.name) {
            continue;
        }
        let parent = configuration.value(row.name).map(str::to_owned);
        let value = match row.how {
            How::Value(value) => Some(match (row.name, wanted.port) {
                ("listen_addresses", Some(_)) => "127.0.0.1".to_owned(),
                ("log_directory", _) => free_directory(directory, value),
                _ => value.to_owned(),
            }),
            How::Comment => None,
        };
        let value = value.as_deref();
        let changes = parent.as_deref().is_some_and(|parent| {
            !parent.is_empty() && value != Some(parent) && value != Some(bool_of(parent))
        });
        // A file that cannot be read here may set it.
        let is_unknown = has_unread && row.when == When::LeadsOutside;
        if !is_unknown && !applies(row.when, directory, parent.as_deref(), changes) {
            continue;
        }
        if changes {
            switched_off.push(SwitchedOff {
                name: row.name.to_owned(),
                parent: shown(row.name, parent.as_deref().unwrap_or_default()),
                value: value.map(str::to_owned),
                why: row.why.to_owned(),
            });
        }
        match value {
            Some(value) if state.lines.iter().all(|line| line.name != row.name) => {
                state.lines.push(Line {
                    name: row.name.to_owned(),
                    value: value.to_owned(),
                    after_recovery: Some(value.to_owned()),
                    parent: parent.map(|value| shown(row.name, &value)),
                    recovery: row.group == Group::Recovery,
                });
            }
            Some(_) => {}
            None => {
                for setting in configuration.lines_of(row.name) {
                    comment_out(directory, setting, &mut state.edits)?;
                }
            }
        }
    }
    let unknown_libraries = if wanted.sets("shared_preload_libraries") {
        Vec::new()
    } else {
        libraries(&configuration, &mut state.lines, &mut switched_off)
    };
    if let Some(port) = wanted.port.filter(|_| !wanted.sets("port")) {
        state.lines.push(Line {
            name: "port".to_owned(),
            value: port.to_string(),
            after_recovery: Some(port.to_string()),
            parent: configuration.value("port").map(str::to_owned),
            recovery: false,
        });
    }
    append(directory, wanted, &state.lines)?;
    fallback::write(directory, &state.lines, wanted.set)?;
    write_state(directory, &state)?;
    let counts = Configuration::read(directory);
    let mut problems = imported.problems;
    problems.extend(configuration.problems);
    Ok(Isolation {
        switched_off,
        unknown_libraries,
        outside_files: imported
            .files
            .iter()
            .map(|one| text::shown(&text::of_path(one)))
            .collect(),
        problems,
        port: parent::port(&counts),
        socket_directory: parent::socket_directories(&counts)
            .first()
            .map(|socket| directory.join(socket)),
        listen_addresses: counts
            .value("listen_addresses")
            .unwrap_or("localhost")
            .to_owned(),
        owner_access: access.owner,
        parent_access: access.parent,
        role: None,
        database: None,
    })
}

/// Returns the lines that only the recovery needs, each with its value after recovery.
fn recovery_lines(configuration: &Configuration, wanted: &Wanted<'_>) -> Vec<Line> {
    let line = |(name, value): &(&'static str, String)| {
        let parent = configuration.value(name);
        let isolated = match *name {
            // These commands must not run on the promoted copy, nor on a replica of it.
            "restore_command" | "recovery_end_command" => Some(""),
            // A target in the parent's own configuration would stop every replica of the copy.
            "recovery_target_timeline" => parent.map(|_| "latest"),
            "recovery_target_action"
            | "recovery_target_inclusive"
            | "hot_standby"
            | "allow_in_place_tablespaces" => None,
            _ => parent.map(|_| ""),
        };
        Line {
            name: (*name).to_owned(),
            value: value.clone(),
            after_recovery: isolated.map(str::to_owned),
            parent: parent.map(str::to_owned),
            recovery: true,
        }
    };
    let ours = wanted
        .recovery
        .iter()
        .filter(|(name, _)| !wanted.sets(name));
    ours.map(line).collect()
}

/// Prevents the background workers of libraries from acting. Returns the libraries that are not in
/// the table.
fn libraries(
    configuration: &Configuration,
    lines: &mut Vec<Line>,
    switched_off: &mut Vec<SwitchedOff>,
) -> Vec<String> {
    const NAME: &str = "shared_preload_libraries";
    let Some(listed) = configuration.value(NAME) else {
        return Vec::new();
    };
    let names: Vec<&str> = listed
        .split(',')
        .map(|name| name.trim().trim_matches('"'))
        .filter(|name| !name.is_empty())
        .collect();
    let (mut stay, mut unknown) = (Vec::new(), Vec::new());
    for name in names {
        let base = name.rsplit('/').next().unwrap_or(name);
        let base = base.strip_suffix(".so").unwrap_or(base);
        match LIBRARIES.iter().find(|(known, _)| *known == base) {
            Some((_, Worker::NotLoaded)) => {
                switched_off.push(SwitchedOff {
                    name: format!("{NAME}: {name}"),
                    parent: name.to_owned(),
                    value: None,
                    why: "run its workers, which act without being asked".to_owned(),
                });
                continue;
            }
            Some((_, Worker::Settings(settings))) => {
                for (setting, value) in *settings {
                    let parent = configuration.value(setting);
                    lines.push(Line {
                        name: (*setting).to_owned(),
                        value: (*value).to_owned(),
                        after_recovery: Some((*value).to_owned()),
                        parent: parent.map(str::to_owned),
                        recovery: false,
                    });
                    switched_off.push(SwitchedOff {
                        name: (*setting).to_owned(),
                        parent: text::shown(parent.unwrap_or("the default")),
                        value: Some((*value).to_owned()),
                        why: format!("let workers of {base} act without being asked"),
                    });
                }
            }
            Some((_, Worker::Harmless)) => {}
            None => unknown.push(name.to_owned()),
        }
        stay.push(format!("\"{name}\""));
    }
    if switched_off.iter().any(|one| one.name.starts_with(NAME)) {
        let value = stay.join(", ");
        lines.push(Line {
            name: NAME.to_owned(),
            value: value.clone(),
            after_recovery: Some(value),
            parent: Some(listed.to_owned()),
            recovery: false,
        });
    }
    unknown
}

fn applies(when: When, directory: &Path, parent: Option<&str>, changes: bool) -> bool {
    match when {
        When::Always => true,
        When::Set => changes,
        When::Contains(text) => parent.is_some_and(|parent| parent.contains(text)),
        When::LeadsOutside => {
            parent.is_some_and(|parent| !parent.is_empty() && leads_outside(directory, parent))
        }
        When::LeadsElsewhere => parent.is_some_and(|parent| {
            !parent.is_empty()
                && (text::path(parent).is_relative() || leads_outside(directory, parent))
        }),
    }
}

/// Returns `name`, with a number if a file of the copy has this name.
fn free_directory(directory: &Path, name: &str) -> String {
    let numbered = (1..).map(|number| format!("{name}_{number}"));
    let mut names = std::iter::once(name.to_owned()).chain(numbered);
    let is_free = |name: &String| match fs::symlink_metadata(directory.join(name)) {
        Ok(found) => found.is_dir(),
        Err(_) => true,
    };
    names.find(is_free).unwrap_or_else(|| name.to_owned())
}

/// Returns true if `path`, relative to the data directory, is not inside it.
fn leads_outside(directory: &Path, path: &str) -> bool {
    let path = text::path(path);
    if path.is_absolute() {
        let real = fs::canonicalize(directory).unwrap_or_else(|_| directory.to_owned());
        let inside = path.starts_with(directory) || path.starts_with(real);
        return !inside || path.components().any(|part| part == Component::ParentDir);
    }
    let mut depth = 0_usize;
    for part in path.components() {
        match part {
            Component::ParentDir => match depth.checked_sub(1) {
                Some(less) => depth = less,
                None => return true,
            },
            Component::Normal(_) => depth += 1,
            _ => {}
        }
    }
    false
}

/// Returns `off` for every spelling of false, as the table has it; other values unchanged.
fn bool_of(value: &str) -> &str {
    match value.to_ascii_lowercase().as_str() {
        "off" | "of" | "false" | "fals" | "fal" | "fa" | "f" | "no" | "n" | "0" => "off",
        _ => value,
    }
}

/// Returns a decoded value for display. Replaces a connection string, because it may contain a
/// password.
fn shown(name: &str, value: &str) -> String {
    if name == "primary_conninfo" && !value.is_empty() {
        "(a connection text)".to_owned()
    } else {
        text::shown(value)
    }
}

fn state_json(directory: &Path, state: &State) -> Result<Vec<u8>> {
    serde_json::to_vec_pretty(state)
        .map_err(|error| Error::io("write", directory.join(STATE_FILE))(error.into()))
}

fn write_state(directory: &Path, state: &State) -> Result<()> {
    write_private(&directory.join(STATE_FILE), &state_json(directory, state)?)
}

/// Reads the record of a copy; `None` if the directory has none.
fn read_state(directory: &Path) -> Result<Option<State>> {
    let path = directory.join(STATE_FILE);
    let json = match fs::read(&path) {
        Ok(json) => json,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("read", path)(error)),
    };
    serde_json::from_slice(&json)
        .map(Some)
        .map_err(|error| Error::Damaged {
            object: path.display().to_string(),
            problem: error.to_string(),
        })
}

/// Returns true while a start of the server in `directory` begins with archive recovery.
#[must_use]
pub fn recovery_is_pending(directory: &Path) -> bool {
    ["recovery.signal", "standby.signal"]
        .iter()
        .any(|signal| directory.join(signal).exists())
}

/// Removes the settings that only the recovery needed. PostgreSQL runs this as
/// `recovery_end_command`, after it has removed the signal file. Returns false if there was nothing
/// to do. Can be repeated.
///
/// # Errors
/// [`Error::Io`] for the files, [`Error::Damaged`] for the record.
pub fn recovery_ended(directory: &Path) -> Result<bool> {
    if recovery_is_pending(directory) {
        return Ok(false);
    }
    let Some(mut state) = read_state(directory)? else {
        return Ok(false);
    };
    let after = |line: &Line| line.after_recovery.clone();
    if state
        .lines
        .iter()
        .all(|line| after(line).as_ref() == Some(&line.value))
    {
        return Ok(false);
    }
    rewrite(directory, &state.lines, after)?;
    state.lines.retain_mut(|line| {
        if let Some(value) = &line.after_recovery {
            line.value.clone_from(value);
        }
        line.after_recovery.is_some()
    });
    save(directory, &state)?;
    Ok(true)
}

/// Stores the record, or removes it when nothing is isolated any more.
fn save(directory: &Path, state: &State) -> Result<()> {
    let path = directory.join(STATE_FILE);
    if state.lines.is_empty() && state.edits.is_empty() {
        return durable::remove(&path).map_err(Error::local);
    }
    durable::replace(&path, &state_json(directory, state)?).map_err(Error::local)
}

#[cfg(test)]
mod tests;
