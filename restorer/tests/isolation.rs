//! A restored copy on its parent's host reaches nobody: not the parent's archive, pid file, log,
//! subscription or addresses. It lives on as any other server does, and takes its parent's place
//! when it is released.

use std::{
    collections::BTreeMap,
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use testbed::{
    cluster::{Cluster, PORT, conninfo},
    place::Place,
    programs::{command, directory, succeed},
};

use crate::{
    scene::owned,
    support::{
        Archived, SETTINGS, end_lsn, oldest_and_newest, query, said, wait_archived, wait_until,
    },
};

/// A line of a configuration file that is not UTF-8.
const IN_LATIN1: &[u8] = b"\nown.text = 'caf\xe9'\n";
const ROWS: &str = "SELECT count(*) FROM followed";

/// A parent with everything that reaches outside of its data directory, and its publisher.
struct Parent {
    publisher: Cluster,
    archived: Archived,
    bin: PathBuf,
    /// Holds `archive`, `log`, `run` and `more.conf`.
    outside: tempfile::TempDir,
}

impl Parent {
    fn start(major: u16, bin: &Path) -> Self {
        let settings = "fsync = off\nwal_level = logical\n";
        let publisher = Cluster::start(bin, 1, settings);
        let publisher = publisher.expect("a publisher");
        let outside = directory().expect("a directory");
        for name in ["archive", "log", "run", "stats"] {
            owned(&outside.path().join(name));
        }
        let cluster = Cluster::start(bin, 1, SETTINGS).expect("a parent");
        let at = outside.path().display();
        // The pg_hba.conf of the parent is outside, as Debian keeps it.
        let hba = fs::read(cluster.data().join("pg_hba.conf")).expect("it is there");
        fs::write(outside.path().join("pg_hba.conf"), hba).expect("written");
        fs::write(outside.path().join("users"), "alice\n").expect("written");
        let rules = "host all carol 127.0.0.2/32 reject\n";
        fs::write(outside.path().join("rules"), rules).expect("written");
        // The file in the data directory, which the copy uses, includes others.
        let own = cluster.data().join("pg_hba.conf");
        let mut rules = fs::read_to_string(&own).expect("it is there");
        rules.push_str(&format!("host all @{at}/users 127.0.0.2/32 reject\n"));
        if major >= 16 {
            rules.push_str(&format!("include {at}/rules\n"));
        }
        fs::write(&own, rules).expect("written");
        let data = cluster.data().display().to_string();
        let more = "archive_cleanup_command = 'touch {at}/archive/cleaned'\n\
            recovery_end_command = 'touch {at}/archive/ended'\nrecovery_min_apply_delay = 10min\n\
            external_pid_file = '{at}/run/parent.pid'\nlog_directory = '{at}/log'\nlogging_collector = on\n\
            data_directory = '{data}'\nhba_file = '{at}/pg_hba.conf'\n";
        let more = more.replace("{at}", &at.to_string());
        let more = more.replace("{data}", &data);
        fs::write(outside.path().join("more.conf"), more).expect("written");
        let mut settings = format!(
            "wal_retrieve_retry_interval = 100ms\ninclude '{at}/more.conf'\n\
             archive_mode = on\narchive_command = 'cp %p {at}/archive/%f'\n\
             primary_conninfo = '{}'\n",
            cluster.conninfo()
        );
        if major <= 15 {
            settings.push_str(&format!("promote_trigger_file = '{at}/run/trigger'\n"));
        }
        if major <= 14 {
            settings.push_str(&format!("stats_temp_directory = '{at}/stats'\n"));
        }
        cluster.configure(&settings).expect("configured");
        cluster.stop().expect("stopped");
        // `ALTER SYSTEM` writes such a line in a database with the encoding LATIN1.
        let auto = cluster.data().join("postgresql.auto.conf");
        let mut content = fs::read(&auto).expect("settings");
        content.extend_from_slice(IN_LATIN1);
        fs::write(&auto, content).expect("written");
        cluster.start_again().expect("started");
        Self {
            publisher,
            archived: Archived::of(cluster),
            bin: bin.to_owned(),
            outside,
        }
    }

    fn subscribe(&self) {
        let table = "CREATE TABLE followed (n int PRIMARY KEY)";
        let publisher = self.publisher.conninfo();
        query(&publisher, table);
        query(&publisher, "CREATE PUBLICATION everything FOR ALL TABLES");
        self.archived.sql(table);
        self.archived.sql(&format!(
            "CREATE SUBSCRIPTION followed CONNECTION '{publisher}' PUBLICATION everything"
        ));
        query(&publisher, "INSERT INTO followed VALUES (1)");
        wait_until("the subscription is in step", || {
            self.archived.sql(ROWS) == "1"
        });
    }

    /// Every file outside of the data directory that a copy could change, those in `run` with their
    /// content.
    fn outside_files(&self) -> BTreeMap<PathBuf, String> {
        let mut files = BTreeMap::new();
        for name in ["archive", "log", "run"] {
            let folder = fs::read_dir(self.outside.path().join(name)).expect("it lists");
            for file in folder.flatten() {
                let content = fs::read_to_string(file.path()).ok();
                let content = content.filter(|_| name == "run").unwrap_or_default();
                files.insert(file.path(), content);
            }
        }
        files
    }

    /// Nothing is gone, changed or new, except for segments that the parent itself archived.
    fn assert_untouched(&self, before: &BTreeMap<PathBuf, String>) {
        let mut after = self.outside_files();
        after.retain(|path, _| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            before.contains_key(path) || !name.starts_with("00000001")
        });
        assert_eq!(&after, before);
    }

    fn restore(&self, data: &Path, arguments: &[&str]) -> Command {
        let mut restore = self.archived.pitr_restore();
        restore.env("LD_LIBRARY_PATH", self.bin.join("../lib"));
        restore.arg("--target-dir").arg(data);
        restore.arg("--pg-bin").arg(&self.bin).args(arguments);
        for setting in ["fsync=off", "shared_buffers=16MB"] {
            restore.args(["--set", setting]);
        }
        restore.stdin(Stdio::null());
        restore
    }

    fn release(&self, data: &Path, arguments: &[&str]) -> Command {
        let mut release = self.archived.pitr_restore();
        release.env("LD_LIBRARY_PATH", self.bin.join("../lib"));
        release.arg("release").arg(data);
        release.arg("--pg-bin").arg(&self.bin).args(arguments);
        release
    }

    /// Returns true if the parent's own access rules include those in `rules`.
    fn has_rules(&self) -> bool {
        let own = fs::read_to_string(self.archived.cluster.data().join("pg_hba.conf"));
        own.expect("it is there").contains("/rules")
    }

    fn program(&self, name: &str) -> Command {
        let mut program = command(&self.bin.join(name)).expect("a user");
        program.env("LD_LIBRARY_PATH", self.bin.join("../lib"));
        program
    }
}

