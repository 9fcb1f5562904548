//! A bucket is emptied, or replaced by another one of the same name, while the archiver runs.
//! Nothing is written to it, even after a restart, and archiving continues when the archive is
//! back. Also: a store sends nonsense, which the archiver reports, and it continues when the store
//! works again.

use std::{
    collections::BTreeMap,
    fs,
    thread::sleep,
    time::{Duration, Instant},
};

use serde_json::Value;
use testbed::{
    bucket_proxy::{BucketProxy, Verdict},
    cluster::Cluster,
    object_store::{BUCKET, ObjectStoreServer},
    place::{Daemon, Place},
    ports::free_address,
    programs::succeed,
    tools::servers_or_skip,
};

const PATIENCE: Duration = Duration::from_secs(90);
const KEY: &str = "1111111111111111111111111111111111111111111111111111111111111111";
/// An answer of a captive portal, or of a proxy that lost its store.
const PAGE: &str =
    "<!DOCTYPE html><html><head><title>Welcome</title></head><body>Log in</body></html>";

fn report(place: &Place) -> Value {
    let mut status = place.program("wal-archiver").expect("it is built");
    let output = status.args(["status", "--json"]).output();
    let said = output.expect("it runs").stdout;
    let reports: Value = serde_json::from_slice(&said).unwrap_or(Value::Null);
    reports[0].clone()
}

fn wait(place: &Place, what: &str, done: impl Fn(&Value) -> bool) {
    let began = Instant::now();
    loop {
        let report = report(place);
        if done(&report) {
            return;
        }
        assert!(began.elapsed() < PATIENCE, "{what}: {report:#}");
        sleep(Duration::from_millis(100));
    }
}

fn is_well(report: &Value) -> bool {
    report["state"] != "broken"
        && report["repository_error"].is_null()
        && report["source"]["stream_connected"] == true
        && report["durable"]["remote"]["lag_bytes"] == 0
}

fn is_red(report: &Value) -> bool {
    let reason = report["reason"].as_str().unwrap_or_default();
    report["state"] == "broken"
        && reason.contains("is not the repository that this host archives to")
        && reason.contains("epoch begin --system-identifier")
}

fn write_wal(cluster: &Cluster) {
    let mut client = cluster.connect().expect("a connection");
    client
        .batch_execute(
            "CREATE TABLE IF NOT EXISTS t (n int, filler text);
             INSERT INTO t SELECT n, repeat(md5(n::text), 30) FROM generate_series(1, 2500) n",
        )
        .expect("WAL");
}

/// Returns true if no complete segment waits in the spool.
fn is_drained(place: &Place) -> bool {
    let mut directories = vec![place.path().join("spool/main/wal")];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).expect("a directory").flatten() {
            let path = entry.path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_none() && entry.file_name().len() == 24 {
                return false;
            }
        }
    }
    true
}

fn stop(place: &Place, daemon: Daemon) {
    daemon.stop().expect("everything is in the bucket");
    let mut verify = place.program("wal-archiver").expect("it is built");
    let said = succeed(verify.args(["verify", "--deep"])).expect("everything is sound");
    assert!(said.contains("no gap, no damage"), "{said}");
}

