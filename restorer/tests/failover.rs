//! A failover while the archiver is away: the slot kept on the standby retains everything, and a
//! restore across the switch is exact, without a new base backup.

use testbed::{
    cluster::{Cluster, PORT},
    place::Place,
    programs::succeed,
    restored::Restored,
};

use crate::support::{
    SETTINGS, end_lsn, query, records, servers, switchover_check, wait_archived, wait_until,
};

/// Only slots retain WAL on these servers.
const KEEPS_NOTHING: &str = "wal_keep_size = 0\nmax_wal_size = 2MB\nmin_wal_size = 2MB\n";
const ROWS: &str = "SELECT count(*) || ' ' || sum(number) || ' ' || md5(string_agg(number::text, ',' ORDER BY number)) \
                    FROM rows";

/// Adds rows up to a number, each in a transaction, and some segments of WAL.
fn write(conninfo: &str, from: u32, to: u32) {
    for number in from..to {
        query(
            conninfo,
            &format!("INSERT INTO rows VALUES ({number}, repeat('x', 1000))"),
        );
    }
    query(
        conninfo,
        "INSERT INTO filler SELECT repeat('x', 1000) FROM generate_series(1, 2500)",
    );
}

#[test]
fn a_slot_kept_on_a_standby_saves_the_archive_over_a_failover_that_nobody_saw() {
    for (_, bin) in servers() {
        let primary =
            Cluster::start(&bin, 1, &format!("{SETTINGS}{KEEPS_NOTHING}")).expect("a primary");
        query(
            &primary.conninfo(),
            "CREATE TABLE rows (number int, filler text)",
        );
        query(&primary.conninfo(), "CREATE TABLE filler (filler text)");
        // Without a slot, a busy host may let the primary remove WAL that the standby needs.
        let slot = "SELECT pg_create_physical_replication_slot('standby', true)";
        query(&primary.conninfo(), slot);
        let standby = Cluster::standby_of(&primary, "primary_slot_name = 'standby'\n");
        let standby = standby.expect("a standby");
        let place = Place::with_settings(&format!("standbys = [\"{}\"]", standby.conninfo()));
        let place = place.expect("a place");
        let list = format!(
            "host={},{} port={PORT} user=postgres dbname=postgres target_session_attrs=primary connect_timeout=5",
            primary.socket_directory().display(),
            standby.socket_directory().display(),
        );
        let mut daemon = place.spawn(&list, "127.0.0.1:0").expect("an archiver");
        let kept = |log: &str| log.contains("the slot on a standby is maintained");
        daemon.wait_for(kept).expect("the slot is made");
        let mut backup = place.program("wal-archiver").expect("built");
        succeed(backup.args(["--conninfo", &list, "backup"])).expect("a backup");
        write(&primary.conninfo(), 0, 50);
        wait_archived(&primary.conninfo(), end_lsn(&primary.conninfo()));
        let (code, told) = switchover_check(&place, &list, &daemon);
        assert_eq!(code, Some(0), "{told}");
        assert!(told.contains("ok       standby slot"), "{told}");
        daemon.stop().expect("the archiver stops");

        // No archiver runs. The primary continues and dies, and the standby takes over and
        // continues.
        write(&primary.conninfo(), 50, 100);
        let end = end_lsn(&primary.conninfo());
        wait_until("the standby has everything", || {
            query(
                &standby.conninfo(),
                &format!("SELECT pg_last_wal_replay_lsn() >= '{end}'"),
            ) == "t"
        });
        primary.crash().expect("the primary dies");
        standby.promote().expect("a promotion");
        for round in 0..4 {
            write(&standby.conninfo(), 100 + round * 25, 125 + round * 25);
            query(&standby.conninfo(), "CHECKPOINT");
        }
        let truth = query(&standby.conninfo(), ROWS);
        let old = query(
            &standby.conninfo(),
            "SELECT count(*) FROM pg_ls_waldir() WHERE name LIKE '00000001%'",
        );
        assert_ne!(old, "0", "the slot keeps WAL of the old timeline");

        let mut daemon = place
            .daemon_at(&list, "127.0.0.1:0", "changed its timeline")
            .expect("it goes on");
        wait_archived(&standby.conninfo(), end_lsn(&standby.conninfo()));
        daemon.wait_for(|log| !log.contains("gap")).expect("no gap");
        daemon.stop().expect("the archiver stops");
        // A start on the known timeline adds no record.
        let daemon = place.daemon_at(&list, "127.0.0.1:0", " INFO streaming");
        daemon.expect("it starts").stop().expect("it stops");
        let followed = records(&place, "failover");
        let [followed] = followed.as_slice() else {
            panic!("{followed:#?}");
        };
        let branch = followed["branch"].as_str().expect("a branch");
        assert!(branch.starts_with("00000002-"), "{followed:#}");
        let mut list_all = place.program("pitr-restore").expect("built");
        let listed = succeed(list_all.args(["list", "--json"])).expect("a listing");
        let listed: serde_json::Value = serde_json::from_str(&listed).expect("JSON");
        assert_eq!(
            listed["backups"].as_array().map(Vec::len),
            Some(1),
            "{listed}"
        );
        assert_eq!(listed["gaps"].as_array().map(Vec::len), Some(0), "{listed}");
        let restored = Restored::start::<&str>(&place, &bin, &[]).expect("a restore");
        assert_eq!(query(&restored.conninfo(), ROWS), truth);
    }
}

