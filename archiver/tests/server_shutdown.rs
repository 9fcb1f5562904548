//! A server can shut down while the repository is offline or hangs, or the spool is full. The
//! archiver reports no position that is not durable, and the stream resumes from the last reported
//! one.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use wal_format::Lsn;

use crate::{
    disk::FailingDisk,
    support::{Archiver, Place, Server, postgres_bin, store_goes_down, wait_flushed, wait_until},
};

/// The maximum duration of a shutdown: the time for which the archiver waits for durable WAL, and a
/// large margin for a busy machine.
const STOP_MAX: Duration = Duration::from_secs(20);
/// The log event of a connection that was closed for a shutdown.
const RELEASED: &str = "server_shutdown_released";
const REMOTE: &str = "acknowledge = 'remote'\n";
/// The smallest allowed limit of a spool.
const LIMIT: &str = "spool_limit_bytes = 4194304\n";

/// Returns the oldest and the newest PostgreSQL.
fn oldest_and_newest() -> Vec<(u16, PathBuf)> {
    let mut servers = testbed::tools::servers_or_skip();
    servers.sort();
    let newest = servers.pop();
    servers.into_iter().take(1).chain(newest).collect()
}

/// Runs `wal-archiver` with further settings in a file.
fn run(place: &Place, conninfo: &str, settings: &str) -> Archiver {
    let file = place.spool().with_extension("toml");
    fs::write(&file, settings).expect("a configuration");
    let mut command = place.command(conninfo);
    command.arg("--config").arg(file);
    let archiver = place.run_with(command);
    archiver.wait_for_log("INFO streaming");
    archiver
}

/// Stops the server, and checks that it ends in time.
fn stop(server: &Server, mode: &str, what: &str) {
    let began = Instant::now();
    server.down(mode);
    let took = began.elapsed();
    eprintln!(
        "{what}: pg_ctl stop -m {mode} took {:.1} s",
        took.as_secs_f64()
    );
    assert!(took < STOP_MAX, "{what}: {took:?}");
}

/// Returns the slot's position, which is the last acknowledged LSN.
fn told(server: &Server) -> Lsn {
    let lsn = server.sql("SELECT restart_lsn FROM pg_replication_slots");
    lsn.parse().expect("an LSN")
}

fn make_synchronous(server: &Server) {
    server.sql("CREATE TABLE acknowledged (number int)");
    server.sql("ALTER SYSTEM SET synchronous_standby_names = 'tidemark'");
    server.sql("SELECT pg_reload_conf()");
    wait_until("commits wait for us", || {
        server.sql("SELECT coalesce(max(sync_state), '') FROM pg_stat_replication") == "sync"
    });
}

/// Starts a commit that waits for the archiver.
fn waiting_commit(server: &Server, number: u32) -> Child {
    let directory = server.directory().to_owned();
    let commit = server
        .command("psql")
        .arg("-h")
        .arg(directory)
        .args(["-p", &server.port.to_string(), "-U", "postgres", "-qAtX"])
        .args(["-c", &format!("INSERT INTO acknowledged VALUES ({number})")])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("psql runs");
    wait_until("a commit waits", || {
        server.sql("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'") == "1"
    });
    commit
}

#[test]
fn a_repository_that_is_away_does_not_keep_a_synchronous_primary_from_stopping() {
    for (major, bin) in oldest_and_newest() {
        let server = Server::start(&bin, "");
        let place = Place::new();
        let archiver = run(&place, &server.conninfo(), REMOTE);
        make_synchronous(&server);
        server.sql("INSERT INTO acknowledged VALUES (1)");
        // With a working repository, the shutdown waits until all WAL is stored.
        server.write_wal(3000);
        stop(
            &server,
            "fast",
            &format!("{major}, a repository that works"),
        );
        assert!(!archiver.log().contains(RELEASED), "{}", archiver.log());
        server.up();
        server.sql("INSERT INTO acknowledged VALUES (2)");

        let comes_back = store_goes_down(&place);
        let mut waiting = waiting_commit(&server, 3);
        let before = told(&server);
        stop(&server, "fast", &format!("{major}, the repository is away"));
        assert!(archiver.log().contains(RELEASED), "{}", archiver.log());
        let answer = waiting.wait().expect("psql ends");
        assert!(
            !answer.success(),
            "a commit that is not durable was acknowledged"
        );
        server.up();
        assert!(
            told(&server) <= before,
            "WAL that is not durable was acknowledged"
        );
        comes_back();
        // Returns when the stream has resumed and the repository holds the commit.
        server.sql("INSERT INTO acknowledged VALUES (4)");
        let kept =
            server.sql("SELECT string_agg(number::text, ' ' ORDER BY number) FROM acknowledged");
        assert_eq!(kept, "1 2 3 4", "3 was committed on the server alone");
        place.assert_whole(&server, archiver);
    }
}

#[test]
fn a_full_spool_does_not_keep_the_primary_from_stopping() {
    let servers = oldest_and_newest();
    for (index, (major, bin)) in servers.iter().enumerate() {
        for may_only_replicate in [false, true] {
            // The role's effect does not depend on the version, so the short form tests each role
            // with one version.
            if testbed::is_long() || may_only_replicate == (index > 0) {
                full_spool(*major, bin, may_only_replicate);
            }
        }
    }
}

