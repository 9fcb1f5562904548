//! Many clusters in one daemon, and its signals: a cluster that fails does not affect the others, a
//! changed configuration affects only the changed clusters, and systemd is notified.

use std::{
    fmt::Write as _,
    fs,
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::{
    Archiver, Place, Server, postgres_bin, run_command, wait_flushed, wait_until,
};

/// A configuration file and its directories. Each cluster has its own repository.
struct Site {
    dir: TempDir,
    tables: Vec<(&'static str, String)>,
}

impl Site {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        Self {
            dir,
            tables: Vec::new(),
        }
    }

    fn set(&mut self, name: &'static str, conninfo: &str, settings: &str) {
        let repository = self.repository(name);
        fs::create_dir_all(&repository).expect("a directory");
        let table = format!(
            "repository = \"file://{}\"\nconninfo = \"{conninfo}\"\n{settings}\n",
            repository.display()
        );
        self.remove(name);
        self.tables.push((name, table));
    }

    fn remove(&mut self, name: &str) {
        self.tables.retain(|(known, _)| *known != name);
    }

    fn repository(&self, name: &str) -> PathBuf {
        self.dir.path().join("repositories").join(name)
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("tidemark.toml")
    }

    fn write(&self) {
        let spool = self.dir.path().join("spool");
        let mut text = format!("spool = \"{}\"\n", spool.display());
        for (name, table) in &self.tables {
            write!(text, "[cluster.{name}]\n{table}").expect("a text");
        }
        fs::write(self.file(), text).expect("a configuration");
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wal-archiver"));
        command.arg("--config").arg(self.file());
        command
    }

    fn run(&self) -> Archiver {
        self.write();
        let archiver = run_command(self.command(), self.dir.path());
        archiver.wait_for_log("serving HTTP");
        archiver
    }

    fn verify(&self, name: &str) -> String {
        let output = self
            .command()
            .args(["--cluster", name, "verify", "--deep"])
            .output();
        crate::support::succeed("verify", &output.expect("wal-archiver runs"))
    }
}

fn report(archiver: &Archiver, cluster: &str) -> String {
    archiver.get(&format!("/api/v1/clusters/{cluster}"))
}

fn shows(archiver: &Archiver, cluster: &str, text: &str) {
    wait_until(&format!("{cluster} shows {text}"), || {
        report(archiver, cluster).contains(text)
    });
}

fn streams(archiver: &Archiver, cluster: &str) {
    shows(archiver, cluster, "\"stream_connected\":true");
}

/// Writes WAL and waits until it is acknowledged.
fn is_archived(server: &Server) {
    server.write_wal(1200);
    wait_flushed(server, server.lsn());
}

fn goes_away(folder: &Path) {
    repository::durable::rename(folder, &folder.with_extension("aside")).expect("it goes");
    fs::write(folder, "a file is no folder").expect("in its place");
}

fn comes_back(folder: &Path) {
    fs::remove_file(folder).expect("the file goes");
    repository::durable::rename(&folder.with_extension("aside"), folder).expect("it is back");
}

#[test]
fn a_cluster_that_fails_harms_no_other_one() {
    let Some(bin) = postgres_bin() else { return };
    let (good, down, full, back) = (
        Server::start(&bin, ""),
        Server::start(&bin, ""),
        Server::start(&bin, ""),
        Server::start(&bin, ""),
    );
    back.write_wal(10);
    back.down("fast");
    let copy = back.data().with_extension("copy");
    let copied = Command::new("cp")
        .arg("-a")
        .arg(back.data())
        .arg(&copy)
        .status();
    assert!(copied.expect("cp runs").success());
    back.up();
    let mut site = Site::new();
    let stranger = good.conninfo().replace("user=postgres", "user=nobody");
    site.set("good", &good.conninfo(), "");
    site.set("down", &down.conninfo(), "");
    site.set("stranger", &stranger, "slot = \"other\"");
    site.set("full", &full.conninfo(), "spool_limit_bytes = 4194304");
    site.set("back", &back.conninfo(), "");
    let mut archiver = site.run();
    for cluster in ["good", "down", "full", "back"] {
        streams(&archiver, cluster);
    }
    shows(&archiver, "stranger", "\"state\":\"broken\"");
    // One server is down, one store is away until its spool is full, one server comes back with a
    // different past.
    down.down("immediate");
    is_archived(&back);
    goes_away(&site.repository("full"));
    full.write_wal(9000);
    shows(&archiver, "full", "spool_limit_bytes");
    back.down("fast");
    fs::remove_dir_all(back.data()).expect("the data directory goes");
    repository::durable::rename(&copy, &back.data()).expect("the snapshot comes");
    back.up();
    back.sql("CREATE TABLE another_past (a int)");
    back.write_wal(4000);
    shows(&archiver, "back", "\"state\":\"broken\"");
    shows(&archiver, "down", "\"stream_connected\":false");
    let pid = "SELECT pid FROM pg_stat_replication";
    let before = good.sql(pid);
    is_archived(&good);
    assert_eq!(good.sql(pid), before, "its stream was never interrupted");
    assert!(archiver.is_running());
    // Clusters that can recover do so.
    down.up();
    streams(&archiver, "down");
    is_archived(&down);
    comes_back(&site.repository("full"));
    wait_flushed(&full, full.lsn());
    // The exit code reports the first cluster that could not continue.
    archiver.signal(Signal::TERM);
    assert_eq!(archiver.wait().code(), Some(2));
    for cluster in ["good", "down", "full"] {
        let verdict = site.verify(cluster);
        assert!(
            verdict.contains("no gap, no damage"),
            "{cluster}: {verdict}"
        );
    }
}

#[test]
fn a_reload_is_validated_first_and_touches_what_changed_only() {
    let Some(bin) = postgres_bin() else { return };
    let (one, two) = (Server::start(&bin, ""), Server::start(&bin, ""));
    let mut site = Site::new();
    site.set("stays", &one.conninfo(), "");
    let archiver = site.run();
    streams(&archiver, "stays");
    let pid = "SELECT pid FROM pg_stat_replication WHERE application_name = 'tidemark'";
    let before = one.sql(pid);

    fs::write(site.file(), "spol = '/nowhere'\n").expect("a configuration");
    archiver.signal(Signal::HUP);
    archiver.wait_for_log("did you mean");
    archiver.wait_for_log("nothing was changed");

    site.set("comes", &two.conninfo(), "");
    site.write();
    archiver.signal(Signal::HUP);
    streams_after(&archiver, "comes");
    is_archived(&two);

    let commits = two.lsn();
    site.set("comes", &two.conninfo(), "slot = \"renamed\"");
    site.write();
    archiver.signal(Signal::HUP);
    wait_until("the new slot is in use", || {
        two.sql("SELECT active FROM pg_replication_slots WHERE slot_name = 'renamed'") == "t"
    });
    is_archived(&two);
    assert!(two.lsn() > commits);

    // What would be removed is shown without the spool's lock.
    let repository = format!("file://{}", site.repository("comes").display());
    let (server, configuration) = (two.conninfo(), site.file());
    let remove = |name: &str, more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_wal-archiver"));
        command.arg("--config").arg(&configuration);
        command.args(["--cluster", name, "remove"]).args(more);
        let output = command.output().expect("wal-archiver runs");
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        (output.status.code(), said)
    };
    let (code, said) = remove("comes", &["--dry-run"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("would drop the slot \"renamed\""), "{said}");
    let (code, said) = remove("comes", &[]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("delete [cluster.comes]"), "{said}");

    site.remove("comes");
    site.write();
    archiver.signal(Signal::HUP);
    archiver.wait_for_log("no longer archived");
    wait_until("the slot is free", || {
        two.sql("SELECT bool_or(active) FROM pg_replication_slots") == "f"
    });
    // The flags name what the table named. An unknown name is refused.
    let (code, said) = remove("comes", &[]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("--conninfo"), "{said}");
    let of_table = ["--conninfo", &server, "--repository", &repository];
    let with_slot = [&of_table[..], &["--slot", "renamed"]].concat();
    let (code, said) = remove("mistyped", &with_slot);
    assert_eq!(code, Some(2), "{said}");
    let (code, said) = remove("comes", &with_slot);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("the slot \"renamed\" is dropped"), "{said}");
    assert!(report(&archiver, "comes").starts_with("HTTP/1.1 404"));
    assert_eq!(one.sql(pid), before, "it was never interrupted");
    is_archived(&one);
    assert_eq!(archiver.terminate().code(), Some(0));
    site.set("comes", &two.conninfo(), "");
    site.write();
    for cluster in ["stays", "comes"] {
        let verdict = site.verify(cluster);
        assert!(
            verdict.contains("no gap, no damage"),
            "{cluster}: {verdict}"
        );
    }
}

