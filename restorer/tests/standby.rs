//! `--standby`: a warm standby that follows the archive permanently, including its open segment,
//! and can be promoted.

use std::process::Stdio;

use testbed::{
    cluster::{PORT, conninfo},
    programs::{command, directory, succeed},
};

use crate::support::{Archived, query, servers, wait_until};

#[test]
fn a_standby_follows_the_archive_and_is_promoted() {
    let Some((_, bin)) = servers().pop() else {
        return;
    };
    let archived = Archived::start(&bin, "");
    archived.sql("CREATE TABLE done (n int, filler text)");
    archived.backup();
    archived.sql("INSERT INTO done SELECT n, repeat('x', 700) FROM generate_series(1, 5000) n");
    archived.end_lsn();

    let root = directory().expect("a directory");
    let data = root.path().join("data");
    let mut restore = archived.pitr_restore();
    restore.arg("--standby").arg("--target-dir").arg(&data);
    for setting in [
        "hot_standby=on",
        "fsync=off",
        "listen_addresses=",
        "wal_retrieve_retry_interval=100ms",
        &format!("unix_socket_directories={}", root.path().display()),
    ] {
        restore.args(["--set", setting]);
    }
    succeed(&mut restore).expect("a standby is restored");
    let pg_ctl = |arguments: &[&str]| {
        let mut pg_ctl = command(&bin.join("pg_ctl")).expect("a user");
        pg_ctl.env("LD_LIBRARY_PATH", bin.join("../lib"));
        pg_ctl
            .arg("-D")
            .arg(&data)
            .arg("-l")
            .arg(root.path().join("log"));
        let status = pg_ctl.args(arguments).stdout(Stdio::null()).status();
        assert!(status.expect("pg_ctl runs").success(), "{arguments:?}");
    };
    pg_ctl(&["-w", "start"]);
    let standby = conninfo(root.path(), PORT);
    let count = || query(&standby, "SELECT count(*) FROM done");
    assert_eq!(query(&standby, "SELECT pg_is_in_recovery()"), "t");
    wait_until("what was archived is replayed", || count() == "5000");
    // A few rows in the open segment, which arrive as tails within a second of their commit.
    for n in 1..=3 {
        archived.sql("INSERT INTO done VALUES (0, 'one more')");
        archived.end_lsn();
        wait_until("the open segment is followed", || {
            count() == (5000 + n).to_string()
        });
    }
    // Across the ends of segments too.
    archived.sql("INSERT INTO done SELECT n, repeat('y', 700) FROM generate_series(1, 4997) n");
    archived.end_lsn();
    wait_until("the standby has gone on", || count() == "10000");
    pg_ctl(&["-w", "promote"]);
    assert_eq!(query(&standby, "SELECT pg_is_in_recovery()"), "f");
    query(&standby, "INSERT INTO done VALUES (-1, 'its own')");
    assert_eq!(count(), "10001");
    // It can neither write into its parent's archive nor wait for its parent's standbys.
    assert_eq!(query(&standby, "SHOW archive_mode"), "off");
    assert_eq!(query(&standby, "SHOW synchronous_standby_names"), "");
    pg_ctl(&["-m", "immediate", "-w", "stop"]);
}
