//! Imports configuration files that are outside of the copy: their content is copied into it.
//!
//! If a copy included a file of its parent's host, each change of that file would also affect the
//! copy, and a `data_directory` in it would start the server on the parent's files. PostgreSQL
//! takes that setting only from `postgresql.conf` and its includes (`SelectConfigFiles` in
//! `guc.c`), and resolves a relative path in it against the working directory of the caller.
//! Therefore a line of the copy could override it only with an absolute path, which would prevent a
//! move of the copy.
//!
//! Invariant: after the import no file of the copy includes a file outside of it.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
};

use super::{
    COMMENT, Edit,
    configuration::{AUTO, Configuration, DEPTH_MAX, INCLUDES, MAIN, files_of},
    guc_file::{Entry, parse, quote},
    text, write_private,
};
use crate::{Error, Result};

/// The prefix of the names of imported files. The names do not end in `.conf`, so that no
/// `include_dir` includes them.
pub(super) const PREFIX: &str = "tidemark_included.";
/// The maximum number of imported files. Files outside of the copy can include each other
/// endlessly.
const FILES_MAX: usize = 1000;

/// The result of an import.
#[derive(Debug, Default)]
pub(super) struct Imported {
    /// The original paths of the imported files and directories.
    pub(super) files: Vec<PathBuf>,
    /// The files that cannot be read on this host, one sentence each.
    pub(super) problems: Vec<String>,
}

/// Imports every file outside of `directory` that its configuration includes. Adds the changed
/// lines of the copy's own files to `edits`.
///
/// # Errors
/// [`Error::Io`] for the files of the copy, [`Error::Usage`] for too many files.
pub(super) fn import(directory: &Path, edits: &mut Vec<Edit>) -> Result<Imported> {
    let root = fs::canonicalize(directory).map_err(Error::io("find", directory))?;
    let mut importer = Importer {
        root: root.clone(),
        last: 0,
        edits,
        imported: Imported::default(),
    };
    for file in [MAIN, AUTO] {
        importer.own(&root.join(file), 0)?;
    }
    Ok(importer.imported)
}

struct Importer<'a> {
    root: PathBuf,
    /// The number in the name that was given last.
    last: usize,
    edits: &'a mut Vec<Edit>,
    imported: Imported,
}

/// An include directive.
#[derive(Clone, Copy)]
struct Include<'a> {
    entry: &'a Entry,
    /// The file that contains the directive.
    from: &'a Path,
    /// The file or directory that it names.
    target: &'a Path,
    /// The nesting depth of the included file.
    depth: usize,
}

/// Reads a regular file. The read of a FIFO would wait for a writer.
fn read_regular(path: &Path) -> io::Result<Vec<u8>> {
    match fs::metadata(path)? {
        found if found.is_file() || found.is_dir() => fs::read(path),
        _ => Err(io::Error::other("it is not a regular file")),
    }
}

