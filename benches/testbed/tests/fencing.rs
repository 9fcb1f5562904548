//! The right to write into a cluster's archive: another cluster may not; a second archiver of the
//! same cluster may; a restored and promoted copy is archived next to its origin. Nothing is ever
//! overwritten.

use std::{path::Path, thread::sleep, time::Duration};

use testbed::{
    cluster::Cluster,
    ledger::{Ledger, measure},
    object_store::ObjectStoreServer,
    place::{Daemon, Place},
    programs::succeed,
    restored::Restored,
    tools::servers_or_skip,
};
use wal_format::Lsn;

fn scene(settings: &str) -> Option<(std::path::PathBuf, Cluster, Place)> {
    let (_, bin) = servers_or_skip().pop()?;
    let store = ObjectStoreServer::start_or_skip()?;
    let cluster = Cluster::start(&bin, 1, "").expect("a server");
    let place = Place::in_bucket(store, settings).expect("a place");
    Some((bin, cluster, place))
}

fn daemon(place: &Place, cluster: &Cluster) -> Daemon {
    place.daemon(cluster, "127.0.0.1:0").expect("a daemon")
}

fn backup(place: &Place, cluster: &Cluster) {
    let backup = place.back_up(&cluster.conninfo(), &[]);
    backup.expect("a backup");
}

fn verify(place: &Place) {
    let mut verify = place.program("wal-archiver").expect("it is built");
    succeed(verify.args(["verify", "--deep"])).expect("everything is sound");
}

fn sql(client: &mut postgres::Client, text: &str) {
    client.batch_execute(text).expect(text);
}

fn count(place: &Place, bin: &Path, arguments: &[&str]) -> i64 {
    let restored = Restored::start(place, bin, arguments).expect("a restore");
    let mut client = restored.connect().expect("a connection");
    let row = client.query_one("SELECT count(*) FROM t", &[]);
    row.expect("a count").get(0)
}

/// Checks that the archiver stops on a server whose WAL diverges from the archive.
fn refuses(place: &Place, server: &Cluster) {
    let log = place.path().join("refused.log");
    let mut run = place.program("wal-archiver").expect("it is built");
    run.args([
        "--conninfo",
        &server.conninfo(),
        "run",
        "--http",
        "127.0.0.1:0",
    ]);
    run.stderr(std::fs::File::create(&log).expect("a log"));
    let mut run = run.spawn().expect("it runs");
    let mut status = None;
    for _ in 0..600 {
        status = run.try_wait().expect("a status");
        if status.is_some() {
            break;
        }
        sleep(Duration::from_millis(100));
    }
    if status.is_none() {
        run.kill().expect("it dies");
        run.wait().expect("it ends");
    }
    let log = std::fs::read_to_string(log).expect("a log");
    let code = status.and_then(|status| status.code());
    assert_eq!(code, Some(4), "{log}");
    assert!(log.contains("nothing was overwritten"), "{log}");
}

