//! Imports configuration files that are outside of the copy: their content is copied into it.
//!
//! If a copy included a file of its parent's host, each change of that file would also affect the
//! copy, and a `data_directory` in it would start the server on the parent's files. PostgreSQL
//! takes that setting only from `postgresql.conf` and its includes (`SelectConfigFiles` in
//! `guc.c`), and resolves a relative path in it against the working directory of the caller.
//! Therefore a line of the copy could override it only with an absolute path, which would prevent a
//! move of the copy.
//!
//! A file in the parent's data directory is not imported: the copy has it as it was in the backup,
//! so the line names the copy's own file. The same applies to the files that the access rules
//! include (`access.rs`).
//!
//! Invariant: after the import no file of the copy includes a file outside of it.

use std::{
    fs,
    io::Read,
    path::{Component, Path, PathBuf},
};

use wal_format::SystemIdentifier;

use super::{
    COMMENT, Edit,
    configuration::{AUTO, Configuration, DEPTH_MAX, INCLUDES, MAIN, files_of, read_regular},
    guc_file::{Entry, parse, quote},
    text, write_private,
};
use crate::{Error, Result};

mod access;

/// The prefix of the names of imported files. The names do not end in `.conf`, so that no
/// `include_dir` includes them.
pub(super) const PREFIX: &str = "tidemark_included.";
/// The name of a file that is never written, for the directives that close a loop.
const LOOP: &str = "tidemark_included.loop";
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
    /// True if files outside of the copy include each other in a loop.
    has_loop: bool,
    /// The number in the name that was given last. A file that cannot be read keeps its name.
    last: usize,
}

/// The cluster of a copy.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cluster<'a> {
    /// The directory of the copy.
    pub(super) directory: &'a Path,
    pub(super) system: SystemIdentifier,
    pub(super) major: u16,
    /// The parent's `data_directory`, if its configuration sets an absolute path.
    pub(super) parent: Option<&'a Path>,
}

/// Imports every file outside of the copy that its configuration includes. Adds the changed lines
/// of the copy's own files to `edits`.
///
/// # Errors
/// [`Error::Io`] for the files of the copy, [`Error::Usage`] for too many files.
pub(super) fn import(cluster: Cluster<'_>, edits: &mut Vec<Edit>) -> Result<Imported> {
    let mut importer = Importer::new(cluster, edits, Imported::default())?;
    for file in [MAIN, AUTO] {
        importer.own(&importer.root.join(file), 0)?;
    }
    Ok(importer.imported)
}

/// Imports every file outside of the copy that its access rules in `file` include. Adds to
/// `imported`, the result of earlier imports.
///
/// # Errors
/// As [`import`].
pub(super) fn import_access(
    cluster: Cluster<'_>,
    file: &Path,
    edits: &mut Vec<Edit>,
    imported: Imported,
) -> Result<Imported> {
    let mut importer = Importer::new(cluster, edits, imported)?;
    importer.own_access(file, 0)?;
    Ok(importer.imported)
}

struct Importer<'a> {
    cluster: Cluster<'a>,
    /// The directory of the copy, without links in its path.
    root: PathBuf,
    edits: &'a mut Vec<Edit>,
    imported: Imported,
    /// The files whose includes are being imported, each included by the one before it.
    open: Vec<PathBuf>,
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

/// Returns a path without links; the path itself if it leads nowhere.
pub(super) fn real(path: &Path) -> PathBuf {
    fs::canonicalize(path).unwrap_or_else(|_| path.to_owned())
}

impl<'a> Importer<'a> {
    fn new(cluster: Cluster<'a>, edits: &'a mut Vec<Edit>, imported: Imported) -> Result<Self> {
        let directory = cluster.directory;
        Ok(Self {
            cluster,
            root: fs::canonicalize(directory).map_err(Error::io("find", directory))?,
            edits,
            imported,
            open: Vec::new(),
        })
    }

    /// Changes the include directives of a file of the copy, and of the files in the copy that it
    /// includes.
    fn own(&mut self, file: &Path, depth: usize) -> Result<()> {
        // `Configuration::read` reports a file that is missing, nested too deeply or in a loop.
        let real = real(file);
        if depth > DEPTH_MAX || self.open.contains(&real) {
            return Ok(());
        }
        self.open.push(real);
        let done = self.own_lines(file, depth);
        self.open.pop();
        done
    }

