//! A versioned bucket whose policy forbids deletes, and an intruder with all permissions.

use std::{fs, thread::sleep, time::Duration};

use testbed::{
    cluster::Cluster,
    object_store::{BUCKET, ObjectStoreServer},
    place::Place,
    ports::free_address,
    programs::{directory, succeed},
    restored::Restored,
    tools::servers_or_skip,
};

const VERSIONS: &str = r#"<VersioningConfiguration xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Status>Enabled</Status></VersioningConfiguration>"#;

fn unsigned(place: &Place, request: &str, body: &str) -> String {
    let store = place.store().expect("a store");
    let answer = store.unsigned(request, body).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 20"), "{request}: {answer}");
    answer
}

/// Returns every key of the bucket.
fn keys(place: &Place) -> Vec<String> {
    let listed = unsigned(place, &format!("GET /{BUCKET}?list-type=2"), "");
    let parts = listed.split("<Key>").skip(1);
    parts
        .filter_map(|part| part.split_once("</Key>"))
        .map(|(key, _)| key.to_owned())
        .collect()
}

fn rows(client: &mut postgres::Client) -> i64 {
    let row = client.query_one("SELECT count(*) FROM t", &[]);
    row.expect("a count").get(0)
}

const LOCKS: &str = r#"<ObjectLockConfiguration xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><ObjectLockEnabled>Enabled</ObjectLockEnabled></ObjectLockConfiguration>"#;

/// Locks every object that the backup needs, and never shortens a lock. The tests of the store
/// check that locks prevent deletion.
fn locks_are_extended(place: &Place) {
    unsigned(place, &format!("PUT /{BUCKET}?object-lock"), LOCKS);
    let extend = |arguments: &[&str]| {
        let mut lock = place.program("wal-archiver").expect("it is built");
        let said = succeed(lock.args(["lock", "extend"]).args(arguments));
        let said = said.expect("locks");
        eprintln!("{said}");
        let numbers: Vec<usize> = said
            .split([' ', ';'])
            .filter_map(|word| word.parse().ok())
            .collect();
        // The counts of objects whose lock was extended, and of those that were already locked for
        // longer.
        (numbers[0], numbers[1])
    };
    let (planned, _) = extend(&["--days", "30", "--dry-run"]);
    assert!(planned > 6, "{planned}");
    assert_eq!(extend(&["--days", "30"]), (planned, 0));
    assert_eq!(extend(&["--days", "29"]), (0, planned));
    damage_ends_no_lock(place, planned);
}

/// A backup that cannot be read is named, and everything else is locked all the same.
fn damage_ends_no_lock(place: &Place, planned: usize) {
    let all = keys(place);
    let backup = all.iter().find(|key| key.ends_with("/backup.json"));
    let (backups, _) = backup.expect("a backup").rsplit_once("/2").expect("its id");
    let damaged = format!("{backups}/20200101T000000Z-0bad/backup.json");
    unsigned(place, &format!("PUT /{BUCKET}/{damaged}"), "{");
    let mut lock = place.program("wal-archiver").expect("it is built");
    lock.args(["lock", "extend", "--days", "30"]);
    let output = lock.output().expect("it runs");
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(4), "{error}");
    assert!(
        error.contains("20200101T000000Z-0bad/backup.json"),
        "{error}"
    );
    let printed = String::from_utf8_lossy(&output.stdout);
    let numbers = printed.split([' ', ';']);
    let numbers: Vec<usize> = numbers.filter_map(|word| word.parse().ok()).collect();
    // Objects that are locked now, and those that were locked already.
    assert!(numbers[0] + numbers[1] > planned, "{planned}: {printed}");
    // The bucket keeps versions, so a locked object only gets a delete marker.
    unsigned(place, &format!("DELETE /{BUCKET}/{damaged}"), "");
}

