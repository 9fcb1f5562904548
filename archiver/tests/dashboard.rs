//! The dashboard of a real archiver and server: every light is broken once and recovers, the page
//! is driven in a browser, the rules and the board name only emitted metrics, and other clients'
//! connections do not disturb the stream.

mod away;
mod browser;
pub(crate) mod camera;
mod emitted;
mod lights;
mod notifications;
mod prometheus;
mod strangers;
mod tls;
mod truthful;

use repository::Repository;
use serde_json::Value;
use wal_format::{OUTCOME_FORMAT_VERSION, Outcome, OutcomeKind, PgTimestamp};

use crate::support::{Archiver, Place, Server, postgres_bin, succeed, wait_flushed};

fn body(answer: &str) -> String {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    body.to_owned()
}

fn report(archiver: &Archiver) -> Value {
    serde_json::from_str(&body(&archiver.get("/api/v1/clusters/main"))).expect("JSON")
}

fn state(archiver: &Archiver) -> String {
    report(archiver)["state"]
        .as_str()
        .expect("a state")
        .to_owned()
}

fn outcome(kind: OutcomeKind, passed: bool) -> Outcome {
    let now = jiff::Timestamp::now();
    let id = format!(
        "{}-{:04x}",
        now.strftime("%Y%m%dT%H%M%SZ"),
        now.subsec_microsecond() & 0xffff
    );
    let finished = PgTimestamp::from_jiff(now);
    Outcome {
        format_version: OUTCOME_FORMAT_VERSION,
        kind,
        id: id.parse().expect("a name"),
        started: PgTimestamp(finished.0 - 9_000_000),
        finished,
        passed,
        message: if passed {
            "PostgreSQL answered"
        } else {
            "PostgreSQL did not start"
        }
        .to_owned(),
        backup: None,
        rto_seconds: passed.then_some(9.0),
        fetched_bytes: passed.then_some(50 << 20),
        fetch_seconds: passed.then_some(5.0),
        replayed_bytes: passed.then_some(20 << 20),
        replay_seconds: passed.then_some(2.0),
        loss_seconds: passed.then_some(0.0),
        damaged: Vec::new(),
        drill: None,
        actor: None,
        restore: None,
        branch: None,
    }
}

/// Stores an outcome in the repository, as a drill does.
fn record(place: &Place, outcome: &Outcome) {
    let url = format!("file://{}", place.repository().display());
    let repository = Repository::open(
        &repository::config::RepositoryPlace::from(
            url.parse::<repository::config::RepositoryUrl>()
                .expect("a URL"),
        ),
        &"main".parse().expect("a name"),
    )
    .expect("a repository");
    let system = repository
        .identity()
        .expect("it is read")
        .expect("it is claimed")
        .system_identifier;
    repository
        .put_outcome(system, outcome)
        .expect("it is stored");
}

fn archived() -> Option<(Server, Place, Archiver)> {
    let bin = postgres_bin()?;
    let server = Server::start(&bin, "max_slot_wal_keep_size=1GB");
    server.sql("CREATE TABLE orders (id int PRIMARY KEY, note text)");
    server.sql("CREATE TABLE drafts AS SELECT * FROM orders");
    let place = Place::new();
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    server.write_wal(200);
    let backup = place.command(&server.conninfo()).arg("backup").output();
    succeed("backup", &backup.expect("wal-archiver runs"));
    server.sql("SELECT pg_create_restore_point('before_release')");
    server.write_wal(200);
    wait_flushed(&server, server.lsn());
    Some((server, place, archiver))
}