/// A server that runs in a directory; stopped when dropped.
struct Server<'a> {
    parent: &'a Parent,
    data: PathBuf,
}

impl Server<'_> {
    fn pg_ctl(&self, arguments: &[&str]) {
        let mut pg_ctl = self.parent.program("pg_ctl");
        let log = self.data.with_extension("log");
        pg_ctl
            .arg("-D")
            .arg(&self.data)
            .arg("-w")
            .arg("-l")
            .arg(&log);
        let status = pg_ctl
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        assert!(
            status.expect("pg_ctl runs").success(),
            "{arguments:?}: {}",
            fs::read_to_string(log).unwrap_or_default()
        );
    }

    fn conninfo(&self) -> String {
        let pid = fs::read_to_string(self.data.join("postmaster.pid")).expect("it runs");
        let lines: Vec<&str> = pid.lines().collect();
        conninfo(
            &self.data.join(lines[4].trim()),
            lines[3].trim().parse().expect("a port"),
        )
    }

    fn sql(&self, sql: &str) -> String {
        query(&self.conninfo(), sql)
    }

    /// Returns `postgresql.auto.conf`, and checks that it contains the line in LATIN1 unchanged.
    fn auto(&self) -> String {
        let content = fs::read(self.data.join("postgresql.auto.conf")).expect("settings");
        let parts = content.windows(IN_LATIN1.len());
        let auto = String::from_utf8_lossy(&content).into_owned();
        assert_eq!(parts.filter(|part| *part == IN_LATIN1).count(), 1, "{auto}");
        auto
    }

    /// Checks that the server reads and writes its own directory.
    fn assert_own_files(&self) {
        let data = self.data.display();
        assert_eq!(self.sql("SHOW data_directory"), data.to_string());
        for (name, file) in [
            ("config_file", "postgresql.conf"),
            ("hba_file", "pg_hba.conf"),
            ("ident_file", "pg_ident.conf"),
        ] {
            assert_eq!(self.sql(&format!("SHOW {name}")), format!("{data}/{file}"));
        }
        let read = self.sql("SELECT string_agg(DISTINCT sourcefile, ' ') FROM pg_file_settings");
        let mut read = read.split(' ');
        let outside = read.find(|file| !file.starts_with(&format!("{data}/")));
        assert_eq!(outside, None);
        // Its access rules have the content of the parent's files, and do not read them.
        let errors = "SELECT count(*) FROM pg_hba_file_rules WHERE error IS NOT NULL";
        assert_eq!(self.sql(errors), "0");
        let mut expected = "{alice}";
        if self.parent.has_rules() {
            expected = "{alice} {carol}";
            let files = "SELECT string_agg(DISTINCT file_name, ' ') FROM pg_hba_file_rules";
            let outside = self.parent.outside.path().display().to_string();
            assert!(!self.sql(files).contains(&outside));
        }
        let users = "SELECT string_agg(user_name::text, ' ' ORDER BY user_name) FROM pg_hba_file_rules \
            WHERE address = '127.0.0.2'";
        assert_eq!(self.sql(users), expected);
        let own = fs::read_to_string(self.data.join("pg_hba.conf")).expect("it is there");
        let outside = self.parent.outside.path().display();
        assert!(!own.contains(&format!("@{outside}")), "{own}");
        // The parent did not use the rules in its data directory: they let nobody in.
        let first: Vec<&str> = own
            .lines()
            .take(6)
            .filter_map(|line| line.split(" #").next())
            .collect();
        assert_eq!(
            first,
            [
                "local all all trust",
                "local replication all trust",
                "local all all reject",
                "local replication all reject",
                "host all all all reject",
                "host replication all all reject",
            ]
        );
    }

    /// No line that only a recovery needs is left.
    fn assert_settled(&self) {
        let auto = self.auto();
        for name in ["recovery_target", "wal-fetch", "recovery-ended"] {
            assert!(!auto.contains(name), "{auto}");
        }
        for signal in ["recovery.signal", "standby.signal"] {
            assert!(!self.data.join(signal).exists(), "{signal}");
        }
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        if self.data.join("postmaster.pid").exists() {
            let mut pg_ctl = self.parent.program("pg_ctl");
            pg_ctl
                .arg("-D")
                .arg(&self.data)
                .args(["-m", "immediate", "-w", "stop"]);
            drop(pg_ctl.stdout(Stdio::null()).stderr(Stdio::null()).status());
        }
    }
}