fn streams_after(archiver: &Archiver, cluster: &str) {
    wait_until(&format!("{cluster} is known"), || {
        report(archiver, cluster).starts_with("HTTP/1.1 200")
    });
    streams(archiver, cluster);
}

#[test]
fn systemd_is_told_and_its_watchdog_fed() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("notify");
    let socket = UnixDatagram::bind(&path).expect("a socket");
    socket
        .set_read_timeout(Some(Duration::from_secs(60)))
        .expect("a timeout");
    let receive = || {
        let mut message = [0; 4096];
        let length = socket.recv(&mut message).expect("a message");
        String::from_utf8_lossy(&message[..length]).into_owned()
    };
    let wait_for = |wanted: &str| {
        for _ in 0..1000 {
            if receive().starts_with(wanted) {
                return;
            }
        }
        panic!("systemd was never told {wanted}");
    };
    let mut command = place.command(&server.conninfo());
    command
        .env("NOTIFY_SOCKET", &path)
        .env("WATCHDOG_USEC", "600000");
    let archiver = place.run_with(command);
    wait_for("READY=1");
    archiver.wait_for_log("serving HTTP");
    assert!(archiver.get("/readyz").starts_with("HTTP/1.1 200"));
    wait_for("STATUS=1 cluster: main is ");
    wait_for("WATCHDOG=1");
    archiver.wait_for_log("INFO streaming");
    wait_for("WATCHDOG=1");
    archiver.signal(Signal::HUP);
    wait_for("RELOADING=1\nMONOTONIC_USEC=");
    wait_for("READY=1");
    archiver.signal(Signal::TERM);
    wait_for("STOPPING=1");
}

