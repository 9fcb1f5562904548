//! Owners, groups and permissions of files: what a new file gets, and what to do when the system
//! denies access to one.

use std::{
    fs, io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::Path,
};

use rustix::{
    fs::{Access, Gid, Mode, Uid, access, fchmod, fchown, fstat},
    process::geteuid,
};

use crate::{Error, Result};

/// The set-group-ID bit of a directory. With the group's permissions it says that the users of the
/// group share what the directory contains.
const SET_GROUP: u32 = 0o2000;
/// The permissions of the group in a mode.
const GROUP: u32 = 0o070;
/// The bits of a mode that contain the type of the file, and their value for a directory.
const FILE_TYPE: u32 = 0o170_000;
const DIRECTORY: u32 = 0o040_000;

/// The access of a group to a directory and to everything that is created below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FolderAccess {
    /// The name or the number of the group.
    pub group: String,
    /// True if the group may write: a daemon of one user and an `archive_command` of another.
    pub may_write: bool,
}

impl FolderAccess {
    /// Returns the mode of the directory.
    #[must_use]
    pub fn mode(&self) -> u32 {
        if self.may_write { 0o2770 } else { 0o2750 }
    }

    /// Gives the group access to `directory`, which this process created.
    ///
    /// # Errors
    /// [`Error::Config`] for an unknown group, and where this user may not do it.
    pub fn apply(&self, directory: &Path) -> Result<()> {
        let group = self.number()?;
        let applied = fs::File::open(directory).and_then(|opened| {
            fchown(&opened, None, Some(Gid::from_raw(group)))?;
            Ok(fchmod(&opened, Mode::from_raw_mode(self.mode()))?)
        });
        applied.map_err(|error| {
            let (user, name, path) = (this_user(), &self.group, directory.display());
            Error::config(format!(
                "give group {name} access to {path}: {error}; create it as root: \
                 `install -d -o {user} -g {name} -m {:04o} {path}`",
                self.mode()
            ))
        })
    }

    /// Returns the difference between this access and that of an existing directory, with the
    /// remedy.
    ///
    /// # Errors
    /// [`Error::Config`] for an unknown group.
    pub fn difference(&self, directory: &Path) -> Result<Option<String>> {
        let group = self.number()?;
        let Ok(found) = fs::metadata(directory) else {
            return Ok(None);
        };
        let mode = found.mode() & 0o7777;
        if found.gid() == group && mode & self.mode() == self.mode() {
            return Ok(None);
        }
        let (name, path) = (&self.group, directory.display());
        let rights = if self.may_write { "g+rwX" } else { "g+rX" };
        Ok(Some(format!(
            "{path} belongs to group {} and has mode {mode:04o}, so group {name} cannot share it; run as root: \
             `chgrp -R {name} {path} && chmod -R {rights} {path} && find {path} -type d -exec chmod g+s {{}} +`",
            group_name(found.gid())
        )))
    }

    fn number(&self) -> Result<u32> {
        if let Ok(number) = self.group.parse() {
            return Ok(number);
        }
        let table = fs::read_to_string("/etc/group").unwrap_or_default();
        let number = table.lines().find_map(|line| {
            let mut fields = line.split(':');
            (fields.next()? == self.group).then(|| fields.nth(1)?.parse().ok())?
        });
        number.ok_or_else(|| {
            Error::config(format!(
                "group {} is not in /etc/group; create it with `groupadd {}`, or write its number",
                self.group, self.group
            ))
        })
    }
}

/// Returns the group's permissions below a directory that a group shares, else 0. Such a directory
/// has the set-group-ID bit (`chmod 2770`).
fn shared_bits(above: u32) -> u32 {
    if above & SET_GROUP == 0 {
        return 0;
    }
    above & GROUP
}

/// Returns the mode with which to create a directory in another one. The kernel adds the
/// set-group-ID bit itself, which a process with `RestrictSUIDSGID=` of systemd cannot set.
///
/// # Errors
/// Those of `fstat`.
pub fn directory_mode(above: impl AsFd) -> io::Result<u32> {
    Ok(0o700 | shared_bits(fstat(above)?.st_mode))
}

/// Gives a new file or directory the owner and the group's access of the directory that contains
/// it. Otherwise a command that root runs once would leave files that their user cannot read, and
/// the users of a group could not share a repository or a spool.
///
/// The owner changes only if this process runs as root. The group gets access only below a
/// directory with the set-group-ID bit, and other users never do.
///
/// # Errors
/// Those of `fstat`, `fchown` and `fchmod`.
pub fn inherit(created: impl AsFd, directory: impl AsFd) -> io::Result<()> {
    let above = fstat(directory)?;
    if geteuid().is_root() && above.st_uid != 0 {
        let (user, group) = (Uid::from_raw(above.st_uid), Gid::from_raw(above.st_gid));
        fchown(&created, Some(user), Some(group))?;
    }
    let of_group = shared_bits(above.st_mode);
    if of_group == 0 {
        return Ok(());
    }
    let found = fstat(&created)?.st_mode;
    let mode = if found & FILE_TYPE == DIRECTORY {
        SET_GROUP | 0o700 | of_group
    } else {
        0o600 | (of_group & 0o060)
    };
    // Only the owner can change a mode: another user may have left this file at a crash.
    if found & 0o7777 != mode {
        fchmod(created, Mode::from_raw_mode(mode))?;
    }
    Ok(())
}

