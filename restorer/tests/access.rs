//! Owners, groups and permissions: a restored copy has its parent's, whoever restores it.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use testbed::{
    programs::{directory, ours, server_user},
    restored::Restored,
    tools::servers_or_skip,
};

use crate::{
    scene::owned,
    support::{Archived, oldest_and_newest, query, said},
};

/// The modes of all directories, and of all files, below a directory, each with one path.
fn modes(root: &Path) -> [BTreeMap<u32, PathBuf>; 2] {
    let mut found = [BTreeMap::new(), BTreeMap::new()];
    let mut open = vec![root.to_owned()];
    while let Some(path) = open.pop() {
        let metadata = fs::symlink_metadata(&path).expect("metadata");
        let mode = metadata.mode() & 0o7777;
        if metadata.is_dir() {
            found[0].insert(mode, path.clone());
            let entries = fs::read_dir(&path).expect("it lists").flatten();
            open.extend(entries.map(|entry| entry.path()));
        } else if metadata.is_file() {
            found[1].insert(mode, path);
        }
    }
    found
}

fn assert_modes(root: &Path, directories: u32, files: u32) {
    let [found_directories, found_files] = modes(root);
    assert_eq!(
        found_directories.keys().collect::<Vec<_>>(),
        [&directories],
        "{found_directories:?}"
    );
    assert_eq!(
        found_files.keys().collect::<Vec<_>>(),
        [&files],
        "{found_files:?}"
    );
}

/// Gives everything below a directory the modes that `initdb -g` gives it, or takes them away.
fn change_modes(root: &Path, directories: u32, files: u32) {
    let set = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("a mode");
    };
    let mut open = vec![root.to_owned()];
    while let Some(path) = open.pop() {
        let metadata = fs::symlink_metadata(&path).expect("metadata");
        if metadata.is_dir() {
            set(&path, directories);
            let entries = fs::read_dir(&path).expect("it lists").flatten();
            open.extend(entries.map(|entry| entry.path()));
        } else if metadata.is_file() {
            set(&path, files);
        }
    }
}

#[test]
fn a_group_that_may_read_the_parent_may_read_the_copy_and_no_other() {
    for (major, bin) in oldest_and_newest() {
        eprintln!("PostgreSQL {major}");
        let places = directory().expect("a directory");
        let before = owned(&places.path().join("before"));
        let after = owned(&places.path().join("after"));
        let mut archived = Archived::start(&bin, "");
        let create = |name: &str, path: &Path| {
            archived.sql(&format!(
                "CREATE TABLESPACE {name} LOCATION '{}'",
                path.display()
            ));
            archived.sql(&format!("CREATE TABLE in_{name} (n int) TABLESPACE {name}"));
        };
        create("before", &before);
        archived.backup();
        let data = archived.cluster.data();
        archived.cluster.stop().expect("it stops");
        change_modes(&data, 0o750, 0o640);
        change_modes(&before, 0o750, 0o640);
        archived.cluster.start_again().expect("it starts");
        // One file that the group may not read, as the key of a certificate has to be.
        let key = data.join("server.key");
        fs::write(&key, "a key").expect("written");
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("a mode");
        owner_like(&data, &key);
        archived.backup();
        create_after(&archived, &after);
        archived.finish();

        let listing = archived.listing();
        let backup = |at: usize| listing["backups"][at]["id"].as_str().expect("an id");
        let target = directory().expect("a directory");
        let map = |old: &Path, name: &str| {
            let new = target.path().join(name);
            format!("--tablespace-mapping={}={}", old.display(), new.display())
        };
        let (one, two) = (map(&before, "before"), map(&after, "after"));
        let arguments = [one.as_str(), &two, "--target-action=promote"];
        let restore = |more: &[&str]| {
            let arguments = [&arguments[..], more].concat();
            let mut restore = Restored::command(&archived.place, &bin, target.path(), &arguments)
                .expect("it is built");
            let done = restore.output().expect("it runs");
            assert!(done.status.success(), "{}", said(&done).1);
        };
        let at = |name: &str| target.path().join(name);
        restore(&[]);
        let server = Running::of(&archived, &bin, at("data"));
        assert_eq!(server.sql("SHOW data_directory_mode"), "0750");
        server.sql("INSERT INTO in_before VALUES (1); INSERT INTO in_after VALUES (1)");
        server.sql("SELECT pg_switch_wal()");
        server.sql("CHECKPOINT");
        let key = at("data/server.key");
        assert_eq!(fs::metadata(&key).expect("a key").mode() & 0o777, 0o600);
        fs::remove_file(&key).expect("removed");
        for name in ["data", "before", "after"] {
            assert_modes(&at(name), 0o750, 0o640);
        }
        server.stop();
        // An existing directory gets the permissions of the backup.
        change_modes(&at("data"), 0o700, 0o600);
        fs::remove_dir_all(at("after")).expect("removed");
        restore(&["--delta"]);
        let server = Running::of(&archived, &bin, at("data"));
        assert_eq!(server.sql("SHOW data_directory_mode"), "0750");
        server.stop();
        for name in ["data", "before", "after"] {
            let [directories, _] = modes(&at(name));
            assert_eq!(directories.keys().collect::<Vec<_>>(), [&0o750], "{name}");
        }
        // From the backup before, nobody but the owner reads anything.
        for name in ["data", "before", "after"] {
            fs::remove_dir_all(at(name)).expect("removed");
        }
        restore(&[&format!("--backup={}", backup(0))]);
        let server = Running::of(&archived, &bin, at("data"));
        server.sql("SELECT pg_switch_wal()");
        for name in ["data", "before", "after"] {
            assert_modes(&at(name), 0o700, 0o600);
        }
        server.stop();
    }
}

