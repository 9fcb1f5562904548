//! A timeline's history file that is missing or garbled in the repository: the plan refuses and
//! never treats the timeline as one without a parent. The server's own copy repairs it. And a hole
//! in the WAL anywhere on a path over a fork, which `verify` finds.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use crate::support::{Place, Server, postgres_bin, succeed, wait_flushed, wait_until};

/// Plans a restore to the end of the archive.
fn plan(place: &Place) -> Output {
    let program = testbed::programs::ours("pitr-restore").expect("it is built");
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

/// Returns a promoted standby, with an archive of its primary that has a backup and this many KiB
/// of WAL after it.
fn promoted(kib: u32) -> Option<(Server, Place)> {
    let bin = postgres_bin()?;
    let primary = Server::start(&bin, "");
    let standby = Server::standby_of(&primary);
    let place = Place::new();
    let archiver = place.run(&primary.conninfo());
    archiver.wait_for_log("INFO streaming");
    let backup = place.command(&primary.conninfo()).arg("backup").output();
    succeed("backup", &backup.expect("wal-archiver runs"));
    primary.write_wal(kib);
    wait_flushed(&primary, primary.lsn());
    assert_eq!(archiver.terminate().code(), Some(0));
    let lsn = primary.lsn();
    wait_until("the standby has it", || {
        standby.sql(&format!("SELECT pg_last_wal_receive_lsn() >= '{lsn}'")) == "t"
    });
    primary.down("immediate");
    standby.promote();
    Some((standby, place))
}

#[test]
fn without_a_history_file_nothing_is_planned_until_the_server_gives_it_again() {
    let Some((standby, place)) = promoted(700) else {
        return;
    };
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

    // The server still has the history file.
    archive();
    assert_eq!(histories(&place), copies);
    assert_eq!(fs::read(&copies[0]).expect("a history file"), sound);
    succeed("plan", &plan(&place));
    let verdict = place.verify(&standby.conninfo());
    assert!(verdict.contains("no gap, no damage"), "{verdict}");

    // The server provides the file again, without new WAL, to an archiver that has lost all its
    // other copies.
    for copy in &copies {
        fs::remove_file(copy).expect("it goes");
    }
    fs::remove_dir_all(place.spool()).expect("the spool goes");
    let archiver = place.run(&standby.conninfo());
    wait_until("both copies are back", || histories(&place) == copies);
    assert_eq!(archiver.terminate().code(), Some(0));
    assert_eq!(fs::read(&copies[1]).expect("a history file"), sound);
    let verdict = place.verify(&standby.conninfo());
    assert!(verdict.contains("no gap, no damage"), "{verdict}");
}

/// Returns the exit code and the output of `verify`.
fn verify(place: &Place, server: &Server) -> (Option<i32>, String) {
    let output = place.command(&server.conninfo()).arg("verify").output();
    let output = output.expect("wal-archiver runs");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status.code(), said)
}

/// Removes an object, and checks that `verify` reports this hole and nothing else.
fn assert_found(place: &Place, server: &Server, object: &Path, timeline: &str) {
    let aside = place.spool().join("aside");
    fs::copy(object, &aside).expect("a copy");
    fs::remove_file(object).expect("it goes");
    let (code, said) = verify(place, server);
    let holes: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("is missing"))
        .collect();
    assert_eq!(
        (code, holes.len()),
        (Some(4), 1),
        "{}: {said}",
        object.display()
    );
    assert!(holes[0].contains(&format!("branch {timeline}")), "{said}");
    fs::copy(&aside, object).expect("it is put back");
}

#[test]
fn a_hole_anywhere_on_the_way_over_a_fork_is_found() {
    let Some((standby, place)) = promoted(2500) else {
        return;
    };
    let archiver = place.run(&standby.conninfo());
    standby.write_wal(3500);
    wait_flushed(&standby, standby.lsn());
    wait_until("the segments are sealed", || {
        place.files_below("/wal/00000002-").len() >= 3
    });
    let holes = |backup: &str| {
        let (first, second) = (
            place.files_below("/wal/00000001/"),
            place.files_below("/wal/00000002-"),
        );
        eprintln!("{backup}: {} and {} segments", first.len(), second.len());
        let begin = |path: &PathBuf| path.to_string_lossy().into_owned();
        // The last segment before the fork, the first one after it, and one between that and
        // everything later.
        let fork = &begin(&second[0])[begin(&second[0]).len() - 20..];
        let before = first
            .iter()
            .rfind(|path| &begin(path)[begin(path).len() - 20..] < fork);
        assert_found(
            &place,
            &standby,
            before.expect("a segment before the fork"),
            "00000001 ",
        );
        assert_found(&place, &standby, &second[0], "00000002-");
        assert_found(&place, &standby, &second[1], "00000002-");
    };
    assert_eq!(archiver.terminate().code(), Some(0));
    holes("without a backup of the second timeline");
    let archiver = place.run(&standby.conninfo());
    archiver.wait_for_log("INFO streaming");
    let backup = place.command(&standby.conninfo()).arg("backup").output();
    succeed("backup", &backup.expect("wal-archiver runs"));
    assert_eq!(archiver.terminate().code(), Some(0));
    holes("with a backup of the second timeline");
    let (code, said) = verify(&place, &standby);
    assert_eq!(code, Some(0), "{said}");
}

#[test]
fn a_server_without_the_history_files_of_its_ancestors_is_archived() {
    let Some((second, _place)) = promoted(300) else {
        return;
    };
    // A base backup contains the history file of its own timeline only.
    let third = Server::standby_of(&second);
    let lsn = second.lsn();
    wait_until("the standby has it", || {
        third.sql(&format!("SELECT pg_last_wal_receive_lsn() >= '{lsn}'")) == "t"
    });
    second.down("immediate");
    third.promote();
    fs::remove_file(third.data().join("pg_wal/00000002.history")).expect("it goes");
    let place = Place::new();
    let archiver = place.run(&third.conninfo());
    archiver.wait_for_log("INFO streaming");
    let backup = place.command(&third.conninfo()).arg("backup").output();
    succeed("backup", &backup.expect("wal-archiver runs"));
    third.write_wal(300);
    wait_flushed(&third, third.lsn());
    assert_eq!(archiver.terminate().code(), Some(0));
    let verdict = place.verify(&third.conninfo());
    assert!(verdict.contains("no gap, no damage"), "{verdict}");
}
