//! Restores to before a fork: the archive that continues from them is restorable, and no timeline
//! number is taken twice.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
};

use serde_json::Value;
use testbed::{
    programs::{command, directory, succeed},
    restored::Restored,
    tools::servers_or_skip,
};

use crate::support::{Archived, long, query, said};

const NUMBERS: &str = "SELECT string_agg(n::text, ' ' ORDER BY n) FROM rows";

/// The oldest and the newest version; in the long tier all.
fn versions() -> Vec<(u16, PathBuf)> {
    let mut servers = servers_or_skip();
    if !long() && servers.len() > 2 {
        servers.drain(1..servers.len() - 1);
    }
    servers
}

/// A row of the ledger: what was written, by which transaction, and the state after it.
#[derive(Clone)]
struct Entry {
    xid: String,
    /// Greater than the commit's time and less than the next one's.
    time: String,
    /// The end of the commit's WAL.
    lsn: String,
}

/// An archived cluster with the table `rows`, and the server that continues it.
struct Scene {
    archived: Archived,
    bin: PathBuf,
    next: u32,
}

impl Scene {
    fn start(bin: &Path) -> Self {
        let archived = Archived::start(bin, "");
        archived.sql("CREATE TABLE rows (n int)");
        archived.backup();
        Self {
            archived,
            bin: bin.to_owned(),
            next: 1,
        }
    }

    fn primary(&self) -> String {
        self.archived.cluster.conninfo()
    }

    /// Writes the next number.
    fn write(&mut self, conninfo: &str) -> Entry {
        let insert = format!(
            "INSERT INTO rows VALUES ({}) RETURNING xmin::text",
            self.next
        );
        self.next += 1;
        let xid = query(conninfo, &insert);
        let lsn = query(conninfo, "SELECT pg_current_wal_insert_lsn()");
        let now = "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', \
                   'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')";
        let time = query(conninfo, now);
        query(conninfo, "SELECT pg_sleep(0.002)");
        Entry { xid, time, lsn }
    }

    fn restore(&self, arguments: &[&str]) -> Restored {
        Restored::start(&self.archived.place, &self.bin, arguments)
            .unwrap_or_else(|error| panic!("{arguments:?}: {error:?}"))
    }

    /// Restores and promotes: the server, on the timeline of this number.
    fn promoted(&self, timeline: u32, arguments: &[&str]) -> Restored {
        let restored = self.restore(arguments);
        let file = "SELECT pg_walfile_name(pg_current_wal_lsn())";
        let file = query(&restored.conninfo(), file);
        assert!(
            file.starts_with(&format!("{timeline:08X}")),
            "{arguments:?}: {file}"
        );
        restored
    }

    /// Restores to timeline 2 where the plan is on timeline 1: that is not believed, and the copy
    /// which was promoted by then is started by hand.
    fn promoted_elsewhere(&self, arguments: &[&str]) -> Restored {
        let root = directory().expect("a directory");
        let restore = Restored::command(&self.archived.place, &self.bin, root.path(), arguments);
        let output = restore.expect("built").output().expect("it runs");
        let (_, error) = said(&output);
        assert_eq!(output.status.code(), Some(4), "{error}");
        let expected = "recovery stopped on timeline 2, the plan was on timeline 1";
        assert!(error.contains(expected), "{error}");
        let mut pg_ctl = command(&self.bin.join("pg_ctl")).expect("pg_ctl");
        pg_ctl.env("LD_LIBRARY_PATH", self.bin.join("../lib"));
        pg_ctl.arg("-D").arg(root.path().join("data"));
        pg_ctl.arg("-l").arg(root.path().join("log"));
        pg_ctl.stdout(Stdio::null()).stderr(Stdio::null());
        let status = pg_ctl.args(["-w", "start"]).status();
        assert!(status.expect("it runs").success());
        Restored::adopt(root, &self.bin, Value::Null)
    }

    fn assert_numbers(&self, arguments: &[&str], expected: &str) {
        let restored = self.restore(arguments);
        let found = query(&restored.conninfo(), NUMBERS);
        assert_eq!(found, expected, "{arguments:?}");
    }

    fn plan(&self, arguments: &[&str]) -> Value {
        let mut plan = self.archived.pitr_restore();
        let plan = plan.args(["--dry-run", "--json"]).args(arguments);
        serde_json::from_str(&succeed(plan).expect("a plan")).expect("JSON")
    }