#[test]
fn a_second_signal_ends_at_once_and_nothing_is_lost() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let mut archiver = place.run(&server.conninfo());
    archiver.wait_for_log("INFO streaming");
    goes_away(&place.repository());
    server.write_wal(3000);
    let lsn = server.lsn();
    wait_flushed(&server, lsn);
    archiver.signal(Signal::TERM);
    archiver.wait_for_log("SIGTERM: draining");
    assert!(archiver.is_running(), "it waits for the store");
    archiver.signal(Signal::TERM);
    assert_eq!(archiver.wait().code(), Some(5));
    assert!(archiver.log().contains("do not delete the spool"));
    comes_back(&place.repository());
    // With the server gone only the spool has this WAL.
    server.down("immediate");
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("not streaming");
    assert_eq!(archiver.terminate().code(), Some(0));
    assert!(place.assert_equals_pg_wal(&server.data()) >= lsn);
}

#[test]
fn another_archiver_takes_over_at_once() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    let place = Place::new();
    let load = server.load();
    for spool in ["a", "b", "a"] {
        let spool = place.spool().join(spool);
        let archiver = place.run_with(place.command_with_spool(&server.conninfo(), &spool));
        archiver.wait_for_log("INFO streaming");
        wait_flushed(&server, server.lsn());
        assert_eq!(archiver.terminate().code(), Some(0));
        fs::remove_file(place.spool().with_file_name("archiver.log")).expect("a log");
    }
    drop(load);
    let spool = place.spool().join("b");
    let archiver = place.run_with(place.command_with_spool(&server.conninfo(), &spool));
    place.assert_whole(&server, archiver);
}

#[test]
fn a_repository_that_is_away_at_the_very_first_start_is_waited_for() {
    let Some(bin) = postgres_bin() else { return };
    let server = Server::start(&bin, "");
    let place = Place::new();
    fs::remove_dir(place.repository()).expect("it goes");
    fs::write(place.repository(), "a file is no folder").expect("in its place");
    let archiver = place.run(&server.conninfo());
    archiver.wait_for_log("not streaming; retrying");
    assert!(archiver.get("/readyz").starts_with("HTTP/1.1 200"));
    let said = report(&archiver, "main");
    assert!(said.contains("\"state\":\"unknown\""), "{said}");
    assert!(said.contains("repository"), "{said}");
    server.write_wal(1200);
    fs::remove_file(place.repository()).expect("the file goes");
    fs::create_dir(place.repository()).expect("it is there");
    let lsn = server.lsn();
    wait_flushed(&server, lsn);
    assert_eq!(archiver.terminate().code(), Some(0));
    assert!(place.assert_equals_pg_wal(&server.data()) >= lsn);
}
