//! A connection to the server that is slow, is cut, or swallows everything silently; and an idle
//! server.

use std::{thread::sleep, time::Duration};

use testbed::fault_proxy::{FaultProxy, Faults};

use crate::support::{Place, Server, postgres_bin, succeed, wait_flushed, wait_until};

fn proxy(server: &Server) -> FaultProxy {
    let socket = server.directory().join(format!(".s.PGSQL.{}", server.port));
    FaultProxy::start(&socket).expect("a proxy")
}

/// Swallows the live connections and waits until a new stream continues. The server's own timeout
/// is so long that only the archiver can detect the failure.
fn swallowed(from_server: bool, to_server: bool) {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "wal_sender_timeout=5min");
    let place = Place::new();
    let proxy = proxy(&server);
    let archiver = place.run(&proxy.conninfo());
    archiver.wait_for_log("INFO streaming");
    server.write_wal(1500);
    wait_flushed(&server, server.lsn());
    let pid = server.sql("SELECT pid FROM pg_stat_replication");
    proxy.swallow(from_server, to_server);
    let before = archiver.log().matches("INFO streaming").count();
    server.write_wal(1500);
    wait_until("a new stream begins", || {
        // The old walsender has not noticed and holds the slot, as when a router loses its tables.
        if archiver.log().contains("nothing was heard") {
            server.sql(&format!(
                "SELECT pg_terminate_backend({pid}) FROM pg_stat_replication WHERE pid = {pid}"
            ));
        }
        archiver.log().matches("INFO streaming").count() > before
    });
    let log = archiver.log();
    assert!(log.contains("nothing was heard"), "{log}");
    place.assert_whole(&server, archiver);
}

#[test]
fn a_half_open_connection_is_found_out() {
    swallowed(true, true);
    // Each takes half a minute of silence, so the short tier has only one.
    if testbed::is_long() {
        swallowed(true, false);
    }
}

#[test]
fn our_words_that_never_arrive_end_in_a_new_connection() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "wal_sender_timeout=2s");
    let place = Place::new();
    let proxy = proxy(&server);
    let archiver = place.run(&proxy.conninfo());
    archiver.wait_for_log("INFO streaming");
    server.write_wal(1500);
    wait_flushed(&server, server.lsn());
    proxy.swallow(false, true);
    server.write_wal(1500);
    wait_until("a new stream begins", || {
        archiver.log().matches("INFO streaming").count() > 1
    });
    place.assert_whole(&server, archiver);
}

#[test]
fn cut_again_and_again_on_a_slow_line_nothing_is_lost() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "wal_sender_timeout=3s");
    let place = Place::new();
    let proxy = proxy(&server);
    let archiver = place.run(&proxy.conninfo());
    archiver.wait_for_log("INFO streaming");
    let load = server.load();
    let rounds = if testbed::is_long() { 60 } else { 4 };
    for round in 0..rounds {
        wait_until("it comes back each time", || proxy.connections() > round);
        proxy.set(Faults {
            delay: Duration::from_millis(5 * (round % 4)),
            throttle: (round % 2 == 1).then_some(2 << 20),
        });
        sleep(Duration::from_millis(700));
        proxy.cut();
    }
    proxy.set(Faults::default());
    drop(load);
    place.assert_whole(&server, archiver);
}

fn value(report: &str, tier: &str, field: &str) -> String {
    let tier = report.split(&format!("\"{tier}\":{{")).nth(1);
    let found = tier.and_then(|tier| tier.split(&format!("\"{field}\":")).nth(1));
    let text = found.unwrap_or_else(|| panic!("no {field} in {report}"));
    text.split([',', '}']).next().unwrap_or_default().to_owned()
}

#[test]
fn an_idle_server_shows_a_living_stream_and_nothing_at_risk() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "wal_sender_timeout=2s\nautovacuum=off");
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    let backup = place.command(&server.conninfo()).arg("backup").output();
    succeed("backup", &backup.expect("wal-archiver runs"));
    server.write_wal(100);
    wait_flushed(&server, server.lsn());
    let pid = server.sql("SELECT pid FROM pg_stat_replication");
    let report = || archiver.get("/api/v1/clusters/main");
    wait_until("it is well", || report().contains("\"state\":\"ok\""));
    let contact = || value(&report(), "source", "last_contact");
    // Four times the interval after which PostgreSQL expects a reply.
    for _ in 0..4 {
        let heard = contact();
        sleep(Duration::from_secs(2));
        assert_ne!(
            contact(),
            heard,
            "the server is heard though it says nothing new"
        );
        for tier in ["local", "remote"] {
            wait_until("nothing is at risk", || {
                value(&report(), tier, "rpo_seconds").parse::<f64>() == Ok(0.0)
            });
        }
    }
    assert_eq!(server.sql("SELECT pid FROM pg_stat_replication"), pid);
    assert!(report().contains("\"reconnects\":[]"), "{}", report());
    place.assert_whole(&server, archiver);
}