/// With `lock_days` the daemon extends the locks soon after its start. It skips objects whose lock
/// lasts long enough.
fn the_daemon_extends_locks(place: &Place, cluster: &Cluster) {
    let file = place.path().join("tidemark.toml");
    let text = fs::read_to_string(&file).expect("a configuration");
    cluster.start_again().expect("it starts");
    // 30 days are more than half of 50, and less than half of 90.
    for (days, expected) in [(50, 30), (90, 90)] {
        fs::write(&file, format!("{text}lock_days = {days}\n")).expect("a configuration");
        let mut daemon = place.daemon(cluster, "127.0.0.1:0").expect("a daemon");
        let looked = daemon.wait_for(|log| log.contains("locks were looked at"));
        looked.expect("a look");
        daemon.stop().expect("it stops");
        let all = keys(place);
        let backup = all.iter().find(|key| key.ends_with("/backup.json"));
        let backup = backup.expect("a backup");
        let kept = unsigned(place, &format!("GET /{BUCKET}/{backup}?retention"), "");
        let until = kept.split("<RetainUntilDate>").nth(1).expect(&kept);
        let until = until.split('<').next().expect("a time");
        let until: jiff::Timestamp = until.parse().expect(until);
        let left = until.duration_since(jiff::Timestamp::now()).as_hours();
        assert!(
            (expected * 24 - 1..=expected * 24).contains(&left),
            "{days}: {left} h"
        );
    }
    cluster.stop().expect("it stops");
    fs::write(&file, text).expect("a configuration");
}

