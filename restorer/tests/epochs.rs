//! `pg_upgrade` gives the server a new system identifier: nothing is mixed, the operator begins a
//! new epoch, and both the time before and the time after can be restored.

use std::process::Output;

use testbed::{
    cluster::Cluster, place::Place, programs::succeed, restored::Restored, tools::servers_or_skip,
};

use crate::support::{SETTINGS, end_lsn, query, records, said, switchover_check, wait_archived};

const WORDS: &str = "SELECT string_agg(word, ' ' ORDER BY word) FROM words";
const SYSTEM: &str = "SELECT system_identifier FROM pg_control_system()";

fn write(cluster: &Cluster, word: &str) {
    query(
        &cluster.conninfo(),
        &format!("INSERT INTO words VALUES ('{word}')"),
    );
}

fn backup(place: &Place, cluster: &Cluster) {
    let mut backup = place.program("wal-archiver").expect("built");
    succeed(backup.args(["--conninfo", &cluster.conninfo(), "backup"])).expect("a backup");
}

fn begin(place: &Place, cluster: &Cluster, system: &str) -> Output {
    let mut begin = place.program("wal-archiver").expect("built");
    begin.args(["--conninfo", &cluster.conninfo(), "epoch", "begin"]);
    let output = begin.args(["--system-identifier", system]).output();
    output.expect("it runs")
}

fn list(place: &Place, arguments: &[&str]) -> serde_json::Value {
    let mut list = place.program("pitr-restore").expect("built");
    let said = succeed(list.args(["list", "--json"]).args(arguments)).expect("a listing");
    serde_json::from_str(&said).expect("JSON")
}

#[test]
fn both_sides_of_a_pg_upgrade_are_restored() {
    let servers = servers_or_skip();
    let (Some((old_major, old_bin)), Some((_, new_bin))) = (
        servers.iter().find(|(major, _)| *major >= 14),
        servers.iter().rfind(|(major, _)| *major >= 15),
    ) else {
        return;
    };
    let old = Cluster::start(old_bin, 1, SETTINGS).expect("the old server");
    let place = Place::new().expect("a place");
    let mut daemon = place.daemon(&old, "127.0.0.1:0").expect("an archiver");
    query(&old.conninfo(), "CREATE TABLE words (word text)");
    backup(&place, &old);
    write(&old, "a");
    query(
        &old.conninfo(),
        "SELECT pg_create_restore_point('before the upgrade')",
    );
    write(&old, "b");
    wait_archived(&old.conninfo(), end_lsn(&old.conninfo()));
    let old_system = query(&old.conninfo(), SYSTEM);
    old.stop().expect("the old server stops");
    // The archive is known to be whole after a clean stop.
    let (code, told) = switchover_check(&place, &old.conninfo(), &daemon);
    assert_eq!(code, Some(0), "{told}");
    assert!(told.contains("ends with its shutdown checkpoint"), "{told}");

    let new = old.upgraded(new_bin, 1, SETTINGS).expect("an upgrade");
    let new_system = query(&new.conninfo(), SYSTEM);
    assert_ne!(old_system, new_system);
    write(&new, "c");
    // The daemon continued to run and now finds another server in place of the old one.
    daemon
        .wait_for(|log| log.contains("not streaming"))
        .expect("the old server is away");
    daemon.stop().expect("it stops");
    let refused = place.spawn(&new.conninfo(), "127.0.0.1:0");
    let error = refused
        .expect("it starts")
        .wait_for(|_| false)
        .expect_err("it ends by itself");
    let error = format!("{error:#}");
    assert!(
        error.contains(&format!("epoch begin --system-identifier {new_system}")),
        "{error}"
    );

    // Only the right identifier from the operator is accepted.
    let done = begin(&place, &new, &old_system);
    assert!(said(&done).0.contains("archived already"), "{done:?}");
    let done = begin(&place, &new, "123");
    assert_eq!(done.status.code(), Some(2), "{done:?}");
    assert!(said(&done).1.contains("nothing was changed"), "{done:?}");
    let done = begin(&place, &new, &new_system);
    assert!(done.status.success(), "{done:?}");

    let daemon = place.daemon(&new, "127.0.0.1:0").expect("an archiver");
    backup(&place, &new);
    write(&new, "d");
    wait_archived(&new.conninfo(), end_lsn(&new.conninfo()));
    daemon.stop().expect("it stops");

    let begun = records(&place, "epoch");
    assert_eq!(begun.len(), 1, "{begun:#?}");
    assert_eq!(begun[0]["system_identifier"], new_system.as_str());
    let taken = records(&place, "backup");
    assert_eq!(taken.len(), 2, "one in each epoch: {taken:#?}");

    let listed = list(&place, &[]);
    let epochs = listed["epochs"].as_array().expect("epochs");
    assert_eq!(epochs.len(), 2, "{listed}");
    assert_eq!(epochs[0]["postgresql_major"], *old_major);
    assert_eq!(epochs[0]["system_identifier"], old_system.as_str());
    assert_eq!(
        epochs[0]["backups"].as_array().map(Vec::len),
        Some(1),
        "{listed}"
    );
    assert_eq!(epochs[1]["listed"], true, "{listed}");
    assert_eq!(
        listed["backups"].as_array().map(Vec::len),
        Some(1),
        "{listed}"
    );
    let of_old = format!("--system={old_system}");
    let past = list(&place, &[&of_old]);
    assert_eq!(past["epochs"][0]["listed"], true, "{past}");

    let restored = Restored::start::<&str>(&place, new_bin, &[]).expect("the newest");
    assert_eq!(query(&restored.conninfo(), WORDS), "a b c d");
    drop(restored);
    let before = [
        of_old.as_str(),
        "--target-name=before the upgrade",
        "--target-action=promote",
    ];
    let restored = Restored::start(&place, old_bin, &before).expect("before the upgrade");
    assert_eq!(query(&restored.conninfo(), WORDS), "a");
    drop(restored);
    // Everything up to the shutdown for the upgrade.
    let restored = Restored::start(&place, old_bin, &[of_old]).expect("the end of the old epoch");
    assert_eq!(query(&restored.conninfo(), WORDS), "a b");
}