#[test]
fn an_emptied_bucket_gets_no_new_archive_and_the_old_one_misses_nothing() {
    let Some((_, bin)) = servers_or_skip().pop() else {
        return;
    };
    let Some(store) = ObjectStoreServer::open_to_all_or_skip() else {
        return;
    };
    let address = free_address().expect("an address");
    // Encrypted, so that the same holds with keys in the bucket.
    let settings = format!(
        "acknowledge = \"remote\"\nhttp = \"{address}\"\nencryption_key_command = \"printf {KEY}\""
    );
    let place = Place::in_bucket(store, &settings).expect("a place");
    let cluster = Cluster::start(&bin, 1, "autovacuum = off").expect("a server");
    let daemon = place.daemon(&cluster, &address).expect("a daemon");
    let store = place.store().expect("a store");
    write_wal(&cluster);
    wait(&place, "archived", is_well);

    // An administrator moves all objects elsewhere.
    let mut moved = BTreeMap::new();
    for key in store.keys().expect("a listing") {
        moved.insert(key.clone(), store.object(&key).expect("an object"));
    }
    for key in moved.keys() {
        let request = format!("DELETE /{BUCKET}/{key}");
        store.unsigned(&request, "").expect("a removal");
    }
    write_wal(&cluster);
    wait(&place, "the light is red", is_red);
    let before = store.keys().expect("a listing");
    write_wal(&cluster);
    sleep(Duration::from_secs(2));
    assert_eq!(
        store.keys().expect("a listing"),
        before,
        "it was written to"
    );

    // A restart does not begin a new archive there.
    daemon.kill().expect("it is gone");
    let until = "the repository does not answer";
    let conninfo = cluster.conninfo();
    let daemon = place
        .daemon_at(&conninfo, &address, until)
        .expect("a daemon");
    wait(&place, "the light is red", is_red);
    let there = store.keys().expect("a listing");
    assert!(!there.iter().any(|key| key.contains("/epoch")), "{there:?}");
    let backup = place.back_up(&conninfo, &[]).expect_err("no repository");
    assert!(backup.to_string().contains("epoch begin"), "{backup}");
    let mut verify = place.program("wal-archiver").expect("it is built");
    let verify = verify.arg("verify").output().expect("it runs");
    assert_eq!(verify.status.code(), Some(4), "{verify:?}");

    for (key, body) in &moved {
        store.overwrite(key, body).expect("it is brought back");
    }
    wait(&place, "all is archived", is_well);
    let old = store.keys().expect("a listing");
    write_wal(&cluster);
    wait(&place, "it goes on", is_well);

    // Nothing but the bucket has the newest segment.
    let mut client = cluster.connect().expect("a connection");
    let switch = "SELECT pg_switch_wal()";
    client.batch_execute(switch).expect("a switch");
    drop(client);
    let began = Instant::now();
    while !is_drained(&place) {
        assert!(began.elapsed() < PATIENCE, "a segment stays in the spool");
        sleep(Duration::from_millis(100));
    }
    wait(&place, "all of it is archived", is_well);

    // An older replica of the bucket has the identity, but lacks the objects that were stored
    // later.
    let mut newer = BTreeMap::new();
    for key in store.keys().expect("a listing") {
        if !old.contains(&key) {
            newer.insert(key.clone(), store.object(&key).expect("an object"));
        }
    }
    let segments = |keys: &[String]| keys.iter().filter(|key| key.contains("/wal/")).count();
    for key in newer.keys() {
        let request = format!("DELETE /{BUCKET}/{key}");
        store.unsigned(&request, "").expect("a removal");
    }
    let before = segments(&store.keys().expect("a listing"));
    write_wal(&cluster);
    wait(&place, "the older state is red", |report| {
        let reason = report["reason"].as_str().unwrap_or_default();
        report["state"] == "broken"
            && reason.contains("holds an older state")
            && reason.contains("--accept-loss")
            && report["durable"]["remote"]["lag_bytes"].as_u64() > Some(0)
    });
    // The check may have stored one segment before it noticed the older state. That segment does
    // not count as stored.
    let now = segments(&store.keys().expect("a listing"));
    assert!(now <= before + 2, "{before} segments became {now}");
    let backup = place.back_up(&conninfo, &[]).expect_err("an older state");
    assert!(backup.to_string().contains("older state"), "{backup}");
    // An archiver without its catalog stores nothing there either.
    daemon.kill().expect("it is gone");
    fs::remove_dir_all(place.path().join("spool/main/catalog")).expect("the catalog goes");
    let before = store.keys().expect("a listing");
    let daemon = place
        .daemon_at(&conninfo, &address, "holds an older state")
        .expect("a daemon");
    write_wal(&cluster);
    wait(&place, "the older state is red again", |report| {
        let reason = report["reason"].as_str().unwrap_or_default();
        report["state"] == "broken" && reason.contains("holds an older state")
    });
    assert_eq!(
        store.keys().expect("a listing"),
        before,
        "it was written to"
    );
    for (key, body) in &newer {
        store.overwrite(key, body).expect("it is brought back");
    }
    wait(&place, "all is archived again", is_well);
    stop(&place, daemon);
}

#[test]
fn a_store_that_answers_with_a_page_ends_no_archiver() {
    let Some((_, bin)) = servers_or_skip().pop() else {
        return;
    };
    let Some(store) = ObjectStoreServer::start_or_skip() else {
        return;
    };
    let proxy = BucketProxy::start(store.address()).expect("a proxy");
    let through = ObjectStoreServer::configuration_at(&proxy.endpoint());
    let address = free_address().expect("an address");
    let settings = format!("{through}http = \"{address}\"");
    let place = Place::in_bucket_behind(store, &settings).expect("a place");
    let cluster = Cluster::start(&bin, 1, "autovacuum = off").expect("a server");
    let conninfo = cluster.conninfo();
    let nonsense = || proxy.decide(|_| Verdict::Say(PAGE.to_owned()));

    // During the first start, when nothing is known yet.
    nonsense();
    let daemon = place
        .daemon_at(&conninfo, &address, " WARN ")
        .expect("a daemon");
    sleep(Duration::from_secs(2));
    wait(&place, "it says so", |report| {
        report["state"] != "ok" && report["source"]["stream_connected"] == false
    });
    proxy.heal();
    wait(&place, "it begins automatically", is_well);

    // While the archiver runs, under load.
    for _ in 0..2 {
        nonsense();
        write_wal(&cluster);
        wait(&place, "it says so", |report| {
            report["state"] == "broken" && report["repository_error"].is_string()
        });
        sleep(Duration::from_secs(3));
        proxy.heal();
        wait(&place, "it continues automatically", is_well);
    }

    // During a start with WAL in the spool.
    nonsense();
    write_wal(&cluster);
    daemon.kill().expect("it is gone");
    let until = "the repository does not answer";
    let daemon = place
        .daemon_at(&conninfo, &address, until)
        .expect("a daemon");
    write_wal(&cluster);
    sleep(Duration::from_secs(2));
    proxy.heal();
    wait(&place, "it continues automatically", is_well);
    let log = fs::read_to_string(place.path().join("archiver.log")).expect("a log");
    assert!(!log.contains("archiving of a cluster has ended"), "{log}");
    stop(&place, daemon);
}
