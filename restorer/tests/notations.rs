//! Targets as people write them: times in the notations of `date`, psql and logs; `now` and a span
//! before it on an idle server; a restore point's name that exists twice.

use std::{
    path::Path,
    process::Command,
    thread::sleep,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::Value;
use testbed::{cluster::PORT, programs::succeed, restored::Restored};
use wal_format::{Lsn, PgTimestamp};

use crate::support::{Archived, query, said, servers};

const WORDS: &str = "SELECT string_agg(word, ' ' ORDER BY word) FROM words";

fn plan(archived: &Archived, arguments: &[&str]) -> Value {
    let mut restore = archived.pitr_restore();
    restore.args(["--dry-run", "--json"]).args(arguments);
    let plan = succeed(&mut restore).unwrap_or_else(|error| panic!("{arguments:?}: {error}"));
    serde_json::from_str(&plan).expect("JSON")
}

fn refused(archived: &Archived, arguments: &[&str]) -> (Option<i32>, String) {
    let mut restore = archived.pitr_restore();
    let output = restore.arg("--dry-run").args(arguments).output();
    let output = output.expect("it runs");
    (output.status.code(), said(&output).1)
}

/// Returns the output of a program for the second `at` in a time zone.
fn printed(program: &str, arguments: &[&str], zone: &str) -> String {
    let mut command = Command::new(program);
    command.args(arguments).env("TZ", zone).env("LC_ALL", "C");
    succeed(&mut command).expect(program).trim().to_owned()
}

/// Waits until a second has begun that is later than now. Returns it.
fn next_second() -> u64 {
    let now = || {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .expect("a time")
    };
    let next = now().as_secs() + 1;
    while now().as_secs() < next {
        sleep(Duration::from_millis(5));
    }
    next
}

#[test]
fn a_time_is_taken_as_people_have_it() {
    let Some((_, bin)) = servers().pop() else {
        return;
    };
    let mut archived = Archived::start(&bin, "");
    archived.sql("CREATE TABLE words (word text)");
    archived.backup();
    archived.sql("INSERT INTO words VALUES ('a')");
    let second = next_second();
    archived.sql("INSERT INTO words VALUES ('b')");
    archived.finish();
    let at = format!("@{second}");
    let date = |zone: &str, format: &[&str]| {
        printed("date", &[&["-d", at.as_str()], format].concat(), zone)
    };
    let psql = |zone: &str| psql(&archived, &bin, zone, second);
    let utc = date("UTC", &["+%F %T"]);
    let wanted = plan(&archived, &[&format!("--target-time={utc}+00")]);
    assert_eq!(wanted["stop"]["stop"], "before", "{wanted:#}");
    let mut notations: Vec<String> = ["GMT", "UTC", "Z", "+00", "+00:00"]
        .iter()
        .map(|offset| format!("{utc} {offset}"))
        .collect();
    for zone in ["UTC", "America/New_York", "Asia/Kolkata"] {
        notations.extend([
            date(zone, &["-R"]),
            date(zone, &["+%F %T %z"]),
            date(zone, &["-Iseconds"]),
            date(zone, &["--rfc-3339=ns"]),
            psql(zone),
        ]);
    }
    notations.push(date("UTC", &[]));
    notations.push(date("Asia/Kolkata", &["+%F %T Asia/Kolkata"]));
    for notation in notations {
        let found = plan(&archived, &["--target-time", &notation]);
        for part in ["stop", "last_kept", "first_dropped"] {
            assert_eq!(found[part], wanted[part], "{notation}");
        }
        let mut locate = archived.pitr_restore();
        locate.args(["locate", "--around", &notation]);
        succeed(&mut locate).unwrap_or_else(|error| panic!("{notation}: {error}"));
    }
    // An abbreviation other than UTC's is the name of several zones.
    let (code, error) = refused(&archived, &["--target-time", &format!("{utc} EST")]);
    assert_eq!(code, Some(2), "{error}");
    assert!(error.contains("abbreviation"), "{error}");
    assert!(error.contains("--time-zone"), "{error}");
}

/// Returns the second as psql prints it by default.
fn psql(archived: &Archived, bin: &Path, zone: &str, second: u64) -> String {
    let mut psql = archived.cluster.program("psql").expect("psql");
    psql.arg("-h").arg(archived.cluster.socket_directory());
    psql.args(["-p", &PORT.to_string(), "-U", "postgres", "-XAt"]);
    psql.env("LD_LIBRARY_PATH", bin.join("../lib"));
    psql.env("PGTZ", zone);
    psql.args(["-c", &format!("SELECT to_timestamp({second})"), "postgres"]);
    succeed(&mut psql).expect("psql").trim().to_owned()
}

#[test]
fn now_on_an_idle_server_is_the_end_that_is_proved() {
    let Some((_, bin)) = servers().pop() else {
        return;
    };
    let mut archived = Archived::start(&bin, "");
    archived.sql("CREATE TABLE words (word text)");
    archived.backup();
    archived.sql("INSERT INTO words VALUES ('a')");
    archived.finish();
    // The last commit is older than the span.
    next_second();
    next_second();
    let latest = plan(&archived, &[]);
    for target in ["now", "500 ms ago"] {
        let argument = format!("--target-time={target}");
        let found = plan(&archived, &[&argument]);
        assert_eq!(found["stop"], latest["stop"], "{target}: {found:#}");
        assert_eq!(found["last_kept"], latest["last_kept"], "{target}");
        let unproved = &found["unproved"];
        let time = |name: &str| {
            let time: Option<jiff::Timestamp> =
                unproved[name].as_str().and_then(|time| time.parse().ok());
            time.unwrap_or_else(|| panic!("no {name}: {found:#}"))
        };
        assert!(time("proved") < time("target"), "{found:#}");
        let mut people = archived.pitr_restore();
        let said = succeed(people.args(["--dry-run", &argument])).expect("a plan");
        assert!(said.contains("\nnot proved    after 20"), "{said}");
    }
    let restored = Restored::start(&archived.place, &bin, &["--target-time=now"]);
    let restored = restored.expect("a restore");
    assert_eq!(query(&restored.conninfo(), WORDS), "a");

    // A commit may be missing before a time that was given as such.
    let now = PgTimestamp::from_jiff(jiff::Timestamp::now()).to_string();
    let (code, error) = refused(&archived, &["--target-time", &now]);
    assert_eq!(code, Some(3), "{error}");
    assert!(error.contains("beyond the archive"), "{error}");
    // A span that ends before the last commit is a time like any other.
    let (code, error) = refused(&archived, &["--target-time=1 day ago"]);
    assert_eq!(code, Some(3), "{error}");
    assert!(error.contains("no base backup ends before"), "{error}");
}

#[test]
fn a_name_that_exists_twice_is_chosen_by_its_lsn() {
    let Some((_, bin)) = servers().pop() else {
        return;
    };
    let mut archived = Archived::start(&bin, "");
    archived.sql("CREATE TABLE words (word text)");
    archived.backup();
    let mut returned = Vec::new();
    for word in ["a", "b"] {
        archived.sql(&format!("INSERT INTO words VALUES ('{word}')"));
        returned.push(archived.sql("SELECT pg_create_restore_point('twice')"));
    }
    // The first one is older than the newest backup, and still it is one of two.
    archived.backup();
    archived.sql("INSERT INTO words VALUES ('c')");
    archived.finish();
    let listing = archived.listing();
    let points = listing["restore_points"].as_array().expect("a list");
    assert_eq!(points.len(), 2, "{listing:#}");
    let (code, error) = refused(&archived, &["--target-name=twice"]);
    assert_eq!(code, Some(3), "{error}");
    for point in points {
        for part in ["lsn", "time"] {
            let part = point[part].as_str().expect("text");
            assert!(error.contains(part), "{part}: {error}");
        }
    }
    assert!(error.contains("--at-lsn"), "{error}");
    for (point, returned) in points.iter().zip(&returned) {
        let listed = point["lsn"].as_str().expect("an LSN");
        for lsn in [listed, returned] {
            let at = format!("--at-lsn={lsn}");
            let found = plan(&archived, &["--target-name=twice", &at]);
            assert_eq!(found["stop"]["lsn"], listed, "{found:#}");
        }
    }
    let at = format!("--at-lsn={}", returned[0]);
    let restored = Restored::start(&archived.place, &bin, &["--target-name=twice", &at]);
    let restored = restored.expect("a restore");
    assert_eq!(query(&restored.conninfo(), WORDS), "a");

    let inside: Lsn = returned[0].parse().expect("an LSN");
    let inside = format!("--at-lsn={}", Lsn(inside.0 - 8));
    let (code, error) = refused(&archived, &["--target-name=twice", &inside]);
    assert_eq!(code, Some(3), "{error}");
    assert!(error.contains("is not in the archive"), "{error}");
    let (code, error) = refused(&archived, &[&inside]);
    assert_eq!(code, Some(2), "{error}");
}