#[test]
fn a_copy_reaches_nobody_and_is_a_server_like_any_other() {
    for (major, bin) in oldest_and_newest() {
        eprintln!("PostgreSQL {major}");
        let parent = Parent::start(major, &bin);
        parent.subscribe();
        let mut tablespace = "";
        if major >= 16 {
            // Allowed for the session that creates it, as nobody allows it for the server.
            parent
                .archived
                .sql("ALTER ROLE postgres SET allow_in_place_tablespaces = on");
            parent.archived.sql("CREATE TABLESPACE inside LOCATION ''");
            tablespace = " TABLESPACE inside";
        }
        parent
            .archived
            .sql(&format!("CREATE TABLE kept (n int){tablespace}"));
        // As the backup of a standby has it; a running primary does not look at it.
        let signal = parent.archived.cluster.data().join("standby.signal");
        fs::write(&signal, "").expect("written");
        parent.archived.backup();
        fs::remove_file(&signal).expect("removed");
        parent.archived.sql("INSERT INTO kept VALUES (1)");
        parent.archived.end_lsn();
        parent
            .archived
            .sql("SELECT pg_create_restore_point('here')");
        parent.archived.end_lsn();
        wait_until("the restore point is archived", || {
            let listing = parent.archived.listing();
            let points = listing["restore_points"].as_array();
            points.is_some_and(|points| points.iter().any(|one| one["name"] == "here"))
        });
        let before = parent.outside_files();

        let root = directory().expect("a directory");
        let started = the_started_copy(&parent, root.path());
        parent.assert_untouched(&before);
        copied_moved_and_archived(&parent, root.path(), &started);
        drop(started);
        let by_hand = the_copy_started_by_hand(&parent, root.path());
        parent.assert_untouched(&before);
        the_subscription_is_the_parents(&parent, &by_hand);
        failures_are_told(&parent, root.path());
        the_release(&parent, &by_hand);
    }
}

