//! WAL that was archived and is missing in the repositories that answer. Nothing after it is
//! acknowledged as remote before it is stored again from the spool. None of it is declared lost.

use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use repository::durable;
use wal_format::{Lsn, ObjectKey, SegmentSize};

use crate::{
    present::{backup, report},
    support::{Archiver, Place, Server, postgres_bin, succeed, wait_flushed, wait_until},
    unmounted::{flushed, remote, wait_until_red_for, wait_until_well},
};

fn size() -> SegmentSize {
    SegmentSize::new(1 << 20).expect("1 MiB")
}

/// Returns the WAL that the objects of a folder contain, as ranges.
fn ranges(folder: &Path) -> Vec<(Lsn, Lsn, std::path::PathBuf)> {
    let mut found = Vec::new();
    let mut open = vec![folder.join("main")];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
                continue;
            }
            let key = path.strip_prefix(folder.join("main")).expect("inside");
            match key.to_string_lossy().parse() {
                Ok(ObjectKey::Tail(_, _, _, from, to)) => found.push((from, to, path)),
                Ok(ObjectKey::Segment(_, _, name)) => {
                    let segment = name.segment(size()).expect("a segment");
                    found.push((segment.start_lsn(size()), segment.end_lsn(size()), path));
                }
                _ => {}
            }
        }
    }
    found.sort();
    found
}

/// Returns the end of the WAL that a folder holds without a gap.
fn contiguous_end(folder: &Path) -> Lsn {
    let ranges = ranges(folder);
    let begin = ranges.first().map_or(Lsn::ZERO, |range| range.0);
    ranges.iter().fold(
        begin,
        |end, (from, to, _)| {
            if *from > end { end } else { end.max(*to) }
        },
    )
}

/// Checks that a folder holds everything that was acknowledged after `before`. A tail may be
/// replaced by its segment while the folder is listed.
fn assert_acknowledged_is_held(server: &Server, folder: &Path, before: Lsn) -> Lsn {
    let told = flushed(server);
    if told <= before {
        return told;
    }
    let is_held = (0..20).any(|_| {
        let is_held = contiguous_end(folder) >= told;
        if !is_held {
            std::thread::sleep(Duration::from_millis(50));
        }
        is_held
    });
    let held = contiguous_end(folder);
    assert!(is_held, "{told} is acknowledged, {held} is held");
    told
}

fn assert_nothing_is_lost(place: &Place, archiver: &Archiver) {
    let log = archiver.log();
    assert!(!log.contains("accepted as lost"), "{log}");
    let record = fs::read_to_string(place.spool().join("main/losses.json"));
    let record = record.unwrap_or_default();
    assert!(!record.contains("from_lsn"), "{record}");
    assert!(place.files_below("/gap/").is_empty());
}

fn copy(from: &Path, to: &Path) {
    let output = Command::new("cp").arg("-a").args([from, to]).output();
    succeed("cp", &output.expect("cp runs"));
}

fn is_well(archiver: &Archiver) -> bool {
    report(archiver)["state"] == "ok"
}

/// Closes the open segment, and commits once after it.
fn begin_segment(server: &Server) -> Lsn {
    server.write_wal(20);
    server.sql("SELECT pg_switch_wal()");
    server.write_wal(20);
    let lsn = server.lsn();
    wait_flushed(server, lsn);
    lsn
}

