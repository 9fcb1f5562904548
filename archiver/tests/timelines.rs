//! Promotions: every timeline is stored under its own branch, history file first, without a gap.

use std::{fs, process::Command};

use crate::support::{
    Place, Server, postgres_bin, store_goes_down, succeed, wait_flushed, wait_until,
};

#[test]
fn a_promotion_under_way_is_followed() {
    let Some(bin) = postgres_bin() else { return };
    let primary = Server::start(&bin, "");
    let standby = Server::standby_of(&primary);
    let place = Place::new();
    let archiver = place.run(&standby.conninfo());
    archiver.wait_for_log("streaming");
    primary.write_wal(1500);
    let lsn = primary.lsn();
    wait_until("the standby has replayed", || {
        standby.sql(&format!("SELECT pg_last_wal_receive_lsn() >= '{lsn}'")) == "t"
    });
    wait_flushed(&standby, lsn);
    standby.promote();
    archiver.wait_for_log("changed its timeline");
    standby.write_wal(1500);
    let lsn = standby.lsn();
    wait_flushed(&standby, lsn);
    assert_eq!(archiver.terminate().code(), Some(0));
    let verdict = place.verify(&standby.conninfo());
    assert!(verdict.contains("no gap"), "{verdict}");
    assert!(place.assert_equals_pg_wal(&standby.data()) >= lsn);
}

#[test]
fn a_promotion_while_we_were_away_is_followed_and_the_old_primary_refused() {
    let Some(bin) = postgres_bin() else { return };
    let primary = Server::start(&bin, "");
    let standby = Server::standby_of(&primary);
    let place = Place::new();
    let archiver = place.run(&primary.conninfo());
    archiver.wait_for_log("streaming");
    primary.write_wal(700);
    wait_flushed(&primary, primary.lsn());
    assert_eq!(archiver.terminate().code(), Some(0));
    primary.write_wal(700);
    let lsn = primary.lsn();
    wait_until("the standby has replayed", || {
        standby.sql(&format!("SELECT pg_last_wal_receive_lsn() >= '{lsn}'")) == "t"
    });
    standby.promote();
    let archiver = place.run(&standby.conninfo());
    archiver.wait_for_log("changed its timeline");
    standby.write_wal(700);
    wait_flushed(&standby, standby.lsn());
    assert_eq!(archiver.terminate().code(), Some(0));
    // WAL of the old timeline that was not archived before the promotion came from the promoted
    // server.
    let verdict = place.verify(&standby.conninfo());
    assert!(verdict.contains("no gap"), "{verdict}");
    assert!(place.assert_equals_pg_wal(&standby.data()) > lsn);

    let archiver = place.run(&primary.conninfo());
    archiver.wait_for_log("left behind by a promotion");
    assert_eq!(
        primary.sql("SELECT count(*) FROM pg_stat_replication WHERE application_name = 'tidemark'"),
        "0"
    );
    assert_eq!(archiver.terminate().code(), Some(0));
    place.verify(&standby.conninfo());
}

#[test]
fn a_failover_is_followed_along_the_list_of_hosts() {
    let Some(bin) = postgres_bin() else { return };
    let primary = Server::start(&bin, "");
    let standby = Server::standby_of(&primary);
    let place = Place::new();
    let list = primary.conninfo_with(&standby);
    let archiver = place.run(&list);
    archiver.wait_for_log("streaming");
    primary.write_wal(1500);
    let lsn = primary.lsn();
    wait_flushed(&primary, lsn);
    wait_until("the standby has replayed", || {
        standby.sql(&format!("SELECT pg_last_wal_receive_lsn() >= '{lsn}'")) == "t"
    });
    primary.down("immediate");
    // There is no primary now: both hosts are named with their reason.
    archiver.wait_for_log("is a standby, but target_session_attrs=primary");
    standby.promote();
    standby.write_wal(1500);
    let lsn = standby.lsn();
    wait_flushed(&standby, lsn);
    assert_eq!(archiver.terminate().code(), Some(0));
    let verdict = place.verify(&list);
    assert!(verdict.contains("no gap"), "{verdict}");
    assert!(place.assert_equals_pg_wal(&standby.data()) >= lsn);
}