/// `--start` on a free port; the parent keeps its own.
fn the_started_copy<'a>(parent: &'a Parent, root: &Path) -> Server<'a> {
    let data = root.join("started");
    let arguments = ["--start", "--json", "--target-name=here"];
    let report = succeed(&mut parent.restore(&data, &arguments)).expect("a copy");
    let report: serde_json::Value = serde_json::from_str(&report).expect("JSON");
    let copy = Server { parent, data };
    assert_ne!(report["port"], PORT);
    assert_eq!(
        report["socket_directory"],
        copy.data.join("pg_stat_tmp").display().to_string()
    );
    let switched_off = report["executed"]["isolation"]["switched_off"]
        .as_array()
        .expect("a list");
    for name in [
        "archive_command",
        "archive_cleanup_command",
        "recovery_end_command",
        "recovery_min_apply_delay",
        "external_pid_file",
        "data_directory",
        "hba_file",
        "log_directory",
        "primary_conninfo",
    ] {
        assert!(
            switched_off.iter().any(|one| one["name"] == name),
            "{name}: {switched_off:?}"
        );
    }
    assert_eq!(copy.sql("SELECT pg_is_in_recovery()"), "f");
    assert_eq!(copy.sql("SELECT n FROM kept"), "1");
    copy.assert_own_files();
    assert_eq!(copy.sql("SHOW listen_addresses"), "127.0.0.1");
    let port = copy.sql("SHOW port");
    let by_network = format!("host=127.0.0.1 port={port} dbname=postgres user=postgres");
    let refused = testbed::cluster::connect(&by_network).err();
    let refused = format!("{:#?}", refused.expect("nobody else is let in"));
    assert!(refused.contains("pg_hba.conf rejects"), "{refused}");
    // It writes, switches segments and is restarted, and its parent's commands do not run.
    copy.assert_settled();
    copy.sql("INSERT INTO kept VALUES (2); SELECT pg_switch_wal()");
    copy.sql("INSERT INTO kept VALUES (3)");
    copy.sql("CHECKPOINT");
    copy.pg_ctl(&["restart"]);
    assert_eq!(copy.sql("SELECT count(*) FROM kept"), "3");
    assert_eq!(copy.sql("SELECT pg_is_in_recovery()"), "f");
    // pg_ctl takes none of the arguments of the recovery over.
    for name in ["hot_standby", "logging_collector"] {
        assert_eq!(copy.sql(&format!("SHOW {name}")), "on", "{name}");
    }
    copy
}

/// A replica made of the copy follows it, the archiver archives it, and its directory can be moved.
fn copied_moved_and_archived(parent: &Parent, root: &Path, copy: &Server<'_>) {
    let replica = Server {
        parent,
        data: root.join("replica"),
    };
    let mut pg_basebackup = parent.program("pg_basebackup");
    pg_basebackup.args([
        "-R",
        "-X",
        "stream",
        "-c",
        "fast",
        "-d",
        &copy.conninfo(),
        "-D",
    ]);
    succeed(pg_basebackup.arg(&replica.data)).expect("a base backup");
    // A stock standby of a server with an in-place tablespace panics without this when it is
    // consistent (`CheckTablespaceDirectory` in `xlogrecovery.c`).
    let in_place = parent
        .archived
        .sql("SELECT count(*) FROM pg_tablespace WHERE spcname = 'inside'");
    let mut options = "-c listen_addresses=".to_owned();
    if in_place == "1" {
        options.push_str(" -c allow_in_place_tablespaces=on");
    }
    replica.pg_ctl(&["-o", &options, "start"]);
    copy.sql("INSERT INTO kept VALUES (4)");
    wait_until("the replica follows the copy", || {
        replica.sql("SELECT count(*) FROM kept") == "4"
    });
    assert_eq!(replica.sql("SELECT pg_is_in_recovery()"), "t");
    replica.pg_ctl(&["-m", "immediate", "stop"]);

    let place = Place::new().expect("a place");
    let daemon = place.daemon_at(&copy.conninfo(), "127.0.0.1:0", " INFO streaming");
    let daemon = daemon.expect("an archiver");
    place
        .back_up(&copy.conninfo(), &[])
        .expect("a backup of the copy");
    copy.sql("INSERT INTO kept VALUES (5)");
    let end = end_lsn(&copy.conninfo());
    wait_archived(&copy.conninfo(), end);
    daemon.stop().expect("the archiver stops");
    let mut plan = place.program("pitr-restore").expect("it is built");
    succeed(plan.arg("--dry-run")).expect("the copy's archive can be restored");

    copy.pg_ctl(&["-m", "fast", "stop"]);
    let moved = Server {
        parent,
        data: root.join("moved"),
    };
    moved_to(&copy.data, &moved.data);
    moved.pg_ctl(&["start"]);
    assert_eq!(moved.sql("SELECT count(*) FROM kept"), "5");
}

