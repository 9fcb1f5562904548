//! The access of a copy's owner: rules above those of its parent let the operating system's user
//! who owns the data directory connect as every role over the private socket.
//!
//! The parent's rules may name users that only the parent's host has (`local all all peer`). The
//! owner can read and change every byte of the copy anyway. Only PostgreSQL 16 and later can map a
//! user to every role in `pg_ident.conf`, so the rules do not ask for a proof. Instead the
//! operating system keeps all other users away from the socket: its mode is 0700 in each directory
//! (`unix_socket_permissions` in `table.rs`), and its directory is closed to others.
//!
//! Invariant: the rules exist only while `unix_socket_permissions` is ours. A release removes them
//! first.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use rustix::process::geteuid;

use super::{COMMENT, Configuration, Edit, SOCKET_DIRECTORY, Wanted, imports, text};
use crate::{Error, Result};

/// The rules, each a line. `all` does not match connections for replication.
const RULES: [&str; 2] = ["local all all trust", "local replication all trust"];
/// The reason in the line.
const REASON: &str = "the owner of these files, over the private socket";
/// The settings of the user that could open the socket to others, or replace the rules.
const DECIDES: [&str; 2] = ["unix_socket_permissions", "hba_file"];
/// The permissions of users other than the owner and the group, and the group's to write.
const OPEN: u32 = 0o027;

/// Adds the rules to the copy's own access rules, with one edit for each line. Returns false, and
/// changes nothing, if the socket is not private or if the copy has no such file.
pub(super) fn let_in(
    directory: &Path,
    wanted: &Wanted<'_>,
    configuration: &Configuration,
    edits: &mut Vec<Edit>,
) -> Result<bool> {
    if DECIDES.iter().any(|name| wanted.sets(name)) || !has_private_sockets(directory, wanted) {
        return Ok(false);
    }
    let root = fs::canonicalize(directory).map_err(Error::io("find", directory))?;
    let [file, _] = imports::access_files(&root, configuration);
    let file = imports::real(&file);
    let (true, Ok(inside)) = (file.is_file(), file.strip_prefix(&root)) else {
        return Ok(false);
    };
    let content = fs::read(&file).map_err(Error::io("read", &file))?;
    let content = text::decode(&content);
    let lines = RULES.map(|rule| format!("{rule} {COMMENT}{REASON}"));
    let missing = lines.iter().filter(|line| {
        // A copy that is restored again after it was archived has them from its parent.
        !content.lines().any(|existing| existing == line.as_str())
    });
    let missing: Vec<&String> = missing.collect();
    let mut changed = String::new();
    for line in missing {
        changed.push_str(line);
        changed.push('\n');
        edits.push(Edit {
            file: text::of_path(inside),
            name: format!("{} rule", text::of_path(inside)),
            old: None,
            new: line.clone(),
            parent: String::new(),
        });
    }
    changed.push_str(&content);
    fs::write(&file, text::encode(&changed)).map_err(Error::io("write", &file))?;
    Ok(true)
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
