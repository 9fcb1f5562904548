//! [`Configuration`]: the settings of a data directory, from every file that PostgreSQL would read,
//! in its order.
//!
//! `postgresql.conf` with its `include`, `include_if_exists` and `include_dir` lines comes first,
//! and `postgresql.auto.conf` last. The last value of a name counts (`ProcessConfigFileInternal` in
//! `guc-file.l`).

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use super::{
    guc_file::{Entry, parse},
    imports::{self, real},
    text,
};

/// The main file of a data directory.
pub(super) const MAIN: &str = "postgresql.conf";
/// The file of `ALTER SYSTEM`, which overrides all others.
pub(super) const AUTO: &str = "postgresql.auto.conf";
/// The depth of includes at which PostgreSQL gives up (`CONF_FILE_MAX_DEPTH`).
pub(super) const DEPTH_MAX: usize = 10;
/// The names of the directives that include other files.
pub(super) const INCLUDES: [&str; 3] = ["include", "include_if_exists", "include_dir"];

/// A setting and the line that contains it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Setting {
    pub(super) file: PathBuf,
    pub(super) entry: Entry,
}

/// Every setting of a data directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Configuration {
    /// The settings in the order in which PostgreSQL reads them.
    settings: Vec<Setting>,
    /// The files and lines with which PostgreSQL does not start, one sentence each.
    pub(super) problems: Vec<String>,
    /// The files that were read.
    pub(super) files: BTreeSet<PathBuf>,
    /// True if a file is nested too deeply. The first one is a problem.
    too_deep: bool,
    /// The files that are being read, each included by the one before it.
    open: Vec<PathBuf>,
}

impl Configuration {
    /// Reads the files of `directory`. A file that cannot be read is a problem and not an error:
    /// the restore continues, and PostgreSQL reports the file, too.
    pub(super) fn read(directory: &Path) -> Self {
        let mut found = Self::default();
        let root = real(directory);
        found.read_file(&root.join(MAIN), None, 0);
        if root.join(AUTO).exists() {
            found.read_file(&root.join(AUTO), None, 0);
        }
        found
    }

    /// Reads the files that a directive `name` with the absolute path `path` includes.
    pub(super) fn included(name: &str, path: &Path) -> Self {
        let mut found = Self::default();
        let files = match name {
            "include_dir" => files_of(path).unwrap_or_default(),
            _ => vec![path.to_owned()],
        };
        for file in files {
            found.read_file(&file, None, 1);
        }
        found
    }

    /// Returns the effective value, decoded (`text.rs`); `None` if no line sets it.
    pub(super) fn value(&self, name: &str) -> Option<&str> {
        let found = self.settings.iter().rfind(|one| one.entry.name == name);
        found.map(|one| one.entry.value.as_str())
    }

    /// Returns every line that sets `name`.
    pub(super) fn lines_of(&self, name: &str) -> impl Iterator<Item = &Setting> {
        self.settings
            .iter()
            .filter(move |one| one.entry.name == name)
    }

    fn read_file(&mut self, path: &Path, from: Option<(&Path, usize)>, depth: usize) {
        let named = |what: &str| match from {
            Some((file, line)) => format!(
                "{} line {line} includes {}, {what}",
                file.display(),
                path.display()
            ),
            None => format!("{} {what}", path.display()),
        };
        // A loop reaches the maximum depth once for each way through its files.
        let real = real(path);
        if depth > DEPTH_MAX || self.open.contains(&real) {
            if !self.too_deep {
                self.too_deep = true;
                self.problems.push(named(
                    "nested too deeply or in a loop: PostgreSQL does not start with it",
                ));
            }
            return;
        }
        self.open.push(real);
        self.read_lines(path, &named, depth);
        self.open.pop();
    }

    fn read_lines(&mut self, path: &Path, named: &dyn Fn(&str) -> String, depth: usize) {
        let text = match read_regular(path) {
            Ok(bytes) => text::decode(&bytes),
            Err(error) => {
                // `imports.rs` reports an imported file that cannot be read, with its original
                // path.
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                if !name.starts_with(imports::PREFIX) {
                    self.problems.push(named(&cannot_be_read(&error)));
                }
                return;
            }
        };
        self.files.insert(real(path));
        for parsed in parse(&text) {
            let entry = match parsed {
                Ok(entry) => entry,
                Err(error) => {
                    self.problems.push(format!(
                        "{} line {} is not valid syntax: PostgreSQL does not start with it",
                        path.display(),
                        error.line
                    ));
                    continue;
                }
            };
            let origin = Some((path, entry.line));
            let parent = path.parent().unwrap_or(Path::new("/"));
            let included = parent.join(text::path(&entry.value));
            match entry.name.as_str() {
                "include" => self.read_file(&included, origin, depth + 1),
                "include_if_exists" => {
                    if included.exists() {
                        self.read_file(&included, origin, depth + 1);
                    }
                }
                "include_dir" => match files_of(&included) {
                    Ok(files) => {
                        for file in files {
                            self.read_file(&file, origin, depth + 1);
                        }
                    }
                    Err(error) => self.problems.push(format!(
                        "{} line {} includes the directory {}, {}",
                        path.display(),
                        entry.line,
                        included.display(),
                        cannot_be_read(&error)
                    )),
                },
                _ => self.settings.push(Setting {
                    file: path.to_owned(),
                    entry,
                }),
            }
        }
    }
}