    /// The flags with which `locate` restores to just before the end of a transaction.
    fn located(&self, entry: &Entry) -> String {
        let mut locate = self.archived.pitr_restore();
        let located = succeed(locate.args(["locate", "--json", "--xid", &entry.xid]));
        let located: Value = serde_json::from_str(&located.expect("found")).expect("JSON");
        let flags = located["transactions"][0]["just_before"].as_str();
        flags.expect("restorable").to_owned()
    }

    fn verify(&self, conninfo: &str) {
        let mut verify = self.archived.place.program("wal-archiver").expect("built");
        let verdict = succeed(verify.args(["--conninfo", conninfo, "verify", "--deep"]));
        let verdict = verdict.expect("everything is sound");
        assert!(verdict.contains("no gap"), "{verdict}");
    }

    /// That `check` finds nothing wrong with a server and the archive.
    fn check(&self, conninfo: &str) {
        let mut check = self.archived.place.program("wal-archiver").expect("built");
        let output = check.args(["--conninfo", conninfo, "check"]).output();
        let output = output.expect("it runs");
        let (out, error) = said(&output);
        assert_eq!(output.status.code(), Some(0), "{out}\n{error}");
    }
}

/// The lines of a history file of a server, without the reasons.
fn history(server: &Restored, timeline: u32) -> Vec<String> {
    let path = server.data().join(format!("pg_wal/{timeline:08X}.history"));
    let text = fs::read_to_string(path).expect("a history file");
    let lines = text.lines().filter(|line| !line.is_empty());
    let words = lines.map(|line| {
        line.split_whitespace()
            .take(2)
            .collect::<Vec<_>>()
            .join(" ")
    });
    words.collect()
}

#[test]
fn a_restore_to_before_a_failover_is_followed_and_restored_like_any_other() {
    for (_, bin) in versions() {
        let mut scene = Scene::start(&bin);
        let primary = scene.primary();
        let one = scene.write(&primary);
        let two = scene.write(&primary);
        // Lost by the failover: the segment of the fork has other WAL on timeline 1 than on
        // timeline 2.
        let three = scene.write(&primary);
        let four = scene.write(&primary);
        scene.archived.finish();
        let fork = format!("--target-xid={}", two.xid);
        let second = scene.promoted(2, &[&fork, "--target-action=promote"]);
        let five = scene.write(&second.conninfo());
        scene.archived.follow(&second.conninfo());
        let six = scene.write(&second.conninfo());
        scene.archived.finish_at(&second.conninfo());
        drop(second);

        // `locate` names the timeline that holds the moment, and its flags restore to it.
        let before_two = scene.located(&two);
        assert!(
            before_two.contains("--target-timeline 00000001 "),
            "{before_two}"
        );
        let before_six = scene.located(&six);
        assert!(
            before_six.contains("--target-timeline 00000002-"),
            "{before_six}"
        );
        let flags: Vec<&str> = before_two.split(' ').collect();
        let plan = scene.plan(&flags);
        assert_eq!(plan["path"][0]["branch"], "00000001", "{plan}");

        // To a moment before the fork, on the way to the newest timeline.
        let early = format!("--target-time={}", one.time);
        let restored = scene.promoted(3, &[&early, "--target-action=promote"]);
        let server = restored.conninfo();
        assert_eq!(query(&server, NUMBERS), "1");
        let lines = history(&restored, 3);
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(lines[0].starts_with("1 "), "{lines:?}");
        scene.archived.follow(&server);
        let seven = scene.write(&server);
        let eight = scene.write(&server);
        scene.check(&server);
        scene.archived.finish_at(&server);
        scene.verify(&server);
        drop(restored);

        // At that time timeline 2 was live; the default path lacks its commits.
        let then = format!("--target-time={}", six.time);
        let plan = scene.plan(&[&then]);
        let left_out = plan["left_out"].as_array().expect("timelines");
        assert_eq!(left_out.len(), 1, "{plan}");
        assert_eq!(left_out[0]["commits"], 2, "{plan}");
        assert_eq!(left_out[0]["last"]["xid"].to_string(), six.xid, "{plan}");
        let option = format!(
            "--target-timeline={}",
            left_out[0]["target_timeline"].as_str().expect("a value")
        );
        assert_eq!(option, "--target-timeline=2");
        let plan = scene.plan(&[&then, &option]);
        assert_eq!(plan["last_kept"]["xid"].to_string(), six.xid, "{plan}");
        assert!(plan["left_out"].is_null(), "{plan}");
        let plan = scene.plan(&[&format!("--target-time={}", seven.time)]);
        assert!(plan["left_out"].is_null(), "{plan}");
        // The transaction number was used again after the fork.
        assert!([&two, &three, &four].iter().any(|one| one.xid == seven.xid));
        let again = format!("--target-xid={}", seven.xid);
        let plan = scene.plan(&[&again]);
        assert_eq!(plan["last_kept"]["xid"].to_string(), seven.xid, "{plan}");
        let others = plan["left_out"].as_array().expect("timelines");
        assert_eq!(others[0]["target_timeline"], "1", "{plan}");
        for other in others {
            let timeline = other["target_timeline"].as_str().expect("a value");
            let plan = scene.plan(&[&again, &format!("--target-timeline={timeline}")]);
            assert_eq!(plan["last_kept"], other["last"], "{plan}");
            assert_eq!(plan["last_kept"]["xid"].to_string(), seven.xid, "{plan}");
        }
        let mut plan = scene.archived.pitr_restore();
        let plan = succeed(plan.args(["--dry-run", &again])).expect("a plan");
        let named = "left out      the transaction also exists on timeline 00000001";
        assert!(plan.contains(named), "{plan}");

        scene.assert_numbers(&[], "1 7 8");
        scene.assert_numbers(&[&format!("--target-time={}", seven.time)], "1 7");
        scene.assert_numbers(&[&format!("--target-xid={}", eight.xid)], "1 7 8");
        scene.assert_numbers(&[&format!("--target-lsn={}", seven.lsn)], "1 7");
        scene.assert_numbers(&["--target-timeline=2"], "1 2 5 6");
        let late = format!("--target-lsn={}", five.lsn);
        scene.assert_numbers(&["--target-timeline=2", &late], "1 2 5");
    }
}

