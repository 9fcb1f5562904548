//! A window of `wal_level = minimal` between the backup and the target: changes of that time are
//! not in the WAL, so nothing leads over it, and everything that shows what can be restored says
//! so.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use catalog::Catalog;
use repository::{Repository, WalRange, config::RepositoryUrl};
use testbed::{
    cluster::Cluster,
    programs::{directory, succeed},
    restored::Restored,
};
use wal_format::{Lsn, WalEvent};

use crate::support::{Archived, end_lsn, files_below, oldest_and_newest, query, said};

/// Rows of the table that is created and filled by one transaction, enough that
/// `wal_skip_threshold` (2 MB) keeps them out of the WAL.
const ROWS: &str = "100000";

/// A cluster with a backup, then a window of `wal_level = minimal`, then WAL that is archived.
struct Window {
    archived: Archived,
    /// The record that announces the level, in `pg_waldump`'s words.
    minimal: Lsn,
    /// The transaction that is not in the WAL.
    xid: String,
    /// A moment before the shutdown.
    before: String,
    /// A moment in the window, after that transaction.
    inside: String,
}

impl Window {
    fn make(bin: &Path) -> Self {
        let mut archived = Archived::start(bin, "");
        archived.sql("CREATE TABLE kept (n int); INSERT INTO kept VALUES (1)");
        archived.backup();
        archived.sql("INSERT INTO kept VALUES (2)");
        let from = archived.end_lsn();
        archived.finish();
        let before = now(&archived.cluster);
        let cluster = &archived.cluster;
        let slots = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots";
        archived.sql(slots);
        restart(cluster, "wal_level = minimal\nmax_wal_senders = 0");
        let fill = format!(
            "BEGIN; CREATE TABLE lost (n int); \
             INSERT INTO lost SELECT generate_series(1, {ROWS}); SELECT txid_current()"
        );
        // One connection: the transaction ends with it.
        let xid = query(&cluster.conninfo(), &format!("{fill}; COMMIT"));
        let inside = now(cluster);
        archived.sql("INSERT INTO kept VALUES (3)");
        restart(cluster, "wal_level = replica\nmax_wal_senders = 10");
        archived.sql("INSERT INTO kept VALUES (4)");
        let to = end_lsn(&cluster.conninfo());
        let minimal = announced(cluster, from, to);
        archived.sql("SELECT pg_switch_wal()");
        Self {
            archived,
            minimal,
            xid,
            before,
            inside,
        }
    }

    /// Pushes every complete segment, as `archive_command` does. No daemon takes a backup.
    fn push(&self) {
        let cluster = &self.archived.cluster;
        let current = self
            .archived
            .sql("SELECT pg_walfile_name(pg_current_wal_insert_lsn())");
        for path in files_below(&cluster.data().join("pg_wal")) {
            let name = path.file_name().and_then(|name| name.to_str());
            if name.is_some_and(|name| name.len() == 24 && name < current.as_str()) {
                let mut push = self.archived.place.program("wal-archiver").expect("built");
                succeed(push.arg("push").arg(&path)).expect("a push");
            }
        }
    }

    fn plan(&self, target: &[&str]) -> (Option<i32>, String) {
        let output = self
            .archived
            .pitr_restore()
            .args(["--dry-run"])
            .args(target)
            .output();
        let output = output.expect("it runs");
        let (plan, error) = said(&output);
        (output.status.code(), format!("{plan}{error}"))
    }

    /// Returns the exit code and the output of `wal-archiver verify`.
    fn verify(&self) -> (Option<i32>, String) {
        let mut verify = self.archived.place.program("wal-archiver").expect("built");
        let output = verify.arg("verify").output().expect("it runs");
        let (lines, error) = said(&output);
        (output.status.code(), format!("{lines}{error}"))
    }

    fn restored(&self, bin: &Path, target: &[&str]) -> Restored {
        Restored::start(&self.archived.place, bin, target).expect("a restored server")
    }
}

fn now(cluster: &Cluster) -> String {
    let now = "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US+00')";
    query(&cluster.conninfo(), now)
}

fn restart(cluster: &Cluster, settings: &str) {
    cluster.stop().expect("it stops");
    cluster.configure(settings).expect("configured");
    cluster.start_again().expect("it starts");
}

/// The record that announces `wal_level = minimal`, by `pg_waldump`.
fn announced(cluster: &Cluster, from: Lsn, to: Lsn) -> Lsn {
    let mut waldump = cluster.program("pg_waldump").expect("pg_waldump");
    waldump.arg("-p").arg(cluster.data().join("pg_wal"));
    waldump.args(["-r", "XLOG", "-s", &from.to_string(), "-e", &to.to_string()]);
    let text = succeed(&mut waldump).expect("pg_waldump");
    let is_it =
        |line: &&str| line.contains("PARAMETER_CHANGE") && line.contains("wal_level=minimal");
    let line = text.lines().find(is_it).expect("the record");
    let lsn = line
        .split_once("lsn: ")
        .and_then(|(_, rest)| rest.split(',').next());
    lsn.expect("an LSN").parse().expect("an LSN")
}