#[test]
fn what_a_failover_lost_is_kept_and_listed_commit_by_commit() {
    let Some(bin) = postgres_bin() else { return };
    let primary = Server::start(&bin, "");
    let standby = Server::standby_of(&primary);
    let place = Place::new();
    let archiver = place.run(&primary.conninfo());
    archiver.wait_for_log("INFO streaming");
    primary.write_wal(300);
    let lsn = primary.lsn();
    wait_until("the standby has replayed", || {
        standby.sql(&format!("SELECT pg_last_wal_replay_lsn() >= '{lsn}'")) == "t"
    });
    // From here on only the archiver receives commits, over more than one segment.
    standby.down("fast");
    let lost: Vec<u64> = (0..7)
        .map(|_| {
            let xid = primary.sql(
                "INSERT INTO load SELECT 1, repeat('x', 1000) FROM generate_series(1, 200); \
                 SELECT max(xmin::text::bigint) FROM load",
            );
            xid.parse().expect("a transaction")
        })
        .collect();
    let ahead = primary.lsn();
    wait_flushed(&primary, ahead);
    assert_eq!(archiver.terminate().code(), Some(0));
    primary.down("immediate");
    standby.up();
    standby.promote();
    standby.write_wal(100);

    // The store is away when the fork is found, and the archiver is killed before the store is
    // back.
    let comes_back = store_goes_down(&place);
    let archiver = place.run(&standby.conninfo());
    standby.write_wal(300);
    wait_flushed(&standby, standby.lsn());
    assert!(!archiver.log().contains("ERROR lost by the failover"));
    archiver.kill();
    comes_back();

    let archiver = place.run(&standby.conninfo());
    archiver.wait_for_log("its transactions were lost by the failover");
    standby.write_wal(1500);
    wait_flushed(&standby, standby.lsn());
    let events = "/api/v1/clusters/main/events";
    wait_until("it is told", || {
        archiver
            .get(events)
            .contains("it lost 7 commits of timeline 00000001,")
    });
    let mut losses = place.files_below("/failover/");
    losses.retain(|path| !path.to_string_lossy().contains("/outcome/"));
    assert_eq!(losses.len(), 1);
    let window = archiver.get("/api/v1/clusters/main/window");
    assert!(window.contains("\"commits\":7"), "{window}");
    assert!(
        !archiver
            .get("/metrics")
            .contains("pitr_failover_loss_timestamp_seconds{cluster=\"main\"} NaN")
    );
    assert_eq!(archiver.terminate().code(), Some(0));

    // The loss is known after a restart, and reported once.
    let archiver = place.run(&standby.conninfo());
    standby.write_wal(10);
    wait_flushed(&standby, standby.lsn());
    wait_until("it is known", || {
        archiver
            .get("/api/v1/clusters/main/window")
            .contains("\"commits\":7")
    });
    let log = archiver.log();
    assert_eq!(archiver.terminate().code(), Some(0));
    assert!(log.contains("commits=7"), "{log}");
    assert_eq!(
        log.matches("ERROR lost by the failover").count(),
        7,
        "{log}"
    );
    let told = fs::read_to_string(place.spool().join("main/history/events")).expect("events");
    // Once as the event and once as the alert.
    for kind in ["failover", "alert"] {
        let kind = format!("\"kind\":\"{kind}\"");
        let of_kind = told.lines().filter(|line| line.contains(&kind));
        let naming = of_kind.filter(|line| line.contains("it lost 7 commits"));
        assert_eq!(naming.count(), 1, "{kind}: {told}");
    }
    assert_eq!(listed(&place), lost);
    let verdict = place.verify(&standby.conninfo());
    assert!(verdict.contains("no gap"), "{verdict}");
}

/// Returns the transactions that `pitr-restore list` names as lost.
fn listed(place: &Place) -> Vec<u64> {
    let program = testbed::programs::ours("pitr-restore").expect("it is built");
    let url = format!("file://{}", place.repository().display());
    let list = |how: &[&str]| {
        let mut command = Command::new(&program);
        let output = command.args(["--repository", &url, "list"]).args(how);
        succeed("list", &output.output().expect("pitr-restore runs"))
    };
    let people = list(&[]);
    assert!(people.contains("FAILOVER  timeline 00000002-"), "{people}");
    assert_eq!(
        people.matches("  lost  transaction ").count(),
        7,
        "{people}"
    );
    let listed = list(&["--json"]);
    let listed: serde_json::Value = serde_json::from_str(&listed).expect("JSON");
    let losses = listed["failover_losses"].as_array().expect("a list");
    assert_eq!(losses.len(), 1, "{listed}");
    let commits = losses[0]["listed"].as_array().expect("a list");
    commits
        .iter()
        .map(|commit| commit["xid"].as_u64().expect("a transaction"))
        .collect()
}

#[test]
fn several_promotions_while_we_were_away_are_followed_one_after_the_other() {
    let Some(bin) = postgres_bin() else { return };
    // Nothing is removed: this test is about the path, not about gaps.
    let primary = Server::start(&bin, "wal_keep_size=1GB");
    let first = Server::standby_of(&primary);
    let second = Server::standby_of(&first);
    let third = Server::standby_of(&second);
    let place = Place::new();
    let archiver = place.run(&primary.conninfo());
    archiver.wait_for_log("INFO streaming");
    primary.write_wal(700);
    wait_flushed(&primary, primary.lsn());
    assert_eq!(archiver.terminate().code(), Some(0));
    // Each server runs for a while and dies, and its standby takes over.
    for (last, next) in [(&primary, &first), (&first, &second), (&second, &third)] {
        last.write_wal(700);
        let lsn = last.lsn();
        wait_until("the standby has it", || {
            next.sql(&format!("SELECT pg_last_wal_receive_lsn() >= '{lsn}'")) == "t"
        });
        last.down("immediate");
        next.promote();
    }
    third.write_wal(700);
    let archiver = place.run(&third.conninfo());
    let lsn = third.lsn();
    wait_flushed(&third, lsn);
    let status = archiver.get("/api/v1/clusters");
    assert!(status.contains("\"timeline\":4"), "{status}");
    assert_eq!(archiver.terminate().code(), Some(0));
    assert_eq!(place.files_below("/history/").len(), 3);
    assert_eq!(place.files_below("/history-copy/").len(), 3);
    let verdict = place.verify(&third.conninfo());
    assert!(verdict.contains("no gap, no damage"), "{verdict}");
}