/// Returns true if the users of a group may write to a directory, and share what it contains.
#[must_use]
pub fn is_shared(directory: &Path) -> bool {
    fs::metadata(directory).is_ok_and(|found| {
        let shared = SET_GROUP | GROUP;
        found.mode() & shared == shared
    })
}

/// Returns the name of a user, or the number if `/etc/passwd` does not contain it.
#[must_use]
pub fn user_name(uid: u32) -> String {
    name_in("/etc/passwd", uid)
}

/// Returns the name of a group, or the number if `/etc/group` does not contain it.
#[must_use]
pub fn group_name(gid: u32) -> String {
    name_in("/etc/group", gid)
}

/// Returns the name of the user that this process runs as.
#[must_use]
pub fn this_user() -> String {
    user_name(geteuid().as_raw())
}

fn name_in(table: &str, number: u32) -> String {
    let number = number.to_string();
    let table = fs::read_to_string(table).unwrap_or_default();
    let name = table.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == number).then(|| name.to_owned())
    });
    name.unwrap_or(number)
}

/// Describes a denied access to `path`: the file or directory that denies it, its owner, the user
/// of this process and the remedy. Empty for any other error.
#[must_use]
pub fn denial(path: &Path, error: &io::Error) -> String {
    if error.kind() != io::ErrorKind::PermissionDenied {
        return String::new();
    }
    let Some((denying, found)) = denying(path) else {
        return String::new();
    };
    let (owner, user) = (user_name(found.uid()), this_user());
    // The first name that does not exist. Its directories do not exist either.
    let missing = path.ancestors().take_while(|above| *above != denying);
    let missing = missing.last().filter(|missing| *missing != path);
    let denying = denying.display();
    let remedy = if owner == user {
        format!("run `chmod u+rwX {denying}`")
    } else if owner == "root" {
        match missing {
            Some(missing) => format!(
                "run `install -d -o {user} -m 0700 {}` as root, or name another directory",
                missing.display()
            ),
            None => format!("let root give {user} access to it, or name another one"),
        }
    } else {
        format!(
            "run the command as {owner} (`su -s /bin/sh {owner}`), or let both users share the directory by a group \
             (repository_group, spool_group)"
        )
    };
    format!(
        " ({denying} belongs to user {owner}, group {}, mode {:04o}, and this is user {user}: {remedy})",
        group_name(found.gid()),
        found.mode() & 0o7777
    )
}

/// Returns the first directory on the way to `path` that this user may not enter, else the file
/// itself, else the directory in which it cannot be created.
fn denying(path: &Path) -> Option<(&Path, fs::Metadata)> {
    let mut ways: Vec<&Path> = path.ancestors().skip(1).collect();
    ways.reverse();
    let closed = ways.iter().find(|way| {
        way.is_dir() && access(**way, Access::EXEC_OK) == Err(rustix::io::Errno::ACCESS)
    });
    let existing = closed.copied().or_else(|| {
        let mut existing = path.ancestors();
        existing.find(|path| fs::symlink_metadata(path).is_ok())
    })?;
    // A file that this user may read and write was denied by its directory: a rename or a removal.
    let usable = access(existing, Access::READ_OK | Access::WRITE_OK).is_ok();
    let denying = match existing.parent() {
        Some(parent) if usable && existing.is_file() => parent,
        _ => existing,
    };
    Some((denying, fs::metadata(denying).ok()?))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::durable;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).expect("it is there").mode() & 0o7777
    }

    /// Creates what a repository and a spool consist of below a directory with this mode, and
    /// returns the modes of a directory, a record and an object.
    fn modes_below(above: u32) -> [u32; 3] {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path();
        fs::set_permissions(path, fs::Permissions::from_mode(above)).expect("chmod");
        durable::create_dir_all(&path.join("a/b")).expect("directories");
        durable::replace(&path.join("a/record"), b"two").expect("a file");
        let store = crate::store::LocalStore::open(path).expect("a store");
        let put = crate::ObjectStore::put_if_absent(&store, "main/gap/object", b"three");
        put.expect("an object");
        assert_eq!(mode(&path.join("a")), mode(&path.join("main/gap")));
        ["a/b", "a/record", "main/gap/object"].map(|below| mode(&path.join(below)))
    }

    #[test]
    fn a_group_gets_access_only_below_a_directory_that_is_shared_with_it() {
        assert_eq!(modes_below(0o2770), [0o2770, 0o660, 0o660]);
        assert_eq!(modes_below(0o2750), [0o2750, 0o640, 0o640]);
        for alone in [0o700, 0o755, 0o770] {
            assert_eq!(modes_below(alone), [0o700, 0o600, 0o600], "{alone:o}");
        }
        assert_eq!(modes_below(0o2700)[1], 0o600);
    }

    #[test]
    fn a_denial_names_the_owner_the_user_and_the_remedy() {
        let directory = tempfile::tempdir().expect("a directory");
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        let said = denial(&directory.path().join("absent/file"), &denied);
        let user = this_user();
        let expected = format!(
            " ({0} belongs to user {user}, group {1}, mode {2:04o}, and this is user {user}: run `chmod u+rwX {0}`)",
            directory.path().display(),
            group_name(rustix::process::getegid().as_raw()),
            mode(directory.path())
        );
        assert_eq!(said, expected);
        let other = io::Error::from(io::ErrorKind::NotFound);
        assert_eq!(denial(directory.path(), &other), "");
        assert_eq!(user_name(0), "root");
        assert_eq!(user_name(4_000_000_000), "4000000000");
    }
}