#[test]
fn nothing_leads_over_a_window_of_wal_level_minimal() {
    for (major, bin) in oldest_and_newest() {
        eprintln!("PostgreSQL {major}");
        let window = Window::make(&bin);
        window.push();
        let minimal = window.minimal.to_string();
        let nearest = ["--target-lsn", &minimal, "--target-exclusive"];
        let by_xid = ["--target-xid", window.xid.as_str()];
        let by_time = ["--target-time", window.inside.as_str()];
        let by_lsn = ["--target-lsn", minimal.as_str()];
        for target in [&[][..], &by_xid, &by_time, &by_lsn] {
            let (code, words) = window.plan(target);
            assert_eq!(code, Some(3), "{target:?}: {words}");
            for part in [
                "wal_level = minimal",
                &minimal,
                &nearest.join(" "),
                "(last commit 20",
            ] {
                assert!(words.contains(part), "{target:?}: {words}");
            }
        }
        let (code, words) = window.plan(&["--target-xid", "4000000"]);
        assert_eq!(code, Some(3), "{words}");
        assert!(words.contains("is not in the archive"), "{words}");

        // The first transaction after the record is later than this moment.
        let (code, words) = window.plan(&["--target-time", &window.before]);
        assert_eq!(code, Some(0), "{words}");
        let restored = window.restored(&bin, &nearest);
        let stopped = format!("before WAL location (LSN) \"{minimal}\"");
        assert_eq!(restored.stopped(), stopped);
        let rows = "SELECT string_agg(n::text, ',' ORDER BY n) FROM kept";
        assert_eq!(query(&restored.conninfo(), rows), "1,2");
        drop(restored);

        let listing = window.archived.listing();
        assert_eq!(listing["minimal_wal"][0]["start_lsn"], minimal.as_str());
        assert_eq!(listing["restorable"][0]["end_lsn"], minimal.as_str());
        let refusal = listing["refusal"].as_str().expect("a refusal");
        assert!(refusal.contains("wal_level = minimal"), "{refusal}");
        let (code, words) = window.verify();
        assert_eq!(code, Some(4), "{words}");
        assert!(
            words.contains(&format!("wal_level = minimal from {minimal}")),
            "{words}"
        );

        // The archiver sees that nothing leads to the server's present, and takes a base backup.
        let place = &window.archived.place;
        let conninfo = window.archived.cluster.conninfo();
        let daemon = place.daemon_at(&conninfo, "127.0.0.1:0", "the archive is whole again");
        let daemon = daemon.expect("a backup is taken");
        let log = fs::read_to_string(place.path().join("archiver.log")).expect("its log");
        assert!(
            log.contains(&format!("wal_level = minimal from {minimal}")),
            "{log}"
        );
        daemon.stop().expect("it stops");
        let listing = window.archived.listing();
        assert!(listing["refusal"].is_null(), "{listing}");
        let backup = listing["backups"][1]["id"].as_str().expect("a backup");
        let (code, words) = window.verify();
        assert_eq!(code, Some(0), "{words}");
        assert!(
            words.contains("a later backup makes the archive whole"),
            "{words}"
        );
        for target in [&by_xid, &by_time] {
            let (code, words) = window.plan(target);
            assert_eq!(code, Some(3), "{target:?}: {words}");
            let next = format!("--backup {backup} --target-immediate");
            for part in [&nearest.join(" "), &next] {
                assert!(words.contains(part), "{target:?}: {words}");
            }
        }
        let restored = window.restored(&bin, &[]);
        assert_eq!(query(&restored.conninfo(), rows), "1,2,3,4");
        assert_eq!(
            query(&restored.conninfo(), "SELECT count(*) FROM lost"),
            ROWS
        );
    }
}

/// A catalog that does not know of the level, as one of a faulty version would be.
fn forgetful_catalog(window: &Window, directory: &Path) {
    let url = format!(
        "file://{}/repository",
        window.archived.place.path().display()
    );
    let url: RepositoryUrl = url.parse().expect("a URL");
    let name = "main".parse().expect("a name");
    let repository = Repository::open(&url.into(), &name).expect("it opens");
    let identity = repository.identity().expect("readable").expect("claimed");
    let catalog = Catalog::open(directory, &identity).expect("a catalog");
    catalog.refresh(&repository).expect("read");
    for (branch, ..) in catalog.branches().expect("timelines") {
        for range in catalog.ranges(branch, Lsn::ZERO, Lsn::MAX).expect("ranges") {
            let mut summary = catalog.summary(&range).expect("a summary");
            let is_level = |event: &WalEvent| matches!(event, WalEvent::WalLevel { .. });
            summary.events.retain(|(_, event)| !is_level(event));
            let minimal_count = Some(0);
            let range = WalRange {
                minimal_count,
                ..range
            };
            catalog.put_range(&range, &summary).expect("stored");
        }
    }
    drop(catalog);
    // The servers' user reads it.
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).expect("chmod");
    for file in files_below(directory) {
        fs::set_permissions(file, fs::Permissions::from_mode(0o644)).expect("chmod");
    }
}

#[test]
fn the_warning_of_the_server_is_never_ignored() {
    for (major, bin) in oldest_and_newest() {
        eprintln!("PostgreSQL {major}");
        let window = Window::make(&bin);
        window.push();
        let root = directory().expect("a directory");
        let catalog = root.path().join("catalog");
        forgetful_catalog(&window, &catalog);
        let catalog = format!("--catalog={}", catalog.display());
        let (code, words) = window.plan(&[&catalog]);
        assert_eq!(code, Some(0), "the plan does not know it: {words}");
        let place = &window.archived.place;
        let output = Restored::command(place, &bin, root.path(), &[&catalog])
            .and_then(|mut restore| Ok(restore.output()?))
            .expect("it runs");
        let (_, error) = said(&output);
        assert_eq!(output.status.code(), Some(4), "{error}");
        for part in ["rows are missing", "WAL was generated with"] {
            assert!(error.contains(part), "{error}");
        }
        let left = root.path().join("data/postmaster.pid");
        assert!(!left.exists(), "it is left running");
    }
}
