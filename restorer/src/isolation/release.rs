//! `pitr-restore release`: ends the isolation of a copy that replaces its parent.

use std::path::{Path, PathBuf};

use repository::durable;

use super::{
    AUTO, Configuration, Edit, Line, MAIN, SETTINGS, State,
    configuration::INCLUDES,
    fallback,
    guc_file::parse,
    imports,
    parent::{self, Doubt},
    read_state, recovery_ended, recovery_is_pending, rewrite, save,
    table::How,
    text,
};
use crate::{Error, Result};

/// A setting that a release changes.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Change {
    /// The name of the setting.
    pub name: String,
    /// The isolated value; `None` if the line is a comment.
    pub from: Option<String>,
    /// The parent's value; `None` is PostgreSQL's default.
    pub to: Option<String>,
    /// The reason why the setting stays isolated; `None` if it is released.
    pub stays: Option<String>,
}

/// The changes that a release would make, or made.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Release {
    /// The changes, in the order of the table.
    pub changes: Vec<Change>,
    /// True if recovery has not ended: its own settings stay until then.
    pub recovery_pending: bool,
    /// True if a server runs on the copy. It uses the settings from its next start.
    pub running: bool,
}

/// The sources for the check whether the parent still answers.
#[derive(Clone, Debug, Default)]
pub struct Asked<'a> {
    /// The connection string of the cluster; empty when there is none.
    pub conninfo: &'a str,
    /// The program `pg_isready`, if it was found.
    pub pg_isready: Option<PathBuf>,
}

/// Describes the release of the copy in `directory` without changing anything.
///
/// # Errors
/// [`Error::Usage`] if the directory is not an isolated copy.
pub fn describe(directory: &Path) -> Result<Release> {
    let state = isolated(directory)?;
    let pending = recovery_is_pending(directory);
    let mut changes: Vec<Change> = Vec::new();
    for line in &state.lines {
        let stays = (pending && line.recovery).then(|| "until recovery has ended".to_owned());
        // The parent has no value for lines that only the recovery needs.
        if line.recovery && line.after_recovery.is_none() {
            continue;
        }
        changes.push(Change {
            name: line.name.clone(),
            from: Some(line.value.clone()),
            to: line.parent.clone(),
            stays,
        });
    }
    for edit in &state.edits {
        let now = parse(&edit.new).into_iter().flatten().next();
        let (from, to) = if edit.is_of_access() {
            (Some(edit.new.as_str()), edit.old.as_deref())
        } else {
            let now = now.as_ref().map(|entry| entry.value.as_str());
            (now, Some(edit.parent.as_str()))
        };
        changes.push(Change {
            name: edit.name.clone(),
            from: from.map(text::shown),
            to: to.map(text::shown),
            stays: edit.stays(directory),
        });
    }
    let place = |change: &Change| SETTINGS.iter().position(|row| row.name == change.name);
    changes.sort_by_key(|change| place(change).unwrap_or(usize::MAX));
    changes.retain(|change| change.from != change.to);
    Ok(Release {
        changes,
        recovery_pending: pending,
        running: directory.join("postmaster.pid").exists(),
    })
}

/// The state of the parent of a copy, as far as it is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ParentState {
    /// The parent answers: the address, the process, or the setting whose connection string reaches
    /// it.
    Answers(String),
    /// The parent does not answer, and its connection string or its data directory is known.
    Silent,
    /// No server answers, and the parent may still run.
    Unknown(Doubt),
}

/// Checks whether the parent still answers.
///
/// # Errors
/// [`Error::Usage`] if the directory is not an isolated copy, or if a connection string cannot be
/// used.
pub fn parent_state(directory: &Path, asked: &Asked<'_>) -> Result<ParentState> {
    let state = isolated(directory)?;
    if let Some(address) = state.parent.answers(directory) {
        return Ok(ParentState::Answers(address));
    }
    let configuration = Configuration::read(directory);
    let primaries = configuration.lines_of("primary_conninfo");
    let mut texts: Vec<(&str, &str)> = primaries
        .map(|one| ("primary_conninfo", one.entry.value.as_str()))
        .collect();
    texts.push(("the cluster's conninfo", asked.conninfo));
    for (source, text) in texts.iter().filter(|(_, text)| !text.is_empty()) {
        let Some(pg_isready) = &asked.pg_isready else {
            let source_name = (*source).to_owned();
            return Ok(ParentState::Unknown(Doubt::NotAsked { source_name }));
        };
        if parent::is_ready(pg_isready, text)? {
            return Ok(ParentState::Answers((*source).to_owned()));
        }
    }
    Ok(match state.parent.doubt(directory) {
        // The connection string names the address of the parent.
        Some(Doubt::Addresses(_)) if !asked.conninfo.is_empty() => ParentState::Silent,
        Some(doubt) => ParentState::Unknown(doubt),
        None => ParentState::Silent,
    })
}