#[expect(clippy::disallowed_methods, reason = "a test's directory")]
fn moved_to(from: &Path, to: &Path) {
    fs::rename(from, to).expect("moved");
}

/// Restored, moved, started by `pg_ctl`, paused, and promoted by a person.
fn the_copy_started_by_hand<'a>(parent: &'a Parent, root: &Path) -> Server<'a> {
    let data = root.join("restored");
    let report = succeed(&mut parent.restore(&data, &[])).expect("a copy");
    let copy = Server {
        parent,
        data: root.join("by_hand"),
    };
    for part in [
        "archive_command = 'cp",
        "it would write into its parent's archive",
        &format!("pitr-restore release {}", data.display()),
        &format!(
            "psql \"host={}/pg_stat_tmp port={PORT} dbname=postgres user=postgres\"",
            data.display()
        ),
    ] {
        assert!(report.contains(part), "{part}: {report}");
    }
    assert!(!data.join("standby.signal").exists());
    moved_to(&data, &copy.data);
    copy.pg_ctl(&["start"]);
    copy.assert_own_files();
    wait_until("it pauses at the target", || {
        copy.sql("SELECT pg_is_wal_replay_paused()") == "t"
    });
    copy.sql("SELECT pg_wal_replay_resume()");
    wait_until("it is promoted", || {
        copy.sql("SELECT pg_is_in_recovery()") == "f"
    });
    wait_until("what the recovery needed is removed", || {
        !copy.auto().contains("recovery_target")
    });
    copy.assert_settled();
    copy.sql("INSERT INTO kept VALUES (2); SELECT pg_switch_wal()");
    copy.pg_ctl(&["restart"]);
    copy
}

/// While the parent is down, its publisher's changes wait for it and not for the copy.
fn the_subscription_is_the_parents(parent: &Parent, copy: &Server<'_>) {
    let workers =
        "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'logical replication%'";
    assert_eq!(copy.sql(workers), "0");
    parent.archived.cluster.stop().expect("the parent stops");
    query(
        &parent.publisher.conninfo(),
        "INSERT INTO followed VALUES (2)",
    );
    parent
        .archived
        .cluster
        .start_again()
        .expect("the parent starts");
    wait_until("the parent has the row", || {
        parent.archived.sql(ROWS) == "2"
    });
    assert_eq!(copy.sql(ROWS), "1");
    assert_eq!(copy.sql(workers), "0");
}

/// PostgreSQL's own reason is in the error, with what led to it.
fn failures_are_told(parent: &Parent, root: &Path) {
    let failed = |name: &str, arguments: &[&str], parts: &[&str]| {
        let data = root.join(name);
        let output = parent.restore(&data, arguments).output().expect("it runs");
        let (_, error) = said(&output);
        assert_eq!(output.status.code(), Some(1), "{error}");
        for part in parts {
            assert!(error.contains(part), "{part}: {error}");
        }
        assert!(!data.join("postmaster.pid").exists(), "it is left running");
    };
    let taken = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let port = taken.local_addr().expect("an address").port();
    let port = format!("--port={port}");
    let bind = [
        "could not bind",
        "Address already in use",
        "could not create any TCP/IP sockets",
    ];
    failed("no_port", &["--start", &port], &bind);
    let more = parent.outside.path().join("more.conf");
    let away = parent.outside.path().join("away.conf");
    moved_to(&more, &away);
    let include = [
        "more.conf",
        "cannot be read here",
        "could not open configuration file",
    ];
    failed("no_include", &["--start"], &include);
    moved_to(&away, &more);
}