impl Importer<'_> {
    /// Changes the include directives of a file of the copy, and of the files in the copy that it
    /// includes.
    fn own(&mut self, file: &Path, depth: usize) -> Result<()> {
        // `Configuration::read` reports a file that is missing or nested too deeply.
        let Ok(bytes) = read_regular(file) else {
            return Ok(());
        };
        if depth > DEPTH_MAX {
            return Ok(());
        }
        let content = text::decode(&bytes);
        let mut lines: Vec<String> = content.split('\n').map(str::to_owned).collect();
        let before = self.edits.len();
        let folder = file.parent().unwrap_or(Path::new("/"));
        for entry in includes(&content) {
            let target = &folder.join(text::path(&entry.value));
            if self.is_inside(target) {
                let files = match entry.name.as_str() {
                    "include_dir" => files_of(target).unwrap_or_default(),
                    _ => vec![target.clone()],
                };
                for file in files {
                    self.own(&file, depth + 1)?;
                }
                continue;
            }
            let include = Include {
                entry: &entry,
                from: file,
                target,
                depth: depth + 1,
            };
            let name = self.outside(include)?;
            let Some(line) = entry.line.checked_sub(1).and_then(|at| lines.get_mut(at)) else {
                continue;
            };
            let relative = file.strip_prefix(&self.root).unwrap_or(file);
            let depth = relative.components().count().saturating_sub(1);
            let new = line_of(
                name.map(|name| format!("{}{name}", "../".repeat(depth))),
                line,
            );
            self.edits.push(Edit {
                file: text::of_path(relative),
                name: entry.name.clone(),
                old: Some(line.clone()),
                new: new.clone(),
                parent: text::of_path(target),
            });
            *line = new;
        }
        if self.edits.len() > before {
            let content = text::encode(&lines.join("\n"));
            fs::write(file, content).map_err(Error::io("write", file))?;
        }
        Ok(())
    }

    /// Imports the file or directory outside of the copy that an include directive names. Returns
    /// the name of the imported file; `None` if PostgreSQL would include nothing.
    fn outside(&mut self, include: Include<'_>) -> Result<Option<String>> {
        let Include { entry, target, .. } = include;
        match entry.name.as_str() {
            "include_if_exists" if !target.exists() => Ok(None),
            "include_dir" => {
                let name = self.next_name()?;
                match files_of(target) {
                    Ok(files) => {
                        let mut list = String::new();
                        for target in &files {
                            let imported = self.file(Include { target, ..include })?;
                            list.push_str(&line_of(Some(imported), ""));
                            list.push('\n');
                        }
                        self.write(&name, target, &list)?;
                    }
                    Err(error) => self.unreadable(include, &name, &error.to_string()),
                }
                Ok(Some(name))
            }
            _ => self.file(include).map(Some),
        }
    }

    /// Imports a file and the files that it includes. Returns the name of the imported file.
    fn file(&mut self, include: Include<'_>) -> Result<String> {
        let Include { target, depth, .. } = include;
        let name = self.next_name()?;
        let content = match read_regular(target) {
            Ok(_) if depth > DEPTH_MAX => {
                self.unreadable(include, &name, "it is nested too deeply");
                return Ok(name);
            }
            Ok(bytes) => text::decode(&bytes),
            Err(error) => {
                self.unreadable(include, &name, &error.to_string());
                return Ok(name);
            }
        };
        let mut lines: Vec<String> = content.split('\n').map(str::to_owned).collect();
        let folder = target.parent().unwrap_or(Path::new("/"));
        for entry in includes(&content) {
            let next = &folder.join(text::path(&entry.value));
            let include = Include {
                entry: &entry,
                from: target,
                target: next,
                depth: depth + 1,
            };
            let name = self.outside(include)?;
            if let Some(line) = entry.line.checked_sub(1).and_then(|at| lines.get_mut(at)) {
                *line = line_of(name, line);
            }
        }
        self.write(&name, target, &lines.join("\n"))?;
        Ok(name)
    }

    fn write(&mut self, name: &str, origin: &Path, content: &str) -> Result<()> {
        let content = format!("{COMMENT}{}\n{content}", text::of_path(origin));
        write_private(&self.root.join(name), &text::encode(&content))?;
        self.imported.files.push(origin.to_owned());
        Ok(())
    }

    fn unreadable(&mut self, include: Include<'_>, name: &str, why: &str) {
        self.imported.problems.push(format!(
            "{} line {} includes {}, which cannot be read here ({why}): PostgreSQL does not start before its content is in {}, without data_directory, \
             hba_file and ident_file, which would lead to the parent's files",
            include.from.display(),
            include.entry.line,
            include.target.display(),
            self.root.join(name).display()
        ));
    }

    /// Returns true if `path` leads to a file or directory in the copy.
    fn is_inside(&self, path: &Path) -> bool {
        match fs::canonicalize(path) {
            Ok(real) => real.starts_with(&self.root),
            // A path in the copy that does not exist stays: PostgreSQL then refuses to start or
            // includes nothing, as with the parent.
            Err(_) => {
                path.starts_with(&self.root)
                    && !path.components().any(|part| part == Component::ParentDir)
            }
        }
    }

    /// Returns a name that no file of the copy has.
    fn next_name(&mut self) -> Result<String> {
        loop {
            self.last += 1;
            if self.last > FILES_MAX {
                return Err(Error::usage(format!(
                    "the configuration in {} includes more than {FILES_MAX} files outside of it; include fewer",
                    self.root.display()
                )));
            }
            let name = format!("{PREFIX}{}", self.last);
            if fs::symlink_metadata(self.root.join(&name)).is_err() {
                return Ok(name);
            }
        }
    }
}

/// Returns the include directives of a file.
fn includes(content: &str) -> impl Iterator<Item = Entry> {
    let entries = parse(content).into_iter().flatten();
    entries.filter(|entry| INCLUDES.contains(&entry.name.as_str()))
}

/// Returns a line that includes an imported file, followed by the replaced line as a comment.
/// Without a `name` the result is only the comment.
fn line_of(name: Option<String>, replaced: &str) -> String {
    let comment = match replaced {
        "" => String::new(),
        replaced => format!("{COMMENT}{}", replaced.trim_end_matches('\r')),
    };
    match name {
        Some(name) => format!("include {} {comment}", quote(&name))
            .trim_end()
            .to_owned(),
        None => comment,
    }
}

/// Removes the imported files that no file of the copy in `directory` includes.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn remove_unused(directory: &Path) -> Result<()> {
    let used = Configuration::read(directory).files;
    let root = fs::canonicalize(directory).map_err(Error::io("find", directory))?;
    for entry in fs::read_dir(&root).map_err(Error::io("list", &root))? {
        let path = entry.map_err(Error::io("list", &root))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(PREFIX) && !used.contains(&path) {
            fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        }
    }
    Ok(())
}
