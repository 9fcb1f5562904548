//! The access of a copy's owner: rules above those of its parent let the operating system's user
//! who owns the data directory connect as every role over the private socket.
//!
//! The parent's rules may name users that only the parent's host has (`local all all peer`). The
//! owner can read and change every byte of the copy anyway. Only PostgreSQL 16 and later can map a
//! user to every role in `pg_ident.conf`, so the rules do not ask for a proof. Instead the
//! operating system keeps all other users away from the socket: its mode is 0700 in each directory
//! (`unix_socket_permissions` in `table.rs`), and its directory is closed to others.
//!
//! A parent may have its rules in a file outside of the copy (`hba_file`). Then the copy's own file
//! is one that the parent did not use, such as that of `initdb`, which trusts every local user: it
//! lets nobody in but the owner.
//!
//! Invariant: the owner's rules exist only while `unix_socket_permissions` is ours. A release
//! removes them first.

use std::{fs, io::ErrorKind, os::unix::fs::MetadataExt, path::Path};

use rustix::process::geteuid;

use super::{COMMENT, Configuration, Edit, SOCKET_DIRECTORY, Wanted, imports, table::When, text};
use crate::{Error, Result};

/// The rules of the owner, each a line. `all` does not match connections for replication.
const RULES: [&str; 2] = ["local all all trust", "local replication all trust"];
/// The reason in the line.
const REASON: &str = "the owner of these files, over the private socket";
/// The rules above those of a file that the parent did not use.
const NOBODY_ELSE: [&str; 4] = [
    "local all all reject",
    "local replication all reject",
    "host all all all reject",
    "host replication all all reject",
];
/// The reason in the line.
const UNUSED: &str = "the parent did not use the rules below";
/// The setting with the file of the parent's access rules.
const HBA_FILE: &str = "hba_file";
/// The permissions of users other than the owner and the group, and the group's to write.
const OPEN: u32 = 0o027;

/// The users who may connect to a copy: `owner_access` and `parent_access` of
/// [`super::Isolation`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Access {
    pub(super) owner: bool,
    pub(super) parent: bool,
}

/// Adds rules to the copy's own access rules, with one edit for each line: those of the owner if
/// the socket is private, and those that let nobody else in if the parent had its rules in another
/// file.
pub(super) fn let_in(
    directory: &Path,
    wanted: &Wanted<'_>,
    configuration: &Configuration,
    edits: &mut Vec<Edit>,
) -> Result<Access> {
    let untouched = Access {
        owner: false,
        parent: true,
    };
    if wanted.sets(HBA_FILE) {
        return Ok(untouched);
    }
    let named = configuration.value(HBA_FILE);
    let access = Access {
        owner: !wanted.sets("unix_socket_permissions") && has_private_sockets(directory, wanted),
        parent: !super::applies(When::LeadsElsewhere, directory, named, true),
    };
    let root = fs::canonicalize(directory).map_err(Error::io("find", directory))?;
    let [file, _] = imports::access_files(&root, configuration);
    let file = imports::real(&file);
    let Ok(inside) = file.strip_prefix(&root) else {
        return Ok(untouched);
    };
    let content = match fs::read(&file) {
        Ok(content) => text::decode(&content),
        // The parent did not need the file, but the copy does.
        Err(error) if error.kind() == ErrorKind::NotFound && !access.parent => String::new(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(untouched),
        Err(error) => return Err(Error::io("read", &file)(error)),
    };
    let of_owner = RULES.iter().map(|rule| (*rule, REASON, ""));
    let elsewhere = named.unwrap_or_default();
    let of_others = NOBODY_ELSE.iter().map(|rule| (*rule, UNUSED, elsewhere));
    let rules = of_owner.filter(|_| access.owner);
    let rules = rules.chain(of_others.filter(|_| !access.parent));
    let lines = rules.map(|(rule, reason, file)| (format!("{rule} {COMMENT}{reason}"), file));
    // A copy that is restored again after it was archived has lines from its parent. They count
    // where they stand, so all lines are added if one is missing.
    let lines: Vec<(String, &str)> = lines.collect();
    let texts: Vec<&str> = lines.iter().map(|(line, _)| line.as_str()).collect();
    if content.starts_with(&texts.join("\n")) {
        return Ok(access);
    }
    let mut changed = String::new();
    for (line, elsewhere) in lines {
        changed.push_str(&line);
        changed.push('\n');
        edits.push(Edit {
            file: text::of_path(inside),
            name: format!("{} rule", text::of_path(inside)),
            old: None,
            new: line,
            // The rule stays in the copy while this file is not there.
            parent: elsewhere.to_owned(),
        });
    }
    changed.push_str(&content);
    fs::write(&file, text::encode(&changed)).map_err(Error::io("write", &file))?;
    Ok(access)
}

/// Returns true if every socket directory belongs to this user and is closed to others.
fn has_private_sockets(directory: &Path, wanted: &Wanted<'_>) -> bool {
    let set = wanted
        .set
        .iter()
        .rfind(|(name, _)| name.eq_ignore_ascii_case("unix_socket_directories"));
    let listed = set.map_or(SOCKET_DIRECTORY, |(_, value)| value.as_str());
    super::parent::list(listed).iter().all(|socket| {
        // A name that begins with `@` is abstract: it has no permissions.
        let path = directory.join(text::path(socket));
        let found = fs::metadata(path);
        found.is_ok_and(|found| {
            let is_ours = found.uid() == geteuid().as_raw();
            found.is_dir() && is_ours && found.mode() & OPEN == 0
        })
    })
}
