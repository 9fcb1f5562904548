//! A timeline's history file that is missing or garbled in the repository: the plan refuses and
//! never treats the timeline as one without a parent. The server's own copy repairs it.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
};

use crate::support::{Place, Server, postgres_bin, succeed, wait_flushed, wait_until};

/// Plans a restore to the end of the archive.
fn plan(place: &Place) -> Output {
    let program = benches::programs::ours("pitr-restore").expect("it is built");
    let url = format!("file://{}", place.repository().display());
    Command::new(program)
        .args(["--repository", &url, "--target-timeline", "2", "--dry-run"])
        .output()
        .expect("pitr-restore runs")
}

fn histories(place: &Place) -> Vec<PathBuf> {
    let mut copies = place.files_below("/history/");
    copies.extend(place.files_below("/history-copy/"));
    copies
}

#[test]
fn without_a_history_file_nothing_is_planned_until_the_server_gives_it_again() {
    let Some(bin) = postgres_bin() else { return };
    let primary = Server::start(&bin, "");
    let standby = Server::standby_of(&primary);
    let place = Place::new();
    let archiver = place.run(&primary.conninfo());
    archiver.wait_for_log("INFO streaming");
    let backup = place.command(&primary.conninfo()).arg("backup").output();
    succeed("backup", &backup.expect("wal-archiver runs"));
    primary.write_wal(700);
    wait_flushed(&primary, primary.lsn());
    assert_eq!(archiver.terminate().code(), Some(0));
    let lsn = primary.lsn();
    wait_until("the standby has it", || {
        standby.sql(&format!("SELECT pg_last_wal_receive_lsn() >= '{lsn}'")) == "t"
    });
    primary.down("immediate");
    standby.promote();
    let archive = || {
        let archiver = place.run(&standby.conninfo());
        standby.write_wal(300);
        wait_flushed(&standby, standby.lsn());
        assert_eq!(archiver.terminate().code(), Some(0));
    };
    archive();
    let content = succeed("plan", &plan(&place));
    let copies = histories(&place);
    assert_eq!(copies.len(), 2, "{copies:?}");
    let sound = fs::read(&copies[0]).expect("a history file");

    // One intact copy is enough.
    fs::write(&copies[0], "garbled").expect("it is garbled");
    assert_eq!(succeed("plan", &plan(&place)), content);
    fs::remove_file(&copies[0]).expect("it goes");
    assert_eq!(succeed("plan", &plan(&place)), content);

    // Without an intact copy there is no plan, and in particular none that omits timeline 1.
    fs::remove_file(&copies[1]).expect("it goes");
    let refused = plan(&place);
    assert!(matches!(refused.status.code(), Some(3 | 4)), "{refused:?}");
    for copy in &copies {
        fs::write(copy, "garbled").expect("it is garbled");
    }
    let refused = plan(&place);
    assert_eq!(refused.status.code(), Some(4), "{refused:?}");
    for copy in &copies {
        fs::remove_file(copy).expect("it goes");
    }

    // The server still has it.
    archive();
    assert_eq!(histories(&place), copies);
    assert_eq!(fs::read(&copies[0]).expect("a history file"), sound);
    succeed("plan", &plan(&place));
    let verdict = place.verify(&standby.conninfo());
    assert!(verdict.contains("no gap, no damage"), "{verdict}");
}