#[test]
fn a_history_with_an_earlier_switch_on_a_later_line_is_read_as_postgresql_reads_it() {
    for (_, bin) in versions() {
        let mut scene = Scene::start(&bin);
        let primary = scene.primary();
        let one = scene.write(&primary);
        scene.write(&primary);
        // The fork is two segments after the moment before it.
        scene.archived.sql("SELECT pg_switch_wal()");
        scene.write(&primary);
        scene.archived.sql("SELECT pg_switch_wal()");
        scene.archived.finish();
        let second = scene.promoted(2, &["--target-action=promote"]);
        scene.archived.follow(&second.conninfo());
        scene.write(&second.conninfo());
        // The newest backup is on the timeline that is given up.
        let mut backup = scene.archived.place.program("wal-archiver").expect("built");
        succeed(backup.args(["--conninfo", &second.conninfo(), "backup"])).expect("a backup");
        scene.archived.finish_at(&second.conninfo());
        drop(second);

        // As stock PostgreSQL does it with recovery_target_timeline = 'latest', and as earlier
        // versions of this program did.
        let early = format!("--target-lsn={}", one.lsn);
        let longer = ["--set", "recovery_target_timeline=2", &early];
        let restored = scene.promoted_elsewhere(&longer);
        let server = restored.conninfo();
        assert_eq!(query(&server, NUMBERS), "1");
        let lines = history(&restored, 3);
        assert_eq!(lines.len(), 2, "{lines:?}");
        scene.archived.follow(&server);
        let five = scene.write(&server);
        let six = scene.write(&server);
        scene.check(&server);
        scene.archived.finish_at(&server);
        scene.verify(&server);

        let plan = scene.plan(&[]);
        let path = plan["path"].as_array().expect("a path");
        assert_eq!(path.len(), 2, "{plan}");
        scene.assert_numbers(&[], "1 5 6");
        scene.assert_numbers(&[&format!("--target-time={}", five.time)], "1 5");
        scene.assert_numbers(&[&format!("--target-xid={}", five.xid)], "1 5");
        scene.assert_numbers(&[&format!("--target-xid={}", six.xid)], "1 5 6");
        scene.assert_numbers(&["--target-timeline=2"], "1 2 3 4");
        // The second recovery, again to an earlier moment, this time as we do it.
        let again = scene.promoted(4, &[&early, "--target-action=promote"]);
        let lines = history(&again, 4);
        assert_eq!(lines.len(), 1, "{lines:?}");
    }
}

