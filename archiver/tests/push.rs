//! `archive_command`: pushes alone and through the daemon, twice, concurrently, with other bytes,
//! and killed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Mutex,
    thread::{self, sleep},
    time::Duration,
};

use crate::support::{Place, Server, postgres_bin, wait_flushed, wait_until};

/// PostgreSQL's own archiver always fails, so `.ready` files accumulate, and the test pushes the
/// segments.
const NEVER: &str = "archive_mode=on\narchive_command='/bin/false'\n";

/// Returns the complete segments of a server, oldest first.
fn segments(server: &Server) -> Vec<PathBuf> {
    server.sql("SELECT pg_switch_wal()");
    let current = server.sql("SELECT pg_walfile_name(pg_current_wal_insert_lsn())");
    let mut names: Vec<_> = fs::read_dir(server.data().join("pg_wal"))
        .expect("pg_wal")
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.len() == 24 && name < current.as_str())
        })
        .collect();
    names.sort();
    names
}

fn push(place: &Place, server: &Server, path: &Path) -> (Option<i32>, String) {
    let mut push = place.command(&server.conninfo());
    let output = push.arg("push").arg(path).output();
    let output = output.expect("wal-archiver runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    eprintln!("{:?} {} {said}", output.status.code(), path.display());
    (output.status.code(), said)
}

#[test]
fn it_is_idempotent_and_refuses_other_bytes() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    server.write_wal(3500);
    let place = Place::new();
    let names = segments(&server);
    for path in &names[..2] {
        assert_eq!(push(&place, &server, path).0, Some(0));
        assert_eq!(push(&place, &server, path).0, Some(0));
    }
    place.assert_equals_pg_wal(&server.data());
    let scratch = tempfile::tempdir().expect("a directory");
    // The first two are archived, the third is not.
    for (path, at, expected) in [
        (&names[0], 500_000, "differ"),
        (&names[2], 500_000, "fails its checks"),
        (&names[2], 24, "system identifier"),
    ] {
        let edited = scratch.path().join(path.file_name().expect("a name"));
        let mut wal = fs::read(path).expect("a segment");
        wal[at] ^= 1;
        fs::write(&edited, &wal).expect("a file");
        let (code, said) = push(&place, &server, &edited);
        assert!(
            code.is_some_and(|code| (1..=125).contains(&code)),
            "{code:?}"
        );
        assert!(said.contains(expected), "{said}");
        fs::write(&edited, &wal[..4096]).expect("a file");
        assert_eq!(push(&place, &server, &edited).0, Some(1));
    }
    let nonsense = scratch.path().join("nonsense");
    assert_eq!(push(&place, &server, &nonsense).0, Some(1));
    place.assert_equals_pg_wal(&server.data());
}

#[test]
fn the_daemon_works_ahead_and_sounds_the_alarm_when_bytes_differ() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, NEVER);
    server.write_wal(7000);
    let place = Place::new();
    let names = segments(&server);
    assert!(names.len() >= 6, "{names:?}");
    // It streams from here on. Earlier WAL reaches the archive only by pushes.
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("streaming");
    let archived = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        !place.files_below(name.expect("a name")).is_empty()
    };
    assert_eq!(push(&place, &server, &names[0]).0, Some(0));
    // If the stream was faster, the segment is in the spool and being uploaded.
    wait_until("it is archived", || archived(&names[0]));
    wait_until("it worked ahead", || names[1..6].iter().all(&archived));
    for path in &names {
        assert_eq!(push(&place, &server, path).0, Some(0));
    }
    // Both feeds meet: these segments were streamed.
    server.write_wal(3000);
    wait_flushed(&server, server.lsn());
    for path in segments(&server) {
        assert_eq!(push(&place, &server, &path).0, Some(0));
    }
    assert!(!archiver.get("/api/v1/clusters").contains("\"broken\""));
    let scratch = tempfile::tempdir().expect("a directory");
    let edited = scratch.path().join(names[3].file_name().expect("a name"));
    let mut wal = fs::read(&names[3]).expect("a segment");
    wal[600_000] ^= 1;
    fs::write(&edited, &wal).expect("a file");
    for _ in 0..2 {
        let (code, said) = push(&place, &server, &edited);
        assert_eq!(code, Some(1));
        assert!(said.contains("differ"), "{said}");
    }
    let report = archiver.get("/api/v1/clusters");
    assert!(
        report.contains("\"broken\"") && report.contains("differ"),
        "{report}"
    );
    // The server's own file shows that only the copy was damaged.
    assert_eq!(push(&place, &server, &names[3]).0, Some(0));
    wait_until("the state ends", || {
        !archiver.get("/api/v1/clusters").contains("\"broken\"")
    });
    // Its socket file remains. A push finds no daemon there and works alone.
    archiver.kill();
    server.write_wal(2000);
    for path in segments(&server) {
        assert_eq!(push(&place, &server, &path).0, Some(0));
    }
    place.assert_equals_pg_wal(&server.data());
    place.verify(&server.conninfo());
}

/// Eight pushes at once, in any order, killed at random: every segment is stored once, intact, with
/// all its commits.
#[test]
fn many_at_once_with_kills_leave_every_segment_once() {
    let Some(bin) = postgres_bin() else { return };
    let count = if testbed::is_long() { 1000 } else { 40 };
    let server = Server::start(&bin, "max_wal_size=8GB\nwal_keep_size=4GB\n");
    server.write_wal(count * 1000);
    let names = segments(&server);
    let place = Place::new();
    let waiting = Mutex::new(names.clone());
    thread::scope(|scope| {
        for number in 0..8_u32 {
            let (place, server, waiting) = (&place, &server, &waiting);
            scope.spawn(move || {
                let mut chance = std::process::id().wrapping_add(number.wrapping_mul(77_773));
                let take = || waiting.lock().expect("a list").pop();
                while let Some(path) = take() {
                    chance = chance.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let mut push = place.command(&server.conninfo());
                    push.arg("push").arg(&path).stderr(Stdio::null());
                    let mut child = push.spawn().expect("wal-archiver runs");
                    let kill = chance >> 30 == 0;
                    if kill {
                        sleep(Duration::from_millis(u64::from(chance >> 16) % 60));
                        drop(child.kill());
                    }
                    let status = child.wait().expect("a child");
                    if !status.success() {
                        assert!(kill || status.code().is_some(), "{status}");
                        waiting.lock().expect("a list").push(path);
                    }
                }
            });
        }
    });
    assert_eq!(place.sealed(), names.len());
    place.assert_equals_pg_wal(&server.data());
    place.verify(&server.conninfo());
}
