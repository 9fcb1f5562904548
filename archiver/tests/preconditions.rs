//! `wal-archiver check` in broken situations: it finds each, names the remedy, ends with the right
//! exit code and changes nothing.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::{
        fs::{MetadataExt, PermissionsExt, chown},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use self::cases::{buckets, claim_for_another, connections};
use crate::support::{Server, postgres_bin, server_user, wait_until};

mod cases;

/// A broken situation.
struct Case {
    name: &'static str,
    /// Keys of the configuration with their TOML values, in place of those of [`Scene::new`].
    keys: Vec<(&'static str, String)>,
    /// The exit code.
    code: i32,
    /// Parts of the output: the problem and the remedy.
    says: Vec<&'static str>,
}

fn case(
    name: &'static str,
    keys: &[(&'static str, &str)],
    code: i32,
    says: &[&'static str],
) -> Case {
    let owned = |(key, value): &(&'static str, &str)| (*key, (*value).to_owned());
    Case {
        name,
        keys: keys.iter().map(owned).collect(),
        code,
        says: says.to_vec(),
    }
}

/// A server, a directory for everything else, and the configuration in which all is well.
struct Scene {
    server: Server,
    directory: tempfile::TempDir,
}

impl Scene {
    fn new() -> Option<Self> {
        let bin = postgres_bin()?;
        let server = Server::start(&bin, "wal_level=logical\narchive_mode=on\n");
        let directory = tempfile::tempdir().expect("a directory");
        let open = fs::Permissions::from_mode(0o755);
        fs::set_permissions(directory.path(), open).expect("chmod");
        fs::create_dir(directory.path().join("repository")).expect("a directory");
        // Other users connect to the server's socket.
        let passable = fs::Permissions::from_mode(0o711);
        fs::set_permissions(server.directory(), passable).expect("chmod");
        Some(Self { server, directory })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Returns a path as a TOML value.
    fn quoted(&self, name: &str) -> String {
        format!("\"{}\"", self.path(name).display())
    }

    fn conninfo(&self, more: &str) -> String {
        format!("\"{} {more}\"", self.server.conninfo())
    }

    fn command(&self, keys: &[(&'static str, String)]) -> Command {
        let repository = format!("\"file://{}\"", self.path("repository").display());
        let mut all = BTreeMap::from([
            ("conninfo", self.conninfo("")),
            ("http", "\"127.0.0.1:1\"".to_owned()),
            ("repository", repository),
            ("spool", self.quoted("spool")),
        ]);
        all.extend(keys.iter().cloned());
        let text = all.iter().map(|(key, value)| format!("{key} = {value}\n"));
        let file = self.path("tidemark.toml");
        fs::write(&file, text.collect::<String>()).expect("a configuration");
        // Any user can execute this copy.
        let program = testbed::programs::ours("wal-archiver").expect("it is built");
        let mut command = Command::new(program);
        command
            .current_dir("/")
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .arg("--config")
            .arg(file);
        command
    }

    /// Runs `check`. Returns its exit code and everything that it printed.
    fn check(&self, keys: &[(&'static str, String)]) -> (i32, String) {
        let mut command = self.command(keys);
        outcome(command.arg("check"))
    }

    /// Returns the problem if `check` does not report the situation as expected, or changes files.
    fn problem(&self, case: &Case) -> Option<String> {
        let before = self.files();
        let (code, said) = self.check(&case.keys);
        let lacking: Vec<_> = case
            .says
            .iter()
            .filter(|part| !said.contains(**part))
            .collect();
        // A configuration that is refused before the checks prints no line of theirs.
        let is_found = said.contains("FAIL") || code == 2;
        let is_unchanged = self.files() == before;
        let is_right = code == case.code && lacking.is_empty() && is_found && is_unchanged;
        (!is_right).then(|| {
            let (name, expected) = (case.name, case.code);
            format!(
                "{name}: exit code {code}, expected {expected}; lacking {lacking:?}; unchanged: {is_unchanged}\n{said}"
            )
        })
    }

    fn expect(&self, case: &Case) {
        let problem = self.problem(case);
        assert!(problem.is_none(), "{}", problem.unwrap_or_default());
    }

    /// Returns the mode, the owner and the length of every file and directory of the scene, except
    /// the configuration.
    fn files(&self) -> BTreeMap<PathBuf, (u32, u32, u64)> {
        let mut found = BTreeMap::new();
        let mut open = vec![self.directory.path().to_owned()];
        while let Some(path) = open.pop() {
            for entry in fs::read_dir(&path).expect("it lists").flatten() {
                let metadata = entry.metadata().expect("it is there");
                if entry.file_name() == "tidemark.toml" {
                    continue;
                }
                let length = if metadata.is_dir() { 0 } else { metadata.len() };
                found.insert(entry.path(), (metadata.mode(), metadata.uid(), length));
                if metadata.is_dir() {
                    open.push(entry.path());
                }
            }
        }
        found
    }
}

pub(crate) fn outcome(command: &mut Command) -> (i32, String) {
    let output = command.output().expect("it runs");
    let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
    said += &String::from_utf8_lossy(&output.stderr);
    (output.status.code().expect("an exit code"), said)
}

/// A process that is killed when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn check_finds_each_broken_setting_and_names_the_remedy() {
    let Some(scene) = Scene::new() else { return };
    let (code, said) = scene.check(&[]);
    assert_eq!(code, 0, "{said}");
    let at = |name: &str| scene.quoted(name);
    let file = |name: &str| format!("\"file://{}\"", scene.path(name).display());
    let mut cases = connections(&scene);
    cases.extend(buckets(&scene));

    fs::write(scene.path("file"), "no folder").expect("a file");
    fs::write(scene.path("garbage"), "no key").expect("a file");
    let private = fs::Permissions::from_mode(0o600);
    fs::set_permissions(scene.path("garbage"), private).expect("chmod");
    fs::write(scene.path("open"), "a token that everybody reads").expect("a file");
    let everyone = fs::Permissions::from_mode(0o644);
    fs::set_permissions(scene.path("open"), everyone).expect("chmod");
    let data = scene.server.data();
    let inside = data.join("archive").display().to_string();
    let link = scene.path("link");
    std::os::unix::fs::symlink(data.join("base"), &link).expect("a link");
    claim_for_another(&scene.path("other"));
    for (name, keys, code, says) in [
        (
            "repository is a file",
            vec![("repository", file("file"))],
            5,
            ["not a directory", "then run `wal-archiver check` again"],
        ),
        (
            "repository of another server",
            vec![("repository", file("other"))],
            2,
            [
                "the repository belongs to system identifier 77",
                "wal-archiver epoch begin",
            ],
        ),
        (
            "repository in the data directory",
            vec![("repository", format!("\"file://{inside}\""))],
            2,
            [
                "a directory of a PostgreSQL server",
                "name a directory outside as repository",
            ],
        ),
        (
            "spool in the data directory",
            vec![("spool", format!("\"{inside}\""))],
            2,
            [
                "a directory of a PostgreSQL server",
                "name a directory outside as spool",
            ],
        ),
        (
            "catalog in the data directory, through a link",
            vec![("catalog", at("link/catalog"))],
            2,
            [
                "a directory of a PostgreSQL server",
                "name a directory outside as catalog",
            ],
        ),
        (
            "spool in the repository",
            vec![("spool", at("repository/spool"))],
            2,
            [
                "is inside of the repository",
                "name another directory as spool",
            ],
        ),
        (
            "repository in the spool",
            vec![("repository", file("spool/deep/archive"))],
            2,
            ["contains the repository", "name another directory as spool"],
        ),
        (
            "backup that does not exist",
            vec![
                ("keep_window", "\"7d\"".to_owned()),
                ("keep_backups", "[\"20200101T000000Z-0000\"]".to_owned()),
            ],
            2,
            [
                "keep_backups names 20200101T000000Z-0000",
                "wal-archiver backup list",
            ],
        ),
        (
            "value without a unit",
            vec![("rpo_target", "5".to_owned())],
            2,
            [
                "tidemark.toml, line 4, column 1, `rpo_target = 5`: ",
                "write rpo_target = \"5s\"",
            ],
        ),
        (
            "unknown key",
            vec![("sloot", "\"x\"".to_owned())],
            2,
            [
                "line 4, column 1, `sloot = \"x\"`: ",
                "did you mean \"slot\"?",
            ],
        ),
        (
            "unfinished text",
            vec![("slot", "\"x".to_owned())],
            2,
            ["tidemark.toml, line 4, column ", "`slot = \"x`: "],
        ),
        (
            "spool is a file",
            vec![("spool", at("file"))],
            1,
            ["FAIL  spool: ", "name another directory"],
        ),
        (
            "spool below /proc",
            vec![("spool", "\"/proc/nospool\"".to_owned())],
            1,
            ["FAIL  spool: ", "name another directory"],
        ),
        (
            "unknown group",
            vec![("repository_group", "\"nobody-has-this\"".to_owned())],
            2,
            ["is not in /etc/group", "`groupadd nobody-has-this`"],
        ),
        (
            "folder that the group cannot use",
            vec![("repository_group", "\"12345\"".to_owned())],
            2,
            ["so group 12345 cannot share it", "chgrp -R 12345"],
        ),
        (
            "mode without a group",
            vec![("spool_mode", "\"0770\"".to_owned())],
            2,
            ["spool_mode", "set spool_group too"],
        ),
        (
            "mode for everybody",
            vec![
                ("spool_group", "\"0\"".to_owned()),
                ("spool_mode", "\"0777\"".to_owned()),
            ],
            2,
            ["spool_mode = \"0777\"", "write \"0770\""],
        ),
        (
            "key file missing",
            vec![("encryption_key_file", at("absent"))],
            2,
            ["there is no such file", "`wal-archiver key new"],
        ),
        (
            "key file without a key",
            vec![("encryption_key_file", at("garbage"))],
            2,
            ["encryption_key_file", "wal-archiver key new"],
        ),
        (
            "key file for everybody",
            vec![("encryption_key_file", at("open"))],
            2,
            ["encryption_key_file", "chmod 0600"],
        ),
        (
            "token for everybody",
            vec![("http_token_file", at("open"))],
            2,
            ["http_token_file", "chmod 0600"],
        ),
        (
            "public address without a token",
            vec![("http", "\"0.0.0.0:1\"".to_owned())],
            2,
            ["it can be reached from other hosts", "set http_token_file"],
        ),
        (
            "certificate missing",
            vec![
                ("http_tls_certificate", at("absent")),
                ("http_tls_key", at("absent")),
            ],
            2,
            ["absent", "http_tls_certificate"],
        ),
        (
            "duration without a unit",
            vec![("gap_grace", "5".to_owned())],
            2,
            ["gap_grace = 5 has no unit", "write gap_grace = \"5s\""],
        ),
        (
            "mistyped key",
            vec![("repositry", "5".to_owned())],
            2,
            ["unknown key \"repositry\"", "did you mean \"repository\"?"],
        ),
        (
            "lock of no days",
            vec![("lock_days", "0".to_owned())],
            2,
            ["lock_days = 0", "1 to"],
        ),
        (
            "folder twice",
            vec![(
                "repositories",
                format!("[{{ url = {} }}]", file("repository")),
            )],
            2,
            ["is listed twice", "needs a second place"],
        ),
    ] {
        cases.push(Case {
            name,
            keys,
            code,
            says: says.to_vec(),
        });
    }
    let problems: Vec<_> = cases
        .iter()
        .filter_map(|case| scene.problem(case))
        .collect();
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    let mut without_file = Command::new(env!("CARGO_BIN_EXE_wal-archiver"));
    let (code, said) = outcome(without_file.args(["--config", "/absent.toml", "check"]));
    assert!(code == 2 && said.contains("$TIDEMARK_CONFIG"), "{said}");
    in_states_of_the_server(&scene);
    of_other_users(&scene);
    as_json(&scene);
}

fn in_states_of_the_server(scene: &Scene) {
    let server = &scene.server;
    let sql = |sql: &str| drop(server.sql(sql));
    let set = |name: &str, value: &str| {
        sql(&format!("ALTER SYSTEM SET {name} = '{value}'"));
        sql("SELECT pg_reload_conf()");
        wait_until(name, || server.sql(&format!("SHOW {name}")) == value);
    };
    let reset = || {
        sql("ALTER SYSTEM RESET ALL");
        sql("SELECT pg_reload_conf()");
        wait_until("the settings are as they were", || {
            server.sql("SHOW synchronous_standby_names").is_empty()
                && server.sql("SHOW archive_command") != "false"
        });
    };
    let expect = |name, code, says: &[&'static str]| scene.expect(&case(name, &[], code, says));

    set("synchronous_standby_names", "*");
    expect(
        "commits wait by accident",
        2,
        &["by accident", "Name the standbys that are meant"],
    );
    reset();

    set("archive_command", "false");
    sql("SELECT pg_switch_wal()");
    wait_until("the server's archiver fails", || {
        server.sql("SELECT failed_count > 0 FROM pg_stat_archiver") == "t"
    });
    expect(
        "archive_command fails",
        1,
        &["FAIL  server's archiver", "Correct archive_command"],
    );
    set("archive_command", "true");
    sql("SELECT pg_switch_wal()");
    wait_until("the server's archiver succeeds", || {
        let succeeded = "SELECT last_archived_time > last_failed_time FROM pg_stat_archiver";
        server.sql(succeeded) == "t"
    });

    sql("SELECT pg_create_physical_replication_slot('tidemark_main', true)");
    let received = scene.directory.path().join("received");
    fs::create_dir(&received).expect("a directory");
    if let Some((user, group)) = server_user() {
        chown(&received, Some(user), Some(group)).expect("chown");
    }
    let mut receiver = server.command("pg_receivewal");
    receiver
        .args(["-S", "tidemark_main", "-d", &server.conninfo(), "-D"])
        .arg(&received)
        .stderr(Stdio::null());
    let receiver = Running(receiver.spawn().expect("it runs"));
    let active = "SELECT active FROM pg_replication_slots WHERE slot_name = 'tidemark_main'";
    wait_until("another archiver streams", || server.sql(active) == "t");
    let (code, said) = scene.check(&[]);
    assert_eq!(code, 2, "{said}");
    assert!(
        said.contains("\"tidemark_main\" is in use by pg_receivewal")
            && said.contains("Stop the other one"),
        "{said}"
    );
    drop(receiver);
    fs::remove_dir_all(&received).expect("what the test made");
    wait_until("the slot is free", || server.sql(active) == "f");
    sql("SELECT pg_drop_replication_slot('tidemark_main')");

    let fill = "SELECT count(pg_create_physical_replication_slot('full_' || n)) FROM generate_series(1, \
                current_setting('max_replication_slots')::int - 1) n";
    sql(fill);
    expect(
        "no slot is free",
        2,
        &["none is free for ours", "drop a slot that nobody uses"],
    );
    sql("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots");
    let (code, said) = scene.check(&[]);
    assert_eq!(code, 0, "{said}");
}

/// Only root can give files away and become another user, so another user's run checks nothing.
fn of_other_users(scene: &Scene) {
    let Some((user, group)) = server_user() else {
        return;
    };
    let (repository, spool) = (scene.path("repository"), scene.path("spool"));
    let give = |path: &Path, mode: u32| {
        fs::create_dir_all(path).expect("a directory");
        chown(path, Some(user), Some(group)).expect("chown");
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
    };
    for path in [&repository, &spool] {
        give(path, 0o700);
        give(&path.join("main"), 0o700);
    }
    for (path, what) in [
        (repository.join("main/left"), "FAIL  repository's files"),
        (spool.join("main/left"), "FAIL  spool's files"),
    ] {
        fs::write(&path, "by root").expect("a file");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("chmod");
        let case = case(
            "a file of root",
            &[],
            1,
            &[what, "belongs to root; run `chown -R "],
        );
        scene.expect(&case);
        fs::remove_file(path).expect("what the test made");
    }
    // A user outside of the group.
    let as_stranger = |keys: &[(&'static str, String)], command: &str| {
        let mut command_line = scene.command(keys);
        let readable = fs::Permissions::from_mode(0o644);
        fs::set_permissions(scene.path("tidemark.toml"), readable).expect("chmod");
        command_line
            .uid(54_321)
            .gid(54_321)
            .args(command.split(' '));
        outcome(&mut command_line)
    };
    let before = scene.files();
    let owner = repository::access::user_name(user);
    for command in ["check", "backup", "expire", "verify"] {
        let (code, said) = as_stranger(&[], command);
        assert_ne!(code, 0, "{command}: {said}");
        let is_named = said.contains(&format!("belongs to user {owner}"))
            && said.contains("this is user 54321")
            && said.contains(&format!("su -s /bin/sh {owner}"));
        assert!(is_named, "{command}: {said}");
    }
    assert_eq!(scene.files(), before);
    for path in [repository, spool] {
        chown(&path, Some(0), Some(0)).expect("chown");
        chown(path.join("main"), Some(0), Some(0)).expect("chown");
    }
}

fn as_json(scene: &Scene) {
    let keys = [
        ("slot", "\"logical_2\"".to_owned()),
        ("conninfo", scene.conninfo("port=1")),
    ];
    let output = scene.command(&keys).args(["check", "--json"]).output();
    let output = output.expect("it runs");
    assert_eq!(output.status.code(), Some(5));
    let document: serde_json::Value =
        serde_json::from_slice(&output.stdout).expect("one JSON document");
    assert_eq!(document["ok"], false);
    assert_eq!(document["failed"], 1);
    assert_eq!(document["exit_code"], 5);
    let checks = document["checks"].as_array().expect("a list");
    let failed: Vec<_> = checks
        .iter()
        .filter(|one| one["result"] == "fail")
        .collect();
    assert_eq!(failed.len(), 1);
    assert_eq!(failed[0]["cluster"], "main");
    assert_eq!(failed[0]["check"], "replication connection");
    assert!(
        checks
            .iter()
            .any(|one| one["check"] == "daemon" && one["cluster"].is_null())
    );
}