    fn own_lines(&mut self, file: &Path, depth: usize) -> Result<()> {
        let Ok(bytes) = read_regular(file) else {
            return Ok(());
        };
        let content = text::decode(&bytes);
        let mut lines: Vec<String> = content.split('\n').map(str::to_owned).collect();
        let mut changed = false;
        for entry in includes(&content) {
            let target = &self.named_by(file, &entry.value);
            let own = self.in_copy(target);
            if let Some(own) = &own {
                let files = match entry.name.as_str() {
                    "include_dir" => files_of(own).unwrap_or_default(),
                    _ => vec![own.clone()],
                };
                for file in files {
                    self.own(&file, depth + 1)?;
                }
                if self.is_inside(target) {
                    continue;
                }
            }
            let Some(line) = entry.line.checked_sub(1).and_then(|at| lines.get_mut(at)) else {
                continue;
            };
            let new = if let Some(own) = own {
                // The release leaves this line: it names the same file wherever the copy is.
                let path = text::of_path(&self.relative(file, &own));
                let replaced = line.trim_end_matches('\r');
                format!("{} {} {COMMENT}{replaced}", entry.name, quote(&path))
            } else {
                let include = Include {
                    entry: &entry,
                    from: file,
                    target,
                    depth: depth + 1,
                };
                let name = self.outside(include)?;
                let path = name.map(|name| self.relative(file, &self.root.join(name)));
                let new = line_of(path.map(|path| text::of_path(&path)), line);
                self.edits.push(Edit {
                    file: text::of_path(file.strip_prefix(&self.root).unwrap_or(file)),
                    name: entry.name.clone(),
                    old: Some(line.clone()),
                    new: new.clone(),
                    parent: entry.value.clone(),
                });
                new
            };
            changed = true;
            *line = new;
        }
        if changed {
            let content = text::encode(&lines.join("\n"));
            fs::write(file, content).map_err(Error::io("write", file))?;
        }
        Ok(())
    }

