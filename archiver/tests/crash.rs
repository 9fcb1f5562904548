//! kill -9 at random moments under load: the archived bytes equal the server's, and none is
//! missing.

use std::{thread::sleep, time::Duration};

use crate::support::{Place, Server, postgres_bin, wait_flushed};

#[test]
fn killed_at_random_under_load_nothing_is_lost_or_changed() {
    let Some(bin) = postgres_bin() else { return };
    let rounds = if testbed::is_long() { 100 } else { 8 };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let load = server.load();
    let mut chance = std::process::id();
    for _ in 0..rounds {
        let archiver = place.run(&server.conninfo());
        chance = chance.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        sleep(Duration::from_millis(u64::from(chance >> 16) % 1500 + 50));
        archiver.kill();
    }
    let mut archiver = place.run(&server.conninfo());
    sleep(Duration::from_secs(1));
    drop(load);
    let lsn = server.lsn();
    wait_flushed(&server, lsn);
    assert!(archiver.is_running());
    assert_eq!(archiver.terminate().code(), Some(0));
    assert!(place.assert_equals_pg_wal(&server.data()) >= lsn);
    place.verify(&server.conninfo());
}
