//! Many clusters in one daemon with few file descriptors. The daemon raises the limit as far as it
//! may. Clusters that do not fit wait and report that. A cluster that finds no descriptor during
//! its work loses nothing.
//!
//! One server stands for all of them, with a slot for each. `TIDEMARK_LONG=1` uses a hundred
//! clusters instead of thirty, and prints the cost of a hundred idle clusters.

use std::{
    fmt::Write as _,
    fs,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use tempfile::TempDir;

use crate::support::{Archiver, Server, postgres_bin, run_command, succeed, wait_until};

/// A hundred clusters stream within this time of the daemon's start.
const STREAMING_MAX: Duration = Duration::from_secs(30);

struct Site {
    server: Server,
    dir: TempDir,
    clusters: usize,
}

impl Site {
    fn new(clusters: usize) -> Option<Self> {
        let site = Self {
            server: Server::start(
                &postgres_bin()?,
                "max_wal_senders=120\nmax_replication_slots=120\nmax_connections=300\nshared_buffers=16MB",
            ),
            dir: tempfile::tempdir().expect("a directory"),
            clusters,
        };
        fs::create_dir(site.dir.path().join("repository")).expect("a directory");
        site.configure(None);
        Some(site)
    }

    /// Writes the configuration of all clusters except one.
    fn configure(&self, without: Option<usize>) {
        let place = self.dir.path().display();
        let mut text =
            format!("spool = \"{place}/spool\"\nrepository = \"file://{place}/repository\"\n");
        let conninfo = self.server.conninfo();
        for number in (0..self.clusters).filter(|number| Some(*number) != without) {
            write!(
                text,
                "[cluster.c{number}]\nconninfo = \"{conninfo}\"\nslot = \"c{number}\"\n"
            )
            .expect("a text");
        }
        fs::write(self.file(), text).expect("a configuration");
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("tidemark.toml")
    }

    /// Returns `wal-archiver` with these limits on open files.
    fn command(&self, soft: u64, hard: u64) -> Command {
        let mut command = Command::new("/bin/sh");
        command
            .args([
                "-c",
                &format!("ulimit -Sn {soft} && ulimit -Hn {hard} && exec \"$@\""),
            ])
            .args(["sh", env!("CARGO_BIN_EXE_wal-archiver"), "--config"])
            .arg(self.file());
        command
    }

    fn run(&self, soft: u64, hard: u64) -> Archiver {
        let archiver = run_command(self.command(soft, hard), self.dir.path());
        archiver.wait_for_log("serving HTTP");
        archiver
    }

    fn streaming(&self) -> usize {
        let streams = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'";
        self.server.sql(streams).parse().expect("a number")
    }

    /// Writes several segments of WAL and waits until every cluster has acknowledged all of it.
    fn everything_is_archived(&self) {
        self.server.write_wal(2500);
        let lsn = self.server.lsn();
        wait_until("every cluster has acknowledged it", || {
            let done = "SELECT count(*) FROM pg_stat_replication WHERE flush_lsn >= ";
            self.server.sql(&format!("{done}'{lsn}'")) == self.clusters.to_string()
        });
    }

    fn finish(&self, archiver: Archiver) {
        assert_eq!(archiver.terminate().code(), Some(0));
        let verified = self.command(256, 8192).arg("verify").output();
        let verdict = succeed("verify", &verified.expect("wal-archiver runs"));
        let whole = verdict.matches("no gap, no damage").count();
        assert_eq!(whole, self.clusters, "{verdict}");
    }
}

/// The daemon's files in `/proc`.
struct Process(u32);

impl Process {
    fn of(archiver: &Archiver) -> Self {
        Self(archiver.id())
    }

    fn file(&self, name: &str) -> String {
        fs::read_to_string(format!("/proc/{}/{name}", self.0)).expect("it runs")
    }

    fn descriptors(&self) -> u64 {
        let entries = fs::read_dir(format!("/proc/{}/fd", self.0)).expect("it runs");
        u64::try_from(entries.count()).expect("small")
    }

    fn status(&self, name: &str) -> u64 {
        let status = self.file("status");
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let number = line.and_then(|line| line.split_whitespace().next());
        number
            .and_then(|number| number.parse().ok())
            .expect("a number")
    }

    /// The processor time used so far, in hundredths of a second.
    fn ticks(&self) -> u64 {
        let stat = self.file("stat");
        let after = stat.rsplit(") ").next().expect("fields");
        let field = |at: usize| {
            after
                .split(' ')
                .nth(at)
                .and_then(|text| text.parse::<u64>().ok())
        };
        field(11).expect("utime") + field(12).expect("stime")
    }

    fn limit(&self, soft: u64, hard: u64) -> rustix::io::Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.0).expect("a pid")).expect("a pid");
        let limit = Rlimit {
            current: Some(soft),
            maximum: Some(hard),
        };
        prlimit(Some(pid), Resource::Nofile, limit).map(drop)
    }
}

/// Counts a text in the clusters' reports.
fn count(archiver: &Archiver, text: &str) -> usize {
    archiver.get("/api/v1/clusters").matches(text).count()
}

