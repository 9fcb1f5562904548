//! Settings of a parent that could keep its copy from starting: files, libraries, commands and
//! background workers. The copy starts, or the message gives the remedy.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use testbed::{
    programs::{command, directory, succeed},
    restored::Restored,
};

use crate::{
    scene::owned,
    support::{Archived, files_below, oldest_and_newest, query, said},
};

/// The settings and the first version that has them. `{at}` is a directory outside of the parent.
const INHERITED: [(&str, u16); 12] = [
    ("logging_collector = on\nlog_directory = '{at}/log'", 13),
    (
        "log_destination = 'csvlog,syslog'\nsyslog_ident = 'parent'",
        13,
    ),
    (
        "ssl = on\nssl_cert_file = 'server.crt'\nssl_key_file = '{at}/missing.key'",
        13,
    ),
    ("ssl_passphrase_command = 'echo > {at}/ran'", 13),
    (
        "shared_preload_libraries = 'pg_stat_statements, pg_prewarm, auto_explain'",
        13,
    ),
    (
        "pg_prewarm.autoprewarm = on\npg_prewarm.autoprewarm_interval = 1s",
        13,
    ),
    (
        "session_preload_libraries = 'auto_explain'\nauto_explain.log_min_duration = 0",
        13,
    ),
    ("jit_provider = 'no_such_provider'\njit_above_cost = 0", 13),
    ("krb_server_keyfile = '{at}/missing.keytab'", 13),
    ("restore_command = 'echo > {at}/ran; false'", 13),
    ("archive_mode = on\narchive_command = 'echo > {at}/ran'", 13),
    (
        "archive_library = 'basic_archive'\nbasic_archive.archive_directory = '{at}/archive'",
        15,
    ),
];

fn restore(archived: &Archived, bin: &Path, arguments: &[&str]) -> anyhow::Result<Restored> {
    Restored::start(&archived.place, bin, arguments)
}

#[test]
fn a_copy_starts_whatever_files_libraries_and_commands_its_parent_names() {
    for (major, bin) in oldest_and_newest() {
        eprintln!("PostgreSQL {major}");
        let outside = directory().expect("a directory");
        for name in ["log", "archive"] {
            owned(&outside.path().join(name));
        }
        let mut archived = Archived::start(&bin, "");
        archived.sql("CREATE TABLE rows (n int); INSERT INTO rows VALUES (1)");
        // The parent does not read them, so they may name what this host lacks.
        for (lines, from) in INHERITED {
            // From version 15 on only one of the two may be set.
            let both = lines.contains("archive_command") && major >= 15;
            if major >= from && !both {
                let lines = lines.replace("{at}", &outside.path().display().to_string());
                archived.cluster.configure(&lines).expect("configured");
            }
        }
        archived.backup();
        archived
            .cluster
            .configure("shared_preload_libraries = 'no_such_library'")
            .expect("written");
        let without = archived.backup();
        archived.sql("INSERT INTO rows VALUES (2)");
        archived.finish();

        let first = archived.listing()["backups"][0]["id"].clone();
        let first = first.as_str().expect("an id");
        let copy = restore(&archived, &bin, &["--backup", first]).expect("a copy");
        let sql = |sql: &str| query(&copy.conninfo(), sql);
        assert_eq!(sql("SELECT sum(n) FROM rows"), "3");
        let loaded = sql("SHOW shared_preload_libraries");
        assert!(loaded.contains("pg_prewarm"), "{loaded}");
        sql("CREATE EXTENSION pg_stat_statements");
        sql("SELECT count(*) FROM pg_stat_statements");
        sql("SELECT pg_switch_wal()");
        let own = |name: &str| sql(&format!("SHOW {name}"));
        assert_eq!(own("ssl"), "off");
        // The copy stays isolated without the lines of `postgresql.auto.conf`.
        let auto = fs::read_to_string(copy.data().join("postgresql.auto.conf")).expect("a file");
        sql("ALTER SYSTEM RESET ALL");
        copy.stop().expect("it stops");
        // The value that the next start reads.
        let next = |name: &str| {
            let mut postgres = command(&bin.join("postgres")).expect("a user");
            postgres.env("LD_LIBRARY_PATH", bin.join("../lib"));
            postgres.arg("-D").arg(copy.data()).args(["-C", name]);
            succeed(&mut postgres).expect("a value")
        };
        let isolated = [
            ("ssl", "off"),
            ("log_directory", "log"),
            ("listen_addresses", "127.0.0.1"),
            ("restore_command", ""),
        ];
        for (name, value) in isolated {
            assert_eq!(next(name).trim(), value, "{name}");
        }
        // Nothing else keeps it isolated.
        fs::remove_file(copy.data().join("tidemark_isolation.conf")).expect("it is there");
        for (name, value) in isolated {
            assert_ne!(next(name).trim(), value, "{name}");
        }
        // `--start` sets these two on the command line: after a restart the file counts.
        for line in ["log_destination = 'stderr'", "log_directory = 'log'"] {
            assert!(auto.contains(line), "{line}: {auto}");
        }
        assert_eq!(
            files_below(outside.path()),
            Vec::<std::path::PathBuf>::new()
        );
        drop(copy);

        // A library that this host does not have.
        let root = directory().expect("a directory");
        let latest = ["--backup", without.as_str()];
        let again = |more: &[&str]| {
            let arguments = [latest.as_slice(), more].concat();
            Restored::command(&archived.place, &bin, root.path(), &arguments).expect("built")
        };
        let output = again(&[]).output().expect("it runs");
        let (_, error) = said(&output);
        assert_eq!(output.status.code(), Some(1), "{error}");
        for part in ["no_such_library", "--set shared_preload_libraries="] {
            assert!(error.contains(part), "no {part:?} in: {error}");
        }
        // The remedy, into the same directory.
        let report = succeed(&mut again(&[
            "--set",
            "shared_preload_libraries=auto_explain",
        ]));
        let report = serde_json::from_str(&report.expect("a copy")).expect("JSON");
        let copy = Restored::adopt(root, &bin, report);
        assert_eq!(query(&copy.conninfo(), "SELECT sum(n) FROM rows"), "3");
        let mode = fs::metadata(copy.data())
            .expect("it is there")
            .permissions()
            .mode();
        assert_eq!(mode & 0o077, 0);
    }
}
