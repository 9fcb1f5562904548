//! Writes and changes lines of a copy's configuration files for a restore.
//!
//! Invariant: every other line keeps its bytes, even if they are not UTF-8.

use std::{
    fs::{self, OpenOptions},
    io::{ErrorKind, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use repository::durable;

use super::{
    COMMENT, Edit, HEADING, Line, Wanted,
    configuration::{AUTO, Setting},
    guc_file, text,
};
use crate::{Error, Result};

/// Turns a line of the copy's own files into a comment. A line of another file stays.
pub(super) fn comment_out(
    directory: &Path,
    setting: &Setting,
    edits: &mut Vec<Edit>,
) -> Result<()> {
    let root = fs::canonicalize(directory).map_err(Error::io("find", directory))?;
    let file = fs::canonicalize(&setting.file).map_err(Error::io("find", &setting.file))?;
    let Ok(relative) = file.strip_prefix(&root) else {
        // A file outside of the copy was imported or cannot be read.
        return Ok(());
    };
    let bytes = fs::read(&file).map_err(Error::io("read", &file))?;
    let mut lines: Vec<&[u8]> = bytes.split(|byte| *byte == b'\n').collect();
    let at = setting.entry.line.checked_sub(1);
    let Some(line) = at.and_then(|at| lines.get_mut(at)) else {
        return Ok(());
    };
    let old = line.to_vec();
    let new = [COMMENT.as_bytes(), &old].concat();
    *line = &new;
    fs::write(&file, lines.join(&b'\n')).map_err(Error::io("write", &file))?;
    edits.push(Edit {
        file: text::of_path(relative),
        name: setting.entry.name.clone(),
        old: Some(text::decode(&old)),
        new: text::decode(&new),
        parent: setting.entry.value.clone(),
    });
    Ok(())
}

/// Appends the lines of a restore to `postgresql.auto.conf`.
pub(super) fn append(directory: &Path, wanted: &Wanted<'_>, lines: &[Line]) -> Result<()> {
    let path = directory.join(AUTO);
    let mut content = match fs::read(&path) {
        Ok(content) => content,
        Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(Error::io("read", path)(error)),
    };
    let mut added = format!("\n{HEADING}{}\n", wanted.heading);
    added.push_str(HEADING);
    added.push_str("the copy is isolated; `pitr-restore release` lifts it\n");
    for line in lines {
        added.push_str(&written(&line.name, &line.value));
    }
    content.extend_from_slice(&text::encode(&added));
    for (name, value) in wanted.set {
        content.extend_from_slice(written(name, value).as_bytes());
    }
    write_private(&path, &content)
}

pub(super) fn written(name: &str, value: &str) -> String {
    format!("{name} = {}\n", guc_file::quote(value))
}

/// Writes a file with the permissions that the umask leaves of 0640: those of the data directory's
/// own files. The caller makes it durable.
pub(crate) fn write_private(path: &Path, content: &[u8]) -> Result<()> {
    let mut options = OpenOptions::new();
    let file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o640)
        .open(path);
    file.and_then(|mut file| file.write_all(content))
        .map_err(Error::io("write", path))
}

/// Gives each of our lines in `postgresql.auto.conf` a new value, or removes the line. Lines that
/// were changed since we wrote them stay.
pub(super) fn rewrite(
    directory: &Path,
    ours: &[Line],
    new_value: impl Fn(&Line) -> Option<String>,
) -> Result<()> {
    let path = directory.join(AUTO);
    let content = text::decode(&fs::read(&path).map_err(Error::io("read", &path))?);
    let lines = content.split('\n').map(|line| Some(line.to_owned()));
    let mut lines: Vec<Option<String>> = lines.collect();
    let entries: Vec<_> = guc_file::parse(&content).into_iter().flatten().collect();
    for line in ours {
        let same = |entry: &&guc_file::Entry| entry.name == line.name && entry.value == line.value;
        let Some(entry) = entries.iter().rfind(same) else {
            continue;
        };
        if let Some(place) = entry.line.checked_sub(1).and_then(|at| lines.get_mut(at)) {
            *place = new_value(line).map(|value| written(&line.name, &value).trim_end().to_owned());
        }
    }
    let kept: Vec<String> = lines.into_iter().flatten().collect();
    durable::replace(&path, &text::encode(&kept.join("\n"))).map_err(Error::local)
}