/// The copy takes its parent's place.
fn the_release(parent: &Parent, copy: &Server<'_>) {
    let data = copy.data.clone();
    let isolated = copy.auto();
    let refused = parent.release(&data, &["--yes"]).output().expect("it runs");
    let (_, error) = said(&refused);
    assert_eq!(refused.status.code(), Some(1), "{error}");
    assert!(error.contains("the parent still answers"), "{error}");
    assert_eq!(copy.auto(), isolated);
    let value = |name: &str| {
        let mut postgres = parent.program("postgres");
        succeed(postgres.arg("-D").arg(&data).args(["-C", name])).expect("a value")
    };
    copy.pg_ctl(&["-m", "fast", "stop"]);
    assert_eq!(value("archive_mode"), "off");
    parent.archived.cluster.stop().expect("the parent stops");
    let shown = succeed(&mut parent.release(&data, &[])).expect("it is shown");
    assert!(
        shown.contains("archive_mode = 'off' becomes 'on'"),
        "{shown}"
    );
    assert!(shown.contains("nothing was changed"), "{shown}");
    assert!(shown.contains("data_directory stays"), "{shown}");
    assert_eq!(copy.auto(), isolated);
    // pg_isready of any version asks the parent; without it the changes are shown all the same.
    let release_with = |bin: &Path, arguments: &[&str]| {
        let mut release = parent.archived.pitr_restore();
        release.env("LD_LIBRARY_PATH", bin.join("../lib"));
        release.arg("release").arg(&data).arg("--pg-bin").arg(bin);
        release.args(arguments).output().expect("it runs")
    };
    for (_, bin) in oldest_and_newest() {
        let (shown, error) = said(&release_with(&bin, &[]));
        assert!(shown.contains("nothing was changed"), "{error}");
        assert!(!shown.contains("was not found"), "{shown}");
    }
    let nowhere = parent.outside.path();
    let (shown, error) = said(&release_with(nowhere, &[]));
    for part in [
        "archive_mode = 'off' becomes 'on'",
        "pg_isready of any version",
    ] {
        assert!(shown.contains(part), "{shown}{error}");
    }
    let refused = release_with(nowhere, &["--yes"]);
    assert_eq!(refused.status.code(), Some(2), "{}", said(&refused).1);
    assert_eq!(copy.auto(), isolated);
    // A lock file in the parent's directory whose process is not here: it may run in a container.
    let lock = parent.archived.cluster.data().join("postmaster.pid");
    fs::write(&lock, format!("{}\n", i32::MAX)).expect("written");
    let refused = parent.release(&data, &["--yes"]).output().expect("it runs");
    let (_, error) = said(&refused);
    assert_eq!(refused.status.code(), Some(1), "{error}");
    for part in ["postmaster.pid is there", "--force"] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(copy.auto(), isolated);
    fs::remove_file(&lock).expect("removed");
    succeed(&mut parent.release(&data, &["--yes"])).expect("it is released");
    assert!(!copy.auto().contains("pitr-restore"), "{}", copy.auto());
    let at = parent.outside.path().display().to_string();
    let own = fs::read_to_string(data.join("pg_hba.conf")).expect("it is there");
    assert!(own.contains(&format!("@{at}/users ")), "{own}");
    assert!(!own.contains("pitr-restore"), "{own}");
    for (name, expected) in [
        ("archive_mode", "on".to_owned()),
        ("archive_command", format!("cp %p {at}/archive/%f")),
        (
            "archive_cleanup_command",
            format!("touch {at}/archive/cleaned"),
        ),
        ("external_pid_file", format!("{at}/run/parent.pid")),
        ("log_directory", format!("{at}/log")),
        ("hba_file", format!("{at}/pg_hba.conf")),
        ("restore_command", String::new()),
        ("data_directory", data.display().to_string()),
        (
            "unix_socket_directories",
            parent
                .archived
                .cluster
                .socket_directory()
                .display()
                .to_string(),
        ),
    ] {
        assert_eq!(value(name), expected, "{name}");
    }
    // It takes connections where its parent did, and archives on its own timeline.
    copy.pg_ctl(&["start"]);
    assert_eq!(
        parent.archived.sql("SHOW data_directory"),
        data.display().to_string()
    );
    parent
        .archived
        .sql("INSERT INTO kept VALUES (9); SELECT pg_switch_wal()");
    wait_until("it archives in its parent's place", || {
        let folder = fs::read_dir(parent.outside.path().join("archive")).expect("it lists");
        folder
            .flatten()
            .any(|file| file.file_name().to_string_lossy().starts_with("00000002"))
    });
    copy.pg_ctl(&["-m", "fast", "stop"]);
}
