//! The number of requests to a bucket, as the archiver counts them: none while the server is idle,
//! and never a listing for WAL.

use std::{thread::sleep, time::Duration};

use serde_json::Value;
use testbed::{
    cluster::Cluster, ledger::Ledger, object_store::ObjectStoreServer, place::Place,
    ports::free_address, programs::succeed, tools::servers_or_skip,
};

/// The time in which no request may occur: many times every interval of the archiver except the
/// hourly one.
const QUIET: Duration = Duration::from_secs(12);

fn requests(place: &Place) -> Value {
    let mut status = place.program("wal-archiver").expect("it is built");
    let said = succeed(status.args(["status", "--json"])).expect("a status");
    let reports: Value = serde_json::from_str(&said).expect("JSON");
    let total = reports[0]["requests"]["total"].clone();
    assert!(total.is_object(), "the daemon answers: {reports}");
    total
}

fn of(counts: &Value, kind: &str) -> u64 {
    counts[kind].as_u64().expect("a count")
}

/// Prints the requests of ten minutes, with a steady load and without.
fn measure(place: &Place, cluster: &Cluster) {
    const PERIOD: Duration = Duration::from_secs(600);
    let ledger = Ledger::start(&cluster.conninfo(), 4).expect("a ledger");
    let before = requests(place);
    sleep(PERIOD);
    eprintln!("ten minutes of load: {before} to {}", requests(place));
    let mut client = cluster.connect().expect("a connection");
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
               WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
    client.batch_execute(end).expect("the clients end");
    drop(client);
    ledger.finish().expect("it ends");
    sleep(QUIET * 4);
    let before = requests(place);
    sleep(PERIOD);
    eprintln!("ten idle minutes: {before} to {}", requests(place));
}

#[test]
fn an_idle_server_costs_nothing_and_wal_needs_no_listing() {
    let Some((_, bin)) = servers_or_skip().pop() else {
        return;
    };
    let Some(store) = ObjectStoreServer::start_or_skip() else {
        return;
    };
    let long = testbed::is_long();
    let address = free_address().expect("an address");
    let cluster = Cluster::start(&bin, if long { 16 } else { 1 }, "").expect("a server");
    let settings = format!("http = \"{address}\"");
    let place = Place::in_bucket(store, &settings).expect("a place");
    let daemon = place.daemon(&cluster, &address).expect("a daemon");
    let backup = place.back_up(&cluster.conninfo(), &[]);
    backup.expect("a backup");

    // The WAL of a backup is uploaded for a while after it, and PostgreSQL occasionally logs the
    // running transactions.
    let mut quiet = false;
    for _ in 0..6 {
        let before = requests(&place);
        sleep(QUIET);
        let after = requests(&place);
        eprintln!("idle for {} s: {before} to {after}", QUIET.as_secs());
        if before == after {
            quiet = true;
            break;
        }
    }
    assert!(quiet, "an idle archiver asks the bucket");

    let before = requests(&place);
    let mut client = cluster.connect().expect("a connection");
    client
        .batch_execute("CREATE TABLE t (n int, filler text)")
        .expect("a table");
    for _ in 0..6 {
        let fill =
            "INSERT INTO t SELECT n, repeat(md5(n::text), 20) FROM generate_series(1, 2000) n";
        client.batch_execute(fill).expect("rows");
        sleep(Duration::from_secs(1));
    }
    let mut after = requests(&place);
    for _ in 0..40 {
        if of(&after, "put") >= of(&before, "put") + 10 {
            break;
        }
        sleep(Duration::from_millis(250));
        after = requests(&place);
    }
    eprintln!("busy: {before} to {after}");
    assert!(of(&after, "put") >= of(&before, "put") + 5, "WAL went out");
    assert_eq!(
        of(&after, "list"),
        of(&before, "list"),
        "a listing on the way of WAL"
    );
    // Two HEAD for each object that was stored, and those of at most one presence check (11).
    let stored = of(&after, "put") - of(&before, "put");
    let asked = of(&after, "head") - of(&before, "head");
    assert!(asked <= 2 * stored + 11, "{asked} for {stored} objects");

    if long {
        measure(&place, &cluster);
    }
    let mut status = place.program("wal-archiver").expect("it is built");
    let said = succeed(status.arg("status")).expect("a status");
    let line = said.lines().find(|line| line.contains("requests"));
    let line = line.expect("a line of requests");
    assert!(
        line.contains("since the start: ") && line.contains(" put, "),
        "{line}"
    );
    daemon.stop().expect("it stops");
}
