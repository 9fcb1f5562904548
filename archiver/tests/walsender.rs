//! Stock standbys of PostgreSQL and `pg_receivewal` stream from the archive: over a promotion, from
//! sealed segments to the spool's live end, and only with the right password.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

use crate::{
    certificates::private_file,
    support::{
        Archiver, Place, Server, owned_dir, postgres_bin, succeed, wait_flushed, wait_until,
    },
};

const PASSWORD: &str = "it's a \"secret\"";

/// Returns a configuration whose walsender requires the password.
fn configuration(more: &str) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a directory");
    let password = dir.path().join("password");
    private_file(&password, &format!("{PASSWORD}\n"));
    let file = dir.path().join("tidemark.toml");
    let text = format!(
        "walsender = \"127.0.0.1:0\"\nwalsender_password_file = \"{}\"\n{more}",
        password.display()
    );
    fs::write(&file, text).expect("a file");
    (dir, file)
}

fn run(place: &Place, conninfo: &str, file: &Path) -> (Archiver, u16) {
    let mut command = place.command(conninfo);
    command.arg("--config").arg(file);
    let archiver = place.run_with(command);
    archiver.wait_for_log("INFO streaming");
    let log = archiver.log();
    let line = log
        .lines()
        .rfind(|line| line.contains("standbys may stream from the archive"))
        .expect("it listens");
    let port = line.rsplit(':').next().expect("a port").trim();
    let port = port.parse().expect("a number");
    (archiver, port)
}

fn conninfo(port: u16, password: &str) -> String {
    let password = password.replace('\\', "\\\\").replace('\'', "\\'");
    format!("host=127.0.0.1 port={port} user=replicator password='{password}'")
}

/// Returns a standby of `primary` that streams only from the archive from now on.
fn standby(primary: &Server, port: u16) -> Server {
    let standby = Server::standby_of(primary);
    standby.down("fast");
    let from = conninfo(port, PASSWORD);
    let from = from.replace('\\', "\\\\").replace('\'', "''");
    standby.configure_more(&format!(
        "primary_conninfo = '{from}'\nwal_retrieve_retry_interval = 200\nrestore_command = ''"
    ));
    standby.up();
    standby
}

fn rows(server: &Server) -> String {
    server.sql("SELECT count(*) FROM load")
}

fn psql(server: &Server, conninfo: &str, command: &str) -> (bool, String) {
    let output = server.psql(&format!("{conninfo} replication=true"), command);
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    eprintln!("{command}: {text}");
    (output.status.success(), text)
}

/// Runs `pg_receivewal`, starting at the file `first` in its directory.
fn receive(server: &Server, port: u16, first: &Path, end: &str) -> TempDir {
    let folder = owned_dir();
    let copy = folder.path().join(first.file_name().expect("a name"));
    fs::copy(first, &copy).expect("a copy");
    let mut receive = server.command("pg_receivewal");
    receive.args(["--no-loop", "--synchronous", &format!("--endpos={end}")]);
    receive.arg("-D").arg(folder.path());
    receive.args(["-d", &conninfo(port, PASSWORD)]);
    succeed("pg_receivewal", &receive.output().expect("it runs"));
    folder
}

fn oldest(folder: &Path) -> PathBuf {
    let entries = fs::read_dir(folder).expect("a folder").flatten();
    let segments = entries.map(|entry| entry.path()).filter(|path| {
        let name = path.file_name().map(|name| name.len());
        name == Some(24)
    });
    segments.min().expect("a segment")
}

/// Returns the number of its complete files that equal the server's.
fn assert_equal(folder: &Path, server: &Server) -> usize {
    let mut equal = 0;
    for entry in fs::read_dir(folder).expect("a folder").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.len() != 24 {
            continue;
        }
        let ours = fs::read(entry.path()).expect("a file");
        let theirs = fs::read(server.data().join("pg_wal").join(&name)).expect("it is there");
        assert!(ours == theirs, "{name} differs");
        equal += 1;
    }
    equal
}

fn follows_a_promotion(bin: &Path) {
    let primary = Server::start(bin, "");
    // The archive's own source, which will be promoted.
    let source = Server::standby_of(&primary);
    let place = Place::new();
    let (_dir, file) = configuration("");
    let (archiver, port) = run(&place, &source.conninfo(), &file);
    primary.write_wal(2500);
    let replayed = |server: &Server, lsn| {
        wait_until("it has replayed", || {
            server.sql(&format!("SELECT pg_last_wal_replay_lsn() >= '{lsn}'")) == "t"
        });
    };
    replayed(&source, primary.lsn());
    let follower = standby(&primary, port);
    // Live, commit by commit, and whole segments.
    for _ in 0..3 {
        primary.sql("INSERT INTO load VALUES (0, 'one more')");
        replayed(&follower, primary.lsn());
        assert_eq!(rows(&follower), rows(&primary));
    }
    primary.write_wal(2500);
    replayed(&source, primary.lsn());
    replayed(&follower, primary.lsn());
    source.promote();
    archiver.wait_for_log("changed its timeline");
    source.write_wal(2500);
    replayed(&follower, source.lsn());
    assert_eq!(rows(&follower), rows(&source));
    assert!(follower.data().join("pg_wal/00000002.history").exists());

    // From the first segment, sealed long ago, over the switch to the end.
    wait_flushed(&source, source.lsn());
    let first = oldest(&source.data().join("pg_wal"));
    let received = receive(&source, port, &first, &source.lsn().to_string());
    let equal = assert_equal(received.path(), &source);
    assert!(equal >= 5, "{equal}");
    let crossed = fs::read_dir(received.path()).expect("a folder").flatten();
    let mut names = crossed.map(|entry| entry.file_name().to_string_lossy().into_owned());
    assert!(names.any(|name| name.starts_with("00000002")));

    let log = fs::read_to_string(follower.directory().join("log")).expect("a log");
    assert!(
        log.contains("replication terminated by primary server"),
        "{log}"
    );
    assert!(!log.contains("unexpected"), "{log}");
    follower.promote();
    follower.sql("INSERT INTO load VALUES (-1, 'its own')");
    assert_eq!(archiver.terminate().code(), Some(0));
}