#[test]
fn an_older_copy_and_a_place_that_is_away_prove_nothing_together() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let near = place.repository();
    let far = near.with_extension("far");
    fs::create_dir(&far).expect("a directory");
    let configuration = place.spool().with_extension("toml");
    let text = format!(
        "repositories = [{{ url = 'file://{}' }}]\nrepositories_required = 'any'\n\
         acknowledge = 'remote'\n",
        far.display()
    );
    fs::write(&configuration, text).expect("a configuration");
    let command = || {
        let mut command = place.command(&server.conninfo());
        command.arg("--config").arg(&configuration);
        command
    };
    let archiver = place.run_with(command());
    archiver.wait_for_log("INFO streaming");
    let (older, aside) = (near.with_extension("old"), far.with_extension("aside"));
    let real = near.with_extension("real");
    let output = command().arg("backup").output();
    succeed("backup", &output.expect("it runs"));
    let lsn = begin_segment(&server);
    wait_until("both have everything", || {
        is_well(&archiver) && [&near, &far].iter().all(|one| contiguous_end(one) >= lsn)
    });

    // The spool has what the copy lacks.
    copy(&near, &older);
    durable::rename(&far, &aside).expect("it goes");
    server.write_wal(10);
    let hole = server.lsn();
    wait_flushed(&server, hole);
    durable::rename(&near, &real).expect("it goes");
    durable::rename(&older, &near).expect("it comes");
    assert!(contiguous_end(&near) < hole);
    for _ in 0..3 {
        server.write_wal(5);
        let lsn = server.lsn();
        wait_until("it is acknowledged", || {
            assert_acknowledged_is_held(&server, &near, hole) >= lsn
        });
    }
    archiver.wait_for_log("hole_found");
    durable::rename(&aside, &far).expect("it comes");
    let lsn = server.lsn();
    wait_until("both have everything again", || {
        is_well(&archiver) && [&near, &far].iter().all(|one| contiguous_end(one) >= lsn)
    });
    assert_nothing_is_lost(&place, &archiver);

    // The spool does not have it: only the right folder does.
    copy(&near, &older);
    durable::rename(&far, &aside).expect("it goes");
    let lsn = begin_segment(&server);
    let flushed_at = Instant::now();
    wait_until("the segment has left the spool", || {
        let spooled = fs::read_dir(place.spool().join("main"))
            .into_iter()
            .flatten()
            .flatten();
        let mut branches = spooled.filter(|entry| entry.path().is_dir());
        let holds = branches.any(|branch| {
            let files = fs::read_dir(branch.path()).into_iter().flatten().flatten();
            let names = files.map(|file| file.file_name().to_string_lossy().into_owned());
            let mut names = names.filter(|name| !name.contains('.'));
            names.any(|name| name.len() == 24)
        });
        !holds && contiguous_end(&near) >= lsn
    });
    fs::remove_dir_all(&real).expect("it goes");
    durable::rename(&near, &real).expect("it goes");
    durable::rename(&older, &near).expect("it comes");
    let held = contiguous_end(&near);
    let told = flushed(&server);
    server.write_wal(5);
    wait_until_red_for(&archiver, &["bring it back"]);
    // The lost WAL is as old as it was when it was acknowledged.
    let age = flushed_at.elapsed().as_secs_f64();
    let mut rpo = None;
    wait_until("the position goes back", || {
        let report = report(&archiver);
        rpo = report["durable"]["remote"]["rpo_seconds"].as_f64();
        remote(&archiver) <= held
    });
    assert!(
        rpo >= Some(age - 1.0),
        "{rpo:?} s is shown, at least {age} s is true"
    );
    server.write_wal(5);
    let durable = &report(&archiver)["durable"]["remote"];
    assert!(durable["lag_bytes"].as_u64() > Some(0), "{durable}");
    let now = flushed(&server);
    assert!(now <= told, "{now} was acknowledged beyond {told}");
    fs::remove_dir_all(&near).expect("it goes");
    durable::rename(&real, &near).expect("it comes");
    durable::rename(&aside, &far).expect("it comes");
    let lsn = server.lsn();
    wait_until("everything is held again", || {
        assert_acknowledged_is_held(&server, &near, told) >= lsn && is_well(&archiver)
    });
    assert_nothing_is_lost(&place, &archiver);

    // Acknowledged WAL survives the loss of the spool.
    let told = flushed(&server);
    archiver.kill();
    fs::remove_dir_all(place.spool()).expect("it goes");
    wait_until("both have everything", || {
        [&near, &far].iter().any(|one| contiguous_end(one) >= told)
    });
    let verdict = command().args(["verify", "--deep"]).output();
    let verdict = succeed("verify", &verdict.expect("it runs"));
    assert!(verdict.contains("no gap, no damage"), "{verdict}");
}

#[test]
fn a_tail_that_is_removed_is_stored_again_from_the_spool() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let near = place.repository();
    let configuration = place.spool().with_extension("toml");
    fs::write(&configuration, "acknowledge = 'remote'\n").expect("a configuration");
    let mut command = place.command(&server.conninfo());
    command.arg("--config").arg(&configuration);
    let archiver = place.run_with(command);
    archiver.wait_for_log("INFO streaming");
    backup(&place, &server);
    begin_segment(&server);
    // First a tail before the newest one, then the newest one.
    for (round, from_end) in [(1, 1), (2, 0)] {
        for _ in 0..3 {
            server.write_wal(5);
            wait_flushed(&server, server.lsn());
        }
        let tails: Vec<_> = ranges(&near)
            .into_iter()
            .filter(|(_, _, path)| path.to_string_lossy().contains("/tail/"))
            .collect();
        let (from, _, path) = &tails[tails.len() - 1 - from_end];
        fs::remove_file(path).expect("it goes");
        assert_eq!(contiguous_end(&near), *from);
        wait_until("the hole is found", || {
            archiver.log().matches("hole_found").count() >= round
        });
        let told = flushed(&server);
        server.write_wal(5);
        let lsn = server.lsn();
        wait_until("everything is held again", || {
            assert_acknowledged_is_held(&server, &near, told) >= lsn && remote(&archiver) >= lsn
        });
        wait_until_well(&archiver);
        assert_nothing_is_lost(&place, &archiver);
    }
    place.assert_whole(&server, archiver);
}
