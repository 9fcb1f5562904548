//! The files that `pg_hba.conf` and `pg_ident.conf` include: `include`, `include_if_exists` and
//! `include_dir` from PostgreSQL 16 on, and `@file` in every version (`tokenize_auth_file` in
//! `hba.c`).
//!
//! If the copy read the parent's files, a change there would let others into the copy, and a file
//! that is missing on this host would keep the server from starting.

use std::{
    collections::BTreeSet,
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

use super::{COMMENT, DEPTH_MAX, Edit, INCLUDES, Importer, files_of, read_regular, text};
use crate::{Error, Result};

/// The first version that has include directives in these files.
const HAS_INCLUDES: u16 = 16;
/// The first version in which a backslash continues a line (`tokenize_file` in `hba.c`).
const HAS_CONTINUATIONS: u16 = 14;
/// The directive of a name with `@`.
const AT: &str = "@";

/// The content of a file, or the reason why it cannot be read.
type Readable = std::result::Result<String, String>;

/// A name of another file in a line.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Named {
    /// The directive, or [`AT`].
    directive: String,
    path: String,
    /// The bytes of the line to replace: the whole directive, or the name with `@`.
    place: Range<usize>,
}

/// A word of a line, as `next_token` in `hba.c` reads it.
struct Token {
    value: String,
    is_quoted: bool,
    place: Range<usize>,
    /// True if a comma follows: the next word is in the same field.
    continues: bool,
}

/// Splits a file into logical lines. From PostgreSQL 14 on, a backslash at the end of a line, also
/// of a comment, continues it.
fn lines_of(content: &str, major: u16) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut continues = false;
    for line in content.split('\n') {
        match lines.last_mut() {
            Some(last) if continues => {
                last.push('\n');
                last.push_str(line);
            }
            _ => lines.push(line.to_owned()),
        }
        continues = major >= HAS_CONTINUATIONS && line.trim_end_matches('\r').ends_with('\\');
    }
    lines
}

fn tokens_of(line: &str) -> Vec<Token> {
    let is_blank = |c: char| matches!(c, ' ' | '\t' | '\r');
    let mut tokens: Vec<Token> = Vec::new();
    // The backslash and the end of a continued line are not part of it.
    let continued = |at: usize| {
        let rest = line.get(at..).unwrap_or_default();
        let end = ["\\\n", "\\\r\n"]
            .into_iter()
            .find(|end| rest.starts_with(end));
        end.map_or(0, str::len)
    };
    let mut at = 0;
    while let Some(first) = line.get(at..).and_then(|rest| rest.chars().next()) {
        let skipped = continued(at);
        if skipped > 0 || is_blank(first) || first == ',' {
            if first == ','
                && let Some(last) = tokens.last_mut()
                && last.place.end == at
            {
                last.continues = true;
            }
            at += skipped.max(first.len_utf8());
            continue;
        }
        if first == '#' {
            break;
        }
        let start = at;
        let mut value = String::new();
        let (mut in_quote, mut was_quote) = (false, false);
        while let Some(c) = line.get(at..).and_then(|rest| rest.chars().next()) {
            let skipped = continued(at);
            if skipped > 0 {
                at += skipped;
                continue;
            }
            if !in_quote && (is_blank(c) || c == ',' || c == '#') {
                break;
            }
            if c != '"' || was_quote {
                value.push(c);
            }
            was_quote = in_quote && c == '"' && !was_quote;
            in_quote ^= c == '"';
            at += c.len_utf8();
        }
        tokens.push(Token {
            value,
            is_quoted: first == '"',
            place: start..at,
            continues: false,
        });
    }
    tokens
}

/// Returns the names of other files in a logical line.
fn named_in(line: &str) -> Vec<Named> {
    let tokens = tokens_of(line);
    let is_at = |token: &&Token| {
        !token.is_quoted && token.value.len() > AT.len() && token.value.starts_with(AT)
    };
    if let [first, second, ..] = tokens.as_slice()
        && INCLUDES.contains(&first.value.as_str())
        && !first.continues
        && !is_at(&second)
        && tokens
            .iter()
            .skip(2)
            .zip(tokens.iter().skip(1))
            .all(|(_, before)| before.continues)
    {
        return vec![Named {
            directive: first.value.clone(),
            path: second.value.clone(),
            place: first.place.start..second.place.end,
        }];
    }
    let names = tokens.iter().filter(is_at).map(|token| Named {
        directive: AT.to_owned(),
        path: token.value.trim_start_matches('@').to_owned(),
        place: token.place.clone(),
    });
    names.collect()
}