    /// Imports the file or directory outside of the copy that an include directive names. Returns
    /// the name of the imported file; `None` if PostgreSQL would include nothing.
    fn outside(&mut self, include: Include<'_>) -> Result<Option<String>> {
        let Include {
            entry,
            target,
            depth,
            ..
        } = include;
        if entry.name != "include_dir"
            && let Some(own) = self.in_copy(target)
        {
            self.own(&own, depth)?;
            let is_there = entry.name == "include" || own.exists();
            return Ok(is_there.then(|| text::of_path(&self.relative(&self.root, &own))));
        }
        match entry.name.as_str() {
            "include_if_exists" if !target.exists() => Ok(None),
            "include_dir" => {
                let name = self.next_name()?;
                let own = self.in_copy(target);
                match files_of(own.as_deref().unwrap_or(target)) {
                    Ok(files) => {
                        let mut list = String::new();
                        for target in &files {
                            let imported = match &own {
                                Some(_) => {
                                    self.own(target, depth)?;
                                    text::of_path(&self.relative(&self.root, target))
                                }
                                None => self.file(Include { target, ..include })?,
                            };
                            list.push_str(&line_of(Some(imported), ""));
                            list.push('\n');
                        }
                        self.write(&name, target, &list)?;
                        if own.is_none() {
                            self.imported.files.push(target.to_owned());
                        }
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
        let real = real(include.target);
        let is_loop = self.open.contains(&real);
        self.open.push(real);
        let done = self.file_lines(include, is_loop);
        self.open.pop();
        done
    }

    fn file_lines(&mut self, include: Include<'_>, is_loop: bool) -> Result<String> {
        let Include { target, depth, .. } = include;
        if is_loop && self.imported.has_loop {
            return Ok(LOOP.to_owned());
        }
        let name = if is_loop {
            LOOP.to_owned()
        } else {
            self.next_name()?
        };
        let content = match read_regular(target) {
            Ok(_) if is_loop || depth > DEPTH_MAX => {
                self.imported.has_loop |= is_loop;
                self.unreadable(include, &name, "it is nested too deeply or in a loop");
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
        self.imported.files.push(target.to_owned());
        Ok(name)
    }

    /// Writes an imported file.
    fn write(&self, name: &str, origin: &Path, content: &str) -> Result<()> {
        let content = format!("{COMMENT}{}\n{content}", text::of_path(origin));
        write_private(&self.root.join(name), &text::encode(&content))
    }

    fn unreadable(&mut self, include: Include<'_>, name: &str, why: &str) {
        let relative = text::path(&include.entry.value).is_relative();
        let why = if relative && self.cluster.parent.is_none() && self.is_own(include.from) {
            format!(
                "{why}; the line names it relative to the parent's directory, which is not known here"
            )
        } else {
            why.to_owned()
        };
        self.imported.problems.push(format!(
            "{} line {} includes {}, which cannot be read here ({why}): PostgreSQL does not start before its content is in {}, without data_directory, \
             hba_file and ident_file, which would lead to the parent's files",
            include.from.display(),
            include.entry.line,
            include.target.display(),
            self.root.join(name).display()
        ));
    }

    /// Returns the path that a line of the copy's file `file` names. The parent resolved a relative
    /// path that leads out of its data directory from there.
    fn named_by(&self, file: &Path, value: &str) -> PathBuf {
        let value = text::path(value);
        let folder = file.parent().unwrap_or(Path::new("/"));
        let in_copy = folder.join(&value);
        let relative = folder.strip_prefix(&self.root);
        match (self.cluster.parent, relative) {
            (Some(parent), Ok(relative)) if !self.is_inside(&in_copy) => {
                parent.join(relative).join(value)
            }
            _ => in_copy,
        }
    }

    /// Returns the file or directory of the copy that `path` leads to, or that the copy has of the
    /// parent's data directory; `None` if it is outside of both.
    fn in_copy(&self, path: &Path) -> Option<PathBuf> {
        if self.is_inside(path) {
            return Some(path.to_owned());
        }
        let has_parent_dir =
            |path: &Path| path.components().any(|part| part == Component::ParentDir);
        let plain = (!has_parent_dir(path)).then(|| path.to_owned());
        let paths = plain.into_iter().chain(fs::canonicalize(path));
        let mut inner = paths.filter_map(|path| {
            let is_parent = |directory: &&Path| {
                Some(*directory) == self.cluster.parent || self.is_same_cluster(directory)
            };
            let parent = path.ancestors().skip(1).find(is_parent)?;
            path.strip_prefix(parent).ok().map(Path::to_owned)
        });
        inner.next().map(|inner| self.root.join(inner))
    }

    /// Returns true if a directory is a data directory of the copy's cluster. `pg_control` begins
    /// with the system identifier; a server may be writing the rest.
    fn is_same_cluster(&self, directory: &Path) -> bool {
        let mut system = [0; 8];
        let control = fs::File::open(directory.join("global/pg_control"));
        control.is_ok_and(|mut control| control.read_exact(&mut system).is_ok())
            && u64::from_le_bytes(system) == self.cluster.system.0
    }

    /// Returns a path in the copy as the copy's file `file` names it.
    fn relative(&self, file: &Path, path: &Path) -> PathBuf {
        let inside = |path: &Path| path.strip_prefix(&self.root).unwrap_or(path).to_owned();
        let depth = inside(file).components().count().saturating_sub(1);
        Path::new(&"../".repeat(depth)).join(inside(path))
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

    /// Returns true for a file of the copy.
    fn is_own(&self, file: &Path) -> bool {
        real(file).starts_with(&self.root)
    }

    /// Returns a name that no file of the copy has.
    fn next_name(&mut self) -> Result<String> {
        loop {
            self.imported.last += 1;
            if self.imported.last > FILES_MAX {
                return Err(Error::usage(format!(
                    "the configuration in {} includes more than {FILES_MAX} files outside of it; include fewer",
                    self.root.display()
                )));
            }
            let name = format!("{PREFIX}{}", self.imported.last);
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
    let root = fs::canonicalize(directory).map_err(Error::io("find", directory))?;
    let configuration = Configuration::read(directory);
    let mut used = configuration.files.clone();
    let version = fs::read_to_string(root.join("PG_VERSION")).unwrap_or_default();
    let major = version.trim().parse().unwrap_or(u16::MAX);
    for file in access_files(&root, &configuration) {
        access::add_read_files(&file, major, 0, &mut used);
    }
    for entry in fs::read_dir(&root).map_err(Error::io("list", &root))? {
        let path = entry.map_err(Error::io("list", &root))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(PREFIX) && !used.contains(&path) {
            fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        }
    }
    Ok(())
}

/// Returns the files of the access rules and of the user name maps that a server in `root` reads,
/// as far as they are in it.
pub(super) fn access_files(root: &Path, configuration: &Configuration) -> [PathBuf; 2] {
    [("hba_file", "pg_hba.conf"), ("ident_file", "pg_ident.conf")].map(|(setting, default)| {
        let named = configuration.value(setting).map(text::path);
        let inside = named.filter(|path| path.starts_with(root));
        inside.unwrap_or_else(|| root.join(default))
    })
}
