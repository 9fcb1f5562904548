//! An archived cluster to restore from, and small tools for all tests.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    thread::sleep,
    time::{Duration, Instant},
};

pub(crate) use testbed::is_long as long;
use testbed::{
    cluster::{Cluster, connect},
    place::{Daemon, Place},
    programs::succeed,
    tools::servers_or_skip,
};
use wal_format::Lsn;

/// The time after which a test fails.
const PATIENCE: Duration = Duration::from_secs(120);

/// Returns the servers to test with: 17 or any that exists; in the long tier all; with
/// `TIDEMARK_MAJOR` that one.
pub(crate) fn servers() -> Vec<(u16, PathBuf)> {
    let mut servers = servers_or_skip();
    servers.retain(|(major, _)| *major >= 14);
    if servers.is_empty() {
        eprintln!("SKIPPED: no PostgreSQL server is installed; run `make install-tools`");
    }
    let asked = env::var("TIDEMARK_MAJOR").ok();
    let asked = asked.and_then(|major| major.parse().ok());
    if !long() || asked.is_some() {
        let wanted = asked.unwrap_or(17_u16);
        let at = servers.iter().position(|(major, _)| *major == wanted);
        servers = servers.into_iter().skip(at.unwrap_or(0)).take(1).collect();
    }
    servers
}

/// The oldest and the newest version that are installed; with `TIDEMARK_MAJOR` that one.
pub(crate) fn oldest_and_newest() -> Vec<(u16, PathBuf)> {
    let mut servers = servers_or_skip();
    let asked = env::var("TIDEMARK_MAJOR").ok();
    if let Some(asked) = asked.and_then(|major| major.parse::<u16>().ok()) {
        servers.retain(|(major, _)| *major == asked);
    }
    if servers.len() > 2 {
        servers.drain(1..servers.len() - 1);
    }
    servers
}

/// Settings of a small fast server that keeps all its WAL.
pub(crate) const SETTINGS: &str = "fsync = off\nshared_buffers = 16MB\nautovacuum = off\n\
    wal_keep_size = 2GB\nmax_prepared_transactions = 64\ntrack_commit_timestamp = on\n";

/// A server whose WAL is streamed into a repository.
pub(crate) struct Archived {
    pub(crate) cluster: Cluster,
    pub(crate) place: Place,
    daemon: Option<Daemon>,
}

impl Archived {
    /// Starts both, with segments of 1 MiB.
    pub(crate) fn start(bin: &Path, settings: &str) -> Self {
        let settings = format!("{SETTINGS}{settings}");
        Self::of(Cluster::start(bin, 1, &settings).expect("a server"))
    }

    /// Archives a server that runs already.
    pub(crate) fn of(cluster: Cluster) -> Self {
        Self::at(cluster, Place::new().expect("a place"))
    }

    /// Archives a server that runs already, in this place.
    pub(crate) fn at(cluster: Cluster, place: Place) -> Self {
        let daemon = place.daemon(&cluster, "127.0.0.1:0").expect("an archiver");
        Self {
            cluster,
            place,
            daemon: Some(daemon),
        }
    }

    /// Takes a base backup. Returns its ID.
    pub(crate) fn backup(&self) -> String {
        let conninfo = self.cluster.conninfo();
        let mut backup = self.place.program("wal-archiver").expect("it is built");
        succeed(backup.args(["--conninfo", &conninfo, "backup"])).expect("a backup");
        let listed = self.listing();
        let backups = listed["backups"].as_array().expect("backups");
        let newest = backups.last().expect("a backup");
        newest["id"].as_str().expect("an id").to_owned()
    }

    /// Returns the output of `pitr-restore list`.
    pub(crate) fn listing(&self) -> serde_json::Value {
        let mut list = self.pitr_restore();
        let said = succeed(list.args(["list", "--json"])).expect("a listing");
        serde_json::from_str(&said).expect("JSON")
    }

    /// Plans a restore to each time and to each end that `pitr-restore list` shows of a restorable
    /// range. Returns the number of the times.
    pub(crate) fn plan_shown_times(&self) -> usize {
        let listing = self.listing();
        let mut shown = 0;
        for range in listing["restorable"].as_array().expect("ranges") {
            let timeline = range["branch"].as_str().expect("a timeline");
            let plan = |arguments: &[&str]| {
                let mut plan = self.pitr_restore();
                plan.arg("--dry-run").args(arguments);
                if range["by_default"] == false {
                    plan.args(["--target-timeline", timeline]);
                }
                succeed(&mut plan).unwrap_or_else(|error| panic!("{error}: {listing:#}"));
            };
            for time in ["first_time", "last_time"] {
                if let Some(time) = range[time].as_str() {
                    plan(&["--target-time", time]);
                    shown += 1;
                }
            }
            // The end is the first byte after the range.
            let end = range["end_lsn"].as_str().expect("an LSN");
            plan(&["--target-lsn", end, "--target-exclusive"]);
        }
        shown
    }