#[test]
fn many_clusters_stream_although_the_soft_limit_of_open_files_is_low() {
    let clusters = if testbed::is_long() { 100 } else { 30 };
    let Some(site) = Site::new(clusters) else {
        return;
    };
    let began = Instant::now();
    let archiver = site.run(256, 8192);
    wait_until("all of them stream", || site.streaming() == clusters);
    let took = began.elapsed();
    let process = Process::of(&archiver);
    site.everything_is_archived();
    let used = process.descriptors();
    eprintln!(
        "{clusters} clusters stream after {:.1} s, with {used} descriptors ({:.1} each), {} threads ({:.1} each), {} KiB resident ({} each)",
        took.as_secs_f64(),
        per(used, clusters),
        process.status("Threads:"),
        per(process.status("Threads:"), clusters),
        process.status("VmRSS:"),
        process.status("VmRSS:") / clusters as u64,
    );
    assert!(took < STREAMING_MAX, "{took:?}");
    let log = archiver.log();
    for word in ["broken", "descriptors_short", "Too many open files"] {
        assert!(!log.contains(word), "{word}");
    }
    // The reported need is sufficient, and not much more than the real one.
    let needed = number_after(&log, "needed=");
    assert!((needed / 2..needed).contains(&used), "{used} of {needed}");
    let check = site.command(256, 8192).arg("check").output();
    let said = String::from_utf8(check.expect("wal-archiver runs").stdout).expect("text");
    assert!(
        said.contains(&format!("{clusters} clusters need about {needed}")),
        "{said}"
    );
    if testbed::is_long() {
        // Bursts are over after this time.
        std::thread::sleep(Duration::from_secs(30));
        let (before, began) = (process.ticks(), Instant::now());
        std::thread::sleep(Duration::from_secs(20));
        let busy = (process.ticks() - before) as f64 / began.elapsed().as_secs_f64();
        eprintln!(
            "idle: {busy:.1} % of a core, {} KiB resident ({} each)",
            process.status("VmRSS:"),
            process.status("VmRSS:") / clusters as u64,
        );
    }
    site.finish(archiver);
}

fn per(all: u64, clusters: usize) -> f64 {
    all as f64 / clusters as f64
}

fn number_after(log: &str, name: &str) -> u64 {
    let (_, after) = log.split_once(name).expect("it is logged");
    let digits: String = after.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().expect("a number")
}

fn waiting(archiver: &Archiver, number: usize) -> bool {
    let report = archiver.get(&format!("/api/v1/clusters/c{number}"));
    report.contains("not started: the limit on open files is 256")
}

#[test]
fn clusters_that_do_not_fit_wait_for_descriptors_and_say_so() {
    let Some(site) = Site::new(12) else { return };
    let archiver = site.run(256, 256);
    let process = Process::of(&archiver);
    archiver.wait_for_log("the limit on open files is too small for all clusters");
    let starting = usize::try_from(number_after(&archiver.log(), "starting=")).expect("small");
    assert!((2..12).contains(&starting), "{starting}");
    let waits = |number: &usize| waiting(&archiver, *number);
    wait_until("those that fit stream, the others wait", || {
        site.streaming() == starting && (0..12).filter(waits).count() == 12 - starting
    });
    assert_eq!(count(&archiver, "\"state\":\"broken\""), 0);
    let said = site
        .command(256, 256)
        .arg("check")
        .output()
        .expect("wal-archiver runs");
    let text = String::from_utf8_lossy(&said.stdout);
    assert!(
        text.contains("FAIL  open files: 12 clusters need about"),
        "{text}"
    );
    assert_eq!(said.status.code(), Some(2), "{text}");
    // A cluster that ends frees descriptors for another one.
    let started = (0..12).find(|number| !waits(number));
    site.configure(started);
    archiver.signal(Signal::HUP);
    archiver.wait_for_log("no longer archived");
    archiver.wait_for_log("there are file descriptors now; starting");
    wait_until("as many as fit stream again", || {
        site.streaming() == starting
    });
    site.configure(None);
    archiver.signal(Signal::HUP);
    wait_until("the one that was added waits", || {
        started.as_ref().is_some_and(waits)
    });
    // A raised limit takes effect at once. Raising it needs a privilege.
    if process.limit(256, 4096).is_ok() {
        wait_until("all of them stream", || site.streaming() == 12);
        site.everything_is_archived();
        site.finish(archiver);
        // With a history every catalog has tables open. The dashboard still has its descriptors.
        let archiver = site.run(256, 256);
        wait_until("those that fit stream, the others wait", || {
            site.streaming() == starting
                && (0..12).filter(|number| waiting(&archiver, *number)).count() == 12 - starting
        });
        let log = archiver.log();
        for word in ["Too many open files", "catalog_in_memory"] {
            assert!(!log.contains(word), "{word}");
        }
    }
}

#[test]
fn a_cluster_that_finds_no_descriptor_in_the_middle_goes_on_without_a_loss() {
    let Some(site) = Site::new(6) else { return };
    let archiver = site.run(1024, 1024);
    let process = Process::of(&archiver);
    wait_until("all of them stream", || site.streaming() == 6);
    site.everything_is_archived();
    for round in 0..2 {
        // Open descriptors stay open. Everything that needs a new one fails: the next segment, a
        // connection, an object, an HTTP request.
        let few = process.descriptors().min(60 - 20 * round);
        process.limit(few, 1024).expect("a limit");
        site.server.write_wal(3000);
        wait_until("descriptors are missing", || {
            archiver.log().matches("descriptors_short").count()
                > usize::try_from(round).unwrap_or(usize::MAX)
        });
        site.server.write_wal(3000);
        std::thread::sleep(Duration::from_secs(2));
        process.limit(1024, 1024).expect("a limit");
        wait_until("all of them stream again", || site.streaming() == 6);
        site.everything_is_archived();
        assert_eq!(count(&archiver, "\"state\":\"broken\""), 0);
    }
    site.finish(archiver);
}