fn full_spool(major: u16, bin: &Path, may_only_replicate: bool) {
    let server = Server::start(bin, "");
    let place = Place::new();
    let mut conninfo = server.conninfo();
    if may_only_replicate {
        server.sql("CREATE ROLE streamer LOGIN REPLICATION");
        let path = server.data().join("pg_hba.conf");
        let rules = fs::read_to_string(&path).expect("pg_hba.conf");
        fs::write(&path, format!("local all streamer reject\n{rules}")).expect("pg_hba.conf");
        server.sql("SELECT pg_reload_conf()");
        conninfo = conninfo.replace("user=postgres", "user=streamer");
    }
    let archiver = run(&place, &conninfo, LIMIT);
    let comes_back = store_goes_down(&place);
    // More than the spool and the buffers can hold, so that the stream is not read any more.
    server.write_wal(30_000);
    archiver.wait_for_log("spool is at its limit");
    let before = told(&server);
    let what = format!("{major}, the spool is full, SQL refused: {may_only_replicate}");
    stop(&server, "fast", &what);
    server.up();
    assert!(told(&server) >= before, "the slot went back");
    // The next connection waits for space before it streams.
    wait_until("it is connected again", || {
        let connected = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'walsender'";
        server.sql(connected) == "1"
    });
    stop(&server, "fast", &format!("{what}, again"));
    server.up();
    comes_back();
    server.write_wal(100);
    place.assert_whole(&server, archiver);
}

#[test]
fn a_repository_that_hangs_does_not_keep_the_primary_from_stopping() {
    let versions = oldest_and_newest();
    let skipped = if testbed::is_long() {
        0
    } else {
        versions.len().saturating_sub(1)
    };
    for (major, bin) in versions.into_iter().skip(skipped) {
        let Some(disk) = FailingDisk::mount(200, false) else {
            return;
        };
        let server = Server::start(&bin, "");
        let place = Place::new();
        // The repository is on the disk.
        let folder = disk.path().join("repository");
        fs::create_dir(&folder).expect("a directory");
        fs::remove_dir(place.repository()).expect("it is empty");
        std::os::unix::fs::symlink(&folder, place.repository()).expect("a link");
        let archiver = run(&place, &server.conninfo(), REMOTE);
        make_synchronous(&server);
        server.sql("INSERT INTO acknowledged VALUES (1)");
        assert!(disk.freeze(true));
        let mut waiting = waiting_commit(&server, 2);
        let before = told(&server);
        let stopped = Instant::now();
        let mut stopping = start_to_stop(&server);
        let outcome = wait_for(&mut stopping);
        let took = stopped.elapsed();
        // Later the WAL is durable, and the archiver reports it as soon as the server is up.
        let durable = archiver.get("/api/v1/clusters/main");
        // Before an assertion can fail: an archiver with a pending write cannot even be killed.
        assert!(disk.freeze(false));
        let (_, durable) = durable.split_once("\r\n\r\n").expect("a body");
        let durable: serde_json::Value = serde_json::from_str(durable).expect("JSON");
        let durable = durable["durable"]["remote"]["lsn"].as_str();
        let durable: Lsn = durable.expect("a position").parse().expect("an LSN");
        eprintln!(
            "{major}, the repository hangs: pg_ctl stop took {:.1} s",
            took.as_secs_f64()
        );
        assert!(outcome && took < STOP_MAX, "{took:?}");
        drop(waiting.wait());
        server.up();
        assert!(
            durable <= before,
            "WAL that is not durable was acknowledged"
        );
        server.sql("INSERT INTO acknowledged VALUES (3)");
        place.assert_whole(&server, archiver);
    }
}

#[test]
#[ignore = "long: make test-long"]
fn a_spool_that_hangs_does_not_keep_the_primary_from_stopping() {
    let Some(bin) = postgres_bin() else { return };
    let Some(disk) = FailingDisk::mount(200, false) else {
        return;
    };
    let server = Server::start(&bin, "");
    let place = Place::new();
    fs::create_dir_all(place.spool()).expect("a directory");
    let mut command = place.command_with_spool(&server.conninfo(), &disk.path());
    command.arg("--catalog").arg(place.spool().join("catalog"));
    let archiver = place.run_with(command);
    archiver.wait_for_log("INFO streaming");
    server.write_wal(100);
    wait_flushed(&server, server.lsn());
    assert!(disk.freeze(true));
    server.write_wal(2000);
    let stopped = Instant::now();
    let outcome = wait_for(&mut start_to_stop(&server));
    let took = stopped.elapsed();
    assert!(disk.freeze(false));
    eprintln!(
        "the spool hangs: pg_ctl stop took {:.1} s",
        took.as_secs_f64()
    );
    assert!(outcome && took < STOP_MAX, "{took:?}");
    server.up();
    server.write_wal(100);
    place.assert_whole(&server, archiver);
}

#[test]
#[ignore = "long: make test-long"]
fn a_smart_shutdown_does_not_wait_for_our_session() {
    for (major, bin) in oldest_and_newest() {
        let server = Server::start(&bin, "");
        let place = Place::new();
        let archiver = run(&place, &server.conninfo(), "");
        server.write_wal(100);
        wait_until("it asks over SQL", || {
            let sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'tidemark' \
                            AND backend_type = 'client backend'";
            server.sql(sessions) == "1"
        });
        let began = Instant::now();
        server.down("smart");
        eprintln!(
            "{major}: pg_ctl stop -m smart took {:.1} s",
            began.elapsed().as_secs_f64()
        );
        server.up();
        place.assert_whole(&server, archiver);
    }
}

fn start_to_stop(server: &Server) -> Child {
    let mut command: Command = server.command("pg_ctl");
    command.arg("-D").arg(server.data());
    command
        .args(["-w", "-t", "40", "-m", "fast", "stop"])
        .stdout(Stdio::null())
        .spawn()
        .expect("pg_ctl runs")
}

fn wait_for(child: &mut Child) -> bool {
    child.wait().expect("a child").success()
}