/// Ends the isolation of the copy in `directory`. The settings take effect at the server's next
/// start.
///
/// # Errors
/// [`Error::Usage`] if the directory is not an isolated copy, [`Error::Io`].
pub fn release(directory: &Path) -> Result<Release> {
    recovery_ended(directory)?;
    let described = describe(directory)?;
    let mut state = isolated(directory)?;
    // The access rules first: without `unix_socket_permissions` they would let others in. The last
    // edit first, because a line may have several.
    for edit in state.edits.iter().rev() {
        if edit.stays(directory).is_none() {
            undo(directory, edit)?;
        }
    }
    let stays = |line: &Line| described.recovery_pending && line.recovery;
    let new_value = |line: &Line| stays(line).then(|| line.value.clone());
    rewrite(directory, &state.lines, new_value)?;
    state.lines.retain(stays);
    for line in &mut state.lines {
        line.after_recovery = None;
    }
    state.edits.clear();
    fallback::remove(directory)?;
    imports::remove_unused(directory)?;
    save(directory, &state)?;
    if state.lines.is_empty() {
        remove_headings(directory)?;
    }
    Ok(described)
}

fn isolated(directory: &Path) -> Result<State> {
    read_state(directory)?.ok_or_else(|| {
        Error::usage(format!(
            "{} is not an isolated copy: it was not restored by this version of pitr-restore, or was released already",
            directory.display()
        ))
    })
}

impl Edit {
    /// Returns true for a line of the access rules and of the user name maps. The directive in it
    /// follows the name of the file, and no setting has a blank in its name.
    fn is_of_access(&self) -> bool {
        self.name.contains(' ')
    }

    /// Returns the reason why the line is not restored; `None` if it is restored.
    fn stays(&self, directory: &Path) -> Option<String> {
        let directive = self.name.rsplit(' ').next().unwrap_or_default();
        if self.is_of_access() && directive == "rule" {
            // The rules that let nobody else in stay while the copy has no others of its parent.
            return match self.parent.as_str() {
                "" => None,
                file => stays_changed(directory, "hba_file", file),
            };
        }
        let is_at = self.is_of_access() && directive == "@";
        if !is_at && !INCLUDES.contains(&directive) {
            return stays_changed(directory, &self.name, &self.parent);
        }
        // The server resolves a relative path from the file that contains it, wherever the copy is
        // now.
        let file = directory.join(text::path(&self.file));
        let folder = file.parent().unwrap_or(directory);
        let path = text::of_path(&folder.join(text::path(&self.parent)));
        let checked = match directive {
            _ if is_at => "include",
            directive => directive,
        };
        stays_changed(directory, checked, &path)
    }
}

/// Returns the reason why a changed line is not restored; `None` if it is restored. `parent` is the
/// parent's value, decoded; for an include directive, the path of the file.
fn stays_changed(directory: &Path, name: &str, parent: &str) -> Option<String> {
    let real = |path: &Path| std::fs::canonicalize(path).ok();
    let path = text::path(parent);
    match name {
        // The server would use another directory than the one that it is started with.
        "data_directory" if real(&path) != real(directory) => {
            Some("it names another directory than this one".to_owned())
        }
        "hba_file" | "ident_file" if !path.is_file() => {
            Some("there is no such file here".to_owned())
        }
        "include" if !path.is_file() => Some("there is no such file here".to_owned()),
        "include_dir" if !path.is_dir() => Some("there is no such directory here".to_owned()),
        _ if INCLUDES.contains(&name) => {
            let included = Configuration::included(name, &path);
            let commented = SETTINGS.iter().filter(|row| row.how == How::Comment);
            commented.into_iter().find_map(|row| {
                let mut lines = included.lines_of(row.name);
                let why =
                    lines.find_map(|one| stays_changed(directory, row.name, &one.entry.value))?;
                Some(format!("it sets {}, and {why}", row.name))
            })
        }
        _ => None,
    }
}

fn undo(directory: &Path, edit: &Edit) -> Result<()> {
    let path = directory.join(text::path(&edit.file));
    let content = std::fs::read(&path).map_err(Error::io("read", &path))?;
    let mut lines = lines_of(&content);
    // A line of the access rules may be continued on the next one.
    let (new, old) = (
        text::encode(&edit.new),
        edit.old.as_deref().map(text::encode),
    );
    let new = lines_of(&new);
    let Some(at) = lines.windows(new.len()).rposition(|window| *window == new) else {
        return Ok(());
    };
    let old = old.as_deref().map_or_else(Vec::new, lines_of);
    lines.splice(at..at + new.len(), old);
    durable::replace(&path, &lines.join(&b'\n')).map_err(Error::local)
}

fn lines_of(content: &[u8]) -> Vec<&[u8]> {
    content.split(|byte| *byte == b'\n').collect()
}

/// Removes the comments above our lines.
fn remove_headings(directory: &Path) -> Result<()> {
    for file in [AUTO, MAIN] {
        let path = directory.join(file);
        let text = std::fs::read(&path).map_err(Error::io("read", &path))?;
        let lines = lines_of(&text);
        let kept: Vec<&[u8]> = lines
            .iter()
            .filter(|line| !line.starts_with(super::HEADING.as_bytes()))
            .copied()
            .collect();
        if kept.len() < lines.len() {
            durable::replace(&path, &kept.join(&b'\n')).map_err(Error::local)?;
        }
    }
    Ok(())
}
