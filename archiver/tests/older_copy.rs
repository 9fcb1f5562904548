//! An older copy of the repository that is mounted over it. Nothing is stored there, no command
//! takes it for the repository, and archiving continues when the right disk is back or the operator
//! accepts the loss.

use std::process::Output;

use wal_format::Lsn;

use crate::{
    present::pitr_restore,
    support::{Archiver, Place, Server, wait_flushed, wait_until},
    unmounted::{Disk, flushed, remote, scene, wait_until_red_for, wait_until_well},
};

/// Mounts a copy of the repository over it that lacks only the newest tails. It is held like any
/// older state. Returns the copy: its end would unmount the right disk.
fn copy_without_the_newest_tail_takes_nothing(
    server: &Server,
    disk: &Disk,
    archiver: &Archiver,
) -> Disk {
    let is_stored = |lsn: Lsn| remote(archiver) >= lsn;
    // At the start of a segment, nothing would be closed.
    server.write_wal(50);
    let closed = server.sql("SELECT pg_walfile_name(pg_switch_wal())");
    wait_until("the segment before is sealed", || {
        let sealed = disk.sealed();
        sealed
            .iter()
            .any(|path| path.to_string_lossy().contains(&closed))
    });
    server.write_wal(50);
    let lsn = server.lsn();
    wait_until("a tail is stored", || is_stored(lsn));
    let old = disk.copied();
    server.write_wal(50);
    let lsn = server.lsn();
    wait_until("another tail is stored", || is_stored(lsn));
    let (of_copy, of_disk) = (old.files_below("/main/"), disk.files_below("/main/"));
    assert_eq!(old.sealed().len(), disk.sealed().len());
    assert!(of_copy.len() < of_disk.len(), "{of_copy:?} {of_disk:?}");

    assert!(old.attach());
    wait_until_red_for(archiver, &["holds an older state", "/tail/"]);
    wait_until("the page shows the reason once", || {
        let page = archiver.get("/");
        page.matches("--accept-loss").count() == 1
    });
    server.write_wal(1500);
    let report = archiver.get("/api/v1/clusters/main");
    assert!(report.contains("\"state\":\"broken\""), "{report}");
    assert_eq!(old.files_below("/main/"), of_copy, "WAL went to the copy");
    old.detach();
    let lsn = server.lsn();
    wait_until("it is stored in the right one", || is_stored(lsn));
    wait_until_well(archiver);
    assert_eq!(old.files_below("/main/"), of_copy, "WAL went to the copy");
    old
}