    /// Follows another server, which descends from the first.
    pub(crate) fn follow(&mut self, conninfo: &str) {
        let daemon = self
            .place
            .daemon_at(conninfo, "127.0.0.1:0", " INFO streaming");
        self.daemon = Some(daemon.expect("an archiver"));
    }

    /// Runs SQL on the primary. Returns the first column of the first row as text.
    pub(crate) fn sql(&self, sql: &str) -> String {
        query(&self.cluster.conninfo(), sql)
    }

    /// Returns the end of the flushed WAL.
    pub(crate) fn end_lsn(&self) -> Lsn {
        end_lsn(&self.cluster.conninfo())
    }

    /// Stops the archiver when it has everything. Returns the end of the WAL.
    pub(crate) fn finish(&mut self) -> Lsn {
        self.finish_at(&self.cluster.conninfo())
    }

    /// As [`Archived::finish`], for the server that is followed.
    pub(crate) fn finish_at(&mut self, conninfo: &str) -> Lsn {
        let end = end_lsn(conninfo);
        wait_archived(conninfo, end);
        if let Some(daemon) = self.daemon.take() {
            daemon.stop().expect("the archiver stops");
        }
        end
    }

    /// Returns `pitr-restore` for this place.
    pub(crate) fn pitr_restore(&self) -> Command {
        self.place.program("pitr-restore").expect("it is built")
    }
}

pub(crate) fn end_lsn(conninfo: &str) -> Lsn {
    // Only a commit that waits flushes the WAL of earlier asynchronous ones.
    let flush = "SET synchronous_commit = on; SELECT pg_logical_emit_message(true, 'flush', '')";
    query(conninfo, flush);
    let lsn = query(conninfo, "SELECT pg_current_wal_flush_lsn()");
    lsn.parse().expect("an LSN")
}

/// Waits until the archiver has everything of the server up to `lsn`.
pub(crate) fn wait_archived(conninfo: &str, lsn: Lsn) {
    let flushed = "SELECT coalesce(max(flush_lsn), '0/0') FROM pg_stat_replication";
    wait_until(&format!("the archiver has {lsn}"), || {
        query(conninfo, flushed)
            .parse::<Lsn>()
            .is_ok_and(|flushed| flushed >= lsn)
    });
}

/// Returns every file below a directory, in order.
pub(crate) fn files_below(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![root.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).expect("a folder").flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
            } else {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// Returns every file below a directory, with its content.
pub(crate) fn contents_below(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let files = files_below(root).into_iter();
    files
        .map(|path| (path.clone(), fs::read(&path).expect("a file")))
        .collect()
}

/// Runs SQL. Returns the first column of the first row as text.
pub(crate) fn query(conninfo: &str, sql: &str) -> String {
    let mut client = connect(conninfo).expect("a connection");
    let messages = client
        .simple_query(sql)
        .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    let row = messages.iter().find_map(|message| match message {
        postgres::SimpleQueryMessage::Row(row) => row.get(0),
        _ => None,
    });
    row.unwrap_or_default().to_owned()
}

/// Returns both outputs of a program as text.
pub(crate) fn said(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    (text(&output.stdout), text(&output.stderr))
}

pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        sleep(Duration::from_millis(50));
    }
}

/// Pseudorandom numbers (xorshift). The caller prints the seed.
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) fn new() -> Self {
        let given = env::var("TIDEMARK_SEED")
            .ok()
            .and_then(|seed| seed.parse().ok());
        let now = jiff::Timestamp::now().as_microsecond().unsigned_abs();
        let seed = given.unwrap_or(now) | 1;
        eprintln!("TIDEMARK_SEED={seed}");
        Self(seed)
    }

    /// Returns a number below `end`, which is not 0.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % end as u64).expect("it is below a usize")
    }
}

/// Returns the records of a kind in the audit trail.
pub(crate) fn records(place: &Place, kind: &str) -> Vec<serde_json::Value> {
    let mut audit = place.program("wal-archiver").expect("it is built");
    let said = succeed(audit.args(["audit", "--json", "--kind", kind])).expect("records");
    let mut documents: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    match documents[0]["records"].take() {
        serde_json::Value::Array(records) => records,
        other => panic!("{other}"),
    }
}

/// Runs `wal-archiver switchover-check` until it holds. Returns the exit code and the output.
pub(crate) fn switchover_check(
    place: &Place,
    conninfo: &str,
    daemon: &Daemon,
) -> (Option<i32>, String) {
    let address = daemon.address().expect("a log").expect("an address");
    let mut check = place.program("wal-archiver").expect("it is built");
    check.args(["--conninfo", conninfo, "switchover-check", "--wait=30s"]);
    let output = check.arg(format!("--http={address}")).output();
    let output = output.expect("it runs");
    let (told, problem) = said(&output);
    (output.status.code(), format!("{told}\n{problem}"))
}