#[test]
fn a_second_cluster_at_one_prefix_is_refused_and_writes_nothing() {
    let Some((bin, cluster, place)) = scene("") else {
        return;
    };
    let ours = daemon(&place, &cluster);
    let stranger = Cluster::start(&bin, 1, "").expect("a server");
    let beside = place.beside("").expect("a place");
    let conninfo = stranger.conninfo();
    for arguments in [
        ["run", "--http", "127.0.0.1:0"].as_slice(),
        &["backup", "--label", "stranger"],
    ] {
        let mut program = beside.program("wal-archiver").expect("it is built");
        program.args(["--conninfo", &conninfo]).args(arguments);
        let output = program.output().expect("it runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(said.contains("belongs to another cluster"), "{said}");
        assert!(said.contains("nothing was written"), "{said}");
    }
    backup(&place, &cluster);
    let mut client = cluster.connect().expect("a connection");
    sql(
        &mut client,
        "CREATE TABLE t AS SELECT generate_series(1, 1000)",
    );
    drop(client);
    cluster.stop().expect("it stops");
    ours.stop().expect("it stops");
    verify(&place);
    assert_eq!(count(&place, &bin, &[]), 1000);
}

/// Both archivers put the same names. The second one finds the object that it wanted to put.
#[test]
fn two_archivers_of_one_cluster_agree_under_kills() {
    let Some((bin, cluster, place)) =
        scene("acknowledge = \"remote\"\nremote_flush_interval = \"200ms\"")
    else {
        return;
    };
    let beside = place.beside("slot = \"second\"").expect("a place");
    let mut daemons = [daemon(&place, &cluster), daemon(&beside, &cluster)];
    cluster.wait_for_standbys("tidemark").expect("a setting");
    let ledger = Ledger::start(&cluster.conninfo(), 4).expect("a ledger");
    backup(&place, &cluster);
    let rounds = if testbed::is_long() { 20 } else { 4 };
    for round in 0..rounds {
        sleep(Duration::from_millis(700));
        let [first, second] = daemons;
        // Kill one of them, sometimes together with all files of its host.
        daemons = if round % 2 == 0 {
            first.kill().expect("it dies");
            if round % 4 == 2 {
                std::fs::remove_dir_all(place.path().join("spool")).expect("a spool");
            }
            [daemon(&place, &cluster), second]
        } else {
            second.kill().expect("it dies");
            if round % 4 == 3 {
                std::fs::remove_dir_all(beside.path().join("spool")).expect("a spool");
            }
            [first, daemon(&beside, &cluster)]
        };
    }
    sleep(Duration::from_millis(700));
    for daemon in daemons {
        daemon.kill().expect("it dies");
    }
    sleep(Duration::from_millis(300));
    let acknowledged = ledger.acknowledged();
    for place in [&place, &beside] {
        std::fs::remove_dir_all(place.path().join("spool")).expect("a spool");
    }
    assert!(acknowledged.len() > 20, "{}", acknowledged.len());
    let restored = Restored::start::<&str>(&place, &bin, &[]).expect("a restore");
    let loss = measure(
        &mut restored.connect().expect("a connection"),
        &acknowledged,
    );
    let loss = loss.expect("one moment");
    assert_eq!(loss.transfers, 0, "of {} acknowledged", acknowledged.len());
    drop(restored);
    cluster.destroy().expect("it is gone");
    ledger.finish().expect("it ends");
    verify(&place);
}

/// A restored copy has the same system identifier. After its promotion it has its own timeline and
/// is archived next to its origin.
#[test]
fn an_archiver_of_a_promoted_copy_joins_on_its_own_timeline() {
    let Some((bin, cluster, place)) = scene("") else {
        return;
    };
    let origin = daemon(&place, &cluster);
    backup(&place, &cluster);
    let mut client = cluster.connect().expect("a connection");
    sql(
        &mut client,
        "CREATE TABLE t AS SELECT generate_series(1, 1000)",
    );
    sql(&mut client, "SELECT pg_switch_wal()");
    sleep(Duration::from_secs(3));
    let copy = Restored::start::<&str>(&place, &bin, &[]).expect("a restore");
    let beside = place.beside("").expect("a place");
    let conninfo = copy.conninfo();
    let joined = beside.daemon_at(&conninfo, "127.0.0.1:0", " INFO streaming");
    let joined = joined.expect("it joins");
    // Both continue, with the same LSNs.
    sql(&mut client, "INSERT INTO t SELECT generate_series(1, 500)");
    drop(client);
    let mut client = copy.connect().expect("a connection");
    sql(&mut client, "INSERT INTO t SELECT generate_series(1, 20)");
    sql(&mut client, "CHECKPOINT");
    drop(client);
    sleep(Duration::from_secs(3));
    joined.stop().expect("it stops");
    drop(copy);
    cluster.stop().expect("it stops");
    origin.stop().expect("the origin was not disturbed");
    verify(&place);
    assert_eq!(count(&place, &bin, &["--target-timeline", "1"]), 1500);
    assert_eq!(
        count(&place, &bin, &[]),
        1020,
        "the newest timeline is the copy's"
    );
}

/// A copy that was started without a restore diverges on the same timeline: only one of the two
/// servers can continue the archive.
#[test]
fn an_archiver_of_a_copy_on_the_same_timeline_is_refused() {
    let Some((bin, cluster, place)) = scene("") else {
        return;
    };
    let mut origin = daemon(&place, &cluster);
    backup(&place, &cluster);
    cluster.stop().expect("it stops");
    let copy = cluster.copied().expect("a copy");
    cluster.start_again().expect("it starts");
    let again = origin.wait_for(|log| log.matches(" INFO streaming").count() > 1);
    again.expect("it streams again");
    let mut client = cluster.connect().expect("a connection");
    sql(
        &mut client,
        "CREATE TABLE t AS SELECT n, repeat('origin', 50) FROM generate_series(1, 5000) n",
    );
    drop(client);
    sleep(Duration::from_secs(2));
    cluster.stop().expect("it stops");
    origin.stop().expect("everything is in the bucket");
    // The copy is ahead of the archive, with other bytes.
    let mut client = copy.connect().expect("a connection");
    sql(
        &mut client,
        "CREATE TABLE t AS SELECT n, repeat('copied', 90) FROM generate_series(1, 9000) n",
    );
    drop(client);
    refuses(&place.beside("").expect("a place"), &copy);
    verify(&place);
    assert_eq!(count(&place, &bin, &[]), 5000, "the origin's");
}

/// The hardest case of such a copy: it diverges exactly between two segments, its records have the
/// same lengths as the origin's, so that even `xl_prev` is equal, and the previous segment ends
/// with unused space after a switch.
#[test]
fn a_copy_that_meets_the_archive_between_two_large_segments_is_refused() {
    let Some((_, bin)) = servers_or_skip().pop() else {
        return;
    };
    let settings = "autovacuum = off\nwal_keep_size = 1GB";
    let cluster = Cluster::start(&bin, 64, settings).expect("a server");
    let mut client = cluster.connect().expect("a connection");
    sql(&mut client, "CREATE TABLE t (n int, filler text)");
    drop(client);
    cluster.stop().expect("it stops");
    let copy = cluster.copied().expect("a copy");
    cluster.start_again().expect("it starts");
    let place = Place::new().expect("a place");
    let origin = daemon(&place, &cluster);
    let fill = |server: &Cluster, letter: char| -> String {
        let mut client = server.connect().expect("a connection");
        let rows = format!(
            "INSERT INTO t SELECT n, repeat('{letter}', 700) FROM generate_series(1, 300) n"
        );
        sql(&mut client, &rows);
        let switched = client.query_one("SELECT pg_switch_wal()::text", &[]);
        switched.expect("an LSN").get(0)
    };
    let end = fill(&cluster, 'a');
    let mut client = cluster.connect().expect("a connection");
    let archived = "SELECT coalesce(max(flush_lsn), '0/0')::text FROM pg_stat_replication";
    let lsn = |text: &str| text.parse::<Lsn>().expect("an LSN");
    let boundary = lsn(&end).0.next_multiple_of(64 << 20);
    let mut whole = false;
    for _ in 0..300 {
        let row = client.query_one(archived, &[]).expect("a row");
        whole = lsn(row.get(0)).0 >= boundary;
        if whole {
            break;
        }
        sleep(Duration::from_millis(100));
    }
    assert!(whole, "the segment that ends behind {end} is archived");
    drop(client);
    cluster.crash().expect("it dies");
    origin.stop().expect("it stops");
    assert_eq!(fill(&copy, 'b'), end, "the copy goes the same length");
    fill(&copy, 'b');
    // The archiver has lost its spool and knows only the repository.
    std::fs::remove_dir_all(place.path().join("spool")).expect("a spool");
    refuses(&place, &copy);
    verify(&place);
}