#[test]
fn a_prepared_transaction_survives_a_stop_in_the_segment_of_a_fork() {
    const IN_DOUBT: &str = "SELECT string_agg(gid, ' ') FROM pg_prepared_xacts";
    for (_, bin) in versions() {
        let mut scene = Scene::start(&bin);
        let primary = scene.primary();
        scene.write(&primary);
        scene
            .archived
            .sql("BEGIN; INSERT INTO rows VALUES (100); PREPARE TRANSACTION 'doubt'");
        let two = scene.write(&primary);
        scene.write(&primary);
        scene.archived.finish();
        let second = scene.promoted(2, &["--target-action=promote"]);
        assert_eq!(query(&second.conninfo(), IN_DOUBT), "doubt");
        let fork = history(&second, 2)[0].clone();
        let fork = fork.strip_prefix("1 ").expect("timeline 1").to_owned();
        scene.archived.follow(&second.conninfo());
        let four = scene.write(&second.conninfo());
        scene.write(&second.conninfo());
        scene.archived.finish_at(&second.conninfo());
        drop(second);

        let resolve = |server: &Restored, expected: &str| {
            assert_eq!(query(&server.conninfo(), IN_DOUBT), "doubt");
            query(&server.conninfo(), "COMMIT PREPARED 'doubt'");
            assert_eq!(query(&server.conninfo(), NUMBERS), expected);
        };
        let stop = format!("--target-lsn={}", two.lsn);
        let before_fork = [stop.as_str(), "--target-action=promote"];
        resolve(&scene.promoted(3, &before_fork), "1 2 100");
        let after = format!("--target-lsn={}", four.lsn);
        let later = scene.promoted(3, &[&after, "--target-action=promote"]);
        resolve(&later, "1 2 3 4 100");

        // Before the first record of timeline 2 is after the last one of timeline 1.
        let fork = format!("--target-lsn={fork}");
        let arguments = [&fork, "--target-exclusive", "--target-action=promote"];
        resolve(&scene.promoted(3, &arguments), "1 2 3 100");

        // The old timeline's own part of the segment was never archived: the new timeline's copy of
        // it is enough.
        let segment = query(
            &scene.primary(),
            &format!("SELECT pg_walfile_name('{}')", two.lsn),
        );
        assert!(
            remove(scene.archived.place.path(), &segment) > 0,
            "{segment}"
        );
        resolve(&scene.promoted(3, &before_fork), "1 2 100");
    }
}

/// Removes the objects of a segment: its sealed object or its tails. The number of files removed.
fn remove(root: &Path, segment: &str) -> usize {
    let mut removed = 0;
    for entry in fs::read_dir(root).expect("a directory").flatten() {
        let path = entry.path();
        let is_named = path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with(segment));
        if is_named && path.is_dir() {
            removed += fs::read_dir(&path).expect("a directory").count();
            fs::remove_dir_all(&path).expect("removed");
        } else if is_named {
            fs::remove_file(&path).expect("removed");
            removed += 1;
        } else if path.is_dir() {
            removed += remove(&path, segment);
        }
    }
    removed
}

#[test]
fn a_timeline_number_that_the_repository_has_is_not_taken_again() {
    for (_, bin) in versions() {
        let mut scene = Scene::start(&bin);
        let primary = scene.primary();
        let one = scene.write(&primary);
        let two = scene.write(&primary);
        scene.archived.finish();
        let to = |entry: &Entry| format!("--target-time={}", entry.time);
        let promote = |scene: &Scene, timeline: u32, entry: &Entry| {
            let time = to(entry);
            let arguments = ["--target-timeline=1", &time, "--target-action=promote"];
            scene.promoted(timeline, &arguments)
        };
        let second = promote(&scene, 2, &two);
        scene.archived.follow(&second.conninfo());
        scene.write(&second.conninfo());
        scene.archived.finish_at(&second.conninfo());
        // An earlier moment, and the end of timeline 1.
        let third = promote(&scene, 3, &one);
        scene.archived.follow(&third.conninfo());
        scene.write(&third.conninfo());
        scene.check(&third.conninfo());
        scene.archived.finish_at(&third.conninfo());
        scene.verify(&third.conninfo());
        scene.assert_numbers(&[], "1 4");
        scene.assert_numbers(&["--target-timeline=2"], "1 2 3");
        let fourth = ["--target-timeline=1", "--target-action=promote"];
        drop(scene.promoted(4, &fourth));
    }
}