fn create_after(archived: &Archived, place: &Path) {
    archived.sql(&format!(
        "CREATE TABLESPACE after LOCATION '{}'",
        place.display()
    ));
    archived.sql("CREATE TABLE in_after (n int) TABLESPACE after");
    archived.sql("SELECT pg_switch_wal()");
    archived.sql("INSERT INTO in_after VALUES (0)");
}

/// Gives `path` the owner of `like`.
fn owner_like(like: &Path, path: &Path) {
    let owner = fs::metadata(like).expect("metadata");
    std::os::unix::fs::chown(path, Some(owner.uid()), Some(owner.gid())).expect("chown");
}

/// A copy that runs; it is stopped when dropped.
struct Running<'a> {
    archived: &'a Archived,
    bin: PathBuf,
    data: PathBuf,
}

impl<'a> Running<'a> {
    fn of(archived: &'a Archived, bin: &Path, data: PathBuf) -> Self {
        Self {
            archived,
            bin: bin.to_owned(),
            data,
        }
    }

    fn sql(&self, sql: &str) -> String {
        let pid = fs::read_to_string(self.data.join("postmaster.pid")).expect("it runs");
        let lines: Vec<&str> = pid.lines().collect();
        let socket = self.data.join(lines[4].trim());
        let port = lines[3].trim().parse().expect("a port");
        query(&testbed::cluster::conninfo(&socket, port), sql)
    }

    fn stop(self) {
        drop(self);
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut pg_ctl = self.archived.cluster.program("pg_ctl").expect("a user");
        pg_ctl.env("LD_LIBRARY_PATH", self.bin.join("../lib"));
        pg_ctl
            .arg("-D")
            .arg(&self.data)
            .args(["-m", "fast", "-w", "stop"]);
        drop(pg_ctl.stdout(Stdio::null()).stderr(Stdio::null()).status());
    }
}

