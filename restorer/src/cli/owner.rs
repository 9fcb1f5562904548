//! `--owner`: as root, runs the same command as the user who is to own the files.

use std::{
    fs,
    os::unix::{
        fs::{DirBuilderExt, MetadataExt, chown},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use crate::{Error, Result, shell};

/// The option with which root's command names the owner to the command that it runs.
const RUN_FOR: &str = "--run-for";

/// A user and the user's primary group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Owner {
    uid: u32,
    gid: u32,
    /// True if the system knows the user, and therefore the user's other groups.
    known: bool,
}

/// Runs this command as `owner`, a name or a number. `directories` are those that the restore
/// writes to. Each of them that is below a directory where only root may write is created first. If
/// the restore fails and leaves it empty, it is removed again.
pub(super) fn run_as(owner: &str, directories: &[&Path]) -> Result<ExitCode> {
    let found = find(owner)?;
    let mut made = Vec::new();
    for directory in directories {
        make(directory, found, &mut made)?;
    }
    let mut command = command(owner, found)?;
    if made.is_empty() {
        return Err(Error::io("run as the owner with", "setpriv")(
            command.exec(),
        ));
    }
    let status = command
        .status()
        .map_err(Error::io("run as the owner with", "setpriv"))?;
    if !status.success() {
        for directory in made.iter().rev() {
            // Fails, as intended, if the directory is not empty.
            drop(fs::remove_dir(directory));
        }
    }
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(ExitCode::from(code.unwrap_or(1)))
}

fn command(name: &str, owner: Owner) -> Result<Command> {
    let program = std::env::current_exe().map_err(Error::io("find", "this program"))?;
    let mut arguments = std::env::args_os().skip(1);
    let mut own = Vec::new();
    while let Some(argument) = arguments.next() {
        if argument == "--owner" {
            arguments.next();
        } else if !argument.to_string_lossy().starts_with("--owner=") {
            own.push(argument);
        }
    }
    let mut command = Command::new("setpriv");
    command.args([
        format!("--reuid={}", owner.uid),
        format!("--regid={}", owner.gid),
    ]);
    command.arg(if owner.known {
        "--init-groups"
    } else {
        "--clear-groups"
    });
    command.arg("--").arg(program);
    command.args([RUN_FOR, name]).args(own);
    Ok(command)
}

/// Returns the words before a command that root runs as `owner`, a name or a number.
pub(super) fn prefix(owner: &str) -> String {
    if owner.parse::<u32>().is_ok() {
        return format!("setpriv --reuid={owner} --clear-groups ");
    }
    let owner = shell::quoted(owner);
    match super::outcome::in_path("sudo") {
        true => format!("sudo -u {owner} "),
        false => format!("runuser -u {owner} -- "),
    }
}

/// Creates `directory` and its missing parents for `owner` if the owner may not create them. Adds
/// the created directories to `made`.
fn make(directory: &Path, owner: Owner, made: &mut Vec<PathBuf>) -> Result<()> {
    let directory = std::path::absolute(directory).map_err(Error::io("find", directory))?;
    let mut missing: Vec<&Path> = Vec::new();
    let mut above = directory.as_path();
    while fs::symlink_metadata(above).is_err() {
        missing.push(above);
        match above.parent() {
            Some(parent) => above = parent,
            None => break,
        }
    }
    let may_write = |metadata: &fs::Metadata| {
        metadata.uid() == owner.uid
            || metadata.mode() & 0o002 != 0
            || (metadata.gid() == owner.gid && metadata.mode() & 0o020 != 0)
    };
    if fs::metadata(above).is_ok_and(|metadata| may_write(&metadata)) {
        return Ok(());
    }
    for path in missing.into_iter().rev() {
        fs::DirBuilder::new()
            .mode(0o700)
            .create(path)
            .map_err(Error::io("create directory", path))?;
        made.push(path.to_owned());
        chown(path, Some(owner.uid), Some(owner.gid))
            .map_err(Error::io("change the owner of", path))?;
    }
    Ok(())
}

/// Looks up a user. A number is valid even if the system does not know it.
fn find(owner: &str) -> Result<Owner> {
    let entry = Command::new("getent")
        .args(["passwd", "--", owner])
        .output()
        .map_err(Error::io("ask for the owner with", "getent"))?;
    let entry = String::from_utf8_lossy(&entry.stdout).into_owned();
    if let Some(found) = parse(&entry) {
        return Ok(found);
    }
    match owner.parse() {
        Ok(uid) => Ok(Owner {
            uid,
            gid: uid,
            known: false,
        }),
        Err(_) => Err(Error::usage(format!(
            "--owner {owner}: the system knows no such user; name an existing one, or a number"
        ))),
    }
}

/// Parses a line of `passwd`.
fn parse(entry: &str) -> Option<Owner> {
    let mut fields = entry.lines().next()?.split(':');
    Some(Owner {
        uid: fields.nth(2)?.parse().ok()?,
        gid: fields.next()?.parse().ok()?,
        known: true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_is_the_users_own_whatever_its_name() {
        let found = parse("pg:x:1001:50:PostgreSQL:/var/lib/pg:/bin/sh\n").expect("an entry");
        assert_eq!((found.uid, found.gid, found.known), (1001, 50, true));
        assert_eq!(parse(""), None);
        let number = find("4000000").expect("a number");
        assert_eq!(
            (number.uid, number.gid, number.known),
            (4_000_000, 4_000_000, false)
        );
        find("no such user").expect_err("it is unknown");
    }
}