/// The maximum size of a file of a configuration. A device may have no end.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// Reads a regular file of a configuration. The read of a FIFO would wait for a writer.
pub(super) fn read_regular(path: &Path) -> io::Result<Vec<u8>> {
    let found = fs::metadata(path)?;
    if !found.is_file() && !found.is_dir() {
        return Err(io::Error::other("it is not a regular file"));
    }
    if found.len() > FILE_BYTES_MAX {
        return Err(io::Error::other("it is too large for a configuration"));
    }
    fs::read(path)
}

fn cannot_be_read(error: &io::Error) -> String {
    format!("which cannot be read here ({error}): PostgreSQL does not start without it")
}

/// Returns the files of an `include_dir`: `*.conf`, not hidden, in byte order.
pub(super) fn files_of(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if !name.starts_with('.') && name.len() >= 6 && name.ends_with(".conf") && !path.is_dir() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_value_in_postgresqls_order_counts() {
        let directory = tempfile::tempdir().expect("a directory");
        let outside = tempfile::tempdir().expect("a directory");
        let root = directory.path();
        let write = |path: PathBuf, text: &str| fs::write(path, text).expect("written");
        fs::create_dir(root.join("conf.d")).expect("a directory");
        let other = outside.path().join("other.conf");
        write(
            root.join(MAIN),
            &format!(
                "port = 1\nPort = 2\ninclude_dir = 'conf.d'\ninclude '{}'\ninclude_if_exists 'none.conf'\n\
                 include 'missing.conf'\nwork_mem = 1MB\n=\n",
                other.display()
            ),
        );
        write(
            root.join("conf.d/b.conf"),
            "a.x = b\narchive_command = 'one'\n",
        );
        write(root.join("conf.d/a.conf"), "a.x = a\ninclude '../c.conf'\n");
        write(root.join("conf.d/.hidden.conf"), "port = 9\n");
        write(root.join("conf.d/not.confx"), "port = 9\n");
        write(root.join("c.conf"), "hba_file = 'c'\n");
        write(other.clone(), "archive_command = 'two'\nwork_mem = 2MB\n");
        write(root.join(AUTO), "archive_command = 'three'\n");
        let found = Configuration::read(root);
        for (name, value) in [
            ("port", Some("2")),
            ("a.x", Some("b")),
            ("archive_command", Some("three")),
            ("hba_file", Some("c")),
            ("work_mem", Some("1MB")),
            ("wal_level", None),
        ] {
            assert_eq!(found.value(name), value, "{name}");
        }
        let other = fs::canonicalize(other).expect("it exists");
        assert!(found.files.contains(&other), "{:?}", found.files);
        assert_eq!(found.problems.len(), 2, "{:?}", found.problems);
        assert!(
            found.problems[0].contains("line 6 includes"),
            "{:?}",
            found.problems
        );
        assert!(found.problems[0].contains("missing.conf"));
        assert!(found.problems[1].contains("line 8 is not valid syntax"));
        assert_eq!(found.lines_of("archive_command").count(), 3);
    }

    #[test]
    fn what_cannot_be_read_to_an_end_is_a_problem() {
        let directory = tempfile::tempdir().expect("a directory");
        let root = directory.path();
        let fifo = root.join("fifo.conf");
        let made = std::process::Command::new("mkfifo").arg(&fifo).status();
        assert!(made.expect("mkfifo runs").success());
        let sparse = fs::File::create(root.join("large.conf")).expect("a file");
        sparse.set_len(FILE_BYTES_MAX + 1).expect("its length");
        let main = "include 'fifo.conf'\ninclude '/dev/zero'\ninclude 'large.conf'\nport = 1\n";
        fs::write(root.join(MAIN), main).expect("written");
        let found = Configuration::read(root);
        assert_eq!(found.value("port"), Some("1"));
        let [first, second, third] = found.problems.as_slice() else {
            panic!("{:?}", found.problems);
        };
        assert!(first.contains("it is not a regular file"), "{first}");
        assert!(second.contains("it is not a regular file"), "{second}");
        assert!(third.contains("too large"), "{third}");
    }

    #[test]
    fn a_file_that_includes_itself_is_a_problem() {
        let directory = tempfile::tempdir().expect("a directory");
        let write = |name: &str, text: &str| {
            fs::write(directory.path().join(name), text).expect("written");
        };
        write(MAIN, "include 'postgresql.conf'\n");
        let found = Configuration::read(directory.path());
        assert_eq!(found.problems.len(), 1);
        assert!(found.problems[0].contains("nested too deeply"));
        // With four files, ten levels have a million ways.
        fs::create_dir(directory.path().join("conf.d")).expect("a directory");
        write(MAIN, "include_dir 'conf.d'\n");
        for name in ["a", "b", "c", "d"] {
            let lines = format!("include_dir '../conf.d'\nx.{name} = 1\n");
            write(&format!("conf.d/{name}.conf"), &lines);
        }
        let found = Configuration::read(directory.path());
        assert_eq!(found.problems.len(), 1, "{:?}", found.problems);
        assert_eq!(found.value("x.d"), Some("1"));
    }
}