#[test]
fn root_restores_for_an_owner_below_directories_that_only_root_may_write() {
    let Some((uid, gid)) = server_user().expect("the servers' user") else {
        eprintln!("SKIPPED: only root can restore for another owner");
        return;
    };
    let Some((_, bin)) = servers_or_skip().pop() else {
        return;
    };
    let places = directory().expect("a directory");
    let old = owned(&places.path().join("old"));
    let mut archived = Archived::start(&bin, "");
    archived.sql(&format!(
        "CREATE TABLESPACE there LOCATION '{}'",
        old.display()
    ));
    archived.sql("CREATE TABLE kept TABLESPACE there AS SELECT 1 AS n");
    archived.backup();
    archived.finish();
    let name = String::from_utf8(
        Command::new("id")
            .args(["-un", &uid.to_string()])
            .output()
            .expect("id")
            .stdout,
    );
    let name = name.expect("UTF-8").trim().to_owned();
    for owner in [name, uid.to_string()] {
        // Root's own, which others may enter.
        let root = tempfile::Builder::new()
            .prefix("tidemark-root-")
            .tempdir_in("/tmp");
        let root = root.expect("a directory");
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).expect("a mode");
        let data = root.path().join("17/main/data");
        let there = root.path().join("tablespaces/there");
        let restore = |more: &[&str]| -> Output {
            let mut restore = Command::new(ours("pitr-restore").expect("it is built"));
            let place = archived.place.path().display();
            restore.arg(format!("--repository=file://{place}/repository"));
            restore.arg(format!("--spool={place}/spool"));
            restore.args(["--owner", &owner]);
            restore.arg("--target-dir").arg(&data).args(more);
            restore.arg("--pg-bin").arg(&bin);
            restore.arg(format!(
                "--tablespace-mapping={}={}",
                old.display(),
                there.display()
            ));
            restore.env("LD_LIBRARY_PATH", bin.join("../lib"));
            restore.stdin(Stdio::null()).output().expect("it runs")
        };
        // A restore that is refused leaves nothing behind.
        let refused = restore(&["--target-xid=4000000"]);
        assert_eq!(refused.status.code(), Some(3), "{}", said(&refused).1);
        assert_eq!(fs::read_dir(root.path()).expect("it lists").count(), 0);
        let done = restore(&["--start", "--set=fsync=off"]);
        assert!(done.status.success(), "{}", said(&done).1);
        let server = Running::of(&archived, &bin, data.clone());
        assert_eq!(server.sql("SELECT n FROM kept"), "1");
        server.stop();
        for path in [&data, &there, &data.join("PG_VERSION")] {
            let metadata = fs::metadata(path).expect("it is there");
            assert_eq!((metadata.uid(), metadata.gid()), (uid, gid), "{path:?}");
        }
    }
    unmapped_below_roots_own(&archived, uid, &old);
}

/// Only root may create the tablespace's own directory.
fn unmapped_below_roots_own(archived: &Archived, uid: u32, old: &Path) {
    archived.cluster.stop().expect("it stops");
    fs::remove_dir_all(old).expect("removed");
    let places = old.parent().expect("a directory");
    std::os::unix::fs::chown(places, Some(0), Some(0)).expect("chown");
    fs::set_permissions(places, fs::Permissions::from_mode(0o755)).expect("a mode");
    let root = directory().expect("a directory");
    let data = root.path().join("data");
    let restore = |mapping: Option<&str>| {
        let mut restore = Command::new(ours("pitr-restore").expect("it is built"));
        let place = archived.place.path().display();
        restore.arg(format!("--repository=file://{place}/repository"));
        restore.arg(format!("--spool={place}/spool"));
        restore.args(["--owner", &uid.to_string(), "--target-dir"]);
        restore.arg(&data).args(mapping);
        restore.stdin(Stdio::null()).output().expect("it runs")
    };
    let refused = restore(None);
    let (_, error) = said(&refused);
    assert_eq!(refused.status.code(), Some(2), "{error}");
    for part in [old, places] {
        assert!(error.contains(&part.display().to_string()), "{error}");
    }
    assert!(
        error.contains("--owner and --tablespace-mapping"),
        "{error}"
    );
    assert!(!data.exists(), "something was created");
    let itself = format!("--tablespace-mapping={0}={0}", old.display());
    let done = restore(Some(&itself));
    assert!(done.status.success(), "{}", said(&done).1);
    assert_eq!(fs::metadata(old).expect("it is there").uid(), uid);
}