#[test]
fn a_slot_on_a_standby_moves_with_the_archive_and_says_when_it_is_not_kept() {
    let Some((_, bin)) = servers().pop() else {
        return;
    };
    let primary = Cluster::start(&bin, 1, SETTINGS).expect("a primary");
    query(&primary.conninfo(), "CREATE TABLE filler (filler text)");
    query(
        &primary.conninfo(),
        "CREATE TABLE rows (number int, filler text)",
    );
    let standby = Cluster::standby_of(&primary, "").expect("a standby");
    let place = Place::with_settings(&format!(
        "standbys = [\"{}\", \"host=/nonexistent user=postgres\"]",
        standby.conninfo()
    ));
    let place = place.expect("a place");
    let mut daemon = place.daemon(&primary, "127.0.0.1:0").expect("an archiver");
    let missing = |log: &str| {
        log.contains("the slot on a standby cannot be maintained") && log.contains("/nonexistent")
    };
    daemon.wait_for(missing).expect("it says which");
    let slot = "SELECT coalesce(max(restart_lsn), '0/0') FROM pg_replication_slots WHERE slot_name = 'tidemark_main'";
    let before = query(&standby.conninfo(), slot);
    write(&primary.conninfo(), 0, 10);
    let end = end_lsn(&primary.conninfo());
    wait_until("the slot has moved", || {
        // While a standby is missing it is polled every few seconds.
        let now = query(&standby.conninfo(), slot);
        let moved = format!("SELECT '{now}'::pg_lsn > '{before}' AND '{now}'::pg_lsn <= '{end}'");
        query(&standby.conninfo(), &moved) == "t"
    });
    let mut check = place.program("wal-archiver").expect("built");
    let output = check
        .args(["--conninfo", &primary.conninfo(), "check"])
        .output();
    let output = output.expect("it runs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(5), "{said}");
    let line = |prefix: &str, part: &str| {
        said.lines()
            .any(|line| line.trim_start().starts_with(prefix) && line.contains(part))
    };
    assert!(line("ok", "\"tidemark_main\" keeps WAL from"), "{said}");
    assert!(line("FAIL", "standby /nonexistent"), "{said}");

    // Promoted without the archiver's knowledge it is a primary, and its slot is left alone.
    standby.promote().expect("a promotion");
    daemon
        .wait_for(|log| log.contains("it is a primary and not a standby"))
        .expect("it says so");
}