#[test]
fn what_an_intruder_deletes_and_overwrites_is_restored_as_it_was() {
    let Some((_, bin)) = servers_or_skip().pop() else {
        return;
    };
    let Some(store) = ObjectStoreServer::open_to_all_or_skip() else {
        return;
    };
    let cluster = Cluster::start(&bin, 1, "").expect("a server");
    let place = Place::in_bucket(store, "").expect("a place");
    unsigned(&place, &format!("PUT /{BUCKET}?versioning"), VERSIONS);
    let daemon = place.daemon(&cluster, "127.0.0.1:0").expect("a daemon");
    let backup = place.back_up(&cluster.conninfo(), &[]);
    backup.expect("a backup");
    let mut client = cluster.connect().expect("a connection");
    let fill =
        "CREATE TABLE t AS SELECT n, repeat(md5(n::text), 4) FROM generate_series(1, 20000) n";
    client.batch_execute(fill).expect("a table");
    drop(client);
    cluster.stop().expect("it stops");
    daemon.stop().expect("everything is in the bucket");
    locks_are_extended(&place);
    the_daemon_extends_locks(&place, &cluster);
    fs::remove_dir_all(place.path().join("spool")).expect("a spool");
    // Stores report times in whole seconds.
    sleep(Duration::from_millis(1500));
    let good = format!("{:.6}", jiff::Timestamp::now());
    sleep(Duration::from_millis(1500));

    let all = keys(&place);
    assert!(all.len() > 8, "{all:?}");
    for (at, key) in all.iter().enumerate() {
        if at % 2 == 0 {
            unsigned(&place, &format!("DELETE /{BUCKET}/{key}"), "");
        } else {
            unsigned(&place, &format!("PUT /{BUCKET}/{key}"), "ransom");
        }
    }
    let mut list = place.program("pitr-restore").expect("it is built");
    let lost = list.arg("list").output().expect("it runs");
    assert!(!lost.status.success(), "nothing is left to restore");

    let mut list = place.program("pitr-restore").expect("it is built");
    let listed = succeed(list.args(["list", "--at", &good])).expect("the past is there");
    assert!(listed.contains("backup"), "{listed}");
    let restored = Restored::start(&place, &bin, &["--at", &good]).expect("a restore");
    assert_eq!(rows(&mut restored.connect().expect("a connection")), 20_000);
    let copy = directory().expect("a directory");
    let mut restore = place.program("pitr-restore").expect("it is built");
    restore.args(["--at", &good, "--target-dir"]);
    succeed(restore.arg(copy.path().join("data"))).expect("a restore");
    let settings = copy.path().join("data/postgresql.auto.conf");
    let settings = fs::read_to_string(settings).expect("settings");
    assert!(
        settings.contains(" --at "),
        "PostgreSQL's own fetches see the past too"
    );

    // A time before the first object, and a folder.
    for (arguments, words) in [
        (
            ["list", "--at", "2020-01-01 00:00:00Z"].as_slice(),
            "holds nothing",
        ),
        (
            &["list", "--at", "now", "--repository", "file:///tmp"],
            "is a folder",
        ),
        (&["list", "--at", "2999-01-01 00:00:00Z"], "in the future"),
    ] {
        let mut list = place.program("pitr-restore").expect("it is built");
        let output = list.args(arguments).output().expect("it runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(said.contains(words), "{arguments:?}: {said}");
    }
}

#[test]
fn where_deleting_is_forbidden_the_archiver_goes_on_and_counts() {
    let Some((_, bin)) = servers_or_skip().pop() else {
        return;
    };
    let Some(store) = ObjectStoreServer::open_to_all_or_skip() else {
        return;
    };
    let address = free_address().expect("an address");
    let cluster = Cluster::start(&bin, 1, "").expect("a server");
    let settings = format!("http = \"{address}\"");
    let place = Place::in_bucket(store, &settings).expect("a place");
    unsigned(&place, &format!("PUT /{BUCKET}?versioning"), VERSIONS);
    let policy = format!(
        r#"{{"Version":"2012-10-17","Statement":[{{"Effect":"Deny","Principal":"*","Action":["s3:DeleteObject"],
        "Resource":"arn:aws:s3:::{BUCKET}/*"}}]}}"#
    );
    unsigned(&place, &format!("PUT /{BUCKET}?policy"), &policy);
    let daemon = place.daemon(&cluster, &address).expect("a daemon");
    let backup = place.back_up(&cluster.conninfo(), &[]);
    backup.expect("a backup");
    let mut client = cluster.connect().expect("a connection");
    client
        .batch_execute("CREATE TABLE t (n int, filler text)")
        .expect("a table");
    for _ in 0..5 {
        let fill =
            "INSERT INTO t SELECT n, repeat(md5(n::text), 20) FROM generate_series(1, 2000) n";
        client.batch_execute(fill).expect("rows");
        sleep(Duration::from_millis(1200));
    }
    let mut locked = 0;
    let mut report = serde_json::Value::Null;
    for _ in 0..40 {
        let mut status = place.program("wal-archiver").expect("it is built");
        let said = succeed(status.args(["status", "--json"])).expect("a status");
        report = serde_json::from_str(&said).expect("JSON");
        locked = report[0]["counters"]["objects_locked"]
            .as_u64()
            .unwrap_or_default();
        if locked > 0 {
            break;
        }
        sleep(Duration::from_millis(250));
    }
    assert!(locked > 0, "{report}");
    assert!(
        report[0]["repository_error"].is_null(),
        "a lock is no failure: {report}"
    );
    assert_eq!(report[0]["state"], "ok", "{report}");
    drop(client);
    cluster.stop().expect("it stops");
    daemon.stop().expect("a lock is no failure");
    let log = fs::read_to_string(place.path().join("archiver.log")).expect("a log");
    let told = log.matches("deleting is forbidden there").count();
    assert_eq!(told, 1, "said once: {log}");
    let tails = keys(&place)
        .iter()
        .filter(|key| key.contains("/tail/"))
        .count();
    assert!(tails as u64 >= locked, "{tails} tails, {locked} locked");
    let restored = Restored::start::<&str>(&place, &bin, &[]).expect("a restore");
    assert_eq!(rows(&mut restored.connect().expect("a connection")), 10_000);
    let mut verify = place.program("wal-archiver").expect("it is built");
    succeed(verify.args(["verify", "--deep"])).expect("everything is sound");
}