/// Returns a directive or a name with `@` that leads to `path`.
fn written(directive: &str, path: &Path) -> String {
    let path = text::of_path(path).replace('"', "\"\"");
    match directive {
        AT => format!("@\"{path}\""),
        directive => format!("{directive} \"{path}\""),
    }
}

impl Importer<'_> {
    /// Changes the names of files outside of the copy in a file of the copy, and in the files in
    /// the copy that it includes.
    pub(super) fn own_access(&mut self, file: &Path, depth: usize) -> Result<()> {
        let Ok(bytes) = read_regular(file) else {
            return Ok(());
        };
        if depth > DEPTH_MAX {
            return Ok(());
        }
        let content = text::decode(&bytes);
        let mut lines = lines_of(&content, self.cluster.major);
        let mut changed = false;
        for line in &mut lines {
            // From the end of the line, so that the places of the others stay. The names of the
            // copy's own files come first: the release leaves them, because they are the same
            // wherever the copy is.
            for named in self.names(line).into_iter().rev() {
                let target = self.named_by(file, &named.path);
                let Some(own) = self.in_copy(&target) else {
                    continue;
                };
                self.own_access_of(&named, &own, depth)?;
                if !self.is_inside(&target) {
                    let new = written(&named.directive, &self.relative(file, &own));
                    line.replace_range(named.place, &new);
                    changed = true;
                }
            }
            for named in self.names(line).into_iter().rev() {
                let target = self.named_by(file, &named.path);
                if self.in_copy(&target).is_some() {
                    continue;
                }
                let before = line.clone();
                match self.access_outside(&named, (file, &target), depth)? {
                    Some((directive, path)) => {
                        let new = written(&directive, &self.relative(file, &path));
                        line.replace_range(named.place, &new);
                    }
                    None => line.insert_str(0, COMMENT),
                }
                let name = file.file_name().unwrap_or_default().to_string_lossy();
                self.edits.push(Edit {
                    file: text::of_path(file.strip_prefix(&self.root).unwrap_or(file)),
                    name: format!("{name} {}", named.directive),
                    old: Some(before),
                    new: line.clone(),
                    parent: named.path,
                });
                changed = true;
            }
        }
        if changed {
            let content = text::encode(&lines.join("\n"));
            fs::write(file, content).map_err(Error::io("write", file))?;
        }
        Ok(())
    }

    /// Changes the files in the copy to which a name leads.
    fn own_access_of(&mut self, named: &Named, own: &Path, depth: usize) -> Result<()> {
        let files = match named.directive.as_str() {
            "include_dir" => files_of(own).unwrap_or_default(),
            _ => vec![own.to_owned()],
        };
        files
            .iter()
            .try_for_each(|file| self.own_access(file, depth + 1))
    }

    /// Imports the file or directory outside of the copy to which a name in `from` leads. Returns
    /// the directive and the file that replace the name; `None` if PostgreSQL would include
    /// nothing.
    fn access_outside(
        &mut self,
        named: &Named,
        (from, target): (&Path, &Path),
        depth: usize,
    ) -> Result<Option<(String, PathBuf)>> {
        let directive = match named.directive.as_str() {
            AT => AT,
            "include_if_exists" if !target.exists() => return Ok(None),
            _ => "include",
        };
        let name = self.next_name()?;
        let path = self.root.join(&name);
        let content = if depth >= DEPTH_MAX {
            Err("it is nested too deeply".to_owned())
        } else if named.directive == "include_dir" {
            self.access_directory(target, depth)?
        } else {
            self.access_content(target, depth)?
        };
        match content {
            Ok(content) => {
                self.write(&name, target, &content)?;
                self.imported.files.push(target.to_owned());
            }
            Err(why) => {
                self.imported.problems.push(format!(
                    "{} names {}, which cannot be read here ({why}): PostgreSQL does not start before its content is in {}",
                    from.display(),
                    target.display(),
                    path.display()
                ));
            }
        }
        Ok(Some((directive.to_owned(), path)))
    }

    /// Returns lines that include the imported files of a directory, or the reason why it cannot be
    /// read.
    fn access_directory(&mut self, target: &Path, depth: usize) -> Result<Readable> {
        let files = match files_of(target) {
            Ok(files) => files,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let mut list = String::new();
        for file in &files {
            let named = Named {
                directive: "include".to_owned(),
                path: text::of_path(file),
                place: 0..0,
            };
            if let Some((directive, path)) =
                self.access_outside(&named, (target, file), depth + 1)?
            {
                list.push_str(&written(&directive, &self.relative(&self.root, &path)));
                list.push('\n');
            }
        }
        Ok(Ok(list))
    }

    /// Returns the content of a file with the names of the imported files that it includes, or the
    /// reason why it cannot be read.
    fn access_content(&mut self, target: &Path, depth: usize) -> Result<Readable> {
        let content = match read_regular(target) {
            Ok(bytes) => text::decode(&bytes),
            Err(error) => return Ok(Err(error.to_string())),
        };
        let folder = target.parent().unwrap_or(Path::new("/"));
        let mut lines = lines_of(&content, self.cluster.major);
        for line in &mut lines {
            for named in self.names(line).into_iter().rev() {
                let next = folder.join(text::path(&named.path));
                let imported = match self.in_copy(&next) {
                    Some(own) => {
                        self.own_access_of(&named, &own, depth)?;
                        Some((named.directive.clone(), own))
                    }
                    None => self.access_outside(&named, (target, &next), depth + 1)?,
                };
                match imported {
                    Some((directive, path)) => {
                        let new = written(&directive, &self.relative(&self.root, &path));
                        line.replace_range(named.place.clone(), &new);
                    }
                    None => line.insert_str(0, COMMENT),
                }
            }
        }
        Ok(Ok(lines.join("\n")))
    }

    /// Returns the names of other files in a logical line that the copy's version knows.
    fn names(&self, line: &str) -> Vec<Named> {
        let mut names = named_in(line);
        names.retain(|named| named.directive == AT || self.cluster.major >= HAS_INCLUDES);
        names
    }
}

