//! Owners, groups and permissions of files: what a new file gets, and what to do when the system
//! denies access to one.

use std::{
    fs, io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
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
        Ok(Some(format!(
            "{path} belongs to group {} and has mode {mode:04o}, so group {name} cannot share it; {}",
            group_name(found.gid()),
            self.remedy(directory)
        )))
    }

    /// Returns the files and directories below `directory` that the group cannot use, with the
    /// remedy. They were created before the group was configured. Examines a sample: of each
    /// directory the first and the newest names. Leaves out the paths in `except`, which only the
    /// daemon uses.
    ///
    /// # Errors
    /// [`Error::Config`] for an unknown group.
    pub fn difference_below(&self, directory: &Path, except: &[&Path]) -> Result<Option<String>> {
        let group = self.number()?;
        let mut sample = Sample {
            except,
            directories: 0,
            examined: 0,
            closed_count: 0,
            closed: None,
        };
        sample.examine(directory, &|found| self.admits(group, found));
        let Some((path, found)) = &sample.closed else {
            return Ok(None);
        };
        let name = &self.group;
        Ok(Some(format!(
            "{} of the {} files and directories examined below {} cannot be used by group {name}: for example {} belongs to \
             user {}, group {}, and has mode {:04o}; {}",
            sample.closed_count,
            sample.examined,
            directory.display(),
            path.display(),
            user_name(found.uid()),
            group_name(found.gid()),
            found.mode() & 0o7777,
            self.remedy(directory)
        )))
    }

    /// Returns true if the members of the group can use a file or directory as this access says.
    /// A file is replaced and never written by another user, so it has to be readable only.
    fn admits(&self, group: u32, found: &fs::Metadata) -> bool {
        let wanted = if found.is_dir() {
            self.mode() & (SET_GROUP | GROUP)
        } else {
            0o040
        };
        found.gid() == group && found.mode() & wanted == wanted
    }

    /// Returns the commands that give the group this access to `directory` and everything below it.
    fn remedy(&self, directory: &Path) -> String {
        let (name, path) = (&self.group, directory.display());
        let rights = if self.may_write { "g+rwX" } else { "g+rX" };
        format!(
            "run as root: `chgrp -R {name} {path} && chmod -R {rights} {path} && find {path} -type d -exec chmod g+s {{}} +`"
        )
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

/// The limits of a sample: directories in all, and names in one directory, half of them its first
/// and half its last. Names of WAL and of backups sort by age.
const SAMPLED_DIRECTORIES_MAX: usize = 1000;
const SAMPLED_NAMES_MAX: usize = 32;

/// The files below a directory of which a group can use some and cannot use others.
struct Sample<'a> {
    except: &'a [&'a Path],
    directories: usize,
    examined: usize,
    closed_count: usize,
    /// The first file that the group cannot use.
    closed: Option<(PathBuf, fs::Metadata)>,
}

impl Sample<'_> {
    fn examine(&mut self, directory: &Path, admits: &dyn Fn(&fs::Metadata) -> bool) {
        self.directories += 1;
        if self.directories > SAMPLED_DIRECTORIES_MAX {
            return;
        }
        let Ok(entries) = fs::read_dir(directory) else {
            return;
        };
        let (mut below, mut files) = (Vec::new(), Vec::new());
        for entry in entries.flatten() {
            match entry.file_type() {
                _ if self.except.contains(&&*entry.path()) => {}
                Ok(kind) if kind.is_dir() => below.push(entry.path()),
                Ok(kind) if kind.is_file() => files.push(entry.path()),
                _ => {}
            }
        }
        for paths in [&mut files, &mut below] {
            paths.sort_unstable();
            let excess = paths.len().saturating_sub(SAMPLED_NAMES_MAX);
            let first = SAMPLED_NAMES_MAX / 2;
            paths.drain(first.min(paths.len())..first.min(paths.len()) + excess);
        }
        for path in files.iter().chain(&below) {
            let Ok(found) = fs::symlink_metadata(path) else {
                continue;
            };
            self.examined += 1;
            if !admits(&found) {
                self.closed_count += 1;
                self.closed.get_or_insert_with(|| (path.clone(), found));
            }
        }
        for path in below {
            self.examine(&path, admits);
        }
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
    let shared = "let both users share the directory by a group (repository_group, spool_group)";
    denial_unless(path, error, shared)
}

/// Describes a denied access to a file that the configuration names, or to the configuration.
#[must_use]
pub fn denial_of_setting(path: &Path, error: &io::Error) -> String {
    let path_shown = path.display();
    let shared = format!(
        "let both users read it by a group: `chgrp GROUP {path_shown} && chmod 0640 {path_shown}`"
    );
    denial_unless(path, error, &shared)
}

/// Describes a denied access. `shared` is the remedy for two users of whom neither is root.
fn denial_unless(path: &Path, error: &io::Error, shared: &str) -> String {
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
        format!("run the command as {owner} (`su -s /bin/sh {owner}`), or {shared}")
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
    fn files_that_a_group_cannot_use_are_found_below_a_shared_directory() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path();
        fs::set_permissions(path, fs::Permissions::from_mode(0o2770)).expect("chmod");
        let segments = path.join("main/wal");
        durable::create_dir_all(&segments).expect("directories");
        for number in 0..200 {
            durable::replace(&segments.join(format!("{number:024}")), b"WAL").expect("a file");
        }
        let access = |group: u32, may_write| FolderAccess {
            group: group.to_string(),
            may_write,
        };
        let group = fs::metadata(path).expect("it is there").gid();
        let set = |name: &str, mode| {
            let file = segments.join(name);
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).expect("chmod");
            file
        };
        let said = |may_write| {
            let said = access(group, may_write).difference_below(path, &[]);
            said.expect("a group")
        };
        assert_eq!(said(true), None);
        let newest = set(&format!("{:024}", 199), 0o600);
        let found = said(true).expect("the group cannot read it");
        for part in [
            "1 of the 34 files",
            &newest.display().to_string(),
            "mode 0600",
            &format!(
                "`chgrp -R {group} {0} && chmod -R g+rwX {0}",
                path.display()
            ),
        ] {
            assert!(found.contains(part), "{part}: {found}");
        }
        fs::set_permissions(&newest, fs::Permissions::from_mode(0o660)).expect("chmod");
        set("", 0o2750);
        assert!(said(true).is_some_and(|said| said.contains("main/wal belongs")));
        assert_eq!(said(false), None, "the group only reads");
        let other = access(group + 1, false).difference_below(path, &[]);
        let other = other.expect("a group").expect("it differs");
        assert!(other.starts_with("34 of the 34 files"), "{other}");
        let other = access(group + 1, false).difference_below(path, &[&segments]);
        let other = other.expect("a group").expect("it differs");
        assert!(other.starts_with("1 of the 1 files"), "{other}");
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