#[test]
fn a_stock_standby_follows_the_archive_over_a_promotion() {
    let Some(newest) = postgres_bin() else { return };
    let servers = testbed::tools::servers_or_skip();
    let of = |major: u16| servers.iter().find(|(known, _)| *known == major);
    let mut bins = vec![newest];
    if testbed::is_long() {
        bins.extend(
            [13, 15, 18]
                .iter()
                .filter_map(|major| of(*major))
                .map(|one| one.1.clone()),
        );
    }
    for bin in bins {
        eprintln!("{}", bin.display());
        follows_a_promotion(&bin);
    }
}

#[test]
fn strangers_and_wrong_words_are_refused() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let certificates = tempfile::tempdir().expect("a directory");
    let path = |name: &str| certificates.path().join(name);
    let mut openssl = Command::new("openssl");
    openssl.args([
        "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
    ]);
    openssl
        .args(["-subj", "/CN=archive"])
        .arg("-keyout")
        .arg(path("key"));
    let output = openssl.arg("-out").arg(path("crt")).output();
    succeed("openssl", &output.expect("it runs"));
    let (_dir, file) = configuration(&format!(
        "walsender_tls_certificate = \"{}\"\nwalsender_tls_key = \"{}\"\n",
        path("crt").display(),
        path("key").display()
    ));
    let (archiver, port) = run(&place, &server.conninfo(), &file);
    server.write_wal(300);
    wait_flushed(&server, server.lsn());
    let right = conninfo(port, PASSWORD);
    let system = server.sql("SELECT system_identifier FROM pg_control_system()");
    for sslmode in ["disable", "require"] {
        let (known, text) = psql(
            &server,
            &format!("{right} sslmode={sslmode}"),
            "IDENTIFY_SYSTEM",
        );
        assert!(
            known && text.starts_with(&format!("{system}|1|0/")),
            "{text}"
        );
    }
    let (known, text) = psql(&server, &right, "SHOW wal_segment_size");
    assert!(known && text.trim() == "1MB", "{text}");
    for (conninfo, command, said) in [
        (
            conninfo(port, "wrong"),
            "IDENTIFY_SYSTEM",
            "password authentication failed",
        ),
        (
            right.replace("replicator", "somebody"),
            "IDENTIFY_SYSTEM",
            "password authentication failed",
        ),
        (right.clone(), "SELECT 1", "does not know the command"),
        (right.clone(), "TIMELINE_HISTORY 7", "00000007.history"),
        (
            right.clone(),
            "START_REPLICATION 0/1000000 TIMELINE 7",
            "not in this archive's history",
        ),
        (
            right.clone(),
            "START_REPLICATION FFFF/0",
            "ahead of the WAL flush position",
        ),
    ] {
        let (known, text) = psql(&server, &conninfo, command);
        assert!(!known && text.contains(said), "{text}");
    }
    let output = server.psql(&right, "SELECT 1");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("an archive and no database"), "{text}");
    assert!(!archiver.log().contains("secret"));
    assert_eq!(archiver.terminate().code(), Some(0));
    an_address_in_use_ends_no_archiving(&server, &place, &file);
}

fn an_address_in_use_ends_no_archiving(server: &Server, place: &Place, file: &Path) {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    let text = fs::read_to_string(file).expect("a configuration");
    fs::write(file, text.replace("127.0.0.1:0", &address)).expect("a configuration");
    let mut command = place.command(&server.conninfo());
    command.arg("--config").arg(file);
    let archiver = place.run_with(command);
    let served = || {
        let log = archiver.log();
        log.matches("standbys may stream from the archive").count()
    };
    let before = served();
    server.write_wal(300);
    wait_flushed(server, server.lsn());
    let is_named = || {
        let report = archiver.get("/api/v1/clusters/main");
        report.contains("standbys cannot stream from the archive") && report.contains(&address)
    };
    wait_until("the address is named", is_named);
    drop(taken);
    wait_until("it is used when it is free", || {
        served() > before && !is_named()
    });
    assert_eq!(archiver.terminate().code(), Some(0));
}