/// Mounts an old copy of the repository over it, with the same identity. Nothing is stored there
/// until the right disk is back, or the operator accepts that what is missing is lost for good.
fn older_copy_takes_nothing(acknowledge: &str) {
    let Some((server, place, disk, command)) = scene(acknowledge) else {
        return;
    };
    let run = |arguments: &[&str]| {
        let mut command = command(&place, &server);
        let output = command.args(arguments).output().expect("it runs");
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        (output.status.code(), said)
    };
    let archiver = place.run_with(command(&place, &server));
    archiver.wait_for_log("INFO streaming");
    server.write_wal(1500);
    assert_eq!(run(&["backup"]).0, Some(0));
    wait_until("segments are sealed", || disk.sealed().len() > 1);
    let _without_tail = (acknowledge == "remote")
        .then(|| copy_without_the_newest_tail_takes_nothing(&server, &disk, &archiver));
    let old = disk.copied();
    let before = old.sealed();
    server.write_wal(3000);
    let is_sealed = || disk.sealed().len() > before.len() + 1;
    wait_until("more segments are sealed", is_sealed);
    wait_flushed(&server, server.lsn());

    assert!(old.attach());
    let words = ["holds an older state", "--accept-loss"];
    wait_until_red_for(&archiver, &words);
    // The newest segment may be in the spool, from which it is stored again.
    let sealed = disk.sealed();
    let missing = sealed[before.len()].file_stem().expect("a name");
    let missing = missing.to_string_lossy();
    let told = flushed(&server);
    let at = server.lsn();
    server.write_wal(2500);
    if acknowledge == "remote" {
        let now = flushed(&server);
        assert!(now <= at, "{now} was acknowledged, only {told} is archived");
    } else {
        wait_flushed(&server, server.lsn());
    }
    archiver.kill();
    let archiver = place.run_with(command(&place, &server));
    wait_until("it serves", || {
        archiver.log().matches("serving HTTP").count() == 2
    });
    let words = [words[0], words[1], &missing];
    wait_until_red_for(&archiver, &words);
    assert_no_command_takes_the_copy(&place, &archiver, &run);
    let (code, said) = run(&["verify"]);
    assert_eq!(code, Some(4), "{said}");
    assert!(
        said.contains("was archived and is not there any more") && said.contains(&*missing),
        "{said}"
    );
    assert_eq!(old.sealed(), before, "segments went to the old copy");

    old.detach();
    wait_flushed(&server, server.lsn());
    wait_until_well(&archiver);
    let stored = server.lsn();
    wait_until("it is in the right one", || remote(&archiver) >= stored);
    assert_eq!(old.sealed(), before, "segments went to the old copy");

    // The right disk is lost for good.
    assert!(old.attach());
    wait_until_red_for(&archiver, &words[..2]);
    let (code, said) = run(&["verify", "--accept-loss"]);
    assert!(said.contains("accepted as lost: WAL "), "{said}");
    // The archive is not complete before a base backup is taken after the hole.
    assert!(matches!(code, Some(0 | 4)), "{said}");
    wait_until("a base backup is taken after the hole", || {
        let report = archiver.get("/api/v1/clusters/main");
        let is_whole = archiver
            .log()
            .contains("the archive is whole again from this backup on");
        assert!(is_whole || !report.contains("\"state\":\"ok\""), "{report}");
        is_whole
    });
    server.write_wal(1500);
    wait_flushed(&server, server.lsn());
    wait_until_well(&archiver);
    assert_eq!(archiver.terminate().code(), Some(0));
    let (code, said) = run(&["verify", "--deep"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("was declared lost"), "{said}");
    old.detach();
}

/// Checks that no command takes an older copy for the repository while the daemon holds it.
fn assert_no_command_takes_the_copy(
    place: &Place,
    archiver: &Archiver,
    run: &dyn Fn(&[&str]) -> (Option<i32>, String),
) {
    let (code, said) = run(&["backup"]);
    assert_eq!(code, Some(4), "{said}");
    assert!(said.contains("holds an older state"), "{said}");
    // On this host, the newest state is refused. An earlier target is planned.
    let spool = place.spool().display().to_string();
    let dry = [
        "--spool",
        &spool,
        "--dry-run",
        "--target-dir",
        "/nonexistent/restored",
    ];
    let plan = |more: &[&str]| pitr_restore(&place.repository(), &[&dry[..], more].concat());
    let said = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
    let refused = plan(&[]);
    assert_eq!(refused.status.code(), Some(3), "{refused:?}");
    assert!(
        said(&refused).contains("holds an older state"),
        "{refused:?}"
    );
    for more in ["--force", "--target-immediate"] {
        let planned = plan(&[more]);
        assert_eq!(planned.status.code(), Some(0), "{planned:?}");
        assert!(
            said(&planned).contains("warning: this host archived"),
            "{planned:?}"
        );
    }
    // The window does not reach beyond a plan for this copy.
    let list = |more: &[&str]| {
        let output = pitr_restore(&place.repository(), &[&["list", "--json"], more].concat());
        let listed: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        listed
    };
    assert!(list(&["--spool", &spool])["refusal"].is_string());
    let elsewhere = list(&["--spool", "/nonexistent/spool"]);
    assert!(elsewhere["refusal"].is_null(), "{elsewhere}");
    let ends = |of: &serde_json::Value| {
        let ranges = of["restorable"].as_array().expect("a list").iter();
        let ends = ranges.filter_map(|range| range["end_lsn"].as_str()?.parse::<Lsn>().ok());
        ends.max()
    };
    let planned = ends(&elsewhere);
    wait_until(&format!("the window is cut to {planned:?}"), || {
        let shown = archiver.get("/api/v1/clusters/main/window");
        let (_, body) = shown.split_once("\r\n\r\n").expect("a body");
        let shown: serde_json::Value = serde_json::from_str(body).expect("JSON");
        let shown = ends(&shown);
        shown <= planned && shown.map(|shown| shown.add(1 << 20)) > planned
    });
}

#[test]
fn an_older_copy_takes_nothing() {
    older_copy_takes_nothing("local");
}

#[test]
fn an_older_copy_acknowledges_nothing_as_remote() {
    older_copy_takes_nothing("remote");
}