/// Adds a file of access rules and the files that it includes to `used`.
pub(super) fn add_read_files(file: &Path, major: u16, depth: usize, used: &mut BTreeSet<PathBuf>) {
    let (Ok(bytes), true) = (read_regular(file), depth <= DEPTH_MAX) else {
        return;
    };
    used.insert(fs::canonicalize(file).unwrap_or_else(|_| file.to_owned()));
    let folder = file.parent().unwrap_or(Path::new("/"));
    for named in lines_of(&text::decode(&bytes), major)
        .iter()
        .flat_map(|line| named_in(line))
    {
        let next = folder.join(text::path(&named.path));
        let files = match named.directive.as_str() {
            "include_dir" => files_of(&next).unwrap_or_default(),
            _ => vec![next],
        };
        for file in files {
            add_read_files(&file, major, depth + 1, used);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_of_other_files_are_found_as_postgresql_finds_them() {
        let check = |line: &str, expected: &[(&str, &str)]| {
            let found = named_in(line);
            let found: Vec<(&str, &str)> = found
                .iter()
                .map(|one| (one.directive.as_str(), one.path.as_str()))
                .collect();
            assert_eq!(found, expected, "{line}");
        };
        check("local all all peer # include x", &[]);
        check("include /etc/hba", &[("include", "/etc/hba")]);
        check("include_dir \"a b\"\r", &[("include_dir", "a b")]);
        check(
            "include_if_exists \\\n  x.conf # more",
            &[("include_if_exists", "x.conf")],
        );
        check("include a b", &[]);
        check("local include x", &[]);
        check(
            "host one,@/etc/db,two @users 1.2.3.4/32 md5",
            &[("@", "/etc/db"), ("@", "users")],
        );
        check("host \"@all\" @\"of \"\"it\" @ #@x", &[("@", "of \"it")]);
    }

    #[test]
    fn a_continued_line_is_one_line() {
        assert_eq!(lines_of("a \\\nb\nc", 14), ["a \\\nb", "c"]);
        assert_eq!(lines_of("# a\\\n@b", 13), ["# a\\", "@b"]);
        let line = "host @x\\\ny all";
        let [named] = named_in(line).try_into().expect("one name");
        assert_eq!(named.path, "xy");
        assert_eq!(line.get(named.place), Some("@x\\\ny"));
    }
}
